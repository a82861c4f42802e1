//! Checksums of what has reached the device.
#![forbid(unsafe_code)]

use serenity_protocol::{Error, Result};

use super::BLOCK;
use crate::driver::{HostMemory, Pinned, Ptr};
use crate::gpu::Gpu;

/// Where the pieces of a payload lie: start and length of each in bytes, as the device reads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pieces {
    /// First word of the list in its memory (two words a piece).
    pub first: usize,
    /// How many.
    pub count: usize,
}

impl Gpu {
    /// Queues XXH3-64 of the pieces of the payload at `payload`, as listed in `list`, on the stream for checks: word `first` of `hashes` and
    /// those after it take them in order. They may be read after an event behind this call.
    ///
    /// # Errors
    /// [`Error::Invariant`] if list or hashes go beyond their memory; the driver's.
    pub fn xxh3_pieces(&self, payload: Ptr, list: &Pinned, pieces: Pieces, hashes: &Pinned, first: usize) -> Result<()> {
        let beyond = |memory: &Pinned, first: usize, words: usize| first.checked_add(words).is_none_or(|end| end > memory.range().1 / 8);
        if beyond(list, 2 * pieces.first, 2 * pieces.count) || beyond(hashes, first, pieces.count) {
            return Err(Error::invariant("a list of pieces or their hashes go beyond their memory").found(format!("{pieces:?}")));
        }
        let grid = [u32::try_from(pieces.count).map_err(|_| Error::invariant("there are too many pieces for one launch"))?, 1, 1];
        let args = [hashes.device_ptr().offset(8 * first).into(), payload.into(), list.device_ptr().offset(16 * pieces.first).into()];
        self.kernel("xxh3_pieces")?.launch(self.check(), "xxh3_pieces", grid, BLOCK, 0, &args)
    }
}
