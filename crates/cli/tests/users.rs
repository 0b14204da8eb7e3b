//! Sandboxes of an ordinary user that `/etc/subuid` gives a range to, with the real program.
//! The user is one of the test's own: passwd(5) and subuid(5) lie over the machine's in a mount
//! namespace, so that nothing of the machine changes. What `denizen` does there it does as that
//! user; looking from outside is left to root.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{running, saved_image, text, until};
use serde_json::Value;
use tempfile::TempDir;

/// The user outside, and where its ranges begin.
const USER: u32 = 23_456;
const USERS: u32 = 500_000;
const GROUPS: u32 = 600_000;

struct Ordinary {
    folder: TempDir,
}

/// Whether the user has a range when a daemon starts.
#[derive(Clone, Copy, PartialEq)]
enum Range {
    Has,
    Lacks,
}
use Range::{Has, Lacks};

impl Ordinary {
    /// None where the test cannot make one.
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: a user of the test's own needs root");
            return None;
        }
        let user = Self { folder: tempfile::tempdir().unwrap() };
        fs::set_permissions(user.path(""), fs::Permissions::from_mode(0o755)).unwrap();
        let home = user.path("home");
        fs::create_dir(&home).unwrap();
        chown(&home, Some(USER), Some(USER)).unwrap();
        // Where the user may look.
        let (from, to) = (env!("CARGO_BIN_EXE_denizen"), user.path("denizen"));
        fs::hard_link(from, &to).or_else(|_| fs::copy(from, &to).map(drop)).unwrap();
        let add = |file: &str, line: String| {
            let before = fs::read_to_string(Path::new("/etc").join(file)).unwrap_or_default();
            fs::write(user.path(file), before + &line).unwrap();
            // The copy of the host's root, which all tests share, is made anew for a new one.
            let time = fs::metadata(Path::new("/etc").join(file)).unwrap().modified().unwrap();
            File::options().write(true).open(user.path(file)).unwrap().set_modified(time).unwrap();
        };
        add("passwd", format!("ordinary:x:{USER}:{USER}::{}:/bin/sh\n", home.display()));
        add("group", format!("ordinary:x:{USER}:\n"));
        fs::write(user.path("subuid"), format!("ordinary:{USERS}:65536\n")).unwrap();
        fs::write(user.path("subgid"), format!("ordinary:{GROUPS}:65536\n")).unwrap();
        fs::write(user.path("none"), "").unwrap();
        Some(user)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn denizen(&self, range: Range, args: &[&str]) -> Command {
        const ENTER: &str = "set -e; cd \"$FOLDER\"
            for file in passwd group; do mount --bind $file /etc/$file; done
            for file in subuid subgid; do
                [ -e /etc/$file ] || continue
                [ $RANGE = Has ] && mount --bind $file /etc/$file || mount --bind none /etc/$file
            done
            cd home
            exec setpriv --reuid 23456 --regid 23456 --clear-groups \"$FOLDER/denizen\" \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", ENTER, "sh"]).args(args).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", self.path("home"));
        command.env("FOLDER", self.folder.path()).env("DENIZEN_CACHE", cache(range));
        command.env("RANGE", if range == Has { "Has" } else { "Lacks" });
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, range: Range, args: &[&str]) -> Output {
        self.denizen(range, args).output().unwrap()
    }

    fn done(&self, range: Range, args: &[&str]) -> String {
        let output = self.run(range, args);
        assert!(output.status.success(), "{args:?}: {output:?}\n{}", self.log());
        text(&output.stdout)
    }

    fn sh(&self, range: Range, session: &str, line: &str) -> String {
        self.done(range, &["exec", session, "--", "sh", "-c", line])
    }

    fn state(&self) -> PathBuf {
        self.path("home/.local/state/denizen")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.state().join("daemon.log")).unwrap_or_default()
    }

    fn shutdown(&self) {
        self.run(Has, &["shutdown"]);
        let line = format!("{}/denizen serve", self.folder.path().display());
        until("the daemon leaves", || running(&line).is_empty());
    }

    /// Who owns what is below a session's volume, by name.
    fn outside(&self, name: &str) -> (u32, u32) {
        let homes = fs::read_dir(self.state().join("pool")).unwrap().flatten();
        let mut found = homes.map(|home| home.path().join("volume").join(name));
        let meta = found.find_map(|path| fs::symlink_metadata(path).ok()).unwrap();
        (meta.uid(), meta.gid())
    }
}

/// Shared by all tests that have the same users.
fn cache(range: Range) -> PathBuf {
    let name = if range == Has { "cache-of-range" } else { "cache-of-one" };
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder).unwrap();
    chown(&folder, Some(USER), Some(USER)).unwrap();
    folder
}

impl Drop for Ordinary {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// A package with a program, and a folder that it gives to another user.
fn package(folder: &Path) -> PathBuf {
    let tree = folder.join("package");
    let script = |path: &str, content: &str| {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    script("usr/bin/denizen-test", "#!/bin/sh\necho installed\n");
    script("var/lib/denizen-test/state", "");
    script("DEBIAN/postinst", "#!/bin/sh\nset -e\nchown -R daemon:bin /var/lib/denizen-test\n");
    let control = "Package: denizen-test\nVersion: 1\nArchitecture: all\nMaintainer: nobody\n\
                   Description: a test\n";
    fs::write(tree.join("DEBIAN/control"), control).unwrap();
    let file = folder.join("denizen-test.deb");
    // A file of another user's in the package itself, too.
    chown(tree.join("var/lib/denizen-test/state"), Some(2), Some(2)).unwrap();
    let build = Command::new("dpkg-deb").arg("--build").arg(tree).arg(&file).output().unwrap();
    assert!(build.status.success(), "{build:?}");
    file
}

const WHOSE: &str = "stat -c '%u:%g %a %n' /var/lib/denizen-test/state mine theirs setuid";

#[test]
fn sandboxes_have_users_of_their_own() {
    let Some(user) = Ordinary::new() else { return };
    assert_eq!(user.sh(Has, "a", "id -u; cut -f2- /proc/self/uid_map | wc -w"), "0\n3\n");
    assert!(user.log().contains("have a range of user ids"), "{}", user.log());
    let others = "for id in 1 33 1000 65534; do setpriv --reuid $id --regid $id --clear-groups \
                  sh -c 'id -u; touch /tmp/of-$(id -u)'; done; stat -c %u /tmp/of-*";
    assert_eq!(user.sh(Has, "a", others), "1\n33\n1000\n65534\n1\n1000\n33\n65534\n");
    // The machine's files that are copied are root's.
    let copied = "stat -c %u:%g /etc /etc/passwd /usr/share";
    assert_eq!(user.sh(Has, "a", copied), "0:0\n".repeat(3));
    // They are kept apart.
    let other = "echo secret > /tmp/secret; chmod 600 /tmp/secret; \
                 setpriv --reuid 1 --regid 1 --clear-groups cat /tmp/secret 2> /dev/null; echo $?";
    assert_eq!(user.sh(Has, "a", other), "1\n");
    let make = "touch mine theirs setuid; chown 1:2 theirs; chown 33:33 setuid; chmod 4755 setuid";
    user.sh(Has, "a", make);
    assert_eq!(user.outside("mine"), (USERS, GROUPS));
    assert_eq!(user.outside("theirs"), (USERS + 1, GROUPS + 2));

    let package = package(user.folder.path());
    fs::set_permissions(&package, fs::Permissions::from_mode(0o644)).unwrap();
    user.done(Has, &["cp", package.to_str().unwrap(), "a:it.deb"]);
    let install = "apt-get install -y ./it.deb > log 2>&1 || cat log; denizen-test";
    assert_eq!(user.sh(Has, "a", install), "installed\n");
    let whose = "1:2 755 /var/lib/denizen-test/state\n0:0 644 mine\n1:2 644 theirs\n\
                 33:33 4755 setuid\n";
    assert_eq!(user.sh(Has, "a", WHOSE), whose);

    // Through a backup, and after a restart of the daemon.
    user.done(Has, &["stop", "a"]);
    user.done(Has, &["backup", "a"]);
    let fork = user.done(Has, &["--json", "fork", "a"]);
    let fork: Value = serde_json::from_str(&fork).unwrap();
    user.sh(Has, "a", "rm -r /var/lib/denizen-test mine theirs setuid");
    user.shutdown();
    let all: Value = serde_json::from_str(&user.done(Has, &["--json", "backups", "a"])).unwrap();
    let first = all.as_array().unwrap().last().unwrap()["name"].as_str().unwrap().to_owned();
    user.done(Has, &["restore", "a", "--backup", &first]);
    for session in ["a", fork["id"].as_str().unwrap()] {
        assert_eq!(user.sh(Has, session, WHOSE), whose);
        assert_eq!(user.sh(Has, session, "denizen-test"), "installed\n");
    }
    let out = user.path("home/out");
    user.done(Has, &["cp", "a:theirs", out.to_str().unwrap()]);
    assert_eq!(fs::metadata(&out).unwrap().uid(), USER);
    assert!(!user.log().contains("with a loss"), "{}", user.log());

    // Other ids are not taken for those that the files belong to.
    user.shutdown();
    fs::write(user.path("subuid"), format!("ordinary:{}:65536\n", USERS + 65536)).unwrap();
    let refused = user.run(Has, &["exec", "a", "--", "true"]);
    assert_eq!(refused.status.code(), Some(125), "{refused:?}");
    let said = text(&refused.stderr);
    assert!(said.contains(&format!("ids from {USERS} and {GROUPS} on")), "{said}");
    fs::write(user.path("subuid"), format!("ordinary:{USERS}:65536\n")).unwrap();

    // Nothing stays, though much of it was not the user's.
    user.sh(Has, "a", "mkdir -m 0 shut; chown 1:1 shut");
    user.done(Has, &["rm", "--force", "a", fork["id"].as_str().unwrap()]);
    user.shutdown();
    let left = |folder: &str| -> Vec<_> {
        let entries = fs::read_dir(user.state().join(folder)).unwrap().flatten();
        entries.map(|entry| entry.file_name()).collect()
    };
    assert_eq!(left("pool"), [".denizen"]);
    assert!(left("pool/.denizen/trash").is_empty() && left("pool/.denizen/staging").is_empty());
    let marked = running(&format!("{} ", user.path("denizen").display()));
    assert!(marked.is_empty(), "{marked:?}");
}

#[test]
fn what_one_user_made_is_taken_over_and_not_given_back() {
    let Some(user) = Ordinary::new() else { return };
    let package = package(user.folder.path());
    fs::set_permissions(&package, fs::Permissions::from_mode(0o644)).unwrap();
    user.done(Lacks, &["cp", package.to_str().unwrap(), "a:it.deb"]);
    let install = "apt-get install -y ./it.deb > log 2>&1 || cat log; denizen-test; \
                   mkdir -m 700 -p deep/er; echo kept > deep/er/file; chmod 600 deep/er/file; \
                   ln -s /nowhere link; ln deep/er/file again; \
                   rm /usr/share/common-licenses/GPL-3; chown 1:1 deep";
    assert_eq!(user.sh(Lacks, "a", install), "installed\n");
    assert_eq!(user.outside("deep"), (USER, USER), "only pretended");
    assert!(user.log().contains("/etc/subuid gives no"), "{}", user.log());
    user.done(Lacks, &["backup", "a"]);
    // What this user cannot look into either.
    user.sh(Lacks, "a", "mkdir -m 700 shut; touch shut/file; chmod 0 shut");
    user.shutdown();

    let look = "stat -c '%u:%g %a %h' deep deep/er/file; cat again; readlink link; \
                ls /usr/share/common-licenses/GPL-3 2> /dev/null; denizen-test; \
                stat -c %u:%g / /usr /usr/bin/denizen-test";
    let seen = "0:0 700 2\n0:0 600 2\nkept\n/nowhere\ninstalled\n0:0\n0:0\n0:0\n";
    let seen = seen.replacen("700 2", "755 3", 1);
    assert_eq!(user.sh(Has, "a", look), seen);
    assert_eq!(user.outside("deep"), (USERS, GROUPS));
    assert_eq!(user.sh(Has, "a", "stat -c '%u:%g %a' shut shut/file"), "0:0 0\n0:0 644\n");
    user.sh(Has, "a", "chown 1:1 deep; touch /usr/bin/another; apt-get remove -y denizen-test");
    // Its backup from before, too.
    user.done(Has, &["stop", "a"]);
    let all: Value = serde_json::from_str(&user.done(Has, &["--json", "backups", "a"])).unwrap();
    let first = all.as_array().unwrap().last().unwrap()["name"].as_str().unwrap().to_owned();
    user.done(Has, &["restore", "a", "--backup", &first]);
    assert_eq!(user.sh(Has, "a", look), seen);
    assert!(!user.log().contains("with a loss"), "{}", user.log());
    user.sh(Has, "a", "chown 1:1 deep");
    user.done(Has, &["backup", "a"]);
    user.shutdown();

    // Without the range, its files are nobody's that the daemon could be: said, and left alone.
    let refused = user.run(Lacks, &["exec", "a", "--", "true"]);
    assert_eq!(refused.status.code(), Some(125), "{refused:?}");
    let said = text(&refused.stderr);
    assert!(said.contains("range of user ids that this process does not have"), "{said}");
    assert_eq!(user.sh(Lacks, "b", "echo works"), "works\n");
    assert_eq!(user.outside("deep"), (USERS + 1, GROUPS + 1));
    // But a backup can be restored.
    user.done(Lacks, &["restore", "a"]);
    assert_eq!(user.sh(Lacks, "a", look), seen);
    user.shutdown();
    assert_eq!(user.sh(Has, "a", look), seen);
}

#[test]
fn images_go_with_their_sessions() {
    let Some(user) = Ordinary::new() else { return };
    let image = saved_image(user.folder.path());
    let image = ["image", "import", image.to_str().unwrap()];
    user.done(Lacks, &image);
    let with = ["--image", "demo/busybox:1", "exec", "a", "--", "sh", "-c"];
    user.shutdown();
    let run = |range, line| user.done(range, &[&with[..], &[line]].concat());
    assert_eq!(run(Lacks, "echo kept > /kept; cat /kept"), "kept\n");
    user.shutdown();
    // Root within owns what is below its changes, too.
    let line =
        "cat /kept; rm /bin/test && echo gone; echo new > /bin/new; ls -ln /bin | cut -c 11-30";
    let seen = run(Has, line);
    assert!(seen.starts_with("kept\ngone\n"), "{seen}");
    assert!(seen.contains(" 0 ") && !seen.contains("65534"), "{seen}");
    user.shutdown();
    // The way back is another store: what is in this one belongs to nobody there.
    let refused = user.run(Lacks, &["--image", "demo/busybox:1", "exec", "b", "--", "true"]);
    assert_eq!(refused.status.code(), Some(125), "{refused:?}");
    assert!(text(&refused.stderr).contains("pull or import it"), "{refused:?}");
    user.done(Lacks, &image);
    user.shutdown();
    assert_eq!(
        user.done(Lacks, &["--image", "demo/busybox:1", "exec", "b", "--", "echo", "it"]),
        "it\n"
    );
    user.shutdown();
    assert_eq!(run(Has, "cat /bin/new"), "new\n");
}

#[test]
fn the_doctor_tells_how_to_have_a_range() {
    let Some(user) = Ordinary::new() else { return };
    let finding = |mut command: Command| {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let all: Value = serde_json::from_slice(&output.stdout).unwrap();
        let all = all.as_array().unwrap();
        all.iter().find(|finding| finding["check"] == "user ids").unwrap().clone()
    };
    let doctor = ["--json", "doctor"];
    let found = finding(user.denizen(Has, &doctor));
    assert_eq!(found["grade"], "fine", "{found}");
    assert!(found["what"].as_str().unwrap().contains("65536, from 500000 on"), "{found}");
    let found = finding(user.denizen(Lacks, &doctor));
    assert_eq!(found["grade"], "note", "{found}");
    assert!(found["mend"].as_str().unwrap().contains("usermod --add-subuids"), "{found}");
    assert!(found["mend"].as_str().unwrap().contains(" ordinary "), "{found}");
    // Too small to be one.
    fs::write(user.path("none"), "ordinary:1000000:999\n").unwrap();
    assert_eq!(finding(user.denizen(Lacks, &doctor))["grade"], "note");
    // A program that gives nothing. It is found before the machine's, if that has it.
    let bin = user.path("bin");
    fs::create_dir(&bin).unwrap();
    fs::write(bin.join("newuidmap"), "#!/bin/sh\necho never >&2; exit 1\n").unwrap();
    fs::set_permissions(bin.join("newuidmap"), fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let mut broken = user.denizen(Has, &doctor);
    broken.env("PATH", path);
    let found = finding(broken);
    assert_eq!(found["grade"], "note", "{found}");
    assert!(found["what"].as_str().unwrap().contains("never"), "{found}");
    let found = finding(user.denizen(Has, &["--json", "--image", "/", "doctor"]));
    assert!(found["what"].as_str().unwrap().contains("`image` is a folder"), "{found}");
}

/// Root of a container whose ids are these from 700000 on, as one line of its maps has them.
fn in_container(folder: &Path, map: &str, args: &[&str]) -> Output {
    const ENTER: &str = "read -r go; exec setpriv --reuid 0 --regid 0 --clear-groups \"$0\" \"$@\"";
    let mut command = Command::new("unshare");
    command
        .args(["--user", "--keep-caps", "sh", "-c", ENTER, env!("CARGO_BIN_EXE_denizen")])
        .args(args);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap());
    command.env("DENIZEN_STATE", folder.join("state")).env("DENIZEN_CACHE", folder.join("cache"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let process = format!("/proc/{}", child.id());
    let ours = fs::read_link("/proc/self/ns/user").unwrap();
    until("it is in a namespace", || fs::read_link(format!("{process}/ns/user")).unwrap() != ours);
    for file in ["uid_map", "gid_map"] {
        fs::write(format!("{process}/{file}"), map).unwrap();
    }
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn root_of_a_container_gives_a_part_of_its_ids() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: the container needs root");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache-of-container");
    fs::create_dir_all(&cache).unwrap();
    std::os::unix::fs::symlink(&cache, folder.path().join("cache")).unwrap();
    fs::create_dir(folder.path().join("state")).unwrap();
    for path in [cache, folder.path().join("state")] {
        chown(path, Some(700_000), Some(700_000)).unwrap();
    }
    let run = |args: &[&str]| in_container(folder.path(), "0 700000 65536", args);
    let line = "id -u; touch mine theirs; chown 1:2 theirs; chown 30000 mine 2> /dev/null; echo $?
                setpriv --reuid 33 --regid 33 --clear-groups id -u; cat /proc/self/uid_map";
    let output = run(&["exec", "a", "--", "sh", "-c", line]);
    let said = text(&output.stdout);
    let words: Vec<&str> = said.split_whitespace().collect();
    assert_eq!(words, ["0", "1", "33", "0", "32768", "24576"], "{output:?}");
    let pool = fs::read_dir(folder.path().join("state/pool")).unwrap().flatten();
    let theirs = pool.filter_map(|home| fs::metadata(home.path().join("volume/theirs")).ok());
    let theirs: Vec<_> = theirs.map(|meta| (meta.uid(), meta.gid())).collect();
    assert_eq!(theirs, [(700_000 + 0x8000 + 1, 700_000 + 0x8000 + 2)]);
    // Backups have the numbers that all have.
    assert!(run(&["stop", "a"]).status.success());
    assert!(run(&["backup", "a"]).status.success());
    let archive = folder.path().join("state/a.tar.zst");
    assert!(run(&["export", "a", "-o", archive.to_str().unwrap()]).status.success());
    let list = Command::new("tar").args(["--zstd", "-tvf"]).arg(archive).output();
    let list = text(&list.unwrap().stdout);
    assert!(list.contains("1879048193/1879048194"), "{list}");
    assert!(run(&["restore", "a"]).status.success());
    let output = run(&["exec", "a", "--", "stat", "-c", "%u:%g", "mine", "theirs"]);
    assert_eq!(text(&output.stdout), "0:0\n1:2\n", "{output:?}");
    let output = run(&["doctor"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(run(&["shutdown"]).status.success());
    let line = format!("{} serve", env!("CARGO_BIN_EXE_denizen"));
    let socket = folder.path().join("state/denizen.sock");
    until("the daemon leaves", || !socket.exists() || running(&line).is_empty());
    // Too few.
    let output = in_container(folder.path(), "0 700000 33000", &["doctor"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stdout).contains("no range of"), "{output:?}");
}
