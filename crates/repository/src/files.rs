//! Where a repository's files are: a folder, or a bucket of an object store.
//!
//! A file is whole or absent and never changes: it is written once, under a name that says what
//! it holds. This module knows nothing of what that is.

mod bucket;
mod folder;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;

pub use bucket::{Bucket, Patience};
pub use folder::Folder;

use crate::error::Error;

/// A part of a file.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub length: u64,
}

/// A place with files. Names are relative, with `/` between their steps. All calls block.
pub trait Files: fmt::Debug + Send + Sync {
    /// What people call it; no secret is in it.
    fn place(&self) -> String;

    /// Whether each request takes its time, however little it is about.
    fn is_far(&self) -> bool;

    /// Makes the place ready for files.
    fn prepare(&self) -> io::Result<()>;

    /// All files below a folder, with their sizes.
    fn list(&self, folder: &str) -> io::Result<Vec<(String, u64)>>;

    /// The size of a file, if it is there.
    fn size(&self, name: &str) -> io::Result<Option<u64>>;

    /// A file, or what there is of that part of it.
    fn read(&self, name: &str, range: Option<Range>) -> io::Result<Bytes>;

    /// Writes a file, durably. With `new`, one that is there is not replaced
    /// ([`io::ErrorKind::AlreadyExists`]).
    fn write(&self, name: &str, content: Vec<Bytes>, new: bool) -> io::Result<()>;

    /// Deletes a file.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Deletes what killed writers have left half-written.
    fn sweep(&self) -> io::Result<()>;
}

/// Where backups go: a folder, or `s3://bucket/prefix`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Destination {
    /// A folder.
    Folder(PathBuf),
    /// A bucket of S3, or of a server that speaks its protocol. Credentials, region and
    /// endpoint are found as the AWS tools find them: `AWS_ACCESS_KEY_ID`,
    /// `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`, `AWS_ENDPOINT_URL`.
    S3 {
        /// The bucket.
        bucket: String,
        /// What all names in it begin with; may be empty.
        prefix: String,
    },
}

impl Destination {
    pub(crate) fn files(&self) -> Result<Arc<dyn Files>, Error> {
        Ok(match self {
            Self::Folder(path) => Arc::new(Folder::new(path)),
            Self::S3 { bucket, prefix } => Arc::new(Bucket::open(bucket, prefix)?),
        })
    }

    /// The folder, if it is one.
    pub fn folder(&self) -> Option<&Path> {
        match self {
            Self::Folder(path) => Some(path),
            Self::S3 { .. } => None,
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => path.display().fmt(f),
            Self::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Self::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
        }
    }
}

impl From<PathBuf> for Destination {
    fn from(path: PathBuf) -> Self {
        Self::Folder(path)
    }
}

impl From<Destination> for String {
    fn from(destination: Destination) -> Self {
        destination.to_string()
    }
}

impl TryFrom<String> for Destination {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl FromStr for Destination {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refuse = |problem: &str| {
            Err(Error::Destination { text: text.to_owned(), problem: problem.to_owned() })
        };
        let Some((scheme, rest)) = text.split_once("://") else {
            if text.is_empty() {
                return refuse("it is empty");
            }
            return Ok(Self::Folder(text.into()));
        };
        if scheme != "s3" {
            return refuse("only folders and s3://bucket/prefix are known here");
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() || bucket.contains(['@', '?', '#']) {
            return refuse(
                "a bucket is named as in s3://bucket/prefix; keys come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            );
        }
        let prefix = prefix.trim_matches('/').to_owned();
        Ok(Self::S3 { bucket: bucket.to_owned(), prefix })
    }
}
