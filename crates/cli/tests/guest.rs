//! What only another machine can show, in a guest: an older kernel (Linux 6.1) with control
//! groups of version 2 alone, a root of busybox, root with a machine of its own and a user to
//! whom groups were delegated. `cargo xtask test` fetches the kernel.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The guest's modules, each after those it needs.
const DRIVERS: [&str; 6] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
];

/// Runs `script` as the first process of a guest whose root has busybox and this program; gives
/// what it printed.
fn in_guest(script: &str) -> String {
    let kernel = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../guest");
    assert!(kernel.join("vmlinuz").exists(), "no kernel: `cargo xtask test` fetches one");
    let folder = tempfile::tempdir().unwrap();
    let module = |name: &str| kernel.join(format!("modules/{name}.ko"));
    let mut first = "#!/bin/busybox sh\n/bin/busybox mount -t devtmpfs dev /dev\n".to_owned();
    for driver in DRIVERS {
        writeln!(first, "/bin/busybox insmod /{driver}.ko").unwrap();
    }
    first.push_str("/bin/busybox mount -t ext4 /dev/vda /new\n");
    first.push_str("exec /bin/busybox switch_root /new /script\n");
    std::fs::write(folder.path().join("init"), first).unwrap();
    std::fs::write(folder.path().join("script"), script).unwrap();
    let libraries = Command::new("ldd").arg(env!("CARGO_BIN_EXE_denizen")).output().unwrap();
    let libraries = String::from_utf8(libraries.stdout).unwrap();
    let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    let line = r#"
        cd "$1"; denizen=$2; overlay=$3; shift 3
        mkdir -p initrd/bin initrd/dev initrd/new root/usr/bin root/usr/lib/libraries
        chmod +x init script
        mv init initrd; cp "$(command -v busybox)" initrd/bin
        while [ "$1" != -- ]; do cp "$1" initrd; shift; done; shift
        (cd initrd && find . | busybox cpio -o -H newc > ../initrd.img)
        (cd root
            for folder in dev proc sys run tmp etc root home var/lib; do mkdir -p $folder; done
            for name in bin sbin lib lib64; do ln -s usr/$name $name; done
            ln -s bin usr/sbin; ln -s lib usr/lib64
            mv ../initrd/bin/busybox usr/bin
            for name in $(usr/bin/busybox --list); do
                [ $name = busybox ] || ln -s busybox usr/bin/$name
            done
            echo root:x:0:0::/root:/bin/sh > etc/passwd
            echo user:x:1000:1000::/home:/bin/sh >> etc/passwd
            printf 'root:x:0:\nuser:x:1000:\n' > etc/group
            mv ../script .; cp "$denizen" usr/bin; cp "$overlay" overlay.ko
            # The loader is found by its whole name.
            for library; do cp -L "$library" usr/lib; done)
        mke2fs -q -t ext4 -d root disk.img 1G
    "#;
    let prepared = Command::new("sh")
        .args(["-ec", line, "sh"])
        .args([folder.path(), Path::new(env!("CARGO_BIN_EXE_denizen")), &module("overlay")])
        .args(DRIVERS.map(module))
        .arg("--")
        .args(libraries)
        .output()
        .unwrap();
    assert!(prepared.status.success(), "{prepared:?}");
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    let disk = format!("file={},if=virtio,format=raw,cache=unsafe", path("disk.img").display());
    // One that hangs says so far as it came.
    let guest = Command::new("timeout")
        .args(["100", "qemu-system-x86_64"])
        .args(["-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "1024", "-smp", "2"])
        .args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"])
        .args([Path::new("-kernel"), &kernel.join("vmlinuz")])
        .args([Path::new("-initrd"), &path("initrd.img")])
        .args(["-append", "console=ttyS0 panic=-1 quiet loglevel=3", "-drive", &disk])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&guest.stdout).replace('\r', "");
    assert!(guest.status.success(), "{guest:?}");
    said
}

/// What every guest begins with.
const BEGIN: &str = "#!/bin/sh
    mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
    mkdir -p /dev/pts /dev/shm; mount -t devpts devpts /dev/pts
    for folder in /run /tmp; do mount -t tmpfs tmpfs $folder; done
    chmod 1777 /tmp
    insmod /overlay.ko
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    export HOME=/root PATH=/usr/bin
";

#[test]
fn control_groups_of_version_2_hold_for_root_and_where_they_are_delegated() {
    let script = r#"
        cat > /tmp/check <<'EOF'
            user=$1
            export DENIZEN_STATE=$HOME/state DENIZEN_CACHE=$HOME/cache
            export DENIZEN_LIMITS='{ memory_bytes = 67108864, processes = 32, cpu_percent = 50 }'
            echo "$user: $(denizen doctor | grep limits)"
            echo "$user: within $(denizen exec a -- cat /proc/self/cgroup)"
            echo "$user: $(denizen inspect a | grep usage | tr -s ' ')"
            denizen exec a -- dd if=/dev/zero of=/dev/null bs=100M count=1 2> /dev/null
            echo "$user: memory $?"
            line='for i in $(seq 50); do sleep 1000 & done'
            echo "$user: processes $(denizen exec a -- sh -c "$line" 2>&1 | tail -n 1)"
            # Also of what is ready for others.
            cat $(find /sys/fs/cgroup -path '*/denizen/*/cpu.max') | sort -u | sed "s/^/$user: cpu /"
            denizen stop --force a && denizen shutdown
            # A daemon that is gone answers no more.
            while [ -e $DENIZEN_STATE/denizen.sock ] || pidof denizen > /dev/null; do :; done
            left=$(find /sys/fs/cgroup -type d -path '*/denizen/*')
            echo "$user: left ($left)"
EOF
        echo +memory +pids +cpu > /sys/fs/cgroup/cgroup.subtree_control
        sh /tmp/check root
        mkdir /sys/fs/cgroup/delegated
        echo +memory +pids +cpu > /sys/fs/cgroup/delegated/cgroup.subtree_control
        mkdir /sys/fs/cgroup/delegated/login
        chown -R user:user /sys/fs/cgroup/delegated /home
        echo 0 > /sys/fs/cgroup/delegated/login/cgroup.procs
        # The shell stays in the group, so that the daemon has to go further up.
        HOME=/home su -s /bin/sh user -c 'sh /tmp/check user'
        poweroff -f
    "#;
    let said = in_guest(&format!("{BEGIN}{script}"));
    for user in ["root", "user"] {
        for part in [
            "ok    limits          of whole sessions: memory, pids, cpu",
            // Its own group is the root of what it sees.
            "within 0::/",
            // Killed, which a limit of each process would not have led to.
            "memory 137",
            "processes sh: can't fork: Resource temporarily unavailable",
            "cpu 50000 100000",
            "left ()",
        ] {
            let line = format!("{user}: {part}");
            // The firmware's own words may stand before the first one.
            assert!(said.lines().any(|told| told.ends_with(&line)), "{line}\n{said}");
        }
        let used = said.lines().find(|told| told.contains(&format!("{user}: usage ")));
        let is_whole =
            |told: &str| told.contains(" of memory, ") && told.ends_with(" s of CPU, 0 processes");
        assert!(used.is_some_and(is_whole), "{said}");
    }
}
