//! `serenity-trainer parity`: one computation in float32, on the CPU or on a GPU ([`crate::gpu::parity`]), from a case file to a file with the reference's tensor names.
//!
//! It runs the code of training (block by block from a source, hand-derived backward) on an unquantised checkpoint, so that its output
//! can be held against the reference implementation's. A case holds inputs only; nothing is taken from expected values that may lie
//! in the same file, and nothing is guessed: an input that is not there is an error.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serenity_protocol::checkpoint::Checkpoint;
use serenity_protocol::config::{DeviceKind, OptimizerConfig};
use serenity_protocol::geometry::BlockKind;
use serenity_protocol::model_path::{self, TransformerSource};
use serenity_protocol::{Error, Result, atomic_file};

use crate::lora_file;
use crate::model::ops::rope::Position;
use crate::model::{Adapter, AdapterSet, CheckpointSource, Flux2, Hidden, Inputs, MicroBatch, OtherWeights, tensor_error};
use crate::optimizer::{AdamW, clip_grad_norm};

/// Updates of a `lora-step` case.
pub(crate) const UPDATES: usize = 3;

/// Which computation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `hidden`, `ctx`, `timestep`, `guidance`?, `img_ids`, `txt_ids` to `temb`, `double.N.{img,txt}`, `single.N`, `output`.
    Forward,
    /// `x0`, `noise`, `sigma`, `ctx`, `init.NAME` to `pred`, `loss.K`, `grad_norm.K`, `grad.NAME`, `after3.NAME`.
    LoraStep,
}

/// A parity command.
#[derive(Debug, Clone)]
pub struct Request {
    /// Which computation.
    pub kind: Kind,
    /// Where.
    pub device: DeviceKind,
    /// Model folder, or single transformer file in either naming.
    pub model: PathBuf,
    /// Input tensors.
    pub case: PathBuf,
    /// Output tensors.
    pub out: PathBuf,
    /// Rows and columns of the latent grid, for a `lora-step` case that does not say.
    pub grid: Option<(usize, usize)>,
    /// Where `lora-step` writes the adapters after its updates as a LoRA file, if wanted.
    pub lora: Option<PathBuf>,
}

/// Runs a parity command.
///
/// # Errors
/// [`Error::Absent`] for missing files, [`Error::Data`] for a case that lacks an input or does not fit the model.
pub fn run(request: &Request) -> Result<()> {
    let model = request.model.to_str().ok_or_else(|| Error::config("the model's path is not UTF-8").at(&request.model))?;
    let weights = TransformerSource::open(&model_path::resolve_path(model)?)?;
    let case = Case::open(&request.case)?;
    if request.lora.is_some() && request.kind != Kind::LoraStep {
        return Err(Error::config("only lora-step has adapters to write as a LoRA file"));
    }
    let computed = match request.device {
        DeviceKind::Cpu => compute(request.kind, &weights, &case, request.grid)?,
        DeviceKind::Cuda(ordinal) => crate::gpu::parity::compute(ordinal, request.kind, &weights, &case, request.grid)?,
    };
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    atomic_file::write(&request.out, &lora_file::safetensors_bytes(&metadata, &computed.outputs)?)?;
    match (&request.lora, &computed.adapters) {
        (Some(path), Some(adapters)) => lora_file::write(path, adapters, &BTreeMap::new()),
        _ => Ok(()),
    }
}

/// Output tensors by name.
pub type Outputs = Vec<(String, Tensor)>;

/// Result of [`compute`].
pub struct Computed {
    /// What goes into the output file.
    pub outputs: Outputs,
    /// The adapters after the updates of a `lora-step`.
    pub adapters: Option<AdapterSet>,
}

/// The computation on the CPU without its output file.
///
/// # Errors
/// As [`run`].
pub fn compute(kind: Kind, weights: &TransformerSource, case: &Case, grid: Option<(usize, usize)>) -> Result<Computed> {
    let device = Device::Cpu;
    let other = OtherWeights::load(weights.geometry(), &device, DType::F32, false, |name, shape| weights.tensor_f32(name, shape))?;
    let model = Flux2::new(weights.geometry().clone(), other);
    let read = Box::new(|name: &str, shape: &[usize]| weights.tensor_f32(name, shape));
    let mut source = CheckpointSource::new(model.geometry.clone(), device, DType::F32, read);
    compute_with(kind, &model, &mut source, case, grid)
}

/// The computation on the CPU with weights of the caller's choice.
///
/// # Errors
/// As [`run`].
pub(crate) fn compute_with(
    kind: Kind,
    model: &Flux2,
    source: &mut CheckpointSource<'_>,
    case: &Case,
    grid: Option<(usize, usize)>,
) -> Result<Computed> {
    match kind {
        Kind::Forward => Ok(Computed { outputs: forward(model, source, case)?, adapters: None }),
        Kind::LoraStep => lora_step(model, source, case, grid),
    }
}

/// An opened case file.
pub struct Case {
    path: PathBuf,
    tensors: Checkpoint,
    metadata: BTreeMap<String, String>,
}

impl Case {
    /// Opens a safetensors file.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_file() {
            return Err(Error::absent("the case file is not there").at(path));
        }
        Ok(Self { path: path.to_path_buf(), tensors: Checkpoint::open(path)?, metadata: lora_file::metadata_of(path)? })
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.tensors.contains(name)
    }

    pub(crate) fn tensor(&self, name: &str) -> Result<Tensor> {
        let found = self.tensors.tensor(name)?;
        Tensor::from_vec(found.to_f32()?, found.shape.as_slice(), &Device::Cpu)
            .map_err(|e| tensor_error(&format!("cannot read '{name}' of the case"), e))
    }

    pub(crate) fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let found = self.tensors.tensor(name)?;
        if found.shape.len() != 1 {
            return Err(Error::data(format!("'{name}' of the case must be a vector")).at(&self.path).found(format!("{:?}", found.shape)));
        }
        found.to_f32()
    }

    /// Position ids `[T, 4]`, or `[B, T, 4]` of which the first row counts, as in the reference.
    pub(crate) fn ids(&self, name: &str) -> Result<Vec<Position>> {
        let found = self.tensors.tensor(name)?;
        let tokens = match found.shape.as_slice() {
            [t, 4] | [_, t, 4] => *t,
            other => {
                return Err(Error::data(format!("'{name}' of the case holds no position ids"))
                    .at(&self.path)
                    .expected("[tokens, 4] or [batch, tokens, 4]")
                    .found(format!("{other:?}")));
            }
        };
        let values = found.to_f32()?;
        Ok(values.chunks_exact(4).take(tokens).filter_map(|c| c.try_into().ok()).collect())
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>> {
        let Some(text) = self.metadata.get(key) else { return Ok(None) };
        let parsed =
            text.parse().map_err(|_| Error::data(format!("'{key}' in the case's metadata is no number")).at(&self.path).found(text))?;
        Ok(Some(parsed))
    }

    fn required<T: std::str::FromStr>(&self, key: &str) -> Result<T> {
        self.number(key)?.ok_or_else(|| Error::data(format!("the case's metadata has no '{key}'")).at(&self.path))
    }
}

fn forward(model: &Flux2, source: &mut CheckpointSource<'_>, case: &Case) -> Result<Outputs> {
    let (text, image) = (case.ids("txt_ids")?, case.ids("img_ids")?);
    let ids: Vec<Position> = text.iter().chain(&image).copied().collect();
    let (noisy, context, timestep) = (case.tensor("hidden")?, case.tensor("ctx")?, case.vector("timestep")?);
    let guidance = if case.tensors.contains("guidance") { Some(case.vector("guidance")?) } else { None };
    let inputs = Inputs {
        noisy: &noisy,
        context: &context,
        timestep: &timestep,
        guidance: guidance.as_deref(),
        positions: model.positions_of(&ids, text.len())?,
    };
    let no_adapters = AdapterSet::new(1, 1.0, Vec::new())?;
    let mut outputs = Outputs::new();
    let (temb, output) = model.forward_observed(source, &no_adapters, &inputs, &mut |block, hidden| {
        match (model.geometry.kind(block), hidden) {
            (BlockKind::Double(n), Hidden::Streams(s)) => {
                outputs.push((format!("double.{n}.img"), s.image.clone()));
                outputs.push((format!("double.{n}.txt"), s.text.clone()));
            }
            (BlockKind::Single(n), Hidden::Joint(h)) => outputs.push((format!("single.{n}"), h.clone())),
            _ => return Err(Error::invariant("a block left hidden states of the other kind")),
        }
        Ok(())
    })?;
    outputs.push(("temb".into(), temb));
    outputs.push(("output".into(), output));
    Ok(outputs)
}

fn lora_step(model: &Flux2, source: &mut CheckpointSource<'_>, case: &Case, grid: Option<(usize, usize)>) -> Result<Computed> {
    let batch = training_batch(case, grid)?;
    let (config, mut adapters) = (optimizer(case)?, initial_adapters(case)?);
    let mut optimizer = AdamW::new(&config, &adapters);
    let mut outputs = Outputs::new();
    let scalar = |value: f64| Tensor::from_vec(vec![value as f32], 1, &Device::Cpu).map_err(|e| tensor_error("cannot place a number", e));
    for update in 0..UPDATES {
        let mut step = model.loss_and_grads(source, &adapters, std::slice::from_ref(&batch), &|| false)?;
        if update == 0 {
            outputs.extend(step.predictions.pop().map(|p| ("pred".to_string(), p)));
            for ((adapter, a), b) in adapters.adapters.iter().zip(&step.grads.a).zip(&step.grads.b) {
                outputs.push((format!("grad.{}.lora_A.weight", adapter.name), a.clone()));
                outputs.push((format!("grad.{}.lora_B.weight", adapter.name), b.clone()));
            }
        }
        let loss = step.losses.first().copied().ok_or_else(|| Error::invariant("a step returned no loss"))?;
        let norm = clip_grad_norm(&mut step.grads, config.max_grad_norm)?;
        optimizer.step(&mut adapters, &step.grads, config.learning_rate)?;
        outputs.push((format!("loss.{update}"), scalar(loss)?));
        outputs.push((format!("grad_norm.{update}"), scalar(norm)?));
    }
    for adapter in &adapters.adapters {
        outputs.push((format!("after3.{}.lora_A.weight", adapter.name), adapter.a.clone()));
        outputs.push((format!("after3.{}.lora_B.weight", adapter.name), adapter.b.clone()));
    }
    Ok(Computed { outputs, adapters: Some(adapters) })
}

/// The flow-matching sample of a case: `noisy = (1 - sigma) x0 + sigma noise`, target `noise - x0`.
pub(crate) fn training_batch(case: &Case, grid: Option<(usize, usize)>) -> Result<MicroBatch> {
    let (x0, noise, context, sigma) = (case.tensor("x0")?, case.tensor("noise")?, case.tensor("ctx")?, case.vector("sigma")?);
    let (_, tokens, _) =
        x0.dims3().map_err(|e| Error::data("'x0' of the case must be [batch, tokens, channels]").at(&case.path).cause(e))?;
    let (height, width) = latent_grid(case, grid, tokens)?;
    if x0.dims() != noise.dims() || x0.dim(0).ok() != Some(sigma.len()) {
        return Err(Error::data("'x0', 'noise' and 'sigma' of the case do not fit together").at(&case.path));
    }
    let guidance = match case.metadata.get("guidance").map(String::as_str) {
        None => return Err(Error::data("the case's metadata has no 'guidance' (a number or none)").at(&case.path)),
        Some("none") => None,
        Some(_) => Some(case.required("guidance")?),
    };
    let mixed = || -> candle_core::Result<(Tensor, Tensor)> {
        let s = Tensor::from_slice(&sigma, (sigma.len(), 1, 1), &Device::Cpu)?;
        let noisy = (x0.broadcast_mul(&s.affine(-1.0, 1.0)?)? + noise.broadcast_mul(&s)?)?;
        Ok((noisy, (&noise - &x0)?))
    };
    let (noisy, target) = mixed().map_err(|e| tensor_error("cannot mix the case's sample with its noise", e))?;
    Ok(MicroBatch { noisy, context, sigma, guidance, height, width, target })
}

/// Rows and columns of the latent grid: from the case's ids, the command line, the case's metadata, or the `transformer.safetensors`
/// that the golden generator writes beside the case.
fn latent_grid(case: &Case, given: Option<(usize, usize)>, tokens: usize) -> Result<(usize, usize)> {
    let sibling = case.path.with_file_name("transformer.safetensors");
    let from_metadata = (case.number("height")?, case.number("width")?);
    let (height, width) = if case.tensors.contains("img_ids") {
        grid_of(case, tokens)?
    } else if let Some(given) = given {
        given
    } else if let (Some(height), Some(width)) = from_metadata {
        (height, width)
    } else if sibling != case.path && sibling.is_file() {
        grid_of(&Case::open(&sibling)?, tokens)?
    } else {
        return Err(Error::data("the case does not say how many rows and columns its latent grid has")
            .at(&case.path)
            .expected("img_ids, or height and width in the metadata, or a transformer.safetensors beside it, or --grid HxW")
            .found(format!("{tokens} tokens")));
    };
    if height.checked_mul(width) != Some(tokens) {
        return Err(Error::data("the latent grid does not fit the case")
            .at(&case.path)
            .expected(format!("{tokens} tokens"))
            .found(format!("{height} x {width}")));
    }
    Ok((height, width))
}

/// The grid that `img_ids` spells out; only the order of training (t and l zero, row-major) is accepted.
fn grid_of(case: &Case, tokens: usize) -> Result<(usize, usize)> {
    let ids = case.ids("img_ids")?;
    let extent = |axis: fn(&Position) -> f32| ids.iter().map(axis).fold(0.0, f32::max) as usize + 1;
    let (height, width) = (extent(|p| p[1]), extent(|p| p[2]));
    let expected = crate::model::ops::rope::Rope::positions(0, height, width);
    if ids != expected || ids.len() != tokens {
        return Err(Error::data("'img_ids' are not those of one latent grid in row-major order")
            .at(&case.path)
            .expected(format!("{tokens} tokens"))
            .found(format!("{} tokens, largest row {} and column {}", ids.len(), height - 1, width - 1)));
    }
    Ok((height, width))
}

pub(crate) fn initial_adapters(case: &Case) -> Result<AdapterSet> {
    let (rank, alpha) = (case.required("rank")?, case.required("alpha")?);
    let names = case.tensors.names().filter_map(|n| n.strip_prefix("init.")?.strip_suffix(".lora_A.weight"));
    let adapters = names
        .map(|name| {
            let part = |p: &str| case.tensor(&format!("init.{name}.{p}.weight"));
            Ok(Adapter { name: name.to_string(), a: part("lora_A")?, b: part("lora_B")? })
        })
        .collect::<Result<Vec<_>>>()?;
    if adapters.is_empty() {
        return Err(Error::data("the case has no 'init.<linear>.lora_A.weight'").at(&case.path));
    }
    AdapterSet::new(rank, alpha, adapters).map_err(|e| e.at(&case.path))
}

/// The optimiser settings as the golden generator writes them.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct CaseOptimizer {
    name: String,
    lr: f64,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    max_grad_norm: f64,
}

pub(crate) fn optimizer(case: &Case) -> Result<OptimizerConfig> {
    let text = case.metadata.get("optimizer").ok_or_else(|| Error::data("the case's metadata has no 'optimizer'").at(&case.path))?;
    let o: CaseOptimizer =
        serde_json::from_str(text).map_err(|e| Error::data("the case's optimiser settings are malformed").at(&case.path).cause(e))?;
    if o.name != "adamw" {
        return Err(Error::data("the case wants an optimiser that is not there").at(&case.path).expected("adamw").found(o.name));
    }
    let [beta1, beta2] = o.betas;
    Ok(OptimizerConfig { learning_rate: o.lr, weight_decay: o.weight_decay, beta1, beta2, eps: o.eps, max_grad_norm: o.max_grad_norm })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn goldens() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/goldens")
    }

    /// The inputs of the golden step alone, in a folder of their own, with another metadata entry or another ending of the list.
    fn case_in(folder: &Path, metadata: &[(&str, &str)], without: &str) -> PathBuf {
        let golden = Case::open(&goldens().join("cases/lora_step.safetensors")).unwrap();
        let inputs = golden.tensors.names().filter(|n| ["x0", "noise", "sigma", "ctx"].contains(n) || n.starts_with("init."));
        let tensors: Outputs = inputs.filter(|n| *n != without).map(|n| (n.to_string(), golden.tensor(n).unwrap())).collect();
        let mut described = golden.metadata.clone();
        for (key, value) in metadata {
            described.insert((*key).to_string(), (*value).to_string());
        }
        described.remove(without);
        let path = folder.join("case.safetensors");
        std::fs::write(&path, lora_file::safetensors_bytes(&described, &tensors).unwrap()).unwrap();
        path
    }

    fn request(case: PathBuf, grid: Option<(usize, usize)>) -> Request {
        let out = case.with_file_name("out.safetensors");
        let lora = Some(case.with_file_name("lora.safetensors"));
        Request { kind: Kind::LoraStep, device: DeviceKind::Cpu, model: goldens().join("model"), case, out, grid, lora }
    }

    #[test]
    fn inputs_alone_are_enough_and_the_lora_is_the_reference_s() {
        let folder = tempfile::tempdir().unwrap();
        let case = case_in(folder.path(), &[("height", "4"), ("width", "6")], "");
        run(&request(case.clone(), None)).unwrap();
        let first = std::fs::read(folder.path().join("out.safetensors")).unwrap();
        // The same grid from the command line, and from a file beside the case: the same bytes.
        case_in(folder.path(), &[], "");
        run(&request(case.clone(), Some((4, 6)))).unwrap();
        assert_eq!(first, std::fs::read(folder.path().join("out.safetensors")).unwrap());
        std::fs::copy(goldens().join("cases/transformer.safetensors"), folder.path().join("transformer.safetensors")).unwrap();
        run(&request(case.clone(), None)).unwrap();
        assert_eq!(first, std::fs::read(folder.path().join("out.safetensors")).unwrap());
        let ours = lora_file::read(&folder.path().join("lora.safetensors"), &Device::Cpu).unwrap();
        let theirs = lora_file::read(&goldens().join("cases/lora_diffusers.safetensors"), &Device::Cpu).unwrap();
        assert_eq!((ours.rank, ours.alpha, ours.adapters.len()), (theirs.rank, theirs.alpha, theirs.adapters.len()));
        for (x, y) in ours.adapters.iter().zip(&theirs.adapters) {
            assert_eq!(x.name, y.name);
            for (x, y) in [(&x.a, &y.a), (&x.b, &y.b)] {
                let difference = (x - y).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(difference < 1e-5, "{difference}");
            }
        }
    }

    #[test]
    fn missing_and_contradicting_inputs_are_refused() {
        let grid = [("height", "4"), ("width", "6")];
        for without in ["x0", "noise", "sigma", "ctx", "rank", "alpha", "guidance", "optimizer", "height", "width"] {
            let folder = tempfile::tempdir().unwrap();
            let error = run(&request(case_in(folder.path(), &grid, without), None)).unwrap_err();
            assert_eq!(error.exit_code(), 65, "{without}: {error}");
            assert!(!folder.path().join("out.safetensors").exists());
        }
        for (key, value) in [("width", "5"), ("rank", "3"), ("alpha", "x"), ("optimizer", "{}"), ("guidance", "much")] {
            let folder = tempfile::tempdir().unwrap();
            let mut metadata = grid.to_vec();
            metadata.push((key, value));
            let error = run(&request(case_in(folder.path(), &metadata, ""), None)).unwrap_err();
            assert_eq!(error.exit_code(), 65, "{key} {value}: {error}");
        }
        let absent = request(PathBuf::from("/nonexistent/case.safetensors"), None);
        assert_eq!(run(&absent).unwrap_err().exit_code(), 69);
    }
}
