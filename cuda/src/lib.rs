//! The CUDA engine: everything between the trainer's block backward and the driver.
//!
//! It owns its memory and its order of work: one arena taken at start, so that nothing is allocated in steady state and the driver's figure
//! stays flat; a compute stream and a copy stream that meet in events only; matrix products from cuBLASLt with one algorithm per shape;
//! kernels of its own, compiled for the device at start. Every operation takes activations in bf16 (float32 arithmetic inside, one rounding
//! at the end) and in float32 (for comparison with references; no TF32). No operation uses float atomics: two runs give equal bytes.
//!
//! The crate builds, and its checks compile, on a machine without CUDA: libraries are found when [`Gpu::open`] is called, and a missing one
//! is an error that names it. Unsafe code lives in [`driver`], [`blas`], [`nvrtc`], [`libraries`] and `attention::cudnn` (each a thin safe floor over one
//! foreign library); everything above is safe Rust. `serenity-gpu-check` compares every operation with a plain CPU computation.
//!
//! Failure: a device that runs out of memory is `Error::TryAgain`, a missing library or device `Error::Absent`, a fault inside a kernel
//! `Error::Invariant` (the context is then lost, and the process should end after writing its checkpoint).
#![warn(missing_docs)]

pub mod arena;
pub mod attention;
pub mod blas;
pub mod check;
pub mod driver;
pub mod gemm;
pub mod gpu;
pub mod host;
pub mod kernels;
pub mod libraries;
pub mod mat;
pub mod nvrtc;
pub mod ops;
pub mod tuning;

pub use arena::{Arena, Mark};
pub use driver::{Arg, Event, Pinned, Ptr, Stream};
pub use gpu::{Gpu, MemoryInfo, Properties};
pub use host::HostSource;
pub use mat::{Mat, Ty};
pub use tuning::{Side, Tuning};
