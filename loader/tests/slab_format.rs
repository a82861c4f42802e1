//! The original builder's slab opens, its layouts hold, and its gates (and those it lacks) refuse what they should.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod slab_common;

use serde_json::json;
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::model_path::{TransformerSource, resolve_path};
use serenity_protocol::slab::Slab;
use serenity_protocol::slab::layout::{PartKind, PayloadForm, SlabLayout};
use slab_common::{RawSlab, golden, golden_slab_paths, refusal};

fn golden_slab() -> Slab {
    let (slab, manifest) = golden_slab_paths();
    Slab::open(&slab, &manifest).unwrap()
}

fn golden_geometry() -> TransformerGeometry {
    TransformerGeometry::from_config_file(&golden("model/transformer/config.json")).unwrap()
}

#[test]
fn the_original_slab_opens_and_is_of_its_model() {
    let slab = golden_slab();
    assert_eq!(slab.layers().len(), 41);
    assert_eq!(slab.model_signature(), "951b0983476ccc57");
    slab.check_model(&golden_geometry()).unwrap();
    assert!(slab.pages().is_none() && slab.companion().is_none());
    let layer = slab.layer("transformer_blocks.1.ff.net.0.proj.base_layer").unwrap();
    assert_eq!((layer.name.as_str(), layer.out_features, layer.in_features), ("transformer_blocks.1.ff.linear_in", 384, 64));
    let mut other = golden_geometry();
    other.num_layers = 3;
    let refused = slab.check_model(&other).unwrap_err();
    assert_eq!(refused.exit_code(), 65);
    assert!(refused.to_string().contains("transformer_blocks.2.attn.to_q"), "{refused}");
}

#[test]
fn layouts_cover_every_block_linear_without_overlap() {
    let (slab, geometry) = (golden_slab(), golden_geometry());
    for form in [PayloadForm::Bf16, PayloadForm::Int8] {
        for chunk_bytes in [256, 4096, 1 << 20] {
            let layout = SlabLayout::new(&slab, &geometry, form, chunk_bytes).unwrap();
            assert_eq!(layout.blocks.len(), geometry.num_blocks());
            for block in geometry.blocks() {
                let laid_out = layout.block(block).unwrap();
                let linears = geometry.block_linears(block);
                let weights: Vec<_> = laid_out.parts.iter().filter(|p| p.kind != PartKind::Scales).collect();
                assert_eq!(weights.iter().map(|p| &p.linear).collect::<Vec<_>>(), linears.iter().map(|l| &l.name).collect::<Vec<_>>());
                let mut end = 0;
                for part in &laid_out.parts {
                    assert!(part.offset >= end && part.offset - end < 256 && part.offset % 256 == 0);
                    let rows = part.out_features as u64;
                    let expected = match part.kind {
                        PartKind::Bf16Rows => rows * part.in_features as u64 * 2,
                        PartKind::Int8Rows => rows * part.padded_in as u64,
                        PartKind::Scales => rows * 4,
                    };
                    assert_eq!(part.bytes, expected);
                    end = part.offset + part.bytes;
                }
                assert!(laid_out.bytes >= end && laid_out.bytes - end < 256);
                let chunks = layout.chunks_of(block);
                let covered: u64 = (0..chunks).map(|c| laid_out.chunk_range(c, chunk_bytes)).map(|r| r.end - r.start).sum();
                assert_eq!(covered, laid_out.bytes);
                assert!(laid_out.chunk_range(chunks, chunk_bytes).is_empty());
            }
            assert!(layout.block(BlockId(5)).is_err());
        }
        assert!(SlabLayout::new(&slab, &geometry, form, 100).is_err());
    }
}

#[test]
fn both_namings_give_the_same_tensors_and_geometry() {
    let folder = TransformerSource::open(&resolve_path(golden("model").to_str().unwrap()).unwrap()).unwrap();
    let single = TransformerSource::open(&resolve_path(golden("model/flux2-bfl.safetensors").to_str().unwrap()).unwrap()).unwrap();
    assert_eq!(folder.geometry(), single.geometry());
    assert_eq!(folder.names(), single.names());
    for (name, shape) in folder.geometry().all_tensors() {
        let (a, b) = (folder.tensor_f32(&name, &shape).unwrap(), single.tensor_f32(&name, &shape).unwrap());
        assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}");
        assert_eq!(a.len(), shape.iter().product::<usize>());
    }
    assert!(folder.tensor_f32("proj_out.weight", &[1, 1]).is_err());
    assert!(folder.tensor_f32("nothing.weight", &[1, 1]).is_err());
}

/// A change that makes a slab bad, and what the refusal must say.
type Spoil = (&'static str, fn(&mut RawSlab));

/// Layer 0 is `context_embedder`, [64, 240] padded to 256.
const GATES: &[Spoil] = &[
    ("kernel ABI", |s| s.manifest["kernel_abi_version"] = json!(2)),
    ("quant_version", |s| s.manifest["quant_version"] = json!("squareq_bp8_v3")),
    ("quant_bits is 16", |s| s.layer(0)["quant_bits"] = json!(16)),
    ("4-bit", |s| s.layer(0)["quant_bits"] = json!(4)),
    ("quant_scheme", |s| s.layer(0)["quant_scheme"] = json!("per_tensor")),
    ("quant_axis", |s| s.layer(0)["quant_axis"] = json!(1)),
    ("dtype_qweight", |s| s.layer(0)["dtype_qweight"] = json!("uint8")),
    ("dtype_scale", |s| s.layer(0)["dtype_scale"] = json!("float16")),
    ("dtype_zero_point", |s| s.layer(0)["dtype_zero_point"] = json!("int8")),
    ("'context_embedder.qweight' is not in the file", |s| s.tensor("context_embedder.qweight").name = "other".into()),
    ("'context_embedder.scale' is not in the file", |s| s.tensor("context_embedder.scale").name = "other".into()),
    ("'context_embedder.zero_point' is not in the file", |s| s.tensor("context_embedder.zero_point").name = "other".into()),
    ("'context_embedder.bias' is not in the file", |s| s.layer(0)["bias_key"] = json!("context_embedder.bias")),
    ("U8, expected I8", |s| s.tensor("context_embedder.qweight").dtype = "U8".into()),
    ("I32, expected F32", |s| s.tensor("context_embedder.scale").dtype = "I32".into()),
    ("I32, expected F32", |s| s.tensor("context_embedder.zero_point").dtype = "I32".into()),
    ("has shape [256, 64]", |s| s.tensor("context_embedder.qweight").shape = vec![256, 64]),
    ("has shape [32, 2]", |s| s.tensor("context_embedder.scale").shape = vec![32, 2]),
    ("has shape [63]", |s| {
        let scale = s.tensor("context_embedder.scale");
        scale.shape = vec![63];
        scale.bytes.truncate(63 * 4);
    }),
    ("has shape [63]", |s| {
        let zero_point = s.tensor("context_embedder.zero_point");
        zero_point.shape = vec![63];
        zero_point.bytes.truncate(63 * 4);
    }),
    ("scale of row 3 is NaN", |s| s.tensor("context_embedder.scale").bytes[12..16].copy_from_slice(&f32::NAN.to_le_bytes())),
    ("scale of row 3 is inf", |s| s.tensor("context_embedder.scale").bytes[12..16].copy_from_slice(&f32::INFINITY.to_le_bytes())),
    ("scale of row 3 is -1", |s| s.tensor("context_embedder.scale").bytes[12..16].copy_from_slice(&(-1f32).to_le_bytes())),
    ("scale of row 0 is 0", |s| s.tensor("context_embedder.scale").bytes.fill(0)),
    ("zero point of row 1 is NaN", |s| s.tensor("context_embedder.zero_point").bytes[4..8].copy_from_slice(&f32::NAN.to_le_bytes())),
    ("zero point of row 1 is 2", |s| s.tensor("context_embedder.zero_point").bytes[4..8].copy_from_slice(&2f32.to_le_bytes())),
    ("layer_count", |s| s.manifest["layer_count"] = json!(40)),
    ("total_qweight_bytes", |s| s.manifest["total_qweight_bytes"] = json!(1)),
    ("packed_shape", |s| s.layer(0)["pad_k"] = json!(128 + 1)),
    ("packed_shape", |s| s.layer(0)["packed_shape"] = json!([64, 320])),
    ("packed_shape", |s| s.layer(0)["orig_shape"] = json!([65, 240])),
    ("orig_shape [0, 240] is empty", |s| s.layer(0)["orig_shape"] = json!([0, 240])),
    ("listed twice", |s| s.layer(1)["canonical_name"] = json!("context_embedder")),
    ("are both 'context_embedder'", |s| s.layer(1)["canonical_name"] = json!("context_embedder.base_layer")),
    ("belongs to layer", |s| s.layer(1)["scale_key"] = json!("context_embedder.scale")),
    ("no layers", |s| {
        s.manifest["layers"] = json!([]);
        s.manifest["layer_count"] = json!(0);
        s.manifest["total_qweight_bytes"] = json!(0);
    }),
    ("lacks a field", |s| {
        s.layer(0).remove("qweight_key");
    }),
    ("lacks a field", |s| s.layer(0)["orig_shape"] = json!([64, -1])),
    ("lacks a field", |s| s.layer(0)["orig_shape"] = json!([64, 240, 1])),
    ("lacks a field", |s| s.manifest["layers"] = json!({"a": 1})),
    ("no JSON object", |s| s.manifest = json!([1, 2])),
    ("packed_shape", |s| {
        s.layer(0)["orig_shape"] = json!([u64::MAX, u64::MAX]);
        s.layer(0)["packed_shape"] = json!([u64::MAX, u64::MAX]);
    }),
];

#[test]
fn every_gate_refuses_by_name() {
    for (expected, spoil) in GATES {
        let mut slab = RawSlab::golden();
        spoil(&mut slab);
        let message = slab.refusal();
        assert!(message.contains(expected), "expected '{expected}' in: {message}");
    }
}

#[test]
fn all_problems_are_reported_together() {
    let mut slab = RawSlab::golden();
    slab.layer(0)["quant_bits"] = json!(3);
    slab.tensor("proj_out.scale").name = "x".into();
    slab.manifest["layer_count"] = json!(1);
    let message = slab.refusal();
    for expected in ["quant_bits is 3", "'proj_out.scale' is not in the file", "layer_count"] {
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_bias_is_checked_and_then_accepted_but_not_by_this_model() {
    let with_bias = |values: &[f32], shape: Vec<u64>| {
        let mut slab = RawSlab::golden();
        slab.layer(0)["bias_key"] = json!("context_embedder.bias");
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        slab.tensors.push(slab_common::RawTensor { name: "context_embedder.bias".into(), dtype: "F32".into(), shape, bytes });
        slab
    };
    assert!(with_bias(&[0.5; 63], vec![63]).refusal().contains("has shape [63]"));
    let mut infinite = [0.5; 64];
    infinite[9] = f32::INFINITY;
    assert!(with_bias(&infinite, vec![64]).refusal().contains("bias of row 9"));
    let folder = tempfile::tempdir().unwrap();
    let (slab, manifest) = with_bias(&[0.5; 64], vec![64]).write(folder.path());
    let slab = Slab::open(&slab, &manifest).unwrap();
    assert!(slab.layer("context_embedder").unwrap().bias.is_some());
    // Only block linears matter to a model.
    slab.check_model(&golden_geometry()).unwrap();
}

#[test]
fn another_models_signature_is_refused() {
    let mut slab = RawSlab::golden();
    slab.manifest["model_signature"] = json!("0123456789abcdef");
    let folder = tempfile::tempdir().unwrap();
    let (slab, manifest) = slab.write(folder.path());
    let refused = Slab::open(&slab, &manifest).unwrap().check_model(&golden_geometry()).unwrap_err();
    assert_eq!(refused.exit_code(), 65);
    assert!(refused.to_string().contains("0123456789abcdef") && refused.to_string().contains("951b0983476ccc57"), "{refused}");
}

#[test]
fn the_signature_names_manifest_header_and_length() {
    let folder = tempfile::tempdir().unwrap();
    let mut raw = RawSlab::golden();
    let (slab, manifest) = raw.write(folder.path());
    let first = Slab::open(&slab, &manifest).unwrap().signature();
    raw.manifest["architecture_id"] = json!("other");
    let (slab, manifest) = raw.write(folder.path());
    assert_ne!(first, Slab::open(&slab, &manifest).unwrap().signature());
    assert_eq!(golden_slab().signature(), golden_slab().signature());
}

/// Headers that no honest writer makes: each is refused, none panics.
#[test]
fn hostile_headers_are_refused() {
    let raw = RawSlab::golden();
    let good = serde_json::to_string(&raw.header()).unwrap();
    let first = r#""context_embedder.scale":{"dtype":"F32","shape":[64],"data_offsets":[0,256]}"#;
    assert!(good.contains(first), "the golden slab's first tensor");
    let swap = |with: &str| good.replacen(first, with, 1);
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        swap(&format!(r#""context_embedder.scale":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}"#))
    };
    let deep = "[".repeat(100_000);
    let headers: Vec<(String, &str)> = vec![
        (String::new(), "does not start with"),
        ("x".into(), "does not start with"),
        (format!(" {good}"), "does not start with"),
        ("[]".into(), "does not start with"),
        ("{".into(), "malformed"),
        (format!("{good}x"), "malformed"),
        (format!("{{\"a\":{deep}"), "malformed"),
        (swap(&format!("{first},{first}")), "duplicate key"),
        (swap(&format!(r#""__metadata__":{{"a":"1","a":"2"}},{first}"#)), "duplicate key"),
        (swap(&format!(r#""__metadata__":{{"a":1}},{first}"#)), "__metadata__"),
        (swap(&format!(r#""__metadata__":[],{first}"#)), "__metadata__"),
        (swap(&format!(r#""a":{{"dtype":"F32","shape":[],"data_offsets":[0,4]}},{first}"#)), "overlaps"),
        (entry("\"F32\"", "[64]", "[4,260]"), "gap"),
        (entry("\"F32\"", "[64]", "[0,252]"), "does not fit its type"),
        (entry("\"F32\"", "[64]", "[256,0]"), "does not fit its type"),
        (entry("\"F32\"", "[64]", "[0,18446744073709551615]"), ""),
        (entry("\"F32\"", "[64]", "[18446744073709551615,18446744073709551615]"), ""),
        (entry("\"F32\"", "[18446744073709551615,18446744073709551615]", "[0,256]"), "overflows"),
        (entry("\"F32\"", "[4611686018427387904]", "[0,256]"), ""),
        (entry("\"F32\"", "[-64]", "[0,256]"), "malformed"),
        (entry("\"F32\"", "[6.4e1]", "[0,256]"), "malformed"),
        (entry("\"F32\"", "[1e400]", "[0,256]"), "malformed"),
        (entry("\"F32\"", "\"64\"", "[0,256]"), "malformed"),
        (entry("\"F32\"", "[64]", "[0,256,512]"), "malformed"),
        (entry("\"F32\"", "[64]", "[0]"), "malformed"),
        (entry("\"F32\"", "[64]", "null"), "malformed"),
        (entry("\"F33\"", "[64]", "[0,256]"), "malformed"),
        (entry("null", "[64]", "[0,256]"), "malformed"),
        (swap(r#""context_embedder.scale":{"dtype":"F32","shape":[64],"data_offsets":[0,256],"more":1}"#), "malformed"),
        (swap(r#""context_embedder.scale":{"dtype":"F32","dtype":"F32","shape":[64],"data_offsets":[0,256]}"#), "duplicate key"),
        (swap(r#""context_embedder.scale":{"dtype":"F32","shape":[64]}"#), "malformed"),
        (swap(r#""context_embedder.scale":7"#), "malformed"),
        (swap(r#""\u0000":{"dtype":"F32","shape":[64],"data_offsets":[0,256]}"#), "is not in the file"),
        (good.replacen("554624]", "554623]", 1), ""),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (header, expected) in headers {
        assert_ne!(header, good);
        let (slab, manifest) = raw.write_with_header(folder.path(), header.as_bytes());
        let message = refusal(&slab, &manifest);
        assert!(message.contains(expected), "expected '{expected}' for {}: {message}", &header[..header.len().min(200)]);
    }
    // A tensor of no bytes is no overlap.
    let empty = swap(&format!(r#""a":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},{first}"#));
    let (slab, manifest) = raw.write_with_header(folder.path(), empty.as_bytes());
    Slab::open(&slab, &manifest).unwrap();
    // Not UTF-8 at all.
    let mut bytes = good.into_bytes();
    bytes[5] = 0xff;
    let (slab, manifest) = raw.write_with_header(folder.path(), &bytes);
    refusal(&slab, &manifest);
}

#[test]
fn impossible_lengths_and_cuts_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (source, manifest) = golden_slab_paths();
    let bytes = std::fs::read(source).unwrap();
    let path = folder.path().join("s.safetensors");
    for length in [0u64, 1, 7, 1 << 20, 1 << 27, 1 << 62, u64::MAX, u64::MAX - 7] {
        let mut changed = bytes.clone();
        changed[..8].copy_from_slice(&length.to_le_bytes());
        std::fs::write(&path, changed).unwrap();
        refusal(&path, &manifest);
    }
    for cut in (0..9).chain([100, 13_000, 13_001, 60_000, bytes.len() - 1]) {
        std::fs::write(&path, &bytes[..cut]).unwrap();
        refusal(&path, &manifest);
    }
    let mut longer = bytes.clone();
    longer.push(0);
    std::fs::write(&path, longer).unwrap();
    assert!(refusal(&path, &manifest).contains("after its last tensor"));
}

#[test]
fn duplicate_keys_in_a_manifest_are_refused() {
    let (slab, manifest) = golden_slab_paths();
    let text = std::fs::read_to_string(manifest).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.json");
    let twice = [
        text.replacen("\"layer_count\": 41,", "\"layer_count\": 41, \"layer_count\": 41,", 1),
        text.replacen("\"pad_k\": 64,", "\"pad_k\": 64, \"pad_k\": 32,", 1),
        text.replacen("\"layer_count\": 41,", "\"layer_count\": 41, \"x\": {\"y\": 1, \"y\": 2},", 1),
    ];
    for changed in twice {
        assert_ne!(changed, text);
        std::fs::write(&path, changed).unwrap();
        assert!(refusal(&slab, &path).contains("duplicate key"));
    }
    let missing = Slab::open(&slab, &folder.path().join("none.json")).unwrap_err();
    assert_eq!(missing.exit_code(), 69);
}
