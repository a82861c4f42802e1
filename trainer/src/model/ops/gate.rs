//! Residual sums. Gated: `y = x + gate f`, per sample. Backward: `dx = dy`, `df = gate dy`; the gate comes from frozen weights.

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor};

use super::cpu::{self, Rows};

/// `x` and `f` `[B, T, D]`, `gate` `[B, 1, D]` float32: in the dtype of `x`, one rounding.
pub fn forward(x: &Tensor, gate: &Tensor, f: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::forward(x, gate, f);
    }
    let (_, t, d) = x.dims3()?;
    let (xs, gates, fs) = (cpu::walkable(x)?, cpu::walkable(gate)?, cpu::walkable(f)?);
    let (xs, gates, fs) = (Rows::of(&xs)?, Rows::of(&gates)?, Rows::of(&fs)?);
    let (xs, gates, fs) = (xs.reader()?, gates.reader()?, fs.reader()?);
    cpu::build(x.shape().clone(), d, x, |i, y| {
        for (((y, x), gate), f) in y.iter_mut().zip(xs(i)).zip(gates(i / t)).zip(fs(i)) {
            *y = x + gate * f;
        }
    })
}

/// The gradient of `f`, in its dtype.
pub fn backward(gate: &Tensor, dy: &Tensor) -> Result<Tensor> {
    if !dy.device().is_cpu() {
        return composed::backward(gate, dy);
    }
    let (_, t, d) = dy.dims3()?;
    let (gates, dys) = (cpu::walkable(gate)?, cpu::walkable(dy)?);
    let (gates, dys) = (Rows::of(&gates)?, Rows::of(&dys)?);
    let (gates, dys) = (gates.reader()?, dys.reader()?);
    cpu::build(dy.shape().clone(), d, dy, |i, df| {
        for ((df, dy), gate) in df.iter_mut().zip(dys(i)).zip(gates(i / t)) {
            *df = gate * dy;
        }
    })
}

/// `x + y` of equal shapes and dtypes, into the memory of `x`, which nobody else may hold.
pub fn add(x: Tensor, y: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() || x.dtype() != DType::F32 || !x.is_contiguous() || !y.is_contiguous() {
        return x + y;
    }
    x.inplace_op2(y, &Add)?;
    Ok(x)
}

struct Add;

impl InplaceOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, x_layout: &Layout, y: &CpuStorage, y_layout: &Layout) -> Result<()> {
        let (x, y) = (cpu::contiguous_mut(x, x_layout)?, cpu::contiguous(y, y_layout)?);
        const WIDTH: usize = 4096;
        let whole = x.len() - x.len() % WIDTH;
        let (head, tail) = x.split_at_mut(whole);
        cpu::for_rows(head, WIDTH, |i, row| row.iter_mut().zip(&y[i * WIDTH..]).for_each(|(x, y)| *x += y));
        tail.iter_mut().zip(&y[whole..]).for_each(|(x, y)| *x += y);
        Ok(())
    }
}

/// The same from operations of the tensor library: for devices without a kernel of their own, and what the tests compare with.
pub(super) mod composed {
    use super::*;

    pub fn forward(x: &Tensor, gate: &Tensor, f: &Tensor) -> Result<Tensor> {
        (x.to_dtype(DType::F32)? + f.to_dtype(DType::F32)?.broadcast_mul(gate)?)?.to_dtype(x.dtype())
    }

    pub fn backward(gate: &Tensor, dy: &Tensor) -> Result<Tensor> {
        dy.to_dtype(DType::F32)?.broadcast_mul(gate)?.to_dtype(dy.dtype())
    }
}
