//! The run-time compiler, thin and safe: CUDA C++ in, machine code (cubin) or PTX out.

use std::ffi::{CString, c_char};

use cudarc::nvrtc::sys::{self, nvrtcResult};
use serenity_protocol::{Error, Result};

use crate::libraries::{Library, require};

fn check(code: nvrtcResult, what: &str) -> Result<()> {
    if code == nvrtcResult::NVRTC_SUCCESS {
        Ok(())
    } else {
        Err(Error::invariant(format!("the run-time compiler fails: {what}")).cause(format!("{code:?}")))
    }
}

/// What to compile for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Target {
    /// Machine code of one architecture, e.g. 90 for compute capability 9.0.
    Cubin(u32),
    /// PTX that the driver compiles on for a device newer than the compiler.
    Ptx(u32),
}

impl Target {
    /// The best that a compiler with `supported` architectures can do for a device of `capability`.
    ///
    /// # Errors
    /// [`Error::Absent`] if the device is older than everything supported.
    pub fn choose(supported: &[u32], capability: u32) -> Result<Self> {
        if supported.contains(&capability) {
            return Ok(Target::Cubin(capability));
        }
        let below = supported.iter().copied().filter(|a| *a < capability).max();
        below.map(Target::Ptx).ok_or_else(|| {
            Error::absent("the run-time compiler does not know this device")
                .expected(format!("compute capability {}.{}", capability / 10, capability % 10))
                .found(format!("{supported:?}"))
                .advice("install the libnvrtc of an older toolkit")
                .lasting()
        })
    }

    /// The compiler's option.
    #[must_use]
    pub fn option(self) -> String {
        match self {
            Target::Cubin(arch) => format!("--gpu-architecture=sm_{arch}"),
            Target::Ptx(arch) => format!("--gpu-architecture=compute_{arch}"),
        }
    }
}

/// Version of the compiler, major and minor.
///
/// # Errors
/// [`Error::Absent`] without the library.
pub fn version() -> Result<(i32, i32)> {
    require(Library::Nvrtc)?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both outlive the call; the library is there.
    check(unsafe { sys::nvrtcVersion(&mut major, &mut minor) }, "asking for its version")?;
    Ok((major, minor))
}

/// Architectures that it makes machine code for, e.g. 80 for compute capability 8.0.
///
/// # Errors
/// [`Error::Absent`] without the library.
pub fn architectures() -> Result<Vec<u32>> {
    require(Library::Nvrtc)?;
    let mut count = 0;
    // SAFETY: `count` outlives the call; the library is there.
    check(unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) }, "counting architectures")?;
    let mut all = vec![0i32; usize::try_from(count).unwrap_or(0)];
    // SAFETY: the array has as many elements as the library just said it writes.
    check(unsafe { sys::nvrtcGetSupportedArchs(all.as_mut_ptr()) }, "listing architectures")?;
    Ok(all.into_iter().filter_map(|a| u32::try_from(a).ok()).collect())
}

/// A program, destroyed in drop.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created in `compile`, destroyed only here.
        let _ = unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

/// Compiles `source`, called `name` in messages. May be called from several threads.
///
/// # Errors
/// [`Error::Absent`] without the library; [`Error::Invariant`] with the compiler's log if the source does not compile.
pub fn compile(name: &str, source: &str, target: Target, options: &[&str]) -> Result<Vec<u8>> {
    require(Library::Nvrtc)?;
    let text = |s: &str| CString::new(s).map_err(|e| Error::invariant("a kernel's source or option has a zero").cause(e));
    let (label, source) = (text(name)?, text(source)?);
    let options = options.iter().map(|o| text(o)).chain([text(&target.option())]).collect::<Result<Vec<_>>>()?;
    let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
    let mut program = Program(std::ptr::null_mut());
    // SAFETY: all strings are zero-terminated and outlive `program` (dropped before them: declared after); no headers are passed.
    let code = unsafe { sys::nvrtcCreateProgram(&mut program.0, source.as_ptr(), label.as_ptr(), 0, std::ptr::null(), std::ptr::null()) };
    check(code, "making a program")?;
    let count = i32::try_from(pointers.len()).map_err(|_| Error::invariant("too many compiler options"))?;
    // SAFETY: the program lives; `pointers` has `count` zero-terminated strings.
    let code = unsafe { sys::nvrtcCompileProgram(program.0, count, pointers.as_ptr()) };
    if code != nvrtcResult::NVRTC_SUCCESS {
        return Err(Error::invariant(format!("the kernels in {name} do not compile for {}", target.option()))
            .cause(log(&program).unwrap_or_default()));
    }
    match target {
        Target::Cubin(_) => read(&program, sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN),
        Target::Ptx(_) => read(&program, sys::nvrtcGetPTXSize, sys::nvrtcGetPTX),
    }
}

type Size = unsafe fn(sys::nvrtcProgram, *mut usize) -> nvrtcResult;
type Get = unsafe fn(sys::nvrtcProgram, *mut c_char) -> nvrtcResult;

/// One of the outputs of a compiled program: `size` and `get` belong together.
fn read(program: &Program, size: Size, get: Get) -> Result<Vec<u8>> {
    let mut bytes = 0;
    // SAFETY: the program lives and `bytes` outlives the call.
    check(unsafe { size(program.0, &mut bytes) }, "asking for the size of its output")?;
    let mut output = vec![0u8; bytes];
    // SAFETY: the library writes exactly the size that it just named.
    check(unsafe { get(program.0, output.as_mut_ptr().cast()) }, "reading its output")?;
    Ok(output)
}

fn log(program: &Program) -> Result<String> {
    read(program, sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog)
        .map(|bytes| String::from_utf8_lossy(&bytes).trim_end_matches(['\0', '\n']).to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_device_newer_than_the_compiler_gets_ptx_of_the_newest_below() {
        let old = [70, 75, 80, 86, 89, 90];
        assert_eq!(Target::choose(&old, 89).unwrap(), Target::Cubin(89));
        assert_eq!(Target::choose(&old, 120).unwrap(), Target::Ptx(90));
        assert_eq!(Target::choose(&old, 87).unwrap(), Target::Ptx(86));
        assert_eq!(Target::choose(&old, 61).unwrap_err().exit_code(), 69);
    }
}
