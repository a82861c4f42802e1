#![allow(clippy::unwrap_used, clippy::expect_used)]
//! Faults F1 to F21 of the ring, each injected into real loader processes over the real segment, and the kill campaign.
//!
//! [`lab`] starts loaders and compares every byte of every chunk with an independent reading of the slab. The consumer is this
//! test binary (over the ring's public interface), not the trainer; the trainer is killed at random in the workspace's `tests/e2e/crashes.rs`.
//!
//! | fault | test | expected |
//! |---|---|---|
//! | F1 loader killed while it fills | `crashes::f01_...` | next loader frees the slot; every byte right |
//! | F2 killed between payload and publication | `crashes::f02_...` | as F1 |
//! | F3 killed after publication, before the wake-up | `crashes::f03_...` | the consumer finds the chunk without a loader |
//! | F4 consumer killed while it holds leases | `crashes::f04_...` | the loader frees them; without a loader the next consumer does |
//! | F5 both killed at once | `crashes::f05_...` | both go on; no slot is lost |
//! | F6 torn header | `segments::f06_...` | consumer waits or refuses (65), loader makes it anew |
//! | F7 wrong magic, version, byte order, checksum, signature | `segments::f07_...` | as F6, and the field is named |
//! | F8 two loaders | `segments::f08_...` | the second exits 69 naming the first |
//! | F9 two trainers with one identity | `segments::f09_...` | the second exits 69 naming the first |
//! | F10 segment from before a reboot | `segments::f10_...` | refused by the consumer, replaced by the loader |
//! | F11 /dev/shm too small | `segments::f11_...` | exit 75 and the missing size; no SIGBUS, nothing left |
//! | F12 segment cut short by somebody | `segments::f12_...` | a message and exit 70, not SIGBUS |
//! | F13 memory lock of 64 KiB, not root | `reads::f13_...` | serves |
//! | F14 io_uring refused | `reads::f14_...` | serves with threads, said once |
//! | F15 short reads, EINTR, EAGAIN; EIO | `reads::f15_...` | serves; EIO: exit 65 with path and offset |
//! | F16 SIGSTOP of either end | `clocks::f16_...` | the other waits, nobody takes the role, all goes on |
//! | F17 pid reuse | `segments::f17_...` | a recorded pid that lives is not taken for the role's holder |
//! | F18 slow consumer | `clocks::f18_...` | the loader sleeps meanwhile |
//! | F19 slow producer | `clocks::f19_...` | the consumer sleeps meanwhile |
//! | F20 bit flip in a READY payload | `segments::f20_...` | read again by a new loader; found by the consumer |
//! | F21 the wall clock jumps | `clocks::f21_...` | nothing changes |
//!
//! [`consumers`] does the same with two consumers of one loader: killed, stopped, and a loader killed under both.
//!
//! `SERENITY_LOADER_KILLS=N` sets the kills of the campaign (default 40, which is each point once; the acceptance run uses 200), `SERENITY_KILL_SEED=N` the moments,
//! `SERENITY_RESTART_MAX_MS=N` the longest restart (default 30000, because a build machine may be busy; the acceptance run uses 2000),
//! `SERENITY_STOP_SECONDS=N` how long F16 stops a process (default 3; the acceptance run uses 60).

mod clocks;
mod consumers;
mod crashes;
mod lab;
mod reads;
mod segments;
