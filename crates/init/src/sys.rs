//! The system calls that the standard library has no function for, declared by hand, each
//! behind a function that cannot be misused. All of the program's `unsafe` is here, and
//! nothing here decides anything.

pub mod boot;
pub mod sandbox;

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_short, c_void};
use std::fs::File;
use std::io::{Error, Read};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::null_mut;

use crate::start::Failure;
use crate::users::User;

pub const EPERM: i32 = 1;
pub const ENOENT: i32 = 2;
pub const ESRCH: i32 = 3;
pub const EINTR: i32 = 4;
pub const E2BIG: i32 = 7;
pub const ECHILD: i32 = 10;
pub const EAGAIN: i32 = 11;
pub const EACCES: i32 = 13;
pub const EBUSY: i32 = 16;
pub const EEXIST: i32 = 17;
pub const ENODEV: i32 = 19;
pub const ENOTDIR: i32 = 20;
pub const EISDIR: i32 = 21;
pub const EINVAL: i32 = 22;
pub const EMFILE: i32 = 24;
pub const ENOSYS: i32 = 38;
pub const ECONNRESET: i32 = 104;
pub const ESHUTDOWN: i32 = 108;

pub const SIGKILL: c_int = 9;
pub const SIGTERM: c_int = 15;
pub const SIGCHLD: c_int = 17;
pub const SIGCONT: c_int = 18;
/// HUP, INT, QUIT, PIPE, TERM.
const IGNORED: [c_int; 5] = [1, 2, 3, 13, 15];
const SIG_DFL: usize = 0;
const SIG_IGN: usize = 1;

pub const POLLIN: c_short = 1;
pub const POLLOUT: c_short = 4;
pub const POLLHUP: c_short = 16;
/// `O_NOCTTY`.
pub const NO_TERMINAL: c_int = 0x100;
/// `O_NONBLOCK`.
pub const NO_WAITING: c_int = 0x800;
/// `O_CLOEXEC`.
const CLOSE_ON_EXEC: c_int = 0x8_0000;
/// `F_GETPIPE_SZ`, which fails for all but pipes.
const PIPE_SIZE: c_int = 1032;
/// `TIOCSCTTY`.
const SET_CONTROLLING_TERMINAL: u64 = 0x540e;
const MSG_DONTWAIT: c_int = 0x40;
const MSG_NOSIGNAL: c_int = 0x4000;
const MSG_CMSG_CLOEXEC: c_int = 0x4000_0000;
const PR_SET_NAME: c_int = 15;
const PR_SET_CHILD_SUBREAPER: c_int = 36;
const RLIMIT_LOCKS: c_int = 10;
const CLOCK_BOOTTIME: c_int = 7;
const SYS_PIDFD_SEND_SIGNAL: c_long = 424;
const SYS_PIDFD_OPEN: c_long = 434;
const SYS_CLOSE_RANGE: c_long = 436;
const SYS_PRLIMIT64: c_long = if cfg!(target_arch = "aarch64") { 261 } else { 302 };
/// SETSIGDEF, SETSIGMASK, SETSID.
const SPAWN_FLAGS: c_short = 0x04 | 0x08 | 0x80;

#[repr(C)]
pub struct PollFd {
    pub fd: c_int,
    pub events: c_short,
    pub revents: c_short,
}
#[repr(C)]
struct IoVec {
    base: *mut c_void,
    len: usize,
}
#[repr(C)]
struct MsgHdr {
    name: *mut c_void,
    namelen: u32,
    iov: *mut IoVec,
    iovlen: usize,
    control: *mut c_void,
    controllen: usize,
    flags: c_int,
}
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RLimit {
    soft: u64,
    hard: u64,
}
#[repr(C)]
#[derive(Default)]
struct TimeSpec {
    seconds: i64,
    nanoseconds: i64,
}
/// `sigset_t`: 1024 bits in glibc and musl.
#[repr(C)]
struct SigSet([u64; 16]);
/// `posix_spawnattr_t` (336 bytes in glibc and musl) with room to spare.
#[repr(C, align(16))]
struct SpawnAttr([u64; 64]);
/// `posix_spawn_file_actions_t` (80 bytes in glibc and musl) with room to spare.
#[repr(C, align(16))]
struct FileActions([u64; 32]);

unsafe extern "C" {
    fn setsid() -> c_int;
    fn umask(mask: u32) -> u32;
    fn prctl(option: c_int, ...) -> c_int;
    fn signal(number: c_int, action: usize) -> usize;
    fn sigprocmask(how: c_int, set: *const SigSet, old: *mut SigSet) -> c_int;
    fn signalfd(fd: c_int, set: *const SigSet, flags: c_int) -> c_int;
    fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
    fn poll(fds: *mut PollFd, count: u64, timeout: c_int) -> c_int;
    fn recvmsg(fd: c_int, message: *mut MsgHdr, flags: c_int) -> isize;
    fn sendmsg(fd: c_int, message: *const MsgHdr, flags: c_int) -> isize;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn waitid(kind: c_int, id: u32, info: *mut c_void, options: c_int) -> c_int;
    fn kill(pid: c_int, number: c_int) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn chdir(path: *const c_char) -> c_int;
    fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int;
    fn access(path: *const c_char, mode: c_int) -> c_int;
    fn pipe2(fds: *mut c_int, flags: c_int) -> c_int;
    fn fork() -> c_int;
    fn _exit(status: c_int) -> !;
    fn ioctl(fd: c_int, request: u64, ...) -> c_int;
    fn dup2(old: c_int, new: c_int) -> c_int;
    fn write(fd: c_int, bytes: *const c_void, count: usize) -> isize;
    fn fchown(fd: c_int, owner: u32, group: u32) -> c_int;
    fn geteuid() -> u32;
    fn getresuid(real: *mut u32, effective: *mut u32, saved: *mut u32) -> c_int;
    fn getresgid(real: *mut u32, effective: *mut u32, saved: *mut u32) -> c_int;
    fn setgroups(count: usize, groups: *const u32) -> c_int;
    fn setresgid(real: u32, effective: u32, saved: u32) -> c_int;
    fn setresuid(real: u32, effective: u32, saved: u32) -> c_int;
    fn execve(path: *const c_char, argv: *const *const c_char, env: *const *const c_char) -> c_int;
    fn clock_gettime(clock: c_int, time: *mut TimeSpec) -> c_int;
    fn sched_setscheduler(pid: c_int, policy: c_int, priority: *const c_int) -> c_int;
    fn prlimit(pid: c_int, what: c_int, new: *const RLimit, old: *mut RLimit) -> c_int;
    fn posix_spawn(
        pid: *mut c_int,
        path: *const c_char,
        actions: *const FileActions,
        attributes: *const SpawnAttr,
        argv: *const *const c_char,
        env: *const *const c_char,
    ) -> c_int;
    fn posix_spawnattr_init(attributes: *mut SpawnAttr) -> c_int;
    fn posix_spawnattr_setflags(attributes: *mut SpawnAttr, flags: c_short) -> c_int;
    fn posix_spawnattr_setsigdefault(a: *mut SpawnAttr, set: *const SigSet) -> c_int;
    fn posix_spawnattr_setsigmask(a: *mut SpawnAttr, set: *const SigSet) -> c_int;
    fn posix_spawn_file_actions_init(actions: *mut FileActions) -> c_int;
    fn posix_spawn_file_actions_destroy(actions: *mut FileActions) -> c_int;
    fn posix_spawn_file_actions_adddup2(a: *mut FileActions, from: c_int, to: c_int) -> c_int;
    fn posix_spawn_file_actions_addchdir_np(
        actions: *mut FileActions,
        path: *const c_char,
    ) -> c_int;
    fn posix_spawn_file_actions_addopen(
        actions: *mut FileActions,
        fd: c_int,
        path: *const c_char,
        flags: c_int,
        mode: u32,
    ) -> c_int;
}

/// The descriptor of the control socket.
pub const CONTROL: RawFd = 0;

/// Our own process id.
pub fn own_number() -> i32 {
    i32::try_from(std::process::id()).unwrap_or(0)
}

/// Why the last call failed.
fn errno() -> i32 {
    Error::last_os_error().raw_os_error().unwrap_or(EINVAL)
}

/// The errno of a call that gives 0 for success.
fn outcome(result: c_int) -> i32 {
    if result == 0 { 0 } else { errno() }
}

/// Becomes what an init has to be, with a soft `RLIMIT_LOCKS` of `mark`; gives the descriptor
/// that tells of ended children.
pub fn become_init(mark: u64) -> Result<OwnedFd, Error> {
    let mut children = SigSet([0; 16]);
    children.0[0] = 1 << (SIGCHLD - 1);
    // SAFETY: all of these take plain numbers, or pointers to values that live until the
    // call returns; the name is a C string. There is one thread, and no descriptor above 2
    // is owned by anything in this program yet, so closing them all takes none away.
    let fd = unsafe {
        setsid();
        prctl(PR_SET_NAME, c"denizen-init".as_ptr(), 0, 0, 0);
        if prctl(PR_SET_CHILD_SUBREAPER, 1usize, 0usize, 0usize, 0usize) != 0 {
            return Err(Error::last_os_error());
        }
        // An owner may ignore SIGCHLD, which is inherited and means reaping behind our back.
        signal(SIGCHLD, SIG_DFL);
        for number in IGNORED {
            signal(number, SIG_IGN);
        }
        sigprocmask(2, &raw const children, null_mut());
        if syscall(SYS_CLOSE_RANGE, 3usize, u32::MAX as usize, 0usize) != 0 {
            for fd in 3..65536 {
                fcntl(fd, 2, 1);
            }
        }
        fcntl(CONTROL, 2, 1);
        chdir(c"/".as_ptr());
        // Best effort: see the table of messages.
        let mut limit = RLimit::default();
        prlimit(0, RLIMIT_LOCKS, std::ptr::null(), &raw mut limit);
        limit.soft = mark;
        prlimit(0, RLIMIT_LOCKS, &raw const limit, null_mut());
        signalfd(-1, &raw const children, 0x80000 | 0x800)
    };
    if fd < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: signalfd made this descriptor just now, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Waits until one of them is ready or so many milliseconds have passed (-1: for ever). A
/// failure looks as if nothing were ready.
pub fn wait_ready(fds: &mut [PollFd], timeout: c_int) {
    // SAFETY: the slice has as many entries as said and lives over the call.
    unsafe { poll(fds.as_mut_ptr(), fds.len() as u64, timeout) };
}

/// One packet from a socket, with the descriptors that came along. Fails with `EAGAIN` if there
/// is none; a packet of no bytes is the end.
pub fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), i32> {
    let mut control = [0u64; 16];
    let mut part = IoVec { base: buffer.as_mut_ptr().cast(), len: buffer.len() };
    let mut message = MsgHdr {
        name: null_mut(),
        namelen: 0,
        iov: &raw mut part,
        iovlen: 1,
        control: control.as_mut_ptr().cast(),
        controllen: size_of_val(&control),
        flags: 0,
    };
    let flags = MSG_DONTWAIT | MSG_CMSG_CLOEXEC;
    // SAFETY: the header points to a buffer and a control area of the sizes it says, all
    // alive until the call returns.
    let count = unsafe { recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    let count = usize::try_from(count).map_err(|_| errno())?;
    Ok((count.min(buffer.len()), descriptors(&control, message.controllen)))
}

/// The descriptors in a control area (cmsg(3)): a length of 8 bytes that counts its own
/// header of 16, level 1 and type 1 (`SOL_SOCKET`, `SCM_RIGHTS`), then 4 bytes for each.
fn descriptors(control: &[u64; 16], length: usize) -> Vec<OwnedFd> {
    let end = usize::try_from(control[0]).unwrap_or(0).min(length);
    let count = end.saturating_sub(16) / 4;
    if length < 16 || control[1] != 1 << 32 | 1 {
        return Vec::new();
    }
    let halves = control[2..].iter().flat_map(|word| [*word & 0xffff_ffff, *word >> 32]);
    let raw = halves.take(count).filter_map(|fd| RawFd::try_from(fd).ok());
    // SAFETY: the kernel has just put these descriptors into our table for us to own.
    raw.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect()
}

/// Sends one packet on a socket, with a descriptor or without, or gives the errno.
pub fn transmit(
    socket: &impl AsRawFd,
    packet: &[u8],
    descriptor: Option<&OwnedFd>,
) -> Result<(), i32> {
    // As cmsg(3) lays it out: a length of 20, SOL_SOCKET and SCM_RIGHTS, the descriptor.
    let number = descriptor.map_or(0, |fd| u64::from(fd.as_raw_fd().unsigned_abs()));
    let mut control = [20u64, 1 << 32 | 1, number];
    let mut part = IoVec { base: packet.as_ptr().cast_mut().cast(), len: packet.len() };
    let message = MsgHdr {
        name: null_mut(),
        namelen: 0,
        iov: &raw mut part,
        iovlen: 1,
        control: control.as_mut_ptr().cast(),
        controllen: if descriptor.is_some() { size_of_val(&control) } else { 0 },
        flags: 0,
    };
    let flags = MSG_DONTWAIT | MSG_NOSIGNAL;
    // SAFETY: the header points to a buffer, which is only read, and a control area of the
    // sizes it says, all alive until the call returns.
    let sent = unsafe { sendmsg(socket.as_raw_fd(), &raw const message, flags) };
    if sent < 0 { Err(errno()) } else { Ok(()) }
}

/// read(2) on a borrowed descriptor.
pub fn read(fd: &OwnedFd, buffer: &mut [u8]) -> Result<usize, Error> {
    // SAFETY: the descriptor is open and stays owned by `fd`: it is not closed here.
    let file = unsafe { ManuallyDrop::new(File::from_raw_fd(fd.as_raw_fd())) };
    (&*file).read(buffer)
}

/// Reaps one child that has ended, whichever: this program is an init. Gives its number
/// and wait status, or the errno (`ECHILD` if there are no children at all).
pub fn reap_any() -> Result<Option<(i32, c_int)>, i32> {
    let mut status = 0;
    // SAFETY: `status` lives over the call.
    match unsafe { waitpid(-1, &raw mut status, 1) } {
        0 => Ok(None),
        pid if pid < 0 => Err(errno()),
        pid => Ok(Some((pid, status))),
    }
}

/// Whether there is any child, alive or not reaped.
pub fn has_children() -> bool {
    let mut nothing = [0u64; 16];
    // SAFETY: the buffer has room for `siginfo_t` (128 bytes). Any child (P_ALL), ended
    // (WEXITED), not waited for (WNOHANG), not reaped (WNOWAIT).
    let result = unsafe { waitid(0, 0, nothing.as_mut_ptr().cast(), 4 | 1 | 0x0100_0000) };
    result == 0 || errno() != ECHILD
}

/// kill(2); gives the errno, 0 for success. To be used only on what cannot have been
/// reaped, or the number may be another's by now.
pub fn signal_number(target: c_int, number: c_int) -> i32 {
    // SAFETY: plain numbers.
    outcome(unsafe { kill(target, number) })
}

/// Signals a process that may be reaped by its parent at any time: holds on to it first,
/// then makes sure that it is the one meant. Gives the errno, 0 for success.
pub fn signal_held(pid: i32, number: c_int, is_meant: impl FnOnce() -> bool) -> i32 {
    // SAFETY: plain numbers.
    let fd = unsafe { syscall(SYS_PIDFD_OPEN, c_long::from(pid), 0 as c_long) };
    let Ok(fd) = RawFd::try_from(fd).and_then(|fd| u32::try_from(fd).map(|_| fd)) else {
        return match errno() {
            // Kernels before 5.3.
            ENOSYS if is_meant() => signal_number(pid, number),
            error => error,
        };
    };
    // SAFETY: pidfd_open made this descriptor just now.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    if !is_meant() {
        return ESRCH;
    }
    let (raw, number) = (c_long::from(fd.as_raw_fd()), c_long::from(number));
    let details = std::ptr::null::<c_void>();
    // SAFETY: an open descriptor, a number, no details, no flags.
    let result = unsafe { syscall(SYS_PIDFD_SEND_SIGNAL, raw, number, details, 0 as c_long) };
    outcome(c_int::from(result != 0))
}

/// A process's soft `RLIMIT_LOCKS`, if it may be seen.
pub fn soft_locks(pid: i32) -> Option<u64> {
    let mut limit = RLimit::default();
    // SAFETY: `limit` lives over the call; nothing is set.
    let result = unsafe { prlimit(pid, RLIMIT_LOCKS, std::ptr::null(), &raw mut limit) };
    (result == 0).then_some(limit.soft)
}

/// The errno that stands in the way of executing this file, 0 if none.
pub fn may_execute(path: &CStr) -> i32 {
    // SAFETY: a C string.
    outcome(unsafe { access(path.as_ptr(), 1) })
}

/// The errno of entering a directory, 0 if it can be entered. Leaves us in `/`.
pub fn may_enter(folder: &CStr) -> i32 {
    // SAFETY: C strings.
    let error = outcome(unsafe { chdir(folder.as_ptr()) });
    // SAFETY: as above.
    unsafe { chdir(c"/".as_ptr()) };
    error
}

/// Closes the control socket, for a process that is not to be spoken to any more.
pub fn close_control() {
    // SAFETY: descriptor 0 is the control socket's from the start, and is not used after this.
    drop(unsafe { OwnedFd::from_raw_fd(CONTROL) });
}

/// Puts another socket in the place of the control socket.
pub fn replace_control(socket: &OwnedFd) -> Result<(), i32> {
    // SAFETY: the socket is open, and descriptor 0 is the control socket's: what takes its
    // place is used in the same way. O_CLOEXEC.
    let made = unsafe { dup3(socket.as_raw_fd(), CONTROL, 0x8_0000) };
    if made == CONTROL { Ok(()) } else { Err(errno()) }
}

/// Which of two processes this is.
pub enum Forked {
    /// The one that was there, and the other's number.
    Here(i32),
    /// The copy, and what tells it of ended children.
    There(OwnedFd),
}

/// Makes a copy of this process that has no descriptors but a socket, in the place of the control
/// socket, and what tells of ended children. Nothing but that ends it early: all other signals are
/// ignored. Nothing that owns a descriptor may be dropped in the copy.
pub fn fork_with(socket: &OwnedFd, signals: &OwnedFd) -> Result<Forked, i32> {
    /// The first that is free, as 0 to 2 are always taken.
    const SIGNALS: RawFd = 3;
    // SAFETY: there is one thread, so the new process may do whatever this one may.
    match unsafe { fork() } {
        0 => {}
        pid if pid < 0 => return Err(errno()),
        pid => return Ok(Forked::Here(pid)),
    }
    // SAFETY: all of these are this process's alone, and what owns them here is not dropped, nor
    // used again.
    unsafe {
        dup3(socket.as_raw_fd(), CONTROL, CLOSE_ON_EXEC);
        if signals.as_raw_fd() != SIGNALS {
            dup3(signals.as_raw_fd(), SIGNALS, CLOSE_ON_EXEC);
        }
        let first = usize::try_from(SIGNALS + 1).unwrap_or(usize::MAX);
        if syscall(SYS_CLOSE_RANGE, first, u32::MAX as usize, 0usize) != 0 {
            // Without a socket it has nothing to do.
            _exit(1);
        }
        for number in (1..=64).filter(|number| *number != SIGCHLD) {
            signal(number, SIG_IGN);
        }
        prctl(PR_SET_NAME, c"sudo".as_ptr(), 0, 0, 0);
        Ok(Forked::There(OwnedFd::from_raw_fd(SIGNALS)))
    }
}

/// Ends this process, and nothing else of it runs.
pub fn leave() -> ! {
    // SAFETY: a plain number.
    unsafe { _exit(0) }
}

/// New files can be written by their owner only, and read by all.
pub fn usual_umask() {
    // SAFETY: a plain number.
    unsafe { umask(0o022) };
}

/// Runs before everything else, or like everything else; needs `CAP_SYS_NICE` (sched(7))
/// and is only a help.
pub fn hurry(on: bool) {
    // SCHED_FIFO, SCHED_OTHER
    let (policy, priority) = if on { (1, 1) } else { (0, 0) };
    let priority: c_int = priority;
    // SAFETY: `struct sched_param` is one int in the C library; it lives over the call.
    unsafe { sched_setscheduler(0, policy, &raw const priority) };
}

/// Clock ticks (1/100 s) since boot.
pub fn now() -> u64 {
    let mut time = TimeSpec::default();
    // SAFETY: `time` lives over the call.
    unsafe { clock_gettime(CLOCK_BOOTTIME, &raw mut time) };
    let hundredths = time.seconds * 100 + time.nanoseconds / 10_000_000;
    hundredths.unsigned_abs()
}

/// What a command gets beside its strings.
#[derive(PartialEq, Eq)]
pub struct Setting {
    /// Its descriptors 0, 1 and 2, by their numbers here.
    pub fds: [RawFd; 3],
    /// Whether the first is a terminal that becomes its controlling one.
    pub terminal: bool,
    /// Whether they are for nobody else, so that they become its user's.
    pub owned: bool,
    /// The directory it starts in.
    pub cwd: CString,
}

/// What `posix_spawn(3)` needs, as far as it stays the same from command to command.
pub struct Spawner {
    attributes: SpawnAttr,
    actions: Option<Actions>,
    /// The hard limit that a mark has to fit under.
    hard: u64,
    /// What the call that sets a mark carries where all others may not set that limit.
    key: [u64; 2],
}

/// The steps that `posix_spawn(3)` takes in the new process.
struct Actions {
    setting: Setting,
    raw: Box<FileActions>,
}

impl Spawner {
    pub fn new() -> Self {
        let mut attributes = SpawnAttr([0; 64]);
        let mut limit = RLimit::default();
        // What we ignore, what the owner ignored, and what the C library hides (32, 33).
        let all = SigSet([u64::MAX; 16]);
        let none = SigSet([0; 16]);
        // SAFETY: all pointers are to values on this stack that outlive the calls; the
        // attributes are plain data in glibc and musl, so they can be moved afterwards.
        unsafe {
            posix_spawnattr_init(&raw mut attributes);
            posix_spawnattr_setflags(&raw mut attributes, SPAWN_FLAGS);
            posix_spawnattr_setsigdefault(&raw mut attributes, &raw const all);
            posix_spawnattr_setsigmask(&raw mut attributes, &raw const none);
            prlimit(0, RLIMIT_LOCKS, std::ptr::null(), &raw mut limit);
        }
        Self { attributes, actions: None, hard: limit.hard, key: [0; 2] }
    }

    /// Marks are set with this key from here on: the sandbox's filter of calls knows it.
    pub fn use_key(&mut self, key: [u64; 2]) {
        self.key = key;
    }

    /// Starts a program with a soft `RLIMIT_LOCKS` of `mark`; gives its number, or the
    /// errno of whichever step failed.
    pub fn start(
        &mut self,
        program: &CStr,
        argv: &[&CStr],
        env: &[&CStr],
        mark: u64,
        setting: Setting,
    ) -> Result<i32, i32> {
        let (argv, env) = (pointers(argv), pointers(env));
        // Commands that follow each other mostly agree in it: the kernel gives the
        // descriptors the same numbers, and the session has one directory.
        let actions = match self.actions.take() {
            Some(actions) if actions.setting == setting => actions,
            _ => Actions::new(setting)?,
        };
        let mut pid = 0;
        self.set_mark(mark);
        // SAFETY: every pointer is to a value or C string of this function, its caller or
        // `self` that outlives the calls; both pointer lists end with a null.
        let error = unsafe {
            posix_spawn(
                &raw mut pid,
                program.as_ptr(),
                &raw const *actions.raw,
                &raw const self.attributes,
                argv.as_ptr(),
                env.as_ptr(),
            )
        };
        self.actions = Some(actions);
        if error == 0 { Ok(pid) } else { Err(error) }
    }

    /// What is started from here on has this mark.
    pub fn set_mark(&self, mark: u64) {
        let limit = RLimit { soft: mark, hard: self.hard };
        // Best effort: a hard limit that is too low leaves the other marks. The kernel
        // does not look at what follows its four arguments; the filter of calls does.
        let [one, two] = self.key;
        let (own, what) = (0 as c_long, c_long::from(RLIMIT_LOCKS));
        let nothing = null_mut::<RLimit>();
        // SAFETY: the limit lives over the call.
        unsafe { syscall(SYS_PRLIMIT64, own, what, &raw const limit, nothing, one, two) };
    }

    /// The same as a user: `posix_spawn(3)` has no step for that. What has failed of the user or
    /// of the directory is the outer error; the inner one is of the program.
    pub fn start_as(
        &mut self,
        user: &User,
        program: &CStr,
        argv: &[&CStr],
        env: &[&CStr],
        mark: u64,
        setting: &Setting,
    ) -> Result<Result<i32, i32>, Failure> {
        let (argv, env) = (pointers(argv), pointers(env));
        let mut ends = [0; 2];
        // SAFETY: room for two descriptors, which nothing else owns when they are made.
        let [told, tell] = unsafe {
            if pipe2(ends.as_mut_ptr(), CLOSE_ON_EXEC) != 0 {
                return Err((0, errno()));
            }
            ends.map(|fd| OwnedFd::from_raw_fd(fd))
        };
        self.set_mark(mark);
        // SAFETY: there is one thread, so the new process may do whatever this one may.
        let pid = unsafe { fork() };
        if pid < 0 {
            return Err((0, errno()));
        }
        if pid == 0 {
            let became = become_user(user, setting).map(|()| {
                // SAFETY: C strings, and lists of them that end with a null.
                unsafe { execve(program.as_ptr(), argv.as_ptr(), env.as_ptr()) };
                (2, errno())
            });
            let (stage, error) = became.unwrap_or_else(|failure| failure);
            let word = [i32::from(stage), error];
            // SAFETY: eight bytes that live over the call. Nothing of this copy of the program
            // may run any more.
            unsafe {
                write(tell.as_raw_fd(), word.as_ptr().cast(), size_of_val(&word));
                _exit(127)
            }
        }
        drop(tell);
        let mut word = [0; 8];
        let count = loop {
            match read(&told, &mut word) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                read => break read.unwrap_or(0),
            }
        };
        // What was written in one go is read so. Whoever failed is reaped as any child.
        if count < word.len() {
            return Ok(Ok(pid));
        }
        let [stage @ .., a, b, c, d] = word;
        let error = i32::from_le_bytes([a, b, c, d]);
        match stage[0] {
            2 => Ok(Err(error)),
            stage => Err((stage, error)),
        }
    }
}

fn pointers(strings: &[&CStr]) -> Vec<*const c_char> {
    let strings = strings.iter().map(|string| string.as_ptr());
    strings.chain([std::ptr::null()]).collect()
}

/// Makes of a new process what a user's command begins as. It runs in that process only.
fn become_user(user: &User, setting: &Setting) -> Result<(), Failure> {
    let [stdin, stdout, stderr] = setting.fds;
    let none = SigSet([0; 16]);
    let failed = |stage| (stage, errno());
    let done = |result: c_int, stage| if result < 0 { Err(failed(stage)) } else { Ok(()) };
    // SAFETY: plain numbers, and pointers to values of this stack or of the caller that live over
    // the calls. The descriptors are open, and what they replace is this process's alone.
    unsafe {
        setsid();
        for number in 1..=64 {
            signal(number, SIG_DFL);
        }
        sigprocmask(2, &raw const none, null_mut());
        for (fd, place) in [(stdin, 0), (stdout, 1), (stderr, 2)] {
            done(dup2(fd, place), 0)?;
            // Best effort: what is theirs alone they can open again by its name in /dev. It fails
            // for what was made by somebody whom there is no number for here.
            if setting.owned && (setting.terminal || fcntl(place, PIPE_SIZE) > 0) {
                fchown(place, user.uid, u32::MAX);
            }
        }
        if setting.terminal {
            done(ioctl(0, SET_CONTROLLING_TERMINAL, 0), 0)?;
        }
        let (uid, gid) = (user.uid, user.gid);
        // Who is them already and nobody else cannot and need not become them.
        if uid != geteuid() || uid == 0 {
            done(setgroups(user.groups.len(), user.groups.as_ptr()), 4)?;
            done(setresgid(gid, gid, gid), 4)?;
            done(setresuid(uid, uid, uid), 4)?;
            // Where there is only one user, a filter of calls says that it was done.
            let (mut real, mut effective, mut saved) = (0, 0, 0);
            getresuid(&raw mut real, &raw mut effective, &raw mut saved);
            let is_user = [real, effective, saved] == [uid; 3];
            getresgid(&raw mut real, &raw mut effective, &raw mut saved);
            if !is_user || [real, effective, saved] != [gid; 3] {
                return Err((4, EPERM));
            }
        }
        done(chdir(setting.cwd.as_ptr()), 1)
    }
}

impl Actions {
    fn new(setting: Setting) -> Result<Self, i32> {
        let mut raw = Box::new(FileActions([0; 32]));
        let actions = &raw mut *raw;
        let [stdin, stdout, stderr] = setting.fds;
        let path = CString::new(format!("/proc/self/fd/{stdin}")).map_err(|_| EINVAL)?;
        // SAFETY: `actions` stays where it is until it is destroyed, and the strings are
        // copied. The descriptors are open when it is used, and none is 0, 1 or 2: those
        // are always taken here.
        let results = unsafe {
            posix_spawn_file_actions_init(actions);
            [
                // Opening a terminal is how the leader of a session gets it as its
                // controlling one; its session exists by then.
                if setting.terminal {
                    posix_spawn_file_actions_addopen(actions, 0, path.as_ptr(), 2, 0)
                } else {
                    posix_spawn_file_actions_adddup2(actions, stdin, 0)
                },
                posix_spawn_file_actions_adddup2(actions, stdout, 1),
                posix_spawn_file_actions_adddup2(actions, stderr, 2),
                posix_spawn_file_actions_addchdir_np(actions, setting.cwd.as_ptr()),
            ]
        };
        let made = Self { setting, raw };
        match results.into_iter().find(|error| *error != 0) {
            None => Ok(made),
            Some(error) => Err(error),
        }
    }
}

impl Drop for Actions {
    fn drop(&mut self) {
        // SAFETY: it was initialised when it was made, and is not used again.
        unsafe { posix_spawn_file_actions_destroy(&raw mut *self.raw) };
    }
}
