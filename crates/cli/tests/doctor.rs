//! `denizen doctor` on machines that lack something: each is made in namespaces of the test's
//! own, so that nothing of this machine changes.
#![allow(clippy::unwrap_used)]

mod common;

use std::process::Command;

use common::{CACHE, User, text};
use serde_json::Value;

/// Runs the doctor in new namespaces, after `before` has been run there. `$POOL` is the volume
/// root. Gives the exit code and the findings.
fn doctor(user: &User, namespaces: &[&str], before: &str) -> (Option<i32>, Value) {
    std::fs::create_dir_all(user.state.path().join("pool")).unwrap();
    let line = format!("set -e; {before}; exec {} --json doctor", env!("CARGO_BIN_EXE_denizen"));
    let output = Command::new("unshare")
        .args(namespaces)
        .args(["sh", "-c", &line])
        .env("DENIZEN_STATE", user.state.path())
        .env("DENIZEN_CACHE", CACHE)
        .env("POOL", user.state.path().join("pool"))
        .output()
        .unwrap();
    let all = serde_json::from_slice(&output.stdout);
    (output.status.code(), all.unwrap_or_else(|_| panic!("{}", text(&output.stderr))))
}

/// The grade of a check, `none` if it was not made.
fn grade<'a>(all: &'a Value, check: &str) -> &'a str {
    let found = all.as_array().unwrap().iter().find(|it| it["check"] == check);
    found.map_or("none", |found| found["grade"].as_str().unwrap())
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn a_fit_machine_has_no_failure_and_nothing_is_left_on_it() {
    let user = User::new();
    let output = user.run(&["--json", "doctor"]);
    let all: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{all:#}");
    for check in ["command", "user namespaces", "attributes", "seccomp", "kernel"] {
        assert_eq!(grade(&all, check), "fine", "{all:#}");
    }
    // All that is not well says how to mend it.
    for finding in all.as_array().unwrap() {
        assert_eq!(finding["grade"] == "fine", finding["mend"].is_null(), "{finding:#}");
    }
    let left = std::fs::read_dir(user.state.path()).unwrap().flatten();
    let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
    assert!(left.iter().all(|name| name == "pool" || name == "backups"), "{left:?}");
    let text = text(&user.run(&["doctor"]).stdout);
    assert!(text.contains("ok    command"), "{text}");
    // What sandboxes need is nothing to `host`.
    let host = user.run(&["--isolation", "host", "doctor"]);
    assert_eq!(host.status.code(), Some(0));
    assert!(!String::from_utf8_lossy(&host.stdout).contains("landlock"));
}

#[test]
fn no_user_namespaces() {
    let user = User::new();
    // An ordinary user of a user namespace that allows no further ones.
    let namespaces = ["-U", "--map-user=1000", "--map-group=1000", "--keep-caps"];
    let (code, all) = doctor(&user, &namespaces, "echo 0 > /proc/sys/user/max_user_namespaces");
    assert_eq!(code, Some(1), "{all:#}");
    assert_eq!(grade(&all, "user namespaces"), "fail", "{all:#}");
    assert_eq!(grade(&all, "command"), "fail", "{all:#}");
}

#[test]
fn a_root_without_ids_to_give() {
    let user = User::new();
    let (code, all) = doctor(&user, &["-Ur"], ":");
    assert_eq!(code, Some(1), "{all:#}");
    assert_eq!(grade(&all, "user ids"), "fail", "{all:#}");
}

#[test]
fn a_volume_root_on_tmpfs_works_until_the_next_start() {
    if !is_root() {
        return;
    }
    let user = User::new();
    let (code, all) = doctor(&user, &["-m"], "mount -t tmpfs none \"$POOL\"");
    assert_eq!(code, Some(0), "{all:#}");
    assert_eq!(grade(&all, "file system"), "note", "{all:#}");
    let (code, all) = doctor(&user, &["-m"], "mount -t tmpfs -o noexec none \"$POOL\"");
    assert_eq!(code, Some(0), "{all:#}");
    assert_eq!(grade(&all, "programs"), "note", "{all:#}");
}

#[test]
fn a_volume_root_that_cannot_keep_root_changes() {
    if !is_root() {
        return;
    }
    let user = User::new();
    let overlay = "cd \"$POOL/..\" && mkdir l u w && \
                   mount -t overlay -o lowerdir=l,upperdir=u,workdir=w none \"$POOL\"";
    let (code, all) = doctor(&user, &["-m"], overlay);
    assert_eq!(code, Some(1), "{all:#}");
    assert_eq!(grade(&all, "file system"), "fail", "{all:#}");
    // No attributes of users there at all.
    let user = User::new();
    let ramfs = "mount -t ramfs none \"$POOL\"; chmod 700 \"$POOL\"";
    let (code, all) = doctor(&user, &["-m"], ramfs);
    assert_eq!(code, Some(0), "{all:#}");
    assert_eq!(grade(&all, "attributes"), "note", "{all:#}");
}

#[test]
fn no_control_groups_are_granted() {
    if !is_root() {
        return;
    }
    let user = User::new();
    let read_only = "for at in $(sed -n 's/.* \\(\\/sys\\/fs\\/cgroup[^ ]*\\) .* - cgroup2\\? .*/\\1/p' \
                     /proc/self/mountinfo); do mount -o remount,bind,ro \"$at\"; done";
    let (code, all) = doctor(&user, &["-m"], read_only);
    assert_eq!(code, Some(0), "{all:#}");
    assert_eq!(grade(&all, "limits"), "note", "{all:#}");
    assert_eq!(grade(&all, "freezer"), "note", "{all:#}");
    let (code, all) = doctor(&user, &["-m"], &format!("{read_only}; export DENIZEN_SLEEP=freeze"));
    assert_eq!(code, Some(1), "{all:#}");
    assert_eq!(grade(&all, "freezer"), "fail", "{all:#}");
    // What cannot freeze at all.
    let host = user.run(&["--isolation", "host", "--sleep", "freeze", "--json", "doctor"]);
    let all: Value = serde_json::from_slice(&host.stdout).unwrap();
    assert_eq!((host.status.code(), grade(&all, "freezer")), (Some(1), "fail"), "{all:#}");
}

#[test]
fn a_session_of_another_denizen() {
    let user = User::new();
    // The program that serves files there is this one.
    let within = |args: &[&str]| {
        let command = [&["exec", "outer", "--", "/run/denizen/agent"], args].concat();
        user.run(&command)
    };
    let output = within(&["--json", "doctor"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let all: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(grade(&all, "nested"), "note", "{all:#}");
    assert_eq!(grade(&all, "user namespaces"), "fail", "{all:#}");
    for finding in all.as_array().unwrap() {
        let mend = finding["mend"].as_str().unwrap_or_default();
        assert!(!mend.contains("sysctl") && !mend.contains("ordinary user"), "{finding:#}");
    }
    let output = within(&["exec", "inner", "--", "true"]);
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    let said = text(&output.stderr);
    assert!(said.contains("a session of another denizen") && said.contains("`host`"), "{said}");
    // And what it says to do works.
    let output = within(&["--isolation", "host", "exec", "inner", "--", "echo", "works"]);
    assert_eq!(text(&output.stdout), "works\n", "{output:?}");
    let output = within(&["--isolation", "host", "--json", "doctor"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(within(&["shutdown"]).status.success());
    assert!(user.run(&["rm", "--force", "outer"]).status.success());
}

/// What the program finds with these settings.
fn with(user: &User, settings: &[&str]) -> (Option<i32>, Value) {
    let output = user.run(&[settings, &["--isolation", "host", "--json", "doctor"]].concat());
    let all = serde_json::from_slice(&output.stdout);
    (output.status.code(), all.unwrap_or_else(|_| panic!("{output:?}")))
}

#[test]
fn how_others_get_in() {
    let user = User::new();
    let (_, all) = with(&user, &[]);
    assert_eq!(grade(&all, "listener"), "none", "nobody is to get in: {all:#}");
    let (code, all) = with(&user, &["--listen", "127.0.0.1:0"]);
    assert_eq!(code, Some(1), "{all:#}");
    assert_eq!(grade(&all, "listener"), "fine", "{all:#}");
    assert_eq!(grade(&all, "keys"), "fail", "{all:#}");
    assert_eq!(grade(&all, "tls"), "fine", "{all:#}");
    assert!(!user.state.path().join("keys.lock").exists(), "nothing is made");
    assert!(user.run(&["key", "create", "a"]).status.success());
    // With a daemon that has it, and one that has not.
    for serve in [false, true] {
        let (code, all) = with(&user, &["--listen", "0.0.0.0:0"]);
        assert_eq!(code, Some(1), "{all:#}");
        assert_eq!(grade(&all, "listener"), "fail", "no TLS: {all:#}");
        assert_eq!(grade(&all, "keys"), "fine", "{all:#}");
        if !serve {
            user.run(&["--isolation", "host", "ls"]);
        }
    }
    let path = |name: &str| user.state.path().join(name).to_str().unwrap().to_owned();
    let (certificate, key) = (path("cert.pem"), path("key.pem"));
    for (days, expected) in [("90", "fine"), ("3", "note")] {
        let mut make = Command::new("openssl");
        make.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
        make.args(["-nodes", "-subj", "/CN=test", "-days", days, "-keyout", &key]);
        assert!(make.args(["-out", &certificate]).output().unwrap().status.success());
        let tls = ["--tls-certificate", &certificate, "--tls-key", &key];
        let (code, all) = with(&user, &[&tls[..], &["--listen", "127.0.0.1:0"]].concat());
        assert_eq!(code, Some(0), "{all:#}");
        assert_eq!(grade(&all, "tls"), expected, "{all:#}");
    }
    std::fs::write(&key, "none").unwrap();
    let tls = ["--tls-certificate", &certificate, "--tls-key", &key, "--listen", "127.0.0.1:0"];
    assert_eq!(grade(&with(&user, &tls).1, "tls"), "fail");
}

#[test]
fn an_address_that_is_taken() {
    let user = User::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, all) = with(&user, &["--listen", &address]);
    assert_eq!(code, Some(1), "{all:#}");
    assert_eq!(grade(&all, "listener"), "fail", "{all:#}");
}

#[test]
fn a_destination_that_cannot_be_written() {
    if !is_root() {
        return;
    }
    let user = User::new();
    let mount = "mkdir -p \"$POOL/../backups\" && mount -t tmpfs -o ro none \"$POOL/../backups\"";
    let (code, all) = doctor(&user, &["-m"], mount);
    assert_eq!(code, Some(1), "{all:#}");
    let failing = |check| grade(&all, check) == "fail";
    assert!(failing("backups") || failing("configuration"), "{all:#}");
    // One that is nearly full.
    let user = User::new();
    let mount = mount.replace("-o ro", "-o size=1m");
    let (code, all) = doctor(&user, &["-m"], &mount);
    assert_eq!(code, Some(0), "{all:#}");
    assert_eq!(grade(&all, "backups"), "note", "{all:#}");
}
