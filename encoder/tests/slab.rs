//! Encoding from an INT8 slab in place of the checkpoint: what is computed, what names the entries, what is refused.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use lab::{Dir, counts};
use serenity_encoder::run::{RunOptions, Summary, run};
use serenity_encoder::text::{Encoded, TextEncoder, compare};
use serenity_encoder::tokenizer::Tokens;
use serenity_loader::slab_tool::build::{BuildOptions, Component, build};
use serenity_protocol::checkpoint::Checkpoint;
use serenity_protocol::config::DeviceKind;
use serenity_protocol::message::Role;
use serenity_protocol::process::Process;
use serenity_protocol::slab::text_encoder::{EMBEDDING, TextModel, TextSlab};
use serenity_protocol::{Error, Result};

/// Hidden states of the golden encoder, which has six layers, that its slab of four layers has.
const STATES: [usize; 3] = [0, 2, 4];

/// Builds the slab of `model` as `folder/NAME.safetensors`.
fn slab_of(model: &Path, folder: &Path, name: &str, component: Component, layers: Option<usize>) -> PathBuf {
    let options = BuildOptions { component, layers, ..BuildOptions::new(model.to_str().unwrap(), folder.join(name)) };
    build(&options, &Process::detached(Role::Slab)).unwrap().files.slab
}

/// A folder with the golden model and the slab of its text encoder.
fn with_slab(captions: &[&str]) -> (Dir, PathBuf) {
    let dir = Dir::new(captions);
    let slab = slab_of(&dir.path("model"), &dir.path("slab"), "text", Component::TextEncoder, None);
    (dir, slab)
}

fn key(slab: &Path) -> String {
    format!("model.text_encoder_slab_path={}", slab.display())
}

fn run_with(dir: &Dir, cache: &str, slab: &Path) -> Result<Summary> {
    run(&dir.config(cache, &[&key(slab)]), RunOptions::default(), &Process::detached(Role::Encoder))
}

fn refusal(dir: &Dir, slab: &Path) -> (u8, String) {
    let error: Error = run_with(dir, "refused", slab).unwrap_err();
    (error.exit_code(), error.to_string())
}

fn remove_weights(folder: &Path) {
    for file in std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).filter(|f| f.to_string_lossy().contains(".safetensors")) {
        std::fs::remove_file(file).unwrap();
    }
}

/// Lengths that fill packs, overflow them, and exceed one alone.
fn captions() -> Vec<Tokens> {
    let lengths = [1, 2, 30, 127, 128, 129, 400, 513, 1025, 64];
    let id = |i: usize, j: usize| (((i * 7919 + j * 104_729) * 31) % 512) as u32;
    lengths.iter().enumerate().map(|(i, n)| Tokens { ids: (0..*n).map(|j| id(i, j)).collect(), cut: 0 }).collect()
}

fn encode(model: TextModel, captions: &[Tokens]) -> Encoded {
    let encoder = TextEncoder::open(model, Device::Cpu, DType::F32).unwrap();
    encoder.encode(captions, 11, STATES, 1100, DType::F32, &mut |_, _| Ok(())).unwrap()
}

fn bits(rows: &Tensor) -> Vec<u32> {
    rows.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn all_bits(encoded: &Encoded) -> Vec<Vec<u32>> {
    encoded.captions.iter().chain([&encoded.pad]).map(|e| bits(&e.rows)).collect()
}

/// Writes the checkpoint whose weights are the slab's values, computed here from the rule: code times scale, rounded to bf16.
fn dequantised_checkpoint(slab: &TextSlab, config: &Path, folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::copy(config, folder.join("config.json")).unwrap();
    let file = File::open(slab.slab().path()).unwrap();
    let bytes = |range: &Range<u64>| {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        file.read_exact_at(&mut bytes, range.start).unwrap();
        bytes
    };
    let tensor = |values: Vec<bf16>, shape: &[usize]| Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    let mut tensors = HashMap::new();
    for linear in (0..slab.shape().layers).flat_map(|layer| slab.layer(layer).unwrap()) {
        let scales: Vec<f32> = bytes(&linear.scale).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let codes = bytes(&linear.qweight);
        let value =
            |row: usize, column: usize| bf16::from_f32(f32::from(codes[row * linear.padded_in + column].cast_signed()) * scales[row]);
        let values = (0..linear.out_features).flat_map(|row| (0..linear.in_features).map(move |column| (row, column)));
        let values = values.map(|(row, column)| value(row, column)).collect();
        tensors.insert(format!("model.{}.weight", linear.name), tensor(values, &[linear.out_features, linear.in_features]));
    }
    let companion = Checkpoint::open(slab.companion()).unwrap();
    for (name, shape) in slab.shape().companion_tensors() {
        let values = companion.tensor(&name).unwrap().to_f32().unwrap().into_iter().map(bf16::from_f32).collect();
        tensors.insert(format!("model.{name}"), tensor(values, &shape));
    }
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
}

#[test]
fn a_slab_encodes_as_the_checkpoint_of_its_values_bit_for_bit() {
    let (dir, path) = with_slab(&[]);
    let folder = dir.path("model/text_encoder");
    let slab = TextSlab::open_beside(&path, Some(&folder)).unwrap();
    dequantised_checkpoint(&slab, &folder.join("config.json"), &dir.path("dequantised"));
    let captions = captions();
    let found = encode(TextModel::Slab { slab: &path, folder: Some(&folder) }, &captions);
    let expected = encode(TextModel::from(dir.path("dequantised").as_path()), &captions);
    assert!(all_bits(&found) == all_bits(&expected));
    assert!(found.times.weight_bytes < expected.times.weight_bytes);
    // The geometry is in the slab.
    assert!(all_bits(&encode(TextModel::Slab { slab: &path, folder: None }, &captions)) == all_bits(&expected));
    // And each caption alone is what it is among others.
    let together = all_bits(&found);
    for (index, caption) in captions.iter().enumerate() {
        let alone = encode(TextModel::Slab { slab: &path, folder: None }, std::slice::from_ref(caption));
        assert!(all_bits(&alone)[0] == together[index], "caption {index} of {} tokens", caption.ids.len());
    }
}

#[test]
fn the_error_of_rows_is_small_and_not_zero() {
    let (dir, slab) = with_slab(&[]);
    let options = compare::Options { states: None, captions: 8, tokens: 60, device: DeviceKind::Cpu };
    let report = compare::run(&dir.path("model/text_encoder"), &slab, &options, &Process::detached(Role::Encoder)).unwrap();
    assert_eq!(report.states.iter().map(|s| s.state).collect::<Vec<_>>(), [1, 3, 4]);
    for s in &report.states {
        assert!(s.relative_norm > 1e-3 && s.relative_norm < 0.05, "{s:?}");
        assert!(s.cosine > 0.999 && s.cosine_worst_token > 0.99 && s.cosine_worst_token <= s.cosine, "{s:?}");
        assert!(s.largest > 0.0 && s.largest < 0.1 * s.magnitude && s.relative_norm_worst_token >= s.relative_norm, "{s:?}");
    }
    let (folder, path) = (dir.path("model/text_encoder"), slab.display().to_string());
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_serenity-encoder"));
    command.args(["compare-slab", "--text-encoder", folder.to_str().unwrap(), "--slab", &path]);
    let output = command.args(["--captions", "8", "--tokens", "60", "--json"]).output().unwrap();
    let printed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for (printed, state) in printed["states"].as_array().unwrap().iter().zip(&report.states) {
        let norm = printed["relative_norm"].as_f64().unwrap();
        assert!(printed["state"] == state.state && (norm / state.relative_norm - 1.0).abs() < 1e-9, "{printed}");
    }
    assert_eq!(command.args(["--states", "1,2"]).output().unwrap().status.code(), Some(64));
    // State 0 are the embeddings, which the companion has in bf16.
    let options = compare::Options { states: Some([0, 1, 2]), ..options };
    let report = compare::run(&dir.path("model/text_encoder"), &slab, &options, &Process::detached(Role::Encoder)).unwrap();
    assert!(report.states[0].relative_norm < 4e-3, "{:?}", report.states[0]);
}

#[test]
fn entries_are_named_by_the_weights_that_made_them() {
    let (dir, slab) = with_slab(&["one", "two"]);
    let plan = |set: &[&str]| dir.plan(&dir.config("cache", set));
    let (float, int8) = (plan(&[]), plan(&[&key(&slab)]));
    assert!(int8.identities[0].starts_with("int8 slab ") && float.identities[1..] == int8.identities[1..]);
    let keys = |p: &serenity_protocol::cache::CachePlan| p.text.iter().map(|t| t.key).collect::<Vec<_>>();
    assert!(keys(&float).iter().all(|k| !keys(&int8).contains(k)));
    assert!(float.latents == int8.latents);
    // By content: built again elsewhere, and whatever has become of the checkpoint.
    let again = slab_of(&dir.path("model"), &dir.path("elsewhere"), "again", Component::TextEncoder, None);
    remove_weights(&dir.path("model/text_encoder"));
    assert_eq!(keys(&plan(&[&key(&again)])), keys(&int8));
    assert_eq!(keys(&plan(&[&key(&slab)])), keys(&int8));
}

#[test]
fn a_run_of_the_program_fills_a_cache_without_the_checkpoint() {
    let (dir, slab) = with_slab(&["a cat", "東京 🚀"]);
    dir.run("float").unwrap();
    let checkpoint = dir.path("model/text_encoder");
    remove_weights(&checkpoint);
    let config = serde_json::json!({
        "model": {"path": dir.path("model"), "max_sequence_length": 96, "text_encoder_slab_path": slab},
        "data": {"concepts": [{"path": dir.path("images")}], "cache_dir": dir.path("cache")},
        "resolution": 64, "output_dir": dir.path("out"), "train_device": "cpu",
    });
    std::fs::write(dir.path("config.json"), config.to_string()).unwrap();
    let program = |set: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_serenity-encoder"));
        let output = command.arg("--config").arg(dir.path("config.json")).args(set).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(program(&[]).0, Some(0));
    let (made, float) = (dir.entries("cache"), dir.entries("float"));
    assert_eq!(made.len(), 4);
    assert_eq!(made.keys().filter(|name| float.contains_key(*name)).count(), 2, "the latents and no embedding");
    assert!(made.iter().all(|(name, bytes)| float.get(name).is_none_or(|f| f == bytes)));
    assert_eq!(counts(run_with(&dir, "cache", &slab).unwrap()), (0, 0, 4));

    // The slab may go when the cache is full, as a checkpoint may; what is missing then cannot be made.
    std::fs::rename(&slab, dir.path("away")).unwrap();
    assert_eq!(counts(run_with(&dir, "cache", &slab).unwrap()), (0, 0, 4));
    dir.add(2, "new");
    let (code, message) = program(&[]);
    assert!(code == Some(69) && message.contains("text.safetensors") && message.contains("--component text_encoder"), "{message}");
    std::fs::rename(dir.path("away"), &slab).unwrap();

    // Not even the folder is needed, and --set gives the key as well.
    std::fs::remove_dir_all(&checkpoint).unwrap();
    assert_eq!(program(&["--set", "model.text_encoder_slab_path=null"]).0, Some(69));
    assert_eq!(program(&["--set", &format!("data.cache_dir={}", dir.path("other").display()), "--set", &key(&slab)]).0, Some(0));
    assert!(made.iter().all(|(name, bytes)| dir.entries("other").get(name) == Some(bytes)));
}

#[test]
fn a_flipped_byte_anywhere_is_an_error_that_names_its_place() {
    let (dir, path) = with_slab(&["one"]);
    let slab = TextSlab::open(&path, &path.with_extension("manifest.json")).unwrap();
    let companion = Checkpoint::open(slab.companion()).unwrap();
    let linear = slab.layer(2).unwrap()[5].clone();
    assert!(linear.padded_in > linear.in_features);
    let norm = companion.place("layers.3.post_attention_layernorm.weight").unwrap();
    let table = companion.place(EMBEDDING).unwrap();
    let last = |range: &Range<u64>| range.end - 1;
    for (what, file, at) in [
        ("the codes of", &path, linear.qweight.start),
        ("the codes of", &path, last(&linear.qweight)), // padding
        // The lowest bits of a scale, which stays a positive number.
        ("the scales of", &path, linear.scale.start + 4),
        ("layers.3.post_attention_layernorm", &norm.file, last(&norm.range)),
        // A row of the table that no caption uses is as good as any.
        ("the embeddings", &table.file, last(&table.range)),
    ] {
        let whole = std::fs::read(file).unwrap();
        let mut bytes = whole.clone();
        bytes[at as usize] ^= 1;
        std::fs::write(file, &bytes).unwrap();
        let (code, message) = refusal(&dir, &path);
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(code == 65 && message.contains(what) && message.contains(name) && message.contains("offset"), "{what}: {message}");
        assert!(dir.entries("refused").keys().all(|name| name.starts_with("latent")));
        std::fs::write(file, &whole).unwrap();
    }
    run_with(&dir, "refused", &path).unwrap();
}

#[test]
fn a_slab_that_does_not_fit_is_refused_with_what_to_do() {
    let (dir, slab) = with_slab(&["one"]);
    let says = |(code, message): (u8, String), expected: u8, words: &[&str]| {
        assert!(code == expected && words.iter().all(|w| message.contains(w)), "expected {expected} {words:?}: {code} {message}");
    };
    let transformer = slab_of(&dir.path("model"), &dir.path("slab"), "transformer", Component::Transformer, None);
    says(refusal(&dir, &transformer), 65, &["transformer.safetensors", "--component text_encoder"]);
    let short = slab_of(&dir.path("model"), &dir.path("slab"), "short", Component::TextEncoder, Some(3));
    says(refusal(&dir, &short), 64, &["short.safetensors", "--layers"]);
    says(refusal(&dir, &dir.path("slab/none.safetensors")), 69, &["none.safetensors", "serenity-slab build"]);

    let config = dir.path("model/text_encoder/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"intermediate_size\": 96", "\"intermediate_size\": 128")).unwrap();
    says(refusal(&dir, &slab), 65, &["text.safetensors", "config.json", "intermediate: 128", "intermediate: 96"]);
    std::fs::write(&config, text).unwrap();

    let companion = dir.path("slab/text.other.safetensors");
    let whole = std::fs::read(&companion).unwrap();
    std::fs::write(&companion, &whole[..whole.len() - 1]).unwrap();
    says(refusal(&dir, &slab), 65, &["text.other.safetensors", "length"]);
    std::fs::remove_file(&companion).unwrap();
    says(refusal(&dir, &slab), 69, &["companion"]);
    std::fs::write(&companion, whole).unwrap();
    std::fs::remove_file(dir.path("slab/text.manifest.json")).unwrap();
    says(refusal(&dir, &slab), 69, &["text.manifest.json"]);
}
