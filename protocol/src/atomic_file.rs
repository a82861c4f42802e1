//! Files that outlive a process appear whole or not at all: temporary file in the same folder, fsync, rename, fsync of the folder.
//!
//! A crash at any point leaves either the old file or the new one, plus at most one file ending in [`TEMP_SUFFIX`] for each
//! crash. Its name holds machine and process, so that writers of one file on shared storage never write into each other's. Readers never look
//! at such files.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::error::{Error, Result};

/// Ending of files that are not complete yet.
pub const TEMP_SUFFIX: &str = ".partial";

/// Writes `bytes` to `path` so that a crash at any moment leaves the old content or the new one.
///
/// # Errors
/// Disk full and friends as [`Error::TryAgain`]; the target is then untouched.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |file| file.write_all(bytes))
}

/// As `write`, with the content produced by `fill`.
///
/// # Errors
/// What `fill` returns, or a failure to create, sync or rename.
pub fn write_with(path: &Path, fill: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<()> {
    let temp = temp_path(path);
    let done = (|| {
        if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder)?;
        }
        let mut file = File::create(&temp)?;
        fill(&mut file)?;
        file.sync_all()?;
        drop(file);
        commit(&temp, path)
    })();
    done.map_err(|e| {
        // The cause is reported; a leftover temporary file is harmless, so a failure to remove it is not.
        let _ = std::fs::remove_file(&temp);
        Error::io("cannot write the file", path, e)
    })
}

/// Where `write` builds `path`: machine and process id keep two writers of one file apart.
#[must_use]
pub fn temp_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(format!(".{}-{}{TEMP_SUFFIX}", host_id(), std::process::id()));
    PathBuf::from(name)
}

/// Sixteen hex digits that name this machine in this boot and, within it, the name space of process ids (a container): where two
/// processes have the same one, a process id means the same to both.
#[must_use]
pub fn host_id() -> String {
    static ID: OnceLock<String> = OnceLock::new();
    let make = || {
        let mut hasher = blake3::Hasher::new();
        for file in ["/proc/sys/kernel/hostname", "/etc/machine-id", "/proc/sys/kernel/random/boot_id"] {
            hasher.update(&std::fs::read(file).unwrap_or_default()).update(b"\0");
        }
        hasher.update(std::fs::read_link("/proc/self/ns/pid").unwrap_or_default().as_os_str().as_encoded_bytes());
        hasher.finalize().to_hex().as_str().chars().take(16).collect()
    };
    ID.get_or_init(make).clone()
}

/// Renames an already synced `temp` to `path` and syncs the folder.
///
/// # Errors
/// The operating system's.
pub fn commit(temp: &Path, path: &Path) -> std::io::Result<()> {
    std::fs::rename(temp, path)?;
    sync_folder_of(path)
}

/// Makes a rename or creation in the folder of `path` survive a power cut.
///
/// # Errors
/// The operating system's.
pub fn sync_folder_of(path: &Path) -> std::io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}
