//! What running sessions use of memory, processors and processes, as it is when it is asked.
//! Where there are control groups these have counted; for what they do not tell, all of a
//! session's processes are looked at, in one look for all sessions. It must never wait for a
//! session: what is just being started or ended is not measured.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::time::Duration;

use serde::Serialize;

/// What a running session uses. None is what cannot be measured here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Usage {
    /// Bytes of memory. By control groups, with what the kernel keeps of its files, as its limit
    /// counts them; else what its processes have in memory, and what several share counts for each.
    pub memory_bytes: Option<u64>,
    /// Processor time since it was last started.
    pub cpu_time: Option<Duration>,
    /// Its processes, without those that only hold it together. While an agent serves its files
    /// from within, that is one.
    pub processes: Option<u64>,
}

impl Usage {
    /// The same, with what is not known taken from another.
    pub(crate) fn or(self, other: Self) -> Self {
        Self {
            memory_bytes: self.memory_bytes.or(other.memory_bytes),
            cpu_time: self.cpu_time.or(other.cpu_time),
            processes: self.processes.or(other.processes),
        }
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.memory_bytes.is_some() && self.cpu_time.is_some() && self.processes.is_some()
    }
}

/// All processes of the machine that this one sees, as they are at one time.
pub(crate) struct Processes {
    all: HashMap<u32, Process>,
    children: HashMap<u32, Vec<u32>>,
    page: u64,
    ticks: u64,
}

struct Process {
    parent: u32,
    /// Whether it is no use of the session but what holds it together, going by its name.
    is_init: bool,
    /// In clock ticks, with that of children that have ended and were waited for.
    cpu: u64,
    /// In pages.
    memory: u64,
}

impl Processes {
    /// Looks at all of them. May block for some microseconds each.
    pub(crate) fn look() -> io::Result<Self> {
        let mut all = HashMap::new();
        let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            // One that has ended meanwhile is none.
            let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
            let Some(process) = stat.ok().as_deref().and_then(read) else { continue };
            children.entry(process.parent).or_default().push(pid);
            all.insert(pid, process);
        }
        let page = rustix::param::page_size() as u64;
        Ok(Self { all, children, page, ticks: rustix::param::clock_ticks_per_second() })
    }

    /// What a process and all that descend from it use; nothing if it is not there.
    pub(crate) fn below(&self, first: u32) -> Usage {
        let Some(process) = self.all.get(&first) else { return Usage::default() };
        let (mut cpu, mut memory, mut count) = (process.cpu, process.memory, 0);
        let mut open = vec![first];
        while let Some(parent) = open.pop() {
            for child in self.children.get(&parent).into_iter().flatten() {
                if let Some(process) = self.all.get(child) {
                    cpu += process.cpu;
                    memory += process.memory;
                    count += u64::from(!process.is_init);
                    open.push(*child);
                }
            }
        }
        // Never 0 on Linux.
        let millis = cpu * 1000 / self.ticks.max(1);
        Usage {
            memory_bytes: Some(memory * self.page),
            cpu_time: Some(Duration::from_millis(millis)),
            processes: Some(count),
        }
    }
}

/// A process by its `proc_pid_stat(5)`.
fn read(stat: &str) -> Option<Process> {
    // The name may have anything in it; the first field after it is field 3.
    let (head, fields) = stat.rsplit_once(')')?;
    let is_init = head.split_once('(')?.1 == "denizen-init";
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let cpu = [14, 15, 16, 17].map(number).into_iter().sum::<Option<u64>>()?;
    let parent = number(4)?.try_into().ok()?;
    Some(Process { parent, is_init, cpu, memory: number(24)? })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_process_is_read_whatever_its_name() {
        let stat = "7 (a) R 1 (b) S 3 7 7 0 -1 4194560 1 2 3 4 10 20 30 40 20 0 1 0 99 4096 5 0";
        let process = read(stat).unwrap();
        assert_eq!((process.parent, process.cpu, process.memory), (3, 100, 5));
        assert!(
            !process.is_init && read(&stat.replace("a) R 1 (b", "denizen-init")).unwrap().is_init
        );
        assert!(read("7 (short) S 3").is_none());
        assert!(read("").is_none());
    }

    #[test]
    fn who_descends_from_a_process_is_counted() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "sleep 600 & echo; wait"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // It has its child now.
        let mut line = [0];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        let all = Processes::look().unwrap();
        let sleep = all.children.get(&child.id()).unwrap().clone();
        let usage = all.below(child.id());
        assert_eq!(usage.processes, Some(1));
        assert!(usage.memory_bytes.unwrap() > all.below(sleep[0]).memory_bytes.unwrap());
        assert_eq!(all.below(u32::MAX), Usage::default());
        for pid in sleep {
            let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
        child.wait().unwrap();
    }
}
