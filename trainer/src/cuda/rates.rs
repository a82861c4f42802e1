//! What a device can do at best: products, copies within it, copies from the host.
#![forbid(unsafe_code)]

use serenity_cuda::driver::{DeviceBuffer, Pinned};
use serenity_cuda::{Event, Gpu, Mat, Ptr, Stream, Ty};
use serenity_protocol::Result;
use serenity_protocol::geometry::TransformerGeometry;

use super::plan::Rates;
use crate::rng;

/// Seconds that `work` takes on `stream`, the best of three.
fn seconds(gpu: &Gpu, stream: &Stream, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let (start, end) = (Event::timed(gpu.context())?, Event::timed(gpu.context())?);
    let mut best = f64::INFINITY;
    work()?;
    for _ in 0..3 {
        stream.record(&start)?;
        work()?;
        stream.record(&end)?;
        gpu.sync()?;
        best = best.min(f64::from(end.since_ms(&start)?) / 1e3);
    }
    Ok(best)
}

/// The device's rates for `tokens` tokens: products of the single blocks' shapes forward and back, copies within it, and from
/// `host`.
///
/// # Errors
/// The driver's; [`serenity_protocol::Error::TryAgain`] without memory for the largest product.
pub fn measure(gpu: &Gpu, g: &TransformerGeometry, tokens: usize, host: &Pinned) -> Result<Rates> {
    let (d, m) = (g.inner_dim(), g.mlp_dim());
    let shapes = [(3 * d + 2 * m, d), (d, d + m)];
    let elements = |(out, inner): (usize, usize)| out * inner + tokens * (out + inner);
    let bytes = 2 * shapes.map(elements).into_iter().max().unwrap_or(0) + 4096;
    let memory = DeviceBuffer::new(gpu.context(), bytes)?;
    // Random numbers, for zeros run faster.
    let pattern: Vec<half::bf16> =
        rng::normals(&mut rng::stream(5, "rates", 0, 0), 1 << 22).into_iter().map(|v| half::bf16::from_f32(0.02 * v)).collect();
    let pattern: &[u8] = bytemuck::cast_slice(&pattern);
    for at in (0..bytes).step_by(pattern.len()) {
        gpu.upload(memory.ptr().offset(at), pattern.get(..pattern.len().min(bytes - at)).unwrap_or_default())?;
    }
    let (mut flops, mut time) = (0.0, 0.0);
    for (out, inner) in shapes {
        let at = |elements: usize| -> Ptr { memory.ptr().offset((2 * elements).next_multiple_of(256)) };
        let weight = Mat::new(at(0), Ty::Bf16, out, inner);
        let x = Mat::new(at(out * inner), Ty::Bf16, tokens, inner);
        let y = Mat::new(at(out * inner + tokens * inner), Ty::Bf16, tokens, out);
        time += seconds(gpu, gpu.compute(), || gpu.gemm_nt(y, x, weight, 1.0, 0.0))?;
        time += seconds(gpu, gpu.compute(), || gpu.gemm_nn(x, y, weight, 1e-3, 0.0))?;
        flops += 4.0 * (out * inner * tokens) as f64;
    }
    let half = bytes / 2;
    let copied = seconds(gpu, gpu.compute(), || gpu.compute().copy(memory.ptr(), memory.ptr().offset(half), half))?;
    let len = host.bytes().min(bytes);
    let bus = seconds(gpu, gpu.copy(), || {
        (0..len).step_by(32 << 20).try_for_each(|at| gpu.copy().copy_in(memory.ptr().offset(at), host, at, (32 << 20).min(len - at)))
    })?;
    Ok(Rates { flops: flops / time, memory: 2.0 * half as f64 / copied, bus: len as f64 / bus })
}
