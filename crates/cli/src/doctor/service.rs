//! What the doctor finds of the daemon as others depend on it: where it listens and who gets in, what
//! grows, where backups go, and what time it is.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::{Duration, SystemTime};

use denizen_server::{Certificate, Keys};
use jiff::{Timestamp, Unit};
use serde_json::Value;

use super::{Finding, Grade, fine, is_root, wrong};
use crate::client::{self, Client};
use crate::config::Settings;
use crate::show;

/// What ends sooner is told of.
const SOON: Duration = Duration::from_hours(24 * 14);
/// Less room than this is told of, in bytes.
const LITTLE: u64 = 1 << 30;

/// All of it.
pub async fn findings(settings: &Settings) -> Vec<Finding> {
    let daemon = match client::answering(settings).await {
        Ok(daemon) if settings.url.is_none() => daemon,
        _ => None,
    };
    let mut all = Vec::new();
    if !settings.listen.is_empty() {
        let keys = keys(settings, daemon.as_ref()).await;
        all.extend(listeners(settings, daemon.is_some(), keys.grade == Grade::Fine));
        all.push(keys);
        all.push(tls(settings));
    }
    all.extend(socket_unit(settings, Path::new("/")));
    all.push(logs(settings));
    all.push(destination(settings, daemon.as_ref()).await);
    all.push(clock(settings, SystemTime::now()));
    all
}

/// Whether each address can be had, and whether the daemon would take it.
fn listeners(settings: &Settings, is_served: bool, has_key: bool) -> Vec<Finding> {
    const NAME: &str = "listener";
    let finding = |address: &SocketAddr| {
        let is_open = !address.ip().to_canonical().is_loopback();
        let is_safe = has_key && settings.tls_certificate.is_some();
        if is_open && !is_safe && !settings.insecure_listen {
            return wrong(
                NAME,
                Grade::Fail,
                format!(
                    "{address} is reached from other machines, and there is no TLS or no key that \
                     is good: the daemon does not start"
                ),
                "set `tls_certificate` and `tls_key`, and make a key: denizen key create NAME",
            );
        }
        match TcpListener::bind(address) {
            // The daemon has it: its being taken is what is wanted.
            Err(_) if is_served => fine(NAME, format!("{address} is listened on")),
            Err(error) => wrong(
                NAME,
                Grade::Fail,
                format!("{address}: {error}: the daemon does not start"),
                "set another `listen`, or end what has that address",
            ),
            Ok(_) if is_served && address.port() != 0 => wrong(
                NAME,
                Grade::Note,
                format!("nobody listens on {address}: the daemon was started with other settings"),
                "denizen shutdown, then start it anew",
            ),
            Ok(_) if is_open && !is_safe => wrong(
                NAME,
                Grade::Note,
                format!("{address} is reached from other machines without TLS or keys"),
                "have a proxy before it that sees to both, or set `insecure_listen = false`",
            ),
            Ok(_) => fine(NAME, format!("{address} can be listened on")),
        }
    };
    settings.listen.iter().map(finding).collect()
}

/// Whether anybody gets in by TCP, and for how long.
async fn keys(settings: &Settings, daemon: Option<&Client>) -> Finding {
    const NAME: &str = "keys";
    let all = match daemon {
        Some(daemon) => daemon.json("GET", "/v1/keys").await.map_err(|error| error.to_string()),
        // Where there are none, looking would make their folder.
        None if !settings.state.join("keys.json").exists() => Ok(serde_json::json!({ "keys": [] })),
        None => match Keys::open(&settings.state) {
            Ok(keys) => Ok(serde_json::json!({ "keys": keys.list() })),
            Err(error) => Err(error.to_string()),
        },
    };
    let all = match all {
        Ok(all) => all["keys"].as_array().cloned().unwrap_or_default(),
        Err(error) => {
            return wrong(NAME, Grade::Fail, error, "see who has the state folder");
        }
    };
    let now = Timestamp::now();
    let end = |key: &Value| key["expires_at"].as_str()?.parse::<Timestamp>().ok();
    let good: Vec<_> = all.iter().filter(|key| end(key).is_none_or(|end| end > now)).collect();
    let Some(last) = good.iter().map(|key| end(key).unwrap_or(Timestamp::MAX)).max() else {
        let mend = "denizen key create NAME";
        return wrong(NAME, Grade::Fail, "none is good: nobody gets in by TCP", mend);
    };
    let of = format!("{} of {} are good", good.len(), all.len());
    if last.duration_since(now) < SOON.try_into().unwrap_or_default() {
        let what = format!("{of}, the last until {last}: then nobody gets in by TCP");
        return wrong(NAME, Grade::Note, what, "denizen key create NAME");
    }
    fine(NAME, of)
}

/// Whether the certificate can be read, and for how long it is good.
fn tls(settings: &Settings) -> Finding {
    const NAME: &str = "tls";
    let (Some(certificate), Some(key)) = (&settings.tls_certificate, &settings.tls_key) else {
        let what = "none: keys and all else go over the network as they are";
        let mend = "set `tls_certificate` and `tls_key`, or have a proxy before it that has TLS";
        return match settings.front() {
            Err(error) => wrong(NAME, Grade::Fail, error.to_string(), "set both, or none"),
            // On this machine, nobody else reads it.
            Ok(_) if settings.listen.iter().all(|it| it.ip().to_canonical().is_loopback()) => {
                fine(NAME, "none, and only this machine is listened to")
            }
            Ok(_) => wrong(NAME, Grade::Note, what, mend),
        };
    };
    let files = Certificate { certificate: certificate.clone(), key: key.clone() };
    let end = match files.expires() {
        Ok(end) => end,
        Err(why) => {
            let mend =
                "put a certificate and its key (PEM) there: without, the daemon does not start";
            return wrong(NAME, Grade::Fail, why, mend);
        }
    };
    let now = Timestamp::now();
    let place = certificate.display();
    if end <= now {
        let what = format!("{place} was good until {end}: clients refuse it");
        return wrong(NAME, Grade::Fail, what, "put a new one in its place; it is read by itself");
    }
    if end.duration_since(now) < SOON.try_into().unwrap_or_default() {
        let what = format!("{place} is good until {end} only, then clients refuse it");
        return wrong(NAME, Grade::Note, what, "put a new one in its place; it is read by itself");
    }
    fine(NAME, format!("{place} is good until {end}"))
}

/// Whether the socket that systemd would hand over is where clients look for it.
fn socket_unit(settings: &Settings, root: &Path) -> Option<Finding> {
    const NAME: &str = "socket unit";
    if !is_root() {
        return None;
    }
    let folders = ["etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system"];
    let file = |name: &str| {
        let files = folders.map(|folder| root.join(folder).join(name));
        files.into_iter().find(|file| file.exists())
    };
    let unit = file("denizen.socket")?;
    let is_enabled = file("sockets.target.wants/denizen.socket").is_some();
    let text = fs::read_to_string(&unit).unwrap_or_default();
    let streams = text.lines().filter_map(|line| line.trim().strip_prefix("ListenStream="));
    let places: Vec<_> = streams.map(str::trim).filter(|it| it.starts_with('/')).collect();
    let unit = unit.display();
    if !is_enabled {
        return Some(fine(
            NAME,
            format!("{unit} is not enabled: the daemon makes its socket itself"),
        ));
    }
    if places.iter().any(|place| Path::new(place) == settings.socket) {
        return Some(fine(NAME, format!("{unit} listens on {}", settings.socket.display())));
    }
    let what = format!(
        "{unit} listens on {}, and clients look for {}: they start a daemon of their own",
        if places.is_empty() { "no socket".to_owned() } else { places.join(", ") },
        settings.socket.display()
    );
    Some(wrong(NAME, Grade::Note, what, "set `socket` to where the unit listens"))
}

/// What grows, and until when.
fn logs(settings: &Settings) -> Finding {
    const NAME: &str = "logs";
    let log = u64::from(settings.audit_files + 1) * (8 << 20);
    let what = format!(
        "up to {} of audit log, and in each session {} of what its detached commands print",
        show::bytes(log),
        show::bytes(settings.logs.bytes),
    );
    let (audit, session) = (log.saturating_mul(4), settings.logs.bytes.saturating_mul(4));
    let room = rustix::fs::statvfs(&settings.state).ok();
    let room = room.map(|stat| stat.f_blocks.saturating_mul(stat.f_frsize)).filter(|it| *it > 0);
    match room {
        Some(room) if audit > room || session > room => wrong(
            NAME,
            Grade::Note,
            format!("{what}: more than a quarter of the disk"),
            "set `audit_files` or `logs.bytes` to less",
        ),
        _ => fine(NAME, what),
    }
}

/// Whether backups can be written.
async fn destination(settings: &Settings, daemon: Option<&Client>) -> Finding {
    const NAME: &str = "backups";
    let Some(place) = &settings.pool.backup_destination else {
        let what = "no destination: what is lost here is lost";
        return wrong(NAME, Grade::Note, what, "set `backup_destination`");
    };
    let shown = place.display();
    let failed = |error: &dyn std::fmt::Display| {
        let what = format!("{shown}: {error}: no session is backed up, and none is pruned");
        wrong(NAME, Grade::Fail, what, "make it writable, or set another `backup_destination`")
    };
    let is_address = place.to_str().is_some_and(|text| text.contains("://"));
    if !is_address && place.is_dir() {
        // It is removed at once.
        if let Err(error) = tempfile::tempfile_in(place) {
            return failed(&error);
        }
        let stat = rustix::fs::statvfs(place).ok().filter(|stat| stat.f_blocks > 0);
        let free = stat.map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize));
        if let Some(free) = free.filter(|free| *free < LITTLE) {
            let what =
                format!("{shown} has {} left: backups fail when it is full", show::bytes(free));
            return wrong(NAME, Grade::Note, what, "make room there, or set `retention`");
        }
    }
    match daemon {
        // It has the destination's key, and asks it.
        Some(daemon) => match daemon.backups(None).await {
            Ok(all) => fine(NAME, format!("{shown} answers, and has {}", all.len())),
            Err(error) => failed(&error),
        },
        None if is_address => fine(NAME, format!("{shown}; not asked, as no daemon runs")),
        None => fine(NAME, shown.to_string()),
    }
}

/// Whether the clock can be believed: backups are chosen and keys expire by it.
fn clock(settings: &Settings, now: SystemTime) -> Finding {
    const NAME: &str = "clock";
    let mend = "set it, and have it kept right: timedatectl set-ntp true";
    let shown = Timestamp::try_from(now).and_then(|now| now.round(Unit::Second));
    let shown = shown.map_or_else(|_| "beyond all years".to_owned(), |now| now.to_string());
    // 2025.
    let begin = SystemTime::UNIX_EPOCH + Duration::from_hours(24 * 20_089);
    if now < begin {
        let what =
            format!("{shown}, before denizen was written: keys and backups have wrong times");
        return wrong(NAME, Grade::Fail, what, mend);
    }
    // Written whenever a session changes.
    let registry = settings.pool.volume_root.join(".denizen/registry.db");
    let written = fs::metadata(registry).and_then(|known| known.modified()).ok();
    let ahead = written.and_then(|written| written.duration_since(now).ok());
    if let Some(ahead) = ahead.filter(|ahead| *ahead > Duration::from_mins(1)) {
        let what = format!(
            "{shown}, and sessions were used {} later: the clock was wrong, or is",
            show::span(ahead.as_secs())
        );
        return wrong(NAME, Grade::Note, what, mend);
    }
    fine(NAME, shown)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::{Options, Sources};

    fn settings(folder: &Path) -> Settings {
        let mut settings = Sources::new(Options::default()).load().unwrap();
        settings.state = folder.to_owned();
        settings.pool.volume_root = folder.join("pool");
        settings.socket = folder.join("denizen.sock");
        settings
    }

    #[test]
    fn a_clock_that_goes_back_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(folder.path());
        let now = SystemTime::now();
        assert!(clock(&settings, now).grade == Grade::Fine);
        assert!(clock(&settings, SystemTime::UNIX_EPOCH).grade == Grade::Fail);
        let own = settings.pool.volume_root.join(".denizen");
        fs::create_dir_all(&own).unwrap();
        fs::write(own.join("registry.db"), "").unwrap();
        assert!(clock(&settings, now).grade == Grade::Fine);
        let before = now - Duration::from_hours(2);
        let found = clock(&settings, before);
        assert!(found.grade == Grade::Note, "{}", found.what);
    }

    #[test]
    fn a_unit_that_listens_elsewhere_is_noticed() {
        if !is_root() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let mut settings = settings(folder.path());
        let units = folder.path().join("etc/systemd/system");
        assert!(socket_unit(&settings, folder.path()).is_none());
        fs::create_dir_all(units.join("sockets.target.wants")).unwrap();
        let text = "[Socket]\nListenStream=7878\nListenStream=/run/denizen.sock\n";
        fs::write(units.join("denizen.socket"), text).unwrap();
        let grade = |settings: &Settings| socket_unit(settings, folder.path()).unwrap().grade;
        // It does nothing yet.
        assert!(grade(&settings) == Grade::Fine);
        fs::write(units.join("sockets.target.wants/denizen.socket"), text).unwrap();
        assert!(grade(&settings) == Grade::Note);
        settings.socket = "/run/denizen.sock".into();
        assert!(grade(&settings) == Grade::Fine);
    }

    #[test]
    fn logs_that_need_the_disk_for_themselves_are_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = settings(folder.path());
        assert!(logs(&settings).grade == Grade::Fine);
        settings.audit_files = 100_000_000;
        assert!(logs(&settings).grade == Grade::Note);
    }
}
