//! Reads a tar stream entry by entry: ustar, pax, GNU's long names, and the old format.
//!
//! Bounded: no header makes it hold more than [`MOST_EXTENDED`] in memory. It checks what an
//! entry says; whether that may be made is for [`crate::unpack`] to decide. Never does any
//! output.

use std::io::{self, BufRead};

use tar::{EntryType, Header};

use crate::{Error, Result};

const BLOCK: usize = 512;
/// The most an extended header may hold. Attributes of 64 KiB each add up.
const MOST_EXTENDED: u64 = 4 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    File,
    HardLink,
    Symlink,
    Directory,
    Fifo,
    Device,
}

#[derive(Clone, Debug)]
pub struct Entry {
    pub path: Vec<u8>,
    pub kind: Kind,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Seconds and nanoseconds; the latter count upwards, before 1970 too.
    pub mtime: (i64, u32),
    /// A symlink's target, or the name a hard link shares.
    pub link: Vec<u8>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes of content; none but for files.
    pub size: u64,
}

/// What headers in front of an entry say about it.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

pub struct Entries<'a, R> {
    input: R,
    what: &'a str,
    /// Content of the last entry that was not read, and what pads it.
    unread: u64,
    padding: u64,
    /// How many headers there may be yet.
    left: u64,
    most: u64,
    /// Bytes read so far.
    position: u64,
}

impl<'a, R: BufRead> Entries<'a, R> {
    pub fn new(input: R, what: &'a str, most: u64) -> Self {
        Self { input, what, unread: 0, padding: 0, left: most, most, position: 0 }
    }

    /// Where the content of the entry that was just returned begins.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next entry; what was not read of the last one is passed over. `None` at the mark of
    /// the end, or where the stream ends between two entries: some writers forget the mark.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        let mut extended = Extended::default();
        let mut waiting = false;
        loop {
            let rest = self.unread.saturating_add(self.padding);
            self.skip(rest)?;
            (self.unread, self.padding) = (0, 0);
            let Some(header) = self.header()? else {
                if waiting {
                    return Err(Error::damaged(self.what, "it ends in front of an entry"));
                }
                return Ok(None);
            };
            self.left = self
                .left
                .checked_sub(1)
                .ok_or_else(|| Error::too_large(self.what, self.most, "entries"))?;
            let size = self.number(&header.as_old().size, || header.entry_size())?;
            let kind = header.entry_type();
            self.padding = padding(size);
            match kind {
                EntryType::GNULongName => {
                    extended.path = Some(text(self.block(size)?));
                    waiting = true;
                }
                EntryType::GNULongLink => {
                    extended.link = Some(text(self.block(size)?));
                    waiting = true;
                }
                EntryType::XHeader => {
                    let records = self.block(size)?;
                    self.records(&records, &mut extended)?;
                    waiting = true;
                }
                // Meant for the whole archive: comments, in practice.
                EntryType::XGlobalHeader => self.unread = size,
                kind => return self.entry(&header, kind, size, extended).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        header: &Header,
        kind: EntryType,
        size: u64,
        extended: Extended,
    ) -> Result<Entry> {
        let path = extended.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let mut kind = match kind {
            EntryType::Regular | EntryType::Continuous => Kind::File,
            EntryType::Link => Kind::HardLink,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Char | EntryType::Block => Kind::Device,
            EntryType::Directory => Kind::Directory,
            EntryType::Fifo => Kind::Fifo,
            EntryType::GNUSparse => {
                return Err(Error::refused(self.what, &path, "is sparse in GNU's own form"));
            }
            _ => return Err(Error::refused(self.what, &path, "is of an unknown kind")),
        };
        // How directories were marked before they had a kind of their own.
        if kind == Kind::File && path.ends_with(b"/") {
            kind = Kind::Directory;
        }
        // Anything else has no content, whatever its header says: some writers leave the size
        // of a link's target there, and nothing follows it.
        let size = if kind == Kind::File { extended.size.unwrap_or(size) } else { 0 };
        (self.unread, self.padding) = (size, padding(size));
        let link = extended
            .link
            .or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned))
            .unwrap_or_default();
        let old = header.as_old();
        let seconds = self.number(&old.mtime, || header.mtime())?;
        let mode = self.number(&old.mode, || header.mode().map(u64::from))?;
        let uid = extended.uid.map_or_else(|| self.number(&old.uid, || header.uid()), Ok)?;
        let gid = extended.gid.map_or_else(|| self.number(&old.gid, || header.gid()), Ok)?;
        Ok(Entry {
            path,
            kind,
            mode: u32::try_from(mode & 0o7777).unwrap_or(0),
            uid,
            gid,
            mtime: extended.mtime.unwrap_or((i64::try_from(seconds).unwrap_or(0), 0)),
            link,
            xattrs: extended.xattrs,
            size,
        })
    }

    /// Gives the content of the entry that was just returned to `take`, piece by piece.
    pub fn content(&mut self, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        while self.unread > 0 {
            let unread = usize::try_from(self.unread).unwrap_or(usize::MAX);
            let ready = self.input.fill_buf().map_err(|e| Error::reading(self.what, e))?;
            if ready.is_empty() {
                return Err(Error::damaged(self.what, "it ends within a file"));
            }
            let length = ready.len().min(unread);
            take(&ready[..length])?;
            self.input.consume(length);
            self.unread -= length as u64;
            self.position += length as u64;
        }
        Ok(())
    }

    fn header(&mut self) -> Result<Option<Header>> {
        let mut header = Header::new_old();
        let bytes = header.as_mut_bytes();
        let got = self.read(bytes)?;
        if got == 0 || (got == BLOCK && bytes.iter().all(|&byte| byte == 0)) {
            return Ok(None);
        }
        if got < BLOCK {
            return Err(Error::damaged(self.what, "it ends within a header"));
        }
        let sum = |bytes: &[u8]| bytes.iter().map(|&byte| u32::from(byte)).sum::<u32>();
        // The field itself counts as eight blanks.
        let found = sum(&bytes[..148]) + sum(&bytes[156..]) + 8 * u32::from(b' ');
        if header.cksum().ok() != Some(found) {
            return Err(Error::damaged(self.what, "a header is no header of a tar file"));
        }
        Ok(Some(header))
    }

    /// Reads until the buffer is full or the stream ends.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let mut length = 0;
        while length < buffer.len() {
            match self.input.read(&mut buffer[length..]) {
                Ok(0) => break,
                Ok(got) => length += got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::reading(self.what, e)),
            }
        }
        self.position += length as u64;
        Ok(length)
    }

    /// The content of a header that has some.
    fn block(&mut self, size: u64) -> Result<Vec<u8>> {
        let length = usize::try_from(size)
            .ok()
            .filter(|_| size <= MOST_EXTENDED)
            .ok_or_else(|| Error::too_large(self.what, MOST_EXTENDED, "bytes of one header"))?;
        let mut block = vec![0; length];
        if self.read(&mut block)? < length {
            return Err(Error::damaged(self.what, "it ends within a header"));
        }
        Ok(block)
    }

    fn skip(&mut self, mut length: u64) -> Result<()> {
        while length > 0 {
            let ready = self.input.fill_buf().map_err(|e| Error::reading(self.what, e))?;
            if ready.is_empty() {
                return Err(Error::damaged(self.what, "it ends within a file"));
            }
            let step = ready.len().min(usize::try_from(length).unwrap_or(usize::MAX));
            self.input.consume(step);
            self.position += step as u64;
            length -= step as u64;
        }
        Ok(())
    }

    /// Records of `length key=value`, each ended by a newline that the value may contain too.
    fn records(&self, mut records: &[u8], extended: &mut Extended) -> Result<()> {
        let bad = || Error::damaged(self.what, "an extended header is malformed");
        while !records.is_empty() {
            let blank = records.iter().take(20).position(|&b| b == b' ').ok_or_else(bad)?;
            let length = decimal(&records[..blank]).ok_or_else(bad)?;
            let length = usize::try_from(length).map_err(|_| bad())?;
            let record = records.get(blank + 1..length).ok_or_else(bad)?;
            let record = record.strip_suffix(b"\n").ok_or_else(bad)?;
            let equals = record.iter().position(|&b| b == b'=').ok_or_else(bad)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            let number = || decimal(value).map(Some).ok_or_else(bad);
            match key {
                b"path" => extended.path = Some(value.to_vec()),
                b"linkpath" => extended.link = Some(value.to_vec()),
                b"size" => extended.size = number()?,
                b"uid" => extended.uid = number()?,
                b"gid" => extended.gid = number()?,
                b"mtime" => extended.mtime = Some(time(value).ok_or_else(bad)?),
                key if key.starts_with(b"GNU.sparse.") => {
                    return Err(Error::refused(self.what, value, "is sparse in GNU's own form"));
                }
                key => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        extended.xattrs.push((name.to_vec(), value.to_vec()));
                    }
                }
            }
            records = &records[length..];
        }
        Ok(())
    }

    /// A field nobody filled in is zero.
    fn number(&self, field: &[u8], parse: impl FnOnce() -> io::Result<u64>) -> Result<u64> {
        if field.iter().all(|byte| matches!(byte, 0 | b' ')) {
            return Ok(0);
        }
        parse().map_err(|e| Error::damaged(self.what, e.to_string()))
    }
}

fn padding(size: u64) -> u64 {
    let block = BLOCK as u64;
    (block - size % block) % block
}

/// GNU's long names end in a NUL.
fn text(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes.last() == Some(&0) {
        bytes.pop();
    }
    bytes
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Seconds with a sign and a fraction, both of which may be missing.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let point = text.iter().position(|&b| b == b'.').unwrap_or(text.len());
    let seconds = i64::try_from(decimal(&text[..point])?).ok()?;
    let fraction = text.get(point + 1..).unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    if negative && nanoseconds > 0 {
        return Some((-seconds - 1, 1_000_000_000 - nanoseconds));
    }
    Some((if negative { -seconds } else { seconds }, nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::time;

    #[test]
    fn times_before_and_after_1970() {
        assert_eq!(time(b"12"), Some((12, 0)));
        assert_eq!(time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(time(b"-12.25"), Some((-13, 750_000_000)));
        assert_eq!(time(b"1.0000000019"), Some((1, 1)));
        for bad in [&b""[..], b"-", b".", b"1.x", b"1e3", b"99999999999999999999"] {
            assert_eq!(time(bad), None, "{bad:?}");
        }
    }
}
