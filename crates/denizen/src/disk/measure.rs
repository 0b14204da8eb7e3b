//! How much of the disk trees take that others are changing at the same time, and that may have
//! been made to be hard to walk: by descriptor, never through a link or into another mount, with
//! few descriptors and little memory whatever their depth and width. What vanishes or moves
//! while this looks is missed or counted twice; nothing here fails for it. It must never leave
//! anything changed.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::{Errno, Result};

/// What every file counts for at least, its inode's share of the disk: or a session could take
/// all inodes of the file system with empty files.
pub(crate) const LEAST: u64 = 4096;
/// How many folders are held open at the top of a deep tree, and how many at the bottom.
const OPEN: usize = 32;

/// Bytes allocated to everything below these folders; a little more than `enough` if there is
/// more than that. A folder that is not there has none.
pub(crate) fn used<'p>(trees: impl IntoIterator<Item = &'p Path>, enough: u64) -> u64 {
    let mut sum = 0;
    for tree in trees {
        if let Ok(top) = Folder::open(CWD, tree.as_os_str(), ResolveFlags::empty()) {
            walk(top, enough, &mut sum);
        }
    }
    sum
}

/// Which file system a folder is on.
pub(crate) fn device(folder: &Path) -> Option<(u32, u32)> {
    let found = rustix::fs::statx(CWD, folder, AtFlags::empty(), StatxFlags::BASIC_STATS).ok()?;
    Some((found.stx_dev_major, found.stx_dev_minor))
}

/// A folder on the way down.
struct Folder {
    which: Identity,
    /// None while the walk is far below.
    open: Option<Open>,
    /// Where to go on reading (`telldir(3)`).
    position: i64,
}

#[derive(PartialEq, Eq)]
struct Identity(u32, u32, u64);

struct Open {
    entries: Dir,
    handle: Handle,
}

/// A folder whose mode is put right again when this is dropped.
struct Handle {
    fd: OwnedFd,
    mode: Option<Mode>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Some(mode) = self.mode {
            // If this fails, its owner within can do it as well.
            let _ = rustix::fs::fchmod(&self.fd, mode);
        }
    }
}

fn walk(top: Folder, enough: u64, sum: &mut u64) {
    let mut path = vec![top];
    while let Some(here) = path.last_mut() {
        let Some(open) = &mut here.open else {
            // What was below has been moved, and so the way back up is lost.
            path.pop();
            continue;
        };
        let Some(Ok(entry)) = open.entries.next() else {
            let done = path.pop();
            if let (Some(Folder { open: Some(done), .. }), Some(above)) = (done, path.last_mut())
                && above.open.is_none()
            {
                above.reopen(&done.handle.fd);
            }
            continue;
        };
        here.position = entry.offset();
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let fd = open.handle.fd.as_fd();
        let Ok(found) = rustix::fs::statx(fd, name, flags, StatxFlags::BASIC_STATS) else {
            continue;
        };
        *sum = sum.saturating_add(size(&found));
        if *sum > enough {
            return;
        }
        if FileType::from_raw_mode(found.stx_mode.into()) == FileType::Directory {
            let name = OsStr::from_bytes(name.to_bytes());
            if let Ok(below) = Folder::open(fd, name, ResolveFlags::NO_XDEV) {
                if let Some(far) = path.len().checked_sub(OPEN).filter(|far| *far >= OPEN) {
                    path[far].open = None;
                }
                path.push(below);
            }
        }
    }
}

/// What a file counts for. One with many names counts in parts, so that none has to be
/// remembered.
fn size(found: &Statx) -> u64 {
    let size = found.stx_blocks.saturating_mul(512).max(LEAST);
    match FileType::from_raw_mode(found.stx_mode.into()) {
        FileType::Directory => size,
        _ => size / u64::from(found.stx_nlink.max(1)),
    }
}

impl Folder {
    fn open(at: impl AsFd, name: &OsStr, way: ResolveFlags) -> Result<Self> {
        let handle = Handle::open(at, name, way | ResolveFlags::NO_MAGICLINKS)?;
        let flags = AtFlags::EMPTY_PATH;
        let found = rustix::fs::statx(&handle.fd, c"", flags, StatxFlags::BASIC_STATS)?;
        let which = Identity(found.stx_dev_major, found.stx_dev_minor, found.stx_ino);
        let open = Some(Open { entries: Dir::read_from(&handle.fd)?, handle });
        Ok(Self { which, open, position: 0 })
    }

    /// Opens it again by way of one below, unless that is elsewhere by now.
    fn reopen(&mut self, below: &OwnedFd) {
        if let Ok(Self { which, open: Some(mut open), .. }) =
            Self::open(below, OsStr::new(".."), ResolveFlags::NO_XDEV)
            && which == self.which
            && open.entries.seek(self.position).is_ok()
        {
            self.open = Some(open);
        }
    }
}

impl Handle {
    /// Opens a folder. Where this is an ordinary user, root of a sandbox can shut a folder and
    /// go on writing there: its owner outside opens it for the time of the look.
    fn open(at: impl AsFd, name: &OsStr, way: ResolveFlags) -> Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = |how| rustix::fs::openat2(at.as_fd(), name, flags | how, Mode::empty(), way);
        let needed = Mode::RUSR | Mode::XUSR;
        match open(OFlags::RDONLY) {
            Ok(fd) => {
                let mode = Mode::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
                let shut = !mode.contains(needed)
                    && !rustix::process::geteuid().is_root()
                    && rustix::fs::fchmod(&fd, mode | needed).is_ok();
                Ok(Self { fd, mode: shut.then_some(mode) })
            }
            Err(Errno::ACCESS) => {
                let found = open(OFlags::PATH)?;
                let mode = Mode::from_raw_mode(rustix::fs::fstat(&found)?.st_mode);
                let itself = format!("/proc/self/fd/{}", found.as_raw_fd());
                rustix::fs::chmodat(CWD, &itself, mode | needed, AtFlags::empty())?;
                match rustix::fs::openat(&found, ".", flags | OFlags::RDONLY, Mode::empty()) {
                    Ok(fd) => Ok(Self { fd, mode: Some(mode) }),
                    Err(errno) => {
                        let _ = rustix::fs::chmodat(CWD, &itself, mode, AtFlags::empty());
                        Err(errno)
                    }
                }
            }
            Err(errno) => Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn all(tree: &Path) -> u64 {
        used([tree], u64::MAX)
    }

    #[test]
    fn what_is_allocated_counts_once_and_links_lead_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        let outside = folder.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("big"), vec![1; 1 << 20]).unwrap();
        let before = all(&tree);
        symlink(&outside, tree.join("link")).unwrap();
        symlink(outside.join("big"), tree.join("a/link")).unwrap();
        assert_eq!(all(&tree), before + 2 * LEAST);
        fs::write(tree.join("a/b/file"), vec![1; 1 << 20]).unwrap();
        let blocks = fs::metadata(tree.join("a/b/file")).unwrap().blocks() * 512;
        let full = before + 2 * LEAST + blocks;
        assert_eq!(all(&tree), full);
        // Other names of it are not other files.
        for name in ["a/one", "two", "a/b/three"] {
            fs::hard_link(tree.join("a/b/file"), tree.join(name)).unwrap();
        }
        assert!(all(&tree).abs_diff(full) < 4, "{} {full}", all(&tree));
        // Nothing is allocated to a hole.
        fs::File::create(tree.join("hole")).unwrap().set_len(1 << 40).unwrap();
        assert!(all(&tree) <= full + 2 * LEAST);
        assert_eq!(all(&folder.path().join("none")), 0);
        symlink(&tree, folder.path().join("as-tree")).unwrap();
        assert_eq!(all(&folder.path().join("as-tree")), 0);
    }

    #[test]
    fn trees_of_any_depth_are_walked_with_few_descriptors() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let mut at = rustix::fs::open(&tree, OFlags::RDONLY, Mode::empty()).unwrap();
        let mut count = 0;
        for depth in 0..3000 {
            // Some on either side of the way down, for the way back up.
            let aside: &[&str] = if depth % 100 == 0 { &["a", "b", "y", "z"] } else { &[] };
            for name in aside.iter().chain(&["d"]) {
                rustix::fs::mkdirat(&at, *name, Mode::RWXU).unwrap();
                count += 1;
            }
            at = rustix::fs::openat(&at, "d", OFlags::RDONLY, Mode::empty()).unwrap();
        }
        drop(at);
        let least = fs::metadata(tree.join("a")).unwrap().blocks().max(LEAST / 512) * 512;
        let open = || fs::read_dir("/proc/self/fd").unwrap().count();
        let done = std::sync::atomic::AtomicBool::new(false);
        let before = open();
        let most = std::thread::scope(|scope| {
            let most = scope.spawn(|| {
                let mut most = 0;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    most = most.max(open());
                }
                most
            });
            assert_eq!(all(&tree), count * least);
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            most.join().unwrap()
        });
        // Each has two: one to read from.
        assert!(most <= before + 200, "{most} after {before}");
        crate::volume::remove_tree(&tree).unwrap();
    }

    /// Runs a test of this module again, by a program that makes it somebody else's; true there.
    fn elsewhere(test: &str, program: &[&str]) -> bool {
        if std::env::var_os("DENIZEN_TEST_APART").is_some() {
            return true;
        }
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("test");
        fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let output = std::process::Command::new(program[0])
            .args(&program[1..])
            .arg(&copy)
            .args(["--exact", &format!("disk::measure::tests::{test}")])
            .env("DENIZEN_TEST_APART", "1")
            .env("TMPDIR", folder.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let more = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("1 passed"), "{said}{more}");
        false
    }

    #[test]
    fn other_mounts_are_not_entered() {
        let apart = ["unshare", "--user", "--map-root-user", "--mount"];
        if !elsewhere("other_mounts_are_not_entered", &apart) {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let mounted = folder.path().join("tree/mounted");
        fs::create_dir_all(&mounted).unwrap();
        let before = all(&folder.path().join("tree"));
        let tmpfs = ["-t", "tmpfs", "tmpfs"];
        let mut mount = std::process::Command::new("mount");
        assert!(mount.args(tmpfs).arg(&mounted).status().unwrap().success());
        fs::write(mounted.join("file"), vec![1; 1 << 20]).unwrap();
        assert_eq!(all(&folder.path().join("tree")), before);
    }

    #[test]
    fn shut_folders_are_looked_into_and_left_shut() {
        // Root can look into everything.
        let user = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"];
        if rustix::process::geteuid().is_root()
            && !elsewhere("shut_folders_are_looked_into_and_left_shut", &user)
        {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        fs::create_dir_all(tree.join("shut/more")).unwrap();
        fs::write(tree.join("shut/more/file"), vec![1; 1 << 20]).unwrap();
        let open = all(&tree);
        for mode in [0o000, 0o400, 0o100, 0o644] {
            fs::set_permissions(tree.join("shut"), fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(all(&tree), open, "{mode:o}");
            assert_eq!(fs::metadata(tree.join("shut")).unwrap().mode() & 0o7777, mode);
        }
        fs::set_permissions(tree.join("shut"), fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn no_more_is_counted_than_needed() {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..1000 {
            fs::write(folder.path().join(number.to_string()), "").unwrap();
        }
        assert_eq!(all(folder.path()), 1000 * LEAST);
        let some = used([folder.path()], 10 * LEAST);
        assert_eq!(some, 11 * LEAST);
    }

    #[test]
    fn trees_that_change_meanwhile_are_walked_to_an_end() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().to_owned();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut deep = tree.join("x");
                (0..80).for_each(|_| deep.push("d"));
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = fs::create_dir_all(&deep);
                    let _ = fs::write(deep.join("file"), "1");
                    let _ = fs::rename(tree.join("x/d/d/d"), tree.join("y"));
                    let _ = fs::remove_dir_all(tree.join("y"));
                }
            });
            for _ in 0..300 {
                all(&tree);
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
