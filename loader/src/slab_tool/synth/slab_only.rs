//! A slab of random codes, written at the speed of the disk: the whole streaming system at full size without any checkpoint.
//!
//! Codes are uniform, and the scales give the dequantised weights the standard deviations of [`super::transformer`], so that training
//! from such a slab stays finite. This is not the slab that `build` would make of the preset's checkpoint.

use std::path::Path;

use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result};

use super::super::build;
use super::super::companion::CompanionPlan;
use super::super::files::{self, SlabFiles};
use super::super::model::Model;
use super::super::plan::{Content, SlabPlan};
use super::super::produce::{Hashing, Product, produce};
use super::super::progress::Progress;
use super::super::units::Division;
use super::super::writer::check_free_space;
use super::component::draw_of;
use super::random::Stream;
use super::{Preset, transformer};

/// Standard deviation of a uniform code in -127..=127.
const CODE_STD: f64 = 73.6;
/// Spread of the scales of a linear's rows, relative.
const SCALE_SPREAD: f64 = 0.05;

/// Makes slab, companion and manifest of `preset` at `prefix`; returns the files and their bytes.
///
/// # Errors
/// [`Error::TryAgain`] for a full disk or an interruption.
pub fn synth_slab(preset: Preset, prefix: &Path, seed: u64, process: &Process) -> Result<(SlabFiles, u64)> {
    synth_slab_with(preset, prefix, seed, Division::default(), process)
}

/// As [`synth_slab`], divided as told: the bytes are the same however that is.
///
/// # Errors
/// As [`synth_slab`].
pub fn synth_slab_with(preset: Preset, prefix: &Path, seed: u64, division: Division, process: &Process) -> Result<(SlabFiles, u64)> {
    let geometry = preset.transformer();
    let model = Model::Transformer(geometry.clone());
    let plan = SlabPlan::of(&model, 64, false)?;
    let others = CompanionPlan::new(&model)?;
    let files = SlabFiles::of(prefix)?;
    std::fs::create_dir_all(files.folder()).map_err(|e| Error::io("cannot create the output folder", files.folder(), e))?;
    let _lock = files::lock(&files)?;
    let total = plan.file.file_bytes + others.file.file_bytes;
    check_free_space(files.folder(), total)?;
    let mut progress = Progress::new(process, "synth", total);
    let page_bytes = files::page_bytes_for(plan.file.file_bytes);
    let specs = transformer::specs(&geometry);
    let specs: Vec<_> = others.file.tensors.iter().filter_map(|t| specs.iter().find(|s| s.name == t.name).cloned()).collect();
    let (draw_codes, draw_others) = (|index, at, out: &mut [u8]| draw(&plan, seed, index, at, out), draw_of(&specs, seed));
    let slab = Product { plan: &plan.file, temp: &files.partial, page_bytes, hashing: Hashing::Parts, draw: &draw_codes };
    let companion = Product {
        plan: &others.file,
        temp: &files.companion_partial,
        page_bytes: files::PAGE_BYTES,
        hashing: Hashing::Whole,
        draw: &draw_others,
    };
    let mut written = produce(&[slab, companion], division, &mut progress)?.into_iter();
    let (Some(hashes), Some(of_companion)) = (written.next(), written.next()) else {
        return Err(Error::invariant("two files were written and their hashes are not there"));
    };
    let companion = others.manifest_entry(&files.companion, of_companion)?;
    let manifest = build::assemble(&model, None, &plan, page_bytes, hashes, companion);
    files::finish(&files, &manifest)?;
    Ok((files, total))
}

/// The bytes of tensor `index` from `at` on.
fn draw(plan: &SlabPlan, seed: u64, index: usize, at: u64, out: &mut [u8]) -> Result<()> {
    let absent = || Error::invariant("a tensor outside the plan");
    let tensor = plan.file.tensors.get(index).ok_or_else(absent)?;
    let stream = Stream::new(seed, &tensor.name);
    match *plan.contents.get(index).ok_or_else(absent)? {
        Content::Codes(linear) => {
            stream.fill_codes(at, out);
            clear_padding(plan, linear, at, out);
        }
        Content::Scales(linear) => {
            let (linear, _) = plan.linears.get(linear).ok_or_else(absent)?;
            let std = transformer::gain(&linear.name) / (linear.in_features as f64).sqrt();
            let scale = std / CODE_STD;
            stream.fill_f32(at, out, scale as f32, scale * SCALE_SPREAD);
        }
        Content::ZeroPoints(_) | Content::Pad => out.fill(0),
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
    for (i, code) in codes.iter_mut().enumerate() {
        if (first as usize + i) % padded >= linear.in_features {
            *code = 0;
        }
    }
}
