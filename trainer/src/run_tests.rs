//! Properties of a whole run on a tiny random model: stopping, resuming, refusing, and what it leaves behind.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device};
use serde_json::{Value, json};
use serenity_protocol::config::{Config, Overrides};
use serenity_protocol::geometry::{BlockId, LinearSpec};
use serenity_protocol::message::Role;
use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result};

use crate::data::SyntheticSamples;
use crate::log::LogLine;
use crate::model::{BlockSource, BlockWeights, Flux2};
use crate::run::{Outputs, Parts, fresh_adapters, guidance, train};
use crate::settings::Inputs;
use crate::source::{Counters, TrainingSource};
use crate::step::CpuEngine;
use crate::synthetic_source::SyntheticSource;
use crate::test_support::{TINY, tiny};
use crate::{checkpoint, log};

/// What happens at a visit of the source.
#[derive(Clone, Copy)]
enum Event {
    Nothing,
    /// The process is asked to stop at this visit.
    StopAt(u64),
    /// The source fails at this visit.
    FailAt(u64),
    /// Weights are not a number from this visit on.
    NanFrom(u64),
}

struct Eventful {
    inner: SyntheticSource,
    nan: SyntheticSource,
    event: Event,
    visits: u64,
    stop: Arc<AtomicBool>,
}

impl BlockSource for Eventful {
    fn request(&mut self, visits: &[BlockId]) -> Result<()> {
        self.nan.request(visits)?;
        self.inner.request(visits)
    }

    fn next(&mut self, block: BlockId) -> Result<Arc<BlockWeights>> {
        self.visits += 1;
        let nan = self.nan.next(block)?;
        let weights = self.inner.next(block)?;
        match self.event {
            // Relaxed: read by the same thread.
            Event::StopAt(visit) if self.visits == visit => self.stop.store(true, Ordering::Relaxed),
            Event::FailAt(visit) if self.visits == visit => return Err(Error::absent("the source failed")),
            Event::NanFrom(visit) if self.visits >= visit => return Ok(nan),
            _ => {}
        }
        Ok(weights)
    }
}

impl TrainingSource for Eventful {
    fn counters(&self) -> Counters {
        self.inner.counters()
    }
}

/// A configuration of `steps` steps under `dir`, changed by `changes` (dotted key, value).
fn config(dir: &Path, steps: u64, changes: &[(&str, Value)]) -> Config {
    let text = json!({
        "name": "tiny", "model_type": "flux_2_dev", "training_method": "lora",
        "model": {"type": "flux_2_dev", "path": "nowhere"},
        "adapter": {"type": "lora", "rank": 3, "alpha": 6.0, "target_modules": "all-linear"},
        "memory": {"strategy": "resident", "stagehand": {"telemetry_file": dir.join("telemetry.jsonl"), "squareq_slab_path": "x.safetensors", "squareq_manifest_path": "x.manifest.json"}},
        "data": {"concepts": ["nowhere"]},
        "output_dir": dir, "resolution": 64, "learning_rate": 1e-2, "max_steps": steps, "gradient_accumulation_steps": 2,
        "scheduler": {"scheduler": "cosine", "warmup_steps": 2}, "checkpoint": {"save_every": 3},
        "validation": {"samples": 3, "every": 4}, "train_device": "cpu", "train_dtype": "float32", "seed": 11
    });
    let set = changes.iter().map(|(k, v)| format!("{k}={v}")).collect();
    Config::from_json(&text.to_string(), Path::new("tiny.json"), &Overrides { set, ..Overrides::default() }).unwrap()
}

fn run(config: &Config, event: Event) -> Result<Outputs> {
    let geometry = tiny(&TINY);
    let (device, dtype) = (Device::Cpu, DType::F32);
    let process = Process::detached(Role::Trainer);
    let source = |scale| SyntheticSource::scaled(&geometry, &device, dtype, 1, scale).unwrap();
    let samples = SyntheticSamples::new(&geometry, vec![1, 2, 1, 1], 2, 3, 5, 1);
    let targets: Vec<LinearSpec> = geometry.blocks().flat_map(|b| geometry.block_linears(b)).collect();
    let model = Flux2::new(geometry.clone(), SyntheticSource::other(&geometry, &device, dtype, 1).unwrap());
    let source = Box::new(Eventful { inner: source(1.0), nan: source(f64::NAN), event, visits: 0, stop: process.stop_flag() });
    let adapters = fresh_adapters(config, &targets).unwrap();
    let parts = Parts {
        engine: Box::new(CpuEngine::new(model, source, adapters, &config.optimizer, guidance(config, &geometry))),
        targets,
        samples: Arc::new(samples),
        geometry,
        inputs: Inputs { weights: "w".into(), model: "m".into(), data: "d".into() },
        config: config.clone(),
    };
    train(&process, parts)
}

/// Log lines without times and memory, which differ from run to run.
fn lines(outputs: &Outputs) -> Vec<LogLine> {
    let timeless = |l: LogLine| LogLine { seconds: None, seconds_by_phase: None, memory_mb: None, ..l };
    log::read(&outputs.log).unwrap().into_iter().map(timeless).collect()
}

fn steps_of(file: &Path) -> Vec<u64> {
    let text = std::fs::read_to_string(file).unwrap();
    text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["step"].as_u64().unwrap()).collect()
}

/// Everything that must be equal between two runs.
fn result(dir: &Path, config: &Config) -> (Vec<u8>, Vec<u8>, Vec<LogLine>) {
    let outputs = Outputs::of(config);
    let last = checkpoint::path_of(&dir.join("checkpoints"), config.max_steps);
    (std::fs::read(&outputs.lora).unwrap(), std::fs::read(last).unwrap(), lines(&outputs))
}

#[test]
fn a_whole_run_leaves_what_it_should() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 9, &[("checkpoint.keep", json!(2))]);
    let outputs = run(&config, Event::Nothing).unwrap();
    let log = lines(&outputs);
    assert_eq!(log.iter().map(|l| l.step).collect::<Vec<_>>(), (0..=9).collect::<Vec<_>>());
    let validated: Vec<u64> = log.iter().filter(|l| l.val_loss.is_some()).map(|l| l.step).collect();
    assert_eq!(validated, [0, 4, 8, 9]);
    assert!(log.iter().skip(1).all(|l| l.loss.is_some_and(|v| v > 0.0) && l.grad_norm.is_some_and(|v| v > 0.0)));
    assert_eq!((log[1].lr, log[2].lr), (Some(0.5e-2), Some(1e-2)));
    assert!(log[9].val_loss < log[0].val_loss, "nine steps at this rate learn something: {log:?}");
    assert_eq!(steps_of(&dir.path().join("telemetry.jsonl")), (1..=9).collect::<Vec<_>>());
    let kept: Vec<u64> = checkpoint::list(&dir.path().join("checkpoints")).unwrap().into_iter().map(|(s, _)| s).collect();
    assert_eq!(kept, [6, 9]);
    assert!(image::open(&outputs.plot).is_ok());
    // A line's phases do not exceed its step.
    for line in crate::log::read(&outputs.log).unwrap().iter().skip(1) {
        let p = line.seconds_by_phase.unwrap();
        let sum = p.data + p.wait + p.copy + p.forward + p.backward + p.optimizer;
        assert!(sum > 0.0 && sum <= line.seconds.unwrap() * 1.001, "{line:?}");
    }
}

#[test]
fn a_run_that_is_stopped_anywhere_and_resumed_equals_one_that_is_not() {
    let whole_dir = tempfile::tempdir().unwrap();
    let whole_config = config(whole_dir.path(), 10, &[]);
    run(&whole_config, Event::Nothing).unwrap();
    let whole = result(whole_dir.path(), &whole_config);
    // A step visits 3 blocks down and 2 up; validation visits 3. Step 4 is followed by a validation (visits 24 to 26).
    for visits in [2, 4, 17, 25, 26, 27, 48] {
        for event in [Event::StopAt(visits), Event::FailAt(visits)] {
            let dir = tempfile::tempdir().unwrap();
            let config = config(dir.path(), 10, &[]);
            let code = if matches!(event, Event::StopAt(_)) { 75 } else { 69 };
            assert_eq!(run(&config, event).unwrap_err().exit_code(), code, "visit {visits}");
            run(&config, Event::Nothing).unwrap();
            assert!(result(dir.path(), &config) == whole, "interrupted at visit {visits}: another result");
        }
    }
}

#[test]
fn a_step_is_safe_whatever_fails_behind_it() {
    // The first validation has visits 1 to 3, four steps follow, 24 to 26 are the last validation.
    let saved = |dir: &Path| checkpoint::list(&dir.join("checkpoints")).unwrap().into_iter().map(|(s, _)| s).collect::<Vec<_>>();
    for (event, code) in [(Event::FailAt(25), 69), (Event::NanFrom(24), 65)] {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path(), 4, &[("checkpoint.save_every", json!(0))]);
        assert_eq!(run(&config, event).unwrap_err().exit_code(), code);
        assert_eq!(saved(dir.path()), [4]);
        assert_eq!(steps_of(&Outputs::of(&config).log), [0, 1, 2, 3, 4]);
        // Only the validation is left to be done.
        run(&config, Event::FailAt(4)).unwrap();
        assert!(lines(&Outputs::of(&config)).iter().all(|l| l.val_loss.is_some() == (l.step == 0 || l.step == 4)));
    }
}

#[test]
fn a_killed_run_goes_on_from_an_older_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 10, &[]);
    run(&config, Event::Nothing).unwrap();
    let whole = result(dir.path(), &config);
    let folder = dir.path().join("checkpoints");
    // As if killed in step 8: later checkpoints and outputs are not there, the log is ahead of the checkpoint.
    for later in [9, 10] {
        std::fs::remove_file(checkpoint::path_of(&folder, later)).unwrap();
    }
    std::fs::remove_file(Outputs::of(&config).lora).unwrap();
    run(&config, Event::Nothing).unwrap();
    assert!(result(dir.path(), &config) == whole);
    // The newest is corrupt: the one before is taken.
    let newest = checkpoint::path_of(&folder, 10);
    let mut bytes = std::fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&newest, bytes).unwrap();
    run(&config, Event::Nothing).unwrap();
    assert!(result(dir.path(), &config) == whole);
    assert_eq!(steps_of(&dir.path().join("telemetry.jsonl")), (1..=10).collect::<Vec<_>>());
}

#[test]
fn a_finished_run_computes_nothing_again() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 4, &[]);
    run(&config, Event::Nothing).unwrap();
    let whole = result(dir.path(), &config);
    std::fs::remove_file(Outputs::of(&config).lora).unwrap();
    run(&config, Event::FailAt(1)).expect("no visit is made");
    assert!(result(dir.path(), &config) == whole);
}

#[test]
fn a_constant_run_may_be_made_longer_and_a_decaying_one_not() {
    let constant = [("scheduler.scheduler", json!("constant")), ("validation.every", json!(0))];
    let (long_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let long = config(long_dir.path(), 8, &constant);
    run(&long, Event::Nothing).unwrap();
    run(&config(dir.path(), 5, &constant), Event::Nothing).unwrap();
    let longer = config(dir.path(), 8, &constant);
    run(&longer, Event::Nothing).unwrap();
    let (a, b) = (result(long_dir.path(), &long), result(dir.path(), &longer));
    assert!(a.0 == b.0 && a.1 == b.1, "the longer run is that of a run that was so long from the start");

    let dir = tempfile::tempdir().unwrap();
    run(&config(dir.path(), 5, &[]), Event::Nothing).unwrap();
    let error = run(&config(dir.path(), 8, &[]), Event::Nothing).unwrap_err();
    assert_eq!(error.exit_code(), 65);
    assert!(error.to_string().contains("max_steps: 5 in the checkpoint, 8 now"), "{error}");
}

#[test]
fn settings_that_change_the_result_are_refused_and_those_that_do_not_are_not() {
    let dir = tempfile::tempdir().unwrap();
    run(&config(dir.path(), 4, &[]), Event::Nothing).unwrap();
    for (key, value) in [
        ("learning_rate", json!(2e-2)),
        ("seed", json!(12)),
        ("adapter.rank", json!(2)),
        ("adapter.alpha", json!(3.0)),
        ("gradient_accumulation_steps", json!(1)),
        ("max_grad_norm", json!(0.5)),
        ("guidance_scale", json!(3.5)),
        ("dynamic_timestep_shifting", json!(false)),
        ("optimizer.weight_decay", json!(0.1)),
        ("scheduler.warmup_steps", json!(1)),
    ] {
        let error = run(&config(dir.path(), 4, &[(key, value)]), Event::Nothing).expect_err(key);
        assert_eq!(error.exit_code(), 65, "{key}");
        let named = key.rsplit('.').next().unwrap();
        assert!(error.to_string().contains(named), "{key}: {error}");
    }
    for (key, value) in [("validation.samples", json!(1)), ("checkpoint.save_every", json!(1)), ("memory.strategy", json!("stagehand"))] {
        run(&config(dir.path(), 4, &[(key, value)]), Event::FailAt(1)).expect(key);
    }
}

#[test]
fn divergence_ends_the_run_before_it_reaches_the_adapters() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 10, &[("validation.samples", json!(0)), ("checkpoint.save_every", json!(0))]);
    // Step 4 begins with visit 16.
    let error = run(&config, Event::NanFrom(16)).unwrap_err();
    assert_eq!(error.exit_code(), 65);
    assert!(error.to_string().contains("diverged at step 4"), "{error}");
    assert!(!Outputs::of(&config).lora.exists());
    assert_eq!(steps_of(&Outputs::of(&config).log), [1, 2, 3]);
    let telemetry = std::fs::read_to_string(dir.path().join("telemetry.jsonl")).unwrap();
    let last: Value = serde_json::from_str(telemetry.lines().last().unwrap()).unwrap();
    assert!(last["step"] == 4 && last["nan_count"].as_u64().unwrap() > 0, "{last}");
    // The third step is safe, and a healthy machine goes on from it.
    assert_eq!(checkpoint::list(&dir.path().join("checkpoints")).unwrap().last().unwrap().0, 3);
    run(&config, Event::Nothing).unwrap();
}

#[test]
fn one_trainer_at_a_time_works_in_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 2, &[]);
    std::fs::create_dir_all(dir.path()).unwrap();
    let other = std::fs::File::create(dir.path().join("trainer.lock")).unwrap();
    other.lock().unwrap();
    assert_eq!(run(&config, Event::Nothing).unwrap_err().exit_code(), 69);
    drop(other);
    run(&config, Event::Nothing).unwrap();
}

#[test]
fn starting_over_starts_over() {
    let dir = tempfile::tempdir().unwrap();
    let config_of = |changes: &[(&str, Value)]| config(dir.path(), 4, changes);
    run(&config_of(&[]), Event::Nothing).unwrap();
    let whole = result(dir.path(), &config_of(&[]));
    let over = config_of(&[("checkpoint.resume", json!("never"))]);
    run(&over, Event::Nothing).unwrap();
    assert!(result(dir.path(), &over) == whole);
    assert!(dir.path().join("checkpoints-before-1").is_dir());
    // Another seed in the same folder, then auto: only checkpoints of that seed are there to be found.
    let other = [("seed", json!(12)), ("checkpoint.resume", json!("never"))];
    run(&config_of(&other), Event::StopAt(9)).unwrap_err();
    run(&config_of(&other[..1]), Event::Nothing).unwrap();
    assert!(result(dir.path(), &config_of(&other[..1])).0 != whole.0);
}
