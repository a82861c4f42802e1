//! Reads through io_uring with a deep queue.
//!
//! One instance belongs to one thread. A call submits up to [`DEPTH`] reads at a time, takes short reads up where they stopped, repeats
//! what was interrupted, and returns only when nothing is in flight any more: the buffer is the kernel's until then, on errors too.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};

use super::{ReadOp, expected_len};
use crate::faults;

const DEPTH: usize = 32;

pub(super) struct Uring {
    ring: IoUring,
}

impl Uring {
    /// # Errors
    /// The kernel's refusal (disabled, seccomp, memory lock).
    pub(super) fn new() -> io::Result<Self> {
        let tuned = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(DEPTH as u32);
        // Kernels before 6.1 do not know the two flags.
        let ring = tuned.or_else(|_| IoUring::new(DEPTH as u32))?;
        Ok(Self { ring })
    }

    /// Performs `ops` into `buffer`.
    ///
    /// # Errors
    /// The first failed read with its offset; a file that ends early is `UnexpectedEof`.
    pub(super) fn read(&mut self, file: &File, file_bytes: u64, ops: &[ReadOp], buffer: &mut [u8]) -> Result<(), (u64, io::Error)> {
        assert!(ops.iter().all(|op| op.into + op.len <= buffer.len()), "a read beyond its buffer");
        let mut done = vec![0usize; ops.len()];
        let mut next = 0;
        let mut again: Vec<usize> = Vec::new();
        let mut in_flight = 0;
        let mut failed: Option<(u64, io::Error)> = None;
        while in_flight > 0 || (failed.is_none() && (next < ops.len() || !again.is_empty())) {
            while failed.is_none() && in_flight < DEPTH {
                let Some(index) = again.pop().or_else(|| (next < ops.len()).then_some(next)) else { break };
                next = next.max(index + 1);
                self.push(file, &ops[index], index, done[index], buffer);
                in_flight += 1;
            }
            if let Err(e) = self.ring.submit_and_wait(1)
                && !matches!(e.raw_os_error(), Some(nix::libc::EINTR | nix::libc::EAGAIN | nix::libc::EBUSY))
            {
                // Nothing sensible can follow, and reads may be in flight into memory that we are about to hand back.
                tracing::error!("io_uring failed while reads were in flight: {e}");
                std::process::abort();
            }
            while let Some(entry) = self.ring.completion().next() {
                in_flight -= 1;
                let index = entry.user_data() as usize;
                match outcome(faults::read_result(entry.result()), &ops[index], &mut done[index], file_bytes) {
                    Ok(true) => {}
                    Ok(false) => again.push(index),
                    Err(e) => failed = failed.or(Some(e)),
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    fn push(&mut self, file: &File, op: &ReadOp, index: usize, done: usize, buffer: &mut [u8]) {
        let target = buffer[op.into + done..op.into + op.len].as_mut_ptr();
        let entry = opcode::Read::new(types::Fd(file.as_raw_fd()), target, (op.len - done) as u32)
            .offset(op.offset + done as u64)
            .build()
            .user_data(index as u64);
        // SAFETY: the target lies in `buffer`, which `read` borrows exclusively and gives back only when nothing is in flight; ranges
        // of different ops do not overlap; the file stays open meanwhile. The queue has room: at most DEPTH entries are in flight.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "the submission queue holds {DEPTH} entries, and no more are in flight");
    }
}

/// What became of a read: finished, to be repeated, or failed.
fn outcome(result: i32, op: &ReadOp, done: &mut usize, file_bytes: u64) -> Result<bool, (u64, io::Error)> {
    let at = op.offset + *done as u64;
    match result {
        n if n > 0 => {
            *done += n as usize;
            Ok(*done >= expected_len(op, file_bytes))
        }
        0 => Err((at, io::Error::from(io::ErrorKind::UnexpectedEof))),
        e if matches!(-e, nix::libc::EINTR | nix::libc::EAGAIN) => Ok(false),
        e => Err((at, io::Error::from_raw_os_error(-e))),
    }
}
