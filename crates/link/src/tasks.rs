//! Tasks that end with what they belong to.

use std::future::Future;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::task::JoinSet;

/// Starts tasks for an [`Owner`].
#[derive(Clone, Default)]
pub(crate) struct Tasks(Arc<Mutex<Option<JoinSet<()>>>>);

/// Ends all of its tasks when it is dropped.
pub(crate) struct Owner(Tasks);

impl Owner {
    pub(crate) fn new() -> Self {
        Self(Tasks(Arc::new(Mutex::new(Some(JoinSet::new())))))
    }

    pub(crate) fn tasks(&self) -> Tasks {
        self.0.clone()
    }
}

impl Tasks {
    /// Starts one, unless all have been ended.
    pub(crate) fn start(&self, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(tasks) = &mut *self.0.lock() {
            while tasks.try_join_next().is_some() {}
            tasks.spawn(task);
        }
    }

    /// Whether none of them goes on.
    pub(crate) fn are_done(&self) -> bool {
        self.0.lock().as_mut().is_none_or(|tasks| {
            while tasks.try_join_next().is_some() {}
            tasks.is_empty()
        })
    }

    /// Ends all, and starts no more.
    pub(crate) fn end(&self) {
        // They start others, and are dropped here if they do not run just now.
        let tasks = self.0.lock().take();
        drop(tasks);
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.end();
    }
}
