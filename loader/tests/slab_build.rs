//! Building: byte for byte the original builder's slab, from either naming; refusals; taking up a broken-off build.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod slab_common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use serenity_loader::slab_tool::build::{self, BuildOptions};
use serenity_loader::slab_tool::repack::repack;
use serenity_loader::slab_tool::synth::{Preset, SynthOptions, synth};
use serenity_protocol::checkpoint::Checkpoint;
use serenity_protocol::model_path::{TransformerSource, resolve_path};
use serenity_protocol::slab::Slab;
use slab_common::{RawSlab, build_into, golden, process};

fn copy_transformer(folder: &Path) -> std::path::PathBuf {
    let to = folder.join("transformer");
    std::fs::create_dir_all(&to).unwrap();
    for name in ["config.json", "diffusion_pytorch_model.safetensors"] {
        std::fs::copy(golden("model/transformer").join(name), to.join(name)).unwrap();
    }
    to.join("diffusion_pytorch_model.safetensors")
}

fn assert_same_files(a: &Path, b: &Path, names: &[&str]) {
    for name in names {
        assert!(std::fs::read(a.join(name)).unwrap() == std::fs::read(b.join(name)).unwrap(), "{name} differs");
    }
}

const FILES: [&str; 3] = ["slab.safetensors", "slab.manifest.json", "slab.other.safetensors"];

#[test]
fn equals_the_original_builders_slab() {
    let folder = tempfile::tempdir().unwrap();
    let report = build_into(folder.path(), &golden("model"));
    assert_eq!(report.layers, 41);
    let mut ours = RawSlab::load(&report.files.slab, &report.files.manifest);
    let mut original = RawSlab::golden();
    for tensor in original.tensors.clone() {
        assert_eq!(*ours.tensor(&tensor.name), tensor);
    }
    assert!(ours.tensors.iter().all(|t| t.name.starts_with("__pad__.") || original.tensors.contains(t)));
    assert!(ours.manifest.as_object_mut().unwrap().remove("serenity").is_some());
    // Compared as text: values, types and the order of the fields.
    assert_eq!(serde_json::to_string_pretty(&ours.manifest).unwrap(), serde_json::to_string_pretty(&original.manifest).unwrap());
    original.manifest["layer_count"] = json!(0);
    assert_ne!(ours.manifest, original.manifest);
}

#[test]
fn both_namings_give_the_same_slab() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    build_into(a.path(), &golden("model/transformer"));
    build_into(b.path(), &golden("model/flux2-bfl.safetensors"));
    assert_same_files(a.path(), b.path(), &FILES);
    let left: Vec<_> = std::fs::read_dir(a.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(left.len(), 3, "left behind: {left:?}");
}

#[test]
fn the_original_slab_repacked_is_the_slab_that_we_build() {
    let (repacked, built) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (slab, manifest) = slab_common::golden_slab_paths();
    let model = golden("model");
    let report =
        repack(&Slab::open(&slab, &manifest).unwrap(), model.to_str().unwrap(), &repacked.path().join("slab"), &process()).unwrap();
    build_into(built.path(), &model);
    assert_same_files(repacked.path(), built.path(), &FILES);
    // Onto itself it would destroy what it reads.
    let slab = Slab::open(&report.files.slab, &report.files.manifest).unwrap();
    let onto_itself = repack(&slab, model.to_str().unwrap(), &repacked.path().join("slab"), &process()).unwrap_err();
    assert_eq!(onto_itself.exit_code(), 64);
    assert_same_files(repacked.path(), built.path(), &FILES);
}

#[test]
fn blocks_are_contiguous_and_aligned() {
    let folder = tempfile::tempdir().unwrap();
    for (pack_k, blocks_only) in [(64, false), (1, false), (48, true)] {
        let options =
            BuildOptions { pack_k, blocks_only, ..BuildOptions::new(golden("model").to_str().unwrap(), folder.path().join("slab")) };
        let report = build::build(&options, &process()).unwrap();
        let slab = Slab::open(&report.files.slab, &report.files.manifest).unwrap();
        let geometry = slab.geometry().unwrap().clone();
        slab.check_model(&geometry).unwrap();
        assert_eq!(slab.layers().len(), if blocks_only { 30 } else { 41 });
        assert_eq!(slab.header().data_start % 4096, 0);
        for block in geometry.blocks() {
            let linears = geometry.block_linears(block);
            let layers: Vec<_> = linears.iter().map(|l| slab.layer(&l.name).unwrap()).collect();
            assert_eq!(layers[0].qweight.start % 4096, 0);
            assert!(layers.windows(2).all(|w| w[0].qweight.end == w[1].qweight.start));
            // Codes, scales and zero points of the block lie together, the floats aligned.
            let end = layers.last().unwrap().qweight.end;
            assert!(layers[0].scale.start - end < 64);
            assert!(layers.windows(2).all(|w| w[0].scale.end == w[1].scale.start && w[0].zero_point.end == w[1].zero_point.start));
            assert_eq!(layers.last().unwrap().scale.end, layers[0].zero_point.start);
            assert!(layers.iter().all(|l| l.scale.start % 4 == 0 && l.zero_point.start % 4 == 0));
        }
        assert_eq!(slab.file_bytes() % 4096, 0);
        assert!(slab.pages().unwrap().xxh3.len() > 4);
    }
}

#[test]
fn the_companion_holds_everything_else_in_bf16() {
    let folder = tempfile::tempdir().unwrap();
    let report = build_into(folder.path(), &golden("model"));
    let slab = Slab::open(&report.files.slab, &report.files.manifest).unwrap();
    let companion = Checkpoint::open(slab.companion().unwrap()).unwrap();
    let source = TransformerSource::open(&resolve_path(golden("model").to_str().unwrap()).unwrap()).unwrap();
    let geometry = source.geometry();
    let block_linears: Vec<String> =
        geometry.blocks().flat_map(|b| geometry.block_linears(b)).map(|l| format!("{}.weight", l.name)).collect();
    let expected: Vec<_> = geometry.all_tensors().into_iter().filter(|(name, _)| !block_linears.contains(name)).collect();
    assert_eq!(companion.names().count(), expected.len());
    for (name, shape) in expected {
        let stored = companion.tensor_of_shape(&name, &shape).unwrap();
        assert_eq!(stored.dtype, safetensors::Dtype::BF16);
        let original = source.tensor_f32(&name, &shape).unwrap();
        assert!(
            stored.to_f32().unwrap().iter().zip(original).all(|(s, o)| s.to_bits() == half::bf16::from_f32(o).to_f32().to_bits()),
            "{name}"
        );
    }
}

#[test]
fn a_value_that_is_no_number_is_refused_by_name() {
    for (tensor, expected) in [
        ("single_transformer_blocks.1.attn.to_out.weight", "at row 1, column 2"),
        ("proj_out.weight", "at row 4, column 2"),
        ("transformer_blocks.0.attn.norm_k.weight", "at row 0, column 2"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let file = copy_transformer(folder.path());
        let place = Checkpoint::open(&file).unwrap().place(tensor).unwrap();
        // Element 258 of these shapes: [64, 256], [16, 64], and element 2 of a norm.
        let element = if place.shape.len() == 1 { 2 } else { 258 };
        File::options().write(true).open(&file).unwrap().write_all_at(&f32::NAN.to_le_bytes(), place.range.start + 4 * element).unwrap();
        let options = BuildOptions::new(folder.path().to_str().unwrap(), folder.path().join("slab"));
        let error = build::build(&options, &process()).unwrap_err();
        assert_eq!(error.exit_code(), 65);
        assert!(error.to_string().contains(&format!("'{tensor}'")) && error.to_string().contains(expected), "{error}");
        assert!(!folder.path().join("slab.manifest.json").exists() && !folder.path().join("slab.safetensors").exists());
    }
}

#[test]
fn incomplete_or_unreadable_checkpoints_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let file = copy_transformer(folder.path());
    let bytes = std::fs::read(&file).unwrap();
    let attempt = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        build::build(&BuildOptions::new(folder.path().to_str().unwrap(), folder.path().join("slab")), &process()).unwrap_err()
    };
    let edited = |from: &str, to: &str| {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
        assert!(header.contains(from));
        [&bytes[..8], header.replacen(from, to, 1).as_bytes(), &bytes[8 + length..]].concat()
    };
    let missing = attempt(&edited("\"transformer_blocks.1.attn.to_q.weight\"", "\"transformer_blocks.1.attn.to_x.weight\""));
    assert!(missing.exit_code() == 65 && missing.to_string().contains("'transformer_blocks.1.attn.to_q.weight' is missing"), "{missing}");
    let integer = attempt(&edited("\"proj_out.weight\":{\"dtype\":\"F32\"", "\"proj_out.weight\":{\"dtype\":\"I32\""));
    assert!(integer.exit_code() == 65 && integer.to_string().contains("proj_out.weight"), "{integer}");
    let cut = attempt(&bytes[..bytes.len() - 1]);
    assert_eq!(cut.exit_code(), 65, "{cut}");
    let none = build::build(&BuildOptions::new("/nonexistent/model", folder.path().join("slab")), &process()).unwrap_err();
    assert_eq!(none.exit_code(), 69);
    let no_name = build::build(&BuildOptions::new(golden("model").to_str().unwrap(), "/tmp/"), &process()).unwrap_err();
    assert_eq!(no_name.exit_code(), 64);
}

/// A build that breaks off in a late block (a NaN, taken away again without a trace) goes on behind the blocks that are done.
#[test]
fn a_broken_off_build_is_taken_up_and_ends_with_the_same_bytes() {
    let (folder, reference) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    build_into(reference.path(), &golden("model"));
    let path = copy_transformer(folder.path());
    let place = Checkpoint::open(&path).unwrap().place("single_transformer_blocks.2.attn.to_out.weight").unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    let mut honest = [0; 4];
    file.read_exact_at(&mut honest, place.range.start).unwrap();
    let put = |bytes: [u8; 4]| {
        file.write_all_at(&bytes, place.range.start).unwrap();
        file.set_modified(modified).unwrap();
    };
    let options = BuildOptions { journal_bytes: 4096, ..BuildOptions::new(folder.path().to_str().unwrap(), folder.path().join("slab")) };
    put(f32::INFINITY.to_le_bytes());
    build::build(&options, &process()).unwrap_err();
    assert!(folder.path().join("slab.build.partial").exists());
    put(honest);
    let report = build::build(&options, &process()).unwrap();
    assert!(report.resumed_bytes > 200_000, "resumed at {}", report.resumed_bytes);
    assert_same_files(folder.path(), reference.path(), &FILES);
    // Another source under the same names is not mixed in.
    put(f32::INFINITY.to_le_bytes());
    build::build(&options, &process()).unwrap_err();
    put(honest);
    file.set_modified(modified + Duration::from_secs(5)).unwrap();
    let report = build::build(&options, &process()).unwrap();
    assert_eq!(report.resumed_bytes, 0);
    assert_same_files(folder.path(), reference.path(), &FILES);
}

#[test]
fn kill_9_at_any_moment_leaves_a_build_that_can_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    synth(&SynthOptions { preset: Preset::Tiny, output: model.clone(), seed: 3 }, &process()).unwrap();
    let (killed, reference) = (folder.path().join("killed"), folder.path().join("reference"));
    std::fs::create_dir_all(&reference).unwrap();
    build_into(&reference, &model);
    let mut command = Command::new(env!("CARGO_BIN_EXE_serenity-slab"));
    command.args(["build", "--json", "--journal-bytes", "4096", "--model"]).arg(&model).arg("--output").arg(killed.join("slab"));
    command.stderr(Stdio::null()).stdout(Stdio::null());
    for attempt in 0..12u64 {
        let mut child = command.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(attempt * attempt));
        child.kill().unwrap();
        child.wait().unwrap();
        // What has a manifest is whole.
        if killed.join("slab.manifest.json").exists() {
            assert_same_files(&killed, &reference, &FILES);
        }
    }
    let output = command.stdout(Stdio::piped()).output().unwrap();
    assert!(output.status.success());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["layers"], json!(43));
    assert_same_files(&killed, &reference, &FILES);
}

#[test]
fn a_second_build_of_the_same_files_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let held = File::create(folder.path().join("slab.build.partial.lock")).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let options = BuildOptions::new(golden("model").to_str().unwrap(), folder.path().join("slab"));
    let error = build::build(&options, &process()).unwrap_err();
    assert_eq!(error.exit_code(), 69);
    assert!(error.to_string().contains("another process"), "{error}");
    drop(held);
    build::build(&options, &process()).unwrap();
}

#[test]
fn a_request_to_stop_ends_the_build_with_try_again() {
    let folder = tempfile::tempdir().unwrap();
    let process = process();
    process.stop_flag().store(true, std::sync::atomic::Ordering::Relaxed); // Relaxed: one thread.
    let options = BuildOptions::new(golden("model").to_str().unwrap(), folder.path().join("slab"));
    assert_eq!(build::build(&options, &process).unwrap_err().exit_code(), 75);
    assert!(!folder.path().join("slab.manifest.json").exists());
}
