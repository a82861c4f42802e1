//! The text encoder: Mistral 3, one layer at a time for all captions.
//!
//! On a CUDA device `cuda` does the same with the engine's operations; `stream` brings it the layers, out of `files`, through `feed`.
//!
//! `weights` finds a layer and reads it through `direct`, `layer` is its forward pass, `encode` packs captions and drives them through the layers, `hidden` holds
//! their states in between. Only real tokens are
//! computed (pads are invisible to them, `spec/flux2.md` 2.4), at the positions that left padding gives them; the one vector that every
//! pad shares follows its own short path. Only as many layers run as the highest hidden state needs.

mod any;
pub mod bench;
pub mod check;
pub mod compare;
mod cuda;
mod direct;
mod encode;
mod feed;
mod files;
mod hidden;
mod layer;
mod stream;
pub mod synth;
mod weights;

pub use any::AnyTextEncoder;
pub use cuda::{CudaTextEncoder, Settings};
pub use encode::{Embedding, EncodeTimes, Encoded, Hidden, Task, TextEncoder};
