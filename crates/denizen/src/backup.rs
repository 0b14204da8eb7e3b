//! The seam to where backups go. Whatever the format, a backup is verified before it is
//! named here, and nothing here deletes one.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use uuid::Uuid;

use crate::error::{Error, Result};

pub use denizen_archive::Entry as Backup;

/// The backups of a pool: archives in a folder.
#[derive(Clone, Debug)]
pub(crate) struct Backups {
    destination: PathBuf,
}

impl Backups {
    pub(crate) fn new(destination: PathBuf) -> Self {
        Self { destination }
    }

    /// Writes and verifies a backup; gives its name.
    pub(crate) fn write(
        &self,
        session: Uuid,
        volume: &Path,
        now: SystemTime,
        interrupted: &AtomicBool,
    ) -> Result<String> {
        fs::create_dir_all(&self.destination).map_err(|source| {
            Error::volume("make the backup destination", &self.destination, source)
        })?;
        let now = jiff::Timestamp::try_from(now).unwrap_or_else(|_| jiff::Timestamp::now());
        let written = denizen_archive::write(volume, &self.destination, session, now, interrupted)?;
        for skipped in &written.skipped {
            tracing::warn!(session = %session, ?skipped, "not in the backup");
        }
        Ok(written.entry.id.to_string())
    }

    /// Puts a backup's files into `into`, which must not exist or be empty.
    pub(crate) fn restore(&self, session: Uuid, name: &str, into: &Path) -> Result<()> {
        let all = denizen_archive::list(&self.destination, Some(session))?;
        let Some(entry) = all.into_iter().find(|entry| entry.id.to_string() == name) else {
            return Err(Error::NoBackup { session, name: Some(name.to_owned()) });
        };
        let restored = denizen_archive::restore(&entry.path, into, &AtomicBool::new(false))?;
        for warning in &restored.warnings {
            tracing::warn!(session = %session, backup = name, %warning, "restored with a loss");
        }
        Ok(())
    }

    /// What can be restored, newest first.
    pub(crate) fn list(&self, session: Uuid) -> Result<Vec<Backup>> {
        Ok(denizen_archive::list(&self.destination, Some(session))?)
    }

    /// Deletes what killed processes left half-written.
    pub(crate) fn sweep(&self) -> Result<()> {
        if self.destination.exists() {
            denizen_archive::clean(&self.destination, None)?;
        }
        Ok(())
    }
}
