//! Shared folders: files that several sessions have at once, each at a path of its own, and that
//! stay when all of those sessions are gone.
//!
//! Sessions change them while this looks, and may try to lead it astray: every path is looked up
//! by the kernel within the folder, whatever links there are (`RESOLVE_IN_ROOT` in openat2(2)).
//! What is written from here is made beside the folder, where no session sees it, and is there
//! with one rename. Nothing here may ever open anything but a file or a folder.
//!
//! They are as good as the disk that they are on, as snapshots are: in no session's backup.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use denizen_archive::Owners;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Stat, Uid};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::event::unix_seconds;

/// Where the files are, below a shared folder's own; what is there is the sessions'.
const FILES: &str = "files";
/// What is being written or removed.
const STAGING: &str = "staging";
/// Whose files are that nobody is named for: the first user that is no program's, as useradd(8)
/// numbers them.
const USUAL_OWNER: u32 = 1000;
/// How often a path is looked up again while others move what it leads through.
const TRIES: u32 = 64;
/// The bits of a mode that can be chosen.
const PERMISSIONS: u32 = 0o7777;
/// The most mounts of one session.
const MOST_MOUNTS: usize = 32;
/// The most that is listed at once: entries, and bytes of their paths.
const MOST_ENTRIES: usize = 100_000;
const MOST_BYTES: usize = 16 << 20;
/// After so many bytes of a file, what room there is left is looked at again.
const LOOK: u64 = 16 << 20;

/// A shared folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Share {
    /// What it is, whatever it is called.
    pub id: Uuid,
    /// Its name; no other one has it.
    pub name: String,
    /// When it was made.
    #[serde(serialize_with = "unix_seconds")]
    pub created_at: SystemTime,
}

/// That a session has a shared folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Which one.
    pub share: Uuid,
    /// Where in the session's root. It is made, if it is not there.
    pub path: String,
}

impl Mount {
    /// Whether a path is another one or below it.
    fn is_below(path: &str, of: &str) -> bool {
        path.strip_prefix(of).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// The folders on the way to it and itself, from the top.
    pub(crate) fn folders(&self) -> impl Iterator<Item = &str> {
        let ends = self.path.char_indices().skip(1).filter(|(_, c)| *c == '/').map(|(at, _)| at);
        ends.chain([self.path.len()]).map(|end| &self.path[..end])
    }
}

/// What is wrong with where a session is to have its shared folders, if something is.
pub(crate) fn problem(mounts: &[Mount]) -> Option<String> {
    if mounts.len() > MOST_MOUNTS {
        return Some(format!("there are more than {MOST_MOUNTS}"));
    }
    for (at, Mount { path, .. }) in mounts.iter().enumerate() {
        let plain = path.strip_prefix('/').is_some_and(|rest| {
            rest.split('/').all(|part| !matches!(part, "" | "." | "..")) && !path.contains('\0')
        });
        if !plain || path.len() > 1024 {
            return Some(format!("{path:?} is no plain absolute path"));
        }
        let below = |of: &str| Mount::is_below(path, of);
        if path == "/volume" || ["/dev", "/proc", "/run", "/sys"].into_iter().any(below) {
            return Some(format!("at {path} a session has what it needs"));
        }
        // Whoever else has the outer one could have the inner one never find its place.
        let meets = |other: &Mount| below(&other.path) || Mount::is_below(&other.path, path);
        if mounts[..at].iter().any(meets) {
            return Some(format!("another one is at {path}, or one within the other"));
        }
    }
    None
}

/// What something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShareEntryKind {
    /// A file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link.
    Link,
    /// A pipe or a socket, which is of use only where it was made.
    Other,
}

/// Something in a shared folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareEntry {
    /// Its path from the top of the shared folder, beginning with `/`.
    pub path: PathBuf,
    /// What it is.
    pub kind: ShareEntryKind,
    /// Bytes.
    pub size: u64,
    /// The permissions of chmod(2).
    pub mode: u32,
    /// Its owner, as sessions number them.
    pub user: u32,
    /// And group.
    pub group: u32,
    /// When it was last read, as far as the file system takes note of that.
    pub accessed: SystemTime,
    /// When its content last changed.
    pub modified: SystemTime,
    /// When anything of it last changed.
    pub changed: SystemTime,
    /// Where a link leads.
    pub target: Option<PathBuf>,
}

/// What can be said of something when it is made, and later. What is not said is as it was; of
/// something new, it is the usual.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShareOwner {
    /// Its owner, as sessions number them.
    pub user: Option<u32>,
    /// And group.
    pub group: Option<u32>,
    /// The permissions of chmod(2).
    pub mode: Option<u32>,
}

/// The files of a shared folder. Everything here blocks.
#[derive(Clone, Debug)]
pub struct SharedFiles {
    folder: PathBuf,
    owners: Option<Owners>,
    /// How many bytes there may be.
    limit: Option<u64>,
}

impl SharedFiles {
    pub(crate) fn new(folder: PathBuf, owners: Option<Owners>, limit: Option<u64>) -> Self {
        Self { folder, owners, limit }
    }

    /// Makes the folder, on the disk for good.
    pub(crate) fn make(&self) -> io::Result<()> {
        let files = self.files();
        for folder in [&self.folder, &files, &self.staging()] {
            DirBuilder::new().mode(0o700).create(folder)?;
        }
        let top = open_folder(&files)?;
        // Whoever a session's user is, the folder is theirs as much as anybody's.
        self.settle(&top, ShareOwner { mode: Some(0o777), ..ShareOwner::default() }, None)?;
        File::open(&self.folder)?.sync_all()?;
        self.folder.parent().map_or(Ok(()), |all| File::open(all)?.sync_all())
    }

    /// Removes what an earlier process was about to write or had begun to remove.
    pub(crate) fn clear(&self) -> io::Result<()> {
        for name in fs::read_dir(self.staging())? {
            crate::volume::remove_tree(&name?.path())?;
        }
        Ok(())
    }

    /// Whether there is nothing in it, as far as can be seen.
    pub(crate) fn is_empty(&self) -> bool {
        fs::read_dir(self.files()).map_or_else(
            |error| error.kind() == io::ErrorKind::NotFound,
            |mut names| names.next().is_none(),
        )
    }

    /// What sessions have as theirs.
    pub(crate) fn files(&self) -> PathBuf {
        self.folder.join(FILES)
    }

    fn staging(&self) -> PathBuf {
        self.folder.join(STAGING)
    }

    /// What is at a path; of a link, the link.
    ///
    /// # Errors
    /// `NotFound`, `NotADirectory`; `InvalidInput` if the path has `..` in it.
    pub fn inspect(&self, path: &Path) -> io::Result<ShareEntry> {
        let place = self.place(path)?;
        self.entry(&place.folder, place.name(), place.path.clone())
    }

    /// What is in a folder and, to a depth of more than one, in those below it; by path.
    ///
    /// # Errors
    /// `NotFound`, `NotADirectory`; `InvalidInput` if the path has `..` in it.
    pub fn list(&self, path: &Path, depth: u32) -> io::Result<Vec<ShareEntry>> {
        let path = normal(path)?;
        let open = |path: &Path| self.open(path, OFlags::RDONLY | OFlags::DIRECTORY);
        let (mut all, mut bytes) = (Vec::new(), 0);
        let mut deeper = Vec::new();
        let mut here = Some((open(&path)?, path, depth));
        while let Some((folder, path, depth)) = here.take() {
            for found in rustix::fs::Dir::read_from(&folder)? {
                let found = found?;
                let name = OsStr::from_bytes(found.file_name().to_bytes());
                if matches!(name.as_bytes(), b"." | b"..") {
                    continue;
                }
                let below = path.join(name);
                let Ok(entry) = self.entry(&folder, name, below.clone()) else { continue };
                bytes += below.as_os_str().len();
                if all.len() == MOST_ENTRIES || bytes > MOST_BYTES {
                    let why = "there is more in it than is listed at once: list its folders";
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
                }
                if entry.kind == ShareEntryKind::Folder && depth > 1 {
                    deeper.push((below, depth - 1));
                }
                all.push(entry);
            }
            // What was there a moment ago may be gone.
            while let (None, Some((path, depth))) = (&here, deeper.pop()) {
                here = open(&path).ok().map(|folder| (folder, path, depth));
            }
        }
        all.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(all)
    }

    /// Opens a file to be read; a link is followed, within the folder.
    ///
    /// # Errors
    /// `NotFound`, `IsADirectory`; `InvalidInput` if it is no file, or the path has `..` in it.
    pub fn read(&self, path: &Path) -> io::Result<File> {
        // Nobody is waited for at the other end of a pipe.
        let file = self.open(&normal(path)?, OFlags::RDONLY | OFlags::NONBLOCK)?;
        match FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) {
            FileType::RegularFile => Ok(File::from(file)),
            FileType::Directory => Err(io::ErrorKind::IsADirectory.into()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Begins a file, which is there when [`SharedFile::finish`] says so.
    ///
    /// # Errors
    /// As [`SharedFiles::inspect`]; `StorageFull` if the folder has as much as it may have.
    pub fn write(&self, path: &Path) -> io::Result<SharedFile> {
        // So that what cannot be put there is refused before it is sent.
        let place = self.place(path)?;
        place.name.as_ref().ok_or(io::ErrorKind::IsADirectory)?;
        let room = self.room()?;
        let staged = self.staging().join(Uuid::new_v4().to_string());
        let file = File::create_new(&staged)?;
        let of = self.clone();
        let staged = Staged(Some(staged));
        Ok(SharedFile { of, path: place.path, staged, file, room, since: 0 })
    }

    /// Makes a folder, with `parents` those on the way to it too, and none that is there already.
    ///
    /// # Errors
    /// `AlreadyExists`, without `parents` or if it is no folder; `NotFound` if one on the way is
    /// not there; as [`SharedFiles::inspect`] otherwise.
    pub fn make_folder(
        &self,
        path: &Path,
        owner: ShareOwner,
        parents: bool,
    ) -> io::Result<ShareEntry> {
        let path = normal(path)?;
        let mut ways: Vec<&Path> = path.ancestors().filter(|it| it.parent().is_some()).collect();
        ways.reverse();
        if !parents {
            ways.drain(..ways.len().saturating_sub(1));
        }
        if ways.is_empty() && !parents {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        for way in ways {
            let place = self.place(way)?;
            match rustix::fs::mkdirat(&place.folder, place.name(), Mode::RWXU) {
                Ok(()) => {
                    let made = open_below(&place.folder, place.name())?;
                    self.settle(&made, owner, None)?;
                }
                Err(Errno::EXIST) if parents => {
                    // A link to a folder will do.
                    let there = self.open(way, OFlags::PATH | OFlags::DIRECTORY);
                    there.map_err(|error| match error.kind() {
                        io::ErrorKind::NotADirectory if way == path => {
                            io::ErrorKind::AlreadyExists.into()
                        }
                        _ => error,
                    })?;
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        self.inspect(&path)
    }

    /// Changes whose something is, and who may do what with it; a link is followed, within the
    /// folder.
    ///
    /// # Errors
    /// `PermissionDenied` for an owner that sessions here cannot have; as
    /// [`SharedFiles::inspect`] otherwise.
    pub fn change(&self, path: &Path, owner: ShareOwner) -> io::Result<ShareEntry> {
        let path = normal(path)?;
        let file = self.open(&path, OFlags::RDONLY | OFlags::NONBLOCK)?;
        let before = rustix::fs::fstat(&file)?;
        match FileType::from_raw_mode(before.st_mode) {
            FileType::RegularFile | FileType::Directory => {}
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        self.settle(&file, owner, Some(&before))?;
        self.inspect(&path)
    }

    /// Removes a file, a link or a folder with all that is in it.
    ///
    /// # Errors
    /// `InvalidInput` for the shared folder itself; as [`SharedFiles::inspect`] otherwise.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        let place = self.place(path)?;
        let name = place.name.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
        // At once, whoever is busy in it.
        let staged = self.staging().join(Uuid::new_v4().to_string());
        rustix::fs::renameat(&place.folder, name.as_os_str(), CWD, &staged)?;
        // It is gone whatever becomes of that: whoever still works in it may fill it again, and the
        // next start empties it.
        if let Err(error) = crate::volume::remove_tree(&staged) {
            tracing::warn!(path = %staged.display(), %error, "cannot empty a shared folder's staging");
        }
        Ok(())
    }

    /// How many bytes there may be more, with what is being written and removed.
    fn room(&self) -> io::Result<u64> {
        let Some(limit) = self.limit else { return Ok(u64::MAX) };
        let used = crate::disk::measure::used([self.folder.as_path()], limit);
        limit.checked_sub(used).filter(|left| *left > 0).ok_or(io::ErrorKind::StorageFull.into())
    }

    /// Looks a path up within the folder.
    fn open(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let top = open_folder(&self.files())?;
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let mut tries = 0;
        loop {
            match rustix::fs::openat2(&top, path, flags | OFlags::CLOEXEC, Mode::empty(), how) {
                Err(Errno::AGAIN) if tries < TRIES => tries += 1,
                opened => return Ok(opened?),
            }
        }
    }

    /// Where something is or is to be.
    fn place(&self, path: &Path) -> io::Result<Place> {
        let path = normal(path)?;
        let parent = path.parent().unwrap_or(&path);
        let folder = self.open(parent, OFlags::PATH | OFlags::DIRECTORY)?;
        let name = path.file_name().map(OsStr::to_owned);
        Ok(Place { folder, name, path })
    }

    fn entry(&self, folder: &OwnedFd, name: &OsStr, path: PathBuf) -> io::Result<ShareEntry> {
        let found = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = match FileType::from_raw_mode(found.st_mode) {
            FileType::RegularFile => ShareEntryKind::File,
            FileType::Directory => ShareEntryKind::Folder,
            FileType::Symlink => ShareEntryKind::Link,
            _ => ShareEntryKind::Other,
        };
        let target = match kind {
            ShareEntryKind::Link => {
                let read = rustix::fs::readlinkat(folder, name, Vec::new())?;
                Some(PathBuf::from(OsStr::from_bytes(read.to_bytes())))
            }
            _ => None,
        };
        let (users, groups) = self.owners.map_or((0, 0), |it| (it.users, it.groups));
        Ok(ShareEntry {
            path,
            kind,
            size: u64::try_from(found.st_size).unwrap_or_default(),
            mode: found.st_mode & PERMISSIONS,
            user: found.st_uid.saturating_sub(users),
            group: found.st_gid.saturating_sub(groups),
            accessed: time(found.st_atime, found.st_atime_nsec),
            modified: time(found.st_mtime, found.st_mtime_nsec),
            changed: time(found.st_ctime, found.st_ctime_nsec),
            target,
        })
    }

    /// Gives a file or folder its owner and mode: those that are said, or else those it had.
    fn settle(&self, file: impl AsFd, owner: ShareOwner, before: Option<&Stat>) -> io::Result<()> {
        let (user, group) = match self.owners {
            // Whoever runs sessions here owns what they make.
            None => (None, None),
            Some(owners) => {
                let usual = USUAL_OWNER.min(owners.count - 1);
                let of = |id: Option<u32>, base: u32, before: Option<u32>| match (id, before) {
                    (Some(id), _) if id >= owners.count => Err(Errno::PERM),
                    (Some(id), _) => Ok(base + id),
                    (None, Some(before)) => Ok(before),
                    (None, None) => Ok(base + usual),
                };
                let user = of(owner.user, owners.users, before.map(|it| it.st_uid))?;
                let group = of(owner.group, owners.groups, before.map(|it| it.st_gid))?;
                (Some(Uid::from_raw(user)), Some(Gid::from_raw(group)))
            }
        };
        let is_folder = || {
            let found = rustix::fs::fstat(&file)?;
            io::Result::Ok(FileType::from_raw_mode(found.st_mode) == FileType::Directory)
        };
        let mode = match (owner.mode, before) {
            (Some(mode), _) => mode & PERMISSIONS,
            // Rights of an owner are not for another one, nor for other content.
            (None, Some(before)) => before.st_mode & PERMISSIONS & !0o6000,
            (None, None) => {
                if is_folder()? {
                    0o755
                } else {
                    0o644
                }
            }
        };
        rustix::fs::fchown(&file, user, group)?;
        // After the owner, whose change takes set-user-ID bits away.
        Ok(rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?)
    }
}

/// Where something is or is to be.
struct Place {
    folder: OwnedFd,
    /// None for the top.
    name: Option<OsString>,
    path: PathBuf,
}

impl Place {
    fn name(&self) -> &OsStr {
        self.name.as_deref().unwrap_or(OsStr::new("."))
    }
}

/// The name of a file, which goes with this unless it was given to another.
#[derive(Debug)]
struct Staged(Option<PathBuf>);

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

/// A file that is being written to a shared folder; gone if it is not finished.
#[derive(Debug)]
pub struct SharedFile {
    of: SharedFiles,
    path: PathBuf,
    staged: Staged,
    file: File,
    room: u64,
    /// How much was written since room was last looked for.
    since: u64,
}

impl io::Write for SharedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(usize::try_from(self.room).unwrap_or(usize::MAX));
        if len == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let written = self.file.write(&bytes[..len])?;
        self.room -= written as u64;
        self.since += written as u64;
        if self.since >= LOOK {
            // Others write, too.
            (self.room, self.since) = (self.of.room()?, 0);
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl SharedFile {
    /// Puts it in its place, on the disk for good: with `replace` in that of a file or link that is
    /// there, whose owner and mode it has unless others are said.
    ///
    /// # Errors
    /// `AlreadyExists` without `replace`; `IsADirectory`; as [`SharedFiles::change`] otherwise.
    pub fn finish(self, owner: ShareOwner, replace: bool) -> io::Result<ShareEntry> {
        let Self { of, path, mut staged, file, .. } = self;
        let place = of.place(&path)?;
        let there = rustix::fs::statat(&place.folder, place.name(), AtFlags::SYMLINK_NOFOLLOW);
        let before = match there {
            Ok(_) if !replace => return Err(io::ErrorKind::AlreadyExists.into()),
            Ok(found) => match FileType::from_raw_mode(found.st_mode) {
                FileType::Directory => return Err(io::ErrorKind::IsADirectory.into()),
                FileType::RegularFile => Some(found),
                _ => None,
            },
            Err(Errno::NOENT) => None,
            Err(errno) => return Err(errno.into()),
        };
        of.settle(&file, owner, before.as_ref())?;
        file.sync_all()?;
        let flags = if replace { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        if let Some(from) = &staged.0 {
            rustix::fs::renameat_with(CWD, from, &place.folder, place.name(), flags)?;
        }
        staged.0 = None;
        let folder = open_below(&place.folder, OsStr::new("."))?;
        rustix::fs::fsync(&folder)?;
        of.entry(&place.folder, place.name(), path)
    }
}

/// A path from the top, without `.`; one with `..` in it is refused: through a link it would lead
/// elsewhere than it says.
fn normal(path: &Path) -> io::Result<PathBuf> {
    let mut normal = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(part) => normal.push(part),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                let why = "a path in a shared folder has no `..`";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
            }
        }
    }
    Ok(normal)
}

fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?)
}

fn open_below(folder: &OwnedFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(folder, name, flags, Mode::empty())?)
}

fn time(seconds: i64, nanoseconds: impl TryInto<u32>) -> SystemTime {
    let nanoseconds = nanoseconds.try_into().unwrap_or_default();
    match u64::try_from(seconds) {
        Ok(seconds) => SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds),
        Err(_) => SystemTime::UNIX_EPOCH,
    }
}
