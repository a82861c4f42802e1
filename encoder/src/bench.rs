//! How long encoding takes on this machine, and how long it would have to.
//!
//! The floors are measured here and now: the rate at which the weight files can be read, and the rate of one matrix product of the shape that
//! dominates. A phase cannot beat the larger of (bytes / read rate) and (operations / product rate); the ratio says how close it comes.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use serde::Serialize;
use serenity_protocol::cache::text_model::TextGeometry;
use serenity_protocol::config::Config;
use serenity_protocol::dataset::{self, Sample};
use serenity_protocol::model_path::{self, ModelPaths};
use serenity_protocol::process::Process;
use serenity_protocol::slab::text_encoder::TextModel;
use serenity_protocol::{Error, Result};

use crate::pixels::Pixels;
use crate::report;
use crate::text::AnyTextEncoder;
use crate::tokenizer::Tokenizer;
use crate::vae::{Half, Place, Vae};

/// Most bytes read to measure the storage.
const READ_SAMPLE_BYTES: u64 = 1 << 30;

/// The result.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where it ran.
    pub device: String,
    /// The text encoder.
    pub text: TextReport,
    /// The VAE encoder.
    pub vae: VaeReport,
}

/// Text encoding of all captions in one pass.
#[derive(Debug, Serialize)]
pub struct TextReport {
    /// Captions.
    pub captions: usize,
    /// Their real tokens.
    pub tokens: usize,
    /// Layers run.
    pub layers: usize,
    /// Type computed in.
    pub dtype: String,
    /// Wall time.
    pub seconds: f64,
    /// Of it, computing.
    pub compute_seconds: f64,
    /// Of it, waiting for a layer.
    pub wait_seconds: f64,
    /// Reading layers in the background.
    pub read_seconds: f64,
    /// Weight bytes needed.
    pub weight_bytes: u64,
    /// Measured read rate in bytes per second.
    pub read_rate: f64,
    /// Measured matrix product rate in operations per second.
    pub product_rate: f64,
    /// weight_bytes / read_rate.
    pub read_floor_seconds: f64,
    /// Operations of the linear layers / product_rate.
    pub compute_floor_seconds: f64,
    /// seconds / larger floor.
    pub ratio: f64,
}

/// Encoding images one batch after another.
#[derive(Debug, Serialize)]
pub struct VaeReport {
    /// Images.
    pub images: usize,
    /// Their side in pixels.
    pub resolution: u32,
    /// Wall time of the VAE, without decoding files.
    pub seconds: f64,
    /// Reading and decoding image files and resizing.
    pub prepare_seconds: f64,
    /// images / seconds.
    pub images_per_second: f64,
    /// Measured matrix product rate in operations per second.
    pub product_rate: f64,
    /// Operations of the convolutions / product_rate.
    pub compute_floor_seconds: f64,
    /// seconds / compute_floor_seconds.
    pub ratio: f64,
}

/// Encodes the configuration's samples (at most `limit`) without the cache and measures the floors.
///
/// # Errors
/// As [`crate::run::run`].
pub fn run(config: &Config, limit: Option<usize>, process: &Process) -> Result<Report> {
    let mut samples = dataset::scan(&config.data)?;
    samples.truncate(limit.unwrap_or(usize::MAX).max(1));
    let paths = model_path::resolve(&config.model)?;
    let text = text(config, &paths, &samples, process)?;
    let vae = vae(config, &paths, &samples, process)?;
    Ok(Report { device: config.device.to_string(), text, vae })
}

fn go_on(process: &Process) -> Result<()> {
    process.tick();
    if process.stop_requested() { Err(process.interrupted()) } else { Ok(()) }
}

fn missing(what: &str) -> Error {
    Error::absent(format!("the model has no {what}"))
}

fn text(config: &Config, paths: &ModelPaths, samples: &[Sample], process: &Process) -> Result<TextReport> {
    let model = TextModel::of(paths)?;
    let tokenizer = Tokenizer::open(paths.tokenizer.as_deref().ok_or_else(|| missing("tokenizer"))?)?;
    let max_length = config.model.max_sequence_length;
    let captions = samples.iter().map(|s| tokenizer.encode(&s.caption, max_length)).collect::<Result<Vec<_>>>()?;
    let read_rate = read_rate(&model.weight_files()?)?;
    let encoder = AnyTextEncoder::open(model, config.device, None, Place::of(config).bytes_max, None)?;
    let dtype = encoder.dtype();
    let g: &TextGeometry = encoder.geometry();
    let states = g.hidden_states(config.model.text_hidden_states)?;
    let tokens: usize = captions.iter().map(|c| c.ids.len()).sum();
    let product_rate = match encoder.gpu() {
        None => report::product_rate(tokens.div_ceil(captions.len()), g.hidden, g.intermediate, &Device::Cpu, dtype)?,
        Some(gpu) => report::device_product_rate(gpu, g, tokens)?,
    };
    let started = Instant::now();
    let encoded = encoder.encode(&captions, tokenizer.pad_id(), states, max_length, DType::BF16, &mut |_, _| go_on(process))?;
    let seconds = started.elapsed().as_secs_f64();
    let times = encoded.times;
    let weight_bytes = times.weight_bytes;
    let (read_floor_seconds, compute_floor_seconds) = (weight_bytes as f64 / read_rate, times.flops / product_rate);
    Ok(TextReport {
        captions: captions.len(),
        tokens,
        layers: states.into_iter().max().unwrap_or(0),
        dtype: format!("{dtype:?}"),
        seconds,
        compute_seconds: times.compute.as_secs_f64(),
        wait_seconds: times.wait.as_secs_f64(),
        read_seconds: times.read.as_secs_f64(),
        weight_bytes,
        read_rate,
        product_rate,
        read_floor_seconds,
        compute_floor_seconds,
        ratio: seconds / read_floor_seconds.max(compute_floor_seconds),
    })
}

fn vae(config: &Config, paths: &ModelPaths, samples: &[Sample], process: &Process) -> Result<VaeReport> {
    let path = paths.vae.as_deref().ok_or_else(|| missing("VAE"))?;
    let vae = Vae::open(path, Half::Encoder, Place::of(config))?;
    let product_rate = crate::vae::bench::product_rate(&vae)?;
    let (mut prepare, mut compute) = (Duration::ZERO, Duration::ZERO);
    for sample in samples {
        let started = Instant::now();
        let bytes = std::fs::read(&sample.image).map_err(|e| Error::io("cannot read the image", &sample.image, e))?;
        let image = Pixels::prepare(&bytes, &sample.image, config.resolution)?;
        prepare += started.elapsed();
        let started = Instant::now();
        vae.packing().entries(&vae.latents_of(&[&image])?)?;
        compute += started.elapsed();
        go_on(process)?;
    }
    let flops = vae.geometry().encoder_flops(config.resolution as usize) * samples.len() as f64;
    let (seconds, compute_floor_seconds) = (compute.as_secs_f64(), flops / product_rate);
    Ok(VaeReport {
        images: samples.len(),
        resolution: config.resolution,
        seconds,
        prepare_seconds: prepare.as_secs_f64(),
        images_per_second: samples.len() as f64 / seconds,
        product_rate,
        compute_floor_seconds,
        ratio: seconds / compute_floor_seconds,
    })
}

/// Reads up to [`READ_SAMPLE_BYTES`] of weight files: bytes per second.
fn read_rate(files: &[PathBuf]) -> Result<f64> {
    let (mut buffer, mut bytes, started) = (vec![0; 8 << 20], 0u64, Instant::now());
    for path in files {
        let failed = |e| Error::io("cannot read the weight file", path, e);
        let mut file = File::open(path).map_err(failed)?;
        while bytes < READ_SAMPLE_BYTES {
            match file.read(&mut buffer).map_err(failed)? {
                0 => break,
                n => bytes += n as u64,
            }
        }
    }
    Ok(bytes as f64 / started.elapsed().as_secs_f64().max(1e-9))
}

impl Report {
    /// Prints the report on standard output.
    pub fn print(&self, json: bool) {
        if json {
            return report::print_json(self);
        }
        let (t, v) = (&self.text, &self.vae);
        println!("device       {}", self.device);
        println!("text         {} captions, {} tokens, {} layers in {:.3} s ({})", t.captions, t.tokens, t.layers, t.seconds, t.dtype);
        println!(
            "  phases     compute {:.3} s, waiting for layers {:.3} s (read {:.3} s in the background)",
            t.compute_seconds, t.wait_seconds, t.read_seconds
        );
        println!(
            "  floors     read {:.3} s at {:.2} GB/s, compute {:.3} s at {:.1} GFLOP/s",
            t.read_floor_seconds,
            t.read_rate / 1e9,
            t.compute_floor_seconds,
            t.product_rate / 1e9
        );
        println!("  ratio      {:.2}", t.ratio);
        println!(
            "VAE          {} images of {} px in {:.3} s, {:.2} images/s (files {:.3} s)",
            v.images, v.resolution, v.seconds, v.images_per_second, v.prepare_seconds
        );
        println!("  floor      compute {:.3} s at {:.1} GFLOP/s", v.compute_floor_seconds, v.product_rate / 1e9);
        println!("  ratio      {:.2}", v.ratio);
    }
}
