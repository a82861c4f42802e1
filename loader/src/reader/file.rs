//! The slab's file: how it is opened, its pages' hashes, the pages that two chunks share.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serenity_protocol::slab::Slab;
use serenity_protocol::slab::pieces::PAGE_BYTES_DEFAULT;
use serenity_protocol::{Error, Result};

use super::uring::ReadOp;
use super::{ALIGN, READ_BYTES_MAX, page_pieces};
use crate::stages::{self, Stage, timed};

/// Pages kept because the next chunk needs their other part.
const KEPT_PAGES: usize = 24;

/// A checked page.
#[derive(Clone)]
pub(super) struct Kept {
    page: u64,
    pub(super) hash: u64,
    pub(super) bytes: Arc<[u8]>,
}

/// What every reader of a slab shares.
pub struct SlabFile {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) file_bytes: u64,
    pub(super) page_bytes: u64,
    /// Hash of each page from the manifest, or as first read (0 = not seen yet).
    pub(super) pages: Vec<AtomicU64>,
    pub(super) from_manifest: bool,
    pub(super) read_bytes: AtomicU64,
    pub(super) direct: bool,
    /// Pages of a disk that two chunks share; the latest last.
    pub(super) kept: Mutex<VecDeque<Kept>>,
}

impl SlabFile {
    /// Opens the slab's payload for direct reads; where the file system refuses (some memory file systems), through the page cache,
    /// said once in the log.
    ///
    /// # Errors
    /// [`Error::Absent`] if it cannot be opened.
    pub fn open(slab: &Slab) -> Result<Arc<Self>> {
        let path = slab.path();
        let (file, direct) = open_file(path)?;
        let (page_bytes, hashes) = match slab.pages() {
            Some(pages) => (pages.page_bytes, Some(&pages.xxh3)),
            None => {
                tracing::warn!(
                    "the slab's manifest carries no checksums: corruption that is on the disk already cannot be noticed ('serenity-slab build' makes a slab that has them)"
                );
                (PAGE_BYTES_DEFAULT, None)
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
            kept: Mutex::default(),
        }))
    }

    /// Bytes read from the file so far.
    #[must_use]
    pub fn read_bytes(&self) -> u64 {
        // Relaxed: a statistic.
        self.read_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn count(&self, bytes: u64) {
        // Relaxed: a statistic.
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        stages::add_read(bytes);
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

    /// Bytes of the file in page `page`; empty beyond the last.
    #[must_use]
    pub fn page_range(&self, page: u64) -> Range<u64> {
        let start = page.saturating_mul(self.page_bytes).min(self.file_bytes);
        start..start.saturating_add(self.page_bytes).min(self.file_bytes)
    }

    pub(super) fn op(&self, range: &Range<u64>) -> ReadOp {
        let expected = (range.end - range.start) as usize;
        ReadOp { offset: range.start, len: if self.direct { expected.next_multiple_of(ALIGN) } else { expected }, expected }
    }

    pub(super) fn failure(&self, (offset, error): (u64, std::io::Error)) -> Error {
        Error::io("cannot read the slab", &self.path, error).offset(offset)
    }

    /// Compares a page with its hash, and returns the hash.
    pub(super) fn check_page(&self, page: u64, bytes: &[u8]) -> Result<u64> {
        let found = timed(Stage::Check, || serenity_protocol::checksum::xxh3_64(bytes));
        let Some(known) = self.pages.get(page as usize) else {
            return Err(Error::invariant("a page beyond the end of the slab was asked for").at(&self.path).found(page));
        };
        // Relaxed: the word is the whole message; whoever stores it first wins, and all later readers compare with that.
        let expected = if self.from_manifest {
            known.load(Ordering::Relaxed)
        } else {
            // Relaxed, as above. A page whose hash is 0 is compared as if it were 1.
            match known.compare_exchange(0, found.max(1), Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(found),
                Err(seen) => seen,
            }
        };
        if expected == found || (!self.from_manifest && found == 0 && expected == 1) {
            return Ok(found);
        }
        let what = if self.from_manifest {
            "the slab is corrupt: a page does not have the checksum in the manifest"
        } else {
            "the slab changed while it was in use"
        };
        Err(Error::data(what)
            .at(&self.path)
            .offset(page * self.page_bytes)
            .expected(format!("xxh3 {expected:016x}"))
            .found(format!("xxh3 {found:016x}"))
            .advice("run 'serenity-slab verify' for the tensor that it is in, then build the slab again"))
    }

    pub(super) fn kept(&self, page: u64) -> Option<Kept> {
        let kept = self.kept.lock().ok()?;
        kept.iter().find(|k| k.page == page).cloned()
    }

    pub(super) fn keep(&self, page: u64, hash: u64, bytes: &[u8]) {
        // Without hashes only a second reading shows a change. Pages of a size that nobody uses would make this cache large.
        if !self.from_manifest || self.page_bytes > READ_BYTES_MAX {
            return;
        }
        let Ok(mut kept) = self.kept.lock() else { return };
        if kept.len() >= KEPT_PAGES {
            kept.pop_front();
        }
        kept.push_back(Kept { page, hash, bytes: bytes.into() });
    }
}

/// Opens the slab for direct reads; memory file systems and those that refuse, through the page cache.
fn open_file(path: &Path) -> Result<(File, bool)> {
    let plain = || File::open(path).map_err(|e| Error::io("cannot open the slab", path, e));
    let file = plain()?;
    // Newer kernels accept O_DIRECT there, and copy all the same.
    const MEMORY: [rustix::fs::FsWord; 3] = [0x0102_1994, 0x8584_58f6, 0x9584_58f6]; // tmpfs, ramfs, hugetlbfs
    if rustix::fs::fstatfs(&file).is_ok_and(|s| MEMORY.contains(&(s.f_type))) {
        return Ok((file, false));
    }
    match File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(path) {
        Ok(file) => Ok((file, true)),
        Err(e) if e.raw_os_error() == Some(nix::libc::EINVAL) => {
            tracing::info!("the slab's file system has no direct reads; reading through the page cache");
            Ok((plain()?, false))
        }
        Err(e) => Err(Error::io("cannot open the slab", path, e)),
    }
}
