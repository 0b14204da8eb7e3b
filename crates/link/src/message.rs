//! What the two relays say to each other. This module only lays out and takes apart bytes.
//!
//! On `/init`, a packet is `length u32` and as many bytes: a count of entries, u8, the entries,
//! and a packet of denizen-init's. To the guest, an entry is a descriptor that goes with the
//! packet: `stream u32, kind u8, columns u16, rows u16`. Entries of one stream are copies of one
//! descriptor. To the host, an entry says how much of an output (u64) was written before the
//! command's end: `stream u32, offset u64`. If that is not known yet, the offset is `LATER` and
//! follows in an entry of a packet with nothing but entries.
//!
//! denizen-init's packets are those of its table, with these differences: the strings of a
//! spawn are always in the packet; a terminal is only made by a spawn; the entry of a `connect`
//! is the connection; the entries of a `drain` are to be closed; and `size` is the relays' own.

use serde::{Deserialize, Serialize};

pub(crate) const SPAWN: u8 = 1;
pub(crate) const SIGNAL: u8 = 2;
pub(crate) const KILL: u8 = 3;
pub(crate) const DRAIN: u8 = 6;
pub(crate) const TERMINAL: u8 = 8;
pub(crate) const CONNECT: u8 = 9;
pub(crate) const KEEP: u8 = 10;
/// A command's terminal has another size: columns u16, rows u16.
pub(crate) const SIZE: u8 = 11;

/// Of spawn: stdin becomes the controlling terminal.
pub(crate) const CONTROLLING: u8 = 1;
/// Of spawn: the strings are in a file.
pub(crate) const IN_FILE: u8 = 2;
/// Of kill: everything, and go on serving.
pub(crate) const EVERYTHING: u8 = 2;

pub(crate) const FAILED: u8 = 2;
pub(crate) const EXITED: u8 = 3;
pub(crate) const TREE_GONE: u8 = 4;
pub(crate) const ALL_GONE: u8 = 5;
pub(crate) const LISTING: u8 = 6;
pub(crate) const GIVEN: u8 = 9;
/// The first event: the last number that something was asked for by, and the way of speaking.
pub(crate) const FOUND: u8 = 10;

/// More than any packet of init.
pub(crate) const EVENT: usize = 32 * 1024;
/// The most bytes of a spawn's strings.
pub(crate) const STRINGS: usize = 8 * 1024 * 1024;
/// Longer strings go to init in a file.
pub(crate) const INLINE: usize = 16 * 1024;
/// The longest packet to the guest, with its entries.
pub(crate) const TO_GUEST: usize = STRINGS + 64 * 1024;
/// The longest packet to the host, with its entries.
pub(crate) const TO_HOST: usize = EVENT + 1 + 12 * u8::MAX as usize;
/// Of an offset: it is told later.
pub(crate) const LATER: u64 = u64::MAX;

/// What a descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `/dev/null`; it has no stream.
    Null,
    /// A pipe that the command reads.
    Input,
    /// A pipe that it writes.
    Output,
    Socket,
    Terminal,
}

impl Kind {
    fn number(self) -> u8 {
        match self {
            Self::Null => 0,
            Self::Input => 1,
            Self::Output => 2,
            Self::Socket => 3,
            Self::Terminal => 4,
        }
    }

    fn of(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Null,
            1 => Self::Input,
            2 => Self::Output,
            3 => Self::Socket,
            4 => Self::Terminal,
            _ => return None,
        })
    }
}

/// A descriptor that goes with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) stream: u32,
    pub(crate) kind: Kind,
    pub(crate) columns: u16,
    pub(crate) rows: u16,
}

/// How much of an output was written before its command's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) stream: u32,
    pub(crate) offset: u64,
}

pub(crate) fn header(kind: u8, flags: u8, id: u32) -> Vec<u8> {
    let mut packet = vec![kind, flags, 0, 0];
    packet.extend(id.to_le_bytes());
    packet
}

/// A packet that has a number.
pub(crate) fn with_number(kind: u8, id: u32, number: u32) -> Vec<u8> {
    let mut packet = header(kind, 0, id);
    packet.extend(number.to_le_bytes());
    packet
}

/// The kind, flags and id of a packet.
pub(crate) fn head(packet: &[u8]) -> Option<(u8, u8, u32)> {
    let ([kind, flags, _, _, id @ ..], _) = packet.split_first_chunk::<8>()?;
    Some((*kind, *flags, u32::from_le_bytes(*id)))
}

/// The number behind the head.
pub(crate) fn number(packet: &[u8]) -> Option<u32> {
    Some(u32::from_le_bytes(*packet.get(8..)?.first_chunk()?))
}

pub(crate) fn to_guest(descriptors: &[Descriptor], packet: &[u8]) -> Vec<u8> {
    wrap(descriptors.len(), packet, |out| {
        for descriptor in descriptors {
            out.extend(descriptor.stream.to_le_bytes());
            out.push(descriptor.kind.number());
            out.extend(descriptor.columns.to_le_bytes());
            out.extend(descriptor.rows.to_le_bytes());
        }
    })
}

pub(crate) fn to_host(marks: &[Mark], packet: &[u8]) -> Vec<u8> {
    wrap(marks.len(), packet, |out| {
        for mark in marks {
            out.extend(mark.stream.to_le_bytes());
            out.extend(mark.offset.to_le_bytes());
        }
    })
}

fn wrap(entries: usize, packet: &[u8], put: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = vec![0; 4];
    out.push(u8::try_from(entries).unwrap_or(u8::MAX));
    put(&mut out);
    out.extend_from_slice(packet);
    let length = u32::try_from(out.len() - 4).unwrap_or(u32::MAX).to_le_bytes();
    if let Some(place) = out.first_chunk_mut() {
        *place = length;
    }
    out
}

pub(crate) fn at_guest(body: &[u8]) -> Option<(Vec<Descriptor>, &[u8])> {
    unwrap(body, |[a, b, c, d, kind, e, f, g, h]: [u8; 9]| {
        Some(Descriptor {
            stream: u32::from_le_bytes([a, b, c, d]),
            kind: Kind::of(kind)?,
            columns: u16::from_le_bytes([e, f]),
            rows: u16::from_le_bytes([g, h]),
        })
    })
}

pub(crate) fn at_host(body: &[u8]) -> Option<(Vec<Mark>, &[u8])> {
    unwrap(body, |entry: [u8; 12]| {
        let (stream, offset) = entry.split_first_chunk()?;
        Some(Mark {
            stream: u32::from_le_bytes(*stream),
            offset: u64::from_le_bytes(*offset.first_chunk()?),
        })
    })
}

fn unwrap<const SIZE: usize, T>(
    body: &[u8],
    entry: impl Fn([u8; SIZE]) -> Option<T>,
) -> Option<(Vec<T>, &[u8])> {
    let (&count, mut rest) = body.split_first()?;
    let mut entries = Vec::with_capacity(count.into());
    for _ in 0..count {
        let (bytes, more) = rest.split_first_chunk()?;
        entries.push(entry(*bytes)?);
        rest = more;
    }
    Some((entries, rest))
}

/// What a guest is told when it goes on after a rest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Wake {
    /// The time.
    pub clock: Clock,
    /// 64 random bytes, as 128 hexadecimal digits.
    pub entropy: String,
    /// Who it is from now on, if it is not the one that went to rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fresh: Option<Fresh>,
}

/// A point of `CLOCK_REALTIME`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Clock {
    /// Seconds since 1970.
    pub seconds: i64,
    /// And nanoseconds.
    pub nanoseconds: u32,
}

/// What tells one guest from another.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fresh {
    /// Its name.
    pub hostname: String,
    /// The content of `/etc/machine-id` (machine-id(5)), without the end of line.
    pub machine_id: String,
}

/// What a guest could not do of what it was asked for; the other steps are done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steps {
    /// Each step that failed, with the reason.
    pub failed: Vec<(String, String)>,
}
