//! Models of random weights, in the Hugging Face layout that the reference loads, or as a slab only.
//!
//! They let everything be tested without the gated weights: `tiny` by everyone, the full sizes on machines that have the room. The same
//! preset and seed give the same bytes anywhere. `model_index.json` is written last: a folder that has it is whole.

mod component;
mod preset;
mod random;
mod slab_only;
mod text_encoder;
mod transformer;
mod vae;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result, atomic_file};

use super::progress::Progress;
pub use super::units::Division;
use super::writer::check_free_space;
use component::{Spec, write_component, write_json};
pub use preset::Preset;
pub use random::Stream;
pub use slab_only::{synth_slab, synth_slab_with};

/// Version of the reference whose files these imitate.
const DIFFUSERS_VERSION: &str = "0.42.1";
const TRANSFORMERS_VERSION: &str = "5.23.0";
/// Largest shard, as the hub's tools cut them.
const SHARD_BYTES: u64 = 10_000_000_000;
/// Largest shard of the tiny text encoder: small enough that there are several.
const TINY_TEXT_SHARD_BYTES: u64 = 300_000;
/// A byte-level BPE of 512 tokens with the special tokens at the ids of the real vocabulary.
const TOKENIZER: &[u8] = include_bytes!("../../../data/tokenizer/tokenizer.json");
const TOKENIZER_CONFIG: &[u8] = include_bytes!("../../../data/tokenizer/tokenizer_config.json");

/// What to make.
#[derive(Debug, Clone)]
pub struct SynthOptions {
    /// Which model.
    pub preset: Preset,
    /// Folder.
    pub output: PathBuf,
    /// Seed of the weights.
    pub seed: u64,
}

/// Makes a checkpoint; returns its folder's bytes of tensors.
///
/// # Errors
/// [`Error::TryAgain`] for a full disk or an interruption.
pub fn synth(options: &SynthOptions, process: &Process) -> Result<u64> {
    let (preset, root) = (options.preset, options.output.as_path());
    let geometry = preset.transformer();
    let text = preset.text();
    let transformer = transformer::specs(&geometry);
    let text_specs = text.as_ref().map(text_encoder::specs).unwrap_or_default();
    let vae = vae::specs(&preset.vae());
    let total = [&transformer, &text_specs, &vae].iter().flat_map(|s| s.iter()).map(Spec::bytes).sum();
    std::fs::create_dir_all(root).map_err(|e| Error::io("cannot create the output folder", root, e))?;
    check_free_space(root, total)?;
    let index = root.join("model_index.json");
    match std::fs::remove_file(&index) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("cannot replace the old model", &index, e)),
        _ => {}
    }
    let mut progress = Progress::new(process, "synth", total);
    let mut component = |name: &str, stem: &str, specs: &[Spec], shard, config: &Value| {
        let folder = root.join(name);
        // Shards of an earlier, differently cut model would be found beside the new ones.
        clear(&folder)?;
        write_component(&folder, stem, specs, shard, options.seed, &mut progress)?;
        write_json(&folder.join("config.json"), config)
    };
    component("transformer", "diffusion_pytorch_model", &transformer, SHARD_BYTES, &transformer::config(&geometry))?;
    component("vae", "diffusion_pytorch_model", &vae, SHARD_BYTES, &vae::config(&preset.vae()))?;
    if let Some(text) = &text {
        let shard = if preset == Preset::Tiny { TINY_TEXT_SHARD_BYTES } else { SHARD_BYTES };
        component("text_encoder", "model", &text_specs, shard, &text_encoder::config(text))?;
        atomic_file::write(&root.join("tokenizer/tokenizer.json"), TOKENIZER)?;
        atomic_file::write(&root.join("tokenizer/tokenizer_config.json"), TOKENIZER_CONFIG)?;
    } else {
        tracing::info!("klein's text encoder is of another architecture and is left out");
    }
    write_json(&root.join("scheduler/scheduler_config.json"), &scheduler_config())?;
    write_json(&index, &model_index(text.is_some()))?;
    Ok(total)
}

/// Removes the safetensors files and indexes of a component folder.
fn clear(folder: &Path) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(()) };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") {
            std::fs::remove_file(entry.path()).map_err(|e| Error::io("cannot replace the old model", entry.path(), e))?;
        }
    }
    Ok(())
}

fn scheduler_config() -> Value {
    json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "invert_sigmas": false,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "shift_terminal": null,
        "stochastic_sampling": false,
        "time_shift_type": "exponential",
        "use_beta_sigmas": false,
        "use_dynamic_shifting": true,
        "use_exponential_sigmas": false,
        "use_karras_sigmas": false
    })
}

fn model_index(with_text: bool) -> Value {
    let mut index = json!({
        "_class_name": "Flux2Pipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"]
    });
    if with_text && let Some(map) = index.as_object_mut() {
        map.insert("text_encoder".into(), json!(["transformers", "Mistral3ForConditionalGeneration"]));
        map.insert("tokenizer".into(), json!(["transformers", "PreTrainedTokenizerFast"]));
    }
    index
}
