//! Backups of sessions in a repository: encrypted, compressed, each thing once, in the format of
//! restic (its design document, repository version 2), so that `restic` and `rustic` read them
//! without us. The engine is `rustic_core`; this crate gives it our walk, our files and our
//! restorer, and reads back what it has written.
//!
//! It decides nothing: when to back up, what to keep and what to forget is the pool's business.
//! It writes no snapshot of what it has not read back, never overwrites a file of a repository,
//! never follows a link of a session's, and takes what is in a repository for hostile. A panic of
//! the engine is an error like others. All of it is synchronous: call it from a thread that may
//! block.
//!
//! # What a backup looks like
//!
//! One snapshot, with the tags `denizen` and the session's id, and its name as label. In it are
//! `volume/` and, where the session has changed its root, `root/`. Owners are those that archives
//! have ([`Owners`]). Sockets, devices and what is mounted are left out, as in archives. Holes of
//! files come back as holes, as do other zeros of a whole page.
//!
//! # More than one host
//!
//! Any number may write at the same time: a file's name says what is in it, and a snapshot is
//! written after all that it needs. What nobody needs is removed in two steps, a day apart
//! ([`Repository::prune`]), so that no backup under way loses what it counts on.
//!
//! # Damage
//!
//! Whoever meets it, a backup, a restore or a check, has the index mended: it then names what is
//! there and sound, piece by piece, so that the next backup writes the rest anew.

mod backend;
mod check;
mod cipher;
mod compact;
mod error;
mod files;
mod mend;
mod node;
mod open;
mod pieces;
mod restore;
mod source;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use denizen_archive::tree::{Kind, Member, Walk, open as open_tree};
use rustic_core::jiff::{SignedDuration, Timestamp, tz::TimeZone};
use rustic_core::repofile::{MasterKey, SnapshotFile};
use rustic_core::{
    BackupOptions, Credentials, FileType, Id, OpenStatus, RepositoryBackends, RepositoryOptions,
    RusticError, RusticResult,
};
use uuid::Uuid;

pub use check::{Finding, Report};
pub use denizen_archive::{Owners, Restored, Skipped};
pub use error::Error;
pub use files::{Bucket, Destination, Files, Folder, Patience, Range};

use backend::{Backend, Gate, Reason, name};
use check::Unsound;
use cipher::{Cipher, digest};
use error::{Result, guarded, told};
use mend::Read;
use pieces::Pieces;

type Engine<S> = rustic_core::Repository<S>;

/// Marks the snapshots that are ours.
const TAG: &str = "denizen";
/// Where a session's files are in a snapshot.
const VOLUME: &str = "volume";
const ROOT: &str = "root";

/// How large the pieces of large files are. Pieces of one size are found faster than such that
/// depend on what is in them; what is gained by those, large files into the middle of which
/// something is put, is rare in a session.
const PIECE: u64 = 1 << 20;
/// How large the files of the repository are that hold pieces. They are in memory as a whole,
/// several at a time.
const PACK: u64 = 16 << 20;
/// How often it is looked whether a backup is still wanted while the engine is at work.
const LOOK: Duration = Duration::from_millis(50);
/// The best that keeps up with a disk.
const LEVEL: i32 = 3;

/// How long what is not needed stays, marked. A backup under way may still count on it.
const MARKED: Duration = Duration::from_hours(23);

/// A repository that is open.
pub struct Repository {
    files: Arc<dyn Files>,
    key: MasterKey,
    cipher: Cipher,
    /// The snapshots as last seen: none of them ever changes.
    known: Mutex<Vec<SnapshotFile>>,
    /// What backups have written that were broken off before the index was to name it, and when.
    broken_off: Mutex<HashMap<Id, Instant>>,
}

impl std::fmt::Debug for Repository {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Repository").field("files", &self.files).finish_non_exhaustive()
    }
}

/// Whose files they are, and which.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The session.
    pub session: Uuid,
    /// Its name, if it has one.
    pub name: Option<&'a str>,
    /// Its volume.
    pub volume: &'a Path,
    /// What it has changed in its root, if anything.
    pub root: Option<&'a Path>,
    /// Whose numbers are others in the backup than on disk.
    pub owners: Option<Owners>,
}

/// A backup in the repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name: 64 hexadecimal digits.
    pub id: String,
    /// The session that it holds.
    pub session: Uuid,
    /// The session's name at that time.
    pub name: Option<String>,
    /// The host that wrote it.
    pub host: String,
    /// When it was taken. Later than every older one of the session, even if the clock was set
    /// back.
    pub taken_at: Timestamp,
    /// Bytes of the content of its files.
    pub bytes: u64,
    /// Regular files in it.
    pub files: u64,
    /// Bytes by which the repository has grown with it.
    pub added: u64,
}

/// What [`Repository::write`] made.
#[derive(Clone, Debug)]
pub struct Written {
    /// The new backup.
    pub entry: Entry,
    /// What the session has and the backup has not.
    pub skipped: Vec<Skipped>,
}

/// How far an operation is. Shared by who does it and who wants to know.
#[derive(Debug, Default)]
pub struct Counter {
    entries: AtomicU64,
    files: AtomicU64,
    size: AtomicU64,
    bytes: AtomicU64,
}

impl Counter {
    fn entry(&self, member: &Member) {
        self.entries.fetch_add(1, Ordering::Relaxed);
        if member.kind == Kind::File {
            self.files.fetch_add(1, Ordering::Relaxed);
            self.size.fetch_add(member.size, Ordering::Relaxed);
        }
    }

    fn bytes(&self, more: u64) {
        self.bytes.fetch_add(more, Ordering::Relaxed);
    }

    /// Regular files that have been looked at or made.
    pub fn files(&self) -> u64 {
        self.files.load(Ordering::Relaxed)
    }

    /// Bytes that these hold.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Bytes that had to be read or written, as they are new.
    pub fn moved(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Repository {
    /// Opens the repository at a destination, or makes one if there is none. Deriving the key
    /// takes a third of a second, on purpose (`scrypt`, RFC 7914).
    ///
    /// # Errors
    /// [`Error::WrongKey`] if it was made with another password, or what met the reading or
    /// making of it.
    pub fn open(destination: &Destination, password: &str) -> Result<Self> {
        Self::open_in(destination.files()?, password)
    }

    /// The same where the files are in a place of another kind.
    ///
    /// # Errors
    /// As with [`Repository::open`].
    pub fn open_in(files: Arc<dyn Files>, password: &str) -> Result<Self> {
        let key = open::open(&files, password)?;
        let cipher = Cipher::new(&key).ok_or_else(|| Error::WrongKey { place: files.place() })?;
        Ok(Self { files, key, cipher, known: Mutex::default(), broken_off: Mutex::default() })
    }

    /// The same repository where its files are reached in another way: the key is known.
    #[must_use]
    pub fn through(&self, files: Arc<dyn Files>) -> Self {
        Self {
            files,
            key: self.key.clone(),
            cipher: self.cipher.clone(),
            known: Mutex::default(),
            broken_off: Mutex::default(),
        }
    }

    /// Whether there is a repository at a destination.
    ///
    /// # Errors
    /// What met the reading of it.
    pub fn exists(destination: &Destination) -> Result<bool> {
        let files = destination.files()?;
        let size = files.size("config").map_err(|error| Error::Engine {
            action: "open",
            place: files.place(),
            problem: error.to_string(),
        })?;
        Ok(size.is_some())
    }

    /// What people call the place; no secret is in it.
    pub fn place(&self) -> String {
        self.files.place()
    }

    fn failed(&self, action: &'static str) -> impl Fn(Box<RusticError>) -> Error {
        let place = self.place();
        move |error| Error::Engine { action, place: place.clone(), problem: told(&error) }
    }

    /// Has the engine do something.
    fn with<T>(
        &self,
        action: &'static str,
        gate: &Arc<Gate>,
        run: impl FnOnce(Engine<OpenStatus>) -> RusticResult<T>,
    ) -> Result<T> {
        let key = Credentials::Masterkey(self.key.clone());
        let done = guarded(|| run(engine(&self.files, gate.clone())?.open(&key)?));
        done.map_err(|error| match gate.reason() {
            // The engine may tell only what came of it.
            Some(Reason::Repository(problem)) => {
                Error::Engine { action, place: self.place(), problem }
            }
            _ => self.failed(action)(error),
        })
    }

    /// All pieces, by the index as it is now.
    fn pieces(&self) -> Result<Pieces> {
        match self.indexed() {
            // It may be damaged. What else it was is met again.
            Err(_) if self.mend(&HashSet::new())?.changed => self.indexed(),
            indexed => indexed,
        }
    }

    fn indexed(&self) -> Result<Pieces> {
        let backend = Arc::new(Backend::new(self.files.clone(), Arc::default()));
        let key = Credentials::Masterkey(self.key.clone());
        let opened = guarded(|| over(backend.clone())?.open(&key)?.to_indexed());
        let engine = opened.map_err(self.failed("read the index of"))?;
        Ok(Pieces { engine, backend, cipher: self.cipher.clone() })
    }

    /// Writes a backup, after it has read back what is new in it and looked whether all else is
    /// there. What neither changed nor is new since the session's latest backup is not read again.
    ///
    /// Blocks. `cancelled` is looked at every few files and for every piece that is read. On any
    /// error there is no backup that was not read back.
    ///
    /// # Errors
    /// [`Error::Tree`] if the files changed meanwhile or could not be read,
    /// [`Error::Unverified`], or what met the destination.
    pub fn write(
        &self,
        source: Source<'_>,
        now: Timestamp,
        counter: &Arc<Counter>,
        cancelled: &AtomicBool,
    ) -> Result<Written> {
        self.go_on()?;
        let known = self.snapshots()?;
        let latest = known.iter().filter(|it| session_of(it) == Some(source.session));
        let latest = latest.max_by_key(|it| it.time.timestamp());
        let snapshot = describe(source, now, latest);
        if let Some(latest) = latest {
            let pieces = self.pieces()?;
            let indexes = self.names(FileType::Index)?;
            let compare = restore::Compare::new(&pieces, latest.tree);
            if let Some(skipped) = compare.run(source, cancelled)?
                // What is there already is not read again; it only has to be there.
                && check::is_whole(&*self.files, &pieces, latest.tree, cancelled)
            {
                let summary = latest.summary.clone().map(|mut summary| {
                    summary.data_added_packed = 0;
                    summary
                });
                let snapshot = SnapshotFile { tree: latest.tree, summary, ..snapshot };
                return Ok(Written { entry: self.publish(snapshot, &indexes)?, skipped });
            }
        }
        let mut parent = latest;
        let mut again = true;
        loop {
            let gate = Arc::new(Gate::without_snapshots());
            let archived =
                self.archive(source, snapshot.clone(), parent, &gate, counter, cancelled);
            if archived.is_err() {
                let mut broken_off = self.broken_off.lock().unwrap_or_else(PoisonError::into_inner);
                let written = gate.written(FileType::Pack).into_iter();
                broken_off.extend(written.map(|pack| (pack, Instant::now())));
            }
            let (snapshot, skipped) = archived?;
            let indexes = self.names(FileType::Index)?;
            match self.verify_new(&snapshot, &gate, cancelled) {
                Ok(()) => return Ok(Written { entry: self.publish(snapshot, &indexes)?, skipped }),
                Err(Unsound { error: Error::Unverified { place, problem }, suspects }) if again => {
                    tracing::warn!(place, problem, "what is damaged is written again");
                    // What an earlier backup or this one has written is gone, or is not what it
                    // was. Once that is no longer in the index, it is written anew; without a
                    // parent, whose folders the engine would take to be there.
                    self.mend(&suspects.into_iter().collect())?;
                    (parent, again) = (None, false);
                }
                Err(Unsound { error, .. }) => return Err(error),
            }
        }
    }

    /// Writes the snapshot of what was read back. `indexes` is what was in the index then.
    fn publish(&self, mut snapshot: SnapshotFile, indexes: &[String]) -> Result<Entry> {
        let failed = |problem| Error::Engine { action: "write to", place: self.place(), problem };
        let plain = serde_json::to_vec(&snapshot).map_err(|error| failed(error.to_string()))?;
        let sealed = self.cipher.seal(&plain);
        let sealed = sealed.ok_or_else(|| failed("the snapshot is too large".to_owned()))?;
        snapshot.id = digest(&sealed).into();
        let file = name(FileType::Snapshot, &snapshot.id);
        let written = self.files.write(&file, vec![sealed.into()], false);
        written.map_err(|error| failed(format!("cannot write {file}: {error}")))?;
        match self.snapshot(&file)? {
            Read::Sound(again) if again.tree == snapshot.tree => {}
            _ => return Err(self.unpublished(&file, "the new snapshot is altered")),
        }
        // Whoever removes what is not needed may have looked before the snapshot was there.
        let never = AtomicBool::new(false);
        let now: HashSet<String> = self.names(FileType::Index)?.into_iter().collect();
        if !indexes.iter().all(|index| now.contains(index))
            && !check::is_whole(&*self.files, &self.pieces()?, snapshot.tree, &never)
            && (!self.mend(&HashSet::new())?.changed
                || !check::is_whole(&*self.files, &self.pieces()?, snapshot.tree, &never))
        {
            return Err(self.unpublished(&file, "what the new snapshot needs was removed"));
        }
        Ok(self.note(snapshot))
    }

    /// Takes away what nobody may take for a backup.
    fn unpublished(&self, file: &str, problem: &str) -> Error {
        let problem = match self.files.remove(file) {
            Ok(()) => problem.to_owned(),
            Err(error) => format!("{problem}, and {file} stays: {error}"),
        };
        Error::Unverified { place: self.place(), problem }
    }

    /// Has the engine write what it has not.
    fn archive(
        &self,
        source: Source<'_>,
        snapshot: SnapshotFile,
        parent: Option<&SnapshotFile>,
        gate: &Arc<Gate>,
        counter: &Arc<Counter>,
        cancelled: &AtomicBool,
    ) -> Result<(SnapshotFile, Vec<Skipped>)> {
        let mut options = BackupOptions::default().no_scan(true);
        match parent {
            Some(parent) => options.parent_opts.parents = vec![parent.id.to_hex().to_string()],
            None => options.parent_opts.force = true,
        }
        let (entries, feed) = source::source(gate.clone(), counter.clone());
        let (ended, end) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let walking = std::thread::Builder::new().name("denizen-walk".into());
            let walking = walking.spawn_scoped(scope, move || {
                let walked = walk(source, feed, cancelled);
                let skipped = walked.map_err(|error| gate.close(Reason::Tree(error)));
                // The last files may be large, and the engine does not look.
                while let Err(RecvTimeoutError::Timeout) = end.recv_timeout(LOOK) {
                    if cancelled.load(Ordering::Relaxed) {
                        let path = source.volume.to_owned();
                        gate.close(Reason::Tree(denizen_archive::Error::Cancelled { path }));
                    }
                }
                skipped.unwrap_or_default()
            });
            let walking = walking.map_err(|source| {
                let path = PathBuf::from("a thread to walk the session's files");
                Error::Io { path, source }
            })?;
            let key = Credentials::Masterkey(self.key.clone());
            let archived = guarded(|| {
                // Taken along, so that the walk does not wait for an engine that has failed.
                let entries = entries;
                let engine = engine(&self.files, gate.clone())?.open(&key)?.to_indexed_ids()?;
                engine.archive(&options, &entries, snapshot, &[PathBuf::from("/")])
            });
            drop(ended);
            let walked = walking.join();
            let failed = self.failed("write to");
            match (archived, gate.reason()) {
                // What went wrong first explains what went wrong after it.
                (Err(error), Some(Reason::Tree(denizen_archive::Error::Cancelled { .. })))
                    if !cancelled.load(Ordering::Relaxed) =>
                {
                    Err(failed(error))
                }
                (_, Some(Reason::Tree(reason))) => Err(reason.into()),
                (_, Some(Reason::Repository(problem))) => {
                    Err(Error::Engine { action: "write to", place: self.place(), problem })
                }
                (Err(error), None) => Err(failed(error)),
                (Ok(snapshot), None) => {
                    let skipped = walked.map_err(|_| Error::Engine {
                        action: "write to",
                        place: self.place(),
                        problem: "the walk panicked".to_owned(),
                    })?;
                    Ok((snapshot, skipped))
                }
            }
        })
    }

    /// Has the index name what backups have written that were broken off, so that the next one
    /// goes on from there: a session that is used again and again while it is being backed up
    /// would else never be.
    fn go_on(&self) -> Result<()> {
        let mut left = self.broken_off.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody may be removing what has been left for a day.
        left.retain(|_, at| at.elapsed() < MARKED / 2);
        if !left.is_empty() {
            self.adopt(left.keys())?;
            left.clear();
        }
        Ok(())
    }

    /// Remembers a new backup.
    fn note(&self, snapshot: SnapshotFile) -> Entry {
        let entry = entry(&snapshot);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.iter().any(|it| it.id == snapshot.id) {
            known.push(snapshot);
        }
        entry.unwrap_or_else(|| unreachable!("it was described by us"))
    }

    /// All snapshots, as they are now, but those that are damaged. Those seen before are not read
    /// again.
    fn snapshots(&self) -> Result<Vec<SnapshotFile>> {
        let mut before: HashMap<String, SnapshotFile> = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.iter().map(|it| (name(FileType::Snapshot, &it.id), it.clone())).collect()
        };
        let mut all = Vec::new();
        for file in self.names(FileType::Snapshot)? {
            if let Some(known) = before.remove(&file) {
                all.push(known);
                continue;
            }
            match self.snapshot(&file)? {
                Read::Sound(snapshot) => all.push(snapshot),
                // One that is damaged must not hide the others. A check tells of it.
                Read::Altered => tracing::warn!(place = self.place(), file, "a backup is damaged"),
                Read::Gone => {}
            }
        }
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&all);
        Ok(all)
    }

    fn snapshot(&self, file: &str) -> Result<Read<SnapshotFile>> {
        let id = file.rsplit('/').next().and_then(|id| id.parse::<Id>().ok());
        Ok(match (self.content::<SnapshotFile>(file)?, id) {
            (Read::Sound(mut snapshot), Some(id)) => {
                snapshot.id = id.into();
                Read::Sound(snapshot)
            }
            (Read::Gone, _) => Read::Gone,
            _ => Read::Altered,
        })
    }

    /// The backups of a session, or of all, newest first.
    ///
    /// # Errors
    /// What met the reading of the repository.
    pub fn list(&self, session: Option<Uuid>) -> Result<Vec<Entry>> {
        let all = self.snapshots()?;
        let ours = all.iter().filter_map(entry);
        let mut ours: Vec<_> =
            ours.filter(|entry| session.is_none_or(|wanted| wanted == entry.session)).collect();
        ours.sort_by(|a, b| b.taken_at.cmp(&a.taken_at).then_with(|| a.id.cmp(&b.id)));
        Ok(ours)
    }

    fn find(&self, backup: &str) -> Result<SnapshotFile> {
        let found = self.snapshots()?.into_iter().find(|it| it.id.to_hex().as_str() == backup);
        found.ok_or_else(|| Error::NoBackup { place: self.place(), backup: backup.to_owned() })
    }

    /// Puts the files of a backup into `home`, which must be empty or not exist: as `volume/`
    /// and, where it has changes of a root, `root/`. With `only`, paths in the backup, just what
    /// is there and the folders on the way. Every piece is compared with its digest. Blocks; `cancelled` is looked at for
    /// every entry and piece. On any error what was made is removed again.
    ///
    /// # Errors
    /// [`Error::NoBackup`], [`Error::NoPath`], [`Error::Damaged`], [`Error::Tree`] if the files
    /// cannot be made.
    pub fn restore(
        &self,
        backup: &str,
        home: &Path,
        only: &[PathBuf],
        owners: Option<Owners>,
        counter: &Counter,
        cancelled: &AtomicBool,
    ) -> Result<Restored> {
        let snapshot = self.find(backup)?;
        let place = self.place();
        let mut again = true;
        loop {
            let pieces = self.pieces()?;
            let restorer = restore::Restorer { pieces: &pieces, place: &place, backup, counter };
            match restorer.restore(snapshot.tree, home, only, owners, cancelled) {
                // It may still be there, but not in the index.
                Err(Error::Damaged { .. }) if again && self.mend(&HashSet::new())?.changed => {
                    again = false;
                }
                restored => return restored,
            }
        }
    }

    /// Forgets backups. What only they need is removed by [`Repository::prune`].
    ///
    /// # Errors
    /// What met the destination; then some may be gone.
    pub fn forget(&self, backups: &[String]) -> Result<()> {
        let all = self.snapshots()?;
        let ids: Vec<_> = all
            .iter()
            .filter(|it| backups.iter().any(|backup| it.id.to_hex().as_str() == backup))
            .map(|it| it.id)
            .collect();
        self.with("remove backups from", &Arc::default(), |engine| engine.delete_snapshots(&ids))
    }

    /// Removes what no backup needs: marks it now, and removes what was marked a day ago and is
    /// still not needed. Safe beside other writers, against being killed and with a clock that is
    /// wrong for a while: a mark from the future counts from now on, one that is much older than a
    /// day once more for a day.
    ///
    /// Where a backup is damaged, all that it needs stays, and files are removed as a whole or not
    /// at all.
    ///
    /// # Errors
    /// [`Error::InTheWay`] if a folder of a backup cannot be read, as what is in it is not known
    /// then, or what met the destination.
    pub fn prune(&self) -> Result<()> {
        self.prune_after(MARKED)
    }

    /// The same with another time between the two steps: longer than any backup takes, if there
    /// may be one under way.
    ///
    /// # Errors
    /// What met the destination.
    pub fn prune_after(&self, marked: Duration) -> Result<()> {
        let wait = SignedDuration::try_from(marked).unwrap_or(SignedDuration::MAX);
        self.compact(Timestamp::now(), wait)
    }

    /// Removes what killed writers have left half-written.
    ///
    /// # Errors
    /// What met the destination.
    pub fn sweep(&self) -> Result<()> {
        sweep(&*self.files)
    }

    /// As [`Repository::sweep`], without opening what is there: it needs no key.
    ///
    /// # Errors
    /// What met the destination.
    pub fn sweep_at(destination: &Destination) -> Result<()> {
        sweep(&*destination.files()?)
    }
}

fn sweep(files: &dyn Files) -> Result<()> {
    files.sweep().map_err(|error| Error::Engine {
        action: "clear up",
        place: files.place(),
        problem: error.to_string(),
    })
}

fn engine(files: &Arc<dyn Files>, gate: Arc<Gate>) -> RusticResult<Engine<()>> {
    over(Arc::new(Backend::new(files.clone(), gate)))
}

fn over(backend: Arc<Backend>) -> RusticResult<Engine<()>> {
    let options = RepositoryOptions::default().no_cache(true);
    Engine::new(&options, &RepositoryBackends::new(backend, None))
}

/// Walks all that is backed up, in the order of the format: by name.
fn walk(
    source: Source<'_>,
    feed: source::Feed,
    cancelled: &AtomicBool,
) -> std::result::Result<Vec<Skipped>, denizen_archive::Error> {
    let mut walk = Walk::new(source.volume, source.owners, cancelled, feed);
    if let Some(root) = source.root {
        walk.run_beside(open_tree(root)?, ROOT)?;
    }
    walk.run_beside(open_tree(source.volume)?, VOLUME)?;
    Ok(walk.skipped)
}

fn describe(source: Source<'_>, now: Timestamp, latest: Option<&SnapshotFile>) -> SnapshotFile {
    let latest_at = latest.map(|latest| latest.time.timestamp());
    let next = latest_at.and_then(|at| at.checked_add(SignedDuration::from_secs(1)).ok());
    let at = next.map_or(now, |next| next.max(now));
    let mut snapshot = SnapshotFile {
        time: at.to_zoned(TimeZone::UTC),
        program_version: format!("denizen {}", env!("CARGO_PKG_VERSION")),
        label: source.name.unwrap_or_default().to_owned(),
        hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        parent: latest.map(|latest| latest.id),
        ..SnapshotFile::default()
    };
    snapshot.tags.add(TAG.to_owned());
    snapshot.tags.add(source.session.to_string());
    snapshot.paths.add("/".to_owned());
    snapshot
}

fn session_of(snapshot: &SnapshotFile) -> Option<Uuid> {
    let mut tags = snapshot.tags.iter();
    snapshot.tags.contains(TAG).then(|| tags.find_map(|tag| Uuid::try_parse(tag).ok()))?
}

fn entry(snapshot: &SnapshotFile) -> Option<Entry> {
    let summary = snapshot.summary.as_ref();
    Some(Entry {
        id: snapshot.id.to_hex().as_str().to_owned(),
        session: session_of(snapshot)?,
        name: Some(snapshot.label.clone()).filter(|label| !label.is_empty()),
        host: snapshot.hostname.clone(),
        taken_at: snapshot.time.timestamp(),
        bytes: summary.map_or(0, |it| it.total_bytes_processed),
        files: summary.map_or(0, |it| it.total_files_processed),
        added: summary.map_or(0, |it| it.data_added_packed),
    })
}
