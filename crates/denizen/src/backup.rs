//! The seam to where backups go: a destination, and the format that they have there. A backup is
//! verified before it is named here.
//!
//! New ones are written in one format; all that the destination holds can be restored, so that a
//! pool whose format is changed loses none. A folder may hold both: archives stand beside a
//! repository's own folders. Nothing here decides when to back up or what to forget.

mod archive;
mod repository;
pub(crate) mod retention;

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use denizen_archive::Owners;
use denizen_repository::{Counter, Destination, Report};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::isolation::Site;

pub(crate) use archive::{pack, unpack_given};
pub use retention::Retention;

/// How backups are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackupFormat {
    /// Each is one compressed tar file, which any tar reads. In a folder only.
    #[default]
    Archive,
    /// All share one encrypted repository in the format of restic, in which each thing is once.
    Repository,
}

impl BackupFormat {
    /// As configuration has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Archive => "archive",
            Self::Repository => "repository",
        }
    }
}

impl fmt::Display for BackupFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for BackupFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Archive, Self::Repository];
        let found = all.into_iter().find(|format| format.name() == text);
        found.ok_or_else(|| format!("{text:?} is neither `archive` nor `repository`"))
    }
}

/// A backup that can be restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Backup {
    /// What it is asked for by.
    pub name: String,
    /// The session that it holds.
    pub session: Uuid,
    /// The session's name when it was taken, where that is kept.
    pub session_name: Option<String>,
    /// The host that wrote it, where that is kept.
    pub host: Option<String>,
    /// When it was taken. Later than every older one of the session, even if the clock was set
    /// back.
    #[serde(serialize_with = "timestamp")]
    pub taken_at: jiff::Timestamp,
    /// How it is kept.
    pub format: BackupFormat,
    /// Bytes by which the destination has grown with it.
    pub bytes: u64,
    /// Bytes of the content of its files, where that is kept.
    pub size: Option<u64>,
    /// The file that it is, if it is one.
    pub path: Option<PathBuf>,
}

fn timestamp<S: serde::Serializer>(
    at: &jiff::Timestamp,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(at)
}

/// What is to be kept of a session.
#[derive(Clone, Copy)]
pub(crate) struct Saving<'a> {
    pub(crate) site: &'a Site,
    pub(crate) name: Option<&'a str>,
    pub(crate) now: SystemTime,
    pub(crate) counter: &'a Arc<Counter>,
    pub(crate) interrupted: &'a AtomicBool,
}

/// One format of backups, at one destination. All calls block.
trait Format: fmt::Debug + Send + Sync {
    /// Writes a backup and reads it back.
    fn write(&self, saving: Saving<'_>) -> Result<Backup>;

    /// Puts a backup's files into `home`, where they are then as a session's are. With `only`,
    /// paths there, it need be no more than these, and all of them.
    fn restore(
        &self,
        backup: &Backup,
        home: &Path,
        only: &[PathBuf],
        counter: &Counter,
    ) -> Result<()>;

    /// What is there, of a session or of all.
    fn list(&self, session: Option<Uuid>) -> Result<Vec<Backup>>;

    /// Whether what is there is what was written.
    fn verify(
        &self,
        read_data: bool,
        counter: &Counter,
        interrupted: &AtomicBool,
    ) -> Result<Report>;

    /// Deletes backups.
    fn forget(&self, backups: &[Backup]) -> Result<()>;

    /// Gives back the room of what was deleted.
    fn compact(&self) -> Result<()>;

    /// Deletes what killed processes left half-written.
    fn sweep(&self) -> Result<()>;
}

/// The backups of a pool.
#[derive(Clone, Debug)]
pub(crate) struct Backups {
    format: BackupFormat,
    archives: Option<Arc<archive::Archives>>,
    repository: Arc<repository::Stored>,
    place: String,
    /// There have been backups here: if there are none now, something is wrong.
    is_known: Arc<AtomicBool>,
}

impl Backups {
    /// `owners` are those whose files sessions have ([`crate::isolation::Driver::owners`]), and
    /// `before` is where backups were last written or read.
    pub(crate) fn new(
        destination: Destination,
        format: BackupFormat,
        key: PathBuf,
        owners: Option<Owners>,
        before: Option<&str>,
    ) -> Result<Self> {
        let place = destination.to_string();
        let is_known = Arc::new(AtomicBool::new(before == Some(&place)));
        let folder = destination.folder().map(Path::to_owned);
        if folder.is_none() && format == BackupFormat::Archive {
            return Err(Error::config(
                "backup_destination",
                format!(
                    "{destination} is no folder, which archives need: use the repository format"
                ),
            ));
        }
        let archives = folder.map(|folder| Arc::new(archive::Archives::new(folder, owners)));
        let is_used = format == BackupFormat::Repository;
        let repository = Arc::new(repository::Stored::new(destination, key, is_used, owners));
        Ok(Self { format, archives, repository, place, is_known })
    }

    /// Whether backups were last written or read elsewhere.
    pub(crate) fn are_elsewhere(&self, before: Option<&str>) -> bool {
        before.is_some_and(|before| before != self.place)
    }

    /// Where they are, once there have been some; only the first time.
    pub(crate) fn newly_used(&self) -> Option<String> {
        (!self.is_known.swap(true, Ordering::Relaxed)).then(|| self.place.clone())
    }

    /// Fails if there were backups here and nothing is there now, as where what should be mounted
    /// is not: what would be written would be out of sight later, and what is looked for is not
    /// gone.
    fn check_there(&self) -> Result<()> {
        if !self.is_known.load(Ordering::Relaxed) || self.repository.is_there()? {
            return Ok(());
        }
        let is_there = self.archives.as_ref().is_some_and(|archives| archives.are_there());
        is_there.then_some(()).ok_or_else(|| Error::DestinationGone { place: self.place.clone() })
    }

    /// That the destination can be written to, where that is a folder: a bucket is not asked.
    pub(crate) fn check(&self) -> Result<()> {
        self.archives.as_ref().map_or(Ok(()), |archives| archives.check())
    }

    fn formats(&self) -> impl Iterator<Item = &dyn Format> {
        let archives = self.archives.as_deref().map(|it| it as &dyn Format);
        archives.into_iter().chain([&*self.repository as &dyn Format])
    }

    fn of(&self, format: BackupFormat) -> Result<&dyn Format> {
        let found = match format {
            BackupFormat::Archive => self.archives.as_deref().map(|it| it as &dyn Format),
            BackupFormat::Repository => Some(&*self.repository as &dyn Format),
        };
        found.ok_or(Error::NoDestination)
    }

    /// Writes and verifies a backup.
    pub(crate) fn write(&self, saving: Saving<'_>) -> Result<Backup> {
        self.check_there()?;
        // The newest is the one that was written last, whatever the clock says. Each format sees
        // to that for its own; if the other one cannot be read now, it has no say.
        let other = match self.format {
            BackupFormat::Archive => BackupFormat::Repository,
            BackupFormat::Repository => BackupFormat::Archive,
        };
        let there = self.of(other).and_then(|format| format.list(Some(saving.site.id)));
        let there = there.unwrap_or_default().into_iter();
        let latest = there.map(|backup| SystemTime::from(backup.taken_at)).max();
        let next = latest.map_or(saving.now, |latest| latest + Duration::from_secs(1));
        let saving = Saving { now: saving.now.max(next), ..saving };
        self.of(self.format)?.write(saving)
    }

    /// Puts a backup's files into `home`, where they are then as a session's are; with `only`,
    /// at least these paths there.
    pub(crate) fn restore(
        &self,
        backup: &Backup,
        home: &Path,
        only: &[PathBuf],
        counter: &Counter,
    ) -> Result<()> {
        self.of(backup.format)?.restore(backup, home, only, counter)
    }

    /// A backup as an archive that can be restored anywhere. `staging` is an empty folder.
    pub(crate) fn open(
        &self,
        session: Uuid,
        name: &str,
        staging: &Path,
        owners: Option<Owners>,
        interrupted: &AtomicBool,
    ) -> Result<File> {
        let backup = self.find(session, name)?;
        let path = if let Some(path) = backup.path {
            path
        } else {
            let home = staging.join("session");
            self.of(backup.format)?.restore(&backup, &home, &[], &Counter::default())?;
            let site = Site::in_folder(session, home);
            pack(&site, staging, owners, jiff::Timestamp::now(), interrupted)?.path
        };
        File::open(&path).map_err(|source| Error::volume("read", &path, source))
    }

    /// A backup of a session by its name.
    pub(crate) fn find(&self, session: Uuid, name: &str) -> Result<Backup> {
        let found = self.list(Some(session))?.into_iter().find(|backup| backup.name == name);
        found.ok_or_else(|| Error::NoBackup { session, name: Some(name.to_owned()) })
    }

    /// What can be restored of a session, or of all, newest first.
    pub(crate) fn list(&self, session: Option<Uuid>) -> Result<Vec<Backup>> {
        self.check_there()?;
        let mut all = Vec::new();
        for format in self.formats() {
            all.extend(format.list(session)?);
        }
        all.sort_by(|a, b| b.taken_at.cmp(&a.taken_at).then_with(|| a.name.cmp(&b.name)));
        Ok(all)
    }

    /// Whether all that is there is what was written; with `read_data` every byte of it.
    pub(crate) fn verify(
        &self,
        read_data: bool,
        counter: &Counter,
        interrupted: &AtomicBool,
    ) -> Result<Report> {
        let mut report = Report::default();
        for format in self.formats() {
            let part = format.verify(read_data, counter, interrupted)?;
            report.backups += part.backups;
            report.bytes += part.bytes;
            report.findings.extend(part.findings);
        }
        Ok(report)
    }

    /// Deletes backups. Killed in between, it has deleted some of them, each as a whole.
    pub(crate) fn forget(&self, backups: &[Backup]) -> Result<()> {
        for format in [BackupFormat::Archive, BackupFormat::Repository] {
            let some: Vec<Backup> =
                backups.iter().filter(|backup| backup.format == format).cloned().collect();
            if !some.is_empty() {
                self.of(format)?.forget(&some)?;
            }
        }
        Ok(())
    }

    /// Gives back the room that only deleted backups took, as far as no other host can still be
    /// counting on it: a part of it is given back a day later.
    pub(crate) fn compact(&self) -> Result<()> {
        self.formats().try_for_each(Format::compact)
    }

    /// Deletes what killed processes left half-written.
    pub(crate) fn sweep(&self) -> Result<()> {
        self.formats().try_for_each(Format::sweep)
    }
}
