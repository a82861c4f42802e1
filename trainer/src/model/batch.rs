//! What goes into a step and what comes out.

use candle_core::Tensor;

use super::AdapterGrads;

/// One micro-batch: B samples of one resolution.
#[derive(Debug, Clone)]
pub struct MicroBatch {
    /// Noisy latent tokens `[B, S, C]`, `S = height * width`, row-major.
    pub noisy: Tensor,
    /// Text embeddings `[B, L, J]`.
    pub context: Tensor,
    /// Noise level of each sample in [0, 1]; the model sees it times 1000, in float32.
    pub sigma: Vec<f32>,
    /// Guidance scale, raw (not times 1000). Ignored by a model without guidance embedding.
    pub guidance: Option<f32>,
    /// Rows of the latent grid in tokens (pixels / 16).
    pub height: usize,
    /// Columns of the latent grid in tokens.
    pub width: usize,
    /// What the model should predict, noise minus data, `[B, S, C]` float32.
    pub target: Tensor,
}

/// Result of [`super::Flux2::loss_and_grads`].
#[derive(Debug)]
pub struct StepOutput {
    /// Mean squared error of each micro-batch.
    pub losses: Vec<f64>,
    /// Prediction of each micro-batch, `[B, S, C]` in the compute dtype.
    pub predictions: Vec<Tensor>,
    /// Gradients of the mean of `losses`.
    pub grads: AdapterGrads,
    /// Wall time of the forward pass up to the losses, waiting for blocks included, in seconds.
    pub forward_seconds: f64,
}
