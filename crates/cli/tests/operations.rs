//! What who runs the daemon goes by: whether it lives, whether it is ready, and what it measures.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{User, until};

/// Status, head and body of an answer by the daemon's socket.
fn get(user: &User, path: &str, header: &str) -> (u16, String, String) {
    let mut stream = UnixStream::connect(user.state.path().join("denizen.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\nhost: localhost\r\n{header}\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_owned(), body.to_owned())
}

/// A family of metrics: its type, and its samples by name and labels.
type Families = BTreeMap<String, (String, BTreeMap<String, f64>)>;

/// Reads the text format of Prometheus, and panics at what it does not allow or advises against.
fn parse(text: &str) -> Families {
    let is_name = |name: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
        name.chars().all(plain)
            && !name.starts_with(|c: char| c.is_ascii_digit())
            && !name.is_empty()
    };
    assert!(text.ends_with('\n'));
    let mut families = Families::new();
    let mut helped: Option<String> = None;
    let mut current = String::new();
    for line in text.lines() {
        if let Some(told) = line.strip_prefix("# HELP ") {
            let (name, help) = told.split_once(' ').unwrap();
            assert!(is_name(name) && !help.is_empty(), "{line}");
            helped = Some(name.to_owned());
        } else if let Some(told) = line.strip_prefix("# TYPE ") {
            let (name, kind) = told.split_once(' ').unwrap();
            assert_eq!(helped.take().as_deref(), Some(name), "help comes first");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
            let new = families.insert(name.to_owned(), (kind.to_owned(), BTreeMap::new()));
            assert!(new.is_none(), "{line}: twice");
            name.clone_into(&mut current);
        } else {
            let (sample, value) = line.rsplit_once(' ').unwrap();
            let value: f64 = value.parse().unwrap();
            let (name, labels) = sample.split_once('{').map_or((sample, None), |(name, labels)| {
                (name, Some(labels.strip_suffix('}').unwrap()))
            });
            for label in labels.iter().flat_map(|labels| labels.split(',')) {
                let (label, value) = label.split_once('=').unwrap();
                let value = value.strip_prefix('"').unwrap().strip_suffix('"').unwrap();
                assert!(is_name(label) && !value.contains(['"', '\\']), "{line}");
            }
            let (kind, samples) = families.get_mut(&current).unwrap();
            let ends: &[&str] = match kind.as_str() {
                "histogram" => &["_bucket", "_sum", "_count"],
                _ => &[""],
            };
            let is_of = ends.iter().any(|end| name.strip_suffix(end) == Some(&current));
            assert!(is_of, "{line}: not of {current}");
            assert!(value >= 0.0, "{line}");
            assert!(samples.insert(sample.to_owned(), value).is_none(), "{line}: twice");
        }
    }
    for (name, (kind, samples)) in &families {
        assert!(!samples.is_empty(), "{name}");
        if kind == "histogram" {
            let bound = |sample: &str| {
                let le = sample.split_once("le=\"")?.1.trim_end_matches("\"}");
                Some(if le == "+Inf" { f64::INFINITY } else { le.parse().unwrap() })
            };
            let mut buckets: Vec<(f64, f64)> =
                samples.iter().filter_map(|(name, value)| Some((bound(name)?, *value))).collect();
            buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
            assert!(buckets.is_sorted_by(|a, b| a.1 <= b.1), "{name}: {buckets:?}");
            let (most, count) = *buckets.last().unwrap();
            assert!(most.is_infinite(), "{name}");
            assert!((count - samples[&format!("{name}_count")]).abs() < 0.5, "{name}");
            assert!(samples.contains_key(&format!("{name}_sum")), "{name}");
        }
    }
    families
}

fn metrics(user: &User) -> Families {
    let (status, head, body) = get(user, "/metrics", "");
    assert_eq!(status, 200, "{body}");
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    parse(&body)
}

fn value(families: &Families, sample: &str) -> f64 {
    families.values().find_map(|(_, samples)| samples.get(sample)).copied().unwrap()
}

#[test]
fn metrics_are_as_prometheus_wants_them() {
    let user = User::new();
    user.exec("a", "true");
    user.exec("a", "true");
    let families = metrics(&user);
    for (name, count) in [("acquire", 2.0), ("create", 1.0), ("exec_start", 2.0)] {
        let name = format!("denizen_{name}_duration_seconds");
        // Preparing a session for somebody may ask for it more than once.
        assert!(value(&families, &format!("{name}_count")) >= count, "{name}");
        let sum = value(&families, &format!("{name}_sum"));
        assert!(sum > 0.0 && sum < 60.0, "{name}: {sum}");
    }
    let resident = value(&families, "process_resident_memory_bytes");
    assert!((1e6..1e10).contains(&resident), "{resident}");
    assert!(value(&families, "process_open_fds") > 3.0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let age = now.as_secs_f64() - value(&families, "process_start_time_seconds");
    assert!((-2.0..120.0).contains(&age), "{age}");
    // By the other path it is the same, and for a session it is envd's.
    assert_eq!(parse(&get(&user, "/v1/metrics", "").2).len(), families.len());
    let (status, _, of_session) = get(&user, "/metrics", "denizen-session: a\r\n");
    assert_eq!(status, 200);
    assert!(of_session.starts_with('{') && of_session.contains("mem"), "{of_session}");
}

/// What a session uses, once `holds` of it.
fn used(user: &User, session: &str, holds: impl Fn(&serde_json::Value) -> bool) {
    until("it is measured", || holds(&user.json(&["inspect", session])["usage"]));
}

#[test]
fn what_sessions_use_is_measured() {
    for isolation in ["host", "sandbox"] {
        let user = User::new();
        user.json(&["--isolation", isolation, "--spares", "0", "ls"]);
        // Eight megabytes in memory, and a tenth of a second of work.
        let line = "x=$(head -c 8000000 /dev/zero | tr '\\0' x); \
                    i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; : > worked; sleep 1000; :";
        let started = user.run(&["exec", "--detach", "a", "--", "sh", "-c", line]);
        assert!(started.status.success(), "{started:?}");
        let session = user.json(&["inspect", "a"]);
        let worked = Path::new(session["volume"].as_str().unwrap()).join("worked");
        until("it has worked", || worked.exists());
        used(&user, "a", |usage| {
            let number = |name: &str| usage[name].as_u64().unwrap();
            let memory = (8_000_000..500_000_000).contains(&number("memory_bytes"));
            let cpu = (10_000..60_000_000).contains(&number("cpu_microseconds"));
            memory && cpu && number("processes") == 2
        });
        // In a list too, in words, and of all together.
        let listed = user.json(&["ls"]);
        assert_eq!(listed[0]["usage"]["processes"], 2, "{listed}");
        let told = common::text(&user.run(&["inspect", "a"]).stdout);
        assert!(told.contains("2 processes") && told.contains("of CPU"), "{told}");
        let families = metrics(&user);
        assert!(value(&families, "denizen_sessions_memory_bytes") >= 8e6);
        assert!(value(&families, "denizen_sessions_cpu_seconds") >= 0.01);
        assert!((value(&families, "denizen_sessions_processes") - 2.0).abs() < 0.5);
        // What has ended uses nothing, and what is stopped is not measured.
        user.run(&["exec", "a", "--", "true"]);
        user.run(&["stop", "--force", "a"]);
        used(&user, "a", serde_json::Value::is_null);
        user.run(&["start", "a"]);
        let of_none = |usage: &serde_json::Value| usage["processes"].as_u64().unwrap_or(0) == 0;
        used(&user, "a", of_none);
        assert!(value(&metrics(&user), "denizen_sessions_processes") < 0.5);
    }
}

/// Waits until the daemon says of itself that it is not ready, and why.
fn not_ready(user: &User) -> String {
    let mut problem = String::new();
    // What was found is good for a second.
    until("it is not ready", || {
        let (status, head, body) = get(user, "/readyz", "");
        problem = body;
        assert!(status == 200 || head.contains("application/problem+json"), "{head}");
        status == 503
    });
    let problem: serde_json::Value = serde_json::from_str(&problem).unwrap();
    assert_eq!(problem["code"], "not_ready");
    problem["detail"].as_str().unwrap().to_owned()
}

#[test]
fn readiness_is_the_truth() {
    let user = User::new();
    user.json(&["--isolation", "host", "ls"]);
    assert_eq!(get(&user, "/healthz", "").0, 200);
    assert_eq!(get(&user, "/readyz", "").2, "ok\n");
    let (pool, aside) = (user.state.path().join("pool"), user.state.path().join("aside"));
    let ready = || until("it is ready", || get(&user, "/readyz", "").0 == 200);
    std::fs::rename(&pool, &aside).unwrap();
    let why = not_ready(&user);
    assert!(why.contains("volume root"), "{why}");
    assert_eq!(get(&user, "/healthz", "").0, 200);
    // Whoever makes sessions ready ahead of their use may have made its folders again meanwhile.
    let _ = std::fs::remove_dir_all(&pool);
    std::fs::rename(&aside, &pool).unwrap();
    ready();
    // As good as it was, by its looks.
    std::fs::rename(&pool, &aside).unwrap();
    std::fs::create_dir_all(pool.join(".denizen")).unwrap();
    std::fs::copy(aside.join(".denizen/lock"), pool.join(".denizen/lock")).unwrap();
    let why = not_ready(&user);
    assert!(why.contains("another one"), "{why}");
    std::fs::remove_dir_all(&pool).unwrap();
    std::fs::rename(&aside, &pool).unwrap();
    ready();
}

#[test]
fn a_daemon_without_its_backup_destination_is_degraded() {
    let user = User::new();
    let place = user.state.path().join("backups-are-here");
    let destination = place.to_str().unwrap();
    user.json(&["--isolation", "host", "--backup-destination", destination, "ls"]);
    assert_eq!(get(&user, "/readyz", "").2, "ok\n");
    let aside = user.state.path().join("aside");
    std::fs::rename(&place, &aside).unwrap();
    // A file is no folder, for root neither.
    std::fs::write(&place, "").unwrap();
    let told = |wanted: &str| {
        until(&format!("it says {wanted:?}"), || {
            let (status, _, body) = get(&user, "/readyz", "");
            assert_eq!(status, 200, "sessions go on: {body}");
            body.starts_with("ok\n") && body.lines().nth(1).unwrap_or_default().contains(wanted)
        });
    };
    told("degraded: the backup destination cannot be written");
    assert!(user.exec("a", "true").status.success());
    user.run(&["stop", "--force", "a"]);
    assert!(!user.run(&["backup", "a"]).status.success());
    std::fs::remove_file(&place).unwrap();
    std::fs::rename(&aside, &place).unwrap();
    // There again, and what could not be saved is not yet.
    told("degraded: the last backup of some sessions has failed");
    let saved = user.run(&["backup", "a"]);
    assert!(saved.status.success(), "{saved:?}");
    until("nothing is missing", || get(&user, "/readyz", "").2 == "ok\n");
}

/// The names of metrics in text: words that begin as ours do, without the parts that a histogram
/// has by itself.
fn named(text: &str, families: &Families) -> BTreeSet<String> {
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    let begins = |name: &&str| name.starts_with("denizen_") || name.starts_with("process_");
    let family = |name: &str| {
        let of_histogram = ["_bucket", "_sum", "_count"];
        let short = of_histogram.iter().find_map(|end| name.strip_suffix(end));
        let is_histogram = |name: &&str| families.get(*name).is_some_and(|it| it.0 == "histogram");
        short.filter(is_histogram).unwrap_or(name).to_owned()
    };
    text.split(word).filter(begins).map(family).collect()
}

#[test]
fn what_is_shown_and_alerted_on_is_measured() {
    let user = User::new();
    user.json(&["ls"]);
    let families = metrics(&user);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging");
    let alerts = std::fs::read_to_string(folder.join("alerts.yml")).unwrap();
    let dashboard = std::fs::read_to_string(folder.join("grafana-dashboard.json")).unwrap();
    let known: serde_json::Value = serde_json::from_str(&dashboard).unwrap();
    let ids: BTreeSet<_> =
        known["panels"].as_array().unwrap().iter().map(|it| it["id"].as_i64().unwrap()).collect();
    assert_eq!(ids.len(), known["panels"].as_array().unwrap().len());
    for (text, least) in [(&alerts, 8), (&dashboard, 20)] {
        let named = named(text, &families);
        assert!(named.len() >= least, "{named:?}");
        let unknown: Vec<_> = named.iter().filter(|it| !families.contains_key(*it)).collect();
        assert!(unknown.is_empty(), "not measured: {unknown:?}");
    }
    // And what is measured of the pool is shown.
    let shown = named(&dashboard, &families);
    let hidden: Vec<_> = families.keys().filter(|it| it.starts_with("denizen_")).collect();
    let hidden: Vec<_> = hidden.into_iter().filter(|it| !shown.contains(*it)).collect();
    assert!(hidden.is_empty(), "not shown: {hidden:?}");
}

/// Runs Prometheus's own checker, something to its standard input.
fn promtool(args: &[&str], input: &str) {
    let promtool = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../promtool/promtool");
    assert!(promtool.exists(), "no promtool: `cargo xtask test` fetches one");
    let mut command = Command::new(promtool);
    command.args(args).current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let said = child.wait_with_output().unwrap();
    assert!(said.status.success(), "{args:?}: {said:?}");
}

#[test]
fn prometheus_takes_the_metrics_and_the_alerts() {
    let user = User::new();
    user.exec("a", "true");
    user.json(&["backup", "a"]);
    promtool(&["check", "metrics"], &get(&user, "/metrics", "").2);
    promtool(&["check", "rules", "alerts.yml"], "");
    promtool(&["test", "rules", "alerts.test.yml"], "");
    // And each alert is tried there.
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging");
    let alerts = std::fs::read_to_string(folder.join("alerts.yml")).unwrap();
    let tried = std::fs::read_to_string(folder.join("alerts.test.yml")).unwrap();
    let named = |text: &str, before: &str| -> BTreeSet<String> {
        let names = text.lines().filter_map(|line| line.trim().strip_prefix(before));
        names.map(str::to_owned).collect()
    };
    let alerts = named(&alerts, "- alert: ");
    assert!(alerts.len() >= 8);
    assert_eq!(alerts, named(&tried, "alertname: "));
}
