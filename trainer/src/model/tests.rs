//! The transformer against the reference's golden files, and properties that need no reference.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::model_path::{self, TransformerSource};

use super::ops::gemm::record;
use super::*;
use crate::parity::{self, Case, Kind};
use crate::rng;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/goldens")
}

fn values(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// |x - y| / |y| in the Euclidean norm, and the largest difference over the largest value.
fn relative(x: &[f32], y: &[f32]) -> f64 {
    assert_eq!(x.len(), y.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|a| a * a).sum::<f64>().sqrt();
    let difference = norm(&mut x.iter().zip(y).map(|(a, b)| f64::from(a - b)));
    let max = |v: &mut dyn Iterator<Item = f64>| v.fold(0.0, |m: f64, a| m.max(a.abs()));
    let largest = max(&mut x.iter().zip(y).map(|(a, b)| f64::from(a - b))) / max(&mut y.iter().map(|v| f64::from(*v))).max(1e-30);
    largest.max(difference / norm(&mut y.iter().map(|v| f64::from(*v))).max(1e-30))
}

fn compare(kind: Kind, model: &str, case: &str, tolerance: impl Fn(&str) -> f64) {
    let path = goldens().join("model").join(model);
    let source = TransformerSource::open(&model_path::resolve_path(path.to_str().unwrap()).unwrap()).unwrap();
    let case_path = goldens().join("cases").join(case);
    let ours = parity::compute(kind, &source, &Case::open(&case_path).unwrap(), None).unwrap();
    let golden = serenity_protocol::checkpoint::Checkpoint::open(&case_path).unwrap();
    let mut compared = 0;
    let mut worst = 0f64;
    for (name, tensor) in &ours {
        let expected = golden.tensor(name).unwrap();
        assert_eq!(tensor.dims(), expected.shape, "{name}");
        let difference = relative(&values(tensor), &expected.to_f32().unwrap());
        println!("{name} {difference:e}");
        worst = worst.max(difference / tolerance(name));
        assert!(difference <= tolerance(name), "{name}: {difference:e} > {:e}", tolerance(name));
        compared += 1;
    }
    println!("{case}: {compared} tensors, worst {worst:.3} of its tolerance");
    assert!(compared >= 9, "only {compared} tensors were compared");
}

#[test]
fn forward_equals_the_reference() {
    for model in ["", "flux2-bfl.safetensors"] {
        compare(Kind::Forward, model, "transformer.safetensors", |_| 1e-5);
    }
}

#[test]
fn loss_gradients_and_three_updates_equal_the_reference() {
    compare(Kind::LoraStep, "", "lora_step.safetensors", |name| match name {
        n if n.starts_with("grad") => 1e-4,
        n if n.starts_with("after3") => 1e-4,
        _ => 1e-5,
    });
}
