//! `serenity-trainer gpu-check`: the training step on a device against the reference's files and the CPU path, and how fast it is.
//!
//! ```text
//! golden     float32: every block's output, loss, gradients and three updates of the reference; bf16: predictions, gradients, updates
//! processor  float32 and bf16: several micro-batches of different sizes against the CPU path on the same dequantised weights
//! streamed   every way to hold blocks, inputs and activations: the same adapters, bit for bit, after some steps; and two runs the same
//! block      one full-size block of each kind in files, for comparison with PyTorch by `scripts/check_block_torch.py`
//! timing     steps of random weights at full size, by row of the targets table
//! ```
#![forbid(unsafe_code)]

mod block;
mod golden;
mod model;
mod processor;
mod rounded;
mod streamed;
mod timing;

use std::path::PathBuf;

use serde::Serialize;
use serenity_cuda::Gpu;
use serenity_protocol::{Error, Result};

/// What to check.
#[derive(Debug, Clone)]
pub struct Options {
    /// The reference's folder with `model` and `cases`.
    pub goldens: PathBuf,
    /// The device.
    pub device: usize,
    /// Sections; all if none is named.
    pub sections: Vec<String>,
    /// Rows of the targets table to time.
    pub rows: Vec<String>,
    /// `config.json` of a transformer to time.
    pub geometry: Option<PathBuf>,
    /// Without rows: device memory of the timed run by the driver's count, MiB.
    pub budget_mb: usize,
    /// Without rows: pixels of a side of the timed run.
    pub resolution: usize,
    /// Without rows: micro-batches of a timed step.
    pub accumulation: usize,
    /// Timed steps.
    pub steps: usize,
    /// Folder for the blocks that PyTorch compares.
    pub dump: PathBuf,
    /// Whether the CPU path computes those blocks: to check the comparison itself.
    pub on_processor: bool,
    /// Tunings to time after the one of the environment, see [`serenity_cuda::Tuning`].
    pub variants: Vec<String>,
}

/// A line of the result.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// Section.
    pub section: &'static str,
    /// What was compared or measured.
    pub case: String,
    /// Worst error, where there is one.
    pub error: Option<f64>,
    /// What is allowed.
    pub limit: Option<f64>,
    /// Whether it passed.
    pub ok: bool,
    /// Figures or the failure's text.
    pub note: String,
    /// The figures for programs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub figures: Option<serde_json::Value>,
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let number = |v: Option<f64>| v.map_or(String::new(), |v| format!("{v:.1e}"));
        let verdict = if self.ok { "ok" } else { "FAIL" };
        write!(f, "{:<10} {:<52} {:>8} {:>8} {verdict:<4} {}", self.section, self.case, number(self.error), number(self.limit), self.note)
    }
}

/// Runs the sections; a section that fails is a line, not an end. `show` gets each line as it comes.
///
/// # Errors
/// [`Error::Config`] for an unknown section; [`Error::Absent`] if there is no device.
pub fn run(options: &Options, show: &mut dyn FnMut(&Line)) -> Result<bool> {
    type Run = fn(&Options, &mut dyn FnMut(Line)) -> Result<()>;
    let all: [(&'static str, Run); 5] = [
        ("golden", golden::golden),
        ("processor", processor::processor),
        ("streamed", streamed::streamed),
        ("block", block::block),
        ("timing", timing::timing),
    ];
    if let Some(unknown) = options.sections.iter().find(|s| all.iter().all(|(name, _)| name != s)) {
        let known: Vec<&str> = all.iter().map(|(name, _)| *name).collect();
        return Err(Error::config(format!("there is no section '{unknown}'")).expected(known.join(", ")));
    }
    if !options.on_processor {
        drop(Gpu::open(options.device)?);
    }
    let mut ok = true;
    for (section, run) in all {
        if !options.sections.is_empty() && !options.sections.iter().any(|s| s == section) {
            continue;
        }
        let mut emit = |line: Line| {
            let line = Line { section, ..line };
            ok &= line.ok;
            show(&line);
        };
        if let Err(e) = run(options, &mut emit) {
            emit(holds("the section", false, e.to_string()));
        }
    }
    Ok(ok)
}

fn compared(case: impl Into<String>, error: f64, limit: f64) -> Line {
    // Written so that NaN fails.
    Line { section: "", case: case.into(), error: Some(error), limit: Some(limit), ok: error <= limit, note: String::new(), figures: None }
}

/// An error that nothing is asked of.
fn reported(case: impl Into<String>, error: f64, note: String) -> Line {
    Line { section: "", case: case.into(), error: Some(error), limit: None, ok: true, note, figures: None }
}

fn holds(case: impl Into<String>, ok: bool, note: String) -> Line {
    Line { section: "", case: case.into(), error: None, limit: None, ok, note, figures: None }
}

/// The largest difference over the largest value, and the norm of the difference over the norm.
fn errors(x: &[f32], y: &[f32]) -> (f64, f64) {
    if x.len() != y.len() || x.iter().any(|v| !v.is_finite()) {
        return (f64::NAN, f64::NAN);
    }
    let pairs = || x.iter().zip(y).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    let largest = pairs().fold(0.0, |m: f64, (a, b)| m.max((a - b).abs())) / pairs().fold(1e-30, |m: f64, (_, b)| m.max(b.abs()));
    let square = |f: fn((f64, f64)) -> f64| pairs().map(f).map(|v| v * v).sum::<f64>().sqrt();
    (largest, square(|(a, b)| a - b) / square(|(_, b)| b).max(1e-30))
}

fn worst(x: &[f32], y: &[f32]) -> f64 {
    let (largest, norm) = errors(x, y);
    if largest.is_nan() { f64::NAN } else { largest.max(norm) }
}
