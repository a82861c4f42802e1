//! Encoder and decoder, made of [`super::layers`] as the geometry says.

use candle_core::{Result as TensorResult, Tensor};
use serenity_protocol::{Error, Result};

use super::config::VaeGeometry;
use super::layers::{Attention, Conv, Downsample, GroupNorm, Resnet, Upsample};
use super::names::VaeWeights;

/// Residual block, attention, residual block.
struct Middle {
    first: Resnet,
    attention: Option<Attention>,
    second: Resnet,
}

impl Middle {
    fn load(w: &VaeWeights, g: &VaeGeometry, half: &str, channels: usize) -> Result<Self> {
        let name = format!("{half}.mid_block");
        let attention = || Attention::load(w, g, &format!("{name}.attentions.0"), channels);
        Ok(Self {
            first: Resnet::load(w, g, &format!("{name}.resnets.0"), channels, channels)?,
            attention: g.mid_block_add_attention.then(attention).transpose()?,
            second: Resnet::load(w, g, &format!("{name}.resnets.1"), channels, channels)?,
        })
    }

    fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        let mut x = self.first.forward(x)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.second.forward(&x)
    }
}

fn coarsest(channels: &[usize]) -> Result<usize> {
    channels.last().copied().ok_or_else(|| Error::invariant("a VAE without levels"))
}

/// Images to the moments of the posterior.
pub(super) struct Encoder {
    conv_in: Conv,
    levels: Vec<(Vec<Resnet>, Option<Downsample>)>,
    middle: Middle,
    norm_out: GroupNorm,
    conv_out: Conv,
    quant: Option<Conv>,
}

impl Encoder {
    pub fn load(w: &VaeWeights, g: &VaeGeometry) -> Result<Self> {
        let channels = &g.block_out_channels;
        let (first, last) = (channels.first().copied().unwrap_or_default(), coarsest(channels)?);
        let (moments, mut input, mut levels) = (2 * g.latent_channels, first, Vec::new());
        for (i, &output) in channels.iter().enumerate() {
            let name = format!("encoder.down_blocks.{i}");
            let mut resnets = Vec::new();
            for j in 0..g.layers_per_block {
                resnets.push(Resnet::load(w, g, &format!("{name}.resnets.{j}"), if j == 0 { input } else { output }, output)?);
            }
            let down = (i + 1 < channels.len()).then(|| Downsample::load(w, &format!("{name}.downsamplers.0"), output)).transpose()?;
            levels.push((resnets, down));
            input = output;
        }
        Ok(Self {
            conv_in: Conv::load(w, "encoder.conv_in", 3, first, 3)?,
            levels,
            middle: Middle::load(w, g, "encoder", last)?,
            norm_out: GroupNorm::load(w, g, "encoder.conv_norm_out", last)?,
            conv_out: Conv::load(w, "encoder.conv_out", last, moments, 3)?,
            quant: g.use_quant_conv.then(|| Conv::load(w, "quant_conv", moments, moments, 1)).transpose()?,
        })
    }

    /// `[B, 3, H, W]` to `[B, 2 * latent_channels, H/8, W/8]`: means, then log variances.
    pub fn forward(&self, images: &Tensor) -> TensorResult<Tensor> {
        let mut x = self.conv_in.forward(images)?;
        for (resnets, down) in &self.levels {
            for resnet in resnets {
                x = resnet.forward(&x)?;
            }
            if let Some(down) = down {
                x = down.forward(&x)?;
            }
        }
        let x = self.norm_out.forward(&self.middle.forward(&x)?)?.silu()?;
        let x = self.conv_out.forward(&x)?;
        self.quant.as_ref().map_or(Ok(x.clone()), |quant| quant.forward(&x))
    }
}

/// Latents to images.
pub(super) struct Decoder {
    post_quant: Option<Conv>,
    conv_in: Conv,
    middle: Middle,
    levels: Vec<(Vec<Resnet>, Option<Upsample>)>,
    norm_out: GroupNorm,
    conv_out: Conv,
}

impl Decoder {
    pub fn load(w: &VaeWeights, g: &VaeGeometry) -> Result<Self> {
        let channels = g.decoder_channels();
        let (first, last, latent) = (channels.first().copied().unwrap_or_default(), coarsest(channels)?, g.latent_channels);
        let (mut input, mut levels) = (last, Vec::new());
        for (i, &output) in channels.iter().rev().enumerate() {
            let name = format!("decoder.up_blocks.{i}");
            let mut resnets = Vec::new();
            for j in 0..=g.layers_per_block {
                resnets.push(Resnet::load(w, g, &format!("{name}.resnets.{j}"), if j == 0 { input } else { output }, output)?);
            }
            let up = (i + 1 < channels.len()).then(|| Upsample::load(w, &format!("{name}.upsamplers.0"), output)).transpose()?;
            levels.push((resnets, up));
            input = output;
        }
        Ok(Self {
            post_quant: g.use_post_quant_conv.then(|| Conv::load(w, "post_quant_conv", latent, latent, 1)).transpose()?,
            conv_in: Conv::load(w, "decoder.conv_in", latent, last, 3)?,
            middle: Middle::load(w, g, "decoder", last)?,
            levels,
            norm_out: GroupNorm::load(w, g, "decoder.conv_norm_out", first)?,
            conv_out: Conv::load(w, "decoder.conv_out", first, 3, 3)?,
        })
    }

    /// `[B, latent_channels, h, w]` to `[B, 3, 8h, 8w]`.
    pub fn forward(&self, latents: &Tensor) -> TensorResult<Tensor> {
        let latents = self.post_quant.as_ref().map_or(Ok(latents.clone()), |conv| conv.forward(latents))?;
        let mut x = self.middle.forward(&self.conv_in.forward(&latents)?)?;
        for (resnets, up) in &self.levels {
            for resnet in resnets {
                x = resnet.forward(&x)?;
            }
            if let Some(up) = up {
                x = up.forward(&x)?;
            }
        }
        self.conv_out.forward(&self.norm_out.forward(&x)?.silu()?)
    }
}
