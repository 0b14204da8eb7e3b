//! Backups made, read back and restored.
#![allow(clippy::unwrap_used)]

mod support;

use std::ffi::OsStr;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use denizen_repository::{
    Counter, Destination, Entry, Error, Files as _, Owners, Repository, Source,
};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use support::*;
use uuid::Uuid;

fn repository() -> (Arc<Memory>, Repository) {
    let memory = Arc::new(Memory::default());
    let repository = Repository::open_in(memory.clone(), PASSWORD).unwrap();
    (memory, repository)
}

/// Writes a backup and restores it beside it.
fn there_and_back(repository: &Repository, volume: &Path) {
    let session = Uuid::new_v4();
    let written = write(repository, session, volume).unwrap();
    comes_back(repository, &written.entry, volume);
    let again = write(repository, session, volume).unwrap();
    assert_eq!(again.entry.added, 0);
    assert_eq!((again.entry.files, again.entry.bytes), (written.entry.files, written.entry.bytes));
    assert!(again.entry.taken_at > written.entry.taken_at);
}

#[test]
fn random_trees_come_back_entirely() {
    let folder = tempfile::tempdir().unwrap();
    let destination = Destination::Folder(folder.path().join("far/repository"));
    let repository = Repository::open(&destination, PASSWORD).unwrap();
    for seed in 0..8 {
        println!("seed {seed}");
        let bench = Bench::new();
        random_tree(&bench.volume, seed, 120);
        there_and_back(&repository, &bench.volume);
    }
    let report = repository.verify(true, &Counter::default(), &NEVER).unwrap();
    assert!(report.findings.is_empty(), "{report:?}");
    assert_eq!(report.backups, 16);
    repository.sweep().unwrap();
    assert_eq!(fs::read_dir(folder.path().join("far/repository/tmp")).unwrap().count(), 0);
    // Whoever opens it again sees the same.
    let again = Repository::open(&destination, PASSWORD).unwrap();
    assert_eq!(again.list(None).unwrap(), repository.list(None).unwrap());
}

#[test]
fn trees_that_change_a_little_come_back_entirely() {
    let (_, repository) = repository();
    for seed in 0..6 {
        println!("seed {seed}");
        let bench = Bench::new();
        random_tree(&bench.volume, seed, 60);
        let session = Uuid::new_v4();
        let mut entries = vec![write(&repository, session, &bench.volume).unwrap().entry];
        let random = &mut Random::new(seed);
        for step in 0..3 {
            let below = bench.volume.join(format!("step{step}"));
            fs::create_dir(&below).unwrap();
            random_tree(&below, seed * 10 + step, 20);
            // Another file of the same length, with the same time.
            let same = bench.volume.join("same");
            fs::write(&same, random.bytes(1000)).unwrap();
            set_mtime(&same, 7, 7);
            entries.push(write(&repository, session, &bench.volume).unwrap().entry);
        }
        comes_back(&repository, &entries[3], &bench.volume);
        let listed = repository.list(Some(session)).unwrap();
        entries.reverse();
        assert_eq!(listed, entries);
    }
}

#[test]
fn odd_entries_come_back() {
    let (_, repository) = repository();
    let bench = Bench::new();
    let at = |name: &[u8]| bench.volume.join(OsStr::from_bytes(name));
    fs::write(at(b"file"), "x").unwrap();
    for name in [&b"user.\xff\xfe"[..], b"user.%", b"user.%41", b"user.\xc3%fF\xc3", b"user. \\\""]
    {
        rustix::fs::setxattr(at(b"file"), name, name, rustix::fs::XattrFlags::empty()).unwrap();
    }
    symlink("nowhere", at(b"link")).unwrap();
    fs::hard_link(at(b"link"), at(b"link again")).unwrap();
    fs::hard_link(at(b"file"), at(b"file again")).unwrap();
    fifo(&at(b"fifo"));
    fs::hard_link(at(b"fifo"), at(b"fifo again")).unwrap();
    fs::create_dir_all(at(b"empty/empty")).unwrap();
    fs::write(at(&[b'n'; 255]), "").unwrap();
    fs::write(at(b"\xff\n\"\\\xf0\x9f\x98\x80\x01"), "odd").unwrap();
    fs::write(at(b"\\u0041\\x41"), "escapes").unwrap();
    if is_root() {
        let none = Mode::empty();
        rustix::fs::mknodat(CWD, at(b"out"), FileType::CharacterDevice, none, 0).unwrap();
        rustix::fs::linkat(CWD, at(b"out"), CWD, at(b"out too"), AtFlags::empty()).unwrap();
    }
    let mut deep = bench.volume.clone();
    for _ in 0..100 {
        deep.push("d".repeat(30));
    }
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("file"), "deep").unwrap();
    there_and_back(&repository, &bench.volume);
    let empty = bench.dir.path().join("nothing");
    fs::create_dir(&empty).unwrap();
    there_and_back(&repository, &empty);
}

#[test]
fn large_sparse_files_come_back() {
    let (memory, repository) = repository();
    let bench = Bench::new();
    let path = bench.volume.join("sparse");
    let file = fs::File::create(&path).unwrap();
    file.set_len((4 << 30) + (9 << 20)).unwrap();
    file.write_all_at(b"begin", 3).unwrap();
    file.write_all_at(&[7; 9000], (4 << 30) + (5 << 20) + 123).unwrap();
    // A whole number of pieces, and one more byte.
    fs::write(bench.volume.join("even"), Random::new(1).bytes(2 << 20)).unwrap();
    fs::write(bench.volume.join("odd"), Random::new(2).bytes((2 << 20) + 1)).unwrap();
    there_and_back(&repository, &bench.volume);
    let size: usize = memory.files.lock().unwrap().values().map(bytes::Bytes::len).sum();
    assert!(size < 6 << 20, "{size}");
}

#[test]
fn many_files_come_back() {
    let count = std::env::var("DENIZEN_MANY_FILES").map_or(100_000, |it| it.parse().unwrap());
    let (_, repository) = repository();
    let bench = Bench::new();
    for number in 0..count {
        let folder = bench.volume.join(format!("{}", number / 5000));
        if number % 5000 == 0 {
            fs::create_dir(&folder).unwrap();
        }
        fs::write(folder.join(format!("file {number}")), format!("{number}")).unwrap();
    }
    there_and_back(&repository, &bench.volume);
}

/// Removes a tree that is deeper than the standard library can.
struct Deep<'a>(&'a Path);

impl Drop for Deep<'_> {
    fn drop(&mut self) {
        Command::new("rm").arg("-rf").arg(self.0).status().unwrap();
    }
}

#[test]
fn very_deep_trees_come_back() {
    // With 16400, more than a restore once remembered the paths of; that takes a minute.
    let depth = std::env::var("DENIZEN_DEPTH").map_or(2000, |it| it.parse().unwrap());
    let (_, repository) = repository();
    let bench = Bench::new();
    let (_volume, _into) = (Deep(&bench.volume), Deep(&bench.into));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let open = |from: &OwnedFd| rustix::fs::openat(from, c"d", flags, Mode::empty());
    let mut fd = rustix::fs::open(&bench.volume, flags, Mode::empty()).unwrap();
    for _ in 0..depth {
        rustix::fs::mkdirat(&fd, c"d", Mode::RWXU).unwrap();
        fd = open(&fd).unwrap();
    }
    let written = write(&repository, Uuid::new_v4(), &bench.volume).unwrap();
    restore(&repository, &written.entry.id, &bench.into).unwrap();
    let mut fd = rustix::fs::open(bench.into.join("volume"), flags, Mode::empty()).unwrap();
    for _ in 0..depth {
        fd = open(&fd).unwrap();
    }
    assert!(open(&fd).is_err());
}

#[test]
fn changes_of_the_root_and_owners_come_back() {
    if !is_root() {
        return;
    }
    let (_, repository) = repository();
    let bench = Bench::new();
    let root = bench.dir.path().join("changed");
    fs::create_dir(&root).unwrap();
    random_tree(&root, 3, 30);
    for (name, owner) in [("a", 100_000), ("b", 100_999), ("c", 7), ("d", 165_535)] {
        fs::write(bench.volume.join(name), name).unwrap();
        std::os::unix::fs::lchown(bench.volume.join(name), Some(owner), Some(owner)).unwrap();
    }
    let session = Uuid::new_v4();
    let kept = 0x7000_0000;
    let owners = |users, count| Some(Owners { users, groups: users, count, kept });
    let source = Source {
        root: Some(&root),
        owners: owners(100_000, 65_536),
        ..source(session, &bench.volume)
    };
    let entry = repository.write(source, now(), &Arc::default(), &NEVER).unwrap().entry;
    let again = repository.write(source, now(), &Arc::default(), &NEVER).unwrap().entry;
    assert_eq!(again.added, 0);
    let home = bench.dir.path().join("home");
    let counter = Counter::default();
    let found = |home: &Path| {
        ["a", "b", "c", "d"].map(|name| fs::metadata(home.join("volume").join(name)).unwrap().uid())
    };
    repository.restore(&entry.id, &home, &[], source.owners, &counter, &NEVER).unwrap();
    assert_eq!(found(&home), [100_000, 100_999, 7, 165_535]);
    compare(&root, &home.join("root"));
    compare(&bench.volume, &home.join("volume"));
    // Another host, which has other and fewer users for it.
    fs::remove_dir_all(&home).unwrap();
    let fewer = owners(500_000, 1000);
    repository.restore(&entry.id, &home, &[], fewer, &counter, &NEVER).unwrap();
    assert_eq!(found(&home), [500_000, 500_999, 7, 500_999]);
    // And one who leaves them as they are in the backup.
    fs::remove_dir_all(&home).unwrap();
    repository.restore(&entry.id, &home, &[], None, &counter, &NEVER).unwrap();
    assert_eq!(found(&home), [kept, kept + 999, 7, kept + 65_535]);
}

#[test]
fn one_path_is_restored_alone() {
    let (_, repository) = repository();
    let bench = Bench::new();
    fs::create_dir_all(bench.volume.join("a/b")).unwrap();
    for name in ["a/b/file", "a/other", "file"] {
        fs::write(bench.volume.join(name), name).unwrap();
    }
    let entry = write(&repository, Uuid::new_v4(), &bench.volume).unwrap().entry;
    let home = bench.dir.path().join("home");
    let only = |path: &str| {
        let counter = Counter::default();
        repository.restore(&entry.id, &home, &[path.into()], None, &counter, &NEVER)
    };
    let found = || {
        let mut names: Vec<_> =
            picture(&home).into_keys().map(|it| String::from_utf8(it).unwrap()).collect();
        names.retain(|name| !name.is_empty());
        fs::remove_dir_all(&home).unwrap();
        names
    };
    assert_eq!(only("volume/a/b/file").unwrap().files, 1);
    assert_eq!(found(), ["volume", "volume/a", "volume/a/b", "volume/a/b/file"]);
    assert_eq!(only("./volume/a/").unwrap().files, 2);
    assert_eq!(found(), ["volume", "volume/a", "volume/a/b", "volume/a/b/file", "volume/a/other"]);
    for missing in ["volume/no", "volume/file/no", "no", "../volume"] {
        let error = only(missing).unwrap_err();
        assert!(matches!(error, Error::NoPath { .. }), "{error}");
        assert!(!home.exists(), "{missing}");
    }
    let several = |paths: &[&str]| {
        let (paths, counter) =
            (paths.iter().map(PathBuf::from).collect::<Vec<_>>(), Counter::default());
        repository.restore(&entry.id, &home, &paths, None, &counter, &NEVER)
    };
    // One of them within another, which is wanted as a whole.
    assert_eq!(several(&["volume/a/b/file", "volume/a/b", "volume/file"]).unwrap().files, 2);
    assert_eq!(found(), ["volume", "volume/a", "volume/a/b", "volume/a/b/file", "volume/file"]);
    let error = several(&["volume/file", "volume/a/no"]).unwrap_err();
    assert!(matches!(&error, Error::NoPath { path, .. } if path.ends_with("no")), "{error}");
    assert!(!home.exists());
}

/// Something that takes a while to be backed up; what is done as soon as that has begun.
fn meanwhile(act: impl FnOnce(&Path, &AtomicBool) + Send) -> Error {
    let (_, repository) = repository();
    let bench = Bench::new();
    let path = bench.volume.join("large");
    fs::File::create(&path).unwrap().set_len(1 << 30).unwrap();
    let (counter, cancelled) = (Arc::new(Counter::default()), AtomicBool::new(false));
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            while counter.moved() == 0 {
                std::thread::yield_now();
            }
            act(&path, &cancelled);
        });
        let source = source(Uuid::new_v4(), &bench.volume);
        repository.write(source, now(), &counter, &cancelled).unwrap_err()
    });
    assert!(repository.list(None).unwrap().is_empty());
    error
}

#[test]
fn what_changes_meanwhile_is_no_backup() {
    let error = meanwhile(|path, _| {
        fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(b"x", 0).unwrap();
    });
    assert!(matches!(error, Error::Tree(denizen_archive::Error::Changed { .. })), "{error}");
    let error = meanwhile(|path, _| {
        fs::OpenOptions::new().write(true).open(path).unwrap().set_len(5).unwrap();
    });
    assert!(matches!(error, Error::Tree(denizen_archive::Error::Changed { .. })), "{error}");
}

#[test]
fn what_is_cancelled_is_no_backup() {
    let error = meanwhile(|_, cancelled| cancelled.store(true, Ordering::Relaxed));
    assert!(matches!(error, Error::Tree(denizen_archive::Error::Cancelled { .. })), "{error}");
}

#[test]
fn what_was_broken_off_is_gone_on_with() {
    const NEW: u64 = 40 << 20;
    let (files, repository) = repository();
    let bench = Bench::new();
    fs::write(bench.volume.join("a"), Random::new(1).bytes(usize::try_from(NEW).unwrap())).unwrap();
    // Takes so long to read that there is time to break it off.
    let large = bench.volume.join("b");
    fs::File::create(&large).unwrap().set_len(16 << 30).unwrap();
    let cancelled = AtomicBool::new(false);
    let session = Uuid::new_v4();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while files.list("data").unwrap().len() < 2 {
                std::thread::yield_now();
            }
            cancelled.store(true, Ordering::Relaxed);
        });
        let source = source(session, &bench.volume);
        repository.write(source, now(), &Arc::default(), &cancelled).unwrap_err()
    });
    assert!(repository.list(None).unwrap().is_empty());
    fs::remove_file(large).unwrap();
    let entry = write(&repository, session, &bench.volume).unwrap().entry;
    assert!(entry.added < NEW / 2, "{entry:?}");
    comes_back(&repository, &entry, &bench.volume);
    assert!(repository.verify(true, &Counter::default(), &NEVER).unwrap().findings.is_empty());
}

#[test]
fn an_engine_that_fails_at_once_keeps_nobody_waiting() {
    let (memory, repository) = repository();
    let bench = Bench::new();
    // More than the walk may be ahead.
    for number in 0..1000 {
        fs::write(bench.volume.join(number.to_string()), "").unwrap();
    }
    let session = Uuid::new_v4();
    write(&repository, session, &bench.volume).unwrap();
    fs::write(bench.volume.join("new"), "").unwrap();
    for at in 0..30 {
        memory.plan(Some((at, Fault::Kill)));
        let _ = write(&repository, session, &bench.volume);
    }
    memory.plan(None);
    write(&repository, session, &bench.volume).unwrap();
}

#[test]
fn the_key_is_needed() {
    let (memory, _) = repository();
    let error = Repository::open_in(memory.clone(), "wrong").unwrap_err();
    assert!(matches!(error, Error::WrongKey { .. }), "{error}");
    assert!(!error.to_string().contains("wrong"));
    // Of hosts that were killed before the repository was made, or came second.
    let other = Arc::new(Memory::default());
    Repository::open_in(other.clone(), PASSWORD).unwrap();
    let stale = other.names("keys/");
    let content = other.read(&stale[0], None).unwrap();
    for name in ["keys/0", "keys/f"] {
        let name = format!("{name}{}", &stale[0]["keys/0".len()..]);
        memory.write(&name, vec![content.clone()], false).unwrap();
    }
    memory.write("keys/00", vec!["no key".into()], false).unwrap();
    Repository::open_in(memory.clone(), PASSWORD).unwrap();
    let bench = Bench::new();
    write(&Repository::open_in(memory.clone(), PASSWORD).unwrap(), Uuid::new_v4(), &bench.volume)
        .unwrap();
    // Nobody could read these backups any more: a new repository would hide that.
    memory.lose("config");
    let error = Repository::open_in(memory.clone(), PASSWORD).unwrap_err();
    assert!(error.to_string().contains("config"), "{error}");
}

#[test]
fn many_hosts_make_one_repository_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let destination = Destination::Folder(folder.path().join("repository"));
    let bench = Bench::new();
    fs::write(bench.volume.join("file"), "same").unwrap();
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let repository = Repository::open(&destination, PASSWORD).unwrap();
                let entry = write(&repository, Uuid::new_v4(), &bench.volume).unwrap().entry;
                comes_back(&repository, &entry, &bench.volume);
            });
        }
    });
    let repository = Repository::open(&destination, PASSWORD).unwrap();
    assert_eq!(repository.list(None).unwrap().len(), 6);
    assert_eq!(fs::read_dir(folder.path().join("repository/keys")).unwrap().count(), 1);
    assert!(repository.verify(true, &Counter::default(), &NEVER).unwrap().findings.is_empty());
}

#[test]
fn a_clock_that_is_set_back_keeps_the_order() {
    let (_, repository) = repository();
    let bench = Bench::new();
    let session = Uuid::new_v4();
    let mut ids = Vec::new();
    for (number, at) in
        ["2030-01-01T00:00:00Z", "2020-01-01T00:00:00Z", "2030-01-01T00:00:00Z"].iter().enumerate()
    {
        fs::write(bench.volume.join("file"), number.to_string()).unwrap();
        let at = at.parse().unwrap();
        let source = source(session, &bench.volume);
        ids.push(repository.write(source, at, &Arc::default(), &NEVER).unwrap().entry.id);
    }
    ids.reverse();
    let listed: Vec<_> =
        repository.list(Some(session)).unwrap().into_iter().map(|it| it.id).collect();
    assert_eq!(listed, ids);
}

#[test]
fn what_is_forgotten_and_pruned_takes_no_room() {
    let (memory, repository) = repository();
    let bench = Bench::new();
    let session = Uuid::new_v4();
    fs::write(bench.volume.join("old"), Random::new(1).bytes(3 << 20)).unwrap();
    let old = write(&repository, session, &bench.volume).unwrap().entry;
    fs::remove_file(bench.volume.join("old")).unwrap();
    fs::write(bench.volume.join("new"), "new").unwrap();
    let new = write(&repository, session, &bench.volume).unwrap().entry;
    repository.forget(&[old.id]).unwrap();
    let size = || memory.files.lock().unwrap().values().map(bytes::Bytes::len).sum::<usize>();
    repository.prune().unwrap();
    repository.prune().unwrap();
    assert!(size() > 3 << 20, "a backup under way may count on it");
    repository.prune_after(std::time::Duration::ZERO).unwrap();
    assert!(size() < 1 << 20, "{}", size());
    comes_back(&repository, &new, &bench.volume);
    assert_eq!(repository.list(None).unwrap(), [new]);
}

/// What a writer has left that was killed before any index named it, or that is still at work.
fn unnamed(memory: &Memory, repository: &Repository, volume: &Path) -> (Arc<Memory>, Entry) {
    let elsewhere = memory.copy();
    let there = repository.through(elsewhere.clone());
    let entry = write(&there, Uuid::new_v4(), volume).unwrap().entry;
    for (name, content) in &*elsewhere.files.lock().unwrap() {
        if name.starts_with("data/") {
            memory.files.lock().unwrap().insert(name.clone(), content.clone());
        }
    }
    (elsewhere, entry)
}

#[test]
fn what_a_killed_writer_has_left_is_removed() {
    let (memory, repository) = repository();
    let bench = Bench::new();
    let kept = write(&repository, Uuid::new_v4(), &bench.volume).unwrap().entry;
    let before = memory.names("data/");
    assert_eq!(memory.names("index/").len(), 1, "the engine forgets its marks then");
    let other = bench.dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("file"), Random::new(1).bytes(50_000)).unwrap();
    unnamed(&memory, &repository, &other);
    let with_it = memory.names("data/");
    assert_ne!(with_it, before);
    for _ in 0..2 {
        repository.prune().unwrap();
        assert_eq!(memory.names("data/"), with_it, "another host may be at work on it");
    }
    // Another process than the one that marked it.
    let repository = repository.through(memory.clone());
    repository.prune_after(std::time::Duration::ZERO).unwrap();
    assert_eq!(memory.names("data/"), before);
    comes_back(&repository, &kept, &bench.volume);
    assert!(repository.verify(true, &Counter::default(), &NEVER).unwrap().findings.is_empty());
}

#[test]
fn what_another_host_is_writing_is_not_removed() {
    let (memory, repository) = repository();
    let bench = Bench::new();
    write(&repository, Uuid::new_v4(), &bench.volume).unwrap();
    let other = bench.dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("file"), Random::new(1).bytes(50_000)).unwrap();
    let (elsewhere, entry) = unnamed(&memory, &repository, &other);
    repository.prune().unwrap();
    // It comes to its end.
    for (name, content) in &*elsewhere.files.lock().unwrap() {
        memory.files.lock().unwrap().entry(name.clone()).or_insert_with(|| content.clone());
    }
    for _ in 0..2 {
        repository.prune_after(std::time::Duration::ZERO).unwrap();
    }
    comes_back(&repository, &entry, &other);
    assert!(repository.verify(true, &Counter::default(), &NEVER).unwrap().findings.is_empty());
}

#[test]
fn what_was_marked_and_is_needed_again_is_found() {
    let (_, repository) = repository();
    let bench = Bench::new();
    fs::write(bench.volume.join("file"), Random::new(1).bytes(50_000)).unwrap();
    let session = Uuid::new_v4();
    let old = write(&repository, session, &bench.volume).unwrap().entry;
    let [other] = [Uuid::new_v4()];
    let elsewhere = bench.dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    write(&repository, other, &elsewhere).unwrap();
    repository.forget(&[old.id]).unwrap();
    repository.prune().unwrap();
    let new = write(&repository, session, &bench.volume).unwrap().entry;
    comes_back(&repository, &new, &bench.volume);
    repository.prune_after(std::time::Duration::ZERO).unwrap();
    comes_back(&repository, &new, &bench.volume);
}

#[test]
fn a_repository_that_restic_made_is_used() {
    let bench = Bench::new();
    random_tree(&bench.volume, 12, 40);
    let place = bench.dir.path().join("repository");
    let made = std::process::Command::new("restic")
        .args(["--no-cache", "init", "--repository-version", "2", "--repo"])
        .arg(&place)
        .env("RESTIC_PASSWORD", PASSWORD)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let repository = Repository::open(&Destination::Folder(place), PASSWORD).unwrap();
    there_and_back(&repository, &bench.volume);
    repository.sweep().unwrap();
    assert!(repository.verify(true, &Counter::default(), &NEVER).unwrap().findings.is_empty());
}

#[test]
fn the_real_restic_reads_it() {
    let bench = Bench::new();
    random_tree(&bench.volume, 11, 80);
    // The one of Debian does not know yet how the format has targets that are no text.
    for name in picture(&bench.volume).into_keys() {
        let path = bench.volume.join(OsStr::from_bytes(&name));
        if fs::read_link(&path).is_ok_and(|target| target.to_str().is_none()) {
            fs::remove_file(path).unwrap();
        }
    }
    symlink("some/où", bench.volume.join("a link")).unwrap();
    let place = bench.dir.path().join("repository");
    let repository = Repository::open(&Destination::Folder(place.clone()), PASSWORD).unwrap();
    let session = Uuid::new_v4();
    write(&repository, session, &bench.volume).unwrap();
    fs::write(bench.volume.join("more"), "more").unwrap();
    let entry = write(&repository, session, &bench.volume).unwrap().entry;
    write(&repository, session, &bench.volume).unwrap();
    let restic = |arguments: &[&str]| {
        let output = std::process::Command::new("restic")
            .args(["--no-cache", "--repo"])
            .arg(&place)
            .args(arguments)
            .env("RESTIC_PASSWORD", PASSWORD)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        text
    };
    let snapshots = restic(&["snapshots", "--json", "--tag", &format!("denizen,{session}")]);
    assert_eq!(snapshots.matches("\"short_id\"").count(), 3, "{snapshots}");
    assert!(snapshots.contains(&entry.id));
    restic(&["check", "--read-data"]);
    let into = bench.dir.path().join("into");
    restic(&["restore", &entry.id, "--target", into.to_str().unwrap()]);
    // It knows nothing of holes, and has its own mind about the times of links.
    let files = |root: &Path| {
        let mut found = std::collections::BTreeMap::new();
        for name in picture(root).into_keys() {
            let path = root.join(OsStr::from_bytes(&name));
            let meta = fs::symlink_metadata(&path).unwrap();
            let content = if meta.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            let link = fs::read_link(&path).ok();
            found.insert(name, (meta.mode(), meta.uid(), meta.gid(), content, link));
        }
        found
    };
    if is_root() {
        assert!(files(&bench.volume) == files(&into.join("volume")), "they differ");
    }
}
