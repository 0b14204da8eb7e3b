//! Makes an archive of a volume.
//!
//! One thread walks the volume, reads it and feeds the compressor; the compressor has its own
//! threads; one more reads the file back while it grows and checks it. Never follows a
//! symlink, never crosses into another mount, never writes to the volume (not even access
//! times where that can be helped), and never lets a name other than the partial one exist
//! before the archive is complete, synced and checked.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use jiff::Timestamp;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, SeekFrom, Statx, StatxAttributes, StatxFlags,
};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::format::{self, Attributes, Kind, MAX_PATH, MAX_SEGMENTS, Member, Segment, Time};
use crate::owners::Owners;
use crate::reader::{self, CHUNK, Follow, Progress};
use crate::store::Partial;
use crate::{Entry, Error, Summary};

/// The zstd command's default: the best ratio that still keeps up with a disk.
const LEVEL: i32 = 3;
/// A backup runs beside the sessions: it should not take every core of a large machine.
const MOST_THREADS: usize = 4;
/// How many folders are kept open on the way down; deeper ones are found again through `..`.
const OPEN_FOLDERS: usize = 64;
/// The kernel's limit for a list of attribute names (`XATTR_LIST_MAX`, linux/limits.h).
const XATTR_LIST: usize = 64 << 10;

/// What [`write`] reads.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The volume.
    pub volume: &'a Path,
    /// A folder to be archived as [`BESIDE`] in the volume's root, in the place of anything of
    /// that name there.
    pub beside: Option<&'a Path>,
    /// Whose numbers are others in the archive than on disk.
    pub owners: Option<Owners>,
}

/// The name that [`Source::beside`] has in an archive.
pub const BESIDE: &str = ".denizen";

impl<'a> From<&'a Path> for Source<'a> {
    fn from(volume: &'a Path) -> Self {
        Self { volume, beside: None, owners: None }
    }
}

impl<'a> From<&'a PathBuf> for Source<'a> {
    fn from(volume: &'a PathBuf) -> Self {
        Self::from(volume.as_path())
    }
}

/// What [`write`] made.
#[derive(Clone, Debug)]
pub struct Written {
    /// The new archive.
    pub entry: Entry,
    /// Regular files in it; each further hard link counts as one.
    pub files: u64,
    /// Bytes of their content, holes included.
    pub bytes: u64,
    /// What the volume holds and the archive does not.
    pub skipped: Vec<Skipped>,
}

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
    /// It has the name that what is kept beside the volume has in the archive.
    Reserved,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Socket => "a socket",
            Self::Device => "a device node",
            Self::MountPoint => "a mount point",
            Self::Reserved => "a reserved name",
        })
    }
}

/// Writes a volume into a new archive in `destination`, checks it, and gives it its name.
///
/// The name says `now`, in whole seconds of UTC, unless the session already has an archive of
/// that time or later: then it is the first second after that one, so that the newest archive
/// is always the one with the latest name. An existing file is never replaced. `destination`
/// must exist.
///
/// The check reads the file back through a second descriptor, decompresses it, parses every
/// entry and compares the SHA-256 of the stream with that of what was read from the volume.
/// The file is synced before it gets its name, and the folder after.
///
/// Blocks for as long as it takes. `cancelled` is looked at every 256 KiB and at every entry.
/// On any error nothing is left in the destination.
///
/// # Errors
/// [`Error::Changed`] if the volume was written to meanwhile (try again later);
/// [`Error::Denied`] names what this user cannot read: it is never made readable;
/// [`Error::Cancelled`]; the others as they say.
pub fn write<'a>(
    source: impl Into<Source<'a>>,
    destination: &Path,
    session: Uuid,
    now: Timestamp,
    cancelled: &AtomicBool,
) -> Result<Written, Error> {
    let Source { volume, beside, owners } = source.into();
    let root = open_volume(volume)?;
    let beside = beside.map(open_volume).transpose()?;
    let partial = Partial::create(destination, session)?;
    let progress = Progress::default();
    let (walked, read_back) = thread::scope(|scope| {
        // However this closure is left, the other thread must not wait for more.
        let _end = GiveUp(&progress);
        let follow = Follow { file: partial.file(), position: 0, progress: &progress };
        let checker = thread::Builder::new()
            .name("denizen-verify".into())
            .spawn_scoped(scope, || read_back(follow, partial.path()))
            .map_err(|e| Error::io("start a thread to check", partial.path(), e))?;
        let walked = feed(volume, root, beside, owners, &partial, &progress, cancelled);
        progress.give_up();
        let read_back = checker.join();
        // What went wrong first explains what went wrong after it.
        let walked = walked?;
        let read_back = read_back.unwrap_or_else(|_| {
            Err(Error::damaged(partial.path(), "the checking thread panicked"))
        });
        Ok::<_, Error>((walked, read_back))
    })?;
    let unverified = |detail| Error::Unverified { path: partial.path().to_path_buf(), detail };
    match read_back {
        Err(Error::Damaged { detail, .. }) => return Err(unverified(detail)),
        Err(Error::Refused { entry, reason, .. }) => {
            return Err(unverified(format!("entry {entry:?} {reason}")));
        }
        Err(other) => return Err(other),
        Ok(summary) if summary != walked.summary => {
            return Err(unverified(format!("wrote {:?}, read {summary:?}", walked.summary)));
        }
        Ok(_) => {}
    }
    check_cancelled(cancelled, volume)?;
    let entry = partial.publish(now)?;
    let Summary { files, bytes, .. } = walked.summary;
    Ok(Written { entry, files, bytes, skipped: walked.skipped })
}

struct GiveUp<'a>(&'a Progress);

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

fn read_back(follow: Follow<'_>, path: &Path) -> Result<Summary, Error> {
    let file = follow.file;
    reader::check(follow, file, path)
}

struct Walked {
    /// What the reader must find.
    summary: Summary,
    skipped: Vec<Skipped>,
}

/// Writes the whole file and syncs it.
fn feed(
    volume: &Path,
    root: OwnedFd,
    beside: Option<OwnedFd>,
    owners: Option<Owners>,
    partial: &Partial,
    progress: &Progress,
    cancelled: &AtomicBool,
) -> Result<Walked, Error> {
    let stream = Stream::new(partial, progress, volume, cancelled)?;
    let mut walk = Walk {
        volume,
        owners,
        stream,
        path: b".".to_vec(),
        reserved: beside.is_some(),
        linked: HashMap::new(),
        names: vec![0; XATTR_LIST],
        folder: Vec::with_capacity(32 << 10),
        summary: Summary { entries: 0, files: 0, bytes: 0, sealed: true },
        skipped: Vec::new(),
    };
    walk.run(root)?;
    if let Some(beside) = beside {
        walk.reserved = false;
        walk.path = [b"./", BESIDE.as_bytes()].concat();
        walk.run(beside)?;
    }
    let Walk { stream, summary, skipped, .. } = walk;
    stream.finish(summary.entries)?;
    progress.complete();
    partial
        .file()
        .sync_all()
        .map_err(|e| Error::io("write to disk the archive", partial.path(), e))?;
    Ok(Walked { summary, skipped })
}

fn check_cancelled(cancelled: &AtomicBool, path: &Path) -> Result<(), Error> {
    if cancelled.load(Ordering::Relaxed) {
        return Err(Error::Cancelled { path: path.to_path_buf() });
    }
    Ok(())
}

fn open_volume(volume: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, volume, flags, Mode::empty()).map_err(|e| match e {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP => {
            Error::VolumeMissing { path: volume.to_path_buf() }
        }
        e => Error::io("read the volume", volume, e),
    })
}

/// The tar stream on its way into the file: collected into chunks, hashed, compressed.
struct Stream<'a> {
    buffer: Vec<u8>,
    hash: Sha256,
    encoder: zstd::Encoder<'static, Counted<'a>>,
    partial: &'a Partial,
    volume: &'a Path,
    cancelled: &'a AtomicBool,
}

/// The file, telling the reading thread what there is.
struct Counted<'a> {
    file: &'a File,
    progress: &'a Progress,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.progress.wrote(written as u64);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> Stream<'a> {
    fn new(
        partial: &'a Partial,
        progress: &'a Progress,
        volume: &'a Path,
        cancelled: &'a AtomicBool,
    ) -> Result<Self, Error> {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
        let file = Counted { file: partial.file(), progress };
        let encoder = zstd::Encoder::new(file, LEVEL).and_then(|mut encoder| {
            encoder.include_checksum(true)?;
            // At most four.
            encoder.multithread(u32::try_from(threads).unwrap_or(1))?;
            Ok(encoder)
        });
        let encoder = encoder.map_err(|e| Error::io("compress into", partial.path(), e))?;
        let buffer = Vec::with_capacity(CHUNK);
        Ok(Self { buffer, hash: Sha256::new(), encoder, partial, volume, cancelled })
    }

    fn put(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(CHUNK - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            self.flush_full()?;
        }
        Ok(())
    }

    fn pad(&mut self, size: u64) -> Result<(), Error> {
        self.put(&[0; format::BLOCK][..format::padding(size)])
    }

    /// Lets `read` put at most `most` bytes into the buffer itself; returns how many it was.
    fn read_into(
        &mut self,
        most: u64,
        read: impl FnOnce(&mut [u8]) -> Result<usize, Error>,
    ) -> Result<usize, Error> {
        let start = self.buffer.len();
        let room = usize::try_from(most).unwrap_or(usize::MAX).min(CHUNK - start);
        self.buffer.resize(start + room, 0);
        let got = read(&mut self.buffer[start..]);
        self.buffer.truncate(start + *got.as_ref().unwrap_or(&0));
        let got = got?;
        self.flush_full()?;
        Ok(got)
    }

    fn flush_full(&mut self) -> Result<(), Error> {
        if self.buffer.len() < CHUNK { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<(), Error> {
        check_cancelled(self.cancelled, self.volume)?;
        self.hash.update(&self.buffer);
        self.compress()
    }

    fn compress(&mut self) -> Result<(), Error> {
        let written = self.encoder.write_all(&self.buffer);
        self.buffer.clear();
        written.map_err(|e| Error::io("write", self.partial.path(), e))
    }

    /// Adds the end and the seal.
    fn finish(mut self, entries: u64) -> Result<(), Error> {
        self.put(&format::END)?;
        self.flush()?;
        let seal = format::seal(&reader::hex(&self.hash.finalize()), entries);
        let finished = self.encoder.finish().and_then(|mut file| file.write_all(&seal));
        finished.map_err(|e| Error::io("write", self.partial.path(), e))
    }
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
}

struct Walk<'a> {
    volume: &'a Path,
    owners: Option<Owners>,
    stream: Stream<'a>,
    /// `./a/b`, the name of the entry being done.
    path: Vec<u8>,
    /// Whether [`BESIDE`] is to come, and what has its name is left out.
    reserved: bool,
    /// The first name of every file that has several.
    linked: HashMap<FileId, Vec<u8>>,
    /// Room for a list of attribute names.
    names: Vec<u8>,
    /// Room for directory entries.
    folder: Vec<u8>,
    summary: Summary,
    skipped: Vec<Skipped>,
}

impl Walk<'_> {
    fn run(&mut self, root: OwnedFd) -> Result<(), Error> {
        let before = self.stat_of(root.as_fd())?;
        let mut stack = vec![self.enter(root, before)?];
        while let Some(top) = stack.last_mut() {
            check_cancelled(self.stream.cancelled, self.volume)?;
            // The one at the top is never closed; see below.
            let Some(fd) = &top.fd else {
                return Err(self.changed("was moved"));
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
            self.unchanged(fd.as_fd(), &top.before)?;
            let done = stack.pop();
            let Some(above) = stack.last_mut() else { break };
            self.path.truncate(above.path);
            if let (None, Some(done)) = (&above.fd, done.and_then(|done| done.fd)) {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(&done, c"..", flags, Mode::empty())
                    .map_err(|e| Error::io("read", &self.here(), e))?;
                let now = self.stat_of(fd.as_fd())?;
                if id(&now) != id(&above.before) {
                    return Err(self.changed("was moved"));
                }
                above.fd = Some(fd);
            }
        }
        Ok(())
    }

    /// Archives one entry; a directory is returned to be walked.
    fn visit(&mut self, folder: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Folder>, Error> {
        if self.path.len() + 1 > MAX_PATH {
            return Err(Error::Unsupported {
                path: self.here(),
                reason: "its path is longer than 64 KiB",
            });
        }
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let stat = rustix::fs::statx(folder, name, flags, StatxFlags::BASIC_STATS)
            .map_err(|e| self.failed("look at", e))?;
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        let mounted = stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        let whiteout = (stat.stx_rdev_major, stat.stx_rdev_minor) == (0, 0);
        let reserved = self.reserved && self.path.strip_prefix(b"./") == Some(BESIDE.as_bytes());
        if reserved {
            self.skipped.push(Skipped { path: self.here(), reason: Reason::Reserved });
            return Ok(None);
        }
        let left_out = match kind {
            _ if mounted => Some(Reason::MountPoint),
            FileType::Socket => Some(Reason::Socket),
            FileType::CharacterDevice if whiteout => None,
            FileType::CharacterDevice | FileType::BlockDevice => Some(Reason::Device),
            _ => None,
        };
        if let Some(reason) = left_out {
            self.skipped.push(Skipped { path: self.here(), reason });
            if kind == FileType::Directory {
                let member = self.member(Kind::Directory, &stat);
                self.put(&member)?;
            }
            return Ok(None);
        }
        if kind == FileType::Directory {
            let fd = self.open(folder, name, OFlags::DIRECTORY)?;
            self.same(fd.as_fd(), &stat)?;
            return self.enter(fd, stat).map(Some);
        }
        if stat.stx_nlink > 1 {
            if let Some(first) = self.linked.get(&id(&stat)) {
                let link = first.clone();
                let member = Member { link, ..self.member(Kind::HardLink, &stat) };
                self.put(&member)?;
                return Ok(None);
            }
            self.linked.insert(id(&stat), self.path.clone());
        }
        match kind {
            FileType::RegularFile => self.file(folder, name, &stat)?,
            FileType::Symlink => {
                let link = rustix::fs::readlinkat(folder, name, Vec::new())
                    .map_err(|e| self.failed("read the link", e))?
                    .into_bytes();
                if link.len() > MAX_PATH {
                    let reason = "its target is longer than 64 KiB";
                    return Err(Error::Unsupported { path: self.here(), reason });
                }
                let member = Member { link, ..self.member(Kind::Symlink, &stat) };
                self.put(&member)?;
            }
            FileType::Fifo => {
                let member = self.member(Kind::Fifo, &stat);
                self.put(&member)?;
            }
            FileType::CharacterDevice => {
                let member = self.member(Kind::Whiteout, &stat);
                self.put(&member)?;
            }
            _ => {
                let reason = "it is of a kind unknown here";
                return Err(Error::Unsupported { path: self.here(), reason });
            }
        }
        Ok(None)
    }

    fn enter(&mut self, fd: OwnedFd, before: Statx) -> Result<Folder, Error> {
        let mut member = self.member(Kind::Directory, &before);
        member.xattrs = self.xattrs(fd.as_fd())?;
        self.put(&member)?;
        let mut names = Vec::new();
        let mut entries = RawDir::new(&fd, self.folder.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            // Spelled out because `entries` borrows from the walk.
            let path = || self.volume.join(OsStr::from_bytes(&self.path));
            let entry = entry.map_err(|e| Error::io("read", &path(), e))?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
        }
        names.sort_unstable_by(|a, b| b.cmp(a));
        Ok(Folder { fd: Some(fd), before, names, path: self.path.len() })
    }

    fn file(&mut self, folder: BorrowedFd<'_>, name: &[u8], stat: &Statx) -> Result<(), Error> {
        // Not to be kept waiting if it has just been replaced by a fifo.
        let fd = self.open(folder, name, OFlags::NONBLOCK)?;
        let mut member = self.member(Kind::File, stat);
        member.size = stat.stx_size;
        member.xattrs = self.xattrs(fd.as_fd())?;
        if stat.stx_blocks.saturating_mul(512) < stat.stx_size {
            member.segments = self.segments(fd.as_fd(), stat.stx_size)?;
        }
        let whole = [Segment { offset: 0, length: stat.stx_size }];
        self.put(&member)?;
        let mut stored = 0;
        for segment in member.segments.as_deref().unwrap_or(&whole) {
            self.data(fd.as_fd(), *segment)?;
            stored += segment.length;
        }
        self.stream.pad(stored)?;
        // Only now is it known that what was read is what the header announced.
        self.same(fd.as_fd(), stat)
    }

    fn data(&mut self, fd: BorrowedFd<'_>, segment: Segment) -> Result<(), Error> {
        let mut done = 0;
        while done < segment.length {
            let (volume, path) = (self.volume, &self.path);
            let got = self.stream.read_into(segment.length - done, |room| {
                rustix::io::retry_on_intr(|| {
                    rustix::io::pread(fd, &mut *room, segment.offset + done)
                })
                .map_err(|e| Error::io("read", &volume.join(OsStr::from_bytes(path)), e))
            })?;
            if got == 0 {
                return Err(self.changed("shrank"));
            }
            done += got as u64;
        }
        Ok(())
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
                Err(e) => return Err(self.failed("look for holes in", e)),
            };
            if segments.len() + 1 == MAX_SEGMENTS {
                // The rest is kept with its holes filled rather than mapped without end.
                segments.push(Segment { offset, length: size - offset });
                break;
            }
            end = match rustix::fs::seek(fd, SeekFrom::Hole(offset)) {
                Ok(end) => end.min(size),
                Err(Errno::NXIO) => return Err(self.changed("shrank")),
                Err(e) => return Err(self.failed("look for holes in", e)),
            };
            if end <= offset {
                return Err(self.changed("was rewritten"));
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
            Err(e) => return Err(self.failed("list the attributes of", e)),
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
                    return Err(self.changed("got other attributes"));
                }
                Err(e) => return Err(self.failed("read the attributes of", e)),
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
            xattrs: Vec::new(),
            size: 0,
            segments: None,
        }
    }

    fn put(&mut self, member: &Member) -> Result<(), Error> {
        self.summary.entries += 1;
        self.summary.bytes = self.summary.bytes.saturating_add(member.size);
        if matches!(member.kind, Kind::File | Kind::HardLink) {
            self.summary.files += 1;
        }
        let mut head = Vec::with_capacity(3 * format::BLOCK);
        if !format::encode(member, &mut head) {
            let reason = "its extended attributes take more than 16 MiB";
            return Err(Error::Unsupported { path: self.here(), reason });
        }
        self.stream.put(&head)
    }

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
        // Without the leading `./`.
        self.volume.join(OsStr::from_bytes(self.path.get(2..).unwrap_or_default()))
    }
}

fn id(stat: &Statx) -> FileId {
    (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino)
}

/// Attributes that belong to the file. The others belong to this machine's policy (labels
/// of a security module) or are made up by the file system.
fn is_kept(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || name.starts_with(b"trusted.")
        || matches!(
            name,
            b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default"
        )
}
