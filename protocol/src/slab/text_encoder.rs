//! The slab of a text encoder: the linears of its layers as INT8 rows in the format of the transformer's slab, everything else that
//! encoding needs (the embedding, two norms for each layer) in the companion as bfloat16.
//!
//! The manifest says which component a slab is of (`serenity.component`). Only the layers that the embeddings are made from are in it
//! (the first 30 of dev's 40), so a slab of dev has 13.3 GB and a companion of 1.3 GB where the checkpoint has 48 GB. Names are those of
//! the reference without its prefix (three spellings of which exist): `layers.N.self_attn.q_proj`. A layer is one run of the file, codes
//! first, from a multiple of 4096 on.
//!
//! An embedding made from INT8 rows is another one than that of the checkpoint: whoever names cache entries must feed
//! [`TextSlab::identity`] in place of the checkpoint's.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::{Slab, SlabLayer};
use crate::cache::identity::{Memo, weight_files};
use crate::cache::text_model::{TextGeometry, config_file};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::geometry::LinearSpec;
use crate::model_path::{ModelPaths, SourcePlace};

/// The linears of a layer, in the order in which a forward pass needs them and in which they lie in the file.
pub const LAYER_LINEARS: [&str; 7] =
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];
/// The norms of a layer, `[hidden]` each.
pub const LAYER_NORMS: [&str; 2] = ["input_layernorm", "post_attention_layernorm"];
/// The embedding, `[vocab, hidden]`.
pub const EMBEDDING: &str = "embed_tokens.weight";
/// Prefixes of the language model's tensors in checkpoints: older multimodal, newer multimodal, text only.
pub const PREFIXES: [&str; 3] = ["language_model.model.", "model.language_model.", "model."];

/// What a text encoder's slab holds; in the manifest as `serenity.text_encoder`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextSlabShape {
    /// Shape of the encoder. `geometry.layers` are those of the checkpoint.
    pub geometry: TextGeometry,
    /// Layers in the slab, from the first on: hidden state i needs the layers before i.
    pub layers: usize,
}

impl TextSlabShape {
    /// The slab of the first `layers` layers.
    ///
    /// # Errors
    /// [`Error::Data`] for an impossible geometry, [`Error::Config`] for layers that the encoder does not have.
    pub fn new(geometry: TextGeometry, layers: usize) -> Result<Self> {
        geometry.check()?;
        if layers == 0 || layers > geometry.layers {
            return Err(Error::config("a slab needs at least one layer and at most the text encoder's")
                .expected(format!("1 to {}", geometry.layers))
                .found(layers));
        }
        Ok(Self { geometry, layers })
    }

    /// The linears of layer `layer`, in file order.
    #[must_use]
    pub fn linears(&self, layer: usize) -> Vec<LinearSpec> {
        let g = &self.geometry;
        let (queries, keys) = (g.heads * g.head_dim, g.kv_heads * g.head_dim);
        let (hidden, middle) = (g.hidden, g.intermediate);
        let shapes =
            [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries), (middle, hidden), (middle, hidden), (hidden, middle)];
        let named = LAYER_LINEARS.iter().zip(shapes);
        named.map(|(name, (out, inner))| LinearSpec { name: linear_name(layer, name), out_features: out, in_features: inner }).collect()
    }

    /// The linears of all layers of the slab.
    #[must_use]
    pub fn all_linears(&self) -> Vec<LinearSpec> {
        (0..self.layers).flat_map(|layer| self.linears(layer)).collect()
    }

    /// Names and shapes of the companion's tensors, in file order: the embedding, then the norms of each layer.
    #[must_use]
    pub fn companion_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut all = vec![(EMBEDDING.to_owned(), vec![self.geometry.vocab, self.geometry.hidden])];
        for layer in 0..self.layers {
            all.extend(LAYER_NORMS.iter().map(|norm| (norm_name(layer, norm), vec![self.geometry.hidden])));
        }
        all
    }
}

/// `layers.3.mlp.up_proj`
#[must_use]
pub fn linear_name(layer: usize, linear: &str) -> String {
    format!("layers.{layer}.{linear}")
}

/// `layers.3.input_layernorm.weight`
#[must_use]
pub fn norm_name(layer: usize, norm: &str) -> String {
    format!("layers.{layer}.{norm}.weight")
}

/// An opened slab of a text encoder.
#[derive(Debug, Clone)]
pub struct TextSlab {
    slab: Slab,
    shape: TextSlabShape,
    companion: PathBuf,
}

impl TextSlab {
    /// Opens and checks a slab as [`Slab::open`] does, and that it holds every linear of its layers.
    ///
    /// # Errors
    /// As [`Slab::open`]; [`Error::Data`] if it is not of a text encoder, [`Error::Absent`] without its companion.
    pub fn open(slab: &Path, manifest: &Path) -> Result<Self> {
        Self::new(Slab::open(slab, manifest)?)
    }

    /// As [`Self::open`], with the manifest where the builder puts it, in place of the checkpoint in `folder`, if there is one: a `config.json`
    /// there must be of the same encoder.
    ///
    /// # Errors
    /// As [`Self::open`]; [`Error::Data`] for another encoder's `config.json`.
    pub fn open_beside(path: &Path, folder: Option<&Path>) -> Result<Self> {
        if !path.is_file() {
            return Err(Error::absent("the text encoder's slab does not exist")
                .at(path)
                .advice("build it with `serenity-slab build --component text_encoder`, or correct model.text_encoder_slab_path"));
        }
        let this = Self::open(path, &path.with_extension("manifest.json"))?;
        let Some(folder) = folder.filter(|f| config_file(f).is_file()) else { return Ok(this) };
        let (expected, found) = (TextGeometry::read(folder)?, &this.shape.geometry);
        if *found != expected {
            return Err(Error::data("the text encoder's slab is of another text encoder than config.json")
                .at(path)
                .expected(format!("{expected:?} ({})", config_file(folder).display()))
                .found(format!("{found:?}"))
                .advice("build a slab of this text encoder, or correct model.text_encoder_slab_path or model.text_encoder_path"));
        }
        Ok(this)
    }

    /// The same of a slab that is open.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn new(slab: Slab) -> Result<Self> {
        let additions = slab.manifest().serenity.as_ref();
        let Some(shape) = additions.and_then(|a| a.text_encoder.clone()) else {
            return Err(Error::data("the slab is not of a text encoder")
                .at(slab.path())
                .advice("build one with `serenity-slab build --component text_encoder`"));
        };
        let problems: Vec<String> = shape.all_linears().iter().filter_map(|l| slab.layer_for(l).err()).collect();
        if !problems.is_empty() {
            return Err(Error::data(format!("the text encoder's slab is incomplete:{}", super::listed(&problems))).at(slab.path()));
        }
        let companion = slab.companion().filter(|path| path.is_file()).map(Path::to_path_buf).ok_or_else(|| {
            Error::absent("the text encoder's slab has no companion file").at(slab.path()).advice("copy PREFIX.other.safetensors too")
        })?;
        let stated = additions.and_then(|a| a.companion.as_ref()).map_or(0, |c| c.bytes);
        let bytes = std::fs::metadata(&companion).map_err(|e| Error::io("cannot look at the companion file", &companion, e))?.len();
        if bytes != stated {
            return Err(Error::data("the companion of the text encoder's slab has another length than the manifest says")
                .at(&companion)
                .expected(format!("{stated} bytes"))
                .found(format!("{bytes} bytes"))
                .advice("copy PREFIX.other.safetensors again, or build the slab again"));
        }
        Ok(Self { slab, shape, companion })
    }

    /// The slab: paths, byte ranges, page hashes.
    #[must_use]
    pub fn slab(&self) -> &Slab {
        &self.slab
    }

    /// The encoder's shape and the number of layers that are here.
    #[must_use]
    pub fn shape(&self) -> &TextSlabShape {
        &self.shape
    }

    /// Refuses hidden states that need layers which are not here.
    ///
    /// # Errors
    /// [`Error::Config`] naming the state.
    pub fn check_states(&self, states: &[usize]) -> Result<()> {
        match states.iter().find(|&&s| s > self.shape.layers) {
            None => Ok(()),
            Some(state) => Err(Error::config("a hidden state needs layers that the text encoder's slab does not hold")
                .at(self.slab.path())
                .expected(format!("states up to {}", self.shape.layers))
                .found(state)
                .advice("build the slab with more --layers")),
        }
    }

    /// The linears of a layer with their byte ranges, in the order of [`LAYER_LINEARS`].
    ///
    /// # Errors
    /// [`Error::Invariant`] for a layer that is not here.
    pub fn layer(&self, layer: usize) -> Result<Vec<&SlabLayer>> {
        if layer >= self.shape.layers {
            return Err(Error::invariant("a layer outside the text encoder's slab was asked for").expected(self.shape.layers).found(layer));
        }
        let linears = self.shape.linears(layer);
        linears.iter().map(|l| self.slab.layer_for(l).map_err(|problem| Error::invariant(problem).at(self.slab.path()))).collect()
    }

    /// XXH3-64 of a linear's codes and of its scales, to be compared when they are read.
    ///
    /// # Errors
    /// [`Error::Data`] if the manifest does not state them.
    pub fn hashes(&self, linear: &SlabLayer) -> Result<(u64, u64)> {
        let manifest = self.slab.manifest();
        let stated = || {
            let at = manifest.layers.binary_search_by(|l| l.canonical_name.as_str().cmp(&linear.name)).ok()?;
            let (layer, tensors) = (manifest.layers.get(at)?, &manifest.serenity.as_ref()?.tensor_xxh3);
            Some((tensors.get(&layer.qweight_key)?.0, tensors.get(&layer.scale_key)?.0))
        };
        stated().ok_or_else(|| {
            Error::data(format!("the manifest states no checksums of linear '{}'", linear.name))
                .at(self.slab.manifest_path())
                .advice("build the slab again")
        })
    }

    /// The run of the file that holds a layer's codes and scales: one sequential read. In a slab of another layout it may hold more.
    ///
    /// # Errors
    /// As [`Self::layer`].
    pub fn layer_bytes(&self, layer: usize) -> Result<Range<u64>> {
        let linears = self.layer(layer)?;
        let start = linears.iter().map(|l| l.qweight.start.min(l.scale.start)).min().unwrap_or(0);
        let end = linears.iter().map(|l| l.qweight.end.max(l.scale.end)).max().unwrap_or(0);
        Ok(start..end)
    }

    /// The companion: bf16 tensors named as in [`TextSlabShape::companion_tensors`].
    #[must_use]
    pub fn companion(&self) -> &Path {
        &self.companion
    }

    /// XXH3-64 of a companion tensor's bytes, to be compared when it is read.
    #[must_use]
    pub fn companion_hash(&self, tensor: &str) -> Option<u64> {
        let companion = self.slab.manifest().serenity.as_ref()?.companion.as_ref()?;
        companion.tensor_xxh3.get(tensor).map(|h| h.0)
    }

    /// Names what this slab computes, for cache keys: its content, not its path; a rebuilt slab of the same weights is the same.
    #[must_use]
    pub fn identity(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        if let Some(additions) = &self.slab.manifest().serenity {
            for page in &additions.page_xxh3 {
                hasher.update(&page.0.to_le_bytes());
            }
            hasher.update(&additions.file_bytes.to_le_bytes());
            if let Some(companion) = &additions.companion {
                hasher.update(&companion.xxh3.0.to_le_bytes());
            }
            // The base of the rotary frequencies and the epsilon are in no tensor.
            hasher.update(format!("{:?}", self.shape.geometry).as_bytes());
        }
        format!("int8 slab {}", hasher.finalize().to_hex())
    }
}

/// Where a text encoder's weights are: in a checkpoint, or in the slab that stands for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextModel<'a> {
    /// A folder with `config.json`, or a weight file beside one.
    Checkpoint(&'a Path),
    /// A slab.
    Slab {
        /// `PREFIX.safetensors`; `PREFIX.manifest.json` and the companion lie beside it.
        slab: &'a Path,
        /// The checkpoint's folder, if there is one. Nothing in it is read but `config.json`, which must be of the same encoder; the geometry
        /// is the slab's own, so that the folder may be missing.
        folder: Option<&'a Path>,
    },
}

impl<'a> From<&'a Path> for TextModel<'a> {
    fn from(path: &'a Path) -> Self {
        Self::Checkpoint(path)
    }
}

impl<'a> TextModel<'a> {
    /// The text encoder of a model: its slab if one is named.
    ///
    /// # Errors
    /// [`Error::Absent`] if there is neither.
    pub fn of(paths: &'a ModelPaths) -> Result<Self> {
        let folder = paths.text_encoder.as_deref();
        if let Some(slab) = paths.text_encoder_slab.as_deref() {
            return Ok(Self::Slab { slab, folder });
        }
        folder.map(Self::Checkpoint).ok_or_else(|| {
            Error::absent("the model has no text encoder")
                .advice("set model.text_encoder_path in the configuration, or point model.path at a folder in the Hugging Face layout")
        })
    }

    /// The checkpoint's folder or file, or the slab.
    #[must_use]
    pub fn path(&self) -> &'a Path {
        match *self {
            Self::Checkpoint(path) | Self::Slab { slab: path, .. } => path,
        }
    }

    /// The files that weights are read from: a checkpoint's, or slab and companion.
    ///
    /// # Errors
    /// As [`weight_files`] and [`TextSlab::open_beside`].
    pub fn weight_files(&self) -> Result<Vec<PathBuf>> {
        match *self {
            Self::Checkpoint(path) => weight_files(path),
            Self::Slab { slab, folder } => Ok(vec![slab.to_path_buf(), TextSlab::open_beside(slab, folder)?.companion]),
        }
    }

    /// Layers whose weights are there: a checkpoint's, or those in the slab.
    ///
    /// # Errors
    /// As [`TextGeometry::read`] and [`TextSlab::open_beside`].
    pub fn layers(&self) -> Result<usize> {
        match *self {
            Self::Checkpoint(path) => TextGeometry::read(path).map(|g| g.layers),
            Self::Slab { slab, folder } => TextSlab::open_beside(slab, folder).map(|s| s.shape.layers),
        }
    }

    /// The encoder's shape. Of a slab that is gone it is that of `config.json`: entries that it made are still found.
    ///
    /// # Errors
    /// As [`TextGeometry::read`] and [`TextSlab::open_beside`].
    pub fn geometry(&self) -> Result<TextGeometry> {
        let (slab, folder) = match *self {
            Self::Checkpoint(path) => return TextGeometry::read(path),
            Self::Slab { slab, folder } => (slab, folder),
        };
        match (TextSlab::open_beside(slab, folder), folder.map(TextGeometry::read)) {
            (Err(Error::Absent(_)), Some(Ok(geometry))) => Ok(geometry),
            (slab, _) => slab.map(|s| s.shape.geometry),
        }
    }

    /// What cache keys are made from: the weights that compute.
    ///
    /// # Errors
    /// As [`Memo::component`] and [`TextSlab::open_beside`].
    pub fn identity(&self, memo: &mut Memo) -> Result<String> {
        match *self {
            Self::Checkpoint(path) => memo.component(path),
            Self::Slab { slab, folder } => TextSlab::open_beside(slab, folder).map(|s| s.identity()),
        }
    }
}

/// A text encoder's checkpoint by the names of the slab, for the builder.
pub struct TextSource {
    checkpoint: Checkpoint,
    prefix: &'static str,
    geometry: TextGeometry,
}

impl TextSource {
    /// Opens the text encoder at `path`, a folder with `config.json` or a file beside it.
    ///
    /// # Errors
    /// [`Error::Absent`] where files are missing, [`Error::Data`] for unknown names, Mistral's own format and quantised weights.
    pub fn open(path: &Path) -> Result<Self> {
        let geometry = TextGeometry::read(path)?;
        let checkpoint = Checkpoint::open(path)?;
        if checkpoint.names().any(|n| n.starts_with("layers.") && n.contains(".attention.wq.")) {
            return Err(Error::data("the text encoder is in Mistral's own format, whose query and key rows are laid out otherwise")
                .at(checkpoint.root())
                .advice("use the Hugging Face files (model-*.safetensors with model.safetensors.index.json)"));
        }
        let prefix = PREFIXES.into_iter().find(|p| checkpoint.contains(&format!("{p}layers.0.input_layernorm.weight")));
        let prefix = prefix.ok_or_else(|| {
            Error::data("the text encoder's tensors have no known names")
                .at(checkpoint.root())
                .expected(PREFIXES.map(|p| format!("{p}layers.0.input_layernorm.weight")).join(", "))
        })?;
        Ok(Self { checkpoint, prefix, geometry })
    }

    /// The encoder's shape.
    #[must_use]
    pub fn geometry(&self) -> &TextGeometry {
        &self.geometry
    }

    /// `config.json` and the weight files.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files = self.checkpoint.files();
        files.push(config_file(self.checkpoint.root()));
        files
    }

    /// Where the tensor of that name (without prefix) lies, checked to have `shape`.
    ///
    /// # Errors
    /// [`Error::Data`] if it is missing, of another shape or of a type that needs scales.
    // One run is one range, not the numbers in it.
    #[allow(clippy::single_range_in_vec_init)]
    pub fn place(&self, name: &str, shape: &[usize]) -> Result<SourcePlace> {
        let stored = format!("{}{name}", self.prefix);
        let place = self.checkpoint.place(&stored)?;
        let odd = |what: &str, expected: String, found: String| {
            Error::data(format!("tensor '{stored}' of the text encoder has another {what}"))
                .at(&place.file)
                .offset(place.range.start)
                .expected(expected)
                .found(found)
        };
        if place.shape != shape {
            return Err(odd("shape", format!("{shape:?}"), format!("{:?}", place.shape)));
        }
        if !matches!(place.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            return Err(odd("type", "F32, BF16 or F16".into(), format!("{:?}", place.dtype)).advice("use the bf16 weights"));
        }
        Ok(SourcePlace { file: place.file, dtype: place.dtype, runs: vec![place.range.start..place.range.end], scale: None })
    }
}
