//! Attention of one micro-batch over its joint sequence: the one place that knows which kernel computes it.
//!
//! Queries, keys, values and output are matrices of one row per token, samples after each other, heads side by side in a row; views are fine.
//! The backward pass needs what the forward pass kept: the output, and the logarithm of the sum of exponentials of each row of scores.
#![forbid(unsafe_code)]

use serenity_cuda::attention::{Attention, AttentionShape, Gradients, Inputs, RowStrides};
use serenity_cuda::{Gpu, Mat, Ptr, Ty};
use serenity_protocol::{Error, Result};

use super::clock::Phase;
use super::linear::Context;
use super::plan::{Reserve, Shape};

/// Queries, keys, values, each `[B T, H d]`.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Queries.
    pub q: Mat,
    /// Keys.
    pub k: Mat,
    /// Values.
    pub v: Mat,
}

impl Heads {
    /// Memory for all three.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn new(r: &dyn Reserve, s: &Shape) -> Result<Self> {
        let one = || r.mat(s.ty, s.rows(), s.inner);
        Ok(Self { q: one()?, k: one()?, v: one()? })
    }
}

/// What forward keeps for backward, and the engine's workspace.
#[derive(Debug, Clone, Copy)]
pub struct Kept {
    /// Float32 `[B H, T]`.
    lse: Mat,
    workspace: Ptr,
}

impl Kept {
    /// Memory for the logarithms.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn lse(r: &dyn Reserve, s: &Shape) -> Result<Mat> {
        r.mat(Ty::F32, s.samples * s.heads, s.tokens())
    }

    /// With a workspace beside them.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn new(r: &dyn Reserve, s: &Shape, lse: Mat) -> Result<Self> {
        Ok(Self { lse, workspace: r.bytes(s.workspace)? })
    }
}

/// The attention of both kinds of block for one shape.
#[derive(Debug)]
pub struct Engines {
    /// Output and its gradient are matrices of their own.
    pub double: Attention,
    /// Output and its gradient are the first columns of wider matrices; values are columns of the packed projection.
    pub single: Attention,
}

impl Engines {
    /// Makes plans; `shape.workspace` is not looked at.
    ///
    /// # Errors
    /// As [`Attention::new`].
    pub fn new(gpu: &Gpu, s: &Shape) -> Result<Self> {
        let dense = AttentionShape::dense(s.samples, s.heads, s.tokens(), s.head_dim, s.ty);
        let wide = s.inner + s.mlp;
        let rows = RowStrides { out: wide, dout: wide, v: 3 * s.inner + 2 * s.mlp, ..dense.rows };
        Ok(Self { double: Attention::new(gpu, dense)?, single: Attention::new(gpu, AttentionShape { rows, ..dense })? })
    }

    /// Bytes of workspace of either.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        self.double.workspace_bytes().max(self.single.workspace_bytes())
    }
}

fn engine<'c>(c: &Context<'c>, out: Mat) -> Result<&'c Attention> {
    let engines = c.attention.ok_or_else(|| Error::invariant("a visit has no attention"))?;
    Ok(if out.stride == out.cols { &engines.double } else { &engines.single })
}

/// `out` from queries, keys and values.
///
/// # Errors
/// The engine's.
pub fn forward(c: &Context<'_>, out: Mat, heads: &Heads, kept: &Kept) -> Result<()> {
    let engine = engine(c, out)?;
    let inputs = Inputs { q: heads.q, k: heads.k, v: heads.v };
    c.time(Phase::Attention, || engine.forward(c.gpu, inputs, out, kept.lse, kept.workspace))
}

/// Gradients of queries, keys and values from that of the output.
///
/// # Errors
/// The engine's.
pub fn backward(c: &Context<'_>, to: &Heads, dout: Mat, out: Mat, heads: &Heads, kept: &Kept) -> Result<()> {
    let engine = engine(c, out)?;
    let inputs = Inputs { q: heads.q, k: heads.k, v: heads.v };
    let gradients = Gradients { dout, dq: to.q, dk: to.k, dv: to.v };
    c.time(Phase::Attention, || engine.backward(c.gpu, inputs, out, kept.lse, gradients, kept.workspace))
}
