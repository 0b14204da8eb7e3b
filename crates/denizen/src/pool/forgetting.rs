//! Has backups that are not kept deleted, once a day or when somebody asks.
//!
//! Which ones is for `backup/retention.rs` to say. Must never delete what a session counts on at
//! the moment at which it is claimed (`State::forgetting`): from then on nothing is put back from
//! it. It may be killed at any point, and other hosts may write meanwhile.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::{LONGEST_SLEEP, Pool, blocking};
use crate::backup::{Backup, Retention, retention};
use crate::error::{Error, Result};
use crate::event::{Event, EventKind};
use crate::lifecycle::PoolTime;

/// From one time to the next.
const DAY: Duration = Duration::from_hours(24);
/// How many letters of a backup's name are needed to delete it.
const LEAST: usize = 8;
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
        self.forgot(&planned);
        // Also if nothing was deleted now: what was deleted yesterday can go for good today.
        if !retention.is_empty() {
            backups.compact()?;
        }
        Ok(planned)
    }

    /// Deletes a backup, of a session that is known here or of another, asked for by its name or
    /// by what only its name begins with. Blocks.
    pub(crate) fn delete_backup(&self, name: &str) -> Result<Backup> {
        let _alone = self.forget_due.lock();
        let backups = self.backups()?;
        let mut found = backups.list(None)?;
        // A few letters may be another's only one by chance.
        let enough = name.len() >= LEAST;
        found.retain(|backup| backup.name == name || (enough && backup.name.starts_with(name)));
        if let Some(whole) = found.iter().position(|backup| backup.name == name) {
            found = vec![found.swap_remove(whole)];
        }
        let [backup] = &found[..] else {
            let (name, several) = (name.to_owned(), !found.is_empty());
            return Err(Error::UnknownBackup { name, several });
        };
        let claim = Claim::one(self, backup)?;
        backups.forget(&found)?;
        drop(claim);
        self.forgot(&found);
        backups.compact()?;
        Ok(backup.clone())
    }

    /// Tells of what was deleted.
    fn forgot(&self, planned: &[Backup]) {
        self.figures.lock().backups_forgotten += planned.len() as u64;
        for backup in planned {
            tracing::info!(session = %backup.session, backup = backup.name, "backup deleted");
            let (session, backup) = (backup.session, backup.name.clone());
            let name = self.state.lock().names.get(&session).map(ToString::to_string);
            let (at, kind) = (self.clock.wall(), EventKind::Forgotten { backup });
            self.announcer.announce(Event { at, session, name, kind });
        }
    }
}

/// The backups that are being deleted; let go when dropped.
struct Claim<'a>(&'a Pool);

impl<'a> Claim<'a> {
    /// Claims what nobody has begun to count on meanwhile.
    fn new(pool: &'a Pool, backups: &mut Vec<Backup>) -> Self {
        let mut state = pool.state.lock();
        backups.retain(|backup| {
            !state.core.counts_on(backup.session, &backup.name)
                && !state.reading.contains(&backup.name)
        });
        state.forgetting = backups.iter().map(|backup| backup.name.clone()).collect();
        Self(pool)
    }

    /// Claims one, also of a session that is not known.
    fn one(pool: &'a Pool, backup: &Backup) -> Result<Self> {
        let (session, name) = (backup.session, &backup.name);
        let mut state = pool.state.lock();
        let known = state.core.view(session).is_some();
        if (known && state.core.counts_on(session, name)) || state.reading.contains(name) {
            return Err(Error::BackupNeeded { session, name: name.clone() });
        }
        state.forgetting = [name.clone()].into();
        Ok(Self(pool))
    }
}

/// A backup that is read for others than its session; let go when dropped.
pub(super) struct Reading(Arc<Pool>, String);

impl Reading {
    /// None if it is being deleted.
    pub(super) fn begin(pool: &Arc<Pool>, name: &str) -> Option<Self> {
        let mut state = pool.state.lock();
        if state.forgetting.contains(name) {
            return None;
        }
        state.reading.push(name.to_owned());
        Some(Self(pool.clone(), name.to_owned()))
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        if let Some(at) = state.reading.iter().position(|name| *name == self.1) {
            state.reading.swap_remove(at);
        }
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

    /// A pool, in a folder that goes with what is given, and a session of it.
    async fn with_three_backups() -> (tempfile::TempDir, Arc<MicroVmManager>, Uuid) {
        let folder = tempfile::tempdir().unwrap();
        let config = VmPoolConfig {
            enabled: true,
            volume_root: folder.path().join("pool"),
            backup_destination: Some(folder.path().join("backups")),
            ..VmPoolConfig::default()
        };
        let manager = MicroVmManager::new((&config).into()).unwrap();
        let id = Uuid::new_v4();
        for _ in 0..3 {
            drop(manager.acquire(id).await.unwrap());
            manager.backup(id).await.unwrap();
        }
        (folder, manager, id)
    }

    #[tokio::test]
    async fn what_is_claimed_and_what_is_counted_on_exclude_each_other() {
        let (_folder, manager, id) = with_three_backups().await;
        let pool = manager.pool().unwrap();
        let all = manager.backups(id).await.unwrap();
        let oldest = all[2].name.clone();
        let restore = || pool.ask(id, Want::Restored(Saved::Backup(oldest.clone())));

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

    #[tokio::test]
    async fn one_backup_is_deleted_unless_it_is_needed() {
        let (_folder, manager, id) = with_three_backups().await;
        let all = manager.backups(id).await.unwrap();
        let reading = Reading::begin(manager.pool().unwrap(), &all[2].name).unwrap();
        for needed in [&all[0], &all[2]] {
            let error = manager.delete_backup(&needed.name).await.unwrap_err();
            assert!(matches!(error, Error::BackupNeeded { .. }), "{error}");
        }
        drop(reading);
        let several = manager.delete_backup(&all[2].name[..LEAST]).await.unwrap_err();
        assert!(matches!(several, Error::UnknownBackup { several: true, .. }), "{several}");
        for none in ["no such backup", &all[2].name[..LEAST - 1]] {
            let none = manager.delete_backup(none).await.unwrap_err();
            assert!(matches!(none, Error::UnknownBackup { several: false, .. }), "{none}");
        }
        assert_eq!(manager.delete_backup(&all[2].name).await.unwrap(), all[2]);
        assert_eq!(manager.backups(id).await.unwrap(), all[..2]);
        // Nobody needs those of a session that is gone.
        manager.remove(id).await.unwrap();
        manager.delete_backup(&all[0].name).await.unwrap();
        assert_eq!(manager.backups(id).await.unwrap(), all[1..2]);
    }
}
