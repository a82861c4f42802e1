//! Layers from disk to a device, piece by piece: several threads read into page-locked buffers and queue the copies from them.
//!
//! A layer is a list of [`Part`]s, each a tensor of a file and its place in the layer's memory on the device. Parts are cut into jobs of at
//! most [`PIECE_BYTES`], numbered through all layers. Each thread has two buffers: it reads into one while the device copies from the other. Jobs are
//! taken in order, and a layer has one of two places on the device, so that a thread whose layer has none yet waits in [`Feed::copy`] for the
//! earlier layers alone, which others bring.
//!
//! What lies in the page cache (or in a memory file system) is read from there; what does not is read past it, because 33 GB that are read once
//! would push out everything else. Tensors of another type than the device computes in are converted on the way; what has checksums is compared with them.
//!
//! Failure: an unreadable or shortened file ends the pass with path and offset; a pass that ends early ends the threads.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use candle_core::DType;
use half::{bf16, f16};
use serenity_cuda::driver::{Context, Pinned, Priority};
use serenity_cuda::{Event, Ptr, Stream, Ty};
use serenity_protocol::checksum::xxh3_64;
use serenity_protocol::slab::Pages;
use serenity_protocol::{Error, Result};

use super::direct::{ALIGN, DIRECT_FILE_BYTES_MIN};

/// Bytes of a page-locked buffer, and of a copy to the device.
pub(super) const PIECE_BYTES: usize = 4 << 20;
/// Layers that have memory on the device at a time.
pub(super) const PLACES: usize = 2;
/// `statfs` type of a file system in memory.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// What a part holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Numbers, which come in the type that the device computes in.
    Floats(DType),
    /// Bytes that come as they are.
    Bytes,
}

impl Content {
    fn stored_bytes(self) -> usize {
        match self {
            Self::Floats(ty) => ty.size_in_bytes(),
            Self::Bytes => 1,
        }
    }

    fn device_bytes(self, ty: Ty) -> usize {
        match self {
            Self::Floats(_) => ty.bytes(),
            Self::Bytes => 1,
        }
    }
}

/// What a part is compared with.
#[derive(Debug, Clone)]
pub(super) enum Proof {
    /// Nothing.
    None,
    /// XXH3-64 of all of its bytes, which are read at once.
    Whole(u64),
    /// The hashes of the file's pages; the part is made of whole ones.
    Pages(Arc<Pages>),
}

/// A tensor of a layer, or a run of a file.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub file: PathBuf,
    /// Bytes in the file.
    pub start: u64,
    pub elements: usize,
    pub content: Content,
    pub proof: Proof,
    /// Place in the layer's memory.
    pub to: usize,
}

impl Part {
    /// Elements of the largest piece that can be compared by itself.
    fn piece(&self, ty: Ty) -> usize {
        let elements = PIECE_BYTES / self.content.device_bytes(ty);
        match &self.proof {
            Proof::None => elements,
            Proof::Whole(_) => self.elements.max(1),
            Proof::Pages(pages) => {
                let page = usize::try_from(pages.page_bytes).unwrap_or(usize::MAX).max(1);
                (elements / page).max(1).saturating_mul(page)
            }
        }
    }
}

/// A piece of a part: `part.elements` of it.
#[derive(Debug, Clone)]
struct Job {
    layer: usize,
    part: Part,
}

impl Job {
    fn stored_bytes(&self) -> usize {
        self.part.elements * self.part.content.stored_bytes()
    }

    fn device_bytes(&self, ty: Ty) -> usize {
        self.part.elements * self.part.content.device_bytes(ty)
    }

    /// Refuses bytes that are not those that were written.
    fn check(&self, bytes: &[u8]) -> Result<()> {
        let Part { file, start, proof, .. } = &self.part;
        let corrupt = |offset: u64| {
            Error::data("the text encoder's slab is corrupt")
                .at(file)
                .offset(offset)
                .cause("bytes from here on do not have the checksum of the manifest")
                .advice("copy the slab's files again, or build the slab again; `serenity-slab verify` finds every damaged tensor")
        };
        match proof {
            Proof::None => Ok(()),
            Proof::Whole(expected) if xxh3_64(bytes) == *expected => Ok(()),
            Proof::Whole(_) => Err(corrupt(*start)),
            Proof::Pages(pages) => {
                for index in pages.touched_by(&(*start..start + bytes.len() as u64)) {
                    let page = pages.range(index);
                    let at = page.start.checked_sub(*start).and_then(|first| Some(first as usize..usize::try_from(page.end - start).ok()?));
                    if !at.and_then(|at| bytes.get(at)).is_some_and(|bytes| pages.matches(index, bytes)) {
                        return Err(corrupt(page.start));
                    }
                }
                Ok(())
            }
        }
    }
}

/// Page-locked memory, and the event behind the last copy from or to it.
pub(super) struct Buffer {
    pub memory: Pinned,
    pub used: Event,
}

impl Buffer {
    fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        Ok(Self { memory: Pinned::new(context, bytes)?, used: Event::sleeping(context)? })
    }
}

/// Page-locked buffers that nobody uses: taking them takes longer than reading a layer, so they stay from pass to pass.
pub(super) struct Buffers {
    free: Mutex<Vec<Buffer>>,
    context: Arc<Context>,
}

impl Buffers {
    /// With `count` buffers of [`PIECE_BYTES`].
    ///
    /// # Errors
    /// [`Error::TryAgain`] without so much page-locked memory.
    pub fn new(context: &Arc<Context>, count: usize) -> Result<Self> {
        let free = (0..count).map(|_| Buffer::new(context, PIECE_BYTES)).collect::<Result<_>>()?;
        Ok(Self { free: Mutex::new(free), context: context.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Buffer>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of at least `bytes`.
    ///
    /// # Errors
    /// [`Error::TryAgain`] if a new one is needed and cannot be had.
    pub fn take(&self, bytes: usize) -> Result<Buffer> {
        let found = {
            let mut free = self.lock();
            free.iter().rposition(|b| b.memory.bytes() >= bytes).map(|at| free.swap_remove(at))
        };
        found.map_or_else(|| Buffer::new(&self.context, bytes.max(PIECE_BYTES)), Ok)
    }

    /// Gives buffers back.
    pub fn put(&self, buffers: impl IntoIterator<Item = Buffer>) {
        self.lock().extend(buffers);
    }
}

/// The jobs of all layers, taken one by one.
pub(super) struct Jobs {
    list: Vec<Job>,
    next: AtomicUsize,
    ty: Ty,
    /// Bytes of the largest on the device.
    largest: usize,
}

/// Where readers and the pass meet: the copy stream, the layers' places, and how far both are.
pub(super) struct Feed {
    state: Mutex<State>,
    /// A layer is complete, a place is free, or the end.
    changed: Condvar,
    places: [Ptr; PLACES],
}

struct State {
    copies: Stream,
    ready: Event,
    /// Behind the last use of each place.
    used: [Event; PLACES],
    /// Pieces of each layer whose copies are not queued yet.
    missing: Vec<usize>,
    /// Layers whose work is queued: the place of each is free for the one after the next.
    computed: usize,
    /// Threads reading, added up.
    read: Duration,
    failed: Option<Error>,
    ended: bool,
}

/// Ends the readers when the pass does, however it does.
pub(super) struct Ending<'f>(pub &'f Feed);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

/// Tells the pass of a reader that panicked: it would wait for its pieces for ever.
struct Watch<'f>(&'f Feed);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().failed.get_or_insert_with(|| Error::invariant("a layer reader panicked"));
            self.0.changed.notify_all();
        }
    }
}

impl Feed {
    /// For `jobs`, with these places for layers.
    pub fn new(context: &Arc<Context>, jobs: &Jobs, layers: usize, places: [Ptr; PLACES]) -> Result<Self> {
        let mut missing = vec![0; layers];
        for job in &jobs.list {
            if let Some(n) = missing.get_mut(job.layer) {
                *n += 1;
            }
        }
        let state = State {
            copies: Stream::new(context, Priority::Copies)?,
            ready: Event::new(context)?,
            used: [Event::new(context)?, Event::new(context)?],
            missing,
            computed: 0,
            read: Duration::ZERO,
            failed: None,
            ended: false,
        };
        Ok(Self { state: Mutex::new(state), changed: Condvar::new(), places })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements that can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn until<'s>(&self, state: MutexGuard<'s, State>, waits: impl Fn(&State) -> bool) -> MutexGuard<'s, State> {
        self.changed.wait_while(state, |s| !s.ended && s.failed.is_none() && waits(s)).unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues the copy of a piece once its layer has a place; whether there is any use in going on.
    fn copy(&self, job: &Job, bytes: usize, buffer: &Buffer, read: Duration) -> Result<bool> {
        let mut state = self.until(self.lock(), |s| job.layer >= s.computed + PLACES);
        if state.ended || state.failed.is_some() {
            return Ok(false);
        }
        if let (Some(place), Some(used)) = (self.places.get(job.layer % PLACES), state.used.get(job.layer % PLACES)) {
            state.copies.wait(used)?;
            state.copies.copy_in(place.offset(job.part.to), &buffer.memory, 0, bytes)?;
            state.copies.record(&buffer.used)?;
        }
        state.read += read;
        if let Some(n) = state.missing.get_mut(job.layer) {
            *n -= 1;
            if *n == 0 {
                self.changed.notify_all();
            }
        }
        Ok(true)
    }

    /// Waits until all copies of `layer` are queued and makes `compute` wait for them; where the layer is.
    ///
    /// # Errors
    /// What a reader met.
    pub fn layer(&self, layer: usize, compute: &Stream) -> Result<Ptr> {
        let mut state = self.until(self.lock(), |s| s.missing.get(layer).is_some_and(|n| *n > 0));
        if let Some(e) = state.failed.take() {
            state.ended = true;
            return Err(e);
        }
        state.copies.record(&state.ready)?;
        compute.wait(&state.ready)?;
        self.places.get(layer % PLACES).copied().ok_or_else(|| Error::invariant("a layer has no place"))
    }

    /// The work of `layer` is queued on `compute`: behind it its place is free.
    ///
    /// # Errors
    /// The driver's.
    pub fn computed(&self, layer: usize, compute: &Stream) -> Result<()> {
        let mut state = self.lock();
        if let Some(used) = state.used.get(layer % PLACES) {
            compute.record(used)?;
        }
        state.computed = layer + 1;
        self.changed.notify_all();
        Ok(())
    }

    /// What reading took so far, all threads added up.
    pub fn read(&self) -> Duration {
        self.lock().read
    }
}

impl Jobs {
    /// Of the parts of each layer.
    pub fn new(layers: &[Vec<Part>], ty: Ty) -> Self {
        let mut list = Vec::new();
        for (layer, parts) in layers.iter().enumerate() {
            for part in parts {
                let most = part.piece(ty);
                for first in (0..part.elements).step_by(most) {
                    let piece = Part {
                        start: part.start + (first * part.content.stored_bytes()) as u64,
                        elements: most.min(part.elements - first),
                        to: part.to + first * part.content.device_bytes(ty),
                        ..part.clone()
                    };
                    list.push(Job { layer, part: piece });
                }
            }
        }
        let largest = list.iter().map(|j| j.device_bytes(ty)).max().unwrap_or(0);
        Self { list, next: AtomicUsize::new(0), ty, largest }
    }

    /// Bytes that are read for all of them.
    pub fn file_bytes(&self) -> u64 {
        self.list.iter().map(|j| j.stored_bytes() as u64).sum()
    }

    /// What a reading thread does until there are no more jobs, or nobody wants them. What it meets is told to the feed.
    pub fn read(&self, free: &Buffers, feed: &Feed) {
        let _watch = Watch(feed);
        if let Err(e) = self.read_all(free, feed) {
            feed.lock().failed.get_or_insert(e);
            feed.changed.notify_all();
        }
    }

    fn read_all(&self, free: &Buffers, feed: &Feed) -> Result<()> {
        let mut files = Files::default();
        let mut buffers: [Option<Buffer>; 2] = [None, None];
        for turn in [0, 1].into_iter().cycle() {
            // Pairs with nothing: each number is taken once, the list does not change.
            let Some(job) = self.list.get(self.next.fetch_add(1, Ordering::Relaxed)) else { break };
            let Some(buffer) = buffers.get_mut(turn) else { break };
            let started = Instant::now();
            let mut filled = match buffer.take() {
                Some(buffer) => buffer,
                None => free.take(self.largest)?,
            };
            let bytes = self.fill(&mut files, &mut filled, job)?;
            if !feed.copy(job, bytes, buffer.insert(filled), started.elapsed())? {
                break;
            }
        }
        free.put(buffers.into_iter().flatten());
        Ok(())
    }

    fn fill(&self, files: &mut Files, buffer: &mut Buffer, job: &Job) -> Result<usize> {
        let bytes = job.device_bytes(self.ty);
        let short = || Error::invariant("a piece is larger than its buffer");
        let to = buffer.memory.bytes_after(&buffer.used)?.get_mut(..bytes).ok_or_else(short)?;
        let Part { file, start, .. } = &job.part;
        match (job.part.content, self.ty) {
            (Content::Bytes, _) | (Content::Floats(DType::BF16), Ty::Bf16) | (Content::Floats(DType::F32), Ty::F32) => {
                files.read(file, *start, to)?;
                job.check(to)?;
            }
            (Content::Floats(stored), _) => {
                let mut source = vec![0u8; job.stored_bytes()];
                files.read(file, *start, &mut source)?;
                job.check(&source)?;
                convert(&source, stored, to, self.ty)?;
            }
        }
        Ok(bytes)
    }
}

/// Values of a checkpoint's type in that of the device.
pub(super) fn convert(from: &[u8], stored: DType, to: &mut [u8], ty: Ty) -> Result<()> {
    let value = |bytes: &[u8]| match (stored, bytes) {
        (DType::F16, [a, b]) => Some(f16::from_le_bytes([*a, *b]).to_f32()),
        (DType::BF16, [a, b]) => Some(bf16::from_le_bytes([*a, *b]).to_f32()),
        (DType::F32, [a, b, c, d]) => Some(f32::from_le_bytes([*a, *b, *c, *d])),
        _ => None,
    };
    for (to, from) in to.chunks_exact_mut(ty.bytes()).zip(from.chunks_exact(stored.size_in_bytes())) {
        let value =
            value(from).ok_or_else(|| Error::invariant("a weight has a type that is not converted").found(format!("{stored:?}")))?;
        match ty {
            Ty::Bf16 => to.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            Ty::F32 => to.copy_from_slice(&value.to_le_bytes()),
        }
    }
    Ok(())
}

/// A weight file, open for reads through the page cache and past it.
struct Opened {
    cached: File,
    /// `None` where the cache is as good: small files, file systems in memory, those without direct reads.
    direct: Option<File>,
    bytes: u64,
}

/// The files of a reading thread.
#[derive(Default)]
struct Files {
    open: HashMap<PathBuf, Opened>,
    aligned: Vec<u8>,
}

impl Files {
    fn open(path: &Path) -> io::Result<Opened> {
        let cached = File::open(path)?;
        let bytes = cached.metadata()?.len();
        let in_memory = rustix::fs::fstatfs(&cached).is_ok_and(|s| u64::try_from(s.f_type).is_ok_and(|t| t == TMPFS_MAGIC));
        let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let direct = (!in_memory && bytes >= DIRECT_FILE_BYTES_MIN).then(|| File::options().read(true).custom_flags(flags).open(path).ok());
        Ok(Opened { cached, direct: direct.flatten(), bytes })
    }

    fn read(&mut self, path: &Path, start: u64, to: &mut [u8]) -> Result<()> {
        if !self.open.contains_key(path) {
            let opened = Self::open(path).map_err(|e| Error::io("cannot open the weight file", path, e))?;
            self.open.insert(path.to_path_buf(), opened);
        }
        let opened = self.open.get(path).ok_or_else(|| Error::invariant("a file was opened and is not there"))?;
        let end = start + to.len() as u64;
        if end > opened.bytes {
            return Err(Error::data("the weight file became shorter")
                .at(path)
                .expected(format!("at least {end} bytes"))
                .found(opened.bytes));
        }
        let failed = |e| Error::io("cannot read the weights", path, e).offset(start);
        let Some(direct) = &opened.direct else { return opened.cached.read_exact_at(to, start).map_err(failed) };
        let done = read_cached(&opened.cached, start, to);
        let rest = to.get_mut(done..).unwrap_or_default();
        read_direct(direct, start + done as u64, rest, &mut self.aligned, opened.bytes).map_err(failed)
    }
}

/// Reads what the page cache has from `start` on without a gap; how many bytes that were.
fn read_cached(file: &File, start: u64, to: &mut [u8]) -> usize {
    let mut done = 0;
    while done < to.len() {
        let rest = to.get_mut(done..).unwrap_or_default();
        match rustix::io::preadv2(file, &mut [IoSliceMut::new(rest)], start + done as u64, rustix::io::ReadWriteFlags::NOWAIT) {
            Ok(n) if n > 0 => done += n,
            _ => break,
        }
    }
    done
}

/// Reads past the page cache, through an aligned buffer.
fn read_direct(file: &File, start: u64, to: &mut [u8], aligned: &mut Vec<u8>, file_bytes: u64) -> io::Result<()> {
    if to.is_empty() {
        return Ok(());
    }
    let from = start / ALIGN as u64 * ALIGN as u64;
    let skip = (start - from) as usize;
    let length = (skip + to.len()).next_multiple_of(ALIGN);
    if aligned.len() < length + ALIGN {
        aligned.resize(length + ALIGN, 0);
    }
    let offset = aligned.as_ptr().align_offset(ALIGN).min(ALIGN);
    let space = aligned.get_mut(offset..offset + length).unwrap_or_default();
    let wanted = length.min(file_bytes.saturating_sub(from) as usize);
    let mut done = 0;
    while done < wanted {
        match file.read_at(space.get_mut(done..).unwrap_or_default(), from + done as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let source = space.get(skip..skip + to.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
    to.copy_from_slice(source);
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn jobs_cover_parts_in_order() {
        let content = Content::Floats(DType::F32);
        let part = |elements: usize, to: usize| Part { file: "f".into(), start: 100, elements, content, proof: Proof::None, to };
        let most = PIECE_BYTES / 2;
        let jobs = Jobs::new(&[vec![part(2 * most + 5, 0), part(3, 1 << 30)], vec![part(1, 7)]], Ty::Bf16);
        let seen: Vec<_> = jobs.list.iter().map(|j| (j.layer, j.part.start, j.part.elements, j.part.to)).collect();
        let far = (most * 4) as u64;
        let expected =
            [(0, 100, most, 0), (0, 100 + far, most, 2 * most), (0, 100 + 2 * far, 5, 4 * most), (0, 100, 3, 1 << 30), (1, 100, 1, 7)];
        assert_eq!(seen, expected);
        assert_eq!((jobs.file_bytes(), jobs.largest), (4 * (2 * most as u64 + 9), PIECE_BYTES));
    }

    #[test]
    fn pieces_that_are_compared_are_whole_pages_and_a_flipped_bit_is_found() {
        let bytes: Vec<u8> = (0..PIECE_BYTES as u64 + 70_000).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7]).collect();
        let page = 1 << 16;
        let xxh3 = bytes.chunks(page).map(xxh3_64).collect();
        let pages = Arc::new(Pages { page_bytes: page as u64, xxh3, file_bytes: bytes.len() as u64 });
        let part = |start: usize, proof: Proof| Part {
            file: "f".into(),
            start: start as u64,
            elements: bytes.len() - start,
            content: Content::Bytes,
            proof,
            to: 0,
        };
        let jobs = Jobs::new(&[vec![part(page, Proof::Pages(pages.clone()))]], Ty::Bf16);
        assert_eq!(jobs.list.len(), 2);
        for job in &jobs.list {
            let range = job.part.start as usize..job.part.start as usize + job.part.elements;
            let mut piece = bytes[range].to_vec();
            job.check(&piece).unwrap();
            for at in [0, piece.len() / 2, piece.len() - 1] {
                piece[at] ^= 1;
                assert_eq!(job.check(&piece).unwrap_err().exit_code(), 65);
                piece[at] ^= 1;
            }
        }
        // One piece whatever its size; nothing to compare with is no error.
        let whole = Jobs::new(&[vec![part(0, Proof::Whole(xxh3_64(&bytes)))]], Ty::Bf16);
        assert_eq!((whole.list.len(), whole.largest), (1, bytes.len()));
        whole.list[0].check(&bytes).unwrap();
        assert!(whole.list[0].check(&bytes[1..]).is_err());
        Jobs::new(&[vec![part(0, Proof::None)]], Ty::Bf16).list[0].check(&[1, 2]).unwrap();
    }

    #[test]
    fn any_part_of_a_file_comes_back_cached_or_not() {
        let temp = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let content: Vec<u8> = (0..300_001u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7]).collect();
        std::fs::write(temp.path(), &content).unwrap();
        let cached = File::open(temp.path()).unwrap();
        let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        for range in [0..1, 4095..4097, 1..300_001, 299_999..300_001, 100..250_000, 8192..12_288] {
            let mut to = vec![0u8; range.len()];
            let done = read_cached(&cached, range.start as u64, &mut to);
            assert_eq!(to[..done], content[range.start..range.start + done]);
            if let Ok(direct) = File::options().read(true).custom_flags(flags).open(temp.path()) {
                to.fill(0);
                read_direct(&direct, range.start as u64, &mut to, &mut Vec::new(), content.len() as u64).unwrap();
                assert!(to == content[range.clone()], "{range:?}");
            }
            to.fill(0);
            Files::default().read(temp.path(), range.start as u64, &mut to).unwrap();
            assert!(to == content[range.clone()], "{range:?}");
        }
        assert_eq!(Files::default().read(temp.path(), 300_000, &mut [0; 2]).unwrap_err().exit_code(), 65);
        assert_eq!(Files::default().read(Path::new("/nowhere"), 0, &mut [0; 2]).unwrap_err().exit_code(), 69);
    }

    #[test]
    fn every_type_is_converted_to_nearest() {
        let values = [0.0f32, 1.0, -2.5, 1.003_906_2, 65_504.0, 1e-3];
        for (stored, bytes) in [
            (DType::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>()),
            (DType::F16, values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()),
            (DType::BF16, values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()),
        ] {
            let exact = |v: f32| match stored {
                DType::F16 => f16::from_f32(v).to_f32(),
                DType::BF16 => bf16::from_f32(v).to_f32(),
                _ => v,
            };
            let mut to = vec![0u8; 2 * values.len()];
            convert(&bytes, stored, &mut to, Ty::Bf16).unwrap();
            assert_eq!(to, values.iter().flat_map(|v| bf16::from_f32(exact(*v)).to_le_bytes()).collect::<Vec<_>>());
            let mut to = vec![0u8; 4 * values.len()];
            convert(&bytes, stored, &mut to, Ty::F32).unwrap();
            assert_eq!(to, values.iter().flat_map(|v| exact(*v).to_le_bytes()).collect::<Vec<_>>());
        }
        assert!(convert(&[0; 4], DType::U32, &mut [0; 4], Ty::F32).is_err());
    }
}
