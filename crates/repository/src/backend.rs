//! The files of a repository as the engine wants them; one for each operation.
//!
//! It refuses the snapshot of a backup whose files could not all be read: the engine itself
//! would only log that.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use rustic_core::{
    BytesList, ErrorKind, FileType, Id, ReadBackend, RusticError, RusticResult, WriteBackend,
};

use crate::files::{Files, Range};

/// Where an operation is called off.
#[derive(Debug, Default)]
pub struct Gate {
    closed: AtomicBool,
    /// Why, for the first reason there was.
    reason: Mutex<Option<denizen_archive::Error>>,
    /// What the operation has written.
    written: Mutex<Vec<(FileType, Id)>>,
}

impl Gate {
    pub fn close(&self, reason: denizen_archive::Error) {
        let mut first = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(reason);
        self.closed.store(true, Ordering::Release);
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub fn reason(&self) -> Option<denizen_archive::Error> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What has been written of a kind.
    pub fn written(&self, kind: FileType) -> HashSet<Id> {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.iter().filter(|(of, _)| *of == kind).map(|(_, id)| *id).collect()
    }
}

/// How many files are kept where a request is dear: what is read next is mostly in the same one.
const KEPT: usize = 8;

#[derive(Debug)]
pub struct Backend {
    files: Arc<dyn Files>,
    gate: Arc<Gate>,
    /// What was read last, the latest last.
    kept: Mutex<Vec<(Id, Bytes)>>,
}

impl Backend {
    pub fn new(files: Arc<dyn Files>, gate: Arc<Gate>) -> Self {
        Self { files, gate, kept: Mutex::default() }
    }

    /// A part of a file that is fetched as a whole.
    fn part(&self, name: &str, id: &Id, range: Range) -> io::Result<Bytes> {
        let known = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            let at = kept.iter().position(|(known, _)| known == id);
            at.map(|at| {
                let found = kept.remove(at);
                kept.push(found.clone());
                found.1
            })
        };
        let whole = if let Some(whole) = known {
            whole
        } else {
            let whole = self.files.read(name, None)?;
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.len() >= KEPT {
                kept.remove(0);
            }
            kept.push((*id, whole.clone()));
            whole
        };
        let start = usize::try_from(range.offset).map_err(io::Error::other)?;
        let end = usize::try_from(range.offset + range.length).map_err(io::Error::other)?;
        if end > whole.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(whole.slice(start..end))
    }

    fn done<T>(&self, action: &str, name: &str, result: io::Result<T>) -> RusticResult<T> {
        result.map_err(|error| {
            let place = self.files.place();
            let guidance = format!("cannot {action} {name} in {place}: {error}");
            RusticError::new(ErrorKind::Backend, guidance)
        })
    }
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
            let size = self.done("look for", "config", self.files.size("config"))?;
            let size = size.map(|size| (Id::default(), u32::try_from(size).unwrap_or(u32::MAX)));
            return Ok(size.into_iter().collect());
        }
        let found = self.done("list", kind.dirname(), self.files.list(kind.dirname()))?;
        let known = found.into_iter().filter_map(|(path, size)| {
            let id: Id = path.rsplit('/').next()?.parse().ok()?;
            (name(kind, &id) == path).then_some((id, u32::try_from(size).unwrap_or(u32::MAX)))
        });
        Ok(known.collect())
    }

    fn read_full(&self, kind: FileType, id: &Id) -> RusticResult<Bytes> {
        let name = name(kind, id);
        self.done("read", &name, self.files.read(&name, None))
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
        let range = Range { offset: offset.into(), length: length.into() };
        let read = if kind == FileType::Pack && self.files.is_far() {
            self.part(&name, id, range)
        } else {
            self.files.read(&name, Some(range))
        };
        self.done("read", &name, read)
    }

    fn warmup_path(&self, kind: FileType, id: &Id) -> String {
        name(kind, id)
    }
}

impl WriteBackend for Backend {
    fn create(&self) -> RusticResult<()> {
        self.done("make folders for", "a repository", self.files.prepare())
    }

    fn write_bytes(
        &self,
        kind: FileType,
        id: &Id,
        _cacheable: bool,
        content: BytesList,
    ) -> RusticResult<()> {
        if kind == FileType::Snapshot && self.gate.is_closed() {
            return Err(RusticError::new(ErrorKind::Backend, "the backup was called off"));
        }
        let name = name(kind, id);
        // Two hosts that make a repository at the same time must not both believe they did.
        let new = kind == FileType::Config;
        self.done("write", &name, self.files.write(&name, content.into_vec(), new))?;
        self.gate.written.lock().unwrap_or_else(PoisonError::into_inner).push((kind, *id));
        Ok(())
    }

    fn remove(&self, kind: FileType, id: &Id, _cacheable: bool) -> RusticResult<()> {
        let name = name(kind, id);
        match self.files.remove(&name) {
            // Another host was faster.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => self.done("remove", &name, removed),
        }
    }
}
