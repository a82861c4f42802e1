//! The VAE's tensors by their diffusers names, whichever way the file spells them (`spec/flux2.md` 3).

use std::path::Path;

use candle_core::{Device, Tensor};
use serenity_protocol::checkpoint::Checkpoint;
use serenity_protocol::{Error, Result};

use crate::tensor::{failed, stored_type};

/// A tensor that only the BFL naming has.
const BFL_MARK: &str = "encoder.down.0.block.0.conv1.weight";

/// The VAE's file.
pub struct VaeWeights {
    checkpoint: Checkpoint,
    bfl: bool,
}

impl VaeWeights {
    /// Opens the file or folder at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let bfl = checkpoint.contains(BFL_MARK);
        Ok(Self { checkpoint, bfl })
    }

    /// The folder or file.
    pub fn root(&self) -> &Path {
        self.checkpoint.root()
    }

    fn name(&self, diffusers: &str) -> String {
        if self.bfl { to_bfl(diffusers) } else { diffusers.to_string() }
    }

    /// Shape of a tensor, if it is there.
    pub fn shape(&self, diffusers: &str) -> Option<Vec<usize>> {
        let name = self.name(diffusers);
        self.checkpoint.contains(&name).then(|| self.checkpoint.tensor(&name).ok().map(|t| t.shape)).flatten()
    }

    /// A tensor of that shape on the processor, in float32.
    pub fn get(&self, diffusers: &str, shape: &[usize]) -> Result<Tensor> {
        Tensor::from_vec(self.float32(diffusers, shape)?, shape, &Device::Cpu).map_err(failed("loading weights"))
    }

    /// A tensor's values in float32. The BFL file stores attention's linears as 1 x 1 convolutions: the same values.
    pub fn float32(&self, diffusers: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let name = self.name(diffusers);
        let linear: Vec<usize> = shape.iter().copied().chain([1, 1]).collect();
        let stored = if self.bfl && shape.len() == 2 && self.shape(diffusers).as_ref() == Some(&linear) { &linear } else { shape };
        let tensor = self.checkpoint.tensor_of_shape(&name, stored)?;
        // Refuses what is no plain float type, with what to do.
        stored_type(tensor.dtype).and_then(|_| tensor.to_f32()).map_err(|e: Error| e.at(self.root()).found(format!("tensor '{name}'")))
    }
}

/// The BFL spelling of a diffusers name.
pub(super) fn to_bfl(name: &str) -> String {
    if name.starts_with("quant_conv.") {
        return format!("encoder.{name}");
    }
    if name.starts_with("post_quant_conv.") {
        return format!("decoder.{name}");
    }
    let mut parts: Vec<String> = Vec::new();
    let mut rest = name.split('.').peekable();
    let mut attention = false;
    while let Some(part) = rest.next() {
        let mut index = || rest.next().and_then(|i| i.parse::<usize>().ok()).unwrap_or_default();
        match part {
            "conv_norm_out" => parts.push("norm_out".into()),
            "down_blocks" => parts.push(format!("down.{}", index())),
            // The decoder counts its levels from the finest: 3 - i of four.
            "up_blocks" => parts.push(format!("up.{}", 3usize.saturating_sub(index()))),
            "resnets" if parts.last().is_some_and(|p| p == "mid") => {
                parts.push(format!("block_{}", index() + 1));
            }
            "resnets" => parts.push(format!("block.{}", index())),
            "mid_block" => parts.push("mid".into()),
            "attentions" => {
                attention = true;
                parts.push(format!("attn_{}", index() + 1));
            }
            "downsamplers" => {
                index();
                parts.push("downsample".into());
            }
            "upsamplers" => {
                index();
                parts.push("upsample".into());
            }
            "to_out" if attention => {
                index();
                parts.push("proj_out".into());
            }
            "group_norm" if attention => parts.push("norm".into()),
            "to_q" | "to_k" | "to_v" if attention => parts.push(part.trim_start_matches("to_").into()),
            "conv_shortcut" => parts.push("nin_shortcut".into()),
            other => parts.push(other.into()),
        }
    }
    parts.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_table() {
        for (diffusers, bfl) in [
            ("encoder.conv_in.weight", "encoder.conv_in.weight"),
            ("decoder.conv_norm_out.bias", "decoder.norm_out.bias"),
            ("encoder.down_blocks.2.resnets.1.conv_shortcut.weight", "encoder.down.2.block.1.nin_shortcut.weight"),
            ("encoder.down_blocks.0.downsamplers.0.conv.bias", "encoder.down.0.downsample.conv.bias"),
            ("decoder.mid_block.resnets.1.norm2.weight", "decoder.mid.block_2.norm2.weight"),
            ("encoder.mid_block.attentions.0.group_norm.weight", "encoder.mid.attn_1.norm.weight"),
            ("encoder.mid_block.attentions.0.to_q.weight", "encoder.mid.attn_1.q.weight"),
            ("decoder.mid_block.attentions.0.to_out.0.bias", "decoder.mid.attn_1.proj_out.bias"),
            ("decoder.up_blocks.0.resnets.2.conv1.weight", "decoder.up.3.block.2.conv1.weight"),
            ("decoder.up_blocks.2.upsamplers.0.conv.weight", "decoder.up.1.upsample.conv.weight"),
            ("quant_conv.weight", "encoder.quant_conv.weight"),
            ("post_quant_conv.bias", "decoder.post_quant_conv.bias"),
            ("bn.running_var", "bn.running_var"),
        ] {
            assert_eq!(to_bfl(diffusers), bfl);
        }
    }
}
