//! What `serenity-gpu-check` runs: every operation against a plain CPU computation, on the device at hand.
//!
//! A case poisons its outputs (every byte 0xff, a NaN), runs, reads back, compares element by element, looks whether anything beside the
//! output was written, runs again and wants the same bytes, and if asked takes the median time of 20 runs with the second-level cache
//! emptied before each. A failing section does not stop the others; a fault that loses the context does, and what was not run is listed.
#![forbid(unsafe_code)]

mod attention;
mod blas;
mod checksum;
mod copies;
mod elementwise;
mod heads;
mod rows;
mod speed;
mod text;
mod training;
mod vae;

use std::path::PathBuf;

use half::bf16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Serialize;
use serenity_protocol::{Error, Result};

use crate::arena::Arena;
use crate::driver::Event;
use crate::gpu::Gpu;
use crate::mat::{Mat, Ty};

/// Bytes behind every output that must stay as they were.
const GUARD_BYTES: usize = 256;

/// A section: its name, and what runs it.
pub type Section = (&'static str, fn(&mut Check<'_>) -> Result<()>);

/// All sections in the order they run.
#[must_use]
pub fn sections() -> Vec<Section> {
    vec![
        ("copies", copies::copies as fn(&mut Check<'_>) -> Result<()>),
        ("checksum", checksum::checksum),
        ("dequant", rows::dequant),
        ("norm", rows::norm),
        ("heads", heads::heads),
        ("swiglu", elementwise::swiglu),
        ("gate", elementwise::gate),
        ("sums", elementwise::sums),
        ("linear", elementwise::linear),
        ("time", elementwise::time),
        ("loss", training::loss),
        ("optimizer", training::optimizer),
        ("gemm", blas::gemm),
        ("pieces", blas::pieces),
        ("attention-own", attention::own),
        ("attention-cudnn", attention::cudnn),
        ("attention-f32", attention::f32),
        ("vae", vae::operations),
        ("conv", vae::convolutions),
        ("rms-norm", text::rms_norm),
        ("rotate-halves", text::rotate),
        ("captions", text::captions),
        ("bandwidth", speed::bandwidth),
    ]
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Section.
    pub section: &'static str,
    /// Shape and kind.
    pub case: String,
    /// Largest error over the larger of the expected value and the root mean square of all; absent where nothing is compared.
    pub error: Option<f64>,
    /// What it may be.
    pub limit: Option<f64>,
    /// Whether all is well.
    pub ok: bool,
    /// Median time of a run.
    pub micros: Option<f64>,
    /// What that time means, e.g. a rate.
    pub rate: Option<String>,
    /// Why it failed.
    pub problem: Option<String>,
}

/// What a case counts for its rate.
#[derive(Debug, Clone, Copy)]
pub enum Work {
    /// Not timed.
    None,
    /// Bytes read and written.
    Bytes(f64),
    /// Floating-point operations.
    Flops(f64),
}

impl Work {
    fn rate(self, micros: f64) -> Option<String> {
        match self {
            Work::None => None,
            Work::Bytes(bytes) => Some(format!("{:.0} GB/s", bytes / micros / 1e3)),
            Work::Flops(flops) => Some(format!("{:.1} TFLOP/s", flops / micros / 1e6)),
        }
    }
}

/// An output of a case with what should be in it.
#[derive(Debug)]
pub struct Expected {
    /// Where it is.
    pub mat: Mat,
    /// What should be there, row by row.
    pub values: Vec<f64>,
}

/// The state of a run over all sections.
pub struct Check<'g> {
    /// The device.
    pub gpu: &'g Gpu,
    /// Memory; a section starts with all of it.
    pub arena: &'g Arena,
    /// Lines so far.
    pub rows: Vec<Row>,
    /// Where big files for copies may lie.
    pub scratch: PathBuf,
    section: &'static str,
    flush: Mat,
}

impl<'g> Check<'g> {
    /// A run on `gpu` with memory from `arena`.
    ///
    /// # Errors
    /// [`Error::Absent`] if the arena is smaller than twice the second-level cache.
    pub fn new(gpu: &'g Gpu, arena: &'g Arena, scratch: PathBuf) -> Result<Self> {
        let bytes = usize::try_from(2 * gpu.properties().l2_bytes).unwrap_or(0).max(16 << 20);
        let flush = arena.mat(Ty::F32, 1, bytes / 4)?;
        Ok(Self { gpu, arena, rows: Vec::new(), scratch, section: "", flush })
    }

    /// Runs `section`: its lines are added, with one for an error. False if the device is lost.
    pub fn run(&mut self, section: Section) -> bool {
        self.section = section.0;
        let mark = self.arena.mark();
        let done = (section.1)(self).and_then(|()| self.gpu.sync());
        if let Err(e) = done {
            self.push(Row { ok: false, problem: Some(e.to_string()), ..self.row("section") });
        }
        self.arena.reset(mark).is_ok() && self.gpu.sync().is_ok()
    }

    /// A line for a section that cannot run any more.
    pub fn not_run(&mut self, section: Section) {
        self.section = section.0;
        self.push(Row { ok: false, problem: Some("not run: the device was lost before".into()), ..self.row("section") });
    }

    /// An empty line of this section.
    #[must_use]
    pub fn row(&self, case: impl Into<String>) -> Row {
        Row { section: self.section, case: case.into(), error: None, limit: None, ok: true, micros: None, rate: None, problem: None }
    }

    /// Adds a line.
    pub fn push(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// Adds a line that only says whether something holds.
    pub fn holds(&mut self, case: impl Into<String>, ok: bool) {
        let problem = (!ok).then(|| "does not hold".to_string());
        self.push(Row { ok, problem, ..self.row(case) });
    }

    /// Random values with a sign in about [-2, 2], the same for the same seed.
    #[must_use]
    pub fn random(seed: u64, count: usize) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut uniform = || f64::from(rng.next_u32()) / f64::from(u32::MAX) - 0.5;
        // The sum of a few uniform numbers has a bell's shape and no outliers.
        (0..count).map(|_| ((uniform() + uniform() + uniform()) * 1.6) as f32).collect()
    }

    /// A matrix on the device with the given values, rounded to `ty`, rows `stride` apart; and the values as they were stored.
    ///
    /// # Errors
    /// [`Error::Absent`] if it does not fit.
    pub fn mat(&self, ty: Ty, rows: usize, cols: usize, stride: usize, values: &[f32]) -> Result<(Mat, Vec<f64>)> {
        let mat = self.poisoned(ty, rows, cols, stride)?;
        let mut bytes = vec![0xffu8; mat.span()];
        let mut stored = Vec::with_capacity(values.len());
        for (row, source) in values.chunks_exact(cols.max(1)).take(rows).enumerate() {
            for (col, value) in source.iter().enumerate() {
                let at = (row * stride + col) * ty.bytes();
                let encoded = encode(ty, *value);
                if let Some(place) = bytes.get_mut(at..at + ty.bytes()) {
                    place.copy_from_slice(encoded.get(..ty.bytes()).unwrap_or_default());
                }
                stored.push(f64::from(decode(ty, &encoded)));
            }
        }
        self.gpu.upload(mat.ptr, &bytes)?;
        Ok((mat, stored))
    }

    /// A dense matrix of random values, and the values as stored.
    ///
    /// # Errors
    /// [`Error::Absent`] if it does not fit.
    pub fn random_mat(&self, seed: u64, ty: Ty, rows: usize, cols: usize) -> Result<(Mat, Vec<f64>)> {
        self.mat(ty, rows, cols, cols, &Self::random(seed, rows * cols))
    }

    /// An output: every byte 0xff, with a guard behind.
    ///
    /// # Errors
    /// [`Error::Absent`] if it does not fit.
    pub fn poisoned(&self, ty: Ty, rows: usize, cols: usize, stride: usize) -> Result<Mat> {
        let mut mat = Mat { stride, ..Mat::new(crate::Ptr::NULL, ty, rows, cols) };
        mat.ptr = self.arena.reserve(mat.span() + GUARD_BYTES)?;
        self.poison(mat)?;
        Ok(mat)
    }

    fn poison(&self, mat: Mat) -> Result<()> {
        self.gpu.compute().fill(mat.ptr, 0xff, mat.span() + GUARD_BYTES)
    }

    /// The elements of a view as float32, row by row.
    ///
    /// # Errors
    /// A fault of earlier work.
    pub fn read(&self, mat: Mat) -> Result<Vec<f32>> {
        let mut bytes = vec![0u8; mat.span()];
        self.gpu.download(&mut bytes, mat.ptr)?;
        Ok(elements(mat, &bytes))
    }

    /// One case: `run` fills `outputs`, which are poisoned before.
    ///
    /// # Errors
    /// What `run` returns: the section ends.
    pub fn case(
        &mut self,
        name: impl Into<String>,
        limit: f64,
        outputs: &[Expected],
        work: Work,
        run: &dyn Fn(&Gpu) -> Result<()>,
    ) -> Result<()> {
        let poison = |check: &Self| outputs.iter().try_for_each(|o| check.poison(o.mat));
        self.case_after(name, limit, outputs, work, &poison, run)
    }

    /// One case whose outputs are inputs too: `prepare` writes them before every run.
    ///
    /// # Errors
    /// What `prepare` and `run` return: the section ends.
    pub fn case_after(
        &mut self,
        name: impl Into<String>,
        limit: f64,
        outputs: &[Expected],
        work: Work,
        prepare: &dyn Fn(&Self) -> Result<()>,
        run: &dyn Fn(&Gpu) -> Result<()>,
    ) -> Result<()> {
        let once = |check: &Self| -> Result<Vec<Vec<u8>>> {
            prepare(check)?;
            run(check.gpu)?;
            let read = |o: &Expected| {
                let mut bytes = vec![0u8; o.mat.span() + GUARD_BYTES];
                check.gpu.download(&mut bytes, o.mat.ptr).map(|()| bytes)
            };
            outputs.iter().map(read).collect()
        };
        let first = once(self)?;
        let second = once(self)?;
        let mut problem = None;
        let mut worst: f64 = 0.0;
        for (expected, bytes) in outputs.iter().zip(&first) {
            let (error, unlike) = difference(&elements(expected.mat, bytes), &expected.values);
            worst = if error.is_nan() { f64::NAN } else { worst.max(error) };
            if worst.is_nan() || error > limit {
                problem = problem.or(unlike);
            }
            if !untouched(expected.mat, bytes) {
                problem = problem.or(Some("writes beside its output".to_string()));
            }
        }
        if first != second {
            problem = problem.or(Some("two runs differ".to_string()));
        }
        let micros =
            if matches!(work, Work::None) { None } else { Some(self.median_micros(&|c| prepare(c).and_then(|()| c.flush()), run)?) };
        let rate = micros.and_then(|m| work.rate(m));
        let row = Row { error: Some(worst), limit: Some(limit), ok: problem.is_none(), micros, rate, problem, ..self.row(name) };
        self.push(row);
        Ok(())
    }

    /// Empties the second-level cache.
    ///
    /// # Errors
    /// The driver's.
    pub fn flush(&self) -> Result<()> {
        self.gpu.fill(self.flush, 0)
    }

    /// Median of 20 runs after warm-up, by events on the compute stream; `before` is queued ahead of each and not counted.
    ///
    /// # Errors
    /// What the closures return.
    pub fn median_micros(&self, before: &dyn Fn(&Self) -> Result<()>, run: &dyn Fn(&Gpu) -> Result<()>) -> Result<f64> {
        let stream = self.gpu.compute();
        let mut times = Vec::new();
        for i in 0..23 {
            let (start, end) = (Event::timed(self.gpu.context())?, Event::timed(self.gpu.context())?);
            before(self)?;
            stream.record(&start)?;
            run(self.gpu)?;
            stream.record(&end)?;
            end.sync()?;
            if i >= 3 {
                times.push(f64::from(end.since_ms(&start)?) * 1e3);
            }
        }
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().ok_or_else(|| Error::invariant("nothing was timed"))
    }
}

fn encode(ty: Ty, value: f32) -> [u8; 4] {
    match ty {
        Ty::F32 => value.to_le_bytes(),
        Ty::Bf16 => {
            let [a, b] = bf16::from_f32(value).to_le_bytes();
            [a, b, 0, 0]
        }
    }
}

fn decode(ty: Ty, bytes: &[u8]) -> f32 {
    match (ty, bytes) {
        (Ty::F32, [a, b, c, d, ..]) => f32::from_le_bytes([*a, *b, *c, *d]),
        (Ty::Bf16, [a, b, ..]) => bf16::from_le_bytes([*a, *b]).to_f32(),
        _ => f32::NAN,
    }
}

/// The elements of a view in the bytes of its span.
fn elements(mat: Mat, bytes: &[u8]) -> Vec<f32> {
    let size = mat.ty.bytes();
    let row = |r: usize| bytes.get(r * mat.stride * size..).unwrap_or_default();
    (0..mat.rows).flat_map(|r| row(r).chunks_exact(size).take(mat.cols).map(|e| decode(mat.ty, e))).collect()
}

/// Whether everything between and behind the rows of a view is still 0xff.
fn untouched(mat: Mat, bytes: &[u8]) -> bool {
    let size = mat.ty.bytes();
    let mut at = 0;
    (0..mat.rows).all(|r| {
        at = (r * mat.stride + mat.cols) * size;
        let end = if r + 1 == mat.rows { bytes.len() } else { (r + 1) * mat.stride * size };
        bytes.get(at..end).is_some_and(|gap| gap.iter().all(|b| *b == 0xff))
    })
}

/// Largest error over the larger of the expected value and the root mean square of all, NaN if any is; and where it is.
fn difference(got: &[f32], expected: &[f64]) -> (f64, Option<String>) {
    if got.len() != expected.len() {
        return (f64::NAN, Some(format!("{} values instead of {}", got.len(), expected.len())));
    }
    let rms = (expected.iter().map(|e| e * e).sum::<f64>() / expected.len().max(1) as f64).sqrt();
    let mut worst = (0.0, None);
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        let g = f64::from(*g);
        let scale = e.abs().max(rms).max(f64::MIN_POSITIVE);
        // Equal infinities have no difference to take; NaN never passes.
        let error = if g == *e { 0.0 } else { (g - e).abs() / scale };
        if error.is_nan() || error > worst.0 {
            worst = (error, Some(format!("element {i}: {g:e} instead of {e:e}")));
            if error.is_nan() {
                break;
            }
        }
    }
    worst
}

/// What one rounding to `ty` and a float32 computation may cost: half a unit in the last place is up to 2^-8 of a bf16 value.
#[must_use]
pub fn limit(ty: Ty) -> f64 {
    match ty {
        Ty::F32 => 5e-6,
        Ty::Bf16 => 3.95e-3,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::Ptr;

    #[test]
    fn a_wrong_value_a_nan_and_a_missing_value_are_seen() {
        let expected = [1.0, -2.0, 0.0, 4.0];
        assert_eq!(difference(&[1.0, -2.0, 0.0, 4.0], &expected).0, 0.0);
        assert!(difference(&[1.0, -2.0, 0.1, 4.0], &expected).0 > 0.04);
        let (error, place) = difference(&[1.0, f32::NAN, 0.0, 9.0], &expected);
        assert!(error.is_nan() && place.unwrap().starts_with("element 1"));
        assert!(difference(&[1.0], &expected).0.is_nan());
    }

    #[test]
    fn writes_between_and_behind_rows_are_seen() {
        let mat = Mat { stride: 6, ..Mat::new(Ptr::NULL, Ty::Bf16, 2, 4) };
        assert_eq!(mat.span(), 20);
        let mut bytes = vec![0xffu8; 20 + GUARD_BYTES];
        bytes[..8].fill(0);
        bytes[12..20].fill(0);
        assert!(untouched(mat, &bytes));
        assert_eq!(elements(mat, &bytes), [0.0; 8]);
        for at in [8, 11, 20, 20 + GUARD_BYTES - 1] {
            let mut bad = bytes.clone();
            bad[at] = 0;
            assert!(!untouched(mat, &bad), "{at}");
        }
    }
}
