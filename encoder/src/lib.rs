//! Captions and images become cache entries.
//!
//! **Weights move once, samples wait.** A layer of the text encoder is read once and every caption of the pass goes through it before the
//! next layer is needed; that next layer is read meanwhile ([`text`]). The VAE is small and stays ([`vae`]). [`engine`] makes entries out of
//! captions and images; [`run`] is the job: which entries are missing, have these made, write each whole or not at all.
//!
//! The path of a caption: [`tokenizer`] → [`text`] → [`serenity_protocol::cache::TextEntry`]. The path of an image: [`pixels`] → [`vae`] →
//! [`serenity_protocol::cache::LatentEntry`]. The text encoder takes a device and a type, the VAE a place to be (always in float32); on
//! the CPU both compute in float32, and a sample's result does not depend on what is encoded with it, bit for bit.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod bench;
pub mod cache_tool;
pub mod cli;
pub mod engine;
pub mod parity;
pub mod pixels;
pub mod remote;
mod report;
pub mod run;
pub mod tensor;
pub mod text;
pub mod tokenizer;
pub mod vae;
