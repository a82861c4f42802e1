//! How fast the slab's file can be read at all: nothing checked, nothing kept.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serenity_protocol::Result;

use super::uring::Uring;
use super::{ALIGN, AlignedBuffer, READ_BYTES_MAX, SlabFile, pread};

/// Reads that each thread has on their way, of a disk.
const DEPTH: usize = 16;

/// A measured rate.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct PlainRead {
    /// Bytes a second.
    pub rate: f64,
    /// Threads that made it.
    pub threads: usize,
}

/// The best rate of several numbers of threads, each reading the file in order for at most `patience`: direct reads through a deep queue,
/// or copies out of a memory file system into memory of the size of a cache.
///
/// # Errors
/// An I/O error of the slab.
pub fn plain_read(slab: &SlabFile, patience: Duration) -> Result<PlainRead> {
    let cores = rayon::current_num_threads();
    let mut best = PlainRead { rate: 0.0, threads: 1 };
    let mut counts = if slab.is_direct() { vec![1, 2, cores.min(4)] } else { vec![1, cores.div_ceil(2), cores] };
    counts.dedup();
    for threads in counts {
        let (next, failed) = (AtomicU64::new(0), Mutex::new(None));
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    if let Err(e) = read_some(slab, &next, start + patience)
                        && let Ok(mut failed) = failed.lock()
                    {
                        failed.get_or_insert(slab.failure(e));
                    }
                });
            }
        });
        if let Some(error) = failed.into_inner().unwrap_or(None) {
            return Err(error);
        }
        // Relaxed: the threads have ended.
        let rate = next.load(Ordering::Relaxed).min(slab.file_bytes) as f64 / start.elapsed().as_secs_f64();
        if rate > best.rate {
            best = PlainRead { rate, threads };
        }
    }
    Ok(best)
}

/// One thread's share: the next part of the file until its end or `deadline`.
fn read_some(slab: &SlabFile, next: &AtomicU64, deadline: Instant) -> Result<(), (u64, std::io::Error)> {
    let take = || {
        if Instant::now() > deadline {
            return None;
        }
        // Relaxed: each part is taken once, in whatever order.
        let at = next.fetch_add(READ_BYTES_MAX, Ordering::Relaxed);
        (at < slab.file_bytes).then(|| at..(at + READ_BYTES_MAX).min(slab.file_bytes))
    };
    if !slab.is_direct() {
        let mut buffer = AlignedBuffer::default();
        while let Some(range) = take() {
            // Half at a time: what a core's own cache holds.
            let middle = range.start + (range.end - range.start) / 2 / ALIGN as u64 * ALIGN as u64;
            for part in [range.start..middle, middle..range.end] {
                let op = slab.op(&part);
                pread::read(&slab.file, op, buffer.resize(op.len))?;
            }
        }
        return Ok(());
    }
    let Ok((mut ring, mut free)) = Uring::new(DEPTH, READ_BYTES_MAX as usize) else {
        let mut buffer = AlignedBuffer::default();
        while let Some(range) = take() {
            let op = slab.op(&range);
            pread::read(&slab.file, op, buffer.resize(op.len))?;
        }
        return Ok(());
    };
    loop {
        while let Some(buffer) = free.pop() {
            let Some(range) = take() else { break };
            ring.submit(&slab.file, slab.op(&range), buffer);
        }
        let Some((buffer, outcome)) = ring.wait(&slab.file) else { return Ok(()) };
        outcome?;
        free.push(buffer);
    }
}
