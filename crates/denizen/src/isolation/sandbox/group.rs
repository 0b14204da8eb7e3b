//! Control groups of sandboxes (`cgroups(7)`): what a session may use of memory, processes and
//! processors. One folder for each session in each hierarchy, of version 1 or 2, wherever
//! this process is granted one; where it is not, limits of single processes have to do, and
//! `denizen doctor` says so.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::fs::Access;
use rustix::io::Errno;
use uuid::Uuid;

use super::{Limits, freezer};
use crate::usage::Usage;

/// The file in a session's folder that says where its groups are.
const RECORD: &str = "groups";
/// How long processes that were killed may take to leave their group.
const DYING: Duration = Duration::from_secs(5);

const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];

/// Where the groups of this process's sandboxes can be made.
#[derive(Debug, Default)]
pub(super) struct Groups {
    /// Each controller with the folder that the sessions' folders go into.
    places: Vec<Place>,
    /// The folder for groups that can be frozen, if any is granted; perhaps one of the above.
    freezer: Option<PathBuf>,
    /// The groups of each instance made here, by its session's folder: that may vanish, and the
    /// record in it.
    known: Mutex<HashMap<PathBuf, Vec<PathBuf>>>,
}

#[derive(Clone, Debug)]
struct Place {
    controllers: Vec<&'static str>,
    folder: PathBuf,
    unified: bool,
}

impl Groups {
    /// Looks for hierarchies that this process may make groups in.
    pub(super) fn find() -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let mut places: Vec<Place> = Vec::new();
        for line in mounts.lines() {
            let Some((place, kind, options)) = mount(line) else { continue };
            let (unified, controllers) = match kind {
                "cgroup" => {
                    let named = CONTROLLERS.into_iter();
                    let named =
                        named.filter(|name| options.split(',').any(|option| option == *name));
                    (false, named.collect::<Vec<_>>())
                }
                "cgroup2" => {
                    let all = fs::read_to_string(place.join("cgroup.controllers"));
                    let all = all.unwrap_or_default();
                    let known = CONTROLLERS.into_iter();
                    let known = known.filter(|name| all.split_whitespace().any(|has| has == *name));
                    (true, known.collect())
                }
                _ => continue,
            };
            if controllers.is_empty() {
                continue;
            }
            let wanted = if unified { "" } else { controllers[0] };
            let Some(own) = own_group(&own, wanted) else { continue };
            let own = place.join(own.trim_start_matches('/'));
            let folder =
                if unified { claim_unified(&place, &own, &controllers) } else { claim(&own) };
            if let Some(folder) = folder {
                places.push(Place { controllers, folder, unified });
            }
        }
        let unified = places.iter().filter(|place| place.unified).map(|place| &place.folder);
        let freezer = freezer::find(unified);
        Self { places, freezer, ..Self::default() }
    }

    /// Whether sessions can be made to stand still.
    pub(super) fn have_freezer(&self) -> bool {
        self.freezer.is_some()
    }

    /// Has all of a session stand still.
    pub(super) fn freeze(&self, home: &Path) -> io::Result<()> {
        let group = self.freezer_of(home).ok_or(io::ErrorKind::Unsupported)?;
        freezer::freeze(&group)
    }

    /// Has all of a session go on; gives whether it stood still.
    pub(super) fn thaw(&self, home: &Path) -> io::Result<bool> {
        self.freezer_of(home).map_or(Ok(false), |group| freezer::thaw(&group))
    }

    fn freezer_of(&self, home: &Path) -> Option<PathBuf> {
        let freezer = self.freezer.as_deref()?;
        self.of(home).into_iter().find(|group| group.parent() == Some(freezer))
    }

    /// The controllers that hold.
    pub(super) fn controllers(&self) -> Vec<&'static str> {
        self.places.iter().flat_map(|place| place.controllers.clone()).collect()
    }

    /// Makes a session's groups; gives what the plan of its first process names them by.
    /// Where they are is written down in `home`, the session's folder, first: a later denizen
    /// may be in a group itself that is granted others.
    pub(super) fn make(&self, id: Uuid, home: &Path, limits: &Limits) -> io::Result<Vec<PathBuf>> {
        self.remove(id, home);
        let folders: Vec<PathBuf> = self.folders(id).collect();
        let lines: Vec<_> = folders.iter().map(|path| path.display().to_string()).collect();
        fs::write(home.join(RECORD), lines.join("\n"))?;
        self.known.lock().insert(home.to_owned(), folders);
        for place in &self.places {
            let folder = place.folder.join(id.to_string());
            match fs::create_dir(&folder) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            for controller in &place.controllers {
                for (file, value) in settings(controller, place.unified, limits) {
                    set(&folder.join(file), &value)?;
                }
            }
        }
        if let Some(freezer) = self.own_freezer() {
            let folder = freezer.join(id.to_string());
            match fs::create_dir(&folder) {
                // What could not be removed must not stop what comes now.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    freezer::thaw(&folder)?;
                }
                made => made?,
            }
        }
        Ok(self.joined(home))
    }

    /// The groups of an instance.
    fn of(&self, home: &Path) -> Vec<PathBuf> {
        let known = self.known.lock().get(home).cloned();
        known.unwrap_or_else(|| recorded(home).collect())
    }

    /// An instance's session now has another folder.
    pub(super) fn moved(&self, from: &Path, to: &Path) {
        let mut known = self.known.lock();
        if let Some(groups) = known.remove(from) {
            known.insert(to.to_owned(), groups);
        }
    }

    /// What a plan names the groups of a session by that has some.
    pub(super) fn joined(&self, home: &Path) -> Vec<PathBuf> {
        let places = self.places.iter().map(|place| &place.folder).chain(self.own_freezer());
        let places: Vec<_> = places.collect();
        let ours = |group: &PathBuf| places.iter().any(|place| group.parent() == Some(place));
        let named = self.of(home).into_iter().filter(ours).map(|group| {
            // Only version 1 has this.
            let tasks = group.join("tasks");
            if tasks.exists() { tasks } else { group }
        });
        named.collect()
    }

    fn folders(&self, id: Uuid) -> impl Iterator<Item = PathBuf> {
        let freezer = self.own_freezer().into_iter();
        let all = self.places.iter().map(|place| &place.folder).chain(freezer);
        all.map(move |folder| folder.join(id.to_string()))
    }

    /// The freezer's folder, where it is none of the others.
    fn own_freezer(&self) -> Option<&PathBuf> {
        let freezer = self.freezer.as_ref()?;
        self.places.iter().all(|place| place.folder != *freezer).then_some(freezer)
    }

    /// Removes a session's groups, in which nothing may run any more. Blocks for as long as
    /// dying takes.
    pub(super) fn remove(&self, id: Uuid, home: &Path) {
        let known = self.known.lock().remove(home).unwrap_or_default().into_iter();
        let folders: BTreeSet<PathBuf> =
            known.chain(recorded(home)).chain(self.folders(id)).collect();
        for folder in folders {
            // Frozen, a killed process may stay (version 1), and so would one that only has to
            // see that its owner is gone.
            let _ = freezer::thaw(&folder);
            let begin = Instant::now();
            loop {
                match rustix::fs::rmdir(&folder) {
                    Ok(()) | Err(Errno::NOENT) => break,
                    // Its processes have been killed, which nobody tells us the end of.
                    Err(Errno::BUSY) if begin.elapsed() < DYING => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Err(error) => {
                        let path = folder.display();
                        tracing::warn!(%path, %error, "control group stays behind");
                        break;
                    }
                }
            }
        }
    }

    /// How often the kernel has ended a process of the session for want of memory.
    pub(super) fn out_of_memory(&self, home: &Path) -> u64 {
        let memory = self.places.iter().find(|place| place.controllers.contains(&"memory"));
        let Some(place) = memory else { return 0 };
        let file = if place.unified { "memory.events" } else { "memory.oom_control" };
        let mut groups = self.of(home).into_iter();
        let group = groups.find(|group| group.parent() == Some(&place.folder));
        let text = group.and_then(|group| fs::read_to_string(group.join(file)).ok());
        let text = text.unwrap_or_default();
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
    }

    /// What the groups of a session count of it.
    pub(super) fn usage(&self, home: &Path) -> Usage {
        let groups = self.of(home);
        let in_any = |file: &str, read: fn(&str) -> Option<u64>| {
            groups.iter().find_map(|group| read(&fs::read_to_string(group.join(file)).ok()?))
        };
        let number = |text: &str| text.trim().parse().ok();
        let of_cpu = |text: &str| {
            text.lines().find_map(|line| line.strip_prefix("usage_usec "))?.trim().parse().ok()
        };
        // What version 1 and 2 call it; the first counts processor time in nanoseconds.
        let old = in_any("cpuacct.usage", number).map(Duration::from_nanos);
        Usage {
            memory_bytes: in_any("memory.usage_in_bytes", number)
                .or_else(|| in_any("memory.current", number)),
            cpu_time: old.or_else(|| in_any("cpu.stat", of_cpu).map(Duration::from_micros)),
            processes: in_any("cgroup.procs", |text| {
                // Without the first one within, and the one outside that waits for it.
                u64::try_from(text.lines().count()).ok()?.checked_sub(2)
            }),
        }
    }
}

/// The groups that a session's record names: of its own name, or of the one that its instance
/// had when it was made. Only what could be ours: a group has no files that could be deleted by
/// mistake.
fn recorded(home: &Path) -> impl Iterator<Item = PathBuf> {
    let record = fs::read_to_string(home.join(RECORD)).unwrap_or_default();
    let all: Vec<_> = record.lines().map(PathBuf::from).collect();
    all.into_iter().filter(|path| {
        let name = path.file_name().and_then(|name| name.to_str());
        let of_ours = path.parent().is_some_and(|folder| folder.ends_with("denizen"));
        of_ours && name.is_some_and(|name| Uuid::try_parse(name).is_ok())
    })
}

/// Has all that an earlier process has frozen of a session go on, so that it can be ended.
pub(super) fn thaw_recorded(home: &Path) {
    for folder in recorded(home) {
        if let Err(error) = freezer::thaw(&folder) {
            tracing::warn!(path = %folder.display(), %error, "control group stays frozen");
        }
    }
}

/// Mount point, type and options of a line of `proc_pid_mountinfo(5)`.
pub(super) fn mount(line: &str) -> Option<(PathBuf, &str, &str)> {
    let (head, tail) = line.split_once(" - ")?;
    let mut tail = tail.split(' ');
    let (kind, options) = (tail.next()?, tail.nth(1)?);
    Some((PathBuf::from(head.split(' ').nth(4)?), kind, options))
}

/// The path of this process's own group in a hierarchy, by `proc_pid_cgroup(5)`.
pub(super) fn own_group<'t>(text: &'t str, controller: &str) -> Option<&'t str> {
    text.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (names, path) = (parts.next()?, parts.next()?);
        names.split(',').any(|name| name == controller).then_some(path)
    })
}

/// Makes denizen's folder below a group, if that is allowed.
pub(super) fn claim(above: &Path) -> Option<PathBuf> {
    let folder = above.join("denizen");
    if fs::create_dir(&folder).is_err() {
        // Perhaps another user's denizen has made it.
        rustix::fs::access(&folder, Access::WRITE_OK).ok()?;
    }
    Some(folder)
}

/// Makes denizen's folder in version 2, where a group has members or children: below this
/// process's own group, from which it moves down if it is alone there, or else below the
/// nearest one above that was delegated along with it (`cgroup-v2.rst` of the kernel).
fn claim_unified(mount: &Path, own: &Path, controllers: &[&str]) -> Option<PathBuf> {
    claim_and_enable(own, controllers)
        .or_else(|| {
            let below = own.join("denizen-daemon");
            let _ = fs::create_dir(&below);
            let me = std::process::id().to_string();
            fs::write(below.join("cgroup.procs"), &me).ok()?;
            let claimed = claim_and_enable(own, controllers);
            if claimed.is_none() {
                // As it was; if that fails too, it is no worse off below.
                let _ = fs::write(own.join("cgroup.procs"), me);
                let _ = fs::remove_dir(below);
            }
            claimed
        })
        .or_else(|| {
            let above = own.ancestors().skip(1).take_while(|above| above.starts_with(mount));
            above.take(8).find_map(|above| claim_and_enable(above, controllers))
        })
}

/// Makes denizen's folder below a group, and has the controllers count there.
fn claim_and_enable(above: &Path, controllers: &[&str]) -> Option<PathBuf> {
    let enable = |group: &Path| {
        let file = group.join("cgroup.subtree_control");
        let enabled = fs::read_to_string(&file).unwrap_or_default();
        let missing =
            controllers.iter().filter(|name| !enabled.split_whitespace().any(|has| has == **name));
        let missing: Vec<_> = missing.map(|name| format!("+{name}")).collect();
        missing.is_empty() || fs::write(file, missing.join(" ")).is_ok()
    };
    if !enable(above) {
        return None;
    }
    claim(above).filter(|folder| enable(folder))
}

/// Writes a setting. Those of swap are not there where the kernel does not count it.
fn set(file: &Path, value: &str) -> io::Result<()> {
    let is_swap = file.file_name().is_some_and(|name| SWAP.iter().any(|swap| name == *swap));
    if is_swap && !file.exists() {
        return Ok(());
    }
    fs::write(file, value)
}

/// Files that limit swap, too.
const SWAP: [&str; 2] = ["memory.memsw.limit_in_bytes", "memory.swap.max"];

/// What is written where, in order: `cgroup-v1/*.rst` and `cgroup-v2.rst` of the kernel.
fn settings(controller: &str, unified: bool, limits: &Limits) -> Vec<(&'static str, String)> {
    const PERIOD: u64 = 100_000;
    let memory = limits.memory_bytes.map(|bytes| bytes.to_string());
    let cpu = limits.cpu_percent.map(|percent| PERIOD / 100 * u64::from(percent));
    match (controller, unified) {
        ("memory", true) => memory
            .into_iter()
            .flat_map(|bytes| [("memory.max", bytes), ("memory.swap.max", "0".to_owned())])
            .collect(),
        // The second counts memory and swap together, and must never be the smaller one: a
        // group that was left behind may have less.
        ("memory", false) => memory
            .into_iter()
            .flat_map(|bytes| {
                [
                    ("memory.memsw.limit_in_bytes", "-1".to_owned()),
                    ("memory.limit_in_bytes", bytes.clone()),
                    ("memory.memsw.limit_in_bytes", bytes),
                ]
            })
            .collect(),
        ("pids", _) => {
            limits.processes.into_iter().map(|most| ("pids.max", most.to_string())).collect()
        }
        ("cpu", true) => {
            cpu.into_iter().map(|quota| ("cpu.max", format!("{quota} {PERIOD}"))).collect()
        }
        ("cpu", false) => {
            cpu.into_iter().map(|quota| ("cpu.cfs_quota_us", quota.to_string())).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_the_kernel_are_read() {
        let line =
            "29 23 0:26 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory";
        let (place, kind, options) = mount(line).unwrap_or_default();
        assert_eq!((place.as_path(), kind), (Path::new("/sys/fs/cgroup/memory"), "cgroup"));
        assert_eq!(options, "rw,memory");
        let own = "4:memory:/a/b\n2:cpu,cpuacct:/c\n0::/d\n";
        assert_eq!(own_group(own, "memory"), Some("/a/b"));
        assert_eq!(own_group(own, "cpu"), Some("/c"));
        assert_eq!(own_group(own, ""), Some("/d"));
        assert_eq!(own_group(own, "pids"), None);
    }

    #[test]
    fn both_versions_get_the_same_limits() {
        let limits = Limits {
            memory_bytes: Some(1 << 20),
            processes: Some(7),
            cpu_percent: Some(150),
            ..Limits::none()
        };
        assert_eq!(settings("cpu", true, &limits), [("cpu.max", "150000 100000".to_owned())]);
        assert_eq!(settings("cpu", false, &limits), [("cpu.cfs_quota_us", "150000".to_owned())]);
        assert_eq!(settings("pids", true, &limits), settings("pids", false, &limits));
        assert_eq!(settings("memory", true, &limits)[0], ("memory.max", "1048576".to_owned()));
        let old = settings("memory", false, &limits);
        let old: Vec<_> = old.iter().map(|(file, value)| (*file, value.as_str())).collect();
        let both = "memory.memsw.limit_in_bytes";
        assert_eq!(old, [(both, "-1"), ("memory.limit_in_bytes", "1048576"), (both, "1048576")]);
        assert!(settings("memory", false, &Limits::none()).is_empty());
    }
}
