//! `denizen-init`: the first process of an instance.
//!
//! It is the child subreaper (prctl(2)) of everything a session runs, so that no process
//! can leave it: it starts commands on request, reaps whatever ends, tells the owner, and
//! kills trees. When its control socket closes, because the owner closed it or died, it
//! kills all it has and exits; in a sandbox that may go on without its owner, see below. It
//! must never start anything by itself, hold a descriptor that is not its own, block on its
//! owner, or panic (its processes would be orphans).
//!
//! Run as `denizen-init NONCE`, with the control socket (`AF_UNIX`, `SOCK_SEQPACKET`) as
//! descriptor 0. One packet is one message; numbers are little-endian. A message begins
//! with `kind: u8, flags: u8, 0: u16, id: u32`. Requests, with what follows:
//!
//! | kind | name | follows |
//! |---|---|---|
//! | 1 | spawn | argc u32, envc u32, the strings, each ended by a zero byte: cwd, argv, env; descriptors: stdin, stdout, stderr. Flag 1: stdin becomes the controlling terminal. Flag 2: the strings are in a fourth descriptor, a file. Flag 4: the first string is the name of the user that it runs as, found where it runs; the directory is theirs ([`users`]) |
//! | 2 | signal | number u32; flags is the scope: 0 leader, 1 its group, 2 its tree |
//! | 3 | kill | – ; the tree of `id`, or with id 0 everything. Flag 1: say when it is gone. Flag 2: everything, and go on serving; `id` is only for the answer |
//! | 4 | list | – |
//! | 5 | end | – ; SIGTERM to everything, no more spawns, say when all is gone |
//! | 6 | drain | one descriptor, to be read to its end and thrown away |
//! | 8 | terminal | – ; make a terminal, give its master end |
//! | 9 | connect | port u32; connect to it on 127.0.0.1, give the socket |
//! | 7 | enter | milliseconds u32, or nothing; a descriptor, a file with a plan ([`enter`]): become the first process of a sandbox; before anything else. Further descriptors: a socket that is bound, then what is to stay open outside, for as long as the sandbox is there |
//! | 10 | keep | descriptors, copies of the ends that the outputs of `id` are read from; it goes on without its owner |
//!
//! Events: 1 spawned (pid u32); 2 failed (errno u32; flags is the stage: 0 to start it,
//! 1 the directory, 2 the program, 3 its interpreter, 4 the user); 3 exited (u32; flags 0 code, 1
//! signal); 4 tree gone (u32 processes that could not be killed); 5 all gone (the same);
//! 6 a part of the list (28 bytes each: pid, parent, command, 16 bytes of name; flag 1:
//! more parts follow); 7 entered; 8 refused (errno u32, then the
//! step in words); 9 what was asked for (errno u32; one descriptor, or
//! none if the errno is not 0); 10 found (the way of speaking u32; id is the last that a
//! command had). With 7 and 10 comes what the plan has for the owner.
//!
//! In a sandbox it is process 1, process ids are those of its namespace, and the process that
//! was launched waits outside, for the owner to reap.
//!
//! An owner that gave a socket and a time with its plan may die, or leave by closing its own
//! without a word: then commands end as if their handles had been dropped, all but those to be
//! kept and what others have left running, and for that time the next owner may connect to the
//! socket ([`linger`]). It is told 10 first. One that half-closes its socket, or has asked for
//! the end of everything before, is not waited for.
//!
//! A kernel that runs it as `/init` gets a whole machine's first process of it ([`boot`]).
//!
//! To know which command a process comes from, even when it has become a daemon with an
//! empty environment, a command is started with a soft `RLIMIT_LOCKS` of
//! `NONCE << 32 | id`. Linux has not looked at that limit since 2.4.25, but it keeps it,
//! passes it on by fork and execve, and shows it (prlimit(2)). `DENIZEN_COMMAND` holds
//! the same number for those that reset their limits. Init itself has the mark with the id 0,
//! so that all of an instance can be found by its number when init and owner were both killed.

#![deny(unsafe_code)]

#[cfg(not(all(target_os = "linux", target_pointer_width = "64", target_endian = "little")))]
compile_error!("denizen-init is for 64-bit little-endian Linux");

mod boot;
mod enter;
mod linger;
mod processes;
mod start;
mod sudo;
#[allow(unsafe_code, reason = "system calls; see there")]
mod sys;
mod users;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

use linger::Linger;
use processes::{MARK, Process};
use start::Failure;
use sudo::Sudo;
use sys::{CONTROL, Forked, PollFd};

/// The largest packet: the owner puts longer strings into a file.
const PACKET: usize = 32 * 1024;
/// The largest file: ten times what the kernel takes as arguments (execve(2)).
const FILE: usize = 64 * 1024 * 1024;
/// How many ended commands are remembered, for processes that can only be told by their
/// session or group.
const REMEMBERED: usize = 1024;
/// How often a scan that goes on finding new processes is repeated at once, before other
/// requests get their turn.
const ROUNDS: usize = 256;

fn main() {
    if sys::own_number() == 1 && std::env::args_os().next().is_some_and(|name| name == "/init") {
        boot::boot();
    }
    let nonce: u32 = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(0);
    let Ok(signals) = sys::become_init(u64::from(nonce) << 32) else {
        std::process::exit(1);
    };
    let mut init = Init::new(nonce, signals);
    init.run();
    // What is left is closed as this ends, which waits for nothing.
    sys::leave();
}

/// A command whose leader was started, and perhaps has ended.
struct Command {
    pid: i32,
    running: bool,
    /// Goes on without its owner.
    kept: bool,
    /// When it was started, in clock ticks since boot, as in /proc/PID/stat.
    since: u64,
}

/// A tree (or everything) that is being killed.
struct Kill {
    id: u32,
    everything: bool,
    announce: bool,
    /// What already got its signal, by pid and start time.
    hit: BTreeSet<(i32, u64)>,
    /// What this user may not kill.
    refused: BTreeSet<(i32, u64)>,
    /// Scans in a row that found nothing left. One is not enough: the kernel's list of
    /// children may skip one while another leaves it (`proc_pid_children(5)`).
    clean: u8,
    /// Milliseconds until the next look.
    pause: i32,
}

/// What poll(2) found.
struct Ready {
    control: i16,
    signals: i16,
    drains: Vec<i16>,
    sudo: i16,
    linger: Vec<i16>,
}

#[derive(PartialEq, Eq)]
enum Phase {
    /// It can still become the first process of a sandbox.
    Fresh,
    Serving,
    /// No more spawns.
    Ending,
}

struct Init {
    nonce: u32,
    signals: OwnedFd,
    spawner: sys::Spawner,
    commands: BTreeMap<u32, Command>,
    kills: Vec<Kill>,
    drains: Vec<OwnedFd>,
    outbox: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
    buffer: Vec<u8>,
    phase: Phase,
    /// The owner wants to know when the last process is gone.
    awaited: bool,
    /// The owner is gone, and no other is waited for.
    owner_gone: bool,
    /// How other owners come in.
    linger: Option<Linger>,
    /// Who starts commands as others from within.
    sudo: Option<Sudo>,
    /// The last command's number.
    last_id: u32,
}

impl Init {
    fn new(nonce: u32, signals: OwnedFd) -> Self {
        Self {
            nonce,
            signals,
            spawner: sys::Spawner::new(),
            commands: BTreeMap::new(),
            kills: Vec::new(),
            drains: Vec::new(),
            outbox: VecDeque::new(),
            buffer: vec![0; 2 * PACKET],
            phase: Phase::Fresh,
            awaited: false,
            owner_gone: false,
            linger: None,
            sudo: None,
            last_id: 0,
        }
    }

    /// Serves until the owner is gone and nothing is left.
    fn run(&mut self) {
        loop {
            let ready = self.wait();
            if ready.control & !sys::POLLOUT != 0 {
                self.receive(ready.control & sys::POLLHUP == 0);
            }
            if ready.signals != 0 {
                self.acknowledge();
                self.reap();
            }
            self.drain(&ready.drains);
            self.let_in(ready.sudo);
            if self.linger.as_mut().is_some_and(|it| it.seen(&ready.linger)) {
                self.be_found();
            }
            self.kill_step();
            self.flush();
            if self.linger.as_ref().and_then(Linger::time_left) == Some(Duration::ZERO) {
                self.linger = None;
                self.end();
            }
            if self.owner_gone && self.kills.is_empty() {
                return;
            }
        }
    }

    /// Waits for something to do.
    fn wait(&self) -> Ready {
        let out = if self.outbox.is_empty() { 0 } else { sys::POLLOUT };
        let entry = |fd, events| PollFd { fd, events, revents: 0 };
        // A negative descriptor is skipped.
        let alone = self.linger.as_ref().is_some_and(Linger::is_alone);
        let control = if self.owner_gone || alone { -1 } else { CONTROL };
        let mut fds =
            vec![entry(control, sys::POLLIN | out), entry(self.signals.as_raw_fd(), sys::POLLIN)];
        fds.extend(self.drains.iter().map(|fd| entry(fd.as_raw_fd(), sys::POLLIN)));
        fds.push(self.sudo.as_ref().map_or(entry(-1, 0), Sudo::look_at));
        if let Some(linger) = &self.linger {
            linger.look_at(&mut fds);
        }
        let left = self.linger.as_ref().and_then(Linger::time_left);
        let left = left.map(|left| i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX));
        let pause = self.sudo.as_ref().and_then(Sudo::pause);
        let pauses = self.kills.iter().map(|kill| kill.pause).chain(pause);
        let timeout = pauses.chain(left).min().unwrap_or(-1);
        sys::wait_ready(&mut fds, timeout);
        let mut found = fds.iter().map(|fd| fd.revents);
        Ready {
            control: found.next().unwrap_or(0),
            signals: found.next().unwrap_or(0),
            drains: found.by_ref().take(self.drains.len()).collect(),
            sudo: found.next().unwrap_or(0),
            linger: found.collect(),
        }
    }

    /// Takes one request; poll(2) tells of more. At its end, `half` says that the socket is
    /// closed in one direction only.
    fn receive(&mut self, half: bool) {
        match sys::receive(&CONTROL, &mut self.buffer) {
            Ok((count @ 1.., descriptors)) => {
                let packet = self.buffer.get(..count).unwrap_or_default().to_vec();
                self.request(&packet, descriptors);
            }
            // The last is told once, before what an owner that is gone has sent.
            Err(sys::EINTR | sys::EAGAIN | sys::ECONNRESET) => {}
            _ if half || self.phase != Phase::Serving => self.end(),
            _ => self.be_alone(),
        }
    }

    /// Ends everything, and then itself.
    fn end(&mut self) {
        self.owner_gone = true;
        self.begin_kill(0, false, false);
    }

    /// Goes on without an owner, if that is wanted.
    fn be_alone(&mut self) {
        let Some(linger) = &mut self.linger else { return self.end() };
        self.drains.append(&mut linger.be_alone());
        self.outbox.clear();
        let orphans = self.commands.iter().filter(|(_, command)| command.running && !command.kept);
        let orphans: Vec<u32> = orphans.map(|(id, _)| *id).collect();
        for id in orphans {
            self.begin_kill(id, false, false);
        }
    }

    /// Lets a new owner in.
    fn be_found(&mut self) {
        if let Some(Ok(door)) = self.linger.as_mut().map(Linger::let_in) {
            // What nobody was there to hear is of no use to it.
            self.outbox.clear();
            let mut event = header(10, 0, self.last_id);
            event.extend(linger::VERSION.to_le_bytes());
            self.outbox.push_back((event, door));
        }
    }

    fn request(&mut self, packet: &[u8], mut descriptors: Vec<OwnedFd>) {
        let (Some(&kind), Some(&flags), Some(id)) =
            (packet.first(), packet.get(1), number(packet, 4))
        else {
            return;
        };
        match kind {
            1 => match self.spawn(id, flags, packet, &descriptors, true) {
                Ok(pid) => {
                    let command = Command { pid, running: true, kept: false, since: sys::now() };
                    self.commands.insert(id, command);
                    self.last_id = id;
                    self.event(1, 0, id, pid.unsigned_abs());
                }
                Err((stage, error)) => self.event(2, stage, id, error.unsigned_abs()),
            },
            2 => {
                let signal = number(packet, 8).and_then(|n| i32::try_from(n).ok()).unwrap_or(0);
                self.signal(id, signal, flags);
            }
            3 => self.begin_kill(id, flags & 1 != 0, flags & 2 != 0),
            4 => self.list(id),
            5 => {
                self.phase = Phase::Ending;
                self.awaited = true;
                // A stopped process would sleep through its own end.
                for signal in [sys::SIGTERM, sys::SIGCONT] {
                    self.signal_all(signal);
                }
                self.reap();
            }
            6 => self.drains.append(&mut descriptors),
            7 => self.enter(packet, descriptors),
            8 => self.give(id, terminal()),
            9 => {
                let port = number(packet, 8).and_then(|port| u16::try_from(port).ok());
                self.give(id, port.ok_or(sys::EINVAL).and_then(sys::sandbox::connect));
            }
            10 => {
                if let (Some(linger), Some(command)) =
                    (&mut self.linger, self.commands.get_mut(&id))
                {
                    command.kept = true;
                    linger.keep(descriptors);
                }
            }
            _ => {}
        }
    }

    fn give(&mut self, id: u32, made: Result<OwnedFd, i32>) {
        let (errno, descriptor) = match made {
            Ok(descriptor) => (0, Some(descriptor)),
            Err(errno) => (errno, None),
        };
        let mut event = header(9, 0, id);
        event.extend(errno.to_le_bytes());
        self.outbox.push_back((event, descriptor));
    }

    /// Goes on as the first process of a sandbox, or not at all.
    fn enter(&mut self, packet: &[u8], descriptors: Vec<OwnedFd>) {
        if self.phase != Phase::Fresh {
            return self.refuse("enter", sys::EINVAL);
        }
        self.phase = Phase::Serving;
        let mut descriptors = descriptors.into_iter();
        let plan = descriptors.next().ok_or(sys::EMFILE).and_then(|plan| contents(&plan));
        let entered = plan.map_err(|error| ("plan".to_owned(), error));
        let (listener, outside) = (descriptors.next(), descriptors.collect());
        match entered.and_then(|plan| enter::enter(&plan, listener, outside)) {
            Ok(enter::Entered::Inside { door, listener, key, sudo }) => {
                self.spawner.use_key(key);
                self.sudo = sudo;
                if let Some(listener) = listener {
                    let time = Duration::from_millis(number(packet, 8).unwrap_or(0).into());
                    let copy = door.as_ref().and_then(|door| door.try_clone().ok());
                    self.linger = Some(Linger::new(listener, time, copy));
                }
                self.outbox.push_back((header(7, 0, 0), door));
                self.flush();
            }
            Ok(enter::Entered::Ended(status)) => std::process::exit(status),
            Err((step, error)) => {
                self.refuse(&step, error);
                self.flush();
                std::process::exit(1);
            }
        }
    }

    fn refuse(&mut self, step: &str, error: i32) {
        let mut event = header(8, 0, 0);
        event.extend(error.unsigned_abs().to_le_bytes());
        // A word of a plan may be longer than a packet.
        event.extend(step.bytes().take(1024));
        self.outbox.push_back((event, None));
    }

    /// Has somebody within served who wants to start a command as somebody else.
    fn let_in(&mut self, ready: i16) {
        let Some(mut caller) = self.sudo.as_mut().and_then(|sudo| sudo.next(ready)) else { return };
        let id = self.command_of(caller.pid);
        // Whoever had to wait may be gone, and the number another's.
        let is_known = id != 0 && *caller.command.get_or_insert(id) == id;
        // The process that serves them has it, too.
        self.spawner.set_mark(self.mark(id));
        match sys::fork_with(&caller.socket, &self.signals) {
            Ok(Forked::Here(pid)) => {
                drop(caller);
                // It waits for that: the last to close the socket would be held up by what is
                // on its way there.
                sys::signal_number(pid, sys::SIGCHLD);
            }
            Ok(Forked::There(signals)) => {
                let may = || is_known && caller.may();
                sudo::serve(&signals, may, |packet, descriptors| {
                    let flags = packet.get(1).copied().unwrap_or(0);
                    self.spawn(id, flags, packet, descriptors, false)
                });
                sys::leave();
            }
            Err(_) => {
                if let Some(sudo) = &mut self.sudo {
                    sudo.wait(caller);
                }
            }
        }
    }

    /// Starts something that belongs to a command, whose descriptors are its own or others' too.
    /// Its start has failed or succeeded when this returns: what execve said is known.
    fn spawn(
        &mut self,
        id: u32,
        flags: u8,
        packet: &[u8],
        fds: &[OwnedFd],
        owned: bool,
    ) -> Result<i32, Failure> {
        if self.phase == Phase::Ending {
            return Err((0, sys::ESHUTDOWN));
        }
        self.phase = Phase::Serving;
        // Descriptors that do not fit into our table are left out by the kernel.
        let (Some(stdin), Some(stdout), Some(stderr)) = (fds.first(), fds.get(1), fds.get(2))
        else {
            return Err((0, sys::EMFILE));
        };
        let file;
        let strings = if flags & 2 == 0 {
            packet.get(16..).unwrap_or_default()
        } else {
            file = contents(fds.get(3).ok_or((0, sys::EMFILE))?).map_err(|error| (0, error))?;
            &file
        };
        let mut strings = strings.split_inclusive(|byte| *byte == 0).map(CStr::from_bytes_with_nul);
        let mut next = || match strings.next() {
            Some(Ok(string)) => Ok(string),
            _ => Err((0, sys::EINVAL)),
        };
        let count = |at| number(packet, at).ok_or((0, sys::EINVAL));
        let (argc, envc) = (count(8)?, count(12)?);
        let user = match flags & 4 {
            0 => None,
            _ => Some(users::find(next()?.to_bytes()).map_err(|error| (4, error))?),
        };
        let cwd = next()?;
        let folder = user.as_ref().map(|user| CString::new(user.folder(cwd.to_bytes())));
        let folder = folder.transpose().map_err(|_| (0, sys::EINVAL))?;
        let cwd = folder.as_deref().unwrap_or(cwd);
        let theirs = user.as_ref().map(users::User::environment).unwrap_or_default();
        let theirs = theirs.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>();
        let theirs = theirs.map_err(|_| (0, sys::EINVAL))?;
        let mut arguments = Vec::new();
        for _ in 0..argc {
            arguments.push(next()?);
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
            .map_err(|_| (0, sys::EINVAL))?;
        env.push(&variable);
        for own in &theirs {
            let name = own.to_bytes().split_inclusive(|byte| *byte == b'=').next();
            let name = name.unwrap_or_default();
            if !env.iter().any(|variable| variable.to_bytes().starts_with(name)) {
                env.push(own);
            }
        }

        let program = start::look_up(arguments.first().ok_or((0, sys::EINVAL))?, cwd, &env)?;
        let setting = sys::Setting {
            fds: [stdin, stdout, stderr].map(AsRawFd::as_raw_fd),
            terminal: flags & 1 != 0,
            owned,
            cwd: cwd.to_owned(),
        };
        let pid = match &user {
            None => self.spawner.start(&program, &arguments, &env, mark, setting),
            Some(user) => {
                self.spawner.start_as(user, &program, &arguments, &env, mark, &setting)?
            }
        };
        let pid = pid.map_err(|error| start::explain(error, &program, cwd))?;
        // The number may have been another command's whose processes are all gone.
        self.commands.retain(|_, command| command.pid != pid);
        if self.commands.len() > REMEMBERED {
            let oldest =
                self.commands.iter().find(|(_, command)| !command.running).map(|(id, _)| *id);
            if let Some(oldest) = oldest {
                self.commands.remove(&oldest);
            }
        }
        Ok(pid)
    }

    fn mark(&self, id: u32) -> u64 {
        u64::from(self.nonce) << 32 | u64::from(id)
    }

    /// Collects every child that has ended, and tells of the commands among them.
    fn reap(&mut self) {
        loop {
            let (pid, status) = match sys::reap_any() {
                Ok(Some(ended)) => ended,
                Err(sys::ECHILD) => return self.all_gone(0),
                _ => return,
            };
            let found =
                self.commands.iter_mut().find(|(_, command)| command.running && command.pid == pid);
            let Some((&id, command)) = found else {
                continue;
            };
            command.running = false;
            let (how, value) = ending(status);
            self.event(3, how, id, value.unsigned_abs());
            // At once: the owner is waiting.
            self.flush();
        }
    }

    /// Takes the notice of ended children away, before they are collected: one that ends
    /// in between gives a new notice.
    fn acknowledge(&self) {
        // One notice is kept for any number of children (signal(7)).
        let _ = sys::read(&self.signals, &mut [0; 128]);
    }

    fn all_gone(&mut self, survivors: u32) {
        if std::mem::take(&mut self.awaited) {
            self.event(5, 0, 0, survivors);
        }
    }

    fn signal(&mut self, id: u32, signal: i32, scope: u8) {
        if scope == 2 {
            self.scan(|process| {
                if process.command == id {
                    process.signal(signal);
                }
            });
            return;
        }
        // Only while the leader has not been reaped is its number certainly its own.
        let Some(command) = self.commands.get(&id).filter(|command| command.running) else {
            return;
        };
        let target = if scope == 1 { -command.pid } else { command.pid };
        sys::signal_number(target, signal);
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
            self.outbox.push_back((event, None));
        }
    }

    fn begin_kill(&mut self, id: u32, announce: bool, everything: bool) {
        if id == 0 {
            self.phase = Phase::Ending;
            self.awaited |= announce;
        }
        self.kills.push(Kill {
            id,
            everything: everything || id == 0,
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
        if self.kills.is_empty() {
            return;
        }
        // Thousands of busy processes would leave us a thousandth of the processor.
        sys::hurry(true);
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
        sys::hurry(false);
    }

    /// Signals everything; all of a sandbox in one go, which nothing can outrun (kill(2)).
    fn signal_all(&self, signal: i32) {
        if sys::own_number() == 1 {
            sys::signal_number(-1, signal);
        } else {
            self.scan(|process| {
                process.signal(signal);
            });
        }
    }

    /// Whether the tree is gone.
    fn kill_rounds(&mut self, kill: &mut Kill) -> bool {
        if kill.everything && sys::own_number() == 1 {
            self.signal_all(sys::SIGKILL);
            self.reap();
            kill.pause = 1;
            return !sys::has_children();
        }
        for round in 0..ROUNDS {
            let mut fresh = false;
            let mut left = false;
            // Killed while the scan goes on: the sooner, the fewer children there are.
            self.scan(|process| {
                let key = (process.pid, process.started);
                let wanted = kill.everything || process.command == kill.id;
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
                if process.signal(sys::SIGKILL) == sys::EPERM {
                    kill.refused.insert(key);
                }
                // A signal to a group reaches its members and their children being born
                // in one go: needed against what forks faster than we scan.
                // It is not ours: we lead a session of our own, which is in no scan.
                if round > 1 && process.group > 1 && process.is_in_its_group() {
                    sys::signal_number(-process.group, sys::SIGKILL);
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
        let me = sys::own_number();
        let mut seen = BTreeSet::from([me]);
        let direct = processes::children(me, 1);
        let table = if direct.is_none() { Some(processes::everybody()) } else { None };
        let of = |pid: i32, threads: i64| match &table {
            Some(table) => table.get(&pid).cloned(),
            None => processes::children(pid, threads),
        };
        let direct = direct.or_else(|| of(me, 1)).unwrap_or_default();
        let mut open: Vec<(i32, u32)> = direct.into_iter().map(|pid| (pid, 0)).collect();
        while let Some((pid, parents)) = open.pop() {
            // A process that moves while we look may turn up twice.
            if !seen.insert(pid) {
                continue;
            }
            let Some(mut process) = processes::stat(pid) else { continue };
            process.command = self.claim(&process, parents);
            let command = process.command;
            visit(&process);
            open.extend(
                of(pid, process.threads).into_iter().flatten().map(|child| (child, command)),
            );
        }
    }

    /// The command that a process under this init comes from, which may be known of one above it
    /// only.
    fn command_of(&self, pid: i32) -> u32 {
        let mut above = Some(pid);
        while let Some(process) = above.and_then(processes::stat) {
            match self.claim(&process, 0) {
                0 => above = (process.parent > 1).then_some(process.parent),
                id => return id,
            }
        }
        0
    }

    /// The command that a process comes from, by the best evidence there is.
    fn claim(&self, process: &Process, parents: u32) -> u32 {
        let ours = |mark: u64| {
            let id = u32::try_from(mark & u64::from(u32::MAX)).ok()?;
            (id != 0 && self.mark(id) == mark).then_some(id)
        };
        let limit = sys::soft_locks(process.pid).and_then(ours);
        if let Some(id) = limit.or_else(|| processes::environment_mark(process.pid).and_then(ours))
        {
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
        self.outbox.push_back((event, None));
    }

    /// Sends what the socket takes; the rest waits.
    fn flush(&mut self) {
        while let Some((event, descriptor)) = self.outbox.front() {
            if sys::transmit(&CONTROL, event, descriptor.as_ref()) == Err(sys::EAGAIN) {
                return;
            }
            // Any other failure means that the owner is gone; receive() will notice.
            self.outbox.pop_front();
        }
    }

    /// Reads one buffer from each ready drain and forgets it.
    fn drain(&mut self, ready: &[i16]) {
        let mut at = 0;
        let buffer = &mut self.buffer;
        self.drains.retain(|fd| {
            let here = ready.get(at).copied().unwrap_or(0);
            at += 1;
            if here == 0 {
                return true;
            }
            match sys::read(fd, buffer) {
                Ok(count) => count > 0,
                Err(error) => {
                    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
                }
            }
        });
    }
}

/// A terminal's master end.
fn terminal() -> Result<OwnedFd, i32> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(sys::NO_TERMINAL);
    // In a sandbox, the one that what runs there cannot put something else in the place of.
    let opened = match options.open("/dev/pts/ptmx") {
        Err(_) if sys::own_number() != 1 => options.open("/dev/ptmx"),
        opened => opened,
    };
    opened.map(OwnedFd::from).map_err(|error| error.raw_os_error().unwrap_or(sys::EINVAL))
}

fn header(kind: u8, flags: u8, id: u32) -> Vec<u8> {
    let mut event = vec![kind, flags, 0, 0];
    event.extend(id.to_le_bytes());
    event
}

/// How a child has ended (wait(2)), as `exited` tells it: whether by a signal, and that or its code.
fn ending(status: i32) -> (u8, i32) {
    match status & 0x7f {
        0 => (0, status >> 8 & 0xff),
        signal => (1, signal),
    }
}

fn number(packet: &[u8], at: usize) -> Option<u32> {
    let bytes = packet.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// The whole of a file that was sent to us, from its start. Not more than fits: running out
/// of memory would be our end.
fn contents(fd: &OwnedFd) -> Result<Vec<u8>, i32> {
    let failed = |error: Error| error.raw_os_error().unwrap_or(sys::EINVAL);
    let file = File::from(fd.try_clone().map_err(failed)?);
    let length = usize::try_from(file.metadata().map_err(failed)?.len());
    let length = length.ok().filter(|length| *length <= FILE).ok_or(sys::E2BIG)?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    Ok(bytes)
}
