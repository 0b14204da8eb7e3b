//! Copies between descriptors and streams, in the same way at both ends. What is read from a
//! descriptor is never more than the stream takes at once, and what a stream has brought is
//! given room for again only when it is written: whoever is slow stops whoever is fast, and
//! nothing piles up in between.

use std::future::poll_fn;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use h2::client::ResponseFuture;
use h2::{RecvStream, SendStream};
use rustix::buffer::spare_capacity;
use rustix::net::{Shutdown, shutdown};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::fd::End;
use crate::message::Kind;

/// What a stream may have on its way: as much as a pipe.
pub(crate) const WINDOW: u32 = 64 * 1024;
/// What all streams together may have. A reader that is slow must not stop the others, so this
/// is no limit of its own.
pub(crate) const CONNECTION: u32 = (1 << 31) - 1;
/// Descriptors that can be open at once. Each can have a window's memory.
pub(crate) const STREAMS: u32 = 2048;
/// What small pieces may cost together that nobody has read yet, by h2's reckoning: a piece
/// counts for what it lacks to be [`SMALL`].
pub(crate) const PIECES: usize = 32 * 1024 * 1024;
const SMALL: usize = 256;
/// How long small pieces are gathered for somebody slow.
const LAG: Duration = Duration::from_millis(10);
/// The most that is read at once.
const CHUNK: usize = 32 * 1024;

/// How long somebody goes on writing to what is closed before it is told.
const REFUSAL: Duration = Duration::from_secs(5);

/// How long a terminal that was closed stays open for what was typed before.
const HANGUP: Duration = Duration::from_secs(1);

/// How far an output is: what was read of it in the guest, what was written of it at the host,
/// and what has to be written before its command may be said to have ended.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Progress {
    pub(crate) done: u64,
    pub(crate) wanted: Option<u64>,
}

/// Which end of a stream this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Host,
    Guest,
}

/// What comes from the other side: at the host, after the head of an answer.
pub(crate) enum Incoming {
    Awaited(ResponseFuture),
    Open(RecvStream),
}

impl Incoming {
    /// The next bytes, none at the end. Cancel-safe.
    async fn data(&mut self) -> Option<Result<Bytes, h2::Error>> {
        if let Self::Awaited(response) = self {
            match response.await {
                Ok(response) => *self = Self::Open(response.into_body()),
                Err(error) => return Some(Err(error)),
            }
        }
        match self {
            Self::Open(recv) => recv.data().await,
            Self::Awaited(_) => None,
        }
    }

    /// Gives room for as much again.
    fn release(&mut self, count: usize) {
        if let Self::Open(recv) = self {
            // It can only fail if the stream is gone, which is told next.
            let _ = recv.flow_control().release_capacity(count);
        }
    }

    /// Waits for the end, whatever comes before. If that is `refused`, it gets no room, and the
    /// wait is over some time after something came.
    async fn end(&mut self, refused: bool) {
        let mut deadline = None;
        loop {
            let data = match deadline {
                Some(deadline) => match tokio::time::timeout_at(deadline, self.data()).await {
                    Ok(data) => data,
                    Err(_) => return,
                },
                None => self.data().await,
            };
            let Some(Ok(bytes)) = data else { return };
            if refused {
                deadline.get_or_insert_with(|| Instant::now() + REFUSAL);
            } else {
                self.release(bytes.len());
            }
        }
    }
}

/// Copies until both ends have said all, or one is gone, and closes the descriptor then.
///
/// A stream that was not ended by both sides is reset when nobody holds it any more. That may
/// overtake what was sent, so it is only for what nobody would read.
pub(crate) async fn carry(
    end: Arc<End>,
    kind: Kind,
    side: Side,
    mut send: SendStream<Bytes>,
    mut recv: Incoming,
    progress: watch::Sender<Progress>,
) {
    let (read, written) = match side {
        Side::Guest => (Some(&progress), None),
        Side::Host => (None, Some(&progress)),
    };
    match (kind, side) {
        (Kind::Null, _) => {}
        (Kind::Input, Side::Host) => {
            let closed = tokio::select! {
                () = outward(&end, &mut send, None) => false,
                // Nobody reads any more.
                () = recv.end(false) => true,
            };
            if !closed {
                drop(end);
                recv.end(false).await;
            }
        }
        (Kind::Output, Side::Guest) => outward(&end, &mut send, read).await,
        (Kind::Output, Side::Host) => {
            inward(&end, &mut recv, written).await;
        }
        (Kind::Input, Side::Guest) => {
            if inward(&end, &mut recv, None).await == Stop::End {
                finish(&mut send);
            }
        }
        (Kind::Terminal, Side::Guest) => {
            let ended = tokio::select! {
                () = outward(&end, &mut send, read) => false,
                () = async {
                    if inward(&end, &mut recv, None).await == Stop::Closed {
                        // What was printed before is still to be read.
                        recv.end(false).await;
                    }
                } => true,
            };
            drop(end);
            if ended {
                finish(&mut send);
            } else {
                recv.end(false).await;
            }
        }
        (Kind::Terminal, Side::Host) => {
            tokio::select! {
                () = outward(&end, &mut send, None) => {}
                () = async {
                    if inward(&end, &mut recv, written).await == Stop::Closed {
                        // What was typed before may have room, or never.
                        tokio::time::sleep(HANGUP).await;
                    }
                } => {}
            }
            drop(end);
            finish(&mut send);
            // Nobody there may be reading what was typed, and this goes before it.
            let _ = tokio::time::timeout(HANGUP, recv.end(false)).await;
        }
        (Kind::Socket, _) => {
            let inwards = async {
                let stop = inward(&end, &mut recv, None).await;
                // What it has left to say still goes the other way.
                let _ = shutdown(&end, Shutdown::Write);
                stop
            };
            let (stop, ()) = tokio::join!(inwards, outward(&end, &mut send, None));
            drop(end);
            if stop == Stop::Closed {
                recv.end(true).await;
            }
        }
    }
}

fn finish(send: &mut SendStream<Bytes>) {
    // It can only fail if nobody is there to be told.
    let _ = send.send_data(Bytes::new(), true);
}

/// From the descriptor to the stream. `progress` counts what was read, as it is read.
async fn outward(
    end: &End,
    send: &mut SendStream<Bytes>,
    progress: Option<&watch::Sender<Progress>>,
) {
    let mut buffer = Vec::new();
    let mut small = false;
    loop {
        send.reserve_capacity(CHUNK);
        if small && send.capacity() < CHUNK {
            // Whoever is slow and is told every letter by itself has much to keep: each costs
            // more than it has bytes, and that is limited.
            tokio::time::sleep(LAG).await;
        }
        if send.capacity() == 0 && !has_room(send).await {
            return;
        }
        buffer.clear();
        buffer.reserve(CHUNK);
        let read = |fd: BorrowedFd<'_>| {
            let mut read = || rustix::io::read(fd, spare_capacity(&mut buffer));
            let Some(progress) = progress else { return read() };
            let mut result = Ok(0);
            progress.send_if_modified(|progress| {
                result = read();
                progress.done += result.map_or(0, |count| count as u64);
                result.is_ok_and(|count| count > 0)
            });
            result
        };
        let read = tokio::select! {
            read = end.read(read) => read,
            _ = poll_fn(|cx| send.poll_reset(cx)) => return,
        };
        small = read.as_ref().is_ok_and(|count| *count < SMALL);
        // A terminal whose other end is closed gives an error.
        let bytes = match read {
            Err(_) | Ok(0) => return finish(send),
            // A big chunk gives its memory away, a small one must not keep all of it alive.
            Ok(count) if count >= CHUNK / 2 => Bytes::from(std::mem::take(&mut buffer)),
            Ok(_) => Bytes::copy_from_slice(&buffer),
        };
        if send.send_data(bytes, false).is_err() {
            return;
        }
    }
}

/// Waits until the stream takes something; false if it never will.
async fn has_room(send: &mut SendStream<Bytes>) -> bool {
    loop {
        match poll_fn(|cx| send.poll_capacity(cx)).await {
            Some(Ok(0)) => {}
            Some(Ok(_)) => return true,
            Some(Err(_)) | None => return false,
        }
    }
}

/// Why nothing more is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// All was.
    End,
    /// The stream is gone.
    Reset,
    /// Nobody reads any more.
    Closed,
}

/// From the stream to the descriptor. `progress` counts what was written.
async fn inward(
    end: &End,
    recv: &mut Incoming,
    progress: Option<&watch::Sender<Progress>>,
) -> Stop {
    loop {
        let data = tokio::select! {
            data = recv.data() => data,
            () = end.closed() => return Stop::Closed,
        };
        let mut bytes = match data {
            Some(Ok(bytes)) => bytes,
            Some(Err(_)) => return Stop::Reset,
            None => return Stop::End,
        };
        while bytes.has_remaining() {
            let Ok(count) = end.write(&bytes).await else { return Stop::Closed };
            bytes.advance(count);
            recv.release(count);
            if let Some(progress) = progress {
                progress.send_modify(|progress| progress.done += count as u64);
            }
        }
    }
}

/// Sends all of these bytes, as the other side takes them; false if it never will.
pub(crate) async fn send_all(send: &mut SendStream<Bytes>, mut bytes: Bytes) -> bool {
    while bytes.has_remaining() {
        send.reserve_capacity(bytes.len());
        if send.capacity() == 0 && !has_room(send).await {
            return false;
        }
        let count = send.capacity().min(bytes.len());
        if send.send_data(bytes.split_to(count), false).is_err() {
            return false;
        }
    }
    true
}

/// Reads length-prefixed packets from a stream.
pub(crate) struct PacketReader {
    recv: RecvStream,
    pending: BytesMut,
    /// The longest that is believed.
    limit: usize,
}

/// Why there is no packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoPacket {
    /// The stream was ended.
    End,
    /// It was reset, or the connection is over.
    Broken,
    /// It is longer than any.
    TooLong,
}

impl PacketReader {
    pub(crate) fn new(recv: RecvStream, limit: usize) -> Self {
        Self { recv, pending: BytesMut::new(), limit }
    }

    /// Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Bytes, NoPacket> {
        loop {
            if let Some(prefix) = self.pending.first_chunk::<4>() {
                let length = usize::try_from(u32::from_le_bytes(*prefix)).unwrap_or(usize::MAX);
                if length > self.limit {
                    return Err(NoPacket::TooLong);
                }
                if self.pending.len() - 4 >= length {
                    self.pending.advance(4);
                    return Ok(self.pending.split_to(length).freeze());
                }
            }
            match self.recv.data().await {
                Some(Ok(bytes)) => {
                    self.pending.extend_from_slice(&bytes);
                    let _ = self.recv.flow_control().release_capacity(bytes.len());
                }
                Some(Err(_)) => return Err(NoPacket::Broken),
                None => return Err(NoPacket::End),
            }
        }
    }
}
