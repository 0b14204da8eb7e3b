//! `GET /metrics`: the pool in numbers, in the text format of Prometheus (version 0.0.4).
//!
//! All of it is read from the pool when it is asked for; nothing is counted here.

use std::fmt::{Display, Write};

use denizen::{Figures, Histogram, SessionInfo};

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
pub(crate) fn text(figures: &Figures, sessions: &[SessionInfo]) -> String {
    let mut text = String::new();
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
    text
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
