//! Element types of checkpoints: the same values give the same slab whatever type they are stored in.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod slab_common;

use std::path::Path;

use safetensors::Dtype;
use serenity_loader::slab_tool::build::{self, BuildOptions};
use serenity_loader::slab_tool::info::info;
use serenity_protocol::geometry::TransformerGeometry;
use serenity_protocol::slab::Slab;
use slab_common::models::{Stored, Tensors, geometry, scattered, tensors, to_bfl, write_file, write_folder};
use slab_common::process;

const FILES: [&str; 3] = ["slab.safetensors", "slab.manifest.json", "slab.other.safetensors"];

fn small() -> TransformerGeometry {
    geometry(1, 1, 2, 16, 16, 48)
}

/// Builds and returns the three files' bytes.
fn built(model: &Path) -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    build::build(&BuildOptions::new(model.to_str().unwrap(), folder.path().join("slab")), &process()).unwrap();
    FILES.iter().map(|f| std::fs::read(folder.path().join(f)).unwrap()).collect()
}

fn refused(model: &Path) -> String {
    let folder = tempfile::tempdir().unwrap();
    let error = build::build(&BuildOptions::new(model.to_str().unwrap(), folder.path().join("slab")), &process()).unwrap_err();
    assert_eq!(error.exit_code(), 65, "{error}");
    error.to_string()
}

fn float32(values: &[f32], shape: &[usize]) -> Stored {
    Stored { dtype: Dtype::F32, shape: shape.to_vec(), bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect() }
}

#[test]
fn float32_float16_and_bfloat16_give_the_same_slab() {
    let g = small();
    let folder = tempfile::tempdir().unwrap();
    // Seven bits and a sign: exact in all three types.
    let value = |i: u64| (scattered(i, 255) as f32 - 127.0) / 64.0;
    let of = |dtype: Dtype| {
        let mut seed = 0;
        tensors(&g, |_, shape| {
            seed += 1;
            let values = (0..shape.iter().product::<usize>() as u64).map(|i| value(i + (seed << 32)));
            let bytes = match dtype {
                Dtype::F32 => values.flat_map(|v| v.to_le_bytes()).collect(),
                Dtype::F16 => values.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect(),
                _ => values.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
            };
            Stored { dtype, shape: shape.to_vec(), bytes }
        })
    };
    let model = |name: &str, dtype| built(&write_folder(&folder.path().join(name), &g, &of(dtype)));
    let reference = model("f32", Dtype::F32);
    assert!(model("f16", Dtype::F16) == reference);
    assert!(model("bf16", Dtype::BF16) == reference);
    // The companion of values that bfloat16 holds exactly is a copy of them.
    assert!(reference[2].len() > 1000);
}

/// By the definition of E4M3, not by a table.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = if exponent == 0 { mantissa / 8.0 * 2f32.powi(-6) } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

#[derive(Clone, Copy, PartialEq)]
enum Scales {
    None,
    PerTensor(&'static str, &'static [usize]),
    PerRow(&'static str, bool),
}

/// An 8-bit checkpoint (matrices as E4M3, norms as bfloat16) and the float32 one with the same values.
fn fp8_pair(g: &TransformerGeometry, scales: Scales) -> (Tensors, Tensors) {
    let (mut coded, mut plain) = (Tensors::new(), Tensors::new());
    for (seed, (name, shape)) in (1u64..).zip(g.all_tensors()) {
        let count: usize = shape.iter().product();
        let [rows, columns] = *shape.as_slice() else {
            let values: Vec<f32> = (0..count).map(|i| 1.0 + i as f32 / 64.0).collect();
            let bytes = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
            coded.insert(name.clone(), Stored { dtype: Dtype::BF16, shape: shape.clone(), bytes });
            plain.insert(name, float32(&values, &shape));
            continue;
        };
        let codes: Vec<u8> =
            (0..count as u64).map(|i| scattered(i + (seed << 32), 256) as u8).map(|c| if c & 0x7f == 0x7f { 0 } else { c }).collect();
        let scale_of = |row: usize| 1e-3 * (1.0 + scattered(seed + row as u64, 97) as f32);
        let module = name.strip_suffix(".weight").unwrap();
        let factor: Vec<f32> = match scales {
            Scales::None => vec![1.0; rows],
            Scales::PerTensor(..) => {
                // q, k and v of a fused tensor share one scale.
                let fused = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"].iter().any(|e| module.ends_with(e));
                vec![if fused { 0.0625 } else { scale_of(0) }; rows]
            }
            Scales::PerRow(..) => (0..rows).map(scale_of).collect(),
        };
        match scales {
            Scales::None => {}
            Scales::PerTensor(ending, shape) => drop(coded.insert(format!("{module}.{ending}"), float32(&factor[..1], shape))),
            Scales::PerRow(ending, column) => {
                let shape = if column { vec![rows, 1] } else { vec![rows] };
                coded.insert(format!("{module}.{ending}"), float32(&factor, &shape));
            }
        }
        let values: Vec<f32> = codes.iter().enumerate().map(|(i, &c)| e4m3(c) * factor[i / columns]).collect();
        coded.insert(name.clone(), Stored { dtype: Dtype::F8_E4M3, shape: shape.clone(), bytes: codes });
        plain.insert(name, float32(&values, &shape));
    }
    (coded, plain)
}

#[test]
fn eight_bit_sources_give_the_slab_of_their_float32_values() {
    let g = small();
    let folder = tempfile::tempdir().unwrap();
    for (i, scales) in [
        Scales::None,
        Scales::PerTensor("scale_weight", &[1]),
        Scales::PerTensor("weight_scale", &[]),
        Scales::PerRow("weight_scale", false),
        Scales::PerRow("scale_weight", true),
    ]
    .into_iter()
    .enumerate()
    {
        let (mut coded, plain) = fp8_pair(&g, scales);
        let at = |name: &str| folder.path().join(format!("{i}-{name}"));
        let reference = built(&write_folder(&at("plain"), &g, &plain));
        assert!(built(&write_folder(&at("diffusers"), &g, &coded)) == reference, "case {i}");
        // Activation scales and markers, which say nothing about weights.
        let bfl = at("bfl.safetensors");
        let mut single = to_bfl(&coded);
        if scales != Scales::None {
            single.insert("scaled_fp8".into(), Stored { dtype: Dtype::F8_E4M3, shape: vec![2], bytes: vec![0, 0] });
            single.insert("double_blocks.0.img_attn.qkv.input_scale".into(), float32(&[3.0], &[]));
        }
        write_file(&bfl, &single);
        assert!(built(&bfl) == reference, "case {i}, single file");
        coded.insert("proj_out.weight".into(), Stored { dtype: Dtype::F8_E4M3, shape: vec![16, 32], bytes: vec![0x7f; 512] });
        assert!(refused(&write_folder(&at("nan"), &g, &coded)).contains("'proj_out.weight' holds a value that is no number"));
    }
}

#[test]
fn the_distance_from_an_eight_bit_original_includes_its_scales() {
    let g = small();
    let folder = tempfile::tempdir().unwrap();
    let model = write_folder(&folder.path().join("m"), &g, &fp8_pair(&g, Scales::PerRow("weight_scale", false)).0);
    let model = model.to_str().unwrap();
    let files = build::build(&BuildOptions::new(model, folder.path().join("slab")), &process()).unwrap().files;
    let report = info(&Slab::open(&files.slab, &files.manifest).unwrap(), Some(model), &process()).unwrap();
    assert!(report.layers.iter().all(|l| l.error.is_some_and(|e| e.cosine > 0.999 && e.relative_l2 < 0.05)));
}

#[test]
fn impossible_scales_are_refused_by_name() {
    let g = small();
    let folder = tempfile::tempdir().unwrap();
    let key = "transformer_blocks.0.ff.linear_in.weight_scale";
    let attempt = |change: &dyn Fn(&mut Tensors)| {
        let (mut coded, _) = fp8_pair(&g, Scales::PerRow("weight_scale", false));
        change(&mut coded);
        let message = refused(&write_folder(&folder.path().join("m"), &g, &coded));
        assert!(message.contains("transformer_blocks.0.ff.linear_in"), "{message}");
        message
    };
    assert!(attempt(&|t| drop(t.remove(key))).contains("has no scale, although others"));
    assert!(
        attempt(&|t| drop(t.insert(key.replace("weight_scale", "scale_weight"), float32(&[1.0], &[])))).contains("more than one scale")
    );
    assert!(attempt(&|t| drop(t.insert(key.into(), float32(&[1.0; 4], &[2, 2])))).contains("shape that is not supported"));
    assert!(attempt(&|t| drop(t.insert(key.into(), float32(&[f32::NAN], &[])))).contains("impossible"));
    assert!(attempt(&|t| drop(t.insert(key.into(), float32(&[-1.0], &[])))).contains("impossible"));
    let integer = Stored { dtype: Dtype::I32, shape: vec![], bytes: vec![1, 0, 0, 0] };
    assert!(attempt(&|t| drop(t.insert(key.into(), integer.clone()))).contains("unsupported type"));
}
