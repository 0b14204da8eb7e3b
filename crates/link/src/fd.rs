//! Descriptors that do not block: ends of pipes, sockets and terminals, sockets for packets with
//! descriptors, and the guest's port.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, Ready};

/// How often is looked at what cannot be waited for.
const PAUSE: Duration = Duration::from_millis(20);
/// The most descriptors that a packet has.
const DESCRIPTORS: usize = 4;

fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = fcntl_getfl(&fd)?;
    if !flags.contains(OFlags::NONBLOCK) {
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    }
    #[expect(
        deprecated,
        reason = "its successor is unsafe; what it is about, a type that lies about its \
                  descriptor, OwnedFd is not"
    )]
    AsyncFd::try_new(fd).map_err(|failed| failed.into_parts().1)
}

/// Does `work` as soon as it does not have to wait.
async fn when<T>(
    fd: &AsyncFd<OwnedFd>,
    interest: Interest,
    mut work: impl FnMut(BorrowedFd<'_>) -> Result<T, Errno>,
) -> io::Result<T> {
    // One that always has something to do must let other tasks run now and then.
    tokio::task::consume_budget().await;
    loop {
        match work(fd.get_ref().as_fd()) {
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => {}
            result => return Ok(result?),
        }
        let mut guard = fd.ready(interest).await?;
        // What was said to be ready may be old: only a try after this point tells.
        match work(fd.get_ref().as_fd()) {
            Err(Errno::AGAIN) => {
                // What was closed stays so for the runtime, though others may open it again.
                let closed = guard.ready().is_read_closed() || guard.ready().is_write_closed();
                guard.clear_ready();
                if closed {
                    tokio::time::sleep(PAUSE).await;
                }
            }
            Err(Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// An end of a pipe, a stream socket or a terminal.
#[derive(Debug)]
pub(crate) struct End(AsyncFd<OwnedFd>);

impl End {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        register(fd).map(Self)
    }

    /// Reads with `work`, which gives `AGAIN` if there is nothing. Cancel-safe.
    pub(crate) async fn read<T>(
        &self,
        work: impl FnMut(BorrowedFd<'_>) -> Result<T, Errno>,
    ) -> io::Result<T> {
        when(&self.0, Interest::READABLE, work).await
    }

    /// Cancel-safe.
    pub(crate) async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        when(&self.0, Interest::WRITABLE, |fd| rustix::io::write(fd, bytes)).await
    }

    /// Waits until a connection is made, or is known to have failed. Cancel-safe.
    pub(crate) async fn connected(&self) -> io::Result<()> {
        let made = |fd: BorrowedFd<'_>| {
            let mut ready = [PollFd::new(&fd, PollFlags::OUT)];
            if poll(&mut ready, Some(&Timespec::default()))? == 0 {
                return Err(Errno::AGAIN);
            }
            rustix::net::sockopt::socket_error(fd)
        };
        Ok(when(&self.0, Interest::WRITABLE, made).await??)
    }

    /// Waits until nobody is left to read what is written. Cancel-safe.
    pub(crate) async fn closed(&self) {
        while let Ok(mut guard) = self.0.ready(Interest::WRITABLE).await {
            if guard.ready().is_write_closed() {
                return;
            }
            // Whoever writes tries first, so that nobody misses this.
            guard.clear_ready_matching(Ready::WRITABLE);
        }
    }
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// A socket for packets with descriptors.
#[derive(Debug)]
pub(crate) struct Packets(AsyncFd<OwnedFd>);

impl Packets {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        register(fd).map(Self)
    }

    /// Cancel-safe: it is sent or not.
    pub(crate) async fn send(
        &self,
        packet: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let send = |fd: BorrowedFd<'_>| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !descriptors.is_empty() {
                // There is room: no packet has more.
                control.push(SendAncillaryMessage::ScmRights(descriptors));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            sendmsg(fd, &[IoSlice::new(packet)], &mut control, flags)
        };
        when(&self.0, Interest::WRITABLE, send).await.map(drop)
    }

    /// The next packet's length, 0 at the end, and what came along. Cancel-safe.
    pub(crate) async fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let receive = |fd: BorrowedFd<'_>| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let message = recvmsg(fd, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
            let mut descriptors = Vec::new();
            for part in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = part {
                    descriptors.extend(rights);
                }
            }
            Ok((message.bytes, descriptors))
        };
        match when(&self.0, Interest::READABLE, receive).await {
            // What an owner that is gone has not read.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok((0, Vec::new())),
            received => received,
        }
    }

    /// Nothing more is sent.
    pub(crate) fn shut_down(&self) {
        // It can only fail if the other end is gone already.
        let _ = rustix::net::shutdown(self.0.get_ref(), rustix::net::Shutdown::Write);
    }
}

/// The guest's end of the transport. While no host is connected, the kernel says that it has
/// hung up, over and over, so that waiting for that would be spinning; and what has hung up once
/// is never waited for again by the runtime, unless it is registered anew.
pub(crate) struct Port(Option<AsyncFd<OwnedFd>>);

impl Port {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        register(fd).map(|fd| Self(Some(fd)))
    }

    /// Reads something. Not cancel-safe.
    pub(crate) async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.work(Interest::READABLE, |fd| match rustix::io::read(fd, &mut *buffer) {
            Ok(0) => Err(Errno::PIPE),
            read => read,
        })
        .await
    }

    /// Writes something. Not cancel-safe.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.work(Interest::WRITABLE, |fd| rustix::io::write(fd, bytes)).await
    }

    async fn work(
        &mut self,
        interest: Interest,
        mut work: impl FnMut(BorrowedFd<'_>) -> Result<usize, Errno>,
    ) -> io::Result<usize> {
        tokio::task::consume_budget().await;
        loop {
            let fd = self.0.as_ref().ok_or(io::ErrorKind::NotConnected)?;
            match work(fd.get_ref().as_fd()) {
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => {
                    self.pause().await?;
                    continue;
                }
                done => return Ok(done?),
            }
            let mut guard = fd.ready(interest).await?;
            let ready = guard.ready();
            if ready.is_read_closed() || ready.is_write_closed() {
                let mut now = [PollFd::new(fd.get_ref(), PollFlags::IN | PollFlags::OUT)];
                poll(&mut now, Some(&Timespec::default()))?;
                if now.iter().any(|now| now.revents().contains(PollFlags::HUP)) {
                    self.pause().await?;
                } else {
                    self.renew()?;
                }
                continue;
            }
            match work(fd.get_ref().as_fd()) {
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(Errno::INTR | Errno::PIPE | Errno::CONNRESET) => {}
                done => return Ok(done?),
            }
        }
    }

    async fn pause(&mut self) -> io::Result<()> {
        tokio::time::sleep(PAUSE).await;
        self.renew()
    }

    fn renew(&mut self) -> io::Result<()> {
        if let Some(fd) = self.0.take() {
            self.0 = Some(register(fd.into_inner())?);
        }
        Ok(())
    }
}
