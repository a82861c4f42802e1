//! How fast captions are encoded, and how fast they could be: no configuration, no tokenizer, random token ids.
//!
//! The floors are measured in the same run: the same files read by as many threads without anything else (storage), copies from page-locked memory
//! (bus), and products of the layer's shapes (compute). A pass cannot beat the largest of them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use candle_core::DType;
use serde::Serialize;
use serenity_cuda::driver::Pinned;
use serenity_cuda::{Arena, Event, Gpu};
use serenity_protocol::cache::text_model::TextGeometry;
use serenity_protocol::config::DeviceKind;
use serenity_protocol::process::Process;
use serenity_protocol::slab::text_encoder::TextModel;
use serenity_protocol::{Error, Result};

use super::any::AnyTextEncoder;
use crate::report;
use crate::tokenizer::Tokens;

/// Bytes of a copy whose rate is measured.
const COPY_BYTES: usize = 256 << 20;
/// Tokens of a padded caption.
pub(super) const MAX_LENGTH: usize = 512;
/// Bytes of one read.
const READ_BYTES: usize = 32 << 20;
/// Bytes of files that are read to measure the storage, at most.
const READ_MOST: u64 = 16 << 30;

/// What to encode.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where.
    pub device: DeviceKind,
    /// Captions.
    pub captions: usize,
    /// Real tokens of a caption, on average: they vary by a half.
    pub tokens: usize,
    /// Reading threads.
    pub readers: Option<usize>,
    /// Most device memory.
    pub bytes_max: Option<u64>,
}

/// The result.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where it ran.
    pub device: String,
    /// Captions.
    pub captions: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Layers.
    pub layers: usize,
    /// Bytes of weights read.
    pub weight_bytes: u64,
    /// Opening files and device: context, kernels, page-locked buffers.
    pub open_seconds: f64,
    /// From token ids to embeddings in host memory.
    pub seconds: f64,
    /// Of it, before the first layer: taking device memory, embedding.
    pub setup_seconds: f64,
    /// The device at work in layers.
    pub compute_seconds: f64,
    /// The host waiting for pieces of layers.
    pub wait_seconds: f64,
    /// Threads reading, added up.
    pub read_seconds: f64,
    /// Bytes a second of plain reads of these files, by as many threads as were asked for, or as there are processors.
    pub read_rate: f64,
    /// Bytes a second to the device, if it is not the processor.
    pub bus_rate: Option<f64>,
    /// Operations a second of products of a layer's shapes.
    pub product_rate: f64,
    /// weight_bytes / read_rate.
    pub read_floor_seconds: f64,
    /// weight_bytes / bus_rate.
    pub bus_floor_seconds: f64,
    /// Operations of the linear layers / product_rate.
    pub compute_floor_seconds: f64,
    /// seconds / the largest floor.
    pub ratio: f64,
    /// Device memory beside the context, by the driver.
    pub device_bytes: Option<u64>,
    /// All of the device's memory in use at the end of the pass, context and other processes included.
    pub device_bytes_in_use: Option<u64>,
}

/// Captions of random ids, from a half to one and a half times `tokens` long.
///
/// # Errors
/// [`Error::Config`] for numbers that make no captions of [`MAX_LENGTH`] tokens.
pub(super) fn random_captions(g: &TextGeometry, captions: usize, tokens: usize) -> Result<Vec<Tokens>> {
    if captions == 0 || !(2..=340).contains(&tokens) {
        return Err(Error::config("--captions must be positive, --tokens from 2 to 340"));
    }
    let caption = |i: usize| {
        let n = tokens / 2 + (i * 7919) % (tokens + 1);
        Tokens { ids: (0..n).map(|j| ((i * 104_729 + j * 31) % g.vocab) as u32).collect(), cut: 0 }
    };
    Ok((0..captions).map(caption).collect())
}

/// Ends a pass when the process is asked to stop.
pub(super) fn go_on(process: &Process) -> Result<()> {
    process.tick();
    if process.stop_requested() { Err(process.interrupted()) } else { Ok(()) }
}

/// Encodes random captions with a text encoder: all layers of a checkpoint, or those that a slab holds.
///
/// # Errors
/// As [`AnyTextEncoder::open`] and [`AnyTextEncoder::encode`].
pub fn run(model: TextModel, options: &Options, process: &Process) -> Result<Report> {
    let opened = Instant::now();
    let encoder = AnyTextEncoder::open(model, options.device, None, options.bytes_max, options.readers)?;
    let open_seconds = opened.elapsed().as_secs_f64();
    let g = encoder.geometry().clone();
    let layers = model.layers()?;
    let states = [layers / 3, 2 * layers / 3, layers];
    let captions = random_captions(&g, options.captions, options.tokens)?;
    let started = Instant::now();
    let encoded = encoder.encode(&captions, 0, states, MAX_LENGTH, DType::BF16, &mut |_, _| go_on(process))?;
    let seconds = started.elapsed().as_secs_f64();
    let times = encoded.times;
    let in_use = encoder.gpu().map(Gpu::memory).transpose()?.map(|m| m.total - m.free);
    let tokens: usize = captions.iter().map(|c| c.ids.len()).sum();
    let weight_bytes = times.weight_bytes;
    let threads = options.readers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let read_rate = read_rate(&model.weight_files()?, threads)?;
    let (bus_rate, product_rate) = match encoder.gpu() {
        Some(gpu) => (Some(bus_rate(gpu)?), report::device_product_rate(gpu, &g, tokens)?),
        None => (None, report::product_rate(1024, g.hidden, g.intermediate, &candle_core::Device::Cpu, DType::F32)?),
    };
    let bus = bus_rate.map_or(0.0, |rate| weight_bytes as f64 / rate);
    let (read, compute) = (weight_bytes as f64 / read_rate, times.flops / product_rate);
    Ok(Report {
        device: encoder.gpu().map_or_else(|| "cpu".to_string(), |gpu| gpu.properties().name.clone()),
        captions: captions.len(),
        tokens,
        layers,
        weight_bytes,
        open_seconds,
        seconds,
        setup_seconds: times.setup.as_secs_f64(),
        compute_seconds: times.compute.as_secs_f64(),
        wait_seconds: times.wait.as_secs_f64(),
        read_seconds: times.read.as_secs_f64(),
        read_rate,
        bus_rate,
        product_rate,
        read_floor_seconds: read,
        bus_floor_seconds: bus,
        compute_floor_seconds: compute,
        ratio: seconds / read.max(bus).max(compute),
        device_bytes: times.device_bytes,
        device_bytes_in_use: in_use,
    })
}

/// Bytes a second of reads of weight files by so many threads, each with a buffer of its own.
fn read_rate(files: &[PathBuf], threads: usize) -> Result<f64> {
    let mut pieces = Vec::new();
    let mut all = 0u64;
    for file in files {
        let bytes = std::fs::metadata(file).map_err(|e| Error::io("cannot look at the weight file", file, e))?.len();
        for start in (0..bytes).step_by(READ_BYTES) {
            if all < READ_MOST {
                let length = (bytes - start).min(READ_BYTES as u64);
                pieces.push((file.clone(), start, length as usize));
                all += length;
            }
        }
    }
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        let mut buffer = vec![0u8; READ_BYTES];
        loop {
            // Pairs with nothing: each number is taken once, the list does not change.
            let Some((file, start, length)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) else { return Ok(()) };
            let failed = |e| Error::io("cannot read the weight file", file, e);
            let to = buffer.get_mut(..*length).unwrap_or_default();
            File::open(file).map_err(failed)?.read_exact_at(to, *start).map_err(failed)?;
        }
    };
    let started = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        let ended = threads.into_iter().map(|t| t.join().map_err(|_| Error::invariant("a reading thread panicked")));
        ended.collect::<Vec<_>>().into_iter().try_for_each(|end| end?)
    })?;
    Ok(all as f64 / started.elapsed().as_secs_f64().max(1e-9))
}

/// Bytes a second of copies from page-locked memory.
fn bus_rate(gpu: &Gpu) -> Result<f64> {
    let memory = Pinned::new(gpu.context(), COPY_BYTES)?;
    let arena = Arena::new(gpu, COPY_BYTES)?;
    let to = arena.reserve(COPY_BYTES)?;
    let (begin, end) = (Event::timed(gpu.context())?, Event::timed(gpu.context())?);
    gpu.copy().copy_in(to, &memory, 0, COPY_BYTES)?;
    gpu.copy().record(&begin)?;
    for _ in 0..8 {
        gpu.copy().copy_in(to, &memory, 0, COPY_BYTES)?;
    }
    gpu.copy().record(&end)?;
    end.sync()?;
    Ok(8.0 * COPY_BYTES as f64 / (f64::from(end.since_ms(&begin)?) / 1e3))
}

impl Report {
    /// Prints the report on standard output.
    pub fn print(&self, json: bool) {
        if json {
            return report::print_json(self);
        }
        println!("device       {} (opened in {:.1} s)", self.device, self.open_seconds);
        println!("text         {} captions, {} tokens, {} layers in {:.3} s", self.captions, self.tokens, self.layers, self.seconds);
        println!(
            "  phases     memory and embedding {:.3} s, device at work {:.3} s, host waiting for pieces {:.3} s, threads reading {:.3} s",
            self.setup_seconds, self.compute_seconds, self.wait_seconds, self.read_seconds
        );
        println!(
            "  floors     storage {:.3} s at {:.1} GB/s, bus {:.3} s at {:.1} GB/s, products {:.3} s at {:.1} TFLOP/s",
            self.read_floor_seconds,
            self.read_rate / 1e9,
            self.bus_floor_seconds,
            self.bus_rate.unwrap_or_default() / 1e9,
            self.compute_floor_seconds,
            self.product_rate / 1e12
        );
        println!("  ratio      {:.2}", self.ratio);
        if let (Some(taken), Some(all)) = (self.device_bytes, self.device_bytes_in_use) {
            println!("  memory     {} MiB beside the context, {} MiB in use on the device", taken >> 20, all >> 20);
        }
    }
}
