//! The VAE of FLUX.2: image to latent and back, and latent to the tokens that the transformer sees.
//!
//! [`config`] is its geometry, `names` the two spellings of its tensors, `blocks` encoder and decoder as lists, `network` the walk through
//! them, whole or in strips, over a device: `cpu`, or `cuda` with its `memory`. [`packing`] is the way from the encoder's output to tokens. Everything
//! is float32 on every device: the VAE is small, its norms are sensitive, and a latent is made once and trained on for the rest of its life.
//!
//! An image that does not fit goes in strips that give what the whole image gives, up to rounding (`network`); on the processor above
//! [`PROCESSOR_PIXELS_MAX`], on a device by the memory that it has or is allowed.

pub mod bench;
mod blocks;
pub mod check;
pub mod config;
mod cpu;
mod cuda;
mod memory;
mod names;
mod network;
pub mod packing;
pub mod synth;

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serenity_cuda::Gpu;
use serenity_protocol::cache::LatentEntry;
use serenity_protocol::config::{Config, DeviceKind};
use serenity_protocol::{Error, Result};

use self::blocks::Shape;
use self::config::VaeGeometry;
use self::cpu::Cpu;
use self::cuda::{Cuda, Host};
use self::names::VaeWeights;
use self::network::{Kept, Kit, Network};
use self::packing::{Latents, Layout, PATCH, Packing};
use crate::pixels::Pixels;
use crate::tensor::failed;

/// Pixels of one latent pixel on each axis.
const DOWNSAMPLING: usize = 8;
/// Epsilon of every group norm, fixed in the reference.
const GROUP_NORM_EPS: f64 = 1e-6;
/// Rows of attention scores that the processor computes at once: bounds their memory.
const ATTENTION_ROWS: usize = 1024;
/// Pixels from which the processor works in strips, of about half as many pixels.
pub const PROCESSOR_PIXELS_MAX: usize = 1 << 21;

/// Where the VAE computes, and with how much memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The device.
    pub device: DeviceKind,
    /// Most device memory of the process, in bytes; `None`: what the device has free, less a margin.
    pub bytes_max: Option<u64>,
    /// Rows of a strip in pixels (rounded up to a multiple of 8); `None`: whole images where they fit.
    pub tile_rows: Option<usize>,
}

impl Place {
    /// The device as it is.
    #[must_use]
    pub fn on(device: DeviceKind) -> Self {
        Self { device, bytes_max: None, tile_rows: None }
    }

    /// As a configuration says.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        Self { bytes_max: config.memory.stagehand.vram_high_bytes, ..Self::on(config.device) }
    }

    /// Images to hand over together.
    #[must_use]
    pub fn batch(&self) -> usize {
        if self.device == DeviceKind::Cpu { 1 } else { memory::BATCH_MAX }
    }
}

/// The VAE of a model, or the half of it that was asked for.
pub struct Vae {
    packing: Arc<Packing>,
    place: Place,
    halves: Halves,
}

enum Halves {
    Cpu(Loaded<Cpu>),
    Cuda(Box<Loaded<Cuda>>),
}

struct Loaded<K: Kit> {
    kit: K,
    encoder: Option<Network<K>>,
    decoder: Option<Network<K>>,
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

impl<K: Kit> Loaded<K> {
    fn load(kit: K, weights: &VaeWeights, geometry: &VaeGeometry, half: Half) -> Result<Self> {
        let encoder = (half != Half::Decoder).then(|| Network::load(&kit, weights, blocks::encoder(geometry))).transpose()?;
        let decoder = (half != Half::Encoder).then(|| Network::load(&kit, weights, blocks::decoder(geometry))).transpose()?;
        Ok(Self { kit, encoder, decoder })
    }

    fn network(&self, half: Half) -> Result<&Network<K>> {
        let network = if half == Half::Decoder { &self.decoder } else { &self.encoder };
        network.as_ref().ok_or_else(|| Error::invariant(format!("this VAE was loaded without its {half:?}")))
    }
}

impl Loaded<Cuda> {
    /// Channels-last values through a half, in as many batches as the memory asks for.
    fn forward(&self, half: Half, values: Vec<f32>, shape: Shape, tile: Option<usize>) -> Result<(Vec<f32>, Shape)> {
        let network = self.network(half)?;
        let plan = self.kit.prepare(network.specs(), shape, tile)?;
        let run = |values: Vec<f32>, shape: Shape| {
            let (host, shape) = network.forward(&self.kit, Kept::Host(Host::Plain(values)), shape, plan.tile)?;
            Ok((self.kit.values(host, shape)?, shape))
        };
        if plan.batch >= shape.batch {
            return run(values, shape);
        }
        let one = shape.len() / shape.batch;
        join(shape, values.chunks(plan.batch * one).map(|part| run(part.to_vec(), Shape { batch: part.len() / one, ..shape })))
    }

    /// Images through the encoder: as bytes to the device where they go whole.
    fn encode(&self, images: &[&Pixels], shape: Shape, tile: Option<usize>) -> Result<(Vec<f32>, Shape)> {
        let network = self.network(Half::Encoder)?;
        let plan = self.kit.prepare(network.specs(), shape, tile)?;
        let run = |images: &[&Pixels]| {
            let shape = Shape { batch: images.len(), ..shape };
            let rows = if plan.tile.is_none() { self.kit.pixels(images, shape)? } else { None };
            let Some(rows) = rows else {
                // Rounded as `pixels::normalise` does.
                let values = images.iter().flat_map(|p| &p.rgb).map(|v| f32::from(*v) / 127.5 - 1.0).collect();
                return self.forward(Half::Encoder, values, shape, tile);
            };
            let (host, shape) = network.forward(&self.kit, Kept::Device(rows), shape, None)?;
            Ok((self.kit.values(host, shape)?, shape))
        };
        join(shape, images.chunks(plan.batch).map(run))
    }
}

/// Results of parts of a batch, one behind another.
fn join(shape: Shape, parts: impl Iterator<Item = Result<(Vec<f32>, Shape)>>) -> Result<(Vec<f32>, Shape)> {
    let (mut all, mut end) = (Vec::new(), shape);
    for part in parts {
        let (values, of) = part?;
        end = Shape { batch: shape.batch, ..of };
        // A batch in one piece is not copied.
        if all.is_empty() { all = values } else { all.extend(values) }
    }
    Ok((all, end))
}

impl Loaded<Cpu> {
    fn forward(&self, half: Half, images: Tensor, shape: Shape, tile: Option<usize>) -> Result<Tensor> {
        Ok(self.network(half)?.forward(&self.kit, Kept::Host(images), shape, tile)?.0)
    }
}

/// Channels-last values as `[B, C, H, W]`.
fn channels_first(values: Vec<f32>, s: Shape) -> Result<Tensor> {
    let tensor = Tensor::from_vec(values, (s.batch, s.height, s.width, s.channels), &Device::Cpu);
    tensor.and_then(|t| t.permute((0, 3, 1, 2))?.contiguous()).map_err(failed("reading the VAE's output"))
}

/// `[B, C, H, W]` as channels-last values.
fn channels_last(tensor: &Tensor) -> Result<Vec<f32>> {
    let turned = tensor.permute((0, 2, 3, 1)).and_then(|t| t.contiguous()?.flatten_all()?.to_vec1::<f32>());
    turned.map_err(failed("reading the VAE's input"))
}

fn shape_of(tensor: &Tensor) -> Result<Shape> {
    let (batch, channels, height, width) = tensor.dims4().map_err(failed("reading images"))?;
    Ok(Shape { batch, height, width, channels })
}

impl Vae {
    /// Loads the VAE at `path`, a folder in the Hugging Face layout or a single file in either naming.
    ///
    /// # Errors
    /// [`Error::Absent`] for missing files or a missing device, [`Error::Data`] for files that are no FLUX.2 VAE.
    pub fn open(path: &Path, half: Half, place: Place) -> Result<Self> {
        let weights = VaeWeights::open(path)?;
        let geometry = VaeGeometry::read(path, &weights)?;
        let groups = geometry.norm_num_groups;
        let halves = match place.device {
            DeviceKind::Cpu => Halves::Cpu(Loaded::load(Cpu { groups }, &weights, &geometry, half)?),
            DeviceKind::Cuda(ordinal) => {
                let mut lists = Vec::new();
                if half != Half::Decoder {
                    lists.push(blocks::encoder(&geometry));
                }
                if half != Half::Encoder {
                    lists.push(blocks::decoder(&geometry));
                }
                let kit = Cuda::open(ordinal, groups, &lists, place.bytes_max)?;
                Halves::Cuda(Box::new(Loaded::load(kit, &weights, &geometry, half)?))
            }
        };
        Ok(Self { packing: Arc::new(Packing::read(&weights, geometry)?), place, halves })
    }

    /// Its geometry.
    #[must_use]
    pub fn geometry(&self) -> &VaeGeometry {
        self.packing.geometry()
    }

    /// The way from latents to tokens.
    #[must_use]
    pub fn packing(&self) -> &Arc<Packing> {
        &self.packing
    }

    /// The device that it computes on, unless that is the processor.
    #[must_use]
    pub fn gpu(&self) -> Option<&Gpu> {
        match &self.halves {
            Halves::Cpu(_) => None,
            Halves::Cuda(loaded) => Some(loaded.kit.gpu()),
        }
    }

    fn checked(&self, shape: Shape) -> Result<Shape> {
        let unit = PATCH * DOWNSAMPLING;
        if !shape.height.is_multiple_of(unit) || !shape.width.is_multiple_of(unit) || shape.len() == 0 || shape.channels != 3 {
            return Err(Error::data("an image's sides must be multiples of 16")
                .found(format!("{} x {} pixels of {} channels", shape.width, shape.height, shape.channels)));
        }
        Ok(shape)
    }

    /// Rows of a strip on the processor for images of `height` x `width` pixels.
    fn processor_tile(&self, height: usize, width: usize) -> Option<usize> {
        let tile = self.place.tile_rows.or_else(|| {
            let pixels = height * width;
            (pixels > PROCESSOR_PIXELS_MAX).then(|| PROCESSOR_PIXELS_MAX / 2 / width)
        });
        tile.map(|rows| rows.max(1).next_multiple_of(memory::TILE_UNIT)).filter(|rows| *rows < height)
    }

    /// The mean of the posterior: images `[B, 3, H, W]` in -1 to 1, H and W multiples of 16, to `[B, latent_channels, H/8, W/8]`.
    ///
    /// # Errors
    /// [`Error::Data`] for sizes that are no multiple of 16; [`Error::Config`] if the device memory allowed is too small; failures of the device.
    pub fn latent_mode(&self, images: &Tensor) -> Result<Tensor> {
        let shape = self.checked(shape_of(images)?)?;
        let moments = match &self.halves {
            Halves::Cpu(loaded) => {
                let tile = self.processor_tile(shape.height, shape.width);
                each(images, tile, |image, shape| loaded.forward(Half::Encoder, image, shape, tile))?
            }
            Halves::Cuda(loaded) => {
                let (values, shape) = loaded.forward(Half::Encoder, channels_last(images)?, shape, self.place.tile_rows)?;
                channels_first(values, shape)?
            }
        };
        moments.narrow(1, 0, self.geometry().latent_channels).map_err(failed("the VAE encoder"))
    }

    /// [`Self::latent_mode`] of images of one size.
    ///
    /// # Errors
    /// As [`Self::latent_mode`].
    pub fn latents_of(&self, images: &[&Pixels]) -> Result<Latents> {
        let _span = tracing::trace_span!("encode images").entered();
        let Halves::Cuda(loaded) = &self.halves else {
            let tensors = images.iter().map(|p| p.to_tensor(&Device::Cpu, DType::F32)).collect::<Result<Vec<_>>>()?;
            let images = Tensor::cat(&tensors, 0).map_err(failed("joining images"))?;
            return Ok(Latents(Layout::First(self.latent_mode(&images)?)));
        };
        let (height, width) = images.first().map_or((0, 0), |p| (p.height, p.width));
        if images.iter().any(|p| (p.height, p.width) != (height, width)) {
            return Err(Error::invariant("images of several sizes in one batch"));
        }
        let shape = self.checked(Shape { batch: images.len(), height, width, channels: 3 })?;
        let (values, shape) = loaded.encode(images, shape, self.place.tile_rows)?;
        Ok(Latents(Layout::Last { values, shape }))
    }

    /// Latents `[B, C, h, w]` to normalised tokens `[B, h/2 * w/2, 4C]`, float32.
    ///
    /// # Errors
    /// Failures of the tensor library.
    pub fn tokens(&self, latents: &Tensor) -> Result<Tensor> {
        self.packing.tokens(latents)
    }

    /// The inverse of [`Self::tokens`]: tokens `[B, height * width, 4C]` to latents `[B, C, 2 * height, 2 * width]`, float32.
    ///
    /// # Errors
    /// Failures of the tensor library, and shapes that do not fit.
    pub fn latents(&self, tokens: &Tensor, height: usize, width: usize) -> Result<Tensor> {
        self.packing.latents(tokens, height, width)
    }

    /// Images `[B, 3, 8h, 8w]` in about -1 to 1 from latents `[B, C, h, w]`.
    ///
    /// # Errors
    /// [`Error::Data`] for other latents; [`Error::Config`] if the device memory allowed is too small; failures of the device.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let latents = latents.to_dtype(DType::F32).map_err(failed("the VAE decoder"))?;
        let shape = shape_of(&latents)?;
        if shape.channels != self.geometry().latent_channels || shape.len() == 0 {
            return Err(Error::data("this is no latent of the VAE").expected(self.geometry().latent_channels).found(format!("{shape:?}")));
        }
        match &self.halves {
            Halves::Cpu(loaded) => {
                let tile = self.processor_tile(shape.height * DOWNSAMPLING, shape.width * DOWNSAMPLING);
                each(&latents, tile, |latent, shape| loaded.forward(Half::Decoder, latent, shape, tile))
            }
            Halves::Cuda(loaded) => {
                let (values, shape) = loaded.forward(Half::Decoder, channels_last(&latents)?, shape, self.place.tile_rows)?;
                channels_first(values, shape)
            }
        }
    }

    /// Cache entries of images `[B, 3, H, W]`.
    ///
    /// # Errors
    /// As [`Self::latent_mode`].
    pub fn encode(&self, images: &Tensor) -> Result<Vec<LatentEntry>> {
        self.packing.entries_of(&self.latent_mode(images)?)
    }
}

/// All of a batch at once, or, in strips, one after another.
fn each(batch: &Tensor, tile: Option<usize>, forward: impl Fn(Tensor, Shape) -> Result<Tensor>) -> Result<Tensor> {
    let shape = shape_of(batch)?;
    if tile.is_none() {
        return forward(batch.clone(), shape);
    }
    let one = |i| {
        let image = batch.narrow(0, i, 1).and_then(|t| t.contiguous()).map_err(failed("taking an image"))?;
        forward(image, Shape { batch: 1, ..shape })
    };
    let all = (0..shape.batch).map(one).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&all, 0).map_err(failed("joining images"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use serenity_protocol::checkpoint::Checkpoint;

    use super::*;

    const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/goldens");

    fn open(path: &Path) -> Vae {
        Vae::open(path, Half::Both, Place::on(DeviceKind::Cpu)).unwrap()
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
        let (c, h, w) = (vae.geometry().latent_channels, 4, 6);
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
            assert!((token - (plain - statistic(&vae.packing.mean)) / statistic(&vae.packing.deviation)).abs() < 1e-5);
        }
    }

    #[test]
    fn channels_last_latents_make_the_same_entries() {
        let vae = open(&Path::new(GOLDENS).join("model/vae"));
        let (c, shape) = (vae.geometry().latent_channels, Shape { batch: 2, height: 4, width: 6, channels: 0 });
        // Moments: the latent's channels, and as many that are none.
        let moments = Tensor::randn(0f32, 2.0, (2, 2 * c, 4, 6), &Device::Cpu).unwrap();
        let values = channels_last(&moments).unwrap();
        let last = || Latents(Layout::Last { values: values.clone(), shape: Shape { channels: 2 * c, ..shape } });
        let first = moments.narrow(1, 0, c).unwrap();
        assert_eq!(vae.packing.entries(&last()).unwrap(), vae.packing.entries_of(&first).unwrap());
        let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(bits(&last().tensor(c).unwrap()), bits(&first));
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

    /// Strips give what the whole image gives, in both halves: sizes that are no multiple of a strip, not square, and a strip of one latent row.
    #[test]
    fn strips_change_nothing_but_rounding() {
        let golden = Path::new(GOLDENS).join("model/vae");
        let dir = tempfile::tempdir().unwrap();
        let other = r#"{"block_out_channels": [32, 32, 64, 64], "decoder_block_out_channels": [64, 64, 96, 96],
            "latent_channels": 6, "layers_per_block": 1, "norm_num_groups": 16, "use_quant_conv": false}"#;
        synth::write_as(dir.path(), other, 3).unwrap();
        for (path, size) in [(golden.as_path(), [2, 48, 64]), (golden.as_path(), [1, 80, 32]), (dir.path(), [1, 112, 48])] {
            let whole = open(path);
            let images = check::pictures(1, size).unwrap();
            let latents = whole.latent_mode(&images).unwrap();
            let decoded = whole.decode(&latents).unwrap();
            for tile in [8, 16, 24, 40] {
                let place = Place { tile_rows: Some(tile), ..Place::on(DeviceKind::Cpu) };
                let strips = Vae::open(path, Half::Both, place).unwrap();
                for (found, expected) in [(strips.latent_mode(&images).unwrap(), &latents), (strips.decode(&latents).unwrap(), &decoded)] {
                    assert_eq!(found.dims(), expected.dims());
                    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    let (worst, norm) = check::difference(&values(&found), &values(expected));
                    assert!(worst < 1e-5 && norm < 1e-5, "{size:?}, strips of {tile}: {worst:.1e}, {norm:.1e}");
                }
            }
        }
    }

    #[test]
    fn a_random_vae_of_full_size_has_the_parameters_of_flux_2() {
        let geometry = synth::geometry().unwrap();
        let count = |c: &blocks::ConvSpec| c.output * (c.taps * c.taps * c.input + 1);
        let params = |block: &blocks::Block| match block {
            blocks::Block::Conv { norm, conv } => count(conv) + norm.as_ref().map_or(0, |_| 2 * conv.input),
            blocks::Block::Resnet { convs: [c1, c2], shortcut, .. } => {
                count(c1) + count(c2) + shortcut.as_ref().map_or(0, count) + 2 * (c1.input + c2.input)
            }
            blocks::Block::Attention { channels, .. } => 4 * channels * (channels + 1) + 2 * channels,
        };
        let all: usize = blocks::encoder(&geometry).iter().chain(&blocks::decoder(&geometry)).map(params).sum();
        assert_eq!(all, 84_046_115);
    }

    #[test]
    fn without_a_device_cuda_is_refused_and_says_what_to_do() {
        if Path::new("/dev/nvidiactl").exists() {
            return;
        }
        let error = Vae::open(&Path::new(GOLDENS).join("model/vae"), Half::Encoder, Place::on(DeviceKind::Cuda(0))).err().unwrap();
        assert_eq!(error.exit_code(), 69);
        assert!(error.to_string().contains("train_device"), "{error}");
    }
}
