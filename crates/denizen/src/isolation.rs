//! The seam for places to run: how far a session is kept from its host.
//!
//! An isolation makes a session's instance and ends it; what runs inside is reached through
//! the instance's [`Agent`]. It must never decide when: that is the lifecycle's.

mod host;
mod microvm;
mod sandbox;

pub(crate) use sandbox::root::RECORD;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use denizen_agent::{Agent, Launch};
use denizen_image::{Image, Store};
use denizen_network::{Denial, EgressRules, Rules};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::lifecycle::Sleep;
use crate::share::Mount;
use crate::usage::Usage;

/// The folder, in a session's, of its persistent files.
const VOLUME: &str = "volume";

/// The one file there of a session that has a machine: its disk, with its persistent files.
const DISK: &str = ".denizen-disk";
/// The folder beside what a session has changed in its root that says so, by being there.
const DISK_NOTE: &str = "disk";

/// How far a session is kept from its host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Isolation {
    /// Nothing but a folder: commands run as the user the pool runs as, with all that user may
    /// do. For trusted code only.
    #[default]
    Host,
    /// A root file system, processes, a network and limits of its own, by what the Linux kernel
    /// offers to any user.
    ///
    /// A process that is root, of the host or of a user namespace with enough ids, gives its
    /// sandboxes users of their own. In any other process root within is that process's user and
    /// there is no other: the pool does not move its process into a namespace, which only a
    /// program with one thread can do; the program `denizen` does.
    Sandbox,
    /// A kernel of its own: a virtual machine, on KVM where that works and slower without it, in
    /// a sandbox. What is idle can sleep with all that runs in it ([`Sleep::Freeze`]): it takes
    /// no memory then, and goes on with the next use.
    ///
    /// Needs `qemu-system-x86_64`, a kernel and `mke2fs`, an image as the sessions' root, and
    /// [`Builder::agent_program`](crate::Builder::agent_program). Backups are of whole disks.
    MicroVm,
}

/// What each session may use. None is no limit. `host` isolation has no limits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of memory of all its processes, and of what it has in `/dev/shm`, which holds half
    /// of that (64 MiB at least). Default: half of this host's. Under
    /// [`Isolation::MicroVm`] it is what the guest has; see [`Limits::guest_memory`].
    pub memory_bytes: Option<u64>,
    /// Processes and threads. Default: 4096.
    pub processes: Option<u64>,
    /// Processor time: 100 is one processor. Default: no limit.
    pub cpu_percent: Option<u32>,
    /// Open files of each process. Default: 65536, or what this process may have.
    pub open_files: Option<u64>,
    /// Bytes on the disk: of its volume, of what it has changed in its root, and of its `/tmp`,
    /// each file counted with at least 4 KiB. 0 is no limit. Default: no limit.
    ///
    /// The kernel holds single files to it; the whole is watched by measuring, and can be
    /// overshot by what is written in a good quarter of a second. What runs then is ended
    /// ([`Exit::OutOfDisk`](crate::Exit)), and again whenever more is written; deleting is
    /// always possible.
    pub disk_bytes: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        let info = rustix::system::sysinfo();
        let memory = info.totalram.saturating_mul(u64::from(info.mem_unit)) / 2;
        Self {
            memory_bytes: Some(memory),
            processes: Some(4096),
            cpu_percent: None,
            open_files: Some(65536),
            disk_bytes: None,
        }
    }
}

impl Limits {
    /// No limits at all.
    pub fn none() -> Self {
        Self {
            memory_bytes: None,
            processes: None,
            cpu_percent: None,
            open_files: None,
            disk_bytes: None,
        }
    }

    /// How much memory a guest has under [`Isolation::MicroVm`]: what is set, but 512 MiB where
    /// nothing is, or half of the host's, which is the default of the others. They share it, a
    /// guest has its own. At least 128 MiB.
    pub fn guest_memory(&self) -> u64 {
        const DEFAULT: u64 = 512 << 20;
        const LEAST: u64 = 128 << 20;
        let others = Self::default().memory_bytes;
        self.memory_bytes.filter(|bytes| Some(*bytes) != others).unwrap_or(DEFAULT).max(LEAST)
    }

    /// The limit of the disk, if there is one.
    pub(crate) fn disk(&self) -> Option<u64> {
        self.disk_bytes.filter(|bytes| *bytes > 0)
    }
}

impl FromStr for Isolation {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = [Self::Host, Self::Sandbox, Self::MicroVm];
        known.into_iter().find(|isolation| isolation.name() == name).ok_or_else(|| {
            let problem = format!("is {name:?}, which is not host, sandbox or microvm");
            Error::config("isolation", problem)
        })
    }
}

impl Isolation {
    /// The word for it in configuration and output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Sandbox => "sandbox",
            Self::MicroVm => "microvm",
        }
    }

    /// Prepares for instances; `own` is the pool's own folder.
    pub(crate) fn driver(self, own: &Path, options: Options) -> Result<Arc<dyn Driver>> {
        Ok(match self {
            Self::Host if options.sleep == Sleep::Freeze => {
                return Err(Error::NoFreezer {
                    isolation: "host",
                    problem: "its sessions are in no control groups that could be frozen: set \
                              isolation to `sandbox`, or sleep to `stop`",
                });
            }
            Self::Host => Arc::new(host::Host),
            Self::Sandbox => Arc::new(sandbox::Sandbox::new(own, options)?),
            Self::MicroVm => Arc::new(microvm::MicroVm::new(own, options)?),
        })
    }
}

/// Has what an earlier process left frozen of a session, under whichever isolation, go on, so
/// that it can be ended. May block.
pub(crate) fn let_go(site: &Site) {
    sandbox::let_go(site);
    sandbox::let_go(&site.machine());
}

/// Which networks sessions can reach, where they do not share their host's.
///
/// Whatever the rules, the host's loopback, link-local and metadata addresses are reached only
/// by a rule that names the address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Network {
    /// None but a loopback of their own.
    #[default]
    None,
    /// What the rules open, by HTTP and HTTPS through a proxy that `http_proxy` and
    /// `https_proxy` name; there is no other way out.
    Filtered(Rules),
    /// All that is public, and what the rules open beside it.
    Full(Rules),
}

/// What an instance's session should know.
#[derive(Clone, Debug)]
pub(crate) enum Notice {
    /// It was refused a way to a network.
    Denied(Denial),
    /// What ran in it could not go on.
    Rebooted { reason: String },
}

/// Where notices go, with the session each is of.
pub(crate) type Notices = tokio::sync::mpsc::Sender<(Uuid, Notice)>;

/// What can be chosen for the instances of a pool.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    /// Where to keep what can be made again, if not in the pool's own folder; other pools may
    /// share it.
    pub(crate) cache: Option<PathBuf>,
    pub(crate) limits: Limits,
    pub(crate) sleep: Sleep,
    pub(crate) network: Network,
    pub(crate) notices: Option<Notices>,
    pub(crate) agent_program: Option<PathBuf>,
    /// What guests have as their kernel, and the folder of its modules, if not what is found.
    pub(crate) kernel: Option<(PathBuf, Option<PathBuf>)>,
    /// What new sessions' roots are: an image's name or a folder's path.
    pub(crate) image: Option<String>,
    /// How long instances that can do so go on without an owner.
    pub(crate) linger: Duration,
}

/// What is said where an image is asked for and cannot be had.
pub(crate) fn no_roots(isolation: &'static str) -> Error {
    let problem = "its sessions have no root of their own that an image could be".to_owned();
    Error::Isolation { isolation, problem }
}

/// A session's live incarnation.
#[derive(Clone, Debug)]
pub(crate) struct Instance {
    pub(crate) agent: Agent,
    /// What its root adds to every command's environment.
    pub(crate) env: BTreeMap<String, String>,
}

/// An image that sessions can be made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageInfo {
    /// Its name.
    pub name: String,
    /// Of its manifest.
    pub digest: String,
    /// How many layers it has.
    pub layers: usize,
}

pub(crate) fn info(image: &Image) -> ImageInfo {
    ImageInfo {
        name: image.name.clone(),
        digest: image.digest.to_string(),
        layers: image.layers.len(),
    }
}

/// Where an instance finds its session.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    pub(crate) id: Uuid,
    /// The folder that belongs to the session.
    pub(crate) home: PathBuf,
    /// The session's persistent files.
    pub(crate) volume: PathBuf,
}

impl Site {
    /// A session whose folder this is.
    pub(crate) fn in_folder(id: Uuid, home: PathBuf) -> Self {
        Self { id, volume: home.join(VOLUME), home }
    }

    /// The memory of a machine that sleeps.
    pub(crate) fn memory(&self) -> PathBuf {
        self.home.join("memory")
    }

    /// The disk of a session that has a machine.
    fn disk(&self) -> PathBuf {
        self.volume.join(DISK)
    }

    /// Whether that is what the session's files are on: the name alone may be a file of theirs.
    fn has_disk(&self) -> bool {
        self.is_to_have_disk() && self.disk().exists()
    }

    /// Whether it is, or a process was killed while it was being made so.
    fn is_to_have_disk(&self) -> bool {
        self.root_changes().join(DISK_NOTE).exists()
    }

    /// Notes that it is.
    fn note_disk(&self) -> std::io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        let changes = self.root_changes();
        let note = changes.join(DISK_NOTE);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(note)?;
        std::fs::File::open(changes)?.sync_all()
    }

    /// Fails if the session's files are on a disk that only a machine can read.
    fn check_files(&self, isolation: &'static str) -> Result<()> {
        if !self.has_disk() {
            return Ok(());
        }
        let problem = "the session's files are on the disk of a virtual machine: set isolation to \
                       `microvm`"
            .to_owned();
        Err(Error::Isolation { isolation, problem })
    }

    /// What a session that has a root of its own has changed in it.
    ///
    /// It holds folders, and one file that says over what they go.
    pub(crate) fn root_changes(&self) -> PathBuf {
        self.home.join("root")
    }

    /// What a virtual machine of the session's is run in, which has the session's files too.
    pub(crate) fn machine(&self) -> Self {
        Self { home: self.home.join("machine"), ..self.clone() }
    }

    /// The trees that count as the session's use of the disk.
    pub(crate) fn trees(&self) -> [PathBuf; 3] {
        [self.volume.clone(), self.root_changes(), self.home.join("tmp")]
    }

    /// How its init is launched: leaving a number to end it by, should all else die.
    pub(crate) fn launch(&self) -> Launch {
        Launch { record: Some(self.record()), ..Launch::default() }
    }

    /// The number that the last init of the session has left.
    pub(crate) fn recorded_init(&self) -> Option<u32> {
        denizen_agent::recorded(&self.record())
    }

    /// Where an init that goes on without its owner is found again.
    pub(crate) fn socket(&self) -> PathBuf {
        self.home.join("init.sock")
    }

    fn record(&self) -> PathBuf {
        self.home.join("init")
    }
}

/// Makes instances of one isolation.
pub(crate) trait Driver: Send + Sync {
    /// Makes the instance of a session whose volume is whole. May block; called within a
    /// runtime, where blocking is allowed.
    fn start(&self, site: &Site) -> Result<Instance>;

    /// Goes on with an instance whose session's folder and name are now others. May block.
    fn moved(self: Arc<Self>, instance: Instance, from: &Site, to: &Site) -> Result<Instance>;

    /// The instance of a session whose volume is whole, if an earlier pool has left it running
    /// and it can be used as it is. Makes none. Called as `start`.
    fn resume(&self, site: &Site) -> Option<Instance>;

    /// Lets go of an instance that goes on without this process: nothing here serves it any more.
    /// Fails if what runs there would end. May block.
    fn leave(&self, site: &Site) -> Result<()>;

    /// Clears away what an instance leaves outside of its session's folder. Nothing runs in it,
    /// or what does is dying, perhaps frozen. May block.
    fn ended(&self, site: &Site);

    /// What a session has of the pool's network from now on, at once if it runs. Where sessions share
    /// their host's, nothing can be said of it.
    fn set_egress(&self, _: Uuid, _: Option<EgressRules>) {}

    /// Whether sessions can have shared folders.
    fn can_mount(&self) -> bool {
        false
    }

    /// Which folders a session has beside its own from its next start on.
    fn set_mounts(&self, _: Uuid, _: Vec<(PathBuf, Mount)>) {}

    /// Whether instances can be frozen here, whatever becomes of idle ones.
    fn can_freeze(&self) -> bool;

    /// What runs virtual machines here, for people. May block, for as long as one needs to start.
    fn hypervisor(&self) -> Option<String> {
        None
    }

    /// Whether what is frozen needs nothing of this process any more, and the next one can go on
    /// with it by [`Driver::start`].
    fn keeps_frozen(&self) -> bool;

    /// A frozen instance's files were copied: what else a copy should begin with goes there too.
    /// May block.
    fn copied(&self, from: &Site, into: &Site) -> Result<()>;

    /// Has all processes of an instance stand still. Until it is thawed nothing in it answers.
    /// After a failure it may be frozen in part. May block.
    fn freeze(&self, site: &Site) -> Result<()>;

    /// Has them go on; gives whether they stood still. May block.
    fn thaw(&self, site: &Site) -> Result<bool>;

    /// Where commands start, as they see it.
    fn workdir(&self, site: &Site) -> PathBuf;

    /// Where what those within see at that path is in the session's folder, if it is kept there;
    /// a relative one begins where commands start. May block.
    fn kept(&self, site: &Site, path: &Path) -> Result<Option<PathBuf>>;

    /// How the agent is run that serves files from within an instance; none where this
    /// process can do that from here.
    fn agent_command(&self) -> Option<Vec<OsString>>;

    /// Which resources of a whole session are limited.
    fn limits(&self) -> Vec<&'static str>;

    /// How many bytes of the disk a session may have, where that is limited by measuring.
    fn disk_limit(&self) -> Option<u64>;

    /// How many bytes a session may begin with.
    fn import_limit(&self) -> Option<u64> {
        self.disk_limit()
    }

    /// How often so far a process of the instance was ended for want of memory.
    fn out_of_memory(&self, site: &Site) -> u64;

    /// What an instance uses, as far as something has counted it. May block, not for long.
    fn usage(&self, site: &Site) -> Usage;

    /// The images that sessions can be made of, where that is possible.
    fn images(&self) -> Option<&Store>;

    /// Has a session that is being made be made of an image. May block.
    fn choose_image(&self, site: &Site, image: &str) -> Result<()>;

    /// The image that a session is made of. May block.
    fn image(&self, site: &Site) -> Option<String>;

    /// Whose files sessions have, and what numbers their owners have in backups; none where
    /// these stay as they are.
    fn owners(&self) -> Option<denizen_archive::Owners>;

    /// The layers of images that a session needs.
    fn layers(&self, site: &Site) -> Vec<PathBuf>;
}
