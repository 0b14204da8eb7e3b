//! From a tree in a repository to files, and whether files are as a tree says.
//!
//! Entries are made by the restorer of archives, which lets nothing out of its folder. Every
//! piece is compared with its digest before it is written.

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use denizen_archive::tree::{Kind, Member, Place, Sink, Walk, open, prepare};
use denizen_archive::{Error as TreeError, Owners, Restored, Skipped};
use rustic_core::repofile::{BlobType, Node, NodeType};
use rustic_core::{BlobId, DataId, IndexedFull, TreeId};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result, told};
use crate::{Counter, Engine, ROOT, Source, VOLUME, node};

/// What a page of zeros is looked for by: less is not worth a hole.
const PAGE: usize = 4096;

/// A piece of a file, if it is what its name says.
pub fn piece<S: IndexedFull>(
    engine: &Engine<S>,
    id: &DataId,
) -> std::result::Result<Bytes, String> {
    let bytes = engine.get_blob_cached(&BlobId::from(*id), BlobType::Data);
    let bytes = bytes.map_err(|error| told(&error))?;
    is_of(&bytes, &id.to_hex()).then_some(bytes).ok_or(format!("the piece {id} is altered"))
}

pub fn is_of(bytes: &[u8], id: &str) -> bool {
    let digest = Sha256::digest(bytes);
    let mut hex = String::with_capacity(64);
    digest.iter().for_each(|byte| hex.push_str(&format!("{byte:02x}")));
    hex == id
}

/// The entries of a folder on the way through a tree.
struct Folder {
    /// `./a/b/`
    path: Vec<u8>,
    nodes: std::vec::IntoIter<Node>,
}

/// A file with several names.
struct Named {
    first: Vec<u8>,
    content: Option<Vec<DataId>>,
}

pub struct Restorer<'a, S> {
    pub engine: &'a Engine<S>,
    pub place: String,
    pub backup: &'a str,
    pub counter: &'a Counter,
}

impl<S: IndexedFull> Restorer<'_, S> {
    fn damaged(&self, problem: impl Into<String>) -> Error {
        let (place, backup) = (self.place.clone(), self.backup.to_owned());
        Error::Damaged { place, backup, problem: problem.into() }
    }

    fn folder(&self, path: Vec<u8>, tree: &TreeId) -> Result<Folder> {
        let tree = self.engine.get_tree(tree).map_err(|error| self.damaged(told(&error)))?;
        Ok(Folder { path, nodes: tree.nodes.into_iter() })
    }

    pub fn restore(
        &self,
        tree: TreeId,
        home: &Path,
        only: Option<&Path>,
        owners: Option<Owners>,
        cancelled: &AtomicBool,
    ) -> Result<Restored> {
        let created = prepare(home)?;
        let label = PathBuf::from(&self.place).join(self.backup);
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

    fn make_all(
        &self,
        tree: TreeId,
        only: Option<&Path>,
        place: &mut Place<'_>,
    ) -> Result<(u64, u64)> {
        let (mut files, mut bytes, mut found) = (0, 0, only.is_none());
        let wanted: Vec<&[u8]> =
            only.map_or(Vec::new(), |only| node::steps(only.as_os_str().as_bytes()).collect());
        let mut links: HashMap<(u64, u64), Named> = HashMap::new();
        let mut way = vec![self.folder(b"./".to_vec(), &tree)?];
        while let Some(folder) = way.last_mut() {
            let Some(node) = folder.nodes.next() else {
                way.pop();
                continue;
            };
            let mut path = folder.path.clone();
            let name = node::name(&node).map_err(|problem| {
                self.damaged(format!("an entry in {} {problem}", shown(&path)))
            })?;
            path.extend_from_slice(name.as_bytes());
            let depth = way.len();
            // On the way to what is wanted, or it, or below it.
            if wanted.get(depth - 1).is_some_and(|step| *step != name.as_bytes()) {
                continue;
            }
            found |= depth == wanted.len();
            if depth == 1 && only.is_none() && name != VOLUME && name != ROOT {
                return Err(self.damaged(format!("{} is not a session's", shown(&path))));
            }
            let back = node::back(path.clone(), &node);
            let back =
                back.map_err(|problem| self.damaged(format!("{} {problem}", shown(&path))))?;
            let Some(mut member) = back else { continue };
            if member.kind == Kind::Directory {
                place.make(member, |_, _, _| Ok(()))?;
                let Some(tree) = node.subtree else {
                    return Err(self.damaged(format!("{} has no entries", shown(&path))));
                };
                path.push(b'/');
                way.push(self.folder(path, &tree)?);
                continue;
            }
            if member.kind == Kind::File {
                files += 1;
                bytes += member.size;
            }
            if node.meta.links > 1 && node.meta.inode != 0 {
                let key = (node.meta.device_id, node.meta.inode);
                match links.get(&key) {
                    Some(Named { first, content }) if *content == node.content => {
                        member.kind = Kind::HardLink;
                        member.link.clone_from(first);
                    }
                    _ => {
                        let content = node.content.clone();
                        links.insert(key, Named { first: path.clone(), content });
                    }
                }
            }
            self.counter.entry(&member);
            // An error of the repository's, on its way through the restorer of trees.
            let mut problem = None;
            let made = place.make(member, |place, fd, member| {
                self.content(place, fd, member, &node).unwrap_or_else(|text| {
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
        }
        if !found {
            let path = only.unwrap_or(Path::new("")).display();
            return Err(self.damaged(format!("it has no {path}")));
        }
        Ok((files, bytes))
    }

    /// Writes what a file holds; the outer error is the repository's.
    fn content(
        &self,
        place: &Place<'_>,
        fd: &OwnedFd,
        member: &Member,
        node: &Node,
    ) -> std::result::Result<std::result::Result<(), TreeError>, String> {
        let failed = |e| place.failed("write", &member.path, e);
        let mut offset = 0;
        for id in node.content.iter().flatten() {
            let piece = piece(self.engine, id)?;
            for page in piece.chunk_by_zeros() {
                if page.iter().any(|&byte| byte != 0)
                    && let Err(error) = write(fd, page, offset)
                {
                    return Ok(Err(failed(error)));
                }
                offset += page.len() as u64;
            }
            self.counter.bytes(piece.len() as u64);
            if let Err(error) = place.check_cancelled() {
                return Ok(Err(error));
            }
        }
        if offset != member.size {
            return Err(format!("it has {offset} bytes instead of {}", member.size));
        }
        Ok(rustix::fs::ftruncate(fd, member.size).map_err(failed))
    }
}

trait ByZeros {
    /// In pieces that are all zeros or are to be written as they are.
    fn chunk_by_zeros(&self) -> impl Iterator<Item = &[u8]>;
}

impl ByZeros for Bytes {
    fn chunk_by_zeros(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest: &[u8] = self;
        let is_empty = |page: &[u8]| page.len() == PAGE && page.iter().all(|&byte| byte == 0);
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let first = is_empty(&rest[..PAGE.min(rest.len())]);
            let alike = rest.chunks(PAGE).take_while(|page| is_empty(page) == first);
            let length: usize = alike.map(<[u8]>::len).sum();
            let (piece, later) = rest.split_at(length);
            rest = later;
            Some(piece)
        })
    }
}

fn write(fd: &OwnedFd, mut bytes: &[u8], mut offset: u64) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        let written = rustix::io::retry_on_intr(|| rustix::io::pwrite(fd, bytes, offset))?;
        bytes = &bytes[written..];
        offset += written as u64;
    }
    Ok(())
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path.strip_prefix(b"./").unwrap_or(path)).escape_debug().to_string()
}

/// Whether files are still as a backup has them: all that the format keeps of them, and for
/// regular files also their number and the time of their last change of any kind.
pub struct Compare<'a, S> {
    engine: &'a Engine<S>,
    way: Vec<std::vec::IntoIter<Node>>,
    differs: bool,
}

impl<'a, S: IndexedFull> Compare<'a, S> {
    pub fn new(engine: &'a Engine<S>, tree: TreeId) -> Self {
        let mut compare = Self { engine, way: Vec::new(), differs: false };
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
        match self.engine.get_tree(tree) {
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

impl<S: IndexedFull> Sink for Compare<'_, S> {
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
