//! The host's relay: to the owner, at the other end of a socket, it is what the `denizen-init`
//! in the guest would be if it could be handed descriptors. Nothing that the guest sends is
//! believed: it can end the link, and no more.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::{Request, StatusCode};
use parking_lot::Mutex;
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pty::OpenptFlags;
use rustix::termios::{OptionalActions, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::Failure;
use crate::carry::{
    CONNECTION, Incoming, NoPacket, PIECES, PacketReader, Progress, STREAMS, Side, WINDOW, carry,
    send_all,
};
use crate::fd::{End, Packets};
use crate::message::{self, Descriptor, Kind, Mark, Steps, Wake};
use crate::tasks::{Owner, Tasks};
use crate::wire::{Nonce, Parser, Status, Wire};

/// How long a command that was killed is not said to have ended, because nobody reads its output.
const STALLED: Duration = Duration::from_millis(500);
/// The longest answer to a request.
const ANSWER: usize = 16 * 1024;

/// The way to a guest's session. It goes on from one transport to the next; see
/// [`connect`](Self::connect). Dropping it closes the owner's socket.
pub struct Link {
    wire: Wire,
    requests: SendRequest<Bytes>,
    transport: tokio::sync::Mutex<JoinSet<()>>,
    ended: watch::Receiver<Option<Failure>>,
    _owner: Owner,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").finish_non_exhaustive()
    }
}

/// Why a transport does not lead to the guest.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody answered in time.
    #[error("the guest did not answer within {0:?}")]
    NoAnswer(Duration),
    /// The transport ended before somebody answered.
    #[error("the connection ended before the guest answered")]
    Closed,
    /// The link is beyond repair.
    #[error(transparent)]
    Failed(#[from] Failure),
}

/// Why a request to the guest has no answer.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The connection is over.
    #[error("the guest cannot be asked")]
    Connection(#[from] h2::Error),
    /// It answers with something else.
    #[error("the guest does not answer as it should")]
    Answer,
}

impl Link {
    /// A link without a transport, and the owner's end of the socket (`SOCK_SEQPACKET`). What the
    /// owner asks for before there is a transport waits. Needs a runtime.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let runtime = tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
        let mut nonce = Nonce::default();
        getrandom::fill(&mut nonce).map_err(io::Error::other)?;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let packets = Packets::new(ours)?;
        let wire = Wire::host(nonce);
        let (end, ended) = watch::channel(None);
        let owner = Owner::new();
        // What is written first finds room in the wire, so that this waits for nothing.
        let handshake = std::pin::pin!(handshake(wire.stream()));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let std::task::Poll::Ready(Ok((requests, connection))) = handshake.poll(&mut context)
        else {
            return Err(io::Error::other("the connection cannot be begun"));
        };
        let _inside = runtime.enter();
        let tasks = owner.tasks();
        // A task of its own: what comes is to be taken also while more comes.
        let relay = Relay::run(packets, requests.clone(), tasks.clone());
        let (over, relay_over) = tokio::sync::oneshot::channel();
        owner.tasks().start(async move {
            // Nobody may be waiting any more.
            let _ = over.send(relay.await);
        });
        owner.tasks().start(async move {
            let mut connection = std::pin::pin!(connection);
            let failure = tokio::select! {
                biased;
                ended = &mut connection => match ended {
                    Ok(()) => Failure::Ended,
                    Err(error) => Failure::Connection(error.to_string()),
                },
                failure = relay_over => failure.unwrap_or(Failure::Ended),
            };
            let well = failure == Failure::Ended;
            end.send_replace(Some(failure));
            if well {
                // What was printed last is still on its way.
                let _ = connection.await;
            }
            // What is open is closed at both ends.
            tasks.end();
        });
        let transport = tokio::sync::Mutex::default();
        Ok((Self { wire, requests, transport, ended, _owner: owner }, theirs))
    }

    /// Goes on over this transport, in the place of an earlier one, and waits for at most
    /// `patience` until the guest answers.
    ///
    /// Cancel-safe: the link then has no transport, or this one.
    pub async fn connect<S>(&self, stream: S, patience: Duration) -> Result<(), ConnectError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let mut transport = self.transport.lock().await;
        transport.shutdown().await;
        let mut status = self.wire.status();
        let attempt = self.wire.begin(true);
        let (reader, writer) = tokio::io::split(stream);
        let (gone, mut closed) = watch::channel(());
        transport.spawn(read(self.wire.clone(), attempt, reader, gone));
        transport.spawn(write(self.wire.clone(), attempt, writer));
        let spoken = |status: &Status| status.attempt == attempt || status.failed.is_some();
        let connected = tokio::select! {
            biased;
            status = status.wait_for(spoken) => match status {
                Ok(status) => match &status.failed {
                    Some(failure) => Err(failure.clone().into()),
                    None => Ok(()),
                },
                Err(_) => Err(ConnectError::Closed),
            },
            _ = closed.changed() => Err(ConnectError::Closed),
            () = tokio::time::sleep(patience) => Err(ConnectError::NoAnswer(patience)),
        };
        if connected.is_err() {
            self.wire.begin(false);
            transport.shutdown().await;
        }
        connected
    }

    /// Leaves the transport, which is closed. What the guest has not acknowledged waits for the
    /// next one. Cancel-safe: what was not left is left by the next call, or by `connect`.
    pub async fn disconnect(&self) {
        self.wire.begin(false);
        self.transport.lock().await.shutdown().await;
    }

    /// Has the guest write down all it has and let nobody write to its volume, until
    /// [`wake`](Self::wake). Not cancel-safe: it may do so even if nobody waits.
    pub async fn rest(&self) -> Result<Steps, RequestError> {
        self.request("/rest", Bytes::new()).await
    }

    /// Has the guest go on after a rest. Not cancel-safe, as `rest`.
    pub async fn wake(&self, wake: &Wake) -> Result<Steps, RequestError> {
        let body = serde_json::to_vec(wake).map_err(|_| RequestError::Answer)?;
        self.request("/wake", body.into()).await
    }

    /// Has the guest write down all it has of its volume. Cancel-safe.
    pub async fn sync(&self) -> Result<Steps, RequestError> {
        self.request("/sync", Bytes::new()).await
    }

    /// Waits until the link is beyond repair, and gives the reason. Cancel-safe.
    pub async fn failed(&self) -> Failure {
        let mut ended = self.ended.clone();
        let reason = ended.wait_for(Option::is_some).await.map(|reason| reason.clone());
        // The reason for what ended the connection says more.
        let first = self.wire.status().borrow().failed.clone();
        first.or(reason.ok().flatten()).unwrap_or(Failure::Ended)
    }

    async fn request(&self, path: &'static str, body: Bytes) -> Result<Steps, RequestError> {
        let mut requests = self.requests.clone().ready().await?;
        let request = post(path.to_owned());
        let (response, mut send) = requests.send_request(request, body.is_empty())?;
        let sending = async {
            if !body.is_empty() {
                if !send_all(&mut send, body).await {
                    return Err(RequestError::Answer);
                }
                send.send_data(Bytes::new(), true)?;
            }
            Ok(())
        };
        // What comes meanwhile does not wait for what goes.
        let (sent, response) = tokio::join!(sending, response);
        sent?;
        let response = response?;
        let good = response.status() == StatusCode::OK;
        let mut recv = response.into_body();
        let mut answer = Vec::new();
        while let Some(bytes) = recv.data().await.transpose()? {
            let _ = recv.flow_control().release_capacity(bytes.len());
            answer.extend_from_slice(&bytes);
            if answer.len() > ANSWER {
                return Err(RequestError::Answer);
            }
        }
        let steps = serde_json::from_slice(&answer).ok().filter(|_| good);
        steps.ok_or(RequestError::Answer)
    }
}

async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
) -> Result<(SendRequest<Bytes>, h2::client::Connection<S>), h2::Error> {
    h2::client::Builder::new()
        .initial_window_size(WINDOW)
        .initial_connection_window_size(CONNECTION)
        .initial_max_send_streams(STREAMS as usize)
        .max_concurrent_streams(0)
        .max_header_list_size(4096)
        .max_send_buffer_size(WINDOW as usize)
        .data_frame_budget(PIECES)
        // Streams that one side has left while the other was still sending are no attack.
        .max_local_error_reset_streams(None)
        .enable_push(false)
        .handshake(stream)
        .await
}

/// Takes what a transport brings, to its end.
async fn read(
    wire: Wire,
    attempt: u64,
    mut stream: impl AsyncRead + Unpin,
    gone: watch::Sender<()>,
) {
    let mut buffer = vec![0; 64 * 1024];
    let mut parser = Parser::default();
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        wire.incoming(Some(attempt), &mut parser, buffer.get(..count).unwrap_or_default());
    }
    gone.send_replace(());
}

/// Sends over a transport, to its end.
async fn write(wire: Wire, attempt: u64, mut stream: impl AsyncWrite + Unpin) {
    let mut out = Vec::new();
    while std::future::poll_fn(|cx| wire.poll_outgoing(cx, Some(attempt), &mut out)).await {
        if stream.write_all(&out).await.is_err() || stream.flush().await.is_err() {
            return;
        }
    }
}

fn post(path: String) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = http::Method::POST;
    // The relays' own paths are all valid.
    if let Ok(uri) =
        http::Uri::builder().scheme("http").authority("guest").path_and_query(path).build()
    {
        *request.uri_mut() = uri;
    }
    request
}

async fn body(response: ResponseFuture) -> Result<RecvStream, h2::Error> {
    response.await.map(http::Response::into_body)
}

/// What the owner's requests and the guest's events have in common.
struct Relay {
    owner: Packets,
    requests: SendRequest<Bytes>,
    tasks: Tasks,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    last_stream: u32,
    /// The streams that are open.
    streams: HashMap<u32, watch::Sender<Progress>>,
    /// The commands whose end was not told.
    commands: HashMap<u32, Command>,
    /// The connections that are asked for: the owner's end.
    connections: HashMap<u32, OwnedFd>,
}

struct Command {
    /// It is to be killed, or was.
    killed: watch::Sender<bool>,
    /// Its end is known, but not told.
    ended: bool,
}

/// A descriptor that the owner gave, and how it is told from others.
struct Given {
    fd: OwnedFd,
    kind: Kind,
    key: (u64, u64, Kind),
}

impl Relay {
    /// Serves the owner; gives the reason for its end.
    async fn run(owner: Packets, requests: SendRequest<Bytes>, tasks: Tasks) -> Failure {
        let lost = |error: h2::Error| Failure::Connection(error.to_string());
        let mut opening = requests.clone();
        let opened = opening.send_request(post("/init".to_owned()), false);
        let (response, send) = match opened {
            Ok(opened) => opened,
            Err(error) => return lost(error),
        };
        let relay = Arc::new(Self { owner, requests, tasks, state: Mutex::default() });
        let asking = relay.clone().serve(send);
        let telling = async {
            match body(response).await {
                Ok(recv) => relay.tell_all(PacketReader::new(recv, message::TO_HOST)).await,
                Err(error) => lost(error),
            }
        };
        tokio::select! {
            failure = asking => failure,
            failure = telling => failure,
        }
    }

    /// Passes the owner's requests on; ends only if the guest cannot be asked.
    async fn serve(self: Arc<Self>, mut send: SendStream<Bytes>) -> Failure {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok((count @ 1.., fds)) = self.owner.receive(&mut buffer).await {
            let packet = buffer.get(..count).unwrap_or_default();
            if let Some((descriptors, packet)) = self.request(packet, fds).await {
                let packet = message::to_guest(&descriptors, &packet);
                if !send_all(&mut send, packet.into()).await {
                    // The other task knows why.
                    std::future::pending::<()>().await;
                }
            }
        }
        // It has left, or asks no more; what is left to tell is told.
        let _ = send.send_data(Bytes::new(), true);
        std::future::pending().await
    }

    /// What the guest is to be asked.
    async fn request(
        self: &Arc<Self>,
        packet: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Option<(Vec<Descriptor>, Vec<u8>)> {
        let (kind, flags, id) = message::head(packet)?;
        match kind {
            message::SPAWN => {
                let mut descriptors = Vec::new();
                return match self.spawn(id, flags, packet, fds, &mut descriptors).await {
                    Ok(request) => Some((descriptors, request)),
                    Err(errno) => {
                        self.tell_number(message::FAILED, id, errno).await;
                        // What was opened already is closed by the guest.
                        Some((descriptors, message::header(message::DRAIN, 0, id)))
                    }
                };
            }
            message::TERMINAL => {
                let made = rustix::pty::openpt(
                    OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
                );
                self.give(id, made).await;
                return None;
            }
            message::CONNECT => match self.connect(id).await {
                Ok(descriptor) => return Some((vec![descriptor], packet.to_vec())),
                Err(errno) => {
                    self.give(id, Err(errno)).await;
                    return None;
                }
            },
            message::DRAIN => {
                for fd in fds {
                    self.tasks.start(drain(fd));
                }
                return None;
            }
            message::KEEP => return None,
            message::KILL => {
                let all = id == 0 || flags & message::EVERYTHING != 0;
                self.killed(|command| all || command == id);
            }
            message::SIGNAL if message::number(packet) == Some(9) => {
                self.killed(|command| command == id);
            }
            _ => {}
        }
        Some((Vec::new(), packet.to_vec()))
    }

    fn killed(&self, which: impl Fn(u32) -> bool) {
        for (id, command) in &self.state.lock().commands {
            if which(*id) {
                command.killed.send_replace(true);
            }
        }
    }

    async fn spawn(
        self: &Arc<Self>,
        id: u32,
        flags: u8,
        packet: &[u8],
        fds: Vec<OwnedFd>,
        descriptors: &mut Vec<Descriptor>,
    ) -> Result<Vec<u8>, Errno> {
        let mut fds = fds.into_iter();
        let (Some(stdin), Some(stdout), Some(stderr)) = (fds.next(), fds.next(), fds.next()) else {
            return Err(Errno::MFILE);
        };
        let mut request = packet.to_vec();
        if flags & message::IN_FILE != 0 {
            let strings = strings(&fds.next().ok_or(Errno::MFILE)?)?;
            request.extend(strings);
            if let Some(flags) = request.get_mut(1) {
                *flags &= !message::IN_FILE;
            }
        }
        let terminal = flags & message::CONTROLLING != 0;
        let given = [
            given(stdin, Kind::Input, terminal)?,
            given(stdout, Kind::Output, terminal)?,
            given(stderr, Kind::Output, terminal)?,
        ];
        let mut known: Vec<((u64, u64, Kind), Descriptor)> = Vec::new();
        for Given { fd, kind, key } in given {
            let copy = known.iter().find(|(other, _)| *other == key).map(|(_, it)| *it);
            let descriptor = match copy {
                Some(descriptor) => descriptor,
                None => self.open(fd, kind).await?,
            };
            known.push((key, descriptor));
            descriptors.push(descriptor);
        }
        let command = Command { killed: watch::Sender::new(false), ended: false };
        self.state.lock().commands.insert(id, command);
        Ok(request)
    }

    /// Opens a stream for a descriptor.
    async fn open(self: &Arc<Self>, fd: OwnedFd, kind: Kind) -> Result<Descriptor, Errno> {
        let mut descriptor = Descriptor { stream: 0, kind, columns: 0, rows: 0 };
        if kind == Kind::Null {
            return Ok(descriptor);
        }
        if kind == Kind::Terminal {
            let size = tcgetwinsize(&fd)?;
            (descriptor.columns, descriptor.rows) = (size.ws_col, size.ws_row);
            // The guest's does all that a terminal does.
            let mut modes = tcgetattr(&fd)?;
            modes.make_raw();
            tcsetattr(&fd, OptionalActions::Now, &modes)?;
        }
        let end = Arc::new(End::new(fd).map_err(|error| errno(&error))?);
        let progress = watch::Sender::new(Progress::default());
        {
            let mut state = self.state.lock();
            if state.streams.len() >= STREAMS as usize - 16 {
                return Err(Errno::AGAIN);
            }
            state.last_stream = state.last_stream.wrapping_add(1).max(1);
            descriptor.stream = state.last_stream;
            state.streams.insert(descriptor.stream, progress.clone());
        }
        let stream = descriptor.stream;
        let mut requests = self.requests.clone();
        let opened = async {
            std::future::poll_fn(|cx| requests.poll_ready(cx)).await?;
            requests.send_request(post(format!("/fd/{stream}")), kind == Kind::Output)
        };
        let Ok((response, send)) = opened.await else {
            self.state.lock().streams.remove(&stream);
            return Err(Errno::PIPE);
        };
        let relay = Arc::downgrade(self);
        self.tasks.start(async move {
            carry(end, kind, Side::Host, send, Incoming::Awaited(response), progress).await;
            if let Some(relay) = relay.upgrade() {
                relay.state.lock().streams.remove(&stream);
            }
        });
        Ok(descriptor)
    }

    async fn connect(self: &Arc<Self>, id: u32) -> Result<Descriptor, Errno> {
        // As init's own are.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let descriptor = self.open(ours, Kind::Socket).await?;
        self.state.lock().connections.insert(id, theirs);
        Ok(descriptor)
    }

    /// Passes the guest's events on; gives the reason for their end.
    async fn tell_all(self: &Arc<Self>, mut packets: PacketReader) -> Failure {
        loop {
            let body = match packets.next().await {
                Ok(body) => body,
                Err(NoPacket::End) => return Failure::Ended,
                Err(NoPacket::Broken) => {
                    return Failure::Connection("its first stream was reset".to_owned());
                }
                Err(NoPacket::TooLong) => return Failure::Packet,
            };
            let Some((marks, packet)) = message::at_host(&body) else { return Failure::Packet };
            let marks: Vec<_> = marks.into_iter().filter_map(|mark| self.mark(mark)).collect();
            if packet.is_empty() {
                continue;
            }
            let event = body.slice(body.len() - packet.len()..);
            let Some((kind, _, id)) = message::head(&event) else { return Failure::Packet };
            if event.len() > message::EVENT {
                return Failure::Packet;
            }
            match kind {
                message::GIVEN => {
                    let end = self.state.lock().connections.remove(&id);
                    let errno = message::number(&event).and_then(|it| i32::try_from(it).ok());
                    match (end, errno) {
                        (Some(end), Some(0)) => self.give(id, Ok(end)).await,
                        (Some(_), errno) => {
                            self.tell_number(kind, id, refusal(errno)).await;
                        }
                        // Nobody has asked for it.
                        (None, _) => {}
                    }
                }
                message::EXITED => self.exited(id, event, marks).await,
                1..=message::LISTING | message::FOUND => {
                    if kind == message::FAILED {
                        self.state.lock().commands.remove(&id);
                    }
                    self.tell(&event).await;
                }
                // It can have no other.
                _ => {}
            }
        }
    }

    /// Notes how far an output has to be; gives how far it is, if it is not at its end.
    fn mark(&self, mark: Mark) -> Option<watch::Receiver<Progress>> {
        let state = self.state.lock();
        let progress = state.streams.get(&mark.stream)?;
        if mark.offset != message::LATER {
            progress.send_modify(|progress| progress.wanted = Some(mark.offset));
        }
        Some(progress.subscribe())
    }

    /// A command has ended. Its owner takes that as a sign that what it wrote is there, so this
    /// is told when it is.
    async fn exited(
        self: &Arc<Self>,
        id: u32,
        event: Bytes,
        marks: Vec<watch::Receiver<Progress>>,
    ) {
        let killed = {
            let mut state = self.state.lock();
            match state.commands.get_mut(&id) {
                Some(command) if command.ended => return,
                Some(_) if marks.iter().all(is_there) => {
                    state.commands.remove(&id);
                    None
                }
                Some(command) => {
                    command.ended = true;
                    Some(command.killed.subscribe())
                }
                None => None,
            }
        };
        let Some(killed) = killed else { return self.tell(&event).await };
        let relay = Arc::downgrade(self);
        self.tasks.start(async move {
            tokio::select! {
                () = arrival(marks.clone()) => {}
                () = stall(marks, killed) => {}
            }
            if let Some(relay) = relay.upgrade() {
                relay.state.lock().commands.remove(&id);
                relay.tell(&event).await;
            }
        });
    }

    async fn tell(&self, event: &[u8]) {
        // It can only fail if the owner is gone, which reading tells.
        let _ = self.owner.send(event, &[]).await;
    }

    async fn tell_number(&self, kind: u8, id: u32, errno: Errno) {
        let errno = errno.raw_os_error().unsigned_abs();
        self.tell(&message::with_number(kind, id, errno)).await;
    }

    /// Answers with a descriptor.
    async fn give(&self, id: u32, made: Result<OwnedFd, Errno>) {
        match made {
            Ok(fd) => {
                let event = message::with_number(message::GIVEN, id, 0);
                let _ = self.owner.send(&event, &[fd.as_fd()]).await;
            }
            Err(errno) => self.tell_number(message::GIVEN, id, errno).await,
        }
    }
}

fn is_there(progress: &watch::Receiver<Progress>) -> bool {
    let done = |progress: &Progress| progress.wanted.is_some_and(|it| progress.done >= it);
    done(&progress.borrow()) || progress.has_changed().is_err()
}

/// Waits until all outputs are where they have to be, or closed.
async fn arrival(marks: Vec<watch::Receiver<Progress>>) {
    for mut mark in marks {
        let done = |progress: &Progress| progress.wanted.is_some_and(|it| progress.done >= it);
        let _ = mark.wait_for(done).await;
    }
}

/// Waits until a command was killed and nobody goes on reading what it wrote.
async fn stall(marks: Vec<watch::Receiver<Progress>>, mut killed: watch::Receiver<bool>) {
    let _ = killed.wait_for(|killed| *killed).await;
    let sum = || marks.iter().map(|mark| mark.borrow().done).fold(0, u64::wrapping_add);
    let mut before = sum();
    loop {
        tokio::time::sleep(STALLED).await;
        let now = sum();
        if now == before {
            return;
        }
        before = now;
    }
}

/// The errno of a guest's answer, if it can be one.
fn refusal(errno: Option<i32>) -> Errno {
    errno.filter(|errno| (1..4096).contains(errno)).map_or(Errno::IO, Errno::from_raw_os_error)
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// What a descriptor is that a command is to have.
fn given(fd: OwnedFd, usual: Kind, terminal: bool) -> Result<Given, Errno> {
    let stat = fstat(&fd)?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::CharacterDevice if terminal => Kind::Terminal,
        FileType::CharacterDevice if stat.st_rdev == rustix::fs::makedev(1, 3) => Kind::Null,
        FileType::Fifo => usual,
        FileType::Socket => Kind::Socket,
        _ => return Err(Errno::INVAL),
    };
    Ok(Given { fd, kind, key: (stat.st_dev, stat.st_ino, kind) })
}

/// The strings of a spawn that are in a file.
fn strings(fd: &OwnedFd) -> Result<Vec<u8>, Errno> {
    let failed = |error: io::Error| errno(&error);
    let file = File::from(fd.try_clone().map_err(failed)?);
    let length = usize::try_from(file.metadata().map_err(failed)?.len());
    let length = length.ok().filter(|length| *length <= message::STRINGS).ok_or(Errno::TOOBIG)?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    Ok(bytes)
}

/// Reads a descriptor to its end, for nobody.
async fn drain(fd: OwnedFd) {
    let Ok(end) = End::new(fd) else { return };
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(1..) = end.read(|fd| rustix::io::read(fd, &mut buffer)).await {}
}

#[cfg(test)]
mod tests;
