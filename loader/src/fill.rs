//! From the slab's codes to a slot's payload: which file ranges a chunk needs, and the one pass that writes it.
//!
//! In the `bf16` form rows are dequantised on rayon's threads, in the `int8` form codes are copied; scales come from memory (they are
//! 0.1 % of a slab and are read once). Both write every byte of the chunk, gaps included, so that equal chunks have equal checksums
//! whatever the slot held before.

use std::collections::HashMap;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::ring::words::ChunkId;
use serenity_protocol::slab::layout::{Part, PartKind, SlabLayout};
use serenity_protocol::slab::{Slab, SlabLayer, quant};
use serenity_protocol::{Error, Result};

use crate::reader::{Fetched, Reader};

/// Rows that one task takes at least: below it, handing out work costs more than the work.
const ROWS_PER_TASK: usize = 16;

/// Everything needed to fill any chunk of a slab.
pub struct Filler {
    layout: SlabLayout,
    layers: HashMap<String, (SlabLayer, Vec<f32>)>,
}

/// A part's share of a chunk.
struct Share<'a> {
    part: &'a Part,
    layer: &'a SlabLayer,
    scales: &'a [f32],
    /// Bytes of the part's payload.
    of_part: Range<u64>,
    /// Where they go in the chunk.
    at: usize,
}

impl Filler {
    /// Reads the scales of every block linear.
    ///
    /// # Errors
    /// As [`Reader::fetch`]; [`Error::Data`] if a linear is missing.
    pub fn new(slab: &Slab, geometry: &TransformerGeometry, layout: SlabLayout, reader: &mut Reader) -> Result<Self> {
        let mut layers = HashMap::new();
        let mut fetched = Fetched::new();
        for block in geometry.blocks() {
            for linear in geometry.block_linears(block) {
                let layer = slab
                    .layer(&linear.name)
                    .ok_or_else(|| Error::data(format!("the slab has no linear '{}'", linear.name)).at(slab.path()))?
                    .clone();
                reader.fetch(std::slice::from_ref(&layer.scale), &mut fetched)?;
                let scales = fetched.bytes(&layer.scale)?.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
                layers.insert(linear.name, (layer, scales));
            }
        }
        Ok(Self { layout, layers })
    }

    /// The layout that chunks are cut from.
    #[must_use]
    pub fn layout(&self) -> &SlabLayout {
        &self.layout
    }

    /// Payload bytes of a chunk.
    ///
    /// # Errors
    /// [`Error::Invariant`] if there is no such chunk.
    pub fn chunk_bytes(&self, chunk: ChunkId) -> Result<usize> {
        let range = self.range(chunk)?;
        Ok((range.end - range.start) as usize)
    }

    fn range(&self, chunk: ChunkId) -> Result<Range<u64>> {
        let range = self.layout.block(BlockId(chunk.block))?.chunk_range(u32::from(chunk.chunk), self.layout.chunk_bytes);
        if range.is_empty() {
            return Err(Error::invariant(format!("block {} has no chunk {}", chunk.block, chunk.chunk)));
        }
        Ok(range)
    }

    fn shares(&self, chunk: ChunkId) -> Result<Vec<Share<'_>>> {
        let range = self.range(chunk)?;
        let mut shares = Vec::new();
        for part in &self.layout.block(BlockId(chunk.block))?.parts {
            let (start, end) = (part.offset.max(range.start), (part.offset + part.bytes).min(range.end));
            if start >= end {
                continue;
            }
            let (layer, scales) =
                self.layers.get(&part.linear).ok_or_else(|| Error::invariant(format!("no scales were read for '{}'", part.linear)))?;
            shares.push(Share { part, layer, scales, of_part: start - part.offset..end - part.offset, at: (start - range.start) as usize });
        }
        Ok(shares)
    }

    /// The file ranges that a chunk needs.
    ///
    /// # Errors
    /// [`Error::Invariant`] if there is no such chunk.
    pub fn file_ranges(&self, chunk: ChunkId) -> Result<Vec<Range<u64>>> {
        Ok(self.shares(chunk)?.iter().filter_map(Share::file_range).collect())
    }

    /// Writes the chunk into `slot` (exactly the chunk's bytes) and returns its checksum.
    ///
    /// # Errors
    /// [`Error::Invariant`] if `fetched` lacks a range of [`Self::file_ranges`].
    pub fn fill(&self, chunk: ChunkId, fetched: &Fetched, slot: &mut [u8]) -> Result<u64> {
        let _span = tracing::trace_span!("dequantise", block = chunk.block, chunk = chunk.chunk).entered();
        let mut written = 0;
        for share in self.shares(chunk)? {
            let (_, rest) = slot.split_at_mut(written);
            let (gap, rest) = rest.split_at_mut(share.at - written);
            gap.fill(0);
            let len = (share.of_part.end - share.of_part.start) as usize;
            share.write(fetched, &mut rest[..len])?;
            written = share.at + len;
            serenity_protocol::faults::point("mid-fill");
        }
        slot[written..].fill(0);
        self.layout.payload_checksum(BlockId(chunk.block), u32::from(chunk.chunk), slot)
    }
}

impl Share<'_> {
    /// Elements of the part that the share covers (bf16 form).
    fn elements(&self) -> Range<usize> {
        (self.of_part.start / 2) as usize..(self.of_part.end / 2) as usize
    }

    /// Offset in the file of element `index`'s code.
    fn code_at(&self, index: usize) -> u64 {
        let (row, column) = (index / self.part.in_features, index % self.part.in_features);
        self.layer.qweight.start + (row * self.part.padded_in + column) as u64
    }

    fn file_range(&self) -> Option<Range<u64>> {
        match self.part.kind {
            PartKind::Bf16Rows => {
                let elements = self.elements();
                Some(self.code_at(elements.start)..self.code_at(elements.end - 1) + 1)
            }
            PartKind::Int8Rows => Some(self.layer.qweight.start + self.of_part.start..self.layer.qweight.start + self.of_part.end),
            PartKind::Scales => None,
        }
    }

    fn write(&self, fetched: &Fetched, out: &mut [u8]) -> Result<()> {
        match self.part.kind {
            PartKind::Scales => {
                let scales: &[u8] = bytemuck::cast_slice(self.scales);
                out.copy_from_slice(&scales[self.of_part.start as usize..self.of_part.end as usize]);
            }
            PartKind::Int8Rows => {
                let range = self.layer.qweight.start + self.of_part.start..self.layer.qweight.start + self.of_part.end;
                out.copy_from_slice(fetched.bytes(&range)?);
            }
            PartKind::Bf16Rows => self.dequantise(fetched, bytemuck::cast_slice_mut(out))?,
        }
        Ok(())
    }

    fn dequantise(&self, fetched: &Fetched, mut out: &mut [bf16]) -> Result<()> {
        let (inner, elements) = (self.part.in_features, self.elements());
        let base = self.code_at(elements.start);
        let codes: &[i8] = bytemuck::cast_slice(fetched.bytes(&(base..self.code_at(elements.end - 1) + 1))?);
        // One entry per row touched: the first and the last may be partial, because a chunk can end in the middle of a row.
        let mut rows = Vec::with_capacity((elements.end - elements.start).div_ceil(inner) + 1);
        let mut index = elements.start;
        while index < elements.end {
            let row = index / inner;
            let end = ((row + 1) * inner).min(elements.end);
            let (target, rest) = out.split_at_mut(end - index);
            let from = (self.code_at(index) - base) as usize;
            rows.push((target, &codes[from..from + (end - index)], self.scales[row]));
            out = rest;
            index = end;
        }
        rows.into_par_iter().with_min_len(ROWS_PER_TASK).for_each(|(target, codes, scale)| quant::dequantize(codes, scale, target));
        Ok(())
    }
}
