//! The trained LoRA as a file: safetensors in the naming of diffusers and PEFT.
//!
//! Keys are `transformer.<linear>.lora_A.weight` `[r, in]` and `.lora_B.weight` `[out, r]`, float32. There is no alpha tensor: diffusers
//! takes alpha from `lora_adapter_metadata`, a JSON text with every key prefixed `transformer.`, and assumes alpha = r where that is
//! missing. The metadata holds only fields that PEFT's `LoraConfig` has had for years, because an older version refuses a file with a
//! field that it does not know. The bytes are a function of the adapters alone: the header is sorted, with no time or path in it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use serenity_protocol::checkpoint::Checkpoint;
use serenity_protocol::{Error, Result, atomic_file};

use crate::model::{Adapter, AdapterSet, tensor_error};
use crate::optimizer::host;

/// Prefix of every key: the component of the pipeline.
const COMPONENT: &str = "transformer.";
const METADATA_KEY: &str = "lora_adapter_metadata";
/// Longest safetensors header that is read, as in the reference implementation.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// Writes `adapters` to `path`, whole or not at all. `extra` goes into the file's metadata beside ours.
///
/// # Errors
/// As [`atomic_file::write`].
pub fn write(path: &Path, adapters: &AdapterSet, extra: &BTreeMap<String, String>) -> Result<()> {
    let mut metadata = extra.clone();
    metadata.insert("format".into(), "pt".into());
    metadata.insert(METADATA_KEY.into(), adapter_metadata(adapters)?);
    let mut tensors = Vec::new();
    for adapter in &adapters.adapters {
        for (part, tensor) in [("lora_A", &adapter.a), ("lora_B", &adapter.b)] {
            tensors.push((format!("{COMPONENT}{}.{part}.weight", adapter.name), tensor.clone()));
        }
    }
    atomic_file::write(path, &safetensors_bytes(&metadata, &tensors)?)
}

/// Reads a file that `write` or diffusers wrote. Without metadata alpha is the rank, as diffusers takes it.
///
/// # Errors
/// [`Error::Data`] for other namings, halves of a pair, or ranks that differ between linears.
pub fn read(path: &Path, device: &Device) -> Result<AdapterSet> {
    let file = Checkpoint::open(path)?;
    let mut adapters = Vec::new();
    for key in file.names() {
        let linear = key.strip_prefix(COMPONENT).and_then(|k| k.strip_suffix(".lora_A.weight"));
        let Some(linear) = linear else {
            if key.starts_with(COMPONENT) && key.ends_with(".lora_B.weight") {
                continue;
            }
            return Err(Error::data("the LoRA file has a key that is not in the diffusers naming")
                .at(path)
                .expected("transformer.<linear>.lora_A.weight and .lora_B.weight")
                .found(key));
        };
        let load = |part: &str| -> Result<Tensor> {
            let found = file.tensor(&format!("{COMPONENT}{linear}.{part}.weight"))?;
            Tensor::from_vec(found.to_f32()?, found.shape.as_slice(), device)
                .map_err(|e| tensor_error(&format!("cannot place the adapter of '{linear}'"), e))
        };
        adapters.push(Adapter { name: linear.to_string(), a: load("lora_A")?, b: load("lora_B")? });
    }
    if file.names().count() != 2 * adapters.len() {
        return Err(Error::data("the LoRA file has a lora_B without its lora_A").at(path));
    }
    let rank = adapters.first().and_then(|a| a.a.dim(0).ok()).ok_or_else(|| Error::data("the LoRA file has no adapters").at(path))?;
    let alpha = match metadata_of(path)?.get(METADATA_KEY) {
        None => rank as f64,
        Some(text) => {
            let fields: Value =
                serde_json::from_str(text).map_err(|e| Error::data("the LoRA file's metadata is malformed").at(path).cause(e))?;
            fields.get(format!("{COMPONENT}lora_alpha")).and_then(Value::as_f64).unwrap_or(rank as f64)
        }
    };
    AdapterSet::new(rank, alpha, adapters).map_err(|e| e.at(path))
}

/// The `__metadata__` of a safetensors file; empty where there is none.
///
/// # Errors
/// [`Error::Data`] if the header is malformed.
pub fn metadata_of(path: &Path) -> Result<BTreeMap<String, String>> {
    let io = |e| Error::io("cannot read the safetensors header", path, e);
    let mut file = std::fs::File::open(path).map_err(io)?;
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(io)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX {
        return Err(Error::data("the safetensors header is too long")
            .at(path)
            .expected(format!("at most {HEADER_BYTES_MAX} bytes"))
            .found(length));
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header).map_err(io)?;
    let malformed = |e: serde_json::Error| Error::data("the safetensors header is malformed").at(path).cause(e);
    let header: Value = serde_json::from_slice(&header).map_err(malformed)?;
    match header.get("__metadata__") {
        None => Ok(BTreeMap::new()),
        Some(found) => serde_json::from_value(found.clone()).map_err(malformed),
    }
}

/// A safetensors file of float32 tensors, byte for byte determined by its content: keys sorted, header padded to 8 bytes with spaces.
///
/// # Errors
/// [`Error::Invariant`] if a tensor is not float32 or a name comes twice.
pub fn safetensors_bytes(metadata: &BTreeMap<String, String>, tensors: &[(String, Tensor)]) -> Result<Vec<u8>> {
    let mut sorted: Vec<&(String, Tensor)> = tensors.iter().collect();
    sorted.sort_by(|x, y| x.0.cmp(&y.0));
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut end = 0;
    for (name, tensor) in &sorted {
        let start = end;
        end += 4 * tensor.elem_count();
        let entry = json!({"dtype": "F32", "shape": tensor.dims(), "data_offsets": [start, end]});
        if header.insert(name.clone(), entry).is_some() {
            return Err(Error::invariant("a tensor name comes twice in one file").found(name));
        }
    }
    let mut text = serde_json::to_vec(&header).map_err(|e| Error::invariant("cannot write a safetensors header").cause(e))?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = Vec::with_capacity(8 + text.len() + end);
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text);
    for (name, tensor) in sorted {
        let values = host(tensor).map_err(|e| tensor_error(&format!("cannot read '{name}' back"), e))?;
        values.iter().for_each(|v| bytes.extend(v.to_le_bytes()));
    }
    Ok(bytes)
}

/// PEFT's `LoraConfig` as diffusers writes it. Every adapted linear is named in full: a short target such as `to_out` would also match
/// linears that have no adapter.
fn adapter_metadata(adapters: &AdapterSet) -> Result<String> {
    let alpha =
        if adapters.alpha.fract() == 0.0 && adapters.alpha.abs() < 1e15 { json!(adapters.alpha as i64) } else { json!(adapters.alpha) };
    let targets: Vec<&str> = adapters.adapters.iter().map(|a| a.name.as_str()).collect();
    let fields = BTreeMap::from([
        ("alpha_pattern", json!({})),
        ("base_model_name_or_path", Value::Null),
        ("bias", json!("none")),
        ("fan_in_fan_out", json!(false)),
        ("inference_mode", json!(false)),
        ("init_lora_weights", json!(true)),
        ("layers_pattern", Value::Null),
        ("layers_to_transform", Value::Null),
        ("lora_alpha", alpha),
        ("lora_dropout", json!(0.0)),
        ("modules_to_save", Value::Null),
        ("peft_type", json!("LORA")),
        ("r", json!(adapters.rank)),
        ("rank_pattern", json!({})),
        ("revision", Value::Null),
        ("target_modules", json!(targets)),
        ("task_type", Value::Null),
        ("use_dora", json!(false)),
        ("use_rslora", json!(false)),
    ]);
    let prefixed: BTreeMap<String, Value> = fields.into_iter().map(|(k, v)| (format!("{COMPONENT}{k}"), v)).collect();
    serde_json::to_string_pretty(&prefixed).map_err(|e| Error::invariant("cannot write the LoRA metadata").cause(e))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn golden(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/goldens/cases").join(name)
    }

    #[test]
    fn what_diffusers_wrote_is_read_and_written_equal() {
        let reference = golden("lora_diffusers.safetensors");
        let adapters = read(&reference, &Device::Cpu).unwrap();
        assert_eq!((adapters.rank, adapters.alpha), (4, 8.0));
        let folder = tempfile::tempdir().unwrap();
        let ours = folder.path().join("lora.safetensors");
        write(&ours, &adapters, &BTreeMap::new()).unwrap();
        let (a, b) = (Checkpoint::open(&reference).unwrap(), Checkpoint::open(&ours).unwrap());
        assert_eq!(a.names().collect::<Vec<_>>(), b.names().collect::<Vec<_>>());
        for name in a.names() {
            let (x, y) = (a.tensor(name).unwrap(), b.tensor(name).unwrap());
            assert_eq!((x.shape.clone(), x.bytes()), (y.shape.clone(), y.bytes()), "{name}");
        }
        // Every metadata field of ours means the same in theirs; the target list may name the same linears in another way.
        let fields = |p: &Path| serde_json::from_str::<BTreeMap<String, Value>>(&metadata_of(p).unwrap()[METADATA_KEY]).unwrap();
        let (theirs, ours) = (fields(&reference), fields(&ours));
        for (key, value) in &ours {
            if !key.ends_with("target_modules") && !key.ends_with("init_lora_weights") {
                assert_eq!(theirs.get(key), Some(value), "{key}");
            }
        }
    }

    #[test]
    fn bytes_depend_on_content_alone_and_survive_a_round_trip() {
        let adapters = read(&golden("lora_diffusers.safetensors"), &Device::Cpu).unwrap();
        let half = AdapterSet::new(4, 0.5, adapters.adapters.into_iter().rev().collect()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = |n: &str| folder.path().join(n);
        let extra = BTreeMap::from([("serenity_step".to_string(), "7".to_string())]);
        write(&path("a"), &half, &extra).unwrap();
        std::fs::rename(path("a"), path("a.safetensors")).unwrap();
        let again = read(&path("a.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(again.alpha, 0.5);
        write(&path("b.safetensors"), &again, &extra).unwrap();
        assert_eq!(std::fs::read(path("a.safetensors")).unwrap(), std::fs::read(path("b.safetensors")).unwrap());
        assert_eq!(metadata_of(&path("b.safetensors")).unwrap()["serenity_step"], "7");
    }

    #[test]
    fn other_namings_and_halves_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let tensor = Tensor::ones((2, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        for keys in [
            vec!["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"],
            vec!["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"],
            vec!["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"],
        ] {
            let tensors: Vec<_> = keys.iter().map(|k| ((*k).to_string(), tensor.clone())).collect();
            std::fs::write(&path, safetensors_bytes(&BTreeMap::new(), &tensors).unwrap()).unwrap();
            assert_eq!(read(&path, &Device::Cpu).unwrap_err().exit_code(), 65, "{keys:?}");
        }
    }
}
