//! Makes an archive of a volume.
//!
//! One thread walks the volume, reads it and feeds the compressor; the compressor has its own
//! threads; one more reads the file back while it grows and checks it. Never lets a name other
//! than the partial one exist before the archive is complete, synced and checked.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Write};
use std::iter;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::thread;

use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::format::{self, Kind, Member, Segment};
use crate::owners::Owners;
use crate::reader::{self, CHUNK, Follow, Progress};
use crate::store::Partial;
use crate::walk::{Sink, Skipped, Walk, at, check_cancelled, open_volume};
use crate::{Entry, Error, Summary};

/// The zstd command's default: the best ratio that still keeps up with a disk.
const LEVEL: i32 = 3;
/// A backup runs beside the sessions: it should not take every core of a large machine.
const MOST_THREADS: usize = 4;
/// What [`write`] reads.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The volume.
    pub volume: &'a Path,
    /// A folder to be archived with it, in the volume's root: as [`BESIDE`], or with a number
    /// behind it if the volume has something of that name.
    pub beside: Option<&'a Path>,
    /// Whose numbers are others in the archive than on disk.
    pub owners: Option<Owners>,
}

/// The name that [`Source::beside`] has in an archive, unless that is taken.
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
    let summary = Summary { entries: 0, files: 0, bytes: 0, sealed: true };
    let name = beside.is_some().then(|| BESIDE.to_owned());
    let archive = Archive { stream, volume, summary, beside: name };
    let mut walk = Walk::new(volume, owners, cancelled, archive);
    walk.run(root)?;
    if let (Some(beside), Some(name)) = (beside, walk.sink.beside.take()) {
        walk.run_beside(beside, &name)?;
    }
    let Walk { sink: Archive { stream, summary, .. }, skipped, .. } = walk;
    stream.finish(summary.entries)?;
    progress.complete();
    partial
        .file()
        .sync_all()
        .map_err(|e| Error::io("write to disk the archive", partial.path(), e))?;
    Ok(Walked { summary, skipped })
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

/// Puts into the stream what the walk finds.
struct Archive<'a> {
    stream: Stream<'a>,
    volume: &'a Path,
    summary: Summary,
    /// What the folder beside the volume is called, if one is to come.
    beside: Option<String>,
}

impl Sink for Archive<'_> {
    fn top(&mut self, member: Member, names: &[Vec<u8>]) -> Result<(), Error> {
        if self.summary.entries > 0 {
            return self.put(&member, None);
        }
        self.beside = self.beside.take().map(|name| free(name, names));
        let said = self.beside.as_deref().unwrap_or_default();
        self.put(&member, Some(&[format::BESIDE_START, said.as_bytes()].concat()))
    }

    fn entry(&mut self, member: Member) -> Result<(), Error> {
        self.put(&member, None)
    }

    fn file(&mut self, member: Member, content: BorrowedFd<'_>) -> Result<(), Error> {
        self.put(&member, None)?;
        let whole = [Segment { offset: 0, length: member.size }];
        let mut stored = 0;
        for segment in member.segments.as_deref().unwrap_or(&whole) {
            self.data(&member, content, *segment)?;
            stored += segment.length;
        }
        self.stream.pad(stored)
    }
}

/// A name, or with the first number behind it with which it is none of those.
fn free(name: String, taken: &[Vec<u8>]) -> String {
    let taken: HashSet<&[u8]> = taken.iter().map(Vec::as_slice).collect();
    let numbered = (1_u64..).map(|number| format!("{name}-{number}"));
    let mut names = iter::once(name.clone()).chain(numbered);
    // There are more numbers than names.
    names.find(|name| !taken.contains(name.as_bytes())).unwrap_or(name)
}

impl Archive<'_> {
    fn put(&mut self, member: &Member, comment: Option<&[u8]>) -> Result<(), Error> {
        self.summary.entries += 1;
        self.summary.bytes = self.summary.bytes.saturating_add(member.size);
        if matches!(member.kind, Kind::File | Kind::HardLink) {
            self.summary.files += 1;
        }
        let mut head = Vec::with_capacity(3 * format::BLOCK);
        if !format::encode(member, comment, &mut head) {
            let path = at(self.volume, &member.path);
            let reason = "its extended attributes take more than 16 MiB";
            return Err(Error::Unsupported { path, reason });
        }
        self.stream.put(&head)
    }

    fn data(
        &mut self,
        member: &Member,
        content: BorrowedFd<'_>,
        segment: Segment,
    ) -> Result<(), Error> {
        let here = || at(self.volume, &member.path);
        let mut done = 0;
        while done < segment.length {
            let got = self.stream.read_into(segment.length - done, |room| {
                rustix::io::retry_on_intr(|| {
                    rustix::io::pread(content, &mut *room, segment.offset + done)
                })
                .map_err(|e| Error::io("read", &here(), e))
            })?;
            if got == 0 {
                return Err(Error::Changed { path: here(), how: "shrank" });
            }
            done += got as u64;
        }
        Ok(())
    }
}
