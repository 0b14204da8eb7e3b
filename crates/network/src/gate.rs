//! The gate before the HTTP parser: it lets one request's head through at a time, and only one
//! that can be read in a single way. What comes after it is lenient where HTTP says it may be;
//! whoever is behind the proxy may be lenient in another way, and a request hides in the gap.
//! It must never change a byte.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

use crate::rules::Why;

/// Longest head of a request, and longest line in one.
const LONGEST_HEAD: usize = 32 * 1024;
const LONGEST_LINE: usize = 8 * 1024;
const MOST_HEADERS: usize = 100;

/// A client's connection, gated.
pub(crate) struct Gate<T> {
    inner: T,
    /// What was read and is not let through yet.
    held: BytesMut,
    /// How much of it is known to have sound lines, and where the line after that begins.
    looked_at: usize,
    line: usize,
    /// What may go through.
    open: Bytes,
    next: Next,
    /// Takes why a head was not let through. After that nothing is: reading never returns.
    refusal: Option<oneshot::Sender<Why>>,
    moved: Arc<AtomicU64>,
}

/// What the client sends next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Head,
    /// So many bytes of a body.
    Body(u64),
    /// Whatever it likes: a tunnel, or a body after which the connection closes.
    Anything,
}

impl<T> Gate<T> {
    /// `moved` counts bytes in both directions.
    pub(crate) fn new(inner: T, moved: Arc<AtomicU64>) -> (Self, oneshot::Receiver<Why>) {
        let (refusal, refused) = oneshot::channel();
        let gate = Self {
            inner,
            held: BytesMut::new(),
            looked_at: 0,
            line: 0,
            open: Bytes::new(),
            next: Next::Head,
            refusal: Some(refusal),
            moved,
        };
        (gate, refused)
    }

    /// The connection, and what was read from it that nobody has seen.
    pub(crate) fn into_inner(self) -> (T, BytesMut) {
        let mut unseen = BytesMut::from(self.open);
        unseen.extend_from_slice(&self.held);
        (self.inner, unseen)
    }

    /// Lets a head through if all of it is there.
    fn look(&mut self) -> Result<bool, Why> {
        while let Some(byte) = self.held.get(self.looked_at).copied() {
            let at = self.looked_at;
            let after_return = at > 0 && self.held[at - 1] == b'\r';
            if (byte == b'\n') != after_return {
                return Err(Why::Malformed("a line does not end as lines do"));
            }
            if at - self.line > LONGEST_LINE {
                return Err(Why::Malformed("a line is too long"));
            }
            if at >= LONGEST_HEAD {
                return Err(Why::Malformed("its head is too long"));
            }
            self.looked_at += 1;
            if byte == b'\n' {
                let empty = at - self.line == 1;
                self.line = at + 1;
                if empty {
                    let head = self.held.split_to(at + 1).freeze();
                    (self.looked_at, self.line) = (0, 0);
                    self.next = check(&head)?;
                    self.open = head;
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

/// Looks at a head; tells what follows it.
fn check(head: &[u8]) -> Result<Next, Why> {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Complete(length)) if length == head.len() => {}
        Err(httparse::Error::TooManyHeaders) => {
            return Err(Why::Malformed("it has too many headers"));
        }
        _ => return Err(Why::Malformed("its head cannot be read")),
    }
    let tunnel = request.method == Some("CONNECT");
    let (mut length, mut chunked, mut host) = (None, false, false);
    for header in request.headers.iter() {
        let twice = if header.name.eq_ignore_ascii_case("content-length") {
            let digits = Some(header.value).filter(|value| value.iter().all(u8::is_ascii_digit));
            let number = digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
            let number: u64 = number.ok_or(Why::Malformed("its Content-Length is no number"))?;
            length.replace(number).is_some()
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            if !header.value.eq_ignore_ascii_case(b"chunked") || request.version != Some(1) {
                return Err(Why::Malformed("its Transfer-Encoding is not `chunked`"));
            }
            std::mem::replace(&mut chunked, true)
        } else if header.name.eq_ignore_ascii_case("host") {
            std::mem::replace(&mut host, true)
        } else {
            false
        };
        if twice {
            return Err(Why::Malformed("it has a header twice that may be there once"));
        }
    }
    match length {
        Some(_) if chunked => {
            Err(Why::Malformed("it has both a Content-Length and a Transfer-Encoding"))
        }
        _ if tunnel && (length.is_some() || chunked) => {
            Err(Why::Malformed("a CONNECT has no body"))
        }
        _ if tunnel || chunked => Ok(Next::Anything),
        Some(length) if length > 0 => Ok(Next::Body(length)),
        _ => Ok(Next::Head),
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Gate<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let gate = self.get_mut();
        loop {
            if !gate.open.is_empty() {
                let count = gate.open.len().min(buf.remaining());
                buf.put_slice(&gate.open[..count]);
                gate.open.advance(count);
                return Poll::Ready(Ok(()));
            }
            // An error would be taken for the end, and the parser close before we can answer.
            if gate.refusal.is_none() {
                return Poll::Pending;
            }
            match gate.next {
                Next::Head => match gate.look() {
                    Ok(true) => continue,
                    Ok(false) => {}
                    Err(why) => {
                        if let Some(refusal) = gate.refusal.take() {
                            let _ = refusal.send(why);
                        }
                        continue;
                    }
                },
                Next::Body(0) => {
                    gate.next = Next::Head;
                    continue;
                }
                Next::Body(length) if !gate.held.is_empty() => {
                    let count = usize::try_from(length).unwrap_or(usize::MAX);
                    let count = count.min(gate.held.len());
                    gate.open = gate.held.split_to(count).freeze();
                    gate.next = Next::Body(length - count as u64);
                    continue;
                }
                Next::Anything if !gate.held.is_empty() => {
                    gate.open = gate.held.split().freeze();
                    continue;
                }
                Next::Body(_) | Next::Anything => {}
            }
            let mut piece = [0; 8 * 1024];
            let mut piece = ReadBuf::new(&mut piece);
            ready!(Pin::new(&mut gate.inner).poll_read(cx, &mut piece))?;
            if piece.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            gate.moved.fetch_add(piece.filled().len() as u64, Ordering::Relaxed);
            gate.held.extend_from_slice(piece.filled());
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Gate<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let gate = self.get_mut();
        let written = ready!(Pin::new(&mut gate.inner).poll_write(cx, buf))?;
        gate.moved.fetch_add(written as u64, Ordering::Relaxed);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::chance::Chance;

    /// What comes through, and why nothing more did. Nobody is at the other end any more.
    async fn through(sent: &[u8]) -> (Vec<u8>, Option<Why>) {
        let (mut gate, refused) = Gate::new(sent, Arc::default());
        let mut got = Vec::new();
        let why = tokio::select! {
            Ok(why) = refused => Some(why),
            read = gate.read_to_end(&mut got) => read.map(|_| None).unwrap(),
        };
        (got, why)
    }

    #[tokio::test]
    async fn sound_requests_come_through_as_they_are() {
        for sent in [
            "GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n",
            "GET http://a.example/ HTTP/1.0\r\n\r\n",
            "GET http://a.example/ HTTP/1.1\r\nHost: a\r\n\r\nGET http://b.example/ HTTP/1.1\r\n\r\n",
            "POST http://a/ HTTP/1.1\r\nContent-Length: 5\r\n\r\nhelloGET http://b/ HTTP/1.1\r\n\r\n",
            "POST http://a/ HTTP/1.1\r\nContent-Length: 5\r\n\r\n\n\n\n\n\nGET http://b/ HTTP/1.1\r\n\r\n",
            "POST http://a/ HTTP/1.1\r\nContent-Length: 0\r\n\r\nGET http://b/ HTTP/1.1\r\n\r\n",
            "POST http://a/ HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\n",
            "CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n\x16\x03\x01\n\n\r\r",
        ] {
            let (got, refused) = through(sent.as_bytes()).await;
            assert_eq!(refused, None, "{sent:?}");
            assert_eq!(String::from_utf8_lossy(&got), sent);
        }
    }

    #[tokio::test]
    async fn what_can_be_read_in_two_ways_does_not() {
        let line =
            |length: usize| format!("GET http://a/ HTTP/1.1\r\nA: {}\r\n\r\n", "a".repeat(length));
        let many =
            |count: usize| format!("GET http://a/ HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(count));
        let of = |headers: &str| format!("POST http://a/ HTTP/1.1\r\n{headers}\r\n\r\n");
        for sent in [
            of("Content-Length: 5\r\nTransfer-Encoding: chunked"),
            of("Transfer-Encoding: chunked\r\nContent-Length: 5"),
            of("transfer-encoding: chunked\r\nCONTENT-LENGTH: 0"),
            of("Content-Length: 5\r\nContent-Length: 5"),
            of("Content-Length: 5, 5"),
            of("Content-Length: +5"),
            of("Content-Length: 0x5"),
            of("Content-Length: "),
            of("Content-Length: 99999999999999999999999"),
            of("Content-Length : 5"),
            of("Content Length: 5"),
            of("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
            of("Transfer-Encoding: identity"),
            of("Transfer-Encoding: gzip, chunked"),
            of("Transfer-Encoding: chunked, identity"),
            of("Transfer-Encoding: xchunked"),
            of("Transfer-Encoding: \x0bchunked"),
            of("Transfer-Encoding:\n chunked"),
            of("Host: a\r\nHost: a"),
            of("A: b\r\n c"),
            of("A: b\0"),
            of("A: b\x7f"),
            of("A\0: b"),
            of(": b"),
            of(" A: b"),
            of("A"),
            of("A: b\nB: c"),
            of("A: b\rB: c"),
            of("A: b\r\r\nB: c"),
            "\r\nGET http://a/ HTTP/1.1\r\n\r\n".into(),
            "\nGET http://a/ HTTP/1.1\r\n\r\n".into(),
            "GET http://a/ HTTP/1.1\n\n".into(),
            "GET  http://a/ HTTP/1.1\r\n\r\n".into(),
            "GET http://a/ HTTP/2.0\r\n\r\n".into(),
            "GET http://a/\r\n\r\n".into(),
            "GET http://a/ b HTTP/1.1\r\n\r\n".into(),
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(),
            "POST http://a/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".into(),
            "CONNECT a:1 HTTP/1.1\r\nContent-Length: 5\r\n\r\n".into(),
            "CONNECT a:1 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".into(),
            line(LONGEST_LINE),
            "a".repeat(LONGEST_LINE + 2),
            many(MOST_HEADERS + 1),
            format!(
                "GET http://a/ HTTP/1.1\r\n{}",
                format!("A: {}\r\n", "a".repeat(8000)).repeat(5)
            ),
        ] {
            let (got, refused) = through(sent.as_bytes()).await;
            assert!(matches!(refused, Some(Why::Malformed(_))), "{sent:?}: {refused:?}");
            assert_eq!(got, b"", "{sent:?}");
            // Nor behind one that is sound.
            let first = "POST http://a/ HTTP/1.1\r\nContent-Length: 2\r\n\r\nok";
            let (got, refused) = through([first, &sent].concat().as_bytes()).await;
            assert!(refused.is_some(), "{sent:?}");
            assert_eq!(got, first.as_bytes());
        }
        assert_eq!(through(line(LONGEST_LINE - 10).as_bytes()).await.1, None);
        assert_eq!(through(many(MOST_HEADERS).as_bytes()).await.1, None);
    }

    #[tokio::test]
    async fn no_bytes_make_it_panic_or_change_them() {
        let mut chance = Chance::new(0x9a7e);
        let whole = b"POST http://a.example/x HTTP/1.1\r\nHost: a.example\r\nContent-Length: 4\r\n\r\n\
            bodyGET http://a.example/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n";
        for _ in 0..50_000 {
            let mut sent = whole.to_vec();
            for _ in 0..=chance.below(3) {
                let at = chance.below(sent.len());
                match chance.below(5) {
                    0 => sent[at] = chance.byte(),
                    1 => sent[at] ^= 1 << chance.below(8),
                    2 => sent.insert(at, b"\r\n :\t\0,0"[chance.below(8)]),
                    3 if sent.len() > 1 => drop(sent.remove(at)),
                    _ => sent.truncate(at.max(1)),
                }
            }
            let (got, _) = through(&sent).await;
            assert!(sent.starts_with(&got));
        }
    }
}
