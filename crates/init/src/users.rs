//! Finds a user by name, as this root's own `/etc/passwd` and `/etc/group` have it. What is
//! there may have been written by anybody: it is never waited for, and only so much of it is
//! read.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use crate::sys;

/// More than such a file has.
const MOST: u64 = 4 * 1024 * 1024;

/// Whom a command is run as.
pub struct User {
    pub name: Vec<u8>,
    pub uid: u32,
    pub gid: u32,
    /// Their own group and all that name them.
    pub groups: Vec<u32>,
    pub home: Vec<u8>,
    pub shell: Vec<u8>,
}

/// The user of that name, or `ENOENT`.
pub fn find(name: &[u8]) -> Result<User, i32> {
    let users = table("/etc/passwd")?;
    let found = users.split(|byte| *byte == b'\n').find_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let own = fields.next().filter(|own| *own == name && !own.is_empty())?;
        let (uid, gid) = (number(fields.nth(1)?)?, number(fields.next()?)?);
        let (home, shell) = (fields.nth(1)?, fields.next().unwrap_or_default());
        let groups = vec![gid];
        Some(User { name: own.into(), uid, gid, groups, home: home.into(), shell: shell.into() })
    });
    let mut user = found.ok_or(sys::ENOENT)?;
    // Without groups, there is only their own.
    for line in table("/etc/group").unwrap_or_default().split(|byte| *byte == b'\n') {
        let mut fields = line.split(|byte| *byte == b':');
        let Some(group) = fields.nth(2).and_then(number) else { continue };
        let members = fields.next().unwrap_or_default();
        let is_member = members.split(|byte| *byte == b',').any(|member| member == user.name);
        if is_member && !user.groups.contains(&group) {
            user.groups.push(group);
        }
    }
    Ok(user)
}

/// Whether a user is in a group, by the names that both have here, or is root.
pub fn is_member(uid: u32, group: &[u8]) -> bool {
    if uid == 0 {
        return true;
    }
    let (Ok(users), Ok(groups)) = (table("/etc/passwd"), table("/etc/group")) else { return false };
    let named = users.split(|byte| *byte == b'\n').find_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        (number(fields.nth(1)?)? == uid).then_some((name, number(fields.next()?)?))
    });
    let Some((name, own)) = named else { return false };
    groups.split(|byte| *byte == b'\n').any(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let is_it = fields.next() == Some(group);
        let id = fields.nth(1).and_then(number);
        let members = fields.next().unwrap_or_default();
        is_it && (id == Some(own) || members.split(|byte| *byte == b',').any(|it| it == name))
    })
}

impl User {
    /// The folder that a path means to them: from their home if it does not say where.
    pub fn folder(&self, path: &[u8]) -> Vec<u8> {
        let below = match path {
            [b'/', ..] => return path.to_vec(),
            [b'~'] => b"",
            [b'~', b'/', below @ ..] | below => below,
        };
        let home = if self.home.is_empty() { b"/" } else { self.home.as_slice() };
        if below.is_empty() { home.to_vec() } else { [home, b"/", below].concat() }
    }

    /// What their environment has unless it says otherwise.
    pub fn environment(&self) -> Vec<Vec<u8>> {
        let shell: &[u8] = if self.shell.is_empty() { b"/bin/sh" } else { &self.shell };
        let all: [(&[u8], &[u8]); 4] = [
            (b"HOME=", &self.home),
            (b"USER=", &self.name),
            (b"LOGNAME=", &self.name),
            (b"SHELL=", shell),
        ];
        all.map(|(name, value)| [name, value].concat()).into()
    }
}

fn table(path: &str) -> Result<Vec<u8>, i32> {
    let failed = |error: std::io::Error| error.raw_os_error().unwrap_or(sys::EINVAL);
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .custom_flags(sys::NO_WAITING | sys::NO_TERMINAL)
        .open(path)
        .map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(sys::ENOENT);
    }
    let mut text = Vec::new();
    file.take(MOST).read_to_end(&mut text).map_err(failed)?;
    Ok(text)
}

fn number(field: &[u8]) -> Option<u32> {
    // The last is nobody: to the kernel it means no change.
    std::str::from_utf8(field).ok()?.parse().ok().filter(|number| *number != u32::MAX)
}
