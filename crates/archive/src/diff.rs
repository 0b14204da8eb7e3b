//! Tells what two trees differ in, by the same walk that backs them up. It must never change
//! either of them.
//!
//! A file with the same size and the same time of change (to the nanosecond) counts as the same;
//! with another time its content is compared. Times alone are no difference.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::Error;
use crate::format::{Kind, Member};
use crate::reader::CHUNK;
use crate::walk::{Sink, Walk, check_cancelled, open_volume};

/// Something that is not in both trees, or not the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where it is, from the trees' roots.
    pub path: PathBuf,
    /// What is there in the first tree.
    pub before: Option<Node>,
    /// What is there in the second tree.
    pub after: Option<Node>,
    /// In what they differ, if it is in both.
    pub aspects: Vec<Aspect>,
}

/// What is at a place of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// `file`, `symlink`, `folder`, `fifo`, or `deleted`: overlayfs's mark for that.
    pub kind: &'static str,
    /// Bytes of a file.
    pub size: u64,
    /// Permissions, with the special bits.
    pub mode: u32,
    /// Its owner.
    pub user: u64,
    /// Its group.
    pub group: u64,
}

/// In what something differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aspect {
    /// One is a file, say, and the other a folder.
    Kind,
    /// The content of files, or where symlinks lead.
    Content,
    /// Permissions.
    Mode,
    /// Owner or group.
    Owner,
    /// Extended attributes, capabilities and lists of access.
    Attributes,
}

impl Aspect {
    /// The word for it in output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kind => "kind",
            Self::Content => "content",
            Self::Mode => "mode",
            Self::Owner => "owner",
            Self::Attributes => "attributes",
        }
    }
}

/// What `after` has that `before` has not, and the other way round, by path; none is a tree with
/// nothing in it. What is left out of a backup is not looked at.
///
/// Blocks; `cancelled` is looked at at every entry. Takes memory for each entry of both trees.
///
/// # Errors
/// As [`crate::copy`].
pub fn diff(
    before: Option<&Path>,
    after: Option<&Path>,
    cancelled: &AtomicBool,
) -> Result<Vec<Difference>, Error> {
    let before = Tree::read(before, cancelled)?;
    let after = Tree::read(after, cancelled)?;
    let mut found = Vec::new();
    let removed = before.all.iter().filter(|(path, _)| !after.all.contains_key(*path));
    for (path, one) in removed {
        found.push(difference(path, Some(one), None, Vec::new()));
    }
    for (path, other) in &after.all {
        let Some(one) = before.all.get(path) else {
            found.push(difference(path, None, Some(other), Vec::new()));
            continue;
        };
        let mut aspects = Vec::new();
        if one.kind != other.kind {
            aspects.push(Aspect::Kind);
        } else if one.link != other.link
            || one.size != other.size
            || (one.mtime != other.mtime && !before.same_content(&after, path, cancelled)?)
        {
            aspects.push(Aspect::Content);
        }
        if permissions(one) != permissions(other) {
            aspects.push(Aspect::Mode);
        }
        if (one.uid, one.gid) != (other.uid, other.gid) {
            aspects.push(Aspect::Owner);
        }
        if one.xattrs != other.xattrs {
            aspects.push(Aspect::Attributes);
        }
        if !aspects.is_empty() {
            found.push(difference(path, Some(one), Some(other), aspects));
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

fn difference(
    path: &[u8],
    before: Option<&Member>,
    after: Option<&Member>,
    aspects: Vec<Aspect>,
) -> Difference {
    let path = PathBuf::from(OsStr::from_bytes(path));
    Difference { path, before: before.map(node), after: after.map(node), aspects }
}

fn permissions(member: &Member) -> u32 {
    member.mode & 0o7777
}

fn node(member: &Member) -> Node {
    let kind = match member.kind {
        Kind::File | Kind::HardLink => "file",
        Kind::Symlink => "symlink",
        Kind::Directory => "folder",
        Kind::Fifo => "fifo",
        Kind::Whiteout => "deleted",
    };
    let Member { size, uid, gid, .. } = *member;
    Node { kind, size, mode: permissions(member), user: uid, group: gid }
}

/// All that is in a tree, by path from its root.
#[derive(Default)]
struct Tree<'a> {
    place: Option<(&'a Path, OwnedFd)>,
    all: BTreeMap<Vec<u8>, Member>,
}

impl<'a> Tree<'a> {
    fn read(place: Option<&'a Path>, cancelled: &AtomicBool) -> Result<Self, Error> {
        let Some(path) = place else { return Ok(Self::default()) };
        let root = open_volume(path)?;
        let again = root.try_clone().map_err(|e| Error::io("read", path, e))?;
        let mut walk = Walk::new(path, None, cancelled, List::default());
        walk.run(root)?;
        Ok(Self { place: Some((path, again)), all: walk.sink.0 })
    }

    fn same_content(
        &self,
        other: &Self,
        path: &[u8],
        cancelled: &AtomicBool,
    ) -> Result<bool, Error> {
        if self.all.get(path).is_none_or(|member| member.kind != Kind::File || member.size == 0) {
            return Ok(true);
        }
        let (Some(one), Some(other)) = (&self.place, &other.place) else { return Ok(false) };
        let failed = |e| Error::io("read", &one.0.join(OsStr::from_bytes(path)), e);
        let open = |root: &OwnedFd| {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            let fd = rustix::fs::openat2(root.as_fd(), path, flags, Mode::empty(), within);
            fd.map(|fd| BufReader::with_capacity(CHUNK, File::from(fd)))
                .map_err(|e| failed(e.into()))
        };
        let (mut one, mut other) = (open(&one.1)?, open(&other.1)?);
        let (mut left, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
        loop {
            check_cancelled(cancelled, Path::new(OsStr::from_bytes(path)))?;
            let length = one.read(&mut left).map_err(failed)?;
            if length == 0 {
                return Ok(true);
            }
            match other.read_exact(&mut right[..length]) {
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(false),
                read => read.map_err(failed)?,
            }
            if left[..length] != right[..length] {
                return Ok(false);
            }
        }
    }
}

#[derive(Default)]
struct List(BTreeMap<Vec<u8>, Member>);

impl Sink for List {
    fn entry(&mut self, member: Member) -> Result<(), Error> {
        let key = |path: &[u8]| {
            let path = path.strip_prefix(b"./").unwrap_or(path);
            path.strip_suffix(b"/").unwrap_or(path).to_vec()
        };
        let path = key(&member.path);
        // A further name of a file is that file.
        let first = match member.kind {
            Kind::HardLink => self.0.get(&key(&member.link)).cloned(),
            _ => None,
        };
        self.0.insert(path, first.unwrap_or(member));
        Ok(())
    }

    fn file(&mut self, member: Member, _: BorrowedFd<'_>) -> Result<(), Error> {
        self.entry(member)
    }
}
