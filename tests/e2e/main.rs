#![allow(clippy::unwrap_used, clippy::expect_used)]
//! The real processes, end to end: one binary, so that they are built and linked once. [`lab`] drives processes; each other module
//! is one promise of the README.

mod bad_input;
mod crashes;
mod lab;
mod quickstart;
mod same_bytes;
mod slab_alone;
mod standalone;
