//! Files of a session.
//!
//! The path of a file may have any bytes but zero. Where it is part of a URL, what is not plain is
//! escaped (`%2F`); JSON has it as text, in which what is no UTF-8 is replaced, and escaped.

use serde::{Deserialize, Serialize};
#[cfg(feature = "openapi")]
use utoipa::ToSchema;

/// Header that tells from which byte on an upload goes on.
pub const UPLOAD_OFFSET: &str = "upload-offset";

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Entry {
    /// The last part of its path, as text.
    pub name: String,
    /// Its path from the session's root, as text.
    pub path: String,
    /// Its path from the session's root, as a URL has it.
    pub escaped: String,
    /// `file`, `folder`, `symlink`, `fifo`, `socket` or `device`. A link is not followed.
    pub kind: String,
    /// Bytes of its content.
    pub size: u64,
    /// Its permissions, in octal digits.
    pub mode: String,
    /// Its owner, as the session numbers users.
    pub user: u32,
    /// Its owner's group.
    pub group: u32,
    /// When its content was last changed.
    pub modified_at: f64,
    /// Where a symlink leads, as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// A part of what is in a folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Folder {
    /// In the order of the bytes of their names.
    pub entries: Vec<Entry>,
    /// Ask with this as `after` for the next part; it is escaped once. None at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// How far an upload in parts is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Upload {
    /// Bytes that are there: the next part begins with this one.
    pub received: u64,
}

/// Which bytes of an upload a request has: from `first` on, of `total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UploadPlace {
    /// The first byte.
    pub first: u64,
    /// The last byte, which is sent too.
    pub last: u64,
    /// Of so many.
    pub total: u64,
}

impl UploadPlace {
    /// Reads what a header `Content-Range` says (RFC 9110, 14.4), if it is whole.
    pub fn parse(text: &str) -> Option<Self> {
        let number = |text: &str| {
            // A sign is none of its digits.
            text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u64>().ok())?
        };
        let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let place = Self { first: number(first)?, last: number(last)?, total: number(total)? };
        (place.first <= place.last && place.last < place.total).then_some(place)
    }
}

impl std::fmt::Display for UploadPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "bytes {}-{}/{}", self.first, self.last, self.total)
    }
}

/// What has become of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ChangeKind {
    /// It is there now: it was made, or has this name now.
    Created,
    /// Its content has changed.
    Written,
    /// Its permissions, owner or times have.
    Attributes,
    /// It is not there any more.
    Removed,
    /// It has another name now.
    Renamed,
}

/// A change in a folder that is watched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Change {
    /// What has become of it.
    pub kind: ChangeKind,
    /// Its path from the session's root, as text.
    pub path: String,
    /// Its path from the session's root, as a URL has it.
    pub escaped: String,
}

/// As [`escape`](crate::escape), of a path: slashes stay, and it may be no text.
pub fn escape_path(path: &[u8]) -> String {
    super::escape_but(path, b"/")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_a_part_is_read_as_it_is_written() {
        let place = UploadPlace { first: 5, last: 9, total: 10 };
        assert_eq!(UploadPlace::parse(&place.to_string()), Some(place));
        for wrong in [
            "",
            "bytes",
            "bytes 0-0",
            "bytes 0-0/*",
            "bytes */10",
            "bytes 5-4/10",
            "bytes 5-10/10",
            "bytes +5-9/10",
            "bytes 5-9/10 ",
            "bytes -/1",
            "items 0-0/1",
            "bytes 0-18446744073709551616/18446744073709551617",
        ] {
            assert_eq!(UploadPlace::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_escaped_has_nothing_that_means_something() {
        assert_eq!(escape_path(b"/a b/%?#&+\xff\n"), "/a%20b/%25%3F%23%26%2B%FF%0A");
    }
}
