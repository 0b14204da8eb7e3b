//! Compares starting `/bin/true` and waiting for it through an [`Agent`] with
//! `tokio::process::Command`, interleaved in one run so that both meet the same weather,
//! and prints the medians and their ratio. `cargo run --release --example spawn_bench`.
#![allow(clippy::unwrap_used)]

use std::process::Stdio;
use std::time::{Duration, Instant};

use denizen_agent::{Agent, Spec};

const RUNS: usize = 1000;

#[tokio::main]
async fn main() {
    let agent = Agent::new();
    let mut plain = Vec::with_capacity(RUNS);
    let mut ours = Vec::with_capacity(RUNS);
    for run in 0..RUNS + 20 {
        let begin = Instant::now();
        through_tokio().await;
        let between = Instant::now();
        through_agent(&agent).await;
        let end = Instant::now();
        // The first ones launch init and fill caches.
        if run >= 20 {
            plain.push(between - begin);
            ours.push(end - between);
        }
    }
    let (plain, ours) = (median(plain), median(ours));
    println!("tokio::process::Command  {plain:>10.1?}");
    println!("denizen Agent            {ours:>10.1?}");
    println!("ratio                    {:>9.3}", ours.as_secs_f64() / plain.as_secs_f64());
}

/// With the same plumbing: no stdin, a pipe each for stdout and stderr.
async fn through_tokio() {
    let mut command = tokio::process::Command::new("/bin/true");
    command
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    assert!(child.wait().await.unwrap().success());
}

async fn through_agent(agent: &Agent) {
    let child = agent.spawn(Spec::new("/bin/true", "/")).await.unwrap();
    assert!(child.wait().await.unwrap().success());
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
