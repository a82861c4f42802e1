//! Kept hidden states on their way from the device into embeddings, beside the pass.
//!
//! There is page-locked memory for one state of all rows. The device writes a state into it ([`Leaving::take`]), a thread copies it from there into the
//! embeddings while the next layers run, and the next state waits until that has ended. Taking the memory, and touching all of it once, is that
//! thread's first work: the first state is kept many layers after the pass has begun. Giving page-locked memory back is no work of the pass either.

use std::sync::Arc;
use std::thread::JoinHandle;

use candle_core::{DType, Device, Tensor, WithDType};
use half::bf16;
use half::vec::HalfBitsVecExt;
use rayon::prelude::*;
use serenity_cuda::driver::{Context, Pinned, Priority};
use serenity_cuda::{Event, Gpu, Mat, Stream, Ty};
use serenity_protocol::{Error, Result};

use crate::tensor::failed;
use crate::text::encode::Embedding;

/// Bytes of a page of host memory, at least.
const PAGE: usize = 4096;

/// Embeddings that are being filled.
pub(super) struct Leaving {
    turn: Option<JoinHandle<Result<Box<Bridge>>>>,
    width: usize,
    ty: Ty,
}

/// What the thread and the pass hand to each other.
struct Bridge {
    memory: Pinned,
    /// Fills it.
    stream: Stream,
    /// Between this stream and that of the layers.
    between: Event,
    /// Behind the last write to `memory`; the thread sleeps on it.
    filled: Event,
    /// Of each caption in order, then of the pad: its first row in `memory`, and its three states side by side.
    embeddings: Vec<(usize, Values)>,
}

/// Values of an embedding on the host.
enum Values {
    Bf16(Vec<bf16>),
    F32(Vec<f32>),
}

impl Values {
    /// Zeros whose memory is there already.
    fn new(ty: Ty, count: usize) -> Self {
        let mut values = match ty {
            Ty::Bf16 => Self::Bf16(vec![0u16; count].reinterpret_into()),
            Ty::F32 => Self::F32(vec![0.0; count]),
        };
        for page in values.bytes_mut().chunks_mut(PAGE).filter_map(<[u8]>::first_mut) {
            *std::hint::black_box(page) = 0;
        }
        values
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Bf16(values) => bytemuck::cast_slice_mut(values),
            Self::F32(values) => bytemuck::cast_slice_mut(values),
        }
    }

    /// The embedding of rows of `width`; nothing is copied if it is of type `keep`.
    fn into_embedding(self, width: usize, keep: DType) -> Result<Embedding> {
        let made = match self {
            Self::Bf16(values) => matrix(values, width),
            Self::F32(values) => matrix(values, width),
        };
        Ok(Embedding { rows: made.and_then(|t| t.to_dtype(keep)).map_err(failed("taking an embedding"))? })
    }
}

fn matrix<T: WithDType>(values: Vec<T>, width: usize) -> candle_core::Result<Tensor> {
    let rows = values.len() / width.max(1);
    Tensor::from_vec(values, (rows, width), &Device::Cpu)
}

impl Bridge {
    /// Copies the state that is in `memory` to `slots` of the embeddings.
    fn unload(&mut self, row: usize, slots: &[usize]) -> Result<()> {
        let state: &[u8] = self.memory.bytes_after(&self.filled)?;
        for slot in slots {
            self.embeddings.par_iter_mut().for_each(|(first, values)| {
                let rows = state.get(*first * row..).unwrap_or_default().chunks_exact(row);
                let places = values.bytes_mut().chunks_exact_mut(row).skip(*slot).step_by(3);
                places.zip(rows).for_each(|(to, from)| to.copy_from_slice(from));
            });
        }
        Ok(())
    }
}

impl Leaving {
    /// Begins to take the memory for embeddings of `rows` (each the first row and their number), of `all` rows and `hidden` features.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn new(context: &Arc<Context>, ty: Ty, hidden: usize, all: usize, rows: Vec<(usize, usize)>) -> Result<Self> {
        let context = context.clone();
        let turn = spawn(move || {
            let (memory, stream) = (Pinned::new(&context, all * hidden * ty.bytes())?, Stream::new(&context, Priority::Copies)?);
            let (between, filled) = (Event::new(&context)?, Event::sleeping(&context)?);
            let embeddings = rows.into_iter().map(|(first, n)| (first, Values::new(ty, 3 * n * hidden))).collect();
            Ok(Box::new(Bridge { memory, stream, between, filled, embeddings }))
        })?;
        Ok(Self { turn: Some(turn), width: hidden, ty })
    }

    fn come_back(&mut self) -> Result<Box<Bridge>> {
        let turn = self.turn.take().ok_or_else(|| Error::invariant("kept states were lost"))?;
        turn.join().map_err(|_| Error::invariant("the thread that keeps states panicked"))?
    }

    /// Queues the way of a state to `slots` of the embeddings, behind the compute stream's work; `states` are its rows in order. What changes them next
    /// on that stream waits.
    ///
    /// # Errors
    /// [`Error::TryAgain`] without page-locked memory; faults of earlier work.
    pub fn take(&mut self, gpu: &Gpu, states: impl Iterator<Item = Mat>, slots: Vec<usize>) -> Result<()> {
        let mut bridge = self.come_back()?;
        let row = self.width * self.ty.bytes();
        gpu.compute().record(&bridge.between)?;
        bridge.stream.wait(&bridge.between)?;
        let mut first = 0;
        for state in states {
            if (state.stride, state.cols) != (self.width, self.width) {
                return Err(Error::invariant("a state is not dense").found(state.describe()));
            }
            bridge.stream.copy_out(&bridge.memory, first * row, state.ptr, state.rows * row)?;
            first += state.rows;
        }
        bridge.stream.record(&bridge.between)?;
        bridge.stream.record(&bridge.filled)?;
        gpu.compute().wait(&bridge.between)?;
        self.turn = Some(spawn(move || bridge.unload(row, &slots).map(|()| bridge))?);
        Ok(())
    }

    /// The embeddings, the pad's last, in type `keep`; `release` gets the page-locked memory.
    ///
    /// # Errors
    /// Faults of earlier work.
    pub fn end(
        mut self,
        keep: DType,
        release: impl FnOnce(Pinned),
    ) -> Result<impl DoubleEndedIterator<Item = Result<Embedding>> + ExactSizeIterator> {
        let width = 3 * self.width;
        let Bridge { memory, embeddings, .. } = *self.come_back()?;
        release(memory);
        Ok(embeddings.into_iter().map(move |(_, values)| values.into_embedding(width, keep)))
    }
}

impl Drop for Leaving {
    /// A pass that ended early: no thread calls the driver when the process ends.
    fn drop(&mut self) {
        if let Some(turn) = self.turn.take() {
            let _ = turn.join();
        }
    }
}

fn spawn(work: impl FnOnce() -> Result<Box<Bridge>> + Send + 'static) -> Result<JoinHandle<Result<Box<Bridge>>>> {
    let thread = std::thread::Builder::new().name("kept states".into());
    thread.spawn(work).map_err(|e| Error::absent("cannot start a thread").cause(e))
}
