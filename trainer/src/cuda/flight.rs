//! A micro-batch on its way through a step: what it brings, and the device memory that it has meanwhile.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use serenity_cuda::{Mat, Ptr, Ty};
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::{Error, Result};

use super::conditioning::{Conditioning, Embedded};
use super::double::{self, Pair};
use super::inputs::{States, Turns};
use super::plan::{Reserve, Shape};
use super::single;
use crate::model::ops::rope::{Position, Rope};
use crate::model::{MicroBatch, tensor_error};

/// Samples of one resolution with everything explicit.
#[derive(Debug)]
pub struct Sample<'t> {
    /// `[B, S, C]` on the host.
    pub noisy: &'t Tensor,
    /// `[B, L, J]` on the host.
    pub context: &'t Tensor,
    /// `[B, S, C]` on the host, float32, where a loss is wanted.
    pub target: Option<&'t Tensor>,
    /// `[B]` in [0, 1].
    pub timestep: Vec<f32>,
    /// `[B]`, raw.
    pub guidance: Option<Vec<f32>>,
    /// Of text tokens, then of image tokens.
    pub positions: Vec<Position>,
}

impl<'t> Sample<'t> {
    /// Of a micro-batch.
    ///
    /// # Errors
    /// [`Error::Data`] if its tensors are not of three dimensions.
    pub fn of(batch: &'t MicroBatch) -> Result<Self> {
        let (b, _, _) = batch.noisy.dims3().map_err(|e| tensor_error("noisy latents must be [B, S, C]", e))?;
        let (_, text, _) = batch.context.dims3().map_err(|e| tensor_error("text embeddings must be [B, L, J]", e))?;
        Ok(Self {
            noisy: &batch.noisy,
            context: &batch.context,
            target: Some(&batch.target),
            timestep: batch.sigma.clone(),
            guidance: batch.guidance.map(|g| vec![g; b]),
            positions: Rope::positions(text, batch.height, batch.width),
        })
    }

    /// Time and guidance of each sample.
    pub fn times(&self) -> impl Iterator<Item = (f32, Option<f32>)> {
        let guidance = |i: usize| self.guidance.as_ref().and_then(|g| g.get(i).copied());
        self.timestep.iter().enumerate().map(move |(i, t)| (*t, guidance(i)))
    }

    /// `(samples, text tokens, image tokens)`, checked against the model.
    ///
    /// # Errors
    /// [`Error::Data`] if they do not fit it.
    pub fn sizes(&self, g: &TransformerGeometry) -> Result<(usize, usize, usize)> {
        let dims = |t: &Tensor| t.dims3().map_err(|e| tensor_error("a micro-batch's tensor must have three dimensions", e));
        let ((b, image, channels), (b2, text, features)) = (dims(self.noisy)?, dims(self.context)?);
        let wrong = |v: &f32| !(0.0..=1.0).contains(v);
        let fits = b > 0
            && b == b2
            && (channels, features) == (g.in_channels, g.joint_attention_dim)
            && self.positions.len() == text + image
            && self.timestep.len() == b
            && !self.timestep.iter().any(wrong)
            && self.guidance.as_ref().is_none_or(|x| x.len() == b && x.iter().all(|v| v.is_finite()))
            && self.target.is_none_or(|t| t.dims() == [b, image, g.out_channels()] && t.dtype() == DType::F32);
        if fits {
            return Ok((b, text, image));
        }
        Err(Error::data("a micro-batch does not fit the model")
            .expected(format!("{} channels, {} text features, noise levels in 0..1", g.in_channels, g.joint_attention_dim))
            .found(format!("noisy {:?}, context {:?}, noise levels {:?}", self.noisy.dims(), self.context.dims(), self.timestep)))
    }
}

/// What lives for a whole step of one micro-batch.
#[derive(Debug, Clone)]
pub struct FlightSpace {
    /// What every block is conditioned with.
    pub conditioning: Conditioning,
    /// Inputs of the blocks and the output of the last. Streams lie in each as all text rows, then all image rows.
    pub states: States,
    /// With bf16 states: the residual stream itself, float32, all text rows, then all image rows in every block. States are rounded from it.
    pub stream: Option<Mat>,
    /// Of the state that the backward pass has come to. Lies in the stream's memory, which nobody reads any more by then.
    pub gradient: Mat,
    /// Only with several samples: a place to bring streams into joint order or back.
    pub reorder: Option<Mat>,
    /// What the prediction is compared with, float32.
    pub target: Mat,
    /// Of the last projection, float32.
    pub prediction: Mat,
    /// Its gradient.
    pub dprediction: Mat,
    /// One `f64`.
    pub loss: Ptr,
}

impl FlightSpace {
    /// Reserves it beside what is `embedded` of its samples, with block inputs kept as `turns` says.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn new(r: &dyn Reserve, g: &TransformerGeometry, s: &Shape, embedded: &Embedded, turns: Turns) -> Result<Self> {
        let hidden = || r.mat(s.ty, s.rows(), s.inner);
        let stream = if s.ty == Ty::Bf16 { Some(r.mat(Ty::F32, s.rows(), s.inner)?) } else { None };
        Ok(Self {
            conditioning: Conditioning::new(r, s, embedded)?,
            states: States::new(r, s, g.num_blocks() + 1, turns)?,
            stream,
            gradient: stream.map_or_else(hidden, |stream| Ok(Mat::new(stream.ptr, s.ty, s.rows(), s.inner)))?,
            reorder: if s.samples > 1 { Some(hidden()?) } else { None },
            target: r.mat(Ty::F32, s.image_rows(), g.out_channels())?,
            prediction: r.mat(Ty::F32, s.image_rows(), g.out_channels())?,
            dprediction: r.mat(s.ty, s.image_rows(), g.out_channels())?,
            loss: r.bytes(8)?,
        })
    }
}

/// What a micro-batch brings, until it is embedded.
#[derive(Debug, Clone, Copy)]
pub struct EntrySpace {
    /// `[B S, C]` float32.
    pub noisy: Mat,
    /// `[B L, J]`
    pub context: Mat,
    /// The latents' embedder in float32.
    pub embedder: Mat,
}

impl EntrySpace {
    /// Reserves it.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn new(r: &dyn Reserve, g: &TransformerGeometry, s: &Shape) -> Result<Self> {
        Ok(Self {
            noisy: r.mat(Ty::F32, s.image_rows(), g.in_channels)?,
            context: r.mat(s.ty, s.text_rows(), g.joint_attention_dim)?,
            embedder: r.mat(Ty::F32, s.inner, g.in_channels)?,
        })
    }
}

/// What the final projection needs.
#[derive(Debug, Clone, Copy)]
pub struct HeadSpace {
    /// The streams of the last state, where they must be copied.
    pub image: Pair,
    /// Normed image rows, then their gradient, float32.
    pub normed: Mat,
    /// The projection in float32.
    pub projection: Mat,
}

impl HeadSpace {
    /// Reserves it.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn new(r: &dyn Reserve, g: &TransformerGeometry, s: &Shape) -> Result<Self> {
        let rows = |n: usize| r.mat(Ty::F32, n, s.inner);
        // A float32 stream beside bf16 states has its streams apart.
        let copied = |n: usize| rows(if s.ty == Ty::F32 { n } else { 0 });
        Ok(Self {
            image: Pair { image: copied(s.image_rows())?, text: copied(s.text_rows())? },
            normed: rows(s.image_rows())?,
            projection: rows(g.out_channels())?,
        })
    }
}

/// What of a block's activations the forward pass has left for the backward pass.
#[derive(Debug, Clone, Copy)]
pub enum Have<'f> {
    /// They are computed again.
    Nothing,
    /// What has travelled, of a single block.
    Parcel(&'f single::Parcel),
    /// All of them.
    All,
}

/// How a block is gone through backwards.
#[derive(Debug, Clone, Copy)]
pub struct Back<'f> {
    /// Whether the gradient of the block's input is needed.
    pub need_input: bool,
    /// Which activations are there.
    pub have: Have<'f>,
}

impl Back<'_> {
    /// Whether nothing has to be computed again.
    #[must_use]
    pub fn kept(&self) -> bool {
        matches!(self.have, Have::All)
    }
}

/// Activations of a block that are kept from the forward to the backward pass.
#[derive(Debug, Clone, Copy)]
#[allow(clippy::large_enum_variant)] // one for each block at most
pub enum Activations {
    /// Of a double block.
    Double(double::Activations),
    /// Of a single block.
    Single(single::Activations),
}

impl Activations {
    /// Reserves them.
    ///
    /// # Errors
    /// If there is not so much left.
    pub fn new(r: &dyn Reserve, s: &Shape, double: bool) -> Result<Self> {
        if double { double::Activations::new(r, s, true).map(Self::Double) } else { single::Activations::new(r, s).map(Self::Single) }
    }
}

/// A micro-batch under way.
#[derive(Debug)]
pub struct Flight {
    /// Its sizes.
    pub shape: Shape,
    /// Its memory.
    pub space: FlightSpace,
    /// Activations of the blocks that keep them, by block.
    pub kept: HashMap<BlockId, Activations>,
    /// What the blocks whose activations travel take turns in.
    pub parcels: Vec<single::Parcel>,
    /// Its number in the traffic of those.
    pub parcel_traffic: Option<usize>,
    /// Which attention engines fit it.
    pub engines: usize,
    /// Its number in the traffic with the host, where its states are kept for a backward pass.
    pub traffic: Option<usize>,
}
