//! The learning rate of a step.
//!
//! The factor follows the original (`squareq-stagehand-serenity` facts, 4.1): a counter s that is 1 at the first update, `s / warmup`
//! while it is at most `warmup`, then a shape over `p = (s - warmup) / (steps - warmup)`. The update of step n uses s = n. Everything
//! is a function of the step alone, so nothing of it needs saving.
#![forbid(unsafe_code)]

use std::f64::consts::PI;

use serenity_protocol::config::{SchedulerConfig, SchedulerKind};

/// Factor on the peak learning rate at the update of step `step` (1 is the first) of a run of `steps`.
///
/// A warm-up that is as long as the run leaves no room for the shape; steps past the end keep its last value.
#[must_use]
pub fn factor(config: &SchedulerConfig, step: u64, steps: u64) -> f64 {
    let warmup = config.warmup_steps;
    if step < warmup {
        return step as f64 / warmup as f64;
    }
    let progress = if steps > warmup { ((step - warmup) as f64 / (steps - warmup) as f64).min(1.0) } else { 0.0 };
    let half_cosine = |p: f64| 0.5 * (1.0 + libm::cos(PI * p));
    let shape = match config.kind {
        SchedulerKind::Constant => return 1.0,
        SchedulerKind::Linear => 1.0 - progress,
        SchedulerKind::Cosine => half_cosine(progress),
        SchedulerKind::CosineWithRestarts if progress >= 1.0 => 0.0,
        SchedulerKind::CosineWithRestarts => half_cosine((config.num_cycles.max(0.0) * progress).fract()),
    };
    config.min_factor + (1.0 - config.min_factor) * shape
}

/// Whether the learning rates of the first steps depend on how many steps there are in all.
///
/// They do not for a constant schedule, with or without warm-up: such a run may be made longer and resumed, and its log and adapters
/// are those of a run that was that long from the start. For every decaying shape they do.
#[must_use]
pub fn depends_on_length(config: &SchedulerConfig) -> bool {
    config.kind != SchedulerKind::Constant
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn schedule(kind: SchedulerKind, warmup_steps: u64) -> SchedulerConfig {
        SchedulerConfig { kind, warmup_steps, min_factor: 0.0, num_cycles: 1.0 }
    }

    /// The case study's log prints the rate after the scheduler has moved on: the value at printed step n is that of update n + 1.
    #[test]
    fn reproduces_the_case_studys_table() {
        let config = schedule(SchedulerKind::Cosine, 10);
        for (printed, rate) in [(1, 2.00e-5), (5, 6.00e-5), (10, 1.00e-4), (25, 9.83e-5), (30, 9.70e-5), (35, 9.55e-5)] {
            let got = 1e-4 * factor(&config, printed + 1, 200);
            assert!((got - rate).abs() <= 0.006e-5, "printed step {printed}: {got:e} against {rate:e}");
        }
        // Updates themselves: a tenth of the peak first, the peak at the end of warm-up, nothing at the end.
        for (step, expected) in [(1, 0.1), (9, 0.9), (10, 1.0), (105, 0.5), (200, 0.0)] {
            assert!((factor(&config, step, 200) - expected).abs() < 1e-12, "step {step}");
        }
    }

    #[test]
    fn shapes_stay_between_the_lowest_factor_and_one() {
        for kind in [SchedulerKind::Constant, SchedulerKind::Linear, SchedulerKind::Cosine, SchedulerKind::CosineWithRestarts] {
            for (warmup, steps) in [(0, 1), (0, 50), (10, 50), (50, 50), (60, 50)] {
                let config = SchedulerConfig { kind, warmup_steps: warmup, min_factor: 0.2, num_cycles: 3.0 };
                let factors: Vec<f64> = (1..=steps).map(|s| factor(&config, s, steps)).collect();
                for (i, f) in factors.iter().enumerate() {
                    let low = if (i as u64 + 1) < warmup { 0.0 } else { 0.2 };
                    assert!((low..=1.0).contains(f), "{kind:?} {warmup}/{steps}: factor {f} at step {}", i + 1);
                }
            }
        }
    }

    #[test]
    fn linear_and_restarts_have_their_shape() {
        let linear = schedule(SchedulerKind::Linear, 0);
        assert!((factor(&linear, 25, 100) - 0.75).abs() < 1e-12);
        let restarts = SchedulerConfig { num_cycles: 2.0, ..schedule(SchedulerKind::CosineWithRestarts, 0) };
        // Half way: the second cycle starts at one; a quarter of the way is the middle of the first.
        assert!((factor(&restarts, 50, 100) - 1.0).abs() < 1e-12 && (factor(&restarts, 25, 100) - 0.5).abs() < 1e-12);
        assert_eq!(factor(&restarts, 100, 100), 0.0);
    }

    #[test]
    fn only_a_constant_schedule_is_independent_of_the_length() {
        for kind in [SchedulerKind::Constant, SchedulerKind::Linear, SchedulerKind::Cosine, SchedulerKind::CosineWithRestarts] {
            let config = schedule(kind, 5);
            let same = (1..=20).all(|s| factor(&config, s, 20) == factor(&config, s, 40));
            assert_eq!(same, !depends_on_length(&config), "{kind:?}");
        }
    }
}
