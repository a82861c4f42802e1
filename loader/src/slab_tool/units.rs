//! Divides a safetensors file among threads, so that a slab is hashed or written at the speed of the storage and not of one core.
//!
//! A [`Unit`] is a run of whole tensors, because a tensor's checksum is one running hash. Pages do not end where tensors do: a page belongs
//! to the unit that it starts in, whose thread goes on beyond the unit's end to finish it. So no two threads share a hash, and the
//! result does not depend on their number.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};

use serenity_protocol::{Error, Result};

use super::progress::{Progress, joined};

/// Threads even where there are fewer cores: blocking reads and writes must overlap with the work on other bytes.
const WORKERS_MIN: usize = 4;
/// Threads at most; more only queue at the memory bus.
const WORKERS_MAX: usize = 32;

/// How the work on a file is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Division {
    /// Threads.
    pub workers: usize,
    /// Small tensors are put together up to this many bytes.
    pub unit_bytes: u64,
    /// Bytes read or written at once: small enough to stay in a core's cache while they are hashed more than once.
    pub piece_bytes: u64,
}

impl Default for Division {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { workers: cores.clamp(WORKERS_MIN, WORKERS_MAX), unit_bytes: 128 << 20, piece_bytes: 1 << 20 }
    }
}

/// Consecutive tensors of a file, and the pages that start in them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Indices of the tensors, in file order.
    pub tensors: Range<usize>,
    /// From the first tensor's first byte (the first unit: from byte 0) to the last one's end.
    pub bytes: Range<u64>,
    /// The pages that start in `bytes`, from the first one's first byte to the last one's end. Empty where no page starts in the unit.
    pub pages: Range<u64>,
}

impl Unit {
    /// Everything that the unit's thread must look at.
    #[must_use]
    pub fn all(&self) -> Range<u64> {
        self.bytes.start..self.bytes.end.max(self.pages.end)
    }

    /// The multiples of `piece_bytes` that cut `range`: non-empty pieces in order.
    pub fn pieces(range: Range<u64>, piece_bytes: u64) -> impl Iterator<Item = Range<u64>> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let piece = at..((at / piece_bytes + 1) * piece_bytes).min(range.end);
            at = piece.end;
            (!piece.is_empty()).then_some(piece)
        })
    }
}

/// The units of a file of `file_bytes` with these tensors (in file order, without gaps after the header), the largest first, so that no
/// thread begins a long one when the others are done.
#[must_use]
pub fn divide(tensors: &[Range<u64>], file_bytes: u64, page_bytes: u64, unit_bytes: u64) -> Vec<Unit> {
    let mut units: Vec<Unit> = Vec::new();
    for (index, range) in tensors.iter().enumerate() {
        let length = range.end - range.start;
        match units.last_mut() {
            Some(unit) if length == 0 || unit.bytes.end - unit.bytes.start + length <= unit_bytes => {
                unit.bytes.end = range.end;
                unit.tensors.end = index + 1;
            }
            Some(_) => units.push(Unit { tensors: index..index + 1, bytes: range.clone(), pages: 0..0 }),
            // The header goes with the first tensors.
            None => units.push(Unit { tensors: 0..1, bytes: 0..range.end, pages: 0..0 }),
        }
    }
    if units.is_empty() {
        units.push(Unit { tensors: 0..0, bytes: 0..file_bytes, pages: 0..0 });
    }
    for unit in &mut units {
        let first = unit.bytes.start.next_multiple_of(page_bytes);
        if first < unit.bytes.end {
            unit.pages = first..unit.bytes.end.next_multiple_of(page_bytes).min(file_bytes);
        }
    }
    units.sort_by_key(|u| (u64::MAX - (u.bytes.end - u.bytes.start), u.bytes.start));
    units
}

/// What a thread calls with the bytes that it has done; an error ends it.
pub type Done<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// Runs `each` on every item, on `workers` threads, each with a state of its own; results in no particular order.
///
/// # Errors
/// The first error of a thread, after which the others end too; [`Error::TryAgain`] if the process is asked to stop.
pub fn on_threads<T: Send, S, R: Send>(
    items: Vec<T>,
    workers: usize,
    progress: &mut Progress,
    state: impl Fn() -> S + Sync,
    each: impl Fn(&mut S, T, &mut Done) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let count = workers.max(1).min(items.len());
    let queue = Mutex::new(items.into_iter());
    let next = || queue.lock().map(|mut q| q.next()).map_err(|_| Error::invariant("a worker thread panicked"));
    let work = |out: Sender<Option<u64>>| {
        let (mut state, mut results) = (state(), Vec::new());
        while let Some(item) = next()? {
            let mut report = |bytes| out.send(Some(bytes)).map_err(|_| Error::invariant("a worker thread was stopped"));
            match each(&mut state, item, &mut report) {
                Ok(result) => results.push(result),
                Err(error) => {
                    // Nobody may be listening any more.
                    let _ = out.send(None);
                    return Err(error);
                }
            }
        }
        Ok(results)
    };
    let work = &work;
    std::thread::scope(|scope| {
        let (out, done) = channel::<Option<u64>>();
        let threads: Vec<_> = (0..count)
            .map(|_| {
                let out = out.clone();
                scope.spawn(move || work(out))
            })
            .collect();
        drop(out);
        let mut stopped = Ok(());
        for event in &done {
            stopped = event.map_or(Ok(()), |bytes| progress.add(bytes));
            if stopped.is_err() || event.is_none() {
                break;
            }
        }
        // The others notice at their next report.
        drop(done);
        let (mut results, mut errors) = (Vec::new(), Vec::new());
        for thread in threads {
            match joined(thread.join()) {
                Ok(some) => results.extend(some),
                Err(error) => errors.push(error),
            }
        }
        stopped?;
        // A thread that was only stopped reports an invariant; the one that failed says why.
        errors.sort_by_key(|e| matches!(e, Error::Invariant(_)));
        errors.into_iter().next().map_or(Ok(results), Err)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn units_cover_every_byte_tensor_and_page_once() {
        let lengths = [5000u64, 0, 1, 64, 300_000, 0, 4096, 7, 90_000, 0];
        for (page, unit_bytes) in [(4096, 1), (4096, 10_000), (1 << 16, 100_000), (1 << 20, 1 << 30)] {
            let mut at = 200;
            let tensors: Vec<Range<u64>> = lengths
                .iter()
                .map(|l| {
                    at += l;
                    at - l..at
                })
                .collect();
            let mut units = divide(&tensors, at, page, unit_bytes);
            assert!(units.windows(2).all(|w| w[0].bytes.end - w[0].bytes.start >= w[1].bytes.end - w[1].bytes.start));
            units.sort_by_key(|u| u.bytes.start);
            let (mut byte, mut tensor, mut page_at) = (0, 0, 0);
            for unit in &units {
                assert_eq!((unit.bytes.start, unit.tensors.start), (byte, tensor));
                (byte, tensor) = (unit.bytes.end, unit.tensors.end);
                if !unit.pages.is_empty() {
                    assert_eq!(unit.pages.start, page_at);
                    page_at = unit.pages.end;
                }
                let mut seen = unit.all().start;
                for piece in Unit::pieces(unit.all(), 1 << 15) {
                    assert!(piece.start == seen && piece.end > seen && (piece.end % (1 << 15) == 0 || piece.end == unit.all().end));
                    seen = piece.end;
                }
                assert_eq!(seen, unit.all().end);
            }
            assert_eq!((byte, tensor, page_at), (at, lengths.len(), at));
        }
    }
}
