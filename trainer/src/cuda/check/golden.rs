//! Float32 on the device against the reference's files.
#![forbid(unsafe_code)]

use candle_core::Tensor;
use serenity_cuda::{Gpu, Mat, Ty};
use serenity_protocol::Result;
use serenity_protocol::geometry::BlockId;
use serenity_protocol::model_path::TransformerSource;

use super::model::{Hosted, Kind, OPTIMIZER, SMALL_BUDGET, Setup, build, open_model, sizes};
use super::{Line, Options, compared, holds, rounded, worst};
use crate::cuda::plan::{Limits, Shape, is_double};
use crate::cuda::step::{Sample, read};
use crate::model::{AdapterSet, tensor_error};
use crate::optimizer::host;
use crate::parity::{self, Case};

pub(super) fn golden(options: &Options, emit: &mut dyn FnMut(Line)) -> Result<()> {
    let model = open_model(&options.goldens)?;
    golden_forward(options, &model, emit)?;
    golden_step(options, &model, emit)?;
    rounded::forward(options, &model, emit)?;
    rounded::step(options, &model, emit)
}

fn golden_forward(options: &Options, model: &TransformerSource, emit: &mut dyn FnMut(Line)) -> Result<()> {
    let case = Case::open(&options.goldens.join("cases/transformer.safetensors"))?;
    let (text, image) = (case.ids("txt_ids")?, case.ids("img_ids")?);
    let (noisy, context, timestep) = (case.tensor("hidden")?, case.tensor("ctx")?, case.vector("timestep")?);
    let sizes = (timestep.len(), text.len(), image.len());
    let none = AdapterSet::new(1, 1.0, Vec::new())?;
    let optimizer = OPTIMIZER;
    let gpu = Gpu::open(options.device)?;
    let hosted = Hosted::of(&gpu, model, Kind::F32)?;
    let setup = Setup {
        hosted: &hosted,
        ty: Ty::F32,
        adapters: &none,
        optimizer: &optimizer,
        batches: vec![sizes],
        budget: SMALL_BUDGET,
        limits: Limits { buffers: (2, 2), resident_max: 0, ..Limits::default() },
    };
    let mut step = build(gpu, setup)?;
    emit(holds("plan of the golden model", true, step.plan().to_string()));
    let sample = Sample {
        noisy: &noisy,
        context: &context,
        target: None,
        guidance: model.geometry().guidance_embeds.then(|| case.vector("guidance")).transpose()?,
        timestep,
        positions: text.iter().chain(&image).copied().collect(),
    };
    let mut seen: Vec<(BlockId, Shape, Mat, Vec<f32>)> = Vec::new();
    let gpu = Gpu::open(options.device)?;
    let (temb, output) = step.forward(&sample, &mut |block, shape, mat| {
        seen.push((block, *shape, mat, read(&gpu, settled(&gpu, mat)?)?));
        Ok(())
    })?;
    let expected = |name: &str| host(&case.tensor(name)?).map_err(|e| tensor_error("a golden tensor cannot be read", e));
    emit(compared("temb", worst(&temb, &expected("temb")?), 1e-5));
    let g = model.geometry();
    for (block, shape, _, values) in &seen {
        let index = usize::from(block.0);
        if !is_double(g, *block) {
            let name = format!("single.{}", index - g.num_layers);
            emit(compared(name.clone(), worst(values, &expected(&name)?), 1e-5));
            continue;
        }
        if index + 1 == g.num_layers && g.num_single_layers > 0 && shape.samples > 1 {
            // In joint order already.
            let (text, image) = unjoin(values, shape);
            emit(compared(format!("double.{index}.txt"), worst(&text, &expected(&format!("double.{index}.txt"))?), 1e-5));
            emit(compared(format!("double.{index}.img"), worst(&image, &expected(&format!("double.{index}.img"))?), 1e-5));
            continue;
        }
        let (text, image) = values.split_at(shape.text_rows() * shape.inner);
        emit(compared(format!("double.{index}.txt"), worst(text, &expected(&format!("double.{index}.txt"))?), 1e-5));
        emit(compared(format!("double.{index}.img"), worst(image, &expected(&format!("double.{index}.img"))?), 1e-5));
    }
    emit(compared("output", worst(&output, &expected("output")?), 1e-5));
    Ok(())
}

/// Another handle of the device reads what the step's streams have written: they must be done.
fn settled(gpu: &Gpu, mat: Mat) -> Result<Mat> {
    gpu.sync().map(|()| mat)
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

fn golden_step(options: &Options, model: &TransformerSource, emit: &mut dyn FnMut(Line)) -> Result<()> {
    let case = Case::open(&options.goldens.join("cases/lora_step.safetensors"))?;
    let (batch, optimizer, adapters) = (parity::training_batch(&case, None)?, parity::optimizer(&case)?, parity::initial_adapters(&case)?);
    let batches = vec![sizes(&batch)?];
    let gpu = Gpu::open(options.device)?;
    let hosted = Hosted::of(&gpu, model, Kind::F32)?;
    let setup = Setup {
        hosted: &hosted,
        ty: Ty::F32,
        adapters: &adapters,
        optimizer: &optimizer,
        batches,
        budget: SMALL_BUDGET,
        limits: Limits { buffers: (2, 2), resident_max: 0, ..Limits::default() },
    };
    let mut step = build(gpu, setup)?;
    let expected = |name: &str| host(&case.tensor(name)?).map_err(|e| tensor_error("a golden tensor cannot be read", e));
    let worst_of = |set: &mut dyn Iterator<Item = (String, Tensor)>| -> Result<f64> {
        let mut error = 0.0f64;
        for (name, tensor) in set {
            let ours = host(&tensor).map_err(|e| tensor_error("an adapter cannot be read", e))?;
            let one = worst(&ours, &expected(&name)?);
            error = if one.is_nan() { f64::NAN } else { error.max(one) };
        }
        Ok(error)
    };
    for update in 0..3 {
        let losses = step.gradients(std::slice::from_ref(&batch), &|| false)?;
        let loss: Vec<f32> = losses.iter().map(|l| *l as f32).collect();
        emit(compared(format!("loss.{update}"), worst(&loss, &expected(&format!("loss.{update}"))?), 1e-5));
        if update == 0 {
            let grads = step.read_gradients()?;
            let named = |part: &str, list: &[Tensor]| -> Vec<(String, Tensor)> {
                adapters.adapters.iter().zip(list).map(|(a, t)| (format!("grad.{}.{part}.weight", a.name), t.clone())).collect()
            };
            let (a, b) = (named("lora_A", &grads.a), named("lora_B", &grads.b));
            emit(compared(format!("{} gradients of A", a.len()), worst_of(&mut a.into_iter())?, 1e-4));
            emit(compared(format!("{} gradients of B", b.len()), worst_of(&mut b.into_iter())?, 1e-4));
        }
        let norm = step.norm()?;
        emit(compared(format!("grad_norm.{update}"), worst(&[norm as f32], &expected(&format!("grad_norm.{update}"))?), 1e-5));
        step.update(optimizer.learning_rate)?;
    }
    let after = step.state()?.adapters;
    let named = after
        .adapters
        .into_iter()
        .flat_map(|x| [(format!("after3.{}.lora_A.weight", x.name), x.a), (format!("after3.{}.lora_B.weight", x.name), x.b)]);
    emit(compared("adapters after three updates", worst_of(&mut named.into_iter())?, 1e-4));
    Ok(())
}
