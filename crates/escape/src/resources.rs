//! Attempts to take more of the machine than a session is given. What is raised is raised
//! for this program alone, which then ends.

use std::io::Write;
use std::path::Path;

use crate::attempt::{Attempt, Doing, held, open_to_write, read_text};
use crate::sys::{self, Arg};

pub const ATTEMPTS: &[Attempt] = &[
    Attempt::new("limit-raise", "A hard limit can be raised again.", |_| {
        set_limit(libc::RLIMIT_CORE, 1).preparing("lowering it")?;
        set_limit(libc::RLIMIT_CORE, 4096)?;
        Ok("raised it".into())
    })
    .control()
    .needs("capability: 24, CAP_SYS_RESOURCE"),
    Attempt::new("limit-memory-lock", "More memory can be locked than the limit allows.", |_| {
        set_limit(libc::RLIMIT_MEMLOCK, 4096).preparing("the limit")?;
        let bytes = vec![1_u8; 1 << 20];
        let length = 1 << 20;
        sys::call(libc::SYS_mlock, &mut [Arg::In(&bytes), Arg::Num(length)])?;
        Ok("locked 1 MiB".into())
    })
    .control(),
    Attempt::new("limit-processes", "The limit of processes does not hold.", |_| {
        set_limit(libc::RLIMIT_NPROC, 0).preparing("the limit")?;
        sys::clone_child(0)?;
        Ok("made one more".into())
    })
    .control(),
    Attempt::new("priority", "A command can get more of the processor than others.", |_| {
        let arguments = &mut [Arg::Num(0), Arg::Num(0), Arg::Num(-10)];
        sys::call(libc::SYS_setpriority, arguments)?;
        Ok("a nice value of -10".into())
    })
    .control(),
    Attempt::new("real-time", "A command can be scheduled before all others.", |_| {
        let first_in_first_out = 1;
        let priority = sys::halves(&[1]);
        let arguments = &mut [Arg::Num(0), Arg::Num(first_in_first_out), Arg::In(&priority)];
        sys::call(libc::SYS_sched_setscheduler, arguments)?;
        Ok("scheduled in real time".into())
    })
    .control()
    .needs("kernel: real-time bandwidth in this cgroup"),
    Attempt::new("deadline", "A command can reserve time of the processor.", |_| {
        // struct sched_attr: size and policy, flags, nice and priority, then the times.
        let mut attributes = sys::halves(&[48, 6]);
        attributes.extend(sys::words(&[0, 0, 1_000_000, 10_000_000, 10_000_000]));
        let arguments = &mut [Arg::Num(0), Arg::In(&attributes), Arg::Num(0)];
        sys::call(libc::SYS_sched_setattr, arguments)?;
        Ok("reserved a tenth".into())
    })
    .control()
    .needs("kernel: real-time bandwidth in this cgroup"),
    Attempt::new("disk-priority", "A command can use disks before all others.", |_| {
        const REAL_TIME: i64 = 1 << 13;
        let arguments = &mut [Arg::Num(1), Arg::Num(0), Arg::Num(REAL_TIME)];
        sys::call(libc::SYS_ioprio_set, arguments)?;
        Ok("in real time".into())
    })
    .control(),
    Attempt::new(
        "oom-score",
        "A command can make itself one that is never killed for memory.",
        |_| {
            let path = Path::new("/proc/self/oom_score_adj");
            let file = open_to_write(path).doing("opening")?;
            (&file).write_all(b"-1000").doing("writing")?;
            let now = read_text(path).doing("reading")?;
            if now.trim() == "-1000" { Ok("it can".into()) } else { held(now) }
        },
    )
    .control()
    .needs("capability: 24, CAP_SYS_RESOURCE"),
    Attempt::new("other-users-limits", "Limits of a process of the host can be set.", |facts| {
        let pid = facts.number("host-pid")?;
        let mut limit = [0; 16];
        let what = i64::from(libc::RLIMIT_CORE);
        let get = &mut [Arg::Num(pid), Arg::Num(what), Arg::Num(0), Arg::Out(&mut limit)];
        sys::call(libc::SYS_prlimit64, get).doing("reading")?;
        let set = &mut [Arg::Num(pid), Arg::Num(what), Arg::In(&limit), Arg::Num(0)];
        sys::call(libc::SYS_prlimit64, set).doing("setting what they are")?;
        Ok("set one to what it was".into())
    })
    .control(),
    Attempt::new("host-priority", "The priority of a process of the host can be set.", |facts| {
        let pid = facts.number("host-pid")?;
        let arguments = &mut [Arg::Num(0), Arg::Num(pid), Arg::Num(0)];
        sys::call(libc::SYS_setpriority, arguments)?;
        Ok("set it to what it was".into())
    })
    .control(),
    Attempt::new(
        "host-processors",
        "The processors of a process of the host can be set.",
        |facts| {
            let pid = facts.number("host-pid")?;
            let mut mask = [0; 128];
            let get = &mut [Arg::Num(pid), Arg::Num(128), Arg::Out(&mut mask)];
            let size = sys::call(libc::SYS_sched_getaffinity, get).doing("asking")?;
            let set = &mut [Arg::Num(pid), Arg::Num(size), Arg::In(&mask)];
            sys::call(libc::SYS_sched_setaffinity, set).doing("setting what they are")?;
            Ok("set them to what they were".into())
        },
    )
    .control(),
    Attempt::new("huge-pages", "The host's reserve of huge pages can be used.", |_| {
        sys::map_huge_page()?;
        Ok("mapped one".into())
    })
    .needs("sandbox: the host has reserved huge pages"),
];

/// Sets the soft and the hard limit of our own.
#[allow(clippy::cast_lossless, reason = "the type differs from one C library to another")]
fn set_limit(what: libc::__rlimit_resource_t, value: u64) -> Result<(), std::io::Error> {
    let limit = sys::words(&[value, value]);
    let number = Arg::Num(what as i64);
    sys::call(libc::SYS_prlimit64, &mut [Arg::Num(0), number, Arg::In(&limit), Arg::Num(0)])?;
    Ok(())
}
