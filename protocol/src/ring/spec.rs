//! What a segment is for: shape, slab and form, how they stand in its header, and whether two headers say the same.

use std::path::{Path, PathBuf};

use super::words::{CONSUMERS_MAX, ENDIAN_TAG, LAYOUT_VERSION, MAGIC, REQUEST_CAPACITY, SLOTS_MAX, Shape, header};
use crate::config::PayloadForm;
use crate::error::{Error, Result};

/// Where the kernel shows named segments.
pub(super) const SHM_FOLDER: &str = "/dev/shm";
const PAGE: usize = 4096;
/// Words of the header that its checksum covers.
pub(super) const HEADER_WORDS: usize = header::CHECKSUM;

/// What a segment is for; two segments of equal specification are interchangeable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RingSpec {
    /// Name below /dev/shm.
    pub name: String,
    /// Slots.
    pub slots: usize,
    /// Payload bytes of a slot, a multiple of 4096.
    pub chunk_bytes: u64,
    /// Signature of the slab.
    pub signature: u64,
    /// What the payload is.
    pub form: PayloadForm,
    /// Blocks of the model.
    pub blocks: usize,
    /// Consumers that the loader makes room for. A consumer takes the number from the segment that it opens.
    pub consumers: usize,
}

impl RingSpec {
    /// Where words are in a segment of this specification.
    #[must_use]
    pub fn shape(&self) -> Shape {
        Shape { slots: self.slots, requests: REQUEST_CAPACITY, consumers: self.consumers }
    }

    pub(super) fn payload_at(&self) -> usize {
        (self.shape().words() * 8).next_multiple_of(PAGE)
    }

    /// Bytes of the whole segment.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.payload_at() as u64 + self.slots as u64 * self.chunk_bytes
    }

    pub(super) fn header(&self) -> [u64; HEADER_WORDS] {
        let mut words = [0; HEADER_WORDS];
        words[header::MAGIC] = MAGIC;
        words[header::VERSION] = LAYOUT_VERSION;
        words[header::ENDIAN] = ENDIAN_TAG;
        words[header::BYTES] = self.bytes();
        words[header::SLOTS] = self.slots as u64;
        words[header::CHUNK_BYTES] = self.chunk_bytes;
        words[header::SIGNATURE] = self.signature;
        words[header::FORM] = match self.form {
            PayloadForm::Bf16 => 1,
            PayloadForm::Int8 => 2,
        };
        words[header::REQUESTS] = REQUEST_CAPACITY as u64;
        words[header::BOOT] = boot_digest();
        words[header::BLOCKS] = self.blocks as u64;
        words[header::CONSUMERS] = self.consumers as u64;
        words
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.slots == 0 || self.slots > SLOTS_MAX || self.chunk_bytes == 0 || !self.chunk_bytes.is_multiple_of(PAGE as u64) {
            return Err(Error::config("the ring has no usable shape")
                .expected(format!("1 to {SLOTS_MAX} slots of a multiple of {PAGE} bytes"))
                .found(format!("{} slots of {} bytes", self.slots, self.chunk_bytes))
                .advice("set memory.stagehand.pinned_pool_mb to a multiple of ring_chunk_mb"));
        }
        if self.consumers == 0 || self.consumers > CONSUMERS_MAX || self.consumers > self.slots {
            return Err(Error::config("the ring cannot serve so many consumers: each needs a slot of its own, and two to overlap")
                .expected(format!("1 to {}", CONSUMERS_MAX.min(self.slots)))
                .found(self.consumers)
                .advice("raise memory.stagehand.pinned_pool_mb, lower ring_chunk_mb, or feed fewer trainers from this loader"));
        }
        Ok(())
    }

    /// Path of the segment file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(SHM_FOLDER).join(&self.name)
    }
}

/// The first field in which a segment's header is not that of `spec`, as an error.
pub(super) fn same_header(spec: &RingSpec, found: &[u64; HEADER_WORDS]) -> Result<()> {
    const FIELDS: [&str; HEADER_WORDS] = [
        "magic",
        "version",
        "byte order",
        "bytes",
        "slots",
        "chunk bytes",
        "slab signature",
        "payload form",
        "request queue",
        "boot",
        "blocks",
        "number of consumers",
    ];
    // The length follows from the fields after it: those say more.
    let mut order = (0..HEADER_WORDS).filter(|i| *i != header::BYTES).chain([header::BYTES]);
    let expected = spec.header();
    let Some(i) = order.find(|i| found[*i] != expected[*i]) else { return Ok(()) };
    Err(Error::data(format!("the ring in shared memory was made for something else: its {} differs", FIELDS[i]))
        .at(spec.path())
        .offset(i as u64 * 8)
        .expected(format!("{:#x}", expected[i]))
        .found(format!("{:#x}", found[i]))
        .advice("stop the other run that uses this output folder, or start the loader first: it replaces a ring nobody uses"))
}

fn boot_digest() -> u64 {
    let id = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    crate::checksum::xxh3_64(&id)
}
