//! Names that people give to sessions and to their snapshots.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

use crate::error::{Error, Result};

/// Longest name, in bytes: leaves room for what is put around it in a file name (255).
const LONGEST: usize = 128;

/// A name for a session: 1 to 128 bytes, no `/`, no white space or control characters, not
/// beginning with `-` or `.`, and not the text of a UUID.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SessionName(String);

impl SessionName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SessionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SessionName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let is_id = || Uuid::try_parse(name).is_ok();
        let is_id = || is_id().then_some("is a UUID, which names a session by itself");
        match problem(name).or_else(is_id) {
            None => Ok(Self(name.to_owned())),
            Some(problem) => Err(bad("session", name, problem)),
        }
    }
}

/// A name for a snapshot of a session: 1 to 128 bytes, no `/`, no white space or control
/// characters, not beginning with `-` or `.`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotName(String);

impl SnapshotName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SnapshotName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match problem(name) {
            None => Ok(Self(name.to_owned())),
            Some(problem) => Err(bad("snapshot", name, problem)),
        }
    }
}

/// Why a name cannot be part of a path and of a line of output.
/// That something else can have this name: by the same rule as a snapshot.
pub(crate) fn check(what: &'static str, name: &str) -> Result<()> {
    problem(name).map_or(Ok(()), |problem| Err(bad(what, name, problem)))
}

fn problem(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("is empty")
    } else if name.len() > LONGEST {
        Some("is longer than 128 bytes")
    } else if name.contains('/') {
        Some("contains a /")
    } else if name.chars().any(|c| c.is_control() || c.is_whitespace()) {
        Some("contains white space or a control character")
    } else if name.starts_with(['-', '.']) {
        Some("begins with - or .")
    } else {
        None
    }
}

fn bad(what: &'static str, name: &str, problem: &'static str) -> Error {
    Error::Name { what, name: name.chars().take(LONGEST).collect(), problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_names_pass_and_bad_ones_say_why() {
        for good in ["demo", "a", "agent-7.b_c@d", "日本", &"x".repeat(128)] {
            assert_eq!(good.parse::<SessionName>().ok().map(|name| name.0), Some(good.to_owned()));
        }
        let bad = [
            ("", "empty"),
            ("a/b", "/"),
            ("../x", "/"),
            ("a\nb", "control"),
            ("a b", "white space"),
            ("a\u{1b}[2J", "control"),
            ("-f", "begins"),
            (".denizen", "begins"),
            ("67e55044-10b1-426f-9247-bb680e5fe0c8", "UUID"),
            (&"x".repeat(129), "128"),
        ];
        for (name, expected) in bad {
            let message = name.parse::<SessionName>().map_or_else(|e| e.to_string(), |n| n.0);
            assert!(message.contains(expected), "{name:?}: {message}");
            assert!(!message.contains('\u{1b}'), "{message:?}");
        }
    }
}
