//! Attempts to hold, keep or gain privileges.

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use rustix::fs::XattrFlags;

use crate::attempt::{Attempt, Doing, No, Scratch, Verdict, any_of, held, impossible, status};
use crate::facts::Facts;
use crate::sys::{self, Arg};

/// A user without privileges.
const NOBODY: u32 = 65534;

/// What a package manager needs in a user namespace: to give files away and read all, to
/// become other users and signal them, to bind low ports, to change the root, to write to
/// the audit log, and to set capabilities of files.
const USUAL: [u32; 13] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 18, 29, 31];

pub const ATTEMPTS: &[Attempt] = &[
    Attempt::new(
        "new-privileges",
        "no_new_privs is not set, so programs may give privileges.",
        |_| match status("self", "NoNewPrivs")?.as_str() {
            "0" => Ok("it is not set".into()),
            _ => held("it is set"),
        },
    )
    .surface()
    .control(),
    Attempt::new("no-filter", "No filter looks at system calls.", |_| {
        match status("self", "Seccomp")?.as_str() {
            "0" => Ok("there is none".into()),
            mode => held(format!("mode {mode}")),
        }
    })
    .surface()
    .control(),
    Attempt::new("capabilities", "A command has capabilities it need not have.", |facts| {
        capabilities(facts, &["CapEff", "CapPrm"])
    })
    .surface()
    .control(),
    Attempt::new("capabilities-bounding", "A command could still gain capabilities.", |facts| {
        capabilities(facts, &["CapBnd", "CapInh", "CapAmb"])
    })
    .surface()
    .control(),
    Attempt::new(
        "setuid-copy",
        "A copy of a program with the setuid bit makes its user root.",
        |_| {
            let scratch = Scratch::new()?;
            let program = copy_of_self(&scratch)?;
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o4755))
                .doing("chmod")?;
            let (user, _) = probe_as_nobody(&program)?;
            if user == 0 { Ok("it ran as root".into()) } else { held(format!("it ran as {user}")) }
        },
    )
    .surface()
    .control()
    .needs("test: a folder for temporary files that is not mounted nosuid"),
    Attempt::new("setgid-copy", "A copy of a program with the setgid bit has its group.", |_| {
        let scratch = Scratch::new()?;
        let program = copy_of_self(&scratch)?;
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o2755))
            .doing("chmod")?;
        let output = run_as_nobody(&program)?;
        if output.contains("group 0\n") { Ok("it ran as group 0".into()) } else { held(output) }
    })
    .surface()
    .control()
    .needs("test: a folder for temporary files that is not mounted nosuid"),
    Attempt::new(
        "file-capabilities",
        "Capabilities put on a file are had by whoever runs it.",
        |_| {
            let scratch = Scratch::new()?;
            let program = copy_of_self(&scratch)?;
            // Version 2, effective; the low word permits chown and SYS_ADMIN.
            let value = sys::halves(&[0x0200_0001, 0x0020_0001, 0, 0, 0]);
            let name = "security.capability";
            rustix::fs::setxattr(&program, name, &value, XattrFlags::empty()).doing("setxattr")?;
            let (_, effective) = probe_as_nobody(&program)?;
            if effective == 0 { held("it had none") } else { Ok(format!("it had {effective:x}")) }
        },
    )
    .surface()
    .control()
    .needs("test: a folder for temporary files that is not mounted nosuid"),
    Attempt::new("setuid-programs", "A setuid program of the host makes its user root.", |_| {
        let programs = ["/usr/bin/su", "/bin/su", "/usr/bin/passwd", "/usr/bin/newgrp"];
        any_of(programs, |program| {
            let mode = std::fs::metadata(program).doing(program)?.permissions().mode();
            if mode & 0o4000 == 0 {
                return held(format!("{program} is not setuid"));
            }
            // It waits for a password on its standard input; meanwhile one can look at it.
            let mut child = Command::new(program)
                .uid(NOBODY)
                .gid(NOBODY)
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .doing(program)?;
            let mut seen = Err(No::Held(format!("{program} ended at once")));
            for _ in 0..50 {
                let users = status(&child.id().to_string(), "Uid");
                if users.as_ref().is_ok_and(|line| line.split_whitespace().nth(1) == Some("0")) {
                    seen = Ok(format!("{program} ran as root"));
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(4));
            }
            // Root may kill it whoever it is; elsewhere the end of its input ends it.
            let _ = child.kill();
            drop(child.stdin.take());
            let _ = child.wait();
            seen
        })
    })
    .control()
    .needs("test: /usr/bin/su or the like is there"),
    Attempt::new(
        "trusted-attribute",
        "Extended attributes of the kernel's own kind can be set.",
        |_| {
            let scratch = Scratch::new()?;
            let file = scratch.file("file", b"")?;
            let name = "trusted.overlay.opaque";
            rustix::fs::setxattr(&file, name, b"y", XattrFlags::empty())?;
            Ok("set one".into())
        },
    )
    .control(),
    Attempt::new(
        "security-attribute",
        "Extended attributes of security modules can be set.",
        |_| {
            let scratch = Scratch::new()?;
            let file = scratch.file("file", b"")?;
            let name = "security.denizen_escape";
            rustix::fs::setxattr(&file, name, b"y", XattrFlags::empty())?;
            Ok("set one".into())
        },
    )
    .surface()
    .control(),
    Attempt::new(
        "immutable-flag",
        "A file can be made immutable, so that it cannot be removed.",
        |_| {
            const GET: i64 = 0x8008_6601;
            const SET: i64 = 0x4008_6602;
            const IMMUTABLE: u32 = 0x10;
            let scratch = Scratch::new()?;
            let path = scratch.file("file", b"")?;
            let file = std::fs::File::open(&path).preparing("the file")?;
            let fd = i64::from(file.as_raw_fd());
            let mut flags = [0; 8];
            let get = &mut [Arg::Num(fd), Arg::Num(GET), Arg::Out(&mut flags)];
            sys::call(libc::SYS_ioctl, get).preparing("the file's flags")?;
            let before = flags;
            if let Some(low) = flags.first_chunk_mut() {
                *low = (u32::from_ne_bytes(*low) | IMMUTABLE).to_ne_bytes();
            }
            let set = &mut [Arg::Num(fd), Arg::Num(SET), Arg::In(&flags)];
            sys::call(libc::SYS_ioctl, set).doing("setting the flag")?;
            let back = &mut [Arg::Num(fd), Arg::Num(SET), Arg::In(&before)];
            sys::call(libc::SYS_ioctl, back).preparing("taking it off again")?;
            Ok("it can".into())
        },
    )
    .control()
    .needs("kernel: a file system with such flags"),
    Attempt::new("host-groups", "Commands keep groups of the user who started denizen.", |_| {
        let groups = status("self", "Groups")?;
        // How a group shows that the user namespace does not map.
        if groups.split_whitespace().any(|group| group == "65534") {
            return Ok(format!("groups {groups}"));
        }
        held(format!("groups {groups}"))
    }),
    Attempt::new("setgroups", "A group can be dropped that files are closed to.", |_| {
        // With one user mapped, dropping a group could open what is closed to it.
        sys::call(libc::SYS_setgroups, &mut [Arg::Num(0), Arg::Num(0)])?;
        if status("self", "Groups")?.is_empty() {
            let map = std::fs::read_to_string("/proc/self/gid_map").unwrap_or_default();
            if map.lines().all(|line| line.split_whitespace().nth(2) == Some("1")) {
                return Ok("with only one group mapped".into());
            }
        }
        held("the groups dropped were all mapped ones")
    }),
    Attempt::new(
        "unmapped-owner",
        "A file can be given to a user outside the session's range.",
        |_| {
            let scratch = Scratch::new()?;
            let file = scratch.file("file", b"")?;
            std::os::unix::fs::chown(&file, Some(2_000_000_000), None)?;
            Ok("gave it to user 2000000000".into())
        },
    )
    .control(),
    Attempt::new(
        "become-unmapped",
        "A command can become a user outside the session's range.",
        |_| {
            sys::call(libc::SYS_setuid, &mut [Arg::Num(2_000_000_000)])?;
            Ok("became user 2000000000".into())
        },
    )
    .control(),
    Attempt::new("secure-bits", "The rules for root's capabilities can be changed.", |_| {
        const SET_SECUREBITS: i64 = 28;
        const NO_SETUID_FIXUP: i64 = 4;
        let arguments = &mut [Arg::Num(SET_SECUREBITS), Arg::Num(NO_SETUID_FIXUP)];
        sys::call(libc::SYS_prctl, arguments)?;
        held("allowed, but it gives nothing that was not there")
    }),
];

/// The capabilities in some of the sets that are beyond the usual.
fn capabilities(facts: &Facts, sets: &[&str]) -> Verdict {
    let allowed = |number: &u32| {
        USUAL.contains(number) || facts.all("allow-cap").any(|one| one.parse() == Ok(*number))
    };
    any_of(sets, |set| {
        let text = status("self", set)?;
        let bits = u64::from_str_radix(&text, 16).preparing(set)?;
        let more: Vec<String> = (0..64)
            .filter(|number| bits >> number & 1 == 1 && !allowed(number))
            .map(|number| number.to_string())
            .collect();
        if more.is_empty() {
            return held(format!("{set} is {text}"));
        }
        Ok(format!("{set} has number {}", more.join(", ")))
    })
}

/// A copy of this program that everybody may run, owned by who we are.
fn copy_of_self(scratch: &Scratch) -> Result<PathBuf, No> {
    let program = scratch.join("program");
    std::fs::copy("/proc/self/exe", &program).preparing("a copy of this program")?;
    for path in [scratch.path(), &program] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
            .preparing("its mode")?;
    }
    Ok(program)
}

fn run_as_nobody(program: &Path) -> Result<String, No> {
    let output = Command::new(program)
        .arg("probe")
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .doing("running it as another user")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The user that a program ran as and the capabilities it had, when started by nobody.
fn probe_as_nobody(program: &Path) -> Result<(u32, u64), No> {
    let output = run_as_nobody(program)?;
    let word = |key: &str| output.lines().find_map(|line| line.strip_prefix(key));
    let user = word("user ").and_then(|text| text.parse().ok());
    let effective = word("effective ").and_then(|text| u64::from_str_radix(text, 16).ok());
    match (user, effective) {
        (Some(user), Some(effective)) => Ok((user, effective)),
        _ => impossible(format!("the copy said: {output}")),
    }
}

/// Says who this program runs as.
pub fn probe() -> ExitCode {
    let user = rustix::process::geteuid().as_raw();
    let group = rustix::process::getegid().as_raw();
    let effective = status("self", "CapEff").unwrap_or_default();
    println!("user {user}\ngroup {group}\neffective {effective}");
    ExitCode::SUCCESS
}
