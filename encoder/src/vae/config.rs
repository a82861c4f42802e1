//! The VAE's geometry: from `config.json`, or from the tensors' shapes for a single file that has none beside it.

use std::path::Path;

use serde::Deserialize;
use serenity_protocol::cache::text_model::config_file;
use serenity_protocol::{Error, Result};

use super::names::VaeWeights;

/// Levels of each half: three of them halve the size, which makes the downsampling by 8 that tokens of 16 pixels rest on.
const LEVELS: usize = 4;

/// Geometry of the VAE (`spec/flux2.md` 3).
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct VaeGeometry {
    /// Channels of each level of the encoder, finest first.
    pub block_out_channels: Vec<usize>,
    /// The same of the decoder where it differs.
    #[serde(default)]
    pub decoder_block_out_channels: Option<Vec<usize>>,
    /// Residual blocks of each level of the encoder; the decoder has one more.
    #[serde(default = "two")]
    pub layers_per_block: usize,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Groups of every group norm.
    #[serde(default = "groups")]
    pub norm_num_groups: usize,
    /// Added to the batch norm's variance.
    #[serde(default = "eps")]
    pub batch_norm_eps: f64,
    /// Whether the middle of each half has an attention layer.
    #[serde(default = "yes")]
    pub mid_block_add_attention: bool,
    /// Whether a 1 x 1 convolution follows the encoder.
    #[serde(default = "yes")]
    pub use_quant_conv: bool,
    /// Whether a 1 x 1 convolution precedes the decoder.
    #[serde(default = "yes")]
    pub use_post_quant_conv: bool,
    #[serde(default = "rgb")]
    in_channels: usize,
    #[serde(default = "rgb")]
    out_channels: usize,
    #[serde(default = "silu")]
    act_fn: String,
    #[serde(default = "patch")]
    patch_size: [usize; 2],
    #[serde(default)]
    down_block_types: Vec<String>,
    #[serde(default)]
    up_block_types: Vec<String>,
}

fn two() -> usize {
    2
}
fn groups() -> usize {
    32
}
fn eps() -> f64 {
    1e-4
}
fn yes() -> bool {
    true
}
fn rgb() -> usize {
    3
}
fn silu() -> String {
    "silu".into()
}
fn patch() -> [usize; 2] {
    [2, 2]
}

impl VaeGeometry {
    /// From the `config.json` of the VAE at `path`; from the shapes in `weights` where there is none of a VAE.
    pub(super) fn read(path: &Path, weights: &VaeWeights) -> Result<Self> {
        let file = config_file(path);
        let Ok(text) = std::fs::read_to_string(&file) else { return Self::infer(weights) };
        if path.is_file() && serde_json::from_str::<Self>(&text).is_err() {
            // The configuration beside a single file may be that of another component.
            return Self::infer(weights);
        }
        Self::parse(&text).map_err(|e| e.at(&file))
    }

    /// From the text of a `config.json`.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let parsed = serde_json::from_str::<Self>(text);
        let geometry = parsed.map_err(|e| Error::data("the VAE's configuration is not that of a FLUX.2 VAE").cause(e))?;
        geometry.check()?;
        Ok(geometry)
    }

    fn infer(weights: &VaeWeights) -> Result<Self> {
        let levels = |half: &str| -> Vec<usize> {
            let width = |i: usize| weights.shape(&format!("{half}.{i}.resnets.0.conv2.weight")).and_then(|s| s.first().copied());
            (0..LEVELS).map_while(width).collect()
        };
        let encoder = levels("encoder.down_blocks");
        let mut decoder = levels("decoder.up_blocks");
        decoder.reverse();
        let first = |name: &str| weights.shape(name).and_then(|s| s.first().copied());
        let missing = || Error::data("the file is no FLUX.2 VAE").at(weights.root()).expected("tensors encoder.*, decoder.* and bn.*");
        let geometry = Self {
            layers_per_block: (0..).map_while(|j| first(&format!("encoder.down_blocks.0.resnets.{j}.conv1.weight"))).count(),
            latent_channels: first("encoder.conv_out.weight").ok_or_else(missing)? / 2,
            decoder_block_out_channels: (decoder != encoder && !decoder.is_empty()).then_some(decoder),
            block_out_channels: encoder,
            norm_num_groups: groups(),
            batch_norm_eps: eps(),
            mid_block_add_attention: weights.shape("encoder.mid_block.attentions.0.to_q.bias").is_some(),
            use_quant_conv: weights.shape("quant_conv.weight").is_some(),
            use_post_quant_conv: weights.shape("post_quant_conv.weight").is_some(),
            in_channels: rgb(),
            out_channels: rgb(),
            act_fn: silu(),
            patch_size: patch(),
            down_block_types: Vec::new(),
            up_block_types: Vec::new(),
        };
        geometry.check().map_err(|e| e.at(weights.root()))?;
        Ok(geometry)
    }

    fn check(&self) -> Result<()> {
        let plain = |types: &[String], name: &str| types.iter().all(|t| t == name);
        if self.act_fn != "silu"
            || self.patch_size != [2, 2]
            || (self.in_channels, self.out_channels) != (3, 3)
            || !plain(&self.down_block_types, "DownEncoderBlock2D")
            || !plain(&self.up_block_types, "UpDecoderBlock2D")
        {
            return Err(Error::data("this VAE has parts that are not supported")
                .expected("3 channels, silu, patch_size [2, 2], DownEncoderBlock2D and UpDecoderBlock2D throughout"));
        }
        let groups = self.norm_num_groups;
        for channels in [&self.block_out_channels, self.decoder_channels()] {
            if channels.len() != LEVELS || groups == 0 || channels.iter().any(|c| *c == 0 || !c.is_multiple_of(groups) || *c > 1 << 14) {
                return Err(Error::data("the VAE's channels do not fit its norms or its downsampling by 8")
                    .expected(format!("{LEVELS} levels, each a multiple of norm_num_groups {groups}"))
                    .found(format!("{channels:?}")));
            }
        }
        if !(1..=64).contains(&self.layers_per_block)
            || !(1..=1 << 12).contains(&self.latent_channels)
            || self.batch_norm_eps.is_nan()
            || self.batch_norm_eps <= 0.0
        {
            return Err(Error::data(format!(
                "layers_per_block {}, latent_channels {} and batch_norm_eps {} must be positive",
                self.layers_per_block, self.latent_channels, self.batch_norm_eps
            )));
        }
        Ok(())
    }

    /// Channels of each level of the decoder, finest first.
    #[must_use]
    pub fn decoder_channels(&self) -> &Vec<usize> {
        self.decoder_block_out_channels.as_ref().unwrap_or(&self.block_out_channels)
    }

    /// Channels of a token.
    #[must_use]
    pub fn token_channels(&self) -> usize {
        4 * self.latent_channels
    }

    /// Operations (multiply and add counted apart) of the encoder's convolutions and attention for one square image.
    #[must_use]
    pub fn encoder_flops(&self, side: usize) -> f64 {
        let conv = |input: usize, output: usize, kernel: usize, side: usize| {
            2.0 * (input * output * kernel * kernel) as f64 * (side * side) as f64
        };
        let resnet = |input, output, side| conv(input, output, 3, side) + conv(output, output, 3, side);
        let (mut side, mut input) = (side, self.block_out_channels.first().copied().unwrap_or_default());
        let mut sum = conv(3, input, 3, side);
        for (i, &output) in self.block_out_channels.iter().enumerate() {
            sum += resnet(input, output, side) + (self.layers_per_block - 1) as f64 * resnet(output, output, side);
            sum += if input == output { 0.0 } else { conv(input, output, 1, side) };
            if i + 1 < self.block_out_channels.len() {
                side /= 2;
                sum += conv(output, output, 3, side);
            }
            input = output;
        }
        let tokens = (side * side) as f64;
        let attention =
            if self.mid_block_add_attention { 4.0 * conv(input, input, 1, side) + 4.0 * tokens * tokens * input as f64 } else { 0.0 };
        sum + 2.0 * resnet(input, input, side) + attention + conv(input, 2 * self.latent_channels, 3, side)
    }
}
