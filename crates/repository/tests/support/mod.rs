//! What the tests share: those of trees, and a place for files that fails when it is told to.
#![allow(clippy::unwrap_used, dead_code, unused_imports)]

#[path = "../../../archive/tests/support/mod.rs"]
mod archive;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

pub use archive::{
    Bench, NEVER, Random, compare, fifo, is_root, now, picture, random_tree, set_mtime, stretches,
};
use bytes::Bytes;
use denizen_repository::{Counter, Entry, Error, Files, Range, Repository, Source, Written};
use uuid::Uuid;

pub const PASSWORD: &str = "correct horse";

pub fn source(session: Uuid, volume: &Path) -> Source<'_> {
    Source { session, name: Some("demo"), volume, root: None, owners: None }
}

pub fn write(repository: &Repository, session: Uuid, volume: &Path) -> Result<Written, Error> {
    repository.write(source(session, volume), now(), &Arc::default(), &NEVER)
}

/// Restores a backup beside what it is of, and compares the two.
pub fn comes_back(repository: &Repository, entry: &Entry, volume: &Path) {
    let home = tempfile::tempdir().unwrap();
    let into = home.path().join("home");
    restore(repository, &entry.id, &into).unwrap();
    compare(volume, &into.join("volume"));
}

pub fn restore(repository: &Repository, id: &str, into: &Path) -> Result<(), Error> {
    repository.restore(id, into, &[], None, &Counter::default(), &NEVER).map(drop)
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The call fails and does nothing.
    Before(rustix::io::Errno),
    /// It fails after it has done what it should: the answer was lost, or a sync failed.
    After(rustix::io::Errno),
    /// From this call on nothing works any more.
    Kill,
    /// From the next call on.
    KillAfter,
    /// What is written or read is altered, and nobody says so.
    Flip,
    /// The same: half of it is missing.
    Cut,
}

/// A place in memory.
#[derive(Debug, Default)]
pub struct Memory {
    pub files: Mutex<BTreeMap<String, Bytes>>,
    calls: AtomicU64,
    plan: Mutex<Option<(u64, Fault)>>,
}

impl Memory {
    pub fn copy(&self) -> Arc<Self> {
        let files = self.files.lock().unwrap().clone();
        Arc::new(Self { files: Mutex::new(files), ..Self::default() })
    }

    pub fn plan(&self, plan: Option<(u64, Fault)>) {
        self.calls.store(0, Ordering::SeqCst);
        *self.plan.lock().unwrap() = plan;
    }

    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// The names below a folder.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let files = self.files.lock().unwrap();
        files.keys().filter(|name| name.starts_with(folder)).cloned().collect()
    }

    pub fn change(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut files = self.files.lock().unwrap();
        let mut content = files[name].to_vec();
        change(&mut content);
        files.insert(name.to_owned(), content.into());
    }

    pub fn lose(&self, name: &str) {
        self.files.lock().unwrap().remove(name).unwrap();
    }

    fn call<T>(
        &self,
        run: impl FnOnce(&mut BTreeMap<String, Bytes>, Option<Fault>) -> io::Result<T>,
    ) -> io::Result<T> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        let plan = *self.plan.lock().unwrap();
        let error = |errno: rustix::io::Errno| Err(io::Error::from(errno));
        let files = &mut *self.files.lock().unwrap();
        match plan {
            Some((at, Fault::Before(errno))) if call == at => error(errno),
            Some((at, Fault::After(errno))) if call == at => {
                run(files, None)?;
                error(errno)
            }
            Some((at, Fault::Kill)) if call >= at => error(rustix::io::Errno::PIPE),
            Some((at, Fault::KillAfter)) if call > at => error(rustix::io::Errno::PIPE),
            Some((at, fault)) if call == at => run(files, Some(fault)),
            _ => run(files, None),
        }
    }
}

fn spoiled(content: &[u8], fault: Option<Fault>) -> Bytes {
    let mut content = content.to_vec();
    let middle = content.len() / 2;
    match fault {
        Some(Fault::Cut) => content.truncate(middle),
        Some(Fault::Flip) if middle > 0 => content[middle] ^= 1,
        _ => {}
    }
    content.into()
}

impl Files for Memory {
    fn place(&self) -> String {
        "memory".to_owned()
    }

    fn is_far(&self) -> bool {
        false
    }

    fn prepare(&self) -> io::Result<()> {
        self.call(|_, _| Ok(()))
    }

    fn list(&self, folder: &str) -> io::Result<Vec<(String, u64)>> {
        let below = format!("{folder}/");
        self.call(|files, _| {
            let found = files.iter().filter(|(name, _)| name.starts_with(&below));
            Ok(found.map(|(name, content)| (name.clone(), content.len() as u64)).collect())
        })
    }

    fn size(&self, name: &str) -> io::Result<Option<u64>> {
        self.call(|files, _| Ok(files.get(name).map(|content| content.len() as u64)))
    }

    fn read(&self, name: &str, range: Option<Range>) -> io::Result<Bytes> {
        self.call(|files, fault| {
            let all = files.get(name).ok_or(io::ErrorKind::NotFound)?;
            let part = range.map_or(0..all.len(), |range| {
                let start = usize::try_from(range.offset).unwrap().min(all.len());
                start..all.len().min(start.saturating_add(usize::try_from(range.length).unwrap()))
            });
            Ok(spoiled(&all[part], fault))
        })
    }

    fn write(&self, name: &str, content: Vec<Bytes>, new: bool) -> io::Result<()> {
        self.call(|files, fault| {
            if new && files.contains_key(name) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            files.insert(name.to_owned(), spoiled(&content.concat(), fault));
            Ok(())
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.call(|files, _| {
            files.remove(name).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
        })
    }

    fn sweep(&self) -> io::Result<()> {
        self.call(|_, _| Ok(()))
    }
}
