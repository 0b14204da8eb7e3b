//! What the tests of this crate share: a shell command, all of its output, and a look at
//! foreign processes. It must never end a process that a test did not start.
#![allow(clippy::unwrap_used, dead_code, reason = "every test program uses a part of it")]

use std::time::{Duration, Instant};

use denizen_agent::{Agent, Child, Spec, Stdio, Stream};

pub const PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin";

/// `sh -c script` with a PATH, in /tmp.
pub fn sh(script: &str) -> Spec {
    let mut spec = Spec::new("sh", "/tmp");
    spec.args = vec!["-c".into(), script.into()];
    spec.env.insert("PATH".into(), PATH.into());
    spec
}

pub fn with_stdin(mut spec: Spec) -> Spec {
    spec.stdio = Stdio::Pipes { stdin: true };
    spec
}

/// Reads a command's output to its end: stdout (or the terminal), and stderr.
pub async fn collect(child: &mut Child) -> (Vec<u8>, Vec<u8>) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut output = child.take_output().unwrap();
    while let Some(chunk) = output.next().await.unwrap() {
        match chunk.stream {
            Stream::Stderr => err.extend_from_slice(&chunk.bytes),
            _ => out.extend_from_slice(&chunk.bytes),
        }
    }
    (out, err)
}

/// Runs a script and gives its stdout.
pub async fn run(agent: &Agent, script: &str) -> String {
    let mut child = agent.spawn(sh(script)).await.unwrap();
    let (out, _) = collect(&mut child).await;
    child.wait().await.unwrap();
    String::from_utf8(out).unwrap().trim().to_owned()
}

/// The state letter of a process in `proc_pid_stat(5)`, if there is one.
pub fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let close = stat.iter().rposition(|byte| *byte == b')')?;
    Some(char::from(*stat.get(close + 2)?))
}

pub fn is_alive(pid: u32) -> bool {
    state(pid).is_some_and(|state| state != 'Z' && state != 'X')
}

/// Polls, because nothing tells when a foreign process changes.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < Duration::from_secs(20), "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

pub async fn until_gone(pid: u32) {
    until(&format!("the end of {pid}"), || !is_alive(pid)).await;
}

/// Every child of this process, with its state.
pub fn own_children() -> Vec<(u32, Option<char>)> {
    let mut found = Vec::new();
    for thread in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let list = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        found.extend(
            list.split_whitespace().map(|pid| pid.parse().unwrap()).map(|pid| (pid, state(pid))),
        );
    }
    found
}

/// How many descriptors this process has open (one of them is the reading's own).
pub fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Bytes as protobuf's JSON has them, which are text here.
pub fn base64(text: &str) -> String {
    use base64::Engine;
    let bytes = base64::engine::general_purpose::STANDARD.decode(text).unwrap();
    String::from_utf8(bytes).unwrap()
}
