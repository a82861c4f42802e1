//! `serenity-encoder --stdio`: encodes what comes in, sends out entries, keeps nothing.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serenity_protocol::cache::identity::Memo;
use serenity_protocol::config::{DeviceKind, ModelConfig};
use serenity_protocol::model_path::{self, ModelPaths};
use serenity_protocol::process::Process;
use serenity_protocol::slab::text_encoder::TextModel;
use serenity_protocol::{Error, Result};

use super::frame::{self, Frame, Kind};
use super::{CaptionItem, EntryHead, Failure, Hello, ImageHead, Job};
use crate::engine::{CaptionWork, Engine, HiddenBudget, ImageWork};
use crate::vae::Place;

/// Time between two signs of life.
const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// Frames received ahead.
const AHEAD: usize = 2;

/// Serves one client and ends. Hidden states beyond `budget` go to the folder for temporary files.
///
/// # Errors
/// What was wrong; the client has been told, if it could be.
pub fn serve(input: impl Read + Send + 'static, output: impl Write + Send, budget: HiddenBudget, process: &Process) -> Result<()> {
    let output = Mutex::new(output);
    let ended = AtomicBool::new(false);
    // The reader is not joined: it may wait for a client that sends nothing more.
    let damaged = Arc::new(AtomicBool::new(false));
    let frames = read_frames(input, damaged.clone(), process)?;
    let result = std::thread::scope(|scope| {
        let alive = scope.spawn(|| {
            // Relaxed: a lone flag; unparking orders it.
            while !ended.load(Ordering::Relaxed) {
                std::thread::park_timeout(ALIVE_EVERY);
                // A cut connection is noticed by whoever sends next.
                let _ = reply(&output, |o| frame::send_json(o, Kind::Alive, &()));
            }
        });
        let result = converse(&frames, &output, budget, process);
        // Relaxed: see above.
        ended.store(true, Ordering::Relaxed);
        alive.thread().unpark();
        result
    });
    let last = match &result {
        Ok(()) => reply(&output, |o| frame::send_json(o, Kind::Done, &())),
        Err(e) => {
            let message = e.to_string().chars().take(8000).collect();
            // Relaxed: a lone flag; the channel that the frame would have come through orders it.
            let failure = Failure { exit_code: e.exit_code(), message, damaged: damaged.load(Ordering::Relaxed) };
            // The client may be gone; our own exit says it too.
            let _ = reply(&output, |o| frame::send_json(o, Kind::Failed, &failure));
            Ok(())
        }
    };
    result.and(last)
}

fn reply<W>(output: &Mutex<W>, send: impl FnOnce(&mut W) -> Result<()>) -> Result<()> {
    send(&mut *output.lock().map_err(|_| Error::invariant("a thread panicked while it sent a frame"))?)
}

type Frames = Mutex<Receiver<Result<Frame>>>;

fn read_frames(mut input: impl Read + Send + 'static, damaged: Arc<AtomicBool>, process: &Process) -> Result<Frames> {
    let (sender, receiver) = sync_channel(AHEAD);
    let stop = process.stop_flag();
    let read = move || {
        loop {
            let received = frame::receive(&mut input).transpose();
            let last = !matches!(received, Some(Ok(_)));
            if matches!(received, Some(Err(_))) {
                // Relaxed: see above.
                damaged.store(true, Ordering::Relaxed);
            }
            let taken = received.is_none_or(|frame| sender.send(frame).is_ok());
            if last || !taken {
                // The client is gone: stop at the next look.
                // Relaxed: see Process::stop_requested.
                stop.store(true, Ordering::Relaxed);
                return;
            }
        }
    };
    std::thread::Builder::new().name("frames".into()).spawn(read).map_err(|e| Error::absent("cannot start a thread").cause(e))?;
    Ok(Mutex::new(receiver))
}

fn next(frames: &Frames, kind: Kind) -> Result<Frame> {
    let frames = frames.lock().map_err(|_| Error::invariant("the image reader panicked"))?;
    let frame = frames.recv().map_err(|_| Error::try_again("the connection to the client is cut"))??;
    if frame.kind == kind {
        return Ok(frame);
    }
    Err(Error::data("the client sent a frame out of turn").expected(format!("{kind:?}")).found(format!("{:?}", frame.kind)))
}

fn converse<W: Write>(frames: &Frames, output: &Mutex<W>, budget: HiddenBudget, process: &Process) -> Result<()> {
    let ours = Hello::ours();
    reply(output, |o| frame::send_json(o, Kind::Hello, &ours))?;
    let theirs: Hello = next(frames, Kind::Hello)?.json()?;
    if theirs != ours {
        return Err(super::client::other_version(&theirs, &ours));
    }
    let job: Job = next(frames, Kind::Job)?.json()?;
    let paths = resolve(&job)?;
    reply(output, |o| frame::send_json(o, Kind::Ready, &()))?;
    let scratch = std::env::temp_dir();
    let device = job.device.map_or(DeviceKind::Cpu, DeviceKind::Cuda);
    let engine = Engine {
        paths: &paths,
        device,
        place: Place::on(device),
        hidden_states: job.hidden_states,
        max_length: job.max_length,
        resolution: job.resolution,
        budget,
        scratch: &scratch,
        process,
    };
    let send = |text: bool, id: usize, bytes: Vec<u8>| {
        let head = EntryHead { text, id, blake3: blake3::hash(&bytes).to_hex().to_string() };
        reply(output, |o| frame::send_json_and_bytes(o, Kind::Entry, &head, &bytes))
    };
    let mut left = job.images;
    let image = || {
        left = left.checked_sub(1)?;
        let take = || -> Result<ImageWork> {
            let (head, bytes): (ImageHead, Vec<u8>) = next(frames, Kind::Image)?.json_and_bytes()?;
            Ok(ImageWork { id: head.id, file: PathBuf::from(head.name), bytes })
        };
        Some(take())
    };
    engine.images(job.images, image, &mut |id, bytes| send(false, id, bytes))?;
    let (mut ids, mut works) = (Vec::new(), Vec::new());
    for _ in 0..job.captions {
        let item: CaptionItem = next(frames, Kind::Caption)?.json()?;
        ids.push(item.id);
        works.push(CaptionWork { caption: item.caption, file: PathBuf::from(item.name) });
    }
    engine.captions(&works, &mut |index, bytes| {
        let id = ids.get(index).ok_or_else(|| Error::invariant("an embedding without a caption"))?;
        send(true, *id, bytes)
    })
}

/// The model's parts here, if they are the client's.
fn resolve(job: &Job) -> Result<ModelPaths> {
    let paths = model_path::resolve(&ModelConfig {
        path: job.model.clone(),
        vae_path: job.vae.clone().map(PathBuf::from),
        text_encoder_path: job.text_encoder.clone().map(PathBuf::from),
        text_encoder_slab_path: job.text_encoder_slab.clone().map(PathBuf::from),
        tokenizer_path: job.tokenizer.clone().map(PathBuf::from),
        text_hidden_states: None,
        max_sequence_length: job.max_length,
    })?;
    let mut memo = Memo::default();
    let missing = |what: &str| Error::absent(format!("the model on the other machine has no {what}"));
    let found = [
        TextModel::of(&paths)?.identity(&mut memo)?,
        memo.tokenizer(paths.tokenizer.as_deref().ok_or_else(|| missing("tokenizer"))?)?,
        memo.component(paths.vae.as_deref().ok_or_else(|| missing("VAE"))?)?,
    ];
    for ((what, expected), found) in ["text encoder", "tokenizer", "VAE"].iter().zip(&job.identities).zip(&found) {
        if expected != found {
            return Err(Error::data(format!("the {what} on the other machine is not the one here: its entries would be others"))
                .at(&job.model)
                .expected(expected)
                .found(found)
                .advice("copy the model's files over, or set encoder.model_path to where the same ones are"));
        }
    }
    Ok(paths)
}
