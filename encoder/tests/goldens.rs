//! The library and the program against the reference's tensors (tests/fixtures/goldens, made by diffusers and transformers).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

use serenity_encoder::parity;
use serenity_protocol::checkpoint::Checkpoint;

fn goldens(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/goldens")).join(path)
}

/// Largest absolute difference, and the largest expected magnitude.
fn difference(expected: &Checkpoint, found: &Checkpoint, name: &str) -> (f32, f32) {
    let (a, b) = (expected.tensor(name).unwrap(), found.tensor(name).unwrap());
    assert_eq!(a.shape, b.shape, "{name}");
    let (a, b) = (a.to_f32().unwrap(), b.to_f32().unwrap());
    let worst = a.iter().zip(&b).map(|(x, y)| (x - y).abs()).fold(0f32, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) });
    (worst, a.iter().fold(0f32, |m, x| m.max(x.abs())))
}

#[test]
fn text_embeddings_are_the_references_pads_included() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.safetensors");
    parity::text(&goldens("model"), &goldens("cases/text_encoder.json"), &out).unwrap();
    let (expected, found) = (Checkpoint::open(&goldens("cases/text_encoder.safetensors")).unwrap(), Checkpoint::open(&out).unwrap());
    for name in ["input_ids", "attention_mask"] {
        assert!(expected.tensor(name).unwrap().bytes() == found.tensor(name).unwrap().bytes(), "{name}");
    }
    let (worst, _) = difference(&expected, &found, "embeds");
    assert!(worst <= 5e-5, "largest difference {worst}");
}

/// The golden VAE's weights are drawn wide, so values reach 50 and float32 itself is uncertain by about 1e-4 there (the reference run
/// with other processor instructions, or in float64, differs from its own golden by that much). The tolerance is therefore relative to
/// the largest value: 1e-5, a sixth of what the smallest of the mistakes to be found (a batch-norm epsilon of 1e-5) gives.
#[test]
fn latents_and_images_are_the_references() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.safetensors");
    parity::vae(&goldens("model"), &goldens("cases/vae.safetensors"), &out).unwrap();
    let (expected, found) = (Checkpoint::open(&goldens("cases/vae.safetensors")).unwrap(), Checkpoint::open(&out).unwrap());
    assert_eq!(difference(&expected, &found, "pixels").0, 0.0);
    for name in ["latent_mode", "tokens", "decoded"] {
        let (worst, scale) = difference(&expected, &found, name);
        assert!(worst <= 1e-5 * scale, "{name}: largest difference {worst} of {scale}");
    }
}

#[test]
fn a_case_or_model_that_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let code = |r: serenity_protocol::Result<()>| r.unwrap_err().exit_code();
    assert_eq!(code(parity::text(&dir.path().join("nowhere"), &goldens("cases/text_encoder.json"), &out)), 69);
    assert_eq!(code(parity::vae(&goldens("model"), &goldens("cases/text_encoder.safetensors"), &out)), 65);
    let case = dir.path().join("case.json");
    std::fs::write(&case, r#"{"prompts": ["a"], "max_length": 8, "hidden_state_indices": [1, 3]}"#).unwrap();
    assert_eq!(code(parity::text(&goldens("model"), &case, &out)), 65);
    assert!(!out.exists());
}
