//! Damage by the thousand: whatever byte changes, wherever a file is cut, somebody says so, and nobody panics.
//!
//! A part runs by default; `SERENITY_CAMPAIGN=full` runs all: 10,000 corruptions, 500 truncations, 100 kills.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod slab_common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use serde_json::{Value, json};
use serenity_loader::slab_tool::verify::verify;
use serenity_protocol::slab::Slab;
use serenity_protocol::slab::header::Header;
use slab_common::models::{geometry, random_bf16, scattered, write_folder};
use slab_common::{build_into, process};

fn count(full: u64, part: u64) -> u64 {
    if std::env::var("SERENITY_CAMPAIGN").is_ok_and(|v| v == "full") { full } else { part }
}

/// A slab of one single block, in a folder of its own.
struct Small {
    _folder: tempfile::TempDir,
    slab: PathBuf,
    manifest: PathBuf,
}

impl Small {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let g = geometry(0, 1, 2, 16, 16, 48);
        let model = write_folder(&folder.path().join("model"), &g, &random_bf16(&g));
        let files = build_into(folder.path(), &model).files;
        Self { _folder: folder, slab: files.slab, manifest: files.manifest }
    }

    /// Everything that is found wrong, by opening and by verifying.
    fn complaint(&self) -> Option<String> {
        let found = Slab::open(&self.slab, &self.manifest).and_then(|slab| verify(&slab, &process())).and_then(|r| r.into_result());
        let error = found.err()?;
        assert_eq!(error.exit_code(), 65, "{error}");
        Some(error.to_string())
    }
}

/// Runs `each` with every index below `n`, every thread on a slab of its own; each call must leave it as it was.
fn on_many(n: u64, each: impl Fn(&Small, u64) + Sync) {
    let threads = rayon::current_num_threads() as u64;
    (0..threads).into_par_iter().for_each(|thread| {
        let small = Small::new();
        assert_eq!(small.complaint(), None);
        (thread..n).step_by(threads as usize).for_each(|i| each(&small, i));
        assert_eq!(small.complaint(), None);
    });
}

fn flip(file: &File, offset: u64, mask: u8) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ mask], offset).unwrap();
}

fn open_both_ways(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn every_corrupted_byte_is_found_and_its_tensor_named() {
    on_many(count(10_000, 600), |small, i| {
        let header = Header::read(&small.slab).unwrap();
        let offset = scattered(i, header.file_bytes);
        // Any other value of the byte.
        let mask = 1 + scattered(i + (1 << 40), 255) as u8;
        let file = open_both_ways(&small.slab);
        flip(&file, offset, mask);
        let complaint = small.complaint().unwrap_or_else(|| panic!("byte {offset} ^ {mask:#x} went unseen"));
        assert!(complaint.contains("offset"), "{complaint}");
        if let Some(tensor) = header.tensor_at(offset) {
            let layer = tensor.name.rsplit_once('.').unwrap().0;
            assert!(
                complaint.contains(&tensor.name) || !tensor.name.starts_with("__pad__") && complaint.contains(layer),
                "{tensor:?}: {complaint}"
            );
        }
        flip(&file, offset, mask);
    });
}

#[test]
fn every_flipped_bit_of_the_header_is_found_at_open() {
    let bits = 8 * Header::read(&Small::new().slab).unwrap().data_start;
    let step = count(1, 7);
    on_many(bits.div_ceil(step), |small, i| {
        let (byte, mask) = (i * step / 8, 1 << (i * step % 8));
        let file = open_both_ways(&small.slab);
        flip(&file, byte, mask);
        let error = Slab::open(&small.slab, &small.manifest).expect_err("a flipped bit of the header went unseen");
        assert!(error.exit_code() == 65 && error.to_string().contains("slab.safetensors"), "{error}");
        flip(&file, byte, mask);
    });
}

#[test]
fn every_flipped_bit_of_the_manifest_is_found_at_open() {
    let bits = 8 * std::fs::metadata(Small::new().manifest).unwrap().len();
    let step = count(1, 7);
    on_many(bits.div_ceil(step), |small, i| {
        let (byte, mask) = (i * step / 8, 1 << (i * step % 8));
        let file = open_both_ways(&small.manifest);
        flip(&file, byte, mask);
        let error = Slab::open(&small.slab, &small.manifest).expect_err("a flipped bit of the manifest went unseen");
        assert!(error.exit_code() == 65 && error.to_string().contains("slab.manifest.json"), "{error}");
        flip(&file, byte, mask);
    });
}

#[test]
fn every_truncation_is_found() {
    on_many(count(500, 60), |small, i| {
        for (path, name) in [(&small.slab, "slab.safetensors"), (&small.manifest, "slab.manifest.json")] {
            let bytes = std::fs::read(path).unwrap();
            let cut = scattered(i, bytes.len() as u64);
            std::fs::write(path, &bytes[..cut as usize]).unwrap();
            let complaint = small.complaint().unwrap_or_else(|| panic!("{name} cut at {cut} went unseen"));
            assert!(complaint.contains(name), "{complaint}");
            std::fs::write(path, &bytes).unwrap();
        }
    });
}

/// The text of a changed manifest with the checksum that it should have.
fn sealed(manifest: &Value) -> String {
    let text = serde_json::to_string_pretty(manifest).unwrap();
    let key = "\"manifest_xxh3\": \"";
    let Some(at) = text.find(key).map(|at| at + key.len()) else { return text };
    let zeroed = format!("{}{}{}", &text[..at], "0".repeat(16), &text[at + 16..]);
    format!("{}{:016x}{}", &text[..at], serenity_protocol::checksum::xxh3_64(zeroed.as_bytes()), &text[at + 16..])
}

/// A change to an intact manifest, and what the refusal must say.
type Hostile = (&'static str, fn(&mut Value));

/// Manifests that somebody made with care: every checksum is right, what they say is not.
const HOSTILE: &[Hostile] = &[
    ("no plain file name", |m| m["serenity"]["companion"]["file"] = json!("../slab.other.safetensors")),
    ("no plain file name", |m| m["serenity"]["companion"]["file"] = json!("/etc/passwd")),
    ("no plain file name", |m| m["serenity"]["companion"]["file"] = json!("a/b.safetensors")),
    ("no plain file name", |m| m["serenity"]["companion"]["file"] = json!("a\\b.safetensors")),
    ("no plain file name", |m| m["serenity"]["companion"]["file"] = json!("..")),
    ("no plain file name", |m| m["serenity"]["companion"]["file"] = json!(".")),
    ("no plain file name", |m| m["serenity"]["companion"]["file"] = json!("")),
    ("no plain file name", |m| m["serenity"]["companion"]["file"] = json!("a\0b")),
    ("lacks a field", |m| m["serenity"]["companion"]["file"] = json!(["x"])),
    ("lacks a field", |m| m["serenity"]["companion"]["xxh3"] = json!("0123")),
    ("lacks a field", |m| m["serenity"]["companion"]["bytes"] = json!(-1)),
    ("serenity.format", |m| m["serenity"]["format"] = json!(0)),
    ("serenity.format", |m| m["serenity"]["format"] = json!(99)),
    ("page_bytes", |m| m["serenity"]["page_bytes"] = json!(0)),
    ("page_bytes", |m| m["serenity"]["page_bytes"] = json!(3)),
    ("page_bytes", |m| m["serenity"]["page_bytes"] = json!(1u64 << 40)),
    ("page_bytes", |m| m["serenity"]["page_bytes"] = json!(u64::MAX)),
    ("page_xxh3", |m| m["serenity"]["page_xxh3"] = json!([])),
    ("page_xxh3", |m| m["serenity"]["page_xxh3"].as_array_mut().unwrap().push(json!("0123456789abcdef"))),
    ("lacks a field", |m| m["serenity"]["page_xxh3"][0] = json!("0123456789ABCDEF")),
    ("lacks a field", |m| m["serenity"]["page_xxh3"][0] = json!("+123456789abcdef")),
    ("lacks a field", |m| m["serenity"]["page_xxh3"] = json!(7)),
    ("bytes, the manifest says", |m| m["serenity"]["file_bytes"] = json!(0)),
    ("bytes, the manifest says", |m| m["serenity"]["file_bytes"] = json!(u64::MAX)),
    ("lacks a field", |m| m["serenity"]["file_bytes"] = json!(1e300)),
    ("the header", |m| m["serenity"]["header_xxh3"] = json!("0123456789abcdef")),
    ("geometry", |m| m["serenity"]["geometry"]["num_attention_heads"] = json!(0)),
    ("geometry", |m| m["serenity"]["geometry"]["attention_head_dim"] = json!(u64::MAX)),
    ("geometry", |m| {
        m["serenity"]["geometry"]["num_attention_heads"] = json!(1u64 << 33);
        m["serenity"]["geometry"]["attention_head_dim"] = json!(1u64 << 33);
    }),
    ("geometry", |m| m["serenity"]["geometry"]["num_layers"] = json!(u64::MAX)),
    ("geometry", |m| m["serenity"]["geometry"]["num_single_layers"] = json!(1u64 << 40)),
    ("geometry", |m| m["serenity"]["geometry"]["mlp_ratio"] = json!(1e300)),
    ("geometry", |m| m["serenity"]["geometry"]["axes_dims_rope"] = json!([])),
    ("lacks a field", |m| m["serenity"]["geometry"] = json!(null)),
    ("lacks a field", |m| m["serenity"]["tensor_xxh3"] = json!([1])),
    ("lacks a field", |m| m["serenity"] = json!({"manifest_xxh3": "0123456789abcdef"})),
    ("does not state its checksum", |m| m["serenity"] = json!({})),
    ("does not state its checksum", |m| m["x"] = json!({"manifest_xxh3": "0123456789abcdef"})),
    ("belongs to layer", |m| {
        let layers = m["layers"].as_array_mut().unwrap();
        layers[1]["qweight_key"] = layers[0]["qweight_key"].clone();
    }),
    ("is not in the file", |m| m["layers"][0]["qweight_key"] = json!("../../etc/passwd")),
    ("is not in the file", |m| m["layers"][0]["qweight_key"] = json!("__metadata__")),
    ("__pad__", |m| m["layers"][0]["qweight_key"] = json!("__pad__.0")),
    ("packed_shape", |m| m["layers"][0]["orig_shape"] = json!([u64::MAX, u64::MAX])),
    ("packed_shape", |m| m["layers"][0]["pad_k"] = json!(u64::MAX)),
    ("lacks a field", |m| m["layers"][0]["orig_shape"] = json!([64.5, 1])),
    ("lacks a field", |m| m["layers"][0] = json!([])),
    ("has no name", |m| m["layers"][0]["canonical_name"] = json!("")),
    ("layer_count", |m| m["layer_count"] = json!(u64::MAX)),
    ("total_qweight_bytes", |m| m["total_qweight_bytes"] = json!(u64::MAX)),
    ("kernel ABI", |m| m["kernel_abi_version"] = json!(u64::MAX)),
    ("lacks a field", |m| m["kernel_abi_version"] = json!("1")),
    ("malformed", |m| {
        // Deeper than any reader's stack should be asked to go.
        let mut deep = json!(0);
        (0..500).for_each(|_| deep = json!([deep.take()]));
        m["deep"] = deep;
    }),
];

#[test]
fn hostile_manifests_are_refused() {
    let small = Small::new();
    let intact: Value = serde_json::from_slice(&std::fs::read(&small.manifest).unwrap()).unwrap();
    assert_eq!(sealed(&intact), std::fs::read_to_string(&small.manifest).unwrap());
    assert!(HOSTILE.len() >= 50);
    for (i, (expected, change)) in HOSTILE.iter().enumerate() {
        let mut manifest = intact.clone();
        change(&mut manifest);
        std::fs::write(&small.manifest, sealed(&manifest)).unwrap();
        let complaint = small.complaint().unwrap_or_else(|| panic!("manifest {i} ({expected}) was accepted"));
        assert!(complaint.contains(expected), "manifest {i}: expected '{expected}' in: {complaint}");
    }
    // Fields that nobody knows are no offence, to us as to the original reader.
    let mut more = intact.clone();
    more["a new field"] = json!({"x": [1, 2]});
    more["layers"][0]["another"] = json!(null);
    more["serenity"]["a third"] = json!("x");
    std::fs::write(&small.manifest, sealed(&more)).unwrap();
    assert_eq!(small.complaint(), None);
}

/// About 220 MB of bfloat16, killed again and again.
#[test]
fn kills_at_random_points_end_in_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let g = geometry(2, 3, 8, 128, 64, 512);
    let model = write_folder(&folder.path().join("model"), &g, &random_bf16(&g));
    let (killed, reference) = (folder.path().join("killed"), folder.path().join("reference"));
    let command = |to: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_serenity-slab"));
        command.args(["build", "--json", "--journal-bytes", "8388608", "--model"]).arg(&model).arg("--output").arg(to.join("slab"));
        command.stderr(Stdio::null()).stdout(Stdio::piped());
        command
    };
    let started = Instant::now();
    assert!(command(&reference).output().unwrap().status.success());
    let whole_us = started.elapsed().as_micros() as u64;
    let same = || {
        for name in ["slab.safetensors", "slab.manifest.json", "slab.other.safetensors"] {
            assert!(std::fs::read(killed.join(name)).unwrap() == std::fs::read(reference.join(name)).unwrap(), "{name} differs");
        }
    };
    let (mut resumed, mut rounds) = (0, 0);
    for kill in 0..count(100, 8) {
        let mut child = command(&killed).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(scattered(kill, whole_us)));
        child.kill().unwrap();
        child.wait().unwrap();
        let complete = killed.join("slab.manifest.json").exists();
        // Up to three kills of one build, then it may end.
        if complete || kill % 3 == 2 {
            let report: Value = serde_json::from_slice(&command(&killed).output().unwrap().stdout).unwrap();
            resumed += u64::from(report["resumed_bytes"].as_u64().unwrap() > 0);
            rounds += 1;
            same();
            std::fs::remove_dir_all(&killed).unwrap();
        }
    }
    println!("{rounds} builds ended after kills, {resumed} of them went on in the middle; one takes {} ms", whole_us / 1000);
    assert!(command(&killed).output().unwrap().status.success());
    same();
}
