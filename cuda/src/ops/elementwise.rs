//! SwiGLU, gated residual, sums, casts, silu, time embedding, random values.
#![forbid(unsafe_code)]

use serenity_protocol::Result;

use super::{BLOCK, THREADS, check_modulation, grid, int, variant};
use crate::driver::{Arg, Pinned, Ptr, Stream};
use crate::gpu::Gpu;
use crate::mat::{Mat, Ty};

/// Thread blocks of a fetch: enough bytes under way for any bus, few enough to disturb nobody.
const FETCH_BLOCKS: usize = 16;

/// Rows for which [`Gpu::linear_f32`] reads the weight once.
pub const LINEAR_ROWS: usize = 8;

/// Pointer and stride of a view, as kernels take them.
fn view(mat: Mat) -> [Arg; 2] {
    [mat.ptr.into(), mat.stride.into()]
}

impl Gpu {
    /// Queues an elementwise kernel over `shape`, choosing its variant by all of `mats`.
    fn elementwise(&self, name: &str, shape: Mat, mats: &[Mat], args: &[Arg]) -> Result<()> {
        self.elementwise_on(self.compute(), name, shape, mats, args)
    }

    fn elementwise_on(&self, stream: &Stream, name: &str, shape: Mat, mats: &[Mat], args: &[Arg]) -> Result<()> {
        let (name, lanes) = variant(name, mats);
        let grid = grid(shape.rows, shape.cols, lanes * THREADS as usize)?;
        self.kernel(&name)?.launch(stream, &name, grid, BLOCK, 0, args)
    }

    /// `m = silu(gate) value`; `m` may be either of them.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] if the shapes do not fit.
    pub fn swiglu(&self, m: Mat, gate: Mat, value: Mat) -> Result<()> {
        gate.expect_shape("a gate", m.ty, m.rows, m.cols)?;
        value.expect_shape("a gated value", m.ty, m.rows, m.cols)?;
        let args: Vec<Arg> = [m, gate, value].into_iter().flat_map(view).chain([m.cols.into()]).collect();
        self.elementwise(&format!("swiglu_{}", m.ty.name()), m, &[m, gate, value], &args)
    }

    /// The gradients of gate and value from `dm`; they may replace gate and value.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] if the shapes do not fit.
    pub fn swiglu_bwd(&self, dgate: Mat, dvalue: Mat, dm: Mat, gate: Mat, value: Mat) -> Result<()> {
        let mats = [dgate, dvalue, dm, gate, value];
        for mat in mats {
            mat.expect_shape("an operand of SwiGLU's backward", dm.ty, dm.rows, dm.cols)?;
        }
        let mut args: Vec<Arg> = mats.into_iter().flat_map(view).collect();
        args.push(dm.cols.into());
        self.elementwise(&format!("swiglu_bwd_{}", dm.ty.name()), dm, &mats, &args)
    }

    /// `y = h + gate o`, `gate [B, D]` float32; `y` may be `h` or `o`.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] if the shapes do not fit.
    pub fn gated_residual(&self, y: Mat, h: Mat, gate: Mat, o: Mat) -> Result<()> {
        self.gated(y, Some(h), gate, o)
    }

    /// `d_o = gate dy`: the gradient of what was gated; that of the residual is `dy` itself.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] if the shapes do not fit.
    pub fn gated_residual_bwd(&self, d_o: Mat, gate: Mat, dy: Mat) -> Result<()> {
        self.gated(d_o, None, gate, dy)
    }

    fn gated(&self, y: Mat, h: Option<Mat>, gate: Mat, o: Mat) -> Result<()> {
        o.expect_shape("a gated output", y.ty, y.rows, y.cols)?;
        h.unwrap_or(y).expect_shape("a residual", y.ty, y.rows, y.cols)?;
        if y.is_empty() {
            return Ok(());
        }
        let tokens = check_modulation("a gate", gate, y)?;
        let mut args = view(y).to_vec();
        args.extend_from_slice(&[h.map_or(Ptr::NULL, |h| h.ptr).into(), h.map_or(0, |h| h.stride).into()]);
        args.extend(view(gate));
        args.extend(view(o));
        args.extend_from_slice(&[int(tokens)?.into(), y.cols.into()]);
        self.elementwise(&format!("gated_{}", y.ty.name()), y, &[y, h.unwrap_or(y), gate, o], &args)
    }

    /// `stream += gate o` in float32, and its bf16 copy `y`: the sum rounded, or with `h` the sum of that and `gate o`, the same bytes as
    /// [`Self::gated_residual`] of `h`. `y` may be `h` or `o`.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] if the shapes do not fit.
    pub fn gated_stream(&self, y: Mat, stream: Mat, h: Option<Mat>, gate: Mat, o: Mat) -> Result<()> {
        for (what, mat) in [("a copy of the stream", y), ("a gated output", o), ("a residual", h.unwrap_or(y))] {
            mat.expect_shape(what, Ty::Bf16, y.rows, y.cols)?;
        }
        stream.expect_shape("a residual stream", Ty::F32, y.rows, y.cols)?;
        if y.is_empty() {
            return Ok(());
        }
        let tokens = check_modulation("a gate", gate, y)?;
        let mut args: Vec<Arg> = [y, stream].into_iter().flat_map(view).collect();
        args.extend_from_slice(&[h.map_or(Ptr::NULL, |h| h.ptr).into(), h.map_or(0, |h| h.stride).into()]);
        args.extend([gate, o].into_iter().flat_map(view));
        args.extend_from_slice(&[int(tokens)?.into(), y.cols.into()]);
        self.elementwise("gated_stream_bf16", y, &[y, stream, h.unwrap_or(y), gate, o], &args)
    }

    /// `out [m, n] = x [m, k] wᵀ`, or added to it: `w [n, k]` of either type, all else float32, so that `x` is not rounded. For few rows:
    /// then it is as fast as `w` can be read; for many it is far slower than [`Self::gemm_nt`].
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] if the shapes do not fit.
    pub fn linear_f32(&self, out: Mat, x: Mat, w: Mat, add: bool) -> Result<()> {
        w.expect_shape("a weight", w.ty, out.cols, x.cols)?;
        x.expect_shape("rows to be multiplied", Ty::F32, out.rows, x.cols)?;
        out.expect_shape("a product in float32", Ty::F32, out.rows, out.cols)?;
        if out.is_empty() {
            return Ok(());
        }
        let (name, at_once) = if out.rows == 1 { ("row", 1) } else { ("rows", LINEAR_ROWS) };
        let (name, _) = variant(&format!("linear_{name}_{}", w.ty.name()), &[x, w]);
        let mut args: Vec<Arg> = [out, x, w].into_iter().flat_map(view).collect();
        args.extend_from_slice(&[out.rows.into(), out.cols.into(), x.cols.into(), i32::from(add).into()]);
        let warps = (THREADS / 32) as usize;
        self.launch(&name, grid(out.cols.div_ceil(warps), out.rows.div_ceil(at_once), 1)?, BLOCK, 0, &args)
    }

    /// `out = a + factor b`, `out` and `a` of one type, `b` of any; `out` may be `a` or `b`.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] if the shapes do not fit.
    pub fn add(&self, out: Mat, a: Mat, b: Mat, factor: f32) -> Result<()> {
        a.expect_shape("a summand", out.ty, out.rows, out.cols)?;
        self.sum(self.compute(), out, Some(a), b, factor)
    }

    /// `y += alpha x`.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] if the shapes do not fit.
    pub fn axpy(&self, y: Mat, alpha: f32, x: Mat) -> Result<()> {
        self.add(y, y, x, alpha)
    }

    /// `out = x` in the type of `out`: a cast, or a copy between views.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] if the shapes do not fit.
    pub fn cast(&self, out: Mat, x: Mat) -> Result<()> {
        self.cast_on(self.compute(), out, x)
    }

    /// The same on `stream`.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] if the shapes do not fit.
    pub fn cast_on(&self, stream: &Stream, out: Mat, x: Mat) -> Result<()> {
        self.sum(stream, out, None, x, 1.0)
    }

    fn sum(&self, stream: &Stream, out: Mat, a: Option<Mat>, b: Mat, factor: f32) -> Result<()> {
        b.expect_shape("a summand", b.ty, out.rows, out.cols)?;
        let mut args = view(out).to_vec();
        args.extend_from_slice(&[a.map_or(Ptr::NULL, |a| a.ptr).into(), a.map_or(0, |a| a.stride).into()]);
        args.extend(view(b));
        args.extend_from_slice(&[factor.into(), out.cols.into()]);
        self.elementwise_on(stream, &format!("add_{}_{}", out.ty.name(), b.ty.name()), out, &[out, a.unwrap_or(out), b], &args)
    }

    /// `y = x sigmoid(x)`; `y` may be `x`.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] if the shapes do not fit.
    pub fn silu(&self, y: Mat, x: Mat) -> Result<()> {
        x.expect_shape("an input of silu", y.ty, y.rows, y.cols)?;
        let args: Vec<Arg> = [y, x].into_iter().flat_map(view).chain([y.cols.into()]).collect();
        self.elementwise(&format!("silu_{}", y.ty.name()), y, &[y, x], &args)
    }

    /// `out [B, channels]`: cosines, then sines, of `1000 values[b] frequencies[j]`, j below half the channels; an odd last channel is zero.
    /// `values [B]` and `frequencies [channels / 2]` are float32; the host computes the frequencies with the reference's last bit.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] if there are too many rows.
    pub fn sinusoid(&self, out: Mat, values: Ptr, frequencies: Ptr) -> Result<()> {
        let args = [out.ptr.into(), out.stride.into(), values.into(), frequencies.into(), out.cols.into()];
        self.launch(&format!("sinusoid_{}", out.ty.name()), grid(out.rows, out.cols, THREADS as usize)?, BLOCK, 0, &args)
    }

    /// Uniform values in [-limit, limit): functions of seed and position, for checks and synthetic runs.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] if the matrix is too large.
    pub fn fill_random(&self, x: Mat, seed: u64, limit: f32) -> Result<()> {
        let args = [x.ptr.into(), x.stride.into(), x.cols.into(), seed.into(), limit.into()];
        self.launch(&format!("random_{}", x.ty.name()), grid(x.rows, x.cols, THREADS as usize)?, BLOCK, 0, &args)
    }

    /// Adds the number of values of `x` that are infinite or NaN to the `u32` at `count`.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] if the matrix is too large.
    pub fn count_bad(&self, count: Ptr, x: Mat) -> Result<()> {
        let args = [count.into(), x.ptr.into(), x.stride.into(), x.cols.into()];
        self.launch(&format!("count_bad_{}", x.ty.name()), grid(x.rows, x.cols, THREADS as usize)?, BLOCK, 0, &args)
    }

    /// Queues a copy of `bytes` bytes at `offset` of `from` to the device by a few multiprocessors: beside long copies of other streams it
    /// gets its part of the bus, where a copy engine would do it after them.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] outside of the range; the driver's.
    pub fn fetch_host(&self, stream: &Stream, to: Ptr, from: &Pinned, offset: usize, bytes: usize) -> Result<()> {
        let source = from.device_ptr().offset(offset);
        let wide = [to.address(), source.address(), bytes as u64].iter().all(|v| v.is_multiple_of(16));
        if !wide || offset.checked_add(bytes).is_none_or(|end| end > from.bytes()) {
            // Refuses what is outside of the range.
            return stream.copy_in(to, from, offset, bytes);
        }
        let blocks = bytes.div_ceil(16 * THREADS as usize).min(FETCH_BLOCKS) as u32;
        let args = [to.into(), source.into(), (bytes / 16).into()];
        self.kernel("fetch_host")?.launch(stream, "fetch_host", [blocks, 1, 1], BLOCK, 0, &args)
    }

    /// Queues setting `bytes` bytes to zero.
    ///
    /// # Errors
    /// The driver's.
    pub fn zero(&self, ptr: Ptr, bytes: usize) -> Result<()> {
        self.compute().fill(ptr, 0, bytes)
    }
}
