//! Who is making which entry: several encoders may fill one cache folder, on one machine or on several with shared storage.
//!
//! Entries are written whole and named by content, so two encoders can never spoil each other's work; claims only keep them from doing the
//! same work twice. A claim is a file `claims/<key>.claim`, created exclusively, that names its owner's session; a session is a file
//! `claims/<session>.session` whose content is rewritten every [`BEAT`]. A claim counts for nothing when its session is gone, when its
//! process on this machine is gone, or when the session has not beaten for [`SILENCE_MAX`] by the file system's own clock. A claim that is taken away
//! from a living owner by mistake costs time, nothing else.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use super::Key;
use crate::atomic_file::host_id;
use crate::error::{Error, Result};

/// Folder of claims in the cache folder.
pub const CLAIMS_FOLDER: &str = "claims";
/// Time between two signs of life of a session.
pub const BEAT: Duration = Duration::from_secs(5);
/// Silence after which a session on another machine is taken for dead.
pub const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Ending of claim files.
const CLAIM: &str = "claim";
/// Ending of session files.
const SESSION: &str = "session";

/// This process's claims. Dropping it gives all of them up.
#[derive(Debug)]
pub struct Claims {
    folder: PathBuf,
    session: String,
    stop: Arc<AtomicBool>,
    beater: Option<JoinHandle<()>>,
}

/// The outcome of [`Claims::claim`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// This process is to make the entry.
    Mine,
    /// A living process makes it.
    Busy,
}

impl Claims {
    /// Opens a session in `cache_dir`.
    ///
    /// # Errors
    /// As creating a file in the cache folder.
    pub fn open(cache_dir: &Path) -> Result<Self> {
        use std::sync::atomic::AtomicU64;
        static COUNT: AtomicU64 = AtomicU64::new(0);
        // Relaxed: a counter for unique names.
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let session = format!("{}-{pid}-{}-{count}", host_id(), started(pid).unwrap_or_default());
        let folder = cache_dir.join(CLAIMS_FOLDER);
        let file = folder.join(format!("{session}.{SESSION}"));
        beat(&file).map_err(|e| Error::io("cannot open a session in the cache folder", &folder, e))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let beater = std::thread::Builder::new().name("claims".into()).spawn(move || {
            // Relaxed: a lone flag; unparking orders it.
            while !stopped.load(Ordering::Relaxed) {
                std::thread::park_timeout(BEAT);
                // A beat that fails makes others repeat our work; the next write of an entry will report what is wrong. After the
                // stop nothing may be written: the files are being removed.
                // Relaxed: as above.
                if !stopped.load(Ordering::Relaxed) {
                    let _ = beat(&file);
                }
            }
        });
        let beater = beater.map_err(|e| Error::absent("cannot start a thread").cause(e))?;
        Ok(Self { folder, session, stop, beater: Some(beater) })
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.folder.join(format!("{key}.{CLAIM}"))
    }

    /// Tries to claim the entry of that name.
    ///
    /// # Errors
    /// As creating a file in the cache folder.
    pub fn claim(&self, key: &Key) -> Result<Claim> {
        let path = self.path(key);
        for _ in 0..3 {
            match File::options().write(true).create_new(true).open(&path) {
                Ok(mut file) => {
                    file.write_all(self.session.as_bytes()).map_err(|e| Error::io("cannot write the claim", &path, e))?;
                    return Ok(Claim::Mine);
                }
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                    let owner = std::fs::read_to_string(&path).unwrap_or_default();
                    if owner == self.session {
                        return Ok(Claim::Mine);
                    }
                    if self.lives(&owner, &path) {
                        return Ok(Claim::Busy);
                    }
                    self.take_away(&path, &owner);
                }
                // Another process has just tidied up after itself.
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    std::fs::create_dir_all(&self.folder).map_err(|e| Error::io("cannot create the folder", &self.folder, e))?;
                }
                Err(e) => return Err(Error::io("cannot claim an entry", &path, e)),
            }
        }
        // Several processes were taking away the same dead claim: one of them has it now.
        Ok(Claim::Busy)
    }

    /// Gives a claim of this session up.
    pub fn release(&self, key: &Key) {
        // If it was taken away, it is another session's.
        let path = self.path(key);
        if std::fs::read_to_string(&path).is_ok_and(|owner| owner == self.session) {
            let _ = std::fs::remove_file(path);
        }
    }

    fn now(&self) -> SystemTime {
        modified(&self.folder.join(format!("{}.{SESSION}", self.session))).unwrap_or_else(SystemTime::now)
    }

    /// Whether the session that wrote `claim` goes on.
    fn lives(&self, owner: &str, claim: &Path) -> bool {
        if owner.is_empty() {
            // Created, not yet written: alive unless it stays so.
            return modified(claim).is_some_and(|at| self.now().duration_since(at).unwrap_or_default() < SILENCE_MAX);
        }
        session_lives(&self.folder, owner, self.now())
    }

    /// Removes a dead session's claim without removing a living one that has just taken its place.
    fn take_away(&self, path: &Path, dead: &str) {
        let aside = self.folder.join(format!("{}.stolen", self.session));
        if std::fs::rename(path, &aside).is_err() {
            return;
        }
        if std::fs::read_to_string(&aside).is_ok_and(|owner| owner != dead) {
            // Not the one that was looked at: give it back, unless a third has claimed meanwhile.
            let _ = std::fs::hard_link(&aside, path);
        }
        let _ = std::fs::remove_file(&aside);
    }
}

impl Drop for Claims {
    fn drop(&mut self) {
        // Relaxed: see the beater.
        self.stop.store(true, Ordering::Relaxed);
        if let Some(beater) = self.beater.take() {
            beater.thread().unpark();
            let _ = beater.join();
        }
        for path in files(&self.folder) {
            if has_ending(&path, CLAIM) && std::fs::read_to_string(&path).is_ok_and(|owner| owner == self.session) {
                let _ = std::fs::remove_file(path);
            }
        }
        let _ = std::fs::remove_file(self.folder.join(format!("{}.{SESSION}", self.session)));
        // Succeeds for the last one out.
        let _ = std::fs::remove_dir(&self.folder);
    }
}

/// Removes the claims and sessions of dead processes; the number of files removed, and of claims that living ones hold.
pub(super) fn sweep(cache_dir: &Path, remove: bool) -> (usize, usize) {
    let folder = cache_dir.join(CLAIMS_FOLDER);
    let (mut dead, mut living) = (Vec::new(), 0);
    for path in files(&folder) {
        let owner = if has_ending(&path, SESSION) {
            path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
        } else {
            std::fs::read_to_string(&path).unwrap_or_default()
        };
        if session_lives(&folder, &owner, SystemTime::now()) {
            living += usize::from(has_ending(&path, CLAIM));
        } else {
            dead.push(path);
        }
    }
    if remove {
        dead.iter().for_each(|path| drop(std::fs::remove_file(path)));
        let _ = std::fs::remove_dir(&folder);
    }
    (dead.len(), living)
}

fn has_ending(path: &Path, ending: &str) -> bool {
    path.extension().is_some_and(|e| e == ending)
}

fn files(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).map(|all| all.filter_map(|e| e.ok().map(|e| e.path())).collect()).unwrap_or_default()
}

fn session_lives(folder: &Path, session: &str, now: SystemTime) -> bool {
    let mut parts = session.split('-');
    if parts.next() == Some(&host_id()) {
        let pid = parts.next().and_then(|p| p.parse().ok());
        let start = parts.next().and_then(|s| s.parse::<u64>().ok());
        if pid.is_none_or(|pid| started(pid) != start) {
            return false;
        }
    }
    let beat = modified(&folder.join(format!("{session}.{SESSION}")));
    beat.is_some_and(|at| now.duration_since(at).unwrap_or_default() < SILENCE_MAX)
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|m| m.modified()).ok()
}

/// Writes rather than sets a time: the time is then the file system's, which all machines see alike.
fn beat(file: &Path) -> std::io::Result<()> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(file, b"alive\n")
}

/// Start time of a process of this machine, in ticks since the machine's start: with the id, it names a process.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn key(n: u8) -> Key {
        Key::from_bytes([n; 32])
    }

    #[test]
    fn an_entry_has_one_maker_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (Claims::open(dir.path()).unwrap(), Claims::open(dir.path()).unwrap());
        assert_eq!(a.claim(&key(1)).unwrap(), Claim::Mine);
        assert_eq!(a.claim(&key(1)).unwrap(), Claim::Mine);
        assert_eq!(b.claim(&key(1)).unwrap(), Claim::Busy);
        assert_eq!(b.claim(&key(2)).unwrap(), Claim::Mine);
        b.release(&key(1));
        assert_eq!(b.claim(&key(1)).unwrap(), Claim::Busy, "another's claim cannot be released");
        drop(a);
        assert_eq!(b.claim(&key(1)).unwrap(), Claim::Mine);
        assert_eq!(sweep(dir.path(), true), (0, 2));
        drop(b);
        assert!(!dir.path().join(CLAIMS_FOLDER).exists());
    }

    #[test]
    fn claims_of_the_dead_count_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join(CLAIMS_FOLDER);
        let claims = Claims::open(dir.path()).unwrap();
        let write = |n: u8, session: &str, beats: bool| {
            std::fs::write(folder.join(format!("{}.{CLAIM}", key(n))), session).unwrap();
            if beats {
                beat(&folder.join(format!("{session}.{SESSION}"))).unwrap();
            }
        };
        let pid = std::process::id();
        // This machine: a process of that id with another start, and one whose session file is gone.
        write(1, &format!("{}-{pid}-1-0", host_id()), true);
        write(2, &format!("{}-{pid}-{}-99", host_id(), started(pid).unwrap()), false);
        // Another machine: one that has fallen silent, and one that is alive.
        write(3, "elsewhere-1-1-0", true);
        let past = SystemTime::now() - 2 * SILENCE_MAX;
        File::options().write(true).open(folder.join(format!("elsewhere-1-1-0.{SESSION}"))).unwrap().set_modified(past).unwrap();
        write(4, "elsewhere-2-1-0", true);
        let states = [1, 2, 3, 4].map(|n| claims.claim(&key(n)).unwrap());
        assert_eq!(states, [Claim::Mine, Claim::Mine, Claim::Mine, Claim::Busy]);
    }

    #[test]
    fn of_many_that_steal_one_dead_claim_one_gets_it() {
        let dir = tempfile::tempdir().unwrap();
        let all: Vec<Claims> = (0..8).map(|_| Claims::open(dir.path()).unwrap()).collect();
        for round in 0..20 {
            std::fs::write(dir.path().join(CLAIMS_FOLDER).join(format!("{}.{CLAIM}", key(round))), "elsewhere-1-1-0").unwrap();
            let mine = std::sync::atomic::AtomicUsize::new(0);
            std::thread::scope(|scope| {
                for claims in &all {
                    scope.spawn(|| {
                        if claims.claim(&key(round)).unwrap() == Claim::Mine {
                            // Relaxed: counted after the scope has joined.
                            mine.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
            });
            // Relaxed: the threads are joined.
            assert!(mine.load(Ordering::Relaxed) <= 1);
        }
    }
}
