//! Dequantisation; LayerNorm with modulation, forward and backward.

use half::bf16;
use serenity_protocol::Result;
use serenity_protocol::slab::quant;

use super::{Check, Expected, Work, limit};
use crate::gpu::Gpu;
use crate::mat::{Mat, Ty};
use crate::ops::rows::Int8Rows;

/// Codes and scales on the device, and the weights as the host's dequantiser gives them.
fn int8_rows(check: &Check<'_>, rows: usize, cols: usize, padded: usize) -> Result<(Int8Rows, Vec<f64>)> {
    let values = Check::random(rows as u64 * 31 + cols as u64, rows * cols);
    let mut codes = vec![0i8; rows * padded];
    let mut scales = Vec::new();
    let mut weights = Vec::with_capacity(rows * cols);
    let mut row_weights = vec![bf16::ZERO; cols];
    for (row, (values, codes)) in values.chunks_exact(cols).zip(codes.chunks_exact_mut(padded)).enumerate() {
        let mut scale = quant::quantize_row(values, codes);
        // Scales as unlike as they may come: tiny (products are denormal), large.
        match row % 7 {
            3 => scale = 1e-40,
            5 => scale *= 1e30,
            _ => {}
        }
        scales.push(scale);
        quant::dequantize(codes.get(..cols).unwrap_or_default(), scale, &mut row_weights);
        weights.extend(row_weights.iter().map(|w| f64::from(w.to_f32())));
        // Padding must not be read as weight.
        codes.iter_mut().skip(cols).for_each(|c| *c = 99);
    }
    let (device_codes, device_scales) = (check.arena.reserve(codes.len())?, check.arena.reserve(4 * rows)?);
    check.gpu.upload(device_codes, bytemuck::cast_slice(&codes))?;
    check.gpu.upload(device_scales, bytemuck::cast_slice(&scales))?;
    Ok((Int8Rows { codes: device_codes, scales: device_scales, rows, padded }, weights))
}

/// `dequant_rows`: equal to the host's bit for bit.
pub fn dequant(check: &mut Check<'_>) -> Result<()> {
    let shapes = [
        (1, 16, 16),
        (5, 96, 96),
        (7, 100, 112),
        (3, 33, 64),
        (130, 6144, 6144),
        (9, 4112, 4224),
        (67, 1024, 1088),
        (1, 512, 512),
        (6144, 6144, 6144),
    ];
    for (rows, cols, padded) in shapes {
        let mark = check.arena.mark();
        let (from, values) = int8_rows(check, rows, cols, padded)?;
        for ty in [Ty::Bf16, Ty::F32] {
            let mat = check.poisoned(ty, rows, cols, cols)?;
            let bytes = (rows * padded + rows * cols * ty.bytes()) as f64;
            let work = if rows >= 1000 { Work::Bytes(bytes) } else { Work::None };
            let name = format!("{} {rows} x {cols} of {padded}", ty.name());
            check.case(name.clone(), 0.0, &[Expected { mat, values: values.clone() }], work, &|gpu| gpu.dequant_rows(mat, from))?;
            for blocks in [1, 8, 16, 32].into_iter().filter(|b| ty == Ty::Bf16 && (*b <= 8 || rows >= 1000)) {
                let name = format!("{name}, {blocks} blocks");
                let work = if rows >= 1000 { Work::Bytes(bytes) } else { Work::None };
                let run = |gpu: &Gpu| gpu.dequant_rows_on(gpu.compute(), blocks, mat, from);
                check.case(name, 0.0, &[Expected { mat, values: values.clone() }], work, &run)?;
            }
        }
        check.arena.reset(mark)?;
    }
    Ok(())
}

/// Mean and 1 / sigma.
fn moments(x: &[f64], eps: f64) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

fn ln_mod(x: &[f64], shift: &[f64], scale: &[f64], eps: f64) -> Vec<f64> {
    let (mean, rstd) = moments(x, eps);
    x.iter().zip(shift.iter().zip(scale)).map(|(x, (shift, scale))| (x - mean) * rstd * (1.0 + scale) + shift).collect()
}

fn ln_mod_bwd(x: &[f64], scale: &[f64], dy: &[f64], eps: f64) -> Vec<f64> {
    let (mean, rstd) = moments(x, eps);
    let n: Vec<f64> = x.iter().map(|x| (x - mean) * rstd).collect();
    let g: Vec<f64> = dy.iter().zip(scale).map(|(d, s)| d * (1.0 + s)).collect();
    let count = x.len() as f64;
    let mean_g = g.iter().sum::<f64>() / count;
    let mean_gn = g.iter().zip(&n).map(|(g, n)| g * n).sum::<f64>() / count;
    g.iter().zip(&n).map(|(g, n)| (g - mean_g - n * mean_gn) * rstd).collect()
}

/// `ln_mod` and its backward, with and without residual, also in place.
pub fn norm(check: &mut Check<'_>) -> Result<()> {
    // Samples, tokens, features, stride.
    let shapes = [(1, 1, 8, 8), (2, 3, 96, 96), (3, 5, 100, 104), (1, 7, 2051, 2051), (2, 4, 6144, 6400), (1, 1536, 6144, 6144)];
    for (samples, tokens, cols, stride) in shapes {
        for ty in [Ty::Bf16, Ty::F32] {
            let mark = check.arena.mark();
            norm_case(check, ty, [samples, tokens, cols, stride])?;
            check.arena.reset(mark)?;
        }
    }
    Ok(())
}

fn norm_case(check: &mut Check<'_>, ty: Ty, [samples, tokens, cols, stride]: [usize; 4]) -> Result<()> {
    let (rows, eps) = (samples * tokens, 1e-6);
    // Away from zero mean, so that the variance has to be that of centred values.
    let input: Vec<f32> = Check::random(1, rows * cols).iter().map(|x| x + 0.75).collect();
    let (x, xs) = check.mat(ty, rows, cols, stride, &input)?;
    let (dy, dys) = check.mat(ty, rows, cols, stride, &Check::random(2, rows * cols))?;
    let (residual, rs) = check.mat(ty, rows, cols, stride, &Check::random(3, rows * cols))?;
    // As slices of one wider modulation, 3 parts a sample.
    let (modulation, ms) = check.random_mat(4, Ty::F32, samples, 3 * cols)?;
    let (shift, scale) = (modulation.columns(0, cols)?, modulation.columns(cols, cols)?);
    let part = |row: usize, first: usize| ms.get(row / tokens * 3 * cols + first..).and_then(|m| m.get(..cols)).unwrap_or_default();
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    for (row, (x, dy)) in xs.chunks_exact(cols).zip(dys.chunks_exact(cols)).enumerate() {
        forward.extend(ln_mod(x, part(row, 0), part(row, cols), f64::from(eps)));
        backward.extend(ln_mod_bwd(x, part(row, cols), dy, f64::from(eps)));
    }
    let with_residual: Vec<f64> = backward.iter().zip(&rs).map(|(b, r)| b + r).collect();
    let out = check.poisoned(ty, rows, cols, stride)?;
    let shape = format!("{} {samples} x {tokens} x {cols} ({stride})", ty.name());
    let work = |passes: usize| if rows >= 1000 { Work::Bytes((passes * rows * cols * ty.bytes()) as f64) } else { Work::None };
    let expected = |mat: Mat, values: &Vec<f64>| [Expected { mat, values: values.clone() }];
    check.case(format!("forward {shape}"), limit(ty), &expected(out, &forward), work(2), &|gpu| gpu.ln_mod(out, x, shift, scale, eps))?;
    check.case(format!("backward {shape}"), limit(ty), &expected(out, &backward), work(3), &|gpu| {
        gpu.ln_mod_bwd(out, None, dy, x, scale, eps)
    })?;
    check.case(format!("backward + residual {shape}"), limit(ty), &expected(out, &with_residual), work(4), &|gpu| {
        gpu.ln_mod_bwd(out, Some(residual), dy, x, scale, eps)
    })?;
    let prepare = |check: &Check<'_>| check.gpu.cast(out, residual);
    check.case_after(format!("backward in place {shape}"), limit(ty), &expected(out, &with_residual), Work::None, &prepare, &|gpu| {
        gpu.ln_mod_bwd(out, Some(out), dy, x, scale, eps)
    })
}
