//! A deep queue of reads through io_uring.
//!
//! One instance belongs to one thread. A [`Buffer`] is either in the caller's hands or the kernel's: [`Uring::submit`] takes it,
//! [`Uring::wait`] gives it back when its read is complete or has failed. Short reads are taken up where they stopped, interrupted ones
//! repeated. Buffers are registered with the kernel where the memory lock allows (said once where not), which saves pinning pages at
//! every read. Failure: a queue that is dropped first waits for what is in flight, because the memory is the kernel's until then.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};
use nix::libc;

use super::AlignedBuffer;
use crate::faults;

/// Memory of one read.
pub(super) struct Buffer {
    memory: AlignedBuffer,
    index: usize,
}

impl Buffer {
    pub(super) fn bytes(&self) -> &[u8] {
        self.memory.bytes()
    }
    pub(super) fn index(&self) -> usize {
        self.index
    }
}

/// One read: `len` bytes at `offset`, of which the file has `expected` (fewer only at its end).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReadOp {
    pub(super) offset: u64,
    pub(super) len: usize,
    pub(super) expected: usize,
}

/// How a read ended: where it failed and how, if it did.
pub(super) type Outcome = Result<(), (u64, io::Error)>;

struct Flight {
    buffer: Buffer,
    op: ReadOp,
    done: usize,
}

pub(super) struct Uring {
    ring: IoUring,
    registered: bool,
    /// By the buffer's index.
    flights: Vec<Option<Flight>>,
    in_flight: usize,
}

impl Uring {
    /// A queue for `depth` reads of `bytes` each, and its buffers.
    ///
    /// # Errors
    /// The kernel's refusal (disabled, seccomp, memory lock).
    pub(super) fn new(depth: usize, bytes: usize) -> io::Result<(Self, Vec<Buffer>)> {
        let tuned = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(depth as u32);
        // Kernels before 6.1 do not know the two flags.
        let ring = tuned.or_else(|_| IoUring::new(depth as u32))?;
        let mut buffers = Vec::with_capacity(depth);
        let mut vectors = Vec::with_capacity(depth);
        for index in 0..depth {
            let mut memory = AlignedBuffer::default();
            let slice = memory.resize(bytes);
            vectors.push(libc::iovec { iov_base: slice.as_mut_ptr().cast(), iov_len: slice.len() });
            buffers.push(Buffer { memory, index });
        }
        // SAFETY: the vectors describe memory of the buffers, whose heap addresses never change. The kernel touches it only for reads
        // submitted below, and a read is submitted only with its buffer in the queue's hands.
        let registered = unsafe { ring.submitter().register_buffers(&vectors) };
        static SAID: std::sync::Once = std::sync::Once::new();
        if let Err(e) = &registered {
            SAID.call_once(|| {
                tracing::info!("reads use unregistered buffers, which costs some processor time: {e} (raise the memory lock)")
            });
        }
        let flights = (0..depth).map(|_| None).collect();
        Ok((Self { ring, registered: registered.is_ok(), flights, in_flight: 0 }, buffers))
    }

    /// Buffers that the queue was made with.
    pub(super) fn capacity(&self) -> usize {
        self.flights.len()
    }

    /// Hands a read to the queue; it starts at the next [`Self::wait`].
    pub(super) fn submit(&mut self, file: &File, op: ReadOp, buffer: Buffer) {
        assert!(op.len <= buffer.bytes().len(), "a read of {} bytes into {}", op.len, buffer.bytes().len());
        let index = buffer.index;
        self.flights[index] = Some(Flight { buffer, op, done: 0 });
        self.in_flight += 1;
        self.push(file, index);
    }

    fn push(&mut self, file: &File, index: usize) {
        let Some(flight) = &mut self.flights[index] else { return };
        let (at, len) = (flight.op.offset + flight.done as u64, (flight.op.len - flight.done) as u32);
        let target = flight.buffer.memory.resize(flight.op.len)[flight.done..].as_mut_ptr();
        let fd = types::Fd(file.as_raw_fd());
        let entry = if self.registered {
            opcode::ReadFixed::new(fd, target, len, index as u16).offset(at).build()
        } else {
            opcode::Read::new(fd, target, len).offset(at).build()
        };
        // SAFETY: the target is memory of a buffer that `flights` holds until its completion has been seen, and `drop` waits for all of
        // them; no two flights share a buffer; the file stays open because its owner waits or drops the queue first. The queue has
        // room: there are as many entries as buffers.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(index as u64)) };
        assert!(pushed.is_ok(), "the submission queue holds as many entries as there are buffers");
    }

    /// Starts what was submitted and waits until some read is done: its buffer, and the offset and error if it failed.
    /// `None` if nothing is in flight.
    pub(super) fn wait(&mut self, file: &File) -> Option<(Buffer, Outcome)> {
        while self.in_flight > 0 {
            // Entries of an earlier wait first: submitting is worth a system call only when there is something to submit or to wait for.
            if self.ring.completion().is_empty() || !self.ring.submission().is_empty() {
                self.enter();
            }
            let Some(entry) = self.ring.completion().next() else { continue };
            let index = entry.user_data() as usize;
            let Some(flight) = self.flights.get_mut(index).and_then(Option::as_mut) else { continue };
            match outcome(faults::read_result(entry.result()), flight) {
                Ok(false) => self.push(file, index),
                finished => {
                    self.in_flight -= 1;
                    let buffer = self.flights[index].take()?.buffer;
                    return Some((buffer, finished.map(|_| ())));
                }
            }
        }
        None
    }

    fn enter(&mut self) {
        let want = usize::from(self.ring.completion().is_empty());
        if let Err(e) = self.ring.submit_and_wait(want)
            && !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
        {
            // Nothing sensible can follow, and reads may be in flight into memory that we are about to hand back.
            tracing::error!("io_uring failed while reads were in flight: {e}");
            std::process::abort();
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            self.enter();
            while let Some(entry) = self.ring.completion().next() {
                if let Some(flight) = self.flights.get_mut(entry.user_data() as usize) {
                    *flight = None;
                    self.in_flight -= 1;
                }
            }
        }
    }
}

/// What became of a read: finished, to be repeated, or failed.
fn outcome(result: i32, flight: &mut Flight) -> Result<bool, (u64, io::Error)> {
    let at = flight.op.offset + flight.done as u64;
    match result {
        n if n > 0 => {
            flight.done += n as usize;
            Ok(flight.done >= flight.op.expected)
        }
        0 => Err((at, io::Error::from(io::ErrorKind::UnexpectedEof))),
        e if matches!(-e, libc::EINTR | libc::EAGAIN) => Ok(false),
        e => Err((at, io::Error::from_raw_os_error(-e))),
    }
}
