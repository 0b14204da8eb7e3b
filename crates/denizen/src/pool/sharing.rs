//! Shared folders, and which sessions have them. What is durable is what is in force: both change
//! while the registry is held. A folder that some session has must never go.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use uuid::Uuid;

use super::{Pool, State, blocking};
use crate::error::{Error, Result};
use crate::isolation::Driver;
use crate::name;
use crate::registry::{Registry, Remembered};
use crate::share::{self, Mount, Share, SharedFiles};
use crate::volume::Volumes;

/// Puts shared folders in order before anybody has them, and gives which sessions have them. A
/// folder with something in it that the registry does not know, which may be an old one, is taken
/// in: what was removed is not there any more.
pub(super) fn begin(
    remembered: &mut Remembered,
    registry: &mut Registry,
    volumes: &Volumes,
    driver: &dyn Driver,
) -> Result<HashMap<Uuid, Vec<Mount>>> {
    let all = volumes.shares();
    let failed = |source| Error::volume("read", &all, source);
    for entry in std::fs::read_dir(&all).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let id = path.file_name().and_then(|name| Uuid::try_parse(name.to_str()?).ok());
        let Some(id) = id else { continue };
        let files = SharedFiles::new(path.clone(), None, None);
        // Whoever asks for one that is damaged is told.
        let cleared = files.clear();
        if let Err(error) = cleared {
            tracing::error!(share = %id, %error, "cannot empty a shared folder's staging");
        }
        if remembered.shares.contains(&id) {
            continue;
        }
        if files.is_empty() {
            // Its making was cut off.
            if let Err(error) = volumes.discard_share(id) {
                tracing::error!(share = %id, %error, "cannot remove a half-made shared folder");
            }
            continue;
        }
        tracing::warn!(share = %id, "took in a shared folder that the registry did not know");
        registry.add_share(&Share { id, name: id.to_string(), created_at: SystemTime::now() })?;
    }
    let known: Vec<Uuid> = remembered.rows.iter().map(|row| row.id).collect();
    let mounts = remembered.mounts.drain(..).filter(|(id, _)| known.contains(id));
    let mounts: HashMap<Uuid, Vec<Mount>> = mounts.collect();
    if !mounts.is_empty() && !driver.can_mount() {
        tracing::warn!(
            sessions = mounts.len(),
            "sessions have shared folders, which are not had in this isolation: they go without"
        );
    }
    for (id, mounts) in &mounts {
        driver.set_mounts(*id, places(volumes, mounts));
    }
    Ok(mounts)
}

/// Where the files are of what a session has, and where it has them.
fn places(volumes: &Volumes, mounts: &[Mount]) -> Vec<(PathBuf, Mount)> {
    let folder = |mount: &Mount| volumes.shares().join(mount.share.to_string());
    let mut all: Vec<(PathBuf, Mount)> = mounts
        .iter()
        .map(|mount| (SharedFiles::new(folder(mount), None, None).files(), mount.clone()))
        .collect();
    // One within another comes after it.
    all.sort_by(|(_, one), (_, other)| one.path.cmp(&other.path));
    all
}

fn known(registry: &Registry, id: Uuid) -> Result<Share> {
    let found = registry.shares()?.into_iter().find(|share| share.id == id);
    found.ok_or(Error::UnknownShare { share: id })
}

impl Pool {
    pub(crate) async fn create_share(self: &Arc<Self>, name: String) -> Result<Share> {
        name::check("shared folder", &name)?;
        let pool = self.clone();
        blocking(move || {
            let mut registry = pool.registry.lock();
            if registry.shares()?.iter().any(|share| share.name == name) {
                return Err(Error::ShareExists { name });
            }
            let share = Share { id: Uuid::new_v4(), name, created_at: pool.clock.wall() };
            let files = pool.files_of(share.id);
            let made = files
                .make()
                .map_err(|source| Error::volume("make", &pool.volumes.shares(), source));
            let made = made.and_then(|()| Ok(registry.add_share(&share)?));
            if let Err(error) = made {
                // The next start removes what this does not.
                let _ = pool.volumes.discard_share(share.id);
                return Err(error);
            }
            // As whoever asks for it is told.
            known(&registry, share.id)
        })
        .await
    }

    pub(crate) async fn shares(self: &Arc<Self>) -> Result<Vec<Share>> {
        let pool = self.clone();
        blocking(move || Ok(pool.registry.lock().shares()?)).await
    }

    pub(crate) async fn remove_share(self: &Arc<Self>, id: Uuid) -> Result<()> {
        let pool = self.clone();
        blocking(move || {
            let mut registry = pool.registry.lock();
            known(&registry, id)?;
            let state = pool.state.lock();
            let has = |mounts: &[Mount]| mounts.iter().any(|mount| mount.share == id);
            if let Some((session, _)) = state.mounts.iter().find(|(_, all)| has(all)) {
                return Err(Error::ShareInUse { share: id, session: *session });
            }
            drop(state);
            // The folder first: one that is there is one that nobody has removed.
            let removed = pool.volumes.discard_share(id);
            removed.map_err(|source| Error::volume("remove", &pool.folder_of(id), source))?;
            Ok(registry.remove_share(id)?)
        })
        .await
    }

    pub(crate) async fn shared_files(self: &Arc<Self>, id: Uuid) -> Result<SharedFiles> {
        let pool = self.clone();
        blocking(move || {
            known(&pool.registry.lock(), id)?;
            Ok(pool.files_of(id))
        })
        .await
    }

    pub(crate) fn mounts(&self, id: Uuid) -> Result<Vec<Mount>> {
        self.known(id)?;
        Ok(self.state.lock().mounts.get(&id).cloned().unwrap_or_default())
    }

    /// Says which shared folders a session has from its next start on. Cancel-safe: what has begun
    /// goes on.
    pub(crate) async fn set_mounts(self: &Arc<Self>, id: Uuid, mounts: Vec<Mount>) -> Result<()> {
        if let Some(problem) = share::problem(&mounts) {
            return Err(Error::Mounts { session: id, problem });
        }
        if !mounts.is_empty() && !self.driver.can_mount() {
            let problem = "its sessions cannot have shared folders: set isolation to `sandbox`";
            let isolation = self.settings.isolation.name();
            return Err(Error::Isolation { isolation, problem: problem.to_owned() });
        }
        self.known(id)?;
        self.put_mounts(id, mounts).await?;
        // It may have been removed meanwhile, and these came after that.
        match self.known(id) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.put_mounts(id, Vec::new()).await?;
                Err(error)
            }
        }
    }

    pub(super) async fn put_mounts(self: &Arc<Self>, id: Uuid, mounts: Vec<Mount>) -> Result<()> {
        let pool = self.clone();
        blocking(move || {
            let mut registry = pool.registry.lock();
            mounts.iter().try_for_each(|mount| known(&registry, mount.share).map(drop))?;
            registry.set_mounts(id, &mounts)?;
            let mut state = pool.state.lock();
            pool.driver.set_mounts(id, places(&pool.volumes, &mounts));
            if mounts.is_empty() {
                state.mounts.remove(&id);
            } else {
                state.mounts.insert(id, mounts);
            }
            Ok(())
        })
        .await
    }

    /// A session is no more: it has none.
    pub(super) fn unmounted(&self, state: &mut State, id: Uuid) {
        if state.mounts.remove(&id).is_some() {
            self.driver.set_mounts(id, Vec::new());
        }
    }

    /// What a session has, and where the files of it are.
    pub(super) fn places_of(&self, id: Uuid) -> Vec<(PathBuf, Mount)> {
        let state = self.state.lock();
        places(&self.volumes, state.mounts.get(&id).map(Vec::as_slice).unwrap_or_default())
    }

    /// The shared folders of a session, with what is being written to them and removed.
    pub(super) fn shared_trees(&self, id: Uuid) -> Vec<PathBuf> {
        let state = self.state.lock();
        let mounts = state.mounts.get(&id).map(Vec::as_slice).unwrap_or_default();
        mounts.iter().map(|mount| self.folder_of(mount.share)).collect()
    }

    fn folder_of(&self, share: Uuid) -> PathBuf {
        self.volumes.shares().join(share.to_string())
    }

    fn files_of(&self, share: Uuid) -> SharedFiles {
        SharedFiles::new(self.folder_of(share), self.driver.owners(), self.driver.disk_limit())
    }
}
