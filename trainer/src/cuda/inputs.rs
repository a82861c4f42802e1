//! What waits between the forward and the backward pass on the host: inputs of the blocks, and activations that are not to be computed again.
//!
//! Hidden state number `i` is the input of block `i`; the last is the output of the last block. The first `turning` states take turns in a few
//! matrices of the device: state `i` in number `i % count`. Each is saved to page-locked memory while the next block computes, and fetched
//! again in the backward pass when the visit that used its matrix is over, `count` - 1 visits before it is needed. The states that hold their
//! matrices at the turn of the passes are neither saved nor fetched. The other states stay. Activations of blocks that travel do the same:
//! the j-th of those blocks has set `j % count` of the matrices, and is "state" j here.
//!
//! Saving and fetching have a stream each, beside that of the blocks: both directions of the bus work at once. A fetch is made by
//! multiprocessors, for a copy engine would do it behind the blocks' copies that it has been given already. Streams meet in events only; the host never waits.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::fmt;

use serenity_cuda::arena::ALIGNMENT;
use serenity_cuda::driver::{Pinned, Priority};
use serenity_cuda::{Event, Gpu, Mat, Stream};
use serenity_protocol::{Error, Result};

use super::plan::{Reserve, Shape};

/// How many states take turns in how many matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turns {
    /// States, from the first on.
    pub turning: usize,
    /// Matrices for them; at least two if there is any state.
    pub count: usize,
}

impl Turns {
    /// Every state has its own matrix.
    #[must_use]
    pub fn none() -> Self {
        Self { turning: 0, count: 0 }
    }

    /// The first `turning` states in `count` matrices.
    #[must_use]
    pub fn new(turning: usize, count: usize) -> Self {
        let count = count.max(2).min(turning);
        // With as many matrices as states nothing takes turns.
        if turning <= count { Self::none() } else { Self { turning, count } }
    }

    /// The same, with as few matrices as are asked for, be it one, and none that stay.
    #[must_use]
    pub fn through(turning: usize, count: usize) -> Self {
        Self { turning, count: count.clamp(1, turning.max(1)).min(turning) }
    }

    /// States that are saved to the host.
    #[must_use]
    pub fn saved(&self) -> usize {
        self.turning - self.count
    }
}

impl fmt::Display for Turns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.saved() {
            0 => f.write_str("block inputs on the device"),
            saved => write!(f, "{saved} block inputs on the host"),
        }
    }
}

/// The states of one micro-batch.
#[derive(Debug, Clone)]
pub struct States {
    turns: Turns,
    /// Those that take turns, then those that stay.
    mats: Vec<Mat>,
}

impl States {
    /// Reserves `count` states `[B T, D]`.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn new(r: &dyn Reserve, s: &Shape, count: usize, turns: Turns) -> Result<Self> {
        let mats = turns.count + count.saturating_sub(turns.turning);
        Ok(Self { turns, mats: (0..mats).map(|_| r.mat(s.ty, s.rows(), s.inner)).collect::<Result<_>>()? })
    }

    /// The matrix of a state.
    ///
    /// # Errors
    /// [`Error::Invariant`] if there is no such state.
    pub fn get(&self, state: usize) -> Result<Mat> {
        let Turns { turning, count } = self.turns;
        let index = if state < turning { state % count.max(1) } else { state - turning + count };
        self.mats.get(index).copied().ok_or_else(|| Error::invariant(format!("there is no hidden state {state}")))
    }
}

/// Bytes that a state made of these matrices takes on the host.
#[must_use]
pub fn moved_bytes(mats: &[Mat]) -> usize {
    mats.iter().map(|mat| mat.span().next_multiple_of(ALIGNMENT)).sum()
}

/// Of the matrices that states take turns in.
#[derive(Debug)]
struct Turn {
    /// On the compute stream: its state is written, or was used for the last time.
    computed: Event,
    /// Behind the last copy from or to the host.
    moved: Event,
}

/// The way to the host and back, for all micro-batches of a step.
#[derive(Debug)]
pub struct Traffic {
    save: Stream,
    fetch: Stream,
    saved: Event,
    fetched: Event,
    memory: Option<Pinned>,
    turns: Turns,
    /// For each micro-batch of the step: where its states lie in the memory, and its matrices.
    flights: Vec<(usize, Vec<Turn>)>,
    /// Micro-batches of the present step, and the memory that they have.
    used: (usize, usize),
    /// The first state that the backward pass needs.
    first: usize,
    fetched_bytes: Cell<u64>,
}

impl Traffic {
    /// Takes `host` bytes of page-locked memory, if any.
    ///
    /// # Errors
    /// [`Error::TryAgain`] if the host has not that much; the driver's.
    pub fn new(gpu: &Gpu, turns: Turns, host: usize) -> Result<Self> {
        let context = gpu.context();
        Ok(Self {
            save: Stream::new(context, Priority::Copies)?,
            fetch: Stream::new(context, Priority::Copies)?,
            saved: Event::new(context)?,
            fetched: Event::new(context)?,
            memory: if host > 0 { Some(Pinned::new(context, host)?) } else { None },
            turns,
            flights: Vec::new(),
            used: (0, 0),
            first: 0,
            fetched_bytes: Cell::new(0),
        })
    }

    /// Begins a step: nothing that an earlier one, perhaps abandoned, has queued can meet it. `first` is the first state that the backward
    /// pass will need.
    ///
    /// # Errors
    /// The driver's.
    pub fn begin(&mut self, gpu: &Gpu, first: usize) -> Result<()> {
        self.save.record(&self.saved)?;
        self.fetch.record(&self.fetched)?;
        gpu.compute().wait(&self.saved)?;
        gpu.compute().wait(&self.fetched)?;
        // The host's memory is written again only behind the last fetch from it.
        self.save.wait(&self.fetched)?;
        (self.used, self.first) = ((0, 0), first);
        Ok(())
    }

    /// A place for the next micro-batch of the step, whose states have so many bytes ([`moved_bytes`]) each; its number.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the plan did not foresee it.
    pub fn join(&mut self, gpu: &Gpu, state_bytes: usize) -> Result<usize> {
        let (index, offset) = self.used;
        let end = offset + self.turns.saved() * state_bytes;
        if end > self.memory.as_ref().map_or(0, Pinned::bytes) {
            return Err(Error::invariant("the host memory planned for block inputs is too small"));
        }
        if index == self.flights.len() {
            let turn = || Ok(Turn { computed: Event::new(gpu.context())?, moved: Event::new(gpu.context())? });
            self.flights.push((offset, (0..self.turns.count).map(|_| turn()).collect::<Result<_>>()?));
        }
        if let Some(flight) = self.flights.get_mut(index) {
            flight.0 = offset;
        }
        self.used = (index + 1, end);
        Ok(index)
    }

    fn turn(&self, flight: usize, state: usize) -> Result<(usize, &Turn)> {
        let missing = || Error::invariant(format!("there is no turn for hidden state {state} of micro-batch {flight}"));
        let (offset, turns) = self.flights.get(flight).ok_or_else(missing)?;
        Ok((*offset, turns.get(state % self.turns.count.max(1)).ok_or_else(missing)?))
    }

    /// The compute stream may write a state from here on.
    ///
    /// # Errors
    /// The driver's.
    pub fn before_write(&self, gpu: &Gpu, flight: usize, state: usize) -> Result<()> {
        // The state before it in its matrix must have been saved.
        if state < self.turns.count || state >= self.turns.turning {
            return Ok(());
        }
        gpu.compute().wait(&self.turn(flight, state)?.1.moved)
    }

    /// A state, made of dense matrices, has been written: saves it if they will be written again.
    ///
    /// # Errors
    /// The driver's.
    pub fn written(&self, gpu: &Gpu, flight: usize, state: usize, mats: &[Mat]) -> Result<()> {
        if state >= self.turns.saved() || state < self.first {
            return Ok(());
        }
        let (offset, turn) = self.turn(flight, state)?;
        let memory = self.memory.as_ref().ok_or_else(|| Error::invariant("there is no host memory for block inputs"))?;
        gpu.compute().record(&turn.computed)?;
        self.save.wait(&turn.computed)?;
        let mut at = offset + state * moved_bytes(mats);
        for mat in mats {
            self.save.copy_out(memory, at, mat.ptr, mat.span())?;
            at += mat.span().next_multiple_of(ALIGNMENT);
        }
        self.save.record(&turn.moved)
    }

    /// All states have been written: fetches come behind all saves.
    ///
    /// # Errors
    /// The driver's.
    pub fn turn_around(&self) -> Result<()> {
        self.save.record(&self.saved)?;
        self.fetch.wait(&self.saved)
    }

    /// The compute stream may read a state in the backward pass from here on.
    ///
    /// # Errors
    /// The driver's.
    pub fn before_read(&self, gpu: &Gpu, flight: usize, state: usize) -> Result<()> {
        if state >= self.turns.saved() {
            return Ok(());
        }
        gpu.compute().wait(&self.turn(flight, state)?.1.moved)
    }

    /// The backward pass is done with a state: fetches the one that had its matrices before.
    ///
    /// # Errors
    /// The driver's.
    pub fn read(&self, gpu: &Gpu, flight: usize, state: usize, mats: &[Mat]) -> Result<()> {
        let Some(next) = state.checked_sub(self.turns.count).filter(|next| *next >= self.first && state < self.turns.turning) else {
            return Ok(());
        };
        let (offset, turn) = self.turn(flight, state)?;
        let memory = self.memory.as_ref().ok_or_else(|| Error::invariant("there is no host memory for block inputs"))?;
        gpu.compute().record(&turn.computed)?;
        self.fetch.wait(&turn.computed)?;
        let mut at = offset + next * moved_bytes(mats);
        for mat in mats {
            gpu.fetch_host(&self.fetch, mat.ptr, memory, at, mat.span())?;
            self.fetched_bytes.set(self.fetched_bytes.get() + mat.span() as u64);
            at += mat.span().next_multiple_of(ALIGNMENT);
        }
        self.fetch.record(&turn.moved)
    }

    /// Bytes that came back from the host since the start.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.fetched_bytes.get()
    }
}
