//! Gated residual: `y = x + gate f`, per sample. Backward: `dx = dy`, `df = gate dy`; the gate comes from frozen weights.

use candle_core::{DType, Result, Tensor};

/// `x` and `f` `[B, T, D]`, `gate` `[B, 1, D]` float32: in the dtype of `x`, one rounding.
pub fn forward(x: &Tensor, gate: &Tensor, f: &Tensor) -> Result<Tensor> {
    (x.to_dtype(DType::F32)? + f.to_dtype(DType::F32)?.broadcast_mul(gate)?)?.to_dtype(x.dtype())
}

/// The gradient of `f`, in its dtype.
pub fn backward(gate: &Tensor, dy: &Tensor) -> Result<Tensor> {
    dy.to_dtype(DType::F32)?.broadcast_mul(gate)?.to_dtype(dy.dtype())
}
