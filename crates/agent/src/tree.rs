//! Which processes descend from one, as this machine numbers them: for looking only, since any
//! of them may have ended meanwhile and its number be another's.

use std::collections::HashSet;

/// More than a session can have.
const MOST: usize = 1 << 18;

/// A process and all that descend from it; empty where the kernel does not tell
/// (`CONFIG_PROC_CHILDREN`). Blocks for some milliseconds.
pub fn descendants(first: u32) -> Vec<u32> {
    let mut all = vec![first];
    let mut seen = HashSet::from([first]);
    let mut next = 0;
    while let Some(pid) = all.get(next).copied().filter(|_| all.len() < MOST) {
        next += 1;
        // Each thread has its own.
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
        for thread in threads.flatten() {
            let list = std::fs::read_to_string(thread.path().join("children"));
            let list = list.unwrap_or_default();
            let children = list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok());
            all.extend(children.filter(|pid| seen.insert(*pid)));
        }
    }
    all
}
