//! Makes the files of one layer, in a new folder.
//!
//! Every entry is made relative to an open directory, which was reached from the layer's own
//! root by `openat2` without leaving it and without passing a symlink; nothing that exists is
//! ever opened for writing. So no layer reaches outside, whatever it holds.
//!
//! An entry below a symlink of the same layer is refused rather than resolved: a tool that
//! walks a real tree never writes one, and to follow it would put the file, and the modes of
//! the directories above it, elsewhere than its name says. A symlinked directory of a *lower*
//! layer (`lib -> usr/lib`) is no obstacle: this layer's `lib` is a directory of its own, and
//! the overlay shows that one, as it does for every other tool that keeps a folder for each
//! layer.
//!
//! What is made is what overlayfs reads with `userxattr`: a deleted name is the character
//! device 0:0, a directory that hides the lower ones has the attribute
//! `user.overlay.opaque`. No other device is ever made, and no attribute that overlayfs or the
//! kernel gives a meaning to is taken from a layer.

use std::collections::BTreeMap;
use std::io::{BufRead, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid,
    XattrFlags,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::entries::{Entries, Entry, Kind};
use crate::stream::{Bounds, Digests, decompressed};
use crate::work::FOLDER;
use crate::{Error, Limits, Owners, Result};

/// The attribute of a directory that hides what lower layers have there.
const OPAQUE: &str = "user.overlay.opaque";
/// The attribute of a directory that may hold deleted names. Without it, overlayfs lists a
/// directory that only one layer has as it is, and the devices with it.
const LOOKED_THROUGH: &str = "user.overlay.origin";
/// What the name of a deleted file starts with.
const WHITEOUT: &[u8] = b".wh.";
/// What the names start with that AUFS, the first user of this scheme, kept for itself.
const RESERVED: &[u8] = b".wh..wh.";
const OPAQUE_MARK: &[u8] = b".wh..wh..opq";
const LONGEST_NAME: usize = 255;
const LONGEST_PATH: usize = 4095;
/// Deeper trees could not be walked by what has to walk them later (backup, `rm`).
const DEEPEST: usize = 512;
/// The most memory for what directories get when everything is in them.
const MOST_PENDING: usize = 256 << 20;
/// Whom ids belong to that have no place in the session's range.
pub const NOBODY: u32 = 65534;
/// The fewest ids of a range: a system's own users have the first thousand.
pub const LEAST_IDS: u32 = 1000;
const INSIDE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// What was made of a layer, and what was not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Entries of every kind that were made.
    pub entries: u64,
    /// Bytes in its files.
    pub bytes: u64,
    /// Device nodes, which are left out.
    pub devices: u64,
    /// Attributes that were left out: all but `user.*`, and overlayfs' own.
    pub attributes: u64,
    /// Entries whose owner has no place in the range and belongs to nobody now.
    pub owners: u64,
    /// Whether the layer hides everything below it. Overlayfs does not ask a layer's root.
    pub hides_lower: bool,
}

/// Unpacks `blob` into the folder `root`, which must be empty. `trash` is one beside it, for
/// directories that a later entry replaces.
pub fn unpack(
    blob: impl Read + Send,
    what: &str,
    root: BorrowedFd<'_>,
    path: &Path,
    trash: BorrowedFd<'_>,
    owners: Owners,
    bounds: &Bounds<'_>,
) -> Result<(Report, Digests)> {
    decompressed(blob, what, bounds, |content| {
        let mut layer = Layer {
            what,
            root,
            path,
            trash,
            trashed: 0,
            owners,
            limits: bounds.limits,
            cancelled: bounds.cancelled,
            current: None,
            pending: BTreeMap::new(),
            pending_bytes: 0,
            report: Report::default(),
        };
        layer.directory(&[], Some(Meta::implied(&[])))?;
        let mut entries = Entries::new(content, what, bounds.limits.entries);
        while let Some(entry) = entries.next_entry()? {
            if layer.cancelled.load(Ordering::Relaxed) {
                return Err(Error::Cancelled { what: what.to_owned() });
            }
            layer.make(entry, &mut entries)?;
        }
        layer.finish()?;
        Ok(layer.report)
    })
}

/// What a file gets besides its content.
#[derive(Clone)]
struct Meta {
    mode: u32,
    uid: u64,
    gid: u64,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Meta {
    /// For a directory that the layer has files in but says nothing of. It may hide a lower
    /// layer's, so the two that everybody must be able to write to are kept so.
    fn implied(path: &[u8]) -> Self {
        let mode = if matches!(path, b"tmp" | b"var/tmp") { 0o1777 } else { 0o755 };
        Self { mode, uid: 0, gid: 0, mtime: None, xattrs: Vec::new() }
    }
}

impl From<Entry> for Meta {
    fn from(entry: Entry) -> Self {
        let Entry { mode, uid, gid, mtime, xattrs, .. } = entry;
        Self { mode, uid, gid, mtime: Some(mtime), xattrs }
    }
}

struct Layer<'a> {
    what: &'a str,
    root: BorrowedFd<'a>,
    path: &'a Path,
    trash: BorrowedFd<'a>,
    trashed: u64,
    owners: Owners,
    limits: &'a Limits,
    cancelled: &'a AtomicBool,
    /// The directory of the last entry.
    current: Option<(Vec<u8>, OwnedFd)>,
    /// Directories by path. They get their modes and times at the end: before, we write there.
    pending: BTreeMap<Vec<u8>, Meta>,
    pending_bytes: usize,
    report: Report,
}

impl Layer<'_> {
    fn make<R: BufRead>(&mut self, mut entry: Entry, entries: &mut Entries<'_, R>) -> Result<()> {
        let path = self.normalise(&entry.path, &entry)?;
        if path.is_empty() {
            if entry.kind != Kind::Directory {
                return Err(self.refuse(&entry, "stands for the layer but is no directory"));
            }
            self.keep_attributes(&mut entry);
            self.report.entries += 1;
            return self.directory(&path, Some(entry.into()));
        }
        let (parent, name) = split(&path);
        let mut above = parent.split(|&b| b == b'/');
        if let Some(step) = above.find(|step| step.starts_with(WHITEOUT)) {
            if step.starts_with(RESERVED) {
                return Ok(());
            }
            return Err(self.refuse(&entry, "lies below a deleted name"));
        }
        if name == OPAQUE_MARK {
            self.report.entries += 1;
            let folder = self.folder(parent, &entry)?;
            self.hide_lower(folder.as_fd())?;
            self.report.hides_lower |= parent.is_empty();
            self.current = Some((parent.to_vec(), folder));
            return Ok(());
        }
        if name.starts_with(RESERVED) {
            return Ok(());
        }
        if let Some(deleted) = name.strip_prefix(WHITEOUT) {
            if matches!(deleted, b"" | b"." | b"..") {
                return Err(self.refuse(&entry, "deletes no name"));
            }
            self.report.entries += 1;
            return self.whiteout(parent, deleted, &entry);
        }
        if entry.kind == Kind::Device {
            self.report.devices += 1;
            return Ok(());
        }
        self.keep_attributes(&mut entry);
        self.report.entries += 1;
        match entry.kind {
            Kind::Directory => self.make_directory(&path, entry),
            Kind::File => self.file(&path, entry, entries),
            Kind::HardLink => self.hard_link(&path, &entry),
            Kind::Symlink | Kind::Fifo => self.special(&path, entry),
            Kind::Device => Ok(()),
        }
    }

    fn make_directory(&mut self, path: &[u8], entry: Entry) -> Result<()> {
        let (parent, name) = split(path);
        let folder = self.folder(parent, &entry)?;
        match rustix::fs::mkdirat(&folder, name, Mode::RWXU) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                let there = self.look(folder.as_fd(), name)?;
                // One that is there stays, with what is in it.
                if there.is_none_or(|(kind, _)| kind != FileType::Directory) {
                    self.clear(folder.as_fd(), path, name)?;
                    rustix::fs::mkdirat(&folder, name, Mode::RWXU)
                        .map_err(|e| self.failed("make a directory in", e))?;
                    if is_whiteout(there) {
                        let made = self.step(folder.as_fd(), name)?;
                        self.hide_lower(made.as_fd())?;
                    }
                }
            }
            Err(e) => return Err(self.failed("make a directory in", e)),
        }
        self.current = Some((parent.to_vec(), folder));
        self.directory(path, Some(entry.into()))
    }

    fn file<R: BufRead>(
        &mut self,
        path: &[u8],
        entry: Entry,
        entries: &mut Entries<'_, R>,
    ) -> Result<()> {
        if entry.size > self.limits.file_bytes {
            let what = format!("the file {:?} of {}", crate::error::shown(path), self.what);
            return Err(Error::too_large(&what, self.limits.file_bytes, "bytes"));
        }
        let (parent, name) = split(path);
        let folder = self.folder(parent, &entry)?;
        let file = self.create(folder.as_fd(), path, || {
            let flags =
                OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(&folder, name, flags, Mode::RUSR | Mode::WUSR)
        })?;
        self.report.bytes += entry.size;
        entries.content(|mut bytes| {
            while !bytes.is_empty() {
                let written = rustix::io::retry_on_intr(|| rustix::io::write(&file, bytes))
                    .map_err(|e| self.failed("write a file in", e))?;
                bytes = &bytes[written..];
            }
            Ok(())
        })?;
        self.settle(file.as_fd(), &entry.into())?;
        self.current = Some((parent.to_vec(), folder));
        Ok(())
    }

    fn hard_link(&mut self, path: &[u8], entry: &Entry) -> Result<()> {
        let target = self.normalise(&entry.link, entry)?;
        if target == path {
            return Ok(());
        }
        let (target_parent, target_name) = split(&target);
        if target_name.is_empty() || target.split(|&b| b == b'/').any(|s| s.starts_with(WHITEOUT)) {
            return Err(self.refuse(entry, "links to something that is no file of the layer"));
        }
        // The other name must be there already, so its parents are not made.
        let from = self.open(target_parent).map_err(|e| match e {
            Errno::NOENT => self.refuse(entry, "links to an entry that is not there"),
            Errno::LOOP | Errno::NOTDIR | Errno::XDEV => {
                self.refuse(entry, "links through a symlink")
            }
            e => self.failed("open a directory in", e),
        })?;
        let there = self.look(from.as_fd(), target_name)?;
        match there {
            None => return Err(self.refuse(entry, "links to an entry that is not there")),
            Some((FileType::Directory, _)) => {
                return Err(self.refuse(entry, "links to a directory"));
            }
            there if is_whiteout(there) => {
                return Err(self.refuse(entry, "links to a deleted name"));
            }
            Some(_) => {}
        }
        let (parent, name) = split(path);
        let folder = self.folder(parent, entry)?;
        // A second link to the same file is no replacement, and to clear the way for it could
        // remove what it links to.
        if there != self.look(folder.as_fd(), name)? {
            self.create(folder.as_fd(), path, || {
                rustix::fs::linkat(&from, target_name, &folder, name, AtFlags::empty())
            })?;
        }
        self.current = Some((parent.to_vec(), folder));
        Ok(())
    }

    /// What is made without being opened.
    fn special(&mut self, path: &[u8], entry: Entry) -> Result<()> {
        let (parent, name) = split(path);
        let symlink = entry.kind == Kind::Symlink;
        if symlink {
            self.check_symlink(parent, &entry)?;
        }
        let folder = self.folder(parent, &entry)?;
        self.create(folder.as_fd(), path, || {
            if symlink {
                rustix::fs::symlinkat(entry.link.as_slice(), &folder, name)
            } else {
                let mode = Mode::RUSR | Mode::WUSR;
                rustix::fs::mknodat(&folder, name, FileType::Fifo, mode, 0)
            }
        })?;
        let meta = Meta::from(entry);
        let owned = self.owner(&meta);
        if let Some((uid, gid, _)) = owned {
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::chownat(&folder, name, Some(uid), Some(gid), flags)
                .map_err(|e| self.failed("set an owner in", e))?;
        }
        if !symlink {
            rustix::fs::chmodat(&folder, name, mode(&meta, owned), AtFlags::empty())
                .map_err(|e| self.failed("set a mode in", e))?;
        }
        rustix::fs::utimensat(&folder, name, &times(&meta), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| self.failed("set a time in", e))?;
        self.current = Some((parent.to_vec(), folder));
        Ok(())
    }

    /// Within a session an absolute target, or one that climbs past the root, starts at the
    /// session's root. One that climbs is refused all the same, as Docker does: it has no
    /// honest use, and not everything that reads a layer's folder runs within a session.
    fn check_symlink(&self, parent: &[u8], entry: &Entry) -> Result<()> {
        let target = entry.link.as_slice();
        if target.is_empty() || target.len() > LONGEST_PATH || target.contains(&0) {
            return Err(self.refuse(entry, "is a symlink whose target is no possible one"));
        }
        if target.starts_with(b"/") {
            return Ok(());
        }
        let mut depth = parent.split(|&b| b == b'/').filter(|step| !step.is_empty()).count();
        for step in target.split(|&b| b == b'/') {
            match step {
                b"" | b"." => {}
                b".." => {
                    depth = depth
                        .checked_sub(1)
                        .ok_or_else(|| self.refuse(entry, "is a symlink out of the layer"))?;
                }
                _ => depth += 1,
            }
        }
        Ok(())
    }

    /// Marks a name as deleted. It concerns lower layers only, so what this layer has under
    /// that name stays; a directory of it no longer shows what lower ones have in theirs.
    fn whiteout(&mut self, parent: &[u8], name: &[u8], entry: &Entry) -> Result<()> {
        let folder = self.folder(parent, entry)?;
        match self.look(folder.as_fd(), name)? {
            None => {
                let kind = FileType::CharacterDevice;
                let made = rustix::fs::mknodat(&folder, name, kind, Mode::empty(), 0);
                made.map_err(|e| match e {
                    Errno::PERM => Error::FileSystem {
                        path: self.path.to_path_buf(),
                        reason: "a character device 0:0 cannot be made there, which marks a \
                                 deleted file; it takes Linux 5.8 and no filter against mknod",
                    },
                    e => self.failed("mark a deletion in", e),
                })?;
                self.mark(folder.as_fd(), LOOKED_THROUGH, b"")?;
            }
            Some((FileType::Directory, _)) => {
                let there = self.step(folder.as_fd(), name)?;
                self.hide_lower(there.as_fd())?;
            }
            Some(_) => {}
        }
        self.current = Some((parent.to_vec(), folder));
        Ok(())
    }

    fn hide_lower(&self, folder: BorrowedFd<'_>) -> Result<()> {
        self.mark(folder, OPAQUE, b"y")
    }

    fn mark(&self, folder: BorrowedFd<'_>, name: &str, value: &[u8]) -> Result<()> {
        rustix::fs::fsetxattr(folder, name, value, XattrFlags::empty()).map_err(|e| match e {
            Errno::OPNOTSUPP => Error::FileSystem {
                path: self.path.to_path_buf(),
                reason: "it keeps no attributes named user.*, which overlayfs needs; use ext4, \
                         xfs, btrfs, or tmpfs of Linux 6.6",
            },
            e => self.failed("set an attribute in", e),
        })
    }

    /// Notes what a directory gets at the end; `None` keeps what was noted before.
    fn directory(&mut self, path: &[u8], meta: Option<Meta>) -> Result<()> {
        let meta = match (meta, self.pending.contains_key(path)) {
            (Some(meta), _) => meta,
            (None, true) => return Ok(()),
            (None, false) => Meta::implied(path),
        };
        let size: usize = meta.xattrs.iter().map(|(n, v)| n.len() + v.len() + 48).sum();
        self.pending_bytes += size + path.len() + 3 * size_of::<Meta>();
        if self.pending_bytes > MOST_PENDING {
            return Err(Error::refused(self.what, path, "is one directory too many"));
        }
        self.pending.insert(path.to_vec(), meta);
        Ok(())
    }

    /// Opens the directory `path`, making what is missing on the way. It is handed over and
    /// comes back as `current`.
    fn folder(&mut self, path: &[u8], entry: &Entry) -> Result<OwnedFd> {
        if let Some((known, folder)) = self.current.take()
            && known == path
        {
            return Ok(folder);
        }
        match self.open(path) {
            Ok(folder) => return Ok(folder),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(Errno::LOOP | Errno::XDEV) => {
                return Err(self.refuse(entry, "lies below a symlink"));
            }
            Err(e) => return Err(self.failed("open a directory in", e)),
        }
        let mut folder =
            self.root.try_clone_to_owned().map_err(|e| Error::io("open", self.path, e))?;
        let mut end = 0;
        for step in path.split(|&b| b == b'/') {
            end += step.len();
            let so_far = &path[..end];
            end += 1;
            let there = self.look(folder.as_fd(), step)?;
            match there {
                Some((FileType::Directory, _)) => {}
                Some((FileType::Symlink, _)) => {
                    return Err(self.refuse(entry, "lies below a symlink"));
                }
                there if there.is_none() || is_whiteout(there) => {
                    if there.is_some() {
                        self.clear(folder.as_fd(), so_far, step)?;
                    }
                    rustix::fs::mkdirat(&folder, step, Mode::RWXU)
                        .map_err(|e| self.failed("make a directory in", e))?;
                    self.directory(so_far, None)?;
                }
                _ => return Err(self.refuse(entry, "lies below something that is no directory")),
            }
            folder = self.step(folder.as_fd(), step)?;
            if is_whiteout(there) {
                self.hide_lower(folder.as_fd())?;
            }
        }
        Ok(folder)
    }

    /// A directory of the layer, by a path that passes no symlink.
    fn open(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        rustix::fs::openat2(self.root, path, FOLDER, Mode::empty(), INSIDE)
    }

    /// A directory in a directory.
    fn step(&self, folder: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
        rustix::fs::openat2(folder, name, FOLDER, Mode::empty(), INSIDE)
            .map_err(|e| self.failed("open a directory in", e))
    }

    /// What bears a name: its kind and, to tell it from others, its device and inode numbers.
    fn look(&self, folder: BorrowedFd<'_>, name: &[u8]) -> Result<Option<(FileType, [u64; 2])>> {
        match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => {
                Ok(Some((FileType::from_raw_mode(stat.st_mode), [stat.st_rdev, stat.st_ino])))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(self.failed("look at an entry in", e)),
        }
    }

    /// Makes something new under a name; what an earlier entry made there goes.
    fn create<T>(
        &mut self,
        folder: BorrowedFd<'_>,
        path: &[u8],
        make: impl Fn() -> Result<T, Errno>,
    ) -> Result<T> {
        match make() {
            Err(Errno::EXIST) => {
                self.clear(folder, path, split(path).1)?;
                make()
            }
            made => made,
        }
        .map_err(|e| self.failed("make an entry in", e))
    }

    fn clear(&mut self, folder: BorrowedFd<'_>, path: &[u8], name: &[u8]) -> Result<()> {
        match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR) => {}
            Err(e) => return Err(self.failed("replace an entry in", e)),
        }
        // In one step, however much is in it.
        self.trashed += 1;
        rustix::fs::renameat(folder, name, self.trash, self.trashed.to_string())
            .map_err(|e| self.failed("replace a directory in", e))?;
        let below = [path, b"/"].concat();
        // The next byte after the slash: the first path that is not below.
        let beyond = [path, b"0"].concat();
        let gone: Vec<_> = self.pending.range(below..beyond).map(|(k, _)| k.clone()).collect();
        self.pending.remove(path);
        for path in gone {
            self.pending.remove(&path);
        }
        Ok(())
    }

    /// Gives directories what they get, deepest first so that each can still be reached: a
    /// path sorts after those above it.
    fn finish(&mut self) -> Result<()> {
        for (path, meta) in std::mem::take(&mut self.pending).iter().rev() {
            let folder = self.open(path).map_err(|e| self.failed("open a directory in", e))?;
            self.settle(folder.as_fd(), meta)?;
        }
        Ok(())
    }

    /// Attributes first (a mode may forbid them), then the owner, then the mode (a change of
    /// owner clears setuid), then the time.
    fn settle(&mut self, fd: BorrowedFd<'_>, meta: &Meta) -> Result<()> {
        for (name, value) in &meta.xattrs {
            match rustix::fs::fsetxattr(fd, name.as_slice(), value, XattrFlags::empty()) {
                Ok(()) => {}
                // No possible name, or too much for this file system: the file is usable
                // without.
                Err(
                    Errno::OPNOTSUPP | Errno::INVAL | Errno::RANGE | Errno::TOOBIG | Errno::PERM,
                ) => self.report.attributes += 1,
                Err(e) => return Err(self.failed("set an attribute in", e)),
            }
        }
        let owned = self.owner(meta);
        if let Some((uid, gid, _)) = owned {
            rustix::fs::fchown(fd, Some(uid), Some(gid))
                .map_err(|e| self.failed("set an owner in", e))?;
        }
        rustix::fs::fchmod(fd, mode(meta, owned)).map_err(|e| self.failed("set a mode in", e))?;
        rustix::fs::futimens(fd, &times(meta)).map_err(|e| self.failed("set a time in", e))
    }

    /// The owner to set, if any, and whether it is the one the layer names.
    fn owner(&mut self, meta: &Meta) -> Option<(Uid, Gid, bool)> {
        let Owners::Shifted { uid_base, gid_base, count } = self.owners else {
            return None;
        };
        let id = |id: u64| u32::try_from(id).ok().filter(|id| *id < count);
        let (uid, gid) = (id(meta.uid), id(meta.gid));
        let fits = uid.is_some() && gid.is_some();
        self.report.owners += u64::from(!fits);
        // The store was opened with a range that holds all of these.
        let nobody = NOBODY.min(count.saturating_sub(1));
        let uid = Uid::from_raw(uid_base.saturating_add(uid.unwrap_or(nobody)));
        let gid = Gid::from_raw(gid_base.saturating_add(gid.unwrap_or(nobody)));
        Some((uid, gid, fits))
    }

    /// Only what programs keep for themselves is taken: the rest means something to the
    /// kernel (capabilities, labels, access lists with foreign ids) or to overlayfs.
    fn keep_attributes(&mut self, entry: &mut Entry) {
        let before = entry.xattrs.len();
        entry.xattrs.retain(|(name, _)| {
            name.starts_with(b"user.") && !name.starts_with(b"user.overlay.") && !name.contains(&0)
        });
        self.report.attributes += (before - entry.xattrs.len()) as u64;
    }

    /// The steps of a name, joined by single slashes; empty for the layer itself. A leading
    /// slash means the layer's root, as everywhere.
    fn normalise(&self, path: &[u8], entry: &Entry) -> Result<Vec<u8>> {
        let mut plain = Vec::with_capacity(path.len());
        let mut depth = 0;
        for step in path.split(|&b| b == b'/') {
            match step {
                b"" | b"." => {}
                b".." => return Err(self.refuse(entry, "has `..` in its name")),
                step if step.len() > LONGEST_NAME => {
                    return Err(self.refuse(entry, "has too long a name"));
                }
                step if step.contains(&0) => {
                    return Err(self.refuse(entry, "has a NUL in its name"));
                }
                step => {
                    depth += 1;
                    if depth > 1 {
                        plain.push(b'/');
                    }
                    plain.extend_from_slice(step);
                }
            }
        }
        if plain.len() > LONGEST_PATH || depth > DEEPEST {
            return Err(self.refuse(entry, "has too long a name"));
        }
        Ok(plain)
    }

    fn refuse(&self, entry: &Entry, reason: &'static str) -> Error {
        Error::refused(self.what, &entry.path, reason)
    }

    fn failed(&self, action: &'static str, errno: Errno) -> Error {
        Error::io(action, self.path, errno)
    }
}

fn is_whiteout(there: Option<(FileType, [u64; 2])>) -> bool {
    // The only device that is ever made.
    matches!(there, Some((FileType::CharacterDevice, _)))
}

/// A program that runs as its owner must not run as nobody in the place of somebody else.
fn mode(meta: &Meta, owned: Option<(Uid, Gid, bool)>) -> Mode {
    let mode = Mode::from_raw_mode(meta.mode);
    match owned {
        Some((_, _, false)) => mode - (Mode::SUID | Mode::SGID),
        _ => mode,
    }
}

fn times(meta: &Meta) -> Timestamps {
    let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    let last_modification = match meta.mtime {
        Some((tv_sec, nanoseconds)) => Timespec { tv_sec, tv_nsec: nanoseconds.into() },
        None => omit,
    };
    Timestamps { last_access: omit, last_modification }
}

/// A path's parent and its last step.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}
