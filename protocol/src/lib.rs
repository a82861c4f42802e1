//! What the Serenity processes agree on, and nothing else: no tensor library, no CUDA.
//!
//! The path of a frozen block: [`checkpoint`] → (`serenity-slab`) → [`slab`] → (`serenity-loader`) → [`ring`] → trainer. The path of
//! a sample: images and captions → (`serenity-encoder`) → [`cache`] → trainer. Around them: [`config`] and [`plan`], [`message`] and
//! [`process`], [`error`] and [`atomic_file`].
#![warn(missing_docs)]

pub mod atomic_file;
pub mod cache;
pub mod checkpoint;
pub mod checksum;
pub mod config;
pub mod dataset;
pub mod error;
pub mod faults;
pub mod fp8;
pub mod geometry;
pub mod message;
pub mod model_path;
pub mod names;
pub mod plan;
pub mod process;
pub mod ring;
pub mod slab;
pub mod targets;

pub use error::{Error, Result};
