//! F16, F18, F19 and F21: time that stands still, runs slowly, or jumps.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serenity_protocol::ring::segment::{RingRole, Segment};
use serenity_protocol::ring::words::State;

use crate::crashes::consumer;
use crate::lab::{Lab, Reader, Running, setting, wait_for};

fn stop_time() -> Duration {
    Duration::from_secs(setting("SERENITY_STOP_SECONDS", 3))
}

#[test]
fn f16_a_stopped_loader_keeps_its_role_and_goes_on() {
    let lab = Lab::new(6);
    let loader = lab.loader("delay=fill:2");
    let mut reader = Reader::open(&lab);
    reader.take(20);
    loader.signal(Signal::SIGSTOP);
    // Whatever is published already can be had; then nothing comes, and nobody else can become the loader.
    while let Some(leased) = reader.try_lease() {
        reader.check_and_release(&leased);
    }
    lab.loader("").expect(69);
    std::thread::sleep(stop_time());
    assert!(reader.segment.is_held(RingRole::Loader));
    loader.signal(Signal::SIGCONT);
    reader.pass();
    reader.finish();
    loader.expect(0);
}

#[test]
fn f16_a_stopped_consumer_keeps_its_role_and_goes_on() {
    let lab = Lab::new(6);
    let loader = lab.loader("");
    let consumer = consumer(&lab);
    consumer.signal(Signal::SIGSTOP);
    wait_for("a full ring", || (lab.count(State::Free) + lab.count(State::Filling) == 0).then_some(()));
    let before = lab.slots();
    assert_eq!(Segment::open(&lab.plan.spec).err().expect("the stopped consumer has the role").exit_code(), 69);
    let used = loader.cpu_seconds();
    std::thread::sleep(stop_time());
    let used = loader.cpu_seconds() - used;
    assert!(used < 0.1 * stop_time().as_secs_f64(), "the loader used {used} s while there was nothing to do");
    assert_eq!(lab.slots(), before, "nobody touched the ring");
    consumer.signal(Signal::SIGCONT);
    wait_for("the consumer to go on", || (lab.slots() != before).then_some(()));
    consumer.kill();
    let mut reader = Reader::open(&lab);
    reader.pass();
    reader.finish();
    loader.expect(0);
}

#[test]
fn f18_a_slow_consumer_costs_the_loader_nothing() {
    let lab = Lab::new(6);
    let loader = lab.loader("");
    let mut reader = Reader::open(&lab);
    reader.take(10);
    wait_for("a full ring", || (lab.count(State::Ready) == 6).then_some(()));
    let (time, used) = (Duration::from_millis(1500), loader.cpu_seconds());
    std::thread::sleep(time);
    let used = loader.cpu_seconds() - used;
    println!("loader with a full ring: {:.1} % of a core", 100.0 * used / time.as_secs_f64());
    assert!(used < 0.1 * time.as_secs_f64(), "{used} s of processor time with nothing to do");
    for _ in 0..40 {
        std::thread::sleep(Duration::from_millis(10));
        reader.take(1);
    }
    reader.pass();
    reader.finish();
    loader.expect(0);
}

#[test]
fn f19_a_slow_producer_is_waited_for_without_spinning() {
    let lab = Lab::new(6);
    let loader = lab.loader("delay=fill:80");
    let consumer = consumer(&lab);
    let (time, used) = (Duration::from_millis(1500), consumer.cpu_seconds());
    std::thread::sleep(time);
    let used = consumer.cpu_seconds() - used;
    println!("consumer of an empty ring: {:.1} % of a core", 100.0 * used / time.as_secs_f64());
    assert!(used < 0.2 * time.as_secs_f64(), "{used} s of processor time while it waited");
    consumer.kill();
    let mut reader = Reader::open(&lab);
    reader.take(20);
    reader.finish();
    loader.expect(0);
}

/// A library that makes the wall clock of a program jump ten years forward or back at each look; built from the source below.
fn jumping_clock() -> PathBuf {
    const SOURCE: &str = r#"
        use std::sync::atomic::{AtomicI64, Ordering};
        #[repr(C)] pub struct Time { seconds: i64, nanoseconds: i64 }
        unsafe extern "C" { fn syscall(number: i64, ...) -> i64; }
        static LOOKS: AtomicI64 = AtomicI64::new(0);
        #[unsafe(no_mangle)] pub unsafe extern "C" fn clock_gettime(clock: i32, time: *mut Time) -> i32 {
            let number = if cfg!(target_arch = "x86_64") { 228 } else { 113 };
            let failed = unsafe { syscall(number, clock as i64, time) } as i32;
            if failed == 0 && clock == 0 {
                let years = if LOOKS.fetch_add(1, Ordering::Relaxed) % 2 == 0 { 10 } else { -10 };
                unsafe { (*time).seconds += years * 31_557_600 };
            }
            failed
        }
    "#;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap().keep();
    let (source, library) = (folder.join("clock.rs"), folder.join("libclock.so"));
    std::fs::write(&source, SOURCE).unwrap();
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let args = ["--edition=2024", "--crate-type=cdylib", "-O", "-o"];
    assert!(Command::new(rustc).args(args).args([&library, &source]).status().unwrap().success());
    library
}

#[test]
fn f21_a_wall_clock_that_jumps_changes_nothing() {
    let lab = Lab::new(6);
    let library = jumping_clock();
    let start = || {
        let (mut command, log) = lab.command();
        command.env("LD_PRELOAD", &library);
        Running::of(command, log)
    };
    let first = start();
    let mut reader = Reader::open(&lab);
    reader.take(100);
    first.kill();
    let loader = start();
    reader.pass();
    reader.finish();
    let said = loader.expect(0);
    // Its own log says that the clock did jump: lines are dated, alternately.
    let mut years: Vec<&str> = said.lines().filter_map(|l| l.get(..4)).filter(|y| y.parse::<u16>().is_ok()).collect();
    years.dedup();
    assert!(years.len() > 1, "the clock did not jump:\n{said}");
    std::fs::remove_dir_all(library.parent().unwrap()).unwrap();
}

#[test]
fn f21_nothing_that_waits_looks_at_the_wall_clock() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut seen = 0;
    for folder in ["protocol/src/ring", "loader/src", "loader/src/reader", "trainer/src"] {
        for entry in std::fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let found = text.lines().position(|l| l.contains("SystemTime::now"));
                assert_eq!(found, None, "{}: waits and deadlines use Instant", path.display());
                seen += 1;
            }
        }
    }
    assert!(seen > 30, "{seen} files");
}
