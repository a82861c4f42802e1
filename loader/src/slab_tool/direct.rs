//! Reads past the page cache: 64 GB that are looked at once leave no trace in memory.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::reader::{ALIGN, AlignedBuffer};

/// An open file whose parts are read with O_DIRECT where the file system has it, and otherwise through the page cache.
pub struct DirectFile {
    path: PathBuf,
    file: File,
    direct: bool,
}

impl DirectFile {
    /// Opens the file.
    ///
    /// # Errors
    /// The operating system's.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let direct = File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(path);
        // The file system has no direct reads; or the error is one that comes back.
        let (file, direct) = match direct {
            Ok(file) => (file, true),
            Err(_) => (File::open(path)?, false),
        };
        Ok(Self { path: path.to_path_buf(), file, direct })
    }

    /// Whether reads go past the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Reads `range`, widened to multiples of [`ALIGN`] as direct reads must be; returns where in the buffer it is.
    ///
    /// # Errors
    /// The operating system's; `UnexpectedEof` where the file ends before the range does.
    pub fn read(&mut self, range: &Range<u64>, buffer: &mut AlignedBuffer) -> std::io::Result<Range<usize>> {
        match read_wide(&self.file, range, buffer) {
            Err(e) if self.direct && e.raw_os_error() == Some(nix::libc::EINVAL) => {
                // Some stacked file systems accept the flag and refuse the read: through the page cache from now on.
                (self.file, self.direct) = (File::open(&self.path)?, false);
                read_wide(&self.file, range, buffer)
            }
            read => read,
        }
    }
}

fn read_wide(file: &File, piece: &Range<u64>, buffer: &mut AlignedBuffer) -> std::io::Result<Range<usize>> {
    let align = ALIGN as u64;
    let (first, end) = (piece.start / align * align, piece.end.next_multiple_of(align));
    let (wanted, needed) = ((end - first) as usize, (piece.end - first) as usize);
    let into = buffer.resize(wanted);
    let mut at = 0;
    // The end of the file may lie before the last multiple.
    while at < needed {
        match file.read_at(into.get_mut(at..wanted).unwrap_or_default(), first + at as u64) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            // A direct read that stops off an aligned place has reached the end of the file.
            Ok(count) => at += count,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok((piece.start - first) as usize..needed)
}
