//! The original builder's slab opens, its layouts hold, and its gates (and those it lacks) refuse what they should.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::model_path::{TransformerSource, resolve_path};
use serenity_protocol::slab::Slab;
use serenity_protocol::slab::layout::{PartKind, PayloadForm, SlabLayout};

const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/goldens");

fn golden(name: &str) -> PathBuf {
    Path::new(GOLDENS).join(name)
}

fn golden_slab() -> Slab {
    Slab::open(&golden("cases/squareq/flux2tiny_int8.safetensors"), &golden("cases/squareq/flux2tiny_int8.manifest.json")).unwrap()
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
