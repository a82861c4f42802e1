//! From raw to validated: aliases, defaults, ranges, and the derived values every process must agree on.

mod memory;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use self::memory::memory;
use super::raw::{RawConcept, RawConfig, RawTargets};
use super::{
    AdapterConfig, CheckpointConfig, ComputeDtype, Concept, Config, DataConfig, DeviceKind, ModelConfig, OptimizerConfig, Overrides,
    RemoteEncoder, Resume, SchedulerConfig, SchedulerKind, Targets, TimestepConfig, TimestepDistribution, ValidationConfig, json, legacy,
    neutral,
};
use crate::error::{Error, Result};

impl Config {
    /// Reads and validates `path` with the command line's `overrides`.
    ///
    /// # Errors
    /// [`Error::Absent`] if the file cannot be read, [`Error::Config`] naming the key for everything else.
    pub fn load(path: &Path, overrides: &Overrides) -> Result<Self> {
        let ending = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
        if ending == "yaml" || ending == "yml" {
            return Err(Error::config("configurations are JSON; YAML is not read")
                .at(path)
                .advice("convert the file to JSON (the keys stay the same)"));
        }
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("cannot read the configuration", path, e))?;
        Self::from_json(&text, path, overrides)
    }

    /// As [`Self::load`], for text that has been read already; `source` names it in messages and gives the run its default name.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn from_json(text: &str, source: &Path, overrides: &Overrides) -> Result<Self> {
        let mut value = json::parse(text, source)?;
        for assignment in &overrides.set {
            json::set(&mut value, assignment)?;
        }
        legacy::refuse(&value, source)?;
        apply(&mut value, overrides);
        let raw = json::to_raw(value, source)?;
        validate(raw, source).map_err(|e| e.at(source))
    }
}

/// `--data`, `--steps` and `--resume` replace what the file says, whatever spelling it uses.
fn apply(value: &mut Value, overrides: &Overrides) {
    let remove = |value: &mut Value, keys: &[&str]| {
        if let Value::Object(map) = value {
            keys.iter().for_each(|k| drop(map.shift_remove(*k)));
        }
    };
    const RESUME_KEYS: [&str; 3] = ["resume_state", "resume_from", "resume_checkpoint"];
    if let Some(folder) = &overrides.data {
        remove(value, &["concepts"]);
        json::put(value, &["data", "concepts"], json!([folder.to_string_lossy()]));
    }
    if let Some(steps) = overrides.steps {
        remove(value, &["max_train_steps"]);
        json::put(value, &["max_steps"], json!(steps));
    }
    if let Some(resume) = &overrides.resume {
        remove(value, &RESUME_KEYS);
        if let Some(section) = value.get_mut("checkpoint") {
            remove(section, &RESUME_KEYS);
        }
        json::put(value, &["checkpoint", "resume"], json!(resume));
    }
}

fn validate(raw: RawConfig, source: &Path) -> Result<Config> {
    neutral::check(&raw)?;
    refuse_buckets(&raw)?;
    check_model_type(&raw)?;
    let mut notices = Vec::new();
    let name = run_name(&raw, source)?;
    let output_dir = agree(&[("checkpoint.output_dir", raw.checkpoint.output_dir.clone()), ("output_dir", raw.output_dir.clone())])?
        .unwrap_or_else(|| Path::new("output").join(&name));
    let device = device(raw.train_device.as_deref())?;
    let dtype = dtype(&raw)?;
    let optimizer = optimizer(&raw)?;
    Ok(Config {
        model: model(&raw)?,
        adapter: adapter(&raw)?,
        memory: memory(&raw, &name, &output_dir, device, &mut notices)?,
        data: data(&raw, &output_dir)?,
        encoder: encoder(&raw)?,
        resolution: resolution(&raw, &mut notices)?,
        batch_size: within(
            "batch_size",
            agree(&[("data.batch_size", raw.data.batch_size), ("batch_size", raw.batch_size)])?.unwrap_or(1),
            1,
            4096,
        )?,
        gradient_accumulation_steps: within(
            "gradient_accumulation_steps",
            once(&[
                ("gradient_accumulation_steps", raw.gradient_accumulation_steps),
                ("gradient_accumulation", raw.gradient_accumulation),
            ])?
            .unwrap_or(1),
            1,
            65_536,
        )?,
        max_steps: within(
            "max_steps",
            once(&[("max_steps", raw.max_steps), ("max_train_steps", raw.max_train_steps)])?.unwrap_or(100),
            1,
            1 << 40,
        )?,
        seed: raw.seed.unwrap_or(42),
        device,
        dtype,
        guidance_scale: number("guidance_scale", raw.guidance_scale.unwrap_or(1.0), 0.0, 1000.0)?,
        timestep: timestep(&raw)?,
        optimizer,
        scheduler: scheduler(&raw)?,
        checkpoint: checkpoint(&raw)?,
        validation: ValidationConfig {
            samples: within("validation.samples", raw.validation.samples.unwrap_or(4), 0, 65_536)?,
            every: raw.validation.every.unwrap_or(0),
        },
        log_every_steps: raw.log_every_steps.map(|n| within("log_every_steps", n, 1, 1 << 40)).transpose()?,
        source: source.to_path_buf(),
        name,
        output_dir,
        notices,
    })
}

/// One value under several spellings: giving two of them is an error, even if they agree.
fn once<T: Clone>(spellings: &[(&str, Option<T>)]) -> Result<Option<T>> {
    let given: Vec<&(&str, Option<T>)> = spellings.iter().filter(|(_, v)| v.is_some()).collect();
    match given.as_slice() {
        [] => Ok(None),
        [one] => Ok(one.1.clone()),
        more => Err(Error::config(format!("`{}` are spellings of one key, and both are given", join(more))).advice("keep one of them")),
    }
}

/// One value in several sections: they may repeat each other, but not differ.
fn agree<T: Clone + PartialEq>(places: &[(&str, Option<T>)]) -> Result<Option<T>> {
    let given: Vec<&(&str, Option<T>)> = places.iter().filter(|(_, v)| v.is_some()).collect();
    match given.as_slice() {
        [] => Ok(None),
        [first, rest @ ..] if rest.iter().all(|other| other.1 == first.1) => Ok(first.1.clone()),
        more => Err(Error::config(format!("`{}` differ", join(more)))
            .advice(format!("keep one of them (the original would have used `{}`)", more.first().map_or("", |m| m.0)))),
    }
}

fn join<T>(given: &[&(&str, T)]) -> String {
    given.iter().map(|g| g.0).collect::<Vec<_>>().join("` and `")
}

/// `min <= value <= max`, or an error that names the key.
fn within<T: PartialOrd + std::fmt::Display + Copy>(key: &str, value: T, min: T, max: T) -> Result<T> {
    if value >= min && value <= max {
        Ok(value)
    } else {
        Err(Error::config(format!("`{key}` is out of range")).expected(format!("{min} to {max}")).found(value))
    }
}

/// [`within`] for floats: NaN is out of every range.
fn number(key: &str, value: f64, min: f64, max: f64) -> Result<f64> {
    within(key, value, min, max)
}

/// One of a few words, in any case.
fn word<T: Copy>(key: &str, text: &str, words: &[(&str, T)]) -> Result<T> {
    let lower = text.to_lowercase().replace('-', "_");
    words.iter().find(|(w, _)| *w == lower).map(|(_, t)| *t).ok_or_else(|| {
        let words: Vec<&str> = words.iter().map(|(w, _)| *w).collect();
        Error::config(format!("`{key}` has an unknown value")).expected(format!("one of {}", words.join(", "))).found(text)
    })
}

fn refuse_buckets(raw: &RawConfig) -> Result<()> {
    if raw.bucket_policy_enabled == Some(true) {
        return Err(Error::config(
            "`bucket_policy_enabled` cannot be true: the plan for ring and device memory, and the micro-batches that visit a block together, \
             need one image size for the whole run",
        )
        .advice("set bucket_policy_enabled to false; images are resized to cover `resolution` and cropped"));
    }
    Ok(())
}

fn check_model_type(raw: &RawConfig) -> Result<()> {
    for (key, value) in [("model_type", &raw.model_type), ("model.type", &raw.model.kind)] {
        let Some(value) = value else { continue };
        let plain: String = value.to_lowercase().chars().filter(char::is_ascii_alphanumeric).collect();
        if plain != "flux2" && plain != "flux2dev" {
            return Err(Error::config(format!("`{key}` names a model that cannot be trained"))
                .expected("flux_2_dev")
                .found(value)
                .advice("FLUX.2 [dev] and checkpoints of its architecture are supported; klein has another text encoder"));
        }
    }
    Ok(())
}

fn run_name(raw: &RawConfig, source: &Path) -> Result<String> {
    let name = raw.name.clone().or_else(|| source.file_stem().map(|s| s.to_string_lossy().into_owned())).unwrap_or_default();
    let plain = !name.is_empty() && name.len() <= 128 && !name.starts_with('.') && !name.contains(['/', '\\', '\0', '\n']);
    if plain {
        Ok(name)
    } else {
        Err(Error::config("`name` cannot name a file").expected("1 to 128 bytes without slashes, no leading dot").found(name))
    }
}

fn device(text: Option<&str>) -> Result<DeviceKind> {
    let text = text.unwrap_or("cuda");
    let (kind, ordinal) = text.split_once(':').unwrap_or((text, "0"));
    match (kind, ordinal.parse::<usize>()) {
        ("cpu", _) if kind == text => Ok(DeviceKind::Cpu),
        ("cuda", Ok(ordinal)) if ordinal < 1024 => Ok(DeviceKind::Cuda(ordinal)),
        _ => Err(Error::config("`train_device` names no device").expected("cpu, cuda or cuda:N").found(text)),
    }
}

fn dtype(raw: &RawConfig) -> Result<ComputeDtype> {
    const WORDS: [(&str, ComputeDtype); 6] = [
        ("bfloat16", ComputeDtype::Bf16),
        ("bf16", ComputeDtype::Bf16),
        ("bfloat_16", ComputeDtype::Bf16),
        ("float32", ComputeDtype::F32),
        ("fp32", ComputeDtype::F32),
        ("float_32", ComputeDtype::F32),
    ];
    let read = |key, text: &Option<String>| text.as_ref().map(|t| word(key, t, &WORDS)).transpose();
    let stagehand = raw.memory.stagehand.as_ref().and_then(|s| s.dtype.clone());
    let places = [
        ("train_dtype", read("train_dtype", &raw.train_dtype)?),
        ("model.dtype", read("model.dtype", &raw.model.dtype)?),
        ("memory.stagehand.dtype", read("memory.stagehand.dtype", &stagehand)?),
    ];
    Ok(agree(&places)?.unwrap_or(ComputeDtype::Bf16))
}

fn model(raw: &RawConfig) -> Result<ModelConfig> {
    let path = raw.model.path.clone().filter(|p| !p.trim().is_empty()).ok_or_else(|| {
        Error::config("`model.path` is missing")
            .advice("give a folder in the Hugging Face layout, a .safetensors file, or a hub id such as black-forest-labs/FLUX.2-dev")
    })?;
    let slab = raw.model.text_encoder_slab_path.clone();
    if let Some(slab) = slab.as_ref().filter(|s| s.extension().is_none_or(|e| e != "safetensors")) {
        return Err(Error::config("`model.text_encoder_slab_path` must end in .safetensors").found(slab.display()));
    }
    Ok(ModelConfig {
        path,
        text_encoder_slab_path: slab,
        vae_path: raw.model.vae_path.clone(),
        text_encoder_path: raw.model.text_encoder_path.clone(),
        tokenizer_path: raw.model.tokenizer_path.clone(),
        text_hidden_states: raw.model.text_hidden_states,
        max_sequence_length: within("model.max_sequence_length", raw.model.max_sequence_length.unwrap_or(512), 1, 32_768)?,
    })
}

fn adapter(raw: &RawConfig) -> Result<AdapterConfig> {
    let rank = within(
        "adapter.rank",
        once(&[("adapter.rank", raw.adapter.rank), ("adapter.network_dim", raw.adapter.network_dim)])?.unwrap_or(16),
        1,
        65_536,
    )?;
    let alpha = once(&[("adapter.alpha", raw.adapter.alpha), ("adapter.network_alpha", raw.adapter.network_alpha)])?.unwrap_or(rank as f64);
    if !(alpha > 0.0 && alpha.is_finite()) {
        return Err(Error::config("`adapter.alpha` must be positive").found(alpha));
    }
    let targets = match &raw.adapter.target_modules {
        None => Targets::AllLinear,
        Some(RawTargets(entries)) if entries.len() == 1 && entries.iter().all(|e| e == "all-linear") => Targets::AllLinear,
        Some(RawTargets(entries)) => {
            let bad = |e: &&String| e.is_empty() || e.contains(char::is_whitespace) || e.as_str() == "all-linear";
            if entries.is_empty() {
                return Err(
                    Error::config("`adapter.target_modules` is empty").advice("list names such as \"attn.to_q\", or write \"all-linear\"")
                );
            }
            if let Some(bad) = entries.iter().find(bad) {
                return Err(Error::config("`adapter.target_modules` has an entry that is no layer name").found(format!("{bad:?}")));
            }
            Targets::Entries(entries.clone())
        }
    };
    Ok(AdapterConfig { rank, alpha, targets })
}

/// `encoder`: nothing in it may be read as an option by ssh, or as more than one word by the shell over there.
fn encoder(raw: &RawConfig) -> Result<Option<RemoteEncoder>> {
    let Some(section) = &raw.encoder else { return Ok(None) };
    let host = section.host.clone().ok_or_else(|| Error::config("`encoder.host` is missing").expected("user@machine"))?;
    let plain = |text: &str, more: &str| {
        !text.is_empty()
            && !text.starts_with('-')
            && text.len() <= 1024
            && text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
    };
    if !plain(&host, "@.-_:%[]") {
        return Err(Error::config("`encoder.host` is no name of a machine").expected("user@machine").found(host));
    }
    let command = section.command.clone().unwrap_or_else(|| "serenity-encoder".into());
    if !plain(&command, "/._-+~") {
        return Err(Error::config("`encoder.command` is no plain path")
            .expected("letters, digits and / . _ - + ~")
            .found(command)
            .advice("options of the program there are not needed: everything goes through the connection"));
    }
    for (key, path) in [("identity_file", &section.identity_file), ("known_hosts_file", &section.known_hosts_file)] {
        let text = path.as_ref().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
        if text.contains(['"', '\\', '\n', '%', '$']) {
            return Err(Error::config(format!("`encoder.{key}` has a letter that ssh would read otherwise")).found(text));
        }
    }
    Ok(Some(RemoteEncoder {
        host,
        command,
        port: section.port.map(|p| within("encoder.port", p, 1, u16::MAX)).transpose()?,
        identity_file: section.identity_file.clone(),
        known_hosts_file: section.known_hosts_file.clone(),
        model_path: section.model_path.clone(),
        device: section.device.as_deref().map(|text| device(Some(text))).transpose()?,
    }))
}

fn resolution(raw: &RawConfig, notices: &mut Vec<String>) -> Result<u32> {
    let asked = agree(&[("data.resolution", raw.data.resolution), ("resolution", raw.resolution)])?.unwrap_or(1024);
    within("resolution", asked, 64, 16_384)?;
    let rounded = (asked + 8) / 16 * 16;
    if rounded != asked {
        notices.push(format!("resolution {asked} is rounded to {rounded}, the nearest multiple of 16"));
    }
    Ok(rounded)
}

fn data(raw: &RawConfig, output_dir: &Path) -> Result<DataConfig> {
    let concepts = match (&raw.data.concepts, &raw.concepts) {
        (Some(_), Some(_)) => {
            return Err(
                Error::config("`data.concepts` and `concepts` are spellings of one key, and both are given").advice("keep data.concepts")
            );
        }
        (found, None) | (None, found) => found.as_deref().unwrap_or_default(),
    };
    if concepts.is_empty() {
        return Err(Error::config("the configuration names no training images")
            .advice("give the folder with --data DIR, or in the file as \"data\": {\"concepts\": [{\"path\": \"DIR\"}]}"));
    }
    let concepts = concepts.iter().enumerate().map(|(i, c)| concept(i, c)).collect::<Result<_>>()?;
    Ok(DataConfig { concepts, cache_dir: raw.data.cache_dir.clone().unwrap_or_else(|| output_dir.join("cache")) })
}

fn concept(index: usize, RawConcept(raw): &RawConcept) -> Result<Concept> {
    let key = |name: &str| format!("data.concepts[{index}].{name}");
    let ext = raw.caption_file_ext.clone().unwrap_or_else(|| ".txt".to_string());
    let ext = if ext.starts_with('.') { ext } else { format!(".{ext}") };
    if ext.len() < 2 || ext.contains(['/', '\0']) {
        return Err(Error::config(format!("`{}` is no file ending", key("caption_file_ext"))).expected("such as \".txt\"").found(ext));
    }
    if raw.path.as_os_str().is_empty() {
        return Err(Error::config(format!("`{}` is empty", key("path"))));
    }
    let repeats = once(&[("num_repeats", raw.num_repeats), ("repeats", raw.repeats)])?.unwrap_or(1);
    Ok(Concept { path: raw.path.clone(), caption_file_ext: ext, repeats: within(&key("repeats"), repeats, 1, 1 << 20)? })
}

fn timestep(raw: &RawConfig) -> Result<TimestepConfig> {
    const WORDS: [(&str, TimestepDistribution); 3] = [
        ("logit_normal", TimestepDistribution::LogitNormal),
        ("sigmoid", TimestepDistribution::LogitNormal),
        ("uniform", TimestepDistribution::Uniform),
    ];
    let distribution =
        raw.timestep_distribution.as_deref().map_or(Ok(TimestepDistribution::LogitNormal), |t| word("timestep_distribution", t, &WORDS))?;
    let shift = number("timestep_shift", raw.timestep_shift.unwrap_or(1.0), 1e-6, 1e6)?;
    // A constant shift that is spelled out switches the resolution-dependent one off, unless that is asked for as well.
    let dynamic_shift = raw.dynamic_timestep_shifting.unwrap_or(raw.timestep_shift.is_none());
    if dynamic_shift && shift != 1.0 {
        return Err(Error::config("`timestep_shift` and `dynamic_timestep_shifting` exclude each other").advice("keep one of them"));
    }
    Ok(TimestepConfig { distribution, shift, dynamic_shift })
}

fn optimizer(raw: &RawConfig) -> Result<OptimizerConfig> {
    let o = &raw.optimizer;
    if let Some(name) = &o.optimizer
        && !["adamw", "adam_w"].contains(&name.to_lowercase().as_str())
    {
        return Err(Error::config("`optimizer.optimizer` names an optimiser that does not exist here")
            .expected("adamw")
            .found(name)
            .advice("use adamw (the original mapped the 8-bit and schedule-free names to it without a message)"));
    }
    let learning_rate = raw.learning_rate.unwrap_or(1e-4);
    if !(learning_rate > 0.0 && learning_rate.is_finite()) {
        return Err(Error::config("`learning_rate` must be positive").found(learning_rate));
    }
    Ok(OptimizerConfig {
        learning_rate,
        weight_decay: number("optimizer.weight_decay", o.weight_decay.unwrap_or(0.0), 0.0, 1e3)?,
        beta1: number("optimizer.beta1", o.beta1.unwrap_or(0.9), 0.0, 1.0 - f64::EPSILON)?,
        beta2: number("optimizer.beta2", o.beta2.unwrap_or(0.999), 0.0, 1.0 - f64::EPSILON)?,
        eps: number("optimizer.eps", o.eps.unwrap_or(1e-8), f64::MIN_POSITIVE, 1.0)?,
        max_grad_norm: number("max_grad_norm", raw.max_grad_norm.unwrap_or(1.0), 0.0, f64::MAX)?,
    })
}

fn scheduler(raw: &RawConfig) -> Result<SchedulerConfig> {
    const WORDS: [(&str, SchedulerKind); 5] = [
        ("constant", SchedulerKind::Constant),
        ("linear", SchedulerKind::Linear),
        ("cosine", SchedulerKind::Cosine),
        ("cosine_with_restarts", SchedulerKind::CosineWithRestarts),
        ("cosine_with_hard_restarts", SchedulerKind::CosineWithRestarts),
    ];
    let s = &raw.scheduler;
    Ok(SchedulerConfig {
        kind: s.scheduler.as_deref().map_or(Ok(SchedulerKind::Constant), |t| word("scheduler.scheduler", t, &WORDS))?,
        warmup_steps: s.warmup_steps.unwrap_or(0),
        min_factor: number("scheduler.min_factor", s.min_factor.unwrap_or(0.0), 0.0, 1.0)?,
        num_cycles: number("scheduler.num_cycles", s.num_cycles.unwrap_or(1.0), 1e-3, 1e6)?,
    })
}

fn checkpoint(raw: &RawConfig) -> Result<CheckpointConfig> {
    let c = &raw.checkpoint;
    let path = once(&[
        ("checkpoint.resume", c.resume.as_ref().map(PathBuf::from)),
        ("checkpoint.resume_state", c.resume_state.clone()),
        ("checkpoint.resume_from", c.resume_from.clone()),
        ("checkpoint.resume_checkpoint", c.resume_checkpoint.clone()),
        ("resume_state", raw.resume_state.clone()),
        ("resume_from", raw.resume_from.clone()),
        ("resume_checkpoint", raw.resume_checkpoint.clone()),
    ])?;
    let resume = match path {
        None => Resume::Auto,
        Some(p) if p.as_os_str() == "auto" => Resume::Auto,
        Some(p) if p.as_os_str() == "never" => Resume::Never,
        Some(p) if p.as_os_str().is_empty() => {
            return Err(Error::config("the checkpoint to resume from is an empty path").expected("auto, never or a file"));
        }
        Some(p) => Resume::Path(p),
    };
    let here = once(&[("checkpoint.save_every", c.save_every), ("checkpoint.save_every_n_steps", c.save_every_n_steps)])?;
    let root = once(&[("save_every", raw.save_every), ("save_every_n_steps", raw.save_every_n_steps)])?;
    let save_every = agree(&[("checkpoint.save_every", here), ("save_every", root)])?.unwrap_or(0);
    Ok(CheckpointConfig { save_every, keep: c.keep.unwrap_or(2), resume })
}
