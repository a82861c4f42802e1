//! Blocks read from an unquantised checkpoint at every visit, in full precision: for parity runs and tests.

use std::collections::VecDeque;
use std::sync::Arc;

use candle_core::{DType, Device};
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::{Error, Result};

use super::{BlockSource, BlockWeights};

/// Reads a tensor by its diffusers name (with `.weight`) and shape, row-major float32.
pub type TensorReader<'r> = Box<dyn FnMut(&str, &[usize]) -> Result<Vec<f32>> + 'r>;

/// A [`BlockSource`] that keeps nothing: memory is that of one block.
pub struct CheckpointSource<'r> {
    geometry: TransformerGeometry,
    device: Device,
    dtype: DType,
    read: TensorReader<'r>,
    announced: VecDeque<BlockId>,
}

impl<'r> CheckpointSource<'r> {
    /// Reads through `read`, e.g. `|name, shape| transformer_source.tensor_f32(name, shape)`.
    #[must_use]
    pub fn new(geometry: TransformerGeometry, device: Device, dtype: DType, read: TensorReader<'r>) -> Self {
        Self { geometry, device, dtype, read, announced: VecDeque::new() }
    }
}

impl BlockSource for CheckpointSource<'_> {
    fn request(&mut self, visits: &[BlockId]) -> Result<()> {
        self.announced.extend(visits);
        Ok(())
    }

    fn next(&mut self, block: BlockId) -> Result<Arc<BlockWeights>> {
        let announced = self.announced.pop_front();
        if announced != Some(block) {
            return Err(Error::invariant("a block was asked for that was not the next announced one")
                .expected(format!("{announced:?}"))
                .found(format!("{block:?}")));
        }
        let mut rows = Vec::new();
        for spec in self.geometry.block_linears(block) {
            rows.push((self.read)(&format!("{}.weight", spec.name), &[spec.out_features, spec.in_features])?);
        }
        BlockWeights::from_f32(&self.geometry, block, rows, &self.device, self.dtype).map(Arc::new)
    }
}
