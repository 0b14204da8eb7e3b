//! What a command has printed last, for those who come later or come back. It holds so much and
//! no more, whoever reads and however slowly; nobody who reads it can slow the command down.

use std::collections::VecDeque;
use std::sync::Arc;

use futures::{Stream, stream};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{Chunk, Exit};

/// Bytes that are kept.
const KEPT: u64 = 256 * 1024;
/// And when the command has ended.
const KEPT_AFTER: u64 = 32 * 1024;

/// What a reader sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Bytes that are not kept any more.
    Gap {
        /// The first.
        from: u64,
        /// The first that is there again.
        to: u64,
    },
    /// Something printed.
    Output {
        /// How many bytes were printed before.
        offset: u64,
        /// It.
        chunk: Chunk,
    },
    /// The last: the command has ended, and why if there is more to say.
    End(Exit, Option<String>),
    /// The last: how it ended is not known.
    Lost(String),
}

type End = Result<(Exit, Option<String>), String>;

/// See the module.
#[derive(Debug)]
pub(super) struct Tail {
    kept: Mutex<Kept>,
    /// Told of whatever is new.
    told: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Kept {
    chunks: VecDeque<Chunk>,
    /// How many bytes were printed before the first of them, and with the last.
    start: u64,
    end: u64,
    ended: Option<End>,
}

impl Default for Tail {
    fn default() -> Self {
        Self { kept: Mutex::default(), told: watch::Sender::new(()) }
    }
}

impl Kept {
    fn shrink(&mut self, limit: u64) {
        while self.end - self.start > limit
            && let Some(oldest) = self.chunks.pop_front()
        {
            self.start += oldest.bytes.len() as u64;
        }
    }

    /// What comes at a place; none if that is yet to come.
    fn at(&self, place: u64) -> Option<Piece> {
        if place < self.start {
            return Some(Piece::Gap { from: place, to: self.start });
        }
        let mut offset = self.start;
        for chunk in &self.chunks {
            let after = offset + chunk.bytes.len() as u64;
            if place < after {
                let mut chunk = chunk.clone();
                // Less than its length, which fits.
                chunk.bytes = chunk.bytes.slice(usize::try_from(place - offset).unwrap_or(0)..);
                return Some(Piece::Output { offset: place, chunk });
            }
            offset = after;
        }
        Some(match self.ended.clone()? {
            Ok((exit, why)) => Piece::End(exit, why),
            Err(why) => Piece::Lost(why),
        })
    }
}

impl Tail {
    pub(super) fn push(&self, chunk: &Chunk) {
        let mut kept = self.kept.lock();
        kept.end += chunk.bytes.len() as u64;
        kept.chunks.push_back(chunk.clone());
        kept.shrink(KEPT);
        drop(kept);
        self.told.send_replace(());
    }

    pub(super) fn finish(&self, end: End) {
        let mut kept = self.kept.lock();
        kept.shrink(KEPT_AFTER);
        kept.ended = Some(end);
        drop(kept);
        self.told.send_replace(());
    }

    /// How the command ended, if it has and that is known.
    pub(super) fn end(&self) -> Option<(Exit, Option<String>)> {
        self.kept.lock().ended.clone()?.ok()
    }

    /// All from a place on; see [`super::Job::read`]. Who asks for more than there is waits for
    /// what is new.
    pub(super) fn read(self: Arc<Self>, from: u64) -> impl Stream<Item = Piece> + Send + 'static {
        let told = self.told.subscribe();
        let place = from.min(self.kept.lock().end);
        stream::unfold(Some((self, told, place)), |state| async move {
            let (tail, mut told, place) = state?;
            loop {
                told.borrow_and_update();
                let piece = tail.kept.lock().at(place);
                let next = match &piece {
                    None => {
                        // Cannot fail: `tail` has the other end.
                        told.changed().await.ok()?;
                        continue;
                    }
                    Some(Piece::Gap { to, .. }) => Some(*to),
                    Some(Piece::Output { offset, chunk }) => {
                        Some(offset + chunk.bytes.len() as u64)
                    }
                    Some(Piece::End(..) | Piece::Lost(_)) => None,
                };
                return Some((piece?, next.map(|next| (tail, told, next))));
            }
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use bytes::Bytes;
    use futures::StreamExt;

    use super::*;

    fn chunk(bytes: &[u8]) -> Chunk {
        Chunk { stream: crate::Stream::Stdout, bytes: Bytes::copy_from_slice(bytes) }
    }

    fn output(offset: u64, bytes: &[u8]) -> Piece {
        Piece::Output { offset, chunk: chunk(bytes) }
    }

    #[tokio::test]
    async fn who_comes_back_goes_on_where_he_was() {
        let tail = Arc::new(Tail::default());
        tail.push(&chunk(b"one "));
        tail.push(&chunk(b"two "));
        let mut reader = Box::pin(tail.clone().read(2));
        assert_eq!(reader.next().await, Some(output(2, b"e ")));
        assert_eq!(reader.next().await, Some(output(4, b"two ")));
        let next = tokio::spawn(async move { (reader.next().await, reader.next().await) });
        tail.push(&chunk(b"three"));
        tail.finish(Ok((Exit::Code(7), None)));
        let (third, end) = next.await.unwrap();
        assert_eq!(
            (third, end),
            (Some(output(8, b"three")), Some(Piece::End(Exit::Code(7), None)))
        );
        // Also afterwards; from beyond the end there is only the end.
        let late: Vec<_> = tail.clone().read(12).collect().await;
        assert_eq!(late, [output(12, b"e"), Piece::End(Exit::Code(7), None)]);
        let beyond: Vec<_> = tail.clone().read(u64::MAX).collect().await;
        assert_eq!(beyond, [Piece::End(Exit::Code(7), None)]);
    }

    #[tokio::test]
    async fn what_is_not_kept_is_a_gap_and_memory_has_a_limit() {
        let tail = Arc::new(Tail::default());
        let mut reader = Box::pin(tail.clone().read(0));
        let piece = vec![b'x'; 1000];
        for _ in 0..10_000 {
            tail.push(&chunk(&piece));
        }
        let kept = tail.kept.lock();
        let (start, end) = (kept.start, kept.end);
        assert_eq!(end, 10_000_000);
        assert!(end - start <= KEPT && kept.chunks.len() < 300, "{start}");
        drop(kept);
        assert_eq!(reader.next().await, Some(Piece::Gap { from: 0, to: start }));
        assert_eq!(reader.next().await, Some(output(start, &piece)));
        tail.finish(Err("gone".to_owned()));
        assert!(tail.kept.lock().chunks.len() < 40);
        let rest: Vec<_> = reader.collect().await;
        assert!(matches!(rest[0], Piece::Gap { .. }), "{:?}", rest[0]);
        assert_eq!(rest.last(), Some(&Piece::Lost("gone".to_owned())));
    }
}
