//! The trainer's end of the ring: opens the segment, posts requests, leases chunks in order, gives them back.
//!
//! What every way of using the ring shares, whether a chunk is copied out at once ([`crate::ring_source`]) or stays leased until a copy to
//! the device has passed: any number of chunks may be held, and they are given back in any order. Waits are on futexes and last at most
//! 100 ms, so that a stop, a dead loader and the launcher's watch are never missed.
//!
//! Invariant: payload bytes can be reached only through a lease that is still held, so nobody reads a slot that is being filled. Failure:
//! a loader that dies leaves us waiting for its successor; a payload that is not what its descriptor says is an invariant error (exit 70)
//! before a weight of it is used.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serenity_protocol::geometry::BlockId;
use serenity_protocol::process::Process;
use serenity_protocol::ring::consumer::{Consumer, Leased};
use serenity_protocol::ring::plan::RingPlan;
use serenity_protocol::ring::segment::{RingRole, Segment};
use serenity_protocol::ring::words::{consumer, loader};
use serenity_protocol::{Error, Result};

/// How long a trainer started by hand waits for a loader; under a launcher it waits until it is told to stop.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a ring of another shape may stand in the place of ours while a new loader replaces it.
const REPLACEMENT: Duration = Duration::from_secs(5);

/// A consumer of the ring, attached.
pub struct RingClient {
    segment: Segment,
    ring: Consumer<Segment>,
    plan: RingPlan,
    process: Process,
    /// Requested, not yet posted.
    backlog: VecDeque<u16>,
    /// Chunks requested and not yet leased.
    awaited: u64,
    held: Vec<Leased>,
    /// Since when no loader has been seen.
    orphaned: Option<Instant>,
}

impl RingClient {
    /// Waits for the ring of `plan`, and takes the role of its consumer.
    ///
    /// # Errors
    /// [`Error::Absent`] if no loader comes (without a launcher) or another trainer has the role, [`Error::Data`] if the ring there is of
    /// another slab, [`Error::TryAgain`] if a stop is requested meanwhile.
    pub fn open(plan: RingPlan, process: Process) -> Result<Self> {
        let start = Instant::now();
        let segment = loop {
            match Segment::open_as(&plan.spec, plan.consumer) {
                Ok(Some(segment)) => break segment,
                Ok(None) => {}
                // A loader may be about to replace what an earlier run left there.
                Err(error @ Error::Data(_)) if start.elapsed() > REPLACEMENT => return Err(error),
                Err(Error::Data(_)) => {}
                Err(error) => return Err(error),
            }
            if process.stop_requested() {
                return Err(process.interrupted());
            }
            if !process.has_launcher() && start.elapsed() > PATIENCE {
                return Err(Error::absent("no loader has opened the ring")
                    .at(plan.spec.path())
                    .advice("start serenity-loader with the same configuration, or run everything with serenity-launch"));
            }
            process.tick();
            std::thread::sleep(Duration::from_millis(20));
        };
        segment.sign(RingRole::Consumer(plan.consumer));
        let ring = Consumer::attach_as(segment.clone(), segment.shape(), plan.catalogue()?, plan.consumer)?;
        segment.wake(loader::WAKE);
        Ok(Self { segment, ring, plan, process, backlog: VecDeque::new(), awaited: 0, held: Vec::new(), orphaned: None })
    }

    /// What travels in the ring.
    #[must_use]
    pub fn plan(&self) -> &RingPlan {
        &self.plan
    }

    /// The mapped memory (to register its payload area with a device, say).
    #[must_use]
    pub fn segment(&self) -> &Segment {
        &self.segment
    }

    /// Asks for blocks, in order, after those asked for before. What does not fit into the ring's queue is posted as room appears.
    ///
    /// # Errors
    /// [`Error::Invariant`] for a block that the model does not have, [`Error::Absent`] if another trainer has taken over.
    pub fn request(&mut self, blocks: &[u16]) -> Result<()> {
        for block in blocks {
            self.awaited += u64::from(self.plan.layout.chunks_of(BlockId(*block)));
        }
        self.backlog.extend(blocks);
        self.post()
    }

    /// Chunks that have been requested and not been leased.
    #[must_use]
    pub fn awaited(&self) -> u64 {
        self.awaited
    }

    fn post(&mut self) -> Result<()> {
        if self.backlog.is_empty() {
            return Ok(());
        }
        let posted = self.ring.post(self.backlog.make_contiguous())?;
        if posted > 0 {
            self.backlog.drain(..posted);
            self.segment.wake(loader::WAKE);
        }
        Ok(())
    }

    /// The next chunk in order, if it is there. Does not block.
    ///
    /// # Errors
    /// [`Error::Invariant`] if nothing is requested, [`Error::Absent`] if another trainer has taken over.
    pub fn poll(&mut self) -> Result<Option<Leased>> {
        self.post()?;
        let leased = self.ring.try_lease()?;
        if let Some(leased) = leased {
            self.awaited = self.awaited.saturating_sub(1);
            self.orphaned = None;
            self.held.push(leased);
        }
        Ok(leased)
    }

    /// The next chunk in order, waited for at most `limit`. `None`: not there yet, or woken for something else; ask again.
    ///
    /// # Errors
    /// As [`Self::poll`]; [`Error::TryAgain`] if a stop is requested; without a launcher [`Error::Absent`] if the loader is gone for a minute.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<Leased>> {
        // Taken before the look: a chunk that arrives in between ends the sleep at once.
        let wake = self.segment.shape().at(self.plan.consumer, consumer::WAKE);
        let ticket = self.segment.ticket(wake);
        if let Some(leased) = self.poll()? {
            return Ok(Some(leased));
        }
        if self.process.stop_requested() {
            return Err(self.process.interrupted());
        }
        self.process.tick();
        self.segment.wait_at_most(wake, ticket, limit);
        if let Some(leased) = self.poll()? {
            return Ok(Some(leased));
        }
        self.look_for_loader()?;
        Ok(None)
    }

    /// The next chunk in order, waited for as long as it takes.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn take(&mut self) -> Result<Leased> {
        loop {
            if let Some(leased) = self.wait(Duration::MAX)? {
                return Ok(leased);
            }
        }
    }

    fn look_for_loader(&mut self) -> Result<()> {
        if self.segment.is_held(RingRole::Loader) {
            self.orphaned = None;
            return Ok(());
        }
        let since = *self.orphaned.get_or_insert_with(|| {
            tracing::warn!("the loader is gone; waiting for another one");
            Instant::now()
        });
        if !self.process.has_launcher() && since.elapsed() > PATIENCE {
            return Err(Error::absent("the loader is gone and no other one came")
                .at(self.plan.spec.path())
                .advice("start serenity-loader with the same configuration: training goes on where it stopped"));
        }
        Ok(())
    }

    /// The bytes of a chunk that is held.
    ///
    /// # Errors
    /// [`Error::Invariant`] if it has been given back.
    pub fn payload(&self, leased: &Leased) -> Result<&[u8]> {
        if !self.held.contains(leased) {
            return Err(Error::invariant("a chunk of the ring was used that is not leased").found(leased.slot));
        }
        // SAFETY: nobody writes a slot that is leased to us, and it is given back only through `release` and `verify`, whose `&mut self`
        // ends the borrow of what is returned here.
        Ok(unsafe { self.segment.slot_payload(leased.slot, leased.bytes) })
    }

    /// Compares a held chunk with the checksum that it was published with. One that differs is given back marked as damaged.
    ///
    /// # Errors
    /// [`Error::Invariant`] (exit 70) if it differs.
    pub fn verify(&mut self, leased: &Leased) -> Result<()> {
        let (block, chunk) = (BlockId(leased.content.block), u32::from(leased.content.chunk));
        if self.plan.layout.payload_checksum(block, chunk, self.payload(leased)?)? == leased.checksum {
            return Ok(());
        }
        self.drop_held(leased);
        self.ring.release_corrupt(leased)?;
        self.segment.wake(loader::WAKE);
        Err(Error::invariant(format!(
            "block {} chunk {} in the ring does not have the checksum that it was published with",
            leased.content.block, leased.content.chunk
        ))
        .at(self.plan.spec.path())
        .advice("nothing of it was used; go on from the last checkpoint, and check this machine's memory if it happens again"))
    }

    /// Gives a chunk back; its bytes must not be read (by a device either) from here on. Any order.
    ///
    /// # Errors
    /// [`Error::Invariant`] if it is not held, [`Error::Absent`] if another trainer has taken over.
    pub fn release(&mut self, leased: &Leased) -> Result<()> {
        if !self.drop_held(leased) {
            return Err(Error::invariant("a chunk of the ring was given back that is not leased").found(leased.slot));
        }
        self.ring.release(leased)?;
        self.segment.wake(loader::WAKE);
        Ok(())
    }

    fn drop_held(&mut self, leased: &Leased) -> bool {
        let place = self.held.iter().position(|h| h == leased);
        place.map(|i| self.held.swap_remove(i)).is_some()
    }

    /// Slots that are READY or LEASED, and the others.
    #[must_use]
    pub fn slots(&self) -> (u32, u32) {
        let shape = self.segment.shape();
        let in_use = shape.occupied(&self.segment);
        (in_use as u32, (shape.slots - in_use) as u32)
    }

    /// Says that no more blocks will be asked for, which lets a loader started by hand end.
    pub fn finish(&mut self) {
        self.ring.finish();
        self.segment.wake(loader::WAKE);
    }
}

impl Drop for RingClient {
    fn drop(&mut self) {
        self.segment.clone().leave();
    }
}
