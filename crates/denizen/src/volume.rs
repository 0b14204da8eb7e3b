//! The folders of a pool: `<volume_root>/<uuid>/volume` for each session, and denizen's own
//! things in `<volume_root>/.denizen`.
//!
//! Each change of a session's folder has one instant at which it has happened: making, putting
//! back and deleting are one rename each. What has to be made in its place, because it is
//! bootstrapped there, has the mark `incomplete` until then.
//! Before that instant a crash leaves what was there, after it what shall be; so a start finds
//! out by looking ([`Volumes::found`]). Nothing here follows a symlink out of a session.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, openat, renameat_with};
use rustix::io::Errno;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::isolation::Site;
use crate::lifecycle::Found;
use crate::name::SnapshotName;
use crate::snapshot::Snapshot;

/// Marks a volume whose making has not ended.
const INCOMPLETE: &str = "incomplete";
/// Where shared folders are, in denizen's own.
const SHARES: &str = "shares";

/// The folders of one pool.
#[derive(Clone, Debug)]
pub(crate) struct Volumes {
    root: PathBuf,
    own: PathBuf,
    /// Whether the root has a new session's folder that a power cut could take away.
    unsettled: Arc<AtomicBool>,
}

impl Volumes {
    /// Makes the root and denizen's own folder in it, if they are not there.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        // Instances change folder: what they are told must not depend on where we stand.
        let root = std::path::absolute(root).map_err(|source| Error::root(root, source))?;
        let own = root.join(".denizen");
        let made = fs::create_dir_all(&root).and_then(|()| make_private(&own));
        made.map_err(|source| Error::root(&root, source))?;
        check_owner(&root, &own)?;
        for folder in ["staging", "spares", "trash", "snapshots", SHARES] {
            make_private(&own.join(folder)).map_err(|source| Error::root(&root, source))?;
        }
        Ok(Self { root, own, unsettled: Arc::default() })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// `<volume_root>/.denizen`.
    pub(crate) fn own(&self) -> &Path {
        &self.own
    }

    /// Where shared folders are.
    pub(crate) fn shares(&self) -> PathBuf {
        self.own.join(SHARES)
    }

    /// The folder that belongs to a session.
    pub(crate) fn home(&self, id: Uuid) -> PathBuf {
        self.root.join(id.to_string())
    }

    /// Where a session's instance finds its files.
    pub(crate) fn site(&self, id: Uuid) -> Site {
        Site::in_folder(id, self.home(id))
    }

    /// What is there of a session's volume. A disk that cannot be read has not lost it.
    pub(crate) fn found(&self, id: Uuid) -> Result<Found> {
        let home = self.home(id);
        let look = |path: &Path| match fs::symlink_metadata(path) {
            Ok(found) => Ok(Some(found)),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                Ok(None)
            }
            Err(source) => Err(Error::volume("look at", path, source)),
        };
        if look(&home.join(INCOMPLETE))?.is_some() {
            return Ok(Found::Half);
        }
        let volume = look(&self.site(id).volume)?;
        let is_whole = volume.is_some_and(|found| found.is_dir());
        Ok(if is_whole { Found::Whole } else { Found::Nothing })
    }

    /// All sessions that have a folder here, in order.
    pub(crate) fn scan(&self) -> Result<Vec<Uuid>> {
        let failed = |source| Error::root(&self.root, source);
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            // Only the spelling that we write ourselves: `home` must lead back to it.
            if let Some(id) = name.to_str().and_then(|name| Uuid::try_parse(name).ok())
                && name.to_str() == Some(&id.to_string())
            {
                ids.push(id);
            }
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// Begins to make a session's folder in its place, marked incomplete.
    pub(crate) fn begin(&self, id: Uuid) -> Result<()> {
        let home = self.home(id);
        let make = || {
            self.discard(id)?;
            make_private(&home)?;
            // Nothing of it has to outlast a power cut: its row says that it is being made.
            File::create(home.join(INCOMPLETE))?;
            fs::create_dir(home.join("volume"))
        };
        make().map_err(|source| Error::volume("make", &home, source))
    }

    /// Makes a folder as a session's, with an empty volume, that is not any session's yet.
    pub(crate) fn begin_spare(&self) -> Result<Site> {
        let id = Uuid::new_v4();
        let home = self.own.join("spares").join(id.to_string());
        let made = make_private(&home).and_then(|()| fs::create_dir(home.join("volume")));
        made.map_err(|source| Error::volume("make", &home, source))?;
        Ok(Site::in_folder(id, home))
    }

    /// Makes a session's folder out of a spare one, in one step; [`Volumes::settle`] makes it
    /// outlast a power cut.
    pub(crate) fn install_new(&self, id: Uuid, spare: &Path) -> Result<()> {
        let home = self.home(id);
        let make = || {
            // Left over from an earlier try; the registry says that nothing of it is wanted.
            self.discard(id)?;
            renameat_with(CWD, spare, CWD, &home, RenameFlags::NOREPLACE)?;
            self.unsettled.store(true, Ordering::Release);
            Ok(())
        };
        make().map_err(|source: io::Error| Error::volume("make", &home, source))
    }

    /// Makes the new sessions' folders outlast a power cut: before any row says that they are
    /// there. Until then their rows say that they are being made, and nobody misses them.
    pub(crate) fn settle(&self) -> Result<()> {
        if self.unsettled.swap(false, Ordering::AcqRel) {
            return sync(&self.root).map_err(|source| {
                self.unsettled.store(true, Ordering::Release);
                Error::root(&self.root, source)
            });
        }
        Ok(())
    }

    /// The spares that are there.
    pub(crate) fn spares(&self) -> Vec<Site> {
        let entries = fs::read_dir(self.own.join("spares")).into_iter().flatten().flatten();
        let site = |entry: fs::DirEntry| {
            let id = Uuid::try_parse(entry.file_name().to_str()?).ok()?;
            Some(Site::in_folder(id, entry.path()))
        };
        entries.filter_map(site).collect()
    }

    /// Ends the making of a volume: from here on it is whole, also after a power cut.
    pub(crate) fn complete(&self, id: Uuid) -> Result<()> {
        let home = self.home(id);
        let end = || {
            fs::remove_file(home.join(INCOMPLETE))?;
            sync(&home)?;
            sync(&self.root)
        };
        end().map_err(|source| Error::volume("make", &home, source))
    }

    /// Takes a session's folder away in one step, then deletes it. Not there is fine.
    pub(crate) fn discard(&self, id: Uuid) -> io::Result<()> {
        self.bury(&self.home(id), &self.root).map(drop)
    }

    /// Takes a shared folder away in one step, then deletes it. Not there is fine.
    pub(crate) fn discard_share(&self, id: Uuid) -> io::Result<()> {
        self.bury(&self.shares().join(id.to_string()), &self.shares()).map(drop)
    }

    /// Takes something out of its folder in one step, then deletes it. False if it is not there.
    fn bury(&self, path: &Path, folder: &Path) -> io::Result<bool> {
        let grave = self.own.join("trash").join(Uuid::new_v4().to_string());
        match fs::rename(path, &grave) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        }
        sync(folder)?;
        // It is gone whatever becomes of the grave; the next start empties it.
        if let Err(error) = remove_tree(&grave) {
            tracing::warn!(path = %grave.display(), %error, "cannot empty the trash");
        }
        Ok(true)
    }

    /// An empty folder to put a session's files together in, which goes when nobody has it any
    /// more.
    pub(crate) fn stage(&self, id: Uuid) -> Result<Staged> {
        let staging = self.own.join("staging").join(format!("{id}.{}", Uuid::new_v4()));
        make_private(&staging).map_err(|source| Error::volume("make", &staging, source))?;
        Ok(Staged(staging))
    }

    // ---- Snapshots: `.denizen/snapshots/<uuid>/<name>`, each as a session's folder ---------

    fn snapshots_of(&self, id: Uuid) -> PathBuf {
        self.own.join("snapshots").join(id.to_string())
    }

    /// The files of a snapshot.
    pub(crate) fn snapshot(&self, id: Uuid, name: &SnapshotName) -> Result<Site> {
        let home = self.snapshots_of(id).join(name.as_str());
        if home.is_dir() {
            return Ok(Site::in_folder(id, home));
        }
        Err(Error::NoSnapshot { session: id, name: name.to_string() })
    }

    /// Makes a snapshot of a copy, in one step.
    pub(crate) fn install_snapshot(
        &self,
        id: Uuid,
        name: &SnapshotName,
        copy: &Staged,
    ) -> Result<()> {
        let folder = self.snapshots_of(id);
        let home = folder.join(name.as_str());
        let put = || {
            make_private(&folder)?;
            sync(copy.path())?;
            renameat_with(CWD, copy.path(), CWD, &home, RenameFlags::NOREPLACE)?;
            sync(&folder)?;
            sync(&self.own.join("snapshots"))
        };
        put().map_err(|source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => {
                Error::SnapshotExists { session: id, name: name.to_string() }
            }
            _ => Error::volume("make", &home, source),
        })
    }

    /// A session's snapshots, the latest first.
    pub(crate) fn snapshots(&self, id: Uuid) -> Result<Vec<Snapshot>> {
        let folder = self.snapshots_of(id);
        let failed = |source| Error::volume("read", &folder, source);
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut all = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let Some(name) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            let taken_at = match entry.metadata().and_then(|meta| meta.modified()) {
                // Removed just now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                taken_at => taken_at.map_err(failed)?,
            };
            all.push(Snapshot { name, taken_at });
        }
        all.sort_by(|a, b| (b.taken_at, &b.name).cmp(&(a.taken_at, &a.name)));
        Ok(all)
    }

    /// The snapshots of all sessions.
    pub(crate) fn all_snapshots(&self) -> Vec<Site> {
        let below = |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten();
        let sessions = below(self.own.join("snapshots")).map(|entry| entry.path());
        let all = sessions.flat_map(below).map(|entry| entry.path());
        all.map(|home| Site::in_folder(Uuid::nil(), home)).collect()
    }

    /// Takes a snapshot away in one step, then deletes it. False if there is none.
    pub(crate) fn discard_snapshot(&self, id: Uuid, name: &SnapshotName) -> Result<bool> {
        let folder = self.snapshots_of(id);
        let home = folder.join(name.as_str());
        self.bury(&home, &folder).map_err(|source| Error::volume("delete", &home, source))
    }

    /// Takes all snapshots of a session away in one step, then deletes them. False if there are
    /// none.
    pub(crate) fn discard_snapshots(&self, id: Uuid) -> Result<bool> {
        let folder = self.snapshots_of(id);
        let gone = self.bury(&folder, &self.own.join("snapshots"));
        gone.map_err(|source| Error::volume("delete", &folder, source))
    }

    /// A file in the staging folder that has no name, and so is gone with its last descriptor.
    pub(crate) fn nameless_file(&self) -> Result<File> {
        let path = self.own.join("staging").join(Uuid::new_v4().to_string());
        let make = || {
            let mut new = File::options();
            new.read(true).write(true).create_new(true).mode(0o600);
            let file = new.open(&path)?;
            fs::remove_file(&path)?;
            Ok(file)
        };
        make().map_err(|source| Error::volume("make", &path, source))
    }

    /// Puts a staged folder in the place of a session's folder, if there is one, in one step.
    pub(crate) fn install(&self, id: Uuid, staging: &Path) -> Result<()> {
        let home = self.home(id);
        let put = || {
            sync(staging)?;
            match renameat_with(CWD, staging, CWD, &home, RenameFlags::NOREPLACE) {
                Ok(()) => sync(&self.root),
                Err(rustix::io::Errno::EXIST) => {
                    let exchange =
                        || renameat_with(CWD, staging, CWD, &home, RenameFlags::EXCHANGE);
                    exchange()?;
                    if let Err(error) = sync(&self.root) {
                        // Nobody is told of a failure that has happened all the same.
                        exchange()?;
                        return Err(error);
                    }
                    // It has happened, whatever becomes of what was there; the next start that
                    // may remove it does.
                    Self::unstage(staging);
                    Ok(())
                }
                Err(errno) => Err(errno.into()),
            }
        };
        put().map_err(|source| Error::volume("restore", &home, source))
    }

    /// Gives up a staged folder.
    pub(crate) fn unstage(staging: &Path) {
        if let Err(error) = remove_tree(staging) {
            tracing::warn!(path = %staging.display(), %error, "cannot clear the staging folder");
        }
    }

    /// What a killed process left in the trash, in staging and of spares.
    pub(crate) fn left_over(&self) -> LeftOver {
        let folders = ["trash", "staging", "spares"].map(|folder| self.own.join(folder));
        let entries = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten();
        LeftOver(entries.flatten().map(|entry| entry.path()).collect())
    }
}

/// Files of a session that are not any session's yet.
#[derive(Debug)]
pub(crate) struct Staged(PathBuf);

impl Staged {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Has all of it outlast a power cut.
    pub(crate) fn sync(&self) -> Result<()> {
        let sync = || Ok(rustix::fs::syncfs(File::open(&self.0)?)?);
        sync().map_err(|source: io::Error| Error::volume("write to disk", &self.0, source))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // What it was made for has moved it, or all that is in it.
        match fs::remove_dir(&self.0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Nobody is to wait for that: not even for a failure, after which the next start does.
            Err(_) => {
                let path = std::mem::take(&mut self.0);
                let remover = std::thread::Builder::new().name("denizen-unstage".to_owned());
                drop(remover.spawn(move || Volumes::unstage(&path)));
            }
        }
    }
}

/// Trees that nobody wants any more.
pub(crate) struct LeftOver(Vec<PathBuf>);

impl LeftOver {
    pub(crate) fn remove(self) {
        for path in self.0 {
            if let Err(error) = remove_tree(&path) {
                tracing::warn!(path = %path.display(), %error, "cannot sweep");
            }
        }
    }
}

fn make_private(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// A root that somebody else owns could be changed under us by them.
fn check_owner(root: &Path, own: &Path) -> Result<()> {
    let me = rustix::process::geteuid().as_raw();
    for path in [root, own] {
        let owner = fs::metadata(path).map_err(|source| Error::root(root, source))?.uid();
        if owner != me && owner != 0 {
            return Err(Error::RootOwner { path: path.to_owned(), owner, me });
        }
    }
    Ok(())
}

/// Makes what was done in a folder durable.
fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Deletes a tree that nobody works in any more, however deep it is, and also where its folders
/// have been made unreadable by those who lived in it. Not there is fine; never follows a link.
///
/// What is in a folder below is moved up first, so that no more than two folders are open and
/// no path is longer than two names: a session can make a tree that is too deep for either.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    let top = match rustix::fs::unlinkat(CWD, path, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // What unlink(2) says of a folder.
        Err(Errno::ISDIR | Errno::PERM) => open_folder(CWD, path.as_os_str())?,
        Err(errno) => return Err(errno.into()),
    };
    let mut moved = 0u64;
    loop {
        let names = names_in(&top)?;
        if names.is_empty() {
            break;
        }
        for name in names {
            let Some(below) = remove_or_open(&top, &name)? else { continue };
            for inner in names_in(&below)? {
                let Some(folder) = remove_or_open(&below, &inner)? else { continue };
                drop(folder);
                loop {
                    moved += 1;
                    let up = format!(".denizen-{moved}");
                    match renameat_with(&below, &inner, &top, up, RenameFlags::NOREPLACE) {
                        Err(Errno::EXIST) => {}
                        done => break done?,
                    }
                }
            }
            rustix::fs::unlinkat(&top, &name, AtFlags::REMOVEDIR)?;
        }
    }
    Ok(rustix::fs::unlinkat(CWD, path, AtFlags::REMOVEDIR)?)
}

/// Removes what is no folder; opens one.
fn remove_or_open(folder: &OwnedFd, name: &OsStr) -> io::Result<Option<OwnedFd>> {
    match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(None),
        Err(Errno::ISDIR | Errno::PERM) => open_folder(folder, name).map(Some),
        Err(errno) => Err(errno.into()),
    }
}

/// Opens a folder, with the right to change it.
fn open_folder(at: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    let at = at.as_fd();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = || openat(at, name, flags, Mode::empty());
    let folder = match open() {
        Err(Errno::ACCESS) => {
            // By what it is now: somebody may put a link there meanwhile.
            let how = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let found = openat(at, name, how, Mode::empty())?;
            let itself = format!("/proc/self/fd/{}", found.as_raw_fd());
            rustix::fs::chmodat(CWD, &itself, Mode::RWXU, AtFlags::empty())?;
            openat(&found, ".", flags, Mode::empty())?
        }
        opened => opened?,
    };
    let mode = rustix::fs::fstat(&folder)?.st_mode;
    if mode & 0o700 != 0o700 {
        rustix::fs::fchmod(&folder, Mode::RWXU)?;
    }
    Ok(folder)
}

pub(crate) fn names_in(folder: &OwnedFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsStr::from_bytes(name).to_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn trees_of_any_depth_and_mode_are_removed_and_links_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (tree, kept) = (folder.path().join("tree"), folder.path().join("kept"));
        fs::create_dir_all(&kept).unwrap();
        fs::write(kept.join("file"), "").unwrap();
        fs::create_dir_all(tree.join("closed/empty")).unwrap();
        fs::write(tree.join("closed/file"), "").unwrap();
        std::os::unix::fs::symlink(&kept, tree.join("link")).unwrap();
        let mut at = open_folder(CWD, tree.as_os_str()).unwrap();
        for _ in 0..20_000 {
            rustix::fs::mkdirat(&at, "a", Mode::RWXU).unwrap();
            at = open_folder(&at, OsStr::new("a")).unwrap();
        }
        drop(at);
        let closed = std::os::unix::fs::PermissionsExt::from_mode(0o0);
        fs::set_permissions(tree.join("closed"), closed).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists() && kept.join("file").exists());
        remove_tree(&tree).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&kept, &link).unwrap();
        remove_tree(&link).unwrap();
        assert!(!link.exists() && kept.join("file").exists());
    }
}
