//! Tests of the plan.
#![allow(clippy::unwrap_used, clippy::expect_used)]
use serenity_protocol::Error;

use super::*;
use crate::cuda::blocks::{Form, Part};

fn dev() -> TransformerGeometry {
    let json = r#"{"in_channels": 128, "num_layers": 8, "num_single_layers": 48, "attention_head_dim": 128, "num_attention_heads": 48,
        "joint_attention_dim": 15360, "axes_dims_rope": [32, 32, 32, 32]}"#;
    serde_json::from_str(json).unwrap()
}

fn int8(g: &TransformerGeometry) -> Vec<Payload> {
    let block = |b: BlockId| {
        let mut end = 0;
        let mut part = |l: LinearSpec| {
            let (codes, scales) = (end, end + l.out_features * l.in_features);
            end = (scales + 4 * l.out_features).next_multiple_of(ALIGNMENT);
            Part { rows: l.out_features, cols: l.in_features, form: Form::Int8 { codes, scales, padded: l.in_features } }
        };
        let parts = g.block_linears(b).into_iter().map(&mut part).collect();
        Payload { bytes: end, parts }
    };
    g.blocks().map(block).collect()
}

/// FLUX.2 [dev] at rank 16, the peers' linears.
fn plan_of(mib: usize, micro_batches: usize, image: usize, limits: Limits) -> Result<Plan> {
    let g = dev();
    let payloads = int8(&g);
    let adapted = |l: &LinearSpec| l.name.contains(".attn.") && !(l.name.starts_with("single") && l.name.ends_with("to_out"));
    let targets: Vec<LinearSpec> = g.blocks().flat_map(|b| g.block_linears(b)).filter(adapted).collect();
    let shape = Shape { workspace: 256 << 20, ..Shape::new(&g, Ty::Bf16, 16, 1, 512, image) };
    Plan::new(&Need {
        geometry: &g,
        ty: Ty::Bf16,
        shapes: &vec![shape; micro_batches],
        targets: &targets,
        payloads: &payloads,
        budget: mib << 20,
        limits,
    })
}

fn plan(mib: usize, micro_batches: usize) -> Result<Plan> {
    plan_of(mib, micro_batches, 1024, Limits::default())
}

fn minimum(error: &Error) -> usize {
    error.to_string().split("at least ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn more_memory_is_never_slower_and_the_budget_is_never_passed() {
    let mut before = f64::INFINITY;
    for mib in [5000, 5400, 6 << 10, 8 << 10, 11 << 10, 16 << 10, 24 << 10, 32 << 10, 40 << 10] {
        let plan = plan(mib, 1).unwrap();
        println!("{plan}");
        assert!(plan.total() <= plan.budget, "{plan}");
        assert!(plan.slots >= 2 || plan.resident.len() == 56);
        assert!(plan.forecast.seconds <= before * 1.01, "{plan}");
        before = plan.forecast.seconds;
    }
    let large = plan(40 << 10, 1).unwrap();
    assert_eq!((large.resident.len(), large.turns, large.forecast.bytes), (56, Turns::none(), 0.0), "40 GiB hold everything");
}

#[test]
fn the_case_study_fits_into_six_gibibytes() {
    // What the driver counts beside the arena (context, libraries) is some 600 MiB.
    let plan = plan(6144 - 640, 1).unwrap();
    assert!(plan.turns.saved() > 40, "{plan}");
    let floor = plan.forecast.bytes / Rates::default().bus;
    assert!(plan.forecast.seconds < 1.1 * floor, "the bus is busy: {plan}");
    for (mib, micro_batches, image) in [(6144 - 640, 8, 1024), (14 * 1024 - 640, 1, 4096)] {
        let plan = plan_of(mib, micro_batches, image, Limits::default()).unwrap();
        println!("{micro_batches} x {image} tokens: {plan}");
    }
}

#[test]
fn too_little_is_refused_with_the_minimum_which_then_is_enough() {
    let error = plan(1024, 1).unwrap_err();
    assert_eq!(error.exit_code(), 64);
    let least = minimum(&error);
    assert!(plan(least, 1).is_ok() && plan(least - 2, 1).is_err());
    assert!(plan(least, 2).is_err(), "a second micro-batch needs its own gradient");
}

#[test]
fn limits_are_kept() {
    let all = Turns::new(57, 3);
    let limits = Limits { turns: Some(all), resident_max: 2, buffers: (2, 2), ..Limits::default() };
    let plan = plan_of(24 << 10, 1, 1024, limits).unwrap();
    assert_eq!((plan.turns, plan.slots, plan.resident.len()), (all, 4, 2));
    assert_eq!(plan.host, 54 * 1536 * 6144 * 2, "{plan}");
    let limits = Limits { host_max: 0, ..Limits::default() };
    let plan = plan_of(8 << 10, 1, 1024, limits).unwrap();
    assert_eq!((plan.turns, plan.host), (Turns::none(), 0), "no host memory, no offloading");
    let least = minimum(&plan_of(1024, 1, 1024, limits).unwrap_err());
    assert!(least > minimum(&self::plan(1024, 1).unwrap_err()) + 700, "{least}");
}

#[test]
fn activations_are_kept_where_there_is_room() {
    let plan = plan_of(60 << 10, 1, 1024, Limits::default()).unwrap();
    println!("{plan}");
    assert_eq!((plan.resident.len(), plan.kept.len()), (56, 56), "{plan}");
    assert!((plan.forecast.flops / 1e12 - 180.2).abs() < 1.0, "{plan}");
    let some = plan_of(40 << 10, 1, 1024, Limits::default()).unwrap();
    assert!(!some.kept.is_empty() && some.kept.len() < 56 && some.total() <= some.budget, "{some}");
    let none = plan_of(60 << 10, 1, 1024, Limits { kept_max: 0, ..Limits::default() }).unwrap();
    assert!(none.kept.is_empty() && none.forecast.flops > 267e12);
    assert!(plan.forecast.seconds < some.forecast.seconds && some.forecast.seconds < none.forecast.seconds);
}
