//! `serenity-loader bench`: the loader against a consumer that takes every chunk, checks it and throws it away.
//!
//! The limits are measured in the same run: the best plain read of the same file by several threads, and memcpy with every thread.
//! Then come passes over the model with the consumer comparing each payload's checksum on every thread (as a trainer does), and passes
//! in which it compares nothing: what the loader delivers if the consumer costs nothing. At the end nobody consumes, with the ring
//! full and then with nothing requested, and the processor time of that is the price of waiting.

use std::time::{Duration, Instant};

use rayon::prelude::*;
use serenity_protocol::config::PayloadForm;
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::message::Role;
use serenity_protocol::process::Process;
use serenity_protocol::ring::consumer::{Consumer, Leased};
use serenity_protocol::ring::pages;
use serenity_protocol::ring::plan::RingPlan;
use serenity_protocol::ring::segment::{RingRole, Segment};
use serenity_protocol::ring::words::{consumer, loader};
use serenity_protocol::slab::Slab;
use serenity_protocol::slab::layout::PartKind;
use serenity_protocol::{Error, Result};

use crate::reader::{PlainRead, SlabFile, plain_read};
use crate::service;
use crate::stages::{self, Histogram, Quantiles, STAGES};

/// Longest measurement of one plain read.
const PLAIN_READ_PATIENCE: Duration = Duration::from_secs(6);

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
    /// Whether the consumer compares checksums in these passes.
    pub verify: bool,
    /// Passes more in which it does not.
    pub delivery_passes: usize,
    /// How long to look at the ring full, and as long empty; zero leaves it out.
    pub idle: Duration,
}

/// One pass over the model. Rates in bytes per second.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Pass {
    /// Wall time.
    pub seconds: f64,
    /// Whether the consumer compared checksums.
    pub verified: bool,
    /// Payload bytes that reached the consumer.
    pub payload_rate: f64,
    /// Bytes read from the slab.
    pub read_bytes: u64,
    /// The same per second.
    pub read_rate: f64,
    /// Processor time of the whole process, consumer included.
    pub cpu_seconds: f64,
    /// Time that the consumer waited for chunks.
    pub wait_seconds: f64,
    /// Time that it compared checksums.
    pub verify_seconds: f64,
    /// Seconds of the loader's threads by stage.
    pub stages: Vec<(&'static str, f64)>,
    /// Times from the claim of a slot to its chunk being whole.
    pub fill: Quantiles,
    /// Times that the consumer waited for each chunk.
    pub wait: Quantiles,
}

/// Limits, passes, ratios. Rates in bytes per second, times in seconds.
#[derive(Debug, Clone, serde::Serialize)]
pub struct BenchReport {
    /// `bf16` or `int8`.
    pub form: &'static str,
    /// Threads.
    pub threads: usize,
    /// Slots of the ring.
    pub slots: usize,
    /// Bytes of a slot.
    pub chunk_bytes: u64,
    /// Payload bytes of one pass over the model.
    pub pass_payload_bytes: u64,
    /// Codes of one pass over the model.
    pub pass_weights: u64,
    /// Whether reads bypass the page cache.
    pub direct: bool,
    /// Limit: the best plain read of the same file.
    pub limit_read: PlainRead,
    /// Limit: memcpy by all threads, bytes copied.
    pub limit_memcpy_rate: f64,
    /// Every pass.
    pub passes: Vec<Pass>,
    /// First pass: slab bytes read per second, over the plain read.
    pub ratio_to_read_limit: f64,
    /// First pass: int8: payload rate over memcpy; bf16: weights per second over memcpy / 3 bytes a weight.
    pub ratio_to_memory_limit: f64,
    /// Median payload rate of the later passes with checksums compared.
    pub later_verified_rate: Option<f64>,
    /// Median payload rate of the later passes without.
    pub later_delivery_rate: Option<f64>,
    /// Processor time per second of waiting, ring full.
    pub idle_full: Option<f64>,
    /// The same, nothing requested.
    pub idle_empty: Option<f64>,
}

/// Runs the bench.
///
/// # Errors
/// As [`service::serve_segment`].
pub fn run(slab: &Slab, geometry: &TransformerGeometry, options: &BenchOptions) -> Result<BenchReport> {
    let slots = (options.pool_bytes / options.chunk_bytes).max(1) as usize;
    let name = format!("serenity-bench-{}", std::process::id());
    let plan = RingPlan::with(name, slab, geometry, options.form, slots, options.chunk_bytes)?;
    let file = SlabFile::open(slab)?;
    let limit_read = plain_read(&file, PLAIN_READ_PATIENCE)?;
    let limit_memcpy_rate = memcpy_rate();
    let segment = Segment::open_or_create(&plan.spec)?;
    // Memory that was never touched is the machine's affair and not the loader's.
    pages::populate(&segment, pages::Access::Write, || false);
    let process = Process::detached(Role::Loader);
    let outcome = std::thread::scope(|scope| {
        let service = std::thread::Builder::new()
            .name("service".into())
            .spawn_scoped(scope, || service::serve_segment(&plan, slab, geometry, &segment, &process))
            .map_err(|e| Error::absent("cannot start a thread").cause(e))?;
        let consumed = consume(&plan, geometry, options);
        // Relaxed: a lone flag, looked at within 100 ms.
        process.stop_flag().store(true, std::sync::atomic::Ordering::Relaxed);
        segment.wake(loader::WAKE);
        let served = service.join().map_err(|_| Error::invariant("the loader service panicked"))?;
        served.and(consumed)
    });
    segment.leave();
    let (passes, idle) = outcome?;
    let codes = plan.layout.blocks.iter().flat_map(|b| &b.parts).filter(|p| p.kind != PartKind::Scales);
    let weights: u64 = codes.map(|p| p.out_features as u64 * p.in_features as u64).sum();
    let first = passes.first().ok_or_else(|| Error::config("a bench needs a pass"))?;
    let memory_ratio = match options.form {
        PayloadForm::Bf16 => weights as f64 / first.seconds / (limit_memcpy_rate / 3.0),
        PayloadForm::Int8 => first.payload_rate / limit_memcpy_rate,
    };
    Ok(BenchReport {
        form: if options.form == PayloadForm::Bf16 { "bf16" } else { "int8" },
        threads: rayon::current_num_threads(),
        slots,
        chunk_bytes: options.chunk_bytes,
        pass_payload_bytes: plan.layout.total_bytes(),
        pass_weights: weights,
        direct: file.is_direct(),
        ratio_to_read_limit: first.read_rate / limit_read.rate,
        ratio_to_memory_limit: memory_ratio,
        later_verified_rate: median_rate(&passes, true),
        later_delivery_rate: median_rate(&passes, false),
        limit_read,
        limit_memcpy_rate,
        passes,
        idle_full: idle.map(|i| i.0),
        idle_empty: idle.map(|i| i.1),
    })
}

fn median_rate(passes: &[Pass], verified: bool) -> Option<f64> {
    let mut rates: Vec<f64> = passes.iter().skip(1).filter(|p| p.verified == verified).map(|p| p.payload_rate).collect();
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied()
}

/// The null consumer.
struct Null<'a> {
    plan: &'a RingPlan,
    segment: Segment,
    ring: Consumer<Segment>,
    waits: Histogram,
    waited: Duration,
    verified: Duration,
}

type Idle = Option<(f64, f64)>;

/// All passes, then the idle measurements.
fn consume(plan: &RingPlan, geometry: &TransformerGeometry, options: &BenchOptions) -> Result<(Vec<Pass>, Idle)> {
    let segment = loop {
        match Segment::open(&plan.spec)? {
            Some(segment) => break segment,
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    segment.sign(RingRole::Consumer(0));
    // As a trainer does when it registers the ring with its device.
    pages::populate(&segment, pages::Access::Read, || false);
    let ring = Consumer::attach(segment.clone(), segment.shape(), plan.catalogue()?)?;
    let mut null = Null { plan, segment, ring, waits: Histogram::new(), waited: Duration::ZERO, verified: Duration::ZERO };
    let forward: Vec<u16> = geometry.blocks().map(|b| b.0).collect();
    let backward: Vec<u16> = forward.iter().rev().copied().collect();
    null.wait_for_service()?;
    let mut passes = Vec::new();
    for pass in 0..options.passes + options.delivery_passes {
        let order = if pass % 2 == 0 { &forward } else { &backward };
        passes.push(null.pass(order, options.verify && pass < options.passes)?);
    }
    let idle = if options.idle.is_zero() { None } else { Some(null.idle(&forward, options.idle)?) };
    null.ring.finish();
    null.segment.wake(loader::WAKE);
    null.segment.leave();
    Ok((passes, idle))
}

impl Null<'_> {
    /// Until the service has taken its role: its start is not part of the first pass.
    fn wait_for_service(&self) -> Result<()> {
        use serenity_protocol::ring::words::Words;
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.segment.words().load(loader::EPOCH) == 0 {
            if Instant::now() > deadline {
                return Err(Error::absent("the loader service did not start"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn pass(&mut self, order: &[u16], verify: bool) -> Result<Pass> {
        let (stages_before, read_before) = (stages::seconds(), stages::read_bytes());
        let (fills_before, waits_before) = (stages::fills().counts(), self.waits.counts());
        (self.waited, self.verified) = (Duration::ZERO, Duration::ZERO);
        let (start, cpu) = (Instant::now(), cpu_seconds());
        self.take(order, verify)?;
        let seconds = start.elapsed().as_secs_f64();
        let cpu_seconds = cpu_seconds() - cpu;
        let read_bytes = stages::read_bytes() - read_before;
        let payload: u64 = order.iter().map(|b| self.plan.layout.block(BlockId(*b)).map_or(0, |l| l.bytes)).sum();
        let spent = stages::seconds();
        Ok(Pass {
            seconds,
            verified: verify,
            payload_rate: payload as f64 / seconds,
            read_bytes,
            read_rate: read_bytes as f64 / seconds,
            cpu_seconds,
            wait_seconds: self.waited.as_secs_f64(),
            verify_seconds: self.verified.as_secs_f64(),
            stages: STAGES.iter().zip(spent.iter().zip(stages_before)).map(|((_, name), (now, then))| (*name, now - then)).collect(),
            fill: stages::fills().since(&fills_before),
            wait: self.waits.since(&waits_before),
        })
    }

    /// Requests the blocks and takes every chunk of them.
    fn take(&mut self, order: &[u16], verify: bool) -> Result<()> {
        let mut posted = self.ring.post(order)?;
        self.segment.wake(loader::WAKE);
        for &block in order {
            for chunk in 0..self.plan.layout.chunks_of(BlockId(block)) {
                let leased = self.lease()?;
                if verify {
                    let start = Instant::now();
                    // SAFETY: the slot is leased to us until `release`.
                    let bytes = unsafe { self.segment.slot_payload(leased.slot, leased.bytes) };
                    if self.plan.layout.payload_checksum(BlockId(block), chunk, bytes)? != leased.checksum {
                        return Err(Error::invariant("a chunk in the ring does not have its checksum"));
                    }
                    self.verified += start.elapsed();
                }
                self.ring.release(&leased)?;
                self.segment.wake(loader::WAKE);
            }
            posted += self.ring.post(&order[posted..])?;
        }
        Ok(())
    }

    fn lease(&mut self) -> Result<Leased> {
        let start = Instant::now();
        let leased = loop {
            let ticket = self.segment.ticket(consumer::WAKE);
            match self.ring.try_lease()? {
                Some(leased) => break leased,
                None if !self.segment.is_held(RingRole::Loader) => return Err(Error::absent("the loader service ended early")),
                None => self.segment.wait(consumer::WAKE, ticket),
            }
        };
        self.waited += start.elapsed();
        self.waits.add(start.elapsed());
        Ok(leased)
    }

    /// Processor seconds per second while the ring is full of chunks that nobody takes, and while nothing is requested.
    fn idle(&mut self, order: &[u16], time: Duration) -> Result<(f64, f64)> {
        let measure = || {
            let (start, cpu) = (Instant::now(), cpu_seconds());
            std::thread::sleep(time);
            (cpu_seconds() - cpu) / start.elapsed().as_secs_f64()
        };
        let mut posted = self.ring.post(order)?;
        self.segment.wake(loader::WAKE);
        let mut before = u64::MAX;
        // Full when nothing has been read for half a second.
        while before != stages::read_bytes() {
            before = stages::read_bytes();
            std::thread::sleep(Duration::from_millis(500));
        }
        let full = measure();
        for &block in order {
            for _ in 0..self.plan.layout.chunks_of(BlockId(block)) {
                let leased = self.lease()?;
                self.ring.release(&leased)?;
                self.segment.wake(loader::WAKE);
            }
            posted += self.ring.post(&order[posted..])?;
        }
        Ok((full, measure()))
    }
}

/// Processor time of this process so far.
fn cpu_seconds() -> f64 {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike;
    getrusage(UsageWho::RUSAGE_SELF)
        .map_or(0.0, |usage| (usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1e6)
}

/// Bytes per second that all threads copy together, out of reach of the caches.
fn memcpy_rate() -> f64 {
    const BYTES: usize = 256 << 20;
    let source: Vec<u8> = (0..BYTES).into_par_iter().map(|i| (i % 251) as u8).collect();
    let mut target = vec![0u8; BYTES];
    let part = BYTES.div_ceil(rayon::current_num_threads().max(1));
    let mut best = 0.0f64;
    for _ in 0..6 {
        let start = Instant::now();
        target.par_chunks_mut(part).zip(source.par_chunks(part)).for_each(|(t, s)| t.copy_from_slice(s));
        best = best.max(BYTES as f64 / start.elapsed().as_secs_f64());
        std::hint::black_box(&target);
    }
    best
}
