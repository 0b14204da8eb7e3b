//! Reads archives: ours, and those of GNU tar, bsdtar and the `tar` crate.
//!
//! Trusts nothing an archive says: every length is checked before it is used, nothing is
//! allocated by an announced size, and what is not understood is refused, not guessed. Never
//! touches the disk but for reading the archive; [`crate::restore`] makes the files.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use crate::format::{
    Attributes, BLOCK, Kind, MAX_PATH, MAX_PAX, MAX_SEGMENTS, Member, Segment, Time,
};
use crate::restore::Beside;
use crate::{Error, Summary, format};

/// How much is read and handed on at a time.
pub const CHUNK: usize = 256 << 10;
/// The most memory a decoder may be asked for by a frame: 2^27 bytes, what `zstd -d` allows.
const WINDOW_LOG: u32 = 27;

/// The tar stream of an archive.
pub fn decoder<R: Read>(
    file: R,
    path: &Path,
) -> Result<zstd::Decoder<'static, BufReader<R>>, Error> {
    let mut decoder = zstd::Decoder::with_buffer(BufReader::with_capacity(CHUNK, file))
        .map_err(|e| Error::io("decompress", path, e))?;
    decoder.window_log_max(WINDOW_LOG).map_err(|e| Error::io("decompress", path, e))?;
    Ok(decoder)
}

/// Whether a file that begins so is one or more frames of Zstandard (RFC 8878, 3.1).
pub fn is_zstandard(magic: [u8; 4]) -> bool {
    let magic = u32::from_le_bytes(magic);
    magic == 0xFD2F_B528 || magic & 0xFFFF_FFF0 == 0x184D_2A50
}

/// Reads everything and counts it. `file` is where `input` comes from.
pub fn check(input: impl Read, file: &File, path: &Path) -> Result<Summary, Error> {
    let input = BufReader::with_capacity(CHUNK, decoder(input, path)?);
    let mut reader = Reader::new(input, path);
    while let Some(member) = reader.next_member()? {
        reader.content(&member, |_, _| Ok(()))?;
    }
    reader.finish(file)
}

/// Splits a tar stream into members. After each member its content is read with
/// [`Reader::content`], for every kind of member.
pub struct Reader<'a, R> {
    input: R,
    archive: &'a Path,
    hash: Sha256,
    summary: Summary,
    beside: Beside,
}

/// A key and its value.
type Record<'a> = (&'a [u8], &'a [u8]);

/// What extended headers say about the next member.
#[derive(Default)]
struct Extensions {
    seen: bool,
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<Time>,
    xattrs: Attributes,
    sparse_major: Option<u64>,
    sparse_minor: Option<u64>,
    sparse_name: Option<Vec<u8>>,
    real_size: Option<u64>,
    comment: Option<Vec<u8>>,
}

impl<'a, R: BufRead> Reader<'a, R> {
    pub fn new(input: R, archive: &'a Path) -> Self {
        let summary = Summary { entries: 0, files: 0, bytes: 0, sealed: false };
        Self { input, archive, hash: Sha256::new(), summary, beside: Beside::Unsaid }
    }

    /// What the first entry says of the folder that was kept beside the volume.
    pub fn beside(&self) -> Beside {
        self.beside.clone()
    }

    /// To be called after the last member: compares what was read with the seal at the end of
    /// `file`, if there is one.
    pub fn finish(self, file: &File) -> Result<Summary, Error> {
        use std::os::unix::fs::FileExt as _;
        let failed = |e| Error::io("read the archive", self.archive, e);
        let length = file.metadata().map_err(failed)?.len();
        let Some(start) = length.checked_sub(format::SEAL as u64) else {
            return Ok(self.summary);
        };
        let mut found = [0; format::SEAL];
        file.read_exact_at(&mut found, start).map_err(failed)?;
        if !format::is_seal(&found) {
            return Ok(self.summary);
        }
        if found[..] != format::seal(&hex(&self.hash.finalize()), self.summary.entries) {
            return Err(Error::damaged(self.archive, "its content is not what its seal says"));
        }
        Ok(Summary { sealed: true, ..self.summary })
    }

    /// The next member, or `None` at the proper end of the archive.
    pub fn next_member(&mut self) -> Result<Option<Member>, Error> {
        let mut extensions = Extensions::default();
        loop {
            let block = self.block()?;
            if block == [0; BLOCK] {
                if extensions.seen {
                    return Err(self.damaged("it ends after an extended header"));
                }
                self.drain()?;
                return Ok(None);
            }
            self.check_sum(&block)?;
            let size = self.number(&block[124..136])?;
            match block[156] {
                b'g' => {
                    let records = self.collect(size, MAX_PAX)?;
                    self.global(&records)?;
                }
                b'x' => {
                    let records = self.collect(size, MAX_PAX)?;
                    if std::mem::replace(&mut extensions.seen, true) {
                        return Err(self.damaged("two extended headers for one entry"));
                    }
                    self.records(&records, &mut extensions)?;
                }
                flag @ (b'L' | b'K') => {
                    let mut name = self.collect(size, MAX_PATH as u64 + 1)?;
                    name.truncate(name.iter().position(|&b| b == 0).unwrap_or(name.len()));
                    extensions.seen = true;
                    let slot =
                        if flag == b'L' { &mut extensions.path } else { &mut extensions.link };
                    *slot = Some(name);
                }
                _ => {
                    self.hear(extensions.comment.as_deref())?;
                    return self.member(&block, size, extensions).map(Some);
                }
            }
        }
    }

    fn member(
        &mut self,
        block: &[u8; BLOCK],
        size: u64,
        extensions: Extensions,
    ) -> Result<Member, Error> {
        let flag = block[156];
        let mut path = extensions.path.unwrap_or_else(|| header_path(block));
        let sparse = extensions.sparse_major.is_some() || extensions.sparse_minor.is_some();
        if let Some(name) = extensions.sparse_name {
            path = name;
        }
        let refused = |reason| Error::refused(self.archive, &path, reason);
        if path.is_empty() || path.contains(&0) {
            return Err(refused("has no proper name"));
        }
        if path.len() > MAX_PATH {
            return Err(refused("has a name of more than 64 KiB"));
        }
        let device = |field: &[u8]| parse_number(field) == Some(0);
        let kind = match flag {
            b'0' | b'7' | 0 if path.ends_with(b"/") => Kind::Directory,
            b'0' | b'7' | 0 | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' if device(&block[329..337]) && device(&block[337..345]) => Kind::Whiteout,
            b'3' | b'4' => return Err(refused("is a device node")),
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            _ => return Err(refused("is of an unknown kind")),
        };
        let link = match kind {
            Kind::HardLink | Kind::Symlink => {
                extensions.link.unwrap_or_else(|| until_nul(&block[157..257]).to_vec())
            }
            _ => Vec::new(),
        };
        if matches!(kind, Kind::HardLink | Kind::Symlink)
            && (link.is_empty() || link.contains(&0) || link.len() > MAX_PATH)
        {
            return Err(refused("has no proper link target"));
        }
        if sparse && (kind != Kind::File || flag == b'S') {
            return Err(refused("is a sparse file of a kind that is not understood"));
        }
        let stored = if kind == Kind::File { extensions.size.unwrap_or(size) } else { 0 };
        let mode = self.number(&block[100..108])?;
        let uid = extensions.uid.map_or_else(|| self.number(&block[108..116]), Ok)?;
        let gid = extensions.gid.map_or_else(|| self.number(&block[116..124]), Ok)?;
        let mtime = match extensions.mtime {
            Some(time) => time,
            None => Time {
                seconds: parse_number(&block[136..148])
                    .ok_or_else(|| self.damaged("a header holds a bad number"))?,
                nanoseconds: 0,
            },
        };
        let mut member = Member {
            path,
            kind,
            // Only the permission bits; some writers put the file type there as well.
            mode: (mode & 0o7777) as u32,
            uid,
            gid,
            mtime,
            link,
            xattrs: extensions.xattrs,
            size: stored,
            segments: None,
            same: None,
        };
        if flag == b'S' {
            let size = self.number(&block[483..495])?;
            let segments = self.gnu_map(block)?;
            self.set_sparse(&mut member, segments, size, stored)?;
        } else if sparse {
            if (extensions.sparse_major, extensions.sparse_minor) != (Some(1), Some(0)) {
                return Err(Error::refused(
                    self.archive,
                    &member.path,
                    "is a sparse file of a kind that is not understood",
                ));
            }
            let size = extensions.real_size.ok_or_else(|| self.damaged("a size is missing"))?;
            let (segments, map) = self.pax_map(stored)?;
            self.set_sparse(&mut member, segments, size, stored - map)?;
        } else if extensions.real_size.is_some() {
            return Err(Error::refused(
                self.archive,
                &member.path,
                "is a sparse file of a kind that is not understood",
            ));
        }
        if i64::try_from(member.size).is_err() {
            return Err(self.damaged("a file's size is impossible"));
        }
        self.summary.entries += 1;
        if matches!(kind, Kind::File | Kind::HardLink) {
            self.summary.files += 1;
        }
        self.summary.bytes = self.summary.bytes.saturating_add(member.size);
        Ok(member)
    }

    /// Takes in what the comment on the first entry says of a folder beside the volume, whose
    /// name must be one step.
    fn hear(&mut self, comment: Option<&[u8]>) -> Result<(), Error> {
        let name = comment.and_then(|comment| comment.strip_prefix(format::BESIDE_START));
        let Some(name) = name.filter(|_| self.summary.entries == 0) else { return Ok(()) };
        if matches!(name, b"." | b"..") || name.iter().any(|byte| matches!(byte, b'/' | 0)) {
            return Err(self.damaged("what was beside its volume has no proper name"));
        }
        self.beside = match name {
            b"" => Beside::Nothing,
            name => Beside::Named(OsStr::from_bytes(name).to_owned()),
        };
        Ok(())
    }

    /// Hands over the member's data, each piece with its offset in the file.
    pub fn content(
        &mut self,
        member: &Member,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let whole = [Segment { offset: 0, length: member.size }];
        let mut stored = 0;
        for segment in member.segments.as_deref().unwrap_or(&whole) {
            self.bytes(segment.length, |at, piece| take(segment.offset + at, piece))?;
            stored += segment.length;
        }
        // The map in front of the data fills its blocks, so only the data counts.
        self.bytes(format::padding(stored) as u64, |_, _| Ok(()))
    }

    fn set_sparse(
        &self,
        member: &mut Member,
        segments: Vec<Segment>,
        size: u64,
        stored: u64,
    ) -> Result<(), Error> {
        let mut end = 0;
        let mut sum = 0_u64;
        for segment in &segments {
            let next = segment.offset.checked_add(segment.length);
            match next {
                Some(next) if segment.offset >= end && next <= size => end = next,
                _ => return Err(self.damaged("a sparse file's map is impossible")),
            }
            sum += segment.length;
        }
        if sum != stored {
            return Err(self.damaged("a sparse file's map does not fit its data"));
        }
        member.size = size;
        member.segments = Some(segments);
        Ok(())
    }

    /// The map of the old GNU form: four stretches in the header, 21 in each block after it.
    fn gnu_map(&mut self, block: &[u8; BLOCK]) -> Result<Vec<Segment>, Error> {
        let mut segments = Vec::new();
        let mut fields = block[386..482].to_vec();
        let mut more = block[482] != 0;
        loop {
            for field in fields.chunks_exact(24).take_while(|field| field[0] != 0) {
                let offset = self.number(&field[..12])?;
                segments.push(Segment { offset, length: self.number(&field[12..])? });
            }
            if segments.len() > MAX_SEGMENTS {
                return Err(self.damaged("a sparse file has too many pieces"));
            }
            if !more {
                return Ok(segments);
            }
            let next = self.block()?;
            more = next[504] != 0;
            fields = next[..504].to_vec();
        }
    }

    /// The map of GNU's pax form 1.0, and how many bytes it took: decimal numbers, a line
    /// each, first how many stretches there are, then offset and length of each.
    fn pax_map(&mut self, stored: u64) -> Result<(Vec<Segment>, u64), Error> {
        let mut numbers = Vec::new();
        let mut wanted = 1;
        let mut number = None::<u64>;
        let mut taken = 0;
        while numbers.len() < wanted {
            if taken + BLOCK as u64 > stored {
                return Err(self.damaged("a sparse file's map is cut short"));
            }
            let block = self.block()?;
            taken += BLOCK as u64;
            for byte in block {
                if numbers.len() == wanted {
                    break;
                }
                number = match (byte, number) {
                    (b'0'..=b'9', so_far) => so_far
                        .unwrap_or(0)
                        .checked_mul(10)
                        .and_then(|n| n.checked_add(u64::from(byte - b'0'))),
                    (b'\n', Some(done)) => {
                        numbers.push(done);
                        if numbers.len() == 1 {
                            if done > MAX_SEGMENTS as u64 + 1 {
                                return Err(self.damaged("a sparse file has too many pieces"));
                            }
                            // Checked just above to be small.
                            wanted = 1 + 2 * usize::try_from(done).unwrap_or(0);
                        }
                        None
                    }
                    _ => return Err(self.damaged("a sparse file's map is no list of numbers")),
                };
                if number.is_none() && byte != b'\n' {
                    return Err(self.damaged("a sparse file's map holds an impossible number"));
                }
            }
        }
        let segments = numbers[1..]
            .chunks_exact(2)
            .map(|pair| Segment { offset: pair[0], length: pair[1] })
            .collect();
        Ok((segments, taken))
    }

    /// Global headers may hold remarks, but nothing that would change the entries after them.
    fn global(&self, records: &[u8]) -> Result<(), Error> {
        match self.split(records)?.into_iter().find(|(key, _)| *key != b"comment") {
            None => Ok(()),
            Some((key, _)) => {
                Err(Error::refused(self.archive, key, "in a global header is not understood"))
            }
        }
    }

    fn records(&self, records: &[u8], into: &mut Extensions) -> Result<(), Error> {
        let bad = || self.damaged("an extended header holds a bad value");
        let number = |value: &[u8]| {
            std::str::from_utf8(value).ok().and_then(|v| v.parse().ok()).ok_or_else(bad)
        };
        for (key, value) in self.split(records)? {
            match key {
                b"path" => into.path = Some(value.to_vec()),
                b"linkpath" => into.link = Some(value.to_vec()),
                b"size" => into.size = Some(number(value)?),
                b"uid" => into.uid = Some(number(value)?),
                b"gid" => into.gid = Some(number(value)?),
                b"comment" => into.comment = Some(value.to_vec()),
                b"mtime" => into.mtime = Some(parse_time(value).ok_or_else(bad)?),
                b"GNU.sparse.major" => into.sparse_major = Some(number(value)?),
                b"GNU.sparse.minor" => into.sparse_minor = Some(number(value)?),
                b"GNU.sparse.name" => into.sparse_name = Some(value.to_vec()),
                b"GNU.sparse.realsize" | b"GNU.sparse.size" => {
                    into.real_size = Some(number(value)?);
                }
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        into.xattrs.push((unescape(name), value.to_vec()));
                    }
                    // Access times, user names: not kept.
                }
            }
        }
        Ok(())
    }

    fn split<'b>(&self, mut records: &'b [u8]) -> Result<Vec<Record<'b>>, Error> {
        let bad = || self.damaged("an extended header is malformed");
        let mut pairs = Vec::new();
        while !records.is_empty() {
            let space = records.iter().take(20).position(|&b| b == b' ').ok_or_else(bad)?;
            let length: usize = std::str::from_utf8(&records[..space])
                .ok()
                .and_then(|digits| digits.parse().ok())
                .ok_or_else(bad)?;
            if length <= space + 1 || length > records.len() {
                return Err(bad());
            }
            let body = records[space + 1..length].strip_suffix(b"\n").ok_or_else(bad)?;
            let equals = body.iter().position(|&b| b == b'=').ok_or_else(bad)?;
            pairs.push((&body[..equals], &body[equals + 1..]));
            records = &records[length..];
        }
        Ok(pairs)
    }

    /// A small member's content and its padding.
    fn collect(&mut self, size: u64, most: u64) -> Result<Vec<u8>, Error> {
        if size > most {
            return Err(self.damaged("an extended header is too large"));
        }
        let mut all = Vec::new();
        self.bytes(size, |_, piece| {
            all.extend_from_slice(piece);
            Ok(())
        })?;
        self.bytes(format::padding(size) as u64, |_, _| Ok(()))?;
        Ok(all)
    }

    fn bytes(
        &mut self,
        count: u64,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut done = 0;
        while done < count {
            let ready = fill(&mut self.input, self.archive)?;
            if ready.is_empty() {
                return Err(Error::damaged(self.archive, "it is cut short"));
            }
            let length = usize::try_from(count - done).unwrap_or(usize::MAX).min(ready.len());
            self.hash.update(&ready[..length]);
            take(done, &ready[..length])?;
            self.input.consume(length);
            done += length as u64;
        }
        Ok(())
    }

    fn block(&mut self) -> Result<[u8; BLOCK], Error> {
        let mut block = [0; BLOCK];
        let mut done = 0;
        while done < BLOCK {
            let ready = fill(&mut self.input, self.archive)?;
            if ready.is_empty() {
                return Err(Error::damaged(self.archive, "it is cut short"));
            }
            let length = ready.len().min(BLOCK - done);
            block[done..done + length].copy_from_slice(&ready[..length]);
            self.input.consume(length);
            done += length;
        }
        self.hash.update(block);
        Ok(block)
    }

    /// Reads on to the end of the file, so that the last frame's checksum is looked at.
    fn drain(&mut self) -> Result<(), Error> {
        loop {
            let ready = fill(&mut self.input, self.archive)?;
            if ready.is_empty() {
                return Ok(());
            }
            if ready.iter().any(|&byte| byte != 0) {
                return Err(Error::damaged(self.archive, "something follows its end"));
            }
            self.hash.update(ready);
            let length = ready.len();
            self.input.consume(length);
        }
    }

    fn check_sum(&self, block: &[u8; BLOCK]) -> Result<(), Error> {
        let sum: i64 = block
            .iter()
            .enumerate()
            .map(|(at, &b)| if (148..156).contains(&at) { 32 } else { i64::from(b) })
            .sum();
        if parse_number(&block[148..156]) == Some(sum) {
            Ok(())
        } else {
            Err(self.damaged("a header's checksum is wrong"))
        }
    }

    fn number(&self, field: &[u8]) -> Result<u64, Error> {
        parse_number(field)
            .and_then(|n| u64::try_from(n).ok())
            .ok_or_else(|| self.damaged("a header holds a bad number"))
    }

    fn damaged(&self, detail: &str) -> Error {
        Error::damaged(self.archive, detail)
    }
}

/// An error with a number came from the system; one without came from the decompressor.
fn fill<'b>(input: &'b mut impl BufRead, archive: &Path) -> Result<&'b [u8], Error> {
    input.fill_buf().map_err(|e| {
        if e.raw_os_error().is_some() {
            Error::io("read the archive", archive, e)
        } else {
            Error::damaged(archive, e.to_string())
        }
    })
}

pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn until_nul(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|&b| b == 0).unwrap_or(field.len())]
}

fn header_path(block: &[u8; BLOCK]) -> Vec<u8> {
    let name = until_nul(&block[..100]);
    // GNU's own format has other things in the place of ustar's prefix.
    let prefix = if &block[257..263] == b"ustar\0" { until_nul(&block[345..500]) } else { b"" };
    if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
}

/// Octal digits among blanks, or GNU's base-256: a two's complement number whose top bit is
/// replaced by a mark.
fn parse_number(field: &[u8]) -> Option<i64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        let sign = if first & 0x40 == 0 { 0 } else { -64 };
        let mut value = i128::from(first & 0x3f) + sign;
        for &byte in rest {
            value = value.checked_mul(256)?.checked_add(i128::from(byte))?;
        }
        return i64::try_from(value).ok();
    }
    let blank = |b: &u8| *b == b' ' || *b == 0;
    let digits = field.iter().skip_while(|b| blank(b));
    let mut value = 0_i64;
    let mut ended = false;
    for byte in digits {
        match byte {
            b'0'..=b'7' if !ended => {
                value = value.checked_mul(8)?.checked_add(i64::from(byte - b'0'))?;
            }
            b if blank(b) => ended = true,
            _ => return None,
        }
    }
    Some(value)
}

/// `[-]seconds[.fraction]`; digits beyond nanoseconds are dropped.
fn parse_time(text: &[u8]) -> Option<Time> {
    let text = std::str::from_utf8(text).ok()?;
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    let nine: String = fraction.chars().chain(std::iter::repeat('0')).take(9).collect();
    let nanoseconds: u32 = nine.parse().ok()?;
    Some(match (negative, nanoseconds) {
        (false, nanoseconds) => Time { seconds, nanoseconds },
        (true, 0) => Time { seconds: -seconds, nanoseconds: 0 },
        (true, n) => Time { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - n },
    })
}

fn unescape(name: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&first, tail)) = rest.split_first() {
        let (byte, tail) = match rest {
            [b'%', b'2', b'5', tail @ ..] => (b'%', tail),
            [b'%', b'3', b'D', tail @ ..] => (b'=', tail),
            _ => (first, tail),
        };
        plain.push(byte);
        rest = tail;
    }
    plain
}

/// Reads a file that another thread is still writing, up to where it is complete.
pub struct Follow<'a> {
    pub file: &'a File,
    pub position: u64,
    pub progress: &'a Progress,
}

/// How far a file has been written, told by the writer to whoever reads it back.
#[derive(Default)]
pub struct Progress {
    state: std::sync::Mutex<(u64, Stage)>,
    changed: std::sync::Condvar,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Writing,
    Complete,
    GivenUp,
}

impl Progress {
    pub fn wrote(&self, bytes: u64) {
        self.update(|state| state.0 += bytes);
    }

    pub fn complete(&self) {
        self.update(|state| state.1 = Stage::Complete);
    }

    /// No more will come; a reader must not take what is there for the whole.
    pub fn give_up(&self) {
        self.update(|state| {
            if state.1 == Stage::Writing {
                state.1 = Stage::GivenUp;
            }
        });
    }

    fn update(&self, change: impl FnOnce(&mut (u64, Stage))) {
        // A panic while holding the lock cannot leave these two numbers half-changed.
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        change(&mut state);
        self.changed.notify_all();
    }

    /// Waits until there is something after `position`; returns how far to read, which is
    /// `position` itself at the end.
    fn wait(&self, position: u64) -> std::io::Result<u64> {
        let state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let state = self
            .changed
            .wait_while(state, |(written, stage)| *stage == Stage::Writing && *written <= position)
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match *state {
            (_, Stage::GivenUp) => Err(std::io::Error::other("its writer gave up")),
            (written, _) => Ok(written),
        }
    }
}

impl std::io::Read for Follow<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        use std::os::unix::fs::FileExt as _;
        let ready = self.progress.wait(self.position)? - self.position;
        let most = usize::try_from(ready).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let got = self.file.read_at(&mut buffer[..most], self.position)?;
        self.position += got as u64;
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn times_of_pax_records_round_down_to_a_timespec() {
        let time = |text: &str| parse_time(text.as_bytes()).map(|t| (t.seconds, t.nanoseconds));
        assert_eq!(time("12"), Some((12, 0)));
        assert_eq!(time("12.5"), Some((12, 500_000_000)));
        assert_eq!(time("12.0000000019"), Some((12, 1)));
        assert_eq!(time("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time("-3"), Some((-3, 0)));
        for bad in ["", "-", ".5", "1e3", "1.-5", "99999999999999999999"] {
            assert_eq!(time(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn header_numbers_are_octal_or_base_256() {
        assert_eq!(parse_number(b"0000644\0"), Some(0o644));
        assert_eq!(parse_number(b"   644 \0"), Some(0o644));
        assert_eq!(parse_number(b"\0\0\0\0"), Some(0));
        assert_eq!(parse_number(b"\x80\0\0\x02\0\0\0\0"), Some(0x2_0000_0000));
        assert_eq!(parse_number(b"\xff\xff\xff\xff"), Some(-1));
        assert_eq!(parse_number(b"12 3"), None);
        assert_eq!(parse_number(b"9"), None);
        assert_eq!(parse_number(&[0xbf; 12]), None);
    }
}
