//! F6 to F12, F17 and F20: what the segment's file can look like, and who may have it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::sys::signal::Signal;
use serenity_protocol::ring::segment::{RingRole, Segment};
use serenity_protocol::ring::words::{State, checksum, header, loader};

use crate::crashes::consumer;
use crate::lab::{Lab, Reader, Running, wait_for};

fn edit(lab: &Lab) -> File {
    File::options().read(true).write(true).open(lab.segment()).unwrap()
}

fn word(lab: &Lab, index: usize) -> u64 {
    let mut bytes = [0; 8];
    edit(lab).read_exact_at(&mut bytes, index as u64 * 8).unwrap();
    u64::from_ne_bytes(bytes)
}

fn set_word(lab: &Lab, index: usize, value: u64) {
    edit(lab).write_all_at(&value.to_ne_bytes(), index as u64 * 8).unwrap();
}

/// Makes the header's checksum hold again after an edit: what is wrong then is the word, not the checksum.
fn seal(lab: &Lab) {
    let words: Vec<u64> = (0..header::CHECKSUM).map(|i| word(lab, i)).collect();
    set_word(lab, header::CHECKSUM, checksum(&words));
}

/// A finished segment that a dead loader left behind.
fn abandoned(lab: &Lab) {
    lab.loader("kill=rechecked").expect_signal(Signal::SIGKILL);
    assert!(lab.segment().exists());
}

/// A loader makes the segment anew, whatever stands in its place, and serves.
fn is_replaced(lab: &Lab) {
    let loader = lab.loader("");
    wait_for("a ring that can be used", || Segment::open(&lab.plan.spec).is_ok_and(|s| s.is_some()).then_some(()));
    let mut reader = Reader::open(lab);
    reader.take(10);
    reader.finish();
    loader.expect(0);
    assert!(!lab.segment().exists());
}

/// A consumer refuses what is there, naming `what`.
fn is_refused(lab: &Lab, what: &str) {
    let error = Segment::open(&lab.plan.spec).err().unwrap_or_else(|| panic!("a ring with a wrong {what} was accepted"));
    assert_eq!(error.exit_code(), 65, "{error}");
    assert!(error.to_string().contains(what), "'{what}' in: {error}");
}

#[test]
fn f06_a_torn_header_is_never_used() {
    // Never finished: the consumer waits for it.
    let lab = Lab::new(3);
    lab.loader("kill=header-torn:5").expect_signal(Signal::SIGKILL);
    assert!(Segment::open(&lab.plan.spec).unwrap().is_none());
    is_replaced(&lab);
    // Finished, then half of it overwritten.
    abandoned(&lab);
    set_word(&lab, header::SLOTS, 4711);
    is_refused(&lab, "torn");
    is_replaced(&lab);
    // A file of any other length and content.
    for content in [&b""[..], &[0xff; 100], &[0xff; 300_000]] {
        std::fs::write(lab.segment(), content).unwrap();
        assert!(!matches!(Segment::open(&lab.plan.spec), Ok(Some(_))));
        is_replaced(&lab);
    }
}

#[test]
fn f07_a_header_of_something_else_is_refused_by_name() {
    let lab = Lab::new(3);
    for (index, name) in [
        (header::MAGIC, "magic"),
        (header::VERSION, "version"),
        (header::ENDIAN, "byte order"),
        (header::SIGNATURE, "slab signature"),
        (header::FORM, "payload form"),
        (header::CHUNK_BYTES, "chunk bytes"),
        // A number that could be: the segment has not the length for it.
        (header::CONSUMERS, "bytes"),
    ] {
        abandoned(&lab);
        let was = word(&lab, index);
        set_word(&lab, index, if index == header::ENDIAN { was.swap_bytes() } else { was + 1 });
        seal(&lab);
        is_refused(&lab, name);
        is_replaced(&lab);
    }
    abandoned(&lab);
    set_word(&lab, header::CHECKSUM, word(&lab, header::CHECKSUM) ^ 1);
    is_refused(&lab, "checksum");
    is_replaced(&lab);
}

#[test]
fn f07_a_ring_of_another_slab_is_not_replaced_under_its_user() {
    let lab = Lab::new(3);
    let first = lab.loader("");
    let mut reader = Reader::open(&lab);
    reader.take(1);
    first.kill();
    set_word(&lab, header::SIGNATURE, 1);
    seal(&lab);
    let said = lab.loader("").expect(69);
    assert!(said.contains("still uses") && said.contains("slab signature"), "{said}");
    drop(reader);
    is_replaced(&lab);
}

#[test]
fn f08_a_second_loader_names_the_first_and_goes() {
    let lab = Lab::new(4);
    let first = lab.loader("");
    let mut reader = Reader::open(&lab);
    reader.take(5);
    for _ in 0..2 {
        let said = lab.loader("").expect(69);
        assert!(said.contains(&format!("already has a loader: process {}", first.pid())), "{said}");
    }
    reader.pass();
    reader.finish();
    first.expect(0);
}

#[test]
fn f09_a_second_consumer_names_the_first_and_goes() {
    let lab = Lab::new(4);
    let loader = lab.loader("");
    let first = consumer(&lab);
    let error = Segment::open(&lab.plan.spec).err().expect("one consumer only");
    assert_eq!(error.exit_code(), 69);
    assert!(error.to_string().contains(&format!("process {}", first.pid())), "{error}");
    first.kill();
    let mut reader = Reader::open(&lab);
    reader.pass();
    reader.finish();
    loader.expect(0);
}

#[test]
fn f10_a_segment_from_before_a_reboot_is_made_anew() {
    let lab = Lab::new(3);
    abandoned(&lab);
    set_word(&lab, header::BOOT, word(&lab, header::BOOT) ^ 1);
    seal(&lab);
    is_refused(&lab, "boot");
    is_replaced(&lab);
}

#[test]
fn f11_shared_memory_too_small_is_an_error_and_not_sigbus() {
    // 64 slots of 16 KiB do not fit into a /dev/shm of half a MiB: a mount of its own, in a namespace of its own.
    let lab = Lab::new(64);
    let (plain, log) = lab.command();
    let mut command = std::process::Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.arg("--map-root-user");
    }
    command.args([
        "--mount",
        "sh",
        "-c",
        "mount -t tmpfs -o size=512k tmpfs /dev/shm || exit 99; \"$@\"; code=$?; ls /dev/shm; exit $code",
        "sh",
    ]);
    command.arg(plain.get_program()).args(plain.get_args()).stdin(std::process::Stdio::null());
    command.stdout(File::options().append(true).open(&log).unwrap()).stderr(File::options().append(true).open(&log).unwrap());
    match command.status() {
        Ok(status) if status.code() != Some(99) && status.code() != Some(1) => {
            let said = std::fs::read_to_string(&log).unwrap();
            assert_eq!(status.code(), Some(75), "{said}");
            assert!(said.contains("shared memory is too small") && said.contains("pinned_pool_mb"), "{said}");
            assert!(!said.lines().any(|l| l.starts_with("serenity-") && !l.contains(':')), "something was left in /dev/shm: {said}");
        }
        refused => eprintln!("SKIPPED the small /dev/shm of F11: no mount namespace here ({refused:?}); a ring of 60 TB stands in for it"),
    }
    // The same without privileges: more than any /dev/shm has.
    let mut spec = lab.plan.spec.clone();
    (spec.slots, spec.chunk_bytes) = (60_000, 1 << 30);
    let error = Segment::open_or_create(&spec).err().expect("60 TB");
    assert_eq!(error.exit_code(), 75, "{error}");
    assert!(!lab.segment().exists());
}

/// Loader and consumer at work when somebody cuts the segment to `length` bytes.
fn cut_short(length: impl FnOnce(u64) -> u64) -> (Lab, Running, Running) {
    let lab = Lab::new(6);
    let loader = lab.loader("");
    let consumer = consumer(&lab);
    let file = edit(&lab);
    file.set_len(length(file.metadata().unwrap().len())).unwrap();
    (lab, loader, consumer)
}

#[test]
fn f12_a_segment_cut_short_ends_both_ends_with_a_message() {
    let (_lab, loader, consumer) = cut_short(|_| 0);
    for end in [loader, consumer] {
        let said = end.expect(70);
        assert!(said.contains("was cut short while this process used it"), "{said}");
    }
}

#[test]
fn f12_a_segment_cut_in_half_is_noticed_and_then_made_anew() {
    let (lab, mut loader, mut consumer) = cut_short(|bytes| bytes / 2 / 4096 * 4096);
    // One of them meets what is missing and ends; the other may then have no reason to touch it.
    wait_for("one end to notice", || (!loader.is_running() || !consumer.is_running()).then_some(()));
    for mut end in [loader, consumer] {
        if end.is_running() {
            end.kill();
        } else {
            end.expect(70);
        }
    }
    is_replaced(&lab);
}

#[test]
fn f17_a_recorded_pid_that_lives_is_nobody() {
    let lab = Lab::new(4);
    abandoned(&lab);
    // The dead loader's number now belongs to this test, which lives and has not the role.
    set_word(&lab, loader::PID, u64::from(std::process::id()));
    let first = lab.loader("");
    let mut reader = Reader::open(&lab);
    reader.take(5);
    // A number that another process has got since (its start time says so) is not named as the holder.
    set_word(&lab, loader::PID, u64::from(std::process::id()));
    let said = lab.loader("").expect(69);
    assert!(said.contains("already has a loader: another process"), "{said}");
    // And the holder is alive for the consumer whatever the words say.
    set_word(&lab, loader::PID, 0);
    assert!(reader.segment.is_held(RingRole::Loader));
    reader.pass();
    reader.finish();
    first.expect(0);
}

/// Flips a bit in the payload of every READY slot; how many.
fn flip_ready(lab: &Lab) -> usize {
    let spec = &lab.plan.spec;
    let payload_at = spec.bytes() - spec.slots as u64 * spec.chunk_bytes;
    let file = edit(lab);
    let ready = lab.slots().iter().enumerate().filter(|(_, s)| s.state() == State::Ready).map(|(i, _)| i as u64).collect::<Vec<_>>();
    for slot in &ready {
        let at = payload_at + slot * spec.chunk_bytes + 1000 + slot;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    }
    ready.len()
}

/// A loader and a consumer that has taken nothing, with the ring full.
fn full_ring(lab: &Lab) -> (Running, Reader<'_>) {
    let loader = lab.loader("");
    let reader = Reader::open(lab);
    wait_for("a full ring", || (lab.count(State::Ready) == lab.plan.spec.slots).then_some(()));
    (loader, reader)
}

#[test]
fn f20_a_flipped_bit_is_read_again_by_the_next_loader() {
    let lab = Lab::new(4);
    let (loader, mut reader) = full_ring(&lab);
    loader.kill();
    assert_eq!(flip_ready(&lab), 4);
    let next = lab.loader("");
    // Only once the new loader has looked at them: before, they are the consumer's to find (below).
    wait_for("a loader at work", || next.log().contains("serving").then_some(()));
    assert_eq!(next.log().matches("is damaged and is read again").count(), 4, "{}", next.log());
    reader.pass();
    reader.finish();
    next.expect(0);
}

#[test]
fn f20_a_flipped_bit_is_found_by_the_consumer_and_never_delivered_again() {
    let lab = Lab::new(4);
    let (loader, mut reader) = full_ring(&lab);
    assert_eq!(flip_ready(&lab), 4);
    let leased = reader.lease();
    assert!(!reader.is_intact(&leased), "a flipped bit must show");
    // What a trainer does: it gives the slot back as corrupt and ends (exit 70). Its successor starts a new stream.
    reader.ring.release_corrupt(&leased).unwrap();
    drop(reader);
    let mut found = 0;
    let mut reader = loop {
        let mut reader = Reader::open(&lab);
        let leased = reader.lease();
        if reader.is_intact(&leased) {
            reader.check_and_release(&leased);
            break reader;
        }
        reader.ring.release_corrupt(&leased).unwrap();
        found += 1;
        assert!(found < 4, "the same damaged chunk again");
    };
    // The other damaged chunks are retained content of a loader that trusts what it wrote: each is found once at most.
    let mut damaged = 0;
    for _ in 0..3 * lab.chunks() {
        let leased = reader.lease();
        if reader.is_intact(&leased) {
            reader.check_and_release(&leased);
        } else {
            damaged += 1;
            reader.ring.release_corrupt(&leased).unwrap();
            reader.segment.wake(loader::WAKE);
            reader.post();
        }
    }
    assert!(damaged <= 3, "{damaged} damaged chunks out of the 3 that were left");
    reader.pass();
    reader.finish();
    loader.expect(0);
}
