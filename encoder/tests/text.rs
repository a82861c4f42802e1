//! The program's ways to the text encoder: random weights, the benchmark without a configuration, hidden states of token ids, what happens without a
//! device.
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

/// Ids of the reference's prompts, padding left off, and the reference's embeddings of them.
fn golden() -> (Vec<Vec<u32>>, Vec<f32>, usize) {
    let golden = Checkpoint::open(&Path::new(GOLDENS).join("cases/text_encoder.safetensors")).unwrap();
    let numbers = |name: &str| -> Vec<i64> {
        golden.tensor(name).unwrap().bytes().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let (ids, mask) = (numbers("input_ids"), numbers("attention_mask"));
    let embeds = golden.tensor("embeds").unwrap();
    let [rows, width, features] = *embeds.shape.as_slice() else { panic!("{:?}", embeds.shape) };
    let values = embeds.to_f32().unwrap();
    let (mut captions, mut expected) = (vec![Vec::new(); rows], Vec::new());
    for (i, (id, real)) in ids.iter().zip(&mask).enumerate() {
        if *real == 1 {
            captions[i / width].push(u32::try_from(*id).unwrap());
            expected.extend_from_slice(&values[i * features..(i + 1) * features]);
        }
    }
    (captions, expected, width)
}

#[test]
fn hidden_states_of_ids_are_the_references() {
    let dir = tempfile::tempdir().unwrap();
    let (captions, expected, max_length) = golden();
    let states: serde_json::Value =
        serde_json::from_slice(&std::fs::read(Path::new(GOLDENS).join("cases/text_encoder.json")).unwrap()).unwrap();
    let case = dir.path().join("case.json");
    let indices = &states["hidden_state_indices"];
    let json = serde_json::json!({"captions": captions, "pad_id": 11, "max_length": max_length, "hidden_state_indices": indices});
    std::fs::write(&case, json.to_string()).unwrap();
    let (model, out) = (format!("{GOLDENS}/model/text_encoder"), dir.path().join("out.safetensors"));
    let run = |more: &[&str]| {
        let common = ["parity", "ids", "--model", &model, "--case", case.to_str().unwrap(), "--out", out.to_str().unwrap()];
        encoder(&[&common, more].concat())
    };
    let done = run(&[]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let rows = Checkpoint::open(&out).unwrap().tensor("rows").unwrap().to_f32().unwrap();
    assert_eq!(rows.len(), expected.len());
    assert!(rows.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 5e-5));
    // bf16 is another computation, and near.
    assert!(run(&["--dtype", "bf16"]).status.success());
    let rounded = Checkpoint::open(&out).unwrap().tensor("rows").unwrap().to_f32().unwrap();
    let (error, size) = rounded.iter().zip(&expected).fold((0.0, 0.0), |s, (a, b)| (s.0 + (a - b) * (a - b), s.1 + b * b));
    assert!(rounded != rows && (error / size).sqrt() < 2e-2, "{}", (error / size).sqrt());
    std::fs::write(&case, r#"{"captions": [[]], "pad_id": 1, "max_length": 4, "hidden_state_indices": [0, 1, 2]}"#).unwrap();
    assert_eq!(run(&[]).status.code(), Some(65));
}

#[test]
fn the_benchmark_needs_weights_and_nothing_else() {
    let model = format!("{GOLDENS}/model/text_encoder");
    let done = encoder(&["bench", "--text-encoder", &model, "--captions", "5", "--tokens", "20", "--readers", "2", "--json"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((report["captions"].as_u64(), report["device"].as_str()), (Some(5), Some("cpu")));
    for positive in ["seconds", "read_rate", "product_rate", "read_floor_seconds", "compute_floor_seconds", "ratio", "weight_bytes"] {
        assert!(report[positive].as_f64().unwrap() > 0.0, "{positive}");
    }
    assert_eq!(encoder(&["bench", "--text-encoder", &model, "--tokens", "1"]).status.code(), Some(64));
}

#[test]
fn without_a_device_cuda_is_an_error_that_says_what_to_do() {
    if !no_device() {
        // Past the test harness's capture: a test that did not run must be seen.
        let _ = writeln!(std::io::stderr(), "SKIPPED: what the text encoder says without a device was not checked: there is one here");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (out, case) = (dir.path().join("out.safetensors"), format!("{GOLDENS}/cases/text_encoder.json"));
    let model = format!("{GOLDENS}/model");
    let done = encoder(&["parity", "text", "--model", &model, "--case", &case, "--out", out.to_str().unwrap(), "--device", "cuda"]);
    assert_eq!(done.status.code(), Some(69), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(String::from_utf8_lossy(&done.stderr).contains("train_device") && !out.exists());
}
