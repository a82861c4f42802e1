//! Full attention without mask: `O = softmax(Q Kᵀ / sqrt(d)) V`.
//!
//! Backward, with `P` the softmax: `dV = Pᵀ dO`, `dP = dO Vᵀ`, `dS = P (dP - rowsum(dO O))`, `dQ = dS K / sqrt(d)`,
//! `dK = dSᵀ Q / sqrt(d)`. On the CPU everything is float32 inside, and `P` is materialised, tokens x tokens per head, and kept from the
//! recomputed forward pass; softmax and `dS` are computed in the memory of the scores and of `dP`.

use candle_core::{CpuStorage, D, DType, InplaceOp1, InplaceOp2, Layout, Result, Tensor};

use super::{cpu, gemm};

/// What the backward pass needs of the forward pass.
#[derive(Debug)]
pub struct Saved {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probabilities: Tensor,
    output: Tensor,
}

/// `q`, `k`, `v` `[B, H, T, d]`: the output of the same shape and dtype, and what [`backward`] needs.
pub fn forward(q: Tensor, k: Tensor, v: Tensor) -> Result<(Tensor, Saved)> {
    let dtype = q.dtype();
    let (q, k, v) =
        if q.device().is_cpu() { (q.to_dtype(DType::F32)?, k.to_dtype(DType::F32)?, v.to_dtype(DType::F32)?) } else { (q, k, v) };
    let scale = scale(&q)?;
    let scores = gemm::batched(&q, &k.t()?)?;
    let probabilities = if scores.device().is_cpu() {
        scores.inplace_op1(&Softmax { scale: scale as f32 })?;
        scores
    } else {
        composed::softmax(&scores, scale)?
    };
    let output = gemm::batched(&probabilities, &v)?;
    Ok((output.to_dtype(dtype)?, Saved { q, k, v, probabilities, output }))
}

/// `(dq, dk, dv)` from the gradient of the output, in its dtype.
pub fn backward(saved: &Saved, dout: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    let Saved { q, k, v, probabilities, output } = saved;
    let dtype = dout.dtype();
    let dout = dout.to_dtype(q.dtype())?;
    let scale = scale(q)?;
    let dv = gemm::batched(&probabilities.t()?, &dout)?;
    let dp = gemm::batched(&dout, &v.t()?)?;
    let ds = if dp.device().is_cpu() {
        dp.inplace_op2(probabilities, &SoftmaxBackward { scale: scale as f32 })?;
        dp
    } else {
        composed::softmax_backward(&dp, probabilities, &dout, output, scale)?
    };
    Ok((gemm::batched(&ds, k)?.to_dtype(dtype)?, gemm::batched(&ds.t()?, q)?.to_dtype(dtype)?, dv.to_dtype(dtype)?))
}

fn scale(q: &Tensor) -> Result<f64> {
    Ok(1.0 / (q.dim(D::Minus1)? as f64).sqrt())
}

/// Scores become probabilities, row by row.
struct Softmax {
    scale: f32,
}

impl InplaceOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, scores: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let width = layout.dims().last().copied().unwrap_or(1);
        cpu::for_rows(cpu::contiguous_mut(scores, layout)?, width, |_, row| {
            let max = cpu::max(row);
            row.iter_mut().for_each(|v| *v = cpu::exp((*v - max) * self.scale));
            let reciprocal = 1.0 / cpu::sum(row, |v| v);
            row.iter_mut().for_each(|v| *v *= reciprocal);
        });
        Ok(())
    }
}

/// dP becomes dS. `rowsum(dP P)` equals `rowsum(dO O)`.
struct SoftmaxBackward {
    scale: f32,
}

impl InplaceOp2 for SoftmaxBackward {
    fn name(&self) -> &'static str {
        "softmax-backward"
    }

    fn cpu_fwd(&self, dp: &mut CpuStorage, dp_layout: &Layout, p: &CpuStorage, p_layout: &Layout) -> Result<()> {
        let width = dp_layout.dims().last().copied().unwrap_or(1);
        let p = cpu::contiguous(p, p_layout)?;
        cpu::for_rows(cpu::contiguous_mut(dp, dp_layout)?, width, |i, dp| {
            let p = &p[i * width..(i + 1) * width];
            let row = cpu::dot(dp, p);
            dp.iter_mut().zip(p).for_each(|(dp, p)| *dp = (*dp - row) * p * self.scale);
        });
        Ok(())
    }
}

/// The same from operations of the tensor library: for devices without a kernel of their own, and what the tests compare with.
pub(super) mod composed {
    use super::*;

    pub fn softmax(scores: &Tensor, scale: f64) -> Result<Tensor> {
        candle_nn::ops::softmax_last_dim(&(scores.to_dtype(DType::F32)? * scale)?)?.to_dtype(scores.dtype())
    }

    pub fn softmax_backward(dp: &Tensor, p: &Tensor, dout: &Tensor, output: &Tensor, scale: f64) -> Result<Tensor> {
        let row = (dout.to_dtype(DType::F32)? * output.to_dtype(DType::F32)?)?.sum_keepdim(D::Minus1)?;
        ((dp.to_dtype(DType::F32)?.broadcast_sub(&row)? * p.to_dtype(DType::F32)?)? * scale)?.to_dtype(dp.dtype())
    }
}
