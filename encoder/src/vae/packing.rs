//! Latents to tokens and back: 2 x 2 pixels of the latent into one token (channel slowest, then row, then column), *then* the batch norm's
//! statistics (`spec/flux2.md` 3). Apart from the networks, so that it can be done on another thread while they compute.

use candle_core::{DType, Device, Tensor};
use serenity_protocol::Result;
use serenity_protocol::cache::LatentEntry;

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
}

impl Packing {
    pub(super) fn read(weights: &VaeWeights, geometry: VaeGeometry) -> Result<Self> {
        let channels = geometry.token_channels();
        let statistic = |name: &str| weights.float32(name, &[channels]);
        let shaped = |values: Vec<f32>| Tensor::from_vec(values, (1, channels, 1, 1), &Device::Cpu).map_err(failed("loading statistics"));
        let deviation = statistic("bn.running_var")?.into_iter().map(|v| (v + geometry.batch_norm_eps as f32).sqrt()).collect();
        let (mean, deviation) = (shaped(statistic("bn.running_mean")?)?, shaped(deviation)?);
        Ok(Self { geometry, mean, deviation })
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

    /// Cache entries of latents `[B, C, h, w]`.
    ///
    /// # Errors
    /// Failures of the tensor library.
    pub fn entries(&self, latents: &Tensor) -> Result<Vec<LatentEntry>> {
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
