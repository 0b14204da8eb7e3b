//! Folders for what is not finished: each belongs to one writer, who holds a lock on it, and
//! goes when its writer goes.
//!
//! Never follows a symlink, never needs more than a few open files however deep a tree is, and
//! removes no folder whose writer lives.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use uuid::Uuid;

use crate::{Error, Result};

pub const FOLDER: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A folder of one writer. Dropping it removes it.
pub struct Work {
    parent: OwnedFd,
    name: String,
    path: PathBuf,
    folder: OwnedFd,
}

impl Work {
    /// Makes one in `parent`.
    pub fn create(parent: &Path) -> Result<Self> {
        let above = rustix::fs::openat(CWD, parent, FOLDER, Mode::empty())
            .map_err(|e| Error::io("open", parent, e))?;
        loop {
            let name = format!("{}-{}", std::process::id(), Uuid::new_v4().simple());
            let path = parent.join(&name);
            match rustix::fs::mkdirat(&above, &name, Mode::RWXU) {
                Ok(()) => {}
                Err(Errno::EXIST) => continue,
                Err(e) => return Err(Error::io("make", &path, e)),
            }
            let folder = match rustix::fs::openat(&above, &name, FOLDER, Mode::empty()) {
                Ok(folder) => folder,
                // Swept in the instant between.
                Err(Errno::NOENT) => continue,
                Err(e) => return Err(Error::io("open", &path, e)),
            };
            let locked = rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive);
            let linked = rustix::fs::fstat(&folder).map(|stat| stat.st_nlink);
            match (locked, linked) {
                (Err(Errno::WOULDBLOCK), _) | (Ok(()), Ok(0)) => {}
                (Err(e), _) | (_, Err(e)) => return Err(Error::io("lock", &path, e)),
                (Ok(()), Ok(_)) => return Ok(Self { parent: above, name, path, folder }),
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn folder(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }

    /// Makes a file in it, which must not be there.
    pub fn file(&self, name: &str) -> Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.folder, name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|e| Error::io("make", &self.path.join(name), e))?;
        Ok(File::from(file))
    }

    pub fn remove_file(&self, name: &str) {
        // What stays goes with the folder.
        let _ = rustix::fs::unlinkat(&self.folder, name, AtFlags::empty());
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let removed = empty(self.folder.as_fd())
            .and_then(|()| rustix::fs::unlinkat(&self.parent, &self.name, AtFlags::REMOVEDIR));
        if let Err(error) = removed {
            // Swept when the store is opened next.
            tracing::warn!(path = %self.path.display(), %error, "a work folder was not removed");
        }
    }
}

/// Removes the work folders in `parent` whose writers are gone. Returns how many.
pub fn sweep(parent: &Path) -> Result<usize> {
    let above = rustix::fs::openat(CWD, parent, FOLDER, Mode::empty())
        .map_err(|e| Error::io("open", parent, e))?;
    let mut swept = 0;
    for name in names(above.as_fd()).map_err(|e| Error::io("read", parent, e))? {
        let path = || parent.join(std::ffi::OsStr::new(&*String::from_utf8_lossy(&name)));
        let folder = match rustix::fs::openat(&above, &*name, FOLDER, Mode::empty()) {
            Ok(folder) => folder,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
            Err(e) => return Err(Error::io("open", &path(), e)),
        };
        match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => continue,
            Err(e) => return Err(Error::io("lock", &path(), e)),
        }
        let removed = empty(folder.as_fd())
            .and_then(|()| rustix::fs::unlinkat(&above, &*name, AtFlags::REMOVEDIR));
        match removed {
            Ok(()) => swept += 1,
            // Its writer removed it between our look and our lock.
            Err(Errno::NOENT) => {}
            Err(e) => return Err(Error::io("remove", &path(), e)),
        }
    }
    Ok(swept)
}

/// The names in a folder.
pub fn names(folder: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

/// Removes everything in a folder. A tree may be deeper than there are file descriptors or
/// than a path is long, so folders are brought up to the top, one level at a time, instead of
/// going down to them.
pub fn empty(top: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut moved = 0_u64;
    loop {
        let mut folders = Vec::new();
        for name in names(top)? {
            if !unlink(top, &name)? {
                folders.push(name);
            }
        }
        if folders.is_empty() {
            return Ok(());
        }
        for name in folders {
            let folder = open_own(top, &name)?;
            for below in names(folder.as_fd())? {
                if unlink(folder.as_fd(), &below)? {
                    continue;
                }
                // To move a folder is to change it: its `..` becomes another one.
                drop(open_own(folder.as_fd(), &below)?);
                loop {
                    let to = format!("moved-{moved}");
                    moved += 1;
                    let unused = RenameFlags::NOREPLACE;
                    match rustix::fs::renameat_with(&folder, &*below, top, &to, unused) {
                        Err(Errno::EXIST) => {}
                        done => break done?,
                    }
                }
            }
            rustix::fs::unlinkat(top, &*name, AtFlags::REMOVEDIR)?;
        }
    }
}

/// Removes what is no folder. Returns whether it was none.
fn unlink(folder: BorrowedFd<'_>, name: &[u8]) -> Result<bool, Errno> {
    match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::ISDIR) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Opens a folder that may have been given a mode which does not let us in. It is known to be
/// a folder, and nobody else has access to these trees, so the mode hits no other thing.
fn open_own(folder: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    rustix::fs::chmodat(folder, name, Mode::RWXU, AtFlags::empty())?;
    rustix::fs::openat(folder, name, FOLDER, Mode::empty())
}
