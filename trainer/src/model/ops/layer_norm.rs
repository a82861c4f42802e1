//! Non-affine LayerNorm with modulation: `y = (1 + scale) LN(x) + shift`, per sample.
//!
//! Statistics, normalisation and modulation are float32 and rounded once (the reference rounds after each step in bf16; this is more
//! exact and within its tolerance). Backward, with `g = (1 + scale) dy` and `n = LN(x)`:
//! `dx = (g - mean(g) - n mean(g n)) / sigma`. Shift and scale come from frozen weights and a frozen input: they get no gradient.

use candle_core::{D, DType, Result, Tensor};

use super::cpu::{self, Rows};

/// `x [B, T, D]`, `shift` and `scale` `[B, 1, D]` float32: `[B, T, D]` in the dtype of `x`.
pub fn forward(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::forward(x, shift, scale, eps);
    }
    let (_, t, d) = x.dims3()?;
    let (xs, shifts, scales) = (cpu::walkable(x)?, cpu::walkable(shift)?, cpu::walkable(scale)?);
    let (xs, shifts, scales) = (Rows::of(&xs)?, Rows::of(&shifts)?, Rows::of(&scales)?);
    let (xs, shifts, scales) = (xs.reader()?, shifts.reader()?, scales.reader()?);
    cpu::build(x.shape().clone(), d, x, |i, y| {
        let row = xs(i);
        let (mean, reciprocal) = statistics(row, eps);
        for (((y, x), shift), scale) in y.iter_mut().zip(row).zip(shifts(i / t)).zip(scales(i / t)) {
            *y = (x - mean) * reciprocal * (1.0 + scale) + shift;
        }
    })
}

/// The gradient of `x`, in its dtype.
pub fn backward(x: &Tensor, scale: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::backward(x, scale, eps, dy);
    }
    let (_, t, d) = x.dims3()?;
    let (xs, dys, scales) = (cpu::walkable(x)?, cpu::walkable(dy)?, cpu::walkable(scale)?);
    let (xs, dys, scales) = (Rows::of(&xs)?, Rows::of(&dys)?, Rows::of(&scales)?);
    let (xs, dys, scales) = (xs.reader()?, dys.reader()?, scales.reader()?);
    cpu::build(x.shape().clone(), d, x, |i, dx| {
        let row = xs(i);
        let (mean, reciprocal) = statistics(row, eps);
        for ((g, dy), scale) in dx.iter_mut().zip(dys(i)).zip(scales(i / t)) {
            *g = dy * (1.0 + scale);
        }
        let mean_g = cpu::sum(dx, |g| g) / d as f32;
        // mean(g n) = mean(g (x - mean)) / sigma
        let mean_gn = (cpu::dot(dx, row) / d as f32 - mean * mean_g) * reciprocal;
        for (g, x) in dx.iter_mut().zip(row) {
            *g = (*g - mean_g - (x - mean) * reciprocal * mean_gn) * reciprocal;
        }
    })
}

/// Mean and 1 / sigma of a row.
fn statistics(row: &[f32], eps: f64) -> (f32, f32) {
    let count = row.len() as f32;
    let mean = cpu::sum(row, |x| x) / count;
    let variance = cpu::sum(row, |x| (x - mean) * (x - mean)) / count;
    (mean, 1.0 / (variance + eps as f32).sqrt())
}

/// The same from operations of the tensor library: for devices without a kernel of their own, and what the tests compare with.
pub(super) mod composed {
    use super::*;

    pub fn forward(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
        let (n, _) = normalise(x, eps)?;
        n.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(shift)?.to_dtype(x.dtype())
    }

    pub fn backward(x: &Tensor, scale: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
        let (n, reciprocal) = normalise(x, eps)?;
        let g = dy.to_dtype(DType::F32)?.broadcast_mul(&(scale + 1.0)?)?;
        let mean = g.mean_keepdim(D::Minus1)?;
        let mean_n = (&g * &n)?.mean_keepdim(D::Minus1)?;
        g.broadcast_sub(&mean)?.sub(&n.broadcast_mul(&mean_n)?)?.broadcast_mul(&reciprocal)?.to_dtype(x.dtype())
    }

    /// LN(x) and 1 / sigma, float32.
    fn normalise(x: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
        let x = x.to_dtype(DType::F32)?;
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let reciprocal = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
        Ok((centred.broadcast_mul(&reciprocal)?, reciprocal))
    }
}
