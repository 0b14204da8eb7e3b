//! Sandboxes that are ready before anybody asks for them: each is given to one session, they
//! never take a place that is wanted, and what is given is as good as one made for it.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use denizen::{Error, EventKind, Isolation, MicroVmManager, Network, VmPoolRuntimeConfig};
use tempfile::TempDir;
use uuid::Uuid;

use crate::common::{cache, text};

struct World {
    folder: TempDir,
    config: VmPoolRuntimeConfig,
}

impl World {
    fn new(max_vms: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = denizen::VmPoolConfig {
            enabled: true,
            volume_root: folder.path().join("pool"),
            shell: "/bin/sh".into(),
            shell_args: vec!["-c".to_owned()],
            max_vms,
            backup_destination: Some(folder.path().join("backups")),
            ..denizen::VmPoolConfig::default()
        };
        Self { config: (&config).into(), folder }
    }

    /// A pool that has made its spares.
    async fn open(&self, spares: usize, network: Network) -> Arc<MicroVmManager> {
        let builder = MicroVmManager::builder(self.config.clone()).isolation(Isolation::Sandbox);
        let pool = builder.cache(cache()).spares(spares).network(network).build().unwrap();
        pool.run_maintenance_now().await.unwrap();
        pool
    }

    fn spares(&self) -> Vec<PathBuf> {
        let spares = std::fs::read_dir(self.folder.path().join("pool/.denizen/spares"));
        spares.unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    fn init_of(home: &Path) -> String {
        std::fs::read_to_string(home.join("init")).unwrap()
    }
}

async fn run(pool: &MicroVmManager, id: Uuid, line: &str) -> String {
    let guard = pool.acquire(id).await.unwrap();
    text(&guard, line).await
}

#[tokio::test]
async fn a_spare_is_given_to_one_session_and_its_place_is_filled_again() {
    let world = World::new(32);
    let pool = world.open(2, Network::None).await;
    let ready: BTreeSet<String> = world.spares().iter().map(|home| World::init_of(home)).collect();
    assert_eq!(ready.len(), 2);
    let ids = [Uuid::new_v4(), Uuid::new_v4()];
    let line = "touch /volume/mine /root/mine; ls /volume /root";
    let (a, b) = tokio::join!(run(&pool, ids[0], line), run(&pool, ids[1], line));
    assert_eq!((a.as_str(), b.as_str()), ("/root:\nmine\n\n/volume:\nmine\n", a.as_str()));
    let given: BTreeSet<String> =
        ids.iter().map(|id| World::init_of(&pool.session_folder(*id).unwrap())).collect();
    assert_eq!(given, ready, "each session has one of the spares");
    pool.run_maintenance_now().await.unwrap();
    assert_eq!(world.spares().len(), 2);
    // They go where sessions go, and come back without the spare they were.
    pool.stop(ids[0], false).await.unwrap();
    pool.backup(ids[0]).await.unwrap();
    assert_eq!(run(&pool, ids[0], "ls /root").await, "mine\n");
    let copy = pool.fork(ids[1]).await.unwrap();
    assert_eq!(run(&pool, copy, "ls /volume /root").await, a);
    pool.shutdown().await.unwrap();
    assert!(world.spares().is_empty());
}

#[tokio::test]
async fn spares_take_no_place_that_is_wanted() {
    let world = World::new(2);
    let pool = world.open(5, Network::None).await;
    assert_eq!(world.spares().len(), 2, "no more than there are places");
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    assert_eq!(run(&pool, a, "cat /proc/1/comm").await, "denizen-init\n");
    pool.run_maintenance_now().await.unwrap();
    assert_eq!(world.spares().len(), 1);
    let held = (pool.acquire(a).await.unwrap(), pool.acquire(b).await.unwrap());
    assert!(world.spares().is_empty());
    let error = pool.acquire(Uuid::new_v4()).await.unwrap_err();
    assert!(matches!(error, Error::AtCapacity { .. }), "{error}");
    drop(held);
    pool.backup(a).await.unwrap();
    let c = Uuid::new_v4();
    assert_eq!(run(&pool, c, "true").await, "", "the stopped one makes room");
    pool.remove(b).await.unwrap();
    pool.run_maintenance_now().await.unwrap();
    assert_eq!(world.spares().len(), 1, "in the place of what was removed");
    // One comes back from its backup: the spare that has its place ends first.
    assert_eq!(run(&pool, a, "cat /proc/1/comm").await, "denizen-init\n");
    assert!(world.spares().is_empty());
    pool.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_spare_that_has_died_is_given_to_nobody() {
    let world = World::new(32);
    let pool = world.open(1, Network::None).await;
    let spare = world.spares().remove(0);
    let nonce = World::init_of(&spare);
    // The process outside, by its number on record; all of the sandbox ends with it.
    let line = format!("denizen-init\0{}\0", nonce.trim());
    let inits: Vec<i32> = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let found = std::fs::read_to_string(format!("/proc/{pid}/cmdline"));
            found.is_ok_and(|found| found == line)
        })
        .collect();
    assert_eq!(inits.len(), 2, "one outside, one within");
    let handles: Vec<_> = inits
        .iter()
        .map(|pid| {
            let pid = rustix::process::Pid::from_raw(*pid).unwrap();
            rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap()
        })
        .collect();
    for handle in &handles {
        let _ = rustix::process::pidfd_send_signal(handle, rustix::process::Signal::KILL);
    }
    for handle in &handles {
        let mut ready = [rustix::event::PollFd::new(handle, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut ready, None).unwrap();
    }
    let id = Uuid::new_v4();
    assert_eq!(run(&pool, id, "cat /proc/1/comm").await, "denizen-init\n");
    assert_ne!(World::init_of(&pool.session_folder(id).unwrap()), nonce);
    assert!(!spare.exists());
    pool.shutdown().await.unwrap();
}

#[tokio::test]
async fn what_a_spare_is_refused_is_told_of_its_session() {
    let world = World::new(32);
    let network = Network::Filtered(["example.org".parse().unwrap()].into_iter().collect());
    let pool = world.open(1, network).await;
    assert_eq!(world.spares().len(), 1);
    let mut events = pool.events().unwrap();
    let id = Uuid::new_v4();
    let line = "curl -sS -o /dev/null -w '%{http_code}' http://elsewhere.example/";
    assert_eq!(run(&pool, id, line).await, "403");
    loop {
        let event = events.next().await.unwrap();
        assert_eq!(event.session, id);
        if let EventKind::Denied { host, .. } = event.kind {
            assert_eq!(host, "elsewhere.example");
            break;
        }
    }
    pool.shutdown().await.unwrap();
}

#[tokio::test]
async fn what_is_bootstrapped_is_made_when_it_is_wanted() {
    let mut world = World::new(32);
    let command = ["sh", "-c", "echo $PWD > made"].map(str::to_owned).to_vec();
    world.config.bootstrap_command = Some(command);
    let pool = world.open(3, Network::None).await;
    assert!(world.spares().is_empty());
    assert_eq!(run(&pool, Uuid::new_v4(), "cat made").await, "/volume\n");
    pool.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_creation_that_cannot_be_written_down_leaves_nothing() {
    for spares in [0, 1] {
        let world = World::new(8);
        let root = world.folder.path().join("pool");
        let registry = |statement: &str| {
            let registry = rusqlite::Connection::open(root.join(".denizen/registry.db")).unwrap();
            registry.execute_batch(statement).unwrap();
        };
        let pool = world.open(spares, Network::None).await;
        registry(
            "CREATE TRIGGER refuse BEFORE INSERT ON sessions BEGIN SELECT RAISE(FAIL, 'no'); END",
        );
        let id = Uuid::new_v4();
        let refused = pool.acquire(id).await.unwrap_err();
        assert!(refused.to_string().contains("no"), "{refused}");
        assert!(!root.join(id.to_string()).exists());
        registry("DROP TRIGGER refuse");
        pool.run_maintenance_now().await.unwrap();
        assert_eq!(world.spares().len(), spares);
        assert_eq!(run(&pool, id, "cat /proc/1/comm").await, "denizen-init\n");
        pool.shutdown().await.unwrap();
    }
}
