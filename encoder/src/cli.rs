//! The command line of `serenity-encoder`. Exit codes: 0 done, 64 bad configuration or command line, 65 bad data, 69 something needed is
//! absent, 70 an invariant broke, 75 interrupted or disk full (run the same command again).

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use serenity_cuda::Ty;
use serenity_protocol::cache::Check;
use serenity_protocol::cache::text_model::TextGeometry;
use serenity_protocol::config::{Config, DeviceKind, OverrideArgs};
use serenity_protocol::message::Role;
use serenity_protocol::process::{self, Process};
use serenity_protocol::slab::text_encoder::TextModel;
use serenity_protocol::{Error, Result};

use crate::engine::HiddenBudget;
use crate::parity::{self, TextPlace};
use crate::run::{HIDDEN_BYTES_MAX, RunOptions, Shard, run};
use crate::vae::{self, Place};
use crate::{bench, cache_tool, remote, text};

/// Encodes captions and images into the cache that the trainer reads
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    job: JobArgs,
    /// Write a Chrome/Perfetto trace of this process
    #[arg(long, global = true, value_name = "FILE")]
    trace: Option<PathBuf>,
}

#[derive(Args)]
struct JobArgs {
    /// Configuration of the run
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    overrides: OverrideArgs,
    /// Encode for another machine: frames on standard input and output (the other side starts this over ssh)
    #[arg(long, conflicts_with_all = ["config", "shard", "verify"])]
    stdio: bool,
    /// Do the i-th of n equal parts of the work, i from 0 (for job arrays that fill one cache folder)
    #[arg(long, value_name = "i/n", default_value = "0/1")]
    shard: Shard,
    /// Read and verify every entry that exists, not only those that changed since they were last verified
    #[arg(long)]
    verify: bool,
    /// MiB of hidden states that are kept in memory; more go to a nameless file (in the cache folder; with --stdio in the folder for
    /// temporary files)
    #[arg(long, value_name = "MIB", default_value_t = (HIDDEN_BYTES_MAX >> 20) as u64)]
    hidden_mb: u64,
}

#[derive(Subcommand)]
enum Command {
    /// Time the text encoder and the VAE on this machine, against what storage and processor allow
    Bench(BenchArgs),
    /// How far embeddings from an INT8 slab of the text encoder are from the checkpoint's, in float32 on random captions
    CompareSlab(CompareSlabArgs),
    /// Look into the cache folder of a configuration
    #[command(subcommand)]
    Cache(CacheCommand),
    /// One computation in float32 for comparison with the reference
    #[command(subcommand)]
    Parity(ParityCommand),
    /// Write a text encoder and a VAE of FLUX.2's size with random weights, for bench (35 GB)
    Synth(SynthArgs),
    /// Compare both encoders on a GPU with the reference and with the processor
    GpuCheck(GpuCheckArgs),
}

#[derive(Subcommand)]
enum CacheCommand {
    /// All entries: kind, name, size, whether the configuration's run uses them
    List(CacheArgs),
    /// Read every entry; corrupt ones are set aside (exit 65), and the next run makes them again
    Verify(CacheArgs),
    /// Remove entries that the configuration's run does not use, and what dead processes left
    Prune(PruneArgs),
}

#[derive(Args)]
struct CacheArgs {
    /// Configuration that names model, data and cache folder
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    #[command(flatten)]
    overrides: OverrideArgs,
    /// JSON on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct PruneArgs {
    #[command(flatten)]
    cache: CacheArgs,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
}

#[derive(Args)]
struct BenchArgs {
    /// Configuration that names the model and the data
    #[arg(long, value_name = "FILE", required_unless_present_any = ["vae", "text_encoder"])]
    config: Option<PathBuf>,
    #[command(flatten)]
    overrides: OverrideArgs,
    /// Time the VAE in this folder or file alone, on random images
    #[arg(long, value_name = "DIR", conflicts_with = "config")]
    vae: Option<PathBuf>,
    /// Time the text encoder in this folder alone, on random tokens
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config", "vae"])]
    text_encoder: Option<PathBuf>,
    /// With --text-encoder: read this INT8 slab in place of its weights
    #[arg(long, value_name = "SLAB", requires = "text_encoder")]
    slab: Option<PathBuf>,
    /// With --text-encoder: how many captions
    #[arg(long, value_name = "N", default_value_t = 118)]
    captions: usize,
    /// With --text-encoder: real tokens of a caption, on average
    #[arg(long, value_name = "N", default_value_t = 140)]
    tokens: usize,
    /// With --text-encoder: threads that read weights
    #[arg(long, value_name = "N")]
    readers: Option<usize>,
    #[command(flatten)]
    place: PlaceArgs,
    /// With --vae: side of an image in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = 512)]
    resolution: usize,
    /// With --vae: how many images
    #[arg(long, value_name = "N", default_value_t = 118)]
    images: usize,
    /// Encode at most so many captions and images
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct CompareSlabArgs {
    /// Folder of the text encoder
    #[arg(long, value_name = "DIR")]
    text_encoder: PathBuf,
    /// The slab (PREFIX.safetensors) that was built from it
    #[arg(long, value_name = "SLAB")]
    slab: PathBuf,
    /// The three hidden states; a quarter, a half and three quarters of the depth if not given
    #[arg(long, value_name = "A,B,C", value_delimiter = ',')]
    states: Option<Vec<usize>>,
    /// How many captions
    #[arg(long, value_name = "N", default_value_t = 16)]
    captions: usize,
    /// Tokens of a caption, on average
    #[arg(long, value_name = "N", default_value_t = 140)]
    tokens: usize,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    device: DeviceKind,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum ParityCommand {
    /// Captions to embeddings; IN is a JSON file with prompts, max_length and hidden_state_indices
    Text(ParityTextArgs),
    /// Token ids to hidden states of the text encoder in the folder --model; IN is a JSON file with captions, pad_id, max_length and
    /// hidden_state_indices
    Ids(ParityTextArgs),
    /// Images to latents and back; IN is a safetensors file with image_u8_nchw
    Vae(ParityVaeArgs),
}

#[derive(Args)]
struct ParityVaeArgs {
    #[command(flatten)]
    parity: ParityArgs,
    #[command(flatten)]
    place: PlaceArgs,
}

/// Where it computes
#[derive(Args)]
struct PlaceArgs {
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    device: DeviceKind,
    /// The VAE works in strips of so many pixel rows (rounded up to a multiple of 8); whole images where they fit if not given
    #[arg(long, value_name = "ROWS")]
    tile_rows: Option<usize>,
    /// Most device memory of the process, MiB; what is free if not given
    #[arg(long, value_name = "MIB")]
    vram_mb: Option<u64>,
}

impl PlaceArgs {
    fn place(&self) -> Place {
        Place { device: self.device, bytes_max: self.vram_mb.map(|mib| mib.saturating_mul(1 << 20)), tile_rows: self.tile_rows }
    }
}

#[derive(Args)]
struct SynthArgs {
    /// Folder to write `text_encoder/` and `vae/` to
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Only these
    #[arg(long, value_enum, value_name = "PART")]
    only: Option<SynthPart>,
    /// Layers of the text encoder
    #[arg(long, default_value_t = 30, value_name = "N")]
    layers: usize,
    /// Another seed gives other weights
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum SynthPart {
    Text,
    Vae,
}

#[derive(Args)]
struct GpuCheckArgs {
    /// The reference's folder with `model` and `cases`
    #[arg(long, default_value = "tests/fixtures/goldens", value_name = "DIR")]
    goldens: PathBuf,
    /// An INT8 slab of a small text encoder (`serenity-slab build --component text_encoder`), to be read on the device too
    #[arg(long, value_name = "FILE")]
    slab: Option<PathBuf>,
    /// The device, in the driver's order
    #[arg(long, default_value_t = 0)]
    device: usize,
}

/// Where the text encoder computes, and in what
#[derive(Args)]
struct ParityTextArgs {
    #[command(flatten)]
    parity: ParityArgs,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    device: DeviceKind,
    /// f32 or bf16
    #[arg(long, default_value = "f32", value_parser = parse_type)]
    dtype: Ty,
}

impl ParityTextArgs {
    fn place(&self) -> TextPlace {
        TextPlace { device: self.device, ty: self.dtype }
    }
}

fn parse_type(text: &str) -> std::result::Result<Ty, String> {
    match text {
        "f32" => Ok(Ty::F32),
        "bf16" => Ok(Ty::Bf16),
        _ => Err(format!("'{text}' is no type: f32 or bf16")),
    }
}

fn parse_device(text: &str) -> std::result::Result<DeviceKind, String> {
    match text.split_once(':').map_or((text, Some(0)), |(kind, ordinal)| (kind, ordinal.parse().ok())) {
        ("cpu", _) if text == "cpu" => Ok(DeviceKind::Cpu),
        ("cuda", Some(ordinal)) => Ok(DeviceKind::Cuda(ordinal)),
        _ => Err(format!("'{text}' is no device: cpu, cuda or cuda:N")),
    }
}

#[derive(Args)]
struct ParityArgs {
    /// Folder of the model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Input
    #[arg(long, value_name = "IN")]
    case: PathBuf,
    /// Result
    #[arg(long, value_name = "OUT")]
    out: PathBuf,
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version are no failure; a wrong command line has the code of a wrong configuration. If the terminal is gone
            // there is nobody to tell.
            let _ = e.print();
            return if e.use_stderr() { ExitCode::from(Error::config("").exit_code()) } else { ExitCode::SUCCESS };
        }
    };
    process::main(Role::Encoder, cli.trace.as_deref(), |process| match &cli.command {
        None => job(&cli.job, process),
        Some(Command::Bench(args)) => bench(args, process),
        Some(Command::CompareSlab(args)) => compare_slab(args, process),
        Some(Command::Cache(command)) => cache(command, process),
        Some(Command::Parity(ParityCommand::Text(args))) => {
            let ParityArgs { model, case, out } = &args.parity;
            parity::text_on(args.place(), model, case, out)
        }
        Some(Command::Parity(ParityCommand::Ids(args))) => {
            let ParityArgs { model, case, out } = &args.parity;
            parity::ids(args.place(), model, case, out)
        }
        Some(Command::Parity(ParityCommand::Vae(args))) => {
            let ParityArgs { model, case, out } = &args.parity;
            parity::vae_on(args.place.place(), model, case, out)
        }
        Some(Command::Synth(args)) => synth(args),
        Some(Command::GpuCheck(args)) => gpu_check(args),
    })
}

fn synth(args: &SynthArgs) -> Result<()> {
    if args.only != Some(SynthPart::Vae) {
        let geometry = TextGeometry { layers: args.layers.max(1), ..text::synth::mistral() };
        text::synth::write(&args.output.join("text_encoder"), &geometry, args.seed)?;
    }
    if args.only != Some(SynthPart::Text) {
        vae::synth::write(&args.output.join("vae"), args.seed)?;
    }
    Ok(())
}

/// Whether a device of NVIDIA's is there at all.
fn no_device() -> bool {
    !["/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"].iter().any(|path| std::path::Path::new(path).exists())
}

fn gpu_check(args: &GpuCheckArgs) -> Result<()> {
    if no_device() {
        println!("==================================================================");
        println!("SKIPPED: no GPU. Nothing of the encoders on CUDA was checked.");
        println!("==================================================================");
        return Ok(());
    }
    let text = text::check::gpu_check(args.device, &args.goldens, args.slab.as_deref())?;
    let (done, failed) = vae::check::gpu_check(args.device, &args.goldens)?;
    let (done, failed) = (done + text.done, failed + text.failed);
    println!("{done} cases, {failed} failed");
    if failed > 0 {
        return Err(Error::invariant(format!("{failed} of {done} cases of the encoders on CUDA failed")));
    }
    Ok(())
}

fn bench(args: &BenchArgs, process: &Process) -> Result<()> {
    if let Some(path) = &args.text_encoder {
        let place = args.place.place();
        let options = text::bench::Options {
            device: place.device,
            captions: args.captions,
            tokens: args.tokens,
            readers: args.readers,
            bytes_max: place.bytes_max,
        };
        let model = match &args.slab {
            Some(slab) => TextModel::Slab { slab, folder: Some(path) },
            None => TextModel::Checkpoint(path),
        };
        text::bench::run(model, &options, process)?.print(args.json);
        return Ok(());
    }
    if let Some(path) = &args.vae {
        vae::bench::run(path, args.place.place(), args.resolution, args.images, process)?.print(args.json);
        return Ok(());
    }
    let path = args.config.as_deref().ok_or_else(|| Error::config("bench needs --config, --text-encoder or --vae"))?;
    let config = Config::load(path, &args.overrides.clone().into())?;
    bench::run(&config, args.limit, process)?.print(args.json);
    Ok(())
}

fn compare_slab(args: &CompareSlabArgs, process: &Process) -> Result<()> {
    let states = args.states.as_ref().map(|s| <[usize; 3]>::try_from(s.as_slice())).transpose();
    let states = states.map_err(|_| Error::config("--states are three numbers").expected("A,B,C"))?;
    let options = text::compare::Options { states, captions: args.captions, tokens: args.tokens, device: args.device };
    text::compare::run(&args.text_encoder, &args.slab, &options, process)?.print(args.json);
    Ok(())
}

fn cache(command: &CacheCommand, process: &Process) -> Result<()> {
    let load = |args: &CacheArgs| Config::load(&args.config, &args.overrides.clone().into());
    match command {
        CacheCommand::List(args) => cache_tool::print(&cache_tool::list(&load(args)?)?, args.json),
        CacheCommand::Verify(args) => {
            let whole = cache_tool::verify(&load(args)?, process)?;
            if args.json {
                println!("{{\"whole\":{whole}}}");
            } else {
                println!("{whole} entries, all whole");
            }
            Ok(())
        }
        CacheCommand::Prune(args) => {
            let pruned = cache_tool::prune(&load(&args.cache)?, args.dry_run)?;
            if args.cache.json {
                println!("{}", serde_json::to_string(&pruned).map_err(|e| Error::invariant("the result cannot be written").cause(e))?);
            } else {
                let verb = if args.dry_run { "would remove" } else { "removed" };
                println!(
                    "{verb} {} entries, {} leftovers, {} claims of dead processes: {} bytes",
                    pruned.entries, pruned.leftovers, pruned.claims, pruned.bytes
                );
            }
            Ok(())
        }
    }
}

fn job(args: &JobArgs, process: &Process) -> Result<()> {
    let memory_bytes_max = usize::try_from(args.hidden_mb).unwrap_or(usize::MAX).saturating_mul(1 << 20);
    let budget = HiddenBudget { memory_bytes_max, file_bytes_max: None };
    if args.stdio {
        return remote::server::serve(std::io::stdin(), std::io::stdout(), budget, process);
    }
    let path = args.config.as_deref().ok_or_else(|| {
        Error::config("no configuration was given").advice("serenity-encoder --config FILE (see --help for bench and parity)")
    })?;
    let config = Config::load(path, &args.overrides.clone().into())?;
    let check = if args.verify { Check::Deep } else { Check::Changed };
    run(&config, RunOptions { shard: args.shard, check, budget }, process)?;
    Ok(())
}
