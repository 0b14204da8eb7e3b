//! Has the processes of a control group stand still and go on: by `cgroup.freeze` where groups
//! are of version 2, by `freezer.state` where they are of version 1 (`cgroup-v2.rst` and
//! `cgroup-v1/freezer-subsystem.rst` of the kernel). Version 2 is taken where there are both: what
//! it has frozen can be killed, which version 1 puts off until it is thawed.
//!
//! It must never leave a group half frozen without saying so.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::Access;

use super::group::{claim, mount, own_group};

/// How long processes may take to come to rest: one that waits for a disk or another machine
/// cannot be frozen until it has its answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest pause between two looks.
const PAUSE: Duration = Duration::from_millis(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Version {
    /// That of a group which can be frozen.
    fn of(group: &Path) -> Option<Self> {
        let all = [(Self::Two, "cgroup.freeze"), (Self::One, "freezer.state")];
        all.into_iter().find(|(_, file)| group.join(file).exists()).map(|(version, _)| version)
    }

    fn order(self, group: &Path, frozen: bool) -> io::Result<()> {
        match (self, frozen) {
            (Self::One, true) => fs::write(group.join("freezer.state"), "FROZEN"),
            (Self::One, false) => fs::write(group.join("freezer.state"), "THAWED"),
            (Self::Two, true) => fs::write(group.join("cgroup.freeze"), "1"),
            (Self::Two, false) => fs::write(group.join("cgroup.freeze"), "0"),
        }
    }

    /// Whether all of a group stands still, or none of it does; neither while it is on its way.
    fn state(self, group: &Path) -> io::Result<Option<bool>> {
        let (file, prefix, still, moving) = match self {
            Self::One => ("freezer.state", "", "FROZEN", "THAWED"),
            Self::Two => ("cgroup.events", "frozen ", "1", "0"),
        };
        let text = fs::read_to_string(group.join(file))?;
        let word = text.lines().find_map(|line| line.strip_prefix(prefix)).unwrap_or_default();
        Ok(if word == still {
            Some(true)
        } else if word == moving {
            Some(false)
        } else {
            None
        })
    }

    fn wait(self, group: &Path, frozen: bool, patience: Duration) -> io::Result<()> {
        let begin = Instant::now();
        let mut pause = Duration::from_micros(50);
        while self.state(group)? != Some(frozen) {
            if begin.elapsed() > patience {
                let what = if frozen {
                    "its processes do not come to rest"
                } else {
                    "its processes stay frozen: is a control group above theirs?"
                };
                return Err(io::Error::new(io::ErrorKind::TimedOut, what));
            }
            // Version 1 has nothing to wait for, and may have missed what was just starting.
            std::thread::sleep(pause);
            self.order(group, frozen)?;
            pause = PAUSE.min(pause * 2);
        }
        Ok(())
    }
}

/// Finds a folder that groups can be made in which can be frozen. `folders` are those of
/// version 2 that groups are made in anyway.
pub(super) fn find<'p>(mut folders: impl Iterator<Item = &'p PathBuf>) -> Option<PathBuf> {
    if let Some(folder) = folders.find(|folder| Version::of(folder) == Some(Version::Two)) {
        return Some(folder.clone());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let find = |wanted: &str, controller: &str| {
        mounts.lines().filter_map(mount).find_map(|(place, kind, options)| {
            let named = options.split(',').any(|option| option == controller);
            if kind != wanted || (!named && !controller.is_empty()) {
                return None;
            }
            let above = place.join(own_group(&own, controller)?.trim_start_matches('/'));
            // Version 2: whoever moves a process needs this of all that both groups are in.
            rustix::fs::access(above.join("cgroup.procs"), Access::WRITE_OK).ok()?;
            // Nothing has to be handed down for this.
            let folder = claim(&above)?;
            Version::of(&folder).is_some().then_some(folder)
        })
    };
    find("cgroup2", "").or_else(|| find("cgroup", "freezer"))
}

/// Has all of a group stand still. Where that fails, it is as before, or the error says that it
/// is not. Blocks for as long as that takes.
pub(super) fn freeze(group: &Path) -> io::Result<()> {
    let version = Version::of(group).ok_or(io::ErrorKind::NotFound)?;
    version.order(group, true)?;
    version.wait(group, true, PATIENCE)
}

/// Has all of a group go on; gives whether it had to. A group that is gone, or of a kind that
/// cannot be frozen, is not frozen. Blocks for a moment.
pub(super) fn thaw(group: &Path) -> io::Result<bool> {
    thaw_within(group, PATIENCE)
}

fn thaw_within(group: &Path, patience: Duration) -> io::Result<bool> {
    let Some(version) = Version::of(group) else { return Ok(false) };
    let was = version.state(group)? != Some(false);
    version.order(group, false)?;
    version.wait(group, false, patience)?;
    Ok(was)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::process::{Child, Command};

    use super::*;

    /// A group of the test's own, with a process in it that counts.
    struct Group {
        folder: PathBuf,
        child: Child,
    }

    impl Group {
        fn below(above: &Path, name: &str) -> Self {
            let folder = above.join(format!("{name}-{}", std::process::id()));
            fs::create_dir(&folder).unwrap();
            let child = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
            fs::write(folder.join("cgroup.procs"), child.id().to_string()).unwrap();
            Self { folder, child }
        }

        /// Processor time it has used, in ticks.
        fn used(&self) -> u64 {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
            let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split(' ').collect();
            fields[12].parse().unwrap()
        }

        fn runs(&self) {
            let (begin, before) = (Instant::now(), self.used());
            while self.used() < before + 3 {
                assert!(begin.elapsed() < Duration::from_secs(20), "it does not run");
            }
        }
    }

    impl Drop for Group {
        fn drop(&mut self) {
            self.child.kill().unwrap();
            thaw(&self.folder).unwrap();
            self.child.wait().unwrap();
            fs::remove_dir(&self.folder).unwrap();
        }
    }

    /// Of each version that this machine has and grants.
    fn places() -> Vec<(Version, PathBuf)> {
        let all = [("/sys/fs/cgroup/freezer", Version::One)];
        let two = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(|place| (place, Version::Two));
        let all =
            all.into_iter().chain(two).map(|(place, version)| (version, PathBuf::from(place)));
        let all = all.filter(|(version, place)| {
            let probe = place.join(format!("denizen-probe-{version:?}-{}", std::process::id()));
            let made = fs::create_dir(&probe);
            let found = Version::of(&probe);
            let _ = fs::remove_dir(&probe);
            made.is_ok() && found == Some(*version)
        });
        all.collect()
    }

    #[test]
    fn groups_of_both_versions_stand_still_and_go_on() {
        for (version, place) in places() {
            let group = Group::below(&place, "denizen-still");
            group.runs();
            assert!(!thaw(&group.folder).unwrap(), "{version:?}");
            freeze(&group.folder).unwrap();
            assert_eq!(version.state(&group.folder).unwrap(), Some(true));
            let before = group.used();
            // Meanwhile, others run.
            let count = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done";
            assert!(Command::new("sh").args(["-c", count]).status().unwrap().success());
            assert_eq!(group.used(), before, "{version:?}");
            assert!(thaw(&group.folder).unwrap());
            group.runs();
        }
    }

    #[test]
    fn what_cannot_go_on_is_told() {
        for (version, place) in places() {
            let above = place.join(format!("denizen-above-{}", std::process::id()));
            fs::create_dir(&above).unwrap();
            {
                let group = Group::below(&above, "denizen-below");
                freeze(&above).unwrap();
                let error = thaw_within(&group.folder, PAUSE).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{version:?}");
                thaw(&above).unwrap();
                group.runs();
            }
            fs::remove_dir(&above).unwrap();
            // Gone, it is not frozen; nor can it be.
            assert!(!thaw(&above).unwrap());
            assert!(freeze(&above).is_err());
        }
    }
}
