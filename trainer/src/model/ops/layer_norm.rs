//! Non-affine LayerNorm with modulation: `y = (1 + scale) LN(x) + shift`, per sample.
//!
//! Statistics, normalisation and modulation are float32 and rounded once (the reference rounds after each step in bf16; this is more
//! exact and within its tolerance). Backward, with `g = (1 + scale) dy` and `n = LN(x)`:
//! `dx = (g - mean(g) - n mean(g n)) / sigma`. Shift and scale come from frozen weights and a frozen input: they get no gradient.

use candle_core::{D, DType, Result, Tensor};

/// `x [B, T, D]`, `shift` and `scale` `[B, 1, D]` float32: `[B, T, D]` in the dtype of `x`.
pub fn forward(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    let (n, _) = normalise(x, eps)?;
    n.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(shift)?.to_dtype(x.dtype())
}

/// The gradient of `x`, in its dtype.
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
