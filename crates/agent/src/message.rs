//! The packets between the owner and `denizen-init`; the table that both sides keep to is
//! at the top of that program's source. This module only lays out and takes apart bytes.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::init::Process;
use crate::{Error, Exit, Result, Scope};

/// Strings up to this size travel in the packet, others in a file. Well under the
/// packet size that init takes and any sensible `net.core.wmem_default`.
pub(crate) const INLINE: usize = 16 * 1024;

const SPAWN: u8 = 1;
const SIGNAL: u8 = 2;
const KILL: u8 = 3;
const LIST: u8 = 4;
const END: u8 = 5;
const DRAIN: u8 = 6;
const ENTER: u8 = 7;
const TERMINAL: u8 = 8;
const CONNECT: u8 = 9;
const KEEP: u8 = 10;
const SIZE: u8 = 11;
/// The bytes of one process in a listing.
const RECORD: usize = 28;

fn header(kind: u8, flags: u8, id: u32) -> Vec<u8> {
    let mut packet = vec![kind, flags, 0, 0];
    packet.extend(id.to_le_bytes());
    packet
}

/// A spawn request without its strings.
pub(crate) fn spawn(
    id: u32,
    [terminal, in_file, as_user]: [bool; 3],
    argc: u32,
    envc: u32,
) -> Vec<u8> {
    let flags = u8::from(terminal) | u8::from(in_file) << 1 | u8::from(as_user) << 2;
    let mut packet = header(SPAWN, flags, id);
    packet.extend(argc.to_le_bytes());
    packet.extend(envc.to_le_bytes());
    packet
}

/// The strings of a spawn request, checked: no zero bytes, variables with proper names.
pub(crate) fn strings(
    user: Option<&str>,
    cwd: &Path,
    argv: &[OsString],
    env: &[(OsString, OsString)],
) -> Result<Vec<u8>> {
    let size = user.map_or(0, |user| user.len() + 1)
        + cwd.as_os_str().len()
        + argv.iter().map(|arg| arg.len() + 1).sum::<usize>()
        + env.iter().map(|(name, value)| name.len() + value.len() + 2).sum::<usize>();
    let mut bytes = Vec::with_capacity(size + 1);
    let mut put = |what, string: &OsStr, end: u8| {
        if string.as_bytes().contains(&0) {
            let value = string.to_owned();
            return Err(Error::BadString { what, value });
        }
        bytes.extend_from_slice(string.as_bytes());
        bytes.push(end);
        Ok(())
    };
    if let Some(user) = user {
        put("the user", user.as_ref(), 0)?;
    }
    put("the working directory", cwd.as_os_str(), 0)?;
    for arg in argv {
        put("an argument", arg, 0)?;
    }
    for (name, value) in env {
        if name.is_empty() || name.as_bytes().contains(&b'=') {
            return Err(Error::BadString { what: "a variable's name", value: name.clone() });
        }
        put("a variable's name", name, b'=')?;
        put("a variable's value", value, 0)?;
    }
    Ok(bytes)
}

pub(crate) fn signal(id: u32, signal: u32, scope: Scope) -> Vec<u8> {
    let scope = match scope {
        Scope::Leader => 0,
        Scope::Group => 1,
        Scope::Tree => 2,
    };
    let mut packet = header(SIGNAL, scope, id);
    packet.extend(signal.to_le_bytes());
    packet
}

/// Kill one tree, or everything with id 0.
pub(crate) fn kill(id: u32, announce: bool) -> Vec<u8> {
    header(KILL, u8::from(announce), id)
}

/// Kill everything and go on serving; the answer is as for a tree of this id.
pub(crate) fn clear(id: u32) -> Vec<u8> {
    header(KILL, 1 | 2, id)
}

pub(crate) fn list(id: u32) -> Vec<u8> {
    header(LIST, 0, id)
}

pub(crate) fn end() -> Vec<u8> {
    header(END, 0, 0)
}

pub(crate) fn drain() -> Vec<u8> {
    header(DRAIN, 0, 0)
}

/// Become the first process of a sandbox; the plan goes with it. Go on for so many milliseconds
/// without an owner.
pub(crate) fn enter(linger: u32) -> Vec<u8> {
    let mut packet = header(ENTER, 0, 0);
    packet.extend(linger.to_le_bytes());
    packet
}

/// Let a command go on without its owner; its outputs go with it.
pub(crate) fn keep(id: u32) -> Vec<u8> {
    header(KEEP, 0, id)
}

/// Set the size of a command's terminal; for an init in a machine only.
pub(crate) fn size(id: u32, columns: u16, rows: u16) -> Vec<u8> {
    let mut packet = header(SIZE, 0, id);
    packet.extend(columns.to_le_bytes());
    packet.extend(rows.to_le_bytes());
    packet
}

/// Make a terminal.
pub(crate) fn terminal(id: u32) -> Vec<u8> {
    header(TERMINAL, 0, id)
}

/// Connect to a port.
pub(crate) fn connect(id: u32, port: u16) -> Vec<u8> {
    let mut packet = header(CONNECT, 0, id);
    packet.extend(u32::from(port).to_le_bytes());
    packet
}

/// How far a start came before it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Start,
    Cwd,
    Program,
    Interpreter,
    User,
}

/// What init tells.
#[derive(Debug)]
pub(crate) enum Event {
    Spawned {
        id: u32,
        pid: u32,
    },
    Failed {
        id: u32,
        stage: Stage,
        errno: i32,
    },
    Exited {
        id: u32,
        exit: Exit,
    },
    TreeGone {
        id: u32,
        survivors: u32,
    },
    AllGone {
        survivors: u32,
    },
    Listing {
        id: u32,
        part: Vec<Process>,
        more: bool,
    },
    Entered,
    Refused {
        errno: i32,
        step: String,
    },
    /// What was asked for comes along, unless there is an errno.
    Descriptor {
        id: u32,
        errno: i32,
    },
    /// It has been found by a new owner.
    Found {
        last_id: u32,
        version: u32,
    },
}

/// Takes an event apart; none if it is not one.
pub(crate) fn event(packet: &[u8]) -> Option<Event> {
    let number = |at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(packet.get(at..at + 4)?.try_into().ok()?))
    };
    let (kind, flags, id) = (*packet.first()?, *packet.get(1)?, number(4)?);
    let signed = |at| number(at).and_then(|value| i32::try_from(value).ok());
    Some(match kind {
        1 => Event::Spawned { id, pid: number(8)? },
        2 => Event::Failed {
            id,
            stage: match flags {
                1 => Stage::Cwd,
                2 => Stage::Program,
                3 => Stage::Interpreter,
                4 => Stage::User,
                _ => Stage::Start,
            },
            errno: signed(8)?,
        },
        3 => Event::Exited {
            id,
            exit: if flags == 0 { Exit::Code(signed(8)?) } else { Exit::Signal(signed(8)?) },
        },
        4 => Event::TreeGone { id, survivors: number(8)? },
        5 => Event::AllGone { survivors: number(8)? },
        6 => {
            let records = packet.get(8..)?.chunks_exact(RECORD);
            Event::Listing { id, part: records.filter_map(process).collect(), more: flags & 1 != 0 }
        }
        7 => Event::Entered,
        8 => Event::Refused {
            errno: signed(8)?,
            step: String::from_utf8_lossy(packet.get(12..)?).into_owned(),
        },
        9 => Event::Descriptor { id, errno: signed(8)? },
        10 => Event::Found { last_id: id, version: number(8)? },
        _ => return None,
    })
}

fn process(record: &[u8]) -> Option<Process> {
    let number = |at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(record.get(at..at + 4)?.try_into().ok()?))
    };
    let name = record.get(12..RECORD)?.split(|byte| *byte == 0).next()?;
    Some(Process {
        pid: number(0)?,
        parent: number(4)?,
        command: Some(number(8)?).filter(|id| *id != 0),
        name: String::from_utf8_lossy(name).into_owned(),
    })
}
