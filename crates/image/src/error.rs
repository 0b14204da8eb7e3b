//! What can go wrong with an image, told with what it went wrong on and what to do.

use std::io;
use std::path::{Path, PathBuf};

/// Why an image was not pulled, imported, listed or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text does not name an image.
    #[error("{text:?} is no image reference: {reason}; write it like debian:12")]
    Reference {
        /// What was given, cut to a readable length.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// There is no such image where it was looked for.
    #[error("{what} is not there: {hint}")]
    NotFound {
        /// The image, or the part of it.
        what: String,
        /// What to look at.
        hint: &'static str,
    },
    /// The registry wants other credentials, or does not let these see the image.
    #[error(
        "the registry {registry} does not let us have {repository}: give a user and a password \
         that may pull it (a private image looks the same as a missing one)"
    )]
    Unauthorized {
        /// The registry's host.
        registry: String,
        /// The repository in it.
        repository: String,
    },
    /// The registry answered with an error.
    #[error("{url} answered {status}{}: try again later, or ask who runs it", colon(detail))]
    Registry {
        /// What was asked for.
        url: String,
        /// The HTTP status.
        status: u16,
        /// What the answer said, cut to a readable length.
        detail: String,
    },
    /// The registry could not be reached, or the connection broke.
    #[error("no connection with {host}: check the network, the name and any proxy")]
    Network {
        /// The registry's host.
        host: String,
        /// What broke.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Credentials could not be read.
    #[error("no credentials from {}: {detail}", path.display())]
    Credentials {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A manifest, a configuration or an index is not what it should be.
    #[error("{what} is malformed: {detail}; the image has to be built again")]
    Malformed {
        /// The document.
        what: String,
        /// What was found.
        detail: String,
    },
    /// Something larger than the caller's [`Limits`](crate::Limits) allow.
    #[error("{what} is over the limit of {limit} {unit}: raise the limit if you trust the image")]
    TooLarge {
        /// What is too large.
        what: String,
        /// The limit.
        limit: u64,
        /// What the limit counts.
        unit: &'static str,
    },
    /// Bytes are not those that were named.
    #[error("{what} has the digest {found}, not {expected}: it was altered on the way; try again")]
    Digest {
        /// What was checked.
        what: String,
        /// The digest that was named.
        expected: String,
        /// That of the bytes.
        found: String,
    },
    /// The image is not made for this machine.
    #[error("{what} has nothing for {wanted}, only for {available}")]
    Platform {
        /// The image.
        what: String,
        /// The system and architecture looked for.
        wanted: String,
        /// What there is.
        available: String,
    },
    /// A kind of image, or of layer, that this crate does not read.
    #[error("{what} cannot be used: {detail}")]
    Unsupported {
        /// The document or layer.
        what: String,
        /// What it is, and what to do.
        detail: &'static str,
    },
    /// A layer holds an entry that would be unsafe to make, or that is not understood.
    #[error("{what} is refused: entry {entry:?} {reason}")]
    Refused {
        /// The layer or archive.
        what: String,
        /// The entry's name, shown as text.
        entry: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A layer or an archive is cut short, altered, or no archive.
    #[error("{what} is damaged: {detail}; get it again")]
    Damaged {
        /// The layer or archive.
        what: String,
        /// What was found.
        detail: String,
    },
    /// The owners asked for cannot be.
    #[error("these owners cannot be used: {reason}")]
    Owners {
        /// Why.
        reason: &'static str,
    },
    /// The file system cannot hold what layers are made of.
    #[error("the file system of {} cannot hold image layers: {reason}", path.display())]
    FileSystem {
        /// What it was tried on.
        path: PathBuf,
        /// What it cannot do.
        reason: &'static str,
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
    /// The caller asked to stop. Nothing was kept but whole layers.
    #[error("stopped on request while working on {what}")]
    Cancelled {
        /// The layer.
        what: String,
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

/// What [`Error`] says instead of a value.
pub type Result<T, E = Error> = std::result::Result<T, E>;

fn colon(detail: &str) -> String {
    if detail.is_empty() { String::new() } else { format!(" ({detail})") }
}

/// Text of somebody else's, as much of it as belongs in a message: it may be on its way to a
/// terminal.
pub(crate) fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]);
    text.replace(char::is_control, "\u{fffd}")
}

impl Error {
    /// Sorts an error of the system into the kinds a caller treats differently.
    pub(crate) fn io(action: &'static str, path: &Path, error: impl Into<io::Error>) -> Self {
        let source = error.into();
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { path },
            io::ErrorKind::PermissionDenied => Self::Denied { action, path },
            _ => Self::Io { action, path, source },
        }
    }

    pub(crate) fn damaged(what: &str, detail: impl Into<String>) -> Self {
        Self::Damaged { what: what.to_owned(), detail: detail.into() }
    }

    pub(crate) fn malformed(what: &str, detail: impl Into<String>) -> Self {
        Self::Malformed { what: what.to_owned(), detail: detail.into() }
    }

    pub(crate) fn refused(what: &str, entry: &[u8], reason: &'static str) -> Self {
        Self::Refused { what: what.to_owned(), entry: shown(entry), reason }
    }

    pub(crate) fn too_large(what: &str, limit: u64, unit: &'static str) -> Self {
        Self::TooLarge { what: what.to_owned(), limit, unit }
    }

    /// What the reading of `what` met. An error of ours that passed through a reader comes
    /// out again as it was; a decoder's complaint is damage.
    pub(crate) fn reading(what: &str, error: io::Error) -> Self {
        match error.downcast::<Self>() {
            Ok(ours) => ours,
            Err(error) => Self::damaged(what, error.to_string()),
        }
    }
}
