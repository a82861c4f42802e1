//! `serenity-slab`: builds slabs, proves them intact, describes them, and makes models of random weights.
//!
//! The path of a weight: [`source`] (rows of the checkpoint) → [`build`] (quantised) → [`writer`] (hashed, on the disk), at the place
//! that [`plan`] gave it.

pub mod build;
pub mod companion;
mod direct;
mod files;
pub mod info;
pub mod model;
pub mod plan;
mod produce;
mod progress;
pub mod repack;
pub mod source;
pub mod synth;
mod units;
pub mod verify;
pub mod writer;
