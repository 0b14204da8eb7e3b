//! What can go wrong, in words that say what failed, on what, and what to do.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use uuid::Uuid;

pub use crate::registry::RegistryError;
pub use denizen_archive::Error as ArchiveError;

/// A result with denizen's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Any failure of the library.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration says that there is no pool.
    #[error("the pool is disabled: set `enabled` in its configuration to have sessions")]
    Disabled,

    /// [`crate::MicroVmManager::new`] was called where nothing can run its tasks.
    #[error("a pool needs a Tokio runtime: call it from within one, or enter one first")]
    NoRuntime,

    /// The pool is being shut down.
    #[error("the pool is shutting down")]
    ShuttingDown,

    /// All places are taken by sessions that may not be sent away.
    #[error(
        "the pool is at capacity ({max_vms} sessions): stop or remove a session, wait with an \
         acquire timeout, or raise max_vms{}", cause(last_failure.as_ref())
    )]
    AtCapacity {
        /// How many sessions may be resident.
        max_vms: usize,
        /// Why the last attempt to make room failed, if one did.
        last_failure: Option<String>,
    },

    /// The wait in line was longer than the pool's acquire timeout.
    #[error(
        "session {session} could not be had within {waited:?}: {}",
        if *at_capacity { "the pool is at capacity" } else { "it is in use" }
    )]
    AcquireTimeout {
        /// The session asked for.
        session: Uuid,
        /// How long the caller waited.
        waited: Duration,
        /// Whether it was a place in the pool that was waited for, not the session itself.
        at_capacity: bool,
    },

    /// Somebody holds the session, or processes run in it.
    #[error("session {session} is in use: end what runs in it, or force it to stop")]
    InUse {
        /// The session.
        session: Uuid,
    },

    /// The session is made of something else than was asked for.
    #[error(
        "session {session} is made of {}: name another one, or remove it first",
        image.as_deref().unwrap_or("no image")
    )]
    OtherImage {
        /// The session.
        session: Uuid,
        /// What it is made of, if that is an image.
        image: Option<String>,
    },

    /// There is no such session.
    #[error("there is no session {session}")]
    Unknown {
        /// What was asked for.
        session: String,
    },

    /// A session's folder has vanished though denizen did not delete it.
    #[error(
        "the volume of session {session} is gone from {}: put it back there, or {}",
        path.display(),
        match backup {
            Some(name) => format!("restore the session from its backup {name}"),
            None => "remove the session and begin anew".to_owned(),
        }
    )]
    VolumeMissing {
        /// The session.
        session: Uuid,
        /// Where its volume should be.
        path: PathBuf,
        /// The latest backup, which may be older than what was lost.
        backup: Option<String>,
    },

    /// A session has no backup, or not the one asked for.
    #[error("session {session} has no {}", match name {
        Some(name) => format!("backup {name}"),
        None => "backup".to_owned(),
    })]
    NoBackup {
        /// The session.
        session: Uuid,
        /// The backup asked for.
        name: Option<String>,
    },

    /// No backup has that name, or several have names that begin so.
    #[error("{} whose name begins with {name}", if *several {
        "there are several backups"
    } else {
        "there is no backup"
    })]
    UnknownBackup {
        /// What was asked for.
        name: String,
        /// Whether there are several.
        several: bool,
    },

    /// A backup is not deleted, as it is a session's latest, or is being restored.
    #[error(
        "the backup {name} is needed: it is the latest of session {session}, or is being \
         restored; back the session up again first, or remove it"
    )]
    BackupNeeded {
        /// The session.
        session: Uuid,
        /// The backup.
        name: String,
    },

    /// A file or folder of a session cannot be put back alone.
    #[error("cannot put {} of session {session} back: {problem}", path.display())]
    NotPutBack {
        /// The session.
        session: Uuid,
        /// Which.
        path: PathBuf,
        /// Why not.
        problem: String,
    },

    /// A session has no snapshot of that name.
    #[error("session {session} has no snapshot {name}")]
    NoSnapshot {
        /// The session.
        session: Uuid,
        /// The snapshot asked for.
        name: String,
    },

    /// A session has a snapshot of that name already.
    #[error("session {session} has a snapshot {name} already: remove it, or choose another name")]
    SnapshotExists {
        /// The session.
        session: Uuid,
        /// The name.
        name: String,
    },

    /// Backups have nowhere to go.
    #[error("the pool has no backup_destination: set one to back up and restore sessions")]
    NoDestination,

    /// There were backups at the destination, and nothing is there now.
    #[error(
        "the backup destination {place} had backups, and now there is none at all: if it has to be \
         mounted, do that; to begin anew, set another backup_destination"
    )]
    DestinationGone {
        /// The destination.
        place: String,
    },

    /// What shall be imported would take the place of a session that there is.
    #[error("there is a session {session} already: import under another name, or remove it first")]
    AlreadyExists {
        /// The session.
        session: String,
    },

    /// No session could be made of what was sent. Nothing of it is kept.
    #[error("nothing was imported: {0}")]
    NotImported(#[source] ArchiveError),

    /// What was sent to be imported did not come to its end.
    #[error("nothing was imported: what was sent broke off: {source}")]
    BrokenOff {
        /// How.
        source: io::Error,
    },

    /// A value in the configuration cannot be used.
    #[error("configuration: {field} {problem}")]
    Config {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },

    /// Not a name for a session or a snapshot.
    #[error("{name:?} cannot name a {what}: it {problem}")]
    Name {
        /// `session` or `snapshot`.
        what: &'static str,
        /// What was given.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },

    /// The volume root cannot be used.
    #[error("cannot use the volume root {}: {source}", path.display())]
    Root {
        /// The volume root.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// The volume root belongs to another user, who could change it under us.
    #[error(
        "{} belongs to user {owner}, this process runs as user {me}: run as its owner, or use \
         another volume root", path.display()
    )]
    RootOwner {
        /// The volume root or denizen's folder in it.
        path: PathBuf,
        /// Its owner's user id.
        owner: u32,
        /// Our user id.
        me: u32,
    },

    /// The registry cannot be used.
    #[error(transparent)]
    Registry(#[from] RegistryError),

    /// A session's folder could not be changed.
    #[error("cannot {action} {}: {source}", path.display())]
    Volume {
        /// What was being done.
        action: &'static str,
        /// The folder.
        path: PathBuf,
        /// What the system said; a full disk shows up here.
        source: io::Error,
    },

    /// Making a session failed in its bootstrap. Nothing of the session is kept.
    #[error(
        "the bootstrap of session {session} failed: {command} {problem}{}",
        output_tail(output)
    )]
    Bootstrap {
        /// The session.
        session: Uuid,
        /// What was run.
        command: String,
        /// How it ended, or why it could not be run.
        problem: String,
        /// The end of what it printed, on both streams.
        output: String,
    },

    /// A backup could not be written, read or listed.
    #[error(transparent)]
    Backup(#[from] ArchiveError),

    /// A backup repository could not be written, read or listed.
    #[error(transparent)]
    Repository(#[from] denizen_repository::Error),

    /// This machine, or this user on it, cannot keep sessions apart as was asked.
    #[error("isolation {isolation} is not to be had here: {problem}")]
    Isolation {
        /// The isolation asked for.
        isolation: &'static str,
        /// What is missing, and what to do.
        problem: String,
    },

    /// What a session may not reach cannot be said in this way.
    #[error("the network of session {session}: {source}")]
    Egress {
        /// The session.
        session: Uuid,
        /// What is wrong.
        source: denizen_network::InvalidRule,
    },

    /// There is no such shared folder.
    #[error("there is no shared folder {share}")]
    UnknownShare {
        /// What was asked for.
        share: Uuid,
    },

    /// There is a shared folder of that name.
    #[error("there is a shared folder {name:?} already")]
    ShareExists {
        /// The name.
        name: String,
    },

    /// A shared folder cannot go while a session has it.
    #[error("session {session} has the shared folder {share}: remove that session first")]
    ShareInUse {
        /// The folder.
        share: Uuid,
        /// One that has it.
        session: Uuid,
    },

    /// A session cannot have shared folders in this way.
    #[error("the shared folders of session {session}: {problem}")]
    Mounts {
        /// The session.
        session: Uuid,
        /// What is wrong.
        problem: String,
    },

    /// Sessions shall be frozen, and cannot be.
    #[error("sessions of isolation {isolation} cannot be frozen here: {problem}")]
    NoFreezer {
        /// The isolation asked for.
        isolation: &'static str,
        /// What is missing, and what to do.
        problem: &'static str,
    },

    /// The processes of a session could not be frozen or thawed.
    #[error("cannot {action} session {session}: {source}")]
    Freezer {
        /// `freeze` or `thaw`.
        action: &'static str,
        /// The session.
        session: Uuid,
        /// What the system said.
        source: io::Error,
    },

    /// An image could not be had or used.
    #[error(transparent)]
    Image(#[from] denizen_image::Error),

    /// A command could not be run, or its processes not be reached.
    #[error(transparent)]
    Agent(#[from] denizen_agent::Error),

    /// A task of the pool did not end as it should; a fault in denizen.
    #[error("a task of the pool ended early: {0}")]
    Task(String),

    /// The failure of one operation, told to each of the callers who waited for it.
    #[error("{0}")]
    Shared(#[source] Arc<Error>),
}

impl Error {
    pub(crate) fn config(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Config { field, problem: problem.into() }
    }

    pub(crate) fn no_image(name: &str) -> Self {
        Self::Image(denizen_image::Error::NotFound {
            what: format!("the image {name}"),
            hint: "pull or import it (`denizen image`)",
        })
    }

    pub(crate) fn root(path: &Path, source: io::Error) -> Self {
        Self::Root { path: path.to_owned(), source }
    }

    pub(crate) fn volume(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Volume { action, path: path.to_owned(), source }
    }

    /// The failure itself, where several callers share one.
    pub fn kind(&self) -> &Self {
        match self {
            Self::Shared(error) => error.kind(),
            error => error,
        }
    }
}

fn cause(failure: Option<&String>) -> impl fmt::Display {
    failure.map_or_else(String::new, |failure| format!("; room could not be made: {failure}"))
}

fn output_tail(output: &str) -> impl fmt::Display {
    if output.is_empty() { String::new() } else { format!("; its output ends with:\n{output}") }
}
