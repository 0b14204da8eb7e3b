//! What each [`Op`] does on disk and to instances.
//!
//! Operations are all or nothing where the lifecycle says so, and never begin another one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use denizen_agent::{Agent, Spec, Stdio};
use denizen_repository::Counter;
use tokio::sync::oneshot;
use tracing::{Instrument, Span};
use uuid::Uuid;

use super::forgetting::Reading;
use super::{Copying, Operation, Origin, Place, Pool, Spare, State, Telling, blocking};
use crate::backup::{Backup, Saving};
use crate::disk::Known;
use crate::error::{Error, Result as Fallible};
use crate::event::{Event, EventKind};
use crate::isolation::{Driver, Site};
use crate::lifecycle::{Found, Op, Outcome, Phase, Saved, Seq};
use crate::share::Mount;
use crate::volume::{Staged, Volumes, remove_tree};
use crate::{bootstrap, part, snapshot};

/// How long processes have between being asked to end and being ended.
pub(super) const GRACE: Duration = Duration::from_secs(5);

/// How long the making of a spare waits for whoever has just taken one to have a first answer:
/// it would be in the way of that.
const AFTER_YOU: Duration = Duration::from_millis(20);

/// How long an instance that could not be thawed has to be gone once it is killed.
const STUCK: Duration = Duration::from_secs(10);

/// How many backups are written at a time that nobody waits for: each takes memory, threads and a
/// part of the way to the destination.
const MOST_BACKUPS: usize = 2;

pub(super) type Result = Fallible<Outcome>;

/// How an operation ended, and why not well.
pub(super) struct Ended {
    pub(super) outcome: Outcome,
    pub(super) failure: Option<Error>,
}

impl From<Result> for Ended {
    fn from(result: Result) -> Self {
        match result {
            Ok(outcome) => Self { outcome, failure: None },
            Err(error) => Self { outcome: Outcome::Failed, failure: Some(error) },
        }
    }
}

impl Ended {
    /// What was to be done to an instance has failed half-way.
    fn broken(error: Error) -> Self {
        Self { outcome: Outcome::Broken, failure: Some(error) }
    }
}

/// Tells when the row of an operation is durable, or why it is not.
pub(super) type Written = oneshot::Receiver<Fallible<()>>;

/// Runs an operation and reports how it ended, whatever happens to this task. Its row is durable,
/// or it waits for `written` before it changes anything of a session's.
pub(super) async fn run(pool: Arc<Pool>, operation: Operation, written: Option<Written>) {
    let Operation { id, seq, op, span, asked } = operation;
    struct Report(Arc<Pool>, Uuid, Seq, Op, Option<Ended>, Span);
    impl Drop for Report {
        fn drop(&mut self) {
            let Self(pool, id, seq, op, ended, asked) = self;
            let lost = || {
                let error = Error::Task("it was cut off".to_owned());
                match op {
                    Op::Freeze { .. } | Op::Thaw => Ended::broken(error),
                    _ => Err(error).into(),
                }
            };
            let ended = ended.take().unwrap_or_else(lost);
            asked.in_scope(|| pool.finished(*id, *seq, ended));
        }
    }
    let mut report = Report(pool.clone(), id, seq, op.clone(), None, asked);
    let place = pool.place(&mut pool.state.lock(), id);
    if matches!(op, Op::Create { .. } | Op::Restore(_)) {
        // The place may be one that a spare had.
        pool.until(|state| state.discarding == 0).await;
    }
    let begun = Instant::now();
    let ended = carry_out(&pool, &place, seq, &op, written).instrument(span).await;
    count(&pool, seq, &op, &ended, begun.elapsed());
    report.4 = Some(ended);
}

async fn carry_out(
    pool: &Arc<Pool>,
    place: &Arc<Place>,
    seq: Seq,
    op: &Op,
    written: Option<Written>,
) -> Ended {
    let ended = match op.clone() {
        Op::Create { .. } => create(pool, place, written).await.into(),
        Op::Start => start(pool, place).await.into(),
        Op::Stop { force } => stop(pool, place, force, GRACE).await,
        Op::Freeze { force } => freeze(pool, place, force).await,
        Op::Thaw => {
            thaw(pool, place).await.map_or_else(Ended::broken, |_| Ok(Outcome::Done).into())
        }
        Op::Backup => save(pool, place.site.id, seq).await.into(),
        Op::Restore(saved) => restore(pool, place, saved).await.into(),
        Op::Copy(copy) => copy_session(pool, place, copy).await,
        Op::Prune | Op::Remove => delete(pool, place, op).await.into(),
    };
    if let Some(error) = &ended.failure {
        let span = Span::current();
        span.record("otel.status_code", "ERROR");
        span.record("error", tracing::field::display(error));
    }
    ended
}

/// Counts what became of an operation.
fn count(pool: &Pool, seq: Seq, op: &Op, ended: &Ended, took: Duration) {
    let given_up =
        pool.state.lock().interrupts.get(&seq).is_some_and(|it| it.load(Ordering::Relaxed));
    let mut figures = pool.figures.lock();
    match (op, &ended.outcome) {
        (Op::Create { .. }, Outcome::Done) => figures.create_seconds.count(took),
        (Op::Backup, Outcome::BackedUp(_)) => {
            figures.backups_written += 1;
            figures.backup_seconds.count(took);
        }
        (Op::Backup, Outcome::Failed) if !given_up => figures.backups_failed += 1,
        (Op::Restore(Saved::Backup(_)), Outcome::Done) => {
            figures.restores_done += 1;
            figures.restore_seconds.count(took);
        }
        (Op::Restore(Saved::Backup(_)), Outcome::Failed) => figures.restores_failed += 1,
        _ => {}
    }
}

async fn create(pool: &Arc<Pool>, place: &Arc<Place>, written: Option<Written>) -> Result {
    let id = place.site.id;
    let claimed = pool.state.lock().claimed.remove(&id);
    let (spare, origin) = claimed.unwrap_or_default();
    // What a copy was bootstrapped with is copied.
    let is_copy = matches!(origin, Some(Origin::Copy(_) | Origin::Archive(_)));
    *place.watched.known.lock() = if is_copy { Known::default() } else { Known::empty() };
    let made = if !is_copy && bootstrap::is_wanted(&pool.config) {
        create_in_place(pool, place, origin, written).await
    } else {
        create_with(pool, place, spare, origin, written).await
    };
    if made.is_err() {
        let discarded = async {
            if let Some(error) = stop(pool, place, true, GRACE).await.failure {
                return Err(error);
            }
            // Also where it had an instance that was not the session's yet.
            ended(pool, place).await?;
            let (volumes, home) = (pool.volumes.clone(), pool.volumes.home(id));
            blocking(move || {
                volumes.discard(id).map_err(|source| Error::volume("clear", &home, source))
            })
            .await
        };
        if let Err(error) = discarded.await {
            // The mark in it says that it is half-made: the next start clears it.
            tracing::warn!(session = %id, %error, "cannot clear a half-made session");
        }
    }
    made.map(|()| Outcome::Done)
}

/// Makes a session where it will stay: what it is bootstrapped by may write down where it is.
async fn create_in_place(
    pool: &Arc<Pool>,
    place: &Arc<Place>,
    origin: Option<Origin>,
    written: Option<Written>,
) -> Fallible<()> {
    let id = place.site.id;
    let instance = {
        let (pool, place) = (pool.clone(), place.clone());
        blocking(move || {
            wait_for(written)?;
            pool.volumes.begin(id)?;
            originate(&pool, &place.site, origin.as_ref())?;
            pool.driver.start(&place.site)
        })
    };
    let done = bootstrap::run(&pool.config, pool.isolation(), instance.await?, place).await;
    ended(pool, place).await?;
    done?;
    let (pool, place) = (pool.clone(), place.clone());
    blocking(move || {
        *place.instance.lock() = Some(pool.driver.start(&place.site)?);
        pool.volumes.complete(id)
    })
    .await
}

/// Makes a session of a spare, which is made now if there is none, or none of that origin.
async fn create_with(
    pool: &Arc<Pool>,
    place: &Arc<Place>,
    spare: Option<Spare>,
    origin: Option<Origin>,
    written: Option<Written>,
) -> Fallible<()> {
    let spare = match spare {
        Some(spare) if origin.is_none() && spare.instance.agent.is_alive().await => Some(spare),
        Some(spare) => {
            end_spare(pool, spare).await;
            None
        }
        None => None,
    };
    let (pool, place) = (pool.clone(), place.clone());
    blocking(move || {
        let Spare { site, instance } = match spare {
            Some(spare) => spare,
            None => make_spare(&pool, origin.as_ref(), pool.places_of(place.site.id))?,
        };
        let installed =
            wait_for(written).and_then(|()| pool.volumes.install_new(place.site.id, &site.home));
        if let Err(error) = installed {
            drop(instance);
            clear_spare(&pool, &site);
            return Err(error);
        }
        *place.instance.lock() = Some(pool.driver.clone().moved(instance, &site, &place.site)?);
        Ok(())
    })
    .await
}

/// Waits until the operation's row is durable. Blocks.
fn wait_for(written: Option<Written>) -> Fallible<()> {
    let cut_off = |_| Err(Error::Task("the registry is closed".to_owned()));
    written.map_or(Ok(()), |written| written.blocking_recv().unwrap_or_else(cut_off))
}

/// Makes a spare, or what only a session of that origin, with these shared folders, can be made
/// of. Blocks.
fn make_spare(
    pool: &Pool,
    origin: Option<&Origin>,
    mounts: Vec<(PathBuf, Mount)>,
) -> Fallible<Spare> {
    let site = pool.volumes.begin_spare()?;
    // They are its session's by another name already.
    pool.driver.set_mounts(site.id, mounts);
    let started = originate(pool, &site, origin).and_then(|()| pool.driver.start(&site));
    pool.driver.set_mounts(site.id, Vec::new());
    match started {
        Ok(instance) => Ok(Spare { site, instance }),
        Err(error) => {
            Volumes::unstage(&site.home);
            Err(error)
        }
    }
}

/// Makes a spare and reports it, whatever happens to this task.
pub(super) async fn prepare(pool: Arc<Pool>) {
    struct Report(Arc<Pool>, Option<Fallible<Spare>>);
    impl Drop for Report {
        fn drop(&mut self) {
            let lost = || Err(Error::Task("it was cut off".to_owned()));
            self.0.prepared(self.1.take().unwrap_or_else(lost));
        }
    }
    let mut report = Report(pool.clone(), None);
    tokio::time::sleep(AFTER_YOU).await;
    pool.until(|state| state.discarding == 0).await;
    let spare = blocking({
        let pool = pool.clone();
        move || make_spare(&pool, None, Vec::new())
    });
    let spare = spare.await;
    if let Ok(spare) = &spare {
        warm_up(&pool, spare).await;
    }
    report.1 = Some(spare);
}

/// Has the kernel look up what every command line needs, so that the first one need not wait
/// for it. An image may have no such shell; then nothing is gained.
async fn warm_up(pool: &Pool, spare: &Spare) {
    let spec = Spec {
        program: pool.config.shell.clone().into(),
        args: pool.config.shell_args.iter().map(Into::into).chain([":".into()]).collect(),
        env: BTreeMap::new(),
        user: None,
        cwd: pool.driver.workdir(&spare.site),
        stdio: Stdio::Pipes { stdin: false },
    };
    if let Ok(child) = spare.instance.agent.spawn(spec).await {
        // A shell that does not end is ended with the handle.
        let _ = tokio::time::timeout(GRACE, child.wait()).await;
    }
}

/// Ends a spare and reports it, whatever happens to this task.
pub(super) async fn discard(pool: Arc<Pool>, spare: Spare) {
    struct Report(Arc<Pool>);
    impl Drop for Report {
        fn drop(&mut self) {
            self.0.discarded();
        }
    }
    let _report = Report(pool.clone());
    end_spare(&pool, spare).await;
}

/// Clears away a spare in which nothing runs any more. Blocks.
fn clear_spare(pool: &Pool, site: &Site) {
    pool.driver.ended(site);
    Volumes::unstage(&site.home);
}

async fn end_spare(pool: &Arc<Pool>, Spare { site, instance }: Spare) {
    // There is nothing in it that would need time to end.
    if let Err(error) = instance.agent.shutdown(Duration::ZERO).await {
        tracing::warn!(%error, "a spare does not end");
    }
    let pool = pool.clone();
    let end = blocking(move || {
        clear_spare(&pool, &site);
        Ok(())
    });
    if let Err(error) = end.await {
        tracing::warn!(%error, "cannot clear away a spare");
    }
}

/// Puts into a new session's folder what it begins with.
fn originate(pool: &Pool, site: &Site, origin: Option<&Origin>) -> Fallible<()> {
    match origin {
        Some(Origin::Copy(copy)) => {
            let from = Site::in_folder(site.id, copy.path().to_owned());
            // Over the volume that is there, which is empty.
            let mut moved = fs::rename(&from.volume, &site.volume);
            if moved.is_ok() && from.root_changes().exists() {
                moved = fs::rename(from.root_changes(), site.root_changes());
            }
            moved.map_err(|source| Error::volume("make", &site.home, source))?;
            match fs::rename(from.memory(), site.memory()) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(Error::volume("make", &site.home, error))
                }
                _ => Ok(()),
            }
        }
        Some(Origin::Image(image)) => pool.driver.choose_image(site, image),
        Some(Origin::Archive(sent)) => {
            sent.unpack(pool.driver.owners(), &site.home, pool.driver.import_limit())
        }
        None => Ok(()),
    }
}

/// Copies a session to where that copy goes. What runs in it stands still while that is done, but
/// not while the copy is being written to disk.
async fn copy_session(pool: &Arc<Pool>, place: &Arc<Place>, copy: Uuid) -> Ended {
    let id = place.site.id;
    let (copying, frozen) = {
        let state = pool.state.lock();
        let view = state.core.view(id);
        let frozen = view.is_some_and(|view| view.row.phase == Phase::Frozen);
        (state.copies.get(&copy).cloned(), frozen)
    };
    let Some(copying) = copying else {
        return Err(Error::Task("nobody wants the copy any more".to_owned())).into();
    };
    let agent = place.agent().filter(|_| !frozen);
    let freezes = agent.is_some() && pool.driver.can_freeze();
    if let Some(agent) = agent.filter(|_| !freezes) {
        match agent.busy().await {
            Ok(running) if running.is_empty() => {}
            Ok(_) => return Ok(Outcome::Busy).into(),
            Err(error) => return Err(error.into()).into(),
        }
    }
    let (pool, place) = (pool.clone(), place.clone());
    let copied = blocking(move || {
        if place.agent().is_none() && pool.volumes.found(id)? != Found::Whole {
            return Ok(Ok(Outcome::Missing).into());
        }
        let copied = if freezes {
            let copy = || copy_into(&*pool.driver, &place, &copying);
            match at_rest(&*pool.driver, &place.site, copy) {
                Ok(copied) => copied,
                Err(error) => return Ok(Ended::broken(error)),
            }
        } else {
            copy_into(&*pool.driver, &place, &copying)
        };
        let kept = copied.and_then(|()| copying.into.sync()).and_then(|()| {
            let Some(name) = &copying.keep_as else { return Ok(()) };
            pool.volumes.install_snapshot(id, name, &copying.into)?;
            let kind = EventKind::SnapshotTaken { snapshot: name.to_string() };
            let named = pool.state.lock().names.get(&id).map(ToString::to_string);
            let at = pool.clock.wall();
            pool.announcer.announce(Event { at, session: id, name: named, kind });
            Ok(())
        });
        Ok(kept.map(|()| Outcome::Done).into())
    });
    copied.await.unwrap_or_else(|error| Err(error).into())
}

fn copy_into(driver: &dyn Driver, place: &Place, copying: &Copying) -> Fallible<()> {
    let into = Site::in_folder(place.site.id, copying.into.path().to_owned());
    for tree in [&into.volume, &into.root_changes()] {
        // Of a first try, after which the session could not be thawed.
        remove_tree(tree).map_err(|source| Error::volume("clear", tree, source))?;
    }
    snapshot::copy(&place.site, &into.home)?;
    match copying.keep_as {
        // A snapshot is of files.
        Some(_) => Ok(()),
        None => driver.copied(&place.site, &into),
    }
}

/// Does something while all processes of an instance stand still, and has them go on, however
/// that ends. Fails, whatever became of it, if they may not go on. Blocks.
fn at_rest<T>(
    driver: &dyn Driver,
    site: &Site,
    work: impl FnOnce() -> Fallible<T>,
) -> Fallible<Fallible<T>> {
    struct Thaw<'a>(&'a dyn Driver, &'a Site);
    impl Drop for Thaw<'_> {
        fn drop(&mut self) {
            // For a panic; otherwise this has been done, and does nothing.
            let _ = self.0.thaw(self.1);
        }
    }
    let _thaw = Thaw(driver, site);
    let done = driver.freeze(site).and_then(|()| work());
    driver.thaw(site)?;
    Ok(done)
}

async fn start(pool: &Arc<Pool>, place: &Arc<Place>) -> Result {
    let (pool, place) = (pool.clone(), place.clone());
    blocking(move || {
        if pool.volumes.found(place.site.id)? != Found::Whole {
            return Ok(Outcome::Missing);
        }
        *place.instance.lock() = Some(pool.driver.start(&place.site)?);
        Ok(Outcome::Done)
    })
    .await
}

async fn stop(pool: &Pool, place: &Place, force: bool, grace: Duration) -> Ended {
    if pool.state.lock().left {
        // What runs there is the next pool's.
        return Ok(Outcome::Busy).into();
    }
    let Some(agent) = place.agent() else { return Ok(Outcome::Done).into() };
    // Whoever stands still hears nothing, neither a question nor that it shall end.
    match thaw(pool, place).await {
        Ok(false) => end(pool, place, &agent, force, grace).await.into(),
        Ok(true) => match end(pool, place, &agent, force, grace).await {
            Ok(Outcome::Done) if place.quiet.load(Ordering::Relaxed) => Ok(Outcome::Quiet).into(),
            Err(error) => Ended::broken(error),
            ended => ended.into(),
        },
        Err(error) if force => {
            let gone = tokio::time::timeout(STUCK, agent.shutdown(Duration::ZERO)).await;
            match gone.map_err(|_| error).and_then(|gone| Ok(gone?)) {
                Ok(()) => clear_up(pool, place).await.map(|()| Outcome::Done).into(),
                Err(error) => Ended::broken(error),
            }
        }
        Err(error) => Ended::broken(error),
    }
}

/// Ends an instance that can hear of it.
async fn end(pool: &Pool, place: &Place, agent: &Agent, force: bool, grace: Duration) -> Result {
    if !force && pool.settings.background_is_use && !agent.busy().await?.is_empty() {
        return Ok(Outcome::Busy);
    }
    agent.shutdown(grace).await?;
    clear_up(pool, place).await?;
    Ok(Outcome::Done)
}

async fn clear_up(pool: &Pool, place: &Place) -> Fallible<()> {
    *place.instance.lock() = None;
    ended(pool, place).await
}

async fn freeze(pool: &Pool, place: &Place, force: bool) -> Ended {
    let Some(agent) = place.agent() else {
        return Ended::broken(Error::Task("an active session has no instance".to_owned()));
    };
    let quiet = match agent.busy().await {
        Ok(running) => running.is_empty(),
        Err(error) => return Err(error.into()).into(),
    };
    if !force && !quiet && pool.settings.background_is_use {
        return Ok(Outcome::Busy).into();
    }
    // Asked before it is frozen: what is thawed later may run, write and be gone before it
    // could be seen.
    place.quiet.store(quiet, Ordering::Relaxed);
    let (driver, site) = (pool.driver.clone(), place.site.clone());
    let given_up = GivenUp::default();
    let flag = given_up.flag();
    let frozen = blocking(move || {
        let frozen = driver.freeze(&site);
        if flag.load(Ordering::SeqCst) && !driver.keeps_frozen() {
            // The pool has been dropped, and may have thawed it before.
            driver.thaw(&site)?;
        }
        frozen
    });
    match frozen.await {
        Ok(()) => Ok(Outcome::Done).into(),
        Err(error) => match thaw(pool, place).await {
            Ok(_) => Err(error).into(),
            Err(_) => Ended::broken(error),
        },
    }
}

/// Tells work that goes on by itself that nobody waits for it any more, once it is dropped.
#[derive(Default)]
pub(super) struct GivenUp(Arc<AtomicBool>);

impl GivenUp {
    /// What is set then.
    pub(super) fn flag(&self) -> Arc<AtomicBool> {
        self.0.clone()
    }
}

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Has an instance go on; gives whether it stood still.
async fn thaw(pool: &Pool, place: &Place) -> Fallible<bool> {
    let (driver, site) = (pool.driver.clone(), place.site.clone());
    blocking(move || driver.thaw(&site)).await
}

/// Has the isolation clear up after an instance.
async fn ended(pool: &Pool, place: &Place) -> Fallible<()> {
    let (driver, site) = (pool.driver.clone(), place.site.clone());
    blocking(move || {
        driver.ended(&site);
        Ok(())
    })
    .await
}

/// The right to write a backup that nobody waits for; the next one's when dropped.
struct Turn(Arc<Pool>);

impl Turn {
    /// Waits for it; none if somebody waits for this backup, which is written at once.
    /// Cancel-safe.
    async fn take(pool: &Arc<Pool>, id: Uuid, interrupted: &AtomicBool) -> Fallible<Option<Self>> {
        loop {
            pool.until(|state| {
                let gives_up = is_set(interrupted) || state.closing;
                state.saving < MOST_BACKUPS || is_hurried(state, id) || gives_up
            })
            .await;
            let mut state = pool.state.lock();
            if is_set(interrupted) {
                return Err(Error::Task("it gave way to who wants the session".to_owned()));
            }
            if is_hurried(&state, id) {
                return Ok(None);
            }
            if state.closing {
                return Err(Error::ShuttingDown);
            }
            if state.saving < MOST_BACKUPS {
                state.saving += 1;
                return Ok(Some(Self(pool.clone())));
            }
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.state.lock().saving -= 1;
        self.0.changed.notify_waiters();
    }
}

fn is_hurried(state: &State, id: Uuid) -> bool {
    state.core.view(id).is_some_and(|view| view.hurried)
}

fn is_set(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}

async fn save(pool: &Arc<Pool>, id: Uuid, seq: Seq) -> Result {
    let interrupted = pool.state.lock().interrupts.get(&seq).cloned().unwrap_or_default();
    let _turn = Turn::take(pool, id, &interrupted).await?;
    let (name, latest, used) = {
        let state = pool.state.lock();
        let name = state.names.get(&id).map(ToString::to_string);
        let used = state.places.get(&id).and_then(|place| place.watched.known.lock().used());
        (name, state.facts.get(&id).and_then(|facts| facts.size), used)
    };
    let counter = Arc::new(Counter::default());
    let telling = Telling {
        session: Some(id),
        operation: "backup",
        counter: counter.clone(),
        // What the latest has of it is not read again.
        skips: latest.is_some(),
        total: used.max(latest),
    };
    let write = {
        let pool = pool.clone();
        blocking(move || {
            if pool.volumes.found(id)? != Found::Whole {
                return Ok(Outcome::Missing);
            }
            let site = pool.volumes.site(id);
            let backup = pool.backups()?.write(Saving {
                site: &site,
                name: name.as_deref(),
                now: pool.clock.wall(),
                counter: &counter,
                interrupted: &interrupted,
            })?;
            pool.note_backup(&backup);
            pool.figures.lock().backup_bytes_added += backup.bytes;
            Ok(Outcome::BackedUp(backup.name))
        })
    };
    pool.telling(telling, write).await
}

async fn restore(pool: &Arc<Pool>, place: &Arc<Place>, saved: Saved) -> Result {
    let id = place.site.id;
    let backup = match saved.backup() {
        Some(name) => Some(backup_for(pool, id, name.to_owned()).await?),
        None => None,
    };
    let (counter, telling) = told_restore(id, backup.as_ref());
    let is_backup = backup.is_some();
    let restore = {
        let (pool, place) = (pool.clone(), place.clone());
        blocking(move || {
            let (of, paths) = match saved {
                Saved::Part { of, paths } => (*of, Some(paths)),
                saved => (saved, None),
            };
            if paths.is_some() && pool.volumes.found(id)? != Found::Whole {
                return Ok(Outcome::Missing);
            }
            let only = paths.as_deref().map(|paths| kept(&pool, &place.site, paths)).transpose()?;
            let staging = pool.volumes.stage(id)?;
            let wanted = only.as_deref().unwrap_or_default();
            let restored = match (&backup, &of) {
                (Some(backup), _) => pool
                    .backups()
                    .and_then(|backups| backups.restore(backup, staging.path(), wanted, &counter)),
                (None, Saved::Snapshot(name)) => name
                    .parse()
                    .and_then(|name| pool.volumes.snapshot(id, &name))
                    .and_then(|from| snapshot::copy(&from, staging.path()))
                    .and_then(|()| staging.sync()),
                (None, _) => Err(Error::Task("it comes from nowhere".to_owned())),
            };
            let restored = restored.and_then(|()| match &only {
                Some(only) => put_part(&place.site, &staging, only),
                None => pool.volumes.install(id, staging.path()),
            });
            *place.watched.known.lock() = Known::default();
            if let (Ok(()), Some(backup), None) = (&restored, &backup, &only) {
                pool.note_backup(backup);
            }
            let only = only.unwrap_or_default();
            let paths = paths.unwrap_or_default();
            restored.map(|()| Outcome::Done).map_err(|error| as_asked(error, &only, &paths))
        })
    };
    // A copy on the same disk is not counted.
    if is_backup { pool.telling(telling, restore).await } else { restore.await }
}

/// Where what the session sees at these paths is in its folder.
fn kept(pool: &Pool, site: &Site, paths: &[PathBuf]) -> Fallible<Vec<PathBuf>> {
    let one = |path: &PathBuf| {
        let problem = "it is not among what is kept of a session".to_owned();
        let other = Error::NotPutBack { session: site.id, path: path.clone(), problem };
        pool.driver.kept(site, path)?.ok_or(other)
    };
    paths.iter().map(one).collect()
}

/// The same by the path that was asked for, not by where that is in the session's folder.
fn as_asked(error: Error, only: &[PathBuf], paths: &[PathBuf]) -> Error {
    match error {
        Error::NotPutBack { session, path, problem } => {
            let asked = only.iter().zip(paths).find(|(inside, _)| **inside == path);
            let path = asked.map_or(path, |(_, asked)| asked.clone());
            Error::NotPutBack { session, path, problem }
        }
        error => error,
    }
}

/// Puts some of a session's files in their places. Blocks.
fn put_part(site: &Site, staging: &Staged, only: &[PathBuf]) -> Fallible<()> {
    staging.sync()?;
    let changes = site.root_changes();
    let overlays = Path::new(changes.file_name().unwrap_or_default());
    part::put(staging.path(), &site.home, overlays, only).map_err(|(path, problem)| {
        let problem = match problem {
            part::Problem::Absent => "what it would be put back from has none".to_owned(),
            part::Problem::NoFolder(at) => format!("{} is no folder now", at.display()),
            part::Problem::System(source) => return Error::volume("put back", &path, source),
        };
        Error::NotPutBack { session: site.id, path, problem }
    })?;
    // It is done, and the session's row says that no backup has it.
    if let Err(error) = staging.sync() {
        tracing::warn!(session = %site.id, %error, "a power cut may undo what was put back");
    }
    Ok(())
}

/// What a restore counts, and how that is told.
fn told_restore(id: Uuid, backup: Option<&Backup>) -> (Arc<Counter>, Telling) {
    let counter = Arc::new(Counter::default());
    let telling = Telling {
        session: Some(id),
        operation: "restore",
        counter: counter.clone(),
        skips: false,
        total: backup.and_then(|backup| backup.size),
    };
    (counter, telling)
}

/// What a session has in a backup, in a folder of nobody's; the session is not touched. The backup
/// is not deleted meanwhile, unless by another host: then this fails as a whole. Cancel-safe: what
/// was restored goes.
pub(super) async fn restore_copy(
    pool: &Arc<Pool>,
    id: Uuid,
    name: String,
) -> Fallible<Arc<Staged>> {
    let none = || Error::NoBackup { session: id, name: Some(name.clone()) };
    let reading = Reading::begin(pool, &name).ok_or_else(none)?;
    let backup = backup_for(pool, id, name).await?;
    let (counter, telling) = told_restore(id, Some(&backup));
    let restore = {
        let pool = pool.clone();
        blocking(move || {
            let into = pool.volumes.stage(id)?;
            pool.backups()?.restore(&backup, into.path(), &[], &counter)?;
            drop(reading);
            Ok(Arc::new(into))
        })
    };
    pool.telling(telling, restore).await
}

/// The backup of that name, unless it is being deleted.
async fn backup_for(pool: &Arc<Pool>, id: Uuid, name: String) -> Fallible<Backup> {
    let pool = pool.clone();
    blocking(move || {
        if pool.state.lock().forgetting.contains(&name) {
            return Err(Error::NoBackup { session: id, name: Some(name) });
        }
        pool.backups()?.find(id, &name)
    })
    .await
}

async fn delete(pool: &Arc<Pool>, place: &Arc<Place>, op: &Op) -> Result {
    // Whose files go has nothing to save.
    if let Some(error) = stop(pool, place, true, Duration::ZERO).await.failure {
        return Err(error);
    }
    let (pool, place, id) = (pool.clone(), place.clone(), place.site.id);
    let view = |state: &State| state.core.view(id).and_then(|view| view.row.backup.clone());
    // What a backup brings back has its snapshots again.
    let for_ever = *op == Op::Remove || view(&pool.state.lock()).is_none();
    blocking(move || {
        let home = pool.volumes.home(id);
        pool.volumes.discard(id).map_err(|source| Error::volume("delete", &home, source))?;
        if for_ever && pool.volumes.discard_snapshots(id)? {
            tracing::warn!(session = %id, "snapshots deleted with their session");
        }
        *place.watched.known.lock() = Known::default();
        Ok(Outcome::Done)
    })
    .await
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::lifecycle::Want;
    use crate::{MicroVmManager, VmPoolConfig};

    fn manager(folder: &Path, max_vms: usize) -> Arc<MicroVmManager> {
        let config = VmPoolConfig {
            enabled: true,
            volume_root: folder.join("pool"),
            max_vms,
            ..VmPoolConfig::default()
        };
        MicroVmManager::new((&config).into()).unwrap()
    }

    #[tokio::test]
    async fn few_backups_are_written_at_once_that_nobody_waits_for() {
        let folder = tempfile::tempdir().unwrap();
        let manager = manager(folder.path(), 4);
        let pool = manager.pool().unwrap();
        let (id, flag) = (Uuid::new_v4(), Arc::new(AtomicBool::new(false)));
        let mut turns = Vec::new();
        for _ in 0..MOST_BACKUPS {
            turns.push(Turn::take(pool, id, &flag).await.unwrap().unwrap());
        }
        let waiting = || {
            let (pool, flag) = (pool.clone(), flag.clone());
            tokio::spawn(async move { Turn::take(&pool, id, &flag).await.map(|it| it.is_some()) })
        };
        let [next, last] = [waiting(), waiting()];
        tokio::task::yield_now().await;
        assert!(!next.is_finished() && !last.is_finished());
        turns.pop();
        // One of them has it, and is done.
        assert!(next.await.unwrap().unwrap());
        assert!(last.await.unwrap().unwrap());
        turns.clear();
        for _ in 0..MOST_BACKUPS {
            turns.push(Turn::take(pool, id, &flag).await.unwrap().unwrap());
        }
        let given_up = waiting();
        tokio::task::yield_now().await;
        flag.store(true, Ordering::Relaxed);
        pool.changed.notify_waiters();
        given_up.await.unwrap().unwrap_err();
    }

    #[tokio::test]
    async fn a_session_begins_with_what_was_wanted_though_nobody_waits_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let manager = manager(folder.path(), 4);
        let pool = manager.pool().unwrap();
        let copy = pool.volumes.stage(Uuid::new_v4()).unwrap();
        fs::create_dir(copy.path().join("volume")).unwrap();
        fs::write(copy.path().join("volume/file"), "copied").unwrap();
        let id = Uuid::new_v4();
        {
            let made = pool.acquire_made_of(id, Origin::Copy(Arc::new(copy)));
            tokio::pin!(made);
            // It has asked, and what it asked for has not begun.
            assert!(now(made.as_mut()).is_none());
        }
        pool.until(|state| state.core.in_flight() == 0).await;
        assert_eq!(
            fs::read_to_string(pool.volumes.site(id).volume.join("file")).unwrap(),
            "copied"
        );
    }

    /// The answer, if it is there at once.
    fn now<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Option<T> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match future.poll(&mut context) {
            std::task::Poll::Ready(answer) => Some(answer),
            std::task::Poll::Pending => None,
        }
    }

    #[tokio::test]
    async fn who_is_told_that_the_pool_closes_leaves_the_line() {
        let folder = tempfile::tempdir().unwrap();
        let manager = manager(folder.path(), 1);
        let pool = manager.pool().unwrap().clone();
        let (first, second) = (Uuid::new_v4(), Uuid::new_v4());
        let held = pool.acquire(first).await.unwrap();
        let waiting = {
            let pool = pool.clone();
            tokio::spawn(async move {
                pool.ask(second, Want::Guard { patient: true }).await.map(drop).unwrap_err()
            })
        };
        let waits = || pool.state.lock().core.view(second).is_some_and(|view| view.waiting == 1);
        while !waits() {
            tokio::task::yield_now().await;
        }
        let closing = {
            let pool = pool.clone();
            tokio::spawn(async move { pool.shutdown(false).await })
        };
        let told = waiting.await.unwrap();
        assert!(matches!(told, Error::ShuttingDown), "{told}");
        drop(held);
        closing.await.unwrap().unwrap();
        assert!(pool.state.lock().core.view(second).is_none(), "nobody wants it any more");
        assert!(!pool.volumes.home(second).exists());
    }
}
