//! Samples, and the micro-batches of a step.
//!
//! Everything in a batch is a function of (seed, step, micro-batch, row): which sample, its noise, its noise level. Nothing depends on
//! what was drawn before, so a resumed run sees what an uninterrupted one would have seen, and the batches of the next step can be
//! prepared by another thread while this one computes ([`Batches`]).
//!
//! An epoch visits every sample `repeats` times, in an order drawn from (seed, epoch); batches run on across the ends of epochs.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use candle_core::{Device, Tensor};
use half::bf16;
use serenity_protocol::cache::{CachePlan, LatentEntry, TextEntry};
use serenity_protocol::config::{Config, TimestepConfig};
use serenity_protocol::geometry::TransformerGeometry;
use serenity_protocol::{Error, Result};

use crate::model::{MicroBatch, tensor_error};
use crate::{rng, timestep};

/// Decoded cache entries are kept up to this many bytes; more are read again (and verified again) when needed.
const KEPT_BYTES_MAX: usize = 1 << 30;

/// The samples of a run, by index in scan order.
pub trait Samples: Send + Sync {
    /// How often each sample counts in an epoch, one entry a sample.
    fn repeats(&self) -> &[usize];
    /// The embedding of a sample's caption.
    ///
    /// # Errors
    /// [`Error::Data`] naming a corrupt file, [`Error::Absent`] naming a missing one, with the command that makes it.
    fn text(&self, sample: usize) -> Result<Arc<TextEntry>>;
    /// The latent of a sample's image.
    ///
    /// # Errors
    /// As [`Self::text`].
    fn latent(&self, sample: usize) -> Result<Arc<LatentEntry>>;
}

/// Samples from the encoder's cache.
pub struct CachedSamples {
    plan: CachePlan,
    repeats: Vec<usize>,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    bytes: usize,
    texts: HashMap<usize, Arc<TextEntry>>,
    latents: HashMap<usize, Arc<LatentEntry>>,
}

impl CachedSamples {
    /// Samples of a complete plan.
    ///
    /// # Errors
    /// [`Error::Absent`] naming missing entries and the command that makes them.
    pub fn new(plan: CachePlan, config: &Config) -> Result<Self> {
        let (texts, latents) = (plan.missing_text().count(), plan.missing_latents().count());
        if texts + latents > 0 {
            let one = plan.missing_text().map(|t| &t.caption_file).chain(plan.missing_latents().map(|l| &l.image)).next();
            return Err(Error::absent("the cache is not complete")
                .at(&plan.folder)
                .expected(format!("entries of {} captions and {} images", plan.text.len(), plan.latents.len()))
                .found(format!(
                    "{texts} captions and {latents} images are missing, one of them {}",
                    one.map_or(String::new(), |p| p.display().to_string())
                ))
                .advice(encoder_advice(config)));
        }
        let repeats = plan.samples.iter().map(|s| s.repeats).collect();
        Ok(Self { plan, repeats, kept: Mutex::default() })
    }

    /// Digest of what the samples are: the names of their entries, which are hashes of their content, with repeats, in order.
    #[must_use]
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for sample in &self.plan.samples {
            let text = self.plan.text.get(sample.text).map(|t| t.key.to_string());
            let latent = self.plan.latents.get(sample.latent).map(|l| l.key.to_string());
            hasher.update(format!("{text:?} {latent:?} {}\n", sample.repeats).as_bytes());
        }
        format!("{} images ({})", self.repeats.len(), &hasher.finalize().to_hex().as_str()[..16])
    }

    fn planned(&self, sample: usize) -> Result<(usize, usize)> {
        let found = self.plan.samples.get(sample).map(|s| (s.text, s.latent));
        found.ok_or_else(|| Error::invariant("a sample outside the data set was asked for").found(sample))
    }

    fn kept(&self) -> Result<std::sync::MutexGuard<'_, Kept>> {
        self.kept.lock().map_err(|_| Error::invariant("a thread panicked while it kept a cache entry"))
    }
}

/// What to run when the cache lacks something.
fn encoder_advice(config: &Config) -> String {
    format!("run `serenity-encoder --config {}` (serenity-launch does it by itself)", config.source.display())
}

impl Samples for CachedSamples {
    fn repeats(&self) -> &[usize] {
        &self.repeats
    }

    fn text(&self, sample: usize) -> Result<Arc<TextEntry>> {
        let index = self.planned(sample)?.0;
        if let Some(found) = self.kept()?.texts.get(&index) {
            return Ok(found.clone());
        }
        let entry = Arc::new(self.plan.read_text(index)?);
        let (bytes, mut kept) = (2 * (entry.rows.len() + entry.pad_row.len()), self.kept()?);
        if kept.bytes + bytes <= KEPT_BYTES_MAX {
            kept.bytes += bytes;
            kept.texts.insert(index, entry.clone());
        }
        Ok(entry)
    }

    fn latent(&self, sample: usize) -> Result<Arc<LatentEntry>> {
        let index = self.planned(sample)?.1;
        if let Some(found) = self.kept()?.latents.get(&index) {
            return Ok(found.clone());
        }
        let entry = Arc::new(self.plan.read_latent(index)?);
        let (bytes, mut kept) = (4 * entry.tokens.len(), self.kept()?);
        if kept.bytes + bytes <= KEPT_BYTES_MAX {
            kept.bytes += bytes;
            kept.latents.insert(index, entry.clone());
        }
        Ok(entry)
    }
}

/// Random samples of one size, for benchmarks and tests.
pub struct SyntheticSamples {
    repeats: Vec<usize>,
    texts: Vec<Arc<TextEntry>>,
    latents: Vec<Arc<LatentEntry>>,
}

impl SyntheticSamples {
    /// One sample for each entry of `repeats`, `height` x `width` image tokens and `length` text tokens (half of them real).
    #[must_use]
    pub fn new(geometry: &TransformerGeometry, repeats: Vec<usize>, height: usize, width: usize, length: usize, seed: u64) -> Self {
        let (channels, features) = (geometry.in_channels, geometry.joint_attention_dim);
        let real_tokens = length.div_ceil(2);
        let bf16s = |purpose: &str, i: usize, count: usize| {
            rng::normals(&mut rng::stream(seed, purpose, i as u64, 0), count).into_iter().map(bf16::from_f32).collect::<Vec<_>>()
        };
        let text = |i| {
            let rows = bf16s("synthetic text", i, real_tokens * features);
            Arc::new(TextEntry { real_tokens, max_length: length, features, rows, pad_row: bf16s("synthetic pad", 0, features) })
        };
        let latent = |i: usize| {
            let tokens = rng::normals(&mut rng::stream(seed, "synthetic latent", i as u64, 0), height * width * channels);
            Arc::new(LatentEntry { channels, height, width, tokens })
        };
        let count = repeats.len();
        Self { repeats, texts: (0..count).map(text).collect(), latents: (0..count).map(latent).collect() }
    }
}

impl Samples for SyntheticSamples {
    fn repeats(&self) -> &[usize] {
        &self.repeats
    }
    fn text(&self, sample: usize) -> Result<Arc<TextEntry>> {
        self.texts.get(sample).cloned().ok_or_else(|| Error::invariant("no such sample").found(sample))
    }
    fn latent(&self, sample: usize) -> Result<Arc<LatentEntry>> {
        self.latents.get(sample).cloned().ok_or_else(|| Error::invariant("no such sample").found(sample))
    }
}

/// The order in which samples are visited: position 0, 1, 2, ... of the whole run.
#[derive(Debug, Clone)]
pub struct SampleOrder {
    seed: u64,
    /// Each sample `repeats` times.
    epoch: Vec<usize>,
}

impl SampleOrder {
    /// The order of samples with these repeats.
    ///
    /// # Errors
    /// [`Error::Data`] if an epoch is empty.
    pub fn new(repeats: &[usize], seed: u64) -> Result<Self> {
        let epoch: Vec<usize> = repeats.iter().enumerate().flat_map(|(i, n)| std::iter::repeat_n(i, *n)).collect();
        if epoch.is_empty() {
            return Err(Error::data("there are no samples to train on"));
        }
        Ok(Self { seed, epoch })
    }

    /// Samples in an epoch, repeats counted.
    #[must_use]
    pub fn epoch_len(&self) -> usize {
        self.epoch.len()
    }

    /// The samples at `positions`.
    #[must_use]
    pub fn at(&self, positions: Range<u64>) -> Vec<usize> {
        let length = self.epoch.len() as u64;
        let mut drawn: Option<(u64, Vec<usize>)> = None;
        let mut samples = Vec::with_capacity((positions.end - positions.start) as usize);
        for position in positions {
            let (epoch, within) = (position / length, (position % length) as usize);
            let order = match drawn.take().filter(|(e, _)| *e == epoch) {
                Some((_, order)) => order,
                None => rng::permutation(&mut rng::stream(self.seed, "order", epoch, 0), self.epoch.len()),
            };
            samples.extend(order.get(within).and_then(|i| self.epoch.get(*i)));
            drawn = Some((epoch, order));
        }
        samples
    }
}

/// A micro-batch in host memory.
#[derive(Debug, Clone, PartialEq)]
pub struct HostBatch {
    rows: usize,
    height: usize,
    width: usize,
    channels: usize,
    text_tokens: usize,
    features: usize,
    noisy: Vec<f32>,
    target: Vec<f32>,
    context: Vec<bf16>,
    /// Noise level of each row.
    pub sigma: Vec<f32>,
}

/// One row of a micro-batch: which sample, its noise level, and the generator of its noise.
pub struct Row {
    /// Index of the sample.
    pub sample: usize,
    /// Its noise level.
    pub sigma: SigmaOf,
    /// Generator of the noise.
    pub noise: rng::ChaCha8Rng,
}

/// Where a row's noise level comes from.
pub enum SigmaOf {
    /// This level.
    Fixed(f32),
    /// That of this uniform value in (0, 1), shifted by the sample's number of tokens.
    Drawn(TimestepConfig, f64),
}

impl HostBatch {
    /// Puts rows together: `noisy = (1 - sigma) x0 + sigma e`, `target = e - x0`.
    ///
    /// # Errors
    /// What reading a sample reports; [`Error::Config`] for images of different sizes in one micro-batch; [`Error::Data`] for an entry
    /// that does not fit `geometry`.
    pub fn new(samples: &dyn Samples, geometry: &TransformerGeometry, rows: Vec<Row>) -> Result<Self> {
        let mut batch: Option<Self> = None;
        for mut row in rows {
            let (text, latent) = (samples.text(row.sample)?, samples.latent(row.sample)?);
            check_fit(geometry, &text, &latent)?;
            let sigma = match row.sigma {
                SigmaOf::Fixed(sigma) => sigma,
                SigmaOf::Drawn(config, uniform) => timestep::level(&config, latent.height * latent.width, uniform),
            };
            let noise = rng::normals(&mut row.noise, latent.tokens.len());
            let into = batch.get_or_insert_with(|| Self::empty(&text, &latent));
            if (into.height, into.width, into.text_tokens) != (latent.height, latent.width, text.max_length) {
                return Err(Error::config("images of different sizes meet in one micro-batch")
                    .expected(format!("{} x {} tokens", into.height, into.width))
                    .found(format!("{} x {} tokens", latent.height, latent.width))
                    .advice("set batch_size to 1 and gradient_accumulation_steps to the number of images in a step"));
            }
            into.rows += 1;
            into.sigma.push(sigma);
            into.context.extend(text.expand());
            into.noisy.extend(latent.tokens.iter().zip(&noise).map(|(x, e)| (1.0 - sigma) * x + sigma * e));
            into.target.extend(latent.tokens.iter().zip(&noise).map(|(x, e)| e - x));
        }
        batch.ok_or_else(|| Error::invariant("a micro-batch without samples"))
    }

    fn empty(text: &TextEntry, latent: &LatentEntry) -> Self {
        Self {
            rows: 0,
            height: latent.height,
            width: latent.width,
            channels: latent.channels,
            text_tokens: text.max_length,
            features: text.features,
            noisy: Vec::new(),
            target: Vec::new(),
            context: Vec::new(),
            sigma: Vec::new(),
        }
    }

    /// Image tokens of a row.
    #[must_use]
    pub fn image_tokens(&self) -> usize {
        self.height * self.width
    }

    /// Text tokens of a row, padding included.
    #[must_use]
    pub fn text_tokens(&self) -> usize {
        self.text_tokens
    }

    /// Image and text tokens of all rows together.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.rows * (self.height * self.width + self.text_tokens)
    }

    /// The same on `device`.
    ///
    /// # Errors
    /// What the device reports.
    pub fn to_device(&self, device: &Device, guidance: Option<f32>) -> Result<MicroBatch> {
        let image = (self.rows, self.height * self.width, self.channels);
        let moved = (|| {
            Ok::<_, candle_core::Error>((
                Tensor::from_slice(&self.noisy, image, device)?,
                Tensor::from_slice(&self.target, image, device)?,
                Tensor::from_slice(&self.context, (self.rows, self.text_tokens, self.features), device)?,
            ))
        })();
        let (noisy, target, context) = moved.map_err(|e| tensor_error("cannot place a micro-batch on the device", e))?;
        Ok(MicroBatch { noisy, context, sigma: self.sigma.clone(), guidance, height: self.height, width: self.width, target })
    }
}

fn check_fit(geometry: &TransformerGeometry, text: &TextEntry, latent: &LatentEntry) -> Result<()> {
    if latent.channels == geometry.in_channels && text.features == geometry.joint_attention_dim {
        return Ok(());
    }
    Err(Error::data("the cached samples are not for this transformer")
        .expected(format!("{} channels a latent token, {} features a text token", geometry.in_channels, geometry.joint_attention_dim))
        .found(format!("{} and {}", latent.channels, text.features))
        .advice("check that VAE, text encoder and transformer are of one model (model.path, model.vae_path, model.text_encoder_path)"))
}

/// What decides the batches of a run.
#[derive(Clone)]
pub struct BatchPlan {
    /// The samples.
    pub samples: Arc<dyn Samples>,
    /// Their order.
    pub order: SampleOrder,
    /// Shape of the model.
    pub geometry: TransformerGeometry,
    /// Seed of the run.
    pub seed: u64,
    /// Rows of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of a step.
    pub micro_batches: usize,
    /// How noise levels are drawn.
    pub timestep: TimestepConfig,
}

impl BatchPlan {
    /// The micro-batches of step `step` (1 is the first).
    ///
    /// # Errors
    /// As [`HostBatch::new`].
    pub fn step(&self, step: u64) -> Result<Vec<HostBatch>> {
        let rows = (self.batch_size * self.micro_batches) as u64;
        let first = step.saturating_sub(1) * rows;
        let samples = self.order.at(first..first + rows);
        let row = |(i, sample): (usize, &usize)| Row {
            sample: *sample,
            sigma: SigmaOf::Drawn(self.timestep, rng::unit(&mut rng::stream(self.seed, "sigma", step, i as u64))),
            noise: rng::stream(self.seed, "noise", step, i as u64),
        };
        let rows: Vec<(usize, &usize)> = samples.iter().enumerate().collect();
        rows.chunks(self.batch_size)
            .map(|chunk| HostBatch::new(&*self.samples, &self.geometry, chunk.iter().copied().map(row).collect()))
            .collect()
    }
}

/// The batches of successive steps; the next step's are prepared by a thread while the caller computes.
pub struct Batches {
    plan: BatchPlan,
    ahead: Option<(u64, JoinHandle<Result<Vec<HostBatch>>>)>,
}

impl Batches {
    /// Prepares nothing yet.
    #[must_use]
    pub fn new(plan: BatchPlan) -> Self {
        Self { plan, ahead: None }
    }

    /// Starts preparing `step`.
    ///
    /// # Errors
    /// [`Error::TryAgain`] if no thread can be started.
    pub fn prepare(&mut self, step: u64) -> Result<()> {
        let plan = self.plan.clone();
        let thread = std::thread::Builder::new()
            .name("batches".into())
            .spawn(move || plan.step(step))
            .map_err(|e| Error::try_again("cannot start a thread").cause(e))?;
        self.ahead = Some((step, thread));
        Ok(())
    }

    /// The batches of `step`, waiting for them if they were prepared, else making them now.
    ///
    /// # Errors
    /// As [`BatchPlan::step`].
    pub fn take(&mut self, step: u64) -> Result<Vec<HostBatch>> {
        match self.ahead.take() {
            Some((prepared, thread)) if prepared == step => {
                thread.join().map_err(|_| Error::invariant("the thread that prepares batches panicked"))?
            }
            _ => self.plan.step(step),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::test_support::{TINY, tiny};
    use proptest::prelude::*;
    use serenity_protocol::config::TimestepDistribution;

    fn plan(repeats: Vec<usize>, batch_size: usize, micro_batches: usize) -> BatchPlan {
        let geometry = tiny(&TINY);
        let order = SampleOrder::new(&repeats, 5).unwrap();
        let samples = Arc::new(SyntheticSamples::new(&geometry, repeats, 2, 3, 6, 1));
        let timestep = TimestepConfig { distribution: TimestepDistribution::LogitNormal, shift: 1.0, dynamic_shift: true };
        BatchPlan { samples, order, geometry, seed: 5, batch_size, micro_batches, timestep }
    }

    proptest! {
        #[test]
        fn every_epoch_visits_each_sample_as_often_as_it_repeats(
            repeats in proptest::collection::vec(1usize..4, 1..12), seed in any::<u64>(), start in 0u64..500,
        ) {
            let order = SampleOrder::new(&repeats, seed).unwrap();
            let length = order.epoch_len() as u64;
            for epoch in 0..3 {
                let mut counts = vec![0; repeats.len()];
                order.at(epoch * length..(epoch + 1) * length).into_iter().for_each(|s| counts[s] += 1);
                prop_assert_eq!(&counts, &repeats);
            }
            // Independent of where the run started: a range is the same whichever way it is cut.
            let whole = order.at(start..start + 30);
            let pieces: Vec<usize> = (start..start + 30).flat_map(|p| order.at(p..p + 1)).collect();
            prop_assert_eq!(whole, pieces);
        }
    }

    #[test]
    fn epochs_and_seeds_have_their_own_order() {
        let order = SampleOrder::new(&[1; 20], 5).unwrap();
        assert_ne!(order.at(0..20), order.at(20..40));
        assert_ne!(order.at(0..20), SampleOrder::new(&[1; 20], 6).unwrap().at(0..20));
        assert!(SampleOrder::new(&[], 5).is_err());
    }

    #[test]
    fn noise_and_target_obey_the_flow() {
        let plan = plan(vec![1, 1, 1], 2, 2);
        let batches = plan.step(4).unwrap();
        assert_eq!(batches.len(), 2);
        let samples = plan.order.at(12..16);
        for (b, batch) in batches.iter().enumerate() {
            let per_row = batch.noisy.len() / 2;
            for row in 0..2 {
                let x0 = plan.samples.latent(samples[2 * b + row]).unwrap();
                let s = batch.sigma[row];
                for i in 0..per_row {
                    // noisy = x0 + s * target
                    let expected = x0.tokens[i] + s * batch.target[row * per_row + i];
                    assert!((batch.noisy[row * per_row + i] - expected).abs() < 1e-5);
                }
                let context = &batch.context[row * batch.text_tokens * batch.features..][..batch.text_tokens * batch.features];
                assert_eq!(context, plan.samples.text(samples[2 * b + row]).unwrap().expand());
            }
        }
        let all: Vec<f32> = batches.iter().flat_map(|b| b.sigma.clone()).collect();
        assert!(all.windows(2).all(|w| w[0] != w[1]), "each row has its own noise level: {all:?}");
        assert_ne!(batches[0].target[..12], batches[1].target[..12]);
    }

    #[test]
    fn a_step_depends_on_nothing_before_it() {
        let mut ahead = Batches::new(plan(vec![2, 1], 1, 2));
        let mut sequence = Vec::new();
        for step in 1..=4 {
            sequence.push(ahead.take(step).unwrap());
            ahead.prepare(step + 1).unwrap();
        }
        for step in [3, 1, 4] {
            assert_eq!(Batches::new(plan(vec![2, 1], 1, 2)).take(step).unwrap(), sequence[step as usize - 1]);
        }
        assert_eq!(ahead.take(9).unwrap(), plan(vec![2, 1], 1, 2).step(9).unwrap(), "a step other than the prepared one");
    }

    #[test]
    fn batches_keep_their_noise_when_they_are_grouped_otherwise() {
        // Row i of a step has the same sample and noise whether it comes as 4 x 1, 2 x 2 or 1 x 4.
        let flat = |b, m| plan(vec![1; 5], b, m).step(2).unwrap().into_iter().flat_map(|x| x.noisy).collect::<Vec<_>>();
        assert_eq!(flat(4, 1), flat(2, 2));
        assert_eq!(flat(4, 1), flat(1, 4));
    }

    #[test]
    fn entries_of_another_model_are_refused() {
        let mut plan = plan(vec![1], 1, 1);
        plan.geometry.in_channels += 4;
        assert_eq!(plan.step(1).unwrap_err().exit_code(), 65);
    }
}
