//! A frozen linear on the device with an optional LoRA branch: [`crate::model::ops::linear`] on the engine.
//!
//! The matrix is INT8 with row scales, bf16 or float32. It is brought into the type of the activations (see [`super::tiles`]) and multiplied
//! piece by piece: by rows forward, by columns backward, so that no piece adds to another's result. The pieces depend on the matrix's shape
//! alone, so that a result does not depend on the form or place of the weights.
#![forbid(unsafe_code)]

use serenity_cuda::ops::rows::Int8Rows;
use serenity_cuda::{Gpu, Mat, Ptr, Ty};
use serenity_protocol::{Error, Result};

use super::attention::Engines;
use super::clock::{Clock, Phase};
use super::plan::{Reserve, Shape};
use super::tiles::{Beside, Part, Tiles};

/// What the operations of a visit share.
#[derive(Debug, Clone, Copy)]
pub struct Context<'c> {
    /// The device.
    pub gpu: &'c Gpu,
    /// The clock.
    pub clock: &'c Clock,
    /// Frozen matrices in the activations' type.
    pub tile: &'c Tiles,
    /// Type of the activations.
    pub ty: Ty,
    /// Attention for the micro-batch at work.
    pub attention: Option<&'c Engines>,
}

impl Context<'_> {
    /// Queues work of a phase on the compute stream.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn time<T>(&self, phase: Phase, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.clock.on(self.gpu, self.gpu.compute(), phase, work)
    }

    /// [`Phase::Elementwise`] work.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn pass(&self, work: impl FnOnce(&Gpu) -> Result<()>) -> Result<()> {
        self.time(Phase::Elementwise, || work(self.gpu))
    }

    /// [`Phase::Gemm`] work.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn product(&self, work: impl FnOnce(&Gpu) -> Result<()>) -> Result<()> {
        self.time(Phase::Gemm, || work(self.gpu))
    }
}

/// A frozen matrix `[out, in]` in device memory.
#[derive(Debug, Clone, Copy)]
pub enum Weight {
    /// bf16 or float32.
    Dense(Mat),
    /// Codes and scales; the second field is `in`, without padding.
    Int8(Int8Rows, usize),
}

impl Weight {
    /// `(out, in)`.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Weight::Dense(mat) => (mat.rows, mat.cols),
            Weight::Int8(rows, cols) => (rows.rows, *cols),
        }
    }

    /// Where it lies.
    pub(super) fn address(&self) -> Ptr {
        match self {
            Weight::Dense(mat) => mat.ptr,
            Weight::Int8(rows, _) => rows.codes,
        }
    }
}

/// The branch of a linear.
#[derive(Debug, Clone, Copy)]
pub struct Lora {
    /// `[r, in]` in the activations' type.
    pub a: Mat,
    /// `[out, r]` in the activations' type.
    pub b: Mat,
    /// Gradient sum of A, float32.
    pub da: Mat,
    /// Gradient sum of B, float32.
    pub db: Mat,
    /// `alpha / rank`.
    pub scale: f32,
}

/// A linear for the duration of a visit.
#[derive(Debug, Clone, Copy)]
pub struct Linear {
    /// Its matrix.
    pub weight: Weight,
    /// Its adapter.
    pub lora: Option<Lora>,
}

/// Two matrices `[tokens, r]` for what passes between the halves of a branch.
#[derive(Debug, Clone, Copy)]
pub struct Low(pub Mat, pub Mat);

impl Low {
    fn rows(self, rows: usize) -> Result<Self> {
        Ok(Self(self.0.rows(0, rows)?, self.1.rows(0, rows)?))
    }
}

/// A matrix `[rows, cols + rank]` for [`Linear::forward_joined`] and [`Linear::backward_joined`], rows at multiples of 16 bytes.
///
/// # Errors
/// If there is not so much left.
pub fn joined(r: &dyn Reserve, s: &Shape, rows: usize, cols: usize) -> Result<Mat> {
    let stride = (cols + s.rank).next_multiple_of(8);
    r.mat(s.ty, rows, stride)?.columns(0, cols + s.rank)
}

impl Linear {
    /// Whether it has an adapter.
    #[must_use]
    pub fn adapted(&self) -> bool {
        self.lora.is_some()
    }

    /// What [`Self::backward_below`] wants beside the matrix, for the products of the same visit that want nothing there.
    fn room(&self, c: &Context<'_>) -> Option<Beside> {
        self.lora.filter(|_| c.gpu.tuning().join).map(|lora| Beside::Below(lora.a))
    }

    /// `y [T, out]` from `x [T, in]`.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the shapes do not fit.
    pub fn forward(&self, c: &Context<'_>, y: Mat, x: Mat, low: Low) -> Result<()> {
        let (out, inner) = self.weight.shape();
        self.check("input", x, x.rows, inner)?;
        self.check("output", y, x.rows, out)?;
        let whole = (x.rows, out);
        let room = self.room(c);
        for rows in c.tile.by_rows(c, &self.weight, room) {
            let y = y.columns(rows.start, rows.len())?;
            let part = Part { rows, cols: 0..inner };
            c.tile.with(c, &self.weight, (None, room), &part, |weight| c.product(|gpu| gpu.gemm_nt_of(whole, y, x, weight, 1.0, 0.0)))?;
        }
        if let Some(lora) = self.lora {
            let low = low.rows(x.rows)?;
            c.product(|gpu| {
                gpu.gemm_nt(low.0, x, lora.a, lora.scale, 0.0)?;
                gpu.gemm_nt(y, low.0, lora.b, 1.0, 1.0)
            })?;
        }
        Ok(())
    }

    /// Adds the adapter's gradients; writes the gradient of `x` to `dx` (or adds it, if `add`). `x` is read only where there is an adapter,
    /// and before `dx` is written.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the shapes do not fit.
    pub fn backward(&self, c: &Context<'_>, x: Mat, dy: Mat, dx: Option<Mat>, add: bool, low: Low) -> Result<()> {
        let (out, inner) = self.weight.shape();
        self.check("output's gradient", dy, dy.rows, out)?;
        let low = low.rows(dy.rows)?;
        if let Some(lora) = &self.lora {
            self.adapter_gradients(c, lora, x, dy, low)?;
        }
        let Some(dx) = dx else { return Ok(()) };
        self.check("input's gradient", dx, dy.rows, inner)?;
        let beta = if add { 1.0 } else { 0.0 };
        let (whole, room) = ((dy.rows, inner), self.room(c));
        for cols in c.tile.by_columns(c, &self.weight, room) {
            let dx = dx.columns(cols.start, cols.len())?;
            let part = Part { rows: 0..out, cols };
            c.tile
                .with(c, &self.weight, (None, room), &part, |weight| c.product(|gpu| gpu.gemm_nn_of(whole, dx, dy, weight, 1.0, beta)))?;
        }
        match self.lora {
            Some(lora) => c.product(|gpu| gpu.gemm_nn(dx, low.0, lora.a, 1.0, 1.0)),
            None => Ok(()),
        }
    }

    /// `y [T, out]` from `xt`, a [`joined`] matrix with `[T, in]` in front. Its tail becomes `x Aᵀ`, so that one product with the frozen matrix
    /// and B beside each other gives the sum of both: `y` is written once and never read.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the shapes do not fit.
    pub fn forward_joined(&self, c: &Context<'_>, y: Mat, xt: Mat, low: Low) -> Result<()> {
        let (out, inner) = self.weight.shape();
        let x = xt.columns(0, inner)?;
        let Some(lora) = self.lora.filter(|_| c.gpu.tuning().join) else { return self.forward(c, y, x, low) };
        self.check("output", y, x.rows, out)?;
        self.tail(c, xt)?;
        let xt = xt.columns(0, inner + lora.a.rows)?;
        let whole = (x.rows, out);
        let beside = Some(Beside::Behind(lora.b));
        for rows in c.tile.by_rows(c, &self.weight, beside) {
            let y = y.columns(rows.start, rows.len())?;
            let part = Part { rows, cols: 0..inner };
            c.tile
                .with(c, &self.weight, (beside, None), &part, |weight| c.product(|gpu| gpu.gemm_nt_of(whole, y, xt, weight, 1.0, 0.0)))?;
        }
        Ok(())
    }

    /// Makes the tail of `xt` from what is in front of it, as [`Self::forward_joined`] does.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the shapes do not fit.
    pub fn tail(&self, c: &Context<'_>, xt: Mat) -> Result<()> {
        let (_, inner) = self.weight.shape();
        let Some(lora) = self.lora.filter(|_| c.gpu.tuning().join) else { return Ok(()) };
        let (x, tail) = (xt.columns(0, inner)?, xt.columns(inner, lora.a.rows)?);
        c.product(|gpu| gpu.gemm_nt(tail, x, lora.a, lora.scale, 0.0))
    }

    /// As [`Self::backward`], from the `xt` that [`Self::forward_joined`] has left, to the [`joined`] matrix `dxt` (its tail is only written).
    /// The product that gives the gradient of `x` gives that of `x Aᵀ` beside it, so that `dy` is read once less.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the shapes do not fit.
    pub fn backward_joined(&self, c: &Context<'_>, xt: Mat, dy: Mat, dxt: Option<Mat>, low: Low) -> Result<()> {
        let (out, inner) = self.weight.shape();
        let x = xt.columns(0, inner)?;
        let Some(lora) = self.lora.filter(|_| c.gpu.tuning().join) else {
            return self.backward(c, x, dy, dxt.map(|d| d.columns(0, inner)).transpose()?, false, low);
        };
        self.check("output's gradient", dy, x.rows, out)?;
        let rank = lora.a.rows;
        let hidden = xt.columns(inner, rank)?;
        let dhidden = match dxt {
            Some(dxt) => {
                let (whole, beside) = ((dy.rows, inner + rank), Some(Beside::Behind(lora.b)));
                for cols in c.tile.by_columns(c, &self.weight, beside) {
                    let width = cols.len() + if cols.end == inner { rank } else { 0 };
                    let dx = dxt.columns(cols.start, width)?;
                    let part = Part { rows: 0..out, cols };
                    let product = |weight| c.product(|gpu| gpu.gemm_nn_of(whole, dx, dy, weight, 1.0, 0.0));
                    c.tile.with(c, &self.weight, (beside, None), &part, product)?;
                }
                dxt.columns(inner, rank)?
            }
            None => {
                let dhidden = low.rows(dy.rows)?.0;
                c.product(|gpu| gpu.gemm_nn(dhidden, dy, lora.b, 1.0, 0.0))?;
                dhidden
            }
        };
        c.product(|gpu| {
            gpu.gemm_tn(lora.da, dhidden, x, lora.scale, 1.0)?;
            gpu.gemm_tn(lora.db, dy, hidden, 1.0, 1.0)
        })?;
        let Some(dxt) = dxt else { return Ok(()) };
        let dx = dxt.columns(0, inner)?;
        c.product(|gpu| gpu.gemm_nn(dx, dhidden, lora.a, lora.scale, 1.0))
    }

    /// As [`Self::backward`], from a [`joined`] matrix with the gradient of `y` in front. Its tail becomes `dy B`, so that one product with the frozen
    /// matrix and A below each other gives the sum of both: `dx` is written once and never read.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the shapes do not fit.
    pub fn backward_below(&self, c: &Context<'_>, x: Mat, dyt: Mat, dx: Option<Mat>, low: Low) -> Result<()> {
        let (out, inner) = self.weight.shape();
        let dy = dyt.columns(0, out)?;
        let (Some(lora), Some(dx)) = (self.lora.filter(|_| c.gpu.tuning().join), dx) else {
            return self.backward(c, x, dy, dx, false, low);
        };
        let tail = dyt.columns(out, lora.b.cols)?;
        self.adapter_gradients(c, &lora, x, dy, Low(tail, low.1))?;
        self.check("input's gradient", dx, dy.rows, inner)?;
        let dyt = dyt.columns(0, out + lora.b.cols)?;
        let (whole, beside) = ((dy.rows, inner), Some(Beside::Below(lora.a)));
        for cols in c.tile.by_columns(c, &self.weight, beside) {
            let dx = dx.columns(cols.start, cols.len())?;
            let part = Part { rows: 0..out, cols };
            c.tile
                .with(c, &self.weight, (beside, None), &part, |weight| c.product(|gpu| gpu.gemm_nn_of(whole, dx, dyt, weight, 1.0, 0.0)))?;
        }
        Ok(())
    }

    /// Adds the adapter's gradients, and leaves `dy B` and `x Aᵀ` in `low`, both scaled.
    fn adapter_gradients(&self, c: &Context<'_>, lora: &Lora, x: Mat, dy: Mat, low: Low) -> Result<()> {
        let (out, inner) = self.weight.shape();
        self.check("output's gradient", dy, dy.rows, out)?;
        self.check("input", x, dy.rows, inner)?;
        let low = low.rows(dy.rows)?;
        c.product(|gpu| {
            gpu.gemm_nn(low.0, dy, lora.b, lora.scale, 0.0)?;
            gpu.gemm_nt(low.1, x, lora.a, lora.scale, 0.0)?;
            gpu.gemm_tn(lora.da, low.0, x, 1.0, 1.0)?;
            gpu.gemm_tn(lora.db, dy, low.1, 1.0, 1.0)
        })
    }

    fn check(&self, what: &str, mat: Mat, rows: usize, cols: usize) -> Result<()> {
        if mat.rows == rows && mat.cols == cols {
            return Ok(());
        }
        Err(Error::invariant(format!("a linear's {what} does not fit")).expected(format!("{rows} x {cols}")).found(mat.describe()))
    }
}
