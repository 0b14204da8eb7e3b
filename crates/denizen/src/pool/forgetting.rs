//! Has backups that are not kept deleted, once a day or when somebody asks.
//!
//! Which ones is for `backup/retention.rs` to say. Must never delete what a session counts on at
//! the moment at which it is claimed (`State::forgetting`): from then on nothing is put back from
//! it. It may be killed at any point, and other hosts may write meanwhile.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::{LONGEST_SLEEP, Pool, blocking};
use crate::backup::{Backup, Retention, retention};
use crate::error::Result;
use crate::event::{Event, EventKind};
use crate::lifecycle::PoolTime;

/// From one time to the next.
const DAY: Duration = Duration::from_hours(24);
/// From a failure to the next try.
const AGAIN: Duration = Duration::from_hours(1);

/// When it is due.
pub(super) struct Due {
    at: PoolTime,
    failed: bool,
}

impl Due {
    /// By when it was last done; at once if it never was.
    pub(super) fn after(done_at: Option<PoolTime>) -> Self {
        Self { at: done_at.map_or(PoolTime::default(), |at| at.after(DAY)), failed: false }
    }
}

/// Forgets what is due, for as long as there is the pool.
pub(super) async fn run(pool: Weak<Pool>) {
    loop {
        let Some(pool) = pool.upgrade() else { return };
        pool.forget_if_due(false).await;
        drop(pool);
        tokio::time::sleep(LONGEST_SLEEP).await;
    }
}

impl Pool {
    pub(crate) fn retention(&self) -> Retention {
        self.changing.lock().retention
    }

    pub(crate) fn set_retention(&self, retention: Retention) {
        self.changing.lock().retention = retention;
    }

    /// Whether anything is forgotten without somebody asking for it.
    pub(super) fn forgets(&self) -> bool {
        self.backups.is_some() && !self.retention().is_empty()
    }

    /// Deletes what is not kept, if that is due; `eagerly`, also if it failed and is being waited
    /// out. A failure is logged. Cancel-safe: what has begun goes on.
    pub(super) async fn forget_if_due(self: &Arc<Self>, eagerly: bool) {
        if !self.forgets() {
            return;
        }
        let pool = self.clone();
        let done = blocking(move || {
            let mut due = pool.forget_due.lock();
            let now = pool.clock.now();
            if now < due.at && !(eagerly && due.failed) {
                return Ok(());
            }
            let done = pool
                .forget(&pool.retention(), false)
                .and_then(|_| Ok(pool.registry.lock().forgot(now, &pool.clock.save())?));
            let wait = if done.is_ok() { DAY } else { AGAIN };
            *due = Due { at: now.after(wait), failed: done.is_err() };
            done
        });
        if let Err(error) = done.await {
            tracing::warn!(%error, "cannot delete the backups that are not kept");
        }
    }

    /// Deletes what is not kept, or with `dry_run` does not; gives it. Blocks.
    pub(crate) fn forget_backups(
        &self,
        retention: &Retention,
        dry_run: bool,
    ) -> Result<Vec<Backup>> {
        let _alone = self.forget_due.lock();
        self.forget(retention, dry_run)
    }

    fn forget(&self, retention: &Retention, dry_run: bool) -> Result<Vec<Backup>> {
        let backups = self.backups()?;
        let there = backups.list(None)?;
        let counted_on = self.state.lock().core.counted_on();
        let mut planned = retention::plan(&there, &counted_on, retention);
        if dry_run {
            return Ok(planned);
        }
        let claim = Claim::new(self, &mut planned);
        backups.forget(&planned)?;
        drop(claim);
        self.figures.lock().backups_forgotten += planned.len() as u64;
        for backup in &planned {
            tracing::info!(session = %backup.session, backup = backup.name, "backup deleted");
            let (session, backup) = (backup.session, backup.name.clone());
            let name = self.state.lock().names.get(&session).map(ToString::to_string);
            let (at, kind) = (self.clock.wall(), EventKind::Forgotten { backup });
            self.announcer.announce(Event { at, session, name, kind });
        }
        // Also if nothing was deleted now: what was deleted yesterday can go for good today.
        if !retention.is_empty() {
            backups.compact()?;
        }
        Ok(planned)
    }
}

/// The backups that are being deleted; let go when dropped.
struct Claim<'a>(&'a Pool);

impl<'a> Claim<'a> {
    /// Claims what nobody has begun to count on meanwhile.
    fn new(pool: &'a Pool, backups: &mut Vec<Backup>) -> Self {
        let mut state = pool.state.lock();
        backups.retain(|backup| !state.core.counts_on(backup.session, &backup.name));
        state.forgetting = backups.iter().map(|backup| backup.name.clone()).collect();
        Self(pool)
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.state.lock().forgetting.clear();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::error::Error;
    use crate::lifecycle::{Saved, Want};
    use crate::{MicroVmManager, VmPoolConfig};

    #[tokio::test]
    async fn what_is_claimed_and_what_is_counted_on_exclude_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let config = VmPoolConfig {
            enabled: true,
            volume_root: folder.path().join("pool"),
            backup_destination: Some(folder.path().join("backups")),
            ..VmPoolConfig::default()
        };
        let manager = MicroVmManager::new((&config).into()).unwrap();
        let pool = manager.pool().unwrap();
        let id = Uuid::new_v4();
        for _ in 0..3 {
            drop(manager.acquire(id).await.unwrap());
            manager.backup(id).await.unwrap();
        }
        let all = manager.backups(id).await.unwrap();
        let oldest = all[2].name.clone();
        let restore = || pool.ask(id, Want::Restored(Some(Saved::Backup(oldest.clone()))));

        let mut planned = all[1..].to_vec();
        let claim = Claim::new(pool, &mut planned);
        assert_eq!(planned, all[1..]);
        let error = restore().await.map(drop).unwrap_err();
        assert!(matches!(error.kind(), Error::NoBackup { .. }), "{error}");
        assert_eq!(manager.inspect(id).unwrap().backup.as_ref(), Some(&all[0].name));
        drop(claim);

        // Planned before, but put back from meanwhile.
        restore().await.map(drop).unwrap();
        let mut planned = all[1..].to_vec();
        drop(Claim::new(pool, &mut planned));
        assert_eq!(planned, all[1..2]);
        // Or forgotten as a session.
        manager.remove(id).await.unwrap();
        drop(Claim::new(pool, &mut planned));
        assert_eq!(planned, []);
    }
}
