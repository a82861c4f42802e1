//! The shape of a FLUX.2 transformer, and the blocks and linears that follow from it.
//!
//! Field names are those of diffusers' `transformer/config.json` (`spec` of the reference: `transformer_flux2.py`). Everything that
//! loader, trainer and slab tool must agree on about a block (which linears, in which order, of which shape) is derived here and
//! nowhere else. No linear of FLUX.2 has a bias.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Linears outside the blocks that the few rows of a micro-batch's conditioning go through once, in the order in which they leave a device that is
/// short of memory: first the [`EMBEDDERS`], which are a tenth of them.
pub const CONDITIONING: [&str; 8] = [
    "time_guidance_embed.timestep_embedder.linear_1",
    "time_guidance_embed.timestep_embedder.linear_2",
    "time_guidance_embed.guidance_embedder.linear_1",
    "time_guidance_embed.guidance_embedder.linear_2",
    "norm_out.linear",
    "single_stream_modulation.linear",
    "double_stream_modulation_txt.linear",
    "double_stream_modulation_img.linear",
];
/// How many of [`CONDITIONING`], from the first on, embed time and guidance.
pub const EMBEDDERS: usize = 4;

/// Geometry of the transformer, as in `transformer/config.json`. Shapes are `[out, in]` throughout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransformerGeometry {
    /// Channels of an image token, `4 * latent_channels` of the VAE.
    pub in_channels: usize,
    /// Output channels; `null` means `in_channels`.
    #[serde(default)]
    pub out_channels: Option<usize>,
    /// Double-stream blocks.
    pub num_layers: usize,
    /// Single-stream blocks.
    pub num_single_layers: usize,
    /// Features of one attention head.
    pub attention_head_dim: usize,
    /// Attention heads; the inner dimension is `heads * head_dim`.
    pub num_attention_heads: usize,
    /// Features of a text token, three hidden states of the text encoder side by side.
    pub joint_attention_dim: usize,
    /// Features of the sinusoidal time and guidance embedding.
    #[serde(default = "default_timestep_channels")]
    pub timestep_guidance_channels: usize,
    /// Feed-forward width over the inner dimension.
    #[serde(default = "default_mlp_ratio")]
    pub mlp_ratio: f64,
    /// Head features owned by each of the four position axes (t, h, w, l).
    pub axes_dims_rope: Vec<usize>,
    /// Base of the rotary frequencies.
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f64,
    /// Epsilon of every norm.
    #[serde(default = "default_eps")]
    pub eps: f64,
    /// Whether the model embeds a guidance scale (dev yes, klein no).
    #[serde(default = "default_true")]
    pub guidance_embeds: bool,
}

fn default_timestep_channels() -> usize {
    256
}
fn default_mlp_ratio() -> f64 {
    3.0
}
fn default_rope_theta() -> f64 {
    2000.0
}
fn default_eps() -> f64 {
    1e-6
}
fn default_true() -> bool {
    true
}

/// Position of a block in execution order: double blocks first, then single blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u16);

/// Which of the two kinds a block is, with its index among its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockKind {
    /// `transformer_blocks.N`
    Double(usize),
    /// `single_transformer_blocks.N`
    Single(usize),
}

/// A linear layer: its name in diffusers' terms without `.weight`, and its weight's shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearSpec {
    /// Full name, e.g. `transformer_blocks.0.attn.to_q`.
    pub name: String,
    /// Output features (rows).
    pub out_features: usize,
    /// Input features (columns).
    pub in_features: usize,
}

impl TransformerGeometry {
    /// Reads `config.json` of a transformer folder.
    ///
    /// # Errors
    /// [`Error::Absent`] if the file cannot be read, [`Error::Data`] if it is no FLUX.2 transformer configuration.
    pub fn from_config_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("cannot read the transformer's configuration", path, e))?;
        let geometry: Self = serde_json::from_str(&text)
            .map_err(|e| Error::data("the transformer's configuration is not that of a FLUX.2 transformer").at(path).cause(e))?;
        geometry.check().map_err(|e| e.at(path))?;
        Ok(geometry)
    }

    /// Checks that the fields fit together (positive, heads * dim = axes, at most 65,535 blocks).
    ///
    /// # Errors
    /// [`Error::Data`] naming the fields that do not.
    pub fn check(&self) -> Result<()> {
        let bad = |what: String| Err(Error::data(what));
        if self.axes_dims_rope.len() != 4
            || self.axes_dims_rope.iter().try_fold(0usize, |sum, &d| sum.checked_add(d)) != Some(self.attention_head_dim)
            || self.axes_dims_rope.iter().any(|d| d % 2 != 0)
        {
            return bad(format!(
                "axes_dims_rope {:?} must be four even numbers that add up to attention_head_dim {}",
                self.axes_dims_rope, self.attention_head_dim
            ));
        }
        let blocks = self.num_layers.checked_add(self.num_single_layers);
        if blocks.is_none_or(|n| n == 0 || n > usize::from(u16::MAX)) {
            return bad(format!("num_layers {} + num_single_layers {} must be 1 to 65535", self.num_layers, self.num_single_layers));
        }
        for (name, value, max) in [
            ("in_channels", self.in_channels, 1 << 16),
            ("num_attention_heads", self.num_attention_heads, 1 << 12),
            ("attention_head_dim", self.attention_head_dim, 1 << 12),
            ("out_channels", self.out_channels(), 1 << 16),
            ("joint_attention_dim", self.joint_attention_dim, 1 << 20),
            ("timestep_guidance_channels", self.timestep_guidance_channels, 1 << 16),
        ] {
            if value == 0 || value > max {
                return bad(format!("{name} is {value}, expected 1 to {max}"));
            }
        }
        let usable = self.mlp_ratio > 0.0 && self.mlp_ratio <= 64.0 && self.rope_theta > 1.0 && self.eps > 0.0;
        // Written so that NaN is unusable.
        if !usable {
            return bad(format!("mlp_ratio {}, rope_theta {} and eps {} must be positive", self.mlp_ratio, self.rope_theta, self.eps));
        }
        Ok(())
    }

    /// Inner dimension D.
    #[must_use]
    pub fn inner_dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Feed-forward width M, `int(D * mlp_ratio)`.
    #[must_use]
    pub fn mlp_dim(&self) -> usize {
        (self.inner_dim() as f64 * self.mlp_ratio) as usize
    }

    /// Output channels per image token.
    #[must_use]
    pub fn out_channels(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    /// Number of blocks of both kinds.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.num_layers + self.num_single_layers
    }

    /// All blocks in execution order.
    pub fn blocks(&self) -> impl DoubleEndedIterator<Item = BlockId> + use<> {
        (0..self.num_blocks() as u16).map(BlockId)
    }

    /// The kind of `block` and its index among its kind.
    #[must_use]
    pub fn kind(&self, block: BlockId) -> BlockKind {
        let i = usize::from(block.0);
        if i < self.num_layers { BlockKind::Double(i) } else { BlockKind::Single(i - self.num_layers) }
    }

    /// Name prefix of a block without the trailing dot, e.g. `single_transformer_blocks.3`.
    #[must_use]
    pub fn block_prefix(&self, block: BlockId) -> String {
        match self.kind(block) {
            BlockKind::Double(i) => format!("transformer_blocks.{i}"),
            BlockKind::Single(i) => format!("single_transformer_blocks.{i}"),
        }
    }

    /// The linears of a block in payload order: 12 of a double block, 2 of a single block.
    #[must_use]
    pub fn block_linears(&self, block: BlockId) -> Vec<LinearSpec> {
        let (d, m) = (self.inner_dim(), self.mlp_dim());
        let prefix = self.block_prefix(block);
        let parts: Vec<(&str, usize, usize)> = match self.kind(block) {
            BlockKind::Double(_) => vec![
                ("attn.to_q", d, d),
                ("attn.to_k", d, d),
                ("attn.to_v", d, d),
                ("attn.add_q_proj", d, d),
                ("attn.add_k_proj", d, d),
                ("attn.add_v_proj", d, d),
                ("attn.to_out.0", d, d),
                ("attn.to_add_out", d, d),
                ("ff.linear_in", 2 * m, d),
                ("ff.linear_out", d, m),
                ("ff_context.linear_in", 2 * m, d),
                ("ff_context.linear_out", d, m),
            ],
            BlockKind::Single(_) => vec![("attn.to_qkv_mlp_proj", 3 * d + 2 * m, d), ("attn.to_out", d, d + m)],
        };
        parts
            .into_iter()
            .map(|(name, out_features, in_features)| LinearSpec { name: format!("{prefix}.{name}"), out_features, in_features })
            .collect()
    }

    /// The norm weights of a block, names without prefix and without `.weight`; each has `attention_head_dim` values.
    #[must_use]
    pub fn block_norms(&self, block: BlockId) -> &'static [&'static str] {
        match self.kind(block) {
            BlockKind::Double(_) => &["attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"],
            BlockKind::Single(_) => &["attn.norm_q", "attn.norm_k"],
        }
    }

    /// The linears outside the blocks (11 for dev, 9 without guidance embedding).
    #[must_use]
    pub fn other_linears(&self) -> Vec<LinearSpec> {
        let (d, t) = (self.inner_dim(), self.timestep_guidance_channels);
        let mut parts = vec![
            ("x_embedder", d, self.in_channels),
            ("context_embedder", d, self.joint_attention_dim),
            ("time_guidance_embed.timestep_embedder.linear_1", d, t),
            ("time_guidance_embed.timestep_embedder.linear_2", d, d),
            ("double_stream_modulation_img.linear", 6 * d, d),
            ("double_stream_modulation_txt.linear", 6 * d, d),
            ("single_stream_modulation.linear", 3 * d, d),
            ("norm_out.linear", 2 * d, d),
            ("proj_out", self.out_channels(), d),
        ];
        if self.guidance_embeds {
            parts.push(("time_guidance_embed.guidance_embedder.linear_1", d, t));
            parts.push(("time_guidance_embed.guidance_embedder.linear_2", d, d));
        }
        parts
            .into_iter()
            .map(|(name, out_features, in_features)| LinearSpec { name: name.to_string(), out_features, in_features })
            .collect()
    }

    /// Every linear of the model: `other_linears`, then those of each block.
    #[must_use]
    pub fn all_linears(&self) -> Vec<LinearSpec> {
        let mut all = self.other_linears();
        for block in self.blocks() {
            all.extend(self.block_linears(block));
        }
        all
    }

    /// Names of every tensor of the transformer's checkpoint (with `.weight`), with its shape.
    #[must_use]
    pub fn all_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut all: Vec<(String, Vec<usize>)> =
            self.all_linears().into_iter().map(|l| (format!("{}.weight", l.name), vec![l.out_features, l.in_features])).collect();
        for block in self.blocks() {
            let prefix = self.block_prefix(block);
            all.extend(self.block_norms(block).iter().map(|n| (format!("{prefix}.{n}.weight"), vec![self.attention_head_dim])));
        }
        all
    }
}
