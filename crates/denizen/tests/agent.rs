//! The example `agent`, as it stands, with a model that goes by a script and checks what it is
//! sent (`examples/scripted_model.py`).
#![allow(clippy::unwrap_used)]

#[path = "../examples/agent.rs"]
#[allow(dead_code, reason = "its `main` reads the environment")]
mod agent;
mod common;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use agent::Model;

/// The model's program, which ends with this.
struct Script(Child);

impl Drop for Script {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn scripted() -> (Script, Model) {
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/scripted_model.py");
    let mut child = Command::new("python3").arg(program).stdout(Stdio::piped()).spawn().unwrap();
    let mut url = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut url).unwrap();
    let [key, name] = ["scripted"; 2].map(str::to_owned);
    (Script(child), Model { url: url.trim().to_owned(), key, name })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_writes_a_program_mends_it_and_finds_it_again() {
    let folder = tempfile::tempdir().unwrap();
    let (_script, model) = scripted();
    let open = || common::opened(|| agent::sessions(folder.path()).unwrap().cache(common::cache()));
    for (task, answer) in [
        ("Write sum.sh, which prints the sum of the numbers from 1 to 10.", "sum.sh prints 55."),
        ("Run sum.sh again.", "It is still 55."),
    ] {
        let pool = open().await;
        assert_eq!(agent::run(&pool, "tester", &model, task).await.unwrap(), answer);
        pool.shutdown().await.unwrap();
    }
    // Another agent has another computer, and so a tool says what it must not.
    let pool = open().await;
    let refused = agent::run(&pool, "other", &model, "Run sum.sh again.").await;
    assert!(refused.unwrap_err().to_string().contains("must say"));
    pool.shutdown().await.unwrap();
}
