//! Random weights as a function of (seed, tensor name, element index): any element can be drawn by itself, so the bytes do not depend on
//! the order of tensors or on the number of threads, and generation keeps up with a disk.
//!
//! A value is the sum of the four 16-bit parts of one mixed counter (SplitMix64's finaliser): close to normal, within ±3.46 standard
//! deviations, exact integer arithmetic up to one float32 multiplication. Weights need no better tails.

use half::bf16;
use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Standard deviation of the sum of four independent uniform 16-bit integers: sqrt(4 * (2^32 - 1) / 12).
const SUM_STD: f64 = 37_837.222;
/// Values of one task.
const TASK_VALUES: usize = 1 << 16;

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

    /// Little-endian bfloat16 values of the elements from `first` on.
    #[must_use]
    pub fn bf16_bytes(self, first: u64, count: usize, mean: f32, std: f64) -> Vec<u8> {
        let unit = Self::unit(std);
        self.bytes(first, count, 2, |index, out: &mut [u8; 2]| *out = bf16::from_f32(self.normal(index, mean, unit)).to_le_bytes())
    }

    /// Little-endian float32 values of the elements from `first` on.
    #[must_use]
    pub fn f32_bytes(self, first: u64, count: usize, mean: f32, std: f64) -> Vec<u8> {
        let unit = Self::unit(std);
        self.bytes(first, count, 4, |index, out: &mut [u8; 4]| *out = self.normal(index, mean, unit).to_le_bytes())
    }

    /// INT8 codes, uniform in -127..=127 (but for 0, which is twice as frequent: -128 becomes 0), eight to a counter. `first` and
    /// `count` are multiples of 8.
    #[must_use]
    pub fn code_bytes(self, first: u64, count: usize) -> Vec<u8> {
        self.bytes(first / 8, count / 8, 8, |index, out: &mut [u8; 8]| {
            *out = self.bits(index).to_le_bytes().map(|b| if b == 0x80 { 0 } else { b });
        })
    }

    fn bytes<const N: usize>(self, first: u64, count: usize, width: usize, each: impl Fn(u64, &mut [u8; N]) + Sync) -> Vec<u8> {
        let mut bytes = vec![0; count * width];
        bytes.par_chunks_mut(TASK_VALUES * width).enumerate().for_each(|(task, part)| {
            let start = first + (task * TASK_VALUES) as u64;
            for (i, out) in part.as_chunks_mut::<N>().0.iter_mut().enumerate() {
                each(start + i as u64, out);
            }
        });
        bytes
    }
}
