//! `microvm`: a guest kernel for each session, within the walls of a sandbox.
//!
//! A session's folder has beside its volume: `machine/`, the sandbox that what runs the guest is
//! in, and `memory`, while it sleeps. Its volume has one file, its disk: the guest's file system
//! with all that the session has written, which is what backups, forks and snapshots copy. The
//! session's processes are reached through `denizen-link`, as if they were here. What is made
//! once for all sessions is in the cache, in a folder `machines`: kernel and initramfs, roots of
//! images, denizen's program, and for each kind of machine one that has booted and sleeps.
//!
//! This module must never read what a guest has written to its disk, nor have the host's kernel
//! do so.

mod disks;
mod elf;
mod hypervisor;
mod initramfs;
mod kernel;
mod machine;
mod memory;
mod modules;
mod qemu;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use denizen_agent::{Agent, Launch};
use denizen_image::Store;
use denizen_network::EgressRules;
use parking_lot::Mutex;
use rustix::fs::{FileType, Mode};
use sha2::{Digest, Sha256};
use tokio::runtime::Handle;
use uuid::Uuid;

use self::disks::Disks;
use self::hypervisor::{Hardware, Hypervisor, INITRAMFS, KERNEL, ROOT, TOOLS};
use self::machine::Vm;
use self::memory::{DiskState, Owner};
use super::sandbox::carried::Carried;
use super::sandbox::root::Roots;
use super::sandbox::{self, Fittings, Sandbox};
use super::{Driver, Instance, Limits, Network, Notice, Notices, Options, Site};
use crate::error::{Error, Result};
use crate::usage::Usage;

/// Where the volume is within, and commands start.
const WORKDIR: &str = "/volume";
/// How large a session's disk is, if nothing is said.
const DISK: u64 = 20 << 30;
/// How much memory the guest has that is to show whether KVM works.
const PROBE_MEMORY: u64 = 128 << 20;
/// What the program that runs a guest needs beside the guest's memory.
const OVERHEAD: u64 = 384 << 20;
/// More processors than that do a session little good.
const MOST_PROCESSORS: u32 = 8;
/// What is left to the machine whose processes these are.
const RESERVE: u64 = 512 << 20;

pub(super) struct MicroVm {
    shared: Arc<Shared>,
    machines: Mutex<HashMap<Uuid, Arc<Vm>>>,
}

/// What all machines of a pool have in common.
struct Shared {
    sandbox: Arc<Sandbox>,
    /// What can run guests, as far as is known before one has been run.
    qemu: qemu::Qemu,
    chosen: OnceLock<Chosen>,
    /// denizen's program as a disk, once it was looked at.
    tools: OnceLock<(PathBuf, String)>,
    carried: Carried,
    kernel: PathBuf,
    initramfs: PathBuf,
    /// For what is made once.
    folder: PathBuf,
    limits: Limits,
    network: Network,
    notices: Option<Notices>,
    runtime: Handle,
    numbers: AtomicU64,
    /// When a template could not be made.
    no_template: Mutex<Option<Instant>>,
    /// How many guests there are.
    guests: Arc<Mutex<u64>>,
    /// Held while something is made that others would make too.
    making: Mutex<()>,
    /// The same of what boots.
    booting: Mutex<()>,
}

/// What runs guests.
struct Chosen {
    hypervisor: Box<dyn Hypervisor>,
    /// Of the host's, that it needs.
    devices: Vec<(PathBuf, &'static str)>,
    why_not_kvm: Option<String>,
}

/// Where a guest runs.
#[derive(Clone)]
struct Enclosed {
    agent: Agent,
    _admitted: Arc<Admitted>,
}

/// A guest that is counted, until this is dropped.
struct Admitted(Arc<Mutex<u64>>);

impl Drop for Admitted {
    fn drop(&mut self) {
        *self.0.lock() -= 1;
    }
}

/// What a session's machine is made of.
struct Parts {
    root: PathBuf,
    tools: PathBuf,
    hardware: Hardware,
    /// Changes with anything that a guest's memory counts on.
    identity: String,
}

impl MicroVm {
    /// Prepares what all machines of a pool share, in the pool's own folder. Must be called
    /// within a runtime.
    pub(super) fn new(own: &Path, options: Options) -> Result<Self> {
        let runtime = Handle::current();
        let program = options.agent_program.clone().ok_or_else(|| Error::Isolation {
            isolation: "microvm",
            problem: "a guest needs denizen's own program: name it with `agent_program`".to_owned(),
        })?;
        let cache = options.cache.clone().unwrap_or_else(|| own.join("cache"));
        let folder = cache.join("machines").join(sandbox::users_name()?);
        let folder = std::path::absolute(&folder).map_err(|it| Error::root(&folder, it))?;
        let failed = |source| Error::volume("make", &folder, source);
        fs::create_dir_all(&folder).map_err(failed)?;
        let carried = Carried::this_program(&program, own)
            .map_err(|source| Error::volume("keep this program in", own, source))?;
        let given = options.kernel.as_ref();
        let given = given.map(|(image, modules)| (image.as_path(), modules.as_deref()));
        let found = kernel::find(given).map_err(|error| problem(&error))?;
        let initramfs =
            initramfs::keep(&found.modules, &folder).map_err(|error| problem(&error))?;
        tracing::debug!(version = found.version, image = ?found.image, "kernel of machines");
        let kernel = keep(&found.image, &folder).map_err(failed)?;
        let (limits, network) = (options.limits.clone(), options.network.clone());
        let notices = options.notices.clone();
        let walls = Options {
            // A program of denizen's is not needed beside what runs a guest.
            agent_program: None,
            linger: Duration::ZERO,
            sleep: crate::lifecycle::Sleep::Stop,
            ..options
        };
        let sandbox = Arc::new(Sandbox::new(own, walls)?);
        Disks { sandbox: &sandbox, folder: &folder }.sweep().map_err(failed)?;
        // Kernels are root's only, with some distributions.
        for file in [&kernel, &initramfs] {
            sandbox.give(file).and_then(|()| disks::used(file)).map_err(failed)?;
        }
        let qemu = qemu::Qemu::find(runtime.clone()).map_err(|error| problem(&error))?;
        let shared = Shared {
            sandbox,
            qemu,
            chosen: OnceLock::new(),
            tools: OnceLock::new(),
            carried,
            kernel,
            initramfs,
            folder,
            limits,
            network,
            notices,
            runtime,
            numbers: AtomicU64::new(1),
            no_template: Mutex::default(),
            guests: Arc::default(),
            making: Mutex::default(),
            booting: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared), machines: Mutex::default() })
    }

    /// The machine of a session; a new one is off.
    fn machine(&self, site: &Site) -> Arc<Vm> {
        let mut machines = self.machines.lock();
        let new = || Vm::new(self.shared.clone(), site.clone());
        machines.entry(site.id).or_insert_with(new).clone()
    }

    fn known(&self, site: &Site) -> Option<Arc<Vm>> {
        self.machines.lock().get(&site.id).cloned()
    }
}

impl Shared {
    fn tell(&self, id: Uuid, notice: Notice) {
        if let Some(notices) = &self.notices {
            let _ = notices.try_send((id, notice));
        }
    }

    /// Counts one more guest. Fails if all of them could have more memory than there is, unless it
    /// has been there before: what sleeps shall wake.
    fn admit(&self, is_new: bool) -> Result<Admitted> {
        let info = rustix::system::sysinfo();
        let total = info.totalram.saturating_mul(u64::from(info.mem_unit)).saturating_sub(RESERVE);
        let each = self.memory() + OVERHEAD;
        let mut count = self.guests.lock();
        if is_new && each.saturating_mul(*count + 1) > total {
            return Err(Error::Isolation {
                isolation: "microvm",
                problem: format!(
                    "{count} machines run, and one more of {} MiB could have more memory than \
                     this host has: stop a session, or set less `memory_bytes` in `limits`",
                    each >> 20
                ),
            });
        }
        *count += 1;
        Ok(Admitted(self.guests.clone()))
    }

    fn disks(&self) -> Disks<'_> {
        Disks { sandbox: &self.sandbox, folder: &self.folder }
    }

    fn next_number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// What runs guests: on KVM, if that has really run one. To be found out by one at a time. Fails
    /// if that takes too long: what slept on KVM must not be tried without it.
    fn chosen(&self) -> io::Result<&Chosen> {
        if let Some(chosen) = self.chosen.get() {
            return Ok(chosen);
        }
        let kvm = self.qemu.clone().on_kvm();
        let chosen = match self.probe(&kvm) {
            Ok(device) => {
                Chosen { hypervisor: Box::new(kvm), devices: vec![device], why_not_kvm: None }
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => return Err(error),
            Err(why) => {
                tracing::info!(%why, "KVM runs no guest here");
                let hypervisor = Box::new(self.qemu.clone());
                let why_not_kvm = Some(why.to_string());
                Chosen { hypervisor, devices: Vec::new(), why_not_kvm }
            }
        };
        tracing::info!(by = chosen.hypervisor.name(), "machines are run");
        Ok(self.chosen.get_or_init(|| chosen))
    }

    /// Runs a guest on KVM until its kernel has begun: no file tells whether it can.
    /// Gives the device that it needs.
    fn probe(&self, hypervisor: &dyn Hypervisor) -> io::Result<(PathBuf, &'static str)> {
        let device = (self.kvm()?, KVM);
        let place = self.disks().begin().map_err(io::Error::other)?;
        let site = &place.site;
        let hardware = Hardware {
            memory: PROBE_MEMORY,
            processors: 1,
            network: false,
            // Nothing in it says that it is to be a session's: it ends by itself.
            command_line: "console=ttyS0 panic=-1 no_timer_check denizen.probe".to_owned(),
        };
        let mut fittings = self.fittings(&hardware, vec![device.clone()]);
        // It looks at none of its disks.
        fittings.files.extend([ROOT, TOOLS].map(|name| (self.initramfs.clone(), name)));
        let walls = self.sandbox.for_program(site, &fittings).map_err(io::Error::other)?;
        let tmp = site.home.join("tmp");
        let walled = hypervisor::Walls { agent: &walls, tmp: &tmp };
        let began = Disks::empty(&walls, site, PROBE_DISK)
            .map_err(io::Error::other)
            .and_then(|()| hypervisor.boot(walled, &hardware))
            .and_then(|guest| {
                let mut over = guest.ended();
                let over = async move { over.wait_for(|ended| *ended).await.map(drop) };
                let over = self.runtime.block_on(tokio::time::timeout(PROBE, over));
                let said = guest.last_words();
                match over {
                    Ok(_) if said.contains(PROBED) => Ok(device),
                    Ok(_) => Err(io::Error::other(said)),
                    Err(_) => {
                        let why = "it takes too long to find out whether KVM runs a guest";
                        Err(io::Error::new(io::ErrorKind::TimedOut, why))
                    }
                }
            });
        let _ = self.runtime.block_on(walls.shutdown(Duration::ZERO));
        Driver::ended(&*self.sandbox, site);
        began
    }

    /// The device of KVM as what runs guests can open it: root's is not theirs.
    fn kvm(&self) -> io::Result<PathBuf> {
        let device = fs::metadata(KVM)?.rdev();
        if !rustix::process::geteuid().is_root() {
            return Ok(KVM.into());
        }
        let own = self.folder.join("kvm");
        if !own.exists() {
            let partial = self.folder.join(format!("kvm-{}", Uuid::new_v4()));
            let (kind, mode) = (FileType::CharacterDevice, Mode::RUSR | Mode::WUSR);
            rustix::fs::mknodat(rustix::fs::CWD, &partial, kind, mode, device)?;
            self.sandbox.give(&partial)?;
            fs::rename(&partial, &own)?;
        }
        Ok(own)
    }

    /// Bytes of a guest's memory.
    fn memory(&self) -> u64 {
        self.limits.guest_memory() >> 20 << 20
    }

    fn disk_size(&self) -> u64 {
        self.limits.disk().unwrap_or(DISK).max(64 << 20)
    }

    fn hardware(&self) -> Hardware {
        let here = std::thread::available_parallelism().map_or(1, usize::from);
        let here = u32::try_from(here).unwrap_or(MOST_PROCESSORS);
        let wanted = self.limits.cpu_percent.map_or(MOST_PROCESSORS, |it| it.div_ceil(100));
        let network = !matches!(self.network, Network::None);
        let mut command_line = COMMAND_LINE.to_owned();
        if network {
            command_line.push_str(" denizen.net=10.0.3.15/24,10.0.3.2,10.0.3.3");
        }
        Hardware {
            memory: self.memory(),
            processors: wanted.min(here).clamp(1, MOST_PROCESSORS),
            network,
            command_line,
        }
    }

    /// What a session's machine is made of, made if need be.
    fn parts(&self, site: &Site) -> Result<Parts> {
        let base = self.sandbox.roots().of(site)?;
        let _making = self.making.lock();
        let chosen = self.chosen().map_err(|error| problem(&error))?;
        let disks = self.disks();
        let (root, root_key) = disks.root(&base)?;
        let known = self.tools.get().filter(|(disk, _)| disk.exists()).cloned();
        let (tools, tools_key) = if let Some(known) = known {
            known
        } else {
            // To look at all of it takes a while.
            let made = disks.tools(&self.carried)?;
            self.tools.get_or_init(|| made.clone());
            made
        };
        let hardware = self.hardware();
        let mut sum = Sha256::new();
        for part in [
            chosen.hypervisor.identity(),
            &format!("{hardware:?} {:?}", [&self.kernel, &self.initramfs].map(|it| it.file_name())),
            &root_key,
            &tools_key,
        ] {
            sum.update(part);
            sum.update([0]);
        }
        let identity = disks::key(sum);
        for file in [&root, &tools, &self.kernel, &self.initramfs] {
            disks::used(file).map_err(|source| Error::volume("use", file, source))?;
        }
        Ok(Parts { root, tools, hardware, identity })
    }

    /// What walls have in which a guest runs.
    fn fittings(&self, hardware: &Hardware, devices: Vec<(PathBuf, &'static str)>) -> Fittings {
        // Where there is no control group it would be a limit of addresses, of which far more are
        // taken than memory is used.
        let is_of_memory = self.sandbox.limits().contains(&"memory");
        Fittings {
            files: vec![(self.kernel.clone(), KERNEL), (self.initramfs.clone(), INITRAMFS)],
            devices,
            network: hardware.network,
            limits: Limits {
                memory_bytes: is_of_memory.then_some(hardware.memory + OVERHEAD),
                processes: Some(256),
                cpu_percent: self.limits.cpu_percent,
                open_files: Some(1024),
                // Its disk is as large as it may be, and with its tables a little more.
                disk_bytes: Some(self.disk_size() / 16 * 17 + (64 << 20)),
            },
            ..Fittings::default()
        }
    }

    /// Puts up the walls for a session's guest, if there may be one more.
    fn walls(&self, site: &Site, parts: &Parts, is_new: bool) -> Result<Enclosed> {
        let admitted = Arc::new(self.admit(is_new)?);
        let machine = site.machine();
        let failed = |source| Error::volume("make", &machine.home, source);
        fs::create_dir_all(&machine.home).map_err(failed)?;
        let devices = self.chosen().map_err(|error| problem(&error))?.devices.clone();
        let mut fittings = self.fittings(&parts.hardware, devices);
        fittings.files.extend([(parts.root.clone(), ROOT), (parts.tools.clone(), TOOLS)]);
        let agent = self.sandbox.for_program(&machine, &fittings)?;
        Ok(Enclosed { agent, _admitted: admitted })
    }

    /// Clears away what walls leave that are gone.
    fn cleared(&self, site: &Site) {
        Driver::ended(&*self.sandbox, &site.machine());
    }

    /// Gives a session that has no disk the template's, and the memory that goes with it; the
    /// template is made first if there is none. None for the template itself, and where none can
    /// be made: those boot.
    fn template(self: &Arc<Self>, site: &Site, parts: &Parts) -> Result<Option<Box<Memory>>> {
        if site.home.starts_with(&self.folder) {
            return Ok(None);
        }
        // Its disk is as large as this pool's are.
        let name = format!("template-{}-{}", parts.identity, self.disk_size() >> 20);
        let home = self.folder.join(name);
        let template = Site::in_folder(Uuid::nil(), home);
        if !template.home.exists() {
            let recent = |failed: Instant| failed.elapsed() < AGAIN;
            if self.no_template.lock().is_some_and(recent) {
                return Ok(None);
            }
            if let Err(error) = self.make_template(site, &template) {
                *self.no_template.lock() = Some(Instant::now());
                tracing::warn!(%error, "no machine can be made ready for new sessions: they boot");
                return Ok(None);
            }
        }
        let failed = |source| Error::volume("copy a disk to", &site.volume, source);
        let disk = DiskState::of(&template.disk()).map_err(failed)?;
        let owner = Owner { machine: parts.identity.clone(), disk };
        let memory = memory::open(&template.home.join("memory"), &owner);
        let Ok(Some(memory)) = memory else {
            // The next one makes it anew.
            tracing::warn!(template = ?template.home, "is damaged: removed");
            crate::volume::remove_tree(&template.home).map_err(failed)?;
            return Ok(None);
        };
        disks::used(&template.home).map_err(failed)?;
        let new = site.home.join("volume.new");
        let never = std::sync::atomic::AtomicBool::new(false);
        denizen_archive::copy(&template.volume, &new, &never)?;
        site.note_disk()
            .and_then(|()| disks::exchange(&new, &site.volume))
            .and_then(|()| crate::volume::remove_tree(&new))
            .map_err(failed)?;
        Ok(Some(Box::new(memory)))
    }

    fn make_template(self: &Arc<Self>, like: &Site, template: &Site) -> Result<()> {
        let _making = self.booting.lock();
        if template.home.exists() {
            return Ok(());
        }
        let place = self.disks().begin()?;
        Roots::copy(like, &place.site)?;
        Vm::new(self.clone(), place.site.clone()).make_template()?;
        match fs::rename(&place.site.home, &template.home) {
            // Another process has made the same.
            Err(_) if template.home.exists() => Ok(()),
            made => made.map_err(|source| Error::volume("make", &template.home, source)),
        }
    }
}

type Memory = dyn Read + Send;

/// What a guest's kernel is told, whatever it runs on. Its tests of its own ciphers would take a
/// tenth of the boot. Its test of the timer panics where that comes late, as it may without KVM on a
/// busy host (`check_timer` in arch/x86/kernel/apic/io_apic.c); on KVM it leaves that out itself.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 cryptomgr.notests no_timer_check";
/// What processors are had by where KVM works.
const KVM: &str = "/dev/kvm";
/// How large its disk is.
const PROBE_DISK: u64 = 64 << 20;
/// How long a guest may take to begin that is to show whether it can.
const PROBE: Duration = Duration::from_secs(20);
/// How long no other template is tried after one could not be made.
const AGAIN: Duration = Duration::from_mins(1);
/// What a guest says that has begun and was asked for no more.
const PROBED: &str = "denizen: it runs";

/// A copy of a kernel, made if there is none: the other one may be replaced while guests run.
fn keep(image: &Path, folder: &Path) -> io::Result<PathBuf> {
    let metadata = fs::metadata(image)?;
    let name = format!("kernel-{:x}-{:x}", metadata.mtime(), metadata.len());
    let kept = folder.join(&name);
    if !kept.exists() {
        let partial = folder.join(format!("{name}-{}", Uuid::new_v4()));
        fs::copy(image, &partial)?;
        fs::rename(&partial, &kept)?;
    }
    Ok(kept)
}

fn problem(error: &dyn std::error::Error) -> Error {
    Error::Isolation { isolation: "microvm", problem: error.to_string() }
}

impl Driver for MicroVm {
    fn start(&self, site: &Site) -> Result<Instance> {
        let base = self.shared.sandbox.roots().of(site)?;
        let machine = self.machine(site);
        let agent = Agent::with(Launch { machine: Some(machine), ..Launch::default() });
        if let Err(error) = self.shared.runtime.block_on(agent.launch()) {
            self.ended(site);
            return Err(problem(&error));
        }
        let mut env = self.proxy();
        env.extend(base.env());
        Ok(Instance { agent, env })
    }

    fn moved(self: Arc<Self>, instance: Instance, from: &Site, to: &Site) -> Result<Instance> {
        let mut machines = self.machines.lock();
        if let Some(machine) = machines.remove(&from.id) {
            self.shared.sandbox.program_moved(&from.machine(), &to.machine());
            machines.insert(to.id, machine.clone());
            drop(machines);
            machine.moved(to).map_err(|error| problem(&error))?;
        }
        Ok(instance)
    }

    /// What has slept is started, like all others: it is not running.
    fn resume(&self, _: &Site) -> Option<Instance> {
        None
    }

    fn leave(&self, site: &Site) -> Result<()> {
        self.freeze(site)
    }

    fn ended(&self, site: &Site) {
        self.machines.lock().remove(&site.id);
        self.shared.cleared(site);
    }

    fn set_egress(&self, id: Uuid, rules: Option<EgressRules>) {
        self.shared.sandbox.narrow(id, rules);
    }

    fn can_freeze(&self) -> bool {
        true
    }

    fn freeze(&self, site: &Site) -> Result<()> {
        let failed = |source| Error::Freezer { action: "freeze", session: site.id, source };
        let machine = self.known(site).ok_or(io::ErrorKind::NotFound.into()).map_err(failed)?;
        machine.suspend().map_err(failed)
    }

    fn thaw(&self, site: &Site) -> Result<bool> {
        Ok(self.known(site).is_some_and(|machine| machine.wake()))
    }

    fn keeps_frozen(&self) -> bool {
        true
    }

    fn hypervisor(&self) -> Option<String> {
        let _making = self.shared.making.lock();
        let Chosen { hypervisor, why_not_kvm, .. } = self.shared.chosen().ok()?;
        let why = why_not_kvm.iter().map(|why| format!(" ({why})"));
        Some(std::iter::once(hypervisor.name()).chain(why).collect())
    }

    fn copied(&self, from: &Site, into: &Site) -> Result<()> {
        machine::copy_memory(from, into)
            .map_err(|source| Error::volume("copy the memory of a machine to", &into.home, source))
    }

    fn workdir(&self, _: &Site) -> PathBuf {
        PathBuf::from(WORKDIR)
    }

    /// Nothing but whole disks.
    fn kept(&self, _: &Site, _: &Path) -> Result<Option<PathBuf>> {
        Ok(None)
    }

    fn agent_command(&self) -> Option<Vec<OsString>> {
        Some(self.shared.carried.command())
    }

    fn limits(&self) -> Vec<&'static str> {
        let mut all = self.shared.sandbox.limits();
        // Its memory is all that it has, whoever counts.
        if !all.contains(&"memory") {
            all.push("memory");
        }
        all
    }

    /// Its disk is no larger.
    fn disk_limit(&self) -> Option<u64> {
        None
    }

    fn import_limit(&self) -> Option<u64> {
        Some(self.shared.disk_size())
    }

    /// Its own kernel deals with that.
    fn out_of_memory(&self, _: &Site) -> u64 {
        0
    }

    fn usage(&self, site: &Site) -> Usage {
        self.shared.sandbox.usage(&site.machine())
    }

    fn images(&self) -> Option<&Store> {
        self.shared.sandbox.images()
    }

    fn choose_image(&self, site: &Site, image: &str) -> Result<()> {
        self.shared.sandbox.choose_image(site, image)
    }

    fn image(&self, site: &Site) -> Option<String> {
        self.shared.sandbox.image(site)
    }

    fn owners(&self) -> Option<denizen_archive::Owners> {
        self.shared.sandbox.owners()
    }

    fn layers(&self, site: &Site) -> Vec<PathBuf> {
        self.shared.sandbox.layers(site)
    }
}

impl MicroVm {
    /// What tells programs of the proxy: what is on the loopback of the walls is at the network's
    /// gateway for the guest.
    fn proxy(&self) -> BTreeMap<String, String> {
        let all = self.shared.sandbox.network_env();
        all.into_iter()
            .map(|(name, value)| (name, value.replace("http://127.0.0.1:", "http://10.0.3.2:")))
            .collect()
    }
}
