//! The encoder on another machine: `serenity-encoder --stdio` there, this one here, ssh between them.
//!
//! The machine with the images plans, keeps the cache and starts `ssh host serenity-encoder --stdio`; no port listens, and ssh alone says who
//! may. [`frame`] is the wire: every frame is checked whole before it is looked at. Nothing but versions is exchanged until the versions
//! agree, and nothing is encoded unless both sides have the same weights, tokenizer included. [`server`] makes entries with the same
//! [`crate::engine`] as a local run, so they have the same bytes; [`client`] verifies each and writes it whole or not at all. A cut
//! connection is opened again and goes on with what is missing then.

pub mod client;
pub mod frame;
pub mod server;
pub mod ssh;

use serde::{Deserialize, Serialize};
use serenity_protocol::cache::FORMAT_VERSION;

/// Version of the frames and of their order.
pub const WIRE_VERSION: u32 = 3;

/// First frame of both sides. Its form never changes, so that any two versions can tell each other apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`WIRE_VERSION`].
    pub wire: u32,
    /// Version of the cache's entries.
    pub format: u32,
    /// Version of the program.
    pub program: String,
}

impl Hello {
    /// This program's.
    #[must_use]
    pub fn ours() -> Self {
        Self { wire: WIRE_VERSION, format: FORMAT_VERSION, program: env!("CARGO_PKG_VERSION").to_string() }
    }
}

/// What all items are encoded with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Job {
    model: String,
    vae: Option<String>,
    text_encoder: Option<String>,
    /// The text encoder's slab, at the same path on both machines.
    text_encoder_slab: Option<String>,
    tokenizer: Option<String>,
    /// Identities of text encoder, tokenizer and VAE: both sides must have the same.
    identities: [String; 3],
    hidden_states: [usize; 3],
    max_length: usize,
    resolution: u32,
    /// `cpu`, or the ordinal of a CUDA device.
    device: Option<usize>,
    /// Image frames that follow, then caption frames.
    images: usize,
    captions: usize,
}

/// Head of an image frame; the image file's bytes follow.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ImageHead {
    id: usize,
    name: String,
}

/// A caption frame.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CaptionItem {
    id: usize,
    name: String,
    caption: String,
}

/// Head of an entry frame; the cache file's bytes follow.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EntryHead {
    text: bool,
    id: usize,
    blake3: String,
}

/// The server's error.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Failure {
    exit_code: u8,
    message: String,
    /// A frame came damaged: another connection may work.
    damaged: bool,
}
