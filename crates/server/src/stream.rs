//! Streams of Connect's messages, as bytes that pass by: where a message ends, so that an answer
//! that has to end early ends with an error that its client can read. What is in a message is
//! nobody's business here.

use std::task::Poll;

use axum::BoxError;
use axum::body::Bytes;
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use hyper::body::Frame;

/// Before each message: flags, and its length in four bytes.
const HEAD: usize = 5;
/// The flag of the last message.
const LAST: u8 = 2;

/// How far a stream has come.
#[derive(Default)]
pub(crate) struct Messages {
    /// What there is of the head of a message.
    head: Vec<u8>,
    /// What is missing of a message.
    rest: usize,
    /// The last one has begun, or is over.
    last: bool,
}

impl Messages {
    /// For an answer that has just begun, if it is such a stream.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let kind = headers.get(CONTENT_TYPE)?.to_str().ok()?;
        // Packed as a whole, or promised to be so long: what a program at a port may do.
        if headers.contains_key(CONTENT_ENCODING) || headers.contains_key(CONTENT_LENGTH) {
            return None;
        }
        kind.starts_with("application/connect+").then(Self::default)
    }

    /// That comes next of an answer, if it is such a stream.
    pub(crate) fn follow<E>(of: &mut Option<Self>, next: &Poll<Option<Result<Frame<Bytes>, E>>>) {
        if let (Some(messages), Poll::Ready(Some(Ok(frame)))) = (of, next)
            && let Some(bytes) = frame.data_ref()
        {
            messages.pass(bytes);
        }
    }

    /// With what an answer ends early: with a last message, or by breaking off.
    pub(crate) fn cut(of: Option<&Self>, why: &'static str) -> Result<Frame<Bytes>, BoxError> {
        let end = of.and_then(|messages| messages.end(why));
        end.map(Frame::data).ok_or_else(|| why.into())
    }

    /// These bytes come next.
    fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let part = if self.rest > 0 { self.rest } else { HEAD - self.head.len() };
            let (part, after) = bytes.split_at(part.min(bytes.len()));
            bytes = after;
            if self.rest > 0 {
                self.rest -= part.len();
                continue;
            }
            self.head.extend_from_slice(part);
            if let [flags, a, b, c, d] = *self.head {
                self.last |= flags & LAST != 0;
                self.rest = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
                self.head.clear();
            }
        }
    }

    /// Whether the stream has had its last message: nothing may follow.
    pub(crate) fn are_over(&self) -> bool {
        self.last && self.rest == 0 && self.head.is_empty()
    }

    /// The last message of a stream that ends here, because what it is about is not there any more.
    /// None in the midst of another message.
    fn end(&self, why: &str) -> Option<Bytes> {
        if self.rest > 0 || !self.head.is_empty() {
            return None;
        }
        let error = serde_json::json!({ "error": { "code": "unavailable", "message": why } });
        let error = error.to_string();
        let mut message = vec![LAST];
        message.extend(u32::try_from(error.len()).ok()?.to_be_bytes());
        message.extend(error.into_bytes());
        Some(message.into())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_stream_ends_where_a_message_does_and_nowhere_else() {
        let two = b"\0\0\0\0\x03abc\0\0\0\0\0";
        for at_once in 1..=two.len() {
            let mut messages = Messages::default();
            let mut ends = vec![messages.end("x").is_some()];
            for piece in two.chunks(at_once) {
                messages.pass(piece);
                ends.push(messages.end("x").is_some());
            }
            let places = (0..two.len()).step_by(at_once).chain([two.len()]);
            let wanted: Vec<_> = places.map(|place| [0, 8, 13].contains(&place)).collect();
            assert_eq!(ends, wanted, "{at_once}");
        }
        let mut messages = Messages::default();
        messages.pass(b"\0\0\0\0\x01a\x02\0\0\0\x02");
        assert!(!messages.are_over());
        messages.pass(b"{}");
        assert!(messages.are_over());
        let end = Messages::default().end("it \"ends\"").unwrap();
        assert_eq!(end[..5], [2, 0, 0, 0, u8::try_from(end.len() - 5).unwrap()]);
        let told: serde_json::Value = serde_json::from_slice(&end[5..]).unwrap();
        assert_eq!(told["error"]["message"], "it \"ends\"");
    }

    #[test]
    fn only_streams_of_messages_are_followed() {
        let of = |kind: &str| {
            Messages::of(&HeaderMap::from_iter([(CONTENT_TYPE, kind.parse().unwrap())]))
        };
        assert!(of("application/connect+proto").is_some());
        assert!(of("application/proto").is_none() && of("text/html").is_none());
        let mut packed = HeaderMap::new();
        packed.insert(CONTENT_TYPE, "application/connect+json".parse().unwrap());
        packed.insert(CONTENT_ENCODING, "gzip".parse().unwrap());
        assert!(Messages::of(&packed).is_none());
    }
}
