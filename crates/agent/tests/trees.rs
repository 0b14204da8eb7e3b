//! Ends: whatever a command started goes when it has to, however it hid, and nothing else.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{collect, is_alive, run, sh, until, until_gone};
use denizen_agent::{Agent, Child, Error, Exit, Output, Scope};

/// A daemon in every way: a session of its own, an empty environment if `bare`, and its
/// parents gone. Writes its number to its output first.
fn daemon(bare: bool) -> String {
    let bare = if bare { "env -i " } else { "" };
    format!(
        "{bare}/usr/bin/setsid /bin/sh -c '(echo $$; /bin/sh -c \"echo \\$PPID; exec /bin/sleep 1000\") & '; "
    )
}

async fn start(agent: &Agent, script: &str) -> (Child, Output) {
    let mut child = agent.spawn(sh(script)).await.unwrap();
    let output = child.take_output().unwrap();
    (child, output)
}

/// Reads a word that the command says.
async fn said(output: &mut Output, until: &str) -> String {
    let mut text = String::new();
    while !text.contains(until) {
        let chunk =
            output.next().await.unwrap().unwrap_or_else(|| panic!("no {until:?} in {text:?}"));
        text.push_str(std::str::from_utf8(&chunk.bytes).unwrap());
    }
    text
}

async fn sleeps(agent: &Agent) -> Vec<u32> {
    let busy = agent.busy().await.unwrap();
    busy.iter().filter(|process| process.name == "sleep").map(|process| process.pid).collect()
}

async fn until_asleep(agent: &Agent, count: usize) -> Vec<u32> {
    let begin = Instant::now();
    loop {
        let found = sleeps(agent).await;
        if found.len() == count {
            return found;
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "{found:?} instead of {count}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_clearing_ends_everything_and_init_goes_on() {
    let agent = Agent::new();
    agent.clear().await.unwrap();
    let (one, _one) = start(&agent, &format!("{} exec sleep 1000", daemon(true))).await;
    let (two, _two) = start(&agent, "trap '' TERM; sleep 1000; sleep 1000").await;
    let pids = until_asleep(&agent, 3).await;
    // One that is asked for meanwhile begins afterwards.
    let (cleared, third) = tokio::join!(biased; agent.clear(), agent.spawn(sh("exec sleep 1000")));
    cleared.unwrap();
    let third = third.unwrap();
    for pid in pids {
        assert!(!is_alive(pid), "{pid} lives");
    }
    for child in [&one, &two] {
        assert_eq!(child.wait().await.unwrap(), Exit::Signal(9));
    }
    assert_eq!(until_asleep(&agent, 1).await, [third.pid()]);
    assert_eq!(run(&agent, "echo goes on").await, "goes on");
}

#[tokio::test]
async fn daemons_die_with_kill_tree() {
    for bare in [false, true] {
        let agent = Agent::new();
        let other = agent.spawn(sh("exec sleep 2000")).await.unwrap();
        let (child, _output) = start(&agent, &format!("{} exec sleep 1000", daemon(bare))).await;
        let pids = until_asleep(&agent, 3).await;
        // The daemon is nobody's but init's by now.
        let busy = agent.busy().await.unwrap();
        let init = busy.iter().find(|process| process.pid == child.pid()).unwrap().parent;
        let daemons = busy
            .iter()
            .filter(|process| process.command == Some(child.id()) && process.pid != child.pid());
        assert!(daemons.clone().count() >= 1, "{busy:?}");
        assert!(daemons.clone().any(|process| process.parent == init), "{busy:?}");

        child.kill_tree().await.unwrap();
        assert_eq!(child.wait().await.unwrap(), Exit::Signal(9));
        for pid in pids.into_iter().filter(|pid| *pid != other.pid()) {
            assert!(!is_alive(pid), "{pid} lives (bare: {bare})");
        }
        assert!(is_alive(other.pid()), "another command was killed");
    }
}

#[tokio::test]
async fn daemons_die_with_a_drop() {
    for bare in [false, true] {
        let agent = Agent::new();
        let other = agent.spawn(sh("exec sleep 2000")).await.unwrap();
        let (child, output) = start(&agent, &format!("{} exec sleep 1000", daemon(bare))).await;
        let pids = until_asleep(&agent, 3).await;
        drop((child, output));
        for pid in pids.into_iter().filter(|pid| *pid != other.pid()) {
            until_gone(pid).await;
        }
        assert!(is_alive(other.pid()), "another command was killed");
    }
}

#[tokio::test]
async fn daemons_can_be_killed_after_their_command() {
    let agent = Agent::new();
    let (child, _output) = start(&agent, &daemon(true)).await;
    child.wait().await.unwrap();
    let pids = until_asleep(&agent, 1).await;
    child.kill_tree().await.unwrap();
    assert!(!is_alive(pids[0]));
    // And again, with nothing left.
    child.kill_tree().await.unwrap();
    assert!(agent.busy().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_drop_after_the_end_leaves_daemons_alone() {
    let agent = Agent::new();
    let (child, output) = start(&agent, &daemon(false)).await;
    child.wait().await.unwrap();
    let pids = until_asleep(&agent, 1).await;
    drop((child, output));
    // A full round trip behind the drop.
    assert_eq!(run(&agent, "echo fine").await, "fine");
    assert_eq!(sleeps(&agent).await, pids);
    agent.shutdown(Duration::ZERO).await.unwrap();
    assert!(!is_alive(pids[0]));
}

#[tokio::test]
async fn signals_reach_their_scope() {
    let agent = Agent::new();
    let script = "trap 'echo leader' USR1; (trap 'echo member; exit' USR1; echo ready; while :; do sleep 0.01; done) & while :; do sleep 0.01; done";
    let (child, mut output) = start(&agent, script).await;
    said(&mut output, "ready").await;
    child.signal(10, Scope::Leader).unwrap();
    assert!(!said(&mut output, "leader\n").await.contains("member"));
    // The sleeps know no trap, die of it, and are started again.
    child.signal(10, Scope::Group).unwrap();
    let text = said(&mut output, "member\n").await;
    if !text.contains("leader") {
        said(&mut output, "leader").await;
    }
    child.kill_tree().await.unwrap();

    let (child, _output) = start(&agent, &format!("{} exec sleep 1000", daemon(true))).await;
    let pids = until_asleep(&agent, 2).await;
    child.signal(15, Scope::Tree).unwrap();
    for pid in pids {
        until_gone(pid).await;
    }
    assert_eq!(child.wait().await.unwrap(), Exit::Signal(15));
}

/// Each generation starts the next and is gone, most in a session of their own: there is
/// hardly ever a parent to be found, or a group to be killed.
#[tokio::test]
async fn what_forks_for_its_life_loses() {
    for (script, at_least) in [
        ("while (1) { exit if fork(); POSIX::setsid(); }", 1),
        ("while (1) { exit if fork(); }", 1),
        // Four of the same.
        ("fork(); fork(); while (1) { exit if fork(); POSIX::setsid(); }", 2),
        // Some that stay among those that run.
        ("while (1) { if (fork()) { sleep 1000 if rand() < 0.1; exit } POSIX::setsid(); }", 50),
        // It is killed while it grows, to 512 at most, each a burden.
        ("for (1..9) { fork(); POSIX::setsid(); } while (1) {}", 50),
        // It grows to about a thousand.
        ("for (1..10) { fork(); POSIX::setsid(); } sleep 1000", 900),
    ] {
        let agent = Agent::new();
        for bare in [false, true] {
            let mut spec = sh("exec \"$@\"");
            let clear = if bare { "exec env -i \"$0\" \"$@\"" } else { "exec \"$0\" \"$@\"" };
            spec.args = vec!["-c".into(), clear.into(), "/usr/bin/perl".into()];
            spec.args.extend(["-MPOSIX".into(), "-e".into(), script.into()]);
            let child = agent.spawn(spec).await.unwrap();
            let begin = Instant::now();
            let mut most = 0;
            while most < at_least || begin.elapsed() < Duration::from_millis(20) {
                most = most.max(agent.busy().await.unwrap().len());
                assert!(begin.elapsed() < Duration::from_secs(20), "only {most}: {script}");
            }
            let begin = Instant::now();
            child.kill_tree().await.unwrap();
            let took = begin.elapsed();
            println!("{took:?} for {most} of {script}");
            assert!(took < Duration::from_secs(20), "{took:?} for {script}");
            for _ in 0..20 {
                assert_eq!(agent.busy().await.unwrap(), [], "{script}");
            }
        }
    }
}

#[tokio::test]
async fn a_dead_init_is_an_error_then_there_is_a_new_one() {
    let agent = Agent::new();
    let (child, mut output) =
        start(&agent, &format!("{} echo up; exec sleep 1000", daemon(true))).await;
    let pids = until_asleep(&agent, 2).await;
    said(&mut output, "up").await;
    let init = agent
        .busy()
        .await
        .unwrap()
        .iter()
        .find(|process| process.pid == child.pid())
        .unwrap()
        .parent;
    let waiting = child.wait();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(i32::try_from(init).unwrap()).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    assert!(matches!(waiting.await, Err(Error::InitLost)));
    assert!(matches!(child.wait().await, Err(Error::InitLost)));
    assert!(matches!(child.try_wait(), Err(Error::InitLost)));
    assert!(matches!(child.kill_tree().await, Err(Error::InitLost)));
    assert!(matches!(child.signal(15, Scope::Leader), Err(Error::InitLost)));
    // What it ran was killed, though nobody was its parent any more.
    for pid in pids {
        until_gone(pid).await;
    }
    while output.next().await.unwrap().is_some() {}
    assert_eq!(run(&agent, "echo fine").await, "fine");
}

#[tokio::test]
async fn shutdown_asks_first() {
    let agent = Agent::new();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("saved");
    let polite = format!(
        "trap 'echo saved > {}; exit 0' TERM; echo ready; while :; do sleep 0.01; done",
        file.display()
    );
    let (child, mut output) = start(&agent, &polite).await;
    said(&mut output, "ready").await;
    let begin = Instant::now();
    agent.shutdown(Duration::from_secs(20)).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "saved\n");
    assert_eq!(child.wait().await.unwrap(), Exit::Code(0));

    // The agent can be used again; and who does not listen is killed.
    let (child, mut output) =
        start(&agent, "trap '' TERM; echo ready; while :; do sleep 0.01; done").await;
    said(&mut output, "ready").await;
    let begin = Instant::now();
    agent.shutdown(Duration::from_millis(100)).await.unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(100));
    assert_eq!(child.wait().await.unwrap(), Exit::Signal(9));
    agent.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn dropping_the_agent_kills_everything() {
    let agent = Agent::new();
    let (child, mut output) =
        start(&agent, &format!("{} echo up; exec sleep 1000", daemon(true))).await;
    let pids = until_asleep(&agent, 2).await;
    said(&mut output, "up").await;
    drop(agent);
    for pid in pids {
        until_gone(pid).await;
    }
    // The handle still tells how it ended, and asks for nothing any more.
    assert_eq!(child.wait().await.unwrap(), Exit::Signal(9));
    assert!(matches!(child.kill_tree().await, Err(Error::ShuttingDown | Error::InitLost)));
}

#[test]
fn it_ends_without_a_runtime() {
    let agent = Agent::new();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (child, mut rest) =
        runtime.block_on(async { start(&agent, "echo $$; exec sleep 1000").await });
    let pid = child.pid();
    runtime.block_on(async { said(&mut rest, "\n").await });
    drop(runtime);
    drop((child, rest));
    let begin = Instant::now();
    while is_alive(pid) {
        assert!(begin.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(2));
    }
    drop(agent);
}

#[tokio::test]
async fn signals_for_the_owner_do_not_reach_init() {
    let agent = Agent::new();
    let script = "for s in HUP INT QUIT TERM PIPE; do kill -$s $PPID; done; echo sent";
    assert_eq!(run(&agent, script).await, "sent");
    assert_eq!(run(&agent, "echo fine").await, "fine");
    // Init shares neither session nor folder nor descriptors with its owner.
    let text = run(&agent, "cut -d' ' -f6 /proc/$PPID/stat; readlink /proc/$PPID/cwd; ls /proc/$PPID/fd | wc -l; cat /proc/$PPID/comm; echo $PPID").await;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], lines[4]);
    assert_eq!(lines[1], "/");
    // Its socket, two to nowhere, and the one that tells of ended children.
    assert_eq!(lines[2], "4");
    assert_eq!(lines[3], "denizen-init");
}

#[tokio::test]
async fn output_of_a_killed_command_ends() {
    let agent = Agent::new();
    let mut child = agent.spawn(sh("echo before; exec sleep 1000")).await.unwrap();
    let killed = async {
        // Not before it has spoken.
        until("the sleep", || {
            std::fs::read_to_string(format!("/proc/{}/comm", child.pid()))
                .is_ok_and(|name| name == "sleep\n")
        })
        .await;
        child.kill_tree().await.unwrap();
    };
    killed.await;
    assert_eq!(collect(&mut child).await.0, b"before\n");
}
