//! A VAE with random weights in the size of FLUX.2's, for measurements without the original.
//!
//! Weights are drawn so that activations keep their size through the network; the same seed gives the same file. One file in the diffusers
//! naming with its `config.json`, as [`super::Vae::open`] takes it.

use std::borrow::Cow;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::View;
use serenity_protocol::{Error, Result, atomic_file};

use super::blocks::{self, Block, ConvSpec};
use super::config::VaeGeometry;

/// The configuration of FLUX.2's VAE.
pub const CONFIG: &str = r#"{"_class_name": "AutoencoderKLFlux2", "act_fn": "silu", "batch_norm_eps": 0.0001,
"block_out_channels": [128, 256, 512, 512], "in_channels": 3, "out_channels": 3, "latent_channels": 32, "layers_per_block": 2,
"mid_block_add_attention": true, "norm_num_groups": 32, "patch_size": [2, 2], "use_quant_conv": true, "use_post_quant_conv": true}"#;

/// [`CONFIG`] as a geometry.
///
/// # Errors
/// Never: it is parsed for the tests' sake too.
pub fn geometry() -> Result<VaeGeometry> {
    VaeGeometry::parse(CONFIG)
}

struct Tensor {
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for &Tensor {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// A counter-based generator (SplitMix64).
pub(super) struct Random(pub u64);

impl Random {
    /// Mean 0, variance 1, no outliers: the sum of four uniform numbers.
    pub fn normal(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let uniform = |shift: u32| ((z >> shift) & 0xffff) as f32 / 65_535.0 - 0.5;
        (uniform(0) + uniform(16) + uniform(32) + uniform(48)) * 1.732
    }
}

struct Writer {
    random: Random,
    tensors: Vec<(String, Tensor)>,
}

impl Writer {
    fn add(&mut self, name: String, shape: &[usize], mean: f32, deviation: f32) {
        let count = shape.iter().product();
        let bytes = (0..count).flat_map(|_| (mean + deviation * self.random.normal()).to_le_bytes()).collect();
        self.tensors.push((name, Tensor { shape: shape.to_vec(), bytes }));
    }

    fn conv(&mut self, c: &ConvSpec) {
        let terms = (c.taps * c.taps * c.input) as f32;
        self.add(format!("{}.weight", c.name), &[c.output, c.input, c.taps, c.taps], 0.0, terms.powf(-0.5));
        self.add(format!("{}.bias", c.name), &[c.output], 0.0, 0.1);
    }

    fn norm(&mut self, name: &str, channels: usize) {
        self.add(format!("{name}.weight"), &[channels], 1.0, 0.1);
        self.add(format!("{name}.bias"), &[channels], 0.0, 0.1);
    }

    fn block(&mut self, block: &Block) {
        match block {
            Block::Conv { norm, conv } => {
                if let Some(name) = norm {
                    self.norm(name, conv.input);
                }
                self.conv(conv);
            }
            Block::Resnet { norms: [n1, n2], convs: [c1, c2], shortcut } => {
                self.norm(n1, c1.input);
                self.norm(n2, c2.input);
                [c1, c2].into_iter().chain(shortcut.as_ref()).for_each(|c| self.conv(c));
            }
            Block::Attention { name, channels } => {
                self.norm(&format!("{name}.group_norm"), *channels);
                for part in ["to_q", "to_k", "to_v", "to_out.0"] {
                    self.add(format!("{name}.{part}.weight"), &[*channels, *channels], 0.0, (*channels as f32).powf(-0.5));
                    self.add(format!("{name}.{part}.bias"), &[*channels], 0.0, 0.1);
                }
            }
        }
    }
}

/// Writes a random VAE of FLUX.2's size into `folder`.
///
/// # Errors
/// Those of the file system.
pub fn write(folder: &Path, seed: u64) -> Result<()> {
    write_as(folder, CONFIG, seed)
}

/// The same with another `config.json`.
///
/// # Errors
/// [`Error::Data`] for a configuration that is none of a FLUX.2 VAE; those of the file system.
pub fn write_as(folder: &Path, config: &str, seed: u64) -> Result<()> {
    let geometry = VaeGeometry::parse(config)?;
    let mut writer = Writer { random: Random(seed), tensors: Vec::new() };
    blocks::encoder(&geometry).iter().chain(&blocks::decoder(&geometry)).for_each(|block| writer.block(block));
    let channels = geometry.token_channels();
    writer.add("bn.running_mean".into(), &[channels], 0.0, 0.5);
    writer.add("bn.running_var".into(), &[channels], 2.0, 0.3);
    let views = writer.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    let bytes = safetensors::serialize(views, None).map_err(|e| Error::invariant("the weights cannot be serialised").cause(e))?;
    std::fs::create_dir_all(folder).map_err(|e| Error::io("cannot make the folder", folder, e))?;
    atomic_file::write(&folder.join("diffusion_pytorch_model.safetensors"), &bytes)?;
    atomic_file::write(&folder.join("config.json"), config.as_bytes())
}
