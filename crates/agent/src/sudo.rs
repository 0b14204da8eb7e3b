//! Has the first process of a sandbox start commands as somebody else, from within it
//! (`crates/init/src/sudo.rs` says who may). It must never take anybody else for that process.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, socket_with,
};

use crate::init::{Request, Spawn, send_packet};
use crate::message::{self, Event};
use crate::{Error, Exit, Result, Scope};

/// Where the first process listens (unix(7)).
const NAME: &[u8] = b"denizen-sudo";

/// A command that runs as somebody else. It goes on when this is dropped.
#[derive(Debug)]
pub struct Sudo {
    socket: OwnedFd,
}

impl Sudo {
    /// Starts a command as [`Spawn::user`]. Blocks until it has begun, or failed to.
    ///
    /// # Errors
    /// As for any command; [`Error::User`] with `EACCES` if who asks may not, and [`Error::NotFound`]
    /// if nobody listens: this is no sandbox.
    pub fn start(spawn: Spawn) -> Result<Self> {
        let lost = |source: Errno| Error::NotFound { source: source.into() };
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(lost)?;
        let address = SocketAddrUnix::new_abstract_name(NAME).map_err(lost)?;
        connect(&socket, &address).map_err(lost)?;
        // A sandbox's other processes could be there first, if it went on without its first: that
        // is all of it then.
        let peer = rustix::net::sockopt::socket_peercred(&socket).map_err(lost)?;
        if !peer.pid.is_init() {
            return Err(lost(Errno::PERM));
        }
        let (request, descriptors) = Request::of(spawn)?;
        match send_packet(socket.as_fd(), &request.packet(0), &descriptors) {
            // Who may not is told so without being asked.
            Ok(()) | Err(Errno::PIPE | Errno::CONNRESET) => {}
            Err(error) => return Err(Error::io("cannot ask the session's first process")(error)),
        }
        drop(descriptors);
        let started = Self { socket };
        match started.event()? {
            Event::Failed { stage, errno, .. } => Err(request.failure(stage, errno)),
            _ => Ok(started),
        }
    }

    /// Sends it a signal; to all of a tree it cannot be.
    pub fn signal(&self, number: u32, scope: Scope) {
        // It may have ended.
        let _ = send_packet(self.socket.as_fd(), &message::signal(0, number, scope), &[]);
    }

    /// Waits until it has ended. Blocks.
    ///
    /// # Errors
    /// [`Error::InitLost`].
    pub fn wait(&self) -> Result<Exit> {
        loop {
            if let Event::Exited { exit, .. } = self.event()? {
                return Ok(exit);
            }
        }
    }

    fn event(&self) -> Result<Event> {
        let mut packet = [0; 64];
        loop {
            match recv(&self.socket, &mut packet, RecvFlags::empty()) {
                // The latter is told once, before what was sent (unix(7)).
                Err(Errno::INTR | Errno::CONNRESET) => {}
                Ok((0, _)) | Err(_) => return Err(Error::InitLost),
                Ok((count, _)) => {
                    if let Some(event) = packet.get(..count).and_then(message::event) {
                        return Ok(event);
                    }
                }
            }
        }
    }
}
