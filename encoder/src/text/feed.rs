//! Where the threads that read layers and the pass that computes them meet: the copy stream, two places for layers, and how far both are; and the
//! page-locked buffers that copies go through.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serenity_cuda::driver::{Context, Pinned, Priority};
use serenity_cuda::{Event, Ptr, Stream};
use serenity_protocol::{Error, Result};

/// Bytes of a page-locked buffer, and of a copy to the device.
pub(super) const PIECE_BYTES: usize = 4 << 20;
/// Page-locked buffers of a reader.
const READER_BUFFERS: usize = 2;
/// Page-locked buffers beside the readers': embeddings come to the device through them, and kept states leave it.
pub(super) const STAGING: usize = 4;
/// Layers that have memory on the device at a time.
pub(super) const PLACES: usize = 2;

/// Page-locked memory, and the event behind the last copy from or to it.
pub(super) struct Buffer {
    pub memory: Pinned,
    pub used: Event,
}

impl Buffer {
    fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        Ok(Self { memory: Pinned::new(context, bytes)?, used: Event::sleeping(context)? })
    }
}

/// Page-locked buffers that nobody uses: taking them takes longer than reading a layer, so they stay from pass to pass.
pub(super) struct Buffers {
    free: Mutex<Vec<Buffer>>,
    context: Arc<Context>,
}

impl Buffers {
    /// With [`READER_BUFFERS`] of [`PIECE_BYTES`] for each of so many readers and [`STAGING`] more. Where the host has not so much page-locked
    /// memory, for fewer readers: returns for how many.
    ///
    /// # Errors
    /// [`Error::TryAgain`] without page-locked memory for one.
    pub fn new(context: &Arc<Context>, readers: usize) -> Result<(Self, usize)> {
        let mut free = Vec::new();
        let mut served = readers;
        while free.len() < READER_BUFFERS * readers + STAGING {
            match Buffer::new(context, PIECE_BYTES) {
                Ok(buffer) => free.push(buffer),
                Err(Error::TryAgain(e)) if free.len() >= READER_BUFFERS + STAGING => {
                    served = (free.len() - STAGING) / READER_BUFFERS;
                    tracing::warn!("{served} instead of {readers} threads read weights: {}", Error::TryAgain(e));
                    break;
                }
                Err(e) => return Err(e),
            }
        }
        Ok((Self { free: Mutex::new(free), context: context.clone() }, served))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Buffer>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of at least `bytes`.
    ///
    /// # Errors
    /// [`Error::TryAgain`] if a new one is needed and cannot be had.
    pub fn take(&self, bytes: usize) -> Result<Buffer> {
        let found = {
            let mut free = self.lock();
            free.iter().rposition(|b| b.memory.bytes() >= bytes).map(|at| free.swap_remove(at))
        };
        found.map_or_else(|| Buffer::new(&self.context, bytes.max(PIECE_BYTES)), Ok)
    }

    /// Gives buffers back.
    pub fn put(&self, buffers: impl IntoIterator<Item = Buffer>) {
        self.lock().extend(buffers);
    }
}

/// Where readers and the pass meet: the copy stream, the layers' places, and how far both are.
pub(super) struct Feed {
    state: Mutex<State>,
    /// A layer is complete, a place is free, or the end.
    changed: Condvar,
    places: [Ptr; PLACES],
}

struct State {
    copies: Stream,
    ready: Event,
    /// Behind the last use of each place.
    used: [Event; PLACES],
    /// Pieces of each layer whose copies are not queued yet.
    missing: Vec<usize>,
    /// Layers whose work is queued: the place of each is free for the one after the next.
    computed: usize,
    /// Threads reading, added up.
    read: Duration,
    failed: Option<Error>,
    ended: bool,
}

/// Ends the readers when the pass does, however it does.
pub(super) struct Ending<'f>(pub &'f Feed);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

/// Tells the pass of a reader that panicked: it would wait for its pieces for ever.
pub(super) struct Watch<'f>(&'f Feed);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(Error::invariant("a layer reader panicked"));
        }
    }
}

impl Feed {
    /// For layers of so many pieces, with these places for them.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(context: &Arc<Context>, missing: Vec<usize>, places: [Ptr; PLACES]) -> Result<Self> {
        let state = State {
            copies: Stream::new(context, Priority::Copies)?,
            ready: Event::new(context)?,
            used: [Event::new(context)?, Event::new(context)?],
            missing,
            computed: 0,
            read: Duration::ZERO,
            failed: None,
            ended: false,
        };
        Ok(Self { state: Mutex::new(state), changed: Condvar::new(), places })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements that can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn until<'s>(&self, state: MutexGuard<'s, State>, waits: impl Fn(&State) -> bool) -> MutexGuard<'s, State> {
        self.changed.wait_while(state, |s| !s.ended && s.failed.is_none() && waits(s)).unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues the copy of a piece, which took `read` to read, once its layer has a place; whether there is any use in going on.
    ///
    /// # Errors
    /// The driver's.
    pub fn copy(&self, (layer, to): (usize, usize), bytes: usize, buffer: &Buffer, read: Duration) -> Result<bool> {
        let mut state = self.until(self.lock(), |s| layer >= s.computed + PLACES);
        if state.ended || state.failed.is_some() {
            return Ok(false);
        }
        if let (Some(place), Some(used)) = (self.places.get(layer % PLACES), state.used.get(layer % PLACES)) {
            state.copies.wait(used)?;
            state.copies.copy_in(place.offset(to), &buffer.memory, 0, bytes)?;
            state.copies.record(&buffer.used)?;
        }
        state.read += read;
        if let Some(n) = state.missing.get_mut(layer) {
            *n -= 1;
            if *n == 0 {
                self.changed.notify_all();
            }
        }
        Ok(true)
    }

    /// Waits until all copies of `layer` are queued and makes `compute` wait for them; where the layer is.
    ///
    /// # Errors
    /// What a reader met.
    pub fn layer(&self, layer: usize, compute: &Stream) -> Result<Ptr> {
        let mut state = self.until(self.lock(), |s| s.missing.get(layer).is_some_and(|n| *n > 0));
        if let Some(e) = state.failed.take() {
            state.ended = true;
            return Err(e);
        }
        state.copies.record(&state.ready)?;
        compute.wait(&state.ready)?;
        self.places.get(layer % PLACES).copied().ok_or_else(|| Error::invariant("a layer has no place"))
    }

    /// The work of `layer` is queued on `compute`: behind it its place is free.
    ///
    /// # Errors
    /// The driver's.
    pub fn computed(&self, layer: usize, compute: &Stream) -> Result<()> {
        let mut state = self.lock();
        if let Some(used) = state.used.get(layer % PLACES) {
            compute.record(used)?;
        }
        state.computed = layer + 1;
        self.changed.notify_all();
        Ok(())
    }

    /// A reader has met this: the first is what the pass ends with.
    pub fn fail(&self, e: Error) {
        self.lock().failed.get_or_insert(e);
        self.changed.notify_all();
    }

    /// What a reader holds as long as it reads.
    pub fn watch(&self) -> Watch<'_> {
        Watch(self)
    }

    /// What reading took so far, all threads added up.
    pub fn read(&self) -> Duration {
        self.lock().read
    }
}
