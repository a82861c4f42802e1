//! The plan as text for people.

use std::fmt::{self, Display, Formatter};

use super::memory::total;
use super::{Amount, Plan, SlabState};

/// Bytes in the largest unit that keeps the number above 1: `8.0 GiB`.
#[must_use]
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

/// A count in thousands, millions or billions: `36.2 M`.
fn human_count(n: u64) -> String {
    match n {
        0..10_000 => n.to_string(),
        10_000..1_000_000 => format!("{:.1} k", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", n as f64 / 1e6),
        _ => format!("{:.2} B", n as f64 / 1e9),
    }
}

impl Display for Plan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "plan of '{}' ({})", self.name, self.config.display())?;
        let mut row = |label: &str, text: String| writeln!(f, "  {label:<10}{text}");
        row("model", self.model_row())?;
        row("slab", self.slab_row())?;
        row("data", self.data_row())?;
        row("adapters", self.adapter_row())?;
        for (entry, count) in &self.adapters.entries {
            row("", format!("{entry:<28}{count:>5} linears"))?;
        }
        row("training", self.training_row())?;
        if let Some(ring) = &self.memory.ring {
            let (slots, chunk) = (ring.slots, human_bytes(ring.chunk_bytes));
            let size = format!("{} = {slots} slots of {chunk}", human_bytes(ring.bytes));
            let chosen = if ring.chosen { ", chosen from what is free" } else { "" };
            row("ring", format!("{size} carrying {}, {} free in /dev/shm{chosen}", self.training.payload, human_bytes(ring.free_bytes)))?;
            for cost in &ring.costs {
                row("", cost.to_string())?;
            }
        }
        if self.memory.trainer_host.is_empty() {
            row("memory", amounts("trainer", "about", &self.memory.trainer))?;
        } else {
            row("memory", amounts("trainer on the GPU", "at least about", &self.memory.trainer))?;
            row("", amounts("trainer, page-locked", "at most", &self.memory.trainer_host))?;
        }
        if !self.memory.encoder.is_empty() {
            row("", amounts("encoder", "about", &self.memory.encoder))?;
        }
        for disk in &self.disk {
            let (needed, free) = (human_bytes(disk.needed_bytes), human_bytes(disk.free_bytes));
            row("disk", format!("up to {needed} for {} below {}, {free} free", disk.what.join(" and "), disk.path.display()))?;
        }
        row("output", self.output_dir.display().to_string())?;
        for notice in &self.notices {
            writeln!(f, "  note: {notice}")?;
        }
        for problem in &self.problems {
            writeln!(f, "  problem: {problem}")?;
        }
        Ok(())
    }
}

/// `trainer about 9.1 GiB: adapters 0.5 GiB, …`
fn amounts(process: &str, how: &str, parts: &[Amount]) -> String {
    let each: Vec<String> = parts.iter().map(|a| format!("{} {}", a.what, human_bytes(a.bytes))).collect();
    format!("{process} {how} {}: {}", human_bytes(total(parts)), each.join(", "))
}

impl Plan {
    fn model_row(&self) -> String {
        let m = &self.model;
        let blocks = format!("{} double + {} single blocks of width {}", m.double_blocks, m.single_blocks, m.inner_dim);
        format!("{}: {blocks}, {} parameters", m.transformer.display(), human_count(m.parameters))
    }

    fn slab_row(&self) -> String {
        let size = human_bytes(self.slab.bytes);
        let state = match self.slab.state {
            SlabState::Missing => format!("missing, will be built (about {size})"),
            SlabState::Present => format!("present ({size})"),
            SlabState::Unusable => "not usable, see below".to_string(),
        };
        format!("{}: {state}", self.slab.path.display())
    }

    fn data_row(&self) -> String {
        let c = &self.cache;
        let state = if c.is_complete() {
            "all cached".to_string()
        } else {
            format!("to encode: {} of {} captions, {} of {} images", c.captions_missing, c.captions, c.images_missing, c.images)
        };
        format!("{} images with captions; {state} (cache {})", c.samples, c.folder.display())
    }

    fn adapter_row(&self) -> String {
        let a = &self.adapters;
        format!("LoRA rank {} alpha {} on {} linears, {} parameters", a.rank, a.alpha, a.linears, human_count(a.parameters))
    }

    fn training_row(&self) -> String {
        let t = &self.training;
        let tokens = format!("{} image + {} text tokens", t.image_tokens, t.text_tokens);
        let batch = format!("{} x {} samples a step", t.accumulation, t.batch_size);
        format!("{} steps, {batch}, {} px ({tokens}), {} on {}", t.steps, t.resolution, t.strategy, t.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_follow_the_size() {
        for (bytes, text) in [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (8 << 30, "8.0 GiB"), (u64::MAX, "16384.0 PiB")] {
            assert_eq!(human_bytes(bytes), text);
        }
        for (count, text) in [(9999, "9999"), (36_175_872, "36.2 M"), (32_223_281_152, "32.22 B")] {
            assert_eq!(human_count(count), text);
        }
    }
}
