//! How fast the VAE encodes, and how fast it could: no configuration, no image files, random pixels.
//!
//! The floor is measured in the same run: the rate of float32 matrix products of the shape that dominates and of a square one, whichever is faster.
//! A run cannot beat (operations / that rate); the ratio says how close it comes.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;
use serenity_cuda::{Arena, Gpu, Mat, Ty};
use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result};

use super::packing::Latents;
use super::synth::Random;
use super::{Half, Place, Vae};
use crate::pixels::Pixels;
use crate::report;

/// Time given to measuring a product.
const PRODUCT_TIME: Duration = Duration::from_millis(300);
/// Largest side of an image.
const SIDE_MAX: usize = 16_384;
/// Random values that operands are filled with, again and again.
const FILL: usize = 1 << 20;

/// The result.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where it ran.
    pub device: String,
    /// Images.
    pub images: usize,
    /// Their side in pixels.
    pub resolution: usize,
    /// Opening the device and loading the weights.
    pub open_seconds: f64,
    /// From pixels in host memory to cache entries in host memory, after one batch to warm up.
    pub seconds: f64,
    /// Of it, the VAE; entries are made from its latents beside it.
    pub encode_seconds: f64,
    /// Making entries, on a thread of its own.
    pub pack_seconds: f64,
    /// images / seconds.
    pub images_per_second: f64,
    /// Operations of the convolutions and the attention / seconds.
    pub rate: f64,
    /// Measured float32 matrix product rate in operations per second.
    pub product_rate: f64,
    /// Operations / product_rate.
    pub compute_floor_seconds: f64,
    /// seconds / compute_floor_seconds.
    pub ratio: f64,
    /// Device memory taken since the context was opened, by the driver.
    pub device_bytes: Option<u64>,
    /// All of the device's memory in use, the context and other processes included, by the driver.
    pub device_bytes_in_use: Option<u64>,
}

/// Encodes `images` random images of `resolution` pixels.
///
/// # Errors
/// As [`Vae::open`] and [`Vae::latents_of`]; [`Error::Config`] for a resolution that is no multiple of 16.
pub fn run(path: &Path, place: Place, resolution: usize, images: usize, process: &Process) -> Result<Report> {
    if !(16..=SIDE_MAX).contains(&resolution) || !resolution.is_multiple_of(16) || images == 0 {
        return Err(Error::config(format!("--resolution must be a multiple of 16 up to {SIDE_MAX}, --images positive")));
    }
    let started = Instant::now();
    let vae = Vae::open(path, Half::Encoder, place)?;
    let open_seconds = started.elapsed().as_secs_f64();
    let mut random = Random(1);
    let mut picture = || {
        let rgb = (0..resolution * resolution * 3).map(|_| (127.5 + 60.0 * random.normal()).clamp(0.0, 255.0) as u8);
        Pixels { width: resolution, height: resolution, rgb: rgb.collect() }
    };
    let pictures: Vec<Pixels> = (0..place.batch().min(images)).map(|_| picture()).collect();
    let batch: Vec<&Pixels> = pictures.iter().collect();
    vae.packing().entries(&vae.latents_of(&batch)?)?;
    let started = Instant::now();
    let (encode_time, pack_time) = encode(&vae, &batch, images, process)?;
    let seconds = started.elapsed().as_secs_f64();
    let memory = vae.gpu().map(Gpu::memory).transpose()?;
    let product_rate = product_rate(&vae)?;
    let rate = vae.geometry().encoder_flops(resolution) * images as f64 / seconds;
    Ok(Report {
        device: vae.gpu().map_or_else(|| "cpu".to_string(), |gpu| gpu.properties().name.clone()),
        images,
        resolution,
        open_seconds,
        seconds,
        encode_seconds: encode_time.as_secs_f64(),
        pack_seconds: pack_time.as_secs_f64(),
        images_per_second: images as f64 / seconds,
        rate,
        product_rate,
        compute_floor_seconds: seconds * rate / product_rate,
        ratio: product_rate / rate,
        device_bytes: memory.map(|m| m.used_by_process_estimate),
        device_bytes_in_use: memory.map(|m| m.total - m.free),
    })
}

/// As a run does it: entries are made on another thread than the one that drives the VAE. The time of either.
fn encode(vae: &Vae, batch: &[&Pixels], images: usize, process: &Process) -> Result<(Duration, Duration)> {
    let packing = vae.packing().clone();
    let (sender, latents) = std::sync::mpsc::sync_channel::<Latents>(2);
    let packer = std::thread::spawn(move || -> Result<Duration> {
        let mut busy = Duration::ZERO;
        for latents in latents {
            let started = Instant::now();
            packing.entries(&latents)?;
            busy += started.elapsed();
        }
        Ok(busy)
    });
    let (mut left, mut busy) = (images, Duration::ZERO);
    while left > 0 {
        let count = left.min(batch.len());
        let started = Instant::now();
        let latents = vae.latents_of(batch.get(..count).unwrap_or_default())?;
        busy += started.elapsed();
        if sender.send(latents).is_err() {
            break;
        }
        left -= count;
        process.tick();
        if process.stop_requested() {
            return Err(process.interrupted());
        }
    }
    drop(sender);
    let packed = packer.join().map_err(|_| Error::invariant("the thread that makes entries panicked"))??;
    Ok((busy, packed))
}

/// Operations per second of float32 products on the VAE's device.
///
/// # Errors
/// Failures of the device.
pub fn product_rate(vae: &Vae) -> Result<f64> {
    let channels = vae.geometry().block_out_channels.iter().copied().max().unwrap_or(1);
    match vae.gpu() {
        // Output pixels that a convolution computes at once on the processor.
        None => report::product_rate(channels, 9 * channels, 512, &candle_core::Device::Cpu, candle_core::DType::F32),
        Some(gpu) => Ok(device_rate(gpu, [8192, 9 * channels, channels])?.max(device_rate(gpu, [4096, 4096, 4096])?)),
    }
}

fn device_rate(gpu: &Gpu, [m, k, n]: [usize; 3]) -> Result<f64> {
    let arena = Arena::new(gpu, 4 * (m * k + n * k + m * n) + (1 << 16))?;
    let mut random = Random(7);
    let values: Vec<f32> = (0..FILL).map(|_| random.normal()).collect();
    let filled = |rows: usize, cols: usize| -> Result<Mat> {
        let mat = arena.mat(Ty::F32, rows, cols)?;
        for start in (0..mat.len()).step_by(FILL) {
            gpu.upload_f32(mat.ptr.offset(4 * start), values.get(..FILL.min(mat.len() - start)).unwrap_or_default())?;
        }
        Ok(mat)
    };
    let (a, b, out) = (filled(m, k)?, filled(n, k)?, arena.mat(Ty::F32, m, n)?);
    gpu.gemm_nt(out, a, b, 1.0, 0.0)?;
    gpu.sync()?;
    let (started, mut runs) = (Instant::now(), 0u32);
    while started.elapsed() < PRODUCT_TIME {
        for _ in 0..8 {
            gpu.gemm_nt(out, a, b, 1.0, 0.0)?;
        }
        gpu.sync()?;
        runs += 8;
    }
    Ok(2.0 * (m * k * n) as f64 * f64::from(runs) / started.elapsed().as_secs_f64())
}

impl Report {
    /// Prints the report on standard output.
    pub fn print(&self, json: bool) {
        if json {
            return report::print_json(self);
        }
        println!("device       {} (opened in {:.1} s)", self.device, self.open_seconds);
        println!(
            "VAE          {} images of {} px in {:.3} s, {:.2} images/s, {:.2} TFLOP/s",
            self.images,
            self.resolution,
            self.seconds,
            self.images_per_second,
            self.rate / 1e12
        );
        println!("  phases     VAE {:.3} s, entries {:.3} s beside it", self.encode_seconds, self.pack_seconds);
        println!("  floor      {:.3} s: float32 products at {:.2} TFLOP/s", self.compute_floor_seconds, self.product_rate / 1e12);
        println!("  ratio      {:.2}", self.ratio);
        if let (Some(taken), Some(all)) = (self.device_bytes, self.device_bytes_in_use) {
            println!("  memory     {} MiB since the context was opened, {} MiB in use on the device", taken >> 20, all >> 20);
        }
    }
}
