//! The one error type that crosses crate borders, and the exit code that each kind becomes.
//!
//! Every message answers five questions: what is wrong, where (file and offset), what was expected, what was found, and what
//! to do about it. [`Detail`] has a field for each so that a caller cannot forget the format; the kind decides the exit code
//! (`sysexits.h` numbers, listed in the README) and with it whether the launcher restarts the process: never after
//! [`Error::Config`] or [`Error::Data`], which would fail again in the same way, nor after another that is [`Error::lasting`].

use std::fmt;
use std::path::{Path, PathBuf};

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, by what the caller of the process should do about it. Boxed, so that a `Result` costs a pointer where all is well.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration or the command line is wrong (exit 64). A restart cannot help.
    #[error("{0}")]
    Config(Box<Detail>),
    /// A file's content is wrong: corrupt slab, cache entry, checkpoint (exit 65). A restart cannot help.
    #[error("{0}")]
    Data(Box<Detail>),
    /// Something needed is missing, or held by another process (exit 69).
    #[error("{0}")]
    Absent(Box<Detail>),
    /// An invariant of the program broke (exit 70): a defect, never the user's fault.
    #[error("{0}")]
    Invariant(Box<Detail>),
    /// The same command may succeed later: disk full, interrupted (exit 75).
    #[error("{0}")]
    TryAgain(Box<Detail>),
}

/// What, where, expected, found, what to do. Built with the `Error::config("…")` family and the chained setters of [`Error`].
#[derive(Debug, Default)]
pub struct Detail {
    what: String,
    path: Option<PathBuf>,
    offset: Option<u64>,
    expected: Option<String>,
    found: Option<String>,
    advice: Option<String>,
    cause: Option<String>,
    lasting: bool,
}

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        if let Some(path) = &self.path {
            write!(f, "\n  where:    {}", path.display())?;
            if let Some(offset) = self.offset {
                write!(f, ", byte offset {offset}")?;
            }
        }
        for (label, text) in [("expected", &self.expected), ("found", &self.found), ("cause", &self.cause), ("to do", &self.advice)] {
            if let Some(text) = text {
                write!(f, "\n  {:<9} {text}", format!("{label}:"))?;
            }
        }
        Ok(())
    }
}

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $variant:ident),* $(,)?) => {$(
        $(#[$doc])*
        pub fn $name(what: impl Into<String>) -> Self {
            Error::$variant(Box::new(Detail { what: what.into(), ..Detail::default() }))
        }
    )*};
}

impl Error {
    constructors! {
        /// A wrong configuration or command line, exit 64.
        config => Config,
        /// Wrong file content, exit 65.
        data => Data,
        /// Missing or busy, exit 69.
        absent => Absent,
        /// A broken invariant, exit 70.
        invariant => Invariant,
        /// Temporary, exit 75.
        try_again => TryAgain,
    }

    fn detail(&mut self) -> &mut Detail {
        match self {
            Error::Config(d) | Error::Data(d) | Error::Absent(d) | Error::Invariant(d) | Error::TryAgain(d) => d,
        }
    }

    /// The file that it is about.
    #[must_use]
    pub fn at(mut self, path: impl AsRef<Path>) -> Self {
        self.detail().path = Some(path.as_ref().to_path_buf());
        self
    }

    /// The byte offset in that file.
    #[must_use]
    pub fn offset(mut self, offset: u64) -> Self {
        self.detail().offset = Some(offset);
        self
    }

    /// What should have been there.
    #[must_use]
    pub fn expected(mut self, text: impl fmt::Display) -> Self {
        self.detail().expected = Some(text.to_string());
        self
    }

    /// What was there.
    #[must_use]
    pub fn found(mut self, text: impl fmt::Display) -> Self {
        self.detail().found = Some(text.to_string());
        self
    }

    /// What the user can do.
    #[must_use]
    pub fn advice(mut self, text: impl Into<String>) -> Self {
        self.detail().advice = Some(text.into());
        self
    }

    /// What the user can do besides what was said already.
    #[must_use]
    pub fn or_advice(mut self, text: impl AsRef<str>) -> Self {
        let detail = self.detail();
        detail.advice = Some(match detail.advice.take() {
            Some(first) => format!("{first}; or {}", text.as_ref()),
            None => text.as_ref().to_string(),
        });
        self
    }

    /// That a restart cannot help, where the kind does not say so: a driver that is not installed, as against a file that another process holds.
    #[must_use]
    pub fn lasting(mut self) -> Self {
        self.detail().lasting = true;
        self
    }

    /// Whether the same would happen again at once.
    #[must_use]
    pub fn is_lasting(&self) -> bool {
        match self {
            Error::Config(_) | Error::Data(_) => true,
            Error::Absent(d) | Error::Invariant(d) | Error::TryAgain(d) => d.lasting,
        }
    }

    /// The error underneath, if any.
    #[must_use]
    pub fn cause(mut self, cause: impl fmt::Display) -> Self {
        self.detail().cause = Some(cause.to_string());
        self
    }

    /// The documented exit code: 64 configuration, 65 data, 69 absent or busy, 70 invariant, 75 try again.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Config(_) => 64,
            Error::Data(_) => 65,
            Error::Absent(_) => 69,
            Error::Invariant(_) => 70,
            Error::TryAgain(_) => 75,
        }
    }

    /// An I/O failure on `path` while doing `what`: disk full, quota and interruption are [`Error::TryAgain`], a missing file or
    /// permission is [`Error::Absent`], a short read or an I/O error of the device is [`Error::Data`].
    pub fn io(what: impl Into<String>, path: impl AsRef<Path>, error: std::io::Error) -> Self {
        use std::io::ErrorKind as K;
        let what = what.into();
        let made = match error.kind() {
            K::StorageFull | K::QuotaExceeded | K::FileTooLarge | K::Interrupted | K::OutOfMemory => {
                Error::try_again(what).advice("free some space (or memory) and run the same command again: finished work is kept")
            }
            K::UnexpectedEof | K::InvalidData => Error::data(what),
            K::NotFound => Error::absent(what).advice("check the path"),
            K::PermissionDenied => Error::absent(what).advice("check the permissions of the file and its folder"),
            _ if error.raw_os_error() == Some(5) => Error::data(what).advice("the device reports an I/O error: check the disk"),
            _ => Error::absent(what),
        };
        made.at(path).cause(error)
    }
}
