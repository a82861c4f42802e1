//! A slab taken apart, so that a test can spoil any part of it and put it together again.
#![allow(dead_code)]

pub mod models;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use serenity_loader::slab_tool::build::{self, BuildOptions, BuildReport};
use serenity_protocol::message::Role;
use serenity_protocol::process::Process;
use serenity_protocol::slab::Slab;

/// Folder of the golden data.
pub const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/goldens");

pub fn golden(name: &str) -> PathBuf {
    Path::new(GOLDENS).join(name)
}

pub fn golden_slab_paths() -> (PathBuf, PathBuf) {
    (golden("cases/squareq/flux2tiny_int8.safetensors"), golden("cases/squareq/flux2tiny_int8.manifest.json"))
}

pub fn process() -> Process {
    Process::detached(Role::Slab)
}

/// Builds `model` into `folder`/slab.
pub fn build_into(folder: &Path, model: &Path) -> BuildReport {
    build::build(&BuildOptions::new(model.to_str().unwrap(), folder.join("slab")), &process()).unwrap()
}

#[derive(Debug, Clone, PartialEq)]
pub struct RawTensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<u64>,
    pub bytes: Vec<u8>,
}

/// Header and payload of a safetensors file, in file order.
#[derive(Clone)]
pub struct RawSlab {
    pub tensors: Vec<RawTensor>,
    pub manifest: Value,
}

impl RawSlab {
    pub fn load(slab: &Path, manifest: &Path) -> Self {
        let bytes = std::fs::read(slab).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let mut tensors: Vec<(u64, RawTensor)> = header
            .into_iter()
            .filter(|(name, _)| name != "__metadata__")
            .map(|(name, v)| {
                let at = |i: usize| v["data_offsets"][i].as_u64().unwrap();
                let shape = v["shape"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap()).collect();
                let payload = bytes[8 + length + at(0) as usize..8 + length + at(1) as usize].to_vec();
                (at(0), RawTensor { name, dtype: v["dtype"].as_str().unwrap().into(), shape, bytes: payload })
            })
            .collect();
        tensors.sort_by_key(|(start, _)| *start);
        let manifest = serde_json::from_slice(&std::fs::read(manifest).unwrap()).unwrap();
        Self { tensors: tensors.into_iter().map(|(_, t)| t).collect(), manifest }
    }

    pub fn golden() -> Self {
        let (slab, manifest) = golden_slab_paths();
        Self::load(&slab, &manifest)
    }

    pub fn tensor(&mut self, name: &str) -> &mut RawTensor {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap()
    }

    pub fn layer(&mut self, index: usize) -> &mut Map<String, Value> {
        self.manifest["layers"][index].as_object_mut().unwrap()
    }

    pub fn header(&self) -> Map<String, Value> {
        let mut end = 0;
        let entry = |t: &RawTensor| {
            let start = end;
            end += t.bytes.len();
            (t.name.clone(), json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [start, end]}))
        };
        self.tensors.iter().map(entry).collect()
    }

    /// Writes slab and manifest into `folder`.
    pub fn write(&self, folder: &Path) -> (PathBuf, PathBuf) {
        self.write_with_header(folder, serde_json::to_string(&self.header()).unwrap().as_bytes())
    }

    /// As [`Self::write`], with any text for a header.
    pub fn write_with_header(&self, folder: &Path, header: &[u8]) -> (PathBuf, PathBuf) {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header);
        self.tensors.iter().for_each(|t| bytes.extend_from_slice(&t.bytes));
        let (slab, manifest) = (folder.join("s.safetensors"), folder.join("s.manifest.json"));
        std::fs::write(&slab, bytes).unwrap();
        std::fs::write(&manifest, serde_json::to_string_pretty(&self.manifest).unwrap()).unwrap();
        (slab, manifest)
    }

    /// The error of opening it, which must be one of the data.
    pub fn refusal(&self) -> String {
        let folder = tempfile::tempdir().unwrap();
        let (slab, manifest) = self.write(folder.path());
        refusal(&slab, &manifest)
    }
}

/// The error of opening the files, which must have exit code 65.
pub fn refusal(slab: &Path, manifest: &Path) -> String {
    let error = Slab::open(slab, manifest).expect_err("the slab was accepted");
    assert_eq!(error.exit_code(), 65, "{error}");
    error.to_string()
}
