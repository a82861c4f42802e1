//! The slab in the plan: whether it is there, whether it is this model's, and whether it suffices without the checkpoint.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::memory;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::geometry::TransformerGeometry;
use crate::model_path::{ModelPaths, TransformerSource};
use crate::slab::Slab;
use crate::slab::manifest::padded_in;

/// Columns of a slab's row are padded to a multiple of this, as the original's builder does.
const PAD_K: usize = 64;

/// The slab.
#[derive(Debug, Serialize)]
pub struct SlabPlan {
    /// File.
    pub path: PathBuf,
    /// Its manifest.
    pub manifest: PathBuf,
    /// State.
    pub state: SlabState,
    /// Bytes of the file, predicted where it is missing.
    pub bytes: u64,
}

/// State of the slab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SlabState {
    /// Neither file, or only one of two that belong together: it will be built.
    Missing,
    /// There, and of this model.
    Present,
    /// There, but damaged or of another model: a problem.
    Unusable,
}

/// Opens the slab if both of its files are there.
pub(super) fn open(config: &Config) -> Option<Result<Slab>> {
    let (path, manifest) = (&config.memory.slab_path, &config.memory.manifest_path);
    (path.exists() && manifest.exists()).then(|| Slab::open(path, manifest))
}

/// Whether the run of `config` needs nothing of the transformer but the slab, which is there.
#[must_use]
pub fn slab_suffices(config: &Config) -> bool {
    matches!(open(config), Some(Ok(slab)) if slab.is_self_sufficient())
}

/// The model's geometry: from its `config.json`; from the slab where there is none; from the headers of the checkpoint only where the
/// slab does not suffice for training. A slab of another model than the configuration names is found by comparing the two.
pub(super) fn geometry(paths: &ModelPaths, slab: Option<&Result<Slab>>) -> Result<TransformerGeometry> {
    let whole = slab.and_then(|s| s.as_ref().ok()).filter(|s| s.is_self_sufficient()).and_then(Slab::geometry);
    match (whole, &paths.transformer_config) {
        (Some(_), Some(config)) => TransformerGeometry::from_config_file(config),
        (Some(geometry), None) if !paths.transformer.exists() => Ok(geometry.clone()),
        _ => Ok(TransformerSource::open(paths)?.geometry().clone()),
    }
}

/// State and size of the slab. A damaged or foreign one is a problem: it is never overwritten.
///
/// `opened` is what [`open`] gave.
pub(super) fn plan(
    config: &Config,
    geometry: &TransformerGeometry,
    opened: Option<Result<Slab>>,
    problems: &mut Vec<Error>,
) -> Result<SlabPlan> {
    let (path, manifest) = (&config.memory.slab_path, &config.memory.manifest_path);
    let mut plan = SlabPlan { path: path.clone(), manifest: manifest.clone(), state: SlabState::Missing, bytes: slab_bytes(geometry)? };
    match (path.exists(), manifest.exists()) {
        (present, whole) if !present || (!whole && is_unfinished(config)) => {
            check_buildable(path, manifest, problems);
            return Ok(plan);
        }
        (_, false) => problems.push(
            Error::absent("the slab has no manifest")
                .at(manifest)
                .advice("correct memory.stagehand.squareq_manifest_path, or remove the slab to have both built again"),
        ),
        (_, true) => {}
    }
    if problems.is_empty() {
        match opened.unwrap_or_else(|| Slab::open(path, manifest)).and_then(|s| s.check_model(geometry).map(|()| s)) {
            Ok(slab) => {
                plan.bytes = slab.file_bytes();
                plan.state = SlabState::Present;
                return Ok(plan);
            }
            Err(e) => problems.push(e),
        }
    }
    plan.state = SlabState::Unusable;
    Ok(plan)
}

/// Whether a slab without manifest is left over from an interrupted build, which writes the manifest last: it lies where only this run's
/// builder puts one, or the builder's journal lies beside it.
fn is_unfinished(config: &Config) -> bool {
    let slab = &config.memory.slab_path;
    slab.starts_with(&config.output_dir) || slab.with_extension("build.partial").exists()
}

/// The builder names the manifest after the slab; another name can only be that of a manifest that exists.
fn check_buildable(slab: &Path, manifest: &Path, problems: &mut Vec<Error>) {
    let built = slab.with_extension("manifest.json");
    if manifest != built {
        problems.push(
            Error::config("the slab is missing and would be built with a manifest of another name than squareq_manifest_path")
                .at(slab)
                .expected(built.display())
                .found(manifest.display())
                .advice("remove memory.stagehand.squareq_manifest_path, or correct squareq_slab_path if the slab exists"),
        );
    }
}

/// Bytes of a slab of the blocks, without headers: padded INT8 rows, f32 scale and zero point of each row; and of its companion with
/// everything else in bf16.
pub(super) fn slab_bytes(geometry: &TransformerGeometry) -> Result<u64> {
    let mut bytes = 2 * memory::other_parameters(geometry);
    for linear in geometry.blocks().flat_map(|b| geometry.block_linears(b)) {
        let columns = padded_in(linear.in_features, PAD_K).ok_or_else(|| Error::data("a linear is too large").found(&linear.name))?;
        bytes += linear.out_features as u64 * (columns as u64 + 8);
    }
    Ok(bytes)
}

/// `pinned_slab_mb` of the original must hold the largest block in bf16.
pub(super) fn check_original_size(config: &Config, geometry: &TransformerGeometry, problems: &mut Vec<Error>) {
    let Some(slab) = config.memory.stagehand.pinned_slab_bytes else { return };
    let largest = 2 * memory::largest_block_parameters(geometry);
    if slab < largest {
        problems.push(
            Error::config("`memory.stagehand.pinned_slab_mb` does not hold the largest block of the model")
                .expected(format!("at least {} MiB", largest.div_ceil(1 << 20)))
                .found(format!("{} MiB", slab >> 20))
                .advice("raise it, or remove it: ring_chunk_mb takes its place"),
        );
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::config::Overrides;

    /// FLUX.2 [dev] (spec/flux2.md 1.1).
    fn dev() -> TransformerGeometry {
        serde_json::from_str(
            r#"{"in_channels": 128, "num_layers": 8, "num_single_layers": 48, "attention_head_dim": 128, "num_attention_heads": 48,
                "joint_attention_dim": 15360, "axes_dims_rope": [32, 32, 32, 32]}"#,
        )
        .unwrap()
    }

    fn config(output_dir: &Path, stagehand: serde_json::Value) -> Config {
        let json = serde_json::json!({"model": {"path": "m"}, "data": {"concepts": ["d"]}, "name": "n", "output_dir": output_dir,
            "memory": {"stagehand": stagehand}});
        Config::from_json(&json.to_string(), "c.json".as_ref(), &Overrides::default()).unwrap()
    }

    /// State of the slab and exit codes of the problems.
    fn state(config: &Config) -> (SlabState, Vec<u8>) {
        let mut problems = Vec::new();
        let plan = plan(config, &dev(), open(config), &mut problems).unwrap();
        (plan.state, problems.iter().map(Error::exit_code).collect())
    }

    #[test]
    fn a_slab_is_built_only_where_none_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let own = config(&out, serde_json::json!({}));
        assert_eq!(state(&own), (SlabState::Missing, vec![]));
        // The manifest is written last: without it, the run's own slab is an unfinished one.
        std::fs::create_dir_all(out.join("slab")).unwrap();
        std::fs::write(&own.memory.slab_path, "half").unwrap();
        assert_eq!(state(&own), (SlabState::Missing, vec![]));
        std::fs::write(&own.memory.manifest_path, "{").unwrap();
        assert_eq!(state(&own), (SlabState::Unusable, vec![65]));

        let given = config(&out, serde_json::json!({"squareq_slab_path": folder.path().join("x.y.safetensors")}));
        assert_eq!(state(&given), (SlabState::Missing, vec![]));
        std::fs::write(&given.memory.slab_path, "somebody's").unwrap();
        assert_eq!(state(&given), (SlabState::Unusable, vec![69]));
        std::fs::write(folder.path().join("x.y.build.partial"), "journal").unwrap();
        assert_eq!(state(&given), (SlabState::Missing, vec![]));

        let other = serde_json::json!({"squareq_slab_path": folder.path().join("a.safetensors"), "squareq_manifest_path": "b.json"});
        assert_eq!(state(&config(&out, other)), (SlabState::Missing, vec![64]));
    }

    #[test]
    fn the_predicted_slab_is_that_of_the_full_model() {
        // 31.4 GB of codes, scales and zero points of the blocks' rows, and 1.63 GB in bf16 beside it (spec/flux2.md 1.2).
        let bytes = slab_bytes(&dev()).unwrap();
        let codes = memory::block_parameters(&dev()) - (8 * 512 + 48 * 256);
        assert!(bytes > codes + 1_632_000_000 && bytes < codes + 1_632_000_000 + 60_000_000, "{bytes}");
    }

    #[test]
    fn pinned_slab_mb_must_hold_the_largest_block() {
        // A double block has 1872 MiB in bf16 (spec/squareq-stagehand-serenity.md 3.1).
        for (slab_mb, fits) in [(2048, true), (1024, false)] {
            let mut problems = Vec::new();
            let config = config("o".as_ref(), serde_json::json!({"pinned_pool_mb": 8192, "pinned_slab_mb": slab_mb}));
            check_original_size(&config, &dev(), &mut problems);
            assert_eq!(problems.is_empty(), fits, "{slab_mb}");
        }
    }
}
