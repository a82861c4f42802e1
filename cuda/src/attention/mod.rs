//! Full attention, forward and backward: `out = softmax(scale Q Kᵀ) V` with `scale = 1 / sqrt(head_dim)`, the same function as the CPU model's
//! `ops::attention`.
//!
//! Two engines compute it. cuDNN's fused attention is the fastest there is on NVIDIA's devices (`graph` says which graphs, `cudnn` how the
//! library is called); the crate's own kernels (`fallback`) need nothing but the driver, take float32 too, and are what runs where cuDNN
//! is absent or refuses. Both save the same log-sum-exp, so that the forward pass of one goes with the backward pass of the other.
//!
//! Layout: everything is a matrix with one row per token, samples after each other; head `h` is the columns `[h hd, (h+1) hd)`. Rows may lie apart
//! (column views of packed projections), so that nothing is transposed or copied. Log-sum-exp is float32 `[B H, tokens]`, dense.
//!
//! Invariants: no tokens x tokens matrix of the whole pass exists (cuDNN's deterministic backward pass keeps one of a group of heads, within
//! the caller's limit of workspace); two runs give equal bytes; a run allocates nothing.
#![deny(unsafe_code)]

mod cudnn;
mod fallback;
mod graph;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;

use serenity_protocol::{Error, Result};

use self::cudnn::{Bound, Cudnn, Plan};
use self::fallback::Own;
use self::graph::number;
use crate::driver::Ptr;
use crate::gpu::Gpu;
use crate::mat::{Mat, Ty};

/// Workspace that the backward pass may use unless the caller says otherwise: all heads at once up to 1672 tokens of 48 heads.
pub const WORKSPACE_MAX: usize = 256 << 20;

/// The variable that chooses the engines.
pub const VARIABLE: &str = "SERENITY_ATTENTION";

/// Which engines compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backend {
    /// cuDNN where it can, else the own kernels, with a line in the log.
    Auto,
    /// cuDNN, or an error.
    Cudnn,
    /// cuDNN forward (or an error), own kernels backward: no workspace to speak of.
    CudnnForward,
    /// The own kernels.
    Own,
}

impl Backend {
    /// What `SERENITY_ATTENTION` says: `auto` (as without it), `cudnn`, `cudnn-forward` or `own`.
    ///
    /// # Errors
    /// [`Error::Config`] for another word.
    pub fn from_environment() -> Result<Self> {
        std::env::var(VARIABLE).map_or(Ok(Backend::Auto), |word| Self::parse(&word))
    }

    fn parse(word: &str) -> Result<Self> {
        match word {
            "" | "auto" => Ok(Backend::Auto),
            "cudnn" => Ok(Backend::Cudnn),
            "cudnn-forward" => Ok(Backend::CudnnForward),
            "own" => Ok(Backend::Own),
            other => Err(Error::config(format!("{VARIABLE} names no attention engine"))
                .expected("auto, cudnn, cudnn-forward or own")
                .found(other)),
        }
    }
}

/// Elements between the rows of each operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RowStrides {
    /// Queries.
    pub q: usize,
    /// Keys.
    pub k: usize,
    /// Values.
    pub v: usize,
    /// Output.
    pub out: usize,
    /// Gradient of the output.
    pub dout: usize,
    /// Gradient of the queries.
    pub dq: usize,
    /// Gradient of the keys.
    pub dk: usize,
    /// Gradient of the values.
    pub dv: usize,
}

impl RowStrides {
    /// The same for all.
    #[must_use]
    pub fn all(stride: usize) -> Self {
        Self { q: stride, k: stride, v: stride, out: stride, dout: stride, dq: stride, dk: stride, dv: stride }
    }
}

/// What an attention is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttentionShape {
    /// Samples.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Tokens of a sample.
    pub tokens: usize,
    /// Features of a head: up to 128, in bf16 a multiple of 8.
    pub head_dim: usize,
    /// Whether a token sees itself and earlier ones only. Own kernels only.
    pub causal: bool,
    /// Type of all operands but the log-sum-exp.
    pub ty: Ty,
    /// Where their rows lie.
    pub rows: RowStrides,
}

impl AttentionShape {
    /// Full attention over dense matrices.
    #[must_use]
    pub fn dense(batch: usize, heads: usize, tokens: usize, head_dim: usize, ty: Ty) -> Self {
        Self { batch, heads, tokens, head_dim, causal: false, ty, rows: RowStrides::all(heads * head_dim) }
    }

    /// Factor of the scores.
    #[must_use]
    pub fn scale(&self) -> f32 {
        (1.0 / (self.head_dim as f64).sqrt()) as f32
    }

    /// Floating-point operations of the two products of the forward pass; the backward pass counts 2.5 times that.
    #[must_use]
    pub fn flops(&self) -> f64 {
        let pairs = (self.batch * self.heads) as f64 * (self.tokens as f64).powi(2) * if self.causal { 0.5 } else { 1.0 };
        4.0 * pairs * self.head_dim as f64
    }

    fn check(&self, what: &str, mat: Mat, stride: usize) -> Result<()> {
        let (rows, cols) = (self.batch * self.tokens, self.heads * self.head_dim);
        mat.expect_shape(what, self.ty, rows, cols)?;
        if mat.stride != stride && rows > 1 {
            return Err(Error::invariant(format!("{what} of attention has another stride than the plan"))
                .expected(stride)
                .found(mat.describe()));
        }
        if self.ty == Ty::Bf16 && !mat.wide(self.ty.lanes()) {
            return Err(
                Error::invariant(format!("rows of {what} of attention do not start at multiples of 16 bytes")).found(mat.describe())
            );
        }
        Ok(())
    }

    fn check_lse(&self, lse: Mat) -> Result<()> {
        lse.expect_shape("log-sum-exp", Ty::F32, self.batch * self.heads, self.tokens)?;
        if lse.stride != lse.cols || !lse.ptr.address().is_multiple_of(16) {
            return Err(Error::invariant("the log-sum-exp of attention is not dense and aligned").found(lse.describe()));
        }
        Ok(())
    }
}

/// What attention reads.
#[derive(Debug, Clone, Copy)]
pub struct Inputs {
    /// Queries `[B tokens, H hd]`.
    pub q: Mat,
    /// Keys.
    pub k: Mat,
    /// Values.
    pub v: Mat,
}

/// What the backward pass reads and writes besides.
#[derive(Debug, Clone, Copy)]
pub struct Gradients {
    /// Of the output, read.
    pub dout: Mat,
    /// Of the queries, written.
    pub dq: Mat,
    /// Of the keys, written.
    pub dk: Mat,
    /// Of the values, written.
    pub dv: Mat,
}

/// What a plan depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    Forward(AttentionShape),
    Backward(AttentionShape, usize),
}

/// The library, if it has been asked for.
#[derive(Debug, Default)]
enum Opened {
    #[default]
    NotAsked,
    Yes(Arc<Cudnn>),
    /// Why not.
    No(String),
}

/// cuDNN and the plans made so far; part of a [`Gpu`].
#[derive(Debug, Default)]
pub(crate) struct Engines {
    library: RefCell<Opened>,
    plans: RefCell<HashMap<Key, Arc<Plan>>>,
    /// Whether the log says already that the own kernels stand in.
    said: Cell<bool>,
}

impl Engines {
    fn library(&self, gpu: &Gpu) -> Result<Arc<Cudnn>> {
        let mut library = self.library.borrow_mut();
        if matches!(*library, Opened::NotAsked) {
            *library = match Cudnn::open(gpu.compute()) {
                Ok(opened) => Opened::Yes(Arc::new(opened)),
                Err(e) => Opened::No(e.to_string()),
            };
        }
        match &*library {
            Opened::Yes(opened) => Ok(opened.clone()),
            Opened::No(why) => Err(Error::absent("cuDNN cannot be used for attention").cause(why)),
            Opened::NotAsked => Err(Error::invariant("cuDNN was not asked for")),
        }
    }

    fn plan(&self, key: Key, make: impl FnOnce() -> Result<Plan>) -> Result<Arc<Plan>> {
        if let Some(plan) = self.plans.borrow().get(&key) {
            return Ok(plan.clone());
        }
        let plan = Arc::new(make()?);
        self.plans.borrow_mut().insert(key, plan.clone());
        Ok(plan)
    }

    /// A plan runs on the stream of the device object that it was made with, so it must not outlive that.
    fn check_owner(&self, plan: &Plan) -> Result<()> {
        match &*self.library.borrow() {
            Opened::Yes(library) if plan.is_of(library) => Ok(()),
            _ => Err(Error::invariant("an attention runs on another device than it was made for")),
        }
    }

    fn say(&self, why: &Error) {
        if !self.said.replace(true) {
            tracing::warn!("attention runs on the own kernels, which are slower: {why}");
        }
    }
}

/// What computes one direction.
#[derive(Debug)]
enum Engine {
    Own(Own),
    /// The plan, and the heads that it does at a time.
    Cudnn(Arc<Plan>, usize),
}

/// Attention of one shape, ready to run.
#[derive(Debug)]
pub struct Attention {
    shape: AttentionShape,
    forward: Engine,
    backward: Engine,
}

impl Attention {
    /// Attention on the engines that the environment chooses, with at most [`WORKSPACE_MAX`] bytes of workspace.
    ///
    /// # Errors
    /// As [`Attention::with_backend`].
    pub fn new(gpu: &Gpu, shape: AttentionShape) -> Result<Self> {
        Self::with_backend(gpu, shape, Backend::from_environment()?, WORKSPACE_MAX)
    }

    /// Attention on the given engines. `workspace_max` bounds what cuDNN may need; below what one head needs, `Auto` takes the own kernels for
    /// the backward pass. Plans are made once per shape and device.
    ///
    /// # Errors
    /// [`Error::Config`] for a head size that nothing computes; [`Error::Absent`] if cuDNN is demanded and cannot do it.
    pub fn with_backend(gpu: &Gpu, shape: AttentionShape, backend: Backend, workspace_max: usize) -> Result<Self> {
        let (forward, backward) = match backend {
            Backend::Own => (None, None),
            Backend::Cudnn => (Some(cudnn_forward(gpu, &shape, workspace_max)?), Some(cudnn_backward(gpu, &shape, workspace_max)?)),
            Backend::CudnnForward => (Some(cudnn_forward(gpu, &shape, workspace_max)?), None),
            Backend::Auto if shape.ty == Ty::F32 || shape.causal => (None, None),
            Backend::Auto => {
                let tell = |e: Error| gpu.attention.say(&e);
                (
                    cudnn_forward(gpu, &shape, workspace_max).map_err(tell).ok(),
                    cudnn_backward(gpu, &shape, workspace_max).map_err(tell).ok(),
                )
            }
        };
        let or_own = |engine: Option<Engine>| engine.map_or_else(|| Own::new(gpu, &shape).map(Engine::Own), Ok);
        Ok(Self { shape, forward: or_own(forward)?, backward: or_own(backward)? })
    }

    /// The shape it is made for.
    #[must_use]
    pub fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    /// For logs: the engines of the two passes and the heads that cuDNN's backward pass does at a time.
    #[must_use]
    pub fn describe(&self) -> String {
        let name = |engine: &Engine| match engine {
            Engine::Own(_) => "own kernels".to_string(),
            Engine::Cudnn(_, heads) if *heads == self.shape.heads => "cuDNN".to_string(),
            Engine::Cudnn(_, heads) => format!("cuDNN by {heads} heads"),
        };
        format!(
            "forward {}, backward {}, workspace {} MiB",
            name(&self.forward),
            name(&self.backward),
            self.workspace_bytes().div_ceil(1 << 20)
        )
    }

    /// Bytes of workspace that either pass needs, to be reserved by the caller.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        let forward = match &self.forward {
            Engine::Own(_) => 0,
            Engine::Cudnn(plan, _) => plan.workspace_bytes(),
        };
        let backward = match &self.backward {
            Engine::Own(_) => Own::backward_workspace_bytes(&self.shape),
            Engine::Cudnn(plan, heads) => row_sum_bytes(&self.shape, *heads) + plan.workspace_bytes(),
        };
        forward.max(backward)
    }

    /// Queues `out` and the log-sum-exp. `workspace` has [`Attention::workspace_bytes`], aligned to 256.
    ///
    /// # Errors
    /// [`Error::Invariant`] for operands of another shape; the engine's.
    pub fn forward(&self, gpu: &Gpu, inputs: Inputs, out: Mat, lse: Mat, workspace: Ptr) -> Result<()> {
        self.check(inputs, out, lse)?;
        if self.is_empty() {
            return Ok(());
        }
        match &self.forward {
            Engine::Own(own) => own.forward(gpu, &self.shape, inputs, out, lse),
            Engine::Cudnn(plan, _) => {
                gpu.attention.check_owner(plan)?;
                let Inputs { q, k, v } = inputs;
                let device = |number: i64, mat: Mat| (number, Bound::Device(mat.ptr));
                let bindings = [
                    device(number::Q, q),
                    device(number::K, k),
                    device(number::V, v),
                    device(number::OUT, out),
                    device(number::LSE, lse),
                    (number::SCALE, Bound::Scalar(self.shape.scale())),
                ];
                plan.run(&bindings, workspace)
            }
        }
    }

    /// Queues the gradients of queries, keys and values. `out` and `lse` are of the forward pass.
    ///
    /// # Errors
    /// [`Error::Invariant`] for operands of another shape; the engine's.
    pub fn backward(&self, gpu: &Gpu, inputs: Inputs, out: Mat, lse: Mat, gradients: Gradients, workspace: Ptr) -> Result<()> {
        self.check(inputs, out, lse)?;
        let rows = &self.shape.rows;
        self.shape.check("the output's gradient", gradients.dout, rows.dout)?;
        self.shape.check("the queries' gradient", gradients.dq, rows.dq)?;
        self.shape.check("the keys' gradient", gradients.dk, rows.dk)?;
        self.shape.check("the values' gradient", gradients.dv, rows.dv)?;
        if self.is_empty() {
            return Ok(());
        }
        match &self.backward {
            Engine::Own(own) => own.backward(gpu, &self.shape, inputs, (out, lse), gradients, workspace),
            Engine::Cudnn(plan, heads) => {
                gpu.attention.check_owner(plan)?;
                let rest = workspace.offset(row_sum_bytes(&self.shape, *heads));
                for first in (0..self.shape.heads).step_by((*heads).max(1)) {
                    plan.run(&self.backward_bindings(first, inputs, (out, lse), gradients, workspace), rest)?;
                }
                Ok(())
            }
        }
    }

    /// The operands of a group of heads from `first` on.
    fn backward_bindings(&self, first: usize, i: Inputs, (out, lse): (Mat, Mat), g: Gradients, row_sum: Ptr) -> [(i64, Bound); 12] {
        let heads = |number: i64, mat: Mat| (number, Bound::Device(mat.ptr.offset(first * self.shape.head_dim * mat.ty.bytes())));
        [
            heads(number::Q, i.q),
            heads(number::K, i.k),
            heads(number::V, i.v),
            heads(number::OUT, out),
            heads(number::DOUT, g.dout),
            heads(number::DQ, g.dq),
            heads(number::DK, g.dk),
            heads(number::DV, g.dv),
            (number::LSE, Bound::Device(lse.ptr.offset(first * self.shape.tokens * size_of::<f32>()))),
            (number::ROW_SUM, Bound::Device(row_sum)),
            (number::SCALE, Bound::Scalar(self.shape.scale())),
            (number::ONE, Bound::Scalar(1.0)),
        ]
    }

    fn check(&self, Inputs { q, k, v }: Inputs, out: Mat, lse: Mat) -> Result<()> {
        let rows = &self.shape.rows;
        self.shape.check("queries", q, rows.q)?;
        self.shape.check("keys", k, rows.k)?;
        self.shape.check("values", v, rows.v)?;
        self.shape.check("output", out, rows.out)?;
        self.shape.check_lse(lse)
    }

    fn is_empty(&self) -> bool {
        self.shape.batch * self.shape.heads * self.shape.tokens == 0
    }
}

/// Bytes of the row sums of `heads` heads, rounded so that what follows is aligned.
fn row_sum_bytes(shape: &AttentionShape, heads: usize) -> usize {
    (shape.batch * heads * shape.tokens * size_of::<f32>()).next_multiple_of(256)
}

/// What cuDNN's graphs here are made for.
fn cudnn_fits(shape: &AttentionShape) -> Result<()> {
    if shape.ty != Ty::Bf16
        || shape.causal
        || !shape.head_dim.is_multiple_of(8)
        || shape.head_dim > 128
        || shape.tokens * shape.heads * shape.batch == 0
    {
        return Err(Error::absent("cuDNN's attention is set up for full attention in bf16 with heads of up to 128 in steps of 8")
            .found(format!("{shape:?}")));
    }
    Ok(())
}

fn cudnn_forward(gpu: &Gpu, shape: &AttentionShape, workspace_max: usize) -> Result<Engine> {
    cudnn_fits(shape)?;
    let library = gpu.attention.library(gpu)?;
    let plan = gpu.attention.plan(Key::Forward(*shape), || graph::forward(&library, shape, workspace_max))?;
    tracing::debug!(version = library.version(), workspace = plan.workspace_bytes(), "cuDNN plans an attention forward");
    Ok(Engine::Cudnn(plan, shape.heads))
}

/// The most heads at a time whose workspace fits.
fn cudnn_backward(gpu: &Gpu, shape: &AttentionShape, workspace_max: usize) -> Result<Engine> {
    cudnn_fits(shape)?;
    let library = gpu.attention.library(gpu)?;
    let mut refused = Error::absent("not even one head's backward pass fits the workspace")
        .expected(format!("{} bytes", group_bytes(shape, 1)))
        .found(format!("{workspace_max} bytes"))
        .advice("raise memory.stagehand.vram_high_watermark_mb, or go on with the own kernels");
    for heads in groups(shape, workspace_max) {
        let limit = workspace_max.saturating_sub(row_sum_bytes(shape, heads));
        match gpu.attention.plan(Key::Backward(*shape, heads), || graph::backward(&library, shape, heads, limit)) {
            Ok(plan) if plan.workspace_bytes() <= limit => {
                tracing::debug!(
                    version = library.version(),
                    heads,
                    workspace = plan.workspace_bytes(),
                    "cuDNN plans an attention backward"
                );
                return Ok(Engine::Cudnn(plan, heads));
            }
            Ok(_) => {}
            Err(e) => refused = e,
        }
    }
    Err(refused)
}

/// What cuDNN keeps of a group of heads: the scores' gradient in bf16.
fn group_bytes(shape: &AttentionShape, heads: usize) -> usize {
    2usize.saturating_mul(shape.batch * heads).saturating_mul(shape.tokens).saturating_mul(shape.tokens)
}

/// Divisors of the heads, the largest first, whose group may fit.
fn groups(shape: &AttentionShape, workspace_max: usize) -> impl Iterator<Item = usize> {
    let shape = *shape;
    (1..=shape.heads).rev().filter(move |heads| shape.heads.is_multiple_of(*heads) && group_bytes(&shape, *heads) <= workspace_max)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn the_environment_names_an_engine_or_is_refused() {
        assert_eq!(Backend::parse("").unwrap(), Backend::Auto);
        assert_eq!(Backend::parse("cudnn-forward").unwrap(), Backend::CudnnForward);
        assert_eq!(Backend::parse("cuDNN").unwrap_err().exit_code(), 64);
    }

    #[test]
    fn groups_of_heads_divide_them_and_fit() {
        let shape = |tokens| AttentionShape::dense(1, 48, tokens, 128, Ty::Bf16);
        let first = |tokens| groups(&shape(tokens), WORKSPACE_MAX).next();
        assert_eq!([first(1536), first(2816), first(4608)], [Some(48), Some(16), Some(6)]);
        assert_eq!(first(8192), Some(2));
        assert_eq!(groups(&shape(4608), 1 << 20).next(), None);
    }

    /// Operands of another shape or stride are refused before anything is queued.
    #[test]
    fn operands_are_checked() {
        let shape = AttentionShape { rows: RowStrides { k: 96, ..RowStrides::all(64) }, ..AttentionShape::dense(1, 2, 5, 32, Ty::Bf16) };
        let mat = |stride| Mat { stride, ..Mat::new(Ptr::NULL, Ty::Bf16, 5, 64) };
        assert!(shape.check("queries", mat(64), shape.rows.q).is_ok());
        assert!(shape.check("keys", mat(96), shape.rows.k).is_ok());
        assert!(shape.check("keys", mat(64), shape.rows.k).is_err());
        assert!(shape.check("queries", Mat { rows: 4, ..mat(64) }, shape.rows.q).is_err());
        assert!(shape.check("queries", Mat { ptr: Ptr::NULL.offset(8), ..mat(64) }, shape.rows.q).is_err(), "not aligned");
        assert!(shape.check_lse(Mat::new(Ptr::NULL, Ty::F32, 2, 5)).is_ok());
        assert!(shape.check_lse(Mat::new(Ptr::NULL, Ty::F32, 5, 2)).is_err());
    }

    const H100: &str = r#"{"deviceName":"NVIDIA H100 80GB HBM3","cudaDeviceId":0,"deviceVer":900,"driverVer":13000,"smVersion":900,
        "multiProcessorCount":132,"totalGlobalMem":85000000000,"maxGridSize":[2147483647,65535,65535],"maxBlockSize":[1024,1024,64],
        "regsPerBlock":65536,"warpSize":32,"maxSharedMemoryPerBlock":49152,"maxSharedMemoryPerBlockOptin":232448,
        "reservedSharedMemoryPerBlock":1024,"maxRegistersPerSM":65536,"maxSharedMemoryPerSM":233472,"maxThreadsPerSM":2048,"maxCtasPerSM":32,
        "maxThreadsPerBlock":1024,"smClockRateKHz":1980000,"memClockRateKHz":2619000,"l2CacheSize":52428800,"supportCoopLaunch":1,
        "isTccDriver":0,"pciDeviceId":0,"pciBusId":0,"pciDomainId":0,"cudnnVersion":92101,"schemaVersion":1}"#;

    /// The graphs go through the library's own checks for a device that this machine need not have. Plans need the driver's library; without it
    /// the graphs are still checked, and the test says so.
    #[test]
    fn cudnn_accepts_the_graphs() {
        let Ok(library) = Cudnn::described(H100) else {
            // Past the test harness's capture: a test that did not run must be seen.
            let _ = std::io::Write::write_all(&mut std::io::stderr(), b"SKIPPED: cuDNN 9.8 or later is not here, no graph was checked\n");
            return;
        };
        let library = Arc::new(library);
        let packed = |tokens, heads: usize, head_dim: usize| AttentionShape {
            rows: RowStrides::all(3 * heads * head_dim + 64),
            ..AttentionShape::dense(1, heads, tokens, head_dim, Ty::Bf16)
        };
        for shape in
            [packed(1, 1, 128), packed(7, 3, 16), packed(65, 3, 32), packed(129, 2, 64), packed(1000, 2, 128), packed(1536, 48, 128)]
        {
            for heads in [1, shape.heads] {
                for plan in [graph::forward(&library, &shape, 1 << 20), graph::backward(&library, &shape, heads, WORKSPACE_MAX)] {
                    match plan {
                        Ok(plan) => eprintln!("{} tokens, {heads} heads: workspace {}", shape.tokens, plan.workspace_bytes()),
                        Err(e) => {
                            let driver = crate::libraries::require(crate::libraries::Library::Driver);
                            assert!(driver.is_err() && e.to_string().contains("no plan"), "{e}");
                            eprintln!("{} tokens, {heads} heads: graph accepted; no plan without the driver", shape.tokens);
                        }
                    }
                }
            }
        }
    }
}
