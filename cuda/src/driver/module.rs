//! Compiled kernels, and how they are launched.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};
use serenity_protocol::{Error, Result};

use super::{Context, Ptr, Stream, check};

/// Arguments that a launch can carry.
const ARGS_MAX: usize = 48;

/// Compiled kernels.
#[derive(Debug)]
pub struct Module {
    raw: sys::CUmodule,
    context: Arc<Context>,
}

// SAFETY: a module may be used from any thread; the context is made current in it first.
unsafe impl Send for Module {}

/// A kernel; valid as long as its module, which [`crate::Gpu`] keeps.
#[derive(Debug, Clone, Copy)]
pub struct Kernel(sys::CUfunction);

// SAFETY: a handle that the driver resolves; it is not tied to a thread.
unsafe impl Send for Kernel {}

impl Module {
    /// Loads `image`, the output of the compiler.
    ///
    /// # Errors
    /// [`Error::Absent`] if the driver cannot run it.
    pub fn load(context: &Arc<Context>, image: &[u8]) -> Result<Self> {
        context.bind()?;
        // PTX is text and must end in a zero; a trailing zero does a cubin no harm.
        let mut padded = image.to_vec();
        padded.push(0);
        let mut raw = std::ptr::null_mut();
        // SAFETY: the image comes from the compiler, whole (the cache verifies a hash), and outlives the call. Unloaded once, in drop.
        check(unsafe { sys::cuModuleLoadData(&mut raw, padded.as_ptr().cast()) }, "loading kernels")?;
        Ok(Self { raw, context: context.clone() })
    }

    /// The kernel called `name`.
    ///
    /// # Errors
    /// [`Error::Invariant`] if there is none.
    pub fn kernel(&self, name: &str) -> Result<Kernel> {
        self.context.bind()?;
        let text = CString::new(name).map_err(|e| Error::invariant("a kernel's name has a zero").cause(e))?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` and `text` outlive the call; the module lives.
        check(unsafe { sys::cuModuleGetFunction(&mut raw, self.raw, text.as_ptr()) }, &format!("looking for kernel {name}"))?;
        Ok(Kernel(raw))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: loaded in `load`, unloaded only here.
            let _ = unsafe { sys::cuModuleUnload(self.raw) };
        }
    }
}

/// One argument of a kernel: at most 8 bytes, little endian.
#[derive(Debug, Clone, Copy)]
pub struct Arg(u64);

macro_rules! args {
    ($($from:ty => $convert:expr;)*) => {$(
        impl From<$from> for Arg {
            fn from(value: $from) -> Self {
                let convert: fn($from) -> u64 = $convert;
                Arg(convert(value))
            }
        }
    )*};
}

args! {
    Ptr => |v| v.0;
    u64 => |v| v;
    i64 => |v| v.cast_unsigned();
    usize => |v| v as u64;
    u32 => u64::from;
    i32 => |v| u64::from(v.cast_unsigned());
    f32 => |v| u64::from(v.to_bits());
    f64 => |v| v.to_bits();
}

impl Kernel {
    /// Lets a launch ask for up to `bytes` of dynamic shared memory (above 48 KiB it must be allowed first).
    ///
    /// # Errors
    /// [`Error::Invariant`] if the device has not that much.
    pub fn allow_shared(self, context: &Context, bytes: u32) -> Result<()> {
        context.bind()?;
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the kernel's module lives (see Kernel).
        check(unsafe { sys::cuFuncSetAttribute(self.0, attribute, bytes.cast_signed()) }, "asking for shared memory")
    }

    /// Queues a launch on `stream`. `name` is for the error message.
    ///
    /// # Errors
    /// [`Error::Invariant`] for a shape that the device cannot launch; a fault of earlier work may show here too.
    pub fn launch(self, stream: &Stream, name: &str, grid: [u32; 3], block: [u32; 3], shared: u32, args: &[Arg]) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        // Each parameter of our kernels is a scalar or pointer of at most 8 bytes. 16-byte slots for the most parameters that any has
        // keep the driver's reads within this array whatever the kernel declares.
        let mut slots = [[0u64; 2]; ARGS_MAX];
        if args.len() > slots.len() {
            return Err(Error::invariant(format!("kernel {name} has more than {ARGS_MAX} arguments")));
        }
        for (slot, arg) in slots.iter_mut().zip(args) {
            slot[0] = arg.0;
        }
        let mut pointers = slots.each_mut().map(|slot| std::ptr::from_mut(slot).cast::<c_void>());
        stream.context.bind()?;
        let ([gx, gy, gz], [bx, by, bz]) = (grid, block);
        // SAFETY: the module lives (see Kernel), the stream lives, and the driver copies the arguments, all within `slots`, before the
        // call returns.
        let code =
            unsafe { sys::cuLaunchKernel(self.0, gx, gy, gz, bx, by, bz, shared, stream.raw, pointers.as_mut_ptr(), std::ptr::null_mut()) };
        if code == CUresult::CUDA_SUCCESS {
            return Ok(());
        }
        check(code, &format!("launching {name} with grid {grid:?}, block {block:?}, {shared} bytes of shared memory"))
    }
}
