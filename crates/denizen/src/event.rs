//! What happens to sessions, for whoever listens.

use std::time::SystemTime;

use serde::Serialize;
use tokio::sync::broadcast;
use uuid::Uuid;

use crate::lifecycle::Op;

/// Events kept for a listener that is behind.
const BACKLOG: usize = 1024;

/// One step in a session's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    /// When, by the wall clock, in seconds and fractions since 1970.
    #[serde(serialize_with = "unix_seconds")]
    pub at: SystemTime,
    /// Whose.
    pub session: Uuid,
    /// Its name, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened to a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum EventKind {
    /// Its volume was made and bootstrapped.
    Created,
    /// It can run commands.
    Started,
    /// Nothing runs in it any more.
    Stopped,
    /// What runs in it stands still.
    Frozen,
    /// What runs in it goes on.
    Thawed,
    /// It has been idle, but processes run in it, which counts as use.
    StillRunning,
    /// A verified backup was written.
    BackedUp {
        /// The backup.
        backup: String,
    },
    /// Its volume was put back from a backup.
    Restored {
        /// The backup.
        backup: String,
    },
    /// Files and folders of it were put back; the others stayed as they were.
    PartRestored {
        /// The backup that they are of, if it was one.
        #[serde(skip_serializing_if = "Option::is_none")]
        backup: Option<String>,
        /// The snapshot that they are of, if it was one.
        #[serde(skip_serializing_if = "Option::is_none")]
        snapshot: Option<String>,
        /// Where they are, in the session.
        paths: Vec<String>,
    },
    /// How far a backup, a restore or a check of all backups (of the session with the id zero) is
    /// that takes a while: told about twice a second.
    Progress {
        /// `backup`, `restore` or `verify`.
        operation: &'static str,
        /// Bytes that are done.
        bytes: u64,
        /// Files that are done.
        files: u64,
        /// Bytes that there are in all, as far as can be guessed.
        #[serde(skip_serializing_if = "Option::is_none")]
        total: Option<u64>,
        /// Bytes a second, so far.
        bytes_per_second: u64,
        /// Seconds until it is done, if it goes on like this.
        #[serde(skip_serializing_if = "Option::is_none")]
        seconds_left: Option<u64>,
    },
    /// A backup of it was deleted, by the pool's retention or at the user's wish.
    Forgotten {
        /// The backup.
        backup: String,
    },
    /// A snapshot of it was taken.
    SnapshotTaken {
        /// The snapshot.
        snapshot: String,
    },
    /// It was put back as a snapshot has it.
    SnapshotRestored {
        /// The snapshot.
        snapshot: String,
    },
    /// Its local files were deleted; a backup holds them.
    Archived,
    /// Its local files were deleted, and no backup holds them.
    Deleted,
    /// It was removed at the user's wish.
    Removed,
    /// A volume that nobody knew of was found and taken in.
    Adopted,
    /// It was known by its backups alone, and is archived here now.
    Recovered,
    /// Its volume has vanished, though denizen did not delete it.
    Missing,
    /// Something done for it failed.
    Failed {
        /// What.
        operation: &'static str,
        /// Why.
        error: String,
        /// When it is tried again, if it is.
        #[serde(skip_serializing_if = "Option::is_none", serialize_with = "maybe_unix_seconds")]
        retry_at: Option<SystemTime>,
    },
    /// The session was refused something of the network.
    Denied {
        /// What it wanted to reach, as it spelled it.
        host: String,
        /// At which port; 0 if that could not be read.
        port: u16,
        /// What refused it.
        rule: String,
    },
    /// What ran in it when it fell asleep could not go on: its machine has booted.
    Rebooted {
        /// Why.
        reason: String,
    },
    /// It was over a limit as a whole, and what ran in it was ended; it can go on, below.
    LimitReached {
        /// Of what: `disk`.
        resource: &'static str,
        /// Bytes that it uses now.
        used: u64,
        /// Bytes that it may use.
        limit: u64,
    },
    /// The listener was too slow: this many events before this one are lost to it.
    Lagged {
        /// How many.
        missed: u64,
    },
}

/// A stream of [`Event`]s from the moment it was asked for.
#[derive(Debug)]
pub struct Events(broadcast::Receiver<Event>);

impl Events {
    /// The next event; none once the pool is gone. Cancel-safe: a dropped call loses nothing.
    pub async fn next(&mut self) -> Option<Event> {
        match self.0.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Closed) => None,
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(Event {
                at: SystemTime::now(),
                session: Uuid::nil(),
                name: None,
                kind: EventKind::Lagged { missed },
            }),
        }
    }
}

/// The sending end.
#[derive(Clone, Debug)]
pub(crate) struct Announcer(broadcast::Sender<Event>);

impl Announcer {
    pub(crate) fn new() -> Self {
        Self(broadcast::Sender::new(BACKLOG))
    }

    pub(crate) fn announce(&self, event: Event) {
        // Nobody listening is fine.
        let _ = self.0.send(event);
    }

    pub(crate) fn listen(&self) -> Events {
        Events(self.0.subscribe())
    }
}

/// The word for an operation wherever people read it.
pub(crate) fn op_name(op: &Op) -> &'static str {
    match op {
        Op::Create { .. } => "create",
        Op::Start => "start",
        Op::Stop { .. } => "stop",
        Op::Freeze { .. } => "freeze",
        Op::Thaw => "thaw",
        Op::Backup => "backup",
        Op::Prune => "prune",
        Op::Restore(_) => "restore",
        Op::Copy(_) => "copy",
        Op::Remove => "remove",
    }
}

/// Seconds since 1970, as a number with milliseconds.
pub(crate) fn unix_seconds<S: serde::Serializer>(
    at: &SystemTime,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    #[allow(clippy::cast_precision_loss)] // Exact for the next 280,000 years.
    serializer.serialize_f64(since.as_millis() as f64 / 1000.0)
}

pub(crate) fn maybe_unix_seconds<S: serde::Serializer>(
    at: &Option<SystemTime>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match at {
        Some(at) => unix_seconds(at, serializer),
        None => serializer.serialize_none(),
    }
}
