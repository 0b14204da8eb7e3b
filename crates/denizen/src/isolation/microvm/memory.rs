//! The memory of a guest that sleeps: a file with a line that says what it belongs to, and the
//! rest compressed. It must never be brought back to anything but that: the guest would go on
//! writing to a disk that is not the one it knows.

use std::fs::{self, File, Metadata};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Fast rather than small: it is read again soon, and most of it is zero. The next level takes
/// twice as long both ways, for an eighth less.
const LEVEL: i32 = -1;
/// More than the first line has.
const LINE: u64 = 64 * 1024;

/// What a memory belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    /// What brings it back, on which hardware, with which kernel and root.
    pub(super) machine: String,
    /// The disk it writes to.
    pub(super) disk: DiskState,
}

/// A disk as a guest that stands still has left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DiskState {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
}

impl DiskState {
    /// Fails if it is no regular file.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        if !metadata.is_file() {
            return Err(io::Error::other("the disk is no regular file"));
        }
        Ok(Self::from(&metadata))
    }
}

impl From<&Metadata> for DiskState {
    fn from(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// Where it is while it is being written.
pub(super) fn partial(path: &Path) -> PathBuf {
    path.with_extension("partial")
}

/// Whether an error means that a memory can never be brought back.
pub(super) fn is_unfit(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
}

fn unfit(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Writes a memory, whole or not at all.
pub(super) fn write(
    path: &Path,
    owner: &Owner,
    save: impl FnOnce(&mut (dyn Write + Send)) -> io::Result<()>,
) -> io::Result<()> {
    let partial = partial(path);
    let written = (|| {
        let mut file = File::create(&partial)?;
        serde_json::to_writer(&mut file, owner)?;
        file.write_all(b"\n")?;
        let mut encoder = zstd::Encoder::new(file, LEVEL)?;
        encoder.include_checksum(true)?;
        encoder.multithread(2)?;
        save(&mut encoder)?;
        encoder.finish()?;
        // A power cut may cost it, which is found out by its checksum; the disk is safe.
        fs::rename(&partial, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written
}

/// The memory at that path, if there is one; an error says why it cannot be brought back.
pub(super) fn open(path: &Path, expected: &Owner) -> io::Result<Option<impl Read + Send + use<>>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let (owner, reader) = read_owner(file)?;
    if owner.machine != expected.machine {
        return Err(unfit(
            "it is of another program, kernel, image or set of devices than there is now",
        ));
    }
    if owner.disk != expected.disk {
        return Err(unfit("the disk was changed since"));
    }
    Ok(Some(zstd::Decoder::with_buffer(reader)?))
}

/// Copies a memory to a disk that is a copy of its own. One that does not belong to its own is
/// left out.
pub(super) fn copy(from: &Path, of: DiskState, into: &Path, disk: DiskState) -> io::Result<()> {
    let (owner, mut reader) = read_owner(File::open(from)?)?;
    if owner.disk != of {
        return Ok(());
    }
    let mut file = File::create_new(into)?;
    serde_json::to_writer(&mut file, &Owner { disk, ..owner })?;
    file.write_all(b"\n")?;
    io::copy(&mut reader, &mut file).map(drop)
}

fn read_owner(file: File) -> io::Result<(Owner, BufReader<File>)> {
    let mut reader = BufReader::with_capacity(1 << 17, file);
    let mut line = Vec::new();
    reader.by_ref().take(LINE).read_until(b'\n', &mut line)?;
    Ok((serde_json::from_slice(&line)?, reader))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn owner(folder: &Path) -> Owner {
        let disk = folder.join("disk");
        if !disk.exists() {
            fs::write(&disk, "disk").unwrap();
        }
        Owner { machine: "this".to_owned(), disk: DiskState::of(&disk).unwrap() }
    }

    fn content(path: &Path, owner: &Owner) -> io::Result<Option<Vec<u8>>> {
        let Some(mut memory) = open(path, owner)? else { return Ok(None) };
        let mut all = Vec::new();
        memory.read_to_end(&mut all)?;
        Ok(Some(all))
    }

    #[test]
    fn it_is_brought_back_to_what_it_belongs_to_only() {
        let folder = tempfile::tempdir().unwrap();
        let (path, owner) = (folder.path().join("memory"), owner(folder.path()));
        assert_eq!(content(&path, &owner).unwrap(), None);
        write(&path, &owner, |into| into.write_all(&[7; 1 << 20])).unwrap();
        assert!(fs::metadata(&path).unwrap().len() < 4096, "it is compressed");
        assert_eq!(content(&path, &owner).unwrap().unwrap(), [7; 1 << 20]);
        let other = Owner { machine: "that".to_owned(), ..owner.clone() };
        assert!(content(&path, &other).unwrap_err().to_string().contains("another program"));
        fs::write(folder.path().join("disk"), "more").unwrap();
        let now = Owner { disk: DiskState::of(&folder.path().join("disk")).unwrap(), ..owner };
        assert!(content(&path, &now).unwrap_err().to_string().contains("disk was changed"));
    }

    #[test]
    fn half_of_it_is_noticed_and_a_failed_one_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let (path, owner) = (folder.path().join("memory"), owner(folder.path()));
        let failing = write(&path, &owner, |into| {
            into.write_all(&[7; 1 << 20])?;
            Err(io::Error::other("no more"))
        });
        failing.unwrap_err();
        assert_eq!(content(&path, &owner).unwrap(), None);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "only the disk");
        let noise: Vec<u8> = (0..1 << 20)
            .map(|number: u32| number.wrapping_mul(2_654_435_761).to_le_bytes()[3])
            .collect();
        write(&path, &owner, |into| into.write_all(&noise)).unwrap();
        let length = fs::metadata(&path).unwrap().len();
        File::options().write(true).open(&path).unwrap().set_len(length - 100).unwrap();
        content(&path, &owner).unwrap_err();
        fs::write(&path, "no line").unwrap();
        content(&path, &owner).unwrap_err();
    }

    #[test]
    fn a_copy_belongs_to_a_copy() {
        let folder = tempfile::tempdir().unwrap();
        let (path, owner) = (folder.path().join("memory"), owner(folder.path()));
        write(&path, &owner, |into| into.write_all(b"memory")).unwrap();
        fs::copy(folder.path().join("disk"), folder.path().join("another")).unwrap();
        let disk = DiskState::of(&folder.path().join("another")).unwrap();
        let copied = folder.path().join("copied");
        copy(&path, disk, &copied, disk).unwrap();
        assert!(!copied.exists(), "it is of another disk");
        copy(&path, owner.disk, &copied, disk).unwrap();
        content(&copied, &owner).unwrap_err();
        assert_eq!(content(&copied, &Owner { disk, ..owner }).unwrap().unwrap(), b"memory");
    }
}
