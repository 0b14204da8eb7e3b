//! The guest's relay: to `denizen-init` it is what its owner would be. It makes the pipes,
//! sockets and terminals that commands get, and copies between them and the host's streams. It
//! must never end because of a host that is gone: another one comes.

mod rest;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::future::poll_fn;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{Request, Response, StatusCode};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{InputModes, OptionalActions, Winsize, tcgetattr, tcsetattr, tcsetwinsize};
use tokio::sync::{oneshot, watch};

use crate::carry::{
    CONNECTION, Incoming, NoPacket, PIECES, PacketReader, Progress, STREAMS, Side, WINDOW, carry,
    send_all,
};
use crate::fd::{End, Packets, Port};
use crate::message::{self, Descriptor, Kind, Mark};
use crate::tasks::{Owner, Tasks};
use crate::wire::{Parser, Stream, Wire};

/// The way of speaking, as denizen-init has it for owners that find it.
const VERSION: u32 = 1;
/// How long the end is held up by a host that does not take what is left.
const FAREWELL: Duration = Duration::from_secs(1);
/// How often is looked whether all is said.
const MOMENT: Duration = Duration::from_millis(2);
/// How long other ends are waited for before it is told that all are gone.
const TELLING: Duration = Duration::from_secs(10);
/// How long a connection in the guest may take.
const CONNECTING: Duration = Duration::from_secs(10);
/// How much a terminal is read to find its end, while something still writes to it.
const TAIL: u64 = 1024 * 1024;
/// The longest request to go to rest or to go on.
const REQUEST: usize = 16 * 1024;

/// Serves hosts at `port` with what `init`, the owner's end of a `denizen-init`'s socket, does;
/// `path` is where the file system is mounted that goes to rest. Returns when the init has ended.
///
/// Not cancel-safe: the init loses its owner.
///
/// # Errors
/// If the port or the socket cannot be used.
pub async fn serve(port: OwnedFd, init: OwnedFd, path: &Path) -> io::Result<()> {
    let wire = Wire::guest();
    let mut status = wire.status();
    let mut reading = Port::new(port.try_clone()?)?;
    let mut writing = Port::new(port)?;
    let init = Arc::new(Packets::new(init)?);
    let path: Arc<Path> = path.into();
    let (syncs, rests) = (Worker::new("sync")?, Worker::new("rest")?);
    let reader = async {
        let mut buffer = vec![0; 64 * 1024];
        let mut parser = Parser::default();
        loop {
            let count = reading.read(&mut buffer).await?;
            wire.incoming(None, &mut parser, buffer.get(..count).unwrap_or_default());
        }
    };
    let writer = async {
        let mut out = Vec::new();
        loop {
            poll_fn(|cx| wire.poll_outgoing(cx, None, &mut out)).await;
            let mut rest = out.as_slice();
            while !rest.is_empty() {
                let count = writing.write(rest).await?;
                rest = rest.get(count..).unwrap_or_default();
            }
        }
    };
    let sessions = async {
        let mut epoch = 0;
        let stay = Owner::new();
        let last_id = AtomicU32::new(0);
        let known = Arc::new(Known {
            last_id,
            stay: stay.tasks(),
            path: Arc::clone(&path),
            syncs,
            rests,
            waiting: Mutex::default(),
        });
        loop {
            // It cannot fail: the wire is there.
            if let Ok(status) = status.wait_for(|status| status.epoch > epoch).await {
                epoch = status.epoch;
            }
            let owner = Owner::new();
            let relay = Relay {
                init: Arc::clone(&init),
                tasks: owner.tasks(),
                state: Mutex::default(),
                known: Arc::clone(&known),
                endings: watch::Sender::new(0),
            };
            let relay = Arc::new(relay);
            tokio::select! {
                () = host(wire.stream(), &relay) => break,
                _ = status.wait_for(|status| status.epoch > epoch) => relay.leave(),
            }
        }
        let flushed = poll_fn(|cx| wire.poll_flushed(cx));
        let _ = tokio::time::timeout(FAREWELL, flushed).await;
    };
    tokio::select! {
        ended = reader => ended,
        ended = writer => ended,
        () = sessions => Ok(()),
    }
}

/// Serves one host; ends when the init has.
async fn host(stream: Stream, relay: &Arc<Relay>) {
    let connection = h2::server::Builder::new()
        .initial_window_size(WINDOW)
        .initial_connection_window_size(CONNECTION)
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(4096)
        .max_send_buffer_size(WINDOW as usize)
        .data_frame_budget(PIECES)
        // Streams that one side has left while the other was still sending are no attack.
        .max_local_error_reset_streams(None)
        .max_pending_accept_reset_streams(STREAMS as usize)
        .handshake(stream)
        .await;
    let Ok(mut connection) = connection else { return std::future::pending().await };
    let (end, mut ended) = watch::channel(false);
    let mut first = Some(end);
    let serving = async {
        while let Some(Ok((request, respond))) = connection.accept().await {
            match request.uri().path() {
                "/init" => {
                    if let Some(end) = first.take() {
                        let relay = Arc::clone(relay);
                        relay.tasks.clone().start(async move {
                            relay.run(request.into_body(), respond).await;
                            end.send_replace(true);
                        });
                    }
                }
                other => match other.strip_prefix("/fd/").map(str::parse) {
                    Some(Ok(number)) => relay.opened(number, request, respond),
                    Some(Err(_)) => {}
                    None => {
                        relay.tasks.start(answer(request, respond, Arc::clone(&relay.known)));
                    }
                },
            }
        }
    };
    tokio::pin!(serving);
    tokio::select! {
        () = &mut serving => std::future::pending().await,
        _ = ended.wait_for(|ended| *ended) => {}
    }
    // The last words are still to go to the wire.
    let words = async {
        tokio::task::yield_now().await;
        while !relay.tasks.are_done() {
            tokio::time::sleep(MOMENT).await;
        }
    };
    let _ = tokio::time::timeout(FAREWELL, async {
        tokio::select! {
            () = serving => {}
            () = words => {}
        }
    })
    .await;
}

/// Does what the machine itself is asked for.
async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>, known: Arc<Known>) {
    let what = request.uri().path().to_owned();
    let mut recv = request.into_body();
    let mut body = Vec::new();
    while let Some(Ok(bytes)) = recv.data().await {
        let _ = recv.flow_control().release_capacity(bytes.len());
        body.extend_from_slice(&bytes);
        if body.len() > REQUEST {
            return;
        }
    }
    let path = Arc::clone(&known.path);
    let work = move || match what.as_str() {
        "/rest" => Some(rest::rest(&path)),
        "/wake" => Some(rest::wake(&path, &serde_json::from_slice(&body).ok()?)),
        "/sync" => Some(rest::sync(&path)),
        _ => None,
    };
    let steps = known.rests.run(work).await.flatten();
    let answer = steps.and_then(|steps| serde_json::to_vec(&steps).ok());
    let mut response = Response::new(());
    if answer.is_none() {
        *response.status_mut() = StatusCode::BAD_REQUEST;
    }
    // It can only fail if nobody is there to be told.
    if let Ok(mut send) = respond.send_response(response, false)
        && send_all(&mut send, answer.unwrap_or_default().into()).await
    {
        let _ = send.send_data(Bytes::new(), true);
    }
}

/// What one host's requests and the events have in common.
struct Relay {
    init: Arc<Packets>,
    tasks: Tasks,
    state: Mutex<State>,
    known: Arc<Known>,
    /// How many ends are known and not yet told.
    endings: watch::Sender<usize>,
}

/// What stays when hosts come and go.
struct Known {
    /// The last number that something was asked for by.
    last_id: AtomicU32,
    /// What is done for commands whose host has gone.
    stay: Tasks,
    /// Where the file system is that the session writes to.
    path: Arc<Path>,
    /// Who writes it down.
    syncs: Worker,
    /// Who waits until it is.
    waiting: Mutex<Vec<oneshot::Sender<()>>>,
    /// Who puts the machine to rest and wakes it.
    rests: Worker,
}

impl Known {
    /// Waits until all that was written before is on the disk, or cannot be. That is done once for
    /// all who ask while it is being done for others.
    async fn synced(self: &Arc<Self>) {
        let (sender, done) = oneshot::channel();
        self.waiting.lock().push(sender);
        let known = Arc::clone(self);
        let work = move || {
            let waiting = std::mem::take(&mut *known.waiting.lock());
            if !waiting.is_empty() {
                rest::sync(&known.path);
            }
            for waiting in waiting {
                // Nobody may be waiting any more.
                let _ = waiting.send(());
            }
        };
        if self.syncs.0.send(Box::new(work)).is_ok() {
            let _ = done.await;
        }
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// A thread of its own that is there from the beginning: later there may be none to be had.
#[derive(Clone)]
struct Worker(std::sync::mpsc::Sender<Work>);

impl Worker {
    fn new(name: &str) -> io::Result<Self> {
        let (sender, work) = std::sync::mpsc::channel::<Work>();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work.into_iter().for_each(|work| work()))?;
        Ok(Self(sender))
    }

    /// Has it do something after all else that it was given; none if it cannot.
    async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let (sender, done) = oneshot::channel();
        let work = Box::new(move || drop(sender.send(work())));
        self.0.send(work).ok()?;
        done.await.ok()
    }
}

type Opened = (RecvStream, SendResponse<Bytes>);

#[derive(Default)]
struct State {
    /// Streams that no packet has named.
    opened: HashMap<u32, Opened>,
    /// Streams that a packet waits for.
    wanted: HashMap<u32, oneshot::Sender<Opened>>,
    /// What init was asked for.
    asked: HashMap<u32, oneshot::Sender<Result<OwnedFd, Errno>>>,
    /// What the commands write to.
    outputs: HashMap<u32, Vec<Output>>,
    /// The pipes among these, and those that commands which have ended have left to others.
    pipes: Vec<Weak<End>>,
}

struct Output {
    stream: u32,
    kind: Kind,
    end: Weak<End>,
    progress: watch::Sender<Progress>,
}

impl Output {
    /// How much was written to it until now, if that can be told at once.
    fn written(&self) -> Option<u64> {
        // Nothing is read while it is held.
        let progress = self.progress.borrow();
        let Some(end) = self.end.upgrade() else { return Some(progress.done) };
        if self.kind == Kind::Terminal {
            return None;
        }
        Some(progress.done + ioctl_fionread(&end).unwrap_or(0))
    }
}

type Telling = Arc<tokio::sync::Mutex<SendStream<Bytes>>>;

impl Relay {
    /// The host has opened a stream.
    fn opened(&self, number: u32, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
        let opened = (request.into_body(), respond);
        let mut state = self.state.lock();
        match state.wanted.remove(&number) {
            // Nobody may be waiting any more.
            Some(wanted) => drop(wanted.send(opened)),
            None => drop(state.opened.insert(number, opened)),
        }
    }

    async fn stream(&self, number: u32) -> Result<Opened, Errno> {
        let waiting = {
            let mut state = self.state.lock();
            if let Some(opened) = state.opened.remove(&number) {
                return Ok(opened);
            }
            let (sender, waiting) = oneshot::channel();
            state.wanted.insert(number, sender);
            waiting
        };
        waiting.await.map_err(|_| Errno::PIPE)
    }

    /// Asks init for a descriptor.
    async fn ask(&self, id: u32, packet: &[u8]) -> Result<OwnedFd, Errno> {
        let (sender, made) = oneshot::channel();
        self.state.lock().asked.insert(id, sender);
        self.request(packet, &[]).await;
        made.await.map_err(|_| Errno::PIPE)?
    }

    async fn request(&self, packet: &[u8], fds: &[&OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        // It can only fail if init is gone, which reading tells.
        let _ = self.init.send(packet, &fds).await;
    }

    /// Passes requests and events on; ends when init has.
    async fn run(self: Arc<Self>, requests: RecvStream, mut respond: SendResponse<Bytes>) {
        let Ok(send) = respond.send_response(Response::new(()), false) else {
            return std::future::pending().await;
        };
        let telling: Telling = Arc::new(tokio::sync::Mutex::new(send));
        // What an earlier host has started goes on, and its numbers are taken.
        let last_id = self.known.last_id.load(Ordering::Relaxed);
        tell(&telling, &[], &message::with_number(message::FOUND, last_id, VERSION)).await;
        let asking = self.serve(PacketReader::new(requests, message::TO_GUEST), &telling);
        tokio::select! {
            never = asking => match never {},
            () = self.tell_all(&telling) => {}
        }
        let _ = telling.lock().await.send_data(Bytes::new(), true);
    }

    /// This host is gone and another one has come: what commands go on printing goes nowhere.
    fn leave(&self) {
        let pipes = std::mem::take(&mut self.state.lock().pipes);
        for end in pipes.into_iter().filter_map(|pipe| pipe.upgrade()) {
            self.known.stay.start(async move { end.drain().await });
        }
    }

    async fn serve(
        self: &Arc<Self>,
        mut packets: PacketReader,
        telling: &Telling,
    ) -> std::convert::Infallible {
        loop {
            match packets.next().await {
                Ok(body) => {
                    if let Some((descriptors, packet)) = message::at_guest(&body) {
                        self.pass(&descriptors, packet, telling).await;
                    }
                }
                // Its end is to be init's.
                Err(NoPacket::End) => break self.init.shut_down(),
                Err(NoPacket::Broken | NoPacket::TooLong) => break,
            }
        }
        std::future::pending().await
    }

    async fn pass(self: &Arc<Self>, descriptors: &[Descriptor], packet: &[u8], telling: &Telling) {
        let Some((kind, flags, id)) = message::head(packet) else { return };
        self.known.last_id.fetch_max(id, Ordering::Relaxed);
        match (kind, descriptors) {
            (message::SPAWN, [stdin, stdout, stderr]) => {
                let descriptors = [*stdin, *stdout, *stderr];
                if let Err(errno) = self.spawn(id, flags, descriptors, packet).await {
                    self.state.lock().outputs.remove(&id);
                    let errno = errno.raw_os_error().unsigned_abs();
                    tell(telling, &[], &message::with_number(message::FAILED, id, errno)).await;
                }
            }
            (message::CONNECT, [connection]) => {
                let (relay, telling) = (Arc::clone(self), Arc::clone(telling));
                let (connection, packet) = (*connection, packet.to_vec());
                self.tasks.start(async move {
                    let made = relay.connect(id, connection, &packet).await;
                    let errno =
                        made.map_or_else(|errno| errno.raw_os_error().unsigned_abs(), |()| 0);
                    tell(&telling, &[], &message::with_number(message::GIVEN, id, errno)).await;
                });
            }
            (message::DRAIN, _) => {
                // Of a spawn that the host could not ask for.
                let streams: HashSet<u32> = descriptors
                    .iter()
                    .filter(|it| it.kind != Kind::Null)
                    .map(|it| it.stream)
                    .collect();
                for stream in streams {
                    drop(self.stream(stream).await);
                }
            }
            (message::SIZE, _) => {
                let size = packet.get(8..).and_then(|it| it.first_chunk());
                if let Some([a, b, c, d]) = size {
                    let (columns, rows) =
                        (u16::from_le_bytes([*a, *b]), u16::from_le_bytes([*c, *d]));
                    let state = self.state.lock();
                    let outputs = state.outputs.get(&id).into_iter().flatten();
                    for output in outputs.filter(|output| output.kind == Kind::Terminal) {
                        if let Some(end) = output.end.upgrade() {
                            // A terminal that has just closed needs no size.
                            let _ = tcsetwinsize(&end, winsize(columns, rows));
                        }
                    }
                }
            }
            _ => self.request(packet, &[]).await,
        }
    }

    async fn spawn(
        self: &Arc<Self>,
        id: u32,
        flags: u8,
        descriptors: [Descriptor; 3],
        packet: &[u8],
    ) -> Result<(), Errno> {
        // All of them first: what is left of them after a failure is closed at the host too.
        let mut opened = HashMap::new();
        for Descriptor { stream, kind, .. } in descriptors {
            if kind != Kind::Null && !opened.contains_key(&stream) {
                opened.insert(stream, self.stream(stream).await?);
            }
        }
        let mut made: HashMap<u32, OwnedFd> = HashMap::new();
        let mut theirs = Vec::new();
        for descriptor in descriptors {
            let fd = match (made.get(&descriptor.stream), opened.remove(&descriptor.stream)) {
                (_, Some(opened)) => self.make(id, descriptor, opened).await?,
                (Some(fd), _) if descriptor.kind != Kind::Null => {
                    fd.try_clone().map_err(|error| errno(&error))?
                }
                _ => rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?,
            };
            made.insert(descriptor.stream, fd.try_clone().map_err(|error| errno(&error))?);
            theirs.push(fd);
        }
        let mut request = packet.to_vec();
        let file;
        let mut fds: Vec<&OwnedFd> = theirs.iter().collect();
        if let Some((head, strings)) = packet.split_at_checked(16)
            && strings.len() > message::INLINE
        {
            file = memory_file(strings).map_err(|error| errno(&error))?;
            fds.push(&file);
            request = head.to_vec();
            if let Some(place) = request.get_mut(1) {
                *place = flags | message::IN_FILE;
            }
        }
        self.request(&request, &fds).await;
        Ok(())
    }

    /// Makes what a command gets in the place of one of the owner's descriptors.
    async fn make(
        self: &Arc<Self>,
        id: u32,
        descriptor: Descriptor,
        opened: Opened,
    ) -> Result<OwnedFd, Errno> {
        let (ours, theirs) = match descriptor.kind {
            Kind::Input | Kind::Null => {
                let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC)?;
                (ours, theirs)
            }
            Kind::Output => pipe_with(PipeFlags::CLOEXEC)?,
            Kind::Socket => {
                socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?
            }
            Kind::Terminal => {
                let request = message::header(message::TERMINAL, 0, id);
                let master = self.ask(id, &request).await?;
                let slave = slave(&master, descriptor)?;
                (master, slave)
            }
        };
        let (stream, kind) = (descriptor.stream, descriptor.kind);
        let (end, progress) = self.bind(ours, kind, opened)?;
        if matches!(kind, Kind::Output | Kind::Terminal) {
            let output = Output { stream, kind, end, progress };
            self.state.lock().outputs.entry(id).or_default().push(output);
        }
        Ok(theirs)
    }

    /// Copies between a descriptor and a stream from here on.
    fn bind(
        &self,
        fd: OwnedFd,
        kind: Kind,
        (recv, mut respond): Opened,
    ) -> Result<(Weak<End>, watch::Sender<Progress>), Errno> {
        let end = Arc::new(End::new(fd).map_err(|error| errno(&error))?);
        let send = respond.send_response(Response::new(()), false).map_err(|_| Errno::PIPE)?;
        let progress = watch::Sender::new(Progress::default());
        let known = (Arc::downgrade(&end), progress.clone());
        if kind == Kind::Output {
            let pipes = &mut self.state.lock().pipes;
            pipes.retain(|pipe| pipe.strong_count() > 0);
            pipes.push(Arc::downgrade(&end));
        }
        let recv = Incoming::Open(recv);
        self.tasks.start(carry(end, kind, Side::Guest, send, recv, progress));
        Ok(known)
    }

    async fn connect(&self, id: u32, descriptor: Descriptor, packet: &[u8]) -> Result<(), Errno> {
        // Dropped in the end, it is closed at the host.
        let opened = self.stream(descriptor.stream).await?;
        let socket = self.ask(id, packet).await?;
        let end = End::new(socket).map_err(|error| errno(&error))?;
        let made = tokio::time::timeout(CONNECTING, end.connected()).await;
        made.map_err(|_| Errno::TIMEDOUT)?.map_err(|error| errno(&error))?;
        let fd = end.as_fd().try_clone_to_owned().map_err(|error| errno(&error))?;
        drop(end);
        self.bind(fd, Kind::Socket, opened).map(drop)
    }

    /// Passes init's events on, to its end.
    async fn tell_all(self: &Arc<Self>, telling: &Telling) {
        let mut buffer = vec![0; message::EVENT];
        while let Ok((count @ 1.., fds)) = self.init.receive(&mut buffer).await {
            let event = buffer.get(..count).unwrap_or_default();
            let Some((kind, _, id)) = message::head(event) else { continue };
            match kind {
                message::GIVEN => {
                    let number = message::number(event).and_then(|it| i32::try_from(it).ok());
                    let refused =
                        Errno::from_raw_os_error(number.filter(|it| *it > 0).unwrap_or(5));
                    let made = fds.into_iter().next().ok_or(refused);
                    if let Some(asked) = self.state.lock().asked.remove(&id) {
                        // Whoever asked may be gone.
                        let _ = asked.send(made);
                    }
                    continue;
                }
                message::FAILED => drop(self.state.lock().outputs.remove(&id)),
                message::EXITED => {
                    let marks = self.marks(id, telling);
                    let (known, telling) = (Arc::clone(&self.known), Arc::clone(telling));
                    let (event, ending) = (event.to_vec(), Ending::new(&self.endings));
                    self.tasks.start(async move {
                        // Whoever is told may count on it that what was written is on the disk:
                        // the machine may be killed at any time.
                        known.synced().await;
                        tell(&telling, &marks, &event).await;
                        drop(ending);
                    });
                    continue;
                }
                message::TREE_GONE | message::ALL_GONE => {
                    // Those that have ended are told of before that.
                    let (relay, telling) = (Arc::clone(self), Arc::clone(telling));
                    let event = event.to_vec();
                    self.tasks.start(async move {
                        relay.ended().await;
                        tell(&telling, &[], &event).await;
                    });
                    continue;
                }
                _ => {}
            }
            tell(telling, &[], event).await;
        }
        self.ended().await;
    }

    /// Waits until all ends are told that were known before, for so long as makes sense.
    async fn ended(&self) {
        let mut endings = self.endings.subscribe();
        let told = endings.wait_for(|count| *count == 0);
        let _ = tokio::time::timeout(TELLING, told).await;
    }

    /// How much the command that has ended has written.
    fn marks(&self, id: u32, telling: &Telling) -> Vec<Mark> {
        let outputs = self.state.lock().outputs.remove(&id).unwrap_or_default();
        let mut marks = Vec::new();
        for output in outputs {
            let offset = output.written();
            let stream = output.stream;
            marks.push(Mark { stream, offset: offset.unwrap_or(message::LATER) });
            if offset.is_none() {
                let telling = Arc::clone(telling);
                self.tasks.start(async move {
                    let offset = tail(output).await;
                    tell(&telling, &[Mark { stream, offset }], &[]).await;
                });
            }
        }
        marks
    }
}

/// An end that is known and not yet told.
struct Ending(watch::Sender<usize>);

impl Ending {
    fn new(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count.clone())
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Waits until a terminal has nothing left to be read.
async fn tail(output: Output) -> u64 {
    let Output { end, progress, .. } = output;
    let mut changes = progress.subscribe();
    // The end of what reads it is the end of this.
    drop(progress);
    let begin = changes.borrow().done;
    loop {
        let end = end.upgrade();
        {
            // Nothing is read while it is held.
            let progress = changes.borrow_and_update();
            let empty = end.is_none_or(|end| {
                // This has the kernel move on what was written (`n_tty_poll`).
                let mut ready = [PollFd::new(&end, PollFlags::IN)];
                poll(&mut ready, Some(&Timespec::default())) == Ok(0)
            });
            if empty || progress.done.saturating_sub(begin) > TAIL {
                return progress.done;
            }
        }
        drop(changes.changed().await);
    }
}

async fn tell(telling: &Telling, marks: &[Mark], event: &[u8]) {
    let packet = message::to_host(marks, event);
    // It can only fail if the host is gone.
    send_all(&mut *telling.lock().await, packet.into()).await;
}

/// The end of a terminal that a command gets.
fn slave(master: &OwnedFd, descriptor: Descriptor) -> Result<OwnedFd, Errno> {
    grantpt(master)?;
    unlockpt(master)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(master, flags)?;
    // Without it, erasing a character in a line being typed removes one byte of it.
    let mut modes = tcgetattr(&slave)?;
    modes.input_modes |= InputModes::IUTF8;
    tcsetattr(&slave, OptionalActions::Now, &modes)?;
    tcsetwinsize(master, winsize(descriptor.columns, descriptor.rows))?;
    Ok(slave)
}

fn winsize(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

fn memory_file(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("denizen-arguments", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(file.into())
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
