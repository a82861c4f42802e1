//! The ring's memory: a named shared segment, its header, its locks, its futexes, its payload slots.
//!
//! The shared_memory crate maps the segment; two guards surround it. It only sets a length, so on a full /dev/shm the first touch of
//! a page would be a SIGBUS: the pages are reserved with `posix_fallocate` before anything is written. And its Drop would unlink a
//! name that may belong to someone else by then: ownership is dropped at once, and [`Segment::leave`] unlinks when the last user goes.
//!
//! Roles are open-file-description locks on bytes of the segment file: byte 0 loader, byte 1 first consumer, byte 2 shared by everyone
//! attached, from byte 3 on the other consumers. The kernel drops them exactly when the process is gone, so a lock that can be taken is proof of death.
//!
//! The mapped words and payload slices are here; advice about the memory is in [`super::pages`].

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl, posix_fallocate};
use nix::libc;
use rustix::thread::futex;
use shared_memory::{Shmem, ShmemConf};

use super::guard::Guarded;
pub use super::spec::RingSpec;
use super::spec::{HEADER_WORDS, SHM_FOLDER, same_header};
use super::words::{CONSUMERS_MAX, READY_TAG, Shape, Words, checksum, header};
use crate::error::{Error, Result};
use crate::faults::point;

/// Longest sleep on a futex: after it, the peer is looked at again.
pub const WAIT_MAX: Duration = Duration::from_millis(100);
/// How long a loader tries to replace a ring that somebody looks at.
const REPLACE_PATIENCE: Duration = Duration::from_secs(2);

/// Who may hold the ring, as lock bytes of the segment file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingRole {
    /// Fills slots.
    Loader,
    /// Leases them: the consumer with this index.
    Consumer(usize),
}

impl RingRole {
    fn byte(self) -> i64 {
        match self {
            RingRole::Loader => 0,
            RingRole::Consumer(0) => 1,
            RingRole::Consumer(index) => ATTACHED_BYTE + index as i64,
        }
    }
    fn pid_word(self, shape: &Shape) -> usize {
        match self {
            RingRole::Loader => super::words::loader::PID,
            RingRole::Consumer(index) => shape.at(index, super::words::consumer::PID),
        }
    }
}

const ATTACHED_BYTE: i64 = 2;

/// A mapped ring. Clones share the mapping. It is the memory of the two state machines ([`Words`]).
#[derive(Clone)]
pub struct Segment {
    inner: Arc<Mapping>,
}

struct Mapping {
    /// Before the mapping: what is unmapped is not ours any more.
    _guarded: Guarded,
    shmem: Shmem,
    /// Carries the locks of this process; its own open file description.
    file: File,
    spec: RingSpec,
    shape: Shape,
    payload_at: usize,
}

// SAFETY: `Shmem` is a pointer to a mapping that lives as long as it does, and it is never changed after construction. All shared
// words are accessed as atomics; payload bytes are accessed by one thread at a time per slot (see `slot_filling` and `slot_leased`).
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Segment {
    /// For the loader: opens the segment of `spec`, or makes it; takes the loader's role. A segment of another specification (other slab,
    /// other shape, before a reboot, never finished) is replaced if nobody uses it.
    ///
    /// # Errors
    /// [`Error::Absent`] if another loader has the role or a consumer uses a ring of another shape; [`Error::TryAgain`] if /dev/shm is full.
    pub fn open_or_create(spec: &RingSpec) -> Result<Self> {
        spec.check()?;
        let deadline = Instant::now() + REPLACE_PATIENCE;
        loop {
            let path = spec.path();
            match File::options().read(true).write(true).open(&path) {
                Ok(file) => {
                    if !lock(&file, RingRole::Loader.byte(), libc::F_WRLCK)? {
                        return Err(busy(spec, RingRole::Loader, &file));
                    }
                    if !is_current(&file, &path) {
                        continue;
                    }
                    let finished = Self::map(spec, None, file.try_clone().map_err(|e| Error::io("cannot use the ring", &path, e))?);
                    match finished {
                        // try_clone shares the open file description, and with it the locks.
                        Ok(segment) => return Ok(segment),
                        Err(reason) => match Self::remove_unused(&path, &file, &reason) {
                            // A trainer that looks in on a ring that is not for it lets go again at once.
                            Err(e) if Instant::now() > deadline => return Err(e),
                            _ => std::thread::sleep(Duration::from_millis(20)),
                        },
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                    if let Some(segment) = Self::create(spec)? {
                        return Ok(segment);
                    }
                }
                Err(e) => return Err(Error::io("cannot open the ring", &path, e)),
            }
        }
    }

    /// Makes a new segment; `None` if someone else was faster.
    fn create(spec: &RingSpec) -> Result<Option<Self>> {
        let path = spec.path();
        let bytes = spec.bytes();
        let mut shmem = match ShmemConf::new().size(bytes as usize).os_id(&spec.name).create() {
            Ok(shmem) => shmem,
            Err(shared_memory::ShmemError::MappingIdExists) => return Ok(None),
            Err(e) => return Err(Error::absent("cannot create the ring in shared memory").at(path).cause(e)),
        };
        shmem.set_owner(false);
        point("segment-created");
        let file = File::options().read(true).write(true).open(&path).map_err(|e| Error::io("cannot open the ring", &path, e))?;
        if !lock(&file, RingRole::Loader.byte(), libc::F_WRLCK)? {
            return Ok(None);
        }
        // Without this, a full /dev/shm would show as SIGBUS at the first touch of a page.
        if let Err(e) = reserve(&file, bytes) {
            let _ = std::fs::remove_file(&path);
            return Err(Error::try_again("shared memory is too small for the ring")
                .at(path)
                .expected(format!("{} MiB free in {SHM_FOLDER}", bytes.div_ceil(1 << 20)))
                .found(free_space_text())
                .cause(e)
                .advice("lower memory.stagehand.pinned_pool_mb, or give /dev/shm more room (mount -o remount,size=...)"));
        }
        point("segment-reserved");
        let guarded = Guarded::new(shmem.as_ptr(), shmem.len())?;
        let segment = Self::wrap((guarded, shmem), file, spec)?;
        let words = segment.words();
        segment.shape().format(words);
        let head = spec.header();
        for (i, word) in head.into_iter().enumerate() {
            words.store(i, word);
            point("header-torn");
        }
        words.store(header::CHECKSUM, checksum(&head));
        point("header-written");
        words.store(header::READY, READY_TAG);
        point("ring-open");
        Ok(Some(segment))
    }

    /// For the first consumer: [`Self::open_as`] with index 0.
    ///
    /// # Errors
    /// As [`Self::open_as`].
    pub fn open(spec: &RingSpec) -> Result<Option<Self>> {
        Self::open_as(spec, 0)
    }

    /// For a consumer: opens the segment if it is there and finished, and takes the role of consumer `index`. How many consumers there
    /// are is what the segment says, not `spec`. `None`: not there yet.
    ///
    /// # Errors
    /// [`Error::Absent`] if another consumer has the role, [`Error::Data`] if the segment is of another slab or shape, [`Error::Config`] if
    /// it has no such consumer.
    pub fn open_as(spec: &RingSpec, index: usize) -> Result<Option<Self>> {
        spec.check()?;
        if index >= CONSUMERS_MAX {
            return Err(Error::config("a ring has no such consumer").expected(format!("0 to {}", CONSUMERS_MAX - 1)).found(index));
        }
        let path = spec.path();
        let file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("cannot open the ring", &path, e)),
        };
        let role = RingRole::Consumer(index);
        if !lock(&file, role.byte(), libc::F_WRLCK)? {
            return Err(busy(spec, role, &file));
        }
        // The shared lock comes before the look at the name: from here on nobody unlinks what we are about to map.
        if !lock(&file, ATTACHED_BYTE, libc::F_RDLCK)? || !is_current(&file, &path) {
            return Ok(None);
        }
        match Self::map(spec, Some(index), file) {
            Ok(segment) => Ok(Some(segment)),
            Err(Unusable::NotReady) => Ok(None),
            Err(Unusable::Other(error)) => Err(error),
        }
    }

    /// Maps an existing file and checks its header against `spec`; for a consumer, with the number of consumers that it finds there.
    fn map(spec: &RingSpec, consumer: Option<usize>, file: File) -> Result<Self, Unusable> {
        let path = spec.path();
        let length = file.metadata().map_err(|e| Error::io("cannot inspect the ring", &path, e))?.len();
        if length < (header::READY as u64 + 1) * 8 {
            return Err(Unusable::NotReady);
        }
        let shmem = ShmemConf::new().os_id(&spec.name).open().map_err(|e| Error::absent("cannot map the ring").at(&path).cause(e))?;
        if shmem.len() < (header::READY + 1) * 8 {
            return Err(Unusable::NotReady);
        }
        // From the first look on: whoever cuts the file short now ends this process with a message.
        let guarded = Guarded::new(shmem.as_ptr(), shmem.len())?;
        // SAFETY: the mapping has these words (checked above), starts on a page, and lives as long as `shmem`.
        let words = unsafe { std::slice::from_raw_parts(shmem.as_ptr().cast::<AtomicU64>(), header::READY + 1) };
        if words.load(header::READY) != READY_TAG {
            return Err(Unusable::NotReady);
        }
        let mut found = [0; HEADER_WORDS];
        for (i, word) in found.iter_mut().enumerate() {
            *word = words.load(i);
        }
        if words.load(header::CHECKSUM) != checksum(&found) {
            return Err(Error::data("the ring's header is torn: its checksum does not hold").at(&path).offset(0).into());
        }
        let mut spec = spec.clone();
        if let Some(index) = consumer {
            let made_for = found[header::CONSUMERS] as usize;
            // A number that no loader writes fails the comparison below.
            spec.consumers = if (1..=CONSUMERS_MAX).contains(&made_for) { made_for } else { spec.consumers };
            same_header(&spec, &found)?;
            if index >= spec.consumers {
                return Err(Error::config(format!(
                    "the ring was made for {made_for} trainers, and this one would be number {}",
                    index + 1
                ))
                .at(&path)
                .expected(format!("--consumer 0 to {}", made_for - 1))
                .found(format!("--consumer {index}"))
                .advice("start serenity-loader with --consumers N")
                .into());
            }
        }
        same_header(&spec, &found)?;
        Ok(Self::wrap((guarded, shmem), file, &spec)?)
    }

    fn wrap((guarded, shmem): (Guarded, Shmem), file: File, spec: &RingSpec) -> Result<Self> {
        let (shape, payload_at) = (spec.shape(), spec.payload_at());
        if (shmem.len() as u64) < spec.bytes() {
            return Err(Error::data("the ring in shared memory is shorter than its shape needs")
                .at(spec.path())
                .expected(format!("{} bytes", spec.bytes()))
                .found(format!("{} bytes", shmem.len())));
        }
        if !lock(&file, ATTACHED_BYTE, libc::F_RDLCK)? {
            return Err(Error::try_again("the ring is being removed by another process").at(spec.path()));
        }
        Ok(Self { inner: Arc::new(Mapping { _guarded: guarded, shmem, file, spec: spec.clone(), shape, payload_at }) })
    }

    /// Unlinks a segment that cannot serve, if nobody is attached to it.
    fn remove_unused(path: &Path, file: &File, reason: &Unusable) -> Result<()> {
        // Our own shared lock, if mapping got that far, is upgraded; anybody else's makes this fail.
        if !lock(file, ATTACHED_BYTE, libc::F_WRLCK)? {
            return Err(Error::absent("a process still uses a ring of another run in this place").at(path).cause(match reason {
                Unusable::NotReady => "its creator has not finished".to_string(),
                Unusable::Other(e) => e.to_string(),
            }));
        }
        std::fs::remove_file(path).map_err(|e| Error::io("cannot remove a stale ring", path, e))
    }

    /// Lets go of the segment: releases this process's locks, and unlinks the name if it was the last one attached.
    pub fn leave(self) {
        let path = self.inner.spec.path();
        let file = &self.inner.file;
        let _ = fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&libc::flock { l_len: 0, ..flock_of(0, libc::F_UNLCK) }));
        unlink_if_unused(&path);
    }

    /// The specification that it was opened with.
    #[must_use]
    pub fn spec(&self) -> &RingSpec {
        &self.inner.spec
    }

    /// Where words are.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.inner.shape
    }

    /// The shared words.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        let start = self.inner.shmem.as_ptr().cast::<AtomicU64>();
        // SAFETY: `wrap` checked that the mapping is at least `spec.bytes()` long, which covers `shape.words()` words; a mapping
        // starts on a page; the memory is shared only as atomics; it lives as long as `self.inner`.
        unsafe { std::slice::from_raw_parts(start, self.inner.shape.words()) }
    }

    /// The payload of a slot that this process holds FILLING.
    ///
    /// # Safety
    /// The caller holds the slot in state FILLING under its own epoch, and makes no second slice of it.
    #[must_use]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slot_filling(&self, slot: usize) -> &mut [u8] {
        assert!(slot < self.inner.spec.slots, "slot {slot} of {}", self.inner.spec.slots);
        let bytes = self.inner.spec.chunk_bytes as usize;
        // SAFETY: inside the mapping by the check in `wrap`; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.inner.shmem.as_ptr().add(self.inner.payload_at + slot * bytes), bytes) }
    }

    /// The payload of a slot that this process holds LEASED (or that it wants to compare with a checksum).
    ///
    /// # Safety
    /// Nobody writes the slot while the slice lives: it is LEASED to the caller, or READY, or FILLING under the caller's epoch.
    #[must_use]
    pub unsafe fn slot_payload(&self, slot: usize, bytes: u64) -> &[u8] {
        assert!(slot < self.inner.spec.slots && bytes <= self.inner.spec.chunk_bytes, "slot {slot}, {bytes} bytes");
        let chunk = self.inner.spec.chunk_bytes as usize;
        // SAFETY: inside the mapping by the check in `wrap`; unwritten by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.inner.shmem.as_ptr().add(self.inner.payload_at + slot * chunk), bytes as usize) }
    }

    /// Where the payload slots lie in this process, and how many bytes they are together: a page-aligned run, slot after slot. For
    /// registration with a device; it is unmapped with the last clone of this segment.
    #[must_use]
    pub fn payload_area(&self) -> (*mut u8, usize) {
        let bytes = self.inner.spec.slots * self.inner.spec.chunk_bytes as usize;
        // SAFETY: inside the mapping by the check in `wrap`.
        (unsafe { self.inner.shmem.as_ptr().add(self.inner.payload_at) }, bytes)
    }

    fn futex_of(&self, word: usize) -> &AtomicU32 {
        // SAFETY: the low half of a word inside the mapping; AtomicU32 has no stricter alignment than AtomicU64, and mixed-size
        // access is confined to the kernel's comparison and the load below.
        unsafe { AtomicU32::from_ptr(self.words()[word].as_ptr().cast::<u32>().add(usize::from(cfg!(target_endian = "big")))) }
    }

    /// The event count of `word`, to be taken before looking at the state that one waits for.
    #[must_use]
    pub fn ticket(&self, word: usize) -> u32 {
        // Acquire: pairs with the Release increment in `wake`.
        self.words()[word].load(Ordering::Acquire) as u32
    }

    /// Sleeps until the event count of `word` differs from `ticket`, at most [`WAIT_MAX`].
    pub fn wait(&self, word: usize, ticket: u32) {
        self.wait_at_most(word, ticket, WAIT_MAX);
    }

    /// The same, at most `limit` where that is shorter.
    pub fn wait_at_most(&self, word: usize, ticket: u32, limit: Duration) {
        let timeout = futex::Timespec { tv_sec: 0, tv_nsec: limit.min(WAIT_MAX).as_nanos() as i64 };
        // Woken, timed out, interrupted or changed already: in each case the caller looks again.
        let _ = futex::wait(self.futex_of(word), futex::Flags::empty(), ticket, Some(&timeout));
    }

    /// Counts an event on `word` and wakes whoever sleeps on it.
    pub fn wake(&self, word: usize) {
        // Release: what happened before is visible to who sees the new count in `ticket`.
        self.words()[word].fetch_add(1, Ordering::Release);
        let _ = futex::wake(self.futex_of(word), futex::Flags::empty(), u32::MAX >> 1);
    }

    /// Whether some process holds `role`: proof of life, because the kernel drops the lock with the process.
    #[must_use]
    pub fn is_held(&self, role: RingRole) -> bool {
        !would_lock(&self.inner.file, role.byte())
    }

    /// Records this process as the holder of `role`, for messages.
    pub fn sign(&self, role: RingRole) {
        let pid = std::process::id();
        let word = role.pid_word(&self.shape());
        self.words().store(word, u64::from(pid));
        self.words().store(word + 1, start_time(pid).unwrap_or(0));
    }
}

impl Words for Segment {
    fn load(&self, index: usize) -> u64 {
        self.words().load(index)
    }
    fn store(&self, index: usize, value: u64) {
        point("word");
        self.words().store(index, value);
        if index == super::words::loader::EPOCH {
            point("epoch-bumped");
        }
    }
    fn swap(&self, index: usize, old: u64, new: u64) -> Result<(), u64> {
        point("word");
        self.words().swap(index, old, new)
    }
}

enum Unusable {
    NotReady,
    Other(Error),
}

impl From<Error> for Unusable {
    fn from(error: Error) -> Self {
        Unusable::Other(error)
    }
}

/// Unlinks a segment file that nobody is attached to. Safe at any time: a user holds the shared lock.
pub fn unlink_if_unused(path: &Path) {
    let Ok(file) = File::options().read(true).write(true).open(path) else { return };
    if matches!(lock(&file, ATTACHED_BYTE, libc::F_WRLCK), Ok(true)) && is_current(&file, path) {
        // A user that opened the file before this unlink fails to lock or to find itself current, and starts over.
        let _ = std::fs::remove_file(path);
    }
}

fn is_current(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

fn flock_of(byte: i64, kind: i32) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

/// Sets or drops an open-file-description lock; false if someone else's is in the way.
fn lock(file: &File, byte: i64, kind: i32) -> Result<bool> {
    match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&flock_of(byte, kind))) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(e) => Err(Error::absent("cannot lock the ring").cause(e)),
    }
}

fn would_lock(file: &File, byte: i64) -> bool {
    let mut query = flock_of(byte, libc::F_WRLCK);
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut query)).is_ok() && i32::from(query.l_type) == libc::F_UNLCK
}

fn busy(spec: &RingSpec, role: RingRole, file: &File) -> Error {
    let signature = role.pid_word(&spec.shape());
    let word = |index: usize| {
        let mut word = [0u8; 8];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut word, index as u64 * 8).map(|()| u64::from_ne_bytes(word)).ok()
    };
    // The words may be a dead holder's, and its number another process's by now: the start time tells.
    let signed = word(signature).zip(word(signature + 1));
    let holder = match signed {
        Some((pid, start)) if pid != 0 && u32::try_from(pid).ok().and_then(start_time) == Some(start) => format!("process {pid}"),
        _ => "another process".to_string(),
    };
    let (name, other) = match role {
        RingRole::Loader => ("loader", String::new()),
        RingRole::Consumer(0) => ("trainer", String::new()),
        RingRole::Consumer(index) => ("trainer", format!(" as consumer {index}")),
    };
    let way_out = if role == RingRole::Loader { "" } else { ", give this one another --consumer (if the loader feeds several)" };
    Error::absent(format!("the ring already has a {name}{other}: {holder}"))
        .at(spec.path())
        .advice(format!("stop that {name}{way_out}, or use another output_dir for this run"))
}

/// Start time of a process in clock ticks since boot, field 22 of `/proc/PID/stat`: tells a process from a later one with its number.
#[must_use]
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Reserves the pages; a signal interrupts the reservation of a large segment.
fn reserve(file: &File, bytes: u64) -> nix::Result<()> {
    loop {
        match posix_fallocate(file.as_fd(), 0, bytes as i64) {
            Err(nix::errno::Errno::EINTR) => {}
            other => return other,
        }
    }
}

fn free_space_text() -> String {
    match rustix::fs::statvfs(SHM_FOLDER) {
        Ok(s) => format!("{} MiB free", (s.f_bavail * s.f_frsize) >> 20),
        Err(_) => "unknown".to_string(),
    }
}
