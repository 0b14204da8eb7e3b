//! The contract the library began with: names, fields, defaults, wording.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use denizen::{MicroVmManager, VmExecutionGuard, VmPoolConfig, VmPoolRuntimeConfig};
use uuid::Uuid;

/// All fields written out: a thirteenth would not compile.
fn config(volume_root: &Path) -> VmPoolConfig {
    VmPoolConfig {
        enabled: true,
        volume_root: volume_root.to_owned(),
        nix_profile: None,
        shell: PathBuf::from("/bin/sh"),
        shell_args: vec!["-c".to_owned()],
        env: HashMap::from([("ANSWER".to_owned(), "42".to_owned())]),
        max_vms: 4,
        idle_shutdown_seconds: 60,
        prune_after_seconds: 120,
        backup_after_seconds: None,
        backup_destination: None,
        bootstrap_command: None,
    }
}

#[test]
fn defaults() {
    let config = VmPoolConfig::default();
    assert!(!config.enabled);
    assert_eq!(config.shell, Path::new("/bin/bash"));
    assert_eq!(config.shell_args, ["-lc"]);
    assert_eq!(config.max_vms, 32);
    assert_eq!(config.idle_shutdown_seconds, 900);
    assert_eq!(config.prune_after_seconds, 3600);
    assert_eq!(config.env, HashMap::new());
    assert_eq!(config.nix_profile, None);
    assert_eq!(config.backup_after_seconds, None);
    assert_eq!(config.backup_destination, None);
    assert_eq!(config.bootstrap_command, None);
    config.validate().unwrap();
}

#[test]
fn serde_takes_part_of_the_fields_and_no_others() {
    let config: VmPoolConfig = serde_json::from_str(r#"{"enabled": true, "max_vms": 7}"#).unwrap();
    assert!(config.enabled);
    assert_eq!((config.max_vms, config.prune_after_seconds), (7, 3600));
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<VmPoolConfig>(&text).unwrap(), config);
    let error = serde_json::from_str::<VmPoolConfig>(r#"{"max_vm": 7}"#).unwrap_err();
    assert!(error.to_string().contains("max_vm"), "{error}");
}

#[test]
fn runtime_config_has_durations() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.backup_after_seconds = Some(300);
    config.backup_destination = Some(PathBuf::from("/backups"));
    let runtime = VmPoolRuntimeConfig::from(&config);
    let VmPoolRuntimeConfig {
        enabled,
        volume_root,
        nix_profile,
        shell,
        shell_args,
        env,
        max_vms,
        idle_shutdown,
        prune_after,
        backup_after,
        backup_destination,
        bootstrap_command,
    } = runtime.clone();
    assert!(enabled);
    assert_eq!(volume_root, folder.path());
    assert_eq!((nix_profile, bootstrap_command), (None, None));
    assert_eq!((shell, shell_args), (config.shell, config.shell_args));
    assert_eq!((env, max_vms), (config.env, 4));
    assert_eq!(idle_shutdown, Duration::from_secs(60));
    assert_eq!(prune_after, Duration::from_secs(120));
    assert_eq!(backup_after, Some(Duration::from_secs(300)));
    assert_eq!(backup_destination, Some(PathBuf::from("/backups")));
    assert!(format!("{runtime:?}").contains("VmPoolRuntimeConfig"));
}

#[test]
fn validate_names_the_field() {
    let folder = tempfile::tempdir().unwrap();
    let blocked = folder.path().join("file");
    std::fs::write(&blocked, "").unwrap();
    type Change = fn(&mut VmPoolConfig);
    let changes: [(&str, Change); 6] = [
        ("max_vms", |c| c.max_vms = 0),
        ("idle_shutdown_seconds", |c| c.idle_shutdown_seconds = 0),
        ("prune_after_seconds", |c| c.prune_after_seconds = 0),
        ("backup_after_seconds", |c| c.backup_after_seconds = Some(1)),
        ("bootstrap_command", |c| c.bootstrap_command = Some(Vec::new())),
        ("volume_root", |c| c.volume_root = c.volume_root.join("file/below")),
    ];
    config(folder.path()).validate().unwrap();
    for (field, change) in changes {
        let mut config = config(folder.path());
        change(&mut config);
        let message = config.validate().unwrap_err().to_string();
        assert!(message.contains(field), "{field}: {message}");
    }
    let mut zero = config(folder.path());
    zero.backup_destination = Some(folder.path().join("backups"));
    zero.backup_after_seconds = Some(0);
    assert!(zero.validate().unwrap_err().to_string().contains("backup_after_seconds"));
    zero.backup_after_seconds = Some(1);
    zero.validate().unwrap();
}

#[tokio::test]
async fn a_disabled_pool_touches_nothing_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&folder.path().join("never"));
    config.enabled = false;
    let pool = MicroVmManager::new(VmPoolRuntimeConfig::from(&config)).unwrap();
    assert!(!pool.is_enabled());
    let error = pool.acquire(Uuid::new_v4()).await.unwrap_err();
    assert!(error.to_string().contains("disabled"), "{error}");
    pool.run_maintenance_now().await.unwrap();
    assert!(!config.volume_root.exists());
}

#[test]
fn outside_of_a_runtime_is_an_error_not_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    let error = MicroVmManager::new(VmPoolRuntimeConfig::from(&config(folder.path()))).unwrap_err();
    assert!(error.to_string().contains("runtime"), "{error}");
}

#[tokio::test]
async fn guard_and_debug() {
    fn is_send<T: Send + 'static>(_: &T) {}
    let folder = tempfile::tempdir().unwrap();
    let pool = MicroVmManager::new(VmPoolRuntimeConfig::from(&config(folder.path()))).unwrap();
    let id = Uuid::new_v4();
    let guard: VmExecutionGuard = pool.acquire(id).await.unwrap();
    is_send(&guard);
    assert_eq!(guard.session_id(), id);
    assert_eq!(guard.shell_path(), Path::new("/bin/sh"));
    assert_eq!(guard.shell_args(), ["-c"]);
    assert_eq!(guard.environment()["ANSWER"], "42");
    assert_eq!(guard.workdir(), folder.path().join(id.to_string()).join("volume"));
    assert!(guard.workdir().is_dir());
    let debug = format!("{pool:?}");
    for part in ["MicroVmManager", "enabled: true", "volume_root", "active_vms: 1"] {
        assert!(debug.contains(part), "{debug}");
    }
    // The seed's callers run their own commands in the folder.
    std::fs::write(guard.workdir().join("file"), "kept").unwrap();
    drop(guard);
    let guard = pool.acquire(id).await.unwrap();
    assert_eq!(std::fs::read(guard.workdir().join("file")).unwrap(), b"kept");
}

#[tokio::test]
async fn a_full_pool_says_at_capacity() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.max_vms = 1;
    let pool = MicroVmManager::new(VmPoolRuntimeConfig::from(&config)).unwrap();
    let _guard = pool.acquire(Uuid::new_v4()).await.unwrap();
    let error = pool.acquire(Uuid::new_v4()).await.unwrap_err();
    assert!(error.to_string().contains("at capacity"), "{error}");
}

#[tokio::test]
async fn errors_go_into_anyones_error_type() {
    async fn caller(pool: &MicroVmManager) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        pool.acquire(Uuid::new_v4()).await?;
        Ok(())
    }
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.enabled = false;
    let pool = MicroVmManager::new(VmPoolRuntimeConfig::from(&config)).unwrap();
    assert!(caller(&pool).await.is_err());
}
