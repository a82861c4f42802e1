//! F1 to F5 and the campaign: SIGKILL at named points and at random moments.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serenity_protocol::faults::POINTS;
use serenity_protocol::ring::segment::RingRole;
use serenity_protocol::ring::words::State;

use crate::lab::{CHILD_ENV, Dice, Lab, PATIENCE, Reader, Running, setting, wait_for};

/// A loader that dies at `point`, with the ring in the state that `look` sees, and a successor that makes everything right.
fn dies_and_is_succeeded(point: &str, look: impl FnOnce(&Lab, &mut Reader)) {
    let lab = Lab::new(6);
    let dying = lab.loader(&format!("kill={point}:9"));
    let mut reader = Reader::open(&lab);
    // Whatever it delivers before it dies is right.
    while reader.segment.is_held(RingRole::Loader) {
        match reader.try_lease() {
            Some(leased) => reader.check_and_release(&leased),
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    dying.expect_signal(Signal::SIGKILL);
    look(&lab, &mut reader);
    let next = lab.loader("");
    reader.pass();
    reader.finish();
    next.expect(0);
    assert!(!lab.segment().exists(), "the last one out removes the segment");
}

#[test]
fn f01_killed_in_the_middle_of_a_fill() {
    dies_and_is_succeeded("mid-fill", |lab, _| assert!(lab.count(State::Filling) > 0));
}

#[test]
fn f02_killed_between_payload_and_publication() {
    dies_and_is_succeeded("after-payload", |lab, _| assert!(lab.count(State::Filling) > 0));
}

#[test]
fn f03_killed_after_publication_before_the_wake_up() {
    dies_and_is_succeeded("after-publish", |_, reader| {
        // What was published is found without a wake-up and without a loader.
        while let Some(leased) = reader.try_lease() {
            reader.check_and_release(&leased);
        }
    });
}

/// The consumer of F4, F5, F12 and F16, as a process of its own: takes chunks for ever, holding two leases at a time.
#[test]
#[ignore = "a child of other tests"]
fn child_consumer() {
    let Some(config) = std::env::var_os(CHILD_ENV) else { return };
    let lab = Lab::of(config.as_ref());
    let mut reader = Reader::open(&lab);
    let mut held = reader.lease();
    println!("\nconsuming");
    loop {
        let next = reader.lease();
        reader.check_and_release(&held);
        held = next;
    }
}

/// Starts [`child_consumer`] and waits until it holds chunks.
pub fn consumer(lab: &Lab) -> Running {
    let child = lab.child("crashes::child_consumer");
    wait_for("a consumer that works", || child.log().contains("consuming").then_some(()));
    child
}

#[test]
fn f04_consumer_killed_while_it_holds_leases() {
    let lab = Lab::new(6);
    let loader = lab.loader("");
    for _ in 0..3 {
        let consumer = consumer(&lab);
        // Stopped first, to be looked at: of the dead the loader takes everything back.
        consumer.signal(Signal::SIGSTOP);
        wait_for("one or two leases", || (1..=2).contains(&lab.count(State::Leased)).then_some(()));
        consumer.kill();
        wait_for("the loader to free the dead one's leases", || (lab.count(State::Leased) == 0).then_some(()));
    }
    // Without a loader the successor does it.
    let consumer = consumer(&lab);
    loader.kill();
    consumer.kill();
    assert!((1..=2).contains(&lab.count(State::Leased)), "{:?}", lab.slots());
    let mut reader = Reader::open(&lab);
    assert_eq!(lab.count(State::Leased), 0, "a new consumer frees the dead one's leases");
    let loader = lab.loader("");
    reader.pass();
    reader.finish();
    loader.expect(0);
}

#[test]
fn f05_both_ends_killed_at_once() {
    let lab = Lab::new(6);
    let mut dice = Dice::new(setting("SERENITY_KILL_SEED", 1));
    for _ in 0..4 {
        let loader = lab.loader("delay=fill:1");
        let consumer = consumer(&lab);
        std::thread::sleep(Duration::from_millis(dice.roll(60)));
        loader.signal(Signal::SIGKILL);
        consumer.signal(Signal::SIGKILL);
        consumer.kill();
        loader.kill();
    }
    let loader = lab.loader("");
    let mut reader = Reader::open(&lab);
    reader.pass();
    reader.finish();
    loader.expect(0);
    assert!(!lab.segment().exists());
}

/// Points that are passed before a consumer can be attached: those of a segment in the making.
const OF_CREATION: [&str; 6] = ["before-attach", "segment-created", "segment-reserved", "header-torn", "header-written", "ring-open"];

#[test]
fn kills_while_the_segment_is_made_leave_nothing_in_the_way() {
    for point in OF_CREATION {
        let lab = Lab::new(3);
        for passage in 1..=if point == "header-torn" { 3 } else { 1 } {
            lab.loader(&format!("kill={point}:{passage}")).expect_signal(Signal::SIGKILL);
        }
        let loader = lab.loader("");
        let mut reader = Reader::open(&lab);
        reader.take(10);
        reader.finish();
        loader.expect(0);
        assert!(!lab.segment().exists(), "{point}");
    }
}

/// What the consumer's thread of the campaign tells the thread that kills.
#[derive(Default)]
struct Watch {
    delivered: AtomicU64,
    /// Nothing is left of what the dead loader had published.
    starved: AtomicBool,
    over: AtomicBool,
}

/// Ends the consumer's thread when the thread that kills fails.
struct Over<'a>(&'a Watch);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        // Relaxed: a lone flag.
        self.0.over.store(true, Ordering::Relaxed);
    }
}

fn consume<'a>(mut reader: Reader<'a>, watch: &Watch) -> Reader<'a> {
    // Relaxed: the partner is the store in `Watch`'s owner; it ends the loop and orders nothing.
    while !watch.over.load(Ordering::Relaxed) {
        let held = reader.segment.is_held(RingRole::Loader);
        match reader.try_lease() {
            Some(leased) => {
                reader.check_and_release(&leased);
                // Relaxed: read in `restart`, which needs the numbers alone.
                watch.delivered.fetch_add(1, Ordering::Relaxed);
                // Relaxed: as above.
                watch.starved.store(false, Ordering::Relaxed);
            }
            None => {
                // Relaxed: as above.
                watch.starved.store(!held, Ordering::Relaxed);
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }
    reader
}

/// Time from the start of a loader to its first chunk; the dead one's are all taken before.
fn restart(lab: &Lab, watch: &Watch, faults: &str) -> (Running, Option<Duration>) {
    // Relaxed, here and below: the partners are the stores in `consume`; only the values matter.
    wait_for("the end of what the dead loader left", || watch.starved.load(Ordering::Relaxed).then_some(()));
    let before = watch.delivered.load(Ordering::Relaxed);
    let start = Instant::now();
    let mut loader = lab.loader(faults);
    let mut first = None;
    while first.is_none() && loader.is_running() {
        assert!(start.elapsed() < PATIENCE, "a new loader delivers nothing: {:?}\n{}", lab.slots(), loader.log());
        // Relaxed: see above.
        first = (watch.delivered.load(Ordering::Relaxed) > before).then(|| start.elapsed());
        std::thread::sleep(Duration::from_micros(500));
    }
    (loader, first)
}

#[test]
fn kills_at_every_point_and_at_random_moments_leave_every_byte_right() {
    let kills = setting("SERENITY_LOADER_KILLS", 40);
    let slowest_allowed = Duration::from_millis(setting("SERENITY_RESTART_MAX_MS", 30_000));
    let mut dice = Dice::new(setting("SERENITY_KILL_SEED", 1));
    let points: Vec<&str> = POINTS.into_iter().filter(|p| !OF_CREATION[1..].contains(p)).collect();
    // Large enough that retained chunks of dead loaders come up again, smaller than the model.
    let lab = Lab::new(40);
    let watch = Watch::default();
    let first = lab.loader("");
    let reader = Reader::open(&lab);
    let (mut slowest, start, mut by_point) = (Duration::ZERO, Instant::now(), 0);
    std::thread::scope(|scope| {
        let watch = &watch;
        let consuming = scope.spawn(move || consume(reader, watch));
        let over = Over(watch);
        first.kill();
        for i in 0..kills {
            // Every second one dies at a point, in turn; the others at a moment.
            let point = (i % 2 == 0).then(|| points[(i / 2) as usize % points.len()]);
            let passage = 1 + match point {
                Some("word") => dice.roll(400),
                Some("before-attach" | "epoch-bumped" | "attached" | "rechecked" | "before-verify" | "verified") => 0,
                _ => dice.roll(12),
            };
            let (loader, first) = restart(&lab, watch, &point.map(|p| format!("kill={p}:{passage}")).unwrap_or_default());
            slowest = slowest.max(first.unwrap_or_default());
            match point {
                Some(_) => {
                    loader.expect_signal(Signal::SIGKILL);
                    by_point += 1;
                }
                None => {
                    std::thread::sleep(Duration::from_micros(dice.roll(60_000)));
                    loader.kill();
                }
            }
            assert!(!consuming.is_finished(), "kill {i} ({point:?}:{passage})");
        }
        let (last, first) = restart(&lab, watch, "");
        slowest = slowest.max(first.expect("a loader that is not killed delivers"));
        drop(over);
        let mut reader = consuming.join().unwrap();
        reader.pass();
        reader.finish();
        last.expect(0);
    });
    // Relaxed: the threads are joined.
    let delivered = watch.delivered.load(Ordering::Relaxed);
    println!(
        "{kills} kills ({by_point} at points) in {:.1} s: {delivered} chunks compared, slowest restart {:.0} ms",
        start.elapsed().as_secs_f64(),
        slowest.as_secs_f64() * 1e3
    );
    assert!(slowest <= slowest_allowed, "a restart took {slowest:?}");
    assert!(!lab.segment().exists());
}
