//! A pass of captions through the layers on a device: packs, where their states are, and what is queued for each layer.
//!
//! The readers queue copies of a layer's pieces, the pass queues the layer's work behind them; it is two layers ahead of the device at most,
//! because there are two places for layers. A kept state goes to page-locked memory on a stream of its own and from there into the embeddings while the
//! device is at the next layer, or through the pass's store where states do not stay on the device.

use std::ops::Range;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor, WithDType};
use half::bf16;
use half::vec::HalfBitsVecExt;
use rayon::prelude::*;
use serenity_cuda::driver::{Pinned, Priority};
use serenity_cuda::ops::text::Captions;
use serenity_cuda::{Arena, Event, Mat, Ptr, Stream, Ty};
use serenity_protocol::{Error, Result};

use super::{CudaTextEncoder, Layer, PACK_ROWS, Plan, Space};
use crate::tensor::{failed, upload_as};
use crate::text::encode::{Embedding, EncodeTimes, Hidden, Task, packs};
use crate::text::hidden::{HiddenStore, bytes_of};
use crate::text::stream::Feed;
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
    /// Into the embeddings, through page-locked memory for one state of all rows.
    Locked(Box<Locked>),
    /// The pass's store.
    Store,
}

/// One state of all rows on its way to the host, and what it becomes.
struct Locked {
    memory: Pinned,
    /// Fills it, and the event behind that.
    stream: Stream,
    event: Event,
    /// The state that is in it, if it is in no embedding yet.
    waiting: Option<usize>,
    /// Of each caption in order, then of the pad: its first row in `memory`, and its three states side by side.
    embeddings: Vec<(usize, Values)>,
}

/// Values of an embedding on the host.
enum Values {
    Bf16(Vec<bf16>),
    F32(Vec<f32>),
}

impl Values {
    /// Zeros that take memory when they are written.
    fn new(ty: Ty, count: usize) -> Self {
        match ty {
            Ty::Bf16 => Self::Bf16(vec![0u16; count].reinterpret_into()),
            Ty::F32 => Self::F32(vec![0.0; count]),
        }
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
        let state_bytes = rows * encoder.geometry.hidden * encoder.ty.bytes();
        let locked = matches!(task.hidden, Hidden::Memory) && plan.resident && state_bytes <= LOCKED_MAX;
        let context = encoder.gpu.context();
        let kept = if locked {
            let (stream, event) = (Stream::new(context, Priority::Copies)?, Event::new(context)?);
            Kept::Locked(Box::new(Locked {
                memory: Pinned::new(context, state_bytes)?,
                stream,
                event,
                waiting: None,
                embeddings: Vec::with_capacity(captions.len() + 1),
            }))
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
        let (mut before, mut pad_at) = (0, 0);
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
                if let Kept::Locked(locked) = &mut self.kept {
                    locked.embeddings.push((before + end, Values::new(e.ty, 3 * n * g.hidden)));
                }
                end += n;
            }
            if pad {
                pad_at = before + end;
                ids.push(pad_id);
                positions.push(0);
            }
            let rows = ids.len();
            before += rows;
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
        if let Kept::Locked(locked) = &mut self.kept {
            locked.embeddings.push((pad_at, Values::new(e.ty, 3 * g.hidden)));
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
    pub fn layers(
        &mut self,
        places: &[LayerPlaces],
        feed: &Feed,
        captions: usize,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
        times: &mut EncodeTimes,
    ) -> Result<()> {
        let (e, gpu) = (self.encoder, &self.encoder.gpu);
        let context = gpu.context();
        let mut spans = Vec::new();
        for (layer, place) in places.iter().enumerate() {
            let _span = tracing::trace_span!("encode layer", layer, captions).entered();
            let started = Instant::now();
            let weights = e.layer(place, feed.layer(layer, gpu.compute())?);
            times.wait += started.elapsed();
            let (begin, end) = (Event::timed(context)?, Event::timed(context)?);
            gpu.compute().record(&begin)?;
            for index in 0..self.packs.len() {
                self.pack_layer(index, &weights)?;
            }
            gpu.compute().record(&end)?;
            feed.computed(layer, gpu.compute())?;
            spans.push((begin, end));
            // While the device is busy with this layer.
            self.unload()?;
            self.keep(layer + 1)?;
            times.weight_params += e.geometry.layer_params() as u64;
            times.flops += 2.0 * e.geometry.layer_params() as f64 * (self.rows - 1) as f64;
            progress(((layer + 1) * captions) as u64, (places.len() * captions) as u64)?;
        }
        self.unload()?;
        gpu.sync()?;
        for (begin, end) in spans {
            times.compute += Duration::from_secs_f32(end.since_ms(&begin)? / 1e3);
        }
        times.device_bytes = Some(gpu.memory()?.used_by_process_estimate);
        times.read = feed.read();
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
        gpu.gemm_nt_as(packed, normed, w.packed, 1.0, 0.0, PACK_ROWS)?;
        gpu.rotate_halves(packed, g.heads + g.kv_heads, pack.positions, self.space.cos, self.space.sin)?;
        gpu.caption_attention(attended, packed, e.heads, pack.placed)?;
        if pack.pad {
            // A pad is a fully masked query: nothing is added to its state here.
            let row = attended.rows(rows - 1, 1)?;
            gpu.zero(row.ptr, row.span())?;
        }
        gpu.gemm_nt_as(h, attended, w.output, 1.0, 1.0, PACK_ROWS)?;
        gpu.rms_norm(normed, h, w.mlp_norm, eps)?;
        gpu.gemm_nt_as(gate_up, normed, w.gate_up, 1.0, 0.0, PACK_ROWS)?;
        let (gate, up) = (gate_up.columns(0, g.intermediate)?, gate_up.columns(g.intermediate, g.intermediate)?);
        gpu.swiglu(gate, gate, up)?;
        gpu.gemm_nt_as(h, gate, w.down, 1.0, 1.0, PACK_ROWS)?;
        if !self.plan.resident {
            self.put_away(index)?;
        }
        Ok(())
    }

    /// Keeps state number `index` if it is one of those asked for.
    pub fn keep(&mut self, index: usize) -> Result<()> {
        if !self.task.states.contains(&index) {
            return Ok(());
        }
        self.unload()?;
        let (e, gpu) = (self.encoder, &self.encoder.gpu);
        if let Kept::Locked(locked) = &mut self.kept {
            gpu.compute().record(&locked.event)?;
            locked.stream.wait(&locked.event)?;
            let mut first = 0;
            for pack in &self.packs {
                // By multiprocessors, which need no copy engine.
                let at = locked.memory.device_ptr().offset(first * e.geometry.hidden * e.ty.bytes());
                gpu.cast_on(&locked.stream, Mat::new(at, e.ty, pack.rows, e.geometry.hidden), pack.state)?;
                first += pack.rows;
            }
            // The next layer changes the states in place.
            locked.stream.record(&locked.event)?;
            locked.waiting = Some(index);
            return gpu.compute().wait(&locked.event);
        }
        for slot in (0..3).filter(|s| self.task.states.get(*s) == Some(&index)) {
            for number in 0..self.packs.len() {
                let Some(pack) = self.packs.get(number) else { break };
                let state = if self.plan.resident { download(e, pack.state)? } else { self.store.take((number, RUNNING), &Device::Cpu)? };
                if !self.plan.resident {
                    self.store.put((number, RUNNING), &state)?;
                }
                self.store_kept(number, slot, &state)?;
            }
        }
        Ok(())
    }

    /// Brings the state that waits in page-locked memory into the embeddings, on all processors.
    fn unload(&mut self) -> Result<()> {
        let Kept::Locked(locked) = &mut self.kept else { return Ok(()) };
        let Some(index) = locked.waiting.take() else { return Ok(()) };
        let _span = tracing::trace_span!("unload", state = index).entered();
        let row = self.encoder.geometry.hidden * self.encoder.ty.bytes();
        let state: &[u8] = locked.memory.bytes_after(&locked.event)?;
        for slot in (0..3).filter(|s| self.task.states.get(*s) == Some(&index)) {
            locked.embeddings.par_iter_mut().for_each(|(first, values)| {
                let rows = state.get(*first * row..).unwrap_or_default().chunks_exact(row);
                let places = values.bytes_mut().chunks_exact_mut(row).skip(slot).step_by(3);
                places.zip(rows).for_each(|(to, from)| to.copy_from_slice(from));
            });
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

    /// Hands every caption's embedding to `sink`.
    pub fn finish(mut self, sink: &mut dyn FnMut(usize, Embedding, &Embedding) -> Result<()>) -> Result<()> {
        if let Kept::Locked(locked) = self.kept {
            let width = 3 * self.encoder.geometry.hidden;
            let mut embeddings = locked.embeddings.into_iter().map(|(_, values)| values.into_embedding(width, self.task.keep));
            let pad = embeddings.next_back().ok_or_else(|| Error::invariant("a pass without a pad"))??;
            return embeddings.enumerate().try_for_each(|(caption, embedding)| sink(caption, embedding?, &pad));
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
