//! Kept hidden states on their way from the device into embeddings, beside the pass.
//!
//! A state is copied to a second place on the device ([`Leaving::take`]), so that the next layer may change it, and from there through a few page-locked
//! buffers into the embeddings, by a thread, while the next layers run; the next state waits until that has ended. Making the embeddings, and touching
//! their memory once, is that thread's first work: the first state is kept many layers after the pass has begun.

use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;

use candle_core::{DType, Device, Tensor, WithDType};
use half::bf16;
use half::vec::HalfBitsVecExt;
use rayon::prelude::*;
use serenity_cuda::driver::{Context, Priority};
use serenity_cuda::{Event, Gpu, Mat, Ptr, Stream, Ty};
use serenity_protocol::{Error, Result};

use crate::tensor::failed;
use crate::text::encode::Embedding;
use crate::text::feed::Buffer;

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
    stream: Stream,
    /// Behind the copy on the device.
    copied: Event,
    /// A state of all rows.
    state: Ptr,
    rows: usize,
    buffers: Vec<Buffer>,
    /// Of each caption in order, then of the pad: its first row in the state, and its three states side by side.
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

/// Copies the rows `at` of a state, which `from` holds, to `slot` of the embeddings that have any of them; a row has `row` bytes.
fn unload(embeddings: &mut [(usize, Values)], from: &[u8], at: &Range<usize>, row: usize, slot: usize) {
    embeddings.par_iter_mut().for_each(|(first, values)| {
        let places = values.bytes_mut().chunks_exact_mut(row).skip(slot).step_by(3);
        let skipped = at.start.saturating_sub(*first);
        let rows = from.chunks_exact(row).skip(first.saturating_sub(at.start));
        places.skip(skipped).zip(rows).for_each(|(to, from)| to.copy_from_slice(from));
    });
}

impl Bridge {
    /// Brings the state to `slots` of the embeddings, through the buffers in turn.
    fn cross(&mut self, row: usize, slots: &[usize]) -> Result<()> {
        let smallest = self.buffers.iter().map(|b| b.memory.bytes()).min().unwrap_or(0);
        let step = smallest / row.max(1);
        if step == 0 {
            return Err(Error::invariant("a row of a state is longer than a buffer").expected(smallest).found(row));
        }
        let Self { stream, state, rows, buffers, embeddings, .. } = self;
        let part = |number: usize| number * step..((number + 1) * step).min(*rows);
        let send = |number: usize, buffer: &Buffer| -> Result<()> {
            let part = part(number);
            if !part.is_empty() {
                stream.copy_out(&buffer.memory, 0, state.offset(part.start * row), part.len() * row)?;
                stream.record(&buffer.used)?;
            }
            Ok(())
        };
        let count = buffers.len();
        buffers.iter().enumerate().try_for_each(|(number, buffer)| send(number, buffer))?;
        for number in 0..rows.div_ceil(step) {
            let Some(buffer) = buffers.get_mut(number % count.max(1)) else { break };
            let at = part(number);
            let bytes: &[u8] = buffer.memory.bytes_after(&buffer.used)?;
            let bytes = bytes.get(..at.len() * row).unwrap_or_default();
            slots.iter().for_each(|slot| unload(embeddings, bytes, &at, row, *slot));
            send(number + count, buffer)?;
        }
        Ok(())
    }
}

impl Leaving {
    /// Begins to make embeddings of `rows` (each the first row and their number). `state` is device memory for `all` rows of `hidden` features, which
    /// stays until this is dropped; `buffers` are page-locked.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn new(
        context: &Arc<Context>,
        (ty, hidden): (Ty, usize),
        (state, all): (Ptr, usize),
        rows: Vec<(usize, usize)>,
        buffers: Vec<Buffer>,
    ) -> Result<Self> {
        let context = context.clone();
        let turn = spawn(move || {
            let (stream, copied) = (Stream::new(&context, Priority::Copies)?, Event::new(&context)?);
            let embeddings = rows.into_par_iter().map(|(first, n)| (first, Values::new(ty, 3 * n * hidden))).collect();
            Ok(Box::new(Bridge { stream, copied, state, rows: all, buffers, embeddings }))
        })?;
        Ok(Self { turn: Some(turn), width: hidden, ty })
    }

    fn come_back(&mut self) -> Result<Box<Bridge>> {
        let turn = self.turn.take().ok_or_else(|| Error::invariant("kept states were lost"))?;
        turn.join().map_err(|_| Error::invariant("the thread that keeps states panicked"))?
    }

    /// Queues the way of a state to `slots` of the embeddings, behind the compute stream's work; `states` are its rows in order.
    ///
    /// # Errors
    /// Faults of earlier work.
    pub fn take(&mut self, gpu: &Gpu, states: impl Iterator<Item = Mat>, slots: Vec<usize>) -> Result<()> {
        let mut bridge = self.come_back()?;
        let row = self.width * self.ty.bytes();
        let mut first = 0;
        for state in states {
            if (state.stride, state.cols) != (self.width, self.width) || first + state.rows > bridge.rows {
                return Err(Error::invariant("a state is not what was planned").found(state.describe()));
            }
            gpu.compute().copy(bridge.state.offset(first * row), state.ptr, state.rows * row)?;
            first += state.rows;
        }
        gpu.compute().record(&bridge.copied)?;
        bridge.stream.wait(&bridge.copied)?;
        self.turn = Some(spawn(move || bridge.cross(row, &slots).map(|()| bridge))?);
        Ok(())
    }

    /// The embeddings, the pad's last, in type `keep`, and the buffers.
    ///
    /// # Errors
    /// Faults of earlier work.
    pub fn end(mut self, keep: DType) -> Result<(impl DoubleEndedIterator<Item = Result<Embedding>>, Vec<Buffer>)> {
        let width = 3 * self.width;
        let Bridge { buffers, embeddings, .. } = *self.come_back()?;
        Ok((embeddings.into_iter().map(move |(_, values)| values.into_embedding(width, keep)), buffers))
    }
}

impl Drop for Leaving {
    /// A pass that ended early: the device memory goes away, and no thread calls the driver when the process ends.
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn rows_come_to_their_embeddings_whatever_the_buffers_hold() {
        let (row, rows) = (3usize, [(0usize, 4usize), (5, 1), (6, 7), (4, 1)]);
        let all = 13;
        let state: Vec<u8> = (0..all * row).map(|i| i as u8 + 1).collect();
        for step in 1..=all + 1 {
            let mut embeddings: Vec<_> =
                rows.iter().map(|(first, n)| (*first, Values::Bf16(vec![bf16::ZERO; 3 * n * row / 2 + 8]))).collect();
            for (embedding, (_, n)) in embeddings.iter_mut().zip(rows) {
                let Values::Bf16(values) = &mut embedding.1 else { panic!() };
                values.truncate((3 * n * row).div_ceil(2));
            }
            for first in (0..all).step_by(step) {
                let at = first..(first + step).min(all);
                unload(&mut embeddings, &state[at.start * row..at.end * row], &at, row, 1);
            }
            for ((first, mut values), (_, n)) in embeddings.into_iter().zip(rows) {
                let bytes = values.bytes_mut().to_vec();
                for i in 0..n {
                    assert_eq!(
                        bytes[(3 * i + 1) * row..(3 * i + 2) * row],
                        state[(first + i) * row..(first + i + 1) * row],
                        "{step} {first} {i}"
                    );
                    assert!(bytes[3 * i * row..(3 * i + 1) * row].iter().all(|b| *b == 0));
                }
            }
        }
    }
}
