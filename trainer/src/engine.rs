//! What the training loop sees of a device: gradients of a step, their application, losses, state.
//!
//! The loop ([`crate::run`]) knows samples, schedule, log and checkpoints; an engine knows where parameters live and how a step is computed.
//! [`crate::step::CpuEngine`] computes with tensors of the CPU, [`crate::gpu::engine::CudaEngine`] on a GPU. Checkpoints pass between them:
//! the state is the same numbers in the same format, although the next step's last bits are those of the device that computes it.
//!
//! An engine may be dropped in the middle of a step: [`StepEngine::gradients`] changes nothing that [`StepEngine::state`] shows.
#![forbid(unsafe_code)]

use std::borrow::Cow;

use serde::Serialize;
use serenity_protocol::Result;
use serenity_protocol::process::Process;

use crate::cuda::clock::{HostTimes, Times};
use crate::data::HostBatch;
use crate::log::Phases;
use crate::memory::MemoryUse;
use crate::model::AdapterSet;
use crate::optimizer::AdamW;
use crate::source::Counters;

/// A step whose gradients are computed and clipped, and not yet applied.
#[derive(Debug, Clone, Default)]
pub struct Computed {
    /// Mean loss over the micro-batches.
    pub loss: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// NaNs among losses and gradients.
    pub nan_count: u64,
    /// Infinities among them.
    pub inf_count: u64,
    /// Weights used in a wider type than the slab's.
    pub promotions: u64,
    /// Bytes read back from the device.
    pub returned_bytes: u64,
    /// Time so far; what the caller's clock knows is added by the caller.
    pub phases: Phases,
    /// What the source of the blocks did.
    pub moved: Counters,
}

impl Computed {
    /// Whether losses and gradients are all numbers.
    #[must_use]
    pub fn is_finite(&self) -> bool {
        self.nan_count + self.inf_count == 0 && self.loss.is_finite() && self.grad_norm.is_finite()
    }

    /// Counts a value that is not finite.
    pub fn look(&mut self, value: f64) {
        self.nan_count += u64::from(value.is_nan());
        self.inf_count += u64::from(value.is_infinite());
    }
}

/// Everything that the next step needs.
#[derive(Debug, Clone)]
pub struct State<'s> {
    /// Parameters.
    pub adapters: Cow<'s, AdapterSet>,
    /// Moments and number of updates.
    pub optimizer: Cow<'s, AdamW>,
}

/// A step taken apart, against what the device could do at best. Measured in the same run, by the device's own clock.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Profile {
    /// Floating-point operations that the step needs, recomputation included.
    pub flop: f64,
    /// Rate of the largest products in bfloat16, whatever the step computes in.
    pub flop_per_s: f64,
    /// Bytes that came from the host: blocks, and block inputs that were kept there.
    pub bytes: u64,
    /// Rate of a plain copy from page-locked memory.
    pub bytes_per_s: f64,
    /// Milliseconds by phase; copies overlap with the others.
    pub times_ms: Times,
    /// Milliseconds of the host.
    pub host_ms: HostTimes,
}

/// A device that trains.
pub trait StepEngine {
    /// What it computes on, for people.
    fn device(&self) -> String;

    /// Replaces the state.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Data`] if it is of other linears; the device's.
    fn load(&mut self, adapters: AdapterSet, optimizer: AdamW) -> Result<()>;

    /// Computes and clips the gradients of the mean loss of `batches`. Changes no parameter, so that a step can be abandoned at any time.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::TryAgain`] if the process is asked to stop, or memory runs out; what model and source report.
    fn gradients(&mut self, batches: &[HostBatch], process: &Process) -> Result<Computed>;

    /// Applies the gradients computed last. The time goes into `phases.optimizer`.
    ///
    /// # Errors
    /// The device's.
    fn apply(&mut self, computed: &mut Computed, lr: f64) -> Result<()>;

    /// Losses of `batches`, one each, without gradients.
    ///
    /// # Errors
    /// As [`Self::gradients`].
    fn losses(&mut self, batches: &[HostBatch], process: &Process) -> Result<Vec<f64>>;

    /// The state on the host, after everything applied so far.
    ///
    /// # Errors
    /// The device's.
    fn state(&self) -> Result<State<'_>>;

    /// Memory of this process now, that of the device included.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] if it is more than was allowed.
    fn memory(&mut self) -> Result<MemoryUse>;

    /// Computes a step of `batches` once more and takes it apart; it may change the state. `None` where the processor computes, whose
    /// phases are in [`Computed::phases`].
    ///
    /// # Errors
    /// As [`Self::gradients`].
    fn profile(&mut self, _batches: &[HostBatch], _process: &Process) -> Result<Option<Profile>> {
        Ok(None)
    }

    /// Says that the run is over: no more blocks will be asked for.
    fn finish(&mut self) {}
}
