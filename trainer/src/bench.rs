//! The benchmark: how fast a step is, against how fast this machine could do its work at best, both measured in the same run.
//!
//! The floor is the larger of two times: the step's arithmetic at the rate of the largest matrix product of the model, in the compute
//! type and with the code that training uses; and the bytes that the block source moved at the rate of a plain memory copy. On a GPU both
//! rates are the device's ([`crate::engine::Profile`]): products in bfloat16, and copies from page-locked memory.
#![forbid(unsafe_code)]

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use serenity_protocol::config::Config;
use serenity_protocol::geometry::{BlockKind, TransformerGeometry};
use serenity_protocol::process::Process;
use serenity_protocol::slab::Slab;
use serenity_protocol::{Error, Result};

use crate::data::{Batches, SyntheticSamples};
use crate::engine::Profile;
use crate::log::Phases;
use crate::memory::MemoryUse;
use crate::model::{Flux2, ops::gemm, tensor_error};
use crate::run::{self, Parts};
use crate::settings::Inputs;
use crate::step::CpuEngine;
use crate::synthetic_source::SyntheticSource;
use crate::{open, rng, schedule};

/// Images of the synthetic data set.
const SYNTHETIC_IMAGES: usize = 8;
/// A rate is measured over at least this time.
const RATE_SECONDS: f64 = 0.5;
/// Bytes of a copy whose rate is measured: beyond any cache.
const COPY_BYTES: usize = 256 << 20;
/// Attention work of a checkpointed step over that of a forward pass: forward, recompute, and 2.5 for the backward pass.
const ATTENTION_PASSES: f64 = 4.5;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options<'o> {
    /// Random weights and samples instead of slab, loader and cache.
    pub synthetic: bool,
    /// Random samples, with the configured slab and loader.
    pub synthetic_samples: bool,
    /// `config.json` of a transformer whose geometry the synthetic model has, instead of the configured model's.
    pub geometry: Option<&'o Path>,
    /// Timed steps, after one that is not.
    pub steps: u64,
}

/// The result.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Whether weights and samples were random.
    pub synthetic: bool,
    /// Whether samples alone were random.
    pub synthetic_samples: bool,
    /// Device.
    pub device: String,
    /// Compute type.
    pub dtype: String,
    /// Blocks of the model.
    pub blocks: usize,
    /// Tokens of a step, image and text, all micro-batches.
    pub tokens: usize,
    /// Trainable parameters.
    pub parameters: usize,
    /// Timed steps.
    pub steps: u64,
    /// Floating-point operations of a step (linears and attention of the blocks).
    pub step_flop: f64,
    /// Measured rate of the largest matrix product.
    pub matmul_flop_per_s: f64,
    /// Bytes that the source moved in a step.
    pub moved_bytes: u64,
    /// Measured rate of a memory copy.
    pub copy_bytes_per_s: f64,
    /// The floor.
    pub floor_s: f64,
    /// Median step.
    pub step_median_s: f64,
    /// Fastest step.
    pub step_min_s: f64,
    /// Slowest step.
    pub step_max_s: f64,
    /// Median over floor.
    pub ratio: f64,
    /// Median of each phase.
    pub phases_s: Phases,
    /// Memory at the end.
    pub memory_mb: MemoryUse,
    /// The driver's figure after the fifth timed step, to be compared with that at the end: it may not grow.
    pub driver_mb_step_5: Option<f64>,
    /// A further step taken apart by the device's clock, where there is one.
    pub profile: Option<Profile>,
}

/// Runs the benchmark. Writes no files.
///
/// # Errors
/// As opening the parts and computing steps report; [`Error::Config`] for zero steps.
pub fn run(process: &Process, config: Config, options: &Options<'_>) -> Result<Report> {
    if options.steps == 0 {
        return Err(Error::config("--steps must be at least 1"));
    }
    if options.geometry.is_some() && !options.synthetic {
        return Err(Error::config("--geometry needs --synthetic: a slab has the geometry of its model"));
    }
    let mut parts = match (options.synthetic, options.synthetic_samples) {
        (true, _) => synthetic_parts(config, options.geometry)?,
        (false, true) => parts_without_cache(process, config)?,
        (false, false) => open::parts(process, config)?,
    };
    let mut batches = Batches::new(parts.batch_plan()?);
    let (mut seconds, mut phases, mut tokens, mut moved, mut step_flop) = (Vec::new(), Vec::new(), 0, 0, 0.0);
    let first = first_adapted(&parts);
    let mut driver_mb_step_5 = None;
    for number in 1..=options.steps + 1 {
        let started = Instant::now();
        let host = batches.take(number)?;
        let waited = started.elapsed().as_secs_f64();
        if number <= options.steps + 1 {
            batches.prepare(number + 1)?;
        }
        let mut computed = parts.engine.gradients(&host, process)?;
        computed.phases.data += waited;
        let lr = parts.config.optimizer.learning_rate * schedule::factor(&parts.config.scheduler, number, options.steps + 1);
        parts.engine.apply(&mut computed, lr)?;
        // The first step warms caches and allocators up.
        if number > 1 {
            seconds.push(started.elapsed().as_secs_f64());
            phases.push(computed.phases);
            (tokens, moved) = (host.iter().map(|b| b.tokens()).sum(), computed.moved.moved_bytes);
            let of =
                |b: &crate::data::HostBatch| b.sigma.len() as f64 * step_flop_of(&parts.geometry, first, b.image_tokens(), b.text_tokens());
            step_flop = host.iter().map(of).sum();
        }
        if seconds.len() == 5 {
            driver_mb_step_5 = parts.engine.memory()?.device.map(|d| d.driver);
        }
    }
    // Before rates are measured, whose buffers are no part of a step.
    let memory_mb = parts.engine.memory()?;
    let profile = parts.engine.profile(&batches.take(options.steps + 2)?, process)?;
    parts.engine.finish();
    let (matmul, copy) = match &profile {
        None => (matmul_rate(&parts)?, copy_rate()),
        Some(p) => {
            (step_flop, moved) = (p.flop, p.bytes);
            (p.flop_per_s, p.bytes_per_s)
        }
    };
    let floor_s = (step_flop / matmul).max(moved as f64 / copy);
    let step_median_s = median(&seconds);
    Ok(Report {
        synthetic: options.synthetic,
        synthetic_samples: options.synthetic_samples,
        device: parts.engine.device(),
        dtype: format!("{:?}", open::dtype(parts.config.dtype)),
        blocks: parts.geometry.num_blocks(),
        tokens,
        parameters: parts.fresh_adapters()?.parameters(),
        steps: options.steps,
        step_flop,
        matmul_flop_per_s: matmul,
        moved_bytes: moved,
        copy_bytes_per_s: copy,
        floor_s,
        step_median_s,
        step_min_s: seconds.iter().copied().fold(f64::INFINITY, f64::min),
        step_max_s: seconds.iter().copied().fold(0.0, f64::max),
        ratio: step_median_s / floor_s,
        phases_s: median_phases(&phases),
        memory_mb,
        driver_mb_step_5,
        profile,
    })
}

/// What the configuration names, with random samples in its sizes in place of the cache's.
fn parts_without_cache(process: &Process, config: Config) -> Result<Parts> {
    let slab = Slab::open(&config.memory.slab_path, &config.memory.manifest_path)?;
    let geometry = open::geometry(&config, Some(&slab))?;
    slab.check_model(&geometry)?;
    let targets = open::adapted_linears(&config, &geometry)?;
    let samples = random_samples(&config, &geometry);
    let engine = open::engine(process, &config, slab, &geometry, &targets, open::step_sizes(&config, &samples)?)?;
    Ok(Parts { engine, geometry, samples: Arc::new(samples), targets, inputs: no_inputs(), config })
}

fn random_samples(config: &Config, geometry: &TransformerGeometry) -> SyntheticSamples {
    let side = (config.resolution as usize / 16).max(1);
    SyntheticSamples::new(geometry, vec![1; SYNTHETIC_IMAGES], side, side, config.model.max_sequence_length, config.seed)
}

fn no_inputs() -> Inputs {
    Inputs { weights: "synthetic".into(), model: "synthetic".into(), data: "synthetic".into() }
}

/// A model of random weights and samples of random numbers, in the sizes of the configuration.
///
/// # Errors
/// As finding the geometry and matching the targets report.
pub fn synthetic_parts(config: Config, geometry: Option<&Path>) -> Result<Parts> {
    let (device, dtype) = (open::device(config.device)?, open::dtype(config.dtype));
    let geometry = match geometry {
        Some(file) => TransformerGeometry::from_config_file(file)?,
        None => {
            let memory = &config.memory;
            let slab = if memory.slab_path.is_file() { Some(Slab::open(&memory.slab_path, &memory.manifest_path)?) } else { None };
            open::geometry(&config, slab.as_ref())?
        }
    };
    let targets = open::adapted_linears(&config, &geometry)?;
    let other = SyntheticSource::other(&geometry, &device, dtype, config.seed)?;
    let source = SyntheticSource::new(&geometry, &device, dtype, config.seed)?;
    let samples = random_samples(&config, &geometry);
    let guidance = run::guidance(&config, &geometry);
    let adapters = run::fresh_adapters(&config, &targets)?;
    let model = Flux2::new(geometry.clone(), other);
    Ok(Parts {
        engine: Box::new(CpuEngine::new(model, Box::new(source), adapters, &config.optimizer, guidance)),
        geometry,
        samples: Arc::new(samples),
        targets,
        inputs: no_inputs(),
        config,
    })
}

/// Index of the first block that has an adapter; the number of blocks if none has.
fn first_adapted(parts: &Parts) -> usize {
    let geometry = &parts.geometry;
    let adapted = |block| geometry.block_linears(block).iter().any(|l| parts.targets.iter().any(|t| t.name == l.name));
    geometry.blocks().position(adapted).unwrap_or(geometry.num_blocks())
}

/// Operations of one sample in a step: two for each multiply-add of the block linears and of attention, three passes over the linears
/// (forward, recompute, input gradients) of blocks from `first` on and one over those before. Adapters are left out.
fn step_flop_of(geometry: &TransformerGeometry, first: usize, image: usize, text: usize) -> f64 {
    let (image, text) = (image as f64, text as f64);
    let attention = 2.0 * (image + text).powi(2) * geometry.inner_dim() as f64;
    let mut multiply_adds = 0.0;
    for (index, block) in geometry.blocks().enumerate() {
        let double = matches!(geometry.kind(block), BlockKind::Double(_));
        let linears: f64 = geometry
            .block_linears(block)
            .iter()
            .map(|l| {
                let of_text = l.name.contains(".attn.add_") || l.name.contains(".attn.to_add_out") || l.name.contains(".ff_context.");
                let tokens = match (double, of_text) {
                    (true, true) => text,
                    (true, false) => image,
                    (false, _) => image + text,
                };
                tokens * l.in_features as f64 * l.out_features as f64
            })
            .sum();
        let (linear_passes, attention_passes) = if index >= first { (3.0, ATTENTION_PASSES) } else { (1.0, 1.0) };
        multiply_adds += linear_passes * linears + attention_passes * attention;
    }
    2.0 * multiply_adds
}

/// Operations per second of the model's largest block linear on the tokens of one sample.
fn matmul_rate(parts: &Parts) -> Result<f64> {
    let geometry = &parts.geometry;
    let largest = geometry.blocks().flat_map(|b| geometry.block_linears(b)).max_by_key(|l| l.in_features * l.out_features);
    let largest = largest.ok_or_else(|| Error::invariant("a model without linears"))?;
    let (text, latent) = (parts.samples.text(0)?, parts.samples.latent(0)?);
    let rows = parts.config.batch_size * (text.max_length + latent.height * latent.width);
    let failed = |e| tensor_error("cannot measure the rate of a matrix product", e);
    let (device, dtype) = (&Device::Cpu, open::dtype(parts.config.dtype));
    let x = random(rows, largest.in_features, device, dtype).map_err(failed)?;
    let w = random(largest.out_features, largest.in_features, device, dtype).map_err(failed)?;
    let best = best_seconds(|| gemm::nt(&x, &w).and_then(|y| y.device().synchronize()).map_err(failed))?;
    Ok(2.0 * rows as f64 * (largest.in_features * largest.out_features) as f64 / best)
}

fn random(rows: usize, columns: usize, device: &Device, dtype: DType) -> candle_core::Result<Tensor> {
    let values = rng::uniforms(&mut rng::stream(0, "bench", rows as u64, columns as u64), rows * columns, -1.0, 1.0);
    Tensor::from_vec(values, (rows, columns), &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
}

/// Bytes per second of a copy by one thread.
fn copy_rate() -> f64 {
    let (from, mut to) = (vec![1u8; COPY_BYTES], vec![0u8; COPY_BYTES]);
    let copied = best_seconds(|| {
        to.copy_from_slice(black_box(&from));
        black_box(&to);
        Ok(())
    });
    copied.map_or(f64::INFINITY, |best| COPY_BYTES as f64 / best)
}

/// Fastest of at least three runs that together take [`RATE_SECONDS`].
fn best_seconds(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let (mut best, mut total, mut runs) = (f64::INFINITY, 0.0, 0);
    while runs < 3 || total < RATE_SECONDS {
        let started = Instant::now();
        work()?;
        let seconds = started.elapsed().as_secs_f64().max(1e-9);
        (best, total, runs) = (seconds.min(best), total + seconds, runs + 1);
    }
    Ok(best)
}

/// Median; the mean of the middle two of an even number, 0 of none.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.get(middle), sorted.len() % 2) {
        (None, _) => 0.0,
        (Some(high), 0) => sorted.get(middle - 1).map_or(*high, |low| (low + high) / 2.0),
        (Some(value), _) => *value,
    }
}

fn median_phases(phases: &[Phases]) -> Phases {
    let of = |pick: fn(&Phases) -> f64| median(&phases.iter().map(pick).collect::<Vec<_>>());
    Phases {
        data: of(|p| p.data),
        wait: of(|p| p.wait),
        copy: of(|p| p.copy),
        forward: of(|p| p.forward),
        backward: of(|p| p.backward),
        optimizer: of(|p| p.optimizer),
        validation: 0.0,
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let p = &self.phases_s;
        writeln!(
            f,
            "model      {} blocks, {} trainable parameters, {} tokens a step, {} on {}",
            self.blocks, self.parameters, self.tokens, self.dtype, self.device
        )?;
        writeln!(
            f,
            "limits     matrix product {:.1} GFLOP/s, memory copy {:.2} GB/s",
            self.matmul_flop_per_s / 1e9,
            self.copy_bytes_per_s / 1e9
        )?;
        writeln!(f, "work       {:.2} GFLOP and {:.1} MB moved a step", self.step_flop / 1e9, self.moved_bytes as f64 / 1e6)?;
        writeln!(f, "floor      {:.4} s", self.floor_s)?;
        writeln!(f, "step       {:.4} s median of {} ({:.4} to {:.4})", self.step_median_s, self.steps, self.step_min_s, self.step_max_s)?;
        writeln!(f, "ratio      {:.2}", self.ratio)?;
        writeln!(
            f,
            "phases     data {:.4}, wait {:.4}, copy {:.4}, forward {:.4}, backward {:.4}, optimiser {:.4} s",
            p.data, p.wait, p.copy, p.forward, p.backward, p.optimizer
        )?;
        if let Some(profile) = &self.profile {
            writeln!(f, "device     {:?}", profile.times_ms)?;
            writeln!(f, "host       {:?}", profile.host_ms)?;
        }
        if let Some(d) = &self.memory_mb.device {
            writeln!(
                f,
                "device     {:.0} MiB by the driver of {:.0} allowed, {:.0} used of an arena of {:.0}",
                d.driver, d.cap, d.allocated, d.arena
            )?;
        }
        write!(f, "memory     {:.0} MiB resident, {:.0} MiB at its peak", self.memory_mb.rss, self.memory_mb.rss_peak)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    /// The work of dev at 512 px: 84.4 TFLOP of linears and 3.25 of attention forward, 267.9 in a checkpointed step.
    #[test]
    fn work_of_dev_is_that_of_the_specification() {
        let dev: TransformerGeometry = serde_json::from_value(serde_json::json!({
            "in_channels": 128, "num_layers": 8, "num_single_layers": 48, "attention_head_dim": 128, "num_attention_heads": 48,
            "joint_attention_dim": 15360, "axes_dims_rope": [32, 32, 32, 32]
        }))
        .unwrap();
        let (forward, step) = (step_flop_of(&dev, 56, 1024, 512), step_flop_of(&dev, 0, 1024, 512));
        assert!((forward / 1e12 - (84.4 + 3.25)).abs() < 0.1, "{forward:e}");
        assert!((step / 1e12 - 267.9).abs() < 0.3, "{step:e}");
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }
}
