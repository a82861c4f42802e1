//! Reads pages of the slab, many at once, past the page cache where the file system allows it, and checks each.
//!
//! The page is the unit of everything: of O_DIRECT, of the manifest's hashes, of the pieces that a payload's checksum is made of. So
//! every byte that reaches the ring was compared with what the builder wrote, by the thread that uses it next, while it is in that
//! thread's cache. A slab without page hashes (the original builder's) gets them at first sight: a page that later reads differently
//! is reported instead of trained on.
//!
//! Two ways in. Of a disk, the calling thread keeps a deep queue of direct reads (`uring`) and rayon's threads work on what has arrived.
//! Of a memory file system there is nothing to wait for: rayon's threads copy the pages themselves. Direct reads go into this process's
//! own memory, never into a ring slot, because a dying loader's reads can land after its successor has taken over; a copy that the
//! calling thread makes ends with that thread, and may.

mod aligned;
mod file;
mod limit;
mod pread;
mod uring;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use rayon::prelude::*;
use serenity_protocol::{Error, Result};
use uring::{Buffer, Uring};

pub use aligned::{ALIGN, AlignedBuffer};
pub use file::SlabFile;
pub use limit::{PlainRead, plain_read};

use crate::faults;
use crate::stages::{self, Stage, timed};

/// Largest single read handed to the kernel, unless one page is larger.
const READ_BYTES_MAX: u64 = 2 << 20;
/// Bytes that one reader has on their way at most, unless two pages are more.
const QUEUE_BYTES: u64 = 32 << 20;
/// Threads that read where io_uring is refused: a disk wants many requests at a time, whatever the number of processors.
const PREAD_THREADS: usize = 16;

/// A contiguous, page-aligned part of the file in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    range: Range<u64>,
    at: usize,
}

/// The bytes that a request brought: look them up by their offset in the file.
pub struct Fetched {
    buffer: AlignedBuffer,
    pieces: Vec<Piece>,
}

impl Fetched {
    /// An empty result whose memory is used again by [`Reader::fetch`].
    #[must_use]
    pub fn new() -> Self {
        Self { buffer: AlignedBuffer::default(), pieces: Vec::new() }
    }

    /// The bytes of `range`, which must lie within one requested range.
    ///
    /// # Errors
    /// [`Error::Invariant`] if it was not requested.
    pub fn bytes(&self, range: &Range<u64>) -> Result<&[u8]> {
        let piece = self
            .pieces
            .iter()
            .find(|p| p.range.start <= range.start && range.end <= p.range.end)
            .ok_or_else(|| Error::invariant(format!("bytes {range:?} of the slab were used without having been read")))?;
        let start = piece.at + (range.start - piece.range.start) as usize;
        Ok(&self.buffer.bytes()[start..start + (range.end - range.start) as usize])
    }
}

impl Default for Fetched {
    fn default() -> Self {
        Self::new()
    }
}

/// A page to be read, for [`Reader::visit`].
pub struct Visit<'a, T> {
    /// Number of the page.
    pub page: u64,
    /// Where the page's bytes go if all of them go there as they are: a reader that copies in the calling thread reads right into it.
    pub target: Option<&'a mut [u8]>,
    /// Whether another visit is likely to want the page soon.
    pub shared: bool,
    /// The caller's.
    pub item: T,
}

/// A checked page.
pub struct Page<'a> {
    /// XXH3-64 of the page.
    pub hash: u64,
    /// First byte of the page in the file.
    pub start: u64,
    /// The bytes; `None` if they are in the visit's target already.
    pub bytes: Option<&'a [u8]>,
}

enum Engine {
    /// By rayon's threads, or by a pool of their own.
    Pread(Option<rayon::ThreadPool>),
    Uring(Box<Uring>, Vec<Buffer>),
}

/// A reader of one slab for one thread.
pub struct Reader {
    slab: Arc<SlabFile>,
    /// Made at the first visit.
    engine: Option<Engine>,
}

impl Reader {
    /// A reader with io_uring for a disk, or with pread threads where the kernel refuses it (said once in the log).
    #[must_use]
    pub fn new(slab: Arc<SlabFile>) -> Self {
        Self { engine: (!slab.direct).then_some(Engine::Pread(None)), slab }
    }

    /// A reader that does not try io_uring.
    #[must_use]
    pub fn with_threads(slab: Arc<SlabFile>) -> Self {
        Self { slab, engine: Some(Engine::Pread(pread_pool())) }
    }

    /// Reads the pages of `visits` (each page once), checks each and hands it to `each`, on rayon's threads and in any order. `each` makes
    /// no use of rayon itself.
    ///
    /// # Errors
    /// [`Error::Data`] for an I/O error, a file that became shorter, or a page whose checksum is wrong, with path and offset; the first
    /// error of `each`.
    pub fn visit<T: Send>(
        &mut self,
        mut visits: Vec<Visit<'_, T>>,
        each: impl for<'v> Fn(Visit<'v, T>, Page<'_>) -> Result<()> + Sync,
    ) -> Result<()> {
        let _span = tracing::trace_span!("read", pages = visits.len()).entered();
        faults::delay_read();
        let slab = self.slab.clone();
        let engine = self.engine.get_or_insert_with(|| Engine::for_disk(&slab));
        // What an earlier chunk left is not read again.
        let mut failed = Ok(());
        if slab.direct {
            visits = visits
                .into_iter()
                .filter_map(|visit| match slab.kept(visit.page) {
                    Some(kept) => {
                        let start = slab.page_range(visit.page).start;
                        if failed.is_ok() {
                            failed = each(visit, Page { hash: kept.hash, start, bytes: Some(&kept.bytes) });
                        }
                        None
                    }
                    None => Some(visit),
                })
                .collect();
        }
        failed?;
        match engine {
            Engine::Pread(None) => visits.into_par_iter().with_max_len(1).try_for_each(|visit| slab.visit(visit, &each)),
            Engine::Pread(Some(pool)) => {
                pool.install(|| visits.into_par_iter().with_max_len(1).try_for_each(|visit| slab.visit(visit, &each)))
            }
            Engine::Uring(ring, buffers) => stream(&slab, ring, buffers, visits, &each),
        }
    }

    /// Reads `ranges` (in any order, overlaps allowed) into `into` and checks every page touched.
    ///
    /// # Errors
    /// As [`Self::visit`].
    pub fn fetch(&mut self, ranges: &[Range<u64>], into: &mut Fetched) -> Result<()> {
        let slab = self.slab.clone();
        into.pieces = page_pieces(ranges, slab.page_bytes, slab.file_bytes);
        let bytes = into.pieces.last().map_or(0, |p| p.at + aligned_len(&p.range));
        let mut rest = into.buffer.resize(bytes);
        let mut taken = 0;
        let mut visits = Vec::new();
        for piece in &into.pieces {
            (_, rest) = rest.split_at_mut(piece.at - taken);
            taken = piece.at;
            for page in piece.range.start / slab.page_bytes..piece.range.end.div_ceil(slab.page_bytes) {
                let range = slab.page_range(page);
                let (target, tail) = rest.split_at_mut((range.end - range.start) as usize);
                taken += target.len();
                visits.push(Visit { page, target: Some(target), shared: false, item: () });
                rest = tail;
            }
        }
        self.visit(visits, |visit, page| {
            if let (Some(target), Some(bytes)) = (visit.target, page.bytes) {
                target.copy_from_slice(bytes);
            }
            Ok(())
        })
    }
}

impl Engine {
    fn for_disk(slab: &SlabFile) -> Self {
        static SAID: std::sync::Once = std::sync::Once::new();
        let bytes = READ_BYTES_MAX.max(slab.page_bytes);
        // A small slab needs no deep queue.
        let depth = (QUEUE_BYTES / bytes).min(slab.file_bytes.div_ceil(bytes)).max(2) as usize;
        let refused = faults::refuses("io_uring").then(|| std::io::Error::from(std::io::ErrorKind::PermissionDenied));
        match refused.map_or_else(|| Uring::new(depth, bytes as usize), Err) {
            Ok((ring, buffers)) => Self::Uring(Box::new(ring), buffers),
            Err(e) => {
                SAID.call_once(|| tracing::warn!("io_uring is not available ({e}); reading with threads instead"));
                Self::Pread(pread_pool())
            }
        }
    }
}

/// Threads that mostly wait for a disk; none if they cannot be started, and then rayon's own do it.
fn pread_pool() -> Option<rayon::ThreadPool> {
    let threads = PREAD_THREADS.max(rayon::current_num_threads());
    rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("read-{i}")).build().ok()
}

thread_local! {
    /// One page, which stays in the cache of the processor that reads it.
    static PAGE: RefCell<AlignedBuffer> = RefCell::default();
}

impl SlabFile {
    /// Reads one page in the calling thread.
    fn visit<T>(&self, mut visit: Visit<'_, T>, each: &impl for<'v> Fn(Visit<'v, T>, Page<'_>) -> Result<()>) -> Result<()> {
        let range = self.page_range(visit.page);
        let op = self.op(&range);
        self.count(op.expected as u64);
        if let Some(target) = visit.target.as_deref_mut().filter(|t| !self.direct && t.len() == op.expected) {
            timed(Stage::Read, || pread::read(&self.file, op, target)).map_err(|e| self.failure(e))?;
            let hash = self.check_page(visit.page, target)?;
            return each(visit, Page { hash, start: range.start, bytes: None });
        }
        PAGE.with_borrow_mut(|buffer| {
            let buffer = buffer.resize(op.len);
            timed(Stage::Read, || pread::read(&self.file, op, buffer)).map_err(|e| self.failure(e))?;
            self.hand_over(visit, &buffer[..op.expected], each)
        })
    }

    /// Checks a page and hands it to `each`.
    fn hand_over<T>(&self, visit: Visit<'_, T>, bytes: &[u8], each: &impl for<'v> Fn(Visit<'v, T>, Page<'_>) -> Result<()>) -> Result<()> {
        let hash = self.check_page(visit.page, bytes)?;
        if visit.shared && self.direct {
            self.keep(visit.page, hash, bytes);
        }
        let start = self.page_range(visit.page).start;
        each(visit, Page { hash, start, bytes: Some(bytes) })
    }
}

/// A buffer on its way back to the thread that reads, whatever happens to the thread that works on it.
struct Returned {
    buffer: Option<Buffer>,
    to: Sender<Buffer>,
}

impl Drop for Returned {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            // The receiver lives until all work is done.
            let _ = self.to.send(buffer);
        }
    }
}

/// Keeps the queue full of reads and hands what arrives to rayon's threads.
fn stream<T: Send>(
    slab: &SlabFile,
    ring: &mut Uring,
    free: &mut Vec<Buffer>,
    visits: Vec<Visit<'_, T>>,
    each: &(impl for<'v> Fn(Visit<'v, T>, Page<'_>) -> Result<()> + Sync),
) -> Result<()> {
    let (send, receive) = channel::<Buffer>();
    let failed: Mutex<Option<Error>> = Mutex::new(None);
    let fail = |error: Error| {
        if let Ok(mut failed) = failed.lock() {
            failed.get_or_insert(error);
        }
    };
    let has_failed = || failed.lock().map_or(true, |f| f.is_some());
    let mut runs = runs(slab, visits).into_iter();
    let mut pending: Vec<Option<Vec<Visit<'_, T>>>> = (0..ring.capacity()).map(|_| None).collect();
    rayon::in_place_scope(|scope| {
        loop {
            free.extend(receive.try_iter());
            while !has_failed()
                && let Some(buffer) = free.pop()
            {
                let Some(run) = runs.next() else {
                    free.push(buffer);
                    break;
                };
                let range = run_range(slab, &run);
                slab.count(range.end - range.start);
                pending[buffer.index()] = Some(run);
                ring.submit(&slab.file, slab.op(&range), buffer);
            }
            let start = Instant::now();
            let Some((buffer, result)) = ring.wait(&slab.file) else {
                if has_failed() || runs.len() == 0 {
                    break;
                }
                // Every buffer is being worked on.
                match receive.recv() {
                    Ok(buffer) => free.push(buffer),
                    Err(_) => break,
                }
                continue;
            };
            stages::add(Stage::Read, start.elapsed());
            let run = pending[buffer.index()].take().unwrap_or_default();
            match result {
                Err(e) => {
                    fail(slab.failure(e));
                    free.push(buffer);
                }
                Ok(()) => {
                    let buffer = Returned { buffer: Some(buffer), to: send.clone() };
                    let fail = &fail;
                    scope.spawn(move |_| {
                        if let Err(error) = work(slab, buffer.buffer.as_ref(), run, each) {
                            fail(error);
                        }
                        drop(buffer);
                    });
                }
            }
        }
    });
    drop(send);
    free.extend(receive.iter());
    failed.into_inner().unwrap_or(None).map_or(Ok(()), Err)
}

/// Checks and hands over the pages of a run.
fn work<T>(
    slab: &SlabFile,
    buffer: Option<&Buffer>,
    run: Vec<Visit<'_, T>>,
    each: &impl for<'v> Fn(Visit<'v, T>, Page<'_>) -> Result<()>,
) -> Result<()> {
    let Some(buffer) = buffer else { return Ok(()) };
    let start = run_range(slab, &run).start;
    for visit in run {
        let range = slab.page_range(visit.page);
        slab.hand_over(visit, &buffer.bytes()[(range.start - start) as usize..(range.end - start) as usize], each)?;
    }
    Ok(())
}

/// Visits in runs of neighbouring pages, one read each: first the pages that the next chunk needs too, so that they have been kept
/// when it asks.
fn runs<'a, T>(slab: &SlabFile, visits: Vec<Visit<'a, T>>) -> Vec<Vec<Visit<'a, T>>> {
    let (shared, mut own): (Vec<_>, Vec<_>) = visits.into_iter().partition(|v| v.shared);
    own.sort_by_key(|v| v.page);
    let mut runs: Vec<Vec<Visit<'a, T>>> = shared.into_iter().map(|v| vec![v]).collect();
    let first = runs.len();
    let most = (READ_BYTES_MAX / slab.page_bytes).max(1) as usize;
    for visit in own {
        match runs[first..].last_mut() {
            Some(run) if run.len() < most && run.last().is_some_and(|v| v.page + 1 == visit.page) => run.push(visit),
            _ => runs.push(vec![visit]),
        }
    }
    runs
}

fn run_range<T>(slab: &SlabFile, run: &[Visit<'_, T>]) -> Range<u64> {
    match (run.first(), run.last()) {
        (Some(first), Some(last)) => slab.page_range(first.page).start..slab.page_range(last.page).end,
        _ => 0..0,
    }
}

fn aligned_len(range: &Range<u64>) -> usize {
    ((range.end - range.start) as usize).next_multiple_of(ALIGN)
}

/// The ranges widened to pages, sorted, merged where they touch, placed one behind the other.
fn page_pieces(ranges: &[Range<u64>], page_bytes: u64, file_bytes: u64) -> Vec<Piece> {
    let mut wide: Vec<Range<u64>> = ranges
        .iter()
        .filter(|r| r.start < r.end)
        .map(|r| r.start / page_bytes * page_bytes..r.end.next_multiple_of(page_bytes).min(file_bytes))
        .collect();
    wide.sort_by_key(|r| r.start);
    let mut pieces: Vec<Piece> = Vec::new();
    for range in wide {
        match pieces.last_mut() {
            Some(last) if range.start <= last.range.end => last.range.end = last.range.end.max(range.end),
            last => {
                let at = last.map_or(0, |p| p.at + aligned_len(&p.range));
                pieces.push(Piece { range, at });
            }
        }
    }
    pieces
}

#[cfg(test)]
mod tests;
