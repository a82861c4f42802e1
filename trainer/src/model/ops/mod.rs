//! The operations of a block, each with its forward and its backward function.
//!
//! Every file here is one operation that a device may fuse into one kernel; the blocks only ever call these functions. They work on the
//! compute dtype at their edges and in float32 inside wherever statistics, rotations or products of more than two factors are involved,
//! and round once. No function returns the gradient of a frozen tensor (weight, norm weight, modulation): there is none to call.

pub mod attention;
mod cpu;
pub mod gate;
pub mod gemm;
pub mod layer_norm;
pub mod linear;
pub mod qk_norm_rope;
pub mod rope;
pub mod swiglu;

#[cfg(test)]
mod tests;
