//! The system calls that only the first process of a machine makes: modules, disks, the root,
//! the end. As everywhere in [`super`], each is behind a function that cannot be misused, and
//! nothing decides anything.

use std::ffi::{CStr, c_char, c_int, c_long, c_void};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::ptr::null;
use std::time::Duration;

use super::sandbox::{
    FSCONFIG_SET_FLAG, O_CLOEXEC, Result, SYS_FSCONFIG, bind, done, ioctl, mount, owned, socket,
};
use super::{
    FileActions, POLLIN, PollFd, SPAWN_FLAGS, SigSet, SpawnAttr, errno, posix_spawn,
    posix_spawn_file_actions_addchdir_np, posix_spawn_file_actions_adddup2,
    posix_spawn_file_actions_destroy, posix_spawn_file_actions_init, posix_spawnattr_init,
    posix_spawnattr_setflags, posix_spawnattr_setsigdefault, posix_spawnattr_setsigmask, syscall,
    wait_ready, waitpid,
};

const SYS_FINIT_MODULE: c_long = if cfg!(target_arch = "aarch64") { 273 } else { 313 };
const SYS_FSPICK: c_long = 433;
const FSCONFIG_CMD_RECONFIGURE: c_long = 7;
const MS_MOVE: u64 = 0x2000;

/// `struct sockaddr_nl` (netlink(7)).
#[repr(C)]
struct NetlinkAddress {
    family: u16,
    pad: u16,
    number: u32,
    groups: u32,
}

unsafe extern "C" {
    fn chroot(path: *const c_char) -> c_int;
    fn socketpair(domain: c_int, kind: c_int, protocol: c_int, pair: *mut [c_int; 2]) -> c_int;
    fn tcdrain(fd: c_int) -> c_int;
    fn sync();
    #[link_name = "reboot"]
    fn end_machine(how: c_int) -> c_int;
}

/// Loads a module from its file.
pub fn load_module(file: &impl AsRawFd) -> Result<()> {
    let fd = c_long::from(file.as_raw_fd());
    // SAFETY: an open descriptor, a C string without parameters, a plain number.
    done(unsafe { syscall(SYS_FINIT_MODULE, fd, c"".as_ptr(), 0usize) })
}

/// What the kernel tells of devices that come and change (`NETLINK_KOBJECT_UEVENT`).
pub struct DeviceEvents(OwnedFd);

impl DeviceEvents {
    pub fn new() -> Result<Self> {
        /// `AF_NETLINK`
        const FAMILY: u16 = 16;
        /// `SOCK_DGRAM`, and not to be waited for.
        const KIND: c_int = 2 | O_CLOEXEC | 0x800;
        let address = NetlinkAddress { family: FAMILY, pad: 0, number: 0, groups: 1 };
        // SAFETY: plain numbers, an open descriptor and a structure of the size given.
        unsafe {
            let socket = owned(socket(FAMILY.into(), KIND, 15).into())?;
            let at = (&raw const address).cast();
            done(bind(socket.as_raw_fd(), at, 12).into())?;
            Ok(Self(socket))
        }
    }

    /// Waits for something to be told, for so long. What it is does not matter: whoever waits
    /// looks again.
    pub fn wait(&self, time: Duration) {
        let time = i32::try_from(time.as_millis() + 1).unwrap_or(i32::MAX);
        let mut fds = [PollFd { fd: self.0.as_raw_fd(), events: POLLIN, revents: 0 }];
        wait_ready(&mut fds, time);
        while super::read(&self.0, &mut [0; 4096]).is_ok() {}
    }
}

/// Grows a mounted ext4 to so many of its blocks; nothing is done if it has them.
pub fn resize(folder: &impl AsRawFd, blocks: u64) -> Result<()> {
    const EXT4_IOC_RESIZE_FS: u64 = 0x4008_6610;
    // SAFETY: an open descriptor and a number that lives over the call.
    done(unsafe { ioctl(folder.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) }.into())
}

/// Makes what is mounted at `at` the root. The kernel's own first root cannot be taken away
/// (pivot_root(2)): it stays below.
pub fn move_root(at: &CStr) -> Result<()> {
    let here = c".".as_ptr();
    // SAFETY: C strings, and null where the call allows it.
    unsafe {
        done(super::chdir(at.as_ptr()).into())?;
        done(mount(here, c"/".as_ptr(), null(), MS_MOVE, null::<c_void>()).into())?;
        done(chroot(here).into())?;
        done(super::chdir(c"/".as_ptr()).into())
    }
}

/// Two sockets that are connected, `SOCK_SEQPACKET`.
pub fn packet_pair() -> Result<(OwnedFd, OwnedFd)> {
    let mut pair = [-1; 2];
    // SAFETY: plain numbers, and room for two descriptors.
    done(unsafe { socketpair(1, 5 | O_CLOEXEC, 0, &raw mut pair) }.into())?;
    Ok((owned(pair[0].into())?, owned(pair[1].into())?))
}

/// Starts a program, in `/` and in a session of its own, with such descriptors as it is to have
/// beside 1 and 2, which it shares; gives its number.
pub fn start(
    program: &CStr,
    argv: &[&CStr],
    env: &[&CStr],
    descriptors: &[(&OwnedFd, RawFd)],
) -> Result<i32> {
    let pointers = |strings: &[&CStr]| -> Vec<*const c_char> {
        strings.iter().map(|string| string.as_ptr()).chain([null()]).collect()
    };
    let (argv, env) = (pointers(argv), pointers(env));
    // Above all that they become, so that none is overwritten before its turn.
    let mut high = Vec::new();
    for (fd, number) in descriptors {
        high.push((copy_high(fd)?, *number));
    }
    let (all, none) = (SigSet([u64::MAX; 16]), SigSet([0; 16]));
    let (mut attributes, mut actions) = (SpawnAttr([0; 64]), FileActions([0; 32]));
    let (attributes, actions) = (&raw mut attributes, &raw mut actions);
    let mut pid = 0;
    // SAFETY: every pointer is to a value or C string of this function or its caller that
    // outlives the calls; both pointer lists end with a null; the descriptors are open.
    let error = unsafe {
        posix_spawnattr_init(attributes);
        posix_spawnattr_setflags(attributes, SPAWN_FLAGS);
        posix_spawnattr_setsigdefault(attributes, &raw const all);
        posix_spawnattr_setsigmask(attributes, &raw const none);
        posix_spawn_file_actions_init(actions);
        posix_spawn_file_actions_addchdir_np(actions, c"/".as_ptr());
        for (fd, number) in &high {
            posix_spawn_file_actions_adddup2(actions, fd.as_raw_fd(), *number);
        }
        let error = posix_spawn(
            &raw mut pid,
            program.as_ptr(),
            actions,
            attributes,
            argv.as_ptr(),
            env.as_ptr(),
        );
        posix_spawn_file_actions_destroy(actions);
        error
    };
    if error == 0 { Ok(pid) } else { Err(error) }
}

/// A copy of a descriptor that is none of the first.
fn copy_high(fd: &impl AsFd) -> Result<OwnedFd> {
    const F_DUPFD_CLOEXEC: c_int = 1030;
    // SAFETY: an open descriptor and plain numbers.
    owned(unsafe { super::fcntl(fd.as_fd().as_raw_fd(), F_DUPFD_CLOEXEC, 64) }.into())
}

/// Waits until a child, whichever, has ended, and reaps it; gives its number and wait status.
pub fn wait_any() -> Result<(i32, c_int)> {
    let mut status = 0;
    loop {
        // SAFETY: `status` lives over the call.
        let pid = unsafe { waitpid(-1, &raw mut status, 0) };
        match errno() {
            _ if pid > 0 => return Ok((pid, status)),
            super::EINTR => {}
            error => return Err(error),
        }
    }
}

/// Makes the file system that a folder is the top of one that can only be read: by its
/// descriptor, whatever has become of its path.
pub fn make_read_only(folder: &impl AsRawFd) -> Result<()> {
    /// `FSPICK_EMPTY_PATH`, `FSPICK_CLOEXEC`
    const FLAGS: c_long = 8 | 1;
    let fd = c_long::from(folder.as_raw_fd());
    let (nothing, empty) = (null::<c_char>(), c"".as_ptr());
    // SAFETY: open descriptors, C strings, and null where the call allows it.
    unsafe {
        let fs = owned(syscall(SYS_FSPICK, fd, empty, FLAGS))?;
        let fs = c_long::from(fs.as_raw_fd());
        done(syscall(SYS_FSCONFIG, fs, FSCONFIG_SET_FLAG, c"ro".as_ptr(), nothing, 0usize))?;
        done(syscall(SYS_FSCONFIG, fs, FSCONFIG_CMD_RECONFIGURE, nothing, nothing, 0usize))
    }
}

/// Waits until a terminal has sent what was written to it.
pub fn drain(terminal: &impl AsRawFd) {
    // SAFETY: an open descriptor.
    unsafe { tcdrain(terminal.as_raw_fd()) };
}

/// Writes everything to the disks.
pub fn sync_all() {
    // SAFETY: takes nothing.
    unsafe { sync() };
}

/// Ends the machine at once, with nothing written any more. It gives an errno if it cannot.
pub fn end() -> i32 {
    const RB_AUTOBOOT: c_int = 0x0123_4567;
    // SAFETY: a plain number.
    unsafe { end_machine(RB_AUTOBOOT) };
    errno()
}
