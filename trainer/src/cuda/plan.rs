//! Memory of a run on the device, added up before any of it is taken.
//!
//! Every part is reserved by a function that is generic over [`Reserve`]: the arena hands out memory, [`Measure`] only counts. So the plan
//! cannot differ from what the step does.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::fmt;

use serenity_cuda::arena::ALIGNMENT;
use serenity_cuda::ops::loss::MSE_PARTIALS;
use serenity_cuda::{Arena, Mat, Ptr, Ty};
use serenity_protocol::geometry::{BlockId, BlockKind, LinearSpec, TransformerGeometry};
use serenity_protocol::{Error, Result};

use super::adapters::Region;
use super::blocks::Payload;
use super::linear::largest_tile;
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
    /// Fewest buffers that blocks stream through.
    pub buffers_min: usize,
    /// Most buffers that blocks stream through.
    pub buffers_max: usize,
    /// Blocks kept on the device at most (all that fit: `usize::MAX`).
    pub resident_max: usize,
}

/// The plan: bytes of each part.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Linears outside the blocks and norms.
    pub other: usize,
    /// Parameters, gradients, moments and copies of the adapters.
    pub adapters: usize,
    /// A tile of a dequantised matrix.
    pub tile: usize,
    /// Activations of one visit, the largest.
    pub visit: usize,
    /// Inputs of all blocks, gradients, conditioning: what lives as long as a step.
    pub step: usize,
    /// Bytes of one streaming buffer.
    pub buffer: usize,
    /// Streaming buffers.
    pub buffers: usize,
    /// Blocks that stay on the device once they have been copied.
    pub resident: Vec<BlockId>,
    /// Their bytes.
    pub resident_bytes: usize,
    /// What was allowed.
    pub budget: usize,
}

/// Room for small things: tables, losses, scratch of reductions.
const SMALL_BYTES: usize = (4 << 20) + 8 * MSE_PARTIALS;

impl Plan {
    /// Adds everything up and gives what is left to buffers and resident blocks.
    ///
    /// # Errors
    /// [`Error::Config`] if the budget is too small: with the minimum, and what to change.
    pub fn new(need: &Need<'_>) -> Result<Self> {
        let g = need.geometry;
        let other = other_bytes(g, need.ty);
        let adapters = adapter_bytes(need)?;
        let measured = |space: &dyn Fn(&Measure) -> Result<()>| -> Result<usize> {
            let measure = Measure::default();
            space(&measure)?;
            Ok(measure.total())
        };
        let mut visit = 0;
        for shape in need.shapes {
            if g.num_single_layers > 0 {
                visit = visit.max(measured(&|m| single::Space::new(m, shape).map(drop))?);
            }
            if g.num_layers > 0 {
                visit = visit.max(measured(&|m| double::Space::new(m, shape).map(drop))?);
            }
            visit = visit.max(measured(&|m| super::step::HeadSpace::new(m, g, shape).map(drop))?);
        }
        let step =
            measured(&|m| need.shapes.iter().try_for_each(|s| super::step::FlightSpace::new(m, g, s, g.num_blocks() + 1).map(drop)))?;
        let buffer = need.payloads.iter().map(|p| p.bytes).max().unwrap_or(0).next_multiple_of(ALIGNMENT);
        let largest = need.payloads.iter().flat_map(|p| p.parts.iter().map(|w| largest_tile(w.rows, w.cols))).max().unwrap_or(0);
        let tile = largest * need.ty.bytes() + ALIGNMENT;
        let mut plan = Self {
            other,
            adapters,
            tile,
            visit,
            step,
            buffer,
            buffers: need.buffers_min.max(1),
            resident: Vec::new(),
            resident_bytes: 0,
            budget: need.budget,
        };
        if plan.total() > need.budget {
            return Err(Error::config("the device memory allowed for training is too small")
                .expected(format!("at least {} MiB", plan.total().div_ceil(1 << 20)))
                .found(format!("{} MiB\n{plan}", need.budget >> 20))
                .advice("raise memory.stagehand.vram_high_watermark_mb, or lower resolution, batch_size or gradient_accumulation_steps"));
        }
        plan.use_the_rest(need);
        Ok(plan)
    }

    /// Everything resident if that fits; else more buffers up to what prefetching can use, then blocks spread evenly over the model.
    fn use_the_rest(&mut self, need: &Need<'_>) {
        let all: usize = need.payloads.iter().map(|p| p.bytes.next_multiple_of(ALIGNMENT)).sum();
        let without_buffers = self.total() - self.buffers * self.buffer;
        if need.resident_max >= need.payloads.len() && without_buffers + all <= need.budget {
            self.resident = need.geometry.blocks().collect();
            (self.resident_bytes, self.buffers) = (all, 0);
            return;
        }
        while self.buffers < need.buffers_max.min(need.payloads.len()) && self.total() + self.buffer <= need.budget {
            self.buffers += 1;
        }
        let free = need.budget - self.total();
        let mut share = 0.0;
        let wanted = free as f64 / all.max(1) as f64;
        for (block, payload) in need.geometry.blocks().zip(need.payloads) {
            let bytes = payload.bytes.next_multiple_of(ALIGNMENT);
            share += wanted * bytes as f64;
            if share >= bytes as f64 && self.total() + bytes <= need.budget && self.resident.len() < need.resident_max {
                share -= bytes as f64;
                self.resident.push(block);
                self.resident_bytes += bytes;
            }
        }
    }

    /// Bytes of the arena.
    #[must_use]
    pub fn total(&self) -> usize {
        self.other + self.adapters + self.tile + self.visit + self.step + self.buffers * self.buffer + self.resident_bytes + SMALL_BYTES
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mb = |bytes: usize| bytes.div_ceil(1 << 20);
        write!(
            f,
            "weights outside the blocks {} MiB, adapters {}, dequantised tile {}, block visit {}, block inputs and step {}, {} buffers of {}, \
             {} resident blocks {}: {} of {} MiB",
            mb(self.other),
            mb(self.adapters),
            mb(self.tile),
            mb(self.visit),
            mb(self.step),
            self.buffers,
            mb(self.buffer),
            self.resident.len(),
            mb(self.resident_bytes),
            mb(self.total()),
            mb(self.budget),
        )
    }
}

fn other_bytes(g: &TransformerGeometry, ty: Ty) -> usize {
    let linears: usize = g.other_linears().iter().map(|l| (l.out_features * l.in_features * ty.bytes()).next_multiple_of(ALIGNMENT)).sum();
    let norms: usize = g.blocks().map(|b| g.block_norms(b).len() * (4 * g.attention_head_dim).next_multiple_of(ALIGNMENT)).sum();
    linears + norms
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::cuda::blocks::{Form, Part};

    fn dev() -> TransformerGeometry {
        let json = r#"{"in_channels": 128, "num_layers": 8, "num_single_layers": 48, "attention_head_dim": 128, "num_attention_heads": 48,
            "joint_attention_dim": 15360, "axes_dims_rope": [32, 32, 32, 32]}"#;
        serde_json::from_str(json).unwrap()
    }

    fn int8(g: &TransformerGeometry) -> Vec<Payload> {
        let block = |b: BlockId| {
            let mut end = 0;
            let mut part = |l: LinearSpec| {
                let (codes, scales) = (end, end + l.out_features * l.in_features);
                end = (scales + 4 * l.out_features).next_multiple_of(ALIGNMENT);
                Part { rows: l.out_features, cols: l.in_features, form: Form::Int8 { codes, scales, padded: l.in_features } }
            };
            let parts = g.block_linears(b).into_iter().map(&mut part).collect();
            Payload { bytes: end, parts }
        };
        g.blocks().map(block).collect()
    }

    fn plan(mib: usize, micro_batches: usize) -> Result<Plan> {
        let g = dev();
        let payloads = int8(&g);
        let targets: Vec<LinearSpec> = g.blocks().flat_map(|b| g.block_linears(b)).filter(|l| l.name.contains(".attn.")).collect();
        let shape = Shape { workspace: 256 << 20, ..Shape::new(&g, Ty::Bf16, 16, 1, 512, 1024) };
        Plan::new(&Need {
            geometry: &g,
            ty: Ty::Bf16,
            shapes: &vec![shape; micro_batches],
            targets: &targets,
            payloads: &payloads,
            budget: mib << 20,
            buffers_min: 2,
            buffers_max: 3,
            resident_max: usize::MAX,
        })
    }

    #[test]
    fn more_memory_keeps_more_blocks_and_the_budget_is_never_passed() {
        let mut before = 0;
        for gib in [8, 11, 16, 24, 32, 40] {
            let plan = plan(gib << 10, 1).unwrap();
            println!("{plan}");
            assert!(plan.total() <= plan.budget && plan.resident.len() >= before, "{plan}");
            assert!(plan.buffers >= 2 || plan.resident.len() == 56);
            before = plan.resident.len();
        }
        assert_eq!(before, 56, "40 GiB hold every block");
    }

    #[test]
    fn too_little_is_refused_with_the_minimum_which_then_is_enough() {
        let error = plan(1024, 1).unwrap_err();
        assert_eq!(error.exit_code(), 64);
        let text = error.to_string();
        let minimum: usize = text.split("at least ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        println!("{text}");
        assert!(plan(minimum, 1).is_ok() && plan(minimum - 2, 1).is_err());
        assert!(plan(minimum, 2).is_err(), "a second micro-batch needs its own block inputs");
    }
}
