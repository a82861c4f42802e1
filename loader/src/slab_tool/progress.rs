//! Bytes done, for a person at a terminal and for the launcher.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serenity_protocol::message::FromChild;
use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result};

/// Time between two messages to the launcher.
const MESSAGE_INTERVAL: Duration = Duration::from_millis(250);

/// Progress of one command.
pub struct Progress<'a> {
    process: &'a Process,
    bar: Option<ProgressBar>,
    done: u64,
    total: u64,
    sent: Instant,
}

impl<'a> Progress<'a> {
    /// Starts at 0 of `total` bytes. The bar is drawn only on a terminal, and never under a launcher, which has its own.
    #[must_use]
    pub fn new(process: &'a Process, what: &str, total: u64) -> Self {
        let bar = (std::io::stderr().is_terminal() && !process.has_launcher()).then(|| {
            let bar = ProgressBar::new(total);
            let template = "{msg} {wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} eta {eta}";
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(what.to_owned());
            bar
        });
        Self { process, bar, done: 0, total, sent: Instant::now() }
    }

    /// Adds to the bytes done, and ends the work if the process was asked to stop.
    ///
    /// # Errors
    /// [`Error::TryAgain`] when asked to stop.
    pub fn add(&mut self, bytes: u64) -> Result<()> {
        self.done += bytes;
        self.process.tick();
        if let Some(bar) = &self.bar {
            bar.set_position(self.done);
        }
        if self.sent.elapsed() >= MESSAGE_INTERVAL {
            self.sent = Instant::now();
            self.report();
        }
        if self.process.stop_requested() { Err(self.process.interrupted()) } else { Ok(()) }
    }

    fn report(&self) {
        self.process.send(&FromChild::Work { unit: "bytes".into(), done: self.done, total: self.total });
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        self.report();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Helper for results of threads: a panic there is a defect here.
pub(super) fn joined<T>(result: std::thread::Result<Result<T>>) -> Result<T> {
    result.unwrap_or_else(|_| Err(Error::invariant("a worker thread panicked")))
}
