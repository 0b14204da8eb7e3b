//! What a service manager is told of the daemon (sd_notify(3)), if one has asked. It must never be
//! why the daemon does not run.

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::PathBuf;
use std::time::Duration;

use denizen_client::{Client, Target};

/// That the daemon can be reached, and what it does.
pub fn ready(status: &str) {
    tell(&format!("READY=1\nSTATUS={}", status.replace('\n', " ")));
}

/// That it reads its configuration; it is to be told [`ready`] afterwards.
pub fn reloading() {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Since the machine was started: neither is negative.
    let microseconds = now.tv_sec * 1_000_000 + now.tv_nsec / 1000;
    tell(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}\nSTATUS=Reads its configuration"));
}

/// That it has begun to end.
pub fn stopping() {
    tell("STOPPING=1\nSTATUS=Ends what runs in sessions");
}

/// Says again and again that the daemon is well, while it answers on its socket and knows its
/// sessions; for ever, if the manager wants to hear it. Cancel-safe.
pub async fn watched(socket: PathBuf) {
    let Some(within) = watchdog() else { return };
    let client = Client::new(Target::socket(socket));
    let mut look = tokio::time::interval(within / 2);
    loop {
        look.tick().await;
        let answer = client.json("GET", "/v1/sessions?limit=1");
        match tokio::time::timeout(within / 2, answer).await {
            Ok(Ok(_)) => tell("WATCHDOG=1"),
            Ok(Err(error)) => tracing::error!(%error, "the daemon does not answer itself"),
            Err(_) => tracing::error!("the daemon does not answer itself in time"),
        }
    }
}

/// Within which time it is to be told that all is well.
fn watchdog() -> Option<Duration> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let within = number("WATCHDOG_USEC").filter(|it| *it > 0)?;
    // It may be another process's.
    let is_ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
    is_ours.then(|| Duration::from_micros(within))
}

fn tell(words: &str) {
    let Some(place) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(&place, words) {
        tracing::warn!(%error, words, "the service manager cannot be told");
    }
}

fn send(place: &OsStr, words: &str) -> std::io::Result<()> {
    let address = match place.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(place)?,
    };
    UnixDatagram::unbound()?.send_to_addr(words.as_bytes(), &address).map(drop)
}
