//! What a micro-batch conditions every block with, on the device; and the weights outside the blocks that it comes from.
//!
//! Embeddings and modulation are made for all samples of a step at once: they cost reading the weights, which may lie on the host.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;
use serenity_cuda::arena::ALIGNMENT;
use serenity_cuda::driver::Pinned;
use serenity_cuda::ops::elementwise::LINEAR_ROWS;
use serenity_cuda::{Event, Gpu, Mat, Ptr, Ty};
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::{Error, Result};

use super::linear::Context;
use super::plan::{CONDITIONING, Reserve, Shape};
use crate::model::{OtherWeights, sinusoid, tensor_error};

/// The bytes of a tensor of the CPU in row-major order, as `ty`, little endian as every host of such a device.
///
/// A step's inputs go through here while the device has nothing to do: values are read in place and rounded on all processors.
///
/// # Errors
/// [`Error::Invariant`] if it cannot be read.
pub fn bytes_of(tensor: &Tensor, ty: Ty) -> Result<Vec<u8>> {
    let read = || -> candle_core::Result<Vec<u8>> {
        let tensor = tensor.to_device(&Device::Cpu)?;
        let tensor = match tensor.dtype() {
            DType::F32 | DType::BF16 => tensor,
            _ => tensor.to_dtype(DType::F32)?,
        };
        let tensor = tensor.contiguous()?;
        let (storage, layout) = tensor.storage_and_layout();
        let candle_core::Storage::Cpu(storage) = &*storage else { candle_core::bail!("the tensor is not the processor's") };
        let range = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
        let outside = || candle_core::Error::Msg("the tensor is smaller than its shape".into());
        Ok(match tensor.dtype() {
            DType::F32 => {
                let values = storage.as_slice::<f32>()?.get(range).ok_or_else(outside)?;
                if ty == Ty::F32 { bytemuck::cast_slice(values).to_vec() } else { rounded(values) }
            }
            _ => {
                let values = storage.as_slice::<bf16>()?.get(range).ok_or_else(outside)?;
                match ty {
                    Ty::Bf16 => bytemuck::cast_slice(values).to_vec(),
                    Ty::F32 => values.iter().flat_map(|v| v.to_f32().to_le_bytes()).collect(),
                }
            }
        })
    };
    read().map_err(|e| tensor_error("a tensor cannot be read", e))
}

/// bf16 to nearest, ties to even, as `bf16::from_f32` does it, but without branches: the compiler makes vector code of it.
fn rounded(values: &[f32]) -> Vec<u8> {
    const PIECE: usize = 1 << 16;
    let mut bytes = vec![0u8; 2 * values.len()];
    bytes.par_chunks_mut(2 * PIECE).zip(values.par_chunks(PIECE)).for_each(|(to, from)| {
        for (to, value) in to.chunks_exact_mut(2).zip(from) {
            let bits = value.to_bits();
            let nearest = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16;
            let number = if bits & 0x7fff_ffff > 0x7f80_0000 { bits >> 16 | 0x40 } else { nearest };
            to.copy_from_slice(&(number as u16).to_le_bytes());
        }
    });
    bytes
}

/// The linears outside the blocks and all norm weights, where the device reads them: in its memory, or some of what few rows go through in
/// page-locked memory of the host.
#[derive(Debug)]
pub struct Other {
    linears: HashMap<String, Mat>,
    norms: HashMap<String, Ptr>,
    /// Where some of the linears are.
    host: Option<Pinned>,
    /// Bytes that the device has read there.
    read_bytes: Cell<u64>,
}

impl Other {
    /// Copies the host's weights: the first `hosted` of [`CONDITIONING`] into `memory`.
    ///
    /// # Errors
    /// If there is not so much memory left; the driver's.
    pub fn upload(
        gpu: &Gpu,
        r: &dyn Reserve,
        (g, ty): (&TransformerGeometry, Ty),
        host: &OtherWeights,
        (hosted, mut memory): (usize, Option<Pinned>),
    ) -> Result<Self> {
        let (mut linears, mut end, unused) = (HashMap::new(), 0, Event::new(gpu.context())?);
        for spec in g.other_linears() {
            let bytes = bytes_of(host.linear(&spec.name)?, ty)?;
            let there = CONDITIONING.iter().take(hosted).any(|name| *name == spec.name);
            let mat = match memory.as_mut().filter(|_| there) {
                Some(memory) => {
                    memory.write_after(&unused, end, &bytes)?;
                    let ptr = memory.device_ptr().offset(end);
                    end += bytes.len().next_multiple_of(ALIGNMENT);
                    Mat::new(ptr, ty, spec.out_features, spec.in_features)
                }
                None => {
                    let mat = r.mat(ty, spec.out_features, spec.in_features)?;
                    gpu.upload(mat.ptr, &bytes)?;
                    mat
                }
            };
            linears.insert(spec.name, mat);
        }
        let mut norms = HashMap::new();
        for block in g.blocks() {
            for norm in g.block_norms(block) {
                let ptr = r.bytes(4 * g.attention_head_dim)?;
                gpu.upload(ptr, &bytes_of(host.norm(g, block, norm)?, Ty::F32)?)?;
                norms.insert(format!("{}.{norm}", g.block_prefix(block)), ptr);
            }
        }
        Ok(Self { linears, norms, host: memory, read_bytes: Cell::new(0) })
    }

    /// Bytes that the device has read on the host since the start.
    #[must_use]
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes.get()
    }

    /// A linear by its full name without `.weight`.
    ///
    /// # Errors
    /// [`Error::Invariant`] if there is none.
    pub fn linear(&self, name: &str) -> Result<Mat> {
        self.linears.get(name).copied().ok_or_else(|| Error::invariant(format!("there is no linear '{name}' outside the blocks")))
    }

    /// A norm weight of a block.
    ///
    /// # Errors
    /// [`Error::Invariant`] if there is none.
    pub fn norm(&self, g: &TransformerGeometry, block: BlockId, name: &str) -> Result<Ptr> {
        let full = format!("{}.{name}", g.block_prefix(block));
        self.norms.get(&full).copied().ok_or_else(|| Error::invariant(format!("there is no norm '{full}'")))
    }
}

/// One modulation set, `[B, D]` float32 each: views of one matrix.
#[derive(Debug, Clone, Copy)]
pub struct Modulation {
    /// Added after the norm.
    pub shift: Mat,
    /// Multiplies the norm's result as `1 + scale`.
    pub scale: Mat,
    /// Multiplies what is added to the residual stream.
    pub gate: Mat,
}

impl Modulation {
    fn of(all: Mat, first: usize, d: usize) -> Result<Self> {
        Ok(Self { shift: all.columns(first, d)?, scale: all.columns(first + d, d)?, gate: all.columns(first + 2 * d, d)? })
    }
}

/// Modulation of one stream of the double blocks.
#[derive(Debug, Clone, Copy)]
pub struct StreamModulation {
    /// Around attention.
    pub attention: Modulation,
    /// Around the feed-forward part.
    pub mlp: Modulation,
}

impl StreamModulation {
    fn of(all: Mat, d: usize) -> Result<Self> {
        Ok(Self { attention: Modulation::of(all, 0, d)?, mlp: Modulation::of(all, 3 * d, d)? })
    }
}

/// Time, guidance and what is made of them: a row for each sample of a step, float32.
#[derive(Debug, Clone, Copy)]
pub struct Embedded {
    /// Embedding of time and guidance, `[B, D]`.
    pub temb: Mat,
    wave: Mat,
    hidden: Mat,
    /// Both streams', the single blocks' and the final norm's modulation.
    sets: [Mat; 4],
}

impl Embedded {
    /// Reserves it for so many samples.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn new(r: &dyn Reserve, g: &TransformerGeometry, samples: usize) -> Result<Self> {
        let d = g.inner_dim();
        let mat = |cols: usize| r.mat(Ty::F32, samples, cols);
        Ok(Self {
            temb: mat(d)?,
            wave: mat(g.timestep_guidance_channels)?,
            hidden: mat(d)?,
            sets: [mat(6 * d)?, mat(6 * d)?, mat(3 * d)?, mat(2 * d)?],
        })
    }

    /// Those of `count` samples from `first` on.
    ///
    /// # Errors
    /// [`Error::Invariant`] beyond the last.
    pub fn rows(&self, first: usize, count: usize) -> Result<Self> {
        let of = |m: Mat| m.rows(first, count);
        let [image, text, single, out] = self.sets;
        Ok(Self {
            temb: of(self.temb)?,
            wave: of(self.wave)?,
            hidden: of(self.hidden)?,
            sets: [of(image)?, of(text)?, of(single)?, of(out)?],
        })
    }

    /// Computes it, in float32 whatever the activations are: it is used by every block, and its few rows cost no more than reading the weights.
    /// A row depends on no other. `samples` has a timestep and a guidance of each.
    ///
    /// # Errors
    /// The engine's.
    pub fn fill(&self, c: &Context<'_>, g: &TransformerGeometry, other: &Other, samples: &[(f32, Option<f32>)]) -> Result<()> {
        let timesteps: Vec<f32> = samples.iter().map(|s| s.0).collect();
        self.embed(c, g, other, "timestep_embedder", &timesteps, false)?;
        let mut first = 0;
        for run in samples.chunk_by(|a, b| a.1.is_some() == b.1.is_some()) {
            let guidance: Vec<f32> = run.iter().filter_map(|s| s.1).collect();
            if g.guidance_embeds && !guidance.is_empty() {
                self.rows(first, run.len())?.embed(c, g, other, "guidance_embedder", &guidance, true)?;
            }
            first += run.len();
        }
        let reads = samples.len().div_ceil(LINEAR_ROWS) as u64;
        other.read_bytes.set(other.read_bytes.get() + reads * other.host.as_ref().map_or(0, |h| h.bytes() as u64));
        let names = ["double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation", "norm_out"];
        c.pass(|gpu| gpu.silu(self.hidden, self.temb))?;
        for (name, set) in names.into_iter().zip(self.sets) {
            let weight = other.linear(&format!("{name}.linear"))?;
            c.product(|gpu| gpu.linear_f32(set, self.hidden, weight, false))?;
        }
        Ok(())
    }

    fn embed(&self, c: &Context<'_>, g: &TransformerGeometry, other: &Other, name: &str, values: &[f32], add: bool) -> Result<()> {
        // On the host: the waves' last bit counts, and they are few.
        let waves = sinusoid(values, g.timestep_guidance_channels, &Device::Cpu).map_err(|e| tensor_error("cannot embed the time", e))?;
        c.gpu.upload(self.wave.ptr, &bytes_of(&waves, Ty::F32)?)?;
        let linear = |part: &str| other.linear(&format!("time_guidance_embed.{name}.{part}"));
        let (first, second) = (linear("linear_1")?, linear("linear_2")?);
        c.product(|gpu| gpu.linear_f32(self.hidden, self.wave, first, false))?;
        c.pass(|gpu| gpu.silu(self.hidden, self.hidden))?;
        c.product(|gpu| gpu.linear_f32(self.temb, self.hidden, second, add))
    }
}

/// Everything that a block needs besides weights and hidden states.
#[derive(Debug, Clone, Copy)]
pub struct Conditioning {
    /// Embedding of time and guidance, `[B, D]` float32.
    pub temb: Mat,
    /// Image stream of the double blocks.
    pub image: StreamModulation,
    /// Text stream of the double blocks.
    pub text: StreamModulation,
    /// Single blocks.
    pub single: Modulation,
    /// Of the final norm, `[B, D]` float32.
    pub out_scale: Mat,
    /// Of the final norm, `[B, D]` float32.
    pub out_shift: Mat,
    /// Cosines of the joint sequence, `[T, d / 2]` float32.
    pub cos: Mat,
    /// Sines of it.
    pub sin: Mat,
}

impl Conditioning {
    /// Reserves the rotary tables beside what is `embedded` of these samples.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn new(r: &dyn Reserve, s: &Shape, embedded: &Embedded) -> Result<Self> {
        let ([image, text, single, out], d) = (embedded.sets, s.inner);
        let table = || r.mat(Ty::F32, s.tokens(), s.head_dim / 2);
        Ok(Self {
            temb: embedded.temb,
            image: StreamModulation::of(image, d)?,
            text: StreamModulation::of(text, d)?,
            single: Modulation::of(single, 0, d)?,
            // diffusers' order.
            out_scale: out.columns(0, d)?,
            out_shift: out.columns(d, d)?,
            cos: table()?,
            sin: table()?,
        })
    }

    /// Copies the tables of the joint sequence.
    ///
    /// # Errors
    /// The engine's.
    pub fn turn(&self, c: &Context<'_>, cos: &Tensor, sin: &Tensor) -> Result<()> {
        c.gpu.upload(self.cos.ptr, &bytes_of(cos, Ty::F32)?)?;
        c.gpu.upload(self.sin.ptr, &bytes_of(sin, Ty::F32)?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn bytes_are_those_of_the_plain_conversion() {
        let special = [
            0.0,
            -0.0,
            1.0,
            -1.5,
            f32::MAX,
            f32::MIN_POSITIVE,
            1e-40,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            1.003_906_2,
            1.011_718_8,
        ];
        let values: Vec<f32> = special.into_iter().chain((0..200_000u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b1)))).collect();
        let tensor = Tensor::from_vec(values.clone(), values.len(), &Device::Cpu).unwrap();
        let expected: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        assert!(bytes_of(&tensor, Ty::Bf16).unwrap() == expected);
        let exact: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        assert!(bytes_of(&tensor, Ty::F32).unwrap() == exact);
        // Views, other types.
        let half = tensor.narrow(0, 5, 1000).unwrap();
        assert!(bytes_of(&half, Ty::F32).unwrap() == exact[20..4020]);
        let turned = tensor.narrow(0, 0, 1000).unwrap().reshape((10, 100)).unwrap().t().unwrap();
        let flat = turned.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(bytes_of(&turned, Ty::F32).unwrap() == flat.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
        let small = half.to_dtype(DType::BF16).unwrap();
        assert!(bytes_of(&small, Ty::Bf16).unwrap() == expected[10..2010]);
        assert_eq!(bytes_of(&small, Ty::F32).unwrap().len(), 4000);
    }
}
