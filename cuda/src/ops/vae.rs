//! The VAE's operations: neighbourhoods for convolutions, biases with the sums of a group norm, softmax. Float32, channels last.
//!
//! An image may be too large for the device, so everything works on strips ([`Strip`]): a few pixel rows with their place in the image. The
//! sums of a group norm are kept by pixel row, so that they do not depend on how an image is cut. Formulas: `encoder/src/vae`.
#![forbid(unsafe_code)]

use serenity_protocol::{Error, Result};

use super::{BLOCK, THREADS, grid, int};
use crate::driver::{Pinned, Ptr};
use crate::gpu::Gpu;
use crate::mat::{Mat, Ty};

/// Most accesses of a pixel in a kernel's shared memory, `LANES_MAX` in the source: 4096 channels, or 1024 that are not made of fours.
const LANES_MAX: usize = 1024;

/// Consecutive pixel rows of every image of a batch: images after each other, `rows` pixel rows each, channels last.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Strip {
    /// `[batch * rows * width, channels]`, dense float32.
    pub mat: Mat,
    /// Images.
    pub batch: usize,
    /// Pixel rows of each image that are here.
    pub rows: usize,
    /// Pixels of a row.
    pub width: usize,
    /// The first of them, counted in the image.
    pub first: usize,
    /// Pixel rows of the whole image.
    pub height: usize,
}

impl Strip {
    /// Channels of a pixel.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.mat.cols
    }

    /// # Errors
    /// [`Error::Invariant`] if the parts contradict each other.
    pub(crate) fn check(&self, what: &str) -> Result<()> {
        self.mat.expect_shape(what, Ty::F32, self.batch * self.rows * self.width, self.mat.cols)?;
        if self.mat.stride != self.mat.cols || self.first + self.rows > self.height {
            return Err(Error::invariant(format!("{what} is no strip of an image")).found(format!("{self:?}")));
        }
        Ok(())
    }
}

/// Which neighbours of which pixels lie side by side in a row of [`Gpu::vae_patches`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patches {
    /// Neighbours downwards and to the right.
    pub taps: [usize; 2],
    /// Pixels between neighbourhoods, in both directions.
    pub stride: usize,
    /// Whether every pixel counts twice in both directions.
    pub up: bool,
    /// Zeros to the left of the image.
    pub pad_left: usize,
    /// The image's row (of the enlarged image) that the first neighbourhood starts at; above the image are zeros.
    pub top: isize,
    /// Rows of neighbourhoods of an image.
    pub rows: usize,
    /// The first to write, counted over all images.
    pub start: usize,
    /// Neighbourhoods of a row.
    pub width: usize,
}

/// How values become another's input: normalised by a table of [`Gpu::vae_norm_table`], then perhaps activated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// `[batch, 3, channels]` float32.
    pub table: Ptr,
    /// Whether silu follows.
    pub silu: bool,
}

/// What [`Gpu::vae_norm_table`] needs.
#[derive(Debug, Clone, Copy)]
pub struct NormTable {
    /// The result, `[batch, 3, channels]` float32: means, scales, shifts.
    pub table: Ptr,
    /// `[batch, height, groups, 2]` float64, from [`Gpu::vae_finish`].
    pub sums: Ptr,
    /// `[channels]` float32.
    pub weight: Ptr,
    /// `[channels]` float32.
    pub bias: Ptr,
    /// Images.
    pub batch: usize,
    /// Pixel rows of an image.
    pub height: usize,
    /// Pixels of a row.
    pub width: usize,
    /// Groups.
    pub groups: usize,
    /// Channels, a multiple of the groups.
    pub channels: usize,
    /// Added to the variance.
    pub eps: f64,
}

impl Gpu {
    /// Neighbourhoods of `x`, one in each row of `out` (rows may lie further apart): as many rows of them as `out` holds, from `p.start` on.
    ///
    /// # Errors
    /// [`Error::Invariant`] if they reach rows of the image that are not in the strip, or shapes do not fit.
    pub fn vae_patches(&self, out: Mat, x: Strip, norm: Option<Norm>, p: Patches) -> Result<()> {
        x.check("the input of a convolution")?;
        let [taps_y, taps_x] = p.taps;
        let channels = x.channels();
        let wrong = |what: &str| Error::invariant(format!("neighbourhoods {what}")).found(format!("{p:?} of {x:?} to {}", out.describe()));
        if out.cols != taps_y * taps_x * channels || p.width == 0 || !out.rows.is_multiple_of(p.width) || out.ty != Ty::F32 {
            return Err(wrong("have another shape than their place"));
        }
        let rows = out.rows / p.width;
        if p.rows == 0 || p.start + rows > p.rows * x.batch {
            return Err(wrong("are fewer than their place has"));
        }
        // All rows of the image that are read must be here; those beyond the image are zeros.
        let (up, bottom) = (usize::from(p.up), p.top + ((p.rows - 1) * p.stride + taps_y) as isize);
        let first = usize::try_from(p.top).unwrap_or(0) >> up;
        let last = usize::try_from(bottom).unwrap_or(0).min(x.height << up).div_ceil(1 << up);
        if first < x.first || last > x.first + x.rows {
            return Err(wrong("reach beyond the strip"));
        }
        let wide = channels.is_multiple_of(4) && x.mat.wide(4) && out.wide(4) && norm.is_none_or(|n| n.table.address().is_multiple_of(16));
        if wide
            && p.taps == [1, 3]
            && x.batch == 1
            && !p.up
            && (p.stride, p.pad_left, p.start, p.width) == (1, 1, 0, x.width)
            && out.stride == out.cols
        {
            return self.triples(out, x, norm, p);
        }
        let per = taps_y * taps_x * channels / if wide { 4 } else { 1 };
        let mut args = vec![out.ptr.into(), out.stride.into(), x.mat.ptr.into(), norm.map_or(Ptr::NULL, |n| n.table).into()];
        args.push(i32::from(norm.is_some_and(|n| n.silu)).into());
        for value in [x.rows, x.width, channels, x.first, x.height, taps_y, taps_x, p.stride, up, p.pad_left] {
            args.push(int(value)?.into());
        }
        args.push(i32::try_from(p.top).map_err(|_| wrong("start too far away"))?.into());
        for value in [p.rows, p.start, p.width] {
            args.push(int(value)?.into());
        }
        let name = if wide { "vae_patches" } else { "vae_patches_1" };
        self.launch(name, grid(rows, p.width * per, THREADS as usize)?, BLOCK, 0, &args)
    }

    /// [`Self::vae_patches`] of one image, of a pixel and its neighbours to the left and to the right.
    fn triples(&self, out: Mat, x: Strip, norm: Option<Norm>, p: Patches) -> Result<()> {
        let mut args = vec![out.ptr.into(), x.mat.ptr.into(), norm.map_or(Ptr::NULL, |n| n.table).into()];
        args.push(i32::from(norm.is_some_and(|n| n.silu)).into());
        for value in [x.width, x.channels(), x.first, x.height] {
            args.push(int(value)?.into());
        }
        args.push(i32::try_from(p.top).map_err(|_| Error::invariant("neighbourhoods start too far away"))?.into());
        let grid = grid(out.rows / p.width, x.width * x.channels() / 4, THREADS as usize)?;
        self.launch("vae_triples", grid, BLOCK, 0, &args)
    }

    /// Adds up to two biases (`[channels]` float32, or null) to every pixel, in place; with `sums`, writes each pixel row's sums and sums of
    /// squares of every group to its place in `[batch, height, groups, 2]` float64.
    ///
    /// # Errors
    /// [`Error::Invariant`] for more channels than the kernel has room for, or shapes that do not fit.
    pub fn vae_finish(&self, y: Strip, biases: [Ptr; 2], sums: Option<(Ptr, usize)>) -> Result<()> {
        y.check("the output of a convolution")?;
        let [bias, bias2] = biases;
        let (channels, groups) = (y.channels(), sums.map_or(1, |(_, groups)| groups));
        let aligned = |ptr: &Ptr| ptr.address().is_multiple_of(16);
        let fours = groups > 0 && (channels / groups).is_multiple_of(4) && y.mat.wide(4) && biases.iter().all(aligned);
        let lanes = if fours { channels / 4 } else { channels };
        if groups == 0 || !channels.is_multiple_of(groups) || lanes > LANES_MAX {
            return Err(Error::invariant("a group norm has more channels than its kernel has room for, or none to a group")
                .expected(format!("a multiple of {groups} groups, at most {LANES_MAX} accesses of a pixel"))
                .found(format!("{channels} channels")));
        }
        if bias == Ptr::NULL && bias2 == Ptr::NULL && sums.is_none() {
            return Ok(());
        }
        let mut args = vec![y.mat.ptr.into(), bias.into(), bias2.into(), sums.map_or(Ptr::NULL, |(ptr, _)| ptr).into()];
        for value in [y.rows, y.width, channels, groups, y.first, y.height] {
            args.push(int(value)?.into());
        }
        let [rows, ..] = grid(y.rows, 1, 1)?;
        let [batch, ..] = grid(y.batch, 1, 1)?;
        self.launch(if fours { "vae_finish" } else { "vae_finish_1" }, [rows, batch, 1], BLOCK, 0, &args)
    }

    /// Sums of all pixel rows to mean, scale and shift by image and channel.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the shapes do not fit.
    pub fn vae_norm_table(&self, t: &NormTable) -> Result<()> {
        if t.groups == 0 || !t.channels.is_multiple_of(t.groups) {
            return Err(Error::invariant("a group norm's channels are no multiple of its groups").found(format!("{t:?}")));
        }
        let count = (t.channels / t.groups * t.height * t.width) as f64;
        let mut args = vec![t.table.into(), t.sums.into(), t.weight.into(), t.bias.into()];
        for value in [t.height, t.groups, t.channels] {
            args.push(int(value)?.into());
        }
        args.extend_from_slice(&[count.into(), t.eps.into()]);
        let ([groups, ..], [batch, ..]) = (grid(t.groups, 1, 1)?, grid(t.batch, 1, 1)?);
        self.launch("vae_norm_table", [groups, batch, 1], BLOCK, 0, &args)
    }

    /// 8-bit values at `bytes` to float32 in -1 to 1, as many as `out` has.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the type does not fit.
    pub fn vae_pixels(&self, out: Mat, bytes: Ptr) -> Result<()> {
        out.reshape(1, out.len())?.expect_shape("pixels", Ty::F32, 1, out.len())?;
        let grid = grid(out.len().div_ceil(THREADS as usize), 1, 1)?;
        self.launch("vae_pixels", grid, BLOCK, 0, &[out.ptr.into(), bytes.into(), out.len().into()])
    }

    /// Softmax of every row, in place, float32.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the type does not fit.
    pub fn softmax_rows(&self, x: Mat) -> Result<()> {
        x.expect_shape("scores", Ty::F32, x.rows, x.cols)?;
        if x.is_empty() {
            return Ok(());
        }
        let name = if x.wide(4) { "vae_softmax" } else { "vae_softmax_1" };
        self.launch(name, grid(x.rows, 1, 1)?, BLOCK, 0, &[x.ptr.into(), x.stride.into(), int(x.cols)?.into()])
    }

    /// Copies float32 values to the device, in the order of the compute stream, and waits.
    ///
    /// # Errors
    /// The driver's.
    pub fn upload_f32(&self, to: Ptr, from: &[f32]) -> Result<()> {
        self.upload(to, bytemuck::cast_slice(from))
    }

    /// Copies float32 values from the device after the compute stream's work, and waits.
    ///
    /// # Errors
    /// A fault of earlier work.
    pub fn download_f32(&self, to: &mut [f32], from: Ptr) -> Result<()> {
        self.download(bytemuck::cast_slice_mut(to), from)
    }

    /// Copies float32 values from the start of page-locked memory, after all work on the device.
    ///
    /// # Errors
    /// [`Error::Invariant`] outside of the memory; a fault of earlier work.
    pub fn read_f32(&self, to: &mut [f32], from: &Pinned) -> Result<()> {
        from.read(0, bytemuck::cast_slice_mut(to))
    }
}
