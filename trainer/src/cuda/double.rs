//! A visit of a double-stream block; the math is that of the CPU's `double_block`.
//!
//! A stream's tokens of all samples lie after each other in its matrices. The joint sequence has text before image sample by sample: with one
//! sample the streams are views of it, with several they are copied.
#![forbid(unsafe_code)]

use serenity_cuda::ops::rows::{HeadNorm, PackedHeads};
use serenity_cuda::{Mat, Ptr};
use serenity_protocol::Result;

use super::attention::{self, Heads, Kept};
use super::conditioning::{Conditioning, StreamModulation};
use super::flight::Back;
use super::linear::{Context, Linear, Low};
use super::plan::{Reserve, Shape};
use super::single::joint;

/// The weights of one stream.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    /// Projection of queries.
    pub q: Linear,
    /// Projection of keys.
    pub k: Linear,
    /// Projection of values.
    pub v: Linear,
    /// Behind the attention.
    pub out: Linear,
    /// First matrix of the feed-forward part.
    pub ff_in: Linear,
    /// Second matrix.
    pub ff_out: Linear,
    /// Norm of queries, float32.
    pub norm_q: Ptr,
    /// Norm of keys, float32.
    pub norm_k: Ptr,
}

/// The block's weights.
#[derive(Debug, Clone, Copy)]
pub struct Weights {
    /// Image stream.
    pub image: Stream,
    /// Text stream.
    pub text: Stream,
}

/// A matrix for each stream.
#[derive(Debug, Clone, Copy)]
pub struct Pair {
    /// `[B S, ..]`
    pub image: Mat,
    /// `[B L, ..]`
    pub text: Mat,
}

impl Pair {
    fn new(r: &dyn Reserve, s: &Shape, cols: usize) -> Result<Self> {
        Ok(Self { image: r.mat(s.ty, s.image_rows(), cols)?, text: r.mat(s.ty, s.text_rows(), cols)? })
    }

    /// The two halves of a matrix that holds all text rows, then all image rows.
    ///
    /// # Errors
    /// If it has not so many rows.
    pub fn halves(mat: Mat, s: &Shape) -> Result<Self> {
        Ok(Self { text: mat.rows(0, s.text_rows())?, image: mat.rows(s.text_rows(), s.image_rows())? })
    }
}

/// The streams of a joint matrix: views if there is one sample, else copied into `place`.
///
/// # Errors
/// The engine's.
pub fn split(c: &Context<'_>, s: &Shape, joint: Mat, place: Pair) -> Result<Pair> {
    if s.samples == 1 {
        return Pair::halves(joint, s);
    }
    for_samples(s, joint, place, |part, stream| c.pass(|gpu| gpu.cast(stream, part)))?;
    Ok(place)
}

/// Puts streams into a joint matrix, unless they are views of it already.
///
/// # Errors
/// The engine's.
pub fn merge(c: &Context<'_>, s: &Shape, joint: Mat, streams: Pair) -> Result<()> {
    for_samples(s, joint, streams, |part, stream| if part.ptr == stream.ptr { Ok(()) } else { c.pass(|gpu| gpu.cast(part, stream)) })
}

/// Calls `work` with each sample's text and image part of a joint matrix and the stream's rows of it.
fn for_samples(s: &Shape, joint: Mat, streams: Pair, mut work: impl FnMut(Mat, Mat) -> Result<()>) -> Result<()> {
    for sample in 0..s.samples {
        let first = sample * s.tokens();
        work(joint.rows(first, s.text)?, streams.text.rows(sample * s.text, s.text)?)?;
        work(joint.rows(first + s.text, s.image)?, streams.image.rows(sample * s.image, s.image)?)?;
    }
    Ok(())
}

/// What the backward pass needs of the forward pass: kept, or computed again.
#[derive(Debug, Clone, Copy)]
pub struct Activations {
    normed: Pair,
    /// Queries, keys and values as projected, `[.., 3 D]`.
    packed: Pair,
    heads: Heads,
    lse: Mat,
    attended: Mat,
    middle: Pair,
    /// Gate and value of the feed-forward part.
    up: Pair,
}

impl Activations {
    /// Reserves them. Unless they are `kept`, the streams use the memory of their feed-forward parts one after the other.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn new(r: &dyn Reserve, s: &Shape, kept: bool) -> Result<Self> {
        let (d, m) = (s.inner, s.mlp);
        let up = if kept {
            Pair::new(r, s, 2 * m)?
        } else {
            let one = r.mat(s.ty, s.image_rows().max(s.text_rows()), 2 * m)?;
            Pair { image: one.rows(0, s.image_rows())?, text: one.rows(0, s.text_rows())? }
        };
        Ok(Self {
            normed: Pair::new(r, s, d)?,
            packed: Pair::new(r, s, 3 * d)?,
            heads: Heads::new(r, s)?,
            lse: Kept::lse(r, s)?,
            attended: r.mat(s.ty, s.rows(), d)?,
            middle: Pair::new(r, s, d)?,
            up,
        })
    }
}

/// Memory of a visit.
#[derive(Debug, Clone, Copy)]
pub struct Space {
    normed: Pair,
    packed: Pair,
    heads: Heads,
    kept: Kept,
    attended: Mat,
    /// The streams of `attended` where they must be copied; its gradient's later.
    attended_split: Pair,
    middle: Pair,
    up: Pair,
    dmiddle: Pair,
    dheads: Heads,
    dattended: Mat,
    dattended_split: Pair,
    /// For one stream at a time.
    one: One,
}

/// What only one stream at a time needs, in the size of the longer one.
#[derive(Debug, Clone, Copy)]
struct One {
    out: Mat,
    normed: Mat,
    hidden: Mat,
    dhidden: Mat,
    dpacked: Mat,
    low: Low,
}

impl One {
    fn rows(self, rows: usize) -> Result<Self> {
        let of = |m: Mat| m.rows(0, rows);
        Ok(Self {
            out: of(self.out)?,
            normed: of(self.normed)?,
            hidden: of(self.hidden)?,
            dhidden: of(self.dhidden)?,
            dpacked: of(self.dpacked)?,
            low: Low(of(self.low.0)?, of(self.low.1)?),
        })
    }
}

impl Space {
    /// Reserves it.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn new(r: &dyn Reserve, s: &Shape) -> Result<Self> {
        Self::around(r, s, &Activations::new(r, s, false)?)
    }

    /// Reserves what is needed beside activations that have their place already.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn around(r: &dyn Reserve, s: &Shape, a: &Activations) -> Result<Self> {
        let (d, m) = (s.inner, s.mlp);
        let longer = s.image_rows().max(s.text_rows());
        let one = |cols: usize| r.mat(s.ty, longer, cols);
        let several = Shape { samples: if s.samples == 1 { 0 } else { s.samples }, ..*s };
        Ok(Self {
            normed: a.normed,
            packed: a.packed,
            heads: a.heads,
            kept: Kept::new(r, s, a.lse)?,
            attended: a.attended,
            attended_split: Pair::new(r, &several, d)?,
            middle: a.middle,
            up: a.up,
            dmiddle: Pair::new(r, s, d)?,
            dheads: Heads::new(r, s)?,
            dattended: r.mat(s.ty, s.rows(), d)?,
            dattended_split: Pair::new(r, &several, d)?,
            one: One {
                out: one(d)?,
                normed: one(d)?,
                hidden: one(m)?,
                dhidden: one(m)?,
                dpacked: one(3 * d)?,
                low: Low(one(s.rank)?, one(s.rank)?),
            },
        })
    }
}

fn packed(p: Mat, d: usize) -> Result<PackedHeads> {
    Ok(PackedHeads { q: p.columns(0, d)?, k: p.columns(d, d)?, v: p.columns(2 * d, d)? })
}

impl Stream {
    fn norm(&self, s: &Shape, cond: &Conditioning, first_token: usize) -> HeadNorm {
        HeadNorm {
            samples: s.samples,
            heads: s.heads,
            head_dim: s.head_dim,
            first_token,
            weight_q: self.norm_q,
            weight_k: self.norm_k,
            cos: cond.cos,
            sin: cond.sin,
            eps: s.eps,
        }
    }

    fn qkv_adapted(&self) -> bool {
        self.q.adapted() || self.k.adapted() || self.v.adapted()
    }

    /// Norm, projections, QK norm and rotation into the joint sequence.
    #[allow(clippy::too_many_arguments)] // one stream of a visit
    fn project(
        &self,
        c: &Context<'_>,
        s: &Shape,
        w: &Space,
        (cond, modulation): (&Conditioning, &StreamModulation),
        (normed, to): (Mat, Mat),
        x: Mat,
        first_token: usize,
    ) -> Result<()> {
        let m = &modulation.attention;
        c.pass(|gpu| gpu.ln_mod(normed, x, m.shift, m.scale, s.eps))?;
        let p = packed(to, s.inner)?;
        for (linear, y) in [(&self.q, p.q), (&self.k, p.k), (&self.v, p.v)] {
            linear.forward(c, y, normed, w.one.low)?;
        }
        c.pass(|gpu| gpu.qk_norm_rope(joint(&w.heads, s), p, &self.norm(s, cond, first_token)))
    }

    /// `middle = x + gate to_out(attended)`, the same bytes whether or not the gated output is added to a residual stream as well.
    #[allow(clippy::too_many_arguments)] // one stream of a visit
    fn after_attention(
        &self,
        c: &Context<'_>,
        w: &Space,
        m: &StreamModulation,
        (middle, stream): (Mat, Option<Mat>),
        x: Mat,
        attended: Mat,
    ) -> Result<()> {
        let one = w.one.rows(x.rows)?;
        self.out.forward(c, one.out, attended, one.low)?;
        c.pass(|gpu| match stream {
            Some(stream) => gpu.gated_stream(middle, stream, Some(x), m.attention.gate, one.out),
            None => gpu.gated_residual(middle, x, m.attention.gate, one.out),
        })
    }

    #[allow(clippy::too_many_arguments)] // one stream of a visit
    fn feed_forward(
        &self,
        c: &Context<'_>,
        s: &Shape,
        w: &Space,
        m: &StreamModulation,
        (y, stream): (Mat, Option<Mat>),
        x: Mat,
        up: Mat,
    ) -> Result<()> {
        let (one, m) = (w.one.rows(x.rows)?, &m.mlp);
        c.pass(|gpu| gpu.ln_mod(one.normed, x, m.shift, m.scale, s.eps))?;
        self.ff_in.forward(c, up, one.normed, one.low)?;
        c.pass(|gpu| gpu.swiglu(one.hidden, up.columns(0, s.mlp)?, up.columns(s.mlp, s.mlp)?))?;
        self.ff_out.forward(c, one.out, one.hidden, one.low)?;
        c.pass(|gpu| match stream {
            Some(stream) => gpu.gated_stream(y, stream, None, m.gate, one.out),
            None => gpu.gated_residual(y, x, m.gate, one.out),
        })
    }

    /// Backward of [`Self::feed_forward`]: `dx` becomes the gradient of `x` if it is needed.
    #[allow(clippy::too_many_arguments)] // one stream of a visit
    fn feed_forward_backward(
        &self,
        c: &Context<'_>,
        s: &Shape,
        w: &Space,
        m: &StreamModulation,
        (dx, dy): (Mat, Mat),
        (x, up): (Mat, Mat),
        how: Back<'_>,
    ) -> Result<()> {
        let need_input = how.need_input;
        let need_up = need_input || self.ff_in.adapted();
        if !need_up && !self.ff_out.adapted() {
            return Ok(());
        }
        let (one, m) = (w.one.rows(x.rows)?, &m.mlp);
        let (gate, value) = (up.columns(0, s.mlp)?, up.columns(s.mlp, s.mlp)?);
        if !how.kept() || self.ff_in.adapted() {
            c.pass(|gpu| gpu.ln_mod(one.normed, x, m.shift, m.scale, s.eps))?;
        }
        if !how.kept() {
            self.ff_in.forward(c, up, one.normed, one.low)?;
        }
        c.pass(|gpu| {
            if self.ff_out.adapted() {
                gpu.swiglu(one.hidden, gate, value)?;
            }
            gpu.gated_residual_bwd(one.out, m.gate, dy)
        })?;
        self.ff_out.backward(c, one.hidden, one.out, need_up.then_some(one.dhidden), false, one.low)?;
        if !need_up {
            return Ok(());
        }
        c.pass(|gpu| gpu.swiglu_bwd(gate, value, one.dhidden, gate, value))?;
        self.ff_in.backward(c, one.normed, up, need_input.then_some(one.out), false, one.low)?;
        if !need_input {
            return Ok(());
        }
        c.pass(|gpu| gpu.ln_mod_bwd(dx, Some(dy), one.out, x, m.scale, s.eps))
    }

    /// Backward of `to_out`: `dattended` from the gradient of the stream after attention, if `need`.
    fn out_backward(
        &self,
        c: &Context<'_>,
        w: &Space,
        m: &StreamModulation,
        (dattended, attended): (Mat, Mat),
        dmiddle: Mat,
        need: bool,
    ) -> Result<()> {
        let one = w.one.rows(dmiddle.rows)?;
        c.pass(|gpu| gpu.gated_residual_bwd(one.out, m.attention.gate, dmiddle))?;
        self.out.backward(c, attended, one.out, need.then_some(dattended), false, one.low)
    }

    /// Backward of [`Self::project`], with `dmiddle` the residual's gradient: `dx` becomes the gradient of `x` if `need_input`.
    #[allow(clippy::too_many_arguments)] // one stream of a visit
    fn project_backward(
        &self,
        c: &Context<'_>,
        s: &Shape,
        w: &Space,
        (cond, modulation): (&Conditioning, &StreamModulation),
        (normed, from): (Mat, Mat),
        (dx, dmiddle, x): (Mat, Mat, Mat),
        first_token: usize,
        need_input: bool,
    ) -> Result<()> {
        let one = w.one.rows(x.rows)?;
        let (p, dp) = (packed(from, s.inner)?, packed(one.dpacked, s.inner)?);
        c.pass(|gpu| gpu.qk_norm_rope_bwd(dp, joint(&w.dheads, s), p, &self.norm(s, cond, first_token)))?;
        let mut add = false;
        for (linear, dy) in [(&self.q, dp.q), (&self.k, dp.k), (&self.v, dp.v)] {
            linear.backward(c, normed, dy, need_input.then_some(one.out), add, one.low)?;
            add = true;
        }
        if !need_input {
            return Ok(());
        }
        c.pass(|gpu| gpu.ln_mod_bwd(dx, Some(dmiddle), one.out, x, modulation.attention.scale, s.eps))
    }
}

impl Weights {
    /// Up to the streams after attention; returns the streams of the attention's output. In the forward pass the residual `stream` follows.
    fn up_to_middle(&self, c: &Context<'_>, s: &Shape, w: &Space, cond: &Conditioning, x: Pair, stream: Option<Pair>) -> Result<Pair> {
        self.text.project(c, s, w, (cond, &cond.text), (w.normed.text, w.packed.text), x.text, 0)?;
        self.image.project(c, s, w, (cond, &cond.image), (w.normed.image, w.packed.image), x.image, s.text)?;
        attention::forward(c, w.attended, &w.heads, &w.kept)?;
        let attended = split(c, s, w.attended, w.attended_split)?;
        let (image, text) = ((w.middle.image, stream.map(|p| p.image)), (w.middle.text, stream.map(|p| p.text)));
        self.image.after_attention(c, w, &cond.image, image, x.image, attended.image)?;
        self.text.after_attention(c, w, &cond.text, text, x.text, attended.text)?;
        Ok(attended)
    }

    /// The streams `y` after the block from those before it; with a residual stream, the block's outputs are added to that and `y` is its rounding.
    ///
    /// # Errors
    /// The engine's.
    pub fn forward(
        &self,
        c: &Context<'_>,
        s: &Shape,
        w: &Space,
        cond: &Conditioning,
        (y, stream): (Pair, Option<Pair>),
        x: Pair,
    ) -> Result<()> {
        self.up_to_middle(c, s, w, cond, x, stream)?;
        let (image, text) = ((y.image, stream.map(|p| p.image)), (y.text, stream.map(|p| p.text)));
        self.image.feed_forward(c, s, w, &cond.image, image, w.middle.image, w.up.image)?;
        self.text.feed_forward(c, s, w, &cond.text, text, w.middle.text, w.up.text)
    }

    /// Adds the adapters' gradients, and turns `dy` into the gradients of the streams before the block if they are needed.
    ///
    /// # Errors
    /// The engine's.
    #[allow(clippy::too_many_arguments)] // the state of a visit
    pub fn backward(&self, c: &Context<'_>, s: &Shape, w: &Space, cond: &Conditioning, dy: Pair, x: Pair, how: Back<'_>) -> Result<()> {
        let need_input = how.need_input;
        let need_qkv = need_input || self.image.qkv_adapted() || self.text.qkv_adapted();
        let need_middle = need_qkv || self.image.out.adapted() || self.text.out.adapted();
        let attended = if how.kept() { split(c, s, w.attended, w.attended_split)? } else { self.up_to_middle(c, s, w, cond, x, None)? };
        let middle = Back { need_input: need_middle, ..how };
        let image = ((w.dmiddle.image, dy.image), (w.middle.image, w.up.image));
        self.image.feed_forward_backward(c, s, w, &cond.image, image.0, image.1, middle)?;
        let text = ((w.dmiddle.text, dy.text), (w.middle.text, w.up.text));
        self.text.feed_forward_backward(c, s, w, &cond.text, text.0, text.1, middle)?;
        if !need_middle {
            return Ok(());
        }
        let dattended = if s.samples == 1 { Pair::halves(w.dattended, s)? } else { w.dattended_split };
        self.image.out_backward(c, w, &cond.image, (dattended.image, attended.image), w.dmiddle.image, need_qkv)?;
        self.text.out_backward(c, w, &cond.text, (dattended.text, attended.text), w.dmiddle.text, need_qkv)?;
        if !need_qkv {
            return Ok(());
        }
        merge(c, s, w.dattended, dattended)?;
        attention::backward(c, &w.dheads, w.dattended, w.attended, &w.heads, &w.kept)?;
        let image = (dy.image, w.dmiddle.image, x.image);
        self.image.project_backward(c, s, w, (cond, &cond.image), (w.normed.image, w.packed.image), image, s.text, need_input)?;
        let text = (dy.text, w.dmiddle.text, x.text);
        self.text.project_backward(c, s, w, (cond, &cond.text), (w.normed.text, w.packed.text), text, 0, need_input)
    }
}
