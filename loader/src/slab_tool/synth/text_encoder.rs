//! Random weights of the text encoder: Mistral 3 with the least vision tower that the reference classes accept.
//!
//! Embeddings have size 1 and every layer adds a little, so that the hidden states that the transformer reads have a size of about 1 and
//! still depend on all tokens before.

use safetensors::Dtype;
use serde_json::{Value, json};

use super::component::Spec;
use super::preset::TextShape;

/// Spread of the norm weights around 1.
const NORM_STD: f64 = 0.1;
/// Gain of the projections that write into the residual stream.
const RESIDUAL_GAIN: f64 = 0.7;
/// Features, patch size and merge factor of the vision tower that nothing here ever runs.
const VISION: (usize, usize, usize) = (32, 16, 2);

/// The tensors of the text encoder, bfloat16, names as `Mistral3ForConditionalGeneration` saves them.
#[must_use]
pub fn specs(shape: &TextShape) -> Vec<Spec> {
    let weight = |name: String, out: usize, inner: usize, gain| Spec::weight(name, vec![out, inner], Dtype::BF16, gain);
    let norm = |name: String, length| Spec::vector(name, length, Dtype::BF16, 1.0, NORM_STD);
    let (h, q, kv) = (shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let root = "language_model.model";
    let mut all = vec![Spec {
        fill: super::component::Fill::Normal { mean: 0.0, std: 1.0 },
        ..weight(format!("{root}.embed_tokens.weight"), shape.vocab, h, 1.0)
    }];
    for layer in 0..shape.layers {
        let p = format!("{root}.layers.{layer}");
        all.push(norm(format!("{p}.input_layernorm.weight"), h));
        all.push(weight(format!("{p}.self_attn.q_proj.weight"), q, h, 1.0));
        all.push(weight(format!("{p}.self_attn.k_proj.weight"), kv, h, 1.0));
        all.push(weight(format!("{p}.self_attn.v_proj.weight"), kv, h, 1.0));
        all.push(weight(format!("{p}.self_attn.o_proj.weight"), h, q, RESIDUAL_GAIN));
        all.push(norm(format!("{p}.post_attention_layernorm.weight"), h));
        all.push(weight(format!("{p}.mlp.gate_proj.weight"), shape.intermediate, h, 1.0));
        all.push(weight(format!("{p}.mlp.up_proj.weight"), shape.intermediate, h, 1.0));
        all.push(weight(format!("{p}.mlp.down_proj.weight"), h, shape.intermediate, RESIDUAL_GAIN));
    }
    all.push(norm(format!("{root}.norm.weight"), h));
    all.extend(vision(h));
    all
}

/// One layer of Pixtral and the projector.
fn vision(hidden: usize) -> Vec<Spec> {
    let (v, patch, merge) = VISION;
    let weight = |name: &str, shape: Vec<usize>| Spec::weight(name, shape, Dtype::BF16, 1.0);
    let norm = |name: &str| Spec::vector(name, v, Dtype::BF16, 1.0, NORM_STD);
    let mut all = vec![
        weight("multi_modal_projector.linear_1.weight", vec![hidden, v]),
        weight("multi_modal_projector.linear_2.weight", vec![hidden, hidden]),
        norm("multi_modal_projector.norm.weight"),
        weight("multi_modal_projector.patch_merger.merging_layer.weight", vec![v, v * merge * merge]),
        norm("vision_tower.ln_pre.weight"),
        weight("vision_tower.patch_conv.weight", vec![v, 3, patch, patch]),
    ];
    let p = "vision_tower.transformer.layers.0";
    for name in [
        "attention.k_proj",
        "attention.o_proj",
        "attention.q_proj",
        "attention.v_proj",
        "feed_forward.down_proj",
        "feed_forward.gate_proj",
        "feed_forward.up_proj",
    ] {
        all.push(weight(&format!("{p}.{name}.weight"), vec![v, v]));
    }
    for name in ["attention_norm", "ffn_norm"] {
        all.push(norm(&format!("{p}.{name}.weight")));
    }
    all
}

/// `text_encoder/config.json`.
#[must_use]
pub fn config(shape: &TextShape) -> Value {
    let (v, patch, merge) = VISION;
    json!({
        "architectures": ["Mistral3ForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": false,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": merge,
        "text_config": {
            "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": shape.head_dim, "hidden_act": "silu",
            "hidden_size": shape.hidden, "initializer_range": 0.02, "intermediate_size": shape.intermediate,
            "max_position_embeddings": 131_072, "model_type": "mistral", "num_attention_heads": shape.heads,
            "num_hidden_layers": shape.layers, "num_key_value_heads": shape.kv_heads, "pad_token_id": null, "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 1e9, "rope_type": "default"}, "sliding_window": null, "tie_word_embeddings": false,
            "use_cache": true, "vocab_size": shape.vocab
        },
        "tie_word_embeddings": true,
        "transformers_version": super::TRANSFORMERS_VERSION,
        "vision_config": {
            "attention_dropout": 0.0, "head_dim": v / 2, "hidden_act": "gelu", "hidden_size": v, "image_size": 2 * patch,
            "initializer_range": 0.02, "intermediate_size": v, "model_type": "pixtral", "num_attention_heads": 2, "num_channels": 3,
            "num_hidden_layers": 1, "patch_size": patch, "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "axial"}
        },
        "vision_feature_layer": -1
    })
}
