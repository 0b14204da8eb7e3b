//! A session's machine: a guest within walls, and the link to it. It boots, sleeps in a file and
//! wakes from it; to whoever runs commands there it is one [`Machine`] all the time, until it is
//! gone for good. It must never have two guests at once, nor one without its walls.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use denizen_agent::{Agent, Machine, MachineStarted};
use denizen_link::{Clock, Failure, Fresh, Link, Wake};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use super::disks::Disks;
use super::hypervisor::{Guest, Walls};
use super::memory::{self, DiskState, Owner};
use super::{Memory, Parts, Shared, problem};
use crate::error::Result;
use crate::isolation::{Notice, Site};

/// How long a guest may take to boot.
const BOOT: Duration = Duration::from_mins(3);
/// How long one that has just been there may take to answer.
const ANSWER: Duration = Duration::from_secs(30);

/// The machine of one session.
pub(super) struct Vm {
    shared: Arc<Shared>,
    /// Itself, for whoever is to end it later.
    this: Weak<Self>,
    site: Mutex<Site>,
    state: Mutex<State>,
}

enum State {
    /// There is none, or it is gone.
    Off,
    Runs(Running),
    /// Its memory is in a file.
    Sleeps(Asleep),
}

/// A guest that runs.
#[derive(Clone)]
struct Running {
    /// What it was started as: a later one has another number.
    number: u64,
    walls: Agent,
    guest: Arc<dyn Guest>,
    link: Arc<Link>,
    /// Is written to when it is gone for good.
    ended: Arc<OwnedFd>,
}

struct Asleep {
    link: Arc<Link>,
    ended: Arc<OwnedFd>,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm").field("site", &self.site.lock().id).finish_non_exhaustive()
    }
}

impl Vm {
    pub(super) fn new(shared: Arc<Shared>, site: Site) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            shared,
            this: this.clone(),
            site: Mutex::new(site),
            state: Mutex::new(State::Off),
        })
    }

    /// Where its memory is while it sleeps.
    fn memory(site: &Site) -> PathBuf {
        site.home.join("memory")
    }

    /// What it wakes from belongs to.
    fn owner(parts: &Parts, site: &Site) -> io::Result<Owner> {
        let disk = DiskState::of(&site.volume.join("disk"))?;
        Ok(Owner { machine: parts.identity.clone(), disk })
    }

    /// Its session is another one's now, in another folder.
    pub(super) fn moved(&self, to: &Site) -> io::Result<()> {
        *self.site.lock() = to.clone();
        let running = match &*self.state.lock() {
            State::Runs(running) => running.clone(),
            _ => return Ok(()),
        };
        self.introduce(&running.link, true)
    }

    /// Begins where a memory in its folder ends, or the template's, or at the beginning.
    fn begin(&self) -> Result<(Running, OwnedFd)> {
        let site = self.site.lock().clone();
        let parts = self.shared.parts(&site)?;
        let has_disk = site.volume.join("disk").exists();
        // Before there are walls, which show the volume that is there then.
        let template = if has_disk { None } else { self.shared.template(&site, &parts)? };
        let putting_up = Instant::now();
        let walls = self.shared.walls(&site, &parts)?;
        tracing::debug!(session = %site.id, took = ?putting_up.elapsed(), "walls are up");
        let begun = self.begin_within(&site, &parts, &walls, template);
        if begun.is_err() {
            let _ = self.shared.runtime.block_on(walls.shutdown(Duration::ZERO));
            self.shared.cleared(&site);
        }
        begun
    }

    fn begin_within(
        &self,
        site: &Site,
        parts: &Parts,
        walls: &Agent,
        template: Option<Box<Memory>>,
    ) -> Result<(Running, OwnedFd)> {
        if !site.volume.join("disk").exists() {
            Disks::empty(walls, &site.volume, self.shared.disk_size())?;
        }
        let memory = if template.is_some() {
            template
        } else {
            let owner = Self::owner(parts, site).map_err(|error| problem(&error))?;
            match memory::open(&Self::memory(site), &owner) {
                Ok(memory) => memory.map(|it| Box::new(it) as Box<Memory>),
                Err(why) => {
                    self.lost_memory(site, &why);
                    None
                }
            }
        };
        if let Some(memory) = memory {
            match self.resume(site, parts, walls, memory) {
                Ok(begun) => return Ok(begun),
                Err(why) => self.lost_memory(site, &why),
            }
        }
        self.boot(site, parts, walls).map_err(|error| problem(&error))
    }

    /// Tells that what ran does not go on, and why.
    fn lost_memory(&self, site: &Site, why: &io::Error) {
        tracing::warn!(session = %site.id, %why, "what ran in it is lost: it boots");
        let _ = std::fs::remove_file(Self::memory(site));
        self.shared.tell(site.id, Notice::Rebooted { reason: why.to_string() });
    }

    fn boot(&self, site: &Site, parts: &Parts, walls: &Agent) -> io::Result<(Running, OwnedFd)> {
        Disks::grow(walls, &site.volume, self.shared.disk_size()).map_err(io::Error::other)?;
        let tmp = site.machine().home.join("tmp");
        let walled = Walls { agent: walls, tmp: &tmp };
        let guest = self.shared.hypervisor().boot(walled, &parts.hardware)?;
        self.reach(walls, guest, BOOT)
    }

    fn resume(
        &self,
        site: &Site,
        parts: &Parts,
        walls: &Agent,
        mut memory: Box<Memory>,
    ) -> io::Result<(Running, OwnedFd)> {
        let guest = self.load(site, parts, walls, &mut *memory)?;
        self.reach(walls, guest, ANSWER)
    }

    /// Has a guest go on where its memory ends. From here on that is nobody's any more.
    fn load(
        &self,
        site: &Site,
        parts: &Parts,
        walls: &Agent,
        memory: &mut Memory,
    ) -> io::Result<Arc<dyn Guest>> {
        let tmp = site.machine().home.join("tmp");
        let walled = Walls { agent: walls, tmp: &tmp };
        let begun = Instant::now();
        let guest = self.shared.hypervisor().restore(walled, &parts.hardware, memory)?;
        tracing::debug!(session = %site.id, took = ?begun.elapsed(), "memory brought back");
        match std::fs::remove_file(Self::memory(site)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        guest.go_on()?;
        Ok(guest)
    }

    /// Links to a guest that has just begun.
    fn reach(
        &self,
        walls: &Agent,
        guest: Arc<dyn Guest>,
        patience: Duration,
    ) -> io::Result<(Running, OwnedFd)> {
        let _runtime = self.shared.runtime.enter();
        let (link, socket) = Link::new()?;
        let link = Arc::new(link);
        self.connect(&link, &guest, patience, true)?;
        let ended = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let number = self.shared.next_number();
        let running = Running { number, walls: walls.clone(), guest, link, ended };
        Ok((running, socket))
    }

    /// Connects a link to a guest, and tells the guest when it is, and who, if it is new to that.
    fn connect(
        &self,
        link: &Link,
        guest: &Arc<dyn Guest>,
        patience: Duration,
        is_new: bool,
    ) -> io::Result<()> {
        let begun = Instant::now();
        let port = guest.port()?;
        let mut over = guest.ended();
        let connected = self.shared.runtime.block_on(async {
            tokio::select! {
                connected = link.connect(port, patience) => connected.map_err(io::Error::other),
                _ = over.wait_for(|ended| *ended) => Err(io::Error::other("the guest has ended")),
            }
        });
        tracing::debug!(took = ?begun.elapsed(), "guest answers");
        let connected = connected.and_then(|()| self.introduce(link, is_new));
        tracing::debug!(took = ?begun.elapsed(), is_new, "guest is told who it is");
        connected.map_err(|error| match guest.last_words() {
            words if words.is_empty() => error,
            words => io::Error::new(error.kind(), format!("{error}; it said: {words}")),
        })
    }

    /// Tells a guest what it cannot know: the time, what nobody can guess, and who it is, if it
    /// is new to that.
    fn introduce(&self, link: &Link, is_new: bool) -> io::Result<()> {
        let id = self.site.lock().id.simple().to_string();
        let mut entropy = [0; 64];
        getrandom::fill(&mut entropy).map_err(io::Error::other)?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let wake = Wake {
            clock: Clock {
                seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
                nanoseconds: now.subsec_nanos(),
            },
            entropy: entropy.iter().map(|byte| format!("{byte:02x}")).collect(),
            fresh: is_new.then(|| Fresh {
                hostname: format!("denizen-{}", id.get(..8).unwrap_or_default()),
                machine_id: id,
            }),
        };
        let answered = self.shared.runtime.block_on(tokio::time::timeout(ANSWER, link.wake(&wake)));
        for (step, why) in answered?.map_err(io::Error::other)?.failed {
            tracing::warn!(step, why, "the guest could not do all on waking");
        }
        Ok(())
    }

    /// Sees to it that the end of a guest is noticed, and what follows from it is done.
    fn watch(&self, running: &Running) {
        let (this, running) = (self.this.clone(), running.clone());
        let number = running.number;
        self.shared.runtime.spawn(async move {
            let mut over = running.guest.ended();
            let broken = tokio::select! {
                _ = over.wait_for(|ended| *ended) => None,
                why = running.link.failed() => Some(why),
            };
            if let Some(why) = &broken
                && *why != Failure::Ended
            {
                tracing::warn!(%why, "the guest cannot be reached any more: ending it");
                running.guest.kill();
            }
            drop(running.link);
            let _ = over.wait_for(|ended| *ended).await;
            if let Some(this) = this.upgrade() {
                this.gone(number).await;
            }
        });
    }

    /// A guest has ended. If nobody wanted that, its machine has.
    async fn gone(&self, number: u64) {
        let running = {
            let mut state = self.state.lock();
            match std::mem::replace(&mut *state, State::Off) {
                State::Runs(running) if running.number == number => running,
                other => {
                    *state = other;
                    return;
                }
            }
        };
        let _ = running.walls.shutdown(Duration::ZERO).await;
        signal(&running.ended);
    }

    /// Whether it has a guest.
    pub(super) fn runs(&self) -> bool {
        matches!(&*self.state.lock(), State::Runs(_))
    }

    /// Has it sleep in a file. After a failure it runs on, or is gone.
    pub(super) fn suspend(&self) -> io::Result<()> {
        let site = self.site.lock().clone();
        let running = match &*self.state.lock() {
            State::Runs(running) => running.clone(),
            State::Sleeps(_) => return Ok(()),
            State::Off => return Err(io::Error::other("the machine does not run")),
        };
        let parts = self.shared.parts(&site).map_err(io::Error::other)?;
        let rested =
            self.shared.runtime.block_on(tokio::time::timeout(ANSWER, running.link.rest()));
        let rested = rested.map_err(io::Error::from).and_then(|it| it.map_err(io::Error::other));
        let slept = rested.and_then(|steps| {
            if let Some((step, why)) = steps.failed.first() {
                return Err(io::Error::other(format!("the guest does not rest: {step}: {why}")));
            }
            running.guest.pause()?;
            let owner = Self::owner(&parts, &site)?;
            memory::write(&Self::memory(&site), &owner, |into| running.guest.save(into))
        });
        if let Err(error) = slept {
            // Neither has to work: it may be gone.
            let _ = running.guest.go_on();
            let _ = self.introduce(&running.link, false);
            return Err(error);
        }
        {
            let mut state = self.state.lock();
            match &*state {
                State::Runs(now) if now.number == running.number => {}
                _ => return Err(io::Error::other("the machine has ended")),
            }
            let Running { link, ended, .. } = running.clone();
            *state = State::Sleeps(Asleep { link, ended });
        }
        self.put_away(&site, &running)
    }

    /// Ends a guest whose memory is in a file.
    fn put_away(&self, site: &Site, running: &Running) -> io::Result<()> {
        self.shared.runtime.block_on(async {
            running.link.disconnect().await;
            let _ = running.walls.shutdown(Duration::ZERO).await;
            let mut over = running.guest.ended();
            let over = tokio::time::timeout(ANSWER, over.wait_for(|ended| *ended)).await;
            over.map(drop).map_err(io::Error::from)
        })?;
        self.shared.cleared(site);
        Ok(())
    }

    /// Has it go on; gives whether it slept. If what ran in it cannot go on, its machine is gone,
    /// and the next command has a new one.
    pub(super) fn wake(&self) -> bool {
        let site = self.site.lock().clone();
        let Asleep { link, ended } = {
            let mut state = self.state.lock();
            match std::mem::replace(&mut *state, State::Off) {
                State::Sleeps(asleep) => asleep,
                other => {
                    *state = other;
                    return false;
                }
            }
        };
        let woken = self.wake_from(&site, &link);
        match woken {
            Ok((walls, guest)) => {
                let number = self.shared.next_number();
                let running = Running { number, walls, guest, link, ended };
                *self.state.lock() = State::Runs(running.clone());
                self.watch(&running);
            }
            Err(why) => {
                self.lost_memory(&site, &why);
                signal(&ended);
            }
        }
        true
    }

    fn wake_from(&self, site: &Site, link: &Link) -> io::Result<(Agent, Arc<dyn Guest>)> {
        let parts = self.shared.parts(site).map_err(io::Error::other)?;
        let owner = Self::owner(&parts, site)?;
        let memory = memory::open(&Self::memory(site), &owner)?;
        let mut memory = memory.ok_or_else(|| io::Error::other("its memory is not there"))?;
        let walls = self.shared.walls(site, &parts).map_err(io::Error::other)?;
        let woken = self
            .load(site, &parts, &walls, &mut memory)
            .and_then(|guest| self.connect(link, &guest, ANSWER, false).map(|()| guest));
        if woken.is_err() {
            let _ = self.shared.runtime.block_on(walls.shutdown(Duration::ZERO));
            self.shared.cleared(site);
        }
        Ok((walls, woken?))
    }

    /// Makes the template that new sessions begin with: boots in an empty place and sleeps there.
    pub(super) fn make_template(&self) -> Result<()> {
        let site = self.site.lock().clone();
        let parts = self.shared.parts(&site)?;
        let walls = self.shared.walls(&site, &parts)?;
        let made = Disks::empty(&walls, &site.volume, self.shared.disk_size())
            .and_then(|()| self.boot(&site, &parts, &walls).map_err(|error| problem(&error)))
            .and_then(|(running, _socket)| {
                // Its first process has had no owner's word yet, so it is anybody's.
                *self.state.lock() = State::Runs(running);
                self.suspend().map_err(|error| problem(&error))
            });
        if made.is_err() {
            let _ = self.shared.runtime.block_on(walls.shutdown(Duration::ZERO));
            self.shared.cleared(&site);
        }
        made
    }
}

impl Machine for Vm {
    fn start(&self) -> io::Result<MachineStarted> {
        let _runtime = self.shared.runtime.enter();
        let (running, socket) = self.begin().map_err(io::Error::other)?;
        let ended = running.ended.try_clone()?;
        *self.state.lock() = State::Runs(running.clone());
        self.watch(&running);
        let machine = self.this.upgrade().ok_or(io::ErrorKind::NotFound)?;
        Ok(MachineStarted { socket, ended, machine })
    }

    fn kill(&self) {
        let mut state = self.state.lock();
        match &*state {
            // Its end is told when it is there.
            State::Runs(running) => running.guest.kill(),
            State::Sleeps(asleep) => {
                signal(&asleep.ended);
                *state = State::Off;
            }
            State::Off => {}
        }
    }
}

/// Copies the memory of a session that sleeps to a copy of it, if it has one.
pub(super) fn copy_memory(from: &Site, into: &Site) -> io::Result<()> {
    let memory = Vm::memory(from);
    if !memory.exists() {
        return Ok(());
    }
    let disk = DiskState::of(&into.volume.join("disk"))?;
    memory::copy(&memory, &Vm::memory(into), disk)
}

/// Tells that a machine is gone.
fn signal(ended: &OwnedFd) {
    // It cannot be full.
    let _ = rustix::io::write(ended, &1u64.to_ne_bytes());
}
