//! A visit of a single-stream block; the math is that of the CPU's `single_block`.
#![forbid(unsafe_code)]

use serenity_cuda::ops::rows::{HeadNorm, HeadStrides, JointHeads, PackedHeads};
use serenity_cuda::{Mat, Ptr};
use serenity_protocol::Result;

use super::attention::{self, Heads, Kept};
use super::conditioning::Conditioning;
use super::flight::{Back, Have};
use super::linear::{Context, Linear, Low, joined};
use super::plan::{Reserve, Shape};

/// The block's weights.
#[derive(Debug, Clone, Copy)]
pub struct Weights {
    /// `attn.to_qkv_mlp_proj`
    pub project: Linear,
    /// `attn.to_out`
    pub out: Linear,
    /// `attn.norm_q`, float32.
    pub norm_q: Ptr,
    /// `attn.norm_k`, float32.
    pub norm_k: Ptr,
}

/// What the backward pass needs of the forward pass: kept, or computed again.
#[derive(Debug, Clone, Copy)]
pub struct Activations {
    /// Joined with the low-rank branch of `project`.
    normed: Mat,
    /// Queries, keys, values, gate and value; in the backward pass then their gradients.
    projected: Mat,
    /// Rotated queries and keys; values as they are in `projected`.
    heads: Heads,
    lse: Mat,
    /// Input of `to_out`: attention, then feed-forward part.
    joined: Mat,
}

impl Activations {
    /// Reserves them.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn new(r: &dyn Reserve, s: &Shape) -> Result<Self> {
        let (t, d, m) = (s.rows(), s.inner, s.mlp);
        let mat = |cols: usize| r.mat(s.ty, t, cols);
        let projected = mat(3 * d + 2 * m)?;
        Ok(Self { normed: joined(r, s, t, d)?, projected, heads: rotated(r, s, projected)?, lse: Kept::lse(r, s)?, joined: mat(d + m)? })
    }
}

/// Activations that travel to the host and back where there is no room for all of them: what products and attention have made. The rest is a
/// few passes over these and the block's input. Dense matrices.
#[derive(Debug, Clone, Copy)]
pub struct Parcel {
    projected: Mat,
    attended: Mat,
    lse: Mat,
}

impl Parcel {
    /// Reserves it.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn new(r: &dyn Reserve, s: &Shape) -> Result<Self> {
        let mat = |cols: usize| r.mat(s.ty, s.rows(), cols);
        Ok(Self { projected: mat(3 * s.inner + 2 * s.mlp)?, attended: mat(s.inner)?, lse: Kept::lse(r, s)? })
    }

    /// What it is made of.
    #[must_use]
    pub fn mats(&self) -> [Mat; 3] {
        [self.projected, self.attended, self.lse]
    }

    /// The activations of a visit that leaves its parcel here, or finds it.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn activations(&self, r: &dyn Reserve, s: &Shape) -> Result<Activations> {
        let normed = joined(r, s, s.rows(), s.inner)?;
        let heads = rotated(r, s, self.projected)?;
        Ok(Activations { normed, projected: self.projected, heads, lse: self.lse, joined: r.mat(s.ty, s.rows(), s.inner + s.mlp)? })
    }
}

/// Memory of a visit.
#[derive(Debug, Clone, Copy)]
pub struct Space {
    normed: Mat,
    projected: Mat,
    heads: Heads,
    kept: Kept,
    joined: Mat,
    /// Output of `to_out`, its gradient (joined with that of its low-rank branch), and the gradient of `normed` (joined as that is), one after
    /// the other.
    out: Mat,
    low: Low,
    djoined: Mat,
    dheads: Heads,
}

impl Space {
    /// Reserves it.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn new(r: &dyn Reserve, s: &Shape) -> Result<Self> {
        Self::around(r, s, &Activations::new(r, s)?)
    }

    /// Reserves what is needed beside activations that have their place already.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn around(r: &dyn Reserve, s: &Shape, a: &Activations) -> Result<Self> {
        let (t, d, m) = (s.rows(), s.inner, s.mlp);
        let mat = |cols: usize| r.mat(s.ty, t, cols);
        Ok(Self {
            normed: a.normed,
            projected: a.projected,
            heads: a.heads,
            kept: Kept::new(r, s, a.lse)?,
            joined: a.joined,
            out: joined(r, s, t, d)?,
            low: Low(mat(s.rank)?, mat(s.rank)?),
            djoined: mat(d + m)?,
            dheads: Heads::new(r, s)?,
        })
    }
}

/// The views of a packed projection: queries, keys and values, then gate and value of the feed-forward part.
fn parts(p: Mat, s: &Shape) -> Result<(PackedHeads, Mat, Mat)> {
    let (d, m) = (s.inner, s.mlp);
    let heads = PackedHeads { q: p.columns(0, d)?, k: p.columns(d, d)?, v: p.columns(2 * d, d)? };
    Ok((heads, p.columns(3 * d, m)?, p.columns(3 * d + m, m)?))
}

/// Memory for rotated queries and keys, beside the values where the projection left them.
fn rotated(r: &dyn Reserve, s: &Shape, projected: Mat) -> Result<Heads> {
    let one = || r.mat(s.ty, s.rows(), s.inner);
    Ok(Heads { q: one()?, k: one()?, v: parts(projected, s)?.0.v })
}

/// The attention's side of what [`rotated`] reserves.
fn turned(heads: &Heads, s: &Shape) -> JointHeads {
    JointHeads { v: Ptr::NULL, ..joint(heads, s) }
}

/// The attention's side of `heads`.
pub(super) fn joint(heads: &Heads, s: &Shape) -> JointHeads {
    JointHeads { q: heads.q.ptr, k: heads.k.ptr, v: heads.v.ptr, strides: HeadStrides::token_major(s.tokens(), s.heads, s.head_dim) }
}

/// `stream += gate out`, `y` its rounding. The stream lies as all text rows, then all image rows; `y` and `out` in joint order.
fn add_to_stream(c: &Context<'_>, s: &Shape, y: Mat, stream: Mat, gate: Mat, out: Mat) -> Result<()> {
    if s.samples == 1 {
        return c.pass(|gpu| gpu.gated_stream(y, stream, None, gate, out));
    }
    for sample in 0..s.samples {
        let (first, gate) = (sample * s.tokens(), gate.rows(sample, 1)?);
        let image = s.text_rows() + sample * s.image;
        for (joint, at, rows) in [(first, sample * s.text, s.text), (first + s.text, image, s.image)] {
            let (y, stream, out) = (y.rows(joint, rows)?, stream.rows(at, rows)?, out.rows(joint, rows)?);
            c.pass(|gpu| gpu.gated_stream(y, stream, None, gate, out))?;
        }
    }
    Ok(())
}

impl Weights {
    fn norm(&self, s: &Shape, cond: &Conditioning) -> HeadNorm {
        HeadNorm {
            samples: s.samples,
            heads: s.heads,
            head_dim: s.head_dim,
            first_token: 0,
            weight_q: self.norm_q,
            weight_k: self.norm_k,
            cos: cond.cos,
            sin: cond.sin,
            eps: s.eps,
        }
    }

    fn up_to_out(&self, c: &Context<'_>, s: &Shape, w: &Space, cond: &Conditioning, h: Mat) -> Result<()> {
        let m = &cond.single;
        let normed = w.normed.columns(0, s.inner)?;
        c.pass(|gpu| gpu.ln_mod(normed, h, m.shift, m.scale, s.eps))?;
        self.project.forward_joined(c, w.projected, w.normed, w.low)?;
        let (packed, gate, value) = parts(w.projected, s)?;
        c.pass(|gpu| gpu.qk_norm_rope(turned(&w.heads, s), packed, &self.norm(s, cond)))?;
        attention::forward(c, w.joined.columns(0, s.inner)?, &w.heads, &w.kept)?;
        let hidden = w.joined.columns(s.inner, s.mlp)?;
        c.pass(|gpu| gpu.swiglu(hidden, gate, value))
    }

    /// Puts what the parcel lacks into it, at the end of a forward visit that was made around it.
    ///
    /// # Errors
    /// The engine's.
    pub fn pack(&self, c: &Context<'_>, s: &Shape, w: &Space, parcel: &Parcel) -> Result<()> {
        let attended = w.joined.columns(0, s.inner)?;
        c.pass(|gpu| gpu.cast(parcel.attended, attended))
    }

    /// What [`Self::up_to_out`] leaves, from a parcel: the same bytes, for the same operations made them.
    fn unpack(&self, c: &Context<'_>, s: &Shape, w: &Space, cond: &Conditioning, h: Mat, parcel: &Parcel) -> Result<()> {
        let m = &cond.single;
        let normed = w.normed.columns(0, s.inner)?;
        c.pass(|gpu| gpu.ln_mod(normed, h, m.shift, m.scale, s.eps))?;
        self.project.tail(c, w.normed)?;
        let (packed, gate, value) = parts(w.projected, s)?;
        let (attended, hidden) = (w.joined.columns(0, s.inner)?, w.joined.columns(s.inner, s.mlp)?);
        c.pass(|gpu| {
            gpu.qk_norm_rope(turned(&w.heads, s), packed, &self.norm(s, cond))?;
            gpu.cast(attended, parcel.attended)?;
            gpu.swiglu(hidden, gate, value)
        })
    }

    /// `y` from `h`, both `[B T, D]`; with a residual stream, the block's output is added to that and `y` is its rounding.
    ///
    /// # Errors
    /// The engine's.
    pub fn forward(
        &self,
        c: &Context<'_>,
        s: &Shape,
        w: &Space,
        cond: &Conditioning,
        (y, stream): (Mat, Option<Mat>),
        h: Mat,
    ) -> Result<()> {
        self.up_to_out(c, s, w, cond, h)?;
        let out = w.out.columns(0, s.inner)?;
        self.out.forward(c, out, w.joined, w.low)?;
        match stream {
            Some(stream) => add_to_stream(c, s, y, stream, cond.single.gate, out),
            None => c.pass(|gpu| gpu.gated_residual(y, h, cond.single.gate, out)),
        }
    }

    /// Adds the adapters' gradients, and turns `dh` from the gradient of the block's output into that of its input `h` if it is needed.
    ///
    /// # Errors
    /// The engine's.
    #[allow(clippy::too_many_arguments)] // the state of a visit
    pub fn backward(&self, c: &Context<'_>, s: &Shape, w: &Space, cond: &Conditioning, dh: Mat, h: Mat, how: Back<'_>) -> Result<()> {
        let need_input = how.need_input;
        let need_projected = need_input || self.project.adapted();
        match how.have {
            Have::Nothing => self.up_to_out(c, s, w, cond, h)?,
            Have::Parcel(parcel) => self.unpack(c, s, w, cond, h, parcel)?,
            Have::All => {}
        }
        let dout = w.out.columns(0, s.inner)?;
        c.pass(|gpu| gpu.gated_residual_bwd(dout, cond.single.gate, dh))?;
        self.out.backward_below(c, w.joined, w.out, need_projected.then_some(w.djoined), w.low)?;
        if !need_projected {
            return Ok(());
        }
        let (dattended, attended) = (w.djoined.columns(0, s.inner)?, w.joined.columns(0, s.inner)?);
        attention::backward(c, &w.dheads, dattended, attended, &w.heads, &w.kept)?;
        // In place: each value's gradient is written by the thread that has read it.
        let (packed, gate, value) = parts(w.projected, s)?;
        let dhidden = w.djoined.columns(s.inner, s.mlp)?;
        c.pass(|gpu| {
            gpu.qk_norm_rope_bwd(packed, joint(&w.dheads, s), packed, &self.norm(s, cond))?;
            gpu.swiglu_bwd(gate, value, dhidden, gate, value)
        })?;
        self.project.backward_joined(c, w.normed, w.projected, need_input.then_some(w.out), w.low)?;
        if !need_input {
            return Ok(());
        }
        c.pass(|gpu| gpu.ln_mod_bwd(dh, Some(dh), w.out.columns(0, s.inner)?, h, cond.single.scale, s.eps))
    }
}
