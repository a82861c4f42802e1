//! Everything random in a run, as a function of what it is for and never of what was drawn before.
//!
//! A stream is a ChaCha8 generator whose key is the hash of (seed, purpose, a, b): the noise of (step 7, row 3) is the same whether
//! steps 1 to 6 ran in this process, in one that was killed, or not at all. That is what makes a resumed run equal to an
//! uninterrupted one bit for bit without saving any generator state. The algorithms below are fixed here, on top of the raw words of
//! ChaCha, and use `libm` instead of the platform's math library: the same seed gives the same bytes on every machine.
#![forbid(unsafe_code)]

pub use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// The generator of one (seed, purpose, a, b). Streams with any of the four different are independent.
///
/// `a` and `b` are the counters of the purpose, e.g. step and row. Consumers draw a known number of words and drop the stream.
#[must_use]
pub fn stream(seed: u64, purpose: &str, a: u64, b: u64) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new_derive_key("serenity 2026 random streams v1");
    for word in [seed, a, b] {
        hasher.update(&word.to_le_bytes());
    }
    // Last, so that no length prefix is needed: the three words before it have a fixed size.
    hasher.update(purpose.as_bytes());
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}

/// Uniform in the open interval (0, 1): the middles of 2^53 equal cells, so that neither end is ever drawn.
#[must_use]
pub fn unit(rng: &mut ChaCha8Rng) -> f64 {
    // 2^53 cells; (cell + 1/2) is exact below 2^52 and rounds to an integer in 1..2^53 - 1 or to even above: never 0, and the one
    // value that could round up to 2^53 is clamped.
    let cell = (rng.next_u64() >> 11) as f64;
    ((cell + 0.5) * (1.0 / 9_007_199_254_740_992.0)).min(1.0 - f64::EPSILON / 2.0)
}

/// A standard normal value: the inverse of the normal distribution function at `unit`, one word each.
#[must_use]
pub fn normal(rng: &mut ChaCha8Rng) -> f64 {
    normal_quantile(unit(rng))
}

/// `count` standard normal values, rounded to float32.
#[must_use]
pub fn normals(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| normal(rng) as f32).collect()
}

/// `count` values uniform in [low, high), rounded to float32.
#[must_use]
pub fn uniforms(rng: &mut ChaCha8Rng, count: usize, low: f64, high: f64) -> Vec<f32> {
    (0..count).map(|_| (low + (high - low) * unit(rng)) as f32).collect()
}

/// Uniform in `0..bound` without bias (rejection of the incomplete last interval); 0 for a bound of 0 or 1.
#[must_use]
pub fn below(rng: &mut ChaCha8Rng, bound: u64) -> u64 {
    if bound < 2 {
        return 0;
    }
    // The largest multiple of `bound` that fits; words at or above it would favour small results.
    let limit = u64::MAX - u64::MAX % bound;
    loop {
        let word = rng.next_u64();
        if word < limit {
            return word % bound;
        }
    }
}

/// A permutation of `0..count` (Fisher and Yates).
#[must_use]
pub fn permutation(rng: &mut ChaCha8Rng, count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for i in (1..count).rev() {
        let j = below(rng, i as u64 + 1) as usize;
        order.swap(i, j);
    }
    order
}

fn polynomial(x: f64, coefficients: &[f64; 8]) -> f64 {
    coefficients.iter().rev().fold(0.0, |sum, c| sum * x + c)
}

/// Inverse of the standard normal distribution function for `p` in (0, 1): algorithm AS 241 (Wichura 1988), PPND16, relative error
/// about 1e-16.
#[must_use]
pub fn normal_quantile(p: f64) -> f64 {
    const A: [f64; 8] = [
        3.387_132_872_796_366_5,
        1.331_416_678_917_843_8e2,
        1.971_590_950_306_551_3e3,
        1.373_169_376_550_946e4,
        4.592_195_393_154_987e4,
        6.726_577_092_700_87e4,
        3.343_057_558_358_813e4,
        2.509_080_928_730_122_7e3,
    ];
    const B: [f64; 8] = [
        1.0,
        4.231_333_070_160_091e1,
        6.871_870_074_920_579e2,
        5.394_196_021_424_751e3,
        2.121_379_430_158_66e4,
        3.930_789_580_009_271e4,
        2.872_908_573_572_194_3e4,
        5.226_495_278_852_854e3,
    ];
    const C: [f64; 8] = [
        1.423_437_110_749_683_5,
        4.630_337_846_156_546,
        5.769_497_221_460_691,
        3.647_848_324_763_204_5,
        1.270_458_252_452_368_4,
        2.417_807_251_774_506e-1,
        2.272_384_498_926_918_4e-2,
        7.745_450_142_783_414e-4,
    ];
    const D: [f64; 8] = [
        1.0,
        2.053_191_626_637_759,
        1.676_384_830_183_803_8,
        6.897_673_349_851e-1,
        1.481_039_764_274_800_8e-1,
        1.519_866_656_361_645_7e-2,
        5.475_938_084_995_345e-4,
        1.050_750_071_644_416_9e-9,
    ];
    const E: [f64; 8] = [
        6.657_904_643_501_103,
        5.463_784_911_164_114,
        1.784_826_539_917_291_3,
        2.965_605_718_285_049e-1,
        2.653_218_952_657_612_4e-2,
        1.242_660_947_388_078_4e-3,
        2.711_555_568_743_487_6e-5,
        2.010_334_399_292_288_1e-7,
    ];
    const F: [f64; 8] = [
        1.0,
        5.998_322_065_558_88e-1,
        1.369_298_809_227_358e-1,
        1.487_536_129_085_061_5e-2,
        7.868_691_311_456_133e-4,
        1.846_318_317_510_054_7e-5,
        1.421_511_758_316_446e-7,
        2.044_263_103_389_939_8e-15,
    ];
    let q = p - 0.5;
    if q.abs() <= 0.425 {
        let r = 0.180_625 - q * q;
        return q * polynomial(r, &A) / polynomial(r, &B);
    }
    let tail = if q < 0.0 { p } else { 1.0 - p };
    let r = libm::sqrt(-libm::log(tail));
    let magnitude =
        if r <= 5.0 { polynomial(r - 1.6, &C) / polynomial(r - 1.6, &D) } else { polynomial(r - 5.0, &E) / polynomial(r - 5.0, &F) };
    if q < 0.0 { -magnitude } else { magnitude }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn quantile_agrees_with_reference_values() {
        // Python: statistics.NormalDist().inv_cdf(p)
        for (p, expected) in
            [(0.5, 0.0), (0.975, QUANTILE_975), (0.1, QUANTILE_10), (1e-9, QUANTILE_1E9), (1e-15, QUANTILE_1E15), (0.93, QUANTILE_93)]
        {
            let got = normal_quantile(p);
            assert!((got - expected).abs() <= 1e-14 * expected.abs().max(1.0), "{p}: {got} against {expected}");
        }
        assert!(normal_quantile(1.0 - f64::EPSILON / 2.0).is_finite());
    }

    const QUANTILE_975: f64 = 1.9599639845400536;
    const QUANTILE_10: f64 = -1.2815515655446008;
    const QUANTILE_1E9: f64 = -5.9978070150076865;
    const QUANTILE_1E15: f64 = -7.941345326170995;
    const QUANTILE_93: f64 = 1.4757910281791708;

    /// Resume and comparisons between machines rest on these values: a change of them is a change of every run.
    #[test]
    fn values_are_fixed() {
        let mut rng = stream(42, "noise", 1, 0);
        let drawn: Vec<u32> = normals(&mut rng, 4).iter().map(|v| v.to_bits()).collect();
        assert_eq!(drawn, FIXED_NORMALS, "{drawn:?}");
        assert_eq!(permutation(&mut stream(42, "order", 0, 0), 8), FIXED_ORDER);
    }

    const FIXED_NORMALS: [u32; 4] = [3_217_281_796, 3_217_401_203, 1_068_227_185, 3_218_054_985];
    const FIXED_ORDER: [usize; 8] = [0, 7, 3, 2, 4, 5, 6, 1];

    #[test]
    fn each_key_part_gives_another_stream() {
        let base = (42, "noise", 3, 5);
        let first = |(s, p, a, b): (u64, &str, u64, u64)| stream(s, p, a, b).next_u64();
        assert_eq!(first(base), first(base));
        for other in [(43, "noise", 3, 5), (42, "sigma", 3, 5), (42, "noise", 4, 5), (42, "noise", 3, 6), (42, "noise", 5, 3)] {
            assert_ne!(first(base), first(other), "{other:?}");
        }
    }

    #[test]
    fn streams_are_uncorrelated_and_normal() {
        let n = 20_000;
        let a = normals(&mut stream(1, "noise", 1, 0), n);
        let b = normals(&mut stream(1, "noise", 1, 1), n);
        let mean = |v: &mut dyn Iterator<Item = f64>| v.sum::<f64>() / n as f64;
        let product = mean(&mut a.iter().zip(&b).map(|(x, y)| f64::from(x * y)));
        assert!(product.abs() < 0.03, "correlation {product}");
        let (first, second) = (mean(&mut a.iter().map(|x| f64::from(*x))), mean(&mut a.iter().map(|x| f64::from(x * x))));
        let fourth = mean(&mut a.iter().map(|x| f64::from(x.powi(4))));
        assert!(first.abs() < 0.03 && (second - 1.0).abs() < 0.04 && (fourth - 3.0).abs() < 0.25, "{first} {second} {fourth}");
    }

    #[test]
    fn permutations_hold_every_index_and_bounds_hold() {
        for count in [0, 1, 2, 9, 100] {
            let mut order = permutation(&mut stream(7, "order", 2, 0), count);
            order.sort_unstable();
            assert_eq!(order, (0..count).collect::<Vec<_>>());
        }
        let mut rng = stream(7, "below", 0, 0);
        assert!((0..1000).all(|_| below(&mut rng, 3) < 3));
        let drawn = uniforms(&mut rng, 1000, -0.25, 0.25);
        assert!(drawn.iter().all(|v| (-0.25..=0.25).contains(v)) && drawn.iter().any(|v| *v > 0.2) && drawn.iter().any(|v| *v < -0.2));
    }
}
