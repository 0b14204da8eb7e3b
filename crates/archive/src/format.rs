//! The tar side of an archive: one entry's description, and its bytes.
//!
//! Encodes only; [`crate::reader`] decodes. The 512-byte header is that of POSIX.1-2001
//! (`pax`, section "ustar Interchange Format"); GNU's additions are in the GNU tar manual,
//! "Basic Tar Format" and "Storing Sparse Files". Never does I/O.

use std::io::Write;

/// Size of a tar block.
pub const BLOCK: usize = 512;
/// The most an entry's extended header may hold. Attributes of 64 KiB each add up.
pub const MAX_PAX: u64 = 16 << 20;
/// The longest name an entry may have, `./` and separators included.
pub const MAX_PATH: usize = 64 << 10;
/// The most stretches of data a sparse file is described with; 16 MiB of memory.
pub const MAX_SEGMENTS: usize = 1 << 20;
/// The most that the attributes of a folder and of all above it may weigh: whoever restores it
/// keeps them all in memory. What is written must be restorable, so no tree with more is written.
pub const MAX_WEIGHT: usize = 128 << 20;
/// What a tar stream ends with.
pub const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];
/// Size of a seal: the head of its frame, 8 bytes, and its text.
pub const SEAL: usize = 8 + SEAL_START.len() + 64 + " entries:".len() + 20;
/// What the comment on the first entry of an archive begins with. The name follows of what was
/// kept beside the volume; none, if nothing was.
pub const BESIDE_START: &[u8] = b"denizen-beside:";
const SEAL_START: &str = "denizen-seal 1 sha256:";

/// What an entry makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A further name of one that was told.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A folder.
    Directory,
    /// A named pipe.
    Fifo,
    /// The character device 0:0, overlayfs' mark for a deleted file.
    Whiteout,
}

impl Kind {
    const fn type_flag(self) -> u8 {
        match self {
            Self::File => b'0',
            Self::HardLink => b'1',
            Self::Symlink => b'2',
            Self::Whiteout => b'3',
            Self::Directory => b'5',
            Self::Fifo => b'6',
        }
    }
}

/// Seconds and nanoseconds since 1970; the nanoseconds count upwards from the seconds even
/// when those are negative, as in `struct timespec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Time {
    /// Since 1970.
    pub seconds: i64,
    /// Counted upwards from the second.
    pub nanoseconds: u32,
}

/// A stretch of data in a sparse file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub length: u64,
}

/// Names and values of extended attributes.
pub type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

/// How many bytes of memory attributes take.
pub fn weight(attributes: &Attributes) -> usize {
    attributes.iter().map(|(name, value)| name.len() + value.len() + 48).sum()
}

/// One entry without its content.
#[derive(Clone, Debug)]
pub struct Member {
    /// `./a/b`; a folder's ends in `/`.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// As `st_mode` has it; the bits above the twelve of chmod(2) say nothing.
    pub mode: u32,
    /// The owner, by number.
    pub uid: u64,
    /// The group, by number.
    pub gid: u64,
    /// When its content last changed.
    pub mtime: Time,
    /// A symlink's target, or the name a hard link shares.
    pub link: Vec<u8>,
    /// What all names of the file have in common, if the walk found that it has several.
    pub same: Option<u64>,
    /// Its extended attributes.
    pub xattrs: Attributes,
    /// Size of the content as a reader of the file sees it.
    pub size: u64,
    /// Where the data of a sparse file lies; `None` for a file without holes.
    pub segments: Option<Vec<Segment>>,
}

/// Bytes to add after `size` to fill the block.
#[allow(clippy::cast_possible_truncation)]
pub const fn padding(size: u64) -> usize {
    // The remainder alone decides, so a cut number would give the same.
    (BLOCK - (size % BLOCK as u64) as usize) % BLOCK
}

/// Appends everything of `member` that stands in front of its data, with a comment that other
/// programs pass over. Returns `false`, having appended nothing, if its extended header would be
/// larger than [`MAX_PAX`].
pub fn encode(member: &Member, comment: Option<&[u8]>, out: &mut Vec<u8>) -> bool {
    let mut records = Vec::new();
    if let Some(comment) = comment {
        record(&mut records, b"comment", comment);
    }
    let mut map = Vec::new();
    let mut stored = if member.kind == Kind::File { member.size } else { 0 };
    let mut name: &[u8] = &member.path;
    if let Some(segments) = &member.segments {
        map = sparse_map(segments, member.size);
        stored = map.len() as u64 + segments.iter().map(|s| s.length).sum::<u64>();
        record(&mut records, b"GNU.sparse.major", b"1");
        record(&mut records, b"GNU.sparse.minor", b"0");
        record(&mut records, b"GNU.sparse.name", &member.path);
        record(&mut records, b"GNU.sparse.realsize", member.size.to_string().as_bytes());
        // What a reader without the extension makes of the entry: clearly not the file.
        name = b"./GNUSparseFile.0/sparse";
    } else if name.len() > 100 {
        record(&mut records, b"path", name);
    }
    if member.link.len() > 100 {
        record(&mut records, b"linkpath", &member.link);
    }
    let time_fits = (0..1 << 33).contains(&member.mtime.seconds);
    if member.mtime.nanoseconds != 0 || !time_fits {
        record(&mut records, b"mtime", decimal_time(member.mtime).as_bytes());
    }
    for (key, value, limit) in
        [("uid", member.uid, 1 << 21), ("gid", member.gid, 1 << 21), ("size", stored, 1 << 33)]
    {
        if value >= limit {
            record(&mut records, key.as_bytes(), value.to_string().as_bytes());
        }
    }
    for (key, value) in &member.xattrs {
        let mut full = b"SCHILY.xattr.".to_vec();
        for &byte in key {
            match byte {
                b'%' => full.extend_from_slice(b"%25"),
                b'=' => full.extend_from_slice(b"%3D"),
                _ => full.push(byte),
            }
        }
        record(&mut records, &full, value);
    }
    if records.len() as u64 > MAX_PAX {
        return false;
    }
    if !records.is_empty() {
        extended(b'x', b"./PaxHeaders/entry", &records, out);
    }
    header(member.kind.type_flag(), name, &member.link, member, stored, out);
    out.extend_from_slice(&map);
    true
}

/// The seal: a skippable frame (RFC 8878, 3.1.2), which every zstd decoder passes over, with a
/// text of fixed length, so that it is found from the end of the file.
pub fn seal(digest: &str, entries: u64) -> Vec<u8> {
    let text = format!("{SEAL_START}{digest} entries:{entries:020}");
    let mut frame = SEAL_HEAD.to_vec();
    frame.extend_from_slice(text.as_bytes());
    frame
}

/// Whether the last bytes of a file claim to be a seal.
pub fn is_seal(frame: &[u8; SEAL]) -> bool {
    frame.starts_with(&SEAL_HEAD) && frame[8..].starts_with(SEAL_START.as_bytes())
}

/// The frame's magic number, one of the sixteen there are, and the length of the text.
const SEAL_HEAD: [u8; 8] = {
    let magic = 0x184D_2A5D_u32.to_le_bytes();
    assert!(SEAL - 8 == 115);
    [magic[0], magic[1], magic[2], magic[3], 115, 0, 0, 0]
};

/// One pax record: `"{length} {key}={value}\n"`, the length counting its own digits.
fn record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(length.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

fn extended(flag: u8, name: &[u8], records: &[u8], out: &mut Vec<u8>) {
    let plain = Member {
        path: Vec::new(),
        kind: Kind::File,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: Time::default(),
        link: Vec::new(),
        same: None,
        xattrs: Vec::new(),
        size: 0,
        segments: None,
    };
    header(flag, name, b"", &plain, records.len() as u64, out);
    out.extend_from_slice(records);
    out.resize(out.len() + padding(records.len() as u64), 0);
}

fn header(flag: u8, name: &[u8], link: &[u8], member: &Member, size: u64, out: &mut Vec<u8>) {
    let mut block = [0_u8; BLOCK];
    put_bytes(&mut block[0..100], name);
    put_octal(&mut block[100..108], u64::from(member.mode & 0o7777));
    put_octal(&mut block[108..116], member.uid);
    put_octal(&mut block[116..124], member.gid);
    if size < 1 << 33 {
        put_octal(&mut block[124..136], size);
    } else {
        // GNU's base-256 form, for readers that do not look at the pax record.
        block[124] = 0x80;
        block[128..136].copy_from_slice(&size.to_be_bytes());
    }
    put_octal(&mut block[136..148], u64::try_from(member.mtime.seconds).unwrap_or(0));
    block[148..156].fill(b' ');
    block[156] = flag;
    put_bytes(&mut block[157..257], link);
    block[257..265].copy_from_slice(b"ustar\x0000");
    put_octal(&mut block[329..337], 0);
    put_octal(&mut block[337..345], 0);
    let sum: u64 = block.iter().map(|&byte| u64::from(byte)).sum();
    put_octal(&mut block[148..155], sum);
    out.extend_from_slice(&block);
}

fn put_bytes(field: &mut [u8], bytes: &[u8]) {
    let length = bytes.len().min(field.len());
    field[..length].copy_from_slice(&bytes[..length]);
}

/// Octal digits and a NUL. A number too large for the field becomes 0: a pax record has it.
fn put_octal(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    let value = if value >> (3 * digits) == 0 { value } else { 0 };
    for (index, byte) in field[..digits].iter_mut().enumerate() {
        // Three bits at most, so it fits a byte.
        *byte = b'0' + ((value >> (3 * (digits - 1 - index))) & 7) as u8;
    }
    field[digits] = 0;
}

/// `-1.25 s` is seconds -2 and 750,000,000 ns in a timespec, but `-1.25` in a record.
fn decimal_time(time: Time) -> String {
    let Time { seconds, nanoseconds } = time;
    if nanoseconds == 0 {
        seconds.to_string()
    } else if seconds < 0 {
        let whole = (seconds + 1).unsigned_abs();
        format!("-{whole}.{:09}", 1_000_000_000 - nanoseconds)
    } else {
        format!("{seconds}.{nanoseconds:09}")
    }
}

fn sparse_map(segments: &[Segment], size: u64) -> Vec<u8> {
    let end = segments.last().map_or(0, |s| s.offset + s.length);
    // A last, empty stretch tells readers where the file ends when it ends in a hole.
    let tail = (end < size).then_some(Segment { offset: size, length: 0 });
    let mut map = Vec::new();
    let count = segments.len() + usize::from(tail.is_some());
    // Writing to a vector cannot fail.
    let _ = writeln!(map, "{count}");
    for segment in segments.iter().chain(&tail) {
        let _ = writeln!(map, "{}\n{}", segment.offset, segment.length);
    }
    map.resize(map.len() + padding(map.len() as u64), 0);
    map
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::reader::Reader;

    #[test]
    fn what_no_header_field_holds_comes_back() {
        let member = Member {
            path: [b"./".to_vec(), b"p".repeat(300)].concat(),
            kind: Kind::File,
            mode: 0o4751,
            uid: 4_000_000_000,
            gid: 2_097_152,
            mtime: Time { seconds: -2, nanoseconds: 750_000_000 },
            link: Vec::new(),
            same: None,
            xattrs: vec![(b"user.a=b%".to_vec(), b"\0=\n".to_vec())],
            size: 9 << 30,
            segments: None,
        };
        let mut bytes = Vec::new();
        assert!(encode(&member, None, &mut bytes));
        // The announced data need not be there to read the header.
        let mut reader = Reader::new(bytes.as_slice(), std::path::Path::new("test"));
        let read = reader.next_member().unwrap().unwrap();
        assert_eq!(format!("{read:?}"), format!("{member:?}"));
        let header = tar::Header::from_byte_slice(&bytes[bytes.len() - BLOCK..]);
        assert_eq!(header.entry_size().unwrap(), 9 << 30);
    }

    #[test]
    fn a_record_counts_its_own_digits() {
        for length in 90..110 {
            let mut out = Vec::new();
            record(&mut out, b"k", &b"v".repeat(length));
            let text = String::from_utf8(out).unwrap();
            let (digits, _) = text.split_once(' ').unwrap();
            assert_eq!(digits.parse::<usize>().unwrap(), text.len());
        }
    }
}
