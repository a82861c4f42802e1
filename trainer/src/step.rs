//! The engine of the CPU: one optimiser step with tensors of the CPU, and where its time went.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::time::Instant;

use candle_core::Device;
use serenity_protocol::config::OptimizerConfig;
use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result};

use crate::data::HostBatch;
use crate::engine::{Computed, State, StepEngine};
use crate::log::Phases;
use crate::memory::{self, MemoryUse};
use crate::model::{AdapterGrads, AdapterSet, Flux2, MicroBatch};
use crate::optimizer::{AdamW, clip_grad_norm, host};
use crate::source::{Counters, Metered, TrainingSource};

/// Trains on the CPU.
pub struct CpuEngine {
    model: Flux2,
    source: Box<dyn TrainingSource>,
    guidance: Option<f32>,
    max_grad_norm: f64,
    adapters: AdapterSet,
    optimizer: AdamW,
    grads: Option<AdapterGrads>,
}

impl CpuEngine {
    /// An engine with `adapters` and no update made. `guidance` is the scale for a model that embeds one.
    #[must_use]
    pub fn new(
        model: Flux2,
        source: Box<dyn TrainingSource>,
        adapters: AdapterSet,
        config: &OptimizerConfig,
        guidance: Option<f32>,
    ) -> Self {
        let optimizer = AdamW::new(config, &adapters);
        Self { model, source, guidance, max_grad_norm: config.max_grad_norm, adapters, optimizer, grads: None }
    }

    fn place(&self, batches: &[HostBatch]) -> Result<Vec<MicroBatch>> {
        batches.iter().map(|b| b.to_device(&self.model.device, self.guidance)).collect()
    }
}

impl StepEngine for CpuEngine {
    fn device(&self) -> String {
        match self.model.device {
            Device::Cpu => "cpu".into(),
            ref other => format!("{:?}", other.location()),
        }
    }

    fn load(&mut self, adapters: AdapterSet, optimizer: AdamW) -> Result<()> {
        (self.adapters, self.optimizer, self.grads) = (adapters, optimizer, None);
        Ok(())
    }

    fn gradients(&mut self, batches: &[HostBatch], process: &Process) -> Result<Computed> {
        let before = self.source.counters();
        let started = Instant::now();
        let on_device = self.place(batches)?;
        let placed = started.elapsed().as_secs_f64();
        let mut metered = Metered::new(&mut *self.source, process, self.model.geometry.num_blocks());
        let output = self.model.loss_and_grads(&mut metered, &self.adapters, &on_device, &|| process.stop_requested())?;
        let computed = started.elapsed().as_secs_f64() - placed;
        let (in_forward, in_backward, promotions) = (metered.forward_seconds, metered.backward_seconds, metered.promotions);
        let moved = difference(self.source.counters(), before);
        let mut grads = output.grads;
        let clip_started = Instant::now();
        let grad_norm = clip_grad_norm(&mut grads, self.max_grad_norm)?;
        let loss = output.losses.iter().sum::<f64>() / output.losses.len().max(1) as f64;
        let mut result = Computed { loss, grad_norm, promotions, moved, ..Computed::default() };
        count_non_finite(&mut result, &output.losses, &grads)?;
        result.phases = Phases {
            data: placed,
            wait: (in_forward + in_backward - moved.copy_seconds).max(0.0),
            copy: moved.copy_seconds,
            forward: (output.forward_seconds - in_forward).max(0.0),
            backward: (computed - output.forward_seconds - in_backward).max(0.0),
            optimizer: clip_started.elapsed().as_secs_f64(),
            validation: 0.0,
        };
        self.grads = Some(grads);
        Ok(result)
    }

    fn apply(&mut self, computed: &mut Computed, lr: f64) -> Result<()> {
        let started = Instant::now();
        let grads = self.grads.take().ok_or_else(|| Error::invariant("an update without gradients"))?;
        self.optimizer.step(&mut self.adapters, &grads, lr)?;
        computed.phases.optimizer += started.elapsed().as_secs_f64();
        Ok(())
    }

    fn losses(&mut self, batches: &[HostBatch], process: &Process) -> Result<Vec<f64>> {
        let batches = self.place(batches)?;
        let mut source = Metered::new(&mut *self.source, process, self.model.geometry.num_blocks());
        self.model.loss(&mut source, &self.adapters, &batches)
    }

    fn state(&self) -> Result<State<'_>> {
        Ok(State { adapters: Cow::Borrowed(&self.adapters), optimizer: Cow::Borrowed(&self.optimizer) })
    }

    fn memory(&mut self) -> Result<MemoryUse> {
        Ok(memory::current())
    }

    fn finish(&mut self) {
        self.source.finish();
    }
}

/// What a source did between two looks at its counters.
#[must_use]
pub fn difference(after: Counters, before: Counters) -> Counters {
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
pub(crate) fn count_non_finite(computed: &mut Computed, losses: &[f64], grads: &AdapterGrads) -> Result<()> {
    losses.iter().for_each(|l| computed.look(*l));
    if !computed.grad_norm.is_finite() {
        for tensor in grads.a.iter().chain(&grads.b) {
            let values = host(tensor).map_err(|e| Error::invariant("the gradients cannot be read").cause(e))?;
            values.into_iter().for_each(|v| computed.look(f64::from(v)));
        }
    }
    Ok(())
}
