//! One Mistral layer over the real tokens of several captions that are packed one behind the other, or over the pad.
//!
//! The linear layers and norms see all rows of the pack at once; attention sees one caption at a time, which is the block-diagonal causal
//! mask without its empty blocks. Every row passes through the same sums in the same order whatever stands beside it.
//!
//! `h += o(attention(rope(q, k), v))` of the normed `h`, then `h += down(silu(gate) * up)` of the normed sum. The norm divides in float32,
//! rounds, and multiplies by its weight in the computing type (two roundings, as the reference). The rotary embedding is of the
//! rotate-half form, its table in float32 and rounded to the computing type.

use candle_core::{D, DType, Device, Result, Tensor};
use serenity_protocol::cache::text_model::TextGeometry;

use super::weights::LayerWeights;

/// What depends on a caption's length alone: the rotary table and the causal mask.
pub(super) struct Positions {
    /// `[n, head_dim]`, both halves alike.
    cos: Tensor,
    sin: Tensor,
    /// `[n, n]` float32: 0 where the key is not after the query, else minus infinity.
    mask: Tensor,
}

impl Positions {
    /// Of `n` tokens that stand at positions `offset..offset + n`.
    pub fn new(g: &TextGeometry, n: usize, offset: usize, device: &Device, dtype: DType) -> Result<Self> {
        let half = g.head_dim / 2;
        let frequencies: Vec<f32> = (0..half).map(|j| (1.0 / g.rope_theta.powf(2.0 * j as f64 / g.head_dim as f64)) as f32).collect();
        let angles: Vec<f32> =
            (offset..offset + n).flat_map(|p| frequencies.iter().chain(&frequencies).map(move |f| p as f32 * f)).collect();
        // On the host in double precision, so that every device starts from the same table.
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|&a| f(f64::from(a)) as f32).collect();
            Tensor::from_vec(values, (n, g.head_dim), device)?.to_dtype(dtype)
        };
        let mask: Vec<f32> = (0..n).flat_map(|q| (0..n).map(move |k| if k <= q { 0.0 } else { f32::NEG_INFINITY })).collect();
        Ok(Self { cos: table(f64::cos)?, sin: table(f64::sin)?, mask: Tensor::from_vec(mask, (n, n), device)? })
    }

    /// `x [n, heads, head_dim]` rotated.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let half = x.dim(D::Minus1)? / 2;
        let (first, second) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
        let turned = Tensor::cat(&[&second.neg()?, &first], D::Minus1)?;
        x.broadcast_mul(&self.cos.unsqueeze(1)?)? + turned.broadcast_mul(&self.sin.unsqueeze(1)?)?
    }
}

fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let scale = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    wide.broadcast_mul(&scale)?.to_dtype(x.dtype())?.broadcast_mul(weight)
}

fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}

/// A caption's place in its pack.
pub(super) struct Segment<'a> {
    /// First row.
    pub start: usize,
    /// Rows: the caption's real tokens.
    pub rows: usize,
    /// Where they stand in the padded caption.
    pub positions: &'a Positions,
}

/// The layer over `h [rows, hidden]`. `segments` lie one behind the other from row 0; rows after the last one are filling and mean nothing.
/// Without `segments` the rows are pads: fully masked queries, whose attention output is 0, so that only the feed-forward half acts
/// (`spec/flux2.md` 2.4).
pub(super) fn forward(g: &TextGeometry, w: &LayerWeights, h: &Tensor, segments: &[Segment]) -> Result<Tensor> {
    let h = match segments {
        [] => h.clone(),
        segments => (h + attention(g, w, &rms_norm(h, &w.attention_norm, g.rms_eps)?, segments)?)?,
    };
    let x = rms_norm(&h, &w.mlp_norm, g.rms_eps)?;
    let inner = (linear(&x, &w.gate)?.silu()? * linear(&x, &w.up)?)?;
    &h + linear(&inner, &w.down)?
}

fn attention(g: &TextGeometry, w: &LayerWeights, x: &Tensor, segments: &[Segment]) -> Result<Tensor> {
    let (query, key, value) = (linear(x, &w.query)?, linear(x, &w.key)?, linear(x, &w.value)?);
    let mut mixed = Vec::with_capacity(segments.len() + 1);
    for s in segments {
        let part = |t: &Tensor| t.narrow(0, s.start, s.rows);
        mixed.push(attend(g, &part(&query)?, &part(&key)?, &part(&value)?, s.positions)?);
    }
    let filling = x.dim(0)? - segments.iter().map(|s| s.rows).sum::<usize>();
    if filling > 0 {
        mixed.push(Tensor::zeros((filling, g.heads * g.head_dim), x.dtype(), x.device())?);
    }
    linear(&Tensor::cat(&mixed, 0)?, &w.output)
}

/// One caption's attention: `query [n, heads * head_dim]`, `key` and `value [n, kv_heads * head_dim]` to `[n, heads * head_dim]`.
fn attend(g: &TextGeometry, query: &Tensor, key: &Tensor, value: &Tensor, positions: &Positions) -> Result<Tensor> {
    let n = query.dim(0)?;
    let group = g.heads / g.kv_heads;
    let query = positions.rotate(&query.reshape((n, g.heads, g.head_dim))?)?;
    let key = positions.rotate(&key.reshape((n, g.kv_heads, g.head_dim))?)?;
    let value = value.reshape((n, g.kv_heads, g.head_dim))?;
    // Query head i uses key head i / group: the queries of a group become further rows of the same product.
    let query = query.transpose(0, 1)?.contiguous()?.reshape((g.kv_heads, group * n, g.head_dim))?;
    let key = key.transpose(0, 1)?.contiguous()?;
    let value = value.transpose(0, 1)?.contiguous()?;
    let scores = (query.matmul(&key.transpose(1, 2)?)?.to_dtype(DType::F32)? * (g.head_dim as f64).powf(-0.5))?;
    let scores = scores.reshape((g.kv_heads, group, n, n))?.broadcast_add(&positions.mask)?;
    let weights = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(value.dtype())?;
    let mixed = weights.reshape((g.kv_heads, group * n, n))?.matmul(&value)?;
    mixed.reshape((g.heads, n, g.head_dim))?.transpose(0, 1)?.contiguous()?.reshape((n, g.heads * g.head_dim))
}
