//! Memory of a run on the device, added up before any of it is taken.
//!
//! Every part is reserved by a function that is generic over [`Reserve`]: the arena hands out memory, [`Measure`] only counts. So the plan
//! cannot differ from what the step does. How the memory that may vary is shared out (slots, resident blocks, block inputs on the device or
//! on the host) is `choice`'s work, which plays each possibility through [`forecast`] and takes the fastest.
#![forbid(unsafe_code)]

mod choice;
pub mod forecast;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::fmt;

use serenity_cuda::arena::ALIGNMENT;
use serenity_cuda::ops::loss::MSE_PARTIALS;
use serenity_cuda::{Arena, Mat, Ptr, Tuning, Ty};
use serenity_protocol::Result;
use serenity_protocol::geometry::{BlockId, BlockKind, LinearSpec, TransformerGeometry};
pub use serenity_protocol::geometry::{CONDITIONING, EMBEDDERS};

pub use self::forecast::{Forecast, Rates};
use super::adapters::Region;
use super::assignment::Slots;
use super::blocks::Payload;
use super::conditioning::Embedded;
use super::flight::{EntrySpace, FlightSpace, HeadSpace};
use super::inputs::Turns;
use super::tiles::ring_bytes;
use super::{double, single};

/// Who hands out device memory.
pub trait Reserve {
    /// `bytes` bytes, aligned.
    ///
    /// # Errors
    /// If there are not so many left.
    fn bytes(&self, bytes: usize) -> Result<Ptr>;

    /// A dense matrix.
    ///
    /// # Errors
    /// If there is not so much left.
    fn mat(&self, ty: Ty, rows: usize, cols: usize) -> Result<Mat> {
        Ok(Mat::new(self.bytes(rows * cols * ty.bytes())?, ty, rows, cols))
    }
}

impl Reserve for Arena {
    fn bytes(&self, bytes: usize) -> Result<Ptr> {
        self.reserve(bytes)
    }
}

/// Counts what would be reserved.
#[derive(Debug, Default)]
pub struct Measure(Cell<usize>);

impl Measure {
    /// Bytes so far.
    #[must_use]
    pub fn total(&self) -> usize {
        self.0.get()
    }
}

impl Reserve for Measure {
    fn bytes(&self, bytes: usize) -> Result<Ptr> {
        let at = self.0.get();
        self.0.set(at + bytes.next_multiple_of(ALIGNMENT));
        Ok(Ptr::NULL.offset(at))
    }
}

/// Sizes of one micro-batch in a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Samples.
    pub samples: usize,
    /// Text tokens of a sample.
    pub text: usize,
    /// Image tokens of a sample.
    pub image: usize,
    /// D.
    pub inner: usize,
    /// M.
    pub mlp: usize,
    /// Heads.
    pub heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// Rank of the adapters.
    pub rank: usize,
    /// What the activations are.
    pub ty: Ty,
    /// Of every norm.
    pub eps: f32,
    /// Bytes that attention works in.
    pub workspace: usize,
}

impl Shape {
    /// For a micro-batch of `samples` samples.
    #[must_use]
    pub fn new(g: &TransformerGeometry, ty: Ty, rank: usize, samples: usize, text: usize, image: usize) -> Self {
        Self {
            samples,
            text,
            image,
            inner: g.inner_dim(),
            mlp: g.mlp_dim(),
            heads: g.num_attention_heads,
            head_dim: g.attention_head_dim,
            rank,
            ty,
            eps: g.eps as f32,
            workspace: 0,
        }
    }

    /// Tokens of a sample.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.text + self.image
    }

    /// Rows of a matrix of all tokens.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.samples * self.tokens()
    }

    /// Bytes of the hidden states of all tokens.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        self.rows() * self.inner * self.ty.bytes()
    }

    /// Rows of a matrix of the image's tokens.
    #[must_use]
    pub fn image_rows(&self) -> usize {
        self.samples * self.image
    }

    /// Rows of a matrix of the text's tokens.
    #[must_use]
    pub fn text_rows(&self) -> usize {
        self.samples * self.text
    }
}

/// What may be asked of a plan beyond its budget. The default leaves everything to the planner.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Fewest and most slots of the largest block that blocks stream through.
    pub buffers: (usize, usize),
    /// Blocks kept on the device at most.
    pub resident_max: usize,
    /// How block inputs are kept, instead of the planner's choice.
    pub turns: Option<Turns>,
    /// Blocks whose activations are kept at most.
    pub kept_max: usize,
    /// Page-locked host memory for block inputs at most, in bytes.
    pub host_max: usize,
    /// Page-locked host memory for activations at most, in bytes.
    pub parcels_max: usize,
    /// The same for weights outside the blocks.
    pub hosted_max: usize,
    /// How many of the [`CONDITIONING`] linears stay on the host, instead of the planner's choice.
    pub hosted: Option<usize>,
    /// Single blocks whose activations travel, and sets of device memory for them, instead of the planner's choice.
    pub travelling: Option<(usize, usize)>,
    /// What the device does in a second, for comparing one possibility with another.
    pub rates: Rates,
    /// Device memory of the process that is not the arena's: told with the least that is needed.
    pub beside: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            buffers: (1, 3),
            resident_max: usize::MAX,
            turns: None,
            kept_max: usize::MAX,
            host_max: usize::MAX,
            parcels_max: usize::MAX,
            hosted_max: usize::MAX,
            hosted: None,
            travelling: None,
            rates: Rates::default(),
            beside: 0,
        }
    }
}

/// What a plan is made from.
#[derive(Debug)]
pub struct Need<'n> {
    /// The model.
    pub geometry: &'n TransformerGeometry,
    /// What it computes in.
    pub ty: Ty,
    /// Micro-batches of a step.
    pub shapes: &'n [Shape],
    /// Adapted linears.
    pub targets: &'n [LinearSpec],
    /// Payloads of all blocks.
    pub payloads: &'n [Payload],
    /// Bytes that the arena may have.
    pub budget: usize,
    /// What else is asked.
    pub limits: Limits,
}

/// The plan: bytes of each part.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Linears outside the blocks and norms.
    pub other: usize,
    /// How many of the [`CONDITIONING`] linears stay on the host, where the device reads them; their bytes there.
    pub hosted: usize,
    /// Page-locked memory of the host for them.
    pub hosted_bytes: usize,
    /// Parameters, gradients, moments and copies of the adapters.
    pub adapters: usize,
    /// The ring of dequantised matrices.
    pub tile: usize,
    /// Activations of one visit, the largest.
    pub visit: usize,
    /// Inputs of blocks, gradients, conditioning: what lives as long as a step.
    pub step: usize,
    /// How the inputs of the blocks are kept.
    pub turns: Turns,
    /// Page-locked memory of the host for block inputs.
    pub host: usize,
    /// Bytes of one slot for streaming.
    pub slot: usize,
    /// Slots.
    pub slots: usize,
    /// Blocks that stay on the device once they have been copied.
    pub resident: Vec<BlockId>,
    /// Their bytes.
    pub resident_bytes: usize,
    /// Blocks whose activations are kept from the forward to the backward pass instead of being computed again.
    pub kept: Vec<BlockId>,
    /// The activations' bytes.
    pub kept_bytes: usize,
    /// Single blocks whose activations travel to the host and back instead of being computed again, in order.
    pub travelling: Vec<BlockId>,
    /// How they take turns in device memory.
    pub parcels: Turns,
    /// Bytes of that.
    pub parcel_bytes: usize,
    /// Page-locked memory of the host for them.
    pub parcel_host: usize,
    /// What was allowed.
    pub budget: usize,
    /// What a step with it is expected to take, at the rates of the [`Limits`].
    pub forecast: Forecast,
}

/// Room for small things: tables, losses, scratch of reductions.
const SMALL_BYTES: usize = (4 << 20) + 8 * MSE_PARTIALS;

/// Bytes that `space` reserves.
fn measured<T>(space: impl FnOnce(&Measure) -> Result<T>) -> Result<usize> {
    let measure = Measure::default();
    space(&measure)?;
    Ok(measure.total())
}

impl Plan {
    /// Adds everything up and shares out what is left.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Config`] if the budget is too small: with the minimum, and what to change.
    pub fn new(need: &Need<'_>) -> Result<Self> {
        let g = need.geometry;
        let mut visit = 0;
        for shape in need.shapes {
            if g.num_single_layers > 0 {
                visit = visit.max(measured(|m| single::Space::new(m, shape))?);
            }
            if g.num_layers > 0 {
                visit = visit.max(measured(|m| double::Space::new(m, shape))?);
            }
            visit = visit.max(measured(|m| HeadSpace::new(m, g, shape))?).max(measured(|m| EntrySpace::new(m, g, shape))?);
        }
        let shapes: Vec<Vec<(usize, usize)>> = need.payloads.iter().map(|p| p.parts.iter().map(|w| (w.rows, w.cols)).collect()).collect();
        let tuning = Tuning::from_environment()?;
        let mut rings = ring_bytes(&shapes, need.ty, tuning.piece, need.shapes.first().map_or(0, |s| s.rank));
        if tuning.ring_mib > 0 {
            rings = vec![rings.first().copied().unwrap_or(0).max(tuning.ring_mib << 20)];
        }
        let fixed = Self {
            other: other_bytes(g, need.ty, 0).0,
            hosted: 0,
            hosted_bytes: 0,
            adapters: adapter_bytes(need)?,
            tile: 0,
            visit,
            step: 0,
            turns: Turns::none(),
            host: 0,
            slot: Slots::of(need.payloads).bytes,
            slots: 0,
            resident: Vec::new(),
            resident_bytes: 0,
            kept: Vec::new(),
            kept_bytes: 0,
            travelling: Vec::new(),
            parcels: Turns::none(),
            parcel_bytes: 0,
            parcel_host: 0,
            budget: need.budget,
            forecast: Forecast::default(),
        };
        choice::choose(&fixed, need, &rings)
    }

    /// Bytes of the arena.
    #[must_use]
    pub fn total(&self) -> usize {
        let fixed = self.other + self.adapters + self.tile + self.visit + self.step + SMALL_BYTES;
        fixed + self.slots * self.slot + self.resident_bytes + self.kept_bytes + self.parcel_bytes
    }

    /// What a step is expected to take at rates that were measured.
    ///
    /// # Errors
    /// [`serenity_protocol::Error::Invariant`] for a plan that is not of this `need`.
    pub fn predict(&self, need: &Need<'_>, rates: &Rates) -> Result<Forecast> {
        Forecast::of(self, need, rates)
    }

    /// Bytes of what lives as long as a step, with block inputs kept in this way; and page-locked bytes of the host.
    fn step_bytes(need: &Need<'_>, turns: Turns) -> Result<(usize, usize)> {
        let samples = need.shapes.iter().map(|s| s.samples).sum();
        let step = measured(|m| {
            let (embedded, mut first) = (Embedded::new(m, need.geometry, samples)?, 0);
            for shape in need.shapes {
                FlightSpace::new(m, need.geometry, shape, &embedded.rows(first, shape.samples)?, turns)?;
                first += shape.samples;
            }
            Ok(())
        })?;
        let host = need.shapes.iter().map(|s| turns.saved() * s.state_bytes().next_multiple_of(ALIGNMENT)).sum();
        Ok((step, host))
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mb = |bytes: usize| bytes.div_ceil(1 << 20);
        write!(
            f,
            "weights outside the blocks {} MiB ({} on the host), adapters {}, dequantised {}, block visit {}, block inputs and step {} ({}; {} on the host), \
             {} slots of {}, {} resident blocks {}, activations of {} blocks {}, of {} on the host {} ({} there): {} of {} MiB; {}",
            mb(self.other),
            mb(self.hosted_bytes),
            mb(self.adapters),
            mb(self.tile),
            mb(self.visit),
            mb(self.step),
            self.turns,
            mb(self.host),
            self.slots,
            mb(self.slot),
            self.resident.len(),
            mb(self.resident_bytes),
            self.kept.len(),
            mb(self.kept_bytes),
            self.travelling.len(),
            mb(self.parcel_bytes),
            mb(self.parcel_host),
            mb(self.total()),
            mb(self.budget),
            self.forecast,
        )
    }
}

/// Bytes of weights outside the blocks on the device and on the host, where the first `hosted` of [`CONDITIONING`] are.
fn other_bytes(g: &TransformerGeometry, ty: Ty, hosted: usize) -> (usize, usize) {
    let bytes = |l: &LinearSpec| (l.out_features * l.in_features * ty.bytes()).next_multiple_of(ALIGNMENT);
    let there = |l: &LinearSpec| CONDITIONING.iter().take(hosted).any(|name| *name == l.name);
    let (host, device): (Vec<_>, Vec<_>) = g.other_linears().into_iter().partition(there);
    let norms: usize = g.blocks().map(|b| g.block_norms(b).len() * (4 * g.attention_head_dim).next_multiple_of(ALIGNMENT)).sum();
    (device.iter().map(bytes).sum::<usize>() + norms, host.iter().map(bytes).sum())
}

fn adapter_bytes(need: &Need<'_>) -> Result<usize> {
    let rank = need.shapes.first().map_or(1, |s| s.rank);
    let measure = Measure::default();
    let shapes: Vec<(usize, usize)> = need.targets.iter().map(|t| (t.out_features, t.in_features)).collect();
    Region::reserve(&measure, need.ty, rank, &shapes)?;
    // The optimiser's tables: six words a tensor, two words and a partial sum a chunk of 4096.
    let values: usize = shapes.iter().map(|(o, i)| rank * (o + i)).sum();
    Ok(measure.total() + 2 * need.targets.len() * (48 + 24) + values.div_ceil(4096) * 24 + 4 * ALIGNMENT)
}

/// Whether a block is of the double kind.
#[must_use]
pub fn is_double(g: &TransformerGeometry, block: BlockId) -> bool {
    matches!(g.kind(block), BlockKind::Double(_))
}
