//! Every attempt that is a control has to succeed where nothing holds it: run by root,
//! unconfined, with all facts. One that does not could not fail in a session either.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::process::{Command, Stdio};

use common::{PROGRAM, Stage, list};

/// Whether this process has a capability, told by what a need begins with.
fn has(need: &str) -> bool {
    let number: u32 = need.split(',').next().unwrap().parse().unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(effective.trim(), 16).unwrap() >> number & 1 == 1
}

#[test]
fn names_are_unique_and_there_are_enough() {
    let mut names: Vec<String> = list().iter().map(|one| one["name"].to_string()).collect();
    let count = names.len();
    assert!(count >= 70, "{count}");
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count);
}

#[test]
fn what_is_not_told_is_not_tried() {
    let run = |words: &[&str]| Command::new(PROGRAM).args(words).output().unwrap().status.code();
    assert_eq!(run(&["run", "host-file"]), Some(2));
    assert_eq!(run(&["run", "no-such-attempt"]), Some(2));
    assert_eq!(run(&["run", "host-file", "--host-file"]), Some(2));
}

#[test]
fn a_fact_may_come_from_the_environment() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "the word").unwrap();
    let mut command = Command::new(PROGRAM);
    command.args(["run", "host-file"]).env("ESCAPE_HOST_FILE", &file);
    assert_eq!(command.env("ESCAPE_SECRET", "word").status().unwrap().code(), Some(0));
    assert_eq!(command.env("ESCAPE_SECRET", "other").status().unwrap().code(), Some(1));
}

#[test]
fn controls_escape_unconfined() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root shows what an attempt can do");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::new(folder.path());
    let environment = stage.environment.clone();
    let mut other = Command::new("sleep").arg("600").envs(environment.clone()).spawn().unwrap();
    let mut wrong = Vec::new();
    let mut unproven = Vec::new();
    for one in list() {
        if one["control"] != true {
            continue;
        }
        let name = one["name"].as_str().unwrap();
        let needs = one["needs"].as_str().unwrap_or_default();
        let mut command = if needs.contains("descriptor 3") {
            let mut shell = Command::new("sh");
            shell.args(["-c", "exec \"$0\" \"$@\" 3</", PROGRAM]);
            shell
        } else if needs.contains("first process") {
            // Beside a shell that is the first process, and does not become the attempt.
            let mut unshare = Command::new("unshare");
            unshare.args(["--pid", "--fork", "--mount-proc", "sh", "-c"]);
            unshare.args(["\"$0\" \"$@\"; exit $?", PROGRAM]);
            unshare
        } else {
            Command::new(PROGRAM)
        };
        command.args(["run", name]).args(&stage.arguments).envs(environment.clone());
        let output = command.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        match output.status.code() {
            Some(0) => {}
            // A part of the kernel that is not there, or a fact that could not be made.
            Some(_) if needs.starts_with("kernel:") => {
                unproven.push(format!("{said} (needs {needs})"));
            }
            Some(2) if needs.starts_with("test:") => {
                unproven.push(format!("{said} (needs {needs})"));
            }
            Some(1) if needs.strip_prefix("capability: ").is_some_and(|one| !has(one)) => {
                unproven.push(format!("{said} (needs {needs})"));
            }
            code => wrong.push(format!("{code:?} {said}")),
        }
    }
    let _ = other.kill();
    let _ = other.wait();
    println!("not proven on this machine:\n{}", unproven.join("\n"));
    assert!(wrong.is_empty(), "controls that were held:\n{}", wrong.join("\n"));

    // The stage has to have seen those that leave a trace.
    let traces = stage.traces().join("\n");
    for trace in ["TCP", "UDP", "abstract", "Unix socket", "control", "marker", "terminal"] {
        assert!(traces.contains(trace), "no trace of {trace} in:\n{traces}");
    }
    assert!(!traces.contains("hostname"), "{traces}");
    assert!(!traces.contains("core_pattern"), "{traces}");
    let left = std::fs::read_dir(folder.path().join("pool")).unwrap().count();
    assert_eq!(left, 1);
    drop(stage);
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().flatten().collect();
    assert!(names.is_empty(), "left behind: {names:?}");
}
