//! Reads byte ranges of the slab into private aligned memory, past the page cache where the file system allows it, and checks them.
//!
//! Requests are widened to whole pages: the unit of O_DIRECT and of the manifest's hashes at once, so every byte that reaches the ring
//! was compared with what the builder wrote. A slab without page hashes (the original builder's) gets them at first sight: a page
//! that later reads differently is reported instead of trained on. Reads go into this process's own memory, never into a ring slot,
//! because a dying loader's direct reads can still land after its successor has taken over.

mod aligned;
mod threads;
mod uring;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serenity_protocol::slab::Slab;
use serenity_protocol::{Error, Result};

pub use aligned::{ALIGN, AlignedBuffer};

use crate::faults;

/// Largest single read handed to the kernel.
const READ_BYTES_MAX: u64 = 2 << 20;
/// Page size assumed for slabs whose manifest has none.
const DEFAULT_PAGE_BYTES: u64 = 1 << 20;

/// One read: `len` bytes at `offset` of the file into the buffer at `into`. Multiples of [`ALIGN`], except at the end of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ReadOp {
    offset: u64,
    into: usize,
    len: usize,
}

/// What every reader of a slab shares.
pub struct SlabFile {
    path: PathBuf,
    file: File,
    file_bytes: u64,
    page_bytes: u64,
    /// Hash of each page from the manifest, or as first read (0 = not seen yet).
    pages: Vec<AtomicU64>,
    from_manifest: bool,
    read_bytes: AtomicU64,
    direct: bool,
}

impl SlabFile {
    /// Opens the slab's payload for direct reads; where the file system refuses (some memory file systems), through the page cache,
    /// said once in the log.
    ///
    /// # Errors
    /// [`Error::Absent`] if it cannot be opened.
    pub fn open(slab: &Slab) -> Result<Arc<Self>> {
        let path = slab.path();
        let direct = File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(path);
        let (file, direct) = match direct {
            Ok(file) => (file, true),
            Err(e) if e.raw_os_error() == Some(nix::libc::EINVAL) => {
                tracing::info!("the slab's file system has no direct reads; reading through the page cache");
                (File::open(path).map_err(|e| Error::io("cannot open the slab", path, e))?, false)
            }
            Err(e) => return Err(Error::io("cannot open the slab", path, e)),
        };
        let (page_bytes, hashes) = match slab.pages() {
            Some(pages) => (pages.page_bytes, Some(&pages.xxh3)),
            None => {
                tracing::warn!(
                    "the slab's manifest carries no checksums: corruption that is on the disk already cannot be noticed ('serenity-slab build' makes a slab that has them)"
                );
                (DEFAULT_PAGE_BYTES, None)
            }
        };
        if !page_bytes.is_multiple_of(ALIGN as u64) || page_bytes == 0 {
            return Err(Error::data("the manifest's page size is no multiple of the block size of disks")
                .at(slab.manifest_path())
                .expected(format!("a multiple of {ALIGN}"))
                .found(page_bytes));
        }
        let count = slab.file_bytes().div_ceil(page_bytes) as usize;
        let pages: Vec<AtomicU64> = match hashes {
            Some(hashes) => hashes.iter().map(|h| AtomicU64::new(*h)).collect(),
            None => (0..count).map(|_| AtomicU64::new(0)).collect(),
        };
        if pages.len() != count {
            return Err(Error::data("the manifest has hashes for another number of pages than the slab has")
                .at(slab.manifest_path())
                .expected(count)
                .found(pages.len()));
        }
        Ok(Arc::new(Self {
            path: path.to_path_buf(),
            file,
            file_bytes: slab.file_bytes(),
            page_bytes,
            pages,
            from_manifest: hashes.is_some(),
            read_bytes: AtomicU64::new(0),
            direct,
        }))
    }

    /// Bytes read from the file so far.
    #[must_use]
    pub fn read_bytes(&self) -> u64 {
        // Relaxed: a statistic.
        self.read_bytes.load(Ordering::Relaxed)
    }

    /// Whether reads bypass the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The pages that no range of `needed` touches, as ranges of a few MiB; none for a slab without hashes, where
    /// there is nothing to compare them with.
    #[must_use]
    pub fn pages_outside(&self, needed: &[Range<u64>]) -> Vec<Range<u64>> {
        if !self.from_manifest {
            return Vec::new();
        }
        let mut outside = Vec::new();
        let mut at = 0;
        let pieces = page_pieces(needed, self.page_bytes, self.file_bytes);
        for next in pieces.iter().map(|p| p.range.clone()).chain(std::iter::once(self.file_bytes..self.file_bytes)) {
            while at < next.start {
                let end = (at + READ_BYTES_MAX.max(self.page_bytes)).min(next.start);
                outside.push(at..end);
                at = end;
            }
            at = next.end;
        }
        outside
    }

    fn check_page(&self, index: usize, bytes: &[u8]) -> Result<()> {
        let found = xxhash_rust::xxh3::xxh3_64(bytes);
        let known = &self.pages[index];
        // Relaxed: the word is the whole message; whoever stores it first wins, and all later readers compare with that.
        let expected = if self.from_manifest {
            known.load(Ordering::Relaxed)
        } else {
            // Relaxed, as above. A page whose hash is 0 is compared as if it were 1.
            match known.compare_exchange(0, found.max(1), Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(seen) => seen,
            }
        };
        if expected == found || (!self.from_manifest && found == 0 && expected == 1) {
            return Ok(());
        }
        let what = if self.from_manifest {
            "the slab is corrupt: a page does not have the checksum in the manifest"
        } else {
            "the slab changed while it was in use"
        };
        Err(Error::data(what)
            .at(&self.path)
            .offset(index as u64 * self.page_bytes)
            .expected(format!("xxh3 {expected:016x}"))
            .found(format!("xxh3 {found:016x}"))
            .advice("run 'serenity-slab verify' for the tensor that it is in, then build the slab again"))
    }
}

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

enum Engine {
    Uring(Box<uring::Uring>),
    Threads,
}

/// A reader of one slab for one thread.
pub struct Reader {
    slab: Arc<SlabFile>,
    engine: Engine,
}

impl Reader {
    /// A reader with io_uring, or with pread threads where the kernel refuses it (said once in the log).
    #[must_use]
    pub fn new(slab: Arc<SlabFile>) -> Self {
        static SAID: std::sync::Once = std::sync::Once::new();
        let refused = faults::refuses("io_uring").then(|| std::io::Error::from(std::io::ErrorKind::PermissionDenied));
        let engine = match refused.map_or_else(uring::Uring::new, Err) {
            Ok(ring) => Engine::Uring(Box::new(ring)),
            Err(e) => {
                SAID.call_once(|| tracing::warn!("io_uring is not available ({e}); reading with threads instead"));
                Engine::Threads
            }
        };
        Self { slab, engine }
    }

    /// A reader that does not try io_uring.
    #[must_use]
    pub fn with_threads(slab: Arc<SlabFile>) -> Self {
        Self { slab, engine: Engine::Threads }
    }

    /// Reads `ranges` (in any order, overlaps allowed) into `into` and checks every page touched.
    ///
    /// # Errors
    /// [`Error::Data`] for an I/O error, a file that became shorter, or a page whose checksum is wrong, with path and offset.
    pub fn fetch(&mut self, ranges: &[Range<u64>], into: &mut Fetched) -> Result<()> {
        let slab = &self.slab;
        into.pieces = page_pieces(ranges, slab.page_bytes, slab.file_bytes);
        let bytes = into.pieces.last().map_or(0, |p| p.at + aligned_len(&p.range));
        let buffer = into.buffer.resize(bytes);
        let ops = read_ops(&into.pieces, slab.page_bytes);
        {
            let _span = tracing::trace_span!("read", bytes).entered();
            faults::delay_read();
            match &mut self.engine {
                Engine::Uring(ring) => ring.read(&slab.file, slab.file_bytes, &ops, buffer),
                Engine::Threads => threads::read(&slab.file, slab.file_bytes, &ops, buffer),
            }
            .map_err(|(offset, e)| Error::io("cannot read the slab", &slab.path, e).offset(offset))?;
        }
        let wanted: u64 = into.pieces.iter().map(|p| p.range.end - p.range.start).sum();
        // Relaxed: a statistic.
        slab.read_bytes.fetch_add(wanted, Ordering::Relaxed);
        let _span = tracing::trace_span!("check").entered();
        for piece in &into.pieces {
            let mut at = piece.at;
            let mut offset = piece.range.start;
            while offset < piece.range.end {
                let len = slab.page_bytes.min(piece.range.end - offset) as usize;
                slab.check_page((offset / slab.page_bytes) as usize, &into.buffer.bytes()[at..at + len])?;
                at += len;
                offset += len as u64;
            }
        }
        Ok(())
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

fn read_ops(pieces: &[Piece], page_bytes: u64) -> Vec<ReadOp> {
    let step = READ_BYTES_MAX.max(page_bytes);
    let mut ops = Vec::new();
    for piece in pieces {
        let mut offset = piece.range.start;
        while offset < piece.range.end {
            let end = (offset + step).min(piece.range.end);
            let len = ((end - offset) as usize).next_multiple_of(ALIGN);
            ops.push(ReadOp { offset, into: piece.at + (offset - piece.range.start) as usize, len });
            offset = end;
        }
    }
    ops
}

/// Bytes that a read must bring: all of it, or what the file still has.
fn expected_len(op: &ReadOp, file_bytes: u64) -> usize {
    op.len.min(file_bytes.saturating_sub(op.offset) as usize)
}

#[cfg(test)]
mod tests;
