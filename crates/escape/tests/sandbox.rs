//! Every attempt, made within a sandbox, has to be held: under a pool of root's and under one
//! of an ordinary user's.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{PROGRAM, Stage, list};
use denizen::{Isolation, MicroVmManager, VmPoolConfig};
use uuid::Uuid;

/// What looks like a way out where root within is the only user, and why it is none: becoming
/// or naming another user is pretended there, so the attempt goes on as root within.
const PRETENDED: &[(&str, &str)] = &[
    ("become-unmapped", "it is told so, and stays who it is"),
    ("unmapped-owner", "it is told so, and the file stays whose it is"),
    ("setgroups", "it is told so, and has no other groups"),
    ("setuid-copy", "it never stopped being root within"),
    ("setgid-copy", "it never stopped being group 0 within"),
    ("setuid-programs", "it never stopped being root within"),
    ("file-capabilities", "it never lost those of root within"),
    ("self-executable", "the attempt itself is a file of the session's"),
];

/// Makes every attempt in a sandbox of this process's user; gives what was not held, unless
/// it is `allowed`.
async fn attempt_all(
    folder: &Path,
    program: &Path,
    arguments: &[String],
    allowed: &[(&str, &str)],
) -> Vec<String> {
    let config = VmPoolConfig {
        enabled: true,
        volume_root: folder.join("pool"),
        shell: "/bin/sh".into(),
        shell_args: vec!["-c".to_owned()],
        ..VmPoolConfig::default()
    };
    let pool = MicroVmManager::builder((&config).into()).isolation(Isolation::Sandbox);
    let pool = pool.cache(folder.join("cache")).build().unwrap();
    let session = Uuid::new_v4();
    let guard = pool.acquire(session).await.unwrap();
    std::fs::copy(program, guard.volume().join("escape")).unwrap();
    let mut wrong = Vec::new();
    for one in list() {
        let name = one["name"].as_str().unwrap();
        let attempt = guard.program("./escape").args(["run", name]).args(arguments);
        let attempt = attempt.args(["--allow-env", "DENIZEN_SESSION"]);
        let attempt = attempt.args(["--allow-env", "DENIZEN_COMMAND"]);
        let output = attempt.output().await.unwrap();
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        // The word, too: what did not run was not held either.
        let held =
            said.starts_with(&format!("held: {name}:")) && output.exit == denizen::Exit::Code(1);
        let allowed = allowed.iter().any(|(known, _)| *known == name);
        let impossible = said.starts_with("impossible: ");
        if impossible {
            println!("not tried: {said}");
        } else if held == allowed {
            wrong.push(format!("{:?} {said}", output.exit));
        }
    }
    drop(guard);
    pool.shutdown().await.unwrap();
    wrong
}

#[tokio::test]
async fn nothing_gets_out_of_roots_sandbox() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: the sandboxes of root need root");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let stage_folder = folder.path().join("stage");
    std::fs::create_dir(&stage_folder).unwrap();
    let mut stage = Stage::new(&stage_folder);
    let wrong = attempt_all(folder.path(), Path::new(PROGRAM), &stage.arguments, &[]).await;
    assert!(wrong.is_empty(), "not held:\n{}", wrong.join("\n"));
    assert_eq!(stage.traces(), Vec::<String>::new(), "seen from outside");
}

/// The same test again, run by an ordinary user.
#[tokio::test]
async fn nothing_gets_out_of_a_users_sandbox() {
    again("nothing_gets_out_of_a_users_sandbox", PRETENDED, |program| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=12345", "--regid=12345", "--clear-groups"]).arg(program);
        command
    })
    .await;
}

/// And by one that has a range of ids, as the program makes itself.
#[tokio::test]
async fn nothing_gets_out_of_a_sandbox_of_a_user_with_a_range() {
    again("nothing_gets_out_of_a_sandbox_of_a_user_with_a_range", &[], |program| {
        let enter = "read -r go; exec setpriv --reuid=0 --regid=0 --clear-groups \"$0\" \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--user", "--keep-caps", "sh", "-c", enter]).arg(program);
        command
    })
    .await;
}

/// Makes the attempts in this process if it is the ordinary user, or runs one test of this
/// program as that user. What `command` starts may be in a user namespace that is yet to be
/// given its ids, and then wait for a line.
async fn again(name: &str, allowed: &[(&str, &str)], command: impl Fn(&Path) -> Command) {
    if let Ok(folder) = std::env::var("DENIZEN_TEST_FOLDER") {
        let folder = Path::new(&folder);
        let arguments = std::fs::read_to_string(folder.join("arguments")).unwrap();
        let arguments: Vec<String> = arguments.lines().map(str::to_owned).collect();
        let wrong = attempt_all(folder, &folder.join("escape"), &arguments, allowed).await;
        assert!(wrong.is_empty(), "not held:\n{}", wrong.join("\n"));
        return;
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: the stage needs root");
        return;
    }
    let stage_folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::new(stage_folder.path());
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("arguments"), stage.arguments.join("\n")).unwrap();
    // Somewhere that the user may look.
    std::fs::copy(PROGRAM, folder.path().join("escape")).unwrap();
    std::fs::copy(std::env::current_exe().unwrap(), folder.path().join("test")).unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::chown(folder.path(), Some(12345), Some(12345)).unwrap();
    let mut command = command(&folder.path().join("test"));
    let mut child = command
        .args(["--exact", name, "--nocapture"])
        .env("DENIZEN_TEST_FOLDER", folder.path())
        .envs(stage.environment.clone())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    if command.get_program() == "unshare" {
        let process = PathBuf::from(format!("/proc/{}", child.id()));
        let namespace = |process: &Path| std::fs::read_link(process.join("ns/user")).unwrap();
        while namespace(&process) == namespace(Path::new("/proc/self")) {
            std::thread::yield_now();
        }
        for file in ["uid_map", "gid_map"] {
            let map = "0 12345 1\n1879048192 500000 65536\n";
            std::fs::write(process.join(file), map).unwrap();
        }
        std::io::Write::write_all(&mut stdin, b"go\n").unwrap();
    }
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    println!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(stage.traces(), Vec::<String>::new(), "seen from outside");
}
