//! What is packed for a machine, and machines that are started with it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::kernel::Kernel;
use super::{initramfs, kernel};

/// The kernel that `cargo xtask test` fetches.
fn fetched() -> Kernel {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest");
    assert!(folder.join("vmlinuz").exists(), "no kernel: `cargo xtask test` fetches one");
    kernel::find(Some((&folder.join("vmlinuz"), Some(&folder.join("modules"))))).unwrap()
}

fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    output
}

/// A machine's disks.
struct Machine {
    folder: tempfile::TempDir,
}

/// What a machine has said on its way.
struct Said {
    relay: String,
    console: String,
}

impl Machine {
    /// With a root of busybox, and a relay that runs a script.
    fn new(script: &str) -> Self {
        let machine = Self { folder: tempfile::tempdir().unwrap() };
        // In the image there are links where the machine wants to mount, and no folder for some.
        let line = r#"
            cd "$1"
            mkdir -p root/usr/bin root/etc tools disk/tmp/a/b/c disk/volume
            ln -s usr/bin root/bin; ln -s /etc root/run; ln -s ../../volume root/tmp
            cp "$(command -v busybox)" root/usr/bin
            for name in $(busybox --list); do
                [ $name = busybox ] || ln -s busybox root/usr/bin/$name
            done
            ln -s /volume disk/tmp/a/link; echo kept > disk/volume/file
            printf '/usr/bin/sh\0/run/denizen/script\0' > tools/command
            mke2fs -q -t ext4 -d root root.img 16M
            mke2fs -q -t ext4 -d disk disk.img 64M
            truncate -s 128M disk.img
        "#;
        run("sh", &["-ec", line, "sh", &machine.path("")]);
        machine.change_script(script);
        machine
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn change_script(&self, script: &str) {
        fs::write(self.path("tools/script"), script).unwrap();
        let (tools, image) = (self.path("tools"), self.path("tools.img"));
        run("mke2fs", &["-q", "-F", "-t", "ext4", "-d", &tools, &image, "4M"]);
    }

    /// Starts it and waits for its end.
    fn start(&self, line: &str) -> Said {
        let kernel = fetched();
        let initramfs = initramfs::keep(&kernel.modules, self.folder.path()).unwrap();
        let mut command = Command::new("timeout");
        command
            .args(["120", "qemu-system-x86_64", "-M", "q35,accel=tcg", "-cpu", "max"])
            .args(["-m", "256", "-smp", "1", "-nodefaults", "-no-user-config"])
            .args(["-display", "none", "-no-reboot"])
            .args([Path::new("-kernel"), &kernel.image, Path::new("-initrd"), &initramfs])
            .args(["-append", &format!("console=ttyS0 panic=-1 quiet {line}")])
            .args(["-serial", &format!("file:{}", self.path("console"))])
            .args(["-chardev", &format!("file,id=relay,path={}", self.path("relay"))])
            .args(["-device", "virtio-serial-pci"])
            .args(["-device", "virtserialport,name=denizen,chardev=relay"])
            .args(["-netdev", "hubport,id=net,hubid=0", "-device", "virtio-net-pci,netdev=net"])
            .args(["-device", "virtio-rng-pci"]);
        for (name, read_only) in [("root", "on"), ("disk", "off"), ("tools", "on")] {
            let file = self.path(&format!("{name}.img"));
            let drive = format!(
                "if=none,id={name},format=raw,discard=unmap,read-only={read_only},file={file}"
            );
            let device = format!("virtio-blk-pci,serial={name},drive={name}");
            command.args(["-drive", &drive, "-device", &device]);
        }
        let output = command.stdin(Stdio::null()).output().unwrap();
        let read = |name| String::from_utf8_lossy(&fs::read(self.path(name)).unwrap()).into_owned();
        let said = Said { relay: read("relay"), console: read("console").replace('\r', "") };
        assert!(output.status.success(), "{output:?}\n{}\n{}", said.console, said.relay);
        said
    }

    /// Its disk has been left as one that was unmounted.
    fn is_clean(&self) -> bool {
        let header = run("dumpe2fs", &["-h", &self.path("disk.img")]).stdout;
        let header = String::from_utf8(header).unwrap();
        run("e2fsck", &["-fn", &self.path("disk.img")]);
        header.contains("state:         clean") && !header.contains("needs_recovery")
    }
}

const SCRIPT: &str = r#"
    exec 1>&3 2>&3
    echo "uptime $(cut -d' ' -f1 /proc/uptime)"
    echo "name $(hostname) $(cat /etc/hosts | head -n 1)"
    echo "modes $(stat -c %a /volume /tmp /run /dev/shm /dev/pts/ptmx | xargs)"
    echo "tmp ($(ls /tmp))"
    echo "volume $(cat /volume/file)"
    echo "megabytes $(df -m /volume | tail -n 1 | tr -s ' ' | cut -d' ' -f2)"
    echo "disk $(grep ' /volume ' /proc/mounts)"
    echo changed > /etc/file && echo "root $(cat /etc/file)"
    touch /run/denizen/file
    echo "initramfs ($(ls -d /modules /init 2> /dev/null))"
    echo "links $(readlink /dev/fd) $(readlink /dev/stderr), $(ls -ld /run /tmp | cut -c 1 | xargs)"
    echo "groups $(ls /sys/fs/cgroup/cgroup.procs)"
    echo "address $(ip -o -4 addr show | tr -s ' ' | cut -d' ' -f2,4 | xargs)"
    echo "way $(ip route | head -n 1 | xargs) $(cat /etc/resolv.conf)"
    echo "descriptors $(ls /proc/$$/fd | xargs)"
    echo "environment $(tr '\0' ' ' < /proc/$$/environ)"
    # A request to list what runs, which is nothing.
    printf '\4\0\0\0\7\0\0\0' >&0
    echo "init $(dd bs=1024 count=1 <&0 2> /dev/null | hexdump -v -e '1/1 "%d "')"
    for disk in vda vdb vdc; do
        [ "$(cat /sys/block/$disk/serial)" = disk ] && mkdir /own && mount -t ext4 /dev/$disk /own
    done
    while [ "$(cd /own/trash && ls -a | xargs)" != ". .." ]; do :; done
    echo "trash ()"
    echo left > /tmp/left; sleep 1000 &
    echo end
"#;

#[test]
fn a_machine_starts_in_its_root_and_ends_with_its_relay() {
    let machine = Machine::new(SCRIPT);
    let said = machine.start("denizen.net=10.0.2.15/24,10.0.2.2,10.0.2.3");
    println!("{}\n{}", said.relay, said.console);
    for line in [
        "name denizen 127.0.0.1 localhost denizen",
        "modes 755 1777 755 1777 666",
        "tmp ()",
        "volume kept",
        "root changed",
        "touch: /run/denizen/file: Read-only file system",
        "initramfs ()",
        "links /proc/self/fd /proc/self/fd/2, d d",
        "groups /sys/fs/cgroup/cgroup.procs",
        "address lo 127.0.0.1/8 eth0 10.0.2.15/24",
        "way default via 10.0.2.2 dev eth0 nameserver 10.0.2.3",
        "init 6 0 0 0 7 0 0 0 ",
        "trash ()",
        "end",
    ] {
        assert!(said.relay.lines().any(|told| told == line), "{line}\n{}", said.relay);
    }
    assert!(machine.is_clean());
}
