//! Noise levels: the distribution of sigma, and the shift by resolution (`spec/flux2.md` 4.1 and 4.2 of the reference).
//!
//! Sigma is 1 for pure noise. The model is given sigma itself (it multiplies by 1000 inside); noise and model use the same value, which
//! several peers do not.
#![forbid(unsafe_code)]

use serenity_protocol::config::{TimestepConfig, TimestepDistribution};

use crate::rng;

/// Lowest noise level: the last entry of the reference's training table of 1000 levels.
pub const SIGMA_MIN: f64 = 1e-3;

/// The linear mu of FLUX training for `tokens` image tokens: 0.5 at 256, 1.15 at 4096, a straight line through both.
#[must_use]
pub fn linear_mu(tokens: usize) -> f64 {
    0.5 + (1.15 - 0.5) * (tokens as f64 - 256.0) / (4096.0 - 256.0)
}

/// The shift that a sample of `tokens` image tokens gets: e^mu with the dynamic shift, else the constant.
#[must_use]
pub fn shift(config: &TimestepConfig, tokens: usize) -> f64 {
    if config.dynamic_shift { libm::exp(linear_mu(tokens)) } else { config.shift }
}

/// `shift * u / (1 + (shift - 1) u)`, the level that `u` becomes, in [`SIGMA_MIN`, 1].
#[must_use]
pub fn shifted(u: f64, shift: f64) -> f32 {
    (shift * u / (1.0 + (shift - 1.0) * u)).clamp(SIGMA_MIN, 1.0) as f32
}

/// u before the shift as a function of a uniform value in (0, 1): the quantile function of the configured distribution.
#[must_use]
pub fn quantile(distribution: TimestepDistribution, uniform: f64) -> f64 {
    match distribution {
        TimestepDistribution::Uniform => uniform,
        TimestepDistribution::LogitNormal => 1.0 / (1.0 + libm::exp(-rng::normal_quantile(uniform))),
    }
}

/// The noise level of a sample of `tokens` image tokens for a uniform value in (0, 1).
#[must_use]
pub fn level(config: &TimestepConfig, tokens: usize, uniform: f64) -> f32 {
    shifted(quantile(config.distribution, uniform), shift(config, tokens))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn config(distribution: TimestepDistribution, shift: f64, dynamic_shift: bool) -> TimestepConfig {
        TimestepConfig { distribution, shift, dynamic_shift }
    }

    #[test]
    fn linear_mu_agrees_with_the_goldens() {
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/goldens/cases/schedule.json")).unwrap();
        let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
        let rows = golden["training_linear_mu"].as_array().unwrap();
        assert!(rows.len() >= 3);
        for row in rows {
            let (tokens, mu) = (row["image_seq_len"].as_u64().unwrap(), row["mu"].as_f64().unwrap());
            assert!((linear_mu(tokens as usize) - mu).abs() < 1e-12, "{tokens} tokens");
        }
    }

    #[test]
    fn levels_are_in_range_and_follow_the_distribution() {
        for distribution in [TimestepDistribution::LogitNormal, TimestepDistribution::Uniform] {
            let config = config(distribution, 1.0, false);
            let drawn: Vec<f32> = (0..4000).map(|i| level(&config, 64, rng::unit(&mut rng::stream(3, "sigma", i, 0)))).collect();
            assert!(drawn.iter().all(|s| *s >= SIGMA_MIN as f32 && *s <= 1.0));
            let mean = drawn.iter().map(|s| f64::from(*s)).sum::<f64>() / 4000.0;
            let outer = drawn.iter().filter(|s| **s < 0.2689 || **s > 0.7311).count() as f64 / 4000.0;
            // sigmoid(-1), sigmoid(1): the normal leaves 31.7 % outside of one standard deviation, the uniform 53.8 %.
            let expected = if distribution == TimestepDistribution::Uniform { 0.538 } else { 0.317 };
            assert!((mean - 0.5).abs() < 0.02 && (outer - expected).abs() < 0.03, "{distribution:?}: mean {mean}, outer {outer}");
        }
    }

    #[test]
    fn shifts_move_the_median_as_the_formula_says() {
        assert_eq!(shifted(0.5, 3.0), 0.75);
        assert_eq!(shifted(1.0, 3.0), 1.0);
        assert_eq!(shifted(0.0, 3.0), SIGMA_MIN as f32);
        let dynamic = config(TimestepDistribution::LogitNormal, 7.0, true);
        assert!((shift(&dynamic, 4096) - 1.15f64.exp()).abs() < 1e-12, "the constant is not used with the dynamic shift");
        assert_eq!(shift(&TimestepConfig { dynamic_shift: false, ..dynamic }, 4096), 7.0);
    }
}
