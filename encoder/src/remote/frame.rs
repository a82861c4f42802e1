//! Frames between two encoders.
//!
//! `SERE`, kind (u8), three zero bytes, length (u32, little endian), the first four bytes of the BLAKE3 hash of those twelve; then the
//! payload; then the BLAKE3 hash of all before it. The head's own check means that a damaged length is found before anything waits for
//! bytes that never come.

use std::io::{Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serenity_protocol::{Error, Result};

const MAGIC: [u8; 4] = *b"SERE";
const HEAD_BYTES: usize = 16;
const HASH_BYTES: usize = 32;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Versions; the first frame of both sides.
    Hello = 1,
    /// What to encode with, to the server.
    Job = 2,
    /// An image to encode.
    Image = 3,
    /// A caption to encode.
    Caption = 4,
    /// The server has found the same weights and begins.
    Ready = 5,
    /// A finished entry.
    Entry = 6,
    /// The server is alive.
    Alive = 7,
    /// The server gives up.
    Failed = 8,
    /// Everything is encoded.
    Done = 9,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 9] =
        [Self::Hello, Self::Job, Self::Image, Self::Caption, Self::Ready, Self::Entry, Self::Alive, Self::Failed, Self::Done];

    /// Longest payload.
    #[must_use]
    pub fn bytes_max(self) -> usize {
        match self {
            Self::Image => 512 << 20,
            Self::Entry => 1 << 30,
            // A caption file has at most 1 MiB, which JSON may write six times as long.
            Self::Caption => 8 << 20,
            _ => 64 << 10,
        }
    }
}

/// A frame that was received whole.
#[derive(Debug)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    payload: Vec<u8>,
}

fn damaged(why: &str) -> Error {
    Error::data("a frame from the other machine is damaged").cause(why)
}

impl Frame {
    /// The payload as JSON.
    ///
    /// # Errors
    /// [`Error::Data`] if it is something else.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.payload).map_err(|e| damaged(&format!("{:?}: {e}", self.kind)))
    }

    /// The payload as JSON followed by bytes.
    ///
    /// # Errors
    /// [`Error::Data`] if it is something else.
    pub fn json_and_bytes<T: DeserializeOwned>(mut self) -> Result<(T, Vec<u8>)> {
        let length = self.payload.first_chunk::<4>().map(|l| u32::from_le_bytes(*l) as usize);
        let end = length.and_then(|l| l.checked_add(4)).filter(|end| *end <= self.payload.len());
        let end = end.ok_or_else(|| damaged("it ends inside its head"))?;
        let bytes = self.payload.split_off(end);
        let head = self.payload.get(4..).unwrap_or_default();
        Ok((serde_json::from_slice(head).map_err(|e| damaged(&format!("{:?}: {e}", self.kind)))?, bytes))
    }
}

/// Sends a frame whose payload is `head` as JSON.
///
/// # Errors
/// [`Error::TryAgain`] if the connection is cut.
pub fn send_json(stream: &mut (impl Write + ?Sized), kind: Kind, head: &impl Serialize) -> Result<()> {
    let payload = serde_json::to_vec(head).map_err(|e| Error::invariant("a frame cannot be encoded").cause(e))?;
    send(stream, kind, &[&payload])
}

/// Sends a frame whose payload is `head` as JSON followed by `bytes`.
///
/// # Errors
/// As [`send_json`].
pub fn send_json_and_bytes(stream: &mut (impl Write + ?Sized), kind: Kind, head: &impl Serialize, bytes: &[u8]) -> Result<()> {
    let json = serde_json::to_vec(head).map_err(|e| Error::invariant("a frame cannot be encoded").cause(e))?;
    send(stream, kind, &[&(json.len() as u32).to_le_bytes(), &json, bytes])
}

fn send(stream: &mut (impl Write + ?Sized), kind: Kind, parts: &[&[u8]]) -> Result<()> {
    let length: usize = parts.iter().map(|p| p.len()).sum();
    if length > kind.bytes_max() {
        return Err(Error::data(format!("a frame of kind {kind:?} would be too long"))
            .expected(format!("at most {} bytes", kind.bytes_max()))
            .found(length));
    }
    let mut head = [0; HEAD_BYTES];
    let (fields, check) = head.split_at_mut(12);
    let [a, b, c, d] = (length as u32).to_le_bytes();
    let [m0, m1, m2, m3] = MAGIC;
    fields.copy_from_slice(&[m0, m1, m2, m3, kind as u8, 0, 0, 0, a, b, c, d]);
    check.copy_from_slice(blake3::hash(fields).as_bytes().first_chunk::<4>().unwrap_or(&[0; 4]));
    let mut hasher = blake3::Hasher::new();
    let mut write = || -> std::io::Result<()> {
        hasher.update(&head);
        stream.write_all(&head)?;
        for part in parts {
            hasher.update(part);
            stream.write_all(part)?;
        }
        stream.write_all(hasher.finalize().as_bytes())?;
        stream.flush()
    };
    write().map_err(|e| Error::try_again("the connection to the other machine is cut").cause(e))
}

/// Receives a frame; `None` at the end of the connection, in the middle of a frame too.
///
/// # Errors
/// [`Error::Data`] for a damaged or too long frame.
pub fn receive(stream: &mut (impl Read + ?Sized)) -> Result<Option<Frame>> {
    let mut head = [0; HEAD_BYTES];
    if stream.read_exact(&mut head).is_err() {
        return Ok(None);
    }
    let [m0, m1, m2, m3, kind, z0, z1, z2, a, b, c, d, check @ ..] = head;
    let fields = head.first_chunk::<12>().unwrap_or(&[0; 12]);
    if blake3::hash(fields).as_bytes().first_chunk::<4>() != Some(&check) || [m0, m1, m2, m3] != MAGIC || [z0, z1, z2] != [0; 3] {
        return Err(damaged("its head is not that of a frame (does the other machine's shell print something at login?)"));
    }
    let kind = Kind::ALL.into_iter().find(|k| *k as u8 == kind).ok_or_else(|| damaged("its kind is unknown"))?;
    let length = u32::from_le_bytes([a, b, c, d]) as usize;
    if length > kind.bytes_max() {
        return Err(damaged(&format!("{length} bytes are too long for {kind:?}")));
    }
    // Read by what comes, not allocated by what is promised.
    let mut payload = Vec::new();
    let mut hash = [0; HASH_BYTES];
    if stream.take(length as u64).read_to_end(&mut payload).is_err() || payload.len() < length || stream.read_exact(&mut hash).is_err() {
        return Ok(None);
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&head).update(&payload);
    if hasher.finalize().as_bytes() != &hash {
        return Err(damaged("its checksum does not match"));
    }
    Ok(Some(Frame { kind, payload }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn every_flipped_byte_and_every_cut_of_every_kind_is_found() {
        for kind in Kind::ALL {
            let mut whole = Vec::new();
            send_json_and_bytes(&mut whole, kind, &"head", b"some bytes").unwrap();
            let frame = receive(&mut whole.as_slice()).unwrap().unwrap();
            assert_eq!(frame.kind, kind);
            assert_eq!(frame.json_and_bytes::<String>().unwrap(), ("head".to_string(), b"some bytes".to_vec()));
            for at in 0..whole.len() {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << (at % 8);
                assert_eq!(receive(&mut bytes.as_slice()).map(|_| ()).map_err(|e| e.exit_code()), Err(65), "{kind:?} byte {at}");
                assert!(receive(&mut whole.get(..at).unwrap()).unwrap().is_none());
            }
        }
    }

    #[test]
    fn too_long_frames_are_neither_sent_nor_received() {
        let mut out = Vec::new();
        let long = vec![0; Kind::Job.bytes_max()];
        assert_eq!(send_json_and_bytes(&mut out, Kind::Job, &"", &long).unwrap_err().exit_code(), 65);
        assert!(out.is_empty());
    }
}
