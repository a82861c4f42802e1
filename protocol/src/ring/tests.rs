#![allow(clippy::unwrap_used, clippy::expect_used)]
//! The two state machines against each other over plain memory, with random schedules and crashes between calls; and the real segment.

use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;

use super::consumer::{Consumer, Leased};
use super::producer::{Action, Catalogue, Job, Producer};
use super::segment::{RingRole, RingSpec, Segment};
use super::words::{ChunkId, Descriptor, Shape, ShareWord, SlotWord, State, Words, slot};
use crate::config::PayloadForm;

const SIGNATURE: u64 = 77;

/// A small deterministic generator (xorshift*), so that a failing seed can be replayed.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % sides
    }
}

/// The payload bytes of the model: what each slot really holds, and the checksum that the fill computed.
fn payload_of(content: ChunkId) -> u64 {
    content.pack().wrapping_mul(0x9e37_79b9) | 1
}

struct World<'a> {
    memory: &'a [AtomicU64],
    shape: Shape,
    catalogue: Catalogue,
    /// What a reader of the slot's bytes would find; `None` = half written.
    bytes: Vec<Option<ChunkId>>,
    producer: Option<Producer<&'a [AtomicU64]>>,
    jobs: VecDeque<Job>,
    consumer: Option<Consumer<&'a [AtomicU64]>>,
    leases: VecDeque<Leased>,
    wanted: VecDeque<ChunkId>,
    backlog: VecDeque<u16>,
    fills: u64,
    generations: Vec<u64>,
    posting: bool,
}

impl<'a> World<'a> {
    fn new(memory: &'a [AtomicU64], shape: Shape, catalogue: Catalogue) -> Self {
        shape.format(memory);
        Self {
            memory,
            shape,
            catalogue,
            bytes: vec![None; shape.slots],
            producer: None,
            jobs: VecDeque::new(),
            consumer: None,
            leases: VecDeque::new(),
            wanted: VecDeque::new(),
            backlog: VecDeque::new(),
            fills: 0,
            generations: vec![0; shape.slots],
            posting: true,
        }
    }

    fn producer_step(&mut self, dice: &mut Dice) {
        let Some(producer) = &mut self.producer else {
            self.producer = Some(Producer::attach(self.memory, self.shape, self.catalogue.clone()).unwrap());
            return;
        };
        if !self.jobs.is_empty() && dice.roll(2) == 0 {
            let job = self.jobs.remove(dice.roll(self.jobs.len() as u64) as usize).unwrap();
            self.bytes[job.slot] = Some(job.content);
            self.fills += 1;
            producer.publish(job, 8, payload_of(job.content)).unwrap();
            return;
        }
        match producer.next_action().unwrap() {
            Action::Wait | Action::Republished(_) => {}
            Action::Fill(job) => {
                self.bytes[job.slot] = None;
                self.jobs.push_back(job);
            }
            Action::Verify(job, checksum) => {
                if self.bytes[job.slot].map(payload_of) == Some(checksum) {
                    producer.publish(job, 8, checksum).unwrap();
                } else {
                    producer.abandon(job).unwrap();
                }
            }
        }
    }

    fn consumer_step(&mut self, dice: &mut Dice) {
        let Some(consumer) = &mut self.consumer else {
            self.consumer = Some(Consumer::attach_as(self.memory, self.shape, self.catalogue.clone(), 0).unwrap());
            return;
        };
        match dice.roll(4) {
            0 if self.posting && self.backlog.len() + self.wanted.len() < 60 || !self.backlog.is_empty() => {
                for _ in 0..if self.posting { 1 + dice.roll(6) } else { 0 } {
                    self.backlog.push_back(dice.roll(self.catalogue.chunks.len() as u64) as u16);
                }
                let blocks: Vec<u16> = self.backlog.iter().copied().collect();
                let posted = consumer.post(&blocks).unwrap();
                for block in self.backlog.drain(..posted) {
                    self.wanted.extend((0..self.catalogue.chunks[usize::from(block)]).map(|chunk| ChunkId { block, chunk }));
                }
            }
            1 if !self.leases.is_empty() => {
                let lease = self.leases.pop_front().unwrap();
                // Bytes must not have changed while they were leased.
                assert_eq!(self.bytes[lease.slot], Some(lease.content));
                consumer.release(&lease).unwrap();
            }
            _ if !self.wanted.is_empty() && self.leases.len() + 1 < self.shape.slots.max(2) => {
                if let Some(lease) = consumer.try_lease().unwrap() {
                    assert_eq!(Some(lease.content), self.wanted.pop_front(), "out of order");
                    assert_eq!(self.bytes[lease.slot], Some(lease.content), "leased bytes that are not the chunk's");
                    assert_eq!(lease.checksum, payload_of(lease.content));
                    self.leases.push_back(lease);
                }
            }
            _ => {}
        }
    }

    fn crash(&mut self, dice: &mut Dice) {
        if dice.roll(2) == 0 {
            self.producer = None;
            self.jobs.clear();
        } else {
            self.consumer = None;
            self.leases.clear();
            self.wanted.clear();
            self.backlog.clear();
        }
    }

    fn check(&mut self) {
        for i in 0..self.shape.slots {
            let word = SlotWord::unpack(self.memory.load(self.shape.slot(i) + slot::STATE)).expect("a known state");
            assert!(word.generation >= self.generations[i], "a generation decreased");
            self.generations[i] = word.generation;
            let share = ShareWord::unpack(self.memory.load(self.shape.share(0, i))).expect("a known state");
            if share.state != State::Free {
                let descriptor = Descriptor::read(self.memory, self.shape.slot(i)).expect("READY carries a valid descriptor");
                assert_eq!(self.bytes[i], Some(descriptor.content));
            }
        }
    }
}

fn play(seed: u64, crashes: bool) -> u64 {
    let mut dice = Dice::new(seed);
    let shape = Shape { slots: 1 + dice.roll(6) as usize, requests: 4 + dice.roll(8) as usize, consumers: 1 };
    let catalogue = Catalogue { chunks: (0..1 + dice.roll(5)).map(|_| 1 + dice.roll(3) as u16).collect(), signature: SIGNATURE };
    let memory: Vec<AtomicU64> = (0..shape.words()).map(|_| AtomicU64::new(0)).collect();
    let mut world = World::new(&memory, shape, catalogue);
    for _ in 0..600 {
        match dice.roll(if crashes { 41 } else { 40 }) {
            0..20 => world.producer_step(&mut dice),
            20..40 => world.consumer_step(&mut dice),
            _ => world.crash(&mut dice),
        }
        world.check();
    }
    world.posting = false;
    // Liveness: without further crashes everything that was asked for arrives.
    for round in 0.. {
        if world.consumer.is_some() && world.backlog.is_empty() && world.wanted.is_empty() && world.leases.is_empty() {
            break;
        }
        assert!(round < 20_000, "seed {seed}: stuck with {} chunks wanted, {} leased", world.wanted.len(), world.leases.len());
        world.producer_step(&mut dice);
        world.consumer_step(&mut dice);
        world.check();
    }
    world.fills
}

#[test]
fn every_schedule_delivers_in_order() {
    let fills: u64 = (0..2_000).map(|seed| play(seed, false)).sum();
    assert!(fills > 2_000);
}

#[test]
fn every_schedule_with_crashes_delivers_in_order() {
    let fills: u64 = (0..4_000).map(|seed| play(seed, true)).sum();
    assert!(fills > 4_000);
}

/// Forward, backward, forward, backward over `blocks` blocks of one chunk with a pool of `slots`: how many fills it takes.
fn fills_of_steps(blocks: u16, slots: usize, steps: usize) -> u64 {
    let pass: Vec<u16> = (0..blocks).chain((0..blocks - 1).rev()).collect();
    fills(blocks, slots, &vec![pass; steps])
}

/// The same for any passes, each asked for when the one before is over.
fn fills(blocks: u16, slots: usize, passes: &[Vec<u16>]) -> u64 {
    let shape = Shape { slots, requests: 4096, consumers: 1 };
    let memory: Vec<AtomicU64> = (0..shape.words()).map(|_| AtomicU64::new(0)).collect();
    let catalogue = Catalogue { chunks: vec![1; usize::from(blocks)], signature: SIGNATURE };
    let mut world = World::new(&memory, shape, catalogue.clone());
    let mut producer = Producer::attach(&memory[..], shape, catalogue.clone()).unwrap();
    let mut consumer = Consumer::attach_as(&memory[..], shape, catalogue, 0).unwrap();
    for pass in passes {
        assert_eq!(consumer.post(pass).unwrap(), pass.len());
        let mut taken = 0;
        while taken < pass.len() {
            loop {
                match producer.next_action().unwrap() {
                    Action::Wait => break,
                    Action::Fill(job) => {
                        world.fills += 1;
                        producer.publish(job, 8, 1).unwrap();
                    }
                    Action::Republished(_) => {}
                    Action::Verify(..) => panic!("nothing is older than this loader"),
                }
            }
            let lease = consumer.try_lease().unwrap().expect("delivered");
            assert_eq!(lease.content.block, pass[taken]);
            consumer.release(&lease).unwrap();
            taken += 1;
        }
    }
    world.fills
}

#[test]
fn a_pool_as_large_as_the_model_reads_it_once() {
    assert_eq!(fills_of_steps(7, 7, 5), 7);
    assert_eq!(fills_of_steps(7, 64, 5), 7);
    // Whatever is asked for and whatever the loader knows of what will be: the last blocks once (the device still has them on the way
    // back), single passes, blocks that are never asked for again.
    let once: Vec<u16> = (0..9).chain((0..6).rev()).collect();
    assert_eq!(fills(9, 9, &vec![once.clone(); 5]), 9);
    assert_eq!(fills(9, 20, &vec![once; 5]), 9);
    let back: Vec<u16> = (0..9).rev().collect();
    assert_eq!(fills(9, 9, &[(0..9).collect(), back.clone(), (0..9).collect(), back]), 9);
    assert_eq!(fills(9, 9, &[vec![0, 1, 2], vec![3, 4], vec![5], vec![6, 7, 8], vec![8, 0, 4]]), 9);
}

#[test]
fn a_smaller_pool_keeps_what_the_next_step_needs_first() {
    // Each step asks for itself alone. In a forward and a backward pass over 20 blocks with 10 slots, the least that must be read is 10
    // blocks forward and, with the last 10 at hand, 10 backward; 2 more in each pass come from reading ahead.
    let fills = fills_of_steps(20, 10, 9) - fills_of_steps(20, 10, 1);
    assert!(fills <= 8 * 2 * (10 + 2), "{fills} fills in 8 steps");
}

#[test]
fn a_smaller_pool_reads_no_more_than_what_does_not_fit() {
    // Belady on a forward-backward sweep: each pass misses at most the blocks beyond the pool, plus the lookahead.
    for slots in 3..7 {
        let steps = 6;
        let fills = fills_of_steps(7, slots, steps);
        let bound = 7 + (2 * steps as u64) * (7 - slots as u64 + 2);
        assert!(fills <= bound, "{slots} slots: {fills} fills, bound {bound}");
    }
}

/// A ring with a producer that fills at once, and consumers of a model with blocks of one chunk.
struct Fleet {
    shape: Shape,
    memory: std::rc::Rc<Vec<AtomicU64>>,
    producer: Producer<std::rc::Rc<Vec<AtomicU64>>>,
    consumers: Vec<Consumer<std::rc::Rc<Vec<AtomicU64>>>>,
    fills: u64,
}

impl Words for std::rc::Rc<Vec<AtomicU64>> {
    fn load(&self, index: usize) -> u64 {
        self.as_slice().load(index)
    }
    fn store(&self, index: usize, value: u64) {
        self.as_slice().store(index, value);
    }
    fn swap(&self, index: usize, old: u64, new: u64) -> Result<(), u64> {
        self.as_slice().swap(index, old, new)
    }
}

impl Fleet {
    fn new(blocks: u16, slots: usize, consumers: usize) -> Self {
        let shape = Shape { slots, requests: 256, consumers };
        let memory = std::rc::Rc::new((0..shape.words()).map(|_| AtomicU64::new(0)).collect::<Vec<_>>());
        shape.format(&memory);
        let catalogue = Catalogue { chunks: vec![1; usize::from(blocks)], signature: SIGNATURE };
        let attach = |index| Consumer::attach_as(memory.clone(), shape, catalogue.clone(), index).unwrap();
        let consumers = (0..consumers).map(attach).collect();
        let producer = Producer::attach(memory.clone(), shape, catalogue.clone()).unwrap();
        Self { shape, memory, producer, consumers, fills: 0 }
    }

    fn serve(&mut self) {
        loop {
            match self.producer.next_action().unwrap() {
                Action::Wait => return,
                Action::Republished(_) => {}
                Action::Fill(job) => {
                    self.fills += 1;
                    self.producer.publish(job, 8, payload_of(job.content)).unwrap();
                }
                Action::Verify(..) => panic!("nothing is older than this loader"),
            }
        }
    }

    /// Serves and takes one chunk, which must be there.
    fn take(&mut self, index: usize, block: u16) {
        self.serve();
        let lease = self.consumers[index].try_lease().unwrap().expect("delivered");
        assert_eq!((lease.content.block, lease.checksum), (block, payload_of(lease.content)));
        self.consumers[index].release(&lease).unwrap();
    }
}

#[test]
fn consumers_in_step_share_every_fill() {
    let mut fleet = Fleet::new(9, 8, 3);
    let pass: Vec<u16> = (0..9).chain((0..8).rev()).collect();
    for consumer in &mut fleet.consumers {
        assert_eq!(consumer.post(&pass).unwrap(), pass.len());
    }
    for &block in &pass {
        (0..3).for_each(|index| fleet.take(index, block));
    }
    let alone = fills_of_steps(9, 8, 1);
    assert!(fleet.fills <= alone + 2, "{} fills for three consumers, {alone} for one", fleet.fills);
}

#[test]
fn a_consumer_that_stands_still_with_all_that_it_may_have_holds_nobody_up() {
    for slots in 2..9 {
        let mut fleet = Fleet::new(9, slots, 2);
        let pass: Vec<u16> = (0..9).chain((0..8).rev()).collect();
        fleet.consumers[0].post(&[3, 7, 1, 8, 0, 2, 4, 5, 6]).unwrap();
        // It leases one chunk, is offered others, and is not heard of again.
        fleet.serve();
        assert!(fleet.consumers[0].try_lease().unwrap().is_some());
        fleet.consumers[1].post(&pass).unwrap();
        pass.iter().for_each(|block| fleet.take(1, *block));
        let held = fleet.producer.occupied() as usize;
        assert!(held <= fleet.shape.quota(), "{held} of {slots} slots for one of two consumers");
    }
}

#[test]
fn what_a_dead_consumer_held_is_free_again_and_its_successor_starts_anew() {
    let mut fleet = Fleet::new(4, 4, 2);
    fleet.consumers[0].post(&[0, 1, 2]).unwrap();
    fleet.serve();
    let held = fleet.consumers[0].try_lease().unwrap().expect("delivered");
    let epoch = fleet.producer.consumer_epoch(0);
    assert_eq!(fleet.producer.occupied(), 2, "one leased, one READY");
    assert!(fleet.producer.bury(0, epoch).unwrap());
    assert!(!fleet.producer.bury(0, epoch).unwrap(), "once is enough");
    fleet.serve();
    assert_eq!(fleet.producer.occupied(), 0, "nothing is delivered to the dead");
    fleet.consumers[1].post(&[1, 0]).unwrap();
    fleet.take(1, 1);
    // The successor is of a later epoch: the funeral, late by a moment, does not reach it.
    let catalogue = Catalogue { chunks: vec![1; 4], signature: SIGNATURE };
    let mut heir = Consumer::attach_as(fleet.memory.clone(), fleet.shape, catalogue, 0).unwrap();
    assert!(!fleet.producer.bury(0, epoch).unwrap());
    assert_eq!(fleet.consumers[0].release(&held).unwrap_err().exit_code(), 69, "the first one is replaced");
    heir.post(&[3]).unwrap();
    fleet.consumers[0] = heir;
    fleet.take(0, 3);
    fleet.take(1, 0);
}

/// Once a chunk is damaged, two slots may hold the same one; the damaged copy's place is then lost with its loader, while the same
/// consumer has the good copy for a later place.
#[test]
fn a_chunk_that_was_offered_for_a_later_place_serves_an_earlier_one_that_was_lost() {
    let mut fleet = Fleet::new(1, 4, 2);
    (0..2).for_each(|c| assert_eq!(fleet.consumers[c].post(&[0, 0]).unwrap(), 2));
    fleet.serve();
    let damaged = fleet.consumers[1].try_lease().unwrap().expect("delivered");
    fleet.consumers[1].release_corrupt(&damaged).unwrap();
    fleet.serve();
    let ready = |index: usize| ShareWord::unpack(fleet.memory.load(fleet.shape.share(0, index))).unwrap();
    let places: Vec<u64> = (0..4).map(ready).filter(|s| s.state == State::Ready).map(|s| s.ordinal).collect();
    assert_eq!((places, fleet.fills), (vec![0, 1], 2), "two copies are offered");
    let catalogue = Catalogue { chunks: vec![1], signature: SIGNATURE };
    fleet.producer = Producer::attach(fleet.memory.clone(), fleet.shape, catalogue).unwrap();
    for (index, ..) in fleet.producer.ready_slots().unwrap() {
        fleet.producer.confirm(index);
    }
    for consumer in [0, 0, 1] {
        fleet.take(consumer, 0);
    }
    assert_eq!(fleet.fills, 2, "the good copy serves everybody");
}

#[test]
fn a_consumer_that_the_ring_has_no_room_for_is_refused() {
    let memory: Vec<AtomicU64> = (0..4096).map(|_| AtomicU64::new(0)).collect();
    let shape = Shape { slots: 2, requests: 4, consumers: 2 };
    let catalogue = Catalogue { chunks: vec![1], signature: SIGNATURE };
    let error = Consumer::attach_as(&memory[..], shape, catalogue, 2).err().expect("there are 0 and 1");
    assert_eq!(error.exit_code(), 64);
}

#[test]
fn segment_consumers_have_roles_of_their_own() {
    let spec = RingSpec { consumers: 2, ..spec("two") };
    let loader = Segment::open_or_create(&spec).unwrap();
    // A trainer does not know how many others there are.
    let alone = RingSpec { consumers: 1, ..spec.clone() };
    let first = Segment::open_as(&alone, 0).unwrap().expect("ready");
    first.sign(RingRole::Consumer(0));
    let second = Segment::open_as(&alone, 1).unwrap().expect("ready");
    second.sign(RingRole::Consumer(1));
    assert_eq!(second.shape(), loader.shape());
    let twin = Segment::open_as(&alone, 1).err().expect("two trainers with one identity");
    assert_eq!(twin.exit_code(), 69);
    assert!(twin.to_string().contains("consumer 1") && twin.to_string().contains(&std::process::id().to_string()), "{twin}");
    assert_eq!(Segment::open_as(&alone, 2).err().expect("two only").exit_code(), 64);
    first.leave();
    assert!(!loader.is_held(RingRole::Consumer(0)) && loader.is_held(RingRole::Consumer(1)));
    second.leave();
    loader.leave();
    assert!(!spec.path().exists());
}

#[test]
fn more_consumers_than_slots_are_refused() {
    let error = Segment::open_or_create(&RingSpec { consumers: 4, ..spec("crowd") }).err().expect("three slots");
    assert_eq!(error.exit_code(), 64, "{error}");
    assert!(error.to_string().contains("1 to 3"), "{error}");
}

#[test]
fn a_second_loader_fences_the_first() {
    let shape = Shape { slots: 2, requests: 8, consumers: 1 };
    let memory: Vec<AtomicU64> = (0..shape.words()).map(|_| AtomicU64::new(0)).collect();
    let catalogue = Catalogue { chunks: vec![1, 1], signature: SIGNATURE };
    World::new(&memory, shape, catalogue.clone());
    let mut first = Producer::attach(&memory[..], shape, catalogue.clone()).unwrap();
    let mut consumer = Consumer::attach_as(&memory[..], shape, catalogue.clone(), 0).unwrap();
    consumer.post(&[0, 1]).unwrap();
    let Action::Fill(job) = first.next_action().unwrap() else { panic!("a fill is due") };
    let _second = Producer::attach(&memory[..], shape, catalogue).unwrap();
    assert_eq!(first.publish(job, 8, 1).unwrap_err().exit_code(), 69);
    assert_eq!(first.next_action().unwrap_err().exit_code(), 69);
    assert_eq!(consumer.try_lease().unwrap(), None);
}

fn spec(name: &str) -> RingSpec {
    RingSpec {
        name: format!("serenity-test-{}-{name}", std::process::id()),
        slots: 3,
        chunk_bytes: 8192,
        signature: SIGNATURE,
        form: PayloadForm::Int8,
        blocks: 2,
        consumers: 1,
    }
}

#[test]
fn segment_roles_are_exclusive_and_the_last_one_unlinks() {
    let spec = spec("roles");
    assert!(Segment::open(&spec).unwrap().is_none(), "nothing there yet");
    let loader = Segment::open_or_create(&spec).unwrap();
    loader.sign(RingRole::Loader);
    let second = Segment::open_or_create(&spec).err().expect("one loader only");
    assert_eq!(second.exit_code(), 69);
    assert!(second.to_string().contains(&std::process::id().to_string()), "{second}");
    let trainer = Segment::open(&spec).unwrap().expect("ready");
    assert!(loader.is_held(RingRole::Consumer(0)) && trainer.is_held(RingRole::Loader));
    loader.leave();
    assert!(spec.path().exists(), "the trainer is still attached");
    assert!(!trainer.is_held(RingRole::Loader));
    let again = Segment::open_or_create(&spec).unwrap();
    trainer.leave();
    again.leave();
    assert!(!spec.path().exists());
}

#[test]
fn segment_of_another_slab_is_refused_in_use_and_replaced_when_free() {
    let old = spec("other");
    let new = RingSpec { signature: SIGNATURE + 1, ..old.clone() };
    let loader = Segment::open_or_create(&old).unwrap();
    let error = Segment::open(&new).err().expect("another slab");
    assert_eq!(error.exit_code(), 65);
    assert!(error.to_string().contains("slab signature"), "{error}");
    let trainer = Segment::open(&old).unwrap().expect("ready");
    drop(loader);
    assert_eq!(Segment::open_or_create(&new).err().expect("in use").exit_code(), 69);
    drop(trainer);
    let replaced = Segment::open_or_create(&new).unwrap();
    assert!(Segment::open(&old).is_err());
    replaced.leave();
    assert!(!new.path().exists());
}

#[test]
fn a_torn_header_is_noticed() {
    let spec = spec("torn");
    let loader = Segment::open_or_create(&spec).unwrap();
    loader.words().store(4, 12345);
    let error = Segment::open(&spec).err().expect("torn");
    assert!(error.to_string().contains("torn"), "{error}");
    loader.leave();
}

#[test]
fn a_ring_larger_than_shared_memory_is_an_error_and_leaves_nothing() {
    let spec = RingSpec { slots: 60_000, chunk_bytes: 1 << 30, ..spec("huge") };
    let error = Segment::open_or_create(&spec).err().expect("60 TB");
    assert_eq!(error.exit_code(), 75, "{error}");
    assert!(!spec.path().exists());
}

#[test]
fn payload_and_wake_ups_cross_between_mappings() {
    let spec = spec("bytes");
    let loader = Segment::open_or_create(&spec).unwrap();
    let trainer = Segment::open(&spec).unwrap().expect("ready");
    // SAFETY: no other slice of slot 2 exists in this test.
    unsafe { loader.slot_filling(2) }.fill(0xa5);
    // SAFETY: nobody writes slot 2 from here on.
    assert!(unsafe { trainer.slot_payload(2, 8192) }.iter().all(|b| *b == 0xa5));
    let ticket = trainer.ticket(super::words::consumer::WAKE);
    let waiter = std::thread::spawn({
        let trainer = trainer.clone();
        move || {
            while trainer.ticket(super::words::consumer::WAKE) == ticket {
                trainer.wait(super::words::consumer::WAKE, ticket);
            }
        }
    });
    loader.wake(super::words::consumer::WAKE);
    waiter.join().unwrap();
    trainer.leave();
    loader.leave();
    assert!(!spec.path().exists());
}
