//! Memory of this process, from the kernel's own figures.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// Memory in MiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryUse {
    /// Resident now (`VmRSS`), shared pages such as the ring included.
    pub rss: f64,
    /// Largest resident size so far (`VmHWM`).
    pub rss_peak: f64,
    /// Memory of the GPU, where one is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceMemory>,
}

/// Memory of a GPU in MiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceMemory {
    /// In use within what the trainer took at start, at most so far.
    pub allocated: f64,
    /// What the trainer took at start for everything of its own.
    pub arena: f64,
    /// This process's share by the driver's figure: the arena, the context, and what libraries took.
    pub driver: f64,
    /// The largest `driver` so far.
    pub driver_peak: f64,
    /// What `driver` must not pass.
    pub cap: f64,
    /// Whether others had memory of the device at start: the driver counts theirs in when it grows.
    pub shared: bool,
}

/// Reads `/proc/self/status`; zeros where the kernel does not offer it.
#[must_use]
pub fn current() -> MemoryUse {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    MemoryUse { rss: field_mb(&status, "VmRSS:"), rss_peak: field_mb(&status, "VmHWM:"), device: None }
}

fn field_mb(status: &str, name: &str) -> f64 {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    value.unwrap_or(0.0) / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_has_memory_and_its_peak_is_not_below_it() {
        let used = current();
        assert!(used.rss > 1.0 && used.rss_peak >= used.rss, "{used:?}");
    }

    #[test]
    fn memory_that_is_touched_is_seen() {
        let before = current().rss;
        let block = vec![1u8; 64 << 20];
        let grown = current().rss - before;
        assert!(block.iter().step_by(4096).map(|b| u64::from(*b)).sum::<u64>() == 16384 && grown > 32.0, "{grown} MiB");
    }
}
