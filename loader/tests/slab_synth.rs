//! Models of random weights: complete, reproducible, and good enough to build from.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod slab_common;

use std::collections::BTreeMap;
use std::path::Path;

use serenity_loader::slab_tool::plan::{BLOCK_ALIGN, SlabPlan};
use serenity_loader::slab_tool::synth::{Division, Preset, Stream, SynthOptions, synth, synth_slab, synth_slab_with};
use serenity_loader::slab_tool::verify::{verify, verify_with};
use serenity_protocol::checkpoint::Checkpoint;
use serenity_protocol::model_path::{TransformerSource, resolve_path};
use serenity_protocol::slab::Slab;
use slab_common::models::{geometry, random_bf16, to_bfl, write_file, write_folder};
use slab_common::{build_into, golden, process};

fn tiny(folder: &Path, seed: u64) {
    synth(&SynthOptions { preset: Preset::Tiny, output: folder.to_path_buf(), seed }, &process()).unwrap();
}

fn all_files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(at) = open.pop() {
        for entry in std::fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                files.insert(path.strip_prefix(folder).unwrap().display().to_string(), std::fs::read(&path).unwrap());
            }
        }
    }
    files
}

#[test]
fn the_same_seed_gives_the_same_bytes_on_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    tiny(&at("a"), 5);
    rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(|| tiny(&at("b"), 5));
    tiny(&at("c"), 6);
    let (a, b, c) = (all_files(&at("a")), all_files(&at("b")), all_files(&at("c")));
    assert!(a == b);
    assert_eq!(a.keys().collect::<Vec<_>>(), c.keys().collect::<Vec<_>>());
    assert!(a["transformer/diffusion_pytorch_model.safetensors"] != c["transformer/diffusion_pytorch_model.safetensors"]);
    // Made again in the same place, with another seed: nothing is left of the first.
    tiny(&at("a"), 6);
    assert!(all_files(&at("a")) == c);
}

/// Tensor names with their ranks: those of the golden checkpoint, which the reference wrote, but for the number of layers.
#[test]
fn the_tensors_are_those_that_the_reference_writes() {
    let folder = tempfile::tempdir().unwrap();
    tiny(folder.path(), 0);
    for component in ["transformer", "text_encoder", "vae"] {
        let names = |root: &Path| -> Vec<(String, usize)> {
            let checkpoint = Checkpoint::open(&root.join(component)).unwrap();
            let named = checkpoint.names().map(|n| (n.to_owned(), checkpoint.tensor(n).unwrap().shape.len()));
            let deeper = ["single_transformer_blocks.3.", ".layers.6.", ".layers.7."];
            named.filter(|(n, _)| !deeper.iter().any(|d| n.contains(d))).collect()
        };
        assert_eq!(names(folder.path()), names(&golden("model")), "{component}");
    }
    let shards = std::fs::read_dir(folder.path().join("text_encoder")).unwrap().count();
    assert!(shards > 3, "the text encoder is not sharded");
    for name in ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"] {
        assert!(folder.path().join(name).is_file(), "{name}");
    }
}

#[test]
fn a_slab_can_be_built_and_verified() {
    let folder = tempfile::tempdir().unwrap();
    tiny(&folder.path().join("model"), 0);
    let files = build_into(folder.path(), &folder.path().join("model")).files;
    let slab = Slab::open(&files.slab, &files.manifest).unwrap();
    assert_eq!(slab.geometry().unwrap(), &Preset::Tiny.transformer());
    assert!(verify(&slab, &process()).unwrap().flaws.is_empty());
}

#[test]
fn a_slab_alone_is_of_its_preset_and_intact() {
    let folder = tempfile::tempdir().unwrap();
    let (files, _) = synth_slab(Preset::Tiny, &folder.path().join("s"), 9, &process()).unwrap();
    let slab = Slab::open(&files.slab, &files.manifest).unwrap();
    slab.check_model(&Preset::Tiny.transformer()).unwrap();
    assert!(verify(&slab, &process()).unwrap().flaws.is_empty());
    assert!(Checkpoint::open(slab.companion().unwrap()).unwrap().contains("norm_out.linear.weight"));
}

#[test]
fn weights_have_the_mean_and_spread_that_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    tiny(folder.path(), 1);
    let source = TransformerSource::open(&resolve_path(folder.path().to_str().unwrap()).unwrap()).unwrap();
    let values = source.tensor_f32("single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight", &[1152, 128]).unwrap();
    let n = values.len() as f64;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let std = (values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n).sqrt();
    assert!(mean.abs() < 0.001 && (std * 128f64.sqrt() - 1.0).abs() < 0.01, "mean {mean}, std {std}");
}

#[test]
fn a_stream_can_be_drawn_from_anywhere() {
    let stream = Stream::new(7, "a tensor");
    let drawn = |fill: &dyn Fn(u64, &mut [u8]), at: u64, length: usize| {
        let mut bytes = vec![0x55; length];
        fill(at, &mut bytes);
        bytes
    };
    let other = Stream::new(7, "another tensor");
    type Fill<'a> = &'a dyn Fn(u64, &mut [u8]);
    let fills: [(&str, Fill); 3] = [
        ("f32", &|at, out: &mut [u8]| stream.fill_f32(at, out, 0.5, 2.0)),
        ("bf16", &|at, out: &mut [u8]| stream.fill_bf16(at, out, 0.5, 2.0)),
        ("codes", &|at, out: &mut [u8]| stream.fill_codes(at, out)),
    ];
    for (name, fill) in fills {
        let whole = drawn(fill, 0, 10_000);
        // In the middle of an element, within one element, and none at all.
        for (at, length) in [(0, 10_000), (800, 800), (4001, 999), (4002, 5), (4003, 1), (4005, 2), (7777, 0), (8000, 3)] {
            assert!(whole[at..at + length] == drawn(fill, at as u64, length)[..], "{name} from {at}, {length} bytes");
        }
    }
    assert!(!drawn(fills[2].1, 0, 1 << 16).contains(&0x80));
    assert!(drawn(fills[0].1, 0, 4000) != drawn(&|at, out: &mut [u8]| other.fill_f32(at, out, 0.5, 2.0), 0, 4000));
}

/// Sizes as published for the real models.
#[test]
fn presets_have_the_published_sizes() {
    for (preset, parameters) in [(Preset::Dev, 32_223_281_152usize), (Preset::Klein9b, 9_078_581_248), (Preset::Klein4b, 3_875_544_576)] {
        let geometry = preset.transformer();
        geometry.check().unwrap();
        let total: usize = geometry.all_tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(total, parameters, "{}", preset.name());
    }
}

/// The files of the real models as they would be built: how many linears, how many bytes, every block on its boundary.
#[test]
fn slabs_of_the_real_models_have_the_planned_shape() {
    for (preset, linears, codes) in
        [(Preset::Dev, 203, 32_223_264_768u64), (Preset::Klein9b, 153, 9_078_571_008), (Preset::Klein4b, 109, 3_875_536_896)]
    {
        let g = preset.transformer();
        let plan = SlabPlan::new(&g, 64, false).unwrap();
        assert_eq!(plan.linears.len(), linears, "{}", preset.name());
        let planned: u64 = plan.linears.iter().map(|(_, l)| (l.packed_shape[0] * l.packed_shape[1]) as u64).sum();
        // Everything but the norms; no input of these models needs padding.
        assert_eq!(planned, codes, "{}", preset.name());
        assert_eq!(plan.block_starts.len(), g.num_blocks() + 1);
        assert!(plan.block_starts.iter().all(|&t| plan.file.tensors[t].offset.is_multiple_of(BLOCK_ALIGN)));
        let overhead = plan.file.file_bytes - planned;
        assert!(overhead < planned / 400, "{overhead} bytes of scales, zero points and gaps");
    }
}

/// klein's structure (no guidance embedding, 8 and 24 blocks) at a small width, from checkpoint to verified slab.
#[test]
fn a_model_of_kleins_structure_is_built_and_verified() {
    let folder = tempfile::tempdir().unwrap();
    let klein = Preset::Klein9b.transformer();
    let g = geometry(klein.num_layers, klein.num_single_layers, 2, 16, 16, 48);
    assert_eq!(g.guidance_embeds, klein.guidance_embeds);
    let tensors = random_bf16(&g);
    let model = write_folder(&folder.path().join("model"), &g, &tensors);
    write_file(&folder.path().join("bfl.safetensors"), &to_bfl(&tensors));
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    let files = build_into(&a, &model).files;
    let slab = Slab::open(&files.slab, &files.manifest).unwrap();
    assert_eq!(slab.layers().len(), 153);
    slab.check_model(&g).unwrap();
    assert!(verify(&slab, &process()).unwrap().flaws.is_empty());
    build_into(&b, &folder.path().join("bfl.safetensors"));
    assert!(all_files(&a) == all_files(&b));
}

/// Threads, pieces and units of any size write the same slab, and find it intact.
#[test]
fn a_slab_is_the_same_however_the_work_is_divided() {
    let folder = tempfile::tempdir().unwrap();
    let make = |name: &str, workers, unit_bytes, piece_bytes| {
        let division = Division { workers, unit_bytes, piece_bytes };
        std::fs::create_dir(folder.path().join(name)).unwrap();
        let (files, _) = synth_slab_with(Preset::Tiny, &folder.path().join(name).join("s"), 3, division, &process()).unwrap();
        let slab = Slab::open(&files.slab, &files.manifest).unwrap();
        let verified = verify_with(&slab, division, true, &process()).unwrap();
        assert!(verified.report.flaws.is_empty(), "{:?}", verified.report.flaws);
        assert!(verified.rate.bytes == verified.plain_read.unwrap().bytes && verified.ratio.unwrap() > 0.0);
        all_files(&folder.path().join(name))
    };
    let one = make("one", 1, u64::MAX >> 1, 1 << 20);
    assert!(one == make("many", 7, 1, 4096));
    assert!(one == make("some", 3, 20_000, 1 << 16));
}
