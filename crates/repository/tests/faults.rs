//! Every step of every operation fails in every way, or is the last before a kill -9. Whatever was
//! reported as backed up before comes back byte for byte, and the next backup is whole.
//!
//! `DENIZEN_REPOSITORY_FAULTS=100000` runs more of them.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use denizen_repository::{Counter, Entry, Repository};
use rustix::io::Errno;
use support::*;
use uuid::Uuid;

const FAULTS: [Fault; 7] = [
    Fault::Before(Errno::NOSPC),
    Fault::Before(Errno::IO),
    Fault::After(Errno::IO),
    Fault::Kill,
    Fault::KillAfter,
    Fault::Flip,
    Fault::Cut,
];
const SESSION: Uuid = Uuid::from_u128(1);
const OTHER: Uuid = Uuid::from_u128(2);

#[derive(Clone, Copy, Debug)]
enum Operation {
    /// A backup of what has changed.
    Changed,
    Unchanged,
    New,
    Forget,
    /// Both steps, with no time between them.
    Prune,
    Restore,
    Verify,
}

const OPERATIONS: [Operation; 7] = [
    Operation::Changed,
    Operation::Unchanged,
    Operation::New,
    Operation::Forget,
    Operation::Prune,
    Operation::Restore,
    Operation::Verify,
];

/// A repository with some backups, and what they are of.
struct Bed {
    memory: Arc<Memory>,
    repository: Repository,
    old: PathBuf,
    new: PathBuf,
    /// Of `old`, of both sessions; the first is that which is forgotten.
    entries: Vec<Entry>,
    _folder: tempfile::TempDir,
}

fn tree(path: &Path, random: &mut Random, old: Option<&Path>) {
    if let Some(old) = old {
        denizen_archive::copy(old, path, &NEVER).unwrap();
    } else {
        std::fs::create_dir_all(path.join("a/b")).unwrap();
        std::fs::create_dir_all(path.join("c")).unwrap();
        std::fs::write(path.join("a/same"), random.bytes(3000)).unwrap();
        std::os::unix::fs::symlink("same", path.join("a/link")).unwrap();
    }
    std::fs::write(path.join("a/b/file"), random.bytes(2000)).unwrap();
    std::fs::write(path.join("c/other"), random.bytes(1 << 20 | 5)).unwrap();
}

fn bed(seed: u64) -> Bed {
    let folder = tempfile::tempdir().unwrap();
    let random = &mut Random::new(seed);
    let [gone, old, new] = ["gone", "old", "new"].map(|name| folder.path().join(name));
    tree(&gone, random, None);
    tree(&old, random, None);
    tree(&new, random, Some(&old));
    let memory = Arc::new(Memory::default());
    let repository = Repository::open_in(memory.clone(), PASSWORD).unwrap();
    // Something for a prune: of this only the packs stay, and the marks on them.
    let needless = write(&repository, Uuid::from_u128(3), &gone).unwrap().entry;
    let first = write(&repository, SESSION, &old).unwrap().entry;
    repository.forget(&[needless.id]).unwrap();
    repository.prune().unwrap();
    let needless = write(&repository, Uuid::from_u128(3), &gone).unwrap().entry;
    let second = write(&repository, SESSION, &old).unwrap().entry;
    let third = write(&repository, OTHER, &old).unwrap().entry;
    repository.forget(&[needless.id]).unwrap();
    Bed { memory, repository, old, new, entries: vec![first, second, third], _folder: folder }
}

/// Does it; a backup that is reported comes back.
fn operate(bed: &Bed, repository: &Repository, operation: Operation) -> Option<(Entry, PathBuf)> {
    let written = |session, volume: &Path| {
        let written = write(repository, session, volume).ok()?;
        Some((written.entry, volume.to_owned()))
    };
    match operation {
        Operation::Changed => written(SESSION, &bed.new),
        Operation::Unchanged => written(SESSION, &bed.old),
        Operation::New => written(Uuid::from_u128(4), &bed.new),
        Operation::Forget => {
            let _ = repository.forget(&[bed.entries[0].id.clone()]);
            None
        }
        Operation::Prune => {
            if repository.prune_after(Duration::ZERO).is_ok() {
                let _ = repository.prune_after(Duration::ZERO);
            }
            None
        }
        Operation::Restore => {
            let home = tempfile::tempdir().unwrap();
            let into = home.path().join("home");
            match restore(repository, &bed.entries[1].id, &into) {
                Ok(()) => compare(&bed.old, &into.join("volume")),
                Err(_) => assert!(!into.exists(), "a failed restore leaves nothing"),
            }
            None
        }
        Operation::Verify => {
            let _ = repository.verify(true, &Counter::default(), &NEVER);
            None
        }
    }
}

fn run(bed: &Bed, operation: Operation, at: u64, fault: Fault) {
    let memory = bed.memory.copy();
    let repository = bed.repository.through(memory.clone());
    memory.plan(Some((at, fault)));
    let reported = operate(bed, &repository, operation);
    memory.plan(None);
    // Another process, as after a kill.
    let repository = bed.repository.through(memory.clone());
    // What is altered while it is written stays so: only a check finds that, and mends it.
    let lies = matches!(fault, Fault::Flip | Fault::Cut);
    if lies {
        repository.verify(true, &Counter::default(), &NEVER).unwrap();
    }
    let kept = bed.entries.iter().skip(usize::from(matches!(operation, Operation::Forget)));
    for entry in kept {
        comes_back(&repository, entry, &bed.old);
    }
    if let Some((entry, volume)) = reported {
        comes_back(&repository, &entry, &volume);
    }
    let next = write(&repository, SESSION, &bed.new).unwrap();
    comes_back(&repository, &next.entry, &bed.new);
    let report = repository.verify(true, &Counter::default(), &NEVER).unwrap();
    assert!(report.findings.is_empty(), "{report:?}");
}

#[test]
fn nothing_reported_is_ever_lost() {
    let wanted: u64 =
        std::env::var("DENIZEN_REPOSITORY_FAULTS").map_or(2000, |count| count.parse().unwrap());
    let seed = std::env::var("DENIZEN_REPOSITORY_SEED").map_or(1, |seed| seed.parse().unwrap());
    let bed = &bed(seed);
    let steps: Vec<(Operation, u64)> = OPERATIONS
        .iter()
        .flat_map(|operation| {
            let memory = bed.memory.copy();
            operate(bed, &bed.repository.through(memory.clone()), *operation);
            // Threads take turns: it may be a few more the next time.
            (0..memory.calls() + 2).map(|at| (*operation, at))
        })
        .collect();
    println!("{} steps", steps.len());
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::SeqCst);
                    if number >= wanted {
                        return;
                    }
                    let step = usize::try_from(number).unwrap();
                    let (operation, at) = steps[step % steps.len()];
                    let fault = FAULTS[step / steps.len() % FAULTS.len()];
                    let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        run(bed, operation, at, fault);
                    }));
                    assert!(ran.is_ok(), "{operation:?}, call {at}: {fault:?}, seed {seed}");
                }
            });
        }
    });
}
