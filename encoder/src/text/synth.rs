//! A text encoder with random weights in the Hugging Face shard layout: the true shapes without the weights, for benchmarks.
//!
//! Only the layers that embeddings need are written (30 of 40), and the embedding table. Values are uniform with the variance that keeps a
//! residual stream's size; several threads write a file each, so that 33 GB take as long as the storage lets them.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;
use serde_json::json;
use serenity_protocol::cache::text_model::TextGeometry;
use serenity_protocol::{Error, Result, atomic_file};

/// Values drawn once and repeated from another place in every tensor: random data as a multiplier sees it, at the speed of a copy.
const BANK: usize = 1 << 24;

/// Mistral 3 24B as FLUX.2 (dev) uses it: 30 layers.
#[must_use]
pub fn mistral() -> TextGeometry {
    TextGeometry {
        layers: 30,
        hidden: 5120,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        intermediate: 32_768,
        vocab: 131_072,
        rms_eps: 1e-5,
        rope_theta: 1e9,
    }
}

type Tensor = (String, Vec<usize>);

fn layer(g: &TextGeometry, index: usize) -> Vec<Tensor> {
    let (d, q, kv, m) = (g.hidden, g.heads * g.head_dim, g.kv_heads * g.head_dim, g.intermediate);
    let shapes = [
        ("self_attn.q_proj", vec![q, d]),
        ("self_attn.k_proj", vec![kv, d]),
        ("self_attn.v_proj", vec![kv, d]),
        ("self_attn.o_proj", vec![d, q]),
        ("mlp.gate_proj", vec![m, d]),
        ("mlp.up_proj", vec![m, d]),
        ("mlp.down_proj", vec![d, m]),
        ("input_layernorm", vec![d]),
        ("post_attention_layernorm", vec![d]),
    ];
    shapes.into_iter().map(|(name, shape)| (format!("language_model.model.layers.{index}.{name}.weight"), shape)).collect()
}

/// Writes the folder `output` for `g`.
///
/// # Errors
/// [`Error::TryAgain`] for a full disk; other failures of the file system.
pub fn write(output: &Path, g: &TextGeometry, seed: u64) -> Result<()> {
    std::fs::create_dir_all(output).map_err(|e| Error::io("cannot make the folder", output, e))?;
    let mut shards = vec![vec![("language_model.model.embed_tokens.weight".to_string(), vec![g.vocab, g.hidden])]];
    shards.extend((0..g.layers).map(|i| layer(g, i)));
    let name = |i: usize| format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
    let mut state = seed | 1;
    let bank: Vec<f32> = (0..BANK)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || -> Result<()> {
        loop {
            // Pairs with nothing: each number is taken once, the list does not change.
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(tensors) = shards.get(index) else { return Ok(()) };
            let path = output.join(name(index));
            shard(&path, tensors, &bank, index).map_err(|e| Error::io("cannot write the weights", &path, e))?;
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let ended = threads.into_iter().map(|t| t.join().map_err(|_| Error::invariant("a writing thread panicked")));
        ended.collect::<Vec<_>>().into_iter().try_for_each(|end| end?)
    })?;
    let map: serde_json::Map<String, serde_json::Value> =
        shards.iter().enumerate().flat_map(|(i, tensors)| tensors.iter().map(move |(n, _)| (n.clone(), json!(name(i))))).collect();
    let config = json!({
        "model_type": "mistral3",
        "text_config": {
            "model_type": "mistral", "num_hidden_layers": g.layers, "hidden_size": g.hidden, "num_attention_heads": g.heads,
            "num_key_value_heads": g.kv_heads, "head_dim": g.head_dim, "intermediate_size": g.intermediate, "vocab_size": g.vocab,
            "rms_norm_eps": g.rms_eps, "rope_theta": g.rope_theta, "hidden_act": "silu"
        }
    });
    for (file, value) in [("model.safetensors.index.json", json!({"metadata": {}, "weight_map": map})), ("config.json", config)] {
        atomic_file::write(&output.join(file), value.to_string().as_bytes())?;
    }
    Ok(())
}

fn shard(path: &Path, tensors: &[Tensor], bank: &[f32], number: usize) -> std::io::Result<()> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let mut text = serde_json::Value::Object(header).to_string();
    // The data begins at a multiple of 8.
    text.push_str(&" ".repeat((8 - text.len() % 8) % 8));
    let mut file = BufWriter::with_capacity(4 << 20, File::create(path)?);
    file.write_all(&(text.len() as u64).to_le_bytes())?;
    file.write_all(text.as_bytes())?;
    for (index, (name, shape)) in tensors.iter().enumerate() {
        let inner = shape.last().copied().unwrap_or(1);
        // Norm weights near one; matrices whose sums are as large as their inputs; embeddings of size one.
        let (centre, size) = match shape.len() {
            1 => (1.0, 0.1),
            _ if name.contains("embed") => (0.0, 1.7),
            _ => (0.0, 1.7 / (inner as f32).sqrt()),
        };
        let values: Vec<u8> = bank.iter().flat_map(|v| bf16::from_f32(centre + size * v).to_le_bytes()).collect();
        let mut left = 2 * shape.iter().product::<usize>();
        let mut from = (number * 1_000_003 + index * 7_919_002) * 2 % values.len();
        while left > 0 {
            let part = values.get(from..values.len().min(from + left)).unwrap_or_default();
            file.write_all(part)?;
            left -= part.len();
            from = 0;
        }
    }
    file.flush()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::text::AnyTextEncoder;
    use crate::tokenizer::Tokens;
    use candle_core::DType;
    use serenity_protocol::config::DeviceKind;

    #[test]
    fn what_is_written_encodes() {
        let folder = tempfile::tempdir().unwrap();
        let g = TextGeometry { layers: 3, hidden: 64, heads: 4, kv_heads: 2, head_dim: 16, intermediate: 96, vocab: 100, ..mistral() };
        write(folder.path(), &g, 3).unwrap();
        assert_eq!(TextGeometry::read(folder.path()).unwrap(), g);
        let encoder = AnyTextEncoder::open(folder.path(), DeviceKind::Cpu, None, None, None).unwrap();
        let tokens = [Tokens { ids: vec![1, 50, 99], cut: 0 }];
        let encoded = encoder.encode(&tokens, 11, [1, 2, 3], 8, DType::F32, &mut |_, _| Ok(())).unwrap();
        let values = encoded.captions[0].rows.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let size = (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt();
        assert!(values.len() == 3 * 192 && (0.3..5.0).contains(&size), "{size}");
    }
}
