//! The rows of the targets table, in one place: for `gpu-check timing` and for whoever times them with a real ring.
#![forbid(unsafe_code)]

use serde::Serialize;

/// A row: FLUX.2 dev, rank 16, batch size 1, random data.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Row {
    /// How it is asked for.
    pub name: &'static str,
    /// Pixels of a side.
    pub resolution: usize,
    /// Micro-batches of a step.
    pub accumulation: usize,
    /// What the driver may count, in MiB.
    pub cap_mib: usize,
    /// Whether activations may be kept instead of computed again.
    pub keep_activations: bool,
    /// What a sample may take, in seconds.
    pub target: f64,
}

/// All rows, in the order of their importance.
pub const ROWS: [Row; 7] = [
    Row { name: "6g", resolution: 512, accumulation: 1, cap_mib: 6144, keep_activations: false, target: 1.45 },
    Row { name: "11g", resolution: 512, accumulation: 1, cap_mib: 11_468, keep_activations: false, target: 1.10 },
    Row { name: "24g", resolution: 512, accumulation: 1, cap_mib: 24_576, keep_activations: false, target: 0.57 },
    Row { name: "1024", resolution: 1024, accumulation: 1, cap_mib: 14_336, keep_activations: false, target: 1.45 },
    Row { name: "resident", resolution: 512, accumulation: 1, cap_mib: 40_960, keep_activations: false, target: 0.44 },
    Row { name: "no-recompute", resolution: 512, accumulation: 1, cap_mib: 61_440, keep_activations: true, target: 0.34 },
    Row { name: "accumulation", resolution: 512, accumulation: 8, cap_mib: 6144, keep_activations: false, target: 0.50 },
];

/// The row of this name.
#[must_use]
pub fn row(name: &str) -> Option<Row> {
    ROWS.into_iter().find(|r| r.name == name)
}
