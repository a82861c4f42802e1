//! A strict safetensors header: what the file says about its tensors, with absolute byte ranges, without touching the payload.
//!
//! The `safetensors` crate wants the whole file in memory (or mapped) and drops the distinction between two equal keys. A slab has
//! 30 GB that must not be mapped, and may come from anywhere, so the header is read with one bounded read and parsed here.
//! Invariants of a [`Header`]: names are unique; every range has the length that type and shape give; the ranges follow each other
//! without gap or overlap from the end of the header to the end of the file (the safetensors rule).

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use safetensors::Dtype;
use serde::Deserialize;
use serde_json::Value;

use super::strict_json;
use crate::error::{Error, Result};

/// Largest header accepted. A slab of dev has about 90 KiB; the reference implementation refuses more than 100 MB.
pub const HEADER_BYTES_MAX: u64 = 64 << 20;

/// One tensor of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Key in the header.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// Absolute byte range in the file.
    pub range: Range<u64>,
}

/// The parsed header of one file.
#[derive(Debug, Clone)]
pub struct Header {
    tensors: Vec<TensorEntry>,
    by_name: HashMap<String, usize>,
    /// `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// Where the payload starts.
    pub data_start: u64,
    /// Length of the file.
    pub file_bytes: u64,
    /// Length prefix and header, as in the file.
    pub bytes: Vec<u8>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

impl Header {
    /// Reads and checks the header of `path`.
    ///
    /// # Errors
    /// [`Error::Absent`] if the file cannot be read, [`Error::Data`] if the header breaks one of the module's invariants.
    pub fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("cannot open the safetensors file", path, e))?;
        Self::read_from(&file, path)
    }

    /// As [`Self::read`], of an open file; `path` is for messages.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_from(file: &File, path: &Path) -> Result<Self> {
        let io = |e| Error::io("cannot read the safetensors header", path, e);
        let file_bytes = file.metadata().map_err(io)?.len();
        let mut prefix = [0; 8];
        if file_bytes < 8 {
            return Err(truncated(path, file_bytes, 8));
        }
        file.read_exact_at(&mut prefix, 0).map_err(io)?;
        let length = u64::from_le_bytes(prefix);
        if length > HEADER_BYTES_MAX {
            return Err(Error::data("the safetensors header has an impossible length")
                .at(path)
                .offset(0)
                .expected(format!("at most {HEADER_BYTES_MAX} bytes"))
                .found(length)
                .advice("this is no safetensors file, or its first bytes are corrupt"));
        }
        // No overflow: length is at most HEADER_BYTES_MAX.
        let data_start = 8 + length;
        if data_start > file_bytes {
            return Err(truncated(path, file_bytes, data_start));
        }
        let mut bytes = vec![0; data_start as usize];
        file.read_exact_at(&mut bytes, 0).map_err(io)?;
        let header = Self::parse(bytes, file_bytes).map_err(|e| e.at(path))?;
        Ok(header)
    }

    /// Parses `bytes` (length prefix and header) of a file of `file_bytes` bytes.
    fn parse(bytes: Vec<u8>, file_bytes: u64) -> Result<Self> {
        let text = bytes.get(8..).unwrap_or_default();
        let bad = |what: String| Error::data(what).offset(8).advice("the file is corrupt or no safetensors file: build or copy it again");
        if text.first() != Some(&b'{') {
            return Err(bad("the safetensors header does not start with '{'".into()));
        }
        let value = strict_json::parse(text).map_err(|e| bad("the safetensors header is malformed".into()).cause(e))?;
        let Value::Object(map) = value else { return Err(bad("the safetensors header is no JSON object".into())) };
        let data_start = bytes.len() as u64;
        let mut metadata = BTreeMap::new();
        let mut tensors = Vec::with_capacity(map.len());
        for (name, value) in map {
            if name == "__metadata__" {
                metadata = serde_json::from_value(value).map_err(|e| bad("__metadata__ must map strings to strings".into()).cause(e))?;
                continue;
            }
            let raw: RawTensor =
                serde_json::from_value(value).map_err(|e| bad(format!("the header's entry of tensor '{name}' is malformed")).cause(e))?;
            tensors.push(entry(name, raw, data_start, file_bytes)?);
        }
        tensors.sort_by(|a, b| (a.range.start, a.range.end, &a.name).cmp(&(b.range.start, b.range.end, &b.name)));
        check_contiguous(&tensors, data_start, file_bytes)?;
        let by_name = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(Self { tensors, by_name, metadata, data_start, file_bytes, bytes })
    }

    /// All tensors in file order.
    #[must_use]
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    /// The tensor of that exact name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.by_name.get(name).and_then(|&i| self.tensors.get(i))
    }

    /// The tensor that holds the byte at `offset`, if any does.
    #[must_use]
    pub fn tensor_at(&self, offset: u64) -> Option<&TensorEntry> {
        let after = self.tensors.partition_point(|t| t.range.end <= offset);
        self.tensors.get(after).filter(|t| t.range.contains(&offset))
    }
}

fn truncated(path: &Path, found: u64, expected: u64) -> Error {
    Error::data("the safetensors file ends inside its header")
        .at(path)
        .offset(found)
        .expected(format!("at least {expected} bytes"))
        .found(format!("{found} bytes"))
        .advice("the file was cut: build or copy it again")
}

fn entry(name: String, raw: RawTensor, data_start: u64, file_bytes: u64) -> Result<TensorEntry> {
    let [start, end] = raw.data_offsets;
    let bits = raw.shape.iter().try_fold(raw.dtype.bitsize() as u64, |n, &d| n.checked_mul(d as u64));
    let range = data_start.checked_add(start).zip(data_start.checked_add(end)).map(|(a, b)| a..b);
    let (Some(bits), Some(range)) = (bits, range) else {
        return Err(Error::data(format!("the size of tensor '{name}' overflows"))
            .offset(8)
            .found(format!("{:?} at {start}..{end}", raw.shape)));
    };
    if bits % 8 != 0 || range.start > range.end || range.end - range.start != bits / 8 {
        return Err(Error::data(format!("the byte range of tensor '{name}' does not fit its type and shape"))
            .offset(range.start)
            .expected(format!("{} bits for {:?} {:?}", bits, raw.dtype, raw.shape))
            .found(format!("bytes {start}..{end} of the payload")));
    }
    if range.end > file_bytes {
        return Err(Error::data(format!("the file ends before the end of tensor '{name}'"))
            .offset(range.start)
            .expected(format!("at least {} bytes", range.end))
            .found(format!("{file_bytes} bytes"))
            .advice("the file was cut: build or copy it again"));
    }
    Ok(TensorEntry { name, dtype: raw.dtype, shape: raw.shape, range })
}

fn check_contiguous(tensors: &[TensorEntry], data_start: u64, file_bytes: u64) -> Result<()> {
    let mut end = data_start;
    let mut before = "the header";
    for tensor in tensors {
        if tensor.range.start != end {
            let how = if tensor.range.start < end { "overlaps" } else { "leaves a gap after" };
            return Err(Error::data(format!("tensor '{}' {how} {before}", tensor.name))
                .offset(tensor.range.start)
                .expected(format!("a start at {end}"))
                .found(tensor.range.start));
        }
        end = tensor.range.end;
        before = &tensor.name;
    }
    if end != file_bytes {
        return Err(Error::data("the file has bytes after its last tensor")
            .offset(end)
            .expected(format!("{end} bytes"))
            .found(format!("{file_bytes} bytes")));
    }
    Ok(())
}
