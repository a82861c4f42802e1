//! A frozen linear with an optional LoRA branch: `y = W x + s B (A x)`, `s = alpha / rank`.
//!
//! Backward, with `dh = s dy B`: `dx = dy W + dh A`, `dA = dhᵀ x`, `dB = s dyᵀ (A x)`. `W` is frozen: its gradient has no code. What the
//! backward pass needs of the forward pass is `x` alone.

use candle_core::{Result, Tensor};

use super::{gate, gemm};
use crate::model::AdapterGrads;

/// The branch of one linear for the duration of a block visit.
#[derive(Debug, Clone)]
pub struct Lora {
    /// Position in the [`crate::model::AdapterSet`].
    pub index: usize,
    /// `[r, in]` in the compute dtype.
    pub a: Tensor,
    /// `[out, r]` in the compute dtype.
    pub b: Tensor,
    /// `alpha / rank`.
    pub scale: f64,
}

/// A frozen weight `[out, in]` with its branch.
#[derive(Debug)]
pub struct Linear<'w> {
    /// Compute dtype.
    pub weight: &'w Tensor,
    /// The adapter, if this linear has one.
    pub lora: Option<Lora>,
}

impl Linear<'_> {
    /// Whether this linear has an adapter.
    #[must_use]
    pub fn adapted(&self) -> bool {
        self.lora.is_some()
    }

    /// `x [.., in]` to `[.., out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = gemm::nt(x, self.weight)?;
        match &self.lora {
            None => Ok(y),
            Some(lora) => gate::add(y, &gemm::nt(&(gemm::nt(x, &lora.a)? * lora.scale)?, &lora.b)?),
        }
    }

    /// From `dy [.., out]`: adds the adapter's gradients to `grads`, and returns `dx [.., in]` if `need_dx`. `x` is asked for only where
    /// there is a branch. Without a branch and without `need_dx` nothing is computed.
    pub fn backward(
        &self,
        x: impl FnOnce() -> Result<Tensor>,
        dy: &Tensor,
        need_dx: bool,
        grads: &mut AdapterGrads,
    ) -> Result<Option<Tensor>> {
        let Some(lora) = &self.lora else {
            return if need_dx { gemm::nn(dy, self.weight).map(Some) } else { Ok(None) };
        };
        let x = x()?;
        let dh = (gemm::nn(dy, &lora.b)? * lora.scale)?;
        let h = (gemm::nt(&x, &lora.a)? * lora.scale)?;
        accumulate(&mut grads.a, lora.index, gemm::tn(&dh, &x)?)?;
        accumulate(&mut grads.b, lora.index, gemm::tn(dy, &h)?)?;
        if !need_dx {
            return Ok(None);
        }
        gate::add(gemm::nn(dy, self.weight)?, &gemm::nn(&dh, &lora.a)?).map(Some)
    }
}

/// Adds to a float32 gradient. The order of calls (block visit, then micro-batch) is fixed, and with it the rounding.
fn accumulate(sums: &mut [Tensor], index: usize, gradient: Tensor) -> Result<()> {
    if let Some(sum) = sums.get_mut(index) {
        *sum = (&*sum + gradient)?;
    }
    Ok(())
}
