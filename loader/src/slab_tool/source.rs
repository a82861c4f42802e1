//! Reads rows of a checkpoint's tensors with read(2), in batches, without mapping: a 64 GB source leaves no trace in memory.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use safetensors::Dtype;
use serenity_protocol::model_path::SourcePlace;
use serenity_protocol::{Error, Result};

/// Bytes of one batch of rows.
pub const BATCH_BYTES: usize = 16 << 20;

/// Consecutive rows of one tensor, as they are in the file.
pub struct Batch {
    /// First row.
    pub row: usize,
    /// Rows.
    pub rows: usize,
    /// Their bytes.
    pub bytes: Vec<u8>,
}

/// Open source files.
#[derive(Default)]
pub struct SourceReader {
    files: HashMap<PathBuf, File>,
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
            let mut bytes = vec![0; now * row_bytes];
            self.read(place, (row * row_bytes) as u64, &mut bytes)?;
            each(Batch { row, rows: now, bytes })?;
            row += now;
        }
        Ok(())
    }

    /// Fills `into` from byte `start` of the concatenated runs.
    fn read(&mut self, place: &SourcePlace, start: u64, into: &mut [u8]) -> Result<()> {
        let _span = tracing::trace_span!("read").entered();
        let io = |e| Error::io("cannot read the checkpoint", &place.file, e);
        if !self.files.contains_key(&place.file) {
            let file = File::open(&place.file).map_err(io)?;
            self.files.insert(place.file.clone(), file);
        }
        let file = self.files.get(&place.file).ok_or_else(|| Error::invariant("an open file is gone"))?;
        let mut skip = start;
        let mut into = into;
        for run in &place.runs {
            let length = run.end - run.start;
            if skip >= length {
                skip -= length;
                continue;
            }
            let now = ((length - skip) as usize).min(into.len());
            let (head, rest) = into.split_at_mut(now);
            let offset = run.start + skip;
            file.read_exact_at(head, offset).map_err(|e| io(e).offset(offset))?;
            // The pages will not be read again: leave the cache to those who need it. Failure costs nothing.
            let length = std::num::NonZeroU64::new(now as u64);
            let _ = rustix::fs::fadvise(file, offset, length, rustix::fs::Advice::DontNeed);
            into = rest;
            skip = 0;
            if into.is_empty() {
                return Ok(());
            }
        }
        if into.is_empty() { Ok(()) } else { Err(Error::invariant("rows beyond a tensor's end were asked for").at(&place.file)) }
    }
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
