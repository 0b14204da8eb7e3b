//! Whether what is in a repository is what was written.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustic_core::repofile::{NodeType, SnapshotFile};
use rustic_core::{DataId, FileType, Id, TreeId};
use uuid::Uuid;

use crate::backend::{Gate, name};
use crate::cipher::digest;
use crate::error::{Error, Result};
use crate::files::Files;
use crate::mend::{Read, is_lost};
use crate::pieces::{Pieces, Problem};
use crate::{Counter, Repository, entry, session_of};

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

/// What is known of a folder.
#[derive(Clone, Debug, Default)]
struct Known {
    /// The first thing that is wrong with it, or below it.
    problem: Option<String>,
    /// How many entries there are in it and below.
    entries: u64,
}

/// One on the way down.
struct Folder {
    id: TreeId,
    /// What is still to be looked at below it.
    below: Vec<TreeId>,
    known: Known,
}

impl Folder {
    fn add(&mut self, below: &Known) {
        self.known.entries = self.known.entries.saturating_add(below.entries);
        if self.known.problem.is_none() {
            self.known.problem.clone_from(&below.problem);
        }
    }
}

/// Looks at trees, each once.
struct Trees<'a> {
    pieces: &'a Pieces,
    packs: &'a Packs,
    /// Those that were looked at.
    known: HashMap<TreeId, Known>,
    /// The pieces of files that are there.
    there: HashSet<DataId>,
    /// Files that do not hold what they should.
    suspects: HashSet<Id>,
    /// Nobody wants to know any more: what is not known yet counts as unsound.
    cancelled: &'a AtomicBool,
}

impl<'a> Trees<'a> {
    fn new(pieces: &'a Pieces, packs: &'a Packs, cancelled: &'a AtomicBool) -> Self {
        let (known, there, suspects) = Default::default();
        Self { pieces, packs, known, there, suspects, cancelled }
    }

    fn look(&mut self, root: TreeId) -> Known {
        if let Some(known) = self.known.get(&root) {
            return known.clone();
        }
        let mut way = vec![self.enter(root)];
        while let Some(top) = way.last_mut() {
            if let Some(below) = top.below.pop() {
                match self.known.get(&below) {
                    Some(known) => top.add(known),
                    None => way.push(self.enter(below)),
                }
                continue;
            }
            let Some(Folder { id, known, .. }) = way.pop() else { break };
            if let Some(above) = way.last_mut() {
                above.add(&known);
            }
            self.known.insert(id, known);
        }
        self.known.get(&root).cloned().unwrap_or_default()
    }

    fn enter(&mut self, id: TreeId) -> Folder {
        match self.folder(id) {
            Ok((below, entries)) => Folder { id, below, known: Known { problem: None, entries } },
            Err(problem) => {
                self.suspects.extend(problem.pack);
                let known = Known { problem: Some(problem.text), entries: 0 };
                Folder { id, below: Vec::new(), known }
            }
        }
    }

    fn folder(&mut self, id: TreeId) -> std::result::Result<(Vec<TreeId>, u64), Problem> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Problem { text: "given up".to_owned(), pack: None });
        }
        // Also where it can be read from what was read before.
        let spot = self.pieces.spot(&id)?;
        if let Some(text) = self.packs.problem(&spot.pack, spot.end()) {
            return Err(Problem { text, pack: Some(spot.pack) });
        }
        let tree = self.pieces.tree(&id)?;
        let mut below = Vec::new();
        for node in &tree.nodes {
            match (&node.node_type, node.subtree) {
                (NodeType::Dir, Some(tree)) => below.push(tree),
                (NodeType::Dir, None) => {
                    let text = format!("{} has no entries", node.name().display());
                    return Err(Problem { text, pack: None });
                }
                _ => {}
            }
            for piece in node.content.iter().flatten() {
                if !self.there.contains(piece) {
                    let spot = self.pieces.spot(piece)?;
                    if let Some(text) = self.packs.problem(&spot.pack, spot.end()) {
                        return Err(Problem { text, pack: Some(spot.pack) });
                    }
                    self.there.insert(*piece);
                }
            }
        }
        Ok((below, tree.nodes.len() as u64))
    }
}

/// Reads back pieces, with several threads, and gives the first problem.
fn read_back(pieces: &Pieces, wanted: &[DataId], cancelled: &AtomicBool) -> Option<Problem> {
    let (next, found) = (AtomicUsize::new(0), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..threads() {
            scope.spawn(|| {
                while let Some(id) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if cancelled.load(Ordering::Relaxed) {
                        return;
                    }
                    if let Err(problem) = pieces.data(id) {
                        found.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(problem);
                        return;
                    }
                }
            });
        }
    });
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS)
}

/// Whether all that a tree needs is there, without reading it. False if it is given up.
pub fn is_whole(files: &dyn Files, pieces: &Pieces, tree: TreeId, cancelled: &AtomicBool) -> bool {
    let look = |packs| Trees::new(pieces, &packs, cancelled).look(tree);
    Packs::list(files).is_ok_and(|packs| look(packs).problem.is_none())
}

/// Why what was just written is no backup.
pub struct Unsound {
    pub error: Error,
    /// Files that do not hold what they should.
    pub suspects: Vec<Id>,
}

impl From<Error> for Unsound {
    fn from(error: Error) -> Self {
        Self { error, suspects: Vec::new() }
    }
}

impl Repository {
    /// Whether what was just written is a backup: all that it needs is there, and what is new
    /// reads back as it was.
    pub(crate) fn verify_new(
        &self,
        snapshot: &SnapshotFile,
        gate: &Gate,
        cancelled: &AtomicBool,
    ) -> Result<(), Unsound> {
        let unverified = |problem| Error::Unverified { place: self.place(), problem };
        let pieces = self.pieces()?;
        let packs = Packs::list(&*self.files).map_err(|error| unverified(error.to_string()))?;
        let mut trees = Trees::new(&pieces, &packs, cancelled);
        let known = trees.look(snapshot.tree);
        self.check_cancelled(cancelled)?;
        if let Some(problem) = known.problem {
            let suspects = trees.suspects.into_iter().collect();
            return Err(Unsound { error: unverified(problem), suspects });
        }
        // The engine leaves out what it cannot do, and says so only in its log.
        if known.entries != gate.entries() {
            let problem = format!("it has {} entries of {}", known.entries, gate.entries());
            return Err(unverified(problem).into());
        }
        let written = gate.written(FileType::Pack);
        let place_of = |piece: &DataId| {
            let spot = pieces.spot(piece).ok().filter(|spot| written.contains(&spot.pack))?;
            Some((spot.pack, spot.offset, *piece))
        };
        let mut new: Vec<_> = trees.there.iter().filter_map(place_of).collect();
        // As they are on disk.
        new.sort_unstable();
        let new: Vec<_> = new.into_iter().map(|(_, _, piece)| piece).collect();
        if let Some(Problem { text, pack }) = read_back(&pieces, &new, cancelled) {
            let suspects = pack.into_iter().collect();
            return Err(Unsound { error: unverified(text), suspects });
        }
        self.check_cancelled(cancelled)?;
        Ok(())
    }

    fn check_cancelled(&self, cancelled: &AtomicBool) -> Result<()> {
        if cancelled.load(Ordering::Relaxed) {
            return Err(denizen_archive::Error::Cancelled { path: self.place().into() }.into());
        }
        Ok(())
    }

    /// Checks every backup: that all that it needs is there; with `read_data` also that every
    /// byte of it is what was written. Blocks.
    ///
    /// What is found to be damaged is taken out of the index, so that the next backup of what it
    /// held writes it anew; what is there but in no index is found again.
    ///
    /// # Errors
    /// What met the destination. What is wrong in it is no error but in the report.
    pub fn verify(
        &self,
        read_data: bool,
        counter: &Counter,
        cancelled: &AtomicBool,
    ) -> Result<Report> {
        let (mut report, mut altered) = (Report::default(), HashSet::new());
        let mut packs = Packs::list(&*self.files).map_err(|error| Error::Engine {
            action: "list what is in",
            place: self.place(),
            problem: error.to_string(),
        })?;
        if read_data {
            (packs.altered, altered) = self.altered(&packs, counter, cancelled);
            report.bytes = counter.moved();
            self.check_cancelled(cancelled)?;
        }
        let mut loose = Vec::new();
        let mut snapshots = Vec::new();
        for file in self.names(FileType::Snapshot)? {
            match self.snapshot(&file)? {
                Read::Sound(snapshot) => snapshots.push(snapshot),
                Read::Altered => loose.push(Finding {
                    backup: file.rsplit('/').next().map(str::to_owned),
                    session: None,
                    problem: format!("{file} is altered"),
                    instead: None,
                }),
                Read::Gone => {}
            }
        }
        snapshots.retain(|it| session_of(it).is_some());
        snapshots.sort_by_key(|snapshot| snapshot.time.timestamp());
        report.backups = snapshots.len() as u64;
        let (first, mut suspects) = self.look_at(&snapshots, &packs, cancelled)?;
        self.check_cancelled(cancelled)?;
        suspects.extend(&altered);
        let mut last = first.clone();
        if !suspects.is_empty() || first.iter().any(Option::is_some) {
            let mended = self.mend(&suspects)?;
            loose.extend(mended.problems.into_iter().map(|problem| Finding {
                backup: None,
                session: None,
                problem,
                instead: None,
            }));
            // Now what is altered is no longer in the index, piece by piece.
            for pack in altered {
                packs.altered.remove(&name(FileType::Pack, &pack));
            }
            packs.sizes = Packs::list(&*self.files).map_or(packs.sizes, |packs| packs.sizes);
            last = self.look_at(&snapshots, &packs, cancelled)?.0;
        }
        self.check_cancelled(cancelled)?;
        let mut sound: HashMap<Uuid, String> = HashMap::new();
        let mut bad = Vec::new();
        for ((snapshot, first), last) in snapshots.iter().zip(first).zip(last) {
            let Some(entry) = entry(snapshot) else { continue };
            match last {
                None => drop(sound.insert(entry.session, entry.id)),
                // The first time it was still known where it should be.
                Some(last) => bad.push((entry, first.unwrap_or(last))),
            }
        }
        report.findings.extend(bad.into_iter().map(|(entry, problem)| Finding {
            instead: sound.get(&entry.session).cloned(),
            backup: Some(entry.id),
            session: Some(entry.session),
            problem,
        }));
        report.findings.extend(loose);
        Ok(report)
    }

    /// What is wrong with each of these, and in which files.
    fn look_at(
        &self,
        snapshots: &[SnapshotFile],
        packs: &Packs,
        cancelled: &AtomicBool,
    ) -> Result<(Vec<Option<String>>, HashSet<Id>)> {
        let pieces = self.pieces()?;
        let mut trees = Trees::new(&pieces, packs, cancelled);
        let found = snapshots.iter().map(|snapshot| trees.look(snapshot.tree).problem).collect();
        Ok((found, trees.suspects))
    }

    /// Reads all files that hold pieces; their names are their digests. Gives also those of which
    /// something is lost for good: the others may be read another time.
    fn altered(
        &self,
        packs: &Packs,
        counter: &Counter,
        cancelled: &AtomicBool,
    ) -> (HashMap<String, String>, HashSet<Id>) {
        let names: Vec<&String> = packs.sizes.keys().collect();
        let next = AtomicUsize::new(0);
        let found = Mutex::new((HashMap::new(), HashSet::new()));
        std::thread::scope(|scope| {
            for _ in 0..threads() {
                scope.spawn(|| {
                    while let Some(file) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if cancelled.load(Ordering::Relaxed) {
                            return;
                        }
                        // What has another name is not the repository's.
                        let id = file.rsplit('/').next().and_then(|id| id.parse::<Id>().ok());
                        let Some(id) = id else { continue };
                        let (problem, lost) = match self.files.read(file, None) {
                            Ok(bytes) => {
                                counter.bytes(bytes.len() as u64);
                                if digest(&bytes) == id {
                                    continue;
                                }
                                (format!("{file} is altered"), true)
                            }
                            Err(error) => {
                                (format!("{file} cannot be read: {error}"), is_lost(&error))
                            }
                        };
                        let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                        found.0.insert((*file).clone(), problem);
                        found.1.extend(lost.then_some(id));
                    }
                });
            }
        });
        found.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}
