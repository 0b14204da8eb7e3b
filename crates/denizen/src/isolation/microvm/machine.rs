//! A session's machine: a guest within walls, and the link to it. It boots, sleeps in a file and
//! wakes from it; to whoever runs commands there it is one [`Machine`] all the time, until it is
//! gone for good. It must never have two guests at once, nor one without its walls.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use denizen_agent::{Machine, MachineStarted};
use denizen_link::{Clock, Failure, Fresh, Link, Wake};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use super::disks::{Disks, hex};
use super::hypervisor::{Guest, Walls};
use super::memory::{self, DiskState, Owner};
use super::{Enclosed, Memory, Parts, Shared, problem};
use crate::error::Result;
use crate::isolation::{Notice, Site};

/// How long a guest may take to boot.
const BOOT: Duration = Duration::from_mins(3);
/// How long one that has just been there may take to answer.
const ANSWER: Duration = Duration::from_mins(2);

/// The machine of one session.
pub(super) struct Vm {
    shared: Arc<Shared>,
    /// Itself, for whoever is to end it later.
    this: Weak<Self>,
    site: Mutex<Site>,
    state: Mutex<State>,
    /// Held while it begins, so that none does so twice.
    starting: Mutex<()>,
    /// It is to end, whatever it becomes next.
    killed: AtomicBool,
    /// It is being put to sleep.
    resting: AtomicBool,
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
    /// What it was made of, which there may be no more.
    parts: Arc<Parts>,
    walls: Enclosed,
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
            starting: Mutex::default(),
            killed: AtomicBool::new(false),
            resting: AtomicBool::new(false),
        })
    }

    /// What it wakes from belongs to.
    fn owner(parts: &Parts, site: &Site) -> io::Result<Owner> {
        let disk = DiskState::of(&site.disk())?;
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
        // Of a daemon that was killed while this machine was being put to sleep.
        let _ = std::fs::remove_file(memory::partial(&site.memory()));
        let parts = Arc::new(self.shared.parts(&site)?);
        // Before there are walls, which show the volume that is there then.
        self.shared.disks().adopt(&site, self.shared.disk_size())?;
        let has_disk = site.disk().exists();
        let template = if has_disk { None } else { self.shared.template(&site, &parts)? };
        let putting_up = Instant::now();
        let walls = self.shared.walls(&site, &parts, true)?;
        tracing::debug!(session = %site.id, took = ?putting_up.elapsed(), "walls are up");
        let begun = self.begin_within(&site, &parts, &walls, template);
        if begun.is_err() {
            let _ = self.shared.runtime.block_on(walls.agent.shutdown(Duration::ZERO));
            self.shared.cleared(&site);
        }
        begun
    }

    fn begin_within(
        &self,
        site: &Site,
        parts: &Arc<Parts>,
        walls: &Enclosed,
        template: Option<Box<Memory>>,
    ) -> Result<(Running, OwnedFd)> {
        if !site.disk().exists() {
            Disks::empty(&walls.agent, site, self.shared.disk_size())?;
        }
        let failed = |error: io::Error| problem(&error);
        let memory = if template.is_some() {
            Ok(template)
        } else {
            let owner = Self::owner(parts, site).map_err(failed)?;
            let memory = memory::open(&site.memory(), &owner);
            memory.map(|memory| memory.map(|it| Box::new(it) as Box<Memory>))
        };
        let resumed = memory.and_then(|memory| {
            let Some(mut memory) = memory else { return Ok(None) };
            let guest = self.load(site, parts, walls, &mut *memory)?;
            self.reach(parts, walls, guest).map(Some)
        });
        match resumed {
            Ok(Some(begun)) => return Ok(begun),
            Ok(None) => {}
            Err(why) => {
                self.lost_memory(site, &why).map_err(failed)?;
                // Whatever has become of it, it must not be there beside the next one.
                let _ = self.shared.runtime.block_on(walls.agent.clear());
            }
        }
        self.boot(site, parts, walls).map_err(failed)
    }

    /// Tells that what ran does not go on, and why. Fails if it may still do so another time.
    fn lost_memory(&self, site: &Site, why: &io::Error) -> io::Result<()> {
        let memory = site.memory();
        if memory.exists() {
            if !memory::is_unfit(why) {
                return Err(io::Error::new(why.kind(), format!("it cannot be woken now: {why}")));
            }
            std::fs::remove_file(memory)?;
        }
        tracing::warn!(session = %site.id, %why, "what ran in it is lost: it boots");
        self.shared.tell(site.id, Notice::Rebooted { reason: why.to_string() });
        Ok(())
    }

    fn boot(
        &self,
        site: &Site,
        parts: &Arc<Parts>,
        walls: &Enclosed,
    ) -> io::Result<(Running, OwnedFd)> {
        Disks::grow(&walls.agent, site, self.shared.disk_size()).map_err(io::Error::other)?;
        let tmp = site.machine().home.join("tmp");
        let walled = Walls { agent: &walls.agent, tmp: &tmp };
        let guest = self.shared.chosen()?.hypervisor.boot(walled, &parts.hardware)?;
        self.reach(parts, walls, guest)
    }

    /// Has a guest go on where its memory ends. From here on that is nobody's any more.
    fn load(
        &self,
        site: &Site,
        parts: &Parts,
        walls: &Enclosed,
        memory: &mut Memory,
    ) -> io::Result<Arc<dyn Guest>> {
        let tmp = site.machine().home.join("tmp");
        let walled = Walls { agent: &walls.agent, tmp: &tmp };
        let begun = Instant::now();
        let hypervisor = &self.shared.chosen()?.hypervisor;
        let guest = hypervisor.restore(walled, &parts.hardware, memory)?;
        tracing::debug!(session = %site.id, took = ?begun.elapsed(), "memory brought back");
        match std::fs::remove_file(site.memory()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // A power cut must not bring it back: the guest's disk is another one by then.
            removed => removed.and_then(|()| File::open(&site.home)?.sync_all())?,
        }
        guest.go_on()?;
        Ok(guest)
    }

    /// Links to a guest that has just begun.
    fn reach(
        &self,
        parts: &Arc<Parts>,
        walls: &Enclosed,
        guest: Arc<dyn Guest>,
    ) -> io::Result<(Running, OwnedFd)> {
        let _runtime = self.shared.runtime.enter();
        let (link, socket) = Link::new()?;
        let link = Arc::new(link);
        self.connect(&link, &guest, true)?;
        let ended = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let number = self.shared.next_number();
        let (parts, walls) = (parts.clone(), walls.clone());
        Ok((Running { number, parts, walls, guest, link, ended }, socket))
    }

    /// Connects a link to a guest, and tells the guest when it is, and who, if it is new to that.
    fn connect(&self, link: &Link, guest: &Arc<dyn Guest>, is_new: bool) -> io::Result<()> {
        let begun = Instant::now();
        let port = guest.port()?;
        let mut over = guest.ended();
        let connected = self.shared.runtime.block_on(async {
            tokio::select! {
                connected = link.connect(port, BOOT) => connected.map_err(io::Error::other),
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
            entropy: hex(&entropy),
            fresh: is_new.then(|| Fresh {
                hostname: format!("denizen-{}", id.get(..8).unwrap_or_default()),
                machine_id: id,
            }),
        };
        let answered = self.shared.runtime.block_on(tokio::time::timeout(ANSWER, link.wake(&wake)));
        for (step, why) in answered?.map_err(io::Error::other)?.failed {
            // The guest's own words.
            tracing::warn!(?step, ?why, "the guest could not do all on waking");
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
        let _ = running.walls.agent.shutdown(Duration::ZERO).await;
        signal(&running.ended);
    }

    /// Has it sleep in a file. After a failure it runs on, or is gone. One that is gone already is
    /// at rest.
    pub(super) fn suspend(&self) -> io::Result<()> {
        let site = self.site.lock().clone();
        let running = match &*self.state.lock() {
            State::Runs(running) => running.clone(),
            _ => return Ok(()),
        };
        self.resting.store(true, Ordering::SeqCst);
        let suspended = self.suspend_running(&site, &running);
        self.resting.store(false, Ordering::SeqCst);
        suspended
    }

    fn suspend_running(&self, site: &Site, running: &Running) -> io::Result<()> {
        let rested =
            self.shared.runtime.block_on(tokio::time::timeout(ANSWER, running.link.rest()));
        let rested = rested.map_err(io::Error::from).and_then(|it| it.map_err(io::Error::other));
        let slept = rested.and_then(|steps| {
            if let Some((step, why)) = steps.failed.first() {
                return Err(io::Error::other(format!(
                    "the guest does not rest: {step:?}: {why:?}"
                )));
            }
            running.guest.pause()?;
            let owner = Self::owner(&running.parts, site)?;
            memory::write(&site.memory(), &owner, |into| running.guest.save(into))
        });
        if let Err(error) = slept {
            let goes_on = running.guest.go_on().and_then(|()| self.introduce(&running.link, false));
            if let Err(why) = goes_on {
                // It may be gone; and one that cannot write must not stay.
                tracing::warn!(session = %site.id, %why, "the guest does not go on: ending it");
                running.guest.kill();
            }
            return Err(error);
        }
        {
            let mut state = self.state.lock();
            match &*state {
                State::Runs(now) if now.number == running.number => {}
                // It has ended meanwhile, and its memory is a good one all the same.
                _ => return Ok(()),
            }
            let Running { link, ended, .. } = running.clone();
            *state = State::Sleeps(Asleep { link, ended });
            self.end_if_killed(&mut state);
        }
        self.put_away(site, running)
    }

    /// Ends a guest whose memory is in a file.
    fn put_away(&self, site: &Site, running: &Running) -> io::Result<()> {
        self.shared.runtime.block_on(async {
            running.link.disconnect().await;
            let _ = running.walls.agent.shutdown(Duration::ZERO).await;
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
        match self.wake_from(&site, &link) {
            Ok((parts, walls, guest)) => {
                let number = self.shared.next_number();
                let running = Running { number, parts, walls, guest, link, ended };
                self.runs(&running);
            }
            Err(why) => {
                if let Err(error) = self.lost_memory(&site, &why) {
                    tracing::warn!(session = %site.id, %error, "the next use tries again");
                }
                signal(&ended);
            }
        }
        true
    }

    /// It has a guest from here on.
    fn runs(&self, running: &Running) {
        let mut state = self.state.lock();
        *state = State::Runs(running.clone());
        self.end_if_killed(&mut state);
        drop(state);
        self.watch(running);
    }

    /// Ends what it has become, if it was to end before that.
    fn end_if_killed(&self, state: &mut State) {
        if self.killed.load(Ordering::SeqCst) {
            end(state);
        }
    }

    fn wake_from(
        &self,
        site: &Site,
        link: &Link,
    ) -> io::Result<(Arc<Parts>, Enclosed, Arc<dyn Guest>)> {
        let parts = Arc::new(self.shared.parts(site).map_err(io::Error::other)?);
        let owner = Self::owner(&parts, site)?;
        let memory = memory::open(&site.memory(), &owner)?;
        let mut memory = memory.ok_or_else(|| io::Error::other("its memory is not there"))?;
        let walls = self.shared.walls(site, &parts, false).map_err(io::Error::other)?;
        let woken = self
            .load(site, &parts, &walls, &mut memory)
            .and_then(|guest| self.connect(link, &guest, false).map(|()| guest));
        if woken.is_err() {
            let _ = self.shared.runtime.block_on(walls.agent.shutdown(Duration::ZERO));
            self.shared.cleared(site);
        }
        Ok((parts, walls, woken?))
    }

    /// Makes the template that new sessions begin with: boots in an empty place and sleeps there.
    pub(super) fn make_template(&self) -> Result<()> {
        let site = self.site.lock().clone();
        let parts = Arc::new(self.shared.parts(&site)?);
        let walls = self.shared.walls(&site, &parts, true)?;
        let made = Disks::empty(&walls.agent, &site, self.shared.disk_size())
            .and_then(|()| self.boot(&site, &parts, &walls).map_err(|error| problem(&error)))
            .and_then(|(running, _socket)| {
                // Its first process has had no owner's word yet, so it is anybody's.
                *self.state.lock() = State::Runs(running);
                self.suspend().map_err(|error| problem(&error))
            });
        if made.is_err() {
            let _ = self.shared.runtime.block_on(walls.agent.shutdown(Duration::ZERO));
            self.shared.cleared(&site);
        }
        made
    }
}

impl Machine for Vm {
    fn start(&self) -> io::Result<MachineStarted> {
        let _starting = self.starting.lock();
        if !matches!(&*self.state.lock(), State::Off) {
            return Err(io::Error::other("the session's machine is there already"));
        }
        self.killed.store(false, Ordering::SeqCst);
        let _runtime = self.shared.runtime.enter();
        let machine = self.this.upgrade().ok_or(io::ErrorKind::NotFound)?;
        let (running, socket) = self.begin().map_err(io::Error::other)?;
        let ended = running.ended.try_clone();
        self.runs(&running);
        let ended = ended.inspect_err(|_| self.kill())?;
        Ok(MachineStarted { socket, ended, machine })
    }

    fn kill(&self) {
        self.killed.store(true, Ordering::SeqCst);
        end(&mut self.state.lock());
    }

    fn is_asleep(&self) -> bool {
        self.resting.load(Ordering::SeqCst) || !matches!(&*self.state.lock(), State::Runs(_))
    }
}

/// Ends what a machine is.
fn end(state: &mut State) {
    match state {
        // Its end is told when it is there.
        State::Runs(running) => running.guest.kill(),
        State::Sleeps(asleep) => {
            signal(&asleep.ended);
            *state = State::Off;
        }
        State::Off => {}
    }
}

/// Copies the memory of a session that sleeps to a copy of it, if it has one.
pub(super) fn copy_memory(from: &Site, into: &Site) -> io::Result<()> {
    let memory = from.memory();
    if !memory.exists() {
        return Ok(());
    }
    let [disk, copy] = [DiskState::of(&from.disk())?, DiskState::of(&into.disk())?];
    memory::copy(&memory, disk, &into.memory(), copy)
}

/// Tells that a machine is gone.
fn signal(ended: &OwnedFd) {
    // It cannot be full.
    let _ = rustix::io::write(ended, &1u64.to_ne_bytes());
}
