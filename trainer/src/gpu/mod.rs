//! Training on a GPU: the step of [`crate::cuda`] between the ring (or the slab) and the training loop.
//!
//! ```text
//! ring_supply  payloads from the ring: leased, copied from where they lie, compared on the device
//! slab_supply  payloads from the slab, for blocks that stay on the device
//! engine       the step behind the loop's trait, and the device's memory against what is allowed
//! parity       the reference's cases
//! ```

pub mod engine;
pub mod parity;
pub mod ring_supply;
pub mod slab_supply;
