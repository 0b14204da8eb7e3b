//! The files of a repository as the engine wants them; one for each operation.
//!
//! It lets nothing more through once something has failed, above all no snapshot: the engine
//! itself would only log that a file could not be read.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use rustic_core::{
    BytesList, ErrorKind, FileType, Id, ReadBackend, RusticError, RusticResult, WriteBackend,
};

use crate::files::{Files, Range};

/// Where an operation is called off, and what is known of it.
#[derive(Debug, Default)]
pub struct Gate {
    closed: AtomicBool,
    /// Why, for the first reason there was.
    reason: Mutex<Option<Reason>>,
    /// What the operation has written.
    written: Mutex<Vec<(FileType, Id)>>,
    /// How many entries the engine was told of.
    entries: AtomicU64,
    /// Whether snapshots are not written: what they are of is not read back yet.
    holds_snapshots: bool,
}

#[derive(Debug)]
pub enum Reason {
    /// The files of the session.
    Tree(denizen_archive::Error),
    /// Those of the repository. The engine may tell only what came of it.
    Repository(String),
}

impl Gate {
    /// One that lets no snapshot through.
    pub fn without_snapshots() -> Self {
        Self { holds_snapshots: true, ..Self::default() }
    }

    pub fn close(&self, reason: Reason) {
        let mut first = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(reason);
        self.closed.store(true, Ordering::Release);
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub fn reason(&self) -> Option<Reason> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// One more entry.
    pub fn count(&self) {
        self.entries.fetch_add(1, Ordering::Relaxed);
    }

    pub fn entries(&self) -> u64 {
        self.entries.load(Ordering::Relaxed)
    }

    /// What has been written of a kind.
    pub fn written(&self, kind: FileType) -> HashSet<Id> {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.iter().filter(|(of, _)| *of == kind).map(|(_, id)| *id).collect()
    }
}

/// How much is read at once: what is read next mostly follows. More where a request is dear.
const WINDOW: u64 = 256 << 10;
const FAR_WINDOW: u64 = 2 << 20;
/// How many such parts are kept.
const KEPT: usize = 16;

/// A part of a file, once it is read.
type Part = Arc<Mutex<Option<Bytes>>>;

#[derive(Clone, Debug)]
struct Window {
    pack: Id,
    start: u64,
    end: u64,
    part: Part,
}

#[derive(Debug)]
pub struct Backend {
    files: Arc<dyn Files>,
    gate: Arc<Gate>,
    /// What was read last, the latest last.
    kept: Mutex<Vec<Window>>,
}

impl Backend {
    pub fn new(files: Arc<dyn Files>, gate: Arc<Gate>) -> Self {
        Self { files, gate, kept: Mutex::default() }
    }

    /// The part of a file that holds pieces, exactly. What follows is read with it.
    pub fn part(&self, pack: &Id, offset: u64, length: u64) -> io::Result<Bytes> {
        let end = offset.saturating_add(length);
        let window = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            let holds = |it: &Window| it.pack == *pack && it.start <= offset && end <= it.end;
            let window = if let Some(at) = kept.iter().position(holds) {
                kept.remove(at)
            } else {
                if kept.len() >= KEPT {
                    kept.remove(0);
                }
                let size = if self.files.is_far() { FAR_WINDOW } else { WINDOW };
                let end = end.max(offset.saturating_add(size));
                Window { pack: *pack, start: offset, end, part: Part::default() }
            };
            kept.push(window.clone());
            window
        };
        // Whoever comes second waits for what the first one reads.
        let mut part = window.part.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = if let Some(bytes) = &*part {
            bytes.clone()
        } else {
            let range = Range { offset: window.start, length: window.end - window.start };
            let bytes = self.files.read(&name(FileType::Pack, pack), Some(range))?;
            part.insert(bytes).clone()
        };
        drop(part);
        let start = usize::try_from(offset - window.start).map_err(io::Error::other)?;
        let end = usize::try_from(end - window.start).map_err(io::Error::other)?;
        if end > bytes.len() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it is cut short"));
        }
        Ok(bytes.slice(start..end))
    }
}

fn done<T>(action: &str, name: &str, result: io::Result<T>) -> RusticResult<T> {
    result.map_err(|error| {
        let guidance = format!("cannot {action} {name}: {error}");
        RusticError::new(ErrorKind::Backend, guidance)
    })
}

/// The layout of a repository (restic's design document, "Repository Layout").
pub fn name(kind: FileType, id: &Id) -> String {
    let id = id.to_hex();
    match kind {
        FileType::Config => "config".to_owned(),
        FileType::Pack => format!("data/{}/{}", &id[..2], &*id),
        _ => format!("{}/{}", kind.dirname(), &*id),
    }
}

impl ReadBackend for Backend {
    fn location(&self) -> String {
        self.files.place()
    }

    fn list_with_size(&self, kind: FileType) -> RusticResult<Vec<(Id, u32)>> {
        if kind == FileType::Config {
            let size = done("look for", "config", self.files.size("config"))?;
            let size = size.map(|size| (Id::default(), u32::try_from(size).unwrap_or(u32::MAX)));
            return Ok(size.into_iter().collect());
        }
        let found = done("list", kind.dirname(), self.files.list(kind.dirname()))?;
        let known = found.into_iter().filter_map(|(path, size)| {
            let id: Id = path.rsplit('/').next()?.parse().ok()?;
            (name(kind, &id) == path).then_some((id, u32::try_from(size).unwrap_or(u32::MAX)))
        });
        Ok(known.collect())
    }

    fn read_full(&self, kind: FileType, id: &Id) -> RusticResult<Bytes> {
        let name = name(kind, id);
        done("read", &name, self.files.read(&name, None))
    }

    fn read_partial(
        &self,
        kind: FileType,
        id: &Id,
        _cacheable: bool,
        offset: u32,
        length: u32,
    ) -> RusticResult<Bytes> {
        let name = name(kind, id);
        let read = if kind == FileType::Pack {
            self.part(id, offset.into(), length.into())
        } else {
            let range = Range { offset: offset.into(), length: length.into() };
            self.files.read(&name, Some(range)).and_then(|part| match part.len() {
                got if got as u64 == range.length => Ok(part),
                _ => Err(io::ErrorKind::UnexpectedEof.into()),
            })
        };
        done("read", &name, read)
    }

    fn warmup_path(&self, kind: FileType, id: &Id) -> String {
        name(kind, id)
    }
}

impl WriteBackend for Backend {
    fn create(&self) -> RusticResult<()> {
        done("make folders for", "a repository", self.files.prepare())
    }

    fn write_bytes(
        &self,
        kind: FileType,
        id: &Id,
        _cacheable: bool,
        content: BytesList,
    ) -> RusticResult<()> {
        if self.gate.is_closed() {
            return Err(RusticError::new(ErrorKind::Backend, "the backup was called off"));
        }
        if kind == FileType::Snapshot && self.gate.holds_snapshots {
            return Ok(());
        }
        let name = name(kind, id);
        // Two hosts that make a repository at the same time must not both believe they did.
        let new = kind == FileType::Config;
        let written = self.files.write(&name, content.into_vec(), new);
        if let Err(error) = &written {
            self.gate.close(Reason::Repository(format!("cannot write {name}: {error}")));
        }
        // Even then it may be there.
        self.gate.written.lock().unwrap_or_else(PoisonError::into_inner).push((kind, *id));
        done("write", &name, written)
    }

    fn remove(&self, kind: FileType, id: &Id, _cacheable: bool) -> RusticResult<()> {
        let name = name(kind, id);
        match self.files.remove(&name) {
            // Another host was faster.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => done("remove", &name, removed),
        }
    }
}
