//! The training run: from what was opened to the LoRA file.
//!
//! The state after step n is (n, adapters, optimiser) and nothing else; samples, noise, noise levels and learning rates are functions of
//! (seed, step). So a run that is killed anywhere and resumed from its last checkpoint computes what it would have computed, bit for bit.
//!
//! Order of a step's end: update, validation if due, log line, telemetry, checkpoint if due. A checkpoint of step n therefore always
//! finds the lines up to n in the log, and going on from it drops those after n.
//!
//! Ends: asked to stop, the running step is abandoned and the last finished one saved (exit 75). A loss or gradient that is not finite
//! ends the run before it touches the adapters, with exit 65: it is a matter of settings and data and would come again at every
//! restart. Any other failure of a step saves the last finished one too, if it can. Only one trainer works in an output folder.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::Device;
use serenity_protocol::config::{Config, Resume};
use serenity_protocol::geometry::{LinearSpec, TransformerGeometry};
use serenity_protocol::message::{FromChild, StepReport};
use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result};

use crate::checkpoint;
use crate::data::{BatchPlan, Batches, SampleOrder, Samples};
use crate::engine::{Computed, StepEngine};
use crate::log::{self, JsonLines, LogLine, Phases};
use crate::memory::MemoryUse;
use crate::model::AdapterSet;
use crate::settings::{Inputs, Settings};
use crate::telemetry::{Telemetry, TelemetryLine};
use crate::validation::Validation;
use crate::{lora_file, plot, schedule};

/// Progress lines on a terminal are at least this far apart, unless the configuration counts steps.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(2);

/// What a run is made of, opened and checked.
pub struct Parts {
    /// The configuration.
    pub config: Config,
    /// Shape of the model.
    pub geometry: TransformerGeometry,
    /// What computes steps, with the adapters before the first one.
    pub engine: Box<dyn StepEngine>,
    /// The samples.
    pub samples: Arc<dyn Samples>,
    /// The linears to adapt.
    pub targets: Vec<LinearSpec>,
    /// Names of weights and data, for the settings.
    pub inputs: Inputs,
}

impl Parts {
    /// What decides the batches.
    ///
    /// # Errors
    /// [`Error::Data`] if there are no samples.
    pub fn batch_plan(&self) -> Result<BatchPlan> {
        Ok(BatchPlan {
            order: SampleOrder::new(self.samples.repeats(), self.config.seed)?,
            samples: self.samples.clone(),
            geometry: self.geometry.clone(),
            seed: self.config.seed,
            batch_size: self.config.batch_size,
            micro_batches: self.config.gradient_accumulation_steps,
            timestep: self.config.timestep,
        })
    }

    /// Adapters before the first step.
    ///
    /// # Errors
    /// As [`AdapterSet::init`].
    pub fn fresh_adapters(&self) -> Result<AdapterSet> {
        fresh_adapters(&self.config, &self.targets)
    }
}

/// Guidance scale for a model that embeds one.
#[must_use]
pub fn guidance(config: &Config, geometry: &TransformerGeometry) -> Option<f32> {
    geometry.guidance_embeds.then_some(config.guidance_scale as f32)
}

/// Adapters of `targets` before the first step, on the host.
///
/// # Errors
/// As [`AdapterSet::init`].
pub fn fresh_adapters(config: &Config, targets: &[LinearSpec]) -> Result<AdapterSet> {
    AdapterSet::init(targets, config.adapter.rank, config.adapter.alpha, config.seed, &Device::Cpu)
}

/// Files that a run leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outputs {
    /// The LoRA.
    pub lora: PathBuf,
    /// The loss plot.
    pub plot: PathBuf,
    /// The log.
    pub log: PathBuf,
}

impl Outputs {
    /// Where a configuration's results go.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let dir = &config.output_dir;
        Self { lora: dir.join(format!("{}.safetensors", config.name)), plot: dir.join("loss.png"), log: dir.join("log.jsonl") }
    }
}

/// Trains until `max_steps`, or until asked to stop.
///
/// # Errors
/// See the module; [`Error::TryAgain`] when asked to stop.
pub fn train(process: &Process, parts: Parts) -> Result<Outputs> {
    let _lock = lock_output(&parts.config)?;
    let mut run = Run::start(process, parts)?;
    process.send(&FromChild::Ready);
    run.validate_if_missing()?;
    while run.step < run.parts.config.max_steps {
        if process.stop_requested() {
            return Err(run.stopped());
        }
        run.one_step()?;
    }
    run.finish()
}

/// Held while a trainer works in the output folder; the kernel gives it back when the process ends, however it ends.
fn lock_output(config: &Config) -> Result<File> {
    let path = config.output_dir.join("trainer.lock");
    let failed = |e| Error::io("cannot lock the output folder", &path, e);
    std::fs::create_dir_all(&config.output_dir).map_err(failed)?;
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Only for the message.
            let _ = file.read_to_string(&mut holder);
            return Err(Error::absent("another trainer works in this output folder")
                .at(&path)
                .found(format!("process {}", holder.trim()))
                .advice("wait for it, stop it, or choose another output_dir"));
        }
        Err(std::fs::TryLockError::Error(e)) => return Err(failed(e)),
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(failed)?;
    Ok(file)
}

struct Run<'p> {
    process: &'p Process,
    parts: Parts,
    outputs: Outputs,
    checkpoints: PathBuf,
    settings: Settings,
    /// Steps done.
    step: u64,
    /// Step of the newest checkpoint that holds this run's state.
    saved: Option<u64>,
    batches: Batches,
    validation: Option<Validation>,
    log: JsonLines,
    telemetry: Option<Telemetry>,
    shown: Option<Instant>,
}

impl<'p> Run<'p> {
    fn start(process: &'p Process, mut parts: Parts) -> Result<Self> {
        let config = &parts.config;
        let checkpoints = config.output_dir.join("checkpoints");
        checkpoint::sweep(&checkpoints);
        let fresh = parts.fresh_adapters()?;
        let settings = Settings::new(config, &parts.inputs, &fresh);
        let mut notice = |text: String| {
            tracing::warn!("{text}");
            process.send(&FromChild::Notice(text));
        };
        if config.checkpoint.resume == Resume::Never
            && let Some(aside) = checkpoint::set_aside(&checkpoints)?
        {
            notice(format!("starting over: the checkpoints of an earlier run are now in {}", aside.display()));
        }
        let found = checkpoint::find(
            &checkpoints,
            &config.checkpoint.resume,
            config.max_steps,
            &settings,
            &config.optimizer,
            &Device::Cpu,
            &mut notice,
        )?;
        let step = match found {
            Some(found) => {
                tracing::info!("going on after step {} from {}", found.step, found.path.display());
                parts.engine.load(found.adapters, found.optimizer)?;
                found.step
            }
            None => 0,
        };
        let outputs = Outputs::of(config);
        let keep_to = (step > 0).then_some(step);
        let samples = &*parts.samples;
        Ok(Self {
            process,
            log: JsonLines::open(&outputs.log, keep_to)?,
            telemetry: config.memory.stagehand.telemetry.as_ref().map(|t| Telemetry::open(t, keep_to)).transpose()?,
            batches: Batches::new(parts.batch_plan()?),
            validation: Validation::new(samples, &parts.geometry, config.validation.samples, config.seed)?,
            outputs,
            checkpoints,
            settings,
            step,
            saved: keep_to,
            shown: None,
            parts,
        })
    }

    /// Measures the validation loss of the state as it is: before the first step, or where a run was stopped between a step and its
    /// validation.
    fn validate_if_missing(&mut self) -> Result<()> {
        if self.validation.is_none() || !self.validation_due() {
            return Ok(());
        }
        if self.step == 0 {
            let (val_loss, _) = self.validate()?;
            return self.log.append(&LogLine { val_loss, ..LogLine::default() });
        }
        let lines = log::read(&self.outputs.log)?;
        if lines.iter().any(|l| l.step == self.step && l.val_loss.is_none())
            && let (Some(val_loss), _) = self.validate()?
        {
            log::amend_validation(&self.outputs.log, self.step, val_loss)?;
            // The file was replaced: what is appended must go to the new one.
            self.log = JsonLines::open(&self.outputs.log, Some(self.step))?;
        }
        Ok(())
    }

    fn validation_due(&self) -> bool {
        let every = self.parts.config.validation.every;
        self.step == 0 || self.step == self.parts.config.max_steps || (every > 0 && self.step.is_multiple_of(every))
    }

    /// The validation loss and the seconds that it took; nothing where there is no validation.
    fn validate(&mut self) -> Result<(Option<f64>, f64)> {
        let Some(validation) = &self.validation else { return Ok((None, 0.0)) };
        let started = Instant::now();
        let loss = validation.measure(&mut *self.parts.engine, self.process)?;
        tracing::info!("validation loss {loss:.6} after step {}", self.step);
        Ok((Some(loss), started.elapsed().as_secs_f64()))
    }

    fn one_step(&mut self) -> Result<()> {
        let _span = tracing::info_span!("step", step = self.step + 1).entered();
        let started = Instant::now();
        let number = self.step + 1;
        let mut computed = match self.gradients(number) {
            Ok(computed) => computed,
            Err(_) if self.process.stop_requested() => return Err(self.stopped()),
            Err(e) => return Err(self.save_before(e)),
        };
        if !computed.is_finite() {
            let told = self.parts.engine.memory().and_then(|memory| self.write_telemetry(number, &computed, memory));
            if let Err(e) = told {
                tracing::warn!("the step that diverged is not in the telemetry: {e}");
            }
            return Err(self.save_before(diverged(number, &computed)));
        }
        let config = &self.parts.config;
        let lr = config.optimizer.learning_rate * schedule::factor(&config.scheduler, number, config.max_steps);
        self.parts.engine.apply(&mut computed, lr)?;
        self.step = number;
        let seconds = started.elapsed().as_secs_f64();
        self.after_update(&computed, lr, seconds).map_err(|e| self.save_before(e))
    }

    /// What follows a step that is done. Whatever goes wrong here, its checkpoint is written.
    fn after_update(&mut self, computed: &Computed, lr: f64, seconds: f64) -> Result<()> {
        let number = self.step;
        // A validation that is interrupted or fails leaves a step that is done: its line and checkpoint are written, and the resumed run measures.
        let (val_loss, validation, failed) = match if self.validation_due() { self.validate() } else { Ok((None, 0.0)) } {
            Ok((loss, seconds)) => (loss, seconds, None),
            Err(_) if self.process.stop_requested() => (None, 0.0, None),
            Err(e) => (None, 0.0, Some(e)),
        };
        let memory = self.parts.engine.memory()?;
        self.log.append(&LogLine {
            step: number,
            loss: Some(computed.loss),
            lr: Some(lr),
            grad_norm: Some(computed.grad_norm),
            seconds: Some(seconds),
            seconds_by_phase: Some(Phases { validation, ..computed.phases }),
            memory_mb: Some(memory),
            val_loss,
        })?;
        self.write_telemetry(number, computed, memory)?;
        self.report(computed, lr, seconds);
        let save_every = self.parts.config.checkpoint.save_every;
        if number == self.parts.config.max_steps || (save_every > 0 && number.is_multiple_of(save_every)) {
            self.save()?;
        }
        // After the line and the telemetry that show it.
        failed.or_else(|| over_cap(&memory)).map_or(Ok(()), Err)
    }

    /// Everything of a step that changes no state.
    fn gradients(&mut self, number: u64) -> Result<Computed> {
        let started = Instant::now();
        let batches = self.batches.take(number)?;
        let waited = started.elapsed().as_secs_f64();
        if number < self.parts.config.max_steps {
            self.batches.prepare(number + 1)?;
        }
        let mut computed = self.parts.engine.gradients(&batches, self.process)?;
        computed.phases.data += waited;
        Ok(computed)
    }

    fn write_telemetry(&mut self, step: u64, computed: &Computed, memory: MemoryUse) -> Result<()> {
        let Some(telemetry) = &mut self.telemetry else { return Ok(()) };
        let (moved, phases) = (&computed.moved, &computed.phases);
        let used = memory.device.map_or((memory.rss, memory.rss_peak), |d| (d.allocated, d.driver));
        let summary = telemetry.record(TelemetryLine {
            step,
            h2d_bytes: moved.moved_bytes,
            d2h_bytes: computed.returned_bytes,
            copy_time_ms: 1e3 * moved.copy_seconds,
            compute_time_ms: 1e3 * (phases.forward + phases.backward + phases.optimizer),
            stall_time_ms: 1e3 * phases.wait,
            stall_count: moved.waits,
            evictions: moved.evictions,
            prefetch_hits: moved.hits,
            prefetch_misses: moved.misses,
            vram_used_mb: used.0,
            vram_reserved_mb: used.1,
            host_pool_free: moved.slots_free,
            host_pool_in_use: moved.slots_in_use,
            dtype_promotions: computed.promotions,
            nan_count: computed.nan_count,
            inf_count: computed.inf_count,
        })?;
        if let Some(summary) = summary {
            tracing::info!("{summary}");
        }
        Ok(())
    }

    /// Tells the launcher, which shows it; without one, prints a line now and then.
    fn report(&mut self, computed: &Computed, learning_rate: f64, seconds: f64) {
        let (step, steps) = (self.step, self.parts.config.max_steps);
        let (loss, grad_norm) = (computed.loss, computed.grad_norm);
        self.process.send(&FromChild::Step(StepReport { step, steps, loss, learning_rate, grad_norm, seconds }));
        let due = match self.parts.config.log_every_steps {
            Some(every) => step.is_multiple_of(every.max(1)),
            None => self.shown.is_none_or(|t| t.elapsed() >= PROGRESS_INTERVAL),
        };
        if !self.process.has_launcher() && (due || step == steps) {
            self.shown = Some(Instant::now());
            tracing::info!("step {step}/{steps} loss={loss:.6} lr={learning_rate:.2e} gn={grad_norm:.4} {seconds:.3} s");
        }
    }

    fn save(&mut self) -> Result<()> {
        if self.saved == Some(self.step) {
            return Ok(());
        }
        self.log.sync()?;
        let keep = self.parts.config.checkpoint.keep;
        let path = {
            let state = self.parts.engine.state()?;
            checkpoint::save(&self.checkpoints, self.step, &self.settings, &state.adapters, &state.optimizer, keep)?
        };
        self.saved = Some(self.step);
        self.process.send(&FromChild::Saved { step: self.step, path: path.display().to_string() });
        tracing::info!("saved {}", path.display());
        Ok(())
    }

    /// The end of a run that was asked to stop.
    fn stopped(&mut self) -> Error {
        if self.step > 0
            && let Err(e) = self.save()
        {
            return e;
        }
        self.process.interrupted()
    }

    /// Saves the last finished step before `error` ends the run.
    fn save_before(&mut self, error: Error) -> Error {
        if self.step > 0
            && let Err(second) = self.save()
        {
            tracing::warn!("the last finished step could not be saved: {second}");
        }
        error
    }

    fn finish(mut self) -> Result<Outputs> {
        self.save()?;
        self.parts.engine.finish();
        let extra = BTreeMap::from([
            ("serenity_model".to_string(), self.parts.inputs.model.clone()),
            ("serenity_base_weights".to_string(), self.parts.inputs.weights.clone()),
            ("serenity_steps".to_string(), self.step.to_string()),
            ("serenity_seed".to_string(), self.parts.config.seed.to_string()),
        ]);
        lora_file::write(&self.outputs.lora, &self.parts.engine.state()?.adapters, &extra)?;
        self.process.send(&FromChild::Saved { step: self.step, path: self.outputs.lora.display().to_string() });
        let lines = log::read(&self.outputs.log)?;
        plot::write(&self.outputs.plot, &self.parts.config.name, &lines)?;
        let files: Vec<String> =
            [&self.outputs.lora, &self.outputs.plot, &self.outputs.log].iter().map(|p| p.display().to_string()).collect();
        tracing::info!("done: {}", files.join(", "));
        self.process.send(&FromChild::Done { files });
        Ok(self.outputs)
    }
}

/// The error of a device on which more is taken than was allowed: by another program since the start, or the plan of that memory is wrong.
fn over_cap(memory: &MemoryUse) -> Option<Error> {
    let device = memory.device.filter(|d| !d.shared && d.driver > d.cap)?;
    let error = Error::try_again("more device memory is taken than vram_high_watermark_mb allows")
        .expected(format!("at most {:.0} MiB by the driver's figure", device.cap))
        .found(format!("{:.0} MiB, of which training has planned {:.0}", device.driver, device.arena))
        .advice(
            "if another program has taken some since the start, the run goes on from the checkpoint beside it; if not, lower \
             memory.stagehand.vram_high_watermark_mb, and please report the figures",
        );
    Some(error)
}

fn diverged(step: u64, computed: &Computed) -> Error {
    Error::data(format!("training diverged at step {step}"))
        .expected("a finite loss and gradient")
        .found(format!(
            "loss {}, gradient norm {}, {} NaN and {} infinite values",
            computed.loss, computed.grad_norm, computed.nan_count, computed.inf_count
        ))
        .advice("lower learning_rate or raise scheduler.warmup_steps; the checkpoints so far are kept and the adapters of this step were not changed")
}
