//! Numbers of owners that mean the same in every archive, whatever they are on a disk.

/// How many numbers archives set apart: as many as a sandbox has users.
const KEPT: u32 = 0x1_0000;

/// Users and groups that have other numbers in archives than on this disk: those of a session
/// that has users of its own. Who these are on a disk depends on who runs the session; an
/// archive has them from [`kept`](Self::kept) on. All others are what they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owners {
    /// The first user on this disk.
    pub users: u32,
    /// The first group on this disk.
    pub groups: u32,
    /// How many there are of each, at least one. What an archive has beyond becomes the last.
    pub count: u32,
    /// The first number in an archive; 65536 of them are set apart.
    pub kept: u32,
}

impl Owners {
    pub(crate) fn keep_user(self, id: u32) -> u32 {
        self.keep(id, self.users)
    }

    pub(crate) fn keep_group(self, id: u32) -> u32 {
        self.keep(id, self.groups)
    }

    /// The owner on this disk of what an archive gives to these, and whether it is the same one.
    pub(crate) fn find(self, user: u64, group: u64) -> (u64, u64, bool) {
        let (user, user_fits) = self.back(user, self.users);
        let (group, group_fits) = self.back(group, self.groups);
        (user, group, user_fits && group_fits)
    }

    fn keep(self, id: u32, first: u32) -> u32 {
        match id.checked_sub(first) {
            Some(number) if number < self.count.min(KEPT) => self.kept.saturating_add(number),
            _ => id,
        }
    }

    fn back(self, id: u64, first: u32) -> (u64, bool) {
        match id.checked_sub(self.kept.into()) {
            Some(number) if number < KEPT.into() => {
                let last = u64::from(self.count.saturating_sub(1));
                (u64::from(first) + number.min(last), number <= last)
            }
            _ => (id, true),
        }
    }
}
