//! The file systems that guests have, made as files by `mke2fs(8)` within a sandbox: images'
//! roots, denizen's own program, and the empty ones that sessions begin with. The host's kernel
//! never mounts one of them: what a guest has written is for a guest to read.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use denizen_agent::{Agent, Exit, Spec};
use rustix::fs::CWD;
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use tokio::runtime::Handle;
use uuid::Uuid;

use super::super::sandbox::carried::Carried;
use super::super::sandbox::root::{Base, Below};
use super::super::sandbox::{Fittings, Sandbox, TREE};
use super::super::{DISK, Driver, Limits, Site};
use super::hypervisor;
use crate::error::{Error, Result};

/// A program that makes disks.
struct Program {
    path: &'static str,
    package: &'static str,
}

const MKE2FS: Program = Program { path: "/usr/sbin/mke2fs", package: "e2fsprogs" };
const QEMU_IMG: Program = Program { path: "/usr/bin/qemu-img", package: "qemu-utils" };

/// What a block is for all of them, and what they are made with.
const BLOCK: u64 = 4096;
const EXT4: [&str; 8] = ["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0"];
/// What all of them have: nothing that a kernel of today lacks.
const FEATURES: &str = "none,64bit,dir_index,dir_nlink,extent,ext_attr,extra_isize,filetype,\
                        flex_bg,huge_file,large_file,metadata_csum,sparse_super";
/// And what those have that are written to; they can grow at any time.
const SESSION_FEATURES: &str = "none,64bit,dir_index,dir_nlink,extent,ext_attr,extra_isize,\
                                filetype,flex_bg,has_journal,huge_file,large_file,meta_bg,\
                                metadata_csum,sparse_super";

/// What a disk is made of, beside it.
const PARTIAL: [&str; 2] = ["disk.raw", "disk.partial"];

/// How long a program may take that makes disks.
const LONGEST: Duration = Duration::from_mins(10);

/// How long what can be made again is kept that nobody has used.
const UNUSED: Duration = Duration::from_hours(30 * 24);

/// Where they are kept.
pub(super) struct Disks<'a> {
    pub(super) sandbox: &'a Sandbox,
    /// The folder, which other processes of this user may use too: what is in it has its name
    /// only when it is whole, and never changes.
    pub(super) folder: &'a Path,
}

/// A place in which something is made, cleared away when this is dropped.
pub(super) struct Place {
    pub(super) site: Site,
    /// Says that somebody is at work there.
    lock: (PathBuf, File),
}

impl Drop for Place {
    fn drop(&mut self) {
        clear(&self.site);
        let _ = fs::remove_file(&self.lock.0);
    }
}

impl Disks<'_> {
    /// The root of a base as a disk, made if there is none yet; and what no other one is known by.
    pub(super) fn root(&self, base: &Base) -> Result<(PathBuf, String)> {
        let below = match base {
            Base::Host => {
                return Err(Error::Isolation {
                    isolation: "microvm",
                    problem: "a session here needs an image as its root: `denizen image pull` or \
                              `denizen image import` one and set `image`, or set it to a folder"
                        .to_owned(),
                });
            }
            base => self.sandbox.roots().below(base)?,
        };
        let [mut below] = <[Below; 1]>::try_from(below).map_err(|_| Error::Isolation {
            isolation: "microvm",
            problem: "its root is not one tree".to_owned(),
        })?;
        // Its own folders are named after it.
        below.target = TREE.into();
        let look = |layer: &Path, sum: Option<&mut Sha256>| {
            walk(layer, sum).map_err(|source| Error::volume("read", layer, source))
        };
        let mut sum = Sha256::new();
        for layer in &below.lower {
            if matches!(base, Base::Folder { .. }) {
                sum.update(layer.as_os_str().as_bytes());
                look(layer, Some(&mut sum))?;
            } else {
                // A layer of an image never changes, and is kept by its digest.
                let digest = layer.parent().and_then(Path::file_name).unwrap_or_default();
                sum.update(digest.as_bytes());
            }
        }
        let disk = self.folder.join(format!("root-{}", key(sum)));
        if disk.exists() {
            return labelled(disk);
        }
        let (mut bytes, mut files) = (0, 0);
        for layer in &below.lower {
            let (more, count) = look(layer, None)?;
            bytes += more;
            files += count;
        }
        // Its unused end is a hole.
        let size = bytes * 5 / 4 + files * 1024 + (64 << 20);
        let inodes = (files + 1024).to_string();
        let fittings = Fittings { tree: Some(below), ..Self::fittings() };
        let words = ["-d", TREE, "-O", FEATURES, "-N", &inodes];
        self.make(&disk, &fittings, &words, size, |_| Ok(()))?;
        labelled(disk)
    }

    /// denizen's own program as a disk, made if there is none of it yet; and what no other one is
    /// known by.
    pub(super) fn tools(&self, carried: &Carried) -> Result<(PathBuf, String)> {
        let failed = |source| Error::volume("keep this program in", self.folder, source);
        let mut sum = Sha256::new();
        let mut size = 16 << 20;
        for path in carried.files() {
            size += digest(path, &mut sum).map_err(failed)? * 9 / 8;
            sum.update(path.file_name().unwrap_or_default().as_bytes());
        }
        let disk = self.folder.join(format!("tools-{}", key(sum)));
        if disk.exists() {
            return labelled(disk);
        }
        let mut command: Vec<u8> = Vec::new();
        for word in carried.command().into_iter().chain(["guest".into()]) {
            command.extend(word.as_bytes());
            command.push(0);
        }
        let fill = |volume: &Path| {
            let tree = volume.join("tree");
            fs::create_dir(&tree)?;
            for path in carried.files() {
                let into = tree.join(path.file_name().unwrap_or_default());
                fs::copy(path, &into)?;
                self.sandbox.give(&into)?;
            }
            fs::write(tree.join("command"), &command)?;
            self.sandbox.give(&tree.join("command"))?;
            self.sandbox.give(&tree)
        };
        let words = ["-d", "/volume/tree", "-O", FEATURES];
        self.make(&disk, &Self::fittings(), &words, size, fill)?;
        labelled(disk)
    }

    /// Makes a session's empty disk, with what makes sandboxes there. In a format that has no room
    /// for what is not there: what reads it need not read 20 GiB of nothing.
    pub(super) fn empty(agent: &Agent, site: &Site, size: u64) -> Result<()> {
        let failed = |source| Error::volume("make a disk in", &site.home, source);
        site.note_disk().map_err(failed)?;
        Self::disk_of(agent, &site.volume, &[], size)
    }

    /// Makes a disk in a folder; `words` may have mke2fs take something along.
    fn disk_of(agent: &Agent, volume: &Path, words: &[&str], size: u64) -> Result<()> {
        let failed = |source| Error::volume("make a disk in", volume, source);
        clear_partial(volume);
        let size = (size / BLOCK).to_string();
        let mut mke2fs = EXT4.to_vec();
        mke2fs.extend(["-O", SESSION_FEATURES]);
        mke2fs.extend(words);
        // Both tables are made when they are needed.
        mke2fs.extend(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"]);
        mke2fs.extend(["/volume/disk.raw", &size]);
        let convert = ["convert", "-f", "raw", "-O", "qcow2"];
        let convert = [&convert[..], &["/volume/disk.raw", "/volume/disk.partial"]].concat();
        let made = run(agent, &MKE2FS, &mke2fs)
            .and_then(|()| run(agent, &QEMU_IMG, &convert))
            .and_then(|()| fs::rename(volume.join(PARTIAL[1]), volume.join(DISK)).map_err(failed));
        clear_partial(volume);
        made
    }

    /// Makes a disk of what a session has as files: those of another isolation, or of an import.
    /// They go in the instant in which the disk is there.
    pub(super) fn adopt(&self, site: &Site, size: u64) -> Result<()> {
        let failed = |source| Error::volume("make a disk of the files in", &site.home, source);
        let new = site.home.join("volume.new");
        let changes = Sandbox::changes(site);
        // Of a process that was killed, before that instant or after it.
        crate::volume::remove_tree(&new).map_err(failed)?;
        if site.has_disk() {
            return crate::volume::remove_tree(&changes).map_err(failed);
        }
        if site.is_to_have_disk() {
            clear_partial(&site.volume);
        }
        let mut names = fs::read_dir(&site.volume).map_err(failed)?;
        if names.next().is_none() && !changes.exists() {
            return Ok(());
        }
        tracing::info!(session = %site.id, "its files become a disk");
        fs::create_dir(&new).and_then(|()| self.sandbox.give(&new)).map_err(failed)?;
        let place = Site { volume: new.clone(), ..site.machine() };
        fs::create_dir_all(&place.home).map_err(failed)?;
        let mut files = vec![(site.volume.clone(), "/run/tree/volume")];
        if changes.exists() {
            files.push((changes.clone(), "/run/tree/root"));
        }
        let agent = self.sandbox.for_program(&place, &Fittings { files, ..Self::fittings() })?;
        let made = Self::disk_of(&agent, &new, &["-d", TREE], size);
        let _ = Handle::current().block_on(agent.shutdown(Duration::ZERO));
        Driver::ended(self.sandbox, &place);
        made?;
        File::open(new.join(DISK)).and_then(|file| file.sync_all()).map_err(failed)?;
        site.note_disk().and_then(|()| exchange(&new, &site.volume)).map_err(failed)?;
        [&new, &changes]
            .into_iter()
            .try_for_each(|tree| crate::volume::remove_tree(tree))
            .map_err(failed)
    }

    /// Has a session's disk be as large as it may be; it never gets smaller. The guest sees to
    /// the rest.
    pub(super) fn grow(agent: &Agent, site: &Site, size: u64) -> Result<()> {
        let disk = site.disk();
        let has = size_of(&disk).map_err(|source| Error::volume("read", &disk, source))?;
        if has >= size {
            return Ok(());
        }
        let inside = hypervisor::DISK;
        run(agent, &QEMU_IMG, &["resize", "-q", "-f", "qcow2", inside, &size.to_string()])
    }

    /// Makes a disk, whole or not at all, of what `fill` puts into the volume of a sandbox.
    fn make(
        &self,
        disk: &Path,
        fittings: &Fittings,
        words: &[&str],
        size: u64,
        fill: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<()> {
        let place = self.begin()?;
        let site = &place.site;
        let failed = |source| Error::volume("make a disk in", &site.home, source);
        fill(&site.volume).map_err(failed)?;
        let agent = self.sandbox.for_program(site, fittings)?;
        let size = size.div_ceil(BLOCK).to_string();
        let last = ["-E", "root_owner=0:0,nodiscard", "/volume/made", &size];
        let words = [&EXT4[..], words, &last].concat();
        let ran = run(&agent, &MKE2FS, &words);
        let _ = Handle::current().block_on(agent.shutdown(Duration::ZERO));
        Driver::ended(self.sandbox, site);
        ran?;
        let made = site.volume.join("made");
        File::open(&made).and_then(|file| file.sync_all()).map_err(failed)?;
        // Another process may have made one, which is in use then, and is not quite the same.
        let flags = rustix::fs::RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(CWD, &made, CWD, disk, flags) {
            Err(Errno::EXIST) => Ok(()),
            renamed => renamed.map_err(|errno| failed(errno.into())),
        }
    }

    /// What a sandbox has for `mke2fs`.
    fn fittings() -> Fittings {
        Fittings { limits: Limits::none(), ..Fittings::default() }
    }

    /// A place in which something can be made.
    pub(super) fn begin(&self) -> Result<Place> {
        let id = Uuid::new_v4();
        let site = Site::in_folder(id, self.folder.join(format!("made-{id}")));
        let failed = |source| Error::volume("make", &site.home, source);
        // It has its name only when it is locked.
        let path = site.home.with_extension("lock");
        let partial = site.home.with_extension("locking");
        let lock = File::create_new(&partial).map_err(failed)?;
        lock.lock().and_then(|()| fs::rename(&partial, &path)).map_err(failed)?;
        let place = Place { site, lock: (path, lock) };
        let failed = |source| Error::volume("make", &place.site.home, source);
        fs::create_dir_all(&place.site.volume).map_err(failed)?;
        self.sandbox.give(&place.site.volume).map_err(failed)?;
        Ok(place)
    }

    /// Clears away what a process that was killed has left half-made, and what nobody has used
    /// for long.
    pub(super) fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.folder)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let id = name.strip_prefix("made-").and_then(|name| name.strip_suffix(".lock"));
            let Some(id) = id else {
                let is_old = |used: SystemTime| used.elapsed().is_ok_and(|since| since > UNUSED);
                // Others sweep too.
                let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
                if metadata.modified().is_ok_and(is_old) {
                    tracing::info!(?path, "not used for a month: removed");
                    crate::volume::remove_tree(&path)?;
                }
                continue;
            };
            let (Ok(id), Ok(lock)) = (id.parse(), File::open(&path)) else { continue };
            if lock.try_lock().is_ok() {
                let site = Site::in_folder(id, path.with_extension(""));
                let first = [site.recorded_init(), site.machine().recorded_init()];
                denizen_agent::sweep(&first.into_iter().flatten().collect::<Vec<_>>());
                for site in [&site, &site.machine()] {
                    Driver::ended(self.sandbox, site);
                }
                drop(Place { site, lock: (path, lock) });
            }
        }
        Ok(())
    }
}

/// A disk of ours with what tells it from all others, also from those made of the same: the UUID
/// that it was given (Documentation/filesystems/ext4/super.rst of Linux).
fn labelled(disk: PathBuf) -> Result<(PathBuf, String)> {
    let mut uuid = [0; 16];
    let read = File::open(&disk).and_then(|file| file.read_exact_at(&mut uuid, 1024 + 0x68));
    read.map_err(|source| Error::volume("read", &disk, source))?;
    Ok((disk, Uuid::from_bytes(uuid).to_string()))
}

/// Notes that something is used.
pub(super) fn used(path: &Path) -> io::Result<()> {
    let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
    let now = rustix::fs::Timestamps { last_access: now, last_modification: now };
    Ok(rustix::fs::utimensat(CWD, path, &now, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?)
}

fn clear(site: &Site) {
    if let Err(error) = crate::volume::remove_tree(&site.home) {
        tracing::warn!(folder = ?site.home, %error, "cannot be cleared");
    }
}

/// How large a guest sees such a disk (docs/interop/qcow2.txt of QEMU).
fn size_of(disk: &Path) -> io::Result<u64> {
    let mut head = [0; 32];
    File::open(disk)?.read_exact(&mut head)?;
    let size = head.last_chunk().ok_or(io::ErrorKind::InvalidData)?;
    if !head.starts_with(b"QFI\xfb") {
        return Err(io::Error::other("it is no disk of a session's"));
    }
    Ok(u64::from_be_bytes(*size))
}

/// Clears away what a disk was being made of.
fn clear_partial(volume: &Path) {
    for name in PARTIAL {
        // It need not be there.
        let _ = fs::remove_file(volume.join(name));
    }
}

/// Has two folders have each other's names.
pub(super) fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    Ok(rustix::fs::renameat_with(CWD, one, CWD, other, rustix::fs::RenameFlags::EXCHANGE)?)
}

/// Runs a program that makes disks.
fn run(agent: &Agent, program: &Program, words: &[&str]) -> Result<()> {
    let failed = |problem: String| Error::Isolation { isolation: "microvm", problem };
    let ran = async {
        let spec = Spec {
            args: words.iter().map(OsString::from).collect(),
            ..Spec::new(program.path, "/volume")
        };
        let mut child = agent.spawn(spec).await?;
        let mut said = Vec::new();
        if let Some(mut output) = child.take_output() {
            while let Some(chunk) = output.next().await? {
                said.extend_from_slice(&chunk.bytes);
                said.truncate(4096);
            }
        }
        Ok::<_, denizen_agent::Error>((child.wait().await?, said))
    };
    // Whoever waits for it is in the way of others.
    let Ok(ran) = Handle::current().block_on(async { tokio::time::timeout(LONGEST, ran).await })
    else {
        return Err(failed(format!("{} does not come to an end", program.path)));
    };
    match ran {
        Ok((Exit::Code(0), _)) => Ok(()),
        Ok((exit, said)) => {
            let (said, code) = (String::from_utf8_lossy(&said), exit.code());
            Err(failed(format!("{} cannot make a disk ({code}): {}", program.path, said.trim())))
        }
        Err(denizen_agent::Error::ProgramNotFound { .. }) => Err(failed(format!(
            "there is no {} to make disks with: apt-get install {}",
            program.path, program.package
        ))),
        Err(error) => Err(error.into()),
    }
}

/// The bytes and files of a tree; with a sum, also what can be seen of its changes.
fn walk(tree: &Path, mut sum: Option<&mut Sha256>) -> io::Result<(u64, u64)> {
    let (mut bytes, mut files) = (0, 0);
    let mut folders = vec![tree.to_owned()];
    while let Some(folder) = folders.pop() {
        let mut entries = fs::read_dir(&folder)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_unstable_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let metadata = entry.metadata()?;
            if let Some(sum) = sum.as_deref_mut() {
                sum.update(entry.path().as_os_str().as_bytes());
                for part in [
                    metadata.len(),
                    metadata.mtime().cast_unsigned(),
                    metadata.mtime_nsec().cast_unsigned(),
                    metadata.ino(),
                    u64::from(metadata.mode()),
                ] {
                    sum.update(part.to_le_bytes());
                }
            }
            bytes += metadata.len().next_multiple_of(BLOCK);
            files += 1;
            if metadata.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    Ok((bytes, files))
}

/// Adds what a file has, and gives how much that is.
fn digest(path: &Path, sum: &mut Sha256) -> io::Result<u64> {
    let (mut file, mut piece, mut bytes) = (File::open(path)?, vec![0; 1 << 18], 0);
    loop {
        let count = file.read(&mut piece)?;
        if count == 0 {
            return Ok(bytes);
        }
        sum.update(piece.get(..count).unwrap_or_default());
        bytes += count as u64;
    }
}

/// What a sum is known by: the first half of it, which is enough for a name.
pub(super) fn key(sum: Sha256) -> String {
    hex(sum.finalize().get(..16).unwrap_or_default())
}

/// Bytes as digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
