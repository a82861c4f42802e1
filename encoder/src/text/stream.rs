//! Layers from disk to a device, piece by piece: several threads read into page-locked buffers, the device copies from where they were read.
//!
//! A layer is a list of [`Part`]s, each a tensor of a file and its place in the layer's memory on the device. Parts are cut into [`Job`]s of at
//! most [`PIECE_BYTES`], numbered through all layers. A thread takes a free buffer first and then the next job, so that what is under way are
//! always the earliest jobs: whoever waits for a layer waits for nothing behind it.
//!
//! What lies in the page cache (or in a memory file system) is read from there; what does not is read past it, because 33 GB that are read once
//! would push out everything else. Tensors of another type than the device computes in are converted on the way.
//!
//! Failure: an unreadable or shortened file ends the pass with path and offset; a receiver that is gone ends the threads.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::{Duration, Instant};

use candle_core::DType;
use half::{bf16, f16};
use serenity_cuda::driver::Pinned;
use serenity_cuda::{Event, Ty};
use serenity_protocol::{Error, Result};

use super::direct::{ALIGN, DIRECT_FILE_BYTES_MIN};

/// Bytes of a page-locked buffer, and of a copy to the device.
pub(super) const PIECE_BYTES: usize = 16 << 20;
/// `statfs` type of a file system in memory.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// A tensor of a layer.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub file: PathBuf,
    /// Bytes in the file.
    pub start: u64,
    pub elements: usize,
    pub stored: DType,
    /// Place in the layer's memory.
    pub to: usize,
}

/// A piece of a part.
#[derive(Debug, Clone)]
struct Job {
    layer: usize,
    file: PathBuf,
    start: u64,
    elements: usize,
    stored: DType,
    to: usize,
}

/// Page-locked memory, and the event behind the last copy from it.
pub(super) struct Buffer {
    pub memory: Pinned,
    pub used: Event,
}

/// A piece that was read.
pub(super) struct Filled {
    pub layer: usize,
    /// Place in the layer's memory.
    pub to: usize,
    pub bytes: usize,
    pub buffer: Buffer,
    /// What reading it took.
    pub time: Duration,
}

/// The jobs of all layers, taken one by one.
pub(super) struct Jobs {
    list: Vec<Job>,
    next: AtomicUsize,
    ty: Ty,
}

impl Jobs {
    /// Of the parts of each layer.
    pub fn new(layers: &[Vec<Part>], ty: Ty) -> Self {
        let most = PIECE_BYTES / ty.bytes();
        let mut list = Vec::new();
        for (layer, parts) in layers.iter().enumerate() {
            for part in parts {
                for first in (0..part.elements).step_by(most) {
                    list.push(Job {
                        layer,
                        file: part.file.clone(),
                        start: part.start + (first * part.stored.size_in_bytes()) as u64,
                        elements: most.min(part.elements - first),
                        stored: part.stored,
                        to: part.to + first * ty.bytes(),
                    });
                }
            }
        }
        Self { list, next: AtomicUsize::new(0), ty }
    }

    /// Pieces of a layer.
    pub fn of(&self, layer: usize) -> usize {
        self.list.iter().filter(|j| j.layer == layer).count()
    }

    /// Bytes that are read for all of them.
    pub fn file_bytes(&self) -> u64 {
        self.list.iter().map(|j| (j.elements * j.stored.size_in_bytes()) as u64).sum()
    }

    /// What a reading thread does: fills free buffers with jobs until there are no more, or nobody wants them.
    pub fn read(&self, free: &Mutex<Receiver<Buffer>>, filled: &SyncSender<Result<Filled>>) {
        let mut files = Files::default();
        loop {
            // The lock is held while a buffer is awaited and its job is taken, so that the earliest job has a buffer.
            let taken = free.lock().ok().and_then(|free| {
                let buffer = free.recv().ok()?;
                // Pairs with nothing: the lock orders the takers, the list does not change.
                self.list.get(self.next.fetch_add(1, Ordering::Relaxed)).map(|job| (buffer, job))
            });
            let Some((buffer, job)) = taken else { return };
            let result = self.fill(&mut files, buffer, job);
            let stop = result.is_err();
            if filled.send(result).is_err() || stop {
                return;
            }
        }
    }

    fn fill(&self, files: &mut Files, mut buffer: Buffer, job: &Job) -> Result<Filled> {
        let started = Instant::now();
        let bytes = job.elements * self.ty.bytes();
        let short = || Error::invariant("a piece is larger than its buffer");
        let to = buffer.memory.bytes_after(&buffer.used)?.get_mut(..bytes).ok_or_else(short)?;
        let same = matches!((job.stored, self.ty), (DType::BF16, Ty::Bf16) | (DType::F32, Ty::F32));
        if same {
            files.read(&job.file, job.start, to)?;
        } else {
            let mut source = vec![0u8; job.elements * job.stored.size_in_bytes()];
            files.read(&job.file, job.start, &mut source)?;
            convert(&source, job.stored, to, self.ty)?;
        }
        Ok(Filled { layer: job.layer, to: job.to, bytes, buffer, time: started.elapsed() })
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
        let part = |elements: usize, to: usize| Part { file: "f".into(), start: 100, elements, stored: DType::F32, to };
        let most = PIECE_BYTES / 2;
        let jobs = Jobs::new(&[vec![part(2 * most + 5, 0), part(3, 1 << 30)], vec![part(1, 7)]], Ty::Bf16);
        let seen: Vec<_> = jobs.list.iter().map(|j| (j.layer, j.start, j.elements, j.to)).collect();
        let far = (most * 4) as u64;
        let expected =
            [(0, 100, most, 0), (0, 100 + far, most, 2 * most), (0, 100 + 2 * far, 5, 4 * most), (0, 100, 3, 1 << 30), (1, 100, 1, 7)];
        assert_eq!(seen, expected);
        assert_eq!((jobs.of(0), jobs.of(1), jobs.of(2)), (4, 1, 0));
        assert_eq!(jobs.file_bytes(), 4 * (2 * most as u64 + 9));
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
