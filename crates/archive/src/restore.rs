//! Makes the files of an archive again, in a new directory.
//!
//! Every entry is made relative to an open directory, each step of its path opened without
//! following symlinks, and nothing that exists is ever opened for writing, so that no archive
//! can reach outside the directory. Never makes a device that opens anything, and leaves
//! nothing behind when it fails.
//!
//! A directory gets its owner, mode and time when the way to the next entry leads out of it, so
//! that what is to be remembered is only that of the directories on the way. An archive may come
//! back to one: it is opened to us again, and gets back what it had when it is left again.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufRead, Read, Seek};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, RenameFlags, Stat, Timespec};
use rustix::fs::{Timestamps, UTIME_OMIT, Uid, XattrFlags, renameat_with};
use rustix::io::Errno;

use crate::format::{Attributes, Kind, MAX_PATH, MAX_WEIGHT, Member, Time, weight};
use crate::owners::Owners;
use crate::reader::{self, CHUNK, Reader};
use crate::walk::{XATTR_LIST, is_kept};
use crate::{Error, Summary};

/// The most that the attributes of all directories on the way may weigh. More than is ever
/// written: the directory restored into may have some of its own.
const MOST_WEIGHT: usize = 2 * MAX_WEIGHT;
/// The most warnings that are kept as text.
const MOST_WARNINGS: usize = 256;
/// How many directories are kept open on the way to where entries are made.
const OPEN_FOLDERS: usize = 64;
/// The attribute with which a directory gives lists of access to what is made in it.
const INHERITED: &[u8] = b"system.posix_acl_default";
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
    /// Where in the directory the folder is that was kept beside the volume.
    pub beside: Beside,
    /// What this user or file system did not permit: owners and attributes that were not
    /// set. At most 256.
    pub warnings: Vec<String>,
    /// How many more there were.
    pub more_warnings: u64,
}

/// What an archive says of a folder that was kept beside the volume
/// ([`Source::beside`](crate::Source::beside)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Beside {
    /// There was none: all of it is the volume's.
    Nothing,
    /// It has this name in the volume's root, which nothing of the volume's had. Whether it was
    /// found there is not said.
    Named(OsString),
    /// Nothing: it is an archive from before they did, or of another program. If there was such a
    /// folder, it is [`BESIDE`](crate::BESIDE); but so may be one of the volume's own.
    Unsaid,
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
    let done = place.fill(file).and_then(|done| place.finish().map(|()| done));
    let done = done.and_then(|done| place.sync().map(|()| done));
    match done {
        Ok((summary, beside)) => Ok(Restored {
            files: summary.files,
            bytes: summary.bytes,
            sealed: summary.sealed,
            beside,
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

/// What a file or directory gets when all is in it.
struct Meta {
    mode: u32,
    /// User and group; nobody else than it has already, if there are none.
    owner: Option<(u64, u64)>,
    mtime: Time,
    xattrs: Attributes,
}

/// A directory on the way to where entries are made.
struct Folder {
    /// Closed while far below it.
    fd: Option<Rc<OwnedFd>>,
    id: FileId,
    /// The length of its path.
    path: usize,
    /// What it gets when the way leads out of it.
    due: Meta,
}

/// Which file of which file system.
type FileId = (u64, u64);

/// Where a tree is made.
pub struct Place<'a> {
    /// What it is made of.
    archive: &'a Path,
    into: &'a Path,
    cancelled: &'a AtomicBool,
    root: Rc<OwnedFd>,
    /// From the root to where entries are made.
    way: Vec<Folder>,
    /// Where the way ends, and its normalised path.
    here: Rc<OwnedFd>,
    path: Vec<u8>,
    /// What the attributes of all on the way weigh.
    weight: usize,
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
        let top = rustix::fs::fstat(&root).and_then(|stat| Folder::found(&root, &stat, 0));
        let top = top.map_err(|e| Error::io("open", into, e))?;
        let root = Rc::new(root);
        Ok(Self {
            archive,
            into,
            cancelled,
            here: root.clone(),
            weight: weight(&top.due.xattrs),
            way: vec![Folder { fd: Some(root.clone()), ..top }],
            root,
            path: Vec::new(),
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
    fn fill(&mut self, file: &File) -> Result<(Summary, Beside), Error> {
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

    fn make_all(
        &mut self,
        mut reader: Reader<'_, Chunks>,
        file: &File,
    ) -> Result<(Summary, Beside), Error> {
        while let Some(member) = reader.next_member()? {
            self.check_cancelled()?;
            let data = member.segments.as_ref().map_or(member.size, |segments| {
                segments.iter().map(|segment| segment.length).sum()
            });
            self.fill_up(data)?;
            self.make(member, |place, fd, member| place.content(fd, member, &mut reader))?;
        }
        let beside = reader.beside();
        Ok((reader.finish(file)?, beside))
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
        if member.path.len() > MAX_PATH {
            return Err(self.refuse(&member, "has a name of more than 64 KiB"));
        }
        let path = self.normalise(&member.path)?;
        if member.kind == Kind::Directory {
            return self.directory(&path, member);
        }
        let (parent, name) = split(&path);
        if name.is_empty() {
            return Err(self.refuse(&member, "stands for the volume but is no directory"));
        }
        self.lead_to(parent, &member)?;
        let folder = self.here.clone();
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
                let fd = rustix::fs::openat(&folder, name, flags, Mode::RUSR | Mode::WUSR)
                    .map_err(|e| exists(self, e))?;
                content(self, &fd, &member)?;
                let path = member.path.clone();
                self.settle(fd.as_fd(), &path, &member.into())?;
            }
            Kind::HardLink => self.link(&member, |target, target_name| {
                let flags = AtFlags::empty();
                rustix::fs::linkat(target, target_name, &folder, name, flags).map_err(|e| match e {
                    Errno::NOENT => self.refuse(&member, "links to an entry that is not there"),
                    Errno::PERM => self.refuse(&member, "links to a directory"),
                    e => exists(self, e),
                })
            })?,
            Kind::Symlink => {
                rustix::fs::symlinkat(member.link.as_slice(), &folder, name)
                    .map_err(|e| exists(self, e))?;
                self.settle_special(folder.as_fd(), name, &member)?;
            }
            Kind::Fifo | Kind::Whiteout => {
                let kind = if member.kind == Kind::Fifo {
                    FileType::Fifo
                } else {
                    FileType::CharacterDevice
                };
                rustix::fs::mknodat(&folder, name, kind, Mode::RUSR | Mode::WUSR, 0)
                    .map_err(|e| exists(self, e))?;
                self.settle_special(folder.as_fd(), name, &member)?;
            }
            Kind::Directory => {}
        }
        Ok(())
    }

    fn directory(&mut self, path: &[u8], member: Member) -> Result<(), Error> {
        let mut is_new = false;
        if !is_at_or_below(&self.path, path) {
            let (parent, name) = split(path);
            self.lead_to(parent, &member)?;
            is_new = match rustix::fs::mkdirat(&self.here, name, Mode::RWXU) {
                Ok(()) => true,
                // Again, or made before as somebody's parent.
                Err(Errno::EXIST) => false,
                Err(e) => return Err(self.failed("make", &member.path, e)),
            };
            self.enter(name, &member, "is in the archive twice")?;
        }
        self.lead_to(path, &member)?;
        self.bear(&member.xattrs, &member)?;
        // What is told last holds.
        let was_left = self.way.last().is_some_and(|last| last.due.owner.is_none());
        if was_left && !is_new && !path.is_empty() {
            clear_attributes(&self.here)
                .map_err(|e| self.failed("remove an attribute of", &member.path, e))?;
        }
        if let Some(last) = self.way.last_mut() {
            self.weight -= weight(&last.due.xattrs);
            last.due = Meta::from(member);
        }
        Ok(())
    }

    /// Counts attributes that are to be remembered.
    fn bear(&mut self, attributes: &Attributes, entry: &Member) -> Result<(), Error> {
        self.weight += weight(attributes);
        if self.weight > MOST_WEIGHT {
            return Err(self.refuse(entry, "has, with those above it, too many attributes"));
        }
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

    /// Hands over the directory a hard link's other name is in, and that name.
    fn link(
        &self,
        member: &Member,
        link: impl FnOnce(&OwnedFd, &[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let path = match self.normalise(&member.link) {
            Ok(path) if !path.is_empty() => path,
            _ => return Err(self.refuse(member, "links to something outside")),
        };
        let (parent, name) = split(&path);
        // A target must be there already, so its parents are not made. Nor are they on the way:
        // the next entry is where the link is.
        let close = |folder: &OwnedFd, was: &Stat| {
            let closed = is_closed(was).then(|| rustix::fs::fchmod(folder, mode_of(was)));
            closed.unwrap_or(Ok(())).map_err(|e| self.failed("set the mode of", &member.link, e))
        };
        let mut last: Option<(OwnedFd, Stat)> = None;
        for step in parent.split(|&b| b == b'/').filter(|step| !step.is_empty()) {
            let from = last.as_ref().map_or(&*self.root, |(folder, _)| folder);
            let next = let_in(from.as_fd(), step).map_err(|e| match e {
                Errno::NOENT => self.refuse(member, "links to an entry that is not there"),
                Errno::NOTDIR | Errno::LOOP => self.refuse(member, "links through a symlink"),
                e => self.failed("open", &member.link, e),
            })?;
            if let Some((folder, was)) = last.replace(next) {
                close(&folder, &was)?;
            }
        }
        link(last.as_ref().map_or(&*self.root, |(folder, _)| folder), name)?;
        last.map_or(Ok(()), |(folder, was)| close(&folder, &was))
    }

    /// Leads the way to the directory `path`, out of others, and makes what is missing for
    /// `entry`.
    fn lead_to(&mut self, path: &[u8], entry: &Member) -> Result<(), Error> {
        while !is_at_or_below(path, &self.path) {
            self.leave()?;
        }
        loop {
            let rest = &path[self.path.len()..];
            let rest = rest.strip_prefix(b"/").unwrap_or(rest);
            let step = rest.split(|&b| b == b'/').next().unwrap_or_default();
            if step.is_empty() {
                return Ok(());
            }
            match rustix::fs::mkdirat(&self.here, step, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(self.failed("make", path, e)),
            }
            self.enter(step, entry, "lies below a symlink or a file")?;
        }
    }

    /// Leads the way on, into a directory that is there; if it is none, the entry is refused for
    /// that reason.
    fn enter(&mut self, step: &[u8], entry: &Member, reason: &'static str) -> Result<(), Error> {
        let path = self.path.len() + usize::from(!self.path.is_empty()) + step.len();
        let found = let_in(self.here.as_fd(), step)
            .and_then(|(fd, stat)| Folder::found(&fd, &stat, path).map(|folder| (fd, folder)));
        let (fd, folder) = found.map_err(|e| match e {
            Errno::NOTDIR | Errno::LOOP => self.refuse(entry, reason),
            e => self.failed("open", &entry.path, e),
        })?;
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(step);
        self.here = Rc::new(fd);
        self.bear(&folder.due.xattrs, entry)?;
        self.way.push(Folder { fd: Some(self.here.clone()), ..folder });
        if let Some(far) = self.way.len().checked_sub(OPEN_FOLDERS + 1) {
            self.way[far].fd = None;
        }
        Ok(())
    }

    /// Leads the way back out of the last directory, and gives it what it gets.
    fn leave(&mut self) -> Result<(), Error> {
        self.check_cancelled()?;
        let Some(Folder { due, .. }) = self.way.pop() else { return Ok(()) };
        let done = self.here.clone();
        if let Some(above) = self.way.last_mut() {
            // First, as what is done may let nobody through.
            let fd = above.fd.take().map_or_else(|| open_above(&done, above.id), Ok);
            let fd = fd.map_err(|e| Error::io("open what is above", &at(self.into, &self.path), e));
            self.here = fd?;
            above.fd = Some(self.here.clone());
            let kept = above.path;
            self.weight -= weight(&due.xattrs);
            let path = std::mem::take(&mut self.path);
            self.settle(done.as_fd(), &path, &due)?;
            self.path = path;
            self.path.truncate(kept);
            return Ok(());
        }
        self.settle(done.as_fd(), b"", &due)
    }

    /// Gives what it gets to every directory that is still on the way. Nothing more can be made.
    pub fn finish(&mut self) -> Result<(), Error> {
        while !self.way.is_empty() {
            self.leave()?;
        }
        Ok(())
    }

    /// What was made.
    pub fn restored(self, files: u64, bytes: u64) -> Restored {
        let Self { warnings, more_warnings, .. } = self;
        let beside = Beside::Unsaid;
        Restored { files, bytes, sealed: true, beside, warnings, more_warnings }
    }

    /// Writes everything to disk.
    pub fn sync(&self) -> Result<(), Error> {
        rustix::fs::syncfs(&self.root).map_err(|e| Error::io("write to disk", self.into, e))
    }

    /// Owner, then mode (a change of owner clears setuid), then attributes (a change of owner
    /// clears capabilities; an ACL is part of the mode), then the time.
    fn settle(&mut self, fd: BorrowedFd<'_>, path: &[u8], meta: &Meta) -> Result<(), Error> {
        let change = |uid, gid| rustix::fs::fchown(fd, Some(uid), Some(gid));
        let owned = match meta.owner {
            Some((uid, gid)) => self.own(path, uid, gid, change)?,
            None => true,
        };
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
        at(self.into, path)
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
        if created {
            let _ = rustix::fs::fchmod(&self.root, Mode::RWXU);
        }
        let _ = clear(&self.root);
        if created {
            let _ = fs::remove_dir(self.into);
        }
    }
}

impl Folder {
    /// A directory that is there, and is to get back what it has. Until then nothing that is
    /// made in it inherits a list of access.
    fn found(fd: &OwnedFd, stat: &Stat, path: usize) -> Result<Self, Errno> {
        let mut xattrs = Vec::new();
        match rustix::fs::fgetxattr_query(fd, INHERITED) {
            Ok(size) => {
                let mut value = vec![0; size];
                let size = rustix::fs::fgetxattr(fd, INHERITED, value.as_mut_slice())?;
                value.truncate(size);
                rustix::fs::fremovexattr(fd, INHERITED)?;
                xattrs.push((INHERITED.to_vec(), value));
            }
            Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e),
        }
        let mtime = Time {
            seconds: stat.st_mtime,
            // Below a thousand million, always.
            nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        };
        let due = Meta { mode: stat.st_mode, owner: None, mtime, xattrs };
        Ok(Self { fd: None, id: (stat.st_dev, stat.st_ino), path, due })
    }
}

impl From<Member> for Meta {
    fn from(member: Member) -> Self {
        let Member { mode, uid, gid, mtime, xattrs, .. } = member;
        Self { mode, owner: Some((uid, gid)), mtime, xattrs }
    }
}

fn at(into: &Path, path: &[u8]) -> PathBuf {
    into.join(OsStr::from_bytes(path.strip_prefix(b"./").unwrap_or(path)))
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

/// Opens a directory to us, also where the mode that it was given keeps us out. Returns what it
/// was before, too.
fn let_in(from: BorrowedFd<'_>, name: &[u8]) -> Result<(OwnedFd, Stat), Errno> {
    let (fd, was) = match open_folder(from, name) {
        Ok(fd) => {
            let was = rustix::fs::fstat(&fd)?;
            (fd, was)
        }
        Err(Errno::ACCESS) => {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let found = rustix::fs::openat(from, name, flags, Mode::empty())?;
            let was = rustix::fs::fstat(&found)?;
            // chmod(2) by name follows a symlink; by descriptor, it is what was found.
            let itself = format!("/proc/self/fd/{}", found.as_raw_fd());
            rustix::fs::chmodat(CWD, itself, Mode::RWXU, AtFlags::empty())?;
            (open_folder(found.as_fd(), b".")?, was)
        }
        Err(e) => return Err(e),
    };
    if is_closed(&was) {
        rustix::fs::fchmod(&fd, mode_of(&was) | Mode::RWXU)?;
    }
    Ok((fd, was))
}

/// Whether its owner may not do everything in a directory.
fn is_closed(was: &Stat) -> bool {
    !mode_of(was).contains(Mode::RWXU)
}

fn mode_of(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode)
}

/// The directory above one, which must be the one that was gone through.
fn open_above(below: &OwnedFd, id: FileId) -> Result<Rc<OwnedFd>, Errno> {
    let above = open_folder(below.as_fd(), b"..")?;
    let stat = rustix::fs::fstat(&above)?;
    if (stat.st_dev, stat.st_ino) == id { Ok(Rc::new(above)) } else { Err(Errno::STALE) }
}

/// Removes what archives give to a directory.
fn clear_attributes(folder: &OwnedFd) -> Result<(), Errno> {
    let mut names = vec![0; XATTR_LIST];
    let length = match rustix::fs::flistxattr(folder, names.as_mut_slice()) {
        Err(Errno::OPNOTSUPP) => 0,
        length => length?,
    };
    let mut kept = names[..length].split(|&b| b == 0).filter(|name| is_kept(name));
    kept.try_for_each(|name| rustix::fs::fremovexattr(folder, name))
}

/// Removes all that is in a directory, however deep it is, and also where a directory is closed
/// to its owner. What is further down than one step comes up before it goes.
fn clear(top: &OwnedFd) -> Result<(), Errno> {
    let mut moved = 0_u64;
    loop {
        let names = names_in(top)?;
        if names.is_empty() {
            return Ok(());
        }
        for name in &names {
            if unlink(top, name)? {
                continue;
            }
            let (below, _) = let_in(top.as_fd(), name)?;
            for name in &names_in(&below)? {
                if unlink(&below, name)? {
                    continue;
                }
                // To move it wants the right to change it.
                let_in(below.as_fd(), name)?;
                loop {
                    moved += 1;
                    let up = format!(".{moved}");
                    match renameat_with(&below, name.as_slice(), top, up, RenameFlags::NOREPLACE) {
                        Err(Errno::EXIST) => {}
                        done => break done?,
                    }
                }
            }
            rustix::fs::unlinkat(top, name.as_slice(), AtFlags::REMOVEDIR)?;
        }
    }
}

/// Removes a name, unless it is a directory's.
fn unlink(folder: &OwnedFd, name: &[u8]) -> Result<bool, Errno> {
    match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::ISDIR | Errno::PERM) => Ok(false),
        Err(e) => Err(e),
    }
}

fn names_in(folder: &OwnedFd) -> Result<Vec<Vec<u8>>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(name);
        }
    }
    Ok(names)
}

/// The parent's path and the last step.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// The root's path, which is empty, is above all.
fn is_at_or_below(path: &[u8], above: &[u8]) -> bool {
    path.strip_prefix(above)
        .is_some_and(|rest| above.is_empty() || rest.is_empty() || rest.starts_with(b"/"))
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
