//! Virtual machines beside those that QEMU runs when nothing else is in between: the same kernel,
//! the same accelerator, as much memory, no device that is not needed, and busybox as all that
//! runs.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use uuid::Uuid;

use crate::{config, median, nanoseconds, print, run};

const BOOTS: usize = 5;
const ROUNDS: usize = 11;
/// Of each one, in MiB.
const MEMORY: u64 = 512;
const IDLE: Duration = Duration::from_secs(60);

/// A clock that is put forward, so that sessions have been idle for long.
#[derive(Debug, Default)]
struct Ahead(AtomicU64);

impl denizen::Clock for Ahead {
    fn wall(&self) -> SystemTime {
        denizen::SystemClock.wall()
    }

    fn uptime(&self) -> Duration {
        denizen::SystemClock.uptime() + Duration::from_secs(self.0.load(Ordering::Relaxed))
    }

    fn boot(&self) -> String {
        denizen::SystemClock.boot()
    }
}

/// With the program that runs in guests, and the folder that has their kernel.
pub async fn machines(folder: &Path, program: &Path, guest: &Path) {
    let (pool, clock) = pool(folder, program, guest);
    let by = pool.hypervisor().await.unwrap().unwrap();
    println!("machines\t{by}");
    let bare = Bare::new(folder, guest, by.contains(" on KVM"));
    // The first one has everything made that is made once.
    let id = Uuid::new_v4();
    to_first_command(&pool, id).await;
    boots(&pool, id, &bare).await;
    new(&pool).await;
    sleeps(&pool, &clock, id, &bare).await;
    commands(&pool, id).await;
    pool.shutdown().await.unwrap();
}

fn pool(folder: &Path, program: &Path, guest: &Path) -> (Arc<denizen::MicroVmManager>, Arc<Ahead>) {
    let clock = Arc::new(Ahead::default());
    let mut config = config(&folder.join("pool"));
    config.idle_shutdown_seconds = IDLE.as_secs();
    let root = root(folder);
    let builder = denizen::MicroVmManager::builder((&config).into())
        .isolation(denizen::Isolation::MicroVm)
        .kernel(guest.join("vmlinuz"), Some(guest.join("modules")))
        .agent_program(program)
        .image(root.to_str().unwrap())
        .limits(denizen::Limits { memory_bytes: Some(MEMORY << 20), ..Default::default() })
        .sleep(denizen::Sleep::Freeze)
        .clock(clock.clone());
    (builder.build().unwrap(), clock)
}

/// A folder with a few programs of this machine.
fn root(folder: &Path) -> PathBuf {
    const SCRIPT: &str = r#"
        mkdir -p "$1/usr/bin" "$1/usr/lib" "$1/usr/lib64" "$1/etc" "$1/tmp"
        cd "$1"
        for name in bin lib lib64; do ln -s usr/$name $name; done
        for name in bash cat cp dd ls mkdir mv rm sleep sync true; do
            cp -L /usr/bin/$name usr/bin
        done
        ln -s bash usr/bin/sh
        ldd usr/bin/* | grep -o '/lib[^ ]*' | sort -u | while read -r file; do
            mkdir -p "usr${file%/*}"
            cp -L "$file" "usr$file"
        done
    "#;
    let root = folder.join("root");
    run(Command::new("sh").args(["-ec", SCRIPT, "sh"]).arg(&root));
    root
}

/// What a session's user waits for.
async fn to_first_command(pool: &denizen::MicroVmManager, id: Uuid) -> f64 {
    let begin = Instant::now();
    let guard = pool.acquire(id).await.unwrap();
    assert!(guard.program("/bin/true").output().await.unwrap().exit.success());
    nanoseconds(begin.elapsed(), 1)
}

async fn boots(pool: &denizen::MicroVmManager, id: Uuid, bare: &Bare) {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for _ in 0..BOOTS {
        pool.stop(id, true).await.unwrap();
        a.push(to_first_command(pool, id).await);
        let begin = Instant::now();
        let guest = bare.boot();
        b.push(nanoseconds(begin.elapsed(), 1));
        drop(guest);
    }
    print("microVM boot to the end of its first command", median(a), Some(median(b)));
}

async fn new(pool: &denizen::MicroVmManager) {
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let id = Uuid::new_v4();
        times.push(to_first_command(pool, id).await);
        pool.remove(id).await.unwrap();
    }
    let name = "new microVM from the template, to the end of its first command";
    print(name, median(times), None);
}

async fn sleeps(pool: &denizen::MicroVmManager, clock: &Ahead, id: Uuid, bare: &Bare) {
    let (mut to_disk, mut bare_to_disk) = (Vec::new(), Vec::new());
    let (mut woken, mut bare_woken) = (Vec::new(), Vec::new());
    let (mut bytes, mut bare_bytes) = (0, 0);
    let memory = pool.session_folder(id).unwrap().join("memory");
    let size = |path: &Path| std::fs::metadata(path).unwrap().len();
    for _ in 0..ROUNDS {
        clock.0.fetch_add(IDLE.as_secs(), Ordering::Relaxed);
        let begin = Instant::now();
        pool.run_maintenance_now().await.unwrap();
        to_disk.push(nanoseconds(begin.elapsed(), 1));
        bytes = size(&memory);
        woken.push(to_first_command(pool, id).await);
        let guest = bare.boot();
        bare_to_disk.push(bare.save(guest));
        bare_bytes = size(&bare.memory());
        bare_woken.push(bare.wake());
    }
    let (saved, bare_saved) = (median(to_disk), median(bare_to_disk));
    let name = "microVM woken from disk, to the end of its first command";
    print(name, median(woken), Some(median(bare_woken)));
    print("microVM put to disk", saved, Some(bare_saved));
    print("memory of it there (bytes)", bytes as f64, Some(bare_bytes as f64));
}

async fn commands(pool: &denizen::MicroVmManager, id: Uuid) {
    let guard = pool.acquire(id).await.unwrap();
    let mut times = Vec::new();
    for round in 0..110 {
        let begin = Instant::now();
        assert!(guard.program("/bin/true").output().await.unwrap().exit.success());
        // The first ones fill caches.
        if round >= 10 {
            times.push(nanoseconds(begin.elapsed(), 1));
        }
    }
    print("/bin/true in a warm microVM session", median(times), None);
}

/// Machines that are QEMU's alone.
struct Bare {
    folder: PathBuf,
    kernel: PathBuf,
    accelerator: &'static str,
}

/// One that runs; it is ended when this is dropped.
struct Guest {
    qemu: Child,
    said: BufReader<ChildStdout>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

const UP: &str = "it is up";

impl Bare {
    fn new(folder: &Path, guest: &Path, kvm: bool) -> Self {
        const SCRIPT: &str = r#"
            mkdir -p "$1/bin" "$1/dev"
            cd "$1"
            cp "$(command -v busybox)" bin/busybox
            ln -s busybox bin/sh
            printf '#!/bin/sh\necho %s\nexec busybox sleep 1000000\n' "$2" > init
            chmod +x init
            mknod dev/console c 5 1
            find . | busybox cpio -o -H newc > ../initramfs 2> /dev/null
        "#;
        let folder = folder.join("bare");
        run(Command::new("sh").args(["-ec", SCRIPT, "sh"]).arg(folder.join("root")).arg(UP));
        let accelerator = if kvm { "kvm" } else { "tcg" };
        Self { folder, kernel: guest.join("vmlinuz"), accelerator }
    }

    fn memory(&self) -> PathBuf {
        self.folder.join("memory")
    }

    fn start(&self, words: &[&str]) -> Guest {
        let mut qemu = Command::new("qemu-system-x86_64");
        let cpu = if self.accelerator == "kvm" { "host" } else { "max" };
        qemu.args(["-M", "q35", "-accel", self.accelerator, "-cpu", cpu])
            .args(["-m", &format!("{MEMORY}M")])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .args([Path::new("-kernel"), &self.kernel])
            .args([Path::new("-initrd"), &self.folder.join("initramfs")])
            .args(["-append", "console=ttyS0 quiet panic=-1"])
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut qemu = qemu.spawn().unwrap();
        let said = BufReader::new(qemu.stdout.take().unwrap());
        Guest { qemu, said }
    }

    /// Starts one; gives it when its first process has printed a line.
    fn boot(&self) -> Guest {
        let qmp = format!("unix:{},server=on,wait=off", self.folder.join("qmp").display());
        let mut guest = self.start(&["-serial", "stdio", "-qmp", &qmp]);
        let mut line = String::new();
        while !line.contains(UP) {
            line.clear();
            assert_ne!(guest.said.read_line(&mut line).unwrap(), 0, "QEMU has ended");
        }
        guest
    }

    /// Has one's memory be written to a file, and ends it; gives how long the former took.
    fn save(&self, guest: Guest) -> f64 {
        let qmp = std::os::unix::net::UnixStream::connect(self.folder.join("qmp")).unwrap();
        let mut said = BufReader::new(qmp.try_clone().unwrap());
        ask(&qmp, r#"{"execute": "qmp_capabilities"}"#);
        ask(
            &qmp,
            r#"{"execute": "migrate-set-capabilities", "arguments": {"capabilities":
               [{"capability": "events", "state": true}]}}"#,
        );
        ask(
            &qmp,
            r#"{"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 1099511627776}}"#,
        );
        let begin = Instant::now();
        let to = format!("exec:cat > {}", self.memory().display());
        ask(&qmp, &format!(r#"{{"execute": "migrate", "arguments": {{"uri": "{to}"}}}}"#));
        hear(&mut said, &["\"completed\""]);
        let time = nanoseconds(begin.elapsed(), 1);
        drop(guest);
        time
    }

    /// How long it takes to bring it back from there until it runs.
    fn wake(&self) -> f64 {
        let from = format!("exec:cat {}", self.memory().display());
        let begin = Instant::now();
        let mut guest = self.start(&["-serial", "null", "-qmp", "stdio", "-incoming", &from]);
        let input = guest.qemu.stdin.take().unwrap();
        ask(&input, r#"{"execute": "qmp_capabilities"}"#);
        // It may have gone on before anybody was there to be told.
        ask(&input, r#"{"execute": "query-status"}"#);
        hear(&mut guest.said, &["\"RESUME\"", "\"running\": true"]);
        nanoseconds(begin.elapsed(), 1)
    }
}

fn ask(mut qmp: impl Write, line: &str) {
    qmp.write_all(line.as_bytes()).unwrap();
    qmp.write_all(b"\n").unwrap();
}

/// Waits for a line with one of some words.
fn hear(said: &mut impl BufRead, words: &[&str]) -> String {
    loop {
        let mut line = String::new();
        assert_ne!(said.read_line(&mut line).unwrap(), 0, "QEMU has ended");
        if words.iter().any(|word| line.contains(word)) {
            return line;
        }
    }
}
