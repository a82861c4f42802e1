//! From the slab's pages to a slot's payload: which pages a chunk needs, and the one pass that writes it.
//!
//! A chunk's pieces ([`serenity_protocol::slab::pieces`]) end where the file's pages end, so each page brings whole pieces and needs
//! no other page: whichever thread has the page checks it, writes its pieces and hashes them, while all of it is in that thread's cache.
//! In the `int8` form a piece that is a whole page goes into the slot as it is, and its hash is the page's. Scales come from memory (they
//! are 0.1 % of a slab and are read once). Every byte of the chunk is written, gaps included, so that equal chunks have equal checksums
//! whatever the slot held before.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::time::Instant;

use half::bf16;
use serenity_protocol::checksum::{Xxh3, xxh3_64};
use serenity_protocol::faults::point;
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::ring::words::ChunkId;
use serenity_protocol::slab::layout::{Part, PartKind, SlabLayout};
use serenity_protocol::slab::pieces::{self, PieceSource};
use serenity_protocol::slab::{Slab, quant};
use serenity_protocol::{Error, Result};

use crate::reader::{Fetched, Page, Reader, Visit};
use crate::stages::{self, Stage, timed};

/// Payload bytes that are hashed at a time, right after they have been written: few enough to be in the cache still.
const HASH_BYTES: usize = 64 << 10;

/// Everything needed to fill any chunk of a slab.
pub struct Filler {
    layout: SlabLayout,
    /// By the linear's name.
    scales: HashMap<String, Vec<f32>>,
    page_bytes: u64,
    file_bytes: u64,
}

/// A piece that is to be written from a page.
struct Share<'a> {
    part: &'a Part,
    scales: &'a [f32],
    /// Payload bytes of the part.
    of_part: Range<u64>,
    out: &'a mut [u8],
    hash: &'a mut u64,
}

/// What a page is for.
enum Use<'a> {
    /// It is a piece as it stands; where the piece's hash goes.
    Whole(&'a mut u64),
    /// Pieces that are made from it.
    Shares(Vec<Share<'a>>),
}

impl Filler {
    /// Reads the scales of every block linear.
    ///
    /// # Errors
    /// As [`Reader::fetch`]; [`Error::Data`] if a linear is missing.
    pub fn new(slab: &Slab, geometry: &TransformerGeometry, layout: SlabLayout, reader: &mut Reader) -> Result<Self> {
        let mut all = HashMap::new();
        let mut fetched = Fetched::new();
        for block in geometry.blocks() {
            for linear in geometry.block_linears(block) {
                let layer = slab
                    .layer(&linear.name)
                    .ok_or_else(|| Error::data(format!("the slab has no linear '{}'", linear.name)).at(slab.path()))?;
                reader.fetch(std::slice::from_ref(&layer.scale), &mut fetched)?;
                let scales = fetched.bytes(&layer.scale)?.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
                all.insert(linear.name, scales);
            }
        }
        Ok(Self { page_bytes: layout.page_bytes, layout, scales: all, file_bytes: slab.file_bytes() })
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

    fn scales(&self, part: &Part) -> Result<&[f32]> {
        let scales = self.scales.get(&part.linear).ok_or_else(|| Error::invariant(format!("no scales were read for '{}'", part.linear)))?;
        if scales.len() != part.out_features {
            return Err(Error::invariant(format!("'{}' has another number of scales than rows", part.linear)));
        }
        Ok(scales)
    }

    fn page_range(&self, page: u64) -> Range<u64> {
        page * self.page_bytes..((page + 1) * self.page_bytes).min(self.file_bytes)
    }

    /// The file ranges that a chunk needs, in whole pages.
    ///
    /// # Errors
    /// [`Error::Invariant`] if there is no such chunk.
    pub fn file_ranges(&self, chunk: ChunkId) -> Result<Vec<Range<u64>>> {
        let pieces = self.layout.pieces(BlockId(chunk.block), u32::from(chunk.chunk))?;
        let page = |source| match source {
            PieceSource::Page { page, .. } => Some(self.page_range(page)),
            PieceSource::Scales { .. } | PieceSource::Gap => None,
        };
        Ok(pieces.iter().filter_map(|p| page(p.source)).collect())
    }

    /// Reads and writes the chunk into `slot` (exactly the chunk's bytes) and returns its checksum, which is
    /// [`SlabLayout::payload_checksum`] of what it wrote.
    ///
    /// # Errors
    /// As [`Reader::visit`]; [`Error::Invariant`] if there is no such chunk.
    pub fn fill(&self, chunk: ChunkId, reader: &mut Reader, slot: &mut [u8]) -> Result<u64> {
        let _span = tracing::trace_span!("fill", block = chunk.block, chunk = chunk.chunk).entered();
        let start = Instant::now();
        let pieces = self.layout.pieces(BlockId(chunk.block), u32::from(chunk.chunk))?;
        let parts = &self.layout.block(BlockId(chunk.block))?.parts;
        let offset = self.range(chunk)?.start;
        let mut hashes = vec![0u64; pieces.len()];
        let mut pages: BTreeMap<u64, Vec<Share<'_>>> = BTreeMap::new();
        let mut rest = slot;
        for (piece, hash) in pieces.iter().zip(&mut hashes) {
            let (out, tail) = rest.split_at_mut(piece.at.len());
            rest = tail;
            match piece.source {
                PieceSource::Gap => {
                    out.fill(0);
                    *hash = xxh3_64(out);
                }
                PieceSource::Scales { part } | PieceSource::Page { part, .. } => {
                    let part = &parts[part];
                    let at = offset + piece.at.start as u64 - part.offset;
                    let share = Share { part, scales: self.scales(part)?, of_part: at..at + out.len() as u64, out, hash };
                    match piece.source {
                        PieceSource::Page { page, .. } => pages.entry(page).or_default().push(share),
                        _ => share.write_scales(),
                    }
                }
            }
        }
        let visits = pages.into_iter().map(|(page, shares)| self.visit(page, shares)).collect();
        reader.visit(visits, write_page)?;
        stages::fills().add(start.elapsed());
        Ok(pieces::combine(&hashes))
    }

    fn visit<'a>(&self, page: u64, mut shares: Vec<Share<'a>>) -> Visit<'a, Use<'a>> {
        let range = self.page_range(page);
        let bytes = range.end - range.start;
        let used: u64 = shares.iter().map(Share::codes).sum();
        let whole = matches!(&shares[..], [only] if only.part.kind == PartKind::Int8Rows && only.out.len() as u64 == bytes);
        if whole && let Some(Share { out, hash, .. }) = shares.pop() {
            return Visit { page, target: Some(out), shared: false, item: Use::Whole(hash) };
        }
        Visit { page, target: None, shared: used < bytes, item: Use::Shares(shares) }
    }
}

/// Writes what a page is for.
fn write_page(visit: Visit<'_, Use<'_>>, page: Page<'_>) -> Result<()> {
    point("payload-read");
    match (visit.item, visit.target, page.bytes) {
        (Use::Whole(hash), Some(target), bytes) => {
            if let Some(bytes) = bytes {
                timed(Stage::Write, || target.copy_from_slice(bytes));
            }
            *hash = page.hash;
        }
        (Use::Shares(shares), _, Some(bytes)) => {
            for share in shares {
                match share.part.kind {
                    PartKind::Bf16Rows => share.dequantise(&page, bytes),
                    PartKind::Int8Rows | PartKind::Scales => share.copy(&page, bytes),
                }
            }
        }
        _ => return Err(Error::invariant("a page came without its bytes")),
    }
    point("mid-fill");
    Ok(())
}

impl Share<'_> {
    /// Bytes of the file that it is made from.
    fn codes(&self) -> u64 {
        self.part.source_of(self.of_part.end - 1) + 1 - self.part.source_of(self.of_part.start)
    }

    fn write_scales(self) {
        let scales: &[u8] = bytemuck::cast_slice(self.scales);
        self.out.copy_from_slice(&scales[self.of_part.start as usize..self.of_part.end as usize]);
        *self.hash = xxh3_64(self.out);
    }

    fn copy(self, page: &Page<'_>, bytes: &[u8]) {
        let from = (self.part.source_of(self.of_part.start) - page.start) as usize;
        timed(Stage::Write, || self.out.copy_from_slice(&bytes[from..from + self.out.len()]));
        *self.hash = timed(Stage::Hash, || xxh3_64(self.out));
    }

    /// Rows and parts of rows, because a page and a chunk can both end in the middle of one.
    fn dequantise(self, page: &Page<'_>, bytes: &[u8]) {
        let inner = self.part.in_features;
        let first = (self.of_part.start / 2) as usize;
        let codes: &[i8] = bytemuck::cast_slice(bytes);
        let out: &mut [bf16] = bytemuck::cast_slice_mut(self.out);
        let mut hasher = Xxh3::new();
        let (mut done, mut start) = (0, Instant::now());
        while done < out.len() {
            let hashed = done;
            while done < out.len() && (done - hashed) * 2 < HASH_BYTES {
                let index = first + done;
                let (row, len) = (index / inner, (inner - index % inner).min(out.len() - done));
                let from = (self.part.source_of(index as u64 * 2) - page.start) as usize;
                quant::dequantize(&codes[from..from + len], self.scales[row], &mut out[done..done + len]);
                done += len;
            }
            let written = Instant::now();
            stages::add(Stage::Write, written - start);
            hasher.update(bytemuck::cast_slice(&out[hashed..done]));
            start = Instant::now();
            stages::add(Stage::Hash, start - written);
        }
        *self.hash = hasher.digest();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use serenity_protocol::config::PayloadForm;
    use std::path::Path;

    use super::*;
    use crate::reader::SlabFile;

    #[test]
    fn the_checksum_made_while_writing_is_that_of_the_payload() {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/goldens");
        let folder = goldens.join("cases/squareq");
        let slab = Slab::open(&folder.join("flux2tiny_int8.safetensors"), &folder.join("flux2tiny_int8.manifest.json")).unwrap();
        let geometry = TransformerGeometry::from_config_file(&goldens.join("model/transformer/config.json")).unwrap();
        for form in [PayloadForm::Bf16, PayloadForm::Int8] {
            for chunk_bytes in [4096, 1 << 20] {
                let layout = SlabLayout::new(&slab, &geometry, form, chunk_bytes).unwrap();
                let mut reader = Reader::new(SlabFile::open(&slab).unwrap());
                let filler = Filler::new(&slab, &geometry, layout.clone(), &mut reader).unwrap();
                for block in &layout.blocks {
                    for chunk in 0..layout.chunks_of(block.block) {
                        let id = ChunkId { block: block.block.0, chunk: chunk as u16 };
                        // Old content must not show.
                        let mut slot = vec![0xa5; filler.chunk_bytes(id).unwrap()];
                        let checksum = filler.fill(id, &mut reader, &mut slot).unwrap();
                        assert_eq!(checksum, layout.payload_checksum(block.block, chunk, &slot).unwrap());
                    }
                }
            }
        }
    }
}
