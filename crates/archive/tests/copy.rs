//! Copies are what archives would have brought back; and share their blocks where that can be.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use denizen_archive::{Aspect, Copied, Error, Reason, copy, diff};
use rustix::fs::{CWD, FileType, Mode};

use crate::support::*;

/// A file system in a file, where this user may mount one.
struct Loop {
    folder: tempfile::TempDir,
}

impl Loop {
    fn new(kind: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        // The least that mkfs.xfs takes.
        File::create(&image).unwrap().set_len(400 << 20).unwrap();
        let made = Command::new(format!("mkfs.{kind}")).arg("-q").arg(&image).status();
        let made = made.is_ok_and(|status| status.success());
        let this = Self { folder };
        fs::create_dir(this.root()).unwrap();
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-o", "loop"]).arg(image).arg(this.root()).status();
        if made && mounted.is_ok_and(|status| status.success()) {
            return Some(this);
        }
        println!("skipped: no {kind} can be mounted here");
        None
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    /// Bytes that are free when everything is on disk.
    fn free(&self) -> u64 {
        rustix::fs::syncfs(File::open(self.root()).unwrap()).unwrap();
        let stat = rustix::fs::statvfs(&self.root()).unwrap();
        stat.f_bfree * stat.f_frsize
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Command::new("umount").arg(self.root()).status().unwrap();
    }
}

fn copied(tree: &Path, into: &Path) -> Copied {
    let copied = copy(tree, into, &NEVER).unwrap();
    assert!(copied.warnings.is_empty() && copied.more_warnings == 0, "{copied:?}");
    copied
}

#[test]
fn random_trees_are_copied_entirely() {
    for seed in 0..12 {
        println!("seed {seed}");
        let bench = Bench::new();
        random_tree(&bench.volume, seed, 120);
        let before = picture(&bench.volume);
        copied(&bench.volume, &bench.into);
        assert_eq!(before, picture(&bench.volume), "the tree was changed");
        compare(&bench.volume, &bench.into);
    }
}

/// What random trees do not have.
fn special(at: impl Fn(&str) -> PathBuf) {
    fs::write(at("file"), "x").unwrap();
    xattr::set(at("file"), "user.nothing", b"").unwrap();
    let big = File::create(at("big")).unwrap();
    big.set_len(9 << 30).unwrap();
    big.write_all_at(b"far out", (9 << 30) - 7).unwrap();
    big.write_all_at(b"middle", 5 << 30).unwrap();
    symlink("../../..", at("up")).unwrap();
    symlink("nowhere", at("dangling")).unwrap();
    fs::hard_link(at("dangling"), at("dangling again")).unwrap();
    fs::create_dir(at("empty")).unwrap();
    if is_root() {
        let mut capability = vec![1, 0, 0, 2];
        capability.extend([0x20, 0, 0, 0].iter().chain(&[0; 12]));
        std::os::unix::fs::chown(at("file"), Some(1000), Some(1000)).unwrap();
        xattr::set(at("file"), "security.capability", &capability).unwrap();
        xattr::set(at("empty"), "trusted.overlay.opaque", b"y").unwrap();
    }
    rustix::fs::mknodat(CWD, at("deleted"), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
}

#[test]
fn special_attributes_and_files_are_copied() {
    let bench = Bench::new();
    special(|name| bench.volume.join(name));
    copied(&bench.volume, &bench.into);
    compare(&bench.volume, &bench.into);
    assert!(fs::metadata(bench.into.join("big")).unwrap().blocks() < 1000);
}

#[test]
fn what_is_left_out_is_told() {
    let bench = Bench::new();
    let _listener = UnixListener::bind(bench.volume.join("socket")).unwrap();
    let copied = copied(&bench.volume, &bench.into);
    assert_eq!(copied.skipped.len(), 1);
    assert_eq!(copied.skipped[0].reason, Reason::Socket);
    assert_eq!(fs::read_dir(&bench.into).unwrap().count(), 0);
}

#[test]
fn a_copy_shares_its_blocks_and_not_its_changes() {
    for kind in ["btrfs", "xfs"] {
        let Some(disk) = Loop::new(kind) else { continue };
        let (tree, into) = (disk.root().join("tree"), disk.root().join("into"));
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("large"), Random::new(1).bytes(64 << 20)).unwrap();
        special(|name| tree.join(name));
        let before = disk.free();
        let copied = copied(&tree, &into);
        assert_eq!(copied.files, copied.shared, "{kind}");
        let used = before.saturating_sub(disk.free());
        assert!(used < 8 << 20, "{kind}: a copy of 64 MiB takes {used} bytes");
        compare(&tree, &into);
        let changed = File::options().write(true).open(into.join("large")).unwrap();
        changed.write_all_at(b"changed", 1 << 20).unwrap();
        let original = File::open(tree.join("large")).unwrap();
        let mut read = [0; 7];
        original.read_exact_at(&mut read, 1 << 20).unwrap();
        assert_ne!(&read, b"changed", "{kind}");
    }
}

#[test]
fn a_copy_goes_to_another_file_system() {
    let Some(disk) = Loop::new("xfs") else { return };
    let bench = Bench::new();
    special(|name| bench.volume.join(name));
    let into = disk.root().join("into");
    assert_eq!(copied(&bench.volume, &into).shared, 0);
    compare(&bench.volume, &into);
}

#[test]
fn a_copy_that_fails_leaves_nothing() {
    let bench = Bench::new();
    random_tree(&bench.volume, 5, 60);
    let error = copy(&bench.volume, &bench.into, &AtomicBool::new(true)).unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    assert!(!bench.into.exists());
    let Some(disk) = Loop::new("xfs") else { return };
    let bench = Bench::new();
    special(|name| bench.volume.join(name));
    fs::write(bench.volume.join("large"), vec![7; 500 << 20]).unwrap();
    let error = copy(&bench.volume, &disk.root().join("into"), &NEVER).unwrap_err();
    assert!(matches!(error, Error::NoSpace { .. }), "{error}");
    assert_eq!(fs::read_dir(disk.root()).unwrap().count(), 0);
}

#[test]
fn a_tree_that_changes_meanwhile_is_told() {
    let bench = Bench::new();
    for number in 0..200 {
        fs::write(bench.volume.join(number.to_string()), vec![1; 100_000]).unwrap();
    }
    let stop = AtomicBool::new(false);
    let last = bench.volume.join("zz");
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                fs::write(&last, "x").unwrap();
                fs::remove_file(&last).unwrap();
            }
        });
        let error = copy(&bench.volume, &bench.into, &NEVER).unwrap_err();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        error
    });
    assert!(matches!(error, Error::Changed { .. }), "{error}");
    assert!(!bench.into.exists());
}

#[test]
fn copies_differ_in_what_was_changed() {
    let bench = Bench::new();
    random_tree(&bench.volume, 7, 120);
    special(|name| bench.volume.join(name));
    copied(&bench.volume, &bench.into);
    let found = || diff(Some(&bench.volume), Some(&bench.into), &NEVER).unwrap();
    assert_eq!(found(), []);
    let at = |name: &str| bench.into.join(name);
    fs::remove_file(at("up")).unwrap();
    fs::create_dir(at("up")).unwrap();
    xattr::set(at("big"), "user.more", b"more").unwrap();
    fs::remove_file(at("dangling again")).unwrap();
    // As large as before.
    fs::write(at("file"), "y").unwrap();
    let shown = found().into_iter().map(|one| (one.path, one.after.is_some(), one.aspects));
    let shown: Vec<_> = shown.filter(|(path, ..)| path != Path::new("")).collect();
    let mut expected = vec![
        ("big", true, vec![Aspect::Attributes]),
        ("dangling again", false, vec![]),
        ("file", true, vec![Aspect::Content]),
        ("up", true, vec![Aspect::Kind, Aspect::Mode]),
    ];
    if is_root() {
        // Writing takes capabilities away.
        expected[2].2.push(Aspect::Attributes);
    }
    let expected: Vec<_> =
        expected.into_iter().map(|(path, after, what)| (path.into(), after, what)).collect();
    assert_eq!(shown, expected);
    let all = diff(None, Some(&bench.volume), &NEVER).unwrap();
    assert!(all.len() > 100 && all.iter().all(|one| one.before.is_none()));
}
