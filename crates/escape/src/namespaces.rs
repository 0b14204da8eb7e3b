//! Attempts to share, enter or make namespaces. What they change is changed for this
//! program alone, which then ends.

use std::os::fd::AsRawFd;
use std::path::Path;

use crate::attempt::{Attempt, Doing, Verdict, any_of, held, impossible, open, read_text, status};
use crate::facts::{Facts, own_namespace};
use crate::sys::{self, Arg};

/// The kinds, as /proc names them.
pub const KINDS: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];

const NS_GET_USERNS: i64 = 0xb701;
const NS_GET_PARENT: i64 = 0xb702;
const SYS_LISTMOUNT: i64 = 458;

pub const ATTEMPTS: &[Attempt] = &[
    Attempt::new("same-user-ns", "Commands run in the host's user namespace.", |facts| {
        same(facts, "user")
    })
    .control(),
    Attempt::new("same-mnt-ns", "Commands run in the host's mount namespace.", |facts| {
        same(facts, "mnt")
    })
    .control(),
    Attempt::new("same-pid-ns", "Commands run in the host's pid namespace.", |facts| {
        same(facts, "pid")
    })
    .control(),
    Attempt::new("same-net-ns", "Commands run in the host's network namespace.", |facts| {
        same(facts, "net")
    })
    .control(),
    Attempt::new("same-ipc-ns", "Commands run in the host's IPC namespace.", |facts| {
        same(facts, "ipc")
    })
    .control(),
    Attempt::new("same-uts-ns", "Commands run in the host's UTS namespace.", |facts| {
        same(facts, "uts")
    })
    .control(),
    Attempt::new("same-cgroup-ns", "Commands run in the host's cgroup namespace.", |facts| {
        same(facts, "cgroup")
    })
    .control(),
    Attempt::new("enter-init-ns", "setns(2) enters namespaces of process 1.", |_| enter("1"))
        .control()
        .needs(crate::processes::FIRST),
    Attempt::new("enter-host-ns", "setns(2) enters namespaces of a process outside.", |facts| {
        enter(facts.text("host-pid")?)
    })
    .control(),
    Attempt::new(
        "enter-host-pidfd",
        "setns(2) with a pidfd enters all namespaces of a process outside.",
        |facts| {
            let pid = facts.number("host-pid")?;
            let fd = sys::owned(sys::call(libc::SYS_pidfd_open, &mut [Arg::Num(pid)]));
            let fd = fd.doing("pidfd_open")?;
            let flags = i64::from(libc::CLONE_NEWNET | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC);
            let arguments = &mut [Arg::Num(i64::from(fd.as_raw_fd())), Arg::Num(flags)];
            sys::call(libc::SYS_setns, arguments).doing("setns")?;
            Ok("entered".into())
        },
    )
    .control(),
    Attempt::new(
        "unshare-user",
        "A new user namespace can be made, with all capabilities in it.",
        |_| unshare(libc::CLONE_NEWUSER),
    )
    .surface()
    .control(),
    Attempt::new("unshare-mount", "A new mount namespace can be made.", |_| {
        unshare(libc::CLONE_NEWNS)
    })
    .surface()
    .control(),
    Attempt::new("unshare-pid", "A new pid namespace can be made.", |_| {
        unshare(libc::CLONE_NEWPID)
    })
    .surface()
    .control(),
    Attempt::new("unshare-net", "A new network namespace can be made.", |_| {
        unshare(libc::CLONE_NEWNET)
    })
    .surface()
    .control(),
    Attempt::new("unshare-ipc", "A new IPC namespace can be made.", |_| {
        unshare(libc::CLONE_NEWIPC)
    })
    .surface()
    .control(),
    Attempt::new("unshare-uts", "A new UTS namespace can be made.", |_| {
        unshare(libc::CLONE_NEWUTS)
    })
    .surface()
    .control(),
    Attempt::new("unshare-cgroup", "A new cgroup namespace can be made.", |_| {
        unshare(libc::CLONE_NEWCGROUP)
    })
    .surface()
    .control(),
    Attempt::new("unshare-time", "A new time namespace can be made.", |_| unshare(0x80))
        .surface()
        .control()
        .needs("kernel: CONFIG_TIME_NS"),
    Attempt::new(
        "unshare-with-more",
        "A filter that looks for one flag misses it among others.",
        |_| unshare(libc::CLONE_NEWUSER | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_NEWUTS),
    )
    .surface()
    .control(),
    Attempt::new("clone-user", "clone(2) makes a user namespace.", |_| {
        sys::clone_child(libc::CLONE_NEWUSER)?;
        Ok("a child in a new user namespace".into())
    })
    .surface()
    .control(),
    Attempt::new("clone-mount", "clone(2) makes a mount namespace.", |_| {
        sys::clone_child(libc::CLONE_NEWNS)?;
        Ok("a child in a new mount namespace".into())
    })
    .surface()
    .control(),
    Attempt::new("clone3-user", "clone3(2) makes a user namespace.", |_| {
        sys::clone3_child(libc::CLONE_NEWUSER)?;
        Ok("a child in a new user namespace".into())
    })
    .surface()
    .control(),
    Attempt::new("clone3-all", "clone3(2) makes namespaces of every kind.", |_| {
        sys::clone3_child(
            libc::CLONE_NEWUSER
                | libc::CLONE_NEWNS
                | libc::CLONE_NEWPID
                | libc::CLONE_NEWNET
                | libc::CLONE_NEWIPC
                | libc::CLONE_NEWUTS
                | libc::CLONE_NEWCGROUP,
        )?;
        Ok("a child in new namespaces".into())
    })
    .surface()
    .control(),
    Attempt::new("ns-parent", "The parent of a namespace can be had from the kernel.", |_| {
        let kinds = KINDS.iter().flat_map(|kind| [(kind, NS_GET_PARENT), (kind, NS_GET_USERNS)]);
        any_of(kinds, |(kind, request)| {
            let path = format!("/proc/self/ns/{kind}");
            let file = open(Path::new(&path)).doing(&path)?;
            let before = own_namespace("user")?;
            let fd = Arg::Num(i64::from(file.as_raw_fd()));
            let got = sys::owned(sys::call(libc::SYS_ioctl, &mut [fd, Arg::Num(request)]));
            let got = got.doing(&path)?;
            let link = std::fs::read_link(format!("/proc/self/fd/{}", got.as_raw_fd()));
            let link = link.doing("its link")?.to_string_lossy().into_owned();
            // Our own user namespace owns the others; that is known anyway.
            if link == before { held(format!("{kind}: our own")) } else { Ok(link) }
        })
    }),
    Attempt::new("uid-map", "Users are those of the host, or the whole range is mapped.", |_| {
        let path = "/proc/self/uid_map";
        let text = read_text(path).doing(path)?;
        for line in text.lines() {
            let numbers: Vec<u64> =
                line.split_ascii_whitespace().filter_map(|part| part.parse().ok()).collect();
            if let [0, 0, count] = numbers.as_slice() {
                return Ok(format!("{count} users are the host's, with root"));
            }
        }
        held(text.split_ascii_whitespace().collect::<Vec<_>>().join(" "))
    })
    .control(),
    Attempt::new("uid-map-write", "The map of users can be written again.", |_| {
        any_of(["/proc/self/uid_map", "/proc/1/uid_map", "/proc/self/gid_map"], |path| {
            std::fs::write(path, "0 0 4294967295").doing(path)?;
            Ok(format!("wrote {path}"))
        })
    }),
    Attempt::new("host-mounts", "listmount(2) lists the host's mounts.", |facts| {
        let number: u64 = facts.number("host-mounts")?;
        // struct mnt_id_req: size, spare, mnt_id (all below the root), param, namespace.
        let mut request = sys::halves(&[32, 0]);
        request.extend(sys::words(&[u64::MAX, 0, number]));
        let mut list = [0; 64];
        let count = sys::call(
            SYS_LISTMOUNT,
            &mut [Arg::In(&request), Arg::Out(&mut list), Arg::Num(8), Arg::Num(0)],
        )?;
        if count == 0 { held("none") } else { Ok(format!("{count} or more")) }
    })
    .control()
    .needs("kernel: 6.11"),
    Attempt::new(
        "cgroup-path",
        "/proc/self/cgroup shows where in the host's tree a command is.",
        |_| {
            let text = read_text("/proc/self/cgroup").doing("/proc/self/cgroup")?;
            let path = text.lines().filter_map(|line| line.splitn(3, ':').nth(2));
            match path.into_iter().find(|path| *path != "/") {
                Some(path) => Ok(path.to_owned()),
                None => held("every path is /"),
            }
        },
    )
    .leak(),
];

fn same(facts: &Facts, kind: &str) -> Verdict {
    if facts.is_in_hosts(kind)? {
        return Ok(format!("{} is the host's", own_namespace(kind)?));
    }
    held(format!("{} is not the host's", own_namespace(kind)?))
}

/// Enters any namespace of a process that can be entered.
fn enter(process: &str) -> Verdict {
    any_of(KINDS.iter().rev(), |kind| {
        let path = format!("/proc/{process}/ns/{kind}");
        let before = own_namespace(kind)?;
        let file = open(Path::new(&path)).doing(&path)?;
        let arguments = &mut [Arg::Num(i64::from(file.as_raw_fd())), Arg::Num(0)];
        sys::call(libc::SYS_setns, arguments).doing(&format!("setns to {path}"))?;
        Ok(format!("entered {path} from {before}"))
    })
}

fn unshare(flags: i32) -> Verdict {
    if flags == 0 {
        return impossible("no flags");
    }
    sys::call(libc::SYS_unshare, &mut [Arg::Num(i64::from(flags))])?;
    let capabilities = status("self", "CapEff").unwrap_or_default();
    Ok(format!("made it; capabilities there: {capabilities}"))
}
