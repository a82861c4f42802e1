//! Where the loader's time goes: seconds of thread time per stage, and how long chunks take, for the bench.
//!
//! Counters of the whole process, because a process is one loader. Each is a lone statistic: all orderings here are relaxed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a thread of the loader is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Stage {
    /// Waiting for the disk, or copying out of the page cache.
    Read,
    /// Comparing pages with the manifest.
    Check,
    /// Dequantising or copying into the slot.
    Write,
    /// Hashing what was written, where the page's hash does not do.
    Hash,
    /// A filling thread with nothing to fill: no request, or no slot.
    SlotWait,
}

/// All stages with their names.
pub const STAGES: [(Stage, &str); 5] = [
    (Stage::Read, "read wait"),
    (Stage::Check, "check"),
    (Stage::Write, "dequantise"),
    (Stage::Hash, "hash"),
    (Stage::SlotWait, "slot wait"),
];

static NANOSECONDS: [AtomicU64; STAGES.len()] = [const { AtomicU64::new(0) }; STAGES.len()];
static READ_BYTES: AtomicU64 = AtomicU64::new(0);
static FILLS: Histogram = Histogram::new();

/// Adds to a stage.
pub fn add(stage: Stage, time: Duration) {
    // Relaxed: see the module's head.
    NANOSECONDS[stage as usize].fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
}

/// Runs `f` and adds its time to a stage.
pub fn timed<R>(stage: Stage, f: impl FnOnce() -> R) -> R {
    let start = Instant::now();
    let result = f();
    add(stage, start.elapsed());
    result
}

/// Seconds in each stage so far, in the order of [`STAGES`].
#[must_use]
pub fn seconds() -> [f64; STAGES.len()] {
    // Relaxed: see the module's head.
    std::array::from_fn(|i| NANOSECONDS[i].load(Ordering::Relaxed) as f64 / 1e9)
}

/// Counts bytes that were read from the slab.
pub fn add_read(bytes: u64) {
    // Relaxed: see the module's head.
    READ_BYTES.fetch_add(bytes, Ordering::Relaxed);
}

/// Bytes read from slabs so far.
#[must_use]
pub fn read_bytes() -> u64 {
    // Relaxed: see the module's head.
    READ_BYTES.load(Ordering::Relaxed)
}

/// Times from a slot's claim to its chunk being whole.
#[must_use]
pub fn fills() -> &'static Histogram {
    &FILLS
}

/// Buckets of [`Histogram`]: four per power of two, from a microsecond on.
const BUCKETS: usize = 4 * 32;

/// Counts of durations in logarithmic buckets: a quantile is right to within 19 %.
pub struct Histogram {
    counts: [AtomicU64; BUCKETS],
}

/// Quantiles of a histogram, in milliseconds; each is the upper edge of its bucket.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Quantiles {
    /// How many durations were counted.
    pub count: u64,
    /// Median.
    pub p50_ms: f64,
    /// 90th percentile.
    pub p90_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
    /// Largest.
    pub max_ms: f64,
    /// Upper edge of each bucket that is not empty, and its count.
    pub buckets_ms: Vec<(f64, u64)>,
}

impl Histogram {
    /// Empty.
    #[must_use]
    pub const fn new() -> Self {
        Self { counts: [const { AtomicU64::new(0) }; BUCKETS] }
    }

    /// Counts one duration.
    pub fn add(&self, time: Duration) {
        let microseconds = time.as_secs_f64() * 1e6;
        let bucket = ((microseconds.max(1.0).log2() * 4.0).ceil() as usize).min(BUCKETS - 1);
        // Relaxed: see the module's head.
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
    }

    /// The counts so far, to be subtracted from later ones.
    #[must_use]
    pub fn counts(&self) -> Vec<u64> {
        // Relaxed: see the module's head.
        self.counts.iter().map(|c| c.load(Ordering::Relaxed)).collect()
    }

    /// Quantiles of what was counted since `before`.
    #[must_use]
    pub fn since(&self, before: &[u64]) -> Quantiles {
        let counts: Vec<u64> = self.counts().iter().zip(before.iter().chain(std::iter::repeat(&0))).map(|(now, then)| now - then).collect();
        let count: u64 = counts.iter().sum();
        let edge = |bucket: usize| 2f64.powf(bucket as f64 / 4.0) / 1e3;
        let quantile = |share: f64| {
            let rank = ((count as f64 * share).ceil() as u64).max(1);
            let mut seen = 0;
            counts.iter().position(|c| {
                seen += c;
                seen >= rank
            })
        };
        let ms = |share| if count == 0 { 0.0 } else { quantile(share).map_or(0.0, edge) };
        let buckets_ms = counts.iter().enumerate().filter(|(_, c)| **c > 0).map(|(i, c)| (edge(i), *c)).collect();
        Quantiles { count, p50_ms: ms(0.5), p90_ms: ms(0.9), p99_ms: ms(0.99), max_ms: ms(1.0), buckets_ms }
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn quantiles_are_within_a_bucket_of_the_truth() {
        let histogram = Histogram::new();
        histogram.add(Duration::from_secs(100));
        let before = histogram.counts();
        for i in 1..=1000u64 {
            histogram.add(Duration::from_micros(i * 10));
        }
        let found = histogram.since(&before);
        assert_eq!(found.count, 1000);
        for (truth, value) in [(5.0, found.p50_ms), (9.0, found.p90_ms), (9.9, found.p99_ms), (10.0, found.max_ms)] {
            assert!(value >= truth * 0.999 && value <= truth * 1.2, "{value} for {truth}");
        }
        assert_eq!(found.buckets_ms.iter().map(|b| b.1).sum::<u64>(), 1000);
        assert_eq!(Histogram::new().since(&[]).max_ms, 0.0);
    }
}
