//! The SquareQ v2 manifest, and the additions that ours carries under the one extra key `serenity`.
//!
//! The original Python reader ignores keys that it does not know, so a manifest with our additions serves both. Fields, order and
//! defaults are those of `SlabManifestV2`. Everything is checked here that can be checked without the slab's header.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::checksum::Xxh3;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::strict_json;
use super::text_encoder::TextSlabShape;
use crate::error::{Error, Result};
use crate::geometry::{LinearSpec, TransformerGeometry};

/// Value of `quant_version`.
pub const QUANT_VERSION: &str = "squareq_bp8_v2";
/// Newest kernel ABI that we read, and the one that we write.
pub const KERNEL_ABI_VERSION: u64 = 1;
/// Newest version of the `serenity` additions that we read; newer ones are refused.
pub const ADDITIONS_VERSION: u32 = 2;
/// Largest manifest accepted.
pub const MANIFEST_BYTES_MAX: u64 = 64 << 20;

/// The whole manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// First 16 hex digits of the hash over every linear of the model, see [`model_signature`].
    #[serde(default)]
    pub model_signature: String,
    /// Free label of the architecture.
    #[serde(default)]
    pub architecture_id: String,
    /// [`QUANT_VERSION`].
    #[serde(default = "default_quant_version")]
    pub quant_version: String,
    /// [`KERNEL_ABI_VERSION`] or older.
    #[serde(default = "default_abi")]
    pub kernel_abi_version: u64,
    /// Informative, never enforced (as in the original).
    #[serde(default = "default_runtime")]
    pub min_runtime_version: String,
    /// Number of `layers`, if given.
    #[serde(default)]
    pub layer_count: Option<u64>,
    /// Sum of the qweight bytes, if given.
    #[serde(default)]
    pub total_qweight_bytes: Option<u64>,
    /// The layers, sorted by name.
    #[serde(default)]
    pub layers: Vec<ManifestLayer>,
    /// Our additions; `None` in slabs of the original builder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serenity: Option<Additions>,
}

fn default_quant_version() -> String {
    QUANT_VERSION.into()
}
fn default_abi() -> u64 {
    KERNEL_ABI_VERSION
}
fn default_runtime() -> String {
    "0.1.0".into()
}

/// One quantised linear.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestLayer {
    /// Module path without `.weight`.
    pub canonical_name: String,
    /// Key of the codes, I8 `[out, padded_in]`.
    pub qweight_key: String,
    /// Key of the scales, F32 `[out]`.
    pub scale_key: String,
    /// Key of the zero points, F32 `[out]`, all zero.
    pub zero_point_key: String,
    /// Key of the bias, F32 `[out]`, if the linear has one.
    pub bias_key: Option<String>,
    /// `[out, in]`.
    pub orig_shape: [usize; 2],
    /// `[out, padded_in]`.
    pub packed_shape: [usize; 2],
    /// The multiple that `in` is padded to.
    pub pad_k: usize,
    /// 8 (the original's reader also lets 4 pass, which it cannot use).
    pub quant_bits: u32,
    /// `per_row_symmetric`.
    pub quant_scheme: String,
    /// 0.
    pub quant_axis: i64,
    /// `int8`.
    pub dtype_qweight: String,
    /// `float32`.
    pub dtype_scale: String,
    /// `float32`.
    pub dtype_zero_point: String,
    /// Always null in v2.
    pub block_id: Option<String>,
}

/// What `serenity-slab` adds: everything needed to prove the files intact and to train from them alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Additions {
    /// 1 for a transformer, 2 for a text encoder ([`Component::format`]).
    pub format: u32,
    /// What the slab is of; a transformer where nothing is said.
    #[serde(default, skip_serializing_if = "Component::is_transformer")]
    pub component: Component,
    /// XXH3-64 of the manifest's own text, with 16 zeros in the place of these digits. Any flipped bit of the manifest shows.
    pub manifest_xxh3: Hash,
    /// Geometry of the transformer, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub geometry: Option<TransformerGeometry>,
    /// Shape of the text encoder, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_encoder: Option<TextSlabShape>,
    /// Length of the slab file.
    pub file_bytes: u64,
    /// XXH3-64 of the file's first bytes up to the payload (length prefix and header), 16 hex digits.
    pub header_xxh3: Hash,
    /// Page size of `page_xxh3`, a power of two.
    pub page_bytes: u64,
    /// XXH3-64 of each page of the file; the last page may be shorter.
    pub page_xxh3: Vec<Hash>,
    /// XXH3-64 of each tensor's bytes.
    pub tensor_xxh3: BTreeMap<String, Hash>,
    /// The companion file.
    #[serde(default)]
    pub companion: Option<Companion>,
}

/// What a slab is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Component {
    /// The FLUX.2 transformer.
    #[default]
    Transformer,
    /// The Mistral text encoder ([`super::text_encoder`]).
    TextEncoder,
}

impl Component {
    fn is_transformer(&self) -> bool {
        *self == Component::Transformer
    }

    /// Version of the additions that describe it: readers that know only transformers refuse the others.
    #[must_use]
    pub fn format(self) -> u32 {
        match self {
            Component::Transformer => 1,
            Component::TextEncoder => 2,
        }
    }
}

/// The file with the tensors outside the block linears.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Companion {
    /// Its name, in the manifest's folder.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// XXH3-64 of the whole file.
    pub xxh3: Hash,
    /// XXH3-64 of each of its tensors.
    pub tensor_xxh3: BTreeMap<String, Hash>,
}

/// A 64-bit hash, 16 hex digits in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hash(pub u64);

impl std::fmt::Display for Hash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
impl Serialize for Hash {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}
impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        use serde::de::Error as _;
        let text = String::deserialize(d)?;
        if text.len() != 16 || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(D::Error::custom(format!("'{text}' is no hash of 16 lower-case hex digits")));
        }
        u64::from_str_radix(&text, 16).map(Hash).map_err(D::Error::custom)
    }
}

/// The signature that names a model's set of linears: `name:in:out:False` (no FLUX.2 linear has a bias) of every linear, sorted,
/// joined with `|`, SHA-256, first 16 hex digits (SquareQ `manifest.py`).
#[must_use]
pub fn model_signature(linears: &[LinearSpec]) -> String {
    let mut lines: Vec<String> = linears.iter().map(|l| format!("{}:{}:{}:False", l.name, l.in_features, l.out_features)).collect();
    lines.sort();
    let digest = Sha256::digest(lines.join("|").as_bytes());
    digest.iter().take(8).map(|b| format!("{b:02x}")).collect()
}

/// `in` rounded up to a multiple of `pad_k`; 0 and 1 mean no padding. `None` on overflow.
#[must_use]
pub fn padded_in(in_features: usize, pad_k: usize) -> Option<usize> {
    if pad_k <= 1 { Some(in_features) } else { in_features.checked_next_multiple_of(pad_k) }
}

impl Manifest {
    /// Parses a manifest; duplicate keys anywhere are refused. The layers come back sorted by name.
    ///
    /// # Errors
    /// [`Error::Data`] if it is no v2 manifest.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let value = strict_json::parse(bytes).map_err(|e| Error::data("the slab's manifest is malformed").cause(e))?;
        if !matches!(value, Value::Object(_)) {
            return Err(Error::data("the slab's manifest is no JSON object"));
        }
        check_seal(bytes, value.get("serenity").is_some())?;
        let mut manifest: Self = serde_json::from_value(value)
            .map_err(|e| Error::data("the slab's manifest lacks a field or has one of another type").cause(e))?;
        manifest.layers.sort_by(|a, b| a.canonical_name.cmp(&b.canonical_name));
        Ok(manifest)
    }

    /// The JSON text, in the original's form (indent 2), sealed with its own checksum if it has our additions.
    ///
    /// # Errors
    /// [`Error::Invariant`] if it cannot be written as JSON.
    pub fn to_json(&self) -> Result<String> {
        let text = serde_json::to_string_pretty(self).map_err(|e| Error::invariant("a manifest cannot be written as JSON").cause(e))?;
        if self.serenity.is_none() {
            return Ok(text);
        }
        let sealed = seal_of(text.as_bytes()).map(|(digits, hash)| {
            let (before, after) = (text.get(..digits.start).unwrap_or_default(), text.get(digits.end..).unwrap_or_default());
            format!("{before}{hash}{after}")
        });
        sealed.ok_or_else(|| Error::invariant("a manifest cannot be sealed: a name in it imitates the checksum's field"))
    }

    /// Adds to `problems` what is wrong with the manifest by itself.
    pub(super) fn check(&self, problems: &mut Vec<String>) {
        if self.kernel_abi_version > KERNEL_ABI_VERSION {
            problems.push(format!(
                "kernel ABI {} is newer than {KERNEL_ABI_VERSION}, the newest that this version reads",
                self.kernel_abi_version
            ));
        }
        if self.quant_version != QUANT_VERSION {
            problems.push(format!("quant_version is '{}', expected '{QUANT_VERSION}'", self.quant_version));
        }
        if self.layer_count.is_some_and(|n| n != self.layers.len() as u64) {
            problems.push(format!("layer_count is {:?}, but {} layers are listed", self.layer_count, self.layers.len()));
        }
        if self.layers.is_empty() {
            problems.push("no layers are listed".into());
        }
        let total =
            self.layers.iter().try_fold(0u64, |n, l| n.checked_add((l.packed_shape[0] as u64).checked_mul(l.packed_shape[1] as u64)?));
        if let Some(stated) = self.total_qweight_bytes
            && total != Some(stated)
        {
            problems.push(format!("total_qweight_bytes is {stated}, the layers add up to {total:?}"));
        }
        for pair in self.layers.windows(2) {
            if let [a, b] = pair
                && a.canonical_name == b.canonical_name
            {
                problems.push(format!("layer '{}' is listed twice", a.canonical_name));
            }
        }
        for layer in &self.layers {
            layer.check(problems);
        }
        if let Some(additions) = &self.serenity {
            additions.check(problems);
        }
    }
}

/// What stands before the manifest's own checksum.
const SEAL_KEY: &[u8] = b"\"manifest_xxh3\": \"";
/// Digits of a [`Hash`].
const HASH_DIGITS: usize = 16;

/// Where the digits of the manifest's own checksum are, and the checksum that the text should have; `None` unless there is exactly one.
fn seal_of(text: &[u8]) -> Option<(Range<usize>, Hash)> {
    let mut found = text.windows(SEAL_KEY.len()).enumerate().filter(|(_, w)| *w == SEAL_KEY).map(|(at, _)| at + SEAL_KEY.len());
    let (start, None) = (found.next()?, found.next()) else { return None };
    let (before, rest) = text.split_at_checked(start)?;
    let (_, after) = rest.split_at_checked(HASH_DIGITS)?;
    let mut hash = Xxh3::new();
    for part in [before, &[b'0'; HASH_DIGITS], after] {
        hash.update(part);
    }
    Some((start..start + HASH_DIGITS, Hash(hash.digest())))
}

/// Compares the manifest's text with the checksum in it. Either the key of our additions or that of the checksum survives a flipped
/// bit, so that neither can be lost unseen.
fn check_seal(text: &[u8], has_additions: bool) -> Result<()> {
    const ADVICE: &str = "copy the manifest again, or build the slab again; a manifest with checksums cannot be edited by hand";
    match seal_of(text) {
        Some((digits, expected)) => {
            let stated = text.get(digits.clone()).unwrap_or_default();
            if stated == expected.to_string().as_bytes() {
                return Ok(());
            }
            Err(Error::data("the slab's manifest is corrupt: it does not have the checksum that it states")
                .offset(digits.start as u64)
                .expected(expected)
                .found(String::from_utf8_lossy(stated))
                .advice(ADVICE))
        }
        None if has_additions => {
            Err(Error::data("the slab's manifest is corrupt: it does not state its checksum (serenity.manifest_xxh3) exactly once")
                .advice(ADVICE))
        }
        None => Ok(()),
    }
}

impl ManifestLayer {
    /// The v2 entry of a linear without bias.
    ///
    /// # Errors
    /// [`Error::Config`] if padding overflows.
    pub fn new(linear: &LinearSpec, pad_k: usize) -> Result<Self> {
        let padded = padded_in(linear.in_features, pad_k).ok_or_else(|| Error::config("--pack-k is too large").found(pad_k))?;
        let name = &linear.name;
        Ok(Self {
            canonical_name: name.clone(),
            qweight_key: format!("{name}.qweight"),
            scale_key: format!("{name}.scale"),
            zero_point_key: format!("{name}.zero_point"),
            bias_key: None,
            orig_shape: [linear.out_features, linear.in_features],
            packed_shape: [linear.out_features, padded],
            pad_k,
            quant_bits: 8,
            quant_scheme: "per_row_symmetric".into(),
            quant_axis: 0,
            dtype_qweight: "int8".into(),
            dtype_scale: "float32".into(),
            dtype_zero_point: "float32".into(),
            block_id: None,
        })
    }

    fn check(&self, problems: &mut Vec<String>) {
        let name = &self.canonical_name;
        if name.is_empty() {
            problems.push("a layer has no name".into());
        }
        match self.quant_bits {
            8 => {}
            4 => problems.push(format!("layer '{name}': 4-bit codes are not supported by this version")),
            other => problems.push(format!("layer '{name}': quant_bits is {other}, expected 8")),
        }
        let texts = [
            ("quant_scheme", &self.quant_scheme, "per_row_symmetric"),
            ("dtype_qweight", &self.dtype_qweight, "int8"),
            ("dtype_scale", &self.dtype_scale, "float32"),
            ("dtype_zero_point", &self.dtype_zero_point, "float32"),
        ];
        for (field, found, expected) in texts {
            if found != expected {
                problems.push(format!("layer '{name}': {field} is '{found}', expected '{expected}'"));
            }
        }
        if self.quant_axis != 0 {
            problems.push(format!("layer '{name}': quant_axis is {}, expected 0", self.quant_axis));
        }
        let ([out, inner], [packed_out, packed_in]) = (self.orig_shape, self.packed_shape);
        if out == 0 || inner == 0 {
            problems.push(format!("layer '{name}': orig_shape {:?} is empty", self.orig_shape));
        }
        if packed_out != out || padded_in(inner, self.pad_k) != Some(packed_in) {
            problems.push(format!(
                "layer '{name}': packed_shape {:?} is not orig_shape {:?} padded to a multiple of {}",
                self.packed_shape, self.orig_shape, self.pad_k
            ));
        }
    }
}

impl Additions {
    fn check(&self, problems: &mut Vec<String>) {
        if self.format == 0 || self.format > ADDITIONS_VERSION {
            problems.push(format!("serenity.format is {}, this version reads 1 to {ADDITIONS_VERSION}", self.format));
        }
        if !self.page_bytes.is_power_of_two() || self.page_bytes < 4096 || self.page_bytes > 1 << 30 {
            problems.push(format!("serenity.page_bytes is {}, expected a power of two from 4096 to 2^30", self.page_bytes));
        } else if self.page_xxh3.len() as u64 != self.file_bytes.div_ceil(self.page_bytes) {
            problems.push(format!(
                "serenity.page_xxh3 has {} entries for {} bytes in pages of {}",
                self.page_xxh3.len(),
                self.file_bytes,
                self.page_bytes
            ));
        }
        let checked = match (self.component, &self.geometry, &self.text_encoder) {
            (Component::Transformer, Some(geometry), None) => geometry.check().map_err(|e| format!("geometry: {e}")),
            (Component::TextEncoder, None, Some(shape)) => {
                TextSlabShape::new(shape.geometry.clone(), shape.layers).map(drop).map_err(|e| format!("text_encoder: {e}"))
            }
            _ => Err("lacks a field or has one too many: a transformer has geometry, a text_encoder has text_encoder".into()),
        };
        if let Err(problem) = checked {
            problems.push(format!("serenity.{problem}"));
        }
        if self.format < self.component.format() {
            problems.push(format!("serenity.format is {}, which has no such component", self.format));
        }
        if let Some(companion) = &self.companion {
            let file = &companion.file;
            // A plain file name: anything else could point out of the manifest's folder.
            if file.is_empty() || file.contains(['/', '\\', '\0']) || file == "." || file == ".." {
                problems.push(format!("serenity.companion.file '{file}' is no plain file name"));
            }
        }
    }
}
