//! Whether what is in a repository is what was written.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustic_core::repofile::{BlobType, NodeType, SnapshotFile, SnapshotId};
use rustic_core::{BlobId, DataId, FileType, Id, IndexedFull, TreeId};
use uuid::Uuid;

use crate::backend::{Gate, name};
use crate::error::{Error, Result, told};
use crate::files::Files;
use crate::restore::{is_of, piece};
use crate::{Counter, Engine, Repository, entry, session_of};

/// How many threads read at most: a check runs beside the sessions.
const MOST_THREADS: usize = 4;

/// Something that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// The backup that cannot be restored for it; none if it belongs to no backup.
    pub backup: Option<String>,
    /// Whose it is.
    pub session: Option<Uuid>,
    /// What is wrong.
    pub problem: String,
    /// The newest backup of that session that is sound.
    pub instead: Option<String>,
}

/// What a check has found.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Backups that were looked at.
    pub backups: u64,
    /// Bytes that were read back.
    pub bytes: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

/// The files that hold pieces, by what is known of them.
struct Packs {
    sizes: HashMap<String, u64>,
    altered: HashMap<String, String>,
}

impl Packs {
    fn list(files: &dyn Files) -> std::io::Result<Self> {
        let sizes = files.list(FileType::Pack.dirname())?.into_iter().collect();
        Ok(Self { sizes, altered: HashMap::new() })
    }

    fn problem(&self, pack: &Id, end: u64) -> Option<String> {
        let file = name(FileType::Pack, pack);
        if let Some(problem) = self.altered.get(&file) {
            return Some(problem.clone());
        }
        match self.sizes.get(&file) {
            None => Some(format!("{file} is missing")),
            Some(size) if *size < end => Some(format!("{file} is cut short")),
            Some(_) => None,
        }
    }
}

/// One on the way down.
struct Folder {
    id: TreeId,
    /// What is still to be looked at below it.
    below: Vec<TreeId>,
    problem: Option<String>,
}

/// Looks at trees, each once.
struct Trees<'a, S> {
    engine: &'a Engine<S>,
    packs: &'a Packs,
    /// What is wrong with those that were looked at, or below them.
    known: HashMap<TreeId, Option<String>>,
    /// What is found of the pieces of files.
    pieces: HashMap<DataId, Option<String>>,
}

impl<'a, S: IndexedFull> Trees<'a, S> {
    fn new(engine: &'a Engine<S>, packs: &'a Packs) -> Self {
        Self { engine, packs, known: HashMap::new(), pieces: HashMap::new() }
    }

    /// The first thing that is wrong with a tree or below it.
    fn problem(&mut self, root: TreeId) -> Option<String> {
        if let Some(known) = self.known.get(&root) {
            return known.clone();
        }
        let mut way = vec![self.enter(root)];
        while let Some(top) = way.last_mut() {
            if let Some(below) = top.below.pop() {
                match self.known.get(&below) {
                    Some(known) => top.problem = top.problem.take().or_else(|| known.clone()),
                    None => way.push(self.enter(below)),
                }
                continue;
            }
            let Some(Folder { id, problem, .. }) = way.pop() else { break };
            self.known.insert(id, problem.clone());
            match way.last_mut() {
                Some(above) => above.problem = above.problem.take().or(problem),
                None => return problem,
            }
        }
        None
    }

    fn enter(&mut self, id: TreeId) -> Folder {
        match self.folder(id) {
            Ok(below) => Folder { id, below, problem: None },
            Err(problem) => Folder { id, below: Vec::new(), problem: Some(problem) },
        }
    }

    fn folder(&mut self, id: TreeId) -> std::result::Result<Vec<TreeId>, String> {
        let blob = self.engine.get_blob_cached(&BlobId::from(id), BlobType::Tree);
        let blob = blob.map_err(|error| told(&error))?;
        if !is_of(&blob, &id.to_hex()) {
            return Err(format!("the folder {id} is altered"));
        }
        let tree = self.engine.get_tree(&id).map_err(|error| told(&error))?;
        let mut below = Vec::new();
        for node in &tree.nodes {
            match (&node.node_type, node.subtree) {
                (NodeType::Dir, Some(tree)) => below.push(tree),
                (NodeType::Dir, None) => {
                    return Err(format!("{} has no entries", node.name().display()));
                }
                _ => {}
            }
            for piece in node.content.iter().flatten() {
                if !self.pieces.contains_key(piece) {
                    let problem = self.piece_problem(piece);
                    self.pieces.insert(*piece, problem);
                }
                if let Some(Some(problem)) = self.pieces.get(piece) {
                    return Err(problem.clone());
                }
            }
        }
        Ok(below)
    }

    fn piece_problem(&self, piece: &DataId) -> Option<String> {
        let Ok(entry) = self.engine.get_index_entry(piece) else {
            return Some(format!("the piece {piece} is nowhere"));
        };
        let end = u64::from(entry.location.offset) + u64::from(entry.location.length);
        self.packs.problem(&entry.pack, end)
    }
}

/// Reads back pieces, with several threads, and gives the first problem.
fn read_back<S: IndexedFull + Sync>(
    engine: &Engine<S>,
    pieces: &[DataId],
    cancelled: &AtomicBool,
) -> Option<String> {
    let (next, found) = (AtomicUsize::new(0), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..threads() {
            scope.spawn(|| {
                while let Some(id) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if cancelled.load(Ordering::Relaxed) {
                        return;
                    }
                    if let Err(problem) = piece(engine, id) {
                        found.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(problem);
                        return;
                    }
                }
            });
        }
    });
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS)
}

/// Whether all that a tree needs is there, without reading it.
pub fn is_whole<S: IndexedFull>(
    files: &dyn Files,
    engine: &Engine<S>,
    tree: TreeId,
) -> std::result::Result<(), String> {
    let packs = Packs::list(files).map_err(|error| error.to_string())?;
    Trees::new(engine, &packs).problem(tree).map_or(Ok(()), Err)
}

impl Repository {
    /// Whether a backup that was just written is one: all that it needs is there, and what is
    /// new reads back as it was.
    pub(crate) fn verify_new(
        &self,
        snapshot: &SnapshotFile,
        gate: &Gate,
        cancelled: &AtomicBool,
    ) -> Result<()> {
        let place = self.place();
        let unverified = |problem| Error::Unverified { place: place.clone(), problem };
        let engine = self.engine(std::sync::Arc::default()).and_then(Engine::to_indexed);
        let engine = engine.map_err(self.failed("read from"))?;
        let again = engine.get_file::<SnapshotFile>(&snapshot.id);
        let again = again.map_err(|error| unverified(told(&error)))?;
        if again.tree != snapshot.tree {
            return Err(unverified("the snapshot is another one".to_owned()));
        }
        let packs = Packs::list(&*self.files).map_err(|error| unverified(error.to_string()))?;
        let mut trees = Trees::new(&engine, &packs);
        if let Some(problem) = trees.problem(snapshot.tree) {
            return Err(unverified(problem));
        }
        let written = gate.written(FileType::Pack);
        let is_new = |piece: &DataId| {
            engine.get_index_entry(piece).is_ok_and(|entry| written.contains(&entry.pack))
        };
        let new: Vec<DataId> = trees.pieces.keys().copied().filter(is_new).collect();
        if let Some(problem) = read_back(&engine, &new, cancelled) {
            return Err(unverified(problem));
        }
        if cancelled.load(Ordering::Relaxed) {
            let path = place.into();
            return Err(denizen_archive::Error::Cancelled { path }.into());
        }
        Ok(())
    }

    /// Checks every backup: that all that it needs is there; with `read_data` also that every
    /// byte of it is what was written. Blocks.
    ///
    /// # Errors
    /// What met the destination. What is wrong in it is no error but in the report.
    pub fn verify(
        &self,
        read_data: bool,
        counter: &Counter,
        cancelled: &AtomicBool,
    ) -> Result<Report> {
        let place = self.place();
        let failed = |action| self.failed(action);
        let mut report = Report::default();
        let mut packs = Packs::list(&*self.files).map_err(|error| Error::Engine {
            action: "list what is in",
            place: place.clone(),
            problem: error.to_string(),
        })?;
        if read_data {
            packs.altered = self.altered(&packs, counter, cancelled);
            report.bytes = counter.moved();
        }
        let engine = self.engine(std::sync::Arc::default()).map_err(failed("read from"))?;
        // One by one, as one that is damaged must not hide the others.
        let mut snapshots = Vec::new();
        for id in engine.list::<SnapshotId>().map_err(failed("list the backups in"))? {
            match engine.get_file::<SnapshotFile>(&id) {
                Ok(mut snapshot) => {
                    snapshot.id = id;
                    snapshots.push(snapshot);
                }
                Err(error) => report.findings.push(Finding {
                    backup: Some(id.to_hex().as_str().to_owned()),
                    session: None,
                    problem: told(&error),
                    instead: None,
                }),
            }
        }
        snapshots.sort_by_key(|snapshot| snapshot.time.timestamp());
        let engine = engine.to_indexed().map_err(failed("read the index of"))?;
        let mut trees = Trees::new(&engine, &packs);
        let mut sound: HashMap<Uuid, String> = HashMap::new();
        let mut bad = Vec::new();
        for snapshot in snapshots.iter().filter(|it| session_of(it).is_some()) {
            let Some(entry) = entry(snapshot) else { continue };
            report.backups += 1;
            match trees.problem(snapshot.tree) {
                None => drop(sound.insert(entry.session, entry.id)),
                Some(problem) => bad.push((entry, problem)),
            }
        }
        report.findings.extend(bad.into_iter().map(|(entry, problem)| Finding {
            instead: sound.get(&entry.session).cloned(),
            backup: Some(entry.id),
            session: Some(entry.session),
            problem,
        }));
        Ok(report)
    }

    /// Reads all files that hold pieces; their names are their digests.
    fn altered(
        &self,
        packs: &Packs,
        counter: &Counter,
        cancelled: &AtomicBool,
    ) -> HashMap<String, String> {
        let names: Vec<&String> = packs.sizes.keys().collect();
        let (next, found) = (AtomicUsize::new(0), Mutex::new(HashMap::new()));
        std::thread::scope(|scope| {
            for _ in 0..threads() {
                scope.spawn(|| {
                    while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if cancelled.load(Ordering::Relaxed) {
                            return;
                        }
                        let id = name.rsplit('/').next().unwrap_or_default();
                        let problem = match self.files.read(name, None) {
                            Ok(bytes) => {
                                counter.bytes(bytes.len() as u64);
                                (!is_of(&bytes, id)).then(|| format!("{name} is altered"))
                            }
                            Err(error) => Some(format!("{name} cannot be read: {error}")),
                        };
                        if let Some(problem) = problem {
                            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                            found.insert((*name).clone(), problem);
                        }
                    }
                });
            }
        });
        found.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the index name only what is there, so that the rest is written again.
    pub(crate) fn forget_damaged(&self) -> Result<()> {
        let options = rustic_core::RepairIndexOptions::default();
        let engine = self.engine(std::sync::Arc::default());
        engine
            .and_then(|engine| engine.repair_index(&options, false))
            .map_err(self.failed("repair the index of"))
    }
}
