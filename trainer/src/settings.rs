//! What decides the result of a run, as text: the part of a configuration that a checkpoint belongs to.
//!
//! Two runs with equal settings compute the same adapters at the same step, bit for bit. So settings hold the model, the slab, the
//! data, the seed and everything about the update, and leave out what only decides where bytes lie (pool, chunk and watermark sizes,
//! `dequant`, resident or streamed, threads), what is only watched (validation, telemetry, how often is saved) and where the files are.
//!
//! `max_steps` is part of it only where the learning rate of earlier steps depends on the length of the run
//! ([`crate::schedule::depends_on_length`]): a run with a constant schedule may be made longer and resumed.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use serde::{Deserialize, Serialize};
use serenity_protocol::config::Config;

use crate::model::AdapterSet;
use crate::schedule;

/// Version of everything that computes a step. Raise it when a change makes another result from the same settings.
const COMPUTATION: u32 = 1;

/// Setting to value.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings(BTreeMap<String, String>);

/// The parts of the settings that are no part of the configuration.
#[derive(Debug, Clone, Default)]
pub struct Inputs {
    /// What names the base weights: signature of the slab.
    pub weights: String,
    /// The manifest's name of the model.
    pub model: String,
    /// Digest of the samples: the contents of images and captions, in order, with repeats.
    pub data: String,
}

impl Settings {
    /// The settings of a run.
    #[must_use]
    pub fn new(config: &Config, inputs: &Inputs, adapters: &AdapterSet) -> Self {
        let mut this = Self::default();
        this.set("computation version", COMPUTATION);
        this.text("model", &inputs.model);
        this.text("base weights", &inputs.weights);
        this.text("samples", &inputs.data);
        this.text("adapted linears", &adapter_digest(adapters));
        this.set("adapter.rank", adapters.rank);
        this.set("adapter.alpha", adapters.alpha);
        this.set("seed", config.seed);
        this.set("resolution", config.resolution);
        this.set("batch_size", config.batch_size);
        this.set("gradient_accumulation_steps", config.gradient_accumulation_steps);
        this.set("compute type", config.dtype);
        this.set("guidance_scale", config.guidance_scale);
        this.set("timestep distribution", config.timestep.distribution);
        this.set("dynamic_timestep_shifting", config.timestep.dynamic_shift);
        if !config.timestep.dynamic_shift {
            this.set("timestep_shift", config.timestep.shift);
        }
        let o = &config.optimizer;
        for (key, value) in [
            ("learning_rate", o.learning_rate),
            ("optimizer.weight_decay", o.weight_decay),
            ("optimizer.beta1", o.beta1),
            ("optimizer.beta2", o.beta2),
            ("optimizer.eps", o.eps),
            ("max_grad_norm", o.max_grad_norm),
        ] {
            this.set(key, value);
        }
        this.set("scheduler.scheduler", config.scheduler.kind);
        this.set("scheduler.warmup_steps", config.scheduler.warmup_steps);
        if schedule::depends_on_length(&config.scheduler) {
            this.set("scheduler.min_factor", config.scheduler.min_factor);
            this.set("scheduler.num_cycles", config.scheduler.num_cycles);
            this.set("max_steps", config.max_steps);
        }
        this
    }

    fn set(&mut self, key: &str, value: impl Debug) {
        self.0.insert(key.to_string(), format!("{value:?}"));
    }

    fn text(&mut self, key: &str, value: &str) {
        self.0.insert(key.to_string(), value.to_string());
    }

    /// One sentence for each setting in which `self` (of a checkpoint) differs from `now`.
    #[must_use]
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let keys: BTreeSet<&String> = self.0.keys().chain(now.0.keys()).collect();
        let show = |value: Option<&String>| value.map_or("not set".to_string(), Clone::clone);
        keys.into_iter()
            .filter(|key| self.0.get(*key) != now.0.get(*key))
            .map(|key| format!("{key}: {} in the checkpoint, {} now", show(self.0.get(key)), show(now.0.get(key))))
            .collect()
    }
}

fn adapter_digest(adapters: &AdapterSet) -> String {
    let mut hasher = blake3::Hasher::new();
    for adapter in &adapters.adapters {
        hasher.update(format!("{} {:?} {:?}\n", adapter.name, adapter.a.dims(), adapter.b.dims()).as_bytes());
    }
    let hex = hasher.finalize().to_hex();
    format!("{} linears ({})", adapters.adapters.len(), &hex.as_str()[..16])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn each_difference_is_named_with_both_values() {
        let mut a = Settings::default();
        a.set("seed", 1);
        a.text("model", "x");
        let mut b = a.clone();
        assert!(a.differences(&b).is_empty());
        b.set("seed", 2);
        b.set("max_steps", 10);
        let named = a.differences(&b);
        assert_eq!(named, ["max_steps: not set in the checkpoint, 10 now", "seed: 1 in the checkpoint, 2 now"]);
    }
}
