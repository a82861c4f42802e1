//! One optimiser step, and where its time went. Shared by the run and the benchmark.
#![forbid(unsafe_code)]

use std::time::Instant;

use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result};

use crate::data::HostBatch;
use crate::log::Phases;
use crate::model::{AdapterGrads, AdapterSet, Flux2, MicroBatch};
use crate::optimizer::{AdamW, clip_grad_norm, host};
use crate::source::{Counters, Metered, TrainingSource};

/// Gradients of a step, not yet applied.
pub struct Computed {
    /// Mean loss over the micro-batches.
    pub loss: f64,
    /// Clipped gradients of the mean loss.
    pub grads: AdapterGrads,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// NaNs among losses and gradients.
    pub nan_count: u64,
    /// Infinities among them.
    pub inf_count: u64,
    /// Weights used in a wider type than the slab's.
    pub promotions: u64,
    /// Time so far; `data` and `optimizer` are added by the caller's clock.
    pub phases: Phases,
    /// What the source did.
    pub moved: Counters,
}

impl Computed {
    /// Whether losses and gradients are all numbers.
    #[must_use]
    pub fn is_finite(&self) -> bool {
        self.nan_count + self.inf_count == 0 && self.loss.is_finite() && self.grad_norm.is_finite()
    }
}

/// What a step needs besides the state that it changes.
pub struct StepContext<'c> {
    /// The model.
    pub model: &'c Flux2,
    /// The process, for heartbeats and stopping.
    pub process: &'c Process,
    /// Guidance scale for a model that embeds it.
    pub guidance: Option<f32>,
    /// Largest gradient norm; 0 = no clipping.
    pub max_grad_norm: f64,
}

/// Computes the gradients of a step. Changes nothing but the source's position, so that a step can be abandoned at any time.
///
/// # Errors
/// [`Error::TryAgain`] if the process is asked to stop; what model and source report.
pub fn compute(
    context: &StepContext<'_>,
    source: &mut dyn TrainingSource,
    adapters: &AdapterSet,
    batches: &[HostBatch],
) -> Result<Computed> {
    let model = context.model;
    let before = source.counters();
    let started = Instant::now();
    let on_device = batches.iter().map(|b| b.to_device(&model.device, context.guidance)).collect::<Result<Vec<MicroBatch>>>()?;
    let placed = started.elapsed().as_secs_f64();
    let mut metered = Metered::new(source, context.process, model.geometry.num_blocks());
    let output = model.loss_and_grads(&mut metered, adapters, &on_device, &|| context.process.stop_requested())?;
    let computed = started.elapsed().as_secs_f64() - placed;
    let (in_forward, in_backward, promotions) = (metered.forward_seconds, metered.backward_seconds, metered.promotions);
    let moved = difference(source.counters(), before);
    let mut grads = output.grads;
    let clip_started = Instant::now();
    let grad_norm = clip_grad_norm(&mut grads, context.max_grad_norm)?;
    let (nan_count, inf_count) = count_non_finite(&output.losses, &grads, grad_norm)?;
    let phases = Phases {
        data: placed,
        wait: (in_forward + in_backward - moved.copy_seconds).max(0.0),
        copy: moved.copy_seconds,
        forward: (output.forward_seconds - in_forward).max(0.0),
        backward: (computed - output.forward_seconds - in_backward).max(0.0),
        optimizer: clip_started.elapsed().as_secs_f64(),
        validation: 0.0,
    };
    let loss = output.losses.iter().sum::<f64>() / output.losses.len().max(1) as f64;
    Ok(Computed { loss, grads, grad_norm, nan_count, inf_count, promotions, phases, moved })
}

/// Applies the gradients. The time goes into `phases.optimizer`.
///
/// # Errors
/// As [`AdamW::step`].
pub fn apply(computed: &mut Computed, optimizer: &mut AdamW, adapters: &mut AdapterSet, lr: f64) -> Result<()> {
    let started = Instant::now();
    optimizer.step(adapters, &computed.grads, lr)?;
    computed.phases.optimizer += started.elapsed().as_secs_f64();
    Ok(())
}

fn difference(after: Counters, before: Counters) -> Counters {
    Counters {
        moved_bytes: after.moved_bytes.saturating_sub(before.moved_bytes),
        copy_seconds: after.copy_seconds - before.copy_seconds,
        wait_seconds: after.wait_seconds - before.wait_seconds,
        waits: after.waits.saturating_sub(before.waits),
        hits: after.hits.saturating_sub(before.hits),
        misses: after.misses.saturating_sub(before.misses),
        evictions: after.evictions.saturating_sub(before.evictions),
        ..after
    }
}

/// NaNs and infinities. A finite norm proves that no gradient has any (squares of float32 cannot overflow float64), so that the
/// values are only looked at when something is wrong.
fn count_non_finite(losses: &[f64], grads: &AdapterGrads, grad_norm: f64) -> Result<(u64, u64)> {
    let mut counts = (0, 0);
    let mut look = |value: f64| {
        counts.0 += u64::from(value.is_nan());
        counts.1 += u64::from(value.is_infinite());
    };
    losses.iter().for_each(|l| look(*l));
    if !grad_norm.is_finite() {
        for tensor in grads.a.iter().chain(&grads.b) {
            let values = host(tensor).map_err(|e| Error::invariant("the gradients cannot be read").cause(e))?;
            values.into_iter().for_each(|v| look(f64::from(v)));
        }
    }
    Ok(counts)
}
