//! Operations of the text encoder: RMS norm, rotation of halves, causal attention of captions that lie one behind the other.
#![forbid(unsafe_code)]

use serenity_protocol::{Error, Result};

use super::{BLOCK, grid, int, variant};
use crate::arena::Arena;
use crate::driver::Ptr;
use crate::gpu::Gpu;
use crate::mat::Mat;

/// Queries of a block of attention.
const TILE: usize = 32;
/// Threads of it.
const THREADS: u32 = 128;
/// Features of a head at most.
pub const HEAD_DIM_MAX: usize = 128;

/// Which rows belong to which caption, on the device.
#[derive(Debug, Clone, Copy)]
pub struct Captions {
    /// Three numbers for each tile of queries: the caption's first row, the first query's place in the caption, the caption's rows.
    tiles: Ptr,
    count: usize,
    /// Rows that belong to a caption, and one more than the last of them.
    rows: usize,
}

impl Captions {
    /// Of captions `(first row, rows)`; their tiles are written into `arena`.
    ///
    /// # Errors
    /// If there is not so much memory left; the driver's.
    pub fn new(gpu: &Gpu, arena: &Arena, captions: &[(usize, usize)]) -> Result<Self> {
        let (mut tiles, mut end) = (Vec::<u32>::new(), 0);
        for (start, rows) in captions {
            for first in (0..*rows).step_by(TILE) {
                for number in [*start, first, *rows] {
                    tiles.push(u32::try_from(number).map_err(|_| Error::invariant("a caption lies too far behind").found(number))?);
                }
            }
            end = end.max(start + rows);
        }
        let at = arena.reserve(Self::bytes(captions).max(4))?;
        gpu.upload(at, bytemuck::cast_slice(&tiles))?;
        Ok(Self { tiles: at, count: tiles.len() / 3, rows: end })
    }

    /// Bytes that the tiles of `captions` take.
    #[must_use]
    pub fn bytes(captions: &[(usize, usize)]) -> usize {
        captions.iter().map(|(_, rows)| 12 * rows.div_ceil(TILE)).sum()
    }
}

/// Heads of an attention whose key heads may be fewer than its query heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupedHeads {
    /// Query heads.
    pub queries: usize,
    /// Key and value heads; divides `queries`.
    pub keys: usize,
    /// Features of each, even, at most [`HEAD_DIM_MAX`].
    pub head_dim: usize,
}

impl GroupedHeads {
    /// Columns of queries, keys and values side by side.
    #[must_use]
    pub fn packed(&self) -> usize {
        (self.queries + 2 * self.keys) * self.head_dim
    }

    fn check(&self) -> Result<()> {
        let &Self { queries, keys, head_dim } = self;
        if keys > 0 && queries > 0 && queries.is_multiple_of(keys) && head_dim.is_multiple_of(2) && (2..=HEAD_DIM_MAX).contains(&head_dim) {
            return Ok(());
        }
        Err(Error::data("attention on this device does not know such heads")
            .expected(format!("a multiple of the key heads, of an even number of features up to {HEAD_DIM_MAX}"))
            .found(format!("{queries} query heads, {keys} key heads, {head_dim} features")))
    }
}

impl Gpu {
    /// `y = weight round(x / rms(x))`, `weight [D]` in the type of the activations; `y` may be `x`.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the shapes do not fit.
    pub fn rms_norm(&self, y: Mat, x: Mat, weight: Mat, eps: f32) -> Result<()> {
        y.expect_shape("the result of a norm", x.ty, x.rows, x.cols)?;
        weight.expect_shape("a norm's weight", x.ty, 1, x.cols)?;
        if x.is_empty() {
            return Ok(());
        }
        let (name, _) = variant(&format!("rms_norm_{}", x.ty.name()), &[y, x, weight]);
        let args = [y.ptr.into(), y.stride.into(), x.ptr.into(), x.stride.into(), weight.ptr.into(), int(x.cols)?.into(), eps.into()];
        self.launch(&name, grid(x.rows, 1, 1)?, BLOCK, 0, &args)
    }

    /// Turns the two halves of each of the first `heads` heads of `x [rows, ..]` by the angles of their rows' positions, in place. `positions` has
    /// a `u32` for each row; `cos` and `sin` are dense `[positions, head_dim / 2]` in the type of `x`. Positions beyond them are the caller's defect.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the shapes do not fit.
    pub fn rotate_halves(&self, x: Mat, heads: usize, positions: Ptr, cos: Mat, sin: Mat) -> Result<()> {
        let half = cos.cols;
        cos.expect_shape("cosines", x.ty, cos.rows, half)?;
        sin.expect_shape("sines", x.ty, cos.rows, half)?;
        if heads * 2 * half > x.cols || cos.stride != half || sin.stride != half {
            return Err(Error::invariant("heads to be rotated do not fit")
                .expected(format!("{heads} of {}", 2 * half))
                .found(x.describe()));
        }
        if x.is_empty() || heads == 0 {
            return Ok(());
        }
        let args =
            [x.ptr.into(), x.stride.into(), positions.into(), cos.ptr.into(), sin.ptr.into(), int(heads)?.into(), int(2 * half)?.into()];
        self.launch(&format!("rotate_halves_{}", x.ty.name()), grid(x.rows, 1, 1)?, BLOCK, 0, &args)
    }

    /// Causal attention of each caption alone: `out [rows, H hd]` from `packed [rows, (H + 2 K) hd]`, which has queries, keys and values side by side.
    /// Rows that belong to no caption are not written.
    ///
    /// # Errors
    /// [`Error::Data`] for heads that it does not know; [`Error::Invariant`] if the shapes do not fit.
    pub fn caption_attention(&self, out: Mat, packed: Mat, heads: GroupedHeads, captions: Captions) -> Result<()> {
        heads.check()?;
        let GroupedHeads { queries, keys, head_dim } = heads;
        packed.expect_shape("packed heads", out.ty, packed.rows, heads.packed())?;
        out.expect_shape("the result of attention", out.ty, packed.rows, queries * head_dim)?;
        if captions.rows > packed.rows {
            return Err(Error::invariant("a caption has more rows than there are").expected(captions.rows).found(packed.describe()));
        }
        let k = packed.columns(queries * head_dim, keys * head_dim)?;
        let v = packed.columns((queries + keys) * head_dim, keys * head_dim)?;
        let width = head_dim.next_power_of_two().max(32);
        let args = [
            out.ptr.into(),
            out.stride.into(),
            packed.ptr.into(),
            k.ptr.into(),
            v.ptr.into(),
            packed.stride.into(),
            captions.tiles.into(),
            int(queries / keys)?.into(),
            int(head_dim)?.into(),
            (1.0 / (head_dim as f32).sqrt()).into(),
        ];
        let [tiles, heads, _] = grid(captions.count, queries, 1)?;
        self.launch(&format!("caption_attention_{}_{width}", out.ty.name()), [tiles, heads, 1], [THREADS, 1, 1], 0, &args)
    }
}
