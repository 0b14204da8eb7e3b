//! Which backups are kept: backups in, those to forget out.
//!
//! The rules are those of restic's `forget`, in UTC and for each session by itself. It must never
//! do I/O or read a clock, and never name what somebody counts on, whatever the rules say: not the
//! newest of a session, which is all that there is of one with a single backup; not what its row
//! calls its latest; not what it is being put back from; nothing of a session that is not known
//! here, which may be another host's.

use std::collections::HashMap;

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Backup;

/// Which backups of each session are kept: those that any of the rules keeps. Without a rule, all
/// of them. A rule of hours, days and so on keeps the newest backup of each of so many that have
/// one, and the oldest there is as long as there are fewer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// The newest ones.
    pub keep_last: u32,
    /// Of so many hours.
    pub keep_hourly: u32,
    /// Of so many days.
    pub keep_daily: u32,
    /// Of so many weeks, which begin on Monday (ISO 8601).
    pub keep_weekly: u32,
    /// Of so many months.
    pub keep_monthly: u32,
    /// Of so many years.
    pub keep_yearly: u32,
}

impl Retention {
    /// Whether it has no rule: nothing is ever deleted then.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Each rule: how many it keeps, and of which spans of time; none is each backup by itself.
    fn rules(&self) -> [(u32, Option<Span>); 6] {
        [
            (self.keep_last, None),
            (self.keep_hourly, Some(|at| number(at, &[at.month(), at.day(), at.hour()]))),
            (self.keep_daily, Some(|at| number(at, &[at.month(), at.day()]))),
            (self.keep_weekly, Some(week)),
            (self.keep_monthly, Some(|at| number(at, &[at.month()]))),
            (self.keep_yearly, Some(|at| number(at, &[]))),
        ]
    }
}

/// Numbers the span that a time is in: another number for each, whatever kind of span it is.
type Span = fn(DateTime) -> i64;

fn number(at: DateTime, parts: &[i8]) -> i64 {
    parts.iter().fold(i64::from(at.year()), |sum, part| sum * 100 + i64::from(*part))
}

fn week(at: DateTime) -> i64 {
    // The last days of a year may be in the first week of the next one.
    let week = at.date().iso_week_date();
    i64::from(week.year()) * 100 + i64::from(week.week())
}

/// The backups that are to be forgotten, newest first. `counted_on` has the sessions that are
/// known here, with the backups of each that must stay.
pub(crate) fn plan(
    backups: &[Backup],
    counted_on: &HashMap<Uuid, Vec<String>>,
    retention: &Retention,
) -> Vec<Backup> {
    if retention.is_empty() {
        return Vec::new();
    }
    let mut sessions: HashMap<Uuid, Vec<&Backup>> = HashMap::new();
    for backup in backups.iter().filter(|backup| counted_on.contains_key(&backup.session)) {
        sessions.entry(backup.session).or_default().push(backup);
    }
    let mut forgotten = Vec::new();
    for (session, mut backups) in sessions {
        backups.sort_by(|a, b| newest_first(a, b));
        let kept = kept(&backups, retention);
        let stays = |backup: &Backup| counted_on[&session].contains(&backup.name);
        let all = backups.into_iter().zip(kept).skip(1);
        forgotten.extend(all.filter(|(it, kept)| !kept && !stays(it)).map(|(it, _)| it.clone()));
    }
    forgotten.sort_by(newest_first);
    forgotten
}

fn newest_first(a: &Backup, b: &Backup) -> std::cmp::Ordering {
    b.taken_at.cmp(&a.taken_at).then_with(|| a.name.cmp(&b.name))
}

/// Which of a session's backups, newest first, the rules keep.
fn kept(backups: &[&Backup], retention: &Retention) -> Vec<bool> {
    let mut kept = vec![false; backups.len()];
    for (mut left, span) in retention.rules() {
        let mut last = None;
        for (place, backup) in backups.iter().enumerate() {
            if left == 0 {
                break;
            }
            let at = TimeZone::UTC.to_datetime(backup.taken_at);
            let number = span.map(|span| span(at));
            let oldest = place + 1 == backups.len();
            if number.is_none() || number != last || oldest {
                kept[place] = true;
                last = number;
                left -= 1;
            }
        }
    }
    kept
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::{BTreeSet, HashSet};

    use jiff::{SignedDuration, Timestamp};

    use super::*;
    use crate::backup::BackupFormat;

    /// SplitMix64: the same histories with every run, and others with every seed.
    struct Chance(u64);

    impl Chance {
        fn below(&mut self, limit: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.0;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (mixed ^ (mixed >> 31)) % limit
        }
    }

    fn backup(session: Uuid, name: String, taken_at: Timestamp) -> Backup {
        let format =
            if name.len() % 2 == 0 { BackupFormat::Archive } else { BackupFormat::Repository };
        Backup {
            name,
            session,
            session_name: None,
            host: None,
            taken_at,
            format,
            bytes: 0,
            size: None,
            path: None,
        }
    }

    struct World {
        backups: Vec<Backup>,
        counted_on: HashMap<Uuid, Vec<String>>,
        retention: Retention,
    }

    /// Some sessions, known here or not, with backups from minutes to years apart.
    fn world(seed: u64) -> World {
        let mut chance = Chance(seed);
        let (mut backups, mut counted_on) = (Vec::new(), HashMap::new());
        for session in 0..chance.below(4) {
            let id = Uuid::from_u128(u128::from(session) + 1);
            let mut at: Timestamp = "2024-12-20T00:00:00Z".parse().unwrap();
            let longest = match chance.below(4) {
                0 => 3600,
                1 => 86_400,
                2 => 86_400 * 40,
                _ => 86_400 * 300,
            };
            let mut names = Vec::new();
            for place in 0..chance.below(30) {
                let name = format!("{session}-{place}");
                backups.push(backup(id, name.clone(), at));
                names.push(name);
                // Now and then two of the same time: one in each format.
                let wait = chance.below(longest) * chance.below(6).min(1);
                at += SignedDuration::from_secs(wait.try_into().unwrap());
            }
            if chance.below(4) > 0 {
                names.retain(|_| chance.below(8) == 0);
                counted_on.insert(id, names);
            }
        }
        let mut keep = || u32::try_from(chance.below(12).saturating_sub(5)).unwrap();
        let retention = Retention {
            keep_last: keep(),
            keep_hourly: keep(),
            keep_daily: keep(),
            keep_weekly: keep(),
            keep_monthly: keep(),
            keep_yearly: keep(),
        };
        World { backups, counted_on, retention }
    }

    const HISTORIES: u64 = 3000;

    #[test]
    fn what_is_counted_on_stays_whatever_the_rules_are() {
        let mut forgotten_in_all = 0;
        for seed in 0..HISTORIES {
            let World { backups, counted_on, retention } = world(seed);
            let forgotten = plan(&backups, &counted_on, &retention);
            forgotten_in_all += forgotten.len();
            assert!(forgotten.is_empty() || !retention.is_empty(), "seed {seed}: without a rule");
            let names: HashSet<&str> = forgotten.iter().map(|it| it.name.as_str()).collect();
            assert_eq!(names.len(), forgotten.len(), "seed {seed}: each is named once");
            for gone in &forgotten {
                let needed = counted_on.get(&gone.session);
                let needed = needed.unwrap_or_else(|| panic!("seed {seed}: of another host"));
                assert!(!needed.contains(&gone.name), "seed {seed}: {gone:?} is counted on");
                let of_it = backups.iter().filter(|it| it.session == gone.session);
                let left: Vec<_> = of_it.filter(|it| !names.contains(it.name.as_str())).collect();
                let newer = left.iter().any(|it| it.taken_at >= gone.taken_at);
                assert!(newer, "seed {seed}: the newest of a session");
            }
        }
        assert!(forgotten_in_all > 10_000, "the histories are too dull: {forgotten_in_all}");
    }

    /// What restic's documentation says, in other words than the code does: of the newest spans
    /// that have a backup, the newest in each; and the oldest of all while there are fewer.
    fn documented(times: &[Timestamp], count: u32, span: &str) -> BTreeSet<usize> {
        let name = |at: &Timestamp| at.strftime(span).to_string();
        let spans: BTreeSet<String> = times.iter().map(name).collect();
        let count = count as usize;
        let newest = spans.iter().rev().take(count);
        let mut kept: BTreeSet<usize> =
            newest.filter_map(|span| times.iter().position(|at| name(at) == *span)).collect();
        if spans.len() < count && !times.is_empty() {
            kept.insert(times.len() - 1);
        }
        kept
    }

    #[test]
    fn all_else_is_kept_as_restic_does() {
        for seed in 0..HISTORIES {
            let World { backups, counted_on, retention } = world(seed);
            let nothing = counted_on.keys().map(|id| (*id, Vec::new())).collect();
            let forgotten = plan(&backups, &nothing, &retention);
            let forgotten: HashSet<_> = forgotten.iter().map(|it| &it.name).collect();
            for session in counted_on.keys() {
                let mut of_it: Vec<_> =
                    backups.iter().filter(|it| it.session == *session).collect();
                of_it.sort_by(|a, b| newest_first(a, b));
                let times: Vec<_> = of_it.iter().map(|it| it.taken_at).collect();
                let Retention { keep_last, keep_hourly, keep_daily, .. } = retention;
                let mut kept: BTreeSet<usize> = (0..times.len())
                    .take(keep_last as usize)
                    .chain(0..times.len().min(1))
                    .collect();
                for (count, span) in [
                    (keep_hourly, "%Y-%m-%d %H"),
                    (keep_daily, "%Y-%m-%d"),
                    (retention.keep_weekly, "%G-%V"),
                    (retention.keep_monthly, "%Y-%m"),
                    (retention.keep_yearly, "%Y"),
                ] {
                    kept.extend(documented(&times, count, span));
                }
                if retention.is_empty() {
                    kept = (0..times.len()).collect();
                }
                let left: BTreeSet<usize> = (0..of_it.len())
                    .filter(|place| !forgotten.contains(&of_it[*place].name))
                    .collect();
                assert_eq!(left, kept, "seed {seed}: {retention:?} of {times:?}");
            }
        }
    }

    #[test]
    fn an_example_that_can_be_followed_by_hand() {
        let id = Uuid::from_u128(1);
        let times = [
            // Monday of the first week of 2026, and the Sunday before it.
            "2025-12-29T08:00:00Z",
            "2025-12-28T23:59:59Z",
            "2025-12-28T00:00:00Z",
            "2025-12-27T12:00:00Z",
            "2025-11-30T12:00:00Z",
            "2025-11-01T12:00:00Z",
        ];
        let backups: Vec<_> =
            times.iter().map(|at| backup(id, (*at).to_owned(), at.parse().unwrap())).collect();
        let left = |retention: Retention| {
            let counted_on = HashMap::from([(id, Vec::new())]);
            let gone = plan(&backups, &counted_on, &retention);
            let left =
                (0..times.len()).filter(|it| !gone.iter().any(|gone| gone.name == times[*it]));
            left.collect::<Vec<_>>()
        };
        let none = Retention::default();
        assert_eq!(left(Retention { keep_daily: 3, ..none }), [0, 1, 3]);
        assert_eq!(left(Retention { keep_weekly: 2, ..none }), [0, 1]);
        assert_eq!(left(Retention { keep_monthly: 2, ..none }), [0, 4]);
        assert_eq!(left(Retention { keep_monthly: 3, ..none }), [0, 4, 5], "and the oldest");
        assert_eq!(left(Retention { keep_last: 1, keep_yearly: 1, ..none }), [0]);
        assert_eq!(left(Retention { keep_last: 2, keep_daily: 2, ..none }), [0, 1]);
    }
}
