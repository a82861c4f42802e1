//! SwiGLU, gated residual, sums and casts, time embedding, silu, random values.

use half::bf16;
use serenity_protocol::{Error, Result};

use super::{Check, Expected, Work, limit};
use crate::gpu::Gpu;
use crate::mat::{Mat, Ty};

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `swiglu` and its backward, from and into columns of a packed matrix, also in place.
pub fn swiglu(check: &mut Check<'_>) -> Result<()> {
    for (rows, cols, more) in [(1, 8, 0), (3, 100, 4), (5, 33, 1), (7, 512, 96), (512, 18432, 64)] {
        for ty in [Ty::Bf16, Ty::F32] {
            let mark = check.arena.mark();
            swiglu_case(check, ty, rows, cols, more)?;
            check.arena.reset(mark)?;
        }
    }
    Ok(())
}

fn swiglu_case(check: &mut Check<'_>, ty: Ty, rows: usize, cols: usize, more: usize) -> Result<()> {
    let wide = more + 2 * cols;
    // Some gates are large: exp must not overflow into NaN.
    let input: Vec<f32> = Check::random(1, rows * wide).iter().enumerate().map(|(i, x)| if i % 97 == 5 { x * 90.0 } else { *x }).collect();
    let (packed, values) = check.mat(ty, rows, wide, wide, &input)?;
    let (gate, value) = (packed.columns(more, cols)?, packed.columns(more + cols, cols)?);
    let (dm, dms) = check.random_mat(2, ty, rows, cols)?;
    let (mut forward, mut back) = (Vec::with_capacity(rows * cols), vec![0.0; rows * 2 * cols]);
    for (row, (p, dm)) in values.chunks_exact(wide).zip(dms.chunks_exact(cols)).enumerate() {
        let (gates, rest) = p.get(more..).and_then(|p| p.split_at_checked(cols)).unwrap_or_default();
        for (col, ((g, v), d)) in gates.iter().zip(rest).zip(dm).enumerate() {
            let s = sigmoid(*g);
            forward.push(g * s * v);
            let grads = [d * v * s * (1.0 + g * (1.0 - s)), d * g * s];
            for (half, grad) in grads.into_iter().enumerate() {
                if let Some(place) = back.get_mut((2 * row + half) * cols + col) {
                    *place = grad;
                }
            }
        }
    }
    let m = check.poisoned(ty, rows, cols, cols)?;
    let shape = format!("{} {rows} x {cols} of {wide}", ty.name());
    let work = |passes: usize| if rows >= 500 { Work::Bytes((passes * rows * cols * ty.bytes()) as f64) } else { Work::None };
    check
        .case(format!("forward {shape}"), limit(ty), &[Expected { mat: m, values: forward }], work(3), &|gpu| gpu.swiglu(m, gate, value))?;
    let d = check.poisoned(ty, rows, 2 * cols, 2 * cols)?;
    let (dgate, dvalue) = (d.columns(0, cols)?, d.columns(cols, cols)?);
    let expected = [Expected { mat: d, values: back }];
    check.case(format!("backward {shape}"), limit(ty), &expected, work(5), &|gpu| gpu.swiglu_bwd(dgate, dvalue, dm, gate, value))?;
    let prepare = |check: &Check<'_>| {
        check.gpu.cast(dgate, gate)?;
        check.gpu.cast(dvalue, value)
    };
    check.case_after(format!("backward in place {shape}"), limit(ty), &expected, Work::None, &prepare, &|gpu| {
        gpu.swiglu_bwd(dgate, dvalue, dm, dgate, dvalue)
    })
}

/// `gated_residual` and its backward.
pub fn gate(check: &mut Check<'_>) -> Result<()> {
    for (samples, tokens, cols, stride) in [(1, 1, 8, 8), (2, 3, 100, 104), (3, 2, 33, 40), (2, 5, 6144, 6144), (1, 1536, 6144, 6144)] {
        for ty in [Ty::Bf16, Ty::F32] {
            let mark = check.arena.mark();
            gate_case(check, ty, [samples, tokens, cols, stride])?;
            check.arena.reset(mark)?;
        }
        let mark = check.arena.mark();
        stream_case(check, [samples, tokens, cols, stride])?;
        check.arena.reset(mark)?;
    }
    Ok(())
}

fn gate_case(check: &mut Check<'_>, ty: Ty, [samples, tokens, cols, stride]: [usize; 4]) -> Result<()> {
    let rows = samples * tokens;
    let (h, hs) = check.mat(ty, rows, cols, stride, &Check::random(1, rows * cols))?;
    let (o, os) = check.mat(ty, rows, cols, stride, &Check::random(2, rows * cols))?;
    let (modulation, ms) = check.random_mat(3, Ty::F32, samples, 3 * cols)?;
    let gate = modulation.columns(2 * cols, cols)?;
    let gate_of = |i: usize| ms.get(i / cols / tokens * 3 * cols + 2 * cols + i % cols).copied().unwrap_or(f64::NAN);
    let back: Vec<f64> = os.iter().enumerate().map(|(i, o)| gate_of(i) * o).collect();
    let forward: Vec<f64> = hs.iter().zip(&back).map(|(h, g)| h + g).collect();
    let y = check.poisoned(ty, rows, cols, stride)?;
    let shape = format!("{} {samples} x {tokens} x {cols} ({stride})", ty.name());
    let work = |passes: usize| if rows >= 500 { Work::Bytes((passes * rows * cols * ty.bytes()) as f64) } else { Work::None };
    let expected = |values: &Vec<f64>| [Expected { mat: y, values: values.clone() }];
    check.case(format!("forward {shape}"), limit(ty), &expected(&forward), work(3), &|gpu| gpu.gated_residual(y, h, gate, o))?;
    check.case(format!("backward {shape}"), limit(ty), &expected(&back), work(2), &|gpu| gpu.gated_residual_bwd(y, gate, o))?;
    let prepare = |check: &Check<'_>| check.gpu.cast(y, h);
    check.case_after(format!("in place {shape}"), limit(ty), &expected(&forward), Work::None, &prepare, &|gpu| {
        gpu.gated_residual(y, y, gate, o)
    })
}

/// `gated_stream`: the float32 stream and its copy; and with a residual the very bytes of `gated_residual`.
fn stream_case(check: &mut Check<'_>, [samples, tokens, cols, stride]: [usize; 4]) -> Result<()> {
    let rows = samples * tokens;
    let (h, hs) = check.mat(Ty::Bf16, rows, cols, stride, &Check::random(1, rows * cols))?;
    let (o, os) = check.mat(Ty::Bf16, rows, cols, stride, &Check::random(2, rows * cols))?;
    let (modulation, ms) = check.random_mat(3, Ty::F32, samples, 3 * cols)?;
    let (before, bs) = check.mat(Ty::F32, rows, cols, stride, &Check::random(4, rows * cols))?;
    let gate = modulation.columns(2 * cols, cols)?;
    let gated: Vec<f64> = os
        .iter()
        .enumerate()
        .map(|(i, o)| ms.get(i / cols / tokens * 3 * cols + 2 * cols + i % cols).copied().unwrap_or(f64::NAN) * o)
        .collect();
    let sum = |from: &[f64]| -> Vec<f64> { from.iter().zip(&gated).map(|(a, g)| a + g).collect() };
    let (y, stream) = (check.poisoned(Ty::Bf16, rows, cols, stride)?, check.poisoned(Ty::F32, rows, cols, stride)?);
    let shape = format!("{samples} x {tokens} x {cols} ({stride})");
    let prepare = |check: &Check<'_>| check.gpu.cast(stream, before);
    for (name, residual, copy, passes) in [("rounded", None, sum(&bs), 6), ("copy of h", Some(h), sum(&hs), 7)] {
        let run = |gpu: &Gpu| gpu.gated_stream(y, stream, residual, gate, o);
        let work = if rows >= 500 { Work::Bytes((passes * rows * cols * 2) as f64) } else { Work::None };
        let stream = [Expected { mat: stream, values: sum(&bs) }];
        check.case_after(format!("stream, {name} {shape}"), limit(Ty::F32), &stream, work, &prepare, &run)?;
        let y = [Expected { mat: y, values: copy }];
        check.case_after(format!("stream's copy, {name} {shape}"), limit(Ty::Bf16), &y, Work::None, &prepare, &run)?;
    }
    let plain = check.poisoned(Ty::Bf16, rows, cols, stride)?;
    check.gpu.gated_residual(plain, h, gate, o)?;
    let same = check.read(plain)? == check.read(y)?;
    check.holds(format!("stream, copy of h: as without a stream {shape}"), same);
    Ok(())
}

/// `linear_f32`: float32 rows with a weight of either type, few rows and many, written and added.
pub fn linear(check: &mut Check<'_>) -> Result<()> {
    let small = [(1, 5, 8, 8), (3, 33, 100, 104), (2, 17, 77, 77), (9, 64, 256, 256), (19, 24, 72, 72)];
    let large = [(1, 36_864, 6144, 6144), (2, 36_864, 6144, 6144), (8, 36_864, 6144, 6144), (1, 6144, 15_360, 15_360)];
    for (rows, outs, cols, stride) in small.into_iter().chain(large) {
        for ty in [Ty::Bf16, Ty::F32] {
            let mark = check.arena.mark();
            linear_case(check, ty, [rows, outs, cols, stride])?;
            check.arena.reset(mark)?;
        }
    }
    Ok(())
}

fn linear_case(check: &mut Check<'_>, ty: Ty, [rows, outs, cols, stride]: [usize; 4]) -> Result<()> {
    let (x, xs) = check.mat(Ty::F32, rows, cols, stride, &Check::random(1, rows * cols))?;
    let w = check.poisoned(ty, outs, cols, stride)?;
    check.gpu.fill_random(w, 2, 1.0)?;
    let out = check.poisoned(Ty::F32, rows, outs, outs)?;
    // Of a large product some columns are computed: the processor would take minutes for all.
    let step = (rows * outs * cols / 20_000_000).max(1);
    let mut sums = Vec::new();
    for column in (0..outs).step_by(step) {
        let row: Vec<f64> = check.read(w.rows(column, 1)?)?.into_iter().map(f64::from).collect();
        let dot = |x: &[f64]| x.iter().zip(&row).map(|(a, b)| a * b).sum::<f64>();
        sums.push((column, xs.chunks_exact(cols).map(dot).collect::<Vec<f64>>()));
    }
    let shape = format!("{} {rows} x {outs} x {cols} ({stride})", ty.name());
    let work = if step == 1 { Work::None } else { Work::Bytes((outs * cols * ty.bytes()) as f64) };
    let value = |row: usize, (_, sums): &(usize, Vec<f64>)| sums.get(row).copied().unwrap_or(f64::NAN);
    let values = (0..rows).flat_map(|row| sums.iter().map(move |column| value(row, column))).collect();
    let whole = if step == 1 { vec![Expected { mat: out, values }] } else { Vec::new() };
    check.case(format!("written {shape}"), limit(Ty::F32), &whole, work, &|gpu| gpu.linear_f32(out, x, w, false))?;
    let first = near(check, out, 1.0, &sums)?;
    check.holds(format!("values {shape}"), first);
    let bytes = check.read(out)?;
    check.gpu.linear_f32(out, x, w, false)?;
    check.holds(format!("again the same {shape}"), check.read(out)? == bytes);
    check.gpu.linear_f32(out, x, w, true)?;
    let added = near(check, out, 2.0, &sums)?;
    check.holds(format!("added {shape}"), added);
    Ok(())
}

/// Whether columns of `out` are `factor` times what is expected, as far as float32 goes.
fn near(check: &Check<'_>, out: Mat, factor: f64, columns: &[(usize, Vec<f64>)]) -> Result<bool> {
    let found = check.read(out)?;
    let all = || columns.iter().flat_map(|(_, c)| c.iter().map(|v| v * factor));
    let scale = (all().map(|v| v * v).sum::<f64>() / all().count().max(1) as f64).sqrt();
    let ours = columns.iter().flat_map(|(i, _)| found.chunks_exact(out.cols).map(|row| row.get(*i).copied().map_or(f64::NAN, f64::from)));
    Ok(ours.zip(all()).all(|(a, b)| (a - b).abs() <= limit(Ty::F32) * b.abs().max(scale)))
}

/// `add`, `axpy`, `cast` between all types; the count of bad values.
pub fn sums(check: &mut Check<'_>) -> Result<()> {
    for (rows, cols, stride) in [(1, 8, 8), (3, 100, 104), (5, 33, 35), (1024, 6144, 6144)] {
        for (to, from) in [(Ty::Bf16, Ty::Bf16), (Ty::Bf16, Ty::F32), (Ty::F32, Ty::Bf16), (Ty::F32, Ty::F32)] {
            let mark = check.arena.mark();
            let (a, av) = check.mat(to, rows, cols, stride, &Check::random(1, rows * cols))?;
            let (b, bv) = check.mat(from, rows, cols, stride, &Check::random(2, rows * cols))?;
            let out = check.poisoned(to, rows, cols, stride)?;
            let sum: Vec<f64> = av.iter().zip(&bv).map(|(a, b)| a - 0.375 * b).collect();
            // A cast has one right answer (from_f64 would lose the low bits that decide a near tie).
            let cast: Vec<f64> = bv.iter().map(|b| if to == Ty::Bf16 { bf16::from_f32(*b as f32).to_f64() } else { *b }).collect();
            let shape = format!("{} <- {} {rows} x {cols} ({stride})", to.name(), from.name());
            let work = |reads: usize| {
                let bytes = rows * cols * (to.bytes() * reads + from.bytes());
                if rows >= 500 { Work::Bytes(bytes as f64) } else { Work::None }
            };
            check.case(format!("cast {shape}"), 0.0, &[Expected { mat: out, values: cast }], work(1), &|gpu| gpu.cast(out, b))?;
            let expected = [Expected { mat: out, values: sum }];
            check.case(format!("add {shape}"), limit(to), &expected, work(2), &|gpu| gpu.add(out, a, b, -0.375))?;
            let prepare = |check: &Check<'_>| check.gpu.cast(out, a);
            check.case_after(format!("axpy {shape}"), limit(to), &expected, Work::None, &prepare, &|gpu| gpu.axpy(out, -0.375, b))?;
            check.arena.reset(mark)?;
        }
    }
    count_bad(check)
}

fn count_bad(check: &mut Check<'_>) -> Result<()> {
    for ty in [Ty::Bf16, Ty::F32] {
        let (rows, cols, stride) = (13, 1001, 1003);
        let mut values = Check::random(1, rows * cols);
        let bad = [0, 1, 500, 5000, rows * cols - 1];
        for (i, at) in bad.into_iter().enumerate() {
            if let Some(value) = values.get_mut(at) {
                *value = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].get(i % 3).copied().unwrap_or(f32::NAN);
            }
        }
        let (mat, _) = check.mat(ty, rows, cols, stride, &values)?;
        let count = check.arena.reserve(4)?;
        check.gpu.zero(count, 4)?;
        check.gpu.count_bad(count, mat)?;
        check.gpu.count_bad(count, mat)?;
        let mut bytes = [0u8; 4];
        check.gpu.download(&mut bytes, count)?;
        check.holds(format!("count of bad values, {}", ty.name()), u32::from_le_bytes(bytes) == 2 * bad.len() as u32);
    }
    Ok(())
}

/// Time embedding, silu, random values.
pub fn time(check: &mut Check<'_>) -> Result<()> {
    for (samples, channels) in [(1, 256), (5, 64), (3, 33)] {
        for ty in [Ty::Bf16, Ty::F32] {
            let mark = check.arena.mark();
            let half = channels / 2;
            let times: Vec<f32> = (0..samples).map(|i| [0.0, 1.0, 0.3333, 0.967_384, 4.0].get(i).copied().unwrap_or(0.5)).collect();
            let frequencies: Vec<f32> = (0..half).map(|j| (-(10_000.0f32.ln()) * j as f32 / half as f32).exp()).collect();
            let (values, _) = check.mat(Ty::F32, 1, samples, samples, &times)?;
            let (table, _) = check.mat(Ty::F32, 1, half, half, &frequencies)?;
            let mut expected = Vec::new();
            for time in &times {
                // The angle itself is float32, its functions are not.
                let angle = |w: &f32| f64::from(time * 1000.0 * w);
                expected.extend(frequencies.iter().map(|w| angle(w).cos()));
                expected.extend(frequencies.iter().map(|w| angle(w).sin()));
                expected.extend((0..channels % 2).map(|_| 0.0));
            }
            let out = check.poisoned(ty, samples, channels, channels)?;
            let name = format!("sinusoid {} {samples} x {channels}", ty.name());
            check.case(name, limit(ty), &[Expected { mat: out, values: expected }], Work::None, &|gpu| {
                gpu.sinusoid(out, values.ptr, table.ptr)
            })?;
            check.arena.reset(mark)?;
        }
    }
    for (rows, cols) in [(1, 6144), (3, 77)] {
        for ty in [Ty::Bf16, Ty::F32] {
            let (x, xs) = check.random_mat(7, ty, rows, cols)?;
            let y = check.poisoned(ty, rows, cols, cols)?;
            let values = xs.iter().map(|x| x * sigmoid(*x)).collect();
            let name = format!("silu {} {rows} x {cols}", ty.name());
            check.case(name, limit(ty), &[Expected { mat: y, values }], Work::None, &|gpu| gpu.silu(y, x))?;
        }
    }
    random_values(check)
}

fn random_values(check: &mut Check<'_>) -> Result<()> {
    let (rows, cols) = (64, 4096);
    let x = check.poisoned(Ty::F32, rows, cols, cols)?;
    let draw = |check: &Check<'_>, mat: Mat, seed: u64| {
        check.gpu.fill_random(mat, seed, 0.5)?;
        check.read(mat)
    };
    let (first, again, other) = (draw(check, x, 1)?, draw(check, x, 1)?, draw(check, x, 2)?);
    let count = first.len() as f64;
    let mean = first.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
    let square = first.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / count;
    let plain = first.iter().all(|v| v.is_finite() && v.abs() <= 0.5) && mean.abs() < 0.003 && (square - 1.0 / 12.0).abs() < 0.003;
    check.holds("random values: range, mean, variance", plain);
    check.holds("random values: same seed same bytes, other seed other", first == again && first != other);
    if first.len() == rows * cols { Ok(()) } else { Err(Error::invariant("random values were lost")) }
}
