//! The daemon as a service manager has it: what it is handed, what it tells, how it is told to
//! read its configuration anew, and how one takes over from another.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use common::{User, text, until};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};

/// A service manager's end of what a daemon tells it.
struct Manager {
    place: PathBuf,
    socket: UnixDatagram,
}

impl Manager {
    fn of(user: &User) -> Self {
        let place = user.state.path().join("notify");
        let socket = UnixDatagram::bind(&place).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { place, socket }
    }

    /// The next that it is told.
    fn told(&self) -> String {
        let mut words = [0; 1024];
        let length = self.socket.recv(&mut words).unwrap();
        text(&words[..length])
    }

    /// What it is told first that begins so.
    fn told_of(&self, what: &str) -> String {
        loop {
            let told = self.told();
            if told.starts_with(what) {
                return told;
            }
        }
    }
}

/// A daemon that was started for a test, and what it logs.
struct Daemon {
    child: Child,
    log: BufReader<std::process::ChildStderr>,
}

impl Daemon {
    fn start(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        Self { child, log }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The next line of its log with these words.
    fn logs(&mut self, words: &str) -> String {
        let mut all = String::new();
        loop {
            let mut line = String::new();
            assert!(self.log.read_line(&mut line).unwrap() > 0, "no {words:?} in {all}");
            if line.contains(words) {
                return line;
            }
            all.push_str(&line);
        }
    }

    /// Where it says it listens by TCP.
    fn address(&mut self) -> SocketAddr {
        let line = self.logs("denizen listens on 127.0.0.1:");
        line.trim().rsplit(' ').next().unwrap().parse().unwrap()
    }

    fn ends(mut self) {
        // Its log is read on, so that it is not held up by that.
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).unwrap();
        assert!(self.child.wait().unwrap().success(), "{rest}");
    }
}

/// The status of `GET path`.
fn status(mut stream: impl Read + Write, path: &str, host: &str) -> u16 {
    write!(stream, "GET {path} HTTP/1.0\r\nhost: {host}\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}

#[test]
fn the_manager_is_told_of_every_way_to_the_end() {
    let user = User::new();
    let manager = Manager::of(&user);
    let ways: [(&str, &[&str]); 4] =
        [("TERM", &[]), ("INT", &[]), ("client", &[]), ("idle", &["--idle-exit", "1"])];
    for (way, more) in ways {
        let args = [&["--isolation", "host", "serve"], more].concat();
        let mut serve = user.denizen(&args);
        serve.env("NOTIFY_SOCKET", &manager.place);
        let daemon = Daemon::start(serve);
        let ready = manager.told();
        let socket = user.state.path().join("denizen.sock");
        assert_eq!(ready, format!("READY=1\nSTATUS=Serves on {}", socket.display()));
        // It is.
        assert_eq!(status(UnixStream::connect(&socket).unwrap(), "/readyz", "localhost"), 200);
        match way {
            "TERM" => daemon.signal(Signal::TERM),
            "INT" => daemon.signal(Signal::INT),
            "client" => assert!(user.run(&["shutdown"]).status.success()),
            _ => {}
        }
        assert!(manager.told().starts_with("STOPPING=1\nSTATUS="), "{way}");
        daemon.ends();
        assert!(!socket.exists(), "{way}");
    }
}

#[test]
fn the_watchdog_is_fed_only_while_the_daemon_answers() {
    let user = User::new();
    let manager = Manager::of(&user);
    let mut serve = user.denizen(&["--isolation", "host", "serve"]);
    serve.env("NOTIFY_SOCKET", &manager.place).env("WATCHDOG_USEC", "200000");
    let daemon = Daemon::start(serve);
    manager.told_of("READY=1");
    assert_eq!(manager.told(), "WATCHDOG=1");
    assert_eq!(manager.told(), "WATCHDOG=1");
    // Without a descriptor to be had, nobody is answered.
    let pid = Some(Pid::from_child(&daemon.child));
    let before = rustix::process::getrlimit(Resource::Nofile);
    let none = Rlimit { current: Some(3), ..before.clone() };
    prlimit(pid, Resource::Nofile, none).unwrap();
    let silent = || {
        manager.socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let silent = manager.socket.recv(&mut [0; 64]).is_err();
        manager.socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        silent
    };
    until("it is silent", silent);
    prlimit(pid, Resource::Nofile, before).unwrap();
    assert_eq!(manager.told(), "WATCHDOG=1");
    // What is meant for another process is none of its business.
    daemon.signal(Signal::TERM);
    manager.told_of("STOPPING=1");
    daemon.ends();
    let mut serve = user.denizen(&["--isolation", "host", "serve", "--idle-exit", "1"]);
    serve.env("NOTIFY_SOCKET", &manager.place).env("WATCHDOG_USEC", "1000");
    let other = Daemon::start({
        serve.env("WATCHDOG_PID", "1");
        serve
    });
    manager.told_of("READY=1");
    assert!(manager.told().starts_with("STOPPING=1"));
    other.ends();
}

#[test]
fn a_hangup_has_the_configuration_read_anew() {
    let user = User::new();
    let manager = Manager::of(&user);
    let file = user.state.path().join("config.toml");
    let configure = |text: &str| {
        let fixed = "isolation = \"host\"\nlisten = [\"127.0.0.1:0\"]\n";
        std::fs::write(&file, format!("{fixed}{text}")).unwrap();
    };
    configure("");
    let mut serve = user.denizen(&["--config", file.to_str().unwrap(), "serve"]);
    serve.env("NOTIFY_SOCKET", &manager.place);
    let mut daemon = Daemon::start(serve);
    let address = daemon.address();
    let ready = manager.told_of("READY=1");
    let ask = |path: &str, host: &str| status(TcpStream::connect(address).unwrap(), path, host);
    let reload = |daemon: &Daemon| {
        daemon.signal(Signal::HUP);
        let told = manager.told();
        let (began, rest) = told.split_once("\nMONOTONIC_USEC=").unwrap();
        assert_eq!(began, "RELOADING=1");
        let at: u64 = rest.split_once('\n').unwrap().0.parse().unwrap();
        assert!(at > 0);
        manager.told_of("READY=1")
    };
    assert_eq!(ask("/metrics", "localhost"), 401);
    assert_eq!(ask("/healthz", "den.example.org"), 421);

    configure(
        "metrics_public = true\nhosts = [\"den.example.org\"]\nlog = \"debug\"\n\
         retention = { keep_last = 3 }\nspares = 1\n[pool]\nmax_vms = 7\n",
    );
    assert_eq!(reload(&daemon), ready);
    let line = daemon.logs("the configuration was read");
    assert!(line.contains("hosts, log, metrics_public, retention"), "{line}");
    let line = daemon.logs("next start");
    assert!(line.contains("pool.max_vms, spares"), "{line}");
    assert_eq!(ask("/metrics", "localhost"), 200);
    assert_eq!(ask("/healthz", "den.example.org"), 200);

    // What is no good leaves all as it was, also what would have been good of it.
    for (bad, why) in [
        ("metrics_public = false\nhots = []\n", "hots"),
        ("metrics_public = false\nlog = \"x=y=z\"\n", "log"),
        ("metrics_public = false\n[pool]\nmax_vms = 0\n", "max_vms"),
        ("metrics_public = false\ntls_key = \"/dev/null\"\n", "tls_certificate"),
    ] {
        configure(bad);
        let told = reload(&daemon);
        assert!(told.contains("no good") && told.contains(why), "{told}");
        assert!(daemon.logs("the old one stays").contains(why), "{bad}");
        assert_eq!(ask("/metrics", "localhost"), 200);
    }
    configure("");
    assert_eq!(reload(&daemon), ready);
    assert_eq!(ask("/metrics", "localhost"), 401);
    daemon.signal(Signal::TERM);
    daemon.ends();
}

/// The daemon behind systemd's own tool that hands sockets over, which starts it when somebody
/// comes.
fn activated(user: &User, tool: &[&str], daemon: &[&str]) -> Command {
    let program = user.denizen(&[]);
    let mut command = Command::new("systemd-socket-activate");
    for (name, value) in program.get_envs() {
        if let Some(value) = value {
            command.arg(format!("-E{}={}", name.display(), value.display()));
        }
    }
    command.args(tool).arg(program.get_program()).args(daemon).stdin(Stdio::null());
    command
}

/// A port that nobody listens on, most likely.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn connect(address: SocketAddr) -> TcpStream {
    until("somebody listens", || TcpStream::connect(address).is_ok());
    TcpStream::connect(address).unwrap()
}

#[test]
fn sockets_that_are_handed_over_are_used_and_nobody_else_has_them() {
    let user = User::new();
    let socket = user.state.path().join("handed.sock");
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let (by_path, by_port) = (socket.to_str().unwrap(), address.to_string());
    // One more is in the settings, and one of those is there already.
    let listen = format!("{by_port},127.0.0.1:0");
    let serve = ["--listen", &listen, "--socket", by_path, "serve"];
    let mut daemon = Daemon::start(activated(
        &user,
        &["-l", by_path, "-l", &by_port, "--fdname=one:other"],
        &serve,
    ));
    until("the tool listens", || socket.exists());
    assert_eq!(status(UnixStream::connect(&socket).unwrap(), "/readyz", "localhost"), 200);
    daemon.logs("denizen listens on 127.0.0.1");
    daemon.logs("denizen listens on 127.0.0.1");
    assert_eq!(status(connect(address), "/healthz", "localhost"), 200);
    assert_eq!(status(connect(address), "/v1/sessions", "localhost"), 401);
    // Nothing of it is in a session.
    let exec = ["--socket", by_path, "exec", "a", "--", "sh", "-c"];
    let line = "env; tr '\\0' '\\n' < /proc/1/environ; ls -l /proc/self/fd /proc/1/fd";
    let seen = user.run(&[&exec[..], &[line]].concat());
    let seen = text(&seen.stdout);
    assert!(seen.contains("PATH="), "{seen}");
    assert!(!seen.contains("LISTEN_") && !seen.contains("NOTIFY_"), "{seen}");
    daemon.signal(Signal::TERM);
    daemon.ends();
    // It is not the daemon's to delete.
    assert!(socket.exists());
}

#[test]
fn what_is_handed_over_and_cannot_be_used_is_refused_by_its_name() {
    let user = User::new();
    let refused = |tool: &[&str], wake: &dyn Fn()| -> String {
        let command = activated(&user, tool, &["--isolation", "host", "serve"]);
        let mut daemon = Daemon::start(command);
        wake();
        let mut said = String::new();
        daemon.log.read_to_string(&mut said).unwrap();
        assert_eq!(daemon.child.wait().unwrap().code(), Some(125), "{said}");
        said
    };
    let path = user.state.path().join("odd.sock");
    let place = path.to_str().unwrap();
    let wake = || {
        until("it is told", || {
            let sender = UnixDatagram::unbound().unwrap();
            sender.send_to(b"x", &path).is_ok()
        });
    };
    let said = refused(&["-d", "-l", place, "--fdname=packets"], &wake);
    assert!(said.contains("`packets` (descriptor 3)"), "{said}");
    std::fs::remove_file(&path).unwrap();
    // An address that others reach is held to what holds for those of the settings.
    let port = free_port();
    let wake = || drop(connect(SocketAddr::from(([127, 0, 0, 1], port))));
    let said = refused(&["-l", &format!("0.0.0.0:{port}")], &wake);
    assert!(said.contains("0.0.0.0") && said.contains("no key"), "{said}");
    // One of another process is not looked at.
    let mut other = user.denizen(&["--isolation", "host", "serve", "--idle-exit", "1"]);
    other.env("LISTEN_PID", "1").env("LISTEN_FDS", "7");
    Daemon::start(other).ends();
}

/// A command in the foreground whose daemon is sent SIGTERM, and another signal after that.
fn interrupted(user: &User, grace: &str, line: &str, more: Option<Signal>) -> Output {
    let args = ["--isolation", "host", "--grace-seconds", grace, "serve"];
    let mut daemon = Daemon::start(user.denizen(&args));
    daemon.logs("denizen listens on");
    let mut exec = user.denizen(&["exec", "a", "--", "sh", "-c", line]);
    let mut exec = exec.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut begun = [0; 6];
    exec.stdout.as_mut().unwrap().read_exact(&mut begun).unwrap();
    daemon.signal(Signal::TERM);
    if let Some(signal) = more {
        daemon.logs("asked to stop");
        daemon.signal(signal);
    }
    daemon.ends();
    exec.wait_with_output().unwrap()
}

#[test]
fn what_runs_in_the_foreground_is_given_time() {
    let user = User::new();
    // It ends when nobody answers any more: the daemon has begun to stop.
    let socket = user.state.path().join("denizen.sock");
    let line = format!("echo begun; while test -e {}; do :; done; echo done", socket.display());
    let done = interrupted(&user, "600", &line, None);
    assert_eq!(
        (done.status.code(), text(&done.stdout)),
        (Some(0), "done\n".to_owned()),
        "{done:?}"
    );
    let line = "echo begun; exec sleep 1000";
    for (grace, more) in [("0", None), ("600", Some(Signal::TERM)), ("600", Some(Signal::INT))] {
        let ended = interrupted(&user, grace, line, more);
        assert_ne!(ended.status.code(), Some(0), "{grace} {more:?}");
    }
}

#[test]
fn a_daemon_takes_over_from_another() {
    let user = User::new();
    let serve = || {
        let mut daemon = Daemon::start(user.denizen(&["serve"]));
        daemon.logs("denizen listens on");
        daemon
    };
    let first = serve();
    let line = "echo of the first; echo $$ > pid; exec sleep 1000";
    let job = ["exec", "-d", "--tag", "job", "a", "--", "sh", "-c", line];
    assert!(user.run(&job).status.success());
    let show = |line: &str| text(&user.exec("a", line).stdout);
    until("it runs", || show("cat pid") != "");
    let pid = show("cat pid");
    first.signal(Signal::TERM);
    first.ends();
    let second = serve();
    assert_eq!(user.json(&["inspect", "a"])["state"], "active");
    assert_eq!(show("cat pid; kill -0 $(cat pid) && echo there"), format!("{pid}there\n"));
    assert_eq!(text(&user.run(&["logs", "a", "job"]).stdout), "of the first\n");
    // What it starts has logs of its own.
    assert!(user.run(&["exec", "-d", "--tag", "new", "a", "--", "echo", "new"]).status.success());
    until("it has printed", || text(&user.run(&["logs", "a", "new"]).stdout).contains("new\n"));
    assert!(user.run(&["stop", "--force", "a"]).status.success());
    second.signal(Signal::TERM);
    second.ends();
}

#[test]
fn the_units_are_what_systemd_understands() {
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging");
    let folder = tempfile::tempdir().unwrap();
    let program = env!("CARGO_BIN_EXE_denizen");
    for unit in ["denizen.service", "denizen.socket"] {
        let text = std::fs::read_to_string(packaging.join(unit)).unwrap();
        std::fs::write(folder.path().join(unit), text.replace("/usr/bin/denizen", program))
            .unwrap();
    }
    let unit = |name: &str| folder.path().join(name);
    let mut verify = Command::new("systemd-analyze");
    verify.arg("verify").args([unit("denizen.service"), unit("denizen.socket")]);
    let verified = verify.output().unwrap();
    let said = text(&verified.stderr);
    // Before version 253, which the service says.
    let known = "Failed to parse service type, ignoring: notify-reload";
    let unknown: Vec<_> = said.lines().filter(|line| !line.ends_with(known)).collect();
    assert!(unknown.is_empty(), "{said}");
    // What holds for sandboxes too is set: less exposed than with nothing.
    let mut security = Command::new("systemd-analyze");
    security.args(["security", "--offline=true", "--threshold=90"]).arg(unit("denizen.service"));
    let security = security.output().unwrap();
    assert!(security.status.success(), "{}", text(&security.stdout));
}

/// systemd itself, as the manager of a user, with our units in it. It is told that the machine was
/// started by it, in a mount namespace of its own.
struct Systemd {
    folder: tempfile::TempDir,
    manager: Child,
}

impl Systemd {
    fn start(user: &User) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let units = folder.path().join("systemd/user");
        std::fs::create_dir_all(&units).unwrap();
        let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging");
        let state = user.state.path().to_str().unwrap();
        for unit in ["denizen.service", "denizen.socket"] {
            let text = std::fs::read_to_string(packaging.join(unit)).unwrap();
            let text = text
                .replace("/usr/bin/denizen", env!("CARGO_BIN_EXE_denizen"))
                .replace("/var/lib/denizen", state)
                .replace("WatchdogSec=60", "WatchdogSec=2")
                .replace(
                    "[Service]\n",
                    &format!(
                        "[Service]\nEnvironment=DENIZEN_STATE={state} DENIZEN_CACHE={}\n",
                        common::CACHE
                    ),
                );
            std::fs::write(units.join(unit), text).unwrap();
        }
        let line = "mkdir -p /run/systemd && mount -t tmpfs none /run/systemd && \
                    mkdir /run/systemd/system && exec /lib/systemd/systemd --user";
        let mut manager = Command::new("unshare");
        manager.args(["-m", "sh", "-ec", line]);
        let manager = Self::of(&folder, manager).stdin(Stdio::null()).spawn().unwrap();
        let systemd = Self { folder, manager };
        until("systemd answers", || systemd.control(&["show", "-p", "Version"]).status.success());
        systemd
    }

    fn of(folder: &tempfile::TempDir, mut command: Command) -> Command {
        command.env("XDG_RUNTIME_DIR", folder.path()).env("XDG_CONFIG_HOME", folder.path());
        command.env_remove("DBUS_SESSION_BUS_ADDRESS");
        command
    }

    fn control(&self, args: &[&str]) -> Output {
        let mut control = Command::new("systemctl");
        control.args(["--user", "--no-pager"]).args(args);
        Self::of(&self.folder, control).output().unwrap()
    }

    fn done(&self, args: &[&str]) {
        let output = self.control(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
    }

    /// What it knows of the service.
    fn shows(&self, what: &str) -> String {
        let shown = self.control(&["show", "denizen.service", "--value", "-p", what]);
        text(&shown.stdout).trim().to_owned()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        if !self.control(&["exit"]).status.success() {
            self.manager.kill().unwrap();
        }
        self.manager.wait().unwrap();
    }
}

#[test]
fn systemd_starts_it_watches_it_and_starts_it_anew() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let user = User::new();
    let systemd = Systemd::start(&user);
    systemd.done(&["start", "denizen.socket"]);
    assert_eq!(systemd.shows("ActiveState"), "inactive");
    // The first client starts it, as the manager's and not as its own.
    let job = "echo $$ > pid; exec sleep 1000";
    let started = user.run(&["exec", "-d", "a", "--", "sh", "-c", job]);
    assert!(started.status.success(), "{started:?}");
    until("it is active", || systemd.shows("ActiveState") == "active");
    assert!(systemd.shows("StatusText").starts_with("Serves on "));
    let pid = || systemd.shows("MainPID");
    // One of its own, in the background, has no number there.
    assert_ne!(pid(), "0");
    let there = || {
        let seen = user.exec("a", "kill -0 $(cat pid) && echo there");
        assert_eq!(text(&seen.stdout), "there\n", "{seen:?}");
    };
    until("it runs", || text(&user.exec("a", "cat pid").stdout) != "");

    let first = pid();
    systemd.done(&["kill", "--signal=HUP", "--kill-whom=main", "denizen.service"]);
    there();
    assert_eq!(pid(), first);
    systemd.done(&["restart", "denizen.service"]);
    assert_ne!(pid(), first);
    there();
    // One that hangs is ended, and another one starts.
    let second = pid();
    let hanging = Pid::from_raw(second.parse().unwrap()).unwrap();
    kill_process(hanging, Signal::STOP).unwrap();
    until("it is started anew", || systemd.shows("NRestarts") == "1" && pid() != second);
    there();
    assert!(user.run(&["stop", "--force", "a"]).status.success());
    systemd.done(&["stop", "denizen.socket", "denizen.service"]);
    assert_eq!(systemd.shows("Result"), "success");
}
