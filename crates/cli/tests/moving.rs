//! Sessions that move from one user to another as a file.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{User, text};

const LOOK: &str = "find . -mindepth 1 -printf '%P %y %m %U:%G %l %s %T@\n' | sort; \
                    cat deep/run /etc/mine /usr/local/bin/tool; ls /etc/motd 2>&1";

fn archive(user: &User) -> PathBuf {
    user.state.path().join("archive.tar.zst")
}

fn import(user: &User, session: &str, from: &Path) -> Output {
    user.run(&["import", session, from.to_str().unwrap()])
}

/// Runs a command line in a folder of the user's, where the archives are made.
fn shell(user: &User, line: &str) {
    let output =
        Command::new("sh").args(["-ec", line]).current_dir(user.state.path()).output().unwrap();
    assert!(output.status.success(), "{line}: {output:?}");
}

/// That there is no session, and nothing half-made of one.
fn nothing_is_left(user: &User) {
    assert_eq!(user.json(&["ls"]), serde_json::json!([]));
    let pool = user.state.path().join("pool");
    let names = |folder: &Path| {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&pool), [".denizen"]);
    assert!(names(&pool.join(".denizen/staging")).is_empty());
    // Those that are kept ready have nothing in them. The daemon goes on making
    // and taking them meanwhile, so one may have no volume yet, or be gone.
    for spare in names(&pool.join(".denizen/spares")) {
        let volume = pool.join(".denizen/spares").join(spare).join("volume");
        match std::fs::read_dir(&volume) {
            Ok(mut entries) => assert!(entries.next().is_none(), "{volume:?}"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "{volume:?}"),
        }
    }
}

#[test]
fn a_session_goes_from_one_user_to_another() {
    let (here, there) = (User::new(), User::new());
    let made = here.exec(
        "demo",
        "mkdir -p deep/empty; echo '#!/bin/sh' > deep/run; chmod 4751 deep/run; chmod 1777 deep; \
         ln -s /nowhere link; mkfifo pipe; touch -d 1999-12-31 old; truncate -s 1M holes; \
         echo mine > /etc/mine; echo tool > /usr/local/bin/tool; rm -f /etc/motd",
    );
    assert!(made.status.success(), "{made:?}");
    let before = text(&here.exec("demo", LOOK).stdout);
    assert!(before.contains("deep/run f 4751"), "{before}");
    let exported = here.denizen(&["export", "demo"]).stdout(Stdio::piped()).output().unwrap();
    assert!(exported.status.success(), "{exported:?}");
    std::fs::write(archive(&here), &exported.stdout).unwrap();
    // It is what other programs read, too.
    shell(&here, "tar --zstd -tf archive.tar.zst | grep -q ^./deep/run");
    let mut import = there.denizen(&["--json", "import", "demo"]);
    let imported = import.stdin(File::open(archive(&here)).unwrap()).output().unwrap();
    assert!(imported.status.success(), "{imported:?}");
    let session: serde_json::Value = serde_json::from_slice(&imported.stdout).unwrap();
    assert_eq!((&session["name"], &session["unsaved"]), (&"demo".into(), &true.into()));
    assert_eq!(text(&there.exec("demo", LOOK).stdout), before);
    // What was exported goes on as it was.
    assert_eq!(text(&here.exec("demo", LOOK).stdout), before);
    let staging = here.state.path().join("pool/.denizen/staging");
    assert_eq!(std::fs::read_dir(staging).unwrap().count(), 0);
}

#[test]
fn what_other_programs_have_packed_is_imported() {
    let user = User::new();
    shell(&user, "mkdir -p tree/sub; echo s > tree/file; chmod 640 tree/file; ln -s file tree/l");
    // As the file that denizen was asked for writes it, and without an entry for the folder.
    shell(&user, "tar --zstd -cf seed.tar.zst -C tree . ; tar --zstd -cf plain.tar.zst tree");
    let state = user.state.path();
    assert!(import(&user, "seed", &state.join("seed.tar.zst")).status.success());
    let seen = user.exec("seed", "stat -c %a file; cat l; echo more >> file; touch sub/new; cat l");
    assert_eq!(text(&seen.stdout), "640\ns\ns\nmore\n", "{seen:?}");
    assert!(import(&user, "plain", &state.join("plain.tar.zst")).status.success());
    assert_eq!(text(&user.exec("plain", "cat tree/l").stdout), "s\n");
    // Never over one that is there.
    let again = import(&user, "seed", &state.join("plain.tar.zst"));
    assert_eq!(again.status.code(), Some(125));
    assert!(text(&again.stderr).contains("there is a session seed already"), "{again:?}");
    assert_eq!(text(&user.exec("seed", "cat file; ls").stdout), "s\nmore\nfile\nl\nsub\n");
}

#[test]
fn of_what_cannot_be_imported_nothing_is_left() {
    let user = User::new();
    shell(
        &user,
        "mkdir tree; head -c 3000000 /dev/urandom > tree/file; echo > tree/f
         tar --zstd -cf whole -C tree .; head -c 2000000 whole > cut
         tar --zstd -Pcf up -C tree --transform 's,^f$,../f,' f
         tar --zstd -Pcf absolute -C tree --transform 's,^f$,/tmp/f,' f
         tar --zstd -cf device -C / dev/null
         tar -czf gzip tree; : > empty; echo hello > text
         ln -s / tree/out; tar --zstd -cf through --transform 's,^f$,out/tmp/f,' -C tree out f",
    );
    for (name, expected) in [
        ("cut", "damaged"),
        ("up", "`..`"),
        ("absolute", "absolute"),
        ("device", "device node"),
        ("gzip", "Zstandard"),
        ("empty", "damaged"),
        ("text", "Zstandard"),
        ("through", "below a symlink"),
    ] {
        let output = import(&user, "a", &user.state.path().join(name));
        assert_eq!(output.status.code(), Some(125), "{name}: {output:?}");
        let why = text(&output.stderr);
        assert!(why.contains("nothing was imported") && why.contains(expected), "{name}: {why}");
        nothing_is_left(&user);
    }
    assert_eq!(import(&user, "a", Path::new("/no/such/file")).status.code(), Some(125));
    assert_eq!(import(&user, "a/b", &user.state.path().join("whole")).status.code(), Some(125));
    nothing_is_left(&user);
    // The name is still free.
    assert!(import(&user, "a", &user.state.path().join("whole")).status.success());
}

#[test]
fn an_archive_of_more_than_a_session_may_have_is_refused() {
    let user = User::new();
    shell(&user, "mkdir tree; truncate -s 64M tree/zeros; cat tree/zeros > tree/f; rm tree/zeros");
    shell(&user, "tar --zstd -cf bomb -C tree .");
    let bomb = user.state.path().join("bomb");
    let bomb = bomb.to_str().unwrap();
    let output = user.run(&["--limits", "{ disk_bytes = 33554432 }", "import", "a", bomb]);
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    assert!(text(&output.stderr).contains("more than the 33554432 bytes"), "{output:?}");
    nothing_is_left(&user);
}

#[test]
fn an_archived_session_is_exported_from_its_backup() {
    let (here, there) = (User::new(), User::new());
    let one = ["--max-vms", "1", "--spares", "0"];
    let line = ["exec", "a", "--", "sh", "-c", "echo kept > file; echo root > /etc/mine"];
    assert!(here.run(&[&one[..], &line].concat()).status.success());
    // Takes its place.
    here.exec("b", "true");
    assert_eq!(here.json(&["inspect", "a"])["state"], "archived");
    let to = archive(&here);
    let exported = here.run(&["export", "a", "-o", to.to_str().unwrap()]);
    assert!(exported.status.success(), "{exported:?}");
    assert_eq!(here.json(&["inspect", "a"])["state"], "archived", "it was not brought back");
    assert!(import(&there, "a", &to).status.success());
    assert_eq!(text(&there.exec("a", "cat file /etc/mine").stdout), "kept\nroot\n");
}

#[test]
fn a_session_in_use_is_not_exported() {
    let user = User::new();
    let to = archive(&user);
    let export = || user.run(&["export", "a", "--output", to.to_str().unwrap()]);
    let nobody = export();
    assert!(text(&nobody.stderr).contains("there is no session a"), "{nobody:?}");
    assert!(user.run(&["exec", "-d", "a", "--", "sleep", "718560"]).status.success());
    let busy = export();
    assert_eq!(busy.status.code(), Some(125));
    assert!(text(&busy.stderr).contains("in use"), "{busy:?}");
    assert!(!to.exists());
    assert!(user.run(&["stop", "--force", "a"]).status.success());
    assert!(export().status.success());
    assert!(to.exists());
}

#[test]
fn an_archive_that_breaks_off_is_noticed_and_not_kept() {
    let user = User::new();
    // In the place of a daemon: one that is gone after a part of the archive.
    let listener = UnixListener::bind(user.state.path().join("denizen.sock")).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, mut seen, mut piece) = (stream.unwrap(), Vec::new(), [0; 4096]);
            while !seen.ends_with(b"\r\n\r\n") {
                match stream.read(&mut piece) {
                    Ok(count @ 1..) => seen.extend_from_slice(&piece[..count]),
                    _ => break,
                }
            }
            if !seen.is_empty() {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\na part").unwrap();
            }
        }
    });
    let to = archive(&user);
    std::fs::write(&to, "what was there").unwrap();
    let output = user.run(&["export", "a", "-o", to.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    assert!(text(&output.stderr).contains("broke off"), "{output:?}");
    assert_eq!(std::fs::read(&to).unwrap(), b"what was there");
    let files = std::fs::read_dir(user.state.path()).unwrap();
    assert_eq!(files.count(), 2, "the socket and what was there");
    assert_eq!(user.run(&["export", "a"]).status.code(), Some(125));
    std::fs::remove_file(user.state.path().join("denizen.sock")).unwrap();
}

#[test]
fn no_archive_goes_to_a_terminal() {
    let user = User::new();
    user.exec("a", "true");
    let mut script = Command::new("script");
    script.args(["-qec", "\"$DENIZEN\" export a", "/dev/null"]).stdin(Stdio::null());
    script.env("DENIZEN", env!("CARGO_BIN_EXE_denizen")).env("DENIZEN_STATE", user.state.path());
    let output = script.output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stdout).contains("nothing for a terminal"), "{output:?}");
}
