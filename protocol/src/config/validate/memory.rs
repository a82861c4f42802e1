//! The section `memory`: strategy, slab, ring and device memory.

use std::path::Path;

use super::{within, word};
use crate::config::raw::{RawConfig, RawStagehand};
use crate::config::{DeviceKind, MemoryConfig, MemoryStrategy, PayloadForm, StagehandConfig, TelemetryConfig};
use crate::error::{Error, Result};
use crate::ring::words::CONSUMERS_MAX;

/// Bytes of a "MB" in the configuration, which is a mebibyte as in the original.
const MIB: f64 = 1_048_576.0;
/// Slots begin at multiples of this, so that they can be registered and read into page by page.
const SLOT_ALIGN: u64 = 4096;
/// Default of `ring_chunk_mb`, in bytes.
const CHUNK_BYTES: u64 = 64 << 20;
/// Without `ring_chunk_mb`, a small pool is cut into at least this many slots, or nothing would overlap.
const SLOTS_WANTED: u64 = 8;
/// What the ring can name.
const SLOTS_MAX: u64 = crate::ring::words::SLOTS_MAX as u64;

pub(super) fn memory(
    raw: &RawConfig,
    name: &str,
    output_dir: &Path,
    device: DeviceKind,
    notices: &mut Vec<String>,
) -> Result<MemoryConfig> {
    let none = RawStagehand::default();
    let s = raw.memory.stagehand.as_ref().unwrap_or(&none);
    const WORDS: [(&str, MemoryStrategy); 4] = [
        ("stagehand", MemoryStrategy::Stagehand),
        ("streaming", MemoryStrategy::Stagehand),
        ("resident", MemoryStrategy::Resident),
        ("none", MemoryStrategy::Resident),
    ];
    let asked = raw.memory.strategy.as_deref().map(|t| word("memory.strategy", t, &WORDS)).transpose()?;
    let strategy = match (asked, s.stagehand_enabled) {
        (Some(MemoryStrategy::Stagehand), Some(false)) => {
            return Err(Error::config("`memory.strategy` is stagehand, but `memory.stagehand.stagehand_enabled` is false")
                .advice("change one of them"));
        }
        (Some(asked), _) => asked,
        (None, Some(false)) => MemoryStrategy::Resident,
        (None, _) if raw.memory.stagehand.is_some() => MemoryStrategy::Stagehand,
        (None, _) => MemoryStrategy::Resident,
    };
    let slab_path = match (&s.squareq_slab_path, &s.squareq_manifest_path) {
        (Some(slab), _) => slab.clone(),
        (None, None) => output_dir.join("slab").join(format!("{name}_int8.safetensors")),
        (None, Some(_)) => {
            return Err(
                Error::config("`memory.stagehand.squareq_manifest_path` is given without squareq_slab_path").advice("give both, or none")
            );
        }
    };
    if slab_path.extension().is_none_or(|e| e != "safetensors") {
        return Err(Error::config("`memory.stagehand.squareq_slab_path` must end in .safetensors").found(slab_path.display()));
    }
    let manifest_path = s.squareq_manifest_path.clone().unwrap_or_else(|| slab_path.with_extension("manifest.json"));
    Ok(MemoryConfig { strategy, slab_path, manifest_path, stagehand: stagehand(s, output_dir, device, notices)? })
}

fn stagehand(s: &RawStagehand, output_dir: &Path, device: DeviceKind, notices: &mut Vec<String>) -> Result<StagehandConfig> {
    let (pool_bytes, chunk_bytes) = pool(s, notices)?;
    let (high, low) = watermarks(s)?;
    let auto = if device == DeviceKind::Cpu { PayloadForm::Bf16 } else { PayloadForm::Int8 };
    let telemetry = s.telemetry_enabled.unwrap_or(true).then(|| TelemetryConfig {
        file: s.telemetry_file.clone().unwrap_or_else(|| output_dir.join("stagehand_telemetry.jsonl")),
        interval_steps: s.telemetry_interval_steps.unwrap_or(10),
    });
    if let Some(t) = &telemetry {
        within("memory.stagehand.telemetry_interval_steps", t.interval_steps, 1, 1 << 40)?;
    }
    Ok(StagehandConfig {
        pool_bytes,
        chunk_bytes,
        vram_high_bytes: high,
        activation_offload_bytes: match &s.activation_offload_mb {
            Some(value) if value.as_f64() == Some(0.0) => Some(0),
            None => None,
            value => size_or_auto("memory.stagehand.activation_offload_mb", value.as_ref(), 0.0)?,
        },
        vram_low_bytes: low,
        form: s.dequant.as_deref().map_or(Ok(auto), |t| {
            word("memory.stagehand.dequant", t, &[("cpu", PayloadForm::Bf16), ("gpu", PayloadForm::Int8), ("auto", auto)])
        })?,
        prefetch_window_blocks: within("memory.stagehand.prefetch_window_blocks", s.prefetch_window_blocks.unwrap_or(2), 1, 65_535)?,
        max_inflight_transfers: within("memory.stagehand.max_inflight_transfers", s.max_inflight_transfers.unwrap_or(2), 1, 1024)?,
        telemetry,
        consumers: within("memory.stagehand.ring_consumers", s.ring_consumers.unwrap_or(1), 1, CONSUMERS_MAX)?,
        consumer: within("memory.stagehand.ring_consumer", s.ring_consumer.unwrap_or(0), 0, CONSUMERS_MAX - 1)?,
        ring_of: s.ring_of.clone(),
        loader_threads: within("memory.stagehand.loader_threads", s.loader_threads.unwrap_or(0), 0, 4096)?,
        nan_inf_check: s.nan_inf_check.unwrap_or(true),
        pinned_slab_bytes: s.pinned_slab_mb.map(|mb| mebibytes("memory.stagehand.pinned_slab_mb", mb)).transpose()?,
    })
}

/// Bytes of the high and the low watermark; the high one is unknown here where it is `auto`.
fn watermarks(s: &RawStagehand) -> Result<(Option<u64>, Option<u64>)> {
    const HIGH: &str = "memory.stagehand.vram_high_watermark_mb";
    const LOW: &str = "memory.stagehand.vram_low_watermark_mb";
    let high = size_or_auto(HIGH, s.vram_high_watermark_mb.as_ref(), 20_000.0)?;
    let low = s.vram_low_watermark_mb.or(high.map(|h| 0.8 * h as f64 / MIB)).map(|mb| mebibytes(LOW, mb)).transpose()?;
    if let (Some(high), Some(low)) = (high, low)
        && low >= high
    {
        return Err(Error::config(format!("`{LOW}` must lie below vram_high_watermark_mb"))
            .expected(format!("less than {} MiB", high >> 20))
            .found(format!("{} MiB", low >> 20)));
    }
    Ok((high, low))
}

/// Payload bytes of the ring and of a slot. The pool is cut to a whole number of slots.
fn pool(s: &RawStagehand, notices: &mut Vec<String>) -> Result<(Option<u64>, u64)> {
    const POOL: &str = "memory.stagehand.pinned_pool_mb";
    const CHUNK: &str = "memory.stagehand.ring_chunk_mb";
    let given = s.ring_chunk_mb.map(|mb| mebibytes(CHUNK, mb)).transpose()?;
    if let Some(chunk) = given.filter(|c| !c.is_multiple_of(SLOT_ALIGN)) {
        return Err(Error::config(format!("`{CHUNK}` must be a multiple of {SLOT_ALIGN} bytes")).found(format!("{chunk} bytes")));
    }
    let Some(pool) = size_or_auto(POOL, s.pinned_pool_mb.as_ref(), 8192.0)? else {
        return Ok((None, given.unwrap_or(CHUNK_BYTES)));
    };
    if let Some(slab_mb) = s.pinned_slab_mb {
        let slab = mebibytes("memory.stagehand.pinned_slab_mb", slab_mb)?;
        if !pool.is_multiple_of(slab) {
            return Err(Error::config("`memory.stagehand.pinned_slab_mb` must divide pinned_pool_mb")
                .expected(format!("a divisor of {pool} bytes"))
                .found(format!("{slab} bytes"))
                .advice("remove pinned_slab_mb: ring_chunk_mb takes its place"));
        }
    }
    let chunk = given.unwrap_or(CHUNK_BYTES.min((pool / SLOTS_WANTED / SLOT_ALIGN).max(1) * SLOT_ALIGN));
    let slots = pool / chunk;
    if slots < 2 {
        return Err(Error::config(format!("`{POOL}` must hold at least two slots of ring_chunk_mb"))
            .expected(format!("at least {} bytes", 2 * chunk))
            .found(format!("{pool} bytes")));
    }
    if slots > SLOTS_MAX {
        return Err(Error::config(format!("`{CHUNK}` is too small for the pool"))
            .expected(format!("at most {SLOTS_MAX} slots"))
            .found(format!("{slots} slots")));
    }
    if slots * chunk != pool {
        notices.push(format!(
            "the ring uses {} of the {pool} bytes of pinned_pool_mb: a whole number of slots of {chunk} bytes",
            slots * chunk
        ));
    }
    Ok((Some(slots * chunk), chunk))
}

/// Bytes of a size in MiB; `None` for `auto`.
fn size_or_auto(key: &str, value: Option<&serde_json::Value>, default_mb: f64) -> Result<Option<u64>> {
    match value {
        None => mebibytes(key, default_mb).map(Some),
        Some(serde_json::Value::String(word)) if word == "auto" => Ok(None),
        Some(value) => {
            let number = value.as_f64();
            let number = number.ok_or_else(|| Error::config(format!("`{key}` is no size")).expected("MiB, or \"auto\"").found(value))?;
            mebibytes(key, number).map(Some)
        }
    }
}

/// Whole bytes of a size in MiB, up to 16 TiB.
fn mebibytes(key: &str, mb: f64) -> Result<u64> {
    let bytes = mb * MIB;
    if !(bytes >= 1.0 && mb <= 16_777_216.0) {
        return Err(Error::config(format!("`{key}` is out of range")).expected("more than 0 and at most 16777216").found(mb));
    }
    Ok(bytes as u64)
}
