//! From `model.path` to files, and a transformer read by its diffusers tensor names whatever the files call them.
//!
//! [`resolve`] finds the parts of a model: a folder in the Hugging Face layout, a single `.safetensors` file, or a hub id in the local
//! hub cache. [`TransformerSource`] then reads the transformer; for a BFL file it renames, splits q/k/v and exchanges the halves of
//! `norm_out` (the table is [`names`]). A source that opened holds every tensor of its geometry in the right shape: nothing is ever
//! skipped in silence.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::fp8::{self, Scale};
use crate::geometry::TransformerGeometry;
use crate::names::{self, Rows, WRAPPER_PREFIXES};

/// Missing or misshapen tensors listed in one message.
const LISTED_MAX: usize = 20;

/// Where the parts of a model are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelPaths {
    /// Folder or file of the transformer. It need not exist where a slab stands for it.
    pub transformer: PathBuf,
    /// Its `config.json`; `None` for a single file, whose geometry follows from its shapes, and for a transformer that is gone.
    pub transformer_config: Option<PathBuf>,
    /// Folder of the text encoder.
    pub text_encoder: Option<PathBuf>,
    /// INT8 slab that stands for the text encoder's weights. It need not exist where a full cache stands for it.
    pub text_encoder_slab: Option<PathBuf>,
    /// Folder of the tokenizer.
    pub tokenizer: Option<PathBuf>,
    /// Folder or file of the VAE.
    pub vae: Option<PathBuf>,
}

/// Finds the parts of the model that the configuration names. Paths given for single parts come before the model's own folders; for a
/// single file these are the folders beside it.
///
/// # Errors
/// [`Error::Absent`] if `model.path` is neither a folder, a `.safetensors` file nor a hub id in the local cache, or if the folder has no
/// transformer.
pub fn resolve(model: &ModelConfig) -> Result<ModelPaths> {
    let mut paths = resolve_path(&model.path)?;
    let overridden = [
        (&model.text_encoder_path, &mut paths.text_encoder, "model.text_encoder_path"),
        (&model.tokenizer_path, &mut paths.tokenizer, "model.tokenizer_path"),
        (&model.vae_path, &mut paths.vae, "model.vae_path"),
    ];
    for (given, part, key) in overridden {
        if let Some(given) = given {
            if !given.exists() {
                return Err(Error::absent(format!("{key} does not exist")).at(given).advice("correct the path in the configuration"));
            }
            *part = Some(given.clone());
        }
    }
    paths.text_encoder_slab = model.text_encoder_slab_path.clone();
    Ok(paths)
}

/// As [`resolve`], of a bare `model.path`.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_path(path: &str) -> Result<ModelPaths> {
    let root = Path::new(path);
    if root.is_dir() {
        return of_folder(root);
    }
    if root.is_file() {
        if root.extension().is_none_or(|e| e != "safetensors") {
            return Err(Error::config("model.path is a file of an unknown kind").at(root).expected("a folder or a .safetensors file"));
        }
        let mut paths = beside(root.parent().unwrap_or(Path::new("")));
        paths.transformer = root.to_path_buf();
        return Ok(paths);
    }
    if let Some(snapshot) = hub_snapshot(path)? {
        return of_folder(&snapshot);
    }
    // A single file that is gone, beside the folders of the other parts: a slab may stand for it.
    if root.extension().is_some_and(|e| e == "safetensors") {
        let parts = beside(root.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")));
        if has_the_others(&parts) {
            return Ok(ModelPaths { transformer: root.to_path_buf(), ..parts });
        }
    }
    Err(Error::absent("the model was not found")
        .at(root)
        .expected("a folder in the Hugging Face layout, a .safetensors file, or a hub id (owner/name) that is in the local hub cache")
        .advice("check model.path; for a hub id, download it first (for example `hf download OWNER/NAME`), or set HF_HOME to the cache that has it"))
}

/// The parts that lie in `folder`, without a transformer.
fn beside(folder: &Path) -> ModelPaths {
    let part = |name: &str| Some(folder.join(name)).filter(|p| p.is_dir());
    ModelPaths {
        transformer: PathBuf::new(),
        transformer_config: None,
        text_encoder: part("text_encoder"),
        text_encoder_slab: None,
        tokenizer: part("tokenizer"),
        vae: part("vae"),
    }
}

/// Whether a pipeline's parts beside the transformer are here; a slab may stand for the text encoder too.
fn has_the_others(parts: &ModelPaths) -> bool {
    parts.vae.is_some() && (parts.text_encoder.is_some() || parts.tokenizer.is_some())
}

/// A pipeline folder (with `transformer/`, or without it but with the other parts), or a transformer's own folder (with `config.json`;
/// its siblings are the other parts).
fn of_folder(folder: &Path) -> Result<ModelPaths> {
    let inner = folder.join("transformer");
    let parts = beside(folder);
    let is_pipeline = inner.is_dir() || has_the_others(&parts);
    let (transformer, mut paths) = if is_pipeline {
        (inner, parts)
    } else {
        // `canonicalize` because the parent of "transformer" alone is "".
        let real = folder.canonicalize().map_err(|e| Error::io("cannot open the model's folder", folder, e))?;
        (folder.to_path_buf(), beside(real.parent().unwrap_or(&real)))
    };
    let config = transformer.join("config.json");
    // The transformer of a pipeline may be gone: a slab can stand for it, and who needs it says that it is missing.
    if !config.is_file() && !is_pipeline {
        return Err(no_transformer(folder));
    }
    paths.transformer = transformer;
    paths.transformer_config = Some(config).filter(|c| c.is_file());
    Ok(paths)
}

fn no_transformer(at: &Path) -> Error {
    Error::absent("the model's folder has no transformer")
        .at(at)
        .expected("transformer/config.json (or config.json, for a transformer's own folder)")
        .advice("check model.path; a folder that holds a single-file checkpoint is given by the file's path")
}

/// The snapshot of a hub id in the local hub cache, if it is one and is there.
fn hub_snapshot(id: &str) -> Result<Option<PathBuf>> {
    let plain = |s: &str| !s.is_empty() && !s.starts_with('.') && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    let Some((owner, name)) = id.split_once('/') else { return Ok(None) };
    if !plain(owner) || !plain(name) {
        return Ok(None);
    }
    let Some(cache) = hub_cache() else { return Ok(None) };
    let repository = cache.join(format!("models--{owner}--{name}"));
    if !repository.is_dir() {
        return Ok(None);
    }
    let reference = repository.join("refs").join("main");
    let revision =
        std::fs::read_to_string(&reference).map_err(|e| Error::io("the hub cache has no revision of the model", &reference, e))?;
    let revision = revision.trim();
    if !plain(revision) {
        return Err(Error::data("the hub cache's reference is malformed").at(&reference).found(revision));
    }
    let snapshot = repository.join("snapshots").join(revision);
    if snapshot.is_dir() { Ok(Some(snapshot)) } else { Err(Error::absent("the hub cache lacks the model's snapshot").at(&snapshot)) }
}

/// The hub cache's folder, by the hub's own rules: `HF_HUB_CACHE`, `HF_HOME/hub`, `~/.cache/huggingface/hub`.
fn hub_cache() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    variable("HF_HUB_CACHE")
        .or_else(|| variable("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/huggingface/hub")))
}

/// Where a tensor's rows lie in the files.
#[derive(Debug, Clone, PartialEq)]
pub struct SourcePlace {
    /// The file.
    pub file: PathBuf,
    /// Element type in the file.
    pub dtype: Dtype,
    /// Absolute byte ranges whose concatenation is the tensor, row-major (two for exchanged halves, otherwise one).
    pub runs: Vec<Range<u64>>,
    /// Factors of an 8-bit weight, for its rows in the diffusers order.
    pub scale: Option<Scale>,
}

impl SourcePlace {
    /// Appends `bytes` as float32: the tensor's elements from `first` on, in rows of `columns`. Exact but for 8-bit floats with scales,
    /// whose values are float32 products.
    ///
    /// # Errors
    /// [`Error::Data`] for types other than F32, BF16, F16, F8_E4M3 and F8_E5M2.
    pub fn append_f32(&self, first: usize, columns: usize, bytes: &[u8], values: &mut Vec<f32>) -> Result<()> {
        let start = values.len();
        append_f32(bytes, self.dtype, values)?;
        if let Some(scale) = &self.scale {
            let columns = columns.max(1);
            let mut at = first;
            let mut rest = values.get_mut(start..).unwrap_or_default();
            while !rest.is_empty() {
                let (row, after) = rest.split_at_mut((columns - at % columns).min(rest.len()));
                let factor = scale.of_row(at / columns);
                row.iter_mut().for_each(|v| *v *= factor);
                at += row.len();
                rest = after;
            }
        }
        Ok(())
    }
}

/// A transformer's tensors by their diffusers names.
pub struct TransformerSource {
    checkpoint: Checkpoint,
    geometry: TransformerGeometry,
    /// Diffusers name to the file's name and the rows.
    table: HashMap<String, (String, Rows)>,
    /// Whether 8-bit weights have scales.
    scaled: bool,
}

impl TransformerSource {
    /// Opens the transformer and checks that every tensor of its geometry is there in the right shape.
    ///
    /// # Errors
    /// [`Error::Absent`] where files are missing, [`Error::Data`] listing missing or misshapen tensors.
    pub fn open(paths: &ModelPaths) -> Result<Self> {
        Self::open_parts(&paths.transformer, paths.transformer_config.as_deref())
    }

    /// As [`Self::open`], of a folder or file; without `config` the geometry is inferred from the shapes.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_parts(transformer: &Path, config: Option<&Path>) -> Result<Self> {
        // Without its configuration a folder is no transformer; a single file has none.
        if !transformer.exists() || (config.is_none() && transformer.is_dir()) {
            return Err(no_transformer(transformer));
        }
        let checkpoint = Checkpoint::open(transformer)?;
        let table = name_table(&checkpoint);
        let mut shapes = HashMap::new();
        for (name, (stored, rows)) in &table {
            let shape = checkpoint.place(stored)?.shape;
            shapes.insert(name.clone(), rows_of_shape(&shape, *rows).ok_or_else(|| odd_rows(&checkpoint, stored, &shape))?);
        }
        let geometry = match config {
            Some(config) => TransformerGeometry::from_config_file(config)?,
            None => infer_geometry(&shapes).map_err(|e| e.at(transformer))?,
        };
        check_complete(&geometry, &shapes).map_err(|e| e.at(transformer))?;
        let scaled = fp8::has_scales(&checkpoint);
        Ok(Self { checkpoint, geometry, table, scaled })
    }

    /// The transformer's geometry.
    #[must_use]
    pub fn geometry(&self) -> &TransformerGeometry {
        &self.geometry
    }

    /// The folder or file.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.checkpoint.root()
    }

    /// The files behind it, sorted.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        self.checkpoint.files()
    }

    /// Diffusers names of all tensors that the files hold, sorted.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.table.keys().cloned().collect();
        names.sort();
        names
    }

    /// Where the tensor of that diffusers name lies, checked to have `shape`.
    ///
    /// # Errors
    /// [`Error::Data`] if it is missing or of another shape.
    // One run is one range, not the numbers in it.
    #[allow(clippy::single_range_in_vec_init)]
    pub fn place(&self, name: &str, shape: &[usize]) -> Result<SourcePlace> {
        let (stored, rows) = self
            .table
            .get(name)
            .ok_or_else(|| Error::data(format!("the transformer has no tensor '{name}'")).at(self.checkpoint.root()))?;
        let place = self.checkpoint.place(stored)?;
        let found = rows_of_shape(&place.shape, *rows).ok_or_else(|| odd_rows(&self.checkpoint, stored, &place.shape))?;
        if found != shape {
            return Err(Error::data(format!("tensor '{name}' has another shape than the configuration gives it"))
                .at(&place.file)
                .offset(place.range.start)
                .expected(format!("{shape:?}"))
                .found(format!("{found:?}")));
        }
        // Thirds and halves of the rows are thirds and halves of the bytes: rows_of_shape checked that the rows divide.
        let (start, end) = (place.range.start, place.range.end);
        let runs = match rows {
            Rows::All => vec![start..end],
            Rows::Third(n) => {
                let third = (end - start) / 3;
                let first = start + third * u64::from(*n);
                vec![first..first + third]
            }
            Rows::SwappedHalves => {
                let middle = start + (end - start) / 2;
                vec![middle..end, start..middle]
            }
        };
        let scale = if fp8::is_fp8(place.dtype) { self.scale_of(stored, &place.shape, *rows)? } else { None };
        Ok(SourcePlace { file: place.file, dtype: place.dtype, runs, scale })
    }

    /// The factors of the 8-bit tensor `stored`, for `rows` of it.
    fn scale_of(&self, stored: &str, shape: &[usize], rows: Rows) -> Result<Option<Scale>> {
        // A vector is one row.
        let stored_rows = if shape.len() > 1 { shape.first().copied().unwrap_or(1) } else { 1 };
        let Some(scale) = fp8::scale_of(&self.checkpoint, stored, stored_rows, self.scaled)? else { return Ok(None) };
        Ok(Some(match (scale, rows) {
            (Scale::Rows(all), Rows::Third(n)) => {
                let third = all.len() / 3;
                Scale::Rows(all.into_iter().skip(third * usize::from(n)).take(third).collect())
            }
            (Scale::Rows(mut all), Rows::SwappedHalves) => {
                let half = all.len() / 2;
                all.rotate_left(half);
                Scale::Rows(all)
            }
            (scale, _) => scale,
        }))
    }

    /// The tensor of that diffusers name as float32 ([`SourcePlace::append_f32`]), checked to have `shape`.
    ///
    /// # Errors
    /// [`Error::Data`] if it is missing, of another shape or of another type.
    pub fn tensor_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let place = self.place(name, shape)?;
        let (stored, _) = self.table.get(name).ok_or_else(|| Error::invariant("a tensor vanished from the name table"))?;
        let tensor = self.checkpoint.tensor(stored)?;
        let origin = self.checkpoint.place(stored)?.range.start;
        let mut values = Vec::with_capacity(shape.iter().product());
        for run in &place.runs {
            let bytes = tensor
                .bytes()
                .get((run.start - origin) as usize..(run.end - origin) as usize)
                .ok_or_else(|| Error::invariant("a tensor's rows lie outside it").at(&place.file))?;
            place
                .append_f32(values.len(), shape.last().copied().unwrap_or(1), bytes, &mut values)
                .map_err(|e| e.at(&place.file).offset(run.start).found(format!("'{name}' of type {:?}", place.dtype)))?;
        }
        Ok(values)
    }
}

/// Appends little-endian `bytes` of `dtype` as float32 (exact).
///
/// # Errors
/// [`Error::Data`] for types other than F32, BF16, F16, F8_E4M3 and F8_E5M2.
fn append_f32(bytes: &[u8], dtype: Dtype, values: &mut Vec<f32>) -> Result<()> {
    match dtype {
        Dtype::F32 => values.extend(bytes.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c))),
        Dtype::BF16 => values.extend(bytes.as_chunks::<2>().0.iter().map(|c| half::bf16::from_le_bytes(*c).to_f32())),
        Dtype::F16 => values.extend(bytes.as_chunks::<2>().0.iter().map(|c| half::f16::from_le_bytes(*c).to_f32())),
        _ if fp8::is_fp8(dtype) => fp8::append(bytes, dtype, values),
        _ => return Err(Error::data("a tensor has an unsupported type").expected("F32, BF16, F16, F8_E4M3 or F8_E5M2")),
    }
    Ok(())
}

/// Diffusers name to stored name and rows. Both namings are recognised, behind any of the wrapper prefixes; unknown tensors (of a
/// file that holds a text encoder too, say) are left out.
fn name_table(checkpoint: &Checkpoint) -> HashMap<String, (String, Rows)> {
    let mut table = HashMap::new();
    for stored in checkpoint.names() {
        let bare = WRAPPER_PREFIXES.iter().find_map(|p| stored.strip_prefix(p)).unwrap_or(stored);
        if names::bfl_of(bare).is_some() {
            table.insert(bare.to_owned(), (stored.to_owned(), Rows::All));
            continue;
        }
        for (name, rows) in names::diffusers_of(bare) {
            table.entry(name).or_insert((stored.to_owned(), rows));
        }
    }
    table
}

/// The diffusers shape of `rows` of a stored tensor; `None` if its rows do not divide.
fn rows_of_shape(shape: &[usize], rows: Rows) -> Option<Vec<usize>> {
    let mut shape = shape.to_vec();
    let parts = match rows {
        Rows::All => return Some(shape),
        Rows::Third(_) => 3,
        Rows::SwappedHalves => 2,
    };
    let first = shape.first_mut().filter(|n| n.is_multiple_of(parts))?;
    if let Rows::Third(_) = rows {
        *first /= 3;
    }
    Some(shape)
}

fn odd_rows(checkpoint: &Checkpoint, stored: &str, shape: &[usize]) -> Error {
    Error::data(format!("tensor '{stored}' cannot be divided into the parts that its name promises"))
        .at(checkpoint.root())
        .found(format!("{shape:?}"))
}

fn check_complete(geometry: &TransformerGeometry, shapes: &HashMap<String, Vec<usize>>) -> Result<()> {
    let mut problems = Vec::new();
    for (name, expected) in geometry.all_tensors() {
        match shapes.get(&name) {
            None => problems.push(format!("'{name}' is missing")),
            Some(found) if *found != expected => problems.push(format!("'{name}' is {found:?}, expected {expected:?}")),
            Some(_) => {}
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    let mut text: String = problems.iter().take(LISTED_MAX).map(|p| format!("\n    - {p}")).collect();
    if problems.len() > LISTED_MAX {
        text.push_str(&format!("\n    - and {} more", problems.len() - LISTED_MAX));
    }
    Err(Error::data(format!("the transformer's tensors do not fit its configuration:{text}"))
        .advice("check that model.path is a FLUX.2 transformer, and download it again if it is"))
}

/// The geometry that the shapes imply. Head axes (four equal ones), rope base, epsilon follow the FLUX.2 family, which never varies them.
fn infer_geometry(shapes: &HashMap<String, Vec<usize>>) -> Result<TransformerGeometry> {
    let dims = |name: &str| -> Result<(usize, usize)> {
        match shapes.get(name).map(Vec::as_slice) {
            Some([out, inner]) => Ok((*out, *inner)),
            Some(other) => Err(Error::data(format!("tensor '{name}' is no matrix")).found(format!("{other:?}"))),
            None => Err(Error::data(format!("this is no FLUX.2 transformer: it has no '{name}' under either naming"))
                .advice("check model.path; a LoRA or a text encoder cannot be used here")),
        }
    };
    let count = |prefix: &str| {
        let index = |name: &String| name.strip_prefix(prefix)?.split('.').next()?.parse::<usize>().ok();
        shapes.keys().filter_map(index).max().map_or(0, |n| n + 1)
    };
    let (inner_dim, in_channels) = dims("x_embedder.weight")?;
    let (_, joint_attention_dim) = dims("context_embedder.weight")?;
    let (_, timestep_guidance_channels) = dims("time_guidance_embed.timestep_embedder.linear_1.weight")?;
    let (out_channels, _) = dims("proj_out.weight")?;
    let (num_layers, num_single_layers) = (count("transformer_blocks."), count("single_transformer_blocks."));
    let mlp = if num_layers > 0 {
        dims("transformer_blocks.0.ff.linear_out.weight")?.1
    } else {
        let (_, columns) = dims("single_transformer_blocks.0.attn.to_out.weight")?;
        columns.saturating_sub(inner_dim)
    };
    let first = if num_layers > 0 { "transformer_blocks.0" } else { "single_transformer_blocks.0" };
    let norm = format!("{first}.attn.norm_q.weight");
    let head_dim = match shapes.get(&norm).map(Vec::as_slice) {
        Some([n]) if *n > 0 && inner_dim.is_multiple_of(*n) => *n,
        other => {
            return Err(
                Error::data(format!("tensor '{norm}' does not give a head size that divides {inner_dim}")).found(format!("{other:?}"))
            );
        }
    };
    let geometry = TransformerGeometry {
        in_channels,
        out_channels: Some(out_channels).filter(|&n| n != in_channels),
        num_layers,
        num_single_layers,
        attention_head_dim: head_dim,
        num_attention_heads: inner_dim / head_dim,
        joint_attention_dim,
        timestep_guidance_channels,
        mlp_ratio: ratio(mlp, inner_dim),
        axes_dims_rope: vec![head_dim / 4; 4],
        rope_theta: 2000.0,
        eps: 1e-6,
        guidance_embeds: shapes.contains_key("time_guidance_embed.guidance_embedder.linear_1.weight"),
    };
    geometry.check()?;
    Ok(geometry)
}

/// The ratio whose product with `inner` truncates to `mlp`.
fn ratio(mlp: usize, inner: usize) -> f64 {
    let exact = mlp as f64 / inner as f64;
    if (inner as f64 * exact) as usize == mlp { exact } else { exact.next_up() }
}
