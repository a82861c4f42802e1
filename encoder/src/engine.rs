//! Captions and images in, the bytes of cache entries out: the part of the job that a machine without the cache can do.
//!
//! [`crate::run`] drives it for a local cache, [`crate::remote`] for a cache on another machine; both get the same bytes for the same
//! item. Captions go in passes over the encoder's weights: one, unless their hidden states outgrow memory and disk budget.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use candle_core::DType;
use serenity_protocol::config::DeviceKind;
use serenity_protocol::message::FromChild;
use serenity_protocol::model_path::ModelPaths;
use serenity_protocol::process::Process;
use serenity_protocol::slab::text_encoder::TextModel;
use serenity_protocol::{Error, Result};

use crate::pixels::Pixels;
use crate::text::{AnyTextEncoder, Embedding, Hidden, Task};
use crate::tokenizer::{Tokenizer, Tokens};
use crate::vae::packing::{Latents, Packing};
use crate::vae::{Half, Place, Vae};

/// Time between two progress messages.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// Time between two progress lines in the log.
const LOG_EVERY: Duration = Duration::from_secs(10);
/// Characters of a caption kept in its entry's metadata, for people who look into the cache.
const CAPTION_NOTE_CHARS: usize = 200;
/// Unreadable images named in one message.
const NAMED_MAX: usize = 10;
/// Part of a file system's free bytes that hidden states may take: the entries need about as much again.
const SPILL_PART: u64 = 3;

/// How much hidden states may take.
#[derive(Debug, Clone, Copy)]
pub struct HiddenBudget {
    /// In memory; more goes into a file.
    pub memory_bytes_max: usize,
    /// In that file; `None` is a third of the file system's free bytes. More goes into further passes over the weights.
    pub file_bytes_max: Option<usize>,
}

/// What every item is encoded with.
pub struct Engine<'a> {
    /// The model's parts.
    pub paths: &'a ModelPaths,
    /// Where to compute.
    pub device: DeviceKind,
    /// Where the VAE computes, and with how much memory.
    pub place: Place,
    /// Hidden states that an embedding is made of.
    pub hidden_states: [usize; 3],
    /// Tokens of a padded caption.
    pub max_length: usize,
    /// Side of an image in pixels.
    pub resolution: u32,
    /// Budget of a pass.
    pub budget: HiddenBudget,
    /// Folder for a pass's hidden states.
    pub scratch: &'a Path,
    /// Who is told of progress, and who asks to stop.
    pub process: &'a Process,
}

/// A caption to encode.
#[derive(Debug, Clone)]
pub struct CaptionWork {
    /// The caption.
    pub caption: String,
    /// Names it in messages.
    pub file: PathBuf,
}

/// An image to encode.
pub struct ImageWork {
    /// The caller's number of it.
    pub id: usize,
    /// Names it in messages.
    pub file: PathBuf,
    /// The image file's bytes.
    pub bytes: Vec<u8>,
}

/// Takes the bytes of a finished entry, by the number of its item.
pub type Finished<'a> = &'a mut dyn FnMut(usize, Vec<u8>) -> Result<()>;

fn part<'p>(path: Option<&'p Path>, what: &str) -> Result<&'p Path> {
    path.ok_or_else(|| Error::absent(format!("the model has no {what}")))
}

impl Engine<'_> {
    fn go_on(&self) -> Result<()> {
        self.process.tick();
        if self.process.stop_requested() { Err(self.process.interrupted()) } else { Ok(()) }
    }

    /// Encodes all captions; `finished` gets their entries at the end of the pass that they are in.
    ///
    /// # Errors
    /// [`Error::TryAgain`] when asked to stop; what loading and encoding report, and what `finished` returns.
    pub fn captions(&self, works: &[CaptionWork], finished: Finished) -> Result<()> {
        if works.is_empty() {
            return Ok(());
        }
        let tokenizer = Tokenizer::open(part(self.paths.tokenizer.as_deref(), "tokenizer")?)?;
        let model = TextModel::of(self.paths)?;
        let encoder = AnyTextEncoder::open(model, self.device, None, self.place.bytes_max, None)?;
        let dtype = encoder.dtype();
        let tokens = works.iter().map(|work| tokenize(&tokenizer, work, self.max_length)).collect::<Result<Vec<_>>>()?;
        let per_token = encoder.bytes_per_token(DType::BF16);
        let sizes: Vec<usize> = tokens.iter().map(|t| t.ids.len().saturating_mul(per_token)).collect();
        let notes = |caption: &str| {
            let start: String = caption.chars().take(CAPTION_NOTE_CHARS).collect();
            let rows = if matches!(model, TextModel::Slab { .. }) { " from int8 rows" } else { "" };
            let computed_in = format!("{}{rows}", format!("{dtype:?}").to_lowercase());
            [("caption", start), ("computed_in", computed_in), ("hidden_states", format!("{:?}", self.hidden_states))]
        };
        let depth = self.hidden_states.into_iter().max().unwrap_or(0);
        let mut meter = Meter::new(self.process, "caption layers", (works.len() * depth) as u64);
        for pass in self.passes(&sizes)? {
            let (Some(works), Some(tokens), Some(sizes)) = (works.get(pass.clone()), tokens.get(pass.clone()), sizes.get(pass.clone()))
            else {
                return Err(Error::invariant("a pass lies outside its captions"));
            };
            let in_memory = sizes.iter().sum::<usize>() <= self.budget.memory_bytes_max;
            let hidden = if in_memory { Hidden::Memory } else { Hidden::File(self.scratch.to_path_buf()) };
            let task = Task { states: self.hidden_states, max_length: self.max_length, keep: DType::BF16, hidden };
            let before = meter.done;
            let mut progress = |done: u64, _total: u64| {
                meter.set(before + done);
                self.go_on()
            };
            let mut sink = |index: usize, embedding: Embedding, pad: &Embedding| {
                self.process.tick();
                let work = works.get(index).ok_or_else(|| Error::invariant("an embedding without a caption"))?;
                finished(pass.start + index, embedding.to_entry(pad, self.max_length)?.to_bytes(&notes(&work.caption))?)
            };
            encoder.encode_to(tokens, tokenizer.pad_id(), &task, &mut progress, &mut sink)?;
        }
        Ok(())
    }

    /// One pass where memory or disk hold all hidden states.
    fn passes(&self, sizes: &[usize]) -> Result<Vec<std::ops::Range<usize>>> {
        let all = sizes.iter().fold(0usize, |sum, s| sum.saturating_add(*s));
        if all <= self.budget.memory_bytes_max {
            return Ok(passes(sizes.iter().copied(), usize::MAX));
        }
        let free = || -> Result<usize> {
            let stat = rustix::fs::statvfs(self.scratch).map_err(|e| Error::io("cannot ask for free space", self.scratch, e.into()))?;
            Ok(usize::try_from(stat.f_bavail.saturating_mul(stat.f_frsize) / SPILL_PART).unwrap_or(usize::MAX))
        };
        let file_max = self.budget.file_bytes_max.map_or_else(free, Ok)?;
        let passes = passes(sizes.iter().copied(), file_max.max(self.budget.memory_bytes_max));
        tracing::info!("hidden states of {} captions take {} MiB: on disk, in {} passes", sizes.len(), all >> 20, passes.len());
        Ok(passes)
    }

    /// Encodes the images that `next` gives until it gives `None`; `total` is for progress. `next` runs on a thread of its own, ahead of the
    /// VAE.
    ///
    /// # Errors
    /// [`Error::Data`] naming all images that cannot be decoded, after the others are done; [`Error::TryAgain`] when asked to stop; what
    /// loading, encoding, `next` and `finished` report.
    pub fn images(&self, total: usize, mut next: impl FnMut() -> Option<Result<ImageWork>> + Send, finished: Finished) -> Result<()> {
        let mut first = next();
        if first.is_none() {
            return Ok(());
        }
        let place = self.place;
        let batch = place.batch();
        let path = part(self.paths.vae.as_deref(), "VAE")?;
        let resolution = self.resolution;
        let mut meter = Meter::new(self.process, "images", total as u64);
        let unreadable = std::thread::scope(|scope| {
            // Decoding runs ahead by a batch or two while the VAE computes, and entries are written behind it.
            let (sender, pixels) = sync_channel(2 * batch);
            let (encoded, results) = sync_channel::<Encoded>(2);
            let thread = |name: &str| std::thread::Builder::new().name(name.into());
            let no_thread = |e| Error::absent("cannot start a thread").cause(e);
            thread("image reader")
                .spawn_scoped(scope, move || {
                    while let Some(work) = first.take().or_else(&mut next) {
                        if sender.send(work.map(|work| (work.id, decode(&work, resolution)))).is_err() {
                            return;
                        }
                    }
                })
                .map_err(no_thread)?;
            let vae = thread("VAE").spawn_scoped(scope, move || encode_all(path, place, &pixels, &encoded)).map_err(no_thread)?;
            loop {
                match results.recv_timeout(REPORT_EVERY) {
                    Ok(group) => {
                        let count = group.ids.len() as u64;
                        self.finish_group(group, finished)?;
                        meter.set(meter.done + count);
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                }
                self.go_on()?;
            }
            vae.join().map_err(|_| Error::invariant("the VAE's thread panicked"))?
        })?;
        all_readable(unreadable)
    }

    fn finish_group(&self, group: Encoded, finished: Finished) -> Result<()> {
        let notes = [("computed_in", "f32".to_string()), ("resolution", self.resolution.to_string())];
        for (id, entry) in group.ids.iter().zip(group.packing.entries(&group.latents)?) {
            finished(*id, entry.to_bytes(&notes)?)?;
        }
        Ok(())
    }
}

/// Images that went through the VAE together.
struct Encoded {
    ids: Vec<usize>,
    latents: Latents,
    packing: Arc<Packing>,
}

/// What the VAE's thread does until there are no more images or nobody takes its results; the images that could not be decoded.
fn encode_all(path: &Path, place: Place, pixels: &Receiver<Prepared>, encoded: &SyncSender<Encoded>) -> Result<Vec<Error>> {
    let vae = Vae::open(path, Half::Encoder, place)?;
    let mut unreadable = Vec::new();
    while let Some(group) = next_group(pixels, place.batch(), &mut unreadable)? {
        let images: Vec<&Pixels> = group.iter().map(|(_, pixels)| pixels).collect();
        let latents = vae.latents_of(&images)?;
        let ids = group.iter().map(|(id, _)| *id).collect();
        if encoded.send(Encoded { ids, latents, packing: vae.packing().clone() }).is_err() {
            break;
        }
    }
    Ok(unreadable)
}

fn tokenize(tokenizer: &Tokenizer, work: &CaptionWork, max_length: usize) -> Result<Tokens> {
    let tokens = tokenizer.encode(&work.caption, max_length).map_err(|e| e.at(&work.file))?;
    if tokens.cut > 0 {
        tracing::warn!(
            "the caption {} is too long: {} tokens with the template, the last {} are cut off (model.max_sequence_length is {max_length})",
            work.file.display(),
            tokens.ids.len() + tokens.cut,
            tokens.cut
        );
    }
    Ok(tokens)
}

fn decode(work: &ImageWork, resolution: u32) -> Result<Pixels> {
    let _span = tracing::trace_span!("read image").entered();
    Pixels::prepare(&work.bytes, &work.file, resolution)
}

/// An image, decoded or not; or what ended their coming.
type Prepared = Result<(usize, Result<Pixels>)>;

/// Up to `batch` readable images; `None` at the end. Images that cannot be decoded are collected, other errors end the run.
fn next_group(receiver: &Receiver<Prepared>, batch: usize, unreadable: &mut Vec<Error>) -> Result<Option<Vec<(usize, Pixels)>>> {
    let mut group = Vec::new();
    while group.len() < batch {
        match receiver.recv() {
            Ok(Ok((id, Ok(pixels)))) => group.push((id, pixels)),
            Ok(Ok((_, Err(e @ Error::Data(_))))) => unreadable.push(e),
            Ok(Ok((_, Err(e))) | Err(e)) => return Err(e),
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
pub(crate) struct Meter<'a> {
    process: &'a Process,
    unit: &'static str,
    pub done: u64,
    total: u64,
    started: Instant,
    sent: Option<Instant>,
    logged: Instant,
}

impl<'a> Meter<'a> {
    pub fn new(process: &'a Process, unit: &'static str, total: u64) -> Self {
        let now = Instant::now();
        let mut this = Self { process, unit, done: 0, total, started: now, sent: None, logged: now };
        this.set(0);
        this
    }

    pub fn set(&mut self, done: u64) {
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
}
