//! Every way to hold blocks, their inputs and activations gives the same adapters, bit for bit.
#![forbid(unsafe_code)]

use serenity_cuda::{Gpu, Ty};
use serenity_protocol::Result;
use serenity_protocol::geometry::TransformerGeometry;

use super::model::{Hosted, Kind, OPTIMIZER, SMALL_BUDGET, Setup, build, everything, open_model, random_batch, sizes, test_batches};
use super::{Line, Options, holds};
use crate::cuda::inputs::Turns;
use crate::cuda::plan::Limits;
use crate::cuda::step::{CudaStep, State};
use crate::model::{AdapterSet, MicroBatch, tensor_error};
use crate::optimizer::host;

/// Steps before adapters are compared.
const STEPS: u32 = 20;

/// Blocks streamed through slots of this many largest blocks.
fn slots(fewest: usize, most: usize) -> Limits {
    Limits { buffers: (fewest, most), resident_max: 0, turns: Some(Turns::none()), ..Limits::default() }
}

/// A way to hold things: its name, limits of the plan, and a tuning.
type Way = (&'static str, Limits, &'static str);

/// What holds with more and with less memory, and in any order of work; `states` is one more than the number of blocks.
fn ways(states: usize) -> Vec<Way> {
    let all = Limits { kept_max: 0, turns: Some(Turns::none()), ..Limits::default() };
    let turns = |turning: usize, count: usize| Some(Turns::new(turning, count));
    vec![
        ("all resident", all, ""),
        ("all resident, again", all, ""),
        ("all resident, nothing computed twice", Limits { kept_max: usize::MAX, ..all }, ""),
        ("all resident, activations of two blocks kept", Limits { kept_max: 2, ..all }, "side=low"),
        ("all resident, all inputs on the host", Limits { turns: turns(states, 2), ..all }, ""),
        ("fewest slots", slots(1, 1), ""),
        ("two buffers", slots(2, 2), ""),
        ("three buffers and a resident block", Limits { resident_max: 1, ..slots(3, 3) }, ""),
        ("fewest slots, all inputs on the host", Limits { turns: turns(states, 2), ..slots(1, 1) }, ""),
        ("two buffers, inputs on the host through three", Limits { turns: turns(states, 3), ..slots(2, 2) }, "side=high,blocks=4"),
        ("two buffers, some inputs on the host", Limits { turns: turns(states.saturating_sub(2), 2), ..slots(2, 2) }, "keep=0"),
        ("activations of all single blocks on the host through one", Limits { travelling: Some((usize::MAX, 1)), ..slots(2, 2) }, ""),
        ("of some through two, inputs too", Limits { travelling: Some((3, 2)), turns: turns(states, 2), ..slots(1, 1) }, ""),
        (
            "all resident, activations of all single blocks on the host",
            Limits { travelling: Some((usize::MAX, 2)), ..all },
            "side=high,blocks=4",
        ),
        ("as the planner likes", Limits::default(), ""),
        ("conditioning from the host", Limits { hosted: Some(8), ..slots(2, 2) }, ""),
        ("some of it, by pieces", Limits { hosted: Some(3), ..all }, "keep=0"),
        ("dequantised by pieces", slots(2, 2), "keep=0"),
        ("dequantised beside products", all, "side=low"),
        ("beside products, streamed", slots(2, 2), "side=high,blocks=2"),
        ("beside products, fewest slots", slots(1, 1), "side=high,blocks=1"),
        ("beside products, by pieces", slots(2, 2), "side=high,blocks=4,keep=0"),
    ]
}

/// Hash of adapters and moments after some steps.
fn after(step: &mut CudaStep, batches: &[MicroBatch]) -> Result<blake3::Hash> {
    for number in 1..=STEPS {
        step.gradients(batches, &|| false)?;
        step.norm()?;
        step.update(1e-3 / f64::from(number))?;
        if number == STEPS / 2 {
            // A forward pass between steps uses slots and memory in another order.
            step.loss(batches)?;
        }
    }
    let State { adapters: after, moments, .. } = step.state()?;
    let mut hasher = blake3::Hasher::new();
    for (adapter, (a, b)) in after.adapters.iter().zip(&moments) {
        for tensor in [&adapter.a, &adapter.b] {
            let values = host(tensor).map_err(|e| tensor_error("an adapter cannot be read", e))?;
            hasher.update(bytemuck::cast_slice(&values));
        }
        [&a.first, &a.second, &b.first, &b.second].into_iter().for_each(|m| _ = hasher.update(bytemuck::cast_slice(m)));
    }
    Ok(hasher.finalize())
}

pub(super) fn streamed(options: &Options, emit: &mut dyn FnMut(Line)) -> Result<()> {
    let model = open_model(&options.goldens)?;
    let g = model.geometry();
    let gpu = Gpu::open(options.device)?;
    let (adapters, batches) = (everything(g, 8)?, test_batches(g)?);
    let mut reference = None;
    for (form, kind) in [("INT8", Kind::Int8), ("bf16", Kind::Bf16)] {
        let hosted = Hosted::of(&gpu, &model, kind)?;
        // In the other form as in the first: only the weights' way differs, so a few are enough.
        let mut ways = ways(g.num_blocks() + 1).into_iter().filter(|(name, ..)| kind == Kind::Int8 || !name.contains("products"));
        // Pieces so small that matrices of this model are cut.
        same(options, (&format!("small, {form}"), 20_000), &hosted, (&adapters, &batches), &mut ways, &mut reference, emit)?;
    }
    let g = eighth();
    let hosted = Hosted::random(&gpu, &g, candle_core::DType::BF16, false)?;
    let batches = [(1, 64, 8, 16), (1, 64, 12, 8), (2, 32, 8, 8)].into_iter().zip(40..);
    let batches: Vec<MicroBatch> = batches.map(|(sizes, seed)| random_batch(&g, seed, sizes)).collect::<Result<_>>()?;
    let adapters = everything(&g, 16)?;
    let (mut ways, mut reference) = (ways(g.num_blocks() + 1).into_iter(), None);
    same(options, ("1/8 size", 1 << 20), &hosted, (&adapters, &batches), &mut ways, &mut reference, emit)?;
    refused(options, &hosted, (&adapters, &batches), reference, emit)
}

/// A host without page-locked memory, or with little: everything that was to lie there does not, and the result is the same.
fn refused(
    options: &Options,
    hosted: &Hosted,
    (adapters, batches): (&AdapterSet, &[MicroBatch]),
    reference: Option<blake3::Hash>,
    emit: &mut dyn FnMut(Line),
) -> Result<()> {
    let optimizer = OPTIMIZER;
    let turns = Some(Turns::new(hosted.geometry.num_blocks() + 1, 2));
    let limits = Limits { hosted: Some(8), travelling: Some((3, 2)), turns, ..slots(2, 2) };
    for most in [0, 24 << 20] {
        let gpu = Gpu::open(options.device)?;
        gpu.context().limit_page_locked(most);
        let batches_of = batches.iter().map(sizes).collect::<Result<_>>()?;
        let setup = Setup { hosted, ty: Ty::Bf16, adapters, optimizer: &optimizer, batches: batches_of, budget: SMALL_BUDGET, limits };
        let mut step = build(gpu, setup)?;
        let same = reference == Some(after(&mut step, batches)?);
        let plan = step.plan();
        let locked = plan.hosted_bytes + plan.host + plan.parcel_host;
        let note = format!("weights {}, inputs {}, activations {} bytes", plan.hosted_bytes, plan.host, plan.parcel_host);
        emit(holds(format!("{STEPS} steps, 1/8 size, {} MiB of page-locked memory", most >> 20), same && locked <= most, note));
    }
    Ok(())
}

fn same(
    options: &Options,
    (model, piece): (&str, usize),
    hosted: &Hosted,
    (adapters, batches): (&AdapterSet, &[MicroBatch]),
    ways: &mut dyn Iterator<Item = Way>,
    reference: &mut Option<blake3::Hash>,
    emit: &mut dyn FnMut(Line),
) -> Result<()> {
    let optimizer = OPTIMIZER;
    for (name, limits, tuning) in ways {
        let batches_of = batches.iter().map(sizes).collect::<Result<_>>()?;
        let setup = Setup { hosted, ty: Ty::Bf16, adapters, optimizer: &optimizer, batches: batches_of, budget: SMALL_BUDGET, limits };
        let mut step = build(Gpu::open(options.device)?, setup)?;
        step.tune(format!("piece={piece},{tuning}").parse()?)?;
        let hash = after(&mut step, batches)?;
        let same = *reference.get_or_insert(hash) == hash;
        let plan = step.plan();
        let how = format!("{}, {}, {} slots, {} kept", plan.resident.len(), plan.turns, plan.slots, plan.kept.len());
        emit(holds(
            format!("{STEPS} steps, {model}, {name}"),
            same,
            format!("{}, {how}, {:?}", &hash.to_hex().as_str()[..16], step.stats()),
        ));
    }
    Ok(())
}

/// An eighth of FLUX.2 [dev] in each direction but the head's.
fn eighth() -> TransformerGeometry {
    TransformerGeometry { num_layers: 4, num_single_layers: 12, num_attention_heads: 6, joint_attention_dim: 1920, ..super::timing::dev() }
}
