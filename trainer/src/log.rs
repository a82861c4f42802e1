//! `log.jsonl`: one JSON object for each step, and one for step 0 with the validation loss of the unchanged model.
//!
//! The line of a step is written before the step's checkpoint, and going on from the checkpoint of step n drops the lines after n first
//! (with the atomic rewrite of the whole file). So a run that was killed and resumed has each step exactly once. A line that a kill cut
//! short does not parse and is dropped with them.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serenity_protocol::{Error, Result, atomic_file};

use crate::memory::MemoryUse;

/// Where the wall time of a step went, in seconds. The parts do not overlap; what they leave of `seconds` is the loop itself.
///
/// A GPU works through both passes and its copies as one queue, which the host follows only in what it waits for: there `backward` is all of
/// it, and `copy` is 0 (the telemetry has the copies' own time).
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Phases {
    /// Waiting for the step's samples (they are prepared while the step before computes).
    pub data: f64,
    /// Waiting for blocks.
    pub wait: f64,
    /// Moving blocks out of the ring, and dequantising them where the trainer does it.
    pub copy: f64,
    /// Forward computation.
    pub forward: f64,
    /// Backward computation, recomputation included.
    pub backward: f64,
    /// Clipping and AdamW.
    pub optimizer: f64,
    /// Validation.
    pub validation: f64,
}

/// One line. Fields that have no value at a step are left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LogLine {
    /// Steps done; 0 is before the first.
    pub step: u64,
    /// Mean loss over the step's micro-batches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Learning rate of the update.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Global gradient norm before clipping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Wall time of the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Its parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_by_phase: Option<Phases>,
    /// Memory of the process after the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<MemoryUse>,
    /// Validation loss after the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_loss: Option<f64>,
}

/// A file of JSON objects with a `step` each, one a line, to which is appended.
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: File,
}

impl JsonLines {
    /// Opens `path` and keeps the lines of steps up to `keep_to` (`None`: of no step).
    ///
    /// # Errors
    /// As reading or writing the file reports.
    pub fn open(path: &Path, keep_to: Option<u64>) -> Result<Self> {
        let old = match (keep_to, std::fs::read_to_string(path)) {
            (None, _) => String::new(),
            (Some(_), Ok(text)) => text,
            (Some(_), Err(e)) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            (Some(_), Err(e)) => return Err(Error::io("cannot read the log of the run so far", path, e)),
        };
        let kept = kept_lines(&old, keep_to);
        atomic_file::write(path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path).map_err(|e| Error::io("cannot open the log", path, e))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Appends one object as one write, so that a reader sees whole lines.
    ///
    /// # Errors
    /// [`Error::TryAgain`] if the disk is full.
    pub fn append(&mut self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_string(line).map_err(|e| Error::invariant("a log line cannot be written as JSON").cause(e))?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(|e| Error::io("cannot write to the log", &self.path, e))
    }

    /// Makes what was appended survive a power cut; called before a checkpoint that relies on it.
    ///
    /// # Errors
    /// The operating system's.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::io("cannot write to the log", &self.path, e))
    }
}

/// Lines with a step up to `keep_to`, each step once (the first).
fn kept_lines(text: &str, keep_to: Option<u64>) -> String {
    let Some(last) = keep_to else { return String::new() };
    let mut seen = std::collections::HashSet::new();
    let step_of = |line: &str| serde_json::from_str::<Value>(line).ok()?.get("step")?.as_u64();
    text.lines().filter(|line| step_of(line).is_some_and(|step| step <= last && seen.insert(step))).flat_map(|line| [line, "\n"]).collect()
}

/// The lines of a log, in order.
///
/// # Errors
/// [`Error::Data`] for a line that is none, [`Error::Absent`] if the file cannot be read.
pub fn read(path: &Path) -> Result<Vec<LogLine>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("cannot read the log", path, e))?;
    let parse = |line: &str| serde_json::from_str(line).map_err(|e| Error::data("the log has a malformed line").at(path).cause(e));
    text.lines().map(parse).collect()
}

/// Adds the validation loss to the line of `step` if it has none: a run that was stopped between a step and its validation.
///
/// # Errors
/// As reading and writing the file report.
pub fn amend_validation(path: &Path, step: u64, val_loss: f64) -> Result<()> {
    let mut lines = read(path)?;
    if let Some(line) = lines.iter_mut().find(|l| l.step == step && l.val_loss.is_none()) {
        line.val_loss = Some(val_loss);
    }
    let mut text = String::new();
    for line in &lines {
        text += &serde_json::to_string(line).map_err(|e| Error::invariant("a log line cannot be written as JSON").cause(e))?;
        text.push('\n');
    }
    atomic_file::write(path, text.as_bytes())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn line(step: u64) -> LogLine {
        LogLine { step, loss: Some(step as f64 / 3.0), ..LogLine::default() }
    }

    fn steps(path: &Path) -> Vec<u64> {
        read(path).unwrap().iter().map(|l| l.step).collect()
    }

    #[test]
    fn resuming_drops_later_lines_and_a_torn_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        let mut log = JsonLines::open(&path, None).unwrap();
        (0..=5).for_each(|s| log.append(&line(s)).unwrap());
        drop(log);
        let torn = std::fs::read_to_string(&path).unwrap() + "{\"step\": 2, \"lo";
        std::fs::write(&path, torn).unwrap();
        let mut log = JsonLines::open(&path, Some(3)).unwrap();
        (4..=6).for_each(|s| log.append(&line(s)).unwrap());
        assert_eq!(steps(&path), [0, 1, 2, 3, 4, 5, 6]);
        JsonLines::open(&path, None).unwrap().append(&line(1)).unwrap();
        assert_eq!(steps(&path), [1], "a new run starts a new log");
    }

    #[test]
    fn values_survive_and_absent_ones_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        let full = LogLine { lr: Some(1e-4), seconds_by_phase: Some(Phases { wait: 0.1, ..Phases::default() }), ..line(1) };
        JsonLines::open(&path, None).unwrap().append(&full).unwrap();
        assert_eq!(read(&path).unwrap(), [full]);
        assert!(!std::fs::read_to_string(&path).unwrap().contains("val_loss"));
        amend_validation(&path, 1, 0.5).unwrap();
        amend_validation(&path, 1, 0.7).unwrap();
        assert_eq!(read(&path).unwrap()[0].val_loss, Some(0.5), "a measured value is never replaced");
    }
}
