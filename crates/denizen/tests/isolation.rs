//! What every isolation promises, by one suite run over each of them; then what only a sandbox
//! does. The last test runs all of it again as an ordinary user.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command as Program;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use denizen::{
    Error, EventKind, Exit, Isolation, Limits, MicroVmManager, Network, Output, Stream,
    VmExecutionGuard, VmPoolRuntimeConfig,
};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use uuid::Uuid;

use crate::common::{has_tun, is_apart, isolated, limits, server, text};

struct World {
    folder: TempDir,
    config: VmPoolRuntimeConfig,
    isolation: Isolation,
    limits: Limits,
    network: Network,
}

impl World {
    fn new(isolation: Isolation) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = denizen::VmPoolConfig {
            enabled: true,
            volume_root: folder.path().join("pool"),
            shell: "/bin/sh".into(),
            shell_args: vec!["-c".to_owned()],
            backup_destination: Some(folder.path().join("backups")),
            ..denizen::VmPoolConfig::default()
        };
        Self {
            config: (&config).into(),
            folder,
            isolation,
            limits: limits(isolation),
            network: Network::None,
        }
    }

    fn open(&self) -> Arc<MicroVmManager> {
        self.try_open().unwrap()
    }

    fn try_open(&self) -> denizen::Result<Arc<MicroVmManager>> {
        let builder = isolated(MicroVmManager::builder(self.config.clone()), self.isolation);
        builder.network(self.network.clone()).limits(self.limits.clone()).build()
    }
}

async fn sh(guard: &VmExecutionGuard, line: &str) -> Output {
    guard.command(line).output().await.unwrap()
}

/// A number of seconds by which a process can be told from all others.
fn mark() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(100);
    format!("91{}{:07}", NEXT.fetch_add(1, Ordering::Relaxed), std::process::id())
}

/// Processes in sight of a session whose command line begins with the mark.
async fn within(guard: &VmExecutionGuard, mark: &str) -> usize {
    let lines = text(guard, "ps -eo args").await;
    lines.lines().filter(|line| line.starts_with(mark)).count()
}

/// Waits until so many of them are there.
async fn until_within(guard: &VmExecutionGuard, mark: &str, count: usize) {
    let come = async { while within(guard, mark).await != count {} };
    let come = tokio::time::timeout(Duration::from_secs(30), come).await;
    assert!(come.is_ok(), "waited in vain until {count} run");
}

/// Processes on this machine whose command line begins with the mark.
fn running(mark: &str) -> usize {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|it| std::fs::read(it.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines.filter(|line| line.starts_with(mark)).count()
}

/// What other processes do has no event to wait for.
async fn until(what: &str, condition: impl Fn() -> bool) {
    let begin = std::time::Instant::now();
    while !condition() {
        assert!(begin.elapsed() < Duration::from_secs(30), "waited in vain until {what}");
        tokio::task::yield_now().await;
    }
}

over! { host: Host, sandbox: Sandbox, microvm: MicroVm; {
    commands_are_what_they_are_elsewhere,
    a_command_is_followed_and_fed_while_it_runs,
    the_whole_tree_ends_with_its_command,
    what_is_left_running_counts_as_use,
    a_terminal_is_one_and_has_a_name,
    bootstrap_runs_within_and_once,
    backups_bring_it_back_and_forks_go_their_own_way,
    ports_of_a_session_can_be_reached,
} }

async fn commands_are_what_they_are_elsewhere(isolation: Isolation) {
    let pool = World::new(isolation);
    let pool = pool.open();
    let guard = pool.acquire(Uuid::new_v4()).await.unwrap();
    let output = sh(&guard, r"printf 'out\377'; printf 'err\376' >&2; exit 7").await;
    assert_eq!(output.exit, Exit::Code(7));
    assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"out\xff"[..], &b"err\xfe"[..]));
    assert_eq!(sh(&guard, "kill -9 $$").await.exit, Exit::Signal(9));
    let workdir = guard.workdir().to_str().unwrap().to_owned();
    assert_eq!(text(&guard, "pwd").await.trim(), workdir);
    assert_eq!(text(&guard, "echo $HOME").await.trim(), workdir);
    let echoed = guard.command("cat").stdin(vec![7; 300_000]).output().await.unwrap();
    assert_eq!(echoed.stdout, vec![7; 300_000]);
    let env = guard.program("env").env("MINE", "yes").output().await.unwrap();
    let env = String::from_utf8(env.stdout).unwrap();
    assert!(env.contains("MINE=yes\n") && !env.contains("CARGO"), "{env}");
    let error = guard.program("no-such-program").output().await.unwrap_err();
    let error = error.to_string();
    assert!(error.contains("no-such-program"), "{error}");
    let error = guard.command("true").current_dir("none").output().await.unwrap_err();
    assert!(error.to_string().contains("none"), "{error}");
    let big = guard.program("printf").args(["%s", &"x".repeat(100_000)]).output();
    assert_eq!(big.await.unwrap().stdout.len(), 100_000);
}

async fn a_command_is_followed_and_fed_while_it_runs(isolation: Isolation) {
    let world = World::new(isolation);
    let pool = world.open();
    let guard = pool.acquire(Uuid::new_v4()).await.unwrap();
    let line = "while read word; do echo got $word; echo also >&2; done; echo end";
    let mut running = guard.command(line).piped_stdin().spawn().await.unwrap();
    let mut stdin = running.stdin().unwrap();
    let mut heard = Vec::new();
    for word in ["one", "two"] {
        stdin.write_all(format!("{word}\n").as_bytes()).await.unwrap();
        let wanted = format!("got {word}\n");
        while !String::from_utf8_lossy(&heard).contains(&wanted) {
            let chunk = running.next().await.unwrap().unwrap();
            if chunk.stream == Stream::Stdout {
                heard.extend_from_slice(&chunk.bytes);
            }
        }
    }
    drop(stdin);
    while let Some(chunk) = running.next().await.unwrap() {
        heard.extend_from_slice(&chunk.bytes);
    }
    assert!(heard.ends_with(b"end\n"));
    assert_eq!(running.wait().await.unwrap(), Exit::Code(0));
}

async fn the_whole_tree_ends_with_its_command(isolation: Isolation) {
    let mark = mark();
    let world = World::new(isolation);
    let pool = world.open();
    let guard = pool.acquire(Uuid::new_v4()).await.unwrap();
    let line = format!(
        "(setsid sh -c 'setsid env -i sleep {mark}1 & exit' &); sleep {mark}2 & sleep {mark}3"
    );
    let mark = format!("sleep {mark}");
    let timed = guard.command(line.clone()).timeout(Duration::from_millis(700));
    assert_eq!(timed.output().await.unwrap().exit, Exit::TimedOut);
    assert_eq!(within(&guard, &mark).await, 0, "after its time");
    let dropped = guard.command(line).spawn().await.unwrap();
    until_within(&guard, &mark, 3).await;
    drop(dropped);
    until_within(&guard, &mark, 0).await;
    assert_eq!(running(&mark), 0);
}

async fn what_is_left_running_counts_as_use(isolation: Isolation) {
    let mark = mark();
    let world = World::new(isolation);
    let pool = world.open();
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    text(&guard, &format!("echo kept > file; setsid sleep {mark} > /dev/null 2>&1 &")).await;
    let mark = format!("sleep {mark}");
    until_within(&guard, &mark, 1).await;
    drop(guard);
    let error = pool.stop(id, false).await.unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    pool.stop(id, true).await.unwrap();
    assert_eq!(running(&mark), 0);
    let guard = pool.acquire(id).await.unwrap();
    assert_eq!(within(&guard, &mark).await, 0);
    assert_eq!(text(&guard, "cat file").await, "kept\n");
}

async fn a_terminal_is_one_and_has_a_name(isolation: Isolation) {
    use denizen_agent::{Spec, Stdio};
    let world = World::new(isolation);
    let pool = world.open();
    let guard = pool.acquire(Uuid::new_v4()).await.unwrap();
    let mut spec = Spec::new("sh", guard.workdir());
    let line = "stty size; tty; test -c $(tty) && echo there; echo $((6*7)) > /dev/tty";
    spec.args = ["-c", line].map(Into::into).to_vec();
    spec.stdio = Stdio::Pty { columns: 77, rows: 33 };
    let mut child = guard.agent().unwrap().spawn(spec).await.unwrap();
    let mut output = child.take_output().unwrap();
    let mut heard = Vec::new();
    while let Some(chunk) = output.next().await.unwrap() {
        heard.extend_from_slice(&chunk.bytes);
    }
    let heard = String::from_utf8(heard).unwrap();
    for part in ["33 77", "/dev/pts/", "there", "42"] {
        assert!(heard.contains(part), "{heard}");
    }
}

async fn bootstrap_runs_within_and_once(isolation: Isolation) {
    let mut world = World::new(isolation);
    let mark = mark();
    let line = format!("pwd >> where; hostname >> where; sleep {mark} &");
    world.config.bootstrap_command = Some(["sh", "-c", &line].map(str::to_owned).to_vec());
    let pool = world.open();
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    let expected = text(&guard, "pwd; hostname").await;
    assert_eq!(text(&guard, "cat where").await, expected);
    assert_eq!(within(&guard, &format!("sleep {mark}")).await, 0, "nothing of it goes on");
    drop(guard);
    pool.stop(id, false).await.unwrap();
    let guard = pool.acquire(id).await.unwrap();
    assert_eq!(text(&guard, "cat where").await, expected);
}

async fn backups_bring_it_back_and_forks_go_their_own_way(isolation: Isolation) {
    let has_root = isolation != Isolation::Host;
    let world = World::new(isolation);
    let pool = world.open();
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    let line = "mkdir -p deep/er; echo old > deep/er/file; ln -s /nowhere link; chmod 700 deep";
    text(&guard, line).await;
    if has_root {
        let line = "echo changed > /usr/bin/new; rm /etc/passwd; mkdir /opt/new; \
                    rm -r /usr/share/doc; mkdir /usr/share/doc; echo only > /usr/share/doc/this";
        text(&guard, line).await;
    }
    drop(guard);
    pool.backup(id).await.unwrap();
    let fork = pool.fork(id).await.unwrap();
    let guard = pool.acquire(id).await.unwrap();
    text(&guard, "echo new > deep/er/file").await;
    if has_root {
        text(&guard, "rm /usr/bin/new; echo back > /etc/passwd").await;
    }
    drop(guard);
    // As it was saved last, not as it is saved now.
    pool.restore(id, None).await.unwrap();
    assert_eq!(pool.backups(id).await.unwrap().len(), 2, "what it had was saved first");
    for session in [id, fork] {
        let guard = pool.acquire(session).await.unwrap();
        assert_eq!(text(&guard, "cat deep/er/file").await, "old\n");
        assert_eq!(text(&guard, "readlink link; stat -c %a deep").await, "/nowhere\n700\n");
        assert_eq!(text(&guard, "ls -A").await, "deep\nlink\n");
        if has_root {
            assert_eq!(
                text(&guard, "cat /usr/bin/new; ls /usr/share/doc").await,
                "changed\nthis\n"
            );
            assert!(!sh(&guard, "test -e /etc/passwd").await.exit.success());
            assert!(sh(&guard, "test -d /opt/new").await.exit.success());
        }
    }
    pool.shutdown().await.unwrap();
}

async fn ports_of_a_session_can_be_reached(isolation: Isolation) {
    use tokio::io::AsyncReadExt;
    let world = World::new(isolation);
    let pool = world.open();
    let guard = pool.acquire(Uuid::new_v4()).await.unwrap();
    let program = "import socket, sys\n\
                   family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET\n\
                   s = socket.create_server((sys.argv[1], 0), family=family)\n\
                   print(s.getsockname()[1], flush=True)\n\
                   c = s.accept()[0]\n\
                   c.sendall(b'within ' + c.recv(100))\n";
    for address in ["127.0.0.1", "::1"] {
        let python = guard.program("python3").args(["-c", program, address]);
        let mut server = python.spawn().await.unwrap();
        let port = server.next().await.unwrap().unwrap();
        let port: u16 = String::from_utf8_lossy(&port.bytes).trim().parse().unwrap();
        let connection = guard.agent().unwrap().connect(port).await.unwrap();
        let mut connection = tokio::net::TcpStream::from_std(connection).unwrap();
        connection.write_all(b"hello").await.unwrap();
        let mut heard = String::new();
        connection.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "within hello", "{address}");
    }
}

// ---- What has a network of its own ------------------------------------------------------

mod networks {
    use super::*;

    over! { sandbox: Sandbox, microvm: MicroVm; {
        a_filtered_network_opens_what_its_rules_open_and_tells_of_the_rest,
        a_full_network_is_one,
    } }

    async fn a_filtered_network_opens_what_its_rules_open_and_tells_of_the_rest(
        isolation: Isolation,
    ) {
        let (open, shut) = (server("127.0.0.1"), server("127.0.0.1"));
        let mut world = World::new(isolation);
        let rules = [format!("127.0.0.1:{open}"), "example.org".to_owned()];
        world.network = Network::Filtered(rules.iter().map(|rule| rule.parse().unwrap()).collect());
        let pool = world.open();
        let mut events = pool.events().unwrap();
        let id = Uuid::new_v4();
        let guard = pool.acquire(id).await.unwrap();
        // Its own loopback is not the host's: only the proxy leads there.
        let get = |port: u16| format!("NO_PROXY= no_proxy= curl -sS http://127.0.0.1:{port}/");
        assert_eq!(text(&guard, &get(open)).await, "outside\n");
        let denied = sh(&guard, &get(shut)).await;
        assert_ne!(denied.stdout, b"outside\n", "{denied:?}");
        assert!(
            !sh(&guard, &format!("curl -sS --noproxy '*' http://127.0.0.1:{open}/"))
                .await
                .exit
                .success()
        );
        let elsewhere =
            sh(&guard, "curl -sS -o /dev/null -w '%{http_code}' http://elsewhere.example/").await;
        assert_eq!(elsewhere.stdout, b"403");
        let mut told = Vec::new();
        while told.len() < 2 {
            let event = events.next().await.unwrap();
            if let EventKind::Denied { host, port, rule } = event.kind {
                assert_eq!(event.session, id);
                told.push(format!("{host} {port} {rule}"));
            }
        }
        assert!(told[0].starts_with(&format!("127.0.0.1 {shut} ")), "{told:?}");
        assert!(told[1].contains("elsewhere.example 80 not in the allow-list"), "{told:?}");
        // Started again, it has its way again.
        drop(guard);
        pool.stop(id, true).await.unwrap();
        let guard = pool.acquire(id).await.unwrap();
        assert_eq!(text(&guard, &get(open)).await, "outside\n");
    }

    async fn a_full_network_is_one(isolation: Isolation) {
        let test = format!("networks::{}::a_full_network_is_one", isolation.name());
        if !has_tun() || !is_apart(&test, &["--net"], "true") {
            return;
        }
        let port = server("192.0.2.1");
        let mut world = World::new(isolation);
        world.network = Network::Full(["192.0.2.1".parse().unwrap()].into_iter().collect());
        let pool = world.open();
        let mut events = pool.events().unwrap();
        let guard = pool.acquire(Uuid::new_v4()).await.unwrap();
        assert_eq!(text(&guard, &format!("curl -sS http://192.0.2.1:{port}/")).await, "outside\n");
        let resolver = match isolation {
            Isolation::MicroVm => "nameserver 10.0.3.3\n",
            _ => "nameserver 10.0.2.3\n",
        };
        assert_eq!(text(&guard, "cat /etc/resolv.conf").await, resolver);
        assert!(text(&guard, "getent ahostsv4 localhost").await.contains("127.0.0.1"));
        let denied =
            sh(&guard, "curl -sS --max-time 20 http://169.254.169.254/latest/meta-data").await;
        assert!(!denied.exit.success());
        loop {
            let event = events.next().await.unwrap();
            if let EventKind::Denied { host, .. } = event.kind {
                assert_eq!(host, "169.254.169.254");
                break;
            }
        }
        drop(guard);
        pool.shutdown().await.unwrap();
    }
}

// ---- Only a sandbox ---------------------------------------------------------------------

/// A package with a program and a folder that it gives to another user.
fn package(folder: &Path) -> PathBuf {
    let tree = folder.join("package");
    let script = |path: &str, content: &str| {
        let path = tree.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(path, mode).unwrap();
    };
    script("usr/bin/denizen-test", "#!/bin/sh\necho installed\n");
    script("var/lib/denizen-test/state", "");
    script("DEBIAN/postinst", "#!/bin/sh\nset -e\nchown -R daemon:daemon /var/lib/denizen-test\n");
    let control = "Package: denizen-test\nVersion: 1\nArchitecture: all\nMaintainer: nobody\n\
                   Description: a test\n";
    std::fs::write(tree.join("DEBIAN/control"), control).unwrap();
    let file = folder.join("denizen-test.deb");
    let mut build = Program::new("dpkg-deb");
    build.args(["--root-owner-group", "--build"]).arg(tree).arg(&file);
    assert!(build.output().unwrap().status.success());
    file
}

#[tokio::test]
async fn a_package_is_installed_and_stays() {
    let world = World::new(Isolation::Sandbox);
    let package = std::fs::read(package(world.folder.path())).unwrap();
    let pool = world.open();
    let (id, other) = (Uuid::new_v4(), Uuid::new_v4());
    let guard = pool.acquire(id).await.unwrap();
    let line = "cat > it.deb && apt-get install -y ./it.deb && denizen-test";
    let output = guard.command(line).stdin(package).output().await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.ends_with("installed\n"), "{said}{}", String::from_utf8_lossy(&output.stderr));
    drop(guard);
    pool.backup(id).await.unwrap();
    pool.restore(id, None).await.unwrap();
    let guard = pool.acquire(id).await.unwrap();
    assert_eq!(text(&guard, "denizen-test").await, "installed\n");
    assert!(text(&guard, "dpkg -s denizen-test").await.contains("install ok installed"));
    assert!(!Path::new("/usr/bin/denizen-test").exists(), "not on the host");
    let guard = pool.acquire(other).await.unwrap();
    assert!(!sh(&guard, "denizen-test").await.exit.success(), "not in another session");
    drop(guard);
}

#[tokio::test]
async fn a_sandbox_has_its_own_of_everything() {
    let world = World::new(Isolation::Sandbox);
    let pool = world.open();
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    assert_eq!(text(&guard, "id -u; id -g").await, "0\n0\n");
    assert!(text(&guard, "hostname").await == "denizen\n");
    assert_eq!(text(&guard, "cat /proc/1/comm").await, "denizen-init\n");
    // Half of the memory, as the kernel's own default is half of the machine's.
    let memory = Limits::default().memory_bytes.unwrap();
    let shared = text(&guard, "stat -f -c '%b %S' /dev/shm").await;
    let shared: Vec<u64> = shared.split_whitespace().map(|it| it.parse().unwrap()).collect();
    assert_eq!(shared[0] * shared[1], (memory / 2).next_multiple_of(4096));
    // Nor more by way of swap, where the kernel counts that.
    let groups = pool.session_folder(id).unwrap().join("groups");
    let groups = std::fs::read_to_string(groups).unwrap();
    for group in groups.lines().map(Path::new) {
        let both = std::fs::read_to_string(group.join("memory.memsw.limit_in_bytes"));
        if let Ok(both) = both {
            assert_eq!(both.trim(), (memory / 4096 * 4096).to_string());
        }
        let swap = std::fs::read_to_string(group.join("memory.swap.max"));
        assert!(swap.is_err() || swap.unwrap().trim() == "0");
    }
    assert_eq!(text(&guard, "ls /sys/class/net").await, "lo\n");
    assert_eq!(text(&guard, "ls -A /tmp /home /root /run /srv").await.lines().count(), 9);
    assert_eq!(text(&guard, "grep NoNewPrivs /proc/self/status").await, "NoNewPrivs:\t1\n");
    assert_eq!(text(&guard, "grep Seccomp: /proc/self/status").await, "Seccomp:\t2\n");
    // A package manager's; the first process has SYS_PTRACE and SYS_RESOURCE beside them.
    let capabilities = "grep -h 'Cap[PEB]' /proc/1/status /proc/self/status | cut -f 2";
    let [first, rest] = ["00000000810c04fb\n", "00000000800404fb\n"];
    assert_eq!(text(&guard, capabilities).await, first.repeat(2) + &rest.repeat(4));
    text(&guard, "echo hello > /dev/shm/a; echo hello > /tmp/a; head -c 9 /dev/urandom | wc -c")
        .await;
    text(&guard, "exec 3<> /dev/ptmx; ls /dev/pts").await;
    // Not the host's secrets.
    let secret = world.folder.path().to_str().unwrap();
    assert!(!sh(&guard, &format!("ls {secret}")).await.exit.success());
    assert!(!sh(&guard, "grep -q '\\$' /etc/shadow").await.exit.success());
}

/// One session does its worst; another one and this process go on.
#[tokio::test]
async fn a_session_that_runs_wild_leaves_the_others_alone() {
    let mut world = World::new(Isolation::Sandbox);
    world.limits = Limits {
        memory_bytes: Some(256 << 20),
        processes: Some(64),
        cpu_percent: Some(50),
        open_files: Some(128),
        disk_bytes: None,
    };
    let pool = world.open();
    let (wild, calm) = (Uuid::new_v4(), Uuid::new_v4());
    let guard = pool.acquire(wild).await.unwrap();
    let calm = pool.acquire(calm).await.unwrap();
    let answers = async || {
        let begin = std::time::Instant::now();
        assert_eq!(text(&calm, "echo here").await, "here\n");
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    };
    let bomb = guard.command("f() { f | f & f; }; f 2> /dev/null").spawn().await.unwrap();
    answers().await;
    answers().await;
    // Also what goes on after the shell that began it has given up.
    bomb.kill().await.unwrap();
    answers().await;
    let hog = sh(&guard, "exec dd if=/dev/zero of=/dev/null bs=1G count=1").await;
    let whole = pool.limited_resources().unwrap().contains(&"memory");
    if whole {
        assert_eq!(hog.exit, Exit::OutOfMemory, "{hog:?}");
    }
    assert!(!hog.exit.success(), "{hog:?}");
    answers().await;
    let files = "i=0; while [ $i -lt 200 ]; do eval \"exec $((i+10))< /dev/null\" || exit 9; i=$((i+1)); done";
    assert!(!guard.program("bash").args(["-c", files]).output().await.unwrap().exit.success());
    let flood = guard.command("yes").timeout(Duration::from_secs(1)).output_limit(1000).output();
    let flood = flood.await.unwrap();
    assert_eq!((flood.exit, flood.stdout.len()), (Exit::TimedOut, 1000));
    assert!(flood.stdout_cut > 0);
    answers().await;
    assert_eq!(text(&guard, "echo still here").await, "still here\n");
    // Left to itself, it ends all the same when it is told to.
    text(&guard, "(f() { f | f & f; }; f) > /dev/null 2>&1 &").await;
    drop(guard);
    let stopped = tokio::time::timeout(Duration::from_secs(30), pool.stop(wild, true)).await;
    stopped.unwrap().unwrap();
    answers().await;
}

/// Waits for the next event that a session was over its disk limit; gives what it uses.
async fn over(events: &mut denizen::Events, session: Uuid) -> u64 {
    loop {
        let event = events.next().await.unwrap();
        if let EventKind::LimitReached { resource, used, .. } = event.kind {
            assert_eq!((resource, event.session), ("disk", session));
            return used;
        }
    }
}

#[tokio::test]
async fn a_session_that_fills_the_disk_is_ended_and_can_delete() {
    const MIB: u64 = 1 << 20;
    let mut world = World::new(Isolation::Sandbox);
    world.limits.disk_bytes = Some(64 * MIB);
    let pool = world.open();
    let mut events = pool.events().unwrap();
    let (filler, calm) = (Uuid::new_v4(), Uuid::new_v4());
    let guard = pool.acquire(filler).await.unwrap();
    let calm = pool.acquire(calm).await.unwrap();
    // Below its limit, it is not touched whatever the other does.
    let line = "head -c 40000000 /dev/zero > file; echo there; exec cat";
    let mut below = calm.command(line).piped_stdin().spawn().await.unwrap();
    below.next().await.unwrap();
    let mark = mark();
    let fill = |folder: &str| {
        format!(
            "sleep {mark} & cd {folder} && i=0; while [ $i -lt 3000 ]; \
             do head -c 1000000 /dev/zero > fill$i; i=$((i+1)); done"
        )
    };
    // All of it where there is time: the whole suite is run twice.
    let all = [".", "/tmp", "/opt"];
    let folders = if rustix::process::geteuid().is_root() { &all[..] } else { &all[2..] };
    for folder in folders {
        let mut slowest = Duration::ZERO;
        let answers = async {
            loop {
                let begin = std::time::Instant::now();
                assert_eq!(text(&calm, "echo here").await, "here\n");
                slowest = slowest.max(begin.elapsed());
            }
        };
        let line = fill(folder);
        let filled = tokio::select! {
            output = sh(&guard, &line) => output,
            () = answers => unreachable!(),
        };
        assert_eq!(filled.exit, Exit::OutOfDisk, "{folder}: {filled:?}");
        assert!(slowest < Duration::from_secs(5), "{folder}: {slowest:?}");
        let used = over(&mut events, filler).await;
        println!("{folder}: {} MiB used, the other's slowest answer {slowest:?}", used / MIB);
        assert!(used > 64 * MIB, "{used}");
        assert_eq!(running(&format!("sleep {mark}")), 0, "{folder}: it was all ended");
        let info = pool.inspect(filler).unwrap();
        assert_eq!((info.disk_used, info.disk_limit), (Some(used), Some(64 * MIB)));
        // It goes on, but can only get smaller.
        assert_eq!(text(&guard, "echo still > here; cat here").await, "still\n");
        assert_eq!(sh(&guard, &fill(folder)).await.exit, Exit::OutOfDisk, "{folder}: again");
        over(&mut events, filler).await;
        text(&guard, &format!("cd {folder} && rm fill*")).await;
        text(&guard, "head -c 20000000 /dev/zero > fits; rm fits").await;
    }
    // Nor does it help that a file has no name any more.
    let nameless = "import os\nheld = []\n\
                    for number in range(3000):\n \
                    held.append(open('it', 'wb'))\n os.unlink('it')\n \
                    held[-1].write(bytes(1000000))\n held[-1].flush()";
    for folder in [".", "/opt"] {
        let python = guard.program("python3").args(["-c", nameless]).current_dir(folder);
        assert_eq!(python.output().await.unwrap().exit, Exit::OutOfDisk, "{folder}");
        over(&mut events, filler).await;
    }
    // The kernel stops one file by itself, before anybody looks.
    let big = sh(&guard, "exec head -c 500000000 /dev/zero > big").await;
    assert_eq!(big.exit, Exit::OutOfDisk, "{big:?}");
    // The next look finds it over all the same, and ends whatever has begun by then.
    over(&mut events, filler).await;
    assert_eq!(text(&guard, "stat -c %s big; rm big").await, format!("{}\n", 64 * MIB));
    // Files without content take what others need, too.
    let empty = "mkdir many && cd many && seq 1 1000000 | xargs -n 1000 touch";
    let empty = sh(&guard, empty).await;
    assert_eq!(empty.exit, Exit::OutOfDisk, "{empty:?}");
    text(&guard, "rm -r many").await;
    drop(below.stdin());
    assert_eq!(below.wait().await.unwrap(), Exit::Code(0), "it was never touched");
}

#[tokio::test]
async fn what_came_with_more_than_its_limit_stays() {
    let mut world = World::new(Isolation::Sandbox);
    let id = Uuid::new_v4();
    {
        let pool = world.open();
        let guard = pool.acquire(id).await.unwrap();
        text(&guard, "for i in 1 2 3 4 5; do head -c 10000000 /dev/zero > file$i; done").await;
        drop(guard);
        pool.shutdown().await.unwrap();
    }
    world.limits.disk_bytes = Some(20 << 20);
    let pool = loop {
        // The lock goes with the last of the pool before.
        match world.try_open() {
            Ok(pool) => break pool,
            Err(error) if error.to_string().contains("another") => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    let guard = pool.acquire(id).await.unwrap();
    until("it is measured", || pool.inspect(id).unwrap().disk_used.is_some()).await;
    let used = pool.inspect(id).unwrap().disk_used.unwrap();
    assert!(used > 50_000_000, "{used}");
    assert_eq!(text(&guard, "ls | wc -l; sleep 0.7; echo small > new").await, "5\n");
    let more = "i=0; while [ $i -lt 3000 ]; \
                do head -c 1000000 /dev/zero > more$i; i=$((i+1)); done";
    assert_eq!(sh(&guard, more).await.exit, Exit::OutOfDisk);
}

/// A command that forgets its mark and becomes a daemon would outlive its own timeout.
#[tokio::test]
async fn a_command_in_a_sandbox_keeps_its_mark() {
    let world = World::new(Isolation::Sandbox);
    let pool = world.open();
    let guard = pool.acquire(Uuid::new_v4()).await.unwrap();
    // Another one, so that it cannot only be that one's.
    let _other = guard.command("sleep 1000").spawn().await.unwrap();
    let mark = mark();
    let line = format!(
        "ulimit -x 1; prlimit --locks=2:2; (setsid env -i setsid sleep {mark} &); sleep 1000"
    );
    let running = || running(&format!("sleep {mark}"));
    let command = guard.program("bash").args(["-c", &line]).spawn().await.unwrap();
    until("it runs", || running() == 1).await;
    command.kill().await.unwrap();
    assert_eq!(running(), 0, "it has got away");
    // Other limits can be lowered, as everywhere.
    let lowered = "ulimit -n 50 && ulimit -n && prlimit --nofile=40:40 && prlimit -n -o SOFT";
    let lowered = guard.program("bash").args(["-c", lowered]).output().await.unwrap();
    assert!(String::from_utf8_lossy(&lowered.stdout).starts_with("50\n"), "{lowered:?}");
}

#[test]
fn all_of_it_again_as_an_ordinary_user() {
    again(&[], 36, |program| {
        let mut command = Program::new("setpriv");
        command.args(["--reuid=12345", "--regid=12345", "--clear-groups"]).arg(program);
        command
    });
}

/// As the program makes itself for a user with an entry in `/etc/subuid`. A folder as root, which
/// machines have here, needs owners that no such user can give.
#[test]
fn all_of_it_again_as_a_user_with_a_range() {
    again(&["--skip=microvm::"], 26, |program| {
        let enter = "read -r go; exec setpriv --reuid=0 --regid=0 --clear-groups \"$0\" \"$@\"";
        let mut command = Program::new("unshare");
        command.args(["--user", "--keep-caps", "sh", "-c", enter]).arg(program);
        command
    });
}

/// Runs this program's tests as user 12345. What `command` starts may be in a user namespace
/// that is yet to be given its ids, and then wait for a line. So many tests are not skipped.
fn again(skip: &[&str], count: usize, command: impl Fn(&Path) -> Program) {
    if std::env::var_os("DENIZEN_TEST_CACHE").is_some() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: this already is an ordinary user");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("test");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    std::fs::copy(common::program(), folder.path().join("denizen")).unwrap();
    let mut copy = Program::new("cp");
    copy.arg("-rL").arg(common::guest()).arg(folder.path().join("guest"));
    assert!(copy.status().unwrap().success());
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .unwrap();
    std::os::unix::fs::chown(folder.path(), Some(12345), Some(12345)).unwrap();
    let mut command = command(&program);
    let mut child = command
        .args(["--test-threads=2"])
        .args(skip)
        .env("DENIZEN_TEST_CACHE", folder.path().join("cache"))
        .env("TMPDIR", folder.path())
        .env(common::COPIES, folder.path())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    if command.get_program() == "unshare" {
        let process = PathBuf::from(format!("/proc/{}", child.id()));
        let namespace = |process: &Path| std::fs::read_link(process.join("ns/user")).unwrap();
        while namespace(&process) == namespace(Path::new("/proc/self")) {
            std::thread::yield_now();
        }
        for file in ["uid_map", "gid_map"] {
            let map = "0 12345 1\n1879048192 500000 65536\n";
            std::fs::write(process.join(file), map).unwrap();
        }
        let mut stdin = child.stdin.take().unwrap();
        std::io::Write::write_all(&mut stdin, b"go\n").unwrap();
    }
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains(&format!("test result: ok. {count} passed")), "{said}");
}
