//! The way from a blob to a tar stream: decompressed in a thread of its own, both sides hashed,
//! the limits on size and ratio kept.
//!
//! Holds a few chunks in memory, never a whole blob, however much comes out of it.

use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest as _, Sha256};

use crate::manifest::Digest;
use crate::{Error, Limits, Result};

const CHUNK: usize = 256 << 10;
/// How many chunks wait for whoever makes the files.
const CHUNKS: usize = 8;
/// Below this much content no ratio is suspicious: a small file of zeros is no bomb.
const RATIO_FREE: u64 = 64 << 20;
/// The largest window a zstd frame may ask for, as a power of two: what `zstd --ultra` makes.
const WINDOW: u32 = 27;

/// What is left of [`Limits::bytes`] for one image, whose layers share it.
#[derive(Clone, Debug)]
pub struct Budget(Arc<AtomicU64>);

impl Budget {
    pub fn new(limits: &Limits) -> Self {
        Self(Arc::new(AtomicU64::new(limits.bytes)))
    }

    fn spend(&self, bytes: u64) -> bool {
        let spend = |left: u64| left.checked_sub(bytes);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).is_ok()
    }
}

/// Both digests of a blob.
pub struct Digests {
    /// Of the bytes as they were stored or sent.
    pub blob: Digest,
    /// Of what came out of them.
    pub content: Digest,
}

/// What the reading of one blob is bounded by.
pub struct Bounds<'a> {
    pub limits: &'a Limits,
    pub budget: &'a Budget,
    pub cancelled: &'a AtomicBool,
}

/// Decompresses `blob` (gzip, zstd or nothing, told by its first bytes: media types are often
/// wrong) and hands the content to `consume`. Reads to the very end in any case, so that the
/// digests are those of everything.
pub fn decompressed<T>(
    blob: impl Read + Send,
    what: &str,
    bounds: &Bounds<'_>,
    consume: impl FnOnce(&mut Chunks) -> Result<T>,
) -> Result<(T, Digests)> {
    thread::scope(|scope| {
        let (sender, receiver) = sync_channel(CHUNKS);
        let thread = thread::Builder::new()
            .name("denizen-image".into())
            .spawn_scoped(scope, move || pump(blob, what, bounds, &sender))
            .map_err(|e| Error::io("start a thread for", what.as_ref(), e))?;
        let mut chunks = Chunks { receiver, chunk: Vec::new(), at: 0 };
        let consumed = consume(&mut chunks).and_then(|value| {
            while !chunks.fill_buf().map_err(|e| Error::reading(what, e))?.is_empty() {
                chunks.consume(usize::MAX);
            }
            Ok(value)
        });
        // Whereupon the thread stops too, if it has not.
        drop(chunks);
        let digests = thread
            .join()
            .unwrap_or_else(|_| Err(Error::damaged(what, "the decompressor panicked")));
        Ok((consumed?, digests?))
    })
}

/// Runs in the thread. A problem goes down the channel, in its place in the stream; what is
/// returned counts only if the other side saw the end.
fn pump(
    blob: impl Read,
    what: &str,
    bounds: &Bounds<'_>,
    sender: &SyncSender<io::Result<Vec<u8>>>,
) -> Result<Digests> {
    match pump_all(blob, what, bounds, sender) {
        Ok(digests) => Ok(digests),
        Err(error) => {
            // If nobody is there to hear of it, nobody minds.
            let _ = sender.send(Err(io::Error::other(error)));
            Err(Error::damaged(what, "it was not read to its end"))
        }
    }
}

fn pump_all(
    blob: impl Read,
    what: &str,
    bounds: &Bounds<'_>,
    sender: &SyncSender<io::Result<Vec<u8>>>,
) -> Result<Digests> {
    let limits = bounds.limits;
    let taken = Arc::new(AtomicU64::new(0));
    let counted = Counted {
        inner: blob,
        hasher: Sha256::new(),
        taken: Arc::clone(&taken),
        limit: limits.blob_bytes,
        what,
    };
    let mut decoder = Decoder::new(counted, what)?;
    let mut hasher = Sha256::new();
    let mut total = 0_u64;
    loop {
        let mut chunk = vec![0; CHUNK];
        let length = fill(&mut decoder, &mut chunk).map_err(|e| Error::reading(what, e))?;
        chunk.truncate(length);
        if length == 0 {
            break;
        }
        if bounds.cancelled.load(Ordering::Relaxed) {
            return Err(Error::Cancelled { what: what.to_owned() });
        }
        let length = u64::try_from(length).unwrap_or(u64::MAX);
        total = total.saturating_add(length);
        if !bounds.budget.spend(length) {
            return Err(Error::too_large(what, limits.bytes, "bytes of unpacked layers"));
        }
        let allowed = taken.load(Ordering::Relaxed).saturating_mul(limits.ratio);
        if total > RATIO_FREE && total > allowed {
            return Err(Error::too_large(what, limits.ratio, "bytes for each compressed one"));
        }
        hasher.update(&chunk);
        if sender.send(Ok(chunk)).is_err() {
            return Err(Error::damaged(what, "nobody wants the rest"));
        }
    }
    let mut counted = decoder.into_inner();
    // What follows the compressed data is part of the blob.
    io::copy(&mut counted, &mut io::sink()).map_err(|e| Error::reading(what, e))?;
    Ok(Digests { blob: counted.into_inner().hasher.into(), content: hasher.into() })
}

/// Reads until the buffer is full or there is nothing more.
fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match reader.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(got) => length += got,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(length)
}

struct Counted<'a, R> {
    inner: R,
    hasher: Sha256,
    taken: Arc<AtomicU64>,
    limit: u64,
    what: &'a str,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..got]);
        let got_wide = u64::try_from(got).unwrap_or(u64::MAX);
        let before = self.taken.fetch_add(got_wide, Ordering::Relaxed);
        if before.saturating_add(got_wide) > self.limit {
            return Err(io::Error::other(Error::too_large(self.what, self.limit, "bytes")));
        }
        Ok(got)
    }
}

/// The first bytes, which tell the compression, and then the rest.
type Source<R> = BufReader<io::Chain<Cursor<Vec<u8>>, R>>;

enum Decoder<R: Read> {
    Plain(Source<R>),
    Gzip(MultiGzDecoder<Source<R>>),
    Zstd(zstd::stream::read::Decoder<'static, Source<R>>),
}

impl<R: Read> Decoder<R> {
    fn new(mut blob: R, what: &str) -> Result<Self> {
        let failed = |e| Error::reading(what, e);
        let mut head = vec![0; 4];
        let length = fill(&mut blob, &mut head).map_err(failed)?;
        head.truncate(length);
        let gzip = head.starts_with(&[0x1f, 0x8b]);
        // A frame, or one to be skipped in front of the first.
        let zstd = matches!(head[..], [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18]);
        let source = BufReader::with_capacity(CHUNK, Cursor::new(head).chain(blob));
        if gzip {
            Ok(Self::Gzip(MultiGzDecoder::new(source)))
        } else if zstd {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(source).map_err(failed)?;
            decoder.window_log_max(WINDOW).map_err(failed)?;
            Ok(Self::Zstd(decoder))
        } else {
            Ok(Self::Plain(source))
        }
    }

    fn into_inner(self) -> Rest<R> {
        Rest(match self {
            Self::Plain(source) => source,
            Self::Gzip(decoder) => decoder.into_inner(),
            Self::Zstd(decoder) => decoder.finish(),
        })
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(source) => source.read(buffer),
            Self::Gzip(decoder) => decoder.read(buffer),
            Self::Zstd(decoder) => decoder.read(buffer),
        }
    }
}

/// What a decoder left unread.
struct Rest<R>(Source<R>);

impl<R: Read> Rest<R> {
    fn into_inner(self) -> R {
        self.0.into_inner().into_inner().1
    }
}

impl<R: Read> Read for Rest<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

/// The content, on the other side of the thread.
pub struct Chunks {
    receiver: Receiver<io::Result<Vec<u8>>>,
    chunk: Vec<u8>,
    at: usize,
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let ready = self.fill_buf()?;
        let length = ready.len().min(buffer.len());
        buffer[..length].copy_from_slice(&ready[..length]);
        self.consume(length);
        Ok(length)
    }
}

impl BufRead for Chunks {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.chunk.len() {
            // The sender is gone when it has sent everything.
            self.chunk = self.receiver.recv().unwrap_or_else(|_| Ok(Vec::new()))?;
            self.at = 0;
        }
        Ok(&self.chunk[self.at..])
    }

    fn consume(&mut self, amount: usize) {
        self.at = self.at.saturating_add(amount).min(self.chunk.len());
    }
}
