//! Payloads from the ring: chunks are leased in order, copied to the device from where they lie, compared there with their checksums, and
//! given back when the event behind that has passed.
//!
//! [`Intake`] is the host's half and knows no device: announcing, leasing, judging. [`RingSupply`] adds the copies. The ring's memory is
//! registered with the driver at attach ([`HostSource`]: whole, by slot, or through a bounce buffer), so in steady state nothing but a chunk
//! that has not arrived holds the host up.
//!
//! What is compared is what the device has: the pieces' hashes are computed there, behind the copy, on a stream of their own, so a bit that
//! flips in the ring, on the bus or in device memory is seen, and the host reads no payload. A block's products begin behind that. The
//! host hears the verdict when it polls, at the latest at the end of a pass ([`Supply::poll`]): a damaged payload ends the run with exit 70
//! before a loss, a gradient or an update that saw it is used.
//!
//! At most one lease less than this consumer's part of the slots is held (one of a part of one), so that the loader always has a slot to
//! fill. A loader that dies leaves us waiting for its successor; what we have leased stays ours.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serenity_cuda::driver::{Context, Pinned, Stream};
use serenity_cuda::host::Locking;
use serenity_cuda::ops::checksum::Pieces;
use serenity_cuda::{Event, Gpu, HostSource, Ptr};
use serenity_protocol::geometry::BlockId;
use serenity_protocol::process::Process;
use serenity_protocol::ring::consumer::Leased;
use serenity_protocol::ring::plan::RingPlan;
use serenity_protocol::slab::pieces::combine;
use serenity_protocol::{Error, Result};

use crate::cuda::blocks::Supply;
use crate::ring_client::RingClient;
use crate::ring_source::RingStats;

/// Pause between two looks at copies that are under way, while the host has nothing else to do.
const LOOK: Duration = Duration::from_micros(50);

/// The host's half: what is announced, leased and judged.
pub struct Intake {
    ring: RingClient,
    process: Process,
    /// Leased while waiting, not yet taken.
    arrived: Option<Leased>,
    /// Leases held, taken ones included.
    held: usize,
    held_max: usize,
}

impl Intake {
    /// Waits for the ring of `plan`, and takes the consumer's role in it.
    ///
    /// # Errors
    /// As [`RingClient::open`].
    pub fn open(plan: RingPlan, process: Process) -> Result<Self> {
        let ring = RingClient::open(plan, process.clone())?;
        let held_max = ring.segment().shape().quota().saturating_sub(1).max(1);
        Ok(Self { ring, process, arrived: None, held: 0, held_max })
    }

    /// Announces loads to come.
    ///
    /// # Errors
    /// The ring's.
    pub fn announce(&mut self, loads: &[BlockId]) -> Result<()> {
        self.ring.request(&loads.iter().map(|b| b.0).collect::<Vec<_>>())?;
        self.tick()
    }

    /// Shows that the process lives.
    ///
    /// # Errors
    /// [`Error::TryAgain`] if it is asked to stop.
    pub fn tick(&mut self) -> Result<()> {
        if self.process.stop_requested() {
            return Err(self.process.interrupted());
        }
        self.process.tick();
        Ok(())
    }

    /// Takes the chunk that is due, if it has arrived and another lease may be held. It must be given back with [`Self::give_back`].
    ///
    /// # Errors
    /// The ring's.
    pub fn take(&mut self) -> Result<Option<Leased>> {
        if let Some(leased) = self.arrived.take() {
            return Ok(Some(leased));
        }
        if self.held >= self.held_max || self.ring.awaited() == 0 {
            return Ok(None);
        }
        let leased = self.ring.poll()?;
        self.held += usize::from(leased.is_some());
        Ok(leased)
    }

    /// Gives a chunk back that was copied, whose pieces have these hashes where they went.
    ///
    /// # Errors
    /// [`Error::Invariant`] if they are not those that it was published with; the ring's.
    pub fn give_back(&mut self, leased: &Leased, hashes: &[u64]) -> Result<()> {
        self.held = self.held.saturating_sub(1);
        if combine(hashes) == leased.checksum {
            return self.ring.release(leased);
        }
        // Marks it, and says so, if the ring's own bytes are damaged.
        self.ring.verify(leased)?;
        let (block, chunk) = (leased.content.block, leased.content.chunk);
        Err(Error::invariant(format!("block {block} chunk {chunk} reached the device with another checksum than it has in the ring"))
            .expected(format!("{:016x}", leased.checksum))
            .found(format!("{:016x}", combine(hashes)))
            .advice("nothing of this step was used; go on from the last checkpoint, and check the graphics card and its slot if it happens again"))
    }

    /// Waits a little for what the last [`Self::take`] did not find. `busy`: copies are under way whose end should be noticed.
    ///
    /// # Errors
    /// As [`RingClient::wait`].
    pub fn wait(&mut self, busy: bool) -> Result<()> {
        if busy || self.arrived.is_some() {
            std::thread::sleep(LOOK);
            return Ok(());
        }
        if self.ring.awaited() == 0 {
            return Err(Error::invariant("a chunk was awaited that was never announced"));
        }
        let _span = tracing::trace_span!("slot wait").entered();
        self.arrived = self.ring.wait(Duration::MAX)?;
        self.held += usize::from(self.arrived.is_some());
        Ok(())
    }

    /// Where the payload of a chunk lies in its block's.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the chunk has not the length that the layout gives it.
    pub fn place(&self, leased: &Leased) -> Result<usize> {
        let all = &self.ring.plan().layout;
        let layout = all.block(BlockId(leased.content.block))?;
        let range = layout.chunk_range(u32::from(leased.content.chunk), all.chunk_bytes);
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

/// The pieces of every chunk, where the device reads them, and room for their hashes.
struct Checks {
    list: Pinned,
    /// By block, then by chunk.
    pieces: Vec<Vec<Pieces>>,
    /// As many words for each slot of the ring as a chunk has pieces at most: a slot is leased once at a time.
    hashes: Pinned,
    most: usize,
}

impl Checks {
    fn new(context: &Arc<Context>, plan: &RingPlan, slots: usize) -> Result<Self> {
        let (mut words, mut pieces, mut most) = (Vec::<u64>::new(), Vec::new(), 0);
        for block in &plan.layout.blocks {
            let mut chunks = Vec::new();
            for chunk in 0..plan.layout.chunks_of(block.block) {
                let of_chunk = plan.layout.pieces(block.block, chunk)?;
                chunks.push(Pieces { first: words.len() / 2, count: of_chunk.len() });
                most = most.max(of_chunk.len());
                words.extend(of_chunk.iter().flat_map(|p| [p.at.start as u64, p.at.len() as u64]));
            }
            pieces.push(chunks);
        }
        let mut list = Pinned::new(context, size_of_val(words.as_slice()))?;
        list.write_after(&Event::new(context)?, 0, bytemuck::cast_slice(&words))?;
        Ok(Self { list, pieces, hashes: Pinned::new(context, 8 * most * slots)?, most })
    }

    fn of(&self, leased: &Leased) -> Result<Pieces> {
        let chunks = self.pieces.get(usize::from(leased.content.block));
        let pieces = chunks.and_then(|c| c.get(usize::from(leased.content.chunk))).copied();
        pieces.ok_or_else(|| Error::invariant("the ring delivered a chunk that the model does not have"))
    }

    /// Queues the comparison of a chunk that lies at `payload` on the device.
    fn queue(&self, gpu: &Gpu, leased: &Leased, payload: Ptr) -> Result<()> {
        gpu.xxh3_pieces(payload, &self.list, self.of(leased)?, &self.hashes, leased.slot * self.most)
    }

    /// The hashes that were computed before `checked`.
    fn read(&self, leased: &Leased, checked: &Event) -> Result<Vec<u64>> {
        let mut hashes = vec![0u64; self.of(leased)?.count];
        self.hashes.read_after(checked, 8 * leased.slot * self.most, bytemuck::cast_slice_mut(&mut hashes))?;
        Ok(hashes)
    }
}

/// A copy under way.
struct Copying {
    leased: Leased,
    start: Event,
    end: Event,
    /// Behind the comparison.
    checked: Event,
}

struct Inner {
    // In the order in which they must go: the lease of memory, its registration, the mapping.
    copying: VecDeque<Copying>,
    source: HostSource,
    checks: Checks,
    intake: Intake,
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
    /// As [`Intake::open`]; [`Error::TryAgain`] if no page-locked memory can be had at all.
    pub fn open(gpu: &Gpu, plan: RingPlan, process: Process) -> Result<Self> {
        let chunk = plan.layout.chunk_bytes as usize;
        let intake = Intake::open(plan, process)?;
        let segment = intake.ring.segment();
        let checks = Checks::new(gpu.context(), intake.ring.plan(), segment.shape().slots)?;
        let (base, bytes) = segment.payload_area();
        let started = Instant::now();
        // SAFETY: the range is mapped as long as `intake`'s segment lives, which goes after the source (order of fields). A part is copied only
        // while its slot is leased to us, and given back after the copy's event.
        let source = unsafe { HostSource::new(gpu.context(), base.cast_const(), bytes, chunk, Locking::Allowed) }?;
        tracing::info!("ring of {} MiB {} in {:.2} s", bytes >> 20, source.describe(), started.elapsed().as_secs_f64());
        let inner = Inner {
            copying: VecDeque::new(),
            source,
            checks,
            intake,
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
        let (slots_in_use, slots_free) = inner.intake.ring.slots();
        RingStats { slots_in_use, slots_free, ..inner.stats }
    }

    /// Says that no more blocks will be asked for.
    pub fn finish(&self) {
        self.inner.borrow_mut().intake.finish();
    }
}

impl Inner {
    /// Gives back what has been copied and compared.
    fn poll(&mut self) -> Result<()> {
        while let Some(front) = self.copying.front() {
            if !front.checked.done()? {
                break;
            }
            let Some(Copying { leased, start, end, checked }) = self.copying.pop_front() else { break };
            let hashes = self.checks.read(&leased, &checked)?;
            self.stats.copy_seconds += f64::from(end.since_ms(&start)?) / 1e3;
            self.idle.extend([start, end, checked]);
            self.intake.give_back(&leased, &hashes)?;
        }
        self.intake.tick()
    }

    fn event(&mut self) -> Result<Event> {
        self.idle.pop().map_or_else(|| Event::timed(&self.context), Ok)
    }

    /// Queues copy and comparison of the chunk that is due.
    fn queue(&mut self, gpu: &Gpu, block: BlockId, to: Ptr, done: usize, leased: Leased) -> Result<usize> {
        let (at, bytes) = (self.intake.place(&leased)?, leased.bytes as usize);
        if leased.content.block != block.0 || at != done {
            return Err(Error::invariant("the ring delivered another chunk than the one that is due")
                .expected(format!("block {} from byte {done}", block.0))
                .found(format!("block {} from byte {at}", leased.content.block)));
        }
        let (start, end, checked) = (self.event()?, self.event()?, self.event()?);
        gpu.copy().record(&start)?;
        let slot = leased.slot * self.intake.ring.plan().layout.chunk_bytes as usize;
        self.source.copy_in(gpu.copy(), to.offset(done), slot, bytes)?;
        gpu.copy().record(&end)?;
        gpu.check().wait(&end)?;
        self.checks.queue(gpu, &leased, to.offset(done))?;
        gpu.check().record(&checked)?;
        self.copying.push_back(Copying { leased, start, end, checked });
        self.stats.bytes += leased.bytes;
        Ok(bytes)
    }
}

impl Supply for RingSupply {
    fn announce(&mut self, loads: &[BlockId]) -> Result<()> {
        self.inner.borrow_mut().intake.announce(loads)
    }

    fn copy(&mut self, gpu: &Gpu, block: BlockId, to: Ptr, done: usize, wait: bool) -> Result<usize> {
        let inner = &mut *self.inner.borrow_mut();
        inner.poll()?;
        if let Some(leased) = inner.intake.take()? {
            inner.stats.hits += 1;
            return inner.queue(gpu, block, to, done, leased);
        }
        if !wait {
            return Ok(0);
        }
        let started = Instant::now();
        inner.stats.misses += 1;
        loop {
            inner.intake.wait(!inner.copying.is_empty())?;
            inner.poll()?;
            if let Some(leased) = inner.intake.take()? {
                inner.stats.stall_seconds += started.elapsed().as_secs_f64();
                return inner.queue(gpu, block, to, done, leased);
            }
        }
    }

    fn behind<'g>(&self, gpu: &'g Gpu) -> &'g Stream {
        gpu.check()
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
    use serenity_protocol::checksum::xxh3_64;
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
        let mut intake = Intake::open(plan.clone(), Process::detached(Role::Trainer))?;
        intake.announce(visits)?;
        let hashes = |intake: &Intake, leased: &Leased| -> Result<Vec<u64>> {
            let pieces = plan.layout.pieces(BlockId(leased.content.block), u32::from(leased.content.chunk))?;
            let payload = intake.ring().payload(leased)?;
            Ok(pieces.into_iter().map(|p| xxh3_64(&payload[p.at])).collect())
        };
        let (mut open, mut taken) = (VecDeque::<(Leased, Vec<u64>)>::new(), 0);
        for block in visits {
            let mut done = 0;
            while done < plan.layout.block(*block)?.bytes as usize {
                intake.tick()?;
                let Some(leased) = intake.take()? else {
                    match open.pop_front() {
                        Some((oldest, hashes)) => intake.give_back(&oldest, &hashes)?,
                        None => intake.wait(false)?,
                    }
                    continue;
                };
                assert_eq!((leased.content.block, intake.place(&leased)?), (block.0, done));
                let of_chunk = hashes(&intake, &leased)?;
                let payload = intake.ring().payload(&leased)?;
                assert!(payload.iter().enumerate().all(|(i, b)| *b == byte(block.0, done + i)), "wrong bytes in block {}", block.0);
                done += leased.bytes as usize;
                taken += 1;
                open.push_back((leased, of_chunk));
                if open.len() > hold {
                    open.pop_front().map_or(Ok(()), |(oldest, hashes)| intake.give_back(&oldest, &hashes))?;
                }
            }
        }
        open.iter().try_for_each(|(leased, hashes)| intake.give_back(leased, hashes))?;
        intake.finish();
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
    fn a_damaged_chunk_ends_the_run() {
        let plan = plan("damaged", 4);
        let visits = [BlockId(0), BlockId(1)];
        assert!(plan.layout.chunks_of(BlockId(1)) > 1, "the test needs a second chunk");
        let error = with_loader(&plan, Some((1, 1)), || consume(&plan, &visits, 2)).unwrap_err();
        assert_eq!(error.exit_code(), 70, "{error}");
        assert!(error.to_string().contains("block 1 chunk 1"), "{error}");
    }

    #[test]
    fn a_chunk_that_changed_on_its_way_to_the_device_ends_the_run() {
        let plan = plan("transfer", 4);
        let error = with_loader(&plan, None, || -> Result<()> {
            let mut intake = Intake::open(plan.clone(), Process::detached(Role::Trainer))?;
            intake.announce(&[BlockId(0)])?;
            let leased = loop {
                match intake.take()? {
                    Some(leased) => break leased,
                    None => intake.wait(false)?,
                }
            };
            intake.give_back(&leased, &[1, 2, 3])
        });
        let error = error.unwrap_err();
        assert_eq!(error.exit_code(), 70, "{error}");
        assert!(error.to_string().contains("reached the device"), "{error}");
    }
}
