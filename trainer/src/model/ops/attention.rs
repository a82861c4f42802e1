//! Full attention without mask: `O = softmax(Q Kᵀ / sqrt(d)) V`.
//!
//! Backward, with `P` the softmax: `dV = Pᵀ dO`, `dP = dO Vᵀ`, `dS = P (dP - rowsum(dO O))`, `dQ = dS K / sqrt(d)`,
//! `dK = dSᵀ Q / sqrt(d)`. On the CPU `P` is materialised, tokens x tokens per head, and kept from the recomputed forward pass.

use candle_core::{D, DType, Result, Tensor};

use super::gemm;

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
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    let scores = (gemm::batched(&q, &k.t()?)?.to_dtype(DType::F32)? * scale)?;
    let probabilities = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(q.dtype())?;
    let output = gemm::batched(&probabilities, &v)?;
    Ok((output.clone(), Saved { q, k, v, probabilities, output }))
}

/// `(dq, dk, dv)` from the gradient of the output.
pub fn backward(saved: &Saved, dout: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    let Saved { q, k, v, probabilities, output } = saved;
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    let dv = gemm::batched(&probabilities.t()?, dout)?;
    let dp = gemm::batched(dout, &v.t()?)?.to_dtype(DType::F32)?;
    let row = (dout.to_dtype(DType::F32)? * output.to_dtype(DType::F32)?)?.sum_keepdim(D::Minus1)?;
    let ds = ((dp.broadcast_sub(&row)? * probabilities.to_dtype(DType::F32)?)? * scale)?.to_dtype(q.dtype())?;
    Ok((gemm::batched(&ds, k)?, gemm::batched(&ds.t()?, q)?, dv))
}
