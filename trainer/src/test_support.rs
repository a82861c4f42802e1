//! What several unit tests need: tiny geometries.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use serenity_protocol::geometry::TransformerGeometry;

/// Sizes of a tiny model.
pub struct Tiny {
    pub double: usize,
    pub single: usize,
    pub guidance: bool,
}

/// Two double blocks, one single block, guidance.
pub const TINY: Tiny = Tiny { double: 2, single: 1, guidance: true };

/// A geometry with two heads of 16.
pub fn tiny(sizes: &Tiny) -> TransformerGeometry {
    let geometry = TransformerGeometry {
        in_channels: 8,
        out_channels: None,
        num_layers: sizes.double,
        num_single_layers: sizes.single,
        attention_head_dim: 16,
        num_attention_heads: 2,
        joint_attention_dim: 12,
        timestep_guidance_channels: 32,
        mlp_ratio: 2.0,
        axes_dims_rope: vec![4, 4, 4, 4],
        rope_theta: 2000.0,
        eps: 1e-6,
        guidance_embeds: sizes.guidance,
    };
    geometry.check().unwrap();
    geometry
}
