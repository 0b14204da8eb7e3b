//! A real kill -9, on a real folder: of a process that makes a repository, backs up, forgets,
//! compacts or restores, before and after each of its steps and at any moment between. Whatever was
//! backed up before comes back byte for byte, the next backup and compaction work, and of what the
//! killed one has left nothing stays.
//!
//! `DENIZEN_REPOSITORY_KILLS=1000` kills more often at random moments.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use denizen_repository::{Counter, Destination, Entry, Files, Folder, Range, Repository};
use rustix::process::{Signal, getpid, kill_process};
use support::*;
use uuid::Uuid;

/// Tells the test binary that it is to be killed: where, doing what, and at which step.
const VICTIM: &str = "DENIZEN_TEST_VICTIM";
const SESSION: Uuid = Uuid::from_u128(1);
const OTHER: Uuid = Uuid::from_u128(2);
/// Later than any of the steps.
const NEVER_KILLED: u64 = u64::MAX / 2;

// ---- The victim -------------------------------------------------------------------------

/// A folder that kills its process. Every step has two moments: before it and after it.
#[derive(Debug)]
struct Deadly {
    folder: Folder,
    /// Moments to live.
    left: AtomicU64,
}

impl Deadly {
    fn moment(&self) {
        let left = self.left.fetch_sub(1, Ordering::SeqCst);
        // Other threads may come here before they are dead.
        if left == 0 || left > NEVER_KILLED {
            kill_process(getpid(), Signal::KILL).unwrap();
        }
    }

    fn step<T>(&self, run: impl FnOnce(&Folder) -> T) -> T {
        self.moment();
        let done = run(&self.folder);
        self.moment();
        done
    }
}

impl Files for Deadly {
    fn place(&self) -> String {
        self.folder.place()
    }

    fn is_far(&self) -> bool {
        false
    }

    fn prepare(&self) -> io::Result<()> {
        self.step(Files::prepare)
    }

    fn list(&self, folder: &str) -> io::Result<Vec<(String, u64)>> {
        self.folder.list(folder)
    }

    fn size(&self, name: &str) -> io::Result<Option<u64>> {
        self.folder.size(name)
    }

    // A process that is killed while it looks leaves what one leaves that is killed after the
    // last change: only restores change something beside the repository.
    fn read(&self, name: &str, range: Option<Range>) -> io::Result<Bytes> {
        if std::env::var_os("DENIZEN_TEST_READS").is_some() {
            return self.step(|folder| folder.read(name, range));
        }
        self.folder.read(name, range)
    }

    fn write(&self, name: &str, content: Vec<Bytes>, new: bool) -> io::Result<()> {
        self.step(|folder| folder.write(name, content, new))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.step(|folder| folder.remove(name))
    }

    fn sweep(&self) -> io::Result<()> {
        self.step(Files::sweep)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    /// The first opening.
    Make,
    Backup,
    Forget,
    /// All steps of it, with no time between them.
    Compact,
    Restore,
}

const OPERATIONS: [Operation; 5] =
    [Operation::Make, Operation::Backup, Operation::Forget, Operation::Compact, Operation::Restore];

fn compact(repository: &Repository) {
    for _ in 0..3 {
        repository.prune_after(Duration::ZERO).unwrap();
    }
}

/// Is one when it is told to; no test by itself.
#[test]
fn a_victim() {
    let Ok(told) = std::env::var(VICTIM) else { return };
    let [folder, operation, argument, moments] = told.split('\n').collect::<Vec<_>>()[..] else {
        panic!("{told}")
    };
    let moments = moments.parse().unwrap();
    let folder = Path::new(folder);
    let left = AtomicU64::new(NEVER_KILLED);
    let files = Arc::new(Deadly { folder: Folder::new(&folder.join("repository")), left });
    if operation == "Make" {
        files.left.store(moments, Ordering::SeqCst);
    }
    let repository = Repository::open_in(files.clone(), PASSWORD).unwrap();
    files.left.store(moments, Ordering::SeqCst);
    println!("\nready");
    match operation {
        "Make" => {}
        "Backup" => drop(write(&repository, SESSION, Path::new(argument)).unwrap()),
        "Forget" => repository.forget(&[argument.to_owned()]).unwrap(),
        "Compact" => compact(&repository),
        "Restore" => restore(&repository, argument, &folder.join("into")).unwrap(),
        _ => panic!("{operation}"),
    }
}

fn victim(folder: &Path, operation: Operation, argument: &str, moments: u64) -> Child {
    let told = format!("{}\n{operation:?}\n{argument}\n{moments}", folder.display());
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "a_victim", "--nocapture"]).env(VICTIM, told).stdout(Stdio::piped());
    if operation == Operation::Restore {
        command.env("DENIZEN_TEST_READS", "1");
    }
    command.spawn().unwrap()
}

fn ended(status: ExitStatus) -> bool {
    match status.signal() {
        Some(signal) => {
            assert_eq!(signal, Signal::KILL.as_raw());
            false
        }
        None => {
            assert!(status.success(), "{status}");
            true
        }
    }
}

// ---- What it works on -------------------------------------------------------------------

/// A repository with some backups, and what they are of.
struct Bed {
    folder: tempfile::TempDir,
    repository: Repository,
    old: PathBuf,
    new: PathBuf,
    /// Of `old`, of both sessions; the first is that which is forgotten.
    entries: Vec<Entry>,
}

fn bed() -> Bed {
    let folder = tempfile::tempdir().unwrap();
    let random = &mut Random::new(5);
    let [gone, old, new] = ["gone", "old", "new"].map(|name| folder.path().join(name));
    for (volume, count) in [(&gone, 2_u8), (&old, 4)] {
        fs::create_dir_all(volume.join("a/b")).unwrap();
        for number in 0..count {
            let length = 50_000 * (usize::from(number) + 1);
            fs::write(volume.join(format!("a/{number}")), random.bytes(length)).unwrap();
        }
    }
    denizen_archive::copy(&old, &new, &NEVER).unwrap();
    fs::write(new.join("a/b/new"), random.bytes(1 << 20 | 5)).unwrap();
    fs::write(new.join("a/0"), random.bytes(3000)).unwrap();
    let repository = open(&folder.path().join("repository"));
    let needless = write(&repository, Uuid::from_u128(3), &gone).unwrap().entry;
    let first = write(&repository, SESSION, &old).unwrap().entry;
    repository.forget(&[needless.id]).unwrap();
    // What nobody needs is marked, and more comes to it.
    repository.prune().unwrap();
    fs::write(gone.join("a/more"), random.bytes(70_000)).unwrap();
    let needless = write(&repository, Uuid::from_u128(3), &gone).unwrap().entry;
    let second = write(&repository, SESSION, &old).unwrap().entry;
    let third = write(&repository, OTHER, &old).unwrap().entry;
    repository.forget(&[needless.id]).unwrap();
    Bed { folder, repository, old, new, entries: vec![first, second, third] }
}

fn open(folder: &Path) -> Repository {
    Repository::open(&Destination::Folder(folder.to_owned()), PASSWORD).unwrap()
}

/// The same files under other names: none of them is ever changed.
fn link(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            link(&entry.path(), &to);
        } else {
            fs::hard_link(entry.path(), to).unwrap();
        }
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found
}

impl Bed {
    fn run(&self, operation: Operation) -> tempfile::TempDir {
        let run = tempfile::tempdir_in(self.folder.path()).unwrap();
        if operation != Operation::Make {
            link(&self.folder.path().join("repository"), &run.path().join("repository"));
        }
        run
    }

    fn argument(&self, operation: Operation) -> &str {
        match operation {
            Operation::Backup => self.new.to_str().unwrap(),
            Operation::Forget => &self.entries[0].id,
            Operation::Restore => &self.entries[1].id,
            Operation::Make | Operation::Compact => "",
        }
    }

    /// What must hold after the victim's death.
    fn holds(&self, run: &Path, operation: Operation) {
        let place = run.join("repository");
        if operation == Operation::Restore {
            let before = self.folder.path().join("repository");
            let names = |folder: &Path| {
                let names = files(folder).into_iter();
                let names = names.map(|it| it.strip_prefix(folder).unwrap().to_owned());
                names.collect::<std::collections::BTreeSet<_>>()
            };
            assert_eq!(names(&place), names(&before), "a restore changes nothing");
            comes_back(&self.repository, &self.entries[1], &self.old);
            return;
        }
        let made;
        let repository = if operation == Operation::Make {
            made = open(&place);
            &made
        } else {
            &self.repository.through(Arc::new(Folder::new(&place)))
        };
        let forgotten = match operation {
            Operation::Make => self.entries.len(),
            Operation::Forget => 1,
            _ => 0,
        };
        let sound = |of: &str| {
            let report = repository.verify(true, &Counter::default(), &NEVER).unwrap();
            assert!(report.findings.is_empty(), "{of}: {report:?}");
        };
        sound("as it was left");
        let there = repository.list(None).unwrap();
        for entry in &self.entries[forgotten..] {
            assert!(there.contains(entry), "{entry:?} is gone");
        }
        // A new one is there only if it is whole.
        for entry in there {
            let known = self.entries.iter().any(|known| known.id == entry.id);
            comes_back(repository, &entry, if known { &self.old } else { &self.new });
        }
        let next = write(repository, SESSION, &self.new).unwrap().entry;
        repository.sweep().unwrap();
        compact(repository);
        sound("after the next backup and a compaction");
        comes_back(repository, &next, &self.new);
        let all: Vec<_> = repository.list(None).unwrap().into_iter().map(|it| it.id).collect();
        repository.forget(&all).unwrap();
        compact(repository);
        for folder in ["data", "tmp", "snapshots"] {
            let left = files(&place.join(folder));
            assert!(left.is_empty(), "left over: {left:?}");
        }
    }

    fn every_step(&self, operation: Operation) {
        for moments in 0.. {
            let run = self.run(operation);
            let mut victim = victim(run.path(), operation, self.argument(operation), moments);
            let ended = ended(victim.wait().unwrap());
            println!("{operation:?}, moment {moments}: {}", if ended { "ended" } else { "killed" });
            self.holds(run.path(), operation);
            if ended {
                assert!(moments > 1, "it was never killed");
                return;
            }
        }
    }
}

#[test]
fn at_each_step_of_making_a_repository() {
    bed().every_step(Operation::Make);
}

#[test]
fn at_each_step_of_a_backup() {
    bed().every_step(Operation::Backup);
}

#[test]
fn at_each_step_of_forgetting() {
    bed().every_step(Operation::Forget);
}

#[test]
fn at_each_step_of_a_compaction() {
    bed().every_step(Operation::Compact);
}

#[test]
fn at_each_step_of_a_restore() {
    bed().every_step(Operation::Restore);
}

#[test]
fn at_any_moment() {
    use std::io::{BufRead as _, BufReader};
    let count = std::env::var("DENIZEN_REPOSITORY_KILLS").map_or(24, |it| it.parse().unwrap());
    let bed = bed();
    let random = &mut Random::new(u64::from(std::process::id()));
    let operations = &OPERATIONS[1..];
    let mut lasts = [Duration::ZERO; OPERATIONS.len()];
    for number in 0..count + operations.len() {
        let place = number % operations.len();
        let (operation, run) = (operations[place], bed.run(operations[place]));
        let mut victim = victim(run.path(), operation, bed.argument(operation), NEVER_KILLED);
        let mut said = BufReader::new(victim.stdout.take().unwrap()).lines();
        assert!(said.any(|line| line.unwrap() == "ready"), "the victim has failed");
        let begun = Instant::now();
        if number < operations.len() {
            // How long there is to be killed in.
            assert!(ended(victim.wait().unwrap()));
            lasts[place] = begun.elapsed();
            continue;
        }
        let most = u64::try_from(lasts[place].as_micros()).unwrap();
        let wait = Duration::from_micros(random.below(most));
        // No event is awaited: it is to be any moment.
        std::thread::sleep(wait);
        victim.kill().unwrap();
        let ended = ended(victim.wait().unwrap());
        println!("{operation:?}, {wait:?}: {}", if ended { "ended" } else { "killed" });
        bed.holds(run.path(), operation);
    }
}
