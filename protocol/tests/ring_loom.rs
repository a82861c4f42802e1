#![allow(clippy::unwrap_used, clippy::expect_used)]
//! The ring's two state machines as real threads under loom: every interleaving with a bounded number of preemptions, every value that
//! acquire and release allow a load to see, and payload cells that report a race between a fill and a reader.
//!
//! Two slots, four requests over three blocks, so that slots are overwritten and retained content is published again. The crash models
//! end a role after its k-th operation, for every k, and let its successor attach while the other role runs.
//! `SERENITY_LOOM_PREEMPTIONS` sets the bound (default 1, CI 3). The crash models, of which there
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
use serenity_protocol::ring::words::{ChunkId, Shape, SlotWord, State, Words, consumer, loader, slot};

const SHAPE: Shape = Shape { slots: 2, requests: 4 };
/// More blocks than slots, and one that comes back.
const ORDER: [u16; 4] = [0, 1, 2, 1];
/// What the crash models ask for: each life of the consumer asks for it again.
const SHORT: [u16; 2] = [2, 0];

/// Words as loom's atomics; only those that the state machines use exist.
struct Shared {
    words: Vec<Option<AtomicU64>>,
    payload: Vec<UnsafeCell<u64>>,
}

// SAFETY: the payload cells are read and written by whoever holds their slot, which is what the model is there to check: loom fails it
// at an access that races with another.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    fn new() -> Arc<Self> {
        let first = SHAPE.request(0);
        let used = |i: usize| i >= first || [loader::EPOCH, consumer::POSTED, consumer::POSITION, consumer::FINISHED].contains(&i);
        let free = SlotWord { state: State::Free, epoch: 0, generation: 0 }.pack();
        let initial = |i: usize| if (0..SHAPE.slots).any(|s| SHAPE.slot(s) + slot::STATE == i) { free } else { 0 };
        Arc::new(Self {
            words: (0..SHAPE.words()).map(|i| used(i).then(|| AtomicU64::new(initial(i)))).collect(),
            payload: (0..SHAPE.slots).map(|_| UnsafeCell::new(0)).collect(),
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

/// A loader's life from here on: serves until everything that was asked for is published.
fn load(mut producer: Producer<Memory>, shared: &Arc<Shared>) {
    loop {
        match producer.next_action().unwrap() {
            // The position is that of the consumer, which has finished when it is beyond the last request.
            Action::Wait if shared.word(consumer::FINISHED).load(Ordering::Acquire) != 0 => return,
            Action::Wait => thread::yield_now(),
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
    }
}

/// A consumer's life from here on: takes the whole order and says that it has finished.
fn consume(mut ring: Consumer<Memory>, shared: &Arc<Shared>, order: &[u16]) {
    for &block in order {
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
    ring.finish();
}

fn loader_end(shared: &Arc<Shared>, left: &Left) -> Producer<Memory> {
    Producer::attach(Memory { shared: shared.clone(), left: left.clone() }, SHAPE, catalogue()).unwrap()
}

fn consumer_end(shared: &Arc<Shared>, left: &Left, order: &[u16]) -> Consumer<Memory> {
    let mut ring = Consumer::attach(Memory { shared: shared.clone(), left: left.clone() }, SHAPE, catalogue()).unwrap();
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

/// One schedule: both ends attach and post, then work at the same time; whoever dies has a successor. True if the death happened.
fn model(death: Death) -> bool {
    let shared = Shared::new();
    let whole = || Left::new(PlainCount::new(u64::MAX));
    let (loader_left, consumer_left) = (whole(), whole());
    let producer = loader_end(&shared, &loader_left);
    let order: &[u16] = if matches!(death, Death::None) { &ORDER } else { &SHORT };
    let ring = consumer_end(&shared, &consumer_left, order);
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
        consume(consumer_end(&shared, &whole(), order), &shared, order);
    }
    loader.join().unwrap() | died
}

/// Explores a model; returns how many schedules it had, and in how many the death happened.
fn explore(preemptions: usize, death: Death) -> (u64, u64) {
    let (schedules, deaths) = (Left::default(), Left::default());
    let (seen, died) = (schedules.clone(), deaths.clone());
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 100_000;
    // Relaxed, here and below: counters that order nothing.
    builder.check(move || {
        seen.fetch_add(1, PlainOrdering::Relaxed);
        died.fetch_add(u64::from(model(death)), PlainOrdering::Relaxed);
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
    let (schedules, _) = explore(bound(), Death::None);
    println!("{schedules} schedules with {} preemptions in {:.1} s", bound(), start.elapsed().as_secs_f64());
    assert!(schedules > 100, "loom explored {schedules} schedules");
}

#[test]
fn every_schedule_with_a_death_delivers() {
    let start = std::time::Instant::now();
    let (mut points, mut all) = (0, 0);
    for death in [Death::Loader as fn(u64) -> Death, Death::Consumer] {
        for at in 0.. {
            let (schedules, deaths) = explore(number("SERENITY_LOOM_DEATH_PREEMPTIONS", 0), death(at));
            all += schedules;
            if deaths == 0 {
                break;
            }
            points += 1;
        }
    }
    println!("{points} crash points, {all} schedules in {:.1} s", start.elapsed().as_secs_f64());
    assert!(points > 100, "{points} crash points");
}
