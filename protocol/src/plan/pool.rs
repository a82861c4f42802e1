//! The ring's size: what `auto` takes, and what each size costs.
//!
//! A step visits the blocks 0..N-1 and then N-1..0. The loader keeps what is needed soonest and gives up what is needed last
//! (design of the ring), which no other rule beats, so the reads of a step follow from the order and the number of slots alone: they are
//! counted here by playing steps. Blocks that stay on the device and are not requested at all make it less.

use std::collections::{BTreeSet, HashMap};
use std::fmt::{self, Display, Formatter};

use serde::Serialize;

use super::human_bytes;
use super::memory::{RingMemory, SHM, available_memory};
use crate::config::{Config, PayloadForm};
use crate::geometry::TransformerGeometry;
use crate::ring;
use crate::ring::segment::RingSpec;
use crate::ring::words::SLOTS_MAX;
use crate::slab::layout::PART_ALIGN;

/// Slots are whole pages.
const SLOT_ALIGN: u64 = 4096;
/// Sequential read rate for which times are stated: a common NVMe disk.
const DISK_RATE: f64 = 3e9;

/// What one size of the pool costs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PoolCost {
    /// Payload bytes of the ring.
    pub pool_bytes: u64,
    /// Payload bytes that a step takes from the disk once the run is under way, at most.
    pub step_bytes: u64,
    /// Whether it is the size of this run.
    pub ours: bool,
}

impl Display for PoolCost {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (pool, bytes) = (human_bytes(self.pool_bytes), human_bytes(self.step_bytes));
        let seconds = self.step_bytes as f64 / DISK_RATE;
        let ours = if self.ours { "  <- this run" } else { "" };
        write!(f, "with {pool:>9}: {bytes:>9} of payload a step from the disk, {seconds:.1} s at 3 GB/s{ours}")
    }
}

impl RingMemory {
    /// The settings that give this size to every process.
    #[must_use]
    pub fn settings(&self) -> Vec<String> {
        let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
        vec![
            format!("memory.stagehand.pinned_pool_mb={}", mib(self.slots * self.chunk_bytes)),
            format!("memory.stagehand.ring_chunk_mb={}", mib(self.chunk_bytes)),
        ]
    }
}

/// The ring of `config`; `on_host` are the bytes that the trainer is predicted to need on the host.
pub(super) fn ring_memory(config: &Config, geometry: &TransformerGeometry, on_host: u64) -> RingMemory {
    let s = &config.memory.stagehand;
    let payloads = payload_bytes(geometry, s.form);
    let chosen = s.pool_bytes.is_none();
    let chunk_bytes = if chosen { fitting_chunk(&payloads, s.chunk_bytes) } else { s.chunk_bytes };
    let spec = |slots: u64| RingSpec {
        name: ring::name(config),
        slots: slots as usize,
        chunk_bytes,
        signature: 0,
        form: s.form,
        blocks: geometry.num_blocks(),
        consumers: s.consumers,
    };
    let left_over = std::fs::metadata(spec(2).path()).map_or(0, |m| m.len());
    let free_bytes = super::free_bytes(SHM.as_ref()).unwrap_or(0).saturating_add(left_over);
    let whole: u64 = payloads.iter().map(|b| b.div_ceil(chunk_bytes)).sum();
    let slots = s.pool_bytes.map_or_else(
        || {
            let memory = available_memory().map_or(u64::MAX, |a| allowed(a.saturating_add(left_over), on_host));
            let room = memory.min(free_bytes).saturating_sub(spec(2).bytes().saturating_sub(2 * chunk_bytes));
            // Tables grow with the slots: a part in 256 covers them.
            (room - room / 256) / chunk_bytes
        },
        |pool| pool / chunk_bytes,
    );
    // Two slots for each consumer are the least that overlaps; where they do not fit either, the plan says so.
    let fewest = 2 * s.consumers as u64;
    let slots = if chosen { slots.min(whole).clamp(fewest, SLOTS_MAX as u64) } else { slots };
    let costs = costs(&payloads, chunk_bytes, slots);
    RingMemory { bytes: spec(slots).bytes(), slots, chunk_bytes, free_bytes, chosen, costs }
}

/// What the ring may take of `available` bytes of memory: never over 80 %, and what the trainer needs stays free.
fn allowed(available: u64, trainer: u64) -> u64 {
    (available / 5 * 4).min(available.saturating_sub(trainer))
}

/// A slot no larger than `most`, smaller for small models: an eighth of the largest block.
fn fitting_chunk(payloads: &[u64], most: u64) -> u64 {
    let largest = payloads.iter().copied().max().unwrap_or(0);
    let eighth = (largest / 8).next_multiple_of(SLOT_ALIGN).max(SLOT_ALIGN);
    most.min(eighth)
}

/// Payload bytes of each block, as [`crate::slab::layout`] lays them out for a slab without padding.
fn payload_bytes(geometry: &TransformerGeometry, form: PayloadForm) -> Vec<u64> {
    let of_linear = |rows: u64, columns: u64| match form {
        PayloadForm::Bf16 => (rows * columns * 2).next_multiple_of(PART_ALIGN),
        PayloadForm::Int8 => (rows * columns).next_multiple_of(PART_ALIGN) + (rows * 4).next_multiple_of(PART_ALIGN),
    };
    let linears = |block| geometry.block_linears(block);
    geometry.blocks().map(|b| linears(b).iter().map(|l| of_linear(l.out_features as u64, l.in_features as u64)).sum()).collect()
}

/// Costs of an eighth, a quarter, a half, three quarters and all of the model, and of `ours` slots.
fn costs(payloads: &[u64], chunk_bytes: u64, ours: u64) -> Vec<PoolCost> {
    // Chunks of 1/2000 of the model are fine enough for a prediction and quick to play.
    let total: u64 = payloads.iter().sum();
    let grain = chunk_bytes.max(total / 2000).max(1);
    let chunks: Vec<Vec<u64>> =
        payloads.iter().map(|bytes| (0..bytes.div_ceil(grain)).map(|i| grain.min(bytes - i * grain)).collect()).collect();
    let whole: u64 = payloads.iter().map(|b| b.div_ceil(chunk_bytes)).sum();
    let mut sizes: Vec<u64> = [whole / 8, whole / 4, whole / 2, whole / 4 * 3, whole, ours].into_iter().filter(|s| *s >= 2).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let cost = |slots: u64| {
        let pool_bytes = slots.saturating_mul(chunk_bytes);
        PoolCost { pool_bytes, step_bytes: step_bytes(&chunks, (pool_bytes / grain).max(2) as usize), ours: slots == ours }
    };
    sizes.into_iter().map(cost).collect()
}

/// Bytes that a step reads with `slots` slots when the slot given up is always the one needed last: the third step of a run, which no
/// longer depends on the start.
fn step_bytes(blocks: &[Vec<u64>], slots: usize) -> u64 {
    let visit = |b: usize| (0..blocks[b].len()).map(move |c| (b, c));
    let step: Vec<(usize, usize)> = (0..blocks.len()).chain((0..blocks.len()).rev()).flat_map(visit).collect();
    let uses: Vec<(usize, usize)> = step.iter().copied().cycle().take(step.len() * 4).collect();
    let mut next = vec![usize::MAX; uses.len()];
    let mut seen: HashMap<(usize, usize), usize> = HashMap::new();
    for (at, chunk) in uses.iter().enumerate().rev() {
        next[at] = seen.insert(*chunk, at).unwrap_or(usize::MAX);
    }
    // What is held, by when it is needed next.
    let mut held: BTreeSet<(usize, (usize, usize))> = BTreeSet::new();
    let mut read = 0;
    for (at, chunk) in uses.iter().enumerate().take(step.len() * 3) {
        if !held.remove(&(at, *chunk)) {
            if held.len() >= slots {
                held.pop_last();
            }
            if at >= step.len() * 2 {
                read += blocks[chunk.0][chunk.1];
            }
        }
        held.insert((next[at], *chunk));
    }
    read
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    /// Least reads of the third step over all choices of what to give up, by trying them all.
    fn least(uses: &[usize], from: usize, slots: usize, held: &mut Vec<usize>, at: usize) -> u64 {
        let Some(chunk) = uses.get(at) else { return 0 };
        if held.contains(chunk) {
            return least(uses, from, slots, held, at + 1);
        }
        let cost = u64::from(at >= from);
        if held.len() < slots {
            held.push(*chunk);
            let rest = least(uses, from, slots, held, at + 1);
            held.pop();
            return cost + rest;
        }
        let mut best = u64::MAX;
        for victim in 0..held.len() {
            let old = std::mem::replace(&mut held[victim], *chunk);
            best = best.min(least(uses, from, slots, held, at + 1));
            held[victim] = old;
        }
        cost + best
    }

    #[test]
    fn reads_are_the_fewest_possible() {
        for (blocks, slots) in [(3, 2), (4, 2), (4, 3), (5, 4)] {
            let of_one = vec![vec![1u64]; blocks];
            let step: Vec<usize> = (0..blocks).chain((0..blocks).rev()).collect();
            // All reads of two steps, so that what one step leaves to the next counts.
            let two: Vec<usize> = step.iter().copied().cycle().take(step.len() * 2).collect();
            let fewest = least(&two, 0, slots, &mut Vec::new(), 0);
            let first = least(&step, 0, slots, &mut Vec::new(), 0);
            assert_eq!(step_bytes(&of_one, slots), fewest - first, "{blocks} blocks, {slots} slots");
        }
    }

    #[test]
    fn a_pool_of_the_models_size_reads_nothing_and_each_slot_saves_reads() {
        let blocks: Vec<Vec<u64>> = (0..20).map(|b| vec![7; 1 + b % 3]).collect();
        let chunks: usize = blocks.iter().map(Vec::len).sum();
        let reads: Vec<u64> = (2..=chunks).map(|slots| step_bytes(&blocks, slots)).collect();
        assert_eq!(reads.last(), Some(&0));
        assert!(reads.windows(2).all(|w| w[1] < w[0]), "{reads:?}");
        // Both turns reuse what the slots hold; everything else is read twice.
        assert!(reads[0] <= 2 * 7 * chunks as u64 - 2 * 7);
    }

    #[test]
    fn the_ring_leaves_memory_to_others() {
        assert_eq!(allowed(100, 0), 80);
        assert_eq!(allowed(100, 50), 50);
        assert_eq!(allowed(100, 200), 0);
    }

    #[test]
    fn settings_name_the_size_exactly() {
        let ring = RingMemory { bytes: 0, slots: 3, chunk_bytes: 12_288, free_bytes: 0, chosen: true, costs: Vec::new() };
        let value = |text: &str| text.split_once('=').unwrap().1.parse::<f64>().unwrap() * 1_048_576.0;
        assert_eq!(ring.settings().iter().map(|s| value(s)).collect::<Vec<_>>(), [36_864.0, 12_288.0]);
    }
}
