//! One loop, compiled for three instruction sets and chosen at run time.
//!
//! The loop is plain Rust that the compiler vectorises; each copy of it is allowed wider registers, nothing else. Every operation in it
//! (integer to float, one float32 product, integer arithmetic) is exact or correctly rounded in each of them, so the bits are the
//! same: the tests compare all of them for every code. Plain x86-64 makes 1.5 G codes a second on one core where AVX-512 makes 20.
//!
//! Invariant: a copy runs only after the processor has been asked for its instructions; that call is the one unsafe line.

use half::bf16;

/// The instruction sets that the loop is compiled for, narrowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// What every processor of the target has.
    Portable,
    /// AVX2.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Width {
    /// The sets that this processor has, narrowest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        [Self::Portable, Self::Avx2, Self::Avx512].into_iter().filter(|w| w.is_available()).collect()
    }

    /// The widest set that this processor has.
    #[must_use]
    pub fn best() -> Self {
        if Self::Avx512.is_available() {
            Self::Avx512
        } else if Self::Avx2.is_available() {
            Self::Avx2
        } else {
            Self::Portable
        }
    }

    /// Whether this processor has it (looked up once by the standard library).
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => std::is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                std::is_x86_feature_detected!("avx512f")
                    && std::is_x86_feature_detected!("avx512bw")
                    && std::is_x86_feature_detected!("avx512dq")
                    && std::is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }
}

/// [`super::quant::dequantize`] with the instructions of `width`, or the portable ones where this processor lacks them.
pub fn dequantize(width: Width, q: &[i8], scale: f32, out: &mut [bf16]) {
    match width {
        #[cfg(target_arch = "x86_64")]
        Width::Avx512 if width.is_available() => {
            // SAFETY: a safe function whose only requirement is the instructions that the guard has just asked the processor for.
            unsafe { dequantize_avx512(q, scale, out) }
        }
        #[cfg(target_arch = "x86_64")]
        Width::Avx2 if width.is_available() => {
            // SAFETY: as above.
            unsafe { dequantize_avx2(q, scale, out) }
        }
        _ => dequantize_loop(q, scale, out),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn dequantize_avx512(q: &[i8], scale: f32, out: &mut [bf16]) {
    dequantize_loop(q, scale, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn dequantize_avx2(q: &[i8], scale: f32, out: &mut [bf16]) {
    dequantize_loop(q, scale, out);
}

/// The loop. `scale` is a number.
#[inline(always)]
fn dequantize_loop(q: &[i8], scale: f32, out: &mut [bf16]) {
    for (value, &code) in out.iter_mut().zip(q) {
        let bits = (f32::from(code) * scale).to_bits();
        // Round half to even on the upper 16 bits. A NaN could carry over; the only one here is 0 * infinity, whose low bits are zero.
        let rounded = bits.wrapping_add(0x7fff).wrapping_add((bits >> 16) & 1);
        *value = bf16::from_bits((rounded >> 16) as u16);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    /// Scales of every magnitude and kind: denormal, at the edges of bfloat16's and float32's ranges, ties, negative, zero, infinite.
    fn scales() -> Vec<f32> {
        let mut scales = vec![0.0, -0.0, f32::MIN_POSITIVE, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, 1e-8, 1.0, 1.003_906_2, 0.5, -3.25];
        scales.extend([1u32, 0x7f_ffff, 0x40_0000, 0x8000_0001].map(f32::from_bits));
        // Every exponent with mantissas that make products tie, and a few thousand arbitrary bit patterns.
        scales.extend((0u32..=254).flat_map(|e| [0u32, 0x8000, 0x1_8000, 0x55_5555, 0x7f_ffff].map(|m| f32::from_bits(e << 23 | m))));
        scales.extend((0u32..3000).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9))).filter(|s| !s.is_nan()));
        scales
    }

    #[test]
    fn every_width_gives_the_bits_of_the_half_crate() {
        let codes: Vec<i8> = (i8::MIN..=i8::MAX).collect();
        for scale in scales() {
            let expected: Vec<u16> = codes.iter().map(|&c| bf16::from_f32(f32::from(c) * scale).to_bits()).collect();
            for width in Width::available() {
                // Every start and some odd lengths, so that vector bodies and tails both meet every code.
                for (start, end) in [(0, 256), (1, 256), (3, 250), (17, 33), (200, 201), (5, 5)] {
                    let mut out = vec![bf16::ONE; end - start];
                    dequantize(width, &codes[start..end], scale, &mut out);
                    let found: Vec<u16> = out.iter().map(|v| v.to_bits()).collect();
                    assert_eq!(found, expected[start..end], "{width:?}, scale {scale:e} ({:08x})", scale.to_bits());
                }
            }
        }
    }

    #[test]
    fn the_shorter_of_two_lengths_counts() {
        for width in Width::available() {
            let mut out = [bf16::ONE; 3];
            dequantize(width, &[2, 2], 1.0, &mut out);
            assert_eq!(out.map(bf16::to_f32), [2.0, 2.0, 1.0]);
            dequantize(width, &[4; 9], 1.0, &mut out);
            assert_eq!(out.map(bf16::to_f32), [4.0; 3]);
        }
    }

    #[test]
    fn the_best_width_is_the_last_available_one() {
        assert_eq!(Width::available().last(), Some(&Width::best()));
    }
}
