//! What the processor's versions of the operations share: float32 rows in, float32 rows out, rows shared among threads.
//!
//! Every row is computed by one thread in one fixed order, so the number of threads cannot change a bit. Sums run in [`LANES`] partial sums
//! that are added in order: that lets the compiler use vector registers, which a plain sum would forbid.

use candle_core::{CpuStorage, DType, Error, Layout, Result, Shape, Storage, StorageRef, Tensor};
use rayon::prelude::*;

/// Partial sums of a row.
const LANES: usize = 16;
/// Values below which sharing rows among threads costs more than it gains.
const SHARED_VALUES_MIN: usize = 16 * 1024;

/// Rows of a float32 tensor of the CPU: the last dimension is contiguous, all others run with one stride.
pub struct Rows<'t> {
    storage: StorageRef<'t>,
    start: usize,
    stride: usize,
    width: usize,
    #[cfg(test)]
    count: usize,
}

/// `t` in float32 and in a layout that [`Rows`] can walk; copied only where needed.
pub fn walkable(t: &Tensor) -> Result<Tensor> {
    let t = t.to_dtype(DType::F32)?;
    if row_stride(&t).is_some() { Ok(t) } else { t.contiguous() }
}

fn row_stride(t: &Tensor) -> Option<usize> {
    let (width, dims) = t.dims().split_last()?;
    let (step, strides) = t.stride().split_last()?;
    if *step != 1 && *width > 1 {
        return None;
    }
    let mut expected = None;
    let mut innermost = *width;
    for (dim, stride) in dims.iter().zip(strides).rev().filter(|(dim, _)| **dim > 1) {
        match expected {
            None => innermost = *stride,
            Some(e) if e == *stride => {}
            Some(_) => return None,
        }
        expected = Some(stride * dim);
    }
    Some(innermost)
}

impl<'t> Rows<'t> {
    /// Of a tensor that [`walkable`] returned.
    pub fn of(t: &'t Tensor) -> Result<Self> {
        let (Some(stride), Some(width)) = (row_stride(t), t.dims().last().copied()) else {
            return Err(Error::RequiresContiguous { op: "rows" }.bt());
        };
        let (storage, layout) = t.storage_and_layout();
        let start = layout.start_offset();
        let count = t.elem_count() / width.max(1);
        let rows = Self {
            storage,
            start,
            stride,
            width,
            #[cfg(test)]
            count,
        };
        if count > 0 && start + (count - 1) * stride + width > rows.values()?.len() {
            return Err(Error::Msg("a tensor's layout leaves its storage".into()).bt());
        }
        Ok(rows)
    }

    /// Number of rows.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.count
    }

    fn values(&self) -> Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => Ok(values),
            other => Err(Error::UnsupportedDTypeForOp(other.dtype(), "rows").bt()),
        }
    }

    /// A function from row number to row, for use inside of loops.
    pub fn reader<'s>(&'s self) -> Result<impl Fn(usize) -> &'s [f32] + Sync + use<'s, 't>> {
        let values = self.values()?;
        let (start, stride, width) = (self.start, self.stride, self.width);
        Ok(move |i: usize| &values[start + i * stride..start + i * stride + width])
    }
}

/// A new tensor whose rows of `width` are filled by `fill(row number, row)`, in the dtype and on the device of `like`.
pub fn build(shape: impl Into<Shape>, width: usize, like: &Tensor, fill: impl Fn(usize, &mut [f32]) + Sync) -> Result<Tensor> {
    let shape = shape.into();
    let mut values = vec![0f32; shape.elem_count()];
    for_rows(&mut values, width, fill);
    Tensor::from_vec(values, shape, like.device())?.to_dtype(like.dtype())
}

/// Calls `work(row number, row)` for each row of `width` values, on all threads if there is enough to do.
pub fn for_rows(values: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    let width = width.max(1);
    if values.len() < SHARED_VALUES_MIN {
        values.chunks_exact_mut(width).enumerate().for_each(|(i, row)| work(i, row));
        return;
    }
    let rows = (SHARED_VALUES_MIN / 4).div_ceil(width);
    values.par_chunks_mut(rows * width).enumerate().for_each(|(chunk, part)| {
        part.chunks_exact_mut(width).enumerate().for_each(|(i, row)| work(chunk * rows + i, row));
    });
}

/// The values of a contiguous float32 tensor.
pub fn contiguous<'s>(storage: &'s CpuStorage, layout: &Layout) -> Result<&'s [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => Err(Error::RequiresContiguous { op: "contiguous float32" }.bt()),
    }
}

/// As [`contiguous`], to write.
pub fn contiguous_mut<'s>(storage: &'s mut CpuStorage, layout: &Layout) -> Result<&'s mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&mut values[start..end]),
        _ => Err(Error::RequiresContiguous { op: "contiguous float32" }.bt()),
    }
}

/// Sum of `f(x)` over a row.
#[inline]
pub fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|v| f(*v)).sum();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += f(*v);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// Sum of `x y` over two rows.
#[inline]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest: f32 = xs.remainder().iter().zip(ys.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in xs.zip(ys) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// Largest value of a row. NaN is passed over; it shows in what is computed from the row next.
#[inline]
pub fn max(x: &[f32]) -> f32 {
    let larger = |m: f32, v: f32| if v > m { v } else { m };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder().iter().fold(f32::NEG_INFINITY, |m, v| larger(m, *v));
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *v);
        }
    }
    lanes.iter().fold(rest, |m, v| larger(m, *v))
}

/// e^x within two units in the last place, for x clamped to -87..88; NaN stays NaN. Written without branches and calls so that it runs in
/// vector registers: x = n ln 2 + r, a polynomial in r, and n added to the exponent.
#[inline]
pub fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits; 127 is the exponent's bias.
    const ROUND: f32 = 12_582_912.0 + 127.0;
    // ln 2 in two parts; the first has so few bits that its product with n is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    p * f32::from_bits(shifted.to_bits() << 23)
}

/// 1 / (1 + e^-x).
#[inline]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use candle_core::Device;

    #[test]
    fn exp_is_exact_to_two_units() {
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours - exact).abs() <= exact * 2.5e-7, "{x}: {ours} against {exact}");
        }
        assert!(exp(f32::NAN).is_nan() && sigmoid(f32::NAN).is_nan());
        assert_eq!((exp(0.0), sigmoid(0.0)), (1.0, 0.5));
        assert!(exp(-1e30) < 1e-37 && sigmoid(-1e30) < 1e-37 && sigmoid(1e30) == 1.0);
    }

    #[test]
    fn rows_of_views_are_those_of_copies() {
        let t = Tensor::arange(0f32, 2.0 * 3.0 * 4.0 * 10.0, &Device::Cpu).unwrap().reshape((2, 3, 4, 10)).unwrap();
        let views = [
            t.narrow(3, 2, 5).unwrap(),
            t.narrow(2, 1, 2).unwrap(),
            t.narrow(0, 1, 1).unwrap(),
            t.transpose(1, 2).unwrap(),
            t.narrow(1, 1, 1).unwrap(),
            t.narrow(3, 9, 1).unwrap(),
        ];
        for view in views {
            let expected = view.contiguous().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let walk = walkable(&view).unwrap();
            let rows = Rows::of(&walk).unwrap();
            let read = rows.reader().unwrap();
            assert_eq!((0..rows.count()).flat_map(|i| read(i).to_vec()).collect::<Vec<_>>(), expected, "{view:?}");
        }
    }
}
