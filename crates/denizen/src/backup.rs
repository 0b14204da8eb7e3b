//! The seam to where backups go. Whatever the format, a backup is verified before it is
//! named here, and nothing here deletes one.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use denizen_archive::{Given, Owners};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::isolation::{RECORD, Site};

pub use denizen_archive::Entry as Backup;

/// The backups of a pool: archives in a folder.
#[derive(Clone, Debug)]
pub(crate) struct Backups {
    destination: PathBuf,
    /// Whose files sessions have ([`crate::isolation::Driver::owners`]).
    owners: Option<Owners>,
}

impl Backups {
    pub(crate) fn new(destination: PathBuf, owners: Option<Owners>) -> Self {
        Self { destination, owners }
    }

    /// Writes and verifies a backup; gives its name.
    pub(crate) fn write(
        &self,
        site: &Site,
        now: SystemTime,
        interrupted: &AtomicBool,
    ) -> Result<String> {
        fs::create_dir_all(&self.destination).map_err(|source| {
            Error::volume("make the backup destination", &self.destination, source)
        })?;
        let now = jiff::Timestamp::try_from(now).unwrap_or_else(|_| jiff::Timestamp::now());
        let packed = pack(site, &self.destination, self.owners, now, interrupted);
        packed.map(|entry| entry.id.to_string())
    }

    /// Puts a backup's files into `home`, where they are then as a session's are.
    pub(crate) fn restore(&self, session: Uuid, name: &str, home: &Path) -> Result<()> {
        unpack(&self.find(session, name)?.path, self.owners, home)
    }

    /// A backup as an archive that can be restored anywhere.
    pub(crate) fn open(&self, session: Uuid, name: &str) -> Result<File> {
        let path = self.find(session, name)?.path;
        File::open(&path).map_err(|source| Error::volume("read", &path, source))
    }

    fn find(&self, session: Uuid, name: &str) -> Result<Backup> {
        let all = denizen_archive::list(&self.destination, Some(session))?;
        let found = all.into_iter().find(|entry| entry.id.to_string() == name);
        found.ok_or_else(|| Error::NoBackup { session, name: Some(name.to_owned()) })
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

/// Writes an archive of a session's volume and root changes.
pub(crate) fn pack(
    site: &Site,
    destination: &Path,
    owners: Option<Owners>,
    now: jiff::Timestamp,
    interrupted: &AtomicBool,
) -> Result<Backup> {
    let changes = site.root_changes();
    let beside = changes.is_dir().then_some(changes.as_path());
    let source = denizen_archive::Source { volume: &site.volume, beside, owners };
    let written = denizen_archive::write(source, destination, site.id, now, interrupted)?;
    for skipped in &written.skipped {
        tracing::warn!(session = %site.id, ?skipped, "not in the backup");
    }
    Ok(written.entry)
}

/// Puts what an archive holds into a session's folder, which has none of it.
pub(crate) fn unpack(archive: &Path, owners: Option<Owners>, home: &Path) -> Result<()> {
    let file = File::open(archive).map_err(|source| Error::volume("read", archive, source))?;
    let given = Given { file: &file, name: archive, limit: None };
    unpack_given(given, owners, home, &AtomicBool::new(false))
}

/// As [`unpack`], of an archive from elsewhere.
pub(crate) fn unpack_given(
    given: Given<'_>,
    owners: Option<Owners>,
    home: &Path,
    interrupted: &AtomicBool,
) -> Result<()> {
    let into = Site::in_folder(Uuid::nil(), home.to_owned());
    let restored = denizen_archive::restore_given(given, &into.volume, owners, interrupted)?;
    for warning in &restored.warnings {
        tracing::warn!(archive = %given.name.display(), %warning, "restored with a loss");
    }
    let beside = into.volume.join(denizen_archive::BESIDE);
    if are_root_changes(&beside) {
        // No session's: whoever wrote the backup may have numbered them as one's.
        let us = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let ours = |path: &Path| std::os::unix::fs::lchown(path, Some(us.0), Some(us.1));
        ours(&beside)
            .and_then(|()| ours(&beside.join(RECORD)))
            .and_then(|()| fs::rename(&beside, into.root_changes()))
            .map_err(|source| Error::volume("restore", &beside, source))?;
    }
    Ok(())
}

/// Whether this is what a session has beside its volume, not a folder of its own by that name:
/// real folders, and a file that says over what they go.
fn are_root_changes(folder: &Path) -> bool {
    let is_folder = |path: &Path| fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    let record = folder.join(RECORD);
    let fits = |entry: fs::DirEntry| entry.path() == record || is_folder(&entry.path());
    is_folder(folder)
        && fs::symlink_metadata(&record).is_ok_and(|meta| meta.is_file())
        && fs::read_dir(folder).is_ok_and(|mut all| all.all(|entry| entry.is_ok_and(fits)))
}
