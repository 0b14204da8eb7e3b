//! Some of a session's files and folders, put in the place of those that it has.
//!
//! All of them or none: each is one rename or one exchange, and these are undone if a later one
//! fails. Nothing of the session may run meanwhile. Must never follow a link, of which the
//! session's programs may have left any, nor change a file: whole ones take the places of others.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, XattrFlags, lremovexattr, lsetxattr, openat,
    renameat_with, statat,
};
use rustix::io::Errno;

use crate::volume::{names_in, remove_tree};

/// What overlayfs calls a folder of which nothing below shows (overlayfs.rst, "whiteouts and
/// opaque directories").
const OPAQUE: &str = "user.overlay.opaque";

/// Why something could not be put in its place, and nothing was.
#[derive(Debug)]
pub(crate) enum Problem {
    /// It is not among what is to be put there.
    Absent,
    /// What is on the way to its place is no folder.
    NoFolder(PathBuf),
    /// What the system said.
    System(io::Error),
}

impl From<Errno> for Problem {
    fn from(errno: Errno) -> Self {
        Self::System(errno.into())
    }
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

/// What was put in its place.
struct Moved {
    from: OwnedFd,
    to: OwnedFd,
    /// Its path from where all of it is put.
    path: PathBuf,
    /// Where it was is what it has taken the place of.
    exchanged: bool,
}

/// Puts what `from` has at these relative paths in their places in `to`. Folders that are on the
/// way and not there come from `from` too, with nothing else in them; `overlay` is the folder in
/// which folders of overlays are. What was there is in `from` afterwards. Gives the path that was
/// the problem. Blocks.
pub(crate) fn put(
    from: &Path,
    to: &Path,
    overlay: &Path,
    paths: &[PathBuf],
) -> Result<(), (PathBuf, Problem)> {
    let mut wanted: Vec<PathBuf> = paths.iter().map(|path| plain(path)).collect();
    wanted.sort();
    wanted.dedup();
    for path in &wanted {
        find(from, path).map_err(|problem| (path.clone(), problem))?;
    }
    let all = wanted.clone();
    // One that is within another comes with it.
    wanted.retain(|path| !all.iter().any(|other| path != other && path.starts_with(other)));
    keep_only(from, &wanted).map_err(|error| (from.to_owned(), error.into()))?;
    let mut done: Vec<Moved> = Vec::new();
    for path in &wanted {
        // A folder on its way was not there, and has brought it.
        if done.iter().any(|moved| path.starts_with(&moved.path)) {
            continue;
        }
        match put_one(from, to, overlay, path) {
            Ok(moved) => done.push(moved),
            Err(problem) => {
                done.iter().rev().for_each(undo);
                return Err((path.clone(), problem));
            }
        }
    }
    Ok(())
}

/// Without a dot or a slash too many.
fn plain(path: &Path) -> PathBuf {
    path.components().filter(|step| matches!(step, Component::Normal(_))).collect()
}

/// Fails unless it is there.
fn find(from: &Path, path: &Path) -> Result<(), Problem> {
    let Some((last, way)) = split(path) else { return Err(Problem::Absent) };
    let absent = |errno| match errno {
        // The last two of a name that no file can have: with a zero in it, or too long.
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::INVAL | Errno::NAMETOOLONG => {
            Problem::Absent
        }
        errno => errno.into(),
    };
    let mut at = open(CWD, from.as_os_str())?;
    for step in way {
        at = open(&at, step).map_err(absent)?;
    }
    statat(&at, last, AtFlags::SYMLINK_NOFOLLOW).map(drop).map_err(absent)
}

/// Deletes what is neither wanted nor on the way to it. The folders on the way are there.
fn keep_only(from: &Path, wanted: &[PathBuf]) -> io::Result<()> {
    let mut ways = vec![PathBuf::new()];
    while let Some(way) = ways.pop() {
        let folder = from.join(&way);
        for name in names_in(&open_to_read(&folder)?)? {
            let path = way.join(&name);
            if wanted.iter().any(|other| *other != path && other.starts_with(&path)) {
                ways.push(path);
            } else if !wanted.contains(&path) {
                remove_tree(&folder.join(&name))?;
            }
        }
    }
    Ok(())
}

fn put_one(from: &Path, to: &Path, overlay: &Path, path: &Path) -> Result<Moved, Problem> {
    let (mut from, mut to) = (open(CWD, from.as_os_str())?, open(CWD, to.as_os_str())?);
    let Some((last, way)) = split(path) else { return Err(Problem::Absent) };
    let mut passed = PathBuf::new();
    for (depth, step) in way.iter().enumerate() {
        passed.push(step);
        match open(&to, step) {
            Ok(next) => {
                to = next;
                from = open(&from, step)?;
                continue;
            }
            Err(Errno::NOENT) => {}
            Err(Errno::NOTDIR | Errno::LOOP) => {
                let is_whiteout = passed.starts_with(overlay) && is_whiteout(&to, step)?;
                if !is_whiteout {
                    return Err(Problem::NoFolder(passed));
                }
            }
            Err(errno) => return Err(errno.into()),
        }
        // From here on all of it is new.
        let exchanged = is_there(&to, step)?;
        if passed.starts_with(overlay) {
            // What is below the overlay shows in the folders on the way as it did: not at all where
            // it had been deleted.
            show_through(&from, &way[depth..])?;
            if exchanged {
                lsetxattr(beside(&from, step), OPAQUE, b"y", XattrFlags::empty())?;
            }
        }
        return place(from, to, passed, exchanged);
    }
    let exchanged = is_there(&to, last)?;
    place(from, to, path.to_owned(), exchanged)
}

fn place(from: OwnedFd, to: OwnedFd, path: PathBuf, exchanged: bool) -> Result<Moved, Problem> {
    let moved = Moved { from, to, path, exchanged };
    renameat_with(&moved.from, moved.name(), &moved.to, moved.name(), moved.how())?;
    Ok(moved)
}

impl Moved {
    fn name(&self) -> &OsStr {
        self.path.file_name().unwrap_or_default()
    }

    fn how(&self) -> RenameFlags {
        if self.exchanged { RenameFlags::EXCHANGE } else { RenameFlags::NOREPLACE }
    }
}

fn undo(moved: &Moved) {
    let undone = renameat_with(&moved.to, moved.name(), &moved.from, moved.name(), moved.how());
    if let Err(error) = undone {
        tracing::error!(path = ?moved.path, %error, "what was put back in part stays");
    }
}

fn split(path: &Path) -> Option<(&OsStr, Vec<&OsStr>)> {
    let mut steps: Vec<&OsStr> = path.iter().collect();
    steps.pop().map(|last| (last, steps))
}

fn is_there(folder: &OwnedFd, name: &OsStr) -> Result<bool, Errno> {
    match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(false),
        found => found.map(|_| true),
    }
}

/// Whether something says that what is below an overlay was deleted.
fn is_whiteout(folder: &OwnedFd, name: &OsStr) -> Result<bool, Errno> {
    let found = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice && found.st_rdev == 0)
}

/// Has what is below an overlay show in these folders, each in the one before.
fn show_through(folder: &OwnedFd, steps: &[&OsStr]) -> Result<(), Errno> {
    let mut at = open(folder, OsStr::new("."))?;
    for step in steps {
        match lremovexattr(beside(&at, step), OPAQUE) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(errno),
        }
        at = open(&at, step)?;
    }
    Ok(())
}

/// A name in a folder, for calls that have no such argument (`proc_pid_fd(5)`).
fn beside(folder: &OwnedFd, name: &OsStr) -> PathBuf {
    Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name)
}

/// A folder, to name what is in it by. Needs no right to read it.
fn open(at: impl AsFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(at, name, flags, Mode::empty())
}

/// A folder of which the last name is no link.
fn open_to_read(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeMap;
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// What is in a folder, by path: the content of files, the targets of links.
    fn picture(folder: &Path) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        let mut ways = vec![folder.to_owned()];
        while let Some(way) = ways.pop() {
            for entry in fs::read_dir(way).unwrap() {
                let path = entry.unwrap().path();
                let kind = fs::symlink_metadata(&path).unwrap().file_type();
                let has = if kind.is_symlink() {
                    format!("-> {}", fs::read_link(&path).unwrap().display())
                } else if kind.is_dir() {
                    ways.push(path.clone());
                    "/".to_owned()
                } else {
                    fs::read_to_string(&path).unwrap()
                };
                all.insert(path.strip_prefix(folder).unwrap().display().to_string(), has);
            }
        }
        all
    }

    struct Trees {
        dir: tempfile::TempDir,
    }

    impl Trees {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for tree in ["from", "to"] {
                fs::create_dir_all(dir.path().join(tree).join("a/b")).unwrap();
                for file in ["a/b/one", "a/b/two", "a/three"] {
                    fs::write(dir.path().join(tree).join(file), format!("{tree} {file}")).unwrap();
                }
            }
            Self { dir }
        }

        fn at(&self, path: &str) -> PathBuf {
            self.dir.path().join(path)
        }

        fn put(&self, paths: &[&str]) -> Result<(), (PathBuf, Problem)> {
            let paths: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
            put(&self.at("from"), &self.at("to"), Path::new("root"), &paths)
        }

        fn to(&self) -> BTreeMap<String, String> {
            picture(&self.at("to"))
        }
    }

    #[test]
    fn files_and_folders_take_their_places_and_others_stay() {
        let trees = Trees::new();
        let mut wanted = trees.to();
        trees.put(&["a/b/one"]).unwrap();
        wanted.insert("a/b/one".into(), "from a/b/one".into());
        assert_eq!(trees.to(), wanted);
        // What it has taken the place of is there now.
        let from = picture(&trees.at("from"));
        assert_eq!(from["a/b/one"], "to a/b/one");

        let trees = Trees::new();
        let mut wanted = trees.to();
        fs::remove_file(trees.at("from/a/b/two")).unwrap();
        trees.put(&["./a//b/"]).unwrap();
        // A folder is then as it was, also in what it did not have.
        wanted.remove("a/b/two");
        wanted.insert("a/b/one".into(), "from a/b/one".into());
        assert_eq!(trees.to(), wanted);
    }

    #[test]
    fn a_folder_that_is_gone_comes_back_with_what_is_wanted_of_it() {
        let trees = Trees::new();
        fs::remove_dir_all(trees.at("to/a")).unwrap();
        trees.put(&["a/b/two", "a/three"]).unwrap();
        let found: Vec<String> = trees.to().into_keys().collect();
        assert_eq!(found, ["a", "a/b", "a/b/two", "a/three"]);
    }

    #[test]
    fn what_is_named_twice_or_is_within_another_is_put_once() {
        for paths in [&["a/b/one", "a", "a/three"][..], &["a", "./a", "a/"]] {
            let trees = Trees::new();
            trees.put(paths).unwrap();
            let all_new = trees.to().values().all(|has| has == "/" || has.starts_with("from"));
            assert!(all_new, "{paths:?}: {:?}", trees.to());
        }
    }

    #[test]
    fn all_or_nothing() {
        let trees = Trees::new();
        fs::write(trees.at("from/file"), "").unwrap();
        fs::write(trees.at("to/stays"), "").unwrap();
        let before = trees.to();
        let long = "x".repeat(300);
        for absent in ["a/b/no", "stays", "file/no", ".", "a\0b", "a/\0/b", &long] {
            let problem = trees.put(&["a/three", "file", absent]).unwrap_err();
            assert!(matches!(&problem, (_, Problem::Absent)), "{absent}: {problem:?}");
            assert_eq!(trees.to(), before);
        }
        // Found out when others are in their places.
        fs::write(trees.at("to/z"), "").unwrap();
        fs::create_dir(trees.at("from/z")).unwrap();
        fs::write(trees.at("from/z/file"), "").unwrap();
        let before = trees.to();
        let problem = trees.put(&["a/three", "file", "z/file"]).unwrap_err().1;
        assert!(matches!(&problem, Problem::NoFolder(at) if at == Path::new("z")), "{problem:?}");
        assert_eq!(trees.to(), before);
        trees.put(&["a/three", "file"]).unwrap();
    }

    #[test]
    fn links_lead_nowhere() {
        let trees = Trees::new();
        fs::create_dir_all(trees.at("outside/b")).unwrap();
        fs::write(trees.at("outside/b/one"), "outside").unwrap();
        fs::remove_dir_all(trees.at("to/a")).unwrap();
        symlink(trees.at("outside"), trees.at("to/a")).unwrap();
        let problem = trees.put(&["a/b/one"]).unwrap_err().1;
        assert!(matches!(&problem, Problem::NoFolder(at) if at == Path::new("a")));
        // The link itself is replaced if that is what is wanted.
        trees.put(&["a"]).unwrap();
        assert_eq!(trees.to()["a/b/one"], "from a/b/one");
        // Nor out of what is put there.
        let trees = Trees::new();
        fs::remove_dir_all(trees.at("from/a")).unwrap();
        fs::create_dir_all(trees.at("outside/b")).unwrap();
        fs::write(trees.at("outside/b/one"), "outside").unwrap();
        symlink(trees.at("outside"), trees.at("from/a")).unwrap();
        assert!(matches!(trees.put(&["a/b/one"]).unwrap_err().1, Problem::Absent));
        trees.put(&["a"]).unwrap();
        assert_eq!(picture(&trees.at("outside"))["b/one"], "outside");
    }

    /// What the session sees of the folders on the way is what it saw.
    #[test]
    fn overlays_show_what_they_showed() {
        let trees = Trees::new();
        let is_opaque = |path: &str| xattr::get(trees.at(path), OPAQUE).unwrap().is_some();
        for tree in ["from", "to"] {
            fs::create_dir_all(trees.at(tree).join("root/main/etc/app/deep")).unwrap();
            fs::write(trees.at(tree).join("root/main/etc/app/deep/conf"), tree).unwrap();
        }
        // Not there in what the session has changed: the base's shows.
        fs::remove_dir_all(trees.at("to/root/main/etc/app")).unwrap();
        for folder in ["app", "app/deep"] {
            xattr::set(trees.at("from/root/main/etc").join(folder), OPAQUE, b"y").unwrap();
        }
        trees.put(&["root/main/etc/app/deep/conf"]).unwrap();
        assert_eq!(trees.to()["root/main/etc/app/deep/conf"], "from");
        assert!(!is_opaque("to/root/main/etc/app") && !is_opaque("to/root/main/etc/app/deep"));
        // Deleted by the session: what the base has of it does not come back.
        for (from, to) in [("to", "from")] {
            let app = trees.at(from).join("root/main/etc/app");
            fs::create_dir_all(trees.at(to).join("root/main/etc")).unwrap();
            fs::rename(&app, trees.at(to).join("root/main/etc/app")).unwrap();
            let etc = fs::File::open(trees.at(from).join("root/main/etc")).unwrap();
            rustix::fs::mknodat(&etc, "app", FileType::CharacterDevice, Mode::empty(), 0).unwrap();
        }
        trees.put(&["root/main/etc/app/deep/conf"]).unwrap();
        assert_eq!(trees.to()["root/main/etc/app/deep/conf"], "from");
        assert!(is_opaque("to/root/main/etc/app") && !is_opaque("to/root/main/etc/app/deep"));
    }
}
