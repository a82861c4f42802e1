//! Finding CUDA's libraries at run time, so that one binary runs with and without them.
//!
//! cudarc loads each library on the first call into it and panics when there is none. [`require`] is asked before: it looks where the
//! dynamic linker looks, then in the folders where toolkits and NVIDIA's Python wheels put their libraries. What it finds there is loaded by
//! its full path and stays loaded; the linker then answers cudarc's request by the library's name (soname) with the copy in memory.
//! No environment variable has to be set, but `SERENITY_CUDA_LIBRARIES` (folders, colon-separated) is looked at first.

use std::path::{Path, PathBuf};

use serenity_protocol::{Error, Result};

/// A library of NVIDIA's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Library {
    /// The driver, `libcuda`.
    Driver,
    /// The run-time compiler.
    Nvrtc,
    /// Matrix products.
    CublasLt,
    /// Attention.
    Cudnn,
}

impl Library {
    /// File names, the preferred first. Each is also a name that cudarc asks the linker for.
    #[must_use]
    pub fn file_names(self) -> &'static [&'static str] {
        match self {
            Library::Driver => &["libcuda.so.1"],
            Library::Nvrtc => &["libnvrtc.so.13", "libnvrtc.so.12"],
            Library::CublasLt => &["libcublasLt.so.13", "libcublasLt.so.12"],
            Library::Cudnn => &["libcudnn.so.9"],
        }
    }

    fn advice(self) -> &'static str {
        match self {
            Library::Driver => "install NVIDIA's driver (it brings libcuda.so.1), or choose the CPU as device",
            Library::Nvrtc => {
                "install the CUDA toolkit 12 or 13, or `pip install nvidia-cuda-nvrtc`; or name its folder in SERENITY_CUDA_LIBRARIES"
            }
            Library::CublasLt => {
                "install the CUDA toolkit 12 or 13, or `pip install nvidia-cublas`; or name its folder in SERENITY_CUDA_LIBRARIES"
            }
            Library::Cudnn => "install cuDNN 9, or `pip install nvidia-cudnn-cu13`; or name its folder in SERENITY_CUDA_LIBRARIES",
        }
    }

    /// How files begin that the library itself looks for by name, and that must therefore be loaded before it.
    fn companions(self) -> Option<&'static str> {
        (self == Library::Nvrtc).then_some("libnvrtc-builtins.so")
    }

    /// Whether cudarc would find it now.
    fn linked(self) -> bool {
        // SAFETY: the probes load and unload a shared library of NVIDIA's by name; their initialisers have no precondition. Nothing else
        // is called in them.
        unsafe {
            match self {
                Library::Driver => cudarc::driver::sys::is_culib_present(),
                Library::Nvrtc => cudarc::nvrtc::sys::is_culib_present(),
                Library::CublasLt => cudarc::cublaslt::sys::is_culib_present(),
                Library::Cudnn => cudarc::cudnn::sys::is_culib_present(),
            }
        }
    }
}

/// Makes `library` callable.
///
/// # Errors
/// [`Error::Absent`] naming the library, where it was looked for, and how to get it.
pub fn require(library: Library) -> Result<()> {
    if library.linked() {
        return Ok(());
    }
    let folders = folders();
    for folder in &folders {
        for name in library.file_names() {
            let path = folder.join(name);
            if !path.is_file() {
                continue;
            }
            if let Some(prefix) = library.companions() {
                let companion = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix));
                children(folder).iter().filter(|p| companion(p)).for_each(|p| _ = preload(p));
            }
            if preload(&path) && library.linked() {
                tracing::debug!(path = %path.display(), "library loaded by its path");
                return Ok(());
            }
        }
    }
    Err(Error::absent(format!("{} cannot be loaded", library.file_names().join(" or ")))
        .expected(format!("in the linker's folders, or in one of {} folders of CUDA toolkits and Python wheels", folders.len()))
        .advice(library.advice())
        .lasting())
}

/// Makes one file of a library's loadable by its bare name, for a library that asks the linker for it.
///
/// # Errors
/// [`Error::Absent`] naming the file.
pub fn require_file(name: &str) -> Result<()> {
    if preload(Path::new(name)) || folders().iter().map(|f| f.join(name)).any(|path| path.is_file() && preload(&path)) {
        return Ok(());
    }
    Err(Error::absent(format!("{name} cannot be loaded"))
        .advice("install the package that has it, or name its folder in SERENITY_CUDA_LIBRARIES")
        .lasting())
}

/// Loads a library for the rest of the process.
fn preload(path: &Path) -> bool {
    // SAFETY: the file has the name of a library of NVIDIA's and lies in a folder that the user or a package manager made for such; its
    // initialisers have no precondition. It is never unloaded, so no code or data of it can dangle.
    match unsafe { libloading::Library::new(path) } {
        Ok(library) => {
            std::mem::forget(library);
            true
        }
        Err(e) => {
            tracing::debug!(path = %path.display(), "cannot be loaded: {e}");
            false
        }
    }
}

/// Existing folders that may hold CUDA's libraries, in the order they are tried.
#[must_use]
pub fn folders() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let variable = |name: &str| std::env::var_os(name).map(|v| std::env::split_paths(&v).collect::<Vec<_>>()).unwrap_or_default();
    found.extend(variable("SERENITY_CUDA_LIBRARIES"));
    for home in ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"].into_iter().flat_map(variable).chain(toolkits()) {
        found.extend(["lib64", "lib", "targets/x86_64-linux/lib"].map(|l| home.join(l)));
    }
    for packages in python_packages() {
        found.extend(children(&packages.join("nvidia")).into_iter().map(|p| p.join("lib")));
    }
    // Tests also look where scripts/cuda-toolkit.sh puts a toolkit.
    if cfg!(test) {
        found.push(PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/cuda-toolkit/nvidia/cu13/lib")));
    }
    found.retain(|f| f.is_dir());
    found
}

fn toolkits() -> Vec<PathBuf> {
    let mut all = children(Path::new("/usr/local"));
    all.retain(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("cuda")));
    // cuda, then cuda-13.0 before cuda-12.8.
    all.sort();
    all.reverse();
    all
}

/// The package folders of the Python installations that are usually there.
fn python_packages() -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|v| std::env::var_os(v).map(PathBuf::from)).collect();
    roots.extend(std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".local")));
    roots.extend(["/usr/local", "/usr", "/opt/conda", "/opt/venv"].map(PathBuf::from));
    let mut found = Vec::new();
    for root in roots {
        let mut versions = children(&root.join("lib"));
        versions.retain(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python3")));
        found.extend(versions.iter().flat_map(|v| [v.join("site-packages"), v.join("dist-packages")]));
    }
    found.retain(|f| f.is_dir());
    found
}

/// Entries of a folder, sorted; none if it cannot be read.
fn children(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    found.sort();
    found
}
