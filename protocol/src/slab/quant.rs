//! Per-row symmetric INT8: the one quantiser and the one dequantiser of the project.
//!
//! The rule is that of the SquareQ v2 builder (`_quantize_rowwise_int8`), bit for bit: `scale = max(amax/127, 1e-8)` in float32, then
//! multiplication by the float32 reciprocal (not division), rounding half to even, clamping to ±127. -128 never appears.
//! Loader and trainer both dequantise with [`dequantize`], so that a weight has the same bits wherever it is unpacked.
//!
//! The loops are written so that they vectorise: rounding by adding and reading back a power of two, and integer arithmetic for the
//! bfloat16 rounding. [`super::simd`] compiles the dequantiser for wider registers than plain x86-64 has.

use half::bf16;

use super::simd::{self, Width};

/// Smallest scale; that of an all-zero row.
pub const SCALE_MIN: f32 = 1e-8;

/// 1.5 * 2^23: adding it to a float32 of magnitude below 2^22 rounds to the nearest integer, ties to even, and leaves that integer in
/// the low mantissa bits (two's complement).
const ROUND: f32 = 12_582_912.0;

/// Quantises `row` into `out` and returns the scale; `out` beyond the row's length becomes 0 (padding), a shorter `out` cuts the row.
///
/// Values must be finite (check with [`all_finite`]): the codes of a row with NaN or infinity mean nothing.
#[must_use]
pub fn quantize_row(row: &[f32], out: &mut [i8]) -> f32 {
    // Magnitudes of finite floats order like their bits: an integer maximum vectorises, a float one does not.
    let amax = f32::from_bits(row.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff)));
    let scale = (amax / 127.0).max(SCALE_MIN);
    let inverse = 1.0 / scale;
    let (codes, padding) = out.split_at_mut(row.len().min(out.len()));
    for (code, value) in codes.iter_mut().zip(row) {
        let clamped = (value * inverse).clamp(-127.0, 127.0);
        *code = (clamped + ROUND).to_bits() as u8 as i8;
    }
    padding.fill(0);
    scale
}

/// `q * scale` in float32, rounded to the nearest bfloat16 (ties to even). Lengths must agree; the shorter one counts.
pub fn dequantize(q: &[i8], scale: f32, out: &mut [bf16]) {
    if scale.is_nan() {
        out.fill(bf16::NAN);
        return;
    }
    simd::dequantize(Width::best(), q, scale, out);
}

/// Whether every value is a number.
#[must_use]
pub fn all_finite(values: &[f32]) -> bool {
    values.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff)) < 0x7f80_0000
}
