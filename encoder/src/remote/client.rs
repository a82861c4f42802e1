//! This side: asks for what is missing, verifies each entry, writes it; opens the connection again when it is cut.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use serenity_protocol::cache::{CachePlan, LatentEntry, LatentItem, TextEntry, TextItem};
use serenity_protocol::config::{Config, DeviceKind};
use serenity_protocol::process::Process;
use serenity_protocol::{Error, Result, atomic_file};

use super::frame::{self, Frame, Kind};
use super::{CaptionItem, EntryHead, Failure, Hello, ImageHead, Job};
use crate::engine::Meter;
use crate::run::{Connect, Missing, Summary, read_image};

/// Attempts in a row that bring no entry.
const ATTEMPTS_MAX: u32 = 6;
/// Pause before the second attempt; doubles with each.
const PAUSE: Duration = Duration::from_millis(200);
/// Silence after which a connection is taken for cut. The server says every second that it is alive.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Longest wait before the stop flag is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Pixels of a token on each axis.
const TOKEN_PIXELS: usize = 16;

/// A connection to a server. `close` ends it and tells, if it can, why another one would fail in the same way.
pub struct Link {
    /// From the server.
    pub reader: Box<dyn Read + Send>,
    /// To the server.
    pub writer: Box<dyn Write + Send>,
    /// Ends the connection: reads and writes under way return.
    pub close: Box<dyn FnMut() -> Option<Error> + Send>,
}

/// How a session failed.
enum Fault {
    /// The connection: another one may work.
    Cut(Error),
    /// Something that stays as it is.
    Final(Error),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// Both sides' message where versions differ.
pub(super) fn other_version(theirs: &Hello, ours: &Hello) -> Error {
    let text = |h: &Hello| format!("serenity {}, wire {}, cache format {}", h.program, h.wire, h.format);
    Error::absent("the encoder on the other machine is of another version")
        .expected(text(ours))
        .found(text(theirs))
        .advice("install the same version on both")
        .lasting()
}

/// Has everything in `missing` made by the servers that `connect` reaches.
///
/// # Errors
/// [`Error::TryAgain`] when asked to stop, or when several connections in a row bring nothing; [`Error::Absent`] for another version or a
/// machine that cannot be reached; what the server reports.
pub(crate) fn fetch(config: &Config, plan: &CachePlan, missing: &Missing, connect: Connect, process: &Process) -> Result<Summary> {
    let total = missing.images.len() + missing.captions.len();
    let meter = Meter::new(process, "entries from the other machine", total as u64);
    let mut client = Client { config, plan, missing, process, images: HashSet::new(), captions: HashSet::new(), meter };
    let (mut attempt, mut pause) = (0, PAUSE);
    loop {
        let before = client.count();
        let mut link = connect()?;
        let ended = client.session(&mut link);
        let hopeless = (link.close)();
        let error = match ended {
            Ok(()) => break,
            Err(Fault::Final(error)) => return Err(error),
            Err(Fault::Cut(error)) => error,
        };
        if let Some(reason) = hopeless {
            return Err(reason);
        }
        if client.count() > before {
            (attempt, pause) = (0, PAUSE);
        }
        attempt += 1;
        if attempt >= ATTEMPTS_MAX {
            return Err(Error::try_again(format!("{ATTEMPTS_MAX} connections to the other machine brought nothing")).cause(error));
        }
        tracing::warn!("connecting again, {} of {total} entries are here: {error}", client.count());
        let until = Instant::now() + pause;
        pause *= 2;
        while Instant::now() < until {
            client.go_on()?;
            std::thread::sleep(LOOK_EVERY.min(pause));
        }
    }
    Ok(Summary { captions: client.captions.len(), images: client.images.len(), ..Summary::default() })
}

struct Client<'a> {
    config: &'a Config,
    plan: &'a CachePlan,
    missing: &'a Missing<'a>,
    process: &'a Process,
    /// Entries that have come, by index in `missing`.
    images: HashSet<usize>,
    captions: HashSet<usize>,
    meter: Meter<'a>,
}

/// What comes from the server, and what is known of both directions.
struct Line<'l> {
    frames: Receiver<Result<Frame>>,
    /// Bytes so far, of frames that are not whole yet too.
    received: &'l AtomicU64,
    /// Something cannot be sent, for a reason on this side.
    unsent: &'l AtomicBool,
}

/// Counts what is read.
struct Counted<'l, R: ?Sized> {
    inner: &'l mut R,
    bytes: &'l AtomicU64,
}

impl<R: Read + ?Sized> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        // Relaxed: a lone counter.
        self.bytes.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// What remains to be asked for.
type Wanted<'a> = (Vec<(usize, &'a LatentItem)>, Vec<(usize, &'a TextItem)>);

impl<'a> Client<'a> {
    fn count(&self) -> usize {
        self.images.len() + self.captions.len()
    }

    fn go_on(&self) -> Result<()> {
        self.process.tick();
        if self.process.stop_requested() { Err(self.process.interrupted()) } else { Ok(()) }
    }

    fn wanted(&self) -> Wanted<'a> {
        let images = self.missing.images.iter().copied().enumerate().filter(|(i, _)| !self.images.contains(i));
        let captions = self.missing.captions.iter().copied().enumerate().filter(|(i, _)| !self.captions.contains(i));
        (images.collect(), captions.collect())
    }

    fn job(&self, wanted: &Wanted) -> Job {
        let model = &self.config.model;
        let text = |p: &Option<std::path::PathBuf>| p.as_ref().map(|p| p.to_string_lossy().into_owned());
        // A model elsewhere is whole: parts that the configuration takes from other places here are not looked for there.
        let remote = self.config.encoder.as_ref();
        let (path, parts) = match remote.and_then(|r| r.model_path.as_ref()) {
            Some(path) => (path.clone(), [None, None, None]),
            None => (model.path.clone(), [text(&model.vae_path), text(&model.text_encoder_path), text(&model.tokenizer_path)]),
        };
        let [vae, text_encoder, tokenizer] = parts;
        Job {
            model: path,
            vae,
            text_encoder,
            text_encoder_slab: text(&model.text_encoder_slab_path),
            tokenizer,
            identities: self.plan.identities.clone(),
            hidden_states: self.plan.hidden_states,
            max_length: self.plan.max_length,
            resolution: self.plan.resolution,
            device: match remote.and_then(|r| r.device).unwrap_or(self.config.device) {
                DeviceKind::Cpu => None,
                DeviceKind::Cuda(ordinal) => Some(ordinal),
            },
            images: wanted.0.len(),
            captions: wanted.1.len(),
        }
    }

    fn session(&mut self, link: &mut Link) -> Result<(), Fault> {
        let Link { reader, writer, close } = link;
        let (sender, frames) = sync_channel(2);
        let (received, unsent) = (AtomicU64::new(0), AtomicBool::new(false));
        let line = Line { frames, received: &received, unsent: &unsent };
        let mut reader = Counted { inner: &mut **reader, bytes: &received };
        let wanted = self.wanted();
        let job = self.job(&wanted);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                loop {
                    let frame = frame::receive(&mut reader).transpose();
                    let last = !matches!(frame, Some(Ok(_)));
                    if frame.is_none_or(|f| sender.send(f).is_err()) || last {
                        return;
                    }
                }
            });
            let result = self.handshake(&line, &mut **writer).and_then(|()| {
                let unsent = &unsent;
                let sending = scope.spawn(move || {
                    let sent = send_work(&mut **writer, &job, &wanted);
                    // Relaxed: a lone flag; the result itself comes by joining.
                    unsent.store(matches!(sent, Err(Unsent::Here(_))), Ordering::Relaxed);
                    sent
                });
                let result = self.receive_entries(&line);
                if result.is_err() {
                    // Ends what is being sent, and what is being read.
                    close();
                }
                drop(line);
                let sent = sending.join().map_err(|_| Error::invariant("the sending thread panicked"))?;
                match sent {
                    Err(Unsent::Here(e)) => Err(Fault::Final(e)),
                    Err(Unsent::Cut) | Ok(()) => result,
                }
            });
            close();
            result
        })
    }

    fn handshake(&self, line: &Line, writer: &mut dyn Write) -> Result<(), Fault> {
        let ours = Hello::ours();
        frame::send_json(writer, Kind::Hello, &ours).map_err(Fault::Cut)?;
        let hello = self.next(line)?;
        if hello.kind != Kind::Hello {
            return Err(Fault::Cut(
                Error::data("the other machine's encoder did not begin with its version").found(format!("{:?}", hello.kind)),
            ));
        }
        let theirs: Hello = hello.json().map_err(Fault::Cut)?;
        if theirs == ours { Ok(()) } else { Err(Fault::Final(other_version(&theirs, &ours))) }
    }

    /// The next frame that is more than a sign of life.
    fn next(&self, line: &Line) -> Result<Frame, Fault> {
        let (mut heard, mut bytes) = (Instant::now(), 0);
        loop {
            self.go_on()?;
            // Relaxed: a counter, and a flag whose reason comes by joining.
            if line.unsent.load(Ordering::Relaxed) {
                return Err(Fault::Cut(Error::try_again("what is asked for cannot be sent")));
            }
            // A long frame on a slow line is no silence.
            // Relaxed: as above.
            let now = line.received.load(Ordering::Relaxed);
            if now != bytes {
                (heard, bytes) = (Instant::now(), now);
            }
            match line.frames.recv_timeout(LOOK_EVERY) {
                Ok(Ok(frame)) if frame.kind == Kind::Alive => {}
                Ok(Ok(frame)) => return Ok(frame),
                Ok(Err(damaged)) => return Err(Fault::Cut(damaged)),
                Err(RecvTimeoutError::Timeout) if heard.elapsed() < SILENCE_MAX => {}
                Err(RecvTimeoutError::Timeout) => return Err(Fault::Cut(Error::try_again("the other machine has fallen silent"))),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Fault::Cut(Error::try_again("the connection to the other machine was cut")));
                }
            }
        }
    }

    fn receive_entries(&mut self, line: &Line) -> Result<(), Fault> {
        loop {
            let frame = self.next(line)?;
            match frame.kind {
                Kind::Ready => {}
                Kind::Entry => {
                    let (head, bytes): (EntryHead, Vec<u8>) = frame.json_and_bytes().map_err(Fault::Cut)?;
                    self.accept(&head, bytes)?;
                    self.meter.set(self.count() as u64);
                }
                Kind::Done if self.count() == self.missing.images.len() + self.missing.captions.len() => return Ok(()),
                Kind::Done => return Err(Fault::Cut(Error::data("the other machine's encoder ended before everything had come"))),
                Kind::Failed => {
                    let failure: Failure = frame.json().map_err(Fault::Cut)?;
                    return Err(fault_of(&failure));
                }
                other => return Err(Fault::Cut(Error::data("the other machine sent a frame out of turn").found(format!("{other:?}")))),
            }
        }
    }

    /// Verifies an entry and writes it.
    fn accept(&mut self, head: &EntryHead, bytes: Vec<u8>) -> Result<(), Fault> {
        if blake3::hash(&bytes).to_hex().as_str() != head.blake3 {
            return Err(Fault::Cut(Error::data("an entry from the other machine does not have the hash that it was sent with")));
        }
        let unasked = || Fault::Final(Error::data("the other machine sent an entry that nobody asked for").found(head.id));
        let wrong = |path: &std::path::Path| Fault::Final(Error::data("the other machine sent an entry of another size").at(path));
        if head.text {
            let item = self.missing.captions.get(head.id).ok_or_else(unasked)?;
            let entry = TextEntry::from_bytes(&item.path, bytes.clone())?;
            if entry.max_length != self.plan.max_length {
                return Err(wrong(&item.path));
            }
            atomic_file::write(&item.path, &bytes)?;
            self.captions.insert(head.id);
        } else {
            let item = self.missing.images.get(head.id).ok_or_else(unasked)?;
            let entry = LatentEntry::from_bytes(&item.path, bytes.clone())?;
            let side = self.plan.resolution as usize / TOKEN_PIXELS;
            if (entry.height, entry.width) != (side, side) {
                return Err(wrong(&item.path));
            }
            atomic_file::write(&item.path, &bytes)?;
            self.images.insert(head.id);
        }
        Ok(())
    }
}

/// Why what is asked for was not sent.
enum Unsent {
    /// The connection, about which the other direction knows more.
    Cut,
    /// Something here: another connection would end in the same way.
    Here(Error),
}

impl Unsent {
    /// Of sending what comes from `file`.
    fn of(error: Error, file: &Path) -> Self {
        if matches!(error, Error::TryAgain(_)) { Self::Cut } else { Self::Here(error.at(file)) }
    }
}

fn send_work(writer: &mut dyn Write, job: &Job, wanted: &Wanted) -> Result<(), Unsent> {
    frame::send_json(writer, Kind::Job, job).map_err(|e| Unsent::of(e, Path::new(&job.model)))?;
    for (id, item) in &wanted.0 {
        let image = read_image(*id, item).map_err(Unsent::Here)?;
        let head = ImageHead { id: *id, name: image.file.to_string_lossy().into_owned() };
        frame::send_json_and_bytes(writer, Kind::Image, &head, &image.bytes).map_err(|e| Unsent::of(e, &image.file))?;
    }
    for (id, item) in &wanted.1 {
        let name = item.caption_file.to_string_lossy().into_owned();
        let caption = CaptionItem { id: *id, name, caption: item.caption.clone() };
        frame::send_json(writer, Kind::Caption, &caption).map_err(|e| Unsent::of(e, &item.caption_file))?;
    }
    Ok(())
}

/// What the server's error means here: after a frame that was damaged on the way there another connection is tried; everything else stays as it is.
fn fault_of(failure: &Failure) -> Fault {
    let what = format!("the encoder on the other machine: {}", failure.message);
    match failure.exit_code {
        64 => Fault::Final(Error::config(what)),
        65 if failure.damaged => Fault::Cut(Error::data(what)),
        65 => Fault::Final(Error::data(what)),
        69 => Fault::Final(Error::absent(what)),
        70 => Fault::Final(Error::invariant(what)),
        _ => Fault::Cut(Error::try_again(what)),
    }
}
