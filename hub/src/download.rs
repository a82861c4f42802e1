//! Downloads what is needed of a repository, checks it, and publishes the revision.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use hf_hub::{Repo, RepoType};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serenity_protocol::message::FromChild;
use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result, atomic_file};
use sha2::{Digest, Sha256};

use crate::cache::{HubCache, HubId, UNCHECKED, token};
use crate::explain::{explain, explained, may_pass};

/// Attempts without a single new byte before a file is given up.
const ATTEMPTS: u32 = 5;
/// Wait before the second attempt; doubled for each further one.
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// How often the person, the launcher and the stop flag are looked after.
const POLL: Duration = Duration::from_millis(100);
/// A transfer that brings nothing for this long is given up; the crate itself would wait for ever.
const STALLED: Duration = Duration::from_secs(120);
/// Bytes hashed at once.
const HASH_BYTES: usize = 1 << 20;

/// The hub's description of a repository.
#[derive(Deserialize)]
struct Description {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize, Clone)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize, Clone)]
struct Lfs {
    sha256: String,
    size: u64,
}

impl Sibling {
    fn bytes(&self) -> Option<u64> {
        self.lfs.as_ref().map(|l| l.size).or(self.size)
    }
}

/// Downloads the files of `folders` (and the pipeline's index) of the newest revision.
pub(crate) fn download(cache: &HubCache, id: &HubId, folders: &[&str], process: &Process) -> Result<()> {
    let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|e| !e.is_empty()).unwrap_or_else(|| "https://huggingface.co".into());
    let endpoint = endpoint.trim_end_matches('/').to_owned();
    let api = ApiBuilder::new()
        .with_endpoint(endpoint.clone())
        .with_cache_dir(cache.root().to_path_buf())
        .with_token(token())
        .with_progress(false)
        .with_user_agent("serenity", env!("CARGO_PKG_VERSION"))
        .build();
    let api = explained(api, id, &endpoint, "the hub's address")?;
    let description = describe(&api, id, &endpoint)?;
    let needed = needed(&description, id, folders)?;
    let total: u64 = needed.iter().filter_map(Sibling::bytes).sum();
    check_free_space(cache, id, &needed)?;
    let work = Arc::new(Work::default());
    let (done, finished) = mpsc::channel();
    let job = Job {
        repo: revision(&api, id, &description.sha),
        id: id.clone(),
        endpoint,
        repository: cache.repository(id),
        sha: description.sha.clone(),
        work: work.clone(),
        process: process.clone(),
    };
    // On a thread of its own, because a transfer cannot be interrupted: the part file is taken up again by the next run.
    std::thread::spawn(move || {
        // Nobody listens after an interruption.
        let _ = done.send(job.run(&needed));
    });
    watch(&work, total, &finished, id, process)?;
    // The revision counts from now on.
    let reference = cache.repository(id).join("refs/main");
    atomic_file::write(&reference, description.sha.as_bytes())
}

fn describe(api: &Api, id: &HubId, endpoint: &str) -> Result<Description> {
    let what = format!("model '{id}'");
    let mut wait = FIRST_WAIT;
    for attempt in 1.. {
        let answer = api.model(id.to_string()).info_request().query("blobs", "true").call();
        match answer {
            Ok(mut response) => {
                let text = response.body_mut().read_to_vec().map_err(|e| explain(id, endpoint, &what, Box::new(e).into()))?;
                let description: Description = serde_json::from_slice(&text).map_err(|e| {
                    Error::absent(format!("the answer for {what} is not that of a model hub"))
                        .at(endpoint)
                        .cause(e)
                        .advice("check HF_ENDPOINT")
                })?;
                let plain = !description.sha.is_empty() && description.sha.bytes().all(|c| c.is_ascii_alphanumeric());
                return if plain {
                    Ok(description)
                } else {
                    Err(Error::data("the hub names an impossible revision").at(endpoint).found(description.sha))
                };
            }
            Err(error) => {
                let error = Box::new(error).into();
                if attempt == ATTEMPTS || !may_pass(&error) {
                    return Err(explain(id, endpoint, &what, error));
                }
                std::thread::sleep(wait);
                wait *= 2;
            }
        }
    }
    Err(Error::invariant("the attempts ran out"))
}

/// A repository at one revision, so that a push in the middle of the download cannot mix two.
fn revision(api: &Api, id: &HubId, sha: &str) -> ApiRepo {
    api.repo(Repo::with_revision(id.to_string(), RepoType::Model, sha.to_owned()))
}

/// The files to fetch, small ones first: a mistake in them shows before hours of transfer.
fn needed(description: &Description, id: &HubId, folders: &[&str]) -> Result<Vec<Sibling>> {
    let wanted = |name: &str| {
        let safe = name.split('/').all(|part| !part.is_empty() && !part.starts_with('.') && !part.contains(['\\', '\0']));
        let useful = [".safetensors", ".json", ".model", ".txt", ".jinja"].iter().any(|e| name.ends_with(e));
        let in_folder = name.split_once('/').is_some_and(|(folder, rest)| folders.contains(&folder) && !rest.contains('/'));
        safe && useful && (name == "model_index.json" || in_folder)
    };
    let mut files: Vec<Sibling> = description.siblings.iter().filter(|s| wanted(&s.rfilename)).cloned().collect();
    files.sort_by(|a, b| (a.bytes(), &a.rfilename).cmp(&(b.bytes(), &b.rfilename)));
    if !description.siblings.iter().any(|f| f.rfilename.starts_with("transformer/")) {
        return Err(Error::absent(format!("the repository '{id}' has no folder 'transformer' in the diffusers layout"))
            .advice("a single-file checkpoint is downloaded by hand and given by its path"));
    }
    Ok(files)
}

fn check_free_space(cache: &HubCache, id: &HubId, needed: &[Sibling]) -> Result<()> {
    std::fs::create_dir_all(cache.root()).map_err(|e| Error::io("cannot create the hub cache", cache.root(), e))?;
    let blobs = cache.repository(id).join("blobs");
    let have = |f: &Sibling| {
        let length = |name: String| std::fs::metadata(blobs.join(name)).map_or(0, |m| m.len());
        f.lfs.as_ref().map_or(0, |l| length(l.sha256.clone()).max(length(format!("{}.part", l.sha256))))
    };
    let missing: u64 = needed.iter().map(|f| f.bytes().unwrap_or(0).saturating_sub(have(f))).sum();
    let free = free_bytes(cache.root())?;
    if free < missing {
        return Err(Error::try_again("the disk has too little free space for the model")
            .at(cache.root())
            .expected(format!("{missing} bytes ({:.1} GiB)", missing as f64 / f64::from(1 << 30)))
            .found(format!("{free} bytes free"))
            .advice("free some space, or set HF_HOME to a folder on a larger disk, and run the same command again"));
    }
    Ok(())
}

fn free_bytes(folder: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(folder).map_err(|e| Error::io("cannot ask for the free space", folder, e.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Shows the progress, ticks, and ends early when asked to.
fn watch(work: &Work, total: u64, finished: &mpsc::Receiver<Result<()>>, id: &HubId, process: &Process) -> Result<()> {
    let bar = (std::io::stderr().is_terminal() && !process.has_launcher()).then(|| {
        let bar = ProgressBar::new(total);
        let template = "{msg} {wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} eta {eta}";
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message(id.to_string());
        bar
    });
    let mut before = u64::MAX;
    let (mut acts, mut since) = (0, Instant::now());
    loop {
        let outcome = finished.recv_timeout(POLL);
        let bytes = work.bytes();
        if let Some(bar) = &bar {
            bar.set_position(bytes);
        }
        if work.acts() != acts {
            (acts, since) = (work.acts(), Instant::now());
        } else if since.elapsed() > STALLED {
            return Err(Error::try_again(format!("the transfer from the hub stalled for {} s", STALLED.as_secs()))
                .advice("run the same command again: what is downloaded is kept"));
        }
        // Bytes that stand still are no progress: a hung transfer must look hung.
        if bytes != before {
            process.send(&FromChild::Work { unit: "bytes".into(), done: bytes, total });
            before = bytes;
        }
        match outcome {
            Ok(result) => return result,
            Err(mpsc::RecvTimeoutError::Timeout) if process.stop_requested() => return Err(process.interrupted()),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => return Err(Error::invariant("the download's thread panicked")),
        }
    }
}

/// Counters that the person sees.
#[derive(Default)]
struct Work {
    /// Bytes of finished files.
    finished: AtomicU64,
    /// Bytes of the current one.
    current: AtomicU64,
    /// Grows with every piece received or compared.
    acts: AtomicU64,
}

// Relaxed throughout: two numbers for a display; nothing is read because of them.
impl Work {
    fn bytes(&self) -> u64 {
        self.finished.load(Ordering::Relaxed) + self.current.load(Ordering::Relaxed) // Relaxed: see above.
    }
    fn act(&self) {
        self.acts.fetch_add(1, Ordering::Relaxed); // Relaxed: see above.
    }
    fn acts(&self) -> u64 {
        self.acts.load(Ordering::Relaxed) // Relaxed: see above.
    }
    fn end_file(&self, bytes: u64) {
        self.current.store(0, Ordering::Relaxed); // Relaxed: see above.
        self.finished.fetch_add(bytes, Ordering::Relaxed); // Relaxed: see above.
    }
}

/// hf-hub's view of [`Work`].
struct Meter(Arc<Work>);

impl hf_hub::api::Progress for Meter {
    fn init(&mut self, _size: usize, _filename: &str) {
        self.0.current.store(0, Ordering::Relaxed); // Relaxed: see Work.
    }
    fn update(&mut self, size: usize) {
        self.0.current.fetch_add(size as u64, Ordering::Relaxed); // Relaxed: see Work.
        self.0.act();
    }
    fn finish(&mut self) {}
}

struct Job {
    repo: ApiRepo,
    id: HubId,
    endpoint: String,
    repository: PathBuf,
    sha: String,
    work: Arc<Work>,
    process: Process,
}

impl Job {
    fn run(&self, needed: &[Sibling]) -> Result<()> {
        for file in needed {
            self.fetch(file)?;
            self.work.end_file(file.bytes().unwrap_or(0));
        }
        // The crate notes every revision that it touches; `refs/main` is what counts.
        remove(&self.repository.join("refs").join(&self.sha))
    }

    /// Makes `file` appear in the snapshot, downloaded and compared.
    fn fetch(&self, file: &Sibling) -> Result<()> {
        let link = self.repository.join("snapshots").join(&self.sha).join(&file.rfilename);
        let Some(blob) = self.blob(file) else {
            // A small file that the hub names by a git hash: its size is what is compared.
            if !(link.is_file() && self.is_right(&link, file)?) {
                remove(&link)?;
                self.transfer(file, None)?;
                self.refuse_if_wrong(file, &link)?;
            }
            return Ok(());
        };
        let mark = blob.with_extension(UNCHECKED);
        if blob.is_file() && mark.is_file() && !self.is_right(&blob, file)? {
            remove(&blob)?;
        }
        if !blob.is_file() {
            atomic_file::write(&mark, b"")?;
            self.transfer(file, Some(&blob.with_extension("part")))?;
            self.refuse_if_wrong(file, &link)?;
        } else if !link.is_file() {
            self.link(&blob, &link)?;
        }
        remove(&mark)
    }

    /// Where a file lies whose content the hub names by its SHA-256.
    fn blob(&self, file: &Sibling) -> Option<PathBuf> {
        let sha256 = &file.lfs.as_ref()?.sha256;
        let plain = sha256.len() == 64 && sha256.bytes().all(|c| c.is_ascii_hexdigit());
        plain.then(|| self.repository.join("blobs").join(sha256))
    }

    /// The link of a blob that another revision brought, relative like the crate's own.
    fn link(&self, blob: &Path, link: &Path) -> Result<()> {
        remove(link)?;
        let up = "../".repeat(
            2 + Path::new(link).strip_prefix(self.repository.join("snapshots").join(&self.sha)).map_or(1, |p| p.components().count()) - 1,
        );
        let target = PathBuf::from(up).join("blobs").join(blob.file_name().unwrap_or_default());
        let folder = link.parent().unwrap_or(Path::new(""));
        std::fs::create_dir_all(folder)
            .and_then(|()| std::os::unix::fs::symlink(target, link))
            .map_err(|e| Error::io("cannot link a file of the model", link, e))
    }

    /// The crate's transfer, as often as it makes progress, and a few times when it does not.
    fn transfer(&self, file: &Sibling, part: Option<&Path>) -> Result<()> {
        let what = format!("file '{}' of '{}'", file.rfilename, self.id);
        let length = || part.and_then(|p| std::fs::metadata(p).ok()).map_or(0, |m| m.len());
        let (mut idle, mut wait) = (0, FIRST_WAIT);
        loop {
            if let Some(part) = part {
                mend_part(part, file)?;
            }
            let before = length();
            let error = match self.repo.download_with_progress(&file.rfilename, Meter(self.work.clone())) {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            if length() > before {
                (idle, wait) = (0, FIRST_WAIT);
            }
            idle += 1;
            if idle >= ATTEMPTS || !may_pass(&error) {
                return Err(explain(&self.id, &self.endpoint, &what, error));
            }
            tracing::warn!("{what}: {error}; trying again");
            std::thread::sleep(wait);
            wait *= 2;
        }
    }

    /// Removes a downloaded file that is not what it should be.
    fn refuse_if_wrong(&self, file: &Sibling, link: &Path) -> Result<()> {
        let blob = link.canonicalize().map_err(|e| Error::io("cannot find the downloaded file", link, e))?;
        if self.is_right(&blob, file)? {
            return Ok(());
        }
        let length = std::fs::metadata(&blob).map_or(0, |m| m.len());
        remove(link)?;
        remove(&blob)?;
        if let Some(blob) = self.blob(file) {
            remove(&blob.with_extension(UNCHECKED))?;
        }
        let hash = file.lfs.as_ref().map_or(String::new(), |l| format!(" with SHA-256 {}", l.sha256));
        Err(Error::data(format!(
            "the downloaded file '{}' of '{}' is not what the hub says it is; it was removed",
            file.rfilename, self.id
        ))
        .at(link)
        .expected(format!("{} bytes{hash}", file.bytes().unwrap_or(0)))
        .found(format!("{length} bytes of another content"))
        .advice("run the same command again; if it happens again, something between here and the hub changes files"))
    }

    /// Compares size and, where the hub states it, SHA-256.
    fn is_right(&self, path: &Path, file: &Sibling) -> Result<bool> {
        let io = |e| Error::io("cannot read the downloaded file", path, e);
        let mut source = File::open(path).map_err(io)?;
        let length = source.metadata().map_err(io)?.len();
        let Some(lfs) = &file.lfs else { return Ok(file.size.is_none_or(|size| size == length)) };
        if length != lfs.size {
            return Ok(false);
        }
        let mut hash = Sha256::new();
        let mut buffer = vec![0; HASH_BYTES];
        loop {
            let read = source.read(&mut buffer).map_err(io)?;
            if read == 0 {
                break;
            }
            hash.update(buffer.get(..read).unwrap_or_default());
            self.process.tick();
            self.work.act();
        }
        let found: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        Ok(found.eq_ignore_ascii_case(&lfs.sha256))
    }
}

/// Brings an unfinished file into a state that the crate can go on from: one byte short of its size at most, never beyond it.
fn mend_part(part: &Path, file: &Sibling) -> Result<()> {
    let (Ok(meta), Some(size)) = (std::fs::metadata(part), file.bytes()) else { return Ok(()) };
    if meta.len() > size {
        return remove(part);
    }
    if meta.len() == size && size > 0 {
        // All bytes came and the rename did not: a request for zero bytes would be refused.
        let cut = File::options().write(true).open(part).and_then(|f| f.set_len(size - 1));
        cut.map_err(|e| Error::io("cannot shorten the unfinished file", part, e))?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("cannot remove the file", path, e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn folders_that_a_slab_stands_for_are_left_out_and_other_repositories_are_refused() {
        let file = |name: &str, size: u64| Sibling { rfilename: name.into(), size: Some(size), lfs: None };
        let of = |names: &[(&str, u64)]| Description { sha: "0".into(), siblings: names.iter().map(|(n, s)| file(n, *s)).collect() };
        let id = HubId::parse("owner/name").unwrap();
        let model = [
            ("transformer/a.safetensors", 9),
            ("text_encoder/b.safetensors", 8),
            ("vae/c.safetensors", 7),
            ("vae/config.json", 1),
            ("model_index.json", 2),
            ("vae/deeper/d.json", 1),
            ("../vae/e.json", 1),
            ("vae/picture.png", 1),
        ];
        let found = needed(&of(&model), &id, &["vae", "tokenizer"]).unwrap();
        let names: Vec<&str> = found.iter().map(|f| f.rfilename.as_str()).collect();
        assert_eq!(names, ["vae/config.json", "model_index.json", "vae/c.safetensors"]);
        let error = needed(&of(&[("flux.safetensors", 5), ("vae/c.safetensors", 7)]), &id, &["vae"]).err().unwrap();
        assert!(error.exit_code() == 69 && error.to_string().contains("no folder 'transformer'"), "{error}");
    }
}
