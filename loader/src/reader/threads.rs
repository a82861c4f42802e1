//! Reads with pread on a few threads, for kernels and containers that refuse io_uring.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use super::{ReadOp, expected_len};
use crate::faults;

const THREADS: usize = 8;

/// Performs `ops` into `buffer`.
///
/// # Errors
/// The first failed read with its offset; a file that ends early is `UnexpectedEof`.
pub(super) fn read(file: &File, file_bytes: u64, ops: &[ReadOp], buffer: &mut [u8]) -> Result<(), (u64, io::Error)> {
    // The buffer is cut into one exclusive slice per read; ops are in buffer order and do not overlap.
    let mut rest = buffer;
    let mut start = 0;
    let mut work = Vec::with_capacity(ops.len());
    for op in ops {
        let (_, tail) = rest.split_at_mut(op.into - start);
        let (slice, tail) = tail.split_at_mut(op.len);
        work.push((*op, slice));
        rest = tail;
        start = op.into + op.len;
    }
    let queue = Mutex::new(work.into_iter());
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..THREADS.min(ops.len()) {
            scope.spawn(|| {
                loop {
                    let Some((op, slice)) = queue.lock().ok().and_then(|mut q| q.next()) else { return };
                    if let Err(e) = read_one(file, op, expected_len(&op, file_bytes), slice) {
                        if let Ok(mut failed) = failed.lock() {
                            failed.get_or_insert(e);
                        }
                        return;
                    }
                }
            });
        }
    });
    match failed.into_inner() {
        Ok(Some(e)) => Err(e),
        _ => Ok(()),
    }
}

fn read_one(file: &File, op: ReadOp, expected: usize, slice: &mut [u8]) -> Result<(), (u64, io::Error)> {
    let mut done = 0;
    while done < expected {
        let offset = op.offset + done as u64;
        match faults::read(file.read_at(&mut slice[done..], offset)) {
            Ok(0) => return Err((offset, io::Error::from(io::ErrorKind::UnexpectedEof))),
            Ok(n) => done += n,
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(e) => return Err((offset, e)),
        }
    }
    Ok(())
}
