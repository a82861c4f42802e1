//! A loader as a process of its own, and a consumer that compares every byte of every chunk with an independent reading of the slab.

use std::collections::VecDeque;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use half::bf16;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use serenity_protocol::config::{Config, Overrides};
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::ring::consumer::{Consumer, Leased};
use serenity_protocol::ring::plan::RingPlan;
use serenity_protocol::ring::segment::{RingRole, Segment};
use serenity_protocol::ring::words::{ShareWord, SlotWord, State, consumer, loader, slot};
use serenity_protocol::slab::Slab;
use serenity_protocol::slab::layout::{BlockLayout, PartKind};

/// Longest wait for anything that must happen: only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Set for a child of the test: the configuration to work with.
pub const CHILD_ENV: &str = "SERENITY_TEST_CONFIG";

/// A number from the environment.
pub fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name} is no number: {v}")))
}

/// A small deterministic generator (xorshift*).
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % sides
    }
}

pub fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/goldens").canonicalize().unwrap()
}

/// Waits until `condition` gives something.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A configuration in a folder of its own, and what both ends derive from it.
pub struct Lab {
    /// Removed when dropped; none in a child of the test, which works in its parent's.
    folder: Option<tempfile::TempDir>,
    pub config: PathBuf,
    pub plan: RingPlan,
    expected: Vec<Vec<u8>>,
}

impl Lab {
    /// A ring of `slots` slots of 16 KiB for the golden slab, which has five blocks and many more chunks.
    pub fn new(slots: u64) -> Self {
        Self::for_consumers(slots, 1)
    }

    /// As [`Self::new`], for several consumers.
    pub fn for_consumers(slots: u64, consumers: usize) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let (squareq, mib) = (goldens().join("cases/squareq"), 1_048_576.0);
        let stagehand = json!({
            "pinned_pool_mb": slots as f64 * 16384.0 / mib, "ring_chunk_mb": 16384.0 / mib, "dequant": "cpu",
            "ring_consumers": consumers, "squareq_slab_path": squareq.join("flux2tiny_int8.safetensors"),
            "squareq_manifest_path": squareq.join("flux2tiny_int8.manifest.json"),
        });
        let config: Value = json!({
            "model_type": "flux_2_dev", "training_method": "lora", "train_device": "cpu", "train_dtype": "float32",
            "model": { "type": "flux_2_dev", "path": goldens().join("model") },
            "adapter": { "type": "lora", "rank": 4, "alpha": 4.0, "target_modules": "all-linear" },
            "memory": { "gradient_checkpointing": "on", "strategy": "stagehand", "stagehand": stagehand },
            "data": { "concepts": [{ "path": "images" }] }, "output_dir": folder.path().join("output"), "max_steps": 1,
        });
        let path = folder.path().join("config.json");
        std::fs::write(&path, serde_json::to_vec_pretty(&config).unwrap()).unwrap();
        let mut this = Self::of(&path);
        this.folder = Some(folder);
        this
    }

    /// As [`Self::new`], readable for every user.
    pub fn open_to_all(slots: u64) -> Self {
        let lab = Self::new(slots);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(lab.config.parent().unwrap(), mode).unwrap();
        lab
    }

    /// What a configuration file says.
    pub fn of(path: &Path) -> Self {
        let config = Config::load(path, &Overrides::default()).unwrap();
        let slab = Slab::open(&config.memory.slab_path, &config.memory.manifest_path).unwrap();
        let geometry = TransformerGeometry::from_config_file(&goldens().join("model/transformer/config.json")).unwrap();
        let plan = RingPlan::new(&config, &slab, &geometry).unwrap();
        let expected = expected_payloads(&slab, &plan);
        assert!(expected.iter().map(Vec::len).sum::<usize>() > 40 * 16384);
        Self { folder: None, config: path.to_path_buf(), plan, expected }
    }

    fn folder(&self) -> &Path {
        self.config.parent().unwrap()
    }

    /// The segment's file.
    pub fn segment(&self) -> PathBuf {
        self.plan.spec.path()
    }

    /// A loader's command line; its log goes to a file of its own.
    pub fn command(&self) -> (Command, PathBuf) {
        static COUNT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        // Relaxed: a counter for unique names.
        let log = self.folder().join(format!("log-{}", COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)));
        let mut command = Command::new(env!("CARGO_BIN_EXE_serenity-loader"));
        command.args(["--config", self.config.to_str().unwrap()]).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(std::fs::File::create(&log).unwrap()).env_remove("SERENITY_FAULTS").env("RAYON_NUM_THREADS", "2");
        (command, log)
    }

    /// Starts a loader with fault switches ("": none).
    pub fn loader(&self, faults: &str) -> Running {
        let (mut command, log) = self.command();
        if !faults.is_empty() {
            command.env("SERENITY_FAULTS", faults);
        }
        Running { child: command.spawn().unwrap(), log }
    }

    /// Starts this test binary again, with only `test` in it (an ignored one), as a process that can be killed.
    pub fn child(&self, test: &str) -> Running {
        let log = self.folder().join(test.replace(':', "-"));
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--ignored", "--nocapture"]).env(CHILD_ENV, &self.config).stdin(Stdio::null());
        let file = std::fs::File::create(&log).unwrap();
        command.stdout(file.try_clone().unwrap()).stderr(file);
        Running { child: command.spawn().unwrap(), log }
    }

    /// Every slot, read from the file: no role is needed.
    pub fn slots(&self) -> Vec<Seen> {
        let file = std::fs::File::open(self.segment()).unwrap();
        let word = |i: usize| {
            let mut bytes = [0; 8];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, i as u64 * 8).unwrap();
            u64::from_ne_bytes(bytes)
        };
        let shape = self.plan.spec.shape();
        let seen = |i: usize| {
            let slot = SlotWord::unpack(word(shape.slot(i) + slot::STATE)).expect("a known state");
            let share = |c: usize| ShareWord::unpack(word(shape.share(c, i))).expect("a known state");
            let shares = (0..shape.consumers).map(share).collect();
            Seen { generation: slot.generation, filling: slot.state == State::Filling, shares }
        };
        (0..shape.slots).map(seen).collect()
    }

    /// Slots in that state.
    pub fn count(&self, state: State) -> usize {
        self.slots().iter().filter(|s| s.state() == state).count()
    }

    /// Slots of which that consumer has a share in that state.
    pub fn count_of(&self, consumer: usize, state: State) -> usize {
        self.slots().iter().filter(|s| s.shares[consumer].state == state).count()
    }

    /// The independent reading of a chunk.
    pub fn chunk(&self, block: u16, chunk: u16) -> &[u8] {
        let range = self.plan.layout.blocks[usize::from(block)].chunk_range(u32::from(chunk), self.plan.layout.chunk_bytes);
        &self.expected[usize::from(block)][range.start as usize..range.end as usize]
    }

    /// Chunks of the whole model.
    pub fn chunks(&self) -> usize {
        self.plan.layout.blocks.iter().map(|b| self.plan.layout.chunks_of(b.block) as usize).sum()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.folder.is_some() {
            serenity_protocol::ring::segment::unlink_if_unused(&self.segment());
        }
    }
}

/// A slot as it stands in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub generation: u64,
    filling: bool,
    /// What each consumer has of it.
    pub shares: Vec<ShareWord>,
}

impl Seen {
    /// What the slot is to whoever has most of it.
    pub fn state(&self) -> State {
        let has = |state| self.shares.iter().any(|s| s.state == state);
        match () {
            () if self.filling => State::Filling,
            () if has(State::Leased) => State::Leased,
            () if has(State::Ready) => State::Ready,
            () => State::Free,
        }
    }

    /// Whether it has been filled or offered between two looks.
    fn served_since(&self, before: &Self) -> bool {
        let places = |seen: &Self| seen.shares.iter().map(|s| (s.epoch, s.ordinal)).collect::<Vec<_>>();
        assert!(self.generation >= before.generation, "a generation decreased");
        self.generation > before.generation || places(self) != places(before)
    }
}

/// A process of the test; killed when dropped.
pub struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    pub fn of(mut command: Command, log: PathBuf) -> Self {
        Self { child: command.spawn().unwrap(), log }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// SIGKILL, and its death.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// What it has said so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn end(&mut self) -> std::process::ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "still running after {PATIENCE:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for its end, which must come with that exit code; its log.
    pub fn expect(mut self, code: i32) -> String {
        let status = self.end();
        assert_eq!(status.code(), Some(code), "{status}\n{}", self.log());
        self.log()
    }

    /// Waits for its end by that signal.
    pub fn expect_signal(mut self, signal: Signal) {
        let status = self.end();
        assert_eq!(status.signal(), Some(signal as i32), "{status}\n{}", self.log());
    }

    /// Processor time that it has used.
    pub fn cpu_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        ticks as f64 / nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).unwrap().unwrap() as f64
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A consumer that believes nothing: each chunk must be the one that is due, with the slab's bytes.
pub struct Reader<'a> {
    pub lab: &'a Lab,
    pub segment: Segment,
    pub ring: Consumer<Segment>,
    /// Which of the ring's consumers it is.
    index: usize,
    /// Blocks that will be asked for, posted and not.
    pass: Vec<u16>,
    next_post: usize,
    due: VecDeque<(u16, u16)>,
}

impl<'a> Reader<'a> {
    /// Waits for the ring, takes the consumer's role, asks for the model forward and backward without end.
    pub fn open(lab: &'a Lab) -> Self {
        Self::open_as(lab, 0)
    }

    /// The same as the consumer of that number.
    pub fn open_as(lab: &'a Lab, index: usize) -> Self {
        let segment = wait_for("a ring", || Segment::open_as(&lab.plan.spec, index).ok().flatten());
        segment.sign(RingRole::Consumer(index));
        let ring = Consumer::attach_as(segment.clone(), segment.shape(), lab.plan.catalogue().unwrap(), index).unwrap();
        let blocks = lab.plan.layout.blocks.len() as u16;
        let pass = (0..blocks).chain((0..blocks).rev()).chain([0, blocks - 1, blocks / 2, 0, 0]).collect();
        let mut this = Self { lab, segment, ring, index, pass, next_post: 0, due: VecDeque::new() };
        this.post();
        this
    }

    /// Keeps requests for three passes ahead.
    pub fn post(&mut self) {
        while self.due.len() < 3 * self.lab.chunks() {
            let block = self.pass[self.next_post % self.pass.len()];
            assert_eq!(self.ring.post(&[block]).unwrap(), 1);
            self.next_post += 1;
            self.due.extend((0..self.lab.plan.layout.chunks_of(BlockId(block)) as u16).map(|chunk| (block, chunk)));
        }
        self.segment.wake(loader::WAKE);
    }

    /// The next chunk if it is there.
    pub fn try_lease(&mut self) -> Option<Leased> {
        let leased = self.ring.try_lease().unwrap()?;
        assert_eq!(Some((leased.content.block, leased.content.chunk)), self.due.pop_front(), "another chunk than is due");
        Some(leased)
    }

    /// The next chunk, waited for.
    pub fn lease(&mut self) -> Leased {
        self.lease_while(|_| true).expect("waits for ever")
    }

    /// The next chunk, waited for as long as `condition` holds.
    pub fn lease_while(&mut self, condition: impl Fn(&Segment) -> bool) -> Option<Leased> {
        let start = Instant::now();
        loop {
            let wake = self.segment.shape().at(self.index, consumer::WAKE);
            let ticket = self.segment.ticket(wake);
            let goes_on = condition(&self.segment);
            if let Some(leased) = self.try_lease() {
                return Some(leased);
            }
            if !goes_on {
                return None;
            }
            assert!(start.elapsed() < PATIENCE, "no chunk within {PATIENCE:?}: {:?}", self.lab.slots());
            self.segment.wait(wake, ticket);
        }
    }

    /// Whether the payload is what its checksum says, as a trainer looks at it.
    pub fn is_intact(&self, leased: &Leased) -> bool {
        // SAFETY: the slot is leased to this consumer until it is released.
        let payload = unsafe { self.segment.slot_payload(leased.slot, leased.bytes) };
        let (block, chunk) = (BlockId(leased.content.block), u32::from(leased.content.chunk));
        self.lab.plan.layout.payload_checksum(block, chunk, payload).unwrap() == leased.checksum
    }

    /// Compares a leased chunk with the slab, and gives it back.
    pub fn check_and_release(&mut self, leased: &Leased) {
        assert!(self.is_intact(leased), "{leased:?} does not have its checksum");
        // SAFETY: as above.
        let payload = unsafe { self.segment.slot_payload(leased.slot, leased.bytes) };
        assert!(payload == self.lab.chunk(leased.content.block, leased.content.chunk), "{leased:?} has wrong bytes");
        self.ring.release(leased).unwrap();
        self.segment.wake(loader::WAKE);
        self.post();
    }

    /// Takes that many chunks, each compared.
    pub fn take(&mut self, chunks: usize) {
        for _ in 0..chunks {
            let leased = self.lease();
            self.check_and_release(&leased);
        }
    }

    /// One pass over everything, in which every slot must serve: none is stuck. Ends with no slot in anybody's hands.
    pub fn pass(&mut self) {
        let before = self.lab.slots();
        self.take(3 * self.lab.chunks());
        for (index, (before, after)) in before.iter().zip(self.lab.slots()).enumerate() {
            assert!(after.served_since(before), "slot {index} is stuck: {before:?}, later {after:?}");
        }
        assert_eq!(self.lab.count_of(self.index, State::Leased), 0);
    }

    /// Says that no more is wanted, which ends a loader that was started by hand.
    pub fn finish(mut self) {
        self.ring.finish();
        self.segment.wake(loader::WAKE);
        self.segment.leave();
    }
}

/// The payload of every block, computed without any of the loader's readers.
fn expected_payloads(slab: &Slab, plan: &RingPlan) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(slab.path()).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let block = |layout: &BlockLayout| {
        let mut payload = vec![0u8; layout.bytes as usize];
        for part in &layout.parts {
            assert_eq!(part.kind, PartKind::Bf16Rows, "the lab's form");
            let q = tensors.tensor(&format!("{}.qweight", part.linear)).unwrap();
            let scale = tensors.tensor(&format!("{}.scale", part.linear)).unwrap();
            let out = &mut payload[part.offset as usize..(part.offset + part.bytes) as usize];
            for row in 0..part.out_features {
                let s = f32::from_le_bytes(scale.data()[4 * row..4 * row + 4].try_into().unwrap());
                for column in 0..part.in_features {
                    let code = q.data()[row * q.shape()[1] + column] as i8;
                    let at = 2 * (row * part.in_features + column);
                    out[at..at + 2].copy_from_slice(&bf16::from_f32(f32::from(code) * s).to_le_bytes());
                }
            }
        }
        payload
    };
    plan.layout.blocks.iter().map(block).collect()
}
