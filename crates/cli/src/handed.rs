//! Listeners that a service manager has opened for the daemon (sd_listen_fds(3)). What is handed
//! over is used or refused by its name, never left open: whatever the daemon starts would have it.

use denizen_server::Handed;
use listenfd::ListenFd;
use rustix::net::sockopt::socket_acceptconn;

use crate::{Failure, Result};

/// Takes what is handed over to this process, and keeps it and word of it from its children. To be
/// called while there is one thread.
pub fn take() -> Result<Handed> {
    let mut handed = Handed::default();
    let is_ours = std::env::var("LISTEN_PID").is_ok_and(|it| it.parse() == Ok(std::process::id()));
    if !is_ours {
        return Ok(handed);
    }
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').filter(|name| !name.is_empty());
    let mut all = ListenFd::from_env();
    for place in 0..all.len() {
        let name = names.next().unwrap_or("unknown");
        let refused = |why: &str| {
            Failure::new(format!(
                "the service manager has handed over `{name}` (descriptor {}), which {why}",
                place + 3
            ))
        };
        if let Ok(Some(listener)) = all.take_unix_listener(place) {
            if !socket_acceptconn(&listener).unwrap_or(false) {
                return Err(refused("does not listen: set Accept=no in its unit"));
            }
            if handed.socket.replace(listener).is_some() {
                return Err(refused("is a second Unix socket: the daemon has one"));
            }
        } else if let Ok(Some(listener)) = all.take_tcp_listener(place) {
            if !socket_acceptconn(&listener).unwrap_or(false) {
                return Err(refused("does not listen: set Accept=no in its unit"));
            }
            handed.tcp.push(listener);
        } else {
            return Err(refused(
                "is no stream socket, Unix or TCP: ListenStream= in its unit makes one",
            ));
        }
    }
    Ok(handed)
}
