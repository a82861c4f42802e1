//! A double-stream block: image and text tokens with their own weights, joined in attention, text first.
//!
//! ```text
//! each stream:  n = (1 + scale1) LN(x) + shift1;  q, k, v = projections of n;  q, k = rope(rms q), rope(rms k)
//! jointly:      A = attention([q_text; q_image], ...)
//! each stream:  x = x + gate1 * to_out(A);  x = x + gate2 * ff((1 + scale2) LN(x) + shift2)
//! ```
//! The backward pass recomputes everything but the last product of the feed-forward part.

use candle_core::{Result, Tensor};

use super::AdapterGrads;
use super::block::{BlockView, Dims};
use super::conditioning::{Conditioning, StreamModulation};
use super::ops::linear::Linear;
use super::ops::rope::Rope;
use super::ops::{attention, gate, layer_norm, qk_norm_rope, swiglu};

/// Weights and adapters of one stream.
struct Stream<'w> {
    dims: Dims,
    q: Linear<'w>,
    k: Linear<'w>,
    v: Linear<'w>,
    out: Linear<'w>,
    ff_in: Linear<'w>,
    ff_out: Linear<'w>,
    norm_q: &'w Tensor,
    norm_k: &'w Tensor,
}

/// Names of the linears and norms of a stream, in the order of [`Stream`]'s fields.
const IMAGE: [&str; 8] =
    ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.linear_in", "ff.linear_out", "attn.norm_q", "attn.norm_k"];
const TEXT: [&str; 8] = [
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff_context.linear_in",
    "ff_context.linear_out",
    "attn.norm_added_q",
    "attn.norm_added_k",
];

/// One stream's part of the attention's input: the normed stream, and its raw projections `[B, T, D]`.
struct Projected {
    normed: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

/// A pair of tensors, one a stream.
#[derive(Debug, Clone)]
pub struct Streams {
    /// `[B, S, D]`
    pub image: Tensor,
    /// `[B, L, D]`
    pub text: Tensor,
}

impl<'w> Stream<'w> {
    fn new(view: &BlockView<'w>, names: [&str; 8]) -> serenity_protocol::Result<Self> {
        let [q, k, v, out, ff_in, ff_out, norm_q, norm_k] = names;
        Ok(Self {
            dims: view.dims(),
            q: view.linear(q)?,
            k: view.linear(k)?,
            v: view.linear(v)?,
            out: view.linear(out)?,
            ff_in: view.linear(ff_in)?,
            ff_out: view.linear(ff_out)?,
            norm_q: view.norm(norm_q)?,
            norm_k: view.norm(norm_k)?,
        })
    }

    fn qkv_adapted(&self) -> bool {
        self.q.adapted() || self.k.adapted() || self.v.adapted()
    }

    fn project(&self, x: &Tensor, modulation: &StreamModulation) -> Result<Projected> {
        let m = &modulation.attention;
        let normed = layer_norm::forward(x, &m.shift, &m.scale, self.dims.eps)?;
        Ok(Projected { q: self.q.forward(&normed)?, k: self.k.forward(&normed)?, v: self.v.forward(&normed)?, normed })
    }

    /// Query, key and value of the attention, `[B, H, T, d]`.
    fn heads(&self, p: &Projected, rope: &Rope) -> Result<[Tensor; 3]> {
        let Dims { heads, eps, .. } = self.dims;
        Ok([
            qk_norm_rope::forward(&p.q, heads, self.norm_q, rope, eps)?,
            qk_norm_rope::forward(&p.k, heads, self.norm_k, rope, eps)?,
            qk_norm_rope::split_heads(&p.v, heads)?,
        ])
    }

    fn feed_forward(&self, x: &Tensor, modulation: &StreamModulation) -> Result<Tensor> {
        let m = &modulation.mlp;
        let up = self.ff_in.forward(&layer_norm::forward(x, &m.shift, &m.scale, self.dims.eps)?)?;
        gate::forward(x, &m.gate, &self.ff_out.forward(&swiglu::forward(&up)?)?)
    }

    /// Backward of [`Self::feed_forward`]: the gradient of `x` if `need_input`.
    fn feed_forward_backward(
        &self,
        x: &Tensor,
        modulation: &StreamModulation,
        dy: &Tensor,
        need_input: bool,
        grads: &mut AdapterGrads,
    ) -> Result<Option<Tensor>> {
        let need_up = need_input || self.ff_in.adapted();
        if !need_up && !self.ff_out.adapted() {
            return Ok(None);
        }
        let m = &modulation.mlp;
        let normed = layer_norm::forward(x, &m.shift, &m.scale, self.dims.eps)?;
        let up = self.ff_in.forward(&normed)?;
        let down = gate::backward(&m.gate, dy)?;
        let Some(dhidden) = self.ff_out.backward(|| swiglu::forward(&up), &down, need_up, grads)? else { return Ok(None) };
        let dup = swiglu::backward(&up, &dhidden)?;
        let Some(dnormed) = self.ff_in.backward(|| Ok(normed), &dup, need_input, grads)? else { return Ok(None) };
        gate::add(layer_norm::backward(x, &m.scale, self.dims.eps, &dnormed)?, dy).map(Some)
    }

    /// Backward of norm, projections, QK norm and rotation, from the gradients of [`Self::heads`]: that of `x`, without the residual's, if
    /// `need_input`.
    fn project_backward(
        &self,
        x: &Tensor,
        p: Projected,
        context: (&StreamModulation, &Rope),
        dqkv: [Tensor; 3],
        need_input: bool,
        grads: &mut AdapterGrads,
    ) -> Result<Option<Tensor>> {
        let Dims { heads, eps, .. } = self.dims;
        let ([dq, dk, dv], (modulation, rope)) = (dqkv, context);
        let dq = qk_norm_rope::backward(&p.q, heads, self.norm_q, rope, eps, &dq)?;
        let dk = qk_norm_rope::backward(&p.k, heads, self.norm_k, rope, eps, &dk)?;
        let dv = qk_norm_rope::join_heads(&dv)?;
        let normed = || Ok(p.normed.clone());
        let parts = (
            self.q.backward(normed, &dq, need_input, grads)?,
            self.k.backward(normed, &dk, need_input, grads)?,
            self.v.backward(normed, &dv, need_input, grads)?,
        );
        let (Some(q), Some(k), Some(v)) = parts else { return Ok(None) };
        layer_norm::backward(x, &modulation.attention.scale, eps, &gate::add(gate::add(q, &k)?, &v)?).map(Some)
    }
}

/// Weights and adapters of a double block for the duration of a visit.
pub struct DoubleBlock<'w> {
    image: Stream<'w>,
    text: Stream<'w>,
}

/// The recomputed forward pass up to the two gated residuals of the attention.
struct State {
    image: Projected,
    text: Projected,
    attention: attention::Saved,
    /// Attention output by stream, `[B, T, D]`.
    attended: Streams,
    /// The streams after attention.
    middle: Streams,
}

impl<'w> DoubleBlock<'w> {
    /// Takes what it needs from `view`.
    pub fn new(view: &BlockView<'w>) -> serenity_protocol::Result<Self> {
        Ok(Self { image: Stream::new(view, IMAGE)?, text: Stream::new(view, TEXT)? })
    }

    /// The streams after the block.
    pub fn forward(&self, x: &Streams, cond: &Conditioning) -> Result<Streams> {
        let middle = self.up_to_middle(x, cond)?.middle;
        Ok(Streams { image: self.image.feed_forward(&middle.image, &cond.image)?, text: self.text.feed_forward(&middle.text, &cond.text)? })
    }

    /// Gradients of the block's adapters into `grads`, and those of the streams if `need_input`.
    pub fn backward(
        &self,
        x: &Streams,
        cond: &Conditioning,
        dy: &Streams,
        need_input: bool,
        grads: &mut AdapterGrads,
    ) -> Result<Option<Streams>> {
        let need_qkv = need_input || self.image.qkv_adapted() || self.text.qkv_adapted();
        let need_middle = need_qkv || self.image.out.adapted() || self.text.out.adapted();
        let state = self.up_to_middle(x, cond)?;
        let dimage = self.image.feed_forward_backward(&state.middle.image, &cond.image, &dy.image, need_middle, grads)?;
        let dtext = self.text.feed_forward_backward(&state.middle.text, &cond.text, &dy.text, need_middle, grads)?;
        let (Some(dimage), Some(dtext)) = (dimage, dtext) else { return Ok(None) };
        let dout = |stream: &Stream<'_>, gate: &Tensor, attended: &Tensor, d: &Tensor, grads: &mut AdapterGrads| {
            stream.out.backward(|| Ok(attended.clone()), &gate::backward(gate, d)?, need_qkv, grads)
        };
        let image = dout(&self.image, &cond.image.attention.gate, &state.attended.image, &dimage, grads)?;
        let text = dout(&self.text, &cond.text.attention.gate, &state.attended.text, &dtext, grads)?;
        let (Some(image), Some(text)) = (image, text) else { return Ok(None) };
        let positions = &cond.positions;
        let (l, s) = (positions.text_tokens, x.image.dim(1)?);
        let joint = qk_norm_rope::split_heads(&Tensor::cat(&[text, image], 1)?, self.image.dims.heads)?;
        let (dq, dk, dv) = attention::backward(&state.attention, &joint)?;
        let rows = |first: usize, len: usize| -> Result<[Tensor; 3]> {
            Ok([dq.narrow(2, first, len)?, dk.narrow(2, first, len)?, dv.narrow(2, first, len)?])
        };
        let (dimage_qkv, dtext_qkv) = (rows(l, s)?, rows(0, l)?);
        let image = self.image.project_backward(&x.image, state.image, (&cond.image, &positions.image), dimage_qkv, need_input, grads)?;
        let text = self.text.project_backward(&x.text, state.text, (&cond.text, &positions.text), dtext_qkv, need_input, grads)?;
        let (Some(image), Some(text)) = (image, text) else { return Ok(None) };
        Ok(Some(Streams { image: gate::add(image, &dimage)?, text: gate::add(text, &dtext)? }))
    }

    fn up_to_middle(&self, x: &Streams, cond: &Conditioning) -> Result<State> {
        let positions = &cond.positions;
        let (l, s) = (positions.text_tokens, x.image.dim(1)?);
        let image = self.image.project(&x.image, &cond.image)?;
        let text = self.text.project(&x.text, &cond.text)?;
        let [qi, ki, vi] = self.image.heads(&image, &positions.image)?;
        let [qt, kt, vt] = self.text.heads(&text, &positions.text)?;
        // Text first, on the token axis.
        let join = |t: Tensor, i: Tensor| Tensor::cat(&[t, i], 2);
        let (out, attention) = attention::forward(join(qt, qi)?, join(kt, ki)?, join(vt, vi)?)?;
        let out = qk_norm_rope::join_heads(&out)?;
        let attended = Streams { image: out.narrow(1, l, s)?.contiguous()?, text: out.narrow(1, 0, l)?.contiguous()? };
        let middle = Streams {
            image: gate::forward(&x.image, &cond.image.attention.gate, &self.image.out.forward(&attended.image)?)?,
            text: gate::forward(&x.text, &cond.text.attention.gate, &self.text.out.forward(&attended.text)?)?,
        };
        Ok(State { image, text, attention, attended, middle })
    }
}
