//! Attempts on the kernel itself: its settings and state under /proc and /sys, its keys,
//! and system calls that a session has no need of. Settings are opened, never changed;
//! calls that would change something are given arguments with which they cannot.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use crate::attempt::{
    Attempt, Doing, Verdict, any_of, got_through, held, holds, open, open_to_write, read, read_text,
};
use crate::facts::Facts;
use crate::mounts::{is_kind, opens_to_write};
use crate::sys::{self, Arg};

const KEYCTL: i64 = libc::SYS_keyctl;
const SESSION_KEYRING: i64 = -3;
const USER_KEYRING: i64 = -4;
const PROC: i64 = 0x9fa0;
/// System V, with the page at address 0 mapped.
const SYSTEM_V: i32 = 0x0410_0001;

pub const ATTEMPTS: &[Attempt] = &[
    Attempt::new("sysrq", "/proc/sysrq-trigger can be written to.", |_| {
        opens_to_write(Path::new("/proc/sysrq-trigger"))
    })
    .control()
    .needs("kernel: CONFIG_MAGIC_SYSRQ"),
    Attempt::new("kcore", "The memory of the kernel can be read at /proc/kcore.", |_| {
        shows("/proc/kcore", |bytes| bytes.starts_with(b"\x7fELF"))
    })
    .control()
    .needs("kernel: CONFIG_PROC_KCORE"),
    Attempt::new("kallsyms", "/proc/kallsyms tells the addresses of the kernel.", |_| {
        shows("/proc/kallsyms", |bytes| {
            bytes.split(|byte| *byte == b'\n').any(|line| {
                let address = line.split(|byte| *byte == b' ').next().unwrap_or_default();
                !address.is_empty() && address.iter().any(|digit| *digit != b'0')
            })
        })
    })
    .leak()
    .control()
    .needs("kernel: kernel.kptr_restrict below 2"),
    Attempt::new("iomem", "/proc/iomem tells where the kernel is in memory.", |_| {
        shows("/proc/iomem", |bytes| {
            String::from_utf8_lossy(bytes).lines().any(|line| {
                line.split(" : ").next().is_some_and(|range| {
                    range.contains(|digit: char| digit.is_ascii_hexdigit() && digit != '0')
                })
            })
        })
    })
    .leak()
    .control(),
    Attempt::new("proc-keys", "/proc/keys shows keys.", |_| {
        shows("/proc/keys", |bytes| !bytes.is_empty())
    })
    .leak()
    .control()
    .needs("kernel: CONFIG_KEYS"),
    Attempt::new("timer-list", "/proc/timer_list tells of processes outside.", |_| {
        shows("/proc/timer_list", |bytes| !bytes.is_empty())
    })
    .leak()
    .control()
    .needs("kernel: CONFIG_TIMER_LIST"),
    Attempt::new("sched-debug", "The scheduler's tables tell of processes outside.", |_| {
        any_of(["/proc/sched_debug", "/sys/kernel/debug/sched/debug"], |path| {
            shows(path, |bytes| !bytes.is_empty())
        })
    })
    .leak(),
    Attempt::new(
        "page-flags",
        "/proc/kpageflags or /proc/kpagecount tell of physical memory.",
        |_| {
            any_of(["/proc/kpageflags", "/proc/kpagecount", "/proc/kpagecgroup"], |path| {
                shows(path, |bytes| !bytes.is_empty())
            })
        },
    )
    .control()
    .needs("kernel: CONFIG_PROC_PAGE_MONITOR"),
    Attempt::new(
        "slab-info",
        "/proc/slabinfo or /proc/vmallocinfo tell of the kernel's memory.",
        |_| {
            any_of(["/proc/slabinfo", "/proc/vmallocinfo"], |path| {
                shows(path, |bytes| !bytes.is_empty())
            })
        },
    )
    .leak()
    .control(),
    Attempt::new("disks-seen", "/proc tells what disks and partitions the host has.", |_| {
        any_of(["/proc/partitions", "/proc/swaps", "/proc/scsi/scsi"], |path| {
            shows(path, |bytes| String::from_utf8_lossy(bytes).lines().count() > 2)
        })
    })
    .leak(),
    Attempt::new("kernel-log", "syslog(2) or /proc/kmsg read the kernel's log.", |_| {
        const READ_ALL: i64 = 3;
        let mut buffer = vec![0; 4096];
        let call = sys::call(
            libc::SYS_syslog,
            &mut [Arg::Num(READ_ALL), Arg::Out(&mut buffer), Arg::Num(4096)],
        );
        let count = call.doing("syslog")?;
        if count == 0 { held("it is empty") } else { Ok(format!("{count} bytes")) }
    })
    .leak()
    .control(),
    Attempt::new("proc-kmsg", "/proc/kmsg opens.", |_| {
        let path = Path::new("/proc/kmsg");
        open(path).doing("/proc/kmsg")?;
        if is_kind(path, PROC) { Ok("it opens".into()) } else { held("it is covered") }
    })
    .leak()
    .control(),
    Attempt::new("core-pattern", "A program can be named that the kernel runs on crashes.", |_| {
        opens_to_write(Path::new("/proc/sys/kernel/core_pattern"))
    })
    .control(),
    Attempt::new(
        "modprobe-path",
        "A program can be named that the kernel runs for modules.",
        |_| {
            any_of(["/proc/sys/kernel/modprobe", "/proc/sys/kernel/poweroff_cmd"], |path| {
                opens_to_write(Path::new(path))
            })
        },
    )
    .control()
    .needs("kernel: CONFIG_MODULES"),
    Attempt::new("sysctl-kernel", "Settings of the whole kernel can be changed.", |_| {
        let names = [
            "kernel/randomize_va_space",
            "kernel/kptr_restrict",
            "kernel/dmesg_restrict",
            "kernel/perf_event_paranoid",
            "kernel/panic",
            "fs/suid_dumpable",
            "fs/protected_symlinks",
            "fs/file-max",
            "vm/overcommit_memory",
            "vm/drop_caches",
            "vm/mmap_min_addr",
        ];
        any_of(names, |name| opens_to_write(&Path::new("/proc/sys").join(name)))
    })
    .control(),
    Attempt::new(
        "sysctl-any",
        "Some setting that no namespace of the session owns can be changed.",
        |_| {
            // Those of the net, ipc, pid and user namespaces may be the session's own.
            let own = ["net", "user", "mqueue"];
            let own_files = [
                "shm",
                "msg",
                "sem",
                "auto_msgmni",
                "ns_last_pid",
                "pid_max",
                "hostname",
                "domainname",
            ];
            let mut found = Vec::new();
            walk(Path::new("/proc/sys"), 5, &mut |path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let namespaced = path.iter().any(|part| own.iter().any(|own| part == *own))
                    || own_files.iter().any(|own| name.starts_with(own));
                if !namespaced && opens_to_write(path).is_ok() {
                    found.push(path.display().to_string());
                }
                found.is_empty()
            });
            match found.first() {
                Some(path) => Ok(format!("{path} opens for writing")),
                None => held("none opens for writing"),
            }
        },
    )
    .control(),
    Attempt::new("sysctl-hostname", "/proc/sys changes the host's name.", |facts| {
        let verdict = opens_to_write(Path::new("/proc/sys/kernel/hostname"))?;
        if facts.is_in_hosts("uts")? { Ok(verdict) } else { held("but the name is our own") }
    })
    .control(),
    Attempt::new("set-hostname", "sethostname(2) changes the host's name.", |facts| {
        let name = read_text("/proc/sys/kernel/hostname").preparing("the name")?;
        let name = name.trim().as_bytes();
        // The name that it has already.
        let length = i64::try_from(name.len()).unwrap_or(0);
        sys::call(libc::SYS_sethostname, &mut [Arg::In(name), Arg::Num(length)])
            .doing("sethostname")?;
        if facts.is_in_hosts("uts")? { Ok("set it".into()) } else { held("only our own") }
    })
    .control(),
    Attempt::new(
        "binfmt-register",
        "An interpreter for programs of the host can be registered.",
        |_| {
            open_to_write(Path::new("/proc/sys/fs/binfmt_misc/register"))
                .map_or_else(|error| held(error.to_string()), |_| Ok("it opens".into()))
        },
    ),
    Attempt::new("interrupts", "The way of interrupts can be changed.", |_| {
        let mut paths = vec![PathBuf::from("/proc/irq/default_smp_affinity")];
        walk(Path::new("/proc/irq"), 2, &mut |path| {
            paths.push(path.to_owned());
            true
        });
        any_of(paths, |path| opens_to_write(&path))
    })
    .control(),
    Attempt::new(
        "uevent-helper",
        "A program can be named that the kernel runs for devices.",
        |_| opens_to_write(Path::new("/sys/kernel/uevent_helper")),
    )
    .control()
    .needs("kernel: CONFIG_UEVENT_HELPER"),
    Attempt::new("sys-kernel", "Settings under /sys/kernel can be changed.", |_| {
        let names = [
            "/sys/kernel/mm/transparent_hugepage/enabled",
            "/sys/kernel/mm/ksm/run",
            "/sys/kernel/profiling",
            "/sys/kernel/rcu_expedited",
            "/sys/power/state",
            "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
        ];
        any_of(names, |path| opens_to_write(Path::new(path)))
    })
    .control(),
    Attempt::new("sys-devices", "Devices can be changed through /sys.", |_| {
        let mut paths = Vec::new();
        for root in ["/sys/module", "/sys/bus", "/sys/block", "/sys/devices"] {
            walk(Path::new(root), 4, &mut |path| {
                paths.push(path.to_owned());
                paths.len() % 3000 != 0
            });
        }
        any_of(paths, |path| opens_to_write(&path))
    })
    .control(),
    Attempt::new("sys-firmware", "/sys/firmware or DMI tell what machine the host is.", |_| {
        let paths = ["/sys/firmware", "/sys/class/dmi/id/product_uuid", "/sys/hypervisor"];
        any_of(paths, |path| {
            if let Ok(entries) = std::fs::read_dir(path) {
                let count = entries.count();
                return if count == 0 {
                    held("it is empty")
                } else {
                    Ok(format!("{path} is there"))
                };
            }
            let bytes = read(Path::new(path)).doing(path)?;
            if bytes.is_empty() { held("it is empty") } else { Ok(format!("{path} is read")) }
        })
    })
    .leak()
    .control(),
    Attempt::new("sys-debug", "debugfs or tracefs is mounted and can be read.", |_| {
        any_of(["/sys/kernel/debug", "/sys/kernel/tracing"], |path| {
            match std::fs::read_dir(path).doing(path)?.count() {
                0 => held(format!("{path} is empty")),
                count => Ok(format!("{path} has {count} entries")),
            }
        })
    }),
    Attempt::new("add-key", "add_key(2) puts a key into a keyring.", |_| {
        let id = add_key(b"denizen-escape", SESSION_KEYRING)?;
        let _ = sys::call(KEYCTL, &mut [Arg::Num(9), Arg::Num(id), Arg::Num(SESSION_KEYRING)]);
        Ok(format!("key {id}"))
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_KEYS"),
    Attempt::new("session-keyring", "keyctl(2) finds a session keyring.", |_| {
        let id = session_keyring()?;
        Ok(format!("keyring {id}"))
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_KEYS"),
    Attempt::new("host-session-keyring", "The session keyring is that of the host.", |facts| {
        let theirs: i64 = facts.number("host-keyring")?;
        let id = session_keyring()?;
        if id == theirs { Ok(format!("keyring {id}")) } else { held("it is another one") }
    })
    .control()
    .needs("kernel: CONFIG_KEYS"),
    Attempt::new("join-keyring", "keyctl(2) joins a session keyring by its name.", |_| {
        let id = sys::call(KEYCTL, &mut [Arg::Num(1), Arg::Text(c"_ses")])?;
        Ok(format!("keyring {id}"))
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_KEYS"),
    Attempt::new("host-key", "A key of the host can be read by its number.", |facts| {
        read_key(facts, facts.number("key-id")?)
    })
    .control(),
    Attempt::new(
        "host-key-by-name",
        "request_key(2) or a search find a key of the host.",
        |facts| {
            let name = facts.text("key-name")?;
            let name = std::ffi::CString::new(name).preparing("--key-name")?;
            let asked =
                sys::call(libc::SYS_request_key, &mut [Arg::Text(c"user"), Arg::Text(&name)]);
            let found = asked.or_else(|_| {
                sys::call(
                    KEYCTL,
                    &mut [
                        Arg::Num(10),
                        Arg::Num(USER_KEYRING),
                        Arg::Text(c"user"),
                        Arg::Text(&name),
                    ],
                )
            });
            read_key(facts, found?)
        },
    )
    .control(),
    Attempt::new("bpf", "bpf(2) makes a map.", |_| {
        // An array of one entry: type, size of a key, size of a value, entries.
        let mut attributes = sys::halves(&[2, 4, 8, 1]);
        attributes.resize(128, 0);
        bpf(0, &attributes)
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_BPF_SYSCALL"),
    Attempt::new("bpf-program", "bpf(2) loads a program.", |_| {
        // r0 = 0; exit. As a socket filter.
        let program = sys::words(&[0x0000_0000_0000_00b7, 0x0000_0000_0000_0095]);
        let license = c"GPL".to_bytes_with_nul();
        let mut attributes = sys::halves(&[1, 2]);
        attributes.extend(sys::words(&[sys::address(&program), sys::address(license)]));
        attributes.resize(128, 0);
        let verdict = bpf(5, &attributes);
        std::hint::black_box(&program);
        verdict
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_BPF_SYSCALL"),
    Attempt::new("userfaultfd", "userfaultfd(2) holds up page faults of the kernel.", |_| {
        sys::owned(sys::call(libc::SYS_userfaultfd, &mut [Arg::Num(i64::from(libc::O_CLOEXEC))]))?;
        Ok("for faults of the kernel too".into())
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_USERFAULTFD"),
    Attempt::new("userfaultfd-user", "userfaultfd(2) holds up page faults of programs.", |_| {
        let flags = i64::from(libc::O_CLOEXEC) | 1;
        sys::owned(sys::call(libc::SYS_userfaultfd, &mut [Arg::Num(flags)]))?;
        Ok("for faults of programs".into())
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_USERFAULTFD"),
    Attempt::new("perf-event", "perf_event_open(2) counts for this process.", |_| perf(0, -1, 0))
        .surface()
        .control()
        .needs("kernel: CONFIG_PERF_EVENTS"),
    Attempt::new("perf-event-all", "perf_event_open(2) watches a whole processor.", |_| {
        perf(-1, 0, 0)
    })
    .control()
    .needs("kernel: CONFIG_PERF_EVENTS"),
    Attempt::new("io-uring", "io_uring_setup(2) makes a ring, whose calls no filter sees.", |_| {
        let mut parameters = [0; 120];
        sys::owned(sys::call(
            libc::SYS_io_uring_setup,
            &mut [Arg::Num(2), Arg::Out(&mut parameters)],
        ))?;
        Ok("made a ring".into())
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_IO_URING"),
    Attempt::new("kexec-load", "kexec_load(2) is allowed, which starts another kernel.", |_| {
        // More segments than there can be.
        let arguments = &mut [Arg::Num(0), Arg::Num(9999), Arg::Num(0), Arg::Num(0)];
        got_through("kexec_load", sys::call(libc::SYS_kexec_load, arguments))
    })
    .control()
    .needs("kernel: CONFIG_KEXEC"),
    Attempt::new("kexec-file-load", "kexec_file_load(2) is allowed.", |_| {
        let flags = i64::from(u32::MAX);
        let arguments =
            &mut [Arg::Num(-1), Arg::Num(-1), Arg::Num(0), Arg::Num(0), Arg::Num(flags)];
        got_through("kexec_file_load", sys::call(libc::SYS_kexec_file_load, arguments))
    })
    .control()
    .needs("kernel: CONFIG_KEXEC_FILE"),
    Attempt::new(
        "init-module",
        "init_module(2) is allowed, which loads code into the kernel.",
        |_| {
            let arguments = &mut [Arg::Num(0), Arg::Num(0), Arg::Text(c"")];
            got_through("init_module", sys::call(libc::SYS_init_module, arguments))
        },
    )
    .control()
    .needs("kernel: CONFIG_MODULES"),
    Attempt::new("finit-module", "finit_module(2) is allowed.", |_| {
        let arguments = &mut [Arg::Num(-1), Arg::Text(c""), Arg::Num(0)];
        got_through("finit_module", sys::call(libc::SYS_finit_module, arguments))
    })
    .control()
    .needs("kernel: CONFIG_MODULES"),
    Attempt::new("delete-module", "delete_module(2) is allowed.", |_| {
        let arguments = &mut [Arg::Text(c"denizen_no_such_module"), Arg::Num(2048)];
        got_through("delete_module", sys::call(libc::SYS_delete_module, arguments))
    })
    .control()
    .needs("kernel: CONFIG_MODULE_UNLOAD"),
    Attempt::new("acct", "acct(2) is allowed, which writes of every process that ends.", |_| {
        let path = Arg::Text(c"/denizen-no-such-folder/file");
        got_through("acct", sys::call(libc::SYS_acct, &mut [path]))
    })
    .control()
    .needs("kernel: CONFIG_BSD_PROCESS_ACCT"),
    Attempt::new("swapon", "swapon(2) is allowed.", |_| {
        let path = Arg::Text(c"/denizen-no-such-folder/file");
        got_through("swapon", sys::call(libc::SYS_swapon, &mut [path, Arg::Num(0)]))
    })
    .control()
    .needs("kernel: CONFIG_SWAP"),
    Attempt::new("swapoff", "swapoff(2) is allowed.", |_| {
        let path = Arg::Text(c"/denizen-no-such-folder/file");
        got_through("swapoff", sys::call(libc::SYS_swapoff, &mut [path]))
    })
    .control()
    .needs("kernel: CONFIG_SWAP"),
    Attempt::new("quotactl", "quotactl(2) is allowed.", |_| {
        const GET_INFO_OF_USERS: i64 = 0x8000_0500;
        let device = Arg::Text(c"/dev/null");
        let mut buffer = [0; 64];
        let arguments =
            &mut [Arg::Num(GET_INFO_OF_USERS), device, Arg::Num(0), Arg::Out(&mut buffer)];
        got_through("quotactl", sys::call(libc::SYS_quotactl, arguments))
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_QUOTACTL"),
    Attempt::new("lookup-dcookie", "lookup_dcookie(2) tells paths of the whole system.", |_| {
        let mut buffer = [0; 64];
        let arguments = &mut [Arg::Num(0), Arg::Out(&mut buffer), Arg::Num(64)];
        got_through("lookup_dcookie", sys::call(libc::SYS_lookup_dcookie, arguments))
    })
    .control()
    .needs("kernel: before 6.7, CONFIG_PROFILING"),
    Attempt::new("nfsservctl", "nfsservctl(2), which is long gone, answers.", |_| {
        got_through("nfsservctl", sys::call(libc::SYS_nfsservctl, &mut []))
    }),
    Attempt::new("fanotify", "fanotify_init(2) watches all use of files.", |_| {
        const CONTENT: i64 = 4;
        sys::owned(sys::call(libc::SYS_fanotify_init, &mut [Arg::Num(CONTENT), Arg::Num(0)]))?;
        Ok("a group that may refuse opening".into())
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_FANOTIFY_ACCESS_PERMISSIONS"),
    Attempt::new("no-randomness", "personality(2) turns the layout's randomness off.", |_| {
        persona(libc::ADDR_NO_RANDOMIZE)
    })
    .surface()
    .control(),
    Attempt::new("read-implies-exec", "personality(2) makes all memory executable.", |_| {
        persona(libc::READ_IMPLIES_EXEC)
    })
    .surface()
    .control(),
    Attempt::new("old-personality", "personality(2) asks for another system's rules.", |_| {
        persona(SYSTEM_V)
    })
    .surface()
    .control(),
    Attempt::new("clock-set", "clock_settime(2) sets the host's clock.", |_| {
        // To what it is; even that moves it by a little, so this is not for a host.
        let mut now = [0; 16];
        sys::call(libc::SYS_clock_gettime, &mut [Arg::Num(0), Arg::Out(&mut now)])
            .preparing("the time")?;
        sys::call(libc::SYS_clock_settime, &mut [Arg::Num(0), Arg::In(&now)])?;
        Ok("set it".into())
    }),
    Attempt::new("time-of-day-set", "settimeofday(2) sets the host's clock.", |_| {
        let mut now = [0; 16];
        sys::call(libc::SYS_gettimeofday, &mut [Arg::Out(&mut now)]).preparing("the time")?;
        sys::call(libc::SYS_settimeofday, &mut [Arg::In(&now)])?;
        Ok("set it".into())
    }),
    Attempt::new("clock-tune", "adjtimex(2) changes the speed of the host's clock.", |_| {
        tune(|timex| sys::call(libc::SYS_adjtimex, &mut [Arg::Out(timex)]))
    })
    .control(),
    Attempt::new("clock-adjust", "clock_adjtime(2) changes the speed of the host's clock.", |_| {
        tune(|timex| sys::call(libc::SYS_clock_adjtime, &mut [Arg::Num(0), Arg::Out(timex)]))
    })
    .control(),
    Attempt::new("reboot-allowed", "reboot(2) is allowed.", |_| {
        // The wrong magic numbers, with which it does nothing.
        let arguments = &mut [Arg::Num(0), Arg::Num(0), Arg::Num(0)];
        got_through("reboot", sys::call(libc::SYS_reboot, arguments))
    })
    .surface()
    .control(),
    Attempt::new("reboot-keys", "reboot(2) changes what Ctrl-Alt-Del does.", |_| {
        let arguments = &mut [
            Arg::Num(0xfee1_dead),
            Arg::Num(i64::from(libc::LINUX_REBOOT_MAGIC2)),
            Arg::Num(0),
        ];
        sys::call(libc::SYS_reboot, arguments)?;
        Ok("it does".into())
    }),
    Attempt::new(
        "host-pages",
        "move_pages(2) tells of the memory of a process outside.",
        |facts| {
            let pid = facts.number("host-pid")?;
            let arguments = &mut [Arg::Num(pid), Arg::Num(0)];
            sys::call(libc::SYS_move_pages, arguments)?;
            Ok("it may be asked".into())
        },
    )
    .control()
    .needs("kernel: CONFIG_NUMA, CONFIG_MIGRATION"),
];

/// A file below /proc or /sys that is not covered and holds what is looked for.
fn shows(path: &str, fits: impl Fn(&[u8]) -> bool) -> Verdict {
    let bytes = read(Path::new(path)).doing(path)?;
    if fits(&bytes) { Ok(format!("{path} shows it")) } else { held(format!("{path} does not")) }
}

/// Goes through files, not through symlinks, until told to stop by `false`.
fn walk(folder: &Path, depth: u32, see: &mut impl FnMut(&Path) -> bool) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries {
        let Ok(kind) = entry.file_type() else { continue };
        let go_on = match depth {
            _ if kind.is_file() => see(&entry.path()),
            0 => true,
            _ if kind.is_dir() => walk(&entry.path(), depth - 1, see),
            _ => true,
        };
        if !go_on {
            return false;
        }
    }
    true
}

/// The number of the session keyring that this process has.
pub fn session_keyring() -> Result<i64, std::io::Error> {
    sys::call(KEYCTL, &mut [Arg::Num(0), Arg::Num(SESSION_KEYRING), Arg::Num(0)])
}

/// Adds a key with these bytes as its name; gives its number.
fn add_key(name: &[u8], keyring: i64) -> Result<i64, std::io::Error> {
    add_user_key(name, b"nothing", keyring)
}

/// A key of the kind `user`.
pub fn add_user_key(name: &[u8], value: &[u8], keyring: i64) -> Result<i64, std::io::Error> {
    let name = std::ffi::CString::new(name)?;
    let length = i64::try_from(value.len()).unwrap_or(0);
    sys::call(
        libc::SYS_add_key,
        &mut [
            Arg::Text(c"user"),
            Arg::Text(&name),
            Arg::In(value),
            Arg::Num(length),
            Arg::Num(keyring),
        ],
    )
}

fn read_key(facts: &Facts, id: i64) -> Verdict {
    let mut buffer = [0; 256];
    let read = &mut [Arg::Num(11), Arg::Num(id), Arg::Out(&mut buffer), Arg::Num(256)];
    sys::call(KEYCTL, read).doing("keyctl")?;
    if holds(&buffer, facts.secret()) {
        return Ok(format!("read the secret from key {id}"));
    }
    held(format!("key {id} holds something else"))
}

fn bpf(command: i64, attributes: &[u8]) -> Verdict {
    let length = i64::try_from(attributes.len()).unwrap_or(0);
    let mut copy = attributes.to_vec();
    let arguments = &mut [Arg::Num(command), Arg::Out(&mut copy), Arg::Num(length)];
    sys::owned(sys::call(libc::SYS_bpf, arguments))?;
    Ok(format!("bpf command {command} worked"))
}

/// Counts context switches, a thing of the kernel's software only.
fn perf(pid: i64, processor: i64, flags: i64) -> Verdict {
    // struct perf_event_attr: type 1, its size, event 3.
    let mut attributes = sys::halves(&[1, 112]);
    attributes.extend(sys::words(&[3]));
    attributes.resize(112, 0);
    let arguments = &mut [
        Arg::Out(&mut attributes),
        Arg::Num(pid),
        Arg::Num(processor),
        Arg::Num(-1),
        Arg::Num(flags),
    ];
    let fd = sys::owned(sys::call(libc::SYS_perf_event_open, arguments))?;
    Ok(format!("an event as descriptor {}", fd.as_raw_fd()))
}

fn persona(which: i32) -> Verdict {
    let old = sys::call(libc::SYS_personality, &mut [Arg::Num(i64::from(which))])?;
    Ok(format!("{which:#x}, {old:#x} before"))
}

/// Sets the length of a tick to what it is.
fn tune(call: impl Fn(&mut [u8]) -> Result<i64, std::io::Error>) -> Verdict {
    const SET_TICK: u32 = 0x4000;
    // struct timex has 208 bytes and begins with what is to be changed; asking for nothing
    // fills in the rest.
    let mut timex = [0; 208];
    call(&mut timex).doing("asking")?;
    if let Some(modes) = timex.first_chunk_mut() {
        *modes = SET_TICK.to_ne_bytes();
    }
    call(&mut timex).doing("setting")?;
    Ok("set a tick to what it was".into())
}
