//! Folders that are being watched. Changes wait in a bounded queue; when it runs over, whoever
//! reads is told that some are missing. It must never hold up what makes the changes.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use denizen_api::ChangeKind;
use notify::event::{ModifyKind, RenameMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Most changes that wait to be read.
const MOST: usize = 16_384;

/// Changes were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Missed;

/// A folder that is being watched; each change in it is told as a `T`.
pub(crate) struct Watch<T> {
    queue: Arc<Queue<T>>,
    /// Dropping it ends the watch.
    _watcher: RecommendedWatcher,
}

impl<T> std::fmt::Debug for Watch<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

/// Changes that wait.
pub(crate) struct Queue<T> {
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
    pub(crate) fn pop(&self) -> Result<Option<T>, Missed> {
        let mut changes = self.changes.lock();
        if changes.waiting.is_empty() && std::mem::take(&mut changes.missed) {
            return Err(Missed);
        }
        Ok(changes.waiting.pop_front())
    }
}

impl<T: Send + 'static> Watch<T> {
    /// Watches a folder; with `recursive`, all that is below it too. `tell` makes of a change what
    /// is kept of it.
    pub(crate) fn new(
        root: &Path,
        recursive: bool,
        tell: impl Fn(ChangeKind, &Path) -> T + Send + 'static,
    ) -> notify::Result<Self> {
        let queue = Arc::new(Queue::new());
        let (told, base) = (queue.clone(), root.to_owned());
        let mut watcher = notify::recommended_watcher(move |event| match event {
            Ok(event) => read(&event, &base, &told, &tell),
            Err(error) => {
                tracing::debug!(%error, "a watch has missed something");
                told.miss();
            }
        })?;
        let mode = if recursive { RecursiveMode::Recursive } else { RecursiveMode::NonRecursive };
        watcher.watch(root, mode)?;
        Ok(Self { queue, _watcher: watcher })
    }
}

impl<T> Watch<T> {
    /// What waits, for somebody who does not wait for it.
    pub(crate) fn queue(&self) -> Arc<Queue<T>> {
        self.queue.clone()
    }

    /// The next change. Cancel-safe.
    pub(crate) async fn next(&self) -> Result<T, Missed> {
        loop {
            if let Some(change) = self.queue.pop()? {
                return Ok(change);
            }
            self.queue.more.notified().await;
        }
    }
}

fn read<T>(
    event: &notify::Event,
    base: &Path,
    queue: &Queue<T>,
    tell: &impl Fn(ChangeKind, &Path) -> T,
) {
    if event.need_rescan() {
        return queue.miss();
    }
    let kind = match event.kind {
        EventKind::Create(_) | EventKind::Modify(ModifyKind::Name(RenameMode::To)) => {
            ChangeKind::Created
        }
        EventKind::Modify(ModifyKind::Name(RenameMode::From)) => ChangeKind::Renamed,
        EventKind::Modify(ModifyKind::Metadata(_)) => ChangeKind::Attributes,
        // Both names of a rename have been told of one by one.
        EventKind::Modify(ModifyKind::Name(_)) => return,
        EventKind::Modify(_) => ChangeKind::Written,
        EventKind::Remove(_) => ChangeKind::Removed,
        _ => return,
    };
    for path in event.paths.iter().filter(|path| *path != base) {
        queue.push(tell(kind, path));
    }
}

#[cfg(test)]
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
}
