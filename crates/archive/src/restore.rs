//! Makes the files of an archive again, in a new directory.
//!
//! Every entry is made relative to an open directory, each step of its path opened without
//! following symlinks, and nothing that exists is ever opened for writing, so that no archive
//! can reach outside the directory. Never makes a device that opens anything, and leaves
//! nothing behind when it fails.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::fs::{UTIME_OMIT, XattrFlags};
use rustix::io::Errno;

use crate::format::{Attributes, Kind, Member, Time};
use crate::owners::Owners;
use crate::reader::{self, CHUNK, Reader};
use crate::{Error, Summary};

/// The most memory for what directories get when everything is in them.
const MOST_PENDING: usize = 256 << 20;
/// The most warnings that are kept as text.
const MOST_WARNINGS: usize = 256;
/// How many directories are kept open on the way to where entries are made.
const OPEN_FOLDERS: usize = 64;
/// How many decompressed chunks wait for the thread that writes files.
const CHUNKS: usize = 8;

/// What an entry counts as that is nothing but a name.
const ENTRY: u64 = 4096;

/// What [`restore`] made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Regular files made; each further hard link counts as one.
    pub files: u64,
    /// Bytes of their content, holes included.
    pub bytes: u64,
    /// Whether the archive's seal was there (and held, or this would be an error).
    pub sealed: bool,
    /// What this user or file system did not permit: owners and attributes that were not
    /// set. At most 256.
    pub warnings: Vec<String>,
    /// How many more there were.
    pub more_warnings: u64,
}

/// Restores `archive` into the directory `into`, which must be empty or not exist (its parent
/// must).
///
/// Owners are restored when running as root; otherwise everything belongs to this user, and
/// what was setuid or setgid for somebody else no longer is (with a warning). The
/// archive is checked on the way as by [`crate::verify`]. Everything is synced (`syncfs`)
/// before this returns. Blocks; `cancelled` is looked at every 256 KiB and at every entry. On
/// any error what was made is removed again, `into` itself too unless it was there before.
///
/// A process killed meanwhile leaves a part of the files: restore beside the final place and
/// rename.
///
/// # Errors
/// [`Error::NotEmpty`], [`Error::Damaged`], [`Error::Refused`], [`Error::Cancelled`], or
/// what met the reading or making of files.
pub fn restore(archive: &Path, into: &Path, cancelled: &AtomicBool) -> Result<Restored, Error> {
    restore_as(archive, into, None, cancelled)
}

/// As [`restore`], with owners that have other numbers in archives than on this disk.
///
/// # Errors
/// As [`restore`].
pub fn restore_as(
    archive: &Path,
    into: &Path,
    owners: Option<Owners>,
    cancelled: &AtomicBool,
) -> Result<Restored, Error> {
    let file = File::open(archive).map_err(|e| Error::io("open the archive", archive, e))?;
    let given = Given { file: &file, name: archive, limit: None };
    restore_given(given, into, owners, cancelled)
}

/// An archive that was given to us by somebody, and need not have a name on this disk.
#[derive(Clone, Copy, Debug)]
pub struct Given<'a> {
    /// The archive. It is read from its beginning.
    pub file: &'a File,
    /// What errors call it.
    pub name: &'a Path,
    /// How many bytes on disk it may fill, not counting holes; each entry counts as 4 KiB more.
    pub limit: Option<u64>,
}

/// As [`restore_as`], from an open file.
///
/// # Errors
/// As [`restore`], and [`Error::TooLarge`].
pub fn restore_given(
    given: Given<'_>,
    into: &Path,
    owners: Option<Owners>,
    cancelled: &AtomicBool,
) -> Result<Restored, Error> {
    let Given { mut file, name: archive, limit } = given;
    let failed = |e| Error::io("read the archive", archive, e);
    file.rewind().map_err(failed)?;
    let mut magic = [0; 4];
    if file.read_at(&mut magic, 0).map_err(failed)? > 0 && !reader::is_zstandard(magic) {
        return Err(Error::damaged(archive, "it is not compressed with Zstandard (tar.zst)"));
    }
    let created = prepare(into)?;
    let mut place = match Place::new(archive, into, owners, cancelled) {
        Ok(place) => place,
        Err(e) => {
            if created {
                // It was just made and is empty; if it cannot go, the first error says why.
                let _ = fs::remove_dir(into);
            }
            return Err(e);
        }
    };
    place.limit = limit;
    let done = place.fill(file).and_then(|summary| place.finish().map(|()| summary));
    let done = done.and_then(|summary| place.sync().map(|()| summary));
    match done {
        Ok(summary) => Ok(Restored {
            files: summary.files,
            bytes: summary.bytes,
            sealed: summary.sealed,
            warnings: place.warnings,
            more_warnings: place.more_warnings,
        }),
        Err(e) => {
            place.undo(created);
            Err(e)
        }
    }
}

/// Makes `into` unless it is there and empty. Returns whether it was made.
pub fn prepare(into: &Path) -> Result<bool, Error> {
    match rustix::fs::mkdirat(CWD, into, Mode::RWXU) {
        Ok(()) => return Ok(true),
        Err(Errno::EXIST) => {}
        Err(e) => return Err(Error::io("make the directory", into, e)),
    }
    let stat = fs::symlink_metadata(into).map_err(|e| Error::io("look at", into, e))?;
    let empty = stat.is_dir()
        && fs::read_dir(into).map_err(|e| Error::io("read", into, e))?.next().is_none();
    if empty { Ok(false) } else { Err(Error::NotEmpty { path: into.to_path_buf() }) }
}

/// What a directory gets at the end.
struct Pending {
    path: Vec<u8>,
    /// Steps below the root.
    depth: usize,
    meta: Meta,
}

struct Meta {
    mode: u32,
    uid: u64,
    gid: u64,
    mtime: Time,
    xattrs: Attributes,
}

/// Where a tree is made.
pub struct Place<'a> {
    /// What it is made of.
    archive: &'a Path,
    into: &'a Path,
    cancelled: &'a AtomicBool,
    root: Rc<OwnedFd>,
    /// Directories on the way to the last one that was looked for, by their normalised paths.
    way: Vec<(Vec<u8>, Rc<OwnedFd>)>,
    pending: Vec<Pending>,
    pending_bytes: usize,
    user: Uid,
    group: Gid,
    owners: Option<Owners>,
    limit: Option<u64>,
    /// What counts towards the limit.
    filled: u64,
    pub(crate) warnings: Vec<String>,
    pub(crate) more_warnings: u64,
}

impl<'a> Place<'a> {
    /// A place in a folder that [`prepare`] has made. `archive` stands in errors for what it is
    /// made of.
    pub fn new(
        archive: &'a Path,
        into: &'a Path,
        owners: Option<Owners>,
        cancelled: &'a AtomicBool,
    ) -> Result<Self, Error> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, into, flags, Mode::empty())
            .map_err(|e| Error::io("open", into, e))?;
        Ok(Self {
            archive,
            into,
            cancelled,
            root: Rc::new(root),
            way: Vec::new(),
            pending: Vec::new(),
            pending_bytes: 0,
            user: rustix::process::geteuid(),
            group: rustix::process::getegid(),
            owners,
            limit: None,
            filled: 0,
            warnings: Vec::new(),
            more_warnings: 0,
        })
    }

    /// Decompresses in one thread, makes files in this one.
    fn fill(&mut self, file: &File) -> Result<Summary, Error> {
        let archive = self.archive;
        let mut decoder = reader::decoder(file, archive)?;
        thread::scope(|scope| {
            let (full_in, full_out) = sync_channel(CHUNKS);
            let (empty_in, empty_out) = sync_channel(CHUNKS + 2);
            let unpacker = thread::Builder::new()
                .name("denizen-unpack".into())
                .spawn_scoped(scope, move || decompress(&mut decoder, &full_in, &empty_out))
                .map_err(|e| Error::io("start a thread to decompress", archive, e))?;
            let chunks = Chunks { full: full_out, empty: empty_in, chunk: Vec::new(), at: 0 };
            // Takes the chunks along when it returns, whereupon the thread stops too.
            let done = self.make_all(Reader::new(chunks, archive), file);
            if unpacker.join().is_err() {
                return Err(Error::damaged(archive, "the decompressing thread panicked"));
            }
            done
        })
    }

    fn make_all(&mut self, mut reader: Reader<'_, Chunks>, file: &File) -> Result<Summary, Error> {
        while let Some(member) = reader.next_member()? {
            self.check_cancelled()?;
            let data = member.segments.as_ref().map_or(member.size, |segments| {
                segments.iter().map(|segment| segment.length).sum()
            });
            self.fill_up(data)?;
            self.make(member, |place, fd, member| place.content(fd, member, &mut reader))?;
        }
        reader.finish(file)
    }

    /// Counts an entry, before anything is made of it.
    fn fill_up(&mut self, data: u64) -> Result<(), Error> {
        self.filled = self.filled.saturating_add(ENTRY).saturating_add(data);
        match self.limit {
            Some(limit) if self.filled > limit => {
                Err(Error::TooLarge { path: self.archive.to_path_buf(), limit })
            }
            _ => Ok(()),
        }
    }

    /// Makes one entry; `content` writes what a regular file holds.
    pub fn make(
        &mut self,
        member: Member,
        content: impl FnOnce(&Self, &OwnedFd, &Member) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let path = self.normalise(&member.path)?;
        let (parent, name) = split(&path);
        let name = name.to_vec();
        if member.kind == Kind::Directory {
            return self.directory(path, member);
        }
        if name.is_empty() {
            return Err(self.refuse(&member, "stands for the volume but is no directory"));
        }
        let target = match member.kind {
            Kind::HardLink => Some(self.link_target(&member)?),
            _ => None,
        };
        let folder = self.folder(parent, Some(&member))?;
        let exists = |place: &Self, e| match e {
            Errno::EXIST => place.refuse(&member, "is in the archive twice"),
            e => place.failed("make", &member.path, e),
        };
        match member.kind {
            Kind::File => {
                let flags = OFlags::WRONLY
                    | OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(&folder, &*name, flags, Mode::RUSR | Mode::WUSR)
                    .map_err(|e| exists(self, e))?;
                content(self, &fd, &member)?;
                let path = member.path.clone();
                self.settle(fd.as_fd(), &path, &member.into())?;
            }
            Kind::HardLink => {
                if let Some((target_folder, target)) = target {
                    rustix::fs::linkat(&target_folder, &*target, &folder, &*name, AtFlags::empty())
                        .map_err(|e| match e {
                            Errno::NOENT => {
                                self.refuse(&member, "links to an entry that is not there")
                            }
                            Errno::PERM => self.refuse(&member, "links to a directory"),
                            e => exists(self, e),
                        })?;
                }
            }
            Kind::Symlink => {
                rustix::fs::symlinkat(member.link.as_slice(), &folder, &*name)
                    .map_err(|e| exists(self, e))?;
                self.settle_special(folder.as_fd(), &name, &member)?;
            }
            Kind::Fifo | Kind::Whiteout => {
                let kind = if member.kind == Kind::Fifo {
                    FileType::Fifo
                } else {
                    FileType::CharacterDevice
                };
                rustix::fs::mknodat(&folder, &*name, kind, Mode::RUSR | Mode::WUSR, 0)
                    .map_err(|e| exists(self, e))?;
                self.settle_special(folder.as_fd(), &name, &member)?;
            }
            Kind::Directory => {}
        }
        Ok(())
    }

    fn directory(&mut self, path: Vec<u8>, member: Member) -> Result<(), Error> {
        if !path.is_empty() {
            let (parent, name) = split(&path);
            let folder = self.folder(parent, Some(&member))?;
            match rustix::fs::mkdirat(&folder, name, Mode::RWXU) {
                Ok(()) => {}
                // Again, or made before as somebody's parent. Opening it fails if it is
                // anything but a directory.
                Err(Errno::EXIST) => {
                    open_folder(folder.as_fd(), name).map_err(|e| match e {
                        Errno::NOTDIR | Errno::LOOP => {
                            self.refuse(&member, "is in the archive twice")
                        }
                        e => self.failed("open", &member.path, e),
                    })?;
                }
                Err(e) => return Err(self.failed("make", &member.path, e)),
            }
        }
        let meta = Meta::from(member);
        let attributes: usize = meta.xattrs.iter().map(|(n, v)| n.len() + v.len() + 48).sum();
        self.pending_bytes += path.len() + size_of::<Pending>() + attributes;
        if self.pending_bytes > MOST_PENDING {
            return Err(Error::refused(self.archive, &path, "is one directory too many"));
        }
        let depth = if path.is_empty() { 0 } else { path.split(|&b| b == b'/').count() };
        self.pending.push(Pending { path, depth, meta });
        Ok(())
    }

    fn content(
        &self,
        fd: &OwnedFd,
        member: &Member,
        reader: &mut Reader<'_, Chunks>,
    ) -> Result<(), Error> {
        if member.segments.is_some() {
            rustix::fs::ftruncate(fd, member.size)
                .map_err(|e| self.failed("make", &member.path, e))?;
        }
        reader.content(member, |offset, bytes| {
            self.check_cancelled()?;
            self.write(fd, member, offset, bytes)
        })
    }

    /// Writes a part of what a file holds.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(
        &self,
        fd: &OwnedFd,
        member: &Member,
        mut offset: u64,
        mut bytes: &[u8],
    ) -> Result<(), Error> {
        while !bytes.is_empty() {
            let written = rustix::io::retry_on_intr(|| rustix::io::pwrite(fd, bytes, offset))
                .map_err(|e| self.failed("write", &member.path, e))?;
            bytes = &bytes[written..];
            offset += written as u64;
        }
        Ok(())
    }

    /// The directory a hard link's other name is in, and that name.
    fn link_target(&mut self, member: &Member) -> Result<(Rc<OwnedFd>, Vec<u8>), Error> {
        let path = match self.normalise(&member.link) {
            Ok(path) if !path.is_empty() => path,
            _ => return Err(self.refuse(member, "links to something outside")),
        };
        let (parent, name) = split(&path);
        // A target must be there already, so its parents are not made. Nor are they kept open:
        // the next entry is where the link is.
        let mut folder = self.root.clone();
        for step in parent.split(|&b| b == b'/').filter(|step| !step.is_empty()) {
            folder = Rc::new(open_folder(folder.as_fd(), step).map_err(|e| match e {
                Errno::NOENT => self.refuse(member, "links to an entry that is not there"),
                Errno::NOTDIR | Errno::LOOP => self.refuse(member, "links through a symlink"),
                e => self.failed("open", &member.link, e),
            })?);
        }
        Ok((folder, name.to_vec()))
    }

    /// Opens the directory `path`; makes what is missing on the way if it is for a new entry.
    fn folder(&mut self, path: &[u8], entry: Option<&Member>) -> Result<Rc<OwnedFd>, Error> {
        while self.way.last().is_some_and(|(known, _)| known != path && !is_below(path, known)) {
            self.way.pop();
        }
        let known = self.way.last().map(|(known, fd)| (known.len(), fd.clone()));
        let (mut done, mut fd) = known.unwrap_or_else(|| (0, self.root.clone()));
        while done < path.len() {
            let start = if done == 0 { 0 } else { done + 1 };
            let rest = &path[start..];
            done = start + rest.iter().position(|&b| b == b'/').unwrap_or(rest.len());
            let step = &path[start..done];
            let mut next = open_folder(fd.as_fd(), step);
            if entry.is_some() && matches!(next, Err(Errno::NOENT)) {
                rustix::fs::mkdirat(&fd, step, Mode::from_raw_mode(0o755))
                    .map_err(|e| self.failed("make", path, e))?;
                next = open_folder(fd.as_fd(), step);
            }
            fd = Rc::new(next.map_err(|e| match (e, entry) {
                (Errno::NOTDIR | Errno::LOOP, Some(member)) => {
                    self.refuse(member, "lies below a symlink or a file")
                }
                (e, _) => self.failed("open", path, e),
            })?);
            if self.way.len() == OPEN_FOLDERS {
                self.way.remove(0);
            }
            self.way.push((path[..done].to_vec(), fd.clone()));
        }
        Ok(fd)
    }

    /// Gives directories what they get, each after what is in it so that this can be reached.
    pub fn finish(&mut self) -> Result<(), Error> {
        let mut pending = std::mem::take(&mut self.pending);
        // Stable, so the last of several entries for one directory stays the last. No name has a
        // NUL in it: below comes after above, and neighbours are next to each other.
        let steps = |path: &[u8]| path.iter().map(|&b| if b == b'/' { 0 } else { b }).collect();
        pending.sort_by_cached_key(|it| std::cmp::Reverse::<Vec<u8>>(steps(&it.path)));
        let settled = pending
            .chunk_by(|a, b| a.path == b.path)
            .filter_map(<[Pending]>::last)
            .try_for_each(|directory| self.settle_directory(directory));
        // Still wanted if everything has to be removed again.
        self.pending = pending;
        settled
    }

    /// What was made.
    pub fn restored(self, files: u64, bytes: u64) -> Restored {
        let Self { warnings, more_warnings, .. } = self;
        Restored { files, bytes, sealed: true, warnings, more_warnings }
    }

    /// Writes everything to disk.
    pub fn sync(&self) -> Result<(), Error> {
        rustix::fs::syncfs(&self.root).map_err(|e| Error::io("write to disk", self.into, e))
    }

    fn settle_directory(&mut self, directory: &Pending) -> Result<(), Error> {
        self.check_cancelled()?;
        let (parent, name) = split(&directory.path);
        let fd = if name.is_empty() {
            self.root.clone()
        } else {
            let folder = self.folder(parent, None)?;
            let fd = open_folder(folder.as_fd(), name);
            Rc::new(fd.map_err(|e| self.failed("open", &directory.path, e))?)
        };
        self.settle(fd.as_fd(), &directory.path, &directory.meta)
    }

    /// Owner, then mode (a change of owner clears setuid), then attributes (a change of owner
    /// clears capabilities; an ACL is part of the mode), then the time.
    fn settle(&mut self, fd: BorrowedFd<'_>, path: &[u8], meta: &Meta) -> Result<(), Error> {
        let owned = self.own(path, meta.uid, meta.gid, |uid, gid| {
            rustix::fs::fchown(fd, Some(uid), Some(gid))
        })?;
        let mode = self.mode(path, meta.mode, owned);
        rustix::fs::fchmod(fd, mode).map_err(|e| self.failed("set the mode of", path, e))?;
        for (name, value) in &meta.xattrs {
            // A name with a NUL is no name for the kernel either.
            match rustix::fs::fsetxattr(fd, name.as_slice(), value, XattrFlags::empty()) {
                Ok(()) => {}
                Err(e) => {
                    let what =
                        format!("its attribute {} was not set", String::from_utf8_lossy(name));
                    self.not_permitted(path, &what, e)?;
                }
            }
        }
        rustix::fs::futimens(fd, &times(meta.mtime))
            .map_err(|e| self.failed("set the time of", path, e))
    }

    /// The same for what cannot be opened.
    fn settle_special(
        &mut self,
        folder: BorrowedFd<'_>,
        name: &[u8],
        member: &Member,
    ) -> Result<(), Error> {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let owned = self.own(&member.path, member.uid, member.gid, |uid, gid| {
            rustix::fs::chownat(folder, name, Some(uid), Some(gid), flags)
        })?;
        if member.kind != Kind::Symlink {
            let mode = self.mode(&member.path, member.mode, owned);
            rustix::fs::chmodat(folder, name, mode, AtFlags::empty())
                .map_err(|e| self.failed("set the mode of", &member.path, e))?;
        }
        rustix::fs::utimensat(folder, name, &times(member.mtime), flags)
            .map_err(|e| self.failed("set the time of", &member.path, e))
    }

    /// Sets the owner if that is possible; returns whether it is the recorded one now.
    fn own(
        &mut self,
        path: &[u8],
        uid: u64,
        gid: u64,
        change: impl FnOnce(Uid, Gid) -> Result<(), Errno>,
    ) -> Result<bool, Error> {
        let (uid, gid, fits) = self.owners.map_or((uid, gid, true), |it| it.find(uid, gid));
        if !self.user.is_root() {
            let mine = (uid, gid) == (self.user.as_raw().into(), self.group.as_raw().into());
            return Ok(mine && fits);
        }
        // The highest number means "leave it" to chown(2).
        let id = |id: u64| u32::try_from(id).ok().filter(|id| *id != u32::MAX);
        let (Some(uid), Some(gid)) = (id(uid), id(gid)) else {
            self.warn(path, "its owner is no possible one", None);
            return Ok(false);
        };
        match change(Uid::from_raw(uid), Gid::from_raw(gid)) {
            Ok(()) => Ok(fits),
            Err(e) => self.not_permitted(path, "its owner was not set", e).map(|()| false),
        }
    }

    /// A program that runs as its owner must not run as somebody else's choice of owner.
    fn mode(&mut self, path: &[u8], mode: u32, owned: bool) -> Mode {
        let mut mode = Mode::from_raw_mode(mode);
        let special = Mode::SUID | Mode::SGID;
        if !owned && mode.intersects(special) {
            mode -= special;
            self.warn(path, "it lost setuid and setgid, having another owner now", None);
        }
        mode
    }

    /// A refusal is told, any other failure (a full disk, a broken one) ends the restore.
    fn not_permitted(&mut self, path: &[u8], what: &str, errno: Errno) -> Result<(), Error> {
        match errno {
            Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP | Errno::INVAL => {
                self.warn(path, what, Some(errno));
                Ok(())
            }
            errno => Err(self.failed("set the owner or an attribute of", path, errno)),
        }
    }

    fn warn(&mut self, path: &[u8], what: &str, errno: Option<Errno>) {
        if self.warnings.len() >= MOST_WARNINGS {
            self.more_warnings += 1;
            return;
        }
        let path = self.at(path);
        let why = errno.map_or_else(String::new, |e| format!(" ({e})"));
        self.warnings.push(format!("{}: {what}{why}", path.display()));
    }

    /// The steps of a name, joined by single slashes; empty for the volume itself.
    fn normalise(&self, path: &[u8]) -> Result<Vec<u8>, Error> {
        if path.starts_with(b"/") {
            return Err(Error::refused(self.archive, path, "has an absolute name"));
        }
        let mut plain = Vec::with_capacity(path.len());
        for step in path.split(|&b| b == b'/') {
            match step {
                b"" | b"." => {}
                b".." => return Err(Error::refused(self.archive, path, "has `..` in its name")),
                step => {
                    if !plain.is_empty() {
                        plain.push(b'/');
                    }
                    plain.extend_from_slice(step);
                }
            }
        }
        Ok(plain)
    }

    fn refuse(&self, member: &Member, reason: &'static str) -> Error {
        Error::refused(self.archive, &member.path, reason)
    }

    /// An error that met an entry.
    pub fn failed(&self, action: &'static str, path: &[u8], errno: Errno) -> Error {
        Error::io(action, &self.at(path), errno)
    }

    fn at(&self, path: &[u8]) -> PathBuf {
        self.into.join(OsStr::from_bytes(path.strip_prefix(b"./").unwrap_or(path)))
    }

    /// Fails if it is no longer wanted.
    pub fn check_cancelled(&self) -> Result<(), Error> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Error::Cancelled { path: self.archive.to_path_buf() });
        }
        Ok(())
    }

    /// Removes what was made. A failure here is not reported: the one that led here is.
    pub fn undo(&mut self, created: bool) {
        // A directory that already has its own mode may not let us in.
        let mut made: Vec<_> = std::mem::take(&mut self.pending);
        made.sort_by_key(|directory| directory.depth);
        for directory in &made {
            let (parent, name) = split(&directory.path);
            if let Ok(folder) = self.folder(parent, None) {
                let _ = rustix::fs::chmodat(&folder, name, Mode::RWXU, AtFlags::empty());
            }
        }
        if created {
            let _ = rustix::fs::fchmod(&self.root, Mode::RWXU);
            let _ = fs::remove_dir_all(self.into);
            return;
        }
        for entry in fs::read_dir(self.into).into_iter().flatten().flatten() {
            let path = entry.path();
            let _ = match entry.file_type() {
                Ok(kind) if kind.is_dir() => fs::remove_dir_all(path),
                _ => fs::remove_file(path),
            };
        }
    }
}

impl From<Member> for Meta {
    fn from(member: Member) -> Self {
        let Member { mode, uid, gid, mtime, xattrs, .. } = member;
        Self { mode, uid, gid, mtime, xattrs }
    }
}

fn times(mtime: Time) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanoseconds.into() },
    }
}

fn open_folder(from: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(from, name, flags, Mode::empty())
}

/// The parent's path and the last step.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

fn is_below(path: &[u8], above: &[u8]) -> bool {
    path.strip_prefix(above).is_some_and(|rest| rest.starts_with(b"/"))
}

/// Fills chunks until the end, an error, or until nobody takes them any more.
fn decompress(
    from: &mut impl Read,
    full: &SyncSender<io::Result<Vec<u8>>>,
    empty: &Receiver<Vec<u8>>,
) {
    loop {
        let mut chunk = empty.try_recv().unwrap_or_default();
        chunk.resize(CHUNK, 0);
        let mut length = 0;
        let mut ended = false;
        let mut failed = None;
        while length < CHUNK && !ended && failed.is_none() {
            match from.read(&mut chunk[length..]) {
                Ok(0) => ended = true,
                Ok(got) => length += got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => failed = Some(e),
            }
        }
        chunk.truncate(length);
        if length > 0 && full.send(Ok(chunk)).is_err() {
            return;
        }
        if let Some(e) = failed {
            // If nobody is there to hear of it, nobody minds.
            let _ = full.send(Err(e));
            return;
        }
        if ended {
            return;
        }
    }
}

/// The other end of [`decompress`].
struct Chunks {
    full: Receiver<io::Result<Vec<u8>>>,
    empty: SyncSender<Vec<u8>>,
    chunk: Vec<u8>,
    at: usize,
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let ready = self.fill_buf()?;
        let length = ready.len().min(buffer.len());
        buffer[..length].copy_from_slice(&ready[..length]);
        self.consume(length);
        Ok(length)
    }
}

impl BufRead for Chunks {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.chunk.len() {
            // The sender is gone when it has sent everything.
            let next = self.full.recv().unwrap_or_else(|_| Ok(Vec::new()))?;
            self.at = 0;
            let used = std::mem::replace(&mut self.chunk, next);
            if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
                self.empty.try_send(used)
            {
                // Then it is simply freed.
            }
        }
        Ok(&self.chunk[self.at..])
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount;
    }
}
