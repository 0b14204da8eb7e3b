//! What only a machine of a session's own does: it sleeps in a file and goes on, has a disk that
//! gives back what is deleted, and a memory that is all there is.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::BufRead;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use denizen::{
    Builder, Error, EventKind, Events, Isolation, Limits, MicroVmManager, Network, Sleep,
    VmExecutionGuard, VmPoolConfig, VmPoolRuntimeConfig,
};
use denizen_agent::{Child, Output, Spec, Stdio};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use uuid::Uuid;

use crate::common::{Manual, cache, isolated, limits, opened, server, text};

const IDLE: Duration = Duration::from_secs(60);
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Writes down its number, then counts for ever.
const COUNT: &str = "(echo kept > /dev/shm/kept; setsid sh -c \
                     'echo $$ > pid; while :; do echo >> count; sleep 0.05; done' \
                     > /dev/null 2>&1 &)";

struct World {
    _folder: Option<TempDir>,
    cache: PathBuf,
    clock: Arc<Manual>,
    config: VmPoolRuntimeConfig,
    limits: Limits,
    network: Network,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let world = Self::at(folder.path());
        Self { _folder: Some(folder), ..world }
    }

    fn at(folder: &Path) -> Self {
        let config = VmPoolConfig {
            enabled: true,
            volume_root: folder.join("pool"),
            shell: "/bin/sh".into(),
            shell_args: vec!["-c".to_owned()],
            idle_shutdown_seconds: IDLE.as_secs(),
            backup_destination: Some(folder.join("backups")),
            ..VmPoolConfig::default()
        };
        Self {
            _folder: None,
            cache: cache(),
            clock: Arc::default(),
            config: (&config).into(),
            limits: limits(Isolation::MicroVm),
            network: Network::None,
        }
    }

    fn builder(&self) -> Builder {
        let builder = isolated(MicroVmManager::builder(self.config.clone()), Isolation::MicroVm);
        let builder = builder.clock(self.clock.clone()).limits(self.limits.clone());
        let builder = builder.network(self.network.clone()).cache(&self.cache);
        builder.sleep(Sleep::Freeze).background_is_use(false)
    }

    async fn open(&self) -> Arc<MicroVmManager> {
        opened(|| self.builder()).await
    }

    /// Has what nobody holds fall asleep.
    async fn idle(&self, pool: &MicroVmManager) {
        self.clock.pass(IDLE);
        pool.run_maintenance_now().await.unwrap();
    }

    /// The same, of one of which that is expected.
    async fn sleep(&self, pool: &MicroVmManager, id: Uuid) {
        self.idle(pool).await;
        assert_eq!(pool.inspect(id).unwrap().state, "frozen");
        assert_eq!(machines(id), [0; 0]);
        assert!(memory(pool, id).exists());
    }
}

fn memory(pool: &MicroVmManager, id: Uuid) -> PathBuf {
    pool.session_folder(id).unwrap().join("memory")
}

/// The processes that run a session's guest: they see its folder.
fn machines(id: Uuid) -> Vec<i32> {
    let of = |pid: &i32| {
        let file = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        file("cmdline").starts_with(b"/usr/bin/qemu-system")
            && String::from_utf8_lossy(&file("mountinfo")).contains(&id.to_string())
    };
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(of).collect()
}

fn kill(pids: &[i32]) {
    for pid in pids {
        // It may have ended.
        let _ = kill_process(Pid::from_raw(*pid).unwrap(), Signal::KILL);
    }
}

/// What other processes do has no event to wait for.
async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let begin = Instant::now();
    while !condition().await {
        assert!(begin.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::task::yield_now().await;
    }
}

/// Waits for the event that the first function finds.
async fn hear<T>(events: &mut Events, wanted: impl Fn(EventKind) -> Option<T>) -> T {
    let heard = async {
        loop {
            if let Some(heard) = wanted(events.next().await.unwrap().kind) {
                return heard;
            }
        }
    };
    tokio::time::timeout(PATIENCE, heard).await.unwrap()
}

/// Waits until a session tells that it has booted, and why.
async fn rebooted(events: &mut Events) -> String {
    hear(events, |kind| match kind {
        EventKind::Rebooted { reason } => Some(reason),
        _ => None,
    })
    .await
}

/// A session that counts; gives the counter's number.
async fn counting(pool: &MicroVmManager, id: Uuid) -> String {
    let guard = pool.acquire(id).await.unwrap();
    text(&guard, COUNT).await;
    until("it counts", async || text(&guard, "wc -l < count || true").await.len() > 2).await;
    text(&guard, "cat pid").await
}

/// Sees that the counter is the one that was started first, and that it counts.
async fn still_counts(guard: &VmExecutionGuard, pid: &str) {
    assert_eq!(
        text(guard, "kill -0 $(cat pid) && cat pid /dev/shm/kept").await,
        pid.to_owned() + "kept\n"
    );
    let before = text(guard, "wc -l < count").await;
    until("it counts on", async || text(guard, "wc -l < count").await != before).await;
}

/// A shell on a terminal.
struct Shell {
    child: Child,
    output: Output,
}

impl Shell {
    async fn start(guard: &VmExecutionGuard) -> Self {
        let mut spec = Spec::new("/bin/sh", guard.workdir());
        spec.args = vec!["-i".into()];
        spec.env.insert("PATH".into(), "/usr/bin".into());
        spec.stdio = Stdio::Pty { columns: 80, rows: 25 };
        let mut child = guard.agent().unwrap().spawn(spec).await.unwrap();
        let output = child.take_output().unwrap();
        Self { child, output }
    }

    async fn ask(
        &mut self,
        stdin: &mut (impl tokio::io::AsyncWrite + Unpin),
        line: &str,
        answer: &str,
    ) {
        stdin.write_all(format!("{line}\n").as_bytes()).await.unwrap();
        let mut heard = String::new();
        while !heard.contains(answer) {
            let chunk = tokio::time::timeout(PATIENCE, self.output.next()).await;
            let chunk = chunk.unwrap_or_else(|_| panic!("heard {heard:?} only")).unwrap().unwrap();
            heard.push_str(&String::from_utf8_lossy(&chunk.bytes));
        }
    }
}

// ---- Sleep ------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_sleeps_has_no_process_and_goes_on_where_it_was() {
    let world = World::new();
    let pool = world.open().await;
    assert!(pool.can_freeze().unwrap());
    let id = Uuid::new_v4();
    let pid = counting(&pool, id).await;
    let guard = pool.acquire(id).await.unwrap();
    let mut shell = Shell::start(&guard).await;
    let mut stdin = shell.child.take_stdin().unwrap();
    shell.ask(&mut stdin, "word=kept; echo so$((6*7))", "so42").await;
    let mut spec = Spec::new("/bin/cat", guard.workdir());
    spec.stdio = Stdio::Pipes { stdin: true };
    let mut cat = guard.agent().unwrap().spawn(spec).await.unwrap();
    let (mut into, mut from) = (cat.take_stdin().unwrap(), cat.take_output().unwrap());
    // A clock that nobody sets would go on from here.
    text(&guard, "date -s @1000000000").await;
    // It is the same one afterwards, whatever it has called itself.
    text(&guard, "hostname mine; echo mine > /etc/machine-id").await;
    assert_eq!(machines(id).len(), 1);
    drop(guard);
    for _ in 0..2 {
        world.sleep(&pool, id).await;
        let guard = pool.acquire(id).await.unwrap();
        let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let before = now();
        let within: u64 = text(&guard, "date +%s").await.trim().parse().unwrap();
        assert!((before - 1..=now() + 1).contains(&within), "{within} is not now");
        assert_eq!(machines(id).len(), 1);
        assert!(!memory(&pool, id).exists());
        assert_eq!(text(&guard, "hostname; cat /etc/machine-id").await, "mine\nmine\n");
        still_counts(&guard, &pid).await;
        shell.ask(&mut stdin, "echo $word$word", "keptkept").await;
        into.write_all(b"through").await.unwrap();
        assert_eq!(from.next().await.unwrap().unwrap().bytes, b"through"[..]);
        drop(guard);
    }
    drop(into);
    assert!(from.next().await.unwrap().is_none());
    assert_eq!(cat.wait().await.unwrap(), denizen_agent::Exit::Code(0));
    pool.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forks_are_others_and_what_runs_goes_on_in_them() {
    let world = World::new();
    let pool = world.open().await;
    let id = Uuid::new_v4();
    let pid = counting(&pool, id).await;
    let all = [id, pool.fork(id).await.unwrap(), pool.fork(id).await.unwrap()];
    let same = |line: &str| {
        let (pool, line) = (pool.clone(), line.to_owned());
        async move {
            let mut said = Vec::new();
            for id in all {
                said.push(text(&pool.acquire(id).await.unwrap(), &line).await);
            }
            assert!(said.iter().all(|it| it.len() > 1), "{said:?}");
            said.sort();
            said.dedup();
            said.len()
        }
    };
    for line in ["hostname", "cat /etc/machine-id", "head -c 16 /dev/urandom | sha256sum"] {
        assert_eq!(same(line).await, 3, "{line}");
    }
    for id in all {
        still_counts(&pool.acquire(id).await.unwrap(), &pid).await;
    }
    pool.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memory_that_does_not_fit_is_not_brought_back() {
    let mut world = World::new();
    let id = Uuid::new_v4();
    // Of other hardware; of a disk that was changed; damaged.
    let change_nothing = |_: &Path| {};
    let touch_disk = |home: &Path| {
        let disk = fs::File::options().write(true).open(home.join("volume/.denizen-disk")).unwrap();
        disk.set_modified(SystemTime::now()).unwrap();
    };
    let damage = |home: &Path| {
        let path = home.join("memory");
        let mut memory = fs::read(&path).unwrap();
        let middle = memory.len() / 2;
        memory[middle] ^= 1;
        fs::write(path, memory).unwrap();
    };
    let cases: [(u64, &dyn Fn(&Path), &str); 3] = [
        (256, &touch_disk, "the disk was changed since"),
        (256, &damage, ""),
        (320, &change_nothing, "another program, kernel, image or set of devices"),
    ];
    for (number, (memory, spoil, why)) in cases.into_iter().enumerate() {
        let pool = world.open().await;
        counting(&pool, id).await;
        let guard = pool.acquire(id).await.unwrap();
        text(&guard, &format!("echo {number} >> kept")).await;
        drop(guard);
        world.sleep(&pool, id).await;
        let home = pool.session_folder(id).unwrap();
        pool.leave().await.unwrap();
        drop(pool);
        spoil(&home);
        world.limits.memory_bytes = Some(memory << 20);
        let pool = world.open().await;
        let mut events = pool.events().unwrap();
        let guard = pool.acquire(id).await.unwrap();
        let reason = rebooted(&mut events).await;
        assert!(reason.contains(why), "{why}: {reason}");
        let kept: String = (0..=number).map(|number| format!("{number}\n")).collect();
        assert_eq!(text(&guard, "cat kept").await, kept);
        assert_eq!(text(&guard, "ls /dev/shm").await, "");
        drop(guard);
        pool.shutdown().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_put_back_has_no_memory_of_what_came_later() {
    let world = World::new();
    let pool = world.open().await;
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    text(&guard, "echo old > file").await;
    drop(guard);
    pool.backup(id).await.unwrap();
    let guard = pool.acquire(id).await.unwrap();
    text(&guard, "echo new > file; echo new > /dev/shm/new").await;
    drop(guard);
    counting(&pool, id).await;
    world.sleep(&pool, id).await;
    pool.restore(id, None).await.unwrap();
    let guard = pool.acquire(id).await.unwrap();
    assert_eq!(text(&guard, "cat file; ls; ls /dev/shm").await, "old\nfile\n");
    drop(guard);
    pool.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_pool_goes_on_with_what_was_left() {
    let world = World::new();
    let (asleep, awake) = (Uuid::new_v4(), Uuid::new_v4());
    let mut pool = world.open().await;
    let mut pids = Vec::new();
    for id in [asleep, awake] {
        pids.push(counting(&pool, id).await);
    }
    for _ in 0..2 {
        drop(pool.acquire(awake).await.unwrap());
        world.clock.pass(IDLE / 2);
        drop(pool.acquire(awake).await.unwrap());
        world.clock.pass(IDLE / 2);
        pool.run_maintenance_now().await.unwrap();
        let state = |id| pool.inspect(id).unwrap().state;
        assert_eq!((state(asleep), state(awake)), ("frozen", "active"));
        pool.leave().await.unwrap();
        drop(pool);
        assert_eq!([machines(asleep), machines(awake)], [[0; 0]; 2]);
        pool = world.open().await;
        for (id, pid) in [asleep, awake].into_iter().zip(&pids) {
            still_counts(&pool.acquire(id).await.unwrap(), pid).await;
        }
    }
    pool.shutdown().await.unwrap();
}

// ---- The machine is killed --------------------------------------------------------------

/// A session whose machine was killed: until that is noticed, commands are told that they are
/// lost.
async fn again(pool: &MicroVmManager, id: Uuid) -> VmExecutionGuard {
    let guard = pool.acquire(id).await.unwrap();
    until("it is another one", async || match guard.command("true").output().await {
        Ok(output) => output.exit.success(),
        Err(Error::Agent(denizen_agent::Error::InitLost)) => false,
        Err(error) => panic!("{error}"),
    })
    .await;
    guard
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_is_killed_is_another_one_with_the_same_disk() {
    let world = World::new();
    let pool = world.open().await;
    let id = Uuid::new_v4();
    let mut kept = String::new();
    let mut step = 0;
    let mut keep = async |guard: &VmExecutionGuard| {
        step += 1;
        text(guard, &format!("echo {step} >> kept")).await;
        kept.push_str(&format!("{step}\n"));
        kept.clone()
    };
    // While it is idle.
    let guard = pool.acquire(id).await.unwrap();
    let mut expected = keep(&guard).await;
    kill(&machines(id));
    until("it is gone", async || machines(id).is_empty()).await;
    drop(guard);
    // While a command runs.
    let guard = again(&pool, id).await;
    assert_eq!(text(&guard, "cat kept").await, expected);
    let running = guard.command("echo on; sleep 1000").spawn().await.unwrap();
    expected = keep(&guard).await;
    kill(&machines(id));
    let ended = tokio::time::timeout(PATIENCE, running.wait()).await.unwrap();
    assert!(ended.is_err() || !ended.unwrap().success());
    drop(running);
    drop(guard);
    // While it falls asleep, and while it wakes.
    for of_a_partial in [true, false] {
        let guard = again(&pool, id).await;
        assert_eq!(text(&guard, "cat kept").await, expected);
        expected = keep(&guard).await;
        drop(guard);
        let home = pool.session_folder(id).unwrap();
        if !of_a_partial {
            world.sleep(&pool, id).await;
        }
        let killer = std::thread::spawn(move || {
            let begin = Instant::now();
            while begin.elapsed() < PATIENCE {
                let found = machines(id);
                if !found.is_empty() && (!of_a_partial || home.join("memory.partial").exists()) {
                    kill(&found);
                    return true;
                }
            }
            false
        });
        if of_a_partial {
            world.idle(&pool).await;
        }
        let acquired = pool.acquire(id).await;
        assert!(killer.join().unwrap(), "nothing was killed");
        drop(acquired);
        let home = pool.session_folder(id).unwrap();
        let names = |it: fs::DirEntry| it.file_name().into_string().unwrap();
        let left = fs::read_dir(&home).unwrap().flatten().map(names);
        let left: Vec<_> = left.filter(|it| it.starts_with("memory.")).collect();
        assert_eq!(left, [""; 0]);
    }
    let guard = again(&pool, id).await;
    assert_eq!(text(&guard, "cat kept").await, expected);
    drop(guard);
    pool.shutdown().await.unwrap();
    assert_eq!(machines(id), [0; 0]);
}

// ---- The pool is killed -----------------------------------------------------------------

const OWNER: &str = "DENIZEN_TEST_OWNER";
const SESSION: Uuid = Uuid::from_u128(0x7c1e);

/// A world of its own, so that it also has to make what others would find in the cache.
fn apart(folder: &Path) -> World {
    World { cache: folder.join("cache"), ..World::at(folder) }
}

/// Takes a session from state to state and says so, until it is killed; no test by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner() {
    let Ok(folder) = std::env::var(OWNER) else { return };
    let world = apart(Path::new(&folder));
    println!("\n= opens");
    let pool = world.open().await;
    for round in 0.. {
        println!("= begins");
        let guard = pool.acquire(SESSION).await.unwrap();
        let line = "echo $(($(cat kept 2> /dev/null | wc -l) + 1)) >> kept; cat kept";
        println!("= works");
        println!("= kept {}", text(&guard, line).await.replace('\n', " "));
        drop(guard);
        if round % 2 == 0 {
            world.idle(&pool).await;
        } else {
            pool.stop(SESSION, true).await.unwrap();
        }
    }
}

/// Another process that has the pool.
struct Owner {
    child: std::process::Child,
    said: std::io::Lines<std::io::BufReader<std::process::ChildStdout>>,
    /// The last that it has said of what the session has.
    kept: Option<String>,
}

impl Owner {
    fn start(folder: &Path) -> Self {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "an_owner", "--nocapture"])
            .env(OWNER, folder)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let said = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, said, kept: None }
    }

    /// Hears the next step; none after its end.
    fn next(&mut self) -> Option<String> {
        let step = self
            .said
            .by_ref()
            .map(Result::unwrap)
            .find_map(|line| line.strip_prefix("= ").map(str::to_owned))?;
        if let Some(kept) = step.strip_prefix("kept ") {
            self.kept = Some(kept.to_owned());
        }
        Some(step)
    }

    fn kill(mut self) -> Option<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        while self.next().is_some() {}
        self.kept
    }
}

/// Processes that see anything of a folder's.
fn in_sight_of(folder: &Path) -> Vec<String> {
    let folder = folder.to_str().unwrap();
    let all = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let seen = all.filter(|process| {
        fs::read_to_string(process.join("mountinfo")).is_ok_and(|it| it.contains(folder))
    });
    seen.map(|process| {
        let line = fs::read(process.join("cmdline")).unwrap_or_default();
        format!("{} {}", process.display(), String::from_utf8_lossy(&line).replace('\0', " "))
    })
    .collect()
}

/// The files of that name in folders that sessions, or what is made for them, may be in.
fn records(folder: &Path, name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let own = entry.file_name();
        if own.to_string_lossy().starts_with(name) {
            found.push(entry.path());
        } else if is_folder && own != "roots" && own != "root" {
            found.extend(records(&entry.path(), name));
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whenever_the_pool_is_killed_the_session_is_there_and_nothing_stays() {
    let kills = std::env::var("DENIZEN_KILLS").map_or(10, |text| text.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut groups = std::collections::BTreeSet::new();
    let mut note = || {
        let all = records(folder, "groups").into_iter().map(fs::read_to_string);
        let all = all.filter_map(Result::ok).collect::<String>();
        groups.extend(all.lines().map(PathBuf::from));
        groups.clone()
    };
    let count = |kept: &str| {
        let numbers: Vec<usize> = kept.split(' ').flat_map(str::parse).collect();
        assert!(numbers.iter().copied().eq(1..=numbers.len()), "{kept}");
        numbers.len()
    };
    let mut known = 0;
    for number in 0..kills {
        let mut owner = Owner::start(folder);
        // The first ones while all is made that is made once.
        let steps = 1 + number % 9;
        let last = (0..steps).map(|_| owner.next().expect("it has failed")).last().unwrap();
        // The moment is what is tried here; nothing is waited for.
        let random = uuid::Uuid::new_v4().as_u128();
        let moment = Duration::from_micros((random % (1 << (10 + random % 11))) as u64);
        std::thread::sleep(moment);
        note();
        let kept = owner.kill();
        println!("killed {moment:?} after {last:?}, kept {kept:?}");
        if let Some(kept) = kept {
            let now = count(&kept);
            assert!(now > known, "{kept}: {known} were there");
            known = now;
        }
        until("all has ended", async || in_sight_of(folder).is_empty()).await;
        assert_eq!(machines(SESSION), [0; 0]);
    }
    let world = apart(folder);
    let pool = world.open().await;
    let guard = pool.acquire(SESSION).await.unwrap();
    let kept = count(&text(&guard, "cat kept").await.replace('\n', " "));
    assert!(kept >= known, "{kept} of {known}");
    drop(guard);
    world.sleep(&pool, SESSION).await;
    let home = pool.session_folder(SESSION).unwrap();
    pool.shutdown().await.unwrap();
    drop(pool);
    let groups = note();
    assert!(in_sight_of(folder).is_empty());
    let left: Vec<_> = groups.iter().filter(|group| group.exists()).collect();
    assert!(left.is_empty(), "{left:?}");
    let own = folder.join("pool/.denizen");
    for place in ["spares", "staging", "trash"] {
        let left: Vec<_> = fs::read_dir(own.join(place)).into_iter().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
    }
    let partial = [records(&home, "memory."), records(&world.cache, "made-")].concat();
    assert!(partial.is_empty(), "{partial:?}");
}

// ---- The disk, the memory, the network --------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_can_be_full_and_gives_back_what_is_deleted() {
    let mut world = World::new();
    world.limits.disk_bytes = Some(192 << 20);
    let pool = world.open().await;
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    text(&guard, "echo kept > kept").await;
    let disk = pool.session_folder(id).unwrap().join("volume/.denizen-disk");
    let used = || fs::metadata(&disk).unwrap().blocks() * 512;
    let empty = used();
    let filled =
        guard.command("LC_ALL=C dd if=/dev/urandom of=filled bs=1M").output().await.unwrap();
    assert!(!filled.exit.success());
    assert!(
        String::from_utf8_lossy(&filled.stderr).contains("No space left on device"),
        "{filled:?}"
    );
    let more = guard.command("echo more > more").output().await.unwrap();
    text(&guard, "cat kept; sync").await;
    assert!(used() > empty + (100 << 20), "{} of {empty}", used());
    assert!(used() < 256 << 20, "{}", used());
    drop(guard);
    drop(more);
    pool.stop(id, false).await.unwrap();
    let guard = pool.acquire(id).await.unwrap();
    assert_eq!(text(&guard, "cat kept").await, "kept\n");
    text(&guard, "rm filled; sync").await;
    until("blocks are given back", async || used() < empty + (50 << 20)).await;
    text(&guard, "echo fits > fits").await;
    drop(guard);
    // It can be made larger.
    pool.shutdown().await.unwrap();
    drop(pool);
    world.limits.disk_bytes = Some(384 << 20);
    let pool = world.open().await;
    let guard = pool.acquire(id).await.unwrap();
    text(&guard, "cat fits; head -c 250M /dev/zero > large").await;
    drop(guard);
    pool.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_is_used_up_is_the_guests_own_trouble() {
    let world = World::new();
    let pool = world.open().await;
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    let machine = machines(id);
    let hog =
        guard.command("exec dd if=/dev/zero of=/dev/null bs=1G count=1").output().await.unwrap();
    assert!(!hog.exit.success(), "{hog:?}");
    let hog = guard.command("x=12345678; while :; do x=$x$x; done").output().await.unwrap();
    assert!(!hog.exit.success(), "{hog:?}");
    assert_eq!(text(&guard, "echo well").await, "well\n");
    assert_eq!(machines(id), machine, "it is the same one");
    drop(guard);
    pool.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_memory_than_there_is_is_not_promised() {
    let mut world = World::new();
    let info = rustix::system::sysinfo();
    let total = info.totalram * u64::from(info.mem_unit);
    world.limits.memory_bytes = Some(total);
    let pool = world.open().await;
    let error = pool.acquire(Uuid::new_v4()).await.unwrap_err();
    let told = error.to_string();
    assert!(matches!(error.kind(), Error::Isolation { isolation: "microvm", .. }), "{told}");
    assert!(told.contains("set less `memory_bytes`"), "{told}");
    pool.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_without_a_network_has_none() {
    let world = World::new();
    let port = server("127.0.0.1");
    let pool = world.open().await;
    let guard = pool.acquire(Uuid::new_v4()).await.unwrap();
    assert_eq!(text(&guard, "ls /sys/class/net").await, "lo\n");
    let line = format!("curl -sS --max-time 5 http://127.0.0.1:{port}/");
    assert!(!guard.command(&line).output().await.unwrap().exit.success());
    drop(guard);
    pool.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filtered_network_opens_what_its_rules_open_and_tells_of_the_rest() {
    let (open, shut) = (server("127.0.0.1"), server("127.0.0.1"));
    let mut world = World::new();
    let rules = [format!("127.0.0.1:{open}")];
    world.network = Network::Filtered(rules.iter().map(|rule| rule.parse().unwrap()).collect());
    let pool = world.open().await;
    let mut events = pool.events().unwrap();
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    let get = |port: u16| format!("NO_PROXY= no_proxy= curl -sS http://127.0.0.1:{port}/");
    assert_eq!(text(&guard, &get(open)).await, "outside\n");
    let denied = guard.command(get(shut)).output().await.unwrap();
    assert_ne!(denied.stdout, b"outside\n");
    let (host, port) = hear(&mut events, |kind| match kind {
        EventKind::Denied { host, port, .. } => Some((host, port)),
        _ => None,
    })
    .await;
    assert_eq!((&*host, port), ("127.0.0.1", shut));
    // Only the proxy leads there; not even the machine around is in reach.
    for address in ["127.0.0.1", "10.0.3.2"] {
        let line = format!("curl -sS --max-time 5 --noproxy '*' http://{address}:{open}/");
        assert!(!guard.command(&line).output().await.unwrap().exit.success(), "{address}");
    }
    drop(guard);
    world.sleep(&pool, id).await;
    let guard = pool.acquire(id).await.unwrap();
    assert_eq!(text(&guard, &get(open)).await, "outside\n", "awake, it has its way again");
    drop(guard);
    pool.shutdown().await.unwrap();
}
