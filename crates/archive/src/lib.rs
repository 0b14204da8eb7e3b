//! Backups of a directory tree, each one compressed tar file that is whole or absent; and copies
//! of one beside it ([`copy`]), and what two of them differ in ([`diff`]).
//!
//! This crate writes, checks, restores and lists archives, and copies trees by the same rules. It decides nothing: when to back
//! up, what to keep and what to delete is the pool's business. It never follows a symlink,
//! never replaces an existing archive, never leaves a half-written one under a final name,
//! and never changes the volume it reads. All of it is synchronous: call it from a thread
//! that may block.
//!
//! # The file
//!
//! Name: `{session}-{YYYYMMDD}T{hhmmss}Z.tar.zst`, the session as a lower-case hyphenated
//! UUID, the time in UTC. Names of one session sort in the order the archives were made,
//! even when the clock was set back in between: a new name is always later than the latest
//! one there (see [`write`]).
//!
//! While it is being written the file is called `.{session}-{pid}-{random}.partial` and its
//! writer holds an exclusive `flock(2)` on it. A partial file that nobody has locked belongs
//! to a process that died; [`clean`] removes those and no others.
//!
//! Content: Zstandard (RFC 8878), each frame with its checksum, around a tar stream in the
//! pax interchange format (POSIX.1-2001 `pax`), so GNU tar, bsdtar and others read it:
//!
//! - the first entry is `./`, the volume itself; every other name starts with `./`; a
//!   directory's name ends in `/` and comes before what it holds; names are sorted bytewise
//!   within a directory;
//! - a folder that was kept beside the volume comes last, as `./.denizen/`, or as the first of
//!   `./.denizen-1/`, `./.denizen-2/`, … that the volume has nothing of;
//! - a pax record `comment` of the first entry says which it is: `denizen-beside:` and its name,
//!   or no name if there is no such folder. No name in the volume makes such a record. Archives
//!   from before have none: in them, `./.denizen/` may be that folder or one of the volume's own;
//! - owners are numbers only (the name fields are empty); those of a session's own users can be
//!   the same whoever writes the archive ([`Owners`]);
//! - a pax record `mtime` carries the nanoseconds when there are any; `path`, `linkpath`,
//!   `size`, `uid` and `gid` appear when the fixed field is too small; names are the bytes
//!   the file system holds, whatever their encoding;
//! - extended attributes are records `SCHILY.xattr.{name}` with the raw value; as in GNU tar,
//!   `%` and `=` in an attribute's name are written `%25` and `%3D`. Kept are `user.*`,
//!   `trusted.*`, `security.capability` and the two `system.posix_acl_*`, on files and
//!   directories;
//! - the second and later names of an inode are hard link entries (type `1`) to the first;
//! - a file with holes is in the GNU sparse format 1.0 (`GNU.sparse.*` records, the map in
//!   front of the data);
//! - sockets, device nodes and what is mounted inside the volume are left out and reported
//!   in [`Written::skipped`]. One device is kept: the character device 0:0, which is how
//!   overlayfs records a deleted file. It opens nothing, and any user may make one;
//! - two blocks of zeros end it.
//!
//! After that the file ends with a seal: a Zstandard skippable frame, which every decoder
//! passes over. Its magic number is `0x184D2A5D`, its content the text
//! `denizen-seal 1 sha256:{hex} entries:{n}`: the SHA-256 of the whole tar stream, and the
//! number of entries in 20 decimal digits. [`verify`] and [`restore`] insist that it matches.
//! It is not within the tar stream because some readers (Python's `tarfile`) take a global
//! header with nothing after it for damage.
//!
//! Archives without the seal (made by `tar --zstd`, or by appending a directory with the
//! `tar` crate) are restored as well, in pax, GNU, ustar or V7 format; [`Summary::sealed`]
//! tells them apart. The seal finds damage; it is no proof of who wrote the archive. A file cut
//! off exactly in front of its seal is such an archive too: complete, but unsealed.

mod copy;
mod diff;
mod error;
mod format;
mod owners;
mod reader;
mod restore;
mod store;
mod walk;
mod write;

pub use copy::{Copied, copy};
pub use diff::{Aspect, Difference, Node, diff};
pub use error::Error;
pub use owners::Owners;
pub use restore::{Beside, Given, Restored, restore, restore_as, restore_given};
pub use store::{ArchiveId, Entry, NotAnArchive, clean, list};
pub use walk::{Reason, Skipped};
pub use write::{BESIDE, Source, Written, write};

/// Trees of files beneath the formats that keep them: how they are walked, and how they are made
/// again. For crates that have another format.
pub mod tree {
    pub use crate::format::{Attributes, Kind, Member, Segment, Time};
    pub use crate::restore::{Place, prepare};
    pub use crate::walk::{Sink, Walk, open_volume as open};
}

use std::fs::File;
use std::path::Path;

/// What [`verify`] read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Entries of every kind, the volume's own `./` included.
    pub entries: u64,
    /// Regular files; each further hard link counts as one.
    pub files: u64,
    /// Bytes of file content as a reader of the files would see them, holes included.
    pub bytes: u64,
    /// Whether the archive ends with a seal, and so is known to be what was written.
    pub sealed: bool,
}

/// Reads a whole archive back: decompresses it, checks every frame's checksum, parses every
/// entry, and compares the seal if there is one. Makes nothing on disk.
///
/// # Errors
/// [`Error::Damaged`] if it is cut short or altered, [`Error::Refused`] if it holds something
/// [`restore`] would not make, otherwise what met the reading of the file.
pub fn verify(path: &Path) -> Result<Summary, Error> {
    let file = File::open(path).map_err(|e| Error::io("open the archive", path, e))?;
    reader::check(&file, &file, path)
}
