//! Reads rows of a checkpoint's tensors in batches, with direct reads: a 64 GB source leaves no trace in memory or in the page cache.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use safetensors::Dtype;
use serenity_protocol::model_path::SourcePlace;
use serenity_protocol::{Error, Result};

use super::direct::DirectFile;
use crate::reader::AlignedBuffer;

/// Bytes of one batch of rows.
pub const BATCH_BYTES: usize = 16 << 20;

/// Consecutive rows of one tensor, as they are in the file. Dropping it gives its memory to a later batch.
pub struct Batch {
    /// First row.
    pub row: usize,
    /// Rows.
    pub rows: usize,
    buffer: AlignedBuffer,
    /// Where the rows' bytes are in the buffer.
    part: Range<usize>,
    pool: Pool,
}

impl Batch {
    /// The rows' bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.buffer.bytes().get(self.part.clone()).unwrap_or_default()
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        // A poisoned pool only loses the memory.
        if let Ok(mut pool) = self.pool.lock() {
            pool.push(std::mem::take(&mut self.buffer));
        }
    }
}

type Pool = Arc<Mutex<Vec<AlignedBuffer>>>;

/// Open source files.
#[derive(Default)]
pub struct SourceReader {
    files: HashMap<PathBuf, DirectFile>,
    pool: Pool,
}

impl SourceReader {
    /// Reads the tensor at `place`, `[rows, columns]`, and hands over batches in row order.
    ///
    /// # Errors
    /// [`Error::Data`] for a short file, or what `each` returns.
    pub fn batches(&mut self, place: &SourcePlace, rows: usize, columns: usize, mut each: impl FnMut(Batch) -> Result<()>) -> Result<()> {
        let row_bytes = columns * element_bytes(place.dtype)?;
        let batch_rows = (BATCH_BYTES / row_bytes.max(1)).max(1);
        let mut row = 0;
        while row < rows {
            let now = batch_rows.min(rows - row);
            let mut buffer = self.pool.lock().ok().and_then(|mut pool| pool.pop()).unwrap_or_default();
            let part = self.read(place, (row * row_bytes) as u64, now * row_bytes, &mut buffer)?;
            each(Batch { row, rows: now, buffer, part, pool: self.pool.clone() })?;
            row += now;
        }
        Ok(())
    }

    /// Reads `bytes` bytes from byte `start` of the concatenated runs; returns where in the buffer they are.
    fn read(&mut self, place: &SourcePlace, start: u64, bytes: usize, buffer: &mut AlignedBuffer) -> Result<Range<usize>> {
        let _span = tracing::trace_span!("read").entered();
        let pieces = pieces_of(&place.runs, start, bytes as u64);
        if pieces.iter().map(|p| p.end - p.start).sum::<u64>() != bytes as u64 {
            return Err(Error::invariant("rows beyond a tensor's end were asked for").at(&place.file));
        }
        let read = read_pieces(self.file(&place.file)?, &pieces, bytes, buffer);
        read.map_err(|(e, at)| Error::io("cannot read the checkpoint", &place.file, e).offset(at))
    }

    fn file(&mut self, path: &Path) -> Result<&mut DirectFile> {
        if !self.files.contains_key(path) {
            let file = DirectFile::open(path).map_err(|e| Error::io("cannot read the checkpoint", path, e))?;
            self.files.insert(path.to_path_buf(), file);
        }
        self.files.get_mut(path).ok_or_else(|| Error::invariant("an open file is gone"))
    }
}

/// The byte ranges of the file that hold `bytes` bytes from `start` of the concatenated runs.
fn pieces_of(runs: &[Range<u64>], start: u64, bytes: u64) -> Vec<Range<u64>> {
    let (mut skip, mut left) = (start, bytes);
    let mut pieces = Vec::new();
    for run in runs {
        let length = run.end - run.start;
        if skip < length && left > 0 {
            let now = (length - skip).min(left);
            pieces.push(run.start + skip..run.start + skip + now);
            left -= now;
            skip = 0;
        } else {
            skip -= skip.min(length);
        }
    }
    pieces
}

/// Reads the pieces one after the other into the buffer; the error comes with the piece's offset.
fn read_pieces(
    file: &mut DirectFile,
    pieces: &[Range<u64>],
    bytes: usize,
    buffer: &mut AlignedBuffer,
) -> std::result::Result<Range<usize>, (std::io::Error, u64)> {
    if let [piece] = pieces {
        return file.read(piece, buffer).map_err(|e| (e, piece.start));
    }
    // Two halves of a tensor in the other order.
    let (mut at, mut wide) = (0, AlignedBuffer::default());
    for piece in pieces {
        let part = file.read(piece, &mut wide).map_err(|e| (e, piece.start))?;
        let from = wide.bytes().get(part).unwrap_or_default();
        if let Some(into) = buffer.resize(bytes).get_mut(at..at + from.len()) {
            into.copy_from_slice(from);
        }
        at += from.len();
    }
    Ok(0..bytes)
}

/// Bytes of an element of a type that can be quantised.
///
/// # Errors
/// [`Error::Data`] for other types.
pub fn element_bytes(dtype: Dtype) -> Result<usize> {
    match dtype {
        Dtype::F32 => Ok(4),
        Dtype::BF16 | Dtype::F16 => Ok(2),
        Dtype::F8_E4M3 | Dtype::F8_E5M2 => Ok(1),
        other => {
            Err(Error::data("a tensor has an unsupported type").expected("F32, BF16, F16, F8_E4M3 or F8_E5M2").found(format!("{other:?}")))
        }
    }
}
