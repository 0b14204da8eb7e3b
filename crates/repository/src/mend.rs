//! Makes the index say what is there, when something was found that is not as it was written:
//! pieces that are gone or altered are no longer in it, so that the next backup writes them anew,
//! and what no index names any more is in it again.
//!
//! What is left of a file that is damaged is copied to another one. It removes no file that holds
//! pieces, and nothing for which it only has the word of a list: a
//! list may be old. New files of the index are there before old ones go, so that it may be killed
//! at any moment.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;

use bytes::Bytes;
use rustic_core::repofile::{BlobType, IndexBlob, IndexFile, IndexPack};
use rustic_core::{BlobId, FileType, Id};

use crate::Repository;
use crate::backend::name;
use crate::cipher::digest;
use crate::error::{Error, Result};
use crate::files::Range;

/// How long the header of a file with pieces may be.
const LONGEST_HEADER: usize = 64 << 20;

/// What was done.
#[derive(Debug, Default)]
pub struct Mended {
    /// What was wrong with files that hold no pieces.
    pub problems: Vec<String>,
    /// Whether the index is another one now.
    pub changed: bool,
}

/// Whether an error means that the disk has lost what it held.
pub fn is_lost(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

/// What there is under the name of a file.
pub enum Read<T> {
    /// What its name says.
    Sound(T),
    Altered,
    Gone,
}

/// What is found of a file that holds pieces.
enum Found {
    Sound,
    Gone,
    /// What is left of it, elsewhere.
    Less(Option<IndexPack>),
}

impl Repository {
    fn trouble(&self, problem: impl std::fmt::Display) -> Error {
        let problem = problem.to_string();
        Error::Engine { action: "mend", place: self.place(), problem }
    }

    /// Looks at what a list says is missing or has another size, at `suspects`, and at what is in
    /// no index.
    pub(crate) fn mend(&self, suspects: &HashSet<Id>) -> Result<Mended> {
        let mut mended = Mended::default();
        let (mut indexes, mut damaged) = (BTreeMap::new(), Vec::new());
        for file in self.names(FileType::Index)? {
            match self.content::<IndexFile>(&file)? {
                Read::Sound(index) => drop(indexes.insert(file, index)),
                Read::Altered => {
                    mended.problems.push(format!("{file} is altered"));
                    damaged.push(file);
                }
                Read::Gone => {}
            }
        }
        // After the index: what was written in between is no orphan, and is not missing.
        let packs: HashMap<Id, u64> = self
            .files
            .list(FileType::Pack.dirname())
            .map_err(|error| self.trouble(error))?
            .into_iter()
            .filter_map(|(path, size)| Some((path.rsplit('/').next()?.parse().ok()?, size)))
            .collect();
        let mut known: HashSet<Id> = HashSet::new();
        for index in indexes.values() {
            known.extend(index.packs.iter().map(|pack| *pack.id));
        }
        let (mut new, mut whole) = (Vec::new(), Vec::new());
        let mut old = damaged;
        for (file, mut index) in indexes {
            let mut changed = false;
            let mut packs_left = Vec::new();
            for pack in index.packs {
                let size = packs.get(&*pack.id).copied();
                let as_listed = size == Some(pack.pack_size().into());
                if as_listed && !suspects.contains(&*pack.id) {
                    packs_left.push(pack);
                    continue;
                }
                match self.look(&pack)? {
                    Found::Sound => packs_left.push(pack),
                    Found::Less(left) => {
                        changed = true;
                        packs_left.extend(left);
                    }
                    Found::Gone => changed = true,
                }
            }
            index.packs = packs_left;
            // A backup may have counted on what was marked at that moment. Whatever is not needed
            // is marked again.
            let (needless, marked): (Vec<_>, Vec<_>) = std::mem::take(&mut index.packs_to_delete)
                .into_iter()
                .partition(|pack| pack.blobs.is_empty() || !packs.contains_key(&*pack.id));
            index.packs_to_delete = needless;
            for mut pack in marked {
                changed = true;
                if known.insert(*pack.id) {
                    pack.time = None;
                    index.packs.push(pack);
                }
            }
            if changed {
                old.push(file);
                new.push(index);
            } else {
                whole.push(index);
            }
        }
        let mut adopted = IndexFile::default();
        let mut orphans = packs.keys().filter(|pack| !known.contains(*pack)).peekable();
        if orphans.peek().is_some() {
            let indexed = whole.iter().chain(&new).flat_map(|index| &index.packs);
            let mut there: HashSet<BlobId> =
                indexed.flat_map(|pack| &pack.blobs).map(|blob| blob.id).collect();
            for pack in orphans {
                let found = self.orphan(pack, &there)?;
                there.extend(found.iter().flat_map(|pack| &pack.blobs).map(|blob| blob.id));
                adopted.packs.extend(found);
            }
        }
        new.push(adopted);
        let new = new.iter().filter(|it| !it.packs.is_empty() || !it.packs_to_delete.is_empty());
        for index in new {
            mended.changed = true;
            self.write_index(index)?;
        }
        for file in old {
            mended.changed = true;
            match self.files.remove(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(self.trouble(format!("cannot remove {file}: {error}")));
                }
                _ => {}
            }
        }
        if mended.changed {
            tracing::warn!(place = self.place(), problems = ?mended.problems, "the index of the backup repository was mended");
        }
        Ok(mended)
    }

    /// Has the index name what is in these files and nowhere else.
    pub(crate) fn adopt<'a>(&self, packs: impl Iterator<Item = &'a Id>) -> Result<()> {
        let (mut known, mut there) = (HashSet::new(), HashSet::new());
        for file in self.names(FileType::Index)? {
            if let Read::Sound(index) = self.content::<IndexFile>(&file)? {
                known.extend(index.packs.iter().map(|pack| *pack.id));
                let blobs = index.packs.iter().flat_map(|pack| &pack.blobs);
                there.extend(blobs.map(|blob| blob.id));
            }
        }
        let mut adopted = IndexFile::default();
        for pack in packs.filter(|pack| !known.contains(*pack)) {
            let found = self.orphan(pack, &there)?;
            there.extend(found.iter().flat_map(|pack| &pack.blobs).map(|blob| blob.id));
            adopted.packs.extend(found);
        }
        if adopted.packs.is_empty() { Ok(()) } else { self.write_index(&adopted) }
    }

    /// The files of a kind.
    pub(crate) fn names(&self, kind: FileType) -> Result<Vec<String>> {
        let found = self.files.list(kind.dirname());
        let found = found.map_err(|error| Error::Engine {
            action: "list what is in",
            place: self.place(),
            problem: error.to_string(),
        })?;
        // What has another name is not the repository's.
        let is_one = |file: &String| {
            let id = file.rsplit('/').next().and_then(|id| id.parse().ok());
            id.is_some_and(|id: Id| name(kind, &id) == *file)
        };
        Ok(found.into_iter().map(|(file, _)| file).filter(is_one).collect())
    }

    /// A file that is known by its digest.
    fn sound(&self, file: &str) -> Result<Read<Bytes>> {
        // Whatever was altered on its way only is not the second time.
        for _ in 0..2 {
            match self.files.read(file, None) {
                Ok(bytes) if Some(&*digest(&bytes).to_hex()) == file.rsplit('/').next() => {
                    return Ok(Read::Sound(bytes));
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Read::Gone),
                Err(error) if is_lost(&error) => {}
                Err(error) => {
                    return Err(Error::Engine {
                        action: "read from",
                        place: self.place(),
                        problem: format!("cannot read {file}: {error}"),
                    });
                }
            }
        }
        Ok(Read::Altered)
    }

    /// What a file that is not of pieces holds.
    pub(crate) fn content<T: serde::de::DeserializeOwned>(&self, file: &str) -> Result<Read<T>> {
        Ok(match self.sound(file)? {
            Read::Sound(bytes) => {
                let plain = self.cipher.file(&bytes);
                let content = plain.and_then(|plain| serde_json::from_slice(&plain).ok());
                content.map_or(Read::Altered, Read::Sound)
            }
            Read::Altered => Read::Altered,
            Read::Gone => Read::Gone,
        })
    }

    pub(crate) fn write_index(&self, index: &IndexFile) -> Result<()> {
        let plain = serde_json::to_vec(index).map_err(|error| self.trouble(error))?;
        let sealed = self.cipher.seal(&plain);
        let sealed = sealed.ok_or_else(|| self.trouble("a file of the index is too large"))?;
        let file = name(FileType::Index, &digest(&sealed));
        let written = self.files.write(&file, vec![sealed.into()], false);
        written.map_err(|error| self.trouble(format!("cannot write {file}: {error}")))
    }

    /// All of a file that holds pieces, if it is there.
    fn whole(&self, pack: &Id) -> io::Result<Option<Bytes>> {
        match self.files.read(&name(FileType::Pack, pack), None) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some),
        }
    }

    fn unreadable(&self, pack: &Id, error: &io::Error) -> Error {
        self.trouble(format!("cannot read {}: {error}", name(FileType::Pack, pack)))
    }

    /// Reads a file that holds pieces.
    fn look(&self, pack: &IndexPack) -> Result<Found> {
        // Twice, as above.
        for _ in 0..2 {
            match self.whole(&pack.id) {
                Ok(None) => return Ok(Found::Gone),
                Ok(Some(bytes)) if digest(&bytes) == *pack.id => return Ok(Found::Sound),
                Ok(Some(_)) => {}
                Err(error) if is_lost(&error) => {}
                Err(error) => return Err(self.unreadable(&pack.id, &error)),
            }
        }
        let mut left = Vec::new();
        for blob in &pack.blobs {
            let place = blob.location;
            let range = Range { offset: place.offset.into(), length: place.length.into() };
            match self.files.read(&name(FileType::Pack, &pack.id), Some(range)) {
                Ok(sealed) if self.is_sound(&sealed, blob) => left.push((*blob, sealed)),
                Ok(_) => {}
                Err(error) if is_lost(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Gone),
                Err(error) => return Err(self.unreadable(&pack.id, &error)),
            }
        }
        Ok(Found::Less(self.copied(left)?))
    }

    /// Another file with these pieces, as they are.
    fn copied(&self, pieces: Vec<(IndexBlob, Bytes)>) -> Result<Option<IndexPack>> {
        if pieces.is_empty() {
            return Ok(None);
        }
        let (mut pack, mut header, mut content) = (IndexPack::default(), Vec::new(), Vec::new());
        let mut offset = 0;
        for (mut blob, sealed) in pieces {
            let plain = blob.location.uncompressed_length;
            let tree = u8::from(blob.tpe == BlobType::Tree);
            header.push(tree | if plain.is_some() { 2 } else { 0 });
            header.extend(blob.location.length.to_le_bytes());
            header.extend(plain.map(|plain| plain.get().to_le_bytes()).into_iter().flatten());
            header.extend(raw(&blob.id));
            blob.location.offset = offset;
            offset += blob.location.length;
            pack.blobs.push(blob);
            content.push(sealed);
        }
        let sealed = self.cipher.seal(&header).ok_or_else(|| self.trouble("it is too large"))?;
        let length = u32::try_from(sealed.len()).map_err(|error| self.trouble(error))?;
        content.extend([sealed.into(), length.to_le_bytes().to_vec().into()]);
        let id = digest(&content.concat());
        let file = name(FileType::Pack, &id);
        let written = self.files.write(&file, content, false);
        written.map_err(|error| self.trouble(format!("cannot write {file}: {error}")))?;
        pack.id = id.into();
        Ok(Some(pack))
    }

    fn is_sound(&self, sealed: &[u8], blob: &IndexBlob) -> bool {
        let length = blob.location.uncompressed_length;
        self.cipher.piece(sealed, blob.tpe, length, &blob.id).is_some()
    }

    /// A file that holds pieces and is in no index, as its own header tells of it; nothing if all
    /// that it holds is there.
    fn orphan(&self, id: &Id, there: &HashSet<BlobId>) -> Result<Option<IndexPack>> {
        let bytes = match self.whole(id) {
            Ok(Some(bytes)) => bytes,
            Err(error) if !is_lost(&error) => return Err(self.unreadable(id, &error)),
            _ => return Ok(None),
        };
        let Some(blobs) = self.header(&bytes) else { return Ok(None) };
        let count = blobs.len();
        let sound = blobs.into_iter().filter_map(|blob| {
            let start = usize::try_from(blob.location.offset).ok()?;
            let end = start.checked_add(usize::try_from(blob.location.length).ok()?)?;
            let sealed = bytes.get(start..end)?;
            self.is_sound(sealed, &blob).then(|| (blob, bytes.slice(start..end)))
        });
        let mut sound: Vec<_> = sound.collect();
        let is_needless = sound.iter().all(|(blob, _)| there.contains(&blob.id));
        if is_needless {
            return Ok(None);
        }
        if sound.len() < count || digest(&bytes) != *id {
            sound.retain(|(blob, _)| !there.contains(&blob.id));
            return self.copied(sound);
        }
        let blobs = sound.into_iter().map(|(blob, _)| blob).collect();
        Ok(Some(IndexPack { id: (*id).into(), blobs, ..IndexPack::default() }))
    }

    /// What a file's header says that it holds (restic's design document, "Pack Format"): it is
    /// at its end, and its length behind it.
    fn header(&self, bytes: &[u8]) -> Option<Vec<IndexBlob>> {
        let (rest, length) = bytes.split_last_chunk::<4>()?;
        let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
        if length > LONGEST_HEADER {
            return None;
        }
        let header = self.cipher.open(rest.get(rest.len().checked_sub(length)?..)?)?;
        let (mut rest, mut offset, mut blobs) = (&header[..], 0_u32, Vec::new());
        let number = |rest: &mut &[u8]| {
            let (number, after) = rest.split_first_chunk::<4>()?;
            *rest = after;
            Some(u32::from_le_bytes(*number))
        };
        while let Some((kind, after)) = rest.split_first() {
            rest = after;
            let tpe = if kind & 1 == 0 { BlobType::Data } else { BlobType::Tree };
            let length = number(&mut rest)?;
            let plain = match kind {
                0 | 1 => None,
                2 | 3 => Some(std::num::NonZeroU32::new(number(&mut rest)?)?),
                _ => return None,
            };
            let (id, after) = rest.split_first_chunk::<32>()?;
            rest = after;
            blobs.push(serde_json::json!({
                "id": Id::new(*id), "type": tpe, "offset": offset, "length": length,
                "uncompressed_length": plain,
            }));
            offset = offset.checked_add(length)?;
        }
        // The engine keeps the type of a place to itself, but reads it.
        serde_json::from_value(blobs.into()).ok()
    }
}

/// The bytes of a number that the engine shows in digits only.
fn raw(id: &Id) -> impl Iterator<Item = u8> {
    let digits: Vec<u8> = id.to_hex().bytes().collect();
    let value = |digit: u8| char::from(digit).to_digit(16).and_then(|it| u8::try_from(it).ok());
    (0..digits.len() / 2).map(move |at| {
        value(digits[at * 2]).unwrap_or(0) << 4 | value(digits[at * 2 + 1]).unwrap_or(0)
    })
}
