//! Archives made, read back and restored: whole volumes, other programs, faults.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::{self, File};
use std::io::Write as _;
use std::mem::MaybeUninit;
use std::os::unix::fs::{
    FileExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink,
};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use denizen_archive::{ArchiveId, Beside, Error, Reason, clean, list, verify};
use jiff::{SignedDuration, Timestamp};
use rustix::fs::{CWD, FileType, Mode, OFlags, Timespec, Timestamps, inotify};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use sha2::Digest as _;
use support::*;
use uuid::Uuid;

fn text(output: &std::process::Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!("{}{}", String::from_utf8_lossy(out), String::from_utf8_lossy(err))
}

/// Run by other tests in a process of its own; does nothing otherwise.
#[test]
fn child() {
    let Some(task) = std::env::var_os("DENIZEN_ARCHIVE_TASK") else { return };
    match task.to_str().unwrap() {
        "write" => match write(&argument(0), &argument(1)) {
            Ok(written) => println!("written {:?}", written.skipped),
            Err(error) => println!("failed {error:?} {error}"),
        },
        "restore" => match restore(&argument(0), &argument(1)) {
            Ok(restored) => println!("restored {:?}", restored.warnings),
            Err(error) => println!("failed {error:?} {error}"),
        },
        other => panic!("unknown task {other}"),
    }
}

#[test]
fn random_trees_come_back_entirely() {
    for seed in 0..12 {
        println!("seed {seed}");
        let bench = Bench::new();
        random_tree(&bench.volume, seed, 120);
        let before = picture(&bench.volume);
        let written = write(&bench.volume, &bench.destination).unwrap();
        assert_eq!(before, picture(&bench.volume), "the volume was changed");
        let summary = verify(&written.entry.path).unwrap();
        assert_eq!((summary.files, summary.bytes), (written.files, written.bytes));
        assert!(summary.sealed && written.skipped.is_empty());
        let restored = restore(&written.entry.path, &bench.into).unwrap();
        assert_eq!((restored.files, restored.bytes), (written.files, written.bytes));
        assert!(restored.sealed);
        assert_eq!(restored.warnings, Vec::<String>::new());
        compare(&bench.volume, &bench.into);
    }
}

#[test]
fn special_attributes_and_files_come_back() {
    let bench = Bench::new();
    let at = |name: &str| bench.volume.join(name);
    fs::write(at("acl"), "x").unwrap();
    let entries: [(u16, u16, u32); 5] =
        [(1, 6, u32::MAX), (2, 4, 1234), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 0, u32::MAX)];
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries {
        acl.extend(tag.to_le_bytes());
        acl.extend(perm.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    xattr::set(at("acl"), "system.posix_acl_access", &acl).unwrap();
    fs::write(at("empty-attribute"), "x").unwrap();
    xattr::set(at("empty-attribute"), "user.nothing", b"").unwrap();
    // Nine GiB, of which a page is data; and one that is all hole.
    let big = File::create(at("big")).unwrap();
    big.set_len(9 << 30).unwrap();
    big.write_all_at(b"far out", (9 << 30) - 7).unwrap();
    big.write_all_at(b"middle", 5 << 30).unwrap();
    File::create(at("hole")).unwrap().set_len(1 << 20).unwrap();
    symlink("/etc/passwd", at("absolute")).unwrap();
    symlink("../../..", at("up")).unwrap();
    symlink("nowhere", at("dangling")).unwrap();
    fs::hard_link(at("dangling"), at("dangling again")).unwrap();
    if is_root() {
        fs::write(at("capable"), "x").unwrap();
        let mut capability = vec![1, 0, 0, 2];
        capability.extend([0x20, 0, 0, 0].iter().chain(&[0; 12]));
        std::os::unix::fs::chown(at("capable"), Some(1000), Some(1000)).unwrap();
        xattr::set(at("capable"), "security.capability", &capability).unwrap();
        fs::create_dir(at("opaque")).unwrap();
        xattr::set(at("opaque"), "trusted.overlay.opaque", b"y").unwrap();
    }
    rustix::fs::mknodat(CWD, at("deleted"), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    let written = write(&bench.volume, &bench.destination).unwrap();
    assert!(written.entry.bytes < 1 << 20, "{written:?}");
    let restored = restore(&written.entry.path, &bench.into).unwrap();
    assert!(restored.warnings.is_empty(), "{restored:?}");
    compare(&bench.volume, &bench.into);
    assert!(fs::metadata(bench.into.join("big")).unwrap().blocks() < 1000);
}

#[test]
fn what_no_backup_can_hold_is_reported() {
    let bench = Bench::new();
    let _listener = UnixListener::bind(bench.volume.join("socket")).unwrap();
    let mut expected = vec![("socket", Reason::Socket)];
    if is_root() {
        let path = bench.volume.join("null");
        let device = rustix::fs::makedev(1, 3);
        rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), device).unwrap();
        expected.insert(0, ("null", Reason::Device));
    }
    let written = write(&bench.volume, &bench.destination).unwrap();
    let skipped: Vec<_> = written.skipped.iter().map(|s| (s.path.clone(), s.reason)).collect();
    let expected: Vec<_> =
        expected.into_iter().map(|(name, reason)| (bench.volume.join(name), reason)).collect();
    assert_eq!(skipped, expected);
    restore(&written.entry.path, &bench.into).unwrap();
    assert_eq!(fs::read_dir(&bench.into).unwrap().count(), 0);
}

#[test]
fn what_is_mounted_inside_stays_outside() {
    let bench = Bench::new();
    fs::create_dir(bench.volume.join("mount")).unwrap();
    fs::write(bench.volume.join("file"), "the volume's").unwrap();
    let exe = std::env::current_exe().unwrap();
    let script = format!(
        "mount -t tmpfs none {0}/mount && echo secret > {0}/mount/secret && \
         mount --bind /etc/hostname {0}/file && exec {1} --exact child --nocapture",
        bench.volume.display(),
        exe.display()
    );
    let mut command = in_child("write", &[&bench.volume, &bench.destination]);
    let output = in_namespace(&mut command, &script);
    let output = text(&output);
    assert!(output.contains("written") && output.matches("MountPoint").count() == 2, "{output}");
    restore(&list(&bench.destination, None).unwrap()[0].path, &bench.into).unwrap();
    assert_eq!(fs::read_dir(bench.into.join("mount")).unwrap().count(), 0);
    assert!(!bench.into.join("file").exists());
}

/// Runs a script with mounts of its own, with the environment of `command`.
fn in_namespace(command: &mut Command, script: &str) -> std::process::Output {
    let mut unshare = Command::new("unshare");
    unshare.args(["--user", "--map-root-user", "--mount", "sh", "-ec", script]);
    for (key, value) in command.get_envs() {
        unshare.env(key, value.unwrap());
    }
    unshare.output().unwrap()
}

#[test]
fn very_deep_trees_do_not_need_a_descriptor_each() {
    let bench = Bench::new();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let mut fd = rustix::fs::open(&bench.volume, flags, Mode::empty()).unwrap();
    for depth in 0..400 {
        let name = format!("{depth:0>100}");
        rustix::fs::mkdirat(&fd, &name, Mode::RWXU).unwrap();
        rustix::fs::mkdirat(&fd, format!("{name}-beside"), Mode::RWXU).unwrap();
        fd = rustix::fs::openat(&fd, &name, flags, Mode::empty()).unwrap();
    }
    let first = write(&bench.volume, &bench.destination).unwrap();
    restore(&first.entry.path, &bench.into).unwrap();
    let again = write(&bench.into, &bench.destination).unwrap();
    assert!(unpacked(&first.entry.path) == unpacked(&again.entry.path), "trees differ");
}

/// Removes a tree that is deeper than the standard library can.
struct Deep<'a>(&'a Path);

impl Drop for Deep<'_> {
    fn drop(&mut self) {
        Command::new("rm").arg("-rf").arg(self.0).status().unwrap();
    }
}

#[test]
fn what_is_written_of_the_deepest_trees_is_restored() {
    let bench = Bench::new();
    let (_volume, _into) = (Deep(&bench.volume), Deep(&bench.into));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let mut fd = rustix::fs::open(&bench.volume, flags, Mode::empty()).unwrap();
    let time = Timespec { tv_sec: 7, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    for _ in 0..16_400 {
        rustix::fs::mkdirat(&fd, c"d", Mode::RWXU).unwrap();
        let below = rustix::fs::openat(&fd, c"d", flags, Mode::empty()).unwrap();
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755)).unwrap();
        rustix::fs::futimens(&fd, &times).unwrap();
        fd = below;
    }
    drop(fd);
    let first = write(&bench.volume, &bench.destination).unwrap().entry.path;
    assert_eq!(verify(&first).unwrap().entries, 16_401);
    restore(&first, &bench.into).unwrap();
    let mut fd = rustix::fs::open(&bench.into, flags, Mode::empty()).unwrap();
    for depth in 0..16_400 {
        let stat = rustix::fs::fstat(&fd).unwrap();
        assert_eq!((stat.st_mode & 0o7777, stat.st_mtime), (0o755, 7), "{depth}");
        fd = rustix::fs::openat(&fd, c"d", flags, Mode::empty()).unwrap();
    }
    assert!(rustix::fs::openat(&fd, c"d", flags, Mode::empty()).is_err());
}

#[test]
fn tar_reads_ours() {
    let bench = Bench::new();
    random_tree(&bench.volume, 4711, 150);
    let written = write(&bench.volume, &bench.destination).unwrap();
    fs::create_dir(&bench.into).unwrap();
    let output = Command::new("tar")
        .args(["--zstd", "--xattrs", "--xattrs-include=*", "--warning=no-timestamp", "-xpf"])
        .arg(&written.entry.path)
        .arg("-C")
        .arg(&bench.into)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(text(&output).replace("tar: ./", ""), "", "tar complained");
    compare(&bench.volume, &bench.into);
    let output = Command::new("tar").args(["--zstd", "-tf"]).arg(&written.entry.path).output();
    let output = text(&output.unwrap());
    assert!(output.starts_with("./\n") && !output.contains("seal"), "{output}");
}

#[test]
fn the_tar_crate_reads_ours() {
    let bench = Bench::new();
    random_tree(&bench.volume, 4712, 150);
    let written = write(&bench.volume, &bench.destination).unwrap();
    let stream = unpacked(&written.entry.path);
    let mut archive = tar::Archive::new(stream.as_slice());
    let read = archive.entries().unwrap().map(|entry| entry.unwrap()).count();
    let summary = verify(&written.entry.path).unwrap();
    assert_eq!(u64::try_from(read).unwrap(), summary.entries);
}

#[test]
fn archives_of_tar_are_restored() {
    for format in ["--format=gnu", "--format=posix", "--format=ustar"] {
        let bench = Bench::new();
        random_tree(&bench.volume, 31, 150);
        remove_linked_fifos(&bench.volume);
        if format != "--format=posix" {
            // These formats have neither attributes nor fractions of seconds.
            strip(&bench.volume, format == "--format=ustar");
        }
        let archive = bench.dir.path().join("other.tar.zst");
        let output = Command::new("tar")
            .args([format, "--zstd", "-cf"])
            .arg(&archive)
            .args(if format == "--format=posix" { &["--xattrs"][..] } else { &[] })
            .args(if format == "--format=ustar" { &[][..] } else { &["--sparse"] })
            .arg("-C")
            .arg(&bench.volume)
            .arg(".")
            .output()
            .unwrap();
        assert!(output.status.success(), "{format}: {}", text(&output));
        let restored = restore(&archive, &bench.into).unwrap();
        assert!(!restored.sealed && restored.warnings.is_empty(), "{restored:?}");
        if format == "--format=ustar" {
            fill_holes(&bench.volume);
            fill_holes(&bench.into);
        }
        compare(&bench.volume, &bench.into);
    }
}

/// GNU tar 1.34 makes two fifos of one with two names, whatever the format.
fn remove_linked_fifos(path: &Path) {
    let meta = fs::symlink_metadata(path).unwrap();
    if meta.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            remove_linked_fifos(&entry.unwrap().path());
        }
    } else if meta.file_type().is_fifo() && meta.nlink() > 1 {
        fs::remove_file(path).unwrap();
    }
}

/// Takes away what a poorer format cannot hold.
fn strip(path: &Path, much: bool) {
    let meta = fs::symlink_metadata(path).unwrap();
    if meta.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            let long = path.file_name().unwrap().len() >= 60
                || fs::read_link(&path).is_ok_and(|target| target.as_os_str().len() > 99);
            if much && long {
                let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
            } else {
                strip(&path, much);
            }
        }
    }
    if !meta.is_symlink() {
        for name in xattr::list(path).unwrap() {
            xattr::remove(path, name).unwrap();
        }
        if is_root() && much {
            std::os::unix::fs::chown(path, Some(1), Some(2)).unwrap();
            fs::set_permissions(path, meta.permissions()).unwrap();
        }
    }
    set_mtime(path, if much { meta.mtime().clamp(0, 1 << 30) } else { meta.mtime() }, 0);
}

fn fill_holes(path: &Path) {
    let meta = fs::symlink_metadata(path).unwrap();
    if meta.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            fill_holes(&entry.unwrap().path());
        }
    } else if meta.is_file() {
        let content = fs::read(path).unwrap();
        fs::OpenOptions::new().write(true).open(path).unwrap().write_all(&content).unwrap();
        set_mtime(path, meta.mtime(), meta.mtime_nsec());
        fs::set_permissions(path, meta.permissions()).unwrap();
    }
}

#[test]
fn archives_of_the_tar_crate_are_restored() {
    let bench = Bench::new();
    fs::create_dir_all(bench.volume.join("a/b")).unwrap();
    fs::write(bench.volume.join("a/b/c"), "content").unwrap();
    symlink("a/b/c", bench.volume.join("link")).unwrap();
    let long = "n".repeat(150);
    fs::write(bench.volume.join(&long), "long").unwrap();
    let archive = bench.dir.path().join("seed.tar.zst");
    let encoder = zstd::Encoder::new(File::create(&archive).unwrap(), 0).unwrap();
    let mut builder = tar::Builder::new(encoder.auto_finish());
    builder.follow_symlinks(false);
    builder.append_dir_all(".", &bench.volume).unwrap();
    builder.into_inner().map(drop).unwrap();
    let restored = restore(&archive, &bench.into).unwrap();
    assert_eq!((restored.files, restored.sealed), (2, false));
    assert_eq!(fs::read(bench.into.join("a/b/c")).unwrap(), b"content");
    assert_eq!(fs::read(bench.into.join(long)).unwrap(), b"long");
    assert_eq!(fs::read_link(bench.into.join("link")).unwrap(), Path::new("a/b/c"));
}

#[test]
fn names_sort_in_the_order_of_making_whatever_the_clock_does() {
    let bench = Bench::new();
    let other = Uuid::from_u128(9);
    let write_at = |session, time: Timestamp| {
        denizen_archive::write(&bench.volume, &bench.destination, session, time, &NEVER)
            .unwrap()
            .entry
    };
    let first = write_at(SESSION, now());
    assert_eq!(
        first.path.file_name().unwrap(),
        "01234567-89ab-4def-8123-456789abcdef-20260203T040506Z.tar.zst"
    );
    let same_second = write_at(SESSION, now());
    let set_back = write_at(SESSION, now() - SignedDuration::from_hours(24 * 365));
    let later = write_at(SESSION, now() + SignedDuration::from_hours(1));
    let foreign = write_at(other, Timestamp::from_second(-5).unwrap());
    assert_eq!(foreign.taken_at, Timestamp::UNIX_EPOCH);
    for name in ["notes.txt", ".hidden.partial", "x.tar.zst", "00.tar.zst"] {
        fs::write(bench.destination.join(name), "foreign").unwrap();
    }
    let upper = first.id.to_string().to_uppercase();
    fs::write(bench.destination.join(upper), "foreign").unwrap();
    fs::create_dir(bench.destination.join(first.id.to_string().replace("2026", "2029"))).unwrap();
    let ours = list(&bench.destination, Some(SESSION)).unwrap();
    assert_eq!(ours, [later, set_back, same_second, first.clone()]);
    assert_eq!(list(&bench.destination, None).unwrap().len(), 5);
    assert_eq!(list(&bench.destination, Some(other)).unwrap(), [foreign]);
    assert_eq!(first.id.to_string().parse::<ArchiveId>().unwrap(), first.id);
    assert!(clean(&bench.destination, None).unwrap().is_empty());
}

#[test]
fn nothing_is_replaced_and_a_taken_name_is_no_endless_loop() {
    let bench = Bench::new();
    let name = format!("{SESSION}-20260203T040506Z.tar.zst");
    fs::create_dir(bench.destination.join(name)).unwrap();
    let error = write(&bench.volume, &bench.destination).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error:?}");
    assert_eq!(bench.left_in_destination().len(), 1);
}

#[test]
fn missing_places_are_named() {
    let bench = Bench::new();
    let nowhere = bench.dir.path().join("nowhere");
    let error = write(&nowhere, &bench.destination).unwrap_err();
    assert!(matches!(&error, Error::VolumeMissing { path } if *path == nowhere), "{error:?}");
    let link = bench.dir.path().join("link");
    symlink(&bench.volume, &link).unwrap();
    let error = write(&link, &bench.destination).unwrap_err();
    assert!(matches!(error, Error::VolumeMissing { .. }), "{error:?}");
    for error in [
        write(&bench.volume, &nowhere).unwrap_err(),
        list(&nowhere, None).unwrap_err(),
        clean(&nowhere, None).unwrap_err(),
    ] {
        let named = matches!(&error, Error::DestinationMissing { path } if *path == nowhere);
        assert!(named, "{error:?}");
    }
    assert!(!nowhere.exists());
    let written = write(&bench.volume, &bench.destination).unwrap();
    fs::create_dir(&bench.into).unwrap();
    fs::write(bench.into.join("mine"), "keep").unwrap();
    let error = restore(&written.entry.path, &bench.into).unwrap_err();
    assert!(matches!(error, Error::NotEmpty { .. }), "{error:?}");
    assert_eq!(fs::read(bench.into.join("mine")).unwrap(), b"keep");
}

#[test]
fn cancelling_leaves_nothing() {
    let bench = Bench::new();
    random_tree(&bench.volume, 5, 30);
    let yes = AtomicBool::new(true);
    let (volume, destination) = (&bench.volume, &bench.destination);
    let error = denizen_archive::write(volume, destination, SESSION, now(), &yes).unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error:?}");
    assert!(bench.left_in_destination().is_empty());
    let written = write(volume, destination).unwrap();
    let error = denizen_archive::restore(&written.entry.path, &bench.into, &yes).unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error:?}");
    assert!(!bench.into.exists());
}

/// Calls `then` when the partial file in `destination` has been written to.
fn when_writing(destination: &Path, ready: impl FnOnce(), then: impl FnOnce()) {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&watch, destination, inotify::WatchFlags::MODIFY).unwrap();
    ready();
    let mut room = [MaybeUninit::uninit(); 4096];
    inotify::Reader::new(&watch, &mut room).next().unwrap();
    then();
}

fn fill_with_noise(path: &Path, mebibytes: usize) {
    let mut file = File::create(path).unwrap();
    let mut random = Random::new(1);
    for _ in 0..mebibytes {
        file.write_all(&random.bytes(1 << 20)).unwrap();
    }
}

#[test]
fn a_volume_that_changes_meanwhile_is_not_kept() {
    let grow = |path: &Path| {
        fs::OpenOptions::new().append(true).open(path).unwrap().write_all(b"more").unwrap();
    };
    let changes: [(&str, &dyn Fn(&Path)); 6] = [
        ("grows", &|volume| grow(&volume.join("z-last"))),
        ("grows while read", &|volume| {
            let file = fs::OpenOptions::new().append(true).open(volume.join("noise")).unwrap();
            (&file).write_all(b"more").unwrap();
        }),
        ("shrinks", &|volume| {
            fs::OpenOptions::new()
                .write(true)
                .open(volume.join("noise"))
                .unwrap()
                .set_len(9)
                .unwrap();
        }),
        ("vanishes", &|volume| fs::remove_file(volume.join("z-last")).unwrap()),
        ("appears", &|volume| fs::write(volume.join("a-new"), "new").unwrap()),
        ("turns into a symlink", &|volume| {
            fs::remove_dir(volume.join("z-folder")).unwrap();
            symlink("/etc", volume.join("z-folder")).unwrap();
        }),
    ];
    for (what, change) in changes {
        let bench = Bench::new();
        fill_with_noise(&bench.volume.join("noise"), 48);
        fs::create_dir(bench.volume.join("z-folder")).unwrap();
        fs::write(bench.volume.join("z-last"), "last").unwrap();
        let result = std::thread::scope(|scope| {
            let mut writer = None;
            when_writing(
                &bench.destination,
                || writer = Some(scope.spawn(|| write(&bench.volume, &bench.destination))),
                || change(&bench.volume),
            );
            writer.unwrap().join().unwrap()
        });
        if what == "grows" {
            // It had not been read yet: an honest archive of the file as it is now, or none.
            if let Ok(written) = &result {
                restore(&written.entry.path, &bench.into).unwrap();
                assert_eq!(fs::read(bench.into.join("z-last")).unwrap(), b"lastmore");
            }
            continue;
        }
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Changed { .. }), "{what}: {error:?}");
        assert!(bench.left_in_destination().is_empty(), "{what}");
    }
}

#[test]
fn a_killed_writer_leaves_only_what_clean_removes() {
    let bench = Bench::new();
    fill_with_noise(&bench.volume.join("noise"), 64);
    let writer = std::cell::RefCell::new(None);
    let mut stopped = None;
    when_writing(
        &bench.destination,
        || {
            let mut command = in_child("write", &[&bench.volume, &bench.destination]);
            *writer.borrow_mut() = Some(command.stdout(Stdio::null()).spawn().unwrap());
        },
        || stopped = Some(Pid::from_child(writer.borrow().as_ref().unwrap())),
    );
    let writer = writer.into_inner();
    let pid = stopped.unwrap();
    // Stopped, so that it is neither done nor dead while we look.
    kill_process(pid, Signal::STOP).unwrap();
    waitpid(Some(pid), WaitOptions::UNTRACED).unwrap();
    assert_eq!(bench.left_in_destination().len(), 1);
    assert!(list(&bench.destination, None).unwrap().is_empty());
    assert!(clean(&bench.destination, None).unwrap().is_empty(), "hit a living writer");
    kill_process(pid, Signal::KILL).unwrap();
    writer.unwrap().wait().unwrap();
    assert!(list(&bench.destination, None).unwrap().is_empty());
    assert!(clean(&bench.destination, Some(Uuid::nil())).unwrap().is_empty());
    assert_eq!(clean(&bench.destination, Some(SESSION)).unwrap().len(), 1);
    assert!(bench.left_in_destination().is_empty());
    write(&bench.volume, &bench.destination).unwrap();
}

#[test]
fn a_full_or_read_only_destination_is_told_apart() {
    let bench = Bench::new();
    fill_with_noise(&bench.volume.join("noise"), 3);
    let exe = std::env::current_exe().unwrap();
    let run = format!("{} --exact child --nocapture", exe.display());
    let place = bench.destination.display();
    let mut command = in_child("write", &[&bench.volume, &bench.destination]);
    let script = format!("mount -t tmpfs -o size=1m none {place}; {run}; ls -A {place} | wc -l");
    let output = text(&in_namespace(&mut command, &script));
    assert!(output.contains("failed NoSpace") && output.ends_with("\n0\n"), "{output}");
    let script = format!("mount -t tmpfs -o ro none {place}; {run}");
    let output = text(&in_namespace(&mut command, &script));
    assert!(output.contains("failed ReadOnly"), "{output}");
    // The same for the place restored into.
    let written = write(&bench.volume, &bench.destination).unwrap();
    fs::create_dir(&bench.into).unwrap();
    let mut command = in_child("restore", &[&written.entry.path, &bench.into]);
    let place = bench.into.display();
    let script = format!("mount -t tmpfs -o size=1m none {place}; {run}; ls -A {place} | wc -l");
    let output = text(&in_namespace(&mut command, &script));
    assert!(output.contains("failed NoSpace") && output.ends_with("\n0\n"), "{output}");
}

#[test]
fn what_the_user_may_not_read_is_named_and_left_alone() {
    let bench = Bench::new();
    let me = if is_root() { 65_534 } else { rustix::process::geteuid().as_raw() };
    let closed = bench.volume.join("closed");
    fs::write(&closed, "x").unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o0)).unwrap();
    let mut command = in_child("write", &[&bench.volume, &bench.destination]);
    if is_root() {
        for path in [bench.dir.path(), &bench.volume, &bench.destination, &closed] {
            std::os::unix::fs::chown(path, Some(me), Some(me)).unwrap();
        }
        // The test program itself may lie where only root can go.
        let exe = bench.dir.path().join("exe");
        fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
        let mut other = Command::new(exe);
        other.args(command.get_args()).current_dir("/").uid(me).gid(me);
        for (key, value) in command.get_envs() {
            other.env(key, value.unwrap());
        }
        command = other;
    }
    let output = text(&command.output().unwrap());
    assert!(output.contains("failed Denied") && output.contains("volume/closed"), "{output}");
    assert_eq!(fs::metadata(&closed).unwrap().mode() & 0o7777, 0);
    assert!(bench.left_in_destination().is_empty());
}

const NOBODY: u32 = 65_534;

/// For root: a restore by somebody else, in a process of its own.
fn restore_as_nobody(bench: &Bench, archive: &Path) -> Command {
    for path in [bench.dir.path(), archive] {
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    // The test program itself may lie where only root can go.
    let exe = bench.dir.path().join("exe");
    fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    let command = in_child("restore", &[archive, &bench.into]);
    let mut other = Command::new(exe);
    other.args(command.get_args()).current_dir("/").uid(NOBODY).gid(NOBODY);
    for (key, value) in command.get_envs() {
        other.env(key, value.unwrap());
    }
    other
}

/// An archive of another program's.
fn foreign(archive: &Path, entries: &[(&str, u8, u32, u64)]) {
    let mut builder = tar::Builder::new(Vec::new());
    for &(name, kind, mode, mtime) in entries {
        let link = if kind == b'1' { b"shut/in/file".as_slice() } else { b"" };
        let mut header = raw_header(name.as_bytes(), kind, link, 0);
        header.set_mode(mode);
        header.set_mtime(mtime);
        header.set_cksum();
        builder.append(&header, std::io::empty()).unwrap();
    }
    pack(archive, &builder.into_inner().unwrap());
}

#[test]
fn an_archive_may_come_back_to_folders_that_are_closed() {
    let bench = Bench::new();
    let archive = bench.dir.path().join("foreign");
    foreign(
        &archive,
        &[
            ("./", b'5', 0o755, 10),
            ("closed/", b'5', 0o500, 20),
            ("closed/file", b'0', 0o400, 21),
            ("shut/", b'5', 0o000, 30),
            ("shut/in/", b'5', 0o300, 31),
            ("shut/in/file", b'0', 0o400, 32),
            ("other/", b'5', 0o755, 40),
            ("closed/late", b'0', 0o400, 22),
            ("shut/in/late", b'0', 0o400, 33),
            ("other/link", b'1', 0o400, 0),
            ("shut/in/again/", b'5', 0o777, 34),
            ("closed/implied/file", b'0', 0o400, 23),
            ("closed/", b'5', 0o111, 25),
            ("last", b'0', 0o400, 11),
        ],
    );
    if is_root() {
        let output = text(&restore_as_nobody(&bench, &archive).output().unwrap());
        assert!(output.contains("restored"), "{output}");
    } else {
        restore(&archive, &bench.into).unwrap();
    }
    let found = |name: &str| {
        let path = bench.into.join(name);
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            // So that whoever is not root can go on looking.
            fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
        }
        (meta.mode() & 0o7777, meta.mtime(), meta.nlink())
    };
    assert_eq!(found("."), (0o755, 10, 5));
    assert_eq!(found("closed"), (0o111, 25, 3));
    assert_eq!(found("closed/implied").0, 0o755);
    assert_eq!(found("shut"), (0o000, 30, 3));
    assert_eq!(found("shut/in"), (0o300, 31, 3));
    assert_eq!(found("shut/in/again"), (0o777, 34, 2));
    assert_eq!(found("shut/in/late"), (0o400, 33, 1));
    assert_eq!(found("other"), (0o755, 40, 2));
    assert_eq!(found("other/link"), (0o400, 32, 2));
    assert_eq!(found("closed/implied/file"), (0o400, 23, 1));
}

#[test]
fn what_comes_late_into_a_folder_inherits_nothing() {
    let bench = Bench::new();
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, perm, id) in [
        (1_u16, 7_u16, u32::MAX),
        (2, 7, 1234),
        (4, 5, u32::MAX),
        (16, 7, u32::MAX),
        (32, 5, u32::MAX),
    ] {
        acl.extend(tag.to_le_bytes());
        acl.extend(perm.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    let mut builder = tar::Builder::new(Vec::new());
    let attributes = ["system.posix_acl_default", "system.posix_acl_access", "user.x"];
    let keys = attributes.map(|name| format!("SCHILY.xattr.{name}"));
    builder.append_pax_extensions(keys.iter().map(|key| (&**key, &*acl))).unwrap();
    let mut put = |name: &str, kind| {
        let mut header = raw_header(name.as_bytes(), kind, b"", 0);
        header.set_mode(0o775);
        header.set_cksum();
        builder.append(&header, std::io::empty()).unwrap();
    };
    for (name, kind) in
        [("a/", b'5'), ("a/early", b'0'), ("b/", b'5'), ("a/late", b'0'), ("a/below/", b'5')]
    {
        put(name, kind);
    }
    let as_it_was = builder.get_ref().clone();
    let mut put = |name: &str, kind| {
        let header = raw_header(name.as_bytes(), kind, b"", 0);
        builder.append(&header, std::io::empty()).unwrap();
    };
    put("b/file", b'0');
    put("a/", b'5');
    let archive = bench.dir.path().join("foreign");
    pack(&archive, &[as_it_was, vec![0; 1024]].concat());
    restore(&archive, &bench.into).unwrap();
    for name in attributes {
        let value = xattr::get(bench.into.join("a"), name).unwrap();
        assert_eq!(value.as_ref(), Some(&acl), "{name}");
    }
    for name in ["a/early", "a/late", "a/below", "b"] {
        assert_eq!(xattr::list(bench.into.join(name)).unwrap().count(), 0, "{name}");
    }
    // Told again, without them.
    fs::remove_dir_all(&bench.into).unwrap();
    pack(&archive, &builder.into_inner().unwrap());
    restore(&archive, &bench.into).unwrap();
    assert_eq!(xattr::list(bench.into.join("a")).unwrap().count(), 0);
    assert_eq!(fs::metadata(bench.into.join("a")).unwrap().mode() & 0o7777, 0o644);
}

/// A folder that is like the changes of a root: nothing in it says that it is none.
fn like_root_changes(path: &Path) {
    fs::create_dir_all(path.join("upper/etc")).unwrap();
    fs::write(path.join("base.json"), "{}").unwrap();
    fs::write(path.join("upper/etc/file"), path.to_str().unwrap()).unwrap();
}

fn write_beside(bench: &Bench, beside: Option<&Path>) -> Result<denizen_archive::Written, Error> {
    let source = denizen_archive::Source { volume: &bench.volume, beside, owners: None };
    denizen_archive::write(source, &bench.destination, SESSION, now(), &NEVER)
}

#[test]
fn what_is_beside_takes_a_name_that_is_free() {
    let own: [(&str, &dyn Fn(&Path)); 6] = [
        (".denizen", &|_| {}),
        (".denizen-1", &like_root_changes),
        (".denizen-1", &|path| fs::write(path, "mine").unwrap()),
        (".denizen-1", &|path| symlink("/etc", path).unwrap()),
        (".denizen-1", &|path| fs::create_dir(path).unwrap()),
        (".denizen-2", &|path| {
            fs::create_dir(path).unwrap();
            like_root_changes(&path.with_file_name(".denizen-1"));
        }),
    ];
    for (round, (name, make)) in own.into_iter().enumerate() {
        println!("round {round}");
        let bench = Bench::new();
        fs::write(bench.volume.join("file"), "mine").unwrap();
        make(&bench.volume.join(".denizen"));
        let beside = bench.dir.path().join("beside");
        like_root_changes(&beside);
        let written = write_beside(&bench, Some(&beside)).unwrap();
        assert_eq!(written.skipped, []);
        assert!(verify(&written.entry.path).unwrap().sealed);
        let restored = restore(&written.entry.path, &bench.into).unwrap();
        assert_eq!(restored.beside, Beside::Named(name.into()));
        let out = bench.dir.path().join("out");
        fs::rename(bench.into.join(name), &out).unwrap();
        let meta = fs::metadata(&bench.volume).unwrap();
        set_mtime(&bench.into, meta.mtime(), meta.mtime_nsec());
        compare(&bench.volume, &bench.into);
        compare(&beside, &out);
        // Other programs see both, and nothing to complain of.
        let output = Command::new("tar").args(["--zstd", "-tf"]).arg(&written.entry.path).output();
        let output = text(&output.unwrap());
        assert!(output.starts_with("./\n./") && !output.contains("tar:"), "{output}");
        assert!(output.contains(&format!("\n./{name}/base.json\n")), "{output}");
    }
}

#[test]
fn what_is_beside_is_said_and_not_guessed() {
    let bench = Bench::new();
    like_root_changes(&bench.volume.join(".denizen"));
    set_mtime(&bench.volume, 5, 0);
    let written = write_beside(&bench, None).unwrap();
    let restored = restore(&written.entry.path, &bench.into).unwrap();
    assert_eq!(restored.beside, Beside::Nothing);
    compare(&bench.volume, &bench.into);
    // As it was before archives said so: the same without the comment on the first entry.
    let stream = &unpacked(&written.entry.path)[1024..];
    let digest: String =
        sha2::Sha256::digest(stream).iter().map(|byte| format!("{byte:02x}")).collect();
    let text = format!("denizen-seal 1 sha256:{digest} entries:{:020}", 6);
    let mut old = zstd::encode_all(stream, 1).unwrap();
    old.extend([0x5d, 0x2a, 0x4d, 0x18, 115, 0, 0, 0]);
    old.extend(text.as_bytes());
    let archive = bench.destination.join("old");
    fs::write(&archive, old).unwrap();
    fs::remove_dir_all(&bench.into).unwrap();
    let restored = restore(&archive, &bench.into).unwrap();
    assert_eq!((restored.beside, restored.sealed), (Beside::Unsaid, true));
    compare(&bench.volume, &bench.into);
}

#[test]
fn a_user_restores_what_root_wrote_with_warnings() {
    if !is_root() {
        return;
    }
    let bench = Bench::new();
    let program = bench.volume.join("program");
    fs::write(&program, "x").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
    xattr::set(&program, "trusted.mark", b"x").unwrap();
    // Closed to its owner: it must be fillable, and removable when the restore fails.
    fs::create_dir(bench.volume.join("closed")).unwrap();
    fs::write(bench.volume.join("closed/file"), "x").unwrap();
    let mode = fs::Permissions::from_mode(0o0);
    fs::set_permissions(bench.volume.join("closed"), mode).unwrap();
    let written = write(&bench.volume, &bench.destination).unwrap();
    let archive = bench.dir.path().join("readable");
    fs::copy(&written.entry.path, &archive).unwrap();
    let mut other = restore_as_nobody(&bench, &archive);
    let output = text(&other.output().unwrap());
    assert!(output.contains("restored") && output.contains("trusted.mark"), "{output}");
    assert!(output.contains("setuid"), "{output}");
    let meta = fs::metadata(bench.into.join("program")).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o755, NOBODY));
    assert_eq!(fs::metadata(bench.into.join("closed")).unwrap().mode() & 0o7777, 0);
    // A failure at the very end, with every directory's mode set already.
    fs::remove_dir_all(&bench.into).unwrap();
    let mut stream = unpacked(&written.entry.path);
    let end = stream.len() - 1024;
    stream[end..].fill(1);
    pack(&archive, &stream);
    let output = text(&other.output().unwrap());
    assert!(output.contains("failed Damaged"), "{output}");
    assert!(!bench.into.exists());
}

#[test]
fn two_writers_of_one_session_both_succeed() {
    let bench = Bench::new();
    random_tree(&bench.volume, 8, 40);
    let cleaner_stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> =
            (0..4).map(|_| scope.spawn(|| write(&bench.volume, &bench.destination))).collect();
        scope.spawn(|| {
            // Cleaning all the while hits none of them.
            while !cleaner_stop.load(Ordering::Relaxed) {
                clean(&bench.destination, None).unwrap();
            }
        });
        let results: Vec<_> = writers.into_iter().map(|w| w.join()).collect();
        cleaner_stop.store(true, Ordering::Relaxed);
        for result in results {
            verify(&result.unwrap().unwrap().entry.path).unwrap();
        }
    });
    assert_eq!(list(&bench.destination, Some(SESSION)).unwrap().len(), 4);
}
