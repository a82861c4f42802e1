//! `serenity-loader`: fills the ring from the slab for a trainer, or measures how fast it can.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use serenity_loader::{bench, service};
use serenity_protocol::config::OverrideArgs;
use serenity_protocol::config::{Config, PayloadForm};
use serenity_protocol::geometry::TransformerGeometry;
use serenity_protocol::message::{FromChild, Role};
use serenity_protocol::process::{self, Process};
use serenity_protocol::slab::Slab;
use serenity_protocol::{Error, Result, model_path};

/// Streams the frozen blocks of a slab into the shared ring
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Configuration of the run
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    overrides: OverrideArgs,
    /// Write a Chrome/Perfetto trace of this process
    #[arg(long, global = true, value_name = "FILE")]
    trace: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Measure reading, dequantising and the ring with a consumer that throws everything away
    Bench(BenchArgs),
}

#[derive(Args)]
struct BenchArgs {
    /// Slab
    #[arg(long)]
    slab: PathBuf,
    /// Its manifest
    #[arg(long)]
    manifest: PathBuf,
    /// The model, for a slab whose manifest does not carry the geometry
    #[arg(long)]
    model: Option<String>,
    /// Where INT8 becomes bf16: cpu (in the loader) or gpu (the ring carries INT8)
    #[arg(long, value_parser = ["cpu", "gpu"], default_value = "cpu")]
    dequant: String,
    /// MiB of a slot
    #[arg(long, default_value_t = 64.0)]
    chunk_mb: f64,
    /// MiB of the ring
    #[arg(long, default_value_t = 1024.0)]
    pool_mb: f64,
    /// Passes over the model
    #[arg(long, default_value_t = 4)]
    passes: usize,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = match process::parse::<Cli>() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    process::main(Role::Loader, cli.trace.as_deref(), |process| match &cli.command {
        Some(Command::Bench(args)) => run_bench(args),
        None => serve(&cli, process),
    })
}

fn serve(cli: &Cli, process: &Process) -> Result<()> {
    let path = cli.config.as_deref().ok_or_else(|| {
        Error::config("no configuration was given").advice("serenity-loader --config FILE, or serenity-loader bench --slab S --manifest M")
    })?;
    let config = Config::load(path, &cli.overrides.clone().into())?;
    let slab = Slab::open(&config.memory.slab_path, &config.memory.manifest_path)?;
    let geometry = geometry(&slab, &config.model.path)?;
    service::run(&config, &slab, &geometry, process)?;
    process.send(&FromChild::Done { files: Vec::new() });
    Ok(())
}

/// From the slab's manifest, else from the model.
fn geometry(slab: &Slab, model: &str) -> Result<TransformerGeometry> {
    if let Some(geometry) = slab.geometry() {
        return Ok(geometry.clone());
    }
    Ok(model_path::TransformerSource::open(&model_path::resolve_path(model)?)?.geometry().clone())
}

fn run_bench(args: &BenchArgs) -> Result<()> {
    let slab = Slab::open(&args.slab, &args.manifest)?;
    let no_model = || {
        Error::config("the slab's manifest does not carry the model's geometry")
            .at(Path::new(&args.manifest))
            .advice("add --model with the folder or file of the transformer")
    };
    let geometry = match (&args.model, slab.geometry()) {
        (_, Some(geometry)) => geometry.clone(),
        (Some(model), None) => geometry_of_model(&slab, model)?,
        (None, None) => return Err(no_model()),
    };
    let mib = |mb: f64| ((mb * 1_048_576.0) as u64 / 4096 * 4096).max(4096);
    let options = bench::BenchOptions {
        form: if args.dequant == "cpu" { PayloadForm::Bf16 } else { PayloadForm::Int8 },
        chunk_bytes: mib(args.chunk_mb),
        pool_bytes: mib(args.pool_mb),
        passes: args.passes.max(1),
    };
    let report = bench::run(&slab, &geometry, &options)?;
    if args.json {
        println!("{}", serde_json::to_string(&report).map_err(|e| Error::invariant("the report does not serialise").cause(e))?);
        return Ok(());
    }
    let gb = |rate: f64| format!("{:.2} GB/s", rate / 1e9);
    println!(
        "form {}, {} slots of {:.1} MiB, {} reads",
        report.form,
        report.slots,
        report.chunk_bytes as f64 / 1_048_576.0,
        if report.direct { "direct" } else { "cached" }
    );
    println!("limits      plain read {}, memcpy {}", gb(report.limit_read_rate), gb(report.limit_memcpy_rate));
    println!(
        "first pass  slab {}, payload {}, {:.2} of the plain read",
        gb(report.first_pass_read_rate),
        gb(report.first_pass_payload_rate),
        report.ratio_to_read_limit
    );
    println!("later       payload {} (median; retained chunks are not read)", gb(report.later_pass_payload_rate));
    println!("consumer waited {:.3} s of {:.3} s", report.consumer_wait_seconds, report.pass_seconds.iter().sum::<f64>());
    Ok(())
}

fn geometry_of_model(slab: &Slab, model: &str) -> Result<TransformerGeometry> {
    let geometry = geometry(slab, model)?;
    slab.check_model(&geometry)?;
    Ok(geometry)
}
