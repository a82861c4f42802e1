//! The run, stage by stage: slab if missing, cache entries if missing, then loader and trainer.
//!
//! [`Launcher::run_stage`] is the launcher's loop: it asks the [`Supervisor`] what to do, does it, and waits for the next event. All
//! children are started here, by the main thread. Whatever goes wrong in between, dropping the launcher ends its children.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use serenity_protocol::config::{Config, MemoryStrategy, Overrides, Resume};
use serenity_protocol::message::{FromChild, MESSAGE_VERSION, Role};
use serenity_protocol::plan::{Plan, SlabState};
use serenity_protocol::{Error, Result};

use crate::child::{Child, Event, Level, Spec};
use crate::display::Display;
use crate::supervise::{Action, Ended, Outcome, Policy, Supervisor};

/// Longest sleep of the loop.
const SLEEP_MAX: Duration = Duration::from_secs(60);
/// Seconds of silence after which a child is taken for hung; for tests.
const HANG_ENV: &str = "SERENITY_HANG_SECONDS";

/// A stage of the run.
struct Stage {
    name: &'static str,
    /// What is being done, and what has been done.
    doing: &'static str,
    done: &'static str,
    main: Role,
    helpers: &'static [Role],
}

const BUILD: Stage = Stage { name: "slab", doing: "building the slab", done: "slab built", main: Role::Slab, helpers: &[] };
const ENCODE: Stage = Stage { name: "encode", doing: "encoding captions and images", done: "encoded", main: Role::Encoder, helpers: &[] };
const TRAIN: Stage = Stage { name: "train", doing: "training", done: "trained", main: Role::Trainer, helpers: &[Role::Loader] };
const TRAIN_RESIDENT: Stage = Stage { helpers: &[], ..TRAIN };

/// What the trainer has said so far: decides what a restarted one goes on from, and what the user is told at the end.
#[derive(Debug, Default)]
pub struct Progress {
    /// Whether it ever began its work in this run.
    ready: bool,
    /// Steps done.
    pub step: u64,
    /// Newest checkpoint of this run.
    pub checkpoint: Option<PathBuf>,
    /// Result files.
    pub files: Vec<PathBuf>,
}

impl Progress {
    /// Where a trainer that is started now begins: the user's choice the first time, and afterwards this run's own checkpoints.
    fn resume(&self, chosen: &Resume) -> Option<String> {
        match chosen {
            Resume::Auto => None,
            // The first trainer has put older checkpoints aside.
            Resume::Never => self.ready.then(|| "auto".to_string()),
            Resume::Path(_) => self.checkpoint.as_ref().map(|p| p.display().to_string()),
        }
    }
}

/// Runs the stages.
pub struct Launcher {
    config: Config,
    overrides: Overrides,
    display: Display,
    policy: Policy,
    /// Folder of the executables.
    programs: PathBuf,
    traced: bool,
    /// Trace files of the children, in the order of their starts.
    pub traces: Vec<PathBuf>,
    events: Receiver<Event>,
    sender: Sender<Event>,
    children: HashMap<Role, Child>,
    starts: HashMap<Role, usize>,
    /// Last words of children that failed.
    failures: HashMap<Role, String>,
    /// The trainer's progress.
    pub progress: Progress,
    origin: Instant,
}

impl Launcher {
    /// A launcher for `config`, which was loaded with `overrides`.
    ///
    /// # Errors
    /// [`Error::Absent`] if the launcher's own folder cannot be found, [`Error::Config`] for a malformed `SERENITY_HANG_SECONDS`.
    pub fn new(config: Config, overrides: Overrides, display: Display, traced: bool) -> Result<Self> {
        let own = std::env::current_exe().map_err(|e| Error::absent("the launcher's own executable cannot be found").cause(e))?;
        let mut policy = Policy::default();
        if let Ok(text) = std::env::var(HANG_ENV) {
            let seconds = text.parse::<f64>().ok().filter(|s| *s > 0.0).and_then(|s| Duration::try_from_secs_f64(s).ok());
            policy.silence_max = seconds.ok_or_else(|| Error::config(format!("{HANG_ENV} is no number of seconds")).found(&text))?;
        }
        let (sender, events) = channel();
        Ok(Self {
            programs: own.parent().unwrap_or(Path::new(".")).to_path_buf(),
            config,
            overrides,
            display,
            policy,
            traced,
            traces: Vec::new(),
            events,
            sender,
            children: HashMap::new(),
            starts: HashMap::new(),
            failures: HashMap::new(),
            progress: Progress::default(),
            origin: Instant::now(),
        })
    }

    /// Where events are to be sent.
    pub fn events(&self) -> Sender<Event> {
        self.sender.clone()
    }

    /// Everything that `plan` says is to be done. `Ok(false)`: stopped by the user.
    ///
    /// # Errors
    /// What a child failed with, with its exit code.
    pub fn run(&mut self, plan: &Plan) -> Result<bool> {
        let train = if self.config.memory.strategy == MemoryStrategy::Stagehand { TRAIN } else { TRAIN_RESIDENT };
        let stages = [(BUILD, plan.slab.state == SlabState::Missing), (ENCODE, !plan.cache.is_complete()), (train, true)];
        for (stage, needed) in stages {
            if needed && !self.run_and_show(&stage)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn run_and_show(&mut self, stage: &Stage) -> Result<bool> {
        // Span names are constants: one for each stage.
        let span = match stage.main {
            Role::Slab => tracing::trace_span!("build slab"),
            Role::Encoder => tracing::trace_span!("encode"),
            Role::Loader | Role::Trainer => tracing::trace_span!("train"),
        };
        let _span = span.entered();
        let begun = Instant::now();
        self.display.phase_begins(stage.name, stage.doing);
        let outcome = self.run_stage(stage);
        let seconds = begun.elapsed().as_secs_f64();
        let how = match outcome {
            Ok(Outcome::Done) => stage.done,
            Ok(Outcome::Stopped) => "stopped",
            Ok(Outcome::Failed { .. }) | Err(_) => "failed",
        };
        self.display.phase_ends(stage.name, how, seconds);
        match outcome? {
            Outcome::Done => Ok(true),
            Outcome::Stopped => Ok(false),
            Outcome::Failed { role, ended, restarts } => Err(self.failure(role, ended, restarts)),
        }
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn run_stage(&mut self, stage: &Stage) -> Result<Outcome> {
        let mut supervisor = Supervisor::new(self.policy, stage.main, stage.helpers, self.now());
        loop {
            for action in supervisor.actions(self.now()) {
                if let Some(outcome) = self.perform(action, &mut supervisor)? {
                    return Ok(outcome);
                }
            }
            let wait = supervisor.wake_at().map_or(SLEEP_MAX, |at| at.saturating_sub(self.now()).min(SLEEP_MAX));
            match self.events.recv_timeout(wait) {
                Ok(event) => self.handle(event, &mut supervisor)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(Error::invariant("the launcher's event channel is closed")),
            }
            // Everything that has come before the clock is looked at: a launcher that was suspended must not take its children for hung.
            while let Ok(event) = self.events.try_recv() {
                self.handle(event, &mut supervisor)?;
            }
        }
    }

    fn perform(&mut self, action: Action, supervisor: &mut Supervisor) -> Result<Option<Outcome>> {
        match action {
            Action::Spawn(role) => {
                let child = Child::spawn(&self.spec(role), &self.sender)?;
                tracing::trace!(name: "started", role = %role, pid = child.pid());
                self.children.insert(role, child);
                supervisor.started(role, self.now());
            }
            Action::Stop(role) => {
                if let Some(child) = self.children.get_mut(&role) {
                    child.stop();
                }
            }
            Action::Kill(role) => {
                if let Some(child) = self.children.get(&role) {
                    child.kill();
                }
            }
            Action::Announce { role, ended, pause, number } => {
                tracing::trace!(name: "restart", role = %role, how = %ended, number);
                let log = self.log_of(role);
                let how = match self.failures.remove(&role) {
                    Some(message) => format!("{ended}: {message}"),
                    None => ended.to_string(),
                };
                self.display.restart(role, &how, number, pause, &log);
            }
            Action::Hung(role) => {
                let seconds = self.policy.silence_max.as_secs_f64();
                let text = format!("the {role} has said nothing for {seconds} s and is killed");
                self.display.notice(None, Level::Warning, &text);
            }
            Action::Finish(outcome) => return Ok(Some(outcome)),
        }
        Ok(None)
    }

    fn handle(&mut self, event: Event, supervisor: &mut Supervisor) -> Result<()> {
        match event {
            Event::Message(role, message) => {
                supervisor.heard(role, self.now());
                if let FromChild::Failed { lasting: true, .. } = message {
                    supervisor.gave_up(role);
                }
                self.message(role, message)?;
            }
            Event::Broken(role, error) => {
                self.display.notice(Some(role), Level::Error, &error.to_string());
                if let Some(child) = self.children.get(&role) {
                    child.kill();
                }
            }
            Event::Line(role, level, text) => self.display.notice(Some(role), level, &text),
            Event::Exited(role) => {
                if let Some(child) = self.children.remove(&role) {
                    supervisor.exited(role, child.reap()?, self.now());
                }
            }
            Event::Stop => {
                self.display.notice(None, Level::Warning, "stopping at a safe point (a second Ctrl-C kills)");
                supervisor.stop(self.now());
            }
        }
        Ok(())
    }

    fn message(&mut self, role: Role, message: FromChild) -> Result<()> {
        match message {
            FromChild::Hello { version, .. } if version != MESSAGE_VERSION => {
                return Err(Error::absent(format!("the {role} is of another version than the launcher"))
                    .at(self.program(role))
                    .expected(format!("message version {MESSAGE_VERSION}"))
                    .found(version)
                    .advice("build all programs together: `cargo build --release --workspace`"));
            }
            FromChild::Hello { .. } | FromChild::Heartbeat => {}
            FromChild::Ready if role == Role::Trainer => self.progress.ready = true,
            FromChild::Ready => {}
            FromChild::Work { unit, done, total } => self.display.work(role, &unit, done, total),
            FromChild::Step(report) => {
                self.progress.step = report.step;
                self.display.step(&report);
            }
            FromChild::Ring { occupied, slots, read_bytes } => self.display.ring(occupied, slots, read_bytes),
            FromChild::Saved { step, path } => {
                self.display.saved(step, &path);
                let path = PathBuf::from(path);
                self.progress.step = step;
                // The LoRA file lies in the output folder itself.
                if path.parent() != Some(&*self.config.output_dir) {
                    self.progress.checkpoint = Some(path);
                }
            }
            FromChild::Notice(text) => self.display.notice(Some(role), Level::Warning, &text),
            FromChild::Done { files } if role == Role::Trainer => self.progress.files = files.into_iter().map(PathBuf::from).collect(),
            FromChild::Done { .. } => {}
            FromChild::Failed { message, .. } => drop(self.failures.insert(role, message)),
        }
        Ok(())
    }

    fn program(&self, role: Role) -> PathBuf {
        self.programs.join(format!("serenity-{role}"))
    }

    fn log_of(&self, role: Role) -> PathBuf {
        self.config.output_dir.join("logs").join(format!("{role}.log"))
    }

    fn spec(&mut self, role: Role) -> Spec {
        let start = self.starts.entry(role).or_insert(0);
        *start += 1;
        let start = *start;
        let mut args = match role {
            Role::Slab => self.slab_args(),
            Role::Loader | Role::Encoder | Role::Trainer => self.config_args(role),
        };
        if self.traced {
            let file = self.config.output_dir.join("logs").join(format!("trace-{role}-{start}.json"));
            args.extend(["--trace".into(), file.clone().into()]);
            self.traces.push(file);
        }
        Spec { role, program: self.program(role), args, log: self.log_of(role) }
    }

    fn config_args(&self, role: Role) -> Vec<OsString> {
        let mut overrides = self.overrides.clone();
        if role == Role::Trainer
            && let Some(resume) = self.progress.resume(&self.config.checkpoint.resume)
        {
            overrides.resume = Some(resume);
        }
        let mut args: Vec<OsString> = vec!["--config".into(), self.config.source.clone().into()];
        args.extend(overrides.to_args());
        args
    }

    fn slab_args(&self) -> Vec<OsString> {
        let prefix = self.config.memory.slab_path.with_extension("");
        // The linears outside the blocks go into the companion file, in bf16; quantised as well they would never be read.
        vec![
            "build".into(),
            "--model".into(),
            self.config.model.path.clone().into(),
            "--output".into(),
            prefix.into(),
            "--blocks-only".into(),
        ]
    }

    /// The error of a run that `role` ended.
    fn failure(&mut self, role: Role, ended: Ended, restarts: usize) -> Error {
        let again = if restarts > 0 { format!(", after {restarts} restarts") } else { String::new() };
        let message = self.failures.remove(&role);
        let what = match &message {
            Some(message) => format!("the {role} {ended}{again}: {message}"),
            None => format!("the {role} {ended}{again}"),
        };
        let error = match ended.exit_code() {
            64 => Error::config(what),
            65 => Error::data(what),
            69 => Error::absent(what),
            75 => Error::try_again(what),
            _ => Error::invariant(what),
        };
        // A message of the child has its own place and advice.
        if message.is_some() { error } else { error.at(self.log_of(role)).advice("look at the end of this log") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restarted_trainer_goes_on_from_this_run_alone() {
        let fresh = Progress::default();
        let begun = Progress { ready: true, ..Progress::default() };
        let saved = Progress { ready: true, checkpoint: Some("c/9".into()), ..Progress::default() };
        let path = Resume::Path("old".into());
        assert_eq!([&fresh, &begun, &saved].map(|p| p.resume(&Resume::Auto)), [None, None, None]);
        assert_eq!([&fresh, &begun, &saved].map(|p| p.resume(&Resume::Never)), [None, Some("auto".into()), Some("auto".into())]);
        assert_eq!([&fresh, &begun, &saved].map(|p| p.resume(&path)), [None, None, Some("c/9".into())]);
    }
}
