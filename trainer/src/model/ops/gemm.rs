//! Matrix products. Every product of the model goes through here, so that one place decides precision and counts work.
//!
//! Names follow BLAS: `nt` is `X Wᵀ`, `nn` is `X W`, `tn` is `Xᵀ Y`. Activations have any number of leading dimensions, which are taken
//! as rows. The CPU has no bf16 product, so there operands are widened to float32 (exact) and the result is rounded once, which is
//! what a tensor core with float32 accumulators does too.

use candle_core::{DType, Result, Tensor};

/// `x [.., k]` times the transpose of `w [n, k]`: `[.., n]` in the dtype of `x`.
pub fn nt(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    by_rows(x, &w.t()?)
}

/// `x [.., k]` times `w [k, n]`: `[.., n]` in the dtype of `x`.
pub fn nn(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    by_rows(x, w)
}

/// The transpose of `x [.., m]` times `y [.., n]`, summed over all leading dimensions: `[m, n]` in float32.
///
/// This is the product of weight gradients: only [`super::linear`] calls it, and only for adapters.
pub fn tn(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (x, y) = (x.flatten_to(x.rank() - 2)?, y.flatten_to(y.rank() - 2)?);
    product(&x.t()?, &y)?.to_dtype(DType::F32)
}

/// Batched product of the last two dimensions, float32 or the operands' dtype as `product` says.
pub fn batched(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    product(x, y)
}

fn by_rows(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let rows = if x.rank() > 2 { x.flatten_to(x.rank() - 2)? } else { x.clone() };
    let mut shape = x.dims().to_vec();
    if let (Some(last), [.., n]) = (shape.last_mut(), w.dims()) {
        *last = *n;
    }
    product(&rows, w)?.reshape(shape)
}

fn product(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    #[cfg(test)]
    record::note(x.dims(), y.dims());
    if x.device().is_cpu() && x.dtype() != DType::F32 {
        return x.to_dtype(DType::F32)?.matmul(&y.to_dtype(DType::F32)?)?.to_dtype(x.dtype());
    }
    x.matmul(y)
}

/// Test builds remember the shape of every product of a thread.
#[cfg(test)]
pub mod record {
    use std::cell::RefCell;

    thread_local! {
        static PRODUCTS: RefCell<Vec<(usize, usize, usize)>> = const { RefCell::new(Vec::new()) };
    }

    pub(super) fn note(x: &[usize], y: &[usize]) {
        if let ([.., m, k], [.., n]) = (x, y) {
            PRODUCTS.with_borrow_mut(|p| p.push((*m, *n, *k)));
        }
    }

    /// The products (m, n, k) since the last call, of this thread.
    pub fn take() -> Vec<(usize, usize, usize)> {
        PRODUCTS.take()
    }
}
