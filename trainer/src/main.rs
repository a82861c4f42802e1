//! `serenity-trainer`: trains a LoRA from the ring, or measures, or computes one step for comparison with a reference.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serenity_protocol::config::{Config, DeviceKind, OverrideArgs};
use serenity_protocol::message::Role;
use serenity_protocol::process::{self, Process};
use serenity_protocol::{Error, Result};
use serenity_trainer::cuda::check;
use serenity_trainer::{bench, open, parity, run};

/// Exit code of a wrong command line.
const USAGE: u8 = 64;

/// Trains a LoRA on a frozen FLUX.2 transformer that streams through memory block by block
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunArgs,
    /// Write a Chrome/Perfetto trace of this process
    #[arg(long, global = true, value_name = "FILE")]
    trace: Option<PathBuf>,
}

#[derive(Args)]
struct RunArgs {
    /// Configuration of the run
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    overrides: OverrideArgs,
    /// Take blocks from the loader of the run with this output folder; sets memory.stagehand.ring_of
    #[arg(long, value_name = "DIR")]
    ring: Option<PathBuf>,
    /// Which of that loader's trainers this one is, from 0; sets memory.stagehand.ring_consumer
    #[arg(long, value_name = "I")]
    consumer: Option<usize>,
}

#[derive(Subcommand)]
enum Command {
    /// Measure steps against the limits of this machine; writes no files
    Bench(BenchArgs),
    /// Compute once in float32, with the tensor names of the reference files
    Parity(ParityArgs),
    /// Check the training step on a CUDA device against the reference and the CPU, and time it
    GpuCheck(GpuCheckArgs),
}

#[derive(Args)]
struct GpuCheckArgs {
    /// Sections: golden, processor, streamed, block, timing; all if none is named
    sections: Vec<String>,
    /// The reference's folder with `model` and `cases`
    #[arg(long, default_value = "tests/fixtures/goldens", value_name = "DIR")]
    goldens: PathBuf,
    /// The device, in the driver's order
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// A transformer's config.json to time; FLUX.2 [dev] if not given
    #[arg(long, value_name = "FILE")]
    geometry: Option<PathBuf>,
    /// Rows of the targets table to time (repeatable): 6g, 11g, 24g, 1024, resident, no-recompute, accumulation
    #[arg(long = "row", value_name = "ROW")]
    rows: Vec<String>,
    /// Without --row: device memory of the timed run by the driver's count, MiB
    #[arg(long, default_value_t = 11_468, value_name = "MIB")]
    budget_mb: usize,
    /// Without --row: pixels of a side of the timed run
    #[arg(long, default_value_t = 512)]
    resolution: usize,
    /// Without --row: micro-batches of a timed step
    #[arg(long, default_value_t = 1)]
    accumulation: usize,
    /// Steps to time, after two that warm up
    #[arg(long, default_value_t = 10, value_name = "N")]
    steps: usize,
    /// Folder for the blocks that scripts/check_block_torch.py compares
    #[arg(long, default_value = "output/gpu-check-block", value_name = "DIR")]
    dump: PathBuf,
    /// Let the CPU compute those blocks: checks the script, needs no device
    #[arg(long)]
    on_processor: bool,
    /// Time this tuning too, e.g. side=high,blocks=16,sms=116; may be given several times
    #[arg(long = "variant", value_name = "TUNING")]
    variants: Vec<String>,
    /// A JSON object for each line on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct BenchArgs {
    /// Configuration of the run
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Change one key of the configuration (repeatable)
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Random weights and samples: needs no slab, no loader and no cache
    #[arg(long)]
    synthetic: bool,
    /// Random samples alone: needs slab and loader, but no cache
    #[arg(long, conflicts_with = "synthetic")]
    synthetic_samples: bool,
    /// A transformer's config.json; the random model then has its geometry, and the configured model need not be there
    #[arg(long, value_name = "FILE")]
    geometry: Option<PathBuf>,
    /// Steps to time, after one that warms up
    #[arg(long, default_value_t = 5, value_name = "N")]
    steps: u64,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ParityArgs {
    /// What to compute
    kind: ParityKind,
    /// Model folder, or a single transformer file in either naming
    #[arg(long)]
    model: PathBuf,
    /// Input tensors (.safetensors)
    #[arg(long = "case")]
    case_file: PathBuf,
    /// Output tensors (.safetensors)
    #[arg(long)]
    out: PathBuf,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    device: DeviceKind,
    /// Rows and columns of the latent grid, for a lora-step case that does not say, e.g. 4x6
    #[arg(long, value_name = "HxW", value_parser = parse_grid)]
    grid: Option<(usize, usize)>,
    /// Also write the adapters after the updates of lora-step as a LoRA file
    #[arg(long, value_name = "FILE")]
    lora: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum ParityKind {
    /// One forward pass with the output of every block
    Forward,
    /// Loss and gradients of one sample, and three AdamW updates
    LoraStep,
}

fn parse_grid(text: &str) -> Result<(usize, usize), String> {
    let sides = text.split_once('x').and_then(|(h, w)| Some((h.parse().ok()?, w.parse().ok()?)));
    sides.filter(|(h, w)| *h > 0 && *w > 0).ok_or_else(|| format!("'{text}' is not of the form HxW, e.g. 4x6"))
}

fn parse_device(text: &str) -> Result<DeviceKind, String> {
    match text.split_once(':').map_or((text, Some(0)), |(kind, ordinal)| (kind, ordinal.parse().ok())) {
        ("cpu", _) if text == "cpu" => Ok(DeviceKind::Cpu),
        ("cuda", Some(ordinal)) => Ok(DeviceKind::Cuda(ordinal)),
        _ => Err(format!("'{text}' is no device: cpu, cuda or cuda:N")),
    }
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Also how --help and --version end; nothing can be done if printing fails.
            let _ = e.print();
            return if e.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    process::main(Role::Trainer, cli.trace.as_deref(), |process| match &cli.command {
        None => train(&cli.run, process),
        Some(Command::Bench(args)) => run_bench(args, process),
        Some(Command::Parity(args)) => run_parity(args),
        Some(Command::GpuCheck(args)) => run_gpu_check(args),
    })
}

fn train(args: &RunArgs, process: &Process) -> Result<()> {
    let path = args.config.as_deref().ok_or_else(|| {
        Error::config("no configuration was given").advice("serenity-trainer --config FILE, or one of the subcommands (see --help)")
    })?;
    let mut overrides = args.overrides.clone();
    // As a JSON string: a folder may be called 12.
    let ring = args.ring.as_ref().map(|folder| serde_json::Value::from(folder.to_string_lossy()));
    overrides.set.extend(ring.map(|folder| format!("memory.stagehand.ring_of={folder}")));
    overrides.set.extend(args.consumer.map(|index| format!("memory.stagehand.ring_consumer={index}")));
    let config = Config::load(path, &overrides.into())?;
    run::train(process, open::parts(process, config)?).map(drop)
}

fn run_bench(args: &BenchArgs, process: &Process) -> Result<()> {
    let overrides = OverrideArgs { set: args.set.clone(), ..OverrideArgs::default() };
    let config = Config::load(&args.config, &overrides.into())?;
    let options = bench::Options {
        synthetic: args.synthetic,
        synthetic_samples: args.synthetic_samples,
        geometry: args.geometry.as_deref(),
        steps: args.steps,
    };
    let report = bench::run(process, config, &options)?;
    if args.json {
        println!("{}", serde_json::to_string(&report).map_err(|e| Error::invariant("the report cannot be written as JSON").cause(e))?);
    } else {
        println!("{report}");
    }
    Ok(())
}

fn run_gpu_check(args: &GpuCheckArgs) -> Result<()> {
    let options = check::Options {
        goldens: args.goldens.clone(),
        device: args.device,
        sections: args.sections.clone(),
        rows: args.rows.clone(),
        geometry: args.geometry.clone(),
        budget_mb: args.budget_mb,
        resolution: args.resolution,
        accumulation: args.accumulation,
        steps: args.steps,
        dump: args.dump.clone(),
        on_processor: args.on_processor,
        variants: args.variants.clone(),
    };
    let ok = check::run(&options, &mut |line| {
        let json = args.json.then(|| serde_json::to_string(line).unwrap_or_default());
        println!("{}", json.unwrap_or_else(|| line.to_string()));
    })?;
    if ok { Ok(()) } else { Err(Error::invariant("the training step on the device failed a check")) }
}

fn run_parity(args: &ParityArgs) -> Result<()> {
    let kind = match args.kind {
        ParityKind::Forward => parity::Kind::Forward,
        ParityKind::LoraStep => parity::Kind::LoraStep,
    };
    parity::run(&parity::Request {
        kind,
        device: args.device,
        model: args.model.clone(),
        case: args.case_file.clone(),
        out: args.out.clone(),
        grid: args.grid,
        lora: args.lora.clone(),
    })
}
