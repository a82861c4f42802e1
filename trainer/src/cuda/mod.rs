//! The training step on a CUDA device: the math of [`crate::model`], operation by operation, on the engine of `serenity-cuda`.
//!
//! ```text
//! plan          how much memory each part takes, before any is taken
//! assignment    which slots of memory each visit of a block uses
//! blocks        slots on the device, filled by the copy stream from a supply (the ring, or host memory)
//! inputs        inputs of the blocks between the passes: on the device, or on the host and back in time
//! conditioning  time, modulation, rotary tables of a micro-batch
//! tiles         frozen matrices in the activations' type, ahead of the products
//! linear        a frozen matrix (INT8, bf16 or float32) with its LoRA branch, forward and backward
//! single, double  one visit of a block
//! adapters      parameters, gradients and moments on the device, and the optimiser
//! flight        a micro-batch on its way through a step
//! passes        all blocks forward and back, layer-major over micro-batches
//! step          gradients, norm, update
//! bench_rows    the rows of the targets table
//! check         everything above against the CPU path and the reference's files
//! ```
//! Results do not depend on where things lie: which blocks stay on the device, how many slots there are, where block inputs are kept and which
//! form the payload has change the order of copies only. Matrices are multiplied in tiles whose size depends on the matrix alone, for the same reason.
//!
//! The host queues work and never waits in the middle of a step, except for a chunk that the loader has not delivered.
#![forbid(unsafe_code)]

pub mod adapters;
pub mod assignment;
pub mod attention;
pub mod bench_rows;
pub mod blocks;
pub mod check;
pub mod clock;
pub mod conditioning;
pub mod double;
pub mod flight;
pub mod inputs;
pub mod linear;
mod passes;
pub mod plan;
pub mod rates;
pub mod single;
pub mod step;
pub mod tiles;

pub use step::CudaStep;
