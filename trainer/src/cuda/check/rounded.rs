//! bf16 on the device against the reference's cases.
//!
//! Two errors are kept apart. Rounding the weights to bf16 or INT8 changes the model: of the reference's tiny model, whose weights are float32,
//! bf16 alone changes the prediction by more than all of the engine's arithmetic. So what has limits is the device against float32
//! arithmetic on the very weights that it has (by the CPU path, which is the reference's to 1e-5); the distance to the reference's own
//! weights is reported, with the part that the weights have in it.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use serenity_cuda::{Gpu, Ty};
use serenity_protocol::Result;
use serenity_protocol::config::OptimizerConfig;
use serenity_protocol::model_path::TransformerSource;

use super::model::{Hosted, Kind, OPTIMIZER, SMALL_BUDGET, Setup, build, sizes, values_of};
use super::{Line, Options, compared, errors, reported};
use crate::cuda::plan::Limits;
use crate::cuda::step::{CudaStep, Sample};
use crate::model::{AdapterSet, CheckpointSource, Flux2, OtherWeights, tensor_error};
use crate::optimizer::host;
use crate::parity::{self, Case};

/// Largest difference of a prediction, of the largest value.
pub(super) const LARGEST: f64 = 2e-2;
/// Norm of a prediction's difference, of its norm.
const NORM: f64 = 3e-3;
/// The same with adapters: those of the cases make up to half of the prediction, and a layer adds their rounded output to its rounded output.
pub(super) const ADAPTED_NORM: f64 = 5e-3;

const FORMS: [(&str, Kind); 2] = [("bf16", Kind::Rounded), ("INT8", Kind::Int8)];

/// Expected values by name.
type Values = HashMap<String, Vec<f32>>;

/// What float32 arithmetic makes of a case with the weights of a form.
fn exact(model: &TransformerSource, form: Kind, case: &Case, kind: parity::Kind) -> Result<Values> {
    let g = model.geometry();
    let read = |name: &str, shape: &[usize]| -> Result<Vec<f32>> {
        let values = model.tensor_f32(name, shape)?;
        let block = name.starts_with("transformer_blocks.") || name.starts_with("single_transformer_blocks.");
        Ok(match shape {
            [_, cols] if block => values_of(form, values, *cols),
            _ => values,
        })
    };
    let reference = Flux2::new(g.clone(), OtherWeights::load(g, &Device::Cpu, DType::F32, true, read)?);
    let mut source = CheckpointSource::new(g.clone(), Device::Cpu, DType::F32, Box::new(read));
    let computed = parity::compute_with(kind, &reference, &mut source, case, None)?;
    computed.outputs.into_iter().map(|(name, tensor)| Ok((name, values(&tensor)?))).collect()
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    host(tensor).map_err(|e| tensor_error("a tensor of a case cannot be read", e))
}

fn open(
    options: &Options,
    model: &TransformerSource,
    form: Kind,
    (adapters, optimizer): (&AdapterSet, &OptimizerConfig),
    sizes: (usize, usize, usize),
) -> Result<CudaStep> {
    let gpu = Gpu::open(options.device)?;
    let hosted = Hosted::of(&gpu, model, form)?;
    let limits = Limits { buffers: (2, 2), resident_max: 0, ..Limits::default() };
    build(gpu, Setup { hosted: &hosted, ty: Ty::Bf16, adapters, optimizer, batches: vec![sizes], budget: SMALL_BUDGET, limits })
}

/// A prediction: limits for the arithmetic, a report for the distance to the reference.
fn prediction(what: &str, limit: f64, ours: &[f32], exact: &[f32], golden: &[f32], emit: &mut dyn FnMut(Line)) {
    let (largest, norm) = errors(ours, exact);
    emit(compared(format!("{what}: largest difference"), largest, LARGEST));
    emit(compared(format!("{what}: norm"), norm, limit));
    let ((largest, norm), weights) = (errors(ours, golden), errors(exact, golden));
    let note = format!("of this the weights alone: {:.1e}; largest difference {largest:.1e}, weights alone {:.1e}", weights.1, weights.0);
    emit(reported(format!("{what}: norm to the model before rounding"), norm, note));
}

/// The prediction of the reference's forward pass.
pub(super) fn forward(options: &Options, model: &TransformerSource, emit: &mut dyn FnMut(Line)) -> Result<()> {
    let case = Case::open(&options.goldens.join("cases/transformer.safetensors"))?;
    let (text, image) = (case.ids("txt_ids")?, case.ids("img_ids")?);
    let (noisy, context, timestep) = (case.tensor("hidden")?, case.tensor("ctx")?, case.vector("timestep")?);
    let sample = Sample {
        noisy: &noisy,
        context: &context,
        target: None,
        guidance: model.geometry().guidance_embeds.then(|| case.vector("guidance")).transpose()?,
        timestep,
        positions: text.iter().chain(&image).copied().collect(),
    };
    let golden = values(&case.tensor("output")?)?;
    for (name, form) in FORMS {
        let none = AdapterSet::new(1, 1.0, Vec::new())?;
        let mut step = open(options, model, form, (&none, &OPTIMIZER), (sample.timestep.len(), text.len(), image.len()))?;
        let (temb, output) = step.forward(&sample, &mut |_, _, _| Ok(()))?;
        let exact = exact(model, form, &case, parity::Kind::Forward)?;
        let of = |name: &str| exact.get(name).map_or(&[][..], Vec::as_slice);
        emit(compared(format!("{name} temb"), errors(&temb, of("temb")).0, 1e-5));
        prediction(&format!("{name} output"), NORM, &output, of("output"), &golden, emit);
    }
    Ok(())
}

/// Prediction, gradients and three updates of the reference's step.
pub(super) fn step(options: &Options, model: &TransformerSource, emit: &mut dyn FnMut(Line)) -> Result<()> {
    let case = Case::open(&options.goldens.join("cases/lora_step.safetensors"))?;
    let (batch, optimizer, adapters) = (parity::training_batch(&case, None)?, parity::optimizer(&case)?, parity::initial_adapters(&case)?);
    for (name, form) in FORMS {
        let exact = exact(model, form, &case, parity::Kind::LoraStep)?;
        let of = |name: &str| exact.get(name).cloned().unwrap_or_default();
        let mut step = open(options, model, form, (&adapters, &optimizer), sizes(&batch)?)?;
        let (_, output) = step.forward(&Sample::of(&batch)?, &mut |_, _, _| Ok(()))?;
        prediction(&format!("{name} pred"), ADAPTED_NORM, &output, &of("pred"), &values(&case.tensor("pred")?)?, emit);
        for update in 0..3 {
            let losses: Vec<f32> = step.gradients(std::slice::from_ref(&batch), &|| false)?.into_iter().map(|l| l as f32).collect();
            emit(reported(format!("{name} loss.{update}"), errors(&losses, &of(&format!("loss.{update}"))).0, String::new()));
            if update == 0 {
                let grads = step.read_gradients()?;
                for (part, grads) in [("lora_A", &grads.a), ("lora_B", &grads.b)] {
                    let pairs = adapters.adapters.iter().zip(grads);
                    let pairs = pairs.map(|(a, t)| Ok((values(t)?, of(&format!("grad.{}.{part}.weight", a.name)), Vec::new())));
                    let (all, worst) = together(pairs.collect::<Result<_>>()?);
                    emit(reported(format!("{name} gradients of {part}: norm"), all, format!("worst tensor {worst:.1e}")));
                }
            }
            step.norm()?;
            step.update(optimizer.learning_rate)?;
        }
        let mut changes = Vec::new();
        for (before, after) in adapters.adapters.iter().zip(step.state()?.adapters.adapters) {
            let after3 = |part: &str| of(&format!("after3.{}.{part}.weight", before.name));
            changes.push((values(&after.a)?, after3("lora_A"), values(&before.a)?));
            changes.push((values(&after.b)?, after3("lora_B"), values(&before.b)?));
        }
        let (all, worst) = together(changes);
        emit(reported(format!("{name} change by three updates: norm"), all, format!("worst tensor {worst:.1e}")));
    }
    Ok(())
}

/// Norm of the difference of `(ours, theirs, from)` over that of `theirs - from`: of all tensors together, and of the worst. An empty `from` is
/// zero.
fn together(tensors: Vec<(Vec<f32>, Vec<f32>, Vec<f32>)>) -> (f64, f64) {
    let (mut ours, mut theirs, mut worst) = (Vec::new(), Vec::new(), 0.0f64);
    for (x, y, from) in tensors {
        let change = |v: Vec<f32>| -> Vec<f32> { if from.is_empty() { v } else { v.iter().zip(&from).map(|(v, f)| v - f).collect() } };
        let (x, y) = (change(x), change(y));
        let (_, norm) = errors(&x, &y);
        worst = if norm.is_nan() { f64::NAN } else { worst.max(norm) };
        ours.extend(x);
        theirs.extend(y);
    }
    (errors(&ours, &theirs).1, worst)
}
