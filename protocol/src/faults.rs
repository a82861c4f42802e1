//! Faults on request: for tests only, off unless the environment variable [`FAULTS_ENV`] is set, and said loudly in the log when it is.
//!
//! The variable holds items separated by commas. An item may be meant for one program: `loader.kill=after-payload`.
//!
//! | item | does |
//! |---|---|
//! | `kill=POINT` or `kill=POINT:N` | SIGKILL to itself at the first (N-th) passage of a point of [`POINTS`] |
//! | `read=KIND:N` or `read=KIND:*N` | the N-th (every N-th) read of the slab fails: `eio`, `eintr`, `eagain`, or comes back `short` |
//! | `delay=read:MS`, `delay=fill:MS` | every read, every fill of a slot takes that much longer |
//! | `refuse=io_uring`, `refuse=registered_buffers` | as if the kernel had refused it |
//!
//! Anything else is an error (exit 64): a misspelt fault would make a test of nothing. Failure: none while off; a passage of a point then costs
//! one relaxed load.
#![forbid(unsafe_code)]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::message::Role;

/// The environment variable that switches faults on.
pub const FAULTS_ENV: &str = "SERENITY_FAULTS";

/// Places at which a process can be made to kill itself.
pub const POINTS: [&str; 19] = [
    // Loader, in the order of its life.
    "before-attach",
    "segment-created",
    "segment-reserved",
    "header-torn",
    "header-written",
    "ring-open",
    "epoch-bumped",
    "attached",
    "rechecked",
    "before-fill",
    "payload-read",
    "mid-fill",
    "after-payload",
    "after-publish",
    "after-wake",
    "before-verify",
    "verified",
    "republished",
    // Either end: before it changes any word of the ring, which is between any two of the steps above too.
    "word",
];

/// What a read is made to return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadFault {
    /// I/O error.
    Eio,
    /// Interrupted.
    Eintr,
    /// Try again.
    Eagain,
    /// Fewer bytes than asked for.
    Short,
}

/// Which of a sequence of events are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Nth(u64),
    Every(u64),
}

impl Which {
    fn is(self, count: u64) -> bool {
        match self {
            Which::Nth(n) => count == n,
            Which::Every(n) => count.is_multiple_of(n),
        }
    }
}

/// The faults that are switched on.
#[derive(Debug, Default)]
pub struct Faults {
    kills: Vec<(String, u64, AtomicU64)>,
    reads: Vec<(ReadFault, Which)>,
    read_count: AtomicU64,
    read_delay: Duration,
    fill_delay: Duration,
    refused: Vec<String>,
}

static ON: AtomicBool = AtomicBool::new(false);
static FAULTS: OnceLock<Faults> = OnceLock::new();

impl Faults {
    /// Parses the variable's text; items for other programs than `role` are left out.
    ///
    /// # Errors
    /// [`Error::Config`] for an item that means nothing.
    pub fn parse(text: &str, role: Role) -> Result<Self> {
        let mut this = Self::default();
        let own = format!("{role}.");
        for item in text.split(',').map(str::trim).filter(|i| !i.is_empty()) {
            let (key, value) = item.split_once('=').ok_or_else(|| wrong(item))?;
            let key = match key.split_once('.') {
                Some(_) => match key.strip_prefix(&own) {
                    Some(key) => key,
                    None => continue,
                },
                None => key,
            };
            this.add(key, value).ok_or_else(|| wrong(item))?;
        }
        Ok(this)
    }

    fn add(&mut self, key: &str, value: &str) -> Option<()> {
        let (what, number) = value.split_once(':').map_or((value, None), |(what, number)| (what, Some(number)));
        match key {
            "kill" if POINTS.contains(&what) => {
                let at = number.map_or(Some(1), |n| n.parse().ok()).filter(|n| *n > 0)?;
                self.kills.push((what.to_string(), at, AtomicU64::new(0)));
            }
            "read" => {
                let fault = match what {
                    "eio" => ReadFault::Eio,
                    "eintr" => ReadFault::Eintr,
                    "eagain" => ReadFault::Eagain,
                    "short" => ReadFault::Short,
                    _ => return None,
                };
                let which = match number?.strip_prefix('*') {
                    Some(every) => Which::Every(every.parse().ok().filter(|n| *n > 0)?),
                    None => Which::Nth(number?.parse().ok().filter(|n| *n > 0)?),
                };
                self.reads.push((fault, which));
            }
            "delay" => {
                let pause = Duration::from_millis(number?.parse().ok()?);
                match what {
                    "read" => self.read_delay = pause,
                    "fill" => self.fill_delay = pause,
                    _ => return None,
                }
            }
            "refuse" if ["io_uring", "registered_buffers"].contains(&what) && number.is_none() => self.refused.push(what.to_string()),
            _ => return None,
        }
        Some(())
    }

    /// Counts a read; what it should return instead of its result.
    #[must_use]
    pub fn next_read(&self) -> Option<ReadFault> {
        // Relaxed: a counter; which thread's read is the n-th does not matter.
        let count = self.read_count.fetch_add(1, Ordering::Relaxed) + 1;
        self.reads.iter().find(|(_, which)| which.is(count)).map(|(fault, _)| *fault)
    }

    /// Time that every read takes longer.
    #[must_use]
    pub fn read_delay(&self) -> Duration {
        self.read_delay
    }

    /// Time that every fill of a slot takes longer.
    #[must_use]
    pub fn fill_delay(&self) -> Duration {
        self.fill_delay
    }

    /// Whether the kernel shall be taken to have refused `what`.
    #[must_use]
    pub fn refuses(&self, what: &str) -> bool {
        self.refused.iter().any(|r| r == what)
    }
}

fn wrong(item: &str) -> Error {
    Error::config(format!("{FAULTS_ENV} has an item that means nothing"))
        .expected("kill=POINT[:N], read=KIND:[*]N, delay=read|fill:MS or refuse=WHAT")
        .found(item)
        .advice("unset it: it is for tests only")
}

/// Switches on what [`FAULTS_ENV`] asks for; called once, at a program's start.
///
/// # Errors
/// [`Error::Config`] if it cannot be understood.
pub fn init(role: Role) -> Result<()> {
    let Some(text) = std::env::var_os(FAULTS_ENV) else { return Ok(()) };
    let faults = Faults::parse(&text.to_string_lossy(), role)?;
    tracing::warn!("FAULT SWITCHES ARE ON ({FAULTS_ENV}={}): this process will fail on purpose", text.to_string_lossy());
    if FAULTS.set(faults).is_ok() {
        // Release: pairs with the Acquire in `active`.
        ON.store(true, Ordering::Release);
    }
    Ok(())
}

/// The faults that are on, if any.
#[must_use]
pub fn active() -> Option<&'static Faults> {
    // Acquire: pairs with the Release in `init`.
    if ON.load(Ordering::Acquire) { FAULTS.get() } else { None }
}

/// A place at which this process may have been told to kill itself.
pub fn point(name: &'static str) {
    debug_assert!(POINTS.contains(&name), "{name}");
    let Some(faults) = active() else { return };
    for (kill, at, passed) in &faults.kills {
        // Relaxed: a counter.
        if kill == name && passed.fetch_add(1, Ordering::Relaxed) + 1 == *at {
            die();
        }
    }
}

fn die() -> ! {
    let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
    loop {
        std::thread::park();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn items_are_understood_or_refused() {
        let text = "kill=after-payload:3, read=eio:2,read=short:*3,delay=fill:20,refuse=io_uring,trainer.kill=word,loader.delay=read:1";
        let faults = Faults::parse(text, Role::Loader).unwrap();
        assert_eq!(faults.kills.len(), 1);
        assert_eq!((faults.kills[0].0.as_str(), faults.kills[0].1), ("after-payload", 3));
        assert_eq!((faults.read_delay, faults.fill_delay), (Duration::from_millis(1), Duration::from_millis(20)));
        assert!(faults.refuses("io_uring") && !faults.refuses("registered_buffers"));
        let reads: Vec<_> = (0..6).map(|_| faults.next_read()).collect();
        assert_eq!(reads, [None, Some(ReadFault::Eio), Some(ReadFault::Short), None, None, Some(ReadFault::Short)]);
        assert_eq!(Faults::parse(text, Role::Trainer).unwrap().kills.len(), 2);
        for bad in ["kill=nowhere", "kill=word:0", "read=eio", "read=eio:*0", "delay=fill", "refuse=rest", "loader.kill=x", "word", "x=y"] {
            assert_eq!(Faults::parse(bad, Role::Loader).unwrap_err().exit_code(), 64, "{bad}");
        }
        assert!(active().is_none(), "off unless a program switches them on");
    }
}
