//! From a block's payload bytes to float32 rows, for either payload form.
//!
//! Both forms pass through the same bf16 values: the `bf16` form was rounded by the loader, the `int8` form is dequantised here with the
//! same function. That is what makes `dequant: cpu` and `dequant: gpu` train to the same bytes.

use half::bf16;
use rayon::prelude::*;
use serenity_protocol::slab::layout::{BlockLayout, Part, PartKind};
use serenity_protocol::slab::quant;
use serenity_protocol::{Error, Result};

/// The weights of a block in payload order, each `[out, in]` row-major.
///
/// # Errors
/// [`Error::Invariant`] if `payload` is shorter than the layout, or the layout has codes without scales.
pub fn decode(layout: &BlockLayout, payload: &[u8]) -> Result<Vec<Vec<f32>>> {
    let slice = |part: &Part| {
        let (start, end) = (part.offset as usize, (part.offset + part.bytes) as usize);
        payload.get(start..end).ok_or_else(|| {
            Error::invariant(format!("the payload of block {} ends inside '{}'", layout.block.0, part.linear))
                .expected(format!("{} bytes", layout.bytes))
                .found(format!("{} bytes", payload.len()))
        })
    };
    let mut weights = Vec::new();
    let mut parts = layout.parts.iter();
    while let Some(part) = parts.next() {
        match part.kind {
            PartKind::Bf16Rows => weights.push(widen(slice(part)?)),
            PartKind::Int8Rows => {
                let scales = parts
                    .next()
                    .filter(|s| s.kind == PartKind::Scales && s.linear == part.linear)
                    .ok_or_else(|| Error::invariant(format!("the codes of '{}' travel without their scales", part.linear)))?;
                weights.push(dequantise(part, slice(part)?, slice(scales)?));
            }
            PartKind::Scales => return Err(Error::invariant(format!("the scales of '{}' travel without their codes", part.linear))),
        }
    }
    Ok(weights)
}

fn widen(bytes: &[u8]) -> Vec<f32> {
    bytes.par_chunks_exact(2).with_min_len(1 << 14).map(|c| bf16::from_le_bytes([c[0], c[1]]).to_f32()).collect()
}

fn dequantise(part: &Part, codes: &[u8], scales: &[u8]) -> Vec<f32> {
    let (inner, stored) = (part.in_features, part.padded_in);
    let mut rows = vec![0f32; part.out_features * inner];
    rows.par_chunks_exact_mut(inner).zip(codes.par_chunks_exact(stored)).zip(scales.par_chunks_exact(4)).with_min_len(16).for_each(
        |((row, codes), scale)| {
            let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
            let codes: &[i8] = bytemuck::cast_slice(&codes[..inner]);
            // Through bf16 in pieces that stay in registers and L1.
            let mut rounded = [bf16::ZERO; 256];
            for (out, codes) in row.chunks_mut(256).zip(codes.chunks(256)) {
                let rounded = &mut rounded[..codes.len()];
                quant::dequantize(codes, scale, rounded);
                for (o, r) in out.iter_mut().zip(rounded) {
                    *o = r.to_f32();
                }
            }
        },
    );
    rows
}
