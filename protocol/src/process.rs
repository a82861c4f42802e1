//! What every Serenity process does at its edges: logging, tracing, signals, the control channel, parent death, exit code.
//!
//! [`main`] wraps a program's body. It never panics on input: every error becomes one message on standard error, a `Failed` message to
//! the launcher if there is one, and the documented exit code. SIGTERM, SIGINT, a `Stop` message and the loss of the launcher all set
//! one flag, which the body looks at between units of work ([`Process::stop_requested`]).

use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::time::{ClockId, clock_gettime};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::error::{Error, Result};
use crate::message::{self, FromChild, MESSAGE_VERSION, Role, ToChild};

/// Set to `stdin` by the launcher: standard input is the control channel.
pub const CONTROL_ENV: &str = "SERENITY_CONTROL";
/// Set by the launcher to its process id: the child asks to be told of that process's death.
pub const PARENT_ENV: &str = "SERENITY_PARENT";
/// Log filter, in tracing's syntax; default `info`.
pub const LOG_ENV: &str = "SERENITY_LOG";
/// Name of the trace event that ties a trace's clock to the machine's (its `monotonic_us` argument).
pub const CLOCK_EVENT: &str = "clock_sync";

/// Handle of a running Serenity process. Cheap to clone and to share between threads.
#[derive(Clone)]
pub struct Process {
    role: Role,
    stop: Arc<AtomicBool>,
    ticks: Arc<AtomicU64>,
    control: Option<Arc<Mutex<UnixStream>>>,
}

impl Process {
    /// A handle without channel, signals or logging, for tests and library use.
    #[must_use]
    pub fn detached(role: Role) -> Self {
        Self { role, stop: Arc::default(), ticks: Arc::default(), control: None }
    }

    /// Who this process is.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Whether the process should end at its next safe point.
    #[must_use]
    pub fn stop_requested(&self) -> bool {
        // Relaxed: a lone flag that orders nothing; the looker acts on it at its next look.
        self.stop.load(Ordering::Relaxed)
    }

    /// The flag behind [`Self::stop_requested`].
    #[must_use]
    pub fn stop_flag(&self) -> Arc<AtomicBool> {
        self.stop.clone()
    }

    /// Says that work is going on. Without ticks no heartbeat is sent, and the launcher takes the process for hung.
    pub fn tick(&self) {
        // Relaxed: a progress counter; only its change matters.
        self.ticks.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether a launcher listens.
    #[must_use]
    pub fn has_launcher(&self) -> bool {
        self.control.is_some()
    }

    /// Tells the launcher; does nothing for a process started by hand. A lost launcher sets the stop flag.
    pub fn send(&self, message: &FromChild) {
        self.tick();
        let Some(control) = &self.control else { return };
        let sent = control.lock().map(|mut stream| message::send(&mut *stream, message));
        if !matches!(sent, Ok(Ok(()))) {
            // Relaxed: see stop_requested.
            self.stop.store(true, Ordering::Relaxed);
        }
    }

    /// Error for a run that stopped because it was asked to (exit 75).
    #[must_use]
    pub fn interrupted(&self) -> Error {
        Error::try_again(format!("the {} was asked to stop", self.role)).advice("run the same command again to go on where it stopped")
    }

    fn attach() -> Result<Option<UnixStream>> {
        if std::env::var_os(CONTROL_ENV).is_none_or(|v| v != "stdin") {
            return Ok(None);
        }
        let owned = std::io::stdin().as_fd().try_clone_to_owned().map_err(|e| Error::absent("the control channel is not open").cause(e))?;
        Ok(Some(UnixStream::from(owned)))
    }

    fn start(role: Role) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
            signal_hook::flag::register(signal, stop.clone()).map_err(|e| Error::absent("cannot install a signal handler").cause(e))?;
        }
        let stream = Self::attach()?;
        watch_parent(&stop)?;
        let this = Self { role, stop, ticks: Arc::default(), control: stream.map(|s| Arc::new(Mutex::new(s))) };
        if let Some(control) = this.control.clone() {
            this.send(&FromChild::Hello { role, pid: std::process::id(), version: MESSAGE_VERSION });
            this.spawn_control_threads(&control)?;
        }
        Ok(this)
    }

    fn spawn_control_threads(&self, control: &Arc<Mutex<UnixStream>>) -> Result<()> {
        let spawn_failed = |e: std::io::Error| Error::absent("cannot start a thread").cause(e);
        let mut reader = control
            .lock()
            .map_err(|_| Error::invariant("the control channel's lock is poisoned"))?
            .try_clone()
            .map_err(|e| Error::absent("cannot duplicate the control channel").cause(e))?;
        let stop = self.stop.clone();
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                // Stop, a malformed frame and the end of the channel all mean the same: end at the next safe point.
                let _: Result<Option<ToChild>> = message::receive(&mut reader);
                // Relaxed: see stop_requested.
                stop.store(true, Ordering::Relaxed);
            })
            .map_err(spawn_failed)?;
        let this = self.clone();
        std::thread::Builder::new()
            .name("heartbeat".into())
            .spawn(move || {
                let mut seen = u64::MAX;
                loop {
                    // Relaxed: see tick.
                    let now = this.ticks.load(Ordering::Relaxed);
                    if now != seen {
                        this.send(&FromChild::Heartbeat);
                        // send() itself ticks.
                        seen = now + 1;
                    }
                    std::thread::sleep(Duration::from_secs(1));
                }
            })
            .map_err(spawn_failed)?;
        Ok(())
    }
}

/// Asks the kernel for SIGTERM when the launcher dies, and notices if it is dead already.
fn watch_parent(stop: &AtomicBool) -> Result<()> {
    let Some(parent) = std::env::var(PARENT_ENV).ok().and_then(|v| v.parse::<i32>().ok()) else { return Ok(()) };
    nix::sys::prctl::set_pdeathsig(Signal::SIGTERM).map_err(|e| Error::absent("cannot ask for the parent-death signal").cause(e))?;
    if nix::unistd::getppid().as_raw() != parent {
        // Relaxed: see Process::stop_requested.
        stop.store(true, Ordering::Relaxed);
    }
    Ok(())
}

/// Parses the command line; a wrong one ends with exit 64 and the parser's message, `--help` and `--version` with 0.
///
/// # Errors
/// The exit code to end with.
pub fn parse<T: clap::Parser>() -> std::result::Result<T, ExitCode> {
    T::try_parse().map_err(|e| {
        let _ = e.print();
        if e.use_stderr() { ExitCode::from(64) } else { ExitCode::SUCCESS }
    })
}

/// Runs a program: sets up logging (and a trace file), runs `body`, reports its error, returns the exit code.
pub fn main(role: Role, trace: Option<&Path>, body: impl FnOnce(&Process) -> Result<()>) -> ExitCode {
    let guard = match start_logging(role, trace) {
        Ok(guard) => guard,
        Err(e) => return report(role, None, &e),
    };
    let process = match crate::faults::init(role).and_then(|()| Process::start(role)) {
        Ok(process) => process,
        Err(e) => return report(role, None, &e),
    };
    let result = body(&process);
    drop(guard);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => report(role, Some(&process), &e),
    }
}

fn report(role: Role, process: Option<&Process>, error: &Error) -> ExitCode {
    eprintln!("serenity-{role}: error: {error}");
    if let Some(process) = process {
        process.send(&FromChild::Failed { exit_code: error.exit_code(), message: error.to_string(), lasting: error.is_lasting() });
    }
    ExitCode::from(error.exit_code())
}

/// Keeps the trace file open; dropping it writes the end of the file.
pub struct TraceGuard {
    _chrome: Option<tracing_chrome::FlushGuard>,
}

/// Logging on standard error, and a Chrome trace at `trace` if given.
///
/// # Errors
/// [`Error::Absent`] where the trace file cannot be created.
pub fn start_logging(name: impl std::fmt::Display, trace: Option<&Path>) -> Result<TraceGuard> {
    let filter = || EnvFilter::try_from_env(LOG_ENV).unwrap_or_else(|_| EnvFilter::new("info"));
    let text = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .with_filter(filter());
    let mut chrome_guard = None;
    let chrome = match trace {
        None => None,
        Some(path) => {
            let file = std::fs::File::create(path).map_err(|e| Error::io("cannot create the trace file", path, e))?;
            let (layer, guard) = tracing_chrome::ChromeLayerBuilder::new().writer(file).include_args(true).build();
            chrome_guard = Some(guard);
            // Our own spans only: libraries log thousands of lines a second at this level.
            Some(layer.with_filter(EnvFilter::new("off,serenity=trace")))
        }
    };
    // A second initialisation (tests in one process) keeps the first.
    let _ = tracing_subscriber::registry().with(text).with(chrome).try_init();
    if trace.is_some() {
        let monotonic_us = clock_gettime(ClockId::CLOCK_MONOTONIC).map(|t| t.tv_sec() * 1_000_000 + t.tv_nsec() / 1000).unwrap_or_default();
        let (process, pid) = (format!("serenity-{name}"), std::process::id());
        tracing::trace!(name: "clock_sync", monotonic_us, process, pid);
    }
    Ok(TraceGuard { _chrome: chrome_guard })
}
