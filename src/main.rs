//! `serenity-launch`: plans a training run, starts the processes that do it, watches them, restarts them, shows what they do.
//!
//! The launcher computes nothing itself: it can be killed at any moment, its children then stop at a checkpoint, and the same command
//! goes on. Exit codes: 0 done, 64 bad configuration, 65 bad data, 69 something needed is absent or busy, 70 an invariant broke or a
//! child was killed too often, 75 stopped or try again.
#![forbid(unsafe_code)]

mod child;
mod display;
mod lock;
mod stages;
mod supervise;
mod trace;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use serde_json::json;
use serenity_protocol::config::{Config, OverrideArgs, Overrides};
use serenity_protocol::message::Role;
use serenity_protocol::plan::{Plan, slab_suffices};
use serenity_protocol::process::{Process, start_logging};
use serenity_protocol::{Error, Result, ring};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::child::Event;
use crate::display::{Display, clock};
use crate::stages::{Launcher, Progress};

/// Trains a FLUX.2 LoRA: builds the slab, encodes captions and images, starts loader and trainer
#[derive(Parser)]
#[command(name = "serenity-launch", version)]
struct Cli {
    /// Configuration (JSON)
    config: PathBuf,
    #[command(flatten)]
    overrides: OverrideArgs,
    /// Print the plan and stop
    #[arg(long)]
    plan: bool,
    /// One JSON object per line on standard output: plan, events, result
    #[arg(long)]
    json: bool,
    /// Write one Chrome/Perfetto trace of all processes
    #[arg(long, value_name = "FILE.json")]
    trace: Option<PathBuf>,
}

/// How a run that did not fail ended.
enum End {
    Planned,
    Done(Progress),
    Stopped(Progress),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version are no failure; nothing can be done about a closed terminal.
            let _ = e.print();
            return if e.use_stderr() { ExitCode::from(64) } else { ExitCode::SUCCESS };
        }
    };
    let begun = Instant::now();
    let result = launch(&cli);
    let seconds = begun.elapsed().as_secs_f64();
    match result {
        Ok(End::Planned) => ExitCode::SUCCESS,
        Ok(End::Done(progress)) => report_done(&cli, &progress, seconds),
        Ok(End::Stopped(progress)) => report_stopped(&cli, &progress, seconds),
        Err(error) => report_error(&cli, &error, seconds),
    }
}

fn launch(cli: &Cli) -> Result<End> {
    let overrides = Overrides::from(cli.overrides.clone());
    let config = Config::load(&cli.config, &overrides)?;
    if cli.plan {
        let _logging = start_logging("launch", None)?;
        plan(&config, &mut Display::new(cli.json, None))?;
        return Ok(End::Planned);
    }
    let _lock = lock::acquire(&config.output_dir)?;
    let logs = config.output_dir.join("logs");
    std::fs::create_dir_all(&logs).map_err(|e| Error::io("cannot make the folder for logs", &logs, e))?;
    let own_trace = cli.trace.as_ref().map(|_| logs.join("trace-launch.json"));
    let logging = start_logging("launch", own_trace.as_deref())?;
    let mut traces = Vec::from_iter(own_trace);
    let result = plan_and_run(cli, config.clone(), overrides, &mut traces);
    ring::cleanup(&config);
    // Writes the end of the launcher's own trace.
    drop(logging);
    let merged = cli.trace.as_deref().map_or(Ok(0), |target| trace::merge(&traces, target));
    let end = result?;
    merged.map(|_| end)
}

fn plan_and_run(cli: &Cli, mut config: Config, mut overrides: Overrides, traces: &mut Vec<PathBuf>) -> Result<End> {
    let mut display = Display::new(cli.json, config.log_every_steps);
    // A hub id that is not in the local cache; until the signal threads run, Ctrl-C ends the process and the next call goes on.
    if let Some(folders) = folders_needed(&config) {
        serenity_hub::ensure(&config.model.path, &folders, &Process::detached(Role::Slab))?;
    }
    let plan = plan(&config, &mut display)?;
    if let Some(ring) = plan.memory.ring.as_ref().filter(|ring| ring.chosen) {
        // Loader and trainer are told one size, whatever is free when they start or start again.
        overrides.set.extend(ring.settings());
        config = Config::load(&cli.config, &overrides)?;
    }
    let mut launcher = Launcher::new(config, overrides, display, cli.trace.is_some())?;
    watch_signals(&launcher)?;
    let result = launcher.run(&plan);
    traces.append(&mut launcher.traces);
    let progress = std::mem::take(&mut launcher.progress);
    Ok(if result? { End::Done(progress) } else { End::Stopped(progress) })
}

/// Folders of the model that the run reads and that might have to be downloaded: with a slab that suffices not the transformer's, with a
/// text encoder's slab not the text encoder's, with a full cache none.
fn folders_needed(config: &Config) -> Option<Vec<&'static str>> {
    let text_encoder = config.model.text_encoder_slab_path.is_none();
    let all = serenity_hub::FOLDERS.iter().copied().filter(|f| text_encoder || !serenity_hub::TEXT_ENCODER_ONLY.contains(f));
    if !slab_suffices(config) {
        return Some(all.collect());
    }
    let is_ready = |plan: &Plan| plan.problems.is_empty() && plan.cache.is_complete();
    // A plan that cannot be made is made again, and its error shown, when everything is there.
    if Plan::new(config).is_ok_and(|plan| is_ready(&plan)) {
        return None;
    }
    Some(all.filter(|f| !serenity_hub::TRANSFORMER_ONLY.contains(f)).collect())
}

/// Makes and shows the plan; its first problem is the error.
fn plan(config: &Config, display: &mut Display) -> Result<Plan> {
    let mut plan = {
        let _span = tracing::trace_span!("plan").entered();
        Plan::new(config)?
    };
    display.plan(&plan);
    if plan.problems.is_empty() { Ok(plan) } else { Err(plan.problems.swap_remove(0)) }
}

/// From here on Ctrl-C, SIGTERM and a closed terminal are events.
fn watch_signals(launcher: &Launcher) -> Result<()> {
    let failed = |e: std::io::Error| Error::absent("cannot install a signal handler").cause(e);
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(failed)?;
    let events = launcher.events();
    let body = move || signals.forever().take_while(|_| events.send(Event::Stop).is_ok()).for_each(drop);
    std::thread::Builder::new().name("signals".into()).spawn(body).map_err(failed)?;
    Ok(())
}

/// What a result file is, by its ending.
fn label(path: &Path) -> &'static str {
    match path.extension().and_then(|e| e.to_str()) {
        Some("safetensors") => "lora",
        Some("png") => "plot",
        Some("jsonl") => "log",
        _ => "file",
    }
}

fn report_done(cli: &Cli, progress: &Progress, seconds: f64) -> ExitCode {
    let mut value = json!({"status": "done", "exit_code": 0, "step": progress.step, "seconds": seconds, "files": progress.files});
    let mut text = format!("done in {}\n", clock(seconds));
    for file in &progress.files {
        let name = label(file);
        text.push_str(&format!("  {name:<6}{}\n", file.display()));
        if let (Some(map), false) = (value.as_object_mut(), name == "file") {
            map.insert(name.to_string(), json!(file));
        }
    }
    if let Some(trace) = &cli.trace {
        text.push_str(&format!("  trace {}\n", trace.display()));
    }
    Display::new(cli.json, None).result(value, &text);
    ExitCode::SUCCESS
}

fn report_stopped(cli: &Cli, progress: &Progress, seconds: f64) -> ExitCode {
    let code = 75;
    let text = match &progress.checkpoint {
        Some(path) => format!("stopped after step {} ({}); the same command goes on from there\n", progress.step, path.display()),
        None => "stopped; finished work is kept, and the same command goes on from there\n".to_string(),
    };
    let value =
        json!({"status": "stopped", "exit_code": code, "step": progress.step, "checkpoint": progress.checkpoint, "seconds": seconds});
    Display::new(cli.json, None).result(value, &text);
    ExitCode::from(code)
}

fn report_error(cli: &Cli, error: &Error, seconds: f64) -> ExitCode {
    eprintln!("serenity-launch: error: {error}");
    if cli.json {
        let value = json!({"status": "failed", "exit_code": error.exit_code(), "message": error.to_string(), "seconds": seconds});
        Display::new(true, None).result(value, "");
    }
    ExitCode::from(error.exit_code())
}
