//! Lets members of a sandbox's group `sudo` start commands as others there. Elsewhere a program
//! that sets its user does that; in a sandbox no program gains rights by being executed
//! (`no_new_privs`, prctl(2)), and the one process that has them all the time is this one. It must
//! never wait for who asks, nor believe anything of them but what the kernel says.
//!
//! Who asks connects to [`NAME`], a socket of packets in the sandbox's own network namespace
//! (unix(7)). Each of them is served by a process of its own, a copy of this one that belongs to the
//! command that they come from and ends with it: what they send could be made to take long, even to
//! be closed. It takes one `spawn`, as owners send it, but that `id` says nothing and a user has to
//! be named, and then `signal`s, with the scopes 0 and 1. It tells `spawned` or `failed`, and then
//! `exited`, which is its end. The command goes on when its connection ends.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::start::Failure;
use crate::sys::{self, CONTROL, PollFd};
use crate::{PACKET, ending, header, number, users};

/// The socket's name, which is in no folder.
const NAME: &[u8] = b"denizen-sudo";
/// Whose members may start commands as others.
const GROUP: &[u8] = b"sudo";
/// Milliseconds until who could not be served is tried again.
const PAUSE: i32 = 50;

/// See the module.
pub struct Sudo {
    listener: OwnedFd,
    /// One for whom no process could be made yet.
    waiting: Option<Caller>,
    /// Nobody is let in for a moment: it has just failed.
    rests: bool,
}

/// Somebody who asks.
pub struct Caller {
    pub socket: OwnedFd,
    /// The process that has connected.
    pub pid: i32,
    /// The command that it was found to come from.
    pub command: Option<u32>,
    uid: u32,
}

impl Caller {
    /// Whether what they ask for is done.
    pub fn may(&self) -> bool {
        users::is_member(self.uid, GROUP)
    }
}

impl Sudo {
    /// Waits for callers from here on, in the network namespace that this process is in.
    pub fn new() -> Result<Self, i32> {
        let listener = sys::sandbox::listen_by_name(NAME)?;
        Ok(Self { listener, waiting: None, rests: false })
    }

    /// What to look at.
    pub fn look_at(&self) -> PollFd {
        let fd = if self.rests { -1 } else { self.listener.as_raw_fd() };
        PollFd { fd, events: sys::POLLIN, revents: 0 }
    }

    /// Milliseconds until the next look, if there is one without a caller.
    pub fn pause(&self) -> Option<i32> {
        self.rests.then_some(PAUSE)
    }

    /// The next caller, by whether one was seen.
    pub fn next(&mut self, ready: i16) -> Option<Caller> {
        if !std::mem::take(&mut self.rests) && ready == 0 {
            return None;
        }
        if let Some(caller) = self.waiting.take() {
            return Some(caller);
        }
        match sys::sandbox::accept_known(&self.listener) {
            Ok((socket, pid, uid)) => Some(Caller { socket, pid, command: None, uid }),
            Err(error) => {
                // There may be no room for another descriptor.
                self.rests = error != sys::EAGAIN;
                None
            }
        }
    }

    /// There is no process for that caller now.
    pub fn wait(&mut self, caller: Caller) {
        self.waiting = Some(caller);
        self.rests = true;
    }
}

/// Serves a caller to the end, in a process that has nothing but its socket, as the control socket,
/// and what tells of ended children. What is asked for goes to `start`.
pub fn serve(
    signals: &OwnedFd,
    may: impl FnOnce() -> bool,
    mut start: impl FnMut(&[u8], &[OwnedFd]) -> Result<i32, Failure>,
) {
    // Until the first process has closed the socket, so that it is not the last to do so.
    sys::wait_ready(&mut [PollFd { fd: signals.as_raw_fd(), events: sys::POLLIN, revents: 0 }], -1);
    let _ = sys::read(signals, &mut [0; 128]);
    if !may() {
        return tell(2, 4, sys::EACCES);
    }
    let mut child = None;
    let mut caller: RawFd = CONTROL;
    let mut buffer = vec![0; 2 * PACKET];
    loop {
        let entry = |fd| PollFd { fd, events: sys::POLLIN, revents: 0 };
        let mut fds = [entry(caller), entry(signals.as_raw_fd())];
        sys::wait_ready(&mut fds, -1);
        if fds[1].revents != 0 {
            let _ = sys::read(signals, &mut [0; 128]);
            while let Ok(Some((pid, status))) = sys::reap_any() {
                if child == Some(pid) {
                    let (how, value) = ending(status);
                    return tell(3, how, value);
                }
            }
        }
        if fds[0].revents == 0 {
            continue;
        }
        match (sys::receive(&CONTROL, &mut buffer), child) {
            (Ok((count @ 1.., descriptors)), _) => {
                let packet = buffer.get(..count).unwrap_or_default();
                match (packet, child) {
                    ([1, flags, ..], None) => {
                        let named = flags & 4 != 0;
                        let started =
                            if named { start(packet, &descriptors) } else { Err((0, sys::EINVAL)) };
                        match started {
                            Ok(pid) => {
                                child = Some(pid);
                                tell(1, 0, pid);
                            }
                            Err((stage, error)) => return tell(2, stage, error),
                        }
                    }
                    ([2, scope, ..], Some(pid)) => {
                        let signal = number(packet, 8).and_then(|it| i32::try_from(it).ok());
                        let target = if *scope == 1 { -pid } else { pid };
                        sys::signal_number(target, signal.unwrap_or(0));
                    }
                    _ => {}
                }
            }
            (Err(sys::EINTR | sys::EAGAIN), _) => {}
            (_, None) => return,
            (_, Some(_)) => caller = -1,
        }
    }
}

/// One that does not listen misses it.
fn tell(kind: u8, flags: u8, value: i32) {
    let mut event = header(kind, flags, 0);
    event.extend(value.unsigned_abs().to_le_bytes());
    let _ = sys::transmit(&CONTROL, &event, None);
}
