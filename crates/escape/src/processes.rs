//! Attempts on processes outside, and on the session's first process, which holds the
//! control channel. No signal is sent to a process of the host but 0, which does nothing;
//! none is held up or changed.

use std::os::fd::AsRawFd;
use std::path::Path;

use crate::attempt::{
    Attempt, Doing, No, Verdict, any_of, held, holds, open, open_to_write, read, read_text, status,
};
use crate::facts::Facts;
use crate::files::executable_opens;
use crate::sys::{self, Arg};

const PTRACE_SEIZE: i64 = 0x4206;
/// What attempts on process 1 need as a control; the machine's own may be out of reach.
pub const FIRST: &str = "test: a first process of a pid namespace that is no more than root";

pub const ATTEMPTS: &[Attempt] = &[
    Attempt::new("host-process-seen", "A process of the host can be seen in /proc.", |facts| {
        let pid = host(facts)?;
        let path = format!("/proc/{pid}/stat");
        let text = read_text(&path).doing(&path)?;
        Ok(text)
    })
    .control(),
    Attempt::new(
        "host-process-command-line",
        "The command line of some process of the host can be read.",
        |facts| {
            let pid = host(facts)?;
            let path = format!("/proc/{pid}/cmdline");
            let bytes = read(Path::new(&path)).doing(&path)?;
            if bytes.is_empty() {
                held("it is empty")
            } else {
                Ok(format!("{} bytes", bytes.len()))
            }
        },
    )
    .control(),
    Attempt::new(
        "host-process-environment",
        "The environment of a process of the host can be read.",
        |facts| {
            let path = format!("/proc/{}/environ", host(facts)?);
            let bytes = read(Path::new(&path)).doing(&path)?;
            if bytes.is_empty() {
                held("it is empty")
            } else {
                Ok(format!("{} bytes", bytes.len()))
            }
        },
    )
    .control(),
    Attempt::new("host-process-memory", "The memory of a process of the host opens.", |facts| {
        let path = format!("/proc/{}/mem", host(facts)?);
        open(Path::new(&path)).doing(&path)?;
        Ok(format!("{path} opens"))
    })
    .control(),
    Attempt::new("host-process-signal", "A process of the host can be signalled.", |facts| {
        let pid = host(facts)?;
        sys::call(libc::SYS_kill, &mut [Arg::Num(pid), Arg::Num(0)])?;
        Ok(format!("signal 0 reached {pid}"))
    })
    .control(),
    Attempt::new(
        "host-thread-signal",
        "A thread of the host can be signalled by tgkill(2).",
        |facts| {
            let pid = host(facts)?;
            sys::call(libc::SYS_tgkill, &mut [Arg::Num(pid), Arg::Num(pid), Arg::Num(0)])?;
            Ok(format!("signal 0 reached {pid}"))
        },
    )
    .control(),
    Attempt::new("host-process-ptrace", "A process of the host can be traced.", |facts| {
        let pid = host(facts)?;
        // Seizing does not stop it; it goes free when this program ends.
        sys::call(libc::SYS_ptrace, &mut [Arg::Num(PTRACE_SEIZE), Arg::Num(pid)])?;
        Ok(format!("traces {pid}"))
    })
    .control(),
    Attempt::new(
        "host-process-vm-read",
        "process_vm_readv(2) reads the memory of a process of the host.",
        |facts| vm_read(host(facts)?),
    )
    .control(),
    Attempt::new("host-process-pidfd", "A process of the host can be held by a pidfd.", |facts| {
        let fd = pidfd(host(facts)?)?;
        sys::call(
            libc::SYS_pidfd_send_signal,
            &mut [Arg::Num(i64::from(fd.as_raw_fd())), Arg::Num(0)],
        )
        .doing("pidfd_send_signal")?;
        Ok("signal 0 reached it".into())
    })
    .control(),
    Attempt::new(
        "host-process-descriptor",
        "pidfd_getfd(2) takes a descriptor out of a process of the host.",
        |facts| take_descriptor(host(facts)?),
    )
    .control(),
    Attempt::new("host-process-kcmp", "kcmp(2) compares with a process of the host.", |facts| {
        let pid = host(facts)?;
        let me = i64::from(std::process::id());
        let result = sys::call(libc::SYS_kcmp, &mut [Arg::Num(me), Arg::Num(pid), Arg::Num(1)])?;
        Ok(format!("kcmp gave {result}"))
    })
    .control(),
    Attempt::new(
        "host-process-limits",
        "prlimit(2) reads the limits of a process of the host.",
        |facts| {
            let mut old = [0; 16];
            let pid = Arg::Num(host(facts)?);
            let what = Arg::Num(i64::from(libc::RLIMIT_NOFILE));
            sys::call(libc::SYS_prlimit64, &mut [pid, what, Arg::Num(0), Arg::Out(&mut old)])?;
            Ok("read the limit of open files".into())
        },
    )
    .control(),
    Attempt::new(
        "host-process-scheduling",
        "The scheduling of a process of the host can be asked for.",
        |facts| {
            let pid = host(facts)?;
            let policy = sys::call(libc::SYS_sched_getscheduler, &mut [Arg::Num(pid)])?;
            Ok(format!("policy {policy}"))
        },
    )
    .control(),
    Attempt::new("host-process-session", "getsid(2) finds a process of the host.", |facts| {
        let session = sys::call(libc::SYS_getsid, &mut [Arg::Num(host(facts)?)])?;
        Ok(format!("session {session}"))
    })
    .control(),
    Attempt::new(
        "host-process-robust-list",
        "get_robust_list(2) tells an address in a process of the host.",
        |facts| {
            let (mut head, mut size) = ([0; 8], [0; 8]);
            let pid = Arg::Num(host(facts)?);
            sys::call(
                libc::SYS_get_robust_list,
                &mut [pid, Arg::Out(&mut head), Arg::Out(&mut size)],
            )?;
            Ok("got it".into())
        },
    )
    .control(),
    Attempt::new(
        "foreign-proc",
        "/proc belongs to another pid namespace, so it shows processes outside.",
        |_| {
            let me = std::process::id().to_string();
            match std::fs::read_link("/proc/self") {
                Ok(link) if link.as_os_str() == me.as_str() => held("it is our own"),
                Ok(link) => Ok(format!("/proc/self is {} for process {me}", link.display())),
                Err(_) if Path::new("/proc/stat").exists() => Ok("we are not in it".into()),
                Err(error) => held(error.to_string()),
            }
        },
    ),
    Attempt::new(
        "proc-parent",
        "A process in the session shows a parent or a group outside it.",
        |_| {
            // A number of 0 for something outside is what is right.
            let parent = status("1", "PPid")?;
            if parent == "0" { held("its parent is not shown") } else { Ok(parent) }
        },
    )
    .leak(),
    Attempt::new(
        "init-memory",
        "The memory of the session's first process can be opened for writing.",
        |_| {
            let file = open_to_write(Path::new("/proc/1/mem")).doing("/proc/1/mem")?;
            drop(file);
            Ok("/proc/1/mem opens for writing".into())
        },
    )
    .control()
    .needs(FIRST),
    Attempt::new(
        "init-vm-read",
        "process_vm_readv(2) reads the memory of the session's first process.",
        |_| vm_read(1),
    )
    .control()
    .needs(FIRST),
    Attempt::new("init-ptrace", "The session's first process can be traced.", |_| {
        sys::call(libc::SYS_ptrace, &mut [Arg::Num(PTRACE_SEIZE), Arg::Num(1)])?;
        Ok("traces it".into())
    }),
    Attempt::new(
        "init-descriptors",
        "The descriptors of the session's first process can be opened through /proc.",
        |_| {
            let entries = std::fs::read_dir("/proc/1/fd").doing("/proc/1/fd")?.flatten();
            any_of(entries, |entry| {
                let path = entry.path();
                let link = std::fs::read_link(&path).doing("its link")?;
                Ok(format!("{} is {}", path.display(), link.display()))
            })
        },
    )
    .control()
    .needs(FIRST),
    Attempt::new(
        "init-take-descriptor",
        "pidfd_getfd(2) takes the control channel out of the session's first process.",
        |_| take_descriptor(1),
    )
    .control()
    .needs(FIRST),
    Attempt::new("init-kcmp", "kcmp(2) compares with the session's first process.", |_| {
        let me = i64::from(std::process::id());
        let result = sys::call(libc::SYS_kcmp, &mut [Arg::Num(me), Arg::Num(1), Arg::Num(1)])?;
        Ok(format!("kcmp gave {result}"))
    })
    .surface()
    .control()
    .needs(FIRST),
    Attempt::new(
        "init-executable",
        "The program of the session's first process can be opened for writing.",
        |_| executable_opens(Path::new("/proc/1/exe")),
    )
    .control()
    .needs(FIRST),
    Attempt::new(
        "init-limits",
        "prlimit(2) reads the limits of the session's first process, and may set them.",
        |_| {
            let mut old = [0; 16];
            let what = i64::from(libc::RLIMIT_CORE);
            let get = &mut [Arg::Num(1), Arg::Num(what), Arg::Num(0), Arg::Out(&mut old)];
            sys::call(libc::SYS_prlimit64, get).doing("reading")?;
            let set = &mut [Arg::Num(1), Arg::Num(what), Arg::In(&old), Arg::Num(0)];
            sys::call(libc::SYS_prlimit64, set).doing("setting what they are")?;
            Ok("set a limit to what it was".into())
        },
    )
    .surface()
    .control()
    .needs(FIRST),
    Attempt::new("init-kill", "The session's first process dies of a SIGKILL from inside.", |_| {
        signal_init(libc::SIGKILL)
    }),
    Attempt::new("init-stop", "The session's first process is held up by a SIGSTOP.", |_| {
        let verdict = signal_init(libc::SIGSTOP);
        let _ = sys::call(libc::SYS_kill, &mut [Arg::Num(1), Arg::Num(i64::from(libc::SIGCONT))]);
        verdict
    }),
    Attempt::new(
        "init-oom-score",
        "The first process can be made the one that dies when memory is short.",
        |_| {
            let path = Path::new("/proc/1/oom_score_adj");
            let score = read(path).doing("reading")?;
            let file = open_to_write(path).doing("opening")?;
            std::io::Write::write_all(&mut &file, &score).doing("setting what it is")?;
            Ok("set it to what it was".into())
        },
    )
    .surface()
    .control()
    .needs(FIRST),
    Attempt::new("control-socket", "The control channel can be connected to.", |facts| {
        let name = facts.text("control-socket")?;
        let address = match name.strip_prefix('@') {
            Some(name) => {
                use std::os::linux::net::SocketAddrExt;
                std::os::unix::net::SocketAddr::from_abstract_name(name)
            }
            None => std::os::unix::net::SocketAddr::from_pathname(name),
        };
        let address = address.preparing(name)?;
        std::os::unix::net::UnixStream::connect_addr(&address).doing(name)?;
        Ok(format!("connected to {name}"))
    })
    .control(),
    Attempt::new(
        "control-descriptor",
        "A descriptor that a command was given is a socket whose other end is denizen.",
        |facts| {
            any_of([0, 1, 2].iter().chain(&facts.inherited), |fd| {
                let link = std::fs::read_link(format!("/proc/self/fd/{fd}"));
                let link = link.doing("its link")?.to_string_lossy().into_owned();
                if !link.starts_with("socket:") {
                    return held(format!("{fd} is {link}"));
                }
                let mut peer = [0; 12];
                let mut length = 12_u32.to_ne_bytes();
                let result = sys::call(
                    libc::SYS_getsockopt,
                    &mut [
                        Arg::Num(i64::from(*fd)),
                        Arg::Num(i64::from(libc::SOL_SOCKET)),
                        Arg::Num(i64::from(libc::SO_PEERCRED)),
                        Arg::Out(&mut peer),
                        Arg::Out(&mut length),
                    ],
                );
                result.doing("SO_PEERCRED")?;
                Ok(format!("{fd} is {link}"))
            })
        },
    ),
    Attempt::new(
        "secret-in-memory-files",
        "Some process that can be seen has the secret in a memory file.",
        |facts| {
            any_of(crate::attempt::process_numbers(), |pid| {
                let folder = format!("/proc/{pid}/fd");
                let entries: Vec<_> = std::fs::read_dir(&folder).doing(&folder)?.collect();
                any_of(entries.into_iter().flatten(), |entry| {
                    let link = std::fs::read_link(entry.path()).doing("its link")?;
                    if !link.to_string_lossy().starts_with("/memfd:") {
                        return held("no memory file");
                    }
                    let bytes = read(&entry.path()).doing("reading")?;
                    if holds(&bytes, facts.secret()) {
                        return Ok(entry.path().display().to_string());
                    }
                    held("without the secret")
                })
            })
        },
    )
    .control(),
];

/// The host's process, unless its number means one of our own here.
fn host(facts: &Facts) -> Result<i64, No> {
    let pid: i64 = facts.number("host-pid")?;
    if let (Some(expected), Ok(name)) =
        (facts.find("host-comm"), read_text(format!("/proc/{pid}/comm")))
        && name.trim() != expected
    {
        return Err(No::Held(format!("{pid} is {} here, not the host's", name.trim())));
    }
    Ok(pid)
}

fn pidfd(pid: i64) -> Result<std::os::fd::OwnedFd, No> {
    sys::owned(sys::call(libc::SYS_pidfd_open, &mut [Arg::Num(pid)])).doing("pidfd_open")
}

/// Reads at an address where nothing need be: access is looked at before the address.
fn vm_read(pid: i64) -> Verdict {
    let mut buffer = [0; 8];
    let local = sys::words(&[sys::address(&buffer), 8]);
    let remote = sys::words(&[0x1000, 8]);
    let result = sys::call(
        libc::SYS_process_vm_readv,
        &mut [
            Arg::Num(pid),
            Arg::In(&local),
            Arg::Num(1),
            Arg::In(&remote),
            Arg::Num(1),
            Arg::Num(0),
        ],
    );
    // The kernel writes through the structure, so the buffer is still in use here.
    std::hint::black_box(&mut buffer);
    match result {
        Ok(count) => Ok(format!("read {count} bytes")),
        Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
            Ok("access is given; nothing is at the address tried".into())
        }
        Err(error) => held(error.to_string()),
    }
}

fn take_descriptor(pid: i64) -> Verdict {
    let process = pidfd(pid)?;
    any_of(0..64, |number| {
        let taken = sys::owned(sys::call(
            libc::SYS_pidfd_getfd,
            &mut [Arg::Num(i64::from(process.as_raw_fd())), Arg::Num(number)],
        ));
        let taken = taken.doing("pidfd_getfd")?;
        let link = std::fs::read_link(format!("/proc/self/fd/{}", taken.as_raw_fd()));
        Ok(format!("{number} is {}", link.unwrap_or_default().display()))
    })
}

/// Signals process 1 and sees whether it still runs. If it dies, so do we, and a test sees
/// that the session is gone.
fn signal_init(signal: i32) -> Verdict {
    let name = read_text("/proc/1/comm").unwrap_or_default();
    if name.starts_with("denizen-escape") {
        // Nothing of denizen's: the command itself is the first process.
        return crate::attempt::impossible("this program is the first process itself");
    }
    sys::call(libc::SYS_kill, &mut [Arg::Num(1), Arg::Num(i64::from(signal))]).doing("kill")?;
    std::thread::sleep(std::time::Duration::from_millis(200));
    let state = status("1", "State")?;
    if state.starts_with(['T', 'Z', 'X']) {
        return Ok(format!("its state is {state}"));
    }
    held(format!("it runs on: {state}"))
}
