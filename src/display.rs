//! What the user sees: one progress bar on a terminal, plain lines elsewhere, JSON lines for programs.
//!
//! People's output goes to standard error, except for the plan and the final result, which go to standard output. With `--json` standard
//! output carries one JSON object per line and nothing else, and no progress is drawn. A closed output never ends the run.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use serenity_protocol::message::{Role, StepReport};
use serenity_protocol::plan::{Plan, human_bytes};

use crate::child::Level;

/// Plain lines are at least this far apart, unless a tenth of the work lies between them.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// Texts remembered so that one notice, arriving as message and as log line, is shown once.
const REMEMBERED: usize = 16;
/// Weight of the newest step in the smoothed step time.
const SMOOTHING: f64 = 0.2;

/// How to show things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Bar,
    Lines,
    Json,
}

/// Plain progress: when the last line was written and at what share of the work.
#[derive(Debug, Default)]
struct Pace {
    written: Option<Instant>,
    tenth: u64,
}

impl Pace {
    /// Whether a line is due at `done` of `total`.
    fn is_due(&mut self, done: u64, total: u64, now: Instant) -> bool {
        let tenth = done.saturating_mul(10).checked_div(total).unwrap_or(0);
        let due = self.written.is_none_or(|at| now.duration_since(at) >= LINE_INTERVAL) || tenth > self.tenth || done == total;
        if due {
            self.written = Some(now);
            self.tenth = tenth;
        }
        due
    }
}

/// The display.
pub struct Display {
    mode: Mode,
    bar: Option<ProgressBar>,
    pace: Pace,
    /// Steps between two plain lines, if the configuration counts them.
    log_every: Option<u64>,
    recent: VecDeque<String>,
    ring: Option<(u32, u32)>,
    step_seconds: Option<f64>,
}

impl Display {
    /// A display for `--json` or not.
    pub fn new(json: bool, log_every: Option<u64>) -> Self {
        let mode = match (json, std::io::stderr().is_terminal()) {
            (true, _) => Mode::Json,
            (false, true) => Mode::Bar,
            (false, false) => Mode::Lines,
        };
        Self { mode, bar: None, pace: Pace::default(), log_every, recent: VecDeque::new(), ring: None, step_seconds: None }
    }

    /// The plan, before anything starts.
    pub fn plan(&mut self, plan: &Plan) {
        match self.mode {
            Mode::Json => self.emit("plan", json!({"plan": plan})),
            Mode::Bar | Mode::Lines => out(&plan.to_string()),
        }
    }

    /// A stage begins; `what` is a gerund for people ("building the slab").
    pub fn phase_begins(&mut self, name: &str, what: &str) {
        self.ring = None;
        self.pace = Pace::default();
        match self.mode {
            Mode::Json => self.emit("phase", json!({"phase": name, "state": "begins"})),
            Mode::Lines => err(what),
            Mode::Bar => {
                let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
                bar.set_style(style("{prefix} {spinner} {msg} {elapsed}"));
                bar.set_prefix(what.to_string());
                bar.enable_steady_tick(Duration::from_millis(200));
                self.bar = Some(bar);
            }
        }
    }

    /// The stage is over.
    pub fn phase_ends(&mut self, name: &str, what: &str, seconds: f64) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        match self.mode {
            Mode::Json => self.emit("phase", json!({"phase": name, "state": "ends", "seconds": seconds})),
            Mode::Bar | Mode::Lines => err(&format!("{what} after {}", clock(seconds))),
        }
    }

    /// Work items of a stage.
    pub fn work(&mut self, role: Role, unit: &str, done: u64, total: u64) {
        let amounts =
            if unit == "bytes" { format!("{} of {}", human_bytes(done), human_bytes(total)) } else { format!("{done} of {total} {unit}") };
        match self.mode {
            Mode::Json => self.emit("work", json!({"role": role.to_string(), "unit": unit, "done": done, "total": total})),
            Mode::Lines => {
                if self.pace.is_due(done, total, Instant::now()) {
                    err(&format!("{role}: {amounts}"));
                }
            }
            Mode::Bar => self.draw(done, total, amounts),
        }
    }

    /// A training step.
    pub fn step(&mut self, report: &StepReport) {
        let smooth = self.step_seconds.map_or(report.seconds, |old| old + SMOOTHING * (report.seconds - old));
        self.step_seconds = Some(smooth);
        let eta = smooth * report.steps.saturating_sub(report.step) as f64;
        let mut text = format!("loss {:.4}  lr {:.2e}  {}/step  eta {}", report.loss, report.learning_rate, span(smooth), clock(eta));
        if let Some((occupied, slots)) = self.ring {
            // Writing to a string cannot fail.
            let _ = write!(text, "  ring {occupied}/{slots}");
        }
        match self.mode {
            Mode::Json => self.emit(
                "step",
                json!({"step": report.step, "steps": report.steps, "loss": report.loss, "learning_rate": report.learning_rate,
                    "grad_norm": report.grad_norm, "seconds": report.seconds, "eta_seconds": eta,
                    "ring": self.ring.map(|(occupied, slots)| json!({"occupied": occupied, "slots": slots}))}),
            ),
            Mode::Lines => {
                let due = match self.log_every {
                    Some(n) => report.step.is_multiple_of(n) || report.step == report.steps,
                    None => self.pace.is_due(report.step, report.steps, Instant::now()),
                };
                if due {
                    err(&format!("step {}/{}  {text}", report.step, report.steps));
                }
            }
            Mode::Bar => self.draw(report.step, report.steps, format!("{}/{}  {text}", report.step, report.steps)),
        }
    }

    /// Occupancy of the ring; shown with the next step.
    pub fn ring(&mut self, occupied: u32, slots: u32, read_bytes: u64) {
        self.ring = Some((occupied, slots));
        if self.mode == Mode::Json {
            self.emit("ring", json!({"occupied": occupied, "slots": slots, "read_bytes": read_bytes}));
        }
    }

    /// A checkpoint or result was written.
    pub fn saved(&mut self, step: u64, path: &str) {
        if self.mode == Mode::Json {
            self.emit("saved", json!({"step": step, "path": path}));
        }
    }

    /// Something to be seen once, by whatever way it came.
    pub fn notice(&mut self, role: Option<Role>, level: Level, text: &str) {
        let first = text.lines().next().unwrap_or_default().trim();
        if !first.is_empty() && self.recent.iter().any(|old| old.contains(first) || first.contains(old.as_str())) {
            return;
        }
        if !first.is_empty() {
            self.recent.push_back(first.to_string());
            if self.recent.len() > REMEMBERED {
                self.recent.pop_front();
            }
        }
        let level = match level {
            Level::Warning => "note",
            Level::Error => "error",
        };
        match (self.mode, role) {
            (Mode::Json, _) => self.emit("notice", json!({"role": role.map(|r| r.to_string()), "level": level, "text": text})),
            (_, Some(role)) => self.line(&format!("{role}: {text}")),
            (_, None) => self.line(text),
        }
    }

    /// A process died and is started again.
    pub fn restart(&mut self, role: Role, how: &str, number: usize, pause: Duration, log: &Path) {
        match self.mode {
            Mode::Json => {
                self.emit("restart", json!({"role": role.to_string(), "how": how, "number": number, "pause_seconds": pause.as_secs_f64()}))
            }
            Mode::Bar | Mode::Lines => {
                let log = log.display();
                self.line(&format!("the {role} {how}; restart {number} in {:.2} s (its log: {log})", pause.as_secs_f64()));
            }
        }
    }

    /// The end of the run. `value` is the machine's form of `text`.
    pub fn result(&mut self, value: Value, text: &str) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        match self.mode {
            Mode::Json => self.emit("result", value),
            Mode::Bar | Mode::Lines => out(text),
        }
    }

    /// One line above the bar.
    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| err(text)),
            None => err(text),
        }
    }

    fn draw(&self, done: u64, total: u64, text: String) {
        let Some(bar) = &self.bar else { return };
        if bar.length() != Some(total) {
            bar.set_style(style("{prefix} {wide_bar} {msg}"));
            bar.set_length(total);
        }
        bar.set_position(done);
        bar.set_message(text);
    }

    fn emit(&self, event: &str, mut value: Value) {
        if let Value::Object(map) = &mut value {
            map.shift_insert(0, "event".into(), event.into());
        }
        out(&format!("{value}\n"));
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Standard output; a reader that has gone away is no reason to stop training.
fn out(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// A line on standard error; see [`out`].
fn err(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// `1 h 02 min`, `3 min 05 s`, `12.3 s`.
pub fn clock(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..60 => format!("{:.1} s", seconds.max(0.0)),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// A step's time: milliseconds below a second.
fn span(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.0} ms", seconds * 1000.0) } else { format!("{seconds:.2} s") }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn plain_lines_come_by_time_or_by_tenth() {
        let start = Instant::now();
        let mut pace = Pace::default();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let due: Vec<u64> = (1..=1000).filter(|done| pace.is_due(*done, 1000, at(*done))).collect();
        assert_eq!(due, [1, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]);
        let mut pace = Pace::default();
        let due: Vec<u64> = (1..=8).filter(|done| pace.is_due(*done, 1000, at(*done * 2000))).collect();
        assert_eq!(due, [1, 4, 7]);
        assert!(Pace::default().is_due(0, 0, start));
    }

    #[test]
    fn times_read_well() {
        for (seconds, text) in [(0.04, "0.0 s"), (59.94, "59.9 s"), (61.0, "1 min 01 s"), (3725.0, "1 h 02 min"), (-1.0, "0.0 s")] {
            assert_eq!(clock(seconds), text);
        }
        assert_eq!((span(0.25), span(1.5)), ("250 ms".to_string(), "1.50 s".to_string()));
    }
}
