//! What each [`Op`] does on disk and to instances.
//!
//! Operations are all or nothing where the lifecycle says so, and never begin another one.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use uuid::Uuid;

use super::{Place, Pool, blocking};
use crate::error::{Error, Result as Fallible};
use crate::isolation::Site;
use crate::lifecycle::{Found, Op, Outcome, Seq};
use crate::volume::Volumes;
use crate::{backup, bootstrap};

/// How long processes have between being asked to end and being ended.
const GRACE: Duration = Duration::from_secs(5);

pub(super) type Result = Fallible<Outcome>;

/// Runs an operation and reports how it ended, whatever happens to this task.
pub(super) async fn run(pool: Arc<Pool>, id: Uuid, seq: Seq, op: Op) {
    struct Report(Arc<Pool>, Uuid, Seq, Option<Result>);
    impl Drop for Report {
        fn drop(&mut self) {
            let lost = || Err(Error::Task("it was cut off".to_owned()));
            let Self(pool, id, seq, result) = self;
            pool.finished(*id, *seq, result.take().unwrap_or_else(lost));
        }
    }
    let mut report = Report(pool.clone(), id, seq, None);
    let place = pool.place(&mut pool.state.lock(), id);
    report.3 = Some(match op {
        Op::Create => create(&pool, &place).await,
        Op::Start => start(&pool, &place).await,
        Op::Stop { force } => stop(&pool, &place, force).await,
        Op::Backup => save(&pool, id, seq).await,
        Op::Restore(name) => restore(&pool, &place, name).await,
        Op::Prune | Op::Remove => delete(&pool, &place).await,
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
    let owners = pool.driver.owners();
    let copied = backup::pack(origin, &staging, owners, jiff::Timestamp::now(), &never)
        .and_then(|archive| backup::unpack(&archive.path, owners, &pool.volumes.home(id)));
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

async fn stop(pool: &Pool, place: &Place, force: bool) -> Result {
    let Some(agent) = place.agent() else { return Ok(Outcome::Done) };
    if !force && pool.settings.background_is_use && !agent.busy().await?.is_empty() {
        return Ok(Outcome::Busy);
    }
    agent.shutdown(GRACE).await?;
    *place.instance.lock() = None;
    ended(pool, place).await?;
    Ok(Outcome::Done)
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
    stop(pool, place, true).await?;
    let (pool, id) = (pool.clone(), place.site.id);
    blocking(move || {
        let home = pool.volumes.home(id);
        pool.volumes.discard(id).map_err(|source| Error::volume("delete", &home, source))?;
        Ok(Outcome::Done)
    })
    .await
}
