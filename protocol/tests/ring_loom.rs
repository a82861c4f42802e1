#![allow(clippy::unwrap_used, clippy::expect_used)]
//! The ring's two state machines as real threads under loom: every interleaving with a bounded number of preemptions, every value that
//! acquire and release allow a load to see, and payload cells that report a race between a fill and a reader.
//!
//! Two slots, four requests over three blocks, so that slots are overwritten and retained content is published again. The crash models
//! end a role after its k-th operation, for every k, and let its successor attach while the other role runs.
//! `SERENITY_LOOM_PREEMPTIONS` sets the bound (default 1, CI 3). The model with two consumers has a bound of its own,
//! `SERENITY_LOOM_SHARED_PREEMPTIONS` (default 1; 2 takes minutes). The crash models, of which there
//! are more than a hundred, switch only where a role waits (`SERENITY_LOOM_DEATH_PREEMPTIONS`, default 0): cutting in between operations around a
//! crash is the simulator's part. The core is generic over its memory, so it needs no build of its own.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64 as PlainCount, Ordering as PlainOrdering};

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use serenity_protocol::ring::consumer::Consumer;
use serenity_protocol::ring::producer::{Action, Catalogue, Producer};
use serenity_protocol::ring::words::{ChunkId, Shape, Words, consumer, loader};

const SHAPE: Shape = Shape { slots: 2, requests: 4, consumers: 1 };
/// Two consumers, each with the one slot that is its part.
const SHARED: Shape = Shape { slots: 3, requests: 2, consumers: 2 };
/// More blocks than slots, and one that comes back.
const ORDER: [u16; 4] = [0, 1, 2, 1];
/// What the crash models ask for: each life of the consumer asks for it again.
const SHORT: [u16; 2] = [2, 0];

/// Words as loom's atomics; only those that the state machines use exist.
struct Shared {
    shape: Shape,
    words: Vec<Option<AtomicU64>>,
    payload: Vec<UnsafeCell<u64>>,
}

// SAFETY: the payload cells are read and written by whoever holds their slot, which is what the model is there to check: loom fails it
// at an access that races with another.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    fn new(shape: Shape) -> Arc<Self> {
        const LINE: [usize; 3] = [consumer::POSTED, consumer::POSITION, consumer::FINISHED];
        let used = |i: usize| {
            let line = (0..shape.consumers).any(|c| LINE.iter().any(|word| shape.at(c, *word) == i));
            let queue = |c| (shape.request(c, 0)..=shape.share(c, shape.slots - 1)).contains(&i);
            i == loader::EPOCH || line || (0..shape.consumers).any(queue) || i >= shape.slot(0)
        };
        let blank: Vec<PlainCount> = (0..shape.words()).map(|_| PlainCount::new(0)).collect();
        shape.format(&blank[..]);
        Arc::new(Self {
            shape,
            // Relaxed: nobody else has seen it.
            words: (0..shape.words()).map(|i| used(i).then(|| AtomicU64::new(blank[i].load(PlainOrdering::Relaxed)))).collect(),
            payload: (0..shape.slots).map(|_| UnsafeCell::new(0)).collect(),
        })
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        self.words[index].as_ref().expect("a word of the state machines")
    }
}

/// Operations that a process has left to live; no part of the model.
type Left = std::sync::Arc<PlainCount>;

/// One process's view.
struct Memory {
    shared: Arc<Shared>,
    left: Left,
}

struct Crash;

impl Memory {
    fn count(&self) {
        // Relaxed: counted by one thread at a time.
        if self.left.fetch_sub(1, PlainOrdering::Relaxed) == 0 {
            resume_unwind(Box::new(Crash));
        }
    }
}

impl Words for Memory {
    fn load(&self, index: usize) -> u64 {
        self.count();
        // The orders of the production memory (`Words for [AtomicU64]`), here and below.
        self.shared.word(index).load(Ordering::Acquire)
    }
    fn store(&self, index: usize, value: u64) {
        self.count();
        // As above.
        self.shared.word(index).store(value, Ordering::Release);
    }
    fn swap(&self, index: usize, old: u64, new: u64) -> Result<(), u64> {
        self.count();
        // As above.
        self.shared.word(index).compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).map(|_| ())
    }
}

fn catalogue() -> Catalogue {
    Catalogue { chunks: vec![1; 3], signature: 7 }
}

fn payload_of(content: ChunkId) -> u64 {
    content.pack() ^ 0x5555
}

fn all_finished(shared: &Arc<Shared>) -> bool {
    // Acquire: pairs with the Release of `finish`.
    (0..shared.shape.consumers).all(|c| shared.word(shared.shape.at(c, consumer::FINISHED)).load(Ordering::Acquire) != 0)
}

/// One thing that the loader does; false if there was nothing to do.
fn serve(producer: &mut Producer<Memory>, shared: &Arc<Shared>) -> bool {
    match producer.next_action().unwrap() {
        Action::Wait => return false,
        Action::Republished(_) => {}
        Action::Fill(job) => {
            // SAFETY: the slot is FILLING and ours; loom fails the model if anyone else touches the cell.
            shared.payload[job.slot].with_mut(|p| unsafe { *p = payload_of(job.content) });
            producer.publish(job, 8, payload_of(job.content)).unwrap();
        }
        Action::Verify(job, checksum) => {
            // SAFETY: as above.
            let found = shared.payload[job.slot].with(|p| unsafe { *p });
            assert_eq!(found, checksum, "retained bytes are what the descriptor says");
            producer.publish(job, 8, checksum).unwrap();
        }
    }
    true
}

/// A loader's life from here on: serves until everything that was asked for is published.
fn load(mut producer: Producer<Memory>, shared: &Arc<Shared>) {
    loop {
        if !serve(&mut producer, shared) {
            if all_finished(shared) {
                return;
            }
            thread::yield_now();
        }
    }
}

/// Takes a chunk, waits for it if need be, looks at it, and gives it back.
fn take(ring: &mut Consumer<Memory>, shared: &Arc<Shared>, block: u16) {
    let lease = loop {
        match ring.try_lease().unwrap() {
            Some(lease) => break lease,
            None => thread::yield_now(),
        }
    };
    assert_eq!(lease.content, ChunkId { block, chunk: 0 });
    // SAFETY: the slot is leased; loom fails the model if it is being written.
    let found = shared.payload[lease.slot].with(|p| unsafe { *p });
    assert_eq!((found, lease.checksum), (payload_of(lease.content), payload_of(lease.content)));
    ring.release(&lease).unwrap();
}

/// A consumer's life from here on: takes the whole order and says that it has finished.
fn consume(mut ring: Consumer<Memory>, shared: &Arc<Shared>, order: &[u16]) {
    order.iter().for_each(|block| take(&mut ring, shared, *block));
    ring.finish();
}

fn loader_end(shared: &Arc<Shared>, left: &Left) -> Producer<Memory> {
    Producer::attach(Memory { shared: shared.clone(), left: left.clone() }, shared.shape, catalogue()).unwrap()
}

fn consumer_end(shared: &Arc<Shared>, left: &Left, index: usize, order: &[u16]) -> Consumer<Memory> {
    let mut ring = Consumer::attach_as(Memory { shared: shared.clone(), left: left.clone() }, shared.shape, catalogue(), index).unwrap();
    assert_eq!(ring.post(order).unwrap(), order.len());
    ring
}

/// Runs a life; true if it ended in a crash.
fn crashes(life: impl FnOnce()) -> bool {
    match catch_unwind(AssertUnwindSafe(life)) {
        Ok(()) => false,
        Err(reason) if reason.is::<Crash>() => true,
        Err(reason) => resume_unwind(reason),
    }
}

/// Which role dies, and after how many operations of its work.
#[derive(Debug, Clone, Copy)]
enum Death {
    None,
    Loader(u64),
    Consumer(u64),
}

fn whole() -> Left {
    Left::new(PlainCount::new(u64::MAX))
}

/// One schedule of a loader and two consumers. Three threads that wait for each other have too many schedules; so the first chunk, which
/// both want, is offered to both before, and then each of the three does what it can without waiting: the consumers take and release it,
/// the loader looks three times for a slot for the next ones, and must find one only where both have released.
fn model_of_three(slots: usize) -> bool {
    let shared = Shared::new(Shape { slots, ..SHARED });
    let mut producer = loader_end(&shared, &whole());
    let rings = [[0, 1], [0, 2]].map(|order: [u16; 2]| consumer_end(&shared, &whole(), usize::from(order[1]) - 1, &order));
    while serve(&mut producer, &shared) {}
    let takers = rings.map(|mut ring| {
        let shared = shared.clone();
        thread::spawn(move || {
            take(&mut ring, &shared, 0);
            ring
        })
    });
    let acted = (0..3).filter(|_| serve(&mut producer, &shared)).count();
    let mut rings = takers.map(|taker| taker.join().unwrap());
    while serve(&mut producer, &shared) {}
    for (ring, block) in rings.iter_mut().zip([1, 2]) {
        take(ring, &shared, block);
        while serve(&mut producer, &shared) {}
    }
    acted > 0
}

/// One schedule: both ends attach and post, then work at the same time; whoever dies has a successor. True if the death happened.
fn model(death: Death) -> bool {
    let shared = Shared::new(SHAPE);
    let (loader_left, consumer_left) = (whole(), whole());
    let producer = loader_end(&shared, &loader_left);
    let order: &[u16] = if matches!(death, Death::None) { &ORDER } else { &SHORT };
    let ring = consumer_end(&shared, &consumer_left, 0, order);
    // Relaxed: before the threads start.
    match death {
        Death::None => {}
        Death::Loader(at) => loader_left.store(at, PlainOrdering::Relaxed),
        Death::Consumer(at) => consumer_left.store(at, PlainOrdering::Relaxed),
    }
    let other = shared.clone();
    let loader = thread::spawn(move || {
        let died = crashes(|| load(producer, &other));
        if died {
            load(loader_end(&other, &whole()), &other);
        }
        died
    });
    let died = crashes(|| consume(ring, &shared, order));
    if died {
        consume(consumer_end(&shared, &whole(), 0, order), &shared, order);
    }
    loader.join().unwrap() | died
}

/// Explores a model; returns how many schedules it had, and in how many the model said true.
fn explore(preemptions: usize, model: impl Fn() -> bool + Send + Sync + 'static) -> (u64, u64) {
    let (schedules, deaths) = (Left::default(), Left::default());
    let (seen, died) = (schedules.clone(), deaths.clone());
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 100_000;
    // Relaxed, here and below: counters that order nothing.
    builder.check(move || {
        seen.fetch_add(1, PlainOrdering::Relaxed);
        died.fetch_add(u64::from(model()), PlainOrdering::Relaxed);
    });
    (schedules.load(PlainOrdering::Relaxed), deaths.load(PlainOrdering::Relaxed))
}

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn bound() -> usize {
    number("SERENITY_LOOM_PREEMPTIONS", 1)
}

#[test]
fn every_schedule_delivers() {
    let start = std::time::Instant::now();
    let (schedules, _) = explore(bound(), || model(Death::None));
    println!("{schedules} schedules with {} preemptions in {:.1} s", bound(), start.elapsed().as_secs_f64());
    assert!(schedules > 100, "loom explored {schedules} schedules");
}

#[test]
fn every_schedule_of_two_consumers_delivers() {
    let bound = number("SERENITY_LOOM_SHARED_PREEMPTIONS", 1);
    for slots in [2, 3] {
        let start = std::time::Instant::now();
        let (schedules, overlapping) = explore(bound, move || model_of_three(slots));
        println!("{slots} slots, two consumers: {schedules} schedules with {bound} preemptions in {:.1} s", start.elapsed().as_secs_f64());
        assert!(schedules > 100 && overlapping > 0, "loom explored {schedules} schedules, {overlapping} in which the loader acted");
    }
}

#[test]
fn every_schedule_with_a_death_delivers() {
    let start = std::time::Instant::now();
    let (mut points, mut all) = (0, 0);
    for death in [Death::Loader as fn(u64) -> Death, Death::Consumer] {
        for at in 0.. {
            let (schedules, deaths) = explore(number("SERENITY_LOOM_DEATH_PREEMPTIONS", 0), move || model(death(at)));
            all += schedules;
            if deaths == 0 {
                break;
            }
            points += 1;
        }
    }
    println!("{points} crash points, {all} schedules in {:.1} s", start.elapsed().as_secs_f64());
    assert!(points > 90, "{points} crash points");
}
