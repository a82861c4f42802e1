//! What a slab holds; with the original at hand, how far the quantised weights are from it.

use rayon::prelude::*;
use serde::Serialize;
use serenity_protocol::process::Process;
use serenity_protocol::slab::manifest::Component;
use serenity_protocol::slab::{Slab, SlabLayer};
use serenity_protocol::{Error, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;

use super::model::{Model, Source};
use super::progress::Progress;
use super::source::{SourceReader, element_bytes};

/// A slab in numbers.
#[derive(Debug, Clone, Serialize)]
pub struct SlabInfo {
    /// File.
    pub slab: String,
    /// Its length.
    pub file_bytes: u64,
    /// Bytes of all codes.
    pub qweight_bytes: u64,
    /// `transformer` or `text_encoder`.
    pub component: Component,
    /// Label of the architecture.
    pub architecture_id: String,
    /// Signature of the model.
    pub model_signature: String,
    /// Signature of this slab.
    pub signature: String,
    /// Number of layers.
    pub layer_count: usize,
    /// Page size of the checksums, if there are any.
    pub page_bytes: Option<u64>,
    /// Blocks (layers of a text encoder), if the geometry is known.
    pub blocks: Option<usize>,
    /// Whether every block is one aligned run of the file, if the geometry is known.
    pub blocks_contiguous: Option<bool>,
    /// The companion's path, if there is one.
    pub companion: Option<String>,
    /// The layers.
    pub layers: Vec<LayerInfo>,
}

/// One layer in numbers.
#[derive(Debug, Clone, Serialize)]
pub struct LayerInfo {
    /// Name.
    pub name: String,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// First byte of the codes.
    pub offset: u64,
    /// Distance from the original.
    #[serde(flatten)]
    pub error: Option<LayerError>,
}

/// How far the dequantised weight is from the original.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LayerError {
    /// `|dequantised - original| / |original|`, both norms L2.
    pub relative_l2: f64,
    /// Cosine between the two.
    pub cosine: f64,
}

/// Describes a slab; reads its codes only if `model` gives the original to compare with.
///
/// # Errors
/// Where the original cannot be read or lacks a layer.
pub fn info(slab: &Slab, model: Option<&str>, process: &Process) -> Result<SlabInfo> {
    let mut layers: Vec<LayerInfo> = slab
        .layers()
        .iter()
        .map(|l| LayerInfo { name: l.name.clone(), shape: [l.out_features, l.in_features], offset: l.qweight.start, error: None })
        .collect();
    if let Some(model) = model {
        let source = open_original(slab, model)?;
        let file = File::open(slab.path()).map_err(|e| Error::io("cannot open the slab", slab.path(), e))?;
        let mut progress = Progress::new(process, "compare", slab.layers().iter().map(|l| l.qweight.end - l.qweight.start).sum());
        for (layer, out) in slab.layers().iter().zip(&mut layers) {
            out.error = Some(compare(&file, slab, layer, &source)?);
            progress.add(layer.qweight.end - layer.qweight.start)?;
        }
    }
    let additions = slab.manifest().serenity.as_ref();
    let blocks = Model::of_slab(slab).map(|model| model.blocks());
    Ok(SlabInfo {
        slab: slab.path().display().to_string(),
        file_bytes: slab.file_bytes(),
        qweight_bytes: slab.layers().iter().map(|l| l.qweight.end - l.qweight.start).sum(),
        component: additions.map(|a| a.component).unwrap_or_default(),
        architecture_id: slab.manifest().architecture_id.clone(),
        model_signature: slab.model_signature().to_owned(),
        signature: format!("{:016x}", slab.signature()),
        layer_count: slab.layers().len(),
        page_bytes: additions.map(|a| a.page_bytes),
        blocks: blocks.as_ref().map(Vec::len),
        blocks_contiguous: blocks.map(|blocks| blocks.iter().all(|linears| is_contiguous(slab, linears))),
        companion: slab.companion().map(|p| p.display().to_string()),
        layers,
    })
}

/// The checkpoint that the slab claims to be made from.
fn open_original(slab: &Slab, model: &str) -> Result<Source> {
    match Model::of_slab(slab) {
        Some(Model::TextEncoder(shape)) => {
            let source = Source::open(model, Component::TextEncoder, Some(shape.layers))?;
            if source.model() != Model::TextEncoder(shape) {
                return Err(Error::data("the slab is of another text encoder than --model").at(slab.path()).advice("correct --model"));
            }
            Ok(source)
        }
        _ => {
            let source = Source::open(model, Component::Transformer, None)?;
            if let Model::Transformer(geometry) = source.model() {
                slab.check_model(&geometry)?;
            }
            Ok(source)
        }
    }
}

/// Whether the codes of these linears follow each other without gap, from a multiple of 4096 on.
fn is_contiguous(slab: &Slab, linears: &[serenity_protocol::geometry::LinearSpec]) -> bool {
    let ranges: Option<Vec<_>> = linears.iter().map(|l| slab.layer(&l.name).map(|l| l.qweight.clone())).collect();
    ranges.is_some_and(|r| r.first().is_some_and(|f| f.start % 4096 == 0) && r.windows(2).all(|w| matches!(w, [a, b] if a.end == b.start)))
}

fn compare(file: &File, slab: &Slab, layer: &SlabLayer, source: &Source) -> Result<LayerError> {
    let place = source.place(&format!("{}.weight", layer.name), &[layer.out_features, layer.in_features])?;
    let row_bytes = layer.in_features * element_bytes(place.dtype)?;
    let io = |e| Error::io("cannot read the slab", slab.path(), e);
    let mut scales = vec![0; layer.out_features * 4];
    file.read_exact_at(&mut scales, layer.scale.start).map_err(io)?;
    let scales: Vec<f32> = scales.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect();
    // Sums of (original², dequantised², product, difference²), in row order within and across batches: the same on any number of threads.
    let mut sums = [0f64; 4];
    SourceReader::default().batches(&place, layer.out_features, layer.in_features, |batch| {
        let mut codes = vec![0u8; batch.rows * layer.padded_in];
        file.read_exact_at(&mut codes, layer.qweight.start + (batch.row * layer.padded_in) as u64).map_err(io)?;
        let rows = batch.bytes().par_chunks_exact(row_bytes).zip(codes.par_chunks_exact(layer.padded_in)).enumerate();
        let row_sums: Vec<[f64; 4]> = rows
            .map(|(i, (bytes, codes))| {
                let mut original = Vec::with_capacity(layer.in_features);
                place.append_f32((batch.row + i) * layer.in_features, layer.in_features, bytes, &mut original)?;
                let scale = scales.get(batch.row + i).copied().unwrap_or(f32::NAN);
                Ok(original.iter().zip(codes).fold([0f64; 4], |[o, d, p, e], (&w, &code)| {
                    let (w, q) = (f64::from(w), f64::from(f32::from(code as i8) * scale));
                    [o + w * w, d + q * q, p + w * q, e + (w - q) * (w - q)]
                }))
            })
            .collect::<Result<_>>()?;
        for row in row_sums {
            sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
        }
        Ok(())
    })?;
    let [original, dequantised, product, error] = sums;
    let ratio = |a: f64, b: f64, of_nothing: f64| if b > 0.0 { a / b } else { of_nothing };
    Ok(LayerError { relative_l2: ratio(error.sqrt(), original.sqrt(), 0.0), cosine: ratio(product, (original * dequantised).sqrt(), 1.0) })
}
