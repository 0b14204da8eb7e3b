//! How far something is that takes a while: one line on a terminal, and nothing in a pipe.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::Client;
use crate::show;

/// How long something may take without a word of it.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long a line stays before the next one takes its place.
const PAUSE: Duration = Duration::from_millis(100);

/// The line; gone when dropped.
pub struct Bar {
    is_terminal: bool,
    /// When the next line may be shown.
    next: Instant,
    shown: bool,
}

impl Default for Bar {
    fn default() -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        Self { is_terminal, next: Instant::now() + PATIENCE, shown: false }
    }
}

impl Bar {
    /// Shows a line in the place of the last one, if it is time to.
    pub fn show(&mut self, line: impl FnOnce() -> String) {
        let now = Instant::now();
        if self.is_terminal && now >= self.next {
            self.next = now + PAUSE;
            self.shown = true;
            // A terminal that is gone needs no bar.
            let _ = write!(std::io::stderr(), "\r\u{1b}[K{}", line());
        }
    }

    /// Takes the line away.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            let _ = write!(std::io::stderr(), "\r\u{1b}[K");
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Waits for what the daemon does, and shows how far it is: with this session, or with all backups.
pub async fn showing<T>(
    client: &Client,
    session: Option<&str>,
    work: impl Future<Output = denizen_client::Result<T>>,
) -> denizen_client::Result<T> {
    let mut bar = Bar::default();
    if !bar.is_terminal {
        return work.await;
    }
    tokio::pin!(work);
    let events = async {
        // Without them it is only not shown.
        let Ok(mut events) = client.lines("/v1/events").await else { return };
        while let Ok(Some(line)) = events.next().await {
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            let is_it = match session {
                Some(session) => event["name"] == session || event["session"] == session,
                None => event["operation"] == "verify",
            };
            if is_it && event["event"] == "progress" {
                bar.show(|| said(&event));
            }
        }
    };
    tokio::select! {
        biased;
        done = &mut work => return done,
        () = events => {}
    }
    work.await
}

/// How far an operation is, in words.
pub fn said(event: &Value) -> String {
    let amount = |field: &str| event[field].as_u64();
    let operation = event["operation"].as_str().unwrap_or_default();
    let bytes = show::bytes(amount("bytes").unwrap_or(0));
    let mut line = format!("{operation}: {bytes}");
    if let Some(total) = amount("total") {
        line.push_str(&format!(" of {}", show::bytes(total)));
    }
    if let Some(files) = amount("files").filter(|files| *files > 0) {
        line.push_str(&format!(", {files} files"));
    }
    line.push_str(&format!(", {}/s", show::bytes(amount("bytes_per_second").unwrap_or(0))));
    if let Some(left) = amount("seconds_left") {
        line.push_str(&format!(", {} left", show::span(left)));
    }
    line
}

/// How much has been moved, and of how much if that is known.
pub struct Moved {
    bytes: u64,
    total: Option<u64>,
    bar: Bar,
}

impl Moved {
    /// Nothing yet, of so much if that is known.
    pub fn of(total: Option<u64>) -> Self {
        Self { bytes: 0, total, bar: Bar::default() }
    }

    /// So much more.
    pub fn on(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        let Self { bytes, total, bar } = self;
        bar.show(|| match total {
            Some(total) => format!("{} of {} MiB", *bytes >> 20, *total >> 20),
            None => format!("{} MiB", *bytes >> 20),
        });
    }
}
