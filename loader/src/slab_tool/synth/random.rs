//! Random weights as a function of (seed, tensor name, element index): any element can be drawn by itself, so the bytes do not depend on
//! the order of tensors or on the number of threads, and generation keeps up with a disk.
//!
//! A value is the sum of the four 16-bit parts of one mixed counter (SplitMix64's finaliser): close to normal, within ±3.46 standard
//! deviations, exact integer arithmetic up to one float32 multiplication. Weights need no better tails.

use half::bf16;
use serenity_protocol::checksum::xxh3_64_with_seed;

/// Standard deviation of the sum of four independent uniform 16-bit integers: sqrt(4 * (2^32 - 1) / 12).
const SUM_STD: f64 = 37_837.222;

/// The stream of one tensor.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    key: u64,
}

impl Stream {
    /// The stream of `name` under `seed`.
    #[must_use]
    pub fn new(seed: u64, name: &str) -> Self {
        Self { key: xxh3_64_with_seed(name.as_bytes(), seed) }
    }

    /// The 64 random bits at `index`.
    #[must_use]
    pub fn bits(self, index: u64) -> u64 {
        let mut z = self.key.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The value at `index`: nearly normal with this mean and standard deviation.
    #[must_use]
    pub fn normal(self, index: u64, mean: f32, unit: f32) -> f32 {
        let w = self.bits(index);
        // Four signed 16-bit parts; their sum of means is -2, which 2 takes back.
        let sum = [0, 16, 32, 48].iter().map(|shift| i32::from((w >> shift) as u16 as i16)).sum::<i32>() + 2;
        mean + sum as f32 * unit
    }

    /// The factor that [`Self::normal`] takes for a standard deviation.
    #[must_use]
    pub fn unit(std: f64) -> f32 {
        (std / SUM_STD) as f32
    }

    /// Bytes of little-endian bfloat16 values, from byte `at` of the tensor on.
    pub fn fill_bf16(self, at: u64, out: &mut [u8], mean: f32, std: f64) {
        let unit = Self::unit(std);
        fill(at, out, |index| bf16::from_f32(self.normal(index, mean, unit)).to_le_bytes());
    }

    /// Bytes of little-endian float32 values, from byte `at` of the tensor on.
    pub fn fill_f32(self, at: u64, out: &mut [u8], mean: f32, std: f64) {
        let unit = Self::unit(std);
        fill(at, out, |index| self.normal(index, mean, unit).to_le_bytes());
    }

    /// INT8 codes from the `at`-th on, uniform in -127..=127 (but for 0, which is twice as frequent: -128 becomes 0), eight to a counter.
    pub fn fill_codes(self, at: u64, out: &mut [u8]) {
        fill(at, out, |index| self.bits(index).to_le_bytes().map(|b| if b == 0x80 { 0 } else { b }));
    }
}

/// The bytes from `at` on of a row of elements of N bytes; the first and the last may be cut.
pub(super) fn fill<const N: usize>(at: u64, out: &mut [u8], each: impl Fn(u64) -> [u8; N]) {
    let (first, skip) = (at / N as u64, (at % N as u64) as usize);
    let (head, rest) = out.split_at_mut(((N - skip) % N).min(out.len()));
    head.iter_mut().zip(each(first).iter().skip(skip)).for_each(|(byte, value)| *byte = *value);
    let first = first + u64::from(skip > 0);
    let (whole, tail) = rest.as_chunks_mut::<N>();
    let count = whole.len() as u64;
    whole.iter_mut().zip(first..).for_each(|(out, index)| *out = each(index));
    tail.iter_mut().zip(each(first + count)).for_each(|(byte, value)| *byte = value);
}
