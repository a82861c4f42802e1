//! The README's first command, word for word, in a copy of the repository's relative layout; and the trace of a run.

use serde_json::{Value, json};

use crate::lab::Lab;

#[test]
fn the_quick_start_trains_a_lora_and_its_validation_loss_falls() {
    let lab = Lab::new();
    let model = lab.path().join("model");
    lab.run("serenity-slab", &["synth", "--preset", "tiny", "--output", model.to_str().unwrap()]).expect(0);
    let config = lab.config("run", &json!({ "model": { "path": model } }));
    let trace = lab.path().join("trace.json");
    let done = lab.run("serenity-launch", &[&config, "--trace", trace.to_str().unwrap()]).expect(0);
    assert!(done.seconds < 180.0, "{} s", done.seconds);

    let output = lab.output("run");
    for file in ["quickstart.safetensors", "loss.png", "log.jsonl"] {
        assert!(output.join(file).exists(), "{file}");
        assert!(done.stdout.contains(file), "the launcher does not name {file}:\n{}", done.stdout);
    }
    let log = lab.log("run");
    let steps: Vec<u64> = log.iter().filter(|l| l.get("loss").is_some()).map(|l| l["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=60).collect::<Vec<_>>(), "every step once, in order");
    let validation: Vec<f64> = log.iter().filter_map(|l| l.get("val_loss").and_then(Value::as_f64)).collect();
    let (first, last) = (validation[0], validation[validation.len() - 1]);
    assert!(validation.len() >= 2 && last <= 0.9 * first, "validation loss {first} -> {last}");
    lab.assert_nothing_left();
    check_trace(&std::fs::read_to_string(trace).unwrap());
}

/// The merged trace is one JSON document with named processes on one clock, in which the loader works while the trainer computes.
fn check_trace(text: &str) {
    let document: Value = serde_json::from_str(text).expect("the trace is JSON");
    let events = document.as_array().or_else(|| document["traceEvents"].as_array()).expect("a list of events");
    let named: Vec<(u64, String)> = events
        .iter()
        .filter(|e| e["ph"] == "M" && e["name"] == "process_name")
        .map(|e| (e["pid"].as_u64().unwrap(), e["args"]["name"].as_str().unwrap().to_string()))
        .collect();
    let pid_of = |name: &str| named.iter().find(|(_, n)| n.contains(name)).unwrap_or_else(|| panic!("no {name} among {named:?}")).0;
    let fills = spans(events, pid_of("loader"), &["read", "fill"]);
    let computes = spans(events, pid_of("trainer"), &["block forward", "block backward"]);
    assert!(fills.len() > 10 && computes.len() > 100, "{} fills, {} block visits", fills.len(), computes.len());
    assert!(!spans(events, pid_of("encoder"), &["encode layer"]).is_empty());
    // Share of the loader's work that happened while the trainer was inside a block.
    let (mut total, mut overlapped) = (0.0, 0.0);
    for (start, end) in &fills {
        total += end - start;
        overlapped += computes.iter().map(|(s, e)| (end.min(*e) - start.max(*s)).max(0.0)).sum::<f64>();
    }
    println!("loader work {total:.0} us, of which {:.0} % beside trainer work", 100.0 * overlapped / total);
    assert!(overlapped > 0.2 * total, "loader work {total} us, overlapped {overlapped} us");
}

/// Start and end of the spans of those names in one process, in microseconds.
fn spans(events: &[Value], pid: u64, names: &[&str]) -> Vec<(f64, f64)> {
    let mut open: std::collections::HashMap<(u64, String), Vec<f64>> = std::collections::HashMap::new();
    let mut found = Vec::new();
    let mut ordered: Vec<&Value> = events.iter().filter(|e| e["pid"].as_u64() == Some(pid) && e["ts"].is_number()).collect();
    ordered.sort_by(|a, b| a["ts"].as_f64().unwrap().total_cmp(&b["ts"].as_f64().unwrap()));
    for event in ordered {
        let name = event["name"].as_str().unwrap_or_default().to_string();
        if !names.contains(&name.as_str()) {
            continue;
        }
        let key = (event["tid"].as_u64().unwrap_or(0), name);
        match event["ph"].as_str() {
            Some("B") => open.entry(key).or_default().push(event["ts"].as_f64().unwrap()),
            Some("E") => found.extend(open.get_mut(&key).and_then(Vec::pop).map(|start| (start, event["ts"].as_f64().unwrap()))),
            Some("X") => found.push((event["ts"].as_f64().unwrap(), event["ts"].as_f64().unwrap() + event["dur"].as_f64().unwrap())),
            _ => {}
        }
    }
    found
}
