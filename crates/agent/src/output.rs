//! A command's output. Bytes are read only when somebody asks for them, so a slow reader
//! slows the command down instead of filling memory; and a reader that leaves early must
//! never break a process that goes on writing: what it had is read and thrown away by
//! the session's init from then on.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use rustix::buffer::spare_capacity;
use rustix::fs::OFlags;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, ReadBuf};

use crate::init::{Ended, ExitWatch, Remote};
use crate::{Error, Result};

/// The most that one read takes: what a pipe holds by default (pipe(7)).
const CHUNK: usize = 64 * 1024;

/// Which output bytes came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// The terminal, where both are one.
    Pty,
}

/// Some bytes of output, as the command wrote them (any bytes, not only UTF-8).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Where it was written to.
    pub stream: Stream,
    /// What was written; never empty, at most 64 KiB.
    pub bytes: Bytes,
}

/// One output of a command, to be read as a byte stream.
///
/// Dropping it before its end does not break the writers: the rest is discarded in the
/// background for as long as they live.
#[derive(Debug)]
pub struct Reader {
    stream: Stream,
    /// None once the end was reached.
    source: Option<Source>,
    remote: Remote,
}

impl Reader {
    pub(crate) fn new(source: Source, stream: Stream, remote: Remote) -> Self {
        Self { stream, source: Some(source), remote }
    }

    /// Which output it is.
    pub fn stream(&self) -> Stream {
        self.stream
    }

    /// A copy of its descriptor, before its end.
    pub(crate) fn copy(&self) -> Option<io::Result<OwnedFd>> {
        self.source.as_ref()?.copy()
    }

    /// The next bytes, none at the end. `buffer` is scratch space, kept between calls.
    fn poll_chunk(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut Vec<u8>,
    ) -> Poll<io::Result<Option<Bytes>>> {
        let Some(source) = &mut self.source else {
            return Poll::Ready(Ok(None));
        };
        buffer.clear();
        buffer.reserve(CHUNK);
        let result = ready!(
            source.poll_io(cx, false, |fd| { rustix::io::read(fd, spare_capacity(buffer)) })
        );
        match ended(result)? {
            None => {
                self.source = None;
                Poll::Ready(Ok(None))
            }
            // A big chunk gives its memory away, a small one must not keep 64 KiB alive.
            Some(_) if buffer.len() >= CHUNK / 2 => {
                Poll::Ready(Ok(Some(std::mem::take(buffer).into())))
            }
            Some(_) => Poll::Ready(Ok(Some(Bytes::copy_from_slice(buffer)))),
        }
    }
}

/// End of file in both its forms: a terminal whose other end is closed gives EIO.
fn ended(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(0) => Ok(None),
        Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Ok(None),
        other => other.map(Some),
    }
}

impl AsyncRead for Reader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Some(source) = &mut self.source else {
            return Poll::Ready(Ok(()));
        };
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let room = buffer.initialize_unfilled();
        let result = ready!(source.poll_io(cx, false, |fd| rustix::io::read(fd, &mut *room)));
        match ended(result)? {
            Some(count) => buffer.advance(count),
            None => self.source = None,
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let Some(source) = self.source.take() else {
            return;
        };
        let Some(fd) = source.into_fd() else { return };
        // Very often the writers are gone and nothing is left to drain.
        let read = rustix::io::read(&fd, &mut [0u8; 512]).map_err(io::Error::from);
        if !matches!(ended(read), Ok(None)) {
            self.remote.drain(fd);
        }
    }
}

/// A command's outputs as one sequence of chunks.
///
/// It ends when both are closed, or when the command's first process has exited and
/// nothing more is there to be read at that moment: background processes may hold the
/// outputs open for ever. What they write later is discarded, and does not break them.
#[derive(Debug)]
pub struct Output {
    readers: [Option<Reader>; 2],
    /// Which one is looked at first, so that a busy one does not starve the other.
    first: usize,
    exit: ExitWatch,
    buffer: Vec<u8>,
}

impl Output {
    pub(crate) fn new(stdout: Reader, stderr: Option<Reader>, exit: ExitWatch) -> Self {
        Self { readers: [Some(stdout), stderr], first: 0, exit, buffer: Vec::new() }
    }

    /// The next bytes of either output, none at the end (and from then on). Nothing is
    /// read ahead: a command that writes faster than this is called waits.
    ///
    /// Cancel-safe: no bytes are lost.
    pub async fn next(&mut self) -> Result<Option<Chunk>> {
        loop {
            // Known before the reads: what it wrote is there by then.
            let exited = *self.exit.borrow() != Ended::NotYet;
            let Self { readers, first, exit, buffer } = self;
            let chunk = poll_fn(|cx| match poll_readers(readers, first, buffer, cx) {
                Poll::Pending if exited => Poll::Ready(Ok(None)),
                other => other,
            });
            tokio::select! {
                biased;
                chunk = chunk => {
                    let chunk = chunk.map_err(Error::io("cannot read the command's output"))?;
                    if chunk.is_none() {
                        // Leaves what is still open to be drained.
                        *readers = [None, None];
                    }
                    return Ok(chunk);
                }
                // An error means that nobody is left to tell, which `exited` will say.
                _ = exit.wait_for(|ended| *ended != Ended::NotYet), if !exited => {}
            }
        }
    }
}

fn poll_readers(
    readers: &mut [Option<Reader>; 2],
    first: &mut usize,
    buffer: &mut Vec<u8>,
    cx: &mut Context<'_>,
) -> Poll<io::Result<Option<Chunk>>> {
    let mut open = false;
    for at in [*first, 1 - *first] {
        let Some(reader) = &mut readers[at] else { continue };
        match reader.poll_chunk(cx, buffer) {
            Poll::Ready(Ok(Some(bytes))) => {
                *first = 1 - at;
                let stream = reader.stream;
                return Poll::Ready(Ok(Some(Chunk { stream, bytes })));
            }
            Poll::Ready(Ok(None)) => readers[at] = None,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => open = true,
        }
    }
    if open { Poll::Pending } else { Poll::Ready(Ok(None)) }
}

/// Our end of a pipe or terminal, not blocking. It is made known to the runtime that uses
/// it only when there was nothing to do at once.
#[derive(Debug)]
pub(crate) struct Source(Registration);

#[derive(Debug)]
enum Registration {
    None(OwnedFd),
    Done(AsyncFd<OwnedFd>),
    /// Only while it changes hands.
    Moving,
}

impl Source {
    pub(crate) fn new(fd: OwnedFd) -> Result<Self> {
        let what = "cannot make a descriptor non-blocking";
        // Newly made pipes and terminals have no other flag that could get lost.
        rustix::fs::fcntl_setfl(&fd, OFlags::NONBLOCK).map_err(Error::io(what))?;
        Ok(Self(Registration::None(fd)))
    }

    fn copy(&self) -> Option<io::Result<OwnedFd>> {
        match &self.0 {
            Registration::None(fd) => Some(fd.try_clone()),
            Registration::Done(registered) => Some(registered.get_ref().try_clone()),
            Registration::Moving => None,
        }
    }

    fn into_fd(self) -> Option<OwnedFd> {
        match self.0 {
            Registration::None(fd) => Some(fd),
            Registration::Done(registered) => Some(registered.into_inner()),
            Registration::Moving => None,
        }
    }

    fn register(&mut self, fd: OwnedFd) -> io::Result<()> {
        // AsyncFd panics without a runtime.
        if let Err(error) = tokio::runtime::Handle::try_current() {
            self.0 = Registration::None(fd);
            return Err(io::Error::other(error));
        }
        #[expect(
            deprecated,
            reason = "its successor is unsafe; what it is about, a type that lies about its \
                      descriptor, OwnedFd is not"
        )]
        match AsyncFd::try_new(fd) {
            Ok(registered) => {
                self.0 = Registration::Done(registered);
                Ok(())
            }
            Err(failed) => {
                let (fd, error) = failed.into_parts();
                self.0 = Registration::None(fd);
                Err(error)
            }
        }
    }

    /// Does `work` as soon as it does not have to wait; `writing` says for what.
    pub(crate) fn poll_io(
        &mut self,
        cx: &mut Context<'_>,
        writing: bool,
        mut work: impl FnMut(&OwnedFd) -> Result<usize, Errno>,
    ) -> Poll<io::Result<usize>> {
        // One that always has something to do must let other tasks run now and then.
        ready!(pin!(tokio::task::consume_budget()).poll(cx));
        loop {
            let fd = match &self.0 {
                Registration::None(fd) => fd,
                Registration::Done(registered) => registered.get_ref(),
                Registration::Moving => {
                    return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
                }
            };
            match work(fd) {
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {}
                result => return Poll::Ready(result.map_err(io::Error::from)),
            }
            self.0 = match std::mem::replace(&mut self.0, Registration::Moving) {
                Registration::None(fd) => {
                    self.register(fd)?;
                    continue;
                }
                other => other,
            };
            let Registration::Done(registered) = &self.0 else {
                continue;
            };
            let mut guard = ready!(if writing {
                registered.poll_write_ready(cx)
            } else {
                registered.poll_read_ready(cx)
            })?;
            // What was said to be ready may be old: only a try after this point tells.
            match work(registered.get_ref()) {
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(Errno::INTR) => {}
                result => return Poll::Ready(result.map_err(io::Error::from)),
            }
        }
    }
}
