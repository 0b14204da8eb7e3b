//! The system calls that a sandbox's programs do not have: a list with a reason for each
//! entry, and the seccomp filter (`seccomp(2)`) made from it. All other calls are allowed: the
//! namespaces are the wall, this keeps the kernel's rarely used doors shut.
//!
//! What is refused as if it were not there (`ENOSYS`) has a fallback in programs that use it;
//! the rest is refused as forbidden (`EPERM`). Calls of another architecture than the
//! program's own, 32-bit and x32 ones, do not exist here: the numbers below would not apply.

use libc::{BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
use rustix::io::Errno;

/// Why calls are refused, and which.
const DENIED: &[(&str, Errno, &[i64])] = &[
    (
        "mounts: a new tree could uncover what is hidden",
        Errno::PERM,
        &[
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_pivot_root,
            libc::SYS_open_tree,
            libc::SYS_move_mount,
            libc::SYS_fsopen,
            libc::SYS_fsconfig,
            libc::SYS_fsmount,
            libc::SYS_fspick,
            libc::SYS_mount_setattr,
        ],
    ),
    (
        "namespaces: a user namespace within gives all capabilities over a large part of the \
         kernel; clone(2) is looked at below, clone3(2) cannot be, and libraries fall back",
        Errno::PERM,
        &[libc::SYS_unshare, libc::SYS_setns],
    ),
    ("as above", Errno::NOSYS, &[libc::SYS_clone3]),
    (
        "files by handle: past all folders that are in the way",
        Errno::PERM,
        &[libc::SYS_open_by_handle_at, libc::SYS_name_to_handle_at],
    ),
    (
        "programs in the kernel, or its memory",
        Errno::PERM,
        &[
            libc::SYS_bpf,
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_delete_module,
            libc::SYS_kexec_load,
            libc::SYS_kexec_file_load,
        ],
    ),
    (
        "large, new and often at fault: io_uring(7) has its own way around filters",
        Errno::NOSYS,
        &[libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register],
    ),
    (
        "stops the kernel in the middle of a copy: the tool of many an exploit",
        Errno::PERM,
        &[libc::SYS_userfaultfd],
    ),
    ("counters show other sessions' work", Errno::PERM, &[libc::SYS_perf_event_open]),
    (
        "keys: not kept apart by all namespaces",
        Errno::NOSYS,
        &[libc::SYS_add_key, libc::SYS_request_key, libc::SYS_keyctl],
    ),
    (
        "the machine: its clock, its power, its swap, its log, its accounting",
        Errno::PERM,
        &[
            libc::SYS_reboot,
            libc::SYS_settimeofday,
            libc::SYS_clock_settime,
            libc::SYS_clock_adjtime,
            libc::SYS_adjtimex,
            libc::SYS_swapon,
            libc::SYS_swapoff,
            libc::SYS_syslog,
            libc::SYS_acct,
            libc::SYS_quotactl,
            libc::SYS_quotactl_fd,
            libc::SYS_vhangup,
            libc::SYS_lookup_dcookie,
            libc::SYS_nfsservctl,
            libc::SYS_fanotify_init,
        ],
    ),
    (
        "pages and memory policy of other processes",
        Errno::PERM,
        &[libc::SYS_move_pages, libc::SYS_migrate_pages, libc::SYS_kcmp],
    ),
    #[cfg(target_arch = "x86_64")]
    (
        "old doors to the hardware, and to parts of the kernel that nobody looks after",
        Errno::PERM,
        &[
            libc::SYS_iopl,
            libc::SYS_ioperm,
            libc::SYS_modify_ldt,
            libc::SYS__sysctl,
            libc::SYS_uselib,
            libc::SYS_ustat,
            libc::SYS_sysfs,
        ],
    ),
];

/// Where there is one user only, becoming or naming another succeeds without being done:
/// nobody could see the difference but by asking, and package managers insist on it.
const PRETENDED: &[i64] = &[
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_setgroups,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lchown,
];

/// The limit that a process's command is known by (`crates/init/src/main.rs`). It has meant
/// nothing to Linux since 2.4.25, so that setting it succeeds without being done: a process that
/// could would have its command forgotten, and outlive it.
const RLIMIT_LOCKS: u32 = 10;
/// `CLONE_NEW…`: all kinds of namespaces.
const CLONE_NEW: u32 = 0x7e02_0000;
/// Types of sockets: local, IPv4, IPv6.
const SOCKETS: [u32; 3] = [1, 2, 10];
const NETLINK: u32 = 16;
/// Fakes input on a terminal; the other works on consoles.
const IOCTLS: [u32; 2] = [0x5412, 0x541c];
/// Linux, 32-bit Linux, and the question.
const PERSONALITIES: [u32; 3] = [0, 8, u32::MAX];

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;
/// Above it are the x32 calls.
const X32: u32 = 0x4000_0000;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
/// Not done, and told as if it were.
const PRETEND: u32 = libc::SECCOMP_RET_ERRNO;

fn refuse(errno: Errno) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno.raw_os_error().unsigned_abs()
}

/// A filter being written.
#[derive(Default)]
struct Filter(Vec<libc::sock_filter>);

impl Filter {
    fn add(&mut self, code: u32, k: u32, jump_true: u8, jump_false: u8) {
        // Codes are 16 bits wide by definition.
        let code = u16::try_from(code).unwrap_or_default();
        self.0.push(libc::sock_filter { code, jt: jump_true, jf: jump_false, k });
    }

    /// Loads a word of `struct seccomp_data`.
    fn load(&mut self, offset: u32) {
        self.add(BPF_LD | BPF_W | BPF_ABS, offset, 0, 0);
    }

    /// Loads the low half of an argument; most that is looked at here is 32 bits wide.
    fn load_argument(&mut self, index: u32) {
        self.load(16 + 8 * index);
    }

    fn answer(&mut self, answer: u32) {
        self.add(BPF_RET | BPF_K, answer, 0, 0);
    }

    /// Answers if what is loaded equals `value`.
    fn answer_if(&mut self, value: u32, answer: u32) {
        self.add(BPF_JMP | BPF_JEQ | BPF_K, value, 0, 1);
        self.answer(answer);
    }

    /// A part for one call: `rest` answers always, from its arguments.
    fn for_call(&mut self, call: i64, rest: impl FnOnce(&mut Self)) {
        let mut part = Self::default();
        rest(&mut part);
        let length = u8::try_from(part.0.len()).unwrap_or(u8::MAX);
        self.add(BPF_JMP | BPF_JEQ | BPF_K, number(call), 0, length);
        self.0.append(&mut part.0);
    }
}

fn number(call: i64) -> u32 {
    u32::try_from(call).unwrap_or(u32::MAX)
}

/// The filter; with one user only, as [`PRETENDED`] says. Whoever has the key may set
/// [`RLIMIT_LOCKS`]: the first process, which nobody within can look into (the kernel shows a
/// filter to nobody there either).
fn filter(alone: bool, key: [u64; 2]) -> Vec<libc::sock_filter> {
    let mut filter = Filter::default();
    filter.load(4);
    filter.add(BPF_JMP | BPF_JEQ | BPF_K, ARCHITECTURE, 1, 0);
    filter.answer(refuse(Errno::NOSYS));
    filter.load(0);
    if cfg!(target_arch = "x86_64") {
        filter.add(BPF_JMP | BPF_JGE | BPF_K, X32, 0, 1);
        filter.answer(refuse(Errno::NOSYS));
    }
    for (_, errno, calls) in DENIED {
        for call in *calls {
            filter.answer_if(number(*call), refuse(*errno));
        }
    }
    if alone {
        for call in PRETENDED {
            filter.answer_if(number(*call), PRETEND);
        }
    }
    filter.for_call(libc::SYS_clone, |part| {
        part.load_argument(0);
        part.add(BPF_ALU | BPF_AND | BPF_K, CLONE_NEW, 0, 0);
        part.answer_if(0, ALLOW);
        part.answer(refuse(Errno::PERM));
    });
    filter.for_call(libc::SYS_ioctl, |part| {
        part.load_argument(1);
        for ioctl in IOCTLS {
            part.answer_if(ioctl, refuse(Errno::PERM));
        }
        part.answer(ALLOW);
    });
    filter.for_call(libc::SYS_socket, |part| {
        part.load_argument(0);
        for domain in SOCKETS {
            part.answer_if(domain, ALLOW);
        }
        // Netlink, which programs look at interfaces by, and nothing else of its kind.
        part.add(BPF_JMP | BPF_JEQ | BPF_K, NETLINK, 1, 0);
        part.answer(refuse(Errno::AFNOSUPPORT));
        part.load_argument(2);
        part.answer_if(0, ALLOW);
        part.answer(refuse(Errno::PROTONOSUPPORT));
    });
    filter.for_call(libc::SYS_socketpair, |part| {
        part.load_argument(0);
        part.answer_if(1, ALLOW);
        part.answer(refuse(Errno::AFNOSUPPORT));
    });
    filter.for_call(libc::SYS_personality, |part| {
        part.load_argument(0);
        for personality in PERSONALITIES {
            part.answer_if(personality, ALLOW);
        }
        part.answer(refuse(Errno::PERM));
    });
    filter.for_call(libc::SYS_setrlimit, |part| {
        part.load_argument(0);
        part.answer_if(RLIMIT_LOCKS, PRETEND);
        part.answer(ALLOW);
    });
    filter.for_call(libc::SYS_prlimit64, |part| {
        // No new limit: it only asks.
        part.load_argument(2);
        part.add(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 3);
        part.load(16 + 8 * 2 + 4);
        part.answer_if(0, ALLOW);
        // Another process's limits may be asked for (init does), not set: the first process's
        // are all of the sandbox's.
        part.load_argument(0);
        part.add(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, 0);
        part.answer(refuse(Errno::PERM));
        part.load_argument(1);
        part.add(BPF_JMP | BPF_JEQ | BPF_K, RLIMIT_LOCKS, 1, 0);
        part.answer(ALLOW);
        // Two arguments more than the call has.
        for (index, half) in (4..).zip(key) {
            for (offset, word) in [(0, half & u64::from(u32::MAX)), (4, half >> 32)] {
                part.load(16 + 8 * index + offset);
                let word = u32::try_from(word).unwrap_or_default();
                part.add(BPF_JMP | BPF_JEQ | BPF_K, word, 1, 0);
                part.answer(PRETEND);
            }
        }
        part.answer(ALLOW);
    });
    filter.answer(ALLOW);
    filter.0
}

/// The filter as a plan has it: 16 hexadecimal digits for each instruction.
pub(super) fn digits(alone: bool, key: [u64; 2]) -> String {
    let word = |filter: &libc::sock_filter| {
        u64::from(filter.code)
            | u64::from(filter.jt) << 16
            | u64::from(filter.jf) << 24
            | u64::from(filter.k) << 32
    };
    filter(alone, key).iter().map(|instruction| format!("{:016x}", word(instruction))).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const KEY: [u64; 2] = [0x1234_5678_9abc_def0, 0xfeed_0000_0000_0001];

    /// What a kernel would answer: this filter's few instructions, run.
    fn answer(filter: &[libc::sock_filter], architecture: u32, call: u32, args: &[u64]) -> u32 {
        let data = |offset: u32| match offset {
            0 => call,
            4 => architecture,
            offset => {
                let argument = args.get((offset as usize - 16) / 8).copied().unwrap_or(0);
                let half = if offset % 8 == 4 { argument >> 32 } else { argument & 0xffff_ffff };
                u32::try_from(half).unwrap()
            }
        };
        let (mut at, mut loaded) = (0, 0);
        loop {
            let libc::sock_filter { code, jt, jf, k } = filter[at];
            at += 1;
            match u32::from(code) {
                c if c == BPF_LD | BPF_W | BPF_ABS => loaded = data(k),
                c if c == BPF_RET | BPF_K => return k,
                c if c == BPF_ALU | BPF_AND | BPF_K => loaded &= k,
                c if c == BPF_JMP | BPF_JEQ | BPF_K => {
                    at += usize::from(if loaded == k { jt } else { jf });
                }
                c if c == BPF_JMP | BPF_JGE | BPF_K => {
                    at += usize::from(if loaded >= k { jt } else { jf });
                }
                c => panic!("instruction {c:#x}"),
            }
        }
    }

    #[test]
    fn every_entry_is_refused_and_nothing_else_is() {
        let filter = filter(false, KEY);
        let denied: Vec<u32> =
            DENIED.iter().flat_map(|(_, _, calls)| *calls).map(|call| number(*call)).collect();
        for call in 0..600 {
            let answer = answer(&filter, ARCHITECTURE, call, &[1]);
            // With these arguments: a personality of no use, a clone without flags, a local socket.
            let refused = denied.contains(&call) || call == number(libc::SYS_personality);
            assert_eq!(answer != ALLOW, refused, "{call}");
        }
    }

    #[test]
    fn other_architectures_have_no_calls() {
        let filter = filter(false, KEY);
        let nosys = refuse(Errno::NOSYS);
        assert_eq!(answer(&filter, 0x4000_0003, number(libc::SYS_getpid), &[]), nosys);
        assert_eq!(answer(&filter, ARCHITECTURE, X32 | number(libc::SYS_getpid), &[]), nosys);
    }

    #[test]
    fn arguments_decide_where_they_must() {
        let filter = filter(false, KEY);
        let ask = |call: i64, args: &[u64]| answer(&filter, ARCHITECTURE, number(call), args);
        assert_eq!(ask(libc::SYS_clone, &[0x11]), ALLOW);
        // A thread, as libraries make it.
        assert_eq!(ask(libc::SYS_clone, &[0x3d_0f00]), ALLOW);
        for flag in
            [0x2_0000, 0x200_0000, 0x400_0000, 0x800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000]
        {
            assert_eq!(ask(libc::SYS_clone, &[flag | 0x11]), refuse(Errno::PERM), "{flag:#x}");
        }
        assert_eq!(ask(libc::SYS_ioctl, &[0, 0x5412]), refuse(Errno::PERM));
        assert_eq!(ask(libc::SYS_ioctl, &[0, 0x5413]), ALLOW);
        assert_eq!(ask(libc::SYS_socket, &[40]), refuse(Errno::AFNOSUPPORT));
        assert_eq!(ask(libc::SYS_socket, &[2]), ALLOW);
        assert_eq!(ask(libc::SYS_socket, &[16, 3, 0]), ALLOW);
        assert_eq!(ask(libc::SYS_socket, &[16, 3, 9]), refuse(Errno::PROTONOSUPPORT));
        assert_eq!(ask(libc::SYS_socketpair, &[1]), ALLOW);
        assert_eq!(ask(libc::SYS_socketpair, &[40]), refuse(Errno::AFNOSUPPORT));
        assert_eq!(ask(libc::SYS_prlimit64, &[0, 7, 0x1000]), ALLOW);
        assert_eq!(ask(libc::SYS_prlimit64, &[1, 7, 0]), ALLOW);
        assert_eq!(ask(libc::SYS_prlimit64, &[1, 7, 0x1000]), refuse(Errno::PERM));
        assert_eq!(ask(libc::SYS_prlimit64, &[1, 7, 1 << 40]), refuse(Errno::PERM));
        assert_eq!(ask(libc::SYS_setrlimit, &[7, 0x1000]), ALLOW);
        assert_eq!(ask(libc::SYS_personality, &[0x40_0000]), refuse(Errno::PERM));
    }

    #[test]
    fn only_the_key_sets_the_mark_of_a_command() {
        let filter = filter(false, KEY);
        let ask = |call: i64, args: &[u64]| answer(&filter, ARCHITECTURE, number(call), args);
        let [one, two] = KEY;
        let locks = u64::from(RLIMIT_LOCKS);
        assert_eq!(ask(libc::SYS_setrlimit, &[locks, 0x1000]), PRETEND);
        assert_eq!(ask(libc::SYS_prlimit64, &[0, locks, 0, 0x1000]), ALLOW, "asking");
        let set = |key: [u64; 2]| ask(libc::SYS_prlimit64, &[0, locks, 0x1000, 0, key[0], key[1]]);
        assert_eq!(set(KEY), ALLOW);
        for bit in 0..64 {
            assert_eq!(set([one ^ 1 << bit, two]), PRETEND);
            assert_eq!(set([one, two ^ 1 << bit]), PRETEND);
        }
        assert_eq!(set([0, 0]), PRETEND);
        // Of another process, not with the key either.
        let other = ask(libc::SYS_prlimit64, &[1, locks, 0x1000, 0, one, two]);
        assert_eq!(other, refuse(Errno::PERM));
    }

    #[test]
    fn one_user_alone_becomes_everybody() {
        for call in PRETENDED {
            let told = |alone| answer(&filter(alone, KEY), ARCHITECTURE, number(*call), &[]);
            assert_eq!((told(true), told(false)), (PRETEND, ALLOW));
        }
    }
}
