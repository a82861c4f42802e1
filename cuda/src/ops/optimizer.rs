//! AdamW over all adapters in one launch, with clipping by the global gradient norm, as the CPU's optimiser computes both.
//!
//! Addresses of all tensors lie in a table on the device that is written once. The norm is summed in float64 in a fixed order of chunks.
#![forbid(unsafe_code)]

use serenity_protocol::config::OptimizerConfig;
use serenity_protocol::{Error, Result};

use super::BLOCK;
use crate::arena::Arena;
use crate::driver::Ptr;
use crate::gpu::Gpu;

/// Elements of a block's chunk, `CHUNK` in the sources.
const CHUNK: usize = 4096;

/// One trained tensor with its state, all float32 of `len` elements.
#[derive(Debug, Clone, Copy)]
pub struct Trained {
    /// The values.
    pub parameter: Ptr,
    /// Their gradients.
    pub gradient: Ptr,
    /// First moments.
    pub first: Ptr,
    /// Second moments.
    pub second: Ptr,
    /// A bf16 copy of the values that updates keep up to date, or [`Ptr::NULL`].
    pub copy: Ptr,
    /// Elements.
    pub len: usize,
}

/// The optimiser's tables on the device.
#[derive(Debug)]
pub struct AdamW {
    config: OptimizerConfig,
    table: Ptr,
    chunks: Ptr,
    partial: Ptr,
    /// The norm, then the clipping factor, `f64`.
    norm: Ptr,
    count: u32,
}

/// Words of the chunk table: tensor and first element of each chunk.
fn chunk_table(lengths: impl Iterator<Item = usize>) -> Vec<u64> {
    lengths.enumerate().flat_map(|(i, len)| (0..len).step_by(CHUNK).flat_map(move |first| [i as u64, first as u64])).collect()
}

impl AdamW {
    /// Writes the tables of `tensors`, whose order is that of the gradient norm's sum, into `arena`.
    ///
    /// # Errors
    /// [`Error::Absent`] if the arena is full.
    pub fn new(gpu: &Gpu, arena: &Arena, config: &OptimizerConfig, tensors: &[Trained]) -> Result<Self> {
        let table: Vec<u64> = tensors
            .iter()
            .flat_map(|t| {
                [t.parameter.address(), t.gradient.address(), t.first.address(), t.second.address(), t.copy.address(), t.len as u64]
            })
            .collect();
        let chunks = chunk_table(tensors.iter().map(|t| t.len));
        let count = u32::try_from(chunks.len() / 2).map_err(|_| Error::invariant("there are too many trained values for one launch"))?;
        let words = |list: &[u64]| -> Result<Ptr> {
            let ptr = arena.reserve(size_of_val(list))?;
            gpu.upload(ptr, bytemuck::cast_slice(list))?;
            Ok(ptr)
        };
        let (table, chunks) = (words(&table)?, words(&chunks)?);
        Ok(Self { config: *config, table, chunks, partial: arena.reserve(8 * count as usize)?, norm: arena.reserve(16)?, count })
    }

    /// Queues the global gradient norm and the clipping factor (PyTorch's `clip_grad_norm_`).
    ///
    /// # Errors
    /// The driver's.
    pub fn norm(&self, gpu: &Gpu) -> Result<()> {
        gpu.launch("grad_squares", [self.count, 1, 1], BLOCK, 0, &[self.partial.into(), self.table.into(), self.chunks.into()])?;
        let args = [self.norm.into(), self.partial.into(), u64::from(self.count).into(), self.config.max_grad_norm.into()];
        gpu.launch("grad_norm", [1, 1, 1], BLOCK, 0, &args)
    }

    /// Queues update number `update` (from 1) at the learning rate `lr`, with the norm of the last [`Self::norm`]. A norm that is not finite
    /// changes nothing.
    ///
    /// # Errors
    /// The driver's.
    pub fn step(&self, gpu: &Gpu, update: u64, lr: f64) -> Result<()> {
        let _span = tracing::info_span!("optimiser").entered();
        let c = &self.config;
        // Rounded to float32 as the CPU's optimiser rounds them.
        let bias = |beta: f64| 1.0 - libm::pow(beta, update as f64);
        let constants = [
            1.0 - lr * c.weight_decay,
            c.beta1,
            1.0 - c.beta1,
            c.beta2,
            1.0 - c.beta2,
            lr / bias(c.beta1),
            libm::sqrt(bias(c.beta2)),
            c.eps,
        ];
        let mut args = vec![self.table.into(), self.chunks.into(), self.norm.into()];
        args.extend(constants.map(|v| crate::Arg::from(v as f32)));
        gpu.launch("adamw", [self.count, 1, 1], BLOCK, 0, &args)
    }

    /// Waits for the norm before clipping.
    ///
    /// # Errors
    /// A fault of earlier work.
    pub fn read_norm(&self, gpu: &Gpu) -> Result<f64> {
        let mut bytes = [0u8; 8];
        gpu.download(&mut bytes, self.norm)?;
        Ok(f64::from_le_bytes(bytes))
    }

    /// Where the norm (`f64`) lies, for an asynchronous read.
    #[must_use]
    pub fn norm_ptr(&self) -> Ptr {
        self.norm
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn chunks_cover_every_element_once() {
        let lengths = [1usize, 4096, 4097, 0, 10_000];
        let words = chunk_table(lengths.into_iter());
        let mut covered = lengths.map(|_| 0usize);
        for chunk in words.chunks_exact(2) {
            let (tensor, first) = (chunk[0] as usize, chunk[1] as usize);
            assert_eq!(first, covered[tensor], "in order, without gaps");
            covered[tensor] = (first + CHUNK).min(lengths[tensor]);
        }
        assert_eq!(covered, lengths);
    }
}
