//! Drives processes for the tests: a folder with a tiny model, configurations made from the quick start's, start, wait, kill, inspect.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longest that any single program of the tests may take.
pub const PROGRAM_MAX: Duration = Duration::from_secs(240);

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A program of the workspace, beside the launcher.
pub fn program(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_serenity-launch")).with_file_name(name);
    assert!(path.exists(), "{} is not built: run `cargo build --release --workspace` first", path.display());
    path
}

/// What a finished program left.
#[derive(Debug)]
pub struct Finished {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub seconds: f64,
}

impl Finished {
    /// Panics with everything that the program said unless it ended with `code`.
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "\n--- stdout\n{}\n--- stderr\n{}", self.stdout, self.stderr);
        self
    }

    /// Panics unless standard error holds every one of `parts`.
    pub fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "expected '{part}' in\n{}", self.stderr);
        }
        self
    }
}

/// A program that runs; killed when dropped.
pub struct Running {
    pub child: Child,
    out: PathBuf,
    start: Instant,
}

impl Running {
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// What it has printed on standard error so far.
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.out.with_extension("err")).unwrap_or_default()
    }

    /// Waits for its end; a program that outlives `PROGRAM_MAX` fails the test.
    pub fn wait(mut self) -> Finished {
        let status: ExitStatus = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(self.start.elapsed() < PROGRAM_MAX, "still running after {PROGRAM_MAX:?}:\n{}", self.stderr());
            std::thread::sleep(Duration::from_millis(5));
        };
        let read = |end: &str| std::fs::read_to_string(self.out.with_extension(end)).unwrap_or_default();
        Finished { code: status.code(), stdout: read("out"), stderr: read("err"), seconds: self.start.elapsed().as_secs_f64() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a program in the repository's root, its output in files under `folder`.
pub fn start(folder: &Path, name: &str, args: &[&str]) -> Running {
    static COUNT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    // Relaxed: a counter for unique names.
    let out = folder.join(format!("{name}-{}", COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)));
    std::fs::create_dir_all(folder).unwrap();
    let file = |end: &str| std::fs::File::create(out.with_extension(end)).unwrap();
    let child = Command::new(program(name))
        .args(args)
        .current_dir(root())
        .stdin(Stdio::null())
        .stdout(file("out"))
        .stderr(file("err"))
        .spawn()
        .unwrap();
    Running { child, out, start: Instant::now() }
}

/// Runs a program to its end.
pub fn run(folder: &Path, name: &str, args: &[&str]) -> Finished {
    start(folder, name, args).wait()
}

/// A folder of its own with configurations in it; removed when dropped.
pub struct Lab {
    folder: tempfile::TempDir,
}

/// The tiny model and everything that can be made once for all tests: slab and cache.
pub struct SharedModel {
    pub model: PathBuf,
    pub slab: PathBuf,
    pub manifest: PathBuf,
    pub cache: PathBuf,
}

/// Made by the real programs, once per test binary.
pub fn shared() -> &'static SharedModel {
    static SHARED: OnceLock<SharedModel> = OnceLock::new();
    SHARED.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("e2e-shared");
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        let this = SharedModel {
            model: folder.join("model"),
            slab: folder.join("slab/tiny.safetensors"),
            manifest: folder.join("slab/tiny.manifest.json"),
            cache: folder.join("cache"),
        };
        run(&folder, "serenity-slab", &["synth", "--preset", "tiny", "--output", this.model.to_str().unwrap()]).expect(0);
        let prefix = folder.join("slab/tiny");
        run(&folder, "serenity-slab", &["build", "--model", this.model.to_str().unwrap(), "--output", prefix.to_str().unwrap()]).expect(0);
        let mut config = quickstart_config();
        merge(&mut config, &this.as_settings());
        config["output_dir"] = json!(folder.join("out"));
        let path = folder.join("config.json");
        std::fs::write(&path, serde_json::to_vec_pretty(&config).unwrap()).unwrap();
        run(&folder, "serenity-encoder", &["--config", path.to_str().unwrap()]).expect(0);
        this
    })
}

impl SharedModel {
    pub fn as_settings(&self) -> Value {
        json!({
            "model": { "path": self.model },
            "memory": { "stagehand": { "squareq_slab_path": self.slab, "squareq_manifest_path": self.manifest } },
            "data": { "cache_dir": self.cache },
        })
    }
}

/// The configuration that the README runs.
pub fn quickstart_config() -> Value {
    let text = std::fs::read_to_string(root().join("examples/quickstart/config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Sets the leaves of `change` in `value`; a null removes the key.
pub fn merge(value: &mut Value, change: &Value) {
    match (value, change) {
        (Value::Object(value), Value::Object(change)) => {
            for (key, change) in change {
                if change.is_null() {
                    value.remove(key);
                } else {
                    merge(value.entry(key.clone()).or_insert(Value::Null), change);
                }
            }
        }
        (value, change) => *value = change.clone(),
    }
}

impl Lab {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap() }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The output folder of run `name`.
    pub fn output(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Writes a configuration: the quick start's with an output folder of its own, then `change`.
    pub fn config(&self, name: &str, change: &Value) -> String {
        self.config_of(name, &[change])
    }

    fn config_of(&self, name: &str, changes: &[&Value]) -> String {
        let mut config = quickstart_config();
        config["output_dir"] = json!(self.output(name));
        for change in changes {
            merge(&mut config, change);
        }
        let path = self.path().join(format!("{name}.json"));
        std::fs::write(&path, serde_json::to_vec_pretty(&config).unwrap()).unwrap();
        path.to_str().unwrap().to_string()
    }

    /// As [`Self::config`], with the shared model, slab and cache, and few steps.
    pub fn quick_config(&self, name: &str, steps: u64, change: &Value) -> String {
        let few = json!({ "max_steps": steps, "validation": { "samples": 2 }, "checkpoint": { "save_every": 3 } });
        self.config_of(name, &[&shared().as_settings(), &few, change])
    }

    pub fn start(&self, name: &str, args: &[&str]) -> Running {
        start(self.path(), name, args)
    }

    pub fn run(&self, name: &str, args: &[&str]) -> Finished {
        run(self.path(), name, args)
    }

    /// The LoRA that run `name` wrote.
    pub fn lora(&self, name: &str) -> Vec<u8> {
        let path = self.output(name).join("quickstart.safetensors");
        std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    /// Names and bytes of the tensors of the LoRA that run `name` wrote, without its metadata (which names the slab).
    pub fn lora_tensors(&self, name: &str) -> BTreeMap<String, Vec<u8>> {
        let bytes = self.lora(name);
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        tensors.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())).collect()
    }

    /// `log.jsonl` of run `name`, one object a line.
    pub fn log(&self, name: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.output(name).join("log.jsonl")).unwrap();
        text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    }

    /// Panics if a process or a shared segment of this lab stays.
    pub fn assert_nothing_left(&self) {
        let grace = Duration::from_secs(30);
        let start = Instant::now();
        loop {
            let (processes, segments) = (processes_with(self.path().to_str().unwrap()), self.segments());
            if processes.is_empty() && segments.is_empty() {
                return;
            }
            assert!(start.elapsed() < grace, "left behind after {grace:?}: processes {processes:?}, segments {segments:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ring segments of this lab's runs.
    fn segments(&self) -> Vec<PathBuf> {
        let runs: Vec<PathBuf> = std::fs::read_dir(self.path()).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
        runs.iter().map(|output| Path::new("/dev/shm").join(ring_name(output))).filter(|p| p.exists()).collect()
    }
}

/// Name of the ring of a run with that output folder: the same rule as the programs'.
pub fn ring_name(output: &Path) -> String {
    format!("serenity-{}", &blake3::hash(output.as_os_str().as_encoded_bytes()).to_hex()[..16])
}

/// Our processes whose command line contains `marker`: process id and program.
pub fn processes_with(marker: &str) -> BTreeMap<i32, String> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line).into_owned();
        let first = line.split('\0').next().unwrap_or_default();
        let name = Path::new(first).file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with("serenity-") && line.contains(marker) && !is_zombie(pid) {
            found.insert(pid, name);
        }
    }
    found
}

fn is_zombie(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('Z'))
}

/// Waits until `condition` gives something.
pub fn wait_for<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// SIGKILL.
pub fn kill(pid: i32) {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
}

/// Any other signal.
pub fn signal(pid: i32, signal: nix::sys::signal::Signal) {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
}
