//! The trainer's half of the ring: post requests, lease chunks in order, release them.
//!
//! A consumer knows its own area and the slots' descriptors, never another consumer. The delivery word of the chunk that is due names
//! a slot; the consumer takes its share of that slot from READY to LEASED with one swap, which succeeds only for this epoch and ordinal. From
//! then on the loader leaves the slot alone, so what the descriptor says now is what the bytes are. Anything not yet READY means "not
//! delivered yet": the consumer waits and looks again, which is also how it survives a loader's restart. Any number of chunks may be held,
//! and they are given back in any order.
//!
//! Failure: a leased slot whose descriptor is not that of the chunk that is due is an [`Error::Invariant`]; nothing of it is used.

use std::collections::VecDeque;

use super::producer::{Catalogue, delivery_slot, fenced_error, next_epoch, no_such_state, request_tag};
use super::words::{ChunkId, Descriptor, ORDINAL_MAX, Shape, ShareWord, SlotWord, State, Words, consumer, pack_epoch, slot, unpack_epoch};
use crate::error::{Error, Result};

/// A chunk in the consumer's hands. Give it back with [`Consumer::release`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leased {
    /// Slot.
    pub slot: usize,
    /// What it is.
    pub content: ChunkId,
    /// Payload bytes.
    pub bytes: u64,
    /// Checksum that the payload must have.
    pub checksum: u64,
    /// Generation of the slot.
    pub generation: u64,
    /// Place in the stream of chunks.
    pub ordinal: u64,
}

/// The consumer's state machine over memory `M`.
pub struct Consumer<M> {
    memory: M,
    shape: Shape,
    catalogue: Catalogue,
    /// Which of the ring's consumers this is.
    index: usize,
    epoch: u16,
    /// Requests posted.
    posted: u64,
    /// Ordinal of the first chunk of the next request to post.
    ordinal_end: u64,
    /// Requests posted and not yet fully leased, with the ordinal of their first chunk.
    open: VecDeque<(u16, u64)>,
    /// Sequence of `open`'s front, and the chunk of it that is leased next.
    sequence: u64,
    chunk: u16,
}

impl<M: Words> Consumer<M> {
    /// [`Self::attach_as`] the first consumer.
    ///
    /// # Errors
    /// As [`Self::attach_as`].
    pub fn attach(memory: M, shape: Shape, catalogue: Catalogue) -> Result<Self> {
        Self::attach_as(memory, shape, catalogue, 0)
    }

    /// Takes the role of consumer `index` (the caller holds its role lock, so any earlier one is dead): a new epoch, an empty queue,
    /// and the leases of the dead consumer freed.
    ///
    /// # Errors
    /// [`Error::Config`] if the ring has no such consumer, [`Error::Invariant`] if a share holds no state.
    pub fn attach_as(memory: M, shape: Shape, catalogue: Catalogue, index: usize) -> Result<Self> {
        if index >= shape.consumers {
            return Err(Error::config("the ring has no such consumer")
                .expected(format!("0 to {}", shape.consumers.saturating_sub(1)))
                .found(index)
                .advice("start the loader with --consumers N, and each trainer with its own --consumer below N"));
        }
        let epoch = next_epoch(u64::from(unpack_epoch(memory.load(shape.at(index, consumer::POSTED))).0));
        let this = Self { memory, shape, catalogue, index, epoch, posted: 0, ordinal_end: 0, open: VecDeque::new(), sequence: 0, chunk: 0 };
        // Position before queue: the loader ignores a position whose epoch is not the queue's.
        this.memory.store(shape.at(index, consumer::POSITION), pack_epoch(epoch, 0));
        this.memory.store(shape.at(index, consumer::POSTED), pack_epoch(epoch, 0));
        for slot in 0..shape.slots {
            let at = shape.share(index, slot);
            let raw = this.memory.load(at);
            let share = ShareWord::unpack(raw).ok_or_else(|| no_such_state(slot, raw))?;
            // The loader may be giving the dead consumer's leases back at the same moment: whoever is second has nothing to do.
            if share.state == State::Leased && this.memory.swap(at, raw, ShareWord { state: State::Free, ..share }.pack()).is_err() {
                this.check_fence()?;
            }
        }
        Ok(this)
    }

    /// This consumer's epoch.
    #[must_use]
    pub fn epoch(&self) -> u16 {
        self.epoch
    }

    /// Posts requests, in order, and returns how many fitted into the queue. The driver wakes the loader afterwards.
    ///
    /// # Errors
    /// [`Error::Invariant`] for a block that the model does not have, or after 2^32 requests; [`Error::Absent`] if another consumer has
    /// taken over.
    pub fn post(&mut self, blocks: &[u16]) -> Result<usize> {
        self.check_fence()?;
        let space = self.shape.requests - self.open.len();
        let count = space.min(blocks.len());
        for &block in &blocks[..count] {
            let Some(&chunks) = self.catalogue.chunks.get(usize::from(block)) else {
                return Err(Error::invariant("a block was requested that the model does not have").found(block));
            };
            if self.posted >= u64::from(u32::MAX) || self.ordinal_end + u64::from(chunks) > ORDINAL_MAX {
                return Err(Error::invariant("the request queue has used up its sequence numbers").advice("restart the trainer"));
            }
            let at = self.shape.request(self.index, self.posted);
            self.memory.store(at + 1, self.ordinal_end);
            self.memory.store(at, request_tag(self.epoch, self.posted, block));
            self.open.push_back((block, self.ordinal_end));
            self.ordinal_end += u64::from(chunks);
            self.posted += 1;
            self.memory.store(self.shape.at(self.index, consumer::POSTED), pack_epoch(self.epoch, self.posted));
        }
        Ok(count)
    }

    /// The chunk that is due, if it has been delivered. `None`: wait and ask again.
    ///
    /// # Errors
    /// [`Error::Invariant`] if nothing is requested or a slot is not what it was delivered as, [`Error::Absent`] if another consumer has
    /// taken over.
    pub fn try_lease(&mut self) -> Result<Option<Leased>> {
        self.check_fence()?;
        let Some(&(block, first)) = self.open.front() else {
            return Err(Error::invariant("a chunk was awaited that was never requested"));
        };
        let due = ChunkId { block, chunk: self.chunk };
        let ordinal = first + u64::from(self.chunk);
        let delivery = self.memory.load(self.shape.delivery(self.index, ordinal));
        let Some(slot) = delivery_slot(delivery, pack_epoch(self.epoch, ordinal)).filter(|s| *s < self.shape.slots) else {
            return Ok(None);
        };
        let ready = ShareWord { state: State::Ready, epoch: self.epoch, ordinal };
        let share = self.shape.share(self.index, slot);
        // The look spares the loader's cache line a failing swap.
        if self.memory.load(share) != ready.pack() || self.memory.swap(share, ready.pack(), self.lease_word(ordinal)).is_err() {
            return Ok(None);
        }
        let leased = self.describe(slot, due, ordinal)?;
        self.step_position();
        Ok(Some(leased))
    }

    /// Reads what a slot holds that has just become ours.
    fn describe(&self, slot: usize, due: ChunkId, ordinal: u64) -> Result<Leased> {
        let at = self.shape.slot(slot);
        let raw = self.memory.load(at + slot::STATE);
        let word = SlotWord::unpack(raw).ok_or_else(|| no_such_state(slot, raw))?;
        let descriptor = Descriptor::read(&self.memory, at).filter(|d| {
            word.state == State::Free && d.generation == word.generation && d.content == due && d.signature == self.catalogue.signature
        });
        let Some(descriptor) = descriptor else {
            self.check_fence()?;
            return Err(Error::invariant(format!("slot {slot} of the ring does not hold what was delivered in it"))
                .expected(format!("block {} chunk {}", due.block, due.chunk))
                .found(format!("{word:?}, {:?}", Descriptor::read(&self.memory, at)))
                .advice("something else wrote to the shared segment; nothing of the slot was used"));
        };
        let Descriptor { bytes, payload, generation, .. } = descriptor;
        Ok(Leased { slot, content: due, bytes, checksum: payload, generation, ordinal })
    }

    fn lease_word(&self, ordinal: u64) -> u64 {
        ShareWord { state: State::Leased, epoch: self.epoch, ordinal }.pack()
    }

    fn step_position(&mut self) {
        let chunks = self.open.front().and_then(|(b, _)| self.catalogue.chunks.get(usize::from(*b)).copied()).unwrap_or(0);
        self.chunk += 1;
        if self.chunk >= chunks {
            self.chunk = 0;
            self.sequence += 1;
            self.open.pop_front();
        }
        // Stored before the release of the slot: a loader that sees the share free sees the position beyond it.
        let position = pack_epoch(self.epoch, self.sequence << 16 | u64::from(self.chunk));
        self.memory.store(self.shape.at(self.index, consumer::POSITION), position);
    }

    /// Gives a slot back. Its content stays, for other consumers and for later.
    ///
    /// # Errors
    /// [`Error::Absent`] if another consumer has taken over, [`Error::Invariant`] if the slot is not leased to us.
    pub fn release(&mut self, leased: &Leased) -> Result<()> {
        self.check_fence()?;
        let free = ShareWord { state: State::Free, epoch: self.epoch, ordinal: leased.ordinal };
        self.memory
            .swap(self.shape.share(self.index, leased.slot), self.lease_word(leased.ordinal), free.pack())
            .map_err(|found| self.fenced(leased.slot, found))
    }

    /// Gives a slot back whose payload does not match its checksum, marked: the loader offers it to nobody again.
    ///
    /// # Errors
    /// As [`Self::release`].
    pub fn release_corrupt(&mut self, leased: &Leased) -> Result<()> {
        self.check_fence()?;
        // While the lease holds the generation cannot change. Another consumer may mark the same.
        self.memory.store(self.shape.slot(leased.slot) + slot::DAMAGED, leased.generation);
        self.release(leased)
    }

    /// Says that no more requests will come.
    pub fn finish(&mut self) {
        self.memory.store(self.shape.at(self.index, consumer::FINISHED), u64::from(self.epoch));
    }

    fn check_fence(&self) -> Result<()> {
        let now = unpack_epoch(self.memory.load(self.shape.at(self.index, consumer::POSTED))).0;
        if now == self.epoch { Ok(()) } else { Err(fenced_error("consumer", self.epoch, u64::from(now))) }
    }

    fn fenced(&self, index: usize, found: u64) -> Error {
        match self.check_fence() {
            Err(e) => e,
            Ok(()) => Error::invariant(format!("slot {index} changed while the consumer held it"))
                .found(format!("{:?}", ShareWord::unpack(found))),
        }
    }
}
