//! Sessions that are put to sleep when somebody says so, whatever becomes of idle ones.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use denizen::{
    Builder, Error, Events, Isolation, MicroVmManager, VmExecutionGuard, VmPoolConfig,
    VmPoolRuntimeConfig,
};
use tempfile::TempDir;
use uuid::Uuid;

use crate::common::{Manual, cache, isolated, limits, opened, text};

const BACKUP: Duration = Duration::from_secs(100);
const PRUNE: Duration = Duration::from_secs(200);

/// Keeps something in memory, then counts for ever, a number a line.
const COUNT: &str = "echo kept > /dev/shm/kept
    (setsid sh -c 'echo $$ > pid
    while :; do i=$((i+1)); echo $i >> count; sleep 0.01; done' > /dev/null 2>&1 &)
    while ! test -s count; do :; done";

struct World {
    folder: TempDir,
    clock: Arc<Manual>,
    isolation: Isolation,
}

impl World {
    fn new(isolation: Isolation) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), clock: Arc::default(), isolation }
    }

    fn builder(&self) -> Builder {
        let config = VmPoolConfig {
            enabled: true,
            volume_root: self.folder.path().join("pool"),
            shell: "/bin/sh".into(),
            shell_args: vec!["-c".to_owned()],
            backup_after_seconds: Some(BACKUP.as_secs()),
            prune_after_seconds: PRUNE.as_secs(),
            backup_destination: Some(self.folder.path().join("backups")),
            ..VmPoolConfig::default()
        };
        let config = VmPoolRuntimeConfig::from(&config);
        let builder = isolated(MicroVmManager::builder(config), self.isolation);
        builder.clock(self.clock.clone()).limits(limits(self.isolation)).cache(cache())
    }

    /// None where nothing may be frozen.
    async fn open(&self) -> Option<Arc<MicroVmManager>> {
        let pool = opened(|| self.builder()).await;
        let freezes = pool.can_freeze().unwrap();
        if !freezes {
            println!("skipped: no control group that can be frozen is granted");
        }
        freezes.then_some(pool)
    }

    async fn pass(&self, pool: &MicroVmManager, time: Duration) {
        self.clock.pass(time);
        pool.run_maintenance_now().await.unwrap();
    }
}

async fn counting(pool: &MicroVmManager) -> (Uuid, String) {
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    text(&guard, COUNT).await;
    (id, text(&guard, "cat pid").await)
}

/// Sees that the counter is the one that was started first, and has left nothing out.
async fn still_counts(guard: &VmExecutionGuard, pid: &str) {
    let alive = "kill -0 $(cat pid) && cat pid /dev/shm/kept";
    assert_eq!(text(guard, alive).await, format!("{pid}kept\n"));
    let next = "at=$(wc -l < count); while test $(wc -l < count) -le $at; do :; done
        test \"$(head -n $at count)\" = \"$(seq $at)\" || echo lost";
    assert_eq!(text(guard, next).await, "");
}

fn state(pool: &MicroVmManager, id: Uuid) -> &'static str {
    pool.inspect(id).unwrap().state
}

/// Waits for the events of these names, in this order, whatever comes between.
async fn hear(events: &mut Events, names: &[&str]) {
    for name in names {
        let next = async {
            while serde_json::to_value(events.next().await.unwrap()).unwrap()["event"] != **name {}
        };
        let heard = tokio::time::timeout(Duration::from_secs(60), next).await;
        assert!(heard.is_ok(), "no {name}");
    }
}

async fn again_and_again(isolation: Isolation, times: usize) {
    let world = World::new(isolation);
    let Some(pool) = world.open().await else { return };
    let (id, pid) = counting(&pool).await;
    for time in 1..=times {
        pool.pause(id).await.unwrap();
        assert_eq!(state(&pool, id), "frozen");
        let guard = pool.acquire(id).await.unwrap();
        text(&guard, &format!("echo {time} >> log; echo {time} >> /tmp/log")).await;
        still_counts(&guard, &pid).await;
    }
    let guard = pool.acquire(id).await.unwrap();
    let logs = "test $(cat log | wc -l) = $(cat /tmp/log | wc -l) && cat log | wc -l";
    assert_eq!(text(&guard, logs).await.trim(), times.to_string());
    drop(guard);
    pool.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_sandbox_that_is_paused_again_and_again_loses_nothing() {
    again_and_again(Isolation::Sandbox, 100).await;
}

#[tokio::test]
async fn a_machine_that_is_paused_again_and_again_loses_nothing() {
    again_and_again(Isolation::MicroVm, 5).await;
}

#[tokio::test]
async fn what_is_paused_sleeps_until_somebody_takes_it() {
    let world = World::new(Isolation::Sandbox);
    let Some(pool) = world.open().await else { return };
    let mut events = pool.events().unwrap();
    let unknown = pool.pause(Uuid::new_v4()).await.unwrap_err();
    assert!(matches!(unknown, Error::Unknown { .. }), "{unknown}");
    let (id, pid) = counting(&pool).await;
    let guard = pool.acquire(id).await.unwrap();
    let held = pool.pause(id).await.unwrap_err();
    assert!(matches!(held, Error::InUse { .. }), "{held}");
    drop(guard);
    pool.pause(id).await.unwrap();
    pool.pause(id).await.unwrap();
    hear(&mut events, &["frozen"]).await;
    // What runs keeps it from being stopped, and does not wake it.
    let busy = pool.stop(id, false).await.unwrap_err();
    assert!(matches!(busy, Error::InUse { .. }), "{busy}");
    hear(&mut events, &["frozen"]).await;
    assert_eq!(state(&pool, id), "frozen");
    pool.backup(id).await.unwrap();
    let fork = pool.fork(id).await.unwrap();
    assert_eq!(state(&pool, id), "frozen");
    pool.remove(fork).await.unwrap();
    still_counts(&pool.acquire(id).await.unwrap(), &pid).await;
    assert_eq!(state(&pool, id), "active");
    // What becomes of idle ones that sleep becomes of it.
    pool.pause(id).await.unwrap();
    world.pass(&pool, BACKUP).await;
    assert_eq!((state(&pool, id), pool.inspect(id).unwrap().unsaved), ("frozen", false));
    world.pass(&pool, PRUNE).await;
    hear(&mut events, &["backed_up", "stopped", "backed_up", "archived"]).await;
    pool.pause(id).await.unwrap();
    assert_eq!(state(&pool, id), "archived");
    assert_eq!(text(&pool.acquire(id).await.unwrap(), "cat pid").await, pid);
    pool.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_paused_sandbox_stands_still_until_the_next_pool_finds_it() {
    let world = World::new(Isolation::Sandbox);
    let builder = || world.builder().linger(Duration::from_secs(600));
    let pool = opened(builder).await;
    if !pool.can_freeze().unwrap() {
        return;
    }
    let (id, pid) = counting(&pool).await;
    pool.pause(id).await.unwrap();
    let home = pool.session_folder(id).unwrap();
    pool.leave().await.unwrap();
    drop(pool);
    for _ in 0..2 {
        assert!(stands_still(&home));
        let pool = opened(builder).await;
        hear(&mut pool.events().unwrap(), &["frozen"]).await;
        assert_eq!(state(&pool, id), "frozen");
        pool.leave().await.unwrap();
    }
    let pool = opened(builder).await;
    still_counts(&pool.acquire(id).await.unwrap(), &pid).await;
    // What is paused ends with a pool that is shut down.
    pool.pause(id).await.unwrap();
    pool.shutdown().await.unwrap();
    drop(pool);
    let pool = opened(builder).await;
    assert_eq!(state(&pool, id), "stopped");
}

/// Whether a session's control group is frozen.
fn stands_still(home: &Path) -> bool {
    let groups = std::fs::read_to_string(home.join("groups")).unwrap();
    let is = |group: &str, file: &str, text: &str| {
        let state = std::fs::read_to_string(Path::new(group).join(file)).unwrap_or_default();
        state.contains(text)
    };
    let mut groups = groups.lines();
    groups.any(|it| is(it, "cgroup.events", "frozen 1") || is(it, "freezer.state", "FROZEN"))
}

#[tokio::test]
async fn where_nothing_can_be_frozen_pausing_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let config = VmPoolConfig {
        enabled: true,
        volume_root: folder.path().join("pool"),
        ..VmPoolConfig::default()
    };
    let pool = MicroVmManager::new((&config).into()).unwrap();
    let id = Uuid::new_v4();
    drop(pool.acquire(id).await.unwrap());
    let refused = pool.pause(id).await.unwrap_err();
    assert!(matches!(refused, Error::NoFreezer { isolation: "host", .. }), "{refused}");
    assert_eq!(state(&pool, id), "active");
    pool.stop(id, false).await.unwrap();
    pool.pause(id).await.unwrap();
}
