//! The operations of a block on the device, as methods of [`crate::Gpu`]; formulas as in the CPU model's operations of the same names.
//!
//! All are queued on the compute stream. Matrices have one row per token, samples after each other; what is per sample (modulation) has one
//! row per sample. Activations are bf16 or float32, all of one call the same; modulation, norm weights, tables and targets are float32.
#![forbid(unsafe_code)]

pub mod checksum;
pub mod conv;
pub mod elementwise;
pub mod loss;
pub mod optimizer;
pub mod rows;
pub mod text;
pub mod vae;

use serenity_protocol::{Error, Result};

use crate::mat::Mat;

/// Threads of every block, `THREADS` in the sources.
pub(crate) const THREADS: u32 = 256;
const BLOCK: [u32; 3] = [THREADS, 1, 1];

/// The grid of an operation over `rows` rows, each cut into pieces of `per_block` columns.
fn grid(rows: usize, cols: usize, per_block: usize) -> Result<[u32; 3]> {
    let (x, y) = (u32::try_from(rows).ok(), u32::try_from(cols.div_ceil(per_block)).ok().filter(|y| *y <= 65_535));
    match (x.filter(|x| i32::try_from(*x).is_ok()), y) {
        (Some(x), Some(y)) => Ok([x, y, 1]),
        _ => Err(Error::invariant("a matrix is too large for one launch").found(format!("{rows} x {cols}"))),
    }
}

/// The kernel of an operation and its elements per access: the wide one where every view allows it.
fn variant(name: &str, mats: &[Mat]) -> (String, usize) {
    let lanes = mats.iter().map(|m| m.ty.lanes()).max().unwrap_or(1);
    if mats.iter().all(|m| m.wide(lanes)) { (name.to_string(), lanes) } else { (format!("{name}_1"), 1) }
}

/// Checks per-sample parameters: `rows` samples of `cols` values for `tokens` rows each.
fn check_modulation(what: &str, m: Mat, x: Mat) -> Result<usize> {
    if m.rows == 0 || !x.rows.is_multiple_of(m.rows) {
        return Err(Error::invariant(format!("{what} has a wrong number of samples"))
            .expected(format!("a divisor of {} rows", x.rows))
            .found(m.describe()));
    }
    m.expect_shape(what, crate::mat::Ty::F32, m.rows, x.cols)?;
    Ok(x.rows / m.rows)
}

/// A size as the kernels' `int`.
fn int(value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::invariant("a size is too large for a kernel").found(value))
}
