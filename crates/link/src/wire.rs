//! A byte stream that outlives its transport: nothing is lost, doubled or out of order when a
//! transport is cut at any byte and another takes its place, without the guest being told.
//!
//! What goes over a transport is frames, each ended by a zero byte, which is nowhere within
//! ([`cobs`]). Numbers are little-endian. A frame is `kind: u8, length of the rest: u16`, and
//!
//! | kind | name | follows |
//! |---|---|---|
//! | 1 | data | offset u64, the bytes |
//! | 2 | ack | offset u64: all before it was taken |
//! | 3 | hello | nonce 16 bytes, attempt u64, offset u64: all before it was taken |
//!
//! The host begins each transport with a zero, which ends whatever the guest was in the middle
//! of, and a hello. The guest answers with a hello that has the same nonce and attempt; before
//! that the host believes nothing, as it may be of an earlier transport or only a part of a
//! frame. Then both send again what the other has not taken. A nonce that is new to the guest is
//! another host's: all that was before it is over.
//!
//! What is not a frame is damage, and left out. Only a frame that cannot be true is an error,
//! which no new transport mends. Nothing the other side sends makes more memory of itself than
//! [`BUFFER`] and a frame.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;

use crate::{Failure, cobs};

/// What one side may have sent that the other has not taken.
pub(crate) const BUFFER: usize = 256 * 1024;
/// The longest frame, stuffed.
pub(crate) const FRAME: usize = 32 * 1024;
/// The most data in a frame.
const PIECE: usize = 30 * 1024;
/// About as much goes to a transport at once.
const BATCH: usize = 60 * 1024;
/// How much is taken before the other side is told, if nothing else is to be said.
const QUIET: u64 = 32 * 1024;

const DATA: u8 = 1;
const ACK: u8 = 2;
const HELLO: u8 = 3;

/// What tells one host from another.
pub(crate) type Nonce = [u8; 16];

/// One end of the wire, whatever its transport is.
#[derive(Clone)]
pub(crate) struct Wire {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    status: watch::Sender<Status>,
}

/// What others wait for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Status {
    /// The transport over which both sides have spoken last.
    pub(crate) attempt: u64,
    /// How many hosts a guest has had.
    pub(crate) epoch: u64,
    /// Why this is over.
    pub(crate) failed: Option<Failure>,
}

struct State {
    /// A guest has none before its first host.
    nonce: Option<Nonce>,
    is_host: bool,
    /// Counts the host's transports.
    attempt: u64,
    /// Counts the guest's hosts.
    epoch: u64,
    /// Both have said hello on this transport.
    ready: bool,
    hello: bool,
    failed: Option<Failure>,
    /// What was written and not yet acknowledged. It begins at `base`.
    unacked: VecDeque<u8>,
    base: u64,
    /// The next byte for this transport, and how far any has been.
    next: u64,
    most: u64,
    /// What was received and not yet read. It ends at `received`.
    inbox: VecDeque<u8>,
    received: u64,
    /// What the other side knows of.
    told: u64,
    reader: Option<Waker>,
    writer: Option<Waker>,
    transport: Option<Waker>,
    flush: Option<Waker>,
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

impl State {
    fn new(nonce: Option<Nonce>) -> Self {
        Self {
            is_host: nonce.is_some(),
            nonce,
            attempt: 0,
            epoch: 0,
            ready: false,
            hello: false,
            failed: None,
            unacked: VecDeque::new(),
            base: 0,
            next: 0,
            most: 0,
            inbox: VecDeque::new(),
            received: 0,
            told: 0,
            reader: None,
            writer: None,
            transport: None,
            flush: None,
        }
    }

    fn wake_all(&mut self) {
        for waker in [&mut self.reader, &mut self.writer, &mut self.transport, &mut self.flush] {
            wake(waker);
        }
    }

    /// All before this was read.
    fn taken(&self) -> u64 {
        self.received.saturating_sub(length(&self.inbox))
    }

    /// The other side has taken all before `offset`.
    fn acknowledged(&mut self, offset: u64) -> Result<(), Failure> {
        if offset > self.most {
            return Err(Failure::Acknowledged { offset, sent: self.most });
        }
        let count = offset.saturating_sub(self.base);
        self.unacked.drain(..usize::try_from(count).unwrap_or(0).min(self.unacked.len()));
        self.base = self.base.max(offset);
        self.next = self.next.max(self.base);
        if count > 0 {
            wake(&mut self.writer);
        }
        Ok(())
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        let end = offset.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        if end > self.taken().saturating_add(BUFFER as u64) {
            return Err(Failure::Overrun);
        }
        // Nothing is lost of a transport but its end, and another one begins with a hello: what is
        // missing here would never come.
        if offset > self.received {
            return Err(Failure::Missing { offset, received: self.received });
        }
        if end > self.received {
            let known = usize::try_from(self.received - offset).unwrap_or(usize::MAX);
            self.inbox.extend(bytes.get(known..).unwrap_or_default());
            self.received = end;
            wake(&mut self.reader);
        }
        Ok(())
    }

    fn hello(&mut self, nonce: Nonce, attempt: u64, offset: u64) -> Result<bool, Failure> {
        let known = self.nonce == Some(nonce);
        if self.is_host {
            if !known || attempt != self.attempt || self.ready {
                return Ok(false);
            }
        } else if !known {
            self.wake_all();
            *self = Self {
                nonce: Some(nonce),
                is_host: false,
                epoch: self.epoch + 1,
                ..Self::new(None)
            };
        }
        if offset < self.base {
            return Err(Failure::Behind { offset, forgotten: self.base });
        }
        self.acknowledged(offset)?;
        self.attempt = attempt;
        self.next = offset;
        self.hello |= !self.is_host;
        self.ready = true;
        wake(&mut self.transport);
        Ok(true)
    }

    /// Adds what is to be sent now to `out`.
    fn outgoing(&mut self, out: &mut Vec<u8>) {
        let mut body = Vec::with_capacity(PIECE + 16);
        if let (true, Some(nonce)) = (self.hello, self.nonce) {
            self.hello = false;
            self.told = self.taken();
            body.extend(nonce);
            body.extend(self.attempt.to_le_bytes());
            body.extend(self.told.to_le_bytes());
            out.push(0);
            frame(HELLO, &body, out);
        }
        if !self.ready {
            return;
        }
        let taken = self.taken();
        let mut at = usize::try_from(self.next.saturating_sub(self.base)).unwrap_or(usize::MAX);
        let has_data = at < self.unacked.len();
        if taken - self.told >= QUIET || (has_data && taken > self.told) {
            self.told = taken;
            frame(ACK, &taken.to_le_bytes(), out);
        }
        while out.len() < BATCH && at < self.unacked.len() {
            let count = PIECE.min(self.unacked.len() - at);
            body.clear();
            body.extend(self.next.to_le_bytes());
            let (front, back) = self.unacked.as_slices();
            let first = front.get(at..).unwrap_or_default();
            let first = first.get(..count).unwrap_or(first);
            let second = at.saturating_sub(front.len());
            let second = back.get(second..).unwrap_or_default();
            let second = second.get(..count - first.len()).unwrap_or_default();
            body.extend_from_slice(first);
            body.extend_from_slice(second);
            frame(DATA, &body, out);
            at += count;
            self.next += count as u64;
        }
        self.most = self.most.max(self.next);
        if at >= self.unacked.len() {
            wake(&mut self.flush);
        }
    }
}

fn length(bytes: &VecDeque<u8>) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// Appends a frame. The body is never longer than a piece and its offset.
fn frame(kind: u8, body: &[u8], out: &mut Vec<u8>) {
    let mut plain = Vec::with_capacity(body.len() + 3);
    plain.push(kind);
    plain.extend(u16::try_from(body.len()).unwrap_or(u16::MAX).to_le_bytes());
    plain.extend_from_slice(body);
    cobs::stuff(&plain, out);
    out.push(0);
}

/// Finds the frames in what a transport brings.
#[derive(Default)]
pub(crate) struct Parser {
    stuffed: Vec<u8>,
    /// What has begun is too long to be a frame.
    too_long: bool,
    plain: Vec<u8>,
}

#[derive(Debug, PartialEq, Eq)]
enum Frame<'a> {
    Data(u64, &'a [u8]),
    Ack(u64),
    Hello(Nonce, u64, u64),
}

impl Parser {
    fn parse(&mut self, mut bytes: &[u8], mut take: impl FnMut(Frame<'_>)) {
        while let Some(end) = memchr::memchr(0, bytes) {
            let (part, rest) = bytes.split_at(end);
            self.add(part);
            if !self.too_long
                && cobs::unstuff(&self.stuffed, &mut self.plain)
                && let Some(frame) = read(&self.plain)
            {
                take(frame);
            }
            self.stuffed.clear();
            self.too_long = false;
            bytes = rest.get(1..).unwrap_or_default();
        }
        self.add(bytes);
    }

    fn add(&mut self, part: &[u8]) {
        self.too_long |= self.stuffed.len() + part.len() > FRAME;
        if !self.too_long {
            self.stuffed.extend_from_slice(part);
        }
    }
}

/// Takes a frame apart; none if it is damaged.
fn read(plain: &[u8]) -> Option<Frame<'_>> {
    let ([kind, low, high], body) = plain.split_first_chunk()?;
    if usize::from(u16::from_le_bytes([*low, *high])) != body.len() {
        return None;
    }
    match *kind {
        DATA => {
            let (offset, bytes) = body.split_first_chunk()?;
            Some(Frame::Data(u64::from_le_bytes(*offset), bytes))
        }
        ACK => Some(Frame::Ack(u64::from_le_bytes(body.try_into().ok()?))),
        HELLO => {
            let (nonce, rest) = body.split_first_chunk()?;
            let (attempt, offset) = rest.split_first_chunk()?;
            let offset = offset.try_into().ok()?;
            Some(Frame::Hello(*nonce, u64::from_le_bytes(*attempt), u64::from_le_bytes(offset)))
        }
        _ => None,
    }
}

impl Wire {
    /// The host's end, which has no transport yet.
    pub(crate) fn host(nonce: Nonce) -> Self {
        Self::new(Some(nonce))
    }

    /// The guest's end, which has no host yet.
    pub(crate) fn guest() -> Self {
        Self::new(None)
    }

    fn new(nonce: Option<Nonce>) -> Self {
        let state = Mutex::new(State::new(nonce));
        Self { shared: Arc::new(Shared { state, status: watch::Sender::default() }) }
    }

    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.shared.status.subscribe()
    }

    /// The byte stream. It breaks when a guest gets another host.
    pub(crate) fn stream(&self) -> Stream {
        let epoch = self.shared.state.lock().epoch;
        Stream { shared: Arc::clone(&self.shared), epoch }
    }

    /// The host has another transport, over which it is to speak, or none; gives its number.
    pub(crate) fn begin(&self, speak: bool) -> u64 {
        let mut state = self.shared.state.lock();
        state.attempt += 1;
        state.ready = false;
        state.hello = speak;
        wake(&mut state.transport);
        state.attempt
    }

    /// Puts what the transport is to send into `out`, which is cleared before; waits for
    /// something. False if the host's transport is no longer this one.
    pub(crate) fn poll_outgoing(
        &self,
        cx: &mut Context<'_>,
        attempt: Option<u64>,
        out: &mut Vec<u8>,
    ) -> Poll<bool> {
        let mut state = self.shared.state.lock();
        if attempt.is_some_and(|attempt| attempt != state.attempt) {
            return Poll::Ready(false);
        }
        out.clear();
        if state.failed.is_none() {
            state.outgoing(out);
        }
        if out.is_empty() {
            state.transport = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(true)
    }

    /// Takes what the transport has brought.
    pub(crate) fn incoming(&self, attempt: Option<u64>, parser: &mut Parser, bytes: &[u8]) {
        let mut state = self.shared.state.lock();
        if attempt.is_some_and(|attempt| attempt != state.attempt) {
            return;
        }
        let mut news = false;
        parser.parse(bytes, |frame| {
            // After an error, only another host's hello is of interest.
            let over = state.failed.is_some();
            let taken = match frame {
                Frame::Hello(nonce, ..)
                    if over && (state.is_host || state.nonce == Some(nonce)) =>
                {
                    return;
                }
                Frame::Hello(nonce, attempt, offset) => {
                    state.hello(nonce, attempt, offset).map(|valid| news |= valid)
                }
                _ if over || !state.ready => return,
                Frame::Data(offset, bytes) => state.data(offset, bytes),
                Frame::Ack(offset) => state.acknowledged(offset),
            };
            if let Err(failure) = taken {
                state.failed = Some(failure);
                state.wake_all();
                news = true;
            }
        });
        if news {
            let (attempt, epoch, ready) = (state.attempt, state.epoch, state.ready);
            let failed = state.failed.clone();
            drop(state);
            self.shared.status.send_modify(|status| {
                status.epoch = epoch;
                status.failed = failed;
                if ready {
                    status.attempt = attempt;
                }
            });
        }
    }

    /// Whether all that was written has gone to a transport.
    pub(crate) fn poll_flushed(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.shared.state.lock();
        if state.next >= state.base + length(&state.unacked) || state.failed.is_some() {
            return Poll::Ready(());
        }
        state.flush = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// The byte stream of a wire; see [`Wire::stream`].
pub(crate) struct Stream {
    shared: Arc<Shared>,
    epoch: u64,
}

impl Stream {
    fn check(&self, state: &State) -> io::Result<()> {
        match &state.failed {
            _ if state.epoch != self.epoch => Err(io::ErrorKind::ConnectionReset.into()),
            Some(failure) => Err(io::Error::other(failure.clone())),
            None => Ok(()),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // A guest that never stops talking must not have a thread of the host to itself.
        let turn = std::task::ready!(tokio::task::coop::poll_proceed(cx));
        let mut state = self.shared.state.lock();
        self.check(&state)?;
        if state.inbox.is_empty() {
            state.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let (front, back) = state.inbox.as_slices();
        let mut count = 0;
        for part in [front, back] {
            let (part, _) = part.split_at(part.len().min(buffer.remaining()));
            buffer.put_slice(part);
            count += part.len();
        }
        state.inbox.drain(..count);
        if state.taken() - state.told >= QUIET {
            wake(&mut state.transport);
        }
        turn.made_progress();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.shared.state.lock();
        self.check(&state)?;
        let (bytes, _) = bytes.split_at(bytes.len().min(BUFFER - state.unacked.len()));
        if bytes.is_empty() {
            state.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        state.unacked.extend(bytes);
        wake(&mut state.transport);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Does nothing: what is above knows its own end.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests;
