//! RMSNorm with rotation between projections and attention, forward and backward, in both layouts of the attention.

use serenity_protocol::Result;

use super::{Check, Expected, Work, limit};
use crate::driver::Ptr;
use crate::mat::{Mat, Ty};
use crate::ops::rows::{HeadNorm, HeadStrides, JointHeads, PackedHeads};

/// One shape: a stream of `tokens` at `first` of a joint sequence of `joint` tokens.
#[derive(Clone, Copy)]
struct Shape {
    samples: usize,
    tokens: usize,
    first: usize,
    joint: usize,
    heads: usize,
    head_dim: usize,
}

/// The host's copy of the inputs.
struct Host {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    weight_q: Vec<f64>,
    weight_k: Vec<f64>,
    cos: Vec<f64>,
    sin: Vec<f64>,
}

/// All shapes, in both types and both layouts.
pub fn heads(check: &mut Check<'_>) -> Result<()> {
    let shape = |samples, tokens, first, joint, heads, head_dim| Shape { samples, tokens, first, joint, heads, head_dim };
    let shapes = [
        shape(1, 1, 0, 1, 1, 16),
        shape(2, 5, 0, 12, 3, 32),
        shape(2, 7, 5, 12, 3, 32),
        shape(1, 3, 2, 9, 5, 48),
        shape(3, 4, 1, 6, 2, 64),
        shape(1, 5, 0, 5, 2, 10),
        shape(2, 3, 4, 7, 4, 128),
        shape(1, 2, 0, 3, 2, 256),
        shape(1, 768, 0, 768, 48, 128),
    ];
    for shape in shapes {
        for ty in [Ty::Bf16, Ty::F32] {
            for head_major in [true, false] {
                let mark = check.arena.mark();
                heads_case(check, ty, shape, head_major)?;
                check.arena.reset(mark)?;
            }
        }
    }
    Ok(())
}

fn heads_case(check: &mut Check<'_>, ty: Ty, s: Shape, head_major: bool) -> Result<()> {
    let (rows, d, hd, half) = (s.samples * s.tokens, s.heads * s.head_dim, s.head_dim, s.head_dim / 2);
    // A packed projection with something behind the values, as single blocks have it.
    let (packed, values) = check.random_mat(1, ty, rows, 3 * d + hd)?;
    let part = |index: usize| packed.columns(index * d, d);
    let host_part =
        |index: usize| values.chunks_exact(3 * d + hd).flat_map(|r| r.iter().skip(index * d).take(d).copied()).collect::<Vec<f64>>();
    let vector = |seed: u64, len: usize| check.random_mat(seed, Ty::F32, 1, len);
    let ((weight_q, wq), (weight_k, wk)) = (vector(2, hd)?, vector(3, hd)?);
    let angles = Check::random(4, s.joint * half);
    let table = |f: fn(f32) -> f32| {
        let values: Vec<f32> = angles.iter().map(|a| f(a * 40.0)).collect();
        check.mat(Ty::F32, s.joint, half, half, &values)
    };
    let ((cos, cosines), (sin, sines)) = (table(f32::cos)?, table(f32::sin)?);
    let host = Host { q: host_part(0), k: host_part(1), v: host_part(2), weight_q: wq, weight_k: wk, cos: cosines, sin: sines };
    let strides = if head_major { HeadStrides::head_major(s.joint, s.heads, hd) } else { HeadStrides::token_major(s.joint, s.heads, hd) };
    let norm = HeadNorm {
        samples: s.samples,
        heads: s.heads,
        head_dim: hd,
        first_token: s.first,
        weight_q: weight_q.ptr,
        weight_k: weight_k.ptr,
        cos,
        sin,
        eps: 1e-6,
    };
    let from = PackedHeads { q: part(0)?, k: part(1)?, v: part(2)? };
    let name = format!(
        "{} {}x{}+{}/{} h{} d{hd} {}",
        ty.name(),
        s.samples,
        s.tokens,
        s.first,
        s.joint,
        s.heads,
        if head_major { "BHTd" } else { "BTHd" }
    );
    let work = |passes: usize| if rows >= 500 { Work::Bytes((passes * rows * d * ty.bytes()) as f64) } else { Work::None };
    forward(check, &name, ty, s, strides, &host, from, &norm, work(6))?;
    backward(check, &name, ty, s, strides, &host, from, &norm, work(8))
}

#[allow(clippy::too_many_arguments)] // one case, cut in two for length
fn forward(
    check: &mut Check<'_>,
    name: &str,
    ty: Ty,
    s: Shape,
    strides: HeadStrides,
    host: &Host,
    from: PackedHeads,
    norm: &HeadNorm,
    work: Work,
) -> Result<()> {
    let total = s.samples * s.joint * s.heads * s.head_dim;
    // Tokens of the joint sequence that are not this stream's must stay as they are: as zeros here.
    let joint = |check: &Check<'_>| check.poisoned(ty, 1, total, total);
    let (q, k, v) = (joint(check)?, joint(check)?, joint(check)?);
    let expected = |mat: Mat, x: &[f64], weight: Option<&[f64]>| {
        let mut values = vec![0.0; total];
        visit(s, strides, |row, table, at, head| {
            let x = slice(x, row * s.heads * s.head_dim + head * s.head_dim, s.head_dim);
            let y = weight.map_or_else(|| x.to_vec(), |w| rotate(x, w, row_of(&host.cos, table, s), row_of(&host.sin, table, s)));
            put(&mut values, at, &y);
        });
        Expected { mat, values }
    };
    let outputs = [expected(q, &host.q, Some(&host.weight_q)), expected(k, &host.k, Some(&host.weight_k)), expected(v, &host.v, None)];
    let prepare = |check: &Check<'_>| [q, k, v].into_iter().try_for_each(|m| check.gpu.fill(m, 0));
    let to = JointHeads { q: q.ptr, k: k.ptr, v: v.ptr, strides };
    check.case_after(format!("forward {name}"), limit(ty), &outputs, work, &prepare, &|gpu| gpu.qk_norm_rope(to, from, norm))?;
    // The memory for values is not written where they stay.
    let outputs = [
        expected(q, &host.q, Some(&host.weight_q)),
        expected(k, &host.k, Some(&host.weight_k)),
        Expected { mat: v, values: vec![0.0; total] },
    ];
    let to = JointHeads { v: Ptr::NULL, ..to };
    check.case_after(format!("forward, values stay, {name}"), limit(ty), &outputs, work, &prepare, &|gpu| gpu.qk_norm_rope(to, from, norm))
}

#[allow(clippy::too_many_arguments)] // as above
fn backward(
    check: &mut Check<'_>,
    name: &str,
    ty: Ty,
    s: Shape,
    strides: HeadStrides,
    host: &Host,
    from: PackedHeads,
    norm: &HeadNorm,
    work: Work,
) -> Result<()> {
    let (rows, d) = (s.samples * s.tokens, s.heads * s.head_dim);
    let total = s.samples * s.joint * d;
    let mut grads = Vec::new();
    for seed in 10..13 {
        grads.push(check.random_mat(seed, ty, 1, total)?);
    }
    let [(dq, dqs), (dk, dks), (dv, dvs)] = grads.as_slice() else { return Ok(()) };
    // Into columns of a packed gradient, as single blocks want it.
    let packed = check.poisoned(ty, rows, 3 * d, 3 * d)?;
    let mut values = vec![0.0; rows * 3 * d];
    visit(s, strides, |row, table, at, head| {
        let parts = [(&host.q, dqs, Some(&host.weight_q)), (&host.k, dks, Some(&host.weight_k)), (&host.v, dvs, None)];
        for (index, (x, dy, weight)) in parts.into_iter().enumerate() {
            let (x, dy) = (slice(x, row * d + head * s.head_dim, s.head_dim), slice(dy, at, s.head_dim));
            let (cos, sin) = (row_of(&host.cos, table, s), row_of(&host.sin, table, s));
            let dx = weight.map_or_else(|| dy.to_vec(), |w| rotate_back(x, w, cos, sin, dy));
            put(&mut values, row * 3 * d + index * d + head * s.head_dim, &dx);
        }
    });
    let to = PackedHeads { q: packed.columns(0, d)?, k: packed.columns(d, d)?, v: packed.columns(2 * d, d)? };
    let joint = JointHeads { q: dq.ptr, k: dk.ptr, v: dv.ptr, strides };
    check.case(format!("backward {name}"), limit(ty), &[Expected { mat: packed, values }], work, &|gpu| {
        gpu.qk_norm_rope_bwd(to, joint, from, norm)
    })
}

/// Calls `f(row of the packed side, row of the tables, first element on the attention's side, head)` for every head of every token.
fn visit(s: Shape, strides: HeadStrides, mut f: impl FnMut(usize, usize, usize, usize)) {
    for sample in 0..s.samples {
        for token in 0..s.tokens {
            for head in 0..s.heads {
                let joint = token + s.first;
                let at = sample * strides.sample + joint * strides.token + head * strides.head;
                f(sample * s.tokens + token, joint, at, head);
            }
        }
    }
}

fn slice(values: &[f64], at: usize, len: usize) -> &[f64] {
    values.get(at..at + len).unwrap_or_default()
}

fn row_of(table: &[f64], row: usize, s: Shape) -> &[f64] {
    slice(table, row * (s.head_dim / 2), s.head_dim / 2)
}

fn put(values: &mut [f64], at: usize, from: &[f64]) {
    values.iter_mut().skip(at).zip(from).for_each(|(v, f)| *v = *f);
}

fn reciprocal_rms(x: &[f64]) -> f64 {
    1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + 1e-6).sqrt()
}

fn rotate(x: &[f64], weight: &[f64], cos: &[f64], sin: &[f64]) -> Vec<f64> {
    let r = reciprocal_rms(x);
    let normed: Vec<f64> = x.iter().zip(weight).map(|(x, w)| x * r * w).collect();
    let pairs = normed.chunks_exact(2).zip(cos.iter().zip(sin));
    pairs.flat_map(|(p, (c, s))| if let [a, b] = p { [a * c - b * s, b * c + a * s] } else { [f64::NAN; 2] }).collect()
}

fn rotate_back(x: &[f64], weight: &[f64], cos: &[f64], sin: &[f64], dy: &[f64]) -> Vec<f64> {
    let r = reciprocal_rms(x);
    let pairs = dy.chunks_exact(2).zip(cos.iter().zip(sin));
    let turned = pairs.flat_map(|(p, (c, s))| if let [a, b] = p { [a * c + b * s, b * c - a * s] } else { [f64::NAN; 2] });
    let g: Vec<f64> = turned.zip(weight).map(|(t, w)| t * w).collect();
    let mean = g.iter().zip(x).map(|(g, x)| g * x).sum::<f64>() / x.len() as f64;
    g.iter().zip(x).map(|(g, x)| r * (g - r * r * x * mean)).collect()
}
