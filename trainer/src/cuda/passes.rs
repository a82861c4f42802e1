//! The passes of a step: all blocks forward, the loss, all blocks back, layer-major over the micro-batches.
//!
//! Forward writes each block's output where the next block's input is kept, so that nothing is copied. Backward goes through the blocks in
//! reverse, recomputes each from its kept input (or finds its activations kept), and turns each micro-batch's gradient in place. As in [`crate::model::Flux2`], it ends at the
//! first block with an adapter, and the last block is visited once for both passes.
#![forbid(unsafe_code)]

use std::rc::Rc;
use std::time::Duration;

use candle_core::Device;
use serenity_cuda::arena::ALIGNMENT;
use serenity_cuda::{Event, Mat, Ty};
use serenity_protocol::geometry::BlockId;
use serenity_protocol::{Error, Result};

use super::attention::Engines;
use super::clock::Stage;
use super::conditioning::{Embedded, bytes_of};
use super::double::{self, Pair, merge, split};
use super::flight::{Activations, Back, EntrySpace, Flight, FlightSpace, Have, HeadSpace, Sample};
use super::inputs::{Turns, moved_bytes};
use super::linear::{Context, Linear, Weight};
use super::plan::{Shape, is_double};
use super::single;
use super::step::{CudaStep, Observer, Watch};
use crate::model::ops::rope::{Position, Rope};
use crate::model::tensor_error;

/// Pause between two looks at a pass that is ending.
const LOOK: Duration = Duration::from_micros(50);
/// Rotary tables that are remembered.
const ROPES_MAX: usize = 16;

impl CudaStep {
    /// Runs `work` and gives back what it reserved.
    pub(super) fn within<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let mark = self.arena.mark();
        let result = work(self);
        self.arena.reset(mark)?;
        result
    }

    pub(super) fn context<'c>(&'c self, engines: Option<&'c Engines>) -> Context<'c> {
        Context { gpu: &self.gpu, clock: &self.clock, tile: &self.tile, ty: self.ty, attention: engines }
    }

    fn flight_context<'c>(&'c self, flight: &Flight) -> Context<'c> {
        self.context(self.engines.get(flight.engines).map(|(_, e)| e))
    }

    fn first_adapted(&self) -> Option<BlockId> {
        let g = &self.geometry;
        g.blocks().find(|b| g.block_linears(*b).iter().any(|l| self.adapters.has(&l.name)))
    }

    pub(super) fn gradients_of(&mut self, samples: &[Sample<'_>], stop: &dyn Fn() -> bool, watch: Option<Watch<'_>>) -> Result<Vec<f64>> {
        let first = self.first_adapted();
        let blocks: Vec<BlockId> = self.geometry.blocks().collect();
        let begins = first.map_or(blocks.len(), |b| usize::from(b.0));
        let mut visits = blocks.clone();
        visits.extend(blocks.iter().rev().skip(1).take_while(|b| first.is_some_and(|f| **b >= f)));
        let flights = self.take_off(samples, &visits, Some(begins))?;
        self.clock.at(Stage::Entered);
        self.adapters.clear_gradients(&self.context(None))?;
        let last = self.fly(&flights, first, stop, None)?;
        self.traffic.turn_around()?;
        self.parcels.turn_around()?;
        for flight in &flights {
            self.head(flight, first.is_some().then_some(flights.len()))?;
            self.done_with(flight, blocks.len())?;
        }
        if let Some(watch) = watch {
            flights.iter().try_for_each(|flight| watch(&self.gpu, flight))?;
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
        self.clock.at(Stage::Queued);
        let losses = self.read_losses(&flights)?;
        self.clock.at(Stage::Done);
        Ok(losses)
    }

    fn visit(&mut self, block: BlockId, stop: &dyn Fn() -> bool) -> Result<Vec<Weight>> {
        if stop() {
            return Err(Error::try_again("the step was abandoned because the trainer was asked to stop"));
        }
        self.tile.begin_visit();
        self.blocks.next(&self.gpu, &self.clock, block)
    }

    /// Announces the visits of a step, reserves and fills what lives as long. With `back`, the block at which a backward pass will end, inputs
    /// are kept for it; without, they take turns.
    pub(super) fn take_off(&mut self, samples: &[Sample<'_>], visits: &[BlockId], back: Option<usize>) -> Result<Vec<Flight>> {
        let g = self.geometry.clone();
        // Before anything is announced, for a sample that does not fit shall leave no visits behind.
        samples.iter().try_for_each(|sample| sample.sizes(&g).map(drop))?;
        // Every pass begins with all blocks forward, which the one before has announced.
        let ahead = if self.ahead { visits.get(g.num_blocks()..).unwrap_or_default() } else { visits };
        self.blocks.request(ahead)?;
        self.ahead = false;
        self.blocks.pump(&self.gpu, &self.clock)?;
        self.traffic.begin(&self.gpu, back.unwrap_or(0))?;
        self.parcels.begin(&self.gpu, 0)?;
        let turns = if back.is_some() { self.plan.turns } else { Turns::new(g.num_blocks() + 1, 2) };
        let times: Vec<(f32, Option<f32>)> = samples.iter().flat_map(Sample::times).collect();
        let embedded = Embedded::new(&self.arena, &g, times.len())?;
        embedded.fill(&self.context(None), &g, &self.other, &times)?;
        let (mut flights, mut first) = (Vec::with_capacity(samples.len()), 0);
        for sample in samples {
            let sizes = sample.sizes(&g)?;
            let rows = embedded.rows(first, sizes.0)?;
            first += sizes.0;
            let mut shape = Shape::new(&g, self.ty, self.rank, sizes.0, sizes.1, sizes.2);
            let engines = match self.engines.iter().position(|(s, _)| *s == sizes) {
                Some(index) => index,
                None => {
                    self.engines.push((sizes, Engines::new(&self.gpu, &shape)?));
                    self.engines.len() - 1
                }
            };
            shape.workspace = self.engines.get(engines).map_or(0, |(_, e)| e.workspace_bytes());
            let space = FlightSpace::new(&self.arena, &g, &shape, &rows, turns)?;
            let state_bytes = shape.state_bytes().next_multiple_of(ALIGNMENT);
            let traffic = if back.is_some() { Some(self.traffic.join(&self.gpu, state_bytes)?) } else { None };
            let sets = if back.is_some() { self.plan.parcels.count } else { 0 };
            let parcels = (0..sets).map(|_| single::Parcel::new(&self.arena, &shape)).collect::<Result<Vec<_>>>()?;
            let bytes = parcels.first().map(|p| moved_bytes(&p.mats()));
            let parcel_traffic = bytes.map(|bytes| self.parcels.join(&self.gpu, bytes)).transpose()?;
            let keep = self.plan.kept.iter().filter(|b| back.is_some_and(|first| usize::from(b.0) >= first));
            let kept = keep.map(|b| Ok((*b, Activations::new(&self.arena, &shape, is_double(&g, *b))?))).collect::<Result<_>>()?;
            flights.push(Flight { shape, space, kept, parcels, parcel_traffic, engines, traffic });
        }
        for (flight, sample) in flights.iter().zip(samples) {
            self.enter(flight, sample)?;
        }
        Ok(flights)
    }

    /// Copies the inputs and embeds the tokens.
    fn enter(&mut self, flight: &Flight, sample: &Sample<'_>) -> Result<()> {
        let mark = self.arena.mark();
        let rope = self.rope(&sample.positions)?;
        let (c, g, s) = (self.flight_context(flight), &self.geometry, &flight.space);
        s.conditioning.turn(&c, rope.cos(), rope.sin())?;
        let entry = EntrySpace::new(&self.arena, g, &flight.shape)?;
        self.gpu.upload(entry.noisy.ptr, &bytes_of(sample.noisy, Ty::F32)?)?;
        self.gpu.upload(entry.context.ptr, &bytes_of(sample.context, self.ty)?)?;
        if let Some(target) = sample.target {
            self.gpu.upload(s.target.ptr, &bytes_of(target, Ty::F32)?)?;
        }
        let hidden = s.states.get(0)?;
        // Without double blocks the first block wants joint order.
        let joint = g.num_layers == 0;
        let streams = match s.reorder.filter(|_| joint) {
            Some(place) => Pair::halves(place, &flight.shape)?,
            None => Pair::halves(hidden, &flight.shape)?,
        };
        let (image, text) = (self.other.linear("x_embedder")?, self.other.linear("context_embedder")?);
        let exact = s.stream.map_or(Ok(streams), |stream| Pair::halves(stream, &flight.shape))?;
        c.product(|gpu| {
            gpu.cast(entry.embedder, image)?;
            gpu.gemm_nt(exact.image, entry.noisy, entry.embedder, 1.0, 0.0)?;
            gpu.gemm_nt(exact.text, entry.context, text, 1.0, 0.0)
        })?;
        if s.stream.is_some() {
            c.pass(|gpu| {
                gpu.cast(streams.image, exact.image)?;
                gpu.cast(streams.text, exact.text)
            })?;
        }
        if joint {
            merge(&c, &flight.shape, hidden, streams)?;
        }
        self.arena.reset(mark)?;
        self.written(flight, 0)
    }

    /// The rotary table of these positions; those of a few grids are remembered.
    fn rope(&mut self, positions: &[Position]) -> Result<Rc<Rope>> {
        if let Some((_, rope)) = self.ropes.iter().find(|(p, _)| p == positions) {
            return Ok(rope.clone());
        }
        let rope = Rope::new(positions, &self.geometry.axes_dims_rope, self.geometry.rope_theta, &Device::Cpu);
        let rope = Rc::new(rope.map_err(|e| tensor_error("cannot build the rotary table", e))?);
        self.ropes.truncate(ROPES_MAX - 1);
        self.ropes.insert(0, (positions.to_vec(), rope.clone()));
        Ok(rope)
    }

    /// State number `state` of a flight is about to be written.
    fn to_write(&self, flight: &Flight, state: usize) -> Result<Mat> {
        if let Some(number) = flight.traffic {
            self.traffic.before_write(&self.gpu, number, state)?;
        }
        flight.space.states.get(state)
    }

    fn written(&self, flight: &Flight, state: usize) -> Result<()> {
        match flight.traffic {
            Some(number) => self.traffic.written(&self.gpu, number, state, &[flight.space.states.get(state)?]),
            None => Ok(()),
        }
    }

    /// The backward pass needs a state no longer.
    fn done_with(&self, flight: &Flight, state: usize) -> Result<()> {
        match flight.traffic {
            Some(number) => self.traffic.read(&self.gpu, number, state, &[flight.space.states.get(state)?]),
            None => Ok(()),
        }
    }

    /// The parcel of a block whose activations travel, with its number among them and that of the flight.
    fn parcel<'f>(&self, flight: &'f Flight, block: BlockId) -> Option<(&'f single::Parcel, usize, usize)> {
        let number = self.plan.travelling.binary_search(&block).ok()?;
        Some((flight.parcels.get(number % self.plan.parcels.count.max(1))?, flight.parcel_traffic?, number))
    }

    /// All blocks forward. Returns the last block's weights with its visit still open if a backward pass follows (`first` is given).
    pub(super) fn fly(
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
                    observe(block, &flight.shape, flight.space.states.get(at + 1)?)?;
                }
            }
            if at + 1 == count && first.is_some() {
                return Ok(Some(weights));
            }
            self.blocks.finish(&self.gpu, &self.clock)?;
        }
        Ok(None)
    }

    fn double_space(&self, flight: &Flight, block: BlockId) -> Result<double::Space> {
        match flight.kept.get(&block) {
            Some(Activations::Double(kept)) => double::Space::around(&self.arena, &flight.shape, kept),
            _ => double::Space::new(&self.arena, &flight.shape),
        }
    }

    fn single_space(&self, flight: &Flight, block: BlockId) -> Result<single::Space> {
        if let Some((parcel, ..)) = self.parcel(flight, block) {
            return single::Space::around(&self.arena, &flight.shape, &parcel.activations(&self.arena, &flight.shape)?);
        }
        match flight.kept.get(&block) {
            Some(Activations::Single(kept)) => single::Space::around(&self.arena, &flight.shape, kept),
            _ => single::Space::new(&self.arena, &flight.shape),
        }
    }

    fn block_forward(&self, block: BlockId, weights: &[Weight], flight: &Flight) -> Result<()> {
        let index = usize::from(block.0);
        let (x, y) = (flight.space.states.get(index)?, self.to_write(flight, index + 1)?);
        let (c, s, cond) = (self.flight_context(flight), &flight.shape, &flight.space.conditioning);
        let mark = self.arena.mark();
        if is_double(&self.geometry, block) {
            let space = self.double_space(flight, block)?;
            let last = usize::from(block.0) + 1 == self.geometry.num_layers && self.geometry.num_single_layers > 0;
            // Single blocks want joint order.
            let place = flight.space.reorder.filter(|_| last);
            let out = Pair::halves(place.unwrap_or(y), s)?;
            let stream = flight.space.stream.map(|stream| Pair::halves(stream, s)).transpose()?;
            self.double(block, weights)?.forward(&c, s, &space, cond, (out, stream), Pair::halves(x, s)?)?;
            if place.is_some() {
                merge(&c, s, y, out)?;
            }
        } else {
            let space = self.single_space(flight, block)?;
            let weights = self.single(block, weights)?;
            let parcel = self.parcel(flight, block);
            if let Some((_, traffic, number)) = parcel {
                self.parcels.before_write(&self.gpu, traffic, number)?;
            }
            weights.forward(&c, s, &space, cond, (y, flight.space.stream), x)?;
            if let Some((parcel, traffic, number)) = parcel {
                weights.pack(&c, s, &space, parcel)?;
                self.parcels.written(&self.gpu, traffic, number, &parcel.mats())?;
            }
        }
        self.arena.reset(mark)?;
        self.written(flight, index + 1)
    }

    fn block_backward(&self, block: BlockId, weights: &[Weight], flights: &[Flight], need_input: bool) -> Result<()> {
        let _span = tracing::info_span!("block backward", block = block.0).entered();
        for flight in flights {
            let index = usize::from(block.0);
            if let Some(number) = flight.traffic {
                self.traffic.before_read(&self.gpu, number, index)?;
            }
            let (c, s, cond) = (self.flight_context(flight), &flight.shape, &flight.space.conditioning);
            let (x, gradient) = (flight.space.states.get(index)?, flight.space.gradient);
            let parcel = self.parcel(flight, block);
            let have = match parcel {
                Some((parcel, ..)) => Have::Parcel(parcel),
                None if flight.kept.contains_key(&block) => Have::All,
                None => Have::Nothing,
            };
            let how = Back { need_input, have };
            let mark = self.arena.mark();
            if is_double(&self.geometry, block) {
                let space = self.double_space(flight, block)?;
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
                self.double(block, weights)?.backward(&c, s, &space, cond, dy, Pair::halves(x, s)?, how)?;
            } else {
                let space = self.single_space(flight, block)?;
                if let Some((_, traffic, number)) = parcel {
                    self.parcels.before_read(&self.gpu, traffic, number)?;
                }
                self.single(block, weights)?.backward(&c, s, &space, cond, gradient, x, how)?;
                if let Some((parcel, traffic, number)) = parcel {
                    self.parcels.read(&self.gpu, traffic, number, &parcel.mats())?;
                }
            }
            self.arena.reset(mark)?;
            self.done_with(flight, index)?;
        }
        Ok(())
    }

    /// Final norm and projection, the loss where there is a target, and with `batches` (the number of micro-batches) the gradient of the last
    /// block's output.
    pub(super) fn head(&self, flight: &Flight, batches: Option<usize>) -> Result<()> {
        let (c, s, space) = (self.flight_context(flight), &flight.shape, &flight.space);
        let (cond, weight) = (&space.conditioning, self.other.linear("proj_out")?);
        let mark = self.arena.mark();
        let place = HeadSpace::new(&self.arena, &self.geometry, s)?;
        let hidden = space.states.get(self.geometry.num_blocks())?;
        let joint = self.geometry.num_single_layers > 0;
        let x = match space.stream {
            Some(stream) => Pair::halves(stream, s)?,
            None if joint => split(&c, s, hidden, place.image)?,
            None => Pair::halves(hidden, s)?,
        };
        let x = x.image;
        c.pass(|gpu| gpu.ln_mod(place.normed, x, cond.out_shift, cond.out_scale, s.eps))?;
        // The few small products at both ends are float32 altogether: a rounded operand there is an error of every prediction.
        c.product(|gpu| {
            gpu.cast(place.projection, weight)?;
            gpu.gemm_nt(space.prediction, place.normed, place.projection, 1.0, 0.0)
        })?;
        let factor = 1.0 / batches.unwrap_or(1) as f64;
        c.pass(|gpu| gpu.mse(space.loss, Some(space.dprediction), space.prediction, space.target, factor, self.scratch))?;
        if batches.is_some() {
            c.product(|gpu| gpu.gemm_nn(place.normed, space.dprediction, weight, 1.0, 0.0))?;
            c.pass(|gpu| gpu.ln_mod_bwd(place.normed, None, place.normed, x, cond.out_scale, s.eps))?;
            // The stream has been read for the last time. The text tokens' outputs are cut off: no gradient comes from there.
            c.pass(|gpu| gpu.zero(space.gradient.ptr, space.gradient.span()))?;
            for sample in 0..s.samples {
                let first = if joint { sample * s.tokens() + s.text } else { s.text_rows() + sample * s.image };
                let rows = space.gradient.rows(first, s.image)?;
                c.pass(|gpu| gpu.cast(rows, place.normed.rows(sample * s.image, s.image)?))?;
            }
        }
        self.arena.reset(mark)
    }

    /// Announces the forward visits of the pass to come, whatever it will be, and brings their blocks while the device finishes this one: the
    /// bus does not stand still between two passes.
    fn look_ahead(&mut self) -> Result<()> {
        self.blocks.request(&self.geometry.blocks().collect::<Vec<_>>())?;
        self.ahead = true;
        let end = Event::new(self.gpu.context())?;
        self.gpu.compute().record(&end)?;
        while !end.done()? {
            self.blocks.pump(&self.gpu, &self.clock)?;
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Waits for the pass, and for the verdict on every block that it used.
    pub(super) fn read_losses(&mut self, flights: &[Flight]) -> Result<Vec<f64>> {
        self.look_ahead()?;
        let read = |flight: &Flight| {
            let mut bytes = [0u8; 8];
            self.gpu.download(&mut bytes, flight.space.loss)?;
            Ok(f64::from_le_bytes(bytes))
        };
        let losses = flights.iter().map(read).collect::<Result<_>>()?;
        self.blocks.confirm()?;
        Ok(losses)
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
