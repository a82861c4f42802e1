//! The loader's half of the ring: which chunk is due, which slot it goes to, and what survives a crash.
//!
//! The producer walks the consumer's requests in order. A chunk whose bytes are still in a free slot is published again without a
//! fill; otherwise the free slot whose content is needed furthest in the future is overwritten (Belady's rule: the request queue is
//! the future). Nothing here touches payload bytes or makes a system call: the driver asks [`Producer::next_action`], does the work,
//! and says [`Producer::publish`].
//!
//! Invariants: a slot in FILLING with our epoch is ours alone; its descriptor is invalid until [`Producer::publish`]; a delivery word is
//! written before its slot becomes READY (the other way round, a crash between the two would leave a READY slot that nobody can find);
//! nothing is delivered that the consumer has passed. After a crash [`Producer::attach`] frees what a dead loader was filling and goes on
//! at the consumer's position: a delivery stands if its slot still carries that ordinal, otherwise it is made again.

use std::collections::{HashMap, VecDeque};

use super::words::{ChunkId, Descriptor, GENERATION_MAX, Shape, SlotWord, State, Words, consumer, loader, pack_epoch, slot, unpack_epoch};
use crate::error::{Error, Result};

/// Slots that may be READY ahead of the consumer even where filling them overwrites something needed earlier.
const LOOKAHEAD_MIN: u64 = 2;

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
    /// A retained chunk was published without work.
    Republished(Job),
}

/// A slot that is being prepared for one place in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// Slot.
    pub slot: usize,
    /// What goes into it.
    pub content: ChunkId,
    /// Consumer epoch and ordinal.
    pub ordinal: u64,
    /// Generation of the slot while it is ours.
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

/// Where in the request stream the producer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cursor {
    consumer_epoch: u16,
    sequence: u64,
    chunk: u16,
}

/// The loader's state machine over memory `M`.
pub struct Producer<M> {
    memory: M,
    shape: Shape,
    catalogue: Catalogue,
    epoch: u16,
    cursor: Cursor,
    /// Requests known so far: `future[block]` holds the sequences at which the block is still to be served, ascending.
    future: Vec<VecDeque<u64>>,
    /// First request not yet entered into `future`.
    known: u64,
    /// Where each chunk's bytes are.
    content: HashMap<ChunkId, usize>,
    /// Slots whose payload this loader wrote or verified.
    trusted: Vec<bool>,
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
            future: vec![VecDeque::new(); catalogue.chunks.len()],
            content: HashMap::new(),
            trusted: vec![false; shape.slots],
            cursor: Cursor { consumer_epoch: 0, sequence: 0, chunk: 0 },
            known: 0,
            memory,
            shape,
            catalogue,
            epoch,
        };
        for index in 0..shape.slots {
            this.recover_slot(index)?;
        }
        this.follow_consumer()?;
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

    fn recover_slot(&mut self, index: usize) -> Result<()> {
        let at = self.shape.slot(index);
        let (raw, word) = self.slot_word(index)?;
        if word.state == State::Filling {
            Descriptor::invalidate(&self.memory, at);
            let freed = SlotWord { state: State::Free, epoch: self.epoch, ..word };
            return self.memory.swap(at + slot::STATE, raw, freed.pack()).map_err(|found| self.fenced(index, found));
        }
        if let Some(descriptor) = Descriptor::read(&self.memory, at)
            && descriptor.signature == self.catalogue.signature
            && descriptor.generation == word.generation
            && self.catalogue.chunks.get(usize::from(descriptor.content.block)).is_some_and(|n| descriptor.content.chunk < *n)
        {
            self.content.insert(descriptor.content, index);
        }
        Ok(())
    }

    /// The next thing to do. Call until it says [`Action::Wait`].
    ///
    /// # Errors
    /// [`Error::Absent`] if another loader has taken the role (fenced), [`Error::Invariant`] if shared state is impossible.
    pub fn next_action(&mut self) -> Result<Action> {
        self.check_fence()?;
        self.follow_consumer()?;
        loop {
            let Some((content, ordinal)) = self.due()? else { return Ok(Action::Wait) };
            if self.already_delivered(content, ordinal)? {
                self.advance();
                continue;
            }
            // The consumer may have leased and released it since we read its position: the slot then looks free and undelivered, but
            // the position was stored before the release. Published again, it would stay READY for ever.
            if self.catch_up() {
                continue;
            }
            return self.serve(content, ordinal);
        }
    }

    /// Reads the consumer's line: a new epoch drops the old stream, a position ahead of ours (after our restart) is caught up with,
    /// and requests posted since are entered into the future.
    fn follow_consumer(&mut self) -> Result<()> {
        let (epoch, posted) = unpack_epoch(self.memory.load(consumer::POSTED));
        if epoch != self.cursor.consumer_epoch {
            self.cursor = Cursor { consumer_epoch: epoch, sequence: 0, chunk: 0 };
            self.future.iter_mut().for_each(VecDeque::clear);
            self.known = 0;
            self.free_foreign_ready(epoch)?;
        }
        self.catch_up();
        while self.known < posted {
            let Some((block, _)) = self.request(self.known)? else { break };
            self.future[usize::from(block)].push_back(self.known);
            self.known += 1;
        }
        Ok(())
    }

    /// Moves the cursor to the consumer's position if that is ahead; whether it moved.
    fn catch_up(&mut self) -> bool {
        let (epoch, position) = unpack_epoch(self.memory.load(consumer::POSITION));
        let (sequence, chunk) = (position >> 16, position as u16);
        if epoch != self.cursor.consumer_epoch || (sequence, chunk) <= (self.cursor.sequence, self.cursor.chunk) {
            return false;
        }
        self.cursor = Cursor { sequence, chunk, ..self.cursor };
        self.known = self.known.max(sequence);
        for queue in &mut self.future {
            while queue.front().is_some_and(|s| *s < sequence) {
                queue.pop_front();
            }
        }
        true
    }

    /// READY slots of an earlier consumer become free; their content stays.
    fn free_foreign_ready(&mut self, consumer_epoch: u16) -> Result<()> {
        for index in 0..self.shape.slots {
            let at = self.shape.slot(index);
            let (raw, word) = self.slot_word(index)?;
            if word.state != State::Ready {
                continue;
            }
            let foreign = Descriptor::read(&self.memory, at).is_none_or(|d| unpack_epoch(d.ordinal).0 != consumer_epoch);
            if foreign {
                let freed = SlotWord { state: State::Free, epoch: self.epoch, ..word };
                // Fails if this consumer leased the slot since we read the word, and found it corrupt: then it is not ours to free.
                if self.memory.swap(at + slot::STATE, raw, freed.pack()).is_err() {
                    self.check_fence()?;
                }
            }
        }
        Ok(())
    }

    /// Block and first ordinal of request `sequence`; `None` if the entry is not (or no longer) of this consumer epoch.
    fn request(&self, sequence: u64) -> Result<Option<(u16, u64)>> {
        let at = self.shape.request(sequence);
        let (tag, first) = (self.memory.load(at), self.memory.load(at + 1));
        let block = tag as u16;
        if tag != request_tag(self.cursor.consumer_epoch, sequence, block) {
            return Ok(None);
        }
        if usize::from(block) >= self.catalogue.chunks.len() {
            return Err(Error::invariant("the consumer asked for a block that the model does not have")
                .expected(format!("0 to {}", self.catalogue.chunks.len().saturating_sub(1)))
                .found(block));
        }
        Ok(Some((block, first)))
    }

    /// The chunk at the cursor and its ordinal, if it is posted.
    fn due(&self) -> Result<Option<(ChunkId, u64)>> {
        if self.cursor.sequence >= self.known {
            return Ok(None);
        }
        let Some((block, first)) = self.request(self.cursor.sequence)? else { return Ok(None) };
        let content = ChunkId { block, chunk: self.cursor.chunk };
        Ok(Some((content, pack_epoch(self.cursor.consumer_epoch, first + u64::from(self.cursor.chunk)))))
    }

    fn advance(&mut self) {
        let Ok(Some((content, _))) = self.due() else { return };
        let block = usize::from(content.block);
        self.cursor.chunk += 1;
        if self.cursor.chunk >= self.catalogue.chunks[block] {
            self.future[block].pop_front();
            self.cursor.chunk = 0;
            self.cursor.sequence += 1;
        }
    }

    /// Whether an earlier loader has delivered `ordinal` already and the slot still carries it.
    fn already_delivered(&self, content: ChunkId, ordinal: u64) -> Result<bool> {
        let Some(index) = self.delivered_slot(ordinal) else { return Ok(false) };
        let (_, word) = self.slot_word(index)?;
        let descriptor = Descriptor::read(&self.memory, self.shape.slot(index));
        Ok(matches!(word.state, State::Ready | State::Leased)
            && descriptor.is_some_and(|d| {
                d.ordinal == ordinal && d.content == content && d.generation == word.generation && d.signature == self.catalogue.signature
            }))
    }

    fn delivered_slot(&self, ordinal: u64) -> Option<usize> {
        let word = self.memory.load(self.shape.delivery(unpack_epoch(ordinal).1));
        delivery_slot(word, ordinal).filter(|s| *s < self.shape.slots)
    }

    fn serve(&mut self, content: ChunkId, ordinal: u64) -> Result<Action> {
        if let Some(&index) = self.content.get(&content) {
            let (raw, word) = self.slot_word(index)?;
            if word.state != State::Free {
                // Still out for an earlier place in the stream: the consumer will release it.
                return Ok(Action::Wait);
            }
            let at = self.shape.slot(index);
            let Some(descriptor) = Descriptor::read(&self.memory, at).filter(|d| d.content == content) else {
                self.content.remove(&content);
                return self.serve(content, ordinal);
            };
            let job = self.claim(index, raw, word, content, ordinal)?;
            self.advance();
            if !self.trusted[index] {
                return Ok(Action::Verify(job, descriptor.payload));
            }
            self.publish(job, descriptor.bytes, descriptor.payload)?;
            return Ok(Action::Republished(job));
        }
        let Some((index, raw, word)) = self.victim()? else { return Ok(Action::Wait) };
        let old = Descriptor::read(&self.memory, self.shape.slot(index)).map(|d| d.content);
        let job = self.claim(index, raw, word, content, ordinal)?;
        if let Some(old) = old.filter(|c| self.content.get(c) == Some(&index)) {
            self.content.remove(&old);
        }
        Descriptor::invalidate(&self.memory, self.shape.slot(index));
        self.trusted[index] = false;
        self.content.insert(content, index);
        self.advance();
        Ok(Action::Fill(job))
    }

    fn claim(&self, index: usize, raw: u64, word: SlotWord, content: ChunkId, ordinal: u64) -> Result<Job> {
        if word.generation >= GENERATION_MAX {
            return Err(
                Error::invariant(format!("slot {index} has used up its generations")).advice("restart the run: the ring is made anew")
            );
        }
        let generation = word.generation + 1;
        let ours = SlotWord { state: State::Filling, epoch: self.epoch, generation };
        self.memory.swap(self.shape.slot(index) + slot::STATE, raw, ours.pack()).map_err(|found| self.fenced(index, found))?;
        Ok(Job { slot: index, content, ordinal, generation })
    }

    /// The free slot to overwrite: an empty one, else the one whose content is needed furthest in the future. None if every slot is
    /// out, or if the best one is needed before the chunk at hand and the consumer has enough ahead of it.
    fn victim(&self) -> Result<Option<(usize, u64, SlotWord)>> {
        let mut best: Option<(u64, usize, u64, SlotWord)> = None;
        let mut out = 0;
        for index in 0..self.shape.slots {
            let (raw, word) = self.slot_word(index)?;
            if word.state != State::Free {
                out += u64::from(word.state != State::Leased);
                continue;
            }
            let next_use = self.next_use(index);
            if best.is_none_or(|(use_, ..)| next_use > use_) {
                best = Some((next_use, index, raw, word));
            }
            if next_use == u64::MAX {
                break;
            }
        }
        let Some((next_use, index, raw, word)) = best else { return Ok(None) };
        let due = self.cursor.sequence << 16 | u64::from(self.cursor.chunk);
        Ok((next_use > due || out < LOOKAHEAD_MIN).then_some((index, raw, word)))
    }

    /// When the content of a free slot is needed next, as request << 16 | chunk; `u64::MAX` if not, or if it holds nothing.
    fn next_use(&self, index: usize) -> u64 {
        let Some(descriptor) = Descriptor::read(&self.memory, self.shape.slot(index)) else { return u64::MAX };
        let content = descriptor.content;
        if self.content.get(&content) != Some(&index) {
            return u64::MAX;
        }
        let passed = self.cursor.chunk > content.chunk;
        self.future[usize::from(content.block)]
            .iter()
            .find(|s| **s > self.cursor.sequence || (**s == self.cursor.sequence && !passed))
            .map_or(u64::MAX, |s| s << 16 | u64::from(content.chunk))
    }

    /// Publishes a prepared slot: descriptor, delivery word, then READY. The driver wakes the consumer afterwards.
    ///
    /// # Errors
    /// [`Error::Absent`] if fenced.
    pub fn publish(&mut self, job: Job, bytes: u64, payload: u64) -> Result<()> {
        self.check_fence()?;
        let at = self.shape.slot(job.slot);
        let descriptor = Descriptor {
            content: job.content,
            bytes,
            payload,
            ordinal: job.ordinal,
            signature: self.catalogue.signature,
            generation: job.generation,
        };
        descriptor.write(&self.memory, at);
        let ours = SlotWord { state: State::Filling, epoch: self.epoch, generation: job.generation };
        // The stream it was made for may be gone (new consumer): then the bytes are kept as free content.
        let stale = unpack_epoch(job.ordinal).0 != unpack_epoch(self.memory.load(consumer::POSTED)).0;
        let state = if stale { State::Free } else { State::Ready };
        if !stale {
            // The word cannot name another delivery that is still awaited: that would be `slots` places away, and every place from the
            // consumer's on has a slot of its own.
            self.memory.store(self.shape.delivery(unpack_epoch(job.ordinal).1), delivery_word(job.ordinal, job.slot));
        }
        self.memory.swap(at + slot::STATE, ours.pack(), SlotWord { state, ..ours }.pack()).map_err(|found| self.fenced(job.slot, found))?;
        self.trusted[job.slot] = true;
        self.content.insert(job.content, job.slot);
        Ok(())
    }

    /// Gives up a slot whose content proved wrong ([`Action::Verify`]); its place in the stream is served again.
    ///
    /// # Errors
    /// [`Error::Absent`] if fenced.
    pub fn abandon(&mut self, job: Job) -> Result<()> {
        self.check_fence()?;
        let at = self.shape.slot(job.slot);
        Descriptor::invalidate(&self.memory, at);
        self.content.retain(|_, s| *s != job.slot);
        let ours = SlotWord { state: State::Filling, epoch: self.epoch, generation: job.generation };
        self.memory
            .swap(at + slot::STATE, ours.pack(), SlotWord { state: State::Free, ..ours }.pack())
            .map_err(|found| self.fenced(job.slot, found))?;
        self.rewind_to(job.ordinal)
    }

    /// Moves the cursor back to the request that holds `ordinal`, if it is of the current stream.
    fn rewind_to(&mut self, ordinal: u64) -> Result<()> {
        let (epoch, ordinal) = unpack_epoch(ordinal);
        if epoch != self.cursor.consumer_epoch {
            return Ok(());
        }
        let mut sequence = self.cursor.sequence.min(self.known.saturating_sub(1));
        while let Some((block, first)) = self.request(sequence)? {
            if first <= ordinal {
                self.cursor = Cursor { sequence, chunk: (ordinal - first) as u16, ..self.cursor };
                break;
            }
            // Served in full already: it is in the future again.
            let queue = &mut self.future[usize::from(block)];
            if queue.front() != Some(&sequence) && sequence < self.known {
                queue.push_front(sequence);
            }
            let Some(before) = sequence.checked_sub(1) else { break };
            sequence = before;
        }
        let sequence = self.cursor.sequence;
        if let Some((block, _)) = self.request(sequence)? {
            let queue = &mut self.future[usize::from(block)];
            if queue.front().is_none_or(|s| *s > sequence) {
                queue.push_front(sequence);
            }
        }
        Ok(())
    }

    /// READY slots with the payload checksum that each must have, for the driver to compare after a restart.
    ///
    /// # Errors
    /// [`Error::Invariant`] if a state word holds no state.
    pub fn ready_slots(&self) -> Result<Vec<(usize, u64, u64)>> {
        let mut ready = Vec::new();
        for index in 0..self.shape.slots {
            if self.slot_word(index)?.1.state == State::Ready
                && let Some(d) = Descriptor::read(&self.memory, self.shape.slot(index))
            {
                ready.push((index, d.bytes, d.payload));
            }
        }
        Ok(ready)
    }

    /// Frees a READY slot whose payload proved wrong, unless the consumer has it already (which compares for itself). Its place in
    /// the stream is served again, because the slot no longer carries it.
    ///
    /// # Errors
    /// [`Error::Invariant`] if a state word holds no state.
    pub fn drop_ready(&mut self, index: usize) -> Result<()> {
        let at = self.shape.slot(index);
        let (raw, word) = self.slot_word(index)?;
        let freed = SlotWord { state: State::Free, epoch: self.epoch, ..word };
        if word.state == State::Ready && self.memory.swap(at + slot::STATE, raw, freed.pack()).is_ok() {
            Descriptor::invalidate(&self.memory, at);
            self.content.retain(|_, s| *s != index);
        }
        Ok(())
    }

    /// READY or LEASED slots, for the display.
    ///
    /// # Errors
    /// [`Error::Invariant`] if a state word holds no state.
    pub fn occupied(&self) -> Result<u32> {
        let mut n = 0;
        for index in 0..self.shape.slots {
            n += u32::from(matches!(self.slot_word(index)?.1.state, State::Ready | State::Leased));
        }
        Ok(n)
    }

    fn check_fence(&self) -> Result<()> {
        let now = self.memory.load(loader::EPOCH);
        if now == u64::from(self.epoch) { Ok(()) } else { Err(fenced_error("loader", self.epoch, now)) }
    }

    fn fenced(&self, index: usize, found: u64) -> Error {
        match self.check_fence() {
            Err(e) => e,
            Ok(()) => Error::invariant(format!("slot {index} changed while the loader held it"))
                .found(format!("{:?}", SlotWord::unpack(found)))
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
