//! cuBLASLt, thin and safe: plans by shape, one matrix product at a time.
//!
//! A plan is made once per shape: the library's heuristics give the algorithm, and the same library on the same device gives the same one
//! in every run. Algorithms that reduce in place in the output are excluded, sums of partial products are float32 in the workspace.
//! Pointer alignment counts up to 16 bytes only, so that where a matrix lies in memory cannot change the algorithm, and with it the bytes.
//! For the same reason the heuristics are asked about dense matrices even where the operands are views, as long as both are aligned alike, and
//! about the whole result where only a part of it is asked for. Where the algorithm cannot multiply what there is, another is taken, and it is
//! said: the last bits of that product then depend on how the matrices are held.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::sys::{self, cublasStatus_t};
use serenity_protocol::{Error, Result};

use crate::driver::{Context, DeviceBuffer, Ptr, Stream};
use crate::libraries::{Library, require};
use crate::mat::Ty;

/// Bytes of workspace; what NVIDIA advises for Hopper.
pub const WORKSPACE_BYTES: usize = 32 << 20;

/// Candidates asked of the heuristics.
const CANDIDATES: usize = 8;

/// Multiply-adds of a product that is worth planning for fewer multiprocessors.
const LARGE: usize = 1 << 32;

fn check(code: cublasStatus_t, what: &str) -> Result<()> {
    if code == cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    let error = match code {
        cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => Error::try_again(format!("cuBLASLt is out of memory: {what}")),
        cublasStatus_t::CUBLAS_STATUS_NOT_INITIALIZED => Error::absent(format!("cuBLASLt cannot be used: {what}"))
            .advice("the library must fit the driver: for a driver of CUDA 12 install libcublasLt.so.12"),
        _ => Error::invariant(format!("cuBLASLt fails: {what}")),
    };
    Err(error.cause(format!("{code:?}")))
}

/// A product in the library's terms: column-major `C [m, n] = op(A) op(B)`, `k` summed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Whether A is transposed: it is then stored `[k, m]`.
    pub transpose_a: bool,
    /// Whether B is transposed: it is then stored `[n, k]`.
    pub transpose_b: bool,
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Rows and columns of C for which the algorithm is chosen.
    pub planned: (usize, usize),
    /// Terms of each sum.
    pub k: usize,
    /// Elements between columns of A, B and C.
    pub strides: [usize; 3],
    /// Type of A and B.
    pub input: Ty,
    /// Type of C.
    pub output: Ty,
    /// Bytes that the addresses of A, B and C are multiples of, at most 16.
    pub alignment: [u32; 3],
}

impl Shape {
    /// Rows and columns of A, B and C as they are stored.
    fn stored(&self) -> [(usize, usize); 3] {
        let turned = |transposed: bool, rows: usize, cols: usize| if transposed { (cols, rows) } else { (rows, cols) };
        [turned(self.transpose_a, self.m, self.k), turned(self.transpose_b, self.k, self.n), (self.m, self.n)]
    }

    /// The product that the algorithm is chosen for: of matrices without gaps, besides those that bring columns to multiples of 16 bytes where they
    /// are there now.
    fn planned(&self) -> Self {
        let types = [self.input, self.input, self.output];
        let (mut strides, (m, n)) = (self.strides, self.planned);
        let other = Self { m, n, ..*self };
        for ((stride, (rows, _)), ty) in strides.iter_mut().zip(other.stored()).zip(types) {
            if (*stride * ty.bytes()).is_multiple_of(16) {
                *stride = rows.next_multiple_of(ty.lanes());
            }
        }
        Self { strides, ..other }
    }

    fn layouts(&self) -> Result<[Layout; 3]> {
        let [(ar, ac), (br, bc), (cr, cc)] = self.stored();
        let [sa, sb, sc] = self.strides;
        Ok([Layout::new(self.input, ar, ac, sa)?, Layout::new(self.input, br, bc, sb)?, Layout::new(self.output, cr, cc, sc)?])
    }
}

/// What the library writes its choices over.
const NO_RESULT: sys::cublasLtMatmulHeuristicResult_t = sys::cublasLtMatmulHeuristicResult_t {
    algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
    workspaceSize: 0,
    state: cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
    wavesCount: 0.0,
    reserved: [0; 4],
};

/// Bytes that an address is a multiple of, at most 16.
#[must_use]
pub fn alignment(ptr: Ptr) -> u32 {
    1 << ptr.address().trailing_zeros().min(4)
}

fn data_type(ty: Ty) -> sys::cudaDataType {
    match ty {
        Ty::F32 => sys::cudaDataType::CUDA_R_32F,
        Ty::Bf16 => sys::cudaDataType::CUDA_R_16BF,
    }
}

/// A matrix layout of the library, destroyed in drop.
#[derive(Debug)]
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(ty: Ty, rows: usize, cols: usize, stride: usize) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        let stride = i64::try_from(stride).map_err(|_| Error::invariant("a stride is too large"))?;
        // SAFETY: `raw` outlives the call. Destroyed once, in drop.
        let code = unsafe { sys::cublasLtMatrixLayoutCreate(&mut raw, data_type(ty), rows as u64, cols as u64, stride) };
        check(code, "describing a matrix")?;
        Ok(Self(raw))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed only here.
        let _ = unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

/// A description of the operation, destroyed in drop.
#[derive(Debug)]
struct Operation(sys::cublasLtMatmulDesc_t);

impl Operation {
    fn new(shape: &Shape, multiprocessors: u32) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // Float32 sums; of float32 inputs a true float32 product: TF32 would need CUBLAS_COMPUTE_32F_FAST_TF32.
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        // SAFETY: `raw` outlives the call. Destroyed once, in drop.
        check(unsafe { sys::cublasLtMatmulDescCreate(&mut raw, compute, sys::cudaDataType::CUDA_R_32F) }, "describing a product")?;
        let operation = Self(raw);
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let sides =
            [(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, shape.transpose_a), (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, shape.transpose_b)];
        for (attribute, transposed) in sides {
            // cublasOperation_t: N is 0, T is 1.
            let value = i32::from(transposed);
            // SAFETY: the description lives; the library reads the 4 bytes of `value` during the call.
            let code = unsafe { sys::cublasLtMatmulDescSetAttribute(raw, attribute, std::ptr::from_ref(&value).cast(), size_of::<i32>()) };
            check(code, "describing a transposition")?;
        }
        if let Some(count) = i32::try_from(multiprocessors).ok().filter(|count| *count > 0) {
            let attribute = Attribute::CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET;
            // SAFETY: the description lives; the library reads the 4 bytes of `count` during the call.
            let code = unsafe { sys::cublasLtMatmulDescSetAttribute(raw, attribute, std::ptr::from_ref(&count).cast(), size_of::<i32>()) };
            check(code, "describing the device's share")?;
        }
        Ok(operation)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed only here.
        let _ = unsafe { sys::cublasLtMatmulDescDestroy(self.0) };
    }
}

/// What algorithms are acceptable, destroyed in drop.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(alignment: [u32; 3]) -> Result<Self> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` outlives the call. Destroyed once, in drop.
        check(unsafe { sys::cublasLtMatmulPreferenceCreate(&mut raw) }, "describing preferences")?;
        let preference = Self(raw);
        let set = |attribute, value: *const c_void, bytes| {
            // SAFETY: the preference lives; the library reads `bytes` bytes of `value`, a local of the caller, during the call.
            check(unsafe { sys::cublasLtMatmulPreferenceSetAttribute(raw, attribute, value, bytes) }, "setting a preference")
        };
        let workspace = WORKSPACE_BYTES as u64;
        set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, std::ptr::from_ref(&workspace).cast(), size_of::<u64>())?;
        // CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, besides none at all: partial sums in float32, in the workspace.
        let schemes = 2u32;
        set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, std::ptr::from_ref(&schemes).cast(), size_of::<u32>())?;
        let [a, b, c] = alignment;
        let sides = [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, a),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, b),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c),
        ];
        for (attribute, bytes) in sides {
            set(attribute, std::ptr::from_ref(&bytes).cast(), size_of::<u32>())?;
        }
        Ok(preference)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed only here.
        let _ = unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

/// Everything that a product of one shape needs.
#[derive(Debug)]
struct Plan {
    operation: Operation,
    a: Layout,
    b: Layout,
    c: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// The library's handle, its workspace, and the plans made so far.
#[derive(Debug)]
pub struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: DeviceBuffer,
    plans: RefCell<HashMap<(Shape, u32), Plan>>,
    /// Multiprocessors that large products are planned for; 0 for all.
    multiprocessors: Cell<u32>,
    context: Arc<Context>,
}

// SAFETY: handle and descriptions are not tied to a thread (cuBLASLt's documentation: thread-safe); the context is made current before use.
unsafe impl Send for Blas {}

impl Blas {
    /// Opens the library and takes its workspace.
    ///
    /// # Errors
    /// [`Error::Absent`] without the library; [`Error::TryAgain`] out of memory.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        require(Library::CublasLt)?;
        context.bind()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` outlives the call; a context is current. Destroyed once, in drop.
        check(unsafe { sys::cublasLtCreate(&mut handle) }, "opening the library")?;
        let workspace = DeviceBuffer::new(context, WORKSPACE_BYTES)?;
        Ok(Self { handle, workspace, plans: RefCell::default(), multiprocessors: Cell::new(0), context: context.clone() })
    }

    /// From now on large products are planned for so many multiprocessors (0: all), because others are at work on the rest.
    pub(crate) fn plan_for(&self, multiprocessors: u32) {
        self.multiprocessors.set(multiprocessors);
    }

    /// Queues `C = alpha op(A) op(B) + beta C` on `stream`; with `beta` 0, C is not read. All products of one `Blas` must be queued on one
    /// stream, for they share the workspace.
    ///
    /// # Errors
    /// [`Error::Invariant`] for a shape that the library refuses; a fault of earlier work may show here too.
    pub fn product(&self, stream: &Stream, shape: &Shape, [a, b, c]: [Ptr; 3], alpha: f32, beta: f32) -> Result<()> {
        self.context.bind()?;
        let mut plans = self.plans.borrow_mut();
        let multiprocessors = if shape.m * shape.n * shape.k >= LARGE { self.multiprocessors.get() } else { 0 };
        let plan = match plans.entry((*shape, multiprocessors)) {
            std::collections::hash_map::Entry::Occupied(found) => found.into_mut(),
            std::collections::hash_map::Entry::Vacant(vacant) => vacant.insert(self.plan(shape, multiprocessors)?),
        };
        let device = |ptr: Ptr| ptr.address() as *const c_void;
        // SAFETY: handle, descriptions and algorithm live in `self` and belong together; `alpha` and `beta` are read during the call
        // (host pointer mode is the default); matrices and workspace are device memory.
        let code = unsafe {
            sys::cublasLtMatmul(
                self.handle,
                plan.operation.0,
                std::ptr::from_ref(&alpha).cast(),
                device(a),
                plan.a.0,
                device(b),
                plan.b.0,
                std::ptr::from_ref(&beta).cast(),
                device(c),
                plan.c.0,
                device(c).cast_mut(),
                plan.c.0,
                &plan.algorithm,
                device(self.workspace.ptr()).cast_mut(),
                WORKSPACE_BYTES,
                stream.raw().cast(),
            )
        };
        if code == cublasStatus_t::CUBLAS_STATUS_SUCCESS { Ok(()) } else { check(code, &format!("multiplying {shape:?}")) }
    }

    fn plan(&self, shape: &Shape, multiprocessors: u32) -> Result<Plan> {
        let operation = Operation::new(shape, multiprocessors)?;
        let [a, b, c] = shape.layouts()?;
        let planned = shape.planned();
        let mut algorithm = self.choose(&planned, &operation, &planned.layouts()?)?;
        if planned != *shape && !self.runs(&operation, [&a, &b, &c], &algorithm) {
            tracing::warn!(
                "cuBLASLt's algorithm for {planned:?} cannot multiply {shape:?}: the last bits of this product may differ from those of a run with \
                 another amount of device memory"
            );
            algorithm = self.choose(shape, &operation, &[a, b, c])?;
            let [a, b, c] = shape.layouts()?;
            return Ok(Plan { operation, a, b, c, algorithm });
        }
        Ok(Plan { operation, a, b, c, algorithm })
    }

    /// Whether an algorithm can multiply matrices of these layouts.
    fn runs(&self, operation: &Operation, [a, b, c]: [&Layout; 3], algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
        let mut result = NO_RESULT;
        // SAFETY: all descriptions live; the library writes one result.
        let code = unsafe { sys::cublasLtMatmulAlgoCheck(self.handle, operation.0, a.0, b.0, c.0, c.0, algorithm, &mut result) };
        code == cublasStatus_t::CUBLAS_STATUS_SUCCESS && result.workspaceSize <= WORKSPACE_BYTES
    }

    fn choose(&self, shape: &Shape, operation: &Operation, [a, b, c]: &[Layout; 3]) -> Result<sys::cublasLtMatmulAlgo_t> {
        let preference = Preference::new(shape.alignment)?;
        let mut results = [NO_RESULT; CANDIDATES];
        let mut count = 0;
        // SAFETY: all descriptions live; the library writes at most CANDIDATES results.
        let code = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                operation.0,
                a.0,
                b.0,
                c.0,
                c.0,
                preference.0,
                CANDIDATES as i32,
                results.as_mut_ptr(),
                &mut count,
            )
        };
        check(code, &format!("choosing an algorithm for {shape:?}"))?;
        let usable = results.iter().take(usize::try_from(count).unwrap_or(0));
        let best = usable.into_iter().find(|r| r.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS && r.workspaceSize <= WORKSPACE_BYTES);
        best.map(|r| r.algo).ok_or_else(|| Error::invariant("cuBLASLt has no algorithm for a product").found(format!("{shape:?}")))
    }

    /// Version of the library, e.g. 130100.
    #[must_use]
    pub fn version(&self) -> usize {
        // SAFETY: the library is loaded; no precondition.
        unsafe { sys::cublasLtGetVersion() }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.borrow_mut().clear();
        if self.context.bind().is_ok() {
            // SAFETY: created in `new`, destroyed only here, after the plans.
            let _ = unsafe { sys::cublasLtDestroy(self.handle) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_and_a_dense_matrix_ask_for_the_same_algorithm() {
        let shape = |strides: [usize; 3]| Shape {
            transpose_a: true,
            transpose_b: false,
            m: 300,
            n: 50,
            planned: (300, 50),
            k: 100,
            strides,
            input: Ty::Bf16,
            output: Ty::F32,
            alignment: [16; 3],
        };
        let dense = shape([104, 104, 300]);
        assert_eq!(dense.planned(), dense);
        assert_eq!(shape([6160, 128, 2048]).planned(), dense);
        assert_eq!(Shape { m: 200, n: 7, strides: [104, 104, 200], ..dense }.planned(), dense);
        // What is not aligned stays as it is.
        assert_eq!(shape([100, 104, 300]).planned().strides, [100, 104, 300]);
    }
}
