//! What is in a repository was written by somebody who means harm: made with the engine itself,
//! which believes all that it is told.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use denizen_repository::{Counter, Files as _, Range, Repository};
use rustic_core::repofile::{Metadata, Node, NodeType, SnapshotFile};
use rustic_core::{
    BackupOptions, BytesList, Credentials, FileType, Id, IndexedIdsStatus, ReadBackend, ReadSource,
    ReadSourceEntry, ReadSourceOpen, RepositoryBackends, RepositoryOptions, RusticResult,
    WriteBackend,
};
use support::*;

/// The engine's own way to the place.
#[derive(Debug)]
struct Way(Arc<Memory>);

fn name(kind: FileType, id: &Id) -> String {
    let id = id.to_hex();
    match kind {
        FileType::Config => "config".to_owned(),
        FileType::Pack => format!("data/{}/{}", &id[..2], &*id),
        _ => format!("{}/{}", kind.dirname(), &*id),
    }
}

impl ReadBackend for Way {
    fn location(&self) -> String {
        "here".to_owned()
    }

    fn list_with_size(&self, kind: FileType) -> RusticResult<Vec<(Id, u32)>> {
        if kind == FileType::Config {
            return Ok(vec![(Id::default(), 1)]);
        }
        let found = self.0.list(kind.dirname()).unwrap();
        let id = |path: &str| path.rsplit('/').next().unwrap().parse().unwrap();
        Ok(found.iter().map(|(path, size)| (id(path), u32::try_from(*size).unwrap())).collect())
    }

    fn read_full(&self, kind: FileType, id: &Id) -> RusticResult<Bytes> {
        Ok(self.0.read(&name(kind, id), None).unwrap())
    }

    fn read_partial(
        &self,
        kind: FileType,
        id: &Id,
        _: bool,
        offset: u32,
        length: u32,
    ) -> RusticResult<Bytes> {
        let range = Range { offset: offset.into(), length: length.into() };
        Ok(self.0.read(&name(kind, id), Some(range)).unwrap())
    }

    fn warmup_path(&self, kind: FileType, id: &Id) -> String {
        name(kind, id)
    }
}

impl WriteBackend for Way {
    fn create(&self) -> RusticResult<()> {
        Ok(())
    }

    fn write_bytes(&self, kind: FileType, id: &Id, _: bool, it: BytesList) -> RusticResult<()> {
        self.0.write(&name(kind, id), it.into_vec(), false).unwrap();
        Ok(())
    }

    fn remove(&self, kind: FileType, id: &Id, _: bool) -> RusticResult<()> {
        self.0.remove(&name(kind, id)).unwrap();
        Ok(())
    }
}

#[derive(Clone)]
struct Content(Vec<u8>);

impl ReadSourceOpen for Content {
    type Reader = Cursor<Vec<u8>>;

    fn open(self) -> RusticResult<Self::Reader> {
        Ok(Cursor::new(self.0))
    }
}

type Told = (PathBuf, Node, Option<Content>);

struct Tree(Vec<Told>);

impl ReadSource for Tree {
    type Open = Content;
    type Iter = std::vec::IntoIter<RusticResult<ReadSourceEntry<Content>>>;

    fn size(&self) -> RusticResult<Option<u64>> {
        Ok(None)
    }

    fn entries(&self) -> Self::Iter {
        let entry = |(path, node, open): &Told| {
            Ok(ReadSourceEntry { path: path.clone(), node: node.clone(), open: open.clone() })
        };
        self.0.iter().map(entry).collect::<Vec<_>>().into_iter()
    }
}

/// An entry at a path, which claims to have that name.
fn entry(path: &str, name: &str, kind: NodeType, content: &[u8]) -> Told {
    let size = content.len() as u64;
    let meta = Metadata { mode: Some(0o755), size, links: 1, inode: 1, ..Metadata::default() };
    let mut node = Node::new_node(name.as_ref(), kind.clone(), meta);
    name.clone_into(&mut node.name);
    let content = (kind == NodeType::File).then(|| Content(content.to_vec()));
    (path.into(), node, content)
}

fn volume() -> Told {
    entry("volume", "volume", NodeType::Dir, b"")
}

type Engine = rustic_core::Repository<IndexedIdsStatus>;

/// One for all: keys are slow to derive.
static BED: LazyLock<(Arc<Memory>, Repository, Engine)> = LazyLock::new(|| {
    let memory = Arc::new(Memory::default());
    let repository = Repository::open_in(memory.clone(), PASSWORD).unwrap();
    let options = RepositoryOptions::default().no_cache(true);
    let backends = RepositoryBackends::new(Arc::new(Way(memory.clone())), None);
    let engine = rustic_core::Repository::new(&options, &backends).unwrap();
    let engine = engine.open(&Credentials::password(PASSWORD)).unwrap().to_indexed_ids().unwrap();
    (memory, repository, engine)
});

/// Restores such a backup; whatever comes of it, nothing outside is touched.
fn restored(tree: Vec<Told>) -> Result<Vec<PathBuf>, String> {
    let (memory, repository, engine) = &*BED;
    let repository = repository.through(memory.clone());
    let mut snapshot = SnapshotFile::default();
    snapshot.tags.add("denizen".to_owned());
    snapshot.tags.add(uuid::Uuid::from_u128(1).to_string());
    let options = BackupOptions::default().no_scan(true);
    let snapshot = engine.archive(&options, &Tree(tree), snapshot, &["/".into()]).unwrap();
    let bench = Bench::new();
    let outside = bench.outside();
    let home = bench.dir.path().join("home");
    let id = snapshot.id.to_hex();
    let done = repository.restore(&id, &home, &[], None, &Counter::default(), &NEVER);
    assert_eq!(fs::read(&outside).unwrap(), b"untouched");
    let mut beside: Vec<_> =
        fs::read_dir(bench.dir.path()).unwrap().map(|it| it.unwrap().file_name()).collect();
    beside.retain(|name| name != "home");
    beside.sort();
    assert_eq!(beside, ["destination", "outside", "volume"]);
    match done {
        Ok(_) => Ok(picture(&home)
            .into_keys()
            .map(|name| PathBuf::from(String::from_utf8(name).unwrap()))
            .collect()),
        Err(error) => {
            assert!(!home.exists(), "what failed leaves nothing");
            // A check takes it as it is, and does not fail over it.
            repository.verify(true, &Counter::default(), &NEVER).unwrap();
            Err(error.to_string())
        }
    }
}

#[test]
fn names_that_are_no_names_are_refused() {
    for bad in
        ["..", ".", "", "a/b", "/outside", "../outside", "a/../../outside", "\\x2f", "a\\u0000b"]
    {
        for kind in [NodeType::File, NodeType::Dir, NodeType::Fifo] {
            let tree = vec![volume(), entry("volume/x", bad, kind, b"x")];
            let error = restored(tree).unwrap_err();
            assert!(!error.contains('\n'), "{error}");
        }
        restored(vec![entry("x", bad, NodeType::File, b"x")]).unwrap_err();
    }
}

#[test]
fn what_no_session_has_is_refused() {
    let kinds = [
        NodeType::Dev { device: 0x801 },
        NodeType::Dev { device: 0 },
        NodeType::Chardev { device: 0x103 },
        NodeType::Chardev { device: 1 << 40 },
    ];
    for kind in kinds {
        let error = restored(vec![volume(), entry("volume/x", "x", kind, b"")]).unwrap_err();
        assert!(error.contains("is a device"), "{error}");
    }
    let error = restored(vec![volume(), entry("w", "w", NodeType::Dir, b"")]).unwrap_err();
    assert!(error.contains("is not a session's"), "{error}");
    let socket = entry("volume/x", "x", NodeType::Socket, b"");
    assert_eq!(restored(vec![volume(), socket]).unwrap().len(), 2);
}

#[test]
fn nothing_goes_through_a_link() {
    let link = |target: &str| NodeType::from_link(Path::new(target));
    for target in ["..", "../..", "../outside", "/", "."] {
        let tree = vec![
            volume(),
            entry("volume/x", "x", link(target), b""),
            entry("volume/y", "x", NodeType::Dir, b""),
            entry("volume/y/outside", "outside", NodeType::File, b"harm"),
        ];
        restored(tree).unwrap_err();
        let tree = vec![
            volume(),
            entry("volume/x", "x", link(target), b""),
            entry("volume/y", "x", NodeType::File, b"harm"),
        ];
        restored(tree).unwrap_err();
        // As `volume` itself.
        let tree = vec![
            entry("a", "volume", link(target), b""),
            entry("volume", "volume", NodeType::Dir, b""),
            entry("volume/outside", "outside", NodeType::File, b"harm"),
        ];
        restored(tree).unwrap_err();
        // As the other name of a file.
        let mut first = entry("volume/a", "a", link(target), b"");
        let mut second = entry("volume/b", "b", NodeType::File, b"");
        (first.1.meta.links, second.1.meta.links) = (2, 2);
        assert!(restored(vec![volume(), first, second]).is_ok());
    }
}

#[test]
fn claims_are_not_believed() {
    for size in [0, 1, 7, 9, 1 << 40, u64::MAX] {
        let mut file = entry("volume/x", "x", NodeType::File, b"8 bytes.");
        file.1.meta.size = size;
        let error = restored(vec![volume(), file]).unwrap_err();
        assert!(error.contains("bytes"), "{error}");
    }
    let mut odd = entry("volume/x", "x", NodeType::File, b"");
    odd.1.meta.mode = Some(u32::MAX);
    odd.1.meta.uid = Some(u32::MAX);
    odd.1.meta.mtime = Some(rustic_core::jiff::Timestamp::MAX);
    assert_eq!(restored(vec![volume(), odd]).unwrap().len(), 3);
    let mut none = volume();
    none.1.meta = Metadata::default();
    assert_eq!(restored(vec![none]).unwrap().len(), 2);
}

#[test]
fn the_same_name_twice_is_refused() {
    for kind in [NodeType::File, NodeType::Fifo] {
        let tree = vec![
            volume(),
            entry("volume/x", "x", kind.clone(), b"1"),
            entry("volume/y", "x", kind, b"2"),
        ];
        restored(tree).unwrap_err();
    }
}
