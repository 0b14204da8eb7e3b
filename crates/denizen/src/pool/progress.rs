//! Tells how far an operation is on backups, while it goes on.
//!
//! A few times a second at most, and not at all of what is done soon. Must never hold up or change
//! what it tells of.

use std::sync::Arc;
use std::time::Duration;

use denizen_repository::Counter;
use tokio::time::{Instant, MissedTickBehavior};
use uuid::Uuid;

use super::Pool;
use crate::event::{Event, EventKind};

/// From one word to the next, and until the first.
const PACE: Duration = Duration::from_millis(500);

/// Of what it is told how far it is.
pub(crate) struct Watched {
    /// None: it is of no session alone.
    pub(crate) session: Option<Uuid>,
    pub(crate) operation: &'static str,
    pub(crate) counter: Arc<Counter>,
    /// Whether what need not be read counts as done, too.
    pub(crate) skips: bool,
    /// How many bytes there will be, as far as can be guessed.
    pub(crate) total: Option<u64>,
}

impl Pool {
    /// Waits for `work`, and tells meanwhile how far it is. Cancel-safe as `work` is.
    pub(crate) async fn telling<T>(&self, watched: Watched, work: impl Future<Output = T>) -> T {
        let begun = Instant::now();
        let mut pace = tokio::time::interval_at(begun + PACE, PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tokio::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                _ = pace.tick() => self.tell_progress(&watched, begun.elapsed()),
            }
        }
    }

    fn tell_progress(&self, watched: &Watched, elapsed: Duration) {
        let Watched { session, operation, counter, skips, total } = watched;
        let bytes = if *skips { counter.size() } else { counter.moved() };
        let kind = progress(operation, bytes, counter.files(), *total, elapsed);
        let session = session.unwrap_or_else(Uuid::nil);
        let name = self.state.lock().names.get(&session).map(ToString::to_string);
        self.announcer.announce(Event { at: self.clock.wall(), session, name, kind });
    }
}

fn progress(
    operation: &'static str,
    bytes: u64,
    files: u64,
    total: Option<u64>,
    elapsed: Duration,
) -> EventKind {
    let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).max(1);
    let bytes_per_second = bytes.saturating_mul(1000) / millis;
    // A guess that has turned out too small says nothing of what is left.
    let total = total.filter(|total| *total >= bytes && *total > 0);
    let left = total.filter(|_| bytes_per_second > 0).map(|total| total - bytes);
    let seconds_left = left.map(|left| left.div_ceil(bytes_per_second));
    EventKind::Progress { operation, bytes, files, total, bytes_per_second, seconds_left }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{MicroVmManager, VmPoolConfig};

    #[tokio::test(start_paused = true)]
    async fn told_twice_a_second_and_not_of_what_is_done_soon() {
        let folder = tempfile::tempdir().unwrap();
        let volume_root = folder.path().join("pool");
        let config = VmPoolConfig { enabled: true, volume_root, ..VmPoolConfig::default() };
        let manager = MicroVmManager::new((&config).into()).unwrap();
        let pool = manager.pool().unwrap();
        let mut events = manager.events().unwrap();
        let telling = |operation, time| {
            let counter = Arc::default();
            let watched = Watched { session: None, operation, counter, skips: true, total: None };
            pool.telling(watched, tokio::time::sleep(time))
        };
        telling("restore", Duration::from_millis(400)).await;
        telling("verify", Duration::from_millis(1750)).await;
        for _ in 0..3 {
            let kind = events.next().await.unwrap().kind;
            assert!(matches!(kind, EventKind::Progress { operation: "verify", .. }), "{kind:?}");
        }
        let more = tokio::time::timeout(Duration::from_secs(5), events.next()).await;
        assert!(more.is_err(), "{more:?}");
    }

    #[test]
    fn what_is_left_follows_from_the_rate_so_far() {
        let told = |bytes, total| progress("backup", bytes, 3, total, Duration::from_secs(2));
        let expected = |bytes, total, bytes_per_second, seconds_left| EventKind::Progress {
            operation: "backup",
            bytes,
            files: 3,
            total,
            bytes_per_second,
            seconds_left,
        };
        assert_eq!(told(200, Some(1000)), expected(200, Some(1000), 100, Some(8)));
        assert_eq!(told(0, Some(1000)), expected(0, Some(1000), 0, None));
        assert_eq!(told(200, Some(100)), expected(200, None, 100, None));
        assert_eq!(told(200, None), expected(200, None, 100, None));
    }
}
