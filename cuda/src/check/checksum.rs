//! Checksums of payloads on the device, equal to the host's.

use serenity_protocol::Result;
use serenity_protocol::checksum::xxh3_64;

use super::{Check, Row, Work};
use crate::driver::{Event, Pinned};
use crate::gpu::Gpu;
use crate::ops::checksum::Pieces;

/// `xxh3_pieces`: every short length, lengths about the ends of stripes, blocks and rounds, at every alignment; and its rate.
pub fn checksum(check: &mut Check<'_>) -> Result<()> {
    let mut lengths: Vec<usize> = (0..=300).chain((1..20).flat_map(|k| [64 * k - 1, 64 * k, 64 * k + 1])).collect();
    lengths.extend(
        [1, 2, 55, 56, 57, 111, 112, 113, 1024].iter().flat_map(|k| [1024 * k - 1, 1024 * k, 1024 * k + 1, 1024 * k + 63, 1024 * k + 65]),
    );
    for shift in 0..8 {
        let of_shift = lengths.iter().map(|len| (shift, *len)).collect::<Vec<_>>();
        let (equal, count) = same(check, &of_shift)?;
        check.holds(format!("{count} lengths, {shift} bytes off a word"), equal);
    }
    // A chunk as the loader fills it: 64 MiB in pages of 1 MiB.
    let chunk: Vec<(usize, usize)> = (0..64).map(|_| (0, 1 << 20)).collect();
    let (equal, _) = same(check, &chunk)?;
    check.holds("64 pieces of 1 MiB", equal);
    rate(check, 16)?;
    rate(check, 64)
}

/// Hashes pieces of these `(distance from the piece before, length)` on the device and on the host.
fn same(check: &mut Check<'_>, cuts: &[(usize, usize)]) -> Result<(bool, usize)> {
    let mark = check.arena.mark();
    let mut at = 0usize;
    let pieces: Vec<(usize, usize)> = cuts
        .iter()
        .map(|(shift, len)| {
            let start = at.next_multiple_of(8) + shift;
            at = start + len;
            (start, *len)
        })
        .collect();
    let payload: Vec<u8> = (0..at as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    let device = check.arena.reserve(at)?;
    check.gpu.upload(device, &payload)?;
    let (list, hashes, event) = memory(check.gpu, &pieces)?;
    check.gpu.xxh3_pieces(device, &list, Pieces { first: 0, count: pieces.len() }, &hashes, 1)?;
    check.gpu.check().record(&event)?;
    let mut found = vec![0u64; pieces.len()];
    hashes.read_after(&event, 8, bytemuck::cast_slice_mut(&mut found))?;
    let expected = pieces.iter().map(|(start, len)| xxh3_64(payload.get(*start..start + len).unwrap_or_default()));
    let equal = expected.eq(found.iter().copied());
    check.arena.reset(mark)?;
    Ok((equal, pieces.len()))
}

fn memory(gpu: &Gpu, pieces: &[(usize, usize)]) -> Result<(Pinned, Pinned, Event)> {
    let words: Vec<u64> = pieces.iter().flat_map(|(start, len)| [*start as u64, *len as u64]).collect();
    let event = Event::new(gpu.context())?;
    let mut list = Pinned::new(gpu.context(), 8 * words.len())?;
    list.write_after(&event, 0, bytemuck::cast_slice(&words))?;
    Ok((list, Pinned::new(gpu.context(), 8 * (pieces.len() + 1))?, event))
}

/// Time for a chunk of so many MiB.
fn rate(check: &mut Check<'_>, mib: usize) -> Result<()> {
    let mark = check.arena.mark();
    let device = check.arena.reserve(mib << 20)?;
    check.gpu.compute().fill(device, 0x5a, mib << 20)?;
    let pieces: Vec<(usize, usize)> = (0..mib).map(|i| (i << 20, 1 << 20)).collect();
    let (list, hashes, event) = memory(check.gpu, &pieces)?;
    let run = |gpu: &Gpu| {
        gpu.xxh3_pieces(device, &list, Pieces { first: 0, count: pieces.len() }, &hashes, 0)?;
        // The time is taken on the compute stream.
        gpu.check().record(&event)?;
        gpu.compute().wait(&event)
    };
    let micros = check.median_micros(&|_| Ok(()), &run)?;
    let rate = Work::Bytes((mib << 20) as f64).rate(micros);
    check.push(Row { micros: Some(micros), rate, ..check.row(format!("{mib} MiB in pieces of 1 MiB")) });
    check.arena.reset(mark)
}
