//! The job: plan, encode what is missing, write each entry whole or not at all.
//!
//! Images come first: a file that cannot be read is then known before the long part. A pass's entries are written when it ends, an image's
//! as soon as it is encoded; whatever interrupts the process, the next run goes on with what is missing then. Where several encoders fill one
//! folder, each claims an entry before it makes it, and waits at the end for those that others are making ([`serenity_protocol::cache::claims`]).

use std::cell::RefCell;
use std::sync::Mutex;
use std::time::Duration;

use serenity_protocol::cache::claims::{Claim, Claims};
use serenity_protocol::cache::{CachePlan, Check, Key, LatentItem, TextItem};
use serenity_protocol::config::Config;
use serenity_protocol::message::FromChild;
use serenity_protocol::model_path;
use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result, atomic_file, dataset};

use crate::engine::{CaptionWork, Engine, HiddenBudget, ImageWork};
use crate::remote;
use crate::vae::Place;

/// Time between two looks at entries that other encoders are making.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How to run.
#[derive(Debug, Clone, Copy)]
pub struct RunOptions {
    /// Which part of the work, for job arrays.
    pub shard: Shard,
    /// How hard to look at the entries that exist.
    pub check: Check,
    /// Memory and disk for the hidden states of a pass.
    pub budget: HiddenBudget,
}

/// Default of the memory for hidden states.
pub const HIDDEN_BYTES_MAX: usize = 4 << 30;

impl Default for RunOptions {
    fn default() -> Self {
        let budget = HiddenBudget { memory_bytes_max: HIDDEN_BYTES_MAX, file_bytes_max: None };
        Self { shard: Shard { index: 0, of: 1 }, check: Check::Changed, budget }
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
    match &config.encoder {
        None => run_with(config, options, process, None),
        Some(remote) => run_with(config, options, process, Some(&mut || remote::ssh::connect(remote))),
    }
}

/// As [`run`], with connections to another machine's encoder that `connect` opens instead of ssh; computes here without it.
///
/// # Errors
/// As [`run`].
pub fn run_with<'c>(config: &Config, options: RunOptions, process: &Process, connect: Option<Connect<'c>>) -> Result<Summary> {
    let samples = dataset::scan(&config.data)?;
    let paths = model_path::resolve(&config.model)?;
    let folder = &config.data.cache_dir;
    std::fs::create_dir_all(folder).map_err(|e| Error::io("cannot create the cache folder", folder, e))?;
    let plan = CachePlan::with_check(config, &paths, &samples, options.check)?;
    process.send(&FromChild::Ready);
    let mut missing = Missing::of(&plan, options.shard);
    let cached = plan.latents.iter().filter(|l| l.present).count() + plan.text.iter().filter(|t| t.present).count();
    let mut summary = Summary { cached, files_hashed: plan.files_hashed, ..Summary::default() };
    if !missing.is_empty() {
        let mut maker = match connect {
            Some(connect) => Maker::Elsewhere { config, plan: &plan, connect },
            None => Maker::Here(Engine {
                paths: &paths,
                device: config.device,
                place: Place::of(config),
                hidden_states: plan.hidden_states,
                max_length: plan.max_length,
                resolution: plan.resolution,
                budget: options.budget,
                scratch: folder,
                process,
            }),
        };
        let job = Job { claims: Claims::open(folder)?, process };
        loop {
            missing = job.round(&mut maker, missing, &mut summary)?;
            if missing.is_empty() {
                break;
            }
            job.wait_for_others(&mut missing)?;
        }
    }
    tracing::info!("{} captions and {} images encoded, {} entries were cached", summary.captions, summary.images, summary.cached);
    process.send(&FromChild::Done { files: Vec::new() });
    Ok(summary)
}

/// Opens a connection to another machine's encoder.
pub type Connect<'a> = &'a mut dyn FnMut() -> Result<remote::client::Link>;

/// Entries to be made.
pub(crate) struct Missing<'a> {
    pub images: Vec<&'a LatentItem>,
    pub captions: Vec<&'a TextItem>,
}

impl<'a> Missing<'a> {
    pub fn of(plan: &'a CachePlan, shard: Shard) -> Self {
        let mine = |position: usize, present: bool| !present && shard.takes(position);
        Self {
            images: plan.latents.iter().enumerate().filter(|(i, l)| mine(*i, l.present)).map(|(_, l)| l).collect(),
            captions: plan.text.iter().enumerate().filter(|(i, t)| mine(*i, t.present)).map(|(_, t)| t).collect(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.images.is_empty() && self.captions.is_empty()
    }
}

/// Who encodes.
enum Maker<'a, 'c> {
    /// This process.
    Here(Engine<'a>),
    /// The server on the other machine.
    Elsewhere { config: &'a Config, plan: &'a CachePlan, connect: Connect<'c> },
}

struct Job<'a> {
    claims: Claims,
    process: &'a Process,
}

impl<'a> Job<'a> {
    /// Encodes what can be claimed; the rest is what others are making.
    fn round(&self, maker: &mut Maker<'a, '_>, missing: Missing<'a>, summary: &mut Summary) -> Result<Missing<'a>> {
        match maker {
            Maker::Here(engine) => {
                let images = self.images(engine, &missing.images, summary)?;
                let captions = self.captions(engine, &missing.captions, summary)?;
                Ok(Missing { images, captions })
            }
            Maker::Elsewhere { config, plan, connect } => {
                let (images, busy_images) = self.claim(&missing.images, |item| &item.key, LatentItem::is_whole)?;
                let (captions, busy_captions) = self.claim(&missing.captions, |item| &item.key, TextItem::is_whole)?;
                let mine = Missing { images, captions };
                if !mine.is_empty() {
                    let fetched = remote::client::fetch(config, plan, &mine, connect, self.process)?;
                    summary.images += fetched.images;
                    summary.captions += fetched.captions;
                }
                mine.images
                    .iter()
                    .map(|item| &item.key)
                    .chain(mine.captions.iter().map(|item| &item.key))
                    .for_each(|key| self.claims.release(key));
                Ok(Missing { images: busy_images, captions: busy_captions })
            }
        }
    }

    /// Those of `items` that this process is to make, and those that others are making; neither those that are there by now.
    fn claim<T>(&self, items: &[&'a T], key: impl Fn(&'a T) -> &'a Key, is_whole: impl Fn(&T) -> bool) -> Result<(Vec<&'a T>, Vec<&'a T>)> {
        let (mut mine, mut busy) = (Vec::new(), Vec::new());
        for item in items {
            let key = key(item);
            match self.claims.claim(key)? {
                Claim::Busy => busy.push(*item),
                // Another encoder has made it since the plan.
                Claim::Mine if is_whole(item) => self.claims.release(key),
                Claim::Mine => mine.push(*item),
            }
        }
        Ok((mine, busy))
    }

    fn images(&self, engine: &Engine, items: &[&'a LatentItem], summary: &mut Summary) -> Result<Vec<&'a LatentItem>> {
        let busy = Mutex::new(Vec::new());
        let mut waiting = items.iter().enumerate();
        // An image is claimed just before it is read, so that several encoders share the images.
        let next = || {
            loop {
                let (id, item) = waiting.next()?;
                match self.claims.claim(&item.key) {
                    Ok(Claim::Busy) => busy.lock().map(|mut b| b.push(*item)).ok()?,
                    // Another encoder has made it since the plan.
                    Ok(Claim::Mine) if item.is_whole() => self.claims.release(&item.key),
                    Ok(Claim::Mine) => return Some(read_image(id, item)),
                    Err(e) => return Some(Err(e)),
                }
            }
        };
        engine.images(items.len(), next, &mut |id, bytes| {
            let item = items.get(id).ok_or_else(|| Error::invariant("a latent without an image"))?;
            atomic_file::write(&item.path, &bytes)?;
            self.claims.release(&item.key);
            summary.images += 1;
            Ok(())
        })?;
        busy.into_inner().map_err(|_| Error::invariant("the image reader panicked"))
    }

    fn captions(&self, engine: &Engine, items: &[&'a TextItem], summary: &mut Summary) -> Result<Vec<&'a TextItem>> {
        let (mine, busy) = self.claim(items, |item| &item.key, TextItem::is_whole)?;
        let works: Vec<CaptionWork> =
            mine.iter().map(|item| CaptionWork { caption: item.caption.clone(), file: item.caption_file.clone() }).collect();
        engine.captions(&works, &mut |index, bytes| {
            let item = mine.get(index).ok_or_else(|| Error::invariant("an embedding without a caption"))?;
            atomic_file::write(&item.path, &bytes)?;
            self.claims.release(&item.key);
            summary.captions += 1;
            Ok(())
        })?;
        Ok(busy)
    }

    /// Waits until one of the entries that others are making is there or nobody makes it any more.
    fn wait_for_others(&self, missing: &mut Missing) -> Result<()> {
        tracing::info!("other encoders are making {} entries", missing.images.len() + missing.captions.len());
        loop {
            self.process.tick();
            if self.process.stop_requested() {
                return Err(self.process.interrupted());
            }
            let before = missing.images.len() + missing.captions.len();
            missing.images.retain(|item| !item.is_whole());
            missing.captions.retain(|item| !item.is_whole());
            // A claim that can be had is ours until the round that follows.
            let free = RefCell::new(false);
            let look = |claim: Result<Claim>| claim.map(|c| *free.borrow_mut() |= c == Claim::Mine);
            missing.images.iter().try_for_each(|item| look(self.claims.claim(&item.key)))?;
            missing.captions.iter().try_for_each(|item| look(self.claims.claim(&item.key)))?;
            if missing.is_empty() || free.into_inner() || missing.images.len() + missing.captions.len() < before {
                return Ok(());
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// The image's bytes, if they are still those that the plan saw.
pub(crate) fn read_image(id: usize, item: &LatentItem) -> Result<ImageWork> {
    let bytes = std::fs::read(&item.image).map_err(|e| Error::io("cannot read the image", &item.image, e))?;
    if blake3::hash(&bytes).to_hex().as_str() != item.image_digest {
        return Err(Error::try_again("the image changed while the encoder ran").at(&item.image).advice("run the same command again"));
    }
    Ok(ImageWork { id, file: item.image.clone(), bytes })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

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
