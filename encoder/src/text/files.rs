//! Weight files as a reading thread has them open.
//!
//! What lies in the page cache (or in a memory file system) is read from there; what does not is read past it, because 33 GB that are read once
//! would push out everything else.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serenity_protocol::{Error, Result};

use super::direct::{ALIGN, DIRECT_FILE_BYTES_MIN, read_piece};

/// `statfs` type of a file system in memory.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// A weight file, open for reads through the page cache and past it.
struct Opened {
    cached: File,
    /// `None` where the cache is as good: small files, file systems in memory, those without direct reads.
    direct: Option<File>,
    bytes: u64,
}

/// The files of a reading thread.
#[derive(Default)]
pub(super) struct Files {
    open: HashMap<PathBuf, Opened>,
    aligned: Vec<u8>,
}

impl Files {
    fn open(path: &Path) -> io::Result<Opened> {
        let cached = File::open(path)?;
        let bytes = cached.metadata()?.len();
        let in_memory = rustix::fs::fstatfs(&cached).is_ok_and(|s| u64::try_from(s.f_type).is_ok_and(|t| t == TMPFS_MAGIC));
        let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let direct = (!in_memory && bytes >= DIRECT_FILE_BYTES_MIN).then(|| File::options().read(true).custom_flags(flags).open(path).ok());
        Ok(Opened { cached, direct: direct.flatten(), bytes })
    }

    /// Fills `to` with the bytes at `start`.
    ///
    /// # Errors
    /// Of the system; [`Error::Data`] if the file has become shorter.
    pub fn read(&mut self, path: &Path, start: u64, to: &mut [u8]) -> Result<()> {
        if !self.open.contains_key(path) {
            let opened = Self::open(path).map_err(|e| Error::io("cannot open the weight file", path, e))?;
            self.open.insert(path.to_path_buf(), opened);
        }
        let opened = self.open.get(path).ok_or_else(|| Error::invariant("a file was opened and is not there"))?;
        let end = start + to.len() as u64;
        if end > opened.bytes {
            return Err(Error::data("the weight file became shorter")
                .at(path)
                .expected(format!("at least {end} bytes"))
                .found(opened.bytes));
        }
        let failed = |e| Error::io("cannot read the weights", path, e).offset(start);
        let Some(direct) = &opened.direct else { return opened.cached.read_exact_at(to, start).map_err(failed) };
        let done = read_cached(&opened.cached, start, to);
        let rest = to.get_mut(done..).unwrap_or_default();
        read_direct(direct, start + done as u64, rest, &mut self.aligned, opened.bytes).map_err(failed)
    }
}

/// Reads what the page cache has from `start` on without a gap; how many bytes that were.
fn read_cached(file: &File, start: u64, to: &mut [u8]) -> usize {
    let mut done = 0;
    while done < to.len() {
        let rest = to.get_mut(done..).unwrap_or_default();
        match rustix::io::preadv2(file, &mut [IoSliceMut::new(rest)], start + done as u64, rustix::io::ReadWriteFlags::NOWAIT) {
            Ok(n) if n > 0 => done += n,
            _ => break,
        }
    }
    done
}

/// Reads past the page cache, through an aligned buffer.
fn read_direct(file: &File, start: u64, to: &mut [u8], aligned: &mut Vec<u8>, file_bytes: u64) -> io::Result<()> {
    if to.is_empty() {
        return Ok(());
    }
    let from = start / ALIGN as u64 * ALIGN as u64;
    let skip = (start - from) as usize;
    let length = (skip + to.len()).next_multiple_of(ALIGN);
    if aligned.len() < length + ALIGN {
        aligned.resize(length + ALIGN, 0);
    }
    let offset = aligned.as_ptr().align_offset(ALIGN).min(ALIGN);
    let space = aligned.get_mut(offset..offset + length).unwrap_or_default();
    let wanted = length.min(file_bytes.saturating_sub(from) as usize);
    read_piece(file, from, space, wanted)?;
    let source = space.get(skip..skip + to.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
    to.copy_from_slice(source);
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::text::direct::tests::file_of;

    #[test]
    fn any_part_of_a_file_comes_back_cached_or_not() {
        let (temp, content) = file_of(300_001);
        let cached = File::open(temp.path()).unwrap();
        let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        for range in [0..1, 4095..4097, 1..300_001, 299_999..300_001, 100..250_000, 8192..12_288] {
            let mut to = vec![0u8; range.len()];
            let done = read_cached(&cached, range.start as u64, &mut to);
            assert_eq!(to[..done], content[range.start..range.start + done]);
            if let Ok(direct) = File::options().read(true).custom_flags(flags).open(temp.path()) {
                to.fill(0);
                read_direct(&direct, range.start as u64, &mut to, &mut Vec::new(), content.len() as u64).unwrap();
                assert!(to == content[range.clone()], "{range:?}");
            }
            to.fill(0);
            Files::default().read(temp.path(), range.start as u64, &mut to).unwrap();
            assert!(to == content[range.clone()], "{range:?}");
        }
        assert_eq!(Files::default().read(temp.path(), 300_000, &mut [0; 2]).unwrap_err().exit_code(), 65);
        assert_eq!(Files::default().read(Path::new("/nowhere"), 0, &mut [0; 2]).unwrap_err().exit_code(), 69);
    }
}
