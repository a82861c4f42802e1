//! Host memory of every kind, copies on both streams, and the order that events keep between them.

use std::sync::Arc;

use memmap2::MmapMut;
use serenity_protocol::{Error, Result};

use super::Check;
use crate::driver::{Event, Pinned, Stream};
use crate::gpu::Gpu;
use crate::host::{HostSource, Locking};
use crate::mat::{Mat, Ty};

/// Copies by every way, events, failures that must be refused.
pub fn copies(check: &mut Check<'_>) -> Result<()> {
    round_trip(check)?;
    for (name, locking) in [("whole", Locking::Allowed), ("by slot", Locking::BySlot), ("bounced", Locking::Refused)] {
        source(check, name, locking)?;
    }
    pinned(check)?;
    order(check)?;
    memory(check)
}

fn round_trip(check: &mut Check<'_>) -> Result<()> {
    for bytes in [1usize, 255, 4097, 3 << 20] {
        let data: Vec<u8> = (0..bytes).map(|i| (i * 131 % 251) as u8).collect();
        let (ptr, other) = (check.arena.reserve(bytes)?, check.arena.reserve(bytes)?);
        check.gpu.upload(ptr, &data)?;
        check.gpu.compute().copy(other, ptr, bytes)?;
        let mut back = vec![0u8; bytes];
        check.gpu.download(&mut back, other)?;
        check.holds(format!("up, across, down: {bytes} bytes"), back == data);
    }
    Ok(())
}

fn source(check: &mut Check<'_>, name: &str, locking: Locking) -> Result<()> {
    // Longer than the bounce buffer, slots that do not divide it, an odd end.
    let (bytes, slot) = ((70 << 20) + 4096, 12 << 20);
    let mut map = MmapMut::map_anon(bytes).map_err(|e| Error::try_again("cannot map memory").cause(e))?;
    map.chunks_exact_mut(8)
        .enumerate()
        .for_each(|(i, word)| word.copy_from_slice(&(i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()));
    let map = Arc::new(map);
    let target = check.arena.reserve(bytes)?;
    check.gpu.compute().fill(target, 0xff, bytes)?;
    check.gpu.compute().sync()?;
    let mut source = HostSource::of_map(check.gpu.context(), &map, slot, locking)?;
    let event = Event::new(check.gpu.context())?;
    let stream = check.gpu.copy();
    let (first, second) = (33 << 20, 4097);
    source.copy_in(stream, target, 0, first)?;
    source.copy_in(stream, target.offset(first), first, second)?;
    source.copy_in(stream, target.offset(first + second), first + second, bytes - first - second)?;
    stream.record(&event)?;
    event.sync()?;
    let beyond = source.copy_in(stream, target, bytes - 1, 2).is_err();
    let how = source.describe();
    let mut back = vec![0u8; bytes];
    check.gpu.download(&mut back, target)?;
    drop(source);
    check.holds(format!("{name}: {how}, 3 copies of 70 MiB"), back.as_slice() == &map[..]);
    check.holds(format!("{name}: a copy beyond the range is refused"), beyond);
    let wanted = if locking == Locking::Refused { "through a bounce buffer" } else { "page-locked" };
    if !how.starts_with(wanted) {
        let row = super::Row { rate: Some("the driver refuses: the fallback was tested".into()), ..check.row(format!("{name}: {how}")) };
        check.push(row);
    }
    Ok(())
}

fn pinned(check: &mut Check<'_>) -> Result<()> {
    let bytes = 5 << 20;
    let mut pinned = Pinned::new(check.gpu.context(), bytes)?;
    let event = Event::new(check.gpu.context())?;
    let data: Vec<u8> = (0..bytes).map(|i| (i * 7 % 253) as u8).collect();
    pinned.write_after(&event, 0, &data)?;
    let ptr = check.arena.reserve(bytes)?;
    let stream = check.gpu.copy();
    stream.copy_in(ptr, &pinned, 0, bytes)?;
    stream.record(&event)?;
    pinned.write_after(&event, 0, &vec![0u8; bytes])?;
    stream.copy_out(&pinned, 0, ptr, bytes)?;
    let mut back = vec![1u8; bytes];
    pinned.read(0, &mut back)?;
    check.holds("pinned memory: in and out", back == data);
    for (offset, bytes) in [(0, bytes), (16, 16), (4096, 3 << 20), (1 << 20, 4096 * 5 + 16), (7, 1001), (0, 8)] {
        pinned.write_after(&event, 0, &data)?;
        let end = offset + bytes;
        check.gpu.compute().fill(ptr, 0xee, data.len())?;
        check.gpu.fetch_host(check.gpu.compute(), ptr, &pinned, offset, bytes)?;
        let mut back = vec![0u8; data.len()];
        check.gpu.download(&mut back, ptr)?;
        let same = back.get(..bytes) == data.get(offset..end) && back.iter().skip(bytes).all(|b| *b == 0xee);
        check.holds(format!("fetched by multiprocessors: {bytes} bytes at {offset}"), same);
    }
    let beyond = check.gpu.fetch_host(check.gpu.compute(), ptr, &pinned, 16, data.len());
    check.holds("fetched by multiprocessors: beyond the end is refused", beyond.is_err());
    check.holds("pinned memory: beyond the end is refused", stream.copy_out(&pinned, 1, ptr, bytes).is_err());
    Ok(())
}

/// A long copy on one stream, an event, a reader on the other: without the wait the reader would see old bytes.
fn order(check: &mut Check<'_>) -> Result<()> {
    let bytes = 512 << 20;
    let (from, to, seen) = (check.arena.reserve(bytes)?, check.arena.reserve(bytes)?, check.arena.reserve(bytes)?);
    let gpu: &Gpu = check.gpu;
    let words = Mat::new(from, Ty::F32, 1 << 10, (bytes / 4) >> 10);
    let event = Event::new(gpu.context())?;
    let mut good = true;
    for seed in 0..4u64 {
        gpu.fill_random(words, seed, 1.0)?;
        gpu.compute().record(&event)?;
        let cross = |one: &Stream, two: &Stream| -> Result<()> {
            one.wait(&event)?;
            one.copy(to, from, bytes)?;
            one.record(&event)?;
            two.wait(&event)?;
            two.copy(seen, to, bytes)
        };
        cross(gpu.copy(), gpu.compute())?;
        gpu.sync()?;
        let ends = |ptr: crate::Ptr| -> Result<Vec<u8>> {
            let mut tail = vec![0u8; 4096];
            gpu.download(&mut tail, ptr.offset(bytes - 4096))?;
            Ok(tail)
        };
        good &= ends(seen)? == ends(from)? && event.done()?;
    }
    check.holds("a stream waits for the other's event", good);
    let (start, end) = (Event::timed(gpu.context())?, Event::timed(gpu.context())?);
    gpu.compute().record(&start)?;
    gpu.compute().copy(to, from, bytes)?;
    gpu.compute().record(&end)?;
    end.sync()?;
    let ms = end.since_ms(&start)?;
    check.holds(format!("events tell time: {ms:.3} ms for a copy of 512 MiB"), ms > 0.01 && ms < 1000.0);
    Ok(())
}

fn memory(check: &mut Check<'_>) -> Result<()> {
    let before = check.gpu.memory()?;
    check.holds("the driver's figures", before.free < before.total && before.used_by_process_estimate >= check.arena.capacity() as u64);
    let error = crate::Arena::new(check.gpu, usize::try_from(before.total).unwrap_or(usize::MAX));
    check.holds("more memory than there is: exit code 75", error.err().map(|e| e.exit_code()) == Some(75));
    check.holds("memory is as before", check.gpu.memory()?.free == before.free);
    Ok(())
}
