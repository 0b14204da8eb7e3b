//! The owner's end of `denizen-init`: launches the program, asks it to start, signal,
//! list and kill, and passes on what it tells. One thread per init reads its events and
//! reaps it in the end, so that nothing here depends on a tokio runtime being alive. It
//! must never wait for any process but the init itself.

mod found;
mod machine;

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::OsString;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType, recvmsg, sendmsg, shutdown,
    socketpair,
};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::sync::{oneshot, watch};

pub use self::found::Linger;
pub use self::machine::{Machine, Started as MachineStarted};
use crate::message::{self, Event, Stage};
use crate::{Error, Exit, Result, Scope, program, sweep};

/// More than any packet of init: 1,000 processes of a listing.
const PACKET: usize = 32 * 1024;
/// Bigger than any argument list the kernel takes (6 MiB, execve(2)); beyond it init is
/// not even asked.
const HUGE: usize = 64 * 1024 * 1024;

/// More than one session can have: an init that lists more, lies.
const MOST_PROCESSES: usize = 1 << 18;
/// More requests than honest work leaves waiting for an init.
const MOST_WAITING: usize = 1 << 12;
/// How often the first process of a sandbox is started if it is killed before it is inside.
const STARTS: u32 = 5;
/// How long the first process of a sandbox may take to answer, to begin and to end. It shares
/// the sandbox's limits, so this is generous.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long it may take to be gone once it was told to: all of its sandbox can be ended from
/// here, whatever runs wild in it.
const ENDING: Duration = Duration::from_secs(2);
/// The same of one in a machine, whose kernel writes to its disk what is not yet there.
const MACHINE_ENDING: Duration = Duration::from_secs(30);
/// The stack of an init's thread, and of one that has a machine made.
const STACK: usize = 256 * 1024;
const MACHINE_STACK: usize = 2 * 1024 * 1024;

/// A process of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its process id, as the owner sees it.
    pub pid: u32,
    /// Its parent's.
    pub parent: u32,
    /// The command ([`Child::id`](crate::Child::id)) that it comes from, if anything tells.
    pub command: Option<u32>,
    /// Its short name (`proc_pid_comm(5)`), at most 15 bytes.
    pub name: String,
}

/// A command as init starts it: with the caller's own descriptors.
#[derive(Debug)]
pub struct Spawn {
    /// The program and its arguments; see [`Spec::program`](crate::Spec::program).
    pub argv: Vec<OsString>,
    /// The complete environment.
    pub env: Vec<(OsString, OsString)>,
    /// Whom it runs as, if that is not who init is; see [`Spec::user`](crate::Spec::user).
    pub user: Option<String>,
    /// The directory it starts in.
    pub cwd: PathBuf,
    /// Its descriptor 0.
    pub stdin: OwnedFd,
    /// Its descriptor 1.
    pub stdout: OwnedFd,
    /// Its descriptor 2.
    pub stderr: OwnedFd,
    /// Whether `stdin` is a terminal that becomes its controlling one.
    pub controlling_terminal: bool,
}

/// How an init is launched.
#[derive(Debug, Clone, Default)]
pub struct Launch {
    /// Where to put the program in case this machine forbids to execute memory files
    /// (`vm.memfd_noexec`). Written only then.
    pub program_file: Option<PathBuf>,
    /// Where to write down, before the program runs, what [`sweep`](crate::sweep()) needs to
    /// end what it ran, should both this process and init be killed.
    pub record: Option<PathBuf>,
    /// Makes it the first process of a sandbox.
    pub enter: Option<Arc<Enter>>,
    /// Lets a sandbox go on without its owner. By default it does not.
    pub linger: Option<Linger>,
    /// Has it be one of another kernel; then nothing of the above counts.
    pub machine: Option<Arc<dyn Machine>>,
}

/// What makes an init the first process of a sandbox.
#[derive(Debug, Clone)]
pub struct Enter {
    /// The steps, as `crates/init/src/enter.rs` reads them.
    pub plan: Vec<u8>,
    /// Is given what the plan has for the owner, from a thread that may block.
    pub door: Option<Door>,
}

/// Who takes a sandbox's way to the outside.
#[derive(Clone)]
pub struct Door(pub Arc<dyn Fn(OwnedFd) + Send + Sync>);

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Door").finish_non_exhaustive()
    }
}

/// A running `denizen-init`. Dropping it kills all that it runs, and it ends; this works
/// without a runtime and leaves no zombie.
#[derive(Debug)]
pub struct Init {
    remote: Remote,
}

/// What any number of holders can do with an init without keeping it alive.
#[derive(Debug, Clone)]
pub struct Remote {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    socket: OwnedFd,
    /// Wakes the thread when requests had to be queued.
    wake: OwnedFd,
    pid: u32,
    /// The process that was launched. Kernels before 5.3 give none, and have no sandboxes.
    process: Option<OwnedFd>,
    nonce: u32,
    state: Mutex<State>,
    /// Turns true when init is gone and reaped.
    finished: watch::Sender<bool>,
    /// It is the first process of a sandbox: all that it runs ends with it, by the kernel, and
    /// it is not trusted to keep its word. The process that was launched stays outside.
    contained: bool,
    /// It goes on when its owner dies.
    lingers: bool,
    /// The machine that it is in, if it is: its terminals are there too.
    machine: Option<Arc<dyn Machine>>,
    /// See [`PATIENCE`].
    patience: Duration,
    /// See [`ENDING`].
    ending: Duration,
}

#[derive(Debug, Default)]
struct State {
    /// Init's end of the socket is closed: nothing can be asked any more.
    dead: bool,
    /// When the owner closed its end.
    closed: Option<Instant>,
    /// The owner has left it to itself.
    left: bool,
    last_id: u32,
    queue: VecDeque<Packet>,
    starting: HashMap<u32, oneshot::Sender<Started>>,
    running: HashMap<u32, watch::Sender<Ended>>,
    trees: HashMap<u32, Vec<oneshot::Sender<u32>>>,
    lists: HashMap<u32, (Vec<Process>, oneshot::Sender<Vec<Process>>)>,
    all_gone: Vec<oneshot::Sender<u32>>,
    /// Commands that are denizen's own.
    services: HashSet<u32>,
    descriptors: HashMap<u32, oneshot::Sender<io::Result<OwnedFd>>>,
}

type Packet = (Vec<u8>, Vec<OwnedFd>);
type Started = std::result::Result<u32, (Stage, i32)>;

/// What is known about a command's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    NotYet,
    Yes(Exit),
    /// Init died before it could tell.
    Lost,
}

impl Init {
    /// Starts the program from memory; if the machine forbids that, from a file.
    ///
    /// Cancel-safe: an init that nobody waited for ends by itself.
    pub async fn launch(launch: &Launch) -> Result<Self> {
        let launch = launch.clone();
        let (sender, receiver) = oneshot::channel();
        std::thread::Builder::new()
            .name("denizen-init".into())
            .stack_size(if launch.machine.is_some() { MACHINE_STACK } else { STACK })
            .spawn(move || match start(&launch) {
                Err(error) => drop(sender.send(Err(error))),
                Ok((shared, child)) => {
                    let remote = Remote { shared: Arc::clone(&shared) };
                    // If nobody listens, the handle comes back and is dropped: the end.
                    drop(sender.send(Ok(Self { remote })));
                    serve(&shared, child);
                }
            })
            .map_err(|source| Error::Launch { source })?;
        receiver.await.map_err(|_| Error::InitLost)?
    }

    /// Becomes the owner of the init that an earlier one launched in this way, with
    /// [`Launch::linger`], and has left to itself; gives what its plan had for the owner. Blocks,
    /// not for long.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is none, or none that can be used.
    pub fn find(launch: &Launch) -> Result<(Self, Option<OwnedFd>)> {
        let found = found::find(launch).map_err(|source| Error::NotFound { source });
        let (shared, launched, door) = found?;
        // From here on dropping it ends it.
        let init = Self { remote: Remote { shared: Arc::clone(&shared) } };
        std::thread::Builder::new()
            .name("denizen-init".into())
            .stack_size(STACK)
            .spawn(move || serve(&shared, launched))
            .map_err(|source| Error::Launch { source })?;
        Ok((init, door))
    }

    /// Leaves it to itself: what runs in the background goes on, for as long as
    /// [`Launch::linger`] says or until [`Init::find`] finds it. Without that it ends.
    pub fn leave(self) {
        self.remote.shared.leave();
    }

    /// Its process id; none if it is not a process of this kernel.
    pub fn pid(&self) -> Option<u32> {
        let shared = &self.remote.shared;
        shared.machine.is_none().then_some(shared.pid)
    }

    /// Whether it is there to be asked.
    pub fn is_alive(&self) -> bool {
        let shared = &self.remote.shared;
        // The thread may not have seen its end yet.
        let mut socket = [PollFd::new(&shared.socket, PollFlags::empty())];
        let hung_up = poll(&mut socket, Some(&Timespec::default())).is_ok_and(|count| count > 0);
        !hung_up && !shared.has_ended() && !shared.state.lock().dead
    }

    /// Ends it, which may be dead already, and returns when it and all that it ran are gone.
    /// Cancel-safe: its end goes on.
    pub async fn end(&self) {
        let mut finished = self.remote.shared.finished.subscribe();
        self.remote.shared.close();
        // It can only fail if the sender is gone, which `shared` holds.
        let _ = finished.wait_for(|finished| *finished).await;
    }

    /// A handle that can ask for everything but does not keep this init alive.
    pub fn remote(&self) -> Remote {
        self.remote.clone()
    }

    /// Starts a command; see [`Remote::spawn`].
    pub async fn spawn(&self, spawn: Spawn) -> Result<Spawned> {
        self.remote.spawn(spawn).await
    }

    /// Everything that is alive under it; see [`Remote::list`].
    pub async fn list(&self) -> Result<Vec<Process>> {
        self.remote.list().await
    }

    /// Ends it: SIGTERM to everything, up to `grace` for all to leave, then SIGKILL;
    /// returns when the last process is gone and init is reaped. A process that the
    /// kernel holds in an uninterruptible wait holds this up. No more commands start
    /// from its first poll on.
    ///
    /// Cancel-safe: dropping it half-way kills at once what is left.
    pub async fn shutdown(self, grace: Duration) -> Result<()> {
        let shared = &self.remote.shared;
        let mut survivors = 0;
        if let Ok(gone) = self.remote.ask_end(message::end()) {
            match tokio::time::timeout(grace, gone).await {
                Ok(answer) => survivors = answer.unwrap_or(0),
                // What follows ends all of a sandbox.
                Err(_) if shared.contained => {}
                Err(_) => {
                    if let Ok(gone) = self.remote.ask_end(message::kill(0, true)) {
                        survivors = shared.answer(gone).await.unwrap_or(0);
                    }
                }
            }
        }
        self.end().await;
        none_left(survivors)
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        self.remote.shared.close();
    }
}

impl Remote {
    /// Starts a command and gives its handle.
    ///
    /// Cancel-safe: a command whose start was not waited for to the end is killed.
    pub async fn spawn(&self, spawn: Spawn) -> Result<Spawned> {
        let (request, descriptors) = Request::of(spawn)?;
        let (ended, watch) = watch::channel(Ended::NotYet);
        let (sender, started) = oneshot::channel();
        // From here on, dropping it kills what may have been started.
        let mut spawned = {
            let mut state = self.shared.state.lock();
            state.last_id = state.last_id.wrapping_add(1).max(1);
            let id = state.last_id;
            self.shared.send(&mut state, request.packet(id), descriptors)?;
            state.starting.insert(id, sender);
            state.running.insert(id, ended);
            Spawned { remote: self.clone(), id, pid: 0, exit: watch, kill_on_drop: true }
        };
        match self.shared.outcome(started).await {
            Ok(Ok(pid)) => {
                spawned.pid = pid;
                Ok(spawned)
            }
            Ok(Err((stage, errno))) => {
                spawned.kill_on_drop = false;
                Err(request.failure(stage, errno))
            }
            Err(error) => Err(error),
        }
    }

    /// As [`Remote::spawn`], for a program of denizen's own: [`Remote::list`] leaves out what
    /// it runs. Cancel-safe as that.
    pub async fn spawn_service(&self, spawn: Spawn) -> Result<Spawned> {
        let spawned = self.spawn(spawn).await?;
        self.shared.state.lock().services.insert(spawned.id);
        Ok(spawned)
    }

    /// Every process alive under this init, left-over background processes included.
    /// Cancel-safe.
    pub async fn list(&self) -> Result<Vec<Process>> {
        let (sender, listing) = oneshot::channel();
        {
            let mut state = self.shared.state.lock();
            state.last_id = state.last_id.wrapping_add(1).max(1);
            let id = state.last_id;
            self.shared.send(&mut state, message::list(id), Vec::new())?;
            state.lists.insert(id, (Vec::new(), sender));
        }
        let mut all = self.shared.answer(listing).await?;
        let services = &self.shared.state.lock().services;
        all.retain(|process| process.command.is_none_or(|command| !services.contains(&command)));
        Ok(all)
    }

    /// Kills all that runs under this init, which goes on, and waits until it is gone.
    /// Cancel-safe: the killing goes on.
    pub(crate) async fn clear(&self) -> Result<()> {
        let (sender, gone) = oneshot::channel();
        {
            let mut state = self.shared.state.lock();
            state.last_id = state.last_id.wrapping_add(1).max(1);
            let id = state.last_id;
            self.shared.send(&mut state, message::clear(id), Vec::new())?;
            state.trees.insert(id, vec![sender]);
        }
        none_left(self.shared.answer(gone).await?)
    }

    /// A terminal's master end, made where init is, so that its name means something to what
    /// runs there. Cancel-safe.
    pub(crate) async fn terminal(&self) -> Result<OwnedFd> {
        let made = self.descriptor(message::terminal).await?;
        made.map_err(|source| Error::Io { what: "cannot make a terminal", source })
    }

    /// A connection, perhaps not made yet, to a port of 127.0.0.1 or ::1 where init is. Cancel-safe.
    pub(crate) async fn connect(&self, port: u16) -> Result<OwnedFd> {
        let made = self.descriptor(|id| message::connect(id, port)).await?;
        made.map_err(|source| Error::Port { port, source })
    }

    async fn descriptor(
        &self,
        request: impl FnOnce(u32) -> Vec<u8>,
    ) -> Result<io::Result<OwnedFd>> {
        let (sender, made) = oneshot::channel();
        {
            let mut state = self.shared.state.lock();
            state.last_id = state.last_id.wrapping_add(1).max(1);
            let id = state.last_id;
            self.shared.send(&mut state, request(id), Vec::new())?;
            state.descriptors.insert(id, sender);
        }
        self.shared.answer(made).await
    }

    /// Has init read the descriptor to its end and throw it all away.
    pub(crate) fn drain(&self, fd: OwnedFd) {
        // A dead init has no processes left that could write.
        let _ = self.shared.send(&mut self.shared.state.lock(), message::drain(), vec![fd]);
    }

    /// Has a command go on when its owner is gone, where the instance does. The descriptors are
    /// copies of the ends that its outputs are read from.
    pub(crate) fn keep(&self, id: u32, outputs: Vec<OwnedFd>) {
        if self.shared.lingers {
            // A dead init has nothing that could go on.
            let _ = self.shared.send(&mut self.shared.state.lock(), message::keep(id), outputs);
        }
    }

    fn ask_end(&self, packet: Vec<u8>) -> Result<oneshot::Receiver<u32>> {
        let (sender, gone) = oneshot::channel();
        let mut state = self.shared.state.lock();
        self.shared.send(&mut state, packet, Vec::new())?;
        state.all_gone.push(sender);
        Ok(gone)
    }
}

/// A started command. Dropping it before its end kills its tree.
#[derive(Debug)]
pub struct Spawned {
    remote: Remote,
    id: u32,
    pid: u32,
    exit: ExitWatch,
    kill_on_drop: bool,
}

pub(crate) type ExitWatch = watch::Receiver<Ended>;

impl Spawned {
    /// The process id of its first process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its number in this init.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Waits until its first process has exited. Cancel-safe.
    pub async fn wait(&self) -> Result<Exit> {
        let mut exit = self.exit.clone();
        let ended = exit.wait_for(|ended| *ended != Ended::NotYet).await;
        match ended.map(|ended| *ended) {
            Ok(Ended::Yes(exit)) => Ok(exit),
            _ => Err(Error::InitLost),
        }
    }

    /// How it ended, if it has.
    pub fn try_wait(&self) -> Result<Option<Exit>> {
        match *self.exit.borrow() {
            Ended::NotYet => Ok(None),
            Ended::Yes(exit) => Ok(Some(exit)),
            Ended::Lost => Err(Error::InitLost),
        }
    }

    /// Sends a signal; see [`Child::signal`](crate::Child::signal).
    pub fn signal(&self, signal: i32, scope: Scope) -> Result<()> {
        let number = u32::try_from(signal).ok().filter(|number| (1..=64).contains(number));
        let number = number.ok_or(Error::BadSignal(signal))?;
        // A tree may outlive its first process.
        if scope != Scope::Tree && self.try_wait()?.is_some() {
            return Err(Error::Ended);
        }
        let packet = message::signal(self.id, number, scope);
        let shared = &self.remote.shared;
        shared.send(&mut shared.state.lock(), packet, Vec::new())
    }

    /// Kills its tree and waits until it is gone; see
    /// [`Child::kill_tree`](crate::Child::kill_tree).
    pub async fn kill_tree(&self) -> Result<()> {
        let (sender, gone) = oneshot::channel();
        {
            let shared = &self.remote.shared;
            let mut state = shared.state.lock();
            shared.send(&mut state, message::kill(self.id, true), Vec::new())?;
            state.trees.entry(self.id).or_default().push(sender);
        }
        none_left(self.remote.shared.outcome(gone).await?)
    }

    /// From now on, dropping this handle kills nothing.
    pub fn detach(&mut self) {
        self.kill_on_drop = false;
    }

    pub(crate) fn keep(&self, outputs: Vec<OwnedFd>) {
        self.remote.keep(self.id, outputs);
    }

    /// Tells of the size of its terminal, where that is not the one whose master end is here.
    pub(crate) fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let shared = &self.remote.shared;
        if shared.machine.is_none() {
            return Ok(());
        }
        shared.send(&mut shared.state.lock(), message::size(self.id, columns, rows), Vec::new())
    }

    pub(crate) fn exit_watch(&self) -> ExitWatch {
        self.exit.clone()
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        if self.kill_on_drop && *self.exit.borrow() == Ended::NotYet {
            let shared = &self.remote.shared;
            // A dead init has no processes left to kill.
            let _ =
                shared.send(&mut shared.state.lock(), message::kill(self.id, false), Vec::new());
        }
    }
}

/// What the caller is told about what could not be killed.
fn none_left(survivors: u32) -> Result<()> {
    match survivors {
        0 => Ok(()),
        count => Err(Error::Survivors { count }),
    }
}

/// A start as init is asked for it, without its descriptors.
pub(crate) struct Request {
    flags: [bool; 3],
    counts: [u32; 2],
    /// Those that travel in the packet.
    inline: Vec<u8>,
    bytes: usize,
    program: OsString,
    cwd: PathBuf,
    user: Option<String>,
}

impl Request {
    /// The request, and the descriptors that are sent with it.
    pub(crate) fn of(spawn: Spawn) -> Result<(Self, Vec<OwnedFd>)> {
        let program = spawn.argv.first().cloned().unwrap_or_default();
        let strings = message::strings(spawn.user.as_deref(), &spawn.cwd, &spawn.argv, &spawn.env)?;
        let bytes = strings.len();
        let counts = (u32::try_from(spawn.argv.len()), u32::try_from(spawn.env.len()));
        let (Ok(argc), Ok(envc), true) = (counts.0, counts.1, bytes <= HUGE) else {
            return Err(Error::TooBig { program, bytes });
        };
        let in_file = bytes > message::INLINE;
        let mut descriptors = vec![spawn.stdin, spawn.stdout, spawn.stderr];
        if in_file {
            descriptors.push(
                program::memory_file(&strings)
                    .map_err(Error::io("cannot pass the arguments on"))?,
            );
        }
        let request = Self {
            flags: [spawn.controlling_terminal, in_file, spawn.user.is_some()],
            counts: [argc, envc],
            inline: if in_file { Vec::new() } else { strings },
            bytes,
            program,
            cwd: spawn.cwd,
            user: spawn.user,
        };
        Ok((request, descriptors))
    }

    /// It, by a number that tells it from others.
    pub(crate) fn packet(&self, id: u32) -> Vec<u8> {
        let [argc, envc] = self.counts;
        let mut packet = message::spawn(id, self.flags, argc, envc);
        packet.extend_from_slice(&self.inline);
        packet
    }

    /// What the caller is told if it has failed.
    pub(crate) fn failure(self, stage: Stage, errno: i32) -> Error {
        let Self { program, cwd, user, bytes, .. } = self;
        let source = io::Error::from_raw_os_error(errno);
        // None for a number that no kernel gives.
        match (stage, user, Errno::from_io_error(&source).unwrap_or(Errno::IO)) {
            (Stage::User, Some(user), Errno::NOENT) => Error::UnknownUser { user },
            (Stage::User, Some(user), _) => Error::User { user, source },
            (Stage::Cwd, ..) => Error::WorkingDirectory { cwd, source },
            (Stage::Interpreter, ..) => Error::InterpreterNotFound { program },
            (Stage::Program, _, Errno::NOENT) => Error::ProgramNotFound { program },
            (Stage::Program, _, Errno::ISDIR) => Error::ProgramIsDirectory { program },
            (Stage::Program, _, Errno::ACCESS) => Error::NotExecutable { program },
            (.., Errno::TOOBIG) => Error::TooBig { program, bytes },
            (.., Errno::SHUTDOWN) => Error::ShuttingDown,
            _ => Error::Start { program, source },
        }
    }
}

impl Shared {
    /// Sends a request now, or has the thread send it when the socket takes it. Never
    /// blocks, and requests keep their order.
    fn send(&self, state: &mut State, packet: Vec<u8>, descriptors: Vec<OwnedFd>) -> Result<()> {
        if state.dead {
            return Err(Error::InitLost);
        }
        if state.closed.is_some() {
            return Err(Error::ShuttingDown);
        }
        if state.queue.is_empty() {
            match send_packet(self.socket.as_fd(), &packet, &descriptors) {
                Ok(()) => return Ok(()),
                Err(Errno::AGAIN) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Error::InitLost),
                Err(error) => {
                    return Err(Error::io("cannot reach the session's first process")(error));
                }
            }
        }
        if state.queue.len() >= MOST_WAITING {
            let source = io::ErrorKind::TimedOut.into();
            return Err(Error::Io { what: "the session's first process does not listen", source });
        }
        state.queue.push_back((packet, descriptors));
        // It can only fail if the counter is full, and then the thread wakes anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        Ok(())
    }

    /// Ends init: it sees that nobody can ask any more, kills everything, and exits.
    fn close(&self) {
        let mut state = self.state.lock();
        if state.left {
            return;
        }
        state.closed.get_or_insert_with(Instant::now);
        state.queue.clear();
        if self.lingers {
            // This process may be gone before it has seen that only one direction was closed.
            let _ = send_packet(self.socket.as_fd(), &message::kill(0, false), &[]);
        }
        let _ = shutdown(&self.socket, Shutdown::Write);
        // The thread counts the time from here on.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Closes both directions at once, as the end of this process would.
    fn leave(&self) {
        self.flush();
        let mut state = self.state.lock();
        // Otherwise its end, which dropping it is.
        if self.lingers && state.closed.is_none() {
            state.left = true;
            state.dead = true;
            state.queue.clear();
            let _ = shutdown(&self.socket, Shutdown::Both);
        }
    }

    /// Waits for an answer. The first process of a sandbox that gives none is ended.
    async fn answer<T>(&self, answer: oneshot::Receiver<T>) -> Result<T> {
        if !self.contained {
            return answer.await.map_err(|_| Error::InitLost);
        }
        tokio::pin!(answer);
        loop {
            if let Ok(answer) = tokio::time::timeout(self.patience, &mut answer).await {
                return answer.map_err(|_| Error::InitLost);
            }
            if !self.machine.as_ref().is_some_and(|machine| machine.is_asleep()) {
                tracing::warn!(pid = self.pid, "the session's init is silent: ending it");
                self.close();
                return Err(Error::InitLost);
            }
        }
    }

    /// Waits for what may take any time where nothing but init itself can stop it. In a machine
    /// others can: there it is waited for as for any answer.
    async fn outcome<T>(&self, outcome: oneshot::Receiver<T>) -> Result<T> {
        match &self.machine {
            Some(_) => self.answer(outcome).await,
            None => outcome.await.map_err(|_| Error::InitLost),
        }
    }

    /// Whether the process that was launched has. What is within a sandbox ends with it, a
    /// moment later, and until then holds the socket.
    fn has_ended(&self) -> bool {
        self.process.as_ref().is_some_and(|process| {
            let mut ended = [PollFd::new(process, PollFlags::IN)];
            poll(&mut ended, Some(&Timespec::default())).is_ok_and(|count| count > 0)
        })
    }

    /// How much longer it has to end, if it was told to.
    fn time_left(&self) -> Option<Duration> {
        let closed = self.state.lock().closed.filter(|_| self.contained)?;
        Some(self.patience.min(self.ending).saturating_sub(closed.elapsed()))
    }

    /// Sends what waits; whether all of it went.
    fn flush(&self) -> bool {
        let mut state = self.state.lock();
        while let Some((packet, descriptors)) = state.queue.front() {
            if send_packet(self.socket.as_fd(), packet, descriptors) == Err(Errno::AGAIN) {
                return false;
            }
            // Another failure means that init is gone, which is noticed when reading.
            state.queue.pop_front();
        }
        true
    }

    /// Passes on what it tells; false if that cannot be true.
    fn handle(&self, event: Event, descriptor: Option<OwnedFd>) -> bool {
        // Nobody may be waiting any more for any of these; that is fine.
        let mut state = self.state.lock();
        match event {
            Event::Spawned { id, pid } => {
                if let Some(sender) = state.starting.remove(&id) {
                    drop(state);
                    let _ = sender.send(Ok(pid));
                }
            }
            Event::Failed { id, stage, errno } => {
                state.running.remove(&id);
                if let Some(sender) = state.starting.remove(&id) {
                    drop(state);
                    let _ = sender.send(Err((stage, errno)));
                }
            }
            Event::Exited { id, exit } => {
                if let Some(sender) = state.running.remove(&id) {
                    drop(state);
                    sender.send_replace(Ended::Yes(exit));
                }
            }
            Event::TreeGone { id, survivors } => {
                for sender in state.trees.remove(&id).into_iter().flatten() {
                    let _ = sender.send(survivors);
                }
            }
            Event::AllGone { survivors } => {
                for sender in std::mem::take(&mut state.all_gone) {
                    let _ = sender.send(survivors);
                }
            }
            // Told once, before anybody could ask for anything.
            Event::Entered | Event::Refused { .. } | Event::Found { .. } => {}
            Event::Descriptor { id, errno } => {
                if let Some(sender) = state.descriptors.remove(&id) {
                    let made = descriptor.ok_or_else(|| io::Error::from_raw_os_error(errno));
                    let _ = sender.send(made);
                }
            }
            Event::Listing { id, part, more } => {
                // An init that lies must not make us swell, nor wait for ever.
                if more && part.is_empty() {
                    return false;
                }
                if let Some((list, _)) = state.lists.get_mut(&id) {
                    list.extend(part);
                    if list.len() > MOST_PROCESSES {
                        return false;
                    }
                }
                if !more && let Some((list, sender)) = state.lists.remove(&id) {
                    let _ = sender.send(list);
                }
            }
        }
        true
    }
}

pub(crate) fn send_packet(
    socket: BorrowedFd<'_>,
    packet: &[u8],
    descriptors: &[OwnedFd],
) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    if !borrowed.is_empty() {
        // There is room for four, and no request has more.
        control.push(SendAncillaryMessage::ScmRights(&borrowed));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    loop {
        match sendmsg(socket, &[IoSlice::new(packet)], &mut control, flags) {
            Err(Errno::INTR) => {}
            other => return other.map(|_| ()),
        }
    }
}

fn start(launch: &Launch) -> Result<(Arc<Shared>, Launched)> {
    let was_killed = |error: &Error| match error {
        Error::Enter { source, .. } => matches!(
            Errno::from_io_error(source),
            Some(Errno::PIPE | Errno::CONNRESET | Errno::CHILD)
        ),
        _ => false,
    };
    for _ in 1..STARTS {
        match try_start(launch) {
            // By somebody, before it had anything to lose.
            Err(error) if was_killed(&error) => {}
            started => return started,
        }
    }
    try_start(launch)
}

fn try_start(launch: &Launch) -> Result<(Arc<Shared>, Launched)> {
    if let Some(machine) = &launch.machine {
        return machine::start(&**machine);
    }
    let (shared, mut child) = run(launch).map_err(|source| Error::Launch { source })?;
    if let Some(enter) = &launch.enter
        && let Err(error) = put_inside(&shared, enter, launch.linger.as_ref())
    {
        // It has nothing yet that would have to be told.
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    Ok((shared, Launched::Child(child)))
}

/// Has a new init become the first process of a sandbox, and waits until it is.
fn put_inside(shared: &Shared, enter: &Enter, linger: Option<&Linger>) -> Result<()> {
    let failed = |step: &str| {
        let step = step.to_owned();
        move |source: io::Error| Error::Enter { step, source }
    };
    let mut descriptors = vec![program::memory_file(&enter.plan).map_err(failed("plan"))?];
    if let Some(linger) = linger {
        descriptors.push(linger.bind().map_err(failed("the socket for its next owner"))?);
        let held = linger.held.as_ref().map(|held| held.try_clone()).transpose();
        descriptors.extend(held.map_err(failed("hold"))?.map(OwnedFd::from));
    }
    let packet = message::enter(linger.map_or(0, Linger::milliseconds));
    send_packet(shared.socket.as_fd(), &packet, &descriptors)
        .map_err(|errno| failed("plan")(errno.into()))?;
    let mut buffer = vec![0; PACKET];
    let begin = Instant::now();
    loop {
        let Some(left) = shared.patience.checked_sub(begin.elapsed()) else {
            return Err(failed("its first process is silent")(Errno::TIMEDOUT.into()));
        };
        let mut ready = [PollFd::new(&shared.socket, PollFlags::IN)];
        match poll(&mut ready, Some(&timespec(left))) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(failed("its end")(errno.into())),
        }
        let (event, descriptor) = match receive_packet(shared.socket.as_fd(), &mut buffer) {
            Ok((0, _)) => return Err(failed("its first process ended")(Errno::CHILD.into())),
            Ok((count, descriptor)) => (buffer.get(..count).and_then(message::event), descriptor),
            Err(Errno::AGAIN | Errno::INTR) => continue,
            Err(errno) => return Err(failed("its first process ended")(errno.into())),
        };
        match event {
            Some(Event::Entered) => {
                if let (Some(Door(take)), Some(descriptor)) = (&enter.door, descriptor) {
                    take(descriptor);
                }
                return Ok(());
            }
            Some(Event::Refused { errno, step }) => {
                return Err(failed(&step)(io::Error::from_raw_os_error(errno)));
            }
            _ => {}
        }
    }
}

/// One packet and the descriptor that came along, at most one; `AGAIN` if there is none.
fn receive_packet(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> Result<(usize, Option<OwnedFd>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
    let descriptor = control.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    Ok((message.bytes, descriptor))
}

/// Runs the program.
fn run(launch: &Launch) -> io::Result<(Arc<Shared>, process::Child)> {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    // Part of the mark on its processes. 31 bits: it must not look like "unlimited".
    let nonce = u32::try_from(RandomState::new().hash_one(0u8) >> 33).unwrap_or(1).max(1);
    if let Some(record) = &launch.record {
        std::fs::write(record, format!("{nonce}\n"))?;
    }
    let socket = theirs.try_clone()?;
    let run = |path: &Path, socket: OwnedFd| {
        Command::new(path)
            .arg0("denizen-init")
            .arg(nonce.to_string())
            .env_clear()
            .stdin(socket)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
    };
    let child =
        match (program::in_memory().and_then(|path| run(&path, socket)), &launch.program_file) {
            (Ok(child), _) => child,
            (Err(error), None) => return Err(error),
            (Err(error), Some(file)) => {
                tracing::debug!(%error, ?file, "init cannot be run from memory; using a file");
                program::to_file(file)?;
                run(file, theirs)?
            }
        };
    let contained = launch.enter.is_some();
    let shared = Shared {
        socket: ours,
        wake,
        pid: child.id(),
        process: pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).ok(),
        nonce,
        state: Mutex::default(),
        finished: watch::Sender::new(false),
        contained,
        lingers: contained && launch.linger.is_some(),
        machine: None,
        patience: PATIENCE,
        ending: ENDING,
    };
    if let (Some(record), true) = (&launch.record, shared.lingers) {
        // Beside the number, which must never be missing.
        let written = std::fs::OpenOptions::new()
            .append(true)
            .open(record)
            .and_then(|mut record| writeln!(record, "{}", shared.pid));
        if let Err(error) = written {
            tracing::warn!(?record, %error, "the session's init will not be found again");
        }
    }
    Ok((Arc::new(shared), child))
}

/// The process that was launched.
#[derive(Debug)]
enum Launched {
    Child(process::Child),
    /// An earlier owner's child: a descriptor of the process.
    Found(OwnedFd),
    /// A machine.
    Machine(machine::Handle),
}

impl Launched {
    /// A descriptor of the process.
    fn descriptor(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Child(child) => Ok(pidfd_open(Pid::from_child(child), PidfdFlags::empty())?),
            Self::Found(fd) => fd.try_clone(),
            Self::Machine(handle) => handle.ended.try_clone(),
        }
    }

    /// Whether it has ended and its number may be another's.
    fn may_be_reaped(&self) -> bool {
        match self {
            // By us only, or no process at all.
            Self::Child(_) | Self::Machine(_) => false,
            Self::Found(fd) => {
                let none = Timespec { tv_sec: 0, tv_nsec: 0 };
                poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&none)) != Ok(0)
            }
        }
    }

    fn kill(&mut self) {
        match self {
            Self::Child(child) => drop(child.kill()),
            Self::Found(fd) => drop(pidfd_send_signal(fd, Signal::KILL)),
            Self::Machine(handle) => handle.kill(),
        }
    }

    /// Waits for its end; whether it is known to have been a good one.
    fn wait(&mut self) -> bool {
        match self {
            Self::Child(child) => child.wait().is_ok_and(|status| status.success()),
            Self::Found(fd) => {
                while let Err(Errno::INTR) = poll(&mut [PollFd::new(fd, PollFlags::IN)], None) {}
                // It is ours all the same if the earlier owner was in this process.
                match waitid(WaitId::PidFd(fd.as_fd()), WaitIdOptions::EXITED) {
                    Ok(Some(status)) => status.exit_status() == Some(0),
                    _ => false,
                }
            }
            Self::Machine(handle) => {
                handle.wait();
                true
            }
        }
    }
}

/// The thread of one init: its events until it is gone, then its end.
fn serve(shared: &Shared, mut launched: Launched) {
    let mut buffer = vec![0; PACKET];
    let patience = loop {
        match receive_packet(shared.socket.as_fd(), &mut buffer) {
            Ok((count @ 1.., descriptor)) => {
                let event = buffer.get(..count).and_then(message::event);
                if !event.is_none_or(|event| shared.handle(event, descriptor)) {
                    tracing::warn!(pid = shared.pid, "the session's init lies: ending it");
                    break Duration::ZERO;
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if !shared.has_ended() => idle(shared),
            // It has closed its socket, so it is leaving.
            _ => break shared.patience.min(shared.ending),
        }
        if shared.time_left().is_some_and(|left| left.is_zero()) {
            break Duration::ZERO;
        }
    };
    let (closed, left) = {
        let mut state = shared.state.lock();
        state.dead = true;
        (state.closed.is_some(), state.left)
    };
    if !left {
        end(&mut launched, shared, patience);
        // A child of ours, by its own number.
        let well = launched.wait();
        if !closed || !well {
            if !closed || matches!(launched, Launched::Child(_)) {
                let pid = shared.pid;
                tracing::warn!(pid, "the session's init died; killing what it ran");
            }
            sweep::sweep(&[shared.nonce]);
        }
    }
    let gone = State { dead: true, left, ..State::default() };
    let state = std::mem::replace(&mut *shared.state.lock(), gone);
    for ended in state.running.values() {
        ended.send_replace(Ended::Lost);
    }
    // Dropping the other senders tells those who wait.
    drop(state);
    shared.finished.send_replace(true);
    if left {
        // Nobody else reaps it while this process is there.
        launched.wait();
    }
}

/// Waits for the end of an init that is leaving. If it does not keep its word, it is killed;
/// a sandbox's within, so that the one outside goes when all of the sandbox has ended.
fn end(launched: &mut Launched, shared: &Shared, patience: Duration) {
    if !patience.is_zero() {
        // Kernels before 5.3 have no sandboxes either.
        let Ok(fd) = launched.descriptor() else { return };
        let begin = Instant::now();
        while let Some(left) = patience.checked_sub(begin.elapsed()) {
            let ended = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timespec(left)));
            if ended.is_ok_and(|count| count > 0) {
                return;
            }
        }
    }
    let is_sandbox = shared.contained && shared.machine.is_none();
    let within: Vec<Pid> = if is_sandbox { children(shared.pid) } else { Vec::new() };
    for pid in &within {
        // The number may be another's by now; the descriptor is one process's.
        if let Ok(fd) = pidfd_open(*pid, PidfdFlags::empty())
            && children(shared.pid).contains(pid)
            && !launched.may_be_reaped()
        {
            let _ = pidfd_send_signal(fd, Signal::KILL);
        }
    }
    if within.is_empty() {
        launched.kill();
    }
}

/// The children of a process of one thread (`proc_pid_children(5)`).
fn children(pid: u32) -> Vec<Pid> {
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let list = list.unwrap_or_default();
    list.split_ascii_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

fn timespec(duration: Duration) -> Timespec {
    // Out of range is so long that it does not matter.
    Timespec::try_from(duration).unwrap_or_default()
}

/// Waits until there is something to read or to send, or the time to end is over.
fn idle(shared: &Shared) {
    let mut events = PollFlags::IN;
    if !shared.flush() {
        events |= PollFlags::OUT;
    }
    let mut fds =
        vec![PollFd::new(&shared.socket, events), PollFd::new(&shared.wake, PollFlags::IN)];
    fds.extend(shared.process.as_ref().map(|process| PollFd::new(process, PollFlags::IN)));
    // Interrupted or out of memory: the caller comes back here.
    let _ = poll(&mut fds, shared.time_left().map(timespec).as_ref());
    if !fds[1].revents().is_empty() {
        let _ = rustix::io::read(&shared.wake, &mut [0u8; 8]);
    }
}

#[cfg(test)]
mod tests;
