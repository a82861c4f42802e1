//! The companion of a slab: the linears outside the blocks (a text encoder's embedding) and every norm weight, bfloat16, so that training
//! needs the slab alone.
//!
//! These are the tensors that stay on the device. They are a small file (1.6 GB for dev) of plain safetensors under their diffusers
//! names, checked by its own hashes in the manifest.

use std::path::Path;

use rayon::prelude::*;
use safetensors::Dtype;
use serenity_protocol::slab::manifest::Companion;
use serenity_protocol::slab::quant;
use serenity_protocol::{Error, Result};

use super::files::{PAGE_BYTES, SlabFiles, not_finite};
use super::model::{Model, Source};
use super::plan::{FilePlan, PlanBuilder};
use super::progress::Progress;
use super::source::{SourceReader, element_bytes};
use super::writer::{FileHashes, FileWriter};

/// What the companion's tensors are stored as.
const COMPANION_DTYPE: Dtype = Dtype::BF16;
/// Values converted by one task.
const CONVERT_VALUES: usize = 1 << 16;

/// The companion file of a model.
pub struct CompanionPlan {
    /// The file.
    pub file: FilePlan,
}

impl CompanionPlan {
    /// Every tensor that is no block linear, in the order of the model.
    ///
    /// # Errors
    /// [`Error::Data`] for an impossible size.
    pub fn new(model: &Model) -> Result<Self> {
        let mut file = PlanBuilder::default();
        for (name, shape) in model.companion_tensors() {
            file.push(name, COMPANION_DTYPE, shape)?;
        }
        Ok(Self { file: file.finish(64, &[("format", "pt")])? })
    }

    /// What the manifest says of the finished file at `path`.
    ///
    /// # Errors
    /// [`Error::Config`] for a path without a UTF-8 name.
    pub fn manifest_entry(&self, path: &Path, hashes: FileHashes) -> Result<Companion> {
        let name = path.file_name().and_then(|n| n.to_str()).ok_or_else(|| Error::config("--output is no UTF-8 name").at(path))?;
        let tensors = self.file.tensors.iter().zip(hashes.tensors).map(|(t, hash)| (t.name.clone(), hash)).collect();
        Ok(Companion {
            file: name.to_owned(),
            bytes: self.file.file_bytes,
            xxh3: hashes.whole.ok_or_else(|| Error::invariant("the companion was not hashed"))?,
            tensor_xxh3: tensors,
        })
    }
}

/// Writes the companion under its temporary name; the caller renames it.
///
/// # Errors
/// As the build's.
pub fn write(plan: &CompanionPlan, source: &Source, files: &SlabFiles, progress: &mut Progress) -> Result<Companion> {
    let mut writer = FileWriter::create_hashed(&plan.file, &files.companion_partial, PAGE_BYTES)?;
    let mut reader = SourceReader::default();
    for tensor in &plan.file.tensors {
        let place = source.place(&tensor.name, &tensor.shape)?;
        let (rows, columns) = match *tensor.shape.as_slice() {
            [rows, columns] => (rows, columns),
            _ => (1, tensor.shape.iter().product()),
        };
        let width = element_bytes(place.dtype)?;
        reader.batches(&place, rows, columns, |batch| {
            let tasks = batch.bytes().par_chunks(CONVERT_VALUES * width).enumerate().map(|(task, bytes)| {
                let mut values = Vec::with_capacity(bytes.len() / width);
                place.append_f32(batch.row * columns + task * CONVERT_VALUES, columns, bytes, &mut values)?;
                if !quant::all_finite(&values) {
                    let at = values.iter().position(|v| !v.is_finite()).unwrap_or(0) + task * CONVERT_VALUES;
                    return Err(not_finite(&tensor.name, batch.row + at / columns.max(1), at % columns.max(1), &place.file));
                }
                Ok(values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect::<Vec<u8>>())
            });
            for bytes in tasks.collect::<Vec<Result<Vec<u8>>>>() {
                writer.write(&bytes?)?;
            }
            progress.add((batch.bytes().len() / width * 2) as u64)
        })?;
    }
    plan.manifest_entry(&files.companion, writer.finish()?)
}
