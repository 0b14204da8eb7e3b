//! What goes wrong around a daemon: clients that vanish in the middle, a disk that is full, a
//! registry that somebody else keeps busy, a session that kills what serves its files. Each gives
//! the right error to whom it concerns, leaves nothing half done, and is over when its cause is.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use common::{User, text, until};

/// Sends the beginning of a request to a daemon.
fn begin(user: &User, request: &str, headers: &str, body: &[u8]) -> UnixStream {
    let mut stream = UnixStream::connect(user.state.path().join("denizen.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    write!(stream, "{request} HTTP/1.1\r\nhost: it\r\nconnection: close\r\n{headers}\r\n").unwrap();
    stream.write_all(body).unwrap();
    stream
}

/// All that is answered.
fn answer(mut stream: UnixStream) -> String {
    let mut told = Vec::new();
    stream.read_to_end(&mut told).unwrap();
    text(&told)
}

fn volume(user: &User, session: &str) -> PathBuf {
    user.json(&["inspect", session])["volume"].as_str().unwrap().into()
}

/// The names in a folder.
fn names(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap();
    names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn is_idle(user: &User, session: &str) -> bool {
    let told = user.json(&["inspect", session]);
    told["in_use"] == false && told["operation"].is_null()
}

#[test]
fn an_upload_whose_client_vanishes_leaves_no_file() {
    for isolation in ["host", "sandbox"] {
        let user = User::new();
        user.json(&["--isolation", isolation, "--spares", "0", "ls"]);
        assert!(user.exec("a", "echo before > there").status.success());
        let volume = volume(&user, "a");
        for path in ["new", "there"] {
            let request = format!("POST /files?path={path}");
            let headers = "denizen-session: a\r\ncontent-length: 1000000\r\n";
            let client = begin(&user, &request, headers, &vec![b'x'; 300_000]);
            until("some of it has come", || {
                names(&volume).iter().any(|name| name != "there") && !is_idle(&user, "a")
            });
            drop(client);
            until("nothing of it is left", || names(&volume) == ["there"] && is_idle(&user, "a"));
        }
        assert_eq!(user.exec("a", "cat there").stdout, b"before\n");
        assert!(user.run(&["stop", "a"]).status.success());
    }
}

#[test]
fn a_restore_whose_client_vanishes_is_whole() {
    let user = User::new();
    user.json(&["--isolation", "host", "ls"]);
    let line = "head -c 40000000 /dev/urandom > data; sha256sum data > sum";
    assert!(user.exec("a", line).status.success());
    user.json(&["backup", "a"]);
    assert!(user.exec("a", "echo other > data").status.success());
    assert!(user.run(&["stop", "--force", "a"]).status.success());
    let client = begin(&user, "POST /v1/sessions/a/restore", "content-length: 0\r\n", b"");
    until("it has begun", || user.json(&["inspect", "a"])["operation"] == "restore");
    drop(client);
    until("it is over", || is_idle(&user, "a"));
    // All of it, or nothing.
    let checked = user.exec("a", "[ \"$(cat data)\" = other ] || sha256sum -c sum");
    assert!(checked.status.success(), "{checked:?}");
    assert!(user.run(&["stop", "--force", "a"]).status.success());
    let pool = user.state.path().join("pool/.denizen");
    for place in ["staging", "trash"] {
        let left = pool.join(place);
        until("nothing is left of it", || !left.exists() || names(&left).is_empty());
    }
}

/// A daemon whose volume root and backups are on a disk of 64 MiB, which is its own.
struct Small {
    user: User,
    daemon: Child,
}

impl Small {
    fn new() -> Self {
        let user = User::new();
        let small = user.state.path().join("small");
        std::fs::create_dir(&small).unwrap();
        let mut serve = user.denizen(&["--isolation", "host", "--spares", "0"]);
        let root = small.join("pool");
        serve.args([Path::new("--volume-root"), &root, Path::new("--backup-destination")]);
        serve.args([small.join("backups").as_path(), Path::new("serve")]);
        let line = "mount -t tmpfs -o size=64m tmpfs \"$1\" && shift && exec \"$@\"";
        let mut within = Command::new("unshare");
        within.args(["--user", "--map-root-user", "--mount", "sh", "-c", line, "sh"]);
        within.arg(&small).arg(serve.get_program()).args(serve.get_args());
        for (name, value) in serve.get_envs() {
            match value {
                Some(value) => within.env(name, value),
                None => within.env_remove(name),
            };
        }
        let daemon = within.stdin(Stdio::null()).spawn().unwrap();
        let socket = user.state.path().join("denizen.sock");
        until("it serves", || UnixStream::connect(&socket).is_ok());
        Self { user, daemon }
    }

    /// What it says of being ready.
    fn ready(&self) -> String {
        answer(begin(&self.user, "GET /readyz", "", b""))
    }
}

fn full(output: &Output) {
    let said = text(&output.stderr);
    assert!(!output.status.success(), "{output:?}");
    let said = said.to_lowercase();
    assert!(said.contains("no space left") || said.contains("is full"), "{said}");
}

#[test]
fn a_full_disk_is_told_of_and_is_over_when_there_is_room() {
    let Small { user, mut daemon } = {
        let small = Small::new();
        let user = &small.user;
        assert!(user.exec("a", "echo mine > kept").status.success());
        // The command that meets it first is told by the system itself.
        full(&user.exec("a", "head -c 100000000 /dev/urandom > big"));
        full(&user.exec("a", "head -c 4096 /dev/zero > more"));
        until("it is not ready", || small.ready().contains(" 503 "));
        full(&user.exec("b", "true"));
        // Who writes nothing goes on.
        assert_eq!(user.exec("a", "cat kept").stdout, b"mine\n");
        full(&user.run(&["backup", "a"]));
        full(&user.run(&["fork", "a"]));
        assert_eq!(user.json(&["ls"]).as_array().unwrap().len(), 1);

        // Room is made by whoever looks after the disk.
        let there = PathBuf::from(format!("/proc/{}/root", small.daemon.id()));
        let volume = there.join(volume(user, "a").strip_prefix("/").unwrap());
        std::fs::remove_file(volume.join("big")).unwrap();
        until("it is ready", || small.ready().contains(" 200 "));
        let made = user.exec("b", "echo there");
        assert_eq!(made.stdout, b"there\n", "{made:?}");
        user.json(&["backup", "a"]);
        assert!(user.run(&["fork", "a"]).status.success());
        assert_eq!(user.exec("a", "cat kept").stdout, b"mine\n");
        small
    };
    assert!(user.run(&["shutdown"]).status.success());
    assert!(daemon.wait().unwrap().success());
}

#[test]
fn a_registry_that_somebody_keeps_busy_is_waited_for() {
    let user = User::new();
    user.json(&["--isolation", "host", "--spares", "0", "ls"]);
    assert!(user.exec("a", "true").status.success());
    let registry = std::fs::read_dir(user.state.path().join("pool/.denizen")).unwrap();
    let mut files = registry.map(|entry| entry.unwrap().path());
    let registry = files.find(|path| {
        let mut head = [0; 15];
        let read = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut head));
        read.is_ok() && &head == b"SQLite format 3"
    });
    let mut other = Command::new("sqlite3")
        .arg(registry.unwrap())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut tell = other.stdin.take().unwrap();
    let mut told = BufReader::new(other.stdout.take().unwrap());
    tell.write_all(b"BEGIN IMMEDIATE;\nSELECT 'locked';\n").unwrap();
    let mut line = String::new();
    told.read_line(&mut line).unwrap();
    assert_eq!(line, "locked\n");
    // Who needs no row is not held up.
    assert!(user.exec("a", "true").status.success());
    let new = user.exec("b", "true");
    let said = text(&new.stderr);
    assert!(!new.status.success() && said.contains("locked"), "{said}");
    assert!(user.exec("a", "true").status.success());
    tell.write_all(b"ROLLBACK;\n").unwrap();
    drop(tell);
    assert!(other.wait().unwrap().success());
    until("a session is made", || user.exec("b", "true").status.success());
    let names: Vec<_> =
        user.json(&["ls"]).as_array().unwrap().iter().map(|it| it["name"].clone()).collect();
    assert_eq!(names, ["a", "b"]);
}

#[test]
fn a_session_that_kills_its_agent_ends_its_own_requests_only() {
    let user = User::new();
    user.json(&["--spares", "0", "ls"]);
    assert!(user.exec("a", "echo kept > kept").status.success());
    assert!(user.exec("b", "echo other > kept").status.success());
    let headers = "denizen-session: a\r\ncontent-length: 1000000\r\n";
    let mut client = begin(&user, "POST /files?path=half", headers, &vec![b'x'; 300_000]);
    let volume = volume(&user, "a");
    until("some of it has come", || names(&volume).len() > 1);
    let kill = "for p in /proc/[0-9]*; do
            tr '\\0' ' ' < $p/cmdline 2> /dev/null | grep -q '[d]enizen/agent' && kill -9 ${p#/proc/}
        done; true";
    assert!(user.exec("a", kill).status.success());
    // What nobody takes any more is read on, so that its sender sees why.
    client.write_all(&vec![b'x'; 700_000]).unwrap();
    let told = answer(client);
    assert!(told.starts_with("HTTP/1.1 5"), "{told}");
    // The next one has another.
    for (session, content) in [("a", "kept"), ("b", "other")] {
        let headers = format!("denizen-session: {session}\r\n");
        let told = answer(begin(&user, "GET /files?path=kept", &headers, b""));
        assert!(
            told.starts_with("HTTP/1.1 200") && told.ends_with(&format!("{content}\n")),
            "{told}"
        );
    }
    assert!(!names(&volume).contains(&"half".to_owned()));
    until("it is given back", || is_idle(&user, "a"));
    assert!(user.run(&["stop", "a"]).status.success());
}
