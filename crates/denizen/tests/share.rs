//! Shared folders: files that several sessions have, and that whoever embeds denizen reads and
//! writes from outside of them.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::sync::Arc;

use denizen::{
    Error, Exit, Isolation, Limits, MicroVmManager, Mount, ShareEntryKind, ShareOwner, SharedFiles,
};
use tempfile::TempDir;
use uuid::Uuid;

use crate::common::{config, isolated, opened, text};

async fn pool_with(folder: &TempDir, isolation: Isolation, limits: Limits) -> Arc<MicroVmManager> {
    let config = config(folder.path());
    opened(|| {
        isolated(MicroVmManager::builder((&config).into()), isolation)
            .limits(limits.clone())
            .spares(1)
    })
    .await
}

async fn pool(folder: &TempDir) -> Arc<MicroVmManager> {
    pool_with(folder, Isolation::Sandbox, Limits::default()).await
}

fn mounts(share: Uuid, path: &str) -> Vec<Mount> {
    vec![Mount { share, path: path.to_owned() }]
}

fn write(files: &SharedFiles, path: &str, content: &str, replace: bool) -> std::io::Result<()> {
    let mut file = files.write(Path::new(path))?;
    file.write_all(content.as_bytes())?;
    file.finish(ShareOwner::default(), replace).map(drop)
}

fn read(files: &SharedFiles, path: &str) -> std::io::Result<String> {
    let mut content = String::new();
    files.read(Path::new(path))?.read_to_string(&mut content)?;
    Ok(content)
}

fn kind<T>(result: std::io::Result<T>) -> ErrorKind {
    result.map(drop).unwrap_err().kind()
}

/// Whether sandboxes here have users of their own.
async fn has_users(pool: &Arc<MicroVmManager>) -> bool {
    let guard = pool.acquire(Uuid::new_v4()).await.unwrap();
    let map = text(&guard, "cat /proc/self/uid_map").await;
    map.split_whitespace().nth(2).is_some_and(|count| count != "1")
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_share_a_folder_that_outlives_them() {
    let folder = tempfile::tempdir().unwrap();
    let first = pool(&folder).await;
    let share = first.create_share("data").await.unwrap();
    assert!(matches!(first.create_share("data").await, Err(Error::ShareExists { .. })));
    assert!(matches!(first.create_share("a/b").await, Err(Error::Name { .. })));
    assert_eq!(first.shares().await.unwrap(), [share.clone()]);
    let [one, two] = [Uuid::new_v4(), Uuid::new_v4()];
    for (id, path) in [(one, "/mnt/deep/data"), (two, "/volume/data")] {
        // Out of a spare, which was there before it was known whose it is.
        drop(first.acquire(id).await.unwrap());
        first.set_mounts(id, mounts(share.id, path)).await.unwrap();
        first.stop(id, true).await.unwrap();
    }
    let (a, b) = (first.acquire(one).await.unwrap(), first.acquire(two).await.unwrap());
    text(&a, "echo from one >/mnt/deep/data/note; mkdir /mnt/deep/data/folder").await;
    assert_eq!(text(&b, "cat data/note; ls data").await, "from one\nfolder\nnote\n");
    text(&b, "echo two >>data/note").await;
    assert_eq!(text(&a, "cat /mnt/deep/data/note").await, "from one\ntwo\n");
    // No devices and no rights of other users come with it.
    let flags = "awk '$5 == \"/mnt/deep/data\" { print $6 }' /proc/self/mountinfo";
    let flags = text(&a, flags).await;
    assert!(flags.contains("nosuid") && flags.contains("nodev"), "{flags}");
    drop((a, b));
    // A copy has it too, not a copy of it.
    let fork = first.fork(one).await.unwrap();
    let guard = first.acquire(fork).await.unwrap();
    assert_eq!(text(&guard, "cat /mnt/deep/data/note").await, "from one\ntwo\n");
    text(&guard, "echo fork >>/mnt/deep/data/note").await;
    drop(guard);
    assert_eq!(first.mounts(fork).unwrap(), mounts(share.id, "/mnt/deep/data"));
    assert!(matches!(first.remove_share(share.id).await, Err(Error::ShareInUse { .. })));
    first.shutdown().await.unwrap();
    drop(first);

    let second = pool(&folder).await;
    assert_eq!(second.shares().await.unwrap().len(), 1);
    let guard = second.acquire(two).await.unwrap();
    assert_eq!(text(&guard, "tail -n1 data/note").await, "fork\n");
    drop(guard);
    // What a session has of its own is without it.
    second.set_mounts(two, Vec::new()).await.unwrap();
    second.stop(two, true).await.unwrap();
    let guard = second.acquire(two).await.unwrap();
    assert_eq!(text(&guard, "ls data").await, "");
    drop(guard);
    for id in [one, two, fork] {
        second.remove(id).await.unwrap();
    }
    let files = second.shared_files(share.id).await.unwrap();
    assert_eq!(read(&files, "note").unwrap(), "from one\ntwo\nfork\n");
    second.remove_share(share.id).await.unwrap();
    assert_eq!(kind(read(&files, "note")), ErrorKind::NotFound);
    assert!(matches!(second.shared_files(share.id).await, Err(Error::UnknownShare { .. })));
    let kept = folder.path().join("pool/.denizen/shares");
    assert_eq!(std::fs::read_dir(kept).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_it_can_be_is_checked() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(&folder).await;
    let share = pool.create_share("data").await.unwrap().id;
    let id = Uuid::new_v4();
    assert!(matches!(pool.set_mounts(id, mounts(share, "/a")).await, Err(Error::Unknown { .. })));
    drop(pool.acquire(id).await.unwrap());
    for bad in
        ["", "/", "a", "/a/../b", "/a//b", "/a/", "/./a", "/proc/a", "/dev", "/volume", "/a\0"]
    {
        let refused = pool.set_mounts(id, mounts(share, bad)).await;
        assert!(matches!(refused, Err(Error::Mounts { .. })), "{bad:?}: {refused:?}");
    }
    for (one, other) in [("/a", "/a"), ("/a", "/a/b"), ("/a/b", "/a")] {
        let both = [mounts(share, one), mounts(share, other)].concat();
        assert!(matches!(pool.set_mounts(id, both).await, Err(Error::Mounts { .. })));
    }
    // No link of the session's leads it over something that the session needs.
    let guard = pool.acquire(id).await.unwrap();
    text(&guard, "ln -s /proc/sys /data").await;
    drop(guard);
    pool.set_mounts(id, mounts(share, "/data/user")).await.unwrap();
    pool.stop(id, true).await.unwrap();
    let refused = pool.acquire(id).await.unwrap_err().to_string();
    assert!(refused.contains("/data"), "{refused}");
    pool.set_mounts(id, Vec::new()).await.unwrap();
    drop(pool.acquire(id).await.unwrap());
    let other = pool.set_mounts(id, mounts(Uuid::new_v4(), "/a")).await;
    assert!(matches!(other, Err(Error::UnknownShare { .. })));
    assert_eq!(pool.mounts(id).unwrap(), []);
    let host = tempfile::tempdir().unwrap();
    let host = pool_with(&host, Isolation::Host, Limits::default()).await;
    let share = host.create_share("data").await.unwrap().id;
    drop(host.acquire(id).await.unwrap());
    let refused = host.set_mounts(id, mounts(share, "/a")).await;
    assert!(matches!(refused, Err(Error::Isolation { .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_read_and_written_from_outside() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(&folder).await;
    let has_users = has_users(&pool).await;
    let share = pool.create_share("data").await.unwrap().id;
    let files = pool.shared_files(share).await.unwrap();
    let at = |path: &str| files.inspect(Path::new(path));
    write(&files, "/a", "one", false).unwrap();
    assert_eq!(kind(write(&files, "a", "two", false)), ErrorKind::AlreadyExists);
    assert_eq!(read(&files, "a").unwrap(), "one");
    let owner = if has_users { Some(1001) } else { None };
    let said = ShareOwner { user: owner, group: owner, mode: Some(0o640) };
    let changed = files.change(Path::new("/a"), said).unwrap();
    assert_eq!((changed.mode, changed.user), (0o640, owner.unwrap_or(0)));
    // As it was before, but for what is in it.
    write(&files, "a", "longer", true).unwrap();
    let entry = at("a").unwrap();
    assert_eq!(entry.path, Path::new("/a"));
    assert_eq!((entry.kind, entry.size, entry.mode), (ShareEntryKind::File, 6, 0o640));
    assert_eq!((entry.user, entry.group), (owner.unwrap_or(0), owner.unwrap_or(0)));
    // What was not finished was never there.
    let mut given_up = files.write(Path::new("/b")).unwrap();
    given_up.write_all(b"half").unwrap();
    drop(given_up);
    assert_eq!(kind(at("/b")), ErrorKind::NotFound);
    let folder_of =
        |path: &str, parents| files.make_folder(Path::new(path), ShareOwner::default(), parents);
    assert_eq!(kind(folder_of("/x/y/z", false)), ErrorKind::NotFound);
    let made = folder_of("/x/y/z", true).unwrap();
    assert_eq!((made.kind, made.mode), (ShareEntryKind::Folder, 0o755));
    assert_eq!(made.user, if has_users { 1000 } else { 0 });
    assert_eq!(kind(folder_of("/x/y", false)), ErrorKind::AlreadyExists);
    folder_of("/x/y", true).unwrap();
    assert_eq!(kind(folder_of("/a/b", true)), ErrorKind::NotADirectory);
    assert_eq!(kind(write(&files, "/x", "", true)), ErrorKind::IsADirectory);
    assert_eq!(kind(write(&files, "/no/b", "", true)), ErrorKind::NotFound);
    assert_eq!(kind(read(&files, "/x")), ErrorKind::IsADirectory);
    assert_eq!(kind(files.list(Path::new("/a"), 1)), ErrorKind::NotADirectory);
    let list = |path: &str, depth| {
        let all = files.list(Path::new(path), depth).unwrap();
        let paths = all.into_iter().map(|entry| entry.path.to_string_lossy().into_owned());
        paths.collect::<Vec<_>>().join(" ")
    };
    assert_eq!(list("/", 1), "/a /x");
    assert_eq!(list("x", 2), "/x/y /x/y/z");
    assert_eq!(list("/", 9), "/a /x /x/y /x/y/z");
    assert_eq!(kind(files.remove(Path::new("/"))), ErrorKind::InvalidInput);
    assert_eq!(kind(files.remove(Path::new("/no"))), ErrorKind::NotFound);
    files.remove(Path::new("/x")).unwrap();
    assert_eq!(list("/", 9), "/a");
    assert_eq!(kind(at("/a/../../x")), ErrorKind::InvalidInput);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_session_leaves_leads_out_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(&folder).await;
    let share = pool.create_share("data").await.unwrap().id;
    let outside = folder.path().join("outside");
    std::fs::write(&outside, "secret").unwrap();
    let id = Uuid::new_v4();
    drop(pool.acquire(id).await.unwrap());
    pool.set_mounts(id, mounts(share, "/mnt")).await.unwrap();
    pool.stop(id, true).await.unwrap();
    let guard = pool.acquire(id).await.unwrap();
    let out = outside.display();
    let leave = format!(
        "cd /mnt; ln -s {out} abs; ln -s ../../../../../../../{out} rel; ln -s / top; mkfifo pipe; \
         echo inside >in; ln -s /in within; mkdir -p loop; ln -s .. loop/up; ln -s self self; \
         mkdir -p deep/$(printf 'd%.0s/' $(seq 300))"
    );
    text(&guard, &leave).await;
    let files = pool.shared_files(share).await.unwrap();
    for link in ["abs", "rel", &format!("top/{out}"), &format!("loop/up/loop/up/{out}")] {
        assert_eq!(kind(read(&files, link)), ErrorKind::NotFound, "{link}");
        assert_eq!(kind(files.change(Path::new(link), ShareOwner::default())), ErrorKind::NotFound);
    }
    assert!(read(&files, "self").is_err());
    assert_eq!(kind(read(&files, "pipe")), ErrorKind::InvalidInput);
    assert_eq!(read(&files, "within").unwrap(), "inside\n");
    assert_eq!(read(&files, "top/top/loop/up/in").unwrap(), "inside\n");
    let link = files.inspect(Path::new("abs")).unwrap();
    assert_eq!((link.kind, link.target.as_deref()), (ShareEntryKind::Link, Some(&*outside)));
    // The link goes, not what it leads to.
    write(&files, "abs", "mine", true).unwrap();
    assert_eq!(text(&guard, "cat /mnt/abs").await, "mine");
    assert_eq!(std::fs::read_to_string(&outside).unwrap(), "secret");
    files.list(Path::new("/"), 50).unwrap();
    for all in ["deep", "top", "loop", "pipe", "self", "rel"] {
        files.remove(Path::new(all)).unwrap();
    }
    assert_eq!(text(&guard, "ls /mnt").await, "abs\nin\nwithin\n");
    drop(guard);
    pool.remove(id).await.unwrap();
    pool.remove_share(share).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn it_counts_for_the_disk_that_a_session_may_use() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { disk_bytes: Some(8 << 20), ..Limits::default() };
    let pool = pool_with(&folder, Isolation::Sandbox, limits).await;
    let share = pool.create_share("data").await.unwrap().id;
    let id = Uuid::new_v4();
    drop(pool.acquire(id).await.unwrap());
    pool.set_mounts(id, mounts(share, "/mnt")).await.unwrap();
    pool.stop(id, true).await.unwrap();
    let guard = pool.acquire(id).await.unwrap();
    let fill = "for i in $(seq 64); do head -c 1M /dev/zero >/mnt/$i; done; exec sleep 600";
    let filled = guard.command(fill).output().await.unwrap();
    assert_eq!(filled.exit, Exit::OutOfDisk);
    // From outside, neither.
    let files = pool.shared_files(share).await.unwrap();
    assert_eq!(kind(files.write(Path::new("more"))), ErrorKind::StorageFull);
    for entry in files.list(Path::new("/"), 1).unwrap() {
        files.remove(&entry.path).unwrap();
    }
    let mut most = files.write(Path::new("most")).unwrap();
    let written = most.write_all(&vec![1; 9 << 20]);
    assert_eq!(kind(written), ErrorKind::StorageFull);
    drop(most);
    write(&files, "some", "fits", false).unwrap();
    assert_eq!(text(&guard, "cat /mnt/some").await, "fits");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_process_has_left_is_cleared_away() {
    let folder = tempfile::tempdir().unwrap();
    let first = pool(&folder).await;
    let share = first.create_share("data").await.unwrap().id;
    let files = first.shared_files(share).await.unwrap();
    write(&files, "kept", "kept", false).unwrap();
    first.shutdown().await.unwrap();
    drop(first);
    let all = folder.path().join("pool/.denizen/shares");
    // Being written, being removed, not yet known.
    let of = all.join(share.to_string());
    std::fs::write(of.join("staging/half"), "half").unwrap();
    std::fs::create_dir_all(of.join("staging/gone/deep")).unwrap();
    std::fs::create_dir_all(all.join(Uuid::new_v4().to_string()).join("files")).unwrap();
    // As with a registry that was put back from a copy.
    let lost = Uuid::new_v4();
    std::fs::create_dir_all(all.join(lost.to_string()).join("files")).unwrap();
    std::fs::create_dir_all(all.join(lost.to_string()).join("staging")).unwrap();
    std::fs::write(all.join(lost.to_string()).join("files/note"), "not lost").unwrap();
    let second = pool(&folder).await;
    assert_eq!(std::fs::read_dir(&all).unwrap().count(), 2);
    let found = second.shared_files(lost).await.unwrap();
    assert_eq!(read(&found, "note").unwrap(), "not lost");
    assert!(second.shares().await.unwrap().iter().any(|it| it.name == lost.to_string()));
    assert_eq!(std::fs::read_dir(of.join("staging")).unwrap().count(), 0);
    let files = second.shared_files(share).await.unwrap();
    assert_eq!(read(&files, "kept").unwrap(), "kept");
}
