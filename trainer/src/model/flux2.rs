//! The transformer over all blocks, layer-major: every visit to a block serves all micro-batches of the step.
//!
//! Forward keeps the inputs of the blocks and nothing else. Backward goes through the blocks in reverse, recomputes each from its input,
//! and ends at the first block that has an adapter: nothing below it is visited again. The last block of the forward pass is the
//! first of the backward pass and is visited once for both.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use serenity_protocol::geometry::{BlockId, BlockKind, TransformerGeometry};
use serenity_protocol::{Error, Result};

use super::block::BlockView;
use super::conditioning::{Conditioning, Positions};
use super::double_block::{DoubleBlock, Streams};
use super::ops::rope::{Position, Rope};
use super::ops::{gemm, layer_norm};
use super::single_block::SingleBlock;
use super::{AdapterGrads, AdapterSet, BlockSource, BlockWeights, MicroBatch, OtherWeights, StepOutput, tensor_error};

/// A FLUX.2 transformer without its block weights.
pub struct Flux2 {
    /// Shape of the model.
    pub geometry: TransformerGeometry,
    /// Where it computes.
    pub device: Device,
    /// What it computes in.
    pub dtype: DType,
    other: OtherWeights,
    positions: Mutex<HashMap<(usize, usize, usize), Arc<Positions>>>,
}

/// Input of one forward pass with everything explicit, as the reference's `forward` takes it.
pub struct Inputs<'t> {
    /// `[B, S, C]`
    pub noisy: &'t Tensor,
    /// `[B, L, J]`
    pub context: &'t Tensor,
    /// `[B]` in [0, 1]
    pub timestep: &'t [f32],
    /// `[B]`, raw
    pub guidance: Option<&'t [f32]>,
    /// Rotary tables of the text and image tokens.
    pub positions: Arc<Positions>,
}

/// Hidden states between two blocks, or their gradients.
#[derive(Debug, Clone)]
pub enum Hidden {
    /// Before and between double blocks.
    Streams(Streams),
    /// Before and between single blocks, and after the last: text tokens, then image tokens, `[B, L + S, D]`.
    Joint(Tensor),
}

/// A micro-batch on its way through the blocks.
struct Flight {
    conditioning: Conditioning,
    hidden: Hidden,
}

/// Called after each block with its output, once a micro-batch.
pub type Observer<'o> = &'o mut dyn FnMut(BlockId, &Hidden) -> Result<()>;

impl Flux2 {
    /// A model around its resident weights; device and dtype are theirs.
    #[must_use]
    pub fn new(geometry: TransformerGeometry, other: OtherWeights) -> Self {
        Self { geometry, device: other.device().clone(), dtype: other.dtype(), other, positions: Mutex::default() }
    }

    /// The resident weights.
    #[must_use]
    pub fn other(&self) -> &OtherWeights {
        &self.other
    }

    /// The block visits of [`Self::loss_and_grads`]: all blocks forward, then back down to the first block with an adapter. The turning
    /// point is listed once.
    #[must_use]
    pub fn visits(&self, adapters: &AdapterSet) -> Vec<BlockId> {
        let mut visits: Vec<BlockId> = self.geometry.blocks().collect();
        if let Some(first) = self.first_adapted(adapters) {
            visits.extend(self.geometry.blocks().rev().skip(1).take_while(|b| *b >= first));
        }
        visits
    }

    /// Predictions of all micro-batches, `[B, S, C]` in the compute dtype. Visits every block once.
    ///
    /// # Errors
    /// [`Error::Data`] for a batch or adapter that does not fit the geometry; what the source reports.
    pub fn forward(&self, source: &mut dyn BlockSource, adapters: &AdapterSet, batches: &[MicroBatch]) -> Result<Vec<Tensor>> {
        self.check_adapters(adapters)?;
        let mut flights = self.take_off(batches)?;
        source.request(&self.geometry.blocks().collect::<Vec<_>>())?;
        self.fly(source, adapters, &mut flights, &|| false, &mut |_, _| Ok(()))?;
        flights.iter().map(|f| self.head(f)).collect()
    }

    /// Mean squared error of each micro-batch. Visits every block once.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn loss(&self, source: &mut dyn BlockSource, adapters: &AdapterSet, batches: &[MicroBatch]) -> Result<Vec<f64>> {
        let predictions = self.forward(source, adapters, batches)?;
        predictions.iter().zip(batches).map(|(p, b)| Ok(mean_squared_error(p, &b.target)?.0)).collect()
    }

    /// One forward pass with explicit inputs, for parity: `temb`, and the prediction; `observe` sees every block's output.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_observed(
        &self,
        source: &mut dyn BlockSource,
        adapters: &AdapterSet,
        inputs: &Inputs<'_>,
        observe: Observer<'_>,
    ) -> Result<(Tensor, Tensor)> {
        self.check_adapters(adapters)?;
        let mut flights = [self.enter(inputs)?];
        source.request(&self.geometry.blocks().collect::<Vec<_>>())?;
        self.fly(source, adapters, &mut flights, &|| false, observe)?;
        let [flight] = &flights;
        Ok((flight.conditioning.temb.clone(), self.head(flight)?))
    }

    /// Losses and predictions of all micro-batches, and the gradients of the mean loss. Announces [`Self::visits`] at once. `stop` is asked
    /// at every visit; when it says yes the step is abandoned.
    ///
    /// # Errors
    /// As [`Self::forward`]; [`Error::TryAgain`] if stopped.
    pub fn loss_and_grads(
        &self,
        source: &mut dyn BlockSource,
        adapters: &AdapterSet,
        batches: &[MicroBatch],
        stop: &dyn Fn() -> bool,
    ) -> Result<StepOutput> {
        self.check_adapters(adapters)?;
        let mut flights = self.take_off(batches)?;
        source.request(&self.visits(adapters))?;
        let started = std::time::Instant::now();
        let first = self.first_adapted(adapters);
        // Inputs of the blocks from `first` on, one a micro-batch.
        let mut kept: Vec<(BlockId, Vec<Hidden>)> = Vec::new();
        let mut last = None;
        for block in self.geometry.blocks() {
            let weights = next_visit(source, block, stop)?;
            self.convert(block, &mut flights)?;
            if first.is_some_and(|f| block >= f) {
                kept.push((block, flights.iter().map(|f| f.hidden.clone()).collect()));
            }
            self.block_forward(&weights, adapters, &mut flights, &mut |_, _| Ok(()))?;
            last = Some(weights);
        }
        let mut output =
            StepOutput { losses: Vec::new(), predictions: Vec::new(), grads: AdapterGrads::zeros(adapters)?, forward_seconds: 0.0 };
        let mut gradients = Vec::with_capacity(flights.len());
        for (flight, batch) in flights.iter().zip(batches) {
            let prediction = self.head(flight)?;
            let (loss, gradient) = mean_squared_error(&prediction, &batch.target)?;
            if first.is_some() {
                gradients.push(self.head_backward(flight, gradient, batches.len())?);
            }
            output.losses.push(loss);
            output.predictions.push(prediction);
        }
        output.forward_seconds = started.elapsed().as_secs_f64();
        let conditioning: Vec<Conditioning> = flights.into_iter().map(|f| f.conditioning).collect();
        while let Some((block, inputs)) = kept.pop() {
            let weights = match last.take() {
                Some(weights) => weights,
                None => next_visit(source, block, stop)?,
            };
            let need_input = first.is_some_and(|f| block > f);
            self.block_backward(&weights, adapters, &inputs, &conditioning, &mut gradients, need_input, &mut output.grads)?;
        }
        Ok(output)
    }

    fn first_adapted(&self, adapters: &AdapterSet) -> Option<BlockId> {
        let adapted = |b: &BlockId| self.geometry.block_linears(*b).iter().any(|l| adapters.index_of(&l.name).is_some());
        self.geometry.blocks().find(adapted)
    }

    /// Every adapter belongs to a block linear and has its shape.
    fn check_adapters(&self, adapters: &AdapterSet) -> Result<()> {
        let mut found = 0;
        for spec in self.geometry.blocks().flat_map(|b| self.geometry.block_linears(b)) {
            let Some(adapter) = adapters.index_of(&spec.name).and_then(|i| adapters.adapters.get(i)) else { continue };
            found += 1;
            if adapter.a.dims() != [adapters.rank, spec.in_features] || adapter.b.dims() != [spec.out_features, adapters.rank] {
                return Err(Error::data(format!("the adapter of '{}' does not fit its linear", spec.name))
                    .expected(format!("A [{r}, {}], B [{}, {r}]", spec.in_features, spec.out_features, r = adapters.rank))
                    .found(format!("A {:?}, B {:?}", adapter.a.dims(), adapter.b.dims())));
            }
        }
        if found != adapters.adapters.len() {
            let names: std::collections::HashSet<String> =
                self.geometry.blocks().flat_map(|b| self.geometry.block_linears(b)).map(|l| l.name).collect();
            let lost: Vec<&str> = adapters.adapters.iter().map(|a| a.name.as_str()).filter(|n| !names.contains(*n)).collect();
            return Err(Error::data("adapters belong to no block linear of this model").found(lost.join(", ")));
        }
        Ok(())
    }

    /// The rotary tables of explicit positions: `text_tokens` of them, then the image's.
    ///
    /// # Errors
    /// What the device reports.
    pub fn positions_of(&self, ids: &[Position], text_tokens: usize) -> Result<Arc<Positions>> {
        Rope::new(ids, &self.geometry.axes_dims_rope, self.geometry.rope_theta, &self.device)
            .and_then(|rope| Positions::new(rope, text_tokens))
            .map(Arc::new)
            .map_err(|e| tensor_error("cannot build the rotary table", e))
    }

    fn grid_positions(&self, text: usize, height: usize, width: usize) -> Result<Arc<Positions>> {
        let mut cache = self.positions.lock().map_err(|_| Error::invariant("a thread panicked while it built a rotary table"))?;
        if let Some(found) = cache.get(&(text, height, width)) {
            return Ok(found.clone());
        }
        let made = self.positions_of(&Rope::positions(text, height, width), text)?;
        cache.insert((text, height, width), made.clone());
        Ok(made)
    }

    fn take_off(&self, batches: &[MicroBatch]) -> Result<Vec<Flight>> {
        let mut flights = Vec::with_capacity(batches.len());
        for batch in batches {
            let (b, _, _) = batch.noisy.dims3().map_err(|e| tensor_error("noisy latents must be [B, S, C]", e))?;
            let (_, text, _) = batch.context.dims3().map_err(|e| tensor_error("text embeddings must be [B, L, J]", e))?;
            if batch.target.dims() != [b, batch.height * batch.width, self.geometry.out_channels()] || batch.target.dtype() != DType::F32 {
                return Err(Error::data("the target of a micro-batch does not fit")
                    .expected(format!("[{b}, {} x {}, {}] F32", batch.height, batch.width, self.geometry.out_channels()))
                    .found(format!("{:?} {:?}", batch.target.dims(), batch.target.dtype())));
            }
            let guidance = batch.guidance.map(|g| vec![g; b]);
            flights.push(self.enter(&Inputs {
                noisy: &batch.noisy,
                context: &batch.context,
                timestep: &batch.sigma,
                guidance: guidance.as_deref(),
                positions: self.grid_positions(text, batch.height, batch.width)?,
            })?);
        }
        Ok(flights)
    }

    /// Checks shapes, embeds tokens and time.
    fn enter(&self, inputs: &Inputs<'_>) -> Result<Flight> {
        let g = &self.geometry;
        let tokens = inputs.positions.joint.tokens().map_err(|e| tensor_error("cannot read the rotary table", e))?;
        let (b, text) = (inputs.timestep.len(), inputs.positions.text_tokens);
        for (what, tensor, shape) in [
            ("noisy latents", inputs.noisy, [b, tokens - text, g.in_channels]),
            ("text embeddings", inputs.context, [b, text, g.joint_attention_dim]),
        ] {
            if b == 0 || tensor.dims() != shape {
                return Err(Error::data(format!("the {what} of a micro-batch do not fit"))
                    .expected(format!("{shape:?} (samples, tokens, features)"))
                    .found(format!("{:?}", tensor.dims())));
            }
        }
        let wrong = |v: &f32| !(0.0..=1.0).contains(v);
        if inputs.timestep.iter().any(wrong) || inputs.guidance.is_some_and(|g| g.len() != b || g.iter().any(|v| !v.is_finite())) {
            return Err(Error::data("noise level or guidance of a micro-batch is out of range")
                .expected(format!("{b} noise levels in 0..1, {b} finite guidance scales or none"))
                .found(format!("{:?}, {:?}", inputs.timestep, inputs.guidance)));
        }
        let conditioning = Conditioning::new(g, &self.other, inputs.timestep, inputs.guidance, inputs.positions.clone())?;
        let embed = |x: &Tensor, name: &str| -> Result<Tensor> {
            let weight = self.other.linear(name)?;
            x.to_device(&self.device)
                .and_then(|x| gemm::nt(&x.to_dtype(self.dtype)?, weight))
                .map_err(|e| tensor_error(&format!("cannot apply {name}"), e))
        };
        let streams = Streams { image: embed(inputs.noisy, "x_embedder")?, text: embed(inputs.context, "context_embedder")? };
        Ok(Flight { conditioning, hidden: Hidden::Streams(streams) })
    }

    fn fly(
        &self,
        source: &mut dyn BlockSource,
        adapters: &AdapterSet,
        flights: &mut [Flight],
        stop: &dyn Fn() -> bool,
        observe: Observer<'_>,
    ) -> Result<()> {
        for block in self.geometry.blocks() {
            let weights = next_visit(source, block, stop)?;
            self.convert(block, flights)?;
            self.block_forward(&weights, adapters, flights, observe)?;
        }
        Ok(())
    }

    /// Joins the streams where the single blocks begin.
    fn convert(&self, block: BlockId, flights: &mut [Flight]) -> Result<()> {
        if let BlockKind::Double(_) = self.geometry.kind(block) {
            return Ok(());
        }
        for flight in flights {
            if let Hidden::Streams(s) = &flight.hidden {
                let joint = Tensor::cat(&[&s.text, &s.image], 1).map_err(|e| tensor_error("cannot join text and image tokens", e))?;
                flight.hidden = Hidden::Joint(joint);
            }
        }
        Ok(())
    }

    fn block_forward(&self, weights: &BlockWeights, adapters: &AdapterSet, flights: &mut [Flight], observe: Observer<'_>) -> Result<()> {
        let block = weights.block();
        let _span = tracing::info_span!("block forward", block = block.0).entered();
        let view = BlockView { geometry: &self.geometry, block, weights, other: &self.other, adapters };
        let failed = |e| tensor_error(&format!("the forward pass of {} failed", self.geometry.block_prefix(block)), e);
        let (double, single) = match self.geometry.kind(block) {
            BlockKind::Double(_) => (Some(DoubleBlock::new(&view)?), None),
            BlockKind::Single(_) => (None, Some(SingleBlock::new(&view)?)),
        };
        for flight in flights {
            flight.hidden = match (&flight.hidden, &double, &single) {
                (Hidden::Streams(x), Some(double), _) => Hidden::Streams(double.forward(x, &flight.conditioning).map_err(failed)?),
                (Hidden::Joint(h), _, Some(single)) => Hidden::Joint(single.forward(h, &flight.conditioning).map_err(failed)?),
                _ => return Err(Error::invariant("a block got hidden states of the other kind")),
            };
            observe(block, &flight.hidden)?;
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)] // the state of a step; a struct for one call would only rename it
    fn block_backward(
        &self,
        weights: &BlockWeights,
        adapters: &AdapterSet,
        inputs: &[Hidden],
        conditioning: &[Conditioning],
        gradients: &mut [Hidden],
        need_input: bool,
        grads: &mut AdapterGrads,
    ) -> Result<()> {
        let block = weights.block();
        let _span = tracing::info_span!("block backward", block = block.0).entered();
        let view = BlockView { geometry: &self.geometry, block, weights, other: &self.other, adapters };
        let failed = |e| tensor_error(&format!("the backward pass of {} failed", self.geometry.block_prefix(block)), e);
        let (double, single) = match self.geometry.kind(block) {
            BlockKind::Double(_) => (Some(DoubleBlock::new(&view)?), None),
            BlockKind::Single(_) => (None, Some(SingleBlock::new(&view)?)),
        };
        for ((input, cond), gradient) in inputs.iter().zip(conditioning).zip(gradients) {
            let below = match (input, &double, &single) {
                (Hidden::Streams(x), Some(double), _) => {
                    let dy = split(gradient, cond.positions.text_tokens).map_err(failed)?;
                    double.backward(x, cond, &dy, need_input, grads).map_err(failed)?.map(Hidden::Streams)
                }
                (Hidden::Joint(h), _, Some(single)) => {
                    let Hidden::Joint(dh) = &*gradient else {
                        return Err(Error::invariant("a single block got a gradient of separate streams"));
                    };
                    single.backward(h, cond, dh, need_input, grads).map_err(failed)?.map(Hidden::Joint)
                }
                _ => return Err(Error::invariant("a block got hidden states of the other kind")),
            };
            match below {
                Some(below) => *gradient = below,
                None if need_input => return Err(Error::invariant("a block returned no gradient of its input")),
                None => {}
            }
        }
        Ok(())
    }

    /// Final norm and projection of the image tokens.
    fn head(&self, flight: &Flight) -> Result<Tensor> {
        let cond = &flight.conditioning;
        let weight = self.other.linear("proj_out")?;
        image_tokens(&flight.hidden, cond.positions.text_tokens)
            .and_then(|x| gemm::nt(&layer_norm::forward(&x, &cond.out_shift, &cond.out_scale, self.geometry.eps)?, weight))
            .map_err(|e| tensor_error("the final projection failed", e))
    }

    /// The gradient of the last block's output, from the difference of prediction and target (float32).
    fn head_backward(&self, flight: &Flight, difference: Tensor, batches: usize) -> Result<Hidden> {
        let cond = &flight.conditioning;
        let weight = self.other.linear("proj_out")?;
        (|| {
            let factor = 2.0 / (difference.elem_count() as f64 * batches as f64);
            let dpred = (difference * factor)?.to_dtype(self.dtype)?;
            let x = image_tokens(&flight.hidden, cond.positions.text_tokens)?;
            let image = layer_norm::backward(&x, &cond.out_scale, self.geometry.eps, &gemm::nn(&dpred, weight)?)?;
            let (b, _, d) = image.dims3()?;
            // The text tokens' outputs are cut off: no gradient comes from there.
            let text = Tensor::zeros((b, cond.positions.text_tokens, d), image.dtype(), image.device())?;
            Ok(match &flight.hidden {
                Hidden::Streams(_) => Hidden::Streams(Streams { image, text }),
                Hidden::Joint(_) => Hidden::Joint(Tensor::cat(&[text, image], 1)?),
            })
        })()
        .map_err(|e| tensor_error("the backward pass of the final projection failed", e))
    }
}

fn next_visit(source: &mut dyn BlockSource, block: BlockId, stop: &dyn Fn() -> bool) -> Result<Arc<BlockWeights>> {
    if stop() {
        return Err(Error::try_again("the step was abandoned because the trainer was asked to stop"));
    }
    let weights = source.next(block)?;
    if weights.block() != block {
        return Err(Error::invariant("the source delivered another block").expected(block.0).found(weights.block().0));
    }
    Ok(weights)
}

fn image_tokens(hidden: &Hidden, text: usize) -> candle_core::Result<Tensor> {
    match hidden {
        Hidden::Streams(s) => Ok(s.image.clone()),
        Hidden::Joint(h) => h.narrow(1, text, h.dim(1)? - text)?.contiguous(),
    }
}

/// The gradient of both streams, whatever form that of the block above has.
fn split(gradient: &Hidden, text: usize) -> candle_core::Result<Streams> {
    match gradient {
        Hidden::Streams(s) => Ok(s.clone()),
        Hidden::Joint(h) => {
            let image = image_tokens(gradient, text)?;
            Ok(Streams { image, text: h.narrow(1, 0, text)?.contiguous()? })
        }
    }
}

/// The loss, and prediction minus target in float32. Rows are summed on the device, their sums on the host in float64, in order.
fn mean_squared_error(prediction: &Tensor, target: &Tensor) -> Result<(f64, Tensor)> {
    (|| {
        let difference = (prediction.to_dtype(DType::F32)? - target.to_device(prediction.device())?)?;
        let rows = difference.sqr()?.sum(candle_core::D::Minus1)?.flatten_all()?.to_vec1::<f32>()?;
        let total: f64 = rows.into_iter().map(f64::from).sum();
        Ok((total / difference.elem_count() as f64, difference))
    })()
    .map_err(|e| tensor_error("cannot compute the loss", e))
}
