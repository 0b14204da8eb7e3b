//! `denizen top`: what sessions use, again and again on a terminal, once in a pipe. It only looks.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal};

use crate::client::Client;
use crate::command::RawTerminal;
use crate::{Failure, Result, show};

/// From one look to the next.
const PAUSE: Duration = Duration::from_secs(2);

/// Processor time of sessions by their ids, in microseconds, and when that was.
struct Look {
    at: Instant,
    used: HashMap<String, u64>,
}

impl Look {
    fn at(sessions: &[Value]) -> Self {
        let used = sessions.iter().filter_map(|it| {
            Some((it["id"].as_str()?.to_owned(), it["usage"]["cpu_microseconds"].as_u64()?))
        });
        Self { at: Instant::now(), used: used.collect() }
    }

    /// How much of a processor a session has used since, in percent.
    fn share_since(&self, before: &Self, id: &str) -> Option<f64> {
        let used = self.used.get(id)?.checked_sub(*before.used.get(id)?)?;
        let time = self.at.duration_since(before.at).as_micros();
        // Of so few digits as are shown.
        #[allow(clippy::cast_precision_loss)]
        (time > 0).then(|| used as f64 * 100.0 / time as f64)
    }
}

/// Shows what runs, until the user has seen enough.
pub async fn run(client: &Client, as_json: bool) -> Result<()> {
    if as_json || !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        let all = show::value(client.sessions().await?)?;
        return show::usage(&all, as_json);
    }
    let screen = Screen::open()?;
    let mut keys = tokio::io::stdin();
    let mut resized = listen(SignalKind::window_change())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut before: Option<Look> = None;
    let mut next = tokio::time::interval(PAUSE);
    let (mut lines, mut key) = (Vec::new(), [0]);
    loop {
        tokio::select! {
            _ = next.tick() => {
                let all = show::value(client.sessions().await?)?;
                let all = all.as_array().cloned().unwrap_or_default();
                let now = Look::at(&all);
                lines = shown(all, &now, before.as_ref());
                before = Some(now);
            }
            _ = resized.recv() => {}
            _ = terminate.recv() => return Ok(()),
            read = keys.read(&mut key) => match (read, key[0]) {
                // Ctrl-C and Ctrl-D are keys like others here.
                (Ok(0) | Err(_), _) | (Ok(_), b'q' | b'Q' | 3 | 4) => return Ok(()),
                _ => continue,
            },
        }
        screen.draw(&lines)?;
    }
}

fn listen(kind: SignalKind) -> Result<tokio::signal::unix::Signal> {
    signal(kind).map_err(|error| Failure::new(format!("cannot listen for signals: {error}")))
}

/// The rows, those that use most first.
fn shown(mut all: Vec<Value>, now: &Look, before: Option<&Look>) -> Vec<[String; 6]> {
    let share = |it: &Value| now.share_since(before?, it["id"].as_str()?);
    let memory = |it: &Value| it["usage"]["memory_bytes"].as_u64();
    all.sort_by(|one, other| {
        let by_share = share(other).unwrap_or(-1.0).total_cmp(&share(one).unwrap_or(-1.0));
        by_share.then(memory(other).cmp(&memory(one)))
    });
    all.iter().map(|it| show::usage_row(it, share(it))).collect()
}

/// The terminal, while it is ours; as it was when dropped.
struct Screen(#[allow(dead_code)] Option<RawTerminal>);

impl Screen {
    fn open() -> Result<Self> {
        let raw = RawTerminal::enter()?;
        // Another screen, without a cursor.
        write("\x1b[?1049h\x1b[?25l")?;
        Ok(Self(raw))
    }

    #[allow(clippy::unused_self)] // There is no drawing without a screen.
    fn draw(&self, rows: &[[String; 6]]) -> Result<()> {
        let height = rustix::termios::tcgetwinsize(std::io::stdout());
        let height = height.map_or(24, |size| usize::from(size.ws_row));
        let title = format!("{} sessions  (q: quit)", rows.len());
        let table = show::lines(show::USAGE, rows.iter().cloned());
        let lines = std::iter::once(title.as_str()).chain(table.lines());
        let lines: Vec<_> = lines.take(height.max(1)).collect();
        // From the top, each line to its end, and nothing below.
        let text: Vec<_> = lines.iter().map(|line| format!("{line}\x1b[K")).collect();
        write(&format!("\x1b[H{}\x1b[J", text.join("\r\n")))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // If this fails the terminal is gone.
        let _ = write("\x1b[?25h\x1b[?1049l");
    }
}

fn write(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(|error| Failure::new(format!("cannot print: {error}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    #[test]
    fn the_busiest_come_first_and_what_is_not_known_is_not_made_up() {
        let at = |idle: u64, busy: u64| {
            vec![
                json!({ "id": "a", "name": "none", "state": "stopped" }),
                json!({ "id": "b", "name": "idle", "state": "active", "disk_used": 2048,
                    "usage": { "cpu_microseconds": idle, "memory_bytes": 1 << 20, "processes": 2 } }),
                json!({ "id": "c", "name": "busy", "state": "active", "usage": { "cpu_microseconds": busy } }),
            ]
        };
        let before = Look::at(&at(5, 1_000_000));
        let mut now = Look::at(&at(5, 2_500_000));
        now.at = before.at + Duration::from_secs(2);
        let rows = shown(at(5, 2_500_000), &now, Some(&before));
        let names: Vec<_> = rows.iter().map(|row| row[0].as_str()).collect();
        assert_eq!(names, ["busy", "idle", "none"]);
        assert_eq!(rows[0][2..], ["75.0 %", "-", "-", "-"]);
        assert_eq!(rows[1][2..], ["0.0 %", "1.0 MiB", "2", "2.0 KiB"]);
        assert_eq!(rows[2][2..], ["-", "-", "-", "-"]);
        // A session that was started anew has used less than before.
        let anew = Look { at: now.at, used: HashMap::from([("c".to_owned(), 7)]) };
        assert_eq!(anew.share_since(&before, "c"), None);
    }
}
