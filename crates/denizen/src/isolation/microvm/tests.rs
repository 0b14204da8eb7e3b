//! What is packed for a machine, and machines that are started with it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::kernel::{Kernel, KernelError};
use super::modules::{ModuleError, Modules};
use super::{elf, initramfs, kernel};

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
            mke2fs -q -t ext4 -b 4096 -d disk disk.img 64M
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
            .args(["-append", &format!("console=ttyS0 panic=-1 quiet no_timer_check {line}")])
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
    exec 2>&1
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
    echo "files $(ulimit -Hn)"
    # To be found by the next start: a session that has done its worst. Nothing is free on its disk.
    mkdir /tmp/left; rm /etc/resolv.conf; mkdir /etc/resolv.conf
    while ln -s x /tmp/left/$((n = n + 1)); do [ $n != 500 ] || break; done
    dd if=/dev/zero of=/volume/filled bs=64k 2> /dev/null
    dd if=/dev/zero of=/volume/filled2 bs=512 2> /dev/null
    sleep 1000 >> /volume/filled &
    echo end
"#;

/// Ends the machine by the death of its init, which this script is no child of.
const AGAIN: &str = r#"
    exec 2>&1
    echo "tmp ($(ls /tmp))"
    echo "volume $(cat /volume/file) $(ls /volume | xargs)"
    rm /volume/filled && echo "root $(cat /etc/file)" > /etc/other && cat /etc/other
    kill -9 $(pidof denizen-init)
    read nothing < /dev/console
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
        "files 65536",
        "end",
    ] {
        assert!(said.relay.lines().any(|told| told == line), "{line}\n{}", said.relay);
    }
    assert!(machine.is_clean());

    machine.change_script(AGAIN);
    let said = machine.start("");
    let told: Vec<&str> = said.relay.lines().collect();
    let files = "volume kept file filled filled2";
    assert_eq!(told, ["tmp ()", files, "root changed"], "{}", said.console);
    assert!(machine.is_clean());
    // What was deleted in the machine is the host's again.
    let used = fs::metadata(machine.path("disk.img")).unwrap().blocks() * 512;
    assert!(used < 32 << 20, "{used}\n{}", said.console);
}

#[test]
fn a_machine_that_cannot_start_says_why_and_ends() {
    let machine = Machine::new("");
    fs::File::create(machine.path("root.img")).unwrap().set_len(1 << 20).unwrap();
    let said = machine.start("");
    let why = "denizen: mount /root: Invalid argument (os error 22)";
    assert!(said.console.lines().any(|line| line == why), "{}", said.console);
    assert_eq!(said.relay, "");
}

/// A module that says that it needs others.
fn module(needs: &str) -> Vec<u8> {
    let info = format!("license=GPL\0depends={needs}\0name=module\0");
    let names = b"\0.shstrtab\0.modinfo\0";
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64, 0);
    let parts: [&[u8]; 3] = [b"", names, info.as_bytes()];
    let mut headers = Vec::new();
    for (part, name) in parts.into_iter().zip([0u32, 1, 11]) {
        let mut header = [0; 64];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[0x18..0x20].copy_from_slice(&(file.len() as u64).to_le_bytes());
        header[0x20..0x28].copy_from_slice(&(part.len() as u64).to_le_bytes());
        headers.extend(header);
        file.extend_from_slice(part);
    }
    let at = file.len() as u64;
    file[0x28..0x30].copy_from_slice(&at.to_le_bytes());
    for (at, value) in [(0x3a, 64u16), (0x3c, 3), (0x3e, 1)] {
        file[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    file.extend(headers);
    file
}

fn names(modules: &Modules, wanted: &[&str]) -> Result<Vec<String>, ModuleError> {
    Ok(modules.load(wanted)?.into_iter().map(|module| module.name).collect())
}

#[test]
fn modules_come_after_those_they_need_however_they_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let deep = folder.path().join("kernel/drivers");
    fs::create_dir_all(&deep).unwrap();
    let gzip = |content: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, content).unwrap();
        encoder.finish().unwrap()
    };
    fs::write(deep.join("virtio-top.ko"), module("left-side,right,inside")).unwrap();
    fs::write(deep.join("left_side.ko.gz"), gzip(&module("bottom"))).unwrap();
    let zstd = zstd::encode_all(&*module("bottom,left_side"), 1).unwrap();
    fs::write(deep.join("right.ko.zst"), zstd).unwrap();
    fs::write(folder.path().join("bottom.ko"), module("")).unwrap();
    run("xz", &[folder.path().join("bottom.ko").to_str().unwrap()]);
    // As `build` and `source` do, out of the folder.
    std::os::unix::fs::symlink("/", folder.path().join("build")).unwrap();

    // Where nobody says what is built in, what has no file is.
    let modules = Modules::scan(folder.path()).unwrap();
    let order = ["bottom", "left_side", "right", "virtio_top"];
    assert_eq!(names(&modules, &["virtio_top", "bottom"]).unwrap(), order);
    assert_eq!(modules.load(&["bottom"]).unwrap()[0].content, module(""));
    assert!(!modules.has("inside"));

    fs::write(folder.path().join("modules.builtin"), "kernel/fs/in-side.ko\n").unwrap();
    let missing = names(&Modules::scan(folder.path()).unwrap(), &["virtio_top"]);
    assert!(matches!(missing, Err(ModuleError::Missing { name, .. }) if name == "inside"));
    fs::write(folder.path().join("modules.builtin"), "kernel/fs/inside.ko\n").unwrap();
    let modules = Modules::scan(folder.path()).unwrap();
    assert!(modules.has("inside"));
    assert_eq!(names(&modules, &["virtio_top"]).unwrap(), order);

    // Two that need each other come once each.
    fs::write(deep.join("one.ko"), module("two")).unwrap();
    fs::write(deep.join("two.ko"), module("one")).unwrap();
    let modules = Modules::scan(folder.path()).unwrap();
    assert_eq!(names(&modules, &["one", "two"]).unwrap(), ["two", "one"]);
}

#[test]
fn damaged_modules_are_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let whole = module("other");
    assert_eq!(elf::section(&whole, ".modinfo").unwrap()[..8], *b"license=");
    assert_eq!(elf::section(&whole, ".mod"), None);
    for length in 0..whole.len() {
        elf::section(&whole[..length], ".modinfo");
        elf::has_loader(&whole[..length]);
    }
    for at in 0..whole.len() {
        let mut changed = whole.clone();
        changed[at] ^= 0xff;
        elf::section(&changed, ".modinfo");
        elf::has_loader(&changed);
    }
    for (name, content) in [
        ("short.ko", &whole[..whole.len() - 64]),
        ("empty.ko", b""),
        ("text.ko.gz", b"text"),
        ("text.ko.xz", b"text"),
        ("text.ko.zst", b"text"),
    ] {
        fs::write(folder.path().join(name), content).unwrap();
        let modules = Modules::scan(folder.path()).unwrap();
        let error = names(&modules, &[name.split('.').next().unwrap()]).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        fs::remove_file(folder.path().join(name)).unwrap();
    }
}

#[test]
fn an_initramfs_is_the_same_every_time_and_can_be_listed() {
    let kernel = fetched();
    let folder = tempfile::tempdir().unwrap();
    let keep = folder.path().join("kept");
    let path = initramfs::keep(&kernel.modules, &keep).unwrap();
    let content = fs::read(&path).unwrap();
    assert_eq!(initramfs::keep(&kernel.modules, &keep).unwrap(), path);
    fs::remove_file(&path).unwrap();
    assert_eq!(initramfs::keep(&kernel.modules, &keep).unwrap(), path);
    assert_eq!(fs::read(&path).unwrap(), content);
    assert_eq!(fs::read_dir(&keep).unwrap().count(), 1);

    let unpack = "cd \"$1\"; busybox cpio -idv < \"$2\" 2>&1 | sort";
    let (to, from) = (folder.path().to_str().unwrap(), path.to_str().unwrap());
    let listed = run("sh", &["-ec", unpack, "sh", to, from]).stdout;
    let listed = String::from_utf8(listed).unwrap();
    for name in ["dev", "dev/console", "dev/null", "init", "modules/virtio_rng.ko", "tools"] {
        assert!(listed.lines().any(|line| line == name), "{name}\n{listed}");
    }
    let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
    assert_eq!(read("init"), denizen_init::PROGRAM);
    let order = String::from_utf8(read("modules/order")).unwrap();
    let place = |name| order.lines().position(|line| line == name).unwrap();
    assert!(place("virtio_ring") < place("virtio") && place("virtio") < place("virtio_pci"));
    assert!(order.lines().all(|name| !read(&format!("modules/{name}.ko")).is_empty()));
    assert_eq!(read("modules/network"), b"failover\nnet_failover\nvirtio_net\n");
}

/// A kernel's first bytes.
fn image(version: &str) -> Vec<u8> {
    let mut image = vec![0; 0x400];
    image[0x1fe..0x200].copy_from_slice(b"\x55\xaa");
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x20e..0x210].copy_from_slice(&0x180u16.to_le_bytes());
    image[0x380..0x380 + version.len()].copy_from_slice(version.as_bytes());
    image
}

#[test]
fn the_best_kernel_that_has_modules_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let (boot, installed) = (folder.path().join("boot"), folder.path().join("modules"));
    let find = || kernel::find_in(None, &boot, &installed);
    assert!(matches!(find(), Err(KernelError::None { .. })));
    fs::create_dir(&boot).unwrap();
    let put = |name: &str, version: &str, has_modules: bool| {
        let text = format!("{version} (someone@somewhere) #1 SMP");
        fs::write(boot.join(format!("vmlinuz-{name}")), image(&text)).unwrap();
        if has_modules {
            fs::create_dir_all(installed.join(version)).unwrap();
            fs::write(installed.join(version).join("virtio_blk.ko"), module("")).unwrap();
        }
    };
    put("a", "6.12.0-10-amd64", false);
    fs::write(boot.join("vmlinuz-b"), "no kernel").unwrap();
    let told = find().unwrap_err().to_string();
    assert!(told.contains("apt-get install linux-image-cloud-amd64 qemu-system-x86"), "{told}");
    for (name, version) in [
        ("c", "6.1.0-9-amd64"),
        ("d", "6.1.0-10-amd64"),
        ("e", "5.10.0-9-cloud-amd64"),
        ("f", "5.10.0-30-cloud-amd64"),
    ] {
        put(name, version, true);
        assert_eq!(find().unwrap().version, version);
    }
    put("g", "6.1.0-99-cloud-amd64", false);
    assert_eq!(find().unwrap().image, boot.join("vmlinuz-f"));
}

#[test]
fn a_kernel_that_is_given_is_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kernel");
    let find = |modules| kernel::find_in(Some((&path, modules)), folder.path(), folder.path());
    assert!(matches!(find(None), Err(KernelError::Read { .. })));
    let whole = image("6.1.0-1-amd64 #1");
    for damaged in [
        b"".to_vec(),
        whole[..0x20f].to_vec(),
        whole[..0x380].to_vec(),
        vec![0; 0x10000],
        image("../6.1"),
        image("6/../../1"),
    ] {
        fs::write(&path, damaged).unwrap();
        assert!(matches!(find(None), Err(KernelError::NotOne { .. })));
    }
    fs::write(&path, whole).unwrap();
    let Err(KernelError::NoModules { version, modules, .. }) = find(None) else { panic!() };
    assert_eq!((&*version, modules), ("6.1.0-1-amd64", folder.path().join("6.1.0-1-amd64")));
    let given = tempfile::tempdir().unwrap();
    assert!(matches!(find(Some(given.path())), Err(KernelError::NoModules { .. })));
    fs::write(given.path().join("modules.builtin"), "kernel/drivers/block/virtio_blk.ko").unwrap();
    assert_eq!(find(Some(given.path())).unwrap().version, "6.1.0-1-amd64");
    assert!(fetched().version.ends_with("-cloud-amd64"));
}
