//! What each [`Op`] does on disk and to instances.
//!
//! Operations are all or nothing where the lifecycle says so, and never begin another one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use denizen_agent::Agent;
use uuid::Uuid;

use super::{Place, Pool, blocking};
use crate::error::{Error, Result as Fallible};
use crate::isolation::Site;
use crate::lifecycle::{Found, Op, Outcome, Seq};
use crate::volume::Volumes;
use crate::{backup, bootstrap};

/// How long processes have between being asked to end and being ended.
const GRACE: Duration = Duration::from_secs(5);

/// How long an instance that could not be thawed has to be gone once it is killed.
const STUCK: Duration = Duration::from_secs(10);

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

/// Runs an operation and reports how it ended, whatever happens to this task.
pub(super) async fn run(pool: Arc<Pool>, id: Uuid, seq: Seq, op: Op) {
    struct Report(Arc<Pool>, Uuid, Seq, Op, Option<Ended>);
    impl Drop for Report {
        fn drop(&mut self) {
            let Self(pool, id, seq, op, ended) = self;
            let lost = || {
                let error = Error::Task("it was cut off".to_owned());
                match op {
                    Op::Freeze | Op::Thaw => Ended::broken(error),
                    _ => Err(error).into(),
                }
            };
            pool.finished(*id, *seq, ended.take().unwrap_or_else(lost));
        }
    }
    let mut report = Report(pool.clone(), id, seq, op.clone(), None);
    let place = pool.place(&mut pool.state.lock(), id);
    report.4 = Some(match op {
        Op::Create => create(&pool, &place).await.into(),
        Op::Start => start(&pool, &place).await.into(),
        Op::Stop { force } => stop(&pool, &place, force).await,
        Op::Freeze => freeze(&pool, &place).await,
        Op::Thaw => {
            thaw(&pool, &place).await.map_or_else(Ended::broken, |_| Ok(Outcome::Done).into())
        }
        Op::Backup => save(&pool, id, seq).await.into(),
        Op::Restore(name) => restore(&pool, &place, name).await.into(),
        Op::Prune | Op::Remove => delete(&pool, &place).await.into(),
    });
}

async fn create(pool: &Arc<Pool>, place: &Place) -> Result {
    let id = place.site.id;
    let origin = pool.state.lock().origins.get(&id).cloned();
    let make = {
        let pool = pool.clone();
        blocking(move || {
            pool.volumes.begin(id)?;
            match origin {
                Some(origin) => copy(&pool, id, &origin).map(|()| true),
                None => Ok(false),
            }
        })
    };
    let made = async {
        let copied = make.await?;
        if !copied && bootstrap::is_wanted(&pool.config) {
            let (driver, site) = (pool.driver.clone(), place.site.clone());
            let instance = blocking(move || driver.start(&site)).await?;
            let done = bootstrap::run(&pool.config, pool.isolation(), instance, place).await;
            ended(pool, place).await?;
            done?;
        }
        let volumes = pool.volumes.clone();
        blocking(move || volumes.complete(id)).await
    };
    let result = made.await;
    if result.is_err() {
        let volumes = pool.volumes.clone();
        let home = volumes.home(id);
        let discarded = blocking(move || {
            volumes.discard(id).map_err(|source| Error::volume("clear", &home, source))
        });
        if let Err(error) = discarded.await {
            // The mark in it says that it is half-made: the next start clears it.
            tracing::warn!(session = %id, %error, "cannot clear a half-made session");
        }
    }
    result.map(|()| Outcome::Done)
}

/// Copies what another session has, with all that a backup keeps, by way of one.
fn copy(pool: &Pool, id: Uuid, origin: &Site) -> Fallible<()> {
    let staging = pool.volumes.stage(id)?;
    let never = AtomicBool::new(false);
    let copied = backup::pack(origin, &staging, jiff::Timestamp::now(), &never)
        .and_then(|archive| backup::unpack(&archive.path, &pool.volumes.home(id)));
    Volumes::unstage(&staging);
    copied
}

async fn start(pool: &Arc<Pool>, place: &Arc<Place>) -> Result {
    let (pool, place) = (pool.clone(), place.clone());
    blocking(move || {
        if pool.volumes.found(place.site.id) != Found::Whole {
            return Ok(Outcome::Missing);
        }
        *place.instance.lock() = Some(pool.driver.start(&place.site)?);
        Ok(Outcome::Done)
    })
    .await
}

async fn stop(pool: &Pool, place: &Place, force: bool) -> Ended {
    let Some(agent) = place.agent() else { return Ok(Outcome::Done).into() };
    // Whoever stands still hears nothing, neither a question nor that it shall end.
    match thaw(pool, place).await {
        Ok(false) => end(pool, place, &agent, force).await.into(),
        Ok(true) => match end(pool, place, &agent, force).await {
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
async fn end(pool: &Pool, place: &Place, agent: &Agent, force: bool) -> Result {
    if !force && pool.settings.background_is_use && !agent.busy().await?.is_empty() {
        return Ok(Outcome::Busy);
    }
    agent.shutdown(GRACE).await?;
    clear_up(pool, place).await?;
    Ok(Outcome::Done)
}

async fn clear_up(pool: &Pool, place: &Place) -> Fallible<()> {
    *place.instance.lock() = None;
    ended(pool, place).await
}

async fn freeze(pool: &Pool, place: &Place) -> Ended {
    let Some(agent) = place.agent() else {
        return Ended::broken(Error::Task("an active session has no instance".to_owned()));
    };
    let quiet = match agent.busy().await {
        Ok(running) => running.is_empty(),
        Err(error) => return Err(error.into()).into(),
    };
    if !quiet && pool.settings.background_is_use {
        return Ok(Outcome::Busy).into();
    }
    // Asked before it is frozen: what is thawed later may run, write and be gone before it
    // could be seen.
    place.quiet.store(quiet, Ordering::Relaxed);
    let (driver, site) = (pool.driver.clone(), place.site.clone());
    let given_up = GivenUp::default();
    let flag = given_up.0.clone();
    let frozen = blocking(move || {
        let frozen = driver.freeze(&site);
        if flag.load(Ordering::SeqCst) {
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
struct GivenUp(Arc<AtomicBool>);

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

async fn save(pool: &Arc<Pool>, id: Uuid, seq: Seq) -> Result {
    let interrupted = pool.state.lock().interrupts.get(&seq).cloned().unwrap_or_default();
    let pool = pool.clone();
    blocking(move || {
        if pool.volumes.found(id) != Found::Whole {
            return Ok(Outcome::Missing);
        }
        let site = pool.volumes.site(id);
        let name = pool.backups()?.write(&site, pool.clock.wall(), &interrupted)?;
        Ok(Outcome::BackedUp(name))
    })
    .await
}

async fn restore(pool: &Arc<Pool>, place: &Arc<Place>, name: String) -> Result {
    let (pool, place) = (pool.clone(), place.clone());
    blocking(move || {
        let id = place.site.id;
        let staging = pool.volumes.stage(id)?;
        let restored = pool
            .backups()
            .and_then(|backups| backups.restore(id, &name, &staging))
            .and_then(|()| pool.volumes.install(id, &staging));
        if restored.is_err() {
            Volumes::unstage(&staging);
        }
        restored.map(|()| Outcome::Done)
    })
    .await
}

async fn delete(pool: &Arc<Pool>, place: &Arc<Place>) -> Result {
    if let Some(error) = stop(pool, place, true).await.failure {
        return Err(error);
    }
    let (pool, id) = (pool.clone(), place.site.id);
    blocking(move || {
        let home = pool.volumes.home(id);
        pool.volumes.discard(id).map_err(|source| Error::volume("delete", &home, source))?;
        Ok(Outcome::Done)
    })
    .await
}
