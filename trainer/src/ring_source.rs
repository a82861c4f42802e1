//! Blocks from the ring: the consumer's end, and the only place where the trainer touches shared memory.
//!
//! Visits are posted far ahead (a whole step), so the loader knows the future. [`RingSource::next`] leases the block's chunks in order,
//! compares each payload with its checksum, copies it out and gives the slot back at once: a ring of two slots serves blocks of any
//! size. A loader that dies leaves us waiting for its successor; a payload that is not what its descriptor says ends the process with
//! exit 70 before a weight of it is used.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::process::Process;
use serenity_protocol::ring::consumer::{Consumer, Leased};
use serenity_protocol::ring::plan::RingPlan;
use serenity_protocol::ring::segment::{RingRole, Segment};
use serenity_protocol::ring::words::{Words, consumer, loader};
use serenity_protocol::slab::layout::BlockLayout;
use serenity_protocol::{Error, Result};

use crate::model::{BlockSource, BlockWeights};
use crate::payload;

/// How long a trainer started by hand waits for a loader; under a launcher it waits until it is told to stop.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a ring of another shape may stand in the place of ours while a new loader replaces it.
const REPLACEMENT: Duration = Duration::from_secs(5);

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
    segment: Segment,
    ring: Consumer<Segment>,
    plan: RingPlan,
    geometry: TransformerGeometry,
    device: Device,
    dtype: DType,
    process: Process,
    /// Announced, not yet posted.
    backlog: VecDeque<u16>,
    /// Announced, not yet delivered.
    announced: VecDeque<u16>,
    buffer: Vec<u8>,
    stats: RingStats,
}

impl RingSource {
    /// Waits for the ring of `plan`, and takes the consumer's role in it.
    ///
    /// # Errors
    /// [`Error::Absent`] if no loader comes (without a launcher) or another trainer has the role, [`Error::Data`] if the ring there is of
    /// another slab, [`Error::TryAgain`] if a stop is requested meanwhile.
    pub fn open(plan: RingPlan, geometry: TransformerGeometry, device: Device, dtype: DType, process: Process) -> Result<Self> {
        let start = Instant::now();
        let segment = loop {
            match Segment::open(&plan.spec) {
                Ok(Some(segment)) => break segment,
                Ok(None) => {}
                // A loader may be about to replace what an earlier run left there.
                Err(error @ Error::Data(_)) if start.elapsed() > REPLACEMENT => return Err(error),
                Err(Error::Data(_)) => {}
                Err(error) => return Err(error),
            }
            if process.stop_requested() {
                return Err(process.interrupted());
            }
            if !process.has_launcher() && start.elapsed() > PATIENCE {
                return Err(Error::absent("no loader has opened the ring")
                    .at(plan.spec.path())
                    .advice("start serenity-loader with the same configuration, or run everything with serenity-launch"));
            }
            process.tick();
            std::thread::sleep(Duration::from_millis(20));
        };
        segment.sign(RingRole::Consumer);
        let ring = Consumer::attach(segment.clone(), segment.shape(), plan.catalogue()?)?;
        segment.wake(loader::WAKE);
        Ok(Self {
            segment,
            ring,
            plan,
            geometry,
            device,
            dtype,
            process,
            backlog: VecDeque::new(),
            announced: VecDeque::new(),
            buffer: Vec::new(),
            stats: RingStats::default(),
        })
    }

    /// What the ring cost so far.
    #[must_use]
    pub fn stats(&self) -> RingStats {
        self.stats
    }

    /// Says that no more blocks will be asked for, which lets a loader started by hand end.
    pub fn finish(&mut self) {
        self.ring.finish();
        self.segment.wake(loader::WAKE);
    }

    fn post(&mut self) -> Result<()> {
        if self.backlog.is_empty() {
            return Ok(());
        }
        let posted = self.ring.post(self.backlog.make_contiguous())?;
        if posted > 0 {
            self.backlog.drain(..posted);
            self.segment.wake(loader::WAKE);
        }
        Ok(())
    }

    /// The next chunk, waited for if need be.
    fn lease(&mut self) -> Result<Leased> {
        let ticket = self.segment.ticket(consumer::WAKE);
        if let Some(leased) = self.ring.try_lease()? {
            self.stats.hits += 1;
            return Ok(leased);
        }
        let _span = tracing::trace_span!("slot wait").entered();
        self.stats.misses += 1;
        let start = Instant::now();
        let mut ticket = ticket;
        let mut orphaned: Option<Instant> = None;
        loop {
            if self.process.stop_requested() {
                return Err(self.process.interrupted());
            }
            self.segment.wait(consumer::WAKE, ticket);
            self.process.tick();
            ticket = self.segment.ticket(consumer::WAKE);
            if let Some(leased) = self.ring.try_lease()? {
                self.stats.stall_seconds += start.elapsed().as_secs_f64();
                return Ok(leased);
            }
            if self.segment.is_held(RingRole::Loader) {
                orphaned = None;
            } else if orphaned.is_none() {
                tracing::warn!("the loader is gone; waiting for another one");
                orphaned = Some(Instant::now());
            }
            if !self.process.has_launcher() && orphaned.is_some_and(|since| since.elapsed() > PATIENCE) {
                return Err(Error::absent("the loader is gone and no other one came")
                    .at(self.plan.spec.path())
                    .advice("start serenity-loader with the same configuration: training goes on where it stopped"));
            }
        }
    }

    /// Copies the chunk to its place in the buffer, comparing it with its checksum.
    fn take(&mut self, leased: &Leased, layout: &BlockLayout) -> Result<()> {
        let start = Instant::now();
        let _span = tracing::trace_span!("copy", block = leased.content.block, chunk = leased.content.chunk).entered();
        let range = layout.chunk_range(u32::from(leased.content.chunk), self.plan.layout.chunk_bytes);
        if range.end - range.start != leased.bytes {
            return Err(Error::invariant("a chunk in the ring has another length than the layout gives it")
                .expected(range.end - range.start)
                .found(leased.bytes));
        }
        // SAFETY: the slot is leased to this consumer until `release` below; nobody writes a leased slot.
        let payload = unsafe { self.segment.slot_payload(leased.slot, leased.bytes) };
        if self.plan.layout.payload_checksum(layout.block, u32::from(leased.content.chunk), payload)? != leased.checksum {
            self.ring.release_corrupt(leased)?;
            return Err(Error::invariant(format!(
                "block {} chunk {} in the ring does not have the checksum that it was published with",
                leased.content.block, leased.content.chunk
            ))
            .at(self.plan.spec.path())
            .advice("nothing of it was used; go on from the last checkpoint, and check this machine's memory if it happens again"));
        }
        self.buffer[range.start as usize..range.end as usize].copy_from_slice(payload);
        self.ring.release(leased)?;
        self.segment.wake(loader::WAKE);
        self.stats.bytes += leased.bytes;
        self.stats.copy_seconds += start.elapsed().as_secs_f64();
        Ok(())
    }

    fn count_slots(&mut self) {
        use serenity_protocol::ring::words::{SlotWord, State, slot};
        let shape = self.segment.shape();
        let in_use = (0..shape.slots)
            .filter_map(|i| SlotWord::unpack(self.segment.load(shape.slot(i) + slot::STATE)))
            .filter(|w| matches!(w.state, State::Ready | State::Leased))
            .count();
        self.stats.slots_in_use = in_use as u32;
        self.stats.slots_free = (shape.slots - in_use) as u32;
    }
}

impl BlockSource for RingSource {
    fn request(&mut self, visits: &[BlockId]) -> Result<()> {
        self.backlog.extend(visits.iter().map(|b| b.0));
        self.announced.extend(visits.iter().map(|b| b.0));
        self.post()
    }

    fn next(&mut self, block: BlockId) -> Result<Arc<BlockWeights>> {
        if self.announced.pop_front() != Some(block.0) {
            return Err(Error::invariant(format!("block {} was visited without being announced next", block.0)));
        }
        self.post()?;
        let layout = self.plan.layout.block(block)?.clone();
        self.buffer.resize(layout.bytes as usize, 0);
        for _ in 0..self.plan.layout.chunks_of(block) {
            let leased = self.lease()?;
            self.take(&leased, &layout)?;
        }
        self.count_slots();
        let start = Instant::now();
        let rows = payload::decode(&layout, &self.buffer)?;
        let weights = BlockWeights::from_f32(&self.geometry, block, rows, &self.device, self.dtype)?;
        self.stats.copy_seconds += start.elapsed().as_secs_f64();
        Ok(Arc::new(weights))
    }
}

impl Drop for RingSource {
    fn drop(&mut self) {
        self.segment.clone().leave();
    }
}
