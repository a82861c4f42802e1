//! Convolutions of 3 x 3 and 1 x 1 as matrix products, in float32.
//!
//! Channels last, a pixel's three neighbours of one row lie side by side once they are copied there ("triples"), and the convolution is three
//! products over them, one for each kernel row, that add to each other: the copy is three times the input instead of the nine of a whole
//! neighbourhood. Where an image has few pixels, or every second one is left out, whole neighbourhoods are copied instead and one product
//! serves all images of the batch. A 1 x 1 convolution is a product and no copy. The copies go in pieces of bounded memory; normalisation
//! and activation happen in them. Rejected: products over overlapping rows of a padded image, which need no copy but a distance between rows
//! smaller than a row, which cuBLASLt's documentation excludes.
#![forbid(unsafe_code)]

use serenity_protocol::{Error, Result};

use super::vae::{Norm, Patches, Strip};
use crate::driver::Ptr;
use crate::gpu::Gpu;
use crate::mat::{Mat, Ty};

/// Pixels of an image's strip from which a product of its own pays.
const TRIPLES_PIXELS_MIN: usize = 4096;
/// Channels from which a product over three pixels is worth its start.
const TRIPLES_CHANNELS_MIN: usize = 16;

/// A convolution's weight and geometry. With 3 x 3 taps, stride 1 keeps the size (zeros around); stride 2 halves it (zeros on the right and
/// at the bottom only); `up` doubles the image before (each pixel repeated).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Conv {
    /// `[output, taps * taps * input]` float32: kernel rows, then columns, then channels; rows `Conv::stride_of` apart.
    pub weight: Mat,
    /// 1 or 3.
    pub taps: usize,
    /// 1 or 2.
    pub stride: usize,
    /// Whether the input is enlarged.
    pub up: bool,
}

/// Memory for copies.
#[derive(Debug, Clone, Copy)]
pub struct Scratch {
    /// Its start, aligned to 16 bytes.
    pub ptr: Ptr,
    /// Its size.
    pub bytes: usize,
}

impl Conv {
    /// Elements from one row of a weight (and of copied neighbourhoods) to the next: whole groups of 16 bytes.
    #[must_use]
    pub fn stride_of(taps: usize, input: usize) -> usize {
        (taps * taps * input).next_multiple_of(4)
    }

    /// The least scratch memory that a convolution of `input` channels to rows of `width` pixels works with: one row of neighbourhoods.
    #[must_use]
    pub fn scratch_min(taps: usize, input: usize, width: usize) -> usize {
        if taps == 1 { 0 } else { 4 * width * Self::stride_of(taps, input) }
    }

    /// The scratch memory that serves `rows` pixel rows of the output of `batch` images at once.
    #[must_use]
    pub fn scratch_for(taps: usize, stride: usize, input: usize, [batch, rows, width]: [usize; 3]) -> usize {
        match (taps, Self::by_triples(stride, input, rows * width)) {
            (1, _) => 0,
            (_, true) => 4 * (rows + 2) * width * 3 * input,
            (taps, false) => batch * rows * Self::scratch_min(taps, input, width),
        }
    }

    fn by_triples(stride: usize, input: usize, pixels: usize) -> bool {
        stride == 1 && input >= TRIPLES_CHANNELS_MIN && input.is_multiple_of(4) && pixels >= TRIPLES_PIXELS_MIN
    }

    fn padding(&self) -> usize {
        if self.taps == 3 && self.stride == 1 { 1 } else { 0 }
    }

    fn output_width(&self, width: usize) -> usize {
        if self.up { 2 * width } else { width / self.stride }
    }
}

/// Parts of `0..total` as equal as may be, none longer than `max`.
fn parts(total: usize, max: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = total.div_ceil(max.max(1)).max(1);
    (0..count).map(move |i| (i * total / count, (i + 1) * total / count)).filter(|(start, end)| start < end)
}

impl Gpu {
    /// `out = conv(norm(x))`, or `out += conv(norm(x))`, without bias. `out` says which rows; `x` must have all that they need.
    ///
    /// # Errors
    /// [`Error::Invariant`] if shapes or rows do not fit, or the scratch memory is smaller than [`Conv::scratch_min`].
    pub fn convolve(&self, out: Strip, x: Strip, conv: &Conv, norm: Option<Norm>, accumulate: bool, scratch: Scratch) -> Result<()> {
        out.check("the output of a convolution")?;
        x.check("the input of a convolution")?;
        let (input, output) = (x.channels(), out.channels());
        let height = if conv.up { 2 * x.height } else { x.height / conv.stride };
        conv.weight.expect_shape("a convolution's weight", Ty::F32, output, conv.taps * conv.taps * input)?;
        if out.batch != x.batch || out.width != conv.output_width(x.width) || out.height != height || conv.stride == 0 {
            return Err(Error::invariant("a convolution's input and output do not fit")
                .expected(format!("{x:?}"))
                .found(format!("{out:?}")));
        }
        let beta = if accumulate { 1.0 } else { 0.0 };
        match (conv.taps, norm) {
            (1, None) if out.first == x.first && out.rows == x.rows => self.gemm_nt(out.mat, x.mat, conv.weight, 1.0, beta),
            (3, _) if Conv::by_triples(conv.stride, input, out.rows * out.width) => self.by_triples(out, x, conv, norm, beta, scratch),
            (3, _) => self.by_patches(out, x, conv, norm, beta, scratch),
            _ => Err(Error::invariant("a convolution of this kind is not there").found(format!("{conv:?} of {x:?}"))),
        }
    }

    fn by_triples(&self, out: Strip, x: Strip, conv: &Conv, norm: Option<Norm>, beta: f32, scratch: Scratch) -> Result<()> {
        let (width, cols) = (out.width, 3 * x.channels());
        let most = (scratch.bytes / (4 * width * cols)).saturating_sub(2);
        if most == 0 {
            return Err(too_little(scratch));
        }
        for image in 0..out.batch {
            // The image by itself, so that rows above and below it are zeros.
            let pixels = x.rows * x.width;
            let one = Strip { mat: x.mat.rows(image * pixels, pixels)?, batch: 1, ..x };
            let norm = norm.map(|n| Norm { table: n.table.offset(image * 12 * x.channels()), ..n });
            for (start, end) in parts(out.rows, most) {
                let rows = end - start;
                let triples = Mat::new(scratch.ptr, Ty::F32, (rows + 2) * width, cols);
                let top = (out.first + start) as isize - 1;
                let p = Patches { taps: [1, 3], stride: 1, up: conv.up, pad_left: 1, top, rows: rows + 2, start: 0, width };
                self.vae_patches(triples, one, norm, p)?;
                let to = out.mat.rows((image * out.rows + start) * width, rows * width)?;
                for ky in 0..3 {
                    let beta = if ky == 0 { beta } else { 1.0 };
                    self.gemm_nt(to, triples.rows(ky * width, rows * width)?, conv.weight.columns(ky * cols, cols)?, 1.0, beta)?;
                }
            }
        }
        Ok(())
    }

    fn by_patches(&self, out: Strip, x: Strip, conv: &Conv, norm: Option<Norm>, beta: f32, scratch: Scratch) -> Result<()> {
        let (width, cols) = (out.width, conv.taps * conv.taps * x.channels());
        let stride = Conv::stride_of(conv.taps, x.channels());
        let most = scratch.bytes / (4 * width * stride);
        if most == 0 {
            return Err(too_little(scratch));
        }
        let top = (out.first * conv.stride) as isize - conv.padding() as isize;
        for (start, end) in parts(out.batch * out.rows, most) {
            let rows = (end - start) * width;
            let patches = Mat { stride, ..Mat::new(scratch.ptr, Ty::F32, rows, cols) };
            let taps = [conv.taps, conv.taps];
            let p = Patches { taps, stride: conv.stride, up: conv.up, pad_left: conv.padding(), top, rows: out.rows, start, width };
            self.vae_patches(patches, x, norm, p)?;
            self.gemm_nt(out.mat.rows(start * width, rows)?, patches, conv.weight, 1.0, beta)?;
        }
        Ok(())
    }
}

fn too_little(scratch: Scratch) -> Error {
    Error::invariant("a convolution's scratch memory holds no row").found(format!("{} bytes", scratch.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_and_are_alike() {
        for (total, max) in [(10, 4), (1, 100), (512, 341), (7, 1), (5, 0)] {
            let all: Vec<_> = parts(total, max).collect();
            assert_eq!(all.first().map(|p| p.0), Some(0));
            assert_eq!(all.last().map(|p| p.1), Some(total));
            assert!(all.windows(2).all(|w| w[0].1 == w[1].0));
            let lengths = all.iter().map(|(a, b)| b - a);
            assert!(lengths.clone().max().unwrap_or(0) <= max.max(1) && lengths.clone().max() <= lengths.min().map(|m| m + 1));
        }
    }
}
