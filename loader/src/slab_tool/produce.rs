//! Writes planned safetensors files whose every byte can be drawn by itself, on all cores.
//!
//! Threads take units (the module `units`), draw their bytes, hash them while they are in the core's cache and write them in place. The page
//! that ends a unit reaches into the next one: both draw those bytes, the one that owns the page writes it. So all writes are whole
//! pages (past the page cache where the file system can), no thread waits for another, and the bytes are the same with any number
//! of threads.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use serenity_protocol::checksum::Xxh3;
use serenity_protocol::slab::manifest::Hash;
use serenity_protocol::{Error, Result};

use super::plan::FilePlan;
use super::progress::Progress;
use super::units::{Division, Done, Unit, divide, on_threads};
use super::writer::FileHashes;
use crate::reader::{ALIGN, AlignedBuffer};

/// Fills the slice with a tensor's bytes: index of the tensor in the plan, first byte in the tensor.
pub type Draw<'a> = dyn Fn(usize, u64, &mut [u8]) -> Result<()> + Sync + 'a;

/// What is to be known of a file once it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hashing {
    /// Nothing.
    None,
    /// Hashes of its pages and tensors.
    Parts,
    /// Those and the hash of the whole; such a file is one thread's work.
    Whole,
}

/// One file.
pub struct Product<'a> {
    /// What is where.
    pub plan: &'a FilePlan,
    /// Its name until it is published.
    pub temp: &'a Path,
    /// Page size of the hashes, a multiple of [`ALIGN`].
    pub page_bytes: u64,
    /// Hashes wanted.
    pub hashing: Hashing,
    /// Its content.
    pub draw: &'a Draw<'a>,
}

/// Writes and syncs the files under their temporary names; their hashes in the same order.
///
/// # Errors
/// [`Error::TryAgain`] for a full disk or an interruption.
pub fn produce(products: &[Product], division: Division, progress: &mut Progress) -> Result<Vec<FileHashes>> {
    let mut work: Vec<(usize, Unit)> = Vec::new();
    for (index, product) in products.iter().enumerate() {
        let file = File::create(product.temp).map_err(|e| Error::io("cannot create the file", product.temp, e))?;
        file.set_len(product.plan.file_bytes).map_err(|e| Error::io("cannot create the file", product.temp, e))?;
        let tensors: Vec<_> = product.plan.tensors.iter().map(|t| t.offset..t.offset + t.bytes).collect();
        let unit_bytes = if product.hashing == Hashing::Whole { u64::MAX } else { division.unit_bytes };
        let units = divide(&tensors, product.plan.file_bytes, product.page_bytes, unit_bytes);
        work.extend(units.into_iter().map(|unit| (index, unit)));
    }
    work.sort_by_key(|(_, unit)| std::cmp::Reverse(unit.bytes.end - unit.bytes.start));
    let parts = on_threads(work, division.workers, progress, Thread::default, |thread, (index, unit), done| {
        let product = products.get(index).ok_or_else(|| Error::invariant("a unit of no file"))?;
        thread.work(index, product, &unit, division.piece_bytes, done)
    })?;
    products.iter().enumerate().map(|(index, product)| finish(product, parts.iter().filter(|p| p.product == index))).collect()
}

/// Makes the file survive a power cut, and puts its hashes in order.
fn finish<'p>(product: &Product, parts: impl Iterator<Item = &'p Part>) -> Result<FileHashes> {
    let synced = File::open(product.temp).and_then(|file| file.sync_all());
    synced.map_err(|e| Error::io("cannot sync the file", product.temp, e))?;
    let mut parts: Vec<&Part> = parts.collect();
    parts.sort_by_key(|p| p.start);
    Ok(FileHashes {
        pages: parts.iter().flat_map(|p| p.pages.iter().copied()).collect(),
        tensors: parts.iter().flat_map(|p| p.tensors.iter().copied()).collect(),
        whole: parts.iter().find_map(|p| p.whole),
    })
}

/// The hashes of a unit.
struct Part {
    product: usize,
    start: u64,
    pages: Vec<Hash>,
    tensors: Vec<Hash>,
    whole: Option<Hash>,
}

/// A thread's memory and its open file.
#[derive(Default)]
struct Thread {
    buffer: AlignedBuffer,
    open: Option<(usize, Output)>,
}

impl Thread {
    fn work(&mut self, index: usize, product: &Product, unit: &Unit, piece_bytes: u64, done: &mut Done) -> Result<Part> {
        if self.open.as_ref().is_none_or(|(of, _)| *of != index) {
            self.open = Some((index, Output::open(product.temp)?));
        }
        let Some((_, output)) = &mut self.open else { return Err(Error::invariant("an open file is gone")) };
        let mut state = State::new(product, unit);
        for piece in Unit::pieces(unit.all(), piece_bytes) {
            // The buffer starts where direct writes may.
            let base = piece.start / ALIGN as u64 * ALIGN as u64;
            let buffer = self.buffer.resize((piece.end - base) as usize);
            let bytes = buffer.get_mut((piece.start - base) as usize..(piece.end - base) as usize).unwrap_or_default();
            state.fill(piece.start, bytes)?;
            state.hash(piece.start, bytes);
            let from = unit.pages.start.max(piece.start);
            if from < piece.end {
                let whole_pages = buffer.get((from - base) as usize..(piece.end - base) as usize).unwrap_or_default();
                output.write(whole_pages, from).map_err(|e| Error::io("cannot write the file", product.temp, e).offset(from))?;
            }
            done(piece.end.min(unit.bytes.end).saturating_sub(piece.start))?;
        }
        Ok(state.into_part(index))
    }
}

/// A file that is written in place.
struct Output {
    direct: Option<File>,
    cached: File,
}

impl Output {
    fn open(path: &Path) -> Result<Self> {
        let cached = File::options().write(true).open(path).map_err(|e| Error::io("cannot open the file", path, e))?;
        // None where the file system has no direct writes.
        let direct = File::options().write(true).custom_flags(nix::libc::O_DIRECT).open(path).ok();
        Ok(Self { direct, cached })
    }

    /// Writes at `offset`, a multiple of [`ALIGN`]; the file's tail, which is none, goes through the page cache.
    fn write(&mut self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        let _span = tracing::trace_span!("write").entered();
        let (whole, tail) = bytes.split_at(bytes.len() / ALIGN * ALIGN);
        let direct = self.direct.as_ref().map(|file| file.write_all_at(whole, offset));
        match direct {
            Some(Ok(())) => {}
            // Some stacked file systems accept the flag and refuse the write.
            Some(Err(e)) if e.raw_os_error() != Some(nix::libc::EINVAL) => return Err(e),
            _ => {
                self.direct = None;
                self.cached.write_all_at(whole, offset)?;
            }
        }
        self.cached.write_all_at(tail, offset + whole.len() as u64)
    }
}

/// The running hashes of a unit.
struct State<'a> {
    product: &'a Product<'a>,
    unit: &'a Unit,
    /// Index of the tensor that is being hashed.
    at_tensor: usize,
    page: Xxh3,
    tensor: Xxh3,
    whole: Xxh3,
    pages: Vec<Hash>,
    tensors: Vec<Hash>,
}

impl<'a> State<'a> {
    fn new(product: &'a Product<'a>, unit: &'a Unit) -> Self {
        let (page, tensor, whole) = (Xxh3::new(), Xxh3::new(), Xxh3::new());
        Self { product, unit, at_tensor: unit.tensors.start, page, tensor, whole, pages: Vec::new(), tensors: Vec::new() }
    }

    /// Draws the file's bytes from `start` on.
    fn fill(&self, start: u64, mut bytes: &mut [u8]) -> Result<()> {
        let _span = tracing::trace_span!("draw").entered();
        let plan = self.product.plan;
        let mut at = start;
        let header = plan.header.get((at as usize).min(plan.header.len())..).unwrap_or_default();
        let (head, rest) = bytes.split_at_mut(header.len().min(bytes.len()));
        head.copy_from_slice(header.get(..head.len()).unwrap_or_default());
        at += head.len() as u64;
        bytes = rest;
        let mut index = plan.tensors.partition_point(|t| t.offset + t.bytes <= at);
        while !bytes.is_empty() {
            let tensor = plan.tensors.get(index).ok_or_else(|| Error::invariant("more was drawn than planned").offset(at))?;
            let left = (tensor.offset + tensor.bytes).saturating_sub(at);
            let (now, rest) = bytes.split_at_mut((left as usize).min(bytes.len()));
            if !now.is_empty() {
                (self.product.draw)(index, at - tensor.offset, now)?;
            }
            at += now.len() as u64;
            bytes = rest;
            index += 1;
        }
        Ok(())
    }

    fn hash(&mut self, start: u64, bytes: &[u8]) {
        if self.product.hashing == Hashing::None {
            return;
        }
        self.hash_pages(start, bytes);
        self.hash_tensors(start, bytes);
        if self.product.hashing == Hashing::Whole {
            self.whole.update(bytes);
        }
    }

    fn hash_pages(&mut self, start: u64, bytes: &[u8]) {
        let end = start + bytes.len() as u64;
        for part in Unit::pieces(self.unit.pages.start.max(start)..self.unit.pages.end.min(end), self.product.page_bytes) {
            self.page.update(bytes.get((part.start - start) as usize..(part.end - start) as usize).unwrap_or_default());
            if part.end.is_multiple_of(self.product.page_bytes) || part.end == self.unit.pages.end {
                self.pages.push(Hash(self.page.digest()));
                self.page.reset();
            }
        }
    }

    fn hash_tensors(&mut self, start: u64, bytes: &[u8]) {
        let end = start + bytes.len() as u64;
        while let Some(tensor) = self.product.plan.tensors.get(self.at_tensor).filter(|_| self.at_tensor < self.unit.tensors.end) {
            let tensor_end = tensor.offset + tensor.bytes;
            let (from, to) = (tensor.offset.max(start), tensor_end.min(end));
            self.tensor.update(bytes.get((from - start) as usize..to.max(from).saturating_sub(start) as usize).unwrap_or_default());
            if tensor_end > end {
                break;
            }
            self.tensors.push(Hash(self.tensor.digest()));
            self.tensor.reset();
            self.at_tensor += 1;
        }
    }

    fn into_part(self, product: usize) -> Part {
        let whole = (self.product.hashing == Hashing::Whole).then(|| Hash(self.whole.digest()));
        Part { product, start: self.unit.bytes.start, pages: self.pages, tensors: self.tensors, whole }
    }
}
