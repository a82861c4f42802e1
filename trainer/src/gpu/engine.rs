//! The engine of a GPU: [`CudaStep`] behind the training loop's [`StepEngine`], and the device's memory against what is allowed.
//!
//! The cap is `vram_high_watermark_mb`: context, libraries and arena together, by the driver's own figure. The context's share is measured
//! after opening the device; libraries load some of their kernels at first use, for which 256 MiB is set aside; the rest is the arena's.
//! `auto` is what is free when the device is opened, less 512 MiB.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::time::Instant;

use candle_core::Device;
use serenity_cuda::driver::Pinned;
use serenity_cuda::{Gpu, Ty};
use serenity_protocol::config::{ComputeDtype, Config, MemoryStrategy, OptimizerConfig};
use serenity_protocol::geometry::TransformerGeometry;
use serenity_protocol::plan::available_memory;
use serenity_protocol::process::Process;
use serenity_protocol::ring::plan::RingPlan;
use serenity_protocol::slab::Slab;
use serenity_protocol::slab::layout::SlabLayout;
use serenity_protocol::{Error, Result};

use super::ring_supply::RingSupply;
use super::slab_supply::SlabSupply;
use crate::cuda::CudaStep;
use crate::cuda::blocks::{Payload, Stats, Supply};
use crate::cuda::conditioning::Embedded;
use crate::cuda::flight::FlightSpace;
use crate::cuda::inputs::Turns;
use crate::cuda::plan::{Limits, Measure, Shape};
use crate::cuda::rates;
use crate::cuda::step::Parts;
use crate::data::HostBatch;
use crate::engine::{Computed, Profile, State, StepEngine};
use crate::log::Phases;
use crate::memory::{self, DeviceMemory, MemoryUse};
use crate::model::{AdapterSet, MicroBatch, OtherWeights};
use crate::optimizer::AdamW;
use crate::ring_source::RingStats;
use crate::source::Counters;
use crate::step::count_non_finite;

const MIB: f64 = 1024.0 * 1024.0;
/// Left free on the device where the cap is `auto`.
const MARGIN: u64 = 512 << 20;
/// Bytes of a copy whose rate is measured.
const RATE_BYTES: usize = 512 << 20;
/// Set aside for what the product and attention libraries load at first use: measured on an H100 are 95 to 123 MiB.
const LIBRARIES: u64 = 192 << 20;
/// Part of the host's available memory that activations take unless it is configured.
const OFFLOAD_PART: u64 = 4;
/// The largest context that is believed: on a device that others use too, more than this is theirs.
const CONTEXT_MAX: u64 = 1 << 30;

/// What an engine is made from.
pub struct Opening<'o> {
    /// The configuration.
    pub config: &'o Config,
    /// The model.
    pub geometry: &'o TransformerGeometry,
    /// Weights outside the blocks, on the host.
    pub other: &'o OtherWeights,
    /// Adapters before the first step.
    pub adapters: &'o AdapterSet,
    /// Guidance scale for a model that embeds one.
    pub guidance: Option<f32>,
    /// Samples, text tokens and image tokens of each micro-batch of the largest step.
    pub batches: Vec<(usize, usize, usize)>,
}

/// Page-locked host memory that activations may take.
fn parcels_max(config: &Config) -> usize {
    let auto = || available_memory().unwrap_or(0) / OFFLOAD_PART;
    config.memory.stagehand.activation_offload_bytes.unwrap_or_else(auto) as usize
}

/// Device memory that the process may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Allowance {
    /// By the driver's figure.
    cap: u64,
    /// The context, measured.
    context: u64,
    /// Whether others have memory of the device.
    shared: bool,
}

impl Allowance {
    /// From what the driver said when the context was there and nothing else. `high` is `None` for `auto`, and more than the device has counts as that.
    fn new(high: Option<u64>, free: u64, total: u64) -> Self {
        let used = total.saturating_sub(free);
        let context = used.min(CONTEXT_MAX);
        let all = (free + context).saturating_sub(MARGIN);
        Self { cap: high.filter(|high| *high <= total).unwrap_or(all), context, shared: used > CONTEXT_MAX }
    }

    /// Bytes for the arena, when so many were taken since.
    fn budget(self, used_since: u64) -> usize {
        self.cap.saturating_sub(self.context + used_since + LIBRARIES) as usize
    }
}

/// Trains on a GPU.
pub struct CudaEngine {
    step: CudaStep,
    ring: Option<RingSupply>,
    guidance: Option<f32>,
    optimizer: OptimizerConfig,
    geometry: TransformerGeometry,
    ty: Ty,
    rank: usize,
    allowance: Allowance,
    driver_peak: f64,
    /// Bytes taken between the context and the arena: kernels, workspaces.
    taken_at_open: u64,
    /// When the last step began, and the seconds from one step to the next so far.
    began: Option<Instant>,
    steps: Vec<f64>,
    /// Whether it was said that the device is shared.
    said: bool,
    /// What blocks and ring had done before the step.
    before: (Stats, RingStats),
}

impl CudaEngine {
    /// Opens the device, then the blocks' source (with `memory.strategy` `stagehand` the loader's ring, which is waited for), then takes the
    /// memory.
    ///
    /// # Errors
    /// [`Error::Absent`] without driver, libraries, device or loader; [`Error::Config`] if the allowed memory is too small, with the minimum;
    /// [`Error::TryAgain`] if the device has less than that free.
    pub fn open(ordinal: usize, slab: Slab, opening: &Opening<'_>, process: &Process) -> Result<Self> {
        let config = opening.config;
        let gpu = Gpu::open(ordinal)?;
        process.tick();
        let stagehand = &config.memory.stagehand;
        let resident = config.memory.strategy == MemoryStrategy::Resident;
        let info = gpu.memory()?;
        // Keeping everything is the point of `resident`: the watermarks are those of streaming.
        let high = stagehand.vram_high_bytes.filter(|_| !resident);
        let allowance = Allowance::new(high, info.free + info.used_by_process_estimate, info.total);
        if let Some(high) = high.filter(|high| *high > info.total) {
            tracing::warn!(
                "memory.stagehand.vram_high_watermark_mb is {:.0} MiB, and the device has {:.0}: it counts as \"auto\", {:.0} MiB",
                high as f64 / MIB,
                info.total as f64 / MIB,
                allowance.cap as f64 / MIB
            );
        }
        let budget = allowance.budget(info.used_by_process_estimate);
        let (layout, ring, supply) = supply(&gpu, slab, opening, process)?;
        let payloads = layout.blocks.iter().map(Payload::of).collect::<Result<Vec<_>>>()?;
        let ty = match config.dtype {
            ComputeDtype::F32 => Ty::F32,
            ComputeDtype::Bf16 => Ty::Bf16,
        };
        let parts = Parts {
            geometry: opening.geometry,
            ty,
            other: opening.other,
            adapters: opening.adapters,
            optimizer: &config.optimizer,
            batches: opening.batches.clone(),
            payloads,
            supply,
            budget,
            limits: Limits {
                buffers: (1, stagehand.prefetch_window_blocks + 1),
                parcels_max: parcels_max(config),
                beside: (allowance.context + info.used_by_process_estimate + LIBRARIES) as usize,
                ..Limits::default()
            },
            timed: false,
        };
        let name = gpu.properties().name.clone();
        let step = CudaStep::new(gpu, parts)?;
        let this = Self {
            step,
            ring,
            guidance: opening.guidance,
            optimizer: config.optimizer,
            geometry: opening.geometry.clone(),
            ty,
            rank: opening.adapters.rank,
            allowance,
            driver_peak: 0.0,
            taken_at_open: info.used_by_process_estimate,
            began: None,
            steps: Vec::new(),
            said: false,
            before: Default::default(),
        };
        if resident && this.step.plan().resident.len() < opening.geometry.num_blocks() {
            return Err(Error::config("the device is too small to keep the whole model")
                .found(this.step.plan())
                .advice("set memory.strategy to \"stagehand\": blocks that do not fit are streamed"));
        }
        this.predict(&name);
        Ok(this)
    }

    /// The driver's figure at most, as planned.
    fn predicted_peak(&self) -> u64 {
        self.allowance.cap.min(self.allowance.context + LIBRARIES + self.taken_at_open + self.step.plan().total() as u64)
    }

    fn predict(&self, name: &str) {
        let (plan, peak) = (self.step.plan(), self.predicted_peak());
        tracing::info!(
            "{name}: {} of {} blocks stay on the device; predicted: peak {:.0} MiB of {:.0} allowed, {}",
            plan.resident.len(),
            self.geometry.num_blocks(),
            peak as f64 / MIB,
            self.allowance.cap as f64 / MIB,
            plan.forecast,
        );
    }

    /// The step underneath.
    pub fn step(&mut self) -> &mut CudaStep {
        &mut self.step
    }

    fn place(&self, batches: &[HostBatch]) -> Result<Vec<MicroBatch>> {
        batches.iter().map(|b| b.to_device(&Device::Cpu, self.guidance)).collect()
    }

    fn totals(&self) -> (Stats, RingStats) {
        (self.step.stats(), self.ring.as_ref().map(RingSupply::stats).unwrap_or_default())
    }

    /// What blocks and ring have done since the last call.
    fn moved(&mut self) -> Counters {
        let (blocks, ring) = self.totals();
        let (b, r) = std::mem::replace(&mut self.before, (blocks, ring));
        Counters {
            moved_bytes: blocks.bytes - b.bytes,
            copy_seconds: ring.copy_seconds - r.copy_seconds,
            wait_seconds: ring.stall_seconds - r.stall_seconds,
            waits: blocks.waits - b.waits,
            hits: blocks.hits - b.hits + ring.hits - r.hits,
            misses: ring.misses - r.misses,
            // Every load beyond the first into a buffer takes the place of another block.
            evictions: blocks.loads - b.loads,
            slots_free: u64::from(ring.slots_free),
            slots_in_use: u64::from(ring.slots_in_use),
        }
    }

    /// How many of `batches` can be in flight at once in a pass without gradients: their memory is part of what the plan gave to a step.
    fn pass_len(&self, batches: &[HostBatch]) -> Result<usize> {
        let (measure, turns) = (Measure::default(), Turns::new(self.geometry.num_blocks() + 1, 2));
        for (i, b) in batches.iter().enumerate() {
            let shape = Shape::new(&self.geometry, self.ty, self.rank, b.sigma.len(), b.text_tokens(), b.image_tokens());
            // A pass embeds all its samples at once, which takes no more.
            let embedded = Embedded::new(&measure, &self.geometry, shape.samples)?;
            FlightSpace::new(&measure, &self.geometry, &shape, &embedded, turns)?;
            if measure.total() > self.step.plan().step {
                return Ok(i.max(1));
            }
        }
        Ok(batches.len())
    }
}

/// The layout of the payloads, and where they come from.
fn supply(gpu: &Gpu, slab: Slab, opening: &Opening<'_>, process: &Process) -> Result<(SlabLayout, Option<RingSupply>, Box<dyn Supply>)> {
    let config = opening.config;
    match config.memory.strategy {
        MemoryStrategy::Stagehand => {
            let plan = RingPlan::new(config, &slab, opening.geometry)?;
            let layout = plan.layout.clone();
            let ring = RingSupply::open(gpu, plan, process.clone())?;
            Ok((layout, Some(ring.clone()), Box::new(ring)))
        }
        MemoryStrategy::Resident => {
            let stagehand = &config.memory.stagehand;
            let layout = SlabLayout::new(&slab, opening.geometry, stagehand.form, stagehand.chunk_bytes)?;
            let supply = SlabSupply::open(gpu, slab, layout.clone(), process.clone())?;
            Ok((layout, None, Box::new(supply)))
        }
    }
}

impl StepEngine for CudaEngine {
    fn device(&self) -> String {
        self.step.gpu().properties().name.clone()
    }

    fn load(&mut self, adapters: AdapterSet, optimizer: AdamW) -> Result<()> {
        self.step.load(&adapters, optimizer.updates(), Some(optimizer.moments()))
    }

    fn gradients(&mut self, batches: &[HostBatch], process: &Process) -> Result<Computed> {
        let started = Instant::now();
        self.steps.extend(self.began.replace(started).map(|b| (started - b).as_secs_f64()));
        self.moved();
        let batches = self.place(batches)?;
        let placed = started.elapsed().as_secs_f64();
        let stop = || {
            process.tick();
            process.stop_requested()
        };
        let losses = self.step.gradients(&batches, &stop)?;
        let passes = started.elapsed().as_secs_f64() - placed;
        let clip_started = Instant::now();
        let grad_norm = self.step.norm()?;
        let moved = self.moved();
        let loss = losses.iter().sum::<f64>() / losses.len().max(1) as f64;
        let returned_bytes = 8 * (losses.len() as u64 + 1);
        let mut result = Computed { loss, grad_norm, returned_bytes, moved, ..Computed::default() };
        if loss.is_finite() && grad_norm.is_finite() {
            losses.iter().for_each(|l| result.look(*l));
        } else {
            count_non_finite(&mut result, &losses, &self.step.read_gradients()?)?;
        }
        result.phases = Phases {
            data: placed,
            wait: moved.wait_seconds,
            // Copies overlap with the passes: their time is in the telemetry (`moved`), and no part of this sum.
            copy: 0.0,
            forward: 0.0,
            backward: (passes - moved.wait_seconds).max(0.0),
            optimizer: clip_started.elapsed().as_secs_f64(),
            validation: 0.0,
        };
        Ok(result)
    }

    fn apply(&mut self, computed: &mut Computed, lr: f64) -> Result<()> {
        let started = Instant::now();
        self.step.update(lr)?;
        computed.phases.optimizer += started.elapsed().as_secs_f64();
        Ok(())
    }

    fn losses(&mut self, batches: &[HostBatch], _process: &Process) -> Result<Vec<f64>> {
        // The supply hears of a stop at every visit.
        let mut losses = Vec::with_capacity(batches.len());
        let mut rest = batches;
        while !rest.is_empty() {
            let (pass, later) = rest.split_at(self.pass_len(rest)?);
            losses.extend(self.step.loss(&self.place(pass)?)?);
            rest = later;
        }
        Ok(losses)
    }

    fn state(&self) -> Result<State<'_>> {
        let state = self.step.state()?;
        let optimizer = AdamW::restore(&self.optimizer, &state.adapters, state.updates, state.moments)?;
        Ok(State { adapters: Cow::Owned(state.adapters), optimizer: Cow::Owned(optimizer) })
    }

    fn memory(&mut self) -> Result<MemoryUse> {
        let (allocated, info) = self.step.memory()?;
        let driver = (self.allowance.context + info.used_by_process_estimate) as f64 / MIB;
        self.driver_peak = self.driver_peak.max(driver);
        let device = DeviceMemory {
            allocated: allocated as f64 / MIB,
            arena: self.step.plan().total() as f64 / MIB,
            driver,
            driver_peak: self.driver_peak,
            cap: self.allowance.cap as f64 / MIB,
            shared: self.allowance.shared,
        };
        if device.shared && device.driver > device.cap && !self.said {
            self.said = true;
            tracing::warn!(
                "the driver counts {driver:.0} MiB since this run began, above the {:.0} allowed; others use this device too",
                device.cap
            );
        }
        Ok(MemoryUse { device: Some(device), ..memory::current() })
    }

    fn profile(&mut self, batches: &[HostBatch], process: &Process) -> Result<Option<Profile>> {
        let before = self.step.bytes_from_host();
        self.step.measure(true);
        let mut computed = self.gradients(batches, process)?;
        self.apply(&mut computed, 0.0)?;
        let (times_ms, host_ms) = (self.step.times()?, self.step.host_times());
        self.step.measure(false);
        let bytes = self.step.bytes_from_host() - before;
        let gpu = self.step.gpu();
        let host = Pinned::new(gpu.context(), RATE_BYTES)?;
        let rates = rates::measure(gpu, &self.geometry, batches.first().map_or(1, HostBatch::tokens), &host)?;
        let flop = self.step.plan().forecast.flops;
        Ok(Some(Profile { flop, flop_per_s: rates.flops, bytes, bytes_per_s: rates.bus, times_ms, host_ms }))
    }

    fn finish(&mut self) {
        if let Some(ring) = &self.ring {
            ring.finish();
        }
        self.steps.sort_by(f64::total_cmp);
        if let Some(median) = self.steps.get(self.steps.len() / 2) {
            tracing::info!(
                "from step to step {median:.4} s in the middle, predicted {:.4} for a card like an H100; peak {:.0} MiB, predicted {:.0}",
                self.step.plan().forecast.seconds,
                self.driver_peak,
                self.predicted_peak() as f64 / MIB,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn the_arena_gets_what_context_and_libraries_leave() {
        let gib = |n: u64| n << 30;
        let own = Allowance::new(Some(gib(6)), gib(80) - (500 << 20), gib(80));
        assert_eq!(own.budget(0) as u64, gib(6) - (500 << 20) - LIBRARIES);
        // Others have 40 GiB: they are not taken for our context.
        let shared = Allowance::new(Some(gib(6)), gib(40), gib(80));
        assert_eq!(shared.budget(0) as u64, gib(6) - CONTEXT_MAX - LIBRARIES);
        let auto = Allowance::new(None, gib(40), gib(80));
        assert!(auto.cap + MARGIN <= gib(41) && auto.budget(0) as u64 + LIBRARIES + MARGIN <= gib(40));
        assert_eq!(Allowance::new(Some(1 << 20), gib(79), gib(80)).budget(0), 0);
        // A card that is smaller than what is asked: as much as it has.
        assert_eq!(Allowance::new(Some(gib(20)), gib(11), gib(12)).cap, Allowance::new(None, gib(11), gib(12)).cap);
        assert_eq!(Allowance::new(Some(gib(12)), gib(11), gib(12)).cap, gib(12));
    }
}
