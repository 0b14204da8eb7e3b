//! Attempts on files outside: the host's secrets, other sessions' volumes, and files of the
//! host that a session must not change. A file is changed only where `marker` says so.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, XattrFlags};

use crate::attempt::{
    Attempt, Doing, Scratch, Verdict, any_of, below, held, holds, impossible, open,
    process_numbers, read, read_secret, read_text,
};
use crate::facts::Facts;
use crate::sys::{self, Arg};

pub const ATTEMPTS: &[Attempt] = &[
    Attempt::new("host-file", "A secret file outside can be read by its path.", |facts| {
        read_secret(facts, &facts.path("host-file")?)
    })
    .control(),
    Attempt::new("host-file-dotdot", "`..` goes above the root and down to a secret.", dotdot)
        .control(),
    Attempt::new(
        "host-file-proc-root",
        "A process's /proc/PID/root leads to the host's root.",
        |facts| through_processes(facts, |pid| format!("/proc/{pid}/root")),
    )
    .control(),
    Attempt::new(
        "host-file-proc-task-root",
        "A thread's /proc/PID/task/TID/root leads to the host's root.",
        |facts| through_processes(facts, |pid| format!("/proc/{pid}/task/{pid}/root")),
    )
    .control(),
    Attempt::new(
        "host-file-proc-cwd",
        "A process's working directory lies outside, and `..` from it reaches the host.",
        |facts| through_processes(facts, |pid| format!("/proc/{pid}/cwd/{}", "../".repeat(40))),
    )
    .control(),
    Attempt::new(
        "host-file-proc-fd",
        "A file that another process has open outside can be opened again through /proc/PID/fd.",
        through_descriptors,
    )
    .control(),
    Attempt::new(
        "host-file-chroot-fchdir",
        "A descriptor kept over chroot(2) leads out of the root.",
        chroot_fchdir,
    )
    .control(),
    Attempt::new(
        "host-file-chroot-cwd",
        "A working directory left outside a new root leads out of the root.",
        chroot_cwd,
    )
    .control(),
    Attempt::new(
        "host-file-handle",
        "open_by_handle_at(2) opens a file of the host by its handle.",
        host_handle,
    )
    .control(),
    Attempt::new(
        "host-root-handle",
        "open_by_handle_at(2) opens the root of the file system that a mount is a part of.",
        root_handle,
    ),
    Attempt::new(
        "own-handle",
        "open_by_handle_at(2) is allowed, which makes folders no boundary.",
        own_handle,
    )
    .surface()
    .control(),
    Attempt::new(
        "inherited-descriptors",
        "A command starts with descriptors beyond the three it should have.",
        inherited,
    )
    .control()
    .needs("test: start it with descriptor 3 open"),
    Attempt::new(
        "inherited-folder",
        "One of the descriptors a command starts with is a folder that leads to the host.",
        inherited_folder,
    )
    .control()
    .needs("test: start it with descriptor 3 open on the root folder"),
    Attempt::new(
        "old-root",
        "A mount that was left over shows the host's root below it.",
        old_root,
    )
    .control(),
    Attempt::new("other-volume", "Another session's files can be read.", other_volume).control(),
    Attempt::new(
        "other-volume-write",
        "A file can be made in another session's volume.",
        other_volume_write,
    )
    .control(),
    Attempt::new("volume-root", "The volume root shows what sessions there are.", volume_root)
        .control(),
    Attempt::new(
        "volume-root-in-mounts",
        "The table of mounts tells where the volume root is on the host.",
        volume_root_in_mounts,
    )
    .leak(),
    Attempt::new("shadow", "The host's /etc/shadow can be read.", shadow)
        .control()
        .needs("test: the stage could read /etc/shadow"),
    Attempt::new("ssh-host-keys", "The host's private SSH keys can be read.", ssh_host_keys),
    Attempt::new("private-files", "Well-known files with credentials can be read.", private_files),
    Attempt::new("homes", "The home folders of the host's users show their files.", homes),
    Attempt::new("home-file", "A secret in a home folder of the host can be read.", |facts| {
        read_secret(facts, &facts.path("home-file")?)
    })
    .control()
    .needs("test: the stage could make a file in its home folder"),
    Attempt::new("tmp-file", "A file in the host's /tmp can be read.", |facts| {
        read_secret(facts, &facts.path("tmp-file")?)
    })
    .control(),
    Attempt::new("run-file", "A file in the host's /run can be read.", |facts| {
        read_secret(facts, &facts.path("run-file")?)
    })
    .control()
    .needs("test: the stage could make a file in /run"),
    Attempt::new("marker-write", "A file of the host can be written to.", |facts| {
        markers(facts, |path| open_append(path)?.write_all(b"written by marker-write\n"))
    })
    .control(),
    Attempt::new("marker-replace", "A file of the host can be replaced by rename(2).", |facts| {
        markers(facts, |path| {
            let new = path.with_extension("new");
            std::fs::write(&new, "written by marker-replace\n")?;
            std::fs::rename(&new, path)
        })
    })
    .control(),
    Attempt::new("marker-mode", "The mode of a file of the host can be changed.", |facts| {
        markers(facts, |path| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o606))
        })
    })
    .control(),
    Attempt::new(
        "marker-link",
        "A hard link to a file of the host can be made and written through.",
        |facts| {
            markers(facts, |path| {
                let link = path.with_extension("link");
                std::fs::hard_link(path, &link)?;
                let written = open_append(&link)
                    .and_then(|mut file| file.write_all(b"written by marker-link\n"));
                std::fs::remove_file(&link)?;
                written
            })
        },
    )
    .control(),
    Attempt::new("marker-remove", "A file of the host can be removed.", |facts| {
        markers(facts, |path| {
            std::fs::remove_file(path)?;
            // The same file system has to be seen afterwards, so it comes back.
            std::fs::write(path, "written by marker-remove\n")
        })
    })
    .control(),
    Attempt::new(
        "marker-proc-root",
        "A file of the host can be written to through a process's root.",
        |facts| {
            any_of(process_numbers(), |pid| {
                let root = PathBuf::from(format!("/proc/{pid}/root"));
                any_of(facts.all("marker"), |marker| {
                    change(facts, &below(&root, Path::new(marker)), marker, |path| {
                        open_append(path)?.write_all(b"written by marker-proc-root\n")
                    })
                })
            })
        },
    )
    .control(),
    Attempt::new(
        "rename-race",
        "A path that is exchanged while it is looked up leads to a file outside.",
        rename_race,
    )
    .control(),
    Attempt::new(
        "overlay-redirect",
        "An extended attribute of overlayfs on a folder of one's own redirects it to the host.",
        overlay_redirect,
    ),
    Attempt::new(
        "overlay-metacopy",
        "An extended attribute of overlayfs makes a file of one's own show the host's data.",
        overlay_metacopy,
    ),
    Attempt::new(
        "overlay-layers",
        "A layer of the session's own root can be opened by the path that the mounts tell.",
        overlay_layers,
    ),
    Attempt::new(
        "self-executable",
        "The file this program was started from can be opened for writing.",
        own_executable,
    )
    .control(),
];

fn dotdot(facts: &Facts) -> Verdict {
    let file = facts.path("host-file")?;
    any_of(["/", "."], |start| {
        let up = Path::new(start).join("../".repeat(64));
        read_secret(facts, &below(&up, &file))
    })
}

/// Reads the secret through something of every process that can be seen.
fn through_processes(facts: &Facts, root: impl Fn(i32) -> String) -> Verdict {
    let file = facts.path("host-file")?;
    any_of(process_numbers(), |pid| read_secret(facts, &below(Path::new(&root(pid)), &file)))
}

/// Opens what others have open: files for what is in them, folders for what is below them.
fn through_descriptors(facts: &Facts) -> Verdict {
    let file = facts.path("host-file")?;
    let me = std::process::id();
    let others = process_numbers().into_iter().filter(|pid| pid.cast_unsigned() != me);
    any_of(others, |pid| {
        let folder = format!("/proc/{pid}/fd");
        let entries: Vec<_> = std::fs::read_dir(&folder).doing(&folder)?.flatten().collect();
        any_of(entries, |entry| {
            let path = entry.path();
            let meta = std::fs::metadata(&path).doing(&folder)?;
            if meta.is_dir() {
                return read_secret(facts, &below(&path.join("../".repeat(40)), &file));
            }
            if meta.is_file() { read_secret(facts, &path) } else { held("not a file") }
        })
    })
}

fn chroot_fchdir(facts: &Facts) -> Verdict {
    let file = facts.path("host-file")?;
    let scratch = Scratch::new()?;
    let kept = open(Path::new("/")).preparing("/")?;
    rustix::process::chroot(scratch.path()).doing("chroot")?;
    rustix::process::fchdir(&kept).doing("fchdir")?;
    climb_and_read(facts, &file)
}

fn chroot_cwd(facts: &Facts) -> Verdict {
    let file = facts.path("host-file")?;
    let scratch = Scratch::new()?;
    std::env::set_current_dir("/").preparing("/")?;
    rustix::process::chroot(scratch.path()).doing("chroot")?;
    climb_and_read(facts, &file)
}

/// From a working directory that is outside the root, up to where it ends.
fn climb_and_read(facts: &Facts, file: &Path) -> Verdict {
    for _ in 0..64 {
        std::env::set_current_dir("..").doing("chdir")?;
    }
    rustix::process::chroot(".").doing("the second chroot")?;
    read_secret(facts, file)
}

/// A `file_handle` as the kernel wants it.
fn handle(kind: u32, bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap_or(0);
    [&sys::halves(&[length, kind]), bytes].concat()
}

/// The handle of a file, as type and bytes.
pub fn handle_of(path: &Path) -> std::io::Result<(u32, Vec<u8>)> {
    let mut buffer = handle(0, &[0; 128]);
    let mut mount = [0; 4];
    let name = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    sys::call(
        libc::SYS_name_to_handle_at,
        &mut [
            Arg::Num(i64::from(libc::AT_FDCWD)),
            Arg::Text(&name),
            Arg::Out(&mut buffer),
            Arg::Out(&mut mount),
            Arg::Num(0),
        ],
    )?;
    let number = |at: usize| {
        let bytes = buffer.get(at..at + 4).and_then(|part| part.try_into().ok());
        u32::from_ne_bytes(bytes.unwrap_or_default())
    };
    let end = 8 + usize::try_from(number(0)).unwrap_or(0);
    Ok((number(4), buffer.get(8..end).unwrap_or_default().to_vec()))
}

/// Opens a handle on the file system of `mount`.
fn open_handle(mount: &Path, handle: &mut [u8]) -> std::io::Result<std::os::fd::OwnedFd> {
    let at = open(mount)?;
    sys::owned(sys::call(
        libc::SYS_open_by_handle_at,
        &mut [
            Arg::Num(i64::from(at.as_raw_fd())),
            Arg::Out(handle),
            Arg::Num(i64::from(libc::O_RDONLY | libc::O_NONBLOCK | libc::O_CLOEXEC)),
        ],
    ))
}

/// Where the mounts are that can be seen.
pub fn mount_points() -> Vec<PathBuf> {
    let text = read_text("/proc/self/mountinfo").unwrap_or_default();
    let mut points: Vec<PathBuf> =
        text.lines().filter_map(|line| line.split(' ').nth(4).map(PathBuf::from)).collect();
    points.push("/".into());
    points.push(".".into());
    points
}

fn host_handle(facts: &Facts) -> Verdict {
    let text = facts.text("host-handle")?;
    let parsed = text.split_once(':').and_then(|(kind, hex)| {
        let bytes = (0..hex.len() / 2)
            .map(|at| u8::from_str_radix(hex.get(2 * at..2 * at + 2)?, 16).ok())
            .collect::<Option<Vec<u8>>>()?;
        Some((kind.parse().ok()?, bytes))
    });
    let Some((kind, bytes)) = parsed else {
        return impossible("--host-handle is not TYPE:HEX");
    };
    any_of(mount_points(), |mount| {
        let fd = open_handle(&mount, &mut handle(kind, &bytes)).doing("open_by_handle_at")?;
        read_secret(facts, Path::new(&format!("/proc/self/fd/{}", fd.as_raw_fd())))
    })
}

fn root_handle(facts: &Facts) -> Verdict {
    let file = facts.path("host-file")?;
    any_of(mount_points(), |mount| {
        // The root folder has number 2 in ext4, 128 in xfs and 256 in btrfs.
        any_of([2_u32, 128, 256], |inode| {
            let mut handle = handle(1, &sys::halves(&[inode, 0]));
            let fd = open_handle(&mount, &mut handle).doing("open_by_handle_at")?;
            let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
            read_secret(facts, &below(&path, &file))
        })
    })
}

fn own_handle(_: &Facts) -> Verdict {
    let scratch = Scratch::new()?;
    let file = scratch.file("file", b"own")?;
    let (kind, bytes) = handle_of(&file).doing("name_to_handle_at")?;
    open_handle(scratch.path(), &mut handle(kind, &bytes)).doing("open_by_handle_at")?;
    Ok("opened a file by its handle".into())
}

fn inherited(facts: &Facts) -> Verdict {
    let shown: Vec<String> = facts
        .inherited
        .iter()
        .map(|fd| {
            let target = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
            format!("{fd} is {}", target.display())
        })
        .collect();
    if shown.is_empty() {
        return held("nothing above descriptor 2 is open");
    }
    Ok(shown.join(", "))
}

fn inherited_folder(facts: &Facts) -> Verdict {
    let file = facts.path("host-file")?;
    let name =
        format!("{}{}", "../".repeat(40), file.display().to_string().trim_start_matches('/'));
    any_of([0, 1, 2].iter().chain(&facts.inherited), |fd| {
        let path = std::ffi::CString::new(name.as_str()).preparing("the path")?;
        let flags = i64::from(libc::O_RDONLY | libc::O_CLOEXEC);
        let opened = sys::owned(sys::call(
            libc::SYS_openat,
            &mut [Arg::Num(i64::from(*fd)), Arg::Text(&path), Arg::Num(flags)],
        ));
        let opened = opened.doing(&format!("openat from descriptor {fd}"))?;
        let link = format!("/proc/self/fd/{}", opened.as_raw_fd());
        // From the root of our own we get to our own; only another root is an escape.
        read_secret(facts, Path::new(&link))
    })
}

fn old_root(facts: &Facts) -> Verdict {
    let file = facts.path("host-file")?;
    let usual = ["/oldroot", "/old_root", "/.oldroot", "/.old", "/put_old", "/.pivot_root", "/mnt"];
    let guesses = usual.iter().map(PathBuf::from);
    any_of(guesses.chain(mount_points()), |root| read_secret(facts, &below(&root, &file)))
}

/// Looks for the secret in all files at the top of another session's volume.
fn other_volume(facts: &Facts) -> Verdict {
    let folder = facts.path("other-volume")?;
    let entries: Vec<_> = std::fs::read_dir(&folder)
        .doing(&folder.display().to_string())?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    any_of(entries, |path| read_secret(facts, &path))
}

fn other_volume_write(facts: &Facts) -> Verdict {
    let folder = facts.path("other-volume")?;
    let dev = std::fs::metadata(&folder).doing(&folder.display().to_string())?.dev();
    let root = std::fs::metadata("/").preparing("/")?.dev();
    let path = folder.join("left-by-an-escape");
    std::fs::write(&path, "left by other-volume-write\n").doing(&path.display().to_string())?;
    // A folder of that name in an overlay of our own is not the other session's.
    if dev == root && on_overlay(&path) {
        return held("made, but only in the overlay of this session");
    }
    std::fs::remove_file(&path).doing("removing it again")?;
    Ok(format!("made {}", path.display()))
}

fn on_overlay(path: &Path) -> bool {
    const OVERLAY: i64 = 0x794c_7630;
    rustix::fs::statfs(path).is_ok_and(|fs| fs.f_type == OVERLAY)
}

fn volume_root(facts: &Facts) -> Verdict {
    let root = facts.path("volume-root")?;
    let volume = facts.path("other-volume")?;
    let name = volume.strip_prefix(&root).ok().and_then(|rest| rest.iter().next());
    let Some(name) = name else {
        return impossible("--other-volume is not below --volume-root");
    };
    if root.join(name).exists() {
        return Ok(format!("{} is there", root.join(name).display()));
    }
    let names = std::fs::read_dir(&root).doing(&root.display().to_string())?.flatten();
    let found = names.map(|entry| entry.file_name()).any(|found| found == name);
    if found { Ok("the other session is listed".into()) } else { held("it is not listed") }
}

fn volume_root_in_mounts(facts: &Facts) -> Verdict {
    let root = facts.text("volume-root")?;
    any_of(["/proc/self/mountinfo", "/proc/self/mounts", "/proc/1/mountinfo"], |path| {
        let text = read_text(path).doing(path)?;
        match text.lines().find(|line| line.contains(root)) {
            Some(line) => Ok(format!("{path} says: {line}")),
            None => held(format!("{path} does not tell")),
        }
    })
}

/// The files with the passwords of users and groups, and what they were before.
pub const SHADOWS: [&str; 4] = ["/etc/shadow", "/etc/gshadow", "/etc/shadow-", "/etc/gshadow-"];

/// A number that two files with the same bytes share.
pub fn fingerprint(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

fn shadow(facts: &Facts) -> Verdict {
    facts.text("shadow-print")?;
    any_of(SHADOWS, |path| {
        let bytes = read(Path::new(path)).doing(path)?;
        let print = fingerprint(&bytes);
        if facts.all("shadow-print").any(|theirs| theirs == print) {
            return Ok(format!("{path} is the host's, {} bytes", bytes.len()));
        }
        held(format!("{path} is not the host's"))
    })
}

fn ssh_host_keys(_: &Facts) -> Verdict {
    let entries = std::fs::read_dir("/etc/ssh").doing("/etc/ssh")?.flatten();
    any_of(entries, |entry| read_private(&entry.path()))
}

fn read_private(path: &Path) -> Verdict {
    let bytes = read(path).doing(&path.display().to_string())?;
    if holds(&bytes, "PRIVATE KEY") {
        return Ok(format!("{} has a private key", path.display()));
    }
    held(format!("{} has no private key", path.display()))
}

fn private_files(_: &Facts) -> Verdict {
    let keys = std::fs::read_dir("/etc/ssl/private").into_iter().flatten().flatten();
    let files = [
        "/etc/krb5.keytab",
        "/var/lib/cloud/instance/user-data.txt",
        "/var/run/secrets/kubernetes.io/serviceaccount/token",
        "/var/lib/docker",
        "/var/lib/kubelet",
        "/etc/wireguard",
        "/etc/NetworkManager/system-connections",
    ];
    let files = files.iter().map(PathBuf::from);
    any_of(files.chain(keys.map(|entry| entry.path())), |path| {
        let got = if path.is_dir() {
            std::fs::read_dir(&path).map(Iterator::count)
        } else {
            read(&path).map(|bytes| bytes.len())
        };
        match got.doing(&path.display().to_string())? {
            0 => held(format!("{} is empty", path.display())),
            _ => Ok(format!("{} can be read", path.display())),
        }
    })
}

/// Any file below the folders in which people keep theirs. Those of the session's own user
/// are its own: `HOME` is left out, unless it is where the host's secret would be.
fn homes(_: &Facts) -> Verdict {
    let own = std::env::var_os("HOME").map(PathBuf::from);
    let homes = std::fs::read_dir("/home").into_iter().flatten().flatten();
    let homes = homes.map(|entry| entry.path()).chain([PathBuf::from("/root")]);
    any_of(homes.filter(|home| Some(home) != own.as_ref()), |home| {
        let entries = std::fs::read_dir(&home).doing(&home.display().to_string())?;
        // What a package manager puts into a new home is no secret.
        let usual = [".bashrc", ".profile", ".bash_logout"];
        let mut names = entries.flatten().map(|entry| entry.file_name());
        match names.find(|name| !usual.iter().any(|usual| name == usual)) {
            Some(name) => Ok(format!("{} is there", home.join(name).display())),
            None => held(format!("{} is empty", home.display())),
        }
    })
}

fn open_append(path: &Path) -> std::io::Result<std::fs::File> {
    OpenOptions::new().append(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// Changes each marker in turn.
fn markers(facts: &Facts, way: impl Fn(&Path) -> std::io::Result<()>) -> Verdict {
    facts.text("marker")?;
    any_of(facts.all("marker"), |marker| change(facts, Path::new(marker), marker, &way))
}

/// Changes a file, and says whether it was the host's or a copy in an overlay of ours. That
/// is told by the device number, which an overlay never shows as that of a layer; the
/// test's own look at the marker is what counts in the end.
fn change(
    facts: &Facts,
    path: &Path,
    marker: &str,
    way: impl Fn(&Path) -> std::io::Result<()>,
) -> Verdict {
    let shown = path.display().to_string();
    way(path).doing(&shown)?;
    let device = std::fs::metadata(path).doing(&shown)?.dev();
    let at = facts.all("marker").position(|one| one == marker).unwrap_or(0);
    let same = match facts.all("marker-dev").nth(at) {
        Some(theirs) => theirs.parse() == Ok(device),
        None => !on_overlay(path),
    };
    if same { Ok(format!("changed {shown}")) } else { held(format!("{shown}: a copy changed")) }
}

fn rename_race(facts: &Facts) -> Verdict {
    let file = facts.path("host-file")?;
    let scratch = Scratch::new()?;
    let deep = scratch.folder("deep")?;
    let name = scratch.join("flip");
    std::fs::create_dir(&name).preparing("a folder to work in")?;
    let link = scratch.join("link");
    std::os::unix::fs::symlink("/proc/1/root", &link).preparing("a symlink")?;
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                let _ = rustix::fs::renameat_with(CWD, &name, CWD, &link, flags);
                let _ = std::fs::rename(&deep, scratch.join("deeper"));
                let _ = std::fs::rename(scratch.join("deeper"), &deep);
            }
        });
        let up = "../".repeat(12);
        let verdict = any_of(0..5000, |round: i32| {
            let start = if round % 2 == 0 { &name } else { &deep };
            let root = if round % 4 < 2 { start.clone() } else { start.join(&up) };
            read_secret(facts, &below(&root, &file))
        });
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        verdict
    })
}

/// The attribute names that the two ways of mounting an overlay give a meaning to.
const PREFIXES: [&str; 2] = ["user.overlay", "trusted.overlay"];

/// A folder of our own, on an overlay if there is one that we may write to.
fn overlay_scratch() -> Result<Scratch, crate::attempt::No> {
    let mut folders =
        ["/", "/opt", "/srv", "/var/lib", "/var/tmp", "/tmp", ".", "/root"].map(PathBuf::from);
    folders.sort_by_key(|folder| !on_overlay(folder));
    Scratch::new_in(&folders)
}

fn overlay_redirect(facts: &Facts) -> Verdict {
    let file = facts.path("host-file")?;
    let (Some(folder), Some(name)) = (file.parent(), file.file_name()) else {
        return impossible("--host-file has no folder");
    };
    any_of(PREFIXES, |prefix| {
        let scratch = overlay_scratch()?;
        let own = scratch.folder("own")?;
        let redirect = format!("{prefix}.redirect");
        let value = folder.as_os_str().as_bytes();
        rustix::fs::setxattr(&own, &redirect, value, XattrFlags::empty()).doing(&redirect)?;
        // A folder is looked up anew when it has gone from the cache, or has another name.
        let moved = scratch.join("moved");
        std::fs::rename(&own, &moved).doing("rename")?;
        any_of([&moved, &own], |path| read_secret(facts, &path.join(name)))
    })
}

fn overlay_metacopy(facts: &Facts) -> Verdict {
    let file = facts.path("host-file")?;
    any_of(PREFIXES, |prefix| {
        let scratch = overlay_scratch()?;
        let own = scratch.file("own", b"")?;
        let attributes = [
            (format!("{prefix}.metacopy"), Vec::new()),
            (format!("{prefix}.redirect"), file.as_os_str().as_bytes().to_vec()),
        ];
        for (name, value) in &attributes {
            rustix::fs::setxattr(&own, name, value, XattrFlags::empty()).doing(name)?;
        }
        let moved = scratch.join("moved");
        std::fs::rename(&own, &moved).doing("rename")?;
        read_secret(facts, &moved)
    })
}

fn overlay_layers(_: &Facts) -> Verdict {
    let text = read_text("/proc/self/mountinfo").doing("/proc/self/mountinfo")?;
    let options = text.lines().filter(|line| line.contains(" - overlay ")).flat_map(|line| {
        line.split([' ', ','])
            .filter_map(|option| option.split_once('='))
            .filter(|(name, _)| matches!(*name, "upperdir" | "workdir" | "lowerdir"))
            .flat_map(|(_, paths)| paths.split(':'))
    });
    any_of(options, |path| {
        // The host's root as a lower layer is `/`, which here is our own.
        if path == "/" || !path.starts_with('/') {
            return held(format!("{path} says nothing"));
        }
        let count = std::fs::read_dir(path).doing(path)?.count();
        Ok(format!("{path} opens, with {count} entries"))
    })
}

fn own_executable(_: &Facts) -> Verdict {
    let path = Path::new("/proc/self/exe");
    if on_overlay(path) {
        return held("it is in an overlay, so only a copy could be written to");
    }
    executable_opens(path)
}

/// Whether a program that runs could be written to if it did not run.
pub fn executable_opens(path: &Path) -> Verdict {
    match crate::attempt::open_to_write(path) {
        Ok(_) => Ok("it opens".into()),
        // That it runs is looked at after its mode, but before the mount it is on.
        Err(error) if error.raw_os_error() == Some(libc::ETXTBSY) => {
            let fs = rustix::fs::statvfs(path).doing("statvfs")?;
            if fs.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
                return held("its mount is read-only");
            }
            Ok("only its being run keeps it from being written to".into())
        }
        Err(error) => held(error.to_string()),
    }
}

/// Whether a path is a device other than /dev/null, which often covers what is hidden.
pub fn is_device(path: &Path) -> bool {
    let null = rustix::fs::makedev(1, 3);
    rustix::fs::statat(CWD, path, AtFlags::empty()).is_ok_and(|stat| stat.st_rdev != null)
        && std::fs::metadata(path).is_ok_and(|meta| {
            meta.file_type().is_char_device() || meta.file_type().is_block_device()
        })
}
