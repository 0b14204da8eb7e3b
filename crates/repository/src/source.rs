//! What is backed up, as the engine takes it: the walk runs in a thread of its own, some entries
//! ahead, and the engine reads those files that its parent does not have.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use denizen_archive::Error;
use denizen_archive::tree::{Kind, Member, Sink};
use rustic_core::{
    ErrorKind, ReadSource, ReadSourceEntry, ReadSourceOpen, RusticError, RusticResult,
};
use rustix::fs::Stat;

use crate::Counter;
use crate::backend::{Gate, Reason};
use crate::node;

/// How many entries the walk is ahead: each may hold a file open.
const AHEAD: usize = 128;

type Entry = ReadSourceEntry<Content>;

/// The engine's end.
pub struct Source {
    found: Mutex<Option<Receiver<Entry>>>,
    gate: Arc<Gate>,
}

/// The walk's end.
pub struct Feed {
    entries: SyncSender<Entry>,
    shared: Arc<Shared>,
}

struct Shared {
    gate: Arc<Gate>,
    counter: Arc<Counter>,
}

pub fn source(gate: Arc<Gate>, counter: Arc<Counter>) -> (Source, Feed) {
    let (entries, found) = sync_channel(AHEAD);
    let source = Source { found: Mutex::new(Some(found)), gate: gate.clone() };
    (source, Feed { entries, shared: Arc::new(Shared { gate, counter }) })
}

impl ReadSource for Source {
    type Open = Content;
    type Iter = Iter;

    fn size(&self) -> RusticResult<Option<u64>> {
        Ok(None)
    }

    /// There is one walk: a second time there is nothing.
    fn entries(&self) -> Iter {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner).take();
        Iter { found, gate: self.gate.clone() }
    }
}

pub struct Iter {
    found: Option<Receiver<Entry>>,
    gate: Arc<Gate>,
}

impl Iterator for Iter {
    type Item = RusticResult<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        // The engine would go on to the end of what has failed already.
        if self.gate.is_closed() {
            self.found = None;
        }
        self.found.as_ref()?.recv().ok().map(Ok)
    }
}

impl Feed {
    fn put(&self, member: &Member, content: Option<Content>) -> Result<(), Error> {
        let path = PathBuf::from(node::os(member.path.strip_prefix(b"./").unwrap_or(&member.path)));
        let stat = content.as_ref().map(|content| &content.before);
        let node = node::of(member, stat);
        self.shared.counter.entry(member);
        self.shared.gate.count();
        let entry = ReadSourceEntry { path: path.clone(), node, open: content };
        // The engine has given up, and says why.
        self.entries.send(entry).map_err(|_| Error::Cancelled { path })
    }

    fn content(&self, member: &Member, file: OwnedFd) -> Result<Content, Error> {
        let path = PathBuf::from(node::os(&member.path));
        let before = rustix::fs::fstat(&file).map_err(|e| Error::Io {
            action: "look at",
            path: path.clone(),
            source: e.into(),
        })?;
        Ok(Content { file: file.into(), before, path, shared: self.shared.clone() })
    }
}

impl Sink for Feed {
    fn entry(&mut self, member: Member) -> Result<(), Error> {
        // The walk's own root has no name in a snapshot.
        if member.kind == Kind::Directory && node::steps(&member.path).next().is_none() {
            return Ok(());
        }
        self.put(&member, None)
    }

    fn file(&mut self, member: Member, content: BorrowedFd<'_>) -> Result<(), Error> {
        let file = content.try_clone_to_owned().map_err(|source| Error::Io {
            action: "read",
            path: PathBuf::from(node::os(&member.path)),
            source,
        })?;
        let content = self.content(&member, file)?;
        self.put(&member, Some(content))
    }

    /// The format knows further names of files; of all else there is nothing to share.
    fn links_all(&self) -> bool {
        false
    }

    /// A file of its own, which the engine finds that it has already.
    fn link(
        &mut self,
        member: Member,
        content: &dyn Fn() -> Result<OwnedFd, Error>,
    ) -> Result<(), Error> {
        let content = self.content(&member, content()?)?;
        let size = u64::try_from(content.before.st_size).unwrap_or(0);
        let member = Member { kind: Kind::File, link: Vec::new(), size, ..member };
        self.put(&member, Some(content))
    }
}

/// A file that the engine may want to read.
pub struct Content {
    file: File,
    before: Stat,
    path: PathBuf,
    shared: Arc<Shared>,
}

impl ReadSourceOpen for Content {
    type Reader = Reader;

    fn open(self) -> RusticResult<Reader> {
        if self.shared.gate.is_closed() {
            return Err(RusticError::new(ErrorKind::InputOutput, "the backup was called off"));
        }
        Ok(Reader { content: self, read: 0 })
    }
}

pub struct Reader {
    content: Content,
    read: u64,
}

impl Reader {
    fn fail(&self, error: Error) -> io::Error {
        let text = error.to_string();
        self.content.shared.gate.close(Reason::Tree(error));
        io::Error::other(text)
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Content { file, before, path, shared } = &self.content;
        if shared.gate.is_closed() {
            return Err(io::Error::other("the backup was called off"));
        }
        // By offset: the walk's descriptor shares the position.
        let got = rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut *buffer, self.read));
        let got = got.map_err(|e| {
            self.fail(Error::Io { action: "read", path: path.clone(), source: e.into() })
        })?;
        self.read += got as u64;
        shared.counter.bytes(got as u64);
        if got == 0 && !buffer.is_empty() {
            let now = rustix::fs::fstat(file).map_err(|e| {
                self.fail(Error::Io { action: "look at", path: path.clone(), source: e.into() })
            })?;
            let seen = |stat: &Stat| {
                (stat.st_size, stat.st_mtime, stat.st_mtime_nsec, stat.st_ctime, stat.st_ctime_nsec)
            };
            if seen(&now) != seen(before) || i64::try_from(self.read) != Ok(before.st_size) {
                let changed = Error::Changed { path: path.clone(), how: "was changed" };
                return Err(self.fail(changed));
            }
        }
        Ok(got)
    }
}
