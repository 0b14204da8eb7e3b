//! Backups in a repository: what a pool has saved comes back, here and on a machine that has
//! nothing but the destination and the key; nothing that was saved in another format is lost.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use denizen::{BackupFormat, Error, Isolation, MicroVmManager, VmPoolConfig};
use tempfile::TempDir;
use uuid::Uuid;

use crate::common::{cache, opened, text};

struct World {
    folder: TempDir,
}

impl World {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn destination(&self) -> PathBuf {
        self.folder.path().join("backups")
    }

    fn key(&self) -> PathBuf {
        self.folder.path().join("key")
    }

    /// A pool on a machine of that name; all share the destination and the key.
    async fn pool(
        &self,
        machine: &str,
        format: BackupFormat,
        isolation: Isolation,
    ) -> Arc<MicroVmManager> {
        let config = VmPoolConfig {
            enabled: true,
            volume_root: self.folder.path().join(machine),
            shell: "/bin/sh".into(),
            shell_args: vec!["-c".to_owned()],
            backup_destination: Some(self.destination()),
            ..VmPoolConfig::default()
        };
        opened(|| {
            let builder = MicroVmManager::builder((&config).into()).isolation(isolation);
            builder.cache(cache()).backup_format(format).backup_key(self.key())
        })
        .await
    }
}

async fn run(pool: &MicroVmManager, id: Uuid, line: &str) -> String {
    let guard = pool.acquire(id).await.unwrap();
    text(&guard, line).await
}

/// What is below a folder, of which a part of the name is known.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

#[tokio::test]
async fn sessions_come_back_on_a_machine_that_has_only_the_key() {
    for isolation in [Isolation::Host, Isolation::Sandbox] {
        let world = World::new();
        let pool = world.pool("old", BackupFormat::Repository, isolation).await;
        let name = "demo".parse().unwrap();
        let id = pool.find_or_name(&name).await.unwrap();
        run(&pool, id, "echo one > notes; umask 077; mkdir -p deep/er; echo two > deep/er/file")
            .await;
        if isolation == Isolation::Sandbox {
            run(&pool, id, "echo mine > /etc/mine; rm /etc/group").await;
        }
        pool.backup(id).await.unwrap();
        let [first] = &*pool.backups(id).await.unwrap() else { panic!("one backup") };
        assert_eq!(first.session_name.as_deref(), Some("demo"));
        run(&pool, id, "echo three > notes").await;
        pool.backup(id).await.unwrap();
        pool.shutdown().await.unwrap();
        drop(pool);
        assert_eq!(fs::metadata(world.key()).unwrap().permissions().mode() & 0o777, 0o600);

        let pool = world.pool("new", BackupFormat::Repository, isolation).await;
        assert!(pool.sessions().unwrap().is_empty());
        assert!(matches!(pool.inspect(id), Err(Error::Unknown { .. })));
        let found = pool.recover().await.unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].id, found[0].name.as_deref()), (id, Some("demo")));
        assert_eq!((found[0].state, found[0].unsaved), ("archived", false));
        assert!(pool.recover().await.unwrap().is_empty(), "it is known now");
        assert_eq!(pool.find(&name).unwrap(), Some(id));
        assert_eq!(run(&pool, id, "cat notes; cat deep/er/file").await, "three\ntwo\n");
        if isolation == Isolation::Sandbox {
            assert_eq!(
                run(&pool, id, "cat /etc/mine; ls /etc/group 2> /dev/null; true").await,
                "mine\n"
            );
        }
        // Its past came along.
        pool.restore(id, Some(&first.name[..12])).await.unwrap();
        assert_eq!(run(&pool, id, "cat notes").await, "one\n");
        pool.shutdown().await.unwrap();
        drop(pool);
        // It is known after a restart, too.
        let pool = world.pool("new", BackupFormat::Repository, isolation).await;
        assert_eq!(pool.find(&name).unwrap(), Some(id));
        pool.shutdown().await.unwrap();
        drop(pool);
    }
}

#[tokio::test]
async fn what_was_saved_in_another_format_is_not_lost() {
    let world = World::new();
    let id = Uuid::new_v4();
    let formats = [BackupFormat::Archive, BackupFormat::Repository, BackupFormat::Archive];
    let mut saved = Vec::new();
    for (number, format) in formats.into_iter().enumerate() {
        let pool = world.pool("only", format, Isolation::Host).await;
        run(&pool, id, &format!("echo {number} > notes")).await;
        pool.backup(id).await.unwrap();
        let newest = pool.backups(id).await.unwrap().swap_remove(0);
        assert_eq!(newest.format, format);
        saved.push(newest.name);
        for (number, name) in saved.iter().enumerate() {
            pool.restore(id, Some(name)).await.unwrap();
            assert_eq!(run(&pool, id, "cat notes").await, format!("{number}\n"));
        }
        let report = pool.verify_backups(true).await.unwrap();
        assert!(report.findings.is_empty(), "{report:?}");
        assert!(report.backups > number as u64);
        pool.shutdown().await.unwrap();
        drop(pool);
    }
}

#[tokio::test]
async fn the_newest_backup_of_a_time_is_found() {
    let world = World::new();
    let pool = world.pool("only", BackupFormat::Repository, Isolation::Host).await;
    let id = Uuid::new_v4();
    for number in 0..3 {
        run(&pool, id, &format!("echo {number} > notes")).await;
        pool.backup(id).await.unwrap();
    }
    let all = pool.backups(id).await.unwrap();
    for backup in &all {
        let at = SystemTime::from(backup.taken_at);
        assert_eq!(pool.backup_at(id, at).await.unwrap().name, backup.name);
    }
    let oldest = SystemTime::from(all[2].taken_at);
    let before = pool.backup_at(id, oldest - Duration::from_nanos(1)).await;
    assert!(matches!(before, Err(Error::NoBackup { .. })), "{before:?}");
    pool.shutdown().await.unwrap();
    drop(pool);
}

#[tokio::test]
async fn a_lost_or_wrong_key_is_told_and_loses_nothing() {
    let world = World::new();
    let id = Uuid::new_v4();
    let pool = world.pool("only", BackupFormat::Repository, Isolation::Host).await;
    run(&pool, id, "echo one > notes").await;
    pool.backup(id).await.unwrap();
    pool.shutdown().await.unwrap();
    drop(pool);
    let key = fs::read(world.key()).unwrap();
    for wrong in [None, Some("another\n"), Some("")] {
        fs::remove_file(world.key()).unwrap();
        if let Some(wrong) = wrong {
            fs::write(world.key(), wrong).unwrap();
        }
        let pool = world.pool("only", BackupFormat::Repository, Isolation::Host).await;
        run(&pool, id, "echo two >> notes").await;
        let refused = pool.backup(id).await.unwrap_err().to_string();
        assert!(refused.contains("key"), "{refused}");
        assert!(!refused.contains("another\n"), "{refused}");
        let session = pool.inspect(id).unwrap();
        assert!(session.unsaved, "{session:?}");
        pool.shutdown().await.unwrap();
        drop(pool);
        fs::write(world.key(), &key).unwrap();
    }
    let pool = world.pool("only", BackupFormat::Repository, Isolation::Host).await;
    assert_eq!(run(&pool, id, "cat notes").await, "one\ntwo\ntwo\ntwo\n");
    pool.backup(id).await.unwrap();
    assert_eq!(pool.backups(id).await.unwrap().len(), 2);
    pool.shutdown().await.unwrap();
    drop(pool);
}

#[tokio::test]
async fn what_is_damaged_is_named_with_what_is_sound() {
    let world = World::new();
    let pool = world.pool("only", BackupFormat::Repository, Isolation::Host).await;
    let id = Uuid::new_v4();
    run(&pool, id, "head -c 100000 /dev/urandom > first").await;
    pool.backup(id).await.unwrap();
    let before = files(&world.destination().join("data"));
    run(&pool, id, "head -c 100000 /dev/urandom > second").await;
    pool.backup(id).await.unwrap();
    let [newest, oldest] = &*pool.backups(id).await.unwrap() else { panic!("two backups") };
    let new = files(&world.destination().join("data"));
    let pack = new.into_iter().filter(|path| !before.contains(path));
    let pack = pack.max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let mut bytes = fs::read(&pack).unwrap();
    bytes[100] ^= 1;
    fs::write(&pack, bytes).unwrap();
    assert!(pool.verify_backups(false).await.unwrap().findings.is_empty(), "nothing is missing");
    let report = pool.verify_backups(true).await.unwrap();
    let [finding] = &*report.findings else { panic!("{report:?}") };
    assert_eq!(finding.backup.as_ref(), Some(&newest.name));
    assert_eq!(finding.instead.as_ref(), Some(&oldest.name));
    // What is there is not given up for what cannot be restored.
    let refused = pool.restore(id, Some(&newest.name)).await.unwrap_err();
    assert!(refused.to_string().contains("damaged"), "{refused}");
    assert_eq!(run(&pool, id, "ls").await, "first\nsecond\n");
    pool.restore(id, Some(&oldest.name)).await.unwrap();
    assert_eq!(run(&pool, id, "ls").await, "first\n");
    pool.shutdown().await.unwrap();
    drop(pool);
}

#[tokio::test]
async fn a_backup_is_forked_while_its_session_goes_on_or_is_gone() {
    for format in [BackupFormat::Archive, BackupFormat::Repository] {
        let world = World::new();
        let isolation = Isolation::Sandbox;
        let pool = world.pool("only", format, isolation).await;
        let id = Uuid::new_v4();
        run(&pool, id, "echo old > notes; echo mine > /etc/mine; ln -s notes link").await;
        pool.backup(id).await.unwrap();
        let backup = pool.backups(id).await.unwrap().swap_remove(0);
        let busy = pool.acquire(id).await.unwrap();
        text(&busy, "echo new > notes; rm /etc/mine").await;
        let look = "cat link; cat /etc/mine";
        let fork = pool.fork_backup(id, &backup.name[..backup.name.len() - 1]).await.unwrap();
        assert_eq!(run(&pool, fork, look).await, "old\nmine\n");
        assert_eq!(text(&busy, "cat notes; ls /etc/mine 2> /dev/null; true").await, "new\n");
        drop(busy);
        let made = pool.inspect(fork).unwrap();
        assert_eq!((made.backup, made.unsaved), (None, true));
        assert!(pool.backups(fork).await.unwrap().is_empty());

        // It is one of its own, which has backups of its own.
        pool.backup(fork).await.unwrap();
        assert_eq!(pool.backups(fork).await.unwrap().len(), 1);
        assert_eq!(pool.backups(id).await.unwrap().len(), 1);
        let none = pool.fork_backup(id, "none").await.unwrap_err();
        assert!(matches!(none, Error::NoBackup { .. }), "{none}");

        pool.stop(id, true).await.unwrap();
        fs::remove_dir_all(world.folder.path().join("only").join(id.to_string())).unwrap();
        let again = pool.fork_backup(id, &backup.name).await.unwrap();
        assert_eq!(run(&pool, again, look).await, "old\nmine\n");
        // Not even known here.
        pool.remove(id).await.unwrap();
        let again = pool.fork_backup(id, &backup.name).await.unwrap();
        assert_eq!(run(&pool, again, look).await, "old\nmine\n");
        assert!(matches!(pool.inspect(id), Err(Error::Unknown { .. })));

        // One that cannot be restored leaves nothing.
        let before = pool.sessions().unwrap().len();
        for file in files(&world.destination()) {
            fs::write(file, "nonsense").unwrap();
        }
        let broken = pool.fork_backup(id, &backup.name).await.unwrap_err();
        let told = matches!(broken.kind(), Error::Backup(_) | Error::Repository(_));
        assert!(told, "{broken:?}");
        assert_eq!(pool.sessions().unwrap().len(), before);
        pool.shutdown().await.unwrap();
        drop(pool);
    }
}
