//! Backups in a repository: what a pool has saved comes back, here and on a machine that has
//! nothing but the destination and the key; nothing that was saved in another format is lost.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use denizen::{BackupFormat, Error, EventKind, Isolation, MicroVmManager, VmPoolConfig};
use tempfile::TempDir;
use uuid::Uuid;

use crate::common::{cache, opened, text};

struct World {
    folder: TempDir,
    destination: &'static str,
}

impl World {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), destination: "backups" }
    }

    fn destination(&self) -> PathBuf {
        self.folder.path().join(self.destination)
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

/// Of every format and isolation: with owners, modes and links, of volume and root.
#[tokio::test]
async fn some_files_are_put_back_and_the_others_stay() {
    for (isolation, format) in [
        (Isolation::Host, BackupFormat::Archive),
        (Isolation::Sandbox, BackupFormat::Repository),
        (Isolation::Sandbox, BackupFormat::Archive),
        (Isolation::Host, BackupFormat::Repository),
    ] {
        let world = World::new();
        let pool = world.pool("here", format, isolation).await;
        let id = Uuid::new_v4();
        let has_root = isolation == Isolation::Sandbox;
        let (conf, set_up) =
            if has_root { ("/etc/app/conf", "mkdir /etc/app &&") } else { ("conf", "") };
        let begin = format!(
            "{set_up} mkdir -p src/deep && echo old | tee notes src/deep/main src/kept {conf} other \
             && chmod 4711 src/deep/main && ln -s ../notes src/link"
        );
        run(&pool, id, &begin).await;
        let owner = if has_root {
            "chown 12:34 src/deep/main && chmod 4711 src/deep/main && stat -c %u:%g src/deep/main"
        } else {
            "echo"
        };
        let owner = run(&pool, id, owner).await;
        pool.backup(id).await.unwrap();
        let first = pool.inspect(id).unwrap().backup.unwrap();

        let change = format!(
            "rm -r src && mkdir src && echo new | tee notes src/added other stays {conf} && \
             {} true",
            if has_root { "rm -r /etc/app &&" } else { "" }
        );
        run(&pool, id, &change).await;
        let paths = ["src", "./notes", conf].map(PathBuf::from);
        let mut events = pool.events().unwrap();
        pool.restore_paths(id, Some(&first[..8]), &paths).await.unwrap();
        let told = loop {
            if let EventKind::PartRestored { backup, paths, .. } = events.next().await.unwrap().kind
            {
                break (backup, paths);
            }
        };
        assert_eq!(told, (Some(first.clone()), paths.map(|it| it.display().to_string()).into()));
        let info = pool.inspect(id).unwrap();
        assert!(info.unsaved && info.volume.is_some(), "{info:?}");
        assert_ne!(info.backup.as_deref(), Some(&*first), "what it had was saved first");
        let look = format!(
            "cat notes src/deep/main src/kept {conf} src/link other stays; ls src; \
             stat -c %a src/deep/main"
        );
        let wanted = "old\nold\nold\nold\nold\nnew\nnew\ndeep\nkept\nlink\n4711\n";
        assert_eq!(run(&pool, id, &look).await, wanted, "{isolation:?} {format:?}");
        if has_root {
            assert_eq!(run(&pool, id, "stat -c %u:%g src/deep/main").await, owner);
        }

        // All or none.
        run(&pool, id, "echo newer > notes").await;
        for (paths, told) in [
            (["notes", "no"], "none"),
            (["notes", "src/../no"], "`..`"),
            (["notes", "other/file"], "none"),
        ] {
            let refused = pool.restore_paths(id, Some(&first), &paths.map(PathBuf::from)).await;
            let refused = refused.unwrap_err();
            assert!(matches!(refused.kind(), Error::NotPutBack { .. }), "{refused}");
            assert!(refused.to_string().contains(told), "{refused}");
        }
        run(&pool, id, "rm -r src && ln -s . src").await;
        let paths = ["notes", "src/kept"].map(PathBuf::from);
        let refused = pool.restore_paths(id, Some(&first), &paths).await.unwrap_err();
        assert!(refused.to_string().contains("no folder"), "{refused}");
        assert_eq!(run(&pool, id, "cat notes").await, "newer\n");

        // What is archived comes back for it, as it was last.
        pool.backup(id).await.unwrap();
        pool.stop(id, false).await.unwrap();
        fs::remove_dir_all(pool.session_folder(id).unwrap()).unwrap();
        pool.restore_paths(id, Some(&first), &["other".into()]).await.unwrap();
        assert_eq!(run(&pool, id, "cat notes other").await, "newer\nold\n");
        // And all of it is in the next backup.
        pool.backup(id).await.unwrap();
        pool.restore(id, None).await.unwrap();
        assert_eq!(run(&pool, id, "cat notes other").await, "newer\nold\n");
        pool.shutdown().await.unwrap();
    }
}

/// As where a disk that should be mounted is not: nothing may be written in its place, and nobody
/// be told that there is no backup.
#[tokio::test]
async fn a_destination_that_was_used_is_not_made_anew() {
    for format in [BackupFormat::Archive, BackupFormat::Repository] {
        let world = World::new();
        let pool = world.pool("only", format, Isolation::Host).await;
        let (id, other) = (Uuid::new_v4(), Uuid::new_v4());
        run(&pool, id, "echo one > notes").await;
        pool.backup(id).await.unwrap();
        pool.shutdown().await.unwrap();
        drop(pool);
        let aside = world.folder.path().join("aside");
        fs::rename(world.destination(), &aside).unwrap();
        // Not there at all, or the empty folder over which it is mounted.
        for is_empty in [false, true] {
            if is_empty {
                fs::create_dir_all(world.destination()).unwrap();
            }
            let pool = world.pool("only", format, Isolation::Host).await;
            run(&pool, other, "echo two > notes").await;
            let gone = pool.backup(other).await.unwrap_err();
            assert!(matches!(gone.kind(), Error::DestinationGone { .. }), "{gone}");
            let gone = pool.backups(id).await.unwrap_err();
            assert!(matches!(gone, Error::DestinationGone { .. }), "{gone}");
            assert!(pool.inspect(other).unwrap().unsaved);
            assert_eq!(files_or_none(&world.destination()), Vec::<PathBuf>::new());
            pool.shutdown().await.unwrap();
            drop(pool);
        }
        fs::remove_dir_all(world.destination()).unwrap();
        fs::rename(&aside, world.destination()).unwrap();
        let pool = world.pool("only", format, Isolation::Host).await;
        pool.backup(other).await.unwrap();
        pool.restore(id, None).await.unwrap();
        assert_eq!(run(&pool, id, "cat notes").await, "one\n");
        // One that has had backups, of which none is left, is there.
        for id in [id, other] {
            pool.remove(id).await.unwrap();
            for backup in pool.backups(id).await.unwrap() {
                pool.delete_backup(&backup.name).await.unwrap();
            }
        }
        assert_eq!(pool.all_backups().await.unwrap(), []);
        run(&pool, id, "echo three > notes").await;
        pool.backup(id).await.unwrap();
        pool.shutdown().await.unwrap();
    }
}

fn files_or_none(folder: &Path) -> Vec<PathBuf> {
    if folder.exists() { files(folder) } else { Vec::new() }
}

/// What another destination had may be gone with it.
#[tokio::test]
async fn what_was_saved_elsewhere_is_saved_again() {
    let mut world = World::new();
    let id = Uuid::new_v4();
    let pool = world.pool("only", BackupFormat::Repository, Isolation::Host).await;
    run(&pool, id, "echo one > notes").await;
    pool.backup(id).await.unwrap();
    assert!(!pool.inspect(id).unwrap().unsaved);
    pool.shutdown().await.unwrap();
    drop(pool);
    world.destination = "elsewhere";
    for _ in 0..2 {
        let pool = world.pool("only", BackupFormat::Repository, Isolation::Host).await;
        assert!(pool.inspect(id).unwrap().unsaved);
        pool.shutdown().await.unwrap();
        drop(pool);
    }
    let pool = world.pool("only", BackupFormat::Repository, Isolation::Host).await;
    pool.backup(id).await.unwrap();
    pool.shutdown().await.unwrap();
    drop(pool);
    let pool = world.pool("only", BackupFormat::Repository, Isolation::Host).await;
    assert!(!pool.inspect(id).unwrap().unsaved);
    pool.restore(id, None).await.unwrap();
    assert_eq!(run(&pool, id, "cat notes").await, "one\n");
    pool.shutdown().await.unwrap();
}
