//! Queries and keys between projection and attention: heads apart, RMSNorm per head, rotary embedding.
//!
//! `y = R (w x / rms(x))` in float32, rounded once. Backward, with `g = w Rᵀ dy` and `r = 1 / rms(x)`: `dx = r (g - r² x mean(g x))`.
//! The norm weight is frozen: it gets no gradient. Values take the same way without norm and rotation ([`split_heads`]).

use candle_core::{D, DType, Result, Tensor};

use super::cpu::{self, Rows};
use super::rope::{self, Rope};

/// `x [B, T, H d]` (a view of a wider projection is fine), `weight [d]` float32: `[B, H, T, d]` in the dtype of `x`.
pub fn forward(x: &Tensor, heads: usize, weight: &Tensor, rope: &Rope, eps: f64) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::forward(x, heads, weight, rope, eps);
    }
    let (b, t, f) = x.dims3()?;
    let d = f / heads;
    let (xs, weight) = (cpu::walkable(x)?, cpu::walkable(weight)?);
    let (xs, weight, cos, sin) = (Rows::of(&xs)?, Rows::of(&weight)?, Rows::of(rope.cos())?, Rows::of(rope.sin())?);
    let (xs, weight, cos, sin) = (xs.reader()?, weight.reader()?, cos.reader()?, sin.reader()?);
    let weight = weight(0);
    cpu::build((b, heads, t, d), d, x, |i, y| {
        let (head, token) = (i / t % heads, i % t);
        let x = &xs(i / (heads * t) * t + token)[head * d..(head + 1) * d];
        let r = reciprocal(x, eps);
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * r * w;
        }
        rope::turn(y, cos(token), sin(token));
    })
}

/// The gradient of `x`, `[B, T, H d]` in its dtype, from `dy [B, H, T, d]`.
pub fn backward(x: &Tensor, heads: usize, weight: &Tensor, rope: &Rope, eps: f64, dy: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::backward(x, heads, weight, rope, eps, dy);
    }
    let (b, t, f) = x.dims3()?;
    let d = f / heads;
    let (xs, dys, weight) = (cpu::walkable(x)?, cpu::walkable(dy)?, cpu::walkable(weight)?);
    let (xs, dys, weight) = (Rows::of(&xs)?, Rows::of(&dys)?, Rows::of(&weight)?);
    let (cos, sin) = (Rows::of(rope.cos())?, Rows::of(rope.minus_sin())?);
    let (xs, dys, weight, cos, sin) = (xs.reader()?, dys.reader()?, weight.reader()?, cos.reader()?, sin.reader()?);
    let weight = weight(0);
    cpu::build((b, t, f), f, x, |i, dx| {
        let (sample, token) = (i / t, i % t);
        for ((head, x), g) in xs(i).chunks_exact(d).enumerate().zip(dx.chunks_exact_mut(d)) {
            let r = reciprocal(x, eps);
            g.copy_from_slice(dys((sample * heads + head) * t + token));
            rope::turn(g, cos(token), sin(token));
            g.iter_mut().zip(weight).for_each(|(g, w)| *g *= w);
            let mean = cpu::dot(g, x) / d as f32 * r * r;
            g.iter_mut().zip(x).for_each(|(g, x)| *g = (*g - x * mean) * r);
        }
    })
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

fn reciprocal(x: &[f32], eps: f64) -> f32 {
    1.0 / (cpu::sum(x, |v| v * v) / x.len() as f32 + eps as f32).sqrt()
}

/// The same from operations of the tensor library: for devices without a kernel of their own, and what the tests compare with.
pub(super) mod composed {
    use super::*;

    pub fn forward(x: &Tensor, heads: usize, weight: &Tensor, rope: &Rope, eps: f64) -> Result<Tensor> {
        let y = split_heads(x, heads)?.to_dtype(DType::F32)?;
        let y = y.broadcast_mul(&reciprocal(&y, eps)?)?.broadcast_mul(weight)?;
        rope.forward(&y)?.to_dtype(x.dtype())
    }

    pub fn backward(x: &Tensor, heads: usize, weight: &Tensor, rope: &Rope, eps: f64, dy: &Tensor) -> Result<Tensor> {
        let dtype = x.dtype();
        let x = split_heads(x, heads)?.to_dtype(DType::F32)?;
        let r = reciprocal(&x, eps)?;
        let g = rope.backward(&dy.to_dtype(DType::F32)?.contiguous()?)?.broadcast_mul(weight)?;
        let mean = ((&g * &x)?.mean_keepdim(D::Minus1)? * r.sqr()?)?;
        join_heads(&g.sub(&x.broadcast_mul(&mean)?)?.broadcast_mul(&r)?.to_dtype(dtype)?)
    }

    fn reciprocal(x: &Tensor, eps: f64) -> Result<Tensor> {
        (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()
    }
}
