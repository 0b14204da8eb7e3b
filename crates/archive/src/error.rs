//! What can go wrong with an archive, told with the path it went wrong on and what to do.

use std::io;
use std::path::{Path, PathBuf};

/// Why an archive was not written, checked, listed or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The volume to back up is not there, or is no directory.
    #[error(
        "no volume directory at {}: it was removed, or replaced by something else",
        path.display()
    )]
    VolumeMissing {
        /// The volume's path.
        path: PathBuf,
    },
    /// The folder for the archives is not there.
    #[error(
        "the backup destination {} is not there: mount it or make the directory, then try again",
        path.display()
    )]
    DestinationMissing {
        /// The destination's path.
        path: PathBuf,
    },
    /// The file system is full, or a quota is used up.
    #[error(
        "no space left (or the disk quota is used up) at {}: free some space, then try again",
        path.display()
    )]
    NoSpace {
        /// What could not grow.
        path: PathBuf,
    },
    /// The kernel does not permit it.
    #[error(
        "no permission to {action} {}: give this user access to it, or run as its owner or root",
        path.display()
    )]
    Denied {
        /// What was tried.
        action: &'static str,
        /// What it was tried on.
        path: PathBuf,
    },
    /// The file system is mounted read-only.
    #[error(
        "cannot {action} {}: the file system is read-only; remount it writable",
        path.display()
    )]
    ReadOnly {
        /// What was tried.
        action: &'static str,
        /// What it was tried on.
        path: PathBuf,
    },
    /// The volume was written to while it was being read. Nothing was kept; try again when
    /// it is at rest.
    #[error(
        "{} {how} while it was being read: try again when nothing writes to it",
        path.display()
    )]
    Changed {
        /// What changed.
        path: PathBuf,
        /// What happened to it.
        how: &'static str,
    },
    /// The volume holds something no archive of this kind can keep.
    #[error("{} cannot be backed up: {reason}", path.display())]
    Unsupported {
        /// What cannot be kept.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// The archive read back differs from what was written. It was removed.
    #[error(
        "the archive at {} did not read back as it was written ({detail}): check the disk",
        path.display()
    )]
    Unverified {
        /// The archive's temporary path.
        path: PathBuf,
        /// What differed.
        detail: String,
    },
    /// The archive is cut short, altered, or no archive.
    #[error("the archive {} is damaged: {detail}; use another one", path.display())]
    Damaged {
        /// The archive.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// The archive holds an entry that would be unsafe to make, or that is not understood.
    #[error("the archive {} is refused: entry {entry:?} {reason}", path.display())]
    Refused {
        /// The archive.
        path: PathBuf,
        /// The entry's name, shown as text.
        entry: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The archive holds more than may be made of it.
    #[error("the archive {} holds more than the {limit} bytes there may be", path.display())]
    TooLarge {
        /// The archive.
        path: PathBuf,
        /// How many bytes on disk it may fill.
        limit: u64,
    },
    /// The place to restore into already holds something, or is no directory.
    #[error("{} is not an empty directory: restore into a new one", path.display())]
    NotEmpty {
        /// The place.
        path: PathBuf,
    },
    /// The caller asked to stop. Nothing was kept.
    #[error("stopped on request while working on {}", path.display())]
    Cancelled {
        /// The archive or the volume.
        path: PathBuf,
    },
    /// Another archive of the session already bears the last name there can be.
    #[error(
        "no later archive name is left in {}: move away the archives of the year 9999",
        path.display()
    )]
    NoName {
        /// The destination.
        path: PathBuf,
    },
    /// Anything else the operating system reported.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// What it was tried on.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// Sorts an error of the system into the kinds a caller treats differently.
    pub(crate) fn io(action: &'static str, path: &Path, error: impl Into<io::Error>) -> Self {
        let source = error.into();
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { path },
            io::ErrorKind::PermissionDenied => Self::Denied { action, path },
            io::ErrorKind::ReadOnlyFilesystem => Self::ReadOnly { action, path },
            _ => Self::Io { action, path, source },
        }
    }

    pub(crate) fn damaged(path: &Path, detail: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_path_buf(), detail: detail.into() }
    }

    pub(crate) fn refused(path: &Path, entry: &[u8], reason: &'static str) -> Self {
        // A name may be 64 KiB of anything; an error message should stay readable.
        let shown = &entry[..entry.len().min(200)];
        Self::Refused {
            path: path.to_path_buf(),
            entry: String::from_utf8_lossy(shown).into_owned(),
            reason,
        }
    }
}
