//! [`crate::parity`] on a GPU: the same cases and the same output names, in float32 by the code of training.
//!
//! Weights come from the checkpoint unquantised, blocks through the buffers that blocks stream through.
#![forbid(unsafe_code)]

use std::rc::Rc;

use candle_core::{DType, Device, Tensor};
use serenity_cuda::driver::Pinned;
use serenity_cuda::{Event, Gpu, Ty};
use serenity_protocol::config::OptimizerConfig;
use serenity_protocol::geometry::{BlockId, BlockKind, TransformerGeometry};
use serenity_protocol::model_path::TransformerSource;
use serenity_protocol::{Error, Result};

use crate::cuda::CudaStep;
use crate::cuda::blocks::{Form, HostSupply, Part, Payload};
use crate::cuda::plan::{Limits, Shape};
use crate::cuda::step::{Parts, Sample, read};
use crate::model::{AdapterSet, OtherWeights, tensor_error};
use crate::parity::{Case, Computed, Kind, Outputs, UPDATES, initial_adapters, optimizer, training_batch};

/// Places in a payload are multiples of this.
const ALIGN: usize = 256;
/// Device memory that is left to libraries and others.
const MARGIN: u64 = 512 << 20;

/// The computation on device `ordinal`.
///
/// # Errors
/// As [`crate::parity::run`]; [`Error::Absent`] without device.
pub fn compute(ordinal: usize, kind: Kind, weights: &TransformerSource, case: &Case, grid: Option<(usize, usize)>) -> Result<Computed> {
    match kind {
        Kind::Forward => Ok(Computed { outputs: forward(ordinal, weights, case)?, adapters: None }),
        Kind::LoraStep => lora_step(ordinal, weights, case, grid),
    }
}

/// A step on the device over the checkpoint's weights.
fn open(
    gpu: Gpu,
    weights: &TransformerSource,
    adapters: &AdapterSet,
    config: &OptimizerConfig,
    sizes: (usize, usize, usize),
) -> Result<CudaStep> {
    let g = weights.geometry();
    let other = OtherWeights::load(g, &Device::Cpu, DType::F32, false, |name, shape| weights.tensor_f32(name, shape))?;
    let (mut payloads, mut memory) = (Vec::new(), Vec::new());
    for block in g.blocks() {
        let (payload, bytes) = payload(g, block, weights)?;
        let mut pinned = Pinned::new(gpu.context(), bytes.len())?;
        pinned.write_after(&Event::new(gpu.context())?, 0, &bytes)?;
        payloads.push(payload);
        memory.push(Rc::new(pinned));
    }
    let budget = gpu.memory()?.free.saturating_sub(MARGIN) as usize;
    let parts = Parts {
        geometry: g,
        ty: Ty::F32,
        other: &other,
        adapters,
        optimizer: config,
        batches: vec![sizes],
        payloads,
        supply: Box::new(HostSupply::new(memory)),
        budget,
        limits: Limits { buffers: (2, 2), resident_max: 0, ..Limits::default() },
        timed: false,
    };
    CudaStep::new(gpu, parts)
}

fn payload(g: &TransformerGeometry, block: BlockId, weights: &TransformerSource) -> Result<(Payload, Vec<u8>)> {
    let (mut parts, mut bytes) = (Vec::new(), Vec::new());
    for linear in g.block_linears(block) {
        let (rows, cols) = (linear.out_features, linear.in_features);
        let values = weights.tensor_f32(&format!("{}.weight", linear.name), &[rows, cols])?;
        parts.push(Part { rows, cols, form: Form::Dense(Ty::F32, bytes.len()) });
        bytes.extend_from_slice(bytemuck::cast_slice(&values));
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
    }
    Ok((Payload { bytes: bytes.len(), parts }, bytes))
}

fn tensor(values: Vec<f32>, shape: (usize, usize, usize)) -> Result<Tensor> {
    Tensor::from_vec(values, shape, &Device::Cpu).map_err(|e| tensor_error("cannot hold an output", e))
}

fn forward(ordinal: usize, weights: &TransformerSource, case: &Case) -> Result<Outputs> {
    let g = weights.geometry();
    let (text, image) = (case.ids("txt_ids")?, case.ids("img_ids")?);
    let (noisy, context, timestep) = (case.tensor("hidden")?, case.tensor("ctx")?, case.vector("timestep")?);
    let (samples, texts, images) = (timestep.len(), text.len(), image.len());
    let none = AdapterSet::new(1, 1.0, Vec::new())?;
    let config = OptimizerConfig { learning_rate: 0.0, weight_decay: 0.0, beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm: 0.0 };
    let mut step = open(Gpu::open(ordinal)?, weights, &none, &config, (samples, texts, images))?;
    let sample = Sample {
        noisy: &noisy,
        context: &context,
        target: None,
        guidance: if case.contains("guidance") { Some(case.vector("guidance")?) } else { None },
        timestep,
        positions: text.iter().chain(&image).copied().collect(),
    };
    let mut outputs = Outputs::new();
    // Another handle of the device, which reads what the step's streams have written.
    let reader = Gpu::open(ordinal)?;
    let (temb, output) = step.forward(&sample, &mut |block, shape, mat| {
        reader.sync()?;
        let values = read(&reader, mat)?;
        match g.kind(block) {
            BlockKind::Single(n) => outputs.push((format!("single.{n}"), tensor(values, (samples, shape.tokens(), shape.inner))?)),
            BlockKind::Double(n) => {
                // The last one before single blocks leaves joint order.
                let joint = n + 1 == g.num_layers && g.num_single_layers > 0;
                let (t, i) = if joint { unjoin(&values, shape) } else { streams(values, shape) };
                outputs.push((format!("double.{n}.img"), tensor(i, (samples, images, shape.inner))?));
                outputs.push((format!("double.{n}.txt"), tensor(t, (samples, texts, shape.inner))?));
            }
        }
        Ok(())
    })?;
    let width = temb.len() / samples.max(1);
    let temb = Tensor::from_vec(temb, (samples, width), &Device::Cpu).map_err(|e| tensor_error("cannot hold an output", e))?;
    outputs.push(("temb".into(), temb));
    outputs.push(("output".into(), tensor(output, (samples, images, g.out_channels()))?));
    Ok(outputs)
}

/// Text rows and image rows, from all of the one and then all of the other.
fn streams(mut values: Vec<f32>, s: &Shape) -> (Vec<f32>, Vec<f32>) {
    let image = values.split_off(s.text_rows() * s.inner);
    (values, image)
}

/// Text rows and image rows of all samples, from joint order.
fn unjoin(values: &[f32], s: &Shape) -> (Vec<f32>, Vec<f32>) {
    let (mut text, mut image) = (Vec::new(), Vec::new());
    for sample in values.chunks_exact(s.tokens() * s.inner) {
        let (t, i) = sample.split_at(s.text * s.inner);
        text.extend_from_slice(t);
        image.extend_from_slice(i);
    }
    (text, image)
}

fn lora_step(ordinal: usize, weights: &TransformerSource, case: &Case, grid: Option<(usize, usize)>) -> Result<Computed> {
    let batch = training_batch(case, grid)?;
    let (config, adapters) = (optimizer(case)?, initial_adapters(case)?);
    let dims = |t: &Tensor| t.dims3().map_err(|e| tensor_error("a sample's tensor must have three dimensions", e));
    let ((samples, images, _), (_, texts, _)) = (dims(&batch.noisy)?, dims(&batch.context)?);
    let mut step = open(Gpu::open(ordinal)?, weights, &adapters, &config, (samples, texts, images))?;
    let mut outputs = Outputs::new();
    let scalar = |value: f64| Tensor::from_vec(vec![value as f32], 1, &Device::Cpu).map_err(|e| tensor_error("cannot place a number", e));
    let (_, prediction) = step.forward(&Sample::of(&batch)?, &mut |_, _, _| Ok(()))?;
    outputs.push(("pred".into(), tensor(prediction, (samples, images, weights.geometry().out_channels()))?));
    for update in 0..UPDATES {
        let losses = step.gradients(std::slice::from_ref(&batch), &|| false)?;
        if update == 0 {
            let grads = step.read_gradients()?;
            for ((adapter, a), b) in adapters.adapters.iter().zip(grads.a).zip(grads.b) {
                outputs.push((format!("grad.{}.lora_A.weight", adapter.name), a));
                outputs.push((format!("grad.{}.lora_B.weight", adapter.name), b));
            }
        }
        let loss = losses.first().copied().ok_or_else(|| Error::invariant("a step returned no loss"))?;
        let norm = step.norm()?;
        step.update(config.learning_rate)?;
        outputs.push((format!("loss.{update}"), scalar(loss)?));
        outputs.push((format!("grad_norm.{update}"), scalar(norm)?));
    }
    let adapters = step.state()?.adapters;
    for adapter in &adapters.adapters {
        outputs.push((format!("after3.{}.lora_A.weight", adapter.name), adapter.a.clone()));
        outputs.push((format!("after3.{}.lora_B.weight", adapter.name), adapter.b.clone()));
    }
    Ok(Computed { outputs, adapters: Some(adapters) })
}
