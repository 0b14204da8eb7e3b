//! The faults of the file the library began with, one test each, at the public door.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use denizen::{Clock, Error, EventKind, MicroVmManager, VmPoolConfig, VmPoolRuntimeConfig};
use parking_lot::Mutex;
use tempfile::TempDir;
use uuid::Uuid;

use crate::common::opened;

/// A clock that stands still until it is moved.
#[derive(Debug)]
struct Manual {
    wall: Mutex<SystemTime>,
    uptime: Mutex<Duration>,
}

impl Manual {
    fn new() -> Arc<Self> {
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        Arc::new(Self { wall: Mutex::new(wall), uptime: Mutex::new(Duration::from_secs(1000)) })
    }

    /// Lets time pass.
    fn pass(&self, time: Duration) {
        *self.wall.lock() += time;
        *self.uptime.lock() += time;
    }
}

impl Clock for Manual {
    fn wall(&self) -> SystemTime {
        *self.wall.lock()
    }
    fn uptime(&self) -> Duration {
        *self.uptime.lock()
    }
    fn boot(&self) -> String {
        "the same".to_owned()
    }
}

const IDLE: Duration = Duration::from_secs(60);
const BACKUP: Duration = Duration::from_secs(100);
const PRUNE: Duration = Duration::from_secs(200);

struct World {
    folder: TempDir,
    clock: Arc<Manual>,
    config: VmPoolRuntimeConfig,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = VmPoolConfig {
            enabled: true,
            volume_root: folder.path().join("pool"),
            shell: PathBuf::from("/bin/sh"),
            shell_args: vec!["-c".to_owned()],
            max_vms: 4,
            idle_shutdown_seconds: IDLE.as_secs(),
            prune_after_seconds: PRUNE.as_secs(),
            ..VmPoolConfig::default()
        };
        Self { folder, clock: Manual::new(), config: (&config).into() }
    }

    fn with_backups() -> Self {
        let mut world = Self::new();
        world.config.backup_after = Some(BACKUP);
        world.config.backup_destination = Some(world.destination());
        world
    }

    fn destination(&self) -> PathBuf {
        self.folder.path().join("backups")
    }

    fn open(&self) -> Arc<MicroVmManager> {
        MicroVmManager::builder(self.config.clone()).clock(self.clock.clone()).build().unwrap()
    }

    fn backups(&self) -> usize {
        let all = std::fs::read_dir(self.destination()).into_iter().flatten().flatten();
        all.filter(|entry| entry.path().extension().is_some_and(|it| it == "zst")).count()
    }

    async fn pass(&self, pool: &MicroVmManager, time: Duration) {
        self.clock.pass(time);
        pool.run_maintenance_now().await.unwrap();
    }
}

async fn write(pool: &MicroVmManager, id: Uuid, text: &str) -> PathBuf {
    let guard = pool.acquire(id).await.unwrap();
    std::fs::write(guard.workdir().join("file"), text).unwrap();
    guard.workdir().to_owned()
}

async fn read(pool: &MicroVmManager, id: Uuid) -> String {
    let guard = pool.acquire(id).await.unwrap();
    std::fs::read_to_string(guard.workdir().join("file")).unwrap_or_default()
}

fn state(pool: &MicroVmManager, id: Uuid) -> &'static str {
    pool.inspect(id).unwrap().state
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn capacity_holds_against_64_concurrent_callers() {
    let world = World::new();
    let pool = world.open();
    let callers = (0..64).map(|_| {
        let pool = pool.clone();
        tokio::spawn(async move { pool.acquire(Uuid::new_v4()).await })
    });
    let callers: Vec<_> = callers.collect();
    let mut guards = Vec::new();
    for caller in callers {
        match caller.await.unwrap() {
            Ok(guard) => guards.push(guard),
            Err(error) => assert!(error.to_string().contains("at capacity"), "{error}"),
        }
    }
    assert_eq!(guards.len(), 4);
    let folders = std::fs::read_dir(&world.config.volume_root).unwrap().count();
    assert_eq!(folders, 4 + 1, "four sessions and denizen's own folder");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn bootstrap_runs_once_under_8_concurrent_acquires() {
    let mut world = World::new();
    let command = ["sh", "-c", "echo run >> bootstraps"];
    world.config.bootstrap_command = Some(command.map(str::to_owned).to_vec());
    let pool = world.open();
    let id = Uuid::new_v4();
    let callers: Vec<_> = (0..8)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { pool.acquire(id).await.map(drop) })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap().unwrap();
    }
    let guard = pool.acquire(id).await.unwrap();
    let runs = std::fs::read_to_string(guard.workdir().join("bootstraps")).unwrap();
    assert_eq!(runs, "run\n");
}

#[tokio::test]
async fn nothing_is_pruned_while_a_guard_is_held() {
    let world = World::new();
    let pool = world.open();
    let guard = pool.acquire(Uuid::new_v4()).await.unwrap();
    for _ in 0..3 {
        world.pass(&pool, 10 * PRUNE).await;
    }
    assert!(guard.workdir().is_dir());
}

#[tokio::test]
async fn every_period_of_work_is_backed_up() {
    let world = World::with_backups();
    let pool = world.open();
    let id = Uuid::new_v4();
    for period in 1..=3 {
        write(&pool, id, &format!("period {period}")).await;
        world.pass(&pool, IDLE).await;
        world.pass(&pool, BACKUP).await;
        assert_eq!(world.backups(), period);
        assert!(!pool.inspect(id).unwrap().unsaved);
    }
    world.pass(&pool, PRUNE).await;
    assert_eq!(state(&pool, id), "archived");
    assert_eq!(world.backups(), 3);
    assert_eq!(read(&pool, id).await, "period 3");
}

#[tokio::test]
async fn a_failed_backup_keeps_the_volume_and_is_tried_again() {
    let world = World::with_backups();
    let pool = world.open();
    let mut events = pool.events().unwrap();
    let id = Uuid::new_v4();
    let volume = write(&pool, id, "precious").await;
    // Where the folder should be is a file.
    std::fs::write(world.destination(), "").unwrap();
    world.pass(&pool, IDLE).await;
    for _ in 0..3 {
        world.pass(&pool, 2 * PRUNE).await;
    }
    assert_eq!(std::fs::read_to_string(volume.join("file")).unwrap(), "precious");
    let info = pool.inspect(id).unwrap();
    assert!(info.unsaved && info.failures >= 3, "{info:?}");
    assert!(info.last_failure.unwrap().contains("backups"));
    let failed = async {
        loop {
            let kind = events.next().await.unwrap().kind;
            if matches!(kind, EventKind::Failed { operation: "backup", .. }) {
                break;
            }
        }
    };
    failed.await;
    std::fs::remove_file(world.destination()).unwrap();
    world.pass(&pool, PRUNE).await;
    assert_eq!(state(&pool, id), "archived");
    assert_eq!(read(&pool, id).await, "precious");
}

#[tokio::test]
async fn eviction_saves_first() {
    let mut world = World::with_backups();
    world.config.max_vms = 1;
    let pool = world.open();
    let (first, second) = (Uuid::new_v4(), Uuid::new_v4());
    write(&pool, first, "first").await;
    world.pass(&pool, IDLE).await;
    write(&pool, second, "second").await;
    assert_eq!(state(&pool, first), "archived");
    assert_eq!(read(&pool, first).await, "first");
    assert_eq!(read(&pool, second).await, "second");
}

#[tokio::test]
async fn eviction_that_cannot_save_does_not_happen() {
    let mut world = World::with_backups();
    world.config.max_vms = 1;
    let pool = world.open();
    let first = Uuid::new_v4();
    let volume = write(&pool, first, "first").await;
    std::fs::write(world.destination(), "").unwrap();
    world.pass(&pool, IDLE).await;
    let error = pool.acquire(Uuid::new_v4()).await.unwrap_err();
    assert!(error.to_string().contains("at capacity"), "{error}");
    assert_eq!(std::fs::read_to_string(volume.join("file")).unwrap(), "first");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_never_runs_in_a_removed_folder() {
    let world = World::new();
    let pool = world.open();
    let id = Uuid::new_v4();
    for _ in 0..20 {
        write(&pool, id, "here").await;
        world.pass(&pool, IDLE).await;
        // Pruning and acquiring race.
        world.clock.pass(PRUNE);
        let maintenance = {
            let pool = pool.clone();
            tokio::spawn(async move { pool.run_maintenance_now().await })
        };
        let guard = pool.acquire(id).await.unwrap();
        maintenance.await.unwrap().unwrap();
        assert!(guard.workdir().is_dir());
        let output = guard.command("pwd").output().await.unwrap();
        assert!(output.exit.success(), "{output:?}");
    }
}

#[tokio::test]
async fn a_failed_bootstrap_leaves_nothing_and_keeps_its_output() {
    let mut world = World::new();
    let flag = world.folder.path().join("works-now");
    let script = format!("echo half > half; echo what went wrong >&2; test -e {}", flag.display());
    world.config.bootstrap_command = Some(vec!["sh".to_owned(), "-c".to_owned(), script]);
    let pool = world.open();
    let id = Uuid::new_v4();
    let error = pool.acquire(id).await.unwrap_err();
    assert!(matches!(error.kind(), Error::Bootstrap { .. }), "{error:?}");
    assert!(error.to_string().contains("what went wrong"), "{error}");
    assert!(!pool.session_folder(id).unwrap().exists());
    assert!(pool.sessions().unwrap().is_empty());
    std::fs::write(&flag, "").unwrap();
    pool.acquire(id).await.unwrap();
    assert!(pool.session_folder(id).unwrap().join("volume/half").exists());
}

#[tokio::test]
async fn sessions_survive_a_restart() {
    let world = World::with_backups();
    let (kept, archived) = (Uuid::new_v4(), Uuid::new_v4());
    let pool = world.open();
    write(&pool, archived, "archived").await;
    world.pass(&pool, IDLE).await;
    world.pass(&pool, PRUNE).await;
    write(&pool, kept, "kept").await;
    // Dropped, not shut down: as close to a crash as one process comes.
    drop(pool);
    let pool = reopened(&world).await;
    assert_eq!(state(&pool, archived), "archived");
    assert_eq!(state(&pool, kept), "stopped");
    assert!(pool.inspect(kept).unwrap().unsaved);
    assert_eq!(read(&pool, kept).await, "kept");
    assert_eq!(read(&pool, archived).await, "archived");
}

/// Opens the pool again once the last task of the one before has let go of its lock.
async fn reopened(world: &World) -> Arc<MicroVmManager> {
    opened(|| MicroVmManager::builder(world.config.clone()).clock(world.clock.clone())).await
}

#[tokio::test]
async fn an_orphan_volume_is_taken_in() {
    let world = World::new();
    let id = Uuid::new_v4();
    let volume = world.config.volume_root.join(id.to_string()).join("volume");
    std::fs::create_dir_all(&volume).unwrap();
    std::fs::write(volume.join("file"), "found").unwrap();
    let pool = world.open();
    assert_eq!(state(&pool, id), "stopped");
    assert_eq!(read(&pool, id).await, "found");
}

#[tokio::test]
async fn time_goes_on_across_restarts() {
    let world = World::with_backups();
    let id = Uuid::new_v4();
    let pool = world.open();
    write(&pool, id, "old").await;
    world.pass(&pool, IDLE).await;
    assert_eq!(state(&pool, id), "stopped");
    pool.shutdown().await.unwrap();
    drop(pool);
    world.clock.pass(PRUNE);
    let pool = reopened(&world).await;
    pool.run_maintenance_now().await.unwrap();
    assert_eq!(state(&pool, id), "archived");
    assert_eq!(read(&pool, id).await, "old");
}

#[tokio::test]
async fn a_wall_clock_that_jumps_a_year_prunes_nothing() {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    let world = World::new();
    let pool = world.open();
    let id = Uuid::new_v4();
    let volume = write(&pool, id, "kept").await;
    world.pass(&pool, IDLE).await;
    *world.clock.wall.lock() += YEAR;
    pool.run_maintenance_now().await.unwrap();
    *world.clock.wall.lock() -= 2 * YEAR;
    pool.run_maintenance_now().await.unwrap();
    assert!(volume.join("file").exists());
    world.pass(&pool, PRUNE).await;
    assert!(!Path::exists(&volume), "and it is not stuck either");
}

#[tokio::test]
async fn shutdown_waits_for_the_last_guard_and_no_longer() {
    let world = World::new();
    let pool = world.open();
    let guard = pool.acquire(Uuid::new_v4()).await.unwrap();
    let shutdown = {
        let pool = pool.clone();
        tokio::spawn(async move { pool.shutdown().await })
    };
    while !matches!(pool.acquire(Uuid::new_v4()).await, Err(Error::ShuttingDown)) {
        tokio::task::yield_now().await;
    }
    assert!(!shutdown.is_finished());
    guard.command("true").output().await.unwrap();
    drop(guard);
    shutdown.await.unwrap().unwrap();
}
