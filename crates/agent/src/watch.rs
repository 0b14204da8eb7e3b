//! Folders that are being watched (inotify(7)). Changes wait in a bounded queue; when it runs over,
//! whoever reads is told that some are missing. Whoever asks what there is, is told all that was
//! done before. It must never hold up what makes the changes.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use denizen_api::ChangeKind;
use parking_lot::Mutex;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

/// Most changes that wait to be read.
const MOST: usize = 16_384;
/// The kernel's events that are read in one go, in bytes.
const EVENTS: usize = 16 * 1024;

/// Changes were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Missed;

/// A folder that is being watched; each change in it is told as a `T`.
pub(crate) struct Watch<T> {
    news: Arc<News<T>>,
    /// Reads what happens, also while nobody asks: what is made in a folder that is new is only
    /// seen when that is watched, too. Dropping it ends the watch.
    _reading: AbortOnDropHandle<()>,
}

impl<T> std::fmt::Debug for Watch<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

/// What has happened and was not told yet.
pub(crate) struct News<T> {
    tree: Mutex<Tree>,
    tell: Tell<T>,
    queue: Queue<T>,
}

type Tell<T> = Box<dyn Fn(ChangeKind, &Path) -> T + Send + Sync>;

/// Takes a change that is to be told.
type Told<'a> = dyn Fn(ChangeKind, &Path) + 'a;

/// Changes that wait.
struct Queue<T> {
    changes: Mutex<Changes<T>>,
    more: Notify,
}

struct Changes<T> {
    waiting: VecDeque<T>,
    missed: bool,
}

impl<T> Queue<T> {
    fn new() -> Self {
        let changes = Changes { waiting: VecDeque::new(), missed: false };
        Self { changes: Mutex::new(changes), more: Notify::new() }
    }

    fn push(&self, change: T) {
        let mut changes = self.changes.lock();
        if changes.waiting.len() < MOST {
            changes.waiting.push_back(change);
        } else {
            changes.missed = true;
        }
        drop(changes);
        self.more.notify_one();
    }

    fn miss(&self) {
        self.changes.lock().missed = true;
        self.more.notify_one();
    }

    /// The next one, if one waits.
    fn pop(&self) -> Result<Option<T>, Missed> {
        let mut changes = self.changes.lock();
        if changes.waiting.is_empty() && std::mem::take(&mut changes.missed) {
            return Err(Missed);
        }
        Ok(changes.waiting.pop_front())
    }
}

impl<T: Send + 'static> Watch<T> {
    /// Watches a folder; with `recursive`, all that is below it too. `tell` makes of a change what
    /// is kept of it. Blocks while it looks at what is there.
    pub(crate) fn new(
        root: &Path,
        recursive: bool,
        tell: impl Fn(ChangeKind, &Path) -> T + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let tree = Tree::new(root, recursive)?;
        let file = tree.inotify.try_clone()?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe; what it is about, a type that lies about its \
                      descriptor, OwnedFd is not"
        )]
        let file = AsyncFd::try_new(file).map_err(|failed| failed.into_parts().1)?;
        let (tree, tell) = (Mutex::new(tree), Box::new(tell));
        let news = Arc::new(News { tree, tell, queue: Queue::new() });
        let all = news.clone();
        let reading = tokio::spawn(async move {
            while let Ok(mut ready) = file.readable().await {
                // Before it is read: what comes then is told anew.
                ready.clear_ready();
                let all = all.clone();
                if tokio::task::spawn_blocking(move || all.read()).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self { news, _reading: AbortOnDropHandle::new(reading) })
    }
}

impl<T> Watch<T> {
    /// What there is to tell, for somebody who does not wait for it.
    pub(crate) fn news(&self) -> Arc<News<T>> {
        self.news.clone()
    }

    /// The next change. Cancel-safe.
    pub(crate) async fn next(&self) -> Result<T, Missed> {
        loop {
            if let Some(change) = self.news.queue.pop()? {
                return Ok(change);
            }
            self.news.queue.more.notified().await;
        }
    }
}

impl<T> News<T> {
    /// All that was done before this is called and not told yet. Blocks, not for long.
    pub(crate) fn take(&self) -> Result<Vec<T>, Missed> {
        self.read();
        let mut all = Vec::new();
        while let Some(change) = self.queue.pop()? {
            all.push(change);
        }
        Ok(all)
    }

    /// Reads what the kernel has to tell, until there is nothing more.
    fn read(&self) {
        let mut tree = self.tree.lock();
        let told = |kind, path: &Path| self.queue.push((self.tell)(kind, path));
        if let Err(error) = tree.read(&told) {
            tracing::debug!(%error, "a watch has missed something");
            self.queue.miss();
        }
    }
}

/// The folders that the kernel tells of.
struct Tree {
    inotify: OwnedFd,
    root: PathBuf,
    recursive: bool,
    folders: HashMap<i32, PathBuf>,
    /// What was found in folders that are new, and told: the kernel may tell it again.
    found: HashSet<PathBuf>,
}

/// Something that the kernel has told.
struct Event {
    folder: i32,
    what: ReadFlags,
    name: Option<OsString>,
}

impl Tree {
    fn new(root: &Path, recursive: bool) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let (folders, found) = Default::default();
        let mut tree = Self { inotify, root: root.to_owned(), recursive, folders, found };
        tree.add(root, WatchFlags::empty())?;
        if recursive {
            tree.look(root, None)?;
        }
        Ok(tree)
    }

    /// Watches one folder.
    fn add(&mut self, path: &Path, flags: WatchFlags) -> io::Result<()> {
        let changes = WatchFlags::CREATE
            | WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::DELETE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO;
        let number =
            inotify::add_watch(&self.inotify, path, changes | WatchFlags::ONLYDIR | flags)?;
        self.folders.insert(number, path.to_owned());
        Ok(())
    }

    /// Watches the folders below one that is watched, and tells what is there, if it is new.
    fn look(&mut self, top: &Path, told: Option<&Told<'_>>) -> io::Result<()> {
        let mut open = vec![top.to_owned()];
        while let Some(folder) = open.pop() {
            let Some(inside) = gone(std::fs::read_dir(&folder))? else { continue };
            for item in inside {
                let Some(item) = gone(item)? else { continue };
                let Some(kind) = gone(item.file_type())? else { continue };
                let path = item.path();
                if let Some(told) = told {
                    told(ChangeKind::Created, &path);
                    if kind.is_file() && item.metadata().is_ok_and(|it| it.len() > 0) {
                        told(ChangeKind::Written, &path);
                    }
                    self.found.insert(path.clone());
                }
                if kind.is_dir() && gone(self.add(&path, WatchFlags::DONT_FOLLOW))?.is_some() {
                    open.push(path);
                }
            }
        }
        Ok(())
    }

    /// Takes what the kernel has; an error if some of it is lost.
    fn read(&mut self, told: &Told<'_>) -> io::Result<()> {
        let mut room = vec![MaybeUninit::uninit(); EVENTS];
        let mut done = Ok(());
        loop {
            let mut events = Vec::new();
            let mut reader = Reader::new(&self.inotify, &mut room);
            loop {
                match reader.next() {
                    Ok(event) => events.push(Event {
                        folder: event.wd(),
                        what: event.events(),
                        name: event.file_name().map(|it| OsStr::from_bytes(it.to_bytes()).into()),
                    }),
                    Err(Errno::INTR) => continue,
                    Err(Errno::AGAIN) => break,
                    Err(error) => return Err(error.into()),
                }
                if reader.is_buffer_empty() {
                    break;
                }
            }
            if events.is_empty() {
                return done;
            }
            for event in events {
                if let Err(error) = self.take(&event, told) {
                    done = Err(error);
                }
            }
        }
    }

    fn take(&mut self, event: &Event, told: &Told<'_>) -> io::Result<()> {
        let is = |what| event.what.contains(what);
        if is(ReadFlags::QUEUE_OVERFLOW) {
            self.found.clear();
            if self.recursive {
                // Some of the folders may be new.
                self.look(&self.root.clone(), None)?;
            }
            return Err(io::Error::other("too many changes at once"));
        }
        if is(ReadFlags::IGNORED) {
            self.folders.remove(&event.folder);
            return Ok(());
        }
        let (Some(folder), Some(name)) = (self.folders.get(&event.folder), &event.name) else {
            return Ok(());
        };
        let path = folder.join(name);
        let is_folder = is(ReadFlags::ISDIR) && self.recursive;
        if is(ReadFlags::CREATE) && !self.found.remove(&path) {
            told(ChangeKind::Created, &path);
            if is_folder && gone(self.add(&path, WatchFlags::DONT_FOLLOW))?.is_some() {
                self.look(&path, Some(told))?;
            }
        } else if is(ReadFlags::MOVED_TO) {
            told(ChangeKind::Created, &path);
            if is_folder && gone(self.add(&path, WatchFlags::DONT_FOLLOW))?.is_some() {
                self.look(&path, None)?;
            }
        } else if is(ReadFlags::MOVED_FROM) {
            self.found.remove(&path);
            told(ChangeKind::Renamed, &path);
            if is_folder {
                self.leave(&path);
            }
        } else if is(ReadFlags::DELETE) {
            self.found.remove(&path);
            told(ChangeKind::Removed, &path);
        } else if is(ReadFlags::ATTRIB) {
            told(ChangeKind::Attributes, &path);
        } else if is(ReadFlags::MODIFY) {
            told(ChangeKind::Written, &path);
        }
        Ok(())
    }

    /// What is below this path is not watched any more: it has another one, or none here.
    fn leave(&mut self, path: &Path) {
        let inotify = &self.inotify;
        self.folders.retain(|number, folder| {
            let leaves = folder.starts_with(path);
            if leaves {
                // It fails if the kernel has given it up already.
                let _ = inotify::remove_watch(inotify, *number);
            }
            !leaves
        });
    }
}

/// None if it is not there any more.
fn gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(it) => Ok(Some(it)),
        Err(error)
            if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&error.kind()) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_reads_too_slowly_is_told_what_there_is_and_then_that_some_are_missing() {
        let queue = Queue::new();
        for number in 0..MOST + 3 {
            queue.push(number);
        }
        for number in 0..MOST {
            assert_eq!(queue.pop(), Ok(Some(number)));
        }
        assert_eq!(queue.pop(), Err(Missed));
        assert_eq!(queue.pop(), Ok(None));
        queue.push(7);
        assert_eq!(queue.pop(), Ok(Some(7)));
    }

    #[tokio::test]
    async fn all_that_was_done_is_told_to_whoever_asks_then() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_owned();
        let base = root.clone();
        let tell = move |kind, path: &Path| {
            (kind, path.strip_prefix(&base).unwrap().to_str().unwrap().to_owned())
        };
        let watch = Watch::new(&root, true, tell).unwrap();
        let told = |wanted: &[(ChangeKind, &str)]| {
            let told = watch.news().take().unwrap();
            let told: Vec<_> = told.iter().map(|(kind, path)| (*kind, path.as_str())).collect();
            assert_eq!(told, wanted);
        };
        use ChangeKind::{Attributes, Created, Removed, Renamed, Written};
        std::fs::write(root.join("a"), "x").unwrap();
        told(&[(Created, "a"), (Written, "a")]);
        told(&[]);
        // Nobody has read between: what is in new folders is found.
        std::fs::create_dir_all(root.join("b/c")).unwrap();
        std::fs::write(root.join("b/c/d"), "x").unwrap();
        told(&[(Created, "b"), (Created, "b/c"), (Created, "b/c/d"), (Written, "b/c/d")]);
        std::fs::write(root.join("b/c/e"), "").unwrap();
        std::fs::remove_file(root.join("b/c/d")).unwrap();
        std::fs::write(root.join("b/c/d"), "").unwrap();
        told(&[(Created, "b/c/e"), (Removed, "b/c/d"), (Created, "b/c/d")]);
        // A folder that has moved is known by its new name.
        std::fs::rename(root.join("b"), root.join("n")).unwrap();
        told(&[(Renamed, "b"), (Created, "n")]);
        std::fs::set_permissions(
            root.join("n/c/d"),
            std::os::unix::fs::PermissionsExt::from_mode(0),
        )
        .unwrap();
        told(&[(Attributes, "n/c/d")]);
        std::os::unix::fs::symlink("/", root.join("link")).unwrap();
        told(&[(Created, "link")]);
    }
}
