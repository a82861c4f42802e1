//! Resident training: the whole slab is read once with plain reads, checked, dequantised and kept.
//!
//! It uses the dequantiser of the loader ([`quant::dequantize`]), so that a resident run and a streamed one see the same bits. Every page
//! that a weight touches is checked against its hash where the slab has them (ours do; the original builder's do not, which is said
//! once).
#![forbid(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::process::Process;
use serenity_protocol::slab::{Slab, SlabLayer, quant};
use serenity_protocol::{Error, Result};

use crate::model::{BlockSource, BlockWeights, tensor_error};
use crate::source::{Announced, Counters, TrainingSource};

/// All blocks of a slab in the compute type.
pub struct SlabSource {
    blocks: Vec<Arc<BlockWeights>>,
    announced: Announced,
    counters: Counters,
}

impl SlabSource {
    /// Reads every block of `geometry` from `slab`.
    ///
    /// # Errors
    /// [`Error::Data`] for a slab of another model, a page that does not match its hash, or a short file; [`Error::TryAgain`] if `process`
    /// is asked to stop.
    pub fn open(slab: &Slab, geometry: &TransformerGeometry, device: &Device, dtype: DType, process: &Process) -> Result<Self> {
        slab.check_model(geometry)?;
        if slab.pages().is_none() {
            tracing::info!(
                "this slab has no page hashes: its content cannot be proven (rebuild it with `serenity-slab build` to have them)"
            );
        }
        let file = File::open(slab.path()).map_err(|e| Error::io("cannot open the slab", slab.path(), e))?;
        let mut this = Self { blocks: Vec::new(), announced: Announced::default(), counters: Counters::default() };
        for block in geometry.blocks() {
            let _span = tracing::info_span!("read", block = block.0).entered();
            let mut weights = Vec::new();
            for spec in geometry.block_linears(block) {
                if process.stop_requested() {
                    return Err(process.interrupted());
                }
                process.tick();
                let layer = slab.layer(&spec.name).ok_or_else(|| Error::data(format!("the slab lacks '{}'", spec.name)).at(slab.path()))?;
                let started = Instant::now();
                weights.push(read_linear(&file, slab, layer, device, dtype)?);
                this.counters.copy_seconds += started.elapsed().as_secs_f64();
            }
            this.blocks.push(Arc::new(BlockWeights::new(geometry, block, weights)?));
        }
        let all = geometry.blocks().flat_map(|b| geometry.block_linears(b));
        let elements: usize = all.map(|l| l.out_features * l.in_features).sum();
        this.counters.moved_bytes = (elements * dtype.size_in_bytes()) as u64;
        Ok(this)
    }
}

impl BlockSource for SlabSource {
    fn request(&mut self, visits: &[BlockId]) -> Result<()> {
        self.announced.extend(visits);
        Ok(())
    }

    fn next(&mut self, block: BlockId) -> Result<Arc<BlockWeights>> {
        self.announced.take(block)?;
        self.counters.hits += 1;
        self.blocks
            .get(usize::from(block.0))
            .cloned()
            .ok_or_else(|| Error::invariant("a block outside the model was asked for").found(block.0))
    }
}

impl TrainingSource for SlabSource {
    fn counters(&self) -> Counters {
        self.counters
    }
}

fn read_linear(file: &File, slab: &Slab, layer: &SlabLayer, device: &Device, dtype: DType) -> Result<Tensor> {
    let codes = read_checked(file, slab, &layer.qweight)?;
    let scales: Vec<f32> = read_checked(file, slab, &layer.scale)?.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect();
    let (rows, columns) = (layer.out_features, layer.in_features);
    if codes.len() != rows * layer.padded_in || scales.len() != rows || columns > layer.padded_in {
        return Err(Error::invariant(format!("the ranges of '{}' do not fit its shape", layer.name)).at(slab.path()));
    }
    let _span = tracing::info_span!("dequantise").entered();
    let mut values = vec![bf16::ZERO; rows * columns];
    let codes: &[i8] = bytemuck::cast_slice(&codes);
    values
        .par_chunks_mut(columns)
        .zip(codes.par_chunks(layer.padded_in))
        .zip(&scales)
        .for_each(|((out, codes), scale)| quant::dequantize(&codes[..columns], *scale, out));
    Tensor::from_vec(values, (rows, columns), &Device::Cpu)
        .and_then(|t| t.to_dtype(dtype)?.to_device(device))
        .map_err(|e| tensor_error(&format!("cannot place '{}' on the device", layer.name), e))
}

/// The bytes of `range`, after every page that it touches matched its hash.
pub(crate) fn read_checked(file: &File, slab: &Slab, range: &Range<u64>) -> Result<Vec<u8>> {
    let short = |e, at: u64| Error::io("cannot read the slab", slab.path(), e).offset(at).advice("the slab is truncated: build it anew");
    let Some(pages) = slab.pages() else {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        file.read_exact_at(&mut bytes, range.start).map_err(|e| short(e, range.start))?;
        return Ok(bytes);
    };
    let touched = pages.touched_by(range);
    let start = pages.range(touched.start).start;
    let end = pages.range(touched.end.saturating_sub(1)).end;
    let mut bytes = vec![0; end.saturating_sub(start) as usize];
    file.read_exact_at(&mut bytes, start).map_err(|e| short(e, start))?;
    let whole = touched.clone().collect::<Vec<_>>().par_iter().copied().find_map_first(|page| {
        let at = pages.range(page);
        let content = bytes.get((at.start - start) as usize..(at.end - start) as usize)?;
        (!pages.matches(page, content)).then_some(at.start)
    });
    if let Some(offset) = whole {
        return Err(Error::data("the slab is corrupt: a page does not match its hash")
            .at(slab.path())
            .offset(offset)
            .advice("build the slab anew (delete it and run the same command, or `serenity-slab build`)"));
    }
    let inside = (range.start.saturating_sub(start)) as usize..(range.end.saturating_sub(start)) as usize;
    bytes.get(inside).map(<[u8]>::to_vec).ok_or_else(|| Error::data("the slab ends before a weight").at(slab.path()).offset(range.end))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::optimizer::host;
    use serenity_protocol::message::Role;
    use std::path::{Path, PathBuf};

    fn golden() -> (PathBuf, PathBuf, TransformerGeometry) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/goldens");
        let slab = root.join("cases/squareq/flux2tiny_int8.safetensors");
        let manifest = root.join("cases/squareq/flux2tiny_int8.manifest.json");
        (slab, manifest, TransformerGeometry::from_config_file(&root.join("model/transformer/config.json")).unwrap())
    }

    /// Codes times scales straight from the safetensors file, without this program's reader.
    fn reference(slab: &Path, manifest: &Path, linear: &str) -> Vec<f32> {
        let manifest: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(manifest).unwrap()).unwrap();
        let layers = manifest["layers"].as_array().unwrap();
        let layer = layers.iter().find(|l| l["canonical_name"] == linear).unwrap();
        let bytes = std::fs::read(slab).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |key: &str| file.tensor(layer[key].as_str().unwrap()).unwrap();
        let (codes, scales) = (tensor("qweight_key"), tensor("scale_key"));
        let (padded, columns) = (codes.shape()[1], layer["orig_shape"][1].as_u64().unwrap() as usize);
        let scale = |row: usize| f32::from_le_bytes(scales.data()[4 * row..4 * row + 4].try_into().unwrap());
        let value = |i: usize| f32::from(codes.data()[i / columns * padded + i % columns] as i8) * scale(i / columns);
        (0..codes.shape()[0] * columns).map(|i| bf16::from_f32(value(i)).to_f32()).collect()
    }

    #[test]
    fn weights_are_codes_times_scales() {
        let (slab, manifest, geometry) = golden();
        let opened = Slab::open(&slab, &manifest).unwrap();
        let process = Process::detached(Role::Trainer);
        let mut source = SlabSource::open(&opened, &geometry, &Device::Cpu, DType::F32, &process).unwrap();
        let visits: Vec<BlockId> = geometry.blocks().chain(geometry.blocks().rev()).collect();
        source.request(&visits).unwrap();
        for block in visits {
            let weights = source.next(block).unwrap();
            for spec in geometry.block_linears(block) {
                let short = spec.name.strip_prefix(&geometry.block_prefix(block)).unwrap().trim_start_matches('.');
                assert_eq!(host(weights.linear(short).unwrap()).unwrap(), reference(&slab, &manifest, &spec.name), "{}", spec.name);
            }
        }
        assert_eq!(source.next(BlockId(0)).unwrap_err().exit_code(), 70, "a visit that was not announced");
    }

    #[test]
    fn a_truncated_slab_is_refused() {
        let (slab, manifest, geometry) = golden();
        let dir = tempfile::tempdir().unwrap();
        let cut = dir.path().join("cut.safetensors");
        std::fs::copy(&slab, &cut).unwrap();
        // Cut after it was opened: the header's checks are over.
        let opened = Slab::open(&cut, &manifest).unwrap();
        let file = File::options().write(true).open(&cut).unwrap();
        file.set_len(opened.file_bytes() / 2).unwrap();
        let process = Process::detached(Role::Trainer);
        let error = SlabSource::open(&opened, &geometry, &Device::Cpu, DType::F32, &process).err().unwrap();
        assert_eq!(error.exit_code(), 65, "{error}");
    }

    #[test]
    fn a_stop_is_heard_while_reading() {
        let (slab, manifest, geometry) = golden();
        let process = Process::detached(Role::Trainer);
        process.stop_flag().store(true, std::sync::atomic::Ordering::Relaxed); // read by the same thread
        let opened = Slab::open(&slab, &manifest).unwrap();
        assert_eq!(SlabSource::open(&opened, &geometry, &Device::Cpu, DType::F32, &process).err().unwrap().exit_code(), 75);
    }
}
