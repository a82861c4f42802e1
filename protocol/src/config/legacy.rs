//! The flat layout of the original's first generation: recognised and refused.
//!
//! The original rebuilt such a file into the structured one and lost keys on the way without a word. Here the user is told which of
//! the file's keys that would have been.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Root keys by which the original recognised the layout.
const MARKS: [&str; 2] = ["base_model_name", "output_model_destination"];

/// What survived the original's conversion of each section; everything else in it was dropped.
const KEPT: [(&str, &[&str]); 3] = [
    (
        "memory",
        &["gradient_checkpointing", "enable_activation_offloading", "enable_async_offloading", "layer_offload_fraction", "quantization"],
    ),
    ("optimizer", &["optimizer", "weight_decay"]),
    ("checkpoint", &["output_dir", "save_every", "save_full_model"]),
];

/// Refuses a legacy file.
pub(super) fn refuse(value: &Value, source: &Path) -> Result<()> {
    let Value::Object(root) = value else { return Ok(()) };
    let Some(mark) = MARKS.into_iter().find(|m| root.contains_key(*m)) else { return Ok(()) };
    let lost = dropped(root);
    let found = if lost.is_empty() { "none of this file's keys".to_string() } else { lost.join(", ") };
    Err(Error::config(format!("the configuration has the legacy layout (`{mark}` at the root), which is not converted"))
        .at(source)
        .found(format!("keys that the original's conversion would have dropped without a message: {found}"))
        .advice("write the structured layout: model.path instead of base_model_name, output_dir instead of output_model_destination, and the sections adapter, memory, data"))
}

/// The file's keys that the original's conversion dropped, as dotted paths.
fn dropped(root: &Map<String, Value>) -> Vec<String> {
    let mut lost = Vec::new();
    for (key, value) in root {
        let lower = key.to_lowercase();
        let whole = ["stagehand", "squareq", "timestep", "dynamic_timestep", "sample", "learning_rate_scheduler", "learning_rate_warmup"]
            .iter()
            .any(|start| lower.starts_with(start))
            || lower == "scheduler"
            || lower == "target_modules";
        match value {
            Value::Object(section) if whole || lower == "scheduler" => lost.extend(section.keys().map(|k| format!("{key}.{k}"))),
            _ if whole => lost.push(key.clone()),
            Value::Object(section) => {
                let kept = KEPT.iter().find(|(name, _)| name == key).map(|(_, kept)| *kept);
                for name in section.keys() {
                    if kept.is_some_and(|kept| !kept.contains(&name.as_str())) || name == "target_modules" {
                        lost.push(format!("{key}.{name}"));
                    }
                }
            }
            _ => {}
        }
    }
    lost
}
