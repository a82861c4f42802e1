//! The hub's local cache: `models--OWNER--NAME/{refs,blobs,snapshots}`, and whether it has all of a model.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serenity_protocol::{Error, Result};

/// An id of the hub, `owner/name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    owner: String,
    name: String,
}

impl HubId {
    /// `None` if the text cannot be an id.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (owner, name) = text.split_once('/')?;
        let plain = |s: &str| {
            !s.is_empty() && s.len() <= 96 && !s.starts_with('.') && s.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_.".contains(&c))
        };
        (plain(owner) && plain(name)).then(|| Self { owner: owner.into(), name: name.into() })
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

/// The cache's folder.
pub(crate) struct HubCache {
    root: PathBuf,
}

impl HubCache {
    /// By the hub's own rules: `HF_HUB_CACHE`, `HF_HOME/hub`, `~/.cache/huggingface/hub`.
    pub(crate) fn from_environment() -> Result<Self> {
        let root = variable("HF_HUB_CACHE").or_else(|| home().map(|h| h.join("hub")));
        let root = root.ok_or_else(|| Error::absent("the hub cache's folder is unknown").advice("set HF_HOME"))?;
        // hf-hub wants absolute paths.
        let root = std::path::absolute(&root).map_err(|e| Error::io("cannot find the hub cache", &root, e))?;
        Ok(Self { root })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn repository(&self, id: &HubId) -> PathBuf {
        self.root.join(format!("models--{}--{}", id.owner, id.name))
    }

    /// What the cached revision `main` lacks, in words; `None` if it lacks nothing.
    pub(crate) fn lacking(&self, id: &HubId, folders: &[&str]) -> Result<Option<String>> {
        let repository = self.repository(id);
        let Ok(revision) = std::fs::read_to_string(repository.join("refs/main")) else { return Ok(Some(format!("the model '{id}'"))) };
        let snapshot = repository.join("snapshots").join(revision.trim());
        if revision.trim().is_empty() || revision.contains(['/', '\\']) || !snapshot.is_dir() {
            return Ok(Some(format!("the model '{id}'")));
        }
        if has_marks(&repository) {
            return Ok(Some(format!("a check of files of '{id}' whose download was interrupted")));
        }
        let listed = pipeline_folders(&snapshot);
        for folder in folders.iter().filter(|f| listed.as_ref().is_none_or(|l| l.iter().any(|x| x == **f))) {
            if let Some(lack) = folder_lacks(&snapshot.join(folder), folder)? {
                return Ok(Some(format!("{lack} of '{id}'")));
            }
        }
        Ok(None)
    }
}

/// The token, by the hub's own rules: `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HOME/token`.
pub(crate) fn token() -> Option<String> {
    let path = || variable("HF_TOKEN_PATH").or_else(|| home().map(|h| h.join("token")));
    let token = std::env::var("HF_TOKEN").ok().filter(|t| !t.trim().is_empty());
    token.or_else(|| std::fs::read_to_string(path()?).ok()).map(|t| t.trim().to_owned()).filter(|t| !t.is_empty())
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from)
}

fn home() -> Option<PathBuf> {
    variable("HF_HOME").or_else(|| variable("HOME").map(|h| h.join(".cache/huggingface")))
}

/// Ending of the mark beside a blob that has not been compared yet.
pub(crate) const UNCHECKED: &str = "unchecked";

fn has_marks(repository: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(repository.join("blobs")) else { return false };
    entries.flatten().any(|e| e.file_name().to_string_lossy().ends_with(&format!(".{UNCHECKED}")))
}

/// The folders that the pipeline's index names, if there is one.
fn pipeline_folders(snapshot: &Path) -> Option<Vec<String>> {
    let index: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&std::fs::read(snapshot.join("model_index.json")).ok()?).ok()?;
    Some(index.into_iter().filter(|(name, v)| !name.starts_with('_') && v.is_array()).map(|(name, _)| name).collect())
}

/// The first file that a component's folder lacks: a configuration, and every shard that an index names.
fn folder_lacks(folder: &Path, name: &str) -> Result<Option<String>> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(Some(format!("the folder {name}"))) };
    let mut files: Vec<String> = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
    files.sort();
    // `is_file` follows the link into the blobs.
    let there = |file: &str| folder.join(file).is_file();
    if !files.iter().any(|f| f.ends_with(".json") && there(f)) {
        return Ok(Some(format!("a configuration in {name}")));
    }
    if matches!(name, "tokenizer" | "scheduler") {
        return Ok(None);
    }
    if let Some(index) = files.iter().find(|f| f.ends_with(".safetensors.index.json")) {
        #[derive(Deserialize)]
        struct Index {
            weight_map: std::collections::BTreeMap<String, String>,
        }
        let path = folder.join(index);
        let text = std::fs::read(&path).map_err(|e| Error::io("cannot read the shard index", &path, e))?;
        let index: Index = serde_json::from_slice(&text).map_err(|e| Error::data("the shard index is malformed").at(&path).cause(e))?;
        let missing = index.weight_map.into_values().find(|shard| !there(shard));
        return Ok(missing.map(|shard| format!("{name}/{shard}")));
    }
    if files.iter().any(|f| f.ends_with(".safetensors") && there(f)) { Ok(None) } else { Ok(Some(format!("the weights in {name}"))) }
}
