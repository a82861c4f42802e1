//! The program's ways to the VAE: parity whole and in strips, the benchmark without a configuration, what happens without a device.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

use serenity_protocol::checkpoint::Checkpoint;

const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/goldens");

fn encoder(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_serenity-encoder")).args(args).output().unwrap()
}

fn no_device() -> bool {
    !Path::new("/dev/nvidiactl").exists() && !Path::new("/dev/nvidia0").exists()
}

fn parity(out: &str, more: &[&str]) -> Output {
    let (model, case) = (format!("{GOLDENS}/model"), format!("{GOLDENS}/cases/vae.safetensors"));
    encoder(&[&["parity", "vae", "--model", &model, "--case", &case, "--out", out], more].concat())
}

#[test]
fn parity_in_strips_is_the_references() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.safetensors");
    let done = parity(out.to_str().unwrap(), &["--tile-rows", "8"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let expected = Checkpoint::open(&Path::new(GOLDENS).join("cases/vae.safetensors")).unwrap();
    let found = Checkpoint::open(&out).unwrap();
    for name in ["latent_mode", "tokens", "decoded"] {
        let (a, b) = (expected.tensor(name).unwrap().to_f32().unwrap(), found.tensor(name).unwrap().to_f32().unwrap());
        assert_eq!(a.len(), b.len(), "{name}");
        let scale = a.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(a.iter().zip(&b).all(|(x, y)| (x - y).abs() <= 1e-5 * scale), "{name}");
    }
}

#[test]
fn the_benchmark_needs_a_vae_and_nothing_else() {
    let vae = format!("{GOLDENS}/model/vae");
    let done = encoder(&["bench", "--vae", &vae, "--resolution", "32", "--images", "3", "--json"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((report["images"].as_u64(), report["device"].as_str()), (Some(3), Some("cpu")));
    assert!(report["images_per_second"].as_f64().unwrap() > 0.0 && report["ratio"].as_f64().unwrap() > 0.0);
    assert_eq!(encoder(&["bench", "--vae", &vae, "--resolution", "40"]).status.code(), Some(64));
    assert_eq!(encoder(&["bench"]).status.code(), Some(64));
}

#[test]
fn without_a_device_cuda_is_an_error_and_its_check_says_that_it_checked_nothing() {
    if !no_device() {
        // Past the test harness's capture: a test that did not run must be seen.
        let _ = writeln!(std::io::stderr(), "SKIPPED: what the VAE says without a device was not checked: there is one here");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.safetensors");
    let done = parity(out.to_str().unwrap(), &["--device", "cuda"]);
    assert_eq!(done.status.code(), Some(69), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(String::from_utf8_lossy(&done.stderr).contains("train_device") && !out.exists());
    let check = encoder(&["gpu-check"]);
    assert!(check.status.success() && String::from_utf8_lossy(&check.stdout).contains("SKIPPED: no GPU"));
}
