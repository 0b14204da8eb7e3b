//! What a pool meets in the wild: an error that names the thing, and nothing lost.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use denizen::{Error, Exit, MicroVmManager, RegistryError, VmPoolConfig, VmPoolRuntimeConfig};
use uuid::Uuid;

fn config(folder: &Path) -> VmPoolRuntimeConfig {
    let config = VmPoolConfig {
        enabled: true,
        volume_root: folder.to_owned(),
        shell: PathBuf::from("/bin/sh"),
        shell_args: vec!["-c".to_owned()],
        ..VmPoolConfig::default()
    };
    (&config).into()
}

/// Closes a pool, and waits until the last of its tasks has let go of the lock.
async fn closed(pool: Arc<MicroVmManager>, folder: &Path) {
    pool.shutdown().await.unwrap();
    drop(pool);
    let lock = std::fs::File::open(folder.join(".denizen/lock")).unwrap();
    while rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
        tokio::task::yield_now().await;
    }
}

fn sqlite(file: &Path, sql: &str) -> String {
    let output = Command::new("sqlite3").arg(file).arg(sql).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn the_registry_is_readable_by_people_and_has_one_owner() {
    let folder = tempfile::tempdir().unwrap();
    let pool = MicroVmManager::new(config(folder.path())).unwrap();
    let id = pool.find_or_name(&"demo".parse().unwrap()).await.unwrap();
    drop(pool.acquire(id).await.unwrap());
    pool.stop(id, false).await.unwrap();
    // Of a session that is not new, it is written down before anybody has it.
    drop(pool.acquire(id).await.unwrap());
    let file = folder.path().join(".denizen/registry.db");
    let row =
        sqlite(&file, "select s.phase, n.name from sessions s join names n on n.session = s.id");
    assert_eq!(row, "active|demo\n");
    let second = MicroVmManager::new(config(folder.path())).unwrap_err();
    assert!(matches!(second, Error::Registry(RegistryError::Locked { .. })), "{second}");
}

#[tokio::test]
async fn a_newer_or_older_schema() {
    let folder = tempfile::tempdir().unwrap();
    let pool = MicroVmManager::new(config(folder.path())).unwrap();
    let id = Uuid::new_v4();
    drop(pool.acquire(id).await.unwrap());
    closed(pool, folder.path()).await;
    let file = folder.path().join(".denizen/registry.db");
    sqlite(
        &file,
        "drop table names; drop table chores; drop table backups; drop table destination; \
         drop table egress; drop table shares; drop table mounts; alter table sessions drop column paused; pragma user_version = 1",
    );
    let pool = MicroVmManager::new(config(folder.path())).unwrap();
    assert_eq!(pool.sessions().unwrap()[0].id, id, "an older schema is brought up to date");
    pool.find_or_name(&"demo".parse().unwrap()).await.unwrap();
    closed(pool, folder.path()).await;
    sqlite(&file, "pragma user_version = 99");
    let error = MicroVmManager::new(config(folder.path())).unwrap_err();
    assert!(matches!(error, Error::Registry(RegistryError::Newer { found: 99, .. })), "{error}");
}

#[tokio::test]
async fn a_damaged_registry_is_refused_and_its_volumes_can_be_taken_in() {
    let folder = tempfile::tempdir().unwrap();
    let pool = MicroVmManager::new(config(folder.path())).unwrap();
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    std::fs::write(guard.workdir().join("file"), "kept").unwrap();
    drop(guard);
    closed(pool, folder.path()).await;
    let file = folder.path().join(".denizen/registry.db");
    let whole = std::fs::read(&file).unwrap();
    for broken in [&b"this is no database at all, whatever its name says"[..], &whole[..5000], b""]
    {
        std::fs::write(&file, broken).unwrap();
        let error = MicroVmManager::new(config(folder.path())).unwrap_err();
        let damaged = matches!(error, Error::Registry(RegistryError::Damaged { .. }));
        assert!(damaged, "{} bytes: {error:?}", broken.len());
        assert!(error.to_string().contains("registry.db"), "{error}");
        assert!(folder.path().join(id.to_string()).join("volume/file").exists());
    }
    std::fs::rename(&file, file.with_extension("aside")).unwrap();
    let pool = MicroVmManager::new(config(folder.path())).unwrap();
    let guard = pool.acquire(id).await.unwrap();
    assert_eq!(std::fs::read(guard.workdir().join("file")).unwrap(), b"kept");
}

#[tokio::test]
async fn a_volume_removed_by_hand_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let pool = MicroVmManager::new(config(folder.path())).unwrap();
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    std::fs::remove_dir_all(folder.path().join(id.to_string())).unwrap();
    let error = guard.command("true").output().await.unwrap_err();
    assert!(matches!(error, Error::VolumeMissing { .. }), "{error}");
    drop(guard);
    pool.stop(id, false).await.unwrap();
    let error = pool.acquire(id).await.unwrap_err();
    assert!(matches!(error, Error::VolumeMissing { .. }), "{error}");
    pool.remove(id).await.unwrap();
    let guard = pool.acquire(id).await.unwrap();
    assert!(guard.workdir().is_dir(), "and one can begin anew");
}

#[tokio::test]
async fn roots_that_cannot_be_used() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = MicroVmManager::new(config(&file.join("below"))).unwrap_err();
    assert!(error.to_string().contains("below"), "{error}");
    if rustix::process::geteuid().is_root() {
        let theirs = folder.path().join("theirs");
        std::fs::create_dir(&theirs).unwrap();
        std::os::unix::fs::chown(&theirs, Some(12345), None).unwrap();
        let error = MicroVmManager::new(config(&theirs)).unwrap_err();
        assert!(matches!(error, Error::RootOwner { owner: 12345, .. }), "{error}");
    } else {
        println!("skipped: giving a folder to somebody else needs root");
    }
    let mut zero = config(&folder.path().join("zero"));
    zero.max_vms = 0;
    let error = MicroVmManager::new(zero).unwrap_err();
    assert!(error.to_string().contains("max_vms"), "{error}");
}

#[tokio::test]
async fn commands_with_odd_arguments_and_output() {
    let folder = tempfile::tempdir().unwrap();
    let pool = MicroVmManager::new(config(folder.path())).unwrap();
    let guard = pool.acquire(Uuid::new_v4()).await.unwrap();
    let error = guard.program("echo").arg("x".repeat(10 << 20)).output().await.unwrap_err();
    assert!(error.to_string().contains("too big"), "{error}");
    let output = guard.command(r"printf '\377\000'").output().await.unwrap();
    assert_eq!(output.stdout, b"\xff\0");
    let output = guard.command("head -c 100000 /dev/zero").output_limit(1000).output();
    let output = output.await.unwrap();
    assert_eq!((output.stdout.len(), output.stdout_cut), (1000, 99_000));
    let output = guard.command("cat").stdin("fed").output().await.unwrap();
    assert_eq!(output.stdout, b"fed");
    let late = guard.command("echo before; sleep 1000").timeout(Duration::from_millis(300));
    let output = late.output().await.unwrap();
    assert_eq!((output.exit, output.stdout), (Exit::TimedOut, b"before\n".to_vec()));
    // Left in the background with its output held open: not waited for.
    let output = guard.command("sleep 1000 & echo done").output().await.unwrap();
    assert_eq!(output.stdout, b"done\n");
    // Nothing of the host's environment, unless it is asked for.
    let path = guard.command("echo $CARGO_PKG_NAME").output().await.unwrap();
    assert_eq!(path.stdout, b"\n");
    let asked = guard.command("echo $CARGO_PKG_NAME").inherit_env("CARGO_PKG_NAME");
    assert_eq!(asked.output().await.unwrap().stdout, b"denizen\n");
}

/// Drops an acquire at its first, second, third … poll: nothing may leak.
#[tokio::test]
async fn an_acquire_dropped_at_any_poll_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.max_vms = 2;
    let pool = MicroVmManager::new(config).unwrap();
    let id = Uuid::new_v4();
    for polls in 0..40 {
        if polls % 3 == 0 {
            // New again, so that making it is cut off too.
            let _ = pool.remove(id).await;
        }
        let holder = if polls % 2 == 0 { pool.acquire(id).await.ok() } else { None };
        let mut acquire = Box::pin(pool.acquire(id));
        for _ in 0..polls {
            let mut context = Context::from_waker(Waker::noop());
            if let Poll::Ready(guard) = acquire.as_mut().poll(&mut context) {
                guard.unwrap();
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(acquire);
        drop(holder);
        let guard = tokio::time::timeout(Duration::from_secs(20), pool.acquire(id)).await;
        drop(guard.unwrap().unwrap());
        let info = pool.inspect(id).unwrap();
        assert!(!info.in_use && info.waiting == 0, "{info:?}");
    }
}

#[tokio::test]
async fn waiters_are_served_in_order_and_give_up_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.max_vms = 1;
    let builder = MicroVmManager::builder(config).acquire_timeout(Duration::from_millis(200));
    let pool = builder.build().unwrap();
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    let error = pool.acquire(id).await.unwrap_err();
    assert!(matches!(error, Error::AcquireTimeout { at_capacity: false, .. }), "{error}");
    let error = pool.acquire(Uuid::new_v4()).await.unwrap_err();
    assert!(matches!(error, Error::AcquireTimeout { at_capacity: true, .. }), "{error}");
    assert!(error.to_string().contains("at capacity"), "{error}");
    let order = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let mut callers = Vec::new();
    for n in 0..5 {
        let (theirs, order) = (pool.clone(), order.clone());
        let before = n;
        callers.push(tokio::spawn(async move {
            let guard = theirs.acquire(id).await.unwrap();
            order.lock().push(n);
            drop(guard);
        }));
        while pool.inspect(id).unwrap().waiting <= before {
            tokio::task::yield_now().await;
        }
    }
    drop(guard);
    for caller in callers {
        caller.await.unwrap();
    }
    assert_eq!(*order.lock(), [0, 1, 2, 3, 4]);
}
