//! What the tests share: random trees, a complete picture of a tree, hand-made archives.
#![allow(clippy::unwrap_used, dead_code)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use denizen_archive::{Error, Restored, Written};
use jiff::Timestamp;
use rustix::fs::{AtFlags, CWD, FileType, Mode, SeekFrom, Timespec, Timestamps};
use uuid::Uuid;

pub const SESSION: Uuid = Uuid::from_u128(0x0123_4567_89ab_4def_8123_4567_89ab_cdef);
pub static NEVER: AtomicBool = AtomicBool::new(false);

pub fn now() -> Timestamp {
    "2026-02-03T04:05:06.789Z".parse().unwrap()
}

pub fn write(volume: &Path, destination: &Path) -> Result<Written, Error> {
    denizen_archive::write(volume, destination, SESSION, now(), &NEVER)
}

pub fn restore(archive: &Path, into: &Path) -> Result<Restored, Error> {
    denizen_archive::restore(archive, into, &NEVER)
}

/// A folder for a test with a `volume` and a `destination` in it.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub volume: PathBuf,
    pub destination: PathBuf,
    pub into: PathBuf,
}

impl Bench {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("volume");
        let destination = dir.path().join("destination");
        let into = dir.path().join("into");
        fs::create_dir(&volume).unwrap();
        fs::create_dir(&destination).unwrap();
        Self { dir, volume, destination, into }
    }

    pub fn left_in_destination(&self) -> Vec<PathBuf> {
        fs::read_dir(&self.destination).unwrap().map(|e| e.unwrap().path()).collect()
    }

    /// A file no archive may reach.
    pub fn outside(&self) -> PathBuf {
        let path = self.dir.path().join("outside");
        fs::write(&path, "untouched").unwrap();
        path
    }
}

/// Everything about one name that a backup must bring back.
#[derive(Debug, PartialEq, Eq)]
pub struct Node {
    kind: String,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first name of the same inode.
    same_as: Vec<u8>,
    links: u64,
    /// Content, or a link's target.
    content: Vec<u8>,
    /// Where a file's data lies.
    data: Vec<(u64, u64)>,
}

pub fn picture(root: &Path) -> BTreeMap<Vec<u8>, Node> {
    let mut nodes = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    look(root, root, &mut nodes, &mut inodes);
    nodes
}

fn look(
    root: &Path,
    path: &Path,
    nodes: &mut BTreeMap<Vec<u8>, Node>,
    inodes: &mut BTreeMap<u64, Vec<u8>>,
) {
    let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
    let meta = fs::symlink_metadata(path).unwrap();
    let kind = meta.file_type();
    let mut xattrs = BTreeMap::new();
    for key in xattr::list(path).into_iter().flatten() {
        let value = xattr::get(path, &key).unwrap().unwrap();
        xattrs.insert(key.as_bytes().to_vec(), value);
    }
    let (content, data) = if kind.is_symlink() {
        (fs::read_link(path).unwrap().into_os_string().into_vec(), Vec::new())
    } else if kind.is_file() {
        let data = stretches(path);
        let file = File::open(path).unwrap();
        let mut content = Vec::new();
        for &(offset, length) in &data {
            let mut piece = vec![0; usize::try_from(length).unwrap()];
            file.read_exact_at(&mut piece, offset).unwrap();
            content.extend(piece);
        }
        content.extend(meta.len().to_le_bytes());
        (content, data)
    } else {
        (Vec::new(), Vec::new())
    };
    let node = Node {
        kind: format!("{kind:?}"),
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        xattrs,
        same_as: if kind.is_dir() {
            Vec::new()
        } else {
            inodes.entry(meta.ino()).or_insert_with(|| name.clone()).clone()
        },
        links: meta.nlink(),
        content,
        data,
    };
    nodes.insert(name, node);
    if kind.is_dir() {
        let mut below: Vec<_> = fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect();
        below.sort();
        for path in below {
            look(root, &path, nodes, inodes);
        }
    }
}

pub fn stretches(path: &Path) -> Vec<(u64, u64)> {
    let file = File::open(path).unwrap();
    let mut found = Vec::new();
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(&file, SeekFrom::Data(at)) {
        at = rustix::fs::seek(&file, SeekFrom::Hole(start)).unwrap();
        found.push((start, at - start));
    }
    found
}

pub fn compare(a: &Path, b: &Path) {
    let (a, b) = (picture(a), picture(b));
    for (name, node) in &a {
        assert_eq!(Some(node), b.get(name), "{:?}", String::from_utf8_lossy(name));
    }
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
}

/// xorshift64*; good enough to make trees, and the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(count).collect()
    }

    fn name(&mut self) -> Vec<u8> {
        let length = self.pick(&[1, 2, 5, 8, 8, 12, 60, 99, 100, 101, 200, 255]);
        let plain = self.below(3) > 0;
        loop {
            let name: Vec<u8> = (0..length)
                .map(|_| {
                    if plain {
                        self.pick(b"abcdefghijklmnopqrstuvwxyz0123456789")
                    } else {
                        self.pick(b"ab \n\t\\\"'*?=%\x01\x7f\x80\xc3\xff-._")
                    }
                })
                .collect();
            if name != b"." && name != b".." {
                return name;
            }
        }
    }
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

pub fn set_mtime(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

pub fn fifo(path: &Path) {
    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}

/// Fills `root` with about `count` entries of every kind.
pub fn random_tree(root: &Path, seed: u64, count: usize) {
    let random = &mut Random::new(seed);
    let mut folders = vec![root.to_path_buf()];
    let mut others: Vec<PathBuf> = Vec::new();
    let mut kinds = BTreeMap::new();
    while kinds.len() < count {
        let folder = folders[usize::try_from(random.below(folders.len() as u64)).unwrap()].clone();
        let path = folder.join(OsStr::from_bytes(&random.name()));
        if path.as_os_str().len() > 3500 || fs::symlink_metadata(&path).is_ok() {
            continue;
        }
        match random.below(20) {
            0..4 => {
                fs::create_dir(&path).unwrap();
                folders.push(path.clone());
                kinds.insert(path, 'd');
                continue;
            }
            4..7 => {
                let length = random.pick(&[1, 20, 99, 100, 101, 300, 4000]);
                let mut target = random.bytes(length);
                target.iter_mut().for_each(|b| *b = (*b).max(1));
                symlink(OsStr::from_bytes(&target), &path).unwrap();
                kinds.insert(path.clone(), 'l');
            }
            7 => {
                fifo(&path);
                kinds.insert(path.clone(), 'p');
            }
            8..11 if !others.is_empty() => {
                let which = usize::try_from(random.below(others.len() as u64)).unwrap();
                fs::hard_link(&others[which], &path).unwrap();
                continue;
            }
            11..13 => {
                let file = File::create(&path).unwrap();
                let size = random.below(3 << 20);
                file.set_len(size).unwrap();
                for _ in 0..random.below(6) {
                    let length = usize::try_from(random.below(9000)).unwrap();
                    let piece = random.bytes(length);
                    file.write_all_at(&piece, random.below(2 << 20)).unwrap();
                }
                kinds.insert(path.clone(), 'f');
            }
            _ => {
                let size = random.pick(&[0, 1, 511, 512, 513, 4096, 20_000, 262_144, 700_001]);
                let content = if random.below(2) == 0 { random.bytes(size) } else { vec![7; size] };
                fs::write(&path, content).unwrap();
                kinds.insert(path.clone(), 'f');
            }
        }
        others.push(path);
    }
    // Deepest first, so that a directory's own time is set when all is in it.
    kinds.insert(root.to_path_buf(), 'd');
    for (path, kind) in kinds.iter().rev() {
        if *kind != 'l' {
            if *kind != 'p' {
                for _ in 0..random.below(3) {
                    let key = format!(
                        "user.{}{}",
                        random.pick(&["a", "b=c", "%d", "é", "x%3D"]),
                        random.below(9)
                    );
                    let length = usize::try_from(random.below(300)).unwrap();
                    let value = random.bytes(length);
                    xattr::set(path, key, &value).unwrap();
                }
            }
            if is_root() && random.below(3) == 0 {
                let id =
                    |random: &mut Random| random.pick(&[0_u32, 1, 1000, 2_097_152, 4_000_000_000]);
                let (uid, gid) = (id(random), id(random));
                std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
            }
            let floor = if *kind == 'd' { 0o700 } else { 0o400 };
            let mode = u32::try_from(random.below(0o10000)).unwrap();
            let mode = if is_root() { mode } else { mode & 0o1777 | floor };
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
        let seconds = random.pick(&[-86_401, -1, 0, 1, 1_700_000_000, 1 << 33]);
        let nanoseconds = random.pick(&[0, 1, 999_999_999, 123_456_789]);
        set_mtime(path, seconds, nanoseconds);
    }
}

/// The tar stream in an archive.
pub fn unpacked(archive: &Path) -> Vec<u8> {
    zstd::decode_all(File::open(archive).unwrap()).unwrap()
}

/// One hand-made entry.
pub struct Raw<'a> {
    pub name: &'a str,
    pub kind: u8,
    pub link: &'a str,
    pub content: &'a [u8],
}

impl Raw<'_> {
    pub fn new(name: &str, kind: u8) -> Raw<'_> {
        Raw { name, kind, link: "", content: b"" }
    }
}

/// A header made with the `tar` crate, not with the code under test.
pub fn raw_header(name: &[u8], kind: u8, link: &[u8], size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    {
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name);
        old.linkname[..link.len()].copy_from_slice(link);
    }
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    if matches!(kind, b'3' | b'4') {
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
    }
    header.set_cksum();
    header
}

/// A tar stream of hand-made entries, without its end.
pub fn raw_stream(entries: &[Raw<'_>]) -> Vec<u8> {
    let mut stream = Vec::new();
    for entry in entries {
        let size = entry.content.len() as u64;
        let header = raw_header(entry.name.as_bytes(), entry.kind, entry.link.as_bytes(), size);
        stream.extend_from_slice(header.as_bytes());
        stream.extend_from_slice(entry.content);
        stream.resize(stream.len().next_multiple_of(512), 0);
    }
    stream
}

pub fn pack(path: &Path, stream: &[u8]) {
    fs::write(path, zstd::encode_all(stream, 1).unwrap()).unwrap();
}

/// Runs the test `child` of this test binary in another process, told what to do.
pub fn in_child(task: &str, arguments: &[&Path]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture", "--test-threads=1"]);
    command.env("DENIZEN_ARCHIVE_TASK", task);
    for (index, argument) in arguments.iter().enumerate() {
        command.env(format!("DENIZEN_ARCHIVE_{index}"), argument);
    }
    command
}

pub fn argument(index: usize) -> PathBuf {
    std::env::var_os(format!("DENIZEN_ARCHIVE_{index}")).unwrap().into()
}
