//! The first process of a machine of a session's own: `/init` of an initramfs that has this
//! program, folders to mount at, and modules. It finds the session's disks, makes its root, and
//! starts two processes: the session's own init (this program, as everywhere) and the relay,
//! which brings what is said to that init in from outside. The machine ends with either.
//!
//! Disks are known by their serials, all ext4: `root`, an image that is only read; `disk`, the
//! session's own; `tools`, denizen's programs, with the relay's words in its file `command`, each
//! ended by a zero byte. The relay has init's control socket as descriptor 0, and the port
//! `denizen` of the virtio console as descriptor 1. A machine with a network has
//! `denizen.net=ADDRESS/PREFIX,GATEWAY,DNS` on its kernel's command line.
//!
//! Whatever step fails, the machine must end and say why: nobody is there who could help. Once
//! there is something of the session's in sight, no path may lead out of its root. It must never
//! read what the session has written as if it were denizen's.

use std::ffi::{CStr, CString};
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::enter::{Refusal, give, put};
use crate::sys::{self, boot as machine, sandbox as kernel};

type Result<T> = std::result::Result<T, Refusal>;

/// `MOUNT_ATTR_`: nothing, RDONLY, NOATIME.
const PLAIN: u64 = 0;
const READ_ONLY: u64 = 1;
const NO_ACCESS_TIMES: u64 = 0x10;
/// `MOUNT_ATTR_`: NOSUID, NODEV, NOEXEC.
const DATA: u64 = 2 | 4 | 8;

/// How long a device may take to be there.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long what is killed may take to be gone.
const ENDING: Duration = Duration::from_secs(5);

/// `RLIMIT_NOFILE`, and as many as a sandbox has; the kernel's own 4096 are few.
const OPEN_FILES: (i32, u64) = (7, 65536);
const HOSTS: &[u8] = b"127.0.0.1 localhost denizen\n::1 localhost\n";
const PATH: &CStr = c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Is the machine's first process, to the machine's end.
pub fn boot() -> ! {
    let mut disk = None;
    if let Err((step, error)) = run(&mut disk) {
        complain(&step, error);
    }
    end(disk.as_ref())
}

/// All steps, until the session's init or the relay ends. `disk` is the folder of the session's
/// disk, as soon as that is mounted.
fn run(disk: &mut Option<File>) -> Result<()> {
    see_kernel()?;
    if has_word("denizen.probe")? {
        // Whether a machine comes this far was all that was asked.
        say("denizen: it runs");
        return Ok(());
    }
    let events = machine::DeviceEvents::new().map_err(at("device events"))?;
    let network = network()?;
    load_modules("/modules/order")?;
    if network.is_some() {
        load_modules("/modules/network")?;
    }
    let device = find_disk(&events, "root")?;
    mount_disk(&device, c"/root", &[c"ro"], READ_ONLY)?;
    let device = find_disk(&events, "tools")?;
    mount_disk(&device, c"/tools", &[c"ro"], READ_ONLY)?;
    let device = find_disk(&events, "disk")?;
    // What is deleted is given back to the host as it is deleted. What a disk is grown by is
    // empty, so that nothing has to be written there in the background.
    mount_disk(&device, c"/disk", &[c"discard", c"noinit_itable"], NO_ACCESS_TIMES)?;
    let folder = File::open("/disk").map_err(io_at("open disk"))?;
    let folder = disk.insert(folder);
    // Not of one that has an error noted; that can still be used.
    unless_spoilt(grow(&device, folder));
    // Room for what a start writes: on a disk that a session has filled to the last block an
    // overlay could only be read, and so nothing be deleted.
    let reserve = set_reserve(&device, "0")?;
    prepare_disk()?;
    let port = find_port(&events)?;
    let mounts = Mounts::new()?;
    free_initramfs()?;
    machine::move_root(c"/new").map_err(at("root"))?;
    furnish(&mounts)?;
    if let Some(network) = &network {
        network.raise()?;
    }
    set_reserve(&device, &reserve)?;
    let (init, relay) = start(&port)?;
    // The relay's alone, so that the other end sees when it is gone.
    drop(port);
    clear_trash(folder);
    wait_for_either(init, relay)
}

fn at(step: &str) -> impl FnOnce(i32) -> Refusal {
    move |error| (step.to_owned(), error)
}

fn io_at(step: &str) -> impl FnOnce(io::Error) -> Refusal + use<> {
    let step = step.to_owned();
    move |error| (step, error.raw_os_error().unwrap_or(sys::EINVAL))
}

/// Whether the kernel's command line has a word.
fn has_word(word: &str) -> Result<bool> {
    let line = fs::read_to_string("/proc/cmdline").map_err(io_at("command line"))?;
    Ok(line.split_ascii_whitespace().any(|it| it == word))
}

/// Mounts what the kernel tells by.
fn see_kernel() -> Result<()> {
    for (kind, path) in [(c"devtmpfs", c"/dev"), (c"proc", c"/proc"), (c"sysfs", c"/sys")] {
        mount(kind, path, &[], PLAIN)?;
    }
    Ok(())
}

/// Mounts a file system that has no device.
fn mount(
    kind: &CStr,
    path: &CStr,
    settings: &[(&CStr, Option<&CStr>)],
    attributes: u64,
) -> Result<()> {
    kernel::make_file_system(kind, settings, attributes)
        .and_then(|made| kernel::attach(&made, path))
        .map_err(at(&format!("mount {}", path.to_string_lossy())))
}

/// Loads the modules that a file names, a line each, in its order.
fn load_modules(list: &str) -> Result<()> {
    let names = fs::read_to_string(list).map_err(io_at(list))?;
    for name in names.lines() {
        let path = format!("/modules/{name}.ko");
        let file = File::open(&path).map_err(io_at(&path))?;
        match machine::load_module(&file) {
            Ok(()) | Err(sys::EEXIST) => {}
            Err(error) => return Err((format!("module {name}"), error)),
        }
    }
    Ok(())
}

/// Looks until something is there: again whenever the kernel tells of a device.
fn wait_for<T>(
    events: &machine::DeviceEvents,
    what: &str,
    mut look: impl FnMut() -> Option<T>,
) -> Result<T> {
    let since = Instant::now();
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        let left = PATIENCE.saturating_sub(since.elapsed());
        if left.is_zero() {
            return Err((what.to_owned(), sys::ENODEV));
        }
        events.wait(left);
    }
}

/// The name of the disk with a serial.
fn find_disk(events: &machine::DeviceEvents, serial: &str) -> Result<String> {
    wait_for(events, &format!("disk {serial}"), || {
        named(fs::read_dir("/sys/block").ok()?, "serial", serial)
    })
}

/// The port by which the machine is spoken to.
fn find_port(events: &machine::DeviceEvents) -> Result<OwnedFd> {
    let name = wait_for(events, "port denizen", || {
        named(fs::read_dir("/sys/class/virtio-ports").ok()?, "name", "denizen")
    })?;
    let opened = OpenOptions::new().read(true).write(true).open(format!("/dev/{name}"));
    Ok(opened.map_err(io_at("open the port"))?.into())
}

/// Which of some devices says `value` in its file `property`.
fn named(devices: fs::ReadDir, property: &str, value: &str) -> Option<String> {
    devices.flatten().find_map(|device| {
        let said = fs::read_to_string(device.path().join(property)).ok()?;
        (said.trim_end() == value).then(|| device.file_name().into_string().ok())?
    })
}

fn mount_disk(device: &str, path: &CStr, flags: &[&CStr], attributes: u64) -> Result<()> {
    let source = CString::new(format!("/dev/{device}")).map_err(|_| ("disk".into(), sys::EINVAL));
    let source = source?;
    let mut settings = vec![(c"source", Some(source.as_c_str()))];
    settings.extend(flags.iter().map(|flag| (*flag, None)));
    mount(c"ext4", path, &settings, attributes)
}

/// Has the file system fill its disk.
fn grow(device: &str, folder: &File) -> Result<()> {
    let size = format!("/sys/block/{device}/size");
    let sectors = fs::read_to_string(&size).map_err(io_at(&size))?;
    let bytes = sectors.trim_end().parse::<u64>().ok().and_then(|count| count.checked_mul(512));
    let bytes = bytes.ok_or((size, sys::EINVAL))?;
    let block = folder.metadata().map_err(io_at("disk"))?.blksize().max(1);
    machine::resize(folder, bytes / block).map_err(at("grow the disk"))
}

/// Makes what the session's disk lacks, and an empty `/tmp`.
fn prepare_disk() -> Result<()> {
    for name in ["root", "work", "volume", "trash"] {
        make_folder(&Path::new("/disk").join(name), 0o755)?;
    }
    let tmp = Path::new("/disk/tmp");
    // Two renames, however much is in it; what was is removed later. Where even that cannot be
    // it stays: nobody is helped by a machine that does not start.
    let fresh = Path::new("/disk/trash/fresh");
    if make_folder(fresh, 0o1777).is_ok() {
        // A start that was cut short may have left some there.
        let mut places = (0u64..).map(|number| PathBuf::from(format!("/disk/trash/{number}")));
        let free = places.find(|path| fs::symlink_metadata(path).is_err());
        let _ = free.map(|free| fs::rename(tmp, free));
        let _ = fs::rename(fresh, tmp);
    }
    make_folder(tmp, 0o1777)?;
    let open = fs::set_permissions(tmp, Permissions::from_mode(0o1777)).map_err(io_at("/tmp"));
    unless_spoilt(open);
    Ok(())
}

/// Says how much of a file system is for the kernel's own use when it is full; gives what it was.
fn set_reserve(device: &str, blocks: &str) -> Result<String> {
    let path = format!("/sys/fs/ext4/{device}/reserved_clusters");
    let before = fs::read_to_string(&path).map_err(io_at(&path))?;
    fs::write(&path, blocks).map_err(io_at(&path))?;
    Ok(before)
}

/// Makes a folder, unless it is there. Root within can have put anything in its place.
fn make_folder(path: &Path, mode: u32) -> Result<()> {
    let failed = || io_at(&format!("make {}", path.display()));
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if fs::symlink_metadata(path).map_err(failed())?.is_dir() {
                return Ok(());
            }
            fs::remove_file(path).map_err(failed())?;
            DirBuilder::new().mode(mode).create(path).map_err(failed())
        }
        result => result.map_err(failed()),
    }
}

/// What is mounted elsewhere, to be mounted within the session's root.
struct Mounts {
    volume: OwnedFd,
    tmp: OwnedFd,
    tools: OwnedFd,
}

impl Mounts {
    /// And mounts the session's root.
    fn new() -> Result<Self> {
        let overlay = [
            // As in a sandbox, so that what it marks as deleted is marked in the same way.
            (c"userxattr", None),
            (c"lowerdir", Some(c"/root")),
            (c"upperdir", Some(c"/disk/root")),
            (c"workdir", Some(c"/disk/work")),
        ];
        mount(c"overlay", c"/new", &overlay, NO_ACCESS_TIMES)?;
        let copy = |path: &CStr| {
            kernel::open_path(path)
                .and_then(|found| kernel::copy_mount(&found, false, PLAIN))
                .map_err(at(&format!("open {}", path.to_string_lossy())))
        };
        Ok(Self {
            volume: copy(c"/disk/volume")?,
            tmp: copy(c"/disk/tmp")?,
            tools: copy(c"/tools")?,
        })
    }
}

/// Gives the memory of what is not needed any more back.
fn free_initramfs() -> Result<()> {
    fs::remove_dir_all("/modules").map_err(io_at("remove /modules"))?;
    fs::remove_file("/init").map_err(io_at("remove /init"))
}

/// Makes the root what programs expect. From here on every path is within it.
fn furnish(mounts: &Mounts) -> Result<()> {
    let mode = |mode| [(c"mode", Some(mode))];
    place(c"/dev", 0o755, &fs(c"devtmpfs", &[], PLAIN)?)?;
    place(c"/proc", 0o755, &fs(c"proc", &[], DATA)?)?;
    place(c"/sys", 0o755, &fs(c"sysfs", &[], DATA)?)?;
    place(c"/run", 0o755, &fs(c"tmpfs", &mode(c"755"), PLAIN)?)?;
    place(c"/tmp", 0o1777, &mounts.tmp)?;
    place(c"/volume", 0o755, &mounts.volume)?;
    place(c"/run/denizen", 0o755, &mounts.tools)?;
    let terminals = [(c"ptmxmode", Some(c"666")), (c"mode", Some(c"620")), (c"gid", Some(c"5"))];
    place(c"/dev/pts", 0o755, &fs(c"devpts", &terminals, 2 | 8)?)?;
    place(c"/dev/shm", 0o1777, &fs(c"tmpfs", &mode(c"1777"), 2 | 4)?)?;
    if let Ok(groups) = kernel::make_file_system(c"cgroup2", &[], DATA) {
        place(c"/sys/fs/cgroup", 0o755, &groups)?;
    }
    for (content, path) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        symlink(content, path).map_err(io_at(path))?;
    }
    kernel::name_host(c"denizen").map_err(at("name host"))?;
    kernel::raise_loopback().map_err(at("loopback"))?;
    unless_spoilt(give(Path::new("/etc/hosts"), HOSTS).map_err(io_at("/etc/hosts")));
    kernel::limit(OPEN_FILES.0, OPEN_FILES.1).map_err(at("open files"))
}

fn fs(kind: &CStr, settings: &[(&CStr, Option<&CStr>)], attributes: u64) -> Result<OwnedFd> {
    let made = kernel::make_file_system(kind, settings, attributes);
    made.map_err(at(&format!("make {}", kind.to_string_lossy())))
}

/// Mounts at a folder, which is made if it is not there or has become something else: a
/// session that has put a link in its place shall start all the same.
fn place(path: &CStr, mode: u32, what: &OwnedFd) -> Result<()> {
    let name = path.to_string_lossy();
    let folder = Path::new(&*name);
    make_folder(folder, mode)?;
    kernel::attach(what, path).map_err(at(&format!("mount {name}")))
}

/// A session may have made of its `/etc` whatever it likes, or have filled its disk: it is told,
/// and starts all the same.
fn unless_spoilt(result: Result<()>) {
    if let Err((step, error)) = result {
        complain(&step, error);
    }
}

/// What a machine with a network has.
struct Network {
    address: Ipv4Addr,
    prefix: u32,
    gateway: Ipv4Addr,
    dns: Ipv4Addr,
}

impl Network {
    /// Reads `ADDRESS/PREFIX,GATEWAY,DNS`.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(',');
        let (address, prefix) = parts.next()?.split_once('/')?;
        let (gateway, dns) = (parts.next()?, parts.next()?);
        let network = Self {
            address: address.parse().ok()?,
            prefix: prefix.parse().ok().filter(|prefix| *prefix <= 32)?,
            gateway: gateway.parse().ok()?,
            dns: dns.parse().ok()?,
        };
        parts.next().is_none().then_some(network)
    }

    fn raise(&self) -> Result<()> {
        let (address, gateway) = (self.address.to_bits(), self.gateway.to_bits());
        kernel::raise_interface(b"eth0", address, gateway, self.prefix, None)
            .map_err(at("network eth0"))?;
        let (folder, content) = (Path::new("/etc"), format!("nameserver {}\n", self.dns));
        let file = folder.join("resolv.conf");
        let write = || put(&file, 0o644, content.as_bytes()).map_err(io_at("/etc/resolv.conf"));
        unless_spoilt(make_folder(folder, 0o755).and_then(|()| write()));
        Ok(())
    }
}

/// The network that the kernel's command line tells of.
fn network() -> Result<Option<Network>> {
    let line = fs::read_to_string("/proc/cmdline").map_err(io_at("/proc/cmdline"))?;
    let Some(told) = line.split_whitespace().find_map(|word| word.strip_prefix("denizen.net="))
    else {
        return Ok(None);
    };
    let network = Network::parse(told).ok_or((format!("denizen.net={told}"), sys::EINVAL))?;
    Ok(Some(network))
}

/// Starts the session's init and the relay.
fn start(port: &OwnedFd) -> Result<(i32, i32)> {
    let words = fs::read("/run/denizen/command").map_err(io_at("the relay's command"))?;
    let words: Option<Vec<&CStr>> = words
        .split_inclusive(|byte| *byte == 0)
        .map(|word| CStr::from_bytes_with_nul(word).ok())
        .collect();
    let bad = || ("the relay's command".to_owned(), sys::EINVAL);
    let words = words.ok_or_else(bad)?;
    let program = words.first().ok_or_else(bad)?;
    let (inner, outer) = machine::packet_pair().map_err(at("socket pair"))?;
    // Any number is this machine's own.
    let argv = [c"denizen-init", c"1"];
    let init = machine::start(c"/proc/self/exe", &argv, &[], &[(&inner, 0)]);
    let init = init.map_err(at("start init"))?;
    let relay = machine::start(program, &words, &[PATH], &[(&outer, 0), (port, 1)]);
    let relay = relay.map_err(at("start the relay"))?;
    // The machine would end with it. It has no children.
    let spared = fs::write(format!("/proc/{relay}/oom_score_adj"), "-1000");
    unless_spoilt(spared.map_err(io_at("spare the relay")));
    Ok((init, relay))
}

/// Removes what was in `/tmp`, while the session runs. Folders within it are moved up before they
/// are emptied, so that none is too deep, and no link is followed.
fn clear_trash(disk: &File) {
    let Ok(disk) = disk.try_clone() else { return };
    let work = move || {
        let trash = PathBuf::from(format!("/proc/self/fd/{}/trash", disk.as_raw_fd()));
        let mut next = 0u64;
        while empty_one(&trash, &mut next).is_ok_and(|found| found) {}
    };
    // Without a thread it is done by the next start.
    let _ = std::thread::Builder::new().name("trash".into()).spawn(work);
}

/// Removes one entry of the trash; whether there was one that could be. One that cannot must not
/// keep the others there.
fn empty_one(trash: &Path, next: &mut u64) -> io::Result<bool> {
    for entry in fs::read_dir(trash)? {
        if remove_one(trash, &entry?, next).is_ok() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn remove_one(trash: &Path, entry: &fs::DirEntry, next: &mut u64) -> io::Result<()> {
    if !entry.file_type()?.is_dir() {
        return fs::remove_file(entry.path());
    }
    for inner in fs::read_dir(entry.path())? {
        let inner = inner?;
        if !inner.file_type()?.is_dir() {
            fs::remove_file(inner.path())?;
            continue;
        }
        loop {
            *next += 1;
            let place = trash.join(format!("up-{next}"));
            if fs::symlink_metadata(&place).is_err() {
                fs::rename(inner.path(), place)?;
                break;
            }
        }
    }
    fs::remove_dir(entry.path())
}

/// Reaps whatever ends, until one of the two that the machine is for does.
fn wait_for_either(init: i32, relay: i32) -> Result<()> {
    loop {
        let (ended, _) = machine::wait_any().map_err(at("wait"))?;
        if ended == init || ended == relay {
            return Ok(());
        }
    }
}

/// Says on the console what has failed.
fn complain(step: &str, error: i32) {
    let reason = io::Error::from_raw_os_error(error);
    say(&format!("denizen: {step}: {reason}"));
}

/// Writes a line to the console.
fn say(line: &str) {
    let line = format!("{line}\n");
    for console in ["/dev/console", "/dev/ttyS0"] {
        let mut options = OpenOptions::new();
        let opened = options.write(true).custom_flags(sys::NO_TERMINAL).open(console);
        if let Ok(mut console) = opened
            && console.write_all(line.as_bytes()).is_ok()
        {
            return machine::drain(&console);
        }
    }
}

/// Ends all processes and the machine, with everything written.
fn end(disk: Option<&File>) -> ! {
    let since = Instant::now();
    sys::signal_number(-1, sys::SIGKILL);
    while sys::has_children() && since.elapsed() < ENDING {
        while matches!(sys::reap_any(), Ok(Some(_))) {}
        std::thread::sleep(Duration::from_millis(1));
    }
    // Before all others, which may be of a server that is gone.
    if let Some(Err(error)) = disk.map(|disk| close_disk(disk, Instant::now())) {
        complain("disk", error);
        machine::sync_all();
    }
    let error = machine::end();
    complain("end the machine", error);
    // The kernel panics when its first process ends, and the machine with it.
    std::process::exit(1)
}

/// Leaves the session's disk as one that was unmounted.
fn close_disk(disk: &File, since: Instant) -> std::result::Result<(), i32> {
    loop {
        match machine::make_read_only(disk) {
            // What is being removed from it, or still dies, is writing at this moment.
            Err(sys::EBUSY) if since.elapsed() < ENDING => {
                std::thread::sleep(Duration::from_millis(1));
            }
            done => return done,
        }
    }
}
