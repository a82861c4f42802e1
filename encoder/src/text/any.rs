//! The text encoder on whichever device it was opened for.

use candle_core::{DType, Device};
use serenity_cuda::{Gpu, Ty};
use serenity_protocol::Result;
use serenity_protocol::cache::text_model::TextGeometry;
use serenity_protocol::config::DeviceKind;
use serenity_protocol::slab::text_encoder::TextModel;

use super::cuda::{CudaTextEncoder, Settings};
use super::encode::{Embedding, EncodeTimes, Encoded, Hidden, Task, TextEncoder, together};
use crate::tokenizer::Tokens;

/// A text encoder whose weights stay on disk.
#[allow(clippy::large_enum_variant)] // one of a kind
pub enum AnyTextEncoder {
    /// On the processor, in float32.
    Cpu(TextEncoder),
    /// On a GPU.
    Cuda(CudaTextEncoder),
}

impl AnyTextEncoder {
    /// Opens a text encoder (a path is a checkpoint's) for `device`: float32 on the processor, on a GPU bf16 or what `ty` says, with at most `bytes_max` bytes of its
    /// memory.
    ///
    /// # Errors
    /// As [`TextEncoder::open`] and [`CudaTextEncoder::open`].
    pub fn open<'m>(
        model: impl Into<TextModel<'m>>,
        device: DeviceKind,
        ty: Option<Ty>,
        bytes_max: Option<u64>,
        readers: Option<usize>,
    ) -> Result<Self> {
        match device {
            DeviceKind::Cpu => {
                // bf16 on the processor is for comparison: the same rounding without a GPU.
                let dtype = if ty == Some(Ty::Bf16) { DType::BF16 } else { DType::F32 };
                TextEncoder::open(model, Device::Cpu, dtype).map(Self::Cpu)
            }
            DeviceKind::Cuda(ordinal) => {
                CudaTextEncoder::open(model, Settings { ordinal, ty: ty.unwrap_or(Ty::Bf16), bytes_max, readers }).map(Self::Cuda)
            }
        }
    }

    /// Its geometry.
    #[must_use]
    pub fn geometry(&self) -> &TextGeometry {
        match self {
            Self::Cpu(encoder) => encoder.geometry(),
            Self::Cuda(encoder) => encoder.geometry(),
        }
    }

    /// What it computes in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        match self {
            Self::Cpu(encoder) => encoder.dtype(),
            Self::Cuda(encoder) => encoder.dtype(),
        }
    }

    /// The GPU, if it is one.
    #[must_use]
    pub fn gpu(&self) -> Option<&Gpu> {
        match self {
            Self::Cpu(_) => None,
            Self::Cuda(encoder) => Some(encoder.gpu()),
        }
    }

    /// Bytes that a token of a pass keeps on the host: its running state and the kept ones in type `keep`.
    #[must_use]
    pub fn bytes_per_token(&self, keep: DType) -> usize {
        let g = self.geometry();
        g.hidden * self.dtype().size_in_bytes() + g.features() * keep.size_in_bytes()
    }

    /// Runs `captions` through the encoder in one pass over the weights; see [`TextEncoder::encode_to`].
    ///
    /// # Errors
    /// As there and in [`CudaTextEncoder::encode_to`].
    pub fn encode_to(
        &self,
        captions: &[Tokens],
        pad_id: u32,
        task: &Task,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
        sink: &mut dyn FnMut(usize, Embedding, &Embedding) -> Result<()>,
    ) -> Result<EncodeTimes> {
        match self {
            Self::Cpu(encoder) => encoder.encode_to(captions, pad_id, task, progress, sink),
            Self::Cuda(encoder) => encoder.encode_to(captions, pad_id, task, progress, sink),
        }
    }

    /// All embeddings together, hidden states in memory.
    ///
    /// # Errors
    /// As [`Self::encode_to`].
    pub fn encode(
        &self,
        captions: &[Tokens],
        pad_id: u32,
        states: [usize; 3],
        max_length: usize,
        keep: DType,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<Encoded> {
        let task = Task { states, max_length, keep, hidden: Hidden::Memory };
        together(captions.len(), |sink| self.encode_to(captions, pad_id, &task, progress, sink))
    }
}
