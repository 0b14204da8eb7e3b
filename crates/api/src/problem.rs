//! How a request is refused: problem details (RFC 9457) with a code that stays the same.

use std::fmt;

use serde::{Deserialize, Serialize};
#[cfg(feature = "openapi")]
use utoipa::ToSchema;

/// The content type of a [`Problem`].
pub const CONTENT_TYPE: &str = "application/problem+json";

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Problem {
    /// `urn:denizen:problem:` and the code.
    #[serde(rename = "type")]
    pub kind: String,
    /// The code in words; the same for all of its kind.
    pub title: String,
    /// The status of the answer.
    pub status: u16,
    /// What was wrong with this request, and what to do about it.
    pub detail: String,
    /// What programs go by.
    pub code: Code,
}

impl Problem {
    /// Whatever a code stands for, in detail.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self {
            kind: format!("urn:denizen:problem:{code}"),
            title: code.title().to_owned(),
            status: code.status(),
            detail: detail.into(),
            code,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl std::error::Error for Problem {}

macro_rules! codes {
    ($($(#[$doc:meta])+ $name:ident = $text:literal, $status:literal, $title:literal;)+) => {
        /// Why a request is refused, for programs. New ones may come.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[non_exhaustive]
        pub enum Code {
            $($(#[$doc])+ #[serde(rename = $text)] $name,)+
            /// One that this version does not know.
            #[serde(other, rename = "unknown")]
            Unknown,
        }

        impl Code {
            /// All that there are.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// The code as it is written.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                    Self::Unknown => "unknown",
                }
            }

            /// The status of an answer that is refused so.
            pub fn status(self) -> u16 {
                match self {
                    $(Self::$name => $status,)+
                    Self::Unknown => 500,
                }
            }

            /// The code in words.
            pub fn title(self) -> &'static str {
                match self {
                    $(Self::$name => $title,)+
                    Self::Unknown => "Something unknown",
                }
            }
        }
    };
}

// A table, and nothing else: one place says all that there is to say of a code.
codes! {
    /// The request is not one that the API has.
    BadRequest = "bad_request", 400, "The request is not valid";
    /// No session, image or the like can have such a name.
    BadName = "bad_name", 400, "Not a name";
    /// The content ended too early.
    BrokenOff = "broken_off", 400, "The content broke off";
    /// Nothing says which backups are kept.
    NoRetention = "no_retention", 400, "No rule says which backups are kept";
    /// It is not known who asks.
    Unauthenticated = "unauthenticated", 401, "A key is needed";
    /// Who asks may not do this.
    Forbidden = "forbidden", 403, "The key does not allow this";
    /// The session's own user may not do this.
    NotPermitted = "not_permitted", 403, "The session's user may not do this";
    /// A web page of another site asks.
    BadOrigin = "bad_origin", 403, "Web pages of this origin may not ask";
    /// There is nothing at this path.
    NotFound = "not_found", 404, "There is nothing here";
    /// There is no such session.
    UnknownSession = "unknown_session", 404, "No such session";
    /// There is no such backup.
    NoBackup = "no_backup", 404, "No such backup";
    /// The backup is the latest of a session, or is being restored.
    BackupNeeded = "backup_needed", 409, "The backup is needed";
    /// There is no such snapshot.
    NoSnapshot = "no_snapshot", 404, "No such snapshot";
    /// There is no such image.
    UnknownImage = "unknown_image", 404, "No such image";
    /// There is no such process.
    UnknownProcess = "unknown_process", 404, "No such process";
    /// There is no such program in the session.
    NoProgram = "no_program", 404, "No such program";
    /// There is no such log.
    NoLog = "no_log", 404, "No such log";
    /// There is no such file.
    NoFile = "no_file", 404, "No such file";
    /// There is no such key.
    UnknownKey = "unknown_key", 404, "No such key";
    /// The path has other methods.
    BadMethod = "bad_method", 405, "Not a method of this resource";
    /// Somebody uses the session.
    InUse = "in_use", 409, "The session is in use";
    /// There is one already.
    AlreadyExists = "already_exists", 409, "It exists already";
    /// There is one of this name already.
    SnapshotExists = "snapshot_exists", 409, "The snapshot exists already";
    /// The session was made of another image.
    OtherImage = "other_image", 409, "The session has another image";
    /// The daemon has no backup destination.
    NoDestination = "no_destination", 409, "There is no backup destination";
    /// The session's files have vanished.
    VolumeMissing = "volume_missing", 409, "The session's files are missing";
    /// The isolation does not have this.
    Isolation = "isolation", 409, "The isolation cannot do this";
    /// What is there is a folder.
    IsFolder = "is_folder", 409, "It is a folder";
    /// What is there is no folder.
    NotFolder = "not_folder", 409, "It is no folder";
    /// What is there is neither a file nor a folder.
    NotFile = "not_file", 409, "It is no regular file";
    /// A folder that has something in it.
    NotEmpty = "not_empty", 409, "The folder is not empty";
    /// The two are on two file systems.
    OtherDisk = "other_disk", 409, "It would be on another file system";
    /// The upload is not at that place.
    BadOffset = "bad_offset", 409, "The upload goes on elsewhere";
    /// Another request has the upload.
    Uploading = "uploading", 409, "The upload is being received";
    /// The session was stopped before the request was answered.
    Stopped = "stopped", 409, "The session was stopped";
    /// A request of the same idempotency key is being answered.
    Repeating = "repeating", 409, "The same request is being answered";
    /// The process cannot take this.
    BadState = "bad_state", 409, "Not possible in this state";
    /// More than is taken at once.
    TooLarge = "too_large", 413, "The content is too large";
    /// It is not of a type that is read here.
    BadType = "bad_type", 415, "Not a type of content that is read here";
    /// The file has no such range.
    BadRange = "bad_range", 416, "There is no such range";
    /// No name by which this daemon may be asked.
    BadHost = "bad_host", 421, "The daemon is not asked by this name";
    /// The program is not one that can be executed.
    NotExecutable = "not_executable", 422, "The program cannot be executed";
    /// An archive that cannot be used.
    BadArchive = "bad_archive", 422, "The archive cannot be used";
    /// Another request had this idempotency key.
    OtherRequest = "other_request", 422, "The key was used for another request";
    /// The connection is to be upgraded.
    Upgrade = "upgrade", 426, "An upgrade of the connection is needed";
    /// Too many requests.
    RateLimited = "rate_limited", 429, "Too many requests";
    /// Headers that are too large.
    LargeHeaders = "large_headers", 431, "The headers are too large";
    /// It is not had here, and never was.
    Unsupported = "unsupported", 501, "It is not had here";
    /// Nothing answers at the session's port.
    Port = "port", 502, "The port cannot be reached";
    /// What serves a session's files is gone.
    NoAgent = "no_agent", 502, "The session's files cannot be served";
    /// There is no room for another session.
    AtCapacity = "at_capacity", 503, "The pool is at capacity";
    /// The daemon is about to end.
    ShuttingDown = "shutting_down", 503, "The daemon is shutting down";
    /// The daemon lives, and cannot do its work.
    NotReady = "not_ready", 503, "The daemon is not ready";
    /// What serves a session's files does not answer.
    NoAnswer = "no_answer", 504, "The session does not answer";
    /// The session has come to one of its limits.
    OverLimit = "over_limit", 507, "The session is at its limit";
    /// The disk, or the session's part of it, is full.
    NoSpace = "no_space", 507, "No space is left";
    /// All else.
    Failed = "failed", 500, "It has failed";
}

/// The codes as they are written, which a derived schema does not see.
#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for Code {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .description(Some("Why a request is refused, for programs. New ones may come."))
            .enum_values(Some(Self::ALL.iter().map(|code| code.as_str())))
            .into()
    }
}

#[cfg(feature = "openapi")]
impl ToSchema for Code {}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_read_as_they_are_written() {
        for code in Code::ALL {
            let text = serde_json::to_string(code).unwrap();
            assert_eq!(text, format!("\"{code}\""));
            assert_eq!(serde_json::from_str::<Code>(&text).unwrap(), *code);
            assert!((400..600).contains(&code.status()), "{code}");
        }
        assert_eq!(serde_json::from_str::<Code>("\"of_a_later_version\"").unwrap(), Code::Unknown);
    }

    #[test]
    fn no_two_codes_are_the_same() {
        let mut all: Vec<&str> = Code::ALL.iter().map(|code| code.as_str()).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), Code::ALL.len());
    }
}
