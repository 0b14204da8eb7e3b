//! What a pool remembers: one SQLite file, and the lock that makes this process its only
//! owner.
//!
//! The file is there for people too: `sqlite3 <volume_root>/.denizen/registry.db 'select * from
//! sessions'` works at any time, also while a daemon runs. The registry must never decide
//! anything: it writes the rows it is given and gives them back.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use denizen_network::EgressRules;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, params};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::lifecycle::{Phase, PoolTime, Row};
use crate::name::SessionName;
use crate::share::{Mount, Share};
use crate::time::SavedTime;

/// `PRAGMA application_id`: tells `file(1)` and us that the file is a denizen registry.
const APPLICATION_ID: i32 = 0x646e_7a6e;

/// How the schema came to be, one step a version; `PRAGMA user_version` counts the steps done.
/// Steps are never changed once released: a change is a new step.
const MIGRATIONS: &[&str] = &[
    "CREATE TABLE sessions (
        id TEXT PRIMARY KEY NOT NULL,   -- a UUID
        phase TEXT NOT NULL,            -- creating, active, stopped, restoring, pruning, archived, missing, removing
        created_at INTEGER NOT NULL,    -- milliseconds of pool time, as the two below
        last_used INTEGER NOT NULL,
        stopped_at INTEGER NOT NULL,
        unsaved INTEGER NOT NULL,       -- 1: there may be changes that no verified backup holds
        backup TEXT                     -- the latest verified backup
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE clock (                -- pool time, and what it was measured by
        one INTEGER PRIMARY KEY NOT NULL CHECK (one = 1),
        pool_ms INTEGER NOT NULL,
        wall_ms INTEGER NOT NULL,
        uptime_ms INTEGER NOT NULL,
        boot TEXT NOT NULL
    ) STRICT;",
    "CREATE TABLE names (
        name TEXT PRIMARY KEY NOT NULL,
        session TEXT NOT NULL UNIQUE
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE chores (               -- what the pool does now and then, for no session alone
        name TEXT PRIMARY KEY NOT NULL,  -- forget
        done_at INTEGER NOT NULL         -- milliseconds of pool time
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE backups (              -- what is known of each session's latest, for people
        session TEXT PRIMARY KEY NOT NULL,
        name TEXT NOT NULL,
        taken_at INTEGER NOT NULL,       -- milliseconds since 1970, by the wall clock
        added INTEGER NOT NULL,          -- bytes by which the destination has grown with it
        size INTEGER                     -- bytes of the content of its files, where it is known
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE destination (          -- where backups were last written or read
        one INTEGER PRIMARY KEY NOT NULL CHECK (one = 1),
        place TEXT NOT NULL
    ) STRICT;",
    // 1: somebody has paused it, and nobody taken it since.
    "ALTER TABLE sessions ADD COLUMN paused INTEGER NOT NULL DEFAULT 0;",
    "CREATE TABLE egress (               -- what sessions may reach of the pool's network
        session TEXT PRIMARY KEY NOT NULL,
        rules TEXT NOT NULL              -- JSON
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE shares (               -- shared folders
        id TEXT PRIMARY KEY NOT NULL,
        name TEXT NOT NULL UNIQUE,
        created_at INTEGER NOT NULL      -- milliseconds since 1970, by the wall clock
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE mounts (               -- which sessions have them
        session TEXT PRIMARY KEY NOT NULL,
        mounts TEXT NOT NULL             -- JSON
    ) STRICT, WITHOUT ROWID;",
];

/// The file in the pool's own folder that its process holds a lock on.
const LOCK: &str = "lock";

/// The chore of deleting the backups that are not kept.
const FORGET: &str = "forget";

/// What is wrong with a registry.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// Another process owns the volume root.
    #[error(
        "{} is in use by another denizen (its lock is held): stop that one first, or use another \
         volume root", root.display()
    )]
    Locked {
        /// The volume root.
        root: PathBuf,
    },
    /// What is at the volume root's place is not what this process has locked.
    #[error(
        "{} is not there any more, or is another one than at the start: put the volume root back in \
         its place, or start denizen anew for the one that is there now", path.display()
    )]
    Replaced {
        /// The lock's file.
        path: PathBuf,
    },
    /// A newer denizen has written the registry.
    #[error(
        "{} has schema version {found}, this denizen knows versions up to {known}: use the newer \
         denizen that wrote it", path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: usize,
        /// The newest version known here.
        known: usize,
    },
    /// The file is not a registry, or is damaged.
    #[error(
        "{} is not a readable registry ({problem}): move it aside and start again; volumes on \
         disk are then taken in again, and archived sessions are still in the backup destination",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file beside the registry could not be made or locked.
    #[error("cannot use {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// SQLite refused to read or write.
    #[error("cannot read or write {}: {source}", path.display())]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// What SQLite said; a full disk shows up here.
        source: rusqlite::Error,
    },
}

type Result<T> = std::result::Result<T, RegistryError>;

/// One change to be made durable.
#[derive(Clone, Debug)]
pub(crate) enum Write {
    Save(Row),
    Forget(Uuid),
}

impl Write {
    pub(crate) fn id(&self) -> Uuid {
        match self {
            Self::Save(row) => row.id,
            Self::Forget(id) => *id,
        }
    }
}

/// What is known of a backup without a look at the destination. Only shown, and to guess by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) name: String,
    pub(crate) taken_at: i64,
    pub(crate) added: u64,
    pub(crate) size: Option<u64>,
}

/// What the registry held when it was opened.
#[derive(Debug)]
pub(crate) struct Remembered {
    pub(crate) rows: Vec<Row>,
    pub(crate) names: Vec<(SessionName, Uuid)>,
    pub(crate) time: Option<SavedTime>,
    /// When the retention was last applied.
    pub(crate) forgot_at: Option<PoolTime>,
    /// Of the latest backups.
    pub(crate) facts: Vec<(Uuid, Facts)>,
    /// Where backups were last written or read.
    pub(crate) destination: Option<String>,
    /// The rules of those sessions that have some of their own.
    pub(crate) egress: Vec<(Uuid, EgressRules)>,
    /// The shared folders of those sessions that have some.
    pub(crate) mounts: Vec<(Uuid, Vec<Mount>)>,
    /// All shared folders.
    pub(crate) shares: Vec<Uuid>,
}

/// An open registry. The lock is held until it is dropped.
#[derive(Debug)]
pub(crate) struct Registry {
    path: PathBuf,
    connection: Connection,
    lock: File,
}

impl Registry {
    /// Takes the lock in `folder` (`<volume_root>/.denizen`), which must exist, and opens the
    /// registry there, making it at first use and bringing an older schema up to date.
    pub(crate) fn open(root: &Path, folder: &Path) -> Result<(Self, Remembered)> {
        let lock = lock(root, folder)?;
        let path = folder.join("registry.db");
        make_if_new(&path)?;
        let damaged = |problem: String| RegistryError::Damaged { path: path.clone(), problem };
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&path, flags).map_err(sqlite(&path))?;
        connection
            .query_row("PRAGMA quick_check(1)", [], |row| row.get::<_, String>(0))
            .map_err(|error| diagnose(&path, error))
            .and_then(|answer| if answer == "ok" { Ok(()) } else { Err(damaged(answer)) })?;
        let application: i32 = connection
            .query_row("PRAGMA application_id", [], |row| row.get(0))
            .map_err(sqlite(&path))?;
        if application != APPLICATION_ID {
            return Err(damaged("it was not written by denizen".to_owned()));
        }
        let mut registry = Self { path: path.clone(), connection, lock };
        registry.migrate()?;
        let remembered = registry.load()?;
        Ok((registry, remembered))
    }

    fn migrate(&mut self) -> Result<()> {
        let path = self.path.clone();
        let found: usize = self
            .connection
            .query_row("PRAGMA user_version", [], |row| row.get(0))
            .map_err(sqlite(&path))?;
        if found > MIGRATIONS.len() {
            return Err(RegistryError::Newer { path, found, known: MIGRATIONS.len() });
        }
        let transaction = self.connection.transaction().map_err(sqlite(&path))?;
        for (step, sql) in MIGRATIONS.iter().enumerate().skip(found) {
            transaction.execute_batch(sql).map_err(sqlite(&path))?;
            transaction.pragma_update(None, "user_version", step + 1).map_err(sqlite(&path))?;
        }
        transaction.commit().map_err(sqlite(&path))
    }

    fn load(&self) -> Result<Remembered> {
        let read = || -> rusqlite::Result<Remembered> {
            let mut rows = self.connection.prepare(
                "SELECT id, phase, created_at, last_used, stopped_at, unsaved, backup, paused
                 FROM sessions",
            )?;
            let rows = rows.query_map([], read_row)?.collect::<rusqlite::Result<_>>()?;
            let mut names = self.connection.prepare("SELECT name, session FROM names")?;
            let names = names.query_map([], read_name)?.collect::<rusqlite::Result<_>>()?;
            let time = self
                .connection
                .query_row("SELECT pool_ms, wall_ms, uptime_ms, boot FROM clock", [], |row| {
                    Ok(SavedTime {
                        pool_ms: row.get(0)?,
                        wall_ms: row.get(1)?,
                        uptime_ms: row.get(2)?,
                        boot: row.get(3)?,
                    })
                })
                .optional()?;
            let forgot_at = self
                .connection
                .query_row("SELECT done_at FROM chores WHERE name = ?1", [FORGET], |row| {
                    row.get(0).map(PoolTime)
                })
                .optional()?;
            let mut facts = self
                .connection
                .prepare("SELECT session, name, taken_at, added, size FROM backups")?;
            let facts = facts.query_map([], read_facts)?.collect::<rusqlite::Result<_>>()?;
            let destination = self
                .connection
                .query_row("SELECT place FROM destination", [], |row| row.get(0))
                .optional()?;
            let mut egress = self.connection.prepare("SELECT session, rules FROM egress")?;
            let egress = egress.query_map([], read_of)?.collect::<rusqlite::Result<_>>()?;
            let mut mounts = self.connection.prepare("SELECT session, mounts FROM mounts")?;
            let mounts = mounts.query_map([], read_of)?.collect::<rusqlite::Result<_>>()?;
            let mut shares = self.connection.prepare(SHARES)?;
            let shares = shares.query_map([], |row| read_share(row).map(|share| share.id))?;
            let shares = shares.collect::<rusqlite::Result<_>>()?;
            Ok(Remembered {
                rows,
                names,
                time,
                forgot_at,
                facts,
                destination,
                egress,
                mounts,
                shares,
            })
        };
        read().map_err(|error| diagnose(&self.path, error))
    }

    /// That it can be read now, and is still the one that others would find.
    pub(crate) fn check(&self) -> Result<()> {
        let path = self.path.with_file_name(LOCK);
        let failed = |source| RegistryError::Io { path: path.clone(), source };
        let held = self.lock.metadata().map_err(failed)?;
        // Somebody may have made all of it anew in the meantime.
        let is_held = |there: fs::Metadata| (there.dev(), there.ino()) == (held.dev(), held.ino());
        match fs::metadata(&path).map(is_held) {
            Ok(true) => {}
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => return Err(RegistryError::Replaced { path }),
        }
        let count = "SELECT count(*) FROM sessions";
        let read = self.connection.prepare_cached(count);
        read.and_then(|mut read| read.query_row([], |row| row.get::<_, i64>(0)))
            .map(drop)
            .map_err(|error| diagnose(&self.path, error))
    }

    /// Makes all of `writes` durable, or none.
    pub(crate) fn commit(&mut self, writes: &[Write], time: &SavedTime) -> Result<()> {
        self.transact(|transaction| {
            for write in writes {
                match write {
                    Write::Save(row) => save(transaction, row)?,
                    Write::Forget(id) => {
                        let id = id.to_string();
                        transaction
                            .prepare_cached("DELETE FROM sessions WHERE id = ?1")?
                            .execute([&id])?;
                        transaction
                            .prepare_cached("DELETE FROM names WHERE session = ?1")?
                            .execute([&id])?;
                        transaction
                            .prepare_cached("DELETE FROM backups WHERE session = ?1")?
                            .execute([&id])?;
                        transaction
                            .prepare_cached("DELETE FROM egress WHERE session = ?1")?
                            .execute([&id])?;
                        transaction
                            .prepare_cached("DELETE FROM mounts WHERE session = ?1")?
                            .execute([&id])?;
                    }
                }
            }
            transaction
                .prepare_cached(
                    "INSERT INTO clock VALUES (1, ?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE SET
                     pool_ms = ?1, wall_ms = ?2, uptime_ms = ?3, boot = ?4",
                )?
                .execute(params![time.pool_ms, time.wall_ms, time.uptime_ms, time.boot])?;
            Ok(())
        })
    }

    /// Makes a name durable.
    pub(crate) fn name(&mut self, name: &SessionName, id: Uuid) -> Result<()> {
        self.transact(|transaction| {
            transaction
                .execute(
                    "INSERT INTO names VALUES (?1, ?2)",
                    params![name.as_str(), id.to_string()],
                )
                .map(drop)
        })
    }

    /// Makes durable which rules of its own a session has.
    pub(crate) fn set_egress(&mut self, id: Uuid, rules: Option<&EgressRules>) -> Result<()> {
        self.put_of(id, "egress", rules)
    }

    /// Makes durable which shared folders a session has.
    pub(crate) fn set_mounts(&mut self, id: Uuid, mounts: &[Mount]) -> Result<()> {
        self.put_of(id, "mounts", (!mounts.is_empty()).then_some(mounts))
    }

    /// Makes durable what a session has of a kind, which has a table of its own.
    fn put_of<T: Serialize + ?Sized>(
        &mut self,
        id: Uuid,
        table: &str,
        of: Option<&T>,
    ) -> Result<()> {
        self.transact(|transaction| {
            let id = id.to_string();
            let Some(of) = of else {
                return transaction
                    .execute(&format!("DELETE FROM {table} WHERE session = ?1"), [id])
                    .map(drop);
            };
            let text = serde_json::to_string(of)
                .map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))?;
            let put = format!("INSERT OR REPLACE INTO {table} VALUES (?1, ?2)");
            transaction.execute(&put, params![id, text]).map(drop)
        })
    }

    /// All shared folders, by name.
    pub(crate) fn shares(&self) -> Result<Vec<Share>> {
        let read = || -> rusqlite::Result<Vec<Share>> {
            let mut all = self.connection.prepare_cached(SHARES)?;
            all.query_map([], read_share)?.collect()
        };
        read().map_err(|error| diagnose(&self.path, error))
    }

    /// Makes a shared folder durable.
    pub(crate) fn add_share(&mut self, share: &Share) -> Result<()> {
        let made_at = share.created_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let made_at = i64::try_from(made_at.as_millis()).unwrap_or(i64::MAX);
        self.transact(|transaction| {
            let add = "INSERT INTO shares VALUES (?1, ?2, ?3)";
            transaction.execute(add, params![share.id.to_string(), share.name, made_at]).map(drop)
        })
    }

    /// Forgets a shared folder.
    pub(crate) fn remove_share(&mut self, id: Uuid) -> Result<()> {
        self.transact(|transaction| {
            transaction.execute("DELETE FROM shares WHERE id = ?1", [id.to_string()]).map(drop)
        })
    }

    /// Notes what is known of a session's latest backup.
    pub(crate) fn note(&mut self, id: Uuid, facts: &Facts) -> Result<()> {
        let Facts { name, taken_at, added, size } = facts;
        self.transact(|transaction| {
            transaction
                .execute(
                    "INSERT OR REPLACE INTO backups VALUES (?1, ?2, ?3, ?4, ?5)",
                    params![id.to_string(), name, taken_at, added, size],
                )
                .map(drop)
        })
    }

    /// Makes durable where backups are now.
    pub(crate) fn write_to(&mut self, place: &str) -> Result<()> {
        self.transact(|transaction| {
            transaction
                .execute("INSERT OR REPLACE INTO destination VALUES (1, ?1)", [place])
                .map(drop)
        })
    }

    /// Makes durable when the retention was last applied, and what time it is.
    pub(crate) fn forgot(&mut self, at: PoolTime, time: &SavedTime) -> Result<()> {
        self.transact(|transaction| {
            transaction
                .execute("INSERT OR REPLACE INTO chores VALUES (?1, ?2)", params![FORGET, at.0])
                .map(drop)
        })?;
        self.commit(&[], time)
    }

    fn transact(
        &mut self,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<()>,
    ) -> Result<()> {
        let attempt = || -> rusqlite::Result<()> {
            let transaction = self.connection.transaction()?;
            work(&transaction)?;
            transaction.commit()
        };
        attempt().map_err(sqlite(&self.path))
    }
}

fn lock(root: &Path, folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let failed = |source| RegistryError::Io { path: path.clone(), source };
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(RegistryError::Locked { root: root.to_owned() }),
        Err(errno) => Err(failed(errno.into())),
    }
}

/// Makes an empty registry under another name and renames it, so that a file with the right
/// name and nothing in it is known to have been cut off.
fn make_if_new(path: &Path) -> Result<()> {
    let io = |source| RegistryError::Io { path: path.to_owned(), source };
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > 0 => return Ok(()),
        Ok(_) => {
            return Err(RegistryError::Damaged {
                path: path.to_owned(),
                problem: "it is empty: it has been cut off".to_owned(),
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io(error)),
    }
    let new = path.with_extension("new");
    for left_over in [new.clone(), new.with_extension("new-wal"), new.with_extension("new-shm")] {
        match fs::remove_file(&left_over) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
    }
    let connection = Connection::open(&new).map_err(sqlite(path))?;
    let prepare = || -> rusqlite::Result<()> {
        connection.pragma_update(None, "application_id", APPLICATION_ID)?;
        // Readers do not wait for the writer, nor the writer for them.
        connection.pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))
    };
    prepare().map_err(sqlite(path))?;
    connection.close().map_err(|(_, error)| sqlite(path)(error))?;
    rustix::fs::chmod(&new, rustix::fs::Mode::from_raw_mode(0o600))
        .map_err(|errno| io(errno.into()))?;
    File::open(&new).and_then(|file| file.sync_all()).map_err(io)?;
    fs::rename(&new, path).map_err(io)?;
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all()).map_err(io)
}

fn sqlite(path: &Path) -> impl Fn(rusqlite::Error) -> RegistryError {
    move |source| RegistryError::Sqlite { path: path.to_owned(), source }
}

/// Tells a damaged file from one that cannot be read or written just now.
fn diagnose(path: &Path, error: rusqlite::Error) -> RegistryError {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    let damaged = match &error {
        rusqlite::Error::SqliteFailure(failure, _) => {
            matches!(failure.code, DatabaseCorrupt | NotADatabase)
        }
        rusqlite::Error::FromSqlConversionFailure(..)
        | rusqlite::Error::InvalidColumnType(..)
        | rusqlite::Error::IntegralValueOutOfRange(..) => true,
        _ => false,
    };
    if damaged {
        RegistryError::Damaged { path: path.to_owned(), problem: error.to_string() }
    } else {
        sqlite(path)(error)
    }
}

fn save(transaction: &Transaction<'_>, row: &Row) -> rusqlite::Result<()> {
    transaction
        .prepare_cached(
            "INSERT OR REPLACE INTO sessions
             (id, phase, created_at, last_used, stopped_at, unsaved, backup, paused)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        )?
        .execute(params![
            row.id.to_string(),
            phase_name(row.phase),
            row.created_at.0,
            row.last_used.0,
            row.stopped_at.0,
            row.unsaved,
            row.backup,
            row.paused,
        ])
        .map(drop)
}

fn read_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
    Ok(Row {
        id: parsed(row, 0, |text| Uuid::try_parse(text).ok())?,
        phase: parsed(row, 1, phase_named)?,
        created_at: PoolTime(row.get(2)?),
        last_used: PoolTime(row.get(3)?),
        stopped_at: PoolTime(row.get(4)?),
        unsaved: row.get(5)?,
        backup: row.get(6)?,
        paused: row.get(7)?,
    })
}

fn read_name(row: &rusqlite::Row<'_>) -> rusqlite::Result<(SessionName, Uuid)> {
    Ok((
        parsed(row, 0, |text| text.parse().ok())?,
        parsed(row, 1, |text| Uuid::try_parse(text).ok())?,
    ))
}

const SHARES: &str = "SELECT id, name, created_at FROM shares ORDER BY name";

fn read_share(row: &rusqlite::Row<'_>) -> rusqlite::Result<Share> {
    let id = parsed(row, 0, |text| Uuid::try_parse(text).ok())?;
    let made_at = u64::try_from(row.get::<_, i64>(2)?).unwrap_or_default();
    Ok(Share { id, name: row.get(1)?, created_at: UNIX_EPOCH + Duration::from_millis(made_at) })
}

/// What a session has of something that is kept in JSON.
fn read_of<T: DeserializeOwned>(row: &rusqlite::Row<'_>) -> rusqlite::Result<(Uuid, T)> {
    let id = parsed(row, 0, |text| Uuid::try_parse(text).ok())?;
    Ok((id, parsed(row, 1, |text| serde_json::from_str(text).ok())?))
}

fn read_facts(row: &rusqlite::Row<'_>) -> rusqlite::Result<(Uuid, Facts)> {
    let id = parsed(row, 0, |text| Uuid::try_parse(text).ok())?;
    let (name, taken_at) = (row.get(1)?, row.get(2)?);
    Ok((id, Facts { name, taken_at, added: row.get(3)?, size: row.get(4)? }))
}

fn parsed<T>(
    row: &rusqlite::Row<'_>,
    column: usize,
    parse: impl FnOnce(&str) -> Option<T>,
) -> rusqlite::Result<T> {
    let text: String = row.get(column)?;
    parse(&text).ok_or_else(|| {
        let problem = format!("{text:?} makes no sense here");
        rusqlite::Error::FromSqlConversionFailure(
            column,
            rusqlite::types::Type::Text,
            problem.into(),
        )
    })
}

const PHASES: [(Phase, &str); 9] = [
    (Phase::Creating, "creating"),
    (Phase::Active, "active"),
    (Phase::Frozen, "frozen"),
    (Phase::Stopped, "stopped"),
    (Phase::Restoring, "restoring"),
    (Phase::Pruning, "pruning"),
    (Phase::Archived, "archived"),
    (Phase::Missing, "missing"),
    (Phase::Removing, "removing"),
];

/// The word for a phase, in the registry and wherever people read it.
pub(crate) fn phase_name(phase: Phase) -> &'static str {
    // Absent sessions are never saved; they have a word all the same, for listings.
    PHASES.iter().find(|(known, _)| *known == phase).map_or("absent", |(_, name)| name)
}

fn phase_named(name: &str) -> Option<Phase> {
    PHASES.iter().find(|(_, known)| *known == name).map(|(phase, _)| *phase)
}
