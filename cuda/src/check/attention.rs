//! Attention, forward and backward, against a float64 softmax on the host; then its speed at the shapes of training.
//!
//! Two measures per case: the largest error of an element as everywhere, and the norm of the error over the norm of what is expected, which is what
//! tells a wrong term from rounding. For one token the gradients of queries and keys are zero; there the error is measured against the inputs.

use serenity_protocol::{Error, Result};

use super::{Check, Expected, Row, Work};
use crate::attention::{Attention, AttentionShape, Backend, Gradients, Inputs, RowStrides, WORKSPACE_MAX};
use crate::gpu::Gpu;
use crate::mat::{Mat, Ty};

/// (samples, heads, tokens, head size): lengths around the tiles' edges, every template, one token.
const SHAPES: [(usize, usize, usize, usize); 16] = [
    (1, 1, 1, 128),
    (2, 3, 1, 16),
    (1, 3, 7, 16),
    (2, 1, 7, 128),
    (1, 3, 64, 32),
    (1, 1, 64, 128),
    (2, 3, 65, 128),
    (1, 1, 65, 64),
    (1, 1, 128, 40),
    (1, 3, 129, 64),
    (2, 1, 129, 128),
    (1, 2, 257, 96),
    (1, 1, 576, 24),
    (2, 3, 576, 128),
    (1, 3, 1000, 128),
    (1, 1, 1000, 16),
];

/// The own kernels in bf16, also causal.
pub fn own(check: &mut Check<'_>) -> Result<()> {
    shapes(check, Ty::Bf16, Backend::Own, true)?;
    speed(check, Backend::Own)
}

/// cuDNN, with the own kernels as a second reference at full size.
pub fn cudnn(check: &mut Check<'_>) -> Result<()> {
    shapes(check, Ty::Bf16, Backend::Cudnn, false)?;
    grouped(check)?;
    against_own(check)?;
    speed(check, Backend::Cudnn)
}

/// The float32 kernels, also causal.
pub fn f32(check: &mut Check<'_>) -> Result<()> {
    shapes(check, Ty::F32, Backend::Own, true)
}

fn shapes(check: &mut Check<'_>, ty: Ty, backend: Backend, causal_too: bool) -> Result<()> {
    for (batch, heads, tokens, head_dim) in SHAPES {
        for causal in [false, true] {
            if causal && !causal_too {
                continue;
            }
            let mark = check.arena.mark();
            // Queries, keys and values as columns of one projection with more behind; the rest dense or with a gap.
            let (width, packed) = (heads * head_dim, 3 * heads * head_dim + 32);
            let rows = RowStrides { out: width + 8, dout: width, dv: width, ..RowStrides::all(packed) };
            let shape = AttentionShape { causal, rows, ..AttentionShape::dense(batch, heads, tokens, head_dim, ty) };
            case(check, shape, backend, WORKSPACE_MAX)?;
            check.arena.reset(mark)?;
        }
    }
    Ok(())
}

/// cuDNN's backward pass by groups of heads, at a length at which the groups' log-sum-exp are not aligned to 16 bytes too.
fn grouped(check: &mut Check<'_>) -> Result<()> {
    for tokens in [200, 333] {
        let mark = check.arena.mark();
        let shape = AttentionShape::dense(2, 6, tokens, 128, Ty::Bf16);
        // Room for the scores of two heads rounded up to tiles and for row sums, not for the scores of three.
        let workspace_max = 2 * 2 * 2 * tokens.next_multiple_of(128).pow(2) + (64 << 10);
        case(check, shape, Backend::Cudnn, workspace_max)?;
        check.arena.reset(mark)?;
    }
    Ok(())
}

/// Operands of a case.
#[derive(Clone, Copy)]
struct Operands {
    inputs: Inputs,
    out: Mat,
    lse: Mat,
    gradients: Gradients,
}

/// The host's copy of what attention reads, `[B tokens, H hd]` each.
struct Host {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    dout: Vec<f64>,
}

/// What should come out, in the layouts of the device.
struct Reference {
    out: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

/// Random inputs in their layouts, poisoned outputs.
fn operands(check: &Check<'_>, shape: &AttentionShape) -> Result<(Operands, Host)> {
    let (rows, width) = (shape.batch * shape.tokens, shape.heads * shape.head_dim);
    let input = |seed: u64, stride: usize| {
        let values: Vec<f32> = Check::random(seed, rows * width).iter().map(|v| v * 1.5).collect();
        check.mat(shape.ty, rows, width, stride, &values)
    };
    let output = |stride: usize| check.poisoned(shape.ty, rows, width, stride);
    let s = shape.rows;
    let ((q, host_q), (k, host_k), (v, host_v), (dout, host_dout)) = (input(1, s.q)?, input(2, s.k)?, input(3, s.v)?, input(4, s.dout)?);
    let lse = check.poisoned(Ty::F32, shape.batch * shape.heads, shape.tokens, shape.tokens)?;
    let gradients = Gradients { dout, dq: output(s.dq)?, dk: output(s.dk)?, dv: output(s.dv)? };
    let operands = Operands { inputs: Inputs { q, k, v }, out: output(s.out)?, lse, gradients };
    Ok((operands, Host { q: host_q, k: host_k, v: host_v, dout: host_dout }))
}

fn case(check: &mut Check<'_>, shape: AttentionShape, backend: Backend, workspace_max: usize) -> Result<()> {
    let attention = Attention::with_backend(check.gpu, shape, backend, workspace_max)?;
    let (o, host) = operands(check, &shape)?;
    let expected = reference(&shape, &host)?;
    let workspace = check.poisoned(Ty::F32, 1, attention.workspace_bytes().div_ceil(4), attention.workspace_bytes().div_ceil(4))?;
    let run = |gpu: &Gpu| -> Result<()> {
        attention.forward(gpu, o.inputs, o.out, o.lse, workspace.ptr)?;
        attention.backward(gpu, o.inputs, o.out, o.lse, o.gradients, workspace.ptr)
    };
    let flag = if shape.causal { " causal" } else { "" };
    let how = if matches!(backend, Backend::Cudnn) { format!(" ({})", attention.describe()) } else { String::new() };
    let name = format!("{} x {} heads x {} tokens x {}{flag}{how}", shape.batch, shape.heads, shape.tokens, shape.head_dim);
    let f32 = shape.ty == Ty::F32;
    // A single element can be the small difference of large terms, each rounded to bf16; the norm is the tight measure.
    let (element, norm) = if f32 { (1e-4, 1e-5) } else { (1e-1, 6e-3) };
    let results = [
        ("out", o.out, expected.out),
        ("lse", o.lse, expected.lse),
        ("dq", o.gradients.dq, expected.dq),
        ("dk", o.gradients.dk, expected.dk),
        ("dv", o.gradients.dv, expected.dv),
    ];
    // Exact zeros leave nothing to measure an element's error by; the norms below take the inputs' size instead.
    let comparable = results.iter().filter(|r| r.2.iter().any(|v| v.abs() > 1e-9));
    let outputs: Vec<Expected> = comparable.map(|(_, mat, values)| Expected { mat: *mat, values: values.clone() }).collect();
    check.case(&name, element, &outputs, Work::None, &run)?;
    for (what, mat, values) in &results {
        let got: Vec<f64> = check.read(*mat)?.iter().map(|v| f64::from(*v)).collect();
        let error = norm_error(&got, values);
        let ok = error <= norm;
        let row =
            Row { error: Some(error), limit: Some(norm), ok, problem: (!ok).then(|| "the norm of the error".to_string()), ..check.row("") };
        // Passing norms are many; the worst is told by the line of the elements.
        if !ok {
            check.push(Row { case: format!("{name}: {what}"), ..row });
        }
    }
    Ok(())
}

/// Norm of the difference over the norm of what is expected (at least a tenth per element: gradients that are exactly zero
/// come out as the rounding of terms of size one), NaN for lengths that differ.
fn norm_error(got: &[f64], expected: &[f64]) -> f64 {
    if got.len() != expected.len() {
        return f64::NAN;
    }
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let difference = square(&mut got.iter().zip(expected).map(|(g, e)| g - e));
    let floor = 1e-2 * expected.len() as f64;
    (difference / square(&mut expected.iter().copied()).max(floor)).sqrt()
}

/// All samples and heads, each on a thread.
fn reference(shape: &AttentionShape, host: &Host) -> Result<Reference> {
    let (tokens, width, hd) = (shape.tokens, shape.heads * shape.head_dim, shape.head_dim);
    let heads: Vec<(usize, usize)> = (0..shape.batch).flat_map(|b| (0..shape.heads).map(move |h| (b, h))).collect();
    let one = |(b, h): (usize, usize)| {
        let part = |values: &[f64]| -> Vec<f64> {
            values.chunks_exact(width).skip(b * tokens).take(tokens).flat_map(|row| row.iter().skip(h * hd).take(hd).copied()).collect()
        };
        head(shape, &part(&host.q), &part(&host.k), &part(&host.v), &part(&host.dout))
    };
    let results = std::thread::scope(|scope| {
        let threads: Vec<_> = heads.iter().map(|at| scope.spawn(move || one(*at))).collect();
        threads.into_iter().map(|t| t.join().map_err(|_| Error::invariant("a reference thread panicked"))).collect::<Result<Vec<_>>>()
    })?;
    // From one matrix per head to rows of tokens.
    let join = |of: fn(&Reference) -> &Vec<f64>| -> Vec<f64> {
        let samples = results.chunks(shape.heads.max(1));
        samples
            .flat_map(|heads| {
                (0..tokens)
                    .flat_map(move |t| heads.iter().flat_map(move |r| of(r).iter().skip(t * hd).take(hd).copied()))
                    .collect::<Vec<_>>()
            })
            .collect()
    };
    let lse = results.iter().flat_map(|r| r.lse.iter().copied()).collect();
    Ok(Reference { out: join(|r| &r.out), lse, dq: join(|r| &r.dq), dk: join(|r| &r.dk), dv: join(|r| &r.dv) })
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], factor: f64, from: &[f64]) {
    to.iter_mut().zip(from).for_each(|(t, f)| *t += factor * f);
}

/// One head: rows of `head_dim`.
fn head(shape: &AttentionShape, q: &[f64], k: &[f64], v: &[f64], dout: &[f64]) -> Reference {
    let (tokens, hd, scale) = (shape.tokens, shape.head_dim, f64::from(shape.scale()));
    let zeros = || vec![0.0; tokens * hd];
    let mut r = Reference { out: zeros(), lse: Vec::with_capacity(tokens), dq: zeros(), dk: zeros(), dv: zeros() };
    let rows = q.chunks_exact(hd).zip(dout.chunks_exact(hd)).zip(r.out.chunks_exact_mut(hd).zip(r.dq.chunks_exact_mut(hd)));
    for (i, ((query, gradient), (out, dq))) in rows.enumerate() {
        let seen = if shape.causal { i + 1 } else { tokens };
        let (keys, values) = (k.chunks_exact(hd).take(seen), v.chunks_exact(hd).take(seen));
        let scores: Vec<f64> = keys.clone().map(|key| dot(query, key) * scale).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = top + scores.iter().map(|s| (s - top).exp()).sum::<f64>().ln();
        r.lse.push(lse);
        let probabilities: Vec<f64> = scores.iter().map(|s| (s - lse).exp()).collect();
        probabilities.iter().zip(values.clone()).for_each(|(p, value)| add(out, *p, value));
        let delta = dot(gradient, out);
        let gradients = r.dk.chunks_exact_mut(hd).zip(r.dv.chunks_exact_mut(hd));
        for ((p, (key, value)), (dk, dv)) in probabilities.iter().zip(keys.zip(values)).zip(gradients) {
            let ds = p * (dot(gradient, value) - delta) * scale;
            add(dq, ds, key);
            add(dk, ds, query);
            add(dv, *p, gradient);
        }
    }
    r
}

/// Operands at full size, filled on the device.
fn large(check: &Check<'_>, shape: &AttentionShape) -> Result<Operands> {
    let (rows, width) = (shape.batch * shape.tokens, shape.heads * shape.head_dim);
    let mat = |seed: u64| -> Result<Mat> {
        let mat = check.arena.mat(shape.ty, rows, width)?;
        check.gpu.fill_random(mat, seed, 1.5)?;
        Ok(mat)
    };
    let lse = check.arena.mat(Ty::F32, shape.batch * shape.heads, shape.tokens)?;
    let gradients = Gradients { dout: mat(4)?, dq: mat(5)?, dk: mat(6)?, dv: mat(7)? };
    Ok(Operands { inputs: Inputs { q: mat(1)?, k: mat(2)?, v: mat(3)? }, out: mat(8)?, lse, gradients })
}

/// Both engines at the size of training at 512 px give the same up to rounding: what the small shapes cannot show.
fn against_own(check: &mut Check<'_>) -> Result<()> {
    let mark = check.arena.mark();
    let shape = AttentionShape::dense(1, 48, 1536, 128, Ty::Bf16);
    let o = large(check, &shape)?;
    let mut results: Vec<Vec<Vec<f32>>> = Vec::new();
    for backend in [Backend::Own, Backend::Cudnn] {
        let attention = Attention::with_backend(check.gpu, shape, backend, WORKSPACE_MAX)?;
        let workspace = check.arena.reserve(attention.workspace_bytes())?;
        attention.forward(check.gpu, o.inputs, o.out, o.lse, workspace)?;
        attention.backward(check.gpu, o.inputs, o.out, o.lse, o.gradients, workspace)?;
        let all = [o.out, o.lse, o.gradients.dq, o.gradients.dk, o.gradients.dv];
        results.push(all.iter().map(|mat| check.read(*mat)).collect::<Result<_>>()?);
    }
    if let [own, cudnn] = &results[..] {
        let wide = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect::<Vec<f64>>();
        for ((what, own), cudnn) in ["out", "lse", "dq", "dk", "dv"].iter().zip(own).zip(cudnn) {
            let (error, limit) = (norm_error(&wide(cudnn), &wide(own)), 8e-3);
            let row = check.row(format!("{what} of cuDNN and own kernels, 48 heads x 1536 tokens x 128"));
            check.push(Row { error: Some(error), limit: Some(limit), ok: error <= limit, ..row });
        }
    }
    check.arena.reset(mark)
}

/// Times at the lengths of 512, 768 and 1024 px with 512 text tokens, with the same bytes twice.
fn speed(check: &mut Check<'_>, backend: Backend) -> Result<()> {
    for tokens in [1536, 2816, 4608] {
        let mark = check.arena.mark();
        let shape = AttentionShape::dense(1, 48, tokens, 128, Ty::Bf16);
        let attention = Attention::with_backend(check.gpu, shape, backend, WORKSPACE_MAX)?;
        let o = large(check, &shape)?;
        let workspace = check.arena.reserve(attention.workspace_bytes())?;
        let forward = |gpu: &Gpu| attention.forward(gpu, o.inputs, o.out, o.lse, workspace);
        let backward = |gpu: &Gpu| attention.backward(gpu, o.inputs, o.out, o.lse, o.gradients, workspace);
        let name = format!("48 heads x {tokens} tokens x 128");
        timed(check, format!("forward {name}"), shape.flops(), &forward)?;
        timed(check, format!("backward {name} ({})", attention.describe()), 2.5 * shape.flops(), &backward)?;
        let bytes = |mat: Mat| -> Result<Vec<f32>> { check.read(mat) };
        let all = [o.out, o.lse, o.gradients.dq, o.gradients.dk, o.gradients.dv];
        let first = all.iter().map(|m| bytes(*m)).collect::<Result<Vec<_>>>()?;
        forward(check.gpu)?;
        backward(check.gpu)?;
        let second = all.iter().map(|m| check.read(*m)).collect::<Result<Vec<_>>>()?;
        let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
        check.holds(format!("{name}: two runs are equal"), first.iter().zip(&second).all(|(a, b)| same(a, b)));
        check.arena.reset(mark)?;
    }
    Ok(())
}

fn timed(check: &mut Check<'_>, case: String, flops: f64, run: &dyn Fn(&Gpu) -> Result<()>) -> Result<()> {
    let micros = check.median_micros(&Check::flush, run)?;
    let rate = Work::Flops(flops).rate(micros);
    check.push(Row { micros: Some(micros), rate, ..check.row(case) });
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    /// The reference's gradients against differences of its own forward pass.
    #[test]
    fn the_reference_differentiates_itself() {
        for causal in [false, true] {
            let shape = AttentionShape { causal, ..AttentionShape::dense(2, 2, 5, 8, Ty::F32) };
            let random = |seed| Check::random(seed, 2 * 5 * 16).iter().map(|v| f64::from(*v)).collect::<Vec<f64>>();
            let host = Host { q: random(1), k: random(2), v: random(3), dout: random(4) };
            let result = reference(&shape, &host).unwrap();
            let objective = |host: &Host| dot(&reference(&shape, host).unwrap().out, &host.dout);
            for at in [0, 17, 63, 80, 159] {
                for (gradient, of) in [(&result.dq, 0), (&result.dk, 1), (&result.dv, 2)] {
                    let moved = |by: f64| {
                        let mut moved = Host { q: host.q.clone(), k: host.k.clone(), v: host.v.clone(), dout: host.dout.clone() };
                        [&mut moved.q, &mut moved.k, &mut moved.v][of][at] += by;
                        objective(&moved)
                    };
                    let numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    assert!((numeric - gradient[at]).abs() < 1e-7, "{causal} {of} {at}: {numeric} {}", gradient[at]);
                }
            }
            assert_eq!(result.lse.len(), 2 * 2 * 5);
        }
    }

    #[test]
    fn the_norm_of_an_error_is_seen() {
        assert_eq!(norm_error(&[1.0, 2.0], &[1.0, 2.0]), 0.0);
        assert!((norm_error(&[0.0, 2.0], &[3.0, 2.0]) - 3.0 / 13f64.sqrt()).abs() < 1e-12);
        assert!(norm_error(&[1.0], &[1.0, 2.0]).is_nan());
        assert!(norm_error(&[1e-3, f64::NAN], &[0.0, 0.0]).is_nan());
        assert!((norm_error(&[1e-3, 0.0], &[0.0, 0.0]) - 1e-3 / 2e-2f64.sqrt()).abs() < 1e-12);
    }
}
