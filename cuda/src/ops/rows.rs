//! Dequantisation, LayerNorm with modulation, RMSNorm with rotation.
#![forbid(unsafe_code)]

use serenity_protocol::{Error, Result};

use super::{BLOCK, THREADS, check_modulation, grid, int, variant};
use crate::driver::{Ptr, Stream};
use crate::gpu::Gpu;
use crate::mat::{Mat, Ty};

/// Threads of a block of `dequant_pieces_bf16`.
const PIECES_THREADS: u32 = 1024;
/// Codes of a row that a warp of it takes at once.
const PIECE_CODES: usize = 512;

/// Rows of INT8 codes with a float32 scale each, as a slab's payload has them.
#[derive(Debug, Clone, Copy)]
pub struct Int8Rows {
    /// `[rows, padded]` codes.
    pub codes: Ptr,
    /// `[rows]` float32.
    pub scales: Ptr,
    /// Rows.
    pub rows: usize,
    /// Codes from one row to the next.
    pub padded: usize,
}

/// The attention's side of queries, keys and values: element (sample, token, head) starts at the sum of each index times its stride.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadStrides {
    /// Elements between samples.
    pub sample: usize,
    /// Elements between tokens.
    pub token: usize,
    /// Elements between heads.
    pub head: usize,
}

impl HeadStrides {
    /// Of a dense `[B, T, H, hd]`.
    #[must_use]
    pub fn token_major(tokens: usize, heads: usize, head_dim: usize) -> Self {
        Self { sample: tokens * heads * head_dim, token: heads * head_dim, head: head_dim }
    }

    /// Of a dense `[B, H, T, hd]`.
    #[must_use]
    pub fn head_major(tokens: usize, heads: usize, head_dim: usize) -> Self {
        Self { sample: tokens * heads * head_dim, token: head_dim, head: tokens * head_dim }
    }
}

/// Queries, keys and values of one stream in the packed layout of the projections: views of `[B tokens, H hd]`.
#[derive(Debug, Clone, Copy)]
pub struct PackedHeads {
    /// Queries.
    pub q: Mat,
    /// Keys.
    pub k: Mat,
    /// Values.
    pub v: Mat,
}

/// The same in the attention's layout; all three start at sample 0, joint token 0, head 0.
#[derive(Debug, Clone, Copy)]
pub struct JointHeads {
    /// Queries.
    pub q: Ptr,
    /// Keys.
    pub k: Ptr,
    /// Values.
    pub v: Ptr,
    /// Their common strides.
    pub strides: HeadStrides,
}

/// What the normalisation and rotation of one stream need.
#[derive(Debug, Clone, Copy)]
pub struct HeadNorm {
    /// Samples.
    pub samples: usize,
    /// Heads.
    pub heads: usize,
    /// Features of a head, even.
    pub head_dim: usize,
    /// The stream's first token in the joint sequence.
    pub first_token: usize,
    /// `[hd]` float32, of the queries.
    pub weight_q: Ptr,
    /// `[hd]` float32, of the keys.
    pub weight_k: Ptr,
    /// Cosines `[joint tokens, hd / 2]`, float32, dense.
    pub cos: Mat,
    /// Sines, the same.
    pub sin: Mat,
    /// Added to the mean square.
    pub eps: f32,
}

impl Gpu {
    /// `out [rows, cols] = codes * scale`, through bf16 whatever the type of `out`: bit for bit what the host's dequantiser gives. Columns of
    /// padding are left out.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the shapes do not fit.
    pub fn dequant_rows(&self, out: Mat, from: Int8Rows) -> Result<()> {
        self.dequant_rows_on(self.compute(), 0, out, from)
    }

    /// The same on `stream`; with `blocks`, by so many thread blocks at most, each of which fills a multiprocessor: the rest of the device
    /// is left to others. (Where rows are not made of pieces of 512 codes, and for float32, by as many as there is work.)
    ///
    /// # Errors
    /// [`Error::Invariant`] if the shapes do not fit.
    pub fn dequant_rows_on(&self, stream: &Stream, blocks: u32, out: Mat, from: Int8Rows) -> Result<()> {
        if out.rows != from.rows || out.cols > from.padded {
            return Err(Error::invariant("codes and weights differ in shape")
                .expected(format!("{} x {}", from.rows, from.padded))
                .found(out.describe()));
        }
        if out.is_empty() {
            return Ok(());
        }
        let wide = out.wide(16) && from.codes.address().is_multiple_of(16) && from.padded.is_multiple_of(16);
        let args = [
            out.ptr.into(),
            out.stride.into(),
            from.codes.into(),
            from.padded.into(),
            from.scales.into(),
            out.rows.into(),
            out.cols.into(),
        ];
        let items = out.rows * (out.cols / PIECE_CODES);
        let countable = u32::try_from(items).is_ok_and(|items| items < u32::MAX / 2);
        if wide && out.cols.is_multiple_of(PIECE_CODES) && out.ty == Ty::Bf16 && countable {
            let most = if blocks > 0 { blocks } else { self.properties().multiprocessors };
            let useful = items.div_ceil(PIECES_THREADS as usize / 32);
            let grid = [most.min(u32::try_from(useful).unwrap_or(most)), 1, 1];
            return self.kernel("dequant_pieces_bf16")?.launch(stream, "dequant_pieces_bf16", grid, [PIECES_THREADS, 1, 1], 0, &args);
        }
        let name = format!("dequant_rows_{}{}", out.ty.name(), if wide { "" } else { "_1" });
        let threads = THREADS as usize;
        let grid = if wide { grid(out.rows.div_ceil(4), out.cols, 16 * threads)? } else { grid(out.rows, out.cols, threads)? };
        self.kernel(&name)?.launch(stream, &name, grid, BLOCK, 0, &args)
    }

    /// `y = (1 + scale) LN(x) + shift`; `shift` and `scale` `[B, D]` float32, views of a wider matrix are fine if both have one stride.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the shapes do not fit.
    pub fn ln_mod(&self, y: Mat, x: Mat, shift: Mat, scale: Mat, eps: f32) -> Result<()> {
        y.expect_shape("the result of a norm", x.ty, x.rows, x.cols)?;
        if x.is_empty() {
            return Ok(());
        }
        let tokens = check_modulation("a scale", scale, x)?;
        check_modulation("a shift", shift, x)?;
        if shift.stride != scale.stride || shift.rows != scale.rows {
            return Err(Error::invariant("shift and scale differ in layout").expected(scale.describe()).found(shift.describe()));
        }
        let (name, _) = variant(&format!("ln_mod_{}", x.ty.name()), &[y, x, Mat { ty: Ty::F32, ..shift }, scale]);
        let args = [
            y.ptr.into(),
            y.stride.into(),
            x.ptr.into(),
            x.stride.into(),
            shift.ptr.into(),
            scale.ptr.into(),
            scale.stride.into(),
            int(tokens)?.into(),
            int(x.cols)?.into(),
            eps.into(),
        ];
        self.launch(&name, grid(x.rows, 1, 1)?, BLOCK, 0, &args)
    }

    /// `dx = [residual +] LN backward of (1 + scale) dy`; `dx` may be `dy` or the residual.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the shapes do not fit.
    pub fn ln_mod_bwd(&self, dx: Mat, residual: Option<Mat>, dy: Mat, x: Mat, scale: Mat, eps: f32) -> Result<()> {
        for (what, mat) in [("the gradient of a norm's input", dx), ("the gradient of a norm", dy), ("a residual", residual.unwrap_or(dx))]
        {
            mat.expect_shape(what, x.ty, x.rows, x.cols)?;
        }
        if x.is_empty() {
            return Ok(());
        }
        let tokens = check_modulation("a scale", scale, x)?;
        let (name, _) = variant(&format!("ln_mod_bwd_{}", x.ty.name()), &[dx, residual.unwrap_or(dx), dy, x, scale]);
        let args = [
            dx.ptr.into(),
            dx.stride.into(),
            residual.map_or(Ptr::NULL, |r| r.ptr).into(),
            residual.map_or(0, |r| r.stride).into(),
            dy.ptr.into(),
            dy.stride.into(),
            x.ptr.into(),
            x.stride.into(),
            scale.ptr.into(),
            scale.stride.into(),
            int(tokens)?.into(),
            int(x.cols)?.into(),
            eps.into(),
        ];
        self.launch(&name, grid(x.rows, 1, 1)?, BLOCK, 0, &args)
    }

    /// Queries and keys normalised and rotated, values moved, from the projections into a part of the joint sequence. With no place for values
    /// ([`Ptr::NULL`]) they stay where they are.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the shapes do not fit.
    pub fn qk_norm_rope(&self, to: JointHeads, from: PackedHeads, norm: &HeadNorm) -> Result<()> {
        let Some(mut shape) = self.head_launch("qk_norm_rope", &[from.q, from.k, from.v], to, norm)? else { return Ok(()) };
        if to.v == Ptr::NULL {
            shape.grid[1] = 2;
        }
        let mut args = Vec::with_capacity(23);
        for mat in [from.q, from.k, from.v] {
            args.extend_from_slice(&[mat.ptr.into(), mat.stride.into()]);
        }
        args.extend_from_slice(&[to.q, to.k, to.v].map(crate::Arg::from));
        shape.finish(&mut args, to.strides, norm)?;
        self.launch(&shape.name, shape.grid, BLOCK, 0, &args)
    }

    /// The gradients of the projections' queries, keys and values from those in the attention's layout; `from` are the projections
    /// themselves (the values are not read).
    ///
    /// # Errors
    /// [`Error::Invariant`] if the shapes do not fit.
    pub fn qk_norm_rope_bwd(&self, to: PackedHeads, grads: JointHeads, from: PackedHeads, norm: &HeadNorm) -> Result<()> {
        let mats = [to.q, to.k, to.v, from.q, from.k];
        let Some(shape) = self.head_launch("qk_norm_rope_bwd", &mats, grads, norm)? else { return Ok(()) };
        let mut args = Vec::with_capacity(28);
        for mat in [from.q, from.k] {
            args.extend_from_slice(&[mat.ptr.into(), mat.stride.into()]);
        }
        args.extend_from_slice(&[grads.q, grads.k, grads.v].map(crate::Arg::from));
        args.extend_from_slice(&[grads.strides.sample.into(), grads.strides.token.into(), grads.strides.head.into()]);
        for mat in [to.q, to.k, to.v] {
            args.extend_from_slice(&[mat.ptr.into(), mat.stride.into()]);
        }
        shape.finish_norm(&mut args, norm)?;
        self.launch(&shape.name, shape.grid, BLOCK, 0, &args)
    }

    /// Checks shapes; nothing for an empty stream.
    fn head_launch(&self, name: &str, packed: &[Mat], joint: JointHeads, norm: &HeadNorm) -> Result<Option<HeadLaunch>> {
        let &HeadNorm { samples, heads, head_dim, first_token, cos, sin, .. } = norm;
        let (rows, ty) = packed.first().map_or((0, Ty::F32), |m| (m.rows, m.ty));
        for mat in packed {
            mat.expect_shape("a projection", ty, rows, heads * head_dim)?;
        }
        if rows == 0 {
            return Ok(None);
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) || samples == 0 || !rows.is_multiple_of(samples) {
            return Err(
                Error::invariant("heads that cannot be rotated").found(format!("{samples} samples, {rows} rows, head_dim {head_dim}"))
            );
        }
        let tokens = rows / samples;
        for (what, table) in [("cosines", cos), ("sines", sin)] {
            table.expect_shape(what, Ty::F32, table.rows, head_dim / 2)?;
            if table.rows < first_token + tokens || table.stride != head_dim / 2 {
                return Err(Error::invariant(format!("the table of {what} is too short"))
                    .expected(first_token + tokens)
                    .found(table.describe()));
            }
        }
        let lanes = ty.lanes();
        let aligned = |ptr: Ptr| ptr.address().is_multiple_of(16);
        let HeadStrides { sample, token, head } = joint.strides;
        let wide = head_dim.is_multiple_of(lanes)
            && packed.iter().all(|m| m.wide(lanes))
            && [joint.q, joint.k, joint.v, norm.weight_q, norm.weight_k, cos.ptr, sin.ptr].into_iter().all(aligned)
            && [sample, token, head].iter().all(|s| s.is_multiple_of(lanes));
        let per_access = if wide { lanes } else { 2 };
        let group = head_dim.div_ceil(per_access).next_power_of_two().min(32);
        let items = rows * heads;
        let [x, ..] = grid(items.div_ceil(THREADS as usize / group), 1, 1)?;
        let name = format!("{name}_{}{}", ty.name(), if wide { "" } else { "_2" });
        Ok(Some(HeadLaunch { name, grid: [x, 3, 1], items, tokens, group }))
    }
}

/// How a kernel over heads is launched.
struct HeadLaunch {
    name: String,
    grid: [u32; 3],
    items: usize,
    tokens: usize,
    group: usize,
}

impl HeadLaunch {
    fn finish(&self, args: &mut Vec<crate::Arg>, strides: HeadStrides, norm: &HeadNorm) -> Result<()> {
        args.extend_from_slice(&[strides.sample.into(), strides.token.into(), strides.head.into()]);
        self.finish_norm(args, norm)
    }

    fn finish_norm(&self, args: &mut Vec<crate::Arg>, norm: &HeadNorm) -> Result<()> {
        args.extend_from_slice(&[norm.weight_q.into(), norm.weight_k.into(), norm.cos.ptr.into(), norm.sin.ptr.into(), self.items.into()]);
        for value in [self.tokens, norm.first_token, norm.heads, norm.head_dim, self.group] {
            args.push(int(value)?.into());
        }
        args.push(norm.eps.into());
        Ok(())
    }
}
