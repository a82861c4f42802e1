//! Control messages between the launcher and its children.
//!
//! The channel is a socket pair whose child end is the child's standard input (`SERENITY_CONTROL=stdin` says so); frames are a
//! little-endian u32 length and a bincode body of at most [`FRAME_BYTES_MAX`]. Readiness, progress and the end of work are messages,
//! never the existence of a file. A broken channel tells the child that the launcher is gone.

use std::io::{Read, Write};

use bincode::{Decode, Encode};

use crate::error::{Error, Result};

/// Version of the messages below; a mismatch is refused at `Hello`.
pub const MESSAGE_VERSION: u32 = 2;
/// Largest frame either side accepts.
pub const FRAME_BYTES_MAX: usize = 1 << 20;

/// Which process speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
pub enum Role {
    /// `serenity-loader`
    Loader,
    /// `serenity-encoder`
    Encoder,
    /// `serenity-trainer`
    Trainer,
    /// `serenity-slab`
    Slab,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Role::Loader => "loader",
            Role::Encoder => "encoder",
            Role::Trainer => "trainer",
            Role::Slab => "slab",
        })
    }
}

/// From a child to the launcher.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum FromChild {
    /// First message.
    Hello {
        /// Who.
        role: Role,
        /// Process id.
        pid: u32,
        /// [`MESSAGE_VERSION`].
        version: u32,
    },
    /// Start-up is over; work begins.
    Ready,
    /// Still alive; sent at least every second while work goes on.
    Heartbeat,
    /// Work items done of a total (captions, images, bytes).
    Work {
        /// What is counted, for the display: "captions", "images", "bytes".
        unit: String,
        /// Done so far.
        done: u64,
        /// Of.
        total: u64,
    },
    /// A training step ended.
    Step(StepReport),
    /// State of the ring, from the loader.
    Ring {
        /// Slots ready or leased.
        occupied: u32,
        /// All slots.
        slots: u32,
        /// Bytes read from the slab so far.
        read_bytes: u64,
    },
    /// A checkpoint or LoRA file was written.
    Saved {
        /// Step that it holds.
        step: u64,
        /// File.
        path: String,
    },
    /// Something the user should see once.
    Notice(String),
    /// The process ends as intended. `files` are the results (LoRA, plot, log).
    Done {
        /// Result files.
        files: Vec<String>,
    },
    /// The process ends with an error.
    Failed {
        /// Its exit code.
        exit_code: u8,
        /// Its message.
        message: String,
        /// Whether the same would happen again at once.
        lasting: bool,
    },
}

/// What the display shows of a step.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct StepReport {
    /// Steps done.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Mean loss of the step.
    pub loss: f64,
    /// Learning rate used.
    pub learning_rate: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Wall time of the step in seconds.
    pub seconds: f64,
}

/// From the launcher to a child.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ToChild {
    /// Finish at the next safe point: the trainer writes a checkpoint.
    Stop,
}

/// Writes one frame.
///
/// # Errors
/// [`Error::Absent`] if the peer is gone.
pub fn send<T: Encode>(stream: &mut impl Write, message: &T) -> Result<()> {
    let body = bincode::encode_to_vec(message, bincode::config::standard())
        .map_err(|e| Error::invariant("a control message cannot be encoded").cause(e))?;
    if body.len() > FRAME_BYTES_MAX {
        return Err(Error::invariant("a control message is larger than a frame").expected(FRAME_BYTES_MAX).found(body.len()));
    }
    let mut frame = (body.len() as u32).to_le_bytes().to_vec();
    frame.extend_from_slice(&body);
    stream.write_all(&frame).map_err(|e| Error::absent("the control channel is closed").cause(e))
}

/// Reads one frame; `None` at the end of the channel.
///
/// # Errors
/// [`Error::Data`] for a frame that is too long or does not decode to its last byte.
pub fn receive<T: Decode<()>>(stream: &mut impl Read) -> Result<Option<T>> {
    let mut length = [0; 4];
    if let Err(e) = stream.read_exact(&mut length) {
        return match e.kind() {
            std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset => Ok(None),
            _ => Err(Error::absent("the control channel broke").cause(e)),
        };
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > FRAME_BYTES_MAX {
        return Err(Error::data("a control frame is too long").expected(format!("at most {FRAME_BYTES_MAX} bytes")).found(length));
    }
    let mut body = vec![0; length];
    if stream.read_exact(&mut body).is_err() {
        return Ok(None);
    }
    let config = bincode::config::standard().with_limit::<FRAME_BYTES_MAX>();
    match bincode::decode_from_slice::<T, _>(&body, config) {
        Ok((message, used)) if used == length => Ok(Some(message)),
        Ok((_, used)) => Err(Error::data("a control frame has bytes left over").expected(length).found(used)),
        Err(e) => Err(Error::data("a control frame does not decode").cause(e)),
    }
}
