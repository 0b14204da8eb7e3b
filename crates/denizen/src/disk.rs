//! What sessions use of the disk: when to look, and what is too much.
//!
//! Ordinary users are given no quotas, so use is measured by walking a session's trees
//! ([`measure`]). Nothing here does I/O or reads a clock but that walk; who carries it out is
//! `pool/watch.rs`. The rule must never touch a session that stays below its limit, and walking
//! must never cost more than a twentieth of a processor.

pub(crate) mod measure;
pub(crate) mod nameless;

use std::time::Duration;

/// How often the file system is asked how much room it has, while a session is in use.
pub(crate) const LOOK: Duration = Duration::from_millis(250);
/// A session in use is measured again after this time, or after so many times what the last
/// walk took: others may free what it takes, and the file system's room tells nothing.
const AGAIN: Duration = Duration::from_secs(10);
const AGAIN_TIMES: u32 = 40;
/// Each second of walking is followed by so many without.
const PRICE: u32 = 20;
/// How much time without walking can be saved up, for walks in a row when there is need.
pub(crate) const SAVINGS: Duration = Duration::from_mins(1);
/// What a session that is over its limit may write all the same, or it could delete nothing:
/// that takes shells, their histories, and marks over files of its root.
const LEEWAY: u64 = 1 << 20;

/// What is known of one session's use.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    /// What it may have beyond the limit: it had that much before anybody could say no.
    allowed: u64,
    /// Nothing was in it when it was made.
    from_empty: bool,
    last: Option<Walk>,
}

/// A walk through a session's trees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Walk {
    /// When it began.
    pub(crate) began: Duration,
    pub(crate) took: Duration,
    /// How much room the file system had when it began; see [`room`].
    pub(crate) room: u64,
    /// What it found, in bytes.
    pub(crate) used: u64,
}

/// Why a session should be measured: the smaller, the sooner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Due {
    /// It may be over its limit, having had so much left.
    Suspect { left: u64 },
    /// It has never been measured.
    New,
    /// The last time is long ago.
    Old,
}

impl Known {
    /// Of a session that has just been made: all that will be in it, it has written.
    pub(crate) fn empty() -> Self {
        Self { from_empty: true, ..Self::default() }
    }

    /// What the last walk found.
    pub(crate) fn used(&self) -> Option<u64> {
        self.last.map(|walk| walk.used)
    }

    /// Whether it should be measured, now that the file system has so much room.
    pub(crate) fn due(&self, now: Duration, room: u64, limit: u64) -> Option<Due> {
        let Some(last) = self.last else { return Some(Due::New) };
        let left = self.most(limit).saturating_sub(last.used);
        if last.room.saturating_sub(room) > left {
            return Some(Due::Suspect { left });
        }
        let again = AGAIN.max(last.took * AGAIN_TIMES);
        (now.saturating_sub(last.began) >= again).then_some(Due::Old)
    }

    /// How much a walk has to find at most, to be of use.
    pub(crate) fn enough(&self, limit: u64) -> u64 {
        if self.last.is_none() && !self.from_empty { u64::MAX } else { self.most(limit) }
    }

    /// Takes note of a walk; true if what runs in the session has to be ended.
    pub(crate) fn measured(&mut self, walk: Walk, limit: u64) -> bool {
        if self.last.is_none() && !self.from_empty {
            // It came like this: from an earlier process, a backup, another session.
            self.allowed = walk.used.saturating_add(LEEWAY);
        }
        self.last = Some(walk);
        let over = walk.used > self.most(limit);
        if !over && walk.used <= limit {
            // What it has got rid of is not given again.
            self.allowed = 0;
        } else if !over {
            self.allowed = self.allowed.min(walk.used.saturating_add(LEEWAY));
        }
        over
    }

    /// Takes note of what is there after all that ran was ended.
    pub(crate) fn ended(&mut self, walk: Walk) {
        self.allowed = walk.used.saturating_add(LEEWAY);
        self.last = Some(walk);
    }

    /// What it may have.
    fn most(&self, limit: u64) -> u64 {
        self.allowed.max(limit)
    }
}

/// What walking may still cost.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Budget {
    /// When all walks so far are paid for.
    paid: Duration,
}

impl Budget {
    pub(crate) fn allows(&self, now: Duration) -> bool {
        self.paid <= now
    }

    pub(crate) fn spend(&mut self, now: Duration, took: Duration) {
        self.paid = self.paid.max(now.saturating_sub(SAVINGS)) + took * PRICE;
    }
}

/// A file system's free bytes and inodes as one number: nothing can be written, and no file
/// made, without its falling by what that counts for at least.
pub(crate) fn room(free_bytes: u64, free_inodes: u64) -> u64 {
    free_bytes.saturating_add(free_inodes.saturating_mul(measure::LEAST))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    fn walk(second: u64, room: u64, used: u64) -> Walk {
        let began = Duration::from_secs(second);
        Walk { began, took: Duration::from_millis(10), room, used }
    }

    fn at(second: u64) -> Duration {
        Duration::from_secs(second)
    }

    #[test]
    fn one_below_its_limit_is_left_alone() {
        let mut known = Known::empty();
        assert_eq!(known.due(at(0), 100 * LIMIT, LIMIT), Some(Due::New));
        for used in [0, LIMIT / 2, LIMIT - 1, LIMIT, 5, LIMIT] {
            assert!(!known.measured(walk(1, 100 * LIMIT, used), LIMIT));
        }
    }

    #[test]
    fn one_that_cannot_be_over_is_not_looked_at() {
        let mut known = Known::empty();
        known.measured(walk(0, 10 * LIMIT, LIMIT / 4), LIMIT);
        let left = LIMIT - LIMIT / 4;
        assert_eq!(known.due(at(1), 10 * LIMIT, LIMIT), None);
        assert_eq!(known.due(at(1), 10 * LIMIT - left, LIMIT), None);
        let suspect = Some(Due::Suspect { left });
        assert_eq!(known.due(at(1), 10 * LIMIT - left - 1, LIMIT), suspect);
        // Others have freed more than it can have taken.
        assert_eq!(known.due(at(1), 20 * LIMIT, LIMIT), None);
        assert_eq!(known.due(at(10), 20 * LIMIT, LIMIT), Some(Due::Old));
        // A walk of a second is not taken every ten.
        known.measured(Walk { took: at(1), ..walk(20, 0, 7) }, LIMIT);
        assert_eq!(known.due(at(59), 0, LIMIT), None);
        assert_eq!(known.due(at(60), 0, LIMIT), Some(Due::Old));
    }

    #[test]
    fn the_likeliest_is_first() {
        let order = [Due::Suspect { left: 0 }, Due::Suspect { left: 9 }, Due::New, Due::Old];
        assert!(order.is_sorted());
    }

    #[test]
    fn one_over_its_limit_is_ended_once_and_can_delete() {
        let mut known = Known::empty();
        assert!(known.measured(walk(1, 0, LIMIT + 1), LIMIT));
        known.ended(walk(2, 0, LIMIT + 50 * MIB));
        // What does not grow goes on, and what deletes.
        assert!(!known.measured(walk(3, 0, LIMIT + 50 * MIB), LIMIT));
        assert!(!known.measured(walk(4, 0, LIMIT + 51 * MIB), LIMIT));
        assert!(!known.measured(walk(5, 0, LIMIT + 20 * MIB), LIMIT));
        // It has no right to what it once had.
        assert!(known.measured(walk(6, 0, LIMIT + 40 * MIB), LIMIT));
        known.ended(walk(6, 0, LIMIT + 40 * MIB));
        assert!(!known.measured(walk(7, 0, LIMIT / 2), LIMIT));
        assert!(known.measured(walk(8, 0, LIMIT + 1), LIMIT));
    }

    #[test]
    fn one_that_came_with_more_than_its_limit_may_keep_it() {
        let mut known = Known::default();
        assert!(!known.measured(walk(1, 0, 3 * LIMIT), LIMIT));
        assert!(!known.measured(walk(2, 0, 3 * LIMIT + MIB), LIMIT));
        assert!(known.measured(walk(3, 0, 3 * LIMIT + 2 * MIB), LIMIT));
    }

    #[test]
    fn little_left_is_noticed_at_once() {
        let mut known = Known::empty();
        known.measured(walk(0, LIMIT, LIMIT), LIMIT);
        assert_eq!(known.due(at(0), LIMIT - 1, LIMIT), Some(Due::Suspect { left: 0 }));
    }

    #[test]
    fn walking_costs_a_twentieth_and_quiet_times_are_saved_up() {
        let mut budget = Budget::default();
        let mut walked = 0;
        // Somebody would like to walk all the time, a tenth of a second each.
        for tenth in 0..36_000 {
            let now = Duration::from_millis(100) * tenth;
            if budget.allows(now) {
                budget.spend(now, Duration::from_millis(100));
                walked += 1;
            }
        }
        assert!((1_700..=1_801).contains(&walked), "{walked}");
        // After a quiet hour, three seconds of walking in a row.
        let later = at(7200);
        let mut burst = 0;
        while budget.allows(later) {
            budget.spend(later, Duration::from_millis(100));
            burst += 1;
        }
        assert_eq!(burst, 31);
    }

    #[test]
    fn inodes_are_room_too() {
        assert!(room(100, 10) - room(100, 9) >= measure::LEAST);
        assert_eq!(room(u64::MAX, u64::MAX), u64::MAX);
    }
}
