//! Training from slab, companion and cache: the model's weights are gone, the result is the same.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::lab::{Lab, shared};

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}

/// Removes the weight files of a component; returns how many there were.
fn remove_weights(folder: &Path) -> usize {
    let files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    let weights: Vec<&PathBuf> = files.iter().filter(|f| f.extension().is_some_and(|e| e == "safetensors")).collect();
    weights.iter().for_each(|f| std::fs::remove_file(f).unwrap());
    weights.len()
}

/// A model, slab and cache of the lab's own, so that they can be damaged.
fn own_model(lab: &Lab) -> (PathBuf, Value) {
    let model = lab.path().join("model");
    copy_folder(&shared().model, &model);
    copy_folder(&shared().cache, &lab.path().join("cache"));
    let settings = json!({ "model": { "path": model }, "data": { "cache_dir": lab.path().join("cache") } });
    (model, settings)
}

#[test]
fn slab_and_cache_train_without_the_models_weights() {
    let lab = Lab::new();
    let (model, settings) = own_model(&lab);
    lab.run("serenity-launch", &[&lab.quick_config("whole", 3, &settings)]).expect(0);
    for component in ["transformer", "text_encoder", "vae"] {
        assert!(remove_weights(&model.join(component)) > 0, "{component}");
    }
    lab.run("serenity-launch", &[&lab.quick_config("weightless", 3, &settings)]).expect(0);
    // The metadata too: what was trained is named by the slab.
    assert!(lab.lora("weightless") == lab.lora("whole"));
    // Not even the transformer's folder; and without a loader.
    std::fs::remove_dir_all(model.join("transformer")).unwrap();
    let mut resident = settings.clone();
    resident["memory"] = json!({ "strategy": "none" });
    lab.run("serenity-launch", &[&lab.quick_config("resident", 3, &resident)]).expect(0);
    assert!(lab.lora_tensors("resident") == lab.lora_tensors("whole"));
    lab.assert_nothing_left();
}

#[test]
fn what_cannot_be_made_without_weights_is_named() {
    let lab = Lab::new();
    let (model, settings) = own_model(&lab);
    // The plan notes whose work the cache is.
    lab.run("serenity-launch", &[&lab.quick_config("seen", 1, &settings), "--plan"]).expect(0);
    remove_weights(&model.join("vae"));
    let cached = std::fs::read_dir(lab.path().join("cache/latent")).unwrap().next().unwrap().unwrap().path();
    std::fs::remove_dir_all(cached).unwrap();
    let without_vae = lab.quick_config("no-vae", 1, &settings);
    lab.run("serenity-launch", &[&without_vae]).expect(69).says(&["images are not in the cache", "VAE"]);
    // Without a slab the transformer is needed.
    remove_weights(&model.join("transformer"));
    let mut no_slab = settings.clone();
    no_slab["memory"] = json!({ "stagehand": { "squareq_slab_path": lab.path().join("none.safetensors"), "squareq_manifest_path": null } });
    lab.run("serenity-launch", &[&lab.quick_config("no-slab", 1, &no_slab)]).expect(69).says(&["transformer"]);
}

#[test]
fn a_text_encoders_slab_stands_for_its_folder() {
    let lab = Lab::new();
    let (model, mut settings) = own_model(&lab);
    let prefix = lab.path().join("text");
    let build = ["build", "--component", "text_encoder", "--model", model.to_str().unwrap(), "--output", prefix.to_str().unwrap()];
    lab.run("serenity-slab", &build).expect(0);
    settings["model"]["text_encoder_slab_path"] = json!(prefix.with_extension("safetensors"));
    std::fs::remove_dir_all(model.join("text_encoder")).unwrap();
    std::fs::remove_dir_all(model.join("transformer")).unwrap();
    // The latents are there, the embeddings are made from the slab; the same again makes nothing.
    lab.run("serenity-launch", &[&lab.quick_config("made", 3, &settings)]).expect(0);
    lab.run("serenity-launch", &[&lab.quick_config("cached", 3, &settings)]).expect(0);
    assert!(lab.lora_tensors("made") == lab.lora_tensors("cached"));
    settings["model"]["text_encoder_slab_path"] = json!(lab.path().join("none.safetensors"));
    lab.run("serenity-launch", &[&lab.quick_config("none", 3, &settings)])
        .expect(69)
        .says(&["none.safetensors", "--component text_encoder"]);
    lab.assert_nothing_left();
}
