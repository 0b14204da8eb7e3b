//! Repositories in a bucket: on a server that works, and on one that has troubles.
#![allow(clippy::unwrap_used)]

#[path = "support/s3.rs"]
mod s3;
mod support;

use std::fs;
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use denizen_repository::{Bucket, Counter, Error, Files, Patience, Repository};
use s3::{Server, Trouble};
use support::*;
use uuid::Uuid;

const KEYS: [&str; 2] = ["AKIAverysecret", "even/more+secret"];
const SESSION: Uuid = Uuid::from_u128(1);

static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Has all that is logged kept, but what the protocol's own traces hold.
fn listen() {
    let level = tracing::Level::DEBUG;
    let log = tracing_subscriber::fmt().with_max_level(level).with_writer(|| Log).finish();
    // Another test may have done it.
    let _ = tracing::subscriber::set_global_default(log);
}

fn log_has_no_secret() {
    let log = String::from_utf8_lossy(&LOG.lock().unwrap()).into_owned();
    assert!(!log.is_empty());
    assert!(!log.contains(PASSWORD) && KEYS.iter().all(|key| !log.contains(key)));
}

fn bucket(server: &Server) -> Arc<Bucket> {
    let patience = Patience {
        request: Duration::from_millis(500),
        again: Duration::from_secs(2),
        tries: 2,
        pause: Duration::from_millis(1),
    };
    let url = format!("http://{}", server.address);
    Arc::new(Bucket::open_at("bucket", "some/where", &url, KEYS, patience).unwrap())
}

/// One line that tells what to do about it, and no secret.
fn is_clear(error: &Error) {
    for text in [error.to_string(), format!("{error:?}")] {
        assert!(KEYS.iter().all(|key| !text.contains(key)), "{text}");
        assert!(!text.contains(PASSWORD) && !text.contains("Signature="), "{text}");
    }
    assert!(error.to_string().contains("s3://bucket/some/where"), "{error}");
    assert!(!error.to_string().contains('\n'), "{error}");
}

#[test]
fn all_operations_work_there() {
    let server = Server::start();
    let files = bucket(&server);
    let repository = Repository::open_in(files.clone(), PASSWORD).unwrap();
    let bench = Bench::new();
    random_tree(&bench.volume, 5, 100);
    let first = write(&repository, SESSION, &bench.volume).unwrap().entry;
    comes_back(&repository, &first, &bench.volume);
    fs::write(bench.volume.join("new"), Random::new(1).bytes(100_000)).unwrap();
    let second = write(&repository, SESSION, &bench.volume).unwrap().entry;
    let third = write(&repository, SESSION, &bench.volume).unwrap().entry;
    assert_eq!(third.added, 0);
    repository.forget(&[first.id]).unwrap();
    let zero = Duration::ZERO;
    repository.prune_after(zero).unwrap();
    repository.prune_after(zero).unwrap();
    // As another host finds it.
    let again = Repository::open_in(files, PASSWORD).unwrap();
    assert_eq!(again.list(None).unwrap(), [third, second.clone()]);
    comes_back(&again, &second, &bench.volume);
    assert!(again.verify(true, &Counter::default(), &NEVER).unwrap().findings.is_empty());
    again.sweep().unwrap();
    let error = Repository::open_in(bucket(&server), "wrong").unwrap_err();
    assert!(matches!(error, Error::WrongKey { .. }), "{error}");
    is_clear(&error);
    // Within a runtime too.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { comes_back(&again, &second, &bench.volume) });
    server.stop();
}

#[test]
fn hosts_that_make_one_there_at_once_agree() {
    let server = Server::start();
    let bench = Bench::new();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let repository = Repository::open_in(bucket(&server), PASSWORD).unwrap();
                write(&repository, Uuid::new_v4(), &bench.volume).unwrap();
            });
        }
    });
    let repository = Repository::open_in(bucket(&server), PASSWORD).unwrap();
    assert_eq!(repository.list(None).unwrap().len(), 4);
    server.stop();
}

/// What fails for a while only is not noticed.
#[test]
fn troubles_that_pass_are_waited_for() {
    listen();
    let server = Server::start();
    let repository = Repository::open_in(bucket(&server), PASSWORD).unwrap();
    let bench = Bench::new();
    fs::write(bench.volume.join("old"), Random::new(1).bytes(100_000)).unwrap();
    for trouble in [Trouble::Internal, Trouble::SlowDown, Trouble::Reset, Trouble::Unanswered] {
        fs::write(bench.volume.join("new"), format!("{trouble:?}")).unwrap();
        server.plan(Some(Box::new(move |number, _, _| (number % 3 == 0).then_some(trouble))));
        let written = write(&repository, SESSION, &bench.volume);
        server.plan(None);
        let entry = written.unwrap().entry;
        comes_back(&repository, &entry, &bench.volume);
    }
    assert!(repository.verify(true, &Counter::default(), &NEVER).unwrap().findings.is_empty());
    server.stop();
}

/// Every request of a backup, and then all later ones or just this, meets every trouble.
#[test]
fn troubles_that_stay_are_clear_and_cost_nothing() {
    listen();
    let server = Server::start();
    let repository = Repository::open_in(bucket(&server), PASSWORD).unwrap();
    let bench = Bench::new();
    fs::write(bench.volume.join("old"), Random::new(1).bytes(100_000)).unwrap();
    let old = bench.dir.path().join("old");
    denizen_archive::copy(&bench.volume, &old, &NEVER).unwrap();
    let before = write(&repository, SESSION, &bench.volume).unwrap().entry;
    let all = server.objects.lock().unwrap().clone();
    fs::write(bench.volume.join("new"), Random::new(2).bytes(100_000)).unwrap();
    server.plan(None);
    write(&repository, SESSION, &bench.volume).unwrap();
    let requests = server.requests();
    let (mut failed, mut succeeded) = (0, 0);
    let stays = [Trouble::Internal, Trouble::Forbidden, Trouble::Reset, Trouble::Truncated];
    let once = [Trouble::Forbidden, Trouble::Truncated, Trouble::Unanswered, Trouble::Stale];
    let cases = stays.iter().map(|it| (it, true)).chain(once.iter().map(|it| (it, false)));
    for (&trouble, stays) in cases {
        for at in 0..requests {
            server.objects.lock().unwrap().clone_from(&all);
            let repository = repository.through(bucket(&server));
            server.plan(Some(Box::new(move |number, _, _| {
                (number == at || stays && number > at).then_some(trouble)
            })));
            let written = write(&repository, SESSION, &bench.volume);
            server.plan(None);
            comes_back(&repository, &before, &old);
            match written {
                Ok(written) => {
                    comes_back(&repository, &written.entry, &bench.volume);
                    succeeded += 1;
                }
                Err(error) => {
                    is_clear(&error);
                    failed += 1;
                }
            }
            let next = write(&repository, SESSION, &bench.volume).unwrap().entry;
            comes_back(&repository, &next, &bench.volume);
            let report = repository.verify(true, &Counter::default(), &NEVER).unwrap();
            assert!(report.findings.is_empty(), "{trouble:?} at {at}: {report:?}");
        }
    }
    println!("{requests} requests, {failed} failed, {succeeded} succeeded");
    assert!(failed > 0 && succeeded > 0);
    log_has_no_secret();
    server.stop();
}

#[test]
fn a_server_that_is_silent_is_given_up() {
    let server = Server::start();
    let files = bucket(&server);
    let repository = Repository::open_in(files.clone(), PASSWORD).unwrap();
    server.plan(Some(Box::new(|_, _, _| Some(Trouble::Silent))));
    let bench = Bench::new();
    is_clear(&write(&repository, SESSION, &bench.volume).unwrap_err());
    is_clear(&Repository::open_in(files.clone(), PASSWORD).unwrap_err());
    assert!(files.list("data").is_err());
    server.stop();
    is_clear(&repository.list(None).unwrap_err());
}
