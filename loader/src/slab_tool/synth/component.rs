//! Writes the tensors of one component: one safetensors file, or shards with an index, in the Hugging Face naming.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::sync_channel;

use safetensors::Dtype;
use serenity_protocol::{Error, Result, atomic_file};

use super::super::build::PAGE_BYTES;
use super::super::plan::{FilePlan, PlanBuilder};
use super::super::progress::{Progress, joined};
use super::super::writer::{FileHashes, FileWriter, publish};
use super::random::Stream;

/// Values drawn at once.
const BATCH_VALUES: u64 = 4 << 20;

/// What a tensor is filled with.
#[derive(Debug, Clone, PartialEq)]
pub enum Fill {
    /// Nearly normal.
    Normal {
        /// Mean.
        mean: f32,
        /// Standard deviation.
        std: f64,
    },
    /// Given values, float32.
    Values(Vec<f32>),
    /// Zero.
    Zeros,
}

/// One tensor to be made.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Name.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// F32, BF16 or I64 (zeros only).
    pub dtype: Dtype,
    /// Content.
    pub fill: Fill,
}

impl Spec {
    /// A matrix or convolution whose outputs have `gain` times the size of its inputs.
    #[must_use]
    pub fn weight(name: impl Into<String>, shape: Vec<usize>, dtype: Dtype, gain: f64) -> Self {
        let fan_in: usize = shape.iter().skip(1).product();
        Self { name: name.into(), shape, dtype, fill: Fill::Normal { mean: 0.0, std: gain / (fan_in.max(1) as f64).sqrt() } }
    }

    /// A vector around `mean`.
    #[must_use]
    pub fn vector(name: impl Into<String>, length: usize, dtype: Dtype, mean: f32, std: f64) -> Self {
        Self { name: name.into(), shape: vec![length], dtype, fill: Fill::Normal { mean, std } }
    }

    /// Bytes in the file; saturates for impossible shapes, which the plan refuses.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shape.iter().fold(self.dtype.bitsize() as u64 / 8, |n, &d| n.saturating_mul(d as u64))
    }

    /// The bytes of elements `first..first + count`.
    fn draw(&self, seed: u64, first: u64, count: usize) -> Result<Vec<u8>> {
        let stream = Stream::new(seed, &self.name);
        match (&self.fill, self.dtype) {
            (Fill::Normal { mean, std }, Dtype::BF16) => Ok(stream.bf16_bytes(first, count, *mean, *std)),
            (Fill::Normal { mean, std }, Dtype::F32) => Ok(stream.f32_bytes(first, count, *mean, *std)),
            (Fill::Values(values), Dtype::F32) => {
                Ok(values.iter().skip(first as usize).take(count).flat_map(|v| v.to_le_bytes()).collect())
            }
            (Fill::Zeros, dtype) => Ok(vec![0; count * dtype.bitsize() / 8]),
            (fill, dtype) => {
                Err(Error::invariant(format!("tensor '{}' cannot be made", self.name)).found(format!("{fill:?} as {dtype:?}")))
            }
        }
    }
}

/// Writes `specs` into `folder` as `STEM.safetensors`, or as shards of at most `shard_bytes` (one tensor at least) with
/// `STEM.safetensors.index.json`, which comes last.
///
/// # Errors
/// As every writer's.
pub fn write_component(folder: &Path, stem: &str, specs: &[Spec], shard_bytes: u64, seed: u64, progress: &mut Progress) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io("cannot create the folder", folder, e))?;
    let shards = split(specs, shard_bytes);
    if let [all] = shards.as_slice() {
        return write_file(&folder.join(format!("{stem}.safetensors")), all, seed, progress);
    }
    let mut weight_map = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = format!("{stem}-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        write_file(&folder.join(&file), shard, seed, progress)?;
        weight_map.extend(shard.iter().map(|spec| (spec.name.clone(), file.clone())));
    }
    let total: u64 = specs.iter().map(Spec::bytes).sum();
    let index = serde_json::json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    write_json(&folder.join(format!("{stem}.safetensors.index.json")), &index)
}

/// Consecutive runs of at most `shard_bytes`.
fn split(specs: &[Spec], shard_bytes: u64) -> Vec<&[Spec]> {
    let mut shards = Vec::new();
    let mut rest = specs;
    while !rest.is_empty() {
        let mut bytes = 0u64;
        let fits = rest
            .iter()
            .take_while(|spec| {
                bytes = bytes.saturating_add(spec.bytes());
                bytes <= shard_bytes
            })
            .count();
        let (shard, after) = rest.split_at(fits.max(1));
        shards.push(shard);
        rest = after;
    }
    shards
}

fn write_file(path: &Path, specs: &[Spec], seed: u64, progress: &mut Progress) -> Result<()> {
    let mut plan = PlanBuilder::default();
    for spec in specs {
        plan.push(spec.name.clone(), spec.dtype, spec.shape.clone())?;
    }
    let plan = plan.finish(64, &[("format", "pt")])?;
    let temp = atomic_file::temp_path(path);
    write_planned(&plan, &temp, specs, seed, progress)?;
    publish(&temp, path)
}

/// Writes the tensors of `plan` (drawn from `specs`, one for each, in order) to `temp`.
pub(super) fn write_planned(plan: &FilePlan, temp: &Path, specs: &[Spec], seed: u64, progress: &mut Progress) -> Result<FileHashes> {
    let mut writer = FileWriter::create(plan, temp, PAGE_BYTES)?;
    std::thread::scope(|scope| {
        let (out, batches) = sync_channel::<Vec<u8>>(2);
        let written = scope.spawn(move || {
            for bytes in batches {
                writer.write(&bytes)?;
            }
            Ok(writer)
        });
        let drawn = draw_all(specs, seed, progress, |bytes| out.send(bytes).is_ok());
        drop(out);
        let writer = joined(written.join())?;
        drawn?;
        writer.finish()
    })
}

/// Draws every tensor in order; `send` says whether anyone still wants more.
fn draw_all(specs: &[Spec], seed: u64, progress: &mut Progress, send: impl Fn(Vec<u8>) -> bool) -> Result<()> {
    for spec in specs {
        let count: u64 = spec.shape.iter().map(|&d| d as u64).product();
        let mut first = 0;
        while first < count {
            let now = BATCH_VALUES.min(count - first);
            let bytes = spec.draw(seed, first, now as usize)?;
            let length = bytes.len() as u64;
            if !send(bytes) {
                // The writer's own error says why.
                return Ok(());
            }
            progress.add(length)?;
            first += now;
        }
    }
    Ok(())
}

/// Writes a JSON file, indent 2.
///
/// # Errors
/// As every writer's.
pub fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::invariant("a file cannot be written as JSON").cause(e))?;
    atomic_file::write(path, text.as_bytes())
}
