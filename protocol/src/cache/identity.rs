//! Digests of the files that entries depend on, memoised so that a run with everything cached opens none of them.
//!
//! A file is hashed whole, except a weight file over [`WHOLE_BYTES_MAX`]: of that one, which would take as long to hash as to use, the header and
//! the start, middle and end of every tensor are hashed, with the file's size: any retrained, converted or requantised encoder differs
//! there. (A file doctored so as to differ only between these samples is not told apart.)
//!
//! The memo `<cache_dir>/identity.json` maps a path to its digest under its stamp (size, modification and change time, inode). As in
//! version control, a file that changed within the last two seconds is not memoised: another change could carry the same stamp.
//! A missing or malformed memo only costs time.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::text_model::config_file;
use crate::atomic_file;
use crate::error::{Error, Result};

/// Largest weight file that is hashed whole.
pub const WHOLE_BYTES_MAX: u64 = 64 << 20;
/// Name of the memo in the cache folder.
pub const MEMO_FILE: &str = "identity.json";
/// Bytes of a sample.
const SAMPLE_BYTES: u64 = 4096;
/// Largest safetensors header accepted.
const HEADER_BYTES_MAX: u64 = 100 << 20;
/// A file must have been left alone for this long before its digest is memoised.
const SETTLED_NS: i128 = 2_000_000_000;

/// What tells two states of a file apart without opening it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    bytes: u64,
    modified_ns: i128,
    changed_ns: i128,
    inode: u64,
}

impl Stamp {
    fn of(path: &Path) -> std::io::Result<Self> {
        let m = std::fs::metadata(path)?;
        let ns = |s: i64, n: i64| i128::from(s) * 1_000_000_000 + i128::from(n);
        Ok(Self { bytes: m.len(), modified_ns: ns(m.mtime(), m.mtime_nsec()), changed_ns: ns(m.ctime(), m.ctime_nsec()), inode: m.ino() })
    }

    fn settled(&self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i128);
        self.modified_ns.max(self.changed_ns) + SETTLED_NS < now
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Line {
    stamp: Stamp,
    digest: String,
}

/// The memo of digests in one cache folder.
#[derive(Debug, Default)]
pub struct Memo {
    file: PathBuf,
    lines: BTreeMap<String, Line>,
    changed: bool,
    /// Files that had to be read because the memo did not know them.
    pub files_hashed: usize,
}

/// What a memoised "digest" says of an entry that was verified.
const VERIFIED: &str = "verified";

impl Memo {
    /// The memo of `cache_dir`, empty if there is none.
    #[must_use]
    pub fn open(cache_dir: &Path) -> Self {
        let file = cache_dir.join(MEMO_FILE);
        let lines = std::fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        Self { file, lines, ..Self::default() }
    }

    /// Writes the memo back if it changed and the cache folder exists. A failure is only logged: the memo saves time, nothing else.
    pub fn save(&mut self) {
        if !self.changed || !self.file.parent().is_some_and(Path::is_dir) {
            return;
        }
        let written = serde_json::to_vec(&self.lines)
            .map_err(|e| Error::invariant("the digest memo cannot be encoded").cause(e))
            .and_then(|bytes| atomic_file::write(&self.file, &bytes));
        match written {
            Ok(()) => self.changed = false,
            Err(e) => tracing::warn!("the digest memo was not saved, the next run will hash again: {e}"),
        }
    }

    fn known(&self, name: &str, stamp: &Stamp) -> Option<&str> {
        self.lines.get(name).filter(|line| line.stamp == *stamp).map(|line| line.digest.as_str())
    }

    fn remember(&mut self, name: String, stamp: Stamp, digest: &str) {
        // Both conditions: settled when it was hashed, and still the same afterwards (checked by the caller).
        if stamp.settled() {
            self.lines.insert(name, Line { stamp, digest: digest.to_string() });
            self.changed = true;
        }
    }

    /// Digest of one file's content in hex: plain BLAKE3.
    ///
    /// # Errors
    /// [`Error::Absent`] if it cannot be read; [`Error::TryAgain`] if it changes while it is read.
    pub fn digest(&mut self, path: &Path) -> Result<String> {
        self.digest_by(path, hash_whole)
    }

    /// Digest of a weight file, by samples if it is large (see the module).
    ///
    /// # Errors
    /// As [`Self::digest`]; [`Error::Data`] if a large file is no whole safetensors file.
    pub fn weights(&mut self, path: &Path) -> Result<String> {
        self.digest_by(path, |path, bytes| if bytes > WHOLE_BYTES_MAX { sample_file(path, bytes) } else { hash_whole(path, bytes) })
    }

    fn digest_by(&mut self, path: &Path, hash: impl Fn(&Path, u64) -> Result<String>) -> Result<String> {
        let failed = |e| Error::io("cannot read the file", path, e);
        let stamp = Stamp::of(path).map_err(failed)?;
        let name = path.canonicalize().map_err(failed)?.to_string_lossy().into_owned();
        if let Some(digest) = self.known(&name, &stamp) {
            return Ok(digest.to_string());
        }
        self.files_hashed += 1;
        let digest = hash(path, stamp.bytes)?;
        if Stamp::of(path).map_err(failed)? != stamp {
            return Err(Error::try_again("the file changed while it was read")
                .at(path)
                .advice("run the same command again when it is complete"));
        }
        self.remember(name, stamp, &digest);
        Ok(digest)
    }

    /// Whether the entry `path` passed `verify` in its present state, now or earlier. `None` if there is no such file.
    pub(super) fn verified(&mut self, path: &Path, verify: impl FnOnce() -> bool) -> Option<bool> {
        let stamp = Stamp::of(path).ok()?;
        // Entries are named by content below the cache folder, so that the memo survives a move of the folder's parents.
        let name = path.strip_prefix(self.file.parent()?).unwrap_or(path).to_string_lossy().into_owned();
        if self.known(&name, &stamp) == Some(VERIFIED) {
            return Some(true);
        }
        let whole = verify();
        if whole && Stamp::of(path).ok() == Some(stamp) {
            self.remember(name, stamp, VERIFIED);
        }
        Some(whole)
    }

    /// Identity of a model component (text encoder, VAE): its `config.json` and every weight file that its index names.
    ///
    /// # Errors
    /// As [`Self::digest`]; [`Error::Absent`] where there are no weights.
    pub fn component(&mut self, path: &Path) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        let config = config_file(path);
        if config.is_file() {
            feed(&mut hasher, self.digest(&config)?.as_bytes());
        }
        for file in weight_files(path)? {
            feed(&mut hasher, file.file_name().unwrap_or_default().as_encoded_bytes());
            feed(&mut hasher, self.weights(&file)?.as_bytes());
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Identity of a tokenizer folder: `tokenizer.json` and, if there, `tokenizer_config.json`.
    ///
    /// # Errors
    /// As [`Self::digest`].
    pub fn tokenizer(&mut self, folder: &Path) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        feed(&mut hasher, self.digest(&folder.join("tokenizer.json"))?.as_bytes());
        let config = folder.join("tokenizer_config.json");
        if config.is_file() {
            feed(&mut hasher, self.digest(&config)?.as_bytes());
        }
        Ok(hasher.finalize().to_hex().to_string())
    }
}

/// Adds a field with its length, so that two neighbouring fields cannot be taken for two others.
pub(super) fn feed(hasher: &mut blake3::Hasher, field: &[u8]) {
    hasher.update(&(field.len() as u64).to_le_bytes());
    hasher.update(field);
}

/// The weight files of a component, sorted: the file itself, those that its index names, or every `.safetensors` in the folder. Opens
/// no weight file.
///
/// # Errors
/// [`Error::Absent`] where there are none, [`Error::Data`] for a malformed index.
pub fn weight_files(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_path_buf()]);
    }
    let failed = |e: std::io::Error| Error::io("cannot read the component's folder", path, e);
    let mut files = BTreeSet::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        files.insert(entry.map_err(failed)?.path());
    }
    let ends_with = |p: &Path, end: &str| p.to_string_lossy().ends_with(end);
    let found: Vec<PathBuf> = match files.iter().find(|p| ends_with(p, ".safetensors.index.json")) {
        Some(index) => indexed_files(path, index)?,
        None => files.into_iter().filter(|p| ends_with(p, ".safetensors")).collect(),
    };
    if found.is_empty() {
        return Err(Error::absent("the folder holds no weights")
            .at(path)
            .expected("*.safetensors")
            .advice("download the model again, or correct model.path"));
    }
    Ok(found)
}

fn indexed_files(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(index).map_err(|e| Error::io("cannot read the shard index", index, e))?;
    let parsed: Index = serde_json::from_str(&text).map_err(|e| Error::data("the shard index is malformed").at(index).cause(e))?;
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

fn hash_whole(path: &Path, _bytes: u64) -> Result<String> {
    let failed = |e| Error::io("cannot read the file", path, e);
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path).map_err(failed)?).map_err(failed)?;
    Ok(hasher.finalize().to_hex().to_string())
}

fn sample_file(path: &Path, bytes: u64) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let failed = |e| Error::io("cannot read the weight file", path, e);
    let file = File::open(path).map_err(failed)?;
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).map_err(failed)?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > HEADER_BYTES_MAX.min(bytes - 8) {
        return Err(Error::data("the weight file has no safetensors header")
            .at(path)
            .offset(0)
            .found(format!("a header of {header_bytes} bytes")));
    }
    let mut header = vec![0; header_bytes as usize];
    file.read_exact_at(&mut header, 8).map_err(failed)?;
    let payload = 8 + header_bytes;
    hasher.update(&bytes.to_le_bytes());
    hasher.update(&header);
    let mut buffer = vec![0; SAMPLE_BYTES as usize];
    for at in sample_offsets(path, &header, bytes - payload)? {
        let want = SAMPLE_BYTES.min(bytes - payload - at) as usize;
        file.read_exact_at(&mut buffer[..want], payload + at).map_err(failed)?;
        hasher.update(&buffer[..want]);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Where to sample a payload: start, middle and end of every tensor, in order.
fn sample_offsets(path: &Path, header: &[u8], payload_bytes: u64) -> Result<BTreeSet<u64>> {
    #[derive(Deserialize)]
    struct Tensor {
        data_offsets: (u64, u64),
    }
    let malformed = |e: serde_json::Error| Error::data("the safetensors header is malformed").at(path).cause(e);
    let mut root: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(header).map_err(malformed)?;
    root.remove("__metadata__");
    let mut offsets = BTreeSet::new();
    for tensor in root.into_values() {
        let (start, end) = serde_json::from_value::<Tensor>(tensor).map_err(malformed)?.data_offsets;
        if start > end || end > payload_bytes {
            return Err(Error::data("the weight file ends inside a tensor")
                .at(path)
                .expected(format!("a payload of at least {end} bytes"))
                .found(format!("{payload_bytes} bytes"))
                .advice("download or copy the file again"));
        }
        if start < end {
            let last = end.saturating_sub(SAMPLE_BYTES).max(start);
            offsets.extend([start, start + (last - start) / 2, last]);
        }
    }
    Ok(offsets)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    /// Lets a file look as if it had been left alone for an hour.
    fn settle(path: &Path) {
        // The change time cannot be set, so wait it out; modification time is set back to keep the two apart.
        let past = SystemTime::now() - std::time::Duration::from_secs(3600);
        File::options().write(true).open(path).unwrap().set_modified(past).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(2100));
    }

    #[test]
    fn settled_files_are_hashed_once_and_again_when_they_change() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("weights.safetensors");
        std::fs::write(&file, b"one").unwrap();
        let mut memo = Memo::open(dir.path());
        let first = memo.digest(&file).unwrap();
        memo.digest(&file).unwrap();
        assert_eq!(memo.files_hashed, 2, "a file written just now is not memoised");
        settle(&file);
        assert_eq!(memo.digest(&file).unwrap(), first);
        memo.save();
        let mut memo = Memo::open(dir.path());
        assert_eq!(memo.digest(&file).unwrap(), first);
        assert_eq!(memo.files_hashed, 0, "known from the saved memo");
        std::fs::write(&file, b"two").unwrap();
        assert_ne!(memo.digest(&file).unwrap(), first);
    }

    #[test]
    fn a_large_file_is_sampled_in_every_tensor() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("large.safetensors");
        let mib = 1 << 20;
        let header = format!(
            r#"{{"a":{{"dtype":"U8","shape":[{0}],"data_offsets":[0,{0}]}},"b":{{"dtype":"U8","shape":[100],"data_offsets":[{0},{1}]}}}}"#,
            70 * mib,
            70 * mib + 100
        );
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        let payload = bytes.len();
        bytes.resize(payload + 70 * mib + 100, 0);
        std::fs::write(&file, &bytes).unwrap();
        let digest = |file: &Path| Memo::default().weights(file).unwrap();
        let first = digest(&file);
        let flipped = |at: usize| {
            let f = File::options().write(true).open(&file).unwrap();
            f.write_all_at(&[1], at as u64).unwrap();
            let changed = digest(&file);
            f.write_all_at(&[0], at as u64).unwrap();
            changed
        };
        for at in [payload, payload + 35 * mib, payload + 70 * mib - 1, payload + 70 * mib, payload + 70 * mib + 99] {
            assert_ne!(flipped(at), first, "byte {at}");
        }
        assert_eq!(digest(&file), first);
        File::options().write(true).open(&file).unwrap().set_len((payload + 70 * mib) as u64).unwrap();
        assert_eq!(Memo::default().weights(&file).unwrap_err().exit_code(), 65, "the file ends inside a tensor");
    }
}
