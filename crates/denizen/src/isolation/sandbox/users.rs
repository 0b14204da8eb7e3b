//! Which users of the host a sandbox's users are (`user_namespaces(7)`).
//!
//! A pool run by root gives all its sandboxes one range of ids that no user of the host has,
//! so that even root within is nobody outside. Root of a user namespace is such a root as far
//! as the namespace has ids to give: the `denizen` program of an ordinary user makes itself one
//! with the user's range from `/etc/subuid`, a container has what it was given. A pool of any
//! other user has that user's id only: it is root within, and there is nobody else. Software
//! that wants other users, above all package managers, is told there that it became them (see
//! `calls`).
//!
//! A session's files go with their owners: what was made with one id is given to the range
//! when the session starts there. The way back does not exist, and is refused.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use denizen_archive::Owners as Kept;
use denizen_image::Owners;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Stat, Uid, chownat, openat, statat};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// The first id of the range: one that systemd's list of uid ranges leaves to nobody. The
/// program puts a user's range there, too, so that all sandboxes' files have the same numbers.
const BASE: u32 = 0x7000_0000;
/// How many ids a sandbox has: what file systems and packages expect.
const COUNT: u32 = 0x1_0000;
/// Where that is not to be had, in a container with the usual 65536 ids: above the users that
/// the container makes, below those that systemd-homed, DynamicUser= and nobody have
/// (from 60001 on).
const IN_CONTAINER: (u32, u32) = (0x8000, 0x6000);
/// Less than the ids of a system's own users is no range.
const LEAST: u32 = 1000;
/// Who has what belongs to nobody within.
const NOBODY: u32 = 65534;

/// The users of a pool's sandboxes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Users {
    /// Root within is this user, and there is no other.
    Alone { user: u32, group: u32 },
    /// So many, from this id on.
    Range { base: u32, count: u32 },
}

impl Users {
    /// What this process may give.
    pub(super) fn of_this_process() -> Result<Self> {
        let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
        if !user.is_root() {
            return Ok(Self::Alone { user: user.as_raw(), group: group.as_raw() });
        }
        let [users, groups] = ["uid_map", "gid_map"]
            .map(|map| fs::read_to_string(format!("/proc/self/{map}")).unwrap_or_default());
        range_in(&users, &groups).ok_or_else(|| Error::Isolation {
            isolation: "sandbox",
            problem: format!(
                "this root has no range of {LEAST} user ids or more to give away, neither from \
                 {BASE} nor from {} on, being in a container itself: give the container 65536 \
                 ids, or run denizen as an ordinary user there",
                IN_CONTAINER.0
            ),
        })
    }

    /// Lines for `uid_map` and `gid_map`.
    pub(super) fn maps(self) -> [String; 2] {
        match self {
            Self::Alone { user, group } => [format!("0 {user} 1"), format!("0 {group} 1")],
            Self::Range { base, count } => [(), ()].map(|()| format!("0 {base} {count}")),
        }
    }

    /// Whom an image's files are to be given to.
    pub(super) fn owners(self) -> Owners {
        match self {
            Self::Alone { .. } => Owners::Mine,
            Self::Range { base, count } => {
                Owners::Shifted { uid_base: base, gid_base: base, count }
            }
        }
    }

    /// How backups number them: all pools alike, so that each can restore what another has
    /// written.
    pub(super) fn kept(self) -> Kept {
        match self {
            Self::Alone { user, group } => {
                Kept { users: user, groups: group, count: 1, kept: BASE }
            }
            Self::Range { base, count } => Kept { users: base, groups: base, count, kept: BASE },
        }
    }

    pub(super) fn is_alone(self) -> bool {
        matches!(self, Self::Alone { .. })
    }

    /// A word for files that are made for these users and no others.
    pub(super) fn name(self) -> String {
        match self {
            Self::Alone { .. } => "alone".to_owned(),
            Self::Range { base: BASE, count: COUNT } => "range".to_owned(),
            Self::Range { base, count } => format!("range-{base:x}-{count:x}"),
        }
    }

    /// Which ids a user was given to be the range here, as the namespace around has them; none
    /// where they are the range by themselves, or a container's.
    pub(super) fn given(self) -> Option<String> {
        let Self::Range { base: BASE, .. } = self else { return None };
        let [users, groups] = ["uid_map", "gid_map"].map(|map| {
            let text = fs::read_to_string(format!("/proc/self/{map}")).unwrap_or_default();
            around(&text, BASE)
        });
        (users? != BASE).then_some(format!("{}-{}", users?, groups?))
    }

    /// Whether an id outside is one of theirs.
    fn has(self, id: u32) -> bool {
        match self {
            Self::Alone { user, .. } => id == user,
            Self::Range { base, count } => id >= base && id - base < count,
        }
    }

    /// The host's owner of what belongs to `user` and `group` within.
    fn outside(self, id: (u32, u32)) -> (u32, u32) {
        match self {
            Self::Alone { user, group } => (user, group),
            Self::Range { base, count } => {
                let nobody = NOBODY.min(count - 1);
                let shift = |id: u32| base + if id < count { id } else { nobody };
                (shift(id.0), shift(id.1))
            }
        }
    }

    /// Gives a file, itself and no target, to a user and group within.
    pub(super) fn give(self, path: &Path, id: (u32, u32)) -> io::Result<()> {
        self.give_at(CWD, path, id)
    }

    fn give_at(
        self,
        folder: impl AsFd,
        name: impl rustix::path::Arg + Copy,
        id: (u32, u32),
    ) -> io::Result<()> {
        // An unprivileged process owns what it makes.
        let Self::Range { .. } = self else { return Ok(()) };
        let (user, group) = self.outside(id);
        let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let give = || chownat(&folder, name, Some(user), Some(group), flags);
        match give() {
            // Root of a user namespace has no say over a file with a group from outside of it,
            // as in a folder that hands its group down; but over the group of its own files.
            Err(Errno::PERM) => {
                chownat(&folder, name, None, Some(rustix::process::getegid()), flags)?;
                Ok(give()?)
            }
            given => Ok(given?),
        }
    }

    /// Gives a tree that was made outside to the same users within, unless that was done
    /// before. Nothing may run in it. Keeps to descriptors, one at a time: the tree may be
    /// deeper than a path is long.
    pub(super) fn take_over(self, root: &Path) -> io::Result<()> {
        if !self.must_take_over(root)? {
            return Ok(());
        }
        let stat = statat(CWD, root, AtFlags::SYMLINK_NOFOLLOW)?;
        let mut folder = open_folder(CWD, root)?;
        // What is left to do in each folder on the way down to this one.
        let mut left = vec![names_in(&folder)?];
        while let Some(names) = left.last_mut() {
            let Some(name) = names.pop() else {
                left.pop();
                if !left.is_empty() {
                    folder = open_folder(&folder, Path::new(".."))?;
                }
                continue;
            };
            let name = Path::new(&name);
            let stat = statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if !self.has(stat.st_uid) {
                self.give_at(&folder, name, (stat.st_uid, stat.st_gid))?;
                restore_mode(&folder, name, &stat)?;
            }
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                folder = open_folder(&folder, name)?;
                left.push(names_in(&folder)?);
            }
        }
        // The root last: it says that all is done.
        self.give(root, (stat.st_uid, stat.st_gid))
    }

    /// Whether a tree, if it is there, is yet to be taken over.
    pub(super) fn must_take_over(self, root: &Path) -> io::Result<bool> {
        match statat(CWD, root, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(!self.is_alone() && !self.has(stat.st_uid)),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Whether some of these, if they are there, belong to nobody that these users can be: to
    /// a range that this process does not have.
    pub(super) fn are_strange(self, paths: &[PathBuf]) -> bool {
        let is_strange = |path: &PathBuf| {
            let stat = statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW);
            stat.is_ok_and(|stat| !self.has(stat.st_uid))
        };
        self.is_alone() && paths.iter().any(is_strange)
    }
}

/// chown(2) takes set-user-ID bits away.
fn restore_mode(folder: &OwnedFd, name: &Path, stat: &Stat) -> io::Result<()> {
    let mode = Mode::from_raw_mode(stat.st_mode);
    let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    if is_file && mode.intersects(Mode::SUID | Mode::SGID) {
        rustix::fs::chmodat(folder, name, mode, AtFlags::empty())?;
    }
    Ok(())
}

fn open_folder(at: impl AsFd, name: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(at, name, flags, Mode::empty())?)
}

fn names_in(folder: &OwnedFd) -> io::Result<Vec<OsString>> {
    crate::volume::names_in(folder)
}

/// The range that a root with these maps gives, if there is one.
fn range_in(users: &str, groups: &str) -> Option<Users> {
    [(BASE, COUNT), IN_CONTAINER].into_iter().find_map(|(base, most)| {
        let count = ids_from(users, base).min(ids_from(groups, base)).min(most);
        (count >= LEAST).then_some(Users::Range { base, count })
    })
}

/// Which id of the namespace around is the first one of an extent of a map.
fn around(map: &str, first: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_whitespace().map(|number| number.parse().ok());
        (numbers.next()?? == first).then(|| numbers.next()?)?
    })
}

/// How many ids in a row a map (`uid_map` in user_namespaces(7)) has from one on.
fn ids_from(map: &str, base: u32) -> u32 {
    let extents = map.lines().filter_map(|line| {
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u64>().ok());
        Some((numbers.next()??, numbers.nth(1)??))
    });
    let base = u64::from(base);
    let there = extents
        .filter(|(first, count)| *first <= base && base < first + count)
        .map(|(first, count)| first + count - base);
    there.max().map_or(0, |count| u32::try_from(count).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_gives_what_it_has() {
        let range = |map: &str| range_in(map, map);
        let whole = Users::Range { base: BASE, count: COUNT };
        assert_eq!(range("         0          0 4294967295\n"), Some(whole));
        // As the program maps a user's range, of the usual size and a smaller one.
        assert_eq!(range("0 1000 1\n1879048192 100000 65536\n"), Some(whole));
        let small = Users::Range { base: BASE, count: 2000 };
        assert_eq!(range("0 1000 1\n1879048192 100000 2000\n"), Some(small));
        // Containers: LXC and Docker, podman without root.
        let part = Users::Range { base: 0x8000, count: 0x6000 };
        assert_eq!(range("0 100000 65536\n"), Some(part));
        assert_eq!(range("0 1000 1\n1 100000 65536\n"), Some(part));
        // Too little.
        for map in
            ["0 1000 1\n", "0 1000 1\n1 100000 1000\n", "", "x", "0 1000 1\n1879048192 1 999"]
        {
            assert_eq!(range(map), None, "{map}");
        }
        assert_eq!(range_in("0 0 4294967295", "0 0 1"), None);
    }

    #[test]
    fn what_was_given_is_read_from_the_map() {
        assert_eq!(around("0 1000 1\n1879048192 100000 65536\n", BASE), Some(100_000));
        assert_eq!(around("0 0 4294967295\n", BASE), None);
        assert_eq!(around("1879048192\nx y\n", BASE), None);
    }

    #[test]
    fn nobody_has_what_a_range_does_not() {
        let whole = Users::Range { base: BASE, count: COUNT };
        assert_eq!(whole.outside((5, 70_000)), (BASE + 5, BASE + 65534));
        let part = Users::Range { base: 0x8000, count: 0x6000 };
        assert_eq!(part.outside((0, 65534)), (0x8000, 0xdfff));
    }
}
