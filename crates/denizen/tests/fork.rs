//! Forks and snapshots: of what runs, of what does not, and of what is not there.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command as Program;
use std::sync::Arc;
use std::time::Duration;

use denizen::{
    Builder, Error, EventKind, Isolation, MicroVmManager, SnapshotName, Version,
    VmPoolRuntimeConfig,
};
use tempfile::TempDir;
use uuid::Uuid;

use crate::common::{config, isolated, text};

over! { host: Host, sandbox: Sandbox, microvm: MicroVm; {
    snapshots_are_kept_listed_restored_forked_and_removed,
    what_differs_is_listed,
    forks_and_snapshots_share_their_blocks,
} }

struct World {
    folder: TempDir,
    config: VmPoolRuntimeConfig,
    isolation: Isolation,
}

impl World {
    fn new(isolation: Isolation) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        Self { folder, config: (&config).into(), isolation }
    }

    fn with_backups(isolation: Isolation) -> Self {
        let mut world = Self::new(isolation);
        world.config.backup_destination = Some(world.folder.path().join("backups"));
        world
    }

    fn open(&self) -> Arc<MicroVmManager> {
        self.builder().build().unwrap()
    }

    fn builder(&self) -> Builder {
        isolated(MicroVmManager::builder(self.config.clone()), self.isolation)
    }

    fn own(&self, folder: &str) -> PathBuf {
        self.config.volume_root.join(".denizen").join(folder)
    }

    fn entries(&self, folder: &str) -> usize {
        fs::read_dir(self.own(folder)).map_or(0, Iterator::count)
    }

    /// Waits until nothing is left half-made.
    async fn clear(&self) {
        until("the staging folder is empty", || self.entries("staging") == 0).await;
    }
}

/// What other threads do has no event to wait for.
async fn until(what: &str, condition: impl Fn() -> bool) {
    let begin = std::time::Instant::now();
    while !condition() {
        assert!(begin.elapsed() < Duration::from_secs(30), "waited in vain until {what}");
        tokio::task::yield_now().await;
    }
}

fn name(name: &str) -> SnapshotName {
    name.parse().unwrap()
}

async fn run(pool: &MicroVmManager, id: Uuid, line: &str) -> String {
    text(&pool.acquire(id).await.unwrap(), line).await
}

/// Writes a number to two files, one after the other, for ever.
const LOCKSTEP: &str = "echo 0 > a; echo 0 > b; i=0; while :; do i=$((i+1)); \
                        echo $i > new; mv new a; echo $i > new; mv new b; done";

/// How far the second file is behind, and the first's number.
async fn steps(pool: &MicroVmManager, id: Uuid) -> (i64, i64) {
    let numbers = run(pool, id, "cat a b").await;
    let numbers: Vec<i64> = numbers.split_whitespace().map(|it| it.parse().unwrap()).collect();
    assert_eq!(numbers.len(), 2, "{numbers:?}");
    (numbers[0] - numbers[1], numbers[0])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fork_of_what_writes_is_of_one_instant() {
    let world = World::new(Isolation::Sandbox);
    let pool = world.open();
    if !pool.can_freeze().unwrap() {
        println!("skipped: no control group that can be frozen is granted");
        return;
    }
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    // So that the files are copied well apart.
    text(&guard, "mkdir aa; for i in $(seq 500); do echo $i > aa/$i; done").await;
    let writing = guard.command(LOCKSTEP).spawn().await.unwrap();
    let volume = guard.volume().to_owned();
    let number = || fs::read_to_string(volume.join("a")).unwrap_or_default();
    // Both files are there then.
    until("it writes", || number().trim().parse().is_ok_and(|it: u64| it > 0)).await;
    let mut last = -1;
    for _ in 0..5 {
        let before = number();
        let fork = pool.fork(id).await.unwrap();
        let (behind, reached) = steps(&pool, fork).await;
        assert!(behind == 0 || behind == 1, "{behind} behind at {reached}");
        assert!(reached > last, "it does not go on");
        last = reached;
        until("it goes on", || number() != before).await;
        pool.remove(fork).await.unwrap();
    }
    // Whoever holds it holds it still, and it is nothing but in use.
    assert_eq!(pool.inspect(id).unwrap().state, "active");
    assert!(matches!(pool.stop(id, true).await, Err(Error::InUse { .. })));
    drop(writing);
    assert_eq!(text(&guard, "echo well").await, "well\n");
    drop(guard);
    world.clear().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_in_the_background_goes_on_while_it_is_copied() {
    let world = World::new(Isolation::Sandbox);
    let pool = world.open();
    if !pool.can_freeze().unwrap() {
        println!("skipped: no control group that can be frozen is granted");
        return;
    }
    let id = Uuid::new_v4();
    run(&pool, id, &format!("({LOCKSTEP}) > /dev/null 2>&1 &")).await;
    let volume = pool.session_folder(id).unwrap().join("volume");
    let number = || fs::read_to_string(volume.join("a")).unwrap_or_default();
    // Both files are there then.
    until("it writes", || number().trim().parse().is_ok_and(|it: u64| it > 0)).await;
    pool.snapshot(id, &name("while-it-runs")).await.unwrap();
    let before = number();
    until("it goes on", || number() != before).await;
    let fork = pool.fork_snapshot(id, &name("while-it-runs")).await.unwrap();
    let (behind, _) = steps(&pool, fork).await;
    assert!(behind == 0 || behind == 1, "{behind} behind");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_stand_still_is_copied_when_nothing_runs_in_it() {
    let world = World::new(Isolation::Host);
    let pool = world.open();
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    text(&guard, "echo held > file").await;
    let fork = {
        let pool = pool.clone();
        tokio::spawn(async move { pool.fork(id).await })
    };
    until("it waits", || pool.inspect(id).unwrap().waiting == 1).await;
    text(&guard, "echo last > file; setsid sleep 9371 > /dev/null 2>&1 &").await;
    drop(guard);
    let error = fork.await.unwrap().unwrap_err();
    assert!(matches!(error.kind(), Error::InUse { .. }), "{error}");
    pool.stop(id, true).await.unwrap();
    let fork = pool.fork(id).await.unwrap();
    assert_eq!(run(&pool, fork, "cat file").await, "last\n");
    world.clear().await;
}

async fn snapshots_are_kept_listed_restored_forked_and_removed(isolation: Isolation) {
    let world = World::new(isolation);
    let pool = world.open();
    let mut events = pool.events().unwrap();
    let id = Uuid::new_v4();
    let change = match isolation {
        Isolation::Host => "",
        _ => "; echo changed > /etc/denizen-test; rm -f /etc/motd",
    };
    run(&pool, id, &format!("mkdir -p deep; echo one > deep/file; ln -s x link{change}")).await;
    pool.snapshot(id, &name("first")).await.unwrap();
    let error = pool.snapshot(id, &name("first")).await.unwrap_err();
    assert!(matches!(error, Error::SnapshotExists { .. }), "{error}");
    run(&pool, id, "echo two > deep/file; touch more").await;
    pool.snapshot(id, &name("second")).await.unwrap();
    drop(pool);
    // As another process would find them.
    let pool = loop {
        match world.builder().build() {
            Ok(pool) => break pool,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    let names = async |pool: &MicroVmManager| {
        let all = pool.snapshots(id).await.unwrap().into_iter();
        all.map(|one| one.name.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(names(&pool).await, ["second", "first"]);
    let fork = pool.fork_snapshot(id, &name("first")).await.unwrap();
    assert_eq!(run(&pool, fork, "cat deep/file; ls").await, "one\ndeep\nlink\n");
    pool.restore_snapshot(id, &name("first")).await.unwrap();
    assert_eq!(run(&pool, id, "cat deep/file; ls").await, "one\ndeep\nlink\n");
    if isolation != Isolation::Host {
        for session in [id, fork] {
            let line = "cat /etc/denizen-test; test ! -e /etc/motd";
            assert_eq!(run(&pool, session, line).await, "changed\n");
        }
    }
    run(&pool, id, "echo three > deep/file").await;
    pool.restore_snapshot(id, &name("second")).await.unwrap();
    assert_eq!(run(&pool, id, "cat deep/file; ls").await, "two\ndeep\nlink\nmore\n");
    assert!(pool.remove_snapshot(id, &name("first")).await.unwrap());
    assert!(!pool.remove_snapshot(id, &name("first")).await.unwrap());
    assert_eq!(names(&pool).await, ["second"]);
    for error in [
        pool.restore_snapshot(id, &name("first")).await.unwrap_err(),
        pool.fork_snapshot(id, &name("first")).await.unwrap_err(),
    ] {
        assert!(matches!(error, Error::NoSnapshot { .. }), "{error}");
    }
    let error = pool.snapshot(Uuid::new_v4(), &name("first")).await.unwrap_err();
    assert!(matches!(error, Error::Unknown { .. }), "{error}");
    pool.remove(id).await.unwrap();
    assert_eq!(world.entries("snapshots"), 0, "they go with their session");
    world.clear().await;
    let taken = loop {
        if let EventKind::SnapshotTaken { snapshot } = events.next().await.unwrap().kind {
            break snapshot;
        }
    };
    assert_eq!(taken, "first");
    pool.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn archived_sessions_have_their_snapshots_and_can_be_forked() {
    let mut world = World::with_backups(Isolation::Host);
    world.config.max_vms = 2;
    let pool = world.open();
    let id = Uuid::new_v4();
    run(&pool, id, "echo kept > file").await;
    pool.snapshot(id, &name("kept")).await.unwrap();
    run(&pool, id, "echo later > file").await;
    // Sent away to make room.
    for _ in 0..2 {
        run(&pool, Uuid::new_v4(), "echo other > file").await;
    }
    assert_eq!(pool.inspect(id).unwrap().state, "archived");
    let fork = pool.fork_snapshot(id, &name("kept")).await.unwrap();
    assert_eq!(run(&pool, fork, "cat file").await, "kept\n");
    pool.restore_snapshot(id, &name("kept")).await.unwrap_err();
    pool.remove(fork).await.unwrap();
    pool.restore_snapshot(id, &name("kept")).await.unwrap();
    // What is put back is in no backup, so it must be saved before it goes.
    assert!(pool.inspect(id).unwrap().unsaved);
    for _ in 0..2 {
        run(&pool, Uuid::new_v4(), "echo other > file").await;
    }
    assert_eq!(pool.inspect(id).unwrap().state, "archived");
    let fork = pool.fork(id).await.unwrap();
    assert_eq!(run(&pool, fork, "cat file").await, "kept\n");
    assert_eq!(run(&pool, id, "cat file").await, "kept\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_or_is_given_up_leaves_nothing() {
    let mut world = World::new(Isolation::Host);
    world.config.max_vms = 1;
    let pool = world.open();
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    text(&guard, "mkdir d; for i in $(seq 200); do echo $i > d/$i; done").await;
    let waiting = {
        let pool = pool.clone();
        tokio::spawn(async move { pool.snapshot(id, &name("given-up")).await })
    };
    until("it waits", || pool.inspect(id).unwrap().waiting == 1).await;
    waiting.abort();
    until("it has left", || pool.inspect(id).unwrap().waiting == 0).await;
    drop(guard);
    let error = pool.fork(id).await.unwrap_err();
    assert!(matches!(error.kind(), Error::AtCapacity { .. }), "{error}");
    world.clear().await;
    assert!(pool.snapshots(id).await.unwrap().is_empty());
    // A crash at half of it.
    let half = world.own("staging").join("half");
    fs::create_dir_all(half.join("volume")).unwrap();
    fs::write(half.join("volume/file"), "").unwrap();
    pool.shutdown().await.unwrap();
    drop(pool);
    let pool = loop {
        match MicroVmManager::new(world.config.clone()) {
            Ok(pool) => break pool,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    world.clear().await;
    assert!(pool.snapshots(id).await.unwrap().is_empty());
    assert_eq!(pool.sessions().unwrap().len(), 1);
}

async fn what_differs_is_listed(isolation: Isolation) {
    let world = World::new(isolation);
    let pool = world.open();
    let id = Uuid::new_v4();
    let line = "echo same > same; echo one > file; echo old > gone; touch mode; mkdir d; \
                ln -s x link; touch -d 2020-01-01 same";
    run(&pool, id, line).await;
    pool.snapshot(id, &name("before")).await.unwrap();
    let root = match isolation {
        Isolation::Host => "",
        _ => "; echo new > /etc/denizen-test",
    };
    // As large as before; and what has another time only is no difference.
    let line = "echo two > file; rm gone; chmod 600 mode; echo new > d/new; ln -sf y link; \
                touch same";
    run(&pool, id, &format!("{line}{root}")).await;
    let now = Version { session: id, snapshot: None };
    let before = Version { snapshot: Some(name("before")), ..now.clone() };
    let all = pool.diff(before.clone(), now.clone()).await.unwrap();
    let shown = |one: &denizen::Difference| {
        let aspects: Vec<_> = one.aspects.iter().map(|aspect| aspect.name()).collect();
        let sides = (one.before.is_some(), one.after.is_some());
        (one.path.to_str().unwrap().to_owned(), sides, aspects.join(","))
    };
    let of = |tree| all.iter().filter(move |one| one.tree == tree).map(shown);
    let expected: &[_] = match isolation {
        // What is on it, its own kernel knows.
        Isolation::MicroVm => &[(".denizen-disk", (true, true), "content")],
        _ => &[
            ("d/new", (false, true), ""),
            ("file", (true, true), "content"),
            ("gone", (true, false), ""),
            ("link", (true, true), "content"),
            ("mode", (true, true), "mode"),
        ],
    };
    let expected =
        expected.iter().map(|(path, sides, what)| ((*path).into(), *sides, (*what).into()));
    assert_eq!(of("volume").collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    if isolation == Isolation::Sandbox {
        let root: Vec<_> = of("root").map(|(path, ..)| path).collect();
        assert!(root.contains(&"main/etc/denizen-test".to_owned()), "{root:?}");
    }
    assert_eq!(pool.diff(now.clone(), before).await.unwrap().len(), all.len());
    let fork = Version { session: pool.fork(id).await.unwrap(), snapshot: None };
    match isolation {
        // It has begun to run, which a disk shows.
        Isolation::MicroVm => {}
        _ => assert_eq!(pool.diff(now, fork).await.unwrap(), []),
    }
    world.clear().await;
    pool.shutdown().await.unwrap();
}

/// A file system in a file, where this user may mount one.
struct Loop(TempDir);

impl Loop {
    fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let (image, root) = (folder.path().join("image"), folder.path().join("root"));
        fs::File::create(&image).unwrap().set_len(600 << 20).unwrap();
        fs::create_dir(&root).unwrap();
        let does = |program: &mut Program| program.status().is_ok_and(|status| status.success());
        let made = does(Program::new("mkfs.btrfs").arg("-q").arg(&image))
            && does(Program::new("mount").args(["-o", "loop"]).args([&image, &root]));
        if !made {
            println!("skipped: no btrfs can be mounted here");
        }
        made.then_some(Self(folder))
    }

    fn root(&self) -> PathBuf {
        self.0.path().join("root")
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Program::new("umount").arg("-l").arg(self.root()).status().unwrap();
    }
}

fn free(path: &Path) -> u64 {
    rustix::fs::syncfs(fs::File::open(path).unwrap()).unwrap();
    let stat = rustix::fs::statvfs(path).unwrap();
    stat.f_bfree * stat.f_frsize
}

async fn forks_and_snapshots_share_their_blocks(isolation: Isolation) {
    let Some(disk) = Loop::new() else { return };
    let mut world = World::new(isolation);
    world.config.volume_root = disk.root().join("pool");
    let pool = world.open();
    let id = Uuid::new_v4();
    let more = match isolation {
        Isolation::Host => "",
        _ => "; head -c 32M /dev/urandom > /usr/large",
    };
    run(&pool, id, &format!("head -c 64M /dev/urandom > large{more}")).await;
    let before = free(&disk.root());
    let fork = pool.fork(id).await.unwrap();
    pool.snapshot(id, &name("shared")).await.unwrap();
    let used = before.saturating_sub(free(&disk.root()));
    assert!(used < 16 << 20, "{used} bytes for two copies");
    let line = "sha256sum < large; test ! -e /volume || sha256sum < /usr/large";
    assert_eq!(run(&pool, id, line).await, run(&pool, fork, line).await);
    pool.shutdown().await.unwrap();
}
