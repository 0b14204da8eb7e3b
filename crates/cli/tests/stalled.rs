//! Clients that stop reading, never send the rest or hold a port: they hold nobody else up.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{User, running, text, until};

/// Sends the head of a request, and the beginning of its body.
fn send(user: &User, line: &str, headers: &[&str], body: &str) -> UnixStream {
    let mut stream = UnixStream::connect(user.state.path().join("denizen.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let headers: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
    write!(stream, "{line} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n{body}").unwrap();
    stream
}

fn post(user: &User, path: &str, body: &str) -> UnixStream {
    let length = format!("content-length: {}", body.len());
    send(user, &format!("POST {path}"), &["content-type: application/json", &length], body)
}

/// Reads the status of an answer, and nothing after its head.
fn status(stream: &UnixStream) -> u16 {
    let mut head = Vec::new();
    for byte in stream.bytes() {
        head.push(byte.unwrap());
        if head.ends_with(b"\r\n\r\n") {
            break;
        }
    }
    text(&head).split(' ').nth(1).unwrap().parse().unwrap()
}

/// All kinds of requests that are begun and never finished.
fn stalled(user: &User) -> Vec<UnixStream> {
    let yes = post(user, "/v1/sessions/a/processes", r#"{"command": ["yes"]}"#);
    let read = send(user, "GET /files?path=big", &["denizen-session: a"], "");
    let folder = send(user, "GET /files?path=.&format=tar", &["denizen-session: a"], "");
    let port = "GET /v1/sessions/a/ports/8000";
    let port = send(user, port, &["connection: upgrade", "upgrade: tcp"], "");
    let file = send(user, "GET /v1/sessions/a/files/~/big", &[], "");
    let begun = [(&yes, 200), (&read, 200), (&folder, 200), (&port, 101), (&file, 200)];
    for (stream, wanted) in begun {
        assert_eq!(status(stream), wanted);
    }
    let headers = ["denizen-session: a", "content-length: 1000"];
    let write = send(user, "POST /files?path=new", &headers, "its beginning");
    let put = send(user, "PUT /v1/sessions/a/files/~/newer", &headers, "its beginning");
    // What listens there never answers.
    let asked = send(user, "GET /v1/sessions/a/ports/8000/", &[], "");
    vec![yes, read, folder, port, file, write, put, asked]
}

/// Runs the program, which must not take long.
fn soon(user: &User, args: &[&str]) {
    let mut child = user.denizen(args).stderr(Stdio::piped()).spawn().unwrap();
    until(&args.join(" "), || child.try_wait().unwrap().is_some());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
}

fn nobody_is_held_up(isolation: &str) {
    let user = User::new();
    let with = |args: &[&str]| {
        let output = user.run(&[&["--isolation", isolation], args].concat());
        assert!(output.status.success(), "{output:?}");
    };
    let listen = "import socket, time; s = socket.create_server(('127.0.0.1', 8000)); \
                  open('listens', 'w'); time.sleep(1000)";
    let serve = |user: &User| {
        with(&["exec", "a", "--", "rm", "-f", "listens"]);
        with(&["exec", "-d", "a", "--", "python3", "-c", listen]);
        until("it listens", || user.exec("a", "test -e listens").status.success());
    };
    with(&["exec", "a", "--", "sh", "-c", "head -c 64M /dev/zero > big"]);
    serve(&user);
    let first = stalled(&user);
    soon(&user, &["stop", "--force", "a"]);
    assert_eq!(user.json(&["inspect", "a"])["state"], "stopped");
    // Who reads on is told that it is not all.
    let mut rest = Vec::new();
    let _ = (&first[1]).read_to_end(&mut rest);
    assert!(rest.len() < 64 << 20, "{}", rest.len());
    serve(&user);
    let second = stalled(&user);
    let daemon = format!("/proc/{}/cmdline", user.daemon_pid().unwrap());
    soon(&user, &["shutdown"]);
    until("the daemon leaves", || std::fs::read(&daemon).unwrap_or_default().is_empty());
    drop(second);
    serve(&user);
    let third = stalled(&user);
    soon(&user, &["rm", "--force", "a"]);
    drop((first, third));
}

#[test]
fn nobody_is_held_up_in_a_sandbox() {
    nobody_is_held_up("sandbox");
}

#[test]
fn nobody_is_held_up_on_the_host() {
    nobody_is_held_up("host");
}

#[test]
fn a_command_that_nobody_reads_has_its_timeout() {
    let user = User::new();
    let mark = format!("6317{}", std::process::id());
    let body = format!(r#"{{"command": ["yes", "{mark}"], "timeout_seconds": 1}}"#);
    user.json(&["ls"]);
    let stream = post(&user, "/v1/sessions/a/processes", &body);
    assert_eq!(status(&stream), 200);
    until("it is killed", || running(&format!("yes {mark}")).is_empty());
    until("the session is free", || user.json(&["inspect", "a"])["in_use"] == false);
    // Whoever reads late is told why there is no more.
    let lines = BufReader::new(&stream).lines().map(Result::unwrap);
    let mut lines = lines.skip_while(|line| line != "event: lost").skip(1);
    assert!(lines.next().unwrap().contains("timeout"));
    // A timeout beyond all time is none.
    let body = r#"{"command": ["true"], "timeout_seconds": 18446744073709551615}"#;
    let stream = post(&user, "/v1/sessions/a/processes", body);
    let mut lines = BufReader::new(&stream).lines().map(Result::unwrap);
    assert!(lines.any(|line| line == r#"data: {"code":0}"#));
}

#[test]
fn nobody_waits_longer_for_a_place_than_allowed() {
    let user = User::new();
    let settings = ["--isolation", "host", "--max-vms", "1", "--acquire-timeout-seconds", "2"];
    let made = user.run(&[&settings[..], &["exec", "a", "--", "true"]].concat());
    assert!(made.status.success(), "{made:?}");
    let holding = post(&user, "/v1/sessions/a/processes", r#"{"command": ["sleep", "1000"]}"#);
    assert_eq!(status(&holding), 200);
    let begin = Instant::now();
    let all: Vec<_> = (0..4).map(|_| send(&user, "PUT /v1/sessions/b", &[], "")).collect();
    for waiting in &all {
        assert_eq!(status(waiting), 503);
    }
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

#[test]
fn what_is_frozen_is_thawed_to_be_spoken_to() {
    let user = User::new();
    let settings = ["--sleep", "freeze", "--background-is-use", "false"];
    let soon_frozen = ["--idle-shutdown-seconds", "1", "exec", "a", "--", "true"];
    let made = user.run(&[&settings[..], &soon_frozen].concat());
    assert!(made.status.success(), "{made:?}");
    let start = |body| assert_eq!(status(&post(&user, "/v1/sessions/a/processes", body)), 201);
    start(r#"{"command": ["cat"], "tag": "cat", "stdin": true, "detach": true}"#);
    start(r#"{"command": ["sleep", "1000"], "tag": "sleep", "detach": true}"#);
    let frozen = || until("it is frozen", || user.json(&["inspect", "a"])["state"] == "frozen");
    frozen();
    let output = send(&user, "GET /v1/sessions/a/processes/cat/output", &[], "");
    assert_eq!(status(&output), 200);
    let input = post(&user, "/v1/sessions/a/processes/cat/input", "hello\n");
    assert_eq!(status(&input), 204);
    let mut lines = BufReader::new(&output).lines().map(Result::unwrap);
    assert!(lines.any(|line| line == "event: output"));
    frozen();
    let begin = Instant::now();
    let signal = post(&user, "/v1/sessions/a/processes/cat/signal", r#"{"signal": 9}"#);
    assert_eq!(status(&signal), 204);
    assert!(lines.any(|line| line == "event: exit"));
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    // Nothing else is touched; nor is what is frozen waited for in vain at the end.
    let list = send(&user, "GET /v1/sessions/a/processes", &["connection: close"], "");
    let mut all = String::new();
    (&list).read_to_string(&mut all).unwrap();
    assert_eq!(all.matches("\"ended\":{").count(), 1, "{all}");
    frozen();
    let begin = Instant::now();
    let daemon = format!("/proc/{}/cmdline", user.daemon_pid().unwrap());
    soon(&user, &["shutdown"]);
    until("the daemon leaves", || std::fs::read(&daemon).unwrap_or_default().is_empty());
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}
