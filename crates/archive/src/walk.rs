//! Walks a tree and tells a [`Sink`] what it holds, in an order that never changes: what is in a
//! folder after it, bytewise by name.
//!
//! Never follows a symlink, never crosses into another mount, never writes to the tree (not even
//! access times where that can be helped). What changes while it is looked at is an error, not a
//! mixture.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, SeekFrom, Statx, StatxAttributes, StatxFlags,
};
use rustix::io::Errno;

use crate::Error;
use crate::format::weight;
use crate::format::{Attributes, Kind, MAX_PATH, MAX_SEGMENTS, MAX_WEIGHT, Member, Segment, Time};
use crate::owners::Owners;

/// How many folders are kept open on the way down; deeper ones are found again through `..`.
const OPEN_FOLDERS: usize = 64;
/// The kernel's limit for a list of attribute names (`XATTR_LIST_MAX`, linux/limits.h).
pub(crate) const XATTR_LIST: usize = 64 << 10;

/// Something left out of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Where it is, with the volume in front.
    pub path: PathBuf,
    /// Why it is left out.
    pub reason: Reason,
}

/// Why something is left out of an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A socket: it means something only to the process that listens on it.
    Socket,
    /// A block or character device node.
    Device,
    /// Something is mounted there. The mount's content is not the volume's; a directory is
    /// kept as an empty one, so that it can be mounted on again.
    MountPoint,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Socket => "a socket",
            Self::Device => "a device node",
            Self::MountPoint => "a mount point",
        })
    }
}

pub(crate) fn check_cancelled(cancelled: &AtomicBool, path: &Path) -> Result<(), Error> {
    if cancelled.load(Ordering::Relaxed) {
        return Err(Error::Cancelled { path: path.to_path_buf() });
    }
    Ok(())
}

/// Opens the root of a tree, which must be a folder and no link to one.
///
/// # Errors
/// [`Error::VolumeMissing`], or what the system says.
pub fn open_volume(volume: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, volume, flags, Mode::empty()).map_err(|e| match e {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP => {
            Error::VolumeMissing { path: volume.to_path_buf() }
        }
        e => Error::io("read the volume", volume, e),
    })
}

/// Which file of which file system.
type FileId = (u32, u32, u64);

/// One directory on the way down.
struct Folder {
    /// Closed while far below it.
    fd: Option<OwnedFd>,
    /// As it was when it was first read.
    before: Statx,
    /// What is still to be done in it, the next one last.
    names: Vec<Vec<u8>>,
    /// Length of its path, to which the path is cut back when it is done.
    path: usize,
    /// What its attributes weigh.
    weight: usize,
}

/// What a walk finds is told to.
pub trait Sink {
    /// The folder that a walk begins with, and the names in it that the walk will come to.
    fn top(&mut self, member: Member, _names: &[Vec<u8>]) -> Result<(), Error> {
        self.entry(member)
    }

    /// Anything but a regular file: a folder before what it holds, a further name of a file
    /// after its first.
    fn entry(&mut self, member: Member) -> Result<(), Error>;

    /// A regular file, open at its start.
    fn file(&mut self, member: Member, content: BorrowedFd<'_>) -> Result<(), Error>;

    /// Whether all that has several names is told as links, or only regular files.
    fn links_all(&self) -> bool {
        true
    }

    /// A further name of a regular file; `content` opens it.
    fn link(
        &mut self,
        member: Member,
        _content: &dyn Fn() -> Result<OwnedFd, Error>,
    ) -> Result<(), Error> {
        self.entry(member)
    }
}

/// A walk through one tree, or several that are told as one.
pub struct Walk<'a, S> {
    tree: &'a Path,
    /// Who is told.
    pub sink: S,
    owners: Option<Owners>,
    cancelled: &'a AtomicBool,
    /// `./a/b`, the name of the entry being done.
    path: Vec<u8>,
    /// What the attributes of all folders on the way weigh, and the most there may be.
    weight: usize,
    most_weight: usize,
    /// The first name of every file that has several.
    linked: HashMap<FileId, Vec<u8>>,
    /// Room for a list of attribute names.
    names: Vec<u8>,
    /// Room for directory entries.
    folder: Vec<u8>,
    /// What was left out so far.
    pub skipped: Vec<Skipped>,
}

impl<'a, S: Sink> Walk<'a, S> {
    /// A walk that has not begun. `tree` stands for it in errors.
    pub fn new(tree: &'a Path, owners: Option<Owners>, cancelled: &'a AtomicBool, sink: S) -> Self {
        Self {
            tree,
            sink,
            owners,
            cancelled,
            path: Vec::new(),
            weight: 0,
            most_weight: MAX_WEIGHT,
            linked: HashMap::new(),
            names: vec![0; XATTR_LIST],
            folder: Vec::with_capacity(32 << 10),
            skipped: Vec::new(),
        }
    }

    /// Walks the tree below `root`, which is told as `.`.
    pub fn run(&mut self, root: OwnedFd) -> Result<(), Error> {
        self.path = b".".to_vec();
        self.descend(root)
    }

    /// Walks another tree, told as the folder of that name beside the first.
    pub fn run_beside(&mut self, root: OwnedFd, name: &str) -> Result<(), Error> {
        self.path = [b"./", name.as_bytes()].concat();
        self.descend(root)
    }

    fn descend(&mut self, root: OwnedFd) -> Result<(), Error> {
        let before = self.spot().stat_of(root.as_fd())?;
        let mut stack = vec![self.enter(root, before, S::top)?];
        while let Some(top) = stack.last_mut() {
            check_cancelled(self.cancelled, self.tree)?;
            // The one at the top is never closed; see below.
            let Some(fd) = &top.fd else {
                return Err(self.spot().changed("was moved"));
            };
            if let Some(name) = top.names.pop() {
                self.path.push(b'/');
                self.path.extend_from_slice(&name);
                if let Some(below) = self.visit(fd.as_fd(), &name)? {
                    stack.push(below);
                    if stack.len() > OPEN_FOLDERS {
                        let far = stack.len() - 1 - OPEN_FOLDERS;
                        stack[far].fd = None;
                    }
                } else {
                    self.path.truncate(top.path);
                }
                continue;
            }
            self.spot().unchanged(fd.as_fd(), &top.before)?;
            self.weight -= top.weight;
            let done = stack.pop();
            let Some(above) = stack.last_mut() else { break };
            self.path.truncate(above.path);
            if let (None, Some(done)) = (&above.fd, done.and_then(|done| done.fd)) {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(&done, c"..", flags, Mode::empty())
                    .map_err(|e| Error::io("read", &self.spot().here(), e))?;
                let now = self.spot().stat_of(fd.as_fd())?;
                if id(&now) != id(&above.before) {
                    return Err(self.spot().changed("was moved"));
                }
                above.fd = Some(fd);
            }
        }
        Ok(())
    }

    /// Tells of one entry; a directory is returned to be walked.
    fn visit(&mut self, folder: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Folder>, Error> {
        if self.path.len() + 1 > MAX_PATH {
            return Err(Error::Unsupported {
                path: self.spot().here(),
                reason: "its path is longer than 64 KiB",
            });
        }
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let stat = rustix::fs::statx(folder, name, flags, StatxFlags::BASIC_STATS)
            .map_err(|e| self.spot().failed("look at", e))?;
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        let mounted = stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        let whiteout = (stat.stx_rdev_major, stat.stx_rdev_minor) == (0, 0);
        let left_out = match kind {
            _ if mounted => Some(Reason::MountPoint),
            FileType::Socket => Some(Reason::Socket),
            FileType::CharacterDevice if whiteout => None,
            FileType::CharacterDevice | FileType::BlockDevice => Some(Reason::Device),
            _ => None,
        };
        if let Some(reason) = left_out {
            self.skipped.push(Skipped { path: self.spot().here(), reason });
            if kind == FileType::Directory {
                let member = self.member(Kind::Directory, &stat);
                self.sink.entry(member)?;
            }
            return Ok(None);
        }
        if kind == FileType::Directory {
            let fd = self.spot().open(folder, name, OFlags::DIRECTORY)?;
            self.spot().same(fd.as_fd(), &stat)?;
            return self.enter(fd, stat, |sink, member, _| sink.entry(member)).map(Some);
        }
        if stat.stx_nlink > 1 && (kind == FileType::RegularFile || self.sink.links_all()) {
            if let Some(first) = self.linked.get(&id(&stat)) {
                let link = first.clone();
                let member = Member { link, ..self.member(Kind::HardLink, &stat) };
                if kind == FileType::RegularFile {
                    let spot = Spot { tree: self.tree, path: &self.path };
                    self.sink.link(member, &|| {
                        let fd = spot.open(folder, name, OFlags::NONBLOCK)?;
                        spot.same(fd.as_fd(), &stat)?;
                        Ok(fd)
                    })?;
                } else {
                    self.sink.entry(member)?;
                }
                return Ok(None);
            }
            self.linked.insert(id(&stat), self.path.clone());
        }
        match kind {
            FileType::RegularFile => self.file(folder, name, &stat)?,
            FileType::Symlink => {
                let link = rustix::fs::readlinkat(folder, name, Vec::new())
                    .map_err(|e| self.spot().failed("read the link", e))?
                    .into_bytes();
                if link.len() > MAX_PATH {
                    let reason = "its target is longer than 64 KiB";
                    return Err(Error::Unsupported { path: self.spot().here(), reason });
                }
                let member = Member { link, ..self.member(Kind::Symlink, &stat) };
                self.sink.entry(member)?;
            }
            FileType::Fifo => {
                let member = self.member(Kind::Fifo, &stat);
                self.sink.entry(member)?;
            }
            FileType::CharacterDevice => {
                let member = self.member(Kind::Whiteout, &stat);
                self.sink.entry(member)?;
            }
            _ => {
                let reason = "it is of a kind unknown here";
                return Err(Error::Unsupported { path: self.spot().here(), reason });
            }
        }
        Ok(None)
    }

    fn enter(
        &mut self,
        fd: OwnedFd,
        before: Statx,
        tell: impl FnOnce(&mut S, Member, &[Vec<u8>]) -> Result<(), Error>,
    ) -> Result<Folder, Error> {
        let mut member = self.member(Kind::Directory, &before);
        member.xattrs = self.xattrs(fd.as_fd())?;
        let weight = weight(&member.xattrs);
        self.weight += weight;
        if self.weight > self.most_weight {
            return Err(Error::Unsupported {
                path: self.spot().here(),
                reason: "it and the folders above it have more attributes than can be restored",
            });
        }
        let mut names = Vec::new();
        let mut entries = RawDir::new(&fd, self.folder.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            // Spelled out because `entries` borrows from the walk.
            let path = || at(self.tree, &self.path);
            let entry = entry.map_err(|e| Error::io("read", &path(), e))?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
        }
        names.sort_unstable_by(|a, b| b.cmp(a));
        tell(&mut self.sink, member, &names)?;
        Ok(Folder { fd: Some(fd), before, names, path: self.path.len(), weight })
    }

    fn file(&mut self, folder: BorrowedFd<'_>, name: &[u8], stat: &Statx) -> Result<(), Error> {
        // Not to be kept waiting if it has just been replaced by a fifo.
        let fd = self.spot().open(folder, name, OFlags::NONBLOCK)?;
        let mut member = self.member(Kind::File, stat);
        member.size = stat.stx_size;
        member.xattrs = self.xattrs(fd.as_fd())?;
        if stat.stx_blocks.saturating_mul(512) < stat.stx_size {
            member.segments = self.segments(fd.as_fd(), stat.stx_size)?;
        }
        self.sink.file(member, fd.as_fd())?;
        // Only now is it known that what was read is what the entry says.
        self.spot().same(fd.as_fd(), stat)
    }

    /// Where the data of a file lies, or `None` if it has no holes after all.
    fn segments(&self, fd: BorrowedFd<'_>, size: u64) -> Result<Option<Vec<Segment>>, Error> {
        let mut segments = Vec::new();
        let mut end = 0;
        while end < size {
            let offset = match rustix::fs::seek(fd, SeekFrom::Data(end)) {
                Ok(offset) if offset < size => offset,
                // A hole up to the end.
                Ok(_) | Err(Errno::NXIO) => break,
                // A file system that does not know about holes.
                Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(None),
                Err(e) => return Err(self.spot().failed("look for holes in", e)),
            };
            if segments.len() + 1 == MAX_SEGMENTS {
                // The rest is kept with its holes filled rather than mapped without end.
                segments.push(Segment { offset, length: size - offset });
                break;
            }
            end = match rustix::fs::seek(fd, SeekFrom::Hole(offset)) {
                Ok(end) => end.min(size),
                Err(Errno::NXIO) => return Err(self.spot().changed("shrank")),
                Err(e) => return Err(self.spot().failed("look for holes in", e)),
            };
            if end <= offset {
                return Err(self.spot().changed("was rewritten"));
            }
            segments.push(Segment { offset, length: end - offset });
        }
        let dense = segments == [Segment { offset: 0, length: size }];
        Ok((!dense).then_some(segments))
    }

    fn xattrs(&mut self, fd: BorrowedFd<'_>) -> Result<Attributes, Error> {
        let length = match rustix::fs::flistxattr(fd, self.names.as_mut_slice()) {
            Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Ok(length) => length,
            Err(e) => return Err(self.spot().failed("list the attributes of", e)),
        };
        let mut kept = Vec::new();
        for name in self.names[..length].split(|&b| b == 0).filter(|name| is_kept(name)) {
            let mut value = Vec::new();
            let size = rustix::fs::fgetxattr_query(fd, name);
            let read = size.and_then(|size| {
                value.resize(size, 0);
                if size == 0 { Ok(0) } else { rustix::fs::fgetxattr(fd, name, &mut *value) }
            });
            match read {
                Ok(length) => value.truncate(length),
                Err(Errno::NODATA | Errno::RANGE) => {
                    return Err(self.spot().changed("got other attributes"));
                }
                Err(e) => return Err(self.spot().failed("read the attributes of", e)),
            }
            kept.push((name.to_vec(), value));
        }
        kept.sort_unstable();
        Ok(kept)
    }

    fn member(&self, kind: Kind, stat: &Statx) -> Member {
        let mut path = self.path.clone();
        if kind == Kind::Directory {
            path.push(b'/');
        }
        Member {
            path,
            kind,
            mode: stat.stx_mode.into(),
            uid: self.owners.map_or(stat.stx_uid, |owners| owners.keep_user(stat.stx_uid)).into(),
            gid: self.owners.map_or(stat.stx_gid, |owners| owners.keep_group(stat.stx_gid)).into(),
            mtime: Time { seconds: stat.stx_mtime.tv_sec, nanoseconds: stat.stx_mtime.tv_nsec },
            link: Vec::new(),
            same: (kind != Kind::Directory && stat.stx_nlink > 1).then_some(stat.stx_ino),
            xattrs: Vec::new(),
            size: 0,
            segments: None,
        }
    }

    fn spot(&self) -> Spot<'_> {
        Spot { tree: self.tree, path: &self.path }
    }
}

/// The entry being done.
#[derive(Clone, Copy)]
struct Spot<'a> {
    tree: &'a Path,
    path: &'a [u8],
}

impl Spot<'_> {
    fn open(&self, folder: BorrowedFd<'_>, name: &[u8], more: OFlags) -> Result<OwnedFd, Error> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | more;
        let open = |flags| rustix::fs::openat(folder, name, flags, Mode::empty());
        // Only the owner and root may leave access times alone.
        let opened = match open(flags | OFlags::NOATIME) {
            Err(Errno::PERM) => open(flags),
            opened => opened,
        };
        opened.map_err(|e| match e {
            Errno::LOOP | Errno::NOTDIR | Errno::NXIO => self.changed("was replaced"),
            e => self.failed("read", e),
        })
    }

    fn stat_of(&self, fd: BorrowedFd<'_>) -> Result<Statx, Error> {
        rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
            .map_err(|e| self.failed("look at", e))
    }

    /// Fails unless `fd` is the file that `before` tells of, as it was then.
    fn same(&self, fd: BorrowedFd<'_>, before: &Statx) -> Result<(), Error> {
        let now = self.stat_of(fd)?;
        if id(&now) != id(before) {
            return Err(self.changed("was replaced"));
        }
        if now.stx_size > before.stx_size {
            return Err(self.changed("grew"));
        }
        self.same_times(&now, before)
    }

    /// The same for a directory at its end, whose size says nothing.
    fn unchanged(&self, fd: BorrowedFd<'_>, before: &Statx) -> Result<(), Error> {
        self.same_times(&self.stat_of(fd)?, before)
    }

    fn same_times(&self, now: &Statx, before: &Statx) -> Result<(), Error> {
        let times = |stat: &Statx| {
            let (m, c) = (stat.stx_mtime, stat.stx_ctime);
            (m.tv_sec, m.tv_nsec, c.tv_sec, c.tv_nsec, stat.stx_size)
        };
        if times(now) == times(before) { Ok(()) } else { Err(self.changed("was changed")) }
    }

    fn failed(&self, action: &'static str, errno: Errno) -> Error {
        match errno {
            Errno::NOENT | Errno::STALE => self.changed("vanished"),
            errno => Error::io(action, &self.here(), errno),
        }
    }

    fn changed(&self, how: &'static str) -> Error {
        Error::Changed { path: self.here(), how }
    }

    fn here(&self) -> PathBuf {
        at(self.tree, self.path)
    }
}

/// Where an entry of a tree is, by its name with the leading `./`.
pub(crate) fn at(tree: &Path, path: &[u8]) -> PathBuf {
    tree.join(OsStr::from_bytes(path.get(2..).unwrap_or_default()))
}

fn id(stat: &Statx) -> FileId {
    (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino)
}

/// Attributes that belong to the file. The others belong to this machine's policy (labels
/// of a security module) or are made up by the file system.
pub(crate) fn is_kept(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || name.starts_with(b"trusted.")
        || matches!(
            name,
            b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default"
        )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    struct Nobody;

    impl Sink for Nobody {
        fn entry(&mut self, _: Member) -> Result<(), Error> {
            Ok(())
        }

        fn file(&mut self, _: Member, _: BorrowedFd<'_>) -> Result<(), Error> {
            Ok(())
        }
    }

    #[test]
    fn attributes_count_on_the_way_only() {
        let tree = tempfile::tempdir().unwrap();
        let never = AtomicBool::new(false);
        for name in ["a/b", "c", "d"] {
            std::fs::create_dir_all(tree.path().join(name)).unwrap();
        }
        for name in ["a", "a/b", "c", "d"] {
            xattr::set(tree.path().join(name), "user.x", &[b'x'; 400]).unwrap();
        }
        let walked = |most| {
            let mut walk = Walk::new(tree.path(), None, &never, Nobody);
            walk.most_weight = most;
            walk.run(open_volume(tree.path()).unwrap())
        };
        walked(1000).unwrap();
        let error = walked(800).unwrap_err();
        let path = tree.path().join("a/b");
        assert!(matches!(&error, Error::Unsupported { path: it, .. } if *it == path), "{error}");
    }
}
