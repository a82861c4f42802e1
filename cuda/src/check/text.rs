//! Operations of the text encoder against plain arithmetic in float64.

use serenity_protocol::Result;

use super::{Check, Expected, Work, limit};
use crate::gpu::Gpu;
use crate::mat::{Mat, Ty};
use crate::ops::text::{Captions, GroupedHeads};

/// To the type's precision, as the kernels round in the middle.
fn rounded(ty: Ty, x: f64) -> f64 {
    match ty {
        Ty::F32 => f64::from(x as f32),
        Ty::Bf16 => half::bf16::from_f64(x).to_f64(),
    }
}

/// `rms_norm`, also of views.
pub fn rms_norm(check: &mut Check<'_>) -> Result<()> {
    for (rows, cols, stride) in [(1, 8, 8), (3, 100, 104), (2, 51, 51), (5, 5120, 5120), (2048, 5120, 5120)] {
        for ty in [Ty::Bf16, Ty::F32] {
            let mark = check.arena.mark();
            let (x, xs) = check.mat(ty, rows, cols, stride, &Check::random(1, rows * cols))?;
            let (weight, ws) = check.random_mat(2, ty, 1, cols)?;
            let mut expected = Vec::with_capacity(rows * cols);
            for row in xs.chunks_exact(cols) {
                let r = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / cols as f64 + 1e-5).sqrt();
                expected.extend(row.iter().zip(&ws).map(|(x, w)| rounded(ty, x * r) * w));
            }
            let out = check.poisoned(ty, rows, cols, stride)?;
            let work = if rows >= 1000 { Work::Bytes((2 * rows * cols * ty.bytes()) as f64) } else { Work::None };
            let name = format!("{} {rows} x {cols} ({stride})", ty.name());
            let outputs = [Expected { mat: out, values: expected }];
            // Float32 may fall on the other side of a tie before the first of two roundings: a whole step, and half of one by the second.
            let bound = if ty == Ty::Bf16 { 3.0 * limit(ty) } else { limit(ty) };
            check.case(name, bound, &outputs, work, &|gpu: &Gpu| gpu.rms_norm(out, x, weight, 1e-5))?;
            check.arena.reset(mark)?;
        }
    }
    Ok(())
}

fn table(check: &Check<'_>, ty: Ty, positions: usize, half: usize, f: fn(f64) -> f64) -> Result<(Mat, Vec<f64>)> {
    let angle = |i: usize| (i / half) as f64 * 100f64.powf(-((i % half) as f64) / half as f64);
    let values: Vec<f32> = (0..positions * half).map(|i| f(angle(i)) as f32).collect();
    check.mat(ty, positions, half, half, &values)
}

/// `rotate_halves`: queries and keys turn, what is behind them stays.
pub fn rotate(check: &mut Check<'_>) -> Result<()> {
    for (rows, heads, kept, hd) in [(1, 1, 0, 2), (5, 3, 1, 16), (7, 6, 2, 48), (300, 40, 8, 128)] {
        for ty in [Ty::Bf16, Ty::F32] {
            let mark = check.arena.mark();
            let (half, cols) = (hd / 2, (heads + kept) * hd);
            let ((cos, cs), (sin, ss)) = (table(check, ty, rows + 3, half, f64::cos)?, table(check, ty, rows + 3, half, f64::sin)?);
            let places: Vec<u32> = (0..rows as u32).map(|r| (r * 7 + 1) % (rows as u32 + 3)).collect();
            let positions = check.arena.reserve(4 * rows)?;
            check.gpu.upload(positions, bytemuck::cast_slice(&places))?;
            let values = Check::random(3, rows * cols);
            let (source, xs) = check.mat(ty, rows, cols, cols, &values)?;
            let mut expected = xs;
            for (row, place) in expected.chunks_exact_mut(cols).zip(&places) {
                for head in row.chunks_exact_mut(hd).take(heads) {
                    let (first, second) = head.split_at_mut(half);
                    for (j, (a, b)) in first.iter_mut().zip(second).enumerate() {
                        let at = *place as usize * half + j;
                        let (c, s) = (cs.get(at).copied().unwrap_or(f64::NAN), ss.get(at).copied().unwrap_or(f64::NAN));
                        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                    }
                }
            }
            let x = check.poisoned(ty, rows, cols, cols)?;
            let prepare = |check: &Check<'_>| check.gpu.cast(x, source);
            let run = |gpu: &Gpu| gpu.rotate_halves(x, heads, positions, cos, sin);
            let name = format!("{} {rows} rows, {heads} of {} heads of {hd}", ty.name(), heads + kept);
            check.case_after(name, limit(ty), &[Expected { mat: x, values: expected }], Work::None, &prepare, &run)?;
            check.arena.reset(mark)?;
        }
    }
    Ok(())
}

/// Attention of one caption in float64: `x` has rows of queries, keys and values side by side.
fn attention(x: &[f64], rows: usize, heads: GroupedHeads) -> Vec<f64> {
    let GroupedHeads { queries, keys, head_dim: hd } = heads;
    let width = heads.packed();
    let at = |row: usize, column: usize| x.get(row * width + column).copied().unwrap_or(f64::NAN);
    let mut out = vec![0.0; rows * queries * hd];
    for head in 0..queries {
        let (k, v) = ((queries + head * keys / queries) * hd, (queries + keys + head * keys / queries) * hd);
        for row in 0..rows {
            let scores: Vec<f64> =
                (0..=row).map(|key| (0..hd).map(|d| at(row, head * hd + d) * at(key, k + d)).sum::<f64>() / (hd as f64).sqrt()).collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for d in 0..hd {
                let mixed: f64 = weights.iter().enumerate().map(|(key, w)| w * at(key, v + d)).sum();
                if let Some(place) = out.get_mut(row * queries * hd + head * hd + d) {
                    *place = mixed / sum;
                }
            }
        }
    }
    out
}

/// `caption_attention`: captions of every length around a tile, packed; rows between them are not written.
pub fn captions(check: &mut Check<'_>) -> Result<()> {
    let heads = |queries: usize, keys: usize, head_dim: usize| GroupedHeads { queries, keys, head_dim };
    let lengths = [1, 31, 32, 33, 64, 7, 97, 140];
    for of in [heads(1, 1, 2), heads(6, 2, 48), heads(4, 4, 16), heads(8, 2, 128), heads(5, 1, 64)] {
        for ty in [Ty::Bf16, Ty::F32] {
            let mark = check.arena.mark();
            let (mut places, mut end) = (Vec::new(), 0);
            for rows in lengths {
                places.push((end, rows));
                end += rows;
            }
            let (packed, xs) = check.random_mat(5, ty, end, of.packed())?;
            let mut expected = Vec::new();
            for (start, rows) in &places {
                let part = xs.get(start * of.packed()..(start + rows) * of.packed()).unwrap_or_default();
                expected.extend(attention(part, *rows, of));
            }
            let out = check.poisoned(ty, end, of.queries * of.head_dim, of.queries * of.head_dim)?;
            let placed = Captions::new(check.gpu, check.arena, &places)?;
            let name = format!("{} {} captions, {} heads of {} on {}", ty.name(), places.len(), of.queries, of.head_dim, of.keys);
            let run = |gpu: &Gpu| gpu.caption_attention(out, packed, of, placed);
            // Float32 sums of exponentials that were rounded: a few more last bits than a product has.
            let bound = if ty == Ty::F32 { 1e-5 } else { limit(ty) };
            check.case(name, bound, &[Expected { mat: out, values: expected }], Work::None, &run)?;
            check.arena.reset(mark)?;
        }
    }
    Ok(())
}
