//! Attempts that only an x86-64 processor has: system calls by the ways of other kinds of
//! programs, which a filter may not know, and calls on ports and segments.

use crate::attempt::{Attempt, Verdict, got_through};
use crate::sys::{self, Arg};

/// Marks the number of a call in the x32 way.
const X32: i64 = 0x4000_0000;
const CREATE_MODULE: i64 = 174;

pub const ATTEMPTS: &[Attempt] = &[
    Attempt::new("gate32-unshare", "A 32-bit call makes a user namespace.", |_| {
        sys::call32(310, [libc::CLONE_NEWUSER.cast_unsigned(), 0, 0, 0])?;
        Ok("a new user namespace".into())
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_IA32_EMULATION"),
    Attempt::new("gate32-keyctl", "A 32-bit call finds the session keyring.", |_| {
        let id = sys::call32(288, [0, (-3_i32).cast_unsigned(), 0, 0])?;
        Ok(format!("keyring {id}"))
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_IA32_EMULATION, CONFIG_KEYS"),
    Attempt::new("gate32-mount", "A 32-bit call to mount(2) gets through.", |_| {
        // A kind of file system is needed, so without one it fails.
        got_through("mount", sys::call32(21, [0, 0, 0, 0]))
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_IA32_EMULATION"),
    Attempt::new("gate32-bpf", "A 32-bit call to bpf(2) gets through.", |_| {
        got_through("bpf", sys::call32(357, [0, 0, 128, 0]))
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_IA32_EMULATION, CONFIG_BPF_SYSCALL"),
    Attempt::new("gate32-io-uring", "A 32-bit call to io_uring_setup(2) gets through.", |_| {
        got_through("io_uring_setup", sys::call32(425, [1, 0, 0, 0]))
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_IA32_EMULATION, CONFIG_IO_URING"),
    Attempt::new("gate32-perf-event", "A 32-bit call to perf_event_open(2) gets through.", |_| {
        got_through("perf_event_open", sys::call32(336, [0, 0, 0, 0]))
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_IA32_EMULATION, CONFIG_PERF_EVENTS"),
    Attempt::new("gate32-userfaultfd", "A 32-bit call makes a userfaultfd.", |_| {
        let fd = sys::call32(374, [1, 0, 0, 0])?;
        Ok(format!("descriptor {fd}"))
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_IA32_EMULATION, CONFIG_USERFAULTFD"),
    Attempt::new("gate32-ptrace-init", "A 32-bit call reads the first process's memory.", |_| {
        // process_vm_readv with nothing to read is looked at for access all the same.
        got_through("process_vm_readv", sys::call32(347, [1, 0, 0, 0]))
    })
    .surface(),
    Attempt::new("gate32-setns", "A 32-bit call to setns(2) gets through.", |_| {
        got_through("setns", sys::call32(346, [u32::MAX, 0, 0, 0]))
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_IA32_EMULATION"),
    Attempt::new(
        "gate32-clone3",
        "A 32-bit call to clone3(2) gets through with flags unseen.",
        |_| got_through("clone3", sys::call32(435, [0, 64, 0, 0])),
    )
    .surface()
    .control()
    .needs("kernel: CONFIG_IA32_EMULATION"),
    Attempt::new("gate32-reboot", "A 32-bit call to reboot(2) gets through.", |_| {
        got_through("reboot", sys::call32(88, [0, 0, 0, 0]))
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_IA32_EMULATION"),
    Attempt::new("x32-unshare", "A call by the x32 number makes a user namespace.", |_| {
        let flags = i64::from(libc::CLONE_NEWUSER);
        sys::call(libc::SYS_unshare | X32, &mut [Arg::Num(flags)])?;
        Ok("a new user namespace".into())
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_X86_X32_ABI"),
    Attempt::new("x32-keyctl", "A call by the x32 number finds the session keyring.", |_| {
        let id = sys::call(libc::SYS_keyctl | X32, &mut [Arg::Num(0), Arg::Num(-3)])?;
        Ok(format!("keyring {id}"))
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_X86_X32_ABI, CONFIG_KEYS"),
    Attempt::new("x32-ptrace", "ptrace(2) by its x32 number traces the first process.", |_| {
        const PTRACE_OF_X32: i64 = 521;
        sys::call(PTRACE_OF_X32 | X32, &mut [Arg::Num(0x4206), Arg::Num(1)])?;
        Ok("traces it".into())
    }),
    Attempt::new("ports", "ioperm(2) gives the use of a port of the machine.", |_| {
        // The port that is written to for a short delay; nothing is written here.
        sys::call(libc::SYS_ioperm, &mut [Arg::Num(0x80), Arg::Num(1), Arg::Num(1)])?;
        Ok("port 0x80".into())
    })
    .control()
    .needs("kernel: CONFIG_X86_IOPL_IOPERM"),
    Attempt::new("all-ports", "iopl(2) gives the use of all ports of the machine.", |_| {
        sys::call(libc::SYS_iopl, &mut [Arg::Num(3)])?;
        Ok("all of them".into())
    })
    .control()
    .needs("kernel: CONFIG_X86_IOPL_IOPERM"),
    Attempt::new("segments", "modify_ldt(2) is allowed.", |_| {
        let mut buffer = [0; 64];
        let arguments = &mut [Arg::Num(0), Arg::Out(&mut buffer), Arg::Num(64)];
        let count = sys::call(libc::SYS_modify_ldt, arguments)?;
        Ok(format!("{count} bytes of a table of segments"))
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_MODIFY_LDT_SYSCALL"),
    Attempt::new("sysctl-call", "_sysctl(2), which is long gone, answers.", |_| {
        old("_sysctl", libc::SYS__sysctl)
    }),
    Attempt::new("uselib", "uselib(2) maps a library by the rules of old.", |_| {
        old("uselib", libc::SYS_uselib)
    }),
    Attempt::new("create-module", "create_module(2), which is long gone, answers.", |_| {
        old("create_module", CREATE_MODULE)
    }),
];

fn old(name: &str, number: i64) -> Verdict {
    got_through(name, sys::call(number, &mut []))
}
