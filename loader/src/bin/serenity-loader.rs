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
    /// Trainers to feed from one ring; sets memory.stagehand.ring_consumers
    #[arg(long, value_name = "N")]
    consumers: Option<usize>,
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
    /// Passes over the model in which the consumer compares checksums
    #[arg(long, default_value_t = 4)]
    passes: usize,
    /// Passes more in which it does not: what the loader delivers by itself
    #[arg(long, default_value_t = 2)]
    delivery_passes: usize,
    /// Compare checksums in no pass
    #[arg(long)]
    no_verify: bool,
    /// Seconds to look at a full ring that nobody reads, and as long at an empty one; 0 leaves it out
    #[arg(long, default_value_t = 3.0)]
    idle_seconds: f64,
    /// Threads; 0 takes one for each processor
    #[arg(long, default_value_t = 0)]
    threads: usize,
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
    let mut overrides = cli.overrides.clone();
    overrides.set.extend(cli.consumers.map(|n| format!("memory.stagehand.ring_consumers={n}")));
    let config = Config::load(path, &overrides.into())?;
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
    if !args.idle_seconds.is_finite() || args.idle_seconds < 0.0 {
        return Err(Error::config("--idle-seconds is no length of time").found(args.idle_seconds));
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(args.threads)
        .build_global()
        .map_err(|e| Error::absent("cannot start the threads").cause(e))?;
    let options = bench::BenchOptions {
        form: if args.dequant == "cpu" { PayloadForm::Bf16 } else { PayloadForm::Int8 },
        chunk_bytes: mib(args.chunk_mb),
        pool_bytes: mib(args.pool_mb),
        passes: args.passes.max(1),
        verify: !args.no_verify,
        delivery_passes: args.delivery_passes,
        idle: std::time::Duration::from_secs_f64(args.idle_seconds),
    };
    let report = bench::run(&slab, &geometry, &options)?;
    if args.json {
        println!("{}", serde_json::to_string(&report).map_err(|e| Error::invariant("the report does not serialise").cause(e))?);
    } else {
        show(&report);
    }
    Ok(())
}

fn show(report: &bench::BenchReport) {
    let gb = |rate: f64| format!("{:.2} GB/s", rate / 1e9);
    println!(
        "form {}, {} threads, {} slots of {:.1} MiB, {} reads",
        report.form,
        report.threads,
        report.slots,
        report.chunk_bytes as f64 / 1_048_576.0,
        if report.direct { "direct" } else { "cached" }
    );
    let (read, memcpy) = (report.limit_read, report.limit_memcpy_rate);
    println!("limits      plain read {} by {} threads, memcpy {}", gb(read.rate), read.threads, gb(memcpy));
    for (i, pass) in report.passes.iter().enumerate() {
        println!(
            "pass {:<2} {}  payload {}, slab {}, waited {:.3} s of {:.3} s, {:.2} s of processors",
            i + 1,
            if pass.verified { "verified " } else { "delivered" },
            gb(pass.payload_rate),
            gb(pass.read_rate),
            pass.wait_seconds,
            pass.seconds,
            pass.cpu_seconds
        );
        if pass.fill.count > 0 {
            let total: f64 = pass.stages.iter().map(|s| s.1).sum();
            let shares: Vec<String> = pass.stages.iter().map(|(name, s)| format!("{name} {s:.3} s ({:.0} %)", s / total * 100.0)).collect();
            println!("         {}; verifying {:.3} s", shares.join(", "), pass.verify_seconds);
            let ms = |q: &serenity_loader::stages::Quantiles| format!("{:.2} {:.2} {:.2} {:.2}", q.p50_ms, q.p90_ms, q.p99_ms, q.max_ms);
            println!("         ms p50 p90 p99 max: fill {}, wait {}", ms(&pass.fill), ms(&pass.wait));
        }
    }
    println!("first pass  {:.3} of the plain read, {:.3} of the memory limit", report.ratio_to_read_limit, report.ratio_to_memory_limit);
    let rate = |rate: Option<f64>| rate.map_or("not measured".to_string(), gb);
    println!("later       verified {}, delivered {}", rate(report.later_verified_rate), rate(report.later_delivery_rate));
    if let (Some(full), Some(empty)) = (report.idle_full, report.idle_empty) {
        println!("idle        {:.2} % of a core with the ring full, {:.2} % with it empty", full * 100.0, empty * 100.0);
    }
}

fn geometry_of_model(slab: &Slab, model: &str) -> Result<TransformerGeometry> {
    let geometry = geometry(slab, model)?;
    slab.check_model(&geometry)?;
    Ok(geometry)
}
