//! Predicted memory, by process.
//!
//! With r the adapters' parameters, p the bytes of the compute type, T = image + text tokens, D and M the inner and feed-forward
//! widths, H the heads, B samples in a micro-batch and k micro-batches in a step:
//!
//! | part | bytes |
//! |---|---|
//! | adapters, gradients, two moments (f32) | 16 r |
//! | weights outside the blocks | p · their parameters |
//! | block weights | p · the two largest blocks (streaming) or p · all blocks (resident) |
//! | block inputs kept for the backward pass | p · blocks · k · B · T · D |
//! | activations of one block | B · T · (p · (9 D + 5 M) + 4 · H · T), projections and one matrix of attention weights |
//!
//! The last line is an estimate of the reference implementation, which holds the attention weights; the others are exact up to
//! allocation granularity.
//!
//! On a GPU the trainer plans with what there is, so what is told is the least that it needs there, and the most that it page-locks on the host. With c the
//! bytes of a weight in the ring (1 as INT8):
//!
//! | part, on the device | bytes |
//! |---|---|
//! | adapters, gradients, two moments (f32), copies | (16 + p) r |
//! | weights outside the blocks without those of the conditioning | p · their parameters |
//! | blocks | c · the largest block (streaming) or c · all blocks (resident) |
//! | half of the largest matrix, dequantised | p · half of its parameters |
//! | a visit of a block | p · B · T · (13 D + 4 M), and up to 256 MiB for attention |
//! | block inputs and the residual stream | k · B · T · D · (2 p + 4) |
//! | context and libraries | 768 MiB, as on an H100 |
//!
//! | part, page-locked | bytes |
//! |---|---|
//! | block inputs | p · blocks · k · B · T · D |
//! | weights of the conditioning | p · their parameters |
//! | activations | as `activation_offload_mb` says, or a quarter of what is available |

use serde::Serialize;

use super::{CacheSummary, human_bytes, pool};
use crate::cache::text_model::TextGeometry;
use crate::config::{ComputeDtype, Config, DeviceKind, MemoryStrategy, PayloadForm};
use crate::error::{Error, Result};
use crate::geometry::{BlockId, CONDITIONING, TransformerGeometry};
use crate::model_path::ModelPaths;
use crate::slab::text_encoder::TextModel;

/// What attention works in on a GPU, at most.
const ATTENTION_BYTES: u64 = 256 << 20;
/// The driver's context and what libraries load.
const CONTEXT_BYTES: u64 = 768 << 20;
/// Where the ring's segment lives.
pub(super) const SHM: &str = "/dev/shm";

/// Predicted memory.
#[derive(Debug, Serialize)]
pub struct MemoryPlan {
    /// The ring; `None` where nothing streams.
    pub ring: Option<RingMemory>,
    /// The trainer, part by part: on the host, or the least that it needs on the GPU.
    pub trainer: Vec<Amount>,
    /// What the trainer page-locks for a GPU at most; empty without one.
    pub trainer_host: Vec<Amount>,
    /// The encoder, part by part; empty if it has nothing to do.
    pub encoder: Vec<Amount>,
}

/// A named amount of memory.
#[derive(Debug, Serialize)]
pub struct Amount {
    /// What it holds.
    pub what: &'static str,
    /// Bytes.
    pub bytes: u64,
}

/// The ring.
#[derive(Debug, Serialize)]
pub struct RingMemory {
    /// Bytes of the segment.
    pub bytes: u64,
    /// Slots.
    pub slots: u64,
    /// Bytes of a slot.
    pub chunk_bytes: u64,
    /// Bytes that /dev/shm has room for, what an earlier run of the same output folder left there included.
    pub free_bytes: u64,
    /// Whether the size was chosen here (`auto`).
    pub chosen: bool,
    /// What this and other sizes cost.
    pub costs: Vec<pool::PoolCost>,
}

/// Sum of `amounts`.
#[must_use]
pub fn total(amounts: &[Amount]) -> u64 {
    amounts.iter().fold(0, |sum, a| sum.saturating_add(a.bytes))
}

/// Product that ends at the largest number: settings that nobody can run are still planned.
pub(super) fn product(factors: &[u64]) -> u64 {
    factors.iter().fold(1, |product: u64, f| product.saturating_mul(*f))
}

/// Parameters of one block, norms included.
fn parameters_of(geometry: &TransformerGeometry, block: BlockId) -> u64 {
    let linears: u64 = geometry.block_linears(block).iter().map(|l| l.out_features as u64 * l.in_features as u64).sum();
    linears + (geometry.block_norms(block).len() * geometry.attention_head_dim) as u64
}

/// Parameters of all blocks.
#[must_use]
pub fn block_parameters(geometry: &TransformerGeometry) -> u64 {
    geometry.blocks().map(|b| parameters_of(geometry, b)).sum()
}

/// Parameters of the largest block.
#[must_use]
pub fn largest_block_parameters(geometry: &TransformerGeometry) -> u64 {
    geometry.blocks().map(|b| parameters_of(geometry, b)).max().unwrap_or(0)
}

/// Parameters outside the slab's linears: the linears outside the blocks, and all norms.
#[must_use]
pub fn other_parameters(geometry: &TransformerGeometry) -> u64 {
    let linears: u64 = geometry.other_linears().iter().map(|l| l.out_features as u64 * l.in_features as u64).sum();
    let norms: usize = geometry.blocks().map(|b| geometry.block_norms(b).len() * geometry.attention_head_dim).sum();
    linears + norms as u64
}

/// Bytes of the compute type.
fn dtype_bytes(config: &Config) -> u64 {
    match config.dtype {
        ComputeDtype::F32 => 4,
        ComputeDtype::Bf16 => 2,
    }
}

pub(super) fn predict(
    config: &Config,
    geometry: &TransformerGeometry,
    paths: &ModelPaths,
    adapter_parameters: u64,
    cache: &CacheSummary,
    notices: &mut Vec<String>,
    problems: &mut Vec<Error>,
) -> Result<MemoryPlan> {
    let (trainer, trainer_host, on_host) = match config.device {
        DeviceKind::Cpu => {
            let trainer = trainer(config, geometry, adapter_parameters);
            let on_host = total(&trainer);
            (trainer, Vec::new(), on_host)
        }
        DeviceKind::Cuda(_) => {
            let mut host = page_locked(config, geometry);
            // Activations come on top: they go to the host where there is room, so they need none.
            let on_host = total(&host);
            host.push(Amount { what: "activations", bytes: offloaded(config) });
            (on_gpu(config, geometry, adapter_parameters), host, on_host)
        }
    };
    let ring = (config.memory.strategy == MemoryStrategy::Stagehand).then(|| pool::ring_memory(config, geometry, on_host));
    let encoder = if cache.is_complete() { Vec::new() } else { encoder(config, &TextModel::of(paths)?.geometry()?, cache) };
    check(config, ring.as_ref(), (total(&trainer), on_host), notices, problems);
    Ok(MemoryPlan { ring, trainer, trainer_host, encoder })
}

fn trainer(config: &Config, geometry: &TransformerGeometry, adapter_parameters: u64) -> Vec<Amount> {
    let p = dtype_bytes(config);
    let tokens = tokens(config);
    let (d, m, heads) = (geometry.inner_dim() as u64, geometry.mlp_dim() as u64, geometry.num_attention_heads as u64);
    let batch = config.batch_size as u64;
    let held = match config.memory.strategy {
        MemoryStrategy::Stagehand => (2 * largest_block_parameters(geometry)).min(block_parameters(geometry)),
        MemoryStrategy::Resident => block_parameters(geometry),
    };
    let blocks = geometry.num_blocks() as u64;
    let inputs = product(&[p, blocks, config.gradient_accumulation_steps as u64, batch, tokens, d]);
    let each_token = p.saturating_mul(9 * d + 5 * m).saturating_add(product(&[4, heads, tokens]));
    vec![
        Amount { what: "adapters, gradients and moments", bytes: product(&[16, adapter_parameters]) },
        Amount { what: "weights outside the blocks", bytes: p * other_parameters(geometry) },
        Amount { what: "block weights", bytes: p * held },
        Amount { what: "block inputs kept", bytes: inputs },
        Amount { what: "activations of one block", bytes: product(&[batch, tokens, each_token]) },
    ]
}

/// Tokens of a sample, text and image.
fn tokens(config: &Config) -> u64 {
    let side = u64::from(config.resolution / 16);
    side * side + config.model.max_sequence_length as u64
}

/// Parameters of the linears that condition a micro-batch.
fn conditioning_parameters(geometry: &TransformerGeometry) -> u64 {
    let linears = geometry.other_linears().into_iter().filter(|l| CONDITIONING.contains(&l.name.as_str()));
    linears.map(|l| l.out_features as u64 * l.in_features as u64).sum()
}

/// The least that the trainer needs on a GPU.
fn on_gpu(config: &Config, geometry: &TransformerGeometry, adapter_parameters: u64) -> Vec<Amount> {
    let (p, int8) = (dtype_bytes(config), config.memory.stagehand.form == PayloadForm::Int8);
    let (d, m, heads) = (geometry.inner_dim() as u64, geometry.mlp_dim() as u64, geometry.num_attention_heads as u64);
    let (batch, tokens) = (config.batch_size as u64, tokens(config));
    let weights = match config.memory.strategy {
        MemoryStrategy::Stagehand => largest_block_parameters(geometry),
        MemoryStrategy::Resident => block_parameters(geometry),
    };
    let blocks = geometry.blocks().flat_map(|b| geometry.block_linears(b));
    let largest = blocks.map(|l| l.out_features as u64 * l.in_features as u64).max().unwrap_or(0);
    let attention = product(&[2, heads, batch, tokens, tokens]).min(ATTENTION_BYTES);
    let rows = product(&[batch, tokens]);
    vec![
        Amount { what: "adapters, gradients, moments and copies", bytes: product(&[16 + p, adapter_parameters]) },
        Amount {
            what: "weights outside the blocks",
            bytes: p * other_parameters(geometry).saturating_sub(conditioning_parameters(geometry)),
        },
        Amount { what: "blocks", bytes: weights * if int8 { 1 } else { p } },
        Amount { what: "half of the largest matrix", bytes: if int8 { p * largest / 2 } else { 0 } },
        Amount { what: "a visit of a block", bytes: product(&[p, rows, 13 * d + 4 * m]).saturating_add(attention) },
        Amount {
            what: "block inputs and the residual stream",
            bytes: product(&[config.gradient_accumulation_steps as u64, rows, d, 2 * p + 4]),
        },
        Amount { what: "context and libraries", bytes: CONTEXT_BYTES },
    ]
}

/// What the trainer page-locks for a GPU at most, besides activations.
fn page_locked(config: &Config, geometry: &TransformerGeometry) -> Vec<Amount> {
    let (p, d, blocks) = (dtype_bytes(config), geometry.inner_dim() as u64, geometry.num_blocks() as u64);
    let inputs = product(&[p, blocks, config.gradient_accumulation_steps as u64, config.batch_size as u64, tokens(config), d]);
    vec![
        Amount { what: "block inputs", bytes: inputs },
        Amount { what: "weights of the conditioning", bytes: p * conditioning_parameters(geometry) },
    ]
}

/// Host memory that activations may take.
fn offloaded(config: &Config) -> u64 {
    config.memory.stagehand.activation_offload_bytes.unwrap_or_else(|| available_memory().unwrap_or(0) / 4)
}

/// Two layers of the text encoder, and the hidden states of all missing captions with the three that make the embedding; full length is
/// assumed for every caption, which is an upper bound.
fn encoder(config: &Config, text: &TextGeometry, cache: &CacheSummary) -> Vec<Amount> {
    let p = dtype_bytes(config);
    let (hidden, attention) = (text.hidden as u64, ((text.heads + text.kv_heads) * text.head_dim) as u64);
    let layer = 2 * hidden * attention + 3 * hidden * text.intermediate as u64 + 2 * hidden;
    let states = product(&[p, cache.captions_missing as u64, config.model.max_sequence_length as u64, hidden, 4]);
    vec![Amount { what: "two layers", bytes: 2 * p * layer }, Amount { what: "hidden states, at most", bytes: states }]
}

/// Whether it fits. A ring that /dev/shm cannot hold is certain to fail; the rest is a prediction, and so a notice.
fn check(config: &Config, ring: Option<&RingMemory>, (trainer, on_host): (u64, u64), notices: &mut Vec<String>, problems: &mut Vec<Error>) {
    let ring_bytes = ring.map_or(0, |r| r.bytes);
    if let Some(ring) = ring.filter(|r| r.bytes > r.free_bytes) {
        problems.push(
            Error::try_again("/dev/shm has no room for the ring")
                .at(SHM)
                .expected(format!("{} free", human_bytes(ring.bytes)))
                .found(human_bytes(ring.free_bytes))
                .advice("lower memory.stagehand.pinned_pool_mb, or enlarge /dev/shm (in a container: --shm-size)"),
        );
    }
    let on_host = ring_bytes.saturating_add(on_host);
    if let Some(available) = available_memory().filter(|available| *available < on_host) {
        notices.push(format!("the run needs about {} of memory, of which {} are available", human_bytes(on_host), human_bytes(available)));
    }
    let cap = config.memory.stagehand.vram_high_bytes.unwrap_or(u64::MAX);
    if matches!(config.device, DeviceKind::Cuda(_)) && config.memory.strategy == MemoryStrategy::Stagehand && trainer > cap {
        notices.push(format!(
            "the trainer is predicted to need at least {}, above vram_high_watermark_mb ({})",
            human_bytes(trainer),
            human_bytes(cap)
        ));
    }
}

/// `MemAvailable` of /proc/meminfo: bytes that can be taken without pushing anything out.
#[must_use]
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
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

    fn config(extra: &str) -> Config {
        let text = format!(r#"{{"model": {{"path": "m"}}, "data": {{"concepts": ["d"]}}, "resolution": 512{extra}}}"#);
        Config::from_json(&text, "c.json".as_ref(), &Overrides::default()).unwrap()
    }

    #[test]
    fn parameter_counts_are_those_of_the_reference() {
        let g = dev();
        assert_eq!(largest_block_parameters(&g), 981_467_648);
        assert_eq!(block_parameters(&g), 8 * 981_467_648 + 48 * 490_733_824);
        let norms = 8 * 512 + 48 * 256;
        assert_eq!(other_parameters(&g), 816_316_416 + norms);
    }

    #[test]
    fn accumulation_costs_block_inputs_and_nothing_else() {
        let g = dev();
        let one = trainer(&config(r#", "memory": {"strategy": "stagehand"}"#), &g, 1000);
        let four = trainer(&config(r#", "memory": {"strategy": "stagehand"}, "gradient_accumulation_steps": 4"#), &g, 1000);
        for (a, b) in one.iter().zip(&four) {
            let factor = if a.what == "block inputs kept" { 4 } else { 1 };
            assert_eq!(a.bytes * factor, b.bytes, "{}", a.what);
        }
        // 56 blocks, 1024 + 512 tokens, D = 6144, bf16.
        assert_eq!(one.iter().find(|a| a.what == "block inputs kept").unwrap().bytes, 56 * 1536 * 6144 * 2);
        assert_eq!(one.iter().find(|a| a.what.starts_with("adapters")).unwrap().bytes, 16_000);
    }

    #[test]
    fn resident_holds_every_block_and_float32_doubles_it() {
        let g = dev();
        let weights = |c: &Config| trainer(c, &g, 0).iter().find(|a| a.what == "block weights").unwrap().bytes;
        let streaming = weights(&config(r#", "memory": {"strategy": "stagehand"}"#));
        let resident = weights(&config(r#", "memory": {"strategy": "resident"}"#));
        assert_eq!((streaming, resident), (2 * 2 * 981_467_648, 2 * block_parameters(&g)));
        assert_eq!(weights(&config(r#", "train_dtype": "float32""#)), 2 * resident);
    }

    /// The planner's least for 512 px is 3.2 GiB with adapters of 60 million parameters; context and libraries took 0.7 on an H100.
    #[test]
    fn a_gpu_needs_what_was_measured() {
        let c = config(r#", "memory": {"strategy": "stagehand", "stagehand": {"dequant": "gpu"}}, "train_device": "cuda""#);
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let least = gib(total(&on_gpu(&c, &dev(), 59_768_832)));
        assert!((3.8..4.3).contains(&least), "{least}");
        let host = page_locked(&c, &dev());
        assert_eq!(host.iter().find(|a| a.what == "block inputs").unwrap().bytes, 56 * 1536 * 6144 * 2);
        // 150 MiB of embedders, 1.2 GiB of modulations.
        let conditioning = host.iter().find(|a| a.what == "weights of the conditioning").unwrap().bytes;
        assert_eq!(conditioning >> 20, 1374);
    }

    /// Settings at their limits are far beyond any machine, but must not overflow.
    #[test]
    fn the_largest_settings_are_still_a_number() {
        let extra = r#", "batch_size": 4096, "gradient_accumulation_steps": 65536, "adapter": {"rank": 65536}"#;
        let mut c = config(extra);
        c.resolution = 16_384;
        c.model.max_sequence_length = 32_768;
        assert_eq!(total(&trainer(&c, &dev(), u64::MAX / 2)), u64::MAX);
        assert_eq!(total(&on_gpu(&c, &dev(), u64::MAX / 2)), u64::MAX);
        assert!(total(&page_locked(&c, &dev())) > 1 << 50);
    }

    #[test]
    fn a_ring_larger_than_shared_memory_is_a_problem() {
        let (mut notices, mut problems) = (Vec::new(), Vec::new());
        let ring = RingMemory { bytes: 1 << 40, slots: 2, chunk_bytes: 1 << 39, free_bytes: 1 << 30, chosen: false, costs: Vec::new() };
        check(&config(""), Some(&ring), (0, 0), &mut notices, &mut problems);
        assert!(matches!(problems.as_slice(), [e] if e.exit_code() == 75 && e.to_string().contains("pinned_pool_mb")));
    }
}
