//! SwiGLU: `m = silu(gate) value`, where the gate is the first half of the features.
//!
//! Backward, with `s = sigmoid(gate)`: `d gate = dm value s (1 + gate (1 - s))`, `d value = dm silu(gate)`.

use candle_core::{D, DType, Result, Tensor};

/// `u [.., 2M]` to `[.., M]`, in its dtype.
pub fn forward(u: &Tensor) -> Result<Tensor> {
    let (gate, value) = halves(u)?;
    (gate.silu()? * value)?.to_dtype(u.dtype())
}

/// The gradient of `u [.., 2M]` from `dm [.., M]`, in the dtype of `u`.
pub fn backward(u: &Tensor, dm: &Tensor) -> Result<Tensor> {
    let (gate, value) = halves(u)?;
    let dm = dm.to_dtype(DType::F32)?;
    let s = candle_nn::ops::sigmoid(&gate)?;
    let silu = (&gate * &s)?;
    // s (1 + gate (1 - s)) = s + silu (1 - s)
    let slope = ((&silu * s.affine(-1.0, 1.0)?)? + &s)?;
    let dgate = ((&dm * value)? * slope)?;
    Tensor::cat(&[dgate, (dm * silu)?], D::Minus1)?.to_dtype(u.dtype())
}

fn halves(u: &Tensor) -> Result<(Tensor, Tensor)> {
    let m = u.dim(D::Minus1)? / 2;
    Ok((u.narrow(D::Minus1, 0, m)?.to_dtype(DType::F32)?, u.narrow(D::Minus1, m, m)?.to_dtype(DType::F32)?))
}
