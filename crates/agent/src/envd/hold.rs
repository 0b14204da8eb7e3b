//! How an answer keeps its instance in use while it is read. A reader may stop reading for ever,
//! and then nothing asks for the rest of the answer: so what is held is given back from outside
//! when the instance is to be given up.

use std::any::Any;
use std::io;
use std::sync::Arc;

use futures::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use tokio_util::sync::{CancellationToken, DropGuard};

type Held = Arc<dyn Any + Send + Sync>;

/// Keeps something until it is dropped, or until it is over.
#[derive(Debug)]
pub struct Hold {
    held: Arc<Mutex<Option<Held>>>,
    over: CancellationToken,
    _dropped: DropGuard,
}

impl Hold {
    /// Keeps `held` until `over` at the longest.
    pub fn new(held: Held, over: CancellationToken) -> Self {
        let held = Arc::new(Mutex::new(Some(held)));
        let end = over.child_token();
        let (kept, ended) = (held.clone(), end.clone().cancelled_owned());
        tokio::spawn(async move {
            ended.await;
            drop(kept.lock().take());
        });
        Self { held, over, _dropped: end.drop_guard() }
    }

    /// The stream, which ends with an error when it is over.
    pub fn keep<T: Send + 'static>(
        self,
        items: impl Stream<Item = io::Result<T>> + Send + 'static,
    ) -> impl Stream<Item = io::Result<T>> + Send + 'static {
        let over = self.over.clone();
        let items = items.take_until(over.clone().cancelled_owned());
        let broken_off = stream::once(async move { over.is_cancelled() })
            .filter(|is_over| std::future::ready(*is_over))
            .map(|_| Err(io::Error::other("the session is being stopped")));
        items.chain(broken_off).map(move |item| {
            let _ = &self;
            item
        })
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Not left to the task: who has read all of it finds the session free.
        drop(self.held.lock().take());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[tokio::test]
    async fn it_is_given_back_when_it_is_over_though_nobody_reads() {
        let (held, over) = (Arc::new(()), CancellationToken::new());
        let hold = Hold::new(held.clone(), over.clone());
        let items = stream::iter([1, 2].map(Ok)).chain(stream::pending());
        let mut items = Box::pin(hold.keep(items));
        assert_eq!(items.next().await.unwrap().unwrap(), 1);
        assert_eq!(Arc::strong_count(&held), 2);
        over.cancel();
        while Arc::strong_count(&held) > 1 {
            tokio::task::yield_now().await;
        }
        let rest: Vec<_> = items.collect().await;
        assert!(rest.last().unwrap().is_err(), "{rest:?}");
    }

    #[tokio::test]
    async fn it_is_given_back_at_the_end_and_then_nothing_is_wrong() {
        let (held, over) = (Arc::new(()), CancellationToken::new());
        let hold = Hold::new(held.clone(), over);
        let items: Vec<_> = hold.keep(stream::iter([1, 2].map(Ok))).collect().await;
        assert_eq!(Arc::strong_count(&held), 1);
        assert_eq!(items.into_iter().map(Result::unwrap).collect::<Vec<_>>(), [1, 2]);
    }
}
