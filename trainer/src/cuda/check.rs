//! `serenity-trainer gpu-check`: the training step on a device against the reference's files and the CPU path, and how fast it is.
//!
//! ```text
//! golden     float32: every block's output, loss, gradients and three updates of the reference
//! processor  float32 and bf16: several micro-batches of different sizes against the CPU path on the same dequantised weights
//! streamed   every way to bring the blocks: the same adapters, bit for bit, after some steps; and two runs the same
//! timing     steps of random weights at a given geometry, by phase
//! ```
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use serenity_cuda::driver::Pinned;
use serenity_cuda::{Event, Gpu, Mat, Ty};
use serenity_protocol::config::OptimizerConfig;
use serenity_protocol::geometry::{BlockId, LinearSpec, TransformerGeometry};
use serenity_protocol::model_path::{self, TransformerSource};
use serenity_protocol::slab::quant;
use serenity_protocol::{Error, Result};

use super::blocks::{Form, HostSupply, Part, Payload};
use super::plan::{Limits, Shape, is_double};
use super::step::{CudaStep, Parts, Sample, State, read};
use crate::model::{AdapterSet, CheckpointSource, Flux2, MicroBatch, OtherWeights, tensor_error};
use crate::optimizer::host;
use crate::parity::{self, Case};
use crate::rng;
use crate::synthetic_source::SyntheticSource;

/// What to check.
#[derive(Debug, Clone)]
pub struct Options {
    /// The reference's folder with `model` and `cases`.
    pub goldens: PathBuf,
    /// The device.
    pub device: usize,
    /// Sections; all if none is named.
    pub sections: Vec<String>,
    /// `config.json` of a transformer to time.
    pub geometry: Option<PathBuf>,
    /// Device memory of the timed run, MiB.
    pub budget_mb: usize,
    /// Pixels of a side of the timed run.
    pub resolution: usize,
    /// Micro-batches of a timed step.
    pub accumulation: usize,
    /// Timed steps.
    pub steps: usize,
    /// Tunings to time after the one of the environment, see [`serenity_cuda::Tuning`].
    pub variants: Vec<String>,
}

/// A line of the result.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// Section.
    pub section: &'static str,
    /// What was compared or measured.
    pub case: String,
    /// Worst error, where there is one.
    pub error: Option<f64>,
    /// What is allowed.
    pub limit: Option<f64>,
    /// Whether it passed.
    pub ok: bool,
    /// Figures or the failure's text.
    pub note: String,
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let number = |v: Option<f64>| v.map_or(String::new(), |v| format!("{v:.1e}"));
        let verdict = if self.ok { "ok" } else { "FAIL" };
        write!(f, "{:<10} {:<52} {:>8} {:>8} {verdict:<4} {}", self.section, self.case, number(self.error), number(self.limit), self.note)
    }
}

/// Budget of the small models.
const SMALL_BUDGET: usize = 2 << 30;
/// Codes of a row are padded to a multiple of this.
const PADDING: usize = 64;
/// Places in a payload are multiples of this.
const ALIGN: usize = 256;

/// Runs the sections; a section that fails is a line, not an end. `show` gets each line as it comes.
///
/// # Errors
/// [`Error::Config`] for an unknown section; [`Error::Absent`] if there is no device.
pub fn run(options: &Options, show: &mut dyn FnMut(&Line)) -> Result<bool> {
    type Run = fn(&Options, &mut dyn FnMut(Line)) -> Result<()>;
    let all: [(&'static str, Run); 4] = [("golden", golden), ("processor", processor), ("streamed", streamed), ("timing", timing)];
    if let Some(unknown) = options.sections.iter().find(|s| all.iter().all(|(name, _)| name != s)) {
        return Err(Error::config(format!("there is no section '{unknown}'")).expected("golden, processor, streamed, timing"));
    }
    drop(Gpu::open(options.device)?);
    let mut ok = true;
    for (section, run) in all {
        if !options.sections.is_empty() && !options.sections.iter().any(|s| s == section) {
            continue;
        }
        let mut emit = |line: Line| {
            let line = Line { section, ..line };
            ok &= line.ok;
            show(&line);
        };
        if let Err(e) = run(options, &mut emit) {
            emit(Line { section, case: "the section".into(), error: None, limit: None, ok: false, note: e.to_string() });
        }
    }
    Ok(ok)
}

fn compared(case: impl Into<String>, error: f64, limit: f64) -> Line {
    // Written so that NaN fails.
    Line { section: "", case: case.into(), error: Some(error), limit: Some(limit), ok: error <= limit, note: String::new() }
}

fn holds(case: impl Into<String>, ok: bool, note: String) -> Line {
    Line { section: "", case: case.into(), error: None, limit: None, ok, note }
}

/// The largest difference over the largest value, and the norm of the difference over the norm.
fn errors(x: &[f32], y: &[f32]) -> (f64, f64) {
    if x.len() != y.len() || x.iter().any(|v| !v.is_finite()) {
        return (f64::NAN, f64::NAN);
    }
    let pairs = || x.iter().zip(y).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    let largest = pairs().fold(0.0, |m: f64, (a, b)| m.max((a - b).abs())) / pairs().fold(1e-30, |m: f64, (_, b)| m.max(b.abs()));
    let square = |f: fn((f64, f64)) -> f64| pairs().map(f).map(|v| v * v).sum::<f64>().sqrt();
    (largest, square(|(a, b)| a - b) / square(|(_, b)| b).max(1e-30))
}

fn worst(x: &[f32], y: &[f32]) -> f64 {
    let (largest, norm) = errors(x, y);
    if largest.is_nan() { f64::NAN } else { largest.max(norm) }
}

/// In which form a model's blocks are given to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    F32,
    Bf16,
    Int8,
}

/// Reads a tensor by name and shape.
type Read<'r> = &'r dyn Fn(&str, &[usize]) -> Result<Vec<f32>>;

/// The codes and scales of a matrix, rows padded.
fn quantised(values: &[f32], cols: usize) -> (Vec<i8>, Vec<f32>, usize) {
    let padded = cols.next_multiple_of(PADDING);
    let mut codes = vec![0i8; values.len() / cols.max(1) * padded];
    let scales = values.chunks_exact(cols).zip(codes.chunks_exact_mut(padded)).map(|(row, out)| quant::quantize_row(row, out)).collect();
    (codes, scales, padded)
}

/// What a matrix is after quantisation: its dequantised values.
fn through_int8(values: &[f32], cols: usize) -> Vec<f32> {
    let (codes, scales, padded) = quantised(values, cols);
    let mut row = vec![half::bf16::ZERO; cols];
    let mut all = Vec::with_capacity(values.len());
    for (codes, scale) in codes.chunks_exact(padded).zip(scales) {
        quant::dequantize(codes.get(..cols).unwrap_or_default(), scale, &mut row);
        all.extend(row.iter().map(|v| v.to_f32()));
    }
    all
}

fn payload(g: &TransformerGeometry, block: BlockId, kind: Kind, read: Read<'_>) -> Result<(Payload, Vec<u8>)> {
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
            Kind::Bf16 => {
                let rounded: Vec<half::bf16> = through_int8(&values, cols).into_iter().map(half::bf16::from_f32).collect();
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

fn pinned(gpu: &Gpu, bytes: &[u8]) -> Result<Rc<Pinned>> {
    let mut memory = Pinned::new(gpu.context(), bytes.len())?;
    memory.write_after(&Event::new(gpu.context())?, 0, bytes)?;
    Ok(Rc::new(memory))
}

/// How a small model is run.
struct Setup<'s> {
    model: &'s TransformerSource,
    kind: Kind,
    ty: Ty,
    adapters: &'s AdapterSet,
    optimizer: &'s OptimizerConfig,
    batches: Vec<(usize, usize, usize)>,
    limits: Limits,
}

fn build(options: &Options, setup: Setup<'_>) -> Result<CudaStep> {
    let gpu = Gpu::open(options.device)?;
    let (model, g) = (setup.model, setup.model.geometry());
    let read = |name: &str, shape: &[usize]| model.tensor_f32(name, shape);
    // As a run has them: exact for comparison with the reference, rounded where the blocks are.
    let other = OtherWeights::load(g, &Device::Cpu, DType::F32, setup.kind != Kind::F32, read)?;
    let (mut payloads, mut memory) = (Vec::new(), Vec::new());
    for block in g.blocks() {
        let (layout, bytes) = payload(g, block, setup.kind, &read)?;
        payloads.push(layout);
        memory.push(pinned(&gpu, &bytes)?);
    }
    let parts = Parts {
        geometry: g,
        ty: setup.ty,
        other: &other,
        adapters: setup.adapters,
        optimizer: setup.optimizer,
        batches: setup.batches,
        payloads,
        supply: Box::new(HostSupply::new(memory)),
        budget: SMALL_BUDGET,
        limits: setup.limits,
        timed: false,
    };
    CudaStep::new(gpu, parts)
}

fn open_model(goldens: &Path) -> Result<TransformerSource> {
    let path = goldens.join("model");
    let text = path.to_str().ok_or_else(|| Error::config("the path of the goldens is not UTF-8"))?;
    TransformerSource::open(&model_path::resolve_path(text)?)
}

fn golden(options: &Options, emit: &mut dyn FnMut(Line)) -> Result<()> {
    let model = open_model(&options.goldens)?;
    golden_forward(options, &model, emit)?;
    golden_step(options, &model, emit)
}

fn golden_forward(options: &Options, model: &TransformerSource, emit: &mut dyn FnMut(Line)) -> Result<()> {
    let case = Case::open(&options.goldens.join("cases/transformer.safetensors"))?;
    let (text, image) = (case.ids("txt_ids")?, case.ids("img_ids")?);
    let (noisy, context, timestep) = (case.tensor("hidden")?, case.tensor("ctx")?, case.vector("timestep")?);
    let sizes = (timestep.len(), text.len(), image.len());
    let none = AdapterSet::new(1, 1.0, Vec::new())?;
    let optimizer = OPTIMIZER;
    let setup = Setup {
        model,
        kind: Kind::F32,
        ty: Ty::F32,
        adapters: &none,
        optimizer: &optimizer,
        batches: vec![sizes],
        limits: Limits { buffers: (2, 2), resident_max: 0, ..Limits::default() },
    };
    let mut step = build(options, setup)?;
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
    let setup = Setup {
        model,
        kind: Kind::F32,
        ty: Ty::F32,
        adapters: &adapters,
        optimizer: &optimizer,
        batches,
        limits: Limits { buffers: (2, 2), resident_max: 0, ..Limits::default() },
    };
    let mut step = build(options, setup)?;
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

const OPTIMIZER: OptimizerConfig =
    OptimizerConfig { learning_rate: 1e-3, weight_decay: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm: 1.0 };

fn sizes(batch: &MicroBatch) -> Result<(usize, usize, usize)> {
    let dims = |t: &Tensor| t.dims3().map_err(|e| tensor_error("a micro-batch's tensor must have three dimensions", e));
    let ((b, image, _), (_, text, _)) = (dims(&batch.noisy)?, dims(&batch.context)?);
    Ok((b, text, image))
}

fn random_batch(g: &TransformerGeometry, seed: u64, (samples, text, height, width): (usize, usize, usize, usize)) -> Result<MicroBatch> {
    let tensor = |what: &str, rows: usize, cols: usize| -> Result<Tensor> {
        let values = rng::normals(&mut rng::stream(seed, what, 0, 0), samples * rows * cols);
        Tensor::from_vec(values, (samples, rows, cols), &Device::Cpu).map_err(|e| tensor_error("cannot hold a random sample", e))
    };
    Ok(MicroBatch {
        noisy: tensor("noisy", height * width, g.in_channels)?,
        context: tensor("context", text, g.joint_attention_dim)?,
        sigma: (0..samples).map(|i| 0.3 + 0.5 * i as f32 / samples as f32).collect(),
        guidance: g.guidance_embeds.then_some(3.5),
        height,
        width,
        target: tensor("target", height * width, g.out_channels())?,
    })
}

/// Adapters of every block linear with nonzero B, so that every path of the backward pass counts.
fn everything(g: &TransformerGeometry, rank: usize) -> Result<AdapterSet> {
    let targets: Vec<LinearSpec> = g.blocks().flat_map(|b| g.block_linears(b)).collect();
    let mut set = AdapterSet::init(&targets, rank, 2.0 * rank as f64, 7, &Device::Cpu)?;
    for adapter in &mut set.adapters {
        let (rows, cols) = adapter.b.dims2().map_err(|e| tensor_error("an adapter has no shape", e))?;
        let values = rng::uniforms(&mut rng::stream(9, &adapter.name, 0, 0), rows * cols, -0.05, 0.05);
        adapter.b = Tensor::from_vec(values, (rows, cols), &Device::Cpu).map_err(|e| tensor_error("cannot hold an adapter", e))?;
    }
    Ok(set)
}

fn test_batches(g: &TransformerGeometry) -> Result<Vec<MicroBatch>> {
    [(1, 7, 4, 6), (2, 5, 3, 2), (1, 16, 8, 9)].into_iter().zip(20..).map(|(sizes, seed)| random_batch(g, seed, sizes)).collect()
}

fn processor(options: &Options, emit: &mut dyn FnMut(Line)) -> Result<()> {
    let model = open_model(&options.goldens)?;
    let g = model.geometry();
    let (adapters, batches) = (everything(g, 8)?, test_batches(g)?);
    let read = |name: &str, shape: &[usize]| -> Result<Vec<f32>> {
        let values = model.tensor_f32(name, shape)?;
        let block = name.starts_with("transformer_blocks.") || name.starts_with("single_transformer_blocks.");
        Ok(match shape {
            [_, cols] if block => through_int8(&values, *cols),
            _ => values,
        })
    };
    let reference = Flux2::new(g.clone(), OtherWeights::load(g, &Device::Cpu, DType::F32, true, read)?);
    let mut source = CheckpointSource::new(g.clone(), Device::Cpu, DType::F32, Box::new(read));
    let expected = reference.loss_and_grads(&mut source, &adapters, &batches, &|| false)?;
    let optimizer = OPTIMIZER;
    for (ty, limit) in [(Ty::F32, 1e-4), (Ty::Bf16, 5e-2)] {
        let setup = Setup {
            model: &model,
            kind: Kind::Int8,
            ty,
            adapters: &adapters,
            optimizer: &optimizer,
            batches: batches.iter().map(sizes).collect::<Result<_>>()?,
            limits: Limits { buffers: (2, 2), resident_max: 1, ..Limits::default() },
        };
        let mut step = build(options, setup)?;
        let losses = step.gradients(&batches, &|| false)?;
        for (i, (ours, theirs)) in losses.iter().zip(&expected.losses).enumerate() {
            emit(compared(format!("{} loss of micro-batch {i}", ty.name()), (ours - theirs).abs() / theirs, limit / 5.0));
        }
        let grads = step.read_gradients()?;
        let forward_only = step.loss(&batches)?;
        emit(holds(format!("{} losses of a forward pass alone are the same", ty.name()), forward_only == losses, String::new()));
        for (part, ours, theirs) in [("A", &grads.a, &expected.grads.a), ("B", &grads.b, &expected.grads.b)] {
            let (mut error, mut cosine, mut name) = (0.0f64, 1.0f64, String::new());
            for ((adapter, x), y) in adapters.adapters.iter().zip(ours).zip(theirs) {
                let values = |t: &Tensor| host(t).map_err(|e| tensor_error("a gradient cannot be read", e));
                let (x, y) = (values(x)?, values(y)?);
                let (_, norm) = errors(&x, &y);
                let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                let c = dot(&x, &y) / (dot(&x, &x) * dot(&y, &y)).sqrt();
                if norm.is_nan() || norm > error {
                    (error, name) = (norm, adapter.name.clone());
                }
                cosine = cosine.min(c);
            }
            let line = compared(format!("{} gradients of {part}: worst relative norm", ty.name()), error, limit);
            emit(Line { note: format!("{name}, least cosine {cosine:.7}"), ..line });
        }
        // The same values everywhere: predictions against float32 ones.
        for (i, (batch, theirs)) in batches.iter().zip(&expected.predictions).enumerate() {
            let (_, output) = step.forward(&Sample::of(batch)?, &mut |_, _, _| Ok(()))?;
            let theirs = host(theirs).map_err(|e| tensor_error("a prediction cannot be read", e))?;
            let (largest, norm) = errors(&output, &theirs);
            let (max_limit, norm_limit) = if ty == Ty::F32 { (1e-5, 1e-5) } else { (2e-2, 1e-2) };
            emit(compared(format!("{} prediction {i}: largest difference", ty.name()), largest, max_limit));
            emit(compared(format!("{} prediction {i}: norm", ty.name()), norm, norm_limit));
        }
    }
    Ok(())
}

fn streamed(options: &Options, emit: &mut dyn FnMut(Line)) -> Result<()> {
    let model = open_model(&options.goldens)?;
    let g = model.geometry();
    let (adapters, batches, optimizer) = (everything(g, 8)?, test_batches(g)?, OPTIMIZER);
    let mut reference: Option<blake3::Hash> = None;
    type Way<'w> = (&'w str, Kind, (usize, usize), usize, &'w str);
    let ways: [Way<'_>; 12] = [
        ("INT8, all resident", Kind::Int8, (1, 1), usize::MAX, ""),
        ("INT8, all resident, again", Kind::Int8, (1, 1), usize::MAX, ""),
        ("INT8, one buffer", Kind::Int8, (1, 1), 0, ""),
        ("INT8, two buffers", Kind::Int8, (2, 2), 0, ""),
        ("INT8, three buffers and a resident block", Kind::Int8, (3, 3), 1, ""),
        ("bf16, two buffers", Kind::Bf16, (2, 2), 0, ""),
        ("bf16, all resident", Kind::Bf16, (1, 1), usize::MAX, ""),
        ("INT8, dequantised by pieces", Kind::Int8, (2, 2), 0, "keep=0"),
        ("INT8, dequantised beside products", Kind::Int8, (1, 1), usize::MAX, "side=low"),
        ("INT8, beside products, streamed", Kind::Int8, (2, 2), 0, "side=high,blocks=2"),
        ("INT8, beside products, one buffer", Kind::Int8, (1, 1), 0, "side=high,blocks=1"),
        ("INT8, beside products, by pieces", Kind::Int8, (2, 2), 0, "side=high,blocks=4,keep=0"),
    ];
    for (name, kind, buffers, resident_max, tuning) in ways {
        let sizes = batches.iter().map(sizes).collect::<Result<_>>()?;
        let setup = Setup {
            model: &model,
            kind,
            ty: Ty::Bf16,
            adapters: &adapters,
            optimizer: &optimizer,
            batches: sizes,
            limits: Limits { buffers, resident_max, ..Limits::default() },
        };
        let mut step = build(options, setup)?;
        // Pieces so small that matrices of this model are cut.
        step.tune(format!("piece=20000,{tuning}").parse()?)?;
        for number in 1..=20u32 {
            step.gradients(&batches, &|| false)?;
            step.norm()?;
            step.update(1e-3 / f64::from(number))?;
        }
        let State { adapters: after, moments, .. } = step.state()?;
        let mut hasher = blake3::Hasher::new();
        for (adapter, (a, b)) in after.adapters.iter().zip(&moments) {
            for tensor in [&adapter.a, &adapter.b] {
                let values = host(tensor).map_err(|e| tensor_error("an adapter cannot be read", e))?;
                hasher.update(bytemuck::cast_slice(&values));
            }
            [&a.first, &a.second, &b.first, &b.second].into_iter().for_each(|m| _ = hasher.update(bytemuck::cast_slice(m)));
        }
        let hash = hasher.finalize();
        let same = *reference.get_or_insert(hash) == hash;
        emit(holds(format!("20 steps, {name}"), same, format!("{}, {:?}", &hash.to_hex().as_str()[..16], step.stats())));
    }
    Ok(())
}

/// The geometry of FLUX.2 [dev].
fn dev() -> TransformerGeometry {
    TransformerGeometry {
        in_channels: 128,
        out_channels: None,
        num_layers: 8,
        num_single_layers: 48,
        attention_head_dim: 128,
        num_attention_heads: 48,
        joint_attention_dim: 15_360,
        timestep_guidance_channels: 256,
        mlp_ratio: 3.0,
        axes_dims_rope: vec![32; 4],
        rope_theta: 2000.0,
        eps: 1e-6,
        guidance_embeds: true,
    }
}

/// Random codes with scales that keep activations near one; one payload for each kind of block.
fn random_payload(g: &TransformerGeometry, block: BlockId) -> (Payload, Vec<u8>) {
    let (mut parts, mut bytes) = (Vec::new(), Vec::new());
    for spec in g.block_linears(block) {
        let padded = spec.in_features.next_multiple_of(PADDING);
        let codes = bytes.len();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ spec.out_features as u64;
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

fn timing(options: &Options, emit: &mut dyn FnMut(Line)) -> Result<()> {
    let g = options.geometry.as_deref().map_or_else(|| Ok(dev()), TransformerGeometry::from_config_file)?;
    let gpu = Gpu::open(options.device)?;
    let name = gpu.properties().name.clone();
    let (mut payloads, mut memory) = (Vec::new(), Vec::new());
    let mut made: [Option<(Payload, Rc<Pinned>)>; 2] = [None, None];
    for block in g.blocks() {
        let slot = if is_double(&g, block) { &mut made[0] } else { &mut made[1] };
        if slot.is_none() {
            let (payload, bytes) = random_payload(&g, block);
            *slot = Some((payload, pinned(&gpu, &bytes)?));
        }
        if let Some((payload, bytes)) = slot {
            payloads.push(payload.clone());
            memory.push(bytes.clone());
        }
    }
    let endings = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj"];
    let targets: Vec<LinearSpec> =
        g.blocks().flat_map(|b| g.block_linears(b)).filter(|l| endings.iter().any(|e| l.name.ends_with(&format!("attn.{e}")))).collect();
    let adapters = AdapterSet::init(&targets, 16, 16.0, 1, &Device::Cpu)?;
    let side = (options.resolution / 16).max(1);
    let batches: Vec<MicroBatch> =
        (0..options.accumulation.max(1)).map(|i| random_batch(&g, i as u64, (1, 512, side, side))).collect::<Result<_>>()?;
    let other = SyntheticSource::other(&g, &Device::Cpu, DType::BF16, 1)?;
    let optimizer = OPTIMIZER;
    let parts = Parts {
        geometry: &g,
        ty: Ty::Bf16,
        other: &other,
        adapters: &adapters,
        optimizer: &optimizer,
        batches: batches.iter().map(sizes).collect::<Result<_>>()?,
        payloads,
        supply: Box::new(HostSupply::new(memory)),
        budget: options.budget_mb << 20,
        limits: Limits::default(),
        timed: false,
    };
    let mut step = CudaStep::new(gpu, parts)?;
    drop(other);
    emit(holds(format!("plan on {name}"), true, step.plan().to_string()));
    let one = |step: &mut CudaStep| -> Result<f64> {
        let started = Instant::now();
        step.gradients(&batches, &|| false)?;
        step.norm()?;
        step.update(1e-4)?;
        step.gpu().sync()?;
        Ok(started.elapsed().as_secs_f64())
    };
    let what = format!("{} px, {} micro-batches, {} steps", options.resolution, batches.len(), options.steps.max(1));
    let mut variants = vec![(what, None)];
    variants.extend(options.variants.iter().map(|text| (text.clone(), Some(text))));
    for (what, variant) in variants {
        if let Some(text) = variant {
            step.tune(text.parse()?)?;
        }
        step.measure(false);
        one(&mut step)?;
        one(&mut step)?;
        let before = step.stats();
        let mut seconds = (0..options.steps.max(1)).map(|_| one(&mut step)).collect::<Result<Vec<f64>>>()?;
        let moved = (step.stats().bytes - before.bytes) as f64 / options.steps.max(1) as f64;
        seconds.sort_by(f64::total_cmp);
        let at = |i: usize| seconds.get(i).copied().unwrap_or(f64::NAN);
        let (high, driver) = step.memory()?;
        let note = format!(
            "median {:.4} s, {:.4} to {:.4}; {:.2} GB a step ({:.1} GB/s); arena {} MiB, driver {} MiB; {:?}",
            at(seconds.len() / 2),
            at(0),
            at(seconds.len() - 1),
            moved / 1e9,
            moved / 1e9 / at(seconds.len() / 2),
            high >> 20,
            driver.used_by_process_estimate >> 20,
            step.host_times(),
        );
        emit(holds(what, true, note));
        step.measure(true);
        one(&mut step)?;
        let times = step.times()?;
        emit(holds("milliseconds by phase (copy overlaps)", true, format!("{times:?}")));
    }
    Ok(())
}
