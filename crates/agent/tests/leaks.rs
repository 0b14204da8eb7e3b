//! Nothing stays: whatever is dropped at whatever moment, no process, no zombie and no
//! descriptor. One test only, because it counts what the whole test program has.
#![allow(clippy::unwrap_used)]

mod common;

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use common::{open_descriptors, own_children, sh, until, with_stdin};
use denizen_agent::{Agent, Stdio};
use tokio::io::AsyncWriteExt;

/// Everything that can be waited for, in one future.
async fn everything(agent: Agent, n: u64) {
    let mut spec =
        with_stdin(sh("cat; (setsid sleep 1000 &) ; sleep 0.001; echo end; exec sleep 1000"));
    if n.is_multiple_of(3) {
        spec.stdio = Stdio::Pty { columns: 80, rows: 24 };
    }
    if n.is_multiple_of(5) {
        spec.env.insert("FILL".into(), "x".repeat(50_000).into());
    }
    let mut child = agent.spawn(spec).await.unwrap();
    let mut stdin = child.take_stdin().unwrap();
    let mut output = child.take_output().unwrap();
    stdin.write_all(b"some\n").await.unwrap();
    output.next().await.unwrap();
    stdin.write_all(b"\x04").await.unwrap();
    drop(stdin);
    agent.busy().await.unwrap();
    output.next().await.unwrap();
    child.kill_tree().await.unwrap();
    child.wait().await.unwrap();
    while output.next().await.unwrap().is_some() {}
}

/// Whether a thread of ours still follows an init.
fn init_threads() -> bool {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = threads.filter_map(|thread| std::fs::read(thread.path().join("comm")).ok());
    names.into_iter().any(|name| name.starts_with(b"denizen-init"))
}

/// Polls a future at most so many times, then drops it. Lets the world go on in between.
async fn give_up_after(polls: u64, future: impl Future<Output = ()>) -> bool {
    let mut future = pin!(future);
    for _ in 0..polls {
        if let Poll::Ready(()) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return true;
        }
        tokio::time::sleep(Duration::from_micros(300)).await;
    }
    false
}

#[tokio::test]
async fn nothing_stays() {
    // Once through, so that what is made once is made.
    let agent = Agent::new();
    everything(agent.clone(), 0).await;
    agent.shutdown(Duration::ZERO).await.unwrap();
    until("the end of the first init", || own_children().is_empty()).await;
    // The thread that followed it closes its descriptors after the init is gone.
    until("the end of its thread", || !init_threads()).await;
    let before = open_descriptors();

    // On one agent, at every number of polls.
    let mut finished = 0;
    for n in 0..150 {
        finished += u32::from(give_up_after(n % 60, everything(agent.clone(), n)).await);
    }
    // Dropped handles kill without being waited for.
    let mut alive = agent.busy().await.unwrap();
    for _ in 0..2000 {
        if alive.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
        alive = agent.busy().await.unwrap();
    }
    assert!(alive.is_empty(), "{alive:?}");
    assert!(finished > 0, "no run came to its end");
    // Only the init is left, and it is no zombie.
    let children = own_children();
    assert_eq!(children.len(), 1, "{children:?}");
    assert_ne!(children[0].1, Some('Z'));
    // The init of it has nothing left either: no drain outlives its writers.
    let init = children[0].0;
    until("the end of the drains", || {
        std::fs::read_dir(format!("/proc/{init}/fd")).unwrap().count() == 4
    })
    .await;
    // Shutting down, given up at any moment, is still an end.
    for n in 0..20 {
        let other = Agent::new();
        let _ = give_up_after(20 + n, everything(other.clone(), n)).await;
        let _ = give_up_after(n, async { other.shutdown(Duration::from_millis(n)).await.unwrap() })
            .await;
    }
    // A launch that nobody waits for.
    for n in 0..20 {
        let _ = give_up_after(n % 4, everything(Agent::new(), n)).await;
    }
    drop(agent);
    until("the end of every child", || own_children().is_empty()).await;
    until("closing of every descriptor", || open_descriptors() == before).await;
}
