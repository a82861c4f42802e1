//! Where a layer's weights are: three spellings of the names in a checkpoint, or a slab's INT8 rows; one reader.
//!
//! Of a slab the linears are INT8 rows with a scale each, and norms and embedding are the bf16 tensors of its companion. Rows are
//! dequantised as everywhere in the project ([`quant::dequantize`]: code times scale, rounded to bf16). Everything of a slab is compared with the
//! manifest's checksums when it is read, the embedding table (of which only rows are used) once, before its first row; what does not agree
//! is an error with file and offset. A checkpoint has no checksums.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;
use serenity_cuda::Ty;
use serenity_cuda::arena::ALIGNMENT;
use serenity_protocol::cache::text_model::TextGeometry;
use serenity_protocol::checkpoint::Checkpoint;
use serenity_protocol::checksum::xxh3_64;
use serenity_protocol::geometry::LinearSpec;
use serenity_protocol::slab::quant;
use serenity_protocol::slab::text_encoder::{EMBEDDING, PREFIXES, TextModel, TextSlab};
use serenity_protocol::{Error, Result};

use super::direct::DirectReader;
use super::stream::{Content, Part, Proof, convert, corrupt};
use crate::tensor::{stored_type, upload_as};

/// The weights of one layer, `[out, in]`.
pub(super) struct LayerWeights {
    pub query: Tensor,
    pub key: Tensor,
    pub value: Tensor,
    pub output: Tensor,
    pub gate: Tensor,
    pub up: Tensor,
    pub down: Tensor,
    pub attention_norm: Tensor,
    pub mlp_norm: Tensor,
}

/// How a tensor is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stored {
    /// Values of a float type, row-major.
    Floats {
        /// Their type.
        ty: DType,
        /// XXH3-64 of all of their bytes, where it is known: of a slab's companion.
        xxh3: Option<u64>,
    },
    /// INT8 rows of a slab.
    Rows(Int8Rows),
}

/// INT8 rows: value `[row, column]` is `codes[row, column] * scales[row]`, rounded to bf16.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Int8Rows {
    pub rows: usize,
    pub columns: usize,
    /// Codes in a stored row, at least `columns`; the surplus is zero.
    pub stored_columns: usize,
    /// Bytes of the scales in the same file: float32 `[rows]`.
    pub scales: Range<u64>,
    /// XXH3-64 of the codes' bytes and of the scales'.
    pub codes_xxh3: u64,
    pub scales_xxh3: u64,
}

/// A tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// The file.
    pub file: PathBuf,
    /// Bytes of its values, or of its codes.
    pub bytes: Range<u64>,
    /// What they are.
    pub stored: Stored,
}

/// A tensor of a layer: where it comes from, and where its values go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LayerPart {
    pub place: Place,
    /// Values, without padding.
    pub elements: usize,
    /// Place of the first value in the layer's memory, in bytes.
    pub to: usize,
}

/// Where a layer's tensors are in the files, and where they go in device memory: queries, keys and values under each other, gate and up too, so
/// that each is one matrix. Offsets in bytes.
pub(super) struct LayerPlaces {
    pub parts: Vec<LayerPart>,
    pub query: usize,
    pub output: usize,
    pub gate: usize,
    pub down: usize,
    pub attention_norm: usize,
    pub mlp_norm: usize,
    /// All of it.
    pub bytes: usize,
}

impl LayerPlaces {
    /// Bytes that are read for it.
    pub fn file_bytes(&self) -> u64 {
        let of = |range: &Range<u64>| range.end - range.start;
        let scales = |place: &Place| match &place.stored {
            Stored::Floats { .. } => 0,
            Stored::Rows(rows) => of(&rows.scales),
        };
        self.parts.iter().map(|p| of(&p.place.bytes) + scales(&p.place)).sum()
    }

    /// The parts of a layer that has no INT8 rows.
    pub fn float_parts(&self) -> Result<Vec<Part>> {
        let float = |part: &LayerPart| match &part.place.stored {
            Stored::Floats { ty, .. } => {
                let (file, start) = (part.place.file.clone(), part.place.bytes.start);
                Ok(Part { file, start, elements: part.elements, content: Content::Floats(*ty), proof: Proof::None, to: part.to })
            }
            Stored::Rows(_) => Err(Error::invariant("INT8 rows were taken for floats").at(&part.place.file)),
        };
        self.parts.iter().map(float).collect()
    }
}

/// The language model's tensors in a checkpoint, whichever way they are spelled, or in a slab.
pub(super) struct TextWeights {
    /// The checkpoint, or the slab's companion.
    floats: Checkpoint,
    /// Before every name in `floats`.
    prefix: &'static str,
    slab: Option<TextSlab>,
    geometry: TextGeometry,
    /// Set when the embedding table has been compared with its checksum.
    table_checked: OnceLock<()>,
}

/// Refuses bytes of a slab that are not those that were written.
fn check(bytes: &[u8], expected: u64, what: &str, file: &Path, offset: u64) -> Result<()> {
    let found = xxh3_64(bytes);
    if found == expected {
        return Ok(());
    }
    Err(corrupt(what, file, offset).expected(format!("{} bytes with XXH3 {expected:016x}", bytes.len())).found(format!("{found:016x}")))
}

impl TextWeights {
    /// Opens checkpoint or slab. Reads no weights but a slab's scales.
    ///
    /// # Errors
    /// [`Error::Data`] if a checkpoint's names are of no known spelling, or of Mistral's own (laid out for another rotary embedding); as
    /// [`TextGeometry::read`], [`Checkpoint::open`] and [`TextSlab::open_beside`].
    pub fn open(model: TextModel) -> Result<Self> {
        match model {
            TextModel::Checkpoint(path) => {
                let geometry = TextGeometry::read(path)?;
                Self::of_checkpoint(Checkpoint::open(path)?, geometry)
            }
            TextModel::Slab { slab, folder } => {
                let slab = TextSlab::open_beside(slab, folder)?;
                let (floats, geometry) = (Checkpoint::open(slab.companion())?, slab.shape().geometry.clone());
                Ok(Self { floats, prefix: "", slab: Some(slab), geometry, table_checked: OnceLock::new() })
            }
        }
    }

    fn of_checkpoint(checkpoint: Checkpoint, geometry: TextGeometry) -> Result<Self> {
        let native = checkpoint.names().any(|n| n.starts_with("layers.") && n.contains(".attention.wq."));
        if native {
            return Err(Error::data("the text encoder is in Mistral's own format (consolidated.safetensors)")
                .at(checkpoint.root())
                .cause("its query and key rows are laid out for another form of rotary embedding")
                .advice("use the Hugging Face files (model-*.safetensors with model.safetensors.index.json)"));
        }
        if let Some(scale) =
            checkpoint.names().find(|n| n.ends_with(".weight_scale") || n.ends_with(".scale_weight") || n.ends_with(".weight_scale_inv"))
        {
            return Err(Error::data("the text encoder is quantised")
                .at(checkpoint.root())
                .found(format!("tensor '{scale}'"))
                .advice("use the bf16 weights"));
        }
        let prefix = PREFIXES.into_iter().find(|p| checkpoint.contains(&format!("{p}layers.0.input_layernorm.weight")));
        let prefix = prefix.ok_or_else(|| {
            Error::data("the text encoder's tensors have no known names")
                .at(checkpoint.root())
                .expected(PREFIXES.map(|p| format!("{p}layers.0.input_layernorm.weight")).join(", or "))
                .found(checkpoint.names().take(3).collect::<Vec<_>>().join(", "))
        })?;
        Ok(Self { floats: checkpoint, prefix, slab: None, geometry, table_checked: OnceLock::new() })
    }

    /// The encoder's shape.
    pub fn geometry(&self) -> &TextGeometry {
        &self.geometry
    }

    /// The slab, if the linears come from one: page hashes, and the run of the file that a layer is.
    pub fn slab(&self) -> Option<&TextSlab> {
        self.slab.as_ref()
    }

    /// Refuses hidden states that need layers which a slab does not hold.
    ///
    /// # Errors
    /// [`Error::Config`] naming the state.
    pub fn check_states(&self, states: &[usize]) -> Result<()> {
        self.slab.as_ref().map_or(Ok(()), |slab| slab.check_states(states))
    }

    /// Where the tensor `layers.N.NAME` of that shape is: a linear of a slab where there is one, or else floats.
    fn place(&self, name: &str, shape: &[usize]) -> Result<Place> {
        match (&self.slab, shape) {
            (Some(slab), &[rows, columns]) => {
                let linear = LinearSpec { name: name.to_owned(), out_features: rows, in_features: columns };
                let linear = slab.slab().layer_for(&linear).map_err(|problem| Error::data(problem).at(slab.slab().path()))?;
                let (codes_xxh3, scales_xxh3) = slab.hashes(linear)?;
                let stored_columns = linear.padded_in;
                let rows = Int8Rows { rows, columns, stored_columns, scales: linear.scale.clone(), codes_xxh3, scales_xxh3 };
                Ok(Place { file: slab.slab().path().to_path_buf(), bytes: linear.qweight.clone(), stored: Stored::Rows(rows) })
            }
            _ => self.float_place(&format!("{name}.weight"), shape),
        }
    }

    /// Where floats are. Those of a companion are bf16 and have a checksum: without one it cannot be seen whether they are what was written.
    fn float_place(&self, name: &str, shape: &[usize]) -> Result<Place> {
        let stored_name = format!("{}{name}", self.prefix);
        self.floats.tensor_of_shape(&stored_name, shape)?;
        let place = self.floats.place(&stored_name)?;
        let ty = stored_type(place.dtype).map_err(|e| e.at(&place.file).found(format!("tensor '{stored_name}'")))?;
        let xxh3 = self.slab.as_ref().and_then(|slab| slab.companion_hash(name));
        if self.slab.is_some() && (xxh3.is_none() || ty != DType::BF16) {
            return Err(Error::data(format!("tensor '{name}' of the slab's companion is not what the builder writes"))
                .at(&place.file)
                .offset(place.range.start)
                .expected("BF16 with a checksum in the manifest")
                .found(format!("{:?}, checksum: {}", place.dtype, xxh3.is_some()))
                .advice("build the slab again"));
        }
        Ok(Place { file: place.file, bytes: place.range, stored: Stored::Floats { ty, xxh3 } })
    }

    /// Reads layer `index` and moves it to `device`.
    pub fn layer(&self, index: usize, reader: &mut DirectReader, device: &Device, dtype: DType) -> Result<LayerWeights> {
        let _span = tracing::trace_span!("read", layer = index).entered();
        let g = &self.geometry;
        let (d, queries, keys, m) = (g.hidden, g.heads * g.head_dim, g.kv_heads * g.head_dim, g.intermediate);
        let mut get = |name: &str, shape: &[usize]| {
            let name = format!("layers.{index}.{name}");
            let place = self.place(&name, shape)?;
            match &place.stored {
                Stored::Floats { ty, xxh3 } => {
                    let bytes = reader.read(&place.file, &place.bytes)?;
                    if let Some(expected) = xxh3 {
                        check(bytes, *expected, &format!("the values of '{name}'"), &place.file, place.bytes.start)?;
                    }
                    upload_as(bytes, *ty, shape, device, dtype)
                }
                Stored::Rows(rows) => {
                    let values = dequantised(reader, &name, &place, rows)?;
                    upload_as(bytemuck::cast_slice(&values), DType::BF16, shape, device, dtype)
                }
            }
        };
        Ok(LayerWeights {
            query: get("self_attn.q_proj", &[queries, d])?,
            key: get("self_attn.k_proj", &[keys, d])?,
            value: get("self_attn.v_proj", &[keys, d])?,
            output: get("self_attn.o_proj", &[d, queries])?,
            gate: get("mlp.gate_proj", &[m, d])?,
            up: get("mlp.up_proj", &[m, d])?,
            down: get("mlp.down_proj", &[d, m])?,
            attention_norm: get("input_layernorm", &[d])?,
            mlp_norm: get("post_attention_layernorm", &[d])?,
        })
    }

    /// The places of layer `index` for a device that computes in `ty`.
    pub fn places(&self, index: usize, ty: Ty) -> Result<LayerPlaces> {
        let g = &self.geometry;
        let (d, queries, keys, m) = (g.hidden, g.heads * g.head_dim, g.kv_heads * g.head_dim, g.intermediate);
        let (mut parts, mut end) = (Vec::new(), 0usize);
        let mut put = |names: &[(&str, usize)], cols: usize| -> Result<usize> {
            let start = end.next_multiple_of(ALIGNMENT);
            end = start;
            for (name, rows) in names {
                let shape: &[usize] = if *rows == 1 { &[cols] } else { &[*rows, cols] };
                let place = self.place(&format!("layers.{index}.{name}"), shape)?;
                parts.push(LayerPart { place, elements: rows * cols, to: end });
                end += rows * cols * ty.bytes();
            }
            Ok(start)
        };
        let query = put(&[("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)], d)?;
        let output = put(&[("self_attn.o_proj", d)], queries)?;
        let gate = put(&[("mlp.gate_proj", m), ("mlp.up_proj", m)], d)?;
        let down = put(&[("mlp.down_proj", d)], m)?;
        let attention_norm = put(&[("input_layernorm", 1)], d)?;
        let mlp_norm = put(&[("post_attention_layernorm", 1)], d)?;
        Ok(LayerPlaces { parts, query, output, gate, down, attention_norm, mlp_norm, bytes: end.next_multiple_of(ALIGNMENT) })
    }

    /// Writes the embeddings of `ids`, `[ids, hidden]`, to the front of `to`, as numbers of a device's type.
    pub fn embed_into(&self, ids: &[u32], ty: Ty, to: &mut [u8]) -> Result<()> {
        let table = self.table()?;
        let short = || Error::invariant("there is no room for embeddings");
        let to = to.get_mut(..ids.len() * self.geometry.hidden * ty.bytes()).ok_or_else(short)?;
        if matches!((table.ty, ty), (DType::BF16, Ty::Bf16) | (DType::F32, Ty::F32)) {
            return self.rows(&table, ids, to);
        }
        let mut rows = vec![0u8; ids.len() * self.geometry.hidden * table.ty.size_in_bytes()];
        self.rows(&table, ids, &mut rows)?;
        convert(&rows, table.ty, to, ty)
    }

    /// The embeddings of `ids`, `[ids, hidden]`: only these rows of the (large) table are read.
    pub fn embed(&self, ids: &[u32], device: &Device, dtype: DType) -> Result<Tensor> {
        let table = self.table()?;
        let mut rows = vec![0u8; ids.len() * self.geometry.hidden * table.ty.size_in_bytes()];
        self.rows(&table, ids, &mut rows)?;
        upload_as(&rows, table.ty, &[ids.len(), self.geometry.hidden], device, dtype).map_err(|e| e.at(self.floats.root()))
    }

    /// The embedding table, once it has been compared with its checksum if it has one.
    fn table(&self) -> Result<Table> {
        let g = &self.geometry;
        let place = self.float_place(EMBEDDING, &[g.vocab, g.hidden])?;
        let Stored::Floats { ty, xxh3 } = place.stored else { return Err(Error::invariant("an embedding table has codes")) };
        if let (Some(expected), None) = (xxh3, self.table_checked.get()) {
            let table = self.floats.tensor(&format!("{}{EMBEDDING}", self.prefix))?;
            check(table.bytes(), expected, "the embeddings", &place.file, place.bytes.start)?;
            self.table_checked.get_or_init(|| ());
        }
        let file = File::open(&place.file).map_err(|e| Error::io("cannot open the weight file", &place.file, e))?;
        Ok(Table { file, path: place.file, start: place.bytes.start, ty })
    }

    /// Reads rows of the table as they are stored.
    fn rows(&self, table: &Table, ids: &[u32], to: &mut [u8]) -> Result<()> {
        let row_bytes = self.geometry.hidden * table.ty.size_in_bytes();
        // Random places of a file: many threads wait for them at once, and reads need no memory map, which page-locking holds up.
        to.par_chunks_exact_mut(row_bytes).zip(ids).try_for_each(|(to, &id)| {
            if id as usize >= self.geometry.vocab {
                return Err(Error::data(
                    "a token id lies outside the text encoder's vocabulary: tokenizer and encoder do not belong together",
                )
                .at(self.floats.root())
                .expected(format!("ids below {}", self.geometry.vocab))
                .found(id));
            }
            let at = table.start + u64::from(id) * row_bytes as u64;
            table.file.read_exact_at(to, at).map_err(|e| Error::io("cannot read the embeddings", &table.path, e).offset(at))
        })
    }
}

/// The embedding table, `[vocab, hidden]`.
struct Table {
    file: File,
    path: PathBuf,
    start: u64,
    ty: DType,
}

/// The values of a slab's rows, `[rows, columns]`, after their bytes have been compared with the checksums.
fn dequantised(reader: &mut DirectReader, name: &str, place: &Place, rows: &Int8Rows) -> Result<Vec<bf16>> {
    let bytes = reader.read(&place.file, &rows.scales)?;
    check(bytes, rows.scales_xxh3, &format!("the scales of '{name}'"), &place.file, rows.scales.start)?;
    let scales: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let codes = reader.read(&place.file, &place.bytes)?;
    check(codes, rows.codes_xxh3, &format!("the codes of '{name}'"), &place.file, place.bytes.start)?;
    let mut values = vec![bf16::ZERO; rows.rows * rows.columns];
    let stored = bytemuck::cast_slice::<u8, i8>(codes).chunks_exact(rows.stored_columns.max(1));
    for ((codes, scale), values) in stored.zip(&scales).zip(values.chunks_exact_mut(rows.columns.max(1))) {
        quant::dequantize(codes, *scale, values);
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use serenity_loader::slab_tool::build::{BuildOptions, Component, build};
    use serenity_protocol::message::Role;
    use serenity_protocol::process::Process;

    #[test]
    fn a_slabs_places_are_a_checkpoints_with_rows_for_linears() {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/goldens/model");
        let folder = tempfile::tempdir().unwrap();
        let options = BuildOptions { component: Component::TextEncoder, ..BuildOptions::new(model, folder.path().join("text")) };
        let files = build(&options, &Process::detached(Role::Slab)).unwrap().files;
        let checkpoint = Path::new(model).join("text_encoder");
        let float = TextWeights::open(TextModel::Checkpoint(&checkpoint)).unwrap();
        let int8 = TextWeights::open(TextModel::Slab { slab: &files.slab, folder: Some(&checkpoint) }).unwrap();
        assert!(float.slab().is_none() && float.check_states(&[5]).is_ok());
        assert_eq!(int8.check_states(&[5]).unwrap_err().exit_code(), 64);
        for layer in 0..4 {
            let (a, b) = (float.places(layer, Ty::Bf16).unwrap(), int8.places(layer, Ty::Bf16).unwrap());
            let of = |p: &LayerPlaces| [p.query, p.output, p.gate, p.down, p.attention_norm, p.mlp_norm, p.bytes];
            assert_eq!(of(&a), of(&b));
            let slab = int8.slab().unwrap();
            let (linears, run) = (slab.layer(layer).unwrap(), slab.layer_bytes(layer).unwrap());
            assert_eq!((a.parts.len(), b.parts.len(), linears.len()), (9, 9, 7));
            for (index, (a, b)) in a.parts.iter().zip(&b.parts).enumerate() {
                assert_eq!((a.elements, a.to), (b.elements, b.to));
                let Some(linear) = linears.get(index) else {
                    assert!(matches!(b.place.stored, Stored::Floats { ty: DType::BF16, xxh3: Some(_) }));
                    continue;
                };
                let Stored::Rows(rows) = &b.place.stored else { panic!("{b:?}") };
                assert_eq!((rows.rows, rows.columns, rows.stored_columns), (linear.out_features, linear.in_features, linear.padded_in));
                assert_eq!((&b.place.bytes, &rows.scales), (&linear.qweight, &linear.scale));
                assert!(run.start <= b.place.bytes.start && rows.scales.end <= run.end);
            }
            assert_eq!((a.float_parts().unwrap().len(), b.float_parts().err().unwrap().exit_code()), (9, 70));
        }
        assert!(int8.places(4, Ty::F32).is_err());
    }
}
