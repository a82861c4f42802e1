//! The validation loss: the same images, noise and noise levels every time, so that only the adapters change it.
//!
//! Sample k of n is image k in scan order (starting over when there are fewer), with noise from (seed, k) and the noise level
//! `(k + 1/2) / n`: the levels cover (0, 1) evenly, whatever distribution the training draws from. The loss is the mean over samples.
#![forbid(unsafe_code)]

use serenity_protocol::geometry::TransformerGeometry;
use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result};

use crate::data::{HostBatch, Row, Samples, SigmaOf};
use crate::engine::StepEngine;
use crate::rng;

/// Samples in one pass over the blocks. Each pass moves all weights once; its memory is that of the hidden states of so many samples.
const PASS: usize = 16;

/// The fixed samples.
pub struct Validation {
    batches: Vec<HostBatch>,
}

impl Validation {
    /// Prepares `count` samples; `None` for 0.
    ///
    /// # Errors
    /// As [`HostBatch::new`].
    pub fn new(samples: &dyn Samples, geometry: &TransformerGeometry, count: usize, seed: u64) -> Result<Option<Self>> {
        let images = samples.repeats().len();
        if count == 0 || images == 0 {
            return Ok(None);
        }
        let row = |k: usize| Row {
            sample: k % images,
            sigma: SigmaOf::Fixed(((k as f64 + 0.5) / count as f64) as f32),
            noise: rng::stream(seed, "validation", k as u64, 0),
        };
        let batches = (0..count).map(|k| HostBatch::new(samples, geometry, vec![row(k)])).collect::<Result<_>>()?;
        Ok(Some(Self { batches }))
    }

    /// The mean loss with the engine's adapters.
    ///
    /// # Errors
    /// As [`StepEngine::losses`]; [`Error::Data`] if the loss is not finite.
    pub fn measure(&self, engine: &mut dyn StepEngine, process: &Process) -> Result<f64> {
        let _span = tracing::info_span!("validation").entered();
        let mut sum = 0.0;
        for pass in self.batches.chunks(PASS) {
            sum += engine.losses(pass, process)?.into_iter().sum::<f64>();
        }
        let mean = sum / self.batches.len() as f64;
        if !mean.is_finite() {
            return Err(Error::data("the validation loss is not finite")
                .found(mean)
                .advice("check the model's weights and the learning rate"));
        }
        Ok(mean)
    }
}
