//! What a block's payload in the ring looks like: which linear at which offset, in either payload form.
//!
//! A payload is the block's linears in the order of [`TransformerGeometry::block_linears`], each part aligned to [`PART_ALIGN`], gaps
//! zero. It is cut into chunks at multiples of the ring's chunk size, in the middle of a row if need be. Loader and trainer both derive
//! it from (slab, geometry, form, chunk size) and never send it to each other.

use std::ops::Range;

use super::Slab;
use super::pieces::PAGE_BYTES_DEFAULT;
use crate::error::{Error, Result};
use crate::geometry::{BlockId, LinearSpec, TransformerGeometry};

/// Alignment of every part in bytes: a device copy's and a vector load's.
pub const PART_ALIGN: u64 = 256;

pub use crate::config::PayloadForm;

/// What a part of a payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PartKind {
    /// `[out, in]` bfloat16, no padding.
    Bf16Rows,
    /// `[out, padded_in]` i8, as in the slab.
    Int8Rows,
    /// `[out]` float32.
    Scales,
}

/// One part of a payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Full name of the linear in diffusers' terms.
    pub linear: String,
    /// What it is.
    pub kind: PartKind,
    /// Offset in the block's payload, a multiple of [`PART_ALIGN`].
    pub offset: u64,
    /// Length.
    pub bytes: u64,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// Columns as stored in the slab.
    pub padded_in: usize,
    /// Offset of the part's tensor in the slab file.
    pub source: u64,
}

/// The payload of one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockLayout {
    /// The block.
    pub block: BlockId,
    /// Payload length, a multiple of [`PART_ALIGN`].
    pub bytes: u64,
    /// The parts in payload order. In the Int8 form each linear's codes are followed by its scales.
    pub parts: Vec<Part>,
}

impl BlockLayout {
    /// The payload bytes in chunk `chunk`; empty beyond the last chunk.
    #[must_use]
    pub fn chunk_range(&self, chunk: u32, chunk_bytes: u64) -> Range<u64> {
        let start = u64::from(chunk).saturating_mul(chunk_bytes).min(self.bytes);
        start..start.saturating_add(chunk_bytes).min(self.bytes)
    }
}

/// The payloads of all blocks of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlabLayout {
    /// Payload form.
    pub form: PayloadForm,
    /// Chunk size of the ring, a multiple of [`PART_ALIGN`].
    pub chunk_bytes: u64,
    /// Page size of the slab's hashes, where chunks are cut into pieces ([`super::pieces`]).
    pub page_bytes: u64,
    /// One for each block, in execution order: `blocks[i].block == BlockId(i)`.
    pub blocks: Vec<BlockLayout>,
}

impl SlabLayout {
    /// Lays out every block of `geometry` from `slab`.
    ///
    /// # Errors
    /// [`Error::Config`] for an unusable chunk size, [`Error::Data`] where the slab lacks a linear (see [`Slab::check_model`] for the full
    /// list).
    pub fn new(slab: &Slab, geometry: &TransformerGeometry, form: PayloadForm, chunk_bytes: u64) -> Result<Self> {
        if chunk_bytes == 0 || !chunk_bytes.is_multiple_of(PART_ALIGN) {
            return Err(Error::config("the ring's chunk size is unusable")
                .expected(format!("a positive multiple of {PART_ALIGN} bytes"))
                .found(chunk_bytes));
        }
        let block = |b| block_layout(slab, geometry, form, b);
        let blocks = geometry.blocks().map(block).collect::<Result<Vec<_>>>()?;
        if let Some(large) = blocks.iter().find(|b| b.bytes.div_ceil(chunk_bytes) > u64::from(u32::MAX)) {
            return Err(Error::config("the ring's chunk size is too small for a block")
                .expected(format!("{} bytes", large.bytes))
                .found(chunk_bytes));
        }
        let page_bytes = slab.pages().map(|p| p.page_bytes).filter(|b| *b > 0).unwrap_or(PAGE_BYTES_DEFAULT);
        Ok(Self { form, chunk_bytes, page_bytes, blocks })
    }

    /// The layout of a block.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the model has no such block.
    pub fn block(&self, block: BlockId) -> Result<&BlockLayout> {
        self.blocks.get(usize::from(block.0)).ok_or_else(|| {
            Error::invariant("a block outside the model was asked for").expected(format!("0 to {}", self.blocks.len())).found(block.0)
        })
    }

    /// Chunks of a block; 0 if the model has no such block.
    #[must_use]
    pub fn chunks_of(&self, block: BlockId) -> u32 {
        let bytes = self.blocks.get(usize::from(block.0)).map_or(0, |b| b.bytes);
        u32::try_from(bytes.div_ceil(self.chunk_bytes)).unwrap_or(u32::MAX)
    }

    /// Payload bytes of all blocks.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.blocks.iter().map(|b| b.bytes).sum()
    }

    /// Payload bytes of the largest block.
    #[must_use]
    pub fn largest_block_bytes(&self) -> u64 {
        self.blocks.iter().map(|b| b.bytes).max().unwrap_or(0)
    }
}

fn block_layout(slab: &Slab, geometry: &TransformerGeometry, form: PayloadForm, block: BlockId) -> Result<BlockLayout> {
    let mut parts = Vec::new();
    let mut end = 0u64;
    for linear in geometry.block_linears(block) {
        let layer = slab
            .layer_for(&linear)
            .map_err(|problem| Error::data(problem).at(slab.path()).advice("build a slab of this model with `serenity-slab build`"))?;
        // Products fit: out * padded_in is the length of a range in the slab file, which Slab::open checked.
        let (rows, stored) = (linear.out_features as u64, layer.padded_in as u64);
        let mut push = |kind, bytes, source: &Range<u64>| {
            parts.push(part(&linear, layer.padded_in, kind, end, bytes, source.start));
            end = (end + bytes).next_multiple_of(PART_ALIGN);
        };
        match form {
            PayloadForm::Bf16 => push(PartKind::Bf16Rows, rows * linear.in_features as u64 * 2, &layer.qweight),
            PayloadForm::Int8 => {
                push(PartKind::Int8Rows, rows * stored, &layer.qweight);
                push(PartKind::Scales, rows * 4, &layer.scale);
            }
        }
    }
    Ok(BlockLayout { block, bytes: end, parts })
}

fn part(linear: &LinearSpec, padded_in: usize, kind: PartKind, offset: u64, bytes: u64, source: u64) -> Part {
    let (out_features, in_features) = (linear.out_features, linear.in_features);
    Part { linear: linear.name.clone(), kind, offset, bytes, out_features, in_features, padded_in, source }
}
