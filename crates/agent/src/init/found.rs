//! How an instance that its owner has left to itself is found again: by the socket in its
//! session's folder on which its first process waits. Whoever answers there is believed no
//! more than any first process of a sandbox, and only once the process that its record names
//! is known, by its mark, to be the one that was launched for it.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, socket_with,
};
use rustix::process::{PidfdFlags, pidfd_open};
use tokio::sync::watch;

use super::{ENDING, Launch, Launched, PACKET, PATIENCE, Shared, State, receive_packet, timespec};
use crate::message::{self, Event};
use crate::sweep;

/// The way of speaking that this owner knows.
const VERSION: u32 = 1;
/// How long an instance may take to answer. It shares the sandbox's limits; one that takes
/// longer is ended, not waited for.
pub(super) const ANSWER: Duration = Duration::from_secs(5);

/// How an instance goes on without its owner, until the next one finds it.
#[derive(Debug, Clone)]
pub struct Linger {
    /// The socket at which it is found: in a folder that nobody but owners may open.
    pub socket: PathBuf,
    /// For how long.
    pub time: Duration,
    /// What is to stay open, for its lock, for as long as the instance is there.
    pub held: Option<Arc<File>>,
}

impl Linger {
    /// Makes the socket, in the place of an earlier one.
    pub(super) fn bind(&self) -> io::Result<OwnedFd> {
        match std::fs::remove_file(&self.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = socket()?;
        named(&self.socket, |name| bind(&socket, name))?;
        Ok(socket)
    }

    /// The time as a packet has it.
    pub(super) fn milliseconds(&self) -> u32 {
        u32::try_from(self.time.as_millis()).unwrap_or(u32::MAX)
    }
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Does something with a socket's name, which may be longer than an address (unix(7)).
fn named(
    path: &Path,
    work: impl FnOnce(&SocketAddrUnix) -> rustix::io::Result<()>,
) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let name = path.file_name().and_then(OsStr::to_str).ok_or(io::ErrorKind::InvalidFilename)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = openat(CWD, folder, flags, Mode::empty())?;
    let short = format!("/proc/self/fd/{}/{name}", folder.as_raw_fd());
    Ok(work(&SocketAddrUnix::new(short)?)?)
}

/// Becomes the owner of the instance that was launched in this way, if it is there and has
/// none; gives the way to the outside that it has. Blocks, not for long.
pub(super) fn find(launch: &Launch) -> io::Result<(Arc<Shared>, Launched, Option<OwnedFd>)> {
    let not_there = || io::Error::from(io::ErrorKind::NotFound);
    let linger = launch.linger.as_ref().ok_or_else(not_there)?;
    let record = launch.record.as_deref().ok_or_else(not_there)?;
    let (nonce, pid) = sweep::launched(record).ok_or_else(not_there)?;
    let socket = socket()?;
    named(&linger.socket, |name| connect(&socket, name))?;
    let outside = pidfd_open(pid, PidfdFlags::empty())?;
    // The descriptor is of the process that has the mark, or has_mark() has seen no process.
    if !sweep::has_mark(pid, &[nonce]) {
        return Err(not_there());
    }
    let (last_id, door) = await_word(&socket, ANSWER)?;
    let shared = Shared {
        socket,
        wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        pid: pid.as_raw_nonzero().get().unsigned_abs(),
        process: Some(outside.try_clone()?),
        nonce,
        state: Mutex::new(State { last_id, ..State::default() }),
        finished: watch::Sender::new(false),
        contained: true,
        lingers: true,
        machine: None,
        patience: PATIENCE,
        ending: ENDING,
    };
    Ok((Arc::new(shared), Launched::Found(outside), door))
}

/// Waits for the first word of who is at the other end: the last number that a command had, and
/// the way to the outside.
pub(super) fn await_word(
    socket: &OwnedFd,
    patience: Duration,
) -> io::Result<(u32, Option<OwnedFd>)> {
    let begin = Instant::now();
    let mut buffer = vec![0; PACKET];
    loop {
        let Some(left) = patience.checked_sub(begin.elapsed()) else {
            return Err(io::ErrorKind::TimedOut.into());
        };
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timespec(left))) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let (count, door) = match receive_packet(socket.as_fd(), &mut buffer) {
            Ok((0, _)) => return Err(io::ErrorKind::ConnectionReset.into()),
            Err(Errno::AGAIN | Errno::INTR) => continue,
            received => received?,
        };
        return match buffer.get(..count).and_then(message::event) {
            Some(Event::Found { last_id, version: VERSION }) => Ok((last_id, door)),
            _ => Err(io::Error::other("it speaks in another way")),
        };
    }
}
