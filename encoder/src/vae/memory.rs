//! How much device memory a half of the VAE takes, and what is done about too little: fewer images at once, less memory for copies, strips.
//!
//! Counted from the list of blocks before anything is allocated, so that a run takes its memory once and the driver's figure stays flat.
//! Whole images need three buffers of the largest activation (input, inner and output of a residual block with a shortcut); strips need three of
//! the largest strip with its halo, and what has a size of its own however small the strips are: keys and values of all pixels at an eighth
//! of the resolution, and the sums of the norms.

use serenity_cuda::ops::conv::Conv;
use serenity_protocol::{Error, Result};

use super::blocks::{Block, ConvSpec, Shape, strip_rows};

/// Buffers for rows.
pub(super) const SLOTS: usize = 3;
/// Buffers for sums: of a layer's input and of its output, and a residual block's input meanwhile.
pub(super) const SUMS: usize = 3;
/// Images that go through the network together at most: more gain nothing, a 512 px image alone fills a device.
pub(super) const BATCH_MAX: usize = 4;
/// Copies of neighbourhoods never take more.
const SCRATCH_MAX: usize = 512 << 20;
/// With less than this an image is cut into strips rather than its copies into smaller pieces.
const SCRATCH_ENOUGH: usize = 64 << 20;
/// Strips are made of so many rows: one row at an eighth of the resolution.
pub(super) const TILE_UNIT: usize = 8;
/// Bytes of an element.
const FLOAT: usize = 4;
/// Rows of attention scores that are enough at once.
const SCORES_ENOUGH: usize = 64;

/// What the process may take of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Budget {
    /// In all.
    pub cap: usize,
    /// Context, libraries, weights.
    pub taken: usize,
}

impl Budget {
    /// What is left for activations.
    pub fn left(&self) -> usize {
        self.cap.saturating_sub(self.taken)
    }
}

/// Bytes of each part of the device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    /// Images at once.
    pub batch: usize,
    /// Rows of a strip of the largest activation; `None` for whole images.
    pub tile: Option<usize>,
    /// A buffer for rows.
    pub slot: usize,
    /// A buffer for sums.
    pub sums: usize,
    /// Table of a norm.
    pub table: usize,
    /// Keys and values.
    pub keys: usize,
    /// Copies of neighbourhoods, scores.
    pub scratch: usize,
    /// Host memory of the largest activation; taken for strips only.
    pub host: usize,
    scratch_min: usize,
    scratch_most: usize,
}

impl Plan {
    fn parts(&self) -> [(usize, usize); 5] {
        [(SLOTS, self.slot), (SUMS, self.sums), (1, self.table), (1, self.keys), (1, self.scratch)]
    }

    /// All of it.
    pub fn bytes(&self) -> usize {
        self.parts().iter().map(|(count, bytes)| count * bytes.next_multiple_of(serenity_cuda::arena::ALIGNMENT)).sum()
    }

    /// Whether memory taken for this serves `other` too.
    pub fn holds(&self, other: &Self) -> bool {
        self.parts().iter().zip(other.parts()).all(|(mine, other)| mine.1 >= other.1) && self.host >= other.host
    }

    /// What images of `input` need; `scratch` as much as serves.
    fn count(blocks: &[Block], input: Shape, groups: usize, tile: Option<usize>) -> Self {
        let mut plan =
            Self { batch: input.batch, tile, slot: 0, sums: 0, table: 0, keys: 0, scratch: 0, host: 0, scratch_min: 0, scratch_most: 0 };
        let output = blocks.iter().fold(input, |shape, block| block.output(shape));
        let full = input.height.max(output.height);
        let mut shape = input;
        for block in blocks {
            match block {
                Block::Conv { conv, .. } => plan.add(conv, shape, full, groups),
                Block::Resnet { convs: [c1, c2], .. } => {
                    plan.add(c1, shape, full, groups);
                    plan.add(c2, c1.output(shape), full, groups);
                }
                Block::Attention { channels, .. } => plan.add_attention(shape, *channels),
            }
            shape = block.output(shape);
        }
        plan.scratch = plan.scratch_most.clamp(plan.scratch_min, SCRATCH_MAX.max(plan.scratch_min));
        plan
    }

    fn add(&mut self, conv: &ConvSpec, input: Shape, full: usize, groups: usize) {
        let output = conv.output(input);
        let rows = self.tile.map_or(output.height, |tile| strip_rows(tile, full, output.height));
        // A window in the middle of the image is the largest.
        let middle = (output.height - rows) / 2;
        let window = conv.window(&(middle..middle + rows), input.height).len() + 1;
        let bytes = |shape: Shape, rows: usize| shape.batch * rows.min(shape.height) * shape.row() * FLOAT;
        self.slot = self.slot.max(bytes(input, window)).max(bytes(output, rows));
        self.host = self.host.max(FLOAT * output.len());
        self.table = self.table.max(input.batch * 3 * input.channels.max(output.channels) * FLOAT);
        self.sums = self.sums.max(input.batch * input.height.max(output.height) * groups * 16);
        self.scratch_min = self.scratch_min.max(Conv::scratch_min(conv.taps, conv.input, output.width));
        let most = Conv::scratch_for(conv.taps, conv.stride, conv.input, [output.batch, rows, output.width]);
        self.scratch_most = self.scratch_most.max(most);
    }

    fn add_attention(&mut self, shape: Shape, channels: usize) {
        let tokens = shape.height * shape.width;
        self.keys = self.keys.max(2 * shape.batch * tokens * channels * FLOAT);
        let row = attention_row_bytes(tokens, channels);
        self.scratch_min = self.scratch_min.max(row * tokens.min(SCORES_ENOUGH));
        self.scratch_most = self.scratch_most.max(row * tokens);
    }

    /// The way of images of `input` (as many as its batch says) within the budget, in strips of `tile` rows if that is given.
    pub fn choose(blocks: &[Block], input: Shape, groups: usize, budget: Budget, tile: Option<usize>) -> Result<Self> {
        let output = blocks.iter().fold(input, |shape, block| block.output(shape));
        let full = input.height.max(output.height);
        let one = Shape { batch: 1, ..input };
        let within = |plan: Self, enough: usize| -> Option<Self> {
            let fixed = Self { scratch: 0, ..plan }.bytes();
            let scratch = plan.scratch.min(budget.left().saturating_sub(fixed) / 256 * 256);
            (scratch >= plan.scratch_min.max(enough.min(plan.scratch))).then_some(Self { scratch, ..plan })
        };
        if let Some(tile) = tile.filter(|tile| *tile < full) {
            let plan = Self::count(blocks, one, groups, Some(tile.next_multiple_of(TILE_UNIT)));
            return within(plan, 0).ok_or_else(|| Self::too_little(budget, &plan));
        }
        let whole = |batch| Self::count(blocks, Shape { batch, ..input }, groups, None);
        let batches = (1..=input.batch.clamp(1, BATCH_MAX)).rev().map(whole).find_map(|plan| within(plan, usize::MAX));
        if let Some(plan) = batches.or_else(|| within(whole(1), SCRATCH_ENOUGH)) {
            return Ok(plan);
        }
        let tiles = (1..full.div_ceil(TILE_UNIT)).rev().map(|units| Self::count(blocks, one, groups, Some(units * TILE_UNIT)));
        if let Some(plan) = tiles.into_iter().find_map(|plan| within(plan, SCRATCH_ENOUGH)) {
            return Ok(plan);
        }
        let least = Self::count(blocks, one, groups, Some(TILE_UNIT));
        within(least, 0).ok_or_else(|| Self::too_little(budget, &least))
    }

    fn too_little(budget: Budget, plan: &Self) -> Error {
        let needed = budget.taken + Self { scratch: plan.scratch_min, ..*plan }.bytes();
        let mib = |bytes: usize| bytes.div_ceil(1 << 20);
        Error::config("the device memory allowed is too small for the VAE")
            .expected(format!("at least {} MiB, {} of them for context, libraries and weights", mib(needed), mib(budget.taken)))
            .found(format!("{} MiB", budget.cap >> 20))
            .advice("raise memory.stagehand.vram_high_watermark_mb, free device memory, or lower the resolution")
    }
}

/// Scratch memory of one row of attention: its normalised input, its query, its scores.
pub(super) fn attention_row_bytes(tokens: usize, channels: usize) -> usize {
    (2 * channels + tokens.next_multiple_of(4)) * FLOAT
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::super::blocks;
    use super::super::synth;
    use super::*;

    fn shape(batch: usize, side: usize) -> Shape {
        Shape { batch, height: side, width: side, channels: 3 }
    }

    #[test]
    fn a_card_of_24_gb_takes_1024_px_whole_and_a_small_budget_takes_strips() {
        let encoder = blocks::encoder(&synth::geometry().unwrap());
        let gib = |n: usize| n << 30;
        let plan = |side: usize, budget: usize| {
            Plan::choose(&encoder, shape(4, side), 32, Budget { cap: budget + (900 << 20), taken: 900 << 20 }, None)
        };
        let whole = plan(1024, gib(22)).unwrap();
        assert_eq!((whole.tile, whole.batch), (None, 4));
        assert_eq!(plan(1024, gib(3)).unwrap().tile, None);
        let mut last = usize::MAX;
        for mib in [1500, 800, 400, 300] {
            let plan = plan(1024, mib << 20).unwrap();
            assert!(plan.bytes() <= mib << 20, "{plan:?}");
            let tile = plan.tile.unwrap();
            assert!(tile <= last && tile.is_multiple_of(TILE_UNIT), "{plan:?}");
            last = tile;
        }
        let error = plan(1024, 10 << 20).unwrap_err();
        assert_eq!(error.exit_code(), 64);
        assert!(error.to_string().contains("MiB, 900 of them"), "{error}");
    }

    const ALL: Budget = Budget { cap: usize::MAX / 2, taken: 0 };

    #[test]
    fn memory_is_bounded_by_the_strip() {
        let blocks = blocks::decoder(&synth::geometry().unwrap());
        let latent = |side: usize| Shape { batch: 1, height: side / 8, width: 64, channels: 32 };
        let slot = |side: usize| Plan::choose(&blocks, latent(side), 32, ALL, Some(64)).unwrap().slot;
        assert_eq!(slot(1024), slot(8192), "a taller image has no larger strips");
        assert!(slot(512) < Plan::choose(&blocks, latent(512), 32, ALL, None).unwrap().slot / 3);
    }
}
