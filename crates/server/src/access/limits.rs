//! How often and how much at a time: for each key, and for whoever tries without one. What is
//! counted must never take more memory than a fixed number of counters.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The most counters of one kind.
const MOST: usize = 10_000;

/// What may be done so often in a second, and so often at once after a while of nothing.
pub(crate) struct Rate<K> {
    a_second: f64,
    at_once: f64,
    left: Mutex<HashMap<K, (f64, Instant)>>,
}

impl<K: Eq + Hash> Rate<K> {
    pub(crate) fn new(a_second: f64, at_once: f64) -> Self {
        Self { a_second, at_once, left: Mutex::default() }
    }

    /// Counts one; if it is one too many, says after how long it would not be.
    pub(crate) fn count(&self, by: K, now: Instant) -> Result<(), Duration> {
        let mut all = self.left.lock();
        let left_of = |(left, at): (f64, Instant)| {
            let more = now.saturating_duration_since(at).as_secs_f64() * self.a_second;
            (left + more).min(self.at_once)
        };
        if all.len() >= MOST && !all.contains_key(&by) {
            all.retain(|_, counted| left_of(*counted) < self.at_once);
            if all.len() >= MOST {
                return Err(Duration::from_secs(1));
            }
        }
        let counted = all.entry(by).or_insert((self.at_once, now));
        let left = left_of(*counted);
        if left < 1.0 {
            return Err(Duration::from_secs_f64((1.0 - left) / self.a_second));
        }
        *counted = (left - 1.0, now);
        Ok(())
    }
}

/// What goes on at a time, for each of those who do it.
#[derive(Debug)]
pub(crate) struct AtATime<K: Eq + Hash> {
    most: usize,
    all: Mutex<HashMap<K, usize>>,
}

/// One of them; it is over when this is dropped.
#[derive(Debug)]
pub(crate) struct One<K: Eq + Hash> {
    of: Arc<AtATime<K>>,
    by: K,
}

impl<K: Eq + Hash + Clone> AtATime<K> {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, all: Mutex::default() })
    }

    /// Begins one, unless there are too many.
    pub(crate) fn begin(self: &Arc<Self>, by: K) -> Option<One<K>> {
        let mut all = self.all.lock();
        let now = all.entry(by.clone()).or_default();
        if *now >= self.most {
            return None;
        }
        *now += 1;
        Some(One { of: self.clone(), by })
    }
}

impl<K: Eq + Hash> Drop for One<K> {
    fn drop(&mut self) {
        let mut all = self.of.all.lock();
        if let Some(now) = all.get_mut(&self.by) {
            *now -= 1;
            if *now == 0 {
                all.remove(&self.by);
            }
        }
    }
}

/// Whom an address counts for: of IPv6, one customer has 2^64 of them.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() >> 64 << 64).into()),
        IpAddr::V4(address) => IpAddr::V4(address),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn so_many_at_once_then_so_many_a_second() {
        let rate = Rate::new(2.0, 3.0);
        let begin = Instant::now();
        for _ in 0..3 {
            rate.count("a", begin).unwrap();
        }
        let wait = rate.count("a", begin).unwrap_err();
        assert_eq!(wait, Duration::from_millis(500));
        rate.count("b", begin).unwrap();
        rate.count("a", begin + wait).unwrap();
        rate.count("a", begin + wait).unwrap_err();
        // Nothing is saved up beyond what may be done at once, and time going back is none.
        let later = begin + Duration::from_secs(3600);
        (0..3).for_each(|_| rate.count("a", later).unwrap());
        rate.count("a", later).unwrap_err();
        rate.count("a", begin).unwrap_err();
    }

    #[test]
    fn counters_have_an_end_and_come_back() {
        let rate = Rate::new(1.0, 2.0);
        let begin = Instant::now();
        (0..MOST).for_each(|by| rate.count(by, begin).unwrap());
        rate.count(MOST, begin).unwrap_err();
        rate.count(0, begin).unwrap();
        rate.count(MOST, begin + Duration::from_secs(2)).unwrap();
        assert!(rate.left.lock().len() < 10);
    }

    #[test]
    fn what_is_over_makes_room() {
        let all = AtATime::new(2);
        let (first, _second) = (all.begin("a").unwrap(), all.begin("a").unwrap());
        assert!(all.begin("a").is_none());
        assert!(all.begin("b").is_some());
        drop(first);
        assert!(all.begin("a").is_some());
    }

    #[test]
    fn neighbours_of_ipv6_are_one() {
        let of = |text: &str| network(text.parse().unwrap());
        assert_eq!(of("2001:db8:1:2:3::1"), of("2001:db8:1:2::9"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }
}
