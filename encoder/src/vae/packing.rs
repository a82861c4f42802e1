//! Latents to tokens and back: 2 x 2 pixels of the latent into one token (channel slowest, then row, then column), *then* the batch norm's
//! statistics (`spec/flux2.md` 3). Apart from the networks, so that it can be done on another thread while they compute.

use candle_core::{DType, Device, Tensor};
use serenity_protocol::Result;
use serenity_protocol::cache::LatentEntry;

use super::blocks::Shape;
use super::config::VaeGeometry;
use super::names::VaeWeights;
use crate::tensor::failed;

/// Latent pixels of one token on each axis.
pub(super) const PATCH: usize = 2;

/// The batch norm's statistics and what the layout depends on.
pub struct Packing {
    geometry: VaeGeometry,
    /// `[1, 4 * latent_channels, 1, 1]`, float32.
    pub(super) mean: Tensor,
    pub(super) deviation: Tensor,
    /// The same as plain values.
    statistics: (Vec<f32>, Vec<f32>),
}

/// Latents as a device gives them.
pub struct Latents(pub(super) Layout);

pub(super) enum Layout {
    /// `[B, C, h, w]`.
    First(Tensor),
    /// Channels last, of which the first are the latent's and the others are not.
    Last { values: Vec<f32>, shape: Shape },
}

impl Latents {
    /// As `[B, channels, h, w]`.
    ///
    /// # Errors
    /// Failures of the tensor library.
    pub fn tensor(self, channels: usize) -> Result<Tensor> {
        let tensor = match self.0 {
            Layout::First(tensor) => Ok(tensor),
            Layout::Last { values, shape: s } => Tensor::from_vec(values, (s.batch, s.height, s.width, s.channels), &Device::Cpu)
                .and_then(|t| t.narrow(3, 0, channels)?.permute((0, 3, 1, 2))?.contiguous()),
        };
        tensor.map_err(failed("reading latents"))
    }
}

impl Packing {
    pub(super) fn read(weights: &VaeWeights, geometry: VaeGeometry) -> Result<Self> {
        let channels = geometry.token_channels();
        let statistic = |name: &str| weights.float32(name, &[channels]);
        let shaped = |values: Vec<f32>| Tensor::from_vec(values, (1, channels, 1, 1), &Device::Cpu).map_err(failed("loading statistics"));
        let deviation = statistic("bn.running_var")?.into_iter().map(|v| (v + geometry.batch_norm_eps as f32).sqrt()).collect();
        let statistics: (Vec<f32>, Vec<f32>) = (statistic("bn.running_mean")?, deviation);
        let (mean, deviation) = (shaped(statistics.0.clone())?, shaped(statistics.1.clone())?);
        Ok(Self { geometry, mean, deviation, statistics })
    }

    /// The VAE's geometry.
    #[must_use]
    pub fn geometry(&self) -> &VaeGeometry {
        &self.geometry
    }

    /// Latents `[B, C, h, w]` to normalised tokens `[B, h/2 * w/2, 4C]`, float32.
    ///
    /// # Errors
    /// Failures of the tensor library.
    pub fn tokens(&self, latents: &Tensor) -> Result<Tensor> {
        self.tokens_inner(latents).map_err(failed("packing a latent"))
    }

    fn tokens_inner(&self, latents: &Tensor) -> candle_core::Result<Tensor> {
        let (b, c, h, w) = latents.dims4()?;
        let patches = latents.reshape((b, c, h / PATCH, PATCH, w / PATCH, PATCH))?.permute((0, 1, 3, 5, 2, 4))?.contiguous()?;
        let patches = patches.reshape((b, c * PATCH * PATCH, h / PATCH, w / PATCH))?.to_dtype(DType::F32)?;
        patches.broadcast_sub(&self.mean)?.broadcast_div(&self.deviation)?.flatten_from(2)?.transpose(1, 2)?.contiguous()
    }

    /// The inverse of [`Self::tokens`]: tokens `[B, height * width, 4C]` to latents `[B, C, 2 * height, 2 * width]`, float32.
    ///
    /// # Errors
    /// Failures of the tensor library, and shapes that do not fit.
    pub fn latents(&self, tokens: &Tensor, height: usize, width: usize) -> Result<Tensor> {
        let c = self.geometry.latent_channels;
        let unpack = || -> candle_core::Result<Tensor> {
            let (b, _, channels) = tokens.dims3()?;
            let patches = tokens.to_dtype(DType::F32)?.transpose(1, 2)?.contiguous()?.reshape((b, channels, height, width))?;
            let patches = patches.broadcast_mul(&self.deviation)?.broadcast_add(&self.mean)?;
            let split = patches.reshape((b, c, PATCH, PATCH, height, width))?.permute((0, 1, 4, 2, 5, 3))?.contiguous()?;
            split.reshape((b, c, height * PATCH, width * PATCH))
        };
        unpack().map_err(failed("unpacking a latent"))
    }

    /// Cache entries of latents.
    ///
    /// # Errors
    /// Failures of the tensor library.
    pub fn entries(&self, latents: &Latents) -> Result<Vec<LatentEntry>> {
        match &latents.0 {
            Layout::First(tensor) => self.entries_of(tensor),
            Layout::Last { values, shape } => {
                Ok(values.chunks_exact((shape.len() / shape.batch.max(1)).max(1)).map(|v| self.entry(v, *shape)).collect())
            }
        }
    }

    /// The entry of one image in channels-last values, of which the first channels are the latent's: the same bytes as [`Self::entries_of`].
    fn entry(&self, values: &[f32], shape: Shape) -> LatentEntry {
        let (mean, deviation) = &self.statistics;
        let (channels, height, width) = (self.geometry.token_channels(), shape.height / PATCH, shape.width / PATCH);
        let mut tokens = Vec::with_capacity(height * width * channels);
        for token in 0..height * width {
            let (row, column) = (token / width * PATCH, token % width * PATCH);
            for (index, (mean, deviation)) in mean.iter().zip(deviation).enumerate() {
                let (channel, dy, dx) = (index / (PATCH * PATCH), index / PATCH % PATCH, index % PATCH);
                let at = ((row + dy) * shape.width + column + dx) * shape.channels + channel;
                tokens.push((values.get(at).copied().unwrap_or(f32::NAN) - mean) / deviation);
            }
        }
        LatentEntry { channels, height, width, tokens }
    }

    /// Cache entries of latents `[B, C, h, w]`.
    ///
    /// # Errors
    /// Failures of the tensor library.
    pub fn entries_of(&self, latents: &Tensor) -> Result<Vec<LatentEntry>> {
        let (_, _, h, w) = latents.dims4().map_err(failed("reading latents"))?;
        let tokens = self.tokens(latents)?.to_vec3::<f32>().map_err(failed("reading latents"))?;
        let entry = |rows: Vec<Vec<f32>>| LatentEntry {
            channels: self.geometry.token_channels(),
            height: h / PATCH,
            width: w / PATCH,
            tokens: rows.into_iter().flatten().collect(),
        };
        Ok(tokens.into_iter().map(entry).collect())
    }
}
