//! The SquareQ v2 INT8 slab: a safetensors file of quantised linears and the JSON manifest that lists them.
//!
//! [`Slab::open`] reads the header, the manifest and the (small) scales, and checks everything that can be checked without reading a
//! code: all gates of the original reader, what the original leaves unchecked, and the hash of the header where our additions give
//! one. What comes out is byte ranges that can be trusted to lie in the file, not to overlap and to have the right lengths; the loader
//! reads them with its own I/O. The payload's content is proven by page hashes ([`Pages`]), which the loader checks as it reads and
//! `serenity-slab verify` checks as a whole.
//!
//! Path of a block: [`header`] and [`manifest`] → [`layout`] (what a block's payload in the ring looks like) → [`quant`].
//! All problems of a slab are collected and reported together, as [`Error::Data`].

pub mod header;
pub mod layout;
pub mod manifest;
pub mod pieces;
pub mod quant;
pub mod simd;
mod strict_json;
pub mod text_encoder;

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::checksum::Xxh3;
use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::geometry::{LinearSpec, TransformerGeometry};
use crate::names;
use header::Header;
use manifest::{MANIFEST_BYTES_MAX, Manifest, ManifestLayer};

/// Problems listed in one message; more are counted.
const PROBLEMS_SHOWN_MAX: usize = 20;

/// A slab whose header, manifest and scales have been checked.
#[derive(Debug, Clone)]
pub struct Slab {
    path: PathBuf,
    manifest_path: PathBuf,
    header: Header,
    manifest: Manifest,
    signature: u64,
    layers: Vec<SlabLayer>,
    by_name: HashMap<String, usize>,
    pages: Option<Pages>,
    companion: Option<PathBuf>,
}

/// One quantised linear with the absolute byte ranges of its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlabLayer {
    /// Name as in the manifest (without `.weight`).
    pub name: String,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// Columns as stored, `in_features` rounded up; the surplus is zero.
    pub padded_in: usize,
    /// I8 `[out_features, padded_in]`.
    pub qweight: Range<u64>,
    /// F32 `[out_features]`, all positive.
    pub scale: Range<u64>,
    /// F32 `[out_features]`, all zero.
    pub zero_point: Range<u64>,
    /// F32 `[out_features]`.
    pub bias: Option<Range<u64>>,
}

/// Hashes of the slab file in fixed pages: page i is bytes `[i * page_bytes, (i + 1) * page_bytes)`, the last one shorter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pages {
    /// Page size, a power of two.
    pub page_bytes: u64,
    /// XXH3-64 of every page.
    pub xxh3: Vec<u64>,
    /// Length of the file.
    pub file_bytes: u64,
}

impl Pages {
    /// Byte range of page `index`; empty beyond the last.
    #[must_use]
    pub fn range(&self, index: usize) -> Range<u64> {
        let start = (index as u64).saturating_mul(self.page_bytes).min(self.file_bytes);
        start..start.saturating_add(self.page_bytes).min(self.file_bytes)
    }

    /// The pages that the byte range touches.
    #[must_use]
    pub fn touched_by(&self, range: &Range<u64>) -> Range<usize> {
        let end = range.end.div_ceil(self.page_bytes).min(self.xxh3.len() as u64);
        ((range.start / self.page_bytes).min(end) as usize)..end as usize
    }

    /// Whether `bytes` are the content of page `index`.
    #[must_use]
    pub fn matches(&self, index: usize, bytes: &[u8]) -> bool {
        self.xxh3.get(index) == Some(&crate::checksum::xxh3_64(bytes))
    }
}

impl Slab {
    /// Opens and checks a slab. Reads the manifest, the header, the scales, zero points and biases; no codes.
    ///
    /// # Errors
    /// [`Error::Absent`] where a file cannot be read, [`Error::Data`] listing everything that is wrong otherwise.
    pub fn open(slab: &Path, manifest: &Path) -> Result<Self> {
        let manifest_bytes = read_manifest(manifest)?;
        let parsed = Manifest::parse(&manifest_bytes).map_err(|e| e.at(manifest))?;
        let file =
            File::open(slab).map_err(|e| Error::io("cannot open the slab", slab, e).advice("build it with `serenity-slab build`"))?;
        let header = Header::read_from(&file, slab)?;
        let mut problems = Vec::new();
        parsed.check(&mut problems);
        let mut keys = HashMap::new();
        let mut layers = Vec::with_capacity(parsed.layers.len());
        for layer in &parsed.layers {
            layers.extend(locate(layer, &header, &mut keys, &mut problems));
        }
        let by_name = index_by_name(&layers, &mut problems);
        if let Some(additions) = &parsed.serenity {
            check_additions(additions, &header, &mut problems);
        }
        // Values only of a slab whose structure holds: the ranges can then be read.
        if problems.is_empty() {
            for layer in &layers {
                check_values(layer, &file, slab, &mut problems)?;
            }
        }
        refuse(slab, manifest, problems)?;
        let companion_name = parsed.serenity.as_ref().and_then(|a| a.companion.as_ref());
        let companion = companion_name.map(|c| manifest.parent().unwrap_or(Path::new("")).join(&c.file));
        let pages = parsed.serenity.as_ref().map(|a| Pages {
            page_bytes: a.page_bytes,
            xxh3: a.page_xxh3.iter().map(|h| h.0).collect(),
            file_bytes: a.file_bytes,
        });
        Ok(Self {
            path: slab.to_path_buf(),
            manifest_path: manifest.to_path_buf(),
            signature: signature(&manifest_bytes, &header),
            header,
            manifest: parsed,
            layers,
            by_name,
            pages,
            companion,
        })
    }

    /// The slab file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The manifest file.
    #[must_use]
    pub fn manifest_path(&self) -> &Path {
        &self.manifest_path
    }

    /// Length of the slab file when it was opened.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.header.file_bytes
    }

    /// Names this slab in the ring: XXH3-64 of the manifest, the header and the file's length.
    #[must_use]
    pub fn signature(&self) -> u64 {
        self.signature
    }

    /// The manifest's `model_signature`.
    #[must_use]
    pub fn model_signature(&self) -> &str {
        &self.manifest.model_signature
    }

    /// The parsed header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The parsed manifest, layers sorted by name.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The layer of that name; adapter suffixes, wrapper prefixes and the known aliases of either side are seen through
    /// ([`names::canonical_linear`]).
    #[must_use]
    pub fn layer(&self, name: &str) -> Option<&SlabLayer> {
        let index = self.by_name.get(name).or_else(|| self.by_name.get(&names::canonical_linear(name)))?;
        self.layers.get(*index)
    }

    /// All layers, sorted by name.
    #[must_use]
    pub fn layers(&self) -> &[SlabLayer] {
        &self.layers
    }

    /// Page hashes, if the slab has our additions.
    #[must_use]
    pub fn pages(&self) -> Option<&Pages> {
        self.pages.as_ref()
    }

    /// The file with the tensors outside the blocks, if the slab has our additions. Its existence is not checked here.
    #[must_use]
    pub fn companion(&self) -> Option<&Path> {
        self.companion.as_deref()
    }

    /// The geometry of the transformer that the slab was built from, if it has our additions.
    #[must_use]
    pub fn geometry(&self) -> Option<&TransformerGeometry> {
        self.manifest.serenity.as_ref().and_then(|a| a.geometry.as_ref())
    }

    /// Whether training needs nothing but this slab of the transformer: it carries the geometry, and its companion lies beside it in the
    /// stated length. The companion's content is checked when it is read.
    #[must_use]
    pub fn is_self_sufficient(&self) -> bool {
        let stated = self.manifest.serenity.as_ref().and_then(|a| a.companion.as_ref());
        let there = self.companion().zip(stated).map(|(path, stated)| std::fs::metadata(path).is_ok_and(|m| m.len() == stated.bytes));
        self.geometry().is_some() && there == Some(true)
    }

    /// Checks that the slab holds every block linear of `geometry` in the right shape, and that its signature is that model's.
    ///
    /// # Errors
    /// [`Error::Data`] listing the missing and misshapen linears, or both signatures.
    pub fn check_model(&self, geometry: &TransformerGeometry) -> Result<()> {
        let mut problems = Vec::new();
        if self.manifest.serenity.as_ref().is_some_and(|a| a.component != manifest::Component::Transformer) {
            problems.push("it is of a text encoder".into());
        }
        for block in geometry.blocks() {
            for linear in geometry.block_linears(block) {
                if let Err(problem) = self.layer_for(&linear) {
                    problems.push(problem);
                }
            }
        }
        let expected = manifest::model_signature(&geometry.all_linears());
        if self.manifest.model_signature != expected {
            problems.push(format!("model_signature is '{}', that of the model is '{expected}'", self.manifest.model_signature));
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::data(format!("the slab is not of this model:{}", listed(&problems)))
            .at(&self.path)
            .advice("build a slab of this model with `serenity-slab build`, or correct squareq_slab_path and squareq_manifest_path"))
    }

    /// The layer of a linear, checked against its shape and for the absence of a bias.
    ///
    /// # Errors
    /// One line that names the linear and says what is wrong.
    pub fn layer_for(&self, linear: &LinearSpec) -> Result<&SlabLayer, String> {
        let name = &linear.name;
        let layer = self.layer(name).ok_or_else(|| format!("linear '{name}' is missing"))?;
        if (layer.out_features, layer.in_features) != (linear.out_features, linear.in_features) {
            return Err(format!(
                "linear '{name}' is [{}, {}], expected [{}, {}]",
                layer.out_features, layer.in_features, linear.out_features, linear.in_features
            ));
        }
        if layer.bias.is_some() {
            return Err(format!("linear '{name}' has a bias, which no FLUX.2 linear has"));
        }
        Ok(layer)
    }
}

fn read_manifest(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read;
    let file = File::open(path)
        .map_err(|e| Error::io("cannot open the slab's manifest", path, e).advice("build the slab with `serenity-slab build`"))?;
    let mut bytes = Vec::new();
    file.take(MANIFEST_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|e| Error::io("cannot read the slab's manifest", path, e))?;
    if bytes.len() as u64 > MANIFEST_BYTES_MAX {
        return Err(Error::data("the slab's manifest is too large").at(path).expected(format!("at most {MANIFEST_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

fn signature(manifest: &[u8], header: &Header) -> u64 {
    let mut hash = Xxh3::new();
    for part in [manifest, &header.bytes] {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.update(&header.file_bytes.to_le_bytes());
    hash.digest()
}

/// The ranges of a layer's tensors, or problems. `keys` holds the keys in use, with their layers.
fn locate<'m>(
    layer: &'m ManifestLayer,
    header: &Header,
    keys: &mut HashMap<&'m str, &'m str>,
    problems: &mut Vec<String>,
) -> Option<SlabLayer> {
    let name = layer.canonical_name.as_str();
    let [out, inner] = layer.orig_shape;
    let mut find = |what: &str, key: &'m str, dtype: Dtype, shape: &[usize]| -> Option<Range<u64>> {
        if let Some(other) = keys.insert(key, name) {
            problems.push(format!("layer '{name}': its {what} tensor '{key}' belongs to layer '{other}' too"));
        }
        let Some(tensor) = header.tensor(key) else {
            problems.push(format!("layer '{name}': its {what} tensor '{key}' is not in the file"));
            return None;
        };
        if tensor.dtype != dtype {
            problems.push(format!("layer '{name}': tensor '{key}' is {:?}, expected {dtype:?}", tensor.dtype));
        }
        if tensor.shape != shape {
            problems.push(format!("layer '{name}': tensor '{key}' has shape {:?}, expected {shape:?}", tensor.shape));
        }
        Some(tensor.range.clone())
    };
    let qweight = find("qweight", &layer.qweight_key, Dtype::I8, &layer.packed_shape);
    let scale = find("scale", &layer.scale_key, Dtype::F32, &[out]);
    let zero_point = find("zero_point", &layer.zero_point_key, Dtype::F32, &[out]);
    let bias = match &layer.bias_key {
        Some(key) => Some(find("bias", key, Dtype::F32, &[out])?),
        None => None,
    };
    Some(SlabLayer {
        name: name.to_owned(),
        out_features: out,
        in_features: inner,
        padded_in: layer.packed_shape[1],
        qweight: qweight?,
        scale: scale?,
        zero_point: zero_point?,
        bias,
    })
}

/// Layers by their own name and by their canonical one.
fn index_by_name(layers: &[SlabLayer], problems: &mut Vec<String>) -> HashMap<String, usize> {
    let mut index: HashMap<String, usize> = HashMap::with_capacity(2 * layers.len());
    for (i, layer) in layers.iter().enumerate() {
        index.insert(layer.name.clone(), i);
    }
    for (i, layer) in layers.iter().enumerate() {
        let canonical = names::canonical_linear(&layer.name);
        match index.insert(canonical.clone(), i) {
            Some(other) if other != i => {
                let other = layers.get(other).map_or("", |l| l.name.as_str());
                problems.push(format!("layers '{}' and '{other}' are both '{canonical}'", layer.name));
            }
            _ => {}
        }
    }
    index
}

fn check_additions(additions: &manifest::Additions, header: &Header, problems: &mut Vec<String>) {
    if additions.file_bytes != header.file_bytes {
        problems.push(format!("the file has {} bytes, the manifest says {}", header.file_bytes, additions.file_bytes));
    }
    let found = crate::checksum::xxh3_64(&header.bytes);
    if found != additions.header_xxh3.0 {
        problems.push(format!(
            "the header (byte offset 0 to {}) has hash {found:016x}, the manifest says {}: it is corrupt, or of another build",
            header.data_start, additions.header_xxh3
        ));
    }
}

/// Scales positive and finite, zero points zero, bias finite.
fn check_values(layer: &SlabLayer, file: &File, path: &Path, problems: &mut Vec<String>) -> Result<()> {
    let read = |range: &Range<u64>| read_f32(file, range).map_err(|e| Error::io("cannot read the slab", path, e).offset(range.start));
    let mut report = |what: &str, expected: &str, range: &Range<u64>, found: Option<(usize, f32)>| {
        if let Some((row, value)) = found {
            let offset = range.start + 4 * row as u64;
            problems.push(format!("layer '{}': {what} of row {row} is {value}, expected {expected} (byte offset {offset})", layer.name));
        }
    };
    let first = |values: &[f32], bad: fn(f32) -> bool| values.iter().copied().enumerate().find(|&(_, v)| bad(v));
    report("the scale", "a positive number", &layer.scale, first(&read(&layer.scale)?, |v| !(v > 0.0 && v.is_finite())));
    report("the zero point", "0", &layer.zero_point, first(&read(&layer.zero_point)?, |v| v != 0.0));
    if let Some(bias) = &layer.bias {
        report("the bias", "a finite number", bias, first(&read(bias)?, |v| !v.is_finite()));
    }
    Ok(())
}

fn read_f32(file: &File, range: &Range<u64>) -> std::io::Result<Vec<f32>> {
    // The length was checked against the shape, which the manifest and the header agree on, and lies in the file.
    let mut bytes = vec![0; (range.end - range.start) as usize];
    file.read_exact_at(&mut bytes, range.start)?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect())
}

/// One line for each problem, up to a limit.
fn listed(problems: &[String]) -> String {
    let mut text: String = problems.iter().take(PROBLEMS_SHOWN_MAX).map(|p| format!("\n    - {p}")).collect();
    if problems.len() > PROBLEMS_SHOWN_MAX {
        text.push_str(&format!("\n    - and {} more", problems.len() - PROBLEMS_SHOWN_MAX));
    }
    text
}

fn refuse(slab: &Path, manifest: &Path, problems: Vec<String>) -> Result<()> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::data(format!("the slab and its manifest {} do not hold together:{}", manifest.display(), listed(&problems)))
        .at(slab)
        .advice("build the slab again with `serenity-slab build`, or copy both files again"))
}
