//! A pass of captions through the layers on a device: packs, where their states are, and what is queued for each layer.
//!
//! The readers queue copies of a layer's pieces, the pass queues the layer's work behind them; it is two layers ahead of the device at most,
//! because there are two places for layers. Kept states go into the embeddings beside the pass, or into its store where states do not stay on the device.

use std::ops::Range;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use serenity_cuda::arena::ALIGNMENT;
use serenity_cuda::ops::text::Captions;
use serenity_cuda::{Arena, Event, Mat, Ptr};
use serenity_protocol::{Error, Result};

use super::arrival::Arrival;
use super::leaving::Leaving;
use super::{CudaTextEncoder, Layer, PACK_ROWS, Plan, Space};
use crate::tensor::{failed, upload_as};
use crate::text::encode::{Embedding, EncodeTimes, Hidden, Task, packs};
use crate::text::feed::{Buffer, Feed, STAGING};
use crate::text::hidden::{HiddenStore, bytes_of};
use crate::text::weights::LayerPlaces;
use crate::tokenizer::Tokens;

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

impl Pack {
    /// One layer, in place.
    fn visit(&self, e: &CudaTextEncoder, space: &Space, w: &Layer) -> Result<()> {
        let (g, gpu) = (&e.geometry, &e.gpu);
        let (h, rows, eps) = (self.state, self.rows, g.rms_eps as f32);
        let of = |mat: Mat| mat.rows(0, rows);
        let (normed, packed, attended, gate_up) = (of(space.normed)?, of(space.packed)?, of(space.attended)?, of(space.gate_up)?);
        gpu.rms_norm(normed, h, w.attention_norm, eps)?;
        gpu.gemm_nt_of((PACK_ROWS, packed.cols), packed, normed, w.packed, 1.0, 0.0)?;
        gpu.rotate_halves(packed, g.heads + g.kv_heads, self.positions, space.cos, space.sin)?;
        gpu.caption_attention(attended, packed, e.heads, self.placed)?;
        if self.pad {
            // A pad is a fully masked query: nothing is added to its state here.
            let row = attended.rows(rows - 1, 1)?;
            gpu.zero(row.ptr, row.span())?;
        }
        gpu.gemm_nt_of((PACK_ROWS, h.cols), h, attended, w.output, 1.0, 1.0)?;
        gpu.rms_norm(normed, h, w.mlp_norm, eps)?;
        gpu.gemm_nt_of((PACK_ROWS, gate_up.cols), gate_up, normed, w.gate_up, 1.0, 0.0)?;
        let (gate, up) = (gate_up.columns(0, g.intermediate)?, gate_up.columns(g.intermediate, g.intermediate)?);
        gpu.swiglu(gate, gate, up)?;
        gpu.gemm_nt_of((PACK_ROWS, h.cols), h, gate, w.down, 1.0, 1.0)
    }
}

/// Loads what a layer runs on the device, by one row through matrices that nobody has written: libraries load a kernel at its first use, which takes a tenth
/// of a second for all of them. Where the memory allowed has no room for that, they are loaded as they come.
pub(super) fn load_kernels(e: &CudaTextEncoder) -> Result<()> {
    let (g, ty) = (&e.geometry, e.ty);
    let weight = 2 * g.intermediate.max(e.heads.packed()) * g.hidden.max(g.heads * g.head_dim) * ty.bytes();
    let row = (2 * (g.hidden + g.intermediate) + e.heads.packed() + g.heads * g.head_dim + g.head_dim) * ty.bytes();
    let bytes = weight + row + 32 * ALIGNMENT;
    if bytes > e.budget {
        return Ok(());
    }
    let arena = Arena::new(&e.gpu, bytes)?;
    let base = arena.reserve(weight)?;
    let places = LayerPlaces { parts: Vec::new(), query: 0, output: 0, gate: 0, down: 0, attention_norm: 0, mlp_norm: 0, bytes: weight };
    let (space, positions) = (Space::new(e, &arena, 1, 1)?, arena.reserve(4)?);
    e.gpu.upload(positions, &0u32.to_le_bytes())?;
    let (state, placed) = (arena.mat(ty, 1, g.hidden)?, Captions::new(&e.gpu, &arena, &[(0, 1)])?);
    let pack = Pack { captions: 0..1, lengths: vec![1], rows: 1, pad: false, state, positions, placed };
    pack.visit(e, &space, &e.layer(&places, base, None))?;
    e.gpu.sync()
}

/// Where kept states go.
enum Kept {
    /// Into the embeddings, beside the pass.
    Leaving(Leaving),
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
        let (packs, kept, pad) = (Vec::new(), Kept::Store, [None, None, None]);
        let mut this = Self { encoder, task, arena, plan, space, packs, store, kept, pad, rows };
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
        let packs = packs(captions, most);
        let kept_rows = embedding_rows(&packs);
        let row = g.hidden * e.ty.bytes();
        let mut staging = (0..STAGING).map(|_| e.buffers.take(row)).collect::<Result<Vec<_>>>()?;
        for (index, of) in packs.into_iter().enumerate() {
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
            let state = match shared {
                Some(all) => all.rows(0, rows)?,
                None => self.arena.mat(e.ty, rows, g.hidden)?,
            };
            self.bring(&ids, state, &mut staging)?;
            let at = self.arena.reserve(4 * rows)?;
            e.gpu.upload(at, &positions.iter().flat_map(|p: &u32| p.to_le_bytes()).collect::<Vec<u8>>())?;
            let placed = Captions::new(&e.gpu, self.arena, &placed)?;
            self.packs.push(Pack { captions: of.captions, lengths: of.lengths, rows, pad, state, positions: at, placed });
            if shared.is_some() {
                self.put_away(index)?;
            }
        }
        if matches!(self.task.hidden, Hidden::Memory) && self.plan.resident {
            let state = self.arena.mat(e.ty, self.rows, g.hidden)?.ptr;
            self.kept = Kept::Leaving(Leaving::new(e.gpu.context(), (e.ty, g.hidden), (state, self.rows), kept_rows, staging)?);
        } else {
            e.buffers.put(staging);
        }
        Ok(())
    }

    /// Reads the embeddings of `ids` and copies them to `state`, through page-locked buffers in turn.
    fn bring(&self, ids: &[u32], state: Mat, staging: &mut [Buffer]) -> Result<()> {
        let (e, row) = (self.encoder, self.encoder.geometry.hidden * self.encoder.ty.bytes());
        let rows = staging.iter().map(|b| b.memory.bytes()).min().unwrap_or(0) / row;
        for (number, ids) in ids.chunks(rows.max(1)).enumerate() {
            let Some(buffer) = staging.first_mut() else { break };
            e.weights.embed_into(ids, e.ty, buffer.memory.bytes_after(&buffer.used)?)?;
            // On the compute stream, in whose order the state is used.
            e.gpu.compute().copy_in(state.ptr.offset(number * rows * row), &buffer.memory, 0, ids.len() * row)?;
            e.gpu.compute().record(&buffer.used)?;
            staging.rotate_left(1);
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
        arrivals: &[Arrival],
        feed: &Feed,
        captions: usize,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
        times: &mut EncodeTimes,
    ) -> Result<()> {
        let (e, gpu) = (self.encoder, &self.encoder.gpu);
        let context = gpu.context();
        let mut spans = Vec::new();
        let unfolded = self.arena.reserve(self.plan.layer)?;
        for (layer, (place, arrival)) in places.iter().zip(arrivals).enumerate() {
            let _span = tracing::trace_span!("encode layer", layer, captions).entered();
            let started = Instant::now();
            let arrived = feed.layer(layer, gpu.compute())?;
            times.wait += started.elapsed();
            let (begin, end) = (Event::timed(context)?, Event::timed(context)?);
            gpu.compute().record(&begin)?;
            let (base, norms) = arrival.unfold(gpu, e.ty, arrived, unfolded)?;
            let weights = e.layer(place, base, norms);
            for index in 0..self.packs.len() {
                self.pack_layer(index, &weights)?;
            }
            gpu.compute().record(&end)?;
            feed.computed(layer, gpu.compute())?;
            spans.push((begin, end));
            self.keep(layer + 1)?;
            times.flops += 2.0 * e.geometry.layer_params() as f64 * (self.rows - 1) as f64;
            progress(((layer + 1) * captions) as u64, (places.len() * captions) as u64)?;
        }
        tracing::trace_span!("last layers").in_scope(|| gpu.sync())?;
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
        if let Some(pack) = self.packs.get(index) {
            pack.visit(self.encoder, &self.space, w)?;
        }
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
        let (e, gpu) = (self.encoder, &self.encoder.gpu);
        let slots: Vec<usize> = (0..3).filter(|s| self.task.states.get(*s) == Some(&index)).collect();
        if let Kept::Leaving(leaving) = &mut self.kept {
            return leaving.take(gpu, self.packs.iter().map(|p| p.state), slots);
        }
        for slot in slots {
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
        if let Kept::Leaving(leaving) = self.kept {
            let (mut embeddings, buffers) = tracing::trace_span!("last state").in_scope(|| leaving.end(self.task.keep))?;
            self.encoder.buffers.put(buffers);
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

/// First row and rows of each caption among all packs' rows, then of the pad, the last of the first pack.
fn embedding_rows(packs: &[crate::text::encode::Pack]) -> Vec<(usize, usize)> {
    let (mut all, mut at, mut pad) = (Vec::new(), 0, (0, 1));
    for (index, pack) in packs.iter().enumerate() {
        for n in &pack.lengths {
            all.push((at, *n));
            at += n;
        }
        if index == 0 {
            pad.0 = at;
            at += 1;
        }
    }
    all.push(pad);
    all
}

/// A state as a tensor on the host.
fn download(e: &CudaTextEncoder, mat: Mat) -> Result<Tensor> {
    let mut raw = vec![0u8; mat.span()];
    e.gpu.download(&mut raw, mat.ptr)?;
    upload_as(&raw, e.dtype(), &[mat.rows, mat.cols], &Device::Cpu, e.dtype())
}
