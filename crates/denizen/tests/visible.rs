//! What a pool tells of its backups: while they are written, and in between.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use denizen::{BackupFormat, Clock, EventKind, MicroVmManager, VmPoolConfig, VmPoolRuntimeConfig};
use uuid::Uuid;

use crate::common::Manual;

const IDLE: Duration = Duration::from_secs(60);
const BACKUP: Duration = Duration::from_secs(100);

fn open(folder: &Path, clock: &Arc<Manual>) -> (Arc<MicroVmManager>, PathBuf) {
    let destination = folder.join("backups");
    let config = VmPoolConfig {
        enabled: true,
        volume_root: folder.join("pool"),
        shell: "/bin/sh".into(),
        shell_args: vec!["-c".to_owned()],
        idle_shutdown_seconds: IDLE.as_secs(),
        backup_after_seconds: Some(BACKUP.as_secs()),
        prune_after_seconds: 1_000_000,
        backup_destination: Some(destination.clone()),
        ..VmPoolConfig::default()
    };
    let builder = MicroVmManager::builder(VmPoolRuntimeConfig::from(&config)).clock(clock.clone());
    (builder.backup_format(BackupFormat::Repository).build().unwrap(), destination)
}

#[tokio::test]
async fn inspect_tells_what_is_saved_and_what_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let clock = Arc::<Manual>::default();
    let (pool, destination) = open(folder.path(), &clock);
    let id = Uuid::new_v4();
    let made = clock.wall();
    let guard = pool.acquire(id).await.unwrap();
    std::fs::write(guard.workdir().join("file"), vec![7; 5000]).unwrap();
    drop(guard);
    clock.pass(IDLE);
    pool.run_maintenance_now().await.unwrap();
    let info = pool.inspect(id).unwrap();
    assert_eq!((info.unsaved_since, info.backup_taken_at), (Some(made), None));
    let close = |at: Option<SystemTime>, to: SystemTime| {
        let at = at.unwrap();
        assert!(at.max(to).duration_since(at.min(to)).unwrap() < Duration::from_secs(1), "{at:?}");
    };
    close(info.backup_due_at, clock.wall() + BACKUP);

    // Nowhere to go, for now.
    std::fs::write(&destination, "in the way").unwrap();
    clock.pass(BACKUP);
    pool.run_maintenance_now().await.unwrap();
    let failed_at = clock.wall();
    let info = pool.inspect(id).unwrap();
    assert!(info.unsaved && info.backup.is_none());
    assert!(!info.backup_failure.unwrap().is_empty());
    close(info.backup_failed_at, failed_at);
    assert_eq!(info.backup_due_at, info.retry_at);
    assert!(info.retry_at.unwrap() > failed_at);
    assert_eq!(pool.figures().unwrap().backups_failed, 1);

    std::fs::remove_file(&destination).unwrap();
    clock.pass(BACKUP);
    pool.run_maintenance_now().await.unwrap();
    let saved = |pool: &MicroVmManager| {
        let info = pool.inspect(id).unwrap();
        assert!(!info.unsaved && info.backup.is_some());
        assert_eq!((info.unsaved_since, info.backup_due_at), (None, None));
        assert_eq!((info.backup_failure, info.backup_failed_at), (None, None));
        assert_eq!(info.backup_size, Some(5000));
        assert!(info.backup_added.unwrap() > 0);
        info.backup_taken_at.unwrap()
    };
    let taken_at = saved(&pool);
    close(Some(taken_at), clock.wall());
    let figures = pool.figures().unwrap();
    assert_eq!((figures.backups_written, figures.backups_failed), (1, 1));
    assert_eq!(figures.backup_seconds.counts.iter().sum::<u64>(), 1);

    // It is known after a restart, too.
    pool.shutdown().await.unwrap();
    drop(pool);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let (pool, _) = open(folder.path(), &clock);
    assert_eq!(saved(&pool), taken_at);
    clock.pass(BACKUP);
    drop(pool.acquire(id).await.unwrap());
    assert_eq!(pool.inspect(id).unwrap().unsaved_since, Some(taken_at));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_takes_a_while_tells_how_far_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (pool, _) = open(folder.path(), &Arc::default());
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    let line = "for i in 1 2 3 4 5 6 7 8; do head -c 24000000 /dev/urandom > $i; done";
    common::text(&guard, line).await;
    drop(guard);
    pool.stop(id, true).await.unwrap();
    let mut events = pool.events().unwrap();
    let begun = Instant::now();
    pool.backup(id).await.unwrap();
    let took = begun.elapsed();
    let mut told = 0;
    let mut before = 0;
    loop {
        let event = events.next().await.unwrap();
        match event.kind {
            EventKind::Progress { operation, bytes, files, bytes_per_second, .. } => {
                assert_eq!((event.session, operation), (id, "backup"));
                assert!(bytes >= before && bytes <= 8 * 24_000_000, "{bytes} after {before}");
                assert!(files <= 8);
                assert!(bytes == 0 || bytes_per_second > 0);
                (told, before) = (told + 1, bytes);
            }
            EventKind::BackedUp { .. } => break,
            kind => panic!("{kind:?}"),
        }
    }
    let most = u32::try_from(took.as_millis() / 500).unwrap();
    println!("told {told} times in {took:?}");
    assert!(told <= most, "{told} times in {took:?}");
    assert!(told > 0 || took < Duration::from_secs(1), "nothing was told in {took:?}");
}
