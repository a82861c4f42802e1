//! The training step on a CUDA device: the math of [`crate::model`], operation by operation, on the engine of `serenity-cuda`.
//!
//! ```text
//! plan          how much memory each part takes, before any is taken
//! blocks        block buffers on the device, filled by the copy stream from a supply (the ring, or host memory)
//! conditioning  time, modulation, rotary tables of a micro-batch
//! linear        a frozen matrix (INT8, bf16 or float32) with its LoRA branch, forward and backward
//! single, double  one visit of a block
//! adapters      parameters, gradients and moments on the device, and the optimiser
//! step          all blocks forward and back, layer-major over micro-batches
//! check         everything above against the CPU path and the reference's files
//! ```
//! Results do not depend on where weights come from: which blocks stay on the device, how many buffers there are and which form the payload
//! has change the order of copies only. Matrices are multiplied in tiles whose size depends on the matrix alone, for the same reason.
//!
//! The host queues work and never waits in the middle of a step, except for a chunk that the loader has not delivered.
#![forbid(unsafe_code)]

pub mod adapters;
pub mod attention;
pub mod blocks;
pub mod check;
pub mod clock;
pub mod conditioning;
pub mod double;
pub mod linear;
pub mod plan;
pub mod single;
pub mod step;

pub use step::CudaStep;
