//! Which users of the host a sandbox's users are (`user_namespaces(7)`).
//!
//! A pool run by root gives all its sandboxes one range of ids that no user of the host has,
//! so that even root within is nobody outside. A pool of any other user has that user's id
//! only: it is root within, and there is nobody else. Software that wants other users, above
//! all package managers, is told there that it became them (see `calls`).

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use denizen_image::Owners;
use rustix::fs::{AtFlags, CWD, Gid, Uid, chownat};

use crate::error::{Error, Result};

/// The first id of the range: one that systemd's list of uid ranges leaves to nobody.
const BASE: u32 = 0x7000_0000;
/// How many ids a sandbox has: what file systems and packages expect.
const COUNT: u32 = 0x1_0000;

/// The users of a pool's sandboxes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Users {
    /// Root within is this user, and there is no other.
    Alone { user: u32, group: u32 },
    /// As many as there are, from this id of the host on.
    Range { base: u32 },
}

impl Users {
    /// What this process may give.
    pub(super) fn of_this_process() -> Result<Self> {
        let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
        if !user.is_root() {
            return Ok(Self::Alone { user: user.as_raw(), group: group.as_raw() });
        }
        if has_range("/proc/self/uid_map") && has_range("/proc/self/gid_map") {
            return Ok(Self::Range { base: BASE });
        }
        Err(Error::Isolation {
            isolation: "sandbox",
            problem: format!(
                "this root has no user ids {BASE} to {} to give away, being in a container \
                 itself: run denizen as an ordinary user there",
                BASE + COUNT - 1
            ),
        })
    }

    /// Lines for `uid_map` and `gid_map`.
    pub(super) fn maps(self) -> [String; 2] {
        match self {
            Self::Alone { user, group } => [format!("0 {user} 1"), format!("0 {group} 1")],
            Self::Range { base } => [(), ()].map(|()| format!("0 {base} {COUNT}")),
        }
    }

    /// Whom an image's files are to be given to.
    pub(super) fn owners(self) -> Owners {
        match self {
            Self::Alone { .. } => Owners::Mine,
            Self::Range { base } => {
                Owners::Shifted { uid_base: base, gid_base: base, count: COUNT }
            }
        }
    }

    pub(super) fn is_alone(self) -> bool {
        matches!(self, Self::Alone { .. })
    }

    /// The host's owner of what belongs to `user` and `group` within.
    fn outside(self, id: (u32, u32)) -> (u32, u32) {
        match self {
            Self::Alone { user, group } => (user, group),
            Self::Range { base } => {
                let shift = |id: u32| base + if id < COUNT { id } else { COUNT - 2 };
                (shift(id.0), shift(id.1))
            }
        }
    }

    /// Gives a file, itself and no target, to a user and group within.
    pub(super) fn give(self, path: &Path, id: (u32, u32)) -> std::io::Result<()> {
        // An unprivileged process owns what it makes.
        let Self::Range { .. } = self else { return Ok(()) };
        let (user, group) = self.outside(id);
        let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
        Ok(chownat(CWD, path, Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Gives a tree that was made outside to the same users within, unless that was done
    /// before. Nothing may run in it.
    pub(super) fn take_over(self, root: &Path) -> std::io::Result<()> {
        let Self::Range { base } = self else { return Ok(()) };
        if fs::symlink_metadata(root)?.uid() >= base {
            return Ok(());
        }
        let mut folders = vec![root.to_owned()];
        // The root last: it says that all is done.
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder)? {
                let entry = entry?;
                let meta = entry.metadata()?;
                if meta.is_dir() {
                    folders.push(entry.path());
                }
                if meta.uid() < base {
                    let mode = meta.mode();
                    self.give(&entry.path(), (meta.uid(), meta.gid()))?;
                    // chown(2) takes set-user-ID bits away.
                    if mode & 0o6000 != 0 && meta.is_file() {
                        let mode = fs::Permissions::from_mode(mode & 0o7777);
                        fs::set_permissions(entry.path(), mode)?;
                    }
                }
            }
        }
        let meta = fs::symlink_metadata(root)?;
        self.give(root, (meta.uid(), meta.gid()))
    }
}

/// Whether the map of this process has all of the range.
fn has_range(map: &str) -> bool {
    let map = fs::read_to_string(map).unwrap_or_default();
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u64>().ok());
        let (Some(Some(first)), _, Some(Some(count))) =
            (numbers.next(), numbers.next(), numbers.next())
        else {
            return false;
        };
        first <= u64::from(BASE) && first + count >= u64::from(BASE) + u64::from(COUNT)
    })
}
