//! `serenity-loader bench`: the loader against a consumer that takes every chunk, checks it and throws it away.
//!
//! The limits are measured in the same run: a plain sequential direct read of the same file, and memcpy with every thread. The
//! expected rate of a pass is the smaller of what disk and memory allow, and the result is reported as a ratio to that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rayon::prelude::*;
use serenity_protocol::config::PayloadForm;
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::message::Role;
use serenity_protocol::process::Process;
use serenity_protocol::ring::consumer::Consumer;
use serenity_protocol::ring::plan::RingPlan;
use serenity_protocol::ring::segment::{RingRole, Segment};
use serenity_protocol::ring::words::{consumer, loader};
use serenity_protocol::slab::Slab;
use serenity_protocol::{Error, Result};

use crate::reader::{Fetched, Reader, SlabFile};
use crate::service;

/// What to measure.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// Payload form.
    pub form: PayloadForm,
    /// Bytes of a slot.
    pub chunk_bytes: u64,
    /// Payload bytes of the ring.
    pub pool_bytes: u64,
    /// Passes over the model (forward, then backward, and so on).
    pub passes: usize,
}

/// Rates in bytes per second, times in seconds.
#[derive(Debug, Clone, serde::Serialize)]
pub struct BenchReport {
    /// `bf16` or `int8`.
    pub form: &'static str,
    /// Slots of the ring.
    pub slots: usize,
    /// Bytes of a slot.
    pub chunk_bytes: u64,
    /// Payload bytes of one pass over the model.
    pub pass_payload_bytes: u64,
    /// Slab bytes read in all.
    pub read_bytes: u64,
    /// Whether reads bypassed the page cache.
    pub direct: bool,
    /// Wall time of each pass.
    pub pass_seconds: Vec<f64>,
    /// Payload bytes per second of the first pass (everything from disk).
    pub first_pass_payload_rate: f64,
    /// Median payload rate of the later passes (retained chunks are not read).
    pub later_pass_payload_rate: f64,
    /// Slab bytes per second of the first pass.
    pub first_pass_read_rate: f64,
    /// Limit: sequential direct read of the same file.
    pub limit_read_rate: f64,
    /// Limit: memcpy by all threads, bytes copied.
    pub limit_memcpy_rate: f64,
    /// First pass over the rate of the plain read.
    pub ratio_to_read_limit: f64,
    /// Time that the null consumer waited for chunks, over the passes.
    pub consumer_wait_seconds: f64,
}

/// Runs the bench.
///
/// # Errors
/// As [`service::serve_segment`].
pub fn run(slab: &Slab, geometry: &TransformerGeometry, options: &BenchOptions) -> Result<BenchReport> {
    let slots = (options.pool_bytes / options.chunk_bytes).max(1) as usize;
    let name = format!("serenity-bench-{}", std::process::id());
    let plan = RingPlan::with(name, slab, geometry, options.form, slots, options.chunk_bytes)?;
    let limit_read_rate = plain_read_rate(slab)?;
    let limit_memcpy_rate = memcpy_rate();
    let segment = Segment::open_or_create(&plan.spec)?;
    let process = Process::detached(Role::Loader);
    let outcome = std::thread::scope(|scope| {
        let service = std::thread::Builder::new()
            .name("service".into())
            .spawn_scoped(scope, || service::serve_segment(&plan, slab, geometry, &segment, &process))
            .map_err(|e| Error::absent("cannot start a thread").cause(e))?;
        let consumed = consume(&plan, geometry, options.passes);
        // Relaxed: a lone flag, looked at within 100 ms.
        process.stop_flag().store(true, std::sync::atomic::Ordering::Relaxed);
        segment.wake(loader::WAKE);
        let served = service.join().map_err(|_| Error::invariant("the loader service panicked"))?;
        served.and(consumed)
    });
    let read_bytes = segment.words()[loader::READ_BYTES].load(std::sync::atomic::Ordering::Acquire); // pairs with the service's store
    segment.leave();
    let (pass_seconds, consumer_wait_seconds, first_read) = outcome?;
    let payload = plan.layout.total_bytes();
    let mut later: Vec<f64> = pass_seconds.iter().skip(1).map(|s| payload as f64 / s).collect();
    later.sort_by(f64::total_cmp);
    let first = pass_seconds.first().copied().unwrap_or(f64::INFINITY);
    let first_pass_read_rate = first_read as f64 / first;
    Ok(BenchReport {
        form: match options.form {
            PayloadForm::Bf16 => "bf16",
            PayloadForm::Int8 => "int8",
        },
        slots,
        chunk_bytes: options.chunk_bytes,
        pass_payload_bytes: payload,
        read_bytes,
        direct: SlabFile::open(slab)?.is_direct(),
        first_pass_payload_rate: payload as f64 / first,
        later_pass_payload_rate: later.get(later.len() / 2).copied().unwrap_or(0.0),
        first_pass_read_rate,
        limit_read_rate,
        limit_memcpy_rate,
        ratio_to_read_limit: first_pass_read_rate / limit_read_rate,
        pass_seconds,
        consumer_wait_seconds,
    })
}

/// Takes every chunk of every pass; returns the time of each pass, the time spent waiting, and the slab bytes behind the first pass.
fn consume(plan: &RingPlan, geometry: &TransformerGeometry, passes: usize) -> Result<(Vec<f64>, f64, u64)> {
    let segment = loop {
        match Segment::open(&plan.spec)? {
            Some(segment) => break segment,
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    segment.sign(RingRole::Consumer);
    let mut ring = Consumer::attach(segment.clone(), segment.shape(), plan.catalogue()?)?;
    let forward: Vec<u16> = geometry.blocks().map(|b| b.0).collect();
    let mut backward = forward.clone();
    backward.reverse();
    let (mut seconds, mut waited) = (Vec::new(), 0.0);
    for pass in 0..passes {
        let order = if pass % 2 == 0 { &forward } else { &backward };
        let start = Instant::now();
        let mut posted = ring.post(order)?;
        segment.wake(loader::WAKE);
        for &block in order {
            for _ in 0..plan.layout.chunks_of(serenity_protocol::geometry::BlockId(block)) {
                let wait_start = Instant::now();
                let leased = loop {
                    let ticket = segment.ticket(consumer::WAKE);
                    match ring.try_lease()? {
                        Some(leased) => break leased,
                        None if !segment.is_held(RingRole::Loader) => return Err(Error::absent("the loader service ended early")),
                        None => segment.wait(consumer::WAKE, ticket),
                    }
                };
                waited += wait_start.elapsed().as_secs_f64();
                // SAFETY: the slot is leased to us until `release`.
                let bytes = unsafe { segment.slot_payload(leased.slot, leased.bytes) };
                if plan.layout.payload_checksum(BlockId(block), u32::from(leased.content.chunk), bytes)? != leased.checksum {
                    return Err(Error::invariant("a chunk in the ring does not have its checksum"));
                }
                ring.release(&leased)?;
                segment.wake(loader::WAKE);
            }
            posted += ring.post(&order[posted..])?;
        }
        seconds.push(start.elapsed().as_secs_f64());
    }
    ring.finish();
    segment.wake(loader::WAKE);
    let first = plan.layout.blocks.iter().flat_map(|b| &b.parts).filter(|p| p.kind != serenity_protocol::slab::layout::PartKind::Scales);
    let first_read = first.map(|p| p.out_features as u64 * p.padded_in as u64).sum();
    segment.leave();
    Ok((seconds, waited, first_read))
}

/// Sequential read of the file by the reader itself, in large requests, without the ring.
fn plain_read_rate(slab: &Slab) -> Result<f64> {
    const STEP: u64 = 64 << 20;
    let file: Arc<SlabFile> = SlabFile::open(slab)?;
    let mut reader = Reader::new(file);
    let mut fetched = Fetched::new();
    let total = slab.file_bytes();
    let start = Instant::now();
    let mut offset = 0;
    while offset < total {
        let end = (offset + STEP).min(total);
        reader.fetch(std::slice::from_ref(&(offset..end)), &mut fetched)?;
        offset = end;
    }
    Ok(total as f64 / start.elapsed().as_secs_f64())
}

/// Bytes per second that all threads copy together.
fn memcpy_rate() -> f64 {
    const BYTES: usize = 64 << 20;
    let source: Vec<u8> = (0..BYTES).map(|i| (i % 251) as u8).collect();
    let mut target = vec![0u8; BYTES];
    let part = BYTES / rayon::current_num_threads().max(1);
    let mut best = 0.0f64;
    for _ in 0..5 {
        let start = Instant::now();
        target.par_chunks_mut(part.max(1)).zip(source.par_chunks(part.max(1))).for_each(|(t, s)| t.copy_from_slice(s));
        best = best.max(BYTES as f64 / start.elapsed().as_secs_f64());
        std::hint::black_box(&target);
    }
    best
}
