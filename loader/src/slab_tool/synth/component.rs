//! Writes the tensors of one component: one safetensors file, or shards with an index, in the Hugging Face naming.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use serenity_protocol::{Error, Result, atomic_file};

use super::super::files::PAGE_BYTES;
use super::super::plan::PlanBuilder;
use super::super::produce::{Hashing, Product, produce};
use super::super::progress::Progress;
use super::super::units::Division;
use super::super::writer::publish;
use super::random::{Stream, fill};

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

    /// Fills `out` with the tensor's bytes from `at` on.
    pub(super) fn draw(&self, seed: u64, at: u64, out: &mut [u8]) -> Result<()> {
        let stream = Stream::new(seed, &self.name);
        match (&self.fill, self.dtype) {
            (Fill::Normal { mean, std }, Dtype::BF16) => stream.fill_bf16(at, out, *mean, *std),
            (Fill::Normal { mean, std }, Dtype::F32) => stream.fill_f32(at, out, *mean, *std),
            (Fill::Values(values), Dtype::F32) => fill(at, out, |i| values.get(i as usize).copied().unwrap_or(0.0).to_le_bytes()),
            (Fill::Zeros, _) => out.fill(0),
            (fill, dtype) => {
                return Err(Error::invariant(format!("tensor '{}' cannot be made", self.name)).found(format!("{fill:?} as {dtype:?}")));
            }
        }
        Ok(())
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
    let draw = draw_of(specs, seed);
    let product = Product { plan: &plan, temp: &temp, page_bytes: PAGE_BYTES, hashing: Hashing::None, draw: &draw };
    produce(&[product], Division::default(), progress)?;
    publish(&temp, path)
}

/// The bytes of a file of `specs`, one for each tensor, in order.
pub(super) fn draw_of(specs: &[Spec], seed: u64) -> impl Fn(usize, u64, &mut [u8]) -> Result<()> + Sync {
    move |index, at, out| specs.get(index).ok_or_else(|| Error::invariant("a tensor outside the plan"))?.draw(seed, at, out)
}

/// Writes a JSON file, indent 2.
///
/// # Errors
/// As every writer's.
pub fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::invariant("a file cannot be written as JSON").cause(e))?;
    atomic_file::write(path, text.as_bytes())
}
