//! Proves a slab intact, or says which tensor of which file is not, and where.
//!
//! Threads take runs of whole tensors, the largest first (the module `units`), and read them once, past the page cache, in pieces that stay in
//! a core's cache while three things are done with them: the hash of the page, the running hash of the tensor, and a look for codes
//! that no builder writes. A page hash pins a flaw to a page, a tensor hash to a tensor; their intersection is what is reported. The
//! companion has one hash over the whole file and is one thread's work. Slabs without our additions have no hashes: for them the
//! structural gates, the scales and the codes' range (-128 is never written) are all that can be checked, and the report says so.
//!
//! Memory: one piece for each thread.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use safetensors::Dtype;
use serde::Serialize;
use serenity_protocol::checksum::Xxh3;
use serenity_protocol::process::Process;
use serenity_protocol::slab::Slab;
use serenity_protocol::slab::header::{Header, TensorEntry};
use serenity_protocol::slab::manifest::{Companion, Hash};
use serenity_protocol::{Error, Result};

use super::direct::DirectFile;
use super::files::PAGE_BYTES;
use super::progress::Progress;
pub use super::units::Division;
use super::units::{Done, Unit, divide, on_threads};
use crate::reader::AlignedBuffer;

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

/// How fast every byte of slab and companion was read, once.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rate {
    /// Bytes of the files.
    pub bytes: u64,
    /// Wall time.
    pub seconds: f64,
    /// `bytes / seconds`.
    pub bytes_per_second: f64,
    /// Threads.
    pub threads: usize,
    /// Whether the reads went past the page cache.
    pub direct: bool,
}

/// A report, and how long it took.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verified {
    /// What was found.
    #[serde(flatten)]
    pub report: VerifyReport,
    /// The verification.
    pub rate: Rate,
    /// The same reads by the same threads without a look at the bytes, if asked for.
    pub plain_read: Option<Rate>,
    /// Rate of the verification by that of the plain reads.
    pub ratio: Option<f64>,
}

/// Reads everything and compares.
///
/// # Errors
/// Where a file cannot be read or the slab does not open. Flaws of the content are in the report.
pub fn verify(slab: &Slab, process: &Process) -> Result<VerifyReport> {
    Ok(verify_with(slab, Division::default(), false, process)?.report)
}

/// As [`verify`], divided as told and timed; `compare` makes the same reads again without looking at the bytes, as a measure of the storage.
///
/// # Errors
/// As [`verify`].
pub fn verify_with(slab: &Slab, division: Division, compare: bool, process: &Process) -> Result<Verified> {
    let job = Job::new(slab)?;
    let (found, rate) = job.run(division, true, process)?;
    let report = job.report(found);
    let plain_read = if compare { Some(job.run(division, false, process)?.1) } else { None };
    Ok(Verified { report, rate, plain_read, ratio: plain_read.map(|plain| rate.bytes_per_second / plain.bytes_per_second) })
}

/// Everything that is to be read.
struct Job<'a> {
    slab: &'a Slab,
    companion: Option<(&'a Companion, &'a Path, Header)>,
}

impl<'a> Job<'a> {
    fn new(slab: &'a Slab) -> Result<Self> {
        let stated = slab.manifest().serenity.as_ref().and_then(|a| a.companion.as_ref());
        let companion = match stated.zip(slab.companion()) {
            Some((stated, path)) => Some((stated, path, Header::read(path)?)),
            None => None,
        };
        Ok(Self { slab, companion })
    }

    fn bytes(&self) -> u64 {
        self.slab.file_bytes() + self.companion.as_ref().map_or(0, |(_, _, header)| header.file_bytes)
    }

    /// The files: the slab, and the companion if there is one.
    fn passes(&self) -> Vec<Pass<'_>> {
        let slab = self.slab;
        let additions = slab.manifest().serenity.as_ref();
        let mut passes = vec![Pass {
            path: slab.path(),
            header: slab.header(),
            pages: additions.map(|a| PageHashes { page_bytes: a.page_bytes, hashes: &a.page_xxh3 }),
            tensor_hashes: additions.map(|a| &a.tensor_xxh3),
            codes: slab.layers().iter().map(|l| l.qweight.start).collect(),
            in_one: false,
        }];
        passes.extend(self.companion.as_ref().map(|(stated, path, header)| Pass {
            path,
            header,
            pages: None,
            tensor_hashes: Some(&stated.tensor_xxh3),
            codes: HashSet::new(),
            in_one: true,
        }));
        passes
    }

    /// Reads every file once, and compares if `look`.
    fn run(&self, division: Division, look: bool, process: &Process) -> Result<(Vec<Found>, Rate)> {
        let started = Instant::now();
        let mut progress = Progress::new(process, if look { "verify" } else { "plain read" }, self.bytes());
        let passes = self.passes();
        let mut work: Vec<(usize, Unit)> = passes
            .iter()
            .enumerate()
            .flat_map(|(i, pass)| pass.units(division.unit_bytes).into_iter().map(move |unit| (i, unit)))
            .collect();
        work.sort_by_key(|(_, unit)| std::cmp::Reverse(unit.bytes.end - unit.bytes.start));
        let found = on_threads(work, division.workers, &mut progress, Thread::default, |thread, (index, unit), done| {
            let pass = passes.get(index).ok_or_else(|| Error::invariant("a unit of no file"))?;
            thread.work(index, pass, &unit, division.piece_bytes, look, done)
        })?;
        let seconds = started.elapsed().as_secs_f64().max(1e-9);
        let bytes = self.bytes();
        let direct = found.iter().all(|f| f.direct);
        Ok((found, Rate { bytes, seconds, bytes_per_second: bytes as f64 / seconds, threads: division.workers, direct }))
    }

    fn report(&self, found: Vec<Found>) -> VerifyReport {
        let passes = self.passes();
        let additions = self.slab.manifest().serenity.as_ref();
        let mut report = VerifyReport {
            bytes: self.bytes(),
            pages: additions.map_or(0, |a| a.page_xxh3.len()),
            tensors: additions.map_or(0, |a| a.tensor_xxh3.len())
                + self.companion.as_ref().map_or(0, |(stated, ..)| stated.tensor_xxh3.len()),
            has_checksums: additions.is_some(),
            flaws: Vec::new(),
        };
        for (index, pass) in passes.iter().enumerate() {
            let (mut flaws, mut bad_pages, mut whole) = (Vec::new(), Vec::new(), None);
            for unit in found.iter().filter(|f| f.pass == index) {
                flaws.extend(unit.flaws.iter().cloned());
                bad_pages.extend(unit.bad_pages.iter().copied());
                whole = whole.or(unit.whole);
            }
            pass.blame_pages(bad_pages, &mut flaws);
            match &self.companion {
                Some((stated, ..)) if pass.in_one => pass.check_file(stated, whole, &mut flaws),
                _ => pass.check_listed(&mut flaws),
            }
            report.flaws.append(&mut flaws);
        }
        report
    }
}

struct PageHashes<'a> {
    page_bytes: u64,
    hashes: &'a [Hash],
}

/// One file and what is known of it.
struct Pass<'a> {
    path: &'a Path,
    header: &'a Header,
    pages: Option<PageHashes<'a>>,
    tensor_hashes: Option<&'a BTreeMap<String, Hash>>,
    /// Offsets of the tensors that hold codes.
    codes: HashSet<u64>,
    /// Whether one thread reads it all, for the hash of the whole file.
    in_one: bool,
}

impl Pass<'_> {
    fn page_bytes(&self) -> u64 {
        self.pages.as_ref().map_or(PAGE_BYTES, |p| p.page_bytes)
    }

    fn units(&self, unit_bytes: u64) -> Vec<Unit> {
        let tensors: Vec<Range<u64>> = self.header.tensors().iter().map(|t| t.range.clone()).collect();
        divide(&tensors, self.header.file_bytes, self.page_bytes(), if self.in_one { u64::MAX } else { unit_bytes })
    }

    fn flaw(&self, tensor: Option<&TensorEntry>, offset: u64, what: String) -> Flaw {
        Flaw { file: self.path.to_path_buf(), tensor: tensor.map(|t| t.name.clone()), offset, what }
    }

    /// Tensors of the slab that the manifest has no checksum of.
    fn check_listed(&self, flaws: &mut Vec<Flaw>) {
        let Some(hashes) = self.tensor_hashes else { return };
        for tensor in self.header.tensors().iter().filter(|t| !hashes.contains_key(&t.name)) {
            flaws.push(self.flaw(Some(tensor), tensor.range.start, "the manifest has no checksum of it".into()));
        }
    }

    /// The companion as a file: its tensors are all there, and nothing but them changed.
    fn check_file(&self, stated: &Companion, whole: Option<u64>, flaws: &mut Vec<Flaw>) {
        let silent = flaws.is_empty();
        let missing = stated.tensor_xxh3.keys().filter(|name| self.header.tensor(name).is_none());
        flaws.extend(missing.map(|name| Flaw {
            file: self.path.to_path_buf(),
            tensor: Some(name.clone()),
            offset: 8,
            what: "it is missing from the file".into(),
        }));
        if silent && (whole.map(Hash) != Some(stated.xxh3) || self.header.file_bytes != stated.bytes) {
            let found = Hash(whole.unwrap_or(0));
            let what =
                format!("the file's hash is {found}, the manifest says {}: its header differs, or it is of another build", stated.xxh3);
            flaws.push(self.flaw(None, 0, what));
        }
    }

    /// Gives every bad page to the bad tensors in it, so that the offset is as near as the hashes allow; sorts by offset.
    fn blame_pages(&self, mut bad_pages: Vec<u64>, flaws: &mut Vec<Flaw>) {
        flaws.sort_by_key(|f| f.offset);
        bad_pages.sort_unstable();
        for page in bad_pages {
            let range: Range<u64> = page * self.page_bytes()..((page + 1) * self.page_bytes()).min(self.header.file_bytes);
            let mut blamed = false;
            for flaw in flaws.iter_mut() {
                let Some(tensor) = flaw.tensor.as_deref().and_then(|name| self.header.tensor(name)) else { continue };
                if tensor.range.start < range.end && range.start < tensor.range.end {
                    blamed = true;
                    if !flaw.what.contains("within bytes") {
                        flaw.offset = tensor.range.start.max(range.start);
                        let end = tensor.range.end.min(range.end);
                        flaw.what.push_str(&format!(" (within bytes {} to {end})", flaw.offset));
                    }
                }
            }
            if !blamed {
                let what = format!("page {page} (bytes {} to {}) differs from the manifest's checksum", range.start, range.end);
                let tensor = self.header.tensor_at(range.start).cloned();
                flaws.push(self.flaw(tensor.as_ref(), range.start, what));
            }
        }
        flaws.sort_by_key(|f| f.offset);
    }
}

/// What was found in one unit.
struct Found {
    pass: usize,
    flaws: Vec<Flaw>,
    bad_pages: Vec<u64>,
    whole: Option<u64>,
    direct: bool,
}

/// A thread's memory and its open file.
#[derive(Default)]
struct Thread {
    buffer: AlignedBuffer,
    open: Option<(usize, DirectFile)>,
}

impl Thread {
    fn work(&mut self, index: usize, pass: &Pass, unit: &Unit, piece_bytes: u64, look: bool, done: &mut Done) -> Result<Found> {
        if self.open.as_ref().is_none_or(|(of, _)| *of != index) {
            self.open = Some((index, DirectFile::open(pass.path).map_err(|e| Error::io("cannot open the file", pass.path, e))?));
        }
        let Some((_, file)) = &mut self.open else { return Err(Error::invariant("an open file is gone")) };
        let mut state = State::new(pass, unit);
        for piece in Unit::pieces(unit.all(), piece_bytes) {
            let part = {
                let _span = tracing::trace_span!("read").entered();
                file.read(&piece, &mut self.buffer).map_err(|e| Error::io("cannot read the file", pass.path, e).offset(piece.start))?
            };
            if look {
                let _span = tracing::trace_span!("compare").entered();
                state.look(piece.start, self.buffer.bytes().get(part).unwrap_or_default());
            }
            // Bytes of the last page beyond the unit are another unit's.
            done(piece.end.min(unit.bytes.end).saturating_sub(piece.start))?;
        }
        let whole = pass.in_one.then(|| state.whole.digest());
        Ok(Found { pass: index, flaws: state.flaws, bad_pages: state.bad_pages, whole, direct: file.is_direct() })
    }
}

/// The running hashes of a unit.
struct State<'a> {
    pass: &'a Pass<'a>,
    unit: &'a Unit,
    page: Xxh3,
    tensor: Xxh3,
    whole: Xxh3,
    /// Index of the tensor that comes next or is under way.
    at_tensor: usize,
    /// Whether a code of that tensor was -128.
    odd_code: bool,
    bad_pages: Vec<u64>,
    flaws: Vec<Flaw>,
}

impl<'a> State<'a> {
    fn new(pass: &'a Pass, unit: &'a Unit) -> Self {
        Self {
            pass,
            unit,
            page: Xxh3::new(),
            tensor: Xxh3::new(),
            whole: Xxh3::new(),
            at_tensor: unit.tensors.start,
            odd_code: false,
            bad_pages: Vec::new(),
            flaws: Vec::new(),
        }
    }

    /// The next piece of the unit, `bytes` from offset `start` on.
    fn look(&mut self, start: u64, bytes: &[u8]) {
        self.look_at_pages(start, bytes);
        self.look_at_tensors(start, bytes);
        if self.pass.in_one {
            self.whole.update(bytes);
        }
    }

    fn look_at_pages(&mut self, start: u64, bytes: &[u8]) {
        let Some(pages) = &self.pass.pages else { return };
        let from = self.unit.pages.start.max(start);
        let rest = bytes.get((from - start) as usize..).unwrap_or_default();
        let here = from..self.unit.pages.end.min(from + rest.len() as u64);
        for part in Unit::pieces(here.clone(), pages.page_bytes) {
            self.page.update(rest.get((part.start - from) as usize..(part.end - from) as usize).unwrap_or_default());
            if part.end.is_multiple_of(pages.page_bytes) || part.end == self.unit.pages.end {
                let index = part.start / pages.page_bytes;
                if pages.hashes.get(index as usize).is_none_or(|h| h.0 != self.page.digest()) {
                    self.bad_pages.push(index);
                }
                self.page.reset();
            }
        }
    }

    fn look_at_tensors(&mut self, start: u64, bytes: &[u8]) {
        let end = start + bytes.len() as u64;
        let pass = self.pass;
        while let Some(tensor) = pass.header.tensors().get(self.at_tensor).filter(|_| self.at_tensor < self.unit.tensors.end) {
            let (from, to) = (tensor.range.start.max(start), tensor.range.end.min(end));
            let part = bytes.get((from - start) as usize..to.max(from).saturating_sub(start) as usize).unwrap_or_default();
            if !self.odd_code && tensor.dtype == Dtype::I8 && pass.codes.contains(&tensor.range.start) {
                self.look_at_codes(tensor, from, part);
            }
            if pass.tensor_hashes.is_some() {
                self.tensor.update(part);
            }
            if tensor.range.end > end {
                break;
            }
            self.end_tensor(tensor);
        }
    }

    fn look_at_codes(&mut self, tensor: &TensorEntry, from: u64, part: &[u8]) {
        // Without a branch for each byte this is a few instructions for sixteen.
        if part.chunks(4096).any(|c| c.iter().fold(false, |odd, &b| odd | (b == 0x80))) {
            let at = part.iter().position(|&b| b == 0x80).unwrap_or(0);
            self.odd_code = true;
            self.flaws.push(self.pass.flaw(Some(tensor), from + at as u64, "a code is -128, which no builder writes".into()));
        }
    }

    fn end_tensor(&mut self, tensor: &TensorEntry) {
        let expected = self.pass.tensor_hashes.and_then(|hashes| hashes.get(&tensor.name));
        let found = self.tensor.digest();
        if let Some(expected) = expected.filter(|e| e.0 != found) {
            let what = format!("its checksum is {}, the manifest says {expected}", Hash(found));
            self.flaws.push(self.pass.flaw(Some(tensor), tensor.range.start, what));
        }
        self.tensor.reset();
        self.odd_code = false;
        self.at_tensor += 1;
    }
}
