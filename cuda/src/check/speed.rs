//! The ceilings that plans and reports are measured against: copies from the host, device copies, products, dequantisation.

use std::sync::Arc;
use std::time::Instant;

use memmap2::MmapMut;
use serenity_protocol::{Error, Result};

use super::{Check, Row, Work};
use crate::driver::Event;
use crate::gpu::Gpu;
use crate::host::{HostSource, Locking, nameless_map};
use crate::mat::{Mat, Ty};
use crate::ops::rows::Int8Rows;

/// Bytes of a copy, the ring's chunk.
const CHUNK: usize = 64 << 20;
/// Bytes of the mapping.
const MAPPING: usize = 1 << 30;

/// All of them.
pub fn bandwidth(check: &mut Check<'_>) -> Result<()> {
    for (name, locking) in [("page-locked", Locking::Allowed), ("bounced", Locking::Refused)] {
        let mark = check.arena.mark();
        host_to_device(check, name, locking)?;
        check.arena.reset(mark)?;
    }
    let mark = check.arena.mark();
    device_copy(check)?;
    check.arena.reset(mark)?;
    products(check)?;
    dequantisation(check)
}

/// Memory as the ring's: a file in shared memory, mapped, every page written.
fn shared_mapping(check: &Check<'_>) -> Result<MmapMut> {
    let path = check.scratch.join(format!("serenity-gpu-check-{}", std::process::id()));
    let mut map = nameless_map(&path, MAPPING).map_err(|e| Error::io("cannot make the file that copies are measured from", &path, e))?;
    let seed = Check::random(5, 1 << 18);
    let bytes: &[u8] = bytemuck::cast_slice(&seed);
    map.chunks_mut(bytes.len()).for_each(|part| part.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from));
    Ok(map)
}

fn host_to_device(check: &mut Check<'_>, name: &str, locking: Locking) -> Result<()> {
    let map = Arc::new(shared_mapping(check)?);
    copy_chunks(check, name, &map, locking)
}

fn copy_chunks(check: &mut Check<'_>, name: &str, map: &Arc<MmapMut>, locking: Locking) -> Result<()> {
    let target = check.arena.reserve(2 * CHUNK)?;
    let started = Instant::now();
    let mut source = HostSource::of_map(check.gpu.context(), map, CHUNK, locking)?;
    let registered = started.elapsed();
    let stream = check.gpu.copy();
    let mut times = Vec::new();
    for round in 0..6 {
        let (start, end) = (Event::timed(check.gpu.context())?, Event::timed(check.gpu.context())?);
        stream.record(&start)?;
        for (i, offset) in (0..MAPPING).step_by(CHUNK).enumerate() {
            source.copy_in(stream, target.offset(i % 2 * CHUNK), offset, CHUNK)?;
        }
        stream.record(&end)?;
        end.sync()?;
        if round > 0 {
            times.push(f64::from(end.since_ms(&start)?) * 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    let micros = times.get(times.len() / 2).copied().unwrap_or(f64::NAN);
    let rate = Work::Bytes(MAPPING as f64)
        .rate(micros)
        .map(|r| format!("{r} ({}, set up in {:.2} s)", source.describe(), registered.as_secs_f64()));
    let row = Row { micros: Some(micros), rate, ..check.row(format!("host to device, {name}, 1 GiB in copies of 64 MiB")) };
    check.push(row);
    Ok(())
}

fn timed(check: &mut Check<'_>, name: String, work: Work, run: &dyn Fn(&Gpu) -> Result<()>) -> Result<()> {
    let micros = check.median_micros(&Check::flush, run)?;
    let row = Row { micros: Some(micros), rate: work.rate(micros), ..check.row(name) };
    check.push(row);
    Ok(())
}

fn device_copy(check: &mut Check<'_>) -> Result<()> {
    let bytes = 1 << 30;
    let (a, b) = (check.arena.reserve(bytes)?, check.arena.reserve(bytes)?);
    check.gpu.fill_random(Mat::new(a, Ty::F32, 1 << 14, (bytes / 4) >> 14), 1, 1.0)?;
    timed(check, "device copy of 1 GiB (read + written)".into(), Work::Bytes(2.0 * bytes as f64), &|gpu| gpu.compute().copy(b, a, bytes))
}

/// A random bf16 matrix.
fn random(check: &Check<'_>, rows: usize, cols: usize, seed: u64) -> Result<Mat> {
    let mat = check.arena.mat(Ty::Bf16, rows, cols)?;
    check.gpu.fill_random(mat, seed, 0.05)?;
    Ok(mat)
}

/// The products of a block at 512 and 1024 pixels: tokens, inputs, outputs of the weight.
fn products(check: &mut Check<'_>) -> Result<()> {
    let shapes = [(1536, 6144, 55_296), (1536, 24_576, 6144), (1024, 6144, 36_864), (4608, 6144, 55_296), (4608, 24_576, 6144)];
    for (tokens, inputs, outputs) in shapes {
        let mark = check.arena.mark();
        let (x, w) = (random(check, tokens, inputs, 1)?, random(check, outputs, inputs, 2)?);
        let (y, dx) = (random(check, tokens, outputs, 3)?, random(check, tokens, inputs, 4)?);
        let work = Work::Flops(2.0 * (tokens * inputs * outputs) as f64);
        timed(check, format!("nt {tokens} x {inputs} x {outputs}"), work, &|gpu| gpu.gemm_nt(y, x, w, 1.0, 0.0))?;
        sampled(check, y, x, w, inputs)?;
        check.gpu.fill_random(y, 3, 0.05)?;
        timed(check, format!("nn {tokens} x {outputs} x {inputs}"), work, &|gpu| gpu.gemm_nn(dx, y, w, 1.0, 0.0))?;
        check.arena.reset(mark)?;
    }
    adapter_products(check)
}

/// A few elements of a large product against sums on the host: offsets beyond 2^31 bytes would show here.
fn sampled(check: &mut Check<'_>, y: Mat, x: Mat, w: Mat, inputs: usize) -> Result<()> {
    let mut good = true;
    for i in 0..16usize {
        let (row, col) = ((i * 7919 + y.rows - 1) % y.rows, (i * 104_729 + y.cols - 1) % y.cols);
        let (a, b) = (check.read(x.rows(row, 1)?)?, check.read(w.rows(col, 1)?)?);
        let got = check.read(y.rows(row, 1)?.columns(col, 1)?)?;
        let expected: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        // Of a sum of that many random products, relative to its usual size.
        let scale = (inputs as f64).sqrt() * 0.05 * 0.05 / 3.0;
        good &= got.first().is_some_and(|g| (f64::from(*g) - expected).abs() <= 4.2e-3 * expected.abs().max(scale));
    }
    check.holds("16 of its elements", good);
    Ok(())
}

/// The small products of an adapter of rank 16 on the fused projection.
fn adapter_products(check: &mut Check<'_>) -> Result<()> {
    let (tokens, inputs, outputs, rank) = (1536, 6144, 55_296, 16);
    let mark = check.arena.mark();
    let (x, dy) = (random(check, tokens, inputs, 1)?, random(check, tokens, outputs, 2)?);
    let (a, b, h) = (random(check, rank, inputs, 3)?, random(check, outputs, rank, 4)?, random(check, tokens, rank, 5)?);
    let (da, db) = (check.arena.mat(Ty::F32, rank, inputs)?, check.arena.mat(Ty::F32, outputs, rank)?);
    let bytes = |elements: usize, floats: usize| Work::Bytes((2 * elements + 4 * floats) as f64);
    timed(check, "x Aᵀ, rank 16".into(), bytes(x.len() + a.len() + h.len(), 0), &|gpu| gpu.gemm_nt(h, x, a, 1.0, 0.0))?;
    timed(check, "y += h Bᵀ".into(), bytes(2 * dy.len() + b.len() + h.len(), 0), &|gpu| gpu.gemm_nt(dy, h, b, 1.0, 1.0))?;
    timed(check, "dh = dy B".into(), bytes(dy.len() + b.len() + h.len(), 0), &|gpu| gpu.gemm_nn(h, dy, b, 1.0, 0.0))?;
    timed(check, "dA = dhᵀ x".into(), bytes(h.len() + x.len(), da.len()), &|gpu| gpu.gemm_tn(da, h, x, 1.0, 0.0))?;
    timed(check, "dB = dyᵀ h".into(), bytes(dy.len() + h.len(), db.len()), &|gpu| gpu.gemm_tn(db, dy, h, 1.0, 0.0))?;
    check.arena.reset(mark)
}

fn dequantisation(check: &mut Check<'_>) -> Result<()> {
    let (rows, cols) = (55_296, 6144);
    let mark = check.arena.mark();
    let codes = check.arena.mat(Ty::F32, rows, cols / 4)?;
    check.gpu.fill_random(codes, 1, 1.0)?;
    let scales = check.arena.mat(Ty::F32, 1, rows)?;
    check.gpu.fill_random(scales, 2, 0.01)?;
    let out = check.arena.mat(Ty::Bf16, rows, cols)?;
    let from = Int8Rows { codes: codes.ptr, scales: scales.ptr, rows, padded: cols };
    let work = Work::Bytes((3 * rows * cols) as f64);
    timed(check, format!("dequantisation {rows} x {cols} (read + written)"), work, &|gpu| gpu.dequant_rows(out, from))?;
    check.arena.reset(mark)
}
