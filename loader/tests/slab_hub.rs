//! `serenity-slab build --model OWNER/NAME` against a small hub on this machine: from the cache, through cuts, past every refusal.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod slab_common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use slab_common::models::{geometry, random_bf16, write_folder};
use slab_common::{build_into, golden};

const REVISION: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the hub behaves.
#[derive(Default)]
struct Manners {
    /// Answer everything with this status.
    status: Option<u16>,
    /// Let only this token in.
    token: Option<String>,
    /// Break transfers off after so many bytes, so many times.
    cut_after: Option<(usize, usize)>,
    /// Send so many bytes a second.
    slow: Option<usize>,
    /// Change a byte of this file.
    spoil: Option<String>,
    /// Answer so many requests with 503 first.
    busy: usize,
}

/// Path and first byte asked for.
type Request = (String, Option<usize>);

/// A hub with one model.
struct Hub {
    address: String,
    manners: Arc<Mutex<Manners>>,
    requests: Arc<Mutex<Vec<Request>>>,
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

impl Hub {
    fn start(model: &Path) -> Self {
        let mut files = BTreeMap::new();
        collect(model, model, &mut files);
        // What must not be fetched.
        files.insert("flux2-single.safetensors".into(), vec![7; 1000]);
        files.insert("transformer/.hidden.json".into(), vec![7; 10]);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let hub = Self { address, manners: Arc::default(), requests: Arc::default() };
        let (manners, requests, files) = (hub.manners.clone(), hub.requests.clone(), Arc::new(files));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (manners, requests, files) = (manners.clone(), requests.clone(), files.clone());
                // A client that went away is no failure of the hub.
                std::thread::spawn(move || drop(serve(stream, &files, &manners, &requests)));
            }
        });
        hub
    }

    fn set(&self, change: impl FnOnce(&mut Manners)) {
        let mut manners = self.manners.lock().unwrap();
        *manners = Manners::default();
        change(&mut manners);
        self.requests.lock().unwrap().clear();
    }

    fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

fn collect(root: &Path, at: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(at).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(root, &path, files);
        } else {
            files.insert(path.strip_prefix(root).unwrap().to_str().unwrap().into(), std::fs::read(&path).unwrap());
        }
    }
}

fn serve(
    stream: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    manners: &Mutex<Manners>,
    requests: &Mutex<Vec<Request>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let path = first.split(' ').nth(1).unwrap_or("").to_owned();
    let (mut from, mut token) = (None, None);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line == "\r\n" {
            break;
        }
        let (name, value) = line.trim_end().split_once(": ").unwrap_or(("", ""));
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                from = value.strip_prefix("bytes=").and_then(|v| v.split('-').next()?.parse::<usize>().ok().map(|f| (f, v.ends_with("-0"))))
            }
            "authorization" => token = value.strip_prefix("Bearer ").map(str::to_owned),
            _ => {}
        }
    }
    requests.lock().unwrap().push((path.clone(), from.filter(|(_, probe)| !probe).map(|(f, _)| f)));
    let mut out = stream;
    let status = {
        let mut manners = manners.lock().unwrap();
        if manners.busy > 0 {
            manners.busy -= 1;
            Some(503)
        } else if manners.token.is_some() && manners.token != token {
            Some(401)
        } else {
            manners.status
        }
    };
    if let Some(status) = status {
        return write!(out, "HTTP/1.1 {status} No\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno");
    }
    if path.starts_with("/api/models/owner/name/revision/main") {
        let siblings: Vec<Value> = files
            .iter()
            .map(|(name, bytes)| {
                let lfs = name.ends_with(".safetensors").then(|| json!({"sha256": hex(bytes), "size": bytes.len(), "pointerSize": 134}));
                json!({"rfilename": name, "size": bytes.len(), "blobId": "0", "lfs": lfs})
            })
            .collect();
        let body = json!({"id": "owner/name", "sha": REVISION, "siblings": siblings}).to_string();
        return write!(out, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
    }
    let prefix = format!("/owner/name/resolve/{REVISION}/");
    let Some((name, bytes)) = path.strip_prefix(&prefix).and_then(|name| files.get_key_value(name)) else {
        return write!(out, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    let (from, probe) = from.unwrap_or((0, false));
    if from >= bytes.len() {
        return write!(out, "HTTP/1.1 416 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    let mut body = bytes[from..if probe { from + 1 } else { bytes.len() }].to_vec();
    let etag = if name.ends_with(".safetensors") { hex(bytes) } else { format!("{}0", &hex(bytes)[..39]) };
    write!(
        out,
        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{}\r\nETag: \"{etag}\"\r\nX-Repo-Commit: {REVISION}\r\nConnection: close\r\n\r\n",
        body.len(),
        from + body.len() - 1,
        bytes.len()
    )?;
    let slow = {
        let mut manners = manners.lock().unwrap();
        if manners.spoil.as_deref() == Some(name) && !probe {
            let last = body.len() - 1;
            body[last] ^= 1;
        }
        if let Some((after, times)) = manners.cut_after
            && !probe
            && times > 0
            && body.len() > after
        {
            manners.cut_after = Some((after, times - 1));
            body.truncate(after);
        }
        manners.slow
    };
    let Some(rate) = slow.filter(|_| !probe) else { return out.write_all(&body) };
    for piece in body.chunks(rate / 20) {
        out.write_all(piece)?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// A model of 0.3 MB, its slab by path, and a hub that has it.
struct Lab {
    folder: tempfile::TempDir,
    hub: Hub,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let g = geometry(1, 1, 2, 32, 16, 48);
        write_folder(&folder.path().join("model/transformer"), &g, &random_bf16(&g));
        std::fs::write(
            folder.path().join("model/model_index.json"),
            r#"{"_class_name": "Flux2Pipeline", "transformer": ["diffusers", "x"], "vae": ["diffusers", "y"]}"#,
        )
        .unwrap();
        std::fs::create_dir_all(folder.path().join("reference")).unwrap();
        build_into(&folder.path().join("reference"), &folder.path().join("model/transformer"));
        let hub = Hub::start(&folder.path().join("model"));
        Self { folder, hub }
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("home/hub/models--owner--name")
    }

    fn command(&self, environment: &[(&str, &str)]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_serenity-slab"));
        command.args(["build", "--model", "owner/name", "--output"]).arg(self.folder.path().join("out/slab"));
        for name in ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"] {
            command.env_remove(name);
        }
        command.env("HF_HOME", self.folder.path().join("home")).env("HF_ENDPOINT", &self.hub.address).envs(environment.iter().copied());
        command
    }

    fn run(&self, environment: &[(&str, &str)]) -> Output {
        self.command(environment).output().unwrap()
    }

    /// The run succeeds, and the slab is that of the model by path.
    fn succeeds(&self, environment: &[(&str, &str)]) {
        let output = self.run(environment);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        for name in ["slab.safetensors", "slab.manifest.json", "slab.other.safetensors"] {
            let read = |at: &str| std::fs::read(self.folder.path().join(at).join(name)).unwrap();
            assert!(read("out") == read("reference"), "{name}");
        }
        std::fs::remove_dir_all(self.folder.path().join("out")).unwrap();
    }

    /// The run fails with this exit code and says all of these.
    fn fails(&self, environment: &[(&str, &str)], code: i32, says: &[&str]) {
        let output = self.run(environment);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{message}");
        says.iter().for_each(|text| assert!(message.contains(text), "expected '{text}' in: {message}"));
    }
}

#[test]
fn a_model_is_downloaded_once_and_then_used_without_a_request() {
    let lab = Lab::new();
    lab.succeeds(&[]);
    let fetched = lab.hub.requests();
    assert!(!fetched.iter().any(|(path, _)| path.contains("single") || path.contains("hidden")), "{fetched:?}");
    assert_eq!(std::fs::read_to_string(lab.cache().join("refs/main")).unwrap(), REVISION);
    assert_eq!(std::fs::read_dir(lab.cache().join("refs")).unwrap().count(), 1);
    let left: Vec<_> =
        std::fs::read_dir(lab.cache().join("blobs")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!left.iter().any(|n| n.ends_with("unchecked") || n.ends_with("part")), "{left:?}");
    lab.hub.set(|m| m.status = Some(500));
    lab.succeeds(&[]);
    lab.succeeds(&[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(lab.hub.requests(), []);
    // A shard that somebody deleted comes again, and only that.
    lab.hub.set(|_| {});
    let shard = lab.cache().join("snapshots").join(REVISION).join("transformer/diffusion_pytorch_model.safetensors");
    std::fs::remove_file(shard.canonicalize().unwrap()).unwrap();
    lab.fails(&[("HF_HUB_OFFLINE", "1")], 69, &["owner/name", "weights in transformer", "HF_HUB_OFFLINE"]);
    lab.succeeds(&[]);
    let again = lab.hub.requests();
    assert!(again.iter().all(|(path, _)| path.contains("/api/") || path.ends_with("model.safetensors")), "{again:?}");
    // Its link alone: nothing is transferred.
    std::fs::remove_file(&shard).unwrap();
    lab.hub.set(|_| {});
    lab.succeeds(&[]);
    assert_eq!(lab.hub.requests().len(), 1);
}

#[test]
fn a_cut_connection_is_taken_up_where_it_broke() {
    let lab = Lab::new();
    lab.hub.set(|m| m.cut_after = Some((40_000, 3)));
    lab.succeeds(&[]);
    let starts: Vec<usize> =
        lab.hub.requests().into_iter().filter(|(p, _)| p.ends_with("model.safetensors")).filter_map(|(_, from)| from).collect();
    assert_eq!(starts, [0, 40_000, 80_000, 120_000]);
}

fn wait_until(what: &str, mut there: impl FnMut() -> bool) {
    let started = std::time::Instant::now();
    while !there() {
        assert!(started.elapsed() < Duration::from_secs(120), "{what}: not within two minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Bytes of the largest file below a folder; 0 if there is none.
fn largest_file(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
    entries.map(|p| if p.is_dir() { largest_file(&p) } else { p.metadata().map_or(0, |m| m.len()) }).max().unwrap_or(0)
}

#[test]
fn a_killed_download_goes_on_in_the_next_run() {
    let lab = Lab::new();
    lab.hub.set(|m| m.slow = Some(100_000));
    let mut child = lab.command(&[]).stderr(Stdio::null()).spawn().unwrap();
    wait_until("a part of the model on disk", || largest_file(&lab.cache()) > 20_000);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!lab.cache().join("refs/main").exists());
    lab.fails(&[("HF_HUB_OFFLINE", "1")], 69, &["owner/name"]);
    lab.hub.set(|_| {});
    lab.succeeds(&[]);
    let starts: Vec<usize> =
        lab.hub.requests().into_iter().filter(|(p, _)| p.ends_with("model.safetensors")).filter_map(|(_, from)| from).collect();
    assert!(starts.len() == 1 && starts[0] > 10_000, "{starts:?}");
    // Asked to stop, it stops at once.
    std::fs::remove_dir_all(lab.cache()).unwrap();
    lab.hub.set(|m| m.slow = Some(20_000));
    let mut child = lab.command(&[]).stderr(Stdio::null()).spawn().unwrap();
    wait_until("a request for the model", || lab.hub.requests().iter().any(|(p, _)| p.ends_with("model.safetensors")));
    let pid = rustix::process::Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(75));
}

#[test]
fn a_wrong_checksum_is_refused_and_not_kept() {
    let lab = Lab::new();
    lab.hub.set(|m| m.spoil = Some("transformer/diffusion_pytorch_model.safetensors".into()));
    lab.fails(&[], 65, &["diffusion_pytorch_model.safetensors", "SHA-256", "removed"]);
    lab.fails(&[("HF_HUB_OFFLINE", "1")], 69, &["owner/name"]);
    lab.hub.set(|_| {});
    lab.succeeds(&[]);
    // A kill between download and comparison: the mark makes the next run compare.
    let blob = lab.cache().join("snapshots").join(REVISION).join("transformer/diffusion_pytorch_model.safetensors").canonicalize().unwrap();
    let mut bytes = std::fs::read(&blob).unwrap();
    bytes[1000] ^= 1;
    std::fs::write(&blob, bytes).unwrap();
    std::fs::write(blob.with_extension("unchecked"), "").unwrap();
    lab.succeeds(&[]);
    assert!(!blob.with_extension("unchecked").exists());
}

#[test]
fn refusals_of_the_hub_are_explained() {
    let lab = Lab::new();
    lab.hub.set(|m| m.token = Some("hf_right".into()));
    lab.fails(&[], 69, &["without a token", "HF_TOKEN", "licence"]);
    lab.fails(&[("HF_TOKEN", "hf_wrong")], 69, &["does not accept the token"]);
    lab.succeeds(&[("HF_TOKEN", "hf_right")]);
    std::fs::remove_dir_all(lab.cache()).unwrap();
    // A token that `hf auth login` left.
    std::fs::write(lab.folder.path().join("home/token"), "hf_right\n").unwrap();
    lab.succeeds(&[]);
    std::fs::remove_dir_all(lab.cache()).unwrap();
    for (status, code, says) in [(403, 69, "gated"), (404, 69, "no model 'owner/name'"), (418, 69, "418")] {
        lab.hub.set(|m| m.status = Some(status));
        lab.fails(&[], code, &[says, "owner/name"]);
        assert_eq!(lab.hub.requests().len(), 1, "a refusal is no reason to ask again");
    }
    lab.hub.set(|m| m.status = Some(500));
    lab.fails(&[], 75, &["HTTP 500"]);
    lab.hub.set(|m| m.busy = 2);
    lab.succeeds(&[]);
}

#[test]
fn offline_and_unreachable_are_told_apart() {
    let lab = Lab::new();
    lab.fails(&[("HF_HUB_OFFLINE", "1")], 69, &["owner/name", "HF_HUB_OFFLINE", "HF_HOME"]);
    assert_eq!(lab.hub.requests(), []);
    // A port that nobody listens on.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    lab.fails(&[("HF_ENDPOINT", &format!("http://{closed}"))], 75, &["connection to the hub failed", "HF_ENDPOINT"]);
    // A server that is no hub.
    lab.fails(&[("HF_ENDPOINT", &format!("{}/elsewhere", lab.hub.address))], 69, &["no model 'owner/name'"]);
}

#[test]
fn a_local_folder_is_never_looked_up() {
    let lab = Lab::new();
    let model = golden("model");
    let mut command = lab.command(&[]);
    let output = command.args(["--model", model.to_str().unwrap()]).output().unwrap();
    // Given twice: the command line is wrong, and nothing is asked.
    assert_eq!(output.status.code(), Some(64));
    let output = Command::new(env!("CARGO_BIN_EXE_serenity-slab"))
        .args(["build", "--output", lab.folder.path().join("out/slab").to_str().unwrap(), "--model", model.to_str().unwrap()])
        .env("HF_ENDPOINT", &lab.hub.address)
        .output()
        .unwrap();
    assert!(output.status.success());
    assert_eq!(lab.hub.requests(), []);
}
