//! The ring's shared state as an array of 64-bit words, and where each fact lives in it.
//!
//! Everything that producer and consumer agree on is one of these words, read and written through [`Words`]. The state machines in
//! [`super::producer`] and [`super::consumer`] know no other memory and make no system call, so that a model checker's or a
//! simulator's memory can take the place of the mapped segment. Payload bytes are not words: they are written only by the holder of a
//! FILLING slot and read only by the holder of a LEASED one.
//!
//! A ring has one loader and one or more consumers. Each consumer has an area of its own: its line, its request queue, its delivery
//! words, and one *share* of every slot. A slot's own word says whether the loader is filling it (FREE or FILLING); its shares say what
//! the consumers have of it (FREE, READY or LEASED). Shares become READY by the loader alone, and only while the slot is not FILLING; so a
//! slot whose shares the loader has all seen FREE stays so until the loader itself offers it again, and may be filled.

use std::sync::atomic::{AtomicU64, Ordering};

/// Shared memory as 64-bit words. Every access is at least acquire (loads) or release (stores): the ring moves megabytes per
/// word operation, so weaker orders would buy nothing and cost proof.
pub trait Words {
    /// Reads word `index`.
    fn load(&self, index: usize) -> u64;
    /// Writes word `index`.
    fn store(&self, index: usize, value: u64);
    /// Replaces word `index` by `new` if it is `old`.
    ///
    /// # Errors
    /// The value found, if it was another.
    fn swap(&self, index: usize, old: u64, new: u64) -> Result<(), u64>;
}

impl Words for [AtomicU64] {
    fn load(&self, index: usize) -> u64 {
        // Pairs with the Release of store and swap below, in whichever process they ran.
        self[index].load(Ordering::Acquire)
    }
    fn store(&self, index: usize, value: u64) {
        // Pairs with the Acquire of load and swap.
        self[index].store(value, Ordering::Release);
    }
    fn swap(&self, index: usize, old: u64, new: u64) -> Result<(), u64> {
        // AcqRel: publishes what the owner wrote before (descriptor, payload) and sees what the previous owner did; a failure
        // acquires too, because the caller acts on the value found.
        self[index].compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).map(|_| ())
    }
}

impl<M: Words + ?Sized> Words for &M {
    fn load(&self, index: usize) -> u64 {
        (**self).load(index)
    }
    fn store(&self, index: usize, value: u64) {
        (**self).store(index, value);
    }
    fn swap(&self, index: usize, old: u64, new: u64) -> Result<(), u64> {
        (**self).swap(index, old, new)
    }
}

/// Words of the fixed header.
pub mod header {
    /// `b"SERENITY"`, little endian.
    pub const MAGIC: usize = 0;
    /// [`super::LAYOUT_VERSION`].
    pub const VERSION: usize = 1;
    /// [`super::ENDIAN_TAG`].
    pub const ENDIAN: usize = 2;
    /// Bytes of the whole segment.
    pub const BYTES: usize = 3;
    /// Number of slots.
    pub const SLOTS: usize = 4;
    /// Payload bytes of a slot.
    pub const CHUNK_BYTES: usize = 5;
    /// Signature of the slab whose blocks travel here.
    pub const SIGNATURE: usize = 6;
    /// Payload form.
    pub const FORM: usize = 7;
    /// Entries of the request queue.
    pub const REQUESTS: usize = 8;
    /// Digest of the boot id: a segment does not outlive a reboot.
    pub const BOOT: usize = 9;
    /// Blocks of the model.
    pub const BLOCKS: usize = 10;
    /// Consumers that the ring has areas for.
    pub const CONSUMERS: usize = 11;
    /// xxh3 of the words before.
    pub const CHECKSUM: usize = 12;
    /// [`super::READY_TAG`], stored last: before it nothing else counts.
    pub const READY: usize = 13;
}

/// Words of the loader's line (own cache lines).
pub mod loader {
    /// Epoch of the loader that owns the role; grows by one with each.
    pub const EPOCH: usize = 32;
    /// Its process id, for messages.
    pub const PID: usize = 33;
    /// Its start time in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub const START: usize = 34;
    /// Counts events for the loader (posted, released); its low half is the futex it sleeps on.
    pub const WAKE: usize = 35;
    /// Bytes read from the slab by this and earlier loaders of the segment.
    pub const READ_BYTES: usize = 36;
}

/// Words of the first consumer's line; for another's see [`Shape::at`].
pub mod consumer {
    /// Epoch (16 bits), number of requests posted in it (48).
    pub const POSTED: usize = 64;
    /// Epoch (16), request (32) and chunk (16) that is leased next.
    pub const POSITION: usize = 65;
    /// Process id.
    pub const PID: usize = 66;
    /// Start time.
    pub const START: usize = 67;
    /// Epoch of the consumer that finished its work, else 0.
    pub const FINISHED: usize = 68;
    /// Counts events for the consumer (published); its low half is the futex it sleeps on. Written by the loader, so on a line of its own.
    pub const WAKE: usize = 80;
}

/// First word of the first consumer's area.
pub const CONSUMERS_AT: usize = 64;
/// First word of the first consumer's request queue.
pub const REQUESTS_AT: usize = 96;
/// Words of a request: tag (epoch 16, sequence 32, block 16) and the ordinal of its first chunk.
pub const REQUEST_WORDS: usize = 2;
/// Words of a slot: one cache line.
pub const SLOT_WORDS: usize = 8;
/// Version of this layout; any change of a word's meaning raises it.
pub const LAYOUT_VERSION: u64 = 3;
/// Reads as something else on a machine of the other byte order.
pub const ENDIAN_TAG: u64 = 0x0102_0304_0506_0708;
/// First word of a segment.
pub const MAGIC: u64 = u64::from_le_bytes(*b"SERENITY");
/// The header's last word.
pub const READY_TAG: u64 = u64::from_le_bytes(*b"RINGOPEN");
/// Default capacity of the request queue: several steps of a 56-block model.
pub const REQUEST_CAPACITY: usize = 4096;
/// Most slots that a delivery word can name.
pub const SLOTS_MAX: usize = 1 << 16;
/// Most consumers of a ring.
pub const CONSUMERS_MAX: usize = 64;
/// Words that are brought into the cache together: areas of different writers keep this distance.
const LINE_PAIR: usize = 16;
/// Most chunks of a block that a position word can name.
pub const CHUNKS_MAX: usize = (1 << 16) - 1;

/// Words of a slot descriptor, relative to the slot's first.
pub mod slot {
    /// State (8), owner epoch (16), generation (40).
    pub const STATE: usize = 0;
    /// Block (16) and chunk (16) whose bytes the slot holds.
    pub const CONTENT: usize = 1;
    /// Payload bytes.
    pub const BYTES: usize = 2;
    /// Checksum of the payload.
    pub const PAYLOAD: usize = 3;
    /// Signature of the slab that the bytes came from.
    pub const SIGNATURE: usize = 4;
    /// Generation that the descriptor was written for.
    pub const GENERATION: usize = 5;
    /// xxh3 of the five words before; 0 while a slot is being filled.
    pub const CHECKSUM: usize = 6;
    /// Generation whose payload a process has found damaged: nobody is offered it again.
    pub const DAMAGED: usize = 7;
}

/// Numbers that fix where things are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Slots of the ring.
    pub slots: usize,
    /// Entries of each request queue.
    pub requests: usize,
    /// Consumers.
    pub consumers: usize,
}

impl Shape {
    /// Words from one consumer's area to the next one's.
    fn stride(&self) -> usize {
        (REQUESTS_AT - CONSUMERS_AT + self.requests * REQUEST_WORDS + 2 * self.slots).next_multiple_of(LINE_PAIR)
    }

    /// A word of consumer `index`'s line; `word` is one of [`consumer`].
    #[must_use]
    pub fn at(&self, index: usize, word: usize) -> usize {
        word + index * self.stride()
    }

    /// First word of request `sequence` of consumer `index`.
    #[must_use]
    pub fn request(&self, index: usize, sequence: u64) -> usize {
        self.at(index, REQUESTS_AT) + (sequence % self.requests as u64) as usize * REQUEST_WORDS
    }

    /// Word that names the slot of `ordinal` in consumer `index`'s stream.
    #[must_use]
    pub fn delivery(&self, index: usize, ordinal: u64) -> usize {
        self.at(index, REQUESTS_AT) + self.requests * REQUEST_WORDS + (ordinal % self.slots as u64) as usize
    }

    /// Word of consumer `index`'s share of a slot.
    #[must_use]
    pub fn share(&self, index: usize, slot: usize) -> usize {
        self.at(index, REQUESTS_AT) + self.requests * REQUEST_WORDS + self.slots + slot
    }

    /// First word of a slot's descriptor, on a cache line of its own.
    #[must_use]
    pub fn slot(&self, slot: usize) -> usize {
        self.at(self.consumers, CONSUMERS_AT) + slot * SLOT_WORDS
    }

    /// Number of words in all.
    #[must_use]
    pub fn words(&self) -> usize {
        self.slot(self.slots)
    }

    /// Slots that each consumer may have READY, LEASED or on their way: an equal part of the ring, so that however slow the others are
    /// it can always get one.
    #[must_use]
    pub fn quota(&self) -> usize {
        self.slots / self.consumers.max(1)
    }

    /// Makes zeroed memory a ring in which every slot is free.
    pub fn format(&self, memory: &(impl Words + ?Sized)) {
        for index in 0..self.slots {
            memory.store(self.slot(index) + slot::STATE, SlotWord { state: State::Free, epoch: 0, generation: 0 }.pack());
            for consumer in 0..self.consumers {
                memory.store(self.share(consumer, index), ShareWord { state: State::Free, epoch: 0, ordinal: 0 }.pack());
            }
        }
    }

    /// Slots that some consumer has READY or LEASED, for the display.
    #[must_use]
    pub fn occupied(&self, memory: &(impl Words + ?Sized)) -> usize {
        let out = |word: u64| ShareWord::unpack(word).is_some_and(|s| s.state != State::Free);
        (0..self.slots).filter(|slot| (0..self.consumers).any(|c| out(memory.load(self.share(c, *slot))))).count()
    }
}

/// State of a slot, or of a consumer's share of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Nobody's; content may be retained.
    Free = 1,
    /// The loader's (slots only).
    Filling = 2,
    /// Offered to the consumer (shares only).
    Ready = 3,
    /// The consumer's (shares only).
    Leased = 4,
}

impl State {
    fn of(word: u64) -> Option<Self> {
        [Self::Free, Self::Filling, Self::Ready, Self::Leased].into_iter().find(|s| *s as u64 == word >> 56)
    }
}

/// A slot's state word, unpacked: FREE or FILLING.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotWord {
    /// State.
    pub state: State,
    /// Epoch of the loader that put it there.
    pub epoch: u16,
    /// Grows with every fill; never decreases.
    pub generation: u64,
}

/// Largest generation that a state word holds: a century of fills at ten thousand a second.
pub const GENERATION_MAX: u64 = (1 << 40) - 1;

impl SlotWord {
    /// Packs into a word.
    #[must_use]
    pub fn pack(self) -> u64 {
        (self.state as u64) << 56 | u64::from(self.epoch) << 40 | (self.generation & GENERATION_MAX)
    }

    /// Unpacks; `None` for a state that a slot cannot have.
    #[must_use]
    pub fn unpack(word: u64) -> Option<Self> {
        let state = State::of(word).filter(|s| matches!(s, State::Free | State::Filling))?;
        Some(Self { state, epoch: (word >> 40) as u16, generation: word & GENERATION_MAX })
    }
}

/// A consumer's share of a slot, unpacked: FREE, READY or LEASED, and for which place in its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShareWord {
    /// State.
    pub state: State,
    /// Epoch of the consumer that it was offered to.
    pub epoch: u16,
    /// Place in that consumer's stream of chunks.
    pub ordinal: u64,
}

/// Largest ordinal that a share holds: a thousand years of steps.
pub const ORDINAL_MAX: u64 = (1 << 40) - 1;

impl ShareWord {
    /// Packs into a word.
    #[must_use]
    pub fn pack(self) -> u64 {
        (self.state as u64) << 56 | u64::from(self.epoch) << 40 | (self.ordinal & ORDINAL_MAX)
    }

    /// Unpacks; `None` for a state that a share cannot have.
    #[must_use]
    pub fn unpack(word: u64) -> Option<Self> {
        let state = State::of(word).filter(|s| *s != State::Filling)?;
        Some(Self { state, epoch: (word >> 40) as u16, ordinal: word & ORDINAL_MAX })
    }
}

/// A chunk: the unit that travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId {
    /// Block.
    pub block: u16,
    /// Chunk within the block's payload.
    pub chunk: u16,
}

impl ChunkId {
    /// Packs into a content word.
    #[must_use]
    pub fn pack(self) -> u64 {
        u64::from(self.block) << 16 | u64::from(self.chunk) | 1 << 63
    }

    /// Unpacks; `None` for anything but a packed chunk.
    #[must_use]
    pub fn unpack(word: u64) -> Option<Self> {
        (word >> 32 == 1 << 31).then_some(Self { block: (word >> 16) as u16, chunk: word as u16 })
    }
}

/// Epoch in the high 16 bits, a count in the low 48.
#[must_use]
pub fn pack_epoch(epoch: u16, count: u64) -> u64 {
    u64::from(epoch) << 48 | (count & COUNT_MAX)
}

/// Largest count beside an epoch.
pub const COUNT_MAX: u64 = (1 << 48) - 1;

/// Undoes [`pack_epoch`].
#[must_use]
pub fn unpack_epoch(word: u64) -> (u16, u64) {
    ((word >> 48) as u16, word & COUNT_MAX)
}

/// A slot's descriptor, without its state word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// What the payload is.
    pub content: ChunkId,
    /// Payload bytes.
    pub bytes: u64,
    /// Checksum of the payload.
    pub payload: u64,
    /// Slab.
    pub signature: u64,
    /// Generation of the slot that it belongs to.
    pub generation: u64,
}

impl Descriptor {
    fn words(&self) -> [u64; 5] {
        [self.content.pack(), self.bytes, self.payload, self.signature, self.generation]
    }

    /// Writes the descriptor of a slot that the caller holds FILLING; the checksum goes last.
    pub fn write(&self, memory: &(impl Words + ?Sized), at: usize) {
        let words = self.words();
        for (i, word) in words.into_iter().enumerate() {
            memory.store(at + slot::CONTENT + i, word);
        }
        memory.store(at + slot::CHECKSUM, checksum(&words));
    }

    /// Makes the descriptor of a slot invalid before its payload is touched.
    pub fn invalidate(memory: &(impl Words + ?Sized), at: usize) {
        memory.store(at + slot::CHECKSUM, 0);
    }

    /// Reads a descriptor; `None` unless its checksum holds.
    #[must_use]
    pub fn read(memory: &(impl Words + ?Sized), at: usize) -> Option<Self> {
        let mut words = [0; 5];
        for (i, word) in words.iter_mut().enumerate() {
            *word = memory.load(at + slot::CONTENT + i);
        }
        if memory.load(at + slot::CHECKSUM) != checksum(&words) {
            return None;
        }
        let [content, bytes, payload, signature, generation] = words;
        Some(Self { content: ChunkId::unpack(content)?, bytes, payload, signature, generation })
    }
}

/// xxh3 of some words; never 0, which stands for "no checksum".
#[must_use]
pub fn checksum(words: &[u64]) -> u64 {
    crate::checksum::xxh3_64(bytemuck::cast_slice(words)).max(1)
}
