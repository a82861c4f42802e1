//! The files of a slab: their names, the right to write them, and how they appear all at once.
//!
//! The order at the end is slab, companion, manifest: a manifest on the disk means that everything it names is whole.

use std::fs::File;
use std::path::{Path, PathBuf};

use serenity_protocol::slab::manifest::Manifest;
use serenity_protocol::{Error, Result, atomic_file};

use super::writer::publish;

/// Page size of the manifest's hashes for files that have at least `PAGES_MIN` such pages.
pub const PAGE_BYTES: u64 = 1 << 20;
/// Smaller files get smaller pages, so that a flipped byte is still pinned down.
const PAGES_MIN: u64 = 16;

/// The files of a slab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlabFiles {
    /// `PREFIX.safetensors`
    pub slab: PathBuf,
    /// `PREFIX.manifest.json`
    pub manifest: PathBuf,
    /// `PREFIX.other.safetensors`
    pub companion: PathBuf,
    /// `PREFIX.safetensors.partial`
    pub(super) partial: PathBuf,
    /// `PREFIX.other.safetensors.partial`
    pub(super) companion_partial: PathBuf,
    /// `PREFIX.build.partial`
    pub(super) journal: PathBuf,
}

impl SlabFiles {
    /// The files of `prefix`.
    ///
    /// # Errors
    /// [`Error::Config`] if the prefix ends in no name.
    pub fn of(prefix: &Path) -> Result<Self> {
        if prefix.file_name().is_none_or(|n| n.to_str().is_none()) || prefix.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err(Error::config("--output must be a path that ends in a name (UTF-8), without .safetensors").at(prefix));
        }
        let with = |ending: &str| {
            let mut path = prefix.as_os_str().to_owned();
            path.push(ending);
            PathBuf::from(path)
        };
        Ok(Self {
            slab: with(".safetensors"),
            manifest: with(".manifest.json"),
            companion: with(".other.safetensors"),
            partial: with(".safetensors.partial"),
            companion_partial: with(".other.safetensors.partial"),
            journal: with(".build.partial"),
        })
    }

    pub(super) fn folder(&self) -> &Path {
        self.slab.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }
}

/// The page size for a slab of `file_bytes`.
#[must_use]
pub fn page_bytes_for(file_bytes: u64) -> u64 {
    let mut page = PAGE_BYTES;
    while page > 4096 && file_bytes / page < PAGES_MIN {
        page /= 2;
    }
    page
}

/// Gives the finished files their names: slab, companion, manifest.
pub(super) fn finish(files: &SlabFiles, manifest: &Manifest) -> Result<()> {
    // An older slab of this name is being replaced: without its manifest nobody takes a mixture for a slab.
    match std::fs::remove_file(&files.manifest) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("cannot replace the old manifest", &files.manifest, e)),
        _ => {}
    }
    publish(&files.partial, &files.slab)?;
    publish(&files.companion_partial, &files.companion)?;
    atomic_file::write(&files.manifest, manifest.to_json()?.as_bytes())?;
    // Done with; a leftover would only be overwritten by the next build.
    let _ = std::fs::remove_file(&files.journal);
    Ok(())
}

/// The right to write one slab's files. Dropping it removes the lock file and frees the lock.
pub(super) struct BuildLock {
    path: PathBuf,
    _file: File,
}

impl Drop for BuildLock {
    fn drop(&mut self) {
        // Still locked here, and lock() looks again at what it locked: nobody can end up with a lock on a removed file.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Keeps a second build of the same files away.
pub(super) fn lock(files: &SlabFiles) -> Result<BuildLock> {
    use std::os::unix::fs::MetadataExt;
    let mut path = files.journal.clone().into_os_string();
    path.push(".lock");
    let path = PathBuf::from(path);
    let io = |e| Error::io("cannot create the build's lock file", &path, e);
    loop {
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(io)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|e| {
            Error::absent("another process is building this slab")
                .at(&files.slab)
                .advice("wait for it, or choose another --output")
                .cause(e)
        })?;
        // The file may have been removed by its last owner between open and lock.
        let locked = file.metadata().map_err(io)?.ino();
        if std::fs::metadata(&path).is_ok_and(|m| m.ino() == locked) {
            return Ok(BuildLock { path, _file: file });
        }
    }
}

/// A NaN or an infinity in the checkpoint.
pub(super) fn not_finite(name: &str, row: usize, column: usize, file: &Path) -> Error {
    Error::data(format!("tensor '{name}' holds a value that is no number at row {row}, column {column}"))
        .at(file)
        .expected("finite values")
        .found("NaN or infinity")
        .advice("the checkpoint is corrupt: download or convert it again")
}
