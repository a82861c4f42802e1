//! Writes a planned safetensors file front to back, hashing as it goes: each page, each tensor, the whole.
//!
//! Bytes collect in one aligned buffer that is written past the page cache (O_DIRECT) in large pieces, so that a 30 GB slab does not
//! push everything else out of memory; file systems without direct writes get the same pieces through the cache. The file is built
//! under a temporary name and appears by a rename after fsync. [`FileWriter::resume`] takes up a file whose first `position` bytes are
//! known to be on the disk.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serenity_protocol::checksum::Xxh3;
use serenity_protocol::slab::manifest::Hash;
use serenity_protocol::{Error, Result, atomic_file};

use super::plan::FilePlan;
use crate::reader::{ALIGN, AlignedBuffer};

/// Bytes collected before they are written.
const BUFFER_BYTES: usize = 16 << 20;

/// Hashes of a finished file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileHashes {
    /// One for each page.
    pub pages: Vec<Hash>,
    /// Each tensor's, by its index in the plan.
    pub tensors: Vec<Hash>,
    /// The whole file's, if it was asked for.
    pub whole: Option<Hash>,
}

/// Writes one planned file.
pub struct FileWriter<'p> {
    plan: &'p FilePlan,
    temp: PathBuf,
    file: File,
    /// The same file through the page cache, for a tail that is no multiple of [`ALIGN`].
    cached: File,
    buffer: AlignedBuffer,
    /// Bytes in the buffer.
    filled: usize,
    /// File offset of the buffer's start, a multiple of [`ALIGN`].
    flushed: u64,
    page_bytes: u64,
    page: Xxh3,
    tensor: Xxh3,
    /// Index of the tensor that the next byte belongs to; tensors of no bytes are passed over.
    at_tensor: usize,
    whole: Option<Xxh3>,
    hashes: FileHashes,
}

impl<'p> FileWriter<'p> {
    /// Creates `temp` and writes the header.
    ///
    /// # Errors
    /// [`Error::TryAgain`] on a full disk.
    pub fn create(plan: &'p FilePlan, temp: &Path, page_bytes: u64) -> Result<Self> {
        Self::start(Self::open(plan, temp, page_bytes, true)?)
    }

    /// As [`Self::create`], and hashes the whole file too.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_hashed(plan: &'p FilePlan, temp: &Path, page_bytes: u64) -> Result<Self> {
        let mut this = Self::open(plan, temp, page_bytes, true)?;
        this.whole = Some(Xxh3::new());
        Self::start(this)
    }

    fn start(mut this: Self) -> Result<Self> {
        this.append(&this.plan.header)?;
        this.skip_empty_tensors();
        Ok(this)
    }

    /// Takes up `temp`, whose tensors before `at_tensor` are on the disk with the given hashes. The tensor must start on a multiple of [`ALIGN`].
    ///
    /// # Errors
    /// [`Error::Data`] if the file is shorter than that.
    pub fn resume(
        plan: &'p FilePlan,
        temp: &Path,
        page_bytes: u64,
        at_tensor: usize,
        pages: Vec<Hash>,
        tensors: Vec<Hash>,
    ) -> Result<Self> {
        let mut this = Self::open(plan, temp, page_bytes, false)?;
        let position = plan.tensors.get(at_tensor).map_or(plan.file_bytes, |t| t.offset);
        if !position.is_multiple_of(ALIGN as u64) || pages.len() as u64 != position / page_bytes || tensors.len() != at_tensor {
            return Err(Error::invariant("a build cannot be taken up at this place").offset(position));
        }
        // The page that the position lies in is hashed again from the disk.
        let page_start = position / page_bytes * page_bytes;
        let mut head = vec![0; (position - page_start) as usize];
        this.cached.read_exact_at(&mut head, page_start).map_err(|e| Error::io("cannot read the unfinished file", temp, e))?;
        this.page.update(&head);
        this.flushed = position;
        this.at_tensor = at_tensor;
        this.hashes = FileHashes { pages, tensors, whole: None };
        Ok(this)
    }

    fn open(plan: &'p FilePlan, temp: &Path, page_bytes: u64, truncate: bool) -> Result<Self> {
        let io = |e| Error::io("cannot create the file", temp, e);
        let cached = File::options().read(true).write(true).create(true).truncate(truncate).open(temp).map_err(io)?;
        let direct = File::options().write(true).custom_flags(nix::libc::O_DIRECT).open(temp);
        let file = match direct {
            Ok(file) => file,
            // The file system has no direct writes.
            Err(_) => cached.try_clone().map_err(io)?,
        };
        Ok(Self {
            plan,
            temp: temp.to_path_buf(),
            file,
            cached,
            buffer: AlignedBuffer::default(),
            filled: 0,
            flushed: 0,
            page_bytes,
            page: Xxh3::new(),
            tensor: Xxh3::new(),
            at_tensor: 0,
            whole: None,
            hashes: FileHashes { pages: Vec::new(), tensors: Vec::new(), whole: None },
        })
    }

    /// Offset of the next byte.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.flushed + self.filled as u64
    }

    /// Index of the tensor that the next byte belongs to.
    #[must_use]
    pub fn at_tensor(&self) -> usize {
        self.at_tensor
    }

    /// Hashes of the pages and tensors finished so far.
    #[must_use]
    pub fn hashes(&self) -> &FileHashes {
        &self.hashes
    }

    /// Appends tensor bytes; they may span tensors.
    ///
    /// # Errors
    /// [`Error::TryAgain`] on a full disk, [`Error::Invariant`] beyond the end of the plan.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let Some(tensor) = self.plan.tensors.get(self.at_tensor) else {
                return Err(Error::invariant("more was written than planned").at(&self.temp).offset(self.position()));
            };
            let left = tensor.offset + tensor.bytes - self.position();
            let (now, rest) = bytes.split_at((left as usize).min(bytes.len()));
            self.tensor.update(now);
            self.append(now)?;
            if now.len() as u64 == left {
                self.end_tensor();
            }
            bytes = rest;
        }
        Ok(())
    }

    /// Appends `count` zero bytes.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_zeros(&mut self, mut count: u64) -> Result<()> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while count > 0 {
            let now = count.min(ZEROS.len() as u64);
            self.write(&ZEROS[..now as usize])?;
            count -= now;
        }
        Ok(())
    }

    fn end_tensor(&mut self) {
        self.hashes.tensors.push(Hash(self.tensor.digest()));
        self.tensor.reset();
        self.at_tensor += 1;
        self.skip_empty_tensors();
    }

    fn skip_empty_tensors(&mut self) {
        while self.plan.tensors.get(self.at_tensor).is_some_and(|t| t.bytes == 0) {
            self.hashes.tensors.push(Hash(Xxh3::new().digest()));
            self.at_tensor += 1;
        }
    }

    /// Appends to the buffer and the page hashes.
    fn append(&mut self, mut bytes: &[u8]) -> Result<()> {
        if let Some(whole) = &mut self.whole {
            whole.update(bytes);
        }
        while !bytes.is_empty() {
            let page_left = self.page_bytes - self.position() % self.page_bytes;
            let room = (BUFFER_BYTES - self.filled).min(page_left as usize);
            let (now, rest) = bytes.split_at(room.min(bytes.len()));
            self.page.update(now);
            let start = self.filled;
            if let Some(into) = self.buffer.resize(BUFFER_BYTES).get_mut(start..start + now.len()) {
                into.copy_from_slice(now);
            }
            self.filled += now.len();
            if self.position().is_multiple_of(self.page_bytes) {
                self.hashes.pages.push(Hash(self.page.digest()));
                self.page.reset();
            }
            if self.filled == BUFFER_BYTES {
                self.flush()?;
            }
            bytes = rest;
        }
        Ok(())
    }

    /// Writes the buffer's whole multiples of [`ALIGN`], and keeps the rest.
    fn flush(&mut self) -> Result<()> {
        let whole = self.filled / ALIGN * ALIGN;
        let _span = tracing::trace_span!("write").entered();
        let bytes = self.buffer.bytes().get(..whole).unwrap_or_default();
        let mut written = self.file.write_all_at(bytes, self.flushed);
        if written.as_ref().is_err_and(|e| e.raw_os_error() == Some(nix::libc::EINVAL)) {
            // Some stacked file systems accept the flag and refuse the write.
            written = self.cached.write_all_at(bytes, self.flushed);
        }
        written.map_err(|e| Error::io("cannot write the file", &self.temp, e))?;
        let rest = self.filled;
        self.buffer.resize(BUFFER_BYTES).copy_within(whole..rest, 0);
        self.filled -= whole;
        self.flushed += whole as u64;
        Ok(())
    }

    /// Makes everything written so far survive a power cut. Only at a multiple of [`ALIGN`].
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn sync(&mut self) -> Result<()> {
        self.flush()?;
        if self.filled != 0 {
            return Err(Error::invariant("an unfinished file was synced off a page border").offset(self.position()));
        }
        self.file.sync_data().map_err(|e| Error::io("cannot sync the file", &self.temp, e))
    }

    /// Writes the tail, syncs. The file keeps its temporary name.
    ///
    /// # Errors
    /// [`Error::Invariant`] if bytes are missing; as [`Self::write`] otherwise.
    pub fn finish(mut self) -> Result<FileHashes> {
        if self.position() != self.plan.file_bytes {
            return Err(Error::invariant("less was written than planned").expected(self.plan.file_bytes).found(self.position()));
        }
        if !self.position().is_multiple_of(self.page_bytes) {
            self.hashes.pages.push(Hash(self.page.digest()));
        }
        self.flush()?;
        let io = |e| Error::io("cannot write the file", &self.temp, e);
        let tail = self.buffer.bytes().get(..self.filled).unwrap_or_default();
        self.cached.write_all_at(tail, self.flushed).map_err(io)?;
        // A resumed file may have been longer.
        self.cached.set_len(self.plan.file_bytes).map_err(io)?;
        self.cached.sync_all().map_err(io)?;
        self.hashes.whole = self.whole.as_ref().map(|h| Hash(h.digest()));
        Ok(self.hashes)
    }
}

/// Gives a finished file its name.
///
/// # Errors
/// The operating system's.
pub fn publish(temp: &Path, path: &Path) -> Result<()> {
    atomic_file::commit(temp, path).map_err(|e| Error::io("cannot name the finished file", path, e))
}

/// Refuses to start what would fill the file system of `folder`.
///
/// # Errors
/// [`Error::TryAgain`] naming both sizes.
pub fn check_free_space(folder: &Path, needed: u64) -> Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let stat = rustix::fs::statvfs(folder).map_err(|e| Error::io("cannot ask for the free space", folder, e.into()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < needed {
        return Err(Error::try_again("the disk has too little free space")
            .at(folder)
            .expected(format!("{needed} bytes ({:.1} GiB)", needed as f64 / f64::from(1 << 30)))
            .found(format!("{free} bytes free"))
            .advice("free some space, or choose another --output, and run the same command again"));
    }
    Ok(())
}
