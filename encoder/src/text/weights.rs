//! Where a layer's weights are: three spellings of the names, one reader.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use safetensors::Dtype;
use serenity_cuda::Ty;
use serenity_cuda::arena::ALIGNMENT;
use serenity_protocol::cache::text_model::TextGeometry;
use serenity_protocol::checkpoint::Checkpoint;
use serenity_protocol::{Error, Result};

use super::direct::DirectReader;
use super::stream::{Part, convert};
use crate::tensor::{stored_type, upload_as};

/// Prefixes of the language model's tensors (`spec/flux2.md` 2.5): older multimodal, newer multimodal, text only.
const PREFIXES: [&str; 3] = ["language_model.model.", "model.language_model.", "model."];

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

/// Where a layer's tensors are in the files, and where they go in device memory: queries, keys and values under each other, gate and up too, so
/// that each is one matrix. Offsets in bytes.
pub(super) struct LayerPlaces {
    pub parts: Vec<Part>,
    pub query: usize,
    pub output: usize,
    pub gate: usize,
    pub down: usize,
    pub attention_norm: usize,
    pub mlp_norm: usize,
    /// All of it.
    pub bytes: usize,
}

/// The language model's tensors in a checkpoint, whichever way they are spelled.
pub(super) struct TextWeights {
    checkpoint: Checkpoint,
    prefix: &'static str,
    geometry: TextGeometry,
}

impl TextWeights {
    /// # Errors
    /// [`Error::Data`] if the names are of no known spelling, or of Mistral's own (laid out for another rotary embedding).
    pub fn new(checkpoint: Checkpoint, geometry: TextGeometry) -> Result<Self> {
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
        Ok(Self { checkpoint, prefix, geometry })
    }

    /// Reads layer `index` and moves it to `device`.
    pub fn layer(&self, index: usize, reader: &mut DirectReader, device: &Device, dtype: DType) -> Result<LayerWeights> {
        let _span = tracing::trace_span!("read", layer = index).entered();
        let g = &self.geometry;
        let (d, queries, keys, m) = (g.hidden, g.heads * g.head_dim, g.kv_heads * g.head_dim, g.intermediate);
        let mut get = |name: &str, shape: &[usize]| {
            let name = format!("{}layers.{index}.{name}.weight", self.prefix);
            self.checkpoint.tensor_of_shape(&name, shape)?;
            let place = self.checkpoint.place(&name)?;
            let stored = stored_type(place.dtype).map_err(|e| e.at(&place.file).found(format!("tensor '{name}'")))?;
            upload_as(reader.read(&place.file, &place.range)?, stored, shape, device, dtype)
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
                let name = format!("{}layers.{index}.{name}.weight", self.prefix);
                let shape: &[usize] = if *rows == 1 { &[cols] } else { &[*rows, cols] };
                self.checkpoint.tensor_of_shape(&name, shape)?;
                let place = self.checkpoint.place(&name)?;
                let stored = stored_type(place.dtype).map_err(|e| e.at(&place.file).found(format!("tensor '{name}'")))?;
                parts.push(Part { file: place.file, start: place.range.start, elements: rows * cols, stored, to: end });
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

    /// The embeddings of `ids`, `[ids, hidden]`, as bytes of a device's type.
    pub fn embedded(&self, ids: &[u32], ty: Ty) -> Result<Vec<u8>> {
        let (rows, stored) = self.embedding_rows(ids)?;
        if matches!((stored, ty), (Dtype::BF16, Ty::Bf16) | (Dtype::F32, Ty::F32)) {
            return Ok(rows);
        }
        let stored = stored_type(stored).map_err(|e| e.at(self.checkpoint.root()))?;
        let mut converted = vec![0u8; rows.len() / stored.size_in_bytes() * ty.bytes()];
        convert(&rows, stored, &mut converted, ty)?;
        Ok(converted)
    }

    /// The embeddings of `ids`, `[ids, hidden]`: only these rows of the (large) table are read.
    pub fn embed(&self, ids: &[u32], device: &Device, dtype: DType) -> Result<Tensor> {
        let (bytes, stored) = self.embedding_rows(ids)?;
        let stored = stored_type(stored).map_err(|e| e.at(self.checkpoint.root()))?;
        upload_as(&bytes, stored, &[ids.len(), self.geometry.hidden], device, dtype).map_err(|e| e.at(self.checkpoint.root()))
    }

    /// Rows of the embedding table as they are stored.
    fn embedding_rows(&self, ids: &[u32]) -> Result<(Vec<u8>, Dtype)> {
        let g = &self.geometry;
        let table = self.checkpoint.tensor_of_shape(&format!("{}embed_tokens.weight", self.prefix), &[g.vocab, g.hidden])?;
        let element_bytes = if table.dtype == Dtype::F32 { 4 } else { 2 };
        let row_bytes = g.hidden * element_bytes;
        let mut bytes = vec![0u8; ids.len() * row_bytes];
        // Random places of a file: many threads wait for them at once.
        bytes.par_chunks_exact_mut(row_bytes).zip(ids).try_for_each(|(to, &id)| {
            let start = id as usize * row_bytes;
            let row = table.bytes().get(start..start + row_bytes).ok_or_else(|| {
                Error::data("a token id lies outside the text encoder's vocabulary: tokenizer and encoder do not belong together")
                    .at(self.checkpoint.root())
                    .expected(format!("ids below {}", g.vocab))
                    .found(id)
            })?;
            to.copy_from_slice(row);
            Ok::<_, Error>(())
        })?;
        Ok((bytes, table.dtype))
    }
}
