//! Verification: every corruption is found and named, an intact slab passes, and the command line keeps its exit codes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod slab_common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use serenity_loader::slab_tool::verify::{Division, VerifyReport, verify, verify_with};
use serenity_protocol::slab::Slab;
use serenity_protocol::slab::header::Header;
use slab_common::{build_into, golden, golden_slab_paths, process};

fn run(slab: &Path, manifest: &Path) -> Result<VerifyReport, serenity_protocol::Error> {
    verify(&Slab::open(slab, manifest)?, &process())
}

/// Numbers without pattern, the same in every run.
fn scattered(i: u64, below: u64) -> u64 {
    let mut z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678;
    z = (z ^ (z >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (z ^ (z >> 29)) % below
}

fn flip(file: &File, offset: u64, mask: u8) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ mask], offset).unwrap();
}

#[test]
fn every_flipped_byte_of_the_payload_is_found_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let files = build_into(folder.path(), &golden("model")).files;
    let intact = run(&files.slab, &files.manifest).unwrap();
    assert!(intact.flaws.is_empty() && intact.has_checksums && intact.pages > 4);
    let header = Header::read(&files.slab).unwrap();
    let file = File::options().read(true).write(true).open(&files.slab).unwrap();
    for i in 0..250 {
        let offset = header.data_start + scattered(i, header.file_bytes - header.data_start);
        let mask = 1 << (i % 8);
        flip(&file, offset, mask);
        let tensor = &header.tensor_at(offset).unwrap().name;
        match run(&files.slab, &files.manifest) {
            Ok(report) => {
                let flaw = report.flaws.iter().find(|f| f.tensor.as_ref() == Some(tensor));
                let flaw = flaw.unwrap_or_else(|| panic!("{offset} in {tensor} was not found: {:?}", report.flaws));
                assert!(flaw.offset <= offset && offset - flaw.offset < 1 << 16 && flaw.file == files.slab);
                let error = report.into_result().unwrap_err();
                assert!(error.exit_code() == 65 && error.to_string().contains(tensor.as_str()), "{error}");
            }
            // A scale that became negative or no number, a zero point that is none any more.
            Err(error) => assert!(error.exit_code() == 65 && error.to_string().contains(tensor.rsplit_once('.').unwrap().0), "{error}"),
        }
        flip(&file, offset, mask);
    }
    assert_eq!(run(&files.slab, &files.manifest).unwrap(), intact);
}

#[test]
fn every_flipped_bit_of_the_header_is_found_at_open() {
    let folder = tempfile::tempdir().unwrap();
    let files = build_into(folder.path(), &golden("model")).files;
    let data_start = Header::read(&files.slab).unwrap().data_start;
    let file = File::options().read(true).write(true).open(&files.slab).unwrap();
    // All bits of the length, then a scatter over the header's text and its padding.
    for i in (0..64).chain((0..400).map(|i| 64 + scattered(i, 8 * (data_start - 8)))) {
        flip(&file, i / 8, 1 << (i % 8));
        let error = Slab::open(&files.slab, &files.manifest).expect_err("a flipped bit of the header went unseen");
        assert_eq!(error.exit_code(), 65, "{error}");
        flip(&file, i / 8, 1 << (i % 8));
    }
}

#[test]
fn truncations_are_found_at_open() {
    let folder = tempfile::tempdir().unwrap();
    let files = build_into(folder.path(), &golden("model")).files;
    let bytes = std::fs::read(&files.slab).unwrap();
    for i in 0..60 {
        std::fs::write(&files.slab, &bytes[..scattered(i, bytes.len() as u64) as usize]).unwrap();
        assert_eq!(run(&files.slab, &files.manifest).unwrap_err().exit_code(), 65);
    }
}

#[test]
fn the_companion_is_verified_too() {
    let folder = tempfile::tempdir().unwrap();
    let files = build_into(folder.path(), &golden("model")).files;
    let header = Header::read(&files.companion).unwrap();
    let file = File::options().read(true).write(true).open(&files.companion).unwrap();
    for i in 0..40 {
        let offset = header.data_start + scattered(i, header.file_bytes - header.data_start);
        flip(&file, offset, 4);
        let report = run(&files.slab, &files.manifest).unwrap();
        assert_eq!(report.flaws.len(), 1);
        assert_eq!(report.flaws[0].tensor.as_ref(), Some(&header.tensor_at(offset).unwrap().name));
        assert_eq!(report.flaws[0].file, files.companion);
        flip(&file, offset, 4);
    }
    // A letter of the header's metadata: the tensors are all right, the file is not.
    let letter = header.bytes.windows(4).position(|w| w == b"\"pt\"").unwrap() + 1;
    flip(&file, letter as u64, 1);
    assert_eq!(run(&files.slab, &files.manifest).unwrap().flaws.len(), 1);
    std::fs::remove_file(&files.companion).unwrap();
    assert_eq!(run(&files.slab, &files.manifest).unwrap_err().exit_code(), 69);
}

#[test]
fn the_original_slab_passes_and_says_that_it_has_no_checksums() {
    let (slab, manifest) = golden_slab_paths();
    let report = run(&slab, &manifest).unwrap();
    assert!(report.flaws.is_empty() && !report.has_checksums && report.pages == 0);
    // A code that no builder writes.
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("s.safetensors");
    std::fs::copy(&slab, &copy).unwrap();
    let offset = Header::read(&slab).unwrap().tensor("proj_out.qweight").unwrap().range.start + 5;
    File::options().write(true).open(&copy).unwrap().write_all_at(&[0x80], offset).unwrap();
    let report = run(&copy, &manifest).unwrap();
    assert_eq!(report.flaws.len(), 1);
    assert_eq!((report.flaws[0].tensor.as_deref(), report.flaws[0].offset), (Some("proj_out.qweight"), offset));
}

/// One flipped byte of a slab, found by any number of threads with pieces and units of any size: the same flaws.
#[test]
fn flaws_do_not_depend_on_the_division() {
    let folder = tempfile::tempdir().unwrap();
    let files = build_into(folder.path(), &golden("model")).files;
    let header = Header::read(&files.slab).unwrap();
    let file = File::options().read(true).write(true).open(&files.slab).unwrap();
    for i in 0..40 {
        let offset = header.data_start + scattered(i, header.file_bytes - header.data_start);
        flip(&file, offset, 16);
        // Flips that are seen at open are not the point here.
        if let Ok(slab) = Slab::open(&files.slab, &files.manifest) {
            let flaws = |workers, unit_bytes, piece_bytes| {
                let division = Division { workers, unit_bytes, piece_bytes };
                verify_with(&slab, division, false, &process()).unwrap().report.flaws
            };
            let one = flaws(1, 1 << 40, 1 << 20);
            assert!(!one.is_empty() && one == flaws(5, 1, 4096) && one == flaws(3, 50_000, 8192), "{offset}");
        }
        flip(&file, offset, 16);
    }
}

fn slab_command(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_serenity-slab")).args(args).output().unwrap()
}

#[test]
fn the_command_line_keeps_its_exit_codes() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("slab");
    let (prefix, model) = (prefix.to_str().unwrap(), golden("model"));
    let model = model.to_str().unwrap();
    assert_eq!(slab_command(&["build", "--model", model]).status.code(), Some(64));
    assert_eq!(slab_command(&["build", "--model", "/nonexistent", "--output", prefix]).status.code(), Some(69));
    assert_eq!(slab_command(&["verify", prefix]).status.code(), Some(69));
    let built = slab_command(&["build", "--model", model, "--output", prefix, "--dtype", "int8", "--json"]);
    assert_eq!(built.status.code(), Some(0));
    let built: Value = serde_json::from_slice(&built.stdout).unwrap();
    assert_eq!(built["layers"], 41);
    let info = slab_command(&["info", prefix, "--json", "--model", model]);
    let info: Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!((info["layer_count"].as_u64(), info["blocks_contiguous"].as_bool()), (Some(41), Some(true)));
    for layer in info["layers"].as_array().unwrap() {
        assert!(layer["cosine"].as_f64().unwrap() > 0.9996 && layer["relative_l2"].as_f64().unwrap() < 0.05, "{layer}");
    }
    let verified = slab_command(&["verify", built["slab"].as_str().unwrap(), "--json", "--compare"]);
    assert_eq!(verified.status.code(), Some(0));
    let verified: Value = serde_json::from_slice(&verified.stdout).unwrap();
    assert!(verified["rate"]["bytes"] == verified["bytes"] && verified["ratio"].as_f64().unwrap() > 0.0, "{verified}");
    let file = File::options().read(true).write(true).open(built["slab"].as_str().unwrap()).unwrap();
    flip(&file, 300_000, 1);
    let verified = slab_command(&["verify", prefix]);
    assert_eq!(verified.status.code(), Some(65));
    let message = String::from_utf8(verified.stderr).unwrap();
    assert!(message.contains("slab.safetensors") && message.contains("qweight") && message.contains("offset"), "{message}");
}
