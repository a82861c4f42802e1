//! LoRA adapters, always float32: `y = W x + (alpha / rank) B (A x)`.
//!
//! The set is sorted by linear name, and everything that goes with it (gradients, optimiser moments, checkpoints, files) keeps that
//! order, so that nothing depends on the iteration order of a map.

use candle_core::{DType, Device, Tensor};
use serenity_protocol::geometry::LinearSpec;
use serenity_protocol::{Error, Result};

use super::tensor_error;
use crate::rng;

/// The adapter of one linear.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Full name of the linear, e.g. `transformer_blocks.0.attn.to_q`.
    pub name: String,
    /// `[rank, in]` float32.
    pub a: Tensor,
    /// `[out, rank]` float32.
    pub b: Tensor,
}

/// All adapters of a run.
#[derive(Debug, Clone)]
pub struct AdapterSet {
    /// Rank r.
    pub rank: usize,
    /// Alpha; the branch is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Sorted by name, no name twice.
    pub adapters: Vec<Adapter>,
}

impl AdapterSet {
    /// Takes adapters in any order.
    ///
    /// # Errors
    /// [`Error::Data`] if a name comes twice, or a tensor is not float32 of rank `rank`.
    pub fn new(rank: usize, alpha: f64, mut adapters: Vec<Adapter>) -> Result<Self> {
        adapters.sort_by(|x, y| x.name.cmp(&y.name));
        if let Some(pair) = adapters.windows(2).find(|w| matches!(w, [x, y] if x.name == y.name)) {
            return Err(Error::data("a linear has two adapters").found(pair.first().map_or("", |a| a.name.as_str())));
        }
        for adapter in &adapters {
            let (a, b) = (adapter.a.dims(), adapter.b.dims());
            let fits = matches!((a, b), ([ra, _], [_, rb]) if *ra == rank && *rb == rank);
            if rank == 0 || !fits || adapter.a.dtype() != DType::F32 || adapter.b.dtype() != DType::F32 {
                return Err(Error::data(format!("the adapter of '{}' has wrong tensors", adapter.name))
                    .expected(format!("A [{rank}, in] and B [out, {rank}], float32"))
                    .found(format!("A {a:?} {:?}, B {b:?} {:?}", adapter.a.dtype(), adapter.b.dtype())));
            }
        }
        Ok(Self { rank, alpha, adapters })
    }

    /// Fresh adapters for `targets`: A uniform in ±1/sqrt(in) (PyTorch's `kaiming_uniform_(a=sqrt(5))`), B zero, so that the first step
    /// sees the unchanged model. Each A depends on the seed and its linear's name alone, not on which other linears are adapted.
    ///
    /// # Errors
    /// [`Error::Data`] for a repeated target; what the device reports.
    pub fn init(targets: &[LinearSpec], rank: usize, alpha: f64, seed: u64, device: &Device) -> Result<Self> {
        let mut adapters = Vec::with_capacity(targets.len());
        for spec in targets {
            let bound = 1.0 / (spec.in_features as f64).sqrt();
            let mut stream = rng::stream(seed, &format!("lora A {}", spec.name), 0, 0);
            let values = rng::uniforms(&mut stream, rank * spec.in_features, -bound, bound);
            let made = Tensor::from_vec(values, (rank, spec.in_features), device)
                .and_then(|a| Ok((a, Tensor::zeros((spec.out_features, rank), DType::F32, device)?)))
                .map_err(|e| tensor_error(&format!("cannot create the adapter of '{}'", spec.name), e))?;
            adapters.push(Adapter { name: spec.name.clone(), a: made.0, b: made.1 });
        }
        Self::new(rank, alpha, adapters)
    }

    /// Position of a linear's adapter.
    #[must_use]
    pub fn index_of(&self, linear: &str) -> Option<usize> {
        self.adapters.binary_search_by(|a| a.name.as_str().cmp(linear)).ok()
    }

    /// The factor `alpha / rank` of the branch.
    #[must_use]
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Trainable parameters.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.adapters.iter().map(|a| a.a.elem_count() + a.b.elem_count()).sum()
    }
}

/// Gradients of an [`AdapterSet`], in its order and shapes, float32.
#[derive(Debug, Clone)]
pub struct AdapterGrads {
    /// d loss / d A, `[rank, in]` each.
    pub a: Vec<Tensor>,
    /// d loss / d B, `[out, rank]` each.
    pub b: Vec<Tensor>,
}

impl AdapterGrads {
    /// Zeros in the shapes of `set`.
    ///
    /// # Errors
    /// What the device reports.
    pub fn zeros(set: &AdapterSet) -> Result<Self> {
        let zeros = |pick: fn(&Adapter) -> &Tensor| {
            set.adapters
                .iter()
                .map(|x| pick(x).zeros_like())
                .collect::<candle_core::Result<Vec<_>>>()
                .map_err(|e| tensor_error("cannot allocate the adapters' gradients", e))
        };
        Ok(Self { a: zeros(|x| &x.a)?, b: zeros(|x| &x.b)? })
    }
}
