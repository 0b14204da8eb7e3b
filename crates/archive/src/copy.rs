//! Copies a tree: what the walk finds is made again beside it, in one go, with no archive in
//! between. Files share their blocks with the original where the file system can do that
//! (`FICLONE`, ioctl_ficlone(2)), which takes no room and no time for what they hold; elsewhere
//! the kernel copies their data, without the holes.
//!
//! It keeps what an archive keeps and leaves out what an archive leaves out. It must never change
//! the tree it copies, and leaves nothing behind when it fails.

use std::fs;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use rustix::io::Errno;

use crate::Error;
use crate::format::{Member, Segment};
use crate::reader::CHUNK;
use crate::restore::{Place, prepare};
use crate::walk::{Sink, Skipped, Walk, at, open_volume};

/// The most that the kernel is asked to copy between two looks at whether it is still wanted.
const AT_ONCE: u64 = 16 << 20;

/// What [`copy`] made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Regular files made; further hard links to them are not counted.
    pub files: u64,
    /// How many of them share their blocks with the original.
    pub shared: u64,
    /// What the tree holds and the copy does not.
    pub skipped: Vec<Skipped>,
    /// What this user or file system did not permit, as in [`crate::Restored`]. At most 256.
    pub warnings: Vec<String>,
    /// How many more there were.
    pub more_warnings: u64,
}

/// Copies the folder `tree` into the folder `into`, which must be empty or not exist (its parent
/// must).
///
/// Owners are kept when running as root; otherwise as by [`crate::restore`]. Nothing is synced:
/// whoever wants the copy to outlast a power cut does that (`syncfs`) when the original need not
/// stand still any more. Blocks; `cancelled` is looked at every few MiB and at every entry. On any
/// error what was made is removed again, `into` itself too unless it was there before.
///
/// # Errors
/// [`Error::Changed`] if the tree was written to meanwhile, as far as that can be seen: a file
/// that changes after it was copied is not noticed. [`Error::Cancelled`], [`Error::NotEmpty`],
/// [`Error::VolumeMissing`], or what met the reading or making of files.
pub fn copy(tree: &Path, into: &Path, cancelled: &AtomicBool) -> Result<Copied, Error> {
    let root = open_volume(tree)?;
    let created = prepare(into)?;
    let place = match Place::new(tree, into, None, cancelled) {
        Ok(place) => place,
        Err(e) => {
            if created {
                // It was just made and is empty; if it cannot go, the first error says why.
                let _ = fs::remove_dir(into);
            }
            return Err(e);
        }
    };
    let copier = Copier { tree, place, can_share: true, files: 0, shared: 0 };
    let mut walk = Walk::new(tree, None, cancelled, copier);
    let done = walk.run(root).and_then(|()| walk.sink.place.finish());
    let Walk { sink: Copier { mut place, files, shared, .. }, skipped, .. } = walk;
    if let Err(e) = done {
        place.undo(created);
        return Err(e);
    }
    let Place { warnings, more_warnings, .. } = place;
    Ok(Copied { files, shared, skipped, warnings, more_warnings })
}

struct Copier<'a> {
    tree: &'a Path,
    place: Place<'a>,
    /// Whether the file system may be able to.
    can_share: bool,
    files: u64,
    shared: u64,
}

impl Sink for Copier<'_> {
    fn entry(&mut self, member: Member) -> Result<(), Error> {
        self.place.make(member, |_, _, _| Ok(()))
    }

    fn file(&mut self, member: Member, content: BorrowedFd<'_>) -> Result<(), Error> {
        let Self { tree, place, can_share, files, shared } = self;
        *files += 1;
        place.make(member, |place, fd, member| {
            if *can_share && member.size > 0 {
                match rustix::fs::ioctl_ficlone(fd, content) {
                    Ok(()) => {
                        *shared += 1;
                        return Ok(());
                    }
                    // No file here can.
                    Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::NOTTY | Errno::NOSYS) => {
                        *can_share = false;
                    }
                    // This one cannot: it is laid out, or sealed, in another way.
                    Err(Errno::INVAL | Errno::PERM | Errno::TXTBSY) => {}
                    Err(e) => return Err(place.failed("share the blocks of", &member.path, e)),
                }
            }
            let whole = [Segment { offset: 0, length: member.size }];
            if member.segments.is_some() {
                rustix::fs::ftruncate(fd, member.size)
                    .map_err(|e| place.failed("make", &member.path, e))?;
            }
            let segments = member.segments.as_deref().unwrap_or(&whole);
            segments.iter().try_for_each(|segment| data(tree, place, member, content, fd, *segment))
        })
    }
}

/// Copies a part of a file to where it is in the original.
fn data(
    tree: &Path,
    place: &Place<'_>,
    member: &Member,
    from: BorrowedFd<'_>,
    to: &OwnedFd,
    segment: Segment,
) -> Result<(), Error> {
    let (mut offset, end) = (segment.offset, segment.offset + segment.length);
    while offset < end {
        place.check_cancelled()?;
        let length = usize::try_from((end - offset).min(AT_ONCE)).unwrap_or(CHUNK);
        let (mut read_at, mut write_at) = (offset, offset);
        let copied =
            rustix::fs::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), length);
        let copied = match copied {
            // Between these two file systems the kernel does not do it.
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
                by_hand(place, member, from, to, offset, length)?
            }
            Err(Errno::INTR) => continue,
            copied => copied.map_err(|e| place.failed("write", &member.path, e))?,
        };
        if copied == 0 {
            return Err(Error::Changed { path: at(tree, &member.path), how: "shrank" });
        }
        offset += copied as u64;
    }
    Ok(())
}

fn by_hand(
    place: &Place<'_>,
    member: &Member,
    from: BorrowedFd<'_>,
    to: &OwnedFd,
    offset: u64,
    length: usize,
) -> Result<usize, Error> {
    let mut buffer = vec![0; length.min(CHUNK)];
    let read = rustix::io::retry_on_intr(|| rustix::io::pread(from, &mut *buffer, offset))
        .map_err(|e| place.failed("read", &member.path, e))?;
    place.write(to, member, offset, &buffer[..read])?;
    Ok(read)
}
