//! Random weights of the transformer, scaled so that every activation and the output have a size of about 1.
//!
//! All linears keep the size of their inputs (gain 1). That suffices: attention and feed-forward read layer-normalised inputs, queries and
//! keys are normalised again, the modulation comes from two SiLUs (size about 0.5), and the output is a gain-1 projection of a
//! normalised stream. A prediction of size 1 that knows nothing of its target leaves an adapter something to learn.

use safetensors::Dtype;
use serde_json::{Value, json};
use serenity_protocol::geometry::TransformerGeometry;

use super::component::Spec;

/// Spread of the norm weights around 1: the default of exactly 1 hides mistakes.
const NORM_STD: f64 = 0.1;
/// The sinusoids have a mean square of one half.
const TIME_GAIN: f64 = std::f64::consts::SQRT_2;

/// The tensors of the transformer, bfloat16.
#[must_use]
pub fn specs(geometry: &TransformerGeometry) -> Vec<Spec> {
    let tensor = |(name, shape): (String, Vec<usize>)| match shape.as_slice() {
        [length] => Spec::vector(name, *length, Dtype::BF16, 1.0, NORM_STD),
        _ => {
            let gain = gain(&name);
            Spec::weight(name, shape, Dtype::BF16, gain)
        }
    };
    geometry.all_tensors().into_iter().map(tensor).collect()
}

/// Gain of a linear, by its name.
#[must_use]
pub fn gain(name: &str) -> f64 {
    if name.contains("embedder.linear_1") { TIME_GAIN } else { 1.0 }
}

/// `transformer/config.json`.
#[must_use]
pub fn config(geometry: &TransformerGeometry) -> Value {
    json!({
        "_class_name": "Flux2Transformer2DModel",
        "_diffusers_version": super::DIFFUSERS_VERSION,
        "attention_head_dim": geometry.attention_head_dim,
        "axes_dims_rope": geometry.axes_dims_rope,
        "eps": geometry.eps,
        "guidance_embeds": geometry.guidance_embeds,
        "in_channels": geometry.in_channels,
        "joint_attention_dim": geometry.joint_attention_dim,
        "mlp_ratio": geometry.mlp_ratio,
        "num_attention_heads": geometry.num_attention_heads,
        "num_layers": geometry.num_layers,
        "num_single_layers": geometry.num_single_layers,
        "out_channels": geometry.out_channels,
        "patch_size": 1,
        "rope_theta": geometry.rope_theta as u64,
        "timestep_guidance_channels": geometry.timestep_guidance_channels,
    })
}
