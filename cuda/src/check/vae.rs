//! The VAE's operations: norms over strips, softmax, convolutions of every geometry, whole and in strips.

use serenity_protocol::Result;

use super::{Check, Expected, Work, limit};
use crate::driver::Ptr;
use crate::gpu::Gpu;
use crate::mat::{Mat, Ty};
use crate::ops::conv::{Conv, Scratch};
use crate::ops::vae::{Norm, NormTable, Patches, Strip};

const EPS: f64 = 1e-6;

fn at(values: &[f64], index: usize) -> f64 {
    values.get(index).copied().unwrap_or(f64::NAN)
}

/// A batch of images on the device, and its values.
struct Images {
    strip: Strip,
    values: Vec<f64>,
}

fn images(check: &Check<'_>, seed: u64, [batch, height, width, channels]: [usize; 4]) -> Result<Images> {
    // Away from zero, as a norm has to bear it.
    let input: Vec<f32> = Check::random(seed, batch * height * width * channels).iter().map(|x| x + 3.0).collect();
    let (mat, values) = check.mat(Ty::F32, batch * height * width, channels, channels, &input)?;
    Ok(Images { strip: Strip { mat, batch, rows: height, width, first: 0, height }, values })
}

/// A group norm of images: its table on the device, and the values normalised and activated.
fn normalised(check: &Check<'_>, x: &Images, groups: usize, silu: bool) -> Result<(Norm, Vec<f64>)> {
    let Strip { batch, height, width, .. } = x.strip;
    let channels = x.strip.channels();
    let (weight, w) = check.random_mat(11, Ty::F32, 1, channels)?;
    let (bias, b) = check.random_mat(12, Ty::F32, 1, channels)?;
    let sums = check.arena.reserve(batch * height * groups * 16)?;
    let table = check.arena.reserve(batch * channels * 12)?;
    check.gpu.vae_finish(x.strip, [Ptr::NULL; 2], Some((sums, groups)))?;
    let shape = NormTable { table, sums, weight: weight.ptr, bias: bias.ptr, batch, height, width, groups, channels, eps: EPS };
    check.gpu.vae_norm_table(&shape)?;
    let (pixels, per) = (height * width, channels / groups);
    let mut out = vec![0.0; x.values.len()];
    for image in 0..batch {
        for group in 0..groups {
            let index = |p: usize, c: usize| (image * pixels + p) * channels + group * per + c;
            let all = || (0..pixels).flat_map(|p| (0..per).map(move |c| index(p, c)));
            let count = (pixels * per) as f64;
            let mean = all().map(|i| at(&x.values, i)).sum::<f64>() / count;
            let variance = all().map(|i| (at(&x.values, i) - mean).powi(2)).sum::<f64>() / count;
            for i in all() {
                let n = (at(&x.values, i) - mean) / (variance + EPS).sqrt() * at(&w, i % channels) + at(&b, i % channels);
                if let Some(place) = out.get_mut(i) {
                    *place = if silu { n / (1.0 + (-n).exp()) } else { n };
                }
            }
        }
    }
    Ok((Norm { table, silu }, out))
}

/// Biases, sums, tables, normalised values, softmax.
pub fn operations(check: &mut Check<'_>) -> Result<()> {
    for (shape, groups) in [([1, 5, 7, 32], 32), ([2, 3, 4, 96], 32), ([3, 6, 10, 128], 32), ([1, 4, 33, 1024], 8), ([2, 64, 64, 256], 32)]
    {
        let mark = check.arena.mark();
        let [batch, height, width, channels] = shape;
        let x = images(check, 1, shape)?;
        for silu in [false, true] {
            let (norm, values) = normalised(check, &x, groups, silu)?;
            let mat = check.poisoned(Ty::F32, batch * height * width, channels, channels)?;
            let p = Patches { taps: [1, 1], stride: 1, up: false, pad_left: 0, top: 0, rows: height, start: 0, width };
            let name = format!("norm {shape:?} of {groups} groups, silu {silu}");
            check.case(name, 2.0 * limit(Ty::F32), &[Expected { mat, values }], Work::None, &|gpu| {
                gpu.vae_patches(mat, x.strip, Some(norm), p)
            })?;
        }
        let (one, ones) = check.random_mat(21, Ty::F32, 1, channels)?;
        let (two, twos) = check.random_mat(22, Ty::F32, 1, channels)?;
        let mat = check.poisoned(Ty::F32, batch * height * width, channels, channels)?;
        let values = x.values.iter().enumerate().map(|(i, v)| v + at(&ones, i % channels) + at(&twos, i % channels)).collect();
        let prepare = |check: &Check<'_>| check.gpu.cast(mat, x.strip.mat);
        check.case_after(format!("biases {shape:?}"), limit(Ty::F32), &[Expected { mat, values }], Work::None, &prepare, &|gpu| {
            gpu.vae_finish(Strip { mat, ..x.strip }, [one.ptr, two.ptr], None)
        })?;
        check.arena.reset(mark)?;
    }
    let bytes: Vec<u8> = (0..=255).cycle().take(1000).collect();
    let from = check.arena.reserve(bytes.len())?;
    check.gpu.upload(from, &bytes)?;
    let mat = check.poisoned(Ty::F32, 10, 100, 100)?;
    let values = bytes.iter().map(|b| f64::from(f32::from(*b) / 127.5 - 1.0)).collect();
    check.case("pixels, bit for bit", 0.0, &[Expected { mat, values }], Work::None, &|gpu| gpu.vae_pixels(mat, from))?;
    for (rows, cols) in [(3, 5), (7, 256), (2, 4096), (1, 16_384), (5, 1001)] {
        let (from, values) = check.random_mat(31, Ty::F32, rows, cols)?;
        let mat = check.poisoned(Ty::F32, rows, cols, cols)?;
        let values = values.chunks(cols).flat_map(|row| {
            let sum: f64 = row.iter().map(|v| v.exp()).sum();
            row.iter().map(move |v| v.exp() / sum)
        });
        let prepare = |check: &Check<'_>| check.gpu.cast(mat, from);
        let expected = [Expected { mat, values: values.collect() }];
        check.case_after(format!("softmax {rows} x {cols}"), limit(Ty::F32), &expected, Work::None, &prepare, &|gpu| {
            gpu.softmax_rows(mat)
        })?;
    }
    Ok(())
}

/// A convolution of NHWC values as loops; `weight` is `[output, ky, kx, input]`.
fn reference(x: &[f64], [batch, height, width, input]: [usize; 4], weight: &[f64], output: usize, conv: &Conv) -> Vec<f64> {
    let (pad, up) = (if conv.taps == 3 && conv.stride == 1 { 1 } else { 0 }, usize::from(conv.up));
    let (high, wide) = ((height << up) / conv.stride, (width << up) / conv.stride);
    let mut out = Vec::with_capacity(batch * high * wide * output);
    for index in 0..batch * high * wide {
        let (image, oy, ox) = (index / (high * wide), index / wide % high, index % wide);
        let mut sums = vec![0.0; output];
        for tap in 0..conv.taps * conv.taps {
            let (u, v) = (oy * conv.stride + tap / conv.taps, ox * conv.stride + tap % conv.taps);
            let (Some(u), Some(v)) = (u.checked_sub(pad), v.checked_sub(pad)) else { continue };
            if u >= height << up || v >= width << up {
                continue;
            }
            let from = ((image * height + (u >> up)) * width + (v >> up)) * input;
            for (o, sum) in sums.iter_mut().enumerate() {
                let weights = (o * conv.taps * conv.taps + tap) * input;
                *sum += (0..input).map(|c| at(x, from + c) * at(weight, weights + c)).sum::<f64>();
            }
        }
        out.extend(sums);
    }
    out
}

/// The rows of `x` that rows `first..first + rows` of the output need.
fn window(x: Strip, conv: &Conv, first: usize, rows: usize) -> Result<Strip> {
    let pad = if conv.taps == 3 && conv.stride == 1 { 1 } else { 0 };
    let up = usize::from(conv.up);
    let start = (first * conv.stride).saturating_sub(pad) >> up;
    let end = ((first + rows - 1) * conv.stride + conv.taps - pad).div_ceil(1 << up).min(x.height);
    Ok(Strip { mat: x.mat.rows(start * x.width, (end - start) * x.width)?, rows: end - start, first: start, ..x })
}

/// Batch, height, width, input and output channels, taps, stride, enlarged.
type Geometry = ([usize; 5], usize, usize, bool);

const GEOMETRIES: [Geometry; 9] = [
    ([1, 6, 10, 3, 32], 3, 1, false),
    ([2, 8, 6, 32, 5], 3, 1, false),
    ([3, 8, 12, 20, 24], 3, 2, false),
    ([2, 5, 7, 16, 8], 3, 1, true),
    ([2, 9, 4, 33, 64], 1, 1, false),
    ([2, 64, 80, 16, 32], 3, 1, false),
    ([2, 32, 40, 32, 16], 3, 1, true),
    ([1, 72, 64, 32, 3], 3, 1, false),
    ([1, 10, 8, 512, 512], 3, 1, false),
];

/// Convolutions as whole images and strip by strip, with little scratch memory and with much, plain, normalised, added to what is there.
pub fn convolutions(check: &mut Check<'_>) -> Result<()> {
    for geometry in GEOMETRIES {
        let mark = check.arena.mark();
        convolution(check, geometry)?;
        check.arena.reset(mark)?;
    }
    speed(check)
}

fn convolution(check: &mut Check<'_>, ([batch, height, width, input, output], taps, stride, up): Geometry) -> Result<()> {
    let shape = [batch, height, width, input];
    let x = images(check, 1, shape)?;
    let (weight, w) =
        check.mat(Ty::F32, output, taps * taps * input, Conv::stride_of(taps, input), &Check::random(2, output * taps * taps * input))?;
    let conv = Conv { weight, taps, stride, up };
    let (high, wide) = ((height << usize::from(up)) / stride, (width << usize::from(up)) / stride);
    let mat = check.poisoned(Ty::F32, batch * high * wide, output, output)?;
    let out = Strip { mat, batch, rows: high, width: wide, first: 0, height: high };
    let name = format!("{batch} x {height} x {width} x {input} to {output}, {taps} taps, stride {stride}, up {up}");
    let values = reference(&x.values, shape, &w, output, &conv);
    let most = 64 << 20;
    let memory = check.arena.reserve(most)?;
    for bytes in [2 * Conv::scratch_min(taps, input, wide), most] {
        let scratch = Scratch { ptr: memory, bytes };
        let run = |gpu: &Gpu| gpu.convolve(out, x.strip, &conv, None, false, scratch);
        check.case(format!("{name}, {} KiB", bytes >> 10), 2e-5, &[Expected { mat, values: values.clone() }], Work::None, &run)?;
    }
    let scratch = Scratch { ptr: memory, bytes: most };
    if taps == 3 {
        let groups = if input % 8 == 0 { 8 } else { 1 };
        let (norm, normed) = normalised(check, &x, groups, true)?;
        let (start, starts) = check.random_mat(3, Ty::F32, mat.rows, output)?;
        let values = reference(&normed, shape, &w, output, &conv).iter().zip(&starts).map(|(a, b)| a + b).collect();
        let prepare = |check: &Check<'_>| check.gpu.cast(mat, start);
        check.case_after(format!("{name}, normed, added"), 4e-5, &[Expected { mat, values }], Work::None, &prepare, &|gpu| {
            gpu.convolve(out, x.strip, &conv, Some(norm), true, scratch)
        })?;
    }
    if batch == 1 {
        let run = |gpu: &Gpu| {
            for first in (0..high).step_by(3) {
                let rows = 3.min(high - first);
                let part = Strip { mat: mat.rows(first * wide, rows * wide)?, rows, first, ..out };
                gpu.convolve(part, window(x.strip, &conv, first, rows)?, &conv, None, false, scratch)?;
            }
            Ok(())
        };
        check.case(format!("{name}, in strips"), 2e-5, &[Expected { mat, values }], Work::None, &run)?;
    }
    Ok(())
}

type Run<'a> = &'a dyn Fn(&Gpu) -> Result<()>;

/// The rates of the convolutions that an image of 512 px spends its time in.
fn speed(check: &mut Check<'_>) -> Result<()> {
    for (side, channels) in [(512, 128), (256, 256), (128, 512), (64, 512)] {
        let mark = check.arena.mark();
        let mat = |cols: usize, rows: usize| -> Result<Mat> {
            let mat = check.arena.mat(Ty::F32, rows, cols)?;
            check.gpu.fill(mat, 0).map(|()| mat)
        };
        let (x, y, weight) = (mat(channels, side * side)?, mat(channels, side * side)?, mat(9 * channels, channels)?);
        let strip = |mat: Mat| Strip { mat, batch: 1, rows: side, width: side, first: 0, height: side };
        let conv = Conv { weight, taps: 3, stride: 1, up: false };
        let bytes = Conv::scratch_for(3, 1, channels, [1, side, side]);
        let scratch = Scratch { ptr: check.arena.reserve(bytes)?, bytes };
        let groups = 32;
        let (sums, table) = (check.arena.reserve(side * groups * 16)?, check.arena.reserve(12 * channels)?);
        check.gpu.upload_f32(table, &vec![1.0; 3 * channels])?;
        let norm = Norm { table, silu: true };
        let flops = Work::Flops(18.0 * (channels * channels * side * side) as f64);
        let bytes = (4 * channels * side * side) as f64;
        let size = format!("{side} x {side} x {channels}");
        let triples = Mat::new(scratch.ptr, Ty::F32, side * side, 3 * channels);
        let p = Patches { taps: [1, 3], stride: 1, up: false, pad_left: 1, top: 0, rows: side, start: 0, width: side };
        let convolve = |gpu: &Gpu| gpu.convolve(strip(y), strip(x), &conv, Some(norm), false, scratch);
        let copy = |gpu: &Gpu| gpu.vae_patches(triples, strip(x), Some(norm), p);
        let finish = |gpu: &Gpu| gpu.vae_finish(strip(y), [table, Ptr::NULL], Some((sums, groups)));
        let timed: [(&str, Work, Run<'_>); 3] = [
            ("3 x 3 with its norm", flops, &convolve),
            ("of it the copies", Work::Bytes(4.0 * bytes), &copy),
            ("bias and sums", Work::Bytes(2.0 * bytes), &finish),
        ];
        for (what, work, run) in timed {
            let micros = check.median_micros(&|c| c.flush(), run)?;
            check.push(super::Row { micros: Some(micros), rate: work.rate(micros), ..check.row(format!("{size}, {what}")) });
        }
        check.arena.reset(mark)?;
    }
    Ok(())
}
