//! What happens when somebody cuts the segment short under a running process: a message and exit 70 instead of a death by SIGBUS.
//!
//! Touching a page of a mapping that its file no longer has raises SIGBUS, and nothing in the process can have prevented it: any process of
//! the same user may truncate the file at any time. The handler looks whether the address lies in a ring that this process has mapped. If
//! so, it says what happened and ends the process with the exit code of a broken invariant, so that a launcher treats it as one and a
//! user can tell it from broken memory. Any other SIGBUS is none of ours: the action that was there before is put back, and takes it.
//!
//! Unsafe code, because a signal handler is installed and because it may use nothing but async-signal-safe calls: atomics, `sigaction`,
//! `raise`, `write`, `_exit`. The mapped ranges are in a fixed table of atomics for the same reason.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::libc;

use crate::error::{Error, Result};

/// Rings that one process can have mapped at once; tests map several.
const RANGES: usize = 64;
/// Start of an entry that is being written: no address is at or above it.
const CLAIMED: usize = usize::MAX;
const MESSAGE: &[u8] =
    b"serenity: error: the ring in shared memory was cut short while this process used it; stop whatever removes or truncates \
files in /dev/shm, then run the same command again: it goes on from the last checkpoint\n";

struct Range {
    start: AtomicUsize,
    end: AtomicUsize,
}

static TABLE: [Range; RANGES] = [const { Range { start: AtomicUsize::new(0), end: AtomicUsize::new(0) } }; RANGES];
/// What SIGBUS did before; written before our handler is installed.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// A mapped range that the handler knows, until it is dropped.
pub(super) struct Guarded(&'static Range);

impl Guarded {
    /// Makes the handler know `bytes` at `start`, and installs it if this is the first.
    ///
    /// # Errors
    /// [`Error::Absent`] if the handler cannot be installed or the table is full.
    pub(super) fn new(start: *const u8, bytes: usize) -> Result<Self> {
        install()?;
        let start = start.addr();
        for range in &TABLE {
            // Acquire on success: pairs with the Release in `drop`, so that our `end` comes after its 0. Relaxed on failure: nothing is used.
            if range.start.compare_exchange(0, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                // Relaxed: published by the store below.
                range.end.store(start + bytes, Ordering::Relaxed);
                // Release: pairs with the Acquire in `is_ours`.
                range.start.store(start, Ordering::Release);
                return Ok(Self(range));
            }
        }
        Err(Error::absent("too many rings are mapped in one process").expected(format!("at most {RANGES}")))
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // Relaxed: an entry with the start of one ring and the end of none matches no address.
        self.0.end.store(0, Ordering::Relaxed);
        // Release: pairs with the Acquire of the claim in `new`.
        self.0.start.store(0, Ordering::Release);
    }
}

fn is_ours(address: usize) -> bool {
    // Acquire: pairs with the Release in `new`; then `end` is that entry's (Relaxed).
    TABLE.iter().any(|r| (r.start.load(Ordering::Acquire)..r.end.load(Ordering::Relaxed)).contains(&address))
}

fn install() -> Result<()> {
    static DONE: OnceLock<std::result::Result<(), nix::errno::Errno>> = OnceLock::new();
    let outcome = DONE.get_or_init(|| {
        // SAFETY: an all-zero `sigaction` is a valid value of that C struct (no handler, empty mask, no flags).
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: a null action only asks for the present one, which goes into a struct of ours.
        nix::errno::Errno::result(unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut before) })?;
        let _ = BEFORE.set(before);
        // SAFETY: as above.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler has the signature that SA_SIGINFO asks for, and makes async-signal-safe calls only.
        nix::errno::Errno::result(unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) }).map(drop)
    });
    outcome.map_err(|e| Error::absent("cannot install a signal handler").cause(e))
}

extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel hands a handler with SA_SIGINFO a valid siginfo; `si_addr` is read only for the faults that set it.
    let (from_kernel, address) = unsafe { ((*info).si_code > 0, (*info).si_addr().addr()) };
    if from_kernel && is_ours(address) {
        // SAFETY: `write` of a constant; its outcome changes nothing.
        let _ = unsafe { libc::write(libc::STDERR_FILENO, MESSAGE.as_ptr().cast(), MESSAGE.len()) };
        // SAFETY: ends the process without running anything else of it.
        unsafe { libc::_exit(70) };
    }
    if let Some(before) = BEFORE.get() {
        // SAFETY: puts back an action that the kernel gave us; the faulting access, run again on return, meets it.
        unsafe { libc::sigaction(signal, before, std::ptr::null_mut()) };
    }
    if !from_kernel {
        // Sent by somebody: there is no access that would raise it again.
        // SAFETY: async-signal-safe; delivered when this handler returns.
        unsafe { libc::raise(signal) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn ranges_are_known_while_they_are_mapped() {
        let memory = [0u8; 64];
        let at = memory.as_ptr();
        let guarded = Guarded::new(at, 64).unwrap();
        assert!(is_ours(at.addr()) && is_ours(at.addr() + 63) && !is_ours(at.addr() + 64));
        drop(guarded);
        assert!(!is_ours(at.addr()));
    }
}
