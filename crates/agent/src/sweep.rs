//! Kills what a session's init left behind when it was killed itself. That is the only
//! case in which processes can get away from it, and the only use of this module; it must
//! never touch a process without the mark of a dead init.

use std::path::Path;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

/// Scans without an end to what they find are given up after so many.
const ROUNDS: usize = 1000;

/// The number in a record that an init's owner wrote ([`Launch::record`](crate::Launch)); none
/// if there is no record.
pub fn recorded(record: &Path) -> Option<u32> {
    std::fs::read_to_string(record).ok()?.lines().next()?.trim().parse().ok()
}

/// The number and the process that a record names, if it names both.
pub(crate) fn launched(record: &Path) -> Option<(u32, Pid)> {
    let text = std::fs::read_to_string(record).ok()?;
    let mut lines = text.lines();
    let nonce = lines.next()?.trim().parse().ok()?;
    let pid = lines.next()?.trim().parse().ok().filter(|pid| *pid > 0)?;
    Some((nonce, Pid::from_raw(pid)?))
}

/// Kills every process whose soft `RLIMIT_LOCKS` says that it descends from an init with one
/// of these numbers, until none is left. Blocks for some milliseconds.
pub fn sweep(nonces: &[u32]) {
    if nonces.is_empty() {
        return;
    }
    let mut clean = 0;
    for _ in 0..ROUNDS {
        let found = marked(nonces);
        if found.is_empty() {
            clean += 1;
            if clean == 2 {
                return;
            }
            continue;
        }
        clean = 0;
        for pid in &found {
            kill(*pid, nonces);
        }
        // Dying takes them a moment, and nobody tells us.
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    tracing::error!(
        "processes of a dead init go on starting others faster than they can be killed"
    );
}

fn marked(nonces: &[u32]) -> Vec<Pid> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
        .filter(|pid| has_mark(*pid, nonces))
        .collect()
}

/// Zombies count as gone: their limits read as empty or they are another's to reap.
pub(crate) fn has_mark(pid: Pid, nonces: &[u32]) -> bool {
    let folder = format!("/proc/{}", pid.as_raw_nonzero());
    let Ok(limits) = std::fs::read_to_string(format!("{folder}/limits")) else {
        return false;
    };
    let mark = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max file locks"))
        .and_then(|rest| rest.split_ascii_whitespace().next())
        .and_then(|soft| soft.parse::<u64>().ok());
    if !nonces.iter().any(|nonce| mark.is_some_and(|mark| mark >> 32 == u64::from(*nonce))) {
        return false;
    }
    let stat = std::fs::read(format!("{folder}/stat")).unwrap_or_default();
    let state = stat.iter().rposition(|byte| *byte == b')').and_then(|at| stat.get(at + 2));
    state.is_some_and(|state| *state != b'Z' && *state != b'X')
}

fn kill(pid: Pid, nonces: &[u32]) {
    match pidfd_open(pid, PidfdFlags::empty()) {
        // The number may have been used again; the descriptor holds on to one process,
        // whose mark is looked at once more.
        Ok(fd) if has_mark(pid, nonces) => drop(pidfd_send_signal(fd, Signal::KILL)),
        Err(Errno::NOSYS) => drop(kill_process(pid, Signal::KILL)),
        _ => {}
    }
}
