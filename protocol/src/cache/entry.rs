//! The two kinds of cache entry and their file format.
//!
//! An entry is a safetensors file with sorted metadata, so that the same content always gives the same bytes. The metadata's `blake3`
//! is the hash of the whole file with that hash's own 64 digits read as zeros: it covers the header too (a flipped length or shape
//! is found, not only a flipped value).

use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;
use serde_json::{Map, Value, json};

use super::FORMAT_VERSION;
use crate::atomic_file;
use crate::error::{Error, Result};

/// `format` in the metadata of every entry.
const FORMAT_NAME: &str = "serenity-cache";
/// Hex digits of a BLAKE3 hash.
const DIGEST_DIGITS: usize = 64;
/// Longest header accepted: those written here are under 2 KiB.
const HEADER_BYTES_MAX: u64 = 64 << 10;
/// Largest size of any one dimension accepted from a file.
const DIMENSION_MAX: usize = 1 << 24;

/// The embedding of one caption: its real tokens only, and the one vector that all pads in front of them share.
#[derive(Debug, Clone, PartialEq)]
pub struct TextEntry {
    /// Real tokens n.
    pub real_tokens: usize,
    /// Tokens after padding.
    pub max_length: usize,
    /// Features of a token: the chosen hidden states side by side.
    pub features: usize,
    /// `[real_tokens, features]`, row-major.
    pub rows: Vec<bf16>,
    /// `[features]`, the embedding of a pad token (`spec/flux2.md` 2.4).
    pub pad_row: Vec<bf16>,
}

impl TextEntry {
    /// The padded embedding `[max_length, features]`: pads on the left, then the real tokens.
    #[must_use]
    pub fn expand(&self) -> Vec<bf16> {
        let mut out = Vec::with_capacity(self.max_length * self.features);
        for _ in self.real_tokens..self.max_length {
            out.extend_from_slice(&self.pad_row);
        }
        out.extend_from_slice(&self.rows);
        out
    }

    fn check(&self) -> Result<()> {
        let fits = self.real_tokens >= 1
            && self.real_tokens <= self.max_length
            && self.max_length <= DIMENSION_MAX
            && (1..=DIMENSION_MAX).contains(&self.features)
            && self.rows.len() == self.real_tokens * self.features
            && self.pad_row.len() == self.features;
        if fits {
            return Ok(());
        }
        Err(Error::invariant("a text entry's sizes contradict each other").found(format!(
            "{} rows values, {} pad values for {} real of {} tokens with {} features",
            self.rows.len(),
            self.pad_row.len(),
            self.real_tokens,
            self.max_length,
            self.features
        )))
    }

    /// The file's bytes. `notes` are free metadata (what computed it) that do not change the entry's name.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the sizes contradict each other.
    pub fn to_bytes(&self, notes: &[(&str, String)]) -> Result<Vec<u8>> {
        self.check()?;
        let mut metadata = vec![("max_length", self.max_length.to_string()), ("real_tokens", self.real_tokens.to_string())];
        metadata.extend_from_slice(notes);
        let tensors = [
            ("pad_row", "BF16", vec![self.features], le_bytes(&self.pad_row)),
            ("rows", "BF16", vec![self.real_tokens, self.features], le_bytes(&self.rows)),
        ];
        assemble("text", &metadata, &tensors)
    }

    /// Writes the entry (atomic).
    ///
    /// # Errors
    /// As [`Self::to_bytes`], and what [`atomic_file::write`] reports.
    pub fn write(&self, path: &Path, notes: &[(&str, String)]) -> Result<()> {
        atomic_file::write(path, &self.to_bytes(notes)?)
    }

    /// Reads an entry and verifies every byte of it.
    ///
    /// # Errors
    /// [`Error::Absent`] if there is none, [`Error::Data`] if it is corrupt or of another version.
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_parsed(&Parsed::read(path, "text")?)
    }

    /// As [`Self::read`] for a file's bytes, which will be written to `path`.
    ///
    /// # Errors
    /// [`Error::Data`] if they are corrupt or of another version.
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Self> {
        Self::from_parsed(&Parsed::parse(path, bytes, "text")?)
    }

    fn from_parsed(file: &Parsed) -> Result<Self> {
        let (real_tokens, max_length) = (file.head.number("real_tokens")?, file.head.number("max_length")?);
        let (pad_shape, pad) = file.tensor("pad_row", "BF16")?;
        let (rows_shape, rows) = file.tensor("rows", "BF16")?;
        let &[features] = pad_shape else { return Err(file.head.malformed("pad_row has no single dimension")) };
        if rows_shape != [real_tokens, features] || real_tokens == 0 || real_tokens > max_length || max_length > DIMENSION_MAX {
            return Err(file
                .head
                .malformed(&format!("rows {rows_shape:?} do not fit {real_tokens} of {max_length} tokens with {features} features")));
        }
        let values = |bytes: &[u8]| bytes.as_chunks::<2>().0.iter().map(|c| bf16::from_le_bytes(*c)).collect::<Vec<_>>();
        Ok(Self { real_tokens, max_length, features, rows: values(rows), pad_row: values(pad) })
    }
}

/// The latent of one image: patchified, normalised with the batch norm's statistics, row-major (`spec/flux2.md` 3).
#[derive(Debug, Clone, PartialEq)]
pub struct LatentEntry {
    /// Channels of a token, `4 * latent_channels`.
    pub channels: usize,
    /// Rows of tokens, pixels / 16.
    pub height: usize,
    /// Columns of tokens, pixels / 16.
    pub width: usize,
    /// `[height * width, channels]`, row-major.
    pub tokens: Vec<f32>,
}

impl LatentEntry {
    /// The file's bytes. `notes` are free metadata (what computed it) that do not change the entry's name.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the sizes contradict each other.
    pub fn to_bytes(&self, notes: &[(&str, String)]) -> Result<Vec<u8>> {
        let sizes = [self.channels, self.height, self.width];
        if sizes.iter().any(|s| !(1..=DIMENSION_MAX).contains(s)) || self.tokens.len() != self.height * self.width * self.channels {
            return Err(Error::invariant("a latent entry's sizes contradict each other").found(format!(
                "{} values for {} x {} tokens of {} channels",
                self.tokens.len(),
                self.height,
                self.width,
                self.channels
            )));
        }
        let mut metadata = vec![("height", self.height.to_string()), ("width", self.width.to_string())];
        metadata.extend_from_slice(notes);
        let bytes = self.tokens.iter().flat_map(|v| v.to_le_bytes()).collect();
        assemble("latent", &metadata, &[("tokens", "F32", vec![self.height * self.width, self.channels], bytes)])
    }

    /// Writes the entry (atomic).
    ///
    /// # Errors
    /// As [`Self::to_bytes`], and what [`atomic_file::write`] reports.
    pub fn write(&self, path: &Path, notes: &[(&str, String)]) -> Result<()> {
        atomic_file::write(path, &self.to_bytes(notes)?)
    }

    /// Reads an entry and verifies every byte of it.
    ///
    /// # Errors
    /// [`Error::Absent`] if there is none, [`Error::Data`] if it is corrupt or of another version.
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_parsed(&Parsed::read(path, "latent")?)
    }

    /// As [`Self::read`] for a file's bytes, which will be written to `path`.
    ///
    /// # Errors
    /// [`Error::Data`] if they are corrupt or of another version.
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Self> {
        Self::from_parsed(&Parsed::parse(path, bytes, "latent")?)
    }

    fn from_parsed(file: &Parsed) -> Result<Self> {
        let (height, width) = (file.head.number("height")?, file.head.number("width")?);
        let (shape, bytes) = file.tensor("tokens", "F32")?;
        let &[count, channels] = shape else { return Err(file.head.malformed("tokens has not two dimensions")) };
        if height.checked_mul(width) != Some(count) || count == 0 || channels == 0 {
            return Err(file.head.malformed(&format!("{count} tokens of {channels} channels do not fit {height} x {width}")));
        }
        let tokens = bytes.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect();
        Ok(Self { channels, height, width, tokens })
    }
}

fn le_bytes(values: &[bf16]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Lays out a safetensors file: header padded to a multiple of eight, keys sorted, checksum filled in last.
fn assemble(kind: &str, metadata: &[(&str, String)], tensors: &[(&str, &str, Vec<usize>, Vec<u8>)]) -> Result<Vec<u8>> {
    let mut entries: BTreeMap<&str, String> = metadata.iter().map(|(k, v)| (*k, v.clone())).collect();
    entries.insert("blake3", "0".repeat(DIGEST_DIGITS));
    entries.insert("format", FORMAT_NAME.to_string());
    entries.insert("kind", kind.to_string());
    entries.insert("version", FORMAT_VERSION.to_string());
    let mut root = Map::new();
    root.insert("__metadata__".into(), json!(entries));
    let mut end = 0;
    for (name, dtype, shape, bytes) in tensors {
        let start = end;
        end += bytes.len();
        root.insert((*name).into(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
    }
    let mut header = serde_json::to_vec(&Value::Object(root)).map_err(|e| Error::invariant("a cache header cannot be written").cause(e))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(&header);
    for (_, _, _, bytes) in tensors {
        file.extend_from_slice(bytes);
    }
    let digits = blake3::hash(&file).to_hex();
    let at = checksum_position(&file[8..8 + header.len()]).ok_or_else(|| Error::invariant("a cache header holds no checksum field"))? + 8;
    file[at..at + DIGEST_DIGITS].copy_from_slice(digits.as_bytes());
    Ok(file)
}

/// Where the 64 digits start in a header.
fn checksum_position(header: &[u8]) -> Option<usize> {
    let field = b"\"blake3\":\"";
    let at = header.windows(field.len()).position(|w| w == field)? + field.len();
    (at + DIGEST_DIGITS <= header.len()).then_some(at)
}

/// A parsed header.
struct Head<'p> {
    path: &'p Path,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, (String, Vec<usize>, usize, usize)>,
    payload_at: usize,
    payload_bytes: usize,
}

impl<'p> Head<'p> {
    fn corrupt(path: &Path, why: &str) -> Error {
        Error::data("the cache entry is corrupt")
            .at(path)
            .cause(why)
            .advice("run the same command again: the encoder makes a corrupt entry anew (or delete the file)")
    }

    fn malformed(&self, why: &str) -> Error {
        Self::corrupt(self.path, why)
    }

    /// Parses the header's JSON (without the length in front).
    fn parse(path: &'p Path, header: &[u8], kind: &str) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Info {
            dtype: String,
            shape: Vec<usize>,
            data_offsets: (usize, usize),
        }
        let bad = |why: &str| Self::corrupt(path, why);
        let mut root: Map<String, Value> = serde_json::from_slice(header).map_err(|e| bad(&e.to_string()))?;
        let metadata = root.remove("__metadata__").ok_or_else(|| bad("no metadata"))?;
        let metadata: BTreeMap<String, String> = serde_json::from_value(metadata).map_err(|e| bad(&e.to_string()))?;
        let mut this = Self { path, metadata, tensors: BTreeMap::new(), payload_at: 8 + header.len(), payload_bytes: 0 };
        for (field, expected) in [("format", FORMAT_NAME), ("kind", kind), ("version", &FORMAT_VERSION.to_string())] {
            if this.text(field)? != expected {
                return Err(bad(&format!("its {field} is '{}', expected '{expected}'", this.text(field)?)));
            }
        }
        let mut infos: Vec<(String, Info)> = Vec::new();
        for (name, info) in root {
            infos.push((name, serde_json::from_value(info).map_err(|e| bad(&e.to_string()))?));
        }
        infos.sort_by_key(|(_, info)| info.data_offsets);
        for (name, info) in infos {
            let (start, end) = info.data_offsets;
            let element = if info.dtype == "BF16" { 2 } else { 4 };
            let bytes = info.shape.iter().try_fold(element, |n: usize, &d| n.checked_mul(d));
            if start != this.payload_bytes || bytes.and_then(|b| b.checked_add(start)) != Some(end) {
                return Err(bad(&format!("tensor '{name}' of shape {:?} does not fill bytes {start} to {end}", info.shape)));
            }
            this.payload_bytes = end;
            this.tensors.insert(name, (info.dtype, info.shape, start, end));
        }
        Ok(this)
    }

    fn text(&self, field: &str) -> Result<&str> {
        self.metadata.get(field).map(String::as_str).ok_or_else(|| self.malformed(&format!("no metadata field '{field}'")))
    }

    fn number(&self, field: &str) -> Result<usize> {
        self.text(field)?.parse().map_err(|_| self.malformed(&format!("metadata field '{field}' is no number")))
    }

    fn file_bytes(&self) -> u64 {
        (self.payload_at as u64).saturating_add(self.payload_bytes as u64)
    }
}

/// A whole verified file.
struct Parsed<'p> {
    head: Head<'p>,
    bytes: Vec<u8>,
}

impl<'p> Parsed<'p> {
    fn read(path: &'p Path, kind: &str) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io("cannot read the cache entry", path, e))?;
        Self::parse(path, bytes, kind)
    }

    fn parse(path: &'p Path, mut bytes: Vec<u8>, kind: &str) -> Result<Self> {
        let bad = |why: &str| Head::corrupt(path, why);
        let header_bytes = header_length(&bytes).ok_or_else(|| bad("it ends before its header"))?;
        let header = bytes.get(8..8 + header_bytes).ok_or_else(|| bad("it ends inside its header"))?;
        let head = Head::parse(path, header, kind)?;
        if head.file_bytes() != bytes.len() as u64 {
            return Err(bad(&format!("it has {} bytes, its header promises {}", bytes.len(), head.file_bytes())));
        }
        let at = checksum_position(header).ok_or_else(|| bad("no checksum"))? + 8;
        let stated = bytes[at..at + DIGEST_DIGITS].to_vec();
        bytes[at..at + DIGEST_DIGITS].fill(b'0');
        if blake3::hash(&bytes).to_hex().as_bytes() != stated {
            return Err(bad("its checksum does not match its content"));
        }
        Ok(Self { head, bytes })
    }

    fn tensor(&self, name: &str, dtype: &str) -> Result<(&[usize], &[u8])> {
        let (found, shape, start, end) =
            self.head.tensors.get(name).ok_or_else(|| self.head.malformed(&format!("it has no tensor '{name}'")))?;
        if found != dtype {
            return Err(self.head.malformed(&format!("tensor '{name}' has type {found}, expected {dtype}")));
        }
        let payload = self.head.payload_at;
        let bytes = self.bytes.get(payload + start..payload + end).ok_or_else(|| self.head.malformed("a tensor lies outside the file"))?;
        Ok((shape, bytes))
    }
}

fn header_length(bytes: &[u8]) -> Option<usize> {
    let length = u64::from_le_bytes(*bytes.first_chunk::<8>()?);
    (length <= HEADER_BYTES_MAX).then_some(length as usize)
}

/// Whether `path` holds a whole entry of `kind` as far as its header and size tell: cheap, reads no payload.
pub(super) fn looks_whole(path: &Path, kind: &str) -> bool {
    let attempt = || -> Option<bool> {
        use std::io::Read;
        let mut file = std::fs::File::open(path).ok()?;
        let mut length = [0; 8];
        file.read_exact(&mut length).ok()?;
        let mut header = vec![0; header_length(&length)?];
        file.read_exact(&mut header).ok()?;
        let head = Head::parse(path, &header, kind).ok()?;
        Some(head.file_bytes() == file.metadata().ok()?.len())
    };
    attempt().unwrap_or(false)
}

/// The metadata of the entry at `path`, without reading its payload.
pub(super) fn notes(path: &Path, kind: &str) -> Option<BTreeMap<String, String>> {
    use std::io::Read;
    let mut file = std::fs::File::open(path).ok()?;
    let mut length = [0; 8];
    file.read_exact(&mut length).ok()?;
    let mut header = vec![0; header_length(&length)?];
    file.read_exact(&mut header).ok()?;
    Head::parse(path, &header, kind).ok().map(|head| head.metadata)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn text() -> TextEntry {
        let value = |i: usize| bf16::from_f32(i as f32 / 8.0 - 1.0);
        TextEntry { real_tokens: 3, max_length: 5, features: 4, rows: (0..12).map(value).collect(), pad_row: (20..24).map(value).collect() }
    }

    #[test]
    fn entries_come_back_as_written_and_pads_stand_on_the_left() {
        let dir = tempfile::tempdir().unwrap();
        let (path, entry) = (dir.path().join("ab/x.safetensors"), text());
        entry.write(&path, &[("computed_in", "f32".into())]).unwrap();
        assert_eq!(TextEntry::read(&path).unwrap(), entry);
        let expanded = entry.expand();
        assert_eq!(expanded.len(), 20);
        assert_eq!(expanded[4..8], entry.pad_row[..]);
        assert_eq!(expanded[8..], entry.rows[..]);
        // A file that any safetensors reader understands.
        let bytes = std::fs::read(&path).unwrap();
        let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(parsed.tensor("rows").unwrap().shape(), [3, 4]);
        assert!(looks_whole(&path, "text") && !looks_whole(&path, "latent"));

        let latent = LatentEntry { channels: 2, height: 2, width: 3, tokens: (0..12).map(|v| v as f32 * 0.3).collect() };
        latent.write(&path, &[]).unwrap();
        assert_eq!(LatentEntry::read(&path).unwrap(), latent);
        assert_eq!(TextEntry::read(&path).unwrap_err().exit_code(), 65, "a latent is no text entry");
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let whole = text().to_bytes(&[]).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(TextEntry::read(&path).map_err(|e| e.exit_code()), Err(65), "byte {at}");
        }
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(TextEntry::read(&path).map_err(|e| e.exit_code()), Err(65), "{length} bytes");
            assert!(!looks_whole(&path, "text"), "{length} bytes");
        }
        std::fs::remove_file(&path).unwrap();
        assert_eq!(TextEntry::read(&path).unwrap_err().exit_code(), 69);
    }

    #[test]
    fn contradicting_sizes_are_not_written() {
        let mut entry = text();
        entry.rows.pop();
        assert_eq!(entry.to_bytes(&[]).unwrap_err().exit_code(), 70);
        let latent = LatentEntry { channels: 2, height: 2, width: 3, tokens: vec![0.0; 11] };
        assert_eq!(latent.to_bytes(&[]).unwrap_err().exit_code(), 70);
    }
}
