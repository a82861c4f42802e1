//! One child process: started in its own group with a control channel on its standard input, watched through a pidfd.
//!
//! Three threads serve a child: one reads its messages, one its standard error, one waits for its end. The last lets the other two
//! finish before it reports [`Event::Exited`], so that nothing of a child comes after its end. Everything arrives in one channel; only the launcher's
//! main thread acts on it.
//!
//! A child must be started by the main thread: the kernel ties the parent-death signal to the thread that did it. Dropping a [`Child`]
//! that still runs kills it, so that no error path of the launcher leaves an orphan.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serenity_protocol::message::{self, FromChild, Role, ToChild};
use serenity_protocol::process::{CONTROL_ENV, PARENT_ENV};
use serenity_protocol::{Error, Result};

use crate::supervise::Ended;

/// A longer line of output is cut here.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// Time for the last words of a child that has ended.
const READER_PATIENCE: Duration = Duration::from_secs(1);
/// Time that a dropped child has between SIGTERM and SIGKILL.
const DROP_PATIENCE: Duration = Duration::from_secs(5);

/// What happens to the launcher.
#[derive(Debug)]
pub enum Event {
    /// A child says something.
    Message(Role, FromChild),
    /// A child's channel carries nonsense: it is not to be trusted further.
    Broken(Role, Error),
    /// A line of a child's standard error that a person should see.
    Line(Role, Level, String),
    /// A child has ended; everything it said has been delivered before.
    Exited(Role),
    /// The launcher is asked to stop (Ctrl-C, SIGTERM, a closed terminal).
    Stop,
}

/// How loud a line of output is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Worth knowing.
    Warning,
    /// Something failed.
    Error,
}

/// What to start.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Who it will be.
    pub role: Role,
    /// Executable.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// File that its standard output and standard error are appended to.
    pub log: PathBuf,
}

/// A child that runs, or has ended and is not reaped yet.
pub struct Child {
    process: std::process::Child,
    pidfd: OwnedFd,
    control: UnixStream,
    reaped: bool,
}

impl Child {
    /// Starts it; events go to `events` from now on.
    ///
    /// # Errors
    /// [`Error::Absent`] if the executable cannot be run or the log not be written.
    pub fn spawn(spec: &Spec, events: &Sender<Event>) -> Result<Self> {
        let failed = |e: std::io::Error| Error::io(format!("cannot start the {}", spec.role), &spec.program, e);
        let (control, theirs) = UnixStream::pair().map_err(failed)?;
        let (output, writer) = std::io::pipe().map_err(failed)?;
        let log = open_log(&spec.log)?;
        let mut command = Command::new(&spec.program);
        command
            .args(&spec.args)
            .env(CONTROL_ENV, "stdin")
            .env(PARENT_ENV, std::process::id().to_string())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            // Results that a program prints for people are for its log; the launcher shows its own.
            .stdout(Stdio::from(log.try_clone().map_err(failed)?))
            .stderr(Stdio::from(writer))
            .process_group(0);
        let process = command.spawn().map_err(|e| {
            failed(e)
                .advice("the programs of this project must lie in one folder: build all of them with `cargo build --release --workspace`")
        })?;
        // Closes our copies of the child's ends: their end must be the child's end.
        drop(command);
        let pid = i32::try_from(process.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| Error::invariant("a child has no process id"))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| failed(e.into()))?;
        let watched = pidfd.try_clone().map_err(failed)?;
        let child = Self { process, pidfd, control, reaped: false };
        child.watch(spec, watched, output, log, events)?;
        Ok(child)
    }

    fn watch(&self, spec: &Spec, pidfd: OwnedFd, output: PipeReader, mut log: File, events: &Sender<Event>) -> Result<()> {
        let role = spec.role;
        let failed = |e: std::io::Error| Error::absent("cannot start a thread").cause(e);
        let control = self.control.try_clone().map_err(|e| Error::absent("cannot duplicate the control channel").cause(e))?;
        // A log that cannot be written must not end the run; the display still shows what matters.
        let _ = writeln!(log, "--- serenity-{role}, process {}, started {} s after 1970", self.process.id(), unix_seconds());
        let sender = events.clone();
        let messages = thread(format!("{role} messages"), move || read_messages(role, control, &sender)).map_err(failed)?;
        let sender = events.clone();
        let lines = thread(format!("{role} output"), move || read_output(role, output, log, &sender)).map_err(failed)?;
        let sender = events.clone();
        thread(format!("{role} end"), move || {
            wait_for_end(&pidfd);
            for reader in [messages, lines] {
                finish(reader);
            }
            // The launcher may be gone already.
            let _ = sender.send(Event::Exited(role));
        })
        .map_err(failed)?;
        Ok(())
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Asks it to end at a safe point.
    pub fn stop(&mut self) {
        if message::send(&mut self.control, &ToChild::Stop).is_err() {
            self.signal(Signal::TERM);
        }
    }

    /// Ends it at once.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        // The only failure is that it has ended already, which is what is wanted.
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// How it ended, after [`Event::Exited`].
    ///
    /// # Errors
    /// [`Error::Invariant`] if the kernel does not say.
    pub fn reap(mut self) -> Result<Ended> {
        let status = self.process.wait().map_err(|e| Error::invariant("a child's end cannot be read").cause(e))?;
        self.reaped = true;
        match (status.code(), status.signal()) {
            (Some(code), _) => Ok(Ended::Code(u8::try_from(code).unwrap_or(70))),
            (None, Some(signal)) => Ok(Ended::Signal(signal)),
            (None, None) => Err(Error::invariant("a child ended neither by exit nor by signal")),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.reaped {
            return;
        }
        self.signal(Signal::TERM);
        if !ends_within(&self.pidfd, DROP_PATIENCE) {
            self.kill();
        }
        // SIGKILL cannot be refused, so this ends.
        let _ = self.process.wait();
    }
}

fn thread<F: FnOnce() + Send + 'static>(name: String, body: F) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name).spawn(body)
}

/// Waits for a reader to deliver the last of a child that has ended. A process that the child started may hold the other end open: it
/// is not waited for.
fn finish(reader: JoinHandle<()>) {
    let deadline = Instant::now() + READER_PATIENCE;
    while !reader.is_finished() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    if reader.is_finished() {
        // A panic in it has been printed; the child's end counts all the same.
        let _ = reader.join();
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn open_log(path: &Path) -> Result<File> {
    let failed = |e| Error::io("cannot write the log", path, e);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    File::options().append(true).create(true).open(path).map_err(failed)
}

fn wait_for_end(pidfd: &OwnedFd) {
    while !ends_within(pidfd, Duration::from_secs(3600)) {}
}

/// Whether the process ends within `patience`: its pidfd becomes readable then.
fn ends_within(pidfd: &OwnedFd, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout =
            rustix::event::Timespec { tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return false,
            Err(rustix::io::Errno::INTR) => {}
            // Readable, or a failure that would come at once again: the caller's wait then decides.
            Ok(_) | Err(_) => return true,
        }
    }
}

fn read_messages(role: Role, mut control: UnixStream, events: &Sender<Event>) {
    loop {
        let event = match message::receive::<FromChild>(&mut control) {
            Ok(Some(message)) => Event::Message(role, message),
            Ok(None) => return,
            Err(error) => {
                let _ = events.send(Event::Broken(role, error));
                return;
            }
        };
        if events.send(event).is_err() {
            return;
        }
    }
}

/// Copies standard error to the log, and passes on what a person should see.
fn read_output(role: Role, output: PipeReader, mut log: File, events: &Sender<Event>) {
    let mut output = BufReader::new(output);
    let mut sieve = Sieve::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        match output.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        }
        // See `watch` for a log that cannot be written.
        let _ = log.write_all(&line);
        let text = String::from_utf8_lossy(&line);
        if let Some((level, text)) = sieve.sift(text.trim_end(), role) {
            let _ = events.send(Event::Line(role, level, text));
        }
    }
}

/// Decides line by line what of a child's output is shown. Lines of the log format are shown from WARN on, without time and level. The
/// error that a child ends with is not: it comes as a message too. Anything else (a panic, a library's complaint) is shown.
#[derive(Debug, Default)]
struct Sieve {
    /// What happened to the last first line of a message; indented lines follow it.
    last: Option<Level>,
}

impl Sieve {
    fn sift(&mut self, line: &str, role: Role) -> Option<(Level, String)> {
        if line.trim().is_empty() {
            return None;
        }
        if line.starts_with("  ") && !line.trim_start().is_empty() && !is_log_line(line) {
            return self.last.map(|level| (level, line.to_string()));
        }
        let (level, text) = match log_parts(line) {
            Some(("ERROR", text)) => (Some(Level::Error), text),
            Some(("WARN", text)) => (Some(Level::Warning), text),
            Some((_, text)) => (None, text),
            None if line.starts_with(&format!("serenity-{role}: error:")) => (None, line),
            None => (Some(Level::Warning), line),
        };
        self.last = level;
        level.map(|level| (level, text.to_string()))
    }
}

fn is_log_line(line: &str) -> bool {
    log_parts(line).is_some()
}

/// Level and text of a line `2026-01-02T03:04:05.678901Z  INFO text`.
fn log_parts(line: &str) -> Option<(&str, &str)> {
    let (time, rest) = line.split_once(' ')?;
    let looks_like_time = time.len() >= 20 && time.ends_with('Z') && time.as_bytes().get(10) == Some(&b'T');
    let (level, text) = rest.trim_start().split_once(' ')?;
    (looks_like_time && ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"].contains(&level)).then_some((level, text))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    fn shell(script: &str, folder: &Path) -> (Child, Receiver<Event>) {
        let (sender, receiver) = channel();
        let args = vec!["-c".into(), script.into()];
        let spec = Spec { role: Role::Loader, program: "/bin/sh".into(), args, log: folder.join("logs/loader.log") };
        (Child::spawn(&spec, &sender).unwrap(), receiver)
    }

    /// All events up to the child's end.
    fn until_end(events: &Receiver<Event>) -> Vec<Event> {
        let mut all = Vec::new();
        loop {
            match events.recv_timeout(Duration::from_secs(20)).unwrap() {
                Event::Exited(Role::Loader) => return all,
                event => all.push(event),
            }
        }
    }

    #[test]
    fn output_is_logged_and_sifted_and_the_end_comes_last() {
        let folder = tempfile::tempdir().unwrap();
        let script = "echo '2026-01-02T03:04:05.678901Z  INFO quiet' >&2; echo '2026-01-02T03:04:05.678901Z  WARN loud' >&2; \
                      echo '  where: here' >&2; echo 'serenity-loader: error: said otherwise' >&2; echo '  expected: x' >&2; echo odd >&2; echo result; exit 69";
        let (child, events) = shell(script, folder.path());
        let lines: Vec<String> = until_end(&events).into_iter().map(|e| format!("{e:?}")).collect();
        let expected = [(Level::Warning, "loud"), (Level::Warning, "  where: here"), (Level::Warning, "odd")];
        let expected: Vec<String> = expected.into_iter().map(|(l, t)| format!("{:?}", Event::Line(Role::Loader, l, t.into()))).collect();
        assert_eq!(lines, expected);
        assert_eq!(child.reap().unwrap(), Ended::Code(69));
        let log = std::fs::read_to_string(folder.path().join("logs/loader.log")).unwrap();
        assert!(log.contains("quiet") && log.contains("said otherwise") && log.contains("result") && log.lines().count() == 8, "{log}");
    }

    #[test]
    fn a_child_has_its_own_group_the_channel_and_the_launchers_pid() {
        let folder = tempfile::tempdir().unwrap();
        // Field 5 of /proc/PID/stat is the process group.
        let script = "set -- $(cat /proc/$$/stat); echo \"$SERENITY_CONTROL $SERENITY_PARENT $(($5 == $$))\" >&2; test -S /dev/stdin";
        let (child, events) = shell(script, folder.path());
        let seen = format!("{:?}", until_end(&events));
        assert!(seen.contains(&format!("stdin {} 1", std::process::id())), "{seen}");
        assert_eq!(child.reap().unwrap(), Ended::Code(0));
    }

    #[test]
    fn messages_arrive_and_nonsense_is_reported() {
        let folder = tempfile::tempdir().unwrap();
        let mut frame = Vec::new();
        message::send(&mut frame, &FromChild::Ready).unwrap();
        let octal: String = frame.iter().chain(&[255; 8]).map(|b| format!("\\{b:03o}")).collect();
        let (child, events) = shell(&format!("printf '{octal}' >&0; sleep 0.1"), folder.path());
        let all = until_end(&events);
        assert!(matches!(all.as_slice(), [Event::Message(Role::Loader, FromChild::Ready), Event::Broken(Role::Loader, _)]), "{all:?}");
        child.reap().unwrap();
    }

    #[test]
    fn kill_and_stop_reach_the_child() {
        let folder = tempfile::tempdir().unwrap();
        let (child, events) = shell("exec sleep 60", folder.path());
        child.kill();
        until_end(&events);
        assert_eq!(child.reap().unwrap(), Ended::Signal(9));
        // The stop frame is the first thing on the channel.
        let (mut child, events) = shell("head -c 4 >/dev/null; exit 7", folder.path());
        child.stop();
        until_end(&events);
        assert_eq!(child.reap().unwrap(), Ended::Code(7));
    }

    #[test]
    fn a_dropped_child_is_dead() {
        let folder = tempfile::tempdir().unwrap();
        let (child, events) = shell("exec sleep 60", folder.path());
        let pid = child.pid();
        drop(child);
        until_end(&events);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_grandchild_that_holds_the_output_does_not_delay_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let begun = Instant::now();
        let (child, events) = shell("sleep 30 & echo $! >&2; exit 3", folder.path());
        let seen = until_end(&events);
        assert!(begun.elapsed() < Duration::from_secs(15));
        assert_eq!(child.reap().unwrap(), Ended::Code(3));
        let Some(Event::Line(_, _, pid)) = seen.first() else { panic!("{seen:?}") };
        rustix::process::kill_process(Pid::from_raw(pid.parse().unwrap()).unwrap(), Signal::KILL).unwrap();
    }

    #[test]
    fn a_missing_program_is_named() {
        let (sender, _receiver) = channel();
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("serenity-loader");
        let spec = Spec { role: Role::Loader, program, args: Vec::new(), log: folder.path().join("l") };
        let error = Child::spawn(&spec, &sender).err().unwrap();
        assert_eq!(error.exit_code(), 69);
        assert!(error.to_string().contains("cargo build"), "{error}");
    }
}
