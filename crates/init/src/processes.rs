//! What /proc tells of the processes under this init. It must never signal one whose
//! number may have become another's.

use std::collections::BTreeMap;

use crate::sys;

/// The variable that names a process's command, if its limits do not.
pub const MARK: &[u8] = b"DENIZEN_COMMAND=";

/// A process under this init.
pub struct Process {
    pub pid: i32,
    pub parent: i32,
    pub group: i32,
    pub session: i32,
    pub started: u64,
    /// Nothing of it runs any more; it waits to be reaped.
    pub dead: bool,
    pub threads: i64,
    pub name: [u8; 16],
    /// The command it comes from; 0 if nothing tells.
    pub command: u32,
}

impl Process {
    /// Sends a signal; gives the errno, 0 for success.
    pub fn signal(&self, number: i32) -> i32 {
        if self.parent == sys::own_number() {
            // A child of ours keeps its number until we reap it, which no scan does.
            return sys::signal_number(self.pid, number);
        }
        let is_meant = || stat(self.pid).is_some_and(|now| now.started == self.started);
        sys::signal_held(self.pid, number, is_meant)
    }

    /// Whether it is still in the process group that it was seen in.
    pub fn is_in_its_group(&self) -> bool {
        stat(self.pid).is_some_and(|now| now.group == self.group)
    }
}

/// What /proc/PID/stat says (`proc_pid_stat(5)`).
pub fn stat(pid: i32) -> Option<Process> {
    let bytes = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything, so it ends at the last parenthesis.
    let open = bytes.iter().position(|byte| *byte == b'(')?;
    let close = bytes.iter().rposition(|byte| *byte == b')')?;
    let mut name = [0; 16];
    for (to, from) in name.iter_mut().zip(bytes.get(open + 1..close)?) {
        *to = *from;
    }
    let rest = std::str::from_utf8(bytes.get(close + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let field = |at: usize| fields.get(at).and_then(|text| text.parse::<i64>().ok());
    let small = |at| field(at).and_then(|value| i32::try_from(value).ok());
    let threads = field(17)?;
    let ended = matches!(fields.first(), Some(&("Z" | "X")));
    Some(Process {
        pid,
        parent: small(1)?,
        group: small(2)?,
        session: small(3)?,
        started: fields.get(19)?.parse().ok()?,
        // A process whose first thread has ended is shown as a zombie while others run.
        dead: ended && threads <= 1,
        threads,
        name,
        command: 0,
    })
}

/// The children of a process, or nothing if the kernel has no such list
/// (`CONFIG_PROC_CHILDREN`) or the process is gone.
pub fn children(pid: i32, threads: i64) -> Option<Vec<i32>> {
    let parse = |list: String| -> Vec<i32> {
        let pids = list.split_ascii_whitespace();
        pids.filter_map(|pid| pid.parse().ok()).collect()
    };
    if threads == 1 {
        let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        return list.ok().map(parse);
    }
    // Each thread has its own.
    let mut found = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        // One that has ended meanwhile has given its children to another.
        if let Ok(list) = std::fs::read_to_string(thread.path().join("children")) {
            found.extend(parse(list));
        }
    }
    Some(found)
}

/// Every process there is, by its parent.
pub fn everybody() -> BTreeMap<i32, Vec<i32>> {
    let mut table: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
        if let Some(process) = stat(pid) {
            table.entry(process.parent).or_default().push(pid);
        }
    }
    table
}

/// The mark in the environment that a process was started with.
pub fn environment_mark(pid: i32) -> Option<u64> {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let value =
        environment.split(|byte| *byte == 0).find_map(|variable| variable.strip_prefix(MARK))?;
    std::str::from_utf8(value).ok()?.parse().ok()
}
