//! The kernels' sources, compiled at start for the very device, and a cache of the results.
//!
//! Sources are embedded and include no header: a user needs the driver and libnvrtc, not a toolkit. A unit is a few sources joined; units
//! compile on threads of their own. The cache lies in the user's cache folder; its key is the hash of source, options, target and compiler
//! version, its entries carry the hash of their content, and whatever is wrong with one, it is compiled anew. Without a folder to write to,
//! every start compiles (a few seconds).
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use serenity_protocol::{Error, Result, atomic_file};

use crate::nvrtc::{self, Target};

/// Sources that are compiled together.
#[derive(Debug, Clone, Copy)]
pub struct Unit {
    /// For messages and file names.
    pub name: &'static str,
    /// Joined in this order, each with its file name.
    pub sources: &'static [(&'static str, &'static str)],
}

/// What every unit starts with: types, conversions, wide accesses, reductions.
pub const COMMON: (&str, &str) = ("common.cu", include_str!("../kernels/common.cu"));

/// Every unit of the crate.
pub const UNITS: &[Unit] = &[
    Unit { name: "rows", sources: &[COMMON, ("rows.cu", include_str!("../kernels/rows.cu"))] },
    Unit { name: "elementwise", sources: &[COMMON, ("elementwise.cu", include_str!("../kernels/elementwise.cu"))] },
    Unit { name: "xxh3", sources: &[COMMON, ("xxh3.cu", include_str!("../kernels/xxh3.cu"))] },
    Unit { name: "vae", sources: &[COMMON, ("vae.cu", include_str!("../kernels/vae.cu"))] },
    Unit { name: "text", sources: &[COMMON, ("text.cu", include_str!("../kernels/text.cu"))] },
    Unit { name: "optimizer", sources: &[COMMON, ("optimizer.cu", include_str!("../kernels/optimizer.cu"))] },
    Unit {
        name: "attention",
        sources: &[
            ("attention.cu", include_str!("../kernels/attention.cu")),
            ("attention_f32.cu", include_str!("../kernels/attention_f32.cu")),
        ],
    },
];

/// Options besides the target. Divisions, roots and denormals stay exact: no fast math.
pub const OPTIONS: &[&str] = &["--std=c++17", "-lineinfo"];

/// First bytes of a cache entry.
const MAGIC: &[u8; 8] = b"SRNYKRN1";

impl Unit {
    /// The joined source; messages of the compiler name the file and line that the programmer knows.
    #[must_use]
    pub fn source(&self) -> String {
        self.sources.iter().map(|(file, text)| format!("#line 1 \"{file}\"\n{text}\n")).collect()
    }

    /// File name of its cache entry.
    fn entry(&self, key: &str) -> String {
        format!("{}-{key}.kernels", self.name)
    }

    /// What the compiled form depends on.
    #[must_use]
    pub fn key(&self, target: Target, compiler: (i32, i32)) -> String {
        let mut hash = blake3::Hasher::new();
        // Lengths keep neighbouring parts apart.
        let mut part = |text: &str| {
            hash.update(&(text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        };
        part(&self.source());
        OPTIONS.iter().for_each(|o| part(o));
        part(&target.option());
        part(&format!("{}.{}", compiler.0, compiler.1));
        let hex = hash.finalize().to_hex();
        hex.get(..32).unwrap_or_default().to_string()
    }

    /// Compiles it, or takes it from `cache`.
    ///
    /// # Errors
    /// What the compiler says. A cache that cannot be read or written is no error.
    pub fn image(&self, target: Target, compiler: (i32, i32), cache: Option<&Path>) -> Result<Vec<u8>> {
        let path = cache.map(|c| c.join(self.entry(&self.key(target, compiler))));
        if let Some(image) = path.as_deref().and_then(cached) {
            return Ok(image);
        }
        let image = nvrtc::compile(self.name, &self.source(), target, OPTIONS)?;
        if let Some(path) = path {
            let entry = [MAGIC.as_slice(), blake3::hash(&image).as_bytes(), &image].concat();
            if let Err(e) = atomic_file::write(&path, &entry) {
                tracing::warn!("compiled kernels cannot be kept, every start will compile them: {e}");
            }
        }
        Ok(image)
    }
}

/// A whole entry, or nothing.
fn cached(path: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(path).ok()?;
    let (hash, image) = bytes.strip_prefix(MAGIC).and_then(|rest| rest.split_at_checked(blake3::OUT_LEN))?;
    if blake3::hash(image).as_bytes() != hash {
        tracing::warn!(path = %path.display(), "a cached kernel is damaged and will be compiled anew");
        return None;
    }
    Some(image.to_vec())
}

/// Where compiled kernels are kept: `$SERENITY_CACHE`, or `serenity` in the user's cache folder; none without a home.
#[must_use]
pub fn cache_folder() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = variable("SERENITY_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|c| c.join("serenity")))
        .or_else(|| variable("HOME").map(|h| h.join(".cache/serenity")))?;
    Some(base.join("kernels"))
}

/// Compiles every unit for a device of `capability` (e.g. 90), each on a thread.
///
/// # Errors
/// [`Error::Absent`] without compiler or for a device that it does not know; what the compiler says.
pub fn images(capability: u32, cache: Option<&Path>) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let _span = tracing::info_span!("compile kernels").entered();
    let compiler = nvrtc::version()?;
    let target = Target::choose(&nvrtc::architectures()?, capability)?;
    if let Target::Ptx(known) = target {
        tracing::warn!(
            "libnvrtc {}.{} does not know compute capability {capability}: kernels are compiled for {known}, and further by the driver",
            compiler.0,
            compiler.1
        );
    }
    std::thread::scope(|scope| {
        let started: Vec<_> = UNITS.iter().map(|unit| (unit.name, scope.spawn(move || unit.image(target, compiler, cache)))).collect();
        started
            .into_iter()
            .map(|(name, thread)| {
                let image = thread.join().map_err(|_| Error::invariant(format!("the thread that compiles {name} panicked")))??;
                Ok((name, image))
            })
            .collect()
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn keys_differ_by_everything_that_matters() {
        let unit = UNITS[0];
        let other = Unit { name: unit.name, sources: &[COMMON] };
        let keys = [
            unit.key(Target::Cubin(90), (13, 0)),
            unit.key(Target::Ptx(90), (13, 0)),
            unit.key(Target::Cubin(80), (13, 0)),
            unit.key(Target::Cubin(90), (12, 9)),
            other.key(Target::Cubin(90), (13, 0)),
        ];
        for (i, a) in keys.iter().enumerate() {
            assert_eq!(a.len(), 32);
            assert!(keys.iter().skip(i + 1).all(|b| a != b));
        }
        assert_eq!(keys[0], unit.key(Target::Cubin(90), (13, 0)));
    }

    #[test]
    fn a_damaged_entry_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.kernels");
        assert_eq!(cached(&path), None);
        let entry = [MAGIC.as_slice(), blake3::hash(b"image").as_bytes(), b"image"].concat();
        std::fs::write(&path, &entry).unwrap();
        assert_eq!(cached(&path).unwrap(), b"image");
        for i in 0..entry.len() {
            let mut bad = entry.clone();
            bad[i] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            assert_eq!(cached(&path), None, "byte {i}");
            std::fs::write(&path, &entry[..i]).unwrap();
            assert_eq!(cached(&path), None, "cut at {i}");
        }
    }

    /// The sources go through the very code path of a start. Without libnvrtc nothing is checked, and the test says so.
    #[test]
    fn all_units_compile_for_every_generation() {
        let Ok(version) = nvrtc::version() else {
            // Past the test harness's capture: a test that did not run must be seen.
            let _ = std::io::Write::write_all(&mut std::io::stderr(), b"SKIPPED: libnvrtc is not here, no kernel was compiled\n");
            return;
        };
        let known = nvrtc::architectures().unwrap();
        let folder = tempfile::tempdir().unwrap();
        for capability in [80, 90, 120] {
            let compiled = images(capability, Some(folder.path())).unwrap();
            assert_eq!(compiled.len(), UNITS.len());
            let again = images(capability, Some(folder.path())).unwrap();
            assert_eq!(compiled, again, "what the cache returns is what was compiled");
            eprintln!(
                "compute capability {capability}: {} bytes, compiler {version:?}, {known:?}",
                compiled.iter().map(|c| c.1.len()).sum::<usize>()
            );
        }
        let bad = Unit { name: "bad", sources: &[COMMON, ("bad.cu", "extern \"C\" __global__ void f() { nonsense; }")] };
        let error = bad.image(Target::Cubin(80), version, None).unwrap_err().to_string();
        assert!(error.contains("bad.cu(1)") && error.contains("nonsense"), "{error}");
    }
}
