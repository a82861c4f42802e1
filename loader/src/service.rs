//! The loader at work: claims slots for what the trainer asked for, has workers fill them, publishes.
//!
//! The calling thread walks the request queue ([`Producer`]) and hands jobs to a few workers. A worker keeps the disk busy for its chunk
//! and rayon's threads work on the pages that arrive ([`Filler::fill`]); then it publishes the chunk and wakes the trainer. With several
//! workers the next chunks' pages are there when a chunk's last ones are being written. Waits are on futexes and last at most 100 ms, so an idle loader costs nothing and a dead peer is noticed.
//!
//! Failure: a worker's error ends the service with that error (corrupt slab: exit 65). Slots that were being filled stay FILLING and are
//! freed by the next loader.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use serenity_protocol::config::Config;
use serenity_protocol::faults::point;
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::message::FromChild;
use serenity_protocol::process::Process;
use serenity_protocol::ring::pages;
use serenity_protocol::ring::plan::RingPlan;
use serenity_protocol::ring::producer::{Action, Job, Producer};
use serenity_protocol::ring::segment::{RingRole, Segment, WAIT_MAX};
use serenity_protocol::ring::words::{ChunkId, Descriptor, Words, consumer, loader};
use serenity_protocol::slab::Slab;
use serenity_protocol::slab::layout::SlabLayout;
use serenity_protocol::{Error, Result};

use crate::faults;
use crate::fill::Filler;
use crate::reader::{Fetched, Reader, SlabFile};
use crate::stages::{Stage, timed};

/// Chunks that are read or dequantised at the same time.
const WORKERS: usize = 3;
/// How often the display hears from the ring.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// How often it looks whether a consumer has died: no longer than a wait.
const FUNERALS_EVERY: Duration = WAIT_MAX;

/// Shared between the service thread and its workers.
struct Shared {
    segment: Segment,
    producer: Mutex<Producer<Segment>>,
    filler: Filler,
    file: Arc<SlabFile>,
    in_flight: AtomicUsize,
    failed: Mutex<Option<Error>>,
    over: AtomicBool,
}

impl Shared {
    fn producer(&self) -> Result<MutexGuard<'_, Producer<Segment>>> {
        self.producer.lock().map_err(|_| Error::invariant("a loader thread panicked while it held the ring"))
    }

    fn fail(&self, error: Error) {
        if let Ok(mut failed) = self.failed.lock() {
            failed.get_or_insert(error);
        }
        self.segment.wake(loader::WAKE);
    }

    fn wake_consumer(&self, index: usize) {
        self.segment.wake(self.segment.shape().at(index, consumer::WAKE));
    }

    /// Gives up consumers whose role lock the kernel has dropped: what they held would be missing to the others.
    fn bury_the_dead(&self) -> Result<()> {
        for index in 0..self.segment.shape().consumers {
            // In this order: a successor takes the lock before it raises the epoch.
            let epoch = self.producer()?.consumer_epoch(index);
            if epoch != 0 && !self.segment.is_held(RingRole::Consumer(index)) && self.producer()?.bury(index, epoch)? {
                tracing::info!("consumer {index} is gone; what it held and had asked for is given up");
            }
        }
        Ok(())
    }

    fn work(&self, jobs: &Mutex<Receiver<Job>>) {
        let mut reader = Reader::new(self.file.clone());
        loop {
            let next = timed(Stage::SlotWait, || jobs.lock().ok().and_then(|jobs| jobs.recv().ok()));
            let Some(job) = next else { return };
            let result = self.fill(job, &mut reader);
            // Release: pairs with the Acquire in `serve`, which then sees the slot's new state.
            self.in_flight.fetch_sub(1, Ordering::Release);
            match result {
                Ok(()) => {
                    point("after-publish");
                    self.wake_consumer(job.consumer);
                    self.segment.wake(loader::WAKE);
                    point("after-wake");
                }
                Err(error) => return self.fail(error),
            }
        }
    }

    fn fill(&self, job: Job, reader: &mut Reader) -> Result<()> {
        point("before-fill");
        faults::delay_fill();
        let bytes = self.filler.chunk_bytes(job.content)?;
        // SAFETY: the producer claimed the slot for this job under our epoch (FILLING), and a job is handed to one worker.
        let slot = unsafe { self.segment.slot_filling(job.slot) };
        let payload = self.filler.fill(job.content, reader, &mut slot[..bytes])?;
        point("after-payload");
        self.producer()?.publish(job, bytes as u64, payload)
    }

    /// Reads once, in the background, what no chunk ever needs (linears outside the blocks, in a slab that has them): a slab with a
    /// damaged byte anywhere is refused, not only where this run happens to look.
    fn check_rest(&self, process: &Process) -> Result<()> {
        let mut needed = Vec::new();
        for layout in &self.filler.layout().blocks {
            for chunk in 0..self.filler.layout().chunks_of(layout.block) {
                needed.extend(self.filler.file_ranges(ChunkId { block: layout.block.0, chunk: chunk as u16 })?);
            }
        }
        let mut reader = Reader::new(self.file.clone());
        let mut fetched = Fetched::new();
        for range in self.file.pages_outside(&needed) {
            // Relaxed: a lone flag, see `serve_segment`.
            if process.stop_requested() || self.over.load(Ordering::Relaxed) {
                break;
            }
            reader.fetch(std::slice::from_ref(&range), &mut fetched)?;
        }
        Ok(())
    }

    /// A retained chunk of an earlier loader: published if its bytes are what its descriptor says, else served anew.
    fn verify(&self, job: Job, checksum: u64) -> Result<()> {
        point("before-verify");
        let bytes = self.filler.chunk_bytes(job.content)? as u64;
        // SAFETY: the producer claimed the slot for this job under our epoch (FILLING), and nobody writes it meanwhile.
        let payload = unsafe { self.segment.slot_payload(job.slot, bytes) };
        let found = self.filler.layout().payload_checksum(BlockId(job.content.block), u32::from(job.content.chunk), payload)?;
        if found == checksum {
            self.producer()?.publish(job, bytes, checksum)?;
            point("verified");
            self.wake_consumer(job.consumer);
            return Ok(());
        }
        tracing::warn!(
            "a retained chunk of an earlier loader is damaged and is read again (block {}, chunk {})",
            job.content.block,
            job.content.chunk
        );
        self.producer()?.abandon(job)
    }
}

/// Serves the ring until the consumer has finished (when no launcher is there to say so) or a stop is requested.
///
/// # Errors
/// Corrupt slab, ring held by another loader, /dev/shm full; see the module documentation.
pub fn run(config: &Config, slab: &Slab, geometry: &TransformerGeometry, process: &Process) -> Result<()> {
    let plan = RingPlan::new(config, slab, geometry)?;
    let threads = config.memory.stagehand.loader_threads;
    // A second pool (tests) keeps the first; results do not depend on the number of threads.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("dequantise-{i}")).build_global();
    point("before-attach");
    let segment = Segment::open_or_create(&plan.spec)?;
    segment.sign(RingRole::Loader);
    let result = serve_segment(&plan, slab, geometry, &segment, process);
    segment.leave();
    result
}

/// Serves an opened segment; [`run`] without opening and leaving it.
///
/// # Errors
/// As [`run`].
pub fn serve_segment(plan: &RingPlan, slab: &Slab, geometry: &TransformerGeometry, segment: &Segment, process: &Process) -> Result<()> {
    let file = SlabFile::open(slab)?;
    let mut reader = Reader::new(file.clone());
    let filler = Filler::new(slab, geometry, plan.layout.clone(), &mut reader)?;
    let mut producer = Producer::attach(segment.clone(), segment.shape(), plan.catalogue()?)?;
    point("attached");
    recheck_ready(&mut producer, segment, &plan.layout)?;
    point("rechecked");
    let shared = Shared {
        segment: segment.clone(),
        producer: Mutex::new(producer),
        filler,
        file,
        in_flight: AtomicUsize::new(0),
        failed: Mutex::new(None),
        over: AtomicBool::new(false),
    };
    tracing::info!(
        slots = plan.spec.slots,
        chunk_mib = plan.spec.chunk_bytes as f64 / 1_048_576.0,
        form = ?plan.spec.form,
        direct = shared.file.is_direct(),
        "serving {}",
        plan.spec.path().display()
    );
    process.send(&FromChild::Ready);
    let (send, receive) = sync_channel::<Job>(WORKERS);
    let receive = Mutex::new(receive);
    std::thread::scope(|scope| {
        for i in 0..WORKERS {
            let (shared, receive) = (&shared, &receive);
            std::thread::Builder::new()
                .name(format!("fill-{i}"))
                .spawn_scoped(scope, move || shared.work(receive))
                .map_err(|e| Error::absent("cannot start a thread").cause(e))?;
        }
        let shared_ref = &shared;
        std::thread::Builder::new()
            .name("check-rest".into())
            .spawn_scoped(scope, move || {
                // Relaxed: lone flags, looked at between steps. A fill that comes first maps its slot by itself.
                let stop = || process.stop_requested() || shared_ref.over.load(Ordering::Relaxed);
                let huge = pages::populate(&shared_ref.segment, pages::Access::Write, stop);
                tracing::info!(huge_mib = huge >> 20, "ring mapped");
                if let Err(error) = shared_ref.check_rest(process) {
                    shared_ref.fail(error);
                }
            })
            .map_err(|e| Error::absent("cannot start a thread").cause(e))?;
        // The channel closes when `serve` returns, and the workers end with it.
        let served = serve(&shared, send, process);
        // Relaxed: a lone flag that the thread above looks at between reads.
        shared.over.store(true, Ordering::Relaxed);
        served
    })
}

/// What an earlier loader delivered is compared before anybody is told of us: damaged chunks are taken back, the others may be shared.
fn recheck_ready(producer: &mut Producer<Segment>, segment: &Segment, layout: &SlabLayout) -> Result<()> {
    let intact = |slot: usize, bytes: u64, checksum: u64| {
        let Some(descriptor) = Descriptor::read(segment, segment.shape().slot(slot)) else { return false };
        if bytes > segment.spec().chunk_bytes {
            return false;
        }
        // SAFETY: only a loader writes slots, this process is the loader, and it writes only what it has claimed since.
        let payload = unsafe { segment.slot_payload(slot, bytes) };
        let ChunkId { block, chunk } = descriptor.content;
        layout.payload_checksum(BlockId(block), u32::from(chunk), payload).is_ok_and(|found| found == checksum)
    };
    let checked: Vec<(usize, bool)> =
        producer.ready_slots()?.into_par_iter().map(|(slot, bytes, checksum)| (slot, intact(slot, bytes, checksum))).collect();
    for (slot, intact) in checked {
        if intact {
            producer.confirm(slot);
            continue;
        }
        tracing::warn!("a published chunk of an earlier loader is damaged and is read again (slot {slot})");
        producer.drop_ready(slot)?;
    }
    Ok(())
}

fn serve(shared: &Shared, jobs: SyncSender<Job>, process: &Process) -> Result<()> {
    let (mut reported, mut buried) = (Instant::now(), None::<Instant>);
    let mut waiting: Option<tracing::span::EnteredSpan> = None;
    loop {
        let ticket = shared.segment.ticket(loader::WAKE);
        process.tick();
        if let Some(error) = shared.failed.lock().ok().and_then(|mut f| f.take()) {
            return Err(error);
        }
        if process.stop_requested() || consumers_finished(shared, process) {
            return Ok(());
        }
        if buried.is_none_or(|at| at.elapsed() >= FUNERALS_EVERY) {
            buried = Some(Instant::now());
            shared.bury_the_dead()?;
        }
        if reported.elapsed() >= REPORT_EVERY {
            reported = Instant::now();
            report(shared, process)?;
        }
        // Acquire: pairs with the Release in `work`. A claim without a worker at hand would only hold a slot idle.
        let action = if shared.in_flight.load(Ordering::Acquire) > WORKERS { Action::Wait } else { shared.producer()?.next_action()? };
        if action != Action::Wait {
            waiting = None;
        }
        match action {
            Action::Wait => {
                waiting.get_or_insert_with(|| tracing::trace_span!("slot wait").entered());
                shared.segment.wait(loader::WAKE, ticket);
            }
            Action::Republished(job) => {
                point("republished");
                shared.wake_consumer(job.consumer);
            }
            Action::Verify(job, checksum) => shared.verify(job, checksum)?,
            Action::Fill(job) => {
                // Relaxed: only this thread adds, and the channel orders the hand-over.
                shared.in_flight.fetch_add(1, Ordering::Relaxed);
                if jobs.send(job).is_err() {
                    let error = shared.failed.lock().ok().and_then(|mut f| f.take());
                    return Err(error.unwrap_or_else(|| Error::invariant("the loader's workers are gone")));
                }
            }
        }
    }
}

/// Without a launcher, the loader goes when every consumer that it makes room for has come and said that it has finished.
fn consumers_finished(shared: &Shared, process: &Process) -> bool {
    if process.has_launcher() {
        return false;
    }
    let (words, shape) = (shared.segment.words(), shared.segment.shape());
    (0..shape.consumers).all(|index| {
        let finished = words.load(shape.at(index, consumer::FINISHED));
        finished != 0 && finished == words.load(shape.at(index, consumer::POSTED)) >> 48
    })
}

fn report(shared: &Shared, process: &Process) -> Result<()> {
    let occupied = shared.producer()?.occupied();
    let read_bytes = shared.file.read_bytes();
    shared.segment.words().store(loader::READ_BYTES, read_bytes);
    process.send(&FromChild::Ring { occupied, slots: shared.segment.spec().slots as u32, read_bytes });
    Ok(())
}
