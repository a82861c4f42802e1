//! The connection: ssh with an argument array, batch mode, and host keys that must be known.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serenity_protocol::config::RemoteEncoder;
use serenity_protocol::process::{CONTROL_ENV, PARENT_ENV};
use serenity_protocol::{Error, Result};

use super::client::Link;

/// Lines of ssh's and the remote encoder's standard error that are kept for a message.
const LINES_KEPT: usize = 20;
/// Time that ssh has to end by itself before it is killed.
const PATIENCE: Duration = Duration::from_secs(2);
/// What ssh says where another attempt cannot help.
const HOPELESS: [&str; 6] = [
    "Host key verification failed",
    "REMOTE HOST IDENTIFICATION HAS CHANGED",
    "Permission denied",
    "Could not resolve hostname",
    "Bad configuration option",
    "No such identity",
];

/// The arguments of ssh. Everything about the job goes through the frames: the other machine's shell sees the command alone, whose
/// letters the configuration has checked.
#[must_use]
pub fn arguments(remote: &RemoteEncoder) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["-T".into()];
    let mut option = |text: OsString| args.extend(["-o".into(), text]);
    for fixed in [
        "BatchMode=yes",
        "StrictHostKeyChecking=yes",
        "ConnectTimeout=20",
        "ServerAliveInterval=15",
        "ServerAliveCountMax=3",
        "ClearAllForwardings=yes",
    ] {
        option(fixed.into());
    }
    let file = |key: &str, path: &std::path::Path| {
        let mut text = OsString::from(key);
        // ssh takes an option apart at spaces; the configuration has refused quotes.
        text.push("=\"");
        text.push(path);
        text.push("\"");
        text
    };
    if let Some(path) = &remote.identity_file {
        option("IdentitiesOnly=yes".into());
        option(file("IdentityFile", path));
    }
    if let Some(path) = &remote.known_hosts_file {
        option(file("UserKnownHostsFile", path));
    }
    if let Some(port) = remote.port {
        args.extend(["-p".into(), port.to_string().into()]);
    }
    args.extend(["--".into(), remote.host.clone().into(), remote.command.clone().into(), "--stdio".into()]);
    args
}

/// What stands behind a link over ssh.
struct Ssh {
    child: Child,
    lines: Arc<Mutex<VecDeque<String>>>,
    printer: Option<JoinHandle<()>>,
}

/// Starts ssh.
///
/// # Errors
/// [`Error::Absent`] if there is no ssh.
pub fn connect(remote: &RemoteEncoder) -> Result<Link> {
    let failed = |e: std::io::Error| Error::absent("cannot start ssh").cause(e).advice("install an OpenSSH client");
    let mut child = Command::new("ssh")
        .args(arguments(remote))
        .env_remove(CONTROL_ENV)
        .env_remove(PARENT_ENV)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let (Some(writer), Some(reader), Some(errors)) = (child.stdin.take(), child.stdout.take(), child.stderr.take()) else {
        return Err(Error::invariant("ssh was started without pipes"));
    };
    let lines: Arc<Mutex<VecDeque<String>>> = Arc::default();
    let kept = lines.clone();
    let print = move || {
        for line in BufReader::new(errors).lines().map_while(std::result::Result::ok) {
            eprintln!("{line}");
            if let Ok(mut kept) = kept.lock() {
                kept.push_back(line);
                if kept.len() > LINES_KEPT {
                    kept.pop_front();
                }
            }
        }
    };
    let printer = std::thread::Builder::new().name("ssh messages".into()).spawn(print).map_err(failed)?;
    let mut ssh = Ssh { child, lines, printer: Some(printer) };
    Ok(Link { reader: Box::new(reader), writer: Box::new(writer), close: Box::new(move || ssh.close()) })
}

impl Ssh {
    /// Ends ssh; why it failed, if another attempt would fail in the same way.
    fn close(&mut self) -> Option<Error> {
        let begun = Instant::now();
        let status = loop {
            match self.child.try_wait() {
                Ok(None) if begun.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(10)),
                Ok(None) => {
                    let _ = self.child.kill();
                    break self.child.wait().ok();
                }
                Ok(status) => break status,
                Err(_) => break None,
            }
        };
        if let Some(printer) = self.printer.take().filter(|p| p.is_finished() || status.is_some()) {
            let _ = printer.join();
        }
        let said: Vec<String> = self.lines.lock().map(|l| l.iter().cloned().collect()).unwrap_or_default();
        let code = status.and_then(|s| s.code());
        let hopeless = code == Some(255) && said.iter().any(|line| HOPELESS.iter().any(|h| line.contains(h)));
        if !hopeless && !matches!(code, Some(126 | 127)) {
            return None;
        }
        let advice = if hopeless {
            "make `ssh -o BatchMode=yes HOST true` work first: key, agent, and the host's key in known_hosts"
        } else {
            "install serenity-encoder there, or set encoder.command to its path"
        };
        Some(Error::absent("the other machine cannot be used").cause(said.join("\n")).advice(advice))
    }
}

impl Drop for Ssh {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
