//! `serenity-encoder`: see [`serenity_encoder::cli`].
use std::process::ExitCode;

fn main() -> ExitCode {
    serenity_encoder::cli::main()
}
