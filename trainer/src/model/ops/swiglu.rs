//! SwiGLU: `m = silu(gate) value`, where the gate is the first half of the features.
//!
//! Backward, with `s = sigmoid(gate)`: `d gate = dm value s (1 + gate (1 - s))`, `d value = dm silu(gate)`.

use candle_core::{D, DType, Result, Tensor};

use super::cpu::{self, Rows};

/// `u [.., 2M]` (a view of a wider projection is fine) to `[.., M]`, in its dtype.
pub fn forward(u: &Tensor) -> Result<Tensor> {
    if !u.device().is_cpu() {
        return composed::forward(u);
    }
    let m = u.dim(D::Minus1)? / 2;
    let us = cpu::walkable(u)?;
    let us = Rows::of(&us)?;
    let us = us.reader()?;
    cpu::build(with_last(u, m), m, u, |i, y| {
        let (gate, value) = us(i).split_at(m);
        for ((y, gate), value) in y.iter_mut().zip(gate).zip(value) {
            *y = gate * cpu::sigmoid(*gate) * value;
        }
    })
}

/// The gradient of `u [.., 2M]` from `dm [.., M]`, in the dtype of `u`.
pub fn backward(u: &Tensor, dm: &Tensor) -> Result<Tensor> {
    if !u.device().is_cpu() {
        return composed::backward(u, dm);
    }
    let m = u.dim(D::Minus1)? / 2;
    let (us, dms) = (cpu::walkable(u)?, cpu::walkable(dm)?);
    let (us, dms) = (Rows::of(&us)?, Rows::of(&dms)?);
    let (us, dms) = (us.reader()?, dms.reader()?);
    cpu::build(u.shape().clone(), 2 * m, u, |i, du| {
        let (gate, value) = us(i).split_at(m);
        let (dgate, dvalue) = du.split_at_mut(m);
        for ((((dgate, dvalue), dm), gate), value) in dgate.iter_mut().zip(dvalue).zip(dms(i)).zip(gate).zip(value) {
            let s = cpu::sigmoid(*gate);
            *dgate = dm * value * s * (1.0 + gate * (1.0 - s));
            *dvalue = dm * gate * s;
        }
    })
}

fn with_last(t: &Tensor, last: usize) -> Vec<usize> {
    let mut dims = t.dims().to_vec();
    dims.pop();
    dims.push(last);
    dims
}

/// The same from operations of the tensor library: for devices without a kernel of their own, and what the tests compare with.
pub(super) mod composed {
    use super::*;

    pub fn forward(u: &Tensor) -> Result<Tensor> {
        let (gate, value) = halves(u)?;
        (gate.silu()? * value)?.to_dtype(u.dtype())
    }

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
}
