//! One launcher for an output folder: an advisory lock on `.lock` in it, which the kernel drops with the process.
#![forbid(unsafe_code)]

use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::path::Path;

use serenity_protocol::{Error, Result};

/// Locks `output_dir`, making it if need be. Dropping the file releases it.
///
/// # Errors
/// [`Error::Absent`] naming the process that holds it.
pub fn acquire(output_dir: &Path) -> Result<File> {
    let path = output_dir.join(".lock");
    let failed = |e| Error::io("cannot lock the output folder", &path, e);
    std::fs::create_dir_all(output_dir).map_err(failed)?;
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Only for the message.
            let _ = file.read_to_string(&mut holder);
            return Err(Error::absent("another serenity-launch works in this output folder")
                .at(&path)
                .found(format!("process {}", holder.trim()))
                .advice("wait for it, stop it, or choose another output_dir"));
        }
        Err(TryLockError::Error(e)) => return Err(failed(e)),
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(failed)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn the_second_is_told_who_holds_it_and_the_third_gets_it() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("out");
        let first = acquire(&dir).unwrap();
        let error = acquire(&dir).unwrap_err();
        assert_eq!(error.exit_code(), 69);
        assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
        drop(first);
        acquire(&dir).unwrap();
    }
}
