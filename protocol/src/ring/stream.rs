//! One consumer's requests as the loader sees them: what is due next, and when each block is needed again.
//!
//! The queue belongs to the consumer; this is the loader's reading of it. Invariant: `future[block]` holds the requests from the cursor's on
//! that ask for the block, in order, each with the ordinal of its first chunk. Nothing is trusted that does not carry the consumer's
//! epoch: a queue that changes hands is read anew from its start.

use std::collections::VecDeque;

use super::producer::{Catalogue, request_tag};
use super::words::{ChunkId, Shape, Words, consumer, unpack_epoch};
use crate::error::{Error, Result};

/// The loader's cursor in one consumer's stream.
#[derive(Debug)]
pub(super) struct Stream {
    index: usize,
    /// Epoch whose requests these are; 0 before the first consumer came.
    pub epoch: u16,
    /// Its process is proven dead: nothing more is delivered in this epoch.
    pub dead: bool,
    /// Request and chunk that are delivered next.
    sequence: u64,
    chunk: u16,
    future: Vec<VecDeque<(u64, u64)>>,
    /// First request not yet entered into `future`.
    known: u64,
}

impl Stream {
    pub fn new(index: usize, blocks: usize) -> Self {
        Self { index, epoch: 0, dead: false, sequence: 0, chunk: 0, future: vec![VecDeque::new(); blocks], known: 0 }
    }

    /// Starts over for a new consumer.
    pub fn restart(&mut self, epoch: u16) {
        *self = Self { epoch, ..Self::new(self.index, self.future.len()) };
    }

    /// Forgets everything that a dead consumer asked for.
    pub fn end(&mut self) {
        self.dead = true;
        self.future.iter_mut().for_each(VecDeque::clear);
    }

    /// Moves the cursor to the consumer's position if that is ahead; whether it moved.
    pub fn catch_up(&mut self, memory: &impl Words, shape: &Shape) -> bool {
        let (epoch, position) = unpack_epoch(memory.load(shape.at(self.index, consumer::POSITION)));
        let (sequence, chunk) = (position >> 16, position as u16);
        if epoch != self.epoch || (sequence, chunk) <= (self.sequence, self.chunk) {
            return false;
        }
        (self.sequence, self.chunk) = (sequence, chunk);
        self.known = self.known.max(sequence);
        for queue in &mut self.future {
            while queue.front().is_some_and(|(s, _)| *s < sequence) {
                queue.pop_front();
            }
        }
        true
    }

    /// Enters requests posted since the last look into the future.
    pub fn learn(&mut self, memory: &impl Words, shape: &Shape, posted: u64) -> Result<()> {
        while !self.dead && self.known < posted {
            let Some((block, first)) = self.request(memory, shape, self.known)? else { break };
            self.future[usize::from(block)].push_back((self.known, first));
            self.known += 1;
        }
        Ok(())
    }

    /// Block and first ordinal of request `sequence`; `None` if the entry is not (or no longer) of this epoch.
    fn request(&self, memory: &impl Words, shape: &Shape, sequence: u64) -> Result<Option<(u16, u64)>> {
        let at = shape.request(self.index, sequence);
        let (tag, first) = (memory.load(at), memory.load(at + 1));
        let block = tag as u16;
        if tag != request_tag(self.epoch, sequence, block) {
            return Ok(None);
        }
        if usize::from(block) >= self.future.len() {
            return Err(Error::invariant("a consumer asked for a block that the model does not have")
                .expected(format!("0 to {}", self.future.len().saturating_sub(1)))
                .found(block));
        }
        Ok(Some((block, first)))
    }

    /// The chunk at the cursor and its ordinal, if it is posted.
    pub fn due(&self, memory: &impl Words, shape: &Shape) -> Result<Option<(ChunkId, u64)>> {
        if self.dead || self.sequence >= self.known {
            return Ok(None);
        }
        let Some((block, first)) = self.request(memory, shape, self.sequence)? else { return Ok(None) };
        Ok(Some((ChunkId { block, chunk: self.chunk }, first + u64::from(self.chunk))))
    }

    /// Passes the chunk at the cursor, which is of `block`.
    pub fn advance(&mut self, block: u16, catalogue: &Catalogue) {
        let block = usize::from(block);
        self.chunk += 1;
        if self.chunk >= catalogue.chunks[block] {
            self.future[block].pop_front();
            self.chunk = 0;
            self.sequence += 1;
        }
    }

    /// The ordinal, from `here` on, at which a chunk is needed next.
    pub fn next_use(&self, content: ChunkId, here: u64) -> Option<u64> {
        let queue = self.future.get(usize::from(content.block))?;
        queue.iter().map(|(_, first)| first + u64::from(content.chunk)).find(|ordinal| *ordinal >= here)
    }

    /// Moves the cursor back to the request that holds `ordinal`.
    pub fn rewind_to(&mut self, memory: &impl Words, shape: &Shape, ordinal: u64) -> Result<()> {
        if self.dead {
            return Ok(());
        }
        let mut sequence = self.sequence.min(self.known.saturating_sub(1));
        while let Some((block, first)) = self.request(memory, shape, sequence)? {
            // Served in full already: it is in the future again.
            let queue = &mut self.future[usize::from(block)];
            if sequence < self.known && queue.front().is_none_or(|(s, _)| *s > sequence) {
                queue.push_front((sequence, first));
            }
            if first <= ordinal {
                (self.sequence, self.chunk) = (sequence, (ordinal - first) as u16);
                break;
            }
            let Some(before) = sequence.checked_sub(1) else { break };
            sequence = before;
        }
        Ok(())
    }
}
