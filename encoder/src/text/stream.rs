//! Layers from disk to a device, piece by piece: several threads read into page-locked buffers and queue the copies from them.
//!
//! A layer is a list of [`Part`]s, each a tensor of a file and its place in the layer's memory on the device. Parts are cut into jobs of at
//! most [`PIECE_BYTES`], numbered through all layers. Each thread has two buffers: it reads into one while the device copies from the other. Jobs are
//! taken in order, so that a thread whose layer has no place yet ([`Feed::copy`]) waits for the earlier layers alone, which others bring.
//!
//! Tensors of another type than the device computes in are converted on the way; what has checksums is compared with them.
//!
//! Failure: an unreadable or shortened file ends the pass with path and offset; a pass that ends early ends the threads.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use candle_core::DType;
use half::{bf16, f16};
use serenity_cuda::Ty;
use serenity_protocol::checksum::xxh3_64;
use serenity_protocol::slab::Pages;
use serenity_protocol::{Error, Result};

use super::feed::{Buffer, Buffers, Feed, PIECE_BYTES};
use super::files::Files;

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

/// The error for bytes of a slab that are not those that were written.
pub(super) fn corrupt(what: &str, file: &Path, offset: u64) -> Error {
    Error::data(format!("{what} of the text encoder's slab are corrupt"))
        .at(file)
        .offset(offset)
        .advice("copy the slab's files again, or build the slab again; `serenity-slab verify` finds every damaged tensor")
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
        match proof {
            Proof::None => Ok(()),
            Proof::Whole(expected) if xxh3_64(bytes) == *expected => Ok(()),
            Proof::Whole(_) => Err(corrupt("bytes", file, *start)),
            Proof::Pages(pages) => {
                for index in pages.touched_by(&(*start..start + bytes.len() as u64)) {
                    let page = pages.range(index);
                    let at = page.start.checked_sub(*start).and_then(|first| Some(first as usize..usize::try_from(page.end - start).ok()?));
                    if !at.and_then(|at| bytes.get(at)).is_some_and(|bytes| pages.matches(index, bytes)) {
                        return Err(corrupt("bytes", file, page.start));
                    }
                }
                Ok(())
            }
        }
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

    /// Pieces of each of so many layers.
    pub fn by_layer(&self, layers: usize) -> Vec<usize> {
        let mut pieces = vec![0; layers];
        for job in &self.list {
            if let Some(n) = pieces.get_mut(job.layer) {
                *n += 1;
            }
        }
        pieces
    }

    /// Bytes that are read for all of them.
    pub fn file_bytes(&self) -> u64 {
        self.list.iter().map(|j| j.stored_bytes() as u64).sum()
    }

    /// What a reading thread does until there are no more jobs, or nobody wants them. What it meets is told to the feed.
    pub fn read(&self, free: &Buffers, feed: &Feed) {
        let _watch = feed.watch();
        if let Err(e) = self.read_all(free, feed) {
            feed.fail(e);
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
            if !feed.copy((job.layer, job.part.to), bytes, buffer.insert(filled), started.elapsed())? {
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
        assert_eq!(jobs.by_layer(3), [4, 1, 0]);
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
