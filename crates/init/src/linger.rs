//! What lets a sandbox go on for a while without its owner, until the next one finds it: a
//! socket that only whoever may open the session's folder can connect to. There is one owner
//! at a time: who connects while there is one waits in line. It must never let a process of
//! the sandbox's own in.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::sys::{self, PollFd};

/// How this program speaks, for an owner that may be of another version.
pub const VERSION: u32 = 1;

/// See the module.
pub struct Linger {
    listener: OwnedFd,
    time: Duration,
    /// The way to the outside, which each owner gets a copy of.
    door: Option<OwnedFd>,
    /// Since when there is no owner.
    since: Option<Instant>,
    /// Outputs of commands that go on without an owner, which reads them while there is one.
    /// Without a reader their writers would be ended.
    kept: Vec<OwnedFd>,
}

impl Linger {
    pub fn new(listener: OwnedFd, time: Duration, door: Option<OwnedFd>) -> Self {
        Self { listener, time, door, since: None, kept: Vec::new() }
    }

    pub fn is_alone(&self) -> bool {
        self.since.is_some()
    }

    /// The owner is gone; gives what nobody reads any more.
    pub fn be_alone(&mut self) -> Vec<OwnedFd> {
        self.since = Some(Instant::now());
        std::mem::take(&mut self.kept)
    }

    /// How much longer it goes on, while there is no owner.
    pub fn time_left(&self) -> Option<Duration> {
        Some(self.time.saturating_sub(self.since?.elapsed()))
    }

    /// Lets the next owner in, if one is there; gives what it is to have.
    pub fn let_in(&mut self) -> Result<Option<OwnedFd>, i32> {
        sys::replace_control(&sys::sandbox::accept(&self.listener)?)?;
        self.since = None;
        // Without a copy it has no way to the outside.
        Ok(self.door.as_ref().and_then(|door| door.try_clone().ok()))
    }

    /// Keeps outputs open.
    pub fn keep(&mut self, mut outputs: Vec<OwnedFd>) {
        self.kept.append(&mut outputs);
    }

    /// What to look at: whether somebody is in line, and whether what is kept has ended.
    pub fn look_at(&self, fds: &mut Vec<PollFd>) {
        let listener = if self.is_alone() { self.listener.as_raw_fd() } else { -1 };
        fds.push(PollFd { fd: listener, events: sys::POLLIN, revents: 0 });
        let kept = self.kept.iter().map(AsRawFd::as_raw_fd);
        fds.extend(kept.map(|fd| PollFd { fd, events: 0, revents: 0 }));
    }

    /// Lets go of what has ended, by what was seen of what [`Linger::look_at`] named; whether
    /// somebody is in line.
    pub fn seen(&mut self, ready: &[i16]) -> bool {
        let mut kept = ready.iter().skip(1);
        self.kept.retain(|_| kept.next().is_none_or(|ready| *ready == 0));
        ready.first().is_some_and(|ready| *ready != 0)
    }
}
