//! From a tree in a repository to files, and whether files are as a tree says.
//!
//! Entries are made by the restorer of archives, which lets nothing out of its folder. Every
//! piece is compared with its digest before it is written.

use std::collections::{HashMap, HashSet};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, RecvError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Scope, ScopedJoinHandle};

use denizen_archive::tree::{Kind, Member, Place, Sink, Walk, open, prepare};
use denizen_archive::{Error as TreeError, Owners, Restored, Skipped};
use rustic_core::repofile::{Node, NodeType};
use rustic_core::{DataId, TreeId};

use crate::check::threads;
use crate::error::{Error, Result};
use crate::pieces::{Pieces, Problem};
use crate::{Counter, ROOT, Source, VOLUME, node};

/// What a page of zeros is looked for by: less is not worth a hole.
const PAGE: usize = 4096;
static EMPTY: [u8; PAGE] = [0; PAGE];

/// How many pieces are read ahead of what is written. Each has a megabyte at most, or what
/// another program has made.
const AHEAD: usize = 32;

/// The entries of a folder on the way through a tree.
struct Folder {
    /// Length of its path, with the slash at its end.
    path: usize,
    nodes: std::vec::IntoIter<Node>,
    /// Which of what is wanted may be in it; none if it is wanted as a whole.
    wanted: Option<Vec<usize>>,
}

/// A file with several names.
struct Named {
    first: Vec<u8>,
    kind: NodeType,
    content: Option<Vec<DataId>>,
}

/// A piece, once it is read.
type Piece = std::result::Result<Vec<u8>, Problem>;

/// What is told to who makes the entries, in the order in which they are made.
enum Told {
    /// The pieces of a file follow.
    Entry(Member),
    Piece(Receiver<Piece>),
    /// All that comes of what was wanted has been told.
    End,
}

pub struct Restorer<'a> {
    pub pieces: &'a Pieces,
    pub place: &'a str,
    pub backup: &'a str,
    pub counter: &'a Counter,
}

impl Restorer<'_> {
    fn damaged(&self, problem: impl Into<String>) -> Error {
        let (place, backup) = (self.place.to_owned(), self.backup.to_owned());
        Error::Damaged { place, backup, problem: problem.into() }
    }

    fn folder(&self, path: usize, tree: &TreeId, wanted: Option<Vec<usize>>) -> Result<Folder> {
        let tree = self.pieces.tree(tree).map_err(|problem| self.damaged(problem.text))?;
        Ok(Folder { path, nodes: tree.nodes.into_iter(), wanted })
    }

    pub fn restore(
        &self,
        tree: TreeId,
        home: &Path,
        only: &[PathBuf],
        owners: Option<Owners>,
        cancelled: &AtomicBool,
    ) -> Result<Restored> {
        let created = prepare(home)?;
        let label = PathBuf::from(self.place).join(self.backup);
        let mut place = Place::new(&label, home, owners, cancelled)?;
        let made = self.make_all(tree, only, &mut place).and_then(|counts| {
            place.finish()?;
            place.sync()?;
            Ok(counts)
        });
        match made {
            Ok((files, bytes)) => Ok(place.restored(files, bytes)),
            Err(error) => {
                place.undo(created);
                Err(error)
            }
        }
    }

    /// Pieces are read by several threads, ahead of this one, which makes the entries.
    fn make_all(
        &self,
        tree: TreeId,
        only: &[PathBuf],
        place: &mut Place<'_>,
    ) -> Result<(u64, u64)> {
        std::thread::scope(|scope| {
            let (telling, told) = sync_channel(AHEAD);
            let (wanting, wanted) = sync_channel::<(DataId, SyncSender<Piece>)>(AHEAD);
            let wanted = Arc::new(Mutex::new(wanted));
            let list = move || self.tell(tree, only, &telling, &wanting);
            let telling = spawn(scope, "denizen-list", list)?;
            for _ in 0..threads() {
                let wanted = wanted.clone();
                spawn(scope, "denizen-read", move || self.read(&wanted))?;
            }
            drop(wanted);
            let made = self.make(&told, place);
            // Whereupon the threads end.
            drop(told);
            let told = telling.join().unwrap_or_else(|_| Err(self.damaged("the reader panicked")));
            // If the list ended early, it says why.
            match (made, told) {
                (Ok(Some(made)), Ok(())) => Ok(made),
                (Err(error), _) | (_, Err(error)) => Err(error),
                (Ok(None), Ok(())) => Err(self.damaged("it ends early")),
            }
        })
    }

    fn read(&self, wanted: &Mutex<Receiver<(DataId, SyncSender<Piece>)>>) {
        loop {
            let next = wanted.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok((id, piece)) = next else { return };
            // Nobody may want it any more.
            let _ = piece.send(self.pieces.data(&id));
        }
    }

    /// Tells of all entries. Ends early, without an error, if nobody listens any more.
    fn tell(
        &self,
        tree: TreeId,
        only: &[PathBuf],
        telling: &SyncSender<Told>,
        wanting: &SyncSender<(DataId, SyncSender<Piece>)>,
    ) -> Result<()> {
        let steps = |path: &PathBuf| -> Vec<Vec<u8>> {
            node::steps(path.as_os_str().as_bytes()).map(<[u8]>::to_vec).collect()
        };
        let wanted: Vec<Vec<Vec<u8>>> = only.iter().map(steps).collect();
        let mut missing: HashSet<usize> = (0..wanted.len()).collect();
        let mut links: HashMap<(u64, u64), Named> = HashMap::new();
        let all = (!only.is_empty()).then(|| (0..wanted.len()).collect());
        // One for all folders, which may be deep: `./a/b/`
        let mut here = b"./".to_vec();
        let mut way = vec![self.folder(here.len(), &tree, all)?];
        while let Some(folder) = way.last_mut() {
            here.truncate(folder.path);
            let Some(node) = folder.nodes.next() else {
                way.pop();
                continue;
            };
            let (mut path, mut within) = (here.clone(), folder.wanted.clone());
            let name = node::name(&node).map_err(|problem| {
                self.damaged(format!("an entry in {} {problem}", shown(&path)))
            })?;
            path.extend_from_slice(name.as_bytes());
            let depth = way.len();
            // On the way to what is wanted, or it, or below it.
            if let Some(ways) = &mut within {
                ways.retain(|at| {
                    wanted[*at].get(depth - 1).is_some_and(|step| step == name.as_bytes())
                });
                if ways.is_empty() {
                    continue;
                }
                let mut is_wanted = false;
                for at in ways.iter().filter(|at| wanted[**at].len() == depth) {
                    missing.remove(at);
                    is_wanted = true;
                }
                if is_wanted {
                    // And with it what else is wanted of it.
                    within = None;
                }
            }
            if depth == 1 && only.is_empty() && name != VOLUME && name != ROOT {
                return Err(self.damaged(format!("{} is not a session's", shown(&path))));
            }
            let back = node::back(path.clone(), &node);
            let back =
                back.map_err(|problem| self.damaged(format!("{} {problem}", shown(&path))))?;
            let Some(mut member) = back else { continue };
            if member.kind == Kind::Directory {
                let Some(tree) = node.subtree else {
                    return Err(self.damaged(format!("{} has no entries", shown(&path))));
                };
                if telling.send(Told::Entry(member)).is_err() {
                    return Ok(());
                }
                here.clone_from(&path);
                here.push(b'/');
                way.push(self.folder(here.len(), &tree, within)?);
                continue;
            }
            // What is on the way to it must be a folder.
            if within.is_some() {
                continue;
            }
            if node.meta.links > 1 && node.meta.inode != 0 {
                let key = (node.meta.device_id, node.meta.inode);
                match links.get(&key) {
                    Some(Named { first, kind, content })
                        if *kind == node.node_type && *content == node.content =>
                    {
                        member.kind = Kind::HardLink;
                        member.link.clone_from(first);
                    }
                    _ => {
                        let (kind, content) = (node.node_type.clone(), node.content.clone());
                        links.insert(key, Named { first: path.clone(), kind, content });
                    }
                }
            }
            let is_file = member.kind == Kind::File;
            if telling.send(Told::Entry(member)).is_err() {
                return Ok(());
            }
            for id in node.content.iter().flatten().filter(|_| is_file) {
                let (sender, piece) = sync_channel(1);
                if wanting.send((*id, sender)).is_err() || telling.send(Told::Piece(piece)).is_err()
                {
                    return Ok(());
                }
            }
        }
        let within =
            |at: usize, other: usize| at != other && wanted[at].starts_with(&wanted[other]);
        let lost = missing.iter().find(|at| !(0..only.len()).any(|it| within(**at, it)));
        if let Some(path) = lost.and_then(|at| only.get(*at)) {
            let (place, backup) = (self.place.to_owned(), self.backup.to_owned());
            return Err(Error::NoPath { place, backup, path: path.clone() });
        }
        // If nobody listens, nobody minds.
        let _ = telling.send(Told::End);
        Ok(())
    }

    /// Makes what it is told of; nothing if that ended early.
    fn make(&self, told: &Receiver<Told>, place: &mut Place<'_>) -> Result<Option<(u64, u64)>> {
        let (mut files, mut bytes) = (0, 0);
        let mut next = told.recv();
        loop {
            let member = match next {
                Ok(Told::Entry(member)) => member,
                Ok(Told::End) => return Ok(Some((files, bytes))),
                // The pieces of something that has none.
                Ok(Told::Piece(_)) | Err(_) => return Ok(None),
            };
            if member.kind == Kind::File {
                files += 1;
                bytes += member.size;
            }
            self.counter.entry(&member);
            // An error of the repository's, on its way through the restorer of trees.
            let (mut problem, mut after) = (None, None);
            let path = member.path.clone();
            let made = place.make(member, |place, fd, member| {
                let made = self.content(place, fd, member, told, &mut after);
                made.unwrap_or_else(|text| {
                    problem = Some(text);
                    Err(TreeError::Cancelled { path: PathBuf::new() })
                })
            });
            match (made, problem) {
                (Err(_), Some(problem)) => {
                    return Err(self.damaged(format!("{}: {problem}", shown(&path))));
                }
                (made, _) => made?,
            }
            place.check_cancelled()?;
            next = after.unwrap_or_else(|| told.recv());
        }
    }

    /// Writes what a file holds; the outer error is the repository's. `after` becomes what is
    /// told after it.
    fn content(
        &self,
        place: &Place<'_>,
        fd: &OwnedFd,
        member: &Member,
        told: &Receiver<Told>,
        after: &mut Option<std::result::Result<Told, RecvError>>,
    ) -> std::result::Result<std::result::Result<(), TreeError>, String> {
        let failed = |e| place.failed("write", &member.path, e);
        let (mut offset, mut ends_in_hole) = (0, false);
        let next = loop {
            let piece = match told.recv() {
                Ok(Told::Piece(piece)) => piece,
                next => break next,
            };
            let piece = piece.recv().map_err(|_| "the reader panicked".to_owned())?;
            let piece = piece.map_err(|problem| problem.text)?;
            if offset + piece.len() as u64 > member.size {
                return Err(format!("it has more than {} bytes", member.size));
            }
            for (is_empty, stretch) in stretches(&piece) {
                ends_in_hole = is_empty;
                if !is_empty && let Err(error) = place.write(fd, member, offset, stretch) {
                    return Ok(Err(error));
                }
                offset += stretch.len() as u64;
            }
            self.counter.bytes(piece.len() as u64);
            if let Err(error) = place.check_cancelled() {
                return Ok(Err(error));
            }
        };
        // Without an end it was the list that failed.
        if next.is_ok() && offset != member.size {
            return Err(format!("it has {offset} bytes instead of {}", member.size));
        }
        *after = Some(next);
        if ends_in_hole {
            return Ok(rustix::fs::ftruncate(fd, member.size).map_err(failed));
        }
        Ok(Ok(()))
    }
}

fn spawn<'s, T: Send + 's>(
    scope: &'s Scope<'s, '_>,
    name: &str,
    run: impl FnOnce() -> T + Send + 's,
) -> Result<ScopedJoinHandle<'s, T>> {
    let spawned = std::thread::Builder::new().name(name.into()).spawn_scoped(scope, run);
    spawned.map_err(|source| Error::Io { path: PathBuf::from("a thread to restore"), source })
}

/// In stretches that are to be written as they are, and others that are all zeros.
fn stretches(bytes: &[u8]) -> impl Iterator<Item = (bool, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let is_empty = |page: &[u8]| page == &EMPTY[..page.len()];
        let first = is_empty(rest.chunks(PAGE).next()?);
        let alike = rest.chunks(PAGE).take_while(|page| is_empty(page) == first);
        let (stretch, later) = rest.split_at(alike.map(<[u8]>::len).sum());
        rest = later;
        Some((first, stretch))
    })
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path.strip_prefix(b"./").unwrap_or(path)).escape_debug().to_string()
}

/// Whether files are still as a backup has them: all that the format keeps of them, and for
/// regular files also their number and the time of their last change of any kind.
pub struct Compare<'a> {
    pieces: &'a Pieces,
    way: Vec<std::vec::IntoIter<Node>>,
    differs: bool,
}

impl<'a> Compare<'a> {
    pub fn new(pieces: &'a Pieces, tree: TreeId) -> Self {
        let mut compare = Self { pieces, way: Vec::new(), differs: false };
        compare.enter(&tree);
        compare
    }

    /// What is left out, if they are the same.
    pub fn run(self, source: Source<'_>, cancelled: &AtomicBool) -> Result<Option<Vec<Skipped>>> {
        if self.differs {
            return Ok(None);
        }
        let root = source.root.map(open).transpose()?;
        let volume = open(source.volume)?;
        let mut walk = Walk::new(source.volume, source.owners, cancelled, self);
        let walked = root.map_or(Ok(()), |root| walk.run_beside(root, ROOT));
        let walked = walked.and_then(|()| walk.run_beside(volume, VOLUME));
        if walk.sink.differs {
            return Ok(None);
        }
        walked?;
        let exhausted = walk.sink.way.iter_mut().all(|level| level.next().is_none());
        Ok(exhausted.then_some(walk.skipped))
    }

    fn enter(&mut self, tree: &TreeId) {
        match self.pieces.tree(tree) {
            Ok(tree) => self.way.push(tree.nodes.into_iter()),
            // Then it is written anew.
            Err(_) => self.differs = true,
        }
    }

    fn compare(
        &mut self,
        member: &Member,
        stat: Option<&rustix::fs::Stat>,
    ) -> Result<(), TreeError> {
        let depth = node::steps(&member.path).count();
        let mut same = true;
        while self.way.len() > depth {
            same &= self.way.pop().is_none_or(|mut level| level.next().is_none());
        }
        let old = self.way.last_mut().and_then(Iterator::next);
        if let Some(mut old) = old.filter(|_| same && self.way.len() == depth) {
            let subtree = old.subtree.take();
            old.content = None;
            if old == node::of(member, stat) {
                if old.node_type == NodeType::Dir {
                    match subtree {
                        Some(tree) => self.enter(&tree),
                        None => self.differs = true,
                    }
                }
            } else {
                self.differs = true;
            }
        } else {
            self.differs = true;
        }
        if self.differs {
            // To end the walk.
            return Err(TreeError::Cancelled { path: PathBuf::new() });
        }
        Ok(())
    }

    fn compare_file(&mut self, member: &Member, file: BorrowedFd<'_>) -> Result<(), TreeError> {
        let stat = rustix::fs::fstat(file).map_err(|e| TreeError::Io {
            action: "look at",
            path: PathBuf::from(node::os(&member.path)),
            source: e.into(),
        })?;
        self.compare(member, Some(&stat))
    }
}

impl Sink for Compare<'_> {
    fn entry(&mut self, member: Member) -> Result<(), TreeError> {
        self.compare(&member, None)
    }

    fn file(&mut self, member: Member, content: BorrowedFd<'_>) -> Result<(), TreeError> {
        self.compare_file(&member, content)
    }

    fn links_all(&self) -> bool {
        false
    }

    fn link(
        &mut self,
        member: Member,
        content: &dyn Fn() -> Result<OwnedFd, TreeError>,
    ) -> Result<(), TreeError> {
        let file = content()?;
        let stat = rustix::fs::fstat(&file);
        let size = stat.map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0));
        let member = Member { kind: Kind::File, link: Vec::new(), size, ..member };
        self.compare_file(&member, std::os::fd::AsFd::as_fd(&file))
    }
}
