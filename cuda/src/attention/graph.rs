//! Attention as graphs of cuDNN's operations: the pattern that its fused flash attention is recognised by.
//!
//! The order and shape of the operations is what NVIDIA documents for scaled dot-product attention (cuDNN developer guide, "Fused flash
//! attention fprop/bprop"): in the forward graph scores, scale, row maximum, exponentials, row sum, log-sum-exp, probabilities, output; in
//! the backward graph the row sums of dO O, the probabilities recomputed from the log-sum-exp, dV, dP, dS, dK, dQ. None of the tokens x tokens
//! tensors is real ("virtual"): they live in registers of the fused kernel.
//!
//! Determinism: with dQ as a direct result of its product, cuDNN keeps dS in its workspace (2 bytes x heads x tokens²) and sums dQ in a
//! second pass; with a float32 accumulator in between it uses atomics. Only the first form is built here. What that costs in memory is bounded by
//! running groups of heads one after the other, see [`backward`].
#![forbid(unsafe_code)]

use std::sync::Arc;

use cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Name, cudnnBackendDescriptorType_t as Kind, cudnnDataType_t as Data, cudnnPointwiseMode_t as Pointwise,
    cudnnReduceTensorOp_t as Reduce,
};
use serenity_protocol::{Error, Result};

use super::cudnn::{Cudnn, Descriptor, Plan, Value};
use super::{AttentionShape, RowStrides};

/// Numbers of the tensors that are bound when a plan runs.
pub(super) mod number {
    pub(in super::super) const Q: i64 = 1;
    pub(in super::super) const K: i64 = 2;
    pub(in super::super) const V: i64 = 3;
    pub(in super::super) const OUT: i64 = 4;
    pub(in super::super) const LSE: i64 = 5;
    pub(in super::super) const SCALE: i64 = 6;
    pub(in super::super) const ONE: i64 = 7;
    pub(in super::super) const DOUT: i64 = 8;
    pub(in super::super) const DQ: i64 = 9;
    pub(in super::super) const DK: i64 = 10;
    pub(in super::super) const DV: i64 = 11;
    pub(in super::super) const ROW_SUM: i64 = 12;
    /// Virtual tensors are numbered from here.
    pub(super) const VIRTUAL: i64 = 100;
}

/// A tensor of four dimensions: batch, heads, and two that depend on what it is.
#[derive(Clone, Copy)]
struct Layout {
    dims: [i64; 4],
    strides: [i64; 4],
    ty: Data,
}

impl Layout {
    fn with(self, ty: Data) -> Self {
        Self { ty, ..self }
    }

    /// The last two dimensions exchanged: the same memory as its transpose.
    fn transposed(self) -> Self {
        let Self { dims: [b, h, m, n], strides: [sb, sh, sm, sn], ty } = self;
        Self { dims: [b, h, n, m], strides: [sb, sh, sn, sm], ty }
    }
}

/// A graph while it is built.
struct Builder<'a> {
    library: &'a Arc<Cudnn>,
    operations: Vec<Descriptor>,
    others: Vec<Descriptor>,
    tensors: Vec<Descriptor>,
    next: i64,
}

/// A tensor of a [`Builder`].
#[derive(Clone, Copy)]
struct Tensor(usize);

impl<'a> Builder<'a> {
    fn new(library: &'a Arc<Cudnn>) -> Self {
        Self { library, operations: Vec::new(), others: Vec::new(), tensors: Vec::new(), next: number::VIRTUAL }
    }

    fn tensor(&mut self, layout: Layout, number: i64, alignment: i64, real: bool, by_value: bool) -> Result<Tensor> {
        let attributes = [
            (Name::CUDNN_ATTR_TENSOR_DATA_TYPE, Value::Data(layout.ty)),
            (Name::CUDNN_ATTR_TENSOR_DIMENSIONS, Value::Numbers(&layout.dims)),
            (Name::CUDNN_ATTR_TENSOR_STRIDES, Value::Numbers(&layout.strides)),
            (Name::CUDNN_ATTR_TENSOR_UNIQUE_ID, Value::Numbers(&[number])),
            (Name::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, Value::Numbers(&[alignment])),
            (Name::CUDNN_ATTR_TENSOR_IS_VIRTUAL, Value::Flag(!real)),
            (Name::CUDNN_ATTR_TENSOR_IS_BY_VALUE, Value::Flag(by_value)),
        ];
        self.tensors.push(Descriptor::finished(self.library, Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR, &attributes)?);
        Ok(Tensor(self.tensors.len() - 1))
    }

    /// In device memory.
    fn real(&mut self, layout: Layout, number: i64, alignment: i64) -> Result<Tensor> {
        self.tensor(layout, number, alignment, true, false)
    }

    /// Between two operations only.
    fn inner(&mut self, layout: Layout) -> Result<Tensor> {
        self.next += 1;
        self.tensor(layout, self.next, 16, false, false)
    }

    /// A float32 number given with each run.
    fn scalar(&mut self, number: i64) -> Result<Tensor> {
        self.tensor(Layout { dims: [1; 4], strides: [1; 4], ty: Data::CUDNN_DATA_FLOAT }, number, 16, true, true)
    }

    fn get(&self, tensor: Tensor) -> Result<&Descriptor> {
        self.tensors.get(tensor.0).ok_or_else(|| Error::invariant("a graph refers to a tensor that it has not"))
    }

    /// Adds an operation: what it does (a finished descriptor under `how`) and its operands.
    fn operation(&mut self, kind: Kind, how: Option<(Name, Descriptor)>, operands: &[(Name, Tensor)]) -> Result<()> {
        let operation = {
            let found = operands.iter().map(|(name, t)| Ok((*name, [self.get(*t)?]))).collect::<Result<Vec<_>>>()?;
            let doing = how.as_ref().map(|(name, descriptor)| (*name, [descriptor]));
            let attributes: Vec<_> = doing.iter().chain(&found).map(|(name, one)| (*name, Value::Descriptors(one))).collect();
            Descriptor::finished(self.library, kind, &attributes)?
        };
        self.operations.push(operation);
        self.others.extend(how.map(|(_, descriptor)| descriptor));
        Ok(())
    }

    /// `c = a b` with float32 sums.
    fn product(&mut self, a: Tensor, b: Tensor, c: Tensor) -> Result<()> {
        let attributes = [(Name::CUDNN_ATTR_MATMUL_COMP_TYPE, Value::Data(Data::CUDNN_DATA_FLOAT))];
        let how = Descriptor::finished(self.library, Kind::CUDNN_BACKEND_MATMUL_DESCRIPTOR, &attributes)?;
        let operands = [
            (Name::CUDNN_ATTR_OPERATION_MATMUL_ADESC, a),
            (Name::CUDNN_ATTR_OPERATION_MATMUL_BDESC, b),
            (Name::CUDNN_ATTR_OPERATION_MATMUL_CDESC, c),
        ];
        self.operation(Kind::CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR, Some((Name::CUDNN_ATTR_OPERATION_MATMUL_DESC, how)), &operands)
    }

    /// `y = mode(x)` or `y = mode(x, b)`, element by element, sizes 1 of `b` repeated.
    fn pointwise(&mut self, mode: Pointwise, x: Tensor, b: Option<Tensor>, y: Tensor) -> Result<()> {
        let attributes = [
            (Name::CUDNN_ATTR_POINTWISE_MODE, Value::Pointwise(mode)),
            (Name::CUDNN_ATTR_POINTWISE_MATH_PREC, Value::Data(Data::CUDNN_DATA_FLOAT)),
        ];
        let how = Descriptor::finished(self.library, Kind::CUDNN_BACKEND_POINTWISE_DESCRIPTOR, &attributes)?;
        let mut operands = vec![(Name::CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x)];
        operands.extend(b.map(|b| (Name::CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b)));
        operands.push((Name::CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y));
        let how = (Name::CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, how);
        self.operation(Kind::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, Some(how), &operands)
    }

    /// [`Builder::pointwise`] into a new inner tensor.
    fn then(&mut self, mode: Pointwise, x: Tensor, b: Option<Tensor>, layout: Layout) -> Result<Tensor> {
        let y = self.inner(layout)?;
        self.pointwise(mode, x, b, y)?;
        Ok(y)
    }

    /// Reduces the last dimension of `x` into a new inner tensor.
    fn reduced(&mut self, mode: Reduce, x: Tensor, layout: Layout) -> Result<Tensor> {
        let y = self.inner(layout)?;
        let attributes = [
            (Name::CUDNN_ATTR_REDUCTION_OPERATOR, Value::Reduction(mode)),
            (Name::CUDNN_ATTR_REDUCTION_COMP_TYPE, Value::Data(Data::CUDNN_DATA_FLOAT)),
        ];
        let how = Descriptor::finished(self.library, Kind::CUDNN_BACKEND_REDUCTION_DESCRIPTOR, &attributes)?;
        let operands = [(Name::CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x), (Name::CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y)];
        self.operation(
            Kind::CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR,
            Some((Name::CUDNN_ATTR_OPERATION_REDUCTION_DESC, how)),
            &operands,
        )?;
        Ok(y)
    }

    /// `x` seen with another layout.
    fn seen_as(&mut self, x: Tensor, layout: Layout) -> Result<Tensor> {
        let y = self.inner(layout)?;
        let operands = [(Name::CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x), (Name::CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y)];
        self.operation(Kind::CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR, None, &operands)?;
        Ok(y)
    }

    fn plan(self, workspace_max: usize) -> Result<Plan> {
        let Self { library, operations, mut others, tensors, .. } = self;
        others.extend(tensors);
        Plan::new(library, operations, others, workspace_max)
    }
}

/// The layouts of one shape.
struct Layouts {
    shape: AttentionShape,
    heads: i64,
}

impl Layouts {
    fn size(value: usize) -> Result<i64> {
        i64::try_from(value).map_err(|_| Error::invariant("attention is too large to describe").found(value))
    }

    /// `[B, heads, tokens, head_dim]` in rows `row` elements apart.
    fn rows(&self, row: usize) -> Result<Layout> {
        let s = &self.shape;
        let [batch, tokens, width, row] = [Self::size(s.batch)?, Self::size(s.tokens)?, Self::size(s.head_dim)?, Self::size(row)?];
        let strides = [tokens.checked_mul(row).ok_or_else(|| Error::invariant("attention is too large to describe"))?, width, row, 1];
        Ok(Layout { dims: [batch, self.heads, tokens, width], strides, ty: Data::CUDNN_DATA_BFLOAT16 })
    }

    /// Scores, float32 `[B, heads, tokens, tokens]`.
    fn scores(&self) -> Result<Layout> {
        let (batch, tokens) = (Self::size(self.shape.batch)?, Self::size(self.shape.tokens)?);
        let strides = [self.heads * tokens * tokens, tokens * tokens, tokens, 1];
        Ok(Layout { dims: [batch, self.heads, tokens, tokens], strides, ty: Data::CUDNN_DATA_FLOAT })
    }

    /// One float32 per row, `[B, heads, tokens, 1]`, in memory with `heads_apart` heads per sample.
    fn per_row(&self, heads_apart: i64) -> Result<Layout> {
        let (batch, tokens) = (Self::size(self.shape.batch)?, Self::size(self.shape.tokens)?);
        Ok(Layout { dims: [batch, self.heads, tokens, 1], strides: [heads_apart * tokens, tokens, 1, 1], ty: Data::CUDNN_DATA_FLOAT })
    }
}

/// The plan of the forward pass over all heads.
///
/// # Errors
/// [`Error::Absent`] if cuDNN has no plan with at most `workspace_max` bytes.
pub(super) fn forward(library: &Arc<Cudnn>, shape: &AttentionShape, workspace_max: usize) -> Result<Plan> {
    let heads = Layouts::size(shape.heads)?;
    let layouts = Layouts { shape: *shape, heads };
    let RowStrides { q, k, v, out, .. } = shape.rows;
    let (scores, per_row) = (layouts.scores()?, layouts.per_row(heads)?);
    let mut g = Builder::new(library);
    let q = g.real(layouts.rows(q)?, number::Q, 16)?;
    let k = g.real(layouts.rows(k)?.transposed(), number::K, 16)?;
    let v = g.real(layouts.rows(v)?, number::V, 16)?;
    let out = g.real(layouts.rows(out)?, number::OUT, 16)?;
    let lse = g.real(per_row, number::LSE, 16)?;
    let scale = g.scalar(number::SCALE)?;

    let raw = g.inner(scores)?;
    g.product(q, k, raw)?;
    let scaled = g.then(Pointwise::CUDNN_POINTWISE_MUL, raw, Some(scale), scores)?;
    let top = g.reduced(Reduce::CUDNN_REDUCE_TENSOR_MAX, scaled, per_row)?;
    let below = g.then(Pointwise::CUDNN_POINTWISE_SUB, scaled, Some(top), scores)?;
    let exponentials = g.then(Pointwise::CUDNN_POINTWISE_EXP, below, None, scores)?;
    let sum = g.reduced(Reduce::CUDNN_REDUCE_TENSOR_ADD, exponentials, per_row)?;
    let log = g.then(Pointwise::CUDNN_POINTWISE_LOG, sum, None, per_row)?;
    g.pointwise(Pointwise::CUDNN_POINTWISE_ADD, top, Some(log), lse)?;
    let bf16 = scores.with(Data::CUDNN_DATA_BFLOAT16);
    let probabilities = g.then(Pointwise::CUDNN_POINTWISE_DIV, exponentials, Some(sum), bf16)?;
    g.product(probabilities, v, out)?;
    g.plan(workspace_max)
}

/// The plan of the deterministic backward pass over `heads` of the shape's heads, a divisor of them. Addresses of further groups are those of
/// the first plus whole heads; the row sums (`ROW_SUM`) are dense for the group.
///
/// # Errors
/// [`Error::Absent`] if cuDNN has no plan with at most `workspace_max` bytes.
pub(super) fn backward(library: &Arc<Cudnn>, shape: &AttentionShape, heads: usize, workspace_max: usize) -> Result<Plan> {
    let all = Layouts::size(shape.heads)?;
    let layouts = Layouts { shape: *shape, heads: Layouts::size(heads)? };
    let rows = shape.rows;
    let (scores, per_row) = (layouts.scores()?, layouts.per_row(layouts.heads)?);
    let lse_alignment = if heads == shape.heads || shape.tokens.is_multiple_of(4) { 16 } else { 4 };
    let mut g = Builder::new(library);
    let q = g.real(layouts.rows(rows.q)?, number::Q, 16)?;
    let k = g.real(layouts.rows(rows.k)?.transposed(), number::K, 16)?;
    let v = g.real(layouts.rows(rows.v)?.transposed(), number::V, 16)?;
    let out = g.real(layouts.rows(rows.out)?, number::OUT, 16)?;
    let dout = g.real(layouts.rows(rows.dout)?, number::DOUT, 16)?;
    let lse = g.real(layouts.per_row(all)?, number::LSE, lse_alignment)?;
    let dq = g.real(layouts.rows(rows.dq)?, number::DQ, 16)?;
    let dk = g.real(layouts.rows(rows.dk)?, number::DK, 16)?;
    let dv = g.real(layouts.rows(rows.dv)?, number::DV, 16)?;
    let row_sum = g.real(per_row, number::ROW_SUM, 16)?;
    let (scale, one) = (g.scalar(number::SCALE)?, g.scalar(number::ONE)?);

    let dense = layouts.rows(heads * shape.head_dim)?.with(Data::CUDNN_DATA_FLOAT);
    let both = g.then(Pointwise::CUDNN_POINTWISE_MUL, dout, Some(out), dense)?;
    let sums = g.reduced(Reduce::CUDNN_REDUCE_TENSOR_ADD, both, per_row)?;
    g.pointwise(Pointwise::CUDNN_POINTWISE_MUL, sums, Some(one), row_sum)?;

    let raw = g.inner(scores)?;
    g.product(q, k, raw)?;
    let scaled = g.then(Pointwise::CUDNN_POINTWISE_MUL, raw, Some(scale), scores)?;
    let below = g.then(Pointwise::CUDNN_POINTWISE_SUB, scaled, Some(lse), scores)?;
    let probabilities = g.then(Pointwise::CUDNN_POINTWISE_EXP, below, None, scores)?;
    let flipped = scores.with(Data::CUDNN_DATA_BFLOAT16).transposed();
    let probabilities_t = g.seen_as(probabilities, flipped)?;
    g.product(probabilities_t, dout, dv)?;

    let dp = g.inner(scores)?;
    g.product(dout, v, dp)?;
    let centred = g.then(Pointwise::CUDNN_POINTWISE_SUB, dp, Some(row_sum), scores)?;
    let ds_raw = g.then(Pointwise::CUDNN_POINTWISE_MUL, centred, Some(probabilities), scores)?;
    let ds = g.then(Pointwise::CUDNN_POINTWISE_MUL, ds_raw, Some(scale), scores)?;
    let ds_t = g.seen_as(ds, flipped)?;
    g.product(ds_t, q, dk)?;
    let k_rows = g.seen_as(k, layouts.rows(rows.k)?)?;
    g.product(ds, k_rows, dq)?;
    g.plan(workspace_max)
}
