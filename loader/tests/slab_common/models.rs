//! Small checkpoints of any geometry, written by the reference crate.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use serenity_protocol::geometry::TransformerGeometry;
use serenity_protocol::names::{self, Rows};

/// Numbers without pattern, the same in every run.
pub fn scattered(i: u64, below: u64) -> u64 {
    let mut z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678;
    z = (z ^ (z >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (z ^ (z >> 29)) % below
}

/// A geometry by the few numbers that tests vary: (double blocks, single blocks, heads, head size, latent channels, text features).
pub fn geometry(double: usize, single: usize, heads: usize, head_dim: usize, channels: usize, text: usize) -> TransformerGeometry {
    serde_json::from_value(config(double, single, heads, head_dim, channels, text)).unwrap()
}

fn config(double: usize, single: usize, heads: usize, head_dim: usize, channels: usize, text: usize) -> Value {
    json!({
        "in_channels": channels, "num_layers": double, "num_single_layers": single, "attention_head_dim": head_dim,
        "num_attention_heads": heads, "joint_attention_dim": text, "axes_dims_rope": vec![head_dim / 4; 4], "guidance_embeds": false,
    })
}

/// A tensor as a file holds it.
#[derive(Clone)]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

pub type Tensors = BTreeMap<String, Stored>;

pub fn write_file(path: &Path, tensors: &Tensors) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let views = tensors.iter().map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// Writes a transformer's folder in the Hugging Face layout.
pub fn write_folder(folder: &Path, g: &TransformerGeometry, tensors: &Tensors) -> PathBuf {
    write_file(&folder.join("diffusion_pytorch_model.safetensors"), tensors);
    let config =
        config(g.num_layers, g.num_single_layers, g.num_attention_heads, g.attention_head_dim, g.in_channels, g.joint_attention_dim);
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    folder.to_path_buf()
}

/// Every tensor of the geometry with its diffusers name and shape, made by `make` from (name, shape).
pub fn tensors(g: &TransformerGeometry, mut make: impl FnMut(&str, &[usize]) -> Stored) -> Tensors {
    g.all_tensors().into_iter().map(|(name, shape)| (name.clone(), make(&name, &shape))).collect()
}

/// bfloat16 values without pattern.
pub fn random_bf16(g: &TransformerGeometry) -> Tensors {
    let mut seed = 0;
    tensors(g, |_, shape| {
        let count: usize = shape.iter().product();
        seed += 1;
        // Sign and mantissa at random, magnitudes from 2^-8 to 2^-3.
        let bytes = (0..count as u64)
            .flat_map(|i| {
                let z = scattered(i + (seed << 32), 1 << 24) as u16;
                ((z & 0x807f) | ((119 + (z >> 8) % 5) << 7)).to_le_bytes()
            })
            .collect();
        Stored { dtype: Dtype::BF16, shape: shape.to_vec(), bytes }
    })
}

/// The same transformer under the single-file names: q, k, v fused, the halves of the last modulation exchanged. Works on any type of
/// matrix; `rename` gives the stored name to the tensor `name` that belongs to a weight (`X.weight_scale`).
pub fn to_bfl(tensors: &Tensors) -> Tensors {
    let mut out = Tensors::new();
    let mut thirds: BTreeMap<String, BTreeMap<u8, Stored>> = BTreeMap::new();
    for (name, tensor) in tensors {
        // A scale follows its weight: same rows, one number each or one for all.
        let (weight, ending) = match name.rsplit_once('.') {
            Some((module, ending)) if ending != "weight" => (format!("{module}.weight"), Some(ending)),
            _ => (name.clone(), None),
        };
        let (bfl, rows) = names::bfl_of(&weight).unwrap();
        let stored = ending.map_or(bfl.clone(), |e| format!("{}.{e}", bfl.strip_suffix(".weight").unwrap()));
        let per_row = tensor.shape.first().is_some_and(|&n| n > 1);
        match rows {
            Rows::Third(n) => drop(thirds.entry(stored).or_default().insert(n, tensor.clone())),
            Rows::SwappedHalves if per_row => {
                let (a, b) = tensor.bytes.split_at(tensor.bytes.len() / 2);
                out.insert(stored, Stored { bytes: [b, a].concat(), ..tensor.clone() });
            }
            _ => drop(out.insert(stored, tensor.clone())),
        }
    }
    for (stored, parts) in thirds {
        let first = parts[&0].clone();
        let per_row = first.shape.first().is_some_and(|&n| n > 1);
        let fused = if per_row {
            let shape = std::iter::once(3 * first.shape[0]).chain(first.shape[1..].iter().copied()).collect();
            Stored { dtype: first.dtype, shape, bytes: parts.into_values().flat_map(|p| p.bytes).collect() }
        } else {
            first
        };
        out.insert(stored, fused);
    }
    out
}
