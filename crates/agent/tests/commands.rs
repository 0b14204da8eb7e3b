//! Commands and their streams: what a caller passes in arrives, what the command says and
//! how it ends comes back, and what cannot be started is told apart.
#![allow(clippy::unwrap_used)]

mod common;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use common::{collect, run, sh, until, until_gone, with_stdin};
use denizen_agent::{Agent, Error, Exit, Launch, Scope, Spec, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn exit_codes_and_signals() {
    let agent = Agent::new();
    for code in [0, 1, 42, 255] {
        let child = agent.spawn(sh(&format!("exit {code}"))).await.unwrap();
        assert_eq!(child.wait().await.unwrap(), Exit::Code(code));
        // Any number of times.
        assert_eq!(child.wait().await.unwrap(), Exit::Code(code));
        assert_eq!(child.try_wait().unwrap(), Some(Exit::Code(code)));
    }
    for signal in [1, 2, 9, 15] {
        let child = agent.spawn(sh("exec sleep 1000")).await.unwrap();
        assert_eq!(child.try_wait().unwrap(), None);
        child.signal(signal, Scope::Leader).unwrap();
        let exit = child.wait().await.unwrap();
        assert_eq!(exit, Exit::Signal(signal));
        assert_eq!(exit.code(), 128 + signal);
        assert!(matches!(child.signal(signal, Scope::Leader), Err(Error::Ended)));
    }
    let child = agent.spawn(sh("exit 0")).await.unwrap();
    assert!(matches!(child.signal(0, Scope::Leader), Err(Error::BadSignal(0))));
    assert!(matches!(child.signal(65, Scope::Tree), Err(Error::BadSignal(65))));
}

#[tokio::test]
async fn many_wait_for_one() {
    let agent = Agent::new();
    let mut child = agent.spawn(with_stdin(sh("read x; exit 7"))).await.unwrap();
    let stdin = child.take_stdin();
    let waits = futures_like(&child);
    drop(stdin);
    let (a, b, c) = waits.await;
    assert_eq!([a, b, c], [Exit::Code(7); 3]);
}

async fn futures_like(child: &denizen_agent::Child) -> (Exit, Exit, Exit) {
    let (a, b, c) = tokio::join!(child.wait(), child.wait(), child.wait());
    (a.unwrap(), b.unwrap(), c.unwrap())
}

#[tokio::test]
async fn ten_megabytes_there_and_back() {
    let agent = Agent::new();
    let mut child = agent.spawn(with_stdin(sh("exec cat"))).await.unwrap();
    let sent: Vec<u8> =
        (0..10_000_000u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let mut stdin = child.take_stdin().unwrap();
    let write = async {
        stdin.write_all(&sent).await.unwrap();
        drop(stdin);
    };
    let ((), (received, errors)) = tokio::join!(write, collect(&mut child));
    assert!(received == sent);
    assert!(errors.is_empty());
    assert_eq!(child.wait().await.unwrap(), Exit::Code(0));
}

#[tokio::test]
async fn a_slow_reader_slows_the_writer_down() {
    let agent = Agent::new();
    let mut child = agent.spawn(sh("exec cat /dev/zero")).await.unwrap();
    let pid = child.pid();
    let mut output = child.take_output().unwrap();
    output.next().await.unwrap().unwrap();
    // Blocked in a write: nobody reads ahead of us.
    until("waiting for the reader", || {
        std::fs::read_to_string(format!("/proc/{pid}/wchan")).is_ok_and(|at| at.contains("pipe"))
            || common::state(pid) == Some('S')
    })
    .await;
    let written = || {
        let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
        let line = io.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap();
        line.parse::<u64>().unwrap()
    };
    let before = written();
    assert!(before < 1_000_000, "{before} bytes were taken with one read asked for");
    let mut taken = 0;
    while taken < 5_000_000 {
        taken += output.next().await.unwrap().unwrap().bytes.len() as u64;
    }
    assert!(written() < before + taken + 1_000_000);
    child.kill_tree().await.unwrap();
}

#[tokio::test]
async fn the_environment_is_what_was_given() {
    let agent = Agent::new();
    let mut spec = Spec::new("/usr/bin/env", "/tmp");
    spec.env.insert("A".into(), "1 = one".into());
    spec.env.insert("EMPTY".into(), "".into());
    spec.env.insert("ODD".into(), OsString::from_vec(vec![0xff, 0xfe, b'\n', b'x']));
    spec.env.insert("DENIZEN_COMMAND".into(), "somebody else's".into());
    spec.args = vec!["-0".into()];
    let mut child = agent.spawn(spec).await.unwrap();
    let (out, _) = collect(&mut child).await;
    let mut variables: Vec<&[u8]> =
        out.split(|byte| *byte == 0).filter(|v| !v.is_empty()).collect();
    let mark = variables.iter().position(|v| v.starts_with(b"DENIZEN_COMMAND=")).unwrap();
    let mark = variables.remove(mark);
    assert!(mark[16..].iter().all(u8::is_ascii_digit), "{mark:?}");
    variables.sort_unstable();
    assert_eq!(variables, [&b"A=1 = one"[..], b"EMPTY=", b"ODD=\xff\xfe\nx"]);
}

#[tokio::test]
async fn commands_start_clean() {
    let agent = Agent::new();
    let script = "ls /proc/self/fd; grep -E '^(SigBlk|SigIgn)' /proc/self/status; pwd; cut -d' ' -f1,5,6 /proc/$$/stat";
    let mut child = agent.spawn(sh(script)).await.unwrap();
    let pid = child.pid();
    let (out, _) = collect(&mut child).await;
    let text = String::from_utf8(out).unwrap();
    let lines: Vec<&str> = text.split_whitespace().collect();
    // The fourth is the folder that ls itself reads.
    assert_eq!(lines[..4], ["0", "1", "2", "3"]);
    let none = "0000000000000000";
    assert_eq!(lines[4..8], ["SigBlk:", none, "SigIgn:", none]);
    assert_eq!(lines[8], "/tmp");
    // It leads a group and a session of its own.
    assert_eq!(lines[9..], [&pid.to_string(); 3]);
}

#[tokio::test]
async fn output_may_be_any_bytes() {
    let agent = Agent::new();
    let mut child = agent.spawn(sh(r"printf '\377\376\000ok'; printf '\200' >&2")).await.unwrap();
    assert_eq!(collect(&mut child).await, (b"\xff\xfe\0ok".to_vec(), b"\x80".to_vec()));
}

#[tokio::test]
async fn arguments_may_be_any_bytes() {
    let agent = Agent::new();
    let mut spec = Spec::new("printf", "/tmp");
    spec.args = vec!["%s".into(), OsStr::from_bytes(b"\xff\xc0 'x").to_owned()];
    let mut child = agent.spawn(spec).await.unwrap();
    assert_eq!(collect(&mut child).await.0, b"\xff\xc0 'x");
}

#[tokio::test]
async fn chunks_come_from_both_streams_as_they_are_written() {
    let agent = Agent::new();
    let mut child = agent
        .spawn(with_stdin(sh("echo one; read x; echo two >&2; read x; echo three")))
        .await
        .unwrap();
    let mut stdin = child.take_stdin().unwrap();
    let mut output = child.take_output().unwrap();
    for (stream, bytes) in
        [(Stream::Stdout, "one\n"), (Stream::Stderr, "two\n"), (Stream::Stdout, "three\n")]
    {
        let chunk = output.next().await.unwrap().unwrap();
        assert_eq!((chunk.stream, &chunk.bytes[..]), (stream, bytes.as_bytes()));
        let _ = stdin.write_all(b"\n").await;
    }
    assert_eq!(output.next().await.unwrap(), None);
    assert_eq!(output.next().await.unwrap(), None);
    assert!(child.take_output().is_none());
}

#[tokio::test]
async fn readers_by_themselves() {
    let agent = Agent::new();
    let mut child = agent.spawn(sh("echo out; echo err >&2")).await.unwrap();
    let (mut out, mut err) = (String::new(), String::new());
    child.take_stdout().unwrap().read_to_string(&mut out).await.unwrap();
    child.take_stderr().unwrap().read_to_string(&mut err).await.unwrap();
    assert_eq!((out.as_str(), err.as_str()), ("out\n", "err\n"));
    assert!(child.take_stdin().is_none());
}

#[tokio::test]
async fn a_background_process_neither_holds_up_the_output_nor_breaks() {
    let agent = Agent::new();
    let folder = tempfile::tempdir().unwrap();
    let proof = folder.path().join("proof");
    // It writes far more than a pipe holds after its command has ended; with a broken or
    // a full pipe it would never come to write the file.
    let script = format!(
        "echo begun; (read go < {0}/fifo; head -c 1000000 /dev/zero; echo $? > {0}/part; mv {0}/part {1}; exec sleep 1000) & ",
        folder.path().display(),
        proof.display(),
    );
    let script = format!("mkfifo {}/fifo; {script}", folder.path().display());
    let mut child = agent.spawn(sh(&script)).await.unwrap();
    let (out, _) = collect(&mut child).await;
    assert_eq!(out, b"begun\n");
    assert_eq!(child.wait().await.unwrap(), Exit::Code(0));
    let id = child.id();
    drop(child);

    std::fs::write(folder.path().join("fifo"), "go\n").unwrap();
    until("writing to an output that nobody reads", || proof.exists()).await;
    assert_eq!(std::fs::read_to_string(&proof).unwrap(), "0\n");
    // It becomes the sleep once the last program before that has gone.
    let busy = loop {
        let busy = agent.busy().await.unwrap();
        match &*busy {
            [only] if only.name == "sleep" => break busy,
            _ => tokio::task::yield_now().await,
        }
    };
    assert_eq!(busy[0].command, Some(id));
    agent.shutdown(Duration::ZERO).await.unwrap();
    assert!(!common::is_alive(busy[0].pid));
    assert!(agent.busy().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_reader_dropped_early_does_not_break_the_command() {
    let agent = Agent::new();
    let mut child = agent.spawn(sh("head -c 1000000 /dev/zero; exit 3")).await.unwrap();
    drop(child.take_output());
    assert_eq!(child.wait().await.unwrap(), Exit::Code(3));
}

#[tokio::test]
async fn programs_are_found_as_shells_find_them() {
    let agent = Agent::new();
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, mode| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "#!/bin/sh\necho $0\n").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
    };
    write("a/tool", 0o644);
    write("b/tool", 0o755);
    std::fs::create_dir_all(folder.path().join("c/tool")).unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let with_path = |path: String| {
        let mut spec = Spec::new("tool", folder.path());
        spec.env.insert("PATH".into(), path.into());
        spec
    };
    let found = |spec| {
        let agent = agent.clone();
        async move {
            let mut child = agent.spawn(spec).await?;
            Ok::<_, Error>(
                String::from_utf8(collect(&mut child).await.0).unwrap().trim().to_owned(),
            )
        }
    };
    // What cannot be executed is passed over; directories too.
    let path = [at("c"), at("a"), at("b")].join(":");
    assert_eq!(found(with_path(path)).await.unwrap(), at("b/tool"));
    // An entry relative to the working directory, and a path relative to it.
    assert!(found(with_path("b".into())).await.unwrap().ends_with("b/tool"));
    assert_eq!(found(Spec::new("b/tool", folder.path())).await.unwrap(), "b/tool");
    let error = found(with_path(at("a"))).await.unwrap_err();
    assert!(matches!(error, Error::NotExecutable { .. }), "{error}");
    let error = found(with_path(at("nowhere"))).await.unwrap_err();
    assert!(matches!(error, Error::ProgramNotFound { .. }), "{error}");
    assert_eq!(error.exit_code(), 127);
    // Without any PATH there is a default.
    assert!(agent.spawn(Spec::new("true", "/")).await.is_ok());
}

#[tokio::test]
async fn what_cannot_start_is_told_apart() {
    let agent = Agent::new();
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str, mode| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path
    };
    let plain = file("plain", "", 0o644);
    let orphan = file("orphan", "#!/no/such/interpreter\n", 0o755);
    let format = file("format", "neither ELF nor script", 0o755);

    let start =
        async |program: &OsStr, cwd: &str| agent.spawn(Spec::new(program, cwd)).await.unwrap_err();
    let error = start("no-such-program".as_ref(), "/").await;
    assert!(matches!(error, Error::ProgramNotFound { .. }), "{error}");
    let error = start("/no/such/program".as_ref(), "/").await;
    assert!(matches!(error, Error::ProgramNotFound { .. }), "{error}");
    assert_eq!(error.exit_code(), 127);
    let error = start("".as_ref(), "/").await;
    assert!(matches!(error, Error::ProgramNotFound { .. }), "{error}");
    let error = start(plain.join("x").as_os_str(), "/").await;
    assert!(matches!(error, Error::ProgramNotFound { .. }), "{error}");
    let error = start("/tmp".as_ref(), "/").await;
    assert!(matches!(error, Error::ProgramIsDirectory { .. }), "{error}");
    assert_eq!(error.exit_code(), 126);
    let error = start(plain.as_os_str(), "/").await;
    assert!(matches!(error, Error::NotExecutable { .. }), "{error}");
    assert_eq!(error.exit_code(), 126);
    let error = start(orphan.as_os_str(), "/").await;
    assert!(matches!(error, Error::InterpreterNotFound { .. }), "{error}");
    let error = start(format.as_os_str(), "/").await;
    assert!(matches!(error, Error::Start { .. }), "{error}");
    for cwd in ["/no/such/folder", "/bin/true", ""] {
        for program in ["/bin/true", "true"] {
            let error = start(program.as_ref(), cwd).await;
            assert!(matches!(error, Error::WorkingDirectory { .. }), "{cwd}: {error}");
            assert_eq!(error.exit_code(), 125);
        }
    }

    let mut zero = Spec::new("/bin/true", "/");
    zero.args = vec![OsString::from_vec(b"a\0b".to_vec())];
    assert!(matches!(agent.spawn(zero).await, Err(Error::BadString { .. })));
    let mut name = Spec::new("/bin/true", "/");
    name.env.insert("A=B".into(), "x".into());
    assert!(matches!(agent.spawn(name).await, Err(Error::BadString { .. })));

    // After all that it still works.
    assert_eq!(run(&agent, "echo fine").await, "fine");
}

#[tokio::test]
async fn too_many_arguments_are_an_error_and_many_are_not() {
    let agent = Agent::new();
    let mut many = sh(r#"printf '%s\n' "$@" | wc -c"#);
    many.args.push("sh".into());
    many.args.extend((0..10_000).map(|_| OsString::from("y".repeat(99))));
    let mut child = agent.spawn(many).await.unwrap();
    assert_eq!(collect(&mut child).await.0.trim_ascii(), b"1000000");

    let mut huge = Spec::new("/bin/true", "/");
    huge.args = (0..10_000).map(|_| OsString::from("y".repeat(1024))).collect();
    let error = agent.spawn(huge).await.unwrap_err();
    assert!(matches!(error, Error::TooBig { bytes, .. } if bytes > 10_000_000), "{error}");

    // One string longer than 128 KiB (execve(2)).
    let mut long = Spec::new("/bin/true", "/");
    long.env.insert("LONG".into(), "y".repeat(200_000).into());
    let error = agent.spawn(long).await.unwrap_err();
    assert!(matches!(error, Error::TooBig { .. }), "{error}");
    assert_eq!(run(&agent, "echo fine").await, "fine");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_commands_at_once() {
    let agent = Agent::new();
    let mut tasks = Vec::new();
    for n in 0..300 {
        let agent = agent.clone();
        tasks.push(tokio::spawn(async move {
            let mut spec = sh(&format!("echo {n}; exit {}", n % 256));
            // Enough of them to fill the socket.
            spec.env.insert("FILL".into(), "x".repeat(8000).into());
            let mut child = agent.spawn(spec).await.unwrap();
            let (out, _) = collect(&mut child).await;
            assert_eq!(String::from_utf8(out).unwrap().trim(), n.to_string());
            assert_eq!(child.wait().await.unwrap(), Exit::Code(n % 256));
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn one_agent_serves_several_runtimes() {
    let agent = Agent::new();
    assert_eq!(run(&agent, "echo first").await, "first");
    let second = agent.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        assert_eq!(runtime.block_on(run(&second, "echo second")), "second");
    })
    .join()
    .unwrap();
    assert_eq!(run(&agent, "echo third").await, "third");
}

#[tokio::test]
async fn init_can_run_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("init");
    let agent = Agent::with(Launch { program_file: Some(file.clone()), ..Launch::default() });
    // Memory files work here, so the file is not needed and not made.
    assert_eq!(run(&agent, "echo fine").await, "fine");
    assert!(!file.exists());
}

#[tokio::test]
async fn a_detached_child_lives_on() {
    let agent = Agent::new();
    let mut child = agent.spawn(sh("exec sleep 1000")).await.unwrap();
    let pid = child.pid();
    child.detach();
    drop(child);
    let busy = agent.busy().await.unwrap();
    assert_eq!(busy.iter().map(|process| process.pid).collect::<Vec<_>>(), [pid]);
    drop(agent);
    until_gone(pid).await;
}
