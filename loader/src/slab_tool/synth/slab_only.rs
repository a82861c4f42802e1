//! A slab of random codes, written at the speed of the disk: the whole streaming system at full size without any checkpoint.
//!
//! Codes are uniform, and the scales give the dequantised weights the standard deviations of [`super::transformer`], so that training
//! from such a slab stays finite. This is not the slab that `build` would make of the preset's checkpoint.

use std::path::Path;
use std::sync::mpsc::sync_channel;

use rayon::prelude::*;
use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result};

use super::super::build::{self, SlabFiles};
use super::super::companion::CompanionPlan;
use super::super::plan::{Content, SlabPlan};
use super::super::progress::{Progress, joined};
use super::super::writer::{FileHashes, FileWriter, check_free_space};
use super::random::Stream;
use super::{Preset, component, transformer};

/// Standard deviation of a uniform code in -127..=127.
const CODE_STD: f64 = 73.6;
/// Spread of the scales of a linear's rows, relative.
const SCALE_SPREAD: f64 = 0.05;
/// Codes drawn at once, a multiple of 8.
const BATCH_CODES: u64 = 16 << 20;

/// Makes slab, companion and manifest of `preset` at `prefix`; returns the files and their bytes.
///
/// # Errors
/// [`Error::TryAgain`] for a full disk or an interruption.
pub fn synth_slab(preset: Preset, prefix: &Path, seed: u64, process: &Process) -> Result<(SlabFiles, u64)> {
    let geometry = preset.transformer();
    let plan = SlabPlan::new(&geometry, 64, false)?;
    let others = CompanionPlan::new(&geometry)?;
    let files = SlabFiles::of(prefix)?;
    std::fs::create_dir_all(files.folder()).map_err(|e| Error::io("cannot create the output folder", files.folder(), e))?;
    let _lock = build::lock(&files)?;
    let total = plan.file.file_bytes + others.file.file_bytes;
    check_free_space(files.folder(), total)?;
    let mut progress = Progress::new(process, "synth", total);
    let page_bytes = build::page_bytes_for(plan.file.file_bytes);
    let hashes = write_codes(&plan, &files.partial, page_bytes, seed, &mut progress)?;
    let specs = transformer::specs(&geometry);
    let specs: Vec<_> = others.file.tensors.iter().filter_map(|t| specs.iter().find(|s| s.name == t.name).cloned()).collect();
    let written = component::write_planned(&others.file, &files.companion_partial, &specs, seed, &mut progress)?;
    let companion = others.manifest_entry(&files.companion, written)?;
    let manifest = build::assemble(&geometry, None, &plan, page_bytes, hashes, companion);
    build::finish(&files, &manifest)?;
    Ok((files, total))
}

fn write_codes(plan: &SlabPlan, partial: &Path, page_bytes: u64, seed: u64, progress: &mut Progress) -> Result<FileHashes> {
    let mut writer = FileWriter::create(&plan.file, partial, page_bytes)?;
    std::thread::scope(|scope| {
        let (out, batches) = sync_channel::<Vec<u8>>(2);
        let written = scope.spawn(move || {
            for bytes in batches {
                writer.write(&bytes)?;
            }
            Ok(writer)
        });
        let drawn = draw(plan, seed, progress, |bytes| out.send(bytes).is_ok());
        drop(out);
        let writer = joined(written.join())?;
        drawn?;
        writer.finish()
    })
}

fn draw(plan: &SlabPlan, seed: u64, progress: &mut Progress, send: impl Fn(Vec<u8>) -> bool) -> Result<()> {
    for (tensor, content) in plan.file.tensors.iter().zip(&plan.contents) {
        let stream = Stream::new(seed, &tensor.name);
        let mut at = 0;
        while at < tensor.bytes {
            let now = BATCH_CODES.min(tensor.bytes - at);
            let bytes = match *content {
                Content::Codes(index) => {
                    let mut codes = stream.code_bytes(at, now.next_multiple_of(8) as usize);
                    codes.truncate(now as usize);
                    clear_padding(plan, index, at, &mut codes);
                    codes
                }
                Content::Scales(index) => {
                    let (linear, _) = plan.linears.get(index).ok_or_else(|| Error::invariant("a linear outside the plan"))?;
                    let std = transformer::gain(&linear.name) / (linear.in_features as f64).sqrt();
                    let scale = std / CODE_STD;
                    stream.f32_bytes(at / 4, (now / 4) as usize, scale as f32, scale * SCALE_SPREAD)
                }
                Content::ZeroPoints(_) | Content::Pad => vec![0; now as usize],
            };
            if !send(bytes) {
                // The writer's own error says why.
                return Ok(());
            }
            progress.add(now)?;
            at += now;
        }
    }
    Ok(())
}

/// Zeroes the columns beyond `in_features`.
fn clear_padding(plan: &SlabPlan, index: usize, first: u64, codes: &mut [u8]) {
    let Some((linear, layer)) = plan.linears.get(index) else { return };
    let padded = layer.packed_shape[1];
    if padded == linear.in_features {
        return;
    }
    codes.par_iter_mut().enumerate().for_each(|(i, code)| {
        if (first as usize + i) % padded >= linear.in_features {
            *code = 0;
        }
    });
}
