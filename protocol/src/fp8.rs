//! 8-bit floats of community checkpoints, and the scales that come with them.
//!
//! A scaled weight is `code * scale` (float32 product). Two names are in use for the scale of `MODULE.weight`, `MODULE.weight_scale` and
//! `MODULE.scale_weight`, and `MODULE.weight_scale_inv`, which in spite of its name is a factor too. It is one number or one for each
//! row. Activation scales (`input_scale`, `scale_input`) say nothing about the weight. A file without any scale was cast without one,
//! and its values are what they are; in a file with scales, a weight that lacks its own would be wrong by orders of magnitude and is
//! refused, as is a scale of any other shape (block-wise formats).

#![forbid(unsafe_code)]

use safetensors::Dtype;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};

/// Names of the scale of `MODULE.weight`, after `MODULE.`.
const SCALE_NAMES: &[&str] = &["weight_scale", "scale_weight", "weight_scale_inv"];
/// An empty tensor with which a file declares that its 8-bit weights have scales.
const MARKER: &str = "scaled_fp8";

/// The factors of an 8-bit weight.
#[derive(Debug, Clone, PartialEq)]
pub enum Scale {
    /// One for the whole tensor.
    Tensor(f32),
    /// One for each row.
    Rows(Vec<f32>),
}

impl Scale {
    /// The factor of a row; 1 beyond the last.
    #[must_use]
    pub fn of_row(&self, row: usize) -> f32 {
        match self {
            Scale::Tensor(scale) => *scale,
            Scale::Rows(scales) => scales.get(row).copied().unwrap_or(1.0),
        }
    }
}

/// Whether the type is an 8-bit float.
#[must_use]
pub fn is_fp8(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2)
}

/// Whether the checkpoint's 8-bit weights have scales.
#[must_use]
pub fn has_scales(checkpoint: &Checkpoint) -> bool {
    checkpoint.names().any(|name| {
        let (_, last) = name.rsplit_once('.').unwrap_or(("", name));
        last == MARKER || SCALE_NAMES.contains(&last)
    })
}

/// The scale of the stored 8-bit tensor `weight` of `rows` rows; `None` in a checkpoint without scales (`scaled` is [`has_scales`]).
///
/// # Errors
/// [`Error::Data`] naming the tensor if it has no scale among others that do, two of them, or one of another shape, type or range.
pub fn scale_of(checkpoint: &Checkpoint, weight: &str, rows: usize, scaled: bool) -> Result<Option<Scale>> {
    if !scaled {
        return Ok(None);
    }
    let module = weight.strip_suffix("weight").unwrap_or(weight);
    let names: Vec<String> = SCALE_NAMES.iter().map(|n| format!("{module}{n}")).filter(|n| checkpoint.contains(n)).collect();
    let [name] = names.as_slice() else {
        let what = if names.is_empty() { "has no scale, although others of the checkpoint have one" } else { "has more than one scale" };
        return Err(Error::data(format!("the 8-bit tensor '{weight}' {what}"))
            .at(checkpoint.root())
            .expected(format!("one of '{module}{}'", SCALE_NAMES.join(&format!("', '{module}"))))
            .found(if names.is_empty() { "none".into() } else { names.join(", ") })
            .advice("take a checkpoint with per-tensor or per-row scales, or the bfloat16 one"));
    };
    let tensor = checkpoint.tensor(name)?;
    let values = tensor.to_f32().map_err(|e| e.at(checkpoint.root()).found(format!("'{name}' of type {:?}", tensor.dtype)))?;
    let scale = match (tensor.shape.as_slice(), values.as_slice()) {
        ([] | [1] | [1, 1], [one]) => Scale::Tensor(*one),
        ([n] | [n, 1], _) if *n == rows => Scale::Rows(values.clone()),
        _ => {
            return Err(Error::data(format!("the scale '{name}' has a shape that is not supported"))
                .at(checkpoint.root())
                .expected(format!("one number, or one for each of the {rows} rows"))
                .found(format!("{:?}", tensor.shape))
                .advice("block-wise formats cannot be read: take a checkpoint with per-tensor or per-row scales, or the bfloat16 one"));
        }
    };
    if let Some(bad) = values.iter().find(|v| !v.is_finite() || **v < 0.0) {
        return Err(Error::data(format!("the scale '{name}' is impossible"))
            .at(checkpoint.root())
            .expected("finite numbers, none negative")
            .found(bad));
    }
    Ok(Some(scale))
}

/// Appends the values of 8-bit codes (exact; NaN codes become NaN). Other types append nothing.
pub(crate) fn append(codes: &[u8], dtype: Dtype, values: &mut Vec<f32>) {
    match dtype {
        Dtype::F8_E4M3 => values.extend(codes.iter().map(|&c| E4M3[usize::from(c)])),
        // The upper byte of a float16.
        Dtype::F8_E5M2 => values.extend(codes.iter().map(|&c| half::f16::from_bits(u16::from(c) << 8).to_f32())),
        _ => {}
    }
}

/// E4M3 "fn": bias 7, no infinities, NaN where exponent and mantissa are all ones.
static E4M3: [f32; 256] = e4m3_table();

const fn e4m3_table() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, mantissa) = ((code as u32 >> 3) & 15, code as u32 & 7);
        let magnitude = if code & 0x7f == 0x7f {
            f32::NAN
        } else if exponent == 0 {
            mantissa as f32 / 512.0
        } else {
            f32::from_bits((exponent + 120) << 23 | mantissa << 20)
        };
        table[code] = if code >= 128 { -magnitude } else { magnitude };
        code += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn e4m3_has_the_values_of_its_definition() {
        let mut values = Vec::new();
        append(&(0..=255).collect::<Vec<u8>>(), Dtype::F8_E4M3, &mut values);
        // OCP 8-bit floating point specification, table of E4M3 limits.
        for (code, value) in
            [(0x7e, 448.0), (0x08, 2f32.powi(-6)), (0x07, 0.875 * 2f32.powi(-6)), (0x01, 2f32.powi(-9)), (0x38, 1.0), (0xb9, -1.125)]
        {
            assert_eq!(values[code], value, "{code:#x}");
        }
        assert!(values[0x7f].is_nan() && values[0xff].is_nan() && values[0x80].to_bits() == 0x8000_0000);
        assert!((1..0x7f).all(|c| values[c] > values[c - 1] && values[c + 128] == -values[c]));
    }

    #[test]
    fn e5m2_has_the_values_of_its_definition() {
        let mut values = Vec::new();
        append(&[0x7b, 0x04, 0x01, 0x3c, 0xbd, 0x7c, 0x7d], Dtype::F8_E5M2, &mut values);
        assert_eq!(values[..5], [57344.0, 2f32.powi(-14), 2f32.powi(-16), 1.0, -1.25]);
        assert!(values[5] == f32::INFINITY && values[6].is_nan());
    }
}
