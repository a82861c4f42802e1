//! The slab of a text encoder: built, verified, read back by name, and told apart from a transformer's.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod slab_common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serenity_loader::slab_tool::build::{BuildOptions, Component, build};
use serenity_loader::slab_tool::info::info;
use serenity_loader::slab_tool::verify::verify;
use serenity_protocol::checkpoint::Checkpoint;
use serenity_protocol::slab::Slab;
use serenity_protocol::slab::quant;
use serenity_protocol::slab::text_encoder::{EMBEDDING, LAYER_LINEARS, TextSlab, TextSource};
use slab_common::{golden, process};

fn options(folder: &Path, layers: Option<usize>) -> BuildOptions {
    let model = golden("model").display().to_string();
    BuildOptions { component: Component::TextEncoder, layers, ..BuildOptions::new(model, folder.join("text")) }
}

#[test]
fn a_text_encoders_slab_holds_its_rows_and_says_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let files = build(&options(folder.path(), None), &process()).unwrap().files;
    let text = TextSlab::open(&files.slab, &files.manifest).unwrap();
    let source = TextSource::open(&golden("model/text_encoder")).unwrap();
    let shape = text.shape();
    assert_eq!(&shape.geometry, source.geometry());
    assert_eq!(shape.layers, shape.geometry.hidden_states(None).unwrap()[2]);
    assert!(text.check_states(&[0, shape.layers]).is_ok());
    assert_eq!(text.check_states(&[shape.layers + 1]).unwrap_err().exit_code(), 64);
    let report = verify(text.slab(), &process()).unwrap();
    assert!(report.flaws.is_empty() && report.has_checksums);

    // Every row of every linear is the quantised row of the checkpoint.
    let checkpoint = Checkpoint::open(&golden("model/text_encoder")).unwrap();
    let stored = |name: &str, shape: &[usize]| {
        let place = source.place(name, shape).unwrap();
        let name = checkpoint
            .names()
            .find(|n| checkpoint.place(n).unwrap().range.start == place.runs[0].start && checkpoint.place(n).unwrap().file == place.file)
            .unwrap();
        checkpoint.tensor(name).unwrap().to_f32().unwrap()
    };
    let file = File::open(&files.slab).unwrap();
    let mut end = 0;
    for layer in 0..shape.layers {
        let run = text.layer_bytes(layer).unwrap();
        assert!(run.start >= end && run.start.is_multiple_of(4096));
        end = run.end;
        let linears = text.layer(layer).unwrap();
        assert_eq!(linears.len(), LAYER_LINEARS.len());
        for linear in linears {
            let (out, inner) = (linear.out_features, linear.in_features);
            let weight = stored(&format!("{}.weight", linear.name), &[out, inner]);
            let mut codes = vec![0u8; out * linear.padded_in];
            let mut scales = vec![0u8; out * 4];
            file.read_exact_at(&mut codes, linear.qweight.start).unwrap();
            file.read_exact_at(&mut scales, linear.scale.start).unwrap();
            for row in 0..out {
                let mut expected = vec![0i8; linear.padded_in];
                let scale = quant::quantize_row(&weight[row * inner..(row + 1) * inner], &mut expected);
                assert_eq!(scale.to_le_bytes(), scales[4 * row..4 * row + 4]);
                assert!(expected.iter().zip(&codes[row * linear.padded_in..]).all(|(e, c)| *e == *c as i8));
            }
        }
    }
    // The rest is in the companion, in bf16, with its hashes.
    let companion = Checkpoint::open(text.companion()).unwrap();
    for (name, shape) in shape.companion_tensors() {
        let tensor = companion.tensor_of_shape(&name, &shape).unwrap();
        assert_eq!(text.companion_hash(&name), Some(serenity_protocol::checksum::xxh3_64(tensor.bytes())), "{name}");
        let rounded: Vec<f32> = stored(&name, &shape).iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect();
        assert!(tensor.to_f32().unwrap() == rounded, "{name}");
    }
    assert!(companion.contains(EMBEDDING));
}

#[test]
fn components_are_not_taken_for_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let files = build(&options(folder.path(), Some(2)), &process()).unwrap().files;
    let slab = Slab::open(&files.slab, &files.manifest).unwrap();
    assert!(slab.geometry().is_none() && !slab.is_self_sufficient());
    let transformer = slab_common::build_into(folder.path(), &golden("model")).files;
    let other = Slab::open(&transformer.slab, &transformer.manifest).unwrap();
    assert!(other.is_self_sufficient());
    let error = slab.check_model(other.geometry().unwrap()).unwrap_err();
    assert!(error.exit_code() == 65 && error.to_string().contains("text encoder"), "{error}");
    assert_eq!(TextSlab::new(other).unwrap_err().exit_code(), 65);
    // As many layers as were asked for, and no more than there are.
    assert_eq!(TextSlab::new(slab).unwrap().shape().layers, 2);
    assert_eq!(build(&options(folder.path(), Some(1000)), &process()).unwrap_err().exit_code(), 64);
}

#[test]
fn the_error_of_every_layer_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let files = build(&options(folder.path(), None), &process()).unwrap().files;
    let slab = Slab::open(&files.slab, &files.manifest).unwrap();
    let info = info(&slab, golden("model").to_str(), &process()).unwrap();
    assert_eq!((info.component, info.blocks_contiguous), (Component::TextEncoder, Some(true)));
    for layer in &info.layers {
        let error = layer.error.unwrap();
        assert!(error.cosine > 0.9996 && error.relative_l2 < 0.05, "{}: {error:?}", layer.name);
    }
    let identity = |f: &serenity_loader::slab_tool::build::SlabFiles| TextSlab::open(&f.slab, &f.manifest).unwrap().identity();
    let again = tempfile::tempdir().unwrap();
    let same = build(&options(again.path(), None), &process()).unwrap().files;
    assert_eq!(identity(&files), identity(&same));
    let fewer = build(&options(again.path(), Some(1)), &process()).unwrap().files;
    assert_ne!(identity(&files), identity(&fewer));
}
