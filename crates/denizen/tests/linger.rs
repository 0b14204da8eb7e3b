//! Sandboxes that go on when their owner dies or leaves, and are found by the next one. An
//! owner that can be killed is this program again, as another process. The last test runs all
//! of it as an ordinary user.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead, BufReader, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command as Program, Stdio};
use std::sync::Arc;
use std::time::Duration;

use denizen::{
    Error, EventKind, Isolation, MicroVmManager, Network, VmExecutionGuard, VmPoolConfig,
    VmPoolRuntimeConfig,
};
use denizen_agent::Spec;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FlockOperation, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SocketAddrUnix, SocketFlags, SocketType,
    connect, recvmsg, socket_with,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tempfile::TempDir;
use uuid::Uuid;

use crate::common::{cache, is_apart, opened, server, text};

/// Longer than anything here takes.
const DEADLINE: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };
const LONG: Duration = Duration::from_secs(600);
/// Writes down its number, then counts for ever.
const COUNTER: &str = "(setsid sh -c 'echo $$ > pid; while :; do echo >> count; sleep 0.02; done' > /dev/null 2>&1 &)";

fn config(folder: &Path) -> VmPoolRuntimeConfig {
    let config = VmPoolConfig {
        enabled: true,
        volume_root: folder.join("pool"),
        shell: "/bin/sh".into(),
        shell_args: vec!["-c".to_owned()],
        ..VmPoolConfig::default()
    };
    (&config).into()
}

/// Opens the pool; waits for the tasks of an earlier one of this process to be gone.
async fn pool(folder: &Path, network: Network, linger: Duration) -> Arc<MicroVmManager> {
    opened(|| {
        let builder = MicroVmManager::builder(config(folder)).isolation(Isolation::Sandbox);
        builder.network(network.clone()).linger(linger).cache(cache())
    })
    .await
}

/// What other processes do has no event to wait for.
async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let begin = std::time::Instant::now();
    while !condition().await {
        assert!(begin.elapsed() < Duration::from_secs(30), "waited in vain until {what}");
        tokio::task::yield_now().await;
    }
}

/// Starts the counter; gives its number.
async fn start_counting(guard: &VmExecutionGuard) -> String {
    text(guard, COUNTER).await;
    let line = "test -s count && cat pid || true";
    until("it counts", async || !text(guard, line).await.is_empty()).await;
    text(guard, "cat pid").await
}

/// Sees that the counter is the one that was started first, and that it counts.
async fn still_counts(guard: &VmExecutionGuard, pid: &str) {
    assert_eq!(text(guard, "cat pid").await, pid);
    text(guard, &format!("kill -0 {pid}")).await;
    let before = text(guard, "wc -l < count").await;
    until("it counts on", async || text(guard, "wc -l < count").await != before).await;
}

/// The process outside that waits for the sandbox's end.
fn outside(folder: &Path, id: Uuid) -> OwnedFd {
    let record = std::fs::read_to_string(folder.join(format!("pool/{id}/init"))).unwrap();
    let pid: i32 = record.lines().nth(1).unwrap().parse().unwrap();
    pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap()
}

fn has_ended(process: &OwnedFd, within: Timespec) -> bool {
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&within)).unwrap() > 0
}

/// Control groups of the session, and mounts that name its folder, in whichever namespace.
fn left_of(folder: &Path, id: Uuid) -> Vec<String> {
    let mut left = Vec::new();
    let groups = std::fs::read_to_string(folder.join(format!("pool/{id}/groups")));
    let groups = groups.unwrap_or_default();
    left.extend(groups.lines().filter(|path| Path::new(path).exists()).map(str::to_owned));
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let mounts = std::fs::read_to_string(process.path().join("mountinfo"));
        if mounts.is_ok_and(|mounts| mounts.contains(&id.to_string())) {
            left.push(process.path().display().to_string());
        }
    }
    if folder.join(format!("pool/{id}/init.sock")).exists() {
        left.push("the socket".to_owned());
    }
    left
}

// ---- An owner to kill -------------------------------------------------------------------

const OWNER: &str = "DENIZEN_TEST_OWNER";
/// The session is paused.
const PAUSED: &str = "DENIZEN_TEST_PAUSED";

/// Another process that has a pool, and a session in which things run.
struct Owner {
    child: Child,
    id: Uuid,
    /// The counter's number within.
    pid: String,
}

impl Owner {
    fn start(folder: &Path, network: &str, linger: Duration) -> Self {
        Self::with_cache(folder, network, linger, &cache())
    }

    fn with_cache(folder: &Path, network: &str, linger: Duration, cache: &Path) -> Self {
        let mut program = Program::new(std::env::current_exe().unwrap());
        Self::of(program.env("DENIZEN_TEST_CACHE", cache), folder, network, linger)
    }

    fn of(program: &mut Program, folder: &Path, network: &str, linger: Duration) -> Self {
        let mut child = program
            .args(["--exact", "an_owner", "--nocapture"])
            .env(OWNER, format!("{}\n{network}\n{}", folder.display(), linger.as_millis()))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        let line = said.lines().map(Result::unwrap).find(|line| line.starts_with("ready "));
        let line = line.expect("the owner has failed");
        let mut words = line.split(' ').skip(1);
        let id = words.next().unwrap().parse().unwrap();
        Self { child, id, pid: format!("{}\n", words.next().unwrap()) }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.kill();
    }
}

fn network(rule: &str) -> Network {
    match rule.split_once(' ') {
        Some(("filtered", rule)) => {
            Network::Filtered([rule.parse().unwrap()].into_iter().collect())
        }
        Some(("full", rule)) => Network::Full([rule.parse().unwrap()].into_iter().collect()),
        _ => Network::None,
    }
}

/// Is one when it is told to; no test by itself.
#[tokio::test]
async fn an_owner() {
    let Ok(told) = std::env::var(OWNER) else { return };
    let [folder, rule, linger] = told.split('\n').collect::<Vec<_>>()[..] else { panic!("{told}") };
    let linger = Duration::from_millis(linger.parse().unwrap());
    let pool = pool(Path::new(folder), network(rule), linger).await;
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    let pid = start_counting(&guard).await;
    if std::env::var_os(PAUSED).is_some() {
        drop(guard);
        pool.pause(id).await.unwrap();
        println!("\nready {id} {pid}");
        return std::future::pending().await;
    }
    let foreground = guard.command("echo $$ > front; exec sleep 1000").spawn().await.unwrap();
    // Prints all the time.
    let mut spec = Spec::new("/bin/sh", "/volume");
    spec.args = ["-c", "echo $$ > kept; while :; do echo; echo >> printed; sleep 0.02; done"]
        .map(Into::into)
        .to_vec();
    spec.env.insert("PATH".into(), "/usr/bin:/bin".into());
    let mut kept = guard.agent().unwrap().spawn(spec).await.unwrap();
    kept.outlive_owner().unwrap();
    kept.detach();
    let mut output = kept.take_output().unwrap();
    output.next().await.unwrap();
    until("all runs", async || text(&guard, "cat front kept | wc -l").await == "2\n").await;
    println!("\nready {id} {pid}");
    while output.next().await.unwrap().is_some() {}
    drop(foreground);
}

// ---- What must hold ---------------------------------------------------------------------

#[tokio::test]
async fn what_runs_is_found_again_after_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    let mut owner = Owner::start(folder.path(), "none", LONG);
    let (id, outside) = (owner.id, outside(folder.path(), owner.id));
    for _ in 0..2 {
        // The second time it is one that has found it.
        owner.kill();
        assert!(!has_ended(&outside, Timespec { tv_sec: 0, tv_nsec: 0 }));
        let pool = pool(folder.path(), Network::None, LONG).await;
        assert_eq!(pool.inspect(id).unwrap().state, "active");
        let busy = pool.stop(id, false).await.unwrap_err();
        assert!(matches!(busy, Error::InUse { .. }), "{busy}");
        let guard = pool.acquire(id).await.unwrap();
        still_counts(&guard, &owner.pid).await;
        let front = "! kill -0 $(cat front) 2> /dev/null && echo gone";
        until("the foreground has ended", async || {
            text(&guard, &format!("{front} || true")).await == "gone\n"
        })
        .await;
        text(&guard, "kill -0 $(cat kept)").await;
        let before = text(&guard, "wc -l < printed").await;
        until("it prints on", async || text(&guard, "wc -l < printed").await != before).await;
        assert_eq!(text(&guard, "cat /proc/1/comm; hostname").await.lines().count(), 2);
        drop(guard);
        pool.leave().await.unwrap();
    }
    let pool = pool(folder.path(), Network::None, LONG).await;
    pool.stop(id, true).await.unwrap();
    assert!(has_ended(&outside, DEADLINE));
    assert_eq!(left_of(folder.path(), id), [""; 0]);
    let guard = pool.acquire(id).await.unwrap();
    assert_eq!(text(&guard, "cat pid").await, owner.pid, "its files are there");
}

#[tokio::test]
async fn what_is_paused_is_found_again_after_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    let pool_then = pool(folder.path(), Network::None, LONG).await;
    let freezes = pool_then.can_freeze().unwrap();
    drop(pool_then);
    if !freezes {
        println!("skipped: no control group that can be frozen is granted");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut program = Program::new(std::env::current_exe().unwrap());
    program.env("DENIZEN_TEST_CACHE", cache()).env(PAUSED, "1");
    let mut owner = Owner::of(&mut program, folder.path(), "none", LONG);
    owner.kill();
    let pool = pool(folder.path(), Network::None, LONG).await;
    let mut events = pool.events().unwrap();
    let frozen = async { while !matches!(events.next().await.unwrap().kind, EventKind::Frozen) {} };
    let frozen = tokio::time::timeout(Duration::from_secs(30), frozen).await;
    assert!(frozen.is_ok(), "{:?}", pool.inspect(owner.id));
    assert_eq!(pool.inspect(owner.id).unwrap().state, "frozen");
    still_counts(&pool.acquire(owner.id).await.unwrap(), &owner.pid).await;
    pool.shutdown().await.unwrap();
    assert_eq!(left_of(folder.path(), owner.id), [""; 0]);
}

#[tokio::test]
async fn when_nobody_comes_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    let time = Duration::from_secs(1);
    let mut owner = Owner::with_cache(folder.path(), "none", time, &cache);
    let outside = outside(folder.path(), owner.id);
    // What every user sees of this machine, a copy that goes when nobody needs it any more.
    let copies = std::fs::read_dir(cache.join("roots")).unwrap().flatten();
    let copy = copies.map(|entry| entry.path()).find(|path| path.is_dir()).unwrap();
    let copy = std::fs::File::open(copy).unwrap();
    let unused = || rustix::fs::flock(&copy, FlockOperation::NonBlockingLockExclusive);
    owner.kill();
    assert_eq!(unused(), Err(Errno::WOULDBLOCK));
    assert!(!has_ended(&outside, Timespec { tv_sec: 0, tv_nsec: 0 }));
    assert!(has_ended(&outside, DEADLINE));
    assert_eq!(unused(), Ok(()));
    let pool = pool(folder.path(), Network::None, LONG).await;
    assert_eq!(pool.inspect(owner.id).unwrap().state, "stopped");
    assert_eq!(left_of(folder.path(), owner.id), [""; 0]);
}

#[tokio::test]
async fn who_does_not_want_it_ends_it() {
    for (before, after, linger) in [
        ("none", "none", Duration::ZERO),
        ("filtered 192.0.2.1", "none", LONG),
        ("none", "filtered 192.0.2.1", LONG),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut owner = Owner::start(folder.path(), before, LONG);
        let outside = outside(folder.path(), owner.id);
        owner.kill();
        let pool = pool(folder.path(), network(after), linger).await;
        assert!(has_ended(&outside, DEADLINE), "{before}");
        assert_eq!(pool.inspect(owner.id).unwrap().state, "stopped", "{before}");
        assert_eq!(left_of(folder.path(), owner.id), [""; 0], "{before}");
    }
}

#[tokio::test]
async fn whoever_leaves_stops_what_is_idle_and_whoever_just_goes_ends_all() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    // It would be stopped again and again.
    config.idle_shutdown = Duration::from_millis(50);
    let first = MicroVmManager::builder(config).isolation(Isolation::Sandbox).linger(LONG);
    let first = first.cache(cache()).build().unwrap();
    let [busy, idle] = [Uuid::new_v4(), Uuid::new_v4()];
    let guard = first.acquire(busy).await.unwrap();
    let pid = start_counting(&guard).await;
    drop(guard);
    drop(first.acquire(idle).await.unwrap());
    let ends = [busy, idle].map(|id| outside(folder.path(), id));
    first.leave().await.unwrap();
    assert!(has_ended(&ends[1], DEADLINE));
    // What has been left is not this pool's any more, whatever it still does.
    let mut events = first.events().unwrap();
    assert_eq!(events.next().await.unwrap().kind, EventKind::StillRunning);
    assert!(matches!(first.acquire(busy).await.unwrap_err(), Error::ShuttingDown));
    drop(first);
    let second = pool(folder.path(), Network::None, LONG).await;
    assert_eq!(second.inspect(busy).unwrap().state, "active");
    assert_eq!(second.inspect(idle).unwrap().state, "stopped");
    still_counts(&second.acquire(busy).await.unwrap(), &pid).await;
    assert!(!has_ended(&ends[0], Timespec { tv_sec: 0, tv_nsec: 0 }));
    drop(second);
    // Its tasks hold it until they get their turn.
    until("all ends", async || has_ended(&ends[0], Timespec { tv_sec: 0, tv_nsec: 0 })).await;
    let third = pool(folder.path(), Network::None, LONG).await;
    assert_eq!(third.inspect(busy).unwrap().state, "stopped");
}

/// Gets in line to own a session's sandbox.
fn knock(folder: &Path, id: Uuid) -> OwnedFd {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let home = openat(CWD, folder.join(format!("pool/{id}")), flags, Mode::empty()).unwrap();
    let name = format!("/proc/self/fd/{}/init.sock", home.as_raw_fd());
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    connect(&socket, &SocketAddrUnix::new(name).unwrap()).unwrap();
    socket
}

/// The first word from within; none if there is nothing yet.
fn word(socket: &OwnedFd) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 1000];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let parts = &mut [IoSliceMut::new(&mut buffer)];
    match recvmsg(socket, parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
        Ok(received) => {
            buffer.truncate(received.bytes);
            Some(buffer)
        }
        Err(Errno::AGAIN) => None,
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn there_is_one_owner_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let first = pool(folder.path(), Network::None, LONG).await;
    let id = Uuid::new_v4();
    let guard = first.acquire(id).await.unwrap();
    let pid = start_counting(&guard).await;
    let (one, two) = (knock(folder.path(), id), knock(folder.path(), id));
    drop(knock(folder.path(), id));
    still_counts(&guard, &pid).await;
    assert_eq!((word(&one), word(&two)), (None, None));
    drop(guard);
    first.leave().await.unwrap();
    drop(first);
    let mut first_in_line = [PollFd::new(&one, PollFlags::IN)];
    assert!(poll(&mut first_in_line, Some(&DEADLINE)).unwrap() > 0);
    assert_eq!(word(&one).unwrap()[0], 10);
    // It has been asked for something since, so it has looked at its line.
    rustix::net::send(&one, &[4, 0, 0, 0, 9, 0, 0, 0], rustix::net::SendFlags::NOSIGNAL).unwrap();
    assert!(poll(&mut first_in_line, Some(&DEADLINE)).unwrap() > 0);
    assert_eq!(word(&one).unwrap()[0], 6);
    assert_eq!(word(&two), None);
    drop(one);
    let mut next = [PollFd::new(&two, PollFlags::IN)];
    assert!(poll(&mut next, Some(&DEADLINE)).unwrap() > 0);
    assert_eq!(word(&two).unwrap()[0], 10);
    drop(two);
    let second = pool(folder.path(), Network::None, LONG).await;
    still_counts(&second.acquire(id).await.unwrap(), &pid).await;
    second.shutdown().await.unwrap();
}

/// Gets in line, by the folder that is its descriptor 3; writes down what it is told.
const CONNECTS: &str = "
import os, socket, time
if os.fork():
    os._exit(0)
os.setsid()
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
try:
    s.connect('/proc/self/fd/3/init.sock')
    open('/volume/connected', 'w').close()
    heard = repr(s.recv(1000))
except PermissionError:
    open('/volume/connected', 'w').close()
    heard = 'no'
open('/volume/heard.new', 'w').write(heard)
os.rename('/volume/heard.new', '/volume/heard')
time.sleep(1000)
";

#[tokio::test]
async fn what_runs_within_is_never_its_owner() {
    let folder = tempfile::tempdir().unwrap();
    let first = pool(folder.path(), Network::None, LONG).await;
    let id = Uuid::new_v4();
    let guard = first.acquire(id).await.unwrap();
    let home = folder.path().join(format!("pool/{id}"));
    let seen = guard.command(format!("ls {}", home.display())).output().await.unwrap();
    assert!(!seen.exit.success(), "it can be named within");
    // Even where somebody gives the folder away.
    // What denizen has started itself is no reason to go on.
    start_counting(&guard).await;
    let agent = guard.agent().unwrap();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let given = openat(CWD, &home, flags, Mode::empty()).unwrap();
    let line = "exec 3<&0 < /dev/null; exec /usr/bin/python3 -c \"$0\"";
    let line = ["/bin/sh", "-c", line, CONNECTS].map(Into::into).to_vec();
    let run = agent.spawn_service(line, [].into(), "/volume".into(), given).await.unwrap();
    run.wait().await.unwrap();
    until("it is in line", async || home.join("volume/connected").exists()).await;
    drop((guard, agent, run));
    first.leave().await.unwrap();
    drop(first);
    let second = pool(folder.path(), Network::None, LONG).await;
    let guard = second.acquire(id).await.unwrap();
    until("it is told", async || home.join("volume/heard").exists()).await;
    // Root's sandboxes are other users, who cannot even get in line.
    let expected = if rustix::process::geteuid().is_root() { "no" } else { "b''" };
    assert_eq!(text(&guard, "cat heard").await, expected);
    drop(guard);
    second.shutdown().await.unwrap();
}

#[tokio::test]
async fn networks_lead_out_again() {
    if !is_apart("networks_lead_out_again", &["--net"], "true") {
        return;
    }
    let port = server("192.0.2.1");
    for kind in ["filtered", "full"] {
        let folder = tempfile::tempdir().unwrap();
        let rule = format!("{kind} 192.0.2.1");
        let mut owner = Owner::start(folder.path(), &rule, LONG);
        owner.kill();
        let pool = pool(folder.path(), network(&rule), LONG).await;
        assert_eq!(pool.inspect(owner.id).unwrap().state, "active");
        let guard = pool.acquire(owner.id).await.unwrap();
        still_counts(&guard, &owner.pid).await;
        let get = format!("curl -sS --max-time 20 http://192.0.2.1:{port}/");
        assert_eq!(text(&guard, &get).await, "outside\n", "{kind}");
        drop(guard);
        pool.shutdown().await.unwrap();
    }
}

#[test]
fn all_of_it_again_as_an_ordinary_user() {
    if std::env::var_os("DENIZEN_TEST_CACHE").is_some() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: this already is an ordinary user");
        return;
    }
    let folder = TempDir::new().unwrap();
    let program = folder.path().join("test");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .unwrap();
    std::os::unix::fs::chown(folder.path(), Some(12345), Some(12345)).unwrap();
    let output = Program::new("setpriv")
        .args(["--reuid=12345", "--regid=12345", "--clear-groups"])
        .arg(&program)
        .args(["--test-threads=2"])
        .env("DENIZEN_TEST_CACHE", folder.path().join("cache"))
        .env("TMPDIR", folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("test result: ok. 10 passed"), "{said}");
}
