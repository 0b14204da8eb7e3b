//! An init that is not a process of this kernel: it is reached by a socket on which something
//! speaks for it, and what says that it is gone is a descriptor. The rest is as ever.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use tokio::sync::watch;

use super::found::await_word;
use super::{Launched, MACHINE_ENDING, PATIENCE, Shared, State};
use crate::{Error, Result};

/// What runs an init elsewhere.
pub trait Machine: Send + Sync + std::fmt::Debug {
    /// Starts it, from a thread that may block.
    fn start(&self) -> io::Result<Started>;
    /// Ends it at once, and all that runs in it; does nothing if it has ended.
    fn kill(&self);
    /// Whether it cannot be expected to answer for now.
    fn is_asleep(&self) -> bool;
}

/// A machine that was started.
#[derive(Debug)]
pub struct Started {
    /// Where its init is spoken to: a `SOCK_SEQPACKET` socket, as `denizen-init` has it for an owner
    /// that has found it.
    pub socket: OwnedFd,
    /// Can be read when the machine is gone and will not come back, as an `eventfd(2)` or a
    /// process's descriptor.
    pub ended: OwnedFd,
    /// The machine, to be ended.
    pub machine: Arc<dyn Machine>,
}

/// What the thread of such an init has of it.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) ended: OwnedFd,
    machine: Arc<dyn Machine>,
}

impl Handle {
    pub(super) fn kill(&self) {
        self.machine.kill();
    }

    pub(super) fn wait(&self) {
        while let Err(Errno::INTR) = poll(&mut [PollFd::new(&self.ended, PollFlags::IN)], None) {}
    }
}

pub(super) fn start(machine: &dyn Machine) -> Result<(Arc<Shared>, Launched)> {
    let Started { socket, ended, machine } =
        machine.start().map_err(|source| Error::Launch { source })?;
    let gone = ended.try_clone().map_err(|source| Error::Launch { source })?;
    let prepared = || -> io::Result<(Shared, OwnedFd)> {
        // Commands may run there that an earlier owner has started.
        let (last_id, _) = await_word(&socket, PATIENCE)?;
        let shared = Shared {
            socket,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            pid: 0,
            process: Some(ended.try_clone()?),
            // No process here has it.
            nonce: u32::try_from(RandomState::new().hash_one(0u8) >> 33).unwrap_or(1).max(1),
            state: Mutex::new(State { last_id, ..State::default() }),
            finished: watch::Sender::new(false),
            contained: true,
            lingers: false,
            machine: Some(machine.clone()),
            patience: PATIENCE,
            ending: MACHINE_ENDING,
        };
        Ok((shared, ended))
    };
    match prepared() {
        Ok((shared, ended)) => Ok((Arc::new(shared), Launched::Machine(Handle { ended, machine }))),
        Err(source) => {
            machine.kill();
            // Its folder may be another's next.
            let ending = Timespec::try_from(MACHINE_ENDING).unwrap_or_default();
            let _ = poll(&mut [PollFd::new(&gone, PollFlags::IN)], Some(&ending));
            Err(Error::Launch { source })
        }
    }
}
