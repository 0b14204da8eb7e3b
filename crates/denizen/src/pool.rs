//! The pool: carries out what the lifecycle decides.
//!
//! Callers change the [`Lifecycle`] under one short, synchronous lock and wait, if they have
//! to, on a channel of their own. What the lifecycle orders is handed to one driver task,
//! which writes rows first (many at once, if many are waiting) and then runs each operation in
//! a task of its own; the operation's end goes back into the lifecycle. The pool must never
//! decide anything about a session: if it seems to have to, the lifecycle lacks a rule.

mod figures;
mod forgetting;
mod moving;
mod operation;
mod progress;
mod sharing;
mod watch;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use denizen_agent::Agent;
use denizen_image::Store;
use denizen_network::{Denial, EgressRules};
use denizen_repository::{Counter, Report as BackupReport};
use futures::StreamExt;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinSet;
use tracing::Span;
use tracing::field::Empty;
use uuid::Uuid;

use crate::backup::{Backup, BackupFormat, Backups, Retention};
use crate::bootstrap;
use crate::config;
use crate::config::VmPoolRuntimeConfig;
use crate::error::{Error, Result};
use crate::event::{
    Announcer, Event, EventKind, Events, maybe_unix_seconds, op_name, unix_seconds,
};
use crate::isolation::{
    self, Driver, Instance, Isolation, Limits, Notice, Options, Site, no_roots,
};
use crate::lifecycle::{
    Change, Effect, Found, Lifecycle, Op, Phase, Policy, PoolTime, Refusal, Row, Saved, Seq, View,
    WaiterId, Want,
};
use crate::name::{SessionName, SnapshotName};
use crate::registry::{Facts, Registry, Remembered, Write, phase_name};
use crate::share::Mount;
use crate::snapshot::{Difference, Version};
use crate::time::{Clock, PoolClock};
use crate::usage::{Processes, Usage};
use crate::volume::{Staged, Volumes};

pub use figures::{Figures, Histogram};
pub use moving::Export;
use moving::Sent;
use operation::GivenUp;
pub(crate) use progress::Watched as Telling;
pub(crate) use watch::Mark;
use watch::{Watch, Watched};

/// Longest sleep of the timer. Only bounds the harm of a clock that stands still.
const LONGEST_SLEEP: Duration = Duration::from_mins(1);
/// How long rows that could not be written wait for the next try.
const WRITE_AGAIN: Duration = Duration::from_secs(5);

/// What a builder can choose beyond the configuration.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) isolation: Isolation,
    pub(crate) instances: Options,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) acquire_timeout: Option<Duration>,
    pub(crate) background_is_use: bool,
    pub(crate) spares: usize,
    pub(crate) backup_format: BackupFormat,
    pub(crate) backup_key: Option<PathBuf>,
    pub(crate) retention: Retention,
}

/// What begins as the settings have it, and may change.
#[derive(Debug)]
struct Changing {
    acquire_timeout: Option<Duration>,
    retention: Retention,
}

impl Changing {
    fn of(settings: &Settings) -> Self {
        Self { acquire_timeout: settings.acquire_timeout, retention: settings.retention }
    }
}

/// A session's place in this process.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) site: Site,
    /// Where commands start, as they see it.
    pub(crate) workdir: PathBuf,
    /// Set while the session is active.
    instance: Mutex<Option<Instance>>,
    /// How often a process of the instance was ended for want of memory, as last seen.
    out_of_memory: AtomicU64,
    /// Whether nothing ran in the instance when it was last frozen.
    quiet: AtomicBool,
    /// What is known of its use of the disk, where that is limited.
    watched: Watched,
}

impl Place {
    /// Tells afterwards whether what begins now was ended because of the disk.
    pub(crate) fn disk_mark(&self) -> Mark {
        self.watched.mark()
    }

    pub(crate) fn disk_ended_since(&self, mark: Mark) -> bool {
        self.watched.ended_since(mark)
    }

    pub(crate) fn agent(&self) -> Option<Agent> {
        self.instance.lock().as_ref().map(|instance| instance.agent.clone())
    }

    /// What every environment begins with, whatever its root and configuration: a plain `PATH`,
    /// `HOME` and `PWD` in the volume, a UTF-8 locale.
    pub(crate) fn environment(&self) -> BTreeMap<String, String> {
        let workdir = self.workdir.to_string_lossy().into_owned();
        [
            ("HOME", workdir.as_str()),
            ("LANG", "C.UTF-8"),
            ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
            ("PWD", &workdir),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
    }

    /// What the instance's root adds to every command's environment.
    pub(crate) fn env(&self) -> BTreeMap<String, String> {
        self.instance.lock().as_ref().map(|instance| instance.env.clone()).unwrap_or_default()
    }
}

/// An instance that is no session's yet.
struct Spare {
    site: Site,
    instance: Instance,
}

/// What a new session begins with.
#[derive(Clone)]
enum Origin {
    /// A copy of another one, which it takes.
    Copy(Arc<Staged>),
    /// An image of this name.
    Image(String),
    /// What was exported elsewhere.
    Archive(Arc<Sent>),
}

/// Says what a session begins with, should it be made meanwhile.
struct Begins<'a>(&'a Pool, Uuid);

impl<'a> Begins<'a> {
    /// None if somebody else has said so before; then that holds.
    fn with(pool: &'a Pool, state: &mut State, id: Uuid, origin: Origin) -> Option<Self> {
        let Entry::Vacant(free) = state.origins.entry(id) else { return None };
        free.insert(origin);
        Some(Self(pool, id))
    }
}

impl Drop for Begins<'_> {
    fn drop(&mut self) {
        let origin = self.0.state.lock().origins.remove(&self.1);
        // A copy that was not used goes with it, which is no work for a time under the lock.
        drop(origin);
    }
}

/// Where a copy of a session goes.
#[derive(Clone)]
struct Copying {
    into: Arc<Staged>,
    /// Kept as a snapshot of this name.
    keep_as: Option<SnapshotName>,
}

/// The exclusive hold on a session; dropping it gives the session back.
pub(crate) struct Hold {
    pub(crate) pool: Arc<Pool>,
    pub(crate) place: Arc<Place>,
}

impl Hold {
    fn new(pool: &Arc<Pool>, place: Arc<Place>) -> Self {
        if let Some(watch) = &pool.watch {
            watch.in_use(&place);
        }
        Self::still(pool, place)
    }

    /// The hold on a session in which nothing runs.
    fn still(pool: &Arc<Pool>, place: Arc<Place>) -> Self {
        Self { pool: pool.clone(), place }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let id = self.place.site.id;
        let watched = self.pool.apply(|state, now, out| {
            state.core.release(now, id, out);
            state.watching > 0
        });
        if watched {
            self.pool.changed.notify_waiters();
        }
    }
}

/// What a waiter is told: a hold if it wanted one.
type Answer = Result<Option<Hold>>;

enum Order {
    Run(Operation, Option<Write>),
    Prepare,
    Discard(Spare),
    Write(Write),
}

/// What is to be done for a session.
struct Operation {
    id: Uuid,
    seq: Seq,
    op: Op,
    span: Span,
    /// That of whoever it is begun for, within which is also what follows from it.
    asked: Span,
}

struct State {
    core: Lifecycle,
    places: foldhash::HashMap<Uuid, Arc<Place>>,
    waiters: HashMap<WaiterId, oneshot::Sender<Answer>>,
    next_waiter: WaiterId,
    /// Flags of operations that may be given up.
    interrupts: HashMap<Seq, Arc<AtomicBool>>,
    /// What sessions about to be made begin with, if not with the pool's default.
    origins: HashMap<Uuid, Origin>,
    /// The copies that somebody waits for.
    copies: HashMap<Uuid, Copying>,
    /// The backups that are being deleted: nothing may be put back from them any more.
    forgetting: HashSet<String>,
    /// The backups that are read for others than their sessions: none of them may be deleted.
    reading: Vec<String>,
    /// How many backups are being written that nobody waits for.
    saving: usize,
    spares: Vec<Spare>,
    /// What sessions about to be made are made of.
    claimed: HashMap<Uuid, (Option<Spare>, Option<Origin>)>,
    /// How many spares are being made.
    preparing: usize,
    /// How many spares are being ended.
    discarding: usize,
    ids: BTreeMap<String, Uuid>,
    names: HashMap<Uuid, SessionName>,
    /// The last failure of each session that has not been followed by a success.
    failures: HashMap<Uuid, String>,
    /// The last failure of a backup of each session that no backup has followed.
    backup_failures: HashMap<Uuid, (SystemTime, String)>,
    /// What is known of the latest backups.
    facts: HashMap<Uuid, Facts>,
    /// The rules of those sessions that have some of their own.
    egress: HashMap<Uuid, EgressRules>,
    /// The shared folders of those sessions that have some.
    mounts: HashMap<Uuid, Vec<Mount>>,
    /// When the timer will look next.
    armed: Option<PoolTime>,
    closing: bool,
    /// What still runs has been left to the next pool.
    left: bool,
    /// How many callers wait in [`Pool::until`].
    watching: usize,
}

pub(crate) struct Pool {
    pub(crate) config: Arc<VmPoolRuntimeConfig>,
    settings: Settings,
    clock: PoolClock,
    volumes: Volumes,
    driver: Arc<dyn Driver>,
    backups: Option<Backups>,
    registry: Arc<Mutex<Registry>>,
    state: Mutex<State>,
    orders: mpsc::UnboundedSender<Order>,
    /// Something is due earlier than the timer knows.
    earlier: Notify,
    /// An operation has ended or a guard was given back.
    changed: Notify,
    announcer: Announcer,
    /// Where sessions' use of the disk is limited.
    watch: Option<Watch>,
    /// When backups are next to be forgotten. Locked by whoever does it, one at a time.
    forget_due: Mutex<forgetting::Due>,
    /// Who receives an archive.
    imports: tokio::sync::Semaphore,
    figures: Mutex<Figures>,
    changing: Mutex<Changing>,
}

impl Drop for Pool {
    /// Instances end with the pool, which those that stand still could not where that needs
    /// them to hear of it.
    fn drop(&mut self) {
        if self.driver.keeps_frozen() {
            return;
        }
        for place in self.state.get_mut().places.values() {
            if place.agent().is_some()
                && let Err(error) = self.driver.thaw(&place.site)
            {
                tracing::warn!(session = %place.site.id, %error, "stays frozen");
            }
        }
    }
}

/// The pool's tasks; they end when this is dropped.
pub(crate) struct Tasks(#[allow(dead_code)] JoinSet<()>);

impl Pool {
    /// Opens the volume root, takes up what an earlier process left, and begins to work.
    /// Must be called within a Tokio runtime.
    pub(crate) fn open(
        config: Arc<VmPoolRuntimeConfig>,
        settings: Settings,
    ) -> Result<(Arc<Self>, Tasks)> {
        if config.max_vms == 0 {
            return Err(Error::config("max_vms", "must be greater than zero"));
        }
        let volumes = Volumes::open(&config.volume_root)?;
        let (mut registry, mut remembered) = Registry::open(volumes.root(), volumes.own())?;
        let (notices, noticed) = mpsc::channel(1024);
        let options = Options { notices: Some(notices), ..settings.instances.clone() };
        let driver = settings.isolation.driver(volumes.own(), options)?;
        let clock = PoolClock::resume(settings.clock.clone(), remembered.time.as_ref());
        let known: HashSet<Uuid> = remembered.rows.iter().map(|row| row.id).collect();
        registry.commit(&strays(&remembered, &known), &clock.save())?;
        let egress = narrowed(&mut remembered, &known, &*driver);
        let mounts = sharing::begin(&mut remembered, &mut registry, &volumes, &*driver)?;

        let orphans = unknown_to(&known, &volumes)?;
        let mut resumed = left_running(&remembered.rows, &orphans, &volumes, &*driver);
        let backups = backups_of(&config, &settings, &volumes, &*driver, &remembered)?;
        let moved = moved(&mut remembered, backups.as_ref());
        registry.commit(&moved, &clock.save())?;
        let rows = remembered.rows.into_iter().map(|row| {
            let found = found_of(&row, &volumes);
            let runs = found == Found::Whole && resumed.contains_key(&row.id);
            (row, if runs { Found::Running } else { found })
        });
        let rows = rows.collect();

        let policy = policy(&config, &settings, &*driver, backups.is_some());
        let (orders, inbox) = mpsc::unbounded_channel();
        let names = remembered.names.into_iter().filter(|(_, id)| known.contains(id));
        let names: HashMap<Uuid, SessionName> = names.map(|(name, id)| (id, name)).collect();
        let state = State {
            core: Lifecycle::new(policy),
            places: foldhash::HashMap::default(),
            waiters: HashMap::new(),
            next_waiter: 1,
            interrupts: HashMap::new(),
            origins: HashMap::new(),
            copies: HashMap::new(),
            forgetting: HashSet::new(),
            reading: Vec::new(),
            saving: 0,
            spares: Vec::new(),
            claimed: HashMap::new(),
            preparing: 0,
            discarding: 0,
            ids: names.iter().map(|(id, name)| (name.to_string(), *id)).collect(),
            names,
            failures: HashMap::new(),
            backup_failures: HashMap::new(),
            facts: remembered.facts.into_iter().filter(|(id, _)| known.contains(id)).collect(),
            egress,
            mounts,
            armed: None,
            closing: false,
            left: false,
            watching: 0,
        };
        let pool = Arc::new(Self {
            changing: Mutex::new(Changing::of(&settings)),
            watch: driver.disk_limit().map(Watch::new),
            driver,
            config,
            settings,
            clock,
            volumes,
            backups,
            registry: Arc::new(Mutex::new(registry)),
            state: Mutex::new(state),
            orders,
            earlier: Notify::new(),
            changed: Notify::new(),
            announcer: Announcer::new(),
            forget_due: Mutex::new(forgetting::Due::after(remembered.forgot_at)),
            imports: tokio::sync::Semaphore::new(moving::MOST_IMPORTS),
            figures: Mutex::default(),
        });
        for (id, instance) in resumed.drain() {
            tracing::info!(session = %id, "found running");
            let place = pool.place(&mut pool.state.lock(), id);
            let seen = pool.driver.out_of_memory(&place.site);
            place.out_of_memory.store(seen, Ordering::Relaxed);
            *place.instance.lock() = Some(instance);
        }
        pool.sweep();
        pool.apply(|state, now, out| state.core.recover(now, rows, &orphans, out));
        let mut tasks = JoinSet::new();
        tasks.spawn(drive(Arc::downgrade(&pool), inbox));
        tasks.spawn(keep_time(Arc::downgrade(&pool)));
        if pool.watch.is_some() {
            tasks.spawn(watch::run(Arc::downgrade(&pool)));
        }
        tasks.spawn(tell_notices(Arc::downgrade(&pool), noticed));
        if pool.backups.is_some() {
            tasks.spawn(forgetting::run(Arc::downgrade(&pool)));
        }
        Ok((pool, Tasks(tasks)))
    }

    /// Deletes what a killed process left half-done, beside the work.
    fn sweep(&self) {
        let left_over = self.volumes.left_over();
        let backups = self.backups.clone();
        tokio::task::spawn_blocking(move || {
            left_over.remove();
            if let Some(Err(error)) = backups.map(|backups| backups.sweep()) {
                tracing::warn!(%error, "cannot look for half-written backups");
            }
        });
    }

    // ---- The state, and what follows from changing it -----------------------------------

    /// Changes the lifecycle and sees to what it orders.
    fn apply<T>(
        self: &Arc<Self>,
        change: impl FnOnce(&mut State, PoolTime, &mut Vec<Effect>) -> T,
    ) -> T {
        self.apply_after(None, change)
    }

    /// As `apply`, when `failure` is why callers may be turned away.
    fn apply_after<T>(
        self: &Arc<Self>,
        failure: Option<&Arc<Error>>,
        change: impl FnOnce(&mut State, PoolTime, &mut Vec<Effect>) -> T,
    ) -> T {
        let mut effects = Vec::new();
        let mut answers = Vec::new();
        let now = self.clock.now();
        let mut state = self.state.lock();
        let result = change(&mut state, now, &mut effects);
        for effect in effects {
            // Orders leave under the lock, so that they stay in the lifecycle's order.
            self.carry_out(&mut state, effect, failure, &mut answers);
        }
        let due = state.core.next_due();
        let earlier = due.is_some_and(|due| state.armed.is_none_or(|armed| due < armed));
        drop(state);
        if earlier {
            self.earlier.notify_one();
        }
        // An answer nobody waits for gives its hold back, which takes the lock.
        for (waiter, answer) in answers {
            let _: std::result::Result<(), Answer> = oneshot::Sender::send(waiter, answer);
        }
        result
    }

    fn carry_out(
        self: &Arc<Self>,
        state: &mut State,
        effect: Effect,
        failure: Option<&Arc<Error>>,
        answers: &mut Vec<(oneshot::Sender<Answer>, Answer)>,
    ) {
        // A closed channel means that the manager is gone: nothing is begun any more.
        let order = |order| drop(self.orders.send(order));
        match effect {
            Effect::Run { id, seq, op, row } => {
                match op {
                    Op::Backup => drop(state.interrupts.insert(seq, Arc::default())),
                    Op::Create { spare } => {
                        let spare = if spare { state.spares.pop() } else { None };
                        // Now: whoever wants it so may be gone when the operation looks.
                        let origin = state.origins.get(&id).cloned();
                        state.claimed.insert(id, (spare, origin));
                    }
                    _ => {}
                }
                let name = op_name(&op);
                let span = tracing::info_span!(
                    "operation",
                    otel.name = name,
                    otel.status_code = Empty,
                    operation = name,
                    session = %id,
                    error = Empty,
                );
                order(Order::Run(
                    Operation { id, seq, op, span, asked: Span::current() },
                    row.map(Write::Save),
                ));
            }
            Effect::Interrupt { seq, .. } => {
                if let Some(flag) = state.interrupts.get(&seq) {
                    flag.store(true, Ordering::Relaxed);
                    // It may wait for its turn.
                    self.changed.notify_waiters();
                }
            }
            Effect::Prepare => {
                state.preparing += 1;
                order(Order::Prepare);
            }
            Effect::Discard => {
                if let Some(spare) = state.spares.pop() {
                    state.discarding += 1;
                    order(Order::Discard(spare));
                }
            }
            Effect::Save(row) => order(Order::Write(Write::Save(row))),
            Effect::Forget(id) => {
                order(Order::Write(Write::Forget(id)));
                state.places.remove(&id);
                state.failures.remove(&id);
                state.backup_failures.remove(&id);
                state.facts.remove(&id);
                if state.egress.remove(&id).is_some() {
                    self.driver.set_egress(id, None);
                }
                self.unmounted(state, id);
                if let Some(name) = state.names.remove(&id) {
                    state.ids.remove(name.as_str());
                }
            }
            Effect::Grant { id, waiter } => {
                // Even if nobody waits any more: dropping the hold gives it back.
                let place = self.place(state, id);
                let view = state.core.view(id);
                let active = view.is_some_and(|view| view.row.phase == Phase::Active);
                let hold = if active { Hold::new } else { Hold::still }(self, place);
                let sender = state.waiters.remove(&waiter).unwrap_or_else(|| oneshot::channel().0);
                answers.push((sender, Ok(Some(hold))));
            }
            Effect::Fulfil { waiter, .. } => {
                if let Some(sender) = state.waiters.remove(&waiter) {
                    answers.push((sender, Ok(None)));
                }
            }
            Effect::Refuse { id, waiter, why } => {
                let error = self.refusal(state, id, &why, failure);
                if let Some(sender) = state.waiters.remove(&waiter) {
                    answers.push((sender, Err(error)));
                }
            }
            Effect::Notify { id, change } => self.tell(state, id, change, failure),
        }
    }

    fn refusal(
        &self,
        state: &State,
        id: Uuid,
        why: &Refusal,
        failure: Option<&Arc<Error>>,
    ) -> Error {
        match why {
            Refusal::AtCapacity => Error::AtCapacity {
                max_vms: self.config.max_vms,
                last_failure: state.failures.values().next().cloned(),
            },
            Refusal::InUse => Error::InUse { session: id },
            Refusal::Unknown => Error::Unknown { session: id.to_string() },
            Refusal::Missing => Error::VolumeMissing {
                session: id,
                path: self.volumes.home(id).join("volume"),
                backup: state.core.view(id).and_then(|view| view.row.backup.clone()),
            },
            Refusal::NoDestination => Error::NoDestination,
            Refusal::CannotFreeze => Error::NoFreezer {
                isolation: self.settings.isolation.name(),
                problem: "nothing here can make their processes stand still (`denizen doctor` \
                          tells why): stop the session instead",
            },
            Refusal::Failed => match failure {
                Some(error) => Error::Shared(error.clone()),
                None => Error::Task("its operation failed".to_owned()),
            },
        }
    }

    fn tell(&self, state: &mut State, id: Uuid, change: Change, failure: Option<&Arc<Error>>) {
        match &change {
            Change::Failed { retry_at: Some(_), .. } => {
                let text = failure.map_or_else(|| "unknown".to_owned(), ToString::to_string);
                state.failures.insert(id, text);
            }
            Change::BackedUp(_) | Change::Archived | Change::Stopped | Change::Frozen => {
                state.failures.remove(&id);
            }
            _ => {}
        }
        match &change {
            Change::Failed { op: Op::Backup, .. } => {
                let text = failure.map_or_else(|| "unknown".to_owned(), ToString::to_string);
                state.backup_failures.insert(id, (self.clock.wall(), text));
            }
            Change::BackedUp(_) => drop(state.backup_failures.remove(&id)),
            _ => {}
        }
        let kind = match change {
            Change::Created => EventKind::Created,
            Change::Started => EventKind::Started,
            Change::Stopped => EventKind::Stopped,
            Change::Frozen => EventKind::Frozen,
            Change::Thawed => EventKind::Thawed,
            Change::StillRunning => EventKind::StillRunning,
            Change::BackedUp(backup) => EventKind::BackedUp { backup },
            Change::Restored(Saved::Backup(backup)) => EventKind::Restored { backup },
            Change::Restored(Saved::Snapshot(snapshot)) => EventKind::SnapshotRestored { snapshot },
            Change::Restored(Saved::Part { of, paths }) => {
                let paths = paths.iter().map(|path| path.display().to_string()).collect();
                let backup = of.backup().map(str::to_owned);
                let snapshot = match *of {
                    Saved::Snapshot(name) => Some(name),
                    _ => None,
                };
                EventKind::PartRestored { backup, snapshot, paths }
            }
            Change::Archived => EventKind::Archived,
            Change::Deleted => EventKind::Deleted,
            Change::Removed => EventKind::Removed,
            Change::Adopted => EventKind::Adopted,
            Change::Recovered => EventKind::Recovered,
            Change::Missing => EventKind::Missing,
            Change::Failed { op, retry_at } => EventKind::Failed {
                operation: op_name(&op),
                error: failure.map_or_else(String::new, ToString::to_string),
                retry_at: retry_at.map(|at| self.clock.to_wall(at)),
            },
        };
        match &kind {
            EventKind::Deleted => tracing::warn!(
                session = %id,
                "session deleted with its files: the pool has no backup destination"
            ),
            EventKind::Missing => tracing::warn!(session = %id, "volume has vanished from disk"),
            EventKind::Failed { operation, error, .. } => {
                tracing::warn!(session = %id, operation, error, "operation failed");
            }
            kind => tracing::info!(session = %id, event = ?kind),
        }
        let name = state.names.get(&id).map(ToString::to_string);
        self.announcer.announce(Event { at: self.clock.wall(), session: id, name, kind });
    }

    fn place(&self, state: &mut State, id: Uuid) -> Arc<Place> {
        let place = state.places.entry(id).or_insert_with(|| {
            let site = self.volumes.site(id);
            let workdir = self.driver.workdir(&site);
            Arc::new(Place {
                site,
                workdir,
                instance: Mutex::default(),
                out_of_memory: AtomicU64::new(0),
                quiet: AtomicBool::new(false),
                watched: Watched::default(),
            })
        });
        place.clone()
    }

    // ---- What callers want --------------------------------------------------------------

    /// Takes the session for one caller. Cancel-safe: dropped at any point, it leaves the line
    /// or gives the session back.
    pub(crate) async fn acquire(self: &Arc<Self>, id: Uuid) -> Result<Hold> {
        {
            let mut state = self.state.lock();
            if !state.closing && state.core.acquire_warm(id) {
                let place = self.place(&mut state, id);
                drop(state);
                return Ok(Hold::new(self, place));
            }
        }
        let answer = self.ask_in_time(id, |patient| Want::Guard { patient }).await?;
        answer.ok_or_else(|| Error::Task("a guard was asked for and none given".to_owned()))
    }

    /// Asks for something that may take a place in the pool. Cancel-safe as [`Pool::ask`].
    async fn ask_in_time(self: &Arc<Self>, id: Uuid, want: impl FnOnce(bool) -> Want) -> Answer {
        let timeout = self.changing.lock().acquire_timeout;
        let answer = self.ask(id, want(timeout.is_some()));
        match timeout {
            None => answer.await,
            Some(limit) => match tokio::time::timeout(limit, answer).await {
                Ok(answer) => answer,
                Err(_) => Err(self.waited_too_long(id, limit)),
            },
        }
    }

    pub(crate) fn set_acquire_timeout(&self, limit: Option<Duration>) {
        self.changing.lock().acquire_timeout = limit;
    }

    fn waited_too_long(&self, session: Uuid, waited: Duration) -> Error {
        let state = self.state.lock();
        let view = state.core.view(session);
        let at_capacity = view.is_none_or(|view| {
            view.running.is_none() && !view.held && !view.row.phase.is_resident()
        });
        Error::AcquireTimeout { session, waited, at_capacity }
    }

    /// Asks for something and waits for the answer. Cancel-safe: dropped, it leaves the line;
    /// what has begun on its behalf goes on.
    pub(crate) async fn ask(self: &Arc<Self>, id: Uuid, want: Want) -> Answer {
        struct Ticket<'a>(&'a Arc<Pool>, Uuid, WaiterId);
        impl Drop for Ticket<'_> {
            fn drop(&mut self) {
                let Self(pool, id, waiter) = *self;
                pool.apply(|state, now, out| {
                    // If it is gone, the answer has been given; or the pool is closing, and it is
                    // still in line.
                    if state.waiters.remove(&waiter).is_some() || state.closing {
                        state.core.cancel(now, id, waiter, out);
                    }
                });
            }
        }
        let (sender, answer) = oneshot::channel();
        let waiter = self.apply(|state, now, out| {
            if state.closing {
                return Err(Error::ShuttingDown);
            }
            let waiter = state.next_waiter;
            state.next_waiter += 1;
            state.waiters.insert(waiter, sender);
            state.core.acquire(now, id, waiter, want, out);
            Ok(waiter)
        })?;
        let _ticket = Ticket(self, id, waiter);
        answer.await.unwrap_or(Err(Error::ShuttingDown))
    }

    /// Makes a new session of a copy of another one, or of a snapshot of that. Cancel-safe: what
    /// was copied goes.
    pub(crate) async fn fork(
        self: &Arc<Self>,
        source: Uuid,
        snapshot: Option<SnapshotName>,
    ) -> Result<Uuid> {
        self.known(source)?;
        let copy = match snapshot {
            None => self.copy(source, None).await?,
            Some(name) => self.copy_snapshot(source, name).await?,
        };
        self.made_of(source, copy).await
    }

    /// Makes a new session of a copy of another one, with the rules and shared folders of that.
    async fn made_of(self: &Arc<Self>, source: Uuid, copy: Arc<Staged>) -> Result<Uuid> {
        let id = Uuid::new_v4();
        let (rules, mounts) = {
            let state = self.state.lock();
            (state.egress.get(&source).cloned(), state.mounts.get(&source).cloned())
        };
        let (narrowed, mounted) = (rules.is_some(), mounts.is_some());
        let made = async {
            if narrowed {
                // What runs in the copy of a machine goes on at once.
                self.put_egress(id, rules).await?;
            }
            if let Some(mounts) = mounts {
                self.put_mounts(id, mounts).await?;
            }
            self.acquire_made_of(id, Origin::Copy(copy)).await.map(drop)
        };
        let made = made.await;
        if made.is_err() && self.known(id).is_err() {
            if narrowed {
                self.put_egress(id, None).await?;
            }
            if mounted {
                self.put_mounts(id, Vec::new()).await?;
            }
        }
        made.map(|()| id)
    }

    /// What a session has of the pool's network, if not all of it.
    pub(crate) fn egress(&self, id: Uuid) -> Result<Option<EgressRules>> {
        self.known(id)?;
        Ok(self.state.lock().egress.get(&id).cloned())
    }

    /// Says what a session has of the pool's network from now on. Cancel-safe: what has begun goes
    /// on.
    pub(crate) async fn set_egress(
        self: &Arc<Self>,
        id: Uuid,
        rules: Option<EgressRules>,
    ) -> Result<()> {
        if let Some(rules) = &rules {
            rules.check().map_err(|source| Error::Egress { session: id, source })?;
            if self.settings.isolation == Isolation::Host {
                let problem = "its sessions share the network of their host, which cannot be \
                               narrowed for one of them"
                    .to_owned();
                return Err(Error::Isolation { isolation: "host", problem });
            }
        }
        self.known(id)?;
        self.put_egress(id, rules).await?;
        // It may have been removed meanwhile, and these came after that.
        match self.known(id) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.put_egress(id, None).await?;
                Err(error)
            }
        }
    }

    async fn put_egress(self: &Arc<Self>, id: Uuid, rules: Option<EgressRules>) -> Result<()> {
        let pool = self.clone();
        blocking(move || {
            // Held all the time, so that what is durable is what is in force.
            let mut registry = pool.registry.lock();
            registry.set_egress(id, rules.as_ref())?;
            let mut state = pool.state.lock();
            match &rules {
                Some(rules) => drop(state.egress.insert(id, rules.clone())),
                None => drop(state.egress.remove(&id)),
            }
            pool.driver.set_egress(id, rules);
            Ok(())
        })
        .await
    }

    /// Makes a new session of what another one has in a backup. It is restored at once, not as an
    /// archived session is: that one would count on a backup that is another's, which neither
    /// finding nor forgetting backups knows. Cancel-safe: what was restored goes.
    pub(crate) async fn fork_backup(self: &Arc<Self>, source: Uuid, name: String) -> Result<Uuid> {
        let copy = operation::restore_copy(self, source, name).await?;
        self.made_of(source, copy).await
    }

    /// Keeps a copy of a session under a name. Cancel-safe: what has begun goes on.
    pub(crate) async fn snapshot(self: &Arc<Self>, id: Uuid, name: SnapshotName) -> Result<()> {
        self.known(id)?;
        if self.volumes.snapshot(id, &name).is_ok() {
            return Err(Error::SnapshotExists { session: id, name: name.to_string() });
        }
        self.copy(id, Some(name)).await.map(drop)
    }

    /// Copies a session. Cancel-safe: what has begun goes on.
    async fn copy(
        self: &Arc<Self>,
        id: Uuid,
        keep_as: Option<SnapshotName>,
    ) -> Result<Arc<Staged>> {
        struct Forget<'a>(&'a Pool, Uuid);
        impl Drop for Forget<'_> {
            fn drop(&mut self) {
                let copying = self.0.state.lock().copies.remove(&self.1);
                // As an origin: not under the lock.
                drop(copying);
            }
        }
        let copy = Uuid::new_v4();
        let into = Arc::new(self.volumes.stage(copy)?);
        let copying = Copying { into: into.clone(), keep_as };
        self.state.lock().copies.insert(copy, copying);
        let _forget = Forget(self, copy);
        self.ask_in_time(id, |patient| Want::Copied { copy, patient }).await?;
        Ok(into)
    }

    /// What two versions of sessions differ in. What a session has now is copied first, so that
    /// it is of one instant and need not stand still for longer. Cancel-safe.
    pub(crate) async fn diff(
        self: &Arc<Self>,
        before: Version,
        after: Version,
    ) -> Result<Vec<Difference>> {
        let (before, _first) = self.version(before).await?;
        let (after, _second) = self.version(after).await?;
        blocking(move || crate::snapshot::diff(&before, &after)).await
    }

    /// Where the files of a version are, and what keeps them there.
    async fn version(self: &Arc<Self>, version: Version) -> Result<(Site, Option<Arc<Staged>>)> {
        let Version { session, snapshot } = version;
        if let Some(name) = snapshot {
            let find = move |volumes: &Volumes| volumes.snapshot(session, &name);
            return Ok((self.with_volumes(session, find).await?, None));
        }
        self.known(session)?;
        let copy = self.copy(session, None).await?;
        Ok((Site::in_folder(session, copy.path().to_owned()), Some(copy)))
    }

    /// Copies a snapshot, which nothing changes. Cancel-safe.
    async fn copy_snapshot(self: &Arc<Self>, id: Uuid, name: SnapshotName) -> Result<Arc<Staged>> {
        let pool = self.clone();
        blocking(move || {
            let from = pool.volumes.snapshot(id, &name)?;
            let into = pool.volumes.stage(id)?;
            crate::snapshot::copy(&from, into.path())?;
            into.sync()?;
            Ok(Arc::new(into))
        })
        .await
    }

    /// Runs `work` with the folders of a session that is known, where it may block.
    pub(crate) async fn with_volumes<T: Send + 'static>(
        self: &Arc<Self>,
        id: Uuid,
        work: impl FnOnce(&Volumes) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.known(id)?;
        let pool = self.clone();
        blocking(move || work(&pool.volumes)).await
    }

    /// As [`Pool::acquire`]; a new session is made of this image, one that there is must be.
    pub(crate) async fn acquire_with_image(
        self: &Arc<Self>,
        id: Uuid,
        image: &str,
    ) -> Result<Hold> {
        let hold = self.acquire_made_of(id, Origin::Image(image.to_owned())).await?;
        let (pool, place) = (self.clone(), hold.place.clone());
        match blocking(move || Ok(pool.driver.image(&place.site))).await? {
            Some(of) if of == image => Ok(hold),
            of => Err(Error::OtherImage { session: id, image: of }),
        }
    }

    async fn acquire_made_of(self: &Arc<Self>, id: Uuid, origin: Origin) -> Result<Hold> {
        let _begins = Begins::with(self, &mut self.state.lock(), id, origin);
        self.acquire(id).await
    }

    fn known(&self, id: Uuid) -> Result<()> {
        match self.state.lock().core.view(id) {
            Some(view) if view.row.phase != Phase::Absent => Ok(()),
            _ => Err(Error::Unknown { session: id.to_string() }),
        }
    }

    /// The session of that name.
    pub(crate) fn named(&self, name: &SessionName) -> Option<Uuid> {
        self.state.lock().ids.get(name.as_str()).copied()
    }

    /// The session of that name; a new one's id if there is none.
    pub(crate) async fn id_for(self: &Arc<Self>, name: &SessionName) -> Result<Uuid> {
        if let Some(id) = self.named(name) {
            return Ok(id);
        }
        let pool = self.clone();
        let name = name.clone();
        blocking(move || {
            let mut registry = pool.registry.lock();
            // Another caller may have been first.
            if let Some(id) = pool.named(&name) {
                return Ok(id);
            }
            let id = Uuid::new_v4();
            registry.name(&name, id)?;
            let mut state = pool.state.lock();
            state.ids.insert(name.to_string(), id);
            state.names.insert(id, name);
            Ok(id)
        })
        .await
    }

    /// A backup of a session by its name, or by what only its name begins with.
    pub(crate) async fn find_backup(self: &Arc<Self>, id: Uuid, name: &str) -> Result<String> {
        let pool = self.clone();
        let wanted = name.to_owned();
        let none = || Error::NoBackup { session: id, name: Some(name.to_owned()) };
        let mut found: Vec<String> = blocking(move || {
            let all = pool.backups()?.list(Some(id))?.into_iter().map(|backup| backup.name);
            Ok(all.filter(|name| name.starts_with(&wanted)).collect())
        })
        .await?;
        if let Some(whole) = found.iter().position(|found| found == name) {
            return Ok(found.swap_remove(whole));
        }
        let only = found.pop().ok_or_else(none)?;
        if found.is_empty() { Ok(only) } else { Err(none()) }
    }

    /// Checks all backups. Cancel-safe: dropped, it is given up.
    pub(crate) async fn verify_backups(self: &Arc<Self>, read_data: bool) -> Result<BackupReport> {
        let given_up = GivenUp::default();
        let flag = given_up.flag();
        let counter = Arc::new(Counter::default());
        let total = if read_data {
            let pool = self.clone();
            let all = blocking(move || pool.backups()?.list(None)).await?;
            // What frames it is read too.
            Some(all.iter().map(|backup| backup.bytes + backup.bytes / 50).sum())
        } else {
            None
        };
        let telling = Telling {
            session: None,
            operation: "verify",
            counter: counter.clone(),
            skips: false,
            total,
        };
        let verify = {
            let pool = self.clone();
            blocking(move || pool.backups()?.verify(read_data, &counter, &flag))
        };
        let report = self.telling(telling, verify).await?;
        let mut figures = self.figures.lock();
        figures.verifications += 1;
        figures.verify_findings += report.findings.len() as u64;
        Ok(report)
    }

    /// Makes known what is known only by its backups.
    pub(crate) async fn recover_sessions(self: &Arc<Self>) -> Result<Vec<SessionInfo>> {
        let pool = self.clone();
        blocking(move || {
            let mut found = Vec::new();
            // The newest of each comes first.
            for backup in pool.backups()?.list(None)? {
                let id = backup.session;
                let backup_name = backup.name.clone();
                let is_new =
                    pool.apply(|state, now, out| state.core.recovered(now, id, backup_name, out));
                if !is_new {
                    continue;
                }
                if let Some(name) = backup.session_name.and_then(|name| name.parse().ok()) {
                    pool.give_name(&name, id)?;
                }
                found.push(pool.inspect(id)?);
            }
            Ok(found)
        })
        .await
    }

    /// Gives a session a name that no other has. Blocks.
    fn give_name(&self, name: &SessionName, id: Uuid) -> Result<()> {
        let mut registry = self.registry.lock();
        if self.named(name).is_some() {
            tracing::warn!(session = %id, %name, "recovered without its name, which another has");
            return Ok(());
        }
        registry.name(name, id)?;
        let mut state = self.state.lock();
        state.ids.insert(name.to_string(), id);
        state.names.insert(id, name.clone());
        Ok(())
    }

    pub(crate) fn sessions(&self) -> Vec<SessionInfo> {
        let state = self.state.lock();
        let mut all: Vec<_> = state
            .core
            .views()
            .filter(|view| view.row.phase != Phase::Absent)
            .map(|view| self.info(&state, &view))
            .collect();
        drop(state);
        all.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        all
    }

    pub(crate) fn inspect(&self, id: Uuid) -> Result<SessionInfo> {
        self.known(id)?;
        let state = self.state.lock();
        let view = state.core.view(id);
        let info = view.map(|view| self.info(&state, &view));
        drop(state);
        let mut info = info.ok_or_else(|| Error::Unknown { session: id.to_string() })?;
        info.image = self.driver.image(&self.volumes.site(id));
        Ok(info)
    }

    /// What runs the sessions' machines. Cancel-safe.
    pub(crate) async fn hypervisor(&self) -> Result<Option<String>> {
        let driver = self.driver.clone();
        blocking(move || Ok(driver.hypervisor())).await
    }

    /// What those of the sessions use that run. Cancel-safe.
    pub(crate) async fn usage(self: &Arc<Self>, ids: &[Uuid]) -> Result<HashMap<Uuid, Usage>> {
        let places: Vec<_> = {
            let state = self.state.lock();
            ids.iter().filter_map(|id| state.places.get(id)).cloned().collect()
        };
        let driver = self.driver.clone();
        blocking(move || {
            // Looked at only if something else does not tell.
            let mut processes = None;
            let mut used = HashMap::new();
            for place in places {
                let Some(agent) = place.agent() else { continue };
                let mut usage = driver.usage(&place.site);
                if !usage.is_whole()
                    && let Some(first) = agent.first_process_now()
                    && let Ok(all) = processes.get_or_insert_with(Processes::look)
                {
                    usage = usage.or(all.below(first));
                }
                used.insert(place.site.id, usage);
            }
            Ok(used)
        })
        .await
    }

    fn info(&self, state: &State, view: &View<'_>) -> SessionInfo {
        let row = view.row;
        let wall = |at| self.clock.to_wall(at);
        let facts = state.facts.get(&row.id);
        let facts = facts.filter(|facts| Some(&facts.name) == row.backup.as_ref());
        let taken_at = facts.and_then(|it| jiff::Timestamp::from_millisecond(it.taken_at).ok());
        let backup_taken_at = taken_at.map(SystemTime::from);
        let saved_at =
            if row.backup.is_some() { backup_taken_at } else { Some(wall(row.created_at)) };
        let backup_failure = state.backup_failures.get(&row.id);
        SessionInfo {
            id: row.id,
            name: state.names.get(&row.id).map(ToString::to_string),
            isolation: self.settings.isolation.name(),
            image: None,
            state: phase_name(row.phase),
            operation: view.running.map(op_name),
            in_use: view.held,
            waiting: view.waiting,
            created_at: wall(row.created_at),
            last_used: wall(row.last_used),
            unsaved: row.unsaved,
            unsaved_since: saved_at.filter(|_| row.unsaved),
            backup: row.backup.clone(),
            backup_taken_at,
            backup_size: facts.and_then(|facts| facts.size),
            backup_added: facts.map(|facts| facts.added),
            backup_due_at: view.backup_due.map(wall),
            backup_failure: backup_failure.map(|(_, text)| text.clone()),
            backup_failed_at: backup_failure.map(|(at, _)| *at),
            failures: view.failures,
            last_failure: state.failures.get(&row.id).cloned(),
            retry_at: view.retry_at.map(wall),
            disk_used: state.places.get(&row.id).and_then(|it| it.watched.known.lock().used()),
            disk_limit: self.disk_limit(),
            volume: row.phase.is_resident().then(|| self.volumes.home(row.id).join("volume")),
        }
    }

    /// That the registry can be read and the volume root written. Cancel-safe.
    pub(crate) async fn check(self: &Arc<Self>) -> Result<()> {
        if self.state.lock().closing {
            return Err(Error::ShuttingDown);
        }
        let pool = self.clone();
        blocking(move || {
            pool.registry.lock().check()?;
            let own = pool.volumes.own();
            crate::config::probe(own).map_err(|source| Error::volume("write to", own, source))
        })
        .await
    }

    /// That the backup destination can be written to, as far as that costs nothing. Cancel-safe.
    pub(crate) async fn check_destination(&self) -> Result<()> {
        let Some(backups) = self.backups.clone() else { return Ok(()) };
        blocking(move || backups.check()).await
    }

    pub(crate) fn figures(&self) -> Figures {
        self.figures.lock().clone()
    }

    /// Keeps what is known of a session's latest backup. Blocks.
    fn note_backup(&self, backup: &Backup) {
        let facts = Facts {
            name: backup.name.clone(),
            taken_at: backup.taken_at.as_millisecond(),
            added: backup.bytes,
            size: backup.size,
        };
        let mut registry = self.registry.lock();
        let known = self.backups.as_ref().and_then(Backups::newly_used);
        let noted = registry
            .note(backup.session, &facts)
            .and_then(|()| known.map_or(Ok(()), |place| registry.write_to(&place)));
        drop(registry);
        if let Err(error) = noted {
            // It is shown until the next start, then.
            tracing::warn!(session = %backup.session, %error, "cannot note a backup");
        }
        self.state.lock().facts.insert(backup.session, facts);
    }

    pub(crate) fn resident(&self) -> usize {
        self.state.lock().core.resident()
    }

    pub(crate) fn events(&self) -> Events {
        self.announcer.listen()
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.settings.instances.limits
    }

    pub(crate) fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// Runs `work` with the images, where it may block.
    pub(crate) async fn with_images<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<Self>, &Store) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let pool = self.clone();
        blocking(move || work(&pool, pool.images()?)).await
    }

    pub(crate) fn images(&self) -> Result<&Store> {
        self.driver.images().ok_or_else(|| no_roots(self.settings.isolation.name()))
    }

    /// Whether a session on this disk, or a snapshot of one, needs a layer.
    pub(crate) fn needs_layer(&self, layer: &Path) -> bool {
        let sessions = self.volumes.scan().unwrap_or_default();
        let sessions = sessions.into_iter().map(|id| self.volumes.site(id));
        let others = self.volumes.spares().into_iter().chain(self.volumes.all_snapshots());
        let mut sessions = sessions.chain(others);
        sessions.any(|site| self.driver.layers(&site).iter().any(|needed| needed == layer))
    }

    /// How many bytes of the disk a session may have, where that is limited.
    pub(crate) fn disk_limit(&self) -> Option<u64> {
        self.watch.as_ref().map(Watch::limit)
    }

    /// Whether memory has run out in a session since this was last asked.
    pub(crate) fn ran_out_of_memory(&self, place: &Place) -> bool {
        let now = self.driver.out_of_memory(&place.site);
        place.out_of_memory.swap(now, Ordering::Relaxed) < now
    }

    pub(crate) fn isolation(&self) -> Isolation {
        self.settings.isolation
    }

    pub(crate) fn backups(&self) -> Result<&Backups> {
        self.backups.as_ref().ok_or(Error::NoDestination)
    }

    pub(crate) fn site(&self, id: Uuid) -> PathBuf {
        self.volumes.home(id)
    }

    // ---- Housekeeping -------------------------------------------------------------------

    /// Does what is due and waits until it is done. Cancel-safe: what has begun goes on.
    pub(crate) async fn maintain(self: &Arc<Self>) {
        self.apply(|state, now, out| state.core.tick_eagerly(now, out));
        let quiet = |state: &State| {
            state.core.housekeeping() == 0 && state.preparing == 0 && state.discarding == 0
        };
        self.until(quiet).await;
        self.forget_if_due(true).await;
    }

    /// What spares are made of may have changed.
    pub(crate) fn renew_spares(self: &Arc<Self>) {
        self.apply(|state, now, out| state.core.renew_spares(now, out));
    }

    /// Waits until the condition holds. Cancel-safe.
    async fn until(&self, condition: impl Fn(&State) -> bool) {
        struct Watch<'a>(&'a Pool);
        impl Drop for Watch<'_> {
            fn drop(&mut self) {
                self.0.state.lock().watching -= 1;
            }
        }
        self.state.lock().watching += 1;
        let _watch = Watch(self);
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if condition(&self.state.lock()) {
                return;
            }
            changed.await;
        }
    }

    /// Waits until nobody holds the session. Cancel-safe.
    pub(crate) async fn released(&self, id: Uuid) {
        self.until(|state| state.core.view(id).is_none_or(|view| !view.held)).await;
    }

    /// Lets nobody in any more, waits for guards and operations, ends all instances; with
    /// `leave` not those in which something runs, if they can go on.
    pub(crate) async fn shutdown(self: &Arc<Self>, leave: bool) -> Result<()> {
        let lingers = !self.settings.instances.linger.is_zero();
        // Where what is frozen is kept, anything can be.
        let keeps_frozen = self.driver.keeps_frozen();
        let leave =
            leave && (lingers || keeps_frozen) && self.settings.isolation != Isolation::Host;
        let waiting: Vec<_> = {
            let mut state = self.state.lock();
            state.closing = true;
            state.waiters.drain().collect()
        };
        drop(waiting);
        let quiet = |state: &State| {
            state.core.in_flight() == 0 && state.core.views().all(|view| !view.held)
        };
        self.until(quiet).await;
        self.apply(|state, now, out| {
            state.core.end_spares(now, out);
            for id in state.active() {
                let is_frozen = |view: View<'_>| view.row.phase == Phase::Frozen;
                let is_frozen = state.core.view(id).is_some_and(is_frozen);
                // What would end with a stop goes on.
                let stays = is_frozen || (leave && !self.settings.background_is_use);
                let is_paused = state.core.view(id).is_some_and(|view| view.row.paused);
                if (keeps_frozen && stays) || (leave && is_frozen && is_paused) {
                    continue;
                }
                let waiter = state.next_waiter;
                state.next_waiter += 1;
                let want = Want::Stopped { force: !leave };
                state.core.acquire(now, id, waiter, want, out);
            }
        });
        self.until(quiet).await;
        self.until(|state| state.preparing == 0 && state.discarding == 0).await;
        if leave {
            self.leave().await;
        }
        // The driver has written what the operations left; save the time last.
        let pool = self.clone();
        blocking(move || Ok(pool.registry.lock().commit(&[], &pool.clock.save())?)).await
    }

    /// Leaves to the next pool what still runs.
    async fn leave(&self) {
        let places: Vec<_> = {
            let mut state = self.state.lock();
            state.left = true;
            // What is frozen sees its owner go only when the next one thaws it. Until then it sees
            // no time pass either: only what somebody wants to have again is left so.
            let left = state.core.views().filter(|view| match view.row.phase {
                Phase::Active => true,
                Phase::Frozen => view.row.paused && !self.driver.keeps_frozen(),
                _ => false,
            });
            left.filter_map(|view| state.places.get(&view.row.id).cloned()).collect()
        };
        let leave = async |place: Arc<Place>| {
            let instance = place.instance.lock().take();
            if let Some(Instance { agent, .. }) = instance {
                let (driver, site) = (self.driver.clone(), place.site.clone());
                if let Err(error) = blocking(move || driver.leave(&site)).await {
                    tracing::warn!(session = %place.site.id, %error, "cannot be left to itself");
                    // What runs there can at least write down what it has.
                    let _ = agent.shutdown(operation::GRACE).await;
                }
                agent.leave().await;
            }
        };
        futures::stream::iter(places).for_each_concurrent(LEAVING, leave).await;
    }

    fn prepared(self: &Arc<Self>, spare: Result<Spare>) {
        if let Err(error) = &spare {
            tracing::warn!(%error, "no session can be made ready ahead of its use");
        }
        self.apply(|state, now, out| {
            state.preparing -= 1;
            let made = spare.is_ok();
            state.spares.extend(spare);
            state.core.prepared(now, made, out);
        });
        self.changed.notify_waiters();
    }

    fn discarded(&self) {
        self.state.lock().discarding -= 1;
        self.changed.notify_waiters();
    }

    fn finished(self: &Arc<Self>, id: Uuid, seq: Seq, ended: operation::Ended) {
        let operation::Ended { outcome, failure } = ended;
        let failure = failure.map(Arc::new);
        self.apply_after(failure.as_ref(), |state, now, out| {
            state.interrupts.remove(&seq);
            state.core.finished(now, id, seq, outcome, out);
        });
        self.changed.notify_waiters();
    }
}

/// How many instances are left to themselves at a time: some have much to write first.
const LEAVING: usize = 4;

/// What is there of a session's volume.
fn found_of(row: &Row, volumes: &Volumes) -> Found {
    volumes.found(row.id).unwrap_or_else(|error| {
        // Whoever wants it finds out, again and again.
        tracing::warn!(session = %row.id, %error, "taken to be there");
        Found::Whole
    })
}

/// The volumes on disk of which the registry does not know.
fn unknown_to(known: &HashSet<Uuid>, volumes: &Volumes) -> Result<Vec<(Uuid, Found)>> {
    let found = |id: Uuid| match volumes.found(id) {
        Ok(found) => Some((id, found)),
        // Nothing is made of it, nor is it deleted.
        Err(error) => {
            tracing::warn!(session = %id, %error, "a volume that nobody knows is left");
            None
        }
    };
    let unknown = volumes.scan()?.into_iter().filter(|id| !known.contains(id));
    Ok(unknown.filter_map(found).collect())
}

fn backups_of(
    config: &VmPoolRuntimeConfig,
    settings: &Settings,
    volumes: &Volumes,
    driver: &dyn Driver,
    remembered: &Remembered,
) -> Result<Option<Backups>> {
    let Some(destination) = config.backup_destination.as_deref() else { return Ok(None) };
    let destination = config::backup_destination(destination)?;
    let key = settings.backup_key.clone();
    let key = key.unwrap_or_else(|| volumes.own().join("backup.key"));
    let before = remembered.destination.as_deref();
    Backups::new(destination, settings.backup_format, key, driver.owners(), before).map(Some)
}

fn policy(
    config: &VmPoolRuntimeConfig,
    settings: &Settings,
    driver: &dyn Driver,
    has_destination: bool,
) -> Policy {
    Policy {
        max_vms: config.max_vms,
        idle_shutdown: config.idle_shutdown,
        sleep: settings.instances.sleep,
        prune_after: config.prune_after,
        backup_after: config.backup_after,
        has_destination,
        // What a spare would be bootstrapped for is not known.
        spares: if bootstrap::is_wanted(config) { 0 } else { settings.spares },
        can_freeze: driver.can_freeze(),
    }
}

/// What to write where there is something of sessions that have never come to be.
fn strays(remembered: &Remembered, known: &HashSet<Uuid>) -> Vec<Write> {
    let names = remembered.names.iter().map(|(_, id)| id);
    let all = names.chain(remembered.egress.iter().map(|(id, _)| id));
    let all = all.chain(remembered.mounts.iter().map(|(id, _)| id));
    all.filter(|id| !known.contains(id)).map(|id| Write::Forget(*id)).collect()
}

/// What to write where backups go elsewhere than before: what was saved was saved at another
/// destination, which may be gone for good.
fn moved(remembered: &mut Remembered, backups: Option<&Backups>) -> Vec<Write> {
    if !backups.is_some_and(|it| it.are_elsewhere(remembered.destination.as_deref())) {
        return Vec::new();
    }
    let saved = remembered.rows.iter_mut().filter(|row| row.backup.is_some());
    let unsaved = saved.map(|row| {
        row.unsaved |= row.phase.is_resident();
        Write::Save(row.clone())
    });
    unsaved.collect()
}

/// The rules that sessions have of their own, in force before one of them is taken up.
fn narrowed(
    remembered: &mut Remembered,
    known: &HashSet<Uuid>,
    driver: &dyn Driver,
) -> HashMap<Uuid, EgressRules> {
    let rules = remembered.egress.drain(..).filter(|(id, _)| known.contains(id));
    rules.inspect(|(id, rules)| driver.set_egress(*id, Some(rules.clone()))).collect()
}

/// Whether something may have been running in a session when the process before this one ended.
fn may_run(phase: Phase) -> bool {
    matches!(phase, Phase::Active | Phase::Frozen | Phase::Creating | Phase::Removing)
}

impl State {
    fn active(&self) -> Vec<Uuid> {
        let active = |phase| matches!(phase, Phase::Active | Phase::Frozen);
        let active = self.core.views().filter(|view| active(view.row.phase));
        active.map(|view| view.row.id).collect()
    }
}

/// Takes up the instances that an earlier pool has left running, and ends and clears away what
/// else it has left. Must be called within a runtime; blocks.
fn left_running(
    rows: &[Row],
    orphans: &[(Uuid, Found)],
    volumes: &Volumes,
    driver: &dyn Driver,
) -> HashMap<Uuid, Instance> {
    // One that does not answer holds up those beside it only.
    const AT_ONCE: usize = 16;
    let runtime = tokio::runtime::Handle::current();
    let left = rows.iter().filter(|row| match row.phase {
        Phase::Active => true,
        Phase::Frozen => row.paused,
        _ => false,
    });
    let whole: Vec<&Row> =
        left.filter(|row| matches!(volumes.found(row.id), Ok(Found::Whole))).collect();
    let mut resumed = HashMap::new();
    for some in whole.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            let resume = |row: &Row| {
                let _within = runtime.enter();
                let site = volumes.site(row.id);
                // Whatever its row says: that follows the freezing.
                isolation::let_go(&site);
                Some((row.id, driver.resume(&site)?))
            };
            let threads: Vec<_> = some.iter().map(|row| scope.spawn(move || resume(row))).collect();
            resumed.extend(threads.into_iter().filter_map(|thread| thread.join().ok()?));
        });
    }
    let unsettled = rows.iter().filter(|row| may_run(row.phase));
    let unsettled = unsettled.map(|row| row.id).chain(orphans.iter().map(|(id, _)| *id));
    let unsettled = unsettled.filter(|id| !resumed.contains_key(id)).map(|id| volumes.site(id));
    let sites: Vec<Site> = unsettled.chain(volumes.spares()).collect();
    // What was frozen can see that its owner is gone, or die of being killed, only when it is
    // thawed.
    for site in &sites {
        isolation::let_go(site);
    }
    // Its init too, if it goes on, or owner and init were both killed.
    let first =
        sites.iter().flat_map(|site| [site.recorded_init(), site.machine().recorded_init()]);
    let numbers: Vec<u32> = first.flatten().collect();
    denizen_agent::sweep(&numbers);
    for site in &sites {
        driver.ended(site);
    }
    resumed
}

/// What is known of a session.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct SessionInfo {
    /// The session.
    pub id: Uuid,
    /// Its name, if it was given one.
    pub name: Option<String>,
    /// How far it is kept from its host.
    pub isolation: &'static str,
    /// The image that its root is, if it is one; told of one session only, not in a list.
    pub image: Option<String>,
    /// `creating`, `active`, `frozen`, `stopped`, `restoring`, `pruning`, `archived`, `missing`
    /// or `removing`.
    pub state: &'static str,
    /// What is being done for it right now.
    pub operation: Option<&'static str>,
    /// Whether a guard is held.
    pub in_use: bool,
    /// How many callers are in line.
    pub waiting: usize,
    /// When it was made.
    #[serde(serialize_with = "unix_seconds")]
    pub created_at: SystemTime,
    /// When it was last given back, as far as it is known: a crash forgets the time since the
    /// session became active.
    #[serde(serialize_with = "unix_seconds")]
    pub last_used: SystemTime,
    /// Whether there may be changes that no verified backup holds.
    pub unsaved: bool,
    /// The time of the latest backup, or of its making if there is none: what has changed since
    /// then is in no verified backup. None if all is saved, or where it is not known.
    #[serde(serialize_with = "maybe_unix_seconds")]
    pub unsaved_since: Option<SystemTime>,
    /// The latest verified backup.
    pub backup: Option<String>,
    /// When that was taken. Not known, as the two below, until this pool writes or restores one.
    #[serde(serialize_with = "maybe_unix_seconds")]
    pub backup_taken_at: Option<SystemTime>,
    /// Bytes of the content of its files, if it is in a repository.
    pub backup_size: Option<u64>,
    /// Bytes by which the destination has grown with it.
    pub backup_added: Option<u64>,
    /// When the next backup is due, if the session is left alone until then; not known of one
    /// that is active, and none if all is saved.
    #[serde(serialize_with = "maybe_unix_seconds")]
    pub backup_due_at: Option<SystemTime>,
    /// Why the last backup failed, if none was written since.
    pub backup_failure: Option<String>,
    /// When it failed.
    #[serde(serialize_with = "maybe_unix_seconds")]
    pub backup_failed_at: Option<SystemTime>,
    /// How often in a row housekeeping has failed for it.
    pub failures: u32,
    /// Why, the last time.
    pub last_failure: Option<String>,
    /// When it is tried again.
    #[serde(serialize_with = "maybe_unix_seconds")]
    pub retry_at: Option<SystemTime>,
    /// Bytes of the disk that it used when this was last measured, which is done where it is
    /// limited.
    pub disk_used: Option<u64>,
    /// Bytes of the disk that it may use.
    pub disk_limit: Option<u64>,
    /// Its files, while they are on local disk.
    pub volume: Option<PathBuf>,
}

// ---- Tasks ------------------------------------------------------------------------------

/// Calls the lifecycle when something is due.
async fn keep_time(pool: Weak<Pool>) {
    while let Some(pool) = pool.upgrade() {
        let wait = {
            let mut state = pool.state.lock();
            let (now, due) = (pool.clock.now(), state.core.next_due());
            state.armed = due;
            due.map_or(LONGEST_SLEEP, |due| Duration::from_millis(due.0.saturating_sub(now.0)))
        };
        if wait.is_zero() {
            pool.apply(|state, now, out| state.core.tick(now, out));
            continue;
        }
        tokio::select! {
            () = tokio::time::sleep(wait.min(LONGEST_SLEEP)) => {}
            () = pool.earlier.notified() => {}
        }
    }
}

/// Announces what instances tell of their sessions.
async fn tell_notices(pool: Weak<Pool>, mut noticed: mpsc::Receiver<(Uuid, Notice)>) {
    while let Some((id, notice)) = noticed.recv().await {
        let Some(pool) = pool.upgrade() else { return };
        let kind = match notice {
            Notice::Denied(Denial { host, port, rule, .. }) => {
                let rule = rule.to_string();
                tracing::info!(session = %id, host, port, rule, "network access denied");
                EventKind::Denied { host, port, rule }
            }
            Notice::Rebooted { reason } => EventKind::Rebooted { reason },
        };
        let name = pool.state.lock().names.get(&id).map(ToString::to_string);
        pool.announcer.announce(Event { at: pool.clock.wall(), session: id, name, kind });
    }
}

/// Carries out orders: rows first, then operations.
async fn drive(pool: Weak<Pool>, mut inbox: mpsc::UnboundedReceiver<Order>) {
    let mut operations = JoinSet::new();
    // Rows that could not be written; nothing waits for them.
    let mut behind: Vec<Write> = Vec::new();
    loop {
        let mut orders = Vec::new();
        tokio::select! {
            received = inbox.recv_many(&mut orders, 1024) => if received == 0 { return },
            Some(_) = operations.join_next() => continue,
            () = tokio::time::sleep(WRITE_AGAIN), if !behind.is_empty() => {}
        }
        let Some(pool) = pool.upgrade() else { return };
        let mut writes = behind.clone();
        // Creations begin beside the writing: what they make at first is nobody's.
        let mut creations = Vec::new();
        let mut after = Vec::new();
        for order in orders {
            match order {
                Order::Run(operation, row) if matches!(operation.op, Op::Create { .. }) => {
                    let (tell, written) = oneshot::channel();
                    creations.push(tell);
                    writes.extend(row);
                    operations.spawn(operation::run(pool.clone(), operation, Some(written)));
                }
                Order::Run(_, ref row) => {
                    writes.extend(row.clone());
                    after.push(order);
                }
                Order::Write(ref write) => {
                    writes.push(write.clone());
                    after.push(order);
                }
                Order::Prepare | Order::Discard(_) => after.push(order),
            }
        }
        let written = if writes.is_empty() { Ok(()) } else { pool.write(writes).await };
        let failure = match written {
            Ok(()) => {
                behind.clear();
                None
            }
            Err(error) => {
                tracing::warn!(%error, "cannot write to the registry");
                Some(Arc::new(error))
            }
        };
        for tell in creations {
            // One that was cut off has nothing to wait for.
            let _ = tell.send(failure.clone().map_or(Ok(()), |error| Err(Error::Shared(error))));
        }
        for order in after {
            match (order, &failure) {
                (Order::Run(Operation { id, seq, .. }, Some(_)), Some(error)) => {
                    pool.finished(id, seq, Err(Error::Shared(error.clone())).into());
                }
                (Order::Run(operation, _), _) => {
                    operations.spawn(operation::run(pool.clone(), operation, None));
                }
                (Order::Prepare, _) => drop(operations.spawn(operation::prepare(pool.clone()))),
                (Order::Discard(spare), _) => {
                    operations.spawn(operation::discard(pool.clone(), spare));
                }
                (Order::Write(write), Some(_)) => {
                    behind.retain(|earlier| earlier.id() != write.id());
                    behind.push(write);
                }
                (Order::Write(_), None) => {}
            }
        }
    }
}

impl Pool {
    async fn write(self: &Arc<Self>, writes: Vec<Write>) -> Result<()> {
        let (pool, time) = (self.clone(), self.clock.save());
        blocking(move || {
            pool.volumes.settle()?;
            Ok(pool.registry.lock().commit(&writes, &time)?)
        })
        .await
    }
}

/// Runs `work` where it may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::Task(error.to_string())),
    }
}
