//! The transformer against the reference's golden files, and properties that need no reference.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serenity_protocol::geometry::{BlockId, LinearSpec, TransformerGeometry};
use serenity_protocol::model_path::{self, TransformerSource};

use super::ops::gemm::record;
use super::ops::rope::{Position, Rope};
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
    let ours = parity::compute(kind, &source, &Case::open(&case_path).unwrap(), None).unwrap().outputs;
    let golden = serenity_protocol::checkpoint::Checkpoint::open(&case_path).unwrap();
    let mut compared = 0;
    let mut worst = 0f64;
    for (name, tensor) in &ours {
        let expected = golden.tensor(name).unwrap();
        assert_eq!(tensor.dims(), expected.shape, "{name}");
        let difference = relative(&values(tensor), &expected.to_f32().unwrap());
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

/// Reads with one change: what a mistaken implementation would amount to.
fn golden_forward_with(change: impl Fn(&str, Vec<f32>, &[usize]) -> Vec<f32>, ids: impl Fn(Position) -> Position, time: f32) -> f64 {
    let path = goldens().join("model");
    let source = TransformerSource::open(&model_path::resolve_path(path.to_str().unwrap()).unwrap()).unwrap();
    let read = |name: &str, shape: &[usize]| Ok(change(name, source.tensor_f32(name, shape)?, shape));
    let other = OtherWeights::load(source.geometry(), &Device::Cpu, DType::F32, false, read).unwrap();
    let model = Flux2::new(source.geometry().clone(), other);
    let mut blocks = CheckpointSource::new(model.geometry.clone(), Device::Cpu, DType::F32, Box::new(read));
    let case = serenity_protocol::checkpoint::Checkpoint::open(&goldens().join("cases/transformer.safetensors")).unwrap();
    let tensor = |name: &str| {
        let t = case.tensor(name).unwrap();
        Tensor::from_vec(t.to_f32().unwrap(), t.shape.as_slice(), &Device::Cpu).unwrap()
    };
    let positions: Vec<Position> = Rope::positions(7, 4, 6).into_iter().map(ids).collect();
    let timestep: Vec<f32> = values(&tensor("timestep")).iter().map(|t| t * time).collect();
    let (noisy, context, guidance) = (tensor("hidden"), tensor("ctx"), values(&tensor("guidance")));
    let inputs = Inputs {
        noisy: &noisy,
        context: &context,
        timestep: &timestep,
        guidance: Some(&guidance),
        positions: model.positions_of(&positions, 7).unwrap(),
    };
    let none = AdapterSet::new(1, 1.0, Vec::new()).unwrap();
    let output = model.forward_observed(&mut blocks, &none, &inputs, &mut |_, _| Ok(())).unwrap().1;
    relative(&values(&output), &values(&tensor("output")))
}

/// The golden file would notice each of these mistakes: it moves the output by at least 100 times the tolerance.
#[test]
fn the_golden_case_notices_mistakes() {
    let same = |_: &str, v: Vec<f32>, _: &[usize]| v;
    let keep = |p: Position| p;
    let halves_swapped = |part: &'static str| {
        move |name: &str, mut v: Vec<f32>, _: &[usize]| {
            if name.contains(part) {
                let middle = v.len() / 2;
                v.rotate_left(middle);
            }
            v
        }
    };
    let mirrored = |a: &'static str, b: &'static str| {
        move |name: &str, v: Vec<f32>, _: &[usize]| {
            v.into_iter().map(|x| if name.ends_with(a) || name.ends_with(b) { 2.0 - x } else { x }).collect::<Vec<_>>()
        }
    };
    assert!(golden_forward_with(same, keep, 1.0) < 1e-5);
    let mistakes = [
        ("SwiGLU halves", golden_forward_with(halves_swapped("linear_in"), keep, 1.0)),
        ("norm_out halves", golden_forward_with(halves_swapped("norm_out"), keep, 1.0)),
        ("norm weights of q and k", golden_forward_with(mirrored("norm_q.weight", "norm_k.weight"), keep, 1.0)),
        ("rows and columns", golden_forward_with(same, |[t, h, w, l]| [t, w, h, l], 1.0)),
        ("axes", golden_forward_with(same, |[t, h, w, l]| [l, h, w, t], 1.0)),
        ("no positions", golden_forward_with(same, |_| [0.0; 4], 1.0)),
        ("time in thousandths", golden_forward_with(same, keep, 0.999)),
    ];
    for (mistake, difference) in mistakes {
        assert!(difference > 1e-3, "{mistake}: {difference:e}");
    }
}

/// A made-up model: small odd sizes, so that no two linears of different kinds have one shape.
fn geometry(double: usize, single: usize) -> TransformerGeometry {
    TransformerGeometry {
        in_channels: 6,
        out_channels: Some(10),
        num_layers: double,
        num_single_layers: single,
        attention_head_dim: 12,
        num_attention_heads: 3,
        joint_attention_dim: 14,
        timestep_guidance_channels: 20,
        mlp_ratio: 2.25,
        axes_dims_rope: vec![2, 4, 6, 0],
        rope_theta: 300.0,
        eps: 1e-6,
        guidance_embeds: single % 2 == 1,
    }
}

fn weight(name: &str, shape: &[usize]) -> serenity_protocol::Result<Vec<f32>> {
    let count = shape.iter().product();
    let mut values = rng::normals(&mut rng::stream(11, name, 0, 0), count);
    match shape {
        [_, fan_in] => values.iter_mut().for_each(|v| *v *= 0.8 / (*fan_in as f32).sqrt()),
        _ => values.iter_mut().for_each(|v| *v = 1.0 + 0.3 * *v),
    }
    Ok(values)
}

struct Setup {
    model: Flux2,
    source: CheckpointSource<'static>,
}

fn setup_as(g: TransformerGeometry, dtype: DType) -> Setup {
    let other = OtherWeights::load(&g, &Device::Cpu, dtype, false, weight).unwrap();
    let source = CheckpointSource::new(g.clone(), Device::Cpu, dtype, Box::new(weight));
    Setup { model: Flux2::new(g, other), source }
}

fn setup(double: usize, single: usize) -> Setup {
    setup_as(geometry(double, single), DType::F32)
}

fn all_linears(g: &TransformerGeometry) -> Vec<LinearSpec> {
    g.blocks().flat_map(|b| g.block_linears(b)).collect()
}

/// Adapters with B other than zero.
fn adapters(targets: &[LinearSpec]) -> AdapterSet {
    let mut set = AdapterSet::init(targets, 2, 3.0, 5, &Device::Cpu).unwrap();
    for adapter in &mut set.adapters {
        let drawn = rng::uniforms(&mut rng::stream(5, &adapter.name, 0, 0), adapter.b.elem_count(), -0.3, 0.3);
        adapter.b = Tensor::from_vec(drawn, adapter.b.shape().clone(), &Device::Cpu).unwrap();
    }
    set
}

fn micro_batch(g: &TransformerGeometry, index: u64, samples: usize, text: usize, height: usize, width: usize) -> MicroBatch {
    let tensor = |what: &str, tokens: usize, features: usize| {
        let drawn = rng::normals(&mut rng::stream(7, what, index, 0), samples * tokens * features);
        Tensor::from_vec(drawn, (samples, tokens, features), &Device::Cpu).unwrap()
    };
    MicroBatch {
        noisy: tensor("noisy", height * width, g.in_channels),
        context: tensor("context", text, g.joint_attention_dim),
        sigma: rng::uniforms(&mut rng::stream(7, "sigma", index, 0), samples, 0.05, 0.95),
        guidance: Some(2.5),
        height,
        width,
        target: tensor("target", height * width, g.out_channels()),
    }
}

fn step(setup: &mut Setup, set: &AdapterSet, batches: &[MicroBatch]) -> StepOutput {
    setup.model.loss_and_grads(&mut setup.source, set, batches, &|| false).unwrap()
}

/// Every gradient against central differences of the loss along a random direction, for several depths, among them models without double
/// or without single blocks.
#[test]
fn gradients_agree_with_differences() {
    for (double, single) in [(1, 1), (2, 0), (0, 2)] {
        let mut s = setup(double, single);
        let set = adapters(&all_linears(&s.model.geometry));
        let batches = [micro_batch(&s.model.geometry, 0, 2, 5, 2, 3)];
        let grads = step(&mut s, &set, &batches).grads;
        let norm = crate::optimizer::clip_grad_norm(&mut grads.clone(), 0.0).unwrap();
        for (i, adapter) in set.adapters.iter().enumerate() {
            for (part, gradient) in [(0, &grads.a[i]), (1, &grads.b[i])] {
                let direction = Tensor::from_vec(
                    rng::normals(&mut rng::stream(13, &adapter.name, part, 0), gradient.elem_count()),
                    gradient.shape().clone(),
                    &Device::Cpu,
                )
                .unwrap();
                let size = |t: &Tensor| values(t).iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
                let step = 2e-2 / size(&direction);
                let mut loss = |factor: f64| {
                    let mut moved = set.clone();
                    let target = if part == 0 { &mut moved.adapters[i].a } else { &mut moved.adapters[i].b };
                    *target = (&*target + (&direction * factor).unwrap()).unwrap();
                    s.model.loss(&mut s.source, &moved, &batches).unwrap()[0]
                };
                let numeric = (loss(step) - loss(-step)) / (2.0 * step);
                let ours: f64 = values(&direction).iter().zip(values(gradient)).map(|(d, g)| f64::from(d * g)).sum();
                let allowed = 5e-3 * size(&direction) * size(gradient) + 1e-5 * size(&direction) * norm;
                assert!((numeric - ours).abs() <= allowed, "{} part {part}: {numeric} against {ours}, {allowed}", adapter.name);
            }
        }
    }
}

/// Counts products of the shape of a frozen weight's gradient, and the work of a step: there are none, and it is what the visits need.
#[test]
fn no_gradient_of_a_frozen_weight_is_computed() {
    let mut s = setup(2, 2);
    let g = s.model.geometry.clone();
    let (text, image) = (5, 8);
    let batches = [micro_batch(&g, 0, 1, text, 2, 4)];
    let mut frozen: HashSet<(usize, usize)> = g.all_linears().iter().map(|l| (l.out_features, l.in_features)).collect();
    frozen.extend(frozen.clone().into_iter().map(|(o, i)| (i, o)));
    // No number of tokens may be taken for a number of features.
    for tokens in [text, image, text + image, 1] {
        assert!(frozen.iter().all(|(o, i)| *o != tokens && *i != tokens), "{tokens}");
    }
    let targets: Vec<LinearSpec> = all_linears(&g).into_iter().filter(|l| l.name.starts_with("transformer_blocks.1.")).collect();
    let set = adapters(&targets);
    record::take();
    step(&mut s, &set, &batches);
    let products = record::take();
    assert!(products.iter().all(|(m, n, _)| !frozen.contains(&(*m, *n))), "{products:?}");
    // Products with a frozen weight as operand, (tokens, out, in): forward everywhere, and both passes again above the first adapter.
    let count = |m: usize, n: usize, k: usize| products.iter().filter(|p| **p == (m, n, k)).count();
    let (d, mlp) = (g.inner_dim(), g.mlp_dim());
    // Single blocks: projected in forward, recomputed in backward; the gradient passes through once.
    assert_eq!(count(text + image, 3 * d + 2 * mlp, d), 2 + 2);
    assert_eq!(count(text + image, d, 3 * d + 2 * mlp), 2);
    // Their `to_out` is not recomputed.
    assert_eq!((count(text + image, d, d + mlp), count(text + image, d + mlp, d)), (2, 2));
    // Feed-forward of the image stream: two blocks forward, one of them recomputed (without its last product), one backward down to its
    // input because attention lies below; nothing of block 0.
    assert_eq!((count(image, 2 * mlp, d), count(image, d, 2 * mlp)), (2 + 1, 1));
    assert_eq!((count(image, d, mlp), count(image, mlp, d)), (2, 1));
    // Projections and `to_out`, 4 a stream: forward of two blocks, recomputed in one; backward only through `to_out`, whose gradient the
    // projections' adapters need; none through the projections, because the block's input needs no gradient.
    assert_eq!(count(image, d, d), 2 * 4 + 4 + 1);
}

#[test]
fn adapters_on_a_part_of_the_linears_get_the_gradients_they_have_among_all() {
    let mut s = setup(2, 2);
    let g = s.model.geometry.clone();
    let batches = [micro_batch(&g, 0, 2, 5, 2, 3)];
    // B zero: the model computes the same whichever adapters are there.
    let init = |targets: &[LinearSpec]| AdapterSet::init(targets, 2, 3.0, 5, &Device::Cpu).unwrap();
    let everything = init(&all_linears(&g));
    let full = step(&mut s, &everything, &batches);
    for ending in [
        "attn.to_q",
        "attn.to_v",
        "attn.add_k_proj",
        "attn.to_out.0",
        "attn.to_add_out",
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
        "attn.to_qkv_mlp_proj",
        "attn.to_out",
        "transformer_blocks.1.attn.to_k",
    ] {
        let targets: Vec<LinearSpec> = all_linears(&g).into_iter().filter(|l| l.name.ends_with(ending)).collect();
        assert!(!targets.is_empty());
        let set = init(&targets);
        let part = step(&mut s, &set, &batches);
        assert_eq!(part.losses, full.losses);
        for (i, adapter) in set.adapters.iter().enumerate() {
            let j = everything.index_of(&adapter.name).unwrap();
            assert!(values(&part.grads.b[i]).iter().any(|v| *v != 0.0), "{}", adapter.name);
            assert_eq!(values(&part.grads.b[i]), values(&full.grads.b[j]), "{}", adapter.name);
        }
        // Nothing below the first adapter is visited again.
        let first = g.blocks().find(|b| g.block_linears(*b).iter().any(|l| set.index_of(&l.name).is_some())).unwrap();
        let expected: Vec<u16> = (0..4).chain((first.0..3).rev()).collect();
        assert_eq!(s.model.visits(&set), expected.into_iter().map(BlockId).collect::<Vec<_>>());
    }
    let none = AdapterSet::new(1, 1.0, Vec::new()).unwrap();
    assert_eq!(step(&mut s, &none, &batches).losses, full.losses);
}

#[test]
fn several_micro_batches_equal_each_alone_averaged() {
    let mut s = setup(1, 2);
    let g = s.model.geometry.clone();
    let set = adapters(&all_linears(&g));
    // Different resolutions, text lengths and sample counts in one step.
    let batches = [micro_batch(&g, 0, 1, 5, 2, 3), micro_batch(&g, 1, 2, 4, 3, 2), micro_batch(&g, 2, 1, 5, 1, 7)];
    let together = step(&mut s, &set, &batches);
    let alone: Vec<StepOutput> = batches.iter().map(|b| step(&mut s, &set, std::slice::from_ref(b))).collect();
    assert_eq!(together.losses, alone.iter().flat_map(|o| o.losses.clone()).collect::<Vec<_>>());
    assert_eq!(together.losses, s.model.loss(&mut s.source, &set, &batches).unwrap());
    for i in 0..set.adapters.len() {
        for pick in [|o: &StepOutput, i: usize| values(&o.grads.a[i]), |o: &StepOutput, i: usize| values(&o.grads.b[i])] {
            let mean: Vec<f32> = (0..pick(&together, i).len()).map(|e| alone.iter().map(|o| pick(o, i)[e]).sum::<f32>() / 3.0).collect();
            assert!(relative(&pick(&together, i), &mean) < 2e-6, "{}", set.adapters[i].name);
        }
    }
}

#[test]
fn bf16_stays_near_float32() {
    let g = geometry(1, 2);
    let set = adapters(&all_linears(&g));
    let batches = [micro_batch(&g, 0, 2, 5, 2, 3)];
    let exact = step(&mut setup_as(g.clone(), DType::F32), &set, &batches);
    let rounded = step(&mut setup_as(g.clone(), DType::BF16), &set, &batches);
    assert_eq!(rounded.predictions[0].dtype(), DType::BF16);
    let difference = relative(&values(&rounded.predictions[0]), &values(&exact.predictions[0]));
    assert!(difference > 1e-6 && difference < 2e-2, "{difference}");
    for (i, adapter) in set.adapters.iter().enumerate() {
        let (x, y) = (values(&rounded.grads.b[i]), values(&exact.grads.b[i]));
        let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        let cosine = dot(&x, &y) / (dot(&x, &x) * dot(&y, &y)).sqrt();
        assert!(rounded.grads.b[i].dtype() == DType::F32 && cosine > 0.999, "{}: {cosine}", adapter.name);
    }
}

#[test]
fn a_step_stops_at_any_visit() {
    let mut s = setup(1, 2);
    let set = adapters(&all_linears(&s.model.geometry));
    let batches = [micro_batch(&s.model.geometry, 0, 1, 5, 2, 3)];
    let visits = s.model.visits(&set).len();
    assert_eq!(visits, 5);
    for stop_at in 0..visits {
        let asked = std::cell::Cell::new(0);
        let stop = || asked.replace(asked.get() + 1) == stop_at;
        s.source = setup(1, 2).source;
        let error = s.model.loss_and_grads(&mut s.source, &set, &batches, &stop).unwrap_err();
        assert_eq!((error.exit_code(), asked.get()), (75, stop_at + 1));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut s = setup(1, 1);
    let g = s.model.geometry.clone();
    let set = adapters(&all_linears(&g));
    let good = micro_batch(&g, 0, 2, 5, 2, 3);
    let refused = |set: &AdapterSet, change: &dyn Fn(&mut MicroBatch)| {
        let mut batch = good.clone();
        change(&mut batch);
        let mut source = setup(1, 1).source;
        assert_eq!(s.model.loss_and_grads(&mut source, set, &[batch], &|| false).unwrap_err().exit_code(), 65);
    };
    refused(&set, &|b| b.height = 3);
    refused(&set, &|b| b.sigma = vec![0.5]);
    refused(&set, &|b| b.sigma = vec![0.5, 1.5]);
    refused(&set, &|b| b.sigma = vec![0.5, f32::NAN]);
    refused(&set, &|b| b.guidance = Some(f32::INFINITY));
    refused(&set, &|b| b.context = b.noisy.clone());
    refused(&set, &|b| b.target = b.noisy.clone());
    let mut elsewhere = adapters(&all_linears(&geometry(2, 1)));
    refused(&elsewhere, &|_| {});
    elsewhere = adapters(&[LinearSpec { name: "transformer_blocks.0.attn.to_q".into(), out_features: 36, in_features: 35 }]);
    refused(&elsewhere, &|_| {});
    step(&mut s, &set, &[good]);
}

/// Run by the next test in processes of their own, because the number of threads is fixed at the start of a process.
#[test]
fn digest_of_a_step() {
    // Large enough that products and row loops are shared among threads.
    let mut g = geometry(1, 1);
    (g.num_attention_heads, g.attention_head_dim, g.axes_dims_rope) = (4, 32, vec![8; 4]);
    let batches = [micro_batch(&g, 0, 1, 200, 9, 11), micro_batch(&g, 1, 2, 150, 7, 8)];
    let set = adapters(&all_linears(&g));
    for dtype in [DType::F32, DType::BF16] {
        let output = step(&mut setup_as(g.clone(), dtype), &set, &batches);
        let mut hasher = blake3::Hasher::new();
        for tensor in output.grads.a.iter().chain(&output.grads.b).chain(&output.predictions) {
            values(tensor).iter().for_each(|v| _ = hasher.update(&v.to_le_bytes()));
        }
        println!("DIGEST {}", hasher.finalize());
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let digests = |threads: &str| -> Vec<String> {
        let run = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "model::tests::digest_of_a_step", "--nocapture", "--test-threads", "1"])
            .env("RAYON_NUM_THREADS", threads)
            .output()
            .unwrap();
        assert!(run.status.success());
        String::from_utf8(run.stdout).unwrap().lines().filter_map(|l| Some(l.split_once("DIGEST ")?.1.to_string())).collect()
    };
    let one = digests("1");
    assert_eq!(one.len(), 2);
    for threads in ["2", "3", "7"] {
        assert_eq!(digests(threads), one, "{threads} threads");
    }
}
