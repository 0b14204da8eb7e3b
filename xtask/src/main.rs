//! What a contributor runs: `cargo xtask test` installs what the tests need and runs all of
//! them; `cargo xtask web` builds the dashboard, which the next `cargo build` embeds; `cargo xtask
//! bench [SEED | e2b]` writes `docs/benchmarks.md`; `cargo xtask load [MINUTES [ISOLATION]]` has a
//! daemon do a lot at once and writes `docs/load.md`; `cargo xtask dist [PROGRAM]` packs denizen for
//! those who install it. Parts of `test` by themselves: `cargo xtask contract` compares the HTTP API
//! with its description, `cargo xtask mcp` has the tools of MCP's makers speak to `/mcp`, and `cargo
//! xtask e2b [--write]` runs the suites of E2B's SDKs, and writes their table.

mod bench;
mod contract;
mod dist;
mod e2b;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let result =
        match args.next().as_deref() {
            Some("test") => test(),
            Some("web") => web(),
            Some("bench") => bench::run(args.next().as_deref()),
            Some("load") => load(args.next().as_deref(), args.next().as_deref()),
            Some("dist") => dist::make(args.next().as_deref()),
            Some("contract") => contract::check(),
            Some("mcp") => mcp(),
            Some("e2b") => e2b::check(args.next().as_deref()),
            _ => Err("usage: cargo xtask test | web | bench [SEED | e2b] | load [MINUTES [ISOLATION]] | dist [PROGRAM] | contract | mcp | e2b [--write]"
                .to_owned()),
        };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("xtask: {problem}");
            ExitCode::FAILURE
        }
    }
}

/// The repository.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Runs a command in the repository, its output to ours.
fn run(program: &str, args: &[&str]) -> Result<(), String> {
    eprintln!("+ {program} {}", args.join(" "));
    let status = Command::new(program).args(args).current_dir(root()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{program} {}: {status}", args.join(" "))),
        Err(error) => Err(format!("{program}: {error}")),
    }
}

/// Whether a command works, its output to nobody.
fn run_alone(program: &str, args: &[&str]) -> bool {
    let output = Command::new(program).args(args).output();
    output.is_ok_and(|output| output.status.success())
}

/// Whether a program is installed. Not every one of them can be asked for its version.
fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Programs that the tests run, with the Debian package that has each.
const NEEDED: [(&str, &str); 28] = [
    ("sqlite3", "sqlite3"),
    ("tar", "tar"),
    ("zstd", "zstd"),
    ("xz", "xz-utils"),
    ("setsid", "util-linux"),
    ("setpriv", "util-linux"),
    ("newuidmap", "uidmap"),
    ("dpkg-deb", "dpkg"),
    ("dpkg-shlibdeps", "dpkg-dev"),
    ("lintian", "lintian"),
    ("systemd-analyze", "systemd"),
    ("hostname", "hostname"),
    ("mount", "mount"),
    ("script", "bsdutils"),
    ("docker-registry", "docker-registry"),
    ("busybox", "busybox-static"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("mkfs.xfs", "xfsprogs"),
    ("skopeo", "skopeo"),
    ("openssl", "openssl"),
    ("restic", "restic"),
    ("python3", "python3"),
    ("curl", "curl"),
    ("ip", "iproute2"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("mke2fs", "e2fsprogs"),
    ("chromium", "chromium"),
];

/// Installs Debian packages whose programs are not there.
fn install(needed: &[(&str, &str)]) -> Result<(), String> {
    let missing = || -> Vec<&str> {
        let missing = needed.iter().filter(|(program, _)| !is_there(program));
        missing.map(|(_, package)| *package).collect()
    };
    // A package may put out another one that was there, of a version that it does not get along
    // with: the second time that one's own version is installed.
    for _ in 0..2 {
        let missing = missing();
        if missing.is_empty() {
            return Ok(());
        }
        install_packages(&missing)?;
    }
    match missing() {
        missing if missing.is_empty() => Ok(()),
        missing => Err(format!("installed, but not there: {}", missing.join(" "))),
    }
}

/// Installs Debian packages.
fn install_packages(packages: &[&str]) -> Result<(), String> {
    run("apt-get", &["update", "-qq"])?;
    let install = ["install", "-y", "-qq", "--no-install-recommends"];
    run("apt-get", &[&install[..], packages].concat())
}

/// Takes something out of a Debian package, which is not installed, into a folder of `target`,
/// unless `file` is there, which the script makes last: it says that all is there. The script runs
/// in the folder, which is empty.
fn take_out(folder: &str, file: &str, script: &str) -> Result<(), String> {
    let folder = root().join("target").join(folder);
    if folder.join(file).exists() {
        return Ok(());
    }
    let script =
        format!("rm -rf \"$1\" && mkdir -p \"$1\" && cd \"$1\"\napt-get update -qq\n{script}");
    run("sh", &["-ec", &script, "sh", &folder.to_string_lossy()])
}

/// The kernel of the tests' guest, which would make itself this machine's.
fn fetch_kernel() -> Result<(), String> {
    let script = r#"
        package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/ *Depends: //p')
        apt-get download -qq "$package"
        dpkg -x linux-image-*.deb .
        mkdir modules
        find lib '(' -name '*.ko' -o -name modules.builtin ')' -exec mv -t modules {} +
        rm -r linux-image-*.deb lib usr
        mv boot/vmlinuz-* vmlinuz && rm -r boot
    "#;
    take_out("guest", "vmlinuz", script)
}

/// Prometheus's checker, whose package would begin to serve.
fn fetch_promtool() -> Result<(), String> {
    let script = r"
        apt-get download -qq prometheus
        dpkg -x prometheus_*.deb .
        rm -r prometheus_*.deb etc lib var
        mv usr/bin/promtool . && rm -r usr
    ";
    take_out("promtool", "promtool", script)
}

/// Installs what the tests are run and checked with.
fn install_tools() -> Result<(), String> {
    for tool in ["cargo-nextest", "cargo-deny"] {
        if !run_alone(tool, &["--version"]) {
            run("cargo", &["install", tool, "--locked"])?;
        }
    }
    Ok(())
}

fn test() -> Result<(), String> {
    install(&NEEDED)?;
    fetch_kernel()?;
    fetch_promtool()?;
    install_tools()?;
    let has_npm = is_there("npm");
    if has_npm {
        // Before anything is built, so that it is built once.
        web()?;
    }
    run("cargo", &["fmt", "--all", "--check"])?;
    // Advisories would have to be fetched; what we are built from is known here.
    run("cargo", &["deny", "check", "licenses", "bans", "sources"])?;
    let lint = ["clippy", "--workspace", "--lib", "--bins", "--all-features"];
    run("cargo", &[&lint[..], &["--", "-D", "warnings"]].concat())?;
    run("cargo", &["test", "--workspace", "--doc", "--all-features"])?;
    run("cargo", &["nextest", "run", "--workspace", "--all-features"])?;
    // With the program that the tests above were built with.
    contract::check()?;
    if !has_npm {
        eprintln!(
            "xtask: the dashboard, MCP and the SDKs of E2B were NOT tested: they need npm, which is \
             not here"
        );
        return Ok(());
    }
    // Against the program that the tests above were built with.
    run("npm", &["--prefix", "web", "test"])?;
    e2b::check(None)?;
    mcp()
}

/// MCP's own conformance suite and its inspector.
fn mcp() -> Result<(), String> {
    let build = ["build", "--workspace", "--all-features", "--bin", "denizen"];
    run("cargo", &[&build[..], &["--example", "conformance"]].concat())?;
    run("npm", &["--prefix", "tests/mcp", "ci", "--no-audit", "--no-fund"])?;
    run("npm", &["--prefix", "tests/mcp", "test"])
}

/// Runs the test of load for longer than the tests do, and writes down what it measures.
fn load(minutes: Option<&str>, isolation: Option<&str>) -> Result<(), String> {
    let minutes = minutes.unwrap_or("10");
    let minutes: u32 = minutes.parse().map_err(|error| format!("{minutes}: {error}"))?;
    let report = root().join("docs/load.md");
    let set = [
        format!("DENIZEN_LOAD_SECONDS={}", minutes * 60),
        format!("DENIZEN_LOAD_ISOLATION={}", isolation.unwrap_or_default()),
        format!("DENIZEN_LOAD_REPORT={}", report.display()),
    ];
    let test = "cargo test --workspace --all-features --test load -- --nocapture";
    let words: Vec<&str> = set.iter().map(String::as_str).chain(test.split(' ')).collect();
    run("env", &words)
}

/// Builds the dashboard.
fn web() -> Result<(), String> {
    run("npm", &["--prefix", "web", "ci", "--no-audit", "--no-fund"])?;
    run("npm", &["--prefix", "web", "run", "build"])
}
