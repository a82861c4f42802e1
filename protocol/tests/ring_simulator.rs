#![allow(clippy::unwrap_used, clippy::expect_used)]
//! The ring's state machines in a simulated world (`ring_model`): random schedules with crashes at every memory operation, all single
//! and double crash points of a small scenario, and deliberate mistakes that must be noticed.
//!
//! `SERENITY_RING_SEEDS=1000000 cargo test --release -p serenity-protocol --test ring_simulator` plays more seeds,
//! `SERENITY_RING_SEED=N` plays one.

mod ring_model;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use ring_model::{Bug, Chances, Event, Role, World};
use serenity_protocol::ring::words::Shape;

const SEEDS: u64 = 20_000;
const STEPS: u64 = 250;

/// What a run was worth: a test that delivered nothing has shown nothing.
#[derive(Default, Clone, Copy)]
struct Tally {
    delivered: u64,
    crashes: u64,
    rotten: u64,
    ops: u64,
}

fn play(seed: u64, bug: Bug) -> Tally {
    let dice = ring_model::Dice::new(seed);
    let pick = |choices: &[u64]| choices[dice.roll(choices.len() as u64) as usize];
    let consumers = 1 + dice.roll(3) as usize;
    let shape = Shape { slots: consumers + dice.roll(6) as usize, requests: 2 + dice.roll(9) as usize, consumers };
    let chunks = (0..1 + dice.roll(5)).map(|_| 1 + dice.roll(3) as u16).collect();
    let chances = Chances {
        crash: pick(&[0, 12, 40, 150]),
        preempt: pick(&[0, 8, 40, 200]),
        wake: pick(&[0, 3, 20]),
        rot: pick(&[0, 0, 30]),
        orphan: pick(&[0, 0, 20]),
        random: true,
    };
    let world = World::new(shape, chunks, seed, chances, bug, Vec::new(), Vec::new());
    for _ in 0..STEPS + 100 * consumers as u64 {
        // The launcher, the loader twice as often as each consumer.
        let who = world.dice.roll(4 * consumers as u64 + 1) as usize;
        world.step(match who {
            0 => Role::Launcher,
            _ if who <= 2 * consumers => Role::Loader,
            _ => Role::Consumer(who % consumers),
        });
        if world.dice.roll(100) == 0 {
            world.stopped.set(Some(world.dice.roll(2 * consumers as u64) as usize).filter(|c| *c < consumers));
        }
        if chances.rot > 0 && world.dice.roll(chances.rot) == 0 {
            world.rot();
        }
        world.zombies_act();
        world.check();
    }
    let without = world.dice.roll(2 * consumers as u64) as usize;
    let without = (consumers > 1 && without < consumers).then(|| (without, world.dice.roll(2) == 0));
    world.come_to_rest(40_000, without);
    tally(&world)
}

fn tally(world: &Rc<World>) -> Tally {
    world.end();
    Tally { delivered: world.delivered.get(), crashes: world.crashes.get(), rotten: world.rotten_noticed.get(), ops: world.ops.get() }
}

fn seeds() -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|v: String| v.parse().ok());
    match number("SERENITY_RING_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SERENITY_RING_SEEDS").unwrap_or(SEEDS),
    }
}

#[test]
fn every_seed_keeps_every_invariant() {
    let (range, threads) = (seeds(), std::thread::available_parallelism().map_or(1, usize::from));
    let next = AtomicU64::new(range.start);
    let played: Vec<Tally> = std::thread::scope(|scope| {
        let work = || {
            let mut sum = Tally::default();
            loop {
                // Relaxed: hands out numbers, orders nothing.
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= range.end {
                    return sum;
                }
                let one = catch_unwind(AssertUnwindSafe(|| play(seed, Bug::None)))
                    .unwrap_or_else(|_| panic!("seed {seed}: replay with SERENITY_RING_SEED={seed}"));
                sum.delivered += one.delivered;
                sum.crashes += one.crashes;
                sum.rotten += one.rotten;
                sum.ops += one.ops;
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|w| w.join().expect("no seed failed")).collect()
    });
    let total = |of: fn(&Tally) -> u64| played.iter().map(of).sum::<u64>();
    let (delivered, crashes, rotten, ops) = (total(|t| t.delivered), total(|t| t.crashes), total(|t| t.rotten), total(|t| t.ops));
    println!(
        "{} seeds: {ops} memory operations, {delivered} chunks delivered, {crashes} crashes, {rotten} damaged chunks noticed",
        range.end - range.start
    );
    let seeds = range.end - range.start;
    assert!(seeds < 1000 || (delivered > 20 * seeds && crashes > 5 * seeds && rotten > seeds / 10), "the simulation did too little");
}

/// Blocks of two chunks and of one, forward and backward, two slots for each consumer: retention, overwriting, republication and a full
/// queue all happen, and with several consumers sharing.
fn scenario(consumers: usize, events: Vec<Event>) -> Tally {
    let shape = Shape { slots: 2 * consumers, requests: 3, consumers };
    let chances = Chances { crash: 0, preempt: 0, wake: 0, rot: 0, orphan: 0, random: false };
    let chunks = if consumers == 1 { vec![2, 1] } else { vec![2, 1, 3] };
    let script = if consumers == 1 { vec![0, 1, 1, 0] } else { vec![0, 2, 1, 0] };
    let world = World::new(shape, chunks, 1, chances, Bug::None, script, events);
    for _ in 0..24 {
        world.step(Role::Loader);
        (0..consumers).for_each(|c| world.step(Role::Consumer(c)));
        world.check();
    }
    world.come_to_rest(2_000, None);
    tally(&world)
}

/// Chunks that one life of a consumer takes in the scenario.
fn expected(consumers: usize) -> u64 {
    if consumers == 1 { 6 } else { 8 * consumers as u64 }
}

fn operations(consumers: usize) -> u64 {
    let quiet = scenario(consumers, Vec::new());
    assert_eq!((quiet.delivered, quiet.crashes), (expected(consumers), 0));
    assert!(quiet.ops > 100, "{} operations", quiet.ops);
    quiet.ops
}

#[test]
fn a_crash_at_any_point_is_survived() {
    for consumers in 1..=3 {
        let ops = operations(consumers);
        println!("{consumers} consumers: {ops} operations");
        for op in 1..=ops {
            for event in [Event::CrashBefore(op), Event::CrashAfter(op)] {
                let tally = scenario(consumers, vec![event]);
                assert!(tally.crashes == 1 && tally.delivered >= expected(consumers), "{consumers} consumers, {event:?}");
            }
        }
    }
}

/// Whoever runs at an operation dies there, so pairs of crashes are both roles, either one twice, and both at once.
fn pairs_of_crashes(consumers: usize, step: usize) -> u64 {
    let ops = operations(consumers);
    let mut pairs = 0;
    for first in 1..=ops {
        // With a step, each first point has second points of its own.
        for second in (first + 1 + first % step as u64..=ops + 200).step_by(step) {
            let events = vec![Event::CrashAfter(first), Event::CrashAfter(second)];
            let tally = catch_unwind(|| scenario(consumers, events))
                .unwrap_or_else(|_| panic!("{consumers} consumers, crashes after {first} and {second}"));
            assert!(tally.crashes >= 1 && tally.delivered >= expected(consumers));
            pairs += 1;
        }
    }
    println!("{consumers} consumers: {pairs} pairs of crash points");
    pairs
}

#[test]
fn two_crashes_at_any_two_points_are_survived() {
    assert!(pairs_of_crashes(1, 1) > 5_000);
}

#[test]
fn two_crashes_with_two_consumers_are_survived() {
    // `SERENITY_RING_PAIRS=1` tries every pair.
    let step = std::env::var("SERENITY_RING_PAIRS").ok().and_then(|v| v.parse().ok()).unwrap_or(41);
    assert!(pairs_of_crashes(2, step) > 5_000);
}

#[test]
fn a_crash_after_another_role_cut_in_is_survived_at_any_two_points() {
    for (consumers, window, step) in [(1, 80, 1), (2, 120, 23)] {
        let ops = operations(consumers);
        for cut in 1..=ops {
            for crash in (cut + cut % step..=(cut + window).min(ops + window)).step_by(step as usize) {
                for event in [Event::CrashBefore(crash), Event::CrashAfter(crash)] {
                    let events = vec![Event::Preempt(cut), event];
                    catch_unwind(|| scenario(consumers, events)).unwrap_or_else(|_| panic!("cut in at {cut}, then {event:?}"));
                }
            }
        }
    }
}

#[test]
fn every_seeded_bug_is_caught() {
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let bugs = [Bug::MissingEpochCheck, Bug::EarlyFree, Bug::WrongVictim, Bug::LostWake, Bug::ChecksumNotCompared, Bug::FreedByTheFirst];
    let catch = |bug, seed| catch_unwind(AssertUnwindSafe(|| play(seed, bug))).err();
    let caught = bugs.map(|bug| (0..2_000).find_map(|seed| Some((seed, catch(bug, seed)?))));
    std::panic::set_hook(quiet);
    for (bug, caught) in bugs.into_iter().zip(caught) {
        let (seed, reason) = caught.unwrap_or_else(|| panic!("{bug:?} went unnoticed"));
        let reason = reason.downcast_ref::<String>().cloned().or(reason.downcast_ref::<&str>().map(ToString::to_string));
        println!("{bug:?}: caught by seed {seed}: {}", reason.unwrap_or_default().lines().next().unwrap_or_default());
    }
}
