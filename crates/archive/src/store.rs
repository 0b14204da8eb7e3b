//! The destination folder: names of archives, and the partial file an archive starts as.
//!
//! Never looks into an archive, never replaces one, and removes only partial files that no
//! living process holds.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use jiff::{SignedDuration, Timestamp, civil, tz::TimeZone};
use rustix::fs::{AtFlags, CWD, Dir, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use uuid::Uuid;

use crate::Error;

const TIME: &str = "%Y%m%dT%H%M%SZ";
const EXTENSION: &str = ".tar.zst";
const PARTIAL: &str = ".partial";
/// A UUID in its hyphenated form.
const UUID_LENGTH: usize = 36;

/// The name of an archive: whose it is and when it was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ArchiveId {
    session: Uuid,
    taken_at: Timestamp,
}

impl ArchiveId {
    /// The session the archive holds.
    pub fn session(&self) -> Uuid {
        self.session
    }

    /// When it was taken, to the second.
    pub fn taken_at(&self) -> Timestamp {
        self.taken_at
    }
}

impl fmt::Display for ArchiveId {
    /// The file name, `{session}-{YYYYMMDD}T{hhmmss}Z.tar.zst`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}{EXTENSION}", self.session.hyphenated(), self.taken_at.strftime(TIME))
    }
}

/// The text is not the name of an archive.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the name of an archive ({{session}}-{{YYYYMMDD}}T{{hhmmss}}Z.tar.zst)")]
pub struct NotAnArchive(String);

impl FromStr for ArchiveId {
    type Err = NotAnArchive;

    fn from_str(name: &str) -> Result<Self, NotAnArchive> {
        let parse = || {
            let stem = name.strip_suffix(EXTENSION)?;
            let session = Uuid::parse_str(stem.get(..UUID_LENGTH)?).ok()?;
            let time = stem.get(UUID_LENGTH..)?.strip_prefix('-')?;
            let time = civil::DateTime::strptime(TIME, time).ok()?;
            let taken_at = TimeZone::UTC.to_timestamp(time).ok()?;
            let id = Self { session, taken_at };
            // One archive, one spelling: what would be written differently is foreign.
            (id.to_string() == name).then_some(id)
        };
        parse().ok_or_else(|| NotAnArchive(name.to_owned()))
    }
}

/// An archive in the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub id: ArchiveId,
    /// The session it holds.
    pub session: Uuid,
    /// When it was taken, to the second. Later than every older archive of the session, even
    /// if the clock was set back.
    pub taken_at: Timestamp,
    /// Where it is.
    pub path: PathBuf,
    /// Its size on disk as a file, in bytes.
    pub bytes: u64,
}

/// The archives in `destination`, of one session or of all, newest first (equal times in the
/// order of the sessions' ids). Partial files and anything else that is there are ignored.
///
/// # Errors
/// [`Error::DestinationMissing`], or what met the reading of the folder.
pub fn list(destination: &Path, session: Option<Uuid>) -> Result<Vec<Entry>, Error> {
    let folder = open_destination(destination)?;
    let mut found = Vec::new();
    for name in names(&folder, destination)? {
        let Some(id) = std::str::from_utf8(&name).ok().and_then(|n| n.parse::<ArchiveId>().ok())
        else {
            continue;
        };
        if session.is_some_and(|wanted| wanted != id.session) {
            continue;
        }
        let path = destination.join(OsStr::from_bytes(&name));
        let stat = match rustix::fs::statat(&folder, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            // Deleted by somebody else since the folder was read.
            Err(Errno::NOENT) => continue,
            Err(e) => return Err(Error::io("look at", &path, e)),
        };
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile {
            continue;
        }
        found.push(Entry {
            id,
            session: id.session,
            taken_at: id.taken_at,
            path,
            bytes: u64::try_from(stat.st_size).unwrap_or(0),
        });
    }
    found.sort_by(|a, b| b.taken_at.cmp(&a.taken_at).then(a.session.cmp(&b.session)));
    Ok(found)
}

/// Removes the partial files that processes left when they died, of one session or of all,
/// and returns their paths. One that is still being written, by this process or another, is
/// left alone: its writer holds a lock on it.
///
/// # Errors
/// [`Error::DestinationMissing`], or what met the folder or the removal.
pub fn clean(destination: &Path, session: Option<Uuid>) -> Result<Vec<PathBuf>, Error> {
    let folder = open_destination(destination)?;
    let mut removed = Vec::new();
    for name in names(&folder, destination)? {
        if !is_partial(&name, session) {
            continue;
        }
        let path = destination.join(OsStr::from_bytes(&name));
        // Writable, because an flock over NFS is a record lock and wants that.
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&folder, name.as_slice(), flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => continue,
            Err(e) => return Err(Error::io("open", &path, e)),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => continue,
            Err(e) => return Err(Error::io("lock", &path, e)),
        }
        match rustix::fs::unlinkat(&folder, name.as_slice(), AtFlags::empty()) {
            Ok(()) => removed.push(path),
            // Its writer finished between our open and our lock.
            Err(Errno::NOENT) => {}
            Err(e) => return Err(Error::io("remove", &path, e)),
        }
    }
    Ok(removed)
}

fn is_partial(name: &[u8], session: Option<Uuid>) -> bool {
    let parse = || {
        let stem = std::str::from_utf8(name).ok()?.strip_prefix('.')?.strip_suffix(PARTIAL)?;
        let whose = Uuid::parse_str(stem.get(..UUID_LENGTH)?).ok()?;
        stem.get(UUID_LENGTH..)?.starts_with('-').then_some(whose)
    };
    parse().is_some_and(|whose| session.is_none_or(|wanted| wanted == whose))
}

fn open_destination(destination: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, destination, flags, Mode::empty()).map_err(|e| match e {
        Errno::NOENT | Errno::NOTDIR => {
            Error::DestinationMissing { path: destination.to_path_buf() }
        }
        e => Error::io("open the backup destination", destination, e),
    })
}

fn names(folder: &OwnedFd, destination: &Path) -> Result<Vec<Vec<u8>>, Error> {
    let failed = |e: Errno| Error::io("read the backup destination", destination, e);
    let mut names = Vec::new();
    for entry in Dir::read_from(folder).map_err(failed)? {
        names.push(entry.map_err(failed)?.file_name().to_bytes().to_vec());
    }
    Ok(names)
}

/// An archive under its temporary name, locked. Dropping it removes it.
pub struct Partial {
    folder: OwnedFd,
    destination: PathBuf,
    session: Uuid,
    name: String,
    path: PathBuf,
    file: File,
    published: bool,
}

impl Partial {
    pub fn create(destination: &Path, session: Uuid) -> Result<Self, Error> {
        let folder = open_destination(destination)?;
        loop {
            let random = Uuid::new_v4().simple();
            let pid = std::process::id();
            let name = format!(".{}-{pid}-{random}{PARTIAL}", session.hyphenated());
            let path = destination.join(&name);
            let flags =
                OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            // A backup holds everything the session has: nobody else's business.
            let fd = match rustix::fs::openat(&folder, &name, flags, Mode::RUSR | Mode::WUSR) {
                Ok(fd) => fd,
                Err(Errno::EXIST) => continue,
                // The folder was removed after it was opened.
                Err(Errno::NOENT) => {
                    return Err(Error::DestinationMissing { path: destination.to_path_buf() });
                }
                Err(e) => return Err(Error::io("create", &path, e)),
            };
            let locked = rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive);
            let linked = rustix::fs::fstat(&fd).map(|stat| stat.st_nlink);
            match (locked, linked) {
                // Somebody cleaned up in the instant between creation and lock.
                (Err(Errno::WOULDBLOCK), _) | (Ok(()), Ok(0)) => continue,
                (Err(e), _) | (_, Err(e)) => {
                    let _ = rustix::fs::unlinkat(&folder, &name, AtFlags::empty());
                    return Err(Error::io("lock", &path, e));
                }
                (Ok(()), Ok(_)) => {}
            }
            return Ok(Self {
                folder,
                destination: destination.to_path_buf(),
                session,
                name,
                path,
                file: File::from(fd),
                published: false,
            });
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file its final name and makes that durable. The file must be synced before.
    /// The name is `now`, or the first second after the latest archive of the session.
    pub fn publish(mut self, now: Timestamp) -> Result<Entry, Error> {
        let no_name = || Error::NoName { path: self.destination.clone() };
        let second = SignedDuration::from_secs(1);
        // Before 1970 the clock is simply not set.
        let now = Timestamp::from_second(now.as_second().max(0)).map_err(|_| no_name())?;
        let taken_at = loop {
            let latest = list(&self.destination, Some(self.session))?.first().map(|e| e.taken_at);
            let taken_at = match latest {
                Some(latest) if latest >= now => {
                    latest.checked_add(second).map_err(|_| no_name())?
                }
                _ => now,
            };
            let name = ArchiveId { session: self.session, taken_at }.to_string();
            match self.rename_to(&name) {
                Ok(()) => break taken_at,
                // Another writer took that second; or something that is no archive bears the
                // name, which the list does not show and the next round would meet again.
                Err(Errno::EXIST) => {
                    let taken = list(&self.destination, Some(self.session))?;
                    if !taken.iter().any(|e| e.taken_at == taken_at) {
                        return Err(Error::Io {
                            action: "give the archive its name, which something else bears,",
                            path: self.destination.join(name),
                            source: Errno::EXIST.into(),
                        });
                    }
                }
                Err(Errno::NOENT) => {
                    return Err(Error::DestinationMissing { path: self.destination.clone() });
                }
                Err(e) => return Err(Error::io("give the archive its name", &self.path, e)),
            }
        };
        let id = ArchiveId { session: self.session, taken_at };
        let path = self.destination.join(id.to_string());
        self.published = true;
        if let Err(e) = rustix::fs::fsync(&self.folder) {
            // Whether the name survives a crash is unknown, so it must not be counted on.
            let _ = rustix::fs::unlinkat(&self.folder, id.to_string(), AtFlags::empty());
            return Err(Error::io("make the archive's name durable in", &self.destination, e));
        }
        let bytes = self.file.metadata().map_err(|e| Error::io("look at", &path, e))?.len();
        Ok(Entry { id, session: self.session, taken_at, path, bytes })
    }

    fn rename_to(&self, name: &str) -> Result<(), Errno> {
        let (folder, old) = (&self.folder, self.name.as_str());
        match rustix::fs::renameat_with(folder, old, folder, name, RenameFlags::NOREPLACE) {
            // The file system (NFS, some FUSE) cannot do that in one step; a link cannot
            // replace anything either.
            Err(Errno::INVAL | Errno::NOSYS) => {
                rustix::fs::linkat(folder, old, folder, name, AtFlags::empty())?;
                // The archive is there under its name; the other one is left to `clean`.
                let _ = rustix::fs::unlinkat(folder, old, AtFlags::empty());
                Ok(())
            }
            done => done,
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.published {
            // Nothing to do about a failure here: `clean` finds the file later, unlocked.
            let _ = rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty());
        }
    }
}
