//! Where hidden states wait between two layers: in memory, or in one nameless file when the dataset outgrows the budget.
//!
//! A pack is put away after every layer and taken up again before the next, always whole and always in the same order, so that the file is
//! read and written from front to back. The file has no name: whatever ends the process, the disk is free again.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use serenity_protocol::{Error, Result};

use crate::tensor::{failed, upload_as};

/// What a stored tensor belongs to: its pack, and which of its states.
pub(super) type Slot = (usize, usize);

/// Tensors by slot, each overwritten in place.
pub(super) enum HiddenStore {
    Memory(HashMap<Slot, Tensor>),
    File { file: File, folder: PathBuf, end: u64, places: HashMap<Slot, Place> },
}

/// A stored tensor.
#[derive(Clone, Copy)]
pub(super) struct Place {
    offset: u64,
    bytes: usize,
    shape: (usize, usize),
    dtype: DType,
}

impl HiddenStore {
    pub fn memory() -> Self {
        Self::Memory(HashMap::new())
    }

    /// A store in a nameless file in `folder`.
    pub fn file(folder: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(folder).map_err(|e| Error::io("cannot create a file for hidden states", folder, e))?;
        Ok(Self::File { file, folder: folder.to_path_buf(), end: 0, places: HashMap::new() })
    }

    /// Puts `tensor [rows, features]` away; a slot keeps its size.
    pub fn put(&mut self, slot: Slot, tensor: &Tensor) -> Result<()> {
        match self {
            Self::Memory(slots) => drop(slots.insert(slot, tensor.clone())),
            Self::File { file, folder, end, places } => {
                let _span = tracing::trace_span!("spill").entered();
                let bytes = bytes_of(tensor)?;
                let shape = tensor.dims2().map_err(failed("storing a hidden state"))?;
                let offset = places.get(&slot).map_or(*end, |p| p.offset);
                if places.get(&slot).is_some_and(|p| p.bytes != bytes.len()) {
                    return Err(Error::invariant("a stored hidden state changed its size"));
                }
                file.write_all_at(&bytes, offset).map_err(|e| Error::io("cannot store hidden states", &folder, e))?;
                *end = (*end).max(offset + bytes.len() as u64);
                places.insert(slot, Place { offset, bytes: bytes.len(), shape, dtype: tensor.dtype() });
            }
        }
        Ok(())
    }

    /// Takes a tensor up again, on `device`.
    pub fn take(&mut self, slot: Slot, device: &Device) -> Result<Tensor> {
        let missing = || Error::invariant("a hidden state was not kept").found(format!("{slot:?}"));
        match self {
            Self::Memory(slots) => slots.remove(&slot).ok_or_else(missing)?.to_device(device).map_err(failed("moving a hidden state")),
            Self::File { file, folder, places, .. } => {
                let place = *places.get(&slot).ok_or_else(missing)?;
                let mut bytes = vec![0; place.bytes];
                file.read_exact_at(&mut bytes, place.offset).map_err(|e| Error::io("cannot read stored hidden states", folder, e))?;
                upload_as(&bytes, place.dtype, &[place.shape.0, place.shape.1], device, place.dtype)
            }
        }
    }
}

/// The bytes of a tensor on the host.
pub(super) fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>> {
    let wrong = failed("storing a hidden state");
    let flat = tensor.flatten_all().map_err(&wrong)?;
    // One at a time into place: an iterator over single bytes is ten times as slow.
    Ok(match tensor.dtype() {
        DType::BF16 => {
            let values = flat.to_vec1::<bf16>().map_err(&wrong)?;
            let mut bytes = vec![0u8; 2 * values.len()];
            bytes.chunks_exact_mut(2).zip(values).for_each(|(to, v)| to.copy_from_slice(&v.to_le_bytes()));
            bytes
        }
        DType::F32 => {
            let values = flat.to_vec1::<f32>().map_err(&wrong)?;
            let mut bytes = vec![0u8; 4 * values.len()];
            bytes.chunks_exact_mut(4).zip(values).for_each(|(to, v)| to.copy_from_slice(&v.to_le_bytes()));
            bytes
        }
        other => return Err(Error::invariant("hidden states have a type that is not stored").found(format!("{other:?}"))),
    })
}
