//! Attention by the crate's own kernels (`kernels/attention.cu`, `kernels/attention_f32.cu`): on any device of compute capability 8.0 or later, with
//! no library besides the driver.
//!
//! bf16 runs on tensor cores with tiles chosen by the shared memory that the device has; float32 runs on plain arithmetic and is meant for
//! comparisons at small sizes. The backward pass needs one float32 per row and head of workspace.
#![forbid(unsafe_code)]

use serenity_protocol::{Error, Result};

use super::{AttentionShape, Gradients, Inputs};
use crate::driver::{Arg, Ptr};
use crate::gpu::Gpu;
use crate::mat::{Mat, Ty};

/// Shared memory per block from which on the wide tiles run two blocks per multiprocessor (Hopper, data-centre Blackwell).
const WIDE_SHARED_BYTES: u32 = 200 << 10;

/// The largest head that the kernels have registers for.
const HEAD_DIM_MAX: usize = 128;

/// One kernel: rows of the result per block, threads, dynamic shared memory.
#[derive(Debug, Clone, Copy)]
struct Tile {
    name: &'static str,
    rows: usize,
    threads: u32,
    shared: u32,
}

/// The kernels of one shape. Sizes repeat those of the instances at the end of `attention.cu`.
#[derive(Debug, Clone, Copy)]
struct Kernels {
    forward: Tile,
    delta: Tile,
    keys: Tile,
    queries: Tile,
}

/// Bytes of a forward block: a tile of `queries` rows, one of keys and one of values.
const fn forward_shared(width: u32, queries: u32, keys: u32) -> u32 {
    (queries + 2 * keys) * width * 2
}

/// Bytes of a dK/dV block: keys and values of `own` rows, and per stage queries, output gradients, log-sum-exp and row sums of 64 rows.
const fn keys_shared(width: u32, own: u32, stages: u32) -> u32 {
    2 * own * width * 2 + stages * (2 * 64 * width * 2 + 2 * 64 * 4)
}

/// Bytes of a dQ block: queries and output gradients of `own` rows, and per stage 64 keys and values.
const fn queries_shared(width: u32, own: u32, stages: u32) -> u32 {
    2 * own * width * 2 + stages * 2 * 64 * width * 2
}

const DELTA: Tile = Tile { name: "attention_delta", rows: 8, threads: 256, shared: 0 };

const F32: Kernels = {
    const fn tile(name: &'static str) -> Tile {
        Tile { name, rows: 4, threads: 128, shared: 0 }
    }
    Kernels {
        forward: tile("attention_f32_forward"),
        delta: tile("attention_f32_delta"),
        keys: tile("attention_f32_keys"),
        queries: tile("attention_f32_queries"),
    }
};

const BF16_32: Kernels = Kernels {
    forward: Tile { name: "attention_forward_32", rows: 128, threads: 128, shared: forward_shared(32, 128, 64) },
    delta: DELTA,
    keys: Tile { name: "attention_keys_32", rows: 64, threads: 128, shared: keys_shared(32, 64, 2) },
    queries: Tile { name: "attention_queries_32", rows: 64, threads: 128, shared: queries_shared(32, 64, 2) },
};

const BF16_64: Kernels = Kernels {
    forward: Tile { name: "attention_forward_64", rows: 128, threads: 128, shared: forward_shared(64, 128, 64) },
    delta: DELTA,
    keys: Tile { name: "attention_keys_64", rows: 64, threads: 128, shared: keys_shared(64, 64, 2) },
    queries: Tile { name: "attention_queries_64", rows: 64, threads: 128, shared: queries_shared(64, 64, 2) },
};

const BF16_128_WIDE: Kernels = Kernels {
    forward: Tile { name: "attention_forward_128_wide", rows: 128, threads: 128, shared: forward_shared(128, 128, 64) },
    delta: DELTA,
    keys: Tile { name: "attention_keys_128_wide", rows: 64, threads: 128, shared: keys_shared(128, 64, 2) },
    queries: Tile { name: "attention_queries_128_wide", rows: 64, threads: 128, shared: queries_shared(128, 64, 2) },
};

const BF16_128_NARROW: Kernels = Kernels {
    forward: Tile { name: "attention_forward_128_narrow", rows: 128, threads: 128, shared: forward_shared(128, 128, 32) },
    delta: DELTA,
    keys: Tile { name: "attention_keys_128_narrow", rows: 128, threads: 256, shared: keys_shared(128, 128, 1) },
    queries: Tile { name: "attention_queries_128_narrow", rows: 128, threads: 256, shared: queries_shared(128, 128, 1) },
};

impl Kernels {
    fn choose(shape: &AttentionShape, shared_bytes_max: u32) -> Result<Self> {
        if shape.head_dim == 0 || shape.head_dim > HEAD_DIM_MAX || (shape.ty == Ty::Bf16 && !shape.head_dim.is_multiple_of(8)) {
            return Err(Error::config("the attention kernels have no such head size")
                .expected(format!("a multiple of 8 up to {HEAD_DIM_MAX}"))
                .found(shape.head_dim));
        }
        Ok(match (shape.ty, shape.head_dim) {
            (Ty::F32, _) => F32,
            (Ty::Bf16, ..=32) => BF16_32,
            (Ty::Bf16, ..=64) => BF16_64,
            (Ty::Bf16, _) if shared_bytes_max >= WIDE_SHARED_BYTES => BF16_128_WIDE,
            (Ty::Bf16, _) => BF16_128_NARROW,
        })
    }

    fn all(&self) -> [Tile; 4] {
        [self.forward, self.delta, self.keys, self.queries]
    }
}

/// Pointers and strides of a launch; what a kernel does not use is null.
#[derive(Debug, Clone, Copy)]
struct Operands {
    q: Mat,
    k: Mat,
    v: Mat,
    out: Mat,
    lse: Mat,
    gradients: Option<Gradients>,
    delta: Ptr,
}

/// The own kernels for one shape.
#[derive(Debug, Clone, Copy)]
pub(super) struct Own {
    kernels: Kernels,
}

impl Own {
    /// # Errors
    /// [`Error::Config`] for a head size without kernel; [`Error::Absent`] for a device with too little shared memory.
    pub(super) fn new(gpu: &Gpu, shape: &AttentionShape) -> Result<Self> {
        let most = gpu.properties().shared_bytes_max;
        let kernels = Kernels::choose(shape, most)?;
        for tile in kernels.all() {
            if tile.shared > most {
                return Err(Error::absent("the device has too little shared memory for attention")
                    .expected(format!("{} bytes", tile.shared))
                    .found(format!("{most} bytes")));
            }
            if tile.shared > 48 << 10 {
                gpu.kernel(tile.name)?.allow_shared(gpu.context(), tile.shared)?;
            }
        }
        Ok(Self { kernels })
    }

    /// Bytes of workspace of the backward pass.
    pub(super) fn backward_workspace_bytes(shape: &AttentionShape) -> usize {
        shape.batch * shape.heads * shape.tokens * size_of::<f32>()
    }

    /// # Errors
    /// The driver's.
    pub(super) fn forward(&self, gpu: &Gpu, shape: &AttentionShape, inputs: Inputs, out: Mat, lse: Mat) -> Result<()> {
        let Inputs { q, k, v } = inputs;
        let operands = Operands { q, k, v, out, lse, gradients: None, delta: Ptr::NULL };
        launch(gpu, shape, self.kernels.forward, &operands)
    }

    /// # Errors
    /// The driver's.
    pub(super) fn backward(
        &self,
        gpu: &Gpu,
        shape: &AttentionShape,
        inputs: Inputs,
        (out, lse): (Mat, Mat),
        gradients: Gradients,
        workspace: Ptr,
    ) -> Result<()> {
        let Inputs { q, k, v } = inputs;
        let operands = Operands { q, k, v, out, lse, gradients: Some(gradients), delta: workspace };
        launch(gpu, shape, self.kernels.delta, &operands)?;
        launch(gpu, shape, self.kernels.keys, &operands)?;
        launch(gpu, shape, self.kernels.queries, &operands)
    }
}

/// One kernel over all rows, heads and samples; parameters in the order of `PARAMETERS` in `attention.cu`.
fn launch(gpu: &Gpu, shape: &AttentionShape, tile: Tile, o: &Operands) -> Result<()> {
    let number = |value: usize| i32::try_from(value).map_err(|_| Error::invariant("attention is too large for a kernel").found(value));
    let none = Mat::new(Ptr::NULL, shape.ty, 0, 0);
    let g = o.gradients.unwrap_or(Gradients { dout: none, dq: none, dk: none, dv: none });
    let pointers = [o.q, o.k, o.v, o.out, g.dout, o.out, g.dq, g.dk, g.dv, o.lse].map(|m| Arg::from(m.ptr));
    let strides = [o.q, o.k, o.v, o.out, g.dout, g.dq, g.dk, g.dv].map(|m| Arg::from(m.stride));
    let sizes = [shape.tokens, shape.heads, shape.head_dim, usize::from(shape.causal)];
    let mut args = pointers.to_vec();
    args.push(o.delta.into());
    args.extend(strides);
    for size in sizes {
        args.push(number(size)?.into());
    }
    args.push(shape.scale().into());
    // The bf16 row sums take tokens and heads in one dimension of the grid, everything else one head per block.
    let (units, heads) = if tile.name == DELTA.name { (shape.tokens * shape.heads, 1) } else { (shape.tokens, shape.heads) };
    let size = |value: usize| u32::try_from(value).map_err(|_| Error::invariant("attention is too large for a launch").found(value));
    let grid = [size(units.div_ceil(tile.rows))?, size(heads)?, size(shape.batch)?];
    gpu.launch(tile.name, grid, [tile.threads, 1, 1], tile.shared, &args)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    const SOURCE: &str = include_str!("../../kernels/attention.cu");

    /// The line of an instance: its template's name and numbers, and its launch bounds.
    fn instance(name: &str) -> (String, Vec<u32>, [u32; 2]) {
        let line = SOURCE.lines().find(|l| l.contains(&format!("void {name}("))).unwrap_or_else(|| panic!("{name} is not in the source"));
        let numbers = |text: &str| text.split(',').map(|n| n.trim().parse().unwrap()).collect::<Vec<u32>>();
        let between = |from: &str, to: &str| line.split_once(from).unwrap().1.split_once(to).unwrap().0;
        let bounds = numbers(between("__launch_bounds__(", ")"));
        let body = between("{ ", "(ARGUMENTS)");
        let (template, parameters) = body.split_once('<').map_or((body, Vec::new()), |(t, n)| (t, numbers(n.trim_end_matches('>'))));
        (template.to_string(), parameters, [bounds[0], bounds[1]])
    }

    #[test]
    fn the_table_agrees_with_the_instances() {
        for kernels in [BF16_32, BF16_64, BF16_128_WIDE, BF16_128_NARROW] {
            let (template, n, bounds) = instance(kernels.forward.name);
            let [width, groups, warps, keys] = n[..] else { panic!("{n:?}") };
            assert_eq!((template.as_str(), bounds[0]), ("attention_forward", warps * 32));
            assert_eq!(kernels.forward.threads, warps * 32);
            assert_eq!(kernels.forward.rows, (warps * 16 * groups) as usize);
            assert_eq!(kernels.forward.shared, forward_shared(width, warps * 16 * groups, keys));
            let (template, n, bounds) = instance(kernels.keys.name);
            let [w, warps, tile, stages] = n[..] else { panic!("{n:?}") };
            assert_eq!((template.as_str(), bounds[0], w, tile), ("attention_backward_keys", warps * 32, width, 64));
            assert_eq!((kernels.keys.threads, kernels.keys.rows), (warps * 32, (warps * 16) as usize));
            assert_eq!(kernels.keys.shared, keys_shared(width, warps * 16, stages));
            let (template, n, bounds) = instance(kernels.queries.name);
            let [w, warps, tile, stages] = n[..] else { panic!("{n:?}") };
            assert_eq!((template.as_str(), bounds[0], w, tile), ("attention_backward_queries", warps * 32, width, 64));
            assert_eq!((kernels.queries.threads, kernels.queries.rows), (warps * 32, (warps * 16) as usize));
            assert_eq!(kernels.queries.shared, queries_shared(width, warps * 16, stages));
        }
    }

    #[test]
    fn blocks_fit_the_shared_memory_of_every_generation() {
        let shape = |head_dim, ty| AttentionShape::dense(1, 1, 7, head_dim, ty);
        // Largest block and all of a multiprocessor, KiB: Ampere 8.0, 8.6, Ada 8.9, Hopper 9.0, Blackwell 10.0 and 12.0.
        for (block, all, capability) in [(163, 164, 80), (99, 100, 86), (99, 100, 89), (227, 228, 90), (227, 228, 100), (99, 100, 120)] {
            for head_dim in (8..=128).step_by(8) {
                let kernels = Kernels::choose(&shape(head_dim, Ty::Bf16), block << 10).unwrap();
                for tile in kernels.all() {
                    assert!(tile.shared <= block << 10, "{} on {capability}", tile.name);
                    let [_, per_multiprocessor] = instance(tile.name).2;
                    // A block costs 1 KiB besides what it asks for.
                    assert!(capability < 90 || per_multiprocessor * (tile.shared + 1024) <= all << 10, "{} on {capability}", tile.name);
                }
            }
        }
        assert!(Kernels::choose(&shape(136, Ty::Bf16), 227 << 10).is_err());
        assert!(Kernels::choose(&shape(20, Ty::Bf16), 227 << 10).is_err());
        assert!(Kernels::choose(&shape(20, Ty::F32), 227 << 10).is_ok());
    }
}
