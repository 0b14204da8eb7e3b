//! `denizen-escape`: attempts to get out of a session, each a small program of its own.
//!
//! A test of an isolation runs every attempt inside a session and looks at how it ends.
//! Run unconfined by root, most of them succeed and do no harm (`control` in the list), so
//! that an attempt which could never succeed anywhere is noticed. It must never restart
//! the machine, load code into the kernel, set a clock, leave anything behind, or speak to
//! a network address other than loopback.
//!
//! ```text
//! denizen-escape list                     one JSON object a line
//! denizen-escape run NAME [--FACT VALUE]… 0 escaped, 1 held, 2 cannot be tried here
//! denizen-escape stage DIR [--system]     the host's side, see `stage`
//! ```
//!
//! What an attempt cannot know from inside (the number of a process on the host, the path
//! of a secret) are *facts*, see `facts`. `stage` makes them and prints them.

mod attempt;
mod devices;
mod environment;
mod facts;
mod files;
mod ipc;
mod kernel;
mod mounts;
mod namespaces;
mod network;
mod privileges;
mod processes;
mod resources;
mod stage;
#[allow(unsafe_code, reason = "system calls; see there")]
mod sys;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use attempt::{Attempt, No};
use facts::Facts;

/// All attempts, by group.
const GROUPS: &[(&str, &[Attempt])] = &[
    ("files", files::ATTEMPTS),
    ("processes", processes::ATTEMPTS),
    ("environment", environment::ATTEMPTS),
    ("namespaces", namespaces::ATTEMPTS),
    ("mounts", mounts::ATTEMPTS),
    ("kernel", kernel::ATTEMPTS),
    #[cfg(target_arch = "x86_64")]
    ("x86", x86::ATTEMPTS),
    ("network", network::ATTEMPTS),
    ("ipc", ipc::ATTEMPTS),
    ("devices", devices::ATTEMPTS),
    ("privileges", privileges::ATTEMPTS),
    ("resources", resources::ATTEMPTS),
];

fn main() -> ExitCode {
    // Looked at before anything else is opened.
    let inherited = sys::open_descriptors();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["list"] => list(),
        ["run", name, ..] => run(name, arguments.get(2..).unwrap_or_default(), inherited),
        ["stage", folder] => stage(folder, false),
        ["stage", folder, "--system"] => stage(folder, true),
        ["probe"] => privileges::probe(),
        _ => {
            eprintln!(
                "usage: denizen-escape list | run NAME [--FACT VALUE]… | stage DIR [--system]"
            );
            ExitCode::from(2)
        }
    }
}

fn list() -> ExitCode {
    let mut out = std::io::stdout().lock();
    for (group, attempts) in GROUPS {
        for attempt in *attempts {
            if writeln!(out, "{}", attempt.json(group)).is_err() {
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn run(name: &str, arguments: &[String], inherited: Vec<i32>) -> ExitCode {
    let mut all = GROUPS.iter().flat_map(|(_, attempts)| attempts.iter());
    let Some(attempt) = all.find(|attempt| attempt.name == name) else {
        eprintln!("no attempt is called `{name}`; `denizen-escape list` names them");
        return ExitCode::from(2);
    };
    let facts = match Facts::new(arguments, inherited) {
        Ok(facts) => facts,
        Err(wrong) => {
            eprintln!("{wrong}");
            return ExitCode::from(2);
        }
    };
    // In a process of its own: a filter may kill the caller rather than refuse the call.
    let ending = sys::apart(|| match (attempt.run)(&facts) {
        Ok(got) => tell(0, "ESCAPED", name, &got),
        Err(No::Held(why)) => tell(1, "held", name, &why),
        Err(No::Impossible(why)) => tell(2, "impossible", name, &why),
    });
    match ending {
        Ok(sys::Ending::Exit(code)) => ExitCode::from(code),
        Ok(sys::Ending::Signal(signal)) => {
            ExitCode::from(tell(1, "held", name, &format!("killed by signal {signal}")))
        }
        Err(error) => ExitCode::from(tell(2, "impossible", name, &format!("fork: {error}"))),
    }
}

fn tell(code: u8, word: &str, name: &str, text: &str) -> u8 {
    // Standard output may be what the attempt broke; the exit code is what counts.
    let _ = writeln!(std::io::stdout(), "{word}: {name}: {text}");
    code
}

fn stage(folder: &str, system: bool) -> ExitCode {
    match stage::run(Path::new(folder), system) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the stage cannot be set up in {folder}: {error}");
            ExitCode::from(2)
        }
    }
}
