//! The encoder on another machine: frames in one process with damage on the way, and a real sshd on this machine with cuts.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lab::{Dir, counts};
use serenity_encoder::remote::client::Link;
use serenity_encoder::remote::frame::{Kind, send_json};
use serenity_encoder::remote::{Hello, server};
use serenity_encoder::run::{RunOptions, Summary, run, run_with};
use serenity_protocol::Result;
use serenity_protocol::message::Role;
use serenity_protocol::process::Process;

const CAPTIONS: [&str; 4] = ["a cat", "two dogs under a tree", "東京 🚀", ""];

/// Passes frames on; of the first frame of `kind`, one byte is changed.
fn relay(mut from: UnixStream, mut to: UnixStream, kind: Kind, at: usize, armed: Arc<Mutex<bool>>) {
    let mut head = [0; 16];
    while from.read_exact(&mut head).is_ok() {
        let length = u32::from_le_bytes(head[8..12].try_into().unwrap()) as usize;
        let mut frame = head.to_vec();
        frame.resize(16 + length + 32, 0);
        if from.read_exact(&mut frame[16..]).is_err() {
            break;
        }
        if head[4] == kind as u8 && std::mem::take(&mut *armed.lock().unwrap()) {
            let at = at % frame.len();
            frame[at] ^= 1 << (at % 8);
        }
        if to.write_all(&frame).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

/// A connection to a server in this process, through a relay for each direction.
fn damaged_link(kind: Kind, at: usize, armed: &Arc<Mutex<bool>>) -> Link {
    let (client, client_far) = UnixStream::pair().unwrap();
    let (server, server_far) = UnixStream::pair().unwrap();
    let copy = |s: &UnixStream| s.try_clone().unwrap();
    let (a, b, c, d) = (copy(&client_far), copy(&server_far), copy(&server_far), copy(&client_far));
    let (first, second) = (armed.clone(), armed.clone());
    std::thread::spawn(move || relay(a, b, kind, at, first));
    std::thread::spawn(move || relay(c, d, kind, at, second));
    let (input, output) = (copy(&server), copy(&server));
    std::thread::spawn(move || {
        let _ = server::serve(input, output, RunOptions::default().budget, &Process::detached(Role::Encoder));
        let _ = server.shutdown(std::net::Shutdown::Both);
    });
    let (reader, writer) = (copy(&client), copy(&client));
    let close = move || {
        let _ = client.shutdown(std::net::Shutdown::Both);
        None
    };
    Link { reader: Box::new(reader), writer: Box::new(writer), close: Box::new(close) }
}

fn through(dir: &Dir, cache: &str, connect: &mut dyn FnMut() -> Result<Link>) -> Result<Summary> {
    let config = dir.config(cache, &["encoder.host=nowhere"]);
    run_with(&config, RunOptions::default(), &Process::detached(Role::Encoder), Some(connect))
}

#[test]
fn a_damaged_frame_of_any_kind_costs_a_connection_and_nothing_else() {
    let dir = Dir::new(&CAPTIONS);
    dir.run("local").unwrap();
    let local = dir.entries("local");
    for (n, kind) in Kind::ALL.into_iter().filter(|k| *k != Kind::Failed).enumerate() {
        for (m, at) in [3, 9, 14, 20, 1_000_003].into_iter().enumerate() {
            let (cache, armed) = (format!("remote{n}-{m}"), Arc::new(Mutex::new(true)));
            let mut connections = 0;
            let mut connect = || {
                connections += 1;
                Ok(damaged_link(kind, at, &armed))
            };
            let summary = through(&dir, &cache, &mut connect).unwrap();
            assert_eq!(counts(summary), (4, 4, 0), "{kind:?}");
            assert!(!*armed.lock().unwrap(), "{kind:?} was never sent");
            assert!(connections >= 2 || kind == Kind::Alive || kind == Kind::Done, "{kind:?}: {connections}");
            assert!(dir.entries(&cache) == local, "{kind:?} byte {at}");
        }
    }
}

#[test]
fn other_weights_are_refused_even_if_the_refusal_is_damaged() {
    let dir = Dir::new(&CAPTIONS);
    let config = dir.config("cache", &["encoder.host=nowhere", &format!("encoder.model_path={}", dir.path("other").display())]);
    assert!(Command::new("cp").args(["-r".into(), dir.path("model"), dir.path("other")]).status().unwrap().success());
    let vae = dir.path("other/vae/config.json");
    std::fs::write(&vae, std::fs::read_to_string(&vae).unwrap() + "\n").unwrap();
    let armed = Arc::new(Mutex::new(true));
    let mut connections = 0;
    let mut connect = || {
        connections += 1;
        Ok(damaged_link(Kind::Failed, 40, &armed))
    };
    let error = run_with(&config, RunOptions::default(), &Process::detached(Role::Encoder), Some(&mut connect)).unwrap_err();
    assert!(error.exit_code() == 65 && error.to_string().contains("VAE on the other machine"), "{error}");
    assert_eq!((connections, dir.entries("cache").len()), (2, 0));
}

fn sound_link() -> Link {
    damaged_link(Kind::Failed, 0, &Arc::new(Mutex::new(false)))
}

#[test]
fn what_cannot_be_sent_or_decoded_ends_the_run_with_its_name() {
    // An image that goes after the plan was made, and one that is none, named as frames of films are.
    let gone = Dir::new(&CAPTIONS);
    let image = gone.path("images/2.png");
    let mut connections = 0;
    let mut connect = || {
        connections += 1;
        std::fs::remove_file(&image).unwrap();
        Ok(sound_link())
    };
    let started = Instant::now();
    let error = through(&gone, "cache", &mut connect).unwrap_err();
    assert!(error.exit_code() == 69 && error.to_string().contains("2.png"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(20));
    assert_eq!(connections, 1);
    let bad = Dir::new(&CAPTIONS);
    std::fs::write(bad.path("images/frame_0001.png"), b"no image").unwrap();
    std::fs::write(bad.path("images/frame_0001.txt"), b"a caption").unwrap();
    let mut connections = 0;
    let mut connect = || {
        connections += 1;
        Ok(sound_link())
    };
    let error = through(&bad, "cache", &mut connect).unwrap_err();
    assert!(error.exit_code() == 65 && error.to_string().contains("frame_0001.png"), "{error}");
    assert_eq!(connections, 1);
}

#[test]
fn two_that_ask_another_machine_share_the_work() {
    let dir = Dir::new(&CAPTIONS);
    let one = || counts(through(&dir, "cache", &mut || Ok(sound_link())).unwrap());
    let (a, b) = std::thread::scope(|scope| {
        let other = scope.spawn(one);
        (one(), other.join().unwrap())
    });
    assert_eq!((a.0 + b.0, a.1 + b.1), (4, 4), "{a:?} {b:?}");
}

#[test]
fn a_slab_encodes_on_the_other_machine_too() {
    use serenity_loader::slab_tool::build::{BuildOptions, Component, build};
    let dir = Dir::new(&CAPTIONS);
    let options = BuildOptions::new(dir.path("model").to_str().unwrap(), dir.path("text"));
    build(&BuildOptions { component: Component::TextEncoder, ..options }, &Process::detached(Role::Slab)).unwrap();
    let set = format!("model.text_encoder_slab_path={}", dir.path("text.safetensors").display());
    let process = Process::detached(Role::Encoder);
    run(&dir.config("local", &[&set]), RunOptions::default(), &process).unwrap();
    let config = dir.config("remote", &[&set, "encoder.host=nowhere"]);
    let mut connect = || Ok(sound_link());
    let summary = run_with(&config, RunOptions::default(), &process, Some(&mut connect)).unwrap();
    assert_eq!(counts(summary), (4, 4, 0));
    assert!(dir.entries("remote") == dir.entries("local"));
}

/// A server with keys of its own on a port of its own; killed when dropped.
struct Sshd {
    child: Child,
    port: u16,
    folder: tempfile::TempDir,
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Sshd {
    const PROGRAM: &str = "/usr/sbin/sshd";

    /// `None`, said loudly, where there is no sshd.
    fn start() -> Option<Self> {
        if !Path::new(Self::PROGRAM).exists() || Command::new("ssh").arg("-V").output().is_err() {
            let _ = writeln!(std::io::stderr(), "SKIPPED: no {} or no ssh here (Debian: openssh-server, openssh-client)", Self::PROGRAM);
            return None;
        }
        // As root, sshd wants this folder to exist; otherwise it does not look.
        let _ = std::fs::create_dir_all("/run/sshd");
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["host", "user", "stranger"] {
            let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path(name)).status().unwrap();
            assert!(made.success());
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\nMaxStartups 100\n",
            path("host").display(),
            path("user.pub").display()
        );
        std::fs::write(path("sshd_config"), config).unwrap();
        let log = std::fs::File::create(path("log")).unwrap();
        let child =
            Command::new(Self::PROGRAM).args(["-D", "-e", "-f"]).arg(path("sshd_config")).stderr(log).stdin(Stdio::null()).spawn().unwrap();
        let this = Self { child, port, folder };
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(60), "{}", std::fs::read_to_string(this.folder.path().join("log")).unwrap());
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(this)
    }

    fn settings(&self, port: u16, key: &str, command: &str) -> Vec<String> {
        let public = std::fs::read_to_string(self.folder.path().join(format!("{key}.pub"))).unwrap();
        let known = self.folder.path().join(format!("known-{port}-{key}"));
        std::fs::write(&known, format!("[127.0.0.1]:{port} {public}")).unwrap();
        let user = String::from_utf8(Command::new("id").arg("-un").output().unwrap().stdout).unwrap();
        vec![
            format!("encoder.host={}@127.0.0.1", user.trim()),
            format!("encoder.port={port}"),
            format!("encoder.identity_file={}", self.folder.path().join("user").display()),
            format!("encoder.known_hosts_file={}", known.display()),
            format!("encoder.command={command}"),
        ]
    }

    fn run(&self, dir: &Dir, cache: &str, settings: &[String]) -> Result<Summary> {
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        run(&dir.config(cache, &settings), RunOptions::default(), &Process::detached(Role::Encoder))
    }
}

const ENCODER: &str = env!("CARGO_BIN_EXE_serenity-encoder");

#[test]
fn over_ssh_as_here_and_nothing_from_strangers_or_other_versions() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = Dir::new(&CAPTIONS);
    dir.run("local").unwrap();
    let summary = sshd.run(&dir, "remote", &sshd.settings(sshd.port, "host", ENCODER)).unwrap();
    assert_eq!(counts(summary), (4, 4, 0));
    assert!(dir.entries("remote") == dir.entries("local"));

    let error = sshd.run(&dir, "stranger", &sshd.settings(sshd.port, "stranger", ENCODER)).unwrap_err();
    assert!(error.exit_code() == 69 && error.to_string().contains("Host key verification failed"), "{error}");

    let error = sshd.run(&dir, "stranger", &sshd.settings(sshd.port, "host", "/no/such/program")).unwrap_err();
    assert!(error.exit_code() == 69 && error.to_string().contains("encoder.command"), "{error}");

    let (hello, script) = (dir.path("hello"), dir.path("other-version"));
    let mut frame = Vec::new();
    send_json(&mut frame, Kind::Hello, &Hello { wire: 999, ..Hello::ours() }).unwrap();
    std::fs::write(&hello, frame).unwrap();
    std::fs::write(&script, format!("#!/bin/sh\ncat {}\nsleep 0.3\n", hello.display())).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let error = sshd.run(&dir, "stranger", &sshd.settings(sshd.port, "host", script.to_str().unwrap())).unwrap_err();
    assert!(error.exit_code() == 69 && error.to_string().contains("wire 999"), "{error}");
    assert!(!dir.path("stranger/text").exists());
}

/// The encoder where no file can grow: what a full disk does, without root and without a disk to fill.
fn full_disk(dir: &Dir) -> String {
    let script = dir.path("full-disk");
    std::fs::write(&script, format!("#!/bin/sh\ntrap '' XFSZ\nulimit -f 0\nexec {ENCODER} --hidden-mb 0 \"$@\"\n")).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    script.to_str().unwrap().into()
}

#[test]
fn a_host_that_fills_its_disk_is_named_and_what_it_has_done_is_kept() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = Dir::new(&CAPTIONS);
    dir.run("local").unwrap();
    let error = sshd.run(&dir, "remote", &sshd.settings(sshd.port, "host", &full_disk(&dir))).unwrap_err();
    assert!(error.exit_code() == 75 && error.to_string().contains("hidden states"), "{error}");
    let kept = dir.entries("remote");
    assert!(kept.len() == 4 && kept.iter().all(|(name, bytes)| dir.entries("local").get(name) == Some(bytes)), "the images");
    let summary = sshd.run(&dir, "remote", &sshd.settings(sshd.port, "host", ENCODER)).unwrap();
    assert_eq!(counts(summary), (4, 0, 4));
    assert!(dir.entries("remote") == dir.entries("local"));
}

#[test]
fn a_full_disk_under_the_cache_leaves_no_torn_entry() {
    let dir = Dir::new(&CAPTIONS);
    dir.run("whole").unwrap();
    let config = serde_json::json!({
        "model": {"path": dir.path("model"), "max_sequence_length": 96},
        "data": {"concepts": [{"path": dir.path("images")}], "cache_dir": dir.path("cache")},
        "resolution": 64, "output_dir": dir.path("out"), "train_device": "cpu",
    });
    std::fs::write(dir.path("config.json"), config.to_string()).unwrap();
    let done = Command::new(full_disk(&dir)).arg("--config").arg(dir.path("config.json")).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.code() == Some(75) && said.contains("free some space"), "{:?}: {said}", done.status);
    assert!(dir.entries("cache").is_empty());
    dir.run("cache").unwrap();
    assert!(dir.entries("cache") == dir.entries("whole"));
}

/// Copies until the budget that both directions share is used up, then cuts both.
fn pump(mut from: TcpStream, mut to: TcpStream, budget: &AtomicUsize) {
    let mut buffer = [0; 512];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        // Relaxed: a counter; that the two directions overshoot by a buffer does not matter.
        if budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(n)).is_err()
            || to.write_all(&buffer[..n]).is_err()
        {
            break;
        }
    }
    let _ = (from.shutdown(std::net::Shutdown::Both), to.shutdown(std::net::Shutdown::Both));
}

#[test]
fn twenty_cuts_at_random_points_change_nothing() {
    const CUTS: usize = 20;
    let Some(sshd) = Sshd::start() else { return };
    let dir = Dir::new(&CAPTIONS);
    dir.run("local").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, server) = (listener.local_addr().unwrap().port(), sshd.port);
    let cuts = Arc::new(AtomicUsize::new(0));
    let counted = cuts.clone();
    std::thread::spawn(move || {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for client in listener.incoming().flatten() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Relaxed: only this thread writes it.
            let budget = if counted.fetch_add(1, Ordering::Relaxed) < CUTS { (state >> 33) as usize % 60_000 } else { usize::MAX };
            let (far, budget) = (TcpStream::connect(("127.0.0.1", server)).unwrap(), Arc::new(AtomicUsize::new(budget)));
            let (a, b, other) = (client.try_clone().unwrap(), far.try_clone().unwrap(), budget.clone());
            std::thread::spawn(move || pump(a, b, &budget));
            std::thread::spawn(move || pump(far, client, &other));
        }
    });
    let settings = sshd.settings(port, "host", ENCODER);
    let mut runs = 0;
    // A fresh image whenever everything has come, until all cuts have happened.
    loop {
        runs += 1;
        assert!(runs < 60);
        match sshd.run(&dir, "remote", &settings) {
            // Relaxed: a counter that only grows.
            Ok(_) if cuts.load(Ordering::Relaxed) > CUTS => break,
            Ok(_) => dir.add(100 + runs, &format!("one more, {runs}")),
            Err(e) => assert_eq!(e.exit_code(), 75, "{e}"),
        }
    }
    dir.run("local").unwrap();
    assert!(dir.entries("remote") == dir.entries("local"));
}
