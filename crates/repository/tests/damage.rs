//! What is damaged is found, named and written anew, and never restored as something else.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use denizen_repository::{Counter, Entry, Error, Report, Repository};
use support::*;
use uuid::Uuid;

const SESSION: Uuid = Uuid::from_u128(1);
const OTHER: Uuid = Uuid::from_u128(2);

struct Bed {
    bench: Bench,
    other: PathBuf,
    memory: Arc<Memory>,
    repository: Repository,
    first: Entry,
    second: Entry,
    others: Entry,
}

/// Two backups of one session, the second with more in it, and one of another session.
fn bed() -> Bed {
    let bench = Bench::new();
    let memory = Arc::new(Memory::default());
    let repository = Repository::open_in(memory.clone(), PASSWORD).unwrap();
    fs::create_dir(bench.volume.join("folder")).unwrap();
    fs::write(bench.volume.join("folder/first"), Random::new(1).bytes(200_000)).unwrap();
    let first = write(&repository, SESSION, &bench.volume).unwrap().entry;
    fs::write(bench.volume.join("second"), Random::new(2).bytes(200_000)).unwrap();
    let second = write(&repository, SESSION, &bench.volume).unwrap().entry;
    let other = bench.dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("third"), Random::new(3).bytes(200_000)).unwrap();
    let others = write(&repository, OTHER, &other).unwrap().entry;
    Bed { bench, other, memory, repository, first, second, others }
}

impl Bed {
    /// The files that have come with a backup, the largest first.
    fn came(&self, folder: &str, number: usize) -> Vec<String> {
        // Those of the fixture are of three sizes.
        let mut names = self.memory.names(folder);
        let files = self.memory.files.lock().unwrap();
        names.sort_by_key(|name| std::cmp::Reverse(files[name].len()));
        names.into_iter().take(number).collect()
    }

    fn verify(&self) -> Report {
        self.repository.verify(true, &Counter::default(), &NEVER).unwrap()
    }

    /// A restore is right or leaves nothing.
    fn restores(&self, entry: &Entry, volume: &std::path::Path, exact: bool) -> bool {
        let home = tempfile::tempdir().unwrap();
        let into = home.path().join("home");
        match restore(&self.repository, &entry.id, &into) {
            Ok(()) => {
                if exact {
                    compare(volume, &into.join("volume"));
                }
                true
            }
            Err(error) => {
                let text = error.to_string();
                assert!(!text.contains('\n') && text.contains(&entry.id), "{text}");
                assert!(!into.exists());
                false
            }
        }
    }

    /// Whatever was, the next backups of both are whole, and so is the repository once what
    /// cannot be mended is forgotten.
    fn next_is_whole(&self) {
        for (session, volume) in [(SESSION, &self.bench.volume), (OTHER, &self.other)] {
            let entry = write(&self.repository, session, volume).unwrap().entry;
            comes_back(&self.repository, &entry, volume);
        }
        let damaged: Vec<_> =
            self.verify().findings.into_iter().filter_map(|it| it.backup).collect();
        for entry in [&self.second, &self.others] {
            assert!(!damaged.contains(&entry.id), "what it held was written anew");
        }
        for id in damaged {
            self.memory.lose(&format!("snapshots/{id}"));
        }
        assert!(self.verify().findings.is_empty());
        let zero = std::time::Duration::ZERO;
        self.repository.prune_after(zero).unwrap();
        self.repository.prune_after(zero).unwrap();
        assert!(self.verify().findings.is_empty());
        assert!(self.restores(&self.second, &self.bench.volume, true));
    }
}

#[test]
fn every_flip_of_a_file_with_pieces_is_found() {
    for seed in 0..20 {
        let bed = bed();
        let random = &mut Random::new(seed);
        let packs = bed.memory.names("data/");
        let pack = random.pick(&packs.iter().map(String::as_str).collect::<Vec<_>>()).to_owned();
        bed.memory.change(&pack, |bytes| {
            let at = usize::try_from(random.below(bytes.len() as u64)).unwrap();
            bytes[at] ^= 1 << random.below(8);
        });
        for (entry, volume) in [(&bed.second, &bed.bench.volume), (&bed.others, &bed.other)] {
            bed.restores(entry, volume, true);
        }
        let report = bed.verify();
        for finding in &report.findings {
            assert!(finding.problem.contains(&pack), "{finding:?}");
        }
        bed.next_is_whole();
    }
}

#[test]
fn a_check_names_the_damaged_backups_and_a_sound_one() {
    let bed = bed();
    // What only the second one needs: the newest file of its size but one.
    let packs = bed.memory.names("data/");
    let needed = packs.iter().find(|pack| {
        let copy = bed.memory.copy();
        copy.lose(pack);
        let there = bed.repository.through(copy);
        let into = tempfile::tempdir().unwrap();
        restore(&there, &bed.first.id, &into.path().join("a")).is_ok()
            && restore(&there, &bed.second.id, &into.path().join("b")).is_err()
            && bed.memory.files.lock().unwrap()[*pack].len() > 100_000
    });
    bed.memory.lose(needed.unwrap());
    let report = bed.verify();
    assert_eq!(report.backups, 3);
    assert_eq!(report.findings.len(), 1, "{report:?}");
    let finding = &report.findings[0];
    assert_eq!(finding.backup, Some(bed.second.id.clone()));
    assert_eq!(finding.session, Some(SESSION));
    assert_eq!(finding.instead, Some(bed.first.id.clone()));
    assert!(finding.problem.contains("is missing"), "{finding:?}");
    assert!(!bed.restores(&bed.second, &bed.bench.volume, true));
    assert!(bed.restores(&bed.first, &bed.bench.volume, false));
    bed.next_is_whole();
}

#[test]
fn what_is_left_of_a_damaged_file_is_kept() {
    // The other session is gone from its host: what it had beside the damage must not be lost.
    let bench = Bench::new();
    let memory = Arc::new(Memory::default());
    let repository = Repository::open_in(memory.clone(), PASSWORD).unwrap();
    for number in 0..5 {
        fs::write(bench.volume.join(number.to_string()), Random::new(number).bytes(100_000))
            .unwrap();
    }
    let entry = write(&repository, SESSION, &bench.volume).unwrap().entry;
    // The second time, that to which the rest of the first was copied: as long as the first has not
    // been removed, what is lost again is found there.
    for (damage, left) in [(0, 4), (1, 4)] {
        let mut packs: Vec<_> = {
            let files = memory.files.lock().unwrap();
            files.iter().map(|(name, content)| (content.len(), name.clone())).collect()
        };
        packs.sort_unstable();
        let pack = &packs[packs.len() - 1 - damage].1;
        memory.change(pack, |bytes| match damage {
            0 => bytes[250_000] ^= 1,
            _ => bytes.truncate(320_000),
        });
        let report = repository.verify(true, &Counter::default(), &NEVER).unwrap();
        assert_eq!(report.findings.len(), 1, "{report:?}");
        let restored = (0..5).filter(|number| {
            let home = tempfile::tempdir().unwrap();
            let only = format!("volume/{number}");
            let counter = Counter::default();
            let into = home.path().join("home");
            repository.restore(&entry.id, &into, &[only.into()], None, &counter, &NEVER).is_ok()
        });
        assert_eq!(restored.count(), left);
    }
    let next = write(&repository, OTHER, &bench.volume).unwrap().entry;
    comes_back(&repository, &next, &bench.volume);
    comes_back(&repository, &entry, &bench.volume);
}

#[test]
fn an_index_that_is_lost_or_damaged_is_made_again() {
    for damage in 0..3 {
        let bed = bed();
        for index in bed.memory.names("index/") {
            match damage {
                0 => bed.memory.lose(&index),
                1 => bed.memory.change(&index, |bytes| bytes.truncate(20)),
                _ => bed.memory.change(&index, |bytes| bytes[30] ^= 1),
            }
        }
        assert!(bed.restores(&bed.others, &bed.other, true));
        assert!(bed.restores(&bed.second, &bed.bench.volume, true));
        assert!(bed.verify().findings.is_empty());
        bed.next_is_whole();
    }
}

#[test]
fn a_cut_file_or_snapshot_is_found() {
    let damaged = |bed: &Bed, folder: &str| {
        let name = bed.came(folder, 1).remove(0);
        bed.memory.change(&name, |bytes| bytes.truncate(bytes.len() / 2));
        name
    };
    let first = bed();
    damaged(&first, "data/");
    assert!(!first.verify().findings.is_empty());
    first.next_is_whole();
    let second = bed();
    let snapshot = damaged(&second, "snapshots/");
    let id = snapshot.rsplit('/').next().unwrap();
    let report = second.verify();
    assert_eq!(report.findings.len(), 1, "{report:?}");
    assert_eq!(report.findings[0].backup.as_deref(), Some(id));
    // It hides none of the others.
    let again = second.repository.through(second.memory.clone());
    assert_eq!(again.list(None).unwrap().len(), 2);
    let entry = write(&again, SESSION, &second.bench.volume).unwrap().entry;
    comes_back(&again, &entry, &second.bench.volume);
}

#[test]
fn what_killed_backups_leave_is_removed() {
    let bed = bed();
    fs::write(bed.bench.volume.join("more"), Random::new(9).bytes(300_000)).unwrap();
    let before = bed.memory.names("data/").len();
    // After its first file with pieces.
    let calls = {
        let copy = bed.memory.copy();
        write(&bed.repository.through(copy.clone()), SESSION, &bed.bench.volume).unwrap();
        copy.calls()
    };
    let left = (0..calls).find(|at| {
        bed.memory.plan(Some((*at, Fault::KillAfter)));
        let there = bed.repository.through(bed.memory.clone());
        let _ = write(&there, SESSION, &bed.bench.volume);
        bed.memory.plan(None);
        bed.memory.names("data/").len() > before
    });
    assert!(left.is_some());
    let orphans = bed.memory.names("data/").len() - before;
    assert!(orphans > 0);
    let zero = std::time::Duration::ZERO;
    bed.repository.prune_after(zero).unwrap();
    bed.repository.prune_after(zero).unwrap();
    assert!(bed.memory.names("data/").len() <= before, "what is nobody's is gone");
    assert!(bed.verify().findings.is_empty());
}

/// The file with pieces that only the second backup needs: of folders, or of files.
fn needed_by_the_second(bed: &Bed, folders: bool) -> String {
    let found = bed.memory.names("data/").into_iter().find(|pack| {
        let copy = bed.memory.copy();
        copy.lose(pack);
        let there = bed.repository.through(copy);
        let into = tempfile::tempdir().unwrap();
        restore(&there, &bed.first.id, &into.path().join("a")).is_ok()
            && restore(&there, &bed.second.id, &into.path().join("b")).is_err()
            && (bed.memory.files.lock().unwrap()[pack].len() < 100_000) == folders
    });
    found.unwrap()
}

/// Both steps.
fn compact(repository: &Repository) -> Result<(), Error> {
    repository.prune_after(std::time::Duration::ZERO)?;
    repository.prune_after(std::time::Duration::ZERO)
}

fn size(memory: &Memory) -> usize {
    let files = memory.files.lock().unwrap();
    files.iter().filter(|(name, _)| name.starts_with("data/")).map(|(_, it)| it.len()).sum()
}

#[test]
fn a_damaged_backup_keeps_what_is_left_of_it_and_no_other_room() {
    for checked in [false, true] {
        let bed = bed();
        bed.memory.lose(&needed_by_the_second(&bed, false));
        if checked {
            assert_eq!(bed.verify().findings.len(), 1);
        }
        let before = size(&bed.memory);
        bed.repository.forget(&[bed.others.id.clone(), bed.first.id.clone()]).unwrap();
        bed.repository.prune().unwrap();
        assert_eq!(size(&bed.memory), before, "in two steps here too");
        compact(&bed.repository).unwrap();
        assert!(size(&bed.memory) < before - 200_000, "what the others had is given back");
        let home = tempfile::tempdir().unwrap();
        let part = |only: &str, into: &str| {
            let (into, counter) = (home.path().join(into), Counter::default());
            let only = [only.into()];
            bed.repository.restore(&bed.second.id, &into, &only, None, &counter, &NEVER)
        };
        part("volume/folder", "there").unwrap();
        part("volume/second", "gone").unwrap_err();
        // What was lost is written anew, and all is as it should be.
        let next = write(&bed.repository, SESSION, &bed.bench.volume).unwrap().entry;
        compact(&bed.repository).unwrap();
        comes_back(&bed.repository, &next, &bed.bench.volume);
        assert!(bed.restores(&bed.second, &bed.bench.volume, true));
        assert!(bed.verify().findings.is_empty());
    }
}

#[test]
fn what_a_backup_needs_that_cannot_be_read_is_not_guessed() {
    let bed = bed();
    bed.memory.lose(&needed_by_the_second(&bed, true));
    bed.repository.forget(&[bed.others.id.clone(), bed.first.id.clone()]).unwrap();
    let before = size(&bed.memory);
    let error = compact(&bed.repository).unwrap_err();
    let backup = bed.second.id.clone();
    assert!(matches!(&error, Error::InTheWay { backup: named, .. } if *named == backup), "{error}");
    assert_eq!(size(&bed.memory), before);
    write(&bed.repository, SESSION, &bed.bench.volume).unwrap();
    compact(&bed.repository).unwrap();
    assert!(size(&bed.memory) < before - 100_000);
    assert!(bed.restores(&bed.second, &bed.bench.volume, true));
    assert!(bed.verify().findings.is_empty());
}

#[test]
fn a_backup_of_which_nothing_can_be_read_is_in_nobodys_way() {
    let bed = bed();
    let before = size(&bed.memory);
    let file = format!("snapshots/{}", bed.others.id);
    let sound = bed.memory.files.lock().unwrap()[&file].clone();
    bed.memory.change(&file, |bytes| bytes[20] ^= 1);
    bed.repository.prune().unwrap();
    // It was altered on its way only.
    bed.memory.files.lock().unwrap().insert(file.clone(), sound);
    compact(&bed.repository).unwrap();
    assert!(bed.restores(&bed.others, &bed.other, true));
    bed.memory.change(&file, |bytes| bytes[20] ^= 1);
    let there = bed.repository.through(bed.memory.clone());
    compact(&there).unwrap();
    assert!(size(&bed.memory) < before - 100_000);
    assert!(bed.restores(&bed.second, &bed.bench.volume, true));
}
