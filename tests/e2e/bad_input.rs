//! Bad input: a message that says what, where and what to do, the documented exit code, no panic.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::lab::{Lab, root, shared};

/// Runs the launcher on the quick start changed by `change`.
fn refused(change: &Value, code: i32, says: &[&str]) {
    let lab = Lab::new();
    let config = lab.quick_config("run", 2, change);
    let done = lab.run("serenity-launch", &[&config]).expect(code).says(says);
    assert!(!done.stderr.contains("panicked"), "{}", done.stderr);
    assert!(done.seconds < 60.0);
    lab.assert_nothing_left();
}

#[test]
fn an_unknown_key_is_named_with_its_nearest() {
    refused(&json!({ "adapter": { "rnak": 8 } }), 64, &["rnak", "rank", "adapter"]);
    refused(&json!({ "max_stepss": 8 }), 64, &["max_stepss", "max_steps"]);
}

#[test]
fn a_legacy_configuration_is_refused_with_what_it_would_lose() {
    refused(&json!({ "base_model_name": "x" }), 64, &["base_model_name", "target_modules", "scheduler"]);
}

#[test]
fn bucket_policy_with_stagehand_is_refused() {
    refused(&json!({ "bucket_policy_enabled": true }), 64, &["bucket_policy_enabled"]);
}

#[test]
fn a_machine_without_a_gpu_is_told_so_once() {
    if Path::new("/dev/nvidiactl").exists() || Path::new("/dev/dxg").exists() {
        // Past the test harness's capture: a test that did not run must be seen.
        let _ = writeln!(std::io::stderr(), "SKIPPED: what the launcher says without a GPU was not checked: there is one here");
        return;
    }
    let lab = Lab::new();
    let config = lab.quick_config("run", 2, &json!({ "train_device": "cuda" }));
    let done = lab.run("serenity-launch", &[&config]).expect(69).says(&["to do:"]);
    assert!(done.stdout.contains("shows no NVIDIA device"), "{}", done.stdout);
    assert!(!done.stderr.contains("restart"), "{}", done.stderr);
    lab.assert_nothing_left();
}

#[test]
fn a_target_that_matches_nothing_is_named() {
    refused(&json!({ "adapter": { "target_modules": ["attn.to_q", "ff.net.0.proj"] } }), 64, &["ff.net.0.proj"]);
}

#[test]
fn a_missing_image_folder_is_named() {
    refused(&json!({ "data": { "concepts": [{ "path": "no/such/folder" }] } }), 69, &["no/such/folder"]);
}

#[test]
fn no_data_at_all_says_how_to_give_some() {
    refused(&json!({ "data": { "concepts": null } }), 64, &["--data", "concepts"]);
}

/// A dataset of one good image, and `file` with `content` beside it.
fn dataset(lab: &Lab, file: &str, content: &[u8]) -> Value {
    let images = root().join("examples/quickstart/images");
    let folder = lab.path().join("images");
    std::fs::create_dir_all(&folder).unwrap();
    for name in ["cat.jpg", "cat.txt"] {
        std::fs::copy(images.join(name), folder.join(name)).unwrap();
    }
    std::fs::write(folder.join(file), content).unwrap();
    json!({ "data": { "concepts": [{ "path": folder }] } })
}

#[test]
fn an_image_without_caption_is_named() {
    let lab = Lab::new();
    let image = std::fs::read(root().join("examples/quickstart/images/coffee.jpg")).unwrap();
    let change = dataset(&lab, "lonely.jpg", &image);
    refused(&change, 65, &["lonely"]);
}

#[test]
fn an_unreadable_image_is_named() {
    let lab = Lab::new();
    let mut change = dataset(&lab, "broken.jpg", b"not an image at all");
    std::fs::write(lab.path().join("images/broken.txt"), "broken").unwrap();
    change["data"]["cache_dir"] = json!(lab.path().join("cache"));
    refused(&change, 65, &["broken.jpg"]);
}

/// A copy of the shared slab, changed by `edit`.
fn slab_copy(folder: &Path, edit: impl FnOnce(&mut Vec<u8>)) -> Value {
    let (slab, manifest) = (folder.join("copy.safetensors"), folder.join("copy.manifest.json"));
    let mut bytes = std::fs::read(&shared().slab).unwrap();
    edit(&mut bytes);
    std::fs::write(&slab, bytes).unwrap();
    std::fs::copy(&shared().manifest, &manifest).unwrap();
    for entry in std::fs::read_dir(shared().slab.parent().unwrap()).unwrap() {
        let path = entry.unwrap().path();
        let target = folder.join(path.file_name().unwrap());
        if !target.exists() {
            std::fs::copy(&path, target).unwrap();
        }
    }
    json!({ "memory": { "stagehand": { "squareq_slab_path": slab, "squareq_manifest_path": manifest } } })
}

#[test]
fn a_truncated_slab_is_refused() {
    let lab = Lab::new();
    let change = slab_copy(lab.path(), |bytes| bytes.truncate(bytes.len() / 2));
    refused(&change, 65, &["copy.safetensors"]);
}

#[test]
fn one_flipped_byte_in_a_slab_is_noticed_before_it_is_trained_on() {
    for at in [0.3, 0.5, 0.9] {
        let lab = Lab::new();
        let change = slab_copy(lab.path(), |bytes| {
            let index = (bytes.len() as f64 * at) as usize;
            bytes[index] ^= 0x10;
        });
        refused(&change, 65, &["copy.safetensors", "offset"]);
    }
}

#[test]
fn the_slab_of_another_model_is_refused() {
    let goldens = root().join("tests/fixtures/goldens/cases/squareq");
    let change = json!({ "memory": { "stagehand": {
        "squareq_slab_path": goldens.join("flux2tiny_int8.safetensors"),
        "squareq_manifest_path": goldens.join("flux2tiny_int8.manifest.json"),
    } } });
    refused(&change, 65, &["flux2tiny_int8.safetensors", "model"]);
}

#[test]
fn a_checkpoint_of_another_configuration_is_refused() {
    let lab = Lab::new();
    let config = lab.quick_config("run", 3, &json!({}));
    lab.run("serenity-launch", &[&config]).expect(0);
    let other = lab.quick_config("run", 3, &json!({ "adapter": { "rank": 4, "alpha": 4.0 } }));
    lab.run("serenity-launch", &[&other]).expect(65).says(&["rank"]);
    let done = lab.run("serenity-launch", &[&other, "--resume", "never"]).expect(0);
    assert!(done.code == Some(0));
}

#[test]
fn a_ring_larger_than_shared_memory_is_refused() {
    // 8 TiB, a hundred times what the machine can have.
    refused(&json!({ "memory": { "stagehand": { "pinned_pool_mb": 8388608, "ring_chunk_mb": 1024 } } }), 75, &["/dev/shm"]);
}

#[test]
fn a_second_loader_on_a_ring_names_the_first() {
    let lab = Lab::new();
    let config = lab.quick_config("run", 2, &json!({}));
    let first = lab.start("serenity-loader", &["--config", &config]);
    let ring = Path::new("/dev/shm").join(crate::lab::ring_name(&lab.output("run")));
    crate::lab::wait_for("the first loader's ring", Duration::from_secs(60), || first.stderr().contains("serving").then_some(()));
    assert!(ring.exists());
    lab.run("serenity-loader", &["--config", &config]).expect(69).says(&[&first.pid().to_string(), "loader"]);
    crate::lab::signal(first.pid(), nix::sys::signal::Signal::SIGTERM);
    first.wait().expect(0);
    lab.assert_nothing_left();
}

#[test]
fn a_file_that_is_no_json_is_refused() {
    let lab = Lab::new();
    for text in ["", "{", "[]", "{\"max_steps\": 1, \"max_steps\": 2}", "\u{0}\u{0}"] {
        let path = lab.path().join("bad.json");
        std::fs::write(&path, text).unwrap();
        let done = lab.run("serenity-launch", &[path.to_str().unwrap()]).expect(64);
        assert!(!done.stderr.contains("panicked"), "{}", done.stderr);
    }
    lab.run("serenity-launch", &["no/such/config.json"]).says(&["no/such/config.json"]);
}

#[test]
fn a_process_by_itself_cannot_choose_the_pool() {
    let lab = Lab::new();
    let config = lab.quick_config("run", 2, &json!({ "memory": { "stagehand": { "pinned_pool_mb": "auto" } } }));
    lab.run("serenity-loader", &["--config", &config]).expect(64).says(&["pinned_pool_mb", "auto", "--set"]);
    lab.run("serenity-trainer", &["--config", &config]).expect(64).says(&["pinned_pool_mb", "auto", "--set"]);
}

#[test]
fn a_pool_that_is_no_size_is_named() {
    refused(&json!({ "memory": { "stagehand": { "pinned_pool_mb": "all" } } }), 64, &["pinned_pool_mb", "auto", "all"]);
}
