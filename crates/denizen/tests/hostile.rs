//! What a session, a backup that others have changed, or the host's own files must not be able
//! to do to whoever runs sandboxes.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use denizen::{Isolation, MicroVmManager, VmPoolConfig};
use tempfile::TempDir;
use uuid::Uuid;

use crate::common::{cache, text};

fn open(folder: &Path) -> Arc<MicroVmManager> {
    let config = VmPoolConfig {
        enabled: true,
        volume_root: folder.join("pool"),
        shell: "/bin/sh".into(),
        shell_args: vec!["-c".to_owned()],
        ..VmPoolConfig::default()
    };
    let builder = MicroVmManager::builder((&config).into()).isolation(Isolation::Sandbox);
    builder.cache(cache()).build().unwrap()
}

/// A session that has run and was stopped, and its folder.
async fn stopped(pool: &MicroVmManager) -> (Uuid, PathBuf) {
    let id = Uuid::new_v4();
    drop(pool.acquire(id).await.unwrap());
    pool.stop(id, true).await.unwrap();
    (id, pool.session_folder(id).unwrap())
}

/// Why the session does not start, which must not take long.
async fn refusal(pool: &MicroVmManager, id: Uuid) -> String {
    let started = tokio::time::timeout(Duration::from_secs(20), pool.acquire(id)).await;
    match started {
        Ok(Err(error)) => error.to_string(),
        Ok(Ok(_)) => "it starts".to_owned(),
        Err(_) => "it waits".to_owned(),
    }
}

/// A file or folder of the host, gone when this is dropped.
struct OfHost(PathBuf);

impl Drop for OfHost {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0).or_else(|_| fs::remove_dir_all(&self.0));
    }
}

#[tokio::test]
async fn what_others_may_not_read_below_usr_stays_shut() {
    let below = Path::new("/usr/local/share");
    if !rustix::process::geteuid().is_root() || !below.is_dir() {
        println!("skipped: only root has files there that others may not read");
        return;
    }
    let shut = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let name = format!("denizen-test-{}", Uuid::new_v4());
    let folder = TempDir::new().unwrap();
    // Before the sandbox is made, and while it runs.
    let file = OfHost(below.join(format!("{name}-file")));
    fs::write(&file.0, "secret").unwrap();
    shut(&file.0, 0o600);
    let pool = open(folder.path());
    let guard = pool.acquire(Uuid::new_v4()).await.unwrap();
    let later = OfHost(below.join(format!("{name}-folder")));
    fs::create_dir(&later.0).unwrap();
    fs::write(later.0.join("file"), "secret").unwrap();
    shut(&later.0, 0o700);
    let open_to_all = OfHost(below.join(format!("{name}-open")));
    fs::write(&open_to_all.0, "open").unwrap();
    shut(&open_to_all.0, 0o644);
    assert_eq!(text(&guard, &format!("cat {}", open_to_all.0.display())).await, "open");
    for path in [file.0.clone(), later.0.join("file")] {
        let path = path.display();
        for line in [
            format!("cat {path}"),
            format!("chmod 644 {path}; cat {path}"),
            format!("chown 0:0 {path}; cat {path}"),
            format!("cp -a {path} copy; cat copy"),
            format!("mv {path} moved; cat moved"),
            format!("chmod -R 777 $(dirname {path})/{name}*; cat {path}"),
        ] {
            let output = guard.command(line.clone()).output().await.unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(!said.contains("secret"), "{line}: {output:?}");
        }
    }
}

#[tokio::test]
async fn counts_of_the_whole_user_are_limited_within() {
    let folder = TempDir::new().unwrap();
    let pool = open(folder.path());
    let guard = pool.acquire(Uuid::new_v4()).await.unwrap();
    let most = async |name: &str| text(&guard, &format!("cat /proc/sys/user/max_{name}")).await;
    assert_eq!(most("inotify_instances").await, "64\n");
    assert_eq!(most("inotify_watches").await, "65536\n");
    for kind in ["user", "net", "pid", "ipc", "uts", "cgroup"] {
        assert_eq!(most(&format!("{kind}_namespaces")).await, "0\n", "{kind}");
    }
    // They hold, and cannot be raised.
    let raise = "echo 1000 > /proc/sys/user/max_inotify_instances";
    assert!(!guard.command(raise).output().await.unwrap().exit.success());
    let program = "import ctypes\nlibc = ctypes.CDLL(None)\n\
                   print(sum(1 for _ in range(1000) if libc.inotify_init() >= 0))";
    let made = guard.program("python3").args(["-c", program]).output().await.unwrap();
    let made: u32 = String::from_utf8_lossy(&made.stdout).trim().parse().unwrap();
    assert!((1..=64).contains(&made), "{made}");
}

/// As a backup that others have changed could bring them.
#[tokio::test]
async fn links_in_the_place_of_a_sessions_folders_are_refused() {
    let folder = TempDir::new().unwrap();
    let outside = folder.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let pool = open(folder.path());
    for name in ["root/main", "root/usr", "work/main"] {
        let (id, home) = stopped(&pool).await;
        let place = home.join(name);
        fs::remove_dir_all(&place).unwrap();
        symlink(&outside, &place).unwrap();
        let why = refusal(&pool, id).await;
        assert!(why.contains("directory"), "{name}: {why}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{name}: written through");
        // Put right, it starts: nothing is left of the attempt.
        fs::remove_file(&place).unwrap();
        drop(pool.acquire(id).await.unwrap());
    }
    // What is new at every start takes the place of the link, not of what it leads to.
    let (id, home) = stopped(&pool).await;
    fs::write(outside.join("kept"), "").unwrap();
    fs::remove_dir_all(home.join("tmp")).unwrap();
    symlink(&outside, home.join("tmp")).unwrap();
    let guard = pool.acquire(id).await.unwrap();
    text(&guard, "touch /tmp/within").await;
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    drop(guard);
}

#[tokio::test]
async fn a_record_of_the_root_that_others_have_written_is_refused() {
    let folder = TempDir::new().unwrap();
    let outside = folder.path().join("outside.json");
    fs::write(&outside, "\"host\"").unwrap();
    let pool = open(folder.path());
    let too_big = format!(
        "{{\"image\":{{\"name\":\"{}\",\"digest\":\"\",\"layers\":[],\"env\":{{}}}}}}",
        "x".repeat(2 << 20)
    );
    let elsewhere = "{\"folder\":{\"path\":\"/root\"}}";
    let climbing = "{\"image\":{\"name\":\"a\",\"digest\":\"b\",\
                    \"layers\":[\"../../../../../../etc\"],\"env\":{}}}";
    let write = |content: &str| {
        let content = content.to_owned();
        Box::new(move |path: &Path| fs::write(path, &content).unwrap()) as Box<dyn Fn(&Path)>
    };
    let hostile: [(&str, Box<dyn Fn(&Path)>); 7] = [
        ("too big", write(&too_big)),
        ("a folder of the host", write(elsewhere)),
        ("a layer elsewhere", write(climbing)),
        ("not JSON", write("{")),
        ("a link", Box::new(|path| symlink(&outside, path).unwrap())),
        ("a folder", Box::new(|path| fs::create_dir(path).unwrap())),
        (
            "a fifo",
            Box::new(|path| {
                let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU);
                rustix::fs::mknodat(rustix::fs::CWD, path, kind, mode, 0).unwrap();
            }),
        ),
    ];
    let mut wrong = Vec::new();
    for (what, put) in hostile {
        let (id, home) = stopped(&pool).await;
        let record = home.join("root/base.json");
        fs::remove_file(&record).unwrap();
        put(&record);
        let why = refusal(&pool, id).await;
        if !why.contains("base.json") {
            wrong.push(format!("{what}: {why}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(fs::read_to_string(&outside).unwrap(), "\"host\"");
}
