//! Each process by itself, from the same configuration.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::lab::{Lab, Running, kill, shared, signal, wait_for};

/// Only a hang waits so long.
const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn loader_and_trainer_started_by_hand_train_like_the_launcher() {
    let lab = Lab::new();
    let by_launcher = lab.quick_config("launched", 3, &json!({}));
    lab.run("serenity-launch", &[&by_launcher]).expect(0);
    let config = lab.quick_config("by-hand", 3, &json!({}));
    let traces = [lab.path().join("loader.json"), lab.path().join("trainer.json")];
    // The trainer first: it waits for the ring.
    let trainer = lab.start("serenity-trainer", &["--config", &config, "--trace", traces[1].to_str().unwrap()]);
    let loader = lab.start("serenity-loader", &["--config", &config, "--trace", traces[0].to_str().unwrap()]);
    trainer.wait().expect(0);
    loader.wait().expect(0);
    assert!(lab.lora("by-hand") == lab.lora("launched"));
    lab.assert_nothing_left();
    for (trace, span) in traces.iter().zip(["fill", "block forward"]) {
        let text = std::fs::read_to_string(trace).unwrap();
        let _: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", trace.display()));
        assert!(text.contains(span), "{} has no span '{span}'", trace.display());
    }
}

#[test]
fn the_loader_benches_with_a_null_consumer() {
    let lab = Lab::new();
    let shared = shared();
    for dequant in ["cpu", "gpu"] {
        let (slab, manifest) = (shared.slab.to_str().unwrap(), shared.manifest.to_str().unwrap());
        let args =
            ["bench", "--slab", slab, "--manifest", manifest, "--dequant", dequant, "--chunk-mb", "0.25", "--pool-mb", "2", "--json"];
        let done = lab.run("serenity-loader", &args).expect(0);
        let report: Value = serde_json::from_str(done.stdout.trim()).unwrap();
        let rate = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{report}"));
        assert!(rate(&report["passes"][0]["read_rate"]) > 0.0 && rate(&report["limit_read"]["rate"]) > 0.0, "{report}");
    }
}

#[test]
fn the_trainer_benches_without_loader_and_cache() {
    let lab = Lab::new();
    let config = lab.quick_config("bench", 3, &json!({ "data": { "cache_dir": lab.path().join("nothing-here") } }));
    let done = lab.run("serenity-trainer", &["bench", "--config", &config, "--synthetic", "--steps", "3", "--json"]).expect(0);
    let report: Value = serde_json::from_str(done.stdout.trim()).unwrap();
    assert!(report.is_object(), "{report}");
    assert!(!lab.path().join("nothing-here").exists());
}

#[test]
fn the_trainer_benches_with_the_ring_and_without_a_cache() {
    let lab = Lab::new();
    let config = lab.quick_config("ring-bench", 3, &json!({ "data": { "cache_dir": lab.path().join("nothing-here") } }));
    let loader = lab.start("serenity-loader", &["--config", &config]);
    let args = ["bench", "--config", &config, "--synthetic-samples", "--steps", "3", "--json"];
    let done = lab.run("serenity-trainer", &args).expect(0);
    loader.wait().expect(0);
    let report: Value = serde_json::from_str(done.stdout.trim()).unwrap();
    assert_eq!((report["synthetic"].as_bool(), report["synthetic_samples"].as_bool()), (Some(false), Some(true)));
    // Every block comes through the ring, forward and back.
    let payload = std::fs::metadata(&shared().slab).unwrap().len() as f64;
    assert!(report["moved_bytes"].as_f64().unwrap() > payload, "{report}");
    assert!(report["step_median_s"].as_f64().unwrap() > 0.0 && report["floor_s"].as_f64().unwrap() > 0.0, "{report}");
    assert!(!lab.path().join("nothing-here").exists());
    lab.run("serenity-trainer", &["bench", "--config", &config, "--synthetic", "--synthetic-samples"]).expect(64);
    lab.assert_nothing_left();
}

#[test]
fn the_encoder_runs_and_benches_alone() {
    let lab = Lab::new();
    let cache = lab.path().join("cache");
    let trace = lab.path().join("encoder.json");
    let config = lab.quick_config("encode", 3, &json!({ "data": { "cache_dir": cache } }));
    lab.run("serenity-encoder", &["--config", &config, "--trace", trace.to_str().unwrap()]).expect(0);
    let text = std::fs::read_to_string(&trace).unwrap();
    let _: Value = serde_json::from_str(&text).unwrap();
    assert!(text.contains("encode layer"));
    let done = lab.run("serenity-encoder", &["bench", "--config", &config, "--json"]).expect(0);
    let report: Value = serde_json::from_str(done.stdout.trim()).unwrap();
    assert!(report.is_object(), "{report}");
}

#[test]
fn the_plan_is_printed_without_starting_anything() {
    let lab = Lab::new();
    let config = lab.quick_config("planned", 3, &json!({}));
    let text = lab.run("serenity-launch", &[&config, "--plan"]).expect(0).stdout;
    assert!(text.contains("slab") && text.contains("cache"), "{text}");
    let object = lab.run("serenity-launch", &[&config, "--plan", "--json"]).expect(0).stdout;
    let _: Value = serde_json::from_str(object.lines().next().unwrap()).unwrap();
    assert!(!lab.output("planned").join("log.jsonl").exists());
}

/// Configurations of two runs that have nothing but the model in common.
fn two_runs(lab: &Lab, names: [&str; 2], steps: [u64; 2]) -> [String; 2] {
    let change = [json!({}), json!({ "seed": 77, "adapter": { "rank": 2 } })];
    [0, 1].map(|i| lab.quick_config(names[i], steps[i], &change[i]))
}

#[test]
fn one_loader_feeds_two_trainers() {
    let lab = Lab::new();
    for config in &two_runs(&lab, ["alone-a", "alone-b"], [6, 6]) {
        lab.run("serenity-launch", &[config]).expect(0);
    }
    let [a, b] = two_runs(&lab, ["shared-a", "shared-b"], [6, 6]);
    let ring = lab.output("shared-a");
    // The trainers first: they wait for the ring.
    let second = ["--config", &b, "--ring", ring.to_str().unwrap(), "--consumer", "1"];
    let trainers = [lab.start("serenity-trainer", &["--config", &a]), lab.start("serenity-trainer", &second)];
    let loader = lab.start("serenity-loader", &["--config", &a, "--consumers", "2"]);
    trainers.into_iter().for_each(|trainer| drop(trainer.wait().expect(0)));
    loader.wait().expect(0);
    assert!(lab.lora("shared-a") == lab.lora("alone-a"), "the first trainer differs from its run alone");
    assert!(lab.lora("shared-b") == lab.lora("alone-b"), "the second trainer differs from its run alone");
    assert!(lab.lora("shared-a") != lab.lora("shared-b"));
    lab.assert_nothing_left();
}

#[test]
fn a_killed_trainer_does_not_stop_the_other_one_and_comes_back() {
    let lab = Lab::new();
    let [a, b] = two_runs(&lab, ["killed-a", "killed-b"], [100_000, 6]);
    let [_, alone] = two_runs(&lab, ["unused", "alone-b"], [6, 6]);
    lab.run("serenity-launch", &[&alone]).expect(0);
    let ring = lab.output("killed-a");
    let ring = ring.to_str().unwrap();
    let mut loader = lab.start("serenity-loader", &["--config", &a, "--consumers", "2"]);
    let log = lab.output("killed-a").join("log.jsonl");
    // In the middle of its steps.
    let works = |trainer: &mut Running, loader: &mut Running| {
        wait_for("two steps", PATIENCE, || {
            assert!(trainer.is_running() && loader.is_running(), "{}{}", trainer.stderr(), loader.stderr());
            (std::fs::read_to_string(&log).unwrap_or_default().lines().count() >= 2).then_some(())
        });
    };
    let mut victim = lab.start("serenity-trainer", &["--config", &a]);
    works(&mut victim, &mut loader);
    let elsewhere = format!("output_dir={:?}", lab.output("twin"));
    let twin = ["--config", &b, "--ring", ring, "--consumer", "0", "--set", &elsewhere];
    lab.run("serenity-trainer", &twin).expect(69).says(&["already has a trainer"]);
    kill(victim.pid());
    drop(victim);
    lab.run("serenity-trainer", &["--config", &b, "--ring", ring, "--consumer", "1"]).expect(0);
    assert!(lab.lora("killed-b") == lab.lora("alone-b"), "the survivor differs from its run alone");

    // The loader waits for the killed one's successor, which takes its place.
    std::fs::remove_file(&log).unwrap();
    let mut heir = lab.start("serenity-trainer", &["--config", &a]);
    works(&mut heir, &mut loader);
    signal(heir.pid(), Signal::SIGTERM);
    heir.wait().expect(75);
    signal(loader.pid(), Signal::SIGTERM);
    loader.wait().expect(0);
}
