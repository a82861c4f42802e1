//! Reads that the calling thread makes itself: of memory file systems, and where io_uring is refused.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::uring::ReadOp;
use crate::faults;

/// Performs `op` into `target`, taking short reads up where they stopped.
///
/// # Errors
/// The failed read's offset and error; a file that ends early is `UnexpectedEof`.
pub(super) fn read(file: &File, op: ReadOp, target: &mut [u8]) -> Result<(), (u64, io::Error)> {
    let mut done = 0;
    while done < op.expected {
        let offset = op.offset + done as u64;
        match faults::read(file.read_at(&mut target[done..op.len], offset)) {
            Ok(0) => return Err((offset, io::Error::from(io::ErrorKind::UnexpectedEof))),
            Ok(n) => done += n,
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(e) => return Err((offset, e)),
        }
    }
    Ok(())
}
