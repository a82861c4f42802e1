//! Several consumers of one loader: a chunk is read once for all, and none holds the others up, alive, stopped or dead.

use std::time::Duration;

use nix::sys::signal::Signal;
use serenity_protocol::ring::segment::Segment;
use serenity_protocol::ring::words::State;

use crate::crashes::consumer;
use crate::lab::{Lab, Reader, wait_for};

#[test]
fn two_consumers_get_every_byte_and_share_every_fill() {
    // Room for the whole model.
    let lab = Lab::for_consumers(128, 2);
    let chunks = lab.chunks();
    assert!(chunks <= 128, "{chunks}");
    let loader = lab.loader("");
    let mut readers = [Reader::open_as(&lab, 0), Reader::open_as(&lab, 1)];
    for _ in 0..chunks {
        readers.iter_mut().for_each(|reader| reader.take(3));
    }
    let fills: u64 = lab.slots().iter().map(|s| s.generation).sum();
    assert_eq!(fills, chunks as u64, "each chunk is filled once, for both");
    // The loader stays until the last one has finished.
    let [first, mut second] = readers;
    first.finish();
    second.take(chunks);
    second.finish();
    loader.expect(0);
    assert!(!lab.segment().exists());
}

#[test]
fn a_consumer_killed_or_stopped_does_not_block_the_other_and_its_successor_goes_on() {
    for slots in [4, 5, 9] {
        let lab = Lab::for_consumers(slots, 2);
        let loader = lab.loader("");
        // Consumer 0 as a process of its own, which dies with leases in its hands.
        let victim = consumer(&lab);
        let mut other = Reader::open_as(&lab, 1);
        other.take(lab.chunks());
        victim.signal(Signal::SIGSTOP);
        wait_for("the stopped one's leases", || (lab.count_of(0, State::Leased) > 0).then_some(()));
        other.take(2 * lab.chunks());
        assert!(lab.count_of(0, State::Leased) > 0, "the stopped one keeps what it has: {:?}", lab.slots());
        victim.kill();
        other.take(lab.chunks());
        let freed = |state| lab.count_of(0, state) == 0;
        wait_for("what the dead one held", || (freed(State::Leased) && freed(State::Ready)).then_some(()));
        // Now every slot serves the other one, as far as its part goes.
        other.take(2 * lab.chunks());
        let mut heir = Reader::open(&lab);
        heir.take(lab.chunks());
        other.take(lab.chunks());
        other.finish();
        heir.take(lab.chunks());
        heir.finish();
        loader.expect(0);
        assert!(!lab.segment().exists());
    }
}

#[test]
fn a_loader_killed_under_two_consumers_is_succeeded() {
    let lab = Lab::for_consumers(8, 2);
    let mut readers: Vec<Reader> = Vec::new();
    for point in ["after-publish:30", "mid-fill:20", "republished:20", "after-payload:25", "word:600"] {
        let mut loader = lab.loader(&format!("kill={point}"));
        if readers.is_empty() {
            readers = vec![Reader::open_as(&lab, 0), Reader::open_as(&lab, 1)];
        }
        while loader.is_running() {
            let leases: Vec<_> = readers.iter_mut().map(Reader::try_lease).collect();
            if leases.iter().all(Option::is_none) {
                std::thread::sleep(Duration::from_micros(200));
            }
            for (reader, leased) in readers.iter_mut().zip(leases) {
                leased.iter().for_each(|leased| reader.check_and_release(leased));
            }
        }
        loader.expect_signal(Signal::SIGKILL);
    }
    let loader = lab.loader("");
    for _ in 0..lab.chunks() {
        readers.iter_mut().for_each(|reader| reader.take(2));
    }
    readers.into_iter().for_each(Reader::finish);
    loader.expect(0);
    assert!(!lab.segment().exists());
}

#[test]
fn a_consumer_that_the_ring_has_no_place_for_is_told_so() {
    let lab = Lab::for_consumers(4, 2);
    let loader = lab.loader("");
    let first = Reader::open(&lab);
    let error = Segment::open_as(&lab.plan.spec, 2).err().expect("0 and 1 only");
    assert_eq!(error.exit_code(), 64, "{error}");
    assert!(error.to_string().contains("made for 2 trainers") && error.to_string().contains("--consumers"), "{error}");
    let second = Reader::open_as(&lab, 1);
    let twin = Segment::open_as(&lab.plan.spec, 1).err().expect("two with one identity");
    assert!(twin.exit_code() == 69 && twin.to_string().contains(&format!("process {}", std::process::id())), "{twin}");
    first.finish();
    second.finish();
    loader.expect(0);
    // More consumers than slots cannot be: the loader says so before it makes anything.
    let crowd = Lab::for_consumers(2, 3);
    assert!(crowd.loader("").expect(64).contains("cannot serve so many consumers"));
    assert!(!crowd.segment().exists());
}
