//! Commands on a terminal: it is theirs, has the size it was given, and ends with them.
#![allow(clippy::unwrap_used)]

mod common;

use common::{collect, sh};
use denizen_agent::{Agent, Child, Error, Exit, Output, Spec, Stdio, Stream};
use tokio::io::AsyncWriteExt;

async fn on_terminal(agent: &Agent, script: &str) -> Child {
    let mut spec: Spec = sh(script);
    spec.stdio = Stdio::Pty { columns: 97, rows: 31 };
    agent.spawn(spec).await.unwrap()
}

/// Reads until the terminal has shown a text.
async fn expect(output: &mut Output, text: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(text) {
        let chunk =
            output.next().await.unwrap().unwrap_or_else(|| panic!("{text:?} not in {seen:?}"));
        assert_eq!(chunk.stream, Stream::Pty);
        seen.push_str(std::str::from_utf8(&chunk.bytes).unwrap());
    }
    seen
}

#[tokio::test]
async fn it_is_the_controlling_terminal() {
    let agent = Agent::new();
    let mut child = on_terminal(
        &agent,
        "tty; stty size; echo via-tty > /dev/tty; ls /proc/self/fd; ps -o tpgid= -p $$; exit 5",
    )
    .await;
    let pid = child.pid();
    let text = String::from_utf8(collect(&mut child).await.0).unwrap();
    let words: Vec<&str> = text.split_whitespace().collect();
    assert!(words[0].starts_with("/dev/pts/"), "{text}");
    assert_eq!(words[1..8], ["31", "97", "via-tty", "0", "1", "2", "3"], "{text}");
    assert_eq!(words[8], pid.to_string(), "the foreground process group");
    assert_eq!(child.wait().await.unwrap(), Exit::Code(5));
    assert!(child.take_stderr().is_none());
}

#[tokio::test]
async fn it_can_be_typed_at_and_resized() {
    let agent = Agent::new();
    let script = "echo ready; read line; stty size; echo \"<$line>\"; exec cat";
    let mut child = on_terminal(&agent, script).await;
    let mut stdin = child.take_stdin().unwrap();
    let mut output = child.take_output().unwrap();
    expect(&mut output, "ready").await;
    child.resize(120, 50).unwrap();
    stdin.write_all(b"hello\n").await.unwrap();
    assert!(expect(&mut output, "<hello>").await.contains("50 120\r\n"));
    // End of file, as it is typed.
    stdin.write_all(b"\x04").await.unwrap();
    assert_eq!(child.wait().await.unwrap(), Exit::Code(0));
    while output.next().await.unwrap().is_some() {}
}

#[tokio::test]
async fn a_new_size_is_told() {
    let agent = Agent::new();
    let script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.01; done";
    let mut child = on_terminal(&agent, script).await;
    let mut output = child.take_output().unwrap();
    expect(&mut output, "ready").await;
    child.resize(3, 4).unwrap();
    expect(&mut output, "4 3\r\n").await;
}

#[tokio::test]
async fn control_c_reaches_the_command() {
    let agent = Agent::new();
    let mut child = on_terminal(&agent, "echo ready; exec sleep 1000").await;
    let mut stdin = child.take_stdin().unwrap();
    let mut output = child.take_output().unwrap();
    expect(&mut output, "ready").await;
    stdin.write_all(b"\x03").await.unwrap();
    assert_eq!(child.wait().await.unwrap(), Exit::Signal(2));
}

#[tokio::test]
async fn its_last_words_are_not_lost() {
    let agent = Agent::new();
    for n in 0..50 {
        let mut child = on_terminal(&agent, &format!("seq 2000; echo last-{n}")).await;
        let text = String::from_utf8(collect(&mut child).await.0).unwrap();
        assert!(
            text.ends_with(&format!("last-{n}\r\n")),
            "{:?}",
            &text[text.len().saturating_sub(40)..]
        );
    }
}

#[tokio::test]
async fn only_terminals_have_a_size() {
    let agent = Agent::new();
    let child = agent.spawn(sh("true")).await.unwrap();
    assert!(matches!(child.resize(1, 1), Err(Error::NotATerminal)));
}
