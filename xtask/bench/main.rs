//! Measures one row of docs/benchmarks.md and prints it: name, denizen, peer, each in
//! nanoseconds, separated by tabs. Built by `cargo xtask bench` in a crate of its own, so that
//! peers are no dependencies of denizen.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

mod machines;
#[cfg(feature = "seed")]
#[allow(warnings)]
mod seed;

const MANY: usize = 5_000;

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let row = args.next().expect("a row");
    let folder = PathBuf::from(args.next().expect("an empty folder"));
    match row.as_str() {
        "warm" => warm(&folder).await,
        "pass" => pass(&folder).await,
        "exec" => exec(&folder, denizen::Isolation::Host).await,
        "sandbox" => {
            exec(&folder.join("exec"), denizen::Isolation::Sandbox).await;
            new_sandboxes(&folder.join("new")).await;
            spare_sandboxes(&folder.join("spare")).await;
            many_sandboxes(&folder.join("many")).await;
        }
        "backup" => backups(&folder, &PathBuf::from(args.next().expect("a Debian root"))).await,
        "program" => program(&folder, &PathBuf::from(args.next().expect("the program"))),
        "machines" => {
            let program = PathBuf::from(args.next().expect("the program"));
            let guest = PathBuf::from(args.next().expect("a kernel's folder"));
            machines::machines(&folder, &program, &guest).await;
        }
        "make" => make(&folder, 10_000),
        "start" => start(&folder).await,
        other => panic!("no row {other}"),
    }
}

fn print(name: &str, ours: f64, peer: Option<f64>) {
    println!("{name}\t{ours}\t{}", peer.map_or(String::new(), |peer| peer.to_string()));
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn nanoseconds(time: Duration, times: usize) -> f64 {
    time.as_secs_f64() * 1e9 / times as f64
}

fn config(root: &Path) -> denizen::VmPoolConfig {
    denizen::VmPoolConfig {
        enabled: true,
        volume_root: root.to_owned(),
        max_vms: 1_000_000,
        ..Default::default()
    }
}

fn denizen_pool(root: &Path) -> Arc<denizen::MicroVmManager> {
    denizen::MicroVmManager::new((&config(root)).into()).unwrap()
}

fn isolated_pool(root: &Path, isolation: denizen::Isolation) -> Arc<denizen::MicroVmManager> {
    denizen::MicroVmManager::builder((&config(root)).into()).isolation(isolation).build().unwrap()
}

#[cfg(feature = "seed")]
fn seed_pool(root: &Path) -> Arc<seed::MicroVmManager> {
    seed::MicroVmManager::new((&config(root)).into()).unwrap()
}

fn make(root: &Path, sessions: usize) {
    for _ in 0..sessions {
        std::fs::create_dir_all(root.join(Uuid::new_v4().to_string()).join("volume")).unwrap();
    }
}

/// In turns, so that both meet the same weather.
async fn warm(folder: &Path) {
    const ROUNDS: usize = 200;
    const TIMES: usize = 2_000;
    let id = Uuid::new_v4();
    let ours = denizen_pool(&folder.join("ours"));
    drop(ours.acquire(id).await.unwrap());
    #[cfg(feature = "seed")]
    let theirs = seed_pool(&folder.join("theirs"));
    #[cfg(feature = "seed")]
    drop(theirs.acquire(id).await.unwrap());
    let (mut a, mut b) = (Vec::new(), Vec::<f64>::new());
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        for _ in 0..TIMES {
            drop(ours.acquire(id).await.unwrap());
        }
        a.push(nanoseconds(begin.elapsed(), TIMES));
        #[cfg(feature = "seed")]
        {
            let begin = Instant::now();
            for _ in 0..TIMES {
                drop(theirs.acquire(id).await.unwrap());
            }
            b.push(nanoseconds(begin.elapsed(), TIMES));
        }
    }
    print("warm acquire and release", median(a), (!b.is_empty()).then(|| median(std::mem::take(&mut b))));
    ours.shutdown().await.unwrap();
}

async fn pass(folder: &Path) {
    #[cfg(not(feature = "seed"))]
    let peer = None;
    #[cfg(feature = "seed")]
    let peer = {
        let theirs = seed_pool(&folder.join("theirs"));
        for _ in 0..MANY {
            drop(theirs.acquire(Uuid::new_v4()).await.unwrap());
        }
        let mut times = Vec::new();
        for _ in 0..100 {
            let begin = Instant::now();
            let _ = theirs.run_maintenance_now().await;
            times.push(nanoseconds(begin.elapsed(), 1));
        }
        Some(median(times))
    };
    for sessions in [MANY, 100_000] {
        let root = folder.join(format!("ours-{sessions}"));
        make(&root, sessions);
        let ours = denizen_pool(&root);
        assert_eq!(ours.sessions().unwrap().len(), sessions);
        let mut times = Vec::new();
        for _ in 0..100 {
            let begin = Instant::now();
            ours.run_maintenance_now().await.unwrap();
            times.push(nanoseconds(begin.elapsed(), 1));
        }
        let name = format!("maintenance pass, {sessions} sessions");
        print(&name, median(times), peer);
        ours.shutdown().await.unwrap();
    }
}

async fn exec(folder: &Path, isolation: denizen::Isolation) {
    let ours = isolated_pool(folder, isolation);
    let guard = ours.acquire(Uuid::new_v4()).await.unwrap();
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for round in 0..1_050 {
        let begin = Instant::now();
        run(&mut std::process::Command::new("/bin/true"));
        let between = Instant::now();
        let output = guard.program("/bin/true").output().await.unwrap();
        assert!(output.exit.success());
        // The first ones fill caches.
        if round >= 50 {
            b.push(nanoseconds(between - begin, 1));
            a.push(nanoseconds(between.elapsed(), 1));
        }
    }
    let name = format!("/bin/true in a warm {} session", isolation.name());
    print(&name, median(a), Some(median(b)));
    drop(guard);
    ours.shutdown().await.unwrap();
}

fn run(command: &mut std::process::Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// From nothing to the end of the first command.
async fn new_sandboxes(folder: &Path) {
    let ours = isolated_pool(folder, denizen::Isolation::Sandbox);
    let bwrap = || {
        let mut bwrap = std::process::Command::new("bwrap");
        bwrap.args(["--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"]);
        bwrap.args(["--tmpfs", "/tmp", "/bin/true"]);
        bwrap
    };
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for round in 0..110 {
        let begin = Instant::now();
        run(&mut bwrap());
        let between = Instant::now();
        let id = Uuid::new_v4();
        let guard = ours.acquire(id).await.unwrap();
        assert!(guard.program("/bin/true").output().await.unwrap().exit.success());
        let end = Instant::now();
        drop(guard);
        ours.remove(id).await.unwrap();
        if round >= 10 {
            b.push(nanoseconds(between - begin, 1));
            a.push(nanoseconds(end - between, 1));
        }
    }
    print("new sandbox, to the end of its first command", median(a), Some(median(b)));
    ours.shutdown().await.unwrap();
}

/// What a new session adds to its first command where a spare is ready.
async fn spare_sandboxes(folder: &Path) {
    let builder = denizen::MicroVmManager::builder((&config(folder)).into());
    let ours = builder.isolation(denizen::Isolation::Sandbox).spares(1).build().unwrap();
    let (mut new, mut warm) = (Vec::new(), Vec::new());
    for round in 0..110 {
        // Waits for the spare.
        ours.run_maintenance_now().await.unwrap();
        let id = Uuid::new_v4();
        let begin = Instant::now();
        let guard = ours.acquire(id).await.unwrap();
        assert!(guard.program("/bin/true").output().await.unwrap().exit.success());
        let end = Instant::now();
        ours.run_maintenance_now().await.unwrap();
        let again = Instant::now();
        assert!(guard.program("/bin/true").output().await.unwrap().exit.success());
        if round >= 10 {
            new.push(nanoseconds(end - begin, 1));
            warm.push(nanoseconds(again.elapsed(), 1));
        }
        drop(guard);
        ours.remove(id).await.unwrap();
    }
    let added = median(new) - median(warm);
    print("new sandbox from a spare, added to its first command", added, None);
    ours.shutdown().await.unwrap();
}

/// What sandboxes take of memory beyond the command that runs in each.
async fn many_sandboxes(folder: &Path) {
    const MANY: usize = 1_000;
    let ours = isolated_pool(folder, denizen::Isolation::Sandbox);
    // The first has caches filled.
    let first = ours.acquire(Uuid::new_v4()).await.unwrap();
    assert!(first.program("/bin/true").output().await.unwrap().exit.success());
    let (before, used_before) = (own_memory(), memory_used());
    let mut guards = Vec::new();
    let begin = Instant::now();
    for _ in 0..MANY {
        let guard = ours.acquire(Uuid::new_v4()).await.unwrap();
        let started = guard.command("sleep 1000 > /dev/null 2>&1 &").output().await.unwrap();
        assert!(started.exit.success());
        guards.push(guard);
    }
    let time = begin.elapsed();
    let (after, used_after) = (own_memory(), memory_used());
    print("1,000 sandboxes made, each", nanoseconds(time, MANY), None);
    // A sleep of its own is all that each runs; it is not taken off.
    let all = (used_after - used_before) / MANY as f64;
    print("memory of a running sandbox and its sleep (bytes)", all, None);
    print("memory of it in the daemon (bytes)", (after - before) / MANY as f64, None);
    drop((first, guards));
    ours.shutdown().await.unwrap();
}

fn memory_used() -> f64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let kib = |name: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    (kib("MemTotal:") - kib("MemAvailable:")) * 1024.0
}

fn own_memory() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: f64 = line.split_whitespace().next().unwrap().parse().unwrap();
    kib * 1024.0
}

/// The whole program, beside `runc exec` into a container that runs.
fn program(folder: &Path, program: &Path) {
    let denizen = |args: &[&str]| {
        let mut denizen = std::process::Command::new(program);
        denizen.env("DENIZEN_STATE", folder.join("state"));
        denizen.env("DENIZEN_CACHE", folder.join("cache")).args(args);
        denizen
    };
    let runc = |args: &[&str]| {
        let mut runc = std::process::Command::new("runc");
        runc.arg("--root").arg(folder.join("runc")).args(args).current_dir(folder);
        runc
    };
    run(&mut denizen(&["exec", "bench", "--", "/bin/true"]));
    run(&mut runc(&["spec"]));
    let rootfs = "mkdir -p rootfs/bin && cp \"$(command -v busybox)\" rootfs/bin/ && \
                  ln -s busybox rootfs/bin/true && ln -s busybox rootfs/bin/sleep";
    run(std::process::Command::new("sh").args(["-c", rootfs]).current_dir(folder));
    let spec = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let spec = spec.replace("\"terminal\": true", "\"terminal\": false");
    let spec = spec.replace("\"sh\"", "\"sleep\", \"1000\"");
    std::fs::write(folder.join("config.json"), spec).unwrap();
    let quiet = std::process::Stdio::null;
    let mut started = runc(&["run", "-d", "denizen-bench"]);
    started.stdin(quiet()).stdout(quiet()).stderr(quiet());
    assert!(started.status().unwrap().success(), "runc");
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for _ in 0..100 {
        let begin = Instant::now();
        run(&mut runc(&["exec", "denizen-bench", "/bin/true"]));
        let between = Instant::now();
        run(&mut denizen(&["exec", "bench", "--", "/bin/true"]));
        b.push(nanoseconds(between - begin, 1));
        a.push(nanoseconds(between.elapsed(), 1));
    }
    run(&mut runc(&["delete", "--force", "denizen-bench"]));
    run(&mut denizen(&["shutdown"]));
    print("`denizen exec` in a warm sandbox, whole process", median(a), Some(median(b)));
}

/// A Debian root as a session's files: saved, saved again with nothing changed, and put back.
async fn backups(folder: &Path, debian: &Path) {
    let shell = |line: &str| {
        let mut sh = std::process::Command::new("sh");
        sh.args(["-ec", line, "sh"]).arg(debian).current_dir(folder);
        sh.env("RESTIC_PASSWORD", "secret").env("BORG_PASSPHRASE", "secret");
        sh.env("BORG_BASE_DIR", folder.join("borg-base"));
        run(&mut sh);
    };
    let timed = |line: &str| {
        let begin = Instant::now();
        shell(line);
        nanoseconds(begin.elapsed(), 1)
    };
    // To disk, as ours are.
    const TAR: &str = "tar --xattrs -C \"$1\" -c . | zstd -3 -T2 -q -f -o root.tar.zst; sync root.tar.zst";
    const UNTAR: &str = "zstd -dcq root.tar.zst | tar --xattrs -C back -xpf -; sync -f back";
    const RESTIC: &str = "restic -q --no-cache -r restic backup \"$1\"";
    const UNRESTIC: &str = "restic -q --no-cache -r restic restore latest --target back; sync -f back";
    const BORG: &str = "borg create -C zstd,3 borg::\"$(date +%s%N)\" \"$1\"";
    let mut times: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for round in 0..5 {
        let mut note = |row, time| times.entry(row).or_default().push(time);
        let mut config = config(&folder.join(format!("pool-{round}")));
        config.backup_destination = Some(folder.join(format!("backups-{round}")));
        let builder = denizen::MicroVmManager::builder((&config).into());
        let ours = builder.backup_format(denizen::BackupFormat::Repository).build().unwrap();
        // The key is derived once in a process.
        let (first, id) = (Uuid::new_v4(), Uuid::new_v4());
        drop(ours.acquire(first).await.unwrap());
        ours.backup(first).await.unwrap();
        drop(ours.acquire(id).await.unwrap());
        let volume = ours.session_folder(id).unwrap().join("volume");
        run(std::process::Command::new("cp").arg("-aT").arg(debian).arg(&volume));
        shell("sync -f .");
        let begin = Instant::now();
        ours.backup(id).await.unwrap();
        note("first", nanoseconds(begin.elapsed(), 1));
        drop(ours.acquire(id).await.unwrap());
        let begin = Instant::now();
        ours.backup(id).await.unwrap();
        note("same", nanoseconds(begin.elapsed(), 1));
        let begin = Instant::now();
        ours.restore(id, None).await.unwrap();
        note("restore", nanoseconds(begin.elapsed(), 1));
        ours.shutdown().await.unwrap();
        shell("rm -rf back borg restic; mkdir back; restic -q -r restic init");
        shell("borg init -e repokey-blake2 borg 2> /dev/null");
        note("tar first", timed(TAR));
        note("tar restore", timed(UNTAR));
        shell("rm -rf back; mkdir back");
        note("restic first", timed(RESTIC));
        note("restic same", timed(RESTIC));
        note("restic restore", timed(UNRESTIC));
        note("borg first", timed(BORG));
        note("borg same", timed(BORG));
        shell("rm -rf back backups-* pool-*");
    }
    let mut row = |name: &str, ours: &str, peer: &str| {
        let mut of = |row: &str| median(times[row].clone());
        print(name, of(ours), Some(of(peer)));
    };
    row("first backup of a Debian root", "first", "tar first");
    row("first backup of it, encrypted", "first", "restic first");
    row("first backup of it, encrypted too", "first", "borg first");
    row("backup of it with nothing changed", "same", "restic same");
    row("backup of it with nothing changed, again", "same", "borg same");
    row("restore of it", "restore", "tar restore");
    row("restore of it, encrypted", "restore", "restic restore");
}

/// The second start finds what the first one wrote down.
async fn start(root: &Path) {
    let begin = Instant::now();
    let ours = denizen_pool(root);
    drop(ours.acquire(Uuid::new_v4()).await.unwrap());
    let time = begin.elapsed();
    let memory = own_memory();
    print("start with 10,000 sessions, to the first guard", nanoseconds(time, 1), None);
    print("resident memory then (bytes)", memory, None);
    ours.shutdown().await.unwrap();
}
