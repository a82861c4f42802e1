//! The FLUX.2 transformer, block by block, forward and backward (`spec`: diffusers' `transformer_flux2.py`).
//!
//! The path of a step: `flux2` (layer-major over micro-batches) → `double_block` and `single_block` → [`ops`]. Frozen weights come
//! from a [`BlockSource`] and leave again; what stays is [`OtherWeights`], the [`AdapterSet`] and the inputs of the blocks. The backward
//! pass is derived by hand, because that of a tensor library would compute (and allocate) gradients of frozen weights.

#![forbid(unsafe_code)]

mod adapter;
mod batch;
pub(crate) mod block;
mod checkpoint_source;
mod conditioning;
pub(crate) mod double_block;
mod flux2;
pub mod ops;
mod other;
pub(crate) mod single_block;
mod weights;

pub use adapter::{Adapter, AdapterGrads, AdapterSet};
pub use batch::{MicroBatch, StepOutput};
pub use checkpoint_source::{CheckpointSource, TensorReader};
pub use conditioning::{Conditioning, Modulation, Positions, StreamModulation, sinusoid};
pub use double_block::Streams;
pub use flux2::{Flux2, Hidden, Inputs, Observer};
pub use other::OtherWeights;
pub use weights::{BlockSource, BlockWeights};

use serenity_protocol::Error;

/// An error of the tensor library, with what was being done. Shapes are checked before tensors are combined, so it is a defect.
#[must_use]
pub fn tensor_error(what: &str, cause: candle_core::Error) -> Error {
    Error::invariant(what).cause(cause)
}

#[cfg(test)]
mod tests;
