//! Where the device's time goes, by events around the work. Off unless asked for: events cost the host time.
#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::time::Instant;

use serde::Serialize;
use serenity_cuda::{Event, Gpu, Stream};
use serenity_protocol::Result;

/// Kind of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Host to device, on the copy stream.
    Copy,
    /// The compute stream waiting for a block.
    Wait,
    /// INT8 to bf16, on the side stream if there is one.
    Dequantise,
    /// The compute stream waiting for that.
    Tile,
    /// Matrix products.
    Gemm,
    /// Attention.
    Attention,
    /// Everything that is one pass over activations.
    Elementwise,
    /// Norm, clipping, AdamW.
    Optimiser,
}

/// Milliseconds by phase. `copy` overlaps with the others, and so does `dequantise` where it has a stream of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
#[allow(missing_docs)] // the phases, in milliseconds
pub struct Times {
    pub copy: f64,
    pub wait: f64,
    pub dequantise: f64,
    pub tile: f64,
    pub gemm: f64,
    pub attention: f64,
    pub elementwise: f64,
    pub optimiser: f64,
}

/// How far the host is in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The step begins.
    Begun,
    /// Its inputs are on the device, which until now had nothing to do.
    Entered,
    /// All its work is queued.
    Queued,
    /// The device has done it.
    Done,
}

/// Milliseconds of the host in the last step: with its inputs, queueing work, waiting for the device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct HostTimes {
    pub inputs: f64,
    pub queueing: f64,
    pub waiting: f64,
}

/// Spans of work since the last [`Clock::take`].
#[derive(Debug, Default)]
pub struct Clock {
    enabled: bool,
    spans: RefCell<Vec<(Phase, Event, Event)>>,
    idle: RefCell<Vec<Event>>,
    stage: Cell<Option<Instant>>,
    host: Cell<HostTimes>,
}

impl Clock {
    /// A clock that runs, or one that costs nothing.
    #[must_use]
    pub fn new(enabled: bool) -> Self {
        Self { enabled, ..Self::default() }
    }

    /// Switches it on or off.
    pub fn enable(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// The host has come to `stage`. Costs next to nothing and is always on.
    pub fn at(&self, stage: Stage) {
        let since = |from: Option<Instant>| from.map_or(0.0, |t| t.elapsed().as_secs_f64() * 1e3);
        let ms = since(self.stage.replace(Some(Instant::now())));
        let host = self.host.get();
        self.host.set(match stage {
            Stage::Begun => HostTimes::default(),
            Stage::Entered => HostTimes { inputs: ms, ..host },
            Stage::Queued => HostTimes { queueing: ms, ..host },
            Stage::Done => HostTimes { waiting: ms, ..host },
        });
    }

    /// The host's times of the last step.
    #[must_use]
    pub fn host(&self) -> HostTimes {
        self.host.get()
    }

    fn event(&self, gpu: &Gpu) -> Result<Event> {
        match self.idle.borrow_mut().pop() {
            Some(event) => Ok(event),
            None => Event::timed(gpu.context()),
        }
    }

    /// Runs `work`, which queues on `stream`.
    ///
    /// # Errors
    /// Those of `work`, and the driver's.
    pub fn on<T>(&self, gpu: &Gpu, stream: &Stream, phase: Phase, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if !self.enabled {
            return work();
        }
        let (start, end) = (self.event(gpu)?, self.event(gpu)?);
        stream.record(&start)?;
        let result = work()?;
        stream.record(&end)?;
        self.spans.borrow_mut().push((phase, start, end));
        Ok(result)
    }

    /// The times since the last call, after the device has finished. Zeros if the clock is off.
    ///
    /// # Errors
    /// A fault of earlier work.
    pub fn take(&self, gpu: &Gpu) -> Result<Times> {
        let mut times = Times::default();
        if !self.enabled {
            return Ok(times);
        }
        gpu.sync()?;
        for (phase, start, end) in self.spans.borrow_mut().drain(..) {
            let ms = f64::from(end.since_ms(&start)?);
            let field = match phase {
                Phase::Copy => &mut times.copy,
                Phase::Wait => &mut times.wait,
                Phase::Dequantise => &mut times.dequantise,
                Phase::Tile => &mut times.tile,
                Phase::Gemm => &mut times.gemm,
                Phase::Attention => &mut times.attention,
                Phase::Elementwise => &mut times.elementwise,
                Phase::Optimiser => &mut times.optimiser,
            };
            *field += ms;
            self.idle.borrow_mut().extend([start, end]);
        }
        Ok(times)
    }
}
