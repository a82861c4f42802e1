//! The text encoder on CUDA against the reference's tensors and against the processor, on the device of this machine.
//!
//! Prints a line for each case: largest difference over the largest expected magnitude, and norm of the difference over norm of the expected. A case
//! fails above its limit or where a value is no number.

use std::path::Path;

use candle_core::{DType, Tensor};
use serenity_cuda::Ty;
use serenity_protocol::cache::text_model::TextGeometry;
use serenity_protocol::checkpoint::Checkpoint;
use serenity_protocol::config::DeviceKind;
use serenity_protocol::slab::text_encoder::{TextModel, TextSlab};
use serenity_protocol::{Error, Result};

use super::encode::{Encoded, Hidden, Task};
use super::{AnyTextEncoder, synth};
use crate::parity::{self, TextPlace};
use crate::tensor::failed;
use crate::tokenizer::Tokens;

/// Float32 with sums in another order.
const F32_LIMIT: f64 = 2e-5;
/// bf16 against float32: what rounding every operation's result gives after a few layers of random weights.
const BF16_LIMIT: f64 = 2e-2;
/// Tokens of a padded caption.
const MAX_LENGTH: usize = 200;

/// Cases so far.
#[derive(Debug, Default)]
pub struct Tally {
    /// All.
    pub done: usize,
    /// Those that failed.
    pub failed: usize,
}

impl Tally {
    fn case(&mut self, name: &str, found: &[f32], expected: &[f32], limit: f64) {
        let mut sums = (0.0f64, 0.0f64, 0.0f64, 0.0f64);
        for (a, b) in found.iter().zip(expected) {
            let (a, b) = (f64::from(*a), f64::from(*b));
            let d = (a - b).abs();
            sums = (if d.is_nan() { f64::NAN } else { sums.0.max(d) }, sums.1.max(b.abs()), sums.2 + d * d, sums.3 + b * b);
        }
        let (largest, norm) = (sums.0 / sums.1.max(1e-30), (sums.2 / sums.3.max(1e-60)).sqrt());
        // Written so that NaN fails.
        let ok = norm <= limit && largest.is_finite() && found.len() == expected.len() && !expected.is_empty();
        self.done += 1;
        self.failed += usize::from(!ok);
        println!("{} text {name:<66} largest {largest:.1e}, norm {norm:.1e} (limit {limit:.0e})", if ok { "ok  " } else { "FAIL" });
    }

    fn holds(&mut self, name: &str, ok: bool) {
        self.done += 1;
        self.failed += usize::from(!ok);
        println!("{} text {name}", if ok { "ok  " } else { "FAIL" });
    }
}

fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(DType::F32).and_then(|t| t.flatten_all()?.to_vec1()).map_err(failed("reading an embedding"))
}

fn all(encoded: &Encoded) -> Result<Vec<f32>> {
    let mut values = floats(&encoded.pad.rows)?;
    for caption in &encoded.captions {
        values.extend(floats(&caption.rows)?);
    }
    Ok(values)
}

/// Runs all cases on device `ordinal`; `goldens` is the reference's folder with `model` and `cases`, `slab` an INT8 slab of any small text encoder.
///
/// # Errors
/// What opening the device or the reference, and encoding report. Cases that fail are counted.
pub fn gpu_check(ordinal: usize, goldens: &Path, slab: Option<&Path>) -> Result<Tally> {
    let mut tally = Tally::default();
    let folder = tempfile::tempdir().map_err(|e| Error::absent("there is no folder for temporary files").cause(e))?;
    golden(&mut tally, ordinal, goldens, folder.path())?;
    let g = TextGeometry { layers: 4, vocab: 997, ..synth::mistral() };
    let geometries = [
        ("6 heads of 48 on 2", TextGeometry { hidden: 192, heads: 6, kv_heads: 2, head_dim: 48, intermediate: 320, ..g.clone() }),
        ("5 heads of 64 on 1", TextGeometry { hidden: 136, heads: 5, kv_heads: 1, head_dim: 64, intermediate: 264, ..g.clone() }),
        ("8 heads of 128 on 8", TextGeometry { hidden: 512, heads: 8, kv_heads: 8, head_dim: 128, intermediate: 1024, ..g.clone() }),
        ("odd sizes", TextGeometry { hidden: 51, heads: 3, kv_heads: 3, head_dim: 10, intermediate: 77, ..g }),
    ];
    for (index, (name, geometry)) in geometries.iter().enumerate() {
        let path = folder.path().join(format!("model-{index}"));
        synth::write(&path, geometry, 5 + index as u64)?;
        geometry_cases(&mut tally, ordinal, name, TextModel::Checkpoint(&path), folder.path())?;
    }
    match slab {
        Some(slab) => {
            geometry_cases(&mut tally, ordinal, "INT8 slab", TextModel::Slab { slab, folder: None }, folder.path())?;
            damaged_slab(&mut tally, ordinal, slab, folder.path())?;
        }
        None => println!("SKIPPED: no --slab. An INT8 slab was not read on CUDA."),
    }
    Ok(tally)
}

/// A flipped bit in the second layer's codes must end the pass.
fn damaged_slab(tally: &mut Tally, ordinal: usize, slab: &Path, folder: &Path) -> Result<()> {
    let manifest = slab.with_extension("manifest.json");
    let failed = |e| Error::io("cannot copy the slab", slab, e);
    let at = TextSlab::open_beside(slab, None)?.layer_bytes(1)?;
    let mut copy = None;
    for file in [slab, &manifest, &slab.with_extension("other.safetensors")] {
        let to = folder.join(file.file_name().unwrap_or_default());
        std::fs::copy(file, &to).map_err(failed)?;
        copy.get_or_insert(to);
    }
    let copy = copy.ok_or_else(|| Error::invariant("a slab has no files"))?;
    let mut bytes = std::fs::read(&copy).map_err(failed)?;
    if let Some(byte) = bytes.get_mut((at.start + (at.end - at.start) / 3) as usize) {
        *byte ^= 4;
    }
    std::fs::write(&copy, bytes).map_err(failed)?;
    let model = TextModel::Slab { slab: &copy, folder: None };
    let encoder = AnyTextEncoder::open(model, DeviceKind::Cuda(ordinal), Some(Ty::Bf16), None, Some(3))?;
    let caption = Tokens { ids: vec![1, 2, 3], cut: 0 };
    let result = encoder.encode(&[caption], 11, [0, 2, 4], MAX_LENGTH, DType::F32, &mut |_, _| Ok(()));
    tally.holds("INT8 slab: a flipped bit ends the pass with exit 65", result.is_err_and(|e| e.exit_code() == 65));
    Ok(())
}

fn golden(tally: &mut Tally, ordinal: usize, goldens: &Path, folder: &Path) -> Result<()> {
    let out = folder.join("golden.safetensors");
    let expected = Checkpoint::open(&goldens.join("cases/text_encoder.safetensors"))?.tensor("embeds")?.to_f32()?;
    for (ty, limit) in [(Ty::F32, 1e-5), (Ty::Bf16, BF16_LIMIT)] {
        let place = TextPlace { device: DeviceKind::Cuda(ordinal), ty };
        parity::text_on(place, &goldens.join("model"), &goldens.join("cases/text_encoder.json"), &out)?;
        let found = Checkpoint::open(&out)?.tensor("embeds")?.to_f32()?;
        tally.case(&format!("the reference's embeddings, {}", ty.name()), &found, &expected, limit);
    }
    Ok(())
}

fn geometry_cases(tally: &mut Tally, ordinal: usize, name: &str, model: TextModel, folder: &Path) -> Result<()> {
    let (states, vocab) = ([0, 2, 4], model.geometry()?.vocab);
    let lengths = [1, 40, 7, 127, 128, 129, 199, 64, 65, 200, 32, 33, 31];
    let captions: Vec<Tokens> = lengths
        .iter()
        .cycle()
        .take(60)
        .enumerate()
        .map(|(i, n)| Tokens { ids: (0..*n).map(|j| ((i * 7919 + j * 104_729) % vocab) as u32).collect(), cut: 0 })
        .collect();
    let open = |device, ty, bytes_max| AnyTextEncoder::open(model, device, Some(ty), bytes_max, Some(3));
    let encode =
        |encoder: &AnyTextEncoder, captions: &[Tokens]| encoder.encode(captions, 11, states, MAX_LENGTH, DType::F32, &mut |_, _| Ok(()));
    let cpu = open(DeviceKind::Cpu, Ty::F32, None)?;
    let expected = all(&encode(&cpu, &captions)?)?;
    for (ty, limit) in [(Ty::F32, F32_LIMIT), (Ty::Bf16, BF16_LIMIT)] {
        let encoder = open(DeviceKind::Cuda(ordinal), ty, None)?;
        let first = encode(&encoder, &captions)?;
        let together = all(&first)?;
        tally.case(&format!("{name}, {}: {} captions against the processor", ty.name(), captions.len()), &together, &expected, limit);
        let again = all(&encode(&encoder, &captions)?)?;
        tally.holds(&format!("{name}, {}: two runs are the same bytes", ty.name()), again == together);
        let mut alone = floats(&first.pad.rows)?;
        for caption in &captions {
            let one = encode(&encoder, std::slice::from_ref(caption))?;
            alone.extend(one.captions.iter().map(|c| floats(&c.rows)).collect::<Result<Vec<_>>>()?.concat());
        }
        tally.holds(&format!("{name}, {}: each caption alone is the same bytes", ty.name()), alone == together);
        // Through a file, so that states leave the device after every layer.
        let task = Task { states, max_length: MAX_LENGTH, keep: DType::F32, hidden: Hidden::File(folder.to_path_buf()) };
        let (mut spilled, mut pad_row) = (Vec::new(), Vec::new());
        let mut sink = |_: usize, e: super::Embedding, pad: &super::Embedding| {
            pad_row = floats(&pad.rows)?;
            spilled.extend(floats(&e.rows)?);
            Ok(())
        };
        encoder.encode_to(&captions, 11, &task, &mut |_, _| Ok(()), &mut sink)?;
        pad_row.extend(spilled);
        tally.holds(&format!("{name}, {}: kept states through a file are the same bytes", ty.name()), pad_row == together);
    }
    Ok(())
}
