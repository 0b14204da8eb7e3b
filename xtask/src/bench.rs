//! `cargo xtask bench`: measures denizen beside what one would use instead, in one run, and
//! writes `docs/benchmarks.md`. Peers are built in a temporary crate, so that nothing of theirs
//! is here. `cargo xtask bench e2b` measures the sandboxes of E2B's SDK only, and writes their rows.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use crate::root;

/// Rows, and what each is allowed: a ratio to the peer, or nanoseconds or bytes.
const LIMITS: [(&str, &str, Limit); 29] = [
    ("warm acquire and release", "the seed", Limit::Ratio(1.0)),
    ("maintenance pass, 5000 sessions", "the seed", Limit::Most(50_000.0)),
    ("maintenance pass, 100000 sessions", "the seed with 5000", Limit::Most(50_000.0)),
    ("/bin/true in a warm host session", "std::process::Command", Limit::Ratio(1.1)),
    ("/bin/true in a warm sandbox session", "std::process::Command", Limit::Ratio(2.0)),
    ("new sandbox, to the end of its first command", "bwrap", Limit::Ratio(1.0)),
    ("new sandbox from a spare, added to its first command", "", Limit::Most(1e6)),
    ("1,000 sandboxes made, each", "", Limit::None),
    ("memory of a running sandbox and its sleep (bytes)", "", Limit::Most(2.0 * MIB)),
    ("memory of it in the daemon (bytes)", "", Limit::None),
    ("`denizen exec` in a warm sandbox, whole process", "runc exec", Limit::Most(5e6)),
    ("microVM boot to the end of its first command", "bare QEMU to init", Limit::Ratio(1.1)),
    ("new microVM from the template, to the end of its first command", "", Limit::Most(3e8)),
    (
        "microVM woken from disk, to the end of its first command",
        "QEMU -incoming, until it runs",
        Limit::Ratio(1.2),
    ),
    ("microVM put to disk", "QEMU migrate", Limit::None),
    ("memory of it there (bytes)", "QEMU migrate", Limit::None),
    ("/bin/true in a warm microVM session", "", Limit::None),
    ("start with 10,000 sessions, to the first guard", "", Limit::Most(1e9)),
    ("resident memory then (bytes)", "", Limit::Most(64.0 * MIB)),
    ("first backup of a Debian root", "tar \\| zstd -3 -T2", Limit::Ratio(1.0)),
    ("first backup of it, encrypted", "restic", Limit::None),
    ("first backup of it, encrypted too", "borg", Limit::None),
    ("backup of it with nothing changed", "restic", Limit::Most(1e8)),
    ("backup of it with nothing changed, again", "borg", Limit::None),
    ("restore of it", "zstd -d \\| tar", Limit::Ratio(1.0)),
    ("restore of it, encrypted", "restic", Limit::None),
    (SDK_ALL, "bwrap, 100 in a row", Limit::None),
    ("100 SDK sandboxes made at once, p50 of each", "", Limit::None),
    ("100 SDK sandboxes made at once, p99 of each", "", Limit::None),
];

const SDK_ALL: &str = "100 SDK sandboxes made at once, all of them";

const MIB: f64 = 1_048_576.0;

#[derive(Clone, Copy)]
enum Limit {
    /// Only to be known.
    None,
    Ratio(f64),
    Most(f64),
}

/// Measures everything. The seed's file is a peer where it is given.
pub fn run(seed: Option<&str>) -> Result<(), String> {
    if seed == Some("e2b") {
        return sandboxes_only();
    }
    crate::install(&[("bwrap", "bubblewrap"), ("runc", "runc"), ("busybox", "busybox-static")])?;
    crate::install(&[
        ("restic", "restic"),
        ("borg", "borgbackup"),
        ("debootstrap", "debootstrap"),
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("qemu-img", "qemu-utils"),
    ])?;
    crate::fetch_kernel()?;

    let failed = |error: std::io::Error| error.to_string();
    let work = root().join("target/bench");
    let source = work.join("src");
    std::fs::create_dir_all(&source).map_err(failed)?;
    std::fs::create_dir_all(work.join("config/src")).map_err(failed)?;
    let denizen = root().join("crates/denizen");
    let denizen = denizen.display();
    let package = "version = \"0.0.0\"\nedition = \"2024\"\n";
    let manifest = format!(
        "[workspace]\n[package]\nname = \"peers\"\n{package}\
         [features]\nseed = []\n\
         [profile.release]\nlto = \"thin\"\ncodegen-units = 4\n\
         [dependencies]\ndenizen = {{ path = {denizen:?} }}\n\
         smith_config = {{ path = \"config\" }}\nanyhow = \"1\"\nchrono = \"0.4\"\n\
         dashmap = \"6\"\nparking_lot = \"0.12\"\ntar = \"0.4\"\ntokio = {{ version = \"1\", \
         features = [\"full\"] }}\ntracing = \"0.1\"\nuuid = {{ version = \"1\", features = \
         [\"v4\"] }}\nzstd = \"0.13\"\n",
        denizen = denizen.to_string(),
    );
    let config = format!(
        "[package]\nname = \"smith_config\"\n{package}[dependencies]\ndenizen = {{ path = {:?} }}\n",
        denizen.to_string()
    );
    std::fs::write(work.join("Cargo.toml"), manifest).map_err(failed)?;
    std::fs::write(work.join("config/Cargo.toml"), config).map_err(failed)?;
    let executor = "pub mod executor { pub use denizen::VmPoolConfig; }\n";
    std::fs::write(work.join("config/src/lib.rs"), executor).map_err(failed)?;
    for (name, text) in [
        ("main.rs", include_str!("../bench/main.rs")),
        ("machines.rs", include_str!("../bench/machines.rs")),
    ] {
        std::fs::write(source.join(name), text).map_err(failed)?;
    }
    let mut build = vec!["build", "--release", "--quiet"];
    if let Some(seed) = seed {
        std::fs::copy(seed, source.join("seed.rs")).map_err(|error| format!("{seed}: {error}"))?;
        build.extend(["--features", "seed"]);
    }
    eprintln!("+ cargo {}", build.join(" "));
    let built = Command::new("cargo").args(&build).current_dir(&work).status().map_err(failed)?;
    if !built.success() {
        return Err("the peers do not build".to_owned());
    }
    let mut lines = Vec::new();
    for row in ["warm", "pass", "exec", "sandbox"] {
        lines.extend(measure(&work, row, &work.join(format!("run-{row}")))?);
    }
    lines.extend(measure_backups(&work)?);
    crate::run("cargo", &["build", "--release", "--package", "denizen-cli"])?;
    for row in ["program", "machines"] {
        lines.extend(measure(&work, row, &work.join(format!("run-{row}")))?);
    }
    let known = work.join("run-start");
    measure_in(&work, "make", &known)?;
    // Finds the folders and writes them down; what is measured is the start after it.
    measure_in(&work, "start", &known)?;
    lines.extend(measure_in(&work, "start", &known)?);
    std::fs::remove_dir_all(&known).map_err(failed)?;
    lines.extend(measure_sandboxes()?);
    let page = page(&lines)?;
    print!("{page}");
    std::fs::create_dir_all(root().join("docs")).map_err(failed)?;
    std::fs::write(root().join("docs/benchmarks.md"), page).map_err(failed)
}

/// Measures the sandboxes of E2B's SDK, and puts their rows in the place of what the page had.
fn sandboxes_only() -> Result<(), String> {
    crate::install(&[("bwrap", "bubblewrap")])?;
    crate::run("cargo", &["build", "--release", "--package", "denizen-cli"])?;
    let file = root().join("docs/benchmarks.md");
    let failed = |error: std::io::Error| format!("{}: {error}", file.display());
    let page = std::fs::read_to_string(&file).map_err(failed)?;
    let mut rows: Vec<String> = page.lines().map(str::to_owned).collect();
    for line in measure_sandboxes()? {
        let new = row(&line)?;
        print!("{new}");
        let new = new.trim_end().to_owned();
        // Up to the second bar is its name.
        let named = |row: &String| row.split('|').nth(1) == new.split('|').nth(1);
        let of_table = |row: &String| row.starts_with('|');
        match (rows.iter().position(named), rows.iter().rposition(of_table)) {
            (Some(at), _) => rows.splice(at..=at, [new]),
            (None, last) => {
                let end = last.map_or(rows.len(), |last| last + 1);
                rows.splice(end..end, [new])
            }
        };
    }
    std::fs::write(&file, rows.join("\n") + "\n").map_err(failed)
}

/// Sandboxes that E2B's SDK makes, all in one process.
fn measure_sandboxes() -> Result<Vec<String>, String> {
    let folder = root().join("target/e2b");
    let python = crate::e2b::install_python(&folder)?;
    eprintln!("+ tests/e2b/bench.py");
    let output = Command::new(python)
        .arg("-B")
        .arg(root().join("tests/e2b/bench.py"))
        .env("DENIZEN_PROGRAM", root().join("target/release/denizen"))
        .env("E2B_FOLDER", folder.join("bench"))
        .output();
    let output = output.map_err(|error| format!("tests/e2b/bench.py: {error}"))?;
    if !output.status.success() {
        return Err(format!("tests/e2b/bench.py: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

/// Backups, of a root that is made once.
fn measure_backups(work: &Path) -> Result<Vec<String>, String> {
    let debian = work.join("debian");
    if !debian.join("etc/debian_version").exists() {
        let _ = std::fs::remove_dir_all(&debian);
        let partial = work.join("debian.partial");
        let _ = std::fs::remove_dir_all(&partial);
        let made = ["--variant=minbase", "stable", &partial.to_string_lossy()].map(str::to_owned);
        let made: Vec<&str> = made.iter().map(String::as_str).collect();
        crate::run("debootstrap", &made)?;
        // What is not there when nothing runs.
        for device in ["dev", "proc", "sys"] {
            let _ = std::fs::remove_dir_all(partial.join(device));
        }
        std::fs::rename(&partial, &debian).map_err(|error| error.to_string())?;
    }
    measure_with(work, "backup", &work.join("run-backup"), &debian)
}

/// A row in a folder of its own.
fn measure(work: &Path, row: &str, folder: &Path) -> Result<Vec<String>, String> {
    measure_with(work, row, folder, &root().join("target/release/denizen"))
}

fn measure_with(work: &Path, row: &str, folder: &Path, with: &Path) -> Result<Vec<String>, String> {
    // What a run that failed has left.
    let _ = std::fs::remove_dir_all(folder);
    let lines = run_peers(work, row, folder, with)?;
    std::fs::remove_dir_all(folder).map_err(|error| error.to_string())?;
    Ok(lines)
}

fn measure_in(work: &Path, row: &str, folder: &Path) -> Result<Vec<String>, String> {
    run_peers(work, row, folder, &root().join("target/release/denizen"))
}

fn run_peers(work: &Path, row: &str, folder: &Path, with: &Path) -> Result<Vec<String>, String> {
    std::fs::create_dir_all(folder).map_err(|error| error.to_string())?;
    eprintln!("+ peers {row}");
    let peers = work.join("target/release/peers");
    let guest = root().join("target/guest");
    let output = Command::new(peers).arg(row).arg(folder).arg(with).arg(guest).output();
    let output = output.map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(format!("{row}: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

fn page(lines: &[String]) -> Result<String, String> {
    let mut page = String::from(
        "# Benchmarks\n\nWritten by `cargo xtask bench`; medians of one run on one machine, both \
         sides in turns. Read the ratios.\n\n\
         | work | beside | denizen | peer | ratio | wanted | |\n|---|---|---|---|---|---|---|\n",
    );
    let mut notes = String::new();
    for line in lines {
        if let Some(by) = line.strip_prefix("machines\t") {
            let _ = writeln!(notes, "\nMicroVMs, and what is beside them, were run by {by}.");
            continue;
        }
        page += &row(line)?;
    }
    Ok(page + &notes)
}

/// A row of the table, of what was measured.
fn row(line: &str) -> Result<String, String> {
    let mut fields = line.split('\t');
    let mut field = || fields.next().unwrap_or_default();
    let (name, ours, peer) = (field(), field(), field());
    let ours: f64 = ours.parse().map_err(|error| format!("{line}: {error}"))?;
    let peer: Option<f64> = peer.parse().ok();
    let (_, beside, limit) = LIMITS
        .iter()
        .find(|(row, _, _)| *row == name)
        .ok_or_else(|| format!("what is wanted of {name:?} is not written down"))?;
    let show = |value: f64| {
        if name.ends_with("(bytes)") { format!("{:.2} MiB", value / MIB) } else { time(value) }
    };
    let ratio = peer.map(|peer| ours / peer);
    let (wanted, held) = match limit {
        Limit::None => ("–".to_owned(), Some(true)),
        Limit::Ratio(most) => (format!("≤ {most}×"), ratio.map(|ratio| ratio <= *most)),
        Limit::Most(most) => (format!("≤ {}", show(*most)), Some(ours <= *most)),
    };
    let held = match held {
        Some(true) => "held",
        Some(false) => "**missed**",
        None => "not compared",
    };
    let ratio = ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.3}×"));
    let peer = peer.map_or("–".to_owned(), show);
    let beside = if beside.is_empty() { "–" } else { beside };
    let ours = show(ours);
    Ok(format!("| {name} | {beside} | {ours} | {peer} | {ratio} | {wanted} | {held} |\n"))
}

fn time(nanoseconds: f64) -> String {
    match nanoseconds {
        n if n < 1e3 => format!("{n:.0} ns"),
        n if n < 1e6 => format!("{:.1} µs", n / 1e3),
        n if n < 1e9 => format!("{:.2} ms", n / 1e6),
        n => format!("{:.2} s", n / 1e9),
    }
}
