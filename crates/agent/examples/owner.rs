//! An owner for the tests to kill: starts a command with daemons, says what runs, and
//! waits for its end. `owner /path/to/a/script`.
#![allow(clippy::unwrap_used)]

use std::io::Write;

use denizen_agent::{Agent, Spec};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let agent = Agent::new();
    let mut spec = Spec::new("/bin/sh", "/");
    spec.args = std::env::args_os().skip(1).collect();
    let mut child = agent.spawn(spec).await.unwrap();
    let mut output = child.take_output().unwrap();
    // The script says when all of it runs.
    output.next().await.unwrap();
    let mut said = std::io::stdout().lock();
    for process in agent.busy().await.unwrap() {
        writeln!(said, "{} {}", process.pid, process.parent).unwrap();
    }
    writeln!(said, "ready").unwrap();
    said.flush().unwrap();
    child.wait().await.unwrap();
}
