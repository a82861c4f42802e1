//! What reports of benches share: rates of products to compare with, and JSON.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use serenity_cuda::{Arena, Event, Gpu, Ty};
use serenity_protocol::Result;
use serenity_protocol::cache::text_model::TextGeometry;

use crate::tensor::failed;

/// Time given to measuring a product.
const PRODUCT_TIME: Duration = Duration::from_millis(300);

/// Operations per second of `[m, k]` times `[k, n]` (second operand transposed, as weights are).
pub(crate) fn product_rate(m: usize, k: usize, n: usize, device: &Device, dtype: DType) -> Result<f64> {
    let measure = || -> candle_core::Result<f64> {
        let a = Tensor::randn(0f32, 1.0, (m, k), device)?.to_dtype(dtype)?;
        let b = Tensor::randn(0f32, 1.0, (n, k), device)?.to_dtype(dtype)?.t()?;
        a.matmul(&b)?;
        device.synchronize()?;
        let (started, mut runs) = (Instant::now(), 0u32);
        while started.elapsed() < PRODUCT_TIME || runs < 3 {
            a.matmul(&b)?;
            device.synchronize()?;
            runs += 1;
        }
        Ok(2.0 * (m * k * n) as f64 * f64::from(runs) / started.elapsed().as_secs_f64())
    };
    measure().map_err(failed("measuring a matrix product"))
}

/// Operations a second of the feed-forward products, which are nine tenths of a layer, on random values.
pub(crate) fn device_product_rate(gpu: &Gpu, g: &TextGeometry, tokens: usize) -> Result<f64> {
    let m = tokens.clamp(1, 4096);
    let sizes = [m * g.hidden, 2 * g.intermediate * g.hidden, m * 2 * g.intermediate];
    let arena = Arena::new(gpu, 2 * sizes.iter().sum::<usize>() + (1 << 16))?;
    let (x, w, y) = (
        arena.mat(Ty::Bf16, m, g.hidden)?,
        arena.mat(Ty::Bf16, 2 * g.intermediate, g.hidden)?,
        arena.mat(Ty::Bf16, m, 2 * g.intermediate)?,
    );
    gpu.fill_random(x, 1, 1.0)?;
    gpu.fill_random(w, 2, 0.02)?;
    let (begin, end) = (Event::timed(gpu.context())?, Event::timed(gpu.context())?);
    gpu.gemm_nt(y, x, w, 1.0, 0.0)?;
    gpu.compute().record(&begin)?;
    for _ in 0..20 {
        gpu.gemm_nt(y, x, w, 1.0, 0.0)?;
    }
    gpu.compute().record(&end)?;
    end.sync()?;
    Ok(20.0 * 2.0 * (m * g.hidden * 2 * g.intermediate) as f64 / (f64::from(end.since_ms(&begin)?) / 1e3))
}

/// Prints a report as one line of JSON on standard output.
pub(crate) fn print_json(report: &impl Serialize) {
    match serde_json::to_string(report) {
        Ok(text) => println!("{text}"),
        Err(e) => tracing::error!("the report cannot be written: {e}"),
    }
}
