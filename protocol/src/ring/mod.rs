//! The ring: a named shared segment through which blocks travel from one loader to one or more trainers.
//!
//! [`words`] says where each fact lives; [`producer`] and [`consumer`] are the two state machines over those words, pure, without a
//! system call; [`segment`] is the real memory, with locks, futexes and payload slots; [`plan`] is what both ends
//! derive from the configuration and the slab. A slot goes
//! FREE → FILLING (loader) → FREE with content; each consumer's share of it goes FREE → READY (loader) → LEASED (consumer) → FREE; each step
//! is one compare-and-swap of one word that holds state, owner epoch and generation or ordinal.
//!
//! Failure: a process that finds itself replaced (fenced) stops and touches nothing; a dead process's slots are freed by its successor, who
//! may take the role only when the kernel has dropped the dead one's lock, and a dead consumer's by the loader as well.

pub mod consumer;
mod guard;
pub mod pages;
pub mod plan;
pub mod producer;
pub mod segment;
mod spec;
mod stream;
pub mod words;

#[cfg(test)]
mod tests;

use crate::config::Config;

/// Name of the run's segment below /dev/shm: runs with different output folders never meet, unless `ring_of` makes one a guest of the
/// other.
#[must_use]
pub fn name(config: &Config) -> String {
    // Made absolute without touching the disk: the folder need not exist yet, and every process starts in the same one.
    let folder = config.memory.stagehand.ring_of.as_ref().unwrap_or(&config.output_dir);
    let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.clone());
    let digest = blake3::hash(folder.as_os_str().as_encoded_bytes());
    format!("serenity-{}", &digest.to_hex()[..16])
}

/// Unlinks the run's segment if nobody is attached to it any more.
pub fn cleanup(config: &Config) {
    segment::unlink_if_unused(&std::path::Path::new("/dev/shm").join(name(config)));
}
