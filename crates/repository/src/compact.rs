//! Removes what no backup needs, in two steps: it is marked in the index, and removed when the mark
//! is old enough that no backup under way can count on it any more.
//!
//! The engine does both, and writes anew what is partly needed. Here is what it leaves out: what
//! killed writers have left that no index names, marks whose time cannot be right, and repositories
//! with a damaged backup, at which it gives up. It must never remove what was not marked a while
//! before by somebody's clock, nor what a backup may need of which not all can be read.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use rustic_core::jiff::{SignedDuration, Span, Timestamp};
use rustic_core::repofile::{IndexFile, IndexPack};
use rustic_core::{BlobId, FileType, Id, PruneOptions};

use crate::backend::name;
use crate::error::{Error, Result};
use crate::mend::Read;
use crate::{MARKED, Repository};

/// By how much a mark may be older than it has to be before it is doubted: a day, in which
/// somebody compacts who does so daily.
const BELIEVED: SignedDuration = SignedDuration::from_secs(MARKED.as_secs().cast_signed());

/// A backup of which not all folders can be read.
struct Unreadable {
    backup: String,
    problem: String,
    pack: Option<Id>,
}

/// When a mark is to have been made, if that is another time than it says.
///
/// A clock that was years ahead would keep what it has marked for years; one that was years behind
/// would have it removed at once, as would one that is ahead now. So what is of the future counts
/// from now on, and what is very old too: once. It then is of a whole second, which no other mark
/// is.
fn corrected(at: Option<Timestamp>, now: Timestamp, wait: SignedDuration) -> Option<Timestamp> {
    let Some(at) = at.filter(|at| *at <= now) else { return Some(now) };
    let oldest = wait.saturating_add(BELIEVED);
    let is_doubtful = now.duration_since(at) > oldest && at.subsec_nanosecond() != 0;
    is_doubtful.then(|| Timestamp::from_second(now.as_second()).unwrap_or(now))
}

impl Repository {
    /// All of it, with a time between the steps.
    pub(crate) fn compact(&self, now: Timestamp, wait: SignedDuration) -> Result<()> {
        self.mark(now, wait)?;
        let removed = self.with("compact", &Arc::default(), |engine| {
            let keep = Span::new().try_seconds(wait.as_secs()).ok();
            let options = PruneOptions::default();
            let options = keep.iter().fold(options, |options, keep| options.keep_delete(*keep));
            let plan = engine.prune_plan(&options)?;
            engine.prune(&options, plan)
        });
        let Err(error) = removed else { return Ok(()) };
        tracing::warn!(%error, "the backup repository is compacted as far as it can be read");
        self.give_back(now, wait)
    }

    /// The index, file by file.
    fn indexes(&self) -> Result<Vec<(String, IndexFile)>> {
        let mut again = true;
        'all: loop {
            let mut indexes = Vec::new();
            for file in self.names(FileType::Index)? {
                match self.content(&file)? {
                    Read::Sound(index) => indexes.push((file, index)),
                    Read::Gone => {}
                    Read::Altered if again => {
                        self.mend(&HashSet::new())?;
                        again = false;
                        continue 'all;
                    }
                    Read::Altered => {
                        let (action, place) = ("compact", self.place());
                        let problem = format!("{file} is altered");
                        return Err(Error::Engine { action, place, problem });
                    }
                }
            }
            return Ok(indexes);
        }
    }

    /// Marks what no index names, and corrects marks.
    fn mark(&self, now: Timestamp, wait: SignedDuration) -> Result<()> {
        let indexes = self.indexes()?;
        let known: HashSet<Id> = indexes
            .iter()
            .flat_map(|(_, index)| index.packs.iter().chain(&index.packs_to_delete))
            .map(|pack| *pack.id)
            .collect();
        // After the index. Whoever still writes will name what is marked here, and the mark is void.
        let packs = self.files.list(FileType::Pack.dirname());
        let packs = packs.map_err(|error| Error::Engine {
            action: "list what is in",
            place: self.place(),
            problem: error.to_string(),
        })?;
        let unnamed = packs.into_iter().filter_map(|(path, size)| {
            let id: Id = path.rsplit('/').next()?.parse().ok()?;
            let is_unnamed = name(FileType::Pack, &id) == path && !known.contains(&id);
            let size = u32::try_from(size).ok();
            is_unnamed.then(|| IndexPack {
                id: id.into(),
                size,
                time: Some(now),
                blobs: Vec::new(),
            })
        });
        let marks = IndexFile { packs_to_delete: unnamed.collect(), ..IndexFile::default() };
        if !marks.packs_to_delete.is_empty() {
            self.write_index(&marks)?;
        }
        for (file, mut index) in indexes {
            let mut is_changed = false;
            for pack in &mut index.packs_to_delete {
                if let Some(at) = corrected(pack.time, now, wait) {
                    pack.time = Some(at);
                    is_changed = true;
                }
            }
            if is_changed {
                self.write_index(&index)?;
                self.discard(&file)?;
            }
        }
        Ok(())
    }

    /// The same as the engine, but for files that are partly needed, where a backup is damaged:
    /// what is left of that stays.
    fn give_back(&self, now: Timestamp, wait: SignedDuration) -> Result<()> {
        // Before the backups are listed: whoever writes one now does not count on what is marked.
        let mut indexes = self.indexes()?;
        let mut needed = self.needed()?;
        if let Err(unreadable) = &needed {
            // It may be there, but not in the index.
            if self.mend(&unreadable.pack.into_iter().collect())?.changed {
                (indexes, needed) = (self.indexes()?, self.needed()?);
            }
        }
        let needed = needed.map_err(|Unreadable { backup, problem, .. }| Error::InTheWay {
            place: self.place(),
            backup,
            problem,
        })?;
        let named: HashSet<Id> =
            indexes.iter().flat_map(|(_, index)| &index.packs).map(|pack| *pack.id).collect();
        let (mut old, mut removed) = (Vec::new(), Vec::new());
        for (file, index) in indexes {
            let mut is_changed = false;
            let mut new = IndexFile { supersedes: index.supersedes, ..IndexFile::default() };
            let is_needed = |pack: &IndexPack| pack.blobs.iter().any(|it| needed.contains(&it.id));
            for mut pack in index.packs {
                if is_needed(&pack) {
                    new.packs.push(pack);
                } else {
                    is_changed = true;
                    pack.time = Some(now);
                    new.packs_to_delete.push(pack);
                }
            }
            for pack in index.packs_to_delete {
                let is_old = pack.time.is_some_and(|at| now.duration_since(at) >= wait);
                let is_named = named.contains(&*pack.id);
                is_changed |= is_old || is_named || is_needed(&pack);
                match pack {
                    _ if is_named => {}
                    pack if is_needed(&pack) => new.packs.push(pack),
                    pack if is_old => removed.push(pack.id),
                    pack => new.packs_to_delete.push(pack),
                }
            }
            if is_changed {
                if !new.packs.is_empty() || !new.packs_to_delete.is_empty() {
                    self.write_index(&new)?;
                }
                old.push(file);
            }
        }
        // As they name what is removed then.
        old.iter().try_for_each(|file| self.discard(file))?;
        removed.iter().try_for_each(|pack| self.discard(&name(FileType::Pack, pack)))
    }

    /// All that the backups need, there or not. A file of a backup that is altered as a whole needs
    /// nothing that anybody could find: should it be sound the next time, all is still there.
    fn needed(&self) -> Result<std::result::Result<HashSet<BlobId>, Unreadable>> {
        let pieces = self.pieces()?;
        let mut needed = HashSet::new();
        for snapshot in self.snapshots()? {
            let mut way = vec![snapshot.tree];
            while let Some(id) = way.pop() {
                if !needed.insert(BlobId::from(id)) {
                    continue;
                }
                let tree = match pieces.tree(&id) {
                    Ok(tree) => tree,
                    Err(problem) => {
                        let backup = snapshot.id.to_hex().as_str().to_owned();
                        let (problem, pack) = (problem.text, problem.pack);
                        return Ok(Err(Unreadable { backup, problem, pack }));
                    }
                };
                for node in tree.nodes {
                    way.extend(node.subtree);
                    needed.extend(node.content.iter().flatten().map(|id| BlobId::from(*id)));
                }
            }
        }
        Ok(Ok(needed))
    }

    fn discard(&self, file: &str) -> Result<()> {
        match self.files.remove(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::Engine {
                action: "compact",
                place: self.place(),
                problem: format!("cannot remove {file}: {error}"),
            }),
            // Another host was faster.
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::sync::atomic::AtomicBool;

    use uuid::Uuid;

    use super::*;
    use crate::{Destination, Entry, Source};

    const YEARS: SignedDuration = SignedDuration::from_hours(24 * 365 * 5);
    const DAY: SignedDuration = SignedDuration::from_hours(24);

    fn write(repository: &Repository, session: u128, volume: &Path) -> Entry {
        let session = Uuid::from_u128(session);
        let source = Source { session, name: None, volume, root: None, owners: None };
        let never = AtomicBool::new(false);
        repository.write(source, Timestamp::now(), &Arc::default(), &never).unwrap().entry
    }

    /// A repository in which something is marked.
    fn bed() -> (tempfile::TempDir, Repository) {
        let folder = tempfile::tempdir().unwrap();
        let place = Destination::Folder(folder.path().join("repository"));
        let repository = Repository::open(&place, "password").unwrap();
        let volume = folder.path().join("volume");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("kept"), "kept").unwrap();
        write(&repository, 1, &volume);
        fs::write(volume.join("needless"), "needless").unwrap();
        let needless = write(&repository, 2, &volume);
        repository.forget(&[needless.id]).unwrap();
        repository.prune().unwrap();
        assert!(!marks(&repository).is_empty());
        (folder, repository)
    }

    fn marks(repository: &Repository) -> Vec<Timestamp> {
        let indexes = repository.indexes().unwrap();
        let marks = indexes.iter().flat_map(|(_, index)| &index.packs_to_delete);
        marks.map(|pack| pack.time.unwrap()).collect()
    }

    fn set_marks(repository: &Repository, at: Timestamp) {
        for (file, mut index) in repository.indexes().unwrap() {
            index.packs_to_delete.iter_mut().for_each(|pack| pack.time = Some(at));
            repository.write_index(&index).unwrap();
            repository.discard(&file).unwrap();
        }
    }

    fn packs(repository: &Repository) -> usize {
        repository.files.list("data").unwrap().len()
    }

    #[test]
    fn a_mark_from_the_future_counts_from_now_on() {
        let (_folder, repository) = bed();
        let before = packs(&repository);
        set_marks(&repository, Timestamp::now() + YEARS);
        repository.prune().unwrap();
        assert!(marks(&repository).iter().all(|at| *at <= Timestamp::now()));
        assert_eq!(packs(&repository), before);
        // A day later.
        set_marks(&repository, marks(&repository)[0] - DAY);
        repository.prune().unwrap();
        assert!(packs(&repository) < before);
        assert!(marks(&repository).is_empty());
    }

    #[test]
    fn a_mark_that_is_years_old_counts_once_more() {
        let (_folder, repository) = bed();
        let before = packs(&repository);
        set_marks(&repository, marks(&repository)[0] - YEARS);
        for _ in 0..2 {
            repository.prune().unwrap();
            assert_eq!(packs(&repository), before, "it may have been made a moment ago");
        }
        // However long it is until the next time.
        set_marks(&repository, marks(&repository)[0] - YEARS);
        repository.prune().unwrap();
        assert!(packs(&repository) < before);
    }

    #[test]
    fn a_mark_of_yesterday_is_believed() {
        let (_folder, repository) = bed();
        let before = packs(&repository);
        set_marks(&repository, marks(&repository)[0] - DAY);
        repository.prune().unwrap();
        assert!(packs(&repository) < before);
    }
}
