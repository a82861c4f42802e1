//! Weights from disk past the page cache: 33 GB that are read once would push out everything else.
//!
//! Several threads read a tensor's bytes in parallel into one aligned buffer that is used again. Small files, and file systems without direct
//! reads, go through the page cache.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serenity_protocol::{Error, Result};

/// Alignment of offsets, lengths and memory of direct reads.
pub(super) const ALIGN: usize = 4096;
/// Bytes of one read.
const READ_BYTES: usize = 4 << 20;
/// Reads under way at once.
const THREADS: usize = 8;
/// Smaller files are read through the page cache, where a second run finds them.
pub(super) const DIRECT_FILE_BYTES_MIN: u64 = 256 << 20;

struct Opened {
    file: File,
    bytes: u64,
    /// Alignment that reads need; 1 through the page cache.
    align: u64,
}

/// Open weight files and the buffer that their tensors pass through.
pub(super) struct DirectReader {
    files: HashMap<PathBuf, Opened>,
    buffer: Vec<u8>,
    direct_bytes_min: u64,
}

impl DirectReader {
    /// A reader that reads files of at least `direct_bytes_min` bytes directly.
    pub fn new(direct_bytes_min: u64) -> Self {
        Self { files: HashMap::new(), buffer: Vec::new(), direct_bytes_min }
    }

    fn open(&self, path: &Path) -> io::Result<Opened> {
        let file = File::open(path)?;
        let bytes = file.metadata()?.len();
        if bytes >= self.direct_bytes_min {
            let direct = File::options().read(true).custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed()).open(path);
            match direct {
                Ok(file) => return Ok(Opened { file, bytes, align: ALIGN as u64 }),
                Err(e) => tracing::info!("no direct reads from {} ({e}); reading through the page cache", path.display()),
            }
        }
        Ok(Opened { file, bytes, align: 1 })
    }

    /// The bytes of `range` of the file.
    ///
    /// # Errors
    /// [`Error::Data`] for an I/O error or a file that ends early, with path and offset.
    pub fn read(&mut self, path: &Path, range: &Range<u64>) -> Result<&[u8]> {
        if !self.files.contains_key(path) {
            let opened = self.open(path).map_err(|e| Error::io("cannot open the weight file", path, e))?;
            self.files.insert(path.to_path_buf(), opened);
        }
        let opened = self.files.get(path).ok_or_else(|| Error::invariant("a file was opened and is not there"))?;
        let start = range.start / opened.align * opened.align;
        let length = usize::try_from(range.end.next_multiple_of(opened.align) - start)
            .map_err(|e| Error::data("a tensor is larger than memory").at(path).cause(e))?;
        if self.buffer.len() < length + ALIGN {
            self.buffer.resize(length + ALIGN, 0);
        }
        let skip = self.buffer.as_ptr().align_offset(ALIGN).min(ALIGN);
        let target = self.buffer.get_mut(skip..skip + length).ok_or_else(|| Error::invariant("a read buffer cannot be aligned"))?;
        let pieces = Mutex::new(target.chunks_mut(READ_BYTES).enumerate().map(|(i, piece)| (start + (i * READ_BYTES) as u64, piece)));
        let work = || -> Result<(), (u64, io::Error)> {
            loop {
                // The lock is held while the next piece is taken, not while it is read.
                let Some((offset, piece)) = pieces.lock().ok().and_then(|mut p| p.next()) else { return Ok(()) };
                let wanted = piece.len().min(opened.bytes.saturating_sub(offset) as usize);
                read_piece(&opened.file, offset, piece, wanted).map_err(|e| (offset, e))?;
            }
        };
        let failed = |(offset, e)| Error::io("cannot read the weights", path, e).offset(offset);
        if length <= READ_BYTES {
            work().map_err(failed)?;
        } else {
            std::thread::scope(|scope| {
                let threads: Vec<_> = (0..THREADS.min(length.div_ceil(READ_BYTES))).map(|_| scope.spawn(work)).collect();
                let ended = threads.into_iter().map(|t| t.join().map_err(|_| Error::invariant("a reading thread panicked")));
                ended.collect::<Vec<_>>().into_iter().try_for_each(|end| end?.map_err(failed))
            })?;
        }
        let from = skip + (range.start - start) as usize;
        let bytes = self.buffer.get(from..from + (range.end - range.start) as usize);
        bytes.filter(|_| range.end <= opened.bytes).ok_or_else(|| {
            Error::data("the weight file became shorter").at(path).expected(format!("at least {} bytes", range.end)).found(opened.bytes)
        })
    }
}

/// Fills `piece` up to `wanted` bytes; a direct read may bring more, up to the piece's aligned end.
pub(super) fn read_piece(file: &File, offset: u64, piece: &mut [u8], wanted: usize) -> io::Result<()> {
    let mut done = 0;
    while done < wanted {
        match file.read_at(piece.get_mut(done..).unwrap_or_default(), offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    /// A file of so many bytes on this disk, and its content.
    pub fn file_of(bytes: u64) -> (tempfile::NamedTempFile, Vec<u8>) {
        let temp = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let content: Vec<u8> = (0..bytes).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7]).collect();
        std::fs::write(temp.path(), &content).unwrap();
        (temp, content)
    }

    #[test]
    fn any_range_comes_back_direct_or_not() {
        let (temp, content) = file_of(9_000_001);
        for direct_bytes_min in [0, u64::MAX] {
            let mut reader = DirectReader::new(direct_bytes_min);
            for range in [0..1, 5..5, 4095..4097, 4_194_304..4_194_305, 1..9_000_001, 8_999_999..9_000_001, 100..8_000_000] {
                let (start, end) = (range.start as usize, range.end as usize);
                assert!(reader.read(temp.path(), &range).unwrap() == &content[start..end], "{range:?}");
            }
            assert_eq!(reader.read(temp.path(), &(0..9_000_002)).unwrap_err().exit_code(), 65);
        }
        assert_eq!(DirectReader::new(0).read(Path::new("/nowhere"), &(0..1)).unwrap_err().exit_code(), 69);
    }
}
