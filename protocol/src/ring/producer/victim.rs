//! Which slot a fill overwrites: an empty one, an idle one, or the one needed last (the request queues are the future).

use super::super::stream::Stream;
use super::super::words::{SlotWord, State, Words};
use super::Producer;
use crate::error::Result;

/// Chunks that may be ahead of a consumer even where filling them overwrites something needed earlier.
const LOOKAHEAD_MIN: u64 = 2;

/// How well a slot bears being overwritten: the greatest is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Worth {
    /// Holds what is needed after so many chunks.
    Needed(u64),
    /// Holds what nobody has asked for again. What was offered longest ago goes first: a pass forward and back over the model needs that
    /// last, should there be another.
    Idle(std::cmp::Reverse<u64>),
    /// Holds nothing.
    Empty,
}

impl<M: Words> Producer<M> {
    /// The slot to overwrite for a consumer that has `ahead` chunks ahead of it: an empty one, else one whose content nobody has asked for
    /// again, else the one whose content is needed furthest in the future by anybody, counted in chunks from where each consumer is. None if every slot is out, or if the best one
    /// is needed before the chunk at hand and the consumer has enough.
    pub(super) fn victim(&self, consumer: usize, ahead: u64) -> Result<Option<(usize, u64, SlotWord)>> {
        let mut heads = Vec::with_capacity(self.shape.consumers);
        for (other, stream) in self.streams.iter().enumerate() {
            if let Some((_, here)) = self.due(other)? {
                heads.push((stream, here, if other == consumer { ahead } else { self.supply(other, here)?.1 }));
            }
        }
        let mut best: Option<(Worth, usize, u64, SlotWord)> = None;
        for index in 0..self.shape.slots {
            let (raw, word) = self.slot_word(index)?;
            if word.state != State::Free || self.is_out(index)? {
                continue;
            }
            let worth = self.worth(index, &heads);
            if best.is_none_or(|(least, ..)| worth > least) {
                best = Some((worth, index, raw, word));
            }
            if worth == Worth::Empty {
                break;
            }
        }
        let Some((worth, index, raw, word)) = best else { return Ok(None) };
        Ok((worth > Worth::Needed(ahead) || ahead < LOOKAHEAD_MIN).then_some((index, raw, word)))
    }

    /// `heads`: each consumer's stream, where it is, and how many chunks lie before that.
    fn worth(&self, index: usize, heads: &[(&Stream, u64, u64)]) -> Worth {
        let Some(content) = self.slots[index].content else { return Worth::Empty };
        let distance = |(stream, here, ahead): &(&Stream, u64, u64)| Some(stream.next_use(content, *here)? - here + ahead);
        let next = heads.iter().filter_map(distance).min();
        next.map_or(Worth::Idle(std::cmp::Reverse(self.slots[index].offered)), Worth::Needed)
    }
}
