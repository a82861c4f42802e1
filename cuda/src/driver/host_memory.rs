//! Page-locked memory of the host: somebody else's, registered, or our own.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::sys::{self, CUresult};
use serenity_protocol::{Error, Result};

use super::{Context, Event, Ptr, check, describe};

/// Page-locked host memory that the device can copy from while the host goes on.
///
/// # Safety
/// The range is page-locked and stays mapped until the implementor is dropped, and its drop waits for the device.
pub unsafe trait HostMemory {
    /// Its first byte and its length.
    fn range(&self) -> (*mut c_void, usize);
}

/// Host memory of somebody else, page-locked for this device until drop.
#[derive(Debug)]
pub struct HostRange {
    base: *mut c_void,
    bytes: usize,
    context: Arc<Context>,
}

// SAFETY: the range belongs to the process, not to a thread; the type never dereferences it on the host.
unsafe impl Send for HostRange {}
// SAFETY: registered by `register`, kept mapped by its contract, and drop waits for the device before unregistering.
unsafe impl HostMemory for HostRange {
    fn range(&self) -> (*mut c_void, usize) {
        (self.base, self.bytes)
    }
}

impl HostRange {
    /// Locks the pages of `bytes` bytes at `base`.
    ///
    /// # Errors
    /// [`Error::Absent`] where the driver refuses (no support, memory-lock limit): the caller falls back.
    ///
    /// # Safety
    /// The range must stay mapped until the result is dropped. Its bytes may change at any time: the device reads what is there.
    pub unsafe fn register(context: &Arc<Context>, base: *mut u8, bytes: usize) -> Result<Self> {
        context.bind()?;
        let base = base.cast::<c_void>();
        // SAFETY: the caller vouches for the range; a context is current. Unregistered once, in drop.
        let code = unsafe { sys::cuMemHostRegister_v2(base, bytes, sys::CU_MEMHOSTREGISTER_PORTABLE) };
        if code != CUresult::CUDA_SUCCESS {
            return Err(Error::absent(format!("the driver cannot lock {bytes} bytes of host memory"))
                .cause(describe(code))
                .advice("raise the memory-lock limit (ulimit -l) and the container's shared memory"));
        }
        Ok(Self { base, bytes, context: context.clone() })
    }
}

impl Drop for HostRange {
    fn drop(&mut self) {
        let _ = self.context.sync();
        // SAFETY: registered in `register`, unregistered only here, with no copy in flight.
        let _ = unsafe { sys::cuMemHostUnregister(self.base) };
    }
}

/// Page-locked host memory of our own.
#[derive(Debug)]
pub struct Pinned {
    base: *mut c_void,
    bytes: usize,
    context: Arc<Context>,
}

// SAFETY: the memory belongs to the process, not to a thread.
unsafe impl Send for Pinned {}
// SAFETY: allocated page-locked in `new`; drop waits for the device before it frees.
unsafe impl HostMemory for Pinned {
    fn range(&self) -> (*mut c_void, usize) {
        (self.base, self.bytes)
    }
}

/// That the host does not give page-locked memory, which is not the device's fault; other failures as they are.
fn refused(code: CUresult, bytes: usize) -> Result<()> {
    use CUresult as R;
    match code {
        R::CUDA_ERROR_OUT_OF_MEMORY
        | R::CUDA_ERROR_INVALID_VALUE
        | R::CUDA_ERROR_OPERATING_SYSTEM
        | R::CUDA_ERROR_NOT_PERMITTED
        | R::CUDA_ERROR_NOT_SUPPORTED => {
            Err(Error::try_again(format!("the host has no {bytes} bytes of page-locked memory for the device"))
                .cause(describe(code))
                .advice(
                    "raise the limit of locked memory (`ulimit -l`), or lower memory.stagehand.pinned_pool_mb or activation_offload_mb",
                ))
        }
        _ => check(code, &format!("taking {bytes} bytes of page-locked memory")),
    }
}

impl Pinned {
    /// Takes `bytes` (at least one) of zeroed, cached page-locked memory (not write-combined: the host may read it).
    ///
    /// # Errors
    /// [`Error::TryAgain`] if there is not that much.
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        context.bind()?;
        let mut base = std::ptr::null_mut();
        // Relaxed: a lone counter.
        let allowed = context.lockable.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes)).is_ok();
        let code = if allowed {
            // SAFETY: `base` outlives the call; a context is current. Freed once, in drop.
            unsafe { sys::cuMemHostAlloc(&mut base, bytes.max(1), sys::CU_MEMHOSTALLOC_PORTABLE) }
        } else {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY
        };
        if allowed && code != CUresult::CUDA_SUCCESS {
            // Relaxed: as above.
            context.lockable.fetch_add(bytes, Ordering::Relaxed);
        }
        refused(code, bytes)?;
        // SAFETY: `base` has at least `bytes` bytes and nobody else knows it.
        unsafe { std::ptr::write_bytes(base.cast::<u8>(), 0, bytes) };
        Ok(Self { base, bytes, context: context.clone() })
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where the device finds it: kernels may read and write it there (addresses are unified on every 64-bit system).
    #[must_use]
    pub fn device_ptr(&self) -> Ptr {
        Ptr(self.base as u64)
    }

    /// Copies the bytes at `offset` into `to` once `last_use` (the event behind the last work that writes this part) is done.
    ///
    /// # Errors
    /// [`Error::Invariant`] outside of the range; a fault of the work before the event.
    pub fn read_after(&self, last_use: &Event, offset: usize, to: &mut [u8]) -> Result<()> {
        let source = part(self, offset, to.len())?;
        last_use.sync()?;
        // SAFETY: the part lies within our memory, which was initialised in `new`; the device's writes have ended with the event.
        unsafe { std::ptr::copy_nonoverlapping(source.cast::<u8>().cast_const(), to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    /// Copies `from` to `offset` once `last_use` (the event behind the last copy that reads or writes this part) is done.
    ///
    /// # Errors
    /// [`Error::Invariant`] outside of the range; a fault of the work before the event.
    pub fn write_after(&mut self, last_use: &Event, offset: usize, from: &[u8]) -> Result<()> {
        let target = part(self, offset, from.len())?;
        last_use.sync()?;
        // SAFETY: the part lies within our memory; `&mut self` excludes other host access, and the device's has ended with the event.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), target.cast::<u8>(), from.len()) };
        Ok(())
    }

    /// The memory itself, to be written in place once `last_use` (the event behind the last copy that reads or writes any of it) is done. While the
    /// slice lives no copy can be queued.
    ///
    /// # Errors
    /// A fault of the work before the event.
    pub fn bytes_after(&mut self, last_use: &Event) -> Result<&mut [u8]> {
        last_use.sync()?;
        // SAFETY: the memory is ours and was initialised in `new`; `&mut self` excludes other host access for as long as the slice lives, and the
        // device's has ended with the event.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.base.cast::<u8>(), self.bytes) })
    }

    /// Copies the bytes at `offset` into `to`, after all work on the device.
    ///
    /// # Errors
    /// [`Error::Invariant`] outside of the range; a fault of earlier work.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        let source = part(self, offset, to.len())?;
        self.context.sync()?;
        // SAFETY: the part lies within our memory, which was initialised in `new`; the device is idle.
        unsafe { std::ptr::copy_nonoverlapping(source.cast::<u8>().cast_const(), to.as_mut_ptr(), to.len()) };
        Ok(())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.context.sync();
        // SAFETY: allocated in `new`, freed only here, with no copy in flight.
        let _ = unsafe { sys::cuMemFreeHost(self.base) };
        // Relaxed: as above.
        self.context.lockable.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

/// The first byte of a part of host memory.
pub(super) fn part(memory: &impl HostMemory, offset: usize, bytes: usize) -> Result<*mut c_void> {
    let (base, len) = memory.range();
    match offset.checked_add(bytes) {
        Some(end) if end <= len => Ok(base.wrapping_byte_add(offset)),
        _ => Err(Error::invariant("a copy goes beyond its host memory")
            .expected(format!("within {len} bytes"))
            .found(format!("{bytes} at {offset}"))),
    }
}
