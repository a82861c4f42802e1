//! The CUDA VAE against the reference's tensors and against the processor, whole and in strips, on the device of this machine.
//!
//! Prints a line for each case: largest difference over the largest expected magnitude, and norm of the difference over norm of the expected. A case
//! fails above its limit or where a value is no number.

use std::path::Path;

use candle_core::{Device, Tensor};
use serenity_protocol::checkpoint::Checkpoint;
use serenity_protocol::config::DeviceKind;
use serenity_protocol::{Error, Result};

use super::synth::{self, Random};
use super::{Half, Place, Vae};
use crate::pixels::normalise;
use crate::tensor::failed;

/// Against the reference: as the processor's own test (`tests/goldens.rs`).
const GOLDEN_LIMIT: f64 = 1e-5;
/// Against the processor, and strips against the whole: both are float32 with sums in another order.
const LIMIT: f64 = 5e-5;

/// Channels of each level, of the decoder if they differ, groups, latent channels, parts that may be left out.
const GEOMETRIES: [(&str, &str); 4] = [
    ("full", synth::CONFIG),
    (
        "small decoder",
        r#"{"block_out_channels": [32, 64, 64, 128], "decoder_block_out_channels": [96, 96, 192, 192], "latent_channels": 8, "layers_per_block": 1}"#,
    ),
    (
        "one channel a group",
        r#"{"block_out_channels": [32, 32, 32, 32], "latent_channels": 4, "use_quant_conv": false, "use_post_quant_conv": false}"#,
    ),
    (
        "no attention",
        r#"{"block_out_channels": [24, 48, 48, 72], "norm_num_groups": 12, "latent_channels": 5, "mid_block_add_attention": false}"#,
    ),
];

/// Images, height, width, rows of strips.
type Size = (usize, usize, usize, &'static [usize]);

const SIZES: [Size; 3] = [(1, 96, 64, &[8, 40]), (3, 48, 80, &[24]), (1, 16, 16, &[8])];

struct Checks {
    device: DeviceKind,
    failed: usize,
    done: usize,
}

/// Runs all cases on device `ordinal`, and returns how many there were and how many failed; `goldens` is the reference's folder with `model` and `cases`.
///
/// # Errors
/// What opening the device or the reference reports. Cases that fail are counted.
pub fn gpu_check(ordinal: usize, goldens: &Path) -> Result<(usize, usize)> {
    let mut checks = Checks { device: DeviceKind::Cuda(ordinal), failed: 0, done: 0 };
    checks.golden(goldens)?;
    for (name, config) in GEOMETRIES {
        let folder = tempfile::tempdir().map_err(|e| Error::io("cannot make a folder for temporary files", std::env::temp_dir(), e))?;
        synth::write_as(folder.path(), config, 1)?;
        checks.against_processor(name, folder.path())?;
    }
    Ok((checks.done, checks.failed))
}

fn values(t: &Tensor) -> Result<Vec<f32>> {
    t.flatten_all().and_then(|t| t.to_vec1::<f32>()).map_err(failed("reading values"))
}

/// Largest difference over the largest magnitude, norm of the difference over norm.
pub(super) fn difference(found: &[f32], expected: &[f32]) -> (f64, f64) {
    if found.len() != expected.len() || expected.is_empty() {
        return (f64::NAN, f64::NAN);
    }
    let pairs = || found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - f64::from(*b), f64::from(*b)));
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, |m: f64, v| if v.is_nan() { f64::NAN } else { m.max(v.abs()) });
    let (worst, scale) = (largest(&mut pairs().map(|p| p.0)), largest(&mut pairs().map(|p| p.1)));
    let [d, e] = pairs().fold([0.0, 0.0], |[d, e], p| [d + p.0 * p.0, e + p.1 * p.1]);
    (worst / scale, (d / e).sqrt())
}

/// Images that are not alike and not centred.
pub(super) fn pictures(seed: u64, [batch, height, width]: [usize; 3]) -> Result<Tensor> {
    let mut random = Random(seed);
    let pixels: Vec<f32> = (0..batch * 3 * height * width).map(|i| 0.4 * random.normal() + 0.1 * (i % 7) as f32 - 0.2).collect();
    Tensor::from_vec(pixels, (batch, 3, height, width), &Device::Cpu).map_err(failed("making images"))
}

impl Checks {
    fn compare(&mut self, case: &str, found: &Tensor, expected: &[f32], limit: f64) -> Result<()> {
        let (worst, norm) = difference(&values(found)?, expected);
        // A comparison that is false for NaN.
        let ok = worst <= limit;
        println!("{:<64} max {worst:.1e}  norm {norm:.1e}  limit {limit:.0e}  {}", case, if ok { "ok" } else { "FAIL" });
        self.done += 1;
        self.failed += usize::from(!ok);
        Ok(())
    }

    fn open(&self, path: &Path, tile_rows: Option<usize>) -> Result<Vae> {
        Vae::open(path, Half::Both, Place { tile_rows, ..Place::on(self.device) })
    }

    fn golden(&mut self, goldens: &Path) -> Result<()> {
        let case = Checkpoint::open(&goldens.join("cases/vae.safetensors"))?;
        let image = case.tensor("image_u8_nchw")?;
        let expected = |name: &str| case.tensor(name)?.to_f32();
        let pixels = Tensor::from_slice(image.bytes(), image.shape.as_slice(), &Device::Cpu).and_then(|t| normalise(&t));
        let pixels = pixels.map_err(failed("reading images"))?;
        for tile in [None, Some(8)] {
            let vae = self.open(&goldens.join("model/vae"), tile)?;
            let mode = vae.latent_mode(&pixels)?;
            let name = |what: &str| format!("golden {what}, strips {tile:?}");
            self.compare(&name("latent_mode"), &mode, &expected("latent_mode")?, GOLDEN_LIMIT)?;
            self.compare(&name("tokens"), &vae.tokens(&mode)?, &expected("tokens")?, GOLDEN_LIMIT)?;
            self.compare(&name("decoded"), &vae.decode(&mode)?, &expected("decoded")?, GOLDEN_LIMIT)?;
        }
        Ok(())
    }

    fn against_processor(&mut self, geometry: &str, path: &Path) -> Result<()> {
        let cpu = Vae::open(path, Half::Both, Place::on(DeviceKind::Cpu))?;
        let whole = self.open(path, None)?;
        for (batch, height, width, tiles) in SIZES {
            let images = pictures(3, [batch, height, width])?;
            let latents = cpu.latent_mode(&images)?;
            let (expected, decoded) = (values(&latents)?, values(&cpu.decode(&latents)?)?);
            let name = |what: &str, tile: Option<usize>| format!("{geometry}, {batch} x {height} x {width}, {what}, strips {tile:?}");
            self.compare(&name("encoder", None), &whole.latent_mode(&images)?, &expected, LIMIT)?;
            self.compare(&name("decoder", None), &whole.decode(&latents)?, &decoded, LIMIT)?;
            for &tile in tiles {
                let vae = self.open(path, Some(tile))?;
                self.compare(&name("encoder", Some(tile)), &vae.latent_mode(&images)?, &expected, LIMIT)?;
                self.compare(&name("decoder", Some(tile)), &vae.decode(&latents)?, &decoded, LIMIT)?;
            }
        }
        let twice = [whole.latent_mode(&pictures(5, [1, 64, 64])?)?, whole.latent_mode(&pictures(5, [1, 64, 64])?)?];
        let same = values(&twice[0])?.iter().map(|v| v.to_bits()).eq(values(&twice[1])?.iter().map(|v| v.to_bits()));
        println!("{:<64} {}", format!("{geometry}, two runs give the same bytes"), if same { "ok" } else { "FAIL" });
        self.done += 1;
        self.failed += usize::from(!same);
        self.large(geometry, path, &whole)
    }

    /// An image of the size that the encoder is for: strips against the whole, both on the device.
    fn large(&mut self, geometry: &str, path: &Path, whole: &Vae) -> Result<()> {
        let images = pictures(9, [1, 512, 384])?;
        let latents = whole.latent_mode(&images)?;
        let (expected, decoded) = (values(&latents)?, values(&whole.decode(&latents)?)?);
        let vae = self.open(path, Some(120))?;
        let name = |what: &str| format!("{geometry}, 1 x 512 x 384, {what}, strips of 120 against the whole");
        self.compare(&name("encoder"), &vae.latent_mode(&images)?, &expected, LIMIT)?;
        self.compare(&name("decoder"), &vae.decode(&latents)?, &decoded, LIMIT)
    }
}
