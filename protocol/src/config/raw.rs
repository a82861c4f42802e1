//! The JSON as written: one struct per section, every key of the original known, nothing else accepted.
//!
//! `deny_unknown_fields` on each struct is the single list of known keys; the message for an unknown one is made from serde's own
//! list ([`super::json`]). A field of type [`Unsupported`] is a key of the original with no meaning here: [`super::neutral`] accepts it
//! with the value that means "off" and refuses any other. These fields are private to the configuration, so the compiler reports one
//! that nobody looks at.

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer};

/// A key of the original that has no meaning here: kept as JSON for the check in [`super::neutral`].
pub(super) type Unsupported = Option<serde_json::Value>;

/// The root.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawConfig {
    pub name: Option<String>,
    pub model_type: Option<String>,
    pub training_method: Unsupported,
    pub resolution: Option<u32>,
    pub batch_size: Option<usize>,
    pub learning_rate: Option<f64>,
    pub max_steps: Option<u64>,
    pub max_train_steps: Option<u64>,
    pub gradient_accumulation_steps: Option<usize>,
    pub gradient_accumulation: Option<usize>,
    pub max_grad_norm: Option<f64>,
    pub seed: Option<u64>,
    pub train_device: Option<String>,
    pub train_dtype: Option<String>,
    pub output_dir: Option<PathBuf>,
    pub save_every: Option<u64>,
    pub save_every_n_steps: Option<u64>,
    pub log_every_steps: Option<u64>,
    pub guidance_scale: Option<f64>,
    pub timestep_shift: Option<f64>,
    pub dynamic_timestep_shifting: Option<bool>,
    pub timestep_distribution: Option<String>,
    pub resume_state: Option<PathBuf>,
    pub resume_from: Option<PathBuf>,
    pub resume_checkpoint: Option<PathBuf>,
    pub concepts: Option<Vec<RawConcept>>,
    pub bucket_policy_enabled: Option<bool>,
    #[serde(default)]
    pub model: RawModel,
    #[serde(default)]
    pub adapter: RawAdapter,
    #[serde(default)]
    pub memory: RawMemory,
    #[serde(default)]
    pub data: RawData,
    pub encoder: Option<RawEncoder>,
    #[serde(default)]
    pub optimizer: RawOptimizer,
    #[serde(default)]
    pub scheduler: RawScheduler,
    #[serde(default)]
    pub checkpoint: RawCheckpoint,
    #[serde(default)]
    pub validation: RawValidation,
    #[serde(default)]
    pub sample: RawSample,
    #[serde(default)]
    pub logging: RawLogging,
    #[serde(default)]
    pub distributed: RawDistributed,
    pub temp_device: Unsupported,
    pub output_dtype: Unsupported,
    pub save_full_model: Unsupported,
    pub cache_text_embeddings: Unsupported,
    pub ema_mode: Unsupported,
    pub ema_decay: Unsupported,
    pub quantization: Unsupported,
    pub blocks_to_swap: Unsupported,
    pub layer_offload_fraction: Unsupported,
    pub debug_memory: Unsupported,
    pub per_layer_lr: Unsupported,
    pub lora: Unsupported,
    pub dora: Unsupported,
    pub lokr: Unsupported,
    pub loha: Unsupported,
    pub locon: Unsupported,
    pub ia3: Unsupported,
    pub oft: Unsupported,
    pub boft: Unsupported,
    pub diag_oft: Unsupported,
    pub glora: Unsupported,
    pub dylora: Unsupported,
    pub lycoris: Unsupported,
}

/// `model`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawModel {
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub path: Option<String>,
    pub dtype: Option<String>,
    pub vae_path: Option<PathBuf>,
    pub text_encoder_path: Option<PathBuf>,
    pub text_encoder_slab_path: Option<PathBuf>,
    pub tokenizer_path: Option<PathBuf>,
    pub text_hidden_states: Option<[usize; 3]>,
    pub max_sequence_length: Option<usize>,
    pub text_encoder_model_name: Unsupported,
}

/// `adapter`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAdapter {
    pub rank: Option<usize>,
    pub network_dim: Option<usize>,
    pub alpha: Option<f64>,
    pub network_alpha: Option<f64>,
    pub target_modules: Option<RawTargets>,
    #[serde(rename = "type")]
    pub kind: Unsupported,
    pub dropout: Unsupported,
    pub rs_lora: Unsupported,
    pub multiplier: Unsupported,
    pub conv_rank: Unsupported,
    pub conv_alpha: Unsupported,
    pub rank_dropout: Unsupported,
    pub module_dropout: Unsupported,
    pub factor: Unsupported,
    pub decompose_both: Unsupported,
    pub use_tucker: Unsupported,
    pub full_matrix: Unsupported,
    pub weight_decompose: Unsupported,
    pub dora_wd: Unsupported,
    pub dora_on_output: Unsupported,
    pub block_size: Unsupported,
    pub constraint: Unsupported,
    pub rescaled: Unsupported,
    pub backend: Unsupported,
}

/// `memory`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawMemory {
    pub strategy: Option<String>,
    pub stagehand: Option<RawStagehand>,
    pub gradient_checkpointing: Unsupported,
    pub enable_activation_offloading: Unsupported,
    pub enable_async_offloading: Unsupported,
    pub layer_offload_fraction: Unsupported,
    pub blocks_to_swap: Unsupported,
    pub quantization: Unsupported,
    pub quantized_gpu_memory_gib: Unsupported,
}

/// `memory.stagehand`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawStagehand {
    pub stagehand_enabled: Option<bool>,
    /// A size or `auto`.
    pub pinned_pool_mb: Option<serde_json::Value>,
    pub pinned_slab_mb: Option<f64>,
    pub ring_chunk_mb: Option<f64>,
    /// A size or `auto`.
    pub vram_high_watermark_mb: Option<serde_json::Value>,
    /// A size, 0 for none, or `auto`.
    pub activation_offload_mb: Option<serde_json::Value>,
    pub ring_consumers: Option<usize>,
    pub ring_consumer: Option<usize>,
    pub ring_of: Option<PathBuf>,
    pub vram_low_watermark_mb: Option<f64>,
    pub max_inflight_transfers: Option<usize>,
    pub prefetch_window_blocks: Option<usize>,
    pub nan_inf_check: Option<bool>,
    pub telemetry_enabled: Option<bool>,
    pub telemetry_interval_steps: Option<u64>,
    pub telemetry_file: Option<PathBuf>,
    pub squareq_slab_path: Option<PathBuf>,
    pub squareq_manifest_path: Option<PathBuf>,
    pub dequant: Option<String>,
    pub loader_threads: Option<usize>,
    pub dtype: Option<String>,
    pub pinned_slab_alignment: Unsupported,
    pub copy_stream_priority: Unsupported,
    pub policy: Unsupported,
    pub eviction_cooldown_steps: Unsupported,
    pub strict_bf16: Unsupported,
    pub fail_on_dtype_promotion: Unsupported,
    pub debug_trace: Unsupported,
    pub family: Unsupported,
    pub block_pattern: Unsupported,
    pub gradient_checkpointing: Unsupported,
    pub file_backed_weights: Unsupported,
    pub checkpoint_path: Unsupported,
    pub two_stage: Unsupported,
    pub text_encoder_block_swap: Unsupported,
    pub encoder_family: Unsupported,
    pub activation_stagehand: Unsupported,
    pub conductor_config: Unsupported,
    pub selective_precision: Unsupported,
}

/// `data`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawData {
    pub concepts: Option<Vec<RawConcept>>,
    pub resolution: Option<u32>,
    pub batch_size: Option<usize>,
    pub cache_dir: Option<PathBuf>,
    pub num_workers: Unsupported,
    pub cache_latents: Unsupported,
    pub cache_text_embeddings: Unsupported,
    pub frames: Unsupported,
    pub edit_mode: Unsupported,
    pub custom_conditioning_image: Unsupported,
}

/// `encoder`: the encoder runs on another machine.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawEncoder {
    pub host: Option<String>,
    pub command: Option<String>,
    pub port: Option<u16>,
    pub identity_file: Option<PathBuf>,
    pub known_hosts_file: Option<PathBuf>,
    pub model_path: Option<String>,
    pub device: Option<String>,
}

/// `optimizer`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawOptimizer {
    pub optimizer: Option<String>,
    pub weight_decay: Option<f64>,
    pub beta1: Option<f64>,
    pub beta2: Option<f64>,
    pub eps: Option<f64>,
    pub amsgrad: Unsupported,
    pub momentum: Unsupported,
    pub dampening: Unsupported,
    pub nesterov: Unsupported,
    pub clip_threshold: Unsupported,
    pub scale_parameter: Unsupported,
    pub relative_step: Unsupported,
    pub warmup_init: Unsupported,
}

/// `scheduler`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawScheduler {
    pub scheduler: Option<String>,
    pub warmup_steps: Option<u64>,
    pub min_factor: Option<f64>,
    pub num_cycles: Option<f64>,
}

/// `checkpoint`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawCheckpoint {
    pub output_dir: Option<PathBuf>,
    pub save_every: Option<u64>,
    pub save_every_n_steps: Option<u64>,
    pub keep: Option<usize>,
    pub resume: Option<String>,
    pub resume_state: Option<PathBuf>,
    pub resume_from: Option<PathBuf>,
    pub resume_checkpoint: Option<PathBuf>,
    pub save_full_model: Unsupported,
    pub backup_every: Unsupported,
    pub save_every_unit: Unsupported,
}

/// `validation`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawValidation {
    pub samples: Option<usize>,
    pub every: Option<u64>,
}

/// `sample`: the whole section acts only with `enabled: true`, which is refused, so that its other keys are merely known.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the keys of a section that is switched off; typed so that nonsense is still refused")]
pub(super) struct RawSample {
    pub enabled: Option<bool>,
    pub interval: Option<u64>,
    pub interval_unit: Option<String>,
    pub prompts: Option<Vec<String>>,
    pub prompt: Option<String>,
    pub negative_prompt: Option<String>,
    pub seeds: Option<Vec<u64>>,
    pub seed: Option<u64>,
    pub width: Option<u32>,
    pub height: Option<u32>,
    pub num_inference_steps: Option<u32>,
    pub steps: Option<u32>,
    pub guidance_scale: Option<f64>,
    pub cfg_scale: Option<f64>,
    pub max_samples: Option<u64>,
    pub sample_at_start: Option<bool>,
    pub use_live_adapter: Option<bool>,
    pub sample_device: Option<String>,
    pub dtype: Option<String>,
    pub oom_fallback_cpu: Option<bool>,
    pub output_ext: Option<String>,
}

/// `logging`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawLogging {
    pub enable_tensorboard: Unsupported,
}

/// `distributed`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawDistributed {
    pub enabled: Unsupported,
    pub world_size: Unsupported,
    pub rank: Unsupported,
    pub local_rank: Unsupported,
    pub backend: Unsupported,
    pub master_addr: Unsupported,
    pub master_port: Unsupported,
}

/// A concept as an object.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawConceptTable {
    pub path: PathBuf,
    pub caption_file_ext: Option<String>,
    pub num_repeats: Option<usize>,
    pub repeats: Option<usize>,
}

/// A concept: an object, or the folder alone.
#[derive(Debug)]
pub(super) struct RawConcept(pub RawConceptTable);

/// `adapter.target_modules`: a list, or one string with commas.
#[derive(Debug)]
pub(super) struct RawTargets(pub Vec<String>);

// Both are written by hand because serde's `untagged` would replace every precise message by "data did not match any variant".

impl<'de> Deserialize<'de> for RawConcept {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = RawConcept;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a folder, or an object with `path`")
            }
            fn visit_str<E: serde::de::Error>(self, folder: &str) -> Result<RawConcept, E> {
                Ok(RawConcept(RawConceptTable { path: folder.into(), ..RawConceptTable::default() }))
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RawConcept, A::Error> {
                RawConceptTable::deserialize(MapAccessDeserializer::new(map)).map(RawConcept)
            }
        }
        deserializer.deserialize_any(V)
    }
}

impl<'de> Deserialize<'de> for RawTargets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = RawTargets;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"all-linear\", a list of names, or one string with commas")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<RawTargets, E> {
                Ok(RawTargets(text.split(',').map(|s| s.trim().to_string()).filter(|s| !s.is_empty()).collect()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<RawTargets, A::Error> {
                let mut all = Vec::new();
                while let Some(next) = seq.next_element::<String>()? {
                    all.push(next);
                }
                Ok(RawTargets(all))
            }
        }
        deserializer.deserialize_any(V)
    }
}
