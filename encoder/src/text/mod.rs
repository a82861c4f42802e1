//! The text encoder: Mistral 3, one layer at a time for all captions.
//!
//! `weights` finds and reads a layer, `layer` is its forward pass, `encode` drives captions through the layers. Only real tokens are
//! computed (pads are invisible to them, `spec/flux2.md` 2.4), at the positions that left padding gives them; the one vector that every
//! pad shares follows its own short path. Only as many layers run as the highest hidden state needs.

mod encode;
mod layer;
mod weights;

pub use encode::{Embedding, EncodeTimes, Encoded, TextEncoder};
