//! The text encoder on a CUDA device: the same passes as in `encode`, with layers that stream through two places in device memory.
//!
//! Threads read layer i + 1 ([`super::stream`]) and the copy stream brings it while layer i computes; the streams meet in events only. All captions'
//! hidden states stay on the device where they fit, else they wait in the pass's store between two layers. A pack has thousands of rows, so that
//! products run at their best rate; queries, keys and values are one product, gate and up another, and both sums of the residual stream are
//! made by the products that end in it. The row that every pad shares is the last of the first pack: attention is zero there.
//!
//! bf16 with float32 inside every operation, or float32 throughout for comparison. A caption sees its own tokens only, and the product library is asked for
//! one algorithm for every number of rows, so that a caption's bits do not depend on what is encoded with it.
//!
//! Memory is added up before any is taken ([`Plan`]); a budget that is too small is an error with the minimum. The driver's figure is flat after that.

mod arrival;
mod leaving;
mod pass;

use std::time::Instant;

use candle_core::DType;
use half::bf16;
use serenity_cuda::arena::ALIGNMENT;
use serenity_cuda::ops::text::{Captions, GroupedHeads, HEAD_DIM_MAX};
use serenity_cuda::{Arena, Gpu, Mat, Ptr, Ty};
use serenity_protocol::cache::text_model::TextGeometry;
use serenity_protocol::slab::text_encoder::TextModel;
use serenity_protocol::{Error, Result};

use self::arrival::Arrival;
use self::pass::Pass;
use super::encode::{Embedding, EncodeTimes, Hidden, Task};
use super::feed::{Buffers, Ending, Feed, PLACES};
use super::stream::Jobs;
use super::weights::{LayerPlaces, TextWeights};
use crate::tokenizer::Tokens;

/// Tokens of a pack where memory allows.
const PACK_ROWS: usize = 4096;
/// And where it does not: fewer gain nothing.
const PACK_ROWS_MIN: usize = 256;
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
    /// Page-locked.
    buffers: Buffers,
}

/// How the memory is shared out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    /// What comes of a layer.
    arrival: usize,
    /// A layer that is made of that, if it is not that itself.
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

/// A layer's weights on the device.
struct Layer {
    packed: Mat,
    output: Mat,
    gate_up: Mat,
    down: Mat,
    attention_norm: Mat,
    mlp_norm: Mat,
}

fn no_device(e: Error) -> Error {
    match e {
        Error::Absent(_) => e.or_advice("set \"train_device\": \"cpu\" to encode on the processor"),
        other => other,
    }
}

impl CudaTextEncoder {
    /// Opens a text encoder (a path is a checkpoint's, folder or file) and the device, and loads what will run there. Reads no weights yet.
    ///
    /// # Errors
    /// [`Error::Absent`] without files, driver or device; [`Error::Data`] for files that are no Mistral text encoder, or heads that the device's attention does
    /// not know.
    pub fn open<'m>(model: impl Into<TextModel<'m>>, settings: Settings) -> Result<Self> {
        let model = model.into();
        let weights = TextWeights::open(model)?;
        let geometry = weights.geometry().clone();
        let heads = GroupedHeads { queries: geometry.heads, keys: geometry.kv_heads, head_dim: geometry.head_dim };
        if heads.head_dim > HEAD_DIM_MAX {
            return Err(Error::data("the text encoder's heads are too wide for a GPU")
                .at(model.path())
                .expected(format!("at most {HEAD_DIM_MAX} features"))
                .found(heads.head_dim)
                .advice("set \"train_device\": \"cpu\""));
        }
        let gpu = Gpu::open(settings.ordinal).map_err(no_device)?;
        let info = gpu.memory()?;
        let context = info.total.saturating_sub(info.free + info.used_by_process_estimate).min(CONTEXT_MAX);
        let used = context + info.used_by_process_estimate;
        let cap = settings.bytes_max.unwrap_or(u64::MAX).min((info.free + used).saturating_sub(MARGIN));
        let budget = usize::try_from(cap.saturating_sub(used + LIBRARIES)).unwrap_or(usize::MAX);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let readers = settings.readers.unwrap_or(READERS.min(cores)).max(1);
        let (buffers, readers) = Buffers::new(gpu.context(), readers)?;
        let this = Self { weights, geometry, heads, ty: settings.ty, budget, readers, gpu, buffers };
        pass::load_kernels(&this)?;
        Ok(this)
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
        self.weights.check_states(&task.states)?;
        let depth = task.states.into_iter().max().unwrap_or(0);
        let places = (0..depth).map(|layer| self.weights.places(layer, self.ty)).collect::<Result<Vec<_>>>()?;
        let arrivals = places.iter().enumerate().map(|(i, p)| Arrival::new(&self.weights, i, p)).collect::<Result<Vec<_>>>()?;
        let layer = if arrivals.iter().any(Arrival::is_coded) { places.first().map_or(0, |p| p.bytes) } else { 0 };
        let arrival = arrivals.iter().map(|a| a.bytes).max().unwrap_or(0);
        let plan = self.plan(captions, task, (arrival, layer))?;
        let arena = tracing::trace_span!("device memory").in_scope(|| Arena::new(&self.gpu, plan.bytes))?;
        let mut times = EncodeTimes::default();
        let parts: Vec<_> = arrivals.iter().map(|a| a.parts.clone()).collect();
        let jobs = Jobs::new(&parts, self.ty);
        let places_at = [arena.reserve(plan.arrival)?, arena.reserve(plan.arrival)?];
        let feed = Feed::new(self.gpu.context(), jobs.by_layer(places.len()), places_at)?;
        let pass = std::thread::scope(|scope| {
            let _ending = Ending(&feed);
            for number in 0..self.readers {
                let (jobs, feed, free) = (&jobs, &feed, &self.buffers);
                let thread = std::thread::Builder::new().name(format!("layer reader {number}"));
                thread.spawn_scoped(scope, move || jobs.read(free, feed)).map_err(|e| Error::absent("cannot start a thread").cause(e))?;
            }
            // While the first layers are read.
            let mut pass = tracing::trace_span!("embed").in_scope(|| Pass::new(self, task, &arena, plan, captions, pad_id))?;
            pass.keep(0)?;
            times.setup = began.elapsed();
            pass.layers(&places, &arrivals, &feed, captions.len(), progress, &mut times)?;
            times.weight_bytes = jobs.file_bytes();
            Ok::<_, Error>(pass)
        })?;
        pass.finish(sink)?;
        Ok(times)
    }

    /// The largest packs and, if possible, all states on the device.
    fn plan(&self, captions: &[Tokens], task: &Task, (arrival, layer): (usize, usize)) -> Result<Plan> {
        let longest = captions.iter().map(|c| c.ids.len()).max().unwrap_or(1) + 1;
        let all = captions.iter().map(|c| c.ids.len()).sum::<usize>() + 1;
        let mut least = usize::MAX;
        for resident in [true, false] {
            let mut most = PACK_ROWS;
            while most >= PACK_ROWS_MIN {
                // Packs of equal size, each as large as its last caption makes it.
                let number = all.div_ceil(most).max(1);
                let rows = (all.div_ceil(number) + longest).min(all).max(longest);
                let layers = PLACES * arrival.next_multiple_of(ALIGNMENT) + layer.next_multiple_of(ALIGNMENT);
                let states = match (resident, &task.hidden) {
                    // A state that is kept has a second place while it leaves.
                    (true, Hidden::Memory) => 2 * all,
                    (true, Hidden::File(_)) => all,
                    (false, _) => rows,
                };
                let bytes = layers + self.bytes(captions, task.max_length, rows, states);
                if bytes <= self.budget {
                    return Ok(Plan { arrival, layer, rows, resident, bytes });
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

    /// Bytes of everything but layers.
    fn bytes(&self, captions: &[Tokens], max_length: usize, rows: usize, states: usize) -> usize {
        let (g, element) = (&self.geometry, self.ty.bytes());
        let mat = |rows: usize, cols: usize| (rows * cols * element).next_multiple_of(ALIGNMENT);
        let space = mat(rows, g.hidden) + mat(rows, self.heads.packed()) + mat(rows, g.heads * g.head_dim) + mat(rows, 2 * g.intermediate);
        let tables = 2 * mat(max_length, g.head_dim / 2);
        let all: usize = captions.iter().map(|c| c.ids.len()).sum();
        // Positions and tiles of every pack, each on its own alignment.
        let small = 4 * (all + 1) + captions.iter().map(|c| Captions::bytes(&[(0, c.ids.len())])).sum::<usize>();
        let packs = captions.len() + 1;
        space + tables + mat(states, g.hidden) + small + 4 * ALIGNMENT * packs
    }

    /// The matrices of the layer at `base`; its norms may be elsewhere.
    fn layer(&self, places: &LayerPlaces, base: Ptr, norms: Option<[Ptr; 2]>) -> Layer {
        let (g, ty) = (&self.geometry, self.ty);
        let mat = |at: usize, rows: usize, cols: usize| Mat::new(base.offset(at), ty, rows, cols);
        let [attention_norm, mlp_norm] = norms.unwrap_or([base.offset(places.attention_norm), base.offset(places.mlp_norm)]);
        Layer {
            packed: mat(places.query, self.heads.packed(), g.hidden),
            output: mat(places.output, g.hidden, g.heads * g.head_dim),
            gate_up: mat(places.gate, 2 * g.intermediate, g.hidden),
            down: mat(places.down, g.hidden, g.intermediate),
            attention_norm: Mat::new(attention_norm, ty, 1, g.hidden),
            mlp_norm: Mat::new(mlp_norm, ty, 1, g.hidden),
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
