//! What the two kinds of block share: dimensions, and a block's weights paired with its adapters.

use candle_core::{DType, Tensor};
use serenity_protocol::Result;
use serenity_protocol::geometry::{BlockId, TransformerGeometry};

use super::ops::linear::{Linear, Lora};
use super::{AdapterSet, BlockWeights, OtherWeights, tensor_error};

/// Sizes that the operations of a block need.
#[derive(Debug, Clone, Copy)]
pub struct Dims {
    /// D, `heads * head_dim`.
    pub inner: usize,
    /// M, the feed-forward width.
    pub mlp: usize,
    /// Attention heads.
    pub heads: usize,
    /// Epsilon of every norm.
    pub eps: f64,
}

/// A block's frozen weights with the adapters that belong to them.
pub struct BlockView<'w> {
    /// Geometry of the model.
    pub geometry: &'w TransformerGeometry,
    /// Which block.
    pub block: BlockId,
    /// Its frozen linears.
    pub weights: &'w BlockWeights,
    /// Where its norm weights are.
    pub other: &'w OtherWeights,
    /// All adapters.
    pub adapters: &'w AdapterSet,
}

impl<'w> BlockView<'w> {
    /// Sizes of the model.
    #[must_use]
    pub fn dims(&self) -> Dims {
        let g = self.geometry;
        Dims { inner: g.inner_dim(), mlp: g.mlp_dim(), heads: g.num_attention_heads, eps: g.eps }
    }

    /// The linear of that name within the block, its adapter cast to the compute dtype.
    pub fn linear(&self, name: &str) -> Result<Linear<'w>> {
        let weight = self.weights.linear(name)?;
        let full = format!("{}.{name}", self.geometry.block_prefix(self.block));
        let Some((index, adapter)) = self.adapters.index_of(&full).and_then(|i| Some((i, self.adapters.adapters.get(i)?))) else {
            return Ok(Linear { weight, lora: None });
        };
        let cast =
            |t: &Tensor, dtype: DType| t.to_dtype(dtype).map_err(|e| tensor_error(&format!("cannot cast the adapter of '{full}'"), e));
        let (a, b) = (cast(&adapter.a, weight.dtype())?, cast(&adapter.b, weight.dtype())?);
        Ok(Linear { weight, lora: Some(Lora { index, a, b, scale: self.adapters.scale() }) })
    }

    /// The norm weight of that name within the block.
    pub fn norm(&self, name: &str) -> Result<&'w Tensor> {
        self.other.norm(self.geometry, self.block, name)
    }
}
