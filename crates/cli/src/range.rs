//! A range of user ids for the sandboxes of an ordinary user.
//!
//! `/etc/subuid` and `/etc/subgid` give a user ids beside its own (`subuid(5)`), and
//! `newuidmap(1)`, which is root's, puts them into a user namespace. The program moves into one
//! where it is root with such a range, before it has a second thread: from there on it gives ids
//! to sandboxes as root does, and they have users of their own. Whatever is missing for that,
//! it stays who it is, sandboxes have one user, and the reason is told; nothing here may fail
//! halfway. So a helper process makes the namespace, and only when its maps are written does
//! this one join it.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use denizen::Isolation;
use rustix::process::{getegid, geteuid, getgid, getuid};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::config::Settings;
use crate::{Failure, Result};

/// Where the range begins within: where root's sandboxes have theirs.
const BASE: u32 = 0x7000_0000;
/// Less would not do for a system's own users.
const LEAST: u32 = 1000;
/// More than this no sandbox needs.
const MOST: u32 = 0x1_0000;
/// What the helper says when it has made the namespace.
const MADE: &str = "made";

/// What this process has.
pub enum Range {
    /// It is root, or runs commands as the user it is.
    NotNeeded,
    /// So many ids of the host, from the first on, and the user's own, which is 0 here.
    Has { first: u32, count: u32 },
    /// The user's own id and no other.
    Lacks(Lack),
}

/// Why there is no range.
pub enum Lack {
    NotInstalled,
    NoEntry { user: String, file: &'static str },
    FolderAsRoot,
    OthersFolder { path: PathBuf },
    Failed(String),
}

impl Lack {
    /// What is missing.
    pub fn what(&self) -> String {
        match self {
            Self::NotInstalled => "newuidmap and newgidmap are not installed".to_owned(),
            Self::NoEntry { user, file } => {
                format!("{file} gives no {LEAST} ids or more to {user}")
            }
            Self::FolderAsRoot => {
                "`image` is a folder, whose files belong to this user and no range".to_owned()
            }
            Self::OthersFolder { path } => format!("{} belongs to another user", path.display()),
            Self::Failed(how) => how.clone(),
        }
    }

    /// What mends it.
    pub fn mend(&self) -> String {
        match self {
            Self::NotInstalled => {
                "apt-get install uidmap (shadow-utils elsewhere), then denizen shutdown".to_owned()
            }
            Self::NoEntry { user, .. } => format!(
                "as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user} \
                 (ids that nobody has yet), then denizen shutdown"
            ),
            Self::FolderAsRoot => "import the folder as an image (`denizen image`)".to_owned(),
            Self::OthersFolder { .. } => "set `volume_root` to a folder of this user".to_owned(),
            Self::Failed(_) => {
                "see newuidmap(1); a service must not have NoNewPrivileges= set".to_owned()
            }
        }
    }
}

/// Moves this process, which must have one thread, into a namespace with a range, if it needs
/// one and can.
pub fn enter(settings: &Settings) -> Range {
    if settings.isolation == Isolation::Host || geteuid().is_root() {
        return Range::NotNeeded;
    }
    match try_enter(settings) {
        Ok((first, count)) => Range::Has { first, count },
        Err(lack) => Range::Lacks(lack),
    }
}

fn try_enter(settings: &Settings) -> std::result::Result<(u32, u32), Lack> {
    let failed =
        |what: &str, error: &dyn std::fmt::Display| Lack::Failed(format!("{what}: {error}"));
    if settings.image.as_deref().is_some_and(|image| Path::new(image).is_absolute()) {
        return Err(Lack::FolderAsRoot);
    }
    if (getuid(), getgid()) != (geteuid(), getegid()) {
        return Err(Lack::Failed("this program is setuid, which newuidmap refuses".to_owned()));
    }
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    // From within the namespace nobody could tell root's folder from a stranger's.
    let root = &settings.pool.volume_root;
    if fs::metadata(root).is_ok_and(|meta| meta.uid() != user) {
        return Err(Lack::OthersFolder { path: root.clone() });
    }
    let name = name_of(user);
    let entry = |file| {
        let text = fs::read_to_string(file).unwrap_or_default();
        largest(&text, user, name.as_deref()).ok_or_else(|| Lack::NoEntry {
            user: name.clone().unwrap_or_else(|| user.to_string()),
            file,
        })
    };
    let (users, groups) = (entry("/etc/subuid")?, entry("/etc/subgid")?);
    let count = users.1.min(groups.1).min(MOST);

    let mut helper = Command::new("/proc/self/exe")
        .arg("namespace")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| failed("cannot run this program", &error))?;
    let pid = helper.id();
    let mut said = String::new();
    if let Some(stdout) = helper.stdout.take() {
        // Ends with the helper, if it cannot do it.
        let _ = BufReader::new(stdout).read_line(&mut said);
    }
    let join = || {
        if said.trim() != MADE {
            return Err(Lack::Failed("no user namespace can be made".to_owned()));
        }
        map("newuidmap", pid, user, users.0, count)?;
        map("newgidmap", pid, group, groups.0, count)?;
        let joined = File::open(format!("/proc/{pid}/ns/user")).and_then(|namespace| {
            Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::User))?)
        });
        joined.map_err(|error| failed("cannot join the user namespace", &error))
    };
    let joined = join();
    // Its end, if it has not come to one.
    drop(helper.stdin.take());
    let _ = helper.wait();
    joined.map(|()| (users.0, count))
}

/// Has one of the two programs write a map: this user as root, and the range.
fn map(program: &str, pid: u32, own: u32, first: u32, count: u32) -> std::result::Result<(), Lack> {
    let mut command = Command::new(program);
    command.args([pid, 0, own, 1, BASE, first, count].map(|number| number.to_string()));
    match command.stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.lines().next().unwrap_or_default();
            Err(Lack::Failed(format!("{program}: {}: {said}", output.status)))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Lack::NotInstalled),
        Err(error) => Err(Lack::Failed(format!("{program}: {error}"))),
    }
}

/// The helper: makes a user namespace, says so on standard output, and is there until standard
/// input ends.
pub fn helper() -> Result<()> {
    // What is unsafe about it concerns threads that share descriptors: there is one thread.
    #[expect(deprecated, reason = "the other one is unsafe, for kinds that are not used here")]
    let made = rustix::thread::unshare(UnshareFlags::NEWUSER);
    made.map_err(|error| Failure::new(format!("no user namespace can be made: {error}")))?;
    let failed = |error: io::Error| Failure::new(error.to_string());
    writeln!(io::stdout(), "{MADE}").map_err(failed)?;
    io::stdin().read_to_end(&mut Vec::new()).map(drop).map_err(failed)
}

/// The largest range that a file as subuid(5) has it gives to a user: its first id, and how
/// many there are.
fn largest(text: &str, user: u32, name: Option<&str>) -> Option<(u32, u32)> {
    let ranges = text.lines().filter_map(|line| {
        let mut parts = line.trim().splitn(3, ':');
        let whose = parts.next()?;
        let is_ours = Some(whose) == name || whose.parse() == Ok(user);
        let (first, count) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        is_ours.then_some((first, count))
    });
    ranges.filter(|(_, count)| *count >= LEAST).max_by_key(|(_, count)| *count)
}

/// The name of a user: from passwd(5), or what the environment says where it is kept elsewhere.
/// newuidmap finds out for itself; a wrong one only leads to its refusal.
fn name_of(user: u32) -> Option<String> {
    let text = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let found = text.lines().find_map(|line| {
        let mut parts = line.split(':');
        let (name, number) = (parts.next()?, parts.nth(1)?);
        (number.parse() == Ok(user)).then(|| name.to_owned())
    });
    found.or_else(|| std::env::var("USER").ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_range_of_the_user_is_taken() {
        let text = "other:1:90000\nme:100000:2000\n1000:300000:65536\nme:400000:65536\nme:5:999\n";
        let largest = |user, name| largest(text, user, name);
        assert_eq!(largest(1000, Some("me")).map(|it| it.1), Some(65536));
        assert_eq!(largest(1001, Some("me")), Some((400_000, 65536)));
        assert_eq!(largest(1000, None), Some((300_000, 65536)));
        assert_eq!(largest(1001, Some("nobody")), None);
        assert_eq!(super::largest("me:100000:999\nme:x:5000\nme\n\n", 7, Some("me")), None);
    }
}
