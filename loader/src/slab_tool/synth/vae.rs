//! Random weights of the VAE (`AutoencoderKLFlux2`), float32.
//!
//! Every convolution reads group-normalised, SiLU'd inputs of size about 0.6, so a gain of 1.6 keeps sizes near 1. The batch-norm
//! statistics are those that make the latents of photographs roughly zero-mean and of unit variance under these weights.

use safetensors::Dtype;
use serde_json::{Value, json};

use super::component::{Fill, Spec};
use super::preset::VaeShape;

/// Gain of convolutions behind a SiLU.
const CONV_GAIN: f64 = 1.6;
/// Gain of the second convolution of a residual block: what the block adds to its input.
const RESIDUAL_GAIN: f64 = 0.8;
/// Spread of the norm weights around 1, and of biases around 0.
const NORM_STD: f64 = 0.1;
const BIAS_STD: f64 = 0.05;
/// Residual blocks of a resolution in the encoder; the decoder has one more.
const LAYERS_PER_BLOCK: usize = 2;
/// Batch-norm statistics of patchified latents: over photographs at 128 px, channel means lie within 0.3 of 0 and variances average 0.8.
const BN_MEAN: f32 = 0.0;
const BN_VAR: f32 = 0.8;

struct Tensors(Vec<Spec>);

impl Tensors {
    fn conv(&mut self, name: &str, out: usize, inner: usize, kernel: usize, gain: f64) {
        self.0.push(Spec::vector(format!("{name}.bias"), out, Dtype::F32, 0.0, BIAS_STD));
        self.0.push(Spec::weight(format!("{name}.weight"), vec![out, inner, kernel, kernel], Dtype::F32, gain));
    }

    fn linear(&mut self, name: &str, channels: usize, gain: f64) {
        self.0.push(Spec::vector(format!("{name}.bias"), channels, Dtype::F32, 0.0, BIAS_STD));
        self.0.push(Spec::weight(format!("{name}.weight"), vec![channels, channels], Dtype::F32, gain));
    }

    fn norm(&mut self, name: &str, channels: usize) {
        self.0.push(Spec::vector(format!("{name}.bias"), channels, Dtype::F32, 0.0, BIAS_STD));
        self.0.push(Spec::vector(format!("{name}.weight"), channels, Dtype::F32, 1.0, NORM_STD));
    }

    fn resnet(&mut self, name: &str, out: usize, inner: usize) {
        self.norm(&format!("{name}.norm1"), inner);
        self.conv(&format!("{name}.conv1"), out, inner, 3, CONV_GAIN);
        self.norm(&format!("{name}.norm2"), out);
        self.conv(&format!("{name}.conv2"), out, out, 3, RESIDUAL_GAIN);
        if out != inner {
            self.conv(&format!("{name}.conv_shortcut"), out, inner, 1, 1.0);
        }
    }

    fn mid_block(&mut self, side: &str, channels: usize) {
        self.resnet(&format!("{side}.mid_block.resnets.0"), channels, channels);
        let attention = format!("{side}.mid_block.attentions.0");
        self.norm(&format!("{attention}.group_norm"), channels);
        for (name, gain) in [("to_q", 1.0), ("to_k", 1.0), ("to_v", 1.0), ("to_out.0", RESIDUAL_GAIN)] {
            self.linear(&format!("{attention}.{name}"), channels, gain);
        }
        self.resnet(&format!("{side}.mid_block.resnets.1"), channels, channels);
    }
}

/// The tensors of the VAE.
#[must_use]
pub fn specs(shape: &VaeShape) -> Vec<Spec> {
    let VaeShape { latent, channels } = *shape;
    let [first, .., last] = channels;
    let mut t = Tensors(Vec::new());
    t.conv("encoder.conv_in", first, 3, 3, 1.0);
    let mut inner = first;
    for (i, &out) in channels.iter().enumerate() {
        for layer in 0..LAYERS_PER_BLOCK {
            t.resnet(&format!("encoder.down_blocks.{i}.resnets.{layer}"), out, inner);
            inner = out;
        }
        if i + 1 < channels.len() {
            t.conv(&format!("encoder.down_blocks.{i}.downsamplers.0.conv"), out, out, 3, 1.0);
        }
    }
    t.mid_block("encoder", last);
    t.norm("encoder.conv_norm_out", last);
    t.conv("encoder.conv_out", 2 * latent, last, 3, CONV_GAIN);
    t.conv("quant_conv", 2 * latent, 2 * latent, 1, 1.0);
    t.conv("post_quant_conv", latent, latent, 1, 1.0);
    t.conv("decoder.conv_in", last, latent, 3, 1.0);
    t.mid_block("decoder", last);
    let mut inner = last;
    for (i, &out) in channels.iter().rev().enumerate() {
        for layer in 0..=LAYERS_PER_BLOCK {
            t.resnet(&format!("decoder.up_blocks.{i}.resnets.{layer}"), out, inner);
            inner = out;
        }
        if i + 1 < channels.len() {
            t.conv(&format!("decoder.up_blocks.{i}.upsamplers.0.conv"), out, out, 3, 1.0);
        }
    }
    t.norm("decoder.conv_norm_out", first);
    t.conv("decoder.conv_out", 3, first, 3, 0.5);
    let mut all = t.0;
    all.push(Spec { name: "bn.num_batches_tracked".into(), shape: vec![], dtype: Dtype::I64, fill: Fill::Zeros });
    all.push(batch_norm("bn.running_mean", 4 * latent, BN_MEAN));
    all.push(batch_norm("bn.running_var", 4 * latent, BN_VAR));
    all
}

fn batch_norm(name: &str, channels: usize, value: f32) -> Spec {
    Spec { name: name.into(), shape: vec![channels], dtype: Dtype::F32, fill: Fill::Values(vec![value; channels]) }
}

/// `vae/config.json`.
#[must_use]
pub fn config(shape: &VaeShape) -> Value {
    json!({
        "_class_name": "AutoencoderKLFlux2",
        "_diffusers_version": super::DIFFUSERS_VERSION,
        "act_fn": "silu",
        "batch_norm_eps": 0.0001,
        "batch_norm_momentum": 0.1,
        "block_out_channels": shape.channels,
        "decoder_block_out_channels": null,
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
        "in_channels": 3,
        "latent_channels": shape.latent,
        "layers_per_block": LAYERS_PER_BLOCK,
        "mid_block_add_attention": true,
        "norm_num_groups": 32,
        "out_channels": 3,
        "patch_size": [2, 2],
        "sample_size": 1024,
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
        "use_post_quant_conv": true,
        "use_quant_conv": true
    })
}
