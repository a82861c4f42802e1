//! Random weights of any geometry, for benchmarks and tests: no slab, no loader, and the memory of one block of each kind.
//!
//! All blocks of a kind share one set of tensors. Weights are uniform with the variance 1 / in that keeps activations of a random model
//! near one; norm weights are one.
#![forbid(unsafe_code)]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serenity_protocol::geometry::{BlockId, BlockKind, TransformerGeometry};
use serenity_protocol::{Error, Result};

use crate::model::{BlockSource, BlockWeights, OtherWeights, tensor_error};
use crate::rng;
use crate::source::{Announced, Counters, TrainingSource};

/// Random blocks that are always there.
pub struct SyntheticSource {
    geometry: TransformerGeometry,
    double: Vec<Tensor>,
    single: Vec<Tensor>,
    announced: Announced,
    counters: Counters,
}

impl SyntheticSource {
    /// Draws the weights of one block of each kind that `geometry` has.
    ///
    /// # Errors
    /// What the device reports.
    pub fn new(geometry: &TransformerGeometry, device: &Device, dtype: DType, seed: u64) -> Result<Self> {
        Self::scaled(geometry, device, dtype, seed, 1.0)
    }

    /// The same with every weight times `scale`.
    ///
    /// # Errors
    /// What the device reports.
    pub fn scaled(geometry: &TransformerGeometry, device: &Device, dtype: DType, seed: u64, scale: f64) -> Result<Self> {
        let draw = |block: Option<BlockId>| -> Result<Vec<Tensor>> {
            let linears = block.map(|b| geometry.block_linears(b)).unwrap_or_default();
            linears
                .iter()
                .map(|l| {
                    let mut values = random(seed, &l.name, l.out_features, l.in_features);
                    values.iter_mut().for_each(|v| *v *= scale as f32);
                    place(&l.name, values, &[l.out_features, l.in_features], device, dtype)
                })
                .collect()
        };
        let first = |double: bool| geometry.blocks().find(|b| matches!(geometry.kind(*b), BlockKind::Double(_)) == double);
        Ok(Self {
            geometry: geometry.clone(),
            double: draw(first(true))?,
            single: draw(first(false))?,
            announced: Announced::default(),
            counters: Counters::default(),
        })
    }

    /// Random weights of the linears outside the blocks, and norm weights of one.
    ///
    /// # Errors
    /// What the device reports.
    pub fn other(geometry: &TransformerGeometry, device: &Device, dtype: DType, seed: u64) -> Result<OtherWeights> {
        OtherWeights::load(geometry, device, dtype, true, |name, shape| {
            Ok(match shape {
                [rows, columns] => random(seed, name, *rows, *columns),
                _ => vec![1.0; shape.iter().product()],
            })
        })
    }
}

fn random(seed: u64, name: &str, rows: usize, columns: usize) -> Vec<f32> {
    let bound = (3.0 / columns as f64).sqrt();
    rng::uniforms(&mut rng::stream(seed, &format!("synthetic {name}"), 0, 0), rows * columns, -bound, bound)
}

fn place(name: &str, values: Vec<f32>, shape: &[usize], device: &Device, dtype: DType) -> Result<Tensor> {
    // Through bf16, as weights from a slab are: float32 runs then compute on the same numbers as bf16 runs.
    Tensor::from_vec(values, shape, &Device::Cpu)
        .and_then(|t| t.to_dtype(DType::BF16)?.to_dtype(dtype)?.to_device(device))
        .map_err(|e| tensor_error(&format!("cannot place '{name}' on the device"), e))
}

impl BlockSource for SyntheticSource {
    fn request(&mut self, visits: &[BlockId]) -> Result<()> {
        self.announced.extend(visits);
        Ok(())
    }

    fn next(&mut self, block: BlockId) -> Result<Arc<BlockWeights>> {
        self.announced.take(block)?;
        self.counters.hits += 1;
        if usize::from(block.0) >= self.geometry.num_blocks() {
            return Err(Error::invariant("a block outside the model was asked for").found(block.0));
        }
        let shared = match self.geometry.kind(block) {
            BlockKind::Double(_) => &self.double,
            BlockKind::Single(_) => &self.single,
        };
        BlockWeights::new(&self.geometry, block, shared.clone()).map(Arc::new)
    }
}

impl TrainingSource for SyntheticSource {
    fn counters(&self) -> Counters {
        self.counters
    }
}
