//! Host memory that copies to the device read from, whatever the driver allows: the whole range page-locked, else its slots one by one,
//! else through a page-locked bounce buffer.
//!
//! The choice is made once and said once. In the first two cases the host never waits; with a bounce buffer the host copies, and waits for
//! the half of the buffer that it is about to overwrite.

use std::path::Path;
use std::sync::Arc;

use memmap2::MmapMut;
use serenity_protocol::{Error, Result};

use crate::driver::{Context, Event, HostRange, Pinned, Ptr, Stream};

/// Halves of the bounce buffer.
const BOUNCE_BYTES: usize = 16 << 20;

/// A mapped range of host memory as a source of copies.
#[derive(Debug)]
pub struct HostSource {
    base: *const u8,
    bytes: usize,
    way: Way,
    /// Of a source that keeps its memory itself. Last: the pages must be unlocked first.
    _owner: Option<Arc<MmapMut>>,
}

// SAFETY: the range belongs to the process, not to a thread; it is only read, under `&mut self`.
unsafe impl Send for HostSource {}

#[derive(Debug)]
enum Way {
    Whole(HostRange),
    /// Ranges of the same size, the last perhaps shorter.
    Slots(Vec<HostRange>, usize),
    Bounce {
        buffer: Pinned,
        /// Behind the last copy out of each half.
        last: [Event; 2],
        next: usize,
    },
}

/// How far page-locking got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locking {
    /// The whole range at once, or slot by slot.
    Allowed,
    /// Slot by slot only: for tests of that way.
    BySlot,
    /// Not at all: for tests of the bounce buffer.
    Refused,
}

impl HostSource {
    /// A source over `bytes` bytes at `base`, whose slots are `slot_bytes` long (the ring's chunks; `bytes` if there are none). `base` should
    /// lie at a page.
    ///
    /// # Errors
    /// [`Error::TryAgain`] if not even a bounce buffer can be had.
    ///
    /// # Safety
    /// The range must stay mapped and readable until the source is dropped, and no part of it may be written while a copy from that part is
    /// queued (the ring's leases see to that).
    pub unsafe fn new(context: &Arc<Context>, base: *const u8, bytes: usize, slot_bytes: usize, locking: Locking) -> Result<Self> {
        let register = |offset: usize, len: usize| {
            // SAFETY: a part of the range that the caller vouches for; the result is dropped with the source, before the mapping.
            unsafe { HostRange::register(context, base.wrapping_add(offset).cast_mut(), len) }
        };
        let whole = if locking == Locking::Allowed { register(0, bytes) } else { Err(Error::absent("not tried")) };
        let way = match whole {
            Ok(range) => Way::Whole(range),
            Err(why) => {
                let slot = slot_bytes.clamp(1, bytes.max(1));
                let slots = (0..bytes).step_by(slot).map(|offset| register(offset, slot.min(bytes - offset)));
                let slots = if locking == Locking::Refused { Err(Error::absent("not tried")) } else { slots.collect::<Result<Vec<_>>>() };
                match slots {
                    Ok(slots) => {
                        tracing::warn!("{why}\n  the ring is page-locked slot by slot instead");
                        Way::Slots(slots, slot)
                    }
                    Err(why) => {
                        tracing::warn!("{why}\n  copies go through a bounce buffer of {} MiB: slower", (2 * BOUNCE_BYTES) >> 20);
                        Way::Bounce {
                            buffer: Pinned::new(context, 2 * BOUNCE_BYTES)?,
                            last: [Event::new(context)?, Event::new(context)?],
                            next: 0,
                        }
                    }
                }
            }
        };
        Ok(Self { base, bytes, way, _owner: None })
    }

    /// A source over a whole map, whose slots are `slot_bytes` long. It keeps the map, which nobody can write while it is shared.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_map(context: &Arc<Context>, map: &Arc<MmapMut>, slot_bytes: usize, locking: Locking) -> Result<Self> {
        // SAFETY: the source keeps the map alive (`_owner`, dropped after `way`), and a shared map hands out no way to write it.
        let source = unsafe { Self::new(context, map.as_ptr(), map.len(), slot_bytes, locking) }?;
        Ok(Self { _owner: Some(map.clone()), ..source })
    }

    /// Whether copies go on without the host.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        !matches!(self.way, Way::Bounce { .. })
    }

    /// What was chosen, for the log.
    #[must_use]
    pub fn describe(&self) -> &'static str {
        match self.way {
            Way::Whole(_) => "page-locked",
            Way::Slots(..) => "page-locked by slot",
            Way::Bounce { .. } => "through a bounce buffer",
        }
    }

    /// Queues a copy of `bytes` bytes at `offset` to `to` on `stream`. The range part may be written again when an event recorded on
    /// `stream` after this call is done. All copies of a source must be queued on one stream.
    ///
    /// # Errors
    /// [`Error::Invariant`] beyond the range; the driver's.
    pub fn copy_in(&mut self, stream: &Stream, to: Ptr, offset: usize, bytes: usize) -> Result<()> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(Error::invariant("a copy goes beyond its host memory").expected(format!("within {} bytes", self.bytes)));
        }
        let beyond = || Error::invariant("a copy goes beyond the ring's slots");
        let mut done = 0;
        while done < bytes {
            let (at, left) = (offset + done, bytes - done);
            done += match &mut self.way {
                Way::Whole(range) => {
                    stream.copy_in(to.offset(done), range, at, left)?;
                    left
                }
                Way::Slots(slots, slot) => {
                    let (index, within) = (at / *slot, at % *slot);
                    let len = left.min(*slot - within);
                    stream.copy_in(to.offset(done), slots.get(index).ok_or_else(beyond)?, within, len)?;
                    len
                }
                Way::Bounce { buffer, last, next } => {
                    let len = left.min(BOUNCE_BYTES);
                    // SAFETY: within the range (checked above), which the caller of `new` keeps mapped and unwritten meanwhile.
                    let from = unsafe { std::slice::from_raw_parts(self.base.add(at), len) };
                    let event = last.get(*next).ok_or_else(beyond)?;
                    buffer.write_after(event, *next * BOUNCE_BYTES, from)?;
                    stream.copy_in(to.offset(done), buffer, *next * BOUNCE_BYTES, len)?;
                    stream.record(event)?;
                    *next = 1 - *next;
                    len
                }
            };
        }
        Ok(())
    }
}

/// `bytes` bytes of a new file at `path`, mapped; the file has no name any more when this returns.
///
/// # Errors
/// The operating system's.
pub fn nameless_map(path: &Path, bytes: usize) -> std::io::Result<MmapMut> {
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(path)?;
    std::fs::remove_file(path)?;
    file.set_len(bytes as u64)?;
    // SAFETY: the file was made here and has no name, so nobody else writes or cuts it while it is mapped.
    unsafe { MmapMut::map_mut(&file) }
}
