//! Models of the Hugging Face hub: from the local hub cache, or into it.
//!
//! [`ensure`] is called once, by the process that a person starts, before anything resolves `model.path`. It downloads what the local cache
//! lacks and leaves everything in the cache's own layout, where `serenity_protocol::model_path` (and every other tool) finds it. It is
//! a crate of its own so that the other processes carry no HTTP client.
//!
//! * Cache first: a complete model is used without a single request, and `HF_HUB_OFFLINE` forbids requests altogether.
//! * Files are fetched one after the other by the `hf-hub` crate, which resumes a part file at its length. Transfers are tried again a
//!   few times; each attempt goes on where the last one stopped.
//! * A file is compared with the size and the SHA-256 that the hub states. Until that has happened a mark lies beside its blob, so that a
//!   kill between download and comparison cannot leave an unchecked file behind unseen.
//! * `refs/main` is written last: a cache that has it for this revision has the whole model.
//!
//! Only the folders of the pipeline are fetched ([`FOLDERS`]), never the single-file duplicates in the repository's root.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod cache;
mod download;
mod explain;

use std::path::Path;

use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result};

pub use cache::HubId;

/// Folders of a pipeline that are needed, most important first.
pub const FOLDERS: &[&str] = &["transformer", "vae", "text_encoder", "tokenizer", "scheduler"];
/// Folders that a slab is built from.
pub const TRANSFORMER_ONLY: &[&str] = &["transformer"];
/// Folders that a text encoder's slab stands for.
pub const TEXT_ENCODER_ONLY: &[&str] = &["text_encoder"];

/// Makes sure that `model` can be resolved locally. A path that exists, or that is no hub id, is left alone: resolving it explains what is
/// wrong with it. Of a hub id, the files in `folders` are downloaded unless the local cache has them.
///
/// Read from the environment, with the hub's own meaning: `HF_HUB_CACHE`, `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`,
/// `HF_HUB_OFFLINE`.
///
/// # Errors
/// [`Error::Absent`] for a model that does not exist, is gated, or is not cached while offline; [`Error::Data`] for a file that is not what
/// the hub says it is; [`Error::TryAgain`] for a connection that keeps breaking, a full disk or an interruption: the next call goes on.
pub fn ensure(model: &str, folders: &[&str], process: &Process) -> Result<()> {
    if Path::new(model).exists() {
        return Ok(());
    }
    let Some(id) = HubId::parse(model) else { return Ok(()) };
    let cache = cache::HubCache::from_environment()?;
    let lacking = match cache.lacking(&id, folders)? {
        None => return Ok(()),
        Some(lacking) => lacking,
    };
    if offline() {
        return Err(Error::absent(format!(
            "the model '{id}' is not complete in the local hub cache, and HF_HUB_OFFLINE forbids a download"
        ))
        .at(cache.root())
        .expected(lacking)
        .advice("unset HF_HUB_OFFLINE, set HF_HOME to the cache that has the model, or give the path of a local folder"));
    }
    tracing::info!("the local hub cache lacks {lacking}: downloading");
    download::download(&cache, &id, folders, process)
}

/// `HF_HUB_OFFLINE` as the hub's Python library reads it.
fn offline() -> bool {
    std::env::var("HF_HUB_OFFLINE").is_ok_and(|v| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
}
