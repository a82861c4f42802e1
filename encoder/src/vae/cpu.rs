//! The VAE on the processor, with the tensor library: float32, `[B, C, rows, W]`.
//!
//! Sums of norms are float64, by pixel row. A strip in "host memory" is a copy out of a tensor, for the processor has but one memory: cutting an
//! image into strips bounds what a layer needs beside its input and output.

use std::ops::Range;

use candle_core::{Device, Result as TensorResult, Tensor};
use serenity_protocol::{Error, Result};

use super::blocks::{ConvSpec, Shape};
use super::names::VaeWeights;
use super::network::Kit;
use super::{ATTENTION_ROWS, GROUP_NORM_EPS};
use crate::tensor::failed;

/// The processor.
pub(super) struct Cpu {
    /// Groups of every norm.
    pub groups: usize,
}

pub(super) struct Conv {
    spec: ConvSpec,
    weight: Tensor,
    /// `[1, C, 1, 1]`.
    bias: Tensor,
}

pub(super) struct Norm {
    weight: Vec<f32>,
    /// `[1, C, 1, 1]`.
    bias: Tensor,
}

pub(super) struct Attention {
    norm: Norm,
    /// Weight and bias of query, key, value and output.
    query: (Tensor, Tensor),
    key: (Tensor, Tensor),
    value: (Tensor, Tensor),
    output: (Tensor, Tensor),
}

/// Pixel rows: `[B, C, rows, W]` from row `first` on.
pub(super) struct Rows {
    x: Tensor,
    first: usize,
    height: usize,
}

/// Sums and sums of squares: `[B, height, groups]`.
pub(super) struct Sums {
    values: Vec<[f64; 2]>,
    shape: Shape,
}

/// Keys and values `[B, tokens, C]`.
pub(super) struct Keys {
    keys: Tensor,
    values: Tensor,
}

impl Cpu {
    /// `norm(x)` by the sums of the whole activation.
    fn normalise(&self, x: &Tensor, norm: &Norm, sums: &Sums) -> TensorResult<Tensor> {
        let Shape { batch, height, width, channels } = sums.shape;
        let per = channels / self.groups;
        let count = (per * height * width) as f64;
        let (mut means, mut scales) = (Vec::with_capacity(batch * channels), Vec::with_capacity(batch * channels));
        for image in 0..batch {
            for (channel, weight) in norm.weight.iter().enumerate() {
                let of =
                    |row: usize| sums.values.get((image * height + row) * self.groups + channel / per).copied().unwrap_or([f64::NAN; 2]);
                let [sum, squares] = (0..height).map(of).fold([0.0; 2], |[a, b], [c, d]| [a + c, b + d]);
                let mean = sum / count;
                let variance = (squares / count - mean * mean).max(0.0);
                means.push(mean as f32);
                scales.push((f64::from(*weight) / (variance + GROUP_NORM_EPS).sqrt()) as f32);
            }
        }
        let shaped = |values| Tensor::from_vec(values, (batch, channels, 1, 1), &Device::Cpu);
        x.broadcast_sub(&shaped(means)?)?.broadcast_mul(&shaped(scales)?)?.broadcast_add(&norm.bias)
    }

    fn convolve(&self, c: &Conv, x: &Rows, norm: Option<(&Norm, &Sums)>, out: &Range<usize>) -> TensorResult<Tensor> {
        let mut t = match norm {
            Some((norm, sums)) => self.normalise(&x.x, norm, sums)?.silu()?,
            None => x.x.clone(),
        };
        let (spec, mut first, mut height) = (&c.spec, x.first, x.height);
        if spec.up {
            let (_, _, h, w) = t.dims4()?;
            t = t.upsample_nearest2d(2 * h, 2 * w)?;
            (first, height) = (2 * first, 2 * height);
        }
        // Rows that the output needs, from `above` rows of zeros on.
        let start = out.start * spec.stride;
        let end = (out.end - 1) * spec.stride + spec.taps;
        let above = spec.padding().saturating_sub(start);
        let (start, end) = (start.saturating_sub(spec.padding()), end - spec.padding());
        let below = end.saturating_sub(height);
        t = t.narrow(2, start - first, end - below - start)?;
        if (above, below) == (1, 1) && spec.stride == 1 {
            return t.contiguous()?.conv2d(&c.weight, 1, 1, 1, 1)?.broadcast_add(&c.bias);
        }
        let right = usize::from(spec.taps == 3);
        t = t.pad_with_zeros(2, above, below)?.pad_with_zeros(3, spec.padding(), right)?;
        t.contiguous()?.conv2d(&c.weight, 0, spec.stride, 1, 1)?.broadcast_add(&c.bias)
    }

    fn linear(x: &Tensor, (weight, bias): &(Tensor, Tensor)) -> TensorResult<Tensor> {
        x.broadcast_matmul(&weight.t()?)?.broadcast_add(bias)
    }

    fn tokens(&self, a: &Attention, x: &Tensor, sums: &Sums) -> TensorResult<Tensor> {
        self.normalise(x, &a.norm, sums)?.flatten_from(2)?.transpose(1, 2)?.contiguous()
    }

    fn mix(&self, a: &Attention, x: &Tensor, sums: &Sums, keys: &Keys) -> TensorResult<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let query = Self::linear(&self.tokens(a, x, sums)?, &a.query)?;
        let turned = keys.keys.transpose(1, 2)?;
        let mut rows = Vec::new();
        for start in (0..h * w).step_by(ATTENTION_ROWS) {
            let part = query.narrow(1, start, ATTENTION_ROWS.min(h * w - start))?.contiguous()?;
            let scores = (part.matmul(&turned)? * (c as f64).powf(-0.5))?;
            rows.push(candle_nn::ops::softmax_last_dim(&scores)?.matmul(&keys.values)?);
        }
        let mixed = Self::linear(&Tensor::cat(&rows, 1)?, &a.output)?;
        x + mixed.transpose(1, 2)?.contiguous()?.reshape((b, c, h, w))?
    }

    /// Adds the sums of `rows` to their places.
    fn note(&self, rows: &Rows, sums: &mut Sums) -> TensorResult<()> {
        let (_, channels, high, width) = rows.x.dims4()?;
        let values = rows.x.flatten_all()?.to_vec1::<f32>()?;
        let per = channels / self.groups;
        for (line, values) in values.chunks_exact(width.max(1)).enumerate() {
            let (image, channel, row) = (line / (channels * high), line / high % channels, rows.first + line % high);
            let mut sum = [0.0; 2];
            for v in values.iter().map(|v| f64::from(*v)) {
                sum = [sum[0] + v, sum[1] + v * v];
            }
            if let Some(place) = sums.values.get_mut((image * sums.shape.height + row) * self.groups + channel / per) {
                *place = [place[0] + sum[0], place[1] + sum[1]];
            }
        }
        Ok(())
    }
}

impl Kit for Cpu {
    type Conv = Conv;
    type Norm = Norm;
    type Attention = Attention;
    type Rows = Rows;
    type Host = Tensor;
    type Sums = Sums;
    type Keys = Keys;

    fn load_conv(&self, w: &VaeWeights, spec: &ConvSpec) -> Result<Conv> {
        let weight = w.get(&format!("{}.weight", spec.name), &[spec.output, spec.input, spec.taps, spec.taps])?;
        let bias = w.get(&format!("{}.bias", spec.name), &[spec.output])?;
        let bias = bias.reshape((1, spec.output, 1, 1)).map_err(failed("loading a bias"))?;
        Ok(Conv { spec: spec.clone(), weight, bias })
    }

    fn load_norm(&self, w: &VaeWeights, name: &str, channels: usize) -> Result<Norm> {
        let bias = w.get(&format!("{name}.bias"), &[channels])?;
        let bias = bias.reshape((1, channels, 1, 1)).map_err(failed("loading a norm"))?;
        Ok(Norm { weight: w.float32(&format!("{name}.weight"), &[channels])?, bias })
    }

    fn load_attention(&self, w: &VaeWeights, name: &str, channels: usize) -> Result<Attention> {
        let linear = |part: &str| -> Result<(Tensor, Tensor)> {
            Ok((w.get(&format!("{name}.{part}.weight"), &[channels, channels])?, w.get(&format!("{name}.{part}.bias"), &[channels])?))
        };
        Ok(Attention {
            norm: self.load_norm(w, &format!("{name}.group_norm"), channels)?,
            query: linear("to_q")?,
            key: linear("to_k")?,
            value: linear("to_v")?,
            output: linear("to_out.0")?,
        })
    }

    fn blank(&self, s: Shape) -> Result<Tensor> {
        Tensor::zeros((s.batch, s.channels, s.height, s.width), candle_core::DType::F32, &Device::Cpu)
            .map_err(failed("making room for an activation"))
    }

    fn read(&self, host: &Tensor, shape: Shape, rows: Range<usize>) -> Result<Rows> {
        let first = rows.start;
        let x = if rows == (0..shape.height) { Ok(host.clone()) } else { host.narrow(2, first, rows.len()).and_then(|x| x.contiguous()) };
        Ok(Rows { x: x.map_err(failed("cutting a strip"))?, first, height: shape.height })
    }

    fn write(&self, host: &mut Tensor, shape: Shape, rows: &Rows) -> Result<()> {
        if rows.first == 0 && rows.x.dims().get(2) == Some(&shape.height) {
            *host = rows.x.clone();
            return Ok(());
        }
        rows.x.contiguous().and_then(|x| host.slice_set(&x, 2, rows.first)).map_err(failed("placing a strip"))
    }

    fn sums(&self, shape: Shape) -> Result<Sums> {
        if !shape.channels.is_multiple_of(self.groups) {
            return Err(Error::invariant("channels are no multiple of a norm's groups").found(shape.channels));
        }
        Ok(Sums { values: vec![[0.0; 2]; shape.batch * shape.height * self.groups], shape })
    }

    fn conv(&self, conv: &Conv, x: &Rows, norm: Option<(&Norm, &Sums)>, out: Range<usize>, onto: Option<Rows>) -> Result<Rows> {
        let height = conv.spec.output(Shape { batch: 1, height: x.height, width: x.height, channels: 1 }).height;
        let y = self.convolve(conv, x, norm, &out).and_then(|y| match &onto {
            Some(base) => &base.x + y,
            None => Ok(y),
        });
        Ok(Rows { x: y.map_err(failed("a convolution of the VAE"))?, first: out.start, height })
    }

    fn finish(&self, rows: Rows, sums: Option<&mut Sums>) -> Result<Rows> {
        if let Some(sums) = sums {
            self.note(&rows, sums).map_err(failed("the sums of a norm"))?;
        }
        Ok(rows)
    }

    fn keys(&self, s: Shape) -> Result<Keys> {
        let room = || Tensor::zeros((s.batch, s.height * s.width, s.channels), candle_core::DType::F32, &Device::Cpu);
        room().and_then(|keys| Ok(Keys { keys, values: room()? })).map_err(failed("making room for keys"))
    }

    fn add_keys(&self, a: &Attention, x: &Rows, sums: &Sums, keys: &mut Keys) -> Result<()> {
        let first = x.first * x.x.dims().last().copied().unwrap_or(0);
        let add = || -> TensorResult<()> {
            let tokens = self.tokens(a, &x.x, sums)?;
            keys.keys.slice_set(&Self::linear(&tokens, &a.key)?, 1, first)?;
            keys.values.slice_set(&Self::linear(&tokens, &a.value)?, 1, first)
        };
        add().map_err(failed("keys of the VAE's attention"))
    }

    fn attend(&self, a: &Attention, x: Rows, sums: &Sums, keys: &Keys) -> Result<Rows> {
        let mixed = self.mix(a, &x.x, sums, keys).map_err(failed("the VAE's attention"))?;
        Ok(Rows { x: mixed, ..x })
    }
}
