//! What a run will do and need, known before anything starts: slab and cache state, adapters, memory, disk.
//!
//! The plan reads headers and folders only: no weight, no pixel. With a whole slab it does not open the transformer's checkpoint either,
//! which may be gone. It is shown first, so that a wrong target list or a ring that does not
//! fit costs seconds and not an hour. What makes the run impossible is kept in [`Plan::problems`] rather than returned at once: the
//! user sees the whole plan with it.
//!
//! Figures of memory are predictions by the formulas of [`memory`]; the trainer measures.

mod display;
pub mod memory;
mod pool;
mod slab;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::cache::CachePlan;
use crate::config::{Config, DeviceKind, MemoryStrategy, PayloadForm};
use crate::dataset;
use crate::error::{Error, Result};
use crate::geometry::TransformerGeometry;
use crate::model_path::{self, ModelPaths};
use crate::slab::Slab;
use crate::targets::{TargetMatch, match_targets};

use memory::product;

pub use display::human_bytes;
pub use memory::{Amount, MemoryPlan, RingMemory, available_memory};
pub use pool::PoolCost;
pub use slab::{SlabPlan, SlabState, slab_suffices};

/// Where an NVIDIA device shows, if there is one: Linux, and its guest under Windows.
const NVIDIA_DEVICES: [&str; 2] = ["/dev/nvidiactl", "/dev/dxg"];

/// Everything that is known before the run.
#[derive(Debug, Serialize)]
pub struct Plan {
    /// Name of the run.
    pub name: String,
    /// Configuration file.
    pub config: PathBuf,
    /// Where results go.
    pub output_dir: PathBuf,
    /// The base model.
    pub model: ModelPlan,
    /// The slab.
    pub slab: SlabPlan,
    /// The cache of embeddings and latents.
    pub cache: CacheSummary,
    /// The adapters.
    pub adapters: AdapterPlan,
    /// The training run.
    pub training: TrainingPlan,
    /// Predicted memory.
    pub memory: MemoryPlan,
    /// Predicted use of disks.
    pub disk: Vec<DiskPlan>,
    /// What the user should know, one line each.
    pub notices: Vec<String>,
    /// What makes the run impossible; the first decides the exit code.
    #[serde(serialize_with = "as_text")]
    pub problems: Vec<Error>,
}

fn as_text<S: serde::Serializer>(problems: &[Error], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(problems.iter().map(ToString::to_string))
}

/// The base model.
#[derive(Debug, Serialize)]
pub struct ModelPlan {
    /// Folder or file of the transformer.
    pub transformer: PathBuf,
    /// Double blocks.
    pub double_blocks: usize,
    /// Single blocks.
    pub single_blocks: usize,
    /// Inner dimension D.
    pub inner_dim: usize,
    /// Parameters in all.
    pub parameters: u64,
    /// Parameters in the blocks.
    pub block_parameters: u64,
}

/// The cache of embeddings and latents.
#[derive(Debug, Serialize)]
pub struct CacheSummary {
    /// Folder.
    pub folder: PathBuf,
    /// Images with captions (repeats not counted).
    pub samples: usize,
    /// Distinct captions.
    pub captions: usize,
    /// Captions without an embedding.
    pub captions_missing: usize,
    /// Distinct images.
    pub images: usize,
    /// Images without a latent.
    pub images_missing: usize,
}

impl TrainingPlan {
    fn of(config: &Config) -> Self {
        let side = config.resolution as usize / 16;
        Self {
            steps: config.max_steps,
            batch_size: config.batch_size,
            accumulation: config.gradient_accumulation_steps,
            resolution: config.resolution,
            image_tokens: side * side,
            text_tokens: config.model.max_sequence_length,
            device: match config.device {
                DeviceKind::Cpu => "cpu".to_string(),
                DeviceKind::Cuda(n) => format!("cuda:{n}"),
            },
            strategy: match config.memory.strategy {
                MemoryStrategy::Stagehand => "stagehand",
                MemoryStrategy::Resident => "resident",
            },
            payload: match config.memory.stagehand.form {
                PayloadForm::Bf16 => "bf16",
                PayloadForm::Int8 => "int8",
            },
        }
    }
}

impl CacheSummary {
    fn of(cache: &CachePlan) -> Self {
        Self {
            folder: cache.folder.clone(),
            samples: cache.samples.len(),
            captions: cache.text.len(),
            captions_missing: cache.missing_text().count(),
            images: cache.latents.len(),
            images_missing: cache.missing_latents().count(),
        }
    }

    /// Whether the encoder has nothing to do.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.captions_missing == 0 && self.images_missing == 0
    }
}

/// The adapters.
#[derive(Debug, Serialize)]
pub struct AdapterPlan {
    /// Rank.
    pub rank: usize,
    /// Alpha.
    pub alpha: f64,
    /// Adapted linears.
    pub linears: usize,
    /// Trainable parameters.
    pub parameters: u64,
    /// Each entry of `target_modules` with the number of linears that it matched.
    pub entries: Vec<(String, usize)>,
}

/// The training run.
#[derive(Debug, Serialize)]
pub struct TrainingPlan {
    /// Optimiser steps.
    pub steps: u64,
    /// Samples in a micro-batch.
    pub batch_size: usize,
    /// Micro-batches in a step.
    pub accumulation: usize,
    /// Side of the images in pixels.
    pub resolution: u32,
    /// Image tokens of a sample.
    pub image_tokens: usize,
    /// Text tokens of a sample.
    pub text_tokens: usize,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// `stagehand` (blocks stream) or `resident`.
    pub strategy: &'static str,
    /// `bf16` or `int8`: what the ring carries.
    pub payload: &'static str,
}

/// Bytes to be written on one file system.
#[derive(Debug, Serialize)]
pub struct DiskPlan {
    /// A path on it.
    pub path: PathBuf,
    /// What is written: the slab, the cache.
    pub what: Vec<String>,
    /// Bytes needed, at most.
    pub needed_bytes: u64,
    /// Bytes free for this user.
    pub free_bytes: u64,
}

impl Plan {
    /// Plans the run of `config`.
    ///
    /// # Errors
    /// What stops the plan from being made at all: a missing model or data folder ([`Error::Absent`]), malformed model files, images
    /// without captions ([`Error::Data`]), targets that match nothing ([`Error::Config`]). Anything else is in [`Plan::problems`].
    pub fn new(config: &Config) -> Result<Self> {
        let paths = model_path::resolve(&config.model)?;
        let slab = slab::open(config);
        let geometry = slab::geometry(&paths, slab.as_ref())?;
        let targets = match_targets(&geometry, &config.adapter.targets)?;
        let samples = dataset::scan(&config.data)?;
        let cache = CachePlan::new(config, &paths, &samples)?;
        Self::assemble(config, &paths, &geometry, slab, &targets, &cache)
    }

    fn assemble(
        config: &Config,
        paths: &ModelPaths,
        geometry: &TransformerGeometry,
        slab: Option<Result<Slab>>,
        targets: &TargetMatch,
        cache: &CachePlan,
    ) -> Result<Self> {
        let mut problems = Vec::new();
        let mut notices = config.notices.clone();
        notices.extend(targets.notes.iter().cloned());
        let slab = slab::plan(config, geometry, slab, &mut problems)?;
        check_weights(cache, &mut problems);
        let parameters = targets.parameters(config.adapter.rank);
        let cache = CacheSummary::of(cache);
        notices.extend(no_device(config));
        let memory = memory::predict(config, geometry, paths, parameters, &cache, &mut notices, &mut problems)?;
        let disk = disk_plan(config, geometry, &slab, &cache, &mut notices, &mut problems);
        slab::check_original_size(config, geometry, &mut problems);
        let count = |shapes: &[(String, Vec<usize>)]| shapes.iter().map(|(_, s)| s.iter().map(|n| *n as u64).product::<u64>()).sum();
        Ok(Self {
            name: config.name.clone(),
            config: config.source.clone(),
            output_dir: config.output_dir.clone(),
            model: ModelPlan {
                transformer: paths.transformer.clone(),
                double_blocks: geometry.num_layers,
                single_blocks: geometry.num_single_layers,
                inner_dim: geometry.inner_dim(),
                parameters: count(&geometry.all_tensors()),
                block_parameters: memory::block_parameters(geometry),
            },
            slab,
            cache,
            adapters: AdapterPlan {
                rank: config.adapter.rank,
                alpha: config.adapter.alpha,
                linears: targets.linears.len(),
                parameters,
                entries: targets.per_entry.clone(),
            },
            training: TrainingPlan::of(config),
            memory,
            disk,
            notices,
            problems,
        })
    }
}

/// Entries that must be made need the weights that make them.
fn check_weights(cache: &CachePlan, problems: &mut Vec<Error>) {
    let [text, vae] = cache.weights_there;
    let missing =
        [("text encoder", "captions", text, cache.missing_text().count()), ("VAE", "images", vae, cache.missing_latents().count())];
    for (component, what, _, count) in missing.into_iter().filter(|(_, _, there, count)| !there && *count > 0) {
        problems.push(
            Error::absent(format!("{count} {what} are not in the cache, and the weights of the {component} are not there"))
                .at(&cache.folder)
                .advice("bring the weights back for this run, or take the new samples out of the data"),
        );
    }
}

/// That no NVIDIA device shows where one is asked for: before a slab of tens of gigabytes is built. No more than a notice, for where devices show
/// differs between containers.
fn no_device(config: &Config) -> Option<String> {
    let wanted = matches!(config.device, DeviceKind::Cuda(_)) && !NVIDIA_DEVICES.iter().any(|path| Path::new(path).exists());
    let text = || format!("train_device is \"cuda\", and this machine shows no NVIDIA device (none of {})", NVIDIA_DEVICES.join(", "));
    wanted.then(text)
}

/// What will be written, by file system.
fn disk_plan(
    config: &Config,
    geometry: &TransformerGeometry,
    slab: &SlabPlan,
    cache: &CacheSummary,
    notices: &mut Vec<String>,
    problems: &mut Vec<Error>,
) -> Vec<DiskPlan> {
    let side = u64::from(config.resolution / 16);
    let text =
        product(&[cache.captions_missing as u64, config.model.max_sequence_length as u64 + 1, geometry.joint_attention_dim as u64, 2]);
    let latents = product(&[cache.images_missing as u64, side, side, geometry.in_channels as u64, 4]);
    let cache_bytes = text.saturating_add(latents);
    let slab_bytes = if slab.state == SlabState::Missing { slab.bytes } else { 0 };
    let mut disks: Vec<(u64, DiskPlan)> = Vec::new();
    for (what, path, bytes) in [("slab", &slab.path, slab_bytes), ("cache", &cache.folder, cache_bytes)] {
        let Some((device, folder, free)) = file_system_of(path).filter(|_| bytes > 0) else { continue };
        match disks.iter_mut().find(|(d, _)| *d == device) {
            Some((_, disk)) => {
                disk.needed_bytes = disk.needed_bytes.saturating_add(bytes);
                disk.what.push(what.to_string());
            }
            None => disks.push((device, DiskPlan { path: folder, what: vec![what.to_string()], needed_bytes: bytes, free_bytes: free })),
        }
        // The slab's size is exact; the cache's is an upper bound, which short captions stay far below.
        if what == "slab" && bytes > free {
            problems.push(
                Error::try_again("the disk has no room for the slab")
                    .at(path)
                    .expected(format!("{} free", human_bytes(bytes)))
                    .found(human_bytes(free))
                    .advice("free some space, or put memory.stagehand.squareq_slab_path on another disk"),
            );
        }
    }
    for (_, disk) in &disks {
        if disk.needed_bytes > disk.free_bytes {
            let (needed, free) = (human_bytes(disk.needed_bytes), human_bytes(disk.free_bytes));
            notices.push(format!(
                "{} may need up to {needed} below {}, where {free} are free",
                disk.what.join(" and "),
                disk.path.display()
            ));
        }
    }
    disks.into_iter().map(|(_, disk)| disk).collect()
}

/// Device number, nearest existing folder and free bytes of the file system that `path` is or will be on.
fn file_system_of(path: &Path) -> Option<(u64, PathBuf, u64)> {
    use std::os::unix::fs::MetadataExt;
    let absolute = std::path::absolute(path).ok()?;
    let folder = absolute.ancestors().find(|p| p.is_dir())?;
    let device = std::fs::metadata(folder).ok()?.dev();
    Some((device, folder.to_path_buf(), free_bytes(folder)?))
}

/// Bytes that this user may still write below `folder`.
pub(crate) fn free_bytes(folder: &Path) -> Option<u64> {
    let fs = rustix::fs::statvfs(folder).ok()?;
    Some(fs.f_bavail.saturating_mul(fs.f_frsize))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::config::Overrides;

    /// FLUX.2 [dev] (spec/flux2.md 1.1).
    fn dev() -> TransformerGeometry {
        serde_json::from_str(
            r#"{"in_channels": 128, "num_layers": 8, "num_single_layers": 48, "attention_head_dim": 128, "num_attention_heads": 48,
                "joint_attention_dim": 15360, "axes_dims_rope": [32, 32, 32, 32]}"#,
        )
        .unwrap()
    }

    fn config(output_dir: &Path, stagehand: serde_json::Value) -> Config {
        let json = serde_json::json!({"model": {"path": "m"}, "data": {"concepts": ["d"]}, "name": "n", "output_dir": output_dir,
            "memory": {"stagehand": stagehand}});
        Config::from_json(&json.to_string(), "c.json".as_ref(), &Overrides::default()).unwrap()
    }

    #[test]
    fn a_full_disk_is_a_problem_for_the_slab_and_a_note_for_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path(), serde_json::json!({}));
        let cache = |missing| CacheSummary {
            folder: folder.path().join("cache"),
            samples: missing,
            captions: missing,
            captions_missing: missing,
            images: missing,
            images_missing: missing,
        };
        let slab = |bytes| SlabPlan { path: config.memory.slab_path.clone(), manifest: "m".into(), state: SlabState::Missing, bytes };
        let run = |bytes, missing| {
            let (mut notices, mut problems) = (Vec::new(), Vec::new());
            let disks = disk_plan(&config, &dev(), &slab(bytes), &cache(missing), &mut notices, &mut problems);
            (disks.len(), notices.len(), problems.iter().map(Error::exit_code).collect::<Vec<_>>())
        };
        assert_eq!(run(1, 1), (1, 0, vec![]));
        assert_eq!(run(1 << 60, 0), (1, 1, vec![75]));
        assert_eq!(run(1, 1 << 40), (1, 1, vec![]));
    }
}
