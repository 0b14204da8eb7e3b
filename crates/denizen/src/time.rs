//! The pool's clock: how much time has passed for a session, also across restarts.
//!
//! Time within one boot is measured by `CLOCK_BOOTTIME` (`clock_gettime(2)`), which counts
//! suspended time and does not follow steps of the wall clock; a restart of the program within
//! that boot goes on with it. Only after a reboot is the wall clock asked how long the machine
//! was away, and a wall clock that went back counts as no time at all. The clock must never
//! go back: what was not due before cannot be undue after.

use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{fmt, fs, sync::Arc};

use crate::lifecycle::PoolTime;

/// Where a pool reads the time. [`SystemClock`] is what a pool has unless its builder is given
/// another, as tests do.
pub trait Clock: fmt::Debug + Send + Sync {
    /// The wall clock. May be stepped in either direction at any moment.
    fn wall(&self) -> SystemTime;
    /// Time since boot, with time asleep. Never goes back within a boot.
    fn uptime(&self) -> Duration;
    /// Which boot `uptime` counts from.
    fn boot(&self) -> String;
}

/// The machine's own clocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }

    fn uptime(&self) -> Duration {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Duration::try_from(now).unwrap_or_default()
    }

    fn boot(&self) -> String {
        // random(4): a new value at every boot. Where /proc is hidden, every start counts as
        // a reboot.
        fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map(|id| id.trim().to_owned())
            .unwrap_or_default()
    }
}

/// What the registry keeps, so that the next start can go on counting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SavedTime {
    pub(crate) pool_ms: u64,
    pub(crate) wall_ms: u64,
    pub(crate) uptime_ms: u64,
    pub(crate) boot: String,
}

/// Turns a [`Clock`] into [`PoolTime`].
#[derive(Clone, Debug)]
pub(crate) struct PoolClock {
    clock: Arc<dyn Clock>,
    boot: String,
    start: PoolTime,
    start_uptime: Duration,
}

impl PoolClock {
    /// Goes on from what was saved, or starts at the wall clock's idea of now.
    pub(crate) fn resume(clock: Arc<dyn Clock>, saved: Option<&SavedTime>) -> Self {
        let (boot, uptime) = (clock.boot(), clock.uptime());
        let start = match saved {
            None => unix_ms(clock.wall()),
            Some(saved) => {
                let away = if !boot.is_empty() && saved.boot == boot {
                    millis(uptime).saturating_sub(saved.uptime_ms)
                } else {
                    unix_ms(clock.wall()).saturating_sub(saved.wall_ms)
                };
                saved.pool_ms.saturating_add(away)
            }
        };
        Self { clock, boot, start: PoolTime(start), start_uptime: uptime }
    }

    pub(crate) fn now(&self) -> PoolTime {
        self.start.after(self.clock.uptime().saturating_sub(self.start_uptime))
    }

    pub(crate) fn save(&self) -> SavedTime {
        SavedTime {
            pool_ms: self.now().0,
            wall_ms: unix_ms(self.clock.wall()),
            uptime_ms: millis(self.clock.uptime()),
            boot: self.boot.clone(),
        }
    }

    /// The wall clock, for what people read.
    pub(crate) fn wall(&self) -> SystemTime {
        self.clock.wall()
    }

    /// What the wall clock shows, or showed, at a pool time, by how it stands now.
    pub(crate) fn to_wall(&self, at: PoolTime) -> SystemTime {
        let (now, wall) = (self.now().0, self.clock.wall());
        let moved = if at.0 >= now {
            wall.checked_add(Duration::from_millis(at.0 - now))
        } else {
            wall.checked_sub(Duration::from_millis(now - at.0))
        };
        moved.unwrap_or(wall)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn unix_ms(at: SystemTime) -> u64 {
    millis(at.duration_since(UNIX_EPOCH).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    #[derive(Debug)]
    struct Fake(Mutex<(u64, u64, &'static str)>);

    impl Clock for Fake {
        fn wall(&self) -> SystemTime {
            UNIX_EPOCH + Duration::from_secs(self.0.lock().0)
        }
        fn uptime(&self) -> Duration {
            Duration::from_secs(self.0.lock().1)
        }
        fn boot(&self) -> String {
            self.0.lock().2.to_owned()
        }
    }

    const YEAR: u64 = 365 * 24 * 3600;

    fn clock(wall: u64, uptime: u64, boot: &'static str) -> Arc<Fake> {
        Arc::new(Fake(Mutex::new((wall, uptime, boot))))
    }

    #[test]
    fn steps_of_the_wall_clock_do_not_count() {
        let fake = clock(10 * YEAR, 100, "a");
        let pool = PoolClock::resume(fake.clone(), None);
        let before = pool.now();
        for wall in [11 * YEAR, 9 * YEAR] {
            fake.0.lock().0 = wall;
            assert_eq!(pool.now(), before);
        }
        fake.0.lock().1 += 5;
        assert_eq!(pool.now(), before.after(Duration::from_secs(5)));
    }

    #[test]
    fn a_restart_in_the_same_boot_goes_by_uptime() {
        let saved = PoolClock::resume(clock(10 * YEAR, 100, "a"), None).save();
        let pool = PoolClock::resume(clock(12 * YEAR, 160, "a"), Some(&saved));
        assert_eq!(pool.now().0 - saved.pool_ms, 60_000);
    }

    #[test]
    fn a_reboot_goes_by_the_wall_but_never_back() {
        let saved = PoolClock::resume(clock(10 * YEAR, 100, "a"), None).save();
        let later = PoolClock::resume(clock(10 * YEAR + 30, 1, "b"), Some(&saved));
        assert_eq!(later.now().0 - saved.pool_ms, 30_000);
        let earlier = PoolClock::resume(clock(9 * YEAR, 1, "b"), Some(&saved));
        assert_eq!(earlier.now().0, saved.pool_ms);
    }
}
