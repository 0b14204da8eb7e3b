//! Attempts on devices. A device is opened, and from a disk its beginning is read; nothing
//! is written to one.

use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode};

use crate::attempt::{
    Attempt, Doing, Scratch, Verdict, any_of, held, open, open_to_write, read_text,
};
use crate::files::is_device;

pub const ATTEMPTS: &[Attempt] = &[
    Attempt::new("device-memory", "/dev/mem or /dev/port give the memory of the machine.", |_| {
        devices(&["/dev/mem", "/dev/kmem", "/dev/port"])
    })
    .control()
    .needs("kernel: CONFIG_DEVMEM"),
    Attempt::new("device-kernel-log", "/dev/kmsg gives the kernel's log.", |_| {
        devices(&["/dev/kmsg"])
    })
    .leak()
    .control(),
    Attempt::new("device-disks", "A disk of the host can be read.", |_| {
        let text = read_text("/proc/partitions").unwrap_or_default();
        let listed = text.lines().skip(2).filter_map(|line| line.split_whitespace().nth(3));
        let usual = ["sda", "vda", "xvda", "nvme0n1", "mmcblk0", "dm-0", "md0", "zram0"];
        any_of(listed.chain(usual), |name| {
            let path = Path::new("/dev").join(name);
            if !is_device(&path) {
                return held(format!("{} is no device", path.display()));
            }
            read_disk(&path)
        })
    })
    .control()
    .needs("kernel: the machine has a disk"),
    Attempt::new("device-fuse", "/dev/fuse opens.", |_| devices(&["/dev/fuse"]))
        .surface()
        .control()
        .needs("kernel: CONFIG_FUSE_FS"),
    Attempt::new("device-cuse", "/dev/cuse opens, which makes devices.", |_| {
        devices(&["/dev/cuse"])
    })
    .control()
    .needs("kernel: CONFIG_CUSE"),
    Attempt::new("device-kvm", "/dev/kvm opens.", |_| devices(&["/dev/kvm"]))
        .surface()
        .control()
        .needs("kernel: CONFIG_KVM"),
    Attempt::new("device-tun", "/dev/net/tun opens.", |_| devices(&["/dev/net/tun"]))
        .surface()
        .control()
        .needs("kernel: CONFIG_TUN"),
    Attempt::new("device-loop", "A loop device, or what makes them, opens.", |_| {
        devices(&["/dev/loop-control", "/dev/loop0"])
    })
    .control()
    .needs("kernel: CONFIG_BLK_DEV_LOOP"),
    Attempt::new("device-userfaultfd", "/dev/userfaultfd opens.", |_| {
        devices(&["/dev/userfaultfd"])
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_USERFAULTFD"),
    Attempt::new("device-vsock", "/dev/vsock or /dev/vhost-… open.", |_| {
        devices(&["/dev/vsock", "/dev/vhost-net", "/dev/vhost-vsock"])
    })
    .control()
    .needs("kernel: CONFIG_VSOCKETS"),
    Attempt::new("device-storage", "What controls storage opens.", |_| {
        devices(&["/dev/btrfs-control", "/dev/mapper/control", "/dev/nbd0", "/dev/sg0"])
    })
    .control()
    .needs("kernel: CONFIG_BTRFS_FS"),
    Attempt::new("device-consoles", "A console or serial line of the machine opens.", |_| {
        devices(&["/dev/tty0", "/dev/tty1", "/dev/ttyS0", "/dev/hvc0"])
    })
    .control()
    .needs("kernel: CONFIG_VT"),
    Attempt::new("device-hardware", "Other hardware of the machine opens.", |_| {
        devices(&[
            "/dev/rtc0",
            "/dev/hwrng",
            "/dev/cpu/0/msr",
            "/dev/dri/card0",
            "/dev/dri/renderD128",
            "/dev/input/event0",
            "/dev/uinput",
            "/dev/uhid",
            "/dev/snd/seq",
            "/dev/vfio/vfio",
            "/dev/rfkill",
            "/dev/cpu_dma_latency",
            "/dev/vga_arbiter",
            "/dev/autofs",
            "/dev/snapshot",
        ])
    }),
    Attempt::new(
        "device-other",
        "/dev has a device besides those that every program may need.",
        |_| other_devices(),
    )
    .control(),
    Attempt::new("make-disk", "A node for a disk of the host can be made and read.", |_| {
        let text = read_text("/proc/partitions").unwrap_or_default();
        let listed = text.lines().skip(2).filter_map(|line| {
            let mut fields = line.split_whitespace();
            Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
        });
        let usual = [(8, 0), (253, 0), (254, 0), (259, 0), (7, 0)];
        any_of(listed.chain(usual), |(major, minor)| {
            let (scratch, path) = node(FileType::BlockDevice, major, minor)?;
            let verdict = read_disk(&path);
            drop(scratch);
            verdict
        })
    })
    .control()
    .needs("kernel: the machine has a disk"),
    Attempt::new("make-disk-own-dev", "A node for a disk can be made in /dev or /dev/shm.", |_| {
        any_of(["/dev", "/dev/shm", "/run", "."], |folder| {
            let path = Path::new(folder).join(format!("denizen-escape-{}", std::process::id()));
            let device = rustix::fs::makedev(7, 0);
            let made = rustix::fs::mknodat(CWD, &path, FileType::BlockDevice, Mode::RUSR, device);
            made.doing(folder)?;
            let _ = std::fs::remove_file(&path);
            Ok(format!("made {}", path.display()))
        })
    })
    .control(),
    Attempt::new("make-memory", "A node for the machine's memory can be made and opened.", |_| {
        any_of([(1, 1), (1, 4), (1, 11)], |(major, minor)| {
            let (scratch, path) = node(FileType::CharacterDevice, major, minor)?;
            let opened = open(&path);
            drop(scratch);
            opened.doing(&format!("device {major}:{minor}"))?;
            Ok(format!("device {major}:{minor} opens"))
        })
    })
    .control(),
    Attempt::new("make-console", "A node for a console can be made and opened.", |_| {
        let (scratch, path) = node(FileType::CharacterDevice, 4, 0)?;
        let opened = open_to_write(&path);
        drop(scratch);
        opened.doing("device 4:0")?;
        Ok("device 4:0 opens".into())
    })
    .control()
    .needs("kernel: CONFIG_VT"),
];

/// Opens the first of some devices that can be opened.
fn devices(paths: &[&str]) -> Verdict {
    any_of(paths, |path| {
        let path = Path::new(path);
        let shown = path.display().to_string();
        let file = open(path).doing(&shown)?;
        drop(file);
        if is_device(path) {
            Ok(format!("{shown} opens"))
        } else {
            held(format!("{shown} is covered"))
        }
    })
}

fn read_disk(path: &Path) -> Verdict {
    let shown = path.display().to_string();
    let mut start = [0; 512];
    // One that is empty, such as a loop device without a file, is the host's all the same.
    let count = open(path).doing(&shown)?.read(&mut start).doing(&shown)?;
    Ok(format!("read {count} bytes of {shown}"))
}

/// Makes a node for a device in a folder of our own.
fn node(kind: FileType, major: u32, minor: u32) -> Result<(Scratch, PathBuf), crate::attempt::No> {
    let scratch = Scratch::new()?;
    let path = scratch.join("node");
    let device = rustix::fs::makedev(major, minor);
    rustix::fs::mknodat(CWD, &path, kind, Mode::RUSR | Mode::WUSR, device).doing("mknod")?;
    Ok((scratch, path))
}

/// A device in /dev that is none of the usual ones, told by its number.
fn other_devices() -> Verdict {
    let mut folders = vec![PathBuf::from("/dev")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let Ok(meta) = entry.path().symlink_metadata() else { continue };
            let kind = meta.file_type();
            if kind.is_dir() {
                folders.push(entry.path());
            }
            if !kind.is_block_device() && !kind.is_char_device() {
                continue;
            }
            let number = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
            let usual = match number {
                // null, zero, full, random, urandom; tty and ptmx; terminals.
                (1, 3 | 5 | 7 | 8 | 9) | (5, 0 | 2) | (136..=143, _) => kind.is_char_device(),
                _ => false,
            };
            // One that may not be opened is only a name.
            if !usual && open(&entry.path()).is_ok() {
                return Ok(format!("{} is device {number:?}", entry.path().display()));
            }
        }
    }
    held("there is none that opens")
}
