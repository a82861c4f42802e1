//! The VAE of FLUX.2: image to latent and back, and latent to the tokens that the transformer sees.
//!
//! [`config`] is its geometry, `names` the two spellings of its tensors, `layers` the parts, `networks` encoder and decoder made of
//! them, and this file the way from the encoder's output to tokens: the mean of the posterior (no sampling), 2 x 2 pixels of the latent
//! into one token (channel slowest, then row, then column), *then* the batch norm's statistics (`spec/flux2.md` 3).

pub mod config;
mod layers;
mod names;
mod networks;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serenity_protocol::cache::LatentEntry;
use serenity_protocol::{Error, Result};

use self::config::VaeGeometry;
use self::names::VaeWeights;
use self::networks::{Decoder, Encoder};
use crate::tensor::failed;

/// Latent pixels of one token on each axis.
const PATCH: usize = 2;
/// Pixels of one latent pixel on each axis.
const DOWNSAMPLING: usize = 8;

/// The VAE of a model, or the half of it that was asked for.
pub struct Vae {
    geometry: VaeGeometry,
    encoder: Option<Encoder>,
    decoder: Option<Decoder>,
    /// `[1, 4 * latent_channels, 1, 1]`, float32.
    mean: Tensor,
    deviation: Tensor,
    device: Device,
    dtype: DType,
}

/// Which half of the VAE to load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// Images to latents.
    Encoder,
    /// Latents to images.
    Decoder,
    /// Both.
    Both,
}

impl Vae {
    /// Loads the VAE at `path`, a folder in the Hugging Face layout or a single file in either naming.
    ///
    /// # Errors
    /// [`Error::Absent`] for missing files, [`Error::Data`] for files that are no FLUX.2 VAE.
    pub fn open(path: &Path, half: Half, device: Device, dtype: DType) -> Result<Self> {
        let weights = VaeWeights::open(path, device.clone(), dtype)?;
        let geometry = VaeGeometry::read(path, &weights)?;
        let channels = geometry.token_channels();
        // The statistics stay in float32 whatever the network computes in.
        let statistic = |name: &str| weights.float32(name, &[channels]);
        let shaped = |values: Vec<f32>| Tensor::from_vec(values, (1, channels, 1, 1), &device).map_err(failed("loading statistics"));
        let deviation = statistic("bn.running_var")?.into_iter().map(|v| (v + geometry.batch_norm_eps as f32).sqrt()).collect();
        let (mean, deviation) = (shaped(statistic("bn.running_mean")?)?, shaped(deviation)?);
        let encoder = (half != Half::Decoder).then(|| Encoder::load(&weights, &geometry)).transpose()?;
        let decoder = (half != Half::Encoder).then(|| Decoder::load(&weights, &geometry)).transpose()?;
        Ok(Self { geometry, encoder, decoder, mean, deviation, device, dtype })
    }

    /// Its geometry.
    #[must_use]
    pub fn geometry(&self) -> &VaeGeometry {
        &self.geometry
    }

    /// Where it computes.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What it computes in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The mean of the posterior: images `[B, 3, H, W]` in -1 to 1, H and W multiples of 16, to `[B, latent_channels, H/8, W/8]`.
    ///
    /// # Errors
    /// [`Error::Data`] for sizes that are no multiple of 16; failures of the device.
    pub fn latent_mode(&self, images: &Tensor) -> Result<Tensor> {
        let encoder = self.encoder.as_ref().ok_or_else(|| Error::invariant("this VAE was loaded without its encoder"))?;
        let (_, _, height, width) = images.dims4().map_err(failed("reading images"))?;
        let unit = PATCH * DOWNSAMPLING;
        if !height.is_multiple_of(unit) || !width.is_multiple_of(unit) || height * width == 0 {
            return Err(Error::data("an image's sides must be multiples of 16").found(format!("{width} x {height} pixels")));
        }
        let moments = encoder.forward(images).map_err(failed("the VAE encoder"))?;
        moments.narrow(1, 0, self.geometry.latent_channels).map_err(failed("the VAE encoder"))
    }

    /// Latents `[B, C, h, w]` to normalised tokens `[B, h/2 * w/2, 4C]`, float32.
    ///
    /// # Errors
    /// Failures of the device.
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
    /// Failures of the device, and shapes that do not fit.
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

    /// Images `[B, 3, 8h, 8w]` in about -1 to 1 from latents `[B, C, h, w]`.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let decoder = self.decoder.as_ref().ok_or_else(|| Error::invariant("this VAE was loaded without its decoder"))?;
        latents.to_dtype(self.dtype).and_then(|l| decoder.forward(&l)).map_err(failed("the VAE decoder"))
    }

    /// Cache entries of images `[B, 3, H, W]`.
    ///
    /// # Errors
    /// As [`Self::latent_mode`].
    pub fn encode(&self, images: &Tensor) -> Result<Vec<LatentEntry>> {
        let _span = tracing::trace_span!("encode images").entered();
        let latents = self.latent_mode(images)?;
        let (_, _, h, w) = latents.dims4().map_err(failed("reading latents"))?;
        let tokens = self.tokens(&latents)?.to_device(&Device::Cpu).and_then(|t| t.to_vec3::<f32>()).map_err(failed("reading latents"))?;
        let entry = |rows: Vec<Vec<f32>>| LatentEntry {
            channels: self.geometry.token_channels(),
            height: h / PATCH,
            width: w / PATCH,
            tokens: rows.into_iter().flatten().collect(),
        };
        Ok(tokens.into_iter().map(entry).collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use serenity_protocol::checkpoint::Checkpoint;

    use super::*;

    const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/goldens");

    fn open(path: &Path) -> Vae {
        Vae::open(path, Half::Both, Device::Cpu, DType::F32).unwrap()
    }

    /// The golden VAE as a single file in the BFL naming, attention's linears as 1 x 1 convolutions.
    fn write_bfl(from: &Path, to: &Path) {
        let source = Checkpoint::open(from).unwrap();
        let names: Vec<String> = source.names().map(str::to_string).collect();
        let tensors: Vec<_> = names.iter().map(|n| (names::to_bfl(n), source.tensor(n).unwrap())).collect();
        let views = tensors.iter().map(|(name, t)| {
            let linear = name.contains(".attn_1.") && t.shape.len() == 2;
            let shape = t.shape.iter().copied().chain(if linear { vec![1, 1] } else { vec![] }).collect();
            (name.as_str(), safetensors::tensor::TensorView::new(t.dtype, shape, t.bytes()).unwrap())
        });
        std::fs::write(to, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    #[test]
    fn both_namings_give_the_same_model_and_the_single_file_needs_no_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ae.safetensors");
        let folder = Path::new(GOLDENS).join("model/vae");
        write_bfl(&folder, &file);
        let (ours, theirs) = (open(&folder), open(&file));
        let images = Tensor::randn(0f32, 0.5, (1, 3, 32, 16), &Device::Cpu).unwrap();
        let latent = ours.latent_mode(&images).unwrap();
        let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(bits(&latent), bits(&theirs.latent_mode(&images).unwrap()));
        assert_eq!(bits(&ours.decode(&latent).unwrap()), bits(&theirs.decode(&latent).unwrap()));
        assert_eq!(bits(&ours.tokens(&latent).unwrap()), bits(&theirs.tokens(&latent).unwrap()));
    }

    #[test]
    fn tokens_and_latents_are_inverse_and_channel_is_slowest() {
        let vae = open(&Path::new(GOLDENS).join("model/vae"));
        let (c, h, w) = (vae.geometry.latent_channels, 4, 6);
        let latent = Tensor::randn(0f32, 2.0, (2, c, h, w), &Device::Cpu).unwrap();
        let tokens = vae.tokens(&latent).unwrap();
        assert_eq!(tokens.dims(), [2, h / 2 * w / 2, 4 * c]);
        let back = vae.latents(&tokens, h / 2, w / 2).unwrap();
        let worst = (back - &latent).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(worst < 1e-5, "{worst}");
        // Token (1, 2), channel c * 4 + dy * 2 + dx.
        let (at, values) = (w / 2 + 2, latent.to_device(&Device::Cpu).unwrap());
        for (channel, dy, dx) in [(0, 0, 1), (1, 1, 0), (c - 1, 1, 1)] {
            let plain: f32 = values.get(0).unwrap().get(channel).unwrap().get(2 + dy).unwrap().get(4 + dx).unwrap().to_scalar().unwrap();
            let index = channel * 4 + dy * 2 + dx;
            let statistic = |t: &Tensor| t.flatten_all().unwrap().get(index).unwrap().to_scalar::<f32>().unwrap();
            let token: f32 = tokens.get(0).unwrap().get(at).unwrap().get(index).unwrap().to_scalar().unwrap();
            assert!((token - (plain - statistic(&vae.mean)) / statistic(&vae.deviation)).abs() < 1e-5);
        }
    }

    #[test]
    fn an_image_is_encoded_alike_alone_and_in_a_batch() {
        let vae = open(&Path::new(GOLDENS).join("model/vae"));
        let images = Tensor::randn(0f32, 0.5, (3, 3, 32, 48), &Device::Cpu).unwrap();
        let together = vae.encode(&images).unwrap();
        for (i, entry) in together.iter().enumerate() {
            assert_eq!(vae.encode(&images.narrow(0, i, 1).unwrap()).unwrap(), std::slice::from_ref(entry));
        }
        let odd = Tensor::zeros((1, 3, 24, 32), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(vae.latent_mode(&odd).unwrap_err().exit_code(), 65);
    }
}
