//! Where a run's blocks come from, and what it cost: the trait that the training loop sees, and the wrapper that measures it.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use serenity_protocol::geometry::BlockId;
use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result};

use crate::model::{BlockSource, BlockWeights};
use crate::ring_source::RingSource;

/// What a source has done since it was opened. Times are host wall time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counters {
    /// Bytes brought into the device's memory (out of the ring into tensors, on the CPU).
    pub moved_bytes: u64,
    /// Seconds spent doing so, dequantisation by the trainer included.
    pub copy_seconds: f64,
    /// Seconds in which a visit waited for its block.
    pub wait_seconds: f64,
    /// Visits that waited.
    pub waits: u64,
    /// Visits whose block was there when it was needed.
    pub hits: u64,
    /// Visits whose block was not.
    pub misses: u64,
    /// Blocks dropped from the device to make room.
    pub evictions: u64,
    /// Slots of the ring that are free.
    pub slots_free: u64,
    /// Slots of the ring in use.
    pub slots_in_use: u64,
}

/// A [`BlockSource`] that a run can be trained from.
pub trait TrainingSource: BlockSource {
    /// Totals since the source was opened; `slots_*` are of now.
    fn counters(&self) -> Counters;

    /// Says that the run is over: no more blocks will be asked for.
    fn finish(&mut self) {}
}

impl TrainingSource for RingSource {
    fn counters(&self) -> Counters {
        let stats = self.stats();
        Counters {
            moved_bytes: stats.bytes,
            copy_seconds: stats.copy_seconds,
            wait_seconds: stats.stall_seconds,
            waits: stats.misses,
            hits: stats.hits,
            misses: stats.misses,
            // Blocks leave as soon as their visit is over: none is ever dropped to make room.
            evictions: 0,
            slots_free: u64::from(stats.slots_free),
            slots_in_use: u64::from(stats.slots_in_use),
        }
    }

    fn finish(&mut self) {
        RingSource::finish(self);
    }
}

/// The announced visits, checked against the visits made.
#[derive(Debug, Default)]
pub struct Announced(std::collections::VecDeque<BlockId>);

impl Announced {
    /// Appends visits to come.
    pub fn extend(&mut self, visits: &[BlockId]) {
        self.0.extend(visits);
    }

    /// Takes the next one, which must be to `block`.
    ///
    /// # Errors
    /// [`Error::Invariant`] if it is not.
    pub fn take(&mut self, block: BlockId) -> Result<()> {
        let next = self.0.pop_front();
        if next == Some(block) {
            return Ok(());
        }
        Err(Error::invariant("a block was visited that was not announced next").expected(format!("{next:?}")).found(format!("{block:?}")))
    }
}

/// Passes on to a source, counts time and visits, tells the launcher at each visit that the trainer is alive, and abandons the work when
/// the process is asked to stop.
pub struct Metered<'s> {
    source: &'s mut dyn TrainingSource,
    process: &'s Process,
    forward_visits: usize,
    /// Seconds inside of the source in the first pass over the blocks: waiting and copying.
    pub forward_seconds: f64,
    /// The same in the visits after that.
    pub backward_seconds: f64,
    /// Visits made.
    pub visits: usize,
    /// Weights that were delivered in a wider type than the slab's bfloat16.
    pub promotions: u64,
}

impl<'s> Metered<'s> {
    /// Wraps `source` for one step, whose first `forward_visits` visits are the forward pass.
    #[must_use]
    pub fn new(source: &'s mut dyn TrainingSource, process: &'s Process, forward_visits: usize) -> Self {
        Self { source, process, forward_visits, forward_seconds: 0.0, backward_seconds: 0.0, visits: 0, promotions: 0 }
    }
}

impl BlockSource for Metered<'_> {
    fn request(&mut self, visits: &[BlockId]) -> Result<()> {
        self.source.request(visits)
    }

    fn next(&mut self, block: BlockId) -> Result<Arc<BlockWeights>> {
        if self.process.stop_requested() {
            return Err(self.process.interrupted());
        }
        self.process.tick();
        let started = Instant::now();
        let weights = self.source.next(block)?;
        let seconds = started.elapsed().as_secs_f64();
        if self.visits < self.forward_visits {
            self.forward_seconds += seconds
        } else {
            self.backward_seconds += seconds
        }
        self.visits += 1;
        self.promotions += weights.widened() as u64;
        Ok(weights)
    }
}
