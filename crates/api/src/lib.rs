//! The words of the daemon's HTTP API, `/v1`: what is asked, what is answered, and how it is
//! refused. Server and clients have them from here, so that they cannot disagree; nothing here
//! does anything.
//!
//! Times are seconds since 1970 with fractions, where nothing else is said. What is answered may
//! get more fields: whoever reads it must not mind.

mod access;
mod event;
mod file;
mod problem;
mod process;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
#[cfg(feature = "openapi")]
use utoipa::ToSchema;
use uuid::Uuid;

pub use access::{Key, Keys, MadeKey, NewKey, NewToken, Scope, Token, Whoami};
pub use event::Event;
pub use file::{
    Change, ChangeKind, Entry, Folder, UPLOAD_OFFSET, Upload, UploadPlace, escape_path,
};
pub use problem::{CONTENT_TYPE as PROBLEM, Code, Problem};
pub use process::{
    Command, Ended, NewProcess, Output, OutputStream, Process, Processes, Signal, Size, Started,
};

/// Request header by which a creation that is asked for again is not done again.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// Text as a part of a URI: all but unreserved characters (RFC 3986, 2.3) are escaped.
pub fn escape(text: &str) -> String {
    escape_but(text.as_bytes(), b"")
}

fn escape_but(bytes: &[u8], others: &[u8]) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~".contains(byte);
    let plain = |byte: &u8| plain(byte) || others.contains(byte);
    let escaped = |byte: &u8| match byte {
        byte if plain(byte) => char::from(*byte).to_string(),
        byte => format!("%{byte:02X}"),
    };
    bytes.iter().map(escaped).collect()
}

/// A session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Session {
    /// Its UUID.
    pub id: Uuid,
    /// Its name, if it was given one.
    pub name: Option<String>,
    /// How far it is kept from its host: `host` or `sandbox`.
    pub isolation: String,
    /// The image that its root is, if it is one; told of one session only, not in a list.
    pub image: Option<String>,
    /// `creating`, `active`, `frozen`, `stopped`, `restoring`, `pruning`, `archived`, `missing`
    /// or `removing`.
    pub state: String,
    /// What is being done for it right now.
    pub operation: Option<String>,
    /// Whether somebody uses it.
    pub in_use: bool,
    /// How many callers are in line for it.
    pub waiting: usize,
    /// When it was made.
    pub created_at: f64,
    /// When it was last given back, as far as it is known.
    pub last_used: f64,
    /// Whether there may be changes that no verified backup holds.
    pub unsaved: bool,
    /// What has changed since then is in no verified backup. None if all is saved, or where it is
    /// not known.
    pub unsaved_since: Option<f64>,
    /// The latest verified backup.
    pub backup: Option<String>,
    /// When that was taken. Not known, as the two below, until this daemon has written or
    /// restored one.
    pub backup_taken_at: Option<f64>,
    /// Bytes of the content of its files, if it is in a repository.
    pub backup_size: Option<u64>,
    /// Bytes by which the destination has grown with it.
    pub backup_added: Option<u64>,
    /// When the next backup is due, if the session is left alone until then.
    pub backup_due_at: Option<f64>,
    /// Why the last backup failed, if none was written since.
    pub backup_failure: Option<String>,
    /// When it failed.
    pub backup_failed_at: Option<f64>,
    /// How often in a row housekeeping has failed for it.
    pub failures: u32,
    /// Why, the last time.
    pub last_failure: Option<String>,
    /// When it is tried again.
    pub retry_at: Option<f64>,
    /// What it uses besides the disk, while it runs; told where sessions are listed or inspected.
    pub usage: Option<Usage>,
    /// Bytes of the disk that it used when this was last measured, which is done where it is
    /// limited.
    pub disk_used: Option<u64>,
    /// Bytes of the disk that it may use.
    pub disk_limit: Option<u64>,
    /// Its files on the daemon's machine, while they are there.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub volume: Option<PathBuf>,
}

/// What a running session uses. None is what cannot be measured here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Usage {
    /// Bytes of memory. By control groups, with what the kernel keeps of its files, as its limit
    /// counts them; else what its processes have in memory, and what several share counts for each.
    pub memory_bytes: Option<u64>,
    /// Microseconds of processor time since it was last started.
    pub cpu_microseconds: Option<u64>,
    /// Its processes, without those that only hold it together. While an agent serves its files
    /// from within, that is one.
    pub processes: Option<u64>,
}

/// A part of a list of sessions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Sessions {
    /// In the order of their UUIDs.
    pub sessions: Vec<Session>,
    /// Ask with this as `after` for the next part. None at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Uuid>,
}

/// What a session is to be made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct NewSession {
    /// The name it gets; none is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its root: an image's name. The daemon's setting, if none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}

/// A backup that can be restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Backup {
    /// What it is asked for by.
    pub name: String,
    /// The session that it holds.
    pub session: Uuid,
    /// The session's name when it was taken, where that is kept.
    pub session_name: Option<String>,
    /// The host that wrote it, where that is kept.
    pub host: Option<String>,
    /// When it was taken (RFC 3339).
    pub taken_at: String,
    /// `archive` or `repository`.
    pub format: String,
    /// Bytes by which the destination has grown with it.
    pub bytes: u64,
    /// Bytes of the content of its files, where that is kept.
    pub size: Option<u64>,
    /// The file that it is, if it is one.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub path: Option<PathBuf>,
}

/// What a check of the backups has found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct BackupReport {
    /// Backups that were looked at.
    pub backups: u64,
    /// Bytes that were read back.
    pub bytes: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

/// Something in a backup destination that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Finding {
    /// The backup that cannot be restored for it; none if it belongs to no backup.
    pub backup: Option<String>,
    /// Whose it is.
    pub session: Option<Uuid>,
    /// What is wrong.
    pub problem: String,
    /// The newest backup of that session that is sound.
    pub instead: Option<String>,
}

/// Which backups of each session are kept: those that any of the rules keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// The newest ones.
    pub keep_last: u32,
    /// Of so many hours.
    pub keep_hourly: u32,
    /// Of so many days.
    pub keep_daily: u32,
    /// Of so many weeks.
    pub keep_weekly: u32,
    /// Of so many months.
    pub keep_monthly: u32,
    /// Of so many years.
    pub keep_yearly: u32,
}

/// Which backups are to be deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Forget {
    /// Only tell which they are.
    #[serde(default)]
    pub dry_run: bool,
    /// What is kept; the daemon's setting, if none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
}

/// Which of a session's files are put back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Restore {
    /// These files and folders, as the session sees them, and no others; relative ones begin where
    /// commands start. A folder is then as it was, without what has been added to it.
    pub paths: Vec<String>,
}

/// An image: a root for new sessions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Image {
    /// Its name.
    pub name: String,
    /// Of its manifest.
    pub digest: String,
    /// How many layers it has.
    pub layers: usize,
}

/// Which image to bring, and from where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum BringImage {
    /// From a registry.
    Pull {
        /// Which, as Docker has it: `debian:12`, `ghcr.io/owner/name@sha256:…`.
        reference: String,
        /// As whom; as Docker of the daemon's user would, if nobody is named.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user: Option<String>,
        /// By which password.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        password: Option<String>,
        /// Files of certificates to trust besides the system's, on the daemon's machine.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        #[cfg_attr(feature = "openapi", schema(value_type = Vec<String>))]
        certificates: Vec<PathBuf>,
    },
    /// From a file or folder of the daemon's machine.
    Import {
        /// An OCI layout or an archive, of OCI or of `docker save`.
        #[cfg_attr(feature = "openapi", schema(value_type = String))]
        path: PathBuf,
        /// The name it gets.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
        /// Which one, if there are several.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        image: Option<String>,
    },
}

/// A line of the answer to [`BringImage`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(untagged)]
pub enum Bringing {
    /// The last: it is here.
    Image {
        /// The image.
        image: Image,
    },
    /// The last: it is not.
    Error {
        /// Why.
        error: Problem,
    },
    /// How far it is.
    Step {
        /// `fetching`, `unpacking` or `done`.
        stage: String,
        /// Which layer, from 1.
        layer: usize,
        /// Of so many.
        layers: usize,
        /// Bytes that are done.
        bytes: u64,
        /// Of so many, if that is known.
        total: Option<u64>,
    },
}

/// A session's files as they once were, on the same disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Snapshot {
    /// Its name; each session has its own.
    pub name: String,
    /// When it was taken.
    pub taken_at: f64,
}

/// Something that two states do not have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Difference {
    /// `added`, `removed` or `changed`.
    pub change: String,
    /// `volume`, or `root` for what was changed in the session's root.
    pub tree: String,
    /// Where in it.
    pub path: String,
    /// What is another; of what is changed only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aspects: Vec<String>,
    /// What was there.
    pub before: Option<Node>,
    /// What is there.
    pub after: Option<Node>,
}

/// A file, folder or whatever else is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Node {
    /// `file`, `folder`, `symlink`, ….
    pub kind: String,
    /// Bytes of its content.
    pub size: u64,
    /// Its permissions, in octal digits.
    pub mode: String,
    /// Its owner.
    pub user: u64,
    /// Its owner's group.
    pub group: u64,
}

/// The daemon itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Health {
    /// Its version.
    pub version: String,
    /// Its process.
    pub pid: u32,
}

/// Names and values of an environment.
pub type Environment = BTreeMap<String, String>;
