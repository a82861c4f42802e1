//! The adapters on the device: float32 parameters, gradients and moments, bf16 copies for the products, and AdamW over all of them.
#![forbid(unsafe_code)]

use candle_core::{Device, Tensor};
use serenity_cuda::ops::optimizer::{AdamW as DeviceAdamW, Trained};
use serenity_cuda::{Arena, Gpu, Mat, Ptr, Ty};
use serenity_protocol::config::OptimizerConfig;
use serenity_protocol::{Error, Result};

use super::conditioning::bytes_of;
use super::linear::{Context, Lora};
use super::plan::Reserve;
use crate::model::{Adapter, AdapterGrads, AdapterSet, tensor_error};
use crate::optimizer::Moments;

/// Memory of all adapters: the same layout of all tensors (A, then B, of each adapter) once for each purpose.
#[derive(Debug, Clone)]
pub struct Region {
    parameters: Ptr,
    gradients: Ptr,
    first: Ptr,
    second: Ptr,
    /// bf16, or null where the parameters themselves go into the products.
    copies: Option<Ptr>,
    /// Element offset and shape of each tensor.
    tensors: Vec<(usize, usize, usize)>,
    /// Elements, gaps included.
    len: usize,
}

/// Elements that a tensor's start is a multiple of: 256 bytes of bf16.
const STEP: usize = 128;

impl Region {
    /// Reserves it for linears of the given `(out, in)`.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn reserve(r: &dyn Reserve, ty: Ty, rank: usize, shapes: &[(usize, usize)]) -> Result<Self> {
        let (mut len, mut tensors) = (0usize, Vec::new());
        for (out, inner) in shapes {
            for (rows, cols) in [(rank, *inner), (*out, rank)] {
                tensors.push((len, rows, cols));
                len = (len + rows * cols).next_multiple_of(STEP);
            }
        }
        let f32s = || r.bytes(4 * len);
        Ok(Self {
            parameters: f32s()?,
            gradients: f32s()?,
            first: f32s()?,
            second: f32s()?,
            copies: if ty == Ty::Bf16 { Some(r.bytes(2 * len)?) } else { None },
            tensors,
            len,
        })
    }

    fn mat(&self, base: Ptr, ty: Ty, index: usize) -> Result<Mat> {
        let (offset, rows, cols) = *self.tensors.get(index).ok_or_else(|| Error::invariant("an adapter's tensor is not there"))?;
        Ok(Mat::new(base.offset(offset * ty.bytes()), ty, rows, cols))
    }
}

/// The adapters of a run.
#[derive(Debug)]
pub struct Adapters {
    names: Vec<String>,
    rank: usize,
    alpha: f64,
    region: Region,
    optimizer: DeviceAdamW,
    updates: u64,
}

impl Adapters {
    /// Takes over `set`, with zero moments.
    ///
    /// # Errors
    /// If there is not so much memory left; the driver's.
    pub fn new(gpu: &Gpu, arena: &Arena, ty: Ty, config: &OptimizerConfig, set: &AdapterSet) -> Result<Self> {
        let shapes = set
            .adapters
            .iter()
            .map(|x| Ok((x.b.dim(0)?, x.a.dim(1)?)))
            .collect::<candle_core::Result<Vec<_>>>()
            .map_err(|e| tensor_error("an adapter has no shape", e))?;
        let region = Region::reserve(arena, ty, set.rank, &shapes)?;
        let at = |base: Ptr, offset: usize, bytes: usize| base.offset(offset * bytes);
        let trained: Vec<Trained> = region
            .tensors
            .iter()
            .map(|(offset, rows, cols)| Trained {
                parameter: at(region.parameters, *offset, 4),
                gradient: at(region.gradients, *offset, 4),
                first: at(region.first, *offset, 4),
                second: at(region.second, *offset, 4),
                copy: region.copies.map_or(Ptr::NULL, |c| at(c, *offset, 2)),
                len: rows * cols,
            })
            .collect();
        let optimizer = DeviceAdamW::new(gpu, arena, config, &trained)?;
        let names = set.adapters.iter().map(|a| a.name.clone()).collect();
        let mut this = Self { names, rank: set.rank, alpha: set.alpha, region, optimizer, updates: 0 };
        this.load(gpu, set, 0, None)?;
        Ok(this)
    }

    /// Replaces parameters, moments (zero if not given) and the number of updates made.
    ///
    /// # Errors
    /// [`Error::Data`] if they are of other linears or shapes; the driver's.
    pub fn load(&mut self, gpu: &Gpu, set: &AdapterSet, updates: u64, moments: Option<&[(Moments, Moments)]>) -> Result<()> {
        let same = set.rank == self.rank && set.adapters.iter().map(|a| &a.name).eq(&self.names);
        if !same || moments.is_some_and(|m| m.len() != set.adapters.len()) {
            return Err(Error::data("the adapters to load are not those of this run"));
        }
        let r = &self.region;
        for base in [r.parameters, r.gradients, r.first, r.second] {
            gpu.zero(base, 4 * r.len)?;
        }
        for (i, adapter) in set.adapters.iter().enumerate() {
            for (index, tensor) in [(2 * i, &adapter.a), (2 * i + 1, &adapter.b)] {
                let mat = r.mat(r.parameters, Ty::F32, index)?;
                put(gpu, mat, &bytes_of(tensor, Ty::F32)?)?;
                if let Some(copies) = r.copies {
                    gpu.cast(r.mat(copies, Ty::Bf16, index)?, mat)?;
                }
            }
            let Some((a, b)) = moments.and_then(|m| m.get(i)) else { continue };
            for (index, moment) in [(2 * i, a), (2 * i + 1, b)] {
                put(gpu, r.mat(r.first, Ty::F32, index)?, bytemuck::cast_slice(&moment.first))?;
                put(gpu, r.mat(r.second, Ty::F32, index)?, bytemuck::cast_slice(&moment.second))?;
            }
        }
        self.updates = updates;
        gpu.sync()
    }

    /// The branch of a linear by its full name, if it has one.
    ///
    /// # Errors
    /// [`Error::Invariant`] for a defect of the layout.
    pub fn lora(&self, ty: Ty, name: &str) -> Result<Option<Lora>> {
        let Ok(i) = self.names.binary_search_by(|n| n.as_str().cmp(name)) else { return Ok(None) };
        let r = &self.region;
        let of = |index: usize| match (ty, r.copies) {
            (Ty::Bf16, Some(copies)) => r.mat(copies, Ty::Bf16, index),
            _ => r.mat(r.parameters, Ty::F32, index),
        };
        let gradient = |index: usize| r.mat(r.gradients, Ty::F32, index);
        let scale = (self.alpha / self.rank as f64) as f32;
        Ok(Some(Lora { a: of(2 * i)?, b: of(2 * i + 1)?, da: gradient(2 * i)?, db: gradient(2 * i + 1)?, scale }))
    }

    /// Whether a linear has an adapter.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.names.binary_search_by(|n| n.as_str().cmp(name)).is_ok()
    }

    /// Queues setting all gradients to zero.
    ///
    /// # Errors
    /// The driver's.
    pub fn clear_gradients(&self, c: &Context<'_>) -> Result<()> {
        c.pass(|gpu| gpu.zero(self.region.gradients, 4 * self.region.len))
    }

    /// Queues the gradient norm, then waits for it.
    ///
    /// # Errors
    /// A fault of earlier work.
    pub fn norm(&self, c: &Context<'_>) -> Result<f64> {
        c.time(super::clock::Phase::Optimiser, || self.optimizer.norm(c.gpu))?;
        self.optimizer.read_norm(c.gpu)
    }

    /// Queues the update by the gradients of the last [`Self::norm`], clipped.
    ///
    /// # Errors
    /// The driver's.
    pub fn update(&mut self, c: &Context<'_>, lr: f64) -> Result<()> {
        c.time(super::clock::Phase::Optimiser, || self.optimizer.step(c.gpu, self.updates + 1, lr))?;
        self.updates += 1;
        Ok(())
    }

    /// Updates made so far.
    #[must_use]
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The parameters, on the host.
    ///
    /// # Errors
    /// A fault of earlier work.
    pub fn read(&self, gpu: &Gpu) -> Result<AdapterSet> {
        let tensors = self.tensors(gpu, self.region.parameters)?;
        let adapters = self.names.iter().zip(tensors).map(|(name, (a, b))| Adapter { name: name.clone(), a, b }).collect();
        AdapterSet::new(self.rank, self.alpha, adapters)
    }

    /// The gradients before clipping, on the host.
    ///
    /// # Errors
    /// A fault of earlier work.
    pub fn read_gradients(&self, gpu: &Gpu) -> Result<AdapterGrads> {
        let (a, b) = self.tensors(gpu, self.region.gradients)?.into_iter().unzip();
        Ok(AdapterGrads { a, b })
    }

    /// The moments, on the host.
    ///
    /// # Errors
    /// A fault of earlier work.
    pub fn read_moments(&self, gpu: &Gpu) -> Result<Vec<(Moments, Moments)>> {
        let r = &self.region;
        let moment = |index: usize| -> Result<Moments> {
            Ok(Moments { first: get(gpu, r.mat(r.first, Ty::F32, index)?)?, second: get(gpu, r.mat(r.second, Ty::F32, index)?)? })
        };
        (0..self.names.len()).map(|i| Ok((moment(2 * i)?, moment(2 * i + 1)?))).collect()
    }

    fn tensors(&self, gpu: &Gpu, base: Ptr) -> Result<Vec<(Tensor, Tensor)>> {
        let one = |index: usize| -> Result<Tensor> {
            let mat = self.region.mat(base, Ty::F32, index)?;
            Tensor::from_vec(get(gpu, mat)?, (mat.rows, mat.cols), &Device::Cpu).map_err(|e| tensor_error("cannot hold an adapter", e))
        };
        (0..self.names.len()).map(|i| Ok((one(2 * i)?, one(2 * i + 1)?))).collect()
    }
}

fn put(gpu: &Gpu, mat: Mat, bytes: &[u8]) -> Result<()> {
    if bytes.len() != mat.span() {
        return Err(Error::data("an adapter's tensor has a wrong size").expected(mat.describe()).found(format!("{} bytes", bytes.len())));
    }
    gpu.upload(mat.ptr, bytes)
}

/// The values of a dense float32 matrix.
fn get(gpu: &Gpu, mat: Mat) -> Result<Vec<f32>> {
    let mut values = vec![0f32; mat.len()];
    gpu.download(bytemuck::cast_slice_mut(&mut values), mat.ptr)?;
    Ok(values)
}
