//! A training step on the device: all blocks forward, the loss, all blocks back, the update; layer-major over the micro-batches.
//!
//! Forward writes each block's output where the next block's input is kept, so that nothing is copied. Backward goes through the blocks in
//! reverse, recomputes each from its kept input, and turns each micro-batch's gradient in place. As in [`crate::model::Flux2`], it ends at the
//! first block with an adapter, and the last block is visited once for both passes.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use serenity_cuda::ops::loss::MSE_PARTIALS;
use serenity_cuda::{Arena, Gpu, Mat, MemoryInfo, Ptr, Ty};
use serenity_protocol::config::OptimizerConfig;
use serenity_protocol::geometry::{BlockId, LinearSpec, TransformerGeometry};
use serenity_protocol::{Error, Result};

use super::adapters::Adapters;
use super::attention::Engines;
use super::blocks::{Blocks, Payload, Stats, Supply};
use super::clock::{Clock, Times};
use super::conditioning::{Conditioning, Other, bytes_of};
use super::double::{self, Pair, merge, split};
use super::linear::{Context, Linear, Weight};
use super::plan::{Need, Plan, Reserve, Shape, is_double};
use super::single;
use crate::model::ops::rope::{Position, Rope};
use crate::model::{AdapterGrads, AdapterSet, MicroBatch, OtherWeights, tensor_error};
use crate::optimizer::Moments;

/// Samples of one resolution with everything explicit.
#[derive(Debug)]
pub struct Sample<'t> {
    /// `[B, S, C]` on the host.
    pub noisy: &'t Tensor,
    /// `[B, L, J]` on the host.
    pub context: &'t Tensor,
    /// `[B, S, C]` on the host, float32, where a loss is wanted.
    pub target: Option<&'t Tensor>,
    /// `[B]` in [0, 1].
    pub timestep: Vec<f32>,
    /// `[B]`, raw.
    pub guidance: Option<Vec<f32>>,
    /// Of text tokens, then of image tokens.
    pub positions: Vec<Position>,
}

impl<'t> Sample<'t> {
    /// Of a micro-batch.
    ///
    /// # Errors
    /// [`Error::Data`] if its tensors are not of three dimensions.
    pub fn of(batch: &'t MicroBatch) -> Result<Self> {
        let (b, _, _) = batch.noisy.dims3().map_err(|e| tensor_error("noisy latents must be [B, S, C]", e))?;
        let (_, text, _) = batch.context.dims3().map_err(|e| tensor_error("text embeddings must be [B, L, J]", e))?;
        Ok(Self {
            noisy: &batch.noisy,
            context: &batch.context,
            target: Some(&batch.target),
            timestep: batch.sigma.clone(),
            guidance: batch.guidance.map(|g| vec![g; b]),
            positions: Rope::positions(text, batch.height, batch.width),
        })
    }

    /// `(samples, text tokens, image tokens)`, checked against the model.
    fn sizes(&self, g: &TransformerGeometry) -> Result<(usize, usize, usize)> {
        let dims = |t: &Tensor| t.dims3().map_err(|e| tensor_error("a micro-batch's tensor must have three dimensions", e));
        let ((b, image, channels), (b2, text, features)) = (dims(self.noisy)?, dims(self.context)?);
        let wrong = |v: &f32| !(0.0..=1.0).contains(v);
        let fits = b > 0
            && b == b2
            && (channels, features) == (g.in_channels, g.joint_attention_dim)
            && self.positions.len() == text + image
            && self.timestep.len() == b
            && !self.timestep.iter().any(wrong)
            && self.guidance.as_ref().is_none_or(|x| x.len() == b && x.iter().all(|v| v.is_finite()))
            && self.target.is_none_or(|t| t.dims() == [b, image, g.out_channels()] && t.dtype() == DType::F32);
        if fits {
            return Ok((b, text, image));
        }
        Err(Error::data("a micro-batch does not fit the model")
            .expected(format!("{} channels, {} text features, noise levels in 0..1", g.in_channels, g.joint_attention_dim))
            .found(format!("noisy {:?}, context {:?}, noise levels {:?}", self.noisy.dims(), self.context.dims(), self.timestep)))
    }
}

/// What lives for a whole step of one micro-batch.
#[derive(Debug, Clone)]
pub struct FlightSpace {
    conditioning: Conditioning,
    /// Inputs of the blocks and the output of the last; `[B T, D]` each. Streams lie in it as all text rows, then all image rows.
    kept: Vec<Mat>,
    gradient: Mat,
    /// Only with several samples: a place to bring streams into joint order or back.
    reorder: Option<Mat>,
    noisy: Mat,
    context: Mat,
    target: Mat,
    /// Prediction, then its gradient.
    prediction: Mat,
    dprediction: Mat,
    /// One `f64`.
    loss: Ptr,
}

impl FlightSpace {
    /// Reserves it, with `kept` block inputs.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn new(r: &dyn Reserve, g: &TransformerGeometry, s: &Shape, kept: usize) -> Result<Self> {
        let hidden = || r.mat(s.ty, s.rows(), s.inner);
        Ok(Self {
            conditioning: Conditioning::new(r, g, s)?,
            kept: (0..kept).map(|_| hidden()).collect::<Result<_>>()?,
            gradient: hidden()?,
            reorder: if s.samples > 1 { Some(hidden()?) } else { None },
            noisy: r.mat(s.ty, s.image_rows(), g.in_channels)?,
            context: r.mat(s.ty, s.text_rows(), g.joint_attention_dim)?,
            target: r.mat(Ty::F32, s.image_rows(), g.out_channels())?,
            prediction: r.mat(s.ty, s.image_rows(), g.out_channels())?,
            dprediction: r.mat(s.ty, s.image_rows(), g.out_channels())?,
            loss: r.bytes(8)?,
        })
    }
}

/// What the final projection needs.
#[derive(Debug, Clone, Copy)]
pub struct HeadSpace {
    image: Pair,
    normed: Mat,
}

impl HeadSpace {
    /// Reserves it.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn new(r: &dyn Reserve, _g: &TransformerGeometry, s: &Shape) -> Result<Self> {
        let rows = |n: usize| r.mat(s.ty, n, s.inner);
        Ok(Self { image: Pair { image: rows(s.image_rows())?, text: rows(s.text_rows())? }, normed: rows(s.image_rows())? })
    }
}

struct Flight {
    shape: Shape,
    space: FlightSpace,
    engines: usize,
}

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
    /// Fewest and most buffers that blocks stream through.
    pub buffers: (usize, usize),
    /// Most blocks that stay on the device.
    pub resident_max: usize,
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

/// The state of training on a device.
pub struct CudaStep {
    // In the order in which they must go: buffers and events, then memory, then the device.
    blocks: Blocks,
    engines: Vec<((usize, usize, usize), Engines)>,
    adapters: Adapters,
    other: Other,
    clock: Clock,
    geometry: TransformerGeometry,
    ty: Ty,
    rank: usize,
    tile: Ptr,
    scratch: Ptr,
    plan: Plan,
    arena: Arena,
    gpu: Gpu,
}

/// Bytes that the plan needs, found on a device.
fn make_plan(gpu: &Gpu, p: &Parts<'_>, targets: &[LinearSpec]) -> Result<Plan> {
    let mut shapes = Vec::new();
    for (samples, text, image) in &p.batches {
        let mut shape = Shape::new(p.geometry, p.ty, p.adapters.rank, *samples, *text, *image);
        shape.workspace = Engines::new(gpu, &shape)?.workspace_bytes();
        shapes.push(shape);
    }
    Plan::new(&Need {
        geometry: p.geometry,
        ty: p.ty,
        shapes: &shapes,
        targets,
        payloads: &p.payloads,
        budget: p.budget,
        buffers_min: p.buffers.0,
        buffers_max: p.buffers.1,
        resident_max: p.resident_max,
    })
}

impl CudaStep {
    /// Plans, takes the memory, and copies what is resident.
    ///
    /// # Errors
    /// [`Error::Config`] if the budget is too small; [`Error::TryAgain`] if the device has less than that free; the driver's.
    pub fn new(gpu: Gpu, parts: Parts<'_>) -> Result<Self> {
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
        let plan = make_plan(&gpu, &parts, &targets)?;
        tracing::info!("device memory: {plan}");
        let arena = Arena::new(&gpu, plan.total())?;
        let (g, ty) = (parts.geometry, parts.ty);
        let other = Other::upload(&gpu, &arena, g, ty, parts.other)?;
        let adapters = Adapters::new(&gpu, &arena, ty, parts.optimizer, parts.adapters)?;
        let tile = arena.reserve(plan.tile)?;
        let scratch = arena.reserve(8 * MSE_PARTIALS)?;
        let blocks = Blocks::new(&gpu, &arena, &plan, parts.payloads, parts.supply)?;
        Ok(Self {
            blocks,
            engines: Vec::new(),
            adapters,
            other,
            clock: Clock::new(parts.timed),
            geometry: g.clone(),
            ty,
            rank: parts.adapters.rank,
            tile,
            scratch,
            plan,
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

    /// Switches the measuring of phases on or off.
    pub fn measure(&mut self, enabled: bool) {
        self.clock.enable(enabled);
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
            let flights = this.take_off(&samples, 2)?;
            this.blocks.request(&this.geometry.blocks().collect::<Vec<_>>())?;
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
        let samples = batches.iter().map(Sample::of).collect::<Result<Vec<_>>>()?;
        self.within(|this| this.gradients_of(&samples, stop))
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
        let context = Context { gpu: &self.gpu, clock: &self.clock, tile: self.tile, ty: self.ty, attention: None };
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
            let flights = this.take_off(std::slice::from_ref(sample), 2)?;
            this.blocks.request(&this.geometry.blocks().collect::<Vec<_>>())?;
            this.fly(&flights, None, &|| false, Some(observe))?;
            let flight = flights.first().ok_or_else(|| Error::invariant("a forward pass without samples"))?;
            this.head(flight, None)?;
            Ok((read(&this.gpu, flight.space.conditioning.temb)?, read(&this.gpu, flight.space.prediction)?))
        })
    }

    /// Runs `work` and gives back what it reserved.
    fn within<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let mark = self.arena.mark();
        let result = work(self);
        self.arena.reset(mark)?;
        result
    }

    fn context<'c>(&'c self, engines: Option<&'c Engines>) -> Context<'c> {
        Context { gpu: &self.gpu, clock: &self.clock, tile: self.tile, ty: self.ty, attention: engines }
    }

    fn flight_context<'c>(&'c self, flight: &Flight) -> Context<'c> {
        self.context(self.engines.get(flight.engines).map(|(_, e)| e))
    }

    fn first_adapted(&self) -> Option<BlockId> {
        let g = &self.geometry;
        g.blocks().find(|b| g.block_linears(*b).iter().any(|l| self.adapters.has(&l.name)))
    }

    fn gradients_of(&mut self, samples: &[Sample<'_>], stop: &dyn Fn() -> bool) -> Result<Vec<f64>> {
        let first = self.first_adapted();
        let blocks: Vec<BlockId> = self.geometry.blocks().collect();
        let flights = self.take_off(samples, blocks.len() + 1)?;
        self.adapters.clear_gradients(&self.context(None))?;
        let mut visits = blocks.clone();
        visits.extend(blocks.iter().rev().skip(1).take_while(|b| first.is_some_and(|f| **b >= f)));
        self.blocks.request(&visits)?;
        let last = self.fly(&flights, first, stop, None)?;
        for flight in &flights {
            self.head(flight, first.is_some().then_some(flights.len()))?;
        }
        let mut weights = last;
        for block in blocks.into_iter().rev().take_while(|b| first.is_some_and(|f| *b >= f)) {
            let at_hand = match weights.take() {
                Some(weights) => weights,
                None => self.visit(block, stop)?,
            };
            self.block_backward(block, &at_hand, &flights, first.is_some_and(|f| block > f))?;
            self.blocks.finish(&self.gpu, &self.clock)?;
        }
        self.read_losses(&flights)
    }

    fn visit(&mut self, block: BlockId, stop: &dyn Fn() -> bool) -> Result<Vec<Weight>> {
        if stop() {
            return Err(Error::try_again("the step was abandoned because the trainer was asked to stop"));
        }
        self.blocks.next(&self.gpu, &self.clock, block)
    }

    /// Reserves and fills what lives for the step. With fewer than one more than the blocks' number `kept`, inputs take turns.
    fn take_off(&mut self, samples: &[Sample<'_>], kept: usize) -> Result<Vec<Flight>> {
        let g = self.geometry.clone();
        let mut flights = Vec::with_capacity(samples.len());
        for sample in samples {
            let sizes = sample.sizes(&g)?;
            let mut shape = Shape::new(&g, self.ty, self.rank, sizes.0, sizes.1, sizes.2);
            let engines = match self.engines.iter().position(|(s, _)| *s == sizes) {
                Some(index) => index,
                None => {
                    self.engines.push((sizes, Engines::new(&self.gpu, &shape)?));
                    self.engines.len() - 1
                }
            };
            shape.workspace = self.engines.get(engines).map_or(0, |(_, e)| e.workspace_bytes());
            let space = FlightSpace::new(&self.arena, &g, &shape, kept)?;
            let flight = Flight { shape, space, engines };
            self.enter(&flight, sample)?;
            flights.push(flight);
        }
        Ok(flights)
    }

    /// Copies the inputs, embeds tokens and time.
    fn enter(&self, flight: &Flight, sample: &Sample<'_>) -> Result<()> {
        let (c, g, s) = (self.flight_context(flight), &self.geometry, &flight.space);
        let rope = Rope::new(&sample.positions, &g.axes_dims_rope, g.rope_theta, &Device::Cpu);
        let rope = rope.map_err(|e| tensor_error("cannot build the rotary table", e))?;
        let guidance = sample.guidance.as_deref();
        s.conditioning.fill(&c, g, &self.other, (&sample.timestep, guidance), (rope.cos(), rope.sin()))?;
        self.gpu.upload(s.noisy.ptr, &bytes_of(sample.noisy, self.ty)?)?;
        self.gpu.upload(s.context.ptr, &bytes_of(sample.context, self.ty)?)?;
        if let Some(target) = sample.target {
            self.gpu.upload(s.target.ptr, &bytes_of(target, Ty::F32)?)?;
        }
        let hidden = s.kept.first().copied().ok_or_else(|| Error::invariant("no block input is kept"))?;
        // Without double blocks the first block wants joint order.
        let joint = g.num_layers == 0;
        let streams = match s.reorder.filter(|_| joint) {
            Some(place) => Pair::halves(place, &flight.shape)?,
            None => Pair::halves(hidden, &flight.shape)?,
        };
        let (image, text) = (self.other.linear("x_embedder")?, self.other.linear("context_embedder")?);
        c.product(|gpu| {
            gpu.gemm_nt(streams.image, s.noisy, image, 1.0, 0.0)?;
            gpu.gemm_nt(streams.text, s.context, text, 1.0, 0.0)
        })?;
        if joint { merge(&c, &flight.shape, hidden, streams) } else { Ok(()) }
    }

    /// All blocks forward. Returns the last block's weights with its visit still open if a backward pass follows (`first` is given).
    fn fly(
        &mut self,
        flights: &[Flight],
        first: Option<BlockId>,
        stop: &dyn Fn() -> bool,
        mut observe: Option<Observer<'_>>,
    ) -> Result<Option<Vec<Weight>>> {
        let count = self.geometry.num_blocks();
        for block in self.geometry.clone().blocks() {
            let weights = self.visit(block, stop)?;
            let _span = tracing::info_span!("block forward", block = block.0).entered();
            let at = usize::from(block.0);
            for flight in flights {
                self.block_forward(block, &weights, flight)?;
                if let Some(observe) = observe.as_deref_mut() {
                    observe(block, &flight.shape, kept(flight, at + 1)?)?;
                }
            }
            if at + 1 == count && first.is_some() {
                return Ok(Some(weights));
            }
            self.blocks.finish(&self.gpu, &self.clock)?;
        }
        Ok(None)
    }

    fn block_forward(&self, block: BlockId, weights: &[Weight], flight: &Flight) -> Result<()> {
        let (c, s, cond) = (self.flight_context(flight), &flight.shape, &flight.space.conditioning);
        let (x, y) = (kept(flight, usize::from(block.0))?, kept(flight, usize::from(block.0) + 1)?);
        let mark = self.arena.mark();
        if is_double(&self.geometry, block) {
            let space = double::Space::new(&self.arena, s)?;
            let last = usize::from(block.0) + 1 == self.geometry.num_layers && self.geometry.num_single_layers > 0;
            // Single blocks want joint order.
            let place = flight.space.reorder.filter(|_| last);
            let out = Pair::halves(place.unwrap_or(y), s)?;
            self.double(block, weights)?.forward(&c, s, &space, cond, out, Pair::halves(x, s)?)?;
            if place.is_some() {
                merge(&c, s, y, out)?;
            }
        } else {
            let space = single::Space::new(&self.arena, s)?;
            self.single(block, weights)?.forward(&c, s, &space, cond, y, x)?;
        }
        self.arena.reset(mark)
    }

    fn block_backward(&self, block: BlockId, weights: &[Weight], flights: &[Flight], need_input: bool) -> Result<()> {
        let _span = tracing::info_span!("block backward", block = block.0).entered();
        for flight in flights {
            let (c, s, cond) = (self.flight_context(flight), &flight.shape, &flight.space.conditioning);
            let (x, gradient) = (kept(flight, usize::from(block.0))?, flight.space.gradient);
            let mark = self.arena.mark();
            if is_double(&self.geometry, block) {
                let space = double::Space::new(&self.arena, s)?;
                let last = usize::from(block.0) + 1 == self.geometry.num_layers && self.geometry.num_single_layers > 0;
                if let Some(place) = flight.space.reorder.filter(|_| last) {
                    let streams = split(&c, s, gradient, Pair::halves(place, s)?)?;
                    c.pass(|gpu| {
                        let to = Pair::halves(gradient, s)?;
                        gpu.cast(to.text, streams.text)?;
                        gpu.cast(to.image, streams.image)
                    })?;
                }
                let dy = Pair::halves(gradient, s)?;
                self.double(block, weights)?.backward(&c, s, &space, cond, dy, Pair::halves(x, s)?, need_input)?;
            } else {
                let space = single::Space::new(&self.arena, s)?;
                self.single(block, weights)?.backward(&c, s, &space, cond, gradient, x, need_input)?;
            }
            self.arena.reset(mark)?;
        }
        Ok(())
    }

    /// Final norm and projection, the loss where there is a target, and with `batches` (the number of micro-batches) the gradient of the last
    /// block's output.
    fn head(&self, flight: &Flight, batches: Option<usize>) -> Result<()> {
        let (c, s, space) = (self.flight_context(flight), &flight.shape, &flight.space);
        let (cond, weight) = (&space.conditioning, self.other.linear("proj_out")?);
        let mark = self.arena.mark();
        let place = HeadSpace::new(&self.arena, &self.geometry, s)?;
        let hidden = kept(flight, self.geometry.num_blocks())?;
        let joint = self.geometry.num_single_layers > 0;
        let x = if joint { split(&c, s, hidden, place.image)? } else { Pair::halves(hidden, s)? }.image;
        c.pass(|gpu| gpu.ln_mod(place.normed, x, cond.out_shift, cond.out_scale, s.eps))?;
        c.product(|gpu| gpu.gemm_nt(space.prediction, place.normed, weight, 1.0, 0.0))?;
        let factor = 1.0 / batches.unwrap_or(1) as f64;
        c.pass(|gpu| gpu.mse(space.loss, Some(space.dprediction), space.prediction, space.target, factor, self.scratch))?;
        if batches.is_some() {
            c.product(|gpu| gpu.gemm_nn(place.normed, space.dprediction, weight, 1.0, 0.0))?;
            // The text tokens' outputs are cut off: no gradient comes from there.
            c.pass(|gpu| gpu.zero(space.gradient.ptr, space.gradient.span()))?;
            let streams = Pair { text: Pair::halves(space.gradient, s)?.text, image: place.normed };
            let dx = |gpu: &Gpu, to: Mat| gpu.ln_mod_bwd(to, None, place.normed, x, cond.out_scale, s.eps);
            if s.samples == 1 || !joint {
                c.pass(|gpu| dx(gpu, Pair::halves(space.gradient, s)?.image))?;
            } else {
                c.pass(|gpu| dx(gpu, place.normed))?;
                for sample in 0..s.samples {
                    let rows = space.gradient.rows(sample * s.tokens() + s.text, s.image)?;
                    c.pass(|gpu| gpu.cast(rows, streams.image.rows(sample * s.image, s.image)?))?;
                }
            }
        }
        self.arena.reset(mark)
    }

    fn read_losses(&self, flights: &[Flight]) -> Result<Vec<f64>> {
        let read = |flight: &Flight| {
            let mut bytes = [0u8; 8];
            self.gpu.download(&mut bytes, flight.space.loss)?;
            Ok(f64::from_le_bytes(bytes))
        };
        flights.iter().map(read).collect()
    }

    fn linear(&self, block: BlockId, weights: &[Weight], name: &str) -> Result<Linear> {
        let full = format!("{}.{name}", self.geometry.block_prefix(block));
        let index = self.geometry.block_linears(block).iter().position(|l| l.name == full);
        let weight = index.and_then(|i| weights.get(i)).ok_or_else(|| Error::invariant(format!("there is no weight '{full}'")))?;
        Ok(Linear { weight: *weight, lora: self.adapters.lora(self.ty, &full)? })
    }

    fn single(&self, block: BlockId, weights: &[Weight]) -> Result<single::Weights> {
        Ok(single::Weights {
            project: self.linear(block, weights, "attn.to_qkv_mlp_proj")?,
            out: self.linear(block, weights, "attn.to_out")?,
            norm_q: self.other.norm(&self.geometry, block, "attn.norm_q")?,
            norm_k: self.other.norm(&self.geometry, block, "attn.norm_k")?,
        })
    }

    fn double(&self, block: BlockId, weights: &[Weight]) -> Result<double::Weights> {
        let stream = |[q, k, v, out, ff, norm_q, norm_k]: [&str; 7]| -> Result<double::Stream> {
            Ok(double::Stream {
                q: self.linear(block, weights, q)?,
                k: self.linear(block, weights, k)?,
                v: self.linear(block, weights, v)?,
                out: self.linear(block, weights, out)?,
                ff_in: self.linear(block, weights, &format!("{ff}.linear_in"))?,
                ff_out: self.linear(block, weights, &format!("{ff}.linear_out"))?,
                norm_q: self.other.norm(&self.geometry, block, norm_q)?,
                norm_k: self.other.norm(&self.geometry, block, norm_k)?,
            })
        };
        Ok(double::Weights {
            image: stream(["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff", "attn.norm_q", "attn.norm_k"])?,
            text: stream([
                "attn.add_q_proj",
                "attn.add_k_proj",
                "attn.add_v_proj",
                "attn.to_add_out",
                "ff_context",
                "attn.norm_added_q",
                "attn.norm_added_k",
            ])?,
        })
    }
}

/// Input number `index` of a flight's blocks; they take turns where not all are kept.
fn kept(flight: &Flight, index: usize) -> Result<Mat> {
    let all = &flight.space.kept;
    all.get(index % all.len().max(1)).copied().ok_or_else(|| Error::invariant("no block input is kept"))
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
