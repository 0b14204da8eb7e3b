//! How far something is that takes a while: one line on a terminal, and nothing in a pipe.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

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
