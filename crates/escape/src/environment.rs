//! Attempts to learn from the environment what belongs to the host.

use std::path::Path;

use crate::attempt::{Attempt, Doing, Verdict, any_of, held, holds, process_numbers, read};
use crate::facts::Facts;
use crate::processes::FIRST;

/// What a command needs. `LC_*` and `ESCAPE_*` are let pass too.
const USUAL: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "TERM",
    "COLORTERM",
    "LANG",
    "LANGUAGE",
    "TZ",
    "PWD",
    "OLDPWD",
    "HOSTNAME",
    "SHLVL",
    "TMPDIR",
    "COLUMNS",
    "LINES",
    "_",
];

pub const ATTEMPTS: &[Attempt] = &[
    Attempt::new(
        "environment-denizen",
        "A command sees settings of the daemon, such as its key.",
        |facts| {
            variables(facts, |name, value| {
                let allowed = facts.all("allow-env").any(|allowed| allowed == name);
                (name.starts_with("DENIZEN_") && !allowed) || holds(value, facts.secret())
            })
        },
    )
    .control()
    .needs("test: the variables that the stage prints as `env`"),
    Attempt::new(
        "environment-more",
        "A command sees variables of the host beyond the usual ones.",
        |facts| {
            variables(facts, |name, _| {
                let allowed = facts.all("allow-env").any(|allowed| allowed == name);
                let ours = name.starts_with("LC_") || name.starts_with("ESCAPE_");
                !(allowed || ours || USUAL.contains(&name))
            })
        },
    )
    .leak()
    .control()
    .needs("test: the variables that the stage prints as `env`"),
    Attempt::new(
        "environment-of-others",
        "The secret, or the daemon's settings, are in the environment of some process.",
        |facts| {
            let me = std::process::id();
            let parent = std::os::unix::process::parent_id();
            let others = process_numbers().into_iter().map(i32::cast_unsigned);
            any_of(others.filter(|pid| *pid != me && *pid != parent), |pid| {
                let path = format!("/proc/{pid}/environ");
                let bytes = read(Path::new(&path)).doing(&path)?;
                if holds(&bytes, facts.secret()) || holds(&bytes, "DENIZEN_API_KEY=") {
                    return Ok(format!("{path} has it"));
                }
                held(format!("{path} has nothing of it"))
            })
        },
    )
    .control()
    .needs("test: the variables that the stage prints as `env`, given to a process beside it"),
    Attempt::new(
        "init-environment",
        "The environment that the session's first process was started with can be read.",
        |_| {
            let bytes = read(Path::new("/proc/1/environ")).doing("/proc/1/environ")?;
            let names = bytes.split(|byte| *byte == 0).filter(|part| !part.is_empty()).count();
            if names == 0 { held("it is empty") } else { Ok(format!("{names} variables")) }
        },
    )
    .leak()
    .control()
    .needs(FIRST),
    Attempt::new(
        "init-auxv",
        "The auxiliary vector of the session's first process tells where it is in memory.",
        |_| match read(Path::new("/proc/1/auxv")).doing("/proc/1/auxv")?.len() {
            0 => held("it is empty"),
            count => Ok(format!("{count} bytes")),
        },
    )
    .leak()
    .control()
    .needs(FIRST),
    Attempt::new(
        "init-command-line",
        "The command line of the session's first process holds a path of the volume root.",
        |facts| {
            let root = facts.text("volume-root")?;
            let bytes = read(Path::new("/proc/1/cmdline")).doing("/proc/1/cmdline")?;
            if holds(&bytes, root) || holds(&bytes, facts.secret()) {
                return Ok(String::from_utf8_lossy(&bytes).replace('\0', " "));
            }
            held("nothing of it")
        },
    )
    .leak(),
];

/// The variables of our own for which `wrong` holds.
fn variables(_: &Facts, wrong: impl Fn(&str, &[u8]) -> bool) -> Verdict {
    use std::os::unix::ffi::OsStrExt;
    let found: Vec<String> = std::env::vars_os()
        .filter_map(|(name, value)| {
            let name = name.to_string_lossy().into_owned();
            wrong(&name, value.as_bytes()).then_some(name)
        })
        .collect();
    if found.is_empty() { held("there are none") } else { Ok(found.join(", ")) }
}
