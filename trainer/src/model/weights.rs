//! The frozen linears of one block, and where they come from.
//!
//! A block's weights are only ever borrowed: [`BlockSource::next`] hands out an `Arc` that the model drops when the block's work for all
//! micro-batches is done. The model announces its visits ahead of time so that a source can move weights while others compute.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::{Error, Result};

use super::tensor_error;

/// The linears of one block in the compute dtype, `[out, in]` each, without bias.
///
/// The norm weights of the block are tiny, are no part of a slab's payload, and live in [`super::OtherWeights`].
#[derive(Debug)]
pub struct BlockWeights {
    block: BlockId,
    /// Name within the block and weight, in the order of [`TransformerGeometry::block_linears`].
    linears: Vec<(String, Tensor)>,
}

impl BlockWeights {
    /// Takes the weights of `block` in the order of [`TransformerGeometry::block_linears`], which is the payload order of the slab.
    ///
    /// # Errors
    /// [`Error::Invariant`] if their number, a shape or a dtype is not what the geometry says.
    pub fn new(geometry: &TransformerGeometry, block: BlockId, weights: Vec<Tensor>) -> Result<Self> {
        let specs = geometry.block_linears(block);
        if specs.len() != weights.len() {
            return Err(Error::invariant(format!(
                "{} has another number of linears than its source delivered",
                geometry.block_prefix(block)
            ))
            .expected(specs.len())
            .found(weights.len()));
        }
        let prefix = geometry.block_prefix(block).len() + 1;
        let dtype = weights.first().map_or(DType::F32, Tensor::dtype);
        let mut linears = Vec::with_capacity(specs.len());
        for (spec, weight) in specs.into_iter().zip(weights) {
            if weight.dims() != [spec.out_features, spec.in_features] || weight.dtype() != dtype {
                return Err(Error::invariant(format!("the source delivered a wrong weight for '{}'", spec.name))
                    .expected(format!("[{}, {}] {dtype:?}", spec.out_features, spec.in_features))
                    .found(format!("{:?} {:?}", weight.dims(), weight.dtype())));
            }
            linears.push((spec.name.get(prefix..).unwrap_or_default().to_string(), weight));
        }
        Ok(Self { block, linears })
    }

    /// As [`Self::new`], from float32 rows on the host, moved to `device` as `dtype`.
    ///
    /// # Errors
    /// As [`Self::new`], and what the device reports.
    pub fn from_f32(geometry: &TransformerGeometry, block: BlockId, rows: Vec<Vec<f32>>, device: &Device, dtype: DType) -> Result<Self> {
        let specs = geometry.block_linears(block);
        let mut weights = Vec::with_capacity(rows.len());
        for (spec, data) in specs.iter().zip(rows) {
            let made = Tensor::from_vec(data, (spec.out_features, spec.in_features), &Device::Cpu)
                .and_then(|t| t.to_dtype(dtype)?.to_device(device))
                .map_err(|e| tensor_error(&format!("cannot place the weight of '{}'", spec.name), e))?;
            weights.push(made);
        }
        Self::new(geometry, block, weights)
    }

    /// Which block this is.
    #[must_use]
    pub fn block(&self) -> BlockId {
        self.block
    }

    /// Linears that are held in a wider type than the slab's bfloat16.
    #[must_use]
    pub fn widened(&self) -> usize {
        self.linears.iter().filter(|(_, t)| t.dtype() != DType::BF16).count()
    }

    /// The weight of the linear of that name within the block, e.g. `attn.to_q`.
    ///
    /// # Errors
    /// [`Error::Invariant`] if this kind of block has no such linear.
    pub fn linear(&self, name: &str) -> Result<&Tensor> {
        self.linears
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, t)| t)
            .ok_or_else(|| Error::invariant(format!("block {} has no linear '{name}'", self.block.0)))
    }
}

/// Delivers blocks in the order in which they were announced.
pub trait BlockSource {
    /// Announces visits to come, in order, after those announced before.
    ///
    /// # Errors
    /// Whatever the source cannot promise to deliver.
    fn request(&mut self, visits: &[BlockId]) -> Result<()>;

    /// The weights of the next announced visit, which must be to `block`. Blocks until they are there.
    ///
    /// # Errors
    /// [`Error::Invariant`] if another block was announced; what goes wrong on the way from disk.
    fn next(&mut self, block: BlockId) -> Result<Arc<BlockWeights>>;
}
