//! The validation loss: the same images, noise and noise levels every time, so that only the adapters change it.
//!
//! Sample k of n is image k in scan order (starting over when there are fewer), with noise from (seed, k) and the noise level
//! `(k + 1/2) / n`: the levels cover (0, 1) evenly, whatever distribution the training draws from. The loss is the mean over samples.
#![forbid(unsafe_code)]

use serenity_protocol::geometry::TransformerGeometry;
use serenity_protocol::{Error, Result};

use crate::data::{HostBatch, Row, Samples, SigmaOf};
use crate::model::{AdapterSet, BlockSource, Flux2, MicroBatch};
use crate::rng;

/// Samples in one pass over the blocks. Each pass moves all weights once; its memory is that of the hidden states of so many samples.
const PASS: usize = 16;

/// The fixed samples.
pub struct Validation {
    batches: Vec<HostBatch>,
    guidance: Option<f32>,
}

impl Validation {
    /// Prepares `count` samples; `None` for 0.
    ///
    /// # Errors
    /// As [`HostBatch::new`].
    pub fn new(
        samples: &dyn Samples,
        geometry: &TransformerGeometry,
        count: usize,
        seed: u64,
        guidance: Option<f32>,
    ) -> Result<Option<Self>> {
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
        Ok(Some(Self { batches, guidance }))
    }

    /// The mean loss with `adapters`.
    ///
    /// # Errors
    /// As [`Flux2::loss`]; [`Error::Data`] if the loss is not finite.
    pub fn measure(&self, model: &Flux2, source: &mut dyn BlockSource, adapters: &AdapterSet) -> Result<f64> {
        let _span = tracing::info_span!("validation").entered();
        let mut sum = 0.0;
        for pass in self.batches.chunks(PASS) {
            let batches = pass.iter().map(|b| b.to_device(&model.device, self.guidance)).collect::<Result<Vec<MicroBatch>>>()?;
            sum += model.loss(source, adapters, &batches)?.into_iter().sum::<f64>();
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
