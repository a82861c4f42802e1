//! Opens what a configuration names: geometry, slab, resident weights, samples, block source.
//!
//! The transformer's own checkpoint is only touched where the slab does not carry what is needed: our slabs bring the geometry and a
//! companion file with every weight outside the blocks; those of the original builder bring neither. Both ways give the same numbers,
//! because weights from the checkpoint are rounded to bfloat16 as the companion's are.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};
use serenity_protocol::cache::CachePlan;
use serenity_protocol::checkpoint::Checkpoint;
use serenity_protocol::checksum::xxh3_64;
use serenity_protocol::config::{ComputeDtype, Config, DeviceKind, MemoryStrategy};
use serenity_protocol::geometry::{LinearSpec, TransformerGeometry};
use serenity_protocol::model_path::{self, TransformerSource};
use serenity_protocol::process::Process;
use serenity_protocol::ring::plan::RingPlan;
use serenity_protocol::slab::Slab;
use serenity_protocol::slab::manifest::Companion;
use serenity_protocol::{Error, Result, dataset, targets};

use crate::data::{CachedSamples, Samples};
use crate::engine::StepEngine;
use crate::gpu::engine::{CudaEngine, Opening};
use crate::model::{Flux2, OtherWeights};
use crate::ring_source::RingSource;
use crate::run::{self, Parts};
use crate::settings::Inputs;
use crate::slab_source::SlabSource;
use crate::source::TrainingSource;
use crate::step::CpuEngine;

/// Opens everything that a run needs. With `memory.strategy` `stagehand` it waits for the loader's ring, last of all.
///
/// # Errors
/// Those of the parts: [`Error::Absent`] for missing files (slab, cache entries, a loader), [`Error::Data`] for corrupt or mismatched ones,
/// [`Error::Config`] for targets that match nothing.
pub fn parts(process: &Process, config: Config) -> Result<Parts> {
    let slab = Slab::open(&config.memory.slab_path, &config.memory.manifest_path)?;
    let geometry = geometry(&config, Some(&slab))?;
    slab.check_model(&geometry)?;
    let targets = adapted_linears(&config, &geometry)?;
    let paths = model_path::resolve(&config.model)?;
    let samples = CachedSamples::new(CachePlan::new(&config, &paths, &dataset::scan(&config.data)?)?, &config)?;
    process.tick();
    let inputs = Inputs { weights: weights_name(&slab), model: slab.model_signature().to_string(), data: samples.digest() };
    let engine = engine(process, &config, slab, &geometry, &targets, step_sizes(&config, &samples)?)?;
    Ok(Parts { engine, geometry, samples: Arc::new(samples), targets, inputs, config })
}

/// Samples, text tokens and image tokens of each micro-batch of the largest step: every image is cut to the configured size, every caption
/// padded to the configured length.
///
/// # Errors
/// As reading a sample reports.
pub fn step_sizes(config: &Config, samples: &dyn Samples) -> Result<Vec<(usize, usize, usize)>> {
    let side = config.resolution as usize / 16;
    let (mut text, mut image) = (config.model.max_sequence_length, side * side);
    if !samples.repeats().is_empty() {
        text = text.max(samples.text(0)?.max_length);
        let latent = samples.latent(0)?;
        image = image.max(latent.height * latent.width);
    }
    Ok(vec![(config.batch_size, text, image); config.gradient_accumulation_steps])
}

/// The engine of the configured device, with fresh adapters.
///
/// # Errors
/// As [`parts`].
pub fn engine(
    process: &Process,
    config: &Config,
    slab: Slab,
    geometry: &TransformerGeometry,
    targets: &[LinearSpec],
    batches: Vec<(usize, usize, usize)>,
) -> Result<Box<dyn StepEngine>> {
    let guidance = run::guidance(config, geometry);
    let adapters = run::fresh_adapters(config, targets)?;
    // Also where a GPU computes, they come through the CPU's memory once.
    let (device, dtype) = (Device::Cpu, dtype(config.dtype));
    let other = other_weights(config, &slab, geometry, &device, dtype)?;
    process.tick();
    if let DeviceKind::Cuda(ordinal) = config.device {
        let opening = Opening { config, geometry, other: &other, adapters: &adapters, guidance, batches };
        return Ok(Box::new(CudaEngine::open(ordinal, slab, &opening, process)?));
    }
    let source: Box<dyn TrainingSource> = match config.memory.strategy {
        MemoryStrategy::Stagehand => {
            let plan = RingPlan::new(config, &slab, geometry)?;
            Box::new(RingSource::open(plan, geometry.clone(), device, dtype, process.clone())?)
        }
        MemoryStrategy::Resident => Box::new(SlabSource::open(&slab, geometry, &device, dtype, process)?),
    };
    let model = Flux2::new(geometry.clone(), other);
    Ok(Box::new(CpuEngine::new(model, source, adapters, &config.optimizer, guidance)))
}

/// The device of the tensor library; a GPU is not one of its devices, but has an engine of its own ([`engine`]).
///
/// # Errors
/// [`Error::Absent`] for a GPU.
pub fn device(kind: DeviceKind) -> Result<Device> {
    match kind {
        DeviceKind::Cpu => Ok(Device::Cpu),
        DeviceKind::Cuda(ordinal) => Err(Error::absent("this works on the processor only")
            .expected("train_device cpu")
            .found(format!("CUDA device {ordinal}"))
            .advice("set train_device to \"cpu\" (--set train_device=cpu)")),
    }
}

/// The compute type of a configuration.
#[must_use]
pub fn dtype(kind: ComputeDtype) -> DType {
    match kind {
        ComputeDtype::F32 => DType::F32,
        ComputeDtype::Bf16 => DType::BF16,
    }
}

/// The geometry: the slab's own, else that of the model's checkpoint.
///
/// # Errors
/// As opening the model reports.
pub fn geometry(config: &Config, slab: Option<&Slab>) -> Result<TransformerGeometry> {
    match slab.and_then(Slab::geometry) {
        Some(geometry) => Ok(geometry.clone()),
        None => Ok(TransformerSource::open(&model_path::resolve(&config.model)?)?.geometry().clone()),
    }
}

/// The linears to adapt; says how many each entry matched.
///
/// # Errors
/// [`Error::Config`] for entries that match nothing.
pub fn adapted_linears(config: &Config, geometry: &TransformerGeometry) -> Result<Vec<LinearSpec>> {
    let matched = targets::match_targets(geometry, &config.adapter.targets)?;
    for (entry, count) in &matched.per_entry {
        tracing::info!("target {entry}: {count} linears");
    }
    for note in &matched.notes {
        tracing::info!("{note}");
    }
    Ok(matched.linears)
}

fn other_weights(config: &Config, slab: &Slab, geometry: &TransformerGeometry, device: &Device, dtype: DType) -> Result<OtherWeights> {
    if let Some((path, stated)) = slab.companion().zip(slab.manifest().serenity.as_ref().and_then(|a| a.companion.as_ref())) {
        if path.is_file() {
            let companion = Checkpoint::open(path)?;
            return OtherWeights::load(geometry, device, dtype, true, |name, shape| {
                companion_tensor(&companion, path, stated, name, shape)
            });
        }
        tracing::info!("the slab's companion {} is not there: reading the weights outside the blocks from the model", path.display());
    }
    let source = TransformerSource::open(&model_path::resolve(&config.model)?)?;
    OtherWeights::load(geometry, device, dtype, true, |name, shape| source.tensor_f32(name, shape))
}

/// A tensor of the companion whose bytes match the hash in the slab's manifest.
fn companion_tensor(companion: &Checkpoint, path: &Path, stated: &Companion, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let tensor = companion.tensor_of_shape(name, shape)?;
    if stated.tensor_xxh3.get(name).map(|h| h.0) != Some(xxh3_64(tensor.bytes())) {
        return Err(Error::data(format!("the slab's companion is corrupt: '{name}' does not match its hash"))
            .at(path)
            .advice("build the slab anew (`serenity-slab build`), or delete the companion to read the weights from the model"));
    }
    tensor.to_f32()
}

/// Names the content of the slab: its page hashes where it has them (a rebuilt slab of the same weights is the same), else its signature.
fn weights_name(slab: &Slab) -> String {
    match slab.pages() {
        None => format!("slab {:016x}", slab.signature()),
        Some(pages) => {
            let mut hasher = blake3::Hasher::new();
            for page in &pages.xxh3 {
                hasher.update(&page.to_le_bytes());
            }
            hasher.update(&pages.file_bytes.to_le_bytes());
            format!("slab pages {}", &hasher.finalize().to_hex().as_str()[..16])
        }
    }
}
