//! `serenity-slab`: builds, checks and describes INT8 slabs, and makes models of random weights.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use serenity_loader::slab_tool::build::{self, BuildOptions, BuildReport, Component};
use serenity_loader::slab_tool::synth::{self, Preset, SynthOptions};
use serenity_loader::slab_tool::{info, repack, verify};
use serenity_protocol::message::{FromChild, Role};
use serenity_protocol::process::{self, Process};
use serenity_protocol::slab::Slab;
use serenity_protocol::{Error, Result};

/// Builds, checks and describes INT8 slabs, and makes models of random weights
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Write a Chrome/Perfetto trace of this process
    #[arg(long, global = true, value_name = "FILE")]
    trace: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Quantise a transformer or text encoder into PREFIX.safetensors, PREFIX.manifest.json and PREFIX.other.safetensors
    Build(BuildArgs),
    /// Read every byte of a slab and compare it with its checksums
    Verify(VerifyArgs),
    /// Describe a slab
    Info(InfoArgs),
    /// Give a slab of the original builder our layout, checksums and companion file
    Repack(RepackArgs),
    /// Make a model of random weights, in the Hugging Face layout or as a slab only
    Synth(SynthArgs),
}

/// What a slab is made of.
#[derive(Clone, Copy, clap::ValueEnum)]
enum ComponentArg {
    /// The transformer, for training
    #[value(name = "transformer")]
    Transformer,
    /// The first layers of the text encoder, for encoding captions
    #[value(name = "text_encoder")]
    TextEncoder,
}

impl ComponentArg {
    fn component(self) -> Component {
        match self {
            ComponentArg::Transformer => Component::Transformer,
            ComponentArg::TextEncoder => Component::TextEncoder,
        }
    }
}

/// Folders of the hub's pipeline that a component is in.
fn folders_of(component: Component) -> &'static [&'static str] {
    match component {
        Component::Transformer => serenity_hub::TRANSFORMER_ONLY,
        Component::TextEncoder => &["text_encoder"],
    }
}

#[derive(Args)]
struct BuildArgs {
    /// Model: a folder in the Hugging Face layout, a .safetensors file (BFL or diffusers names) or a hub id (from the local cache, or
    /// downloaded into it; HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE count)
    #[arg(long, value_name = "PATH")]
    model: String,
    /// Which part of the model
    #[arg(long, value_enum, default_value_t = ComponentArg::Transformer)]
    component: ComponentArg,
    /// Layers of the text encoder (default: those that the default embedding needs, 30 of dev's 40)
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Path and name of the slab's files, without an ending
    #[arg(long, value_name = "PREFIX")]
    output: PathBuf,
    /// Type of the quantised weights
    #[arg(long, default_value = "int8", value_parser = ["int8"])]
    dtype: String,
    /// Only the linears of the blocks (those of the companion file are not quantised as well)
    #[arg(long)]
    blocks_only: bool,
    /// Pad the columns to a multiple of this
    #[arg(long, default_value_t = 64, value_name = "N")]
    pack_k: usize,
    /// Label in the manifest (default: by the model's shape)
    #[arg(long, value_name = "LABEL")]
    architecture_id: Option<String>,
    /// Page size of the checksums in bytes (default: 1 MiB, less for small slabs)
    #[arg(long, value_name = "BYTES")]
    page_bytes: Option<u64>,
    /// Bytes between two points at which an interrupted build can go on
    #[arg(long, default_value_t = build::JOURNAL_BYTES, value_name = "BYTES", hide = true)]
    journal_bytes: u64,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Which slab.
#[derive(Args)]
struct SlabArgs {
    /// The slab: PREFIX or PREFIX.safetensors
    #[arg(value_name = "SLAB", required_unless_present = "slab")]
    path: Option<PathBuf>,
    /// The slab, as an option
    #[arg(long, value_name = "SLAB", conflicts_with = "path")]
    slab: Option<PathBuf>,
    /// Its manifest (default: PREFIX.manifest.json)
    #[arg(long, value_name = "FILE")]
    manifest: Option<PathBuf>,
}

#[derive(Args)]
struct VerifyArgs {
    #[command(flatten)]
    slab: SlabArgs,
    /// Make the same reads again without looking at the bytes, and report the ratio of the rates
    #[arg(long)]
    compare: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct InfoArgs {
    #[command(flatten)]
    slab: SlabArgs,
    /// The original model: adds the quantisation error of every layer
    #[arg(long, visible_alias = "against", value_name = "PATH")]
    model: Option<String>,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct RepackArgs {
    #[command(flatten)]
    slab: SlabArgs,
    /// The model that the slab was built from: its tensors outside the blocks go into the companion file
    #[arg(long, value_name = "PATH")]
    model: String,
    /// Path and name of the new slab's files, without an ending
    #[arg(long, value_name = "PREFIX")]
    output: PathBuf,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct SynthArgs {
    /// Which model
    #[arg(long, value_enum)]
    preset: Preset,
    /// Folder of the checkpoint; with --slab-only, path and name of the slab's files, without an ending
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Seed of the weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A slab of random codes instead of a checkpoint
    #[arg(long)]
    slab_only: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    let trace = cli.trace.clone();
    process::main(Role::Slab, trace.as_deref(), |process| match cli.command {
        Command::Build(args) => run_build(args, process),
        Command::Verify(args) => run_verify(args, process),
        Command::Info(args) => run_info(args, process),
        Command::Repack(args) => run_repack(args, process),
        Command::Synth(args) => run_synth(args, process),
    })
}

/// clap's own exit code for a wrong command line is 2; ours is 64.
fn usage(error: &clap::Error) -> ExitCode {
    // Nothing can be done about a closed terminal.
    let _ = error.print();
    if error.use_stderr() { ExitCode::from(64) } else { ExitCode::SUCCESS }
}

fn run_build(args: BuildArgs, process: &Process) -> Result<()> {
    let options = BuildOptions {
        component: args.component.component(),
        layers: args.layers,
        blocks_only: args.blocks_only,
        pack_k: args.pack_k,
        architecture_id: args.architecture_id,
        page_bytes: args.page_bytes,
        journal_bytes: args.journal_bytes,
        ..BuildOptions::new(args.model, args.output)
    };
    process.send(&FromChild::Ready);
    serenity_hub::ensure(&options.model, folders_of(options.component), process)?;
    let report = build::build(&options, process)?;
    built(&report, args.json, process)
}

fn run_repack(args: RepackArgs, process: &Process) -> Result<()> {
    serenity_hub::ensure(&args.model, serenity_hub::TRANSFORMER_ONLY, process)?;
    let report = repack::repack(&open(&args.slab)?, &args.model, &args.output, process)?;
    built(&report, args.json, process)
}

/// Reports the files of a slab.
fn built(report: &BuildReport, json: bool, process: &Process) -> Result<()> {
    let files = [&report.files.slab, &report.files.manifest, &report.files.companion].map(|p| p.display().to_string());
    if json {
        print_json(&serde_json::json!({
            "slab": files[0], "manifest": files[1], "companion": files[2], "layers": report.layers, "bytes": report.bytes,
            "resumed_bytes": report.resumed_bytes, "seconds": report.seconds,
        }))?;
    } else {
        println!("{} layers, {} bytes in {:.1} s:", report.layers, report.bytes, report.seconds);
        files.iter().for_each(|f| println!("  {f}"));
    }
    process.send(&FromChild::Done { files: files.to_vec() });
    Ok(())
}

fn run_verify(args: VerifyArgs, process: &Process) -> Result<()> {
    let slab = open(&args.slab)?;
    let verified = verify::verify_with(&slab, verify::Division::default(), args.compare, process)?;
    if args.json {
        print_json(&verified)?;
    }
    let report = verified.report.into_result()?;
    if args.json {
        return Ok(());
    }
    println!("{}: intact, {} bytes, {} pages and {} tensors compared", slab.path().display(), report.bytes, report.pages, report.tensors);
    if !report.has_checksums {
        println!(
            "  it carries no checksums (the original builder's): structure, scales and the range of the codes are all that was checked"
        );
    }
    println!("  {}", rate_row("read and compared", &verified.rate));
    if let (Some(plain), Some(ratio)) = (verified.plain_read, verified.ratio) {
        println!("  {}; verification runs at {:.0} % of that", rate_row("the same reads alone", &plain), ratio * 100.0);
    }
    Ok(())
}

fn rate_row(what: &str, rate: &verify::Rate) -> String {
    let how = if rate.direct { "past the page cache" } else { "through the page cache" };
    format!("{what} in {:.2} s: {:.2} GB/s, {} threads, {how}", rate.seconds, rate.bytes_per_second / 1e9, rate.threads)
}

fn run_info(args: InfoArgs, process: &Process) -> Result<()> {
    let slab = open(&args.slab)?;
    if let Some(model) = &args.model {
        let component = slab.manifest().serenity.as_ref().map(|a| a.component).unwrap_or_default();
        serenity_hub::ensure(model, folders_of(component), process)?;
    }
    let info = info::info(&slab, args.model.as_deref(), process)?;
    if args.json {
        return print_json(&info);
    }
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "none".into());
    println!("slab             {}", info.slab);
    println!("component        {}", if info.component == Component::TextEncoder { "text encoder" } else { "transformer" });
    println!("architecture     {}", info.architecture_id);
    println!("model signature  {}", info.model_signature);
    println!("slab signature   {}", info.signature);
    println!("layers           {} ({} bytes of codes, {} bytes in all)", info.layer_count, info.qweight_bytes, info.file_bytes);
    println!("checksum pages   {}", or_none(info.page_bytes.map(|b| format!("{b} bytes"))));
    println!("blocks           {}", or_none(info.blocks.map(|n| n.to_string())));
    println!("blocks in a run  {}", or_none(info.blocks_contiguous.map(|yes| if yes { "yes" } else { "no" }.into())));
    println!("companion        {}", or_none(info.companion.clone()));
    for layer in &info.layers {
        let error = layer.error.map(|e| format!("  relative L2 {:.6}, cosine {:.8}", e.relative_l2, e.cosine)).unwrap_or_default();
        println!("  {:<60} [{}, {}] at {}{error}", layer.name, layer.shape[0], layer.shape[1], layer.offset);
    }
    Ok(())
}

fn run_synth(args: SynthArgs, process: &Process) -> Result<()> {
    let started = std::time::Instant::now();
    let (files, bytes) = if args.slab_only {
        let (files, bytes) = synth::synth_slab(args.preset, &args.output, args.seed, process)?;
        ([files.slab, files.manifest, files.companion].map(|p| p.display().to_string()).to_vec(), bytes)
    } else {
        let options = SynthOptions { preset: args.preset, output: args.output, seed: args.seed };
        let bytes = synth::synth(&options, process)?;
        (vec![options.output.display().to_string()], bytes)
    };
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        print_json(&serde_json::json!({"files": files, "bytes": bytes, "seconds": seconds}))?;
    } else {
        println!("{}, seed {}, {bytes} bytes in {seconds:.1} s:", args.preset.name(), args.seed);
        files.iter().for_each(|f| println!("  {f}"));
    }
    process.send(&FromChild::Done { files });
    Ok(())
}

fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::invariant("a report cannot be written as JSON").cause(e))?;
    println!("{text}");
    Ok(())
}

fn open(args: &SlabArgs) -> Result<Slab> {
    let given = args.path.as_ref().or(args.slab.as_ref()).ok_or_else(|| Error::config("no slab was given"))?;
    let prefix = given.to_str().and_then(|s| s.strip_suffix(".safetensors")).map_or_else(|| given.clone(), PathBuf::from);
    let with = |ending: &str| {
        let mut path = prefix.clone().into_os_string();
        path.push(ending);
        PathBuf::from(path)
    };
    let manifest = args.manifest.clone().unwrap_or_else(|| with(".manifest.json"));
    Slab::open(Path::new(&with(".safetensors")), &manifest)
}
