//! Steps of random weights at full size, by row of the targets table.
//!
//! Blocks come from page-locked memory of this process: what is timed is the device side alone, without ring and loader. Products and bus are
//! measured first, in the same run, and the floor is what they would take for the same step.
#![forbid(unsafe_code)]

use std::time::Instant;

use candle_core::{DType, Device};
use serenity_cuda::{Gpu, Ty};
use serenity_protocol::geometry::{LinearSpec, TransformerGeometry};
use serenity_protocol::{Error, Result};

use super::model::{Hosted, OPTIMIZER, Setup, build, random_batch, sizes};
use super::{Line, Options, holds};
use crate::cuda::bench_rows::{Row, row};
use crate::cuda::plan::{Limits, Rates};
use crate::cuda::rates;
use crate::cuda::step::CudaStep;
use crate::model::{AdapterSet, MicroBatch};

/// Device memory that libraries take when their kernels are first used, at most.
const LIBRARIES_BYTES: u64 = 128 << 20;
/// Steps before the clock starts.
const WARM_UP: usize = 2;
/// Text tokens.
const TEXT: usize = 512;
/// What adapters are made for: the linears of the attention, the fused one included.
const RANK: usize = 16;

/// The geometry of FLUX.2 [dev].
pub(super) fn dev() -> TransformerGeometry {
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

pub(super) fn timing(options: &Options, emit: &mut dyn FnMut(Line)) -> Result<()> {
    let g = options.geometry.as_deref().map_or_else(|| Ok(dev()), TransformerGeometry::from_config_file)?;
    let find = |name: &String| row(name).ok_or_else(|| Error::config(format!("there is no row '{name}' in the targets table")));
    let mut rows = options.rows.iter().map(find).collect::<Result<Vec<Row>>>()?;
    if rows.is_empty() {
        rows.push(Row {
            name: "custom",
            resolution: options.resolution,
            accumulation: options.accumulation.max(1),
            cap_mib: options.budget_mb,
            keep_activations: true,
            target: f64::INFINITY,
        });
    }
    let gpu = Gpu::open(options.device)?;
    let hosted = Hosted::random(&gpu, &g, DType::BF16, true)?;
    let targets: Vec<LinearSpec> = g.blocks().flat_map(|b| g.block_linears(b)).filter(|l| l.name.contains(".attn.")).collect();
    let adapters = AdapterSet::init(&targets, RANK, RANK as f64, 1, &Device::Cpu)?;
    drop(gpu);
    for row in rows {
        if let Err(e) = time(options, &row, &hosted, &adapters, emit) {
            emit(holds(row.name, false, e.to_string()));
        }
    }
    Ok(())
}

fn time(options: &Options, row: &Row, hosted: &Hosted, adapters: &AdapterSet, emit: &mut dyn FnMut(Line)) -> Result<()> {
    let gpu = Gpu::open(options.device)?;
    let side = (row.resolution / 16).max(1);
    let host = hosted.memory.first().ok_or_else(|| Error::invariant("a model without blocks"))?;
    let rates = rates::measure(&gpu, &hosted.geometry, TEXT + side * side, host)?;
    let batches: Vec<MicroBatch> =
        (0..row.accumulation).map(|i| random_batch(&hosted.geometry, i as u64, (1, TEXT, side, side))).collect::<Result<_>>()?;
    let memory = gpu.memory()?;
    let before = memory.total - memory.free;
    let budget = ((row.cap_mib as u64) << 20).saturating_sub(before + LIBRARIES_BYTES);
    let limits = Limits { kept_max: if row.keep_activations { usize::MAX } else { 0 }, rates, ..Limits::default() };
    let setup = Setup {
        hosted,
        ty: Ty::Bf16,
        adapters,
        optimizer: &OPTIMIZER,
        batches: batches.iter().map(sizes).collect::<Result<_>>()?,
        budget: usize::try_from(budget).unwrap_or(usize::MAX),
        limits,
    };
    let mut step = build(gpu, setup)?;
    let plan = format!("before the arena {} MiB; {}", before >> 20, step.plan());
    emit(holds(format!("{}: plan on {}", row.name, step.gpu().properties().name), true, plan));
    let mut variants = vec![None];
    variants.extend(options.variants.iter().map(Some));
    for variant in variants {
        if let Some(text) = variant {
            step.tune(text.parse()?)?;
        }
        step.measure(false);
        let timed = measure(&mut step, &batches, options.steps.max(1))?;
        emit(verdict(row, variant.map_or("", String::as_str), &step, &rates, &timed));
        step.measure(true);
        one(&mut step, &batches)?;
        let (times, host) = (step.times()?, step.host_times());
        let line = holds(format!("{}: milliseconds by phase (copy overlaps)", row.name), true, format!("{times:?}; {host:?}"));
        emit(Line { figures: serde_json::to_value(times).ok(), ..line });
    }
    Ok(())
}

fn one(step: &mut CudaStep, batches: &[MicroBatch]) -> Result<f64> {
    let started = Instant::now();
    step.gradients(batches, &|| false)?;
    step.norm()?;
    step.update(1e-4)?;
    step.gpu().sync()?;
    Ok(started.elapsed().as_secs_f64())
}

/// Figures of some steps.
struct Timed {
    /// Sorted.
    seconds: Vec<f64>,
    /// Bytes of blocks and of block inputs from the host, a step.
    bytes: f64,
    /// What the driver counts in use on the device, least and most.
    driver: (u64, u64),
}

fn measure(step: &mut CudaStep, batches: &[MicroBatch], steps: usize) -> Result<Timed> {
    for _ in 0..WARM_UP {
        one(step, batches)?;
    }
    let before = step.bytes_from_host();
    let (mut seconds, mut driver) = (Vec::with_capacity(steps), (u64::MAX, 0));
    for _ in 0..steps {
        seconds.push(one(step, batches)?);
        let memory = step.memory()?.1;
        let used = memory.total - memory.free;
        driver = (driver.0.min(used), driver.1.max(used));
    }
    seconds.sort_by(f64::total_cmp);
    Ok(Timed { seconds, bytes: (step.bytes_from_host() - before) as f64 / steps as f64, driver })
}

fn verdict(row: &Row, variant: &str, step: &CudaStep, rates: &Rates, timed: &Timed) -> Line {
    let at = |i: usize| timed.seconds.get(i).copied().unwrap_or(f64::NAN);
    let (median, least, most) = (at(timed.seconds.len() / 2), at(0), at(timed.seconds.len().saturating_sub(1)));
    let (forecast, samples) = (step.plan().forecast, row.accumulation as f64);
    let floor = (forecast.flops / rates.flops).max(timed.bytes / rates.bus);
    let (mib, flat) = ((timed.driver.0 >> 20, timed.driver.1 >> 20), timed.driver.0 == timed.driver.1);
    let within = timed.driver.1 <= (row.cap_mib as u64) << 20;
    let note = format!(
        "{:.4} s a sample, target {} {}; step median {median:.4} s ({least:.4} to {most:.4}), floor {floor:.4}, ratio {:.3}, expected {:.4}; \
         {:.2} GB ({:.1} of {:.1} GB/s), products at {:.0} TFLOP/s; driver {} MiB of {}{}{}",
        median / samples,
        row.target,
        if median / samples <= row.target { "met" } else { "MISSED" },
        median / floor,
        forecast.seconds,
        timed.bytes / 1e9,
        timed.bytes / 1e9 / median,
        rates.bus / 1e9,
        rates.flops / 1e12,
        mib.1,
        row.cap_mib,
        if flat { ", flat" } else { ", NOT FLAT" },
        if within { "" } else { ", OVER THE CAP" },
    );
    let figures = serde_json::json!({
        "row": row, "variant": variant, "median": median, "least": least, "most": most, "sample": median / samples, "floor": floor, "ratio": median / floor,
        "met": median / samples <= row.target, "expected": forecast, "rates": rates, "bytes": timed.bytes,
        "driver_mib": mib.1, "driver_least_mib": mib.0, "flat": flat, "within": within, "arena_mib": step.plan().total() >> 20,
    });
    let what = format!("{}: {} px, {} micro-batches, {} steps {variant}", row.name, row.resolution, row.accumulation, timed.seconds.len());
    Line { figures: Some(figures), ..holds(what, flat && within, note) }
}
