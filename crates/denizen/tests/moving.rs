//! Sessions that are exported and imported through the library.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{cache, text};
use denizen::{
    ArchiveError, Error, Isolation, Limits, MicroVmManager, VmPoolConfig, VmPoolRuntimeConfig,
};
use tokio::io::AsyncReadExt;
use uuid::Uuid;

fn pool(root: &Path) -> Arc<MicroVmManager> {
    let config = VmPoolConfig { enabled: true, volume_root: root.into(), ..Default::default() };
    MicroVmManager::new(VmPoolRuntimeConfig::from(&config)).unwrap()
}

async fn bytes(pool: &MicroVmManager, session: Uuid) -> Vec<u8> {
    let mut export = pool.export(session).await.unwrap();
    let mut bytes = Vec::new();
    export.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(bytes.len() as u64, export.bytes());
    bytes
}

#[tokio::test]
async fn a_pool_without_backups_exports_and_imports() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(folder.path());
    let [one, other] = [Uuid::new_v4(), Uuid::new_v4()];
    assert!(matches!(pool.export(one).await, Err(Error::Unknown { .. })));
    let guard = pool.acquire(one).await.unwrap();
    text(&guard, "echo kept > file").await;
    assert!(matches!(pool.export(one).await, Err(Error::InUse { .. })));
    drop(guard);
    let archive = bytes(&pool, one).await;
    assert_eq!(pool.inspect(one).unwrap().state, "stopped");
    pool.import(other, &archive[..]).await.unwrap();
    let session = pool.inspect(other).unwrap();
    assert!(session.unsaved && !session.in_use, "{session:?}");
    assert_eq!(text(&pool.acquire(other).await.unwrap(), "cat file").await, "kept\n");
    let again = pool.import(one, &archive[..]).await;
    assert!(matches!(again, Err(Error::AlreadyExists { .. })), "{again:?}");
    pool.shutdown().await.unwrap();
}

#[tokio::test]
async fn two_imports_of_one_session_make_it_once() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(folder.path());
    let [one, both] = [Uuid::new_v4(), Uuid::new_v4()];
    text(&pool.acquire(one).await.unwrap(), "echo kept > file").await;
    let archive = bytes(&pool, one).await;
    // Somebody else, who only wants to use it, may come between.
    let (first, second, used) =
        tokio::join!(pool.import(both, &archive[..]), pool.import(both, &archive[..]), async {
            while pool.inspect(both).is_err() {
                tokio::task::yield_now().await;
            }
            pool.acquire(both).await.unwrap()
        },);
    let made = [&first, &second].iter().filter(|import| import.is_ok()).count();
    assert_eq!(made, 1, "{first:?} {second:?}");
    assert_eq!(text(&used, "cat file").await, "kept\n");
    drop(used);
    pool.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_sandbox_moves_with_all_that_is_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let config = VmPoolConfig {
        enabled: true,
        volume_root: folder.path().join("pool"),
        backup_destination: Some(folder.path().join("backups")),
        ..Default::default()
    };
    let builder = MicroVmManager::builder((&config).into());
    let pool = builder.isolation(Isolation::Sandbox).cache(cache()).build().unwrap();
    let [one, other] = [Uuid::new_v4(), Uuid::new_v4()];
    let guard = pool.acquire(one).await.unwrap();
    // As changes of a root look, by the name that those have in an archive.
    let make = "mkdir -p .denizen/upper && echo {} > .denizen/base.json &&
        echo mine > .denizen/upper/file && echo changed > /etc/of-the-root";
    text(&guard, make).await;
    drop(guard);
    let archive = bytes(&pool, one).await;
    pool.import(other, &archive[..]).await.unwrap();
    pool.backup(one).await.unwrap();
    text(&pool.acquire(one).await.unwrap(), "rm -r .denizen /etc/of-the-root").await;
    // From before, by its name: the latest is of just now.
    let before = pool.backups(one).await.unwrap().last().unwrap().name.clone();
    pool.restore(one, Some(&before)).await.unwrap();
    for session in [one, other] {
        let look = "cat .denizen/upper/file /etc/of-the-root; ls -A . .denizen";
        let found = text(&pool.acquire(session).await.unwrap(), look).await;
        let expected = "mine\nchanged\n.:\n.denizen\n\n.denizen:\nbase.json\nupper\n";
        assert_eq!(found, expected);
    }
    pool.shutdown().await.unwrap();
}

#[tokio::test]
async fn content_that_fails_is_told_as_such() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(folder.path());
    let session = Uuid::new_v4();
    let broken = breaks_off();
    let error = pool.import(session, broken).await.unwrap_err();
    assert!(matches!(error, Error::BrokenOff { .. }), "{error}");
    assert!(pool.sessions().unwrap().is_empty());
    let staging = folder.path().join(".denizen/staging");
    assert_eq!(std::fs::read_dir(staging).unwrap().count(), 0);
    pool.shutdown().await.unwrap();
}

/// Some bytes, then a failure.
fn breaks_off() -> impl tokio::io::AsyncRead + Send + Unpin {
    struct Fails;
    impl tokio::io::AsyncRead for Fails {
        fn poll_read(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            _: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<std::io::Result<()>> {
            std::task::Poll::Ready(Err(std::io::ErrorKind::ConnectionReset.into()))
        }
    }
    (&b"some bytes"[..]).chain(Fails)
}

#[tokio::test]
async fn what_is_sent_without_end_is_not_received() {
    let folder = tempfile::tempdir().unwrap();
    let config =
        VmPoolConfig { enabled: true, volume_root: folder.path().into(), ..Default::default() };
    let limits = Limits { disk_bytes: Some(1 << 20), ..Limits::default() };
    let pool = common::opened(|| {
        let builder = MicroVmManager::builder((&config).into()).isolation(Isolation::Sandbox);
        builder.cache(cache()).limits(limits.clone())
    });
    let pool = pool.await;
    let id = Uuid::new_v4();
    let refused = pool.import(id, tokio::io::repeat(0)).await.unwrap_err();
    let told = matches!(refused, Error::NotImported(ArchiveError::TooLarge { .. }));
    assert!(told, "{refused}");
    assert!(matches!(pool.inspect(id), Err(Error::Unknown { .. })));
    pool.shutdown().await.unwrap();
}
