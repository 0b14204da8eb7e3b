//! Idle sessions that are frozen rather than stopped. The last test runs all of it again where
//! control groups are of version 1.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command as Program, Output};
use std::sync::Arc;
use std::time::Duration;

use denizen::{
    Builder, Error, EventKind, Events, Isolation, MicroVmManager, Sleep, VmPoolConfig,
    VmPoolRuntimeConfig,
};
use parking_lot::Mutex;
use tempfile::TempDir;
use uuid::Uuid;

use crate::common::{Manual, cache, opened, text};

const IDLE: Duration = Duration::from_secs(60);
const BACKUP: Duration = Duration::from_secs(100);
const PRUNE: Duration = Duration::from_secs(200);

/// Counts for ever, a number a line, and says so when it is told to end.
const COUNT: &str = "echo kept > /tmp/kept; echo kept > /dev/shm/kept
    (trap 'echo told > told; exit' TERM
    while :; do i=$((i+1)); echo $i >> count; sleep 0.01; done) > /dev/null 2>&1 &
    echo $! > pid";

struct World {
    folder: TempDir,
    clock: Arc<Manual>,
    config: VmPoolRuntimeConfig,
    background_is_use: bool,
    /// The control groups that sessions had when they were frozen.
    groups: Mutex<HashMap<Uuid, Vec<PathBuf>>>,
}

impl World {
    /// None where this test may not freeze anything.
    fn new() -> Option<Self> {
        if !may_freeze() {
            println!("skipped: no control group that can be frozen is granted");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let config = VmPoolConfig {
            enabled: true,
            volume_root: folder.path().join("pool"),
            shell: "/bin/sh".into(),
            shell_args: vec!["-c".to_owned()],
            idle_shutdown_seconds: IDLE.as_secs(),
            backup_after_seconds: Some(BACKUP.as_secs()),
            prune_after_seconds: PRUNE.as_secs(),
            backup_destination: Some(folder.path().join("backups")),
            ..VmPoolConfig::default()
        };
        let config = (&config).into();
        let (clock, groups) = Default::default();
        Some(Self { folder, clock, config, background_is_use: false, groups })
    }

    fn open(&self) -> Arc<MicroVmManager> {
        self.builder().build().unwrap()
    }

    fn builder(&self) -> Builder {
        let builder = MicroVmManager::builder(self.config.clone()).clock(self.clock.clone());
        let builder = builder.isolation(Isolation::Sandbox).sleep(Sleep::Freeze);
        builder.background_is_use(self.background_is_use).cache(cache())
    }

    /// Lets time pass, and what is due then be done.
    async fn pass(&self, pool: &MicroVmManager, time: Duration) {
        self.clock.pass(time);
        pool.run_maintenance_now().await.unwrap();
    }

    /// A session that counts, and is frozen.
    async fn frozen(&self, pool: &MicroVmManager) -> Uuid {
        let id = counting(pool).await;
        self.pass(pool, IDLE).await;
        assert_eq!(pool.inspect(id).unwrap().state, "frozen");
        let record = pool.session_folder(id).unwrap().join("groups");
        let record = std::fs::read_to_string(record).unwrap();
        self.groups.lock().insert(id, record.lines().map(PathBuf::from).collect());
        assert!(!self.groups(id).is_empty());
        id
    }

    /// The control groups of a session that are there.
    fn groups(&self, id: Uuid) -> Vec<PathBuf> {
        let groups = self.groups.lock().get(&id).cloned().unwrap_or_default();
        groups.into_iter().filter(|group| group.exists()).collect()
    }
}

/// Whether a group that can be frozen can be made, by the simplest way to find out.
fn may_freeze() -> bool {
    let places = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/freezer"];
    places.iter().any(|place| {
        let probe = Path::new(place).join(format!("denizen-probe-{}", Uuid::new_v4()));
        let made = std::fs::create_dir(&probe).is_ok();
        let found = ["cgroup.freeze", "freezer.state"].iter().any(|it| probe.join(it).exists());
        let _ = std::fs::remove_dir(&probe);
        made && found
    })
}

/// A new session that counts, and that nobody holds.
async fn counting(pool: &MicroVmManager) -> Uuid {
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    text(&guard, COUNT).await;
    drop(guard);
    goes_on(pool, id, 0).await;
    id
}

/// How far a session has counted; it must not have begun anew.
fn count(pool: &MicroVmManager, id: Uuid) -> usize {
    let file = pool.session_folder(id).unwrap().join("volume/count");
    let text = std::fs::read_to_string(file).unwrap_or_default();
    // The last line may be on its way.
    let lines: Vec<&str> = text.split_inclusive('\n').filter(|it| it.ends_with('\n')).collect();
    for (at, line) in lines.iter().enumerate() {
        assert_eq!(line.trim(), (at + 1).to_string());
    }
    lines.len()
}

/// What another process does has no event to wait for.
async fn until(what: &str, condition: impl Fn() -> bool) {
    let begin = std::time::Instant::now();
    while !condition() {
        assert!(begin.elapsed() < Duration::from_secs(30), "waited in vain until {what}");
        tokio::task::yield_now().await;
    }
}

/// Waits until a session has counted on.
async fn goes_on(pool: &MicroVmManager, id: Uuid, from: usize) {
    until("it counts on", || count(pool, id) > from + 2).await;
}

/// Waits for the events of these names, in this order, whatever comes between.
async fn hear(events: &mut Events, names: &[&str]) {
    for name in names {
        let next = async {
            loop {
                let event = events.next().await.unwrap();
                let json = serde_json::to_value(&event).unwrap();
                if json["event"] == **name {
                    return;
                }
            }
        };
        let heard = tokio::time::timeout(Duration::from_secs(30), next).await;
        assert!(heard.is_ok(), "no {name}");
    }
}

#[tokio::test]
async fn what_runs_stands_still_and_goes_on_where_it_was() {
    let Some(world) = World::new() else { return };
    let pool = world.open();
    assert!(pool.can_freeze().unwrap());
    let mut events = pool.events().unwrap();
    let id = world.frozen(&pool).await;
    hear(&mut events, &["created", "started", "frozen"]).await;
    if std::env::var_os("DENIZEN_TEST_VERSION_ONE").is_some() {
        assert!(world.groups(id).iter().any(|it| it.starts_with("/sys/fs/cgroup/freezer")));
    }
    let before = count(&pool, id);
    let pid = pool.session_folder(id).unwrap().join("volume/pid");
    let pid = std::fs::read_to_string(pid).unwrap();
    // Another one counts meanwhile.
    let other = counting(&pool).await;
    goes_on(&pool, other, 20).await;
    assert_eq!(count(&pool, id), before);
    let guard = pool.acquire(id).await.unwrap();
    hear(&mut events, &["thawed"]).await;
    assert_eq!(text(&guard, "kill -0 $(cat pid) && cat pid").await, pid);
    assert_eq!(text(&guard, "cat /tmp/kept /dev/shm/kept").await, "kept\nkept\n");
    goes_on(&pool, id, before).await;
    drop(guard);
    // It is idle from now on, not from before.
    world.pass(&pool, IDLE / 2).await;
    assert_eq!(pool.inspect(id).unwrap().state, "active");
    world.pass(&pool, IDLE / 2).await;
    assert_eq!(pool.inspect(id).unwrap().state, "frozen");
    pool.shutdown().await.unwrap();
    assert_eq!(world.groups(id), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn what_counts_as_use_is_not_frozen() {
    let Some(mut world) = World::new() else { return };
    world.background_is_use = true;
    let pool = world.open();
    let mut events = pool.events().unwrap();
    let id = counting(&pool).await;
    world.pass(&pool, IDLE).await;
    hear(&mut events, &["still_running"]).await;
    assert_eq!(pool.inspect(id).unwrap().state, "active");
    goes_on(&pool, id, count(&pool, id)).await;
    let guard = pool.acquire(id).await.unwrap();
    text(&guard, "kill $(cat pid); while kill -0 $(cat pid); do :; done 2> /dev/null").await;
    drop(guard);
    world.pass(&pool, IDLE).await;
    assert_eq!(pool.inspect(id).unwrap().state, "frozen");
    // Nothing ran in it: there is nothing new to save when it is ended.
    world.pass(&pool, BACKUP).await;
    hear(&mut events, &["frozen", "backed_up"]).await;
    world.pass(&pool, PRUNE).await;
    hear(&mut events, &["stopped", "archived"]).await;
    assert_eq!(pool.backups(id).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_frozen_session_is_saved_as_it_stands_and_told_before_it_is_pruned() {
    let Some(world) = World::new() else { return };
    let pool = world.open();
    let mut events = pool.events().unwrap();
    let id = world.frozen(&pool).await;
    assert!(pool.inspect(id).unwrap().unsaved);
    world.pass(&pool, BACKUP).await;
    let saved = pool.inspect(id).unwrap();
    assert_eq!((saved.state, saved.unsaved), ("frozen", false));
    // What it does when it is thawed is not in that backup.
    let before = count(&pool, id);
    drop(pool.acquire(id).await.unwrap());
    assert!(pool.inspect(id).unwrap().unsaved);
    goes_on(&pool, id, before).await;
    world.pass(&pool, IDLE).await;
    let before = count(&pool, id);
    world.pass(&pool, BACKUP).await;
    world.pass(&pool, PRUNE).await;
    let order = ["frozen", "backed_up", "thawed", "frozen", "backed_up", "stopped"];
    hear(&mut events, &order).await;
    // What it did when it was told to end is.
    hear(&mut events, &["backed_up", "archived"]).await;
    assert_eq!(world.groups(id), Vec::<PathBuf>::new());
    let guard = pool.acquire(id).await.unwrap();
    assert_eq!(text(&guard, "cat told").await, "told\n");
    assert!(count(&pool, id) >= before);
}

#[tokio::test]
async fn whatever_is_wanted_of_a_frozen_session_is_done() {
    let Some(world) = World::new() else { return };
    let pool = world.open();
    let told = |id| pool.session_folder(id).unwrap().join("volume/told");
    // Stopped, its processes are told.
    let id = world.frozen(&pool).await;
    pool.stop(id, false).await.unwrap();
    assert_eq!(pool.inspect(id).unwrap().state, "stopped");
    assert!(told(id).exists());
    // Saved, they are left alone; also if it was not frozen before.
    let id = counting(&pool).await;
    pool.backup(id).await.unwrap();
    let first = pool.inspect(id).unwrap();
    assert_eq!((first.state, first.unsaved), ("frozen", false));
    pool.backup(id).await.unwrap();
    assert_eq!(pool.inspect(id).unwrap().backup, first.backup);
    assert!(!told(id).exists());
    // A copy of it.
    let fork = pool.fork(id).await.unwrap();
    assert!(count(&pool, fork) > 0);
    // Put back as it was.
    world.pass(&pool, IDLE).await;
    assert_eq!(pool.inspect(id).unwrap().state, "frozen");
    pool.restore(id, first.backup.as_deref()).await.unwrap();
    assert!(!told(id).exists());
    assert_eq!(pool.inspect(id).unwrap().state, "stopped");
    // Removed.
    let id = world.frozen(&pool).await;
    pool.remove(id).await.unwrap();
    assert!(matches!(pool.inspect(id), Err(Error::Unknown { .. })));
    assert_eq!(world.groups(id), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_frozen_session_makes_room_and_comes_back() {
    let Some(mut world) = World::new() else { return };
    world.config.max_vms = 1;
    let pool = world.open();
    let id = world.frozen(&pool).await;
    let before = count(&pool, id);
    drop(pool.acquire(Uuid::new_v4()).await.unwrap());
    assert_eq!(pool.inspect(id).unwrap().state, "archived");
    assert_eq!(world.groups(id), Vec::<PathBuf>::new());
    let guard = pool.acquire(id).await.unwrap();
    assert_eq!(text(&guard, "cat told").await, "told\n");
    assert!(count(&pool, id) >= before);
}

#[tokio::test]
async fn a_pool_that_is_dropped_leaves_nothing_frozen() {
    let Some(world) = World::new() else { return };
    let pool = world.open();
    let id = world.frozen(&pool).await;
    drop(pool);
    let members = || -> Vec<String> {
        let all =
            world.groups(id).into_iter().map(|it| std::fs::read_to_string(it.join("cgroup.procs")));
        all.flatten().filter(|it| !it.is_empty()).collect()
    };
    until("its processes are gone", || members().is_empty()).await;
    // The next one finds the session, as soon as what the first was writing is written.
    let pool = opened(|| world.builder()).await;
    assert!(count(&pool, id) > 0);
    assert_eq!(pool.inspect(id).unwrap().state, "stopped");
    assert_eq!(world.groups(id), Vec::<PathBuf>::new());
    // Also where its folder has vanished, with what is on record there.
    let id = world.frozen(&pool).await;
    std::fs::remove_dir_all(pool.session_folder(id).unwrap()).unwrap();
    drop(pool);
    let members = || -> Vec<String> {
        let all = world.groups(id).into_iter();
        let all = all.map(|it| std::fs::read_to_string(it.join("cgroup.procs")));
        all.flatten().filter(|it| !it.is_empty()).collect()
    };
    until("its processes are gone", || members().is_empty()).await;
}

#[tokio::test]
async fn sessions_that_cannot_be_frozen_are_refused_from_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let config = VmPoolConfig {
        enabled: true,
        volume_root: folder.path().join("pool"),
        ..VmPoolConfig::default()
    };
    let builder = || MicroVmManager::builder((&config).into()).cache(cache());
    let error = builder().sleep(Sleep::Freeze).build().unwrap_err();
    assert!(matches!(error, Error::NoFreezer { isolation: "host", .. }), "{error}");
    assert!(error.to_string().contains("set isolation to `sandbox`"), "{error}");
    let pool = builder().build().unwrap();
    assert!(!pool.can_freeze().unwrap());
    drop(pool);
    let barred = std::env::var_os("DENIZEN_TEST_BARRED").is_some();
    if may_freeze() && !barred {
        // Again, where no control groups may be made.
        let bar = "for at in $(sed -n 's/.* \\(\\/sys\\/fs\\/cgroup[^ ]*\\) .* - cgroup2\\? .*/\\1/p' \
                   /proc/self/mountinfo); do mount -o remount,bind,ro \"$at\"; done";
        let name = "sessions_that_cannot_be_frozen_are_refused_from_the_start";
        let output = again(bar, &["--exact", name], "DENIZEN_TEST_BARRED");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let sandbox = || builder().isolation(Isolation::Sandbox);
    let error = sandbox().sleep(Sleep::Freeze).build().unwrap_err();
    assert!(matches!(error, Error::NoFreezer { isolation: "sandbox", .. }), "{error}");
    assert!(error.to_string().contains("Delegate=yes"), "{error}");
    // Without, all else goes on.
    let pool = sandbox().build().unwrap();
    assert!(!pool.can_freeze().unwrap());
}

#[tokio::test]
async fn what_cannot_be_thawed_is_started_anew() {
    // In a mount namespace of the test's own.
    if std::env::var_os("DENIZEN_TEST_STUCK").is_none() {
        if may_freeze() && std::env::var_os("DENIZEN_TEST_VERSION_ONE").is_none() {
            let output = again(
                ":",
                &["--exact", "what_cannot_be_thawed_is_started_anew"],
                "DENIZEN_TEST_STUCK",
            );
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && said.contains("1 passed"), "{said}");
        }
        return;
    }
    let Some(world) = World::new() else { return };
    let pool = world.open();
    let mut events = pool.events().unwrap();
    let id = world.frozen(&pool).await;
    let file =
        world.groups(id).into_iter().map(|it| it.join("cgroup.freeze")).find(|it| it.exists());
    // Only version 2 says elsewhere what has come of it.
    let Some(file) = file else { return };
    let nowhere = world.folder.path().join("nowhere");
    std::fs::write(&nowhere, "").unwrap();
    let run = |program: &str, args: &[&Path]| {
        assert!(Program::new(program).args(args).status().unwrap().success());
    };
    run("mount", &[Path::new("--bind"), &nowhere, &file]);
    let acquired = {
        let pool = pool.clone();
        tokio::spawn(async move { pool.acquire(id).await })
    };
    loop {
        let event = events.next().await.unwrap();
        if let EventKind::Failed { operation, error, .. } = event.kind {
            assert_eq!(operation, "thaw", "{error}");
            assert!(error.contains("stay frozen"), "{error}");
            break;
        }
    }
    run("umount", &[&file]);
    let guard = acquired.await.unwrap().unwrap();
    hear(&mut events, &["stopped", "started"]).await;
    assert_eq!(text(&guard, "kill -0 $(cat pid) 2> /dev/null || echo gone").await, "gone\n");
    assert!(count(&pool, id) > 0);
}

/// Runs tests of this program in a mount namespace that is prepared by a line of shell.
fn again(prepare: &str, tests: &[&str], variable: &str) -> Output {
    let line = format!("{prepare} && exec \"$0\" \"$@\"");
    let mut unshare = Program::new("unshare");
    unshare.args(["--mount", "sh", "-c", &line]).arg(std::env::current_exe().unwrap());
    unshare.args(tests).arg("--nocapture").env(variable, "1").output().unwrap()
}

#[test]
fn all_of_it_again_where_control_groups_are_of_version_1() {
    let unified = Path::new("/sys/fs/cgroup/unified");
    if std::env::var_os("DENIZEN_TEST_VERSION_ONE").is_some() {
        return;
    }
    if !may_freeze() || !unified.exists() || !Path::new("/sys/fs/cgroup/freezer").exists() {
        println!("skipped: this machine does not have both");
        return;
    }
    let variable = "DENIZEN_TEST_VERSION_ONE";
    let output = again("umount /sys/fs/cgroup/unified", &["--test-threads=2"], variable);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("test result: ok. 9 passed"), "{said}");
}
