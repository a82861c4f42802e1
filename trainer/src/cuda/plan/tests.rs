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
    assert_eq!((large.resident.len(), large.turns), (56, Turns::none()), "40 GiB hold everything");
    let alone = plan_of(40 << 10, 1, 1024, Limits { parcels_max: 0, ..Limits::default() }).unwrap();
    assert_eq!((alone.resident.len(), alone.forecast.bytes), (56, 0.0), "and nothing else has to come from the host");
    assert!(large.forecast.seconds <= alone.forecast.seconds, "{large} {alone}");
}

#[test]
fn the_case_study_fits_into_six_gibibytes() {
    // What the driver counts beside the arena (context, libraries) is some 600 MiB.
    let plan = plan(6144 - 640, 1).unwrap();
    assert!(plan.turns.saved() > 0, "{plan}");
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
    let some = plan_of(40 << 10, 1, 1024, Limits { parcels_max: 0, ..Limits::default() }).unwrap();
    assert!(!some.kept.is_empty() && some.kept.len() < 56 && some.total() <= some.budget, "{some}");
    // 267.9 if the last matrix of each block were computed again too.
    let none = Limits { kept_max: 0, parcels_max: 0, ..Limits::default() };
    let none = plan_of(60 << 10, 1, 1024, none).unwrap();
    assert!(none.kept.is_empty() && (none.forecast.flops / 1e12 - 242.8).abs() < 1.0);
    assert!(plan.forecast.seconds < some.forecast.seconds && some.forecast.seconds < none.forecast.seconds);
}

#[test]
fn activations_travel_where_the_device_is_the_limit_and_the_bus_is_not() {
    let of = |mib: usize, image: usize, limits: Limits| plan_of(mib, 1, image, limits).unwrap();
    let bus_bound = of(6144 - 640, 1024, Limits::default());
    assert!(bus_bound.travelling.is_empty() && bus_bound.parcel_host == 0, "{bus_bound}");
    for (mib, image) in [(14 * 1024 - 640, 4096), (32 * 1024 - 640, 1024), (40 * 1024 - 640, 1024)] {
        let (with, without) = (of(mib, image, Limits::default()), of(mib, image, Limits { parcels_max: 0, ..Limits::default() }));
        println!("{with}\n{without}");
        assert!(without.travelling.is_empty() && without.parcel_host == 0);
        assert!(!with.travelling.is_empty() && with.total() <= with.budget, "{with}");
        assert!(with.forecast.seconds < without.forecast.seconds && with.forecast.flops < without.forecast.flops, "{with} {without}");
        let one = image_bytes(image);
        assert_eq!(with.parcel_bytes, with.parcels.count * one);
        assert_eq!(with.parcel_host, (with.travelling.len() - with.parcels.count) * one);
        assert!(with.travelling.is_sorted() && with.travelling.iter().all(|b| b.0 >= 8), "single blocks, in order");
        let less = of(mib, image, Limits { parcels_max: with.parcel_host / 2, ..Limits::default() });
        assert!(less.parcel_host <= with.parcel_host / 2);
    }
    let forced = of(24 << 10, 1024, Limits { travelling: Some((100, 3)), ..Limits::default() });
    assert_eq!((forced.travelling.len(), forced.parcels), (48, Turns::through(48, 3)));
}

/// Projections, attention's output and the logarithms of one sample with 512 text tokens.
fn image_bytes(image: usize) -> usize {
    let (t, d) = (512 + image, 6144);
    let parts = [t * (3 * d + 6 * d) * 2, t * d * 2, 48 * t * 4];
    parts.iter().map(|bytes| bytes.next_multiple_of(ALIGNMENT)).sum()
}

#[test]
fn weights_of_the_conditioning_leave_the_device_where_that_is_worth_it() {
    let hosted = |mib, limits| plan_of(mib, 1, 1024, limits).unwrap();
    let none = Limits { hosted_max: 0, ..Limits::default() };
    // The bus is the limit: a block that stays saves twice its bytes.
    for mib in [4000, 5000, 10 << 10] {
        let with = hosted(mib, Limits::default());
        assert_eq!((with.hosted, with.hosted_bytes >> 20), (CONDITIONING.len(), 1374), "{with}");
        if mib > 5000 {
            let without = hosted(mib, none);
            assert!(with.forecast.seconds < without.forecast.seconds && with.forecast.bytes < without.forecast.bytes, "{with}\n{without}");
            assert_eq!(without.other, with.other + with.hosted_bytes);
        }
    }
    assert!(minimum(&plan_of(4000, 1, 1024, none).unwrap_err()) > 4600);
    // Everything fits: nothing is read over the bus.
    assert_eq!(hosted(40 << 10, Limits::default()).hosted, 0);
    assert!(CONDITIONING.iter().enumerate().all(|(i, name)| (i < EMBEDDERS) == name.contains("_embedder.")));
    let names: Vec<String> = dev().other_linears().into_iter().map(|l| l.name).collect();
    assert_eq!(CONDITIONING.iter().filter(|n| names.contains(&n.to_string())).count(), CONDITIONING.len());
}
