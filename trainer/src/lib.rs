//! Trains LoRA adapters on a frozen FLUX.2 transformer whose blocks come one at a time from a `model::BlockSource`.
//!
//! The path of a step: samples, noise and noise levels (`data`, `timestep`, `rng`) → forward and backward block by
//! block (`model`) → clipping and AdamW on the float32 adapters (`optimizer`, `schedule`) → log, telemetry, checkpoint (`log`,
//! `telemetry`, `checkpoint`). `run` ties them together.

pub mod bench;
pub mod checkpoint;
pub mod cuda;
pub mod data;
pub mod engine;
pub mod gpu;
pub mod log;
pub mod lora_file;
pub mod memory;
pub mod model;
pub mod open;
pub mod optimizer;
pub mod parity;
pub mod payload;
pub mod plot;
pub mod ring_client;
pub mod ring_source;
pub mod rng;
pub mod run;
#[cfg(test)]
mod run_tests;
pub mod schedule;
pub mod settings;
pub mod slab_source;
pub mod source;
pub mod step;
pub mod synthetic_source;
pub mod telemetry;
#[cfg(test)]
mod test_support;
pub mod timestep;
pub mod validation;
