//! Queries and keys between projection and attention: heads apart, RMSNorm per head, rotary embedding.
//!
//! `y = R (w x / rms(x))` in float32, rounded once. Backward, with `g = w Rᵀ dy` and `r = 1 / rms(x)`: `dx = r (g - r² x mean(g x))`.
//! The norm weight is frozen: it gets no gradient. Values take the same way without norm and rotation ([`split_heads`]).

use candle_core::{D, DType, Result, Tensor};

use super::rope::Rope;

/// `x [B, T, H d]` (a view of a wider projection is fine), `weight [d]` float32: `[B, H, T, d]` in the dtype of `x`.
pub fn forward(x: &Tensor, heads: usize, weight: &Tensor, rope: &Rope, eps: f64) -> Result<Tensor> {
    let y = split_heads(x, heads)?.to_dtype(DType::F32)?;
    let y = y.broadcast_mul(&reciprocal(&y, eps)?)?.broadcast_mul(weight)?;
    rope.forward(&y)?.to_dtype(x.dtype())
}

/// The gradient of `x`, `[B, T, H d]` in its dtype, from `dy [B, H, T, d]`.
pub fn backward(x: &Tensor, heads: usize, weight: &Tensor, rope: &Rope, eps: f64, dy: &Tensor) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = split_heads(x, heads)?.to_dtype(DType::F32)?;
    let r = reciprocal(&x, eps)?;
    let g = rope.backward(&dy.to_dtype(DType::F32)?.contiguous()?)?.broadcast_mul(weight)?;
    let mean = ((&g * &x)?.mean_keepdim(D::Minus1)? * r.sqr()?)?;
    join_heads(&g.sub(&x.broadcast_mul(&mean)?)?.broadcast_mul(&r)?.to_dtype(dtype)?)
}

/// `[B, T, H d]` to `[B, H, T, d]`.
pub fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, t, f) = x.dims3()?;
    x.reshape((b, t, heads, f / heads))?.transpose(1, 2)?.contiguous()
}

/// `[B, H, T, d]` to `[B, T, H d]`.
pub fn join_heads(x: &Tensor) -> Result<Tensor> {
    let (b, h, t, d) = x.dims4()?;
    x.transpose(1, 2)?.reshape((b, t, h * d))
}

fn reciprocal(x: &Tensor, eps: f64) -> Result<Tensor> {
    (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()
}
