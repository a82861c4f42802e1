//! The driver API, thin and safe: context, memory, streams, events, modules, launches.
//!
//! Every return code becomes a [`Result`]. Handles own what they name and keep the context alive; what they release in `drop` cannot fail
//! in a way that matters (a lost context has released everything already), so those codes are ignored.
//!
//! Why this is sound although device addresses are plain numbers: a [`Ptr`] is made from a live allocation only, and work with a wrong one
//! faults or spoils device memory, never memory that Rust owns, except registered host memory, which only [`HostRange`] hands out and no
//! reference to which exists while the device may write it. Launch arguments are copied into fixed slots, so that a kernel with more
//! parameters than arguments reads zeros and not the stack. Host memory of copies in flight cannot go away: [`HostRange`] and [`Pinned`]
//! wait for the device before they release it, and copies from ordinary slices are done when the call returns.

use std::ffi::{CStr, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::sys::{self, CUresult};
use serenity_protocol::{Error, Result};

use crate::libraries::{Library, require};

mod host_memory;
mod module;

use host_memory::part;
pub use host_memory::{HostMemory, HostRange, Pinned};
pub use module::{Arg, Kernel, Module};

/// Functions that are called; a driver without one of them is refused at start instead of panicking in the middle of a run.
const FUNCTIONS: [&str; 37] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceTotalMem_v2",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuCtxGetStreamPriorityRange",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemsetD8Async",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuLaunchKernel",
];

/// Turns a return code into an error that says what was being done.
pub(crate) fn check(code: CUresult, what: &str) -> Result<()> {
    use CUresult as R;
    if code == R::CUDA_SUCCESS {
        return Ok(());
    }
    let error = match code {
        R::CUDA_ERROR_OUT_OF_MEMORY => Error::try_again(format!("the device is out of memory: {what}"))
            .advice("lower memory.stagehand.vram_high_watermark_mb or the resolution, or end other programs on this device"),
        R::CUDA_ERROR_NO_DEVICE | R::CUDA_ERROR_INVALID_DEVICE | R::CUDA_ERROR_DEVICE_UNAVAILABLE => {
            Error::absent(format!("the device is not there: {what}")).advice("`nvidia-smi -L` lists the devices").lasting()
        }
        R::CUDA_ERROR_NOT_INITIALIZED
        | R::CUDA_ERROR_SYSTEM_NOT_READY
        | R::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
        | R::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE
        | R::CUDA_ERROR_STUB_LIBRARY
        | R::CUDA_ERROR_OPERATING_SYSTEM
        | R::CUDA_ERROR_UNKNOWN => Error::absent(format!("the driver cannot be used: {what}")).advice("check that `nvidia-smi` works"),
        R::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        | R::CUDA_ERROR_NO_BINARY_FOR_GPU
        | R::CUDA_ERROR_INVALID_PTX
        | R::CUDA_ERROR_INVALID_IMAGE
        | R::CUDA_ERROR_JIT_COMPILER_NOT_FOUND => Error::absent(format!("the driver cannot run the compiled kernels: {what}"))
            .advice("the run-time compiler (libnvrtc) is newer than the driver: update the driver, or install the older one")
            .lasting(),
        _ => Error::invariant(format!("the device reports a failure: {what}")),
    };
    Err(error.cause(describe(code)))
}

fn describe(code: CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: the driver writes a pointer to a static string, or null for a code that it does not know; both are handled.
    let known = unsafe { sys::cuGetErrorString(code, &mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
    if !known {
        return format!("{code:?}");
    }
    // SAFETY: `text` is a static string of the driver, zero-terminated, as just checked for null.
    let text = unsafe { CStr::from_ptr(text) };
    format!("{code:?}: {}", text.to_string_lossy())
}

/// An address in device memory. Whoever owns the memory (an [`crate::Arena`]) keeps it alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ptr(u64);

impl Ptr {
    /// No memory: an optional argument that is not given.
    pub const NULL: Ptr = Ptr(0);

    /// As a number, for alignment tests and foreign calls.
    #[must_use]
    pub fn address(self) -> u64 {
        self.0
    }

    /// `bytes` further on.
    #[must_use]
    pub fn offset(self, bytes: usize) -> Ptr {
        Ptr(self.0.wrapping_add(bytes as u64))
    }
}

/// The primary context of one device.
#[derive(Debug)]
pub struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
    /// Bytes of page-locked memory that may still be taken: no limit of ours but in checks.
    lockable: AtomicUsize,
}

// SAFETY: the driver API may be called from any thread; every method makes the context current in its thread first.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks its own state.
unsafe impl Sync for Context {}

impl Context {
    /// The context of device `ordinal`, in the driver's order.
    ///
    /// # Errors
    /// [`Error::Absent`] without driver or device.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        require(Library::Driver)?;
        require_functions()?;
        let wanted = i32::try_from(ordinal).map_err(|_| Error::config(format!("device {ordinal} cannot exist")))?;
        let (mut count, mut device, mut raw) = (0, 0, std::ptr::null_mut());
        // SAFETY: no precondition; must come before every other call.
        check(unsafe { sys::cuInit(0) }, "initialising the driver")?;
        // SAFETY: `count` outlives the call.
        check(unsafe { sys::cuDeviceGetCount(&mut count) }, "counting devices")?;
        if wanted >= count {
            return Err(Error::absent(format!("there is no device {ordinal}"))
                .found(format!("{count} devices"))
                .advice("`nvidia-smi -L` lists them")
                .lasting());
        }
        // SAFETY: `device` outlives the call; the ordinal is below the count.
        check(unsafe { sys::cuDeviceGet(&mut device, wanted) }, "opening the device")?;
        // SAFETY: `raw` outlives the call; the device is valid. Released once, in drop.
        check(unsafe { sys::cuDevicePrimaryCtxRetain(&mut raw, device) }, "opening the device's context")?;
        let context = Arc::new(Self { device, raw, lockable: AtomicUsize::new(usize::MAX) });
        context.bind()?;
        Ok(context)
    }

    /// Makes this the current context of the calling thread, as every call of the driver and of its libraries needs it.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the context is lost.
    pub fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained until drop.
        check(unsafe { sys::cuCtxSetCurrent(self.raw) }, "making the context current")
    }

    /// From here on the host gives at most so many bytes of page-locked memory: for checks of what happens where it does.
    pub fn limit_page_locked(&self, bytes: usize) {
        // Relaxed: a lone counter.
        self.lockable.store(bytes, Ordering::Relaxed);
    }

    /// Waits for all work on the device.
    ///
    /// # Errors
    /// A fault of any earlier work.
    pub fn sync(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: a context is current.
        check(unsafe { sys::cuCtxSynchronize() }, "waiting for the device")
    }

    /// Free and total bytes by the driver's own count.
    ///
    /// # Errors
    /// [`Error::Invariant`] if the context is lost.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.bind()?;
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: both outlive the call; a context is current.
        check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, "asking for free memory")?;
        Ok((free as u64, total as u64))
    }

    /// A number that describes the device.
    ///
    /// # Errors
    /// [`Error::Invariant`] for an attribute that the driver does not know.
    pub fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<i32> {
        let mut value = 0;
        // SAFETY: `value` outlives the call; the device is valid.
        check(unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, self.device) }, "asking for a device attribute")?;
        Ok(value)
    }

    /// The device's name.
    ///
    /// # Errors
    /// The driver's.
    pub fn name(&self) -> Result<String> {
        let mut bytes = [0u8; 256];
        // SAFETY: the driver writes at most the given 256 bytes, zero-terminated.
        check(unsafe { sys::cuDeviceGetName(bytes.as_mut_ptr().cast(), 256, self.device) }, "asking for the device's name")?;
        Ok(CStr::from_bytes_until_nul(&bytes).map(|s| s.to_string_lossy().into_owned()).unwrap_or_default())
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`, and everything made in it holds an Arc of it, so it goes last.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// Checks every function that this crate calls, because cudarc panics on a missing one.
fn require_functions() -> Result<()> {
    // SAFETY: the library is there (probed by the caller) and stays loaded.
    let library = unsafe { sys::culib() };
    let missing: Vec<&str> = FUNCTIONS
        .into_iter()
        // SAFETY: the symbol is looked up but not used.
        .filter(|name| unsafe { library.get::<*const c_void>(name.as_bytes()) }.is_err())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::absent("the NVIDIA driver is too old")
        .found(format!("it lacks {}", missing.join(", ")))
        .advice("install a driver for CUDA 12 or later")
        .lasting())
}

/// The CUDA version that the driver supports, as major and minor.
///
/// # Errors
/// [`Error::Absent`] without driver.
pub fn version() -> Result<(u32, u32)> {
    require(Library::Driver)?;
    let mut version = 0;
    // SAFETY: `version` outlives the call.
    check(unsafe { sys::cuDriverGetVersion(&mut version) }, "asking for the driver's version")?;
    let version = u32::try_from(version).unwrap_or(0);
    Ok((version / 1000, version % 1000 / 10))
}

/// Memory on the device, freed in drop.
#[derive(Debug)]
pub struct DeviceBuffer {
    ptr: Ptr,
    bytes: usize,
    context: Arc<Context>,
}

impl DeviceBuffer {
    /// Takes `bytes` (at least one) from the driver.
    ///
    /// # Errors
    /// [`Error::TryAgain`] if the device has not that much.
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        context.bind()?;
        let mut ptr = 0;
        // SAFETY: `ptr` outlives the call; a context is current. Freed once, in drop.
        check(unsafe { sys::cuMemAlloc_v2(&mut ptr, bytes.max(1)) }, &format!("taking {bytes} bytes"))?;
        Ok(Self { ptr: Ptr(ptr), bytes, context: context.clone() })
    }

    /// Its first byte, aligned to at least 256.
    #[must_use]
    pub fn ptr(&self) -> Ptr {
        self.ptr
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: allocated in `new`, freed only here; the driver waits for work that uses it.
            let _ = unsafe { sys::cuMemFree_v2(self.ptr.0) };
        }
    }
}

/// Copies `from` to the device behind the work of `stream`, and waits.
///
/// Not by the driver's plain copy: that one returns when the slice has been read, perhaps before the bytes are on the device, and streams
/// that do not wait for the default stream (all of ours) could overtake it.
///
/// # Errors
/// The driver's, and a fault of earlier work.
pub fn upload(stream: &Stream, to: Ptr, from: &[u8]) -> Result<()> {
    if from.is_empty() {
        return Ok(());
    }
    stream.context.bind()?;
    // SAFETY: the source is a slice, and the wait below ends after its last use.
    let queued = check(unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, from.as_ptr().cast(), from.len(), stream.raw) }, "copying to the device");
    stream.sync().and(queued)
}

/// Copies from the device and waits. Earlier work of other streams is not waited for: synchronise them first.
///
/// # Errors
/// The driver's.
pub fn download(context: &Context, to: &mut [u8], from: Ptr) -> Result<()> {
    if to.is_empty() {
        return Ok(());
    }
    context.bind()?;
    // SAFETY: the target is a slice of plain bytes, held exclusively until the call returns with everything written.
    check(unsafe { sys::cuMemcpyDtoH_v2(to.as_mut_ptr().cast(), from.0, to.len()) }, "copying from the device")
}

/// Whose work goes first where several streams have some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// Copies from the host.
    Copies,
    /// What others will wait for.
    First,
    /// Products and everything between them.
    Normal,
    /// What can wait.
    Last,
}

/// An ordered queue of device work.
#[derive(Debug)]
pub struct Stream {
    raw: sys::CUstream,
    context: Arc<Context>,
}

// SAFETY: a stream may be used from any thread; the context is made current in it first.
unsafe impl Send for Stream {}

impl Stream {
    /// A stream that does not wait for the legacy default stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(context: &Arc<Context>, priority: Priority) -> Result<Self> {
        context.bind()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: both outlive the call; a context is current.
        check(unsafe { sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest) }, "asking for stream priorities")?;
        // Lower numbers go first. A driver with fewer than four levels lets neighbours share one.
        let level = match priority {
            Priority::Copies => greatest,
            Priority::First => greatest + 1,
            Priority::Normal => greatest + 2,
            Priority::Last => least,
        };
        let level = level.clamp(greatest.min(least), least.max(greatest));
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `raw` outlives the call; the priority is one that the driver named. Destroyed once, in drop.
        check(unsafe { sys::cuStreamCreateWithPriority(&mut raw, flags, level) }, "making a stream")?;
        Ok(Self { raw, context: context.clone() })
    }

    /// The driver's handle, for libraries. It is valid as long as `self`.
    #[must_use]
    pub fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// The context it belongs to.
    #[must_use]
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Waits until its work is done.
    ///
    /// # Errors
    /// A fault of that work.
    pub fn sync(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: the stream lives.
        check(unsafe { sys::cuStreamSynchronize(self.raw) }, "waiting for a stream")
    }

    /// Later work of this stream waits for `event` as it was last recorded; the host does not.
    ///
    /// # Errors
    /// The driver's.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.context.bind()?;
        // SAFETY: stream and event live.
        check(unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) }, "making a stream wait")
    }

    /// Marks the end of the work so far.
    ///
    /// # Errors
    /// The driver's.
    pub fn record(&self, event: &Event) -> Result<()> {
        self.context.bind()?;
        // SAFETY: stream and event live.
        check(unsafe { sys::cuEventRecord(event.raw, self.raw) }, "recording an event")
    }

    /// Queues setting `bytes` bytes to `value`.
    ///
    /// # Errors
    /// The driver's.
    pub fn fill(&self, to: Ptr, value: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.context.bind()?;
        // SAFETY: device memory only.
        check(unsafe { sys::cuMemsetD8Async(to.0, value, bytes, self.raw) }, "filling device memory")
    }

    /// Queues a copy within device memory.
    ///
    /// # Errors
    /// The driver's.
    pub fn copy(&self, to: Ptr, from: Ptr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.context.bind()?;
        // SAFETY: device memory only.
        check(unsafe { sys::cuMemcpyDtoDAsync_v2(to.0, from.0, bytes, self.raw) }, "copying device memory")
    }

    /// Queues a copy of `bytes` bytes at `offset` of `from` to the device.
    ///
    /// # Errors
    /// [`Error::Invariant`] outside of the range; the driver's.
    pub fn copy_in(&self, to: Ptr, from: &impl HostMemory, offset: usize, bytes: usize) -> Result<()> {
        let source = part(from, offset, bytes)?;
        self.context.bind()?;
        // SAFETY: the source is page-locked memory that its owner keeps until the device is idle (contract of HostMemory), and the part
        // lies within it.
        check(unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, source.cast_const(), bytes, self.raw) }, "copying to the device")
    }

    /// Queues a copy from the device to `offset` of `to`.
    ///
    /// # Errors
    /// [`Error::Invariant`] outside of the range; the driver's.
    pub fn copy_out(&self, to: &Pinned, offset: usize, from: Ptr, bytes: usize) -> Result<()> {
        let target = part(to, offset, bytes)?;
        self.context.bind()?;
        // SAFETY: the target is page-locked memory that nobody has a reference to (Pinned hands out none) and that its owner keeps until
        // the device is idle; the part lies within it.
        check(unsafe { sys::cuMemcpyDtoHAsync_v2(target, from.0, bytes, self.raw) }, "copying from the device")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made in `new`, destroyed only here; the driver finishes its work.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
        }
    }
}

/// A point in a stream's work.
#[derive(Debug)]
pub struct Event {
    raw: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: an event may be used from any thread; the context is made current in it first.
unsafe impl Send for Event {}

impl Event {
    /// An event for ordering alone.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        Self::with(context, sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32)
    }

    /// An event for ordering, on which [`Self::sync`] sleeps instead of asking again and again: for threads that may wait long.
    ///
    /// # Errors
    /// The driver's.
    pub fn sleeping(context: &Arc<Context>) -> Result<Self> {
        use sys::CUevent_flags_enum as Flag;
        Self::with(context, Flag::CU_EVENT_DISABLE_TIMING as u32 | Flag::CU_EVENT_BLOCKING_SYNC as u32)
    }

    /// An event that also knows its time.
    ///
    /// # Errors
    /// The driver's.
    pub fn timed(context: &Arc<Context>) -> Result<Self> {
        Self::with(context, sys::CUevent_flags_enum::CU_EVENT_DEFAULT as u32)
    }

    fn with(context: &Arc<Context>, flags: u32) -> Result<Self> {
        context.bind()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` outlives the call; a context is current. Destroyed once, in drop.
        check(unsafe { sys::cuEventCreate(&mut raw, flags) }, "making an event")?;
        Ok(Self { raw, context: context.clone() })
    }

    /// Whether the work before its last recording is done (true if it was never recorded).
    ///
    /// # Errors
    /// A fault of that work.
    pub fn done(&self) -> Result<bool> {
        self.context.bind()?;
        // SAFETY: the event lives.
        match unsafe { sys::cuEventQuery(self.raw) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check(code, "asking for an event").map(|()| true),
        }
    }

    /// Waits on the host for the work before its last recording.
    ///
    /// # Errors
    /// A fault of that work.
    pub fn sync(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: the event lives.
        check(unsafe { sys::cuEventSynchronize(self.raw) }, "waiting for an event")
    }

    /// Milliseconds from `earlier` to this one; both timed, recorded and done.
    ///
    /// # Errors
    /// [`Error::Invariant`] otherwise.
    pub fn since_ms(&self, earlier: &Event) -> Result<f32> {
        type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> CUresult;
        self.context.bind()?;
        // The function of a driver for CUDA 12.8 or later, then that of an older one: cudarc would name the newer alone, and panic.
        let names: [&[u8]; 2] = [b"cuEventElapsedTime_v2", b"cuEventElapsedTime"];
        // SAFETY: the driver is loaded (there is an event) and stays so; both names have the signature `Elapsed` in cuda.h.
        let found = names.into_iter().find_map(|name| unsafe { sys::culib().get::<Elapsed>(name) }.ok().map(|f| *f));
        let elapsed =
            found.ok_or_else(|| Error::absent("the NVIDIA driver cannot time events").advice("install a driver for CUDA 12 or later"))?;
        let mut ms = 0.0;
        // SAFETY: `ms` outlives the call, both events live.
        check(unsafe { elapsed(&mut ms, earlier.raw, self.raw) }, "timing events")?;
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made in `with`, destroyed only here; the driver keeps it while work refers to it.
            let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}
