#![allow(clippy::unwrap_used, clippy::expect_used)]
//! House rules that no compiler knows, enforced over the sources: see CONTRIBUTING.md.

use std::path::{Path, PathBuf};

fn sources() -> Vec<PathBuf> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        let mut entries: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        entries.sort();
        for path in entries {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && !["target", ".git", "output", "fixtures", ".venv"].contains(&name.as_str()) {
                walk(&path, found);
            } else if name.ends_with(".rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(Path::new(env!("CARGO_MANIFEST_DIR")), &mut found);
    assert!(found.len() > 40, "only {} source files found: the search is broken", found.len());
    found
}

/// Every line of production code with its number; lines of inline test modules are left out.
fn production_lines(path: &Path) -> Vec<(usize, String)> {
    let text = std::fs::read_to_string(path).unwrap();
    let lines = text.lines().enumerate().map(|(i, l)| (i + 1, l.to_string()));
    lines.take_while(|(_, l)| !l.trim_start().starts_with("#[cfg(test)]")).collect()
}

fn is_test(path: &Path) -> bool {
    path.components().any(|c| c.as_os_str() == "tests") || path.file_name().is_some_and(|n| n == "tests.rs")
}

fn report(problems: &[String]) {
    assert!(problems.is_empty(), "{} places to mend:\n{}", problems.len(), problems.join("\n"));
}

#[test]
fn every_atomic_ordering_names_its_partner() {
    let mut problems = Vec::new();
    let mut seen = 0;
    for path in sources().iter().filter(|p| !is_test(p) && !p.ends_with("tidy.rs")) {
        let lines = production_lines(path);
        for (i, (number, line)) in lines.iter().enumerate() {
            let uses = ["Relaxed", "Acquire", "Release", "AcqRel", "SeqCst"].iter().any(|o| line.contains(&format!("Ordering::{o}")));
            if !uses {
                continue;
            }
            seen += 1;
            let near = &lines[i.saturating_sub(4)..=i];
            if !near.iter().any(|(_, l)| l.contains("//")) {
                problems.push(format!("{}:{number}: {}", path.display(), line.trim()));
            }
        }
    }
    assert!(seen > 5, "only {seen} orderings found: the search is broken");
    report(&problems);
}

#[test]
fn every_module_says_what_it_is() {
    let silent = |p: &&PathBuf| {
        let text = std::fs::read_to_string(p).unwrap();
        !text.lines().take(4).any(|l| l.starts_with("//!"))
    };
    report(&sources().iter().filter(silent).map(|p| format!("{}: opens without //! documentation", p.display())).collect::<Vec<_>>());
}

#[test]
fn unsafe_code_lives_in_few_files() {
    // Each of these says why at its head; a new one needs a reason as good.
    const ALLOWED: [&str; 20] = [
        "protocol/src/checkpoint.rs",
        "protocol/src/slab/simd.rs",
        "protocol/src/ring/pages.rs",
        "protocol/src/ring/guard.rs",
        "protocol/src/ring/segment.rs",
        "loader/src/reader/uring.rs",
        "loader/src/service.rs",
        "loader/src/bench.rs",
        "trainer/src/ring_client.rs",
        "trainer/src/gpu/ring_supply.rs",
        "encoder/src/tensor.rs",
        "encoder/src/text/weights.rs",
        "cuda/src/driver.rs",
        "cuda/src/driver/host_memory.rs",
        "cuda/src/driver/module.rs",
        "cuda/src/blas.rs",
        "cuda/src/nvrtc.rs",
        "cuda/src/attention/cudnn.rs",
        "cuda/src/libraries.rs",
        "cuda/src/host.rs",
    ];
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut problems = Vec::new();
    for path in sources().iter().filter(|p| !is_test(p) && !p.ends_with("tidy.rs")) {
        let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
        let uses =
            production_lines(path).iter().any(|(_, l)| l.contains("unsafe {") || l.contains("unsafe impl") || l.contains("unsafe fn"));
        if uses && !ALLOWED.contains(&name.as_str()) {
            problems.push(format!("{name}: unsafe code outside the files that are meant for it"));
        }
    }
    report(&problems);
}

#[test]
fn no_placeholder_is_left() {
    let words = ["todo!(", "unimplemented!(", "FIXME", "XXX"];
    let mut problems = Vec::new();
    for path in sources().iter().filter(|p| !p.ends_with("tidy.rs")) {
        for (number, line) in std::fs::read_to_string(path).unwrap().lines().enumerate() {
            if words.iter().any(|w| line.contains(w)) {
                problems.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    report(&problems);
}
