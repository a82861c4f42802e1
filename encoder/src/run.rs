//! The job: plan, encode what is missing, write each entry whole or not at all.
//!
//! Images come first: a file that cannot be read is then known before the long part. Captions go in passes over the encoder's weights,
//! one pass unless their hidden states would outgrow [`RunOptions::hidden_bytes_max`]. A pass's entries are written when it ends, an
//! image's as soon as it is encoded; whatever interrupts the process, the next run goes on with what is missing then.

use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use serenity_protocol::cache::{CachePlan, Check, LatentItem, TextItem};
use serenity_protocol::config::Config;
use serenity_protocol::message::FromChild;
use serenity_protocol::model_path::{self, ModelPaths};
use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result, dataset};

use crate::pixels::Pixels;
use crate::tensor::{device, failed, text_dtype};
use crate::text::TextEncoder;
use crate::tokenizer::{Tokenizer, Tokens};
use crate::vae::{Half, Vae};

/// Time between two progress messages.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// Time between two progress lines in the log.
const LOG_EVERY: Duration = Duration::from_secs(10);
/// Characters of a caption kept in its entry's metadata, for people who look into the cache.
const CAPTION_NOTE_CHARS: usize = 200;
/// Images encoded together on a device that gains from it.
const DEVICE_BATCH: usize = 4;
/// Unreadable images named in one message.
const NAMED_MAX: usize = 10;

/// How to run.
#[derive(Debug, Clone, Copy)]
pub struct RunOptions {
    /// Which part of the work, for job arrays.
    pub shard: Shard,
    /// How hard to look at the entries that exist.
    pub check: Check,
    /// Memory for the hidden states of a pass.
    pub hidden_bytes_max: usize,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self { shard: Shard { index: 0, of: 1 }, check: Check::Changed, hidden_bytes_max: 4 << 30 }
    }
}

/// The part `index` (from 0) of `of` equal parts of the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Which, from 0.
    pub index: usize,
    /// Of how many.
    pub of: usize,
}

impl std::str::FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('/').and_then(|(i, n)| Some(Self { index: i.parse().ok()?, of: n.parse().ok()? }));
        parts.filter(|s| s.index < s.of).ok_or_else(|| format!("'{text}' is not i/n with i from 0 to n - 1"))
    }
}

impl Shard {
    fn takes(self, position: usize) -> bool {
        position % self.of == self.index
    }
}

/// What a run did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Captions encoded.
    pub captions: usize,
    /// Images encoded.
    pub images: usize,
    /// Entries that were there already.
    pub cached: usize,
    /// Files that were opened to tell which entries are needed; 0 when everything was known from the memo.
    pub files_hashed: usize,
}

/// Runs the job of `config`.
///
/// # Errors
/// [`Error::TryAgain`] when asked to stop or the disk is full; otherwise what scanning, planning, loading and encoding report.
pub fn run(config: &Config, options: RunOptions, process: &Process) -> Result<Summary> {
    let samples = dataset::scan(&config.data)?;
    let paths = model_path::resolve(&config.model)?;
    let folder = &config.data.cache_dir;
    std::fs::create_dir_all(folder).map_err(|e| Error::io("cannot create the cache folder", folder, e))?;
    let plan = CachePlan::with_check(config, &paths, &samples, options.check)?;
    process.send(&FromChild::Ready);
    let shard = options.shard;
    let mine = |position: usize, present: bool| !present && shard.takes(position);
    let images: Vec<&LatentItem> = plan.latents.iter().enumerate().filter(|(i, l)| mine(*i, l.present)).map(|(_, l)| l).collect();
    let captions: Vec<&TextItem> = plan.text.iter().enumerate().filter(|(i, t)| mine(*i, t.present)).map(|(_, t)| t).collect();
    let cached = plan.latents.iter().filter(|l| l.present).count() + plan.text.iter().filter(|t| t.present).count();
    let summary = Summary { captions: captions.len(), images: images.len(), cached, files_hashed: plan.files_hashed };
    let job = Job { config, plan: &plan, paths: &paths, process };
    job.encode_images(&images)?;
    job.encode_captions(&captions, options.hidden_bytes_max)?;
    tracing::info!("{} captions and {} images encoded, {} entries were cached", summary.captions, summary.images, summary.cached);
    process.send(&FromChild::Done { files: Vec::new() });
    Ok(summary)
}

struct Job<'a> {
    config: &'a Config,
    plan: &'a CachePlan,
    paths: &'a ModelPaths,
    process: &'a Process,
}

impl Job<'_> {
    fn part<'p>(&self, path: Option<&'p Path>, what: &str) -> Result<&'p Path> {
        path.ok_or_else(|| Error::absent(format!("the model has no {what}")))
    }

    fn go_on(&self) -> Result<()> {
        self.process.tick();
        if self.process.stop_requested() { Err(self.process.interrupted()) } else { Ok(()) }
    }

    fn encode_captions(&self, items: &[&TextItem], hidden_bytes_max: usize) -> Result<()> {
        if items.is_empty() {
            return Ok(());
        }
        let tokenizer = Tokenizer::open(self.part(self.paths.tokenizer.as_deref(), "tokenizer")?)?;
        let device = device(self.config.device)?;
        let dtype = text_dtype(&device);
        let encoder = TextEncoder::open(self.part(self.paths.text_encoder.as_deref(), "text encoder")?, device, dtype)?;
        let plan = self.plan;
        let tokens = items.iter().map(|item| tokenize(&tokenizer, item, plan.max_length)).collect::<Result<Vec<_>>>()?;
        let per_token = encoder.bytes_per_token(DType::BF16);
        let passes = passes(tokens.iter().map(|t| t.ids.len() * per_token), hidden_bytes_max);
        let notes = |caption: &str| {
            let start: String = caption.chars().take(CAPTION_NOTE_CHARS).collect();
            [
                ("caption", start),
                ("computed_in", format!("{dtype:?}").to_lowercase()),
                ("hidden_states", format!("{:?}", plan.hidden_states)),
            ]
        };
        let depth = plan.hidden_states.into_iter().max().unwrap_or(0);
        let mut meter = Meter::new(self.process, "caption layers", (items.len() * depth) as u64);
        for pass in passes {
            let (Some(items), Some(tokens)) = (items.get(pass.clone()), tokens.get(pass)) else {
                return Err(Error::invariant("a pass lies outside its captions"));
            };
            let before = meter.done;
            let mut progress = |done: u64, _total: u64| {
                meter.set(before + done);
                self.go_on()
            };
            let encoded = encoder.encode(tokens, tokenizer.pad_id(), plan.hidden_states, plan.max_length, DType::BF16, &mut progress)?;
            for (item, caption) in items.iter().zip(&encoded.captions) {
                caption.to_entry(&encoded.pad, plan.max_length)?.write(&item.path, &notes(&item.caption))?;
            }
        }
        Ok(())
    }

    fn encode_images(&self, items: &[&LatentItem]) -> Result<()> {
        if items.is_empty() {
            return Ok(());
        }
        // The VAE is small and its norms are sensitive: float32 on every device.
        let device = device(self.config.device)?;
        let batch = if device.is_cpu() { 1 } else { DEVICE_BATCH };
        let vae = Vae::open(self.part(self.paths.vae.as_deref(), "VAE")?, Half::Encoder, device, DType::F32)?;
        let resolution = self.plan.resolution;
        let mut meter = Meter::new(self.process, "images", items.len() as u64);
        let mut unreadable = Vec::new();
        std::thread::scope(|scope| {
            // Decoding runs ahead by a batch or two while the VAE computes.
            let (sender, receiver) = sync_channel(2 * batch);
            std::thread::Builder::new()
                .name("image reader".into())
                .spawn_scoped(scope, move || {
                    for item in items {
                        if sender.send((*item, read_image(item, resolution))).is_err() {
                            return;
                        }
                    }
                })
                .map_err(|e| Error::absent("cannot start a thread").cause(e))?;
            while let Some(group) = next_group(&receiver, batch, &mut unreadable)? {
                self.encode_group(&vae, &group)?;
                meter.set(meter.done + group.len() as u64);
                self.go_on()?;
            }
            Ok::<(), Error>(())
        })?;
        all_readable(unreadable)
    }

    fn encode_group(&self, vae: &Vae, group: &[(&LatentItem, Pixels)]) -> Result<()> {
        let tensors = group.iter().map(|(_, p)| p.to_tensor(vae.device(), vae.dtype())).collect::<Result<Vec<_>>>()?;
        let images = Tensor::cat(&tensors, 0).map_err(failed("joining images"))?;
        let notes = [("computed_in", format!("{:?}", vae.dtype()).to_lowercase()), ("resolution", self.plan.resolution.to_string())];
        for ((item, _), entry) in group.iter().zip(vae.encode(&images)?) {
            entry.write(&item.path, &notes)?;
        }
        Ok(())
    }
}

fn tokenize(tokenizer: &Tokenizer, item: &TextItem, max_length: usize) -> Result<Tokens> {
    let tokens = tokenizer.encode(&item.caption, max_length).map_err(|e| e.at(&item.caption_file))?;
    if tokens.cut > 0 {
        tracing::warn!(
            "the caption {} is too long: {} tokens with the template, the last {} are cut off (model.max_sequence_length is {max_length})",
            item.caption_file.display(),
            tokens.ids.len() + tokens.cut,
            tokens.cut
        );
    }
    Ok(tokens)
}

fn read_image(item: &LatentItem, resolution: u32) -> Result<Pixels> {
    let _span = tracing::trace_span!("read image").entered();
    let bytes = std::fs::read(&item.image).map_err(|e| Error::io("cannot read the image", &item.image, e))?;
    if blake3::hash(&bytes).to_hex().as_str() != item.image_digest {
        return Err(Error::try_again("the image changed while the encoder ran").at(&item.image).advice("run the same command again"));
    }
    Pixels::prepare(&bytes, &item.image, resolution)
}

type Prepared<'a> = (&'a LatentItem, Result<Pixels>);

/// Up to `batch` readable images; `None` at the end. Images that cannot be decoded are collected, other errors end the run.
fn next_group<'a>(
    receiver: &Receiver<Prepared<'a>>,
    batch: usize,
    unreadable: &mut Vec<Error>,
) -> Result<Option<Vec<(&'a LatentItem, Pixels)>>> {
    let mut group = Vec::new();
    while group.len() < batch {
        match receiver.recv() {
            Ok((item, Ok(pixels))) => group.push((item, pixels)),
            Ok((_, Err(e @ Error::Data(_)))) => unreadable.push(e),
            Ok((_, Err(e))) => return Err(e),
            Err(_) => break,
        }
    }
    Ok((!group.is_empty()).then_some(group))
}

/// All that is wrong with the images in one message, after the good ones were encoded.
fn all_readable(mut unreadable: Vec<Error>) -> Result<()> {
    if unreadable.len() <= 1 {
        return unreadable.pop().map_or(Ok(()), Err);
    }
    let named: Vec<String> = unreadable.iter().take(NAMED_MAX).map(ToString::to_string).collect();
    Err(Error::data(format!("{} images cannot be used", unreadable.len())).cause(named.join("\n")).advice("repair or remove these files"))
}

/// Splits items of those sizes into runs that stay within `max`; one item alone may exceed it.
fn passes(sizes: impl Iterator<Item = usize>, max: usize) -> Vec<std::ops::Range<usize>> {
    let (mut passes, mut start, mut sum, mut end) = (Vec::new(), 0, 0usize, 0);
    for size in sizes {
        if end > start && sum.saturating_add(size) > max {
            passes.push(start..end);
            (start, sum) = (end, 0);
        }
        sum = sum.saturating_add(size);
        end += 1;
    }
    if end > start {
        passes.push(start..end);
    }
    passes
}

/// Progress to the launcher and, rarely, to the log.
struct Meter<'a> {
    process: &'a Process,
    unit: &'static str,
    done: u64,
    total: u64,
    started: Instant,
    sent: Option<Instant>,
    logged: Instant,
}

impl<'a> Meter<'a> {
    fn new(process: &'a Process, unit: &'static str, total: u64) -> Self {
        let now = Instant::now();
        let mut this = Self { process, unit, done: 0, total, started: now, sent: None, logged: now };
        this.set(0);
        this
    }

    fn set(&mut self, done: u64) {
        self.done = done;
        if self.sent.is_none_or(|at| at.elapsed() >= REPORT_EVERY) || done == self.total {
            self.sent = Some(Instant::now());
            self.process.send(&FromChild::Work { unit: self.unit.to_string(), done, total: self.total });
        }
        if done > 0 && self.logged.elapsed() >= LOG_EVERY {
            self.logged = Instant::now();
            let left = self.started.elapsed().as_secs_f64() / done as f64 * (self.total - done) as f64;
            tracing::info!("{done} of {} {}, about {left:.0} s left", self.total, self.unit);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn passes_cover_every_item_once_within_the_budget() {
        assert_eq!(passes([3, 3, 3, 9, 1].into_iter(), 6), [0..2, 2..3, 3..4, 4..5]);
        assert_eq!(passes([1, 2, 3].into_iter(), 100), vec![0..3]);
        assert!(passes(std::iter::empty(), 1).is_empty());
        assert_eq!(passes([usize::MAX, usize::MAX].into_iter(), 1), [0..1, 1..2]);
    }

    #[test]
    fn shards_partition_the_work() {
        let shards: Vec<Shard> = (0..3).map(|i| format!("{i}/3").parse().unwrap()).collect();
        for position in 0..20 {
            assert_eq!(shards.iter().filter(|s| s.takes(position)).count(), 1);
        }
        for bad in ["3/3", "0/0", "1", "-1/2", "a/b"] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
    }
}
