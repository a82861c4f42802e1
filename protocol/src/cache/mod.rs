//! The cache of text embeddings and image latents: what the encoder leaves for the trainer.
//!
//! **Names are content.** An entry's name is the BLAKE3 hash of everything that its content depends on: the caption (or the image
//! file's bytes), how it is transformed (resolution, crop rule), the encoder's weights, the tokenizer, the maximal length, the hidden
//! states, and [`FORMAT_VERSION`]. So adding one image encodes one image, a changed encoder never meets an old entry, two identical
//! captions share one entry, an interrupted run goes on where it stopped, and a folder filled on another machine is used as it is.
//! The type that the encoder computed in is not part of the name, for that reason: it is written in the entry's metadata.
//!
//! **Layout.** `<cache_dir>/text/ab/<64 hex>.safetensors` and `<cache_dir>/latent/ab/<64 hex>.safetensors`, where `ab` are the first two
//! digits; `<cache_dir>/identity.json` memoises digests ([`identity`]);
//! `<cache_dir>/components.json` notes whose work the entries are, so that a full cache needs no weights; `<cache_dir>/claims` says who is making what while encoders run
//! ([`claims`]).
//!
//! **Whole or not at all.** Entries are written with [`crate::atomic_file`] and carry a checksum over every byte. A corrupt or
//! half-written entry counts as missing when a [`CachePlan`] checks it and is [`crate::Error::Data`] when it is read.
//!
//! The path of a sample: [`crate::dataset::scan`] → [`CachePlan`] (which entries, which are missing) → `serenity-encoder` writes
//! [`TextEntry`] and [`LatentEntry`] → the trainer reads them through the same plan.

pub mod claims;
mod entry;
mod folder;
pub mod identity;
mod plan;
mod record;
pub mod text_model;

pub use entry::{LatentEntry, TextEntry};
pub use folder::{EntryInfo, Kind, Leftovers, entries, leftovers};
pub use plan::{CachePlan, Check, Key, LatentItem, PlannedSample, TextItem};

/// Version of the entries' format and of how they are computed. Raise it when either changes: old entries are then never used.
pub const FORMAT_VERSION: u32 = 1;
