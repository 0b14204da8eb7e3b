//! What is remembered of sandboxes and templates from one daemon to the next: one SQLite file
//! beside the daemon's keys, a row for each, in JSON. It must never decide anything.
//!
//! Rows have tokens in them: nobody but the daemon's user can read the file.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rusqlite::{Connection, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The schema, in the order in which it came to be; `PRAGMA user_version` counts the steps done.
const MIGRATIONS: &[&str] = &["CREATE TABLE kept (
    kind TEXT NOT NULL,     -- sandbox, template, unfinished
    id TEXT NOT NULL,
    value TEXT NOT NULL,    -- JSON
    PRIMARY KEY (kind, id)
) STRICT, WITHOUT ROWID;"];

/// Why something is not remembered.
#[derive(Debug, thiserror::Error)]
#[error("cannot read or write {}: {source}", path.display())]
pub struct StoreError {
    path: PathBuf,
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// What a row is of.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Sandbox,
    Template,
    /// The session of a build.
    Unfinished,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Sandbox => "sandbox",
            Self::Template => "template",
            Self::Unfinished => "unfinished",
        }
    }
}

/// The file.
pub(crate) struct Store {
    path: PathBuf,
    file: Mutex<Connection>,
}

impl Store {
    pub(crate) fn open(state: &Path) -> Result<Self, StoreError> {
        let path = state.join("e2b.db");
        let opened = open(&path);
        let file = opened.map_err(|source| StoreError { path: path.clone(), source })?;
        Ok(Self { path, file: Mutex::new(file) })
    }

    /// All of a kind. What cannot be read is left out, and told.
    pub(crate) fn all<T: DeserializeOwned>(&self, kind: Kind) -> Result<Vec<T>, StoreError> {
        let file = self.file.lock();
        let rows = || -> rusqlite::Result<Vec<String>> {
            let mut all = file.prepare_cached("SELECT value FROM kept WHERE kind = ?1")?;
            all.query_map([kind.name()], |row| row.get(0))?.collect()
        };
        let rows = rows().map_err(|error| self.failed(error))?;
        let read = rows.iter().filter_map(|text| match serde_json::from_str(text) {
            Ok(value) => Some(value),
            Err(error) => {
                tracing::error!(kind = kind.name(), %error, "a row of e2b.db cannot be read");
                None
            }
        });
        Ok(read.collect())
    }

    /// Makes a row durable. Blocks for as long as the disk takes.
    pub(crate) fn save(
        &self,
        kind: Kind,
        id: &str,
        value: &impl Serialize,
    ) -> Result<(), StoreError> {
        let text = serde_json::to_string(value).map_err(|error| self.failed(error))?;
        let file = self.file.lock();
        let save = "INSERT OR REPLACE INTO kept (kind, id, value) VALUES (?1, ?2, ?3)";
        let saved = file
            .prepare_cached(save)
            .and_then(|mut save| save.execute(params![kind.name(), id, text]));
        saved.map(drop).map_err(|error| self.failed(error))
    }

    /// Forgets a row, as [`Store::save`].
    pub(crate) fn forget(&self, kind: Kind, id: &str) -> Result<(), StoreError> {
        let file = self.file.lock();
        let forget = "DELETE FROM kept WHERE kind = ?1 AND id = ?2";
        let gone = file
            .prepare_cached(forget)
            .and_then(|mut forget| forget.execute(params![kind.name(), id]));
        gone.map(drop).map_err(|error| self.failed(error))
    }

    fn failed(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> StoreError {
        StoreError { path: self.path.clone(), source: source.into() }
    }
}

fn open(path: &Path) -> Result<Connection, Box<dyn std::error::Error + Send + Sync>> {
    // SQLite gives what it makes beside it the same mode.
    std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    let mut file = Connection::open(path)?;
    file.pragma_update(None, "journal_mode", "wal")?;
    let done: usize = file.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let steps = MIGRATIONS.get(done..).ok_or("a newer denizen has written it")?;
    let change = file.transaction()?;
    for step in steps {
        change.execute_batch(step)?;
    }
    change.pragma_update(None, "user_version", MIGRATIONS.len())?;
    change.commit()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_was_saved_is_there_for_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        store.save(Kind::Sandbox, "a", &1).unwrap();
        store.save(Kind::Sandbox, "a", &2).unwrap();
        store.save(Kind::Sandbox, "b", &3).unwrap();
        store.save(Kind::Template, "a", &4).unwrap();
        store.forget(Kind::Sandbox, "b").unwrap();
        drop(store);
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(store.all::<u8>(Kind::Sandbox).unwrap(), [2]);
        assert_eq!(store.all::<u8>(Kind::Template).unwrap(), [4]);
        // What cannot be read is no reason to lose the rest.
        store.save(Kind::Sandbox, "c", &"text").unwrap();
        assert_eq!(store.all::<u8>(Kind::Sandbox).unwrap(), [2]);
        let mode = folder.path().join("e2b.db").metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
