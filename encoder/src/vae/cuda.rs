//! The VAE on a CUDA device: float32 without TF32, channels last, its own memory.
//!
//! Weights go to the device once. The memory for activations is taken when the first image of a size comes ([`Plan`]) and kept: three buffers
//! for rows, some for the sums of norms, one for the copies that convolutions are made of. Everything is queued on one stream, so a buffer is
//! free for the next layer as soon as the host lets go of it. Biases are not added by the convolution but by the pass that gathers the sums
//! for the next norm ([`Rows::biases`] says which are due).

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

use serenity_cuda::ops::conv::{Conv as DeviceConv, Scratch};
use serenity_cuda::ops::vae::{Norm as DeviceNorm, NormTable, Patches, Strip};
use serenity_cuda::{Arena, Gpu, Mat, Pinned, Ptr, Ty};
use serenity_protocol::{Error, Result};

use super::GROUP_NORM_EPS;
use super::blocks::{Block, ConvSpec, Shape};
use super::memory::{Budget, Plan, SLOTS, SUMS, attention_row_bytes};
use super::names::VaeWeights;
use super::network::Kit;
use crate::pixels::Pixels;

/// Set aside for what the product library loads at first use.
const LIBRARIES: u64 = 256 << 20;
/// Left to others where the configuration names no limit.
const MARGIN: u64 = 256 << 20;
/// The largest context that is believed: on a device that others use too, more than this is theirs.
const CONTEXT_MAX: u64 = 1 << 30;

/// The device with the VAE's weights.
pub(super) struct Cuda {
    gpu: Gpu,
    groups: usize,
    weights: Arena,
    budget: Budget,
    work: RefCell<Option<Work>>,
}

/// An activation in host memory, channels last.
pub(super) enum Host {
    /// What comes from outside.
    Plain(Vec<f32>),
    /// Page-locked, so that strips come and go at the speed of the bus and the host does not wait for them.
    Locked(Locked),
}

/// Page-locked memory that comes back when it is dropped. All copies are queued on one stream: the next user's are behind the last one's.
pub(super) struct Locked {
    memory: Option<Pinned>,
    free: Rc<RefCell<Vec<Pinned>>>,
}

impl Locked {
    fn memory(&self) -> Result<&Pinned> {
        self.memory.as_ref().ok_or_else(|| Error::invariant("page-locked memory was given back while it is in use"))
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        self.free.borrow_mut().extend(self.memory.take());
    }
}

/// Memory for activations.
struct Work {
    plan: Plan,
    slots: Rc<Pool>,
    sums: Rc<Pool>,
    table: Ptr,
    keys: Ptr,
    scratch: Scratch,
    locked: Rc<RefCell<Vec<Pinned>>>,
    /// The host has no more page-locked memory.
    refused: Cell<bool>,
    /// What all of it lies in.
    _arena: Arena,
}

/// Equal buffers that come back when they are dropped.
struct Pool {
    free: RefCell<Vec<Ptr>>,
    bytes: usize,
}

impl Pool {
    fn new(arena: &Arena, count: usize, bytes: usize) -> Result<Rc<Self>> {
        let free = (0..count).map(|_| arena.reserve(bytes)).collect::<Result<Vec<_>>>()?;
        Ok(Rc::new(Self { free: RefCell::new(free), bytes }))
    }

    fn take(self: &Rc<Self>, bytes: usize) -> Result<Buffer> {
        if bytes > self.bytes {
            return Err(Error::invariant("a part of the VAE is larger than planned").expected(self.bytes).found(bytes));
        }
        let none = || Error::invariant("the VAE holds more buffers than planned");
        let ptr = self.free.borrow_mut().pop().ok_or_else(none)?;
        Ok(Buffer { ptr, pool: self.clone() })
    }
}

struct Buffer {
    ptr: Ptr,
    pool: Rc<Pool>,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.free.borrow_mut().push(self.ptr);
    }
}

pub(super) struct Conv {
    conv: DeviceConv,
    spec: ConvSpec,
    bias: Ptr,
}

pub(super) struct Norm {
    weight: Ptr,
    bias: Ptr,
    channels: usize,
}

pub(super) struct Attention {
    norm: Norm,
    /// Weight `[C, C]` and bias of query, key, value and output.
    query: (Mat, Ptr),
    key: (Mat, Ptr),
    value: (Mat, Ptr),
    output: (Mat, Ptr),
}

/// Pixel rows of a batch.
pub(super) struct Rows {
    strip: Strip,
    /// Still to be added: of a convolution and of its shortcut, or null.
    biases: [Ptr; 2],
    _buffer: Buffer,
}

/// `[batch, height, groups, 2]` float64.
pub(super) struct Sums {
    buffer: Buffer,
    shape: Shape,
}

/// `[batch * tokens, C]` each.
pub(super) struct Keys {
    keys: Mat,
    values: Mat,
}

fn shape_of(strip: &Strip) -> Shape {
    Shape { batch: strip.batch, height: strip.height, width: strip.width, channels: strip.channels() }
}

impl Cuda {
    /// Opens device `ordinal` with room for the weights of `halves`; `limit` bounds the process's device memory.
    pub fn open(ordinal: usize, groups: usize, halves: &[Vec<Block>], limit: Option<u64>) -> Result<Self> {
        let gpu = Gpu::open(ordinal).map_err(no_device)?;
        let info = gpu.memory()?;
        let weights = Arena::new(&gpu, halves.iter().flatten().map(weight_bytes).sum::<usize>().max(1))?;
        let used = gpu.memory()?.used_by_process_estimate;
        let context = info.total.saturating_sub(info.free + info.used_by_process_estimate).min(CONTEXT_MAX);
        let free = info.free + info.used_by_process_estimate + context;
        let cap = limit.unwrap_or(u64::MAX).min(free.saturating_sub(MARGIN));
        let bytes = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let budget = Budget { cap: bytes(cap), taken: bytes(context + used + LIBRARIES) };
        Ok(Self { gpu, groups, weights, budget, work: RefCell::default() })
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Takes the memory for images of `input` unless what there is serves; what was chosen.
    pub fn prepare(&self, blocks: &[Block], input: Shape, tile: Option<usize>) -> Result<Plan> {
        let plan = Plan::choose(blocks, input, self.groups, self.budget, tile)?;
        let mut work = self.work.borrow_mut();
        if !work.as_ref().is_some_and(|w| w.plan.holds(&plan)) {
            // The old memory goes first: both together may be too much.
            self.gpu.sync()?;
            *work = None;
            let mib = plan.bytes() >> 20;
            match plan.tile {
                None => tracing::debug!("VAE: {} images at once in {mib} MiB", plan.batch),
                Some(rows) => tracing::info!("images are too large for the device memory allowed: in strips of {rows} rows, in {mib} MiB"),
            }
            *work = Some(Work::new(&self.gpu, plan)?);
        }
        Ok(plan)
    }

    /// The values of an activation in host memory.
    pub fn values(&self, host: Host, shape: Shape) -> Result<Vec<f32>> {
        match host {
            Host::Plain(values) => Ok(values),
            Host::Locked(l) => {
                let mut values = vec![0.0; shape.len()];
                self.gpu.read_f32(&mut values, l.memory()?)?;
                Ok(values)
            }
        }
    }

    /// Images of one size on the device; `None` if there is no room for their bytes beside their values.
    pub fn pixels(&self, images: &[&Pixels], shape: Shape) -> Result<Option<Rows>> {
        let bytes: Vec<u8> = images.iter().flat_map(|p| p.rgb.iter().copied()).collect();
        let scratch = self.work(|w| Ok(w.scratch))?;
        if bytes.len() > scratch.bytes || bytes.len() != shape.len() {
            return Ok(None);
        }
        let to = self.rows(shape, &(0..shape.height))?;
        self.gpu.upload(scratch.ptr, &bytes)?;
        self.gpu.vae_pixels(to.strip.mat, scratch.ptr)?;
        Ok(Some(to))
    }

    fn work<T>(&self, with: impl FnOnce(&Work) -> Result<T>) -> Result<T> {
        let work = self.work.borrow();
        with(work.as_ref().ok_or_else(|| Error::invariant("the VAE has no device memory yet"))?)
    }

    fn store(&self, values: &[f32], rows: usize, cols: usize, stride: usize) -> Result<Mat> {
        let mat = Mat { stride, ..Mat::new(self.weights.reserve(4 * rows * stride)?, Ty::F32, rows, cols) };
        if stride == cols {
            self.gpu.upload_f32(mat.ptr, values)?;
            return Ok(mat);
        }
        let mut spread = vec![0.0; rows * stride];
        for (to, from) in spread.chunks_exact_mut(stride).zip(values.chunks_exact(cols.max(1))) {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        }
        self.gpu.upload_f32(mat.ptr, &spread)?;
        Ok(mat)
    }

    fn vector(&self, w: &VaeWeights, name: &str, len: usize) -> Result<Ptr> {
        Ok(self.store(&w.float32(name, &[len])?, 1, len, len)?.ptr)
    }

    /// Rows in a buffer of their own.
    fn rows(&self, shape: Shape, rows: &Range<usize>) -> Result<Rows> {
        let Shape { batch, height, width, channels } = shape;
        let pixels = batch * rows.len() * width;
        let buffer = self.work(|w| w.slots.take(4 * pixels * channels))?;
        let mat = Mat::new(buffer.ptr, Ty::F32, pixels, channels);
        let strip = Strip { mat, batch, rows: rows.len(), width, first: rows.start, height };
        Ok(Rows { strip, biases: [Ptr::NULL; 2], _buffer: buffer })
    }

    /// The table of a norm, from the sums of the whole activation. It is in use until the next one is made, on the same stream.
    fn table(&self, norm: &Norm, sums: &Sums, silu: bool) -> Result<DeviceNorm> {
        let Shape { batch, height, width, channels } = sums.shape;
        if channels != norm.channels {
            return Err(Error::invariant("a norm has the sums of something else").expected(norm.channels).found(channels));
        }
        let table = self.work(|w| Ok(w.table))?;
        let (weight, bias, groups, eps) = (norm.weight, norm.bias, self.groups, GROUP_NORM_EPS);
        self.gpu.vae_norm_table(&NormTable { table, sums: sums.buffer.ptr, weight, bias, batch, height, width, groups, channels, eps })?;
        Ok(DeviceNorm { table, silu })
    }

    /// Rows `start..end` of all pixels of one image of `x`, normalised, at the start of the scratch memory.
    fn normed(&self, x: &Strip, image: usize, norm: DeviceNorm, (start, end): (usize, usize)) -> Result<Mat> {
        let channels = x.channels();
        let scratch = self.work(|w| Ok(w.scratch))?;
        let out = Mat::new(scratch.ptr, Ty::F32, end - start, channels);
        // As one row of pixels, for pieces need not be whole rows.
        let mat = x.mat.rows(image * x.rows * x.width + start, end - start)?;
        let line = Strip { mat, batch: 1, rows: 1, width: end - start, first: 0, height: 1 };
        let norm = DeviceNorm { table: norm.table.offset(image * 12 * channels), ..norm };
        let p = Patches { taps: [1, 1], stride: 1, up: false, pad_left: 0, top: 0, rows: 1, start: 0, width: end - start };
        self.gpu.vae_patches(out, line, Some(norm), p)?;
        Ok(out)
    }

    fn linear(&self, out: Mat, x: Mat, (weight, bias): (Mat, Ptr)) -> Result<()> {
        self.gpu.gemm_nt(out, x, weight, 1.0, 0.0)?;
        let line = Strip { mat: out, batch: 1, rows: out.rows, width: 1, first: 0, height: out.rows };
        self.gpu.vae_finish(line, [bias, Ptr::NULL], None)
    }

    /// Pieces of `tokens` rows that the scratch memory has room for.
    fn pieces(&self, tokens: usize, of: usize, channels: usize) -> Result<Vec<(usize, usize)>> {
        let bytes = self.work(|w| Ok(w.scratch.bytes))?;
        let most = bytes / attention_row_bytes(of, channels);
        if most == 0 {
            return Err(Error::invariant("the scratch memory holds no row of the attention").found(bytes));
        }
        Ok((0..tokens).step_by(most).map(|start| (start, (start + most).min(tokens))).collect())
    }
}

/// A missing driver or device, with what to do about it in the encoder.
fn no_device(e: Error) -> Error {
    match e {
        Error::Absent(_) => {
            e.or_advice("encode on a machine with an NVIDIA GPU (\"encoder\": {\"host\": ...}), or set \"train_device\" (of an encoding host: \"encoder.device\") to \"cpu\"")
        }
        other => other,
    }
}

impl Work {
    fn new(gpu: &Gpu, plan: Plan) -> Result<Self> {
        let arena = Arena::new(gpu, plan.bytes())?;
        Ok(Self {
            plan,
            slots: Pool::new(&arena, SLOTS, plan.slot)?,
            sums: Pool::new(&arena, SUMS, plan.sums)?,
            table: arena.reserve(plan.table)?,
            keys: arena.reserve(plan.keys)?,
            scratch: Scratch { ptr: arena.reserve(plan.scratch)?, bytes: plan.scratch },
            locked: Rc::default(),
            refused: Cell::new(false),
            _arena: arena,
        })
    }
}

/// Bytes that a block's weights take in the arena.
fn weight_bytes(block: &Block) -> usize {
    let align = |floats: usize| (4 * floats).next_multiple_of(serenity_cuda::arena::ALIGNMENT);
    let conv = |c: &ConvSpec| align(c.output * DeviceConv::stride_of(c.taps, c.input)) + align(c.output);
    match block {
        Block::Conv { norm, conv: c } => conv(c) + norm.as_ref().map_or(0, |_| 2 * align(c.input)),
        Block::Resnet { convs: [c1, c2], shortcut, .. } => {
            conv(c1) + conv(c2) + shortcut.as_ref().map_or(0, conv) + 2 * align(c1.input) + 2 * align(c2.input)
        }
        Block::Attention { channels, .. } => 4 * (align(channels * channels) + align(*channels)) + 2 * align(*channels),
    }
}

/// `[output, input, taps, taps]` to `[output, taps, taps, input]`.
fn channels_last(values: &[f32], spec: &ConvSpec) -> Vec<f32> {
    let taps = spec.taps * spec.taps;
    let mut out = vec![0.0; values.len()];
    for (to, from) in out.chunks_exact_mut(taps * spec.input).zip(values.chunks_exact(taps * spec.input)) {
        for (channel, from) in from.chunks_exact(taps).enumerate() {
            to.iter_mut().skip(channel).step_by(spec.input).zip(from).for_each(|(to, from)| *to = *from);
        }
    }
    out
}

impl Kit for Cuda {
    type Conv = Conv;
    type Norm = Norm;
    type Attention = Attention;
    type Rows = Rows;
    type Host = Host;
    type Sums = Sums;
    type Keys = Keys;

    fn load_conv(&self, w: &VaeWeights, spec: &ConvSpec) -> Result<Conv> {
        let ConvSpec { name, input, output, taps, stride, up } = spec;
        let values = w.float32(&format!("{name}.weight"), &[*output, *input, *taps, *taps])?;
        let row = DeviceConv::stride_of(*taps, *input);
        let weight = self.store(&channels_last(&values, spec), *output, taps * taps * input, row)?;
        let conv = DeviceConv { weight, taps: *taps, stride: *stride, up: *up };
        Ok(Conv { conv, spec: spec.clone(), bias: self.vector(w, &format!("{name}.bias"), *output)? })
    }

    fn load_norm(&self, w: &VaeWeights, name: &str, channels: usize) -> Result<Norm> {
        let vector = |part: &str| self.vector(w, &format!("{name}.{part}"), channels);
        Ok(Norm { weight: vector("weight")?, bias: vector("bias")?, channels })
    }

    fn load_attention(&self, w: &VaeWeights, name: &str, channels: usize) -> Result<Attention> {
        let linear = |part: &str| -> Result<(Mat, Ptr)> {
            let values = w.float32(&format!("{name}.{part}.weight"), &[channels, channels])?;
            Ok((self.store(&values, channels, channels, channels)?, self.vector(w, &format!("{name}.{part}.bias"), channels)?))
        };
        Ok(Attention {
            norm: self.load_norm(w, &format!("{name}.group_norm"), channels)?,
            query: linear("to_q")?,
            key: linear("to_k")?,
            value: linear("to_v")?,
            output: linear("to_out.0")?,
        })
    }

    fn blank(&self, shape: Shape) -> Result<Host> {
        self.work(|w| {
            if w.plan.tile.is_none() || 4 * shape.len() > w.plan.host {
                return Ok(Host::Plain(vec![0.0; shape.len()]));
            }
            let found = w.locked.borrow_mut().pop();
            if found.is_none() && w.refused.get() {
                return Ok(Host::Plain(vec![0.0; shape.len()]));
            }
            match found.map_or_else(|| Pinned::new(self.gpu.context(), w.plan.host), Ok) {
                Ok(memory) => Ok(Host::Locked(Locked { memory: Some(memory), free: w.locked.clone() })),
                Err(Error::TryAgain(e)) => {
                    tracing::warn!("strips of images go through memory that is not page-locked, which is slower: {}", Error::TryAgain(e));
                    w.refused.set(true);
                    Ok(Host::Plain(vec![0.0; shape.len()]))
                }
                Err(e) => Err(e),
            }
        })
    }

    fn read(&self, host: &Host, shape: Shape, rows: Range<usize>) -> Result<Rows> {
        let (to, span) = (self.rows(shape, &rows)?, span(shape, &rows)?);
        match host {
            Host::Plain(values) => self.gpu.upload_f32(to.strip.mat.ptr, values.get(span).ok_or_else(beyond)?)?,
            Host::Locked(l) => self.gpu.compute().copy_in(to.strip.mat.ptr, l.memory()?, 4 * span.start, 4 * span.len())?,
        }
        Ok(to)
    }

    fn write(&self, host: &mut Host, shape: Shape, rows: &Rows) -> Result<()> {
        let span = span(shape, &(rows.strip.first..rows.strip.first + rows.strip.rows))?;
        match host {
            Host::Plain(values) => self.gpu.download_f32(values.get_mut(span).ok_or_else(beyond)?, rows.strip.mat.ptr),
            Host::Locked(l) => self.gpu.compute().copy_out(l.memory()?, 4 * span.start, rows.strip.mat.ptr, 4 * span.len()),
        }
    }

    fn sums(&self, shape: Shape) -> Result<Sums> {
        let buffer = self.work(|w| w.sums.take(shape.batch * shape.height * self.groups * 16))?;
        Ok(Sums { buffer, shape })
    }

    fn conv(&self, conv: &Conv, x: &Rows, norm: Option<(&Norm, &Sums)>, out: Range<usize>, onto: Option<Rows>) -> Result<Rows> {
        let norm = norm.map(|(norm, sums)| self.table(norm, sums, true)).transpose()?;
        let accumulate = onto.is_some();
        let mut y = match onto {
            Some(base) => base,
            None => self.rows(conv.spec.output(shape_of(&x.strip)), &out)?,
        };
        let scratch = self.work(|w| Ok(w.scratch))?;
        self.gpu.convolve(y.strip, x.strip, &conv.conv, norm, accumulate, scratch)?;
        let [due, none] = y.biases;
        if none != Ptr::NULL {
            return Err(Error::invariant("more biases are due than a pass adds"));
        }
        y.biases = [conv.bias, due];
        Ok(y)
    }

    fn finish(&self, rows: Rows, sums: Option<&mut Sums>) -> Result<Rows> {
        self.gpu.vae_finish(rows.strip, rows.biases, sums.map(|s| (s.buffer.ptr, self.groups)))?;
        Ok(Rows { biases: [Ptr::NULL; 2], ..rows })
    }

    fn keys(&self, shape: Shape) -> Result<Keys> {
        let (rows, channels) = (shape.batch * shape.height * shape.width, shape.channels);
        let (ptr, bytes) = self.work(|w| Ok((w.keys, w.plan.keys)))?;
        if 8 * rows * channels > bytes {
            return Err(Error::invariant("keys and values are larger than planned").expected(bytes).found(8 * rows * channels));
        }
        let mat = |offset| Mat::new(ptr.offset(offset), Ty::F32, rows, channels);
        Ok(Keys { keys: mat(0), values: mat(4 * rows * channels) })
    }

    fn add_keys(&self, a: &Attention, x: &Rows, sums: &Sums, keys: &mut Keys) -> Result<()> {
        let (norm, x) = (self.table(&a.norm, sums, false)?, &x.strip);
        let (tokens, here) = (x.height * x.width, x.rows * x.width);
        for image in 0..x.batch {
            for (start, end) in self.pieces(here, tokens, x.channels())? {
                let normed = self.normed(x, image, norm, (start, end))?;
                let first = image * tokens + x.first * x.width + start;
                self.linear(keys.keys.rows(first, end - start)?, normed, a.key)?;
                self.linear(keys.values.rows(first, end - start)?, normed, a.value)?;
            }
        }
        Ok(())
    }

    fn attend(&self, a: &Attention, x: Rows, sums: &Sums, keys: &Keys) -> Result<Rows> {
        let (norm, strip) = (self.table(&a.norm, sums, false)?, &x.strip);
        let (tokens, here, channels) = (strip.height * strip.width, strip.rows * strip.width, strip.channels());
        for image in 0..strip.batch {
            let (key, value) = (keys.keys.rows(image * tokens, tokens)?, keys.values.rows(image * tokens, tokens)?);
            for (start, end) in self.pieces(here, tokens, channels)? {
                let rows = end - start;
                let normed = self.normed(strip, image, norm, (start, end))?;
                let query = Mat::new(normed.ptr.offset(4 * rows * channels), Ty::F32, rows, channels);
                let stride = tokens.next_multiple_of(4);
                let scores = Mat { stride, ..Mat::new(query.ptr.offset(4 * rows * channels), Ty::F32, rows, tokens) };
                self.linear(query, normed, a.query)?;
                self.gpu.gemm_nt(scores, query, key, (channels as f32).powf(-0.5), 0.0)?;
                self.gpu.softmax_rows(scores)?;
                // What was normalised is not needed any more.
                self.gpu.gemm_nn(normed, scores, value, 1.0, 0.0)?;
                self.gpu.gemm_nt(strip.mat.rows(image * here + start, rows)?, normed, a.output.0, 1.0, 1.0)?;
            }
        }
        Ok(Rows { biases: [a.output.1, Ptr::NULL], ..x })
    }
}

fn beyond() -> Error {
    Error::invariant("a strip lies beyond its image")
}

/// Where rows of an activation lie in host memory; of several images only all rows are in one piece.
fn span(shape: Shape, rows: &Range<usize>) -> Result<Range<usize>> {
    match shape.batch {
        1 => Ok(rows.start * shape.row()..rows.end * shape.row()),
        _ if *rows == (0..shape.height) => Ok(0..shape.len()),
        _ => Err(Error::invariant("images of a batch cannot be cut into strips")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_turned_to_channels_last() {
        let spec = ConvSpec { name: String::new(), input: 2, output: 2, taps: 3, stride: 1, up: false };
        let values: Vec<f32> = (0..36u8).map(f32::from).collect();
        let turned = channels_last(&values, &spec);
        // Output 1, kernel position 4, input 1.
        assert_eq!(turned.get(18 + 4 * 2 + 1), values.get(18 + 9 + 4));
        assert_eq!(turned.get(..4), Some([0.0, 9.0, 1.0, 10.0].as_slice()));
    }
}
