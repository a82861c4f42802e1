//! Which slots of device memory each visit of a block uses, without device.
//!
//! Streamed blocks lie in equal slots that follow each other; a block takes one, or as many neighbours as its payload is long (a double block
//! of FLUX.2 is two single ones). A resident block has a slot of its own. When visits are announced, each gets its place at once: where the
//! block is already, else the place whose content is needed furthest in the future (least recently visited first among those not needed).
//! That looks at the visits alone, never at what happens to be finished, so that the order of loads, which the loader follows, is fixed.
#![forbid(unsafe_code)]

use serenity_protocol::geometry::BlockId;
use serenity_protocol::{Error, Result};

use super::blocks::Payload;

/// Bytes that every slot is a multiple of.
const ALIGNMENT: usize = serenity_cuda::arena::ALIGNMENT;

/// How payloads of different lengths share slots of one size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slots {
    /// Bytes of a slot.
    pub bytes: usize,
    /// Slots that each block takes.
    pub spans: Vec<usize>,
}

impl Slots {
    /// Slots about as long as the shortest payload.
    #[must_use]
    pub fn of(payloads: &[Payload]) -> Self {
        let shortest = payloads.iter().map(|p| p.bytes).filter(|b| *b > 0).min().unwrap_or(1);
        // More pieces than eight would only make the search for a place longer.
        let span = |p: &Payload| ((p.bytes + shortest / 2) / shortest).clamp(1, 8);
        let spans: Vec<usize> = payloads.iter().map(span).collect();
        let bytes = payloads.iter().zip(&spans).map(|(p, s)| p.bytes.div_ceil(*s).next_multiple_of(ALIGNMENT)).max().unwrap_or(0);
        Self { bytes, spans }
    }

    /// Slots of the largest block.
    #[must_use]
    pub fn largest(&self) -> usize {
        self.spans.iter().copied().max().unwrap_or(1)
    }
}

/// Where a visit finds its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The first slot.
    pub first: usize,
    /// How many.
    pub count: usize,
    /// Visits that must be finished before the block is loaded; none if it is there already.
    pub load: Option<u64>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// The block that alone uses it.
    owner: Option<BlockId>,
    /// What it holds once all loads so far are done.
    holds: Option<BlockId>,
    /// The number of its last visit.
    last: u64,
}

/// The slots of a run: those of resident blocks, then those that blocks stream through.
#[derive(Debug, Clone)]
pub struct Assignment {
    slots: Vec<Slot>,
    /// Slots of resident blocks.
    owned: usize,
    spans: Vec<usize>,
    /// Visits assigned.
    count: u64,
}

impl Assignment {
    /// With nothing loaded. `spans` has an entry for each block.
    #[must_use]
    pub fn new(resident: &[BlockId], streaming: usize, spans: Vec<usize>) -> Self {
        let own = resident.iter().map(|b| Slot { owner: Some(*b), ..Slot::default() });
        let slots = own.chain(std::iter::repeat_n(Slot::default(), streaming)).collect();
        Self { slots, owned: resident.len(), spans, count: 0 }
    }

    /// The place of each visit.
    ///
    /// # Errors
    /// [`Error::Invariant`] if there are not enough slots for a block.
    pub fn assign(&mut self, visits: &[BlockId]) -> Result<Vec<Place>> {
        (0..visits.len()).map(|i| self.one(visits, i)).collect()
    }

    fn one(&mut self, visits: &[BlockId], i: usize) -> Result<Place> {
        let missing = || Error::invariant("there is no slot for a streamed block");
        let block = *visits.get(i).ok_or_else(missing)?;
        let own = self.slots.iter().take(self.owned).position(|s| s.owner == Some(block));
        let count = if own.is_some() { 1 } else { *self.spans.get(usize::from(block.0)).ok_or_else(missing)? };
        let holds = |first: &usize| self.range(*first, count).all(|s| s.holds == Some(block));
        let there = own.filter(|f| holds(f)).or_else(|| self.places(count).find(holds));
        let rest = visits.get(i + 1..).unwrap_or_default();
        let first = there.or(own).or_else(|| self.victim(count, rest)).ok_or_else(missing)?;
        let last = self.range(first, count).map(|s| s.last).max().unwrap_or(0);
        self.count += 1;
        if there.is_none() {
            // What is partly overwritten is gone as a whole.
            let gone: Vec<BlockId> = self.range(first, count).filter_map(|s| s.holds).collect();
            self.slots.iter_mut().filter(|s| s.holds.is_some_and(|b| gone.contains(&b))).for_each(|s| s.holds = None);
        }
        for slot in self.slots.iter_mut().skip(first).take(count) {
            (slot.holds, slot.last) = (Some(block), self.count);
        }
        Ok(Place { first, count, load: there.is_none().then_some(last) })
    }

    fn range(&self, first: usize, count: usize) -> impl Iterator<Item = &Slot> {
        self.slots.iter().skip(first).take(count)
    }

    /// First slots of the places of `count` streaming slots; they do not overlap each other.
    fn places(&self, count: usize) -> impl Iterator<Item = usize> + use<> {
        let (owned, streaming) = (self.owned, self.slots.len() - self.owned);
        (0..streaming / count.max(1)).map(move |place| owned + place * count)
    }

    fn victim(&self, count: usize, rest: &[BlockId]) -> Option<usize> {
        let next_use = |slot: &Slot| slot.holds.and_then(|b| rest.iter().position(|v| *v == b)).unwrap_or(usize::MAX);
        self.places(count).max_by_key(|first| {
            let needed = self.range(*first, count).map(next_use).min();
            let last = self.range(*first, count).map(|s| s.last).max();
            // The later place among equals, as for equal keys `max_by_key` takes the last.
            (needed, std::cmp::Reverse(last))
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use proptest::prelude::*;

    fn there_and_back(n: u16) -> Vec<BlockId> {
        (0..n).chain((0..n - 1).rev()).map(BlockId).collect()
    }

    /// Plays visits and loads and checks that every visit finds its whole block, and that no load overwrites what a visit still needs.
    fn loads_of(a: &mut Assignment, visits: &[BlockId], contents: &mut [Option<BlockId>], before: u64) -> usize {
        let assigned = a.assign(visits).unwrap();
        let mut loads = 0;
        for (i, (block, place)) in visits.iter().zip(assigned).enumerate() {
            let slots = &mut contents[place.first..place.first + place.count];
            if let Some(after) = place.load {
                assert!(after <= before + i as u64, "a load waits for a visit behind its own");
                slots.fill(Some(*block));
                loads += 1;
            }
            assert!(slots.iter().all(|s| *s == Some(*block)), "visit {i} to {block:?}: {slots:?}");
        }
        loads
    }

    #[test]
    fn every_visit_finds_its_block_and_the_turn_is_reused() {
        for slots in 1..6 {
            let mut a = Assignment::new(&[], slots, vec![1; 10]);
            let mut contents = vec![None; slots];
            let visits = there_and_back(10);
            let first = loads_of(&mut a, &visits, &mut contents, 0);
            // All once, and on the way back all but those that the slots held at the turn.
            assert_eq!(first, 10 + 10 - slots, "{slots}");
            let second = loads_of(&mut a, &visits, &mut contents, visits.len() as u64);
            assert!(second <= first);
        }
    }

    #[test]
    fn resident_blocks_are_loaded_once() {
        let resident = [1, 4, 7].map(BlockId);
        let mut a = Assignment::new(&resident, 4, vec![2, 2, 2, 1, 1, 1, 1, 1, 1]);
        let mut contents = vec![None; 7];
        let visits = there_and_back(9);
        loads_of(&mut a, &visits, &mut contents, 0);
        let assigned = a.assign(&visits).unwrap();
        assert!(visits.iter().zip(assigned).filter(|(b, _)| resident.contains(b)).all(|(_, place)| place.load.is_none()));
    }

    #[test]
    fn two_slots_are_enough_to_load_ahead() {
        let mut a = Assignment::new(&[], 2, vec![1; 8]);
        let assigned = a.assign(&there_and_back(8)).unwrap();
        // The load for visit i (from 0) begins at the latest when visit i - 2 is finished, that is while i - 1 computes.
        for (i, place) in assigned.iter().enumerate() {
            assert!(place.load.is_none_or(|after| after as usize <= i.saturating_sub(1)), "visit {i}: {place:?}");
        }
    }

    #[test]
    fn streaming_without_slots_is_refused() {
        assert!(Assignment::new(&[BlockId(0)], 0, vec![1; 2]).assign(&[BlockId(1)]).is_err());
        assert!(Assignment::new(&[], 1, vec![2; 2]).assign(&[BlockId(1)]).is_err(), "a block of two slots");
    }

    #[test]
    fn payloads_of_two_lengths_share_slots() {
        let payloads = |bytes: &[usize]| bytes.iter().map(|b| Payload { bytes: *b, parts: Vec::new() }).collect::<Vec<_>>();
        let dev = Slots::of(&payloads(&[982_000_700, 490_900_000]));
        assert_eq!((dev.spans.as_slice(), dev.largest()), ([2, 1].as_slice(), 2));
        assert!(dev.bytes >= 491_000_350 && dev.bytes < 491_001_000 && dev.bytes.is_multiple_of(ALIGNMENT));
        assert_eq!(Slots::of(&payloads(&[1400, 1000])).spans, [1, 1]);
        assert_eq!(Slots::of(&[]).bytes, 0);
    }

    proptest! {
        #[test]
        fn any_mixture_of_blocks_finds_its_place(
            spans in proptest::collection::vec(1usize..3, 2..12), extra in 0usize..5, resident in proptest::collection::vec(0u16..12, 0..4),
        ) {
            let n = spans.len() as u16;
            let mut resident: Vec<BlockId> = resident.into_iter().filter(|b| *b < n).map(BlockId).collect();
            resident.sort();
            resident.dedup();
            let streaming = spans.iter().copied().max().unwrap() + extra;
            let mut a = Assignment::new(&resident, streaming, spans);
            let mut contents = vec![None; resident.len() + streaming];
            let mut before = 0;
            for _ in 0..3 {
                let visits = there_and_back(n);
                loads_of(&mut a, &visits, &mut contents, before);
                before += visits.len() as u64;
            }
        }
    }
}
