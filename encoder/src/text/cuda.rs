//! The text encoder on a CUDA device: the same passes as in `encode`, with layers that stream through two places in device memory.
//!
//! Threads read layer i + 1 ([`super::stream`]) and the copy stream brings it while layer i computes; the streams meet in events only. All captions'
//! hidden states stay on the device where they fit, else they wait in the pass's store between two layers. A pack has thousands of rows, so that
//! products run at their best rate; queries, keys and values are one product, gate and up another, and both sums of the residual stream are
//! made by the products that end in it. The row that every pad shares is the last of the first pack: attention is zero there.
//!
//! bf16 with float32 inside every operation, or float32 throughout for comparison. A caption sees its own tokens only; which algorithm the product
//! library takes depends on the pack's rows, so that its last bits may depend on what is encoded with it. On the CPU they do not.
//!
//! Memory is added up before any is taken ([`Plan`]); a budget that is too small is an error with the minimum. The driver's figure is flat after that.

use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel, sync_channel};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use serenity_cuda::arena::ALIGNMENT;
use serenity_cuda::driver::{Pinned, Priority};
use serenity_cuda::ops::text::{Captions, GroupedHeads, HEAD_DIM_MAX};
use serenity_cuda::{Arena, Event, Gpu, Mat, Ptr, Stream, Ty};
use serenity_protocol::cache::text_model::TextGeometry;
use serenity_protocol::checkpoint::Checkpoint;
use serenity_protocol::{Error, Result};

use super::encode::{Embedding, EncodeTimes, Hidden, Task, packs};
use super::hidden::{HiddenStore, bytes_of};
use super::stream::{Buffer, Filled, Jobs, PIECE_BYTES};
use super::weights::{LayerPlaces, TextWeights};
use crate::tensor::{failed, upload_as};
use crate::tokenizer::Tokens;

/// Tokens of a pack where memory allows.
const PACK_ROWS: usize = 4096;
/// And where it does not: fewer gain nothing.
const PACK_ROWS_MIN: usize = 256;
/// Page-locked buffers more than reading threads.
const BUFFERS_AHEAD: usize = 4;
/// Kept hidden states of at most so many bytes leave the device without being waited for.
const LOCKED_MAX: usize = 4 << 30;
/// What the product library loads at first use.
const LIBRARIES: u64 = 192 << 20;
/// Left free on a device without a cap.
const MARGIN: u64 = 512 << 20;
/// The largest context that is believed: more is other programs' memory.
const CONTEXT_MAX: u64 = 1 << 30;
/// Reading threads unless it is said: what a fast disk and a memory file system need.
const READERS: usize = 14;

/// What a device is opened with.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// The device, in the driver's order.
    pub ordinal: usize,
    /// What it computes in.
    pub ty: Ty,
    /// Most bytes of device memory by the driver's figure; what is free if not given.
    pub bytes_max: Option<u64>,
    /// Reading threads; as many as are sensible if not given.
    pub readers: Option<usize>,
}

/// A text encoder whose weights stream through a device.
pub struct CudaTextEncoder {
    weights: TextWeights,
    geometry: TextGeometry,
    heads: GroupedHeads,
    ty: Ty,
    budget: usize,
    readers: usize,
    gpu: Gpu,
}

/// How the memory is shared out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    /// A layer's weights.
    layer: usize,
    /// Rows of a pack at most.
    rows: usize,
    /// Whether all hidden states stay on the device.
    resident: bool,
    /// All of it.
    bytes: usize,
}

/// Activations of a visit, and the tables.
struct Space {
    normed: Mat,
    packed: Mat,
    attended: Mat,
    gate_up: Mat,
    cos: Mat,
    sin: Mat,
}

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

/// A layer's weights on the device.
struct Layer {
    packed: Mat,
    output: Mat,
    gate_up: Mat,
    down: Mat,
    attention_norm: Mat,
    mlp_norm: Mat,
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

struct Pass<'a> {
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

fn no_device(e: Error) -> Error {
    match e {
        Error::Absent(_) => {
            e.advice("set \"train_device\": \"cpu\" to encode on the processor, or check the NVIDIA driver with `nvidia-smi`")
        }
        other => other,
    }
}

impl CudaTextEncoder {
    /// Opens the text encoder at `path` (folder or file) and the device. Reads no weights yet.
    ///
    /// # Errors
    /// [`Error::Absent`] without files, driver or device; [`Error::Data`] for files that are no Mistral text encoder, or heads that the device's attention does
    /// not know.
    pub fn open(path: &Path, settings: Settings) -> Result<Self> {
        let geometry = TextGeometry::read(path)?;
        let heads = GroupedHeads { queries: geometry.heads, keys: geometry.kv_heads, head_dim: geometry.head_dim };
        if heads.head_dim > HEAD_DIM_MAX {
            return Err(Error::data("the text encoder's heads are too wide for a GPU")
                .at(path)
                .expected(format!("at most {HEAD_DIM_MAX} features"))
                .found(heads.head_dim)
                .advice("set \"train_device\": \"cpu\""));
        }
        let weights = TextWeights::new(Checkpoint::open(path)?, geometry.clone())?;
        let gpu = Gpu::open(settings.ordinal).map_err(no_device)?;
        let info = gpu.memory()?;
        let context = info.total.saturating_sub(info.free + info.used_by_process_estimate).min(CONTEXT_MAX);
        let used = context + info.used_by_process_estimate;
        let cap = settings.bytes_max.unwrap_or(u64::MAX).min((info.free + used).saturating_sub(MARGIN));
        let budget = usize::try_from(cap.saturating_sub(used + LIBRARIES)).unwrap_or(usize::MAX);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let readers = settings.readers.unwrap_or(READERS.min(cores)).max(1);
        Ok(Self { weights, geometry, heads, ty: settings.ty, budget, readers, gpu })
    }

    /// Its geometry.
    #[must_use]
    pub fn geometry(&self) -> &TextGeometry {
        &self.geometry
    }

    /// The device.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Type of the running state.
    #[must_use]
    pub fn dtype(&self) -> DType {
        dtype(self.ty)
    }

    /// As [`super::TextEncoder::encode_to`].
    ///
    /// # Errors
    /// As there; [`Error::Config`] if the device memory allowed is too small, with the minimum.
    pub fn encode_to(
        &self,
        captions: &[Tokens],
        pad_id: u32,
        task: &Task,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
        sink: &mut dyn FnMut(usize, Embedding, &Embedding) -> Result<()>,
    ) -> Result<EncodeTimes> {
        let began = Instant::now();
        let depth = task.states.into_iter().max().unwrap_or(0);
        let places = (0..depth).map(|layer| self.weights.places(layer, self.ty)).collect::<Result<Vec<_>>>()?;
        let plan = self.plan(captions, task.max_length, places.first().map_or(0, |p| p.bytes))?;
        let arena = Arena::new(&self.gpu, plan.bytes)?;
        let mut times = EncodeTimes::default();
        let parts: Vec<_> = places.iter().map(|p| p.parts.clone()).collect();
        let jobs = Jobs::new(&parts, self.ty);
        let (filled, arriving) = sync_channel(self.readers + BUFFERS_AHEAD);
        let (give, free) = channel();
        let free = Mutex::new(free);
        let pass = std::thread::scope(|scope| {
            for number in 0..self.readers {
                let (jobs, free, filled) = (&jobs, &free, filled.clone());
                let thread = std::thread::Builder::new().name(format!("layer reader {number}"));
                thread
                    .spawn_scoped(scope, move || jobs.read(free, &filled))
                    .map_err(|e| Error::absent("cannot start a thread").cause(e))?;
            }
            drop(filled);
            // Moved here: when the pass ends early, waiting readers hear of it.
            let give = give;
            let arriving = arriving;
            for _ in 0..(self.readers + BUFFERS_AHEAD).min(jobs.of(0).max(1) * 2) {
                let buffer = Buffer { memory: Pinned::new(self.gpu.context(), PIECE_BYTES)?, used: Event::new(self.gpu.context())? };
                // Readers that have failed are heard of below.
                let _ = give.send(buffer);
            }
            // While the first layers are read.
            let mut pass = Pass::new(self, task, &arena, plan, captions, pad_id)?;
            pass.keep(0)?;
            times.setup = began.elapsed();
            pass.layers(&places, &jobs, &arriving, &give, captions.len(), progress, &mut times)?;
            Ok::<_, Error>(pass)
        })?;
        pass.finish(sink)?;
        Ok(times)
    }

    /// The largest packs and, if possible, all states on the device.
    fn plan(&self, captions: &[Tokens], max_length: usize, layer: usize) -> Result<Plan> {
        let longest = captions.iter().map(|c| c.ids.len()).max().unwrap_or(1) + 1;
        let all = captions.iter().map(|c| c.ids.len()).sum::<usize>() + 1;
        let mut least = usize::MAX;
        for resident in [true, false] {
            let mut most = PACK_ROWS;
            while most >= PACK_ROWS_MIN {
                // Packs of equal size, each as large as its last caption makes it.
                let number = all.div_ceil(most).max(1);
                let rows = (all.div_ceil(number) + longest).min(all).max(longest);
                let bytes = self.bytes(captions, max_length, layer, rows, if resident { all } else { rows });
                if bytes <= self.budget {
                    return Ok(Plan { layer, rows, resident, bytes });
                }
                least = least.min(bytes);
                most /= 2;
            }
        }
        let (minimum, allowed) = (least.div_ceil(1 << 20), self.budget >> 20);
        Err(Error::config("the device memory allowed is too small for two layers of the text encoder")
            .expected(format!("{} MiB more", minimum.saturating_sub(allowed)))
            .found(format!("{allowed} MiB beside the context"))
            .advice("raise memory.stagehand.vram_high_watermark_mb, or encode on another machine"))
    }

    fn bytes(&self, captions: &[Tokens], max_length: usize, layer: usize, rows: usize, states: usize) -> usize {
        let (g, element) = (&self.geometry, self.ty.bytes());
        let mat = |rows: usize, cols: usize| (rows * cols * element).next_multiple_of(ALIGNMENT);
        let space = mat(rows, g.hidden) + mat(rows, self.heads.packed()) + mat(rows, g.heads * g.head_dim) + mat(rows, 2 * g.intermediate);
        let tables = 2 * mat(max_length, g.head_dim / 2);
        let all: usize = captions.iter().map(|c| c.ids.len()).sum();
        // Positions and tiles of every pack, each on its own alignment.
        let small = 4 * (all + 1) + captions.iter().map(|c| Captions::bytes(&[(0, c.ids.len())])).sum::<usize>();
        let packs = captions.len() + 1;
        2 * layer.next_multiple_of(ALIGNMENT) + space + tables + mat(states, g.hidden) + small + 4 * ALIGNMENT * packs
    }

    fn layer(&self, places: &LayerPlaces, base: Ptr) -> Layer {
        let (g, ty) = (&self.geometry, self.ty);
        let mat = |at: usize, rows: usize, cols: usize| Mat::new(base.offset(at), ty, rows, cols);
        Layer {
            packed: mat(places.query, self.heads.packed(), g.hidden),
            output: mat(places.output, g.hidden, g.heads * g.head_dim),
            gate_up: mat(places.gate, 2 * g.intermediate, g.hidden),
            down: mat(places.down, g.hidden, g.intermediate),
            attention_norm: mat(places.attention_norm, 1, g.hidden),
            mlp_norm: mat(places.mlp_norm, 1, g.hidden),
        }
    }
}

fn dtype(ty: Ty) -> DType {
    match ty {
        Ty::Bf16 => DType::BF16,
        Ty::F32 => DType::F32,
    }
}

impl Space {
    fn new(e: &CudaTextEncoder, arena: &Arena, rows: usize, max_length: usize) -> Result<Self> {
        let (g, ty) = (&e.geometry, e.ty);
        let half = g.head_dim / 2;
        // As the CPU's tables: float32 angles, cosines in double precision, rounded to the type.
        let frequency = |j: usize| (1.0 / g.rope_theta.powf(2.0 * j as f64 / g.head_dim as f64)) as f32;
        let table = |f: fn(f64) -> f64| -> Result<Mat> {
            let values: Vec<f32> =
                (0..max_length).flat_map(|p| (0..half).map(move |j| f(f64::from(p as f32 * frequency(j))) as f32)).collect();
            let bytes: Vec<u8> = match ty {
                Ty::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                Ty::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            };
            let mat = arena.mat(ty, max_length, half)?;
            e.gpu.upload(mat.ptr, &bytes)?;
            Ok(mat)
        };
        Ok(Self {
            normed: arena.mat(ty, rows, g.hidden)?,
            packed: arena.mat(ty, rows, e.heads.packed())?,
            attended: arena.mat(ty, rows, g.heads * g.head_dim)?,
            gate_up: arena.mat(ty, rows, 2 * g.intermediate)?,
            cos: table(f64::cos)?,
            sin: table(f64::sin)?,
        })
    }
}

impl<'a> Pass<'a> {
    fn new(encoder: &'a CudaTextEncoder, task: &'a Task, arena: &'a Arena, plan: Plan, captions: &[Tokens], pad_id: u32) -> Result<Self> {
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
    fn layers(
        &mut self,
        places: &[LayerPlaces],
        jobs: &Jobs,
        arriving: &Receiver<Result<Filled>>,
        free: &std::sync::mpsc::Sender<Buffer>,
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
            let all = jobs.of(layer);
            let started = Instant::now();
            let mut now: Vec<Filled> = std::mem::take(&mut early);
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
    fn keep(&mut self, index: usize) -> Result<()> {
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
    fn finish(mut self, sink: &mut dyn FnMut(usize, Embedding, &Embedding) -> Result<()>) -> Result<()> {
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
