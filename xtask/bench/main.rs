//! Measures one row of docs/benchmarks.md and prints it: name, denizen, peer, each in
//! nanoseconds, separated by tabs. Built by `cargo xtask bench` in a crate of its own, so that
//! peers are no dependencies of denizen.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

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
        "exec" => exec(&folder).await,
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

async fn exec(folder: &Path) {
    let ours = denizen_pool(folder);
    let guard = ours.acquire(Uuid::new_v4()).await.unwrap();
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for round in 0..1_050 {
        let begin = Instant::now();
        let output = std::process::Command::new("/bin/true").output().unwrap();
        assert!(output.status.success());
        let between = Instant::now();
        guard.program("/bin/true").output().await.unwrap();
        // The first ones fill caches.
        if round >= 50 {
            b.push(nanoseconds(between - begin, 1));
            a.push(nanoseconds(between.elapsed(), 1));
        }
    }
    print("/bin/true in a warm host session", median(a), Some(median(b)));
    drop(guard);
    ours.shutdown().await.unwrap();
}

/// The second start finds what the first one wrote down.
async fn start(root: &Path) {
    let begin = Instant::now();
    let ours = denizen_pool(root);
    drop(ours.acquire(Uuid::new_v4()).await.unwrap());
    let time = begin.elapsed();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: f64 = line.split_whitespace().next().unwrap().parse().unwrap();
    print("start with 10,000 sessions, to the first guard", nanoseconds(time, 1), None);
    print("resident memory then (bytes)", kib * 1024.0, None);
    ours.shutdown().await.unwrap();
}
