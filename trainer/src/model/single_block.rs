//! A single-stream block: attention and feed-forward part side by side, one projection in, one out.
//!
//! ```text
//! n = (1 + scale) LN(h) + shift;  p = to_qkv_mlp_proj(n) = [q | k | v | u]
//! h + gate * to_out([attention(rope(rms q), rope(rms k), v) | swiglu(u)])
//! ```
//! The backward pass recomputes up to the input of `to_out`, whose own product it does not need.

use candle_core::{D, Result, Tensor};

use super::AdapterGrads;
use super::block::{BlockView, Dims};
use super::conditioning::Conditioning;
use super::ops::linear::Linear;
use super::ops::{attention, gate, layer_norm, qk_norm_rope, swiglu};

/// Weights and adapters of a single block for the duration of a visit.
pub struct SingleBlock<'w> {
    dims: Dims,
    project: Linear<'w>,
    out: Linear<'w>,
    norm_q: &'w Tensor,
    norm_k: &'w Tensor,
}

/// The recomputed forward pass.
struct State {
    normed: Tensor,
    projected: Tensor,
    attention: attention::Saved,
    /// Input of `to_out`: attention, then feed-forward part.
    joined: Tensor,
}

impl<'w> SingleBlock<'w> {
    /// Takes what it needs from `view`.
    pub fn new(view: &BlockView<'w>) -> serenity_protocol::Result<Self> {
        Ok(Self {
            dims: view.dims(),
            project: view.linear("attn.to_qkv_mlp_proj")?,
            out: view.linear("attn.to_out")?,
            norm_q: view.norm("attn.norm_q")?,
            norm_k: view.norm("attn.norm_k")?,
        })
    }

    /// `h [B, L + S, D]` to the same.
    pub fn forward(&self, h: &Tensor, cond: &Conditioning) -> Result<Tensor> {
        let state = self.up_to_out(h, cond)?;
        gate::forward(h, &cond.single.gate, &self.out.forward(&state.joined)?)
    }

    /// Gradients of the block's adapters into `grads`, and that of `h` if `need_input`.
    pub fn backward(
        &self,
        h: &Tensor,
        cond: &Conditioning,
        dh: &Tensor,
        need_input: bool,
        grads: &mut AdapterGrads,
    ) -> Result<Option<Tensor>> {
        let Dims { inner: d, mlp: m, heads, eps, .. } = self.dims;
        let rope = &cond.positions.joint;
        let state = self.up_to_out(h, cond)?;
        let dout = gate::backward(&cond.single.gate, dh)?;
        let need_projected = need_input || self.project.adapted();
        let Some(djoined) = self.out.backward(|| Ok(state.joined.clone()), &dout, need_projected, grads)? else { return Ok(None) };
        let dattention = qk_norm_rope::split_heads(&djoined.narrow(D::Minus1, 0, d)?, heads)?;
        let (dq, dk, dv) = attention::backward(&state.attention, &dattention)?;
        let part = |first: usize, len: usize| state.projected.narrow(D::Minus1, first, len);
        let dprojected = Tensor::cat(
            &[
                qk_norm_rope::backward(&part(0, d)?, heads, self.norm_q, rope, eps, &dq)?,
                qk_norm_rope::backward(&part(d, d)?, heads, self.norm_k, rope, eps, &dk)?,
                qk_norm_rope::join_heads(&dv)?,
                swiglu::backward(&part(3 * d, 2 * m)?, &djoined.narrow(D::Minus1, d, m)?)?,
            ],
            D::Minus1,
        )?;
        let Some(dnormed) = self.project.backward(|| Ok(state.normed.clone()), &dprojected, need_input, grads)? else { return Ok(None) };
        gate::add(layer_norm::backward(h, &cond.single.scale, eps, &dnormed)?, dh).map(Some)
    }

    fn up_to_out(&self, h: &Tensor, cond: &Conditioning) -> Result<State> {
        let Dims { inner: d, mlp: m, heads, eps, .. } = self.dims;
        let rope = &cond.positions.joint;
        let normed = layer_norm::forward(h, &cond.single.shift, &cond.single.scale, eps)?;
        let projected = self.project.forward(&normed)?;
        let part = |first: usize, len: usize| projected.narrow(D::Minus1, first, len);
        let q = qk_norm_rope::forward(&part(0, d)?, heads, self.norm_q, rope, eps)?;
        let k = qk_norm_rope::forward(&part(d, d)?, heads, self.norm_k, rope, eps)?;
        let v = qk_norm_rope::split_heads(&part(2 * d, d)?, heads)?;
        let (out, attention) = attention::forward(q, k, v)?;
        let joined = Tensor::cat(&[qk_norm_rope::join_heads(&out)?, swiglu::forward(&part(3 * d, 2 * m)?)?], D::Minus1)?;
        Ok(State { normed, projected, attention, joined })
    }
}
