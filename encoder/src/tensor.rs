//! The border to the tensor library: devices, checkpoint tensors, errors with context.

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use serenity_protocol::checkpoint::{Checkpoint, TensorRef};
use serenity_protocol::{Error, Result};

/// Turns an error of the tensor library into ours: shapes are checked when weights are loaded, so what is left is the device's doing
/// (out of memory, a failed launch) or a defect.
pub fn failed(what: &'static str) -> impl Fn(candle_core::Error) -> Error {
    move |e| {
        let text = e.to_string();
        if text.contains("OUT_OF_MEMORY") || text.contains("out of memory") {
            return Error::try_again(format!("the device ran out of memory: {what}"))
                .cause(text)
                .advice("free device memory (other processes?), or lower the resolution");
        }
        Error::invariant(format!("a computation failed: {what}")).cause(text)
    }
}

/// The tensor `name` of that shape in `dtype` on `device`.
///
/// # Errors
/// [`Error::Data`] if it is missing, of another shape or no float tensor.
pub fn load(checkpoint: &Checkpoint, name: &str, shape: &[usize], device: &Device, dtype: DType) -> Result<Tensor> {
    let tensor = checkpoint.tensor_of_shape(name, shape)?;
    upload(&tensor, tensor.bytes(), shape, device, dtype).map_err(|e| e.at(checkpoint.root()).found(format!("tensor '{name}'")))
}

/// `bytes` of `tensor`'s type as a tensor of `shape`.
///
/// # Errors
/// [`Error::Data`] if the type is no float type that is supported (FP8 checkpoints carry scales that would be ignored).
pub fn upload(tensor: &TensorRef, bytes: &[u8], shape: &[usize], device: &Device, dtype: DType) -> Result<Tensor> {
    let stored = stored_type(tensor.dtype)?;
    upload_as(bytes, stored, shape, device, dtype)
}

/// The tensor library's name of a float type.
///
/// # Errors
/// [`Error::Data`] for any other type (FP8 checkpoints carry scales that would be ignored).
pub fn stored_type(dtype: Dtype) -> Result<DType> {
    match dtype {
        Dtype::F32 => Ok(DType::F32),
        Dtype::BF16 => Ok(DType::BF16),
        Dtype::F16 => Ok(DType::F16),
        other => Err(Error::data(format!("a weight has type {other:?}"))
            .expected("F32, BF16 or F16")
            .advice("use the original weights: quantised or FP8 encoders are not supported")),
    }
}

/// `bytes` of type `stored` as a tensor of `shape` in `dtype`.
///
/// # Errors
/// A failure of the tensor library.
pub fn upload_as(bytes: &[u8], stored: DType, shape: &[usize], device: &Device, dtype: DType) -> Result<Tensor> {
    Tensor::from_raw_buffer(bytes, stored, shape, device).and_then(|t| t.to_dtype(dtype)).map_err(failed("uploading weights"))
}
