#![allow(clippy::unwrap_used)]

use super::*;

fn pool(folder: &Path) -> Arc<MicroVmManager> {
    let config = denizen::VmPoolConfig {
        enabled: true,
        volume_root: folder.join("pool"),
        ..denizen::VmPoolConfig::default()
    };
    MicroVmManager::builder((&config).into()).isolation(Isolation::Host).build().unwrap()
}

#[tokio::test(start_paused = true)]
async fn what_needs_no_session_keeps_the_daemon_too() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(folder.path());
    let leases = Leases::new(pool.clone(), KeptLogs::default());
    let limit = Duration::from_secs(60);
    let busy = leases.busy();
    let left = tokio::time::timeout(limit * 10, idle(&pool, &leases, Some(limit))).await;
    left.unwrap_err();
    drop(busy);
    let begin = tokio::time::Instant::now();
    idle(&pool, &leases, Some(limit)).await;
    assert!(begin.elapsed() >= limit && begin.elapsed() < limit * 2);
}
