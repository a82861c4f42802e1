//! The loader's fault switches, for tests: what [`serenity_protocol::faults`] asks for, put where reads and fills happen.
//!
//! Each function costs one load and does nothing unless the environment variable is set.
#![forbid(unsafe_code)]

use std::io;

use serenity_protocol::faults::{self, ReadFault};

/// The result that a finished read shall be taken to have: bytes read, or a negative error number. A read that is made short keeps a
/// multiple of the disk's block, as a real one does.
#[must_use]
pub fn read_result(result: i32) -> i32 {
    let Some(faults) = faults::active() else { return result };
    match faults.next_read() {
        Some(ReadFault::Eio) => -nix::libc::EIO,
        Some(ReadFault::Eintr) => -nix::libc::EINTR,
        Some(ReadFault::Eagain) => -nix::libc::EAGAIN,
        Some(ReadFault::Short) if result > super::reader::ALIGN as i32 => {
            let align = super::reader::ALIGN as i32;
            (result / 2 / align * align).max(align)
        }
        Some(ReadFault::Short) | None => result,
    }
}

/// The same for a read through the standard library.
///
/// # Errors
/// That of the read, or the fault's.
pub fn read(result: io::Result<usize>) -> io::Result<usize> {
    if faults::active().is_none() {
        return result;
    }
    match read_result(i32::try_from(result?).unwrap_or(i32::MAX)) {
        n if n >= 0 => Ok(n as usize),
        e => Err(io::Error::from_raw_os_error(-e)),
    }
}

/// Makes a read take longer.
pub fn delay_read() {
    if let Some(faults) = faults::active() {
        std::thread::sleep(faults.read_delay());
    }
}

/// Makes the fill of a slot take longer.
pub fn delay_fill() {
    if let Some(faults) = faults::active() {
        std::thread::sleep(faults.fill_delay());
    }
}

/// Whether the kernel shall be taken to have refused `what`.
#[must_use]
pub fn refuses(what: &str) -> bool {
    faults::active().is_some_and(|f| f.refuses(what))
}
