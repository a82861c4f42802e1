//! A folder with the golden model, images and a configuration, for tests of whole runs.
#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serenity_encoder::run::{RunOptions, Summary, run};
use serenity_protocol::Result;
use serenity_protocol::cache::CachePlan;
use serenity_protocol::config::{Config, Overrides};
use serenity_protocol::message::Role;
use serenity_protocol::process::Process;

const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/goldens");

/// A folder with a copy of the golden model, images and a configuration.
pub struct Dir(pub tempfile::TempDir);

impl Dir {
    pub fn new(captions: &[&str]) -> Self {
        let dir = Self(tempfile::tempdir().unwrap());
        for part in ["transformer", "text_encoder", "tokenizer", "vae"] {
            let (from, to) = (Path::new(GOLDENS).join("model").join(part), dir.path(&format!("model/{part}")));
            std::fs::create_dir_all(&to).unwrap();
            for file in std::fs::read_dir(from).unwrap() {
                let file = file.unwrap();
                std::fs::write(to.join(file.file_name()), std::fs::read(file.path()).unwrap()).unwrap();
            }
        }
        std::fs::create_dir(dir.path("images")).unwrap();
        for (i, caption) in captions.iter().enumerate() {
            dir.add(i, caption);
        }
        dir
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn add(&self, i: usize, caption: &str) {
        let shade = i as u32 * 40;
        let image = image::RgbImage::from_fn(40, 32 + i as u32, |x, y| image::Rgb([(x * 5 + shade) as u8, (y * 6) as u8, (x * y) as u8]));
        image.save(self.path(&format!("images/{i}.png"))).unwrap();
        std::fs::write(self.path(&format!("images/{i}.txt")), caption).unwrap();
    }

    pub fn config(&self, cache: &str, extra: &[&str]) -> Config {
        let config = serde_json::json!({
            "model": {"path": self.path("model")},
            "data": {"concepts": [{"path": self.path("images")}], "cache_dir": self.path(cache)},
            "resolution": 64, "output_dir": self.path("out"), "train_device": "cpu",
        });
        let mut set = vec!["model.max_sequence_length=96".to_string()];
        set.extend(extra.iter().map(ToString::to_string));
        Config::from_json(&config.to_string(), &self.path("config.json"), &Overrides { set, ..Overrides::default() }).unwrap()
    }

    pub fn run(&self, cache: &str) -> Result<Summary> {
        run(&self.config(cache, &[]), RunOptions::default(), &Process::detached(Role::Encoder))
    }

    pub fn plan(&self, config: &Config) -> CachePlan {
        let samples = serenity_protocol::dataset::scan(&config.data).unwrap();
        CachePlan::new(config, &serenity_protocol::model_path::resolve(&config.model).unwrap(), &samples).unwrap()
    }

    /// The entries of a cache folder by their path in it.
    pub fn entries(&self, cache: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let (root, mut found) = (self.path(cache), BTreeMap::new());
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for file in std::fs::read_dir(folder).unwrap() {
                let path = file.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "safetensors") {
                    found.insert(path.strip_prefix(&root).unwrap().to_path_buf(), std::fs::read(&path).unwrap());
                }
            }
        }
        found
    }
}

pub fn counts(summary: Summary) -> (usize, usize, usize) {
    (summary.captions, summary.images, summary.cached)
}
