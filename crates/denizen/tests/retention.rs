//! Which backups a pool keeps, at the public door and over both formats.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use denizen::{
    BackupFormat, Error, EventKind, MicroVmManager, Retention, VmPoolConfig, VmPoolRuntimeConfig,
};
use tempfile::TempDir;
use uuid::Uuid;

use crate::common::{Manual, opened};

const HOUR: Duration = Duration::from_secs(3600);
const NOTHING: Retention = Retention {
    keep_last: 0,
    keep_hourly: 0,
    keep_daily: 0,
    keep_weekly: 0,
    keep_monthly: 0,
    keep_yearly: 0,
};

struct World {
    folder: TempDir,
    clock: Arc<Manual>,
}

impl World {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), clock: Arc::default() }
    }

    async fn open(
        &self,
        root: &str,
        format: BackupFormat,
        retention: Retention,
    ) -> Arc<MicroVmManager> {
        let config = VmPoolConfig {
            enabled: true,
            volume_root: self.folder.path().join(root),
            shell: "/bin/sh".into(),
            shell_args: vec!["-c".to_owned()],
            // Nothing happens by itself but what is looked at here.
            idle_shutdown_seconds: 1_000_000_000,
            prune_after_seconds: 1_000_000_000,
            backup_destination: Some(self.folder.path().join("backups")),
            ..VmPoolConfig::default()
        };
        let key = self.folder.path().join("key");
        opened(|| {
            let builder = MicroVmManager::builder(VmPoolRuntimeConfig::from(&config));
            let builder = builder.clock(self.clock.clone()).backup_format(format);
            builder.backup_key(&key).retention(retention)
        })
        .await
    }

    async fn pass(&self, pool: &MicroVmManager, time: Duration) {
        self.clock.pass(time);
        pool.run_maintenance_now().await.unwrap();
    }
}

async fn save(pool: &MicroVmManager, id: Uuid, text: &str) -> String {
    let guard = pool.acquire(id).await.unwrap();
    std::fs::write(guard.workdir().join("file"), text).unwrap();
    drop(guard);
    pool.backup(id).await.unwrap();
    pool.inspect(id).unwrap().backup.unwrap()
}

async fn read(pool: &MicroVmManager, id: Uuid) -> String {
    let guard = pool.acquire(id).await.unwrap();
    std::fs::read_to_string(guard.workdir().join("file")).unwrap()
}

async fn names(pool: &MicroVmManager, id: Uuid) -> BTreeSet<String> {
    pool.backups(id).await.unwrap().into_iter().map(|it| it.name).collect()
}

#[tokio::test]
async fn once_a_day_what_is_not_kept_is_deleted() {
    for format in [BackupFormat::Archive, BackupFormat::Repository] {
        let world = World::new();
        let other = world.open("other", format, NOTHING).await;
        let (mine, theirs) = (Uuid::new_v4(), Uuid::new_v4());
        for text in ["one", "two"] {
            save(&other, theirs, text).await;
            world.clock.pass(HOUR);
        }
        let pool = world.open("pool", format, Retention { keep_daily: 2, ..NOTHING }).await;
        pool.run_maintenance_now().await.unwrap();
        // Of a day in the middle: all of the next five are on it.
        let first = save(&pool, mine, "0").await;
        let mut last = String::new();
        for step in 1..=4 {
            last = save(&pool, mine, &step.to_string()).await;
            world.pass(&pool, HOUR).await;
        }
        assert_eq!(names(&pool, mine).await.len(), 5, "{format}: not before it is due");
        // What the row names is not deleted, be it the oldest.
        pool.restore(mine, Some(&first)).await.unwrap();
        let mut events = pool.events().unwrap();
        world.pass(&pool, 24 * HOUR).await;
        let kept = BTreeSet::from([first.clone(), last.clone()]);
        assert_eq!(names(&pool, mine).await, kept, "{format}");
        for _ in 0..3 {
            let event = events.next().await.unwrap();
            assert!(matches!(event.kind, EventKind::Forgotten { .. }), "{event:?}");
            assert_eq!(event.session, mine);
        }
        assert_eq!(names(&other, theirs).await.len(), 2, "{format}: of a session not known here");

        // A restart does not begin the day anew, nor end it.
        for step in 5..=7 {
            last = save(&pool, mine, &step.to_string()).await;
        }
        let there = names(&pool, mine).await;
        assert_eq!(there.len(), 5);
        pool.shutdown().await.unwrap();
        drop(pool);
        world.clock.pass(HOUR);
        // What was written in the other format goes, too.
        let switched = match format {
            BackupFormat::Archive => BackupFormat::Repository,
            BackupFormat::Repository => BackupFormat::Archive,
        };
        let retention = Retention { keep_last: 1, ..NOTHING };
        let pool = world.open("pool", switched, retention).await;
        world.pass(&pool, HOUR).await;
        assert_eq!(names(&pool, mine).await, there, "{format}: as if it were due");
        world.pass(&pool, 23 * HOUR).await;
        assert_eq!(names(&pool, mine).await, BTreeSet::from([last]), "{format}");
        assert_eq!(read(&pool, mine).await, "7", "{format}");
        let report = pool.verify_backups(true).await.unwrap();
        assert_eq!(report.findings, [], "{format}");
    }
}

#[tokio::test]
async fn nobody_has_to_ask_for_it() {
    let world = World::new();
    let id = Uuid::new_v4();
    let pool = world.open("pool", BackupFormat::Archive, NOTHING).await;
    for text in ["one", "two", "three"] {
        save(&pool, id, text).await;
        world.pass(&pool, 48 * HOUR).await;
    }
    assert_eq!(names(&pool, id).await.len(), 3, "without a rule all is kept");
    let all = pool.forget_backups(&NOTHING, false).await.unwrap();
    assert_eq!((all.len(), names(&pool, id).await.len()), (0, 3));
    pool.shutdown().await.unwrap();
    drop(pool);
    let pool =
        world.open("pool", BackupFormat::Archive, Retention { keep_last: 1, ..NOTHING }).await;
    let mut deleted = 0;
    while names(&pool, id).await.len() > 1 {
        tokio::task::yield_now().await;
        deleted += 1;
        assert!(deleted < 1_000_000, "waited in vain");
    }
    assert_eq!(read(&pool, id).await, "three");
}

#[tokio::test]
async fn a_dry_run_tells_what_a_run_then_deletes() {
    let world = World::new();
    let pool = world.open("pool", BackupFormat::Repository, NOTHING).await;
    let id = Uuid::new_v4();
    for text in ["one", "two", "three"] {
        save(&pool, id, text).await;
    }
    let retention = Retention { keep_last: 1, ..NOTHING };
    let planned = pool.forget_backups(&retention, true).await.unwrap();
    assert_eq!((planned.len(), names(&pool, id).await.len()), (2, 3));
    assert_eq!(pool.forget_backups(&retention, false).await.unwrap(), planned);
    assert_eq!(names(&pool, id).await.len(), 1);
    assert_eq!(pool.forget_backups(&retention, false).await.unwrap(), []);
    let gone = pool.restore(id, Some(&planned[0].name)).await.unwrap_err();
    assert!(matches!(gone.kind(), Error::NoBackup { .. }), "{gone}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_beside_it_has_all_of_its_backup_or_is_told_that_there_is_none() {
    let world = World::new();
    let pool = world.open("pool", BackupFormat::Archive, NOTHING).await;
    let id = Uuid::new_v4();
    let retention = Retention { keep_last: 1, ..NOTHING };
    let mut ends = [0, 0];
    for round in 0..40_u64 {
        let (old, new) = (format!("old {round}"), format!("new {round}"));
        let backup = save(&pool, id, &old).await;
        save(&pool, id, &new).await;
        let forget = tokio::spawn({
            let pool = pool.clone();
            async move { pool.forget_backups(&retention, false).await.unwrap() }
        });
        // Before it has begun, at the same time, or just after.
        (0..round % 4).for_each(|_| std::thread::sleep(Duration::from_micros(100)));
        let restored = pool.restore(id, Some(&backup)).await;
        forget.await.unwrap();
        let is_there = names(&pool, id).await.contains(&backup);
        match restored {
            Ok(()) => {
                assert!(is_there, "round {round}: the row names what was deleted");
                assert_eq!(read(&pool, id).await, old, "round {round}");
            }
            Err(error) => {
                assert!(matches!(error.kind(), Error::NoBackup { .. }), "round {round}: {error}");
                assert_eq!(read(&pool, id).await, new, "round {round}");
            }
        }
        ends[usize::from(is_there)] += 1;
    }
    println!("{} too late, {} restored", ends[0], ends[1]);
}
