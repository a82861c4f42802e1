//! Matrix products of row-major views, on the compute stream.
//!
//! Names follow BLAS as in the CPU model: `nt` is `X Wᵀ`, `nn` is `X W`, `tn` is `Xᵀ Y`. The library is column-major, where a row-major
//! matrix is its own transpose: each product is asked for as the transpose of the result, with the operands swapped. Sums are float32; the
//! inputs have one type, the output that or the other one. `out` must not overlap an input.
#![forbid(unsafe_code)]

use serenity_protocol::{Error, Result};

use crate::blas::{Shape, alignment};
use crate::gpu::Gpu;
use crate::mat::Mat;

impl Gpu {
    /// `out [m, n] = alpha a [m, k] bᵀ + beta out`, `b [n, k]`: activations times a weight.
    ///
    /// # Errors
    /// [`Error::Invariant`] for shapes or types that do not fit.
    pub fn gemm_nt(&self, out: Mat, a: Mat, b: Mat, alpha: f32, beta: f32) -> Result<()> {
        self.gemm("nt", out, a, b, alpha, beta, (a.rows, a.cols), (b.cols, b.rows), (true, false), None)
    }

    /// [`Self::gemm_nt`] by the algorithm that is chosen for a result of this size, of which `out` is a part: so an element depends on its row and
    /// column of the operands alone, bit for bit, and not on how many others are computed with it.
    ///
    /// # Errors
    /// [`Error::Invariant`] for shapes or types that do not fit.
    pub fn gemm_nt_of(&self, whole: (usize, usize), out: Mat, a: Mat, b: Mat, alpha: f32, beta: f32) -> Result<()> {
        self.gemm("nt", out, a, b, alpha, beta, (a.rows, a.cols), (b.cols, b.rows), (true, false), Some(whole))
    }

    /// `out [m, n] = alpha a [m, k] b [k, n] + beta out`: the gradient of activations.
    ///
    /// # Errors
    /// [`Error::Invariant`] for shapes or types that do not fit.
    pub fn gemm_nn(&self, out: Mat, a: Mat, b: Mat, alpha: f32, beta: f32) -> Result<()> {
        self.gemm("nn", out, a, b, alpha, beta, (a.rows, a.cols), (b.rows, b.cols), (false, false), None)
    }

    /// [`Self::gemm_nn`] as [`Self::gemm_nt_of`].
    ///
    /// # Errors
    /// [`Error::Invariant`] for shapes or types that do not fit.
    pub fn gemm_nn_of(&self, whole: (usize, usize), out: Mat, a: Mat, b: Mat, alpha: f32, beta: f32) -> Result<()> {
        self.gemm("nn", out, a, b, alpha, beta, (a.rows, a.cols), (b.rows, b.cols), (false, false), Some(whole))
    }

    /// `out [m, n] = alpha aᵀ b + beta out`, `a [k, m]`, `b [k, n]`: the gradient of an adapter.
    ///
    /// # Errors
    /// [`Error::Invariant`] for shapes or types that do not fit.
    pub fn gemm_tn(&self, out: Mat, a: Mat, b: Mat, alpha: f32, beta: f32) -> Result<()> {
        self.gemm("tn", out, a, b, alpha, beta, (a.cols, a.rows), (b.rows, b.cols), (false, true), None)
    }

    /// `(m, k)` and `(k2, n)` are the operands as they are multiplied; `transposed` says which of (b, a) the library transposes; the algorithm is that for
    /// a result of the size `whole` instead of `(m, n)`.
    #[allow(clippy::too_many_arguments)] // three products share this; a struct would only rename them
    fn gemm(
        &self,
        name: &str,
        out: Mat,
        a: Mat,
        b: Mat,
        alpha: f32,
        beta: f32,
        (m, k): (usize, usize),
        (k2, n): (usize, usize),
        transposed: (bool, bool),
        whole: Option<(usize, usize)>,
    ) -> Result<()> {
        let rows_apart = |mat: &Mat| mat.stride >= mat.cols;
        if k != k2 || (out.rows, out.cols) != (m, n) || a.ty != b.ty || ![out, a, b].iter().all(rows_apart) {
            let found = format!("out {}, a {}, b {}", out.describe(), a.describe(), b.describe());
            return Err(Error::invariant(format!("the operands of a product ({name}) do not fit")).found(found));
        }
        if out.is_empty() {
            return Ok(());
        }
        if k == 0 {
            return Err(Error::invariant(format!("a product ({name}) sums over nothing")).found(out.describe()));
        }
        let shape = Shape {
            transpose_a: transposed.0,
            transpose_b: transposed.1,
            m: n,
            n: m,
            // Turned like everything here.
            planned: whole.map_or((n, m), |(rows, cols)| (cols, rows)),
            k,
            strides: [b.stride, a.stride, out.stride],
            input: a.ty,
            output: out.ty,
            alignment: [alignment(b.ptr), alignment(a.ptr), alignment(out.ptr)],
        };
        self.blas.product(self.compute(), &shape, [b.ptr, a.ptr, out.ptr], alpha, beta)
    }
}
