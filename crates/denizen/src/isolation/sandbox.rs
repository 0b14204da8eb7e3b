//! `sandbox`: a root file system, processes, a network and limits of its own for each session,
//! by what the kernel offers to any user: namespaces, overlayfs, seccomp, Landlock, control
//! groups. No setuid helper, no daemon of another project.
//!
//! A session's folder has beside its volume: `root/` (what it changed in its root, one folder
//! for each overlay), `work/` (overlayfs's own) and `tmp/` (new at every start). This module
//! makes the plan; `denizen-init` follows it and is the sandbox's first process, so that all
//! of the sandbox ends with it. It must never put anything of the host into a sandbox that is
//! not named here.

mod calls;
pub(super) mod carried;
mod freezer;
mod group;
mod host_root;
mod network;
mod plan;
pub(crate) mod root;
mod users;

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use denizen_agent::{Agent, Door, Enter, Launch, Linger};
use denizen_image::{Owners, Store};
use denizen_network::EgressRules;
use parking_lot::Mutex;
use rustix::process::Resource;
use uuid::Uuid;

use self::carried::Carried;
use self::group::Groups;
use self::host_root::HostRoot;
use self::network::Networks;
use self::plan::{Attributes, Overlay, Plan};
use self::root::{Base, Below, Roots};
use self::users::Users;
use super::{Driver, Instance, Limits, Options, Site, VOLUME};
use crate::error::{Error, Result};
use crate::lifecycle::Sleep;
use crate::share::Mount;
use crate::usage::Usage;

/// Has what an earlier process left frozen of a session go on, so that it can be ended.
pub(super) fn let_go(site: &Site) {
    group::thaw_recorded(&site.home);
}

/// A word for whose files those are that are made for sandboxes by this process.
pub(super) fn users_name() -> Result<String> {
    Users::of_this_process().map(Users::name)
}

/// Where the volume is within, and commands start.
const WORKDIR: &str = "/volume";

/// The same for all: a sandbox may be there before it is known whose it is.
const HOST_NAME: &str = "denizen";

/// Which capabilities root has over what is the sandbox's own (`capabilities(7)`): those of a
/// package manager. CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID,
/// NET_BIND_SERVICE, SYS_CHROOT, SETFCAP.
const CAPABILITIES: u64 =
    1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 10 | 1 << 18 | 1 << 31;

/// Devices that give or take bytes and nothing else.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// What the kernel tells in /proc and /sys of itself and of others.
const HIDDEN: [&str; 16] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/diskstats",
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/keys",
    "/proc/kmsg",
    "/proc/latency_stats",
    "/proc/mdstat",
    "/proc/partitions",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
    "/sys/kernel",
];
/// Settings of the kernel.
const PROTECTED: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What a sandbox has beside its session's files.
#[derive(Clone, Debug, Default)]
pub(super) struct Fittings {
    /// Files and folders of the host, and where they are within; not to be written.
    pub(super) files: Vec<(PathBuf, &'static str)>,
    /// Devices of the host, and where they are within.
    pub(super) devices: Vec<(PathBuf, &'static str)>,
    /// A root that is shown at [`TREE`] as a tree of files.
    pub(super) tree: Option<Below>,
    /// Whether it has the pool's network.
    pub(super) network: bool,
    pub(super) limits: Limits,
}

/// Where a tree of files is shown within.
pub(super) const TREE: &str = "/run/tree";

pub(super) struct Sandbox {
    users: Users,
    groups: Groups,
    roots: Roots,
    limits: Limits,
    networks: Networks,
    /// The shared folders that sessions have.
    mounts: Mutex<HashMap<Uuid, Vec<(PathBuf, Mount)>>>,
    carried: Option<Carried>,
    linger: Duration,
    /// The filter of calls, the same for all, and the key that is for their first processes.
    calls: String,
    key: [u64; 2],
}

impl Sandbox {
    /// Prepares what all sandboxes of a pool share, in the pool's own folder.
    pub(super) fn new(own: &Path, options: Options) -> Result<Self> {
        check_place()?;
        let users = Users::of_this_process()?;
        check_range(users, own)?;
        // Instances stand elsewhere.
        let cache = options.cache.unwrap_or_else(|| own.join("cache"));
        let cache = std::path::absolute(&cache).map_err(|source| Error::root(&cache, source))?;
        let host = HostRoot::prepare(&cache.join("roots"), users)?;
        let (folder, images) = images_for(users, own)?;
        let roots = Roots { host, images, folder, default: options.image };
        // Now rather than when somebody needs it.
        roots.default_base()?;
        let carried = options.agent_program.map(|program| {
            let carried = Carried::this_program(&program, own);
            carried.map_err(|source| Error::volume("keep this program in", own, source))
        });
        let carried = carried.transpose()?;
        let networks = Networks::new(options.network, options.notices);
        let (groups, limits) = (Groups::find(), options.limits);
        if options.sleep == Sleep::Freeze && !groups.have_freezer() {
            return Err(Error::NoFreezer {
                isolation: "sandbox",
                problem: "no control group that can be frozen is granted to this process: run it \
                          in a unit with `Delegate=yes` (systemd-run --user --scope -p \
                          Delegate=yes denizen serve), or set sleep to `stop`",
            });
        }
        let key = [Uuid::new_v4(), Uuid::new_v4()].map(|random| random.as_u64_pair().1);
        let calls = calls::digits(users.is_alone(), key);
        let (linger, mounts) = (options.linger, Mutex::default());
        Ok(Self { users, groups, roots, limits, networks, mounts, carried, linger, calls, key })
    }

    /// Makes the folders that a sandbox writes to, in the order of what is below them.
    fn folders(&self, site: &Site, below: &[Below]) -> std::io::Result<Vec<Folders>> {
        let tmp = site.home.join("tmp");
        crate::volume::remove_tree(&tmp)?;
        self.folder(&tmp, 0o1777)?;
        DirBuilder::new().recursive(true).mode(0o700).create(site.root_changes())?;
        self.take_over(site)?;
        let overlays = overlays(site, below);
        for overlay in &overlays {
            self.folder(&overlay.upper, 0o755)?;
            self.folder(&overlay.work, 0o755)?;
        }
        Ok(overlays)
    }

    /// Fails if the session's files belong to users that this process cannot be.
    fn check_users(&self, site: &Site) -> Result<()> {
        let places = [site.volume.clone(), site.home.join("work"), site.root_changes()];
        if !self.users.are_strange(&places) {
            return Ok(());
        }
        Err(Error::Isolation {
            isolation: "sandbox",
            problem: format!(
                "{} belongs to a range of user ids that this process does not have: `denizen \
                 doctor` tells how to have it again; or restore a backup",
                site.home.display()
            ),
        })
    }

    /// Makes the session's files those of its users, if others have made them. The folder
    /// `work` says whose they are from before the first of them changes.
    fn take_over(&self, site: &Site) -> std::io::Result<()> {
        let work = site.home.join("work");
        let changes = fs::read_dir(site.root_changes())?;
        let changes = changes.map(|entry| entry.map(|entry| entry.path()));
        let changes = changes.collect::<std::io::Result<Vec<_>>>()?;
        let mut trees = vec![site.volume.as_path()];
        trees.extend(changes.iter().filter(|path| path.is_dir()).map(PathBuf::as_path));
        if self.users.must_take_over(&work)? {
            // Overlayfs's scratch, of the users before.
            crate::volume::remove_tree(&work)?;
        }
        DirBuilder::new().recursive(true).mode(0o700).create(&work)?;
        self.users.give(&work, (0, 0))?;
        trees.into_iter().try_for_each(|tree| self.users.take_over(tree))
    }

    /// Makes a folder of the sandbox's root, unless it is there.
    fn folder(&self, path: &Path, mode: u32) -> std::io::Result<()> {
        match fs::create_dir(path) {
            // From a backup that others could change, it may be anything.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                let is_folder = fs::symlink_metadata(path)?.is_dir();
                return is_folder.then_some(()).ok_or(std::io::ErrorKind::NotADirectory.into());
            }
            made => made?,
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        self.users.give(path, (0, 0))
    }

    /// How the first process is launched.
    fn launch(
        &self,
        site: &Site,
        groups: &[PathBuf],
        overlays: &[Folders],
        below: &[Below],
        fittings: &Fittings,
    ) -> Launch {
        let plan = self.plan(site, groups, overlays, below, fittings).finish();
        let door = self.networks.door(site.id, &tokio::runtime::Handle::current());
        let door = door.filter(|_| fittings.network);
        let linger = (!self.linger.is_zero()).then(|| Linger {
            socket: site.socket(),
            time: self.linger,
            held: Some(self.roots.host.lock.clone()),
        });
        Launch { enter: Some(Arc::new(Enter { plan, door })), linger, ..site.launch() }
    }

    /// How it is launched in folders and control groups that are there.
    fn relaunch(&self, site: &Site) -> Result<Launch> {
        let below = self.roots.below(&self.roots.of(site)?)?;
        let groups = self.groups.joined(&site.home);
        Ok(self.launch(site, &groups, &overlays(site, &below), &below, &self.fittings()))
    }

    /// What a session's sandbox has.
    fn fittings(&self) -> Fittings {
        Fittings { network: true, limits: self.limits.clone(), ..Fittings::default() }
    }

    /// Makes a sandbox over a base of which nothing has to be known in its folder.
    fn begin(&self, site: &Site, base: &Base, fittings: &Fittings) -> Result<Agent> {
        let failed = |source| Error::volume("prepare", &site.home, source);
        self.check_users(site)?;
        let below = self.roots.below(base)?;
        let overlays = self.folders(site, &below).map_err(failed)?;
        if let Some(tree) = &fittings.tree {
            let Folders { upper, work } = Folders::new(site, &tree.target);
            [upper, work].iter().try_for_each(|path| self.folder(path, 0o755)).map_err(failed)?;
        }
        let groups = self.groups.make(site.id, &site.home, &fittings.limits).map_err(|source| {
            self.groups.remove(site.id, &site.home);
            Error::volume("make control groups for", &site.home, source)
        })?;
        let agent = Agent::with(self.launch(site, &groups, &overlays, &below, fittings));
        // Where it cannot be made, the session does not start.
        let launched = tokio::runtime::Handle::current().block_on(agent.launch());
        launched.inspect_err(|_| self.ended(site))?;
        Ok(agent)
    }

    /// Makes a sandbox over the host's root for a program of the host's, which works for a
    /// session on what its site calls the volume. Blocks.
    pub(super) fn for_program(&self, site: &Site, fittings: &Fittings) -> Result<Agent> {
        self.begin(site, &Base::Host, fittings)
    }

    /// The folder of what a session has changed in the one tree that its root is.
    pub(super) fn changes(site: &Site) -> PathBuf {
        Folders::new(site, Path::new("/")).upper
    }

    /// What such a sandbox was in is in another folder now, and has another name.
    pub(super) fn program_moved(&self, from: &Site, to: &Site) {
        self.groups.moved(&from.home, &to.home);
        self.networks.rename(from.id, to.id);
    }

    /// Which networks a session of this pool may reach of those that are open.
    pub(super) fn narrow(&self, id: Uuid, rules: Option<EgressRules>) {
        self.networks.narrow(id, rules);
    }

    /// What tells programs within of the way to networks.
    pub(super) fn network_env(&self) -> BTreeMap<String, String> {
        self.networks.env()
    }

    /// The roots that sessions can have.
    pub(super) fn roots(&self) -> &Roots {
        &self.roots
    }

    /// Makes a file of the host's the sandboxes' root's.
    pub(super) fn give(&self, path: &Path) -> std::io::Result<()> {
        self.users.give(path, (0, 0))
    }

    fn plan(
        &self,
        site: &Site,
        groups: &[PathBuf],
        overlays: &[Folders],
        below: &[Below],
        fittings: &Fittings,
    ) -> Plan {
        let mut plan = Plan::default();
        for group in groups {
            plan.step(["group".as_ref(), group.as_os_str()]);
        }
        let [user_map, group_map] = self.users.maps();
        if self.users.is_alone() {
            plan.step(["alone"]);
        }
        plan.step(["map", &user_map, &group_map]);
        let all = below.iter().chain(&fittings.tree);
        for below in all.filter(|below| below.hosts && !self.users.is_alone()) {
            if let Some(lowest) = below.lower.last() {
                plan.step(["shift".as_ref(), lowest.as_os_str()]);
            }
        }
        for (folders, below) in overlays.iter().zip(below) {
            // Only until it is the root: a folder that is there, and that all may enter.
            let is_root = below.target == Path::new("/");
            let target = if is_root { Path::new("/usr") } else { &below.target };
            let lower = below.lower.iter().map(PathBuf::as_path).collect();
            plan.overlay(&Overlay { target, lower, upper: &folders.upper, work: &folders.work });
        }
        for (path, mode) in [("/dev", 0o755), ("/proc", 0o555), ("/sys", 0o555), ("/run", 0o755)] {
            plan.dir(path, mode);
        }
        plan.fs("proc", "/proc", Attributes::DATA, &[]);
        // Shows the host's devices, but no more than the host shows to everybody; a kernel
        // that would show more that way refuses.
        plan.try_fs("sysfs", "/sys", Attributes::READ_ONLY);
        plan.fs("tmpfs", "/run", Attributes::FILES, &["mode=755", "size=64m"]);
        if let Some(carried) = &self.carried {
            carried.show(&mut plan);
        }
        if let Some(tree) = &fittings.tree {
            let folders = Folders::new(site, &tree.target);
            let lower = tree.lower.iter().map(PathBuf::as_path).collect();
            let target = Path::new(TREE);
            plan.dir(TREE, 0o755);
            plan.overlay(&Overlay { target, lower, upper: &folders.upper, work: &folders.work });
        }
        for (source, target) in &fittings.files {
            let folder = Path::new(target).parent().unwrap_or(Path::new("/"));
            plan.dir(&folder.to_string_lossy(), 0o755);
            if source.is_dir() {
                plan.dir(target, 0o755);
            } else {
                plan.step(["file", target]);
            }
            plan.bind(source, target, Attributes::PROGRAM);
        }
        self.devices(&mut plan, fittings);
        plan.dir("/tmp", 0o1777);
        plan.bind(&site.home.join("tmp"), "/tmp", Attributes::FILES);
        plan.dir(WORKDIR, 0o755);
        plan.bind(&site.volume, WORKDIR, Attributes::FILES);
        // Counted for the user who runs this, too: one session must not use up all of them.
        for (name, most) in [("max_inotify_instances", "64"), ("max_inotify_watches", "65536")] {
            plan.step(["set", &format!("/proc/sys/user/{name}"), most]);
        }
        // Not of mounts: the steps below still take some.
        for kind in ["user", "net", "pid", "ipc", "uts", "cgroup", "time"] {
            plan.step(["set", &format!("/proc/sys/user/max_{kind}_namespaces"), "0"]);
        }
        for path in PROTECTED {
            plan.step(["protect", path]);
        }
        for path in HIDDEN {
            plan.step(["hide", path]);
        }
        plan.step(["host", HOST_NAME]);
        plan.step(["loopback"]);
        // What an image may lack.
        plan.step(["give", "/etc/hosts", host_root::HOSTS]);
        if self.users.is_alone() {
            let (path, content) = host_root::APT_ALONE;
            plan.step(["give", path, content]);
        }
        if fittings.network {
            self.networks.plan(&mut plan);
        }
        // Nothing is written below a path after that, which could be in what others share; and no
        // link of the session's leads over something that it needs.
        for (files, mount) in self.mounts.lock().get(&site.id).into_iter().flatten() {
            for folder in mount.folders() {
                plan.dir(folder, 0o755);
                plan.step(["plain", folder]);
            }
            plan.bind(files, &mount.path, Attributes::FILES);
        }
        self.resource_limits(&mut plan, &fittings.limits);
        plan.step(["root-only"]);
        plan.step(["capabilities", &format!("{CAPABILITIES:x}")]);
        plan.step(["key", &format!("{:x}", self.key[0]), &format!("{:x}", self.key[1])]);
        plan.step(["calls", &self.calls]);
        plan
    }

    fn devices(&self, plan: &mut Plan, fittings: &Fittings) {
        plan.fs("tmpfs", "/dev", Attributes::DATA, &["mode=755", "size=64k"]);
        let usual = DEVICES.map(|name| format!("/dev/{name}"));
        let usual = usual.iter().map(|path| (Path::new(path), path.as_str()));
        let others = fittings.devices.iter().map(|(source, path)| (source.as_path(), *path));
        for (source, path) in usual.chain(others) {
            plan.step(["file", path]);
            plan.bind(source, path, Attributes::DEVICE);
        }
        plan.dir("/dev/pts", 0o755);
        let mut settings = vec!["ptmxmode=666", "mode=620"];
        if !self.users.is_alone() {
            // tty, by convention.
            settings.push("gid=5");
        }
        plan.fs("devpts", "/dev/pts", Attributes::DEVICE, &settings);
        plan.dir("/dev/shm", 0o1777);
        // Of memory, as the kernel's default is; never less than programs find elsewhere.
        let memory = fittings.limits.memory_bytes;
        let size = memory.map(|bytes| format!("size={}", shared_memory(bytes)));
        let settings: Vec<&str> = ["mode=1777"].into_iter().chain(size.as_deref()).collect();
        plan.fs("tmpfs", "/dev/shm", Attributes::DATA, &settings);
        for (content, path) in [
            ("pts/ptmx", "/dev/ptmx"),
            ("/proc/self/fd", "/dev/fd"),
            ("/proc/self/fd/0", "/dev/stdin"),
            ("/proc/self/fd/1", "/dev/stdout"),
            ("/proc/self/fd/2", "/dev/stderr"),
        ] {
            plan.step(["link", content, path]);
        }
    }

    /// Limits of each process: of what control groups do not count, or are not there for.
    fn resource_limits(&self, plan: &mut Plan, limits: &Limits) {
        const FILE_SIZE: u32 = 1;
        const CORE: u32 = 4;
        const DATA: u32 = 2;
        const PROCESSES: u32 = 6;
        const OPEN_FILES: u32 = 7;
        // A core would go to a program of the host.
        plan.limit(CORE, 0);
        if let Some(most) = limits.disk() {
            // One file that is too large is stopped as it is written; see `crate::disk` for
            // the rest.
            plan.limit(FILE_SIZE, most);
        }
        let open_files = rustix::process::getrlimit(Resource::Nofile).maximum;
        if let Some(most) = limits.open_files {
            plan.limit(OPEN_FILES, most.min(open_files.unwrap_or(u64::MAX)));
        }
        let controllers = self.groups.controllers();
        if let (Some(most), false) = (limits.processes, controllers.contains(&"pids")) {
            plan.limit(PROCESSES, most);
        }
        if let (Some(most), false) = (limits.memory_bytes, controllers.contains(&"memory")) {
            plan.limit(DATA, most);
        }
    }
}

impl Driver for Sandbox {
    fn start(&self, site: &Site) -> Result<Instance> {
        site.check_files("sandbox")?;
        let base = self.roots.of(site)?;
        let agent = self.begin(site, &base, &self.fittings())?;
        let mut env = self.networks.env();
        env.extend(base.env());
        Ok(Instance { agent, env })
    }

    fn moved(self: Arc<Self>, instance: Instance, from: &Site, to: &Site) -> Result<Instance> {
        self.groups.moved(&from.home, &to.home);
        self.networks.rename(from.id, to.id);
        let agent = instance.agent.clone();
        let to = to.clone();
        agent.relaunch_by(move || self.relaunch(&to).map_err(std::io::Error::other));
        Ok(instance)
    }

    fn resume(&self, site: &Site) -> Option<Instance> {
        if self.linger.is_zero() {
            return None;
        }
        let base = self.roots.of(site).ok()?;
        // Should its first process be killed, the next command starts it anew.
        let launch = self.relaunch(site).ok()?;
        let door = launch.enter.as_ref().and_then(|enter| enter.door.clone());
        let (agent, way) = match Agent::find(launch) {
            Ok(found) => found,
            Err(error) => {
                tracing::debug!(session = %site.id, %error, "not found again");
                return None;
            }
        };
        if !self.networks.fits(way.as_ref()) {
            tracing::info!(session = %site.id, "ended: it was started with another network");
            return None;
        }
        if let (Some(Door(take)), Some(way)) = (door, way) {
            take(way);
        }
        let mut env = self.networks.env();
        env.extend(base.env());
        Some(Instance { agent, env })
    }

    fn leave(&self, site: &Site) -> Result<()> {
        self.networks.close(site.id);
        Ok(())
    }

    fn ended(&self, site: &Site) {
        self.networks.close(site.id);
        self.groups.remove(site.id, &site.home);
        // Nobody waits on it any more.
        let _ = fs::remove_file(site.socket());
    }

    fn set_egress(&self, id: Uuid, rules: Option<EgressRules>) {
        self.narrow(id, rules);
    }

    fn can_mount(&self) -> bool {
        true
    }

    fn set_mounts(&self, id: Uuid, mounts: Vec<(PathBuf, Mount)>) {
        let mut all = self.mounts.lock();
        if mounts.is_empty() {
            all.remove(&id).map(drop)
        } else {
            all.insert(id, mounts).map(drop)
        };
    }

    fn can_freeze(&self) -> bool {
        self.groups.have_freezer()
    }

    /// It would see its owner go only when it is thawed.
    fn keeps_frozen(&self) -> bool {
        false
    }

    fn copied(&self, _: &Site, _: &Site) -> Result<()> {
        Ok(())
    }

    fn freeze(&self, site: &Site) -> Result<()> {
        let failed = |source| Error::Freezer { action: "freeze", session: site.id, source };
        self.groups.freeze(&site.home).map_err(failed)
    }

    fn thaw(&self, site: &Site) -> Result<bool> {
        let failed = |source| Error::Freezer { action: "thaw", session: site.id, source };
        self.groups.thaw(&site.home).map_err(failed)
    }

    fn workdir(&self, _: &Site) -> PathBuf {
        PathBuf::from(WORKDIR)
    }

    fn kept(&self, site: &Site, path: &Path) -> Result<Option<PathBuf>> {
        let path = Path::new(WORKDIR).join(path);
        if let Ok(below) = path.strip_prefix(WORKDIR) {
            return Ok(Some(Path::new(VOLUME).join(below)));
        }
        let below = self.roots.below(&self.roots.of(site)?)?;
        let around = below.iter().filter(|it| path.starts_with(&it.target));
        let Some(overlay) = around.max_by_key(|it| it.target.components().count()) else {
            return Ok(None);
        };
        let upper = Folders::new(site, &overlay.target).upper;
        let within = path.strip_prefix(&overlay.target).ok();
        let upper = upper.strip_prefix(&site.home).ok();
        Ok(upper.zip(within).map(|(upper, within)| upper.join(within)))
    }

    fn agent_command(&self) -> Option<Vec<OsString>> {
        self.carried.as_ref().map(Carried::command)
    }

    fn limits(&self) -> Vec<&'static str> {
        self.groups.controllers()
    }

    fn disk_limit(&self) -> Option<u64> {
        self.limits.disk()
    }

    fn out_of_memory(&self, site: &Site) -> u64 {
        self.groups.out_of_memory(&site.home)
    }

    fn usage(&self, site: &Site) -> Usage {
        self.groups.usage(&site.home)
    }

    fn images(&self) -> Option<&Store> {
        Some(&self.roots.images)
    }

    fn choose_image(&self, site: &Site, image: &str) -> Result<()> {
        self.roots.choose(site, image)
    }

    fn image(&self, site: &Site) -> Option<String> {
        Roots::image_of(site)
    }

    fn owners(&self) -> Option<denizen_archive::Owners> {
        Some(self.users.kept())
    }

    fn layers(&self, site: &Site) -> Vec<PathBuf> {
        self.roots.layers_of(site)
    }
}

fn overlays(site: &Site, below: &[Below]) -> Vec<Folders> {
    below.iter().map(|below| Folders::new(site, &below.target)).collect()
}

/// How large `/dev/shm` is where a session may have so much memory: half of it, but not less
/// than 64 MiB.
fn shared_memory(memory: u64) -> u64 {
    (memory / 2).max(64 << 20)
}

/// Fails within a sandbox of denizen's, where none can be made, before anything else does with a
/// reason that leads nowhere.
fn check_place() -> Result<()> {
    let says = |path: &str, what: &str| fs::read_to_string(path).is_ok_and(|it| it.trim() == what);
    if says("/proc/1/comm", "denizen-init") && says("/proc/sys/user/max_user_namespaces", "0") {
        return Err(Error::Isolation {
            isolation: "sandbox",
            problem: "this is a session of another denizen, in which there are no further \
                      sandboxes: set isolation to `host` here (what runs is kept from the machine \
                      by this session, not from each other), or have that denizen make a session \
                      for each"
                .to_owned(),
        });
    }
    Ok(())
}

/// Fails if the sessions' files belong to ids that this user was given once, and now has others:
/// on another machine, or because `/etc/subuid` has changed.
fn check_range(users: Users, own: &Path) -> Result<()> {
    let Some(given) = users.given() else { return Ok(()) };
    let record = own.join("range");
    let failed = |source| Error::volume("keep the range of user ids in", &record, source);
    match fs::read_to_string(&record) {
        Ok(was) if was == given => Ok(()),
        // Empty where a power cut has come in between.
        Ok(was) if !was.is_empty() => Err(Error::Isolation {
            isolation: "sandbox",
            problem: format!(
                "the sessions' files belong to user and group ids from {} on, and this user has \
                 those from {} on now: give it the former back in /etc/subuid and /etc/subgid, or \
                 set another `volume_root` and restore backups",
                was.replace('-', " and "),
                given.replace('-', " and "),
            ),
        }),
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(failed(error)),
        _ => fs::write(&record, given).map_err(failed),
    }
}

/// Makes a store that was made with one id the range's, so that sessions go on over the same
/// layers. Those stay as that one id had them: all of their files are root's.
fn take_over_images(users: Users, folder: &Path) -> std::io::Result<()> {
    let record = folder.join("owners.json");
    let was = match fs::read(&record) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        text => serde_json::from_slice::<Owners>(&text?).ok(),
    };
    if users.is_alone() || was != Some(Owners::Mine) {
        return Ok(());
    }
    for layer in fs::read_dir(folder.join("layers"))? {
        let tree = layer?.path().join("tree");
        if tree.is_dir() {
            users.take_over(&tree)?;
        }
    }
    // Whole or not at all: until it is there, the next start does the same again.
    let partial = folder.join("owners.json.partial");
    let text = serde_json::to_vec(&users.owners()).map_err(std::io::Error::other)?;
    fs::write(&partial, text)?;
    fs::File::open(&partial)?.sync_all()?;
    fs::rename(&partial, &record)?;
    tracing::info!("images have a range of user ids now; pulled again they have all their users");
    Ok(())
}

/// The store of images whose files belong to these users, in the pool's own folder. The usual
/// one may belong to others, from before this process had a range, or from when it had one.
fn images_for(users: Users, own: &Path) -> Result<(PathBuf, Store)> {
    let folder = own.join("images");
    take_over_images(users, &folder)
        .map_err(|source| Error::volume("give a range of user ids", &folder, source))?;
    match Store::open(&folder, users.owners()) {
        Err(denizen_image::Error::Owners { .. }) if folder.join("owners.json").exists() => {
            let folder = own.join(format!("images-{}", users.name()));
            let store = Store::open(&folder, users.owners())?;
            Ok((folder, store))
        }
        opened => Ok((folder, opened?)),
    }
}

/// The two folders of an overlay on the host.
struct Folders {
    upper: PathBuf,
    work: PathBuf,
}

impl Folders {
    fn new(site: &Site, target: &Path) -> Self {
        // `/` is `main`, `/var/lib/dpkg` is `var-lib-dpkg`.
        let name = target.strip_prefix("/").unwrap_or(target).to_string_lossy().replace('/', "-");
        let name = if name.is_empty() { "main".to_owned() } else { name };
        Self { upper: site.root_changes().join(&name), work: site.home.join("work").join(&name) }
    }
}
