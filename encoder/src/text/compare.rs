//! What INT8 rows cost: the same captions through a checkpoint and through its slab.
//!
//! Both in float32, so that what differs are the weights alone; random token ids, so that no tokenizer is needed. Of each hidden state is told how
//! far it is off as a whole and for the token that fares worst: a few tokens of a large encoder have states a hundred times as large as the others
//! and hide them in the whole. The row of the pads counts as one more token.

use std::path::Path;

use candle_core::{DType, Tensor};
use serde::Serialize;
use serenity_cuda::Ty;
use serenity_protocol::Result;
use serenity_protocol::config::DeviceKind;
use serenity_protocol::process::Process;
use serenity_protocol::slab::text_encoder::TextModel;

use super::any::AnyTextEncoder;
use super::bench::{MAX_LENGTH, go_on, random_captions};
use super::encode::Encoded;
use crate::report;
use crate::tensor::failed;

/// What to compare.
#[derive(Debug, Clone)]
pub struct Options {
    /// The hidden states; those that an embedding is made of by default if not given.
    pub states: Option<[usize; 3]>,
    /// Captions.
    pub captions: usize,
    /// Tokens of a caption, on average.
    pub tokens: usize,
    /// Where to compute.
    pub device: DeviceKind,
}

/// The result.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Captions.
    pub captions: usize,
    /// Tokens compared, the pads' row included.
    pub tokens: usize,
    /// One for each hidden state asked for.
    pub states: Vec<StateError>,
}

/// How far a hidden state of the slab is from that of the checkpoint.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct StateError {
    /// The state: 0 is the embedding, i that after i layers.
    pub state: usize,
    /// Norm of the difference over norm of the checkpoint's state, all tokens together.
    pub relative_norm: f64,
    /// The same of the token for which it is largest.
    pub relative_norm_worst_token: f64,
    /// Largest difference of a value.
    pub largest: f64,
    /// Largest magnitude of the checkpoint's values.
    pub magnitude: f64,
    /// Cosine of the two states, all tokens together.
    pub cosine: f64,
    /// The same of the token for which it is smallest.
    pub cosine_worst_token: f64,
}

/// Encodes random captions with the checkpoint in `folder` and with `slab`, in float32.
///
/// # Errors
/// As [`AnyTextEncoder::open`] and [`AnyTextEncoder::encode`]; [`serenity_protocol::Error::Data`] for a slab of another text encoder.
pub fn run(folder: &Path, slab: &Path, options: &Options, process: &Process) -> Result<Report> {
    let encode = |model: TextModel| -> Result<(Encoded, [usize; 3])> {
        let encoder = AnyTextEncoder::open(model, options.device, Some(Ty::F32), None, None)?;
        let states = encoder.geometry().hidden_states(options.states)?;
        let captions = random_captions(encoder.geometry(), options.captions, options.tokens)?;
        let encoded = encoder.encode(&captions, 0, states, MAX_LENGTH, DType::F32, &mut |_, _| go_on(process))?;
        Ok((encoded, states))
    };
    // The slab first: what does not fit is said before the long part.
    let (found, states) = encode(TextModel::Slab { slab, folder: Some(folder) })?;
    let (expected, _) = encode(TextModel::Checkpoint(folder))?;
    let (found, expected) = (rows(&found)?, rows(&expected)?);
    let errors = states.iter().enumerate().map(|(part, state)| state_error(*state, part, &found, &expected));
    Ok(Report { captions: options.captions, tokens: expected.len(), states: errors.collect() })
}

/// The embedding of every token, the pads' last.
fn rows(encoded: &Encoded) -> Result<Vec<Vec<f32>>> {
    let of = |rows: &Tensor| rows.to_vec2::<f32>().map_err(failed("reading an embedding"));
    let mut all = Vec::new();
    for embedding in encoded.captions.iter().chain([&encoded.pad]) {
        all.extend(of(&embedding.rows)?);
    }
    Ok(all)
}

/// Sums over values of a state: of squared differences, of squares of either, of products.
#[derive(Default, Clone, Copy)]
struct Sums {
    difference: f64,
    found: f64,
    expected: f64,
    product: f64,
}

impl Sums {
    fn add(&mut self, other: Self) {
        self.difference += other.difference;
        self.found += other.found;
        self.expected += other.expected;
        self.product += other.product;
    }

    fn relative_norm(self) -> f64 {
        (self.difference / self.expected.max(f64::MIN_POSITIVE)).sqrt()
    }

    fn cosine(self) -> f64 {
        self.product / (self.found * self.expected).sqrt().max(f64::MIN_POSITIVE)
    }
}

/// Compares third number `part` of every row.
fn state_error(state: usize, part: usize, found: &[Vec<f32>], expected: &[Vec<f32>]) -> StateError {
    let mut all = Sums::default();
    let (mut largest, mut magnitude, mut norm_worst, mut cosine_worst) = (0f64, 0f64, 0f64, 1f64);
    for (found, expected) in found.iter().zip(expected) {
        let width = expected.len() / 3;
        let mut row = Sums::default();
        for (a, b) in found.iter().zip(expected).skip(part * width).take(width) {
            let (a, b) = (f64::from(*a), f64::from(*b));
            row.add(Sums { difference: (a - b) * (a - b), found: a * a, expected: b * b, product: a * b });
            (largest, magnitude) = (largest.max((a - b).abs()), magnitude.max(b.abs()));
        }
        (norm_worst, cosine_worst) = (norm_worst.max(row.relative_norm()), cosine_worst.min(row.cosine()));
        all.add(row);
    }
    StateError {
        state,
        relative_norm: all.relative_norm(),
        relative_norm_worst_token: norm_worst,
        largest,
        magnitude,
        cosine: all.cosine(),
        cosine_worst_token: cosine_worst,
    }
}

impl Report {
    /// Prints the report on standard output.
    pub fn print(&self, json: bool) {
        if json {
            return report::print_json(self);
        }
        println!("INT8 slab against the checkpoint, float32: {} captions, {} tokens", self.captions, self.tokens);
        for s in &self.states {
            println!(
                "state {:<3} relative norm {:.3e} (worst token {:.3e}), largest difference {:.3e} of {:.3e}, cosine {:.6} (worst token {:.6})",
                s.state, s.relative_norm, s.relative_norm_worst_token, s.largest, s.magnitude, s.cosine, s.cosine_worst_token
            );
        }
    }
}
