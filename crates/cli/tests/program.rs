//! The program as a user meets it: real daemon, real processes.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::{CACHE, User, running, saved_image, text, until};

#[test]
fn the_first_command_and_the_second() {
    let user = User::new();
    let line = "echo hello >> notes; cat notes";
    assert_eq!(text(&user.exec("demo", line).stdout), "hello\n");
    assert_eq!(text(&user.exec("demo", line).stdout), "hello\nhello\n");
    assert_eq!(user.json(&["ls"])[0]["name"], "demo");
}

#[test]
fn a_first_start_that_takes_a_while_says_so_on_a_terminal() {
    let user = User::new();
    // Where nothing is prepared yet.
    let cache = user.state.path().join("cache");
    let line = "exec \"$DENIZEN\" exec a -- echo done";
    let mut script = Command::new("script");
    script.args(["-qec", line, "/dev/null"]).env("DENIZEN", env!("CARGO_BIN_EXE_denizen"));
    script.env("DENIZEN_STATE", user.state.path()).env("DENIZEN_CACHE", &cache);
    let output = script.stdin(Stdio::null()).output().unwrap();
    let said = text(&output.stdout);
    assert!(said.contains("denizen: preparing"), "{said:?}");
    assert!(said.ends_with("\r\u{1b}[Kdone\r\n"), "{said:?}");
}

#[test]
fn exit_codes_are_the_commands_or_those_of_env() {
    let user = User::new();
    let code = |args: &[&str]| user.run(args).status.code();
    assert_eq!(user.exec("a", "exit 7").status.code(), Some(7));
    assert_eq!(user.exec("a", "kill -9 $$").status.code(), Some(137));
    assert_eq!(code(&["exec", "a", "--", "no-such-program"]), Some(127));
    assert_eq!(code(&["exec", "a", "--", "/etc/passwd"]), Some(126));
    assert_eq!(code(&["exec", "a/b", "--", "true"]), Some(125));
    assert_eq!(code(&["exec", "a\u{1}", "--", "true"]), Some(125));
    assert_eq!(code(&["inspect", "nobody"]), Some(125));
    assert_eq!(code(&["no-such-verb"]), Some(125));
    assert_eq!(code(&["exec", "--timeout", "1", "a", "--", "sleep", "1000"]), Some(124));
}

#[test]
fn a_command_that_fills_the_disk_is_told_why_it_ended() {
    let user = User::new();
    let line = "i=0; while [ $i -lt 3000 ]; do head -c 1000000 /dev/zero > $i; i=$((i+1)); done";
    let limits = ["--limits", "{ disk_bytes = 33554432 }"];
    let output = user.run(&[&limits[..], &["exec", "a", "--", "sh", "-c", line]].concat());
    assert_eq!(output.status.code(), Some(137), "{output:?}");
    let why = text(&output.stderr);
    assert!(why.contains("over its disk limit of 32.0 MiB"), "{why}");
    let session = user.json(&["inspect", "a"]);
    assert_eq!(session["disk_limit"], 33_554_432);
    // What is sent there counts as well, and what serves it is held to the same.
    user.exec("a", "rm *");
    let large = user.state.path().join("large");
    std::fs::File::create(&large).unwrap().set_len(64 << 20).unwrap();
    let large = large.to_str().unwrap();
    let output = user.run(&["cp", large, "a:large"]);
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    let why = text(&output.stderr);
    let told = ["too large", "over its disk limit"];
    assert!(told.iter().any(|it| why.contains(it)), "{why}");
    user.exec("a", "rm -f *");
    std::fs::File::options().write(true).open(large).unwrap().set_len(1 << 20).unwrap();
    let output = user.run(&["cp", large, "a:small"]);
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn streams_are_bytes_and_stay_apart() {
    let user = User::new();
    let output = user.exec("a", r"printf 'out\377\000'; printf 'err\376' >&2");
    assert_eq!(output.stdout, b"out\xff\0");
    assert_eq!(output.stderr, b"err\xfe");
    let mut child = user
        .denizen(&["exec", "a", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[n as usize % 3]).collect();
    let mut stdin = child.stdin.take().unwrap();
    let sent = bytes.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.stdout == bytes, "{} bytes came back", output.stdout.len());
}

#[test]
fn nothing_of_the_hosts_environment_is_there() {
    let user = User::new();
    let mut command = user.denizen(&["exec", "-e", "MINE=yes", "a", "--", "env"]);
    let output = command.env("SECRET_OF_THE_HOST", "1").output().unwrap();
    let output = text(&output.stdout);
    assert!(output.contains("MINE=yes\n"), "{output}");
    assert!(!output.contains("SECRET_OF_THE_HOST"), "{output}");
}

/// Starts a command with a daemon of its own below it, and waits until both run.
fn tree(user: &User, mark: &str) -> Child {
    let line = format!("(setsid sleep {mark}1 &); sleep {mark}2");
    let child = user.denizen(&["exec", "a", "--", "sh", "-c", &line]).spawn().unwrap();
    until("the tree runs", || {
        !running(&format!("sleep {mark}1")).is_empty()
            && !running(&format!("sleep {mark}2")).is_empty()
    });
    child
}

#[test]
fn a_client_that_dies_takes_its_command_along() {
    let user = User::new();
    let mut client = tree(&user, "71830");
    client.kill().unwrap();
    client.wait().unwrap();
    until("the tree is gone", || running("sleep 71830").is_empty());
    until("the guard is free", || user.json(&["inspect", "a"])["in_use"] == false);
}

#[test]
fn ctrl_c_reaches_the_command() {
    let user = User::new();
    let line = "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.05; done";
    let mut client = user
        .denizen(&["exec", "a", "--", "sh", "-c", line])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = std::io::BufReader::new(client.stdout.take().unwrap());
    let mut first = String::new();
    std::io::BufRead::read_line(&mut stdout, &mut first).unwrap();
    let pid = rustix::process::Pid::from_child(&client);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(client.wait().unwrap().code(), Some(3));
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut stdout, &mut rest).unwrap();
    assert!(rest.contains("caught"), "{rest}");
}

#[test]
fn kill_9_of_the_daemon_leaves_no_process_and_loses_no_session() {
    let user = User::new();
    user.exec("a", "echo kept > file");
    let mut client = tree(&user, "71831");
    let daemon = rustix::process::Pid::from_raw(user.daemon_pid().unwrap()).unwrap();
    rustix::process::kill_process(daemon, rustix::process::Signal::KILL).unwrap();
    assert_eq!(client.wait().unwrap().code(), Some(125));
    until("the tree is gone", || running("sleep 71831").is_empty());
    assert_eq!(text(&user.exec("a", "cat file").stdout), "kept\n");
}

#[test]
fn what_runs_in_the_background_outlives_its_daemon() {
    use rustix::process::{Pid, Signal, kill_process};
    let user = User::new();
    let line = "echo $$ > pid; while :; do echo; echo >> count; sleep 0.0271834; done";
    let started = user.run(&["exec", "-d", "--tag", "job", "a", "--", "sh", "-c", line]);
    assert!(started.status.success(), "{started:?}");
    let show = |line: &str| text(&user.exec("a", line).stdout);
    until("it counts", || show("test -s count && cat pid") != "");
    let pid = show("cat pid");
    for signal in [Signal::KILL, Signal::TERM] {
        user.exec("idle", "true");
        // Whoever uses a new session does not wait until that is written down; killed before that,
        // the daemon has one that was only being made.
        let registry = user.state.path().join("pool/.denizen/registry.db");
        until("it is written down", || {
            let ask = "select count(*) from sessions where phase = 'active'";
            let told = Command::new("sqlite3").arg(&registry).arg(ask).output().unwrap();
            text(&told.stdout) == "2\n"
        });
        let daemon = user.daemon_pid().unwrap();
        kill_process(Pid::from_raw(daemon).unwrap(), signal).unwrap();
        let line = format!("/proc/{daemon}/cmdline");
        until("the daemon has ended", || std::fs::read(&line).unwrap_or_default().is_empty());
        // Its threads may end after it, and its socket with them.
        until("nobody answers", || user.daemon_pid() != Some(daemon));
        assert_eq!(user.json(&["inspect", "a"])["state"], "active", "{signal:?}");
        let idle = if signal == Signal::TERM { "stopped" } else { "active" };
        assert_eq!(user.json(&["inspect", "idle"])["state"], idle, "{signal:?}");
        let before = show("cat count");
        until("it counts on", || show("cat count") != before);
        assert_eq!(show("cat pid; kill -0 $(cat pid) && echo there"), format!("{pid}there\n"));
        assert_eq!(user.run(&["stop", "a"]).status.code(), Some(125), "{signal:?}");
    }
    // Asked to stop, it takes everything along.
    assert!(user.run(&["shutdown"]).status.success());
    until("all is gone", || running("sleep 0.0271834").is_empty());
    assert_eq!(user.json(&["inspect", "a"])["state"], "stopped");
}

/// The worst that can happen to a session's processes: nobody is left who knows of them.
#[test]
fn kill_9_of_daemon_and_init_is_swept_up_by_the_next_start() {
    use rustix::process::{Pid, Signal, kill_process};
    let user = User::new();
    let line = "(setsid sleep 718331 &); exec sleep 718332";
    // In a sandbox they would end with its first process: the kernel sees to that.
    let host = ["--isolation", "host", "exec", "-d", "a", "--", "sh", "-c", line];
    let started = user.run(&host);
    assert!(started.status.success(), "{started:?}");
    until("the tree runs", || running("sleep 71833").len() == 2);
    let daemon = user.daemon_pid().unwrap();
    let children = std::fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children"));
    let daemon = Pid::from_raw(daemon).unwrap();
    // Stopped first, so that it cannot see its init die.
    kill_process(daemon, Signal::STOP).unwrap();
    let threads = std::fs::read_dir(format!("/proc/{}/task", daemon.as_raw_nonzero())).unwrap();
    let inits: Vec<Pid> = threads
        .filter_map(|thread| std::fs::read_to_string(thread.unwrap().path().join("children")).ok())
        .chain(children)
        .flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .filter_map(|pid| Pid::from_raw(pid.parse().ok()?))
        .collect();
    assert!(!inits.is_empty());
    for init in inits {
        // One may be on the list twice.
        let _ = kill_process(init, Signal::KILL);
    }
    kill_process(daemon, Signal::KILL).unwrap();
    until("the daemon is gone", || user.daemon_pid().is_none());
    assert_eq!(running("sleep 71833").len(), 2, "they have got away");
    assert_eq!(text(&user.exec("a", "echo back").stdout), "back\n");
    assert!(running("sleep 71833").is_empty());
}

#[test]
fn a_detached_command_goes_on_and_can_be_read_later() {
    let user = User::new();
    let line = "echo one; echo two >&2; sleep 718320";
    let started = user.run(&["exec", "-d", "--tag", "job", "a", "--", "sh", "-c", line]);
    assert!(started.status.success(), "{started:?}");
    until("it has printed", || text(&user.run(&["logs", "a", "job"]).stdout).contains("two"));
    assert!(text(&user.run(&["logs", "a", "job"]).stdout).contains("one\n"));
    // Left running counts as use, unless the user insists.
    assert_eq!(user.run(&["stop", "a"]).status.code(), Some(125));
    assert!(!running("sleep 718320").is_empty());
    assert!(user.run(&["stop", "--force", "a"]).status.success());
    assert!(running("sleep 718320").is_empty());
}

#[test]
fn files_in_and_out() {
    let user = User::new();
    let here = user.state.path().join("here");
    std::fs::write(&here, b"\0bytes\xff").unwrap();
    let here = here.to_str().unwrap().to_owned();
    let back = format!("{here}.back");
    assert!(user.run(&["cp", &here, "a:sub/file"]).status.success());
    assert_eq!(user.exec("a", "cat sub/file").stdout, b"\0bytes\xff");
    assert!(user.run(&["stop", "a"]).status.success());
    assert!(user.run(&["cp", "a:sub/file", &back]).status.success());
    assert_eq!(std::fs::read(&back).unwrap(), b"\0bytes\xff");
    let nobody = user.run(&["cp", "nobody:file", &back]);
    assert_eq!(nobody.status.code(), Some(125));
    assert_eq!(user.json(&["ls"]).as_array().unwrap().len(), 1, "looking makes no session");
    assert_eq!(user.run(&["cp", "a:none", &back]).status.code(), Some(125));
    assert_eq!(std::fs::read(&back).unwrap(), b"\0bytes\xff");
}

#[test]
fn settings_with_parts_are_flags_too() {
    let user = User::new();
    let flags = ["--shell-args", "[\"-c\"]", "--session-env", "{ A = \"b\" }"];
    let more = ["--bootstrap-command", "[\"touch\", \"made\"]", "config", "--json"];
    let output = user.run(&[&flags[..], &more].concat());
    let config: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(config["pool"]["shell_args"], serde_json::json!(["-c"]));
    assert_eq!(config["pool"]["env"], serde_json::json!({ "A": "b" }));
    assert_eq!(config["pool"]["bootstrap_command"], serde_json::json!(["touch", "made"]));
    let wrong = user.run(&["--shell-args=-c", "config"]);
    assert_eq!(wrong.status.code(), Some(125));
    assert!(text(&wrong.stderr).contains("--shell-args"), "{}", text(&wrong.stderr));
}

#[test]
fn folders_are_copied_whole() {
    let user = User::new();
    let here = user.state.path().join("tree");
    std::fs::create_dir_all(here.join("deep/empty")).unwrap();
    std::fs::write(here.join("deep/run"), "#!/bin/sh\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o751);
    std::fs::set_permissions(here.join("deep/run"), mode).unwrap();
    std::os::unix::fs::symlink("/nowhere", here.join("link")).unwrap();
    let back = user.state.path().join("back");
    assert!(user.run(&["cp", here.to_str().unwrap(), "a:"]).status.success());
    assert!(user.run(&["cp", here.to_str().unwrap(), "a:named"]).status.success());
    assert!(user.run(&["cp", "a:tree", back.to_str().unwrap()]).status.success());
    let look = |folder: &Path| {
        let list = "cd \"$0\" && find . -mindepth 1 -printf '%P %y %m %l %s\n' | sort";
        text(&Command::new("sh").args(["-c", list]).arg(folder).output().unwrap().stdout)
    };
    let before = look(&here);
    assert!(before.contains("deep/run f 751"), "{before}");
    assert_eq!(look(&back), before);
    let named = "cd named && find . -mindepth 1 -printf '%P %y %m %l %s\\n' | sort";
    assert_eq!(text(&user.exec("a", named).stdout), before);
}

#[test]
fn no_copy_runs_as_somebody_else() {
    use std::os::unix::fs::PermissionsExt;
    let user = User::new();
    let made = user.exec("a", "mkdir tree; echo > tree/run; chmod 6755 tree/run; chmod 3777 tree");
    assert!(made.status.success(), "{made:?}");
    assert_eq!(text(&user.exec("a", "stat -c %a tree/run").stdout), "6755\n");
    let [one, all] = ["one", "all"].map(|name| user.state.path().join(name));
    assert!(user.run(&["cp", "a:tree/run", one.to_str().unwrap()]).status.success());
    assert!(user.run(&["cp", "a:tree", all.to_str().unwrap()]).status.success());
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&one), 0o755);
    assert_eq!(mode(&all.join("run")), 0o755);
    assert_eq!(mode(&all) & 0o7000, 0);
    // Nor the other way.
    std::fs::set_permissions(all.join("run"), PermissionsExt::from_mode(0o6755)).unwrap();
    assert!(user.run(&["cp", all.to_str().unwrap(), "a:back"]).status.success());
    assert_eq!(text(&user.exec("a", "stat -c %a back/run").stdout), "755\n");
}

#[test]
fn backup_restore_fork_and_remove() {
    let user = User::new();
    user.exec("a", "echo old > file");
    assert!(user.run(&["backup", "a"]).status.success());
    let backup = user.json(&["backups", "a"])[0]["name"].as_str().unwrap().to_owned();
    user.exec("a", "echo new > file");
    let fork = user.json(&["fork", "a"])["id"].as_str().unwrap().to_owned();
    assert!(user.run(&["restore", "a", "--backup", &backup]).status.success());
    assert_eq!(text(&user.exec("a", "cat file").stdout), "old\n");
    assert_eq!(text(&user.exec(&fork, "cat file").stdout), "new\n");
    assert!(user.run(&["rm", "a", &fork]).status.success());
    assert_eq!(user.json(&["ls"]), serde_json::json!([]));
    assert_eq!(text(&user.exec("a", "ls").stdout), "", "the name is free again");
}

#[test]
fn files_are_put_back_alone() {
    let user = User::new();
    user.exec("a", "echo old | tee notes other > /etc/conf");
    assert!(user.run(&["backup", "a"]).status.success());
    let first = user.json(&["backups", "a"])[0]["name"].as_str().unwrap().to_owned();
    assert!(user.run(&["snapshot", "a", "before"]).status.success());
    for from in [["--backup", &first], ["--snapshot", "before"]] {
        user.exec("a", "echo new | tee notes other > /etc/conf");
        let done = user.run(&["restore", "a", "notes", "/etc/conf", from[0], from[1]]);
        assert!(done.status.success(), "{done:?}");
        let now = text(&user.exec("a", "cat notes /etc/conf other").stdout);
        assert_eq!(now, "old\nold\nnew\n", "{from:?}");
    }
    for (path, told) in [("no", "has none"), ("../etc/passwd", "`..`"), ("/proc/1", "has none")] {
        let refused = user.run(&["restore", "a", "notes", path]);
        assert_eq!(refused.status.code(), Some(125), "{refused:?}");
        assert!(text(&refused.stderr).contains(told), "{refused:?}");
        assert!(text(&refused.stderr).contains(&format!("put {path} of")), "{refused:?}");
    }
}

#[test]
fn a_backup_is_forked_and_its_session_left_alone() {
    let user = User::new();
    user.exec("a", "echo old > file; echo mine > /etc/mine");
    assert!(user.run(&["backup", "a"]).status.success());
    let backup = user.json(&["backups", "a"])[0].clone();
    let (name, at) = (backup["name"].as_str().unwrap(), backup["taken_at"].as_str().unwrap());
    user.exec("a", "echo new > file; rm /etc/mine");
    assert!(user.run(&["exec", "-d", "a", "--", "sleep", "718561"]).status.success());
    for from in [["--backup", &name[..12]], ["--at", at]] {
        let fork = user.json(&["fork", "a", from[0], from[1]])["id"].as_str().unwrap().to_owned();
        assert_eq!(text(&user.exec(&fork, "cat file /etc/mine").stdout), "old\nmine\n", "{from:?}");
    }
    let now =
        user.exec("a", "cat file; ls /etc/mine 2> /dev/null; pgrep -f '[s]leep 718561' | wc -l");
    assert_eq!(text(&now.stdout), "new\n1\n", "{now:?}");
    let sessions = user.json(&["ls"]);
    for (from, told) in
        [(["--at", "1 year ago"], "no backup"), (["--backup", "none"], "no backup none")]
    {
        let refused = user.run(&["fork", "a", from[0], from[1]]);
        assert_eq!(refused.status.code(), Some(125), "{refused:?}");
        assert!(text(&refused.stderr).contains(told), "{refused:?}");
    }
    assert_eq!(user.json(&["ls"]).as_array().unwrap().len(), sessions.as_array().unwrap().len());
}

#[test]
fn backups_that_are_not_kept_are_deleted() {
    let user = User::new();
    for text in ["one", "two", "three"] {
        user.exec("a", &format!("echo {text} > file"));
        assert!(user.run(&["backup", "a"]).status.success());
    }
    let all = user.json(&["backups", "a"]);
    let names: Vec<&str> =
        all.as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap()).collect();
    let latest = user.run(&["backups", "rm", names[0]]);
    assert!(text(&latest.stderr).contains("back the session up again"), "{latest:?}");
    assert!(user.run(&["backups", "rm", &names[1][..16]]).status.success());
    assert_eq!(user.json(&["backups", "a"]).as_array().unwrap().len(), 2);
    user.exec("a", "echo three > file");
    assert!(user.run(&["backup", "a"]).status.success());
    let unsaid = user.run(&["backups", "forget"]);
    assert_eq!(unsaid.status.code(), Some(125));
    assert!(text(&unsaid.stderr).contains("--keep-last"), "{}", text(&unsaid.stderr));
    let all = user.json(&["backups", "a"]);
    let planned = user.json(&["backups", "forget", "--dry-run", "--keep-last", "2"]);
    assert_eq!(planned, serde_json::json!([all[2]]), "{all}");
    let told = user.run(&["backups", "forget", "--dry-run", "--keep-hourly", "1"]);
    assert!(text(&told.stdout).ends_with("\n2 backups would be deleted\n"), "{told:?}");
    assert_eq!(user.json(&["backups", "a"]), all, "a dry run deletes nothing");
    let told = user.run(&["backups", "forget", "--keep-last", "2"]);
    assert!(text(&told.stdout).ends_with("\n1 backup deleted\n"), "{told:?}");
    assert_eq!(user.json(&["backups", "a"]), serde_json::json!([all[0], all[1]]));
    let told = user.run(&["backups", "forget", "--keep-last", "2"]);
    assert_eq!(text(&told.stdout), "0 backups deleted\n");
    // What is configured is applied by the next daemon.
    assert!(user.run(&["shutdown"]).status.success());
    let retention = ["--retention", "{ keep_last = 1 }"];
    let config = user.run(&[&retention[..], &["--json", "config"]].concat());
    let config: serde_json::Value = serde_json::from_slice(&config.stdout).unwrap();
    assert_eq!(config["retention"]["keep_last"], 1);
    assert!(user.run(&[&retention[..], &["ls"]].concat()).status.success());
    until("the daemon forgets", || user.json(&["backups", "a"]) == serde_json::json!([all[0]]));
    assert_eq!(text(&user.exec("a", "cat file").stdout), "three\n");
}

/// What `GET /v1/metrics` says: each name, labels included, and its value.
fn metrics(user: &User) -> std::collections::HashMap<String, f64> {
    use std::io::Read;
    let socket = user.state.path().join("denizen.sock");
    let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    stream.write_all(b"GET /v1/metrics HTTP/1.0\r\nHost: denizen\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.0 200"), "{head}");
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    let mut typed = std::collections::HashSet::new();
    let mut values = std::collections::HashMap::new();
    for line in body.lines() {
        if let Some(told) = line.strip_prefix("# TYPE ") {
            let (name, kind) = told.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(typed.insert(name.to_owned()), "{line}: twice");
        } else if !line.starts_with("# HELP ") {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let family = name.split('{').next().unwrap();
            let of_histogram = ["_bucket", "_sum", "_count"].iter();
            let mut families = of_histogram.filter_map(|end| family.strip_suffix(end));
            let is_typed = typed.contains(family) || families.any(|it| typed.contains(it));
            assert!(is_typed, "{line}: of no type");
            assert!(values.insert(name.to_owned(), value.parse().unwrap()).is_none(), "{line}");
        }
    }
    values
}

#[test]
fn metrics_count_what_is_done() {
    let user = User::new();
    user.exec("a", "echo kept > file");
    let before = metrics(&user);
    assert_eq!(before["denizen_backups_written_total"], 0.0);
    assert_eq!(before["denizen_sessions_unsaved"], 1.0);
    assert!(user.run(&["backup", "a"]).status.success());
    assert!(user.run(&["restore", "a"]).status.success());
    assert!(user.run(&["backups", "verify"]).status.success());
    let after = metrics(&user);
    assert_eq!(after["denizen_backups_written_total"], 1.0);
    assert!(after["denizen_backup_added_bytes_total"] > 0.0);
    assert_eq!(after["denizen_backups_failed_total"], 0.0);
    assert_eq!(after["denizen_restores_done_total"], 1.0);
    assert_eq!(after["denizen_verifications_total"], 1.0);
    assert_eq!(after["denizen_backup_duration_seconds_count"], 1.0);
    assert_eq!(after["denizen_backup_duration_seconds_bucket{le=\"+Inf\"}"], 1.0);
    assert!(after["denizen_backup_duration_seconds_sum"] > 0.0);
    assert_eq!(after["denizen_sessions_unsaved"], 0.0);
    assert_eq!(after["denizen_sessions{state=\"stopped\"}"], 1.0);
    // And what is known of the session says the same to people.
    let shown = text(&user.run(&["inspect", "a"]).stdout);
    assert!(shown.contains("backup taken at  just now\n"), "{shown}");
    assert!(!shown.contains("unsaved since"), "{shown}");
}

#[test]
fn snapshots_and_differences() {
    let user = User::new();
    user.exec("a", "echo old > file; echo kept > kept");
    assert!(user.run(&["snapshot", "a", "before"]).status.success());
    user.exec("a", "echo newer > file; rm kept; chmod 700 .");
    let all = user.json(&["snapshots", "a"]);
    assert_eq!(all[0]["name"], "before");
    let shown = text(&user.run(&["diff", "a:before"]).stdout);
    assert_eq!(shown.lines().filter(|line| line.contains(" volume/")).count(), 3, "{shown}");
    let lines = [
        "~ volume/  (folder, mode 0755 -> 0700)",
        "~ volume/file  (file, content",
        "- volume/kept  (file",
    ];
    assert!(lines.iter().all(|line| shown.contains(line)), "{shown}");
    let nothing = user.run(&["diff", "a"]);
    assert!(text(&nothing.stderr).contains("nothing can differ"), "{nothing:?}");
    let fork = user.json(&["fork", "a", "--snapshot", "before"])["id"].as_str().unwrap().to_owned();
    assert_eq!(text(&user.exec(&fork, "cat file kept").stdout), "old\nkept\n");
    assert!(user.run(&["restore", "a", "--snapshot", "before"]).status.success());
    assert_eq!(text(&user.exec("a", "cat file kept").stdout), "old\nkept\n");
    let same = user.json(&["diff", "a", &fork]);
    let same = same.as_array().unwrap().iter().filter(|one| one["tree"] == "volume");
    assert_eq!(same.count(), 0);
    assert!(user.run(&["rm", "a", "--snapshot", "before"]).status.success());
    let gone = user.run(&["rm", "a", "--snapshot", "before"]);
    assert!(text(&gone.stderr).contains("no snapshot before"), "{gone:?}");
    assert!(user.run(&["inspect", "a"]).status.success(), "the session itself is still there");
}

#[test]
fn a_shell_has_a_real_terminal() {
    let user = User::new();
    // script(1) gives the program a terminal to be on.
    let program = env!("CARGO_BIN_EXE_denizen");
    let line = format!("stty rows 33 cols 77; {program} shell a; stty -a");
    let mut child = Command::new("script")
        .args(["-qec", &line, "/dev/null"])
        .env("DENIZEN_STATE", user.state.path())
        .env("DENIZEN_CACHE", CACHE)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"stty size; test -t 0 && echo is-a-$((1+1))-tty; exit 5\n").unwrap();
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    let output = text(&output.stdout);
    assert!(output.contains("33 77"), "{output}");
    assert!(output.contains("is-a-2-tty"), "{output}");
    // Afterwards the terminal is as it was.
    assert!(output.contains(" icanon") && output.contains(" echo "), "{output}");
}

#[test]
fn bad_configuration_names_the_key() {
    let user = User::new();
    let file = user.state.path().join("config.toml");
    for (content, expected) in [
        ("[pool]\nmax_vm = 3\n", "max_vm"),
        ("sockt = 'x'\n", "sockt"),
        ("[pool]\nmax_vms = 'many'\n", "max_vms"),
        ("[pool\n", "config.toml"),
    ] {
        std::fs::write(&file, content).unwrap();
        let output = user.run(&["--config", file.to_str().unwrap(), "config"]);
        assert_eq!(output.status.code(), Some(125), "{content}");
        assert!(text(&output.stderr).contains(expected), "{output:?}");
    }
    std::fs::write(&file, "[pool]\nmax_vms = 3\n").unwrap();
    let config = user.json(&["--config", file.to_str().unwrap(), "config"]);
    assert_eq!(config["pool"]["max_vms"], 3);
    let output = user.denizen(&["--config", file.to_str().unwrap(), "--json", "config"]);
    let mut output = output;
    let output = output.env("DENIZEN_MAX_VMS", "4").output().unwrap();
    let config: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(config["pool"]["max_vms"], 4, "the environment is stronger than the file");
    let output = user.run(&["--max-vms", "0", "exec", "a", "--", "true"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("max_vms"), "{output:?}");
}

#[test]
fn the_daemon_has_the_settings_of_the_command_that_started_it() {
    let user = User::new();
    let mut first = user.denizen(&["--backup-destination", "elsewhere", "exec", "a", "--", "true"]);
    // Relative to where the user stands, not the daemon.
    assert!(first.current_dir(user.state.path()).status().unwrap().success());
    assert!(user.run(&["backup", "a"]).status.success());
    let there = std::fs::read_dir(user.state.path().join("elsewhere/snapshots")).unwrap().count();
    assert_eq!(there, 1);
    // What `config` prints is a configuration file.
    let file = user.state.path().join("config.toml");
    std::fs::write(&file, user.run(&["--max-vms", "7", "config"]).stdout).unwrap();
    let config = user.json(&["--config", file.to_str().unwrap(), "config"]);
    assert_eq!(config["pool"]["max_vms"], 7);
}

#[test]
fn a_second_daemon_is_refused_and_doctor_is_content() {
    let user = User::new();
    user.exec("a", "true");
    let second = user.run(&["--socket", "/tmp/denizen-second-never.sock", "serve"]);
    assert_eq!(second.status.code(), Some(125));
    assert!(text(&second.stderr).contains("in use by another denizen"), "{second:?}");
    let doctor = user.run(&["doctor"]);
    assert!(doctor.status.success(), "{doctor:?}");
}

#[test]
fn events_are_told_as_they_happen() {
    let user = User::new();
    user.exec("other", "true");
    let mut follower =
        user.denizen(&["--json", "events", "a"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufReader::new(follower.stdout.take().unwrap());
    // Events are told from the moment of asking, so make some until one is seen.
    let seen = std::thread::spawn(move || {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut lines, &mut line).unwrap();
        line
    });
    until("an event is told", || {
        user.exec("a", "true");
        user.run(&["rm", "a"]);
        seen.is_finished()
    });
    let line: serde_json::Value = serde_json::from_str(&seen.join().unwrap()).unwrap();
    assert_eq!(line["name"], "a");
    // That the daemon goes is no end of what happens.
    user.run(&["shutdown"]);
    assert!(!follower.wait().unwrap().success());
}

#[test]
fn sessions_can_have_an_image_as_their_root() {
    let user = User::new();
    let folder = tempfile::tempdir().unwrap();
    let image = saved_image(folder.path());
    let image = image.to_str().unwrap();
    let brought = user.run(&["image", "import", image]);
    assert!(text(&brought.stdout).contains("demo/busybox:1"), "{brought:?}");
    assert_eq!(user.json(&["image", "ls"])[0]["layers"], 1);
    // Made before, on the host's root: it stays what it was.
    user.exec("host", "echo here > file");
    assert!(user.run(&["shutdown"]).status.success());
    until("the daemon leaves", || user.daemon_pid().is_none());
    let run = |session: &str, line: &str| {
        user.run(&["--image", "demo/busybox:1", "exec", session, "--", "sh", "-c", line])
    };
    let output = run("small", "cat /etc/motd; ls /; env; id -u; echo mine > /etc/mine");
    let said = text(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    for part in
        ["from-the-image\n", "bin\n", "FROM_IMAGE=yes\n", "volume\n", "PATH=/bin\n", "\n0\n"]
    {
        assert!(said.contains(part), "{part:?} in {said}");
    }
    assert!(!said.contains("usr\n"), "{said}");
    assert!(text(&run("host", "cat file; ls /usr/bin/env").stdout).contains("here\n"));
    // Files are served from within, though there is no libc in this root.
    std::fs::write(folder.path().join("file"), "in").unwrap();
    let file = folder.path().join("file");
    let copied = user.run(&["cp", file.to_str().unwrap(), "small:there"]);
    assert!(copied.status.success(), "{copied:?}");
    assert_eq!(text(&run("small", "cat there").stdout), "in");
    let back = user.run(&["cp", "small:/etc/motd", file.to_str().unwrap()]);
    assert!(back.status.success(), "{back:?}");
    assert_eq!(std::fs::read(&file).unwrap(), b"from-the-image\n");
    // Removed, its layers stay for the session that needs them.
    assert!(user.run(&["backup", "small"]).status.success());
    assert!(user.run(&["image", "rm", "demo/busybox:1"]).status.success());
    assert_eq!(user.json(&["image", "ls"]), serde_json::json!([]));
    assert_eq!(text(&run("small", "cat /etc/mine").stdout), "mine\n");
    assert_eq!(user.run(&["image", "rm", "demo/busybox:1"]).status.code(), Some(125));
}

#[test]
fn each_session_can_have_an_image_of_its_own() {
    let user = User::new();
    let folder = tempfile::tempdir().unwrap();
    let image = saved_image(folder.path());
    assert!(user.run(&["image", "import", image.to_str().unwrap()]).status.success());
    let made = user.json(&["create", "its-own", "demo/busybox:1"]);
    assert_eq!(made["image"], "docker.io/demo/busybox:1");
    assert_eq!(user.json(&["create", "usual"])["image"], serde_json::Value::Null);
    // A shell of the image, which the host's root has not at this place.
    assert_eq!(text(&user.exec("its-own", "cat /etc/motd").stdout), "from-the-image\n");
    assert_ne!(text(&user.exec("usual", "cat /etc/motd").stdout), "from-the-image\n");
    // The same again is fine, also while it is in use; another is not.
    assert!(user.run(&["create", "its-own", "demo/busybox:1"]).status.success());
    let other = user.run(&["create", "usual", "demo/busybox:1"]);
    assert_eq!(other.status.code(), Some(125));
    assert!(text(&other.stderr).contains("is made of no image"), "{other:?}");
    let none = user.run(&["create", "third", "demo/none:1"]);
    assert!(text(&none.stderr).contains("the image demo/none:1"), "{none:?}");
    assert_eq!(user.run(&["inspect", "third"]).status.code(), Some(125), "nothing was made");
    // It comes back as what it was, and so does its copy.
    assert!(user.run(&["stop", "its-own"]).status.success());
    assert_eq!(text(&user.exec("its-own", "cat /etc/motd").stdout), "from-the-image\n");
    let copy = user.json(&["fork", "its-own"]);
    assert_eq!(copy["image"], "docker.io/demo/busybox:1");
}

#[test]
fn an_image_comes_from_a_registry() {
    let user = User::new();
    let folder = tempfile::tempdir().unwrap();
    let image = saved_image(folder.path());
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = format!(
        "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n",
        folder.path().join("registry").display()
    );
    std::fs::write(folder.path().join("registry.yml"), config).unwrap();
    let mut registry = Command::new("docker-registry")
        .arg("serve")
        .arg(folder.path().join("registry.yml"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("the registry answers", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    let reference = format!("127.0.0.1:{port}/demo/busybox:2");
    let pushed = Command::new("skopeo")
        .args(["copy", "--dest-tls-verify=false"])
        .arg(format!("docker-archive:{}", image.display()))
        .arg(format!("docker://{reference}"))
        .output()
        .unwrap();
    assert!(pushed.status.success(), "{pushed:?}");
    let pulled = user.run(&["image", "pull", &reference]);
    let missing = user.run(&["image", "pull", &format!("127.0.0.1:{port}/demo/none:1")]);
    registry.kill().unwrap();
    registry.wait().unwrap();
    assert!(text(&pulled.stdout).contains(&reference), "{pulled:?}");
    assert_eq!(missing.status.code(), Some(125), "{missing:?}");
    assert!(text(&missing.stderr).contains("demo/none"), "{missing:?}");
    assert!(user.run(&["shutdown"]).status.success());
    until("the daemon leaves", || user.daemon_pid().is_none());
    let output = user.run(&["--image", &reference, "exec", "a", "--", "cat", "/etc/motd"]);
    assert_eq!(text(&output.stdout), "from-the-image\n", "{output:?}");
}

#[test]
fn a_port_of_a_session_is_reached_by_one_of_this_machine() {
    use std::io::{BufRead, Read};
    let user = User::new();
    let server = "import http.server, socketserver\n\
                  class H(http.server.BaseHTTPRequestHandler):\n\
                  \x20   def do_GET(self):\n\
                  \x20       self.send_response(200)\n\
                  \x20       self.end_headers()\n\
                  \x20       self.wfile.write(b'from within\\n')\n\
                  http.server.ThreadingHTTPServer(('127.0.0.1', 8000), H).serve_forever()\n";
    let started = user.run(&["exec", "-d", "--tag", "web", "a", "--", "python3", "-c", server]);
    assert!(started.status.success(), "{started:?}");
    let mut forward = user.denizen(&["port", "a", "8000"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut address = String::new();
    std::io::BufReader::new(forward.stdout.take().unwrap()).read_line(&mut address).unwrap();
    let ask = || -> std::io::Result<String> {
        let mut stream = std::net::TcpStream::connect(address.trim())?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    until("the server answers", || ask().is_ok_and(|answer| answer.ends_with("from within\n")));
    forward.kill().unwrap();
    forward.wait().unwrap();
    assert!(user.run(&["stop", "--force", "a"]).status.success());
}

#[test]
fn a_mistyped_session_is_guessed_at() {
    let user = User::new();
    user.exec("demo", "true");
    user.exec("other", "true");
    for args in [&["inspect", "demoo"][..], &["stop", "dmeo"], &["cp", "deno:x", "/tmp/never"]] {
        let refused = user.run(args);
        assert_eq!(refused.status.code(), Some(125), "{refused:?}");
        let said = text(&refused.stderr);
        assert!(said.contains("did you mean 'demo'?"), "{args:?}: {said}");
    }
    let refused = text(&user.run(&["inspect", "zzz"]).stderr);
    assert!(refused.contains("denizen ls") && !refused.contains("did you mean"), "{refused}");
    // And verbs.
    assert!(text(&user.run(&["inpsect", "demo"]).stderr).contains("'inspect'"));
}

/// What a line prints on a terminal of so many columns.
fn on_terminal(user: &User, columns: u16, line: &str, keys: &[u8]) -> String {
    let line = format!("stty cols {columns} rows 12; exec {line}");
    let mut script = Command::new("script");
    script.args(["-qec", &line, "/dev/null"]).env("DENIZEN", env!("CARGO_BIN_EXE_denizen"));
    script.env("DENIZEN_STATE", user.state.path()).env("DENIZEN_CACHE", CACHE);
    script.env_remove("NO_COLOR").env("TERM", "xterm").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = script.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(keys).unwrap();
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    text(&output.stdout)
}

#[test]
fn tables_fit_their_terminal_and_are_whole_in_a_pipe() {
    let user = User::new();
    let name = "a-session-with-a-name-that-is-rather-long";
    user.exec(name, "true");
    let piped = text(&user.run(&["ls"]).stdout);
    assert!(piped.contains(name) && !piped.contains('\u{1b}'), "{piped}");
    assert!(piped.lines().all(|line| line.len() > 70), "{piped}");
    let shown = on_terminal(&user, 60, "\"$DENIZEN\" ls", b"");
    let lines: Vec<_> = shown.lines().map(|line| line.trim_end()).collect();
    assert!(lines[0].starts_with("\u{1b}[1mNAME") && lines[0].ends_with("\u{1b}[0m"), "{shown}");
    assert!(lines[1].contains('…') && lines[1].chars().count() <= 60, "{shown}");
    let plain = on_terminal(&user, 60, "env NO_COLOR=1 \"$DENIZEN\" ls", b"");
    assert!(!plain.contains('\u{1b}'), "{plain}");
    let mut forced = user.denizen(&["ls"]);
    let forced = forced.env("CLICOLOR_FORCE", "1").env_remove("NO_COLOR").output().unwrap();
    assert!(text(&forced.stdout).starts_with("\u{1b}[1mNAME"));
}

#[test]
fn top_is_a_picture_on_a_terminal_and_a_table_in_a_pipe() {
    let user = User::new();
    user.exec("demo", "true");
    let piped = text(&user.run(&["top"]).stdout);
    assert!(piped.starts_with("NAME  STATE ") && piped.contains("\ndemo  active"), "{piped}");
    assert_eq!(user.json(&["top"])[0]["name"], "demo");
    // It is there at once, and gone with a key; the terminal is as it was.
    let shown = on_terminal(&user, 80, "sh -c '\"$DENIZEN\" top; stty -a'", b"xq");
    let (before, after) = shown.split_once("\u{1b}[?1049l").unwrap();
    assert!(before.contains("\u{1b}[?1049h") && after.contains(" icanon"), "{shown}");
}

#[test]
fn every_verb_has_a_manual_page_and_exit_codes_are_told_alike() {
    let user = User::new();
    let pages = user.state.path().join("man");
    assert!(user.run(&["man", pages.to_str().unwrap()]).status.success());
    let read = |name: &str| std::fs::read_to_string(pages.join(format!("{name}.1"))).unwrap();
    let help = text(&user.run(&["--help"]).stdout);
    let verbs = help.split_once("Commands:").unwrap().1.split_once("Options:").unwrap().0;
    let verbs = verbs.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let verbs: Vec<_> = verbs.filter_map(|line| line.split_whitespace().next()).collect();
    assert!(verbs.len() > 25, "{verbs:?}");
    for verb in verbs.into_iter().filter(|verb| *verb != "help") {
        let page = read(&format!("denizen-{verb}"));
        assert!(page.contains(".SH SYNOPSIS") && page.contains("SEE ALSO"), "{verb}");
    }
    assert!(read("denizen-image-pull").contains("registry"));
    let whole = read("denizen");
    let codes = whole.split_once("EXIT STATUS").unwrap().1;
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
    let readme = std::fs::read_to_string(readme).unwrap();
    for code in ["124", "125", "126", "127"] {
        assert!(codes.contains(&format!("\\fB{code}\\fR")), "{codes}");
        assert!(help.contains(code) && readme.contains(&format!("| {code} |")), "{code}");
    }
    if let Ok(checked) =
        Command::new("man").args(["--warnings", "-l"]).arg(pages.join("denizen.1")).output()
    {
        assert_eq!(text(&checked.stderr), "");
    }
}

#[test]
fn shells_can_complete_verbs() {
    let user = User::new();
    for (shell, part) in
        [("bash", "complete -F"), ("zsh", "#compdef denizen"), ("fish", "complete")]
    {
        let script = user.run(&["completions", shell]);
        let script = text(&script.stdout);
        assert!(script.contains(part) && script.contains("snapshots"), "{shell}: {script}");
    }
}

#[test]
fn shutdown_waits_for_the_daemons_end() {
    let user = User::new();
    user.exec("a", "true");
    let pid = user.daemon_pid().unwrap();
    assert!(user.run(&["shutdown"]).status.success());
    // One that nobody has reaped yet has no command line.
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    assert!(line.is_empty(), "{}", text(&line));
}
