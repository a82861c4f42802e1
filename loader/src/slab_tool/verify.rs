//! Proves a slab intact, or says which tensor of which file is not, and where.
//!
//! One sequential pass: a thread reads regions of whole pages, the rayon pool hashes the pages of a region while one thread goes on with
//! the running hash of the tensor. A page hash pins a flaw to a page, a tensor hash to a tensor; their intersection is what is
//! reported. Slabs without our additions have no hashes: for them the structural gates, the scales and the codes' range (-128 is never
//! written) are all that can be checked, and the report says so.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;

use rayon::prelude::*;
use safetensors::Dtype;
use serde::Serialize;
use serenity_protocol::process::Process;
use serenity_protocol::slab::Slab;
use serenity_protocol::slab::header::{Header, TensorEntry};
use serenity_protocol::slab::manifest::Hash;
use serenity_protocol::{Error, Result};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::build::PAGE_BYTES;
use super::progress::{Progress, joined};

/// Bytes read at once.
const REGION_BYTES: u64 = 16 << 20;
/// Flaws listed in the message; all are counted.
const FLAWS_SHOWN_MAX: usize = 20;

/// One flaw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Flaw {
    /// File.
    pub file: PathBuf,
    /// Tensor; `None` for the header, or where no single tensor is to blame.
    pub tensor: Option<String>,
    /// First byte of the page or tensor that is wrong.
    pub offset: u64,
    /// What.
    pub what: String,
}

/// The outcome.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Bytes read, companion included.
    pub bytes: u64,
    /// Pages compared with their hashes; 0 for a slab without our additions.
    pub pages: usize,
    /// Tensors compared with their hashes, companion included.
    pub tensors: usize,
    /// Whether the slab carries checksums at all.
    pub has_checksums: bool,
    /// What is wrong; empty for an intact slab.
    pub flaws: Vec<Flaw>,
}

impl VerifyReport {
    /// The report as a result.
    ///
    /// # Errors
    /// [`Error::Data`] naming every flaw's file, tensor and offset.
    pub fn into_result(self) -> Result<Self> {
        let Some(first) = self.flaws.first() else { return Ok(self) };
        let mut text: String = self
            .flaws
            .iter()
            .take(FLAWS_SHOWN_MAX)
            .map(|f| {
                format!("\n    - {}, offset {}, {}: {}", f.file.display(), f.offset, f.tensor.as_deref().unwrap_or("no tensor"), f.what)
            })
            .collect();
        if self.flaws.len() > FLAWS_SHOWN_MAX {
            text.push_str(&format!("\n    - and {} more", self.flaws.len() - FLAWS_SHOWN_MAX));
        }
        let what = format!("the slab is corrupt in {} place(s):{text}", self.flaws.len());
        Err(Error::data(what).at(&first.file).offset(first.offset).advice("build the slab again, or copy it again from where it is intact"))
    }
}

/// Reads everything and compares.
///
/// # Errors
/// Where a file cannot be read or the slab does not open. Flaws of the content are in the report.
pub fn verify(slab: &Slab, process: &Process) -> Result<VerifyReport> {
    let additions = slab.manifest().serenity.as_ref();
    let companion = additions.and_then(|a| a.companion.as_ref());
    let mut progress = Progress::new(process, "verify", slab.file_bytes() + companion.map_or(0, |c| c.bytes));
    let pages = additions.map(|a| PageHashes { page_bytes: a.page_bytes, hashes: &a.page_xxh3 });
    let none = std::collections::BTreeMap::new();
    let tensor_hashes = additions.map_or(&none, |a| &a.tensor_xxh3);
    let codes_only = slab.layers().iter().map(|l| l.qweight.start).collect();
    let pass = Pass { path: slab.path(), header: slab.header(), pages, tensor_hashes, codes: codes_only };
    let (mut flaws, _) = pass.run(&mut progress)?;
    if additions.is_some() {
        for tensor in slab.header().tensors().iter().filter(|t| !tensor_hashes.contains_key(&t.name)) {
            flaws.push(pass.flaw(Some(tensor), tensor.range.start, "the manifest has no checksum of it".into()));
        }
    }
    let mut report = VerifyReport {
        bytes: slab.file_bytes(),
        pages: additions.map_or(0, |a| a.page_xxh3.len()),
        tensors: tensor_hashes.len(),
        has_checksums: additions.is_some(),
        flaws,
    };
    if let (Some(companion), Some(path)) = (companion, slab.companion()) {
        verify_companion(path, companion, &mut report, &mut progress)?;
    }
    Ok(report)
}

fn verify_companion(
    path: &Path,
    companion: &serenity_protocol::slab::manifest::Companion,
    report: &mut VerifyReport,
    progress: &mut Progress,
) -> Result<()> {
    let header = Header::read(path)?;
    let pass = Pass { path, header: &header, pages: None, tensor_hashes: &companion.tensor_xxh3, codes: Vec::new() };
    let (flaws, whole) = pass.run(progress)?;
    let silent = flaws.is_empty();
    report.flaws.extend(flaws);
    let missing = companion.tensor_xxh3.keys().filter(|name| header.tensor(name).is_none());
    report.flaws.extend(missing.map(|name| Flaw {
        file: path.to_path_buf(),
        tensor: Some(name.clone()),
        offset: 8,
        what: "it is missing from the file".into(),
    }));
    if silent && (Hash(whole) != companion.xxh3 || header.file_bytes != companion.bytes) {
        let what =
            format!("the file's hash is {whole:016x}, the manifest says {}: its header differs, or it is of another build", companion.xxh3);
        report.flaws.push(pass.flaw(None, 0, what));
    }
    report.bytes += header.file_bytes;
    report.tensors += companion.tensor_xxh3.len();
    Ok(())
}

struct PageHashes<'a> {
    page_bytes: u64,
    hashes: &'a [Hash],
}

/// One pass over one file.
struct Pass<'a> {
    path: &'a Path,
    header: &'a Header,
    pages: Option<PageHashes<'a>>,
    tensor_hashes: &'a std::collections::BTreeMap<String, Hash>,
    /// Offsets of the tensors that hold codes, sorted or not.
    codes: Vec<u64>,
}

impl Pass<'_> {
    fn flaw(&self, tensor: Option<&TensorEntry>, offset: u64, what: String) -> Flaw {
        Flaw { file: self.path.to_path_buf(), tensor: tensor.map(|t| t.name.clone()), offset, what }
    }

    /// The flaws, and the hash of the whole file.
    fn run(&self, progress: &mut Progress) -> Result<(Vec<Flaw>, u64)> {
        let page_bytes = self.pages.as_ref().map_or(PAGE_BYTES, |p| p.page_bytes);
        // Regions are whole pages.
        let region = REGION_BYTES.max(page_bytes);
        let file = File::open(self.path).map_err(|e| Error::io("cannot open the file", self.path, e))?;
        let end = self.header.file_bytes;
        std::thread::scope(|scope| {
            let (out, regions) = sync_channel::<(u64, Vec<u8>)>(2);
            let reader = scope.spawn(move || -> Result<()> {
                let mut start = 0;
                while start < end {
                    let mut bytes = vec![0; region.min(end - start) as usize];
                    let _span = tracing::trace_span!("read").entered();
                    file.read_exact_at(&mut bytes, start).map_err(|e| Error::io("cannot read the file", self.path, e).offset(start))?;
                    let length = std::num::NonZeroU64::new(bytes.len() as u64);
                    // Not needed again; failure costs nothing.
                    let _ = rustix::fs::fadvise(&file, start, length, rustix::fs::Advice::DontNeed);
                    if out.send((start, bytes)).is_err() {
                        break;
                    }
                    start += region;
                }
                Ok(())
            });
            let mut state = State { tensor: Xxh3::new(), whole: Xxh3::new(), bad_pages: Vec::new(), flaws: Vec::new() };
            let mut stopped = Ok(());
            for (start, bytes) in &regions {
                self.check_region(start, &bytes, page_bytes, &mut state);
                stopped = progress.add(bytes.len() as u64);
                if stopped.is_err() {
                    break;
                }
            }
            drop(regions);
            joined(reader.join())?;
            stopped?;
            self.blame_pages(page_bytes, &mut state);
            state.flaws.sort_by_key(|f| f.offset);
            Ok((state.flaws, state.whole.digest()))
        })
    }

    fn check_region(&self, start: u64, bytes: &[u8], page_bytes: u64, state: &mut State) {
        let State { tensor, whole, bad_pages, flaws } = state;
        let pages = || match &self.pages {
            None => Vec::new(),
            Some(pages) => bytes
                .par_chunks(page_bytes as usize)
                .enumerate()
                .map(|(i, page)| (start / page_bytes + i as u64, xxh3_64(page)))
                .filter(|(index, found)| pages.hashes.get(*index as usize).is_none_or(|h| h.0 != *found))
                .map(|(index, _)| index)
                .collect(),
        };
        let tensors = || self.follow_tensors(start, bytes, tensor, flaws);
        let whole = || {
            // A slab's pages cover the whole file already.
            if self.pages.is_none() {
                whole.update(bytes);
            }
        };
        let (bad, _) = rayon::join(pages, || rayon::join(tensors, whole));
        bad_pages.extend(bad);
    }

    /// Goes on with the running tensor hash, and looks at codes.
    fn follow_tensors(&self, start: u64, bytes: &[u8], hash: &mut Xxh3, flaws: &mut Vec<Flaw>) {
        let end = start + bytes.len() as u64;
        let first = self.header.tensors().partition_point(|t| t.range.end <= start);
        for tensor in self.header.tensors().iter().skip(first).take_while(|t| t.range.start < end) {
            let from = tensor.range.start.max(start);
            let part = bytes.get((from - start) as usize..(tensor.range.end.min(end) - start) as usize).unwrap_or_default();
            if tensor.dtype == Dtype::I8
                && self.codes.contains(&tensor.range.start)
                && let Some(at) = part.iter().position(|&b| b == 0x80)
            {
                flaws.push(self.flaw(Some(tensor), from + at as u64, "a code is -128, which no builder writes".into()));
            }
            let Some(expected) = self.tensor_hashes.get(&tensor.name) else { continue };
            hash.update(part);
            if tensor.range.end <= end {
                let found = hash.digest();
                hash.reset();
                if found != expected.0 {
                    let what = format!("its checksum is {found:016x}, the manifest says {expected}");
                    flaws.push(self.flaw(Some(tensor), tensor.range.start, what));
                }
            }
        }
    }

    /// Gives every bad page to the bad tensors in it, so that the offset is as near as the hashes allow.
    fn blame_pages(&self, page_bytes: u64, state: &mut State) {
        for &page in &state.bad_pages {
            let range: Range<u64> = page * page_bytes..((page + 1) * page_bytes).min(self.header.file_bytes);
            let mut blamed = false;
            for flaw in &mut state.flaws {
                let Some(tensor) = flaw.tensor.as_deref().and_then(|name| self.header.tensor(name)) else { continue };
                if tensor.range.start < range.end && range.start < tensor.range.end {
                    blamed = true;
                    flaw.offset = if flaw.what.contains("within bytes") { flaw.offset } else { tensor.range.start.max(range.start) };
                    if !flaw.what.contains("within bytes") {
                        let end = tensor.range.end.min(range.end);
                        flaw.what.push_str(&format!(" (within bytes {} to {end})", flaw.offset));
                    }
                }
            }
            if !blamed {
                let what = format!("page {page} (bytes {} to {}) differs from the manifest's checksum", range.start, range.end);
                let tensor = self.header.tensor_at(range.start).cloned();
                state.flaws.push(self.flaw(tensor.as_ref(), range.start, what));
            }
        }
    }
}

struct State {
    tensor: Xxh3,
    whole: Xxh3,
    bad_pages: Vec<u64>,
    flaws: Vec<Flaw>,
}
