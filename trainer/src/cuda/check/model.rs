//! The small models of the checks: the reference's, in every form that blocks travel in, with adapters and samples.
#![forbid(unsafe_code)]

use std::path::Path;
use std::rc::Rc;

use candle_core::{DType, Device, Tensor};
use serenity_cuda::driver::Pinned;
use serenity_cuda::{Event, Gpu, Ty};
use serenity_protocol::config::OptimizerConfig;
use serenity_protocol::geometry::{BlockId, LinearSpec, TransformerGeometry};
use serenity_protocol::model_path::{self, TransformerSource};
use serenity_protocol::slab::quant;
use serenity_protocol::{Error, Result};

use crate::cuda::blocks::{Form, HostSupply, Part, Payload};
use crate::cuda::plan::{Limits, is_double};
use crate::cuda::step::{CudaStep, Parts};
use crate::model::{AdapterSet, MicroBatch, OtherWeights, tensor_error};
use crate::rng;
use crate::synthetic_source::SyntheticSource;

/// Budget of the small models.
pub(super) const SMALL_BUDGET: usize = 2 << 30;
/// Codes of a row are padded to a multiple of this.
pub(super) const PADDING: usize = 64;
/// Places in a payload are multiples of this.
pub(super) const ALIGN: usize = 256;

/// In which form a model's blocks are given to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    F32,
    /// As it is, rounded.
    Rounded,
    /// The values that INT8 stands for.
    Bf16,
    Int8,
}

/// Reads a tensor by name and shape.
pub(super) type Read<'r> = &'r dyn Fn(&str, &[usize]) -> Result<Vec<f32>>;

/// The codes and scales of a matrix, rows padded.
pub(super) fn quantised(values: &[f32], cols: usize) -> (Vec<i8>, Vec<f32>, usize) {
    let padded = cols.next_multiple_of(PADDING);
    let mut codes = vec![0i8; values.len() / cols.max(1) * padded];
    let scales = values.chunks_exact(cols).zip(codes.chunks_exact_mut(padded)).map(|(row, out)| quant::quantize_row(row, out)).collect();
    (codes, scales, padded)
}

/// What a matrix is after quantisation: its dequantised values.
pub(super) fn through_int8(values: &[f32], cols: usize) -> Vec<f32> {
    let (codes, scales, padded) = quantised(values, cols);
    let mut row = vec![half::bf16::ZERO; cols];
    let mut all = Vec::with_capacity(values.len());
    for (codes, scale) in codes.chunks_exact(padded).zip(scales) {
        quant::dequantize(codes.get(..cols).unwrap_or_default(), scale, &mut row);
        all.extend(row.iter().map(|v| v.to_f32()));
    }
    all
}

/// The values of a block's matrix that a model in this form computes with.
pub(super) fn values_of(kind: Kind, values: Vec<f32>, cols: usize) -> Vec<f32> {
    match kind {
        Kind::F32 => values,
        Kind::Rounded => values.into_iter().map(|v| half::bf16::from_f32(v).to_f32()).collect(),
        Kind::Bf16 | Kind::Int8 => through_int8(&values, cols),
    }
}

pub(super) fn payload(g: &TransformerGeometry, block: BlockId, kind: Kind, read: Read<'_>) -> Result<(Payload, Vec<u8>)> {
    let (mut parts, mut bytes) = (Vec::new(), Vec::new());
    for LinearSpec { name, out_features: rows, in_features: cols } in g.block_linears(block) {
        let values = read(&format!("{name}.weight"), &[rows, cols])?;
        let mut put = |data: &[u8]| {
            let at = bytes.len();
            bytes.extend_from_slice(data);
            bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
            at
        };
        let form = match kind {
            Kind::F32 => Form::Dense(Ty::F32, put(bytemuck::cast_slice(&values))),
            Kind::Rounded | Kind::Bf16 => {
                let rounded: Vec<half::bf16> = values_of(kind, values, cols).into_iter().map(half::bf16::from_f32).collect();
                Form::Dense(Ty::Bf16, put(bytemuck::cast_slice(&rounded)))
            }
            Kind::Int8 => {
                let (codes, scales, padded) = quantised(&values, cols);
                Form::Int8 { codes: put(bytemuck::cast_slice(&codes)), scales: put(bytemuck::cast_slice(&scales)), padded }
            }
        };
        parts.push(Part { rows, cols, form });
    }
    Ok((Payload { bytes: bytes.len(), parts }, bytes))
}

/// Random codes with scales that keep activations near one.
pub(super) fn random_payload(g: &TransformerGeometry, block: BlockId, seed: u64) -> (Payload, Vec<u8>) {
    let (mut parts, mut bytes) = (Vec::new(), Vec::new());
    for spec in g.block_linears(block) {
        let padded = spec.in_features.next_multiple_of(PADDING);
        let codes = bytes.len();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ spec.out_features as u64 ^ (seed << 32);
        bytes.extend((0..spec.out_features * padded).map(|_| {
            // xorshift: these numbers are only there to be multiplied.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        }));
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        let scales = bytes.len();
        let scale = (1.0 / (73.0 * (spec.in_features as f32).sqrt())).to_le_bytes();
        bytes.extend((0..spec.out_features).flat_map(|_| scale));
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        parts.push(Part { rows: spec.out_features, cols: spec.in_features, form: Form::Int8 { codes, scales, padded } });
    }
    (Payload { bytes: bytes.len(), parts }, bytes)
}

pub(super) fn pinned(gpu: &Gpu, bytes: &[u8]) -> Result<Rc<Pinned>> {
    let mut memory = Pinned::new(gpu.context(), bytes.len())?;
    memory.write_after(&Event::new(gpu.context())?, 0, bytes)?;
    Ok(Rc::new(memory))
}

/// A model on the host in one form, ready for devices.
pub(super) struct Hosted {
    pub(super) geometry: TransformerGeometry,
    pub(super) other: OtherWeights,
    pub(super) payloads: Vec<Payload>,
    pub(super) memory: Vec<Rc<Pinned>>,
}

impl Hosted {
    /// A model from files.
    pub(super) fn of(gpu: &Gpu, model: &TransformerSource, kind: Kind) -> Result<Self> {
        let g = model.geometry();
        let read = |name: &str, shape: &[usize]| model.tensor_f32(name, shape);
        // As a run has them: exact for comparison with the reference, rounded where the blocks are.
        let other = OtherWeights::load(g, &Device::Cpu, DType::F32, kind != Kind::F32, read)?;
        let (mut payloads, mut memory) = (Vec::new(), Vec::new());
        for block in g.blocks() {
            let (layout, bytes) = payload(g, block, kind, &read)?;
            payloads.push(layout);
            memory.push(pinned(gpu, &bytes)?);
        }
        Ok(Self { geometry: g.clone(), other, payloads, memory })
    }

    /// Random codes; blocks of a kind share theirs if `shared`.
    pub(super) fn random(gpu: &Gpu, g: &TransformerGeometry, dtype: DType, shared: bool) -> Result<Self> {
        let (mut payloads, mut memory): (Vec<Payload>, Vec<Rc<Pinned>>) = (Vec::new(), Vec::new());
        for block in g.blocks() {
            let double = is_double(g, block);
            let like = g.blocks().take(payloads.len()).position(|b| shared && is_double(g, b) == double);
            let made = match like.and_then(|i| Some((payloads.get(i)?.clone(), memory.get(i)?.clone()))) {
                Some(made) => made,
                None => {
                    let (payload, bytes) = random_payload(g, block, if shared { 0 } else { u64::from(block.0) });
                    (payload, pinned(gpu, &bytes)?)
                }
            };
            payloads.push(made.0);
            memory.push(made.1);
        }
        let other = SyntheticSource::other(g, &Device::Cpu, dtype, 1)?;
        Ok(Self { geometry: g.clone(), other, payloads, memory })
    }
}

/// How a model is run.
pub(super) struct Setup<'s> {
    pub(super) hosted: &'s Hosted,
    pub(super) ty: Ty,
    pub(super) adapters: &'s AdapterSet,
    pub(super) optimizer: &'s OptimizerConfig,
    pub(super) batches: Vec<(usize, usize, usize)>,
    pub(super) budget: usize,
    pub(super) limits: Limits,
}

pub(super) fn build(gpu: Gpu, setup: Setup<'_>) -> Result<CudaStep> {
    let parts = Parts {
        geometry: &setup.hosted.geometry,
        ty: setup.ty,
        other: &setup.hosted.other,
        adapters: setup.adapters,
        optimizer: setup.optimizer,
        batches: setup.batches,
        payloads: setup.hosted.payloads.clone(),
        supply: Box::new(HostSupply::new(setup.hosted.memory.clone())),
        budget: setup.budget,
        limits: setup.limits,
        timed: false,
    };
    CudaStep::new(gpu, parts)
}

pub(super) fn open_model(goldens: &Path) -> Result<TransformerSource> {
    let path = goldens.join("model");
    let text = path.to_str().ok_or_else(|| Error::config("the path of the goldens is not UTF-8"))?;
    TransformerSource::open(&model_path::resolve_path(text)?)
}

pub(super) const OPTIMIZER: OptimizerConfig =
    OptimizerConfig { learning_rate: 1e-3, weight_decay: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm: 1.0 };

pub(super) fn sizes(batch: &MicroBatch) -> Result<(usize, usize, usize)> {
    let dims = |t: &Tensor| t.dims3().map_err(|e| tensor_error("a micro-batch's tensor must have three dimensions", e));
    let ((b, image, _), (_, text, _)) = (dims(&batch.noisy)?, dims(&batch.context)?);
    Ok((b, text, image))
}

pub(super) fn random_batch(
    g: &TransformerGeometry,
    seed: u64,
    (samples, text, height, width): (usize, usize, usize, usize),
) -> Result<MicroBatch> {
    let tensor = |what: &str, rows: usize, cols: usize| -> Result<Tensor> {
        let values = rng::normals(&mut rng::stream(seed, what, 0, 0), samples * rows * cols);
        Tensor::from_vec(values, (samples, rows, cols), &Device::Cpu).map_err(|e| tensor_error("cannot hold a random sample", e))
    };
    Ok(MicroBatch {
        noisy: tensor("noisy", height * width, g.in_channels)?,
        context: tensor("context", text, g.joint_attention_dim)?,
        // No two alike, in a micro-batch or between them.
        sigma: rng::uniforms(&mut rng::stream(seed, "sigma", 0, 0), samples, 0.05, 0.95),
        guidance: g.guidance_embeds.then_some(3.5),
        height,
        width,
        target: tensor("target", height * width, g.out_channels())?,
    })
}

/// Adapters of every block linear with nonzero B, so that every path of the backward pass counts.
pub(super) fn everything(g: &TransformerGeometry, rank: usize) -> Result<AdapterSet> {
    let targets: Vec<LinearSpec> = g.blocks().flat_map(|b| g.block_linears(b)).collect();
    let mut set = AdapterSet::init(&targets, rank, 2.0 * rank as f64, 7, &Device::Cpu)?;
    for adapter in &mut set.adapters {
        let (rows, cols) = adapter.b.dims2().map_err(|e| tensor_error("an adapter has no shape", e))?;
        let values = rng::uniforms(&mut rng::stream(9, &adapter.name, 0, 0), rows * cols, -0.05, 0.05);
        adapter.b = Tensor::from_vec(values, (rows, cols), &Device::Cpu).map_err(|e| tensor_error("cannot hold an adapter", e))?;
    }
    Ok(set)
}

/// Micro-batches of one step: different sizes, and more samples in all than the conditioning's weights are read once for.
pub(super) fn test_batches(g: &TransformerGeometry) -> Result<Vec<MicroBatch>> {
    [(1, 7, 4, 6), (2, 5, 3, 2), (1, 16, 8, 9), (7, 3, 2, 3)]
        .into_iter()
        .zip(20..)
        .map(|(sizes, seed)| random_batch(g, seed, sizes))
        .collect()
}
