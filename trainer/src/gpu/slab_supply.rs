//! Payloads from the slab itself, for blocks that stay on the device: each is read once, checked page by page, and copied through two
//! page-locked halves while the next piece is read.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fs::File;

use half::bf16;
use rayon::prelude::*;
use serenity_cuda::driver::Pinned;
use serenity_cuda::{Event, Gpu, Ptr};
use serenity_protocol::geometry::BlockId;
use serenity_protocol::process::Process;
use serenity_protocol::slab::layout::{Part, PartKind, SlabLayout};
use serenity_protocol::slab::{Slab, SlabLayer, quant};
use serenity_protocol::{Error, Result};

use crate::cuda::blocks::Supply;
use crate::slab_source::read_checked;

/// Bytes of a half.
const HALF: usize = 32 << 20;

/// A slab as a [`Supply`].
pub struct SlabSupply {
    slab: Slab,
    file: File,
    layout: SlabLayout,
    process: Process,
    halves: Pinned,
    /// Behind the last copy out of each half.
    last: [Event; 2],
    next: usize,
    due: VecDeque<BlockId>,
}

impl SlabSupply {
    /// Of an opened slab, in the form of `layout`.
    ///
    /// # Errors
    /// [`Error::Absent`] if the slab cannot be read, [`Error::TryAgain`] if there is no page-locked memory.
    pub fn open(gpu: &Gpu, slab: Slab, layout: SlabLayout, process: Process) -> Result<Self> {
        if slab.pages().is_none() {
            tracing::info!(
                "this slab has no page hashes: its content cannot be proven (rebuild it with `serenity-slab build` to have them)"
            );
        }
        let file = File::open(slab.path()).map_err(|e| Error::io("cannot open the slab", slab.path(), e))?;
        let event = || Event::new(gpu.context());
        let (halves, last) = (Pinned::new(gpu.context(), 2 * HALF)?, [event()?, event()?]);
        Ok(Self { slab, file, layout, process, halves, last, next: 0, due: VecDeque::new() })
    }

    fn bytes_of(&self, part: &Part) -> Result<Vec<u8>> {
        let layer = self.slab.layer(&part.linear);
        let layer = layer.ok_or_else(|| Error::data(format!("the slab lacks '{}'", part.linear)).at(self.slab.path()))?;
        let bytes = match part.kind {
            PartKind::Int8Rows => read_checked(&self.file, &self.slab, &layer.qweight)?,
            PartKind::Scales => read_checked(&self.file, &self.slab, &layer.scale)?,
            PartKind::Bf16Rows => self.dequantised(layer)?,
        };
        if bytes.len() as u64 != part.bytes {
            return Err(Error::invariant(format!("'{}' has another size than its place", part.linear))
                .at(self.slab.path())
                .expected(part.bytes)
                .found(bytes.len()));
        }
        Ok(bytes)
    }

    fn dequantised(&self, layer: &SlabLayer) -> Result<Vec<u8>> {
        let codes = read_checked(&self.file, &self.slab, &layer.qweight)?;
        let scales = read_checked(&self.file, &self.slab, &layer.scale)?;
        let (stored, columns) = (layer.padded_in, layer.in_features);
        let rows = codes.par_chunks_exact(stored.max(1)).zip(scales.par_chunks_exact(4));
        let row = |(codes, scale): (&[u8], &[u8])| -> Vec<u8> {
            let scale = scale.first_chunk::<4>().map_or(f32::NAN, |s| f32::from_le_bytes(*s));
            let mut out = vec![bf16::ZERO; columns];
            quant::dequantize(bytemuck::cast_slice(codes.get(..columns).unwrap_or_default()), scale, &mut out);
            bytemuck::cast_slice(&out).to_vec()
        };
        Ok(rows.map(row).collect::<Vec<_>>().concat())
    }

    fn send(&mut self, gpu: &Gpu, to: Ptr, bytes: &[u8]) -> Result<()> {
        for (i, piece) in bytes.chunks(HALF).enumerate() {
            let (half, event) = (self.next, self.last.get(self.next));
            let event = event.ok_or_else(|| Error::invariant("a page-locked half is not there"))?;
            self.halves.write_after(event, half * HALF, piece)?;
            gpu.copy().copy_in(to.offset(i * HALF), &self.halves, half * HALF, piece.len())?;
            gpu.copy().record(event)?;
            self.next = 1 - half;
        }
        Ok(())
    }
}

impl Supply for SlabSupply {
    fn announce(&mut self, loads: &[BlockId]) -> Result<()> {
        self.due.extend(loads);
        Ok(())
    }

    /// One part of the payload.
    fn copy(&mut self, gpu: &Gpu, block: BlockId, to: Ptr, done: usize, _wait: bool) -> Result<usize> {
        if self.process.stop_requested() {
            return Err(self.process.interrupted());
        }
        self.process.tick();
        if self.due.front() != Some(&block) {
            return Err(Error::invariant(format!("block {} is not the load that is due", block.0)));
        }
        let _span = tracing::info_span!("read", block = block.0).entered();
        let layout = self.layout.block(block)?.clone();
        let mut rest = layout.parts.iter().filter(|p| p.offset as usize + p.bytes as usize > done);
        let part = rest.next().ok_or_else(|| Error::invariant("a payload was read beyond its end"))?;
        let bytes = self.bytes_of(part)?;
        self.send(gpu, to.offset(part.offset as usize), &bytes)?;
        let end = rest.next().map_or(layout.bytes, |p| p.offset) as usize;
        if end >= layout.bytes as usize {
            self.due.pop_front();
        }
        Ok(end.saturating_sub(done))
    }

    fn poll(&mut self) -> Result<()> {
        if self.process.stop_requested() {
            return Err(self.process.interrupted());
        }
        self.process.tick();
        Ok(())
    }
}
