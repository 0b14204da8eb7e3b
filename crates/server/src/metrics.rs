//! `GET /metrics`: the daemon in numbers, in the text format of Prometheus (version 0.0.4).
//!
//! All of it is read when it is asked for, from the pool, the leases and the kernel; nothing is
//! counted here.

use std::fmt::{Display, Write};

use denizen::{Figures, Histogram, SessionInfo, Usage};

/// What the answer is called.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The states that sessions are told to be in; each is there, be there none in it.
const STATES: [&str; 9] = [
    "creating",
    "active",
    "frozen",
    "stopped",
    "restoring",
    "pruning",
    "archived",
    "missing",
    "removing",
];

/// All metrics.
pub(crate) fn text(
    figures: &Figures,
    acquires: &Histogram,
    starts: &Histogram,
    sessions: &[SessionInfo],
    usages: &[Usage],
) -> String {
    let mut text = String::new();
    let version = env!("CARGO_PKG_VERSION");
    head(&mut text, "denizen_build_info", "gauge", "Which denizen this is.");
    line(&mut text, &format!("denizen_build_info{{version=\"{version}\"}}"), 1);
    process(&mut text);
    let acquire = "How long callers waited for the sessions that they were given.";
    histogram(&mut text, "acquire", acquire, acquires);
    let create = "How long it took to make new sessions.";
    histogram(&mut text, "create", create, &figures.create_seconds);
    histogram(&mut text, "exec_start", "How long it took to start commands.", starts);
    let counters = [
        ("backups_written", "Backups written and verified.", figures.backups_written),
        ("backups_failed", "Backups that failed.", figures.backups_failed),
        (
            "backup_added_bytes",
            "Bytes by which backups have made the destination grow.",
            figures.backup_bytes_added,
        ),
        ("backups_forgotten", "Backups deleted.", figures.backups_forgotten),
        ("restores_done", "Sessions put back from a backup.", figures.restores_done),
        ("restores_failed", "Sessions that could not be put back.", figures.restores_failed),
        ("verifications", "Checks of the backup destination.", figures.verifications),
        ("verify_findings", "What these have found wrong.", figures.verify_findings),
    ];
    for (name, help, value) in counters {
        let name = format!("denizen_{name}_total");
        head(&mut text, &name, "counter", help);
        line(&mut text, &name, value);
    }
    histogram(&mut text, "backup", "How long backups took.", &figures.backup_seconds);
    histogram(&mut text, "restore", "How long restores took.", &figures.restore_seconds);

    head(&mut text, "denizen_sessions", "gauge", "Sessions by their state.");
    for state in STATES {
        let count = sessions.iter().filter(|session| session.state == state).count();
        line(&mut text, &format!("denizen_sessions{{state=\"{state}\"}}"), count);
    }
    let count = |holds: fn(&SessionInfo) -> bool| sessions.iter().filter(|it| holds(it)).count();
    let gauges = [
        ("in_use", "Sessions that somebody holds.", count(|it| it.in_use)),
        ("unsaved", "Sessions with changes that no verified backup holds.", count(|it| it.unsaved)),
        ("failing", "Sessions whose last backup failed.", count(|it| it.backup_failure.is_some())),
    ];
    for (name, help, value) in gauges {
        let name = format!("denizen_sessions_{name}");
        head(&mut text, &name, "gauge", help);
        line(&mut text, &name, value);
    }
    usage(&mut text, usages);
    text
}

/// What all that run use together. What cannot be measured is left out.
fn usage(text: &mut String, all: &[Usage]) {
    let memory: u64 = all.iter().filter_map(|it| it.memory_bytes).sum();
    let cpu: f64 = all.iter().filter_map(|it| it.cpu_time).map(|it| it.as_secs_f64()).sum();
    let processes: u64 = all.iter().filter_map(|it| it.processes).sum();
    for (name, help, value) in [
        ("memory_bytes", "Memory that running sessions use.", memory.to_string()),
        (
            "cpu_seconds",
            "Processor time that the sessions running now have used since each was started.",
            cpu.to_string(),
        ),
        ("processes", "Processes of running sessions.", processes.to_string()),
    ] {
        let name = format!("denizen_sessions_{name}");
        head(text, &name, "gauge", help);
        line(text, &name, value);
    }
}

/// The daemon's own process, by the names that the conventions have for it. What cannot be read
/// is left out.
fn process(text: &mut String) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name, which may have anything in it; the first of these is field 3 (proc(5)).
    let fields: Vec<&str> =
        stat.rsplit_once(')').map_or("", |it| it.1).split_ascii_whitespace().collect();
    let field = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
    let ticks = rustix::param::clock_ticks_per_second();
    let booted = std::fs::read_to_string("/proc/stat").ok().and_then(|stat| {
        stat.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse::<u64>().ok())
    });
    #[expect(clippy::cast_precision_loss, reason = "seconds, told to a hundredth")]
    let seconds = |n: u64| n as f64 / ticks as f64;
    let cpu = field(14).zip(field(15)).map(|(user, system)| seconds(user + system));
    #[expect(clippy::cast_precision_loss, reason = "seconds, told to a hundredth")]
    let start = booted.zip(field(22)).map(|(boot, since)| boot as f64 + seconds(since));
    let memory = |field: Option<u64>, unit: u64| field.map(|n| (n * unit).to_string());
    let page = rustix::param::page_size() as u64;
    let open = std::fs::read_dir("/proc/self/fd").ok().map(|all| all.count().to_string());
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let cpu_help = "Processor time that the daemon has used, sandboxes not among it.";
    for (name, kind, help, value) in [
        ("cpu_seconds_total", "counter", cpu_help, cpu.map(|it| it.to_string())),
        ("resident_memory_bytes", "gauge", "Memory of the daemon.", memory(field(24), page)),
        ("virtual_memory_bytes", "gauge", "Address space of the daemon.", memory(field(23), 1)),
        ("open_fds", "gauge", "Open file descriptors.", open),
        ("max_fds", "gauge", "The most that may be open.", most.map(|it| it.to_string())),
        ("start_time_seconds", "gauge", "When the daemon began.", start.map(|it| it.to_string())),
        ("threads", "gauge", "Threads of the daemon.", memory(field(20), 1)),
    ] {
        if let Some(value) = value {
            let name = format!("process_{name}");
            head(text, &name, kind, help);
            line(text, &name, value);
        }
    }
}

fn histogram(text: &mut String, of: &str, help: &str, times: &Histogram) {
    let name = format!("denizen_{of}_duration_seconds");
    head(text, &name, "histogram", help);
    let mut count = 0;
    for (bound, more) in Histogram::BOUNDS.iter().zip(times.counts) {
        count += more;
        line(text, &format!("{name}_bucket{{le=\"{bound}\"}}"), count);
    }
    count += times.longer;
    line(text, &format!("{name}_bucket{{le=\"+Inf\"}}"), count);
    line(text, &format!("{name}_sum"), times.sum);
    line(text, &format!("{name}_count"), count);
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(text: &mut String, name: &str, value: impl Display) {
    let _ = writeln!(text, "{name} {value}");
}
