//! Archives: each backup is one compressed tar file in a folder.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use denizen_archive::{Beside, Entry, Error as ArchiveError, Given, Owners};
use denizen_repository::{Counter, Finding, Report};
use uuid::Uuid;

use super::{Backup, BackupFormat, Format, Saving};
use crate::error::{Error, Result};
use crate::isolation::{RECORD, Site};

/// Says that a folder is for archives, also when the last of them was deleted.
const SIGN: &str = ".denizen";

#[derive(Debug)]
pub(super) struct Archives {
    folder: PathBuf,
    owners: Option<Owners>,
}

impl Archives {
    pub(super) fn new(folder: PathBuf, owners: Option<Owners>) -> Self {
        Self { folder, owners }
    }

    /// Whether there has been an archive at all.
    pub(super) fn are_there(&self) -> bool {
        self.folder.join(SIGN).exists()
            || denizen_archive::list(&self.folder, None).is_ok_and(|all| !all.is_empty())
    }

    /// That the folder can be written to.
    pub(super) fn check(&self) -> Result<()> {
        let failed = |source| Error::volume("write to", &self.folder, source);
        crate::config::probe(&self.folder).map_err(failed)
    }
}

impl Format for Archives {
    fn write(&self, saving: Saving<'_>) -> Result<Backup> {
        fs::create_dir_all(&self.folder)
            .map_err(|source| Error::volume("make the backup destination", &self.folder, source))?;
        let Saving { site, now, interrupted, .. } = saving;
        let now = jiff::Timestamp::try_from(now).unwrap_or_else(|_| jiff::Timestamp::now());
        let entry = pack(site, &self.folder, self.owners, now, interrupted)?;
        let sign = self.folder.join(SIGN);
        if !sign.exists()
            && let Err(error) = File::create(&sign)
        {
            // The archive itself is one, while it is there.
            tracing::warn!(sign = %sign.display(), %error, "cannot write");
        }
        Ok(told(entry))
    }

    /// It is one stream, and checked as a whole: all of it, whatever is wanted.
    fn restore(&self, backup: &Backup, home: &Path, _: &[PathBuf], _: &Counter) -> Result<()> {
        let path = self.folder.join(&backup.name);
        let file = File::open(&path).map_err(|source| match source.kind() {
            // Forgotten since it was looked for.
            std::io::ErrorKind::NotFound => {
                Error::NoBackup { session: backup.session, name: Some(backup.name.clone()) }
            }
            _ => Error::volume("read", &path, source),
        })?;
        let given = Given { file: &file, name: &path, limit: None };
        unpack_given(given, self.owners, home, &AtomicBool::new(false))
    }

    fn list(&self, session: Option<Uuid>) -> Result<Vec<Backup>> {
        match denizen_archive::list(&self.folder, session) {
            // The other format may be the one that is used.
            Err(ArchiveError::DestinationMissing { .. }) => Ok(Vec::new()),
            found => Ok(found?.into_iter().map(told).collect()),
        }
    }

    /// An archive is one stream: nothing can be said of it without reading it.
    fn verify(&self, _: bool, _: &Counter, interrupted: &AtomicBool) -> Result<Report> {
        let mut report = Report::default();
        // Newest first; what is found is told with the next sound one before it.
        let mut unsound: Vec<(Backup, String)> = Vec::new();
        let tell = |unsound: &mut Vec<(Backup, String)>, instead: Option<&Backup>| {
            let session = instead.map(|it| it.session);
            let told = unsound.extract_if(.., |(it, _)| session.is_none_or(|s| s == it.session));
            told.map(|(backup, problem)| Finding {
                session: Some(backup.session),
                backup: Some(backup.name),
                problem,
                instead: instead.map(|it| it.name.clone()),
            })
            .collect::<Vec<_>>()
        };
        let mut findings = Vec::new();
        for backup in self.list(None)? {
            if interrupted.load(std::sync::atomic::Ordering::Relaxed) {
                let path = self.folder.clone();
                return Err(ArchiveError::Cancelled { path }.into());
            }
            report.backups += 1;
            match denizen_archive::verify(&self.folder.join(&backup.name)) {
                Ok(_) => {
                    report.bytes += backup.bytes;
                    findings.extend(tell(&mut unsound, Some(&backup)));
                }
                Err(error @ (ArchiveError::Damaged { .. } | ArchiveError::Refused { .. })) => {
                    unsound.push((backup, error.to_string()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        findings.extend(tell(&mut unsound, None));
        report.findings = findings;
        Ok(report)
    }

    fn forget(&self, backups: &[Backup]) -> Result<()> {
        for backup in backups {
            let path = self.folder.join(&backup.name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::volume("delete", &path, error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn compact(&self) -> Result<()> {
        Ok(())
    }

    fn sweep(&self) -> Result<()> {
        if self.folder.exists() {
            denizen_archive::clean(&self.folder, None)?;
        }
        Ok(())
    }
}

fn told(entry: Entry) -> Backup {
    Backup {
        name: entry.id.to_string(),
        session: entry.session,
        session_name: None,
        host: None,
        taken_at: entry.taken_at,
        format: BackupFormat::Archive,
        bytes: entry.bytes,
        size: None,
        path: Some(entry.path),
    }
}

/// Writes an archive of a session's volume and root changes.
pub(crate) fn pack(
    site: &Site,
    destination: &Path,
    owners: Option<Owners>,
    now: jiff::Timestamp,
    interrupted: &AtomicBool,
) -> Result<Entry> {
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
    let (name, is_said) = match restored.beside {
        Beside::Nothing => return Ok(()),
        Beside::Named(name) => (name, true),
        Beside::Unsaid => (denizen_archive::BESIDE.into(), false),
    };
    let beside = into.volume.join(name);
    let failed = |source| Error::volume("restore", &beside, source);
    // The volume stays as it was saved, and may be closed to us as that.
    let was = fs::metadata(&into.volume).map_err(failed)?;
    let open = fs::Permissions::from_mode(was.permissions().mode() | 0o700);
    fs::set_permissions(&into.volume, open).map_err(failed)?;
    if are_root_changes(&beside) {
        own_root_changes(&beside)?;
        fs::rename(&beside, into.root_changes()).map_err(failed)?;
    } else if is_said {
        let detail = "what it has as changes of a root is none".to_owned();
        return Err(ArchiveError::Damaged { path: given.name.to_owned(), detail }.into());
    }
    let as_it_was = || {
        let times = fs::FileTimes::new().set_modified(was.modified()?);
        File::open(&into.volume)?.set_times(times)?;
        fs::set_permissions(&into.volume, was.permissions())
    };
    as_it_was().map_err(failed)
}

/// Makes the folder of root changes ours, and what it says of them: they are no session's, but
/// whoever wrote the backup may have numbered them as one's.
pub(super) fn own_root_changes(folder: &Path) -> Result<()> {
    let us = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let ours = |path: &Path| std::os::unix::fs::lchown(path, Some(us.0), Some(us.1));
    ours(folder)
        .and_then(|()| ours(&folder.join(RECORD)))
        .map_err(|source| Error::volume("restore", folder, source))
}

/// Whether this is what a session has beside its volume, not a folder of its own by that name:
/// real folders, and a file that says over what they go.
pub(super) fn are_root_changes(folder: &Path) -> bool {
    let is_folder = |path: &Path| fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    let record = folder.join(RECORD);
    let fits = |entry: fs::DirEntry| entry.path() == record || is_folder(&entry.path());
    is_folder(folder)
        && fs::symlink_metadata(&record).is_ok_and(|meta| meta.is_file())
        && fs::read_dir(folder).is_ok_and(|mut all| all.all(|entry| entry.is_ok_and(fits)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::{MetadataExt as _, symlink};
    use std::process::Command;

    use super::*;

    /// A folder that holds what changes of a root hold.
    fn like_root_changes(path: &Path, content: &str) {
        fs::create_dir_all(path.join("upper")).unwrap();
        fs::write(path.join(RECORD), "{}").unwrap();
        fs::write(path.join("upper/file"), content).unwrap();
    }

    fn site(folder: &Path, name: &str) -> Site {
        let site = Site::in_folder(Uuid::nil(), folder.join(name));
        fs::create_dir_all(&site.home).unwrap();
        site
    }

    fn content(root_changes: &Path) -> String {
        fs::read_to_string(root_changes.join("upper/file")).unwrap()
    }

    fn unpack(archive: &Path, into: &Site) -> Result<()> {
        let file = File::open(archive).unwrap();
        let given = Given { file: &file, name: archive, limit: None };
        unpack_given(given, None, &into.home, &AtomicBool::new(false))
    }

    fn packed(site: &Site) -> PathBuf {
        let now = jiff::Timestamp::now();
        pack(site, site.home.parent().unwrap(), None, now, &AtomicBool::new(false)).unwrap().path
    }

    #[test]
    fn nothing_of_a_session_is_left_out_for_its_name() {
        let own: [&dyn Fn(&Path); 3] = [
            &|path| like_root_changes(path, "its own"),
            &|path| fs::write(path, "its own").unwrap(),
            &|path| symlink("its own", path).unwrap(),
        ];
        for make in own {
            for has_root in [true, false] {
                let folder = tempfile::tempdir().unwrap();
                let one = site(folder.path(), "one");
                fs::create_dir(&one.volume).unwrap();
                make(&one.volume.join(".denizen"));
                if has_root {
                    like_root_changes(&one.root_changes(), "the root's");
                }
                fs::set_permissions(&one.volume, fs::Permissions::from_mode(0o500)).unwrap();
                let other = site(folder.path(), "other");
                unpack(&packed(&one), &other).unwrap();
                let never = AtomicBool::new(false);
                let differs = |one: &Path, other: &Path| {
                    denizen_archive::diff(Some(one), Some(other), &never).unwrap()
                };
                assert_eq!(differs(&one.volume, &other.volume), []);
                assert_eq!(other.root_changes().exists(), has_root);
                if has_root {
                    assert_eq!(differs(&one.root_changes(), &other.root_changes()), []);
                    assert_eq!(content(&other.root_changes()), "the root's");
                }
                let time = |site: &Site| {
                    let meta = fs::metadata(&site.volume).unwrap();
                    (meta.mtime(), meta.mtime_nsec())
                };
                assert_eq!(time(&one), time(&other));
            }
        }
    }

    /// Of before archives said what was beside the volume, which `tar` does not say either.
    #[test]
    fn an_archive_that_says_nothing_is_looked_into() {
        let folder = tempfile::tempdir().unwrap();
        let volume = folder.path().join("volume");
        like_root_changes(&volume.join(".denizen"), "the root's");
        fs::write(volume.join("file"), "its own").unwrap();
        let archive = folder.path().join("old.tar.zst");
        let mut tar = Command::new("tar");
        tar.arg("--zstd").arg("-cf").arg(&archive).arg("-C").arg(&volume).arg(".");
        assert!(tar.status().unwrap().success());
        let into = site(folder.path(), "into");
        unpack(&archive, &into).unwrap();
        assert_eq!(content(&into.root_changes()), "the root's");
        assert_eq!(fs::read_dir(&into.volume).unwrap().count(), 1);
    }

    #[test]
    fn what_is_said_to_be_beside_is_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let [volume, beside] = ["volume", "beside"].map(|name| folder.path().join(name));
        fs::create_dir(&volume).unwrap();
        fs::create_dir(&beside).unwrap();
        symlink("/etc", beside.join("upper")).unwrap();
        let source =
            denizen_archive::Source { volume: &volume, beside: Some(&beside), owners: None };
        let now = jiff::Timestamp::now();
        let never = AtomicBool::new(false);
        let written = denizen_archive::write(source, folder.path(), Uuid::nil(), now, &never);
        let into = site(folder.path(), "into");
        let error = unpack(&written.unwrap().entry.path, &into).unwrap_err();
        assert!(matches!(error, Error::Backup(ArchiveError::Damaged { .. })), "{error}");
        assert!(!into.root_changes().exists());
    }
}
