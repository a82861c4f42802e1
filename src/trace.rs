//! Many traces, one clock: the children's Chrome traces and the launcher's own become one file that Perfetto opens.
//!
//! Each process counts microseconds from its own start; its trace holds one event ([`CLOCK_EVENT`]) whose argument says what the
//! machine's monotonic clock read at that moment. The difference moves every event of that file onto the machine's clock; the earliest
//! event of all becomes 0. The writer gives every process the id 1, so the real ids come from the same event, with a name for each lane.
//!
//! A killed process leaves a file that ends in the middle of a line, without the closing bracket and with spans that never end. Such a
//! line is dropped, and the spans end with the file. A file without the clock event (the process was killed before its first flush)
//! cannot be placed and is left out.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};
use serenity_protocol::process::CLOCK_EVENT;
use serenity_protocol::{Error, Result, atomic_file};

/// One process's trace, on the machine's clock.
struct Lane {
    process: String,
    pid: u64,
    events: Vec<Map<String, Value>>,
}

/// Merges the traces in `files` into `target`; returns how many could be placed.
///
/// # Errors
/// [`Error::TryAgain`] if the disk is full, [`Error::Absent`] if the target cannot be written. Unreadable inputs are left out.
pub fn merge(files: &[impl AsRef<Path>], target: &Path) -> Result<usize> {
    let mut lanes: Vec<Lane> =
        files.iter().filter_map(|f| std::fs::read(f).ok()).filter_map(|b| lane(&String::from_utf8_lossy(&b))).collect();
    lanes.sort_by_key(|lane| lane.start().map_or(i64::MAX, |ts| ts as i64));
    let origin = lanes.iter().filter_map(Lane::start).fold(f64::INFINITY, f64::min);
    let names = lane_names(&lanes);
    let count = lanes.len();
    atomic_file::write_with(target, |file| {
        let mut out = BufWriter::new(file);
        write!(out, "{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[")?;
        let mut separator = "\n";
        for (index, (lane, name)) in lanes.iter_mut().zip(names).enumerate() {
            let label = |key: &str, args: Value| json!({"ph": "M", "pid": lane.pid, "tid": 0, "name": key, "args": args});
            let labels = [label("process_name", json!({"name": name})), label("process_sort_index", json!({"sort_index": index}))];
            let pid = Value::from(lane.pid);
            let events = lane.events.drain(..).map(|mut event| {
                event.insert("pid".into(), pid.clone());
                if let Some(ts) = event.get("ts").and_then(Value::as_f64) {
                    event.insert("ts".into(), round(ts - origin).into());
                }
                Value::Object(event)
            });
            for event in labels.into_iter().chain(events) {
                out.write_all(separator.as_bytes())?;
                serde_json::to_writer(&mut out, &event)?;
                separator = ",\n";
            }
        }
        out.write_all(b"\n]}\n")?;
        out.flush()
    })
    .map_err(|e: Error| e.advice("the traces of the single processes are in the output folder's logs/"))?;
    Ok(count)
}

/// Nanosecond steps: the clock's own resolution, without the noise of a subtraction.
fn round(us: f64) -> f64 {
    (us * 1000.0).round() / 1000.0
}

/// `serenity-trainer`, and `serenity-trainer (2)` for one that was started again.
fn lane_names(lanes: &[Lane]) -> Vec<String> {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let named = lanes.iter().map(|lane| {
        let count = seen.entry(&lane.process).and_modify(|n| *n += 1).or_insert(1);
        if *count == 1 { lane.process.clone() } else { format!("{} ({count})", lane.process) }
    });
    named.collect()
}

impl Lane {
    /// Time of the earliest event.
    fn start(&self) -> Option<f64> {
        self.events.iter().filter_map(|e| e.get("ts")?.as_f64()).reduce(f64::min)
    }
}

/// Reads one trace: an event a line, as the writer leaves them, or any JSON array of events.
fn lane(text: &str) -> Option<Lane> {
    let mut events = match serde_json::from_str::<Vec<Map<String, Value>>>(text) {
        Ok(events) => events,
        Err(_) => text.lines().filter_map(|line| serde_json::from_str(line.trim().trim_end_matches(',')).ok()).collect(),
    };
    let clock = events.iter().find(|e| e.get("name").and_then(Value::as_str) == Some(CLOCK_EVENT))?;
    let argument = |name: &str| clock.get("args")?.get(name);
    let shift = number(argument("monotonic_us")?)? - clock.get("ts")?.as_f64()?;
    let pid = number(argument("pid")?)? as u64;
    let process = argument("process")?.as_str()?.trim_matches('"').to_string();
    for event in &mut events {
        if let Some(ts) = event.get("ts").and_then(Value::as_f64) {
            event.insert("ts".into(), (ts + shift).into());
        }
    }
    close_spans(&mut events);
    Some(Lane { process, pid, events })
}

/// The writer records arguments as text.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.trim_matches('"').parse().ok())
}

/// Ends, at the last moment of the file, every span that was begun and not ended.
fn close_spans(events: &mut Vec<Map<String, Value>>) {
    let last = events.iter().filter_map(|e| e.get("ts")?.as_f64()).fold(f64::NEG_INFINITY, f64::max);
    let mut open: BTreeMap<String, Vec<Map<String, Value>>> = BTreeMap::new();
    for event in events.iter() {
        let Some(thread) = event.get("tid").map(Value::to_string) else { continue };
        match event.get("ph").and_then(Value::as_str) {
            Some("B") => open.entry(thread).or_default().push(event.clone()),
            Some("E") => drop(open.get_mut(&thread).and_then(Vec::pop)),
            _ => {}
        }
    }
    for mut event in open.into_values().flat_map(|stack| stack.into_iter().rev()) {
        event.insert("ph".into(), "E".into());
        event.insert("ts".into(), last.into());
        event.remove("args");
        events.push(event);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    /// A trace as the writer makes it: `shift` is the machine's clock at the process's own zero.
    fn trace(process: &str, pid: u32, shift: u64, spans: &[(&str, f64)]) -> String {
        let mut lines = vec![
            json!({"ph": "M", "pid": 1, "name": "thread_name", "tid": 0, "args": {"name": "main"}}).to_string(),
            json!({"ph": "i", "pid": 1, "ts": 5.25, "name": CLOCK_EVENT, "tid": 0, "s": "t",
                "args": {"monotonic_us": (shift + 5).to_string(), "process": format!("\"{process}\""), "pid": pid.to_string()}})
            .to_string(),
        ];
        lines.extend(spans.iter().map(|(ph, ts)| json!({"ph": ph, "pid": 1, "ts": ts, "name": "work", "tid": 0}).to_string()));
        format!("[\n{}\n]", lines.join(",\n"))
    }

    fn merged(traces: &[String]) -> Vec<Value> {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<_> = (0..traces.len()).map(|i| folder.path().join(format!("{i}.json"))).collect();
        files.iter().zip(traces).for_each(|(f, t)| std::fs::write(f, t).unwrap());
        let target = folder.path().join("all.json");
        merge(&files, &target).unwrap();
        let mut root: Value = serde_json::from_slice(&std::fs::read(target).unwrap()).unwrap();
        root["traceEvents"].as_array_mut().unwrap().drain(..).collect()
    }

    fn times(events: &[Value], pid: u64, ph: &str) -> Vec<f64> {
        events.iter().filter(|e| e["pid"] == pid && e["ph"] == ph).map(|e| e["ts"].as_f64().unwrap()).collect()
    }

    #[test]
    fn events_of_two_processes_meet_on_one_clock() {
        // At machine time 1,000,105 the loader (zero at 1,000,000) is at 105 and the trainer (zero at 1,000,100) at 5.
        let loader = trace("serenity-loader", 11, 1_000_000, &[("B", 105.25), ("E", 200.25)]);
        let trainer = trace("serenity-trainer", 22, 1_000_100, &[("B", 5.25), ("E", 50.5)]);
        let events = merged(&[trainer, loader]);
        assert_eq!(times(&events, 11, "B"), times(&events, 22, "B"));
        assert_eq!(times(&events, 11, "E"), [195.0]);
        assert_eq!(times(&events, 22, "E"), [145.25]);
        let earliest = events.iter().filter_map(|e| e["ts"].as_f64()).fold(f64::MAX, f64::min);
        assert_eq!(earliest, 0.0);
        let names: Vec<&str> = events.iter().filter(|e| e["name"] == "process_name").map(|e| e["args"]["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["serenity-loader", "serenity-trainer"]);
        let threads: Vec<u64> = events.iter().filter(|e| e["name"] == "thread_name").map(|e| e["pid"].as_u64().unwrap()).collect();
        assert_eq!(threads, [11, 22]);
    }

    /// Cut anywhere, a trace never breaks the merged file, keeps its whole lines, and every span in it ends.
    #[test]
    fn a_trace_cut_at_any_byte_stays_well_formed() {
        let whole = trace("serenity-trainer", 7, 50, &[("B", 10.0), ("B", 20.0), ("E", 30.0), ("E", 40.0), ("B", 60.0)]);
        let other = trace("serenity-loader", 8, 50, &[("B", 1.0), ("E", 2.0)]);
        let mut most = 0;
        for cut in 0..=whole.len() {
            let events = merged(&[whole[..cut].to_string(), other.clone()]);
            assert_eq!(times(&events, 8, "E").len(), 1);
            let (begun, ended) = (times(&events, 7, "B"), times(&events, 7, "E"));
            assert_eq!(begun.len(), ended.len(), "cut at {cut}");
            most = most.max(begun.len());
        }
        assert_eq!(most, 3);
    }

    #[test]
    fn a_process_that_was_restarted_has_two_lanes() {
        let events = merged(&[trace("serenity-loader", 1, 0, &[]), trace("serenity-loader", 2, 900, &[]), String::new(), "[".into()]);
        let names: Vec<&Value> = events.iter().filter(|e| e["name"] == "process_name").map(|e| &e["args"]["name"]).collect();
        assert_eq!(names, ["serenity-loader", "serenity-loader (2)"]);
    }
}
