//! A pass of captions through the layers on a device: packs, where their states are, and what is queued for each layer.
//!
//! The host queues copies of a layer's pieces as they are read, and the layer's work behind them; it is two layers ahead of the device at most,
//! because there are two places for layers. Kept states go to their places in page-locked memory on a stream of their own, or through the pass's
//! store where states do not stay on the device.

use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use half::bf16;
use serenity_cuda::driver::{Pinned, Priority};
use serenity_cuda::ops::text::Captions;
use serenity_cuda::{Arena, Event, Mat, Ptr, Stream, Ty};
use serenity_protocol::{Error, Result};

use super::{CudaTextEncoder, Layer, PACK_ROWS, Plan, Space};
use crate::tensor::{failed, upload_as};
use crate::text::encode::{Embedding, EncodeTimes, Hidden, Task, packs};
use crate::text::hidden::{HiddenStore, bytes_of};
use crate::text::stream::{Buffer, Filled, Jobs};
use crate::text::weights::LayerPlaces;
use crate::tokenizer::Tokens;

/// Kept hidden states of at most so many bytes leave the device without being waited for.
const LOCKED_MAX: usize = 4 << 30;

/// A pack: which captions, their rows, where its rows are on the device.
struct Pack {
    captions: Range<usize>,
    lengths: Vec<usize>,
    /// Rows, the pad's included.
    rows: usize,
    pad: bool,
    state: Mat,
    positions: Ptr,
    placed: Captions,
}

/// Where kept states go.
enum Kept {
    /// Page-locked memory with the three kept states of every row side by side; the stream that fills it, and what it is behind.
    Locked { memory: Pinned, stream: Stream, event: Event },
    /// The pass's store.
    Store,
}

/// Slot of a pack's running state; 0 to 2 are the kept ones.
const RUNNING: usize = 3;

pub(super) struct Pass<'a> {
    encoder: &'a CudaTextEncoder,
    task: &'a Task,
    arena: &'a Arena,
    plan: Plan,
    space: Space,
    packs: Vec<Pack>,
    store: HiddenStore,
    kept: Kept,
    pad: [Option<Tensor>; 3],
    rows: usize,
}
impl<'a> Pass<'a> {
    pub fn new(
        encoder: &'a CudaTextEncoder,
        task: &'a Task,
        arena: &'a Arena,
        plan: Plan,
        captions: &[Tokens],
        pad_id: u32,
    ) -> Result<Self> {
        let store = match &task.hidden {
            Hidden::Memory => HiddenStore::memory(),
            Hidden::File(folder) => HiddenStore::file(folder)?,
        };
        let space = Space::new(encoder, arena, plan.rows, task.max_length)?;
        let rows: usize = captions.iter().map(|c| c.ids.len()).sum::<usize>() + 1;
        let kept_bytes = 3 * rows * encoder.geometry.hidden * encoder.ty.bytes();
        let locked = matches!(task.hidden, Hidden::Memory) && plan.resident && kept_bytes <= LOCKED_MAX;
        let context = encoder.gpu.context();
        let kept = if locked {
            let (stream, event) = (Stream::new(context, Priority::Copies)?, Event::new(context)?);
            Kept::Locked { memory: Pinned::new(context, kept_bytes)?, stream, event }
        } else {
            Kept::Store
        };
        let mut this = Self { encoder, task, arena, plan, space, packs: Vec::new(), store, kept, pad: [None, None, None], rows };
        this.embed(captions, pad_id)?;
        Ok(this)
    }

    /// Packs the captions and gives every pack its embeddings.
    fn embed(&mut self, captions: &[Tokens], pad_id: u32) -> Result<()> {
        let (e, g) = (self.encoder, &self.encoder.geometry);
        let number = self.rows.div_ceil(PACK_ROWS.min(self.plan.rows)).max(1);
        let most = self.rows.div_ceil(number).min(self.plan.rows.saturating_sub(1)).max(1);
        // The plan's rows hold a pack that its last caption has made longer than the others, and the pad.
        let shared = if self.plan.resident { None } else { Some(self.arena.mat(e.ty, self.plan.rows, g.hidden)?) };
        for (index, of) in packs(captions, most).into_iter().enumerate() {
            let tokens = captions.get(of.captions.clone()).unwrap_or_default();
            let pad = index == 0;
            let mut ids: Vec<u32> = tokens.iter().flat_map(|c| c.ids.iter().copied()).collect();
            let mut positions = Vec::with_capacity(ids.len() + 1);
            let (mut placed, mut end) = (Vec::new(), 0);
            for n in of.lengths.iter().copied() {
                let offset = self.task.max_length.checked_sub(n);
                let offset = offset.ok_or_else(|| Error::invariant("a caption is longer than max_length").found(n))?;
                positions.extend((offset..offset + n).map(|p| p as u32));
                placed.push((end, n));
                end += n;
            }
            if pad {
                ids.push(pad_id);
                positions.push(0);
            }
            let rows = ids.len();
            if rows > self.plan.rows {
                return Err(Error::invariant("a pack is longer than planned").expected(self.plan.rows).found(rows));
            }
            let embedded = e.weights.embedded(&ids, e.ty)?;
            let state = match shared {
                Some(all) => all.rows(0, rows)?,
                None => self.arena.mat(e.ty, rows, g.hidden)?,
            };
            e.gpu.upload(state.ptr, &embedded)?;
            let at = self.arena.reserve(4 * rows)?;
            e.gpu.upload(at, &positions.iter().flat_map(|p: &u32| p.to_le_bytes()).collect::<Vec<u8>>())?;
            let placed = Captions::new(&e.gpu, self.arena, &placed)?;
            self.packs.push(Pack { captions: of.captions, lengths: of.lengths, rows, pad, state, positions: at, placed });
            if shared.is_some() {
                self.put_away(index)?;
            }
        }
        Ok(())
    }

    /// Moves a pack's running state to the store, where states do not stay on the device.
    fn put_away(&mut self, index: usize) -> Result<()> {
        let Some(pack) = self.packs.get(index) else { return Ok(()) };
        let state = download(self.encoder, pack.state)?;
        self.store.put((index, RUNNING), &state)
    }

    fn take_up(&mut self, index: usize) -> Result<()> {
        let Some(pack) = self.packs.get(index) else { return Ok(()) };
        let state = self.store.take((index, RUNNING), &Device::Cpu)?;
        self.encoder.gpu.upload(pack.state.ptr, &bytes_of(&state)?)
    }

    /// All layers, each as soon as it is there.
    #[allow(clippy::too_many_arguments)] // the two ends of the readers' channels, and who hears of it
    pub fn layers(
        &mut self,
        places: &[LayerPlaces],
        jobs: &Jobs,
        arriving: &Receiver<Result<Filled>>,
        free: &Sender<Buffer>,
        captions: usize,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
        times: &mut EncodeTimes,
    ) -> Result<()> {
        let (e, gpu) = (self.encoder, &self.encoder.gpu);
        let base = [self.arena.reserve(self.plan.layer)?, self.arena.reserve(self.plan.layer)?];
        let context = gpu.context();
        let ready = [Event::new(context)?, Event::new(context)?];
        let used = [Event::new(context)?, Event::new(context)?];
        let mut spans = Vec::new();
        let mut queued = vec![0usize; places.len()];
        let mut early: Vec<Filled> = Vec::new();
        for (layer, place) in places.iter().enumerate() {
            let _span = tracing::trace_span!("encode layer", layer, captions).entered();
            let started = Instant::now();
            self.bring(layer, (jobs, arriving, free), (&base, &used), &mut early, &mut queued, times)?;
            times.wait += started.elapsed();
            let (Some(base), Some(ready), Some(used)) = (base.get(layer % 2), ready.get(layer % 2), used.get(layer % 2)) else { continue };
            gpu.copy().record(ready)?;
            gpu.compute().wait(ready)?;
            let (begin, end) = (Event::timed(context)?, Event::timed(context)?);
            gpu.compute().record(&begin)?;
            let weights = e.layer(place, *base);
            for index in 0..self.packs.len() {
                self.pack_layer(index, &weights)?;
            }
            gpu.compute().record(&end)?;
            gpu.compute().record(used)?;
            spans.push((begin, end));
            self.keep(layer + 1)?;
            times.weight_params += e.geometry.layer_params() as u64;
            times.flops += 2.0 * e.geometry.layer_params() as f64 * (self.rows - 1) as f64;
            progress(((layer + 1) * captions) as u64, (places.len() * captions) as u64)?;
        }
        gpu.sync()?;
        for (begin, end) in spans {
            times.compute += Duration::from_secs_f32(end.since_ms(&begin)? / 1e3);
        }
        times.device_bytes = Some(gpu.memory()?.used_by_process_estimate);
        times.weight_bytes = jobs.file_bytes();
        Ok(())
    }

    /// Queues copies of pieces until all of `layer` are; those of the layer after it as they come, later ones wait in `early`.
    fn bring(
        &self,
        layer: usize,
        (jobs, arriving, free): (&Jobs, &Receiver<Result<Filled>>, &Sender<Buffer>),
        (base, used): (&[Ptr; 2], &[Event; 2]),
        early: &mut Vec<Filled>,
        queued: &mut [usize],
        times: &mut EncodeTimes,
    ) -> Result<()> {
        let gpu = &self.encoder.gpu;
        let all = jobs.of(layer);
        let mut now: Vec<Filled> = std::mem::take(early);
        while queued.get(layer).is_some_and(|n| *n < all) || !now.is_empty() {
            let piece = match now.pop() {
                Some(piece) => piece,
                None => arriving.recv().map_err(|_| Error::invariant("the layer readers ended early"))??,
            };
            // The place of the layer after this one is that of the layer before, whose work is queued.
            if piece.layer > layer + 1 {
                early.push(piece);
                continue;
            }
            let of = piece.layer % 2;
            let (Some(to), Some(used)) = (base.get(of), used.get(of)) else { continue };
            gpu.copy().wait(used)?;
            gpu.copy().copy_in(to.offset(piece.to), &piece.buffer.memory, 0, piece.bytes)?;
            gpu.copy().record(&piece.buffer.used)?;
            times.read += piece.time;
            if let Some(n) = queued.get_mut(piece.layer) {
                *n += 1;
            }
            // Readers that have nothing more to do are gone.
            let _ = free.send(piece.buffer);
        }
        Ok(())
    }

    fn pack_layer(&mut self, index: usize, w: &Layer) -> Result<()> {
        if !self.plan.resident {
            self.take_up(index)?;
        }
        let Some(pack) = self.packs.get(index) else { return Ok(()) };
        let (e, g, gpu) = (self.encoder, &self.encoder.geometry, &self.encoder.gpu);
        let (h, rows, eps) = (pack.state, pack.rows, g.rms_eps as f32);
        let of = |mat: Mat| mat.rows(0, rows);
        let (normed, packed, attended, gate_up) =
            (of(self.space.normed)?, of(self.space.packed)?, of(self.space.attended)?, of(self.space.gate_up)?);
        gpu.rms_norm(normed, h, w.attention_norm, eps)?;
        gpu.gemm_nt(packed, normed, w.packed, 1.0, 0.0)?;
        gpu.rotate_halves(packed, g.heads + g.kv_heads, pack.positions, self.space.cos, self.space.sin)?;
        gpu.caption_attention(attended, packed, e.heads, pack.placed)?;
        if pack.pad {
            // A pad is a fully masked query: nothing is added to its state here.
            let row = attended.rows(rows - 1, 1)?;
            gpu.zero(row.ptr, row.span())?;
        }
        gpu.gemm_nt(h, attended, w.output, 1.0, 1.0)?;
        gpu.rms_norm(normed, h, w.mlp_norm, eps)?;
        gpu.gemm_nt(gate_up, normed, w.gate_up, 1.0, 0.0)?;
        let (gate, up) = (gate_up.columns(0, g.intermediate)?, gate_up.columns(g.intermediate, g.intermediate)?);
        gpu.swiglu(gate, gate, up)?;
        gpu.gemm_nt(h, gate, w.down, 1.0, 1.0)?;
        if !self.plan.resident {
            self.put_away(index)?;
        }
        Ok(())
    }

    /// Keeps state number `index` if it is one of those asked for.
    pub fn keep(&mut self, index: usize) -> Result<()> {
        let (e, gpu) = (self.encoder, &self.encoder.gpu);
        for slot in (0..3).filter(|s| self.task.states.get(*s) == Some(&index)) {
            let mut first = 0;
            for number in 0..self.packs.len() {
                let Some(pack) = self.packs.get(number) else { break };
                if let Kept::Locked { memory, stream, event } = &self.kept {
                    gpu.compute().record(event)?;
                    stream.wait(event)?;
                    // By multiprocessors, which write every row to its place.
                    let (d, width) = (e.geometry.hidden, 3 * e.geometry.hidden);
                    let at = memory.device_ptr().offset((first * width + slot * d) * e.ty.bytes());
                    gpu.cast_on(stream, Mat { stride: width, ..Mat::new(at, e.ty, pack.rows, d) }, pack.state)?;
                    first += pack.rows;
                    continue;
                }
                let state = if self.plan.resident { download(e, pack.state)? } else { self.store.take((number, RUNNING), &Device::Cpu)? };
                if !self.plan.resident {
                    self.store.put((number, RUNNING), &state)?;
                }
                self.store_kept(number, slot, &state)?;
            }
            if let Kept::Locked { stream, event, .. } = &self.kept {
                // The next layer changes the states in place.
                stream.record(event)?;
                gpu.compute().wait(event)?;
            }
        }
        Ok(())
    }

    /// Puts the captions' rows of a pack's state into the store, and the pad's aside.
    fn store_kept(&mut self, number: usize, slot: usize, state: &Tensor) -> Result<()> {
        let Some(pack) = self.packs.get(number) else { return Ok(()) };
        let rows = pack.rows - usize::from(pack.pad);
        let cut = |first: usize, rows: usize| state.narrow(0, first, rows).and_then(|t| t.to_dtype(self.task.keep)?.force_contiguous());
        if pack.pad
            && let Some(place) = self.pad.get_mut(slot)
        {
            *place = Some(cut(rows, 1).map_err(failed("keeping a hidden state"))?);
        }
        self.store.put((number, slot), &cut(0, rows).map_err(failed("keeping a hidden state"))?)
    }

    /// Hands every caption's embedding from page-locked memory to `sink`.
    fn finish_locked(&self, memory: &Pinned, sink: &mut dyn FnMut(usize, Embedding, &Embedding) -> Result<()>) -> Result<()> {
        let (e, width) = (self.encoder, 3 * self.encoder.geometry.hidden);
        let row = width * e.ty.bytes();
        let take = |first: usize, rows: usize| -> Result<Embedding> {
            // Straight into what the tensor will own: this is the only copy.
            let made = match e.ty {
                Ty::Bf16 => {
                    let mut values = vec![bf16::ZERO; rows * width];
                    memory.read(first * row, bytemuck::cast_slice_mut(&mut values))?;
                    Tensor::from_vec(values, (rows, width), &Device::Cpu)
                }
                Ty::F32 => {
                    let mut values = vec![0f32; rows * width];
                    memory.read(first * row, bytemuck::cast_slice_mut(&mut values))?;
                    Tensor::from_vec(values, (rows, width), &Device::Cpu)
                }
            };
            let rows = made.and_then(|t| t.to_dtype(self.task.keep)).map_err(failed("taking an embedding"))?;
            Ok(Embedding { rows })
        };
        // The pad is the last row of the first pack.
        let pad = take(self.packs.first().map_or(0, |p| p.rows.saturating_sub(1)), 1)?;
        let mut start = 0;
        for pack in &self.packs {
            let mut first = start;
            for (caption, rows) in pack.captions.clone().zip(pack.lengths.iter().copied()) {
                sink(caption, take(first, rows)?, &pad)?;
                first += rows;
            }
            start += pack.rows;
        }
        Ok(())
    }

    /// Hands every caption's embedding to `sink`.
    pub fn finish(mut self, sink: &mut dyn FnMut(usize, Embedding, &Embedding) -> Result<()>) -> Result<()> {
        if let Kept::Locked { memory, .. } = &self.kept {
            return self.finish_locked(memory, sink);
        }
        let join = |parts: &[Tensor]| match parts {
            [_, _, _] => Tensor::cat(parts, 1).map(|rows| Embedding { rows }).map_err(failed("joining hidden states")),
            _ => Err(Error::invariant("a hidden state was not kept")),
        };
        let pad = join(&self.pad.iter().flatten().cloned().collect::<Vec<_>>())?;
        for (number, pack) in self.packs.iter().enumerate() {
            let kept = (0..3).map(|slot| self.store.take((number, slot), &Device::Cpu)).collect::<Result<Vec<_>>>()?;
            let mut first = 0;
            for (caption, rows) in pack.captions.clone().zip(pack.lengths.iter().copied()) {
                let parts: candle_core::Result<Vec<Tensor>> = kept.iter().map(|t| t.narrow(0, first, rows)).collect();
                sink(caption, join(&parts.map_err(failed("unpacking an embedding"))?)?, &pad)?;
                first += rows;
            }
        }
        Ok(())
    }
}

/// A state as a tensor on the host.
fn download(e: &CudaTextEncoder, mat: Mat) -> Result<Tensor> {
    let mut raw = vec![0u8; mat.span()];
    e.gpu.download(&mut raw, mat.ptr)?;
    upload_as(&raw, e.dtype(), &[mat.rows, mat.cols], &Device::Cpu, e.dtype())
}
