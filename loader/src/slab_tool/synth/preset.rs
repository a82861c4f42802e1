//! The shapes of the models that can be made.
//!
//! `eighth` and `tiny` are ours. `tiny` has the architecture of dev in every respect (both kinds of block, guidance embedding, sharded Mistral, VAE with attention and
//! batch norm) at a size that trains on a CPU in minutes.

use serenity_protocol::geometry::TransformerGeometry;

/// A model that can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Preset {
    /// A few hundred thousand parameters, for tests and the quick start
    #[value(name = "tiny")]
    Tiny,
    /// FLUX.2 (dev) at an eighth of its width, with all its blocks: half a billion parameters, for checks on a GPU
    #[value(name = "eighth")]
    Eighth,
    /// FLUX.2 (dev): 32.2 billion parameters
    #[value(name = "flux_2_dev")]
    Dev,
    /// FLUX.2 (klein) 4B
    #[value(name = "flux_2_klein_4b")]
    Klein4b,
    /// FLUX.2 (klein) 9B
    #[value(name = "flux_2_klein_9b")]
    Klein9b,
}

/// Shape of a Mistral 3 text encoder.
#[derive(Debug, Clone, Copy)]
pub struct TextShape {
    /// Vocabulary.
    pub vocab: usize,
    /// Hidden features.
    pub hidden: usize,
    /// Feed-forward features.
    pub intermediate: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
}

/// Shape of the VAE.
#[derive(Debug, Clone, Copy)]
pub struct VaeShape {
    /// Latent channels before patchifying.
    pub latent: usize,
    /// Channels of each resolution.
    pub channels: [usize; 4],
}

impl Preset {
    /// Name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Preset::Tiny => "tiny",
            Preset::Eighth => "eighth",
            Preset::Dev => "flux_2_dev",
            Preset::Klein4b => "flux_2_klein_4b",
            Preset::Klein9b => "flux_2_klein_9b",
        }
    }

    /// Geometry of the transformer (the table of the reference's `convert_flux2_to_diffusers.py`; tiny is ours).
    #[must_use]
    pub fn transformer(self) -> TransformerGeometry {
        // double blocks, single blocks, heads, head features, text features, guidance
        let (num_layers, num_single_layers, num_attention_heads, attention_head_dim, joint_attention_dim, guidance_embeds) = match self {
            Preset::Tiny => (2, 4, 4, 32, 192, true),
            Preset::Eighth => (8, 48, 6, 128, 1920, true),
            Preset::Dev => (8, 48, 48, 128, 15360, true),
            Preset::Klein4b => (5, 20, 24, 128, 7680, false),
            Preset::Klein9b => (8, 24, 32, 128, 12288, false),
        };
        TransformerGeometry {
            in_channels: 4 * self.vae().latent,
            out_channels: None,
            num_layers,
            num_single_layers,
            attention_head_dim,
            num_attention_heads,
            joint_attention_dim,
            timestep_guidance_channels: 256,
            mlp_ratio: 3.0,
            axes_dims_rope: vec![attention_head_dim / 4; 4],
            rope_theta: 2000.0,
            eps: 1e-6,
            guidance_embeds,
        }
    }

    /// Shape of the text encoder; klein's is another architecture (Qwen 3), which is not made.
    #[must_use]
    pub fn text(self) -> Option<TextShape> {
        match self {
            Preset::Tiny => Some(TextShape { vocab: 512, hidden: 64, intermediate: 128, layers: 8, heads: 4, kv_heads: 2, head_dim: 32 }),
            Preset::Eighth => {
                Some(TextShape { vocab: 512, hidden: 640, intermediate: 1280, layers: 8, heads: 8, kv_heads: 2, head_dim: 80 })
            }
            Preset::Dev => {
                Some(TextShape { vocab: 131_072, hidden: 5120, intermediate: 32_768, layers: 40, heads: 32, kv_heads: 8, head_dim: 128 })
            }
            Preset::Klein4b | Preset::Klein9b => None,
        }
    }

    /// Shape of the VAE.
    #[must_use]
    pub fn vae(self) -> VaeShape {
        match self {
            Preset::Tiny => VaeShape { latent: 8, channels: [32, 32, 32, 64] },
            Preset::Eighth => VaeShape { latent: 32, channels: [32, 32, 32, 64] },
            _ => VaeShape { latent: 32, channels: [128, 256, 512, 512] },
        }
    }
}
