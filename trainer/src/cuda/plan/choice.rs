//! How the memory that may vary is shared out: slots for streaming, resident blocks, block inputs and activations on the device or on the host.
//!
//! There are few sensible possibilities; each is filled up with resident blocks and played through [`Forecast`], and the fastest is taken.
//! Where possibilities are equal the simplest is (fewest states on the host, fewest slots). Nothing here changes a result of training.
#![forbid(unsafe_code)]

use serenity_cuda::arena::ALIGNMENT;
use serenity_protocol::{Error, Result};

use super::forecast::first_adapted;
use super::{CONDITIONING, EMBEDDERS, Forecast, Need, Plan, is_double, measured, other_bytes};
use crate::cuda::assignment::Slots;
use crate::cuda::flight::Activations;
use crate::cuda::inputs::Turns;
use crate::cuda::single::Parcel;

/// A possibility must be better by this part to be worth more than a simpler one.
const WORTH: f64 = 0.002;

/// The fastest plan with the parts that are `fixed` and one of `rings` for dequantised matrices.
///
/// # Errors
/// [`Error::Config`] if none fits.
pub(super) fn choose(fixed: &Plan, need: &Need<'_>, rings: &[usize]) -> Result<Plan> {
    let (mut best, mut least): (Option<Plan>, Option<Plan>) = (None, None);
    let parts: Vec<Plan> = possible_parts(fixed, need).collect();
    for turns in possible_turns(need) {
        let (step, host) = Plan::step_bytes(need, turns)?;
        if host > need.limits.host_max {
            continue;
        }
        let with = |(fixed, tile): (&Plan, &usize)| possible_slots(&Plan { tile: *tile, step, host, turns, ..fixed.clone() }, need);
        for plan in parts.iter().flat_map(|p| rings.iter().map(move |r| (p, r))).flat_map(with) {
            if plan.total() > need.budget {
                if least.as_ref().is_none_or(|l| plan.total() < l.total()) {
                    least = Some(plan);
                }
                continue;
            }
            for mut plan in possible_parcels(&plan, need)? {
                fill(&mut plan, need);
                keep(&mut plan, need)?;
                plan.forecast = Forecast::of(&plan, need, &need.limits.rates)?;
                if best.as_ref().is_none_or(|b| plan.forecast.seconds < b.forecast.seconds * (1.0 - WORTH)) {
                    best = Some(plan);
                }
            }
        }
    }
    let too_small = || {
        let beside = need.limits.beside;
        let (minimum, plan) =
            least.map_or((String::new(), String::new()), |p| ((p.total() + beside).div_ceil(1 << 20).to_string(), p.to_string()));
        Error::config("the device memory allowed for training is too small")
            .expected(format!("at least {minimum} MiB, context and libraries ({} MiB) included", beside.div_ceil(1 << 20)))
            .found(format!("{} MiB\n{plan}", (need.budget + beside) >> 20))
            .advice(
                "raise memory.stagehand.vram_high_watermark_mb if the device has more, set memory.strategy to \"stagehand\", or lower resolution, \
                 batch_size or gradient_accumulation_steps",
            )
    };
    best.ok_or_else(too_small)
}

/// The same with some of the weights that condition a micro-batch on the host.
fn possible_parts(fixed: &Plan, need: &Need<'_>) -> impl Iterator<Item = Plan> {
    let asked = need.limits.hosted.map(|h| vec![h]);
    asked.unwrap_or_else(|| vec![0, EMBEDDERS, CONDITIONING.len()]).into_iter().filter_map(|hosted| {
        let (other, hosted_bytes) = other_bytes(need.geometry, need.ty, hosted);
        (hosted_bytes <= need.limits.hosted_max).then(|| Plan { other, hosted, hosted_bytes, ..fixed.clone() })
    })
}

/// Ways to keep block inputs, simplest first.
fn possible_turns(need: &Need<'_>) -> Vec<Turns> {
    if let Some(turns) = need.limits.turns {
        return vec![turns];
    }
    let states = need.geometry.num_blocks() + 1;
    // A fetch has the visits of one matrix less than there are to be done. Visits of several micro-batches are long.
    let count = if need.shapes.len() > 2 { 2 } else { 4 };
    let mut all = vec![Turns::none()];
    for turns in [Turns::new(states / 4, count), Turns::new(states / 2, count), Turns::new(states, count), Turns::new(states, 2)] {
        if !all.contains(&turns) {
            all.push(turns);
        }
    }
    all
}

/// The same plan with all blocks resident if they fit, and with each sensible number of slots.
fn possible_slots(base: &Plan, need: &Need<'_>) -> Vec<Plan> {
    let all: usize = need.payloads.iter().map(|p| p.bytes.next_multiple_of(ALIGNMENT)).sum();
    if need.limits.resident_max >= need.payloads.len() && base.total() + all <= need.budget {
        return vec![Plan { resident: need.geometry.blocks().collect(), resident_bytes: all, ..base.clone() }];
    }
    let largest = Slots::of(need.payloads).largest();
    let total: usize = Slots::of(need.payloads).spans.iter().sum();
    let fewest = (need.limits.buffers.0.max(1) * largest).min(total);
    let most = (need.limits.buffers.1 * largest).clamp(fewest, total.max(fewest));
    (fewest..=most).map(|slots| Plan { slots, ..base.clone() }).collect()
}

/// The same plan without activations on the host, and with those of some single blocks there, evenly spread: the bus back and forth is busy with
/// them while the blocks between compute.
fn possible_parcels(base: &Plan, need: &Need<'_>) -> Result<Vec<Plan>> {
    let first = first_adapted(need);
    let singles: Vec<_> = need.geometry.blocks().skip(first).filter(|b| !is_double(need.geometry, *b)).collect();
    let one = measured(|m| need.shapes.iter().try_for_each(|s| Parcel::new(m, s).map(drop)))?;
    let with = |(count, sets): (usize, usize)| {
        let count = count.min(singles.len());
        // The middle of each of so many equal runs.
        let at = |i: usize| singles.get((2 * i + 1) * singles.len() / (2 * count.max(1))).copied();
        let parcels = Turns::through(count, sets);
        let travelling = (0..count).filter_map(at).collect();
        Plan { travelling, parcels, parcel_bytes: parcels.count * one, parcel_host: parcels.saved() * one, ..base.clone() }
    };
    if let Some(asked) = need.limits.travelling {
        return Ok(vec![with(asked)]);
    }
    let all = singles.len();
    let some = [(all / 4, 1), (all / 2, 1), (all / 2, 2), (all * 5 / 8, 2), (all * 3 / 4, 2), (all * 7 / 8, 2), (all, 2)];
    let fits = |plan: &Plan| plan.parcel_host <= need.limits.parcels_max && plan.total() <= need.budget;
    let mut plans = vec![base.clone()];
    plans.extend(some.into_iter().filter(|(count, _)| *count > 0).map(with).filter(fits));
    Ok(plans)
}

/// Blocks stay on the device as far as the budget goes, spread evenly over the model.
fn fill(plan: &mut Plan, need: &Need<'_>) {
    if plan.resident.len() == need.payloads.len() {
        return;
    }
    let all: usize = need.payloads.iter().map(|p| p.bytes.next_multiple_of(ALIGNMENT)).sum();
    let wanted = (need.budget - plan.total()) as f64 / all.max(1) as f64;
    let mut share = 0.0;
    for (block, payload) in need.geometry.blocks().zip(need.payloads) {
        let bytes = payload.bytes.next_multiple_of(ALIGNMENT);
        share += wanted * bytes as f64;
        if share >= bytes as f64 && plan.total() + bytes <= need.budget && plan.resident.len() < need.limits.resident_max {
            share -= bytes as f64;
            plan.resident.push(block);
            plan.resident_bytes += bytes;
        }
    }
}

/// With every block and every input on the device, activations are kept as far as the budget goes: of the last blocks, for all cost the same.
fn keep(plan: &mut Plan, need: &Need<'_>) -> Result<()> {
    if plan.resident.len() < need.payloads.len() || plan.turns.saved() > 0 {
        return Ok(());
    }
    let first = first_adapted(need);
    for block in need.geometry.blocks().skip(first).collect::<Vec<_>>().into_iter().rev() {
        if plan.travelling.contains(&block) {
            continue;
        }
        let double = is_double(need.geometry, block);
        let bytes = measured(|m| need.shapes.iter().try_for_each(|s| Activations::new(m, s, double).map(drop)))?;
        if plan.kept.len() >= need.limits.kept_max || plan.total() + bytes > need.budget {
            break;
        }
        plan.kept.push(block);
        plan.kept_bytes += bytes;
    }
    Ok(())
}
