//! The parts that encoder and decoder are made of. Shapes are `[B, C, H, W]`.

use candle_core::{DType, Result as TensorResult, Tensor};
use serenity_protocol::Result;

use super::config::VaeGeometry;
use super::names::VaeWeights;

/// Epsilon of every group norm, fixed in the reference.
const GROUP_NORM_EPS: f64 = 1e-6;
/// Rows of attention scores computed at once: bounds their memory at 1024 px and above.
const ATTENTION_ROWS: usize = 1024;

/// A convolution with bias.
pub(super) struct Conv {
    weight: Tensor,
    bias: Tensor,
    padding: usize,
    stride: usize,
}

impl Conv {
    /// Kernel `kernel` x `kernel`, padded so that a stride of 1 keeps the size.
    pub fn load(w: &VaeWeights, name: &str, input: usize, output: usize, kernel: usize) -> Result<Self> {
        Ok(Self {
            weight: w.get(&format!("{name}.weight"), &[output, input, kernel, kernel])?,
            bias: w.get(&format!("{name}.bias"), &[output])?.reshape((1, output, 1, 1)).map_err(crate::tensor::failed("loading a bias"))?,
            padding: kernel / 2,
            stride: 1,
        })
    }

    pub fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        x.conv2d(&self.weight, self.padding, self.stride, 1, 1)?.broadcast_add(&self.bias)
    }
}

/// A group norm; statistics in float32.
pub(super) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
}

impl GroupNorm {
    pub fn load(w: &VaeWeights, g: &VaeGeometry, name: &str, channels: usize) -> Result<Self> {
        let shaped = |t: Tensor| t.reshape((1, channels, 1, 1)).map_err(crate::tensor::failed("loading a norm"));
        Ok(Self {
            weight: shaped(w.get(&format!("{name}.weight"), &[channels])?)?,
            bias: shaped(w.get(&format!("{name}.bias"), &[channels])?)?,
            groups: g.norm_num_groups,
        })
    }

    pub fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let grouped = x.to_dtype(DType::F32)?.reshape((b, self.groups, c / self.groups * h, w))?;
        // Mean of row means: rows are equally long, and the error of summing a million values one by one does not arise.
        let mean = |t: &Tensor| t.mean_keepdim(3)?.mean_keepdim(2);
        let centred = grouped.broadcast_sub(&mean(&grouped)?)?;
        let scale = (mean(&centred.sqr()?)? + GROUP_NORM_EPS)?.sqrt()?.recip()?;
        let normed = centred.broadcast_mul(&scale)?.reshape((b, c, h, w))?.to_dtype(x.dtype())?;
        normed.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)
    }
}

/// `x + conv2(silu(norm2(conv1(silu(norm1(x))))))`, with a 1 x 1 convolution on `x` where the channels change.
pub(super) struct Resnet {
    norm1: GroupNorm,
    conv1: Conv,
    norm2: GroupNorm,
    conv2: Conv,
    shortcut: Option<Conv>,
}

impl Resnet {
    pub fn load(w: &VaeWeights, g: &VaeGeometry, name: &str, input: usize, output: usize) -> Result<Self> {
        let shortcut = || Conv::load(w, &format!("{name}.conv_shortcut"), input, output, 1);
        Ok(Self {
            norm1: GroupNorm::load(w, g, &format!("{name}.norm1"), input)?,
            conv1: Conv::load(w, &format!("{name}.conv1"), input, output, 3)?,
            norm2: GroupNorm::load(w, g, &format!("{name}.norm2"), output)?,
            conv2: Conv::load(w, &format!("{name}.conv2"), output, output, 3)?,
            shortcut: (input != output).then(shortcut).transpose()?,
        })
    }

    pub fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        let h = self.conv1.forward(&self.norm1.forward(x)?.silu()?)?;
        let h = self.conv2.forward(&self.norm2.forward(&h)?.silu()?)?;
        match &self.shortcut {
            None => x + h,
            Some(shortcut) => shortcut.forward(x)? + h,
        }
    }
}

/// Self-attention over all pixels, one head of all channels.
pub(super) struct Attention {
    norm: GroupNorm,
    /// Weight and bias of query, key, value and output.
    query: (Tensor, Tensor),
    key: (Tensor, Tensor),
    value: (Tensor, Tensor),
    output: (Tensor, Tensor),
}

impl Attention {
    pub fn load(w: &VaeWeights, g: &VaeGeometry, name: &str, channels: usize) -> Result<Self> {
        let linear = |part: &str| -> Result<(Tensor, Tensor)> {
            Ok((w.get(&format!("{name}.{part}.weight"), &[channels, channels])?, w.get(&format!("{name}.{part}.bias"), &[channels])?))
        };
        Ok(Self {
            norm: GroupNorm::load(w, g, &format!("{name}.group_norm"), channels)?,
            query: linear("to_q")?,
            key: linear("to_k")?,
            value: linear("to_v")?,
            output: linear("to_out.0")?,
        })
    }

    pub fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let tokens = self.norm.forward(x)?.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
        let linear = |x: &Tensor, (weight, bias): &(Tensor, Tensor)| x.broadcast_matmul(&weight.t()?)?.broadcast_add(bias);
        let (query, key, value) = (linear(&tokens, &self.query)?, linear(&tokens, &self.key)?, linear(&tokens, &self.value)?);
        let turned = key.transpose(1, 2)?;
        let mut rows = Vec::new();
        for start in (0..h * w).step_by(ATTENTION_ROWS) {
            let part = query.narrow(1, start, ATTENTION_ROWS.min(h * w - start))?.contiguous()?;
            let scores = (part.matmul(&turned)?.to_dtype(DType::F32)? * (c as f64).powf(-0.5))?;
            rows.push(candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(value.dtype())?.matmul(&value)?);
        }
        let mixed = linear(&Tensor::cat(&rows, 1)?, &self.output)?;
        x + mixed.transpose(1, 2)?.contiguous()?.reshape((b, c, h, w))?
    }
}

/// Half the size: zeros on the right and at the bottom only, then a 3 x 3 convolution of stride 2.
pub(super) struct Downsample(Conv);

impl Downsample {
    pub fn load(w: &VaeWeights, name: &str, channels: usize) -> Result<Self> {
        let conv = Conv::load(w, &format!("{name}.conv"), channels, channels, 3)?;
        Ok(Self(Conv { padding: 0, stride: 2, ..conv }))
    }

    pub fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        self.0.forward(&x.pad_with_zeros(3, 0, 1)?.pad_with_zeros(2, 0, 1)?)
    }
}

/// Twice the size: each pixel repeated, then a 3 x 3 convolution.
pub(super) struct Upsample(Conv);

impl Upsample {
    pub fn load(w: &VaeWeights, name: &str, channels: usize) -> Result<Self> {
        Ok(Self(Conv::load(w, &format!("{name}.conv"), channels, channels, 3)?))
    }

    pub fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        let (_, _, h, w) = x.dims4()?;
        self.0.forward(&x.upsample_nearest2d(2 * h, 2 * w)?)
    }
}
