//! What a step with a plan is expected to take: visits and loads played through the very assignment of slots that the step will use.
//!
//! What travels to the host and back takes the bus in both directions: what comes back is counted before the next block's load, and a visit that needs it waits
//! for it.
//!
//! A visit costs its products and attention at parts of the best rate of a matrix product, and what passes through device memory (dequantisation,
//! elementwise work) at the rate of that. A load begins when the bus is free and the visits to its slots' old content are over; a visit begins
//! when the one before is over and its block is there.
#![forbid(unsafe_code)]

use std::fmt;

use serde::Serialize;
use serenity_cuda::Ty;
use serenity_cuda::arena::ALIGNMENT;
use serenity_cuda::ops::elementwise::LINEAR_ROWS;
use serenity_protocol::geometry::BlockId;
use serenity_protocol::{Error, Result};

use super::{Need, Plan, Shape, is_double};
use crate::cuda::assignment::{Assignment, Slots};
use crate::cuda::blocks::{Form, Payload};
use crate::cuda::inputs::Turns;

/// What a device does in a second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rates {
    /// Operations of matrix products.
    pub flops: f64,
    /// Bytes read and written in its memory.
    pub memory: f64,
    /// Bytes from the host.
    pub bus: f64,
}

impl Default for Rates {
    /// Those of an H100 on PCIe 5; what matters to a plan is how they compare with each other.
    fn default() -> Self {
        Self { flops: 750e12, memory: 2.7e12, bus: 50e9 }
    }
}

/// Passes over hidden states in a block's forward pass, counted in hidden states read or written: 32 ms of elementwise work were measured
/// in a step of FLUX.2 [dev] with 1536 tokens at 2.7 TB/s.
const STATES_PER_PASS: f64 = 27.0;
/// The same for what is made of a parcel ([`crate::cuda::single::Parcel`]), and for putting it together.
const STATES_PER_PARCEL: f64 = 22.0;
/// Part of the best rate of a product that all of a step's reach: most of an H100's step is bound by its power. Measured: 0.80 to 0.85.
const PRODUCTS_PART: f64 = 0.83;
/// Part of a product's time that is lost where the matrix comes in pieces. Measured in steps of FLUX.2 [dev]: 0.027 and 0.034.
const PIECES_LOSS: f64 = 0.03;
/// The same of attention.
const ATTENTION_PART: f64 = 0.5;
/// Part of what goes to the host that the way from the host loses meanwhile.
const DUPLEX_PART: f64 = 0.5;
/// Between two steps: the optimiser's launches and the host's way from one step to the next.
const BETWEEN_SECONDS: f64 = 0.003;

/// Expected figures of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Forecast {
    /// Seconds from one step to the next.
    pub seconds: f64,
    /// The larger of what products take and what the bus takes.
    pub floor: f64,
    /// Operations of products and attention.
    pub flops: f64,
    /// Bytes from the host.
    pub bytes: f64,
    /// Bytes of the arena.
    pub device_bytes: usize,
    /// Page-locked bytes of the host for block inputs.
    pub host_bytes: usize,
}

impl fmt::Display for Forecast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "expected {:.3} s a step, {:.1} TFLOP and {:.2} GB from the host", self.seconds, self.flops / 1e12, self.bytes / 1e9)
    }
}

/// What a part of a visit asks of the device.
#[derive(Debug, Clone, Copy, Default)]
struct Work {
    linears: f64,
    /// Operations that could have been done in the time that pieces lose.
    lost: f64,
    attention: f64,
    traffic: f64,
}

impl std::ops::Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            linears: self.linears + other.linears,
            lost: self.lost + other.lost,
            attention: self.attention + other.attention,
            traffic: self.traffic + other.traffic,
        }
    }
}

impl Work {
    fn seconds(self, rates: &Rates) -> f64 {
        ((self.linears + self.lost) / PRODUCTS_PART + self.attention / ATTENTION_PART) / rates.flops + self.traffic / rates.memory
    }

    /// One pass through a block and its attention, `attention` times as much as forward, with `ring` bytes for dequantised matrices.
    fn pass(s: &Shape, payload: &Payload, double: bool, attention: f64, again: bool, ring: usize) -> Self {
        let mut weights: f64 = payload.parts.iter().map(|p| (p.rows * p.cols) as f64).sum();
        if again {
            // The last matrix's result, `[D, ..]`, is not needed to compute gradients: that of each stream's feed-forward part, or `to_out`.
            let last = s.inner * s.mlp;
            weights -= if double { 2 * last } else { last + s.inner * s.inner } as f64;
        }
        // Half the matrices of a double block see the image's tokens, half the text's.
        let linears = 2.0 * weights * s.rows() as f64 / if double { 2.0 } else { 1.0 };
        let scores = 4.0 * (s.samples * s.tokens() * s.tokens() * s.inner) as f64;
        let all: usize = payload.parts.iter().map(|p| p.rows * p.cols).sum();
        let cut: usize = payload.parts.iter().map(|p| p.rows * p.cols).filter(|n| n * s.ty.bytes() > ring).sum();
        let lost = PIECES_LOSS * linears * cut as f64 / all.max(1) as f64;
        Self { linears, lost, attention: attention * scores, traffic: STATES_PER_PASS * s.state_bytes() as f64 }
    }
}

impl Forecast {
    pub(super) fn of(plan: &Plan, need: &Need<'_>, rates: &Rates) -> Result<Self> {
        let blocks: Vec<BlockId> = need.geometry.blocks().collect();
        let mut back: Vec<BlockId> = blocks.iter().skip(first_adapted(need)).rev().copied().collect();
        let mut assignment = Assignment::new(&plan.resident, plan.slots, Slots::of(need.payloads).spans);
        let mut clock = Timeline { rates, bus: 0.0, out: 0.0, compute: 0.0, done: vec![0.0], moved: 0.0, parcels: Vec::new() };
        let streams = plan.resident.len() < blocks.len();
        let parcel = if plan.parcels.count > 0 { plan.parcel_bytes as f64 / plan.parcels.count as f64 } else { 0.0 };
        let turned = !back.is_empty();
        if turned {
            back.remove(0);
        }
        let (mut previous, mut result) = (0.0, Self::default());
        for _ in 0..2 {
            clock.moved = 0.0;
            clock.parcels = vec![0.0; plan.travelling.len()];
            let visits: Vec<BlockId> = blocks.iter().chain(&back).copied().collect();
            let places = assignment.assign(&visits)?;
            let samples: usize = need.shapes.iter().map(|s| s.samples).sum();
            clock.conditioning((plan.hosted_bytes * samples.div_ceil(LINEAR_ROWS)) as f64);
            let mut flops = 0.0;
            for (i, (block, place)) in visits.iter().zip(places).enumerate() {
                let forward = i < blocks.len();
                let work = visit(plan, need, *block, forward, !forward || (turned && i + 1 == blocks.len()))?;
                flops += work.linears + work.attention;
                let saved = usize::from(block.0) < plan.turns.saved();
                let fetched = if !forward && saved { states(need) } else { 0.0 };
                let payload = need.payloads.get(usize::from(block.0)).map_or(0, |p| p.bytes);
                let number = plan.travelling.binary_search(block).ok();
                let ready = number.map_or(0.0, |n| clock.parcel_ready(n, plan.parcels, forward));
                clock.visit(place.load, payload as f64, fetched, work, ready)?;
                if forward && saved {
                    clock.send(states(need));
                }
                if let Some(number) = number {
                    clock.parcel_moves(number, plan.parcels, forward, parcel, streams);
                }
            }
            clock.compute += 2.0 * plan.adapters as f64 / rates.memory + BETWEEN_SECONDS;
            let products = flops / rates.flops;
            let floor = products.max(clock.moved / rates.bus);
            result = Self {
                seconds: clock.compute - previous,
                floor,
                flops,
                bytes: clock.moved,
                device_bytes: plan.total(),
                host_bytes: plan.host,
            };
            previous = clock.compute;
        }
        Ok(result)
    }
}

/// Number of the first block with an adapter, where the backward pass ends; that of blocks if there is none.
pub(super) fn first_adapted(need: &Need<'_>) -> usize {
    let adapted = |b: BlockId| {
        let prefix = format!("{}.", need.geometry.block_prefix(b));
        need.targets.iter().any(|t| t.name.starts_with(&prefix))
    };
    need.geometry.blocks().position(adapted).unwrap_or(need.geometry.num_blocks())
}

/// Bytes of one state of all micro-batches.
fn states(need: &Need<'_>) -> f64 {
    need.shapes.iter().map(|s| s.state_bytes() as f64).sum()
}

fn visit(plan: &Plan, need: &Need<'_>, block: BlockId, forward: bool, backward: bool) -> Result<Work> {
    let payload = need.payloads.get(usize::from(block.0)).ok_or_else(|| Error::invariant("a block has no payload"))?;
    let double = is_double(need.geometry, block);
    let (mut work, mut passes) = (Work::default(), 0);
    let parcel = plan.travelling.contains(&block);
    for shape in need.shapes {
        if forward {
            work = work + Work::pass(shape, payload, double, 1.0, false, plan.tile);
            work.traffic += if parcel { 2.0 * shape.state_bytes() as f64 } else { 0.0 };
            passes += 1;
        }
        if backward {
            work = work + Work::pass(shape, payload, double, 2.5, false, plan.tile);
            passes += 1;
            if parcel {
                work.traffic += STATES_PER_PARCEL * shape.state_bytes() as f64;
            } else if !plan.kept.contains(&block) {
                work = work + Work::pass(shape, payload, double, 1.0, true, plan.tile);
                passes += 1;
            }
        }
    }
    // All passes of all micro-batches find what the first one brought, where the ring holds all of the block.
    if plan.tile >= dequantised(payload, need.ty) {
        passes = passes.min(1);
    }
    // A code read, a number of the activations' type written.
    work.traffic += f64::from(passes) * coded(payload) * (1 + need.ty.bytes()) as f64;
    Ok(work)
}

/// Codes of a payload.
fn coded(payload: &Payload) -> f64 {
    payload.parts.iter().filter(|p| matches!(p.form, Form::Int8 { .. })).map(|p| (p.rows * p.cols) as f64).sum()
}

/// Bytes of a block's matrices in the activations' type.
fn dequantised(payload: &Payload, ty: Ty) -> usize {
    payload.parts.iter().map(|p| (p.rows * p.cols * ty.bytes()).next_multiple_of(ALIGNMENT)).sum()
}

struct Timeline<'r> {
    rates: &'r Rates,
    /// When the bus and the compute stream are free.
    bus: f64,
    /// When the bus towards the host is free.
    out: f64,
    compute: f64,
    /// When so many visits are over.
    done: Vec<f64>,
    moved: f64,
    /// When each parcel's last way is over.
    parcels: Vec<f64>,
}

impl Timeline<'_> {
    /// When a visit finds its parcel's memory free, or its parcel there.
    fn parcel_ready(&self, number: usize, turns: Turns, forward: bool) -> f64 {
        let of = |n: usize| self.parcels.get(n).copied().unwrap_or(0.0);
        match (forward, number.checked_sub(turns.count)) {
            (true, Some(before)) => of(before),
            (false, _) if number < turns.saved() => of(number),
            _ => 0.0,
        }
    }

    /// The device reads weights on the host.
    fn conditioning(&mut self, bytes: f64) {
        let seconds = bytes / self.rates.bus;
        self.bus = self.bus.max(self.compute) + seconds;
        self.compute += seconds;
        self.moved += bytes;
    }

    /// Something goes to the host at the end of a visit.
    fn send(&mut self, bytes: f64) {
        let seconds = bytes / self.rates.bus;
        self.out = self.out.max(self.compute) + seconds;
        self.bus += DUPLEX_PART * seconds;
    }

    /// A visit is over: its parcel goes, or the one that had its memory before comes. Beside loads it has half the bus.
    fn parcel_moves(&mut self, number: usize, turns: Turns, forward: bool, bytes: f64, streams: bool) {
        let seconds = bytes / self.rates.bus;
        if forward && number < turns.saved() {
            self.send(bytes);
            if let Some(over) = self.parcels.get_mut(number) {
                *over = self.out;
            }
        }
        let before = number.checked_sub(turns.count).filter(|_| !forward);
        if let Some(over) = before.and_then(|n| self.parcels.get_mut(n)) {
            self.bus += seconds;
            self.moved += bytes;
            *over = self.compute + seconds * if streams { 2.0 } else { 1.0 };
        }
    }

    fn visit(&mut self, load: Option<u64>, bytes: f64, fetched: f64, work: Work, mut ready: f64) -> Result<()> {
        if let Some(after) = load {
            let after = usize::try_from(after).ok().and_then(|a| self.done.get(a)).copied();
            let free = after.ok_or_else(|| Error::invariant("a load waits for a visit to come"))?;
            self.bus = self.bus.max(free) + bytes / self.rates.bus;
            self.moved += bytes;
            ready = ready.max(self.bus);
        }
        self.bus += fetched / self.rates.bus;
        self.moved += fetched;
        self.compute = self.compute.max(ready) + work.seconds(self.rates);
        self.done.push(self.compute);
        Ok(())
    }
}
