//! What a component's weights were when they were last there: a run whose cache is full needs neither the text encoder's weights nor the
//! VAE's, and they may be deleted or stay on another machine.
//!
//! Entries are named by the weights that made them. Every plan that sees the weights notes their identity in `<cache_dir>/components.json`;
//! a plan that does not see them takes the note of the same folder, or else (a cache that was copied) the only note with the same
//! `config.json`. An entry that is missing then cannot be made, and the plan says so; nothing is ever encoded with other weights under
//! the old name.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::identity::Memo;
use super::text_model::config_file;
use crate::atomic_file;
use crate::error::{Error, Result};

/// Name of the notes in the cache folder.
const RECORD_FILE: &str = "components.json";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// `text encoder`, `text encoder slab` or `VAE`.
    kind: String,
    /// Digest of `config.json`.
    config: String,
    identity: String,
}

/// The notes of one cache folder, by the component's path.
#[derive(Debug, Default)]
pub(super) struct Records {
    file: PathBuf,
    notes: BTreeMap<String, Note>,
    changed: bool,
}

impl Records {
    /// The notes of `cache_dir`, empty if there are none.
    pub fn open(cache_dir: &Path) -> Self {
        let file = cache_dir.join(RECORD_FILE);
        let notes = std::fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        Self { file, notes, changed: false }
    }

    /// Writes the notes back if they changed and the cache folder exists. A failure is only logged.
    pub fn save(&self) {
        if !self.changed || !self.file.parent().is_some_and(Path::is_dir) {
            return;
        }
        let written = serde_json::to_vec_pretty(&self.notes)
            .map_err(|e| Error::invariant("the notes on components cannot be encoded").cause(e))
            .and_then(|bytes| atomic_file::write(&self.file, &bytes));
        if let Err(e) = written {
            tracing::warn!("the identities of text encoder and VAE were not noted, so their weights must stay: {e}");
        }
    }

    /// The identity of the component at `path`, and whether its weights are there.
    ///
    /// # Errors
    /// As [`Memo::component`]; [`Error::Absent`] for missing weights of which there is no note.
    pub fn identify(&mut self, memo: &mut Memo, path: &Path, kind: &str) -> Result<(String, bool)> {
        let found = memo.component(path);
        self.identify_as(memo, path, Some(path), kind, found)
    }

    /// As [`Self::identify`], where the identity was `found` in another way and `config.json` is that of another component, if any.
    ///
    /// # Errors
    /// As there, with `found`'s error.
    pub fn identify_as(
        &mut self,
        memo: &mut Memo,
        path: &Path,
        config_of: Option<&Path>,
        kind: &str,
        found: Result<String>,
    ) -> Result<(String, bool)> {
        let config = config_of.map(config_file).filter(|c| c.is_file()).map_or(Ok(String::new()), |c| memo.digest(&c))?;
        let name = path.canonicalize().unwrap_or_else(|_| path.to_path_buf()).to_string_lossy().into_owned();
        match found {
            Ok(identity) => {
                let note = Note { kind: kind.to_owned(), config, identity: identity.clone() };
                self.changed |= self.notes.get(&name) != Some(&note);
                self.notes.insert(name, note);
                Ok((identity, true))
            }
            Err(error @ Error::Absent(_)) => match self.note_of(&name, kind, &config) {
                Some(identity) => Ok((identity, false)),
                None => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    fn note_of(&self, name: &str, kind: &str, config: &str) -> Option<String> {
        let fits = |note: &&Note| note.kind == kind && note.config == config && !config.is_empty();
        if let Some(note) = self.notes.get(name).filter(fits) {
            return Some(note.identity.clone());
        }
        let mut identities: Vec<&str> = self.notes.values().filter(fits).map(|n| n.identity.as_str()).collect();
        identities.sort_unstable();
        identities.dedup();
        match identities.as_slice() {
            [one] => Some((*one).to_owned()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    struct Place {
        folder: tempfile::TempDir,
    }

    impl Place {
        fn component(&self, name: &str, config: &str, weights: &str) -> PathBuf {
            let path = self.folder.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join("config.json"), config).unwrap();
            std::fs::write(path.join("model.safetensors"), weights).unwrap();
            path
        }

        fn identify(&self, path: &Path, kind: &str) -> Result<(String, bool)> {
            let mut records = Records::open(self.folder.path());
            let found = records.identify(&mut Memo::open(self.folder.path()), path, kind);
            records.save();
            found
        }
    }

    fn without_weights(path: &Path) {
        std::fs::remove_file(path.join("model.safetensors")).unwrap();
    }

    #[test]
    fn weights_that_are_gone_are_what_they_were() {
        let place = Place { folder: tempfile::tempdir().unwrap() };
        let a = place.component("a", "{}", "one");
        let (first, there) = place.identify(&a, "VAE").unwrap();
        assert!(there);
        // Replaced: a new identity, and that one is remembered.
        std::fs::write(a.join("model.safetensors"), "two").unwrap();
        let (second, _) = place.identify(&a, "VAE").unwrap();
        assert_ne!(first, second);
        without_weights(&a);
        assert_eq!(place.identify(&a, "VAE").unwrap(), (second.clone(), false));
        // Another kind, or another configuration: not what was noted.
        assert_eq!(place.identify(&a, "text encoder").unwrap_err().exit_code(), 69);
        std::fs::write(a.join("config.json"), r#"{"x": 1}"#).unwrap();
        assert_eq!(place.identify(&a, "VAE").unwrap_err().exit_code(), 69);
    }

    #[test]
    fn a_copied_cache_is_found_by_its_configuration_unless_that_is_ambiguous() {
        let place = Place { folder: tempfile::tempdir().unwrap() };
        let a = place.component("a", "{}", "one");
        let (identity, _) = place.identify(&a, "VAE").unwrap();
        let moved = place.component("moved", "{}", "gone");
        without_weights(&moved);
        assert_eq!(place.identify(&moved, "VAE").unwrap(), (identity, false));
        let b = place.component("b", "{}", "two");
        place.identify(&b, "VAE").unwrap();
        assert_eq!(place.identify(&moved, "VAE").unwrap_err().exit_code(), 69);
    }
}
