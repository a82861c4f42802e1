//! Matrix products: all three, both input types, both output types, views, beta.

use serenity_protocol::Result;

use super::{Check, Expected, Work};
use crate::gpu::Gpu;
use crate::mat::{Mat, Ty};

/// Which product: whether a and b are stored transposed to what is multiplied.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Nt,
    Nn,
    Tn,
}

/// m, n, k and how many elements rows are further apart than they are long.
const SHAPES: [[usize; 4]; 9] = [
    [1, 1, 1, 0],
    [1, 64, 16, 0],
    [5, 7, 3, 1],
    [33, 16, 129, 8],
    [16, 96, 77, 24],
    [130, 16, 512, 0],
    [257, 129, 1000, 0],
    [64, 16, 6144, 64],
    [16, 1024, 1536, 0],
];

/// All kinds, types and shapes.
pub fn gemm(check: &mut Check<'_>) -> Result<()> {
    for kind in [Kind::Nt, Kind::Nn, Kind::Tn] {
        for [m, n, k, gap] in SHAPES {
            for (input, output) in [(Ty::Bf16, Ty::Bf16), (Ty::Bf16, Ty::F32), (Ty::F32, Ty::F32)] {
                let mark = check.arena.mark();
                gemm_case(check, kind, [m, n, k, gap], input, output)?;
                check.arena.reset(mark)?;
            }
        }
    }
    Ok(())
}

fn product(gpu: &Gpu, kind: Kind, out: Mat, a: Mat, b: Mat, alpha: f32, beta: f32) -> Result<()> {
    match kind {
        Kind::Nt => gpu.gemm_nt(out, a, b, alpha, beta),
        Kind::Nn => gpu.gemm_nn(out, a, b, alpha, beta),
        Kind::Tn => gpu.gemm_tn(out, a, b, alpha, beta),
    }
}

fn gemm_case(check: &mut Check<'_>, kind: Kind, [m, n, k, gap]: [usize; 4], input: Ty, output: Ty) -> Result<()> {
    let (a_shape, b_shape) = match kind {
        Kind::Nt => ((m, k), (n, k)),
        Kind::Nn => ((m, k), (k, n)),
        Kind::Tn => ((k, m), (k, n)),
    };
    let random = |seed: u64, (rows, cols): (usize, usize)| check.mat(input, rows, cols, cols + gap, &Check::random(seed, rows * cols));
    let ((a, av), (b, bv)) = (random(1, a_shape)?, random(2, b_shape)?);
    let at_a = |i: usize, t: usize| if matches!(kind, Kind::Tn) { t * m + i } else { i * k + t };
    let at_b = |j: usize, t: usize| if matches!(kind, Kind::Nt) { j * k + t } else { t * n + j };
    let get = |v: &[f64], at: usize| v.get(at).copied().unwrap_or(f64::NAN);
    let dot = |i: usize, j: usize| (0..k).map(|t| get(&av, at_a(i, t)) * get(&bv, at_b(j, t))).sum::<f64>();
    let values: Vec<f64> = (0..m * n).map(|e| dot(e / n, e % n)).collect();
    let out = check.poisoned(output, m, n, n + gap)?;
    // Of a float32 sum of k products; TF32 would be off by 3e-4.
    let limit = if output == Ty::Bf16 { 4.2e-3 } else { 2e-5 };
    let name = format!("{kind:?} {} -> {} m{m} n{n} k{k} +{gap}", input.name(), output.name());
    check.case(name.as_str(), limit, &[Expected { mat: out, values: values.clone() }], Work::None, &|gpu| {
        product(gpu, kind, out, a, b, 1.0, 0.0)
    })?;
    let (start, starts) = check.mat(output, m, n, n + gap, &Check::random(3, m * n))?;
    let values = values.iter().zip(&starts).map(|(v, s)| 0.25 * v + s).collect();
    let prepare = |check: &Check<'_>| check.gpu.cast(out, start);
    // cuBLASLt may round the product before it adds what was there: two roundings.
    check.case_after(format!("{name} beta 1"), 2.0 * limit, &[Expected { mat: out, values }], Work::None, &prepare, &|gpu| {
        product(gpu, kind, out, a, b, 0.25, 1.0)
    })
}

/// Products that were made in pieces: rows or columns of the result, by the algorithm for all of it. m, n, k; then the piece's columns and rows.
const CUTS: [([usize; 3], usize, usize); 7] = [
    // FLUX.2 [dev]: the packed projection, its input gradient with an adapter's columns behind it, `to_out`, its input gradient with an adapter's
    // rows below it; at 512 and 1024 px.
    ([1536, 55_296, 6160], 27_648, 1536),
    ([1536, 6160, 55_296], 3072, 1536),
    ([1536, 6144, 24_592], 3072, 700),
    ([1536, 24_576, 6160], 12_288, 700),
    ([4608, 6160, 55_296], 3072, 4608),
    ([512, 18_432, 6144], 9216, 100),
    ([130, 1000, 512], 256, 1),
];

/// `gemm_nt_of` and `gemm_nn_of`: pieces of a result are the whole one bit for bit.
pub fn pieces(check: &mut Check<'_>) -> Result<()> {
    for ([m, n, k], cols, rows) in CUTS {
        for kind in [Kind::Nt, Kind::Nn] {
            for ty in [Ty::Bf16, Ty::F32] {
                if ty == Ty::F32 && m * n * k > 1 << 32 {
                    continue;
                }
                let mark = check.arena.mark();
                let equal = cut_case(check, kind, ty, [m, n, k], (cols, rows))?;
                check.holds(format!("{kind:?} {} {m} x {n} x {k} by {cols} columns and {rows} rows", ty.name()), equal);
                check.arena.reset(mark)?;
            }
        }
    }
    Ok(())
}

fn cut_case(check: &Check<'_>, kind: Kind, ty: Ty, [m, n, k]: [usize; 3], (cols, rows): (usize, usize)) -> Result<bool> {
    let (gpu, nt) = (check.gpu, matches!(kind, Kind::Nt));
    let a = check.arena.mat(ty, m, k)?;
    let b = if nt { check.arena.mat(ty, n, k)? } else { check.arena.mat(ty, k, n)? };
    // Not numbers until they are written.
    let (whole, cut) = (check.poisoned(ty, m, n, n)?, check.poisoned(ty, m, n, n)?);
    gpu.fill_random(a, 1, 1.0)?;
    gpu.fill_random(b, 2, 0.1)?;
    let product = |out: Mat, a: Mat, b: Mat| {
        if nt { gpu.gemm_nt_of((m, n), out, a, b, 1.0, 0.0) } else { gpu.gemm_nn_of((m, n), out, a, b, 1.0, 0.0) }
    };
    product(whole, a, b)?;
    for first in (0..n).step_by(cols) {
        let width = cols.min(n - first);
        // The adapter's columns go with the last piece.
        let (width, done) = if n - first - width < cols / 2 { (n - first, true) } else { (width, false) };
        let of = if nt { b.rows(first, width)? } else { b.columns(first, width)? };
        for at in (0..m).step_by(rows) {
            let height = rows.min(m - at);
            product(cut.rows(at, height)?.columns(first, width)?, a.rows(at, height)?, of)?;
        }
        if done {
            break;
        }
    }
    let read = |mat: Mat| -> Result<Vec<u8>> {
        let mut bytes = vec![0; mat.span()];
        gpu.download(&mut bytes, mat.ptr)?;
        Ok(bytes)
    };
    let (whole, cut) = (read(whole)?, read(cut)?);
    Ok(whole == cut && whole.chunks_exact(ty.bytes()).all(|value| value.iter().any(|byte| *byte != 0xff)))
}
