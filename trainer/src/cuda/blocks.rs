//! Blocks on their way through the device: slots in the arena, filled by the copy stream, read by the compute stream, met in events only.
//!
//! [`Assignment`] says when visits are announced which slots each of them uses, and so the order of loads. A load begins when the visits to
//! the slots' old content have been queued; the copy stream then waits for their events, and the host goes on.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::rc::Rc;

use serenity_cuda::driver::{Pinned, Stream};
use serenity_cuda::ops::rows::Int8Rows;
use serenity_cuda::{Arena, Event, Gpu, Mat, Ptr, Ty};
use serenity_protocol::geometry::BlockId;
use serenity_protocol::slab::layout::{BlockLayout, PartKind};
use serenity_protocol::{Error, Result};

use super::assignment::{Assignment, Place, Slots};
use super::clock::{Clock, Phase};
use super::linear::Weight;
use super::plan::Plan;

/// How a linear lies in a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `[out, in]` at an offset.
    Dense(Ty, usize),
    /// `[out, padded]` codes and `[out]` float32 scales, each at an offset.
    Int8 {
        /// Offset of the codes.
        codes: usize,
        /// Offset of the scales.
        scales: usize,
        /// Codes of a row.
        padded: usize,
    },
}

/// A linear of a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Out.
    pub rows: usize,
    /// In.
    pub cols: usize,
    /// Where and how.
    pub form: Form,
}

/// The payload of a block: its linears in the order of the geometry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload {
    /// Its length.
    pub bytes: usize,
    /// Its linears.
    pub parts: Vec<Part>,
}

impl Payload {
    /// Of a slab's layout.
    ///
    /// # Errors
    /// [`Error::Invariant`] for codes without scales.
    pub fn of(layout: &BlockLayout) -> Result<Self> {
        let mut parts = Vec::new();
        let mut rest = layout.parts.iter();
        while let Some(part) = rest.next() {
            let form = match part.kind {
                PartKind::Bf16Rows => Form::Dense(Ty::Bf16, part.offset as usize),
                PartKind::Int8Rows => {
                    let scales = rest.next().filter(|s| s.kind == PartKind::Scales && s.linear == part.linear);
                    let scales =
                        scales.ok_or_else(|| Error::invariant(format!("the codes of '{}' travel without their scales", part.linear)))?;
                    Form::Int8 { codes: part.offset as usize, scales: scales.offset as usize, padded: part.padded_in }
                }
                PartKind::Scales => return Err(Error::invariant(format!("the scales of '{}' travel without their codes", part.linear))),
            };
            parts.push(Part { rows: part.out_features, cols: part.in_features, form });
        }
        Ok(Self { bytes: layout.bytes as usize, parts })
    }

    /// The weights of a payload that lies at `base`.
    #[must_use]
    pub fn weights(&self, base: Ptr) -> Vec<Weight> {
        let weight = |p: &Part| match p.form {
            Form::Dense(ty, offset) => Weight::Dense(Mat::new(base.offset(offset), ty, p.rows, p.cols)),
            Form::Int8 { codes, scales, padded } => {
                Weight::Int8(Int8Rows { codes: base.offset(codes), scales: base.offset(scales), rows: p.rows, padded }, p.cols)
            }
        };
        self.parts.iter().map(weight).collect()
    }
}

/// Where payloads come from.
pub trait Supply {
    /// Announces loads to come, in order, after those announced before.
    ///
    /// # Errors
    /// What the supply cannot promise.
    fn announce(&mut self, loads: &[BlockId]) -> Result<()>;

    /// Queues copies of the announced load that is due, of which `done` bytes are queued already, on the copy stream to the payload's place
    /// `to`; returns the bytes that it queued. Without `wait` it may be none; with it, it is none only if the payload is complete.
    ///
    /// # Errors
    /// What goes wrong on the way; [`Error::TryAgain`] if asked to stop while it waits.
    fn copy(&mut self, gpu: &Gpu, block: BlockId, to: Ptr, done: usize, wait: bool) -> Result<usize>;

    /// The stream behind whose work a payload is whole on the device: once that of [`Self::copy`] is queued.
    fn behind<'g>(&self, gpu: &'g Gpu) -> &'g Stream {
        gpu.copy()
    }

    /// Gives back what copies that are done have used.
    ///
    /// # Errors
    /// A fault of a copy; [`Error::Invariant`] for a payload that reached the device damaged.
    fn poll(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Bytes of one copy from the host: what another stream's copy may have to wait for.
const HOST_CHUNK_BYTES: usize = 32 << 20;

/// Payloads in page-locked memory of this process, one for each block; blocks may share one.
#[derive(Debug)]
pub struct HostSupply {
    blocks: Vec<Rc<Pinned>>,
    due: VecDeque<BlockId>,
}

impl HostSupply {
    /// Of a payload for each block.
    #[must_use]
    pub fn new(blocks: Vec<Rc<Pinned>>) -> Self {
        Self { blocks, due: VecDeque::new() }
    }
}

impl Supply for HostSupply {
    fn announce(&mut self, loads: &[BlockId]) -> Result<()> {
        self.due.extend(loads);
        Ok(())
    }

    fn copy(&mut self, gpu: &Gpu, block: BlockId, to: Ptr, done: usize, _wait: bool) -> Result<usize> {
        let payload = self.blocks.get(usize::from(block.0)).filter(|_| self.due.front() == Some(&block));
        let payload = payload.ok_or_else(|| Error::invariant(format!("block {} is not the load that is due", block.0)))?;
        let left = payload.bytes().saturating_sub(done);
        let bytes = left.min(HOST_CHUNK_BYTES);
        gpu.copy().copy_in(to.offset(done), payload.as_ref(), done, bytes)?;
        if bytes == left {
            self.due.pop_front();
        }
        Ok(bytes)
    }
}

/// What the slots have done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes copied to the device.
    pub bytes: u64,
    /// Visits whose block was on the device already.
    pub hits: u64,
    /// Visits whose block was copied for them.
    pub loads: u64,
    /// Visits at which the host waited for the supply.
    pub waits: u64,
}

struct Slot {
    base: Ptr,
    /// Recorded behind the last copy into a place that begins here, and behind what compares it ([`Supply::behind`]).
    ready: Event,
    /// Recorded on the compute stream behind the last use of it.
    used: Event,
}

struct Load {
    block: BlockId,
    place: Place,
    /// Visits that must have been finished before it begins.
    after: u64,
    done: usize,
}

/// The blocks of a run.
pub struct Blocks {
    payloads: Vec<Payload>,
    slots: Vec<Slot>,
    assignment: Assignment,
    visits: VecDeque<(BlockId, Place)>,
    loads: VecDeque<Load>,
    /// Visits finished.
    finished: u64,
    open: Option<Place>,
    supply: Box<dyn Supply>,
    stats: Stats,
}

impl Blocks {
    /// Reserves the slots of `plan`.
    ///
    /// # Errors
    /// If there is not so much memory left; the driver's.
    pub fn new(gpu: &Gpu, arena: &Arena, plan: &Plan, payloads: Vec<Payload>, supply: Box<dyn Supply>) -> Result<Self> {
        let mut slots = Vec::new();
        let mut slot = |base: Ptr| -> Result<()> {
            slots.push(Slot { base, ready: Event::new(gpu.context())?, used: Event::new(gpu.context())? });
            Ok(())
        };
        for block in &plan.resident {
            let payload = payloads.get(usize::from(block.0)).ok_or_else(|| Error::invariant("a resident block has no payload"))?;
            slot(arena.reserve(payload.bytes)?)?;
        }
        // Neighbours, for blocks that take more than one.
        let streaming = arena.reserve(plan.slots * plan.slot)?;
        (0..plan.slots).try_for_each(|i| slot(streaming.offset(i * plan.slot)))?;
        let assignment = Assignment::new(&plan.resident, plan.slots, Slots::of(&payloads).spans);
        Ok(Self {
            payloads,
            slots,
            assignment,
            visits: VecDeque::new(),
            loads: VecDeque::new(),
            finished: 0,
            open: None,
            supply,
            stats: Stats::default(),
        })
    }

    /// Announces visits to come, in order, after those announced before.
    ///
    /// # Errors
    /// The supply's.
    pub fn request(&mut self, visits: &[BlockId]) -> Result<()> {
        let assigned = self.assignment.assign(visits)?;
        let mut announced = Vec::new();
        for (block, place) in visits.iter().zip(assigned) {
            self.visits.push_back((*block, place));
            match place.load {
                None => self.stats.hits += 1,
                Some(after) => {
                    self.stats.loads += 1;
                    announced.push(*block);
                    self.loads.push_back(Load { block: *block, place, after, done: 0 });
                }
            }
        }
        self.supply.announce(&announced)
    }

    /// The weights of the next announced visit, which must be to `block`. Work queued on the compute stream from here on finds them there.
    ///
    /// # Errors
    /// [`Error::Invariant`] if another block is due or the visit before was not finished; the supply's.
    pub fn next(&mut self, gpu: &Gpu, clock: &Clock, block: BlockId) -> Result<Vec<Weight>> {
        let Some((due, place)) = self.visits.pop_front().filter(|(due, _)| *due == block && self.open.is_none()) else {
            return Err(Error::invariant(format!("block {} was visited out of order", block.0)));
        };
        let mut waited = false;
        while self.loads.iter().any(|l| l.place.first == place.first && l.block == due && l.after <= self.finished) {
            waited |= !self.advance(gpu, clock, false)?;
            if waited {
                self.advance(gpu, clock, true)?;
            }
        }
        self.stats.waits += u64::from(waited);
        self.pump(gpu, clock)?;
        self.open = Some(place);
        let slot = self.slots.get(place.first).ok_or_else(missing)?;
        clock.on(gpu, gpu.compute(), Phase::Wait, || gpu.compute().wait(&slot.ready))?;
        // Whoever dequantises reads it too; products that wait for the result hold `used` back until it has.
        gpu.side().wait(&slot.ready)?;
        Ok(self.payloads.get(usize::from(due.0)).ok_or_else(missing)?.weights(slot.base))
    }

    /// Ends the visit: all its work is queued.
    ///
    /// # Errors
    /// The supply's and the driver's.
    pub fn finish(&mut self, gpu: &Gpu, clock: &Clock) -> Result<()> {
        let place = self.open.take().ok_or_else(|| Error::invariant("a visit was finished that was not begun"))?;
        self.slots.iter().skip(place.first).take(place.count).try_for_each(|slot| gpu.compute().record(&slot.used))?;
        self.finished += 1;
        self.pump(gpu, clock)
    }

    /// Hears what the supply found in the payloads of all visits, whose work must be done.
    ///
    /// # Errors
    /// [`Error::Invariant`] if one of them was damaged: nothing that was computed with it may be used.
    pub fn confirm(&mut self) -> Result<()> {
        self.supply.poll()
    }

    /// Queues every copy that can be queued without waiting.
    ///
    /// # Errors
    /// The supply's.
    pub fn pump(&mut self, gpu: &Gpu, clock: &Clock) -> Result<()> {
        self.supply.poll()?;
        while self.advance(gpu, clock, false)? {}
        Ok(())
    }

    /// Moves the load that is due on; false if there is none, its buffer is in use, or (without `wait`) nothing has arrived.
    fn advance(&mut self, gpu: &Gpu, clock: &Clock, wait: bool) -> Result<bool> {
        let Some(load) = self.loads.front_mut().filter(|l| l.after <= self.finished) else { return Ok(false) };
        let slots = self.slots.get(load.place.first..load.place.first + load.place.count).ok_or_else(missing)?;
        let first = slots.first().ok_or_else(missing)?;
        let bytes = self.payloads.get(usize::from(load.block.0)).ok_or_else(missing)?.bytes;
        if load.done == 0 {
            slots.iter().try_for_each(|slot| gpu.copy().wait(&slot.used))?;
        }
        let (supply, block, done) = (&mut self.supply, load.block, load.done);
        let queued = clock.on(gpu, gpu.copy(), Phase::Copy, || supply.copy(gpu, block, first.base, done, wait))?;
        load.done += queued;
        self.stats.bytes += queued as u64;
        if load.done >= bytes {
            self.supply.behind(gpu).record(&first.ready)?;
            self.loads.pop_front();
            return Ok(true);
        }
        Ok(queued > 0)
    }

    /// The payloads of all blocks.
    #[must_use]
    pub fn payloads(&self) -> &[Payload] {
        &self.payloads
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.stats
    }
}

fn missing() -> Error {
    Error::invariant("a block or its slot is not there")
}
