//! What a caller of the library waits for. `cargo xtask bench` measures the same beside the
//! tools one would use instead, and writes `docs/benchmarks.md`.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::sync::Arc;

use denizen::{MicroVmManager, VmPoolConfig};
use divan::Bencher;
use tokio::runtime::Runtime;
use uuid::Uuid;

fn main() {
    divan::main();
}

struct Pool {
    // Dropped before the folder is.
    pool: Arc<MicroVmManager>,
    runtime: Runtime,
    _folder: tempfile::TempDir,
}

/// A pool that finds so many sessions at its start.
fn pool(sessions: usize) -> Pool {
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..sessions {
        let session = folder.path().join(Uuid::new_v4().to_string());
        std::fs::create_dir_all(session.join("volume")).unwrap();
    }
    let runtime = Runtime::new().unwrap();
    let pool = runtime.block_on(async { open(folder.path()) });
    Pool { pool, runtime, _folder: folder }
}

fn open(root: &Path) -> Arc<MicroVmManager> {
    let config = VmPoolConfig {
        enabled: true,
        volume_root: root.to_owned(),
        max_vms: 1_000_000,
        ..VmPoolConfig::default()
    };
    MicroVmManager::new((&config).into()).unwrap()
}

#[divan::bench]
fn warm_acquire_and_release(bencher: Bencher<'_, '_>) {
    let Pool { pool, runtime, .. } = &pool(0);
    let session = Uuid::new_v4();
    runtime.block_on(async { drop(pool.acquire(session).await.unwrap()) });
    bencher.bench_local(|| runtime.block_on(async { drop(pool.acquire(session).await.unwrap()) }));
}

#[divan::bench(args = [1_000, 10_000])]
fn maintenance_pass(bencher: Bencher<'_, '_>, sessions: usize) {
    let Pool { pool, runtime, .. } = &pool(sessions);
    bencher.bench_local(|| runtime.block_on(pool.run_maintenance_now()).unwrap());
}

#[divan::bench]
fn exec_true_in_a_warm_session(bencher: Bencher<'_, '_>) {
    let Pool { pool, runtime, .. } = &pool(0);
    let guard = runtime.block_on(pool.acquire(Uuid::new_v4())).unwrap();
    bencher.bench_local(|| runtime.block_on(guard.program("/bin/true").output()).unwrap());
}
