//! Keys, tokens and who one is. Times are in RFC 3339 here.

use serde::{Deserialize, Serialize};
#[cfg(feature = "openapi")]
use utoipa::ToSchema;
use uuid::Uuid;

/// What a key allows. Each scope includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// To see what there is and what happens, but nothing of sessions' files.
    Read,
    /// To use sessions too: run commands, move files, start, stop, back up, restore, fork, remove.
    Operate,
    /// All: also keys, images, the deletion of backups, the daemon itself.
    Admin,
}

impl Scope {
    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Operate => "operate",
            Self::Admin => "admin",
        }
    }
}

/// A key that is to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct NewKey {
    /// What it is for, in its maker's words: 1 to 128 bytes without control characters.
    pub name: String,
    /// What it allows.
    pub scope: Scope,
    /// Only for sessions whose names begin with this.
    #[serde(default)]
    pub sessions: Option<String>,
    /// Seconds until it is void; never, if there are none.
    #[serde(default)]
    pub expires_in_seconds: Option<u64>,
}

/// What is told of a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Key {
    /// The part of it that names it.
    pub id: String,
    /// What it is for.
    pub name: String,
    /// What it allows.
    pub scope: Scope,
    /// Only for sessions whose names begin with this.
    pub sessions: Option<String>,
    /// When it was made.
    pub created_at: String,
    /// When it is void.
    pub expires_at: Option<String>,
    /// When it was last used; a daemon that was killed may have forgotten the last minutes.
    pub last_used_at: Option<String>,
}

/// All keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Keys {
    /// In the order of their ids.
    pub keys: Vec<Key>,
}

/// A key that was made. What it is is told this once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct MadeKey {
    /// What is told of it later, too.
    #[serde(flatten)]
    pub info: Key,
    /// The key.
    pub key: String,
}

/// Who asks, by the key or token that was sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Whoami {
    /// The key's id, if it is one.
    pub id: Option<String>,
    /// The key's name; `local` by the Unix socket, `token` by a token.
    pub name: String,
    /// What it allows.
    pub scope: Scope,
    /// Only sessions whose names begin with this.
    pub sessions: Option<String>,
    /// Only this session.
    pub session: Option<Uuid>,
    /// When it is void.
    pub expires_at: Option<String>,
}

/// A session's token that is to be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct NewToken {
    /// Seconds until it is void: up to thirty days; a day, if nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in_seconds: Option<u64>,
}

/// A token for one session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Token {
    /// It.
    pub token: String,
    /// The session.
    pub session: Uuid,
    /// When it is void; never after what it was asked for with.
    pub expires_at: String,
}
