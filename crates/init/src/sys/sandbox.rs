//! The system calls that make a sandbox: namespaces, mounts by descriptor (`fsopen(2)`,
//! `open_tree(2)`, `move_mount(2)`), and what a process gives up for good. As everywhere in
//! [`super`], each is behind a function that cannot be misused, and nothing decides anything.

use std::ffi::{CStr, c_char, c_int, c_long, c_void};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::{null, null_mut};

use super::{EINVAL, EPERM, errno, prctl, syscall};

#[cfg(target_arch = "x86_64")]
mod number {
    use std::ffi::c_long;
    pub const PIVOT_ROOT: c_long = 155;
    pub const KEYCTL: c_long = 250;
    pub const CAPSET: c_long = 126;
}
#[cfg(target_arch = "aarch64")]
mod number {
    use std::ffi::c_long;
    pub const PIVOT_ROOT: c_long = 41;
    pub const KEYCTL: c_long = 219;
    pub const CAPSET: c_long = 91;
}
// Numbers above 423 are the same on all machines.
const SYS_OPEN_TREE: c_long = 428;
const SYS_MOVE_MOUNT: c_long = 429;
const SYS_FSOPEN: c_long = 430;
pub(super) const SYS_FSCONFIG: c_long = 431;
const SYS_FSMOUNT: c_long = 432;
const SYS_CLONE3: c_long = 435;
const SYS_MOUNT_SETATTR: c_long = 442;
const SYS_LANDLOCK_CREATE_RULESET: c_long = 444;
const SYS_LANDLOCK_ADD_RULE: c_long = 445;
const SYS_LANDLOCK_RESTRICT_SELF: c_long = 446;

/// New mount, uts, ipc, user, pid and net namespaces.
const NAMESPACES: u64 =
    0x0002_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000;
const CLONE_NEWCGROUP: c_int = 0x0200_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const SIGCHLD: u64 = 17;
const AT_EMPTY_PATH: c_long = 0x1000;
const AT_RECURSIVE: c_long = 0x8000;
const AT_FDCWD: c_long = -100;
const O_PATH: c_int = 0x20_0000;
pub(super) const O_CLOEXEC: c_int = 0x8_0000;
const OPEN_TREE_CLONE: c_long = 1;
const MOVE_MOUNT_F_EMPTY_PATH: c_long = 4;
const MOUNT_ATTR_IDMAP: u64 = 0x10_0000;
pub(super) const FSCONFIG_SET_FLAG: c_long = 0;
const FSCONFIG_SET_STRING: c_long = 1;
const FSCONFIG_CMD_CREATE: c_long = 6;
const MS_REC_PRIVATE: u64 = 0x4000 | 0x4_0000;
const MNT_DETACH: c_int = 2;
const PR_SET_PDEATHSIG: c_int = 1;
const PR_SET_DUMPABLE: c_int = 4;
const PR_SET_SECCOMP: c_int = 22;
const PR_CAPBSET_DROP: c_int = 24;
const PR_SET_NO_NEW_PRIVS: c_int = 38;
const KEYCTL_JOIN_SESSION_KEYRING: c_long = 1;
const SIOCSIFFLAGS: u64 = 0x8914;

/// `struct clone_args` (clone(2)).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}
#[repr(C)]
struct Ruleset {
    files: u64,
    net: u64,
    scoped: u64,
}
#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: c_int,
}
#[repr(C)]
struct FilterProgram {
    length: u16,
    filter: *const u64,
}
/// `struct ifreq` (netdevice(7)): a name, and a value of whichever kind, here with room for all.
#[repr(C, align(8))]
struct Interface {
    name: [u8; 16],
    value: [u8; 24],
}
/// `struct rtentry` (linux/route.h).
#[repr(C)]
#[derive(Default)]
struct Route {
    pad: usize,
    target: InternetAddress,
    gateway: InternetAddress,
    mask: InternetAddress,
    flags: u16,
    rest: [usize; 7],
}
/// `struct sockaddr_in` (ip(7)).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct InternetAddress {
    family: u16,
    port: [u8; 2],
    address: [u8; 4],
    zero: [u8; 8],
}

/// `struct sockaddr_un` (unix(7)).
#[repr(C)]
struct LocalAddress {
    family: u16,
    path: [u8; 108],
}

/// `struct sockaddr_in6` (ipv6(7)).
#[repr(C)]
#[derive(Default)]
struct InternetAddress6 {
    family: u16,
    port: [u8; 2],
    flow: u32,
    address: [u8; 16],
    scope: u32,
}

unsafe extern "C" {
    fn open(path: *const c_char, flags: c_int, ...) -> c_int;
    pub(super) fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: u64,
        data: *const c_void,
    ) -> c_int;
    fn umount2(target: *const c_char, flags: c_int) -> c_int;
    fn fchdir(fd: c_int) -> c_int;
    fn setresuid(real: u32, effective: u32, saved: u32) -> c_int;
    fn setresgid(real: u32, effective: u32, saved: u32) -> c_int;
    fn setgroups(count: usize, groups: *const u32) -> c_int;
    fn sethostname(name: *const c_char, length: usize) -> c_int;
    pub(super) fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    pub(super) fn bind(fd: c_int, address: *const c_void, length: u32) -> c_int;
    #[link_name = "listen"]
    fn listen_on(fd: c_int, backlog: c_int) -> c_int;
    #[link_name = "connect"]
    fn connect_from(fd: c_int, address: *const c_void, length: u32) -> c_int;
    fn accept4(fd: c_int, address: *mut c_void, length: *mut u32, flags: c_int) -> c_int;
    fn getsockopt(
        fd: c_int,
        level: c_int,
        name: c_int,
        value: *mut c_void,
        length: *mut u32,
    ) -> c_int;
    pub(super) fn ioctl(fd: c_int, request: u64, ...) -> c_int;
    fn setrlimit(what: c_int, limit: *const [u64; 2]) -> c_int;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn unshare(namespaces: c_int) -> c_int;
}

pub(super) type Result<T> = std::result::Result<T, i32>;

pub(super) fn done(result: c_long) -> Result<()> {
    if result == 0 { Ok(()) } else { Err(errno()) }
}

pub(super) fn owned(fd: c_long) -> Result<OwnedFd> {
    let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(errno)?;
    // SAFETY: the call that gave this number has just made it, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Who a process is after it has split in two.
pub enum Side {
    /// The new process's number.
    Parent(i32),
    /// The first process of new namespaces of all kinds.
    Child,
}

/// Splits this process, which must have one thread; the new one is in namespaces of its own,
/// and from its start in the control group of version 2 whose folder is given.
pub fn split(group: Option<&OwnedFd>) -> Result<Side> {
    let group = group.and_then(|fd| u64::try_from(fd.as_raw_fd()).ok());
    let into = if group.is_some() { CLONE_INTO_CGROUP } else { 0 };
    let args = CloneArgs {
        flags: NAMESPACES | into,
        exit_signal: SIGCHLD,
        cgroup: group.unwrap_or(0),
        ..CloneArgs::default()
    };
    // SAFETY: without CLONE_VM and with no stack given, this is fork(2) with flags; there is
    // one thread, so no lock is held by another. `args` lives over the call.
    match unsafe { syscall(SYS_CLONE3, &raw const args, size_of::<CloneArgs>()) } {
        0 => {
            // Only now: its root is the group that the process is in.
            // SAFETY: a plain number.
            done(unsafe { unshare(CLONE_NEWCGROUP) }.into())?;
            Ok(Side::Child)
        }
        pid if pid > 0 => i32::try_from(pid).map(Side::Parent).map_err(|_| EINVAL),
        _ => Err(errno()),
    }
}

/// Waits for the end of a child; gives its exit status, 128 and the signal's number if one
/// ended it.
pub fn wait_for(pid: i32) -> i32 {
    let mut status = 0;
    loop {
        // SAFETY: `status` lives over the call.
        if unsafe { waitpid(pid, &raw mut status, 0) } == pid {
            return match status & 0x7f {
                0 => status >> 8 & 0xff,
                signal => 128 + signal,
            };
        }
        if errno() != super::EINTR {
            return 1;
        }
    }
}

/// Is killed when its parent ends; cannot be looked into by its children.
pub fn bind_to_parent() -> Result<()> {
    // SAFETY: plain numbers.
    unsafe {
        done(prctl(PR_SET_PDEATHSIG, 9usize, 0usize, 0usize, 0usize).into())?;
        done(prctl(PR_SET_DUMPABLE, 0usize, 0usize, 0usize, 0usize).into())
    }
}

/// Becomes user and group 0 of its namespace; `alone` says that there are no other groups to
/// drop, nor the right to.
pub fn become_root(alone: bool) -> Result<()> {
    // SAFETY: plain numbers; no groups need no list.
    unsafe {
        if !alone {
            done(setgroups(0, null()).into())?;
        }
        done(setresgid(0, 0, 0).into())?;
        done(setresuid(0, 0, 0).into())?;
        // A change of user resets both.
    }
    bind_to_parent()
}

/// A descriptor that only names a file or folder. Of a link it names the link, which is no
/// folder to mount: what a session's files are called must not lead elsewhere.
pub fn open_path(path: &CStr) -> Result<OwnedFd> {
    const O_NOFOLLOW: c_int = if cfg!(target_arch = "aarch64") { 0x8000 } else { 0x2_0000 };
    // SAFETY: a C string.
    owned(unsafe { open(path.as_ptr(), O_PATH | O_CLOEXEC | O_NOFOLLOW) }.into())
}

/// No mount made here is seen elsewhere, nor the other way round.
pub fn keep_mounts_private() -> Result<()> {
    // SAFETY: C strings and null where the call allows it.
    let result = unsafe { mount(null(), c"/".as_ptr(), null(), MS_REC_PRIVATE, null()) };
    done(result.into())
}

/// A file system that is mounted nowhere yet. Settings without a value are flags.
pub fn make_file_system(
    kind: &CStr,
    settings: &[(&CStr, Option<&CStr>)],
    attributes: u64,
) -> Result<OwnedFd> {
    // SAFETY: all pointers are to C strings that outlive the calls.
    unsafe {
        let fs = owned(syscall(SYS_FSOPEN, kind.as_ptr(), 1usize))?;
        let fs = c_long::from(fs.as_raw_fd());
        for (key, value) in settings {
            let (what, value) = match value {
                Some(value) => (FSCONFIG_SET_STRING, value.as_ptr()),
                None => (FSCONFIG_SET_FLAG, null()),
            };
            done(syscall(SYS_FSCONFIG, fs, what, key.as_ptr(), value, 0usize))?;
        }
        let nothing = null::<c_char>();
        done(syscall(SYS_FSCONFIG, fs, FSCONFIG_CMD_CREATE, nothing, nothing, 0usize))?;
        owned(syscall(SYS_FSMOUNT, fs, 1usize, attributes))
    }
}

/// A copy of what is mounted at a place, or is there, mounted nowhere yet.
pub fn copy_mount(of: &OwnedFd, recursive: bool, attributes: u64) -> Result<OwnedFd> {
    let flags = OPEN_TREE_CLONE | i64::from(O_CLOEXEC) | AT_EMPTY_PATH;
    let recursive = if recursive { AT_RECURSIVE } else { 0 };
    let fd = c_long::from(of.as_raw_fd());
    // SAFETY: an open descriptor and an empty C string.
    let copy = owned(unsafe { syscall(SYS_OPEN_TREE, fd, c"".as_ptr(), flags | recursive) })?;
    let wanted = MountAttr { set: attributes, ..MountAttr::default() };
    // SAFETY: an open descriptor, an empty C string, and a structure of the size given.
    done(unsafe {
        let fd = c_long::from(copy.as_raw_fd());
        let size = size_of::<MountAttr>();
        syscall(
            SYS_MOUNT_SETATTR,
            fd,
            c"".as_ptr(),
            AT_EMPTY_PATH | recursive,
            &raw const wanted,
            size,
        )
    })?;
    Ok(copy)
}

/// Shows the owners in a mount that is mounted nowhere yet as the user namespace of a process
/// maps them (`mount_setattr(2)`, ID-mapped mounts).
pub fn shift_owners(mount: &OwnedFd, pid: i32) -> Result<()> {
    let namespace = std::fs::File::open(format!("/proc/{pid}/ns/user"));
    let namespace = namespace.map_err(|error| error.raw_os_error().unwrap_or(EINVAL))?;
    let userns = u64::from(namespace.as_raw_fd().unsigned_abs());
    let wanted = MountAttr { set: MOUNT_ATTR_IDMAP, userns, ..MountAttr::default() };
    // SAFETY: open descriptors, an empty C string, and a structure of the size given.
    done(unsafe {
        let fd = c_long::from(mount.as_raw_fd());
        let size = size_of::<MountAttr>();
        let empty = c"".as_ptr();
        syscall(SYS_MOUNT_SETATTR, fd, empty, AT_EMPTY_PATH, &raw const wanted, size)
    })
}

/// Mounts what was mounted nowhere.
pub fn attach(what: &OwnedFd, at: &CStr) -> Result<()> {
    let fd = c_long::from(what.as_raw_fd());
    // SAFETY: an open descriptor and C strings.
    done(unsafe {
        let flags = MOVE_MOUNT_F_EMPTY_PATH;
        syscall(SYS_MOVE_MOUNT, fd, c"".as_ptr(), AT_FDCWD, at.as_ptr(), flags)
    })
}

/// Makes what is mounted at `at` the root, and lets go of the old one.
pub fn change_root(at: &CStr) -> Result<()> {
    let root = open_path(at)?;
    // SAFETY: an open descriptor and C strings. With both names the same, the old root lies
    // over the new one until it is taken away (pivot_root(2)).
    unsafe {
        done(fchdir(root.as_raw_fd()).into())?;
        done(syscall(number::PIVOT_ROOT, c".".as_ptr(), c".".as_ptr()))?;
        done(umount2(c".".as_ptr(), MNT_DETACH).into())?;
        done(super::chdir(c"/".as_ptr()).into())
    }
}

/// The name of this host, in its namespace.
pub fn name_host(name: &CStr) -> Result<()> {
    // SAFETY: a buffer of the length given.
    done(unsafe { sethostname(name.as_ptr(), name.to_bytes().len()) }.into())
}

impl InternetAddress {
    fn new(address: u32, port: u16) -> Self {
        let (address, port) = (address.to_be_bytes(), port.to_be_bytes());
        Self { family: 2, port, address, zero: [0; 8] }
    }

    fn bytes(self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..2].copy_from_slice(&self.family.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.port);
        bytes[4..8].copy_from_slice(&self.address);
        bytes
    }
}

/// 127.0.0.1
const LOCALHOST: u32 = 0x7f00_0001;
const ADDRESS_SIZE: u32 = 16;
const ADDRESS6_SIZE: u32 = 28;
/// `SOCK_STREAM`, and not to be waited for.
const STREAM: c_int = 1 | O_CLOEXEC | 0x800;

/// Sets something of an interface.
fn set_interface(name: &[u8], request: u64, value: [u8; 24]) -> Result<()> {
    let mut interface = Interface { name: [0; 16], value };
    interface.name[..name.len()].copy_from_slice(name);
    // SAFETY: plain numbers, an open descriptor and a structure that lives over the call.
    unsafe {
        let socket = owned(socket(2, 2 | O_CLOEXEC, 0).into())?;
        done(ioctl(socket.as_raw_fd(), request, &raw mut interface).into())
    }
}

/// A value that begins with a number.
fn value(number: u32) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..4].copy_from_slice(&number.to_ne_bytes());
    bytes
}

/// UP and RUNNING.
const UP: u32 = 0x41;

/// Brings the loopback interface up.
pub fn raise_loopback() -> Result<()> {
    set_interface(b"lo", SIOCSIFFLAGS, value(UP))
}

/// A socket that listens on a port of 127.0.0.1, where this process is.
pub fn listen(port: u16) -> Result<OwnedFd> {
    raise_loopback()?;
    let address = InternetAddress::new(LOCALHOST, port);
    // SAFETY: plain numbers, an open descriptor and a structure of the size given.
    unsafe {
        let socket = owned(socket(2, STREAM, 0).into())?;
        let at = (&raw const address).cast();
        done(bind(socket.as_raw_fd(), at, ADDRESS_SIZE).into())?;
        done(listen_on(socket.as_raw_fd(), 1024).into())?;
        Ok(socket)
    }
}

/// A connection to a port of 127.0.0.1, where this process is, or of ::1 if only that listens. It
/// may not be made yet: its first use tells.
pub fn connect(port: u16) -> Result<OwnedFd> {
    const ECONNREFUSED: i32 = 111;
    let one = InternetAddress::new(LOCALHOST, port);
    let mut other = InternetAddress6 { family: 10, port: port.to_be_bytes(), ..Default::default() };
    other.address[15] = 1;
    // SAFETY: both are addresses of the size given.
    unsafe {
        let made = connect_to((&raw const one).cast(), 2, ADDRESS_SIZE);
        // Of what is on this machine a refusal is there by now, though the call has not told it.
        match made.and_then(|socket| pending_error(&socket).and(Ok(socket))) {
            Err(ECONNREFUSED) => connect_to((&raw const other).cast(), 10, ADDRESS6_SIZE)
                // A machine without such addresses has nothing else to say.
                .map_err(|_| ECONNREFUSED),
            made => made,
        }
    }
}

/// A socket that is being connected to an address.
///
/// # Safety
/// There is an address of that family and size.
unsafe fn connect_to(address: *const c_void, family: c_int, size: u32) -> Result<OwnedFd> {
    const EINPROGRESS: i32 = 115;
    // SAFETY: plain numbers and an open descriptor; the caller says so of the address.
    unsafe {
        let socket = owned(socket(family, STREAM, 0).into())?;
        match done(connect_from(socket.as_raw_fd(), address, size).into()) {
            Err(error) if error != EINPROGRESS => Err(error),
            _ => Ok(socket),
        }
    }
}

/// What has gone wrong with a socket and was not told yet.
fn pending_error(socket: &OwnedFd) -> Result<()> {
    const SOL_SOCKET: c_int = 1;
    const SO_ERROR: c_int = 4;
    let (mut error, mut size): (c_int, u32) = (0, 4);
    let to = (&raw mut error).cast();
    // SAFETY: an open descriptor, and two numbers that live over the call.
    unsafe {
        done(getsockopt(socket.as_raw_fd(), SOL_SOCKET, SO_ERROR, to, &raw mut size).into())?;
    }
    if error == 0 { Ok(()) } else { Err(error) }
}

/// Lets others connect to a socket that is bound to a name. Few are in line: there is one owner.
pub fn wait_for_owners(socket: &OwnedFd) -> Result<()> {
    // SAFETY: plain numbers.
    done(unsafe { listen_on(socket.as_raw_fd(), 8) }.into())
}

/// The next that has connected, if there is one, and it is none of this process's namespace:
/// what is outside has no number there (unix(7), `SO_PEERCRED`).
pub fn accept(listener: &OwnedFd) -> Result<OwnedFd> {
    match accept_known(listener)? {
        (socket, 0, _) => Ok(socket),
        _ => Err(EPERM),
    }
}

/// The next that has connected, if there is one, with its process and its user as they were then,
/// by their numbers in this process's namespaces.
pub fn accept_known(listener: &OwnedFd) -> Result<(OwnedFd, i32, u32)> {
    const SOL_SOCKET: c_int = 1;
    const SO_PEERCRED: c_int = 17;
    let mut credentials = [-1i32; 3];
    let mut size = 12u32;
    // SAFETY: an open descriptor; no address is asked for; the credentials are three numbers
    // (`struct ucred`) that live over the call.
    unsafe {
        let socket =
            owned(accept4(listener.as_raw_fd(), null_mut(), null_mut(), O_CLOEXEC).into())?;
        let to = credentials.as_mut_ptr().cast();
        done(getsockopt(socket.as_raw_fd(), SOL_SOCKET, SO_PEERCRED, to, &raw mut size).into())?;
        let [pid, uid, _] = credentials;
        Ok((socket, pid, uid.cast_unsigned()))
    }
}

/// A socket of packets that listens by a name in no folder, in this process's network namespace.
pub fn listen_by_name(name: &[u8]) -> Result<OwnedFd> {
    /// `SOCK_SEQPACKET`, and not to be waited for.
    const PACKETS: c_int = 5 | O_CLOEXEC | 0x800;
    let mut address = LocalAddress { family: 1, path: [0; 108] };
    // The first byte stays a zero.
    let place = address.path.get_mut(1..=name.len()).ok_or(EINVAL)?;
    place.copy_from_slice(name);
    let size = u32::try_from(2 + 1 + name.len()).map_err(|_| EINVAL)?;
    // SAFETY: plain numbers, an open descriptor and a structure of the size given, or more.
    unsafe {
        let socket = owned(socket(1, PACKETS, 0).into())?;
        done(bind(socket.as_raw_fd(), (&raw const address).cast(), size).into())?;
        done(listen_on(socket.as_raw_fd(), 64).into())?;
        Ok(socket)
    }
}

/// A device `tun0` (`Documentation/networking/tuntap.rst` of the kernel) with an address, that
/// the way to everywhere goes by.
pub fn make_tun(address: u32, gateway: u32, prefix: u32, mtu: u32) -> Result<OwnedFd> {
    const TUNSETIFF: u64 = 0x4004_54ca;
    /// IFF_TUN, IFF_NO_PI.
    const PACKETS: u32 = 0x1001;
    let mut interface = Interface { name: [0; 16], value: value(PACKETS) };
    interface.name[..4].copy_from_slice(b"tun0");
    // SAFETY: a C string, an open descriptor and a structure that lives over the call.
    let tun = unsafe {
        let tun = owned(open(c"/dev/net/tun".as_ptr(), 2 | O_CLOEXEC | 0x800).into())?;
        done(ioctl(tun.as_raw_fd(), TUNSETIFF, &raw mut interface).into())?;
        tun
    };
    raise_interface(b"tun0", address, gateway, prefix, Some(mtu))?;
    Ok(tun)
}

/// Gives an interface an address and brings it up, as the way to everywhere.
pub fn raise_interface(
    name: &[u8],
    address: u32,
    gateway: u32,
    prefix: u32,
    mtu: Option<u32>,
) -> Result<()> {
    const SIOCADDRT: u64 = 0x890b;
    const SIOCSIFADDR: u64 = 0x8916;
    const SIOCSIFNETMASK: u64 = 0x891c;
    const SIOCSIFMTU: u64 = 0x8922;
    let mask = u32::MAX.checked_shl(32u32.saturating_sub(prefix)).unwrap_or(0);
    set_interface(name, SIOCSIFADDR, InternetAddress::new(address, 0).bytes())?;
    set_interface(name, SIOCSIFNETMASK, InternetAddress::new(mask, 0).bytes())?;
    if let Some(mtu) = mtu {
        set_interface(name, SIOCSIFMTU, value(mtu))?;
    }
    set_interface(name, SIOCSIFFLAGS, value(UP))?;
    let any = InternetAddress::new(0, 0);
    let mut route = Route {
        target: any,
        gateway: InternetAddress::new(gateway, 0),
        mask: any,
        // Up, by a gateway.
        flags: 3,
        ..Route::default()
    };
    // SAFETY: plain numbers, an open descriptor and a structure that lives over the call.
    unsafe {
        let socket = owned(socket(2, 2 | O_CLOEXEC, 0).into())?;
        done(ioctl(socket.as_raw_fd(), SIOCADDRT, &raw mut route).into())?;
    }
    Ok(())
}

/// A limit for this process and those it starts (getrlimit(2)).
pub fn limit(what: i32, value: u64) -> Result<()> {
    let pair = [value, value];
    // SAFETY: the pair lives over the call and has the layout of `struct rlimit`.
    done(unsafe { setrlimit(what, &raw const pair) }.into())
}

/// Leaves the keys of whoever started us (keyrings(7)). A kernel without keys has none.
pub fn leave_keyrings() {
    // SAFETY: plain numbers and a null name: an anonymous keyring.
    unsafe { syscall(number::KEYCTL, KEYCTL_JOIN_SESSION_KEYRING, null::<c_char>()) };
}

/// What this process needs of its own beside what its commands may have, and they do not get:
/// SYS_PTRACE and SYS_RESOURCE, to see the environment and the limits of other users' processes,
/// which tell whose command they are.
const OF_INIT: u64 = 1 << 19 | 1 << 24;

/// Programs executed from here on have no capabilities but these (capabilities(7)), and never
/// gain any; nor does this process. It cannot have fewer than they: without new privileges, what
/// it executes has none that it lacks.
pub fn bound_capabilities(keep: u64) -> Result<()> {
    for capability in (0..64).filter(|capability| keep >> capability & 1 == 0) {
        // SAFETY: plain numbers.
        let result = unsafe { prctl(PR_CAPBSET_DROP, capability, 0usize, 0usize, 0usize) };
        // Past the last one that this kernel knows.
        if result != 0 && errno() == EINVAL {
            break;
        }
        done(result.into())?;
    }
    let own = keep | OF_INIT;
    // Version 3 of the call; the set in halves, each effective, permitted, inheritable.
    let header = [0x2008_0522u32, 0];
    let half = |shift: u32| u32::try_from(own >> shift & u64::from(u32::MAX)).unwrap_or(0);
    let sets = [half(0), half(0), 0, half(32), half(32), 0];
    // SAFETY: arrays of the layouts that the call has for this version.
    done(unsafe { syscall(number::CAPSET, header.as_ptr(), sets.as_ptr()) })?;
    // SAFETY: plain numbers.
    done(unsafe { prctl(PR_SET_NO_NEW_PRIVS, 1usize, 0usize, 0usize, 0usize) }.into())
}

/// No file outside of this root is opened, no mount changed, no process or abstract socket
/// outside reached, whatever descriptors there are (landlock(7)). False where the kernel does
/// not have it.
pub fn confine_to_root() -> Result<bool> {
    // SAFETY: asking for the version takes no structure.
    let version =
        unsafe { syscall(SYS_LANDLOCK_CREATE_RULESET, null_mut::<c_void>(), 0usize, 1usize) };
    if version < 1 {
        return Ok(false);
    }
    let rights = match version {
        1 => 13,
        2 => 14,
        3 | 4 => 15,
        _ => 16,
    };
    let files = (1 << rights) - 1;
    let ruleset = Ruleset { files, net: 0, scoped: 3 };
    let size = match version {
        1..=3 => 8usize,
        4 | 5 => 16,
        _ => 24,
    };
    let root = open_path(c"/")?;
    let rule = PathBeneath { allowed: files, parent: root.as_raw_fd() };
    // SAFETY: structures of the sizes given, or which the kernel knows, and open descriptors.
    unsafe {
        let ruleset =
            owned(syscall(SYS_LANDLOCK_CREATE_RULESET, &raw const ruleset, size, 0usize))?;
        let fd = c_long::from(ruleset.as_raw_fd());
        done(syscall(SYS_LANDLOCK_ADD_RULE, fd, 1usize, &raw const rule, 0usize))?;
        done(syscall(SYS_LANDLOCK_RESTRICT_SELF, fd, 0usize))?;
    }
    Ok(true)
}

/// Applies a seccomp filter (`struct sock_filter`s, 8 bytes each) to all from here on.
pub fn filter_calls(filter: &[u64]) -> Result<()> {
    let length = u16::try_from(filter.len()).map_err(|_| EINVAL)?;
    let program = FilterProgram { length, filter: filter.as_ptr() };
    // SAFETY: the program is as long as it says and lives over the call.
    done(unsafe { prctl(PR_SET_SECCOMP, 2usize, &raw const program) }.into())
}
