//! What both ends of a ring derive from the configuration and the slab: its shape, its payloads, its chunks.

use super::producer::Catalogue;
use super::segment::RingSpec;
use super::words::CHUNKS_MAX;
use crate::config::{Config, PayloadForm};
use crate::error::{Error, Result};
use crate::geometry::TransformerGeometry;
use crate::slab::Slab;
use crate::slab::layout::SlabLayout;

/// Shape of a ring and layout of what travels in it. Loader and trainer build it independently; the segment's header and the slab's
/// signature prove that they built the same.
#[derive(Debug, Clone)]
pub struct RingPlan {
    /// Shape of the ring.
    pub spec: RingSpec,
    /// Payloads and chunks.
    pub layout: SlabLayout,
    /// Which of the ring's consumers a trainer with this plan is.
    pub consumer: usize,
}

impl RingPlan {
    /// The plan of a configuration for an opened slab.
    ///
    /// # Errors
    /// [`Error::Data`] if the slab is not of this model, [`Error::Config`] where the pool's size is still to be chosen (`auto`).
    pub fn new(config: &Config, slab: &Slab, geometry: &TransformerGeometry) -> Result<Self> {
        let stagehand = &config.memory.stagehand;
        let pool_bytes = stagehand.pool_bytes.ok_or_else(|| {
            Error::config(
                "`memory.stagehand.pinned_pool_mb` is \"auto\", which only serenity-launch can choose: both ends of the ring need one size",
            )
            .expected("a size in MiB")
            .advice("start serenity-launch, or add --set memory.stagehand.pinned_pool_mb=SIZE to every process")
        })?;
        let slots = (pool_bytes / stagehand.chunk_bytes) as usize;
        let mut plan = Self::with(super::name(config), slab, geometry, stagehand.form, slots, stagehand.chunk_bytes)?;
        (plan.spec.consumers, plan.consumer) = (stagehand.consumers, stagehand.consumer);
        Ok(plan)
    }

    /// The same from its parts, for one consumer.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with(
        name: String,
        slab: &Slab,
        geometry: &TransformerGeometry,
        form: PayloadForm,
        slots: usize,
        chunk_bytes: u64,
    ) -> Result<Self> {
        slab.check_model(geometry)?;
        let layout = SlabLayout::new(slab, geometry, form, chunk_bytes)?;
        let spec = RingSpec { name, slots, chunk_bytes, signature: slab.signature(), form, blocks: geometry.num_blocks(), consumers: 1 };
        Ok(Self { spec, layout, consumer: 0 })
    }

    /// Chunks of every block, for the state machines.
    ///
    /// # Errors
    /// [`Error::Config`] if a block has more chunks than the ring can name.
    pub fn catalogue(&self) -> Result<Catalogue> {
        let mut chunks = Vec::with_capacity(self.layout.blocks.len());
        for block in &self.layout.blocks {
            let count = self.layout.chunks_of(block.block) as usize;
            if count > CHUNKS_MAX {
                return Err(Error::config("memory.stagehand.ring_chunk_mb is too small: a block has too many chunks")
                    .expected(format!("at most {CHUNKS_MAX} chunks"))
                    .found(count));
            }
            chunks.push(count as u16);
        }
        Ok(Catalogue { chunks, signature: self.spec.signature })
    }
}
