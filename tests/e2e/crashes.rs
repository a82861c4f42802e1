//! kill -9 at random moments: the run goes on, or is resumed by the same command, and ends with the bytes of an undisturbed one;
//! nothing is left behind and nothing hangs.
//!
//! `SERENITY_KILLS=N` sets the kills per process (default 2; the acceptance run uses 5), `SERENITY_KILL_SEED=N` the moments.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::lab::{Finished, Lab, Running, kill, processes_with, shared, signal, wait_for};

const STEPS: u64 = 24;
/// Longest silence after a kill before the run must have moved on.
const RECOVERY_MAX: Duration = Duration::from_secs(10);

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Moments in `0..range` from a seed.
fn moments(name: &str, range: Duration) -> Vec<Duration> {
    let mut state = setting("SERENITY_KILL_SEED", 1)
        ^ name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mut roll = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / (1u64 << 31) as f64
    };
    (0..setting("SERENITY_KILLS", 2)).map(|_| range.mul_f64(roll())).collect()
}

/// A run of its own model cache (the encoder works too), its bytes, and how long it takes from the first child's start.
fn undisturbed(lab: &Lab, change: &Value) -> (Vec<u8>, Duration) {
    let config = lab.quick_config("undisturbed", STEPS, change);
    let done = lab.run("serenity-launch", &[&config]).expect(0);
    (lab.lora("undisturbed"), Duration::from_secs_f64(done.seconds))
}

fn child_of(lab: &Lab, run: &str, program: &str) -> Option<i32> {
    let marker = lab.path().join(format!("{run}.json"));
    processes_with(marker.to_str().unwrap()).into_iter().find(|(_, name)| name == program).map(|(pid, _)| pid)
}

/// Runs `name`, kills `program` once at `moment` after it appears, waits for the end.
fn run_and_kill(lab: &Lab, name: &str, config: &str, program: &str, moment: Duration) -> (Finished, bool) {
    let mut running: Running = lab.start("serenity-launch", &[config]);
    let mut victim = None;
    let start = Instant::now();
    while victim.is_none() && running.is_running() && start.elapsed() < Duration::from_secs(60) {
        victim = child_of(lab, name, program);
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut killed = false;
    if let Some(pid) = victim {
        std::thread::sleep(moment);
        killed = processes_with(&lab.path().join(format!("{name}.json")).to_string_lossy()).contains_key(&pid);
        kill(pid);
        if killed {
            // Either a successor appears or the launcher ends: no hang.
            wait_for("a successor after the kill", RECOVERY_MAX, || {
                (child_of(lab, name, program).is_some_and(|p| p != pid) || !running.is_running()).then_some(())
            });
        }
    }
    (running.wait(), killed)
}

fn kill_child(program: &str, share: f64, own_cache: bool) {
    let lab = Lab::new();
    shared();
    let change =
        |name: &str| if own_cache { json!({ "data": { "cache_dir": lab.path().join(format!("cache-{name}")) } }) } else { json!({}) };
    let (reference, time) = undisturbed(&lab, &change("undisturbed"));
    let mut kills = 0;
    for (i, moment) in moments(program, time.mul_f64(share)).into_iter().enumerate() {
        let name = format!("killed-{i}");
        let config = lab.quick_config(&name, STEPS, &change(&name));
        let (done, killed) = run_and_kill(&lab, &name, &config, program, moment);
        done.expect(0);
        kills += u64::from(killed);
        assert!(lab.lora(&name) == reference, "{program} killed {moment:?} after its start: another LoRA");
        let steps: Vec<u64> = lab.log(&name).iter().filter(|l| l.get("loss").is_some()).map(|l| l["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>(), "the log of a resumed run has each step once");
        lab.assert_nothing_left();
    }
    assert!(kills > 0, "no kill hit a running {program}");
}

#[test]
fn killing_the_loader_changes_nothing() {
    kill_child("serenity-loader", 0.7, false);
}

#[test]
fn killing_the_trainer_changes_nothing() {
    kill_child("serenity-trainer", 0.7, false);
}

#[test]
fn killing_the_encoder_changes_nothing() {
    // A cache of its own: otherwise there is nothing to encode.
    kill_child("serenity-encoder", 0.25, true);
}

#[test]
fn killing_the_launcher_leaves_no_orphan_and_the_next_one_resumes() {
    let lab = Lab::new();
    let (reference, time) = undisturbed(&lab, &json!({}));
    for (i, moment) in moments("launcher", time).into_iter().enumerate() {
        let name = format!("launcher-{i}");
        let config = lab.quick_config(&name, STEPS, &json!({}));
        let running = lab.start("serenity-launch", &[&config]);
        std::thread::sleep(moment);
        kill(running.pid());
        drop(running);
        wait_for("the children of a dead launcher to end", Duration::from_secs(5), || processes_with(&config).is_empty().then_some(()));
        lab.run("serenity-launch", &[&config]).expect(0);
        assert!(lab.lora(&name) == reference, "launcher killed {moment:?} after its start: another LoRA");
        lab.assert_nothing_left();
    }
}

#[test]
fn everything_killed_at_once_is_resumed() {
    let lab = Lab::new();
    let (reference, time) = undisturbed(&lab, &json!({}));
    let config = lab.quick_config("all", STEPS, &json!({}));
    let running = lab.start("serenity-launch", &[&config]);
    std::thread::sleep(time.mul_f64(0.6));
    for pid in processes_with(&config).into_keys() {
        kill(pid);
    }
    drop(running);
    lab.run("serenity-launch", &[&config]).expect(0);
    assert!(lab.lora("all") == reference);
    lab.assert_nothing_left();
}

#[test]
fn an_interrupt_stops_at_a_checkpoint_and_the_same_command_resumes() {
    let lab = Lab::new();
    let (reference, _) = undisturbed(&lab, &json!({}));
    // No periodic checkpoints: the one at the interrupt is the only one there can be.
    let config = lab.quick_config("interrupted", STEPS, &json!({ "checkpoint": { "save_every": 0 } }));
    let running = lab.start("serenity-launch", &[&config]);
    wait_for("a few steps", Duration::from_secs(60), || {
        let log = std::fs::read_to_string(lab.output("interrupted").join("log.jsonl")).unwrap_or_default();
        (log.lines().filter(|l| l.contains("\"loss\"")).count() >= 3).then_some(())
    });
    signal(running.pid(), Signal::SIGINT);
    let stopped = Instant::now();
    running.wait().expect(75);
    assert!(stopped.elapsed() < Duration::from_secs(30));
    lab.assert_nothing_left();
    let checkpoints = std::fs::read_dir(lab.output("interrupted").join("checkpoints")).unwrap().count();
    assert_eq!(checkpoints, 1);
    let resumed = lab.run("serenity-launch", &[&config]).expect(0);
    assert!(lab.lora("interrupted") == reference, "{}", resumed.stderr);
}
