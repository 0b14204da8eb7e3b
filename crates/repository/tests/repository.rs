//! Backups made, read back and restored.
#![allow(clippy::unwrap_used, dead_code)]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use denizen_repository::{Counter, Destination, Repository, Source};
use support::*;
use uuid::Uuid;

fn source(session: Uuid, volume: &Path) -> Source<'_> {
    Source { session, name: Some("demo"), volume, root: None, owners: None }
}

#[test]
fn random_trees_come_back_entirely() {
    let folder = tempfile::tempdir().unwrap();
    let destination = Destination::Folder(folder.path().join("repository"));
    let never = AtomicBool::new(false);
    let repository = Repository::open(&destination, "secret").unwrap();
    for seed in 0..6 {
        println!("seed {seed}");
        let bench = Bench::new();
        random_tree(&bench.volume, seed, 120);
        let counter = Arc::new(Counter::default());
        let begin = Instant::now();
        let written =
            repository.write(source(Uuid::new_v4(), &bench.volume), now(), &counter, &never);
        let written = written.unwrap();
        println!("{:?} {:?}", begin.elapsed(), written.entry);
        let home = bench.into.join("home");
        std::fs::create_dir_all(&bench.into).unwrap();
        let restored =
            repository.restore(&written.entry.id, &home, None, None, &counter, &never).unwrap();
        assert_eq!(restored.warnings, Vec::<String>::new());
        compare(&bench.volume, &home.join("volume"));
        let begin = Instant::now();
        let again = repository
            .write(source(written.entry.session, &bench.volume), now(), &counter, &never)
            .unwrap();
        println!("{:?} {:?}", begin.elapsed(), again.entry);
        assert_eq!(again.entry.added, 0);
    }
    let report = repository.verify(true, &Counter::default(), &never).unwrap();
    println!("{report:?}");
    assert!(report.findings.is_empty());
    assert_eq!(report.backups, 12);
}
