//! However the weights travel, the LoRA is the same, byte for byte.

use serde_json::{Value, json};

use crate::lab::{Lab, program, root, shared};

const STEPS: u64 = 6;

fn stagehand(change: Value) -> Value {
    json!({ "memory": { "stagehand": change } })
}

#[test]
fn streamed_resident_every_form_pool_and_thread_count_give_the_same_lora() {
    let lab = Lab::new();
    let train = |name: &str, change: &Value| {
        let config = lab.quick_config(name, STEPS, change);
        lab.run("serenity-launch", &[&config]).expect(0);
        lab.lora(name)
    };
    let reference = train("streamed", &json!({}));
    let resident = train("resident", &json!({ "memory": { "strategy": "resident" } }));
    assert!(reference == resident, "streamed differs from resident");
    let variants = [
        ("cpu-form", stagehand(json!({ "dequant": "cpu" }))),
        ("int8-form", stagehand(json!({ "dequant": "gpu" }))),
        ("two-slots", stagehand(json!({ "pinned_pool_mb": 0.5, "ring_chunk_mb": 0.25 }))),
        ("two-slots-int8", stagehand(json!({ "pinned_pool_mb": 0.5, "ring_chunk_mb": 0.25, "dequant": "gpu" }))),
        ("sixty-four-slots", stagehand(json!({ "pinned_pool_mb": 16, "ring_chunk_mb": 0.25 }))),
        ("whatever-fits", stagehand(json!({ "pinned_pool_mb": "auto" }))),
        ("odd-chunks", stagehand(json!({ "pinned_pool_mb": 0.1171875, "ring_chunk_mb": 0.01171875 }))),
        ("one-loader-thread", stagehand(json!({ "loader_threads": 1 }))),
    ];
    for (name, change) in &variants {
        assert!(train(name, change) == reference, "{name} differs");
    }
    lab.assert_nothing_left();
}

#[test]
fn the_number_of_threads_does_not_change_the_lora() {
    let lab = Lab::new();
    let mut results = Vec::new();
    for threads in ["1", "2", "3"] {
        let name = format!("threads-{threads}");
        let config = lab.quick_config(&name, STEPS, &json!({}));
        let done = std::process::Command::new(program("serenity-launch"))
            .arg(&config)
            .env("RAYON_NUM_THREADS", threads)
            .current_dir(root())
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        results.push(lab.lora(&name));
    }
    assert!(results[0] == results[1] && results[1] == results[2]);
}

#[test]
fn the_original_builders_slab_trains() {
    // The goldens' model and the slab that the original SquareQ tool made of it: no additions of ours anywhere.
    let lab = Lab::new();
    let goldens = root().join("tests/fixtures/goldens");
    let settings = |strategy: &str| {
        json!({
            "model": { "path": goldens.join("model"), "max_sequence_length": 64 },
            "max_steps": 3,
            "validation": { "samples": 1 },
            "memory": { "strategy": strategy, "stagehand": {
                "squareq_slab_path": goldens.join("cases/squareq/flux2tiny_int8.safetensors"),
                "squareq_manifest_path": goldens.join("cases/squareq/flux2tiny_int8.manifest.json"),
            } },
        })
    };
    let streamed = lab.config("original", &settings("stagehand"));
    lab.run("serenity-launch", &[&streamed]).expect(0);
    let resident = lab.config("original-resident", &settings("resident"));
    lab.run("serenity-launch", &[&resident]).expect(0);
    assert!(lab.lora("original") == lab.lora("original-resident"));
    // Our own slab of the same model has the same codes, so it trains to the same bytes.
    let ours = lab.config(
        "ours",
        &json!({ "model": { "path": goldens.join("model"), "max_sequence_length": 64 }, "max_steps": 3, "validation": { "samples": 1 } }),
    );
    lab.run("serenity-launch", &[&ours]).expect(0);
    assert!(lab.lora_tensors("original") == lab.lora_tensors("ours"), "the slab that we build trains differently");
}

#[test]
fn another_seed_gives_another_lora() {
    // Guards the tests above: files that never changed would pass them too.
    let lab = Lab::new();
    let train = |name: &str, seed: u64| {
        let config = lab.quick_config(name, 3, &json!({ "seed": seed }));
        lab.run("serenity-launch", &[&config]).expect(0);
        lab.lora(name)
    };
    assert!(train("a", 1) != train("b", 2));
    assert!(shared().slab.exists());
}
