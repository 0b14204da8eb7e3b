//! Attempts to change what is mounted. Each first tries to get a mount namespace of its own
//! whose changes do not reach the host: root gets one, so nothing is left behind; a session
//! that does not get one tries on what it has.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind_recursive, mount_change,
    mount_remount, unmount,
};

use crate::attempt::{
    Attempt, Doing, No, Scratch, Verdict, any_of, held, open_to_write, read_text,
};
use crate::files::mount_points;
use crate::sys::{self, Arg};

const CWD: i64 = libc::AT_FDCWD as i64;
const RDONLY: u64 = 1;

pub const ATTEMPTS: &[Attempt] = &[
    Attempt::new("mount-proc", "A /proc without masks can be mounted.", |_| fresh("proc"))
        .surface()
        .control(),
    Attempt::new("mount-sysfs", "A writable /sys can be mounted.", |_| fresh("sysfs"))
        .surface()
        .control(),
    Attempt::new("mount-tmpfs", "A tmpfs can be mounted, so masks can be covered.", |_| {
        fresh("tmpfs")
    })
    .surface()
    .control(),
    Attempt::new("mount-devpts", "A devpts can be mounted.", |_| fresh("devpts"))
        .surface()
        .control(),
    Attempt::new("mount-devtmpfs", "The host's device nodes can be mounted.", |_| {
        fresh("devtmpfs")
    })
    .control(),
    Attempt::new("mount-mqueue", "A file system of message queues can be mounted.", |_| {
        fresh("mqueue")
    })
    .surface()
    .control(),
    Attempt::new("mount-debugfs", "debugfs can be mounted.", |_| fresh("debugfs"))
        .control()
        .needs("kernel: CONFIG_DEBUG_FS"),
    Attempt::new("mount-tracefs", "tracefs can be mounted.", |_| fresh("tracefs"))
        .control()
        .needs("kernel: CONFIG_TRACING"),
    Attempt::new("mount-securityfs", "securityfs can be mounted.", |_| fresh("securityfs"))
        .control()
        .needs("kernel: CONFIG_SECURITYFS"),
    Attempt::new("mount-bpf", "A bpf file system can be mounted.", |_| fresh("bpf"))
        .surface()
        .control()
        .needs("kernel: CONFIG_BPF_SYSCALL"),
    Attempt::new("mount-binfmt", "Interpreters for file formats can be registered.", |_| {
        fresh("binfmt_misc")
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_BINFMT_MISC"),
    Attempt::new("mount-cgroup1", "A tree of cgroup v1 can be mounted.", |_| {
        cgroup_v1().map(|_| "mounted".into())
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_CPUSETS_V1 or another controller on v1"),
    Attempt::new("mount-cgroup2", "The tree of cgroup v2 can be mounted.", |_| fresh("cgroup2"))
        .surface()
        .control(),
    Attempt::new("mount-ramfs", "A ramfs, which no limit holds, can be mounted.", |_| {
        fresh("ramfs")
    })
    .surface()
    .control(),
    Attempt::new("mount-bind", "A folder can be bound elsewhere.", |_| {
        let scratch = Scratch::new()?;
        alone()?;
        mount_bind_recursive("/proc", scratch.path()).doing("mount")?;
        release(scratch.path());
        Ok("bound /proc".into())
    })
    .surface()
    .control(),
    Attempt::new("mount-bind-file", "A file that is masked can be covered by one's own.", |_| {
        let scratch = Scratch::new()?;
        let own = scratch.file("own", b"own")?;
        alone()?;
        any_of(["/proc/uptime", "/proc/kcore", "/proc/keys"], |path| {
            mount_bind_recursive(&own, path).doing(path)?;
            release(Path::new(path));
            Ok(format!("covered {path}"))
        })
    })
    .surface()
    .control(),
    Attempt::new("mount-overlay", "An overlay over the session's own root can be mounted.", |_| {
        let scratch = Scratch::new()?;
        let at = scratch.folder("at")?;
        alone()?;
        // An overlay is no upper layer for another, so one's own tmpfs is.
        let layers = scratch.folder("layers")?;
        mount("tmpfs", &layers, "tmpfs", MountFlags::empty(), None::<&CStr>).doing("a tmpfs")?;
        for name in ["upper", "work"] {
            std::fs::create_dir(layers.join(name)).preparing("a folder to work in")?;
        }
        let shown = layers.display();
        let options = format!("lowerdir=/,upperdir={shown}/upper,workdir={shown}/work");
        let options = CString::new(options).preparing("the options")?;
        let mounted = mount("overlay", &at, "overlay", MountFlags::empty(), options.as_c_str());
        release(&layers);
        mounted.doing("mount")?;
        release(&at);
        Ok("mounted".into())
    })
    .surface()
    .control(),
    Attempt::new("mount-block", "A block device of the host can be mounted.", |_| {
        let scratch = Scratch::new()?;
        alone()?;
        let text = read_text("/proc/partitions").doing("/proc/partitions")?;
        let devices: Vec<String> = text
            .lines()
            .skip(2)
            .filter_map(|line| Some(format!("/dev/{}", line.split_whitespace().nth(3)?)))
            .collect();
        any_of(devices, |device| {
            any_of(["ext4", "xfs", "btrfs", "squashfs"], |kind| {
                mount(&device, scratch.path(), kind, MountFlags::RDONLY, None::<&CStr>)
                    .doing(&format!("{device} as {kind}"))?;
                release(scratch.path());
                Ok(format!("mounted {device}"))
            })
        })
    }),
    Attempt::new("remount-writable", "A mount that is read-only can be made writable.", |_| {
        let scratch = Scratch::new()?;
        let own = own_read_only(&scratch);
        let text = read_text("/proc/self/mountinfo").doing("/proc/self/mountinfo")?;
        let fixed: Vec<PathBuf> = text
            .lines()
            .filter_map(|line| {
                let fields: Vec<&str> = line.split(' ').collect();
                fields.get(5)?.split(',').any(|option| option == "ro").then_some(())?;
                fields.get(4).map(PathBuf::from)
            })
            .collect();
        let verdict = any_of(fixed, |path| {
            mount_remount(&path, MountFlags::BIND, c"").doing(&path.display().to_string())?;
            Ok(format!("{} is writable", path.display()))
        });
        if own.is_ok() {
            release(scratch.path());
        }
        verdict
    })
    .control(),
    Attempt::new("remount-options", "nosuid, nodev or noexec can be taken off a mount.", |_| {
        alone()?;
        any_of(["/tmp", "/dev/shm", "/proc", "/sys", "/dev/pts", "/"], |path| {
            mount_remount(path, MountFlags::BIND, c"").doing(path)?;
            Ok(format!("{path} has no options left"))
        })
    })
    .surface()
    .control(),
    Attempt::new(
        "unmount-mask",
        "What covers a part of /proc, /sys or /dev can be taken off.",
        |_| {
            let scratch = Scratch::new()?;
            let own = own_read_only(&scratch);
            let masks = mount_points().into_iter().filter(|path| path.iter().count() > 2);
            let verdict = any_of(masks, |path| {
                unmount(&path, UnmountFlags::DETACH).doing(&path.display().to_string())?;
                Ok(format!("unmounted {}", path.display()))
            });
            if own.is_ok() {
                release(scratch.path());
            }
            verdict
        },
    )
    .control(),
    Attempt::new(
        "unmount-root",
        "The root can be taken off, which shows what was there before.",
        |_| {
            alone()?;
            let before = std::fs::read_dir("/").map(Iterator::count).unwrap_or_default();
            unmount("/", UnmountFlags::DETACH).doing("umount")?;
            Ok(format!("{before} entries before"))
        },
    ),
    Attempt::new("mount-move", "A mount can be moved off the place it covers.", |_| {
        let scratch = Scratch::new()?;
        let to = scratch.folder("to")?;
        alone()?;
        let from = scratch.folder("from")?;
        // Moving wants a private parent; the tmpfs of our own is for where we may make one.
        let own = mount("tmpfs", &from, "tmpfs", MountFlags::empty(), None::<&CStr>);
        let masks = mount_points().into_iter().filter(|path| path.iter().count() > 2);
        let verdict = any_of(masks.chain([from.clone()]), |path| {
            rustix::mount::mount_move(&path, &to).doing(&path.display().to_string())?;
            release(&to);
            Ok(format!("moved {}", path.display()))
        });
        if own.is_ok() {
            release(&from);
        }
        verdict
    })
    .surface()
    .control(),
    Attempt::new("propagation", "The propagation of the root mount can be changed.", |_| {
        alone()?;
        let flags = MountPropagationFlags::SHARED;
        mount_change("/", flags).doing("mount")?;
        Ok("the root is shared".into())
    })
    .surface()
    .control(),
    Attempt::new("open-tree", "open_tree(2) clones a mount.", |_| {
        alone()?;
        open_tree(c"/").doing("open_tree")?;
        Ok("cloned the root".into())
    })
    .surface()
    .control(),
    Attempt::new("move-mount", "move_mount(2) attaches a cloned mount.", |_| {
        let scratch = Scratch::new()?;
        alone()?;
        let tree = open_tree(c"/proc").doing("open_tree")?;
        attach(&tree, scratch.path()).doing("move_mount")?;
        release(scratch.path());
        Ok("attached".into())
    })
    .surface()
    .control(),
    Attempt::new("fsopen-tmpfs", "fsopen(2) makes a file system.", |_| {
        alone()?;
        file_system(c"tmpfs")?;
        Ok("made a tmpfs".into())
    })
    .surface()
    .control(),
    Attempt::new("fsopen-proc", "fsopen(2) makes a /proc without masks.", |_| {
        let scratch = Scratch::new()?;
        alone()?;
        let made = file_system(c"proc")?;
        attach(&made, scratch.path()).doing("move_mount")?;
        let there = scratch.join("self").exists();
        release(scratch.path());
        if there { Ok("made a /proc".into()) } else { held("it is empty") }
    })
    .surface()
    .control(),
    Attempt::new("fspick", "fspick(2) takes up a mounted file system to change it.", |_| {
        alone()?;
        sys::owned(sys::call(
            libc::SYS_fspick,
            &mut [Arg::Num(CWD), Arg::Text(c"/"), Arg::Num(0)],
        ))?;
        Ok("took up the root".into())
    })
    .surface()
    .control(),
    Attempt::new("mount-setattr", "mount_setattr(2) makes read-only mounts writable.", |_| {
        alone()?;
        // struct mount_attr: set, clear, propagation, user namespace.
        let attributes = sys::words(&[0, RDONLY, 0, 0]);
        let points: Vec<PathBuf> = mount_points();
        any_of(points, |path| {
            let name = CString::new(path.as_os_str().as_bytes()).preparing("a path")?;
            sys::call(
                libc::SYS_mount_setattr,
                &mut [
                    Arg::Num(CWD),
                    Arg::Text(&name),
                    Arg::Num(0),
                    Arg::In(&attributes),
                    Arg::Num(32),
                ],
            )
            .doing("mount_setattr")?;
            Ok(format!("changed {}", path.display()))
        })
    })
    .control(),
    Attempt::new("pivot-root", "pivot_root(2) changes the root.", |_| {
        let scratch = Scratch::new()?;
        alone()?;
        mount("tmpfs", scratch.path(), "tmpfs", MountFlags::empty(), None::<&CStr>)
            .doing("a tmpfs")?;
        let old = scratch.folder("old")?;
        let pivoted = rustix::process::pivot_root(scratch.path(), &old);
        if pivoted.is_err() {
            release(scratch.path());
        }
        pivoted.doing("pivot_root")?;
        // The folder is of the namespace that ends with us; outside it is empty.
        let _ = std::fs::remove_dir(below_old(scratch.path()));
        Ok("another root".into())
    })
    .surface()
    .control()
    .needs("kernel: the root must not be the initramfs"),
    Attempt::new(
        "pivot-root-in-place",
        "pivot_root(\".\", \".\") stacks roots, and the old one shows.",
        |_| {
            std::env::set_current_dir("/").preparing("/")?;
            alone()?;
            let done = sys::call(libc::SYS_pivot_root, &mut [Arg::Text(c"."), Arg::Text(c".")]);
            done.doing("pivot_root")?;
            Ok("pivoted".into())
        },
    ),
    Attempt::new(
        "release-agent",
        "A cgroup v1 tree lets one name a program that the kernel runs on the host.",
        |_| {
            let seen = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
            let seen = any_of(seen, |entry| {
                let path = entry.path().join("release_agent");
                open_to_write(&path).doing(&path.display().to_string())?;
                Ok(format!("{} opens for writing", path.display()))
            });
            seen.or_else(|_| {
                let scratch = cgroup_v1()?;
                let path = scratch.join("release_agent");
                let opened = open_to_write(&path).doing("release_agent");
                release(scratch.path());
                opened?;
                Ok("release_agent of a tree of our own opens for writing".into())
            })
        },
    )
    .control()
    .needs("kernel: a controller on cgroup v1"),
    Attempt::new(
        "cgroup-leave",
        "A command can be put into another cgroup, away from the session's limits.",
        |_| {
            let trees = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
            let trees = trees.map(|entry| entry.path()).chain(["/sys/fs/cgroup".into()]);
            any_of(trees, |tree| {
                let path = tree.join("cgroup.procs");
                open_to_write(&path).doing(&path.display().to_string())?;
                Ok(format!("{} opens for writing", path.display()))
            })
        },
    )
    .control()
    .needs("test: cgroups mounted at /sys/fs/cgroup"),
    Attempt::new("cgroup-limits", "The session's own limits can be raised.", |_| {
        let trees = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        let trees: Vec<PathBuf> =
            trees.map(|entry| entry.path()).chain(["/sys/fs/cgroup".into()]).collect();
        let names = [
            "memory.limit_in_bytes",
            "memory.max",
            "pids.max",
            "cpu.max",
            "cpu.cfs_quota_us",
            "cpu.shares",
            "notify_on_release",
        ];
        any_of(names, |name| {
            any_of(&trees, |tree| {
                let path = tree.join(name);
                open_to_write(&path).doing(&path.display().to_string())?;
                Ok(format!("{} opens for writing", path.display()))
            })
        })
    })
    .control()
    .needs("test: cgroups mounted at /sys/fs/cgroup"),
    Attempt::new("cgroup-make", "A cgroup can be made outside the session's own.", |_| {
        let trees = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        let trees = trees.map(|entry| entry.path()).chain(["/sys/fs/cgroup".into()]);
        let name = format!("denizen-escape-{}", std::process::id());
        any_of(trees, |tree| {
            if !tree.join("cgroup.procs").exists() {
                return held(format!("{} is no cgroup", tree.display()));
            }
            let path = tree.join(&name);
            std::fs::create_dir(&path).doing(&path.display().to_string())?;
            std::fs::remove_dir(&path).doing("removing it again")?;
            Ok(format!("made {}", path.display()))
        })
    })
    .control()
    .needs("test: cgroups mounted at /sys/fs/cgroup"),
];

/// A mount namespace of our own, cut off from the one before. Where that is refused, what
/// follows is tried in the session's own.
fn alone() -> Result<(), No> {
    let flags = i64::from(libc::CLONE_NEWNS);
    if sys::call(libc::SYS_unshare, &mut [Arg::Num(flags)]).is_err() {
        return Ok(());
    }
    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    // Were it not cut off, what follows would reach the host.
    mount_change("/", flags).preparing("cutting off the new mount namespace")
}

/// Mounts a new file system of a kind and sees that it is there.
fn fresh(kind: &str) -> Verdict {
    let scratch = Scratch::new()?;
    alone()?;
    mount("none", scratch.path(), kind, MountFlags::empty(), None::<&CStr>).doing("mount")?;
    let count = std::fs::read_dir(scratch.path()).map(Iterator::count).unwrap_or_default();
    release(scratch.path());
    Ok(format!("mounted, {count} entries"))
}

/// Mounts a cgroup v1 tree, one that the host has or a new one without controllers.
fn cgroup_v1() -> Result<Scratch, No> {
    let scratch = Scratch::new()?;
    alone()?;
    let options = [c"cpuset", c"pids", c"memory", c"devices", c"freezer", c"none,name=systemd"];
    let done = any_of(options, |options| {
        mount("none", scratch.path(), "cgroup", MountFlags::empty(), options)
            .doing(&options.to_string_lossy())?;
        Ok(String::new())
    });
    done.map(|_| scratch)
}

/// A read-only tmpfs of our own, where that is allowed: something to undo.
fn own_read_only(scratch: &Scratch) -> Result<(), No> {
    alone()?;
    mount("tmpfs", scratch.path(), "tmpfs", MountFlags::empty(), None::<&CStr>).doing("mount")?;
    let flags = MountFlags::BIND | MountFlags::RDONLY;
    mount_remount(scratch.path(), flags, c"").doing("remount")
}

/// Takes a mount of our own off again; it would go with the namespace anyway.
fn release(path: &Path) {
    let _ = unmount(path, UnmountFlags::DETACH);
}

fn below_old(path: &Path) -> PathBuf {
    crate::attempt::below(Path::new("/old"), path)
}

/// A clone of a mount.
fn open_tree(path: &CStr) -> std::io::Result<OwnedFd> {
    sys::owned(sys::call(libc::SYS_open_tree, &mut [Arg::Num(CWD), Arg::Text(path), Arg::Num(1)]))
}

/// Attaches a mount that has no place yet.
fn attach(tree: &OwnedFd, to: &Path) -> std::io::Result<()> {
    let to = CString::new(to.as_os_str().as_bytes())?;
    sys::call(
        libc::SYS_move_mount,
        &mut [
            Arg::Num(i64::from(tree.as_raw_fd())),
            Arg::Text(c""),
            Arg::Num(CWD),
            Arg::Text(&to),
            Arg::Num(4),
        ],
    )?;
    Ok(())
}

/// Makes a file system by the newer calls; gives its mount, which has no place yet.
fn file_system(kind: &CStr) -> Result<OwnedFd, No> {
    const CREATE: i64 = 6;
    let context = sys::owned(sys::call(libc::SYS_fsopen, &mut [Arg::Text(kind), Arg::Num(0)]));
    let context = context.doing("fsopen")?;
    let fd = i64::from(context.as_raw_fd());
    sys::call(libc::SYS_fsconfig, &mut [Arg::Num(fd), Arg::Num(CREATE)]).doing("fsconfig")?;
    sys::owned(sys::call(libc::SYS_fsmount, &mut [Arg::Num(fd), Arg::Num(0), Arg::Num(0)]))
        .doing("fsmount")
}

/// The kind of a file system is what a mask is told by.
pub fn is_kind(path: &Path, magic: i64) -> bool {
    rustix::fs::statfs(path).is_ok_and(|fs| fs.f_type == magic)
}

/// A file of /proc or /sys that opens for writing, and is none of what covers them.
pub fn opens_to_write(path: &Path) -> Verdict {
    const PROC: i64 = 0x9fa0;
    const SYSFS: i64 = 0x6265_6572;
    let shown = path.display().to_string();
    open_to_write(path).doing(&shown)?;
    if is_kind(path, PROC) || is_kind(path, SYSFS) {
        return Ok(format!("{shown} opens for writing"));
    }
    held(format!("{shown} is covered"))
}
