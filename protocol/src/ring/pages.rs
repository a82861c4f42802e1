//! Advice to the kernel about the ring's memory: mapped ahead of time, in huge pages where they are to be had.
//!
//! The segment's memory is reserved when it is made, but every process maps it page by page as it touches it: with 4 KiB pages that is a
//! fault for each, which holds a fill to a few GB/s a core during the first pass. [`populate`] maps it step by step, slot after slot, in a
//! thread of its own: memory that the machine has never touched costs seconds for each GiB in a virtual machine, and no start waits for it.
//! /dev/shm gives huge pages only if it is mounted with `huge=`; the advice is given all the same and what came of it is returned.
//! Content is never changed. Failure: a kernel without the advice (before 5.14) faults page by page as before.

use rustix::mm::{Advice, madvise};

use super::segment::Segment;

/// Bytes that one call maps.
const STEP: usize = 16 << 20;

/// How a process uses the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The loader.
    Write,
    /// A consumer.
    Read,
}

/// Maps the payload area into this process, until all is mapped or `stop` says so, and returns how many of its bytes lie in huge pages.
pub fn populate(segment: &Segment, access: Access, stop: impl Fn() -> bool) -> u64 {
    let (base, bytes) = segment.payload_area();
    advise(segment, 0, bytes, Advice::LinuxHugepage);
    let how = match access {
        Access::Write => Advice::LinuxPopulateWrite,
        Access::Read => Advice::LinuxPopulateRead,
    };
    for at in (0..bytes).step_by(STEP).take_while(|_| !stop()) {
        advise(segment, at, STEP.min(bytes - at), how);
    }
    huge_bytes(base as u64)
}

fn advise(segment: &Segment, at: usize, len: usize, advice: Advice) {
    let (base, bytes) = segment.payload_area();
    assert!(at + len <= bytes, "{at} + {len} of {bytes}");
    // SAFETY: the range lies in the mapping, which lives as long as `segment`; none of the three advices changes or discards content, and a
    // range that cannot be populated is an error, not a signal.
    let _ = unsafe { madvise(base.wrapping_add(at).cast(), len, advice) };
}

/// Bytes of the mapping around `address` that the kernel maps by huge pages.
fn huge_bytes(address: u64) -> u64 {
    let Ok(maps) = std::fs::read_to_string("/proc/self/smaps") else { return 0 };
    let range = |line: &str| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
    };
    let mut ours = false;
    for line in maps.lines() {
        if let Some(range) = range(line) {
            ours = range.contains(&address);
        } else if ours && let Some(kib) = line.strip_prefix("ShmemPmdMapped:") {
            return kib.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap_or(0) * 1024;
        }
    }
    0
}
