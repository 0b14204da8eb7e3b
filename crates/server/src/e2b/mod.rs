//! E2B's control plane, for clients that speak to that: a sandbox is a session with a deadline, a
//! template is what new ones are copies of.
//!
//! A thin layer: what a sandbox is beyond its session is in its [`Sandbox`] record, and the pool is
//! asked for the rest as by any other caller. It must never keep a session from its other users:
//! whoever reaches it by its id in another way (`denizen exec`) wakes it as ever.

mod build;
pub(crate) mod record;
mod routes;
mod start;
mod store;
mod templates;
mod told;
mod traffic;
mod volumes;
pub(crate) mod wire;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use denizen::{Error, EventKind, MicroVmManager};
use denizen_api::Code;
use jiff::Timestamp;
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use uuid::Uuid;

use self::record::{OnTimeout, Pause, Sandbox, Template};
pub(crate) use self::routes::{E2b, router, worded};
use self::start::Begun;
pub use self::store::StoreError;
use self::store::{Kind, Store};
pub(crate) use self::traffic::{Visit, asked, gone, id, looks_like_one};
use self::wire::{Level, LogEntry, Metric};
use crate::api::{Answer, Refused};
use crate::lease::{Defaults, Leases};

/// How many lines of a sandbox's log, and measurements, are kept: of the last hour.
const LINES: usize = 1000;
const METRICS: usize = 720;
/// How often running sandboxes are measured.
const MEASURE: Duration = Duration::from_secs(5);
/// After what failed at a sandbox's end, it is tried again.
const AGAIN: Duration = Duration::from_secs(10);
/// The longest that is slept without a look at the clock, which may be set.
const LOOK: Duration = Duration::from_mins(1);

/// A sandbox as it is known here.
pub(crate) struct Entry {
    kept: Mutex<Sandbox>,
    /// Whoever changes how it is has it: one at a time.
    turn: tokio::sync::Mutex<()>,
    begun: tokio::sync::Mutex<Begun>,
    /// Whether it is being removed or put to sleep: whoever asks for it then is told that it is
    /// gone, not what becomes of its session meanwhile.
    leaving: AtomicBool,
    /// How many are ending it, for good.
    ends: AtomicUsize,
    /// That has failed at least once.
    stays: AtomicBool,
    log: Mutex<VecDeque<LogEntry>>,
    metrics: Mutex<VecDeque<Metric>>,
    /// What it had used of the processors when it was last measured.
    measured: Mutex<Option<(tokio::time::Instant, Duration)>>,
}

impl Entry {
    fn new(kept: Sandbox, goes_on: bool) -> Self {
        let (turn, leaving, log, metrics, measured) = Default::default();
        let (ends, stays) = Default::default();
        let begun = tokio::sync::Mutex::new(if goes_on { Begun::Before } else { Begun::Not });
        let kept = Mutex::new(kept);
        Self { kept, turn, begun, leaving, ends, stays, log, metrics, measured }
    }

    /// Its record, as it is now.
    pub(crate) fn kept(&self) -> Sandbox {
        self.kept.lock().clone()
    }

    /// That it is leaving, until what is returned is dropped.
    fn leave(&self) -> Leaving<'_> {
        self.leaving.store(true, Ordering::Relaxed);
        Leaving(&self.leaving)
    }

    /// Whether it is there to be asked, once it is woken if it sleeps.
    fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    /// That somebody ends it, until what is returned is dropped.
    fn end(&self) -> Ending<'_> {
        self.ends.fetch_add(1, Ordering::Relaxed);
        Ending(&self.ends)
    }

    /// Whether it is being ended, or is about to be: nobody is to count on it any more.
    fn is_over(&self, now: Timestamp) -> bool {
        self.ends.load(Ordering::Relaxed) > 0 || self.kept.lock().is_over(now)
    }

    /// Whether it may be ended although it is over: it is there all the same.
    fn may_be_ended(&self) -> bool {
        self.ends.load(Ordering::Relaxed) > 0 || self.stays.load(Ordering::Relaxed)
    }

    fn note(&self, level: Level, message: impl Into<String>) {
        let (timestamp, fields) = (Timestamp::now(), BTreeMap::new());
        let line = LogEntry { timestamp, level, message: message.into(), fields };
        keep(&mut self.log.lock(), LINES, line);
    }
}

/// Keeps one more of the latest, and not more than so many.
fn keep<T>(latest: &mut VecDeque<T>, most: usize, one: T) {
    if latest.len() == most {
        latest.pop_front();
    }
    latest.push_back(one);
}

/// See [`Entry::leave`].
struct Leaving<'e>(&'e AtomicBool);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// See [`Entry::end`].
struct Ending<'e>(&'e AtomicUsize);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All sandboxes and templates.
pub(crate) struct Sandboxes {
    pool: Arc<MicroVmManager>,
    leases: Arc<Leases>,
    store: Arc<Store>,
    all: RwLock<HashMap<Uuid, Arc<Entry>>>,
    templates: RwLock<BTreeMap<String, Template>>,
    builds: build::Builds,
    /// Whoever changes a template has it: one at a time.
    changing_templates: tokio::sync::Mutex<()>,
    /// Told when a deadline may be sooner than was known.
    sooner: Notify,
    began: Began,
}

/// When the daemon began, by the wall clock and by one that nobody sets.
struct Began {
    wall: Timestamp,
    uptime: Duration,
}

impl Began {
    fn now() -> Self {
        Self { wall: Timestamp::now(), uptime: uptime() }
    }
}

/// Time since boot, also while the machine slept.
fn uptime() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::try_from(time).unwrap_or_default()
}

impl Sandboxes {
    /// Takes up what an earlier daemon has left.
    pub(crate) fn open(
        pool: Arc<MicroVmManager>,
        leases: Arc<Leases>,
        state: &Path,
    ) -> Result<Self, StoreError> {
        let store = Arc::new(Store::open(state)?);
        let templates = store.all::<Template>(Kind::Template)?;
        let templates = templates.into_iter().map(|it| (it.id.clone(), it)).collect();
        let mut all = HashMap::new();
        for kept in store.all::<Sandbox>(Kind::Sandbox)? {
            // One whose session was not made, or is gone, is none.
            let session = match pool.inspect(kept.id) {
                Err(Error::Unknown { .. }) => {
                    store.forget(Kind::Sandbox, &kept.id.to_string())?;
                    continue;
                }
                session => session.ok(),
            };
            leases.set_defaults(kept.id, defaults(&kept));
            let runs = session.is_some_and(|it| matches!(it.state, "active" | "frozen"));
            all.insert(kept.id, Arc::new(Entry::new(kept, runs)));
        }
        let builds = build::Builds::new(state.join("e2b-files"));
        let (all, templates) = (RwLock::new(all), RwLock::new(templates));
        let (changing_templates, sooner, began) =
            (tokio::sync::Mutex::default(), Notify::new(), Began::now());
        Ok(Self { pool, leases, store, all, templates, builds, changing_templates, sooner, began })
    }

    /// The time by which deadlines go: that of the wall clock when the daemon began, and what has
    /// passed since then. Whoever sets the clock ends no sandbox by that.
    pub(super) fn now(&self) -> Timestamp {
        let passed = uptime().saturating_sub(self.began.uptime);
        self.began.wall.checked_add(passed).unwrap_or(Timestamp::MAX)
    }

    /// The sandbox of that id, if it is one of ours.
    pub(crate) fn find(&self, id: Uuid) -> Option<Arc<Entry>> {
        self.all.read().get(&id).cloned()
    }

    /// Whether one that was a sandbox is none any more, or will not be in a moment.
    pub(crate) fn is_leaving(&self, id: Uuid) -> bool {
        self.find(id).is_none_or(|entry| entry.is_leaving())
    }

    /// The sandbox of that id, as a client writes it, if there is one.
    fn get(&self, sandbox: &str) -> Answer<Arc<Entry>> {
        let known = Uuid::try_parse(sandbox).ok().and_then(|id| self.find(id));
        let known = known.filter(|entry| self.is_there(entry));
        known.ok_or_else(|| not_found(sandbox))
    }

    /// Whether a sandbox's session is still there; if somebody has removed it, it is forgotten.
    fn is_there(&self, entry: &Entry) -> bool {
        let id = entry.kept.lock().id;
        if matches!(self.pool.inspect(id), Err(Error::Unknown { .. })) {
            self.forget(id);
            return false;
        }
        true
    }

    fn forget(&self, id: Uuid) {
        self.all.write().remove(&id);
        self.leases.unset_defaults(id);
        let store = self.store.clone();
        // Nobody waits for the disk: the next daemon sees that its session is gone.
        tokio::task::spawn_blocking(move || {
            if let Err(error) = store.forget(Kind::Sandbox, &id.to_string()) {
                tracing::warn!(%error, "a sandbox that is gone stays in e2b.db");
            }
        });
    }

    /// All sandboxes that are known.
    fn known(&self) -> Vec<Arc<Entry>> {
        self.all.read().values().cloned().collect()
    }

    /// All sandboxes that are there, which the pool is asked for each.
    fn list(&self) -> Vec<Arc<Entry>> {
        self.known().into_iter().filter(|entry| self.is_there(entry)).collect()
    }

    /// Changes a record and makes that durable; or leaves it as it was.
    async fn change(&self, entry: &Arc<Entry>, change: impl FnOnce(&mut Sandbox)) -> Answer<()> {
        let mut kept = entry.kept();
        change(&mut kept);
        self.save(&kept).await?;
        self.leases.set_defaults(kept.id, defaults(&kept));
        *entry.kept.lock() = kept;
        self.sooner.notify_one();
        Ok(())
    }

    async fn save(&self, kept: &Sandbox) -> Answer<()> {
        let (id, kept) = (kept.id.to_string(), kept.clone());
        self.stored(move |store| store.save(Kind::Sandbox, &id, &kept)).await
    }

    /// Has something written, on a thread that may block.
    async fn stored(
        &self,
        write: impl FnOnce(&Store) -> Result<(), StoreError> + Send + 'static,
    ) -> Answer<()> {
        let store = self.store.clone();
        let failed = |error: &dyn std::fmt::Display| Refused::new(Code::Failed, error.to_string());
        let written = tokio::task::spawn_blocking(move || write(&store)).await;
        written.map_err(|error| failed(&error))?.map_err(|error| failed(&error))
    }

    /// Removes a sandbox and its session, whatever runs in it.
    async fn kill(&self, entry: &Entry) -> Answer<()> {
        let _turn = entry.turn.lock().await;
        self.kill_now(entry).await
    }

    /// As [`Sandboxes::kill`], by whoever has its turn.
    async fn kill_now(&self, entry: &Entry) -> Answer<()> {
        let id = entry.kept.lock().id;
        let _leaving = entry.leave();
        match self.leases.remove(id).await {
            Ok(()) | Err(Error::Unknown { .. }) => {}
            Err(error) => {
                entry.stays.store(true, Ordering::Relaxed);
                return Err(error.into());
            }
        }
        self.forget(id);
        Ok(())
    }

    /// Puts a sandbox to sleep, with what runs in it if that is wanted and can be had. False if it
    /// sleeps already.
    async fn pause(&self, entry: &Arc<Entry>, memory: bool) -> Answer<bool> {
        let _turn = entry.turn.lock().await;
        self.pause_now(entry, memory).await
    }

    /// As [`Sandboxes::pause`], by whoever has its turn.
    async fn pause_now(&self, entry: &Arc<Entry>, memory: bool) -> Answer<bool> {
        let kept = entry.kept();
        if kept.paused.is_some() {
            return Ok(false);
        }
        let _leaving = entry.leave();
        // What requests do in it ends: they would find out that it stands still only later.
        let closed = self.leases.close(kept.id).await?;
        let memory = memory && self.pool.can_freeze()?;
        if memory {
            self.pool.pause(kept.id).await?;
        } else {
            self.pool.stop(kept.id, true).await?;
        }
        self.change(entry, |kept| kept.paused = Some(Pause { memory })).await?;
        drop(closed);
        if !memory {
            *entry.begun.lock().await = Begun::Not;
        }
        entry.note(Level::Info, if memory { "paused" } else { "paused, without its memory" });
        Ok(true)
    }

    /// Wakes a sandbox, if it sleeps; without its memory, if that is not wanted. Tells whether it
    /// slept, `change` too: what it changes holds from the moment on at which it is awake.
    async fn resume(
        &self,
        entry: &Arc<Entry>,
        memory: bool,
        change: impl FnOnce(&mut Sandbox, bool) + Send,
    ) -> Answer<bool> {
        let turn = entry.turn.lock().await;
        let kept = entry.kept();
        if !self.is_there(entry) {
            return Err(not_found(&kept.id.simple().to_string()));
        }
        if kept.paused.is_none() {
            self.change(entry, |kept| change(kept, false)).await?;
            return Ok(false);
        }
        if !memory {
            self.pool.stop(kept.id, true).await?;
        }
        // What was put to sleep with its memory may have lost that with its daemon.
        let state = self.pool.inspect(kept.id)?.state;
        drop(self.leases.take(kept.id, None).await?);
        if !matches!(state, "frozen" | "active") {
            *entry.begun.lock().await = Begun::Not;
        }
        let awake = |kept: &mut Sandbox| {
            kept.paused = None;
            change(kept, true);
        };
        self.change(entry, awake).await?;
        // It may take long until that is ready, and whoever wants to end it shall not wait for that.
        drop(turn);
        self.start(entry).await?;
        entry.note(Level::Info, "resumed");
        Ok(true)
    }

    /// Ends sandboxes whose time is over, for ever.
    pub(crate) async fn keep_time(self: Arc<Self>) {
        // Those that are being ended, and those for which that has failed, until it is tried again.
        let mut left_alone: HashMap<Uuid, Option<tokio::time::Instant>> = HashMap::new();
        let mut ending = JoinSet::new();
        loop {
            let now = tokio::time::Instant::now();
            left_alone.retain(|_, again| again.is_none_or(|again| again > now));
            let mut wait = LOOK;
            // At each change of any sandbox: whether one is still there, is asked when its time is over.
            for entry in self.known() {
                let (id, due) = {
                    let kept = entry.kept.lock();
                    (kept.id, kept.due())
                };
                let Some(due) = due else { continue };
                let left = due.duration_since(self.now());
                let left = Duration::try_from(left).unwrap_or_default();
                match left_alone.get(&id) {
                    Some(Some(again)) => wait = wait.min(left.max(*again - now)),
                    Some(None) => {}
                    None if left.is_zero() => {
                        left_alone.insert(id, None);
                        let all = self.clone();
                        ending.spawn(async move { (id, all.time_over(&entry).await) });
                    }
                    None => wait = wait.min(left),
                }
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.sooner.notified() => {}
                Some(ended) = ending.join_next() => {
                    let Ok((id, ended)) = ended else { continue };
                    match ended {
                        Ok(()) => left_alone.remove(&id),
                        Err(_) => left_alone.insert(id, Some(tokio::time::Instant::now() + AGAIN)),
                    };
                }
            }
        }
    }

    async fn time_over(&self, entry: &Arc<Entry>) -> Answer<()> {
        let _turn = entry.turn.lock().await;
        let kept = entry.kept();
        // Its client may have asked for more just now.
        if kept.due().is_none_or(|due| due > self.now()) || !self.is_there(entry) {
            return Ok(());
        }
        let ended = match kept.on_timeout {
            OnTimeout::Kill => self.kill_now(entry).await,
            OnTimeout::Pause => self.pause_now(entry, kept.keeps_memory).await.map(drop),
        };
        ended.inspect_err(|Refused(problem, _)| {
            let id = kept.id.simple();
            tracing::warn!(sandbox = %id, why = problem.detail, "it goes on after its time");
            entry.note(Level::Error, format!("its time is over: {}", problem.detail));
        })
    }

    /// Measures running sandboxes, for ever. While there are none, nothing is done.
    pub(crate) async fn measure(self: Arc<Self>) {
        loop {
            tokio::time::sleep(MEASURE).await;
            let mut awake = self.known();
            awake.retain(|entry| entry.kept.lock().paused.is_none());
            if awake.is_empty() {
                continue;
            }
            if let Err(error) = self.measure_now(&awake).await {
                tracing::debug!(%error, "sandboxes were not measured");
            }
        }
    }

    async fn measure_now(&self, entries: &[Arc<Entry>]) -> Result<(), Error> {
        let ids: Vec<Uuid> = entries.iter().map(|entry| entry.kept.lock().id).collect();
        let usage = self.pool.usage(&ids).await?;
        let limits = self.pool.limits()?;
        for (entry, id) in entries.iter().zip(ids) {
            let Some(used) = usage.get(&id) else { continue };
            let now = tokio::time::Instant::now();
            let cpu = used.cpu_time.unwrap_or_default();
            let before = entry.measured.lock().replace((now, cpu));
            let share = before.map_or(0.0, |(then, before)| {
                cpu.saturating_sub(before).as_secs_f64() / (now - then).as_secs_f64().max(0.001)
            });
            let disk = self.pool.inspect(id)?;
            let timestamp = Timestamp::now();
            let metric = Metric {
                timestamp,
                timestamp_unix: timestamp.as_second(),
                cpu_count: routes::processors(&limits),
                cpu_used_pct: (share * 10_000.0).round() / 100.0,
                mem_used: used.memory_bytes.unwrap_or_default(),
                mem_total: routes::memory(&limits, self.pool.isolation()?),
                // What the kernel keeps of files counts as used here.
                mem_cache: 0,
                disk_used: disk.disk_used.unwrap_or_default(),
                disk_total: disk.disk_limit.unwrap_or_default(),
            };
            keep(&mut entry.metrics.lock(), METRICS, metric);
        }
        Ok(())
    }

    /// One that sleeps may be woken by somebody who knows nothing of sandboxes: then it is awake, and
    /// has a deadline.
    async fn woken_elsewhere(self: Arc<Self>, entry: Arc<Entry>) {
        let _turn = entry.turn.lock().await;
        let kept = entry.kept();
        let runs = self.pool.inspect(kept.id).is_ok_and(|session| session.state == "active");
        if kept.paused.is_none() || !runs {
            return;
        }
        let end = record::after(self.now(), wire::TIMEOUT);
        let awake = |kept: &mut Sandbox| {
            kept.paused = None;
            kept.extend(end);
        };
        if let Err(Refused(problem, _)) = self.change(&entry, awake).await {
            tracing::warn!(sandbox = %kept.id.simple(), why = problem.detail, "it is awake");
        }
    }

    /// Notes what happens to sandboxes in their logs, for ever.
    pub(crate) async fn listen(self: Arc<Self>) {
        let Ok(mut events) = self.pool.events() else { return };
        while let Some(event) = events.next().await {
            let Some(entry) = self.find(event.session) else { continue };
            let wakes = matches!(event.kind, EventKind::Thawed | EventKind::Started);
            if wakes && entry.kept.lock().paused.is_some() {
                tokio::spawn(self.clone().woken_elsewhere(entry.clone()));
            }
            let (level, message) = match event.kind {
                EventKind::Started => (Level::Info, "started".to_owned()),
                EventKind::Stopped => (Level::Info, "stopped".to_owned()),
                EventKind::BackedUp { backup } => (Level::Info, format!("backed up as {backup}")),
                EventKind::Failed { operation, error, .. } => {
                    (Level::Error, format!("{operation} failed: {error}"))
                }
                EventKind::Denied { host, port, rule } => {
                    (Level::Warn, format!("the network refused {host}:{port}: {rule}"))
                }
                EventKind::Rebooted { reason } => (Level::Warn, format!("rebooted: {reason}")),
                EventKind::LimitReached { resource, used, limit } => {
                    (Level::Warn, format!("over its limit of {resource}: {used} of {limit} bytes"))
                }
                _ => continue,
            };
            entry.note(level, message);
        }
    }
}

fn not_found(sandbox: &str) -> Refused {
    Refused::new(Code::UnknownSession, format!("Sandbox \"{sandbox}\" not found"))
}

/// What a sandbox's commands get unless they say otherwise.
fn defaults(kept: &Sandbox) -> Defaults {
    let record::Setup { env: given, user, workdir, .. } = kept.setup.clone();
    // As programs in E2B's sandboxes find out where they are.
    let mut env = BTreeMap::from([
        ("E2B_SANDBOX".to_owned(), "true".to_owned()),
        ("E2B_SANDBOX_ID".to_owned(), kept.id.simple().to_string()),
        ("E2B_TEMPLATE_ID".to_owned(), kept.template.clone()),
    ]);
    env.extend(given);
    Defaults { env, user, workdir }
}
