//! The configuration, in two stages: JSON as written (`raw`, strict), then one validated object without Options to guess at.
//!
//! Every process reads the same file and ends with the same [`Config`]. Relative paths are relative to the working directory, as in
//! the original. Unknown keys, legacy layouts and keys whose meaning we do not have are errors, never silently dropped.

use std::path::PathBuf;

mod args;
mod json;
mod legacy;
mod neutral;
mod raw;
#[cfg(test)]
mod tests;
mod validate;

pub use args::OverrideArgs;

/// A validated training configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// File that it was read from.
    pub source: PathBuf,
    /// Name of the run: `name`, or the stem of the file. Names the LoRA file.
    pub name: String,
    /// Where results go: `checkpoint.output_dir`, `output_dir`, or `output/<name>`.
    pub output_dir: PathBuf,
    /// Base model.
    pub model: ModelConfig,
    /// LoRA.
    pub adapter: AdapterConfig,
    /// How frozen weights reach the device.
    pub memory: MemoryConfig,
    /// Images and captions.
    pub data: DataConfig,
    /// Where the encoder runs, if not here.
    pub encoder: Option<RemoteEncoder>,
    /// Side of the training images in pixels, a multiple of 16.
    pub resolution: u32,
    /// Samples in a micro-batch.
    pub batch_size: usize,
    /// Micro-batches in a step; all of them visit a block together.
    pub gradient_accumulation_steps: usize,
    /// Optimiser steps in the run.
    pub max_steps: u64,
    /// Seed of everything random.
    pub seed: u64,
    /// Device of encoder and trainer.
    pub device: DeviceKind,
    /// Type that the transformer computes in.
    pub dtype: ComputeDtype,
    /// Guidance scale fed to the model in training (dev only).
    pub guidance_scale: f64,
    /// How noise levels are drawn.
    pub timestep: TimestepConfig,
    /// Optimiser and peak learning rate.
    pub optimizer: OptimizerConfig,
    /// Learning-rate schedule.
    pub scheduler: SchedulerConfig,
    /// Saving and resuming.
    pub checkpoint: CheckpointConfig,
    /// Validation loss.
    pub validation: ValidationConfig,
    /// Steps between two progress lines where there is no terminal (`log_every_steps`); `None` = by time. `log.jsonl` has every step.
    pub log_every_steps: Option<u64>,
    /// What reading the file changed (rounded sizes and the like); shown once, with the plan.
    pub notices: Vec<String>,
}

/// The base model and its parts.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Folder in the Hugging Face layout, single file in the BFL naming, or hub id, as written (see [`crate::model_path`]).
    pub path: String,
    /// VAE folder or file, if not the model's own `vae/`.
    pub vae_path: Option<PathBuf>,
    /// Text encoder folder, if not the model's own `text_encoder/`.
    pub text_encoder_path: Option<PathBuf>,
    /// INT8 slab (`.safetensors`; manifest and companion beside it) that stands for the text encoder's weights, if any.
    pub text_encoder_slab_path: Option<PathBuf>,
    /// Tokenizer folder, if not the model's own `tokenizer/`.
    pub tokenizer_path: Option<PathBuf>,
    /// Indices into the text encoder's hidden states (0 = embeddings). Default: a quarter, a half and three quarters of its depth,
    /// which is 10, 20, 30 for dev's 40 layers.
    pub text_hidden_states: Option<[usize; 3]>,
    /// Text tokens per caption, padding included.
    pub max_sequence_length: usize,
}

/// The adapter to train.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// Rank r.
    pub rank: usize,
    /// Alpha; the branch is scaled by alpha / rank.
    pub alpha: f64,
    /// Which linears get an adapter.
    pub targets: Targets,
}

/// Which linears get an adapter (design: an entry matches a linear whose name ends in `.ENTRY` or `.ENTRY.0`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Targets {
    /// `"all-linear"`: every linear of every block.
    AllLinear,
    /// The entries as written.
    Entries(Vec<String>),
}

/// How frozen weights reach the device.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryConfig {
    /// `stagehand`: blocks stream through the ring. Otherwise the trainer reads the whole slab once and keeps it.
    pub strategy: MemoryStrategy,
    /// Slab file.
    pub slab_path: PathBuf,
    /// Its manifest.
    pub manifest_path: PathBuf,
    /// Ring size and device watermarks.
    pub stagehand: StagehandConfig,
}

/// `memory.strategy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryStrategy {
    /// Stream blocks through the ring.
    Stagehand,
    /// Everything stays on the device.
    Resident,
}

/// Where INT8 rows become bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PayloadForm {
    /// By the loader; the ring carries bf16 (`dequant: cpu`).
    Bf16,
    /// By the trainer; the ring carries INT8 rows and scales (`dequant: gpu`).
    Int8,
}

/// The StageHand keys.
#[derive(Debug, Clone, PartialEq)]
pub struct StagehandConfig {
    /// Payload bytes of the ring (`pinned_pool_mb`), a multiple of `chunk_bytes`; `None` (`auto`): the launcher chooses
    /// ([`crate::plan`]) and tells its children.
    pub pool_bytes: Option<u64>,
    /// Bytes of a slot (`ring_chunk_mb`, default 64 MiB or an eighth of a small pool), a multiple of 4096.
    pub chunk_bytes: u64,
    /// Hard cap of the process's device memory in bytes; `None` (`auto`): what the device has free, less a margin.
    pub vram_high_bytes: Option<u64>,
    /// Page-locked host memory for activations that need not be computed again (`activation_offload_mb`); `None` (`auto`): a quarter of
    /// what is available.
    pub activation_offload_bytes: Option<u64>,
    /// What eviction goes down to, in bytes; `None` where the cap is not known here.
    pub vram_low_bytes: Option<u64>,
    /// `dequant` after `auto` is resolved by the device.
    pub form: PayloadForm,
    /// Blocks requested ahead of the one in use, at most.
    pub prefetch_window_blocks: usize,
    /// Copies to the device in flight, at most.
    pub max_inflight_transfers: usize,
    /// Telemetry file and how many steps lie between two of its lines; `None` when off.
    pub telemetry: Option<TelemetryConfig>,
    /// Trainers that this run's loader feeds (`ring_consumers`).
    pub consumers: usize,
    /// Which of them this trainer is (`ring_consumer`), from 0.
    pub consumer: usize,
    /// Output folder of the run whose loader feeds this trainer (`ring_of`), if not this run's own.
    pub ring_of: Option<PathBuf>,
    /// Threads of the loader's dequantiser; 0 = all cores.
    pub loader_threads: usize,
    /// Steps of a block visit count NaN and Inf (`nan_inf_check`).
    pub nan_inf_check: bool,
    /// `pinned_slab_mb`, if given: divides the pool (checked), and must hold the largest block (checked in [`crate::plan`]).
    pub pinned_slab_bytes: Option<u64>,
}

/// Telemetry of the original (`telemetry_*`).
#[derive(Debug, Clone, PartialEq)]
pub struct TelemetryConfig {
    /// JSONL file.
    pub file: PathBuf,
    /// Steps between two summary lines in the log.
    pub interval_steps: u64,
}

/// Images and captions.
#[derive(Debug, Clone, PartialEq)]
pub struct DataConfig {
    /// Folders of images with captions, in order.
    pub concepts: Vec<Concept>,
    /// Cache folder of embeddings and latents; default `<output_dir>/cache`.
    pub cache_dir: PathBuf,
}

/// The encoder on another machine, reached over ssh (`encoder`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteEncoder {
    /// `user@machine`, or a name from ssh's own configuration.
    pub host: String,
    /// The program there; letters that a shell leaves alone.
    pub command: String,
    /// Port, if not ssh's.
    pub port: Option<u16>,
    /// Private key, if not ssh's choice.
    pub identity_file: Option<PathBuf>,
    /// Known host keys, if not ssh's own files.
    pub known_hosts_file: Option<PathBuf>,
    /// The model there, as `model.path`; the same as here if it is not given.
    pub model_path: Option<String>,
    /// Device there; `train_device` if it is not given.
    pub device: Option<DeviceKind>,
}

/// One folder of images with a caption file beside each.
#[derive(Debug, Clone, PartialEq)]
pub struct Concept {
    /// Folder.
    pub path: PathBuf,
    /// Ending of caption files, with the dot.
    pub caption_file_ext: String,
    /// How often each image counts in an epoch, at least 1.
    pub repeats: usize,
}

/// Device of encoder and trainer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// The processor.
    Cpu,
    /// A CUDA device by ordinal.
    Cuda(usize),
}

impl std::fmt::Display for DeviceKind {
    /// As `train_device` names it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// Type that the transformer computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ComputeDtype {
    /// float32
    F32,
    /// bfloat16
    Bf16,
}

/// How noise levels are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TimestepConfig {
    /// Distribution of u.
    pub distribution: TimestepDistribution,
    /// Constant shift; 1 = none. Used when `dynamic_shift` is off.
    pub shift: f64,
    /// Shift e^mu with mu linear in the number of image tokens (`spec/flux2.md` 4.2).
    pub dynamic_shift: bool,
}

/// Distribution of u before the shift.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimestepDistribution {
    /// sigmoid(N(0, 1)), also called logit-normal.
    LogitNormal,
    /// Uniform in (0, 1].
    Uniform,
}

/// The optimiser: AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// First-moment decay.
    pub beta1: f64,
    /// Second-moment decay.
    pub beta2: f64,
    /// Denominator offset.
    pub eps: f64,
    /// Largest global gradient norm; 0 = no clipping.
    pub max_grad_norm: f64,
}

/// Learning-rate schedule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SchedulerConfig {
    /// Shape after warm-up.
    pub kind: SchedulerKind,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Lowest factor of a decaying schedule.
    pub min_factor: f64,
    /// Cycles of a restarting schedule.
    pub num_cycles: f64,
}

/// Shape of the schedule after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SchedulerKind {
    /// 1
    Constant,
    /// 1 to `min_factor`, straight
    Linear,
    /// 1 to `min_factor`, half a cosine
    Cosine,
    /// `num_cycles` half cosines, each from 1
    CosineWithRestarts,
}

/// Saving and resuming.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckpointConfig {
    /// Steps between two checkpoints; 0 = only at the end and when stopped.
    pub save_every: u64,
    /// How many step checkpoints are kept; older ones are deleted after a newer one is safe. 0 = all.
    pub keep: usize,
    /// What to go on from.
    pub resume: Resume,
}

/// What to go on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// The newest valid checkpoint in the output folder, if any.
    Auto,
    /// Start over.
    Never,
    /// This file.
    Path(PathBuf),
}

/// Validation loss on a fixed set of (image, noise, sigma).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ValidationConfig {
    /// Samples; 0 = no validation.
    pub samples: usize,
    /// Steps between two measurements besides the first and the last; 0 = only these.
    pub every: u64,
}

/// What the command line changes in a configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// `--data DIR`: replaces `data.concepts`.
    pub data: Option<PathBuf>,
    /// `--steps N`: replaces `max_steps`.
    pub steps: Option<u64>,
    /// `--resume auto|never|PATH`.
    pub resume: Option<String>,
    /// `--set key=value`, dotted keys, JSON values (a bare word is a string).
    pub set: Vec<String>,
}
