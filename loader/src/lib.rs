//! Streams frozen blocks from the slab into the ring, and builds, checks and describes slabs.
//!
//! The path of a chunk: the trainer's request → [`service`] (which slot) → [`reader`] (many pages of the file at once, checked) →
//! [`fill`] (each page dequantised or copied into the slot, hashed) → published in the ring. `serenity-slab`'s half is [`slab_tool`].

pub mod bench;
pub mod faults;
pub mod fill;
pub mod reader;
pub mod service;
pub mod slab_tool;
pub mod stages;
