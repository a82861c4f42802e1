//! Each operation of the processor against the same operation composed from the tensor library's, and backward against differences.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use candle_core::{DType, Device, Result, Tensor};

use super::rope::Rope;
use super::{attention, gate, layer_norm, qk_norm_rope, swiglu};
use crate::rng;

fn random(name: &str, shape: &[usize]) -> Tensor {
    let values = rng::normals(&mut rng::stream(3, name, 0, 0), shape.iter().product());
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn close(x: &Tensor, y: &Tensor, tolerance: f32) {
    assert_eq!((x.dims(), x.dtype()), (y.dims(), y.dtype()));
    let (x, y) = (values(x), values(y));
    let largest = y.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
    let worst = x.iter().zip(&y).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(worst <= tolerance * largest, "{worst:e} over {largest:e}");
}

/// A table of 9 tokens that are not in any order, 10 features a head on uneven axes.
fn table() -> Rope {
    let ids: Vec<_> = (0..9u8).map(|i| [f32::from(i % 2), f32::from(i), f32::from(3 * i % 7), f32::from(20 - i)]).collect();
    Rope::new(&ids, &[4, 2, 0, 4], 500.0, &Device::Cpu).unwrap()
}

/// Runs `check` on float32 and bf16 inputs; one rounding to bf16 is 2^-9.
fn in_both_types(check: impl Fn(&dyn Fn(&str, &[usize]) -> Tensor, f32)) {
    check(&|name, shape| random(name, shape), 3e-6);
    check(&|name, shape| random(name, shape).to_dtype(DType::BF16).unwrap(), 8e-3);
}

#[test]
fn processor_and_composed_operations_agree() {
    in_both_types(|input, tolerance| {
        let (x, dy) = (input("x", &[2, 9, 30]), input("dy", &[2, 9, 30]));
        let modulation = |name: &str| random(name, &[2, 1, 30]);
        let (shift, scale, weight, rope) = (modulation("shift"), modulation("scale"), random("weight", &[10]), table());
        close(
            &layer_norm::forward(&x, &shift, &scale, 1e-6).unwrap(),
            &layer_norm::composed::forward(&x, &shift, &scale, 1e-6).unwrap(),
            tolerance,
        );
        close(
            &layer_norm::backward(&x, &scale, 1e-6, &dy).unwrap(),
            &layer_norm::composed::backward(&x, &scale, 1e-6, &dy).unwrap(),
            tolerance,
        );
        close(&gate::forward(&x, &scale, &dy).unwrap(), &gate::composed::forward(&x, &scale, &dy).unwrap(), tolerance);
        close(&gate::backward(&scale, &dy).unwrap(), &gate::composed::backward(&scale, &dy).unwrap(), tolerance);
        close(&gate::add(x.copy().unwrap(), &dy).unwrap(), &(&x + &dy).unwrap(), tolerance);
        // Views of a wider projection, as in a single block.
        let wide = input("wide", &[2, 9, 70]);
        let (view, dhead) = (wide.narrow(2, 30, 30).unwrap(), input("dhead", &[2, 3, 11, 10]).narrow(2, 1, 9).unwrap());
        close(
            &qk_norm_rope::forward(&view, 3, &weight, &rope, 1e-6).unwrap(),
            &qk_norm_rope::composed::forward(&view, 3, &weight, &rope, 1e-6).unwrap(),
            tolerance,
        );
        close(
            &qk_norm_rope::backward(&view, 3, &weight, &rope, 1e-6, &dhead).unwrap(),
            &qk_norm_rope::composed::backward(&view, 3, &weight, &rope, 1e-6, &dhead).unwrap(),
            tolerance,
        );
        let (u, dm) = (wide.narrow(2, 4, 60).unwrap(), dy);
        close(&swiglu::forward(&u).unwrap(), &swiglu::composed::forward(&u).unwrap(), tolerance);
        close(&swiglu::backward(&u, &dm).unwrap(), &swiglu::composed::backward(&u, &dm).unwrap(), tolerance);
    });
}

#[test]
fn attention_agrees_with_its_definition() {
    let shape = [2, 3, 9, 10];
    let (q, k, v, dout) = (random("q", &shape), random("k", &shape), random("v", &shape), random("dout", &shape));
    let (out, saved) = attention::forward(q.clone(), k.clone(), v.clone()).unwrap();
    let scale = 1.0 / 10f64.sqrt();
    let p = attention::composed::softmax(&q.matmul(&k.t().unwrap()).unwrap(), scale).unwrap();
    close(&out, &p.matmul(&v).unwrap(), 3e-6);
    let (dq, dk, dv) = attention::backward(&saved, &dout).unwrap();
    let dp = dout.matmul(&v.t().unwrap()).unwrap();
    let ds = attention::composed::softmax_backward(&dp, &p, &dout, &out, scale).unwrap();
    close(&dq, &ds.matmul(&k).unwrap(), 3e-6);
    close(&dk, &ds.t().unwrap().matmul(&q).unwrap(), 3e-6);
    close(&dv, &p.t().unwrap().matmul(&dout).unwrap(), 3e-6);
}

/// `<f'(x) direction, dy>` by central differences against `<direction, backward(dy)>`.
#[track_caller]
fn differences(f: impl Fn(&Tensor) -> Result<Tensor>, x: &Tensor, dx: &Tensor, dy: &Tensor) {
    let direction = random("direction", x.dims());
    let inner = |a: &Tensor, b: &Tensor| values(a).iter().zip(values(b)).map(|(x, y)| f64::from(x * y)).sum::<f64>();
    let step = 2e-3;
    let at = |factor: f64| inner(&f(&(x + (&direction * factor).unwrap()).unwrap()).unwrap(), dy);
    let (numeric, ours) = ((at(step) - at(-step)) / (2.0 * step), inner(&direction, dx));
    let size = inner(dx, dx).sqrt() * inner(&direction, &direction).sqrt();
    assert!((numeric - ours).abs() <= 2e-4 * size, "differences {numeric}, ours {ours}, of {size}");
}

#[test]
fn backward_agrees_with_differences() {
    let (x, dy, scale) = (random("x", &[2, 9, 30]), random("dy", &[2, 9, 30]), random("scale", &[2, 1, 30]));
    let zero = scale.zeros_like().unwrap();
    differences(|x| layer_norm::forward(x, &zero, &scale, 1e-6), &x, &layer_norm::backward(&x, &scale, 1e-6, &dy).unwrap(), &dy);
    differences(|f| gate::forward(&x, &scale, f), &x, &gate::backward(&scale, &dy).unwrap(), &dy);
    let (weight, rope, dhead) = (random("weight", &[10]), table(), random("dhead", &[2, 3, 9, 10]));
    let ours = qk_norm_rope::backward(&x, 3, &weight, &rope, 1e-6, &dhead).unwrap();
    differences(|x| qk_norm_rope::forward(x, 3, &weight, &rope, 1e-6), &x, &ours, &dhead);
    let (u, dm) = (random("u", &[2, 9, 60]), &dy);
    differences(swiglu::forward, &u, &swiglu::backward(&u, dm).unwrap(), dm);
    let shape = [2, 3, 9, 10];
    let (q, k, v) = (random("q", &shape), random("k", &shape), random("v", &shape));
    let (dq, dk, dv) = attention::backward(&attention::forward(q.clone(), k.clone(), v.clone()).unwrap().1, &dhead).unwrap();
    let run = |q: &Tensor, k: &Tensor, v: &Tensor| Ok(attention::forward(q.clone(), k.clone(), v.clone())?.0);
    differences(|q| run(q, &k, &v), &q, &dq, &dhead);
    differences(|k| run(&q, k, &v), &k, &dk, &dhead);
    differences(|v| run(&q, &k, v), &v, &dv, &dhead);
}

#[test]
fn not_a_number_is_never_hidden() {
    let mut bad = values(&random("x", &[1, 4, 8]));
    bad[9] = f32::NAN;
    let x = Tensor::from_vec(bad, (1, 4, 8), &Device::Cpu).unwrap();
    let modulation = Tensor::ones((1, 1, 8), DType::F32, &Device::Cpu).unwrap();
    let heads = x.reshape((1, 1, 4, 8)).unwrap();
    for y in [
        layer_norm::forward(&x, &modulation, &modulation, 1e-6).unwrap(),
        swiglu::forward(&x).unwrap(),
        attention::forward(heads.clone(), heads.clone(), heads).unwrap().0,
    ] {
        assert!(values(&y).iter().any(|v| v.is_nan()));
    }
}
