//! Entries of a tree as the repository's format has them (restic's design document, "Trees and
//! Data"), and back. What comes back may have been written by anybody.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use denizen_archive::tree::{Attributes, Kind, Member, Time};
use rustic_core::jiff::Timestamp;
use rustic_core::repofile::{Metadata, Node, NodeType};
use rustix::fs::Stat;

/// Go's `os.FileMode`, which is what the format has: the kind and the special bits are elsewhere
/// than in `st_mode`.
const SPECIAL: [(u32, u32); 3] = [(0o4000, 1 << 23), (0o2000, 1 << 22), (0o1000, 1 << 20)];

pub fn os(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

/// The steps of a path below the root.
pub fn steps(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&b| b == b'/').filter(|step| !step.is_empty() && *step != b".")
}

/// An entry with what its file says; for regular files only, as the rest is not read again.
pub fn of(member: &Member, stat: Option<&Stat>) -> Node {
    let (kind, kind_bits) = match member.kind {
        Kind::Directory => (NodeType::Dir, 1 << 31),
        Kind::Symlink => (NodeType::from_link(Path::new(os(&member.link))), 1 << 27),
        Kind::Fifo => (NodeType::Fifo, 1 << 25),
        Kind::Whiteout => (NodeType::Chardev { device: 0 }, (1 << 26) | (1 << 21)),
        Kind::File | Kind::HardLink => (NodeType::File, 0),
    };
    let special = SPECIAL.iter().filter(|(unix, _)| member.mode & unix != 0);
    let mode = special.fold((member.mode & 0o777) | kind_bits, |mode, (_, go)| mode | go);
    let time = |seconds, nanoseconds: i64| {
        Timestamp::new(seconds, i32::try_from(nanoseconds).unwrap_or(0)).ok()
    };
    let id = |id: u64| u32::try_from(id).ok();
    // How many names it has outside of what is backed up says nothing.
    let links = u64::from(member.kind != Kind::Directory) + u64::from(member.same.is_some());
    let meta = Metadata {
        mode: Some(mode),
        mtime: time(member.mtime.seconds, member.mtime.nanoseconds.into()),
        ctime: stat.and_then(|stat| time(stat.st_ctime, i64::try_from(stat.st_ctime_nsec).ok()?)),
        uid: id(member.uid),
        gid: id(member.gid),
        inode: stat.map(|stat| stat.st_ino).or(member.same).unwrap_or(0),
        // Restorers know the names of one file by both numbers. Which disk it was says nothing.
        device_id: u64::from(links > 1),
        size: member.size,
        links,
        extended_attributes: Vec::new(),
        ..Metadata::default()
    };
    let name = steps(&member.path).last().unwrap_or_default();
    Node::new_node(os(name), kind, with_attributes(meta, &member.xattrs))
}

/// The engine keeps the type of an attribute to itself, but reads it.
fn with_attributes(meta: Metadata, attributes: &Attributes) -> Metadata {
    if attributes.is_empty() {
        return meta;
    }
    let names = attributes
        .iter()
        .map(|(name, _)| serde_json::json!({ "name": escape(name), "value": null }));
    let names = serde_json::json!({ "inode": 0, "device_id": 0, "size": 0, "links": 0,
        "extended_attributes": names.collect::<Vec<_>>() });
    let Ok(mut read) = serde_json::from_value::<Metadata>(names) else { return meta };
    for (kept, (_, value)) in read.extended_attributes.iter_mut().zip(attributes) {
        kept.value = Some(value.clone());
    }
    Metadata { extended_attributes: read.extended_attributes, ..meta }
}

/// Names are text in the format: what is none is written as `%` and two digits.
fn escape(name: &[u8]) -> String {
    let mut text = String::with_capacity(name.len());
    for piece in name.utf8_chunks() {
        text.push_str(&piece.valid().replace('%', "%25"));
        for byte in piece.invalid() {
            text.push_str(&format!("%{byte:02x}"));
        }
    }
    text
}

fn unescape(name: &str) -> Vec<u8> {
    let bytes = name.as_bytes();
    let (mut plain, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        let digits = (bytes[at] == b'%').then(|| name.get(at + 1..at + 3)).flatten();
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        plain.push(byte.unwrap_or(bytes[at]));
        at += if byte.is_some() { 3 } else { 1 };
    }
    plain
}

/// What is wrong with an entry of a backup.
pub type Refused = &'static str;

/// The entry at `path`, which ends in the node's own name; nothing for what is never restored.
pub fn back(path: Vec<u8>, node: &Node) -> Result<Option<Member>, Refused> {
    let (kind, link) = match &node.node_type {
        NodeType::Dir => (Kind::Directory, Vec::new()),
        NodeType::File => (Kind::File, Vec::new()),
        NodeType::Symlink { .. } => {
            (Kind::Symlink, node.node_type.to_link().as_os_str().as_bytes().to_vec())
        }
        NodeType::Fifo => (Kind::Fifo, Vec::new()),
        NodeType::Chardev { device: 0 } => (Kind::Whiteout, Vec::new()),
        NodeType::Chardev { .. } | NodeType::Dev { .. } => return Err("is a device"),
        NodeType::Socket => return Ok(None),
    };
    let meta = &node.meta;
    let go = meta.mode.unwrap_or(0o600);
    let special = SPECIAL.iter().filter(|(_, bit)| go & bit != 0);
    let mode = special.fold(go & 0o777, |mode, (unix, _)| mode | unix);
    let mtime = meta.mtime.unwrap_or(Timestamp::UNIX_EPOCH);
    let (mut seconds, mut nanoseconds) = (mtime.as_second(), mtime.subsec_nanosecond());
    if nanoseconds < 0 {
        // Before 1970 the two have the same sign; for the kernel the second counts upwards.
        seconds -= 1;
        nanoseconds += 1_000_000_000;
    }
    let attributes = meta.extended_attributes.iter();
    let attributes =
        attributes.map(|it| (unescape(&it.name), it.value.clone().unwrap_or_default())).collect();
    Ok(Some(Member {
        path,
        kind,
        mode,
        uid: meta.uid.unwrap_or(u32::MAX).into(),
        gid: meta.gid.unwrap_or(u32::MAX).into(),
        mtime: Time { seconds, nanoseconds: u32::try_from(nanoseconds).unwrap_or(0) },
        link,
        same: None,
        xattrs: attributes,
        size: meta.size,
        segments: None,
    }))
}

/// The name of a node, if it is one step.
pub fn name(node: &Node) -> Result<OsString, Refused> {
    let name = node.name().into_owned().into_vec();
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
        return Err("has no plain name");
    }
    Ok(OsString::from_vec(name))
}
