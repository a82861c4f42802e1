//! Mean squared error with its gradient, summed in a fixed order.
#![forbid(unsafe_code)]

use serenity_protocol::Result;

use super::{BLOCK, THREADS};
use crate::driver::Ptr;
use crate::gpu::Gpu;
use crate::mat::{Mat, Ty};

/// Most partial sums of a loss: bytes of its scratch memory are eight times this.
pub const MSE_PARTIALS: usize = 512;

impl Gpu {
    /// The `f64` at `loss` becomes the mean of `(prediction - target)²`; `gradient`, if given, `factor` times the mean's derivative, in a
    /// type that is not wider than the prediction's. `target` is float32, `scratch` has room for [`MSE_PARTIALS`] `f64`.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] if the shapes do not fit.
    pub fn mse(&self, loss: Ptr, gradient: Option<Mat>, prediction: Mat, target: Mat, factor: f64, scratch: Ptr) -> Result<()> {
        target.expect_shape("a target", Ty::F32, prediction.rows, prediction.cols)?;
        let kind = gradient.map_or(prediction.ty, |g| g.ty);
        gradient.unwrap_or(prediction).expect_shape("a gradient", kind, prediction.rows, prediction.cols)?;
        let count = prediction.len();
        let blocks = count.div_ceil(THREADS as usize).clamp(1, MSE_PARTIALS);
        let args = [
            scratch.into(),
            gradient.map_or(Ptr::NULL, |g| g.ptr).into(),
            gradient.map_or(0, |g| g.stride).into(),
            prediction.ptr.into(),
            prediction.stride.into(),
            target.ptr.into(),
            target.stride.into(),
            prediction.rows.into(),
            prediction.cols.into(),
            ((2.0 * factor / count as f64) as f32).into(),
        ];
        self.launch(&format!("mse_{}_{}", kind.name(), prediction.ty.name()), [blocks as u32, 1, 1], BLOCK, 0, &args)?;
        let args = [loss.into(), scratch.into(), blocks.into(), (1.0 / count as f64).into()];
        self.launch("sum_partials", [1, 1, 1], BLOCK, 0, &args)
    }
}
