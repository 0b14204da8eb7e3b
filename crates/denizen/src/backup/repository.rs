//! Backups in a repository, which is opened when it is first needed.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use denizen_archive::Owners;
use denizen_repository::{Counter, Destination, Entry, Report, Repository, Source};
use parking_lot::Mutex;
use uuid::Uuid;

use super::archive::{are_root_changes, own_root_changes};
use super::{Backup, BackupFormat, Format, Saving};
use crate::error::{Error, Result};
use crate::isolation::Site;

#[derive(Debug)]
pub(super) struct Stored {
    destination: Destination,
    key: PathBuf,
    /// Whether it is made where there is none.
    is_used: bool,
    owners: Option<Owners>,
    open: Mutex<Option<Arc<Repository>>>,
}

impl Stored {
    pub(super) fn new(
        destination: Destination,
        key: PathBuf,
        is_used: bool,
        owners: Option<Owners>,
    ) -> Self {
        Self { destination, key, is_used, owners, open: Mutex::new(None) }
    }

    /// The repository; none if there is none and it is not to be made.
    fn repository(&self) -> Result<Option<Arc<Repository>>> {
        let mut open = self.open.lock();
        if let Some(repository) = &*open {
            return Ok(Some(repository.clone()));
        }
        let is_there = Repository::exists(&self.destination)?;
        if !is_there && !self.is_used {
            return Ok(None);
        }
        let password = self.password(is_there)?;
        let repository = Arc::new(Repository::open(&self.destination, &password)?);
        Ok(Some(open.insert(repository).clone()))
    }

    /// Whether there is one. Looks if it is not open.
    pub(super) fn is_there(&self) -> Result<bool> {
        Ok(self.open.lock().is_some() || Repository::exists(&self.destination)?)
    }

    fn there(&self) -> Result<Arc<Repository>> {
        self.repository()?.ok_or(Error::NoDestination)
    }

    /// The password in the key file, which is made for a new repository.
    fn password(&self, is_there: bool) -> Result<String> {
        let failed = |source| Error::volume("read the backup key in", &self.key, source);
        match fs::read_to_string(&self.key) {
            Ok(text) if !text.trim().is_empty() => {
                let mode = fs::metadata(&self.key).map_err(failed)?.permissions().mode();
                if mode & 0o077 != 0 {
                    tracing::warn!(key = %self.key.display(), "others can read the backup key");
                }
                return Ok(text.trim_end_matches(['\n', '\r']).to_owned());
            }
            Ok(_) => {
                let empty = std::io::Error::other("it is empty");
                return Err(failed(empty));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !is_there => {}
            Err(source) => return Err(failed(source)),
        }
        let password = format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
        let make = || {
            let folder = self.key.parent().filter(|it| !it.as_os_str().is_empty());
            let folder = folder.unwrap_or(Path::new("."));
            fs::create_dir_all(folder)?;
            // Whole and durable before anything is locked with it; nobody else can read it.
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            file.write_all(format!("{password}\n").as_bytes())?;
            file.as_file().sync_all()?;
            // Not in the place of one that somebody was first with.
            file.persist_noclobber(&self.key)?;
            fs::File::open(folder)?.sync_all()
        };
        make().map_err(|source| Error::volume("make a backup key in", &self.key, source))?;
        tracing::info!(key = %self.key.display(), "made a backup key: keep a copy of it elsewhere");
        Ok(password)
    }
}

impl Format for Stored {
    fn write(&self, saving: Saving<'_>) -> Result<Backup> {
        let Saving { site, name, now, counter, interrupted } = saving;
        let now = jiff::Timestamp::try_from(now).unwrap_or_else(|_| jiff::Timestamp::now());
        let changes = site.root_changes();
        let root = changes.is_dir().then_some(changes.as_path());
        let owners = self.owners;
        let source = Source { session: site.id, name, volume: &site.volume, root, owners };
        let written = self.there()?.write(source, now, counter, interrupted)?;
        for skipped in &written.skipped {
            tracing::warn!(session = %site.id, ?skipped, "not in the backup");
        }
        Ok(told(written.entry))
    }

    fn restore(
        &self,
        backup: &Backup,
        home: &Path,
        only: &[PathBuf],
        counter: &Counter,
    ) -> Result<()> {
        let (never, session) = (AtomicBool::new(false), backup.session);
        let restored =
            self.there()?.restore(&backup.name, home, only, self.owners, counter, &never);
        let restored = restored.map_err(|error| match error {
            denizen_repository::Error::NoPath { path, .. } => {
                let problem = format!("the backup {} has none", backup.name);
                Error::NotPutBack { session, path, problem }
            }
            error => error.into(),
        })?;
        for warning in &restored.warnings {
            tracing::warn!(backup = %backup.name, %warning, "restored with a loss");
        }
        let into = Site::in_folder(backup.session, home.to_owned());
        let changes = into.root_changes();
        if only.is_empty() && changes.exists() {
            if !are_root_changes(&changes) {
                let problem = "what it has as changes of a root is none".to_owned();
                let (place, backup) = (self.destination.to_string(), backup.name.clone());
                return Err(denizen_repository::Error::Damaged { place, backup, problem }.into());
            }
            own_root_changes(&changes)?;
        }
        Ok(())
    }

    fn list(&self, session: Option<Uuid>) -> Result<Vec<Backup>> {
        match self.repository()? {
            Some(repository) => Ok(repository.list(session)?.into_iter().map(told).collect()),
            None => Ok(Vec::new()),
        }
    }

    fn verify(
        &self,
        read_data: bool,
        counter: &Counter,
        interrupted: &AtomicBool,
    ) -> Result<Report> {
        match self.repository()? {
            Some(repository) => Ok(repository.verify(read_data, counter, interrupted)?),
            None => Ok(Report::default()),
        }
    }

    fn forget(&self, backups: &[Backup]) -> Result<()> {
        let names: Vec<String> = backups.iter().map(|backup| backup.name.clone()).collect();
        Ok(self.there()?.forget(&names)?)
    }

    fn compact(&self) -> Result<()> {
        self.repository()?.map_or(Ok(()), |repository| Ok(repository.prune()?))
    }

    fn sweep(&self) -> Result<()> {
        Ok(Repository::sweep_at(&self.destination)?)
    }
}

fn told(entry: Entry) -> Backup {
    Backup {
        name: entry.id,
        session: entry.session,
        session_name: entry.name,
        host: Some(entry.host),
        taken_at: entry.taken_at,
        format: BackupFormat::Repository,
        bytes: entry.added,
        size: Some(entry.bytes),
        path: None,
    }
}
