//! `serenity-encoder cache`: what lies in a cache folder, whether it is whole, and what nobody needs any more.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serenity_protocol::cache::{CachePlan, Check, EntryInfo, entries, leftovers};
use serenity_protocol::config::Config;
use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result, dataset, model_path};

/// Corrupt entries named in one message.
const NAMED_MAX: usize = 10;

/// An entry as `list` prints it.
#[derive(Debug, Serialize)]
pub struct Listed {
    /// `text` or `latent`.
    pub kind: &'static str,
    /// File.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Whether the configuration's run uses it.
    pub used: bool,
    /// Start of the caption of an embedding; size in tokens of a latent.
    pub what: String,
}

/// What `prune` removed, or would remove.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pruned {
    /// Entries that the run does not use.
    pub entries: usize,
    /// Corrupt entries that were set aside, and files of dead writers.
    pub leftovers: usize,
    /// Claims of dead processes.
    pub claims: usize,
    /// Bytes of the removed files.
    pub bytes: u64,
}

fn plan(config: &Config) -> Result<CachePlan> {
    let samples = dataset::scan(&config.data)?;
    CachePlan::with_check(config, &model_path::resolve(&config.model)?, &samples, Check::Shallow)
}

fn used(plan: &CachePlan) -> HashSet<&Path> {
    plan.text.iter().map(|t| &*t.path).chain(plan.latents.iter().map(|l| &*l.path)).collect()
}

fn description(entry: &EntryInfo) -> String {
    let Some(notes) = entry.notes() else { return "corrupt".to_string() };
    let note = |name: &str| notes.get(name).cloned().unwrap_or_default();
    match notes.get("caption") {
        Some(caption) => format!("{} tokens, {caption:?}", note("real_tokens")),
        None => format!("{} x {} tokens", note("width"), note("height")),
    }
}

/// All entries of the configuration's cache folder.
///
/// # Errors
/// As planning a run, and reading the folder.
pub fn list(config: &Config) -> Result<Vec<Listed>> {
    let plan = plan(config)?;
    let used = used(&plan);
    let listed =
        |e: EntryInfo| Listed { kind: e.kind.name(), used: used.contains(&*e.path), what: description(&e), bytes: e.bytes, path: e.path };
    Ok(entries(&config.data.cache_dir)?.into_iter().map(listed).collect())
}

/// Reads every entry of the folder; corrupt ones are set aside, so that the next run makes them again. The number of whole entries.
///
/// # Errors
/// [`Error::Data`] naming the corrupt entries; [`Error::Absent`] if others cannot be read, which stay; [`Error::TryAgain`] when asked to stop.
pub fn verify(config: &Config, process: &Process) -> Result<usize> {
    let all = entries(&config.data.cache_dir)?;
    let (mut whole, mut corrupt, mut unread) = (0, Vec::new(), Vec::new());
    for entry in &all {
        process.tick();
        if process.stop_requested() {
            return Err(process.interrupted());
        }
        match entry.verify() {
            Ok(()) => whole += 1,
            // Pruned, or set aside by another, since the folder was listed.
            Err(_) if !entry.path.exists() => {}
            Err(e @ Error::Data(_)) => {
                let aside = entry.path.with_extension("corrupt");
                std::fs::rename(&entry.path, &aside).map_err(|e| Error::io("cannot set a corrupt entry aside", &entry.path, e))?;
                corrupt.push(e);
            }
            Err(e) => unread.push(e),
        }
    }
    let named = |errors: &[Error]| errors.iter().take(NAMED_MAX).map(ToString::to_string).collect::<Vec<_>>().join("\n");
    if corrupt.is_empty() && unread.is_empty() {
        return Ok(whole);
    }
    if corrupt.is_empty() {
        return Err(Error::absent(format!("{} of {} entries cannot be read, and stay as they are", unread.len(), all.len()))
            .at(&config.data.cache_dir)
            .cause(named(&unread)));
    }
    let count = corrupt.len();
    corrupt.append(&mut unread);
    Err(Error::data(format!("{count} of {} entries are corrupt and were set aside", all.len()))
        .at(&config.data.cache_dir)
        .cause(named(&corrupt))
        .advice("run the encoder: it makes them again"))
}

/// Removes what the configuration's run does not use; with `dry_run`, only counts it. Entries that a running encoder is making stay.
///
/// # Errors
/// As planning a run; a file that cannot be removed.
pub fn prune(config: &Config, dry_run: bool) -> Result<Pruned> {
    let plan = plan(config)?;
    let used = used(&plan);
    let left = leftovers(&config.data.cache_dir, !dry_run)?;
    let mut pruned = Pruned { leftovers: left.files.len(), claims: left.dead_claims, ..Pruned::default() };
    let mut doomed = left.files;
    for entry in entries(&config.data.cache_dir)?.into_iter().filter(|e| !used.contains(&*e.path)) {
        pruned.entries += 1;
        doomed.push(entry.path);
    }
    for path in doomed {
        pruned.bytes += std::fs::metadata(&path).map_or(0, |m| m.len());
        if !dry_run {
            std::fs::remove_file(&path).map_err(|e| Error::io("cannot remove the file", &path, e))?;
        }
    }
    Ok(pruned)
}

/// Prints what `list` found.
///
/// # Errors
/// [`Error::Invariant`] if it cannot be written as JSON.
pub fn print(listed: &[Listed], json: bool) -> Result<()> {
    if json {
        let text = serde_json::to_string(listed).map_err(|e| Error::invariant("the list cannot be written").cause(e))?;
        println!("{text}");
        return Ok(());
    }
    for e in listed {
        let name = e.path.file_stem().unwrap_or_default().to_string_lossy();
        println!(
            "{:<6} {} {:>10} {:<6} {}",
            e.kind,
            name.get(..16).unwrap_or(&name),
            e.bytes,
            if e.used { "used" } else { "unused" },
            e.what
        );
    }
    println!(
        "{} entries, {} bytes, {} used",
        listed.len(),
        listed.iter().map(|e| e.bytes).sum::<u64>(),
        listed.iter().filter(|e| e.used).count()
    );
    Ok(())
}
