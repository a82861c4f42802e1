//! What the configuration accepts, refuses and says.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::*;
use crate::error::{Error, Result};

/// The case study's file, unchanged: it names no data.
const CASE_STUDY: &str = r#"{ "model_type": "flux_2_dev", "training_method": "lora",
  "model": {"type": "flux_2_dev", "path": "black-forest-labs/FLUX.2-dev"},
  "adapter": {"type": "lora", "rank": 16, "alpha": 16.0,
    "target_modules": ["attn.to_q","attn.to_k","attn.to_v","attn.to_out","attn.add_q_proj","attn.add_k_proj","attn.add_v_proj","attn.to_add_out"]},
  "memory": {"gradient_checkpointing": "on", "strategy": "stagehand",
    "stagehand": {"pinned_pool_mb": 8192, "pinned_slab_mb": 2048, "vram_high_watermark_mb": 10000, "vram_low_watermark_mb": 6000,
      "squareq_slab_path": "output/squareq_slabs/flux2dev_int8.safetensors",
      "squareq_manifest_path": "output/squareq_slabs/flux2dev_int8.manifest.json"}},
  "resolution": 512, "batch_size": 1, "learning_rate": 1e-4, "max_steps": 200,
  "scheduler": {"scheduler": "cosine", "warmup_steps": 10}, "bucket_policy_enabled": false }"#;

/// As in the design: the case study's file with its data section.
fn case_study_with_data() -> String {
    CASE_STUDY.replacen(
        "\"resolution\"",
        "\"data\": {\"concepts\": [{\"path\": \"dataset/\", \"caption_file_ext\": \".txt\"}]},\n  \"resolution\"",
        1,
    )
}

fn load(text: &str, overrides: &Overrides) -> Result<Config> {
    Config::from_json(text, Path::new("conf/run1.json"), overrides)
}

/// The smallest configuration, with `extra` laid over it.
fn minimal_with(extra: &Value) -> Result<Config> {
    let mut value = json!({"model": {"path": "m"}, "data": {"concepts": ["images"]}});
    merge(&mut value, extra);
    load(&value.to_string(), &Overrides::default())
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key.as_str()).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}

/// The message of a refusal, which must be a configuration error (exit 64).
fn refusal(result: Result<Config>) -> String {
    let error = result.expect_err("must be refused");
    assert!(matches!(error, Error::Config(_)), "{error:?}");
    assert_eq!(error.exit_code(), 64);
    error.to_string()
}

#[test]
fn the_case_study_loads_unchanged() {
    let overrides = Overrides { data: Some("photos".into()), ..Overrides::default() };
    for text in [CASE_STUDY.to_string(), case_study_with_data()] {
        let config = load(&text, &overrides).unwrap();
        assert_eq!(config.data.concepts, [Concept { path: "photos".into(), caption_file_ext: ".txt".into(), repeats: 1 }]);
        assert_eq!(config.name, "run1");
        assert_eq!(config.output_dir, Path::new("output/run1"));
        assert_eq!(config.model.path, "black-forest-labs/FLUX.2-dev");
        assert_eq!((config.adapter.rank, config.adapter.alpha), (16, 16.0));
        assert!(matches!(&config.adapter.targets, Targets::Entries(e) if e.len() == 8));
        assert_eq!(config.memory.strategy, MemoryStrategy::Stagehand);
        assert_eq!(config.memory.slab_path, Path::new("output/squareq_slabs/flux2dev_int8.safetensors"));
        assert_eq!(config.memory.manifest_path, Path::new("output/squareq_slabs/flux2dev_int8.manifest.json"));
        let s = &config.memory.stagehand;
        assert_eq!((s.pool_bytes, s.chunk_bytes), (Some(8192 << 20), 64 << 20));
        assert_eq!((s.vram_high_bytes, s.vram_low_bytes), (Some(10_000 << 20), Some(6_000 << 20)));
        assert_eq!(s.pinned_slab_bytes, Some(2048 << 20));
        assert_eq!(s.form, PayloadForm::Int8);
        assert_eq!((config.resolution, config.batch_size, config.max_steps), (512, 1, 200));
        assert_eq!((config.scheduler.kind, config.scheduler.warmup_steps), (SchedulerKind::Cosine, 10));
        assert_eq!((config.device, config.dtype), (DeviceKind::Cuda(0), ComputeDtype::Bf16));
        assert_eq!(config.notices, Vec::<String>::new());
    }
    assert_eq!(load(&case_study_with_data(), &Overrides::default()).unwrap().data.concepts[0].path, Path::new("dataset/"));
    let message = refusal(load(CASE_STUDY, &Overrides::default()));
    assert!(message.contains("--data") && message.contains("concepts"), "{message}");
}

#[test]
fn defaults_are_those_of_the_documentation() {
    let c = minimal_with(&json!({})).unwrap();
    assert_eq!((c.adapter.rank, c.adapter.alpha, c.adapter.targets), (16, 16.0, Targets::AllLinear));
    assert_eq!(c.timestep, TimestepConfig { distribution: TimestepDistribution::LogitNormal, shift: 1.0, dynamic_shift: true });
    assert_eq!(
        c.optimizer,
        OptimizerConfig { learning_rate: 1e-4, weight_decay: 0.0, beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm: 1.0 }
    );
    assert_eq!((c.resolution, c.batch_size, c.gradient_accumulation_steps, c.max_steps, c.seed), (1024, 1, 1, 100, 42));
    assert_eq!((c.guidance_scale, c.validation), (1.0, ValidationConfig { samples: 4, every: 0 }));
    assert_eq!(c.checkpoint, CheckpointConfig { save_every: 0, keep: 2, resume: Resume::Auto });
    assert_eq!(c.memory.strategy, MemoryStrategy::Resident);
    assert_eq!(c.memory.slab_path, Path::new("output/run1/slab/run1_int8.safetensors"));
    assert_eq!(c.memory.manifest_path, Path::new("output/run1/slab/run1_int8.manifest.json"));
    assert_eq!(c.data.cache_dir, Path::new("output/run1/cache"));
    assert_eq!(c.model.max_sequence_length, 512);
}

#[test]
fn an_unknown_key_names_its_place_and_the_nearest_known_key() {
    for (wrong, place, near) in [
        (json!({"memory": {"stagehand": {"pined_pool_mb": 1}}}), "in `memory.stagehand`", "`pinned_pool_mb`"),
        (json!({"learning_rat": 1}), "at the root", "`learning_rate`"),
        (json!({"adapter": {"rnak": 1}}), "in `adapter`", "`rank`"),
        (json!({"model": {"pth": "x"}}), "in `model`", "`path`"),
        (json!({"scheduler": {"warm_up_steps": 1}}), "in `scheduler`", "`warmup_steps`"),
        (json!({"data": {"concepts": [{"path": "a", "caption_ext": ".txt"}]}}), "in `data.concepts[0]`", "`caption_file_ext`"),
    ] {
        let message = refusal(minimal_with(&wrong));
        assert!(message.contains(place) && message.contains(&format!("did you mean {near}?")), "{message}");
    }
    let message = refusal(minimal_with(&json!({"pinned_pool_mb": 1})));
    assert!(message.contains("belongs in `memory.stagehand`"), "{message}");
    let message = refusal(minimal_with(&json!({"validation": {"zzz": 1}})));
    assert!(message.contains("one of samples, every") && message.contains("remove it"), "{message}");
}

/// No key is merely swallowed: an absurd value of every known key of every section is refused.
#[test]
fn every_known_key_is_looked_at() {
    let mut keys = 0;
    for (section, names) in json::known_keys() {
        assert!(!names.is_empty(), "{section}");
        for name in names {
            let mut value = json!({ *name: {"absurd": [1]} });
            for part in section.split('.').rev().filter(|p| !p.is_empty()) {
                value = if part == "concepts[]" { json!({"concepts": [value]}) } else { json!({ part: value }) };
            }
            let message = refusal(minimal_with(&value));
            assert!(
                message.contains(name) || message.contains("absurd") || message.contains("missing field"),
                "{section}.{name}: {message}"
            );
            keys += 1;
        }
    }
    assert!(keys > 150, "only {keys} keys");
}

#[test]
fn duplicate_keys_and_two_spellings_are_refused() {
    let text = r#"{"model": {"path": "m"}, "data": {"concepts": ["d"], "cache_dir": "a", "cache_dir": "b"}}"#;
    let message = refusal(load(text, &Overrides::default()));
    assert!(message.contains("`cache_dir` is given twice") && message.contains("data"), "{message}");
    for both in [
        json!({"max_steps": 5, "max_train_steps": 5}),
        json!({"gradient_accumulation": 2, "gradient_accumulation_steps": 2}),
        json!({"adapter": {"rank": 8, "network_dim": 8}}),
        json!({"adapter": {"alpha": 8, "network_alpha": 8}}),
        json!({"save_every": 8, "save_every_n_steps": 8}),
        json!({"resume_from": "a", "checkpoint": {"resume_state": "a"}}),
        json!({"concepts": ["x"]}),
        json!({"data": {"concepts": [{"path": "a", "repeats": 2, "num_repeats": 2}]}}),
    ] {
        let message = refusal(minimal_with(&both));
        assert!(message.contains("spellings of one key"), "{message}");
    }
    let message = refusal(minimal_with(&json!({"resolution": 512, "data": {"resolution": 256}})));
    assert!(message.contains("`data.resolution` and `resolution` differ"), "{message}");
    assert_eq!(minimal_with(&json!({"resolution": 256, "data": {"resolution": 256}})).unwrap().resolution, 256);
}

#[test]
fn aliases_mean_the_same() {
    let c = minimal_with(&json!({"max_train_steps": 7, "gradient_accumulation": 3, "save_every_n_steps": 9, "resume_from": "ck",
        "adapter": {"network_dim": 4, "network_alpha": 2, "target_modules": "attn.to_q, attn.to_k"}}))
    .unwrap();
    assert_eq!((c.max_steps, c.gradient_accumulation_steps, c.checkpoint.save_every), (7, 3, 9));
    assert_eq!(c.checkpoint.resume, Resume::Path("ck".into()));
    assert_eq!((c.adapter.rank, c.adapter.alpha), (4, 2.0));
    assert_eq!(c.adapter.targets, Targets::Entries(vec!["attn.to_q".into(), "attn.to_k".into()]));
    assert_eq!(minimal_with(&json!({"adapter": {"target_modules": ["all-linear"]}})).unwrap().adapter.targets, Targets::AllLinear);
}

#[test]
fn a_legacy_file_is_refused_with_what_would_have_been_lost() {
    let text = r#"{"base_model_name": "m", "output_model_destination": "o", "timestep_distribution": "UNIFORM",
        "memory": {"gradient_checkpointing": "on", "strategy": "stagehand", "stagehand": {"pinned_pool_mb": 1}},
        "adapter": {"rank": 4, "target_modules": ["attn.to_q"]}, "optimizer": {"optimizer": "ADAMW", "beta1": 0.8},
        "scheduler": {"warmup_steps": 3}, "sample": {"enabled": true}, "checkpoint": {"output_dir": "o", "keep": 1}}"#;
    let message = refusal(load(text, &Overrides::default()));
    for lost in [
        "timestep_distribution",
        "memory.strategy",
        "memory.stagehand",
        "adapter.target_modules",
        "optimizer.beta1",
        "scheduler.warmup_steps",
        "sample.enabled",
        "checkpoint.keep",
    ] {
        assert!(message.contains(lost), "{lost}: {message}");
    }
    for kept in ["memory.gradient_checkpointing", "adapter.rank", "optimizer.optimizer", "checkpoint.output_dir"] {
        assert!(!message.contains(kept), "{kept}: {message}");
    }
}

#[test]
fn the_bucket_policy_is_refused_with_the_reason() {
    let message = refusal(minimal_with(&json!({"bucket_policy_enabled": true})));
    assert!(message.contains("bucket_policy_enabled") && message.contains("one image size"), "{message}");
    minimal_with(&json!({"bucket_policy_enabled": false})).unwrap();
}

#[test]
fn keys_without_meaning_are_accepted_only_when_they_change_nothing() {
    minimal_with(&json!({
        "ema_mode": "OFF", "ema_decay": 0.999, "temp_device": "cpu", "cache_text_embeddings": true, "quantization": null, "blocks_to_swap": 0,
        "layer_offload_fraction": 0.0, "per_layer_lr": {}, "save_full_model": true, "distributed": {"enabled": false, "backend": "nccl"},
        "memory": {"enable_activation_offloading": false, "quantization": "none", "stagehand": {"policy": "static", "copy_stream_priority": -1}},
        "sample": {"enabled": false, "prompts": ["a cat"], "num_inference_steps": 20}, "adapter": {"dropout": 0.0, "multiplier": 1.0}
    }))
    .unwrap();
    for (key, value) in [
        ("ema_mode", json!({"ema_mode": "gpu"})),
        ("memory.gradient_checkpointing", json!({"memory": {"gradient_checkpointing": "off"}})),
        ("adapter.dropout", json!({"adapter": {"dropout": 0.1}})),
        ("sample.enabled", json!({"sample": {"enabled": true}})),
        ("memory.stagehand.block_pattern", json!({"memory": {"stagehand": {"block_pattern": "x"}}})),
        ("optimizer.optimizer", json!({"optimizer": {"optimizer": "adamw8bit"}})),
        ("training_method", json!({"training_method": "fine_tune"})),
        ("model_type", json!({"model_type": "flux_2_klein_9b"})),
    ] {
        let message = refusal(minimal_with(&value));
        assert!(message.contains(&format!("`{key}`")) && message.contains("found"), "{message}");
    }
}

#[test]
fn a_text_encoders_slab_is_off_unless_it_is_named() {
    let given = |path: &str| minimal_with(&json!({"model": {"text_encoder_slab_path": path}}));
    assert_eq!(minimal_with(&json!({})).unwrap().model.text_encoder_slab_path, None);
    assert_eq!(given("a/text.safetensors").unwrap().model.text_encoder_slab_path, Some("a/text.safetensors".into()));
    assert!(refusal(given("a/text")).contains("must end in .safetensors"));
    let message = refusal(minimal_with(&json!({"model": {"text_encoder_slab": "x"}})));
    assert!(message.contains("did you mean `text_encoder_slab_path`?"), "{message}");
    let set = Overrides { set: vec!["model.text_encoder_slab_path=t.safetensors".into()], ..Overrides::default() };
    assert_eq!(load(&case_study_with_data(), &set).unwrap().model.text_encoder_slab_path, Some("t.safetensors".into()));
}

#[test]
fn set_changes_any_key_before_it_is_checked() {
    let set = |all: &[&str]| Overrides { set: all.iter().map(|s| s.to_string()).collect(), ..Overrides::default() };
    let c = load(
        CASE_STUDY,
        &set(&[
            "data.concepts=[\"a\",\"b\"]",
            "data.concepts.1=c",
            "memory.strategy=resident",
            "adapter.rank=4",
            "name=x=y",
            "train_device=cpu",
        ]),
    )
    .unwrap();
    assert_eq!(c.data.concepts.iter().map(|c| c.path.clone()).collect::<Vec<_>>(), [PathBuf::from("a"), "c".into()]);
    assert_eq!((c.memory.strategy, c.adapter.rank, c.name.as_str()), (MemoryStrategy::Resident, 4, "x=y"));
    assert_eq!((c.device, c.memory.stagehand.form), (DeviceKind::Cpu, PayloadForm::Bf16));
    for bad in ["adapter.rank", "=1", "resolution.x=1", "data.concepts.7=x"] {
        let message = refusal(load(&case_study_with_data(), &set(&[bad])));
        assert!(message.contains("--set"), "{message}");
    }
    assert!(refusal(load(CASE_STUDY, &set(&["memory.stagehand.pool=1"]))).contains("unknown key `pool`"));
}

#[test]
fn flags_come_before_every_spelling_in_the_file() {
    let text = r#"{"model": {"path": "m"}, "concepts": ["a"], "max_train_steps": 5, "resume_from": "x"}"#;
    let overrides = Overrides { data: Some("d".into()), steps: Some(9), resume: Some("never".into()), set: Vec::new() };
    let c = load(text, &overrides).unwrap();
    assert_eq!((c.data.concepts[0].path.as_path(), c.max_steps, c.checkpoint.resume), (Path::new("d"), 9, Resume::Never));
    let args: Vec<_> = overrides.to_args().into_iter().map(|a| a.into_string().unwrap()).collect();
    assert_eq!(args, ["--data=d", "--steps=9", "--resume=never"]);
}

#[test]
fn the_ring_is_a_whole_number_of_slots_within_the_pool() {
    let ring = |stagehand: Value| minimal_with(&json!({"memory": {"stagehand": stagehand}}));
    for (stagehand, pool, chunk) in [
        (json!({}), 8192 << 20, 64 << 20),
        (json!({"pinned_pool_mb": 0.5, "ring_chunk_mb": 0.25}), 1 << 19, 1 << 18),
        (json!({"pinned_pool_mb": 1}), 1 << 20, 1 << 17),
        (json!({"pinned_pool_mb": 100, "ring_chunk_mb": 64}), 0, 0),
        (json!({"pinned_pool_mb": 200, "ring_chunk_mb": 64}), 192 << 20, 64 << 20),
        (json!({"pinned_pool_mb": 64, "ring_chunk_mb": 0.001}), 0, 0),
    ] {
        match ring(stagehand.clone()) {
            Ok(c) => {
                let s = &c.memory.stagehand;
                assert_eq!((s.pool_bytes, s.chunk_bytes), (Some(pool), chunk), "{stagehand}");
                assert_eq!(c.memory.strategy, MemoryStrategy::Stagehand);
            }
            Err(e) => assert!(chunk == 0 && e.exit_code() == 64, "{stagehand}: {e}"),
        }
    }
    let auto = ring(json!({"pinned_pool_mb": "auto", "ring_chunk_mb": 2})).unwrap().memory.stagehand;
    assert_eq!((auto.pool_bytes, auto.chunk_bytes), (None, 2 << 20));
    assert!(refusal(ring(json!({"pinned_pool_mb": "all"}))).contains("auto"));
    assert!(refusal(ring(json!({"pinned_pool_mb": 8192, "pinned_slab_mb": 3000}))).contains("pinned_slab_mb"));
    assert!(refusal(ring(json!({"vram_high_watermark_mb": 1000, "vram_low_watermark_mb": 1000}))).contains("low_watermark"));
    assert!(refusal(ring(json!({"squareq_manifest_path": "m.json"}))).contains("squareq_manifest_path"));
    assert_eq!(
        minimal_with(&json!({"memory": {"stagehand": {"stagehand_enabled": false}}})).unwrap().memory.strategy,
        MemoryStrategy::Resident
    );
}

#[test]
fn values_out_of_range_name_the_key() {
    for (key, value) in [
        ("resolution", json!({"resolution": 63})),
        ("batch_size", json!({"batch_size": 0})),
        ("max_steps", json!({"max_steps": -1})),
        ("adapter.rank", json!({"adapter": {"rank": 0}})),
        ("adapter.rank", json!({"adapter": {"rank": "8"}})),
        ("adapter.alpha", json!({"adapter": {"alpha": 0}})),
        ("adapter.target_modules", json!({"adapter": {"target_modules": []}})),
        ("learning_rate", json!({"learning_rate": 0})),
        ("optimizer.beta2", json!({"optimizer": {"beta2": 1.0}})),
        ("train_device", json!({"train_device": "gpu"})),
        ("train_dtype", json!({"train_dtype": "float16"})),
        ("timestep_shift", json!({"timestep_shift": 3.0, "dynamic_timestep_shifting": true})),
        ("model.text_hidden_states", json!({"model": {"text_hidden_states": [1, 2]}})),
        ("name", json!({"name": "../x"})),
    ] {
        let message = refusal(minimal_with(&value));
        assert!(message.contains(&format!("`{key}`")), "{key}: {message}");
    }
    let c = minimal_with(&json!({"resolution": 500, "timestep_shift": 3.0, "train_device": "cuda:3"})).unwrap();
    assert_eq!((c.resolution, c.device), (496, DeviceKind::Cuda(3)));
    assert_eq!((c.timestep.shift, c.timestep.dynamic_shift), (3.0, false));
    assert!(c.notices.iter().any(|n| n.contains("496")), "{:?}", c.notices);
}

#[test]
fn yaml_and_broken_json_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let yaml = folder.path().join("c.yaml");
    std::fs::write(&yaml, "model: x").unwrap();
    assert!(refusal(Config::load(&yaml, &Overrides::default())).contains("YAML"));
    assert!(refusal(load("{\"model\": ", &Overrides::default())).contains("not valid JSON"));
    assert!(refusal(load("[]", &Overrides::default())).contains("object"));
    let missing = Config::load(&folder.path().join("none.json"), &Overrides::default()).unwrap_err();
    assert_eq!(missing.exit_code(), 69);
}

proptest::proptest! {
    /// Whatever stands in the file, reading it ends with a configuration or an error, never with a panic.
    #[test]
    fn arbitrary_text_never_panics(text in "\\PC*", key in "[a-z_.]{0,24}", value in "\\PC{0,12}") {
        let _ = load(&text, &Overrides::default());
        let _ = load(CASE_STUDY, &Overrides { set: vec![format!("{key}={value}")], ..Overrides::default() });
    }
}

#[test]
fn another_machine_for_the_encoder_is_one_plain_word_after_another() {
    let with = |section: Value| minimal_with(&json!({ "encoder": section }));
    assert_eq!(minimal_with(&json!({})).unwrap().encoder, None);
    let given =
        with(json!({"host": "user@machine", "port": 2222, "device": "cuda:1", "model_path": "/models/a"})).unwrap().encoder.unwrap();
    assert_eq!((given.host.as_str(), given.command.as_str(), given.port), ("user@machine", "serenity-encoder", Some(2222)));
    assert_eq!((given.device, given.model_path.as_deref()), (Some(DeviceKind::Cuda(1)), Some("/models/a")));
    for bad in [
        json!({}),
        json!({"host": "-oProxyCommand=evil"}),
        json!({"host": "a b"}),
        json!({"host": ""}),
        json!({"host": "m", "command": "encoder; rm"}),
        json!({"host": "m", "command": "encoder --trace x"}),
        json!({"host": "m", "port": 0}),
        json!({"host": "m", "identity_file": "a\"b"}),
        json!({"host": "m", "hots": "x"}),
    ] {
        assert_eq!(with(bad.clone()).unwrap_err().exit_code(), 64, "{bad}");
    }
}
