//! Full and read-only disks, for real: each test mounts file systems in a mount namespace of
//! its own, which ends with it.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

use denizen::{MicroVmManager, VmPoolConfig, VmPoolRuntimeConfig};
use uuid::Uuid;

/// Runs the test again, as root of new user and mount namespaces. True within.
fn apart(test: &str) -> bool {
    if std::env::var_os("DENIZEN_TEST_APART").is_some() {
        return true;
    }
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("DENIZEN_TEST_APART", "1")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    false
}

fn mount(options: &str, folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    let tmpfs = ["-t", "tmpfs", "-o", options, "tmpfs"];
    assert!(Command::new("mount").args(tmpfs).arg(folder).status().unwrap().success());
}

fn remount(options: &str, folder: &Path) {
    let options = format!("remount,{options}");
    let done = Command::new("mount").args(["-o", &options]).arg(folder).status().unwrap();
    assert!(done.success());
}

fn config(folder: &Path) -> VmPoolConfig {
    VmPoolConfig {
        enabled: true,
        volume_root: folder.join("root"),
        shell: "/bin/sh".into(),
        shell_args: vec!["-c".to_owned()],
        ..VmPoolConfig::default()
    }
}

fn open(config: &VmPoolConfig) -> denizen::Result<std::sync::Arc<MicroVmManager>> {
    MicroVmManager::new(VmPoolRuntimeConfig::from(config))
}

#[tokio::test]
async fn a_full_volume_root_refuses_one_call_and_keeps_the_others() {
    if !apart("a_full_volume_root_refuses_one_call_and_keeps_the_others") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    mount("size=4m", &config.volume_root);
    let pool = open(&config).unwrap();
    let (first, second) = (Uuid::new_v4(), Uuid::new_v4());
    let guard = pool.acquire(first).await.unwrap();
    let filled = guard.command("echo keep > kept; cat /dev/zero > fill").output().await.unwrap();
    assert!(!filled.exit.success());
    let error = pool.acquire(second).await.unwrap_err().to_string();
    assert!(error.contains("full") || error.contains("No space"), "{error}");
    // Who has a place goes on, and can make room.
    guard.command("rm fill").output().await.unwrap();
    drop(pool.acquire(second).await.unwrap());
    drop(guard);
    pool.shutdown().await.unwrap();
    drop(pool);
    let pool = loop {
        match open(&config) {
            Ok(pool) => break pool,
            Err(error) if error.to_string().contains("another") => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(pool.sessions().unwrap().len(), 2);
    let guard = pool.acquire(first).await.unwrap();
    assert_eq!(guard.command("cat kept").output().await.unwrap().stdout, b"keep\n");
}

#[tokio::test]
async fn a_full_or_read_only_destination_costs_no_data() {
    if !apart("a_full_or_read_only_destination_costs_no_data") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let destination = folder.path().join("backups");
    mount("size=64k", &destination);
    let config = VmPoolConfig {
        backup_after_seconds: Some(3600),
        backup_destination: Some(destination.clone()),
        ..config(folder.path())
    };
    let pool = open(&config).unwrap();
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    guard.command("head -c 1000000 /dev/urandom > file").output().await.unwrap();
    drop(guard);
    let left = || {
        let all = std::fs::read_dir(&destination).unwrap().flatten();
        all.filter(|entry| entry.file_name() != ".denizen").count()
    };
    let error = pool.backup(id).await.unwrap_err().to_string();
    assert!(error.contains("no space left"), "{error}");
    assert!(error.contains(destination.to_str().unwrap()), "names the place: {error}");
    assert_eq!(left(), 0, "nothing half-made stays");
    assert!(pool.inspect(id).unwrap().unsaved);
    remount("ro", &destination);
    let error = pool.backup(id).await.unwrap_err().to_string();
    assert!(error.contains("read-only"), "{error}");
    let guard = pool.acquire(id).await.unwrap();
    assert_eq!(std::fs::metadata(guard.workdir().join("file")).unwrap().len(), 1_000_000);
    drop(guard);
    remount("rw,size=8m", &destination);
    pool.backup(id).await.unwrap();
    assert_eq!(left(), 1);
}

#[tokio::test]
async fn a_read_only_volume_root_is_named() {
    if !apart("a_read_only_volume_root_is_named") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    mount("size=4m", &config.volume_root);
    remount("ro", &config.volume_root);
    for error in [config.validate().unwrap_err(), open(&config).unwrap_err()] {
        let error = error.to_string();
        assert!(error.contains(config.volume_root.to_str().unwrap()), "{error}");
        assert!(error.contains("Read-only"), "{error}");
    }
}
