//! A repository in a folder.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rustix::fs::{Advice, CWD, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use uuid::Uuid;

use super::{Files, Range};

/// Where files are until they are whole. Their writers hold a lock on them.
const PARTIAL: &str = "tmp";

/// A part that is larger is read only if it is there.
const MOST_UNASKED: u64 = 4 << 20;

/// A folder with the files of a repository. What is written is on disk, name and content, before
/// the call ends.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
}

impl Folder {
    /// The one at this path, which need not be there yet: [`Files::prepare`] makes it.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    fn collect(&self, folder: &Path, found: &mut Vec<(String, u64)>) -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                self.collect(&entry.path(), found)?;
                continue;
            }
            let path = entry.path();
            // What is not UTF-8 was not written by us.
            let name = path.strip_prefix(&self.root).ok().and_then(Path::to_str);
            match (name, entry.metadata()) {
                (Some(name), Ok(meta)) => found.push((name.to_owned(), meta.len())),
                // Deleted meanwhile.
                (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => {}
                (_, Err(error)) => return Err(error),
                (None, Ok(_)) => {}
            }
        }
        Ok(())
    }

    /// A new file without its name, locked.
    fn partial(&self) -> io::Result<(PathBuf, File)> {
        let folder = self.root.join(PARTIAL);
        loop {
            let path = folder.join(Uuid::new_v4().to_string());
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            // What sessions hold is nobody else's business.
            let file = match rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR) {
                // Another program has made the repository.
                Err(Errno::NOENT) if self.root.is_dir() && !folder.is_dir() => {
                    make(&folder)?;
                    continue;
                }
                file => File::from(file?),
            };
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // Whoever sweeps may have taken it for one that was left.
                Ok(()) if rustix::fs::fstat(&file)?.st_nlink > 0 => return Ok((path, file)),
                Ok(()) | Err(Errno::WOULDBLOCK) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn make(folder: &Path) -> io::Result<()> {
    match rustix::fs::mkdir(folder, Mode::RWXU) {
        Err(Errno::EXIST) => Ok(()),
        made => made.map_err(io::Error::from),
    }
}

impl Files for Folder {
    fn place(&self) -> String {
        self.root.display().to_string()
    }

    fn is_far(&self) -> bool {
        false
    }

    fn prepare(&self) -> io::Result<()> {
        fs::create_dir_all(self.root.parent().unwrap_or(&self.root))?;
        make(&self.root)?;
        // The layout that restic and its kin expect.
        for folder in ["data", "index", "keys", "locks", "snapshots", PARTIAL] {
            make(&self.root.join(folder))?;
        }
        for first in 0..=u8::MAX {
            make(&self.root.join(format!("data/{first:02x}")))?;
        }
        sync(&self.root.join("data"))?;
        sync(&self.root)
    }

    fn list(&self, folder: &str) -> io::Result<Vec<(String, u64)>> {
        let mut found = Vec::new();
        self.collect(&self.root.join(folder), &mut found)?;
        Ok(found)
    }

    fn size(&self, name: &str) -> io::Result<Option<u64>> {
        match fs::metadata(self.root.join(name)) {
            Ok(meta) => Ok(Some(meta.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // Not there is one thing, a disk that is not mounted another.
                match fs::metadata(&self.root) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    _ => Ok(None),
                }
            }
            Err(error) => Err(error),
        }
    }

    fn read(&self, name: &str, range: Option<Range>) -> io::Result<Bytes> {
        let mut file = File::open(self.root.join(name))?;
        let Some(Range { offset, mut length }) = range else {
            let mut all = Vec::new();
            file.read_to_end(&mut all)?;
            return Ok(all.into());
        };
        if length > MOST_UNASKED {
            // Nobody shall have us make room for what is not there.
            length = length.min(file.metadata()?.len().saturating_sub(offset));
        }
        let mut part = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        let mut got = 0;
        while got < part.len() {
            match file.read_at(&mut part[got..], offset + got as u64) {
                Ok(0) => break,
                Ok(more) => got += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        part.truncate(got);
        Ok(part.into())
    }

    fn write(&self, name: &str, content: Vec<Bytes>, new: bool) -> io::Result<()> {
        let path = self.root.join(name);
        let folder = path.parent().unwrap_or(&self.root);
        let (partial, mut file) = self.partial()?;
        let mut put = || -> io::Result<()> {
            content.iter().try_for_each(|piece| file.write_all(piece))?;
            file.sync_data()?;
            let flags = if new { RenameFlags::NOREPLACE } else { RenameFlags::empty() };
            let rename = || rustix::fs::renameat_with(CWD, &partial, CWD, &path, flags);
            match rename() {
                // Another program makes its folders when it needs them.
                Err(Errno::NOENT) if self.root.is_dir() && !folder.is_dir() => {
                    make(folder)?;
                    rename()?;
                    sync(folder.parent().unwrap_or(folder))?;
                }
                renamed => renamed?,
            }
            sync(folder)
        };
        let done = put();
        match done {
            // It is read back next, which shall tell what the disk has.
            Ok(()) => drop(rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)),
            // Nothing more can be done about it here; the next sweep does.
            Err(_) => drop(fs::remove_file(&partial)),
        }
        done
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.root.join(name))
    }

    fn sweep(&self) -> io::Result<()> {
        let entries = match fs::read_dir(self.root.join(PARTIAL)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let Ok(file) = rustix::fs::open(&path, flags, Mode::empty()) else { continue };
            if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }
}

/// Makes what was done in a folder durable.
fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
