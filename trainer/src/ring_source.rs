//! Blocks from the ring for the CPU: every chunk is copied out and given back at once.
//!
//! Visits are posted far ahead (a whole step), so the loader knows the future. [`RingSource::next`] leases the block's chunks in order,
//! compares each payload with its checksum, copies it out and gives the slot back: a ring of two slots serves blocks of any
//! size. Failure is that of [`RingClient`].
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device};
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::process::Process;
use serenity_protocol::ring::consumer::Leased;
use serenity_protocol::ring::plan::RingPlan;
use serenity_protocol::slab::layout::BlockLayout;
use serenity_protocol::{Error, Result};

use crate::model::{BlockSource, BlockWeights};
use crate::payload;
use crate::ring_client::RingClient;

/// What the ring cost so far; the telemetry takes differences.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RingStats {
    /// Payload bytes copied out.
    pub bytes: u64,
    /// Seconds spent copying and converting.
    pub copy_seconds: f64,
    /// Seconds spent waiting for chunks.
    pub stall_seconds: f64,
    /// Chunks that had to be waited for.
    pub misses: u64,
    /// Chunks that were there already.
    pub hits: u64,
    /// Slots that are neither READY nor LEASED, at the last chunk.
    pub slots_free: u32,
    /// The others.
    pub slots_in_use: u32,
}

/// The consumer's end of the ring as a [`BlockSource`].
pub struct RingSource {
    ring: RingClient,
    geometry: TransformerGeometry,
    device: Device,
    dtype: DType,
    /// Announced, not yet delivered.
    announced: VecDeque<u16>,
    buffer: Vec<u8>,
    stats: RingStats,
}

impl RingSource {
    /// Waits for the ring of `plan`, and takes the consumer's role in it.
    ///
    /// # Errors
    /// As [`RingClient::open`].
    pub fn open(plan: RingPlan, geometry: TransformerGeometry, device: Device, dtype: DType, process: Process) -> Result<Self> {
        let ring = RingClient::open(plan, process)?;
        Ok(Self { ring, geometry, device, dtype, announced: VecDeque::new(), buffer: Vec::new(), stats: RingStats::default() })
    }

    /// What the ring cost so far.
    #[must_use]
    pub fn stats(&self) -> RingStats {
        self.stats
    }

    /// Says that no more blocks will be asked for, which lets a loader started by hand end.
    pub fn finish(&mut self) {
        self.ring.finish();
    }

    /// The next chunk, waited for if need be.
    fn lease(&mut self) -> Result<Leased> {
        if let Some(leased) = self.ring.poll()? {
            self.stats.hits += 1;
            return Ok(leased);
        }
        let _span = tracing::trace_span!("slot wait").entered();
        self.stats.misses += 1;
        let start = Instant::now();
        let leased = self.ring.take()?;
        self.stats.stall_seconds += start.elapsed().as_secs_f64();
        Ok(leased)
    }

    /// Copies the chunk to its place in the buffer, comparing it with its checksum.
    fn take(&mut self, leased: &Leased, layout: &BlockLayout) -> Result<()> {
        let start = Instant::now();
        let _span = tracing::trace_span!("copy", block = leased.content.block, chunk = leased.content.chunk).entered();
        let range = layout.chunk_range(u32::from(leased.content.chunk), self.ring.plan().layout.chunk_bytes);
        if range.end - range.start != leased.bytes {
            return Err(Error::invariant("a chunk in the ring has another length than the layout gives it")
                .expected(range.end - range.start)
                .found(leased.bytes));
        }
        self.ring.verify(leased)?;
        self.buffer[range.start as usize..range.end as usize].copy_from_slice(self.ring.payload(leased)?);
        self.ring.release(leased)?;
        self.stats.bytes += leased.bytes;
        self.stats.copy_seconds += start.elapsed().as_secs_f64();
        Ok(())
    }
}

impl BlockSource for RingSource {
    fn request(&mut self, visits: &[BlockId]) -> Result<()> {
        let visits: Vec<u16> = visits.iter().map(|b| b.0).collect();
        self.announced.extend(&visits);
        self.ring.request(&visits)
    }

    fn next(&mut self, block: BlockId) -> Result<Arc<BlockWeights>> {
        if self.announced.pop_front() != Some(block.0) {
            return Err(Error::invariant(format!("block {} was visited without being announced next", block.0)));
        }
        let layout = self.ring.plan().layout.block(block)?.clone();
        self.buffer.resize(layout.bytes as usize, 0);
        for _ in 0..self.ring.plan().layout.chunks_of(block) {
            let leased = self.lease()?;
            self.take(&leased, &layout)?;
        }
        (self.stats.slots_in_use, self.stats.slots_free) = self.ring.slots();
        let start = Instant::now();
        let rows = payload::decode(&layout, &self.buffer)?;
        let weights = BlockWeights::from_f32(&self.geometry, block, rows, &self.device, self.dtype)?;
        self.stats.copy_seconds += start.elapsed().as_secs_f64();
        Ok(Arc::new(weights))
    }
}
