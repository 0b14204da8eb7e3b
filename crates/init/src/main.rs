//! `denizen-init`: the first process of an instance under `host` isolation.
//!
//! It is the child subreaper (prctl(2)) of everything a session runs, so that no process
//! can leave it: it starts commands on request, reaps whatever ends, tells the owner, and
//! kills trees. When its control socket closes, because the owner closed it or died, it
//! kills all it has and exits. It must never start anything by itself, hold a descriptor
//! that is not its own, block on its owner, or panic (its processes would be orphans).
//!
//! Run as `denizen-init NONCE`, with the control socket (`AF_UNIX`, `SOCK_SEQPACKET`) as
//! descriptor 0. One packet is one message; numbers are little-endian. A message begins
//! with `kind: u8, flags: u8, 0: u16, id: u32`. Requests, with what follows:
//!
//! | kind | name | follows |
//! |---|---|---|
//! | 1 | spawn | argc u32, envc u32, the strings, each ended by a zero byte: cwd, argv, env; descriptors: stdin, stdout, stderr. Flag 1: stdin becomes the controlling terminal. Flag 2: the strings are in a fourth descriptor, a file |
//! | 2 | signal | number u32; flags is the scope: 0 leader, 1 its group, 2 its tree |
//! | 3 | kill | – ; the tree of `id`, or with id 0 everything. Flag 1: say when it is gone |
//! | 4 | list | – |
//! | 5 | end | – ; SIGTERM to everything, no more spawns, say when all is gone |
//! | 6 | drain | one descriptor, to be read to its end and thrown away |
//!
//! Events: 1 spawned (pid u32); 2 failed (errno u32; flags is the stage: 0 to start it,
//! 1 the directory, 2 the program, 3 its interpreter); 3 exited (u32; flags 0 code, 1
//! signal); 4 tree gone (u32 processes that could not be killed); 5 all gone (the same);
//! 6 a part of the list (28 bytes each: pid, parent, command, 16 bytes of name; flag 1:
//! more parts follow).
//!
//! To know which command a process comes from, even when it has become a daemon with an
//! empty environment, a command is started with a soft `RLIMIT_LOCKS` of
//! `NONCE << 32 | id`. Linux has not looked at that limit since 2.4.25, but it keeps it,
//! passes it on by fork and execve, and shows it (prlimit(2)). `DENIZEN_COMMAND` holds
//! the same number for those that reset their limits.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64", target_endian = "little")))]
compile_error!("denizen-init is for 64-bit little-endian Linux");

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::{CStr, CString, c_char, c_int, c_long, c_short, c_void};
use std::fs::File;
use std::io::{Error, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The C library's functions, declared by hand: this program has no dependencies.
mod c {
    use super::{c_char, c_int, c_long, c_short, c_void};

    pub const EPERM: i32 = 1;
    pub const ENOENT: i32 = 2;
    pub const ESRCH: i32 = 3;
    pub const EINTR: i32 = 4;
    pub const ECHILD: i32 = 10;
    pub const EAGAIN: i32 = 11;
    pub const EACCES: i32 = 13;
    pub const ENOTDIR: i32 = 20;
    pub const EISDIR: i32 = 21;
    pub const EINVAL: i32 = 22;
    pub const EMFILE: i32 = 24;
    pub const ENOSYS: i32 = 38;
    pub const ESHUTDOWN: i32 = 108;

    pub const SIGKILL: c_int = 9;
    pub const SIGTERM: c_int = 15;
    pub const SIGCHLD: c_int = 17;
    pub const SIGCONT: c_int = 18;
    /// HUP, INT, QUIT, PIPE, TERM.
    pub const IGNORED: [c_int; 5] = [1, 2, 3, 13, 15];
    pub const SIG_DFL: usize = 0;
    pub const SIG_IGN: usize = 1;

    pub const POLLIN: c_short = 1;
    pub const POLLOUT: c_short = 4;
    pub const MSG_DONTWAIT: c_int = 0x40;
    pub const MSG_NOSIGNAL: c_int = 0x4000;
    pub const MSG_CMSG_CLOEXEC: c_int = 0x4000_0000;
    pub const PR_SET_NAME: c_int = 15;
    pub const PR_SET_CHILD_SUBREAPER: c_int = 36;
    pub const RLIMIT_LOCKS: c_int = 10;
    pub const CLOCK_BOOTTIME: c_int = 7;
    pub const SYS_PIDFD_SEND_SIGNAL: c_long = 424;
    pub const SYS_PIDFD_OPEN: c_long = 434;
    pub const SYS_CLOSE_RANGE: c_long = 436;
    /// SETSIGDEF, SETSIGMASK, SETSID.
    pub const SPAWN_FLAGS: c_short = 0x04 | 0x08 | 0x80;

    #[repr(C)]
    pub struct PollFd {
        pub fd: c_int,
        pub events: c_short,
        pub revents: c_short,
    }
    #[repr(C)]
    pub struct IoVec {
        pub base: *mut c_void,
        pub len: usize,
    }
    #[repr(C)]
    pub struct MsgHdr {
        pub name: *mut c_void,
        pub namelen: u32,
        pub iov: *mut IoVec,
        pub iovlen: usize,
        pub control: *mut c_void,
        pub controllen: usize,
        pub flags: c_int,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    pub struct RLimit {
        pub soft: u64,
        pub hard: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    pub struct TimeSpec {
        pub seconds: i64,
        pub nanoseconds: i64,
    }
    /// `sigset_t`: 1024 bits in glibc and musl.
    #[repr(C)]
    pub struct SigSet(pub [u64; 16]);
    /// `posix_spawnattr_t` (336 bytes in glibc and musl) with room to spare.
    #[repr(C, align(16))]
    pub struct SpawnAttr(pub [u64; 64]);
    /// `posix_spawn_file_actions_t` (80 bytes in glibc and musl) with room to spare.
    #[repr(C, align(16))]
    pub struct FileActions(pub [u64; 32]);

    unsafe extern "C" {
        pub fn setsid() -> c_int;
        pub fn prctl(option: c_int, ...) -> c_int;
        pub fn signal(number: c_int, action: usize) -> usize;
        pub fn sigprocmask(how: c_int, set: *const SigSet, old: *mut SigSet) -> c_int;
        pub fn signalfd(fd: c_int, set: *const SigSet, flags: c_int) -> c_int;
        pub fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
        pub fn poll(fds: *mut PollFd, count: u64, timeout: c_int) -> c_int;
        pub fn recvmsg(fd: c_int, message: *mut MsgHdr, flags: c_int) -> isize;
        pub fn send(fd: c_int, data: *const c_void, len: usize, flags: c_int) -> isize;
        pub fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
        pub fn kill(pid: c_int, number: c_int) -> c_int;
        pub fn syscall(number: c_long, ...) -> c_long;
        pub fn chdir(path: *const c_char) -> c_int;
        pub fn access(path: *const c_char, mode: c_int) -> c_int;
        pub fn clock_gettime(clock: c_int, time: *mut TimeSpec) -> c_int;
        pub fn prlimit(pid: c_int, what: c_int, new: *const RLimit, old: *mut RLimit) -> c_int;
        pub fn posix_spawn(
            pid: *mut c_int,
            path: *const c_char,
            actions: *const FileActions,
            attributes: *const SpawnAttr,
            argv: *const *const c_char,
            env: *const *const c_char,
        ) -> c_int;
        pub fn posix_spawnattr_init(attributes: *mut SpawnAttr) -> c_int;
        pub fn posix_spawnattr_setflags(attributes: *mut SpawnAttr, flags: c_short) -> c_int;
        pub fn posix_spawnattr_setsigdefault(a: *mut SpawnAttr, set: *const SigSet) -> c_int;
        pub fn posix_spawnattr_setsigmask(a: *mut SpawnAttr, set: *const SigSet) -> c_int;
        pub fn posix_spawn_file_actions_init(actions: *mut FileActions) -> c_int;
        pub fn posix_spawn_file_actions_destroy(actions: *mut FileActions) -> c_int;
        pub fn posix_spawn_file_actions_adddup2(
            a: *mut FileActions,
            from: c_int,
            to: c_int,
        ) -> c_int;
        pub fn posix_spawn_file_actions_addchdir_np(
            actions: *mut FileActions,
            path: *const c_char,
        ) -> c_int;
        pub fn posix_spawn_file_actions_addopen(
            actions: *mut FileActions,
            fd: c_int,
            path: *const c_char,
            flags: c_int,
            mode: u32,
        ) -> c_int;
    }
}

const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const MARK: &[u8] = b"DENIZEN_COMMAND=";
/// The control socket's descriptor.
const CONTROL: RawFd = 0;
/// The largest packet: the owner puts longer strings into a file.
const PACKET: usize = 32 * 1024;
/// How many ended commands are remembered, for processes that can only be told by their
/// session or group.
const REMEMBERED: usize = 1024;
/// How often a scan that goes on finding new processes is repeated at once, before other
/// requests get their turn.
const ROUNDS: usize = 256;

fn main() {
    let nonce = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(0);
    let Ok(signals) = set_up() else {
        std::process::exit(1);
    };
    Init::new(nonce, signals).run();
}

fn errno() -> i32 {
    Error::last_os_error().raw_os_error().unwrap_or(c::EINVAL)
}

fn signal_set(numbers: &[c_int]) -> c::SigSet {
    let mut set = c::SigSet([0; 16]);
    for number in numbers {
        set.0[0] |= 1 << (number - 1);
    }
    set
}

/// Becomes what an init has to be; gives the descriptor that tells of ended children.
fn set_up() -> Result<OwnedFd, Error> {
    let children = signal_set(&[c::SIGCHLD]);
    // SAFETY: all of these take plain numbers, or pointers to values that live until the
    // call returns; the name is a C string. There is one thread, and no descriptor above 2
    // is owned by anything in this program yet, so closing them all takes none away.
    let fd = unsafe {
        c::setsid();
        c::prctl(c::PR_SET_NAME, c"denizen-init".as_ptr(), 0, 0, 0);
        if c::prctl(c::PR_SET_CHILD_SUBREAPER, 1usize, 0usize, 0usize, 0usize) != 0 {
            return Err(Error::last_os_error());
        }
        // An owner may ignore SIGCHLD, which is inherited and means reaping behind our back.
        c::signal(c::SIGCHLD, c::SIG_DFL);
        for number in c::IGNORED {
            c::signal(number, c::SIG_IGN);
        }
        c::sigprocmask(2, &raw const children, std::ptr::null_mut());
        if c::syscall(c::SYS_CLOSE_RANGE, 3usize, u32::MAX as usize, 0usize) != 0 {
            for fd in 3..65536 {
                c::fcntl(fd, 2, 1);
            }
        }
        c::fcntl(CONTROL, 2, 1);
        c::chdir(c"/".as_ptr());
        c::signalfd(-1, &raw const children, 0x80000 | 0x800)
    };
    if fd < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: signalfd made this descriptor just now, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A command whose leader was started, and perhaps has ended.
struct Command {
    pid: i32,
    running: bool,
    /// When it was started, in clock ticks since boot, as in /proc/PID/stat.
    since: u64,
}

/// A process under this init.
struct Process {
    pid: i32,
    parent: i32,
    group: i32,
    session: i32,
    started: u64,
    /// Nothing of it runs any more; it waits to be reaped.
    dead: bool,
    name: [u8; 16],
    /// The command it comes from; 0 if nothing tells.
    command: u32,
}

/// A tree (or with id 0 everything) that is being killed.
struct Kill {
    id: u32,
    announce: bool,
    /// What already got its signal, by pid and start time.
    hit: BTreeSet<(i32, u64)>,
    /// What this user may not kill.
    refused: BTreeSet<(i32, u64)>,
    /// Scans in a row that found nothing left. One is not enough: the kernel's list of
    /// children may skip one while another leaves it (proc_pid_children(5)).
    clean: u8,
    /// Milliseconds until the next look.
    pause: c_int,
}

struct Init {
    nonce: u32,
    signals: OwnedFd,
    attributes: c::SpawnAttr,
    actions: Option<Actions>,
    /// The hard limit that the mark has to fit under.
    locks: c::RLimit,
    commands: BTreeMap<u32, Command>,
    kills: Vec<Kill>,
    drains: Vec<OwnedFd>,
    outbox: VecDeque<Vec<u8>>,
    buffer: Vec<u8>,
    /// No more spawns.
    ending: bool,
    /// The owner wants to know when the last process is gone.
    awaited: bool,
    owner_gone: bool,
}

/// What a command gets beside its strings.
#[derive(PartialEq, Eq)]
struct Setting {
    fds: [RawFd; 3],
    terminal: bool,
    cwd: CString,
}

/// The steps that posix_spawn(3) takes in the new process, kept for the next command.
struct Actions {
    setting: Setting,
    raw: Box<c::FileActions>,
}

impl Actions {
    fn new(setting: Setting) -> Result<Self, i32> {
        let mut raw = Box::new(c::FileActions([0; 32]));
        let actions = &raw mut *raw;
        let [stdin, stdout, stderr] = setting.fds;
        let path = CString::new(format!("/proc/self/fd/{stdin}")).map_err(|_| c::EINVAL)?;
        // SAFETY: `actions` stays where it is until it is destroyed, and the strings are
        // copied. The descriptors are open when it is used, and none is 0, 1 or 2: those
        // are always taken here.
        let results = unsafe {
            c::posix_spawn_file_actions_init(actions);
            [
                // Opening a terminal is how the leader of a session gets it as its
                // controlling one; its session exists by then.
                if setting.terminal {
                    c::posix_spawn_file_actions_addopen(actions, 0, path.as_ptr(), 2, 0)
                } else {
                    c::posix_spawn_file_actions_adddup2(actions, stdin, 0)
                },
                c::posix_spawn_file_actions_adddup2(actions, stdout, 1),
                c::posix_spawn_file_actions_adddup2(actions, stderr, 2),
                c::posix_spawn_file_actions_addchdir_np(actions, setting.cwd.as_ptr()),
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
        unsafe { c::posix_spawn_file_actions_destroy(&raw mut *self.raw) };
    }
}

/// Why a command was not started: the stage and the errno.
type Failure = (u8, i32);

impl Init {
    fn new(nonce: u32, signals: OwnedFd) -> Self {
        let mut attributes = c::SpawnAttr([0; 64]);
        let mut locks = c::RLimit::default();
        // What we ignore, what the owner ignored, and what the C library hides (32, 33).
        let all = c::SigSet([u64::MAX; 16]);
        let empty = signal_set(&[]);
        // SAFETY: all pointers are to values on this stack that outlive the calls; the
        // attributes are plain data in glibc and musl, so they can be moved afterwards.
        unsafe {
            c::posix_spawnattr_init(&raw mut attributes);
            c::posix_spawnattr_setflags(&raw mut attributes, c::SPAWN_FLAGS);
            c::posix_spawnattr_setsigdefault(&raw mut attributes, &raw const all);
            c::posix_spawnattr_setsigmask(&raw mut attributes, &raw const empty);
            c::prlimit(0, c::RLIMIT_LOCKS, std::ptr::null(), &raw mut locks);
        }
        Self {
            nonce,
            signals,
            attributes,
            actions: None,
            locks,
            commands: BTreeMap::new(),
            kills: Vec::new(),
            drains: Vec::new(),
            outbox: VecDeque::new(),
            buffer: vec![0; 2 * PACKET],
            ending: false,
            awaited: false,
            owner_gone: false,
        }
    }

    /// Serves until the owner is gone and nothing is left.
    fn run(&mut self) {
        loop {
            let ready = self.wait();
            if ready[0] & !c::POLLOUT != 0 {
                self.receive();
            }
            if ready[1] != 0 {
                self.acknowledge();
                self.reap();
            }
            self.drain(&ready[2..]);
            self.kill_step();
            self.flush();
            if self.owner_gone && self.kills.is_empty() {
                return;
            }
        }
    }

    /// Waits for something to do; gives what poll(2) found for the control socket, the
    /// signals, and each drain.
    fn wait(&self) -> Vec<c_short> {
        let out = if self.outbox.is_empty() { 0 } else { c::POLLOUT };
        let entry = |fd, events| c::PollFd { fd, events, revents: 0 };
        // A negative descriptor is skipped.
        let control = if self.owner_gone { -1 } else { CONTROL };
        let mut fds =
            vec![entry(control, c::POLLIN | out), entry(self.signals.as_raw_fd(), c::POLLIN)];
        fds.extend(self.drains.iter().map(|fd| entry(fd.as_raw_fd(), c::POLLIN)));
        let timeout = self.kills.iter().map(|kill| kill.pause).min().unwrap_or(-1);
        // SAFETY: the vector has as many entries as said and lives over the call. A
        // failure (EINTR, no memory) leaves every `revents` zero: we look again.
        unsafe { c::poll(fds.as_mut_ptr(), fds.len() as u64, timeout) };
        fds.iter().map(|fd| fd.revents).collect()
    }

    /// Takes one request; poll(2) tells of more.
    fn receive(&mut self) {
        let mut control = [0u64; 16];
        let mut part = c::IoVec { base: self.buffer.as_mut_ptr().cast(), len: self.buffer.len() };
        let mut message = c::MsgHdr {
            name: std::ptr::null_mut(),
            namelen: 0,
            iov: &raw mut part,
            iovlen: 1,
            control: control.as_mut_ptr().cast(),
            controllen: size_of_val(&control),
            flags: 0,
        };
        let flags = c::MSG_DONTWAIT | c::MSG_CMSG_CLOEXEC;
        // SAFETY: the header points to a buffer and a control area of the sizes it says,
        // all alive until the call returns.
        let count = unsafe { c::recvmsg(CONTROL, &raw mut message, flags) };
        if count < 0 && matches!(errno(), c::EINTR | c::EAGAIN) {
            return;
        }
        let packet = usize::try_from(count).ok().filter(|count| *count > 0);
        let Some(packet) = packet.and_then(|count| self.buffer.get(..count)) else {
            self.owner_gone = true;
            self.begin_kill(0, false);
            return;
        };
        let packet = packet.to_vec();
        self.request(&packet, received(&control, message.controllen));
    }

    fn request(&mut self, packet: &[u8], mut descriptors: Vec<OwnedFd>) {
        let (Some(&kind), Some(&flags), Some(id)) =
            (packet.first(), packet.get(1), number(packet, 4))
        else {
            return;
        };
        match kind {
            1 => match self.spawn(id, flags, packet, &descriptors) {
                Ok(pid) => self.event(1, 0, id, pid.unsigned_abs()),
                Err((stage, error)) => self.event(2, stage, id, error.unsigned_abs()),
            },
            2 => {
                let signal = number(packet, 8).and_then(|n| c_int::try_from(n).ok()).unwrap_or(0);
                self.signal(id, signal, flags);
            }
            3 => self.begin_kill(id, flags & 1 != 0),
            4 => self.list(id),
            5 => {
                self.ending = true;
                self.awaited = true;
                self.scan(|process| {
                    send_signal(process, c::SIGTERM);
                    // A stopped process would sleep through its own end.
                    send_signal(process, c::SIGCONT);
                });
                self.reap();
            }
            6 => self.drains.append(&mut descriptors),
            _ => {}
        }
    }

    /// Starts a command. The new process never runs code of ours that could fail later:
    /// posix_spawn(3) returns what execve said.
    fn spawn(
        &mut self,
        id: u32,
        flags: u8,
        packet: &[u8],
        fds: &[OwnedFd],
    ) -> Result<i32, Failure> {
        if self.ending {
            return Err((0, c::ESHUTDOWN));
        }
        // Descriptors that do not fit into our table are left out by the kernel.
        let (Some(stdin), Some(stdout), Some(stderr)) = (fds.first(), fds.get(1), fds.get(2))
        else {
            return Err((0, c::EMFILE));
        };
        let file;
        let strings = if flags & 2 == 0 {
            packet.get(16..).unwrap_or_default()
        } else {
            file = contents(fds.get(3).ok_or((0, c::EMFILE))?).map_err(|error| (0, error))?;
            &file
        };
        let mut strings = strings.split_inclusive(|byte| *byte == 0).map(CStr::from_bytes_with_nul);
        let mut next = || match strings.next() {
            Some(Ok(string)) => Ok(string),
            _ => Err((0, c::EINVAL)),
        };
        let count = |at| number(packet, at).ok_or((0, c::EINVAL));
        let (argc, envc) = (count(8)?, count(12)?);
        let cwd = next()?;
        let mut argv = Vec::new();
        for _ in 0..argc {
            argv.push(next()?);
        }
        let mut env = Vec::new();
        for _ in 0..envc {
            let variable = next()?;
            if !variable.to_bytes().starts_with(MARK) {
                env.push(variable);
            }
        }
        let mark = self.mark(id);
        let variable = CString::new([MARK, mark.to_string().as_bytes()].concat())
            .map_err(|_| (0, c::EINVAL))?;
        env.push(&variable);

        let program = look_up(argv.first().ok_or((0, c::EINVAL))?, cwd, &env)?;
        let setting = Setting {
            fds: [stdin, stdout, stderr].map(AsRawFd::as_raw_fd),
            terminal: flags & 1 != 0,
            cwd: cwd.to_owned(),
        };
        let pid = self
            .start(&program, &argv, &env, mark, setting)
            .map_err(|error| explain(error, &program, cwd))?;
        // The number may have been another command's whose processes are all gone.
        self.commands.retain(|_, command| command.pid != pid);
        if self.commands.len() > REMEMBERED {
            let oldest =
                self.commands.iter().find(|(_, command)| !command.running).map(|(id, _)| *id);
            if let Some(oldest) = oldest {
                self.commands.remove(&oldest);
            }
        }
        self.commands.insert(id, Command { pid, running: true, since: now() });
        Ok(pid)
    }

    /// The posix_spawn(3) itself; gives its errno.
    fn start(
        &mut self,
        program: &CStr,
        argv: &[&CStr],
        env: &[&CStr],
        mark: u64,
        setting: Setting,
    ) -> Result<i32, i32> {
        let pointers = |strings: &[&CStr]| -> Vec<*const c_char> {
            let strings = strings.iter().map(|string| string.as_ptr());
            strings.chain([std::ptr::null()]).collect()
        };
        let (argv, env) = (pointers(argv), pointers(env));
        let limit = c::RLimit { soft: mark, hard: self.locks.hard };
        // Commands that follow each other mostly agree in it: the kernel gives the
        // descriptors the same numbers, and the session has one directory.
        let actions = match self.actions.take() {
            Some(actions) if actions.setting == setting => actions,
            _ => Actions::new(setting)?,
        };
        let mut pid = 0;
        // SAFETY: every pointer is to a value or C string of this function, its callers or
        // `self` that outlives the calls; both pointer lists end with a null.
        let error = unsafe {
            // Best effort: a hard limit that is too low leaves the other marks.
            c::prlimit(0, c::RLIMIT_LOCKS, &raw const limit, std::ptr::null_mut());
            c::posix_spawn(
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

    fn mark(&self, id: u32) -> u64 {
        u64::from(self.nonce) << 32 | u64::from(id)
    }

    /// Collects every child that has ended, and tells of the commands among them.
    fn reap(&mut self) {
        loop {
            let mut status = 0;
            // SAFETY: `status` lives over the call. All children are ours to reap: this
            // program is an init.
            let pid = unsafe { c::waitpid(-1, &raw mut status, 1) };
            if pid <= 0 {
                if pid < 0 && errno() == c::ECHILD {
                    self.all_gone(0);
                }
                return;
            }
            let found =
                self.commands.iter_mut().find(|(_, command)| command.running && command.pid == pid);
            let Some((&id, command)) = found else {
                continue;
            };
            command.running = false;
            match status & 0x7f {
                0 => self.event(3, 0, id, (status >> 8 & 0xff).unsigned_abs()),
                signal => self.event(3, 1, id, signal.unsigned_abs()),
            }
            // At once: the owner is waiting.
            self.flush();
        }
    }

    /// Takes the notice of ended children away, before they are collected: one that ends
    /// in between gives a new notice.
    fn acknowledge(&self) {
        let mut info = [0u8; 128];
        // SAFETY: the descriptor is open and stays owned by `signals`; it is not closed here.
        let file =
            unsafe { std::mem::ManuallyDrop::new(File::from_raw_fd(self.signals.as_raw_fd())) };
        // One notice is kept for any number of children (signal(7)).
        let _ = (&*file).read(&mut info);
    }

    fn all_gone(&mut self, survivors: u32) {
        if std::mem::take(&mut self.awaited) {
            self.event(5, 0, 0, survivors);
        }
    }

    fn signal(&mut self, id: u32, signal: c_int, scope: u8) {
        if scope == 2 {
            self.scan(|process| {
                if process.command == id {
                    send_signal(process, signal);
                }
            });
            return;
        }
        // Only while the leader has not been reaped is its number certainly its own.
        let Some(command) = self.commands.get(&id).filter(|command| command.running) else {
            return;
        };
        let target = if scope == 1 { -command.pid } else { command.pid };
        // SAFETY: plain numbers; the target is a child of ours that was not reaped.
        unsafe { c::kill(target, signal) };
    }

    fn list(&mut self, id: u32) {
        let mut alive = Vec::new();
        self.scan(|process| {
            if !process.dead {
                let mut record = Vec::with_capacity(28);
                record.extend(process.pid.to_le_bytes());
                record.extend(process.parent.to_le_bytes());
                record.extend(process.command.to_le_bytes());
                record.extend(process.name);
                alive.push(record);
            }
        });
        let mut parts = alive.chunks(1000).peekable();
        // An empty list is one empty part.
        let mut first = true;
        while first || parts.peek().is_some() {
            first = false;
            let part = parts.next().unwrap_or_default();
            let mut event = header(6, u8::from(parts.peek().is_some()), id);
            event.extend(part.iter().flatten());
            self.outbox.push_back(event);
        }
    }

    fn begin_kill(&mut self, id: u32, announce: bool) {
        if id == 0 {
            self.ending = true;
            self.awaited |= announce;
        }
        self.kills.push(Kill {
            id,
            announce,
            hit: BTreeSet::new(),
            refused: BTreeSet::new(),
            clean: 0,
            pause: 0,
        });
    }

    /// One step for each tree being killed: scan and kill for as long as scans find
    /// something new, so that what forks as fast as it can does not get away.
    fn kill_step(&mut self) {
        for mut kill in std::mem::take(&mut self.kills) {
            if !self.kill_rounds(&mut kill) {
                self.kills.push(kill);
                continue;
            }
            let survivors = u32::try_from(kill.refused.len()).unwrap_or(u32::MAX);
            if kill.announce && kill.id != 0 {
                self.event(4, 0, kill.id, survivors);
            } else if kill.id == 0 {
                self.all_gone(survivors);
            }
        }
    }

    /// Whether the tree is gone.
    fn kill_rounds(&mut self, kill: &mut Kill) -> bool {
        for round in 0..ROUNDS {
            let mut fresh = false;
            let mut left = false;
            // Killed while the scan goes on: the sooner, the fewer children there are.
            self.scan(|process| {
                let key = (process.pid, process.started);
                let wanted = kill.id == 0 || process.command == kill.id;
                if !wanted || kill.refused.contains(&key) {
                    return;
                }
                let new = kill.hit.insert(key);
                fresh |= new;
                // A dead one counts when it is new: it may have ended between our look at
                // the list and at it, and left us a child that was not on the list.
                left |= new || !process.dead;
                if !new || process.dead {
                    return;
                }
                if send_signal(process, c::SIGKILL) == c::EPERM {
                    kill.refused.insert(key);
                }
                // A signal to a group reaches its members and their children being born
                // in one go: needed against what forks faster than we scan.
                if round > 1 && process.group > 1 && process.group == group_of(process.pid) {
                    // SAFETY: plain numbers. The group is not ours (we lead a session of
                    // our own, and members of it are never in a scan), and was that of a
                    // process of the tree just now.
                    unsafe { c::kill(-process.group, c::SIGKILL) };
                }
            });
            self.reap();
            if !left {
                kill.clean += 1;
                if kill.clean >= 2 {
                    return true;
                }
                continue;
            }
            kill.clean = 0;
            if !fresh {
                // All have got their signal; dying takes them a moment.
                kill.pause = (kill.pause * 2).clamp(1, 50);
                return false;
            }
        }
        kill.pause = 0;
        false
    }

    /// Shows everything alive or dead under this init, with the command each comes from,
    /// parents before their children.
    fn scan(&self, mut visit: impl FnMut(&Process)) {
        let me = i32::try_from(std::process::id()).unwrap_or(0);
        let mut seen = BTreeSet::from([me]);
        let table = if children(me).is_none() { Some(everybody()) } else { None };
        let of = |pid: i32| match &table {
            Some(table) => table.get(&pid).cloned().unwrap_or_default(),
            None => children(pid).unwrap_or_default(),
        };
        let mut open: Vec<(i32, u32)> = of(me).into_iter().map(|pid| (pid, 0)).collect();
        while let Some((pid, parents)) = open.pop() {
            // A process that moves while we look may turn up twice.
            if !seen.insert(pid) {
                continue;
            }
            let Some(mut process) = stat(pid) else { continue };
            process.command = self.claim(&process, parents);
            let command = process.command;
            visit(&process);
            open.extend(of(pid).into_iter().map(|child| (child, command)));
        }
    }

    /// The command that a process comes from, by the best evidence there is.
    fn claim(&self, process: &Process, parents: u32) -> u32 {
        let mut limit = c::RLimit::default();
        // SAFETY: `limit` lives over the call; nothing is set.
        let shown =
            unsafe { c::prlimit(process.pid, c::RLIMIT_LOCKS, std::ptr::null(), &raw mut limit) }
                == 0;
        let ours = |mark: u64| {
            let id = u32::try_from(mark & u64::from(u32::MAX)).ok()?;
            (id != 0 && self.mark(id) == mark).then_some(id)
        };
        let limit = shown.then_some(limit.soft).and_then(ours);
        if let Some(id) = limit.or_else(|| environment_mark(process.pid).and_then(ours)) {
            return id;
        }
        if parents != 0 {
            return parents;
        }
        let leads = |command: &Command| {
            [process.pid, process.session, process.group].contains(&command.pid)
        };
        if let Some((id, _)) = self.commands.iter().rev().find(|(_, command)| leads(command)) {
            return *id;
        }
        let mut running = self.commands.iter().filter(|(_, command)| command.running);
        match (running.next(), running.next()) {
            (Some((id, command)), None) if process.started >= command.since => *id,
            _ => 0,
        }
    }

    fn event(&mut self, kind: u8, flags: u8, id: u32, value: u32) {
        let mut event = header(kind, flags, id);
        event.extend(value.to_le_bytes());
        self.outbox.push_back(event);
    }

    /// Sends what the socket takes; the rest waits.
    fn flush(&mut self) {
        while let Some(event) = self.outbox.front() {
            // SAFETY: the buffer is as long as said and lives over the call.
            let sent = unsafe {
                c::send(
                    CONTROL,
                    event.as_ptr().cast(),
                    event.len(),
                    c::MSG_DONTWAIT | c::MSG_NOSIGNAL,
                )
            };
            if sent < 0 && Error::last_os_error().kind() == std::io::ErrorKind::WouldBlock {
                return;
            }
            // Any other failure means that the owner is gone; receive() will notice.
            self.outbox.pop_front();
        }
    }

    /// Reads one buffer from each ready drain and forgets it.
    fn drain(&mut self, ready: &[c_short]) {
        let mut at = 0;
        let buffer = &mut self.buffer;
        self.drains.retain(|fd| {
            let here = ready.get(at).copied().unwrap_or(0);
            at += 1;
            if here == 0 {
                return true;
            }
            // SAFETY: the descriptor is open and stays owned by `fd`; it is not closed here.
            let file = unsafe { std::mem::ManuallyDrop::new(File::from_raw_fd(fd.as_raw_fd())) };
            match (&*file).read(buffer) {
                Ok(count) => count > 0,
                Err(error) => matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                ),
            }
        });
    }
}

fn header(kind: u8, flags: u8, id: u32) -> Vec<u8> {
    let mut event = vec![kind, flags, 0, 0];
    event.extend(id.to_le_bytes());
    event
}

fn number(packet: &[u8], at: usize) -> Option<u32> {
    let bytes = packet.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// The descriptors in a control area (cmsg(3)): a length of 8 bytes that counts its own
/// header of 16, level 1 and type 1 (`SOL_SOCKET`, `SCM_RIGHTS`), then 4 bytes for each.
fn received(control: &[u64; 16], length: usize) -> Vec<OwnedFd> {
    let bytes: Vec<u8> = control.iter().flat_map(|word| word.to_le_bytes()).collect();
    let end = usize::try_from(control[0]).unwrap_or(0).min(length).min(bytes.len());
    if length < 16 || number(&bytes, 8) != Some(1) || number(&bytes, 12) != Some(1) {
        return Vec::new();
    }
    let raw =
        bytes.get(16..end).unwrap_or_default().chunks_exact(4).filter_map(|chunk| number(chunk, 0));
    // SAFETY: the kernel has just put these descriptors into our table for us to own.
    raw.filter_map(|fd| RawFd::try_from(fd).ok())
        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
        .collect()
}

/// The whole of a file that was sent to us, from its start.
fn contents(fd: &OwnedFd) -> Result<Vec<u8>, i32> {
    let failed = |error: Error| error.raw_os_error().unwrap_or(c::EINVAL);
    let file = File::from(fd.try_clone().map_err(failed)?);
    let length = file.metadata().map_err(failed)?.len();
    let mut bytes = vec![0; usize::try_from(length).map_err(|_| c::EINVAL)?];
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    Ok(bytes)
}

/// A path as a command sees it that starts in `cwd`.
fn seen_from(cwd: &CStr, path: &[u8]) -> Result<CString, Failure> {
    let full = match path.first() {
        Some(b'/') => path.to_vec(),
        _ => [cwd.to_bytes(), b"/", path].concat(),
    };
    CString::new(full).map_err(|_| (0, c::EINVAL))
}

/// The path to execute for a program's name, as execvp(3) finds it: a name with a slash
/// is a path; any other is looked for in `PATH`, where a file that may not be executed is
/// passed over but remembered.
fn look_up(name: &CStr, cwd: &CStr, env: &[&CStr]) -> Result<CString, Failure> {
    if name.to_bytes().contains(&b'/') {
        return Ok(name.to_owned());
    }
    if name.is_empty() {
        return Err((2, c::ENOENT));
    }
    let path = env
        .iter()
        .find_map(|variable| variable.to_bytes().strip_prefix(b"PATH="))
        .unwrap_or(DEFAULT_PATH);
    let mut answer = c::ENOENT;
    for folder in path.split(|byte| *byte == b':') {
        let candidate = seen_from(cwd, &[folder, b"/", name.to_bytes()].concat());
        // An empty entry is the working directory.
        let candidate = match folder {
            [] => seen_from(cwd, name.to_bytes())?,
            _ => candidate?,
        };
        match check(&candidate) {
            0 => return Ok(candidate),
            c::EACCES => answer = c::EACCES,
            _ => {}
        }
    }
    // Without its directory, a relative PATH finds nothing.
    match enter(cwd) {
        0 => Err((2, answer)),
        error => Err((1, error)),
    }
}

/// The errno that stands in the way of executing this file; 0 if none can be seen.
fn check(path: &CStr) -> i32 {
    let meta = std::fs::metadata(Path::new(std::ffi::OsStr::from_bytes(path.to_bytes())));
    match meta {
        Ok(meta) if meta.is_dir() => c::EISDIR,
        // SAFETY: a C string.
        Ok(_) if unsafe { c::access(path.as_ptr(), 1) } == 0 => 0,
        Ok(_) => errno(),
        Err(error) => match error.raw_os_error() {
            // A part of the path that is a file means that there is no such program.
            Some(c::ENOTDIR) | None => c::ENOENT,
            Some(error) => error,
        },
    }
}

/// The errno of entering a directory, 0 if it can be entered. Leaves us in `/`.
fn enter(cwd: &CStr) -> i32 {
    // SAFETY: C strings.
    unsafe {
        let error = if c::chdir(cwd.as_ptr()) == 0 { 0 } else { errno() };
        c::chdir(c"/".as_ptr());
        error
    }
}

/// What a failed start was about: posix_spawn(3) gives one errno for all of its steps, so
/// what could have failed is looked at, in their order.
fn explain(error: i32, program: &CStr, cwd: &CStr) -> Failure {
    let cwd_error = enter(cwd);
    if cwd_error != 0 {
        return (1, cwd_error);
    }
    let Ok(full) = seen_from(cwd, program.to_bytes()) else {
        return (0, error);
    };
    match (check(&full), error) {
        (seen @ (c::ENOENT | c::EACCES | c::EISDIR), _) => (2, seen),
        // The program is there, so what is missing is what it needs to run.
        (0, c::ENOENT) => (3, error),
        (_, c::EACCES) => (2, error),
        _ => (0, error),
    }
}

/// Clock ticks (1/100 s) since boot.
fn now() -> u64 {
    let mut time = c::TimeSpec::default();
    // SAFETY: `time` lives over the call.
    unsafe { c::clock_gettime(c::CLOCK_BOOTTIME, &raw mut time) };
    let hundredths = time.seconds * 100 + time.nanoseconds / 10_000_000;
    hundredths.unsigned_abs()
}

/// Sends a signal to a process that a scan found; gives the errno, 0 for success.
fn send_signal(process: &Process, signal: c_int) -> i32 {
    let me = i32::try_from(std::process::id()).unwrap_or(0);
    if process.parent == me {
        // SAFETY: plain numbers. A child of ours keeps its number until we reap it, which
        // happens in no scan.
        return if unsafe { c::kill(process.pid, signal) } == 0 { 0 } else { errno() };
    }
    // Others may be reaped by their parents at any time, and their numbers used again. A
    // descriptor holds on to one process; then it is made sure that it is the one meant.
    // SAFETY: plain numbers.
    let fd = unsafe { c::syscall(c::SYS_PIDFD_OPEN, c_long::from(process.pid), 0 as c_long) };
    if fd < 0 {
        let error = errno();
        if error != c::ENOSYS {
            return error;
        }
        // Kernels before 5.3.
        // SAFETY: plain numbers.
        return if unsafe { c::kill(process.pid, signal) } == 0 { 0 } else { errno() };
    }
    let Ok(raw) = RawFd::try_from(fd) else { return c::ESRCH };
    // SAFETY: pidfd_open made this descriptor just now.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    if stat(process.pid).is_none_or(|now| now.started != process.started) {
        return c::ESRCH;
    }
    let none = std::ptr::null::<c_void>();
    // SAFETY: an open descriptor, a number, no details, no flags.
    match unsafe {
        c::syscall(
            c::SYS_PIDFD_SEND_SIGNAL,
            c_long::from(fd.as_raw_fd()),
            c_long::from(signal),
            none,
            0 as c_long,
        )
    } {
        0 => 0,
        _ => errno(),
    }
}

fn group_of(pid: i32) -> i32 {
    stat(pid).map_or(0, |process| process.group)
}

/// What /proc/PID/stat says (proc_pid_stat(5)).
fn stat(pid: i32) -> Option<Process> {
    let bytes = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything, so it ends at the last parenthesis.
    let open = bytes.iter().position(|byte| *byte == b'(')?;
    let close = bytes.iter().rposition(|byte| *byte == b')')?;
    let mut name = [0; 16];
    for (to, from) in name.iter_mut().zip(bytes.get(open + 1..close)?) {
        *to = *from;
    }
    let rest = std::str::from_utf8(bytes.get(close + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let field = |at: usize| fields.get(at).and_then(|text| text.parse::<i64>().ok());
    let small = |at| field(at).and_then(|value| i32::try_from(value).ok());
    let ended = matches!(fields.first(), Some(&("Z" | "X")));
    Some(Process {
        pid,
        parent: small(1)?,
        group: small(2)?,
        session: small(3)?,
        started: fields.get(19)?.parse().ok()?,
        // A process whose first thread has ended is shown as a zombie while others run.
        dead: ended && field(17)? <= 1,
        name,
        command: 0,
    })
}

/// The children of a process, or nothing if the kernel has no such list
/// (`CONFIG_PROC_CHILDREN`) or the process is gone.
fn children(pid: i32) -> Option<Vec<i32>> {
    let mut found = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        match std::fs::read_to_string(thread.path().join("children")) {
            Ok(list) => found
                .extend(list.split_ascii_whitespace().filter_map(|pid| pid.parse::<i32>().ok())),
            Err(error)
                if error.kind() == std::io::ErrorKind::NotFound && thread.path().exists() =>
            {
                return None;
            }
            // The thread has ended.
            Err(_) => {}
        }
    }
    Some(found)
}

/// Every process there is, by its parent.
fn everybody() -> BTreeMap<i32, Vec<i32>> {
    let mut table: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
        if let Some(process) = stat(pid) {
            table.entry(process.parent).or_default().push(pid);
        }
    }
    table
}

fn environment_mark(pid: i32) -> Option<u64> {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let value =
        environment.split(|byte| *byte == 0).find_map(|variable| variable.strip_prefix(MARK))?;
    std::str::from_utf8(value).ok()?.parse().ok()
}
