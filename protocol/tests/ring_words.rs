#![allow(clippy::unwrap_used, clippy::expect_used)]
//! The words of the ring: where facts lie, that packing loses nothing, that a torn descriptor is never read as a whole one.
//!
//! Small enough for Miri: `cargo +nightly miri test -p serenity-protocol --test ring_words`.

use std::sync::atomic::AtomicU64;

use serenity_protocol::ring::producer::{delivery_slot, delivery_word, request_tag};
use serenity_protocol::ring::words::{
    CONSUMERS_AT, COUNT_MAX, ChunkId, Descriptor, GENERATION_MAX, ORDINAL_MAX, SLOT_WORDS, Shape, ShareWord, SlotWord, State, Words,
    consumer, pack_epoch, slot, unpack_epoch,
};

const DESCRIPTOR: Descriptor =
    Descriptor { content: ChunkId { block: 55, chunk: 3 }, bytes: 4096, payload: 0xfeed, signature: 9, generation: 12 };

fn memory(words: usize) -> Vec<AtomicU64> {
    (0..words).map(|_| AtomicU64::new(0)).collect()
}

#[test]
fn packed_words_come_back() {
    for (epoch, count) in [(0, 0), (1, 1), (u16::MAX, COUNT_MAX), (77, 1 << 32)] {
        assert_eq!(unpack_epoch(pack_epoch(epoch, count)), (epoch, count));
    }
    for state in [State::Free, State::Filling, State::Ready, State::Leased] {
        for (epoch, generation) in [(0, 0), (u16::MAX, GENERATION_MAX), (3, 1 << 39)] {
            let word = SlotWord { state, epoch, generation };
            let of_slots = matches!(state, State::Free | State::Filling);
            assert_eq!(SlotWord::unpack(word.pack()), of_slots.then_some(word));
            let share = ShareWord { state, epoch, ordinal: generation.min(ORDINAL_MAX) };
            assert_eq!(ShareWord::unpack(share.pack()), (state != State::Filling).then_some(share));
        }
    }
    for (block, chunk) in [(0, 0), (u16::MAX, u16::MAX), (1, 2)] {
        let id = ChunkId { block, chunk };
        assert_eq!(ChunkId::unpack(id.pack()), Some(id));
    }
    for word in [0, 5 << 56, u64::MAX] {
        assert_eq!(SlotWord::unpack(word), None);
        assert_eq!(ShareWord::unpack(word), None);
    }
    for word in [0, 1, 1 << 62, u64::MAX, 3 << 62] {
        assert_eq!(ChunkId::unpack(word), None);
    }
}

#[test]
fn a_delivery_and_a_request_answer_to_their_own_place_only() {
    let ordinal = pack_epoch(9, 1 << 20);
    let word = delivery_word(ordinal, 65_535);
    assert_eq!(delivery_slot(word, ordinal), Some(65_535));
    for other in [ordinal + 1, ordinal - 1, pack_epoch(8, 1 << 20), pack_epoch(10, 1 << 20)] {
        assert_eq!(delivery_slot(word, other), None);
    }
    assert_eq!(delivery_slot(0, pack_epoch(1, 0)), None, "zeroed memory delivers nothing");
    assert_ne!(request_tag(1, 5, 7), request_tag(2, 5, 7));
    assert_ne!(request_tag(1, 5, 7), request_tag(1, 6, 7));
}

#[test]
fn nothing_overlaps_in_any_shape() {
    const LINE: [usize; 6] = [consumer::POSTED, consumer::POSITION, consumer::PID, consumer::START, consumer::FINISHED, consumer::WAKE];
    for (slots, requests, consumers) in [(1, 1, 1), (2, 2, 1), (3, 5, 2), (7, 16, 3), (64, 3, 5)] {
        let shape = Shape { slots, requests, consumers };
        let mut owner = vec![0u8; shape.words()];
        let mut take = |at: usize, len: usize| {
            for word in &mut owner[at..at + len] {
                assert_eq!(std::mem::replace(word, 1), 0, "{shape:?}: word taken twice");
            }
        };
        take(0, CONSUMERS_AT);
        for index in 0..consumers {
            LINE.iter().for_each(|word| take(shape.at(index, *word), 1));
            (0..requests as u64).for_each(|r| take(shape.request(index, r), 2));
            (0..slots as u64).for_each(|o| take(shape.delivery(index, o), 1));
            (0..slots).for_each(|s| take(shape.share(index, s), 1));
        }
        (0..slots).for_each(|s| take(shape.slot(s), SLOT_WORDS));
        assert!((0..slots).all(|s| shape.slot(s).is_multiple_of(SLOT_WORDS)), "slots start on cache lines");
        assert!(shape.quota() * consumers <= slots && (slots < consumers || shape.quota() > 0));
    }
}

#[test]
fn a_descriptor_is_read_whole_or_not_at_all() {
    let memory = memory(2 * SLOT_WORDS);
    let words = &memory[..];
    assert_eq!(Descriptor::read(words, SLOT_WORDS), None, "zeroed memory is no descriptor");
    DESCRIPTOR.write(words, SLOT_WORDS);
    assert_eq!(Descriptor::read(words, SLOT_WORDS), Some(DESCRIPTOR));
    words.store(SLOT_WORDS + slot::DAMAGED, 5);
    assert_eq!(Descriptor::read(words, SLOT_WORDS), Some(DESCRIPTOR), "a mark is no part of it");
    for index in slot::CONTENT..=slot::CHECKSUM {
        for bit in 0..64 {
            let whole = words.load(SLOT_WORDS + index);
            words.store(SLOT_WORDS + index, whole ^ 1 << bit);
            assert_eq!(Descriptor::read(words, SLOT_WORDS), None, "word {index} bit {bit}");
            words.store(SLOT_WORDS + index, whole);
        }
    }
    Descriptor::invalidate(words, SLOT_WORDS);
    assert_eq!(Descriptor::read(words, SLOT_WORDS), None);
    assert!((0..SLOT_WORDS).all(|i| words.load(i) == 0), "the neighbour is untouched");
}
