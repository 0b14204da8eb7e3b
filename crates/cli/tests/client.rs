//! The client crate, as a Rust program uses it, with the real daemon.
#![allow(clippy::unwrap_used)]

mod common;

use common::{User, text};
use denizen_client::api::{Code, NewKey, NewSession, NewToken, OutputStream, Scope, Size};
use denizen_client::{Client, Error, NewProcess, Run, RunEvent, Target, Told};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn client(user: &User) -> Client {
    user.json(&["ls"]);
    Client::new(Target::socket(user.state.path().join("denizen.sock")))
}

fn code(error: &Error) -> Option<Code> {
    match error {
        Error::Refused(problem) => Some(problem.code),
        _ => None,
    }
}

/// What it prints, and how it ends.
async fn finish(mut run: Run) -> (String, i32) {
    let mut printed = Vec::new();
    loop {
        match run.next().await.unwrap().unwrap() {
            RunEvent::Output(piece) => printed.extend_from_slice(&piece.bytes),
            RunEvent::Exit(ended) => {
                assert_eq!(run.next().await.unwrap(), None);
                return (text(&printed), ended.code);
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn sessions_commands_and_events() {
    let user = User::new();
    let client = client(&user);
    assert_eq!(client.health().await.unwrap().pid, user.daemon_pid().unwrap().cast_unsigned());
    let mut events = client.events(Some("a"), None).await.unwrap();
    let new = NewSession { name: Some("a".to_owned()), image: None };
    let made = client.create(&new, Some("key")).await.unwrap();
    assert_eq!(client.create(&new, Some("key")).await.unwrap(), made);
    assert_eq!(code(&client.create(&new, None).await.unwrap_err()), Some(Code::AlreadyExists));
    let Told::Event(created) = events.next().await.unwrap() else { panic!("it is lost") };
    assert_eq!((created.event.as_str(), created.session), ("created", made.id));

    let run = NewProcess::shell("echo hello; pwd; exit 3");
    let (printed, code_) = finish(client.run("a", &run).await.unwrap()).await;
    assert_eq!((printed.lines().next(), code_), (Some("hello"), 3));
    let missing = client.run("a", &NewProcess::command(["nothing-like-that"])).await;
    assert_eq!(code(&missing.err().unwrap()), Some(Code::NoProgram));
    let slow = NewProcess { timeout_seconds: Some(1), ..NewProcess::command(["sleep", "1000"]) };
    let mut slow = client.run("a", &slow).await.unwrap();
    assert!(matches!(slow.next().await.unwrap(), Some(RunEvent::Started(_))));
    assert!(slow.next().await.unwrap_err().to_string().contains("timeout"));

    // What was stopped without force is told, too.
    client.stop("a", false).await.unwrap();
    let last = events.last().unwrap().to_owned();
    let mut again = client.events(None, Some(&last)).await.unwrap();
    let Told::Event(next) = again.next().await.unwrap() else { panic!("it is lost") };
    assert_eq!(next.event, "started");
    // Of another daemon's events nobody knows which came after.
    let mut others = client.events(None, Some("other-1")).await.unwrap();
    assert_eq!(others.next().await.unwrap(), Told::Lost);
    assert!(matches!(others.next().await.unwrap(), Told::Event(_)));
    client.ensure("b", None).await.unwrap();
    let names: Vec<_> = client.sessions().await.unwrap().into_iter().map(|it| it.name).collect();
    assert_eq!(names, [Some("a".to_owned()), Some("b".to_owned())]);
    client.remove("b", true).await.unwrap();
    assert_eq!(code(&client.session("b").await.unwrap_err()), Some(Code::UnknownSession));
    let nobody = Client::new(Target::socket(user.state.path().join("other.sock")));
    assert!(matches!(nobody.health().await.unwrap_err(), Error::Gone { .. }));
    assert!(matches!(Target::url("ftp://a", None).err(), Some(Error::Address(_))));
}

#[tokio::test]
async fn a_command_in_the_background() {
    let user = User::new();
    let client = client(&user);
    let cat = NewProcess { stdin: true, tag: Some("cat".into()), ..NewProcess::command(["cat"]) };
    let started = client.start("a", &cat).await.unwrap();
    client.input("a", "cat", "first\n", false).await.unwrap();
    let mut output = client.output("a", "cat", 0).await.unwrap();
    let Some(RunEvent::Output(piece)) = output.next().await.unwrap() else { panic!() };
    assert_eq!((piece.stream, piece.offset), (OutputStream::Stdout, 0));
    assert_eq!(piece.bytes, "first\n");
    client.input("a", "cat", "second\n", true).await.unwrap();
    assert_eq!(finish(output).await, ("second\n".to_owned(), 0));
    let later = client.output("a", "cat", 6).await.unwrap();
    assert_eq!(finish(later).await, ("second\n".to_owned(), 0));
    let all = client.list_processes("a").await.unwrap();
    assert_eq!((all.len(), all[0].pid, all[0].ended.as_ref().unwrap().code), (1, started.pid, 0));
    let closed = client.input("a", "cat", "third", false).await.unwrap_err();
    assert_eq!(code(&closed), Some(Code::BadState), "{closed}");

    let terminal = Some(Size { columns: 80, rows: 24 });
    let shell = NewProcess { terminal, ..NewProcess::command(["sleep", "1000"]) };
    let shell = client.start("a", &shell).await.unwrap().pid.to_string();
    client.resize("a", &shell, Size { columns: 100, rows: 30 }).await.unwrap();
    client.signal("a", &shell, 15).await.unwrap();
    assert_eq!(finish(client.output("a", &shell, 0).await.unwrap()).await.1, 143);
    let mut log = Vec::new();
    let path = denizen_client::path("a", "/logs/cat");
    client.download(&path, &mut log).await.unwrap();
    assert!(text(&log).starts_with("first\nsecond\n"), "{}", text(&log));
}

#[tokio::test]
async fn backups_snapshots_and_ports() {
    let user = User::new();
    let client = client(&user);
    let run = |line: &'static str| {
        let client = client.clone();
        async move { finish(client.run("a", &NewProcess::shell(line)).await.unwrap()).await }
    };
    assert_eq!(run("echo one > file").await.1, 0);
    client.snapshot("a", "before").await.unwrap();
    assert_eq!(client.snapshots("a").await.unwrap()[0].name, "before");
    assert_eq!(run("echo two > file").await.1, 0);
    let found = client.diff(("a", Some("before")), ("a", None)).await.unwrap();
    assert_eq!((found[0].change.as_str(), found[0].path.as_str()), ("changed", "file"));
    let saved = client.backup("a").await.unwrap();
    let backups = client.backups(Some("a")).await.unwrap();
    assert_eq!(backups[0].name, saved.backup.unwrap());
    assert_eq!(client.backups(None).await.unwrap(), backups);
    assert_eq!(client.verify_backups(true).await.unwrap().findings, []);
    client.remove_snapshot("a", "before").await.unwrap();
    let gone = client.remove_snapshot("a", "before").await.unwrap_err();
    assert_eq!(code(&gone), Some(Code::NoSnapshot));

    let serve = "import socket
s = socket.create_server(('127.0.0.1', 7070))
print('ready', flush=True)
c, _ = s.accept()
c.sendall(c.recv(100).upper())";
    let serve =
        NewProcess { tag: Some("s".into()), ..NewProcess::command(["python3", "-c", serve]) };
    client.start("a", &serve).await.unwrap();
    let mut output = client.output("a", "s", 0).await.unwrap();
    assert!(matches!(output.next().await.unwrap(), Some(RunEvent::Output(_))));
    let mut port = client.port("a", 7070).await.unwrap();
    port.write_all(b"hello").await.unwrap();
    let mut answer = Vec::new();
    port.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"HELLO");
    assert_eq!(code(&client.port("a", 7071).await.err().unwrap()), Some(Code::Port));
}

/// A socket in front of the daemon's that cuts each connection after so many bytes of either
/// direction.
fn cutting(user: &User, limit: u64) -> Client {
    let (before, behind) =
        (user.state.path().join("cut.sock"), user.state.path().join("denizen.sock"));
    let listener = tokio::net::UnixListener::bind(&before).unwrap();
    tokio::spawn(async move {
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let daemon = tokio::net::UnixStream::connect(&behind).await.unwrap();
            tokio::spawn(async move {
                let (from_client, mut to_client) = client.into_split();
                let (from_daemon, mut to_daemon) = daemon.into_split();
                let (mut up, mut down) = (from_client.take(limit), from_daemon.take(limit));
                // Whichever ends first ends both.
                tokio::select! {
                    _ = tokio::io::copy(&mut up, &mut to_daemon) => {}
                    _ = tokio::io::copy(&mut down, &mut to_client) => {}
                }
            });
        }
    });
    Client::new(Target::socket(before))
}

#[tokio::test]
async fn files_come_and_go_over_connections_that_break() {
    let user = User::new();
    let client = client(&user);
    client.ensure("a", None).await.unwrap();
    let cut = cutting(&user, 1 << 20);
    let content: Vec<u8> =
        (0..1_500_000u32).flat_map(|it| it.to_le_bytes()[..3].to_vec()).collect();

    let sent = cut.upload_file("a", "~/d/f", "one", std::io::Cursor::new(content.clone())).await;
    assert_eq!(sent.unwrap().size, content.len() as u64);
    let mut came = Vec::new();
    let length = cut.download_file("a", "~/d/f", 0, &mut came).await.unwrap();
    assert!(length == content.len() as u64 && came == content);
    let mut rest = Vec::new();
    client.download_file("a", "~/d/f", 4_000_000, &mut rest).await.unwrap();
    assert!(rest == content[4_000_000..]);
    assert_eq!(client.download_file("a", "~/d/f", 4_500_000, &mut rest).await.unwrap(), 0);
    // In one piece, it does not come through.
    let whole = cut.write_file("a", "~/d/g", std::io::Cursor::new(content)).await;
    assert!(whole.is_err());
    let gone = client.stat("a", "~/d/g").await.unwrap_err();
    assert_eq!(code(&gone), Some(Code::NoFile), "{gone}");
    let empty = client.upload_file("a", "~/d/empty", "two", std::io::Cursor::new(vec![])).await;
    assert_eq!(empty.unwrap().size, 0);
    let names: Vec<_> =
        client.list("a", "~/d").await.unwrap().into_iter().map(|it| it.name).collect();
    assert_eq!(names, ["empty", "f"]);
}

#[tokio::test]
async fn folders_are_watched_moved_and_copied() {
    let user = User::new();
    let client = client(&user);
    client.ensure("a", None).await.unwrap();
    client.make_folder("a", "/volume/d/e").await.unwrap();
    let mut changes = client.watch("a", "/volume/d", true).await.unwrap();
    client.write_file("a", "/volume/d/e/a b%41", &b"x"[..]).await.unwrap();
    while changes.next().await.unwrap().unwrap().path != "/volume/d/e/a b%41" {}
    let moved = client.move_file("a", "/volume/d/e/a b%41", "/volume/d/é", false).await.unwrap();
    assert_eq!(moved.path, "/volume/d/é");
    while changes.next().await.unwrap().unwrap().path != "/volume/d/é" {}
    let mut archive = Vec::new();
    client.download_folder("a", "/volume/d", &mut archive).await.unwrap();
    client.upload_folder("a", "/volume/copy", std::io::Cursor::new(archive)).await.unwrap();
    assert_eq!(client.stat("a", "/volume/copy/é").await.unwrap().size, 1);
    let full = client.remove_file("a", "/volume/copy", false).await.unwrap_err();
    assert_eq!(code(&full), Some(Code::NotEmpty));
    client.remove_file("a", "/volume/copy", true).await.unwrap();
}

#[tokio::test]
async fn keys_and_tokens() {
    let user = User::new();
    let client = client(&user);
    let who = client.whoami().await.unwrap();
    assert_eq!((who.name.as_str(), who.scope), ("local", Scope::Admin));
    let new = NewKey {
        name: "ci".to_owned(),
        scope: Scope::Read,
        sessions: Some("ci-".to_owned()),
        expires_in_seconds: Some(60),
    };
    let made = client.create_key(&new).await.unwrap();
    assert!(made.key.starts_with("dk_") && made.info.expires_at.is_some());
    assert_eq!(client.keys().await.unwrap().keys, [made.info.clone()]);
    client.revoke_key(&made.info.id).await.unwrap();
    let gone = client.revoke_key(&made.info.id).await.unwrap_err();
    assert_eq!(code(&gone), Some(Code::UnknownKey));
    let session = client.ensure("a", None).await.unwrap();
    let asked = NewToken { expires_in_seconds: Some(60) };
    let token = client.create_token("a", asked).await.unwrap();
    assert!(token.session == session.id && token.token.starts_with("dt_"));
    client.void_tokens("a").await.unwrap();
}

#[tokio::test]
async fn a_full_disk_is_not_taken_for_a_daemon_that_is_gone() {
    let user = User::new();
    let client = client(&user);
    let mut full = tokio::fs::OpenOptions::new().write(true).open("/dev/full").await.unwrap();
    let failed = client.download("/v1/openapi.json", &mut full).await.unwrap_err();
    assert!(matches!(failed, Error::Write(_)), "{failed}");
}
