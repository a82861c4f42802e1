//! What stays resident: the linears outside the blocks and every norm weight. 1.6 GB in bf16 for dev.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::{Error, Result};

use super::tensor_error;

/// The linears outside the blocks (compute dtype, `[out, in]`) and all QK norm weights (`[head_dim]`, float32: the norm computes in it).
#[derive(Debug, Clone)]
pub struct OtherWeights {
    device: Device,
    dtype: DType,
    linears: HashMap<String, Tensor>,
    norms: HashMap<String, Tensor>,
}

impl OtherWeights {
    /// Loads every tensor of `geometry` that is no block linear through `read(full name with .weight, shape)`, row-major float32.
    ///
    /// `through_bf16` rounds each value to bf16 first, which is what a slab's companion file holds: a run from the checkpoint and one
    /// from the slab then see the same numbers. Parity runs pass `false`.
    ///
    /// # Errors
    /// What `read` returns, or [`Error::Data`] if it returns another number of values than the shape has.
    pub fn load(
        geometry: &TransformerGeometry,
        device: &Device,
        dtype: DType,
        through_bf16: bool,
        mut read: impl FnMut(&str, &[usize]) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let mut place = |name: &str, shape: &[usize], dtype: DType| -> Result<Tensor> {
            let mut values = read(name, shape)?;
            if values.len() != shape.iter().product::<usize>() {
                return Err(Error::data(format!("tensor '{name}' has a wrong number of values"))
                    .expected(format!("{shape:?}"))
                    .found(values.len()));
            }
            if through_bf16 {
                values.iter_mut().for_each(|v| *v = half::bf16::from_f32(*v).to_f32());
            }
            Tensor::from_vec(values, shape, &Device::Cpu)
                .and_then(|t| t.to_dtype(dtype)?.to_device(device))
                .map_err(|e| tensor_error(&format!("cannot place '{name}' on the device"), e))
        };
        let mut linears = HashMap::new();
        for spec in geometry.other_linears() {
            let tensor = place(&format!("{}.weight", spec.name), &[spec.out_features, spec.in_features], dtype)?;
            linears.insert(spec.name, tensor);
        }
        let mut norms = HashMap::new();
        for block in geometry.blocks() {
            let prefix = geometry.block_prefix(block);
            for norm in geometry.block_norms(block) {
                let name = format!("{prefix}.{norm}");
                let tensor = place(&format!("{name}.weight"), &[geometry.attention_head_dim], DType::F32)?;
                norms.insert(name, tensor);
            }
        }
        Ok(Self { device: device.clone(), dtype, linears, norms })
    }

    /// Device of the tensors.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Compute dtype of the linears.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes on the device.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.linears.values().chain(self.norms.values()).map(|t| (t.elem_count() * t.dtype().size_in_bytes()) as u64).sum()
    }

    /// A linear by its full name without `.weight`, e.g. `x_embedder`.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the geometry has none of that name.
    pub fn linear(&self, name: &str) -> Result<&Tensor> {
        self.linears.get(name).ok_or_else(|| Error::invariant(format!("there is no linear '{name}' outside the blocks")))
    }

    /// A norm weight of a block, e.g. `attn.norm_q`.
    ///
    /// # Errors
    /// [`Error::Invariant`] if that kind of block has none of that name.
    pub fn norm(&self, geometry: &TransformerGeometry, block: BlockId, name: &str) -> Result<&Tensor> {
        let full = format!("{}.{name}", geometry.block_prefix(block));
        self.norms.get(&full).ok_or_else(|| Error::invariant(format!("there is no norm '{full}'")))
    }
}
