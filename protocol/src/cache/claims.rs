//! Who is making which entry: several encoders may fill one cache folder, on one machine or on several with shared storage.
//!
//! Entries are written whole and named by content, so two encoders can never spoil each other's work; claims only keep them from doing the
//! same work twice. A claim is a file `claims/<key>.claim` that names its owner's session; a session is a file
//! `claims/<session>.session` whose content is rewritten every [`BEAT`]. A claim counts for nothing when its session is gone, when its
//! process on this machine is gone, or when the session has not beaten for [`SILENCE_MAX`] by the file system's own clock.
//!
//! Nobody sees a claim without its owner: it is made as a hard link to the session's own `.name` file, which is exclusive and has its
//! content from the start, on shared storage too. And a claim of session D is replaced or removed only by whoever owns its `.heir` file,
//! whose name follows from the claim and from D: an heir looks again, finds D still there, and then nobody else changes it. The heir file
//! is itself claimed in this way, so that a dead heir has an heir. What remains is an owner that was taken for dead and lives (a machine
//! that stood still for a minute): then two make one entry, which costs time, nothing else.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
/// Ending of the files that say who may replace or remove a claim.
const HEIR: &str = "heir";
/// Ending of the files that claims are links to.
const NAME: &str = "name";
/// Heirs of heirs that are followed: each has died in the microseconds in which it held an heir file.
const HEIRS_MAX: u32 = 16;

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
        static COUNT: AtomicU64 = AtomicU64::new(0);
        // Relaxed: a counter for unique names.
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let session = format!("{}-{pid}-{}-{count}", host_id(), started(pid).unwrap_or_default());
        let folder = cache_dir.join(CLAIMS_FOLDER);
        let file = folder.join(format!("{session}.{SESSION}"));
        beat(&file)
            .and_then(|()| write(&folder.join(format!("{session}.{NAME}")), session.as_bytes()))
            .map_err(|e| Error::io("cannot open a session in the cache folder", &folder, e))?;
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
        match self.take(&path, HEIRS_MAX) {
            Ok(true) => Ok(Claim::Mine),
            Ok(false) => Ok(Claim::Busy),
            Err(e) => Err(Error::io("cannot claim an entry", path, e)),
        }
    }

    /// Gives a claim of this session up.
    pub fn release(&self, key: &Key) {
        self.give_up(&self.path(key));
    }

    /// Removes a claim file of this session. If it was taken away, it is another session's.
    fn give_up(&self, claim: &Path) {
        if std::fs::read_to_string(claim).is_ok_and(|owner| owner == self.session) {
            self.inherit(claim, &self.session, |claim| std::fs::remove_file(claim));
        }
    }

    /// Makes `file` this session's, unless a living session has it; whether it is ours now.
    fn take(&self, file: &Path, heirs: u32) -> std::io::Result<bool> {
        for _ in 0..3 {
            match self.link(file) {
                Ok(()) => return Ok(true),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e),
            }
            let owner = match std::fs::read_to_string(file) {
                Ok(owner) => owner,
                // Given up meanwhile.
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            };
            if owner == self.session {
                return Ok(true);
            }
            if heirs == 0 || self.lives(&owner, file) {
                return Ok(false);
            }
            let heir = heir(file, &owner);
            if !self.take(&heir, heirs - 1)? {
                // Another is taking it over.
                return Ok(false);
            }
            let replaced = if holds(file, &owner) { self.replace(file).map(|()| true) } else { Ok(false) };
            let _ = std::fs::remove_file(&heir);
            if replaced? {
                return Ok(true);
            }
        }
        // Given up and taken again each time that we looked.
        Ok(false)
    }

    /// Does `change` to a file of session `owner` as the only one that may; nothing if another is at it, or if it is not `owner`'s any more.
    fn inherit(&self, file: &Path, owner: &str, change: impl FnOnce(&Path) -> std::io::Result<()>) {
        let heir = heir(file, owner);
        if self.take(&heir, HEIRS_MAX).is_ok_and(|ours| ours) {
            if holds(file, owner) {
                let _ = change(file);
            }
            let _ = std::fs::remove_file(heir);
        }
    }

    fn name_file(&self) -> PathBuf {
        self.folder.join(format!("{}.{NAME}", self.session))
    }

    /// Creates `file` with this session's name in it; `AlreadyExists` if it is there.
    fn link(&self, file: &Path) -> std::io::Result<()> {
        let name = self.name_file();
        for _ in 0..3 {
            match std::fs::hard_link(&name, file) {
                // Somebody emptied the folder, or the file has as many links as the file system allows: a new one takes its place.
                Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::TooManyLinks) => {
                    let fresh = self.unique();
                    write(&fresh, self.session.as_bytes())?;
                    std::fs::rename(&fresh, &name)?;
                }
                // A file system without hard links. A reader may see the file before its content: see `lives`.
                Err(e) if matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::Unsupported) => {
                    return File::options().write(true).create_new(true).open(file)?.write_all(self.session.as_bytes());
                }
                other => return other,
            }
        }
        Err(std::io::Error::from(ErrorKind::NotFound))
    }

    /// Puts this session's name in the place of a dead one's; the caller owns the heir file.
    fn replace(&self, file: &Path) -> std::io::Result<()> {
        let fresh = self.unique();
        self.link(&fresh)?;
        std::fs::rename(&fresh, file)
    }

    /// A name in the folder that nothing else has.
    fn unique(&self) -> PathBuf {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        // Relaxed: a counter for unique names.
        self.folder.join(format!("{}-{}.{HEIR}", self.session, COUNT.fetch_add(1, Ordering::Relaxed)))
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
            if has_ending(&path, CLAIM) {
                self.give_up(&path);
            }
        }
        let _ = std::fs::remove_file(self.name_file());
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
            dead.push((path, owner));
        }
    }
    let count = dead.len();
    if remove {
        // Claims go first, as their heir would remove them: they are what somebody may be taking over at this moment.
        if let Ok(own) = Claims::open(cache_dir) {
            let claims = dead.extract_if(.., |(path, _)| has_ending(path, CLAIM));
            claims.for_each(|(path, owner)| own.inherit(&path, &owner, |path| std::fs::remove_file(path)));
        }
        dead.iter().for_each(|(path, _)| drop(std::fs::remove_file(path)));
        let _ = std::fs::remove_dir(&folder);
    }
    (count, living)
}

/// Who may replace or remove `file` of session `owner`.
fn heir(file: &Path, owner: &str) -> PathBuf {
    let name = file.file_name().unwrap_or_default().as_encoded_bytes();
    let mut hasher = blake3::Hasher::new();
    hasher.update(name).update(b"\0").update(owner.as_bytes());
    file.with_file_name(format!("{}.{HEIR}", hasher.finalize().to_hex()))
}

fn holds(file: &Path, owner: &str) -> bool {
    std::fs::read_to_string(file).is_ok_and(|found| found == owner)
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
    write(file, b"alive\n")
}

/// Writes a file of the folder, which the last one out of it may be removing.
fn write(file: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut outcome = std::fs::write(file, content);
    for _ in 0..10 {
        if !outcome.as_ref().is_err_and(|e| e.kind() == ErrorKind::NotFound) {
            break;
        }
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder)?;
        }
        outcome = std::fs::write(file, content);
    }
    outcome
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
    fn a_dead_heir_has_an_heir() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join(CLAIMS_FOLDER);
        let claims = Claims::open(dir.path()).unwrap();
        let mut file = claims.path(&key(1));
        for generation in 0..4 {
            let owner = format!("elsewhere-1-1-{generation}");
            std::fs::write(&file, &owner).unwrap();
            file = heir(&file, &owner);
        }
        assert_eq!(claims.claim(&key(1)).unwrap(), Claim::Mine);
        assert!(holds(&claims.path(&key(1)), &claims.session));
        assert!(!files(&folder).iter().any(|f| has_ending(f, HEIR)), "{:?}", files(&folder));
        // A living heir is not disturbed.
        let other = Claims::open(dir.path()).unwrap();
        let file = claims.path(&key(2));
        std::fs::write(&file, "elsewhere-1-1-0").unwrap();
        assert!(other.take(&heir(&file, "elsewhere-1-1-0"), 1).unwrap());
        assert_eq!(claims.claim(&key(2)).unwrap(), Claim::Busy);
        drop((claims, other));
        assert_eq!(sweep(dir.path(), true), (2, 0), "the dead claim and the heir file that was left");
        assert!(!folder.exists());
    }

    #[test]
    fn of_many_that_steal_one_dead_claim_one_gets_it() {
        let dir = tempfile::tempdir().unwrap();
        let all: Vec<Claims> = (0..8).map(|_| Claims::open(dir.path()).unwrap()).collect();
        for round in 0..20 {
            std::fs::write(dir.path().join(CLAIMS_FOLDER).join(format!("{}.{CLAIM}", key(round))), "elsewhere-1-1-0").unwrap();
            let start = std::sync::Barrier::new(all.len());
            let mine = std::sync::atomic::AtomicUsize::new(0);
            std::thread::scope(|scope| {
                for claims in &all {
                    scope.spawn(|| {
                        start.wait();
                        if claims.claim(&key(round)).unwrap() == Claim::Mine {
                            // Relaxed: counted after the scope has joined.
                            mine.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
            });
            // Relaxed: the threads are joined.
            assert_eq!(mine.load(Ordering::Relaxed), 1);
        }
    }

    #[test]
    fn claiming_and_giving_up_at_once_never_makes_two_owners() {
        let dir = tempfile::tempdir().unwrap();
        let all: Vec<Claims> = (0..4).map(|_| Claims::open(dir.path()).unwrap()).collect();
        let inside = std::sync::atomic::AtomicUsize::new(0);
        std::fs::write(all[0].path(&key(1)), "elsewhere-1-1-0").unwrap();
        std::thread::scope(|scope| {
            for claims in &all {
                scope.spawn(|| {
                    for _ in 0..200 {
                        if claims.claim(&key(1)).unwrap() == Claim::Mine {
                            // SeqCst: the count is the property; nothing else is ordered by it.
                            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                            // SeqCst: as above.
                            inside.fetch_sub(1, Ordering::SeqCst);
                            claims.release(&key(1));
                        }
                    }
                });
            }
        });
    }
}
