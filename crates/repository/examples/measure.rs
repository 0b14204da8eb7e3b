//! How long backups take beside other programs: `measure TREE FOLDER [TIMES]` backs up the tree in
//! the folder, which must be empty, and prints a line for each kind of work: its name, how long it
//! took us, and how long the others took, in nanoseconds, each the middle of several times.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use denizen_repository::{Counter, Destination, Repository, Source};
use uuid::Uuid;

static NEVER: AtomicBool = AtomicBool::new(false);
const SESSION: Uuid = Uuid::from_u128(1);

fn middle(mut times: Vec<u128>) -> u128 {
    times.sort_unstable();
    times[times.len() / 2]
}

fn timed(run: impl FnOnce()) -> u128 {
    let begin = Instant::now();
    run();
    begin.elapsed().as_nanos()
}

/// Runs a line of shell in the folder.
fn shell(folder: &Path, tree: &Path, line: &str) {
    let mut command = Command::new("bash");
    command.args(["-c", line, "-"]).arg(tree).current_dir(folder);
    command.env("RESTIC_PASSWORD", "x").env("BORG_PASSPHRASE", "x");
    command.env("BORG_BASE_DIR", folder).stdout(Stdio::null()).stderr(Stdio::null());
    assert!(command.status().unwrap().success(), "{line}");
}

fn write(repository: &Repository, volume: &Path) -> String {
    let source = Source { session: SESSION, name: None, volume, root: None, owners: None };
    let now = jiff::Timestamp::now();
    repository.write(source, now, &std::sync::Arc::default(), &NEVER).unwrap().entry.id
}

fn main() {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let (tree, folder) = (fs::canonicalize(&arguments[0]).unwrap(), &arguments[1]);
    let times: usize = arguments.get(2).map_or(5, |it| it.to_str().unwrap().parse().unwrap());
    fs::create_dir_all(folder).unwrap();
    let [into, ours] = ["into", "ours"].map(|name| folder.join(name));
    let empty = |path: &Path| {
        let _ = fs::remove_dir_all(path);
    };
    let others = [
        (
            "tar",
            "true",
            "tar --xattrs --numeric-owner -C \"$1\" -cf - . | zstd -q -3 -T2 -f -o a.tar.zst",
            "true",
            "mkdir into; zstd -dcq a.tar.zst | tar --xattrs --numeric-owner -C into -xpf -",
        ),
        (
            "restic",
            "rm -rf r; restic -q init --repository-version 2 -r r",
            "restic -q --no-cache backup -r r \"$1\"",
            "restic -q --no-cache backup -r r \"$1\"",
            "restic -q --no-cache restore -r r latest --target into",
        ),
        (
            "borg",
            "rm -rf b; borg init -e repokey-blake2 b",
            "borg create -C zstd,3 b::a \"$1\"",
            "borg create -C zstd,3 b::b \"$1\"",
            "mkdir into; cd into; borg extract ../b::a",
        ),
    ];
    let mut own: [Vec<u128>; 3] = Default::default();
    let mut theirs = vec![<[Vec<u128>; 3]>::default(); others.len()];
    for _ in 0..times {
        empty(&ours);
        let destination = Destination::Folder(ours.clone());
        let repository = Repository::open(&destination, "x").unwrap();
        let mut id = String::new();
        own[0].push(timed(|| id = write(&repository, &tree)));
        own[1].push(timed(|| drop(write(&repository, &tree))));
        empty(&into);
        let counter = Counter::default();
        own[2].push(timed(|| {
            drop(repository.restore(&id, &into, &[], None, &counter, &NEVER).unwrap());
        }));
        for ((name, prepare, first, second, restore), times) in others.iter().zip(&mut theirs) {
            shell(folder, &tree, prepare);
            times[0].push(timed(|| shell(folder, &tree, first)));
            if *name != "tar" {
                times[1].push(timed(|| shell(folder, &tree, second)));
            }
            empty(&into);
            times[2].push(timed(|| shell(folder, &tree, restore)));
        }
    }
    empty(&into);
    for (number, work) in ["first backup", "unchanged backup", "restore"].iter().enumerate() {
        for ((name, ..), times) in others.iter().zip(&mut theirs) {
            if !times[number].is_empty() {
                let [own, their] = [&own, &*times].map(|it| middle(it[number].clone()));
                println!("{work} beside {name}\t{own}\t{their}");
            }
        }
    }
}
