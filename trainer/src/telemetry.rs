//! The original's telemetry: one JSON object a step with its field names, and a summary line in the log every few steps.
//!
//! What the fields mean here, all of them measured:
//!
//! | field | meaning |
//! |---|---|
//! | `h2d_bytes` | bytes of block weights that the source brought into the device's memory in the step |
//! | `d2h_bytes` | bytes of gradients that the optimiser read back; 0 on the CPU, where nothing moves |
//! | `copy_time_ms` | time in moving (and dequantising) those weights |
//! | `compute_time_ms` | forward, backward and optimiser without waiting and copying |
//! | `stall_time_ms`, `stall_count` | time in which a visit waited for its block, and how often one did |
//! | `evictions` | blocks dropped from the device to make room |
//! | `prefetch_hits`, `prefetch_misses` | pieces of a block that were there when needed, and that were not |
//! | `vram_used_mb`, `vram_reserved_mb` | device memory used and taken by the driver; on the CPU the process's resident memory and its peak |
//! | `host_pool_free`, `host_pool_in_use` | slots of the ring |
//! | `dtype_promotions` | weights used in a wider type than the slab's bfloat16 |
//! | `nan_count`, `inf_count` | such values among losses and gradients; a step with any is the last line, for the run stops there |
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use serenity_protocol::Result;
use serenity_protocol::config::TelemetryConfig;

use crate::log::JsonLines;

/// Steps that the rolling means look back on, as in the original.
const WINDOW: usize = 100;

/// One line.
#[allow(missing_docs)] // the table above is their documentation, and the names are the original's
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TelemetryLine {
    pub step: u64,
    pub h2d_bytes: u64,
    pub d2h_bytes: u64,
    pub copy_time_ms: f64,
    pub compute_time_ms: f64,
    pub stall_time_ms: f64,
    pub stall_count: u64,
    pub evictions: u64,
    pub prefetch_hits: u64,
    pub prefetch_misses: u64,
    pub vram_used_mb: f64,
    pub vram_reserved_mb: f64,
    pub host_pool_free: u64,
    pub host_pool_in_use: u64,
    pub dtype_promotions: u64,
    pub nan_count: u64,
    pub inf_count: u64,
}

/// The telemetry of a run.
pub struct Telemetry {
    file: JsonLines,
    interval_steps: u64,
    recent: VecDeque<TelemetryLine>,
}

impl Telemetry {
    /// Opens the file and keeps the lines of steps up to `keep_to`.
    ///
    /// # Errors
    /// As [`JsonLines::open`].
    pub fn open(config: &TelemetryConfig, keep_to: Option<u64>) -> Result<Self> {
        Ok(Self { file: JsonLines::open(&config.file, keep_to)?, interval_steps: config.interval_steps.max(1), recent: VecDeque::new() })
    }

    /// Writes a step's line; returns the summary when it is due.
    ///
    /// # Errors
    /// As [`JsonLines::append`].
    pub fn record(&mut self, line: TelemetryLine) -> Result<Option<String>> {
        self.file.append(&line)?;
        let due = line.step.is_multiple_of(self.interval_steps);
        self.recent.push_back(line);
        if self.recent.len() > WINDOW {
            self.recent.pop_front();
        }
        Ok(due.then(|| self.summary()))
    }

    /// Share of hits in the window, 1 where nothing was needed.
    fn hit_rate(&self) -> f64 {
        let (hits, misses) = self.recent.iter().fold((0, 0), |(h, m), l| (h + l.prefetch_hits, m + l.prefetch_misses));
        if hits + misses == 0 { 1.0 } else { hits as f64 / (hits + misses) as f64 }
    }

    fn summary(&self) -> String {
        let Some(last) = self.recent.back() else { return String::new() };
        let stall = self.recent.iter().map(|l| l.stall_time_ms).sum::<f64>() / self.recent.len() as f64;
        format!(
            "[STAGEHAND step={}] hit={:.1}% stall={stall:.1}ms evict={} vram={:.2}G pool={}/{}",
            last.step,
            100.0 * self.hit_rate(),
            self.recent.iter().map(|l| l.evictions).sum::<u64>(),
            last.vram_used_mb / 1024.0,
            last.host_pool_free,
            last.host_pool_free + last.host_pool_in_use,
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    const FIELDS: &str = "step h2d_bytes d2h_bytes copy_time_ms compute_time_ms stall_time_ms stall_count evictions prefetch_hits prefetch_misses \
        vram_used_mb vram_reserved_mb host_pool_free host_pool_in_use dtype_promotions nan_count inf_count";

    #[test]
    fn lines_have_the_originals_fields_and_summaries_come_when_due() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("telemetry.jsonl");
        let mut telemetry = Telemetry::open(&TelemetryConfig { file: file.clone(), interval_steps: 2 }, None).unwrap();
        let line = |step| TelemetryLine {
            step,
            prefetch_hits: 3,
            prefetch_misses: step - 1,
            stall_time_ms: 4.0 * step as f64,
            host_pool_free: 2,
            host_pool_in_use: 6,
            vram_used_mb: 512.0,
            ..TelemetryLine::default()
        };
        assert_eq!(telemetry.record(line(1)).unwrap(), None);
        assert_eq!(telemetry.record(line(2)).unwrap().unwrap(), "[STAGEHAND step=2] hit=85.7% stall=6.0ms evict=0 vram=0.50G pool=2/8");
        let text = std::fs::read_to_string(&file).unwrap();
        let first: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(first.keys().map(String::as_str).collect::<Vec<_>>(), FIELDS.split_whitespace().collect::<Vec<_>>());
    }
}
