//! Payloads from the ring: chunks are leased ahead in order, compared with their checksums on other threads, copied to the device from where
//! they lie, and given back when the event behind the copy has passed.
//!
//! [`Ahead`] is the host's half and knows no device: announcing, leasing, comparing. [`RingSupply`] adds the copies. The ring's memory is
//! registered with the driver at attach ([`HostSource`]: whole, by slot, or through a bounce buffer), so in steady state nothing but a chunk
//! that has not arrived holds the host up. A payload that is not what its descriptor says is never copied: the run ends with exit 70.
//!
//! At most one lease less than this consumer's part of the slots is held (one of a part of one), so that the loader always has a slot to
//! fill. A loader that dies leaves us waiting for its successor; what we have leased stays ours.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use serenity_cuda::driver::Context;
use serenity_cuda::host::Locking;
use serenity_cuda::{Event, Gpu, HostSource, Ptr};
use serenity_protocol::geometry::BlockId;
use serenity_protocol::process::Process;
use serenity_protocol::ring::consumer::Leased;
use serenity_protocol::ring::plan::RingPlan;
use serenity_protocol::{Error, Result};

use crate::cuda::blocks::Supply;
use crate::ring_client::RingClient;
use crate::ring_source::RingStats;

/// Pause between two looks at copies and comparisons that are under way, while the host has nothing else to do.
const LOOK: Duration = Duration::from_micros(50);
/// Chunks that are compared ahead of the copies, beyond one for each thread.
const AHEAD: usize = 4;

/// A leased chunk whose payload is being compared with its checksum.
struct Compared {
    leased: Leased,
    /// Whether it is whole; set by the thread that compared.
    whole: Arc<OnceLock<bool>>,
}

/// The host's half: what is announced, leased and compared.
pub struct Ahead {
    ring: RingClient,
    plan: Arc<RingPlan>,
    process: Process,
    /// Leased, not yet taken.
    compared: VecDeque<Compared>,
    /// Leases held, taken ones included.
    held: usize,
    held_max: usize,
    ahead_max: usize,
}

impl Ahead {
    /// Waits for the ring of `plan`, and takes the consumer's role in it.
    ///
    /// # Errors
    /// As [`RingClient::open`].
    pub fn open(plan: RingPlan, process: Process) -> Result<Self> {
        let ring = RingClient::open(plan, process.clone())?;
        let held_max = ring.segment().shape().quota().saturating_sub(1).max(1);
        let (plan, ahead_max) = (Arc::new(ring.plan().clone()), rayon::current_num_threads() + AHEAD);
        Ok(Self { ring, plan, process, compared: VecDeque::new(), held: 0, held_max, ahead_max })
    }

    /// Announces loads to come.
    ///
    /// # Errors
    /// The ring's.
    pub fn announce(&mut self, loads: &[BlockId]) -> Result<()> {
        self.ring.request(&loads.iter().map(|b| b.0).collect::<Vec<_>>())?;
        self.pump()
    }

    /// Leases what has arrived, as far as that goes without waiting.
    ///
    /// # Errors
    /// The ring's; [`Error::TryAgain`] if the process is asked to stop.
    pub fn pump(&mut self) -> Result<()> {
        if self.process.stop_requested() {
            return Err(self.process.interrupted());
        }
        self.process.tick();
        while self.held < self.held_max && self.compared.len() < self.ahead_max && self.ring.awaited() > 0 {
            let Some(leased) = self.ring.poll()? else { break };
            self.compare(leased);
        }
        Ok(())
    }

    fn compare(&mut self, leased: Leased) {
        self.held += 1;
        let whole = Arc::new(OnceLock::new());
        let (segment, plan, verdict) = (self.ring.segment().clone(), self.plan.clone(), whole.clone());
        rayon::spawn(move || {
            let _span = tracing::trace_span!("compare", block = leased.content.block, chunk = leased.content.chunk).entered();
            // SAFETY: the slot stays leased to this process until the verdict has been seen (`ready`, `drop`); nobody writes a leased slot.
            let payload = unsafe { segment.slot_payload(leased.slot, leased.bytes) };
            let (block, chunk) = (BlockId(leased.content.block), u32::from(leased.content.chunk));
            // An error is a chunk of another length than its place.
            let found = plan.layout.payload_checksum(block, chunk, payload);
            // Set once, here.
            let _ = verdict.set(found.is_ok_and(|f| f == leased.checksum));
        });
        self.compared.push_back(Compared { leased, whole });
    }

    /// Takes the chunk that is due, if it has arrived and is whole. It must be given back with [`Self::release`].
    ///
    /// # Errors
    /// [`Error::Invariant`] for a damaged payload.
    pub fn ready(&mut self) -> Result<Option<Leased>> {
        let Some((leased, whole)) = self.compared.front().and_then(|c| Some((c.leased, *c.whole.get()?))) else { return Ok(None) };
        self.compared.pop_front();
        if whole {
            return Ok(Some(leased));
        }
        self.held -= 1;
        // Marks it, and says so.
        self.ring.verify(&leased)?;
        Err(Error::invariant("a chunk in the ring changed while it was compared with its checksum").at(self.plan.spec.path()))
    }

    /// Gives a chunk back.
    ///
    /// # Errors
    /// The ring's.
    pub fn release(&mut self, leased: &Leased) -> Result<()> {
        self.held = self.held.saturating_sub(1);
        self.ring.release(leased)
    }

    /// Waits a little for what the last [`Self::pump`] did not find. `busy`: copies are under way whose end should be noticed.
    ///
    /// # Errors
    /// As [`RingClient::wait`].
    pub fn wait(&mut self, busy: bool) -> Result<()> {
        if busy || !self.compared.is_empty() {
            std::thread::sleep(LOOK);
            return Ok(());
        }
        if self.ring.awaited() == 0 {
            return Err(Error::invariant("a chunk was awaited that was never announced"));
        }
        let _span = tracing::trace_span!("slot wait").entered();
        if let Some(leased) = self.ring.wait(Duration::MAX)? {
            self.compare(leased);
        }
        Ok(())
    }

    /// Where the payload of a chunk lies in its block's.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the chunk has not the length that the layout gives it.
    pub fn place(&self, leased: &Leased) -> Result<usize> {
        let layout = self.plan.layout.block(BlockId(leased.content.block))?;
        let range = layout.chunk_range(u32::from(leased.content.chunk), self.plan.layout.chunk_bytes);
        if range.end - range.start != leased.bytes {
            return Err(Error::invariant("a chunk in the ring has another length than the layout gives it")
                .expected(range.end - range.start)
                .found(leased.bytes));
        }
        Ok(range.start as usize)
    }

    /// The ring underneath.
    #[must_use]
    pub fn ring(&self) -> &RingClient {
        &self.ring
    }

    /// Says that no more blocks will be asked for, which lets a loader started by hand end.
    pub fn finish(&mut self) {
        self.ring.finish();
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        // Nobody may write what is still being read: the role goes after this.
        while self.compared.iter().any(|c| c.whole.get().is_none()) {
            std::thread::sleep(LOOK);
        }
    }
}

/// A copy under way.
struct Copying {
    leased: Leased,
    start: Event,
    end: Event,
}

struct Inner {
    // In the order in which they must go: the lease of memory, its registration, the mapping.
    copying: VecDeque<Copying>,
    source: HostSource,
    ahead: Ahead,
    idle: Vec<Event>,
    context: Arc<Context>,
    stats: RingStats,
}

/// The ring as a [`Supply`]. Clones share it: one feeds the blocks, one is asked what was done.
#[derive(Clone)]
pub struct RingSupply {
    inner: Rc<RefCell<Inner>>,
}

impl RingSupply {
    /// Waits for the ring, takes the consumer's role in it, and registers its memory with the driver.
    ///
    /// # Errors
    /// As [`Ahead::open`]; [`Error::TryAgain`] if no page-locked memory can be had at all.
    pub fn open(gpu: &Gpu, plan: RingPlan, process: Process) -> Result<Self> {
        let chunk = plan.layout.chunk_bytes as usize;
        let ahead = Ahead::open(plan, process)?;
        let (base, bytes) = ahead.ring.segment().payload_area();
        let started = Instant::now();
        // SAFETY: the range is mapped as long as `ahead`'s segment lives, which goes after the source (order of fields). A part is copied only
        // while its slot is leased to us, and given back after the copy's event.
        let source = unsafe { HostSource::new(gpu.context(), base.cast_const(), bytes, chunk, Locking::Allowed) }?;
        tracing::info!("ring of {} MiB {} in {:.2} s", bytes >> 20, source.describe(), started.elapsed().as_secs_f64());
        let inner = Inner {
            copying: VecDeque::new(),
            source,
            ahead,
            idle: Vec::new(),
            context: gpu.context().clone(),
            stats: RingStats::default(),
        };
        Ok(Self { inner: Rc::new(RefCell::new(inner)) })
    }

    /// What the ring cost so far; `copy_seconds` is the device's time in copies that are done.
    #[must_use]
    pub fn stats(&self) -> RingStats {
        let inner = self.inner.borrow();
        let (slots_in_use, slots_free) = inner.ahead.ring.slots();
        RingStats { slots_in_use, slots_free, ..inner.stats }
    }

    /// Says that no more blocks will be asked for.
    pub fn finish(&self) {
        self.inner.borrow_mut().ahead.finish();
    }
}

impl Inner {
    /// Gives back what has been copied, and goes on as far as possible.
    fn poll(&mut self) -> Result<()> {
        while let Some(front) = self.copying.front() {
            if !front.end.done()? {
                break;
            }
            let Some(Copying { leased, start, end }) = self.copying.pop_front() else { break };
            self.stats.copy_seconds += f64::from(end.since_ms(&start)?) / 1e3;
            self.idle.extend([start, end]);
            self.ahead.release(&leased)?;
        }
        self.ahead.pump()
    }

    fn event(&mut self) -> Result<Event> {
        self.idle.pop().map_or_else(|| Event::timed(&self.context), Ok)
    }

    /// Queues the copy of the chunk that is due.
    fn queue(&mut self, gpu: &Gpu, block: BlockId, to: Ptr, done: usize, leased: Leased) -> Result<usize> {
        let (at, bytes) = (self.ahead.place(&leased)?, leased.bytes as usize);
        if leased.content.block != block.0 || at != done {
            return Err(Error::invariant("the ring delivered another chunk than the one that is due")
                .expected(format!("block {} from byte {done}", block.0))
                .found(format!("block {} from byte {at}", leased.content.block)));
        }
        let (start, end) = (self.event()?, self.event()?);
        gpu.copy().record(&start)?;
        let slot = leased.slot * self.ahead.plan.layout.chunk_bytes as usize;
        self.source.copy_in(gpu.copy(), to.offset(done), slot, bytes)?;
        gpu.copy().record(&end)?;
        self.copying.push_back(Copying { leased, start, end });
        self.stats.bytes += leased.bytes;
        Ok(bytes)
    }
}

impl Supply for RingSupply {
    fn announce(&mut self, loads: &[BlockId]) -> Result<()> {
        self.inner.borrow_mut().ahead.announce(loads)
    }

    fn copy(&mut self, gpu: &Gpu, block: BlockId, to: Ptr, done: usize, wait: bool) -> Result<usize> {
        let inner = &mut *self.inner.borrow_mut();
        if inner.ahead.compared.is_empty() {
            inner.poll()?;
        }
        if let Some(leased) = inner.ahead.ready()? {
            inner.stats.hits += 1;
            return inner.queue(gpu, block, to, done, leased);
        }
        if !wait {
            return Ok(0);
        }
        let started = Instant::now();
        inner.stats.misses += 1;
        loop {
            inner.poll()?;
            if let Some(leased) = inner.ahead.ready()? {
                inner.stats.stall_seconds += started.elapsed().as_secs_f64();
                return inner.queue(gpu, block, to, done, leased);
            }
            inner.ahead.wait(!inner.copying.is_empty())?;
        }
    }

    fn poll(&mut self) -> Result<()> {
        self.inner.borrow_mut().poll()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Copies still read what the loader may write once we have left.
        let _ = self.context.sync();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use serenity_protocol::config::PayloadForm;
    use serenity_protocol::geometry::TransformerGeometry;
    use serenity_protocol::message::Role;
    use serenity_protocol::ring::producer::{Action, Job, Producer};
    use serenity_protocol::ring::segment::Segment;
    use serenity_protocol::ring::words::{consumer, loader};
    use serenity_protocol::slab::Slab;
    use std::path::Path;
    use std::sync::atomic::{AtomicBool, Ordering};

    const CHUNK: u64 = 4096;

    fn plan(test: &str, slots: usize) -> RingPlan {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/goldens");
        let (slab, manifest) =
            (root.join("cases/squareq/flux2tiny_int8.safetensors"), root.join("cases/squareq/flux2tiny_int8.manifest.json"));
        let geometry = TransformerGeometry::from_config_file(&root.join("model/transformer/config.json")).unwrap();
        let name = format!("serenity-test-{}-{test}-{slots}", std::process::id());
        RingPlan::with(name, &Slab::open(&slab, &manifest).unwrap(), &geometry, PayloadForm::Int8, slots, CHUNK).unwrap()
    }

    fn byte(block: u16, at: usize) -> u8 {
        (at * 31 + usize::from(block) * 7 + at / 251) as u8
    }

    /// Fills slots with [`byte`]s until told to stop; the payload of `damaged` does not have its checksum.
    fn load(plan: &RingPlan, damaged: Option<(u16, u16)>, stop: &AtomicBool) {
        let segment = Segment::open_or_create(&plan.spec).unwrap();
        let mut ring = Producer::attach(segment.clone(), segment.shape(), plan.catalogue().unwrap()).unwrap();
        // Relaxed: only ends the loop.
        while !stop.load(Ordering::Relaxed) {
            let ticket = segment.ticket(loader::WAKE);
            match ring.next_action().unwrap() {
                Action::Fill(job) => {
                    let (bytes, sum) = fill(plan, &segment, job);
                    let wrong = damaged == Some((job.content.block, job.content.chunk));
                    ring.publish(job, bytes, sum ^ u64::from(wrong)).unwrap();
                }
                Action::Verify(job, sum) => {
                    let (bytes, found) = fill(plan, &segment, job);
                    assert_eq!(found, sum);
                    ring.publish(job, bytes, sum).unwrap();
                }
                Action::Wait => segment.wait(loader::WAKE, ticket),
                _ => {}
            }
            (0..segment.shape().consumers).for_each(|c| segment.wake(segment.shape().at(c, consumer::WAKE)));
        }
        segment.leave();
    }

    fn fill(plan: &RingPlan, segment: &Segment, job: Job) -> (u64, u64) {
        let (block, chunk) = (BlockId(job.content.block), u32::from(job.content.chunk));
        let range = plan.layout.block(block).unwrap().chunk_range(chunk, CHUNK);
        // SAFETY: the producer gave this slot to this thread to fill.
        let slot = unsafe { segment.slot_filling(job.slot) };
        let payload = &mut slot[..(range.end - range.start) as usize];
        payload.iter_mut().enumerate().for_each(|(i, b)| *b = byte(block.0, range.start as usize + i));
        (range.end - range.start, plan.layout.payload_checksum(block, chunk, payload).unwrap())
    }

    /// Takes all chunks of `visits`, holding up to `hold` of them as copies under way would.
    fn consume(plan: &RingPlan, visits: &[BlockId], hold: usize) -> Result<usize> {
        let mut ahead = Ahead::open(plan.clone(), Process::detached(Role::Trainer))?;
        ahead.announce(visits)?;
        let (mut open, mut taken) = (VecDeque::new(), 0);
        for block in visits {
            let mut done = 0;
            while done < plan.layout.block(*block)?.bytes as usize {
                ahead.pump()?;
                let Some(leased) = ahead.ready()? else {
                    match open.pop_front() {
                        Some(oldest) => ahead.release(&oldest)?,
                        None => ahead.wait(false)?,
                    }
                    continue;
                };
                assert_eq!((leased.content.block, ahead.place(&leased)?), (block.0, done));
                let payload = ahead.ring().payload(&leased)?;
                assert!(payload.iter().enumerate().all(|(i, b)| *b == byte(block.0, done + i)), "wrong bytes in block {}", block.0);
                done += leased.bytes as usize;
                taken += 1;
                open.push_back(leased);
                if open.len() > hold {
                    open.pop_front().map_or(Ok(()), |oldest| ahead.release(&oldest))?;
                }
            }
        }
        ahead.finish();
        Ok(taken)
    }

    fn with_loader<T>(plan: &RingPlan, damaged: Option<(u16, u16)>, work: impl FnOnce() -> T) -> T {
        struct Stop<'s>(&'s AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                // Relaxed: see `load`. In drop, so that a failed assertion does not leave the loader running.
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| load(plan, damaged, &stop));
            let _stop = Stop(&stop);
            work()
        })
    }

    #[test]
    fn every_chunk_comes_in_order_whatever_the_ring_holds() {
        for slots in [1, 2, 3, 17] {
            let plan = plan("order", slots);
            let blocks: Vec<BlockId> = plan.layout.blocks.iter().map(|b| b.block).collect();
            let visits: Vec<BlockId> = blocks.iter().chain(blocks.iter().rev()).copied().collect();
            let expected: u32 = visits.iter().map(|b| plan.layout.chunks_of(*b)).sum();
            for hold in [0, 1, 5] {
                let taken = with_loader(&plan, None, || consume(&plan, &visits, hold)).unwrap();
                assert_eq!(taken as u32, expected, "{slots} slots, {hold} held");
            }
        }
    }

    #[test]
    fn two_consumers_get_every_chunk_whatever_their_parts_are() {
        for slots in [2, 3, 9] {
            let plans = [0, 1].map(|consumer| {
                let mut plan = plan("two", slots);
                (plan.spec.consumers, plan.consumer) = (2, consumer);
                plan
            });
            let blocks: Vec<BlockId> = plans[0].layout.blocks.iter().map(|b| b.block).collect();
            let visits: Vec<BlockId> = blocks.iter().chain(blocks.iter().rev()).copied().collect();
            let expected: u32 = visits.iter().map(|b| plans[0].layout.chunks_of(*b)).sum();
            let taken = with_loader(&plans[0], None, || {
                std::thread::scope(|scope| {
                    let other = scope.spawn(|| consume(&plans[1], &visits, 5).unwrap());
                    [consume(&plans[0], &visits, 1).unwrap(), other.join().unwrap()]
                })
            });
            assert_eq!(taken.map(|t| t as u32), [expected; 2], "{slots} slots");
        }
    }

    #[test]
    fn a_damaged_chunk_is_never_handed_out() {
        let plan = plan("damaged", 4);
        let visits = [BlockId(0), BlockId(1)];
        assert!(plan.layout.chunks_of(BlockId(1)) > 1, "the test needs a second chunk");
        let error = with_loader(&plan, Some((1, 1)), || consume(&plan, &visits, 2)).unwrap_err();
        assert_eq!(error.exit_code(), 70, "{error}");
        assert!(error.to_string().contains("block 1 chunk 1"), "{error}");
    }
}
