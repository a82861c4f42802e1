//! The trainer's half of the ring: post requests, lease chunks in order, release them.
//!
//! A chunk is used only if the slot's descriptor carries a valid checksum and names the ordinal, block, chunk and slab that are due; the
//! descriptor is read before the swap to LEASED, and the swap succeeds only for the generation it was read for. Anything else means
//! "not delivered yet": the consumer waits and looks again, which is also how it survives a loader's restart.

use std::collections::VecDeque;

use super::producer::{Catalogue, delivery_slot, fenced_error, next_epoch, no_such_state, request_tag};
use super::words::{COUNT_MAX, ChunkId, Descriptor, Shape, SlotWord, State, Words, consumer, pack_epoch, slot, unpack_epoch};
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
    /// Checksum that the payload must have: compare it with [`crate::slab::layout::SlabLayout::payload_checksum`] of the bytes.
    pub checksum: u64,
    /// Generation of the slot.
    pub generation: u64,
}

/// The consumer's state machine over memory `M`.
pub struct Consumer<M> {
    memory: M,
    shape: Shape,
    catalogue: Catalogue,
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
    /// Takes the consumer's role (the caller holds the role lock, so any earlier consumer is dead): a new epoch, an empty queue, and
    /// the leases of the dead consumer freed.
    ///
    /// # Errors
    /// [`Error::Invariant`] if a state word holds no state.
    pub fn attach(memory: M, shape: Shape, catalogue: Catalogue) -> Result<Self> {
        let epoch = next_epoch(u64::from(unpack_epoch(memory.load(consumer::POSTED)).0));
        let this = Self { memory, shape, catalogue, epoch, posted: 0, ordinal_end: 0, open: VecDeque::new(), sequence: 0, chunk: 0 };
        // Position before queue: the loader ignores a position whose epoch is not the queue's.
        this.memory.store(consumer::POSITION, pack_epoch(epoch, 0));
        this.memory.store(consumer::POSTED, pack_epoch(epoch, 0));
        for index in 0..shape.slots {
            let at = shape.slot(index) + slot::STATE;
            let raw = this.memory.load(at);
            let word = SlotWord::unpack(raw).ok_or_else(|| no_such_state(index, raw))?;
            if word.state == State::Leased {
                let freed = SlotWord { state: State::Free, epoch, ..word };
                this.memory.swap(at, raw, freed.pack()).map_err(|found| this.fenced(index, found))?;
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
            if self.posted >= u64::from(u32::MAX) {
                return Err(Error::invariant("the request queue has used up its sequence numbers").advice("restart the trainer"));
            }
            let at = self.shape.request(self.posted);
            self.memory.store(at + 1, self.ordinal_end);
            self.memory.store(at, request_tag(self.epoch, self.posted, block));
            self.open.push_back((block, self.ordinal_end));
            self.ordinal_end = (self.ordinal_end + u64::from(chunks)) & COUNT_MAX;
            self.posted += 1;
            self.memory.store(consumer::POSTED, pack_epoch(self.epoch, self.posted));
        }
        Ok(count)
    }

    /// The chunk that is due, if it has been delivered. `None`: wait and ask again.
    ///
    /// # Errors
    /// [`Error::Invariant`] if nothing is requested, [`Error::Absent`] if another consumer has taken over.
    pub fn try_lease(&mut self) -> Result<Option<Leased>> {
        self.check_fence()?;
        let Some(&(block, first)) = self.open.front() else {
            return Err(Error::invariant("a chunk was awaited that was never requested"));
        };
        let due = ChunkId { block, chunk: self.chunk };
        let ordinal = pack_epoch(self.epoch, first + u64::from(self.chunk));
        let delivery = self.memory.load(self.shape.delivery(unpack_epoch(ordinal).1));
        let Some(index) = delivery_slot(delivery, ordinal).filter(|s| *s < self.shape.slots) else { return Ok(None) };
        let at = self.shape.slot(index);
        let raw = self.memory.load(at + slot::STATE);
        let word = SlotWord::unpack(raw).ok_or_else(|| no_such_state(index, raw))?;
        let Some(descriptor) = Descriptor::read(&self.memory, at) else { return Ok(None) };
        let usable = word.state == State::Ready
            && descriptor.generation == word.generation
            && descriptor.ordinal == ordinal
            && descriptor.content == due
            && descriptor.signature == self.catalogue.signature;
        if !usable {
            return Ok(None);
        }
        let ours = SlotWord { state: State::Leased, epoch: self.epoch, ..word };
        if self.memory.swap(at + slot::STATE, raw, ours.pack()).is_err() {
            return Ok(None);
        }
        self.step_position();
        Ok(Some(Leased { slot: index, content: due, bytes: descriptor.bytes, checksum: descriptor.payload, generation: word.generation }))
    }

    fn step_position(&mut self) {
        let chunks = self.open.front().and_then(|(b, _)| self.catalogue.chunks.get(usize::from(*b)).copied()).unwrap_or(0);
        self.chunk += 1;
        if self.chunk >= chunks {
            self.chunk = 0;
            self.sequence += 1;
            self.open.pop_front();
        }
        // Stored before the release of the slot: a loader that sees the slot free sees the position beyond it.
        self.memory.store(consumer::POSITION, pack_epoch(self.epoch, self.sequence << 16 | u64::from(self.chunk)));
    }

    /// Gives a slot back. Its content stays for the loader to publish again.
    ///
    /// # Errors
    /// [`Error::Absent`] if another consumer has taken over, [`Error::Invariant`] if the slot is not leased to us.
    pub fn release(&mut self, leased: &Leased) -> Result<()> {
        self.free(leased, true)
    }

    /// Gives a slot back whose payload does not match its checksum: its descriptor is made invalid, so nobody publishes it again.
    ///
    /// # Errors
    /// As [`Self::release`].
    pub fn release_corrupt(&mut self, leased: &Leased) -> Result<()> {
        self.free(leased, false)
    }

    fn free(&mut self, leased: &Leased, keep: bool) -> Result<()> {
        self.check_fence()?;
        let at = self.shape.slot(leased.slot);
        if !keep {
            Descriptor::invalidate(&self.memory, at);
        }
        let ours = SlotWord { state: State::Leased, epoch: self.epoch, generation: leased.generation };
        let freed = SlotWord { state: State::Free, ..ours };
        self.memory.swap(at + slot::STATE, ours.pack(), freed.pack()).map_err(|found| self.fenced(leased.slot, found))
    }

    /// Says that no more requests will come.
    pub fn finish(&mut self) {
        self.memory.store(consumer::FINISHED, u64::from(self.epoch));
    }

    fn check_fence(&self) -> Result<()> {
        let now = unpack_epoch(self.memory.load(consumer::POSTED)).0;
        if now == self.epoch { Ok(()) } else { Err(fenced_error("consumer", self.epoch, u64::from(now))) }
    }

    fn fenced(&self, index: usize, found: u64) -> Error {
        match self.check_fence() {
            Err(e) => e,
            Ok(()) => {
                Error::invariant(format!("slot {index} changed while the consumer held it")).found(format!("{:?}", SlotWord::unpack(found)))
            }
        }
    }
}
