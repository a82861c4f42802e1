//! The pieces of a chunk, and the checksum that they make together.
//!
//! One hash over 64 MiB is one thread's work, and the payload of a ring passes many times a second: so a chunk is hashed in pieces, each
//! by whatever thread has it in its cache, and the checksum is the hash of the pieces' hashes in order. The pieces are cut where the slab
//! file's pages end, so in the int8 form a piece that is a whole page of the file has the hash that the builder put into the
//! manifest: the loader compares it when it reads, and hashes nothing twice; the consumer compares what reached it with what the
//! builder wrote.
//!
//! Loader and consumer both derive the pieces from the layout. Invariant: the pieces of a chunk are in order and cover it without
//! overlap, zero gaps included, so no flipped bit goes unseen.

use std::ops::Range;

use crate::checksum::xxh3_64;
use rayon::prelude::*;

use super::layout::{Part, PartKind, SlabLayout};
use crate::error::{Error, Result};
use crate::geometry::BlockId;

/// Page size taken for a slab whose manifest has no page hashes.
pub const PAGE_BYTES_DEFAULT: u64 = 1 << 20;
/// Bytes that a task hashes at least; less is not worth handing out.
const TASK_BYTES: usize = 256 << 10;

/// Where a piece's bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PieceSource {
    /// Codes of part number `part` of the block that lie in page `page` of the slab file.
    Page {
        /// Page of the file.
        page: u64,
        /// Index into the block's parts.
        part: usize,
    },
    /// Scales of part number `part`.
    Scales {
        /// Index into the block's parts.
        part: usize,
    },
    /// Zeros between parts.
    Gap,
}

/// A piece of a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Where it lies in the chunk.
    pub at: Range<usize>,
    /// Where it comes from.
    pub source: PieceSource,
}

impl Part {
    /// The byte of the slab file that payload byte `at` of this part comes from.
    #[must_use]
    pub fn source_of(&self, at: u64) -> u64 {
        match self.kind {
            PartKind::Int8Rows | PartKind::Scales => self.source + at,
            PartKind::Bf16Rows => {
                let (inner, index) = (self.in_features as u64, at / 2);
                self.source + index / inner * self.padded_in as u64 + index % inner
            }
        }
    }

    /// How many payload bytes of this part come from before byte `end` of the slab file.
    #[must_use]
    pub fn bytes_before(&self, end: u64) -> u64 {
        let past = end.saturating_sub(self.source);
        match self.kind {
            PartKind::Int8Rows | PartKind::Scales => past.min(self.bytes),
            PartKind::Bf16Rows => {
                let (inner, stored) = (self.in_features as u64, self.padded_in as u64);
                ((past / stored * inner + (past % stored).min(inner)) * 2).min(self.bytes)
            }
        }
    }
}

impl SlabLayout {
    /// The pieces of a chunk, in payload order; none if there is no such chunk.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the model has no such block.
    pub fn pieces(&self, block: BlockId, chunk: u32) -> Result<Vec<Piece>> {
        let layout = self.block(block)?;
        let range = layout.chunk_range(chunk, self.chunk_bytes);
        let mut pieces = Vec::new();
        let mut at = range.start;
        let mut push = |from: u64, to: u64, source| {
            if from < to {
                pieces.push(Piece { at: (from - range.start) as usize..(to - range.start) as usize, source });
            }
        };
        for (index, part) in layout.parts.iter().enumerate() {
            let (start, end) = (part.offset.max(range.start), (part.offset + part.bytes).min(range.end));
            if start >= end {
                continue;
            }
            push(at, start, PieceSource::Gap);
            at = end;
            if part.kind == PartKind::Scales {
                push(start, end, PieceSource::Scales { part: index });
                continue;
            }
            let mut from = start;
            while from < end {
                let page = part.source_of(from - part.offset) / self.page_bytes;
                let to = (part.offset + part.bytes_before((page + 1) * self.page_bytes)).min(end);
                push(from, to, PieceSource::Page { page, part: index });
                from = to;
            }
        }
        push(at, range.end, PieceSource::Gap);
        Ok(pieces)
    }

    /// The checksum of a chunk's payload, by all of rayon's threads: what a published descriptor carries, and what the consumer compares
    /// with it before it uses the bytes.
    ///
    /// # Errors
    /// [`Error::Invariant`] if there is no such chunk, or it has another length.
    pub fn payload_checksum(&self, block: BlockId, chunk: u32, payload: &[u8]) -> Result<u64> {
        let pieces = self.pieces(block, chunk)?;
        let bytes = pieces.last().map_or(0, |p| p.at.end);
        if bytes != payload.len() || bytes == 0 {
            return Err(Error::invariant(format!(
                "the payload of block {} chunk {chunk} has another length than the layout gives it",
                block.0
            ))
            .expected(bytes)
            .found(payload.len()));
        }
        let per_task = (TASK_BYTES * pieces.len() / bytes).max(1);
        let hashes: Vec<u64> = pieces.par_iter().with_min_len(per_task).map(|p| xxh3_64(&payload[p.at.clone()])).collect();
        Ok(combine(&hashes))
    }
}

/// The checksum of a payload whose pieces have these hashes (XXH3-64 each, in order).
#[must_use]
pub fn combine(hashes: &[u64]) -> u64 {
    xxh3_64(bytemuck::cast_slice(hashes))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::super::layout::{BlockLayout, PayloadForm};
    use super::*;

    /// One block of three linears, of which the second lies before the first in the file, at odd places.
    fn layout(form: PayloadForm, page_bytes: u64, chunk_bytes: u64) -> SlabLayout {
        let linears = [(5usize, 300usize, 384usize, 10_000u64), (700, 9, 64, 777), (64, 64, 64, 60_000)];
        let mut parts = Vec::new();
        let mut end = 0u64;
        for (i, (rows, inner, stored, source)) in linears.into_iter().enumerate() {
            let mut push = |kind, bytes: usize, source| {
                let linear = format!("linear_{i}");
                parts.push(Part {
                    linear,
                    kind,
                    offset: end,
                    bytes: bytes as u64,
                    out_features: rows,
                    in_features: inner,
                    padded_in: stored,
                    source,
                });
                end = (end + bytes as u64).next_multiple_of(256);
            };
            match form {
                PayloadForm::Bf16 => push(PartKind::Bf16Rows, rows * inner * 2, source),
                PayloadForm::Int8 => {
                    push(PartKind::Int8Rows, rows * stored, source);
                    push(PartKind::Scales, rows * 4, 90_000);
                }
            }
        }
        SlabLayout { form, chunk_bytes, page_bytes, blocks: vec![BlockLayout { block: BlockId(0), bytes: end, parts }] }
    }

    fn all() -> impl Iterator<Item = SlabLayout> {
        let forms = [PayloadForm::Bf16, PayloadForm::Int8];
        forms
            .into_iter()
            .flat_map(|f| [4096, 8192, 1 << 20].into_iter().flat_map(move |p| [256, 4096, 1 << 20].map(move |c| layout(f, p, c))))
    }

    #[test]
    fn pieces_cover_a_chunk_in_order_and_each_byte_comes_from_its_page() {
        for layout in all() {
            for chunk in 0..layout.chunks_of(BlockId(0)) {
                let range = layout.blocks[0].chunk_range(chunk, layout.chunk_bytes);
                let pieces = layout.pieces(BlockId(0), chunk).unwrap();
                let mut at = 0;
                for piece in &pieces {
                    assert_eq!(piece.at.start, at);
                    assert!(piece.at.end > at);
                    at = piece.at.end;
                    let within = |byte: usize, part: &Part| {
                        let byte = range.start + byte as u64;
                        assert!(part.offset <= byte && byte < part.offset + part.bytes);
                        byte - part.offset
                    };
                    for byte in piece.at.clone() {
                        match piece.source {
                            PieceSource::Page { page, part } => {
                                let part = &layout.blocks[0].parts[part];
                                let at = within(byte, part);
                                let code = if part.kind == PartKind::Bf16Rows { at / 2 } else { at };
                                let inner = if part.kind == PartKind::Bf16Rows { part.in_features } else { part.padded_in } as u64;
                                let file = part.source + code / inner * part.padded_in as u64 + code % inner;
                                assert_eq!((part.source_of(at), page), (file, file / layout.page_bytes));
                            }
                            PieceSource::Scales { part } => {
                                assert_eq!(layout.blocks[0].parts[part].kind, PartKind::Scales);
                                within(byte, &layout.blocks[0].parts[part]);
                            }
                            PieceSource::Gap => {
                                let byte = range.start + byte as u64;
                                assert!(layout.blocks[0].parts.iter().all(|p| byte < p.offset || byte >= p.offset + p.bytes));
                            }
                        }
                    }
                }
                assert_eq!(at as u64, range.end - range.start);
            }
        }
    }

    #[test]
    fn the_checksum_sees_every_byte_and_the_order_of_pieces() {
        let layout = layout(PayloadForm::Int8, 4096, 1 << 20);
        let mut payload: Vec<u8> = (0..layout.blocks[0].bytes).map(|i| (i * 131 % 251) as u8).collect();
        let sum = |payload: &[u8]| layout.payload_checksum(BlockId(0), 0, payload).unwrap();
        let expected = sum(&payload);
        for at in (0..payload.len()).step_by(97).chain([payload.len() - 1]) {
            payload[at] ^= 0x10;
            assert_ne!(sum(&payload), expected, "byte {at}");
            payload[at] ^= 0x10;
        }
        assert_eq!(sum(&payload), expected);
        assert_ne!(combine(&[1, 2]), combine(&[2, 1]));
        assert_eq!(layout.payload_checksum(BlockId(0), 0, &payload[1..]).unwrap_err().exit_code(), 70);
        assert_eq!(layout.payload_checksum(BlockId(0), 9, &[]).unwrap_err().exit_code(), 70);
    }
}
