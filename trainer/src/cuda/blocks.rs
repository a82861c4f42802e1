//! Blocks on their way through the device: buffers in the arena, filled by the copy stream, read by the compute stream, met in events only.
//!
//! When visits are announced, each gets its buffer at once: the block's own if it stays resident, the one that still holds the block if there
//! is one, else the one whose content is needed furthest in the future (least recently visited first among those not needed). That decision
//! looks at the visits alone, never at what happens to be finished, so that the order of loads, which the loader follows, is fixed. A load
//! begins when the visits to the buffer's old content have been queued; the copy stream then waits for their event, and the host goes on.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::rc::Rc;

use serenity_cuda::driver::Pinned;
use serenity_cuda::ops::rows::Int8Rows;
use serenity_cuda::{Arena, Event, Gpu, Mat, Ptr, Ty};
use serenity_protocol::geometry::BlockId;
use serenity_protocol::slab::layout::{BlockLayout, PartKind};
use serenity_protocol::{Error, Result};

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

    /// Gives back what copies that are done have used.
    ///
    /// # Errors
    /// A fault of a copy.
    fn poll(&mut self) -> Result<()> {
        Ok(())
    }
}

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
        let bytes = payload.bytes().saturating_sub(done);
        gpu.copy().copy_in(to.offset(done), payload.as_ref(), done, bytes)?;
        self.due.pop_front();
        Ok(bytes)
    }
}

/// What the buffers have done.
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

struct Buffer {
    base: Ptr,
    /// Recorded on the copy stream behind the last copy into it.
    ready: Event,
    /// Recorded on the compute stream behind the last use of it.
    used: Event,
}

struct Load {
    block: BlockId,
    buffer: usize,
    /// Visits that must have been finished before it begins.
    after: u64,
    done: usize,
}

/// The assignment of visits to buffers, without device.
#[derive(Debug)]
struct Assignment {
    /// For each buffer: the block that alone uses it, what it holds once all loads so far are done, and the number of its last visit.
    buffers: Vec<(Option<BlockId>, Option<BlockId>, u64)>,
    /// Visits assigned.
    count: u64,
}

impl Assignment {
    /// The buffer of each visit, and the visits that must be finished before it is loaded (`None`: it is there).
    fn assign(&mut self, visits: &[BlockId]) -> Result<Vec<(usize, Option<u64>)>> {
        let mut result = Vec::with_capacity(visits.len());
        for (i, block) in visits.iter().enumerate() {
            let own = self.buffers.iter().position(|(owner, _, _)| *owner == Some(*block));
            let holds = self.buffers.iter().position(|(_, holds, _)| *holds == Some(*block));
            let next_use = |held: Option<BlockId>| {
                let rest = visits.get(i + 1..).unwrap_or_default();
                held.and_then(|b| rest.iter().position(|v| *v == b)).unwrap_or(usize::MAX)
            };
            let victim = || {
                let free = self.buffers.iter().enumerate().filter(|(_, (owner, _, _))| owner.is_none());
                free.max_by_key(|(_, (_, held, last))| (next_use(*held), std::cmp::Reverse(*last))).map(|(index, _)| index)
            };
            let index = holds.or(own).or_else(victim).ok_or_else(|| Error::invariant("there is no buffer for a streamed block"))?;
            self.count += 1;
            let buffer = self.buffers.get_mut(index).ok_or_else(|| Error::invariant("a buffer is not there"))?;
            result.push((index, holds.is_none().then_some(buffer.2)));
            (buffer.1, buffer.2) = (Some(*block), self.count);
        }
        Ok(result)
    }
}

/// The block buffers of a run.
pub struct Blocks {
    payloads: Vec<Payload>,
    buffers: Vec<Buffer>,
    assignment: Assignment,
    visits: VecDeque<(BlockId, usize)>,
    loads: VecDeque<Load>,
    /// Visits finished.
    finished: u64,
    open: Option<usize>,
    supply: Box<dyn Supply>,
    stats: Stats,
}

impl Blocks {
    /// Reserves the buffers of `plan`.
    ///
    /// # Errors
    /// If there is not so much memory left; the driver's.
    pub fn new(gpu: &Gpu, arena: &Arena, plan: &Plan, payloads: Vec<Payload>, supply: Box<dyn Supply>) -> Result<Self> {
        let (mut buffers, mut table) = (Vec::new(), Vec::new());
        let mut take = |bytes: usize, owner: Option<BlockId>| -> Result<()> {
            let buffer = Buffer { base: arena.reserve(bytes)?, ready: Event::new(gpu.context())?, used: Event::new(gpu.context())? };
            buffers.push(buffer);
            table.push((owner, None, 0));
            Ok(())
        };
        for block in &plan.resident {
            let payload = payloads.get(usize::from(block.0)).ok_or_else(|| Error::invariant("a resident block has no payload"))?;
            take(payload.bytes, Some(*block))?;
        }
        (0..plan.buffers).try_for_each(|_| take(plan.buffer, None))?;
        Ok(Self {
            payloads,
            buffers,
            assignment: Assignment { buffers: table, count: 0 },
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
        for (block, (buffer, load)) in visits.iter().zip(assigned) {
            self.visits.push_back((*block, buffer));
            match load {
                None => self.stats.hits += 1,
                Some(after) => {
                    self.stats.loads += 1;
                    announced.push(*block);
                    self.loads.push_back(Load { block: *block, buffer, after, done: 0 });
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
        let Some((due, index)) = self.visits.pop_front().filter(|(due, _)| *due == block && self.open.is_none()) else {
            return Err(Error::invariant(format!("block {} was visited out of order", block.0)));
        };
        let mut waited = false;
        while self.loads.iter().any(|l| l.buffer == index && l.block == due && l.after <= self.finished) {
            waited |= !self.advance(gpu, clock, false)?;
            if waited {
                self.advance(gpu, clock, true)?;
            }
        }
        self.stats.waits += u64::from(waited);
        self.pump(gpu, clock)?;
        self.open = Some(index);
        let missing = || Error::invariant("a block or its buffer is not there");
        let buffer = self.buffers.get(index).ok_or_else(missing)?;
        clock.on(gpu, gpu.compute(), Phase::Wait, || gpu.compute().wait(&buffer.ready))?;
        Ok(self.payloads.get(usize::from(due.0)).ok_or_else(missing)?.weights(buffer.base))
    }

    /// Ends the visit: all its work is queued.
    ///
    /// # Errors
    /// The supply's and the driver's.
    pub fn finish(&mut self, gpu: &Gpu, clock: &Clock) -> Result<()> {
        let index = self.open.take().ok_or_else(|| Error::invariant("a visit was finished that was not begun"))?;
        if let Some(buffer) = self.buffers.get(index) {
            gpu.compute().record(&buffer.used)?;
        }
        self.finished += 1;
        self.pump(gpu, clock)
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
        let missing = || Error::invariant("a block or its buffer is not there");
        let buffer = self.buffers.get(load.buffer).ok_or_else(missing)?;
        let bytes = self.payloads.get(usize::from(load.block.0)).ok_or_else(missing)?.bytes;
        if load.done == 0 {
            gpu.copy().wait(&buffer.used)?;
        }
        let (supply, block, done) = (&mut self.supply, load.block, load.done);
        let queued = clock.on(gpu, gpu.copy(), Phase::Copy, || supply.copy(gpu, block, buffer.base, done, wait))?;
        load.done += queued;
        self.stats.bytes += queued as u64;
        if load.done >= bytes {
            gpu.copy().record(&buffer.ready)?;
            self.loads.pop_front();
            return Ok(true);
        }
        Ok(queued > 0)
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.stats
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn assignment(owners: &[u16], free: usize) -> Assignment {
        let owned = owners.iter().map(|b| (Some(BlockId(*b)), None, 0));
        Assignment { buffers: owned.chain(std::iter::repeat_n((None, None, 0), free)).collect(), count: 0 }
    }

    fn there_and_back(n: u16) -> Vec<BlockId> {
        (0..n).chain((0..n - 1).rev()).map(BlockId).collect()
    }

    /// Plays visits and loads in order and checks that every visit finds its block, and that no load overwrites what a visit still needs.
    fn loads_of(a: &mut Assignment, visits: &[BlockId], contents: &mut [Option<BlockId>], before: u64) -> usize {
        let assigned = a.assign(visits).unwrap();
        let mut loads = 0;
        for (i, (block, (buffer, load))) in visits.iter().zip(assigned).enumerate() {
            if let Some(after) = load {
                assert!(after <= before + i as u64, "a load waits for a visit behind its own");
                contents[buffer] = Some(*block);
                loads += 1;
            }
            assert_eq!(contents[buffer], Some(*block));
        }
        loads
    }

    #[test]
    fn every_visit_finds_its_block_and_the_turn_is_reused() {
        for buffers in 1..6 {
            let mut a = assignment(&[], buffers);
            let mut contents = vec![None; buffers];
            let visits = there_and_back(10);
            let first = loads_of(&mut a, &visits, &mut contents, 0);
            // All once, and on the way back all but those that the buffers held at the turn.
            assert_eq!(first, 10 + 10 - buffers, "{buffers}");
            let second = loads_of(&mut a, &visits, &mut contents, visits.len() as u64);
            assert!(second <= first);
        }
    }

    #[test]
    fn resident_blocks_are_loaded_once() {
        let mut a = assignment(&[1, 4, 7], 2);
        let mut contents = vec![None; 5];
        let visits = there_and_back(9);
        loads_of(&mut a, &visits, &mut contents, 0);
        let assigned = a.assign(&visits).unwrap();
        let resident = |b: &BlockId| [1, 4, 7].contains(&b.0);
        assert!(visits.iter().zip(assigned).filter(|(b, _)| resident(b)).all(|(_, (_, load))| load.is_none()));
    }

    #[test]
    fn two_buffers_are_enough_to_load_ahead() {
        let mut a = assignment(&[], 2);
        let visits = there_and_back(8);
        let assigned = a.assign(&visits).unwrap();
        // The load for visit i (from 0) begins at the latest when visit i - 2 is finished, that is while i - 1 computes.
        for (i, (_, load)) in assigned.iter().enumerate() {
            assert!(load.is_none_or(|after| after as usize <= i.saturating_sub(1)), "visit {i}: {load:?}");
        }
    }

    #[test]
    fn streaming_without_buffers_is_refused() {
        assert!(assignment(&[0], 0).assign(&[BlockId(1)]).is_err());
    }
}
