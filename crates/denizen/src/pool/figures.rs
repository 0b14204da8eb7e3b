//! What a pool has done since it was opened, and how long that took, in numbers.
//!
//! Nothing is decided by them, and they are gone with the process.

use std::time::Duration;

use serde::Serialize;

/// Counts since the pool was opened.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Figures {
    /// How long it took to make new sessions.
    pub create_seconds: Histogram,
    /// Backups written and verified.
    pub backups_written: u64,
    /// Backups that failed; not those given up as their session was wanted.
    pub backups_failed: u64,
    /// Bytes by which the destination has grown with them.
    pub backup_bytes_added: u64,
    /// How long those written took.
    pub backup_seconds: Histogram,
    /// Sessions put back from a backup.
    pub restores_done: u64,
    /// Sessions that could not be.
    pub restores_failed: u64,
    /// How long it took to put them back.
    pub restore_seconds: Histogram,
    /// Backups deleted.
    pub backups_forgotten: u64,
    /// Checks of the destination.
    pub verifications: u64,
    /// What was found wrong by them.
    pub verify_findings: u64,
}

/// How often something took how long.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Histogram {
    /// How often it took as long as the bound in [`Histogram::BOUNDS`] or less, and longer than
    /// the one before.
    pub counts: [u64; Histogram::BOUNDS.len()],
    /// How often it took longer than any bound.
    pub longer: u64,
    /// Seconds in all.
    pub sum: f64,
}

impl Histogram {
    /// Seconds. The same for all, from what a warm session takes to what a large backup takes.
    pub const BOUNDS: [f64; 14] =
        [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0];

    /// Counts one more.
    pub fn count(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        self.sum += seconds;
        let place = Self::BOUNDS.iter().position(|bound| seconds <= *bound);
        *place.map_or(&mut self.longer, |place| &mut self.counts[place]) += 1;
    }
}
