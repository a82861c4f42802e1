//! What lies in a cache folder, whichever run needs it: for `serenity-encoder cache`.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::{LatentEntry, TextEntry, claims, entry};
use crate::atomic_file::TEMP_SUFFIX;
use crate::error::{Error, Result};

/// A file under construction that nobody has touched for this long belongs to a process that is gone.
const ABANDONED: Duration = Duration::from_secs(3600);

/// The two kinds of entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// An embedding.
    Text,
    /// A latent.
    Latent,
}

impl Kind {
    /// Name of its folder.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Latent => "latent",
        }
    }
}

/// An entry in the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryInfo {
    /// File.
    pub path: PathBuf,
    /// Kind.
    pub kind: Kind,
    /// Size of the file.
    pub bytes: u64,
}

impl EntryInfo {
    /// Reads it and verifies every byte.
    ///
    /// # Errors
    /// [`Error::Data`] if it is corrupt.
    pub fn verify(&self) -> Result<()> {
        match self.kind {
            Kind::Text => TextEntry::read(&self.path).map(drop),
            Kind::Latent => LatentEntry::read(&self.path).map(drop),
        }
    }

    /// Its metadata; `None` if its header is corrupt.
    #[must_use]
    pub fn notes(&self) -> Option<BTreeMap<String, String>> {
        entry::notes(&self.path, self.kind.name())
    }
}

/// What is in the folder besides entries.
#[derive(Debug, Default)]
pub struct Leftovers {
    /// Entries that were found corrupt and set aside, and files that dead writers left.
    pub files: Vec<PathBuf>,
    /// Claims and sessions of processes that are gone.
    pub dead_claims: usize,
    /// Entries that running encoders are making.
    pub living_claims: usize,
}

/// All entries in `cache_dir`, sorted by path. A folder that does not exist has none.
///
/// # Errors
/// [`Error::Absent`] if a folder cannot be read.
pub fn entries(cache_dir: &Path) -> Result<Vec<EntryInfo>> {
    let mut found = Vec::new();
    for kind in [Kind::Latent, Kind::Text] {
        for (path, bytes, _) in files_of(cache_dir, kind)? {
            if path.extension().is_some_and(|e| e == "safetensors") {
                found.push(EntryInfo { path, kind, bytes });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// What else is in `cache_dir`; with `remove`, the dead processes' claims are removed.
///
/// # Errors
/// [`Error::Absent`] if a folder cannot be read.
pub fn leftovers(cache_dir: &Path, remove: bool) -> Result<Leftovers> {
    let mut files = Vec::new();
    for kind in [Kind::Latent, Kind::Text] {
        for (path, _, age) in files_of(cache_dir, kind)? {
            let corrupt = path.extension().is_some_and(|e| e == "corrupt");
            if corrupt || (path.to_string_lossy().ends_with(TEMP_SUFFIX) && age > ABANDONED) {
                files.push(path);
            }
        }
    }
    files.sort();
    let (dead_claims, living_claims) = claims::sweep(cache_dir, remove);
    Ok(Leftovers { files, dead_claims, living_claims })
}

/// Path, size and age of the files of one kind.
fn files_of(cache_dir: &Path, kind: Kind) -> Result<Vec<(PathBuf, u64, Duration)>> {
    let root = cache_dir.join(kind.name());
    let failed = |e| Error::io("cannot read the cache folder", &root, e);
    let mut files = Vec::new();
    if !root.is_dir() {
        return Ok(files);
    }
    for folder in std::fs::read_dir(&root).map_err(failed)? {
        let folder = folder.map_err(failed)?.path();
        if !folder.is_dir() {
            continue;
        }
        for file in std::fs::read_dir(&folder).map_err(failed)? {
            let path = file.map_err(failed)?.path();
            // A file that vanishes meanwhile was renamed by its writer.
            let Ok(meta) = std::fs::metadata(&path) else { continue };
            let age = meta.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok()).unwrap_or_default();
            files.push((path, meta.len(), age));
        }
    }
    Ok(files)
}
