//! Step checkpoints: everything that the next step needs, in one file.
//!
//! `<output_dir>/checkpoints/step_000120.safetensors` holds the float32 adapters and moments; its metadata has the step, the settings
//! that the run was made with ([`Settings`]) and a BLAKE3 hash of the whole file (its own 64 digits read as zeros), so that no byte of
//! it can change unnoticed. There is no generator state and no position in the data: both are functions of (seed, step).
//!
//! A file appears whole or not at all, and older ones are deleted only after the new one is safe. Equal states give equal bytes.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serenity_protocol::config::{OptimizerConfig, Resume};
use serenity_protocol::{Error, Result, atomic_file};

use crate::model::{Adapter, AdapterSet};
use crate::optimizer::{AdamW, Moments, host};
use crate::settings::Settings;

const FORMAT: &str = "serenity-checkpoint 1";
/// The single metadata key: with one there is no order of keys that could differ between runs.
const METADATA_KEY: &str = "serenity";
/// Start of the metadata's JSON, as it stands (escaped) in the header, up to the first digit of the checksum.
const CHECKSUM_FIELD: &[u8] = br#"{\"blake3\":\""#;
const CHECKSUM_DIGITS: usize = 64;

/// The metadata. `blake3` must stay the first field.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    blake3: String,
    format: String,
    step: u64,
    updates: u64,
    rank: usize,
    alpha: f64,
    settings: Settings,
}

/// What a run goes on from.
#[derive(Debug)]
pub struct Checkpoint {
    /// The file.
    pub path: PathBuf,
    /// Steps done.
    pub step: u64,
    /// Adapters after that step.
    pub adapters: AdapterSet,
    /// The optimiser after that step.
    pub optimizer: AdamW,
}

/// File of a step's checkpoint.
#[must_use]
pub fn path_of(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("step_{step:06}.safetensors"))
}

/// Checkpoint files in `folder` with their steps, oldest first. A missing folder has none.
///
/// # Errors
/// As reading the folder reports.
pub fn list(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("cannot read the checkpoint folder", folder, e)),
    };
    let step_of =
        |path: &Path| -> Option<u64> { path.file_name()?.to_str()?.strip_prefix("step_")?.strip_suffix(".safetensors")?.parse().ok() };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io("cannot read the checkpoint folder", folder, e))?.path();
        found.extend(step_of(&path).map(|step| (step, path)));
    }
    found.sort();
    Ok(found)
}

/// Removes what writers that were killed left half-written.
pub fn sweep(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().ends_with(atomic_file::TEMP_SUFFIX) {
            // Harmless if it stays.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Writes the checkpoint of `step` and then deletes the oldest ones beyond `keep` (0 = keep all).
///
/// Files of later steps (left by a run that was resumed from an earlier one) are not counted and not touched.
///
/// # Errors
/// [`Error::TryAgain`] if the disk is full; nothing is deleted then.
pub fn save(folder: &Path, step: u64, settings: &Settings, adapters: &AdapterSet, optimizer: &AdamW, keep: usize) -> Result<PathBuf> {
    let path = path_of(folder, step);
    atomic_file::write(&path, &to_bytes(step, settings, adapters, optimizer)?)?;
    if keep > 0 {
        let mut older: Vec<PathBuf> = list(folder)?.into_iter().filter(|(s, _)| *s <= step).map(|(_, p)| p).collect();
        older.truncate(older.len().saturating_sub(keep));
        for path in older {
            std::fs::remove_file(&path).map_err(|e| Error::io("cannot delete an old checkpoint", &path, e))?;
        }
    }
    Ok(path)
}

fn to_bytes(step: u64, settings: &Settings, adapters: &AdapterSet, optimizer: &AdamW) -> Result<Vec<u8>> {
    let failed = |e: &dyn std::fmt::Display| Error::invariant("the checkpoint cannot be put together").cause(e);
    let mut parts: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::with_capacity(6 * adapters.adapters.len());
    for (adapter, (ma, mb)) in adapters.adapters.iter().zip(optimizer.moments()) {
        for (side, tensor, moments) in [("a", &adapter.a, ma), ("b", &adapter.b, mb)] {
            let values = host(tensor).map_err(|e| failed(&e))?;
            for (kind, values) in [("value", &values), ("moment1", &moments.first), ("moment2", &moments.second)] {
                parts.push((format!("{kind}.{side}.{}", adapter.name), tensor.dims().to_vec(), le_bytes(values)));
            }
        }
    }
    let views = parts
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|e| failed(&e))?;
    let head = Head {
        blake3: "0".repeat(CHECKSUM_DIGITS),
        format: FORMAT.into(),
        step,
        updates: optimizer.updates(),
        rank: adapters.rank,
        alpha: adapters.alpha,
        settings: settings.clone(),
    };
    let head = serde_json::to_string(&head).map_err(|e| failed(&e))?;
    let metadata = HashMap::from([(METADATA_KEY.to_string(), head)]);
    let mut file = safetensors::serialize(views, Some(metadata)).map_err(|e| failed(&e))?;
    let at = checksum_position(&file).ok_or_else(|| failed(&"its header has no place for the checksum"))?;
    let digits = blake3::hash(&file).to_hex();
    file[at..at + CHECKSUM_DIGITS].copy_from_slice(digits.as_bytes());
    Ok(file)
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Offset of the checksum's first digit in the file.
fn checksum_position(file: &[u8]) -> Option<usize> {
    let header_end = 8usize.checked_add(usize::try_from(u64::from_le_bytes(*file.first_chunk::<8>()?)).ok()?)?;
    let header = file.get(..header_end)?;
    let at = header.windows(CHECKSUM_FIELD.len()).position(|w| w == CHECKSUM_FIELD)? + CHECKSUM_FIELD.len();
    (at + CHECKSUM_DIGITS <= header_end).then_some(at)
}

/// Reads a checkpoint, proves every byte of it, and puts the adapters on `device`.
///
/// # Errors
/// [`Error::Data`] if it is corrupt, of another format, or of settings other than `settings` (naming what differs);
/// [`Error::Absent`] if there is none.
pub fn read(path: &Path, settings: &Settings, config: &OptimizerConfig, device: &Device) -> Result<Checkpoint> {
    let (head, bytes) = verified(path)?;
    let differences = head.settings.differences(settings);
    if !differences.is_empty() {
        return Err(Error::data("the checkpoint is of another configuration")
            .at(path)
            .found(differences.join("; "))
            .advice("restore these settings, start over with --resume never, or choose another output_dir"));
    }
    let corrupt = |e: &dyn std::fmt::Display| corrupt(path, e);
    let file = SafeTensors::deserialize(&bytes).map_err(|e| corrupt(&e))?;
    let mut names: Vec<&str> = file.names().into_iter().filter_map(|n| n.strip_prefix("value.a.")).collect();
    names.sort_unstable();
    let mut adapters = Vec::with_capacity(names.len());
    let mut moments = Vec::with_capacity(names.len());
    for name in names {
        let values = |kind: &str, side: &str| -> Result<(Vec<usize>, Vec<f32>)> {
            let view = file.tensor(&format!("{kind}.{side}.{name}")).map_err(|e| corrupt(&e))?;
            if view.dtype() != Dtype::F32 {
                return Err(corrupt(&format!("'{name}' is not float32")));
            }
            Ok((view.shape().to_vec(), view.data().as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect()))
        };
        let side = |side: &str| -> Result<(Tensor, Moments)> {
            let (shape, data) = values("value", side)?;
            let tensor = Tensor::from_vec(data, shape, device).map_err(|e| corrupt(&e))?;
            Ok((tensor, Moments { first: values("moment1", side)?.1, second: values("moment2", side)?.1 }))
        };
        let ((a, moments_a), (b, moments_b)) = (side("a")?, side("b")?);
        adapters.push(Adapter { name: name.to_string(), a, b });
        moments.push((moments_a, moments_b));
    }
    let adapters = AdapterSet::new(head.rank, head.alpha, adapters).map_err(|e| e.at(path))?;
    let optimizer = AdamW::restore(config, &adapters, head.updates, moments).map_err(|e| e.at(path))?;
    Ok(Checkpoint { path: path.to_path_buf(), step: head.step, adapters, optimizer })
}

fn corrupt(path: &Path, cause: &dyn std::fmt::Display) -> Error {
    Error::data("the checkpoint is corrupt")
        .at(path)
        .cause(cause)
        .advice("delete it: with --resume auto the run then goes on from the one before, or from the start")
}

/// The file's bytes after its checksum held, and its metadata.
fn verified(path: &Path) -> Result<(Head, Vec<u8>)> {
    let mut bytes = std::fs::read(path).map_err(|e| Error::io("cannot read the checkpoint", path, e))?;
    let Some(at) = checksum_position(&bytes) else {
        return Err(corrupt(path, &"it has no checksum: it is truncated, or no checkpoint (a LoRA file holds too little to go on from)"));
    };
    let stated = bytes[at..at + CHECKSUM_DIGITS].to_vec();
    bytes[at..at + CHECKSUM_DIGITS].fill(b'0');
    if blake3::hash(&bytes).to_hex().as_bytes() != stated {
        return Err(corrupt(path, &"its checksum does not match its content"));
    }
    let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| corrupt(path, &e))?;
    let text = metadata.metadata().as_ref().and_then(|m| m.get(METADATA_KEY)).map(String::as_str).unwrap_or_default();
    let head: Head = serde_json::from_str(text).map_err(|e| corrupt(path, &e))?;
    if head.format != FORMAT {
        return Err(Error::data("the checkpoint is of another version of this program").at(path).expected(FORMAT).found(head.format));
    }
    Ok((head, bytes))
}

/// Finds what `resume` says to go on from.
///
/// `Auto` takes the newest checkpoint in `folder` that is whole and of a step up to `max_step`; corrupt ones are passed over, and
/// `notice` is told. Without any it starts over, which leads to the same result. A whole one of other settings is refused, not passed
/// over: going on from an older run by accident helps nobody. A path is taken or refused.
///
/// # Errors
/// As [`read`]; [`Error::Config`] for a path that is a folder or of a step after `max_step`.
pub fn find(
    folder: &Path,
    resume: &Resume,
    max_step: u64,
    settings: &Settings,
    config: &OptimizerConfig,
    device: &Device,
    notice: &mut dyn FnMut(String),
) -> Result<Option<Checkpoint>> {
    match resume {
        Resume::Never => Ok(None),
        Resume::Path(path) => {
            if path.is_dir() {
                return Err(Error::config("--resume names a folder").at(path).expected("a checkpoint file, auto or never"));
            }
            let found = read(path, settings, config, device)?;
            if found.step > max_step {
                return Err(Error::config("the checkpoint is of a step after the end of the run")
                    .at(path)
                    .expected(max_step)
                    .found(found.step));
            }
            Ok(Some(found))
        }
        Resume::Auto => {
            for (step, path) in list(folder)?.into_iter().rev() {
                if step > max_step {
                    notice(format!("passing over {}: the run ends at step {max_step}", path.display()));
                    continue;
                }
                match verified(&path) {
                    Ok(_) => return read(&path, settings, config, device).map(Some),
                    Err(e @ Error::Data(_)) => notice(format!("passing over a corrupt checkpoint: {e}")),
                    Err(e) => return Err(e),
                }
            }
            Ok(None)
        }
    }
}

/// Moves the checkpoints of an earlier run out of the way of a new one (`--resume never`), so that a later `auto` cannot take one of
/// them for one of this run. Returns where they went.
///
/// # Errors
/// What the operating system reports.
pub fn set_aside(folder: &Path) -> Result<Option<PathBuf>> {
    if list(folder)?.is_empty() {
        return Ok(None);
    }
    let target = (1u32..).map(|i| folder.with_file_name(format!("checkpoints-before-{i}"))).find(|p| !p.exists());
    let target = target.ok_or_else(|| Error::invariant("no free name for the old checkpoints"))?;
    std::fs::rename(folder, &target).map_err(|e| Error::io("cannot set the old checkpoints aside", folder, e))?;
    atomic_file::sync_folder_of(folder).map_err(|e| Error::io("cannot set the old checkpoints aside", folder, e))?;
    Ok(Some(target))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::model::AdapterGrads;
    use crate::rng;

    const CONFIG: OptimizerConfig =
        OptimizerConfig { learning_rate: 1e-3, weight_decay: 0.0, beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm: 1.0 };

    fn state(updates: u64) -> (AdapterSet, AdamW) {
        let random = |purpose: &str, i: u64, rows: usize, columns: usize| {
            let values = rng::normals(&mut rng::stream(9, purpose, i, 0), rows * columns);
            Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
        };
        let adapter = |i: u64| Adapter { name: format!("block.{i}.attn.to_q"), a: random("a", i, 2, 3), b: random("b", i, 4, 2) };
        let mut set = AdapterSet::new(2, 0.1 + 0.2, (0..12).map(adapter).collect()).unwrap();
        let mut optimizer = AdamW::new(&CONFIG, &set);
        for update in 0..updates {
            let grads = AdapterGrads {
                a: (0..12).map(|i| random("ga", 100 * update + i, 2, 3)).collect(),
                b: (0..12).map(|i| random("gb", 100 * update + i, 4, 2)).collect(),
            };
            optimizer.step(&mut set, &grads, 1e-3).unwrap();
        }
        (set, optimizer)
    }

    fn bits(set: &AdapterSet) -> Vec<u32> {
        set.adapters.iter().flat_map(|a| [&a.a, &a.b]).flat_map(|t| host(t).unwrap()).map(f32::to_bits).collect()
    }

    fn find_auto(folder: &Path, max_step: u64, notices: &mut Vec<String>) -> Result<Option<Checkpoint>> {
        find(folder, &Resume::Auto, max_step, &Settings::default(), &CONFIG, &Device::Cpu, &mut |n| notices.push(n))
    }

    fn save_steps(folder: &Path, steps: &[u64], keep: usize) {
        for step in steps {
            let (set, optimizer) = state(*step);
            save(folder, *step, &Settings::default(), &set, &optimizer, keep).unwrap();
        }
    }

    fn steps(folder: &Path) -> Vec<u64> {
        list(folder).unwrap().into_iter().map(|(s, _)| s).collect()
    }

    #[test]
    fn what_is_read_is_what_was_saved() {
        let dir = tempfile::tempdir().unwrap();
        let (set, optimizer) = state(3);
        let path = save(dir.path(), 3, &Settings::default(), &set, &optimizer, 0).unwrap();
        let read = read(&path, &Settings::default(), &CONFIG, &Device::Cpu).unwrap();
        assert_eq!((read.step, read.adapters.rank, read.adapters.alpha), (3, 2, 0.1 + 0.2));
        assert_eq!(bits(&read.adapters), bits(&set));
        assert_eq!(read.optimizer, optimizer);
        let again = to_bytes(3, &Settings::default(), &read.adapters, &read.optimizer).unwrap();
        assert_eq!(again, std::fs::read(&path).unwrap(), "equal states give equal bytes");
    }

    #[test]
    fn every_changed_byte_and_every_length_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (set, optimizer) = state(1);
        let good = to_bytes(1, &Settings::default(), &set, &optimizer).unwrap();
        let path = path_of(dir.path(), 1);
        let refused = |bytes: &[u8], what: String| {
            std::fs::write(&path, bytes).unwrap();
            let error = read(&path, &Settings::default(), &CONFIG, &Device::Cpu).expect_err(&what);
            assert_eq!(error.exit_code(), 65, "{what}: {error}");
        };
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            refused(&bad, format!("byte {at}"));
        }
        for length in [0, 7, 8, 100, good.len() / 2, good.len() - 1] {
            refused(&good[..length], format!("cut to {length}"));
        }
        refused(&[good.as_slice(), &[0]].concat(), "one byte more".into());
    }

    #[test]
    fn other_settings_are_refused_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let (set, optimizer) = state(1);
        let settings = |seed: &str| serde_json::from_value::<Settings>(serde_json::json!({"seed": seed, "model": "m"})).unwrap();
        let path = save(dir.path(), 1, &settings("1"), &set, &optimizer, 0).unwrap();
        assert!(read(&path, &settings("1"), &CONFIG, &Device::Cpu).is_ok());
        for resume in [Resume::Auto, Resume::Path(path)] {
            let error = find(dir.path(), &resume, 10, &settings("2"), &CONFIG, &Device::Cpu, &mut |_| ()).unwrap_err();
            assert_eq!(error.exit_code(), 65);
            assert!(error.to_string().contains("seed: 1 in the checkpoint, 2 now"), "{error}");
            assert!(!error.to_string().contains("model"), "{error}");
        }
    }

    #[test]
    fn auto_passes_over_corrupt_and_too_late_ones_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        assert!(find_auto(&dir.path().join("absent"), 9, &mut Vec::new()).unwrap().is_none());
        save_steps(dir.path(), &[1, 2, 3], 0);
        let newest = path_of(dir.path(), 3);
        let bytes = std::fs::read(&newest).unwrap();
        std::fs::write(&newest, &bytes[..bytes.len() - 4]).unwrap();
        let mut notices = Vec::new();
        assert_eq!(find_auto(dir.path(), 9, &mut notices).unwrap().unwrap().step, 2);
        assert!(notices.len() == 1 && notices[0].contains("step_000003"), "{notices:?}");
        assert_eq!(find_auto(dir.path(), 1, &mut notices).unwrap().unwrap().step, 1);
        let explicit = find(dir.path(), &Resume::Path(newest), 9, &Settings::default(), &CONFIG, &Device::Cpu, &mut |_| ());
        assert_eq!(explicit.unwrap_err().exit_code(), 65);
    }

    #[test]
    fn old_ones_go_after_the_new_one_is_there_and_later_ones_stay() {
        let dir = tempfile::tempdir().unwrap();
        save_steps(dir.path(), &[1, 2, 3, 9], 0);
        save_steps(dir.path(), &[4], 2);
        assert_eq!(steps(dir.path()), [3, 4, 9]);
        std::fs::write(dir.path().join("step_000005.safetensors.77.partial"), b"half").unwrap();
        assert_eq!(steps(dir.path()), [3, 4, 9], "half-written files are no checkpoints");
        sweep(dir.path());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
    }

    #[test]
    fn a_lora_file_is_no_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lora.safetensors");
        std::fs::write(&path, safetensors::serialize(Vec::<(String, TensorView)>::new(), None).unwrap()).unwrap();
        let error = read(&path, &Settings::default(), &CONFIG, &Device::Cpu).unwrap_err();
        assert!(error.exit_code() == 65 && error.to_string().contains("LoRA"), "{error}");
    }

    #[test]
    fn starting_over_sets_old_checkpoints_aside() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("checkpoints");
        assert_eq!(set_aside(&folder).unwrap(), None);
        for round in 1..=2 {
            save_steps(&folder, &[1], 0);
            assert_eq!(set_aside(&folder).unwrap(), Some(dir.path().join(format!("checkpoints-before-{round}"))));
            assert!(steps(&folder).is_empty());
        }
    }
}
