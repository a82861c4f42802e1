//! The loader's half of the ring: which chunk is due to whom, which slot it goes to, and what survives a crash.
//!
//! The producer walks the requests of every consumer in order, the one with the least ahead of it first. A chunk whose bytes are in a slot
//! is offered without a fill, whoever else has it; otherwise the free slot whose content is needed furthest in the future is
//! overwritten (Belady's rule: the request queues are the future). So a chunk that several consumers want is filled once as long as it stays.
//! Nothing here touches payload bytes or makes a system call: the driver asks [`Producer::next_action`], does the work, and says
//! [`Producer::publish`].
//!
//! Invariants: a slot in FILLING with our epoch is ours alone and no consumer has a share of it; its descriptor is invalid until
//! [`Producer::publish`]; a delivery word is written before its share becomes READY (the other way round, a crash between the two would leave a
//! READY share that nobody can find); nothing is delivered that the consumer has passed.
//!
//! Progress: a consumer may have at most [`Shape::quota`] slots READY, LEASED or on their way, a consumer's places are filled in order, and
//! what is READY with a gap before it counts against its own part. So whatever the others do, or fail to do, a consumer whose
//! next chunk is missing finds a slot: the others' parts together leave it its own, and of that one slot at least is neither leased nor
//! waiting behind the gap.
//!
//! After a crash [`Producer::attach`] frees what a dead loader was filling and goes on at each consumer's position: a delivery stands if
//! its share still carries that ordinal, otherwise it is made again. A consumer whose death the driver has proven is given up with
//! [`Producer::bury`]: its shares are freed, its requests forgotten.

use std::collections::HashMap;

use super::stream::Stream;
use super::words::{
    ChunkId, Descriptor, GENERATION_MAX, Shape, ShareWord, SlotWord, State, Words, consumer, loader, pack_epoch, slot, unpack_epoch,
};
use crate::error::{Error, Result};

mod victim;

/// What the driver should do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing is due, or no slot is worth overwriting: sleep until woken.
    Wait,
    /// Fill the slot with the chunk's bytes, then [`Producer::publish`] or, on failure, [`Producer::abandon`].
    Fill(Job),
    /// The slot holds the chunk since before this loader started: compare its payload with `checksum`, then [`Producer::publish`] if
    /// equal or [`Producer::abandon`].
    Verify(Job, u64),
    /// A retained chunk was offered without work.
    Republished(Job),
}

/// A slot that is prepared for one place in a consumer's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// Slot.
    pub slot: usize,
    /// What goes into it.
    pub content: ChunkId,
    /// Consumer that it is for: the one to wake.
    pub consumer: usize,
    /// Consumer epoch and ordinal.
    pub ordinal: u64,
    /// Generation of the slot.
    pub generation: u64,
}

/// What the producer knows of the model: how many chunks each block has, and which slab they come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Catalogue {
    /// Chunks of each block.
    pub chunks: Vec<u16>,
    /// Signature of the slab.
    pub signature: u64,
}

/// What this loader knows of a slot beyond the shared words.
#[derive(Debug, Clone, Copy, Default)]
struct Local {
    /// What it holds, or is being filled with.
    content: Option<ChunkId>,
    /// This loader wrote or compared the payload.
    trusted: bool,
    /// What it is being prepared for.
    job: Option<Job>,
    /// When it was last offered to a consumer, in offers.
    offered: u64,
}

/// The loader's state machine over memory `M`.
pub struct Producer<M> {
    memory: M,
    shape: Shape,
    catalogue: Catalogue,
    epoch: u16,
    streams: Vec<Stream>,
    /// Where each chunk's bytes are: `slots[content[c]].content == Some(c)`.
    content: HashMap<ChunkId, usize>,
    slots: Vec<Local>,
    offers: u64,
}

impl<M> std::fmt::Debug for Producer<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Producer").field("epoch", &self.epoch).field("streams", &self.streams).field("slots", &self.slots).finish()
    }
}

impl<M: Words> Producer<M> {
    /// Takes the loader's role (the caller holds the role lock, so any earlier loader is dead): a new epoch, FILLING slots freed,
    /// retained and READY content found again.
    ///
    /// # Errors
    /// [`Error::Invariant`] if a state word holds no state.
    pub fn attach(memory: M, shape: Shape, catalogue: Catalogue) -> Result<Self> {
        let epoch = next_epoch(memory.load(loader::EPOCH));
        memory.store(loader::EPOCH, u64::from(epoch));
        let mut this = Self {
            streams: (0..shape.consumers).map(|c| Stream::new(c, catalogue.chunks.len())).collect(),
            content: HashMap::new(),
            slots: vec![Local::default(); shape.slots],
            memory,
            shape,
            catalogue,
            epoch,
            offers: 0,
        };
        for index in 0..shape.slots {
            this.recover_slot(index)?;
        }
        for consumer in 0..shape.consumers {
            this.follow(consumer)?;
        }
        Ok(this)
    }

    /// This loader's epoch.
    #[must_use]
    pub fn epoch(&self) -> u16 {
        self.epoch
    }

    fn slot_word(&self, index: usize) -> Result<(u64, SlotWord)> {
        let raw = self.memory.load(self.shape.slot(index) + slot::STATE);
        let word = SlotWord::unpack(raw).ok_or_else(|| no_such_state(index, raw))?;
        Ok((raw, word))
    }

    fn share(&self, consumer: usize, index: usize) -> Result<(u64, ShareWord)> {
        let raw = self.memory.load(self.shape.share(consumer, index));
        let share = ShareWord::unpack(raw).ok_or_else(|| no_such_state(index, raw))?;
        Ok((raw, share))
    }

    /// Whether some consumer has a share of the slot. Once false, it stays false until this loader offers the slot.
    fn is_out(&self, index: usize) -> Result<bool> {
        for consumer in 0..self.shape.consumers {
            if self.share(consumer, index)?.1.state != State::Free {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Frees a share if `which` says so. It may fail only because the consumer has taken or freed it meanwhile.
    fn free_share(&self, consumer: usize, index: usize, which: impl Fn(ShareWord) -> bool) -> Result<()> {
        let (raw, share) = self.share(consumer, index)?;
        let freed = ShareWord { state: State::Free, ..share };
        if which(share) && self.memory.swap(self.shape.share(consumer, index), raw, freed.pack()).is_err() {
            self.check_fence()?;
        }
        Ok(())
    }

    /// The slot's descriptor, if its bytes may be used.
    fn intact(&self, index: usize, word: SlotWord) -> Option<Descriptor> {
        let at = self.shape.slot(index);
        let damaged = self.memory.load(at + slot::DAMAGED);
        let ours = |d: &Descriptor| d.signature == self.catalogue.signature && d.generation == word.generation && d.generation != damaged;
        Descriptor::read(&self.memory, at).filter(ours)
    }

    fn recover_slot(&mut self, index: usize) -> Result<()> {
        let at = self.shape.slot(index);
        let (raw, word) = self.slot_word(index)?;
        if word.state == State::Filling {
            Descriptor::invalidate(&self.memory, at);
            let freed = SlotWord { state: State::Free, epoch: self.epoch, ..word };
            return self.memory.swap(at + slot::STATE, raw, freed.pack()).map_err(|found| self.fenced(index, found));
        }
        let known = |d: &Descriptor| self.catalogue.chunks.get(usize::from(d.content.block)).is_some_and(|n| d.content.chunk < *n);
        match self.intact(index, word).filter(known) {
            Some(descriptor) => self.remember(index, descriptor.content, false),
            // Nothing that a consumer could use: whoever has not taken it yet is served anew.
            None => {
                for consumer in 0..self.shape.consumers {
                    self.free_share(consumer, index, |s| s.state == State::Ready)?;
                }
            }
        }
        Ok(())
    }

    fn remember(&mut self, index: usize, content: ChunkId, trusted: bool) {
        self.forget(index);
        if let Some(before) = self.content.insert(content, index).filter(|before| *before != index) {
            self.slots[before].content = None;
        }
        self.slots[index] = Local { content: Some(content), trusted, ..self.slots[index] };
    }

    fn forget(&mut self, index: usize) {
        if let Some(content) = self.slots[index].content.take() {
            self.content.remove(&content);
        }
        self.slots[index].trusted = false;
    }

    /// The next thing to do. Call until it says [`Action::Wait`].
    ///
    /// # Errors
    /// [`Error::Absent`] if another loader has taken the role (fenced), [`Error::Invariant`] if shared state is impossible.
    pub fn next_action(&mut self) -> Result<Action> {
        self.check_fence()?;
        for consumer in 0..self.shape.consumers {
            self.follow(consumer)?;
        }
        if self.shape.consumers == 1 {
            return self.next_for(0);
        }
        // Whoever has the least ahead is the nearest to standing still.
        let mut order = Vec::with_capacity(self.shape.consumers);
        for consumer in 0..self.shape.consumers {
            if let Some((_, ordinal)) = self.due(consumer)? {
                order.push((self.supply(consumer, ordinal)?.1, consumer));
            }
        }
        order.sort_unstable();
        for (_, consumer) in order {
            let action = self.next_for(consumer)?;
            if action != Action::Wait {
                return Ok(action);
            }
        }
        Ok(Action::Wait)
    }

    fn next_for(&mut self, consumer: usize) -> Result<Action> {
        loop {
            let Some((content, ordinal)) = self.due(consumer)? else { return Ok(Action::Wait) };
            if self.already_delivered(consumer, content, ordinal)? {
                self.streams[consumer].advance(content.block, &self.catalogue);
                continue;
            }
            // The consumer may have leased and released it since we read its position: the share then looks free and undelivered, but
            // the position was stored before the release. Offered again, it would stay READY for ever.
            if self.streams[consumer].catch_up(&self.memory, &self.shape) {
                continue;
            }
            return self.serve(consumer, content, ordinal);
        }
    }

    fn due(&self, consumer: usize) -> Result<Option<(ChunkId, u64)>> {
        self.streams[consumer].due(&self.memory, &self.shape)
    }

    /// Epoch of a consumer's queue; 0 if none ever came.
    #[must_use]
    pub fn consumer_epoch(&self, consumer: usize) -> u16 {
        unpack_epoch(self.memory.load(self.shape.at(consumer, consumer::POSTED))).0
    }

    /// Reads a consumer's line: a new epoch drops the old stream, a position ahead of ours (after our restart) is caught up with,
    /// and requests posted since are entered into the future.
    fn follow(&mut self, consumer: usize) -> Result<()> {
        let (epoch, posted) = unpack_epoch(self.memory.load(self.shape.at(consumer, consumer::POSTED)));
        if epoch != self.streams[consumer].epoch {
            self.streams[consumer].restart(epoch);
            // What was READY for an earlier consumer becomes free; the content stays.
            for index in 0..self.shape.slots {
                self.free_share(consumer, index, |s| s.state == State::Ready && s.epoch != epoch)?;
            }
        }
        let stream = &mut self.streams[consumer];
        stream.catch_up(&self.memory, &self.shape);
        stream.learn(&self.memory, &self.shape, posted)
    }

    /// Gives up a consumer whose process is proven dead: what it had leased or was offered in `epoch` is freed, what it asked for
    /// forgotten. True if there was something to give up. The caller has read `epoch` ([`Self::consumer_epoch`]) before it found the
    /// role lock free: a successor takes the lock before it raises the epoch, so whoever had `epoch` is gone.
    ///
    /// # Errors
    /// [`Error::Absent`] if another loader has taken the role, [`Error::Invariant`] if shared state is impossible.
    pub fn bury(&mut self, consumer: usize, epoch: u16) -> Result<bool> {
        self.check_fence()?;
        self.follow(consumer)?;
        let stream = &mut self.streams[consumer];
        if epoch == 0 || stream.epoch != epoch || stream.dead {
            return Ok(false);
        }
        stream.end();
        for index in 0..self.shape.slots {
            // Earlier epochs too: their holders died before. Only a successor's are newer.
            self.free_share(consumer, index, |s| epoch.wrapping_sub(s.epoch) < 1 << 15 && s.state != State::Free)?;
        }
        Ok(true)
    }

    /// Whether `ordinal` is delivered already, by an earlier loader perhaps, and the share still carries it.
    fn already_delivered(&self, consumer: usize, content: ChunkId, ordinal: u64) -> Result<bool> {
        let epoch = self.streams[consumer].epoch;
        let word = self.memory.load(self.shape.delivery(consumer, ordinal));
        let Some(index) = delivery_slot(word, pack_epoch(epoch, ordinal)).filter(|s| *s < self.shape.slots) else { return Ok(false) };
        let (_, share) = self.share(consumer, index)?;
        if share.state == State::Free || share.epoch != epoch || share.ordinal != ordinal {
            return Ok(false);
        }
        let (_, word) = self.slot_word(index)?;
        let descriptor = Descriptor::read(&self.memory, self.shape.slot(index));
        Ok(descriptor.is_some_and(|d| d.content == content && d.generation == word.generation))
    }

    /// Slots that a consumer has or is about to get, and how many of them are ahead of it: to be leased before the chunk at `ordinal`.
    /// What lies behind that chunk (after a crash, say) is no supply: the consumer cannot get there.
    fn supply(&self, consumer: usize, ordinal: u64) -> Result<(usize, u64)> {
        let end = pack_epoch(self.streams[consumer].epoch, ordinal);
        let (mut out, mut ahead) = (0, 0);
        for index in 0..self.shape.slots {
            let share = self.share(consumer, index)?.1;
            let place = match self.slots[index].job.filter(|j| j.consumer == consumer) {
                Some(job) => Some(job.ordinal),
                None => (share.state == State::Ready).then(|| pack_epoch(share.epoch, share.ordinal)),
            };
            out += usize::from(place.is_some() || share.state == State::Leased);
            ahead += u64::from(place.is_some_and(|p| p < end && unpack_epoch(p).0 == unpack_epoch(end).0));
        }
        Ok((out, ahead))
    }

    fn serve(&mut self, consumer: usize, content: ChunkId, ordinal: u64) -> Result<Action> {
        // With one consumer the quota is the ring.
        let (out, ahead) = if self.shape.consumers > 1 { self.supply(consumer, ordinal)? } else { (0, 0) };
        if out >= self.shape.quota() {
            return Ok(Action::Wait);
        }
        if let Some(&index) = self.content.get(&content) {
            // Offered for a later place, since the chunk of this one proved damaged: it cannot be leased before this one is. Taken back,
            // it serves here, and the later place in its turn.
            let later = pack_epoch(self.streams[consumer].epoch, ordinal);
            self.free_share(consumer, index, |s| s.state == State::Ready && pack_epoch(s.epoch, s.ordinal) > later)?;
            let (raw, word) = self.slot_word(index)?;
            // On its way for another consumer, or still out to this one for an earlier place in its stream: both end by themselves.
            if word.state != State::Free || self.share(consumer, index)?.1.state != State::Free {
                return Ok(Action::Wait);
            }
            if let Some(descriptor) = self.intact(index, word).filter(|d| d.content == content) {
                return self.serve_retained(consumer, ordinal, (index, raw, word), descriptor);
            }
            self.forget(index);
        }
        let ahead = if self.shape.consumers > 1 { ahead } else { self.supply(consumer, ordinal)?.1 };
        let Some((index, raw, word)) = self.victim(consumer, ahead)? else { return Ok(Action::Wait) };
        let job = self.claim(consumer, (index, raw, word), content, ordinal)?;
        Descriptor::invalidate(&self.memory, self.shape.slot(index));
        self.remember(index, content, false);
        Ok(Action::Fill(job))
    }

    fn serve_retained(
        &mut self,
        consumer: usize,
        ordinal: u64,
        (index, raw, word): (usize, u64, SlotWord),
        descriptor: Descriptor,
    ) -> Result<Action> {
        let content = descriptor.content;
        if !self.slots[index].trusted {
            if self.is_out(index)? {
                return Ok(Action::Wait);
            }
            let job = self.claim(consumer, (index, raw, word), content, ordinal)?;
            return Ok(Action::Verify(job, descriptor.payload));
        }
        let ordinal = pack_epoch(self.streams[consumer].epoch, ordinal);
        let job = Job { slot: index, content, consumer, ordinal, generation: word.generation };
        self.streams[consumer].advance(content.block, &self.catalogue);
        self.offer(&job)?;
        Ok(Action::Republished(job))
    }

    /// Takes a slot that is not out for one place of a consumer's stream, and moves that consumer's cursor on.
    fn claim(&mut self, consumer: usize, (index, raw, word): (usize, u64, SlotWord), content: ChunkId, ordinal: u64) -> Result<Job> {
        if word.generation >= GENERATION_MAX {
            return Err(
                Error::invariant(format!("slot {index} has used up its generations")).advice("restart the run: the ring is made anew")
            );
        }
        let generation = word.generation + 1;
        let ours = SlotWord { state: State::Filling, epoch: self.epoch, generation };
        self.memory.swap(self.shape.slot(index) + slot::STATE, raw, ours.pack()).map_err(|found| self.fenced(index, found))?;
        let job = Job { slot: index, content, consumer, ordinal: pack_epoch(self.streams[consumer].epoch, ordinal), generation };
        self.slots[index].job = Some(job);
        self.streams[consumer].advance(content.block, &self.catalogue);
        Ok(job)
    }

    /// Publishes a prepared slot: descriptor, slot word, delivery word, then READY. The driver wakes the job's consumer afterwards.
    ///
    /// # Errors
    /// [`Error::Absent`] if fenced.
    pub fn publish(&mut self, job: Job, bytes: u64, payload: u64) -> Result<()> {
        self.check_fence()?;
        let at = self.shape.slot(job.slot);
        let signature = self.catalogue.signature;
        Descriptor { content: job.content, bytes, payload, signature, generation: job.generation }.write(&self.memory, at);
        self.give_up_claim(&job)?;
        self.remember(job.slot, job.content, true);
        // The stream it was made for may be gone (a new consumer, or a dead one): then the bytes are kept as free content.
        let epoch = unpack_epoch(job.ordinal).0;
        let stale =
            epoch != self.consumer_epoch(job.consumer) || (self.streams[job.consumer].dead && self.streams[job.consumer].epoch == epoch);
        if stale { Ok(()) } else { self.offer(&job) }
    }

    fn give_up_claim(&mut self, job: &Job) -> Result<()> {
        let ours = SlotWord { state: State::Filling, epoch: self.epoch, generation: job.generation };
        self.memory
            .swap(self.shape.slot(job.slot) + slot::STATE, ours.pack(), SlotWord { state: State::Free, ..ours }.pack())
            .map_err(|found| self.fenced(job.slot, found))?;
        self.slots[job.slot].job = None;
        Ok(())
    }

    /// Makes a consumer's share of a slot READY.
    fn offer(&mut self, job: &Job) -> Result<()> {
        self.offers += 1;
        self.slots[job.slot].offered = self.offers;
        let (epoch, ordinal) = unpack_epoch(job.ordinal);
        // The word cannot name another delivery that is still awaited: that would be `slots` places away, and every place from the
        // consumer's on has a slot of its own.
        self.memory.store(self.shape.delivery(job.consumer, ordinal), delivery_word(job.ordinal, job.slot));
        let (raw, share) = self.share(job.consumer, job.slot)?;
        let ready = ShareWord { state: State::Ready, epoch, ordinal };
        if share.state != State::Free {
            return Err(self.fenced(job.slot, raw));
        }
        self.memory.swap(self.shape.share(job.consumer, job.slot), raw, ready.pack()).map_err(|found| self.fenced(job.slot, found))
    }

    /// Gives up a slot whose content proved wrong ([`Action::Verify`]); its place in the stream is served again.
    ///
    /// # Errors
    /// [`Error::Absent`] if fenced.
    pub fn abandon(&mut self, job: Job) -> Result<()> {
        self.check_fence()?;
        Descriptor::invalidate(&self.memory, self.shape.slot(job.slot));
        self.forget(job.slot);
        self.give_up_claim(&job)?;
        let (epoch, ordinal) = unpack_epoch(job.ordinal);
        let stream = &mut self.streams[job.consumer];
        if epoch != stream.epoch {
            return Ok(());
        }
        stream.rewind_to(&self.memory, &self.shape, ordinal)
    }

    /// Slots that consumers have a share of, with their bytes and the payload checksum that each must have, for the driver to compare
    /// after a restart: [`Self::confirm`] or [`Self::drop_ready`].
    ///
    /// # Errors
    /// [`Error::Invariant`] if a state word holds no state.
    pub fn ready_slots(&self) -> Result<Vec<(usize, u64, u64)>> {
        let mut ready = Vec::new();
        for index in 0..self.shape.slots {
            if self.is_out(index)?
                && let Some(d) = Descriptor::read(&self.memory, self.shape.slot(index))
            {
                ready.push((index, d.bytes, d.payload));
            }
        }
        Ok(ready)
    }

    /// Says that a slot of [`Self::ready_slots`] has the payload that it should have: it may be offered to others.
    pub fn confirm(&mut self, index: usize) {
        if let Some(slot) = self.slots.get_mut(index) {
            slot.trusted = slot.content.is_some();
        }
    }

    /// Takes back what was offered of a slot whose payload proved wrong, except from a consumer that has it already (which compares for
    /// itself). The places in the streams are served again, because no share carries them any more.
    ///
    /// # Errors
    /// [`Error::Invariant`] if a state word holds no state.
    pub fn drop_ready(&mut self, index: usize) -> Result<()> {
        let (_, word) = self.slot_word(index)?;
        self.memory.store(self.shape.slot(index) + slot::DAMAGED, word.generation);
        self.forget(index);
        for consumer in 0..self.shape.consumers {
            self.free_share(consumer, index, |s| s.state == State::Ready)?;
        }
        Ok(())
    }

    /// Slots that some consumer has READY or LEASED, for the display.
    #[must_use]
    pub fn occupied(&self) -> u32 {
        self.shape.occupied(&self.memory) as u32
    }

    fn check_fence(&self) -> Result<()> {
        let now = self.memory.load(loader::EPOCH);
        if now == u64::from(self.epoch) { Ok(()) } else { Err(fenced_error("loader", self.epoch, now)) }
    }

    fn fenced(&self, index: usize, found: u64) -> Error {
        match self.check_fence() {
            Err(e) => e,
            Ok(()) => Error::invariant(format!("slot {index} changed while the loader held it"))
                .found(format!("{found:#018x}"))
                .advice("this is a defect: please report it with the logs"),
        }
    }
}

/// The epoch after `word`'s; 0 is never used, so that a zeroed word belongs to nobody.
#[must_use]
pub fn next_epoch(word: u64) -> u16 {
    match (word as u16).wrapping_add(1) {
        0 => 1,
        epoch => epoch,
    }
}

/// Tag of a request entry.
#[must_use]
pub fn request_tag(epoch: u16, sequence: u64, block: u16) -> u64 {
    u64::from(epoch) << 48 | (sequence & 0xffff_ffff) << 16 | u64::from(block)
}

/// Delivery word: the ordinal (its epoch and low 32 bits) and the slot that carries it.
#[must_use]
pub fn delivery_word(ordinal: u64, slot: usize) -> u64 {
    let (epoch, count) = unpack_epoch(ordinal);
    u64::from(epoch) << 48 | (count & 0xffff_ffff) << 16 | slot as u64 & 0xffff
}

/// The slot that a delivery word names for `ordinal`, if it is for that ordinal.
#[must_use]
pub fn delivery_slot(word: u64, ordinal: u64) -> Option<usize> {
    (word >> 16 == delivery_word(ordinal, 0) >> 16).then_some(word as usize & 0xffff)
}

pub(super) fn fenced_error(role: &str, ours: u16, found: u64) -> Error {
    Error::absent(format!("another {role} has taken over the ring; this one stops without touching it"))
        .expected(format!("epoch {ours}"))
        .found(format!("epoch {found}"))
}

pub(super) fn no_such_state(index: usize, raw: u64) -> Error {
    Error::invariant(format!("slot {index} of the ring is in no known state"))
        .found(format!("{raw:#018x}"))
        .advice("something else wrote to the shared segment; stop all processes of this run and start it again")
}
