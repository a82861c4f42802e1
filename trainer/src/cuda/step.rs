//! The state of training on a device, and a step of it: gradients, norm, update. The passes themselves are in `passes`.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::rc::Rc;

use serenity_cuda::driver::Pinned;
use serenity_cuda::ops::loss::MSE_PARTIALS;
use serenity_cuda::{Arena, Gpu, Mat, MemoryInfo, Ptr, Tuning, Ty};
use serenity_protocol::config::OptimizerConfig;
use serenity_protocol::geometry::{BlockId, LinearSpec, TransformerGeometry};
use serenity_protocol::{Error, Result};

use super::adapters::Adapters;
use super::attention::Engines;
use super::blocks::{Blocks, Payload, Stats, Supply};
use super::clock::{Clock, HostTimes, Stage, Times};
use super::conditioning::Other;
use super::flight::Flight;
pub use super::flight::Sample;
use super::inputs::Traffic;
use super::linear::Context;
use super::plan::{Forecast, Limits, Need, Plan, Rates, Shape};
use super::tiles::Tiles;
use crate::model::ops::rope::{Position, Rope};
use crate::model::{AdapterGrads, AdapterSet, MicroBatch, OtherWeights};
use crate::optimizer::Moments;

/// What a [`CudaStep`] is made from.
pub struct Parts<'p> {
    /// The model.
    pub geometry: &'p TransformerGeometry,
    /// bf16 for training, float32 for comparison.
    pub ty: Ty,
    /// Weights outside the blocks, on the host.
    pub other: &'p OtherWeights,
    /// Adapters to start with.
    pub adapters: &'p AdapterSet,
    /// The optimiser.
    pub optimizer: &'p OptimizerConfig,
    /// Micro-batches of the largest step: samples, text tokens, image tokens of each.
    pub batches: Vec<(usize, usize, usize)>,
    /// Payloads of the blocks.
    pub payloads: Vec<Payload>,
    /// Where they come from.
    pub supply: Box<dyn Supply>,
    /// Bytes of device memory for all of it.
    pub budget: usize,
    /// What else is asked of the plan.
    pub limits: Limits,
    /// Whether the device's time is measured by phase.
    pub timed: bool,
}

/// The adapters' state on the host.
#[derive(Debug)]
pub struct State {
    /// Parameters.
    pub adapters: AdapterSet,
    /// Moments of A and B of each adapter.
    pub moments: Vec<(Moments, Moments)>,
    /// Updates made.
    pub updates: u64,
}

/// Called after each block with its output: all rows as they lie (text rows first for a double block, joint order for a single one).
pub type Observer<'o> = &'o mut dyn FnMut(BlockId, &Shape, Mat) -> Result<()>;

/// Called with each micro-batch between the passes.
pub type Watch<'w> = &'w mut dyn FnMut(&Gpu, &Flight) -> Result<()>;

/// The state of training on a device.
pub struct CudaStep {
    // In the order in which they must go: buffers and events, then memory, then the device.
    pub(super) blocks: Blocks,
    /// Whether the forward visits of the next pass have been announced.
    pub(super) ahead: bool,
    pub(super) traffic: Traffic,
    /// Of activations.
    pub(super) parcels: Traffic,
    pub(super) engines: Vec<((usize, usize, usize), Engines)>,
    pub(super) ropes: Vec<(Vec<Position>, Rc<Rope>)>,
    pub(super) adapters: Adapters,
    pub(super) other: Other,
    pub(super) clock: Clock,
    pub(super) geometry: TransformerGeometry,
    pub(super) ty: Ty,
    pub(super) rank: usize,
    pub(super) tile: Tiles,
    pub(super) scratch: Ptr,
    pub(super) plan: Plan,
    /// Of the largest step.
    shapes: Vec<Shape>,
    targets: Vec<LinearSpec>,
    pub(super) arena: Arena,
    pub(super) gpu: Gpu,
}

/// Bytes that the plan needs, found on a device.
fn make_plan(gpu: &Gpu, p: &Parts<'_>, targets: &[LinearSpec]) -> Result<(Plan, Vec<Shape>)> {
    let mut shapes = Vec::new();
    for (samples, text, image) in &p.batches {
        let mut shape = Shape::new(p.geometry, p.ty, p.adapters.rank, *samples, *text, *image);
        shape.workspace = Engines::new(gpu, &shape)?.workspace_bytes();
        shapes.push(shape);
    }
    let payloads = &p.payloads;
    let plan = Plan::new(&Need { geometry: p.geometry, ty: p.ty, shapes: &shapes, targets, payloads, budget: p.budget, limits: p.limits })?;
    Ok((plan, shapes))
}

/// Page-locked memory of the host that a plan wants, in the order in which it is taken.
struct Locked {
    hosted: Option<Pinned>,
    traffic: Traffic,
    parcels: Traffic,
}

/// What is planned without when the host has no page-locked memory for it.
#[derive(Debug, Clone, Copy)]
enum GiveUp {
    Hosted,
    Inputs,
    Parcels,
}

impl Locked {
    /// Takes it, or says what there is no memory for.
    fn new(gpu: &Gpu, plan: &Plan) -> Result<Self, (GiveUp, Error)> {
        let without = |what: GiveUp| move |e: Error| (what, e);
        let hosted = (plan.hosted_bytes > 0).then(|| Pinned::new(gpu.context(), plan.hosted_bytes)).transpose();
        let hosted = hosted.map_err(without(GiveUp::Hosted))?;
        let traffic = Traffic::new(gpu, plan.turns, plan.host).map_err(without(GiveUp::Inputs))?;
        let parcels = Traffic::new(gpu, plan.parcels, plan.parcel_host).map_err(without(GiveUp::Parcels))?;
        Ok(Self { hosted, traffic, parcels })
    }
}

impl GiveUp {
    fn consequence(self) -> &'static str {
        match self {
            GiveUp::Hosted => "all weights outside the blocks are kept on the device",
            GiveUp::Inputs => "block inputs are kept on the device",
            GiveUp::Parcels => "activations are computed again instead of waiting on the host",
        }
    }

    fn limit(self, limits: &mut Limits) {
        match self {
            GiveUp::Hosted => (limits.hosted_max, limits.hosted) = (0, None),
            GiveUp::Inputs => (limits.host_max, limits.turns) = (0, None),
            GiveUp::Parcels => (limits.parcels_max, limits.travelling) = (0, None),
        }
    }
}

impl CudaStep {
    /// Plans, takes the memory, and copies what is resident.
    ///
    /// # Errors
    /// [`Error::Config`] if the budget is too small; [`Error::TryAgain`] if the device has less than that free; the driver's.
    pub fn new(gpu: Gpu, mut parts: Parts<'_>) -> Result<Self> {
        let specs: HashMap<String, LinearSpec> =
            parts.geometry.blocks().flat_map(|b| parts.geometry.block_linears(b)).map(|l| (l.name.clone(), l)).collect();
        let mut targets = Vec::new();
        for adapter in &parts.adapters.adapters {
            let spec = specs.get(&adapter.name);
            let fits = |s: &&LinearSpec| {
                adapter.a.dims() == [parts.adapters.rank, s.in_features] && adapter.b.dims() == [s.out_features, parts.adapters.rank]
            };
            let spec = spec.filter(fits).ok_or_else(|| Error::data(format!("the adapter of '{}' fits no block linear", adapter.name)))?;
            targets.push(spec.clone());
        }
        let (plan, shapes, locked) = loop {
            let (plan, shapes) = make_plan(&gpu, &parts, &targets)?;
            match Locked::new(&gpu, &plan) {
                Ok(locked) => break (plan, shapes, locked),
                Err((give_up, Error::TryAgain(e))) => {
                    tracing::warn!("{}: {}", give_up.consequence(), Error::TryAgain(e));
                    give_up.limit(&mut parts.limits);
                }
                Err((_, other)) => return Err(other),
            }
        };
        tracing::info!("device memory: {plan}");
        let arena = Arena::new(&gpu, plan.total())?;
        let (g, ty) = (parts.geometry, parts.ty);
        let other = Other::upload(&gpu, &arena, (g, ty), parts.other, (plan.hosted, locked.hosted))?;
        let adapters = Adapters::new(&gpu, &arena, ty, parts.optimizer, parts.adapters)?;
        let tile = Tiles::new(arena.reserve(plan.tile)?, plan.tile);
        let scratch = arena.reserve(8 * MSE_PARTIALS)?;
        let blocks = Blocks::new(&gpu, &arena, &plan, parts.payloads, parts.supply)?;
        Ok(Self {
            blocks,
            ahead: false,
            traffic: locked.traffic,
            parcels: locked.parcels,
            engines: Vec::new(),
            ropes: Vec::new(),
            adapters,
            other,
            clock: Clock::new(parts.timed),
            geometry: g.clone(),
            ty,
            rank: parts.adapters.rank,
            tile,
            scratch,
            plan,
            shapes,
            targets,
            arena,
            gpu,
        })
    }

    /// The plan.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The device.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Bytes of the arena that were in use at most, and the driver's figures.
    ///
    /// # Errors
    /// The driver's.
    pub fn memory(&self) -> Result<(usize, MemoryInfo)> {
        Ok((self.arena.high_water(), self.gpu.memory()?))
    }

    /// What the block buffers did.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.blocks.stats()
    }

    /// Lays the work over the device in another way, once all work has ended. For measuring: pieces of another size need a plan of their own.
    ///
    /// # Errors
    /// A fault of earlier work.
    pub fn tune(&mut self, tuning: Tuning) -> Result<()> {
        self.gpu.tune(tuning)?;
        self.tile.clear();
        Ok(())
    }

    /// Bytes of blocks and of their inputs that came from the host since the start.
    #[must_use]
    pub fn bytes_from_host(&self) -> u64 {
        self.blocks.stats().bytes + self.traffic.bytes() + self.parcels.bytes() + self.other.read_bytes()
    }

    /// What a step is expected to take at these rates.
    ///
    /// # Errors
    /// [`Error::Invariant`] for a defect of the plan.
    pub fn predict(&self, rates: &Rates) -> Result<Forecast> {
        let (g, payloads) = (&self.geometry, self.blocks.payloads());
        let (budget, limits) = (self.plan.budget, Limits::default());
        self.plan.predict(&Need { geometry: g, ty: self.ty, shapes: &self.shapes, targets: &self.targets, payloads, budget, limits }, rates)
    }

    /// Switches the measuring of phases on or off.
    pub fn measure(&mut self, enabled: bool) {
        self.clock.enable(enabled);
    }

    /// The host's time in the last step.
    #[must_use]
    pub fn host_times(&self) -> HostTimes {
        self.clock.host()
    }

    /// Device time by phase since the last call.
    ///
    /// # Errors
    /// A fault of earlier work.
    pub fn times(&self) -> Result<Times> {
        self.clock.take(&self.gpu)
    }

    /// Losses of the micro-batches.
    ///
    /// # Errors
    /// [`Error::Data`] for batches that do not fit; the supply's and the driver's.
    pub fn loss(&mut self, batches: &[MicroBatch]) -> Result<Vec<f64>> {
        let samples = batches.iter().map(Sample::of).collect::<Result<Vec<_>>>()?;
        self.within(|this| {
            let visits: Vec<BlockId> = this.geometry.blocks().collect();
            let flights = this.take_off(&samples, &visits, None)?;
            this.fly(&flights, None, &|| false, None)?;
            for flight in &flights {
                this.head(flight, None)?;
            }
            this.read_losses(&flights)
        })
    }

    /// Gradients of the mean of the losses, left on the device; returns the losses. `stop` is asked at every visit.
    ///
    /// # Errors
    /// As [`Self::loss`]; [`Error::TryAgain`] if stopped.
    pub fn gradients(&mut self, batches: &[MicroBatch], stop: &dyn Fn() -> bool) -> Result<Vec<f64>> {
        self.clock.at(Stage::Begun);
        let samples = batches.iter().map(Sample::of).collect::<Result<Vec<_>>>()?;
        self.within(|this| this.gradients_of(&samples, stop, None))
    }

    /// As [`Self::gradients`]; `watch` sees each micro-batch between the passes, with the gradient of the last block's output.
    ///
    /// # Errors
    /// As [`Self::loss`]; those of `watch`.
    pub fn gradients_watched(&mut self, batches: &[MicroBatch], watch: Watch<'_>) -> Result<Vec<f64>> {
        let samples = batches.iter().map(Sample::of).collect::<Result<Vec<_>>>()?;
        self.within(|this| this.gradients_of(&samples, &|| false, Some(watch)))
    }

    /// The gradient norm before clipping. Waits for the step.
    ///
    /// # Errors
    /// A fault of earlier work.
    pub fn norm(&self) -> Result<f64> {
        self.adapters.norm(&self.context(None))
    }

    /// Queues the update by the gradients whose norm was taken last.
    ///
    /// # Errors
    /// The driver's.
    pub fn update(&mut self, lr: f64) -> Result<()> {
        let context = Context { gpu: &self.gpu, clock: &self.clock, tile: &self.tile, ty: self.ty, attention: None };
        self.adapters.update(&context, lr)
    }

    /// Adapters, moments and the number of updates, on the host.
    ///
    /// # Errors
    /// A fault of earlier work.
    pub fn state(&self) -> Result<State> {
        Ok(State {
            adapters: self.adapters.read(&self.gpu)?,
            moments: self.adapters.read_moments(&self.gpu)?,
            updates: self.adapters.updates(),
        })
    }

    /// Gradients as they are, before clipping, on the host.
    ///
    /// # Errors
    /// A fault of earlier work.
    pub fn read_gradients(&self) -> Result<AdapterGrads> {
        self.adapters.read_gradients(&self.gpu)
    }

    /// Replaces the adapters' state.
    ///
    /// # Errors
    /// [`Error::Data`] if it is of other linears.
    pub fn load(&mut self, set: &AdapterSet, updates: u64, moments: Option<&[(Moments, Moments)]>) -> Result<()> {
        self.adapters.load(&self.gpu, set, updates, moments)
    }

    /// One forward pass for comparison: the time embedding, and the prediction; `observe` sees every block's output.
    ///
    /// # Errors
    /// As [`Self::loss`].
    pub fn forward(&mut self, sample: &Sample<'_>, observe: Observer<'_>) -> Result<(Vec<f32>, Vec<f32>)> {
        self.within(|this| {
            let visits: Vec<BlockId> = this.geometry.blocks().collect();
            let flights = this.take_off(std::slice::from_ref(sample), &visits, None)?;
            this.fly(&flights, None, &|| false, Some(observe))?;
            let flight = flights.first().ok_or_else(|| Error::invariant("a forward pass without samples"))?;
            this.head(flight, None)?;
            let outputs = (read(&this.gpu, flight.space.conditioning.temb)?, read(&this.gpu, flight.space.prediction)?);
            this.blocks.confirm()?;
            Ok(outputs)
        })
    }
}

/// The values of a dense matrix as float32.
///
/// # Errors
/// A fault of earlier work.
pub fn read(gpu: &Gpu, mat: Mat) -> Result<Vec<f32>> {
    let mut bytes = vec![0u8; mat.span()];
    gpu.download(&mut bytes, mat.ptr)?;
    Ok(match mat.ty {
        Ty::F32 => bytes.chunks_exact(4).filter_map(|c| c.try_into().ok().map(f32::from_le_bytes)).collect(),
        Ty::Bf16 => bytes.chunks_exact(2).filter_map(|c| c.try_into().ok().map(|b| half::bf16::from_le_bytes(b).to_f32())).collect(),
    })
}
