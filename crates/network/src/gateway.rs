//! A network for a sandbox without privilege on the host: packets of a TUN device that was
//! opened in the sandbox's namespace, turned into connections and datagrams of ordinary
//! sockets of the host. It weighs addresses as the proxy does and answers DNS by itself. It
//! must never send a packet of the sandbox's to anywhere, only what is in it, and never let
//! the sandbox make it keep more than [`Most`] says.
//!
//! A connection is made on the host's side first; only then is the sandbox's first packet
//! given to the stack, so that the sandbox sees what really happened.

mod dns;
mod named;
mod packet;

use std::collections::{HashMap, HashSet, VecDeque};
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use parking_lot::Mutex;
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as StackTime;
use smoltcp::wire::{HardwareAddress, IpCidr};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use self::named::Names;
use self::packet::{Packet, Transport};
use crate::address::{Class, Host};
use crate::error::{Error, Result};
use crate::narrow::{Narrowed, changed, not_narrowed};
use crate::proxy::{Counted, Resolve, idle};
use crate::rules::{Rules, Verdict, Why};
use crate::{Denial, Event, OnEvent, Transfer};

/// The gateway's own addresses, as a sandbox's default routes may name them. A sandbox has
/// 10.0.2.15/24 and fd00::15/64.
pub const GATEWAY: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(10, 0, 2, 2), Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2));
/// Where names are answered, at port 53 by UDP, with what the host finds.
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// What the TUN device is to have at most.
pub const MTU: usize = 65_520;

/// How much a sandbox can make the gateway keep.
struct Most;
impl Most {
    /// Connections, and as many flows of datagrams.
    const FLOWS: usize = 256;
    const LOOK_UPS: usize = 64;
    /// Of each direction of a connection in the stack.
    const BUFFER: usize = 256 * 1024;
    /// Pieces on their way between the stack and a socket.
    const PIECES: usize = 8;
    const PIECE: usize = 32 * 1024;
    /// Packets read before others get their turn.
    const BATCH: usize = 64;
    /// Denials that are remembered so as not to be told at every packet.
    const DENIED: usize = 1024;
    /// Addresses of which it is remembered what names led to them, and names of each.
    const LEARNED: usize = 4096;
    const NAMES: usize = 64;
}

const CONNECT: Duration = Duration::from_secs(20);
const IDLE: Duration = Duration::from_hours(2);
/// For a side that does not acknowledge.
const UNANSWERED: Duration = Duration::from_mins(1);
const DATAGRAMS_IDLE: Duration = Duration::from_mins(1);
/// Until the same denial is told again.
const TELL_AGAIN: Duration = Duration::from_secs(10);

/// One sandbox's full network.
#[derive(Clone)]
pub struct Gateway {
    rules: Arc<Rules>,
    narrowed: Narrowed,
    resolver: Arc<dyn Resolve>,
    on_event: OnEvent,
}

impl Gateway {
    /// A network where `rules` say what can be reached: usually [`Rule::public`], and what else
    /// there is by address. A domain's rule opens the look-up of that name, no address.
    ///
    /// [`Rule::public`]: crate::Rule::public
    pub fn new(
        rules: Rules,
        resolver: Arc<dyn Resolve>,
        on_event: impl Fn(Event) + Send + Sync + 'static,
    ) -> Self {
        let (rules, narrowed) = (Arc::new(rules), not_narrowed());
        Self { rules, narrowed, resolver, on_event: Arc::new(on_event) }
    }

    /// The same for a sandbox that has rules of its own. When they change, what they close from then
    /// on is cut. A name that they allow opens the addresses that it was answered with here, by TCP.
    #[must_use]
    pub fn narrowed(self, by: Narrowed) -> Self {
        Self { narrowed: by, ..self }
    }

    /// Serves a TUN device (`IFF_TUN | IFF_NO_PI`, no offloads) until `shutdown` is ready,
    /// which closes everything; so does dropping the future, at any point.
    pub async fn serve(
        &self,
        tun: OwnedFd,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<()> {
        rustix::io::ioctl_fionbio(&tun, true).map_err(|error| Error::Tun(error.into()))?;
        #[expect(deprecated, reason = "unsound only for what may give up its descriptor")]
        let tun = AsyncFd::new(tun).map_err(Error::Tun)?;
        Stack::new(self.clone()).run(&tun, shutdown).await
    }
}

/// Who talks to whom: the sandbox's side first.
type Pair = (SocketAddr, SocketAddr);

/// What comes from a socket of the host.
enum Piece {
    Data(Bytes),
    End,
}

/// A connection between the sandbox and the outside.
struct Flow {
    pair: Pair,
    names: Names,
    /// Dropped at the sandbox's last byte.
    to_host: Option<mpsc::Sender<Bytes>>,
    from_host: mpsc::Receiver<Piece>,
    /// What did not fit in the stack.
    left: Bytes,
    ended: bool,
    /// Carries bytes to and from the socket; ends with the flow.
    carrier: JoinSet<()>,
}

/// Datagrams between one socket of the sandbox and one place outside.
struct Datagrams {
    socket: Arc<UdpSocket>,
    used: Instant,
    transfer: Transfer,
    received: Arc<std::sync::atomic::AtomicU64>,
    seen: u64,
    began: Instant,
    on_event: OnEvent,
    _reader: JoinSet<()>,
}

impl Drop for Datagrams {
    fn drop(&mut self) {
        self.transfer.received = self.received.load(std::sync::atomic::Ordering::Relaxed);
        self.transfer.open = self.began.elapsed();
        (self.on_event)(Event::Closed(self.transfer.clone()));
    }
}

/// A connection of the host's that was made, or not, for a first packet of the sandbox.
struct Made {
    pair: Pair,
    first: Vec<u8>,
    stream: io::Result<TcpStream>,
}

/// What a look-up has found, and the packet that says so.
struct Found {
    name: String,
    addresses: Vec<IpAddr>,
    packet: Option<Vec<u8>>,
}

/// Why something is closed, and the address that is to blame.
type Closed = (Option<IpAddr>, Why);

struct Stack {
    gateway: Gateway,
    began: Instant,
    queue: Queue,
    interface: Interface,
    sockets: SocketSet<'static>,
    flows: HashMap<SocketHandle, Flow>,
    /// Those that have a flow or soon will.
    pairs: HashSet<Pair>,
    making: JoinSet<Made>,
    datagrams: HashMap<Pair, Datagrams>,
    look_ups: JoinSet<Found>,
    /// The names that have led to an address.
    learned: HashMap<IpAddr, Vec<String>>,
    denied: HashMap<(String, u16), Instant>,
    /// Packets for the sandbox that did not come from the stack.
    packets: (mpsc::Sender<Vec<u8>>, mpsc::Receiver<Vec<u8>>),
    wake: Arc<Notify>,
}

impl Stack {
    fn new(gateway: Gateway) -> Self {
        let mut queue = Queue::default();
        let mut config = Config::new(HardwareAddress::Ip);
        // Sequence numbers should not be guessed.
        config.random_seed = RandomState::new().hash_one(0);
        let mut interface = Interface::new(config, &mut queue, StackTime::ZERO);
        interface.set_any_ip(true);
        interface.update_ip_addrs(|addresses| {
            // It has room for two.
            let _ = addresses.push(IpCidr::new(GATEWAY.0.into(), 24));
            let _ = addresses.push(IpCidr::new(GATEWAY.1.into(), 64));
        });
        let _ = interface.routes_mut().add_default_ipv4_route(GATEWAY.0);
        let _ = interface.routes_mut().add_default_ipv6_route(GATEWAY.1);
        Self {
            gateway,
            began: Instant::now(),
            queue,
            interface,
            sockets: SocketSet::new(Vec::new()),
            flows: HashMap::new(),
            pairs: HashSet::new(),
            making: JoinSet::new(),
            datagrams: HashMap::new(),
            look_ups: JoinSet::new(),
            learned: HashMap::new(),
            denied: HashMap::new(),
            packets: mpsc::channel(Most::FLOWS),
            wake: Arc::new(Notify::new()),
        }
    }

    async fn run(
        mut self,
        tun: &AsyncFd<OwnedFd>,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<()> {
        let mut shutdown = pin!(shutdown);
        let mut buffer = vec![0; MTU + 16];
        let mut narrowed = self.gateway.narrowed.clone();
        loop {
            let delay = self.interface.poll_delay(self.now(), &self.sockets);
            let delay = delay.map_or(DATAGRAMS_IDLE / 4, Duration::from);
            tokio::select! {
                () = &mut shutdown => return Ok(()),
                ready = tun.readable() => {
                    let mut ready = ready.map_err(Error::Tun)?;
                    for _ in 0..Most::BATCH {
                        match rustix::io::read(tun, &mut buffer) {
                            Ok(length) => self.packet(&buffer[..length]),
                            Err(rustix::io::Errno::AGAIN) => {
                                ready.clear_ready();
                                break;
                            }
                            Err(rustix::io::Errno::INTR) => {}
                            Err(error) => return Err(Error::Tun(error.into())),
                        }
                    }
                }
                () = self.wake.notified() => {}
                Some(Ok(made)) = self.making.join_next() => self.made(made),
                Some(found) = self.look_ups.join_next() => {
                    // One that was given up has an error.
                    if let Ok(found) = found {
                        self.found(found);
                    }
                }
                () = changed(&mut narrowed) => self.cut(),
                Some(packet) = self.packets.1.recv() => self.queue.to_sandbox.push_back(packet),
                () = sleep(delay) => {}
            }
            while let Ok(packet) = self.packets.1.try_recv() {
                self.queue.to_sandbox.push_back(packet);
            }
            self.poll();
            if self.carry() {
                self.poll();
            }
            self.datagrams.retain(|_, flow| {
                let received = flow.received.load(std::sync::atomic::Ordering::Relaxed);
                if received != flow.seen {
                    (flow.seen, flow.used) = (received, Instant::now());
                }
                flow.used.elapsed() < DATAGRAMS_IDLE
            });
            for packet in self.queue.to_sandbox.drain(..) {
                // A packet that the kernel does not want now is a lost one, as on any wire.
                let _ = rustix::io::write(tun, &packet);
            }
        }
    }

    fn now(&self) -> StackTime {
        StackTime::from_micros(i64::try_from(self.began.elapsed().as_micros()).unwrap_or(i64::MAX))
    }

    fn poll(&mut self) {
        let now = self.now();
        while self.interface.poll(now, &mut self.queue, &mut self.sockets)
            == PollResult::SocketStateChanged
        {}
    }

    /// Looks at a packet of the sandbox's.
    fn packet(&mut self, bytes: &[u8]) {
        let Some(packet) = Packet::read(bytes) else { return };
        let pair = (packet.from, packet.to);
        match packet.transport {
            Transport::Udp(data) if packet.to == (DNS, 53).into() => self.look_up(pair, data),
            Transport::Udp(data) => {
                if !self.datagram(pair, data) {
                    // The stack knows no datagrams, and says so to who sent it.
                    self.queue.from_sandbox.push_back(bytes.to_vec());
                }
            }
            Transport::Tcp { opens: true } if !self.pairs.contains(&pair) => {
                let full = self.pairs.len() >= Most::FLOWS;
                let open = self.opens(pair.1);
                if let Some(why) = open.err().or(full.then_some((None, Why::TooMany))) {
                    self.deny_address(pair.1, why);
                    // Nobody listens there, so the stack refuses it.
                    self.queue.from_sandbox.push_back(bytes.to_vec());
                    return;
                }
                self.pairs.insert(pair);
                let first = bytes.to_vec();
                self.making.spawn(async move {
                    let stream = match timeout(CONNECT, TcpStream::connect(pair.1)).await {
                        Ok(stream) => stream,
                        Err(_) => Err(io::ErrorKind::TimedOut.into()),
                    };
                    Made { pair, first, stream }
                });
            }
            // One that is being made already, sent again.
            Transport::Tcp { opens: true } if !self.flows.values().any(|it| it.pair == pair) => {}
            Transport::Tcp { .. } => self.queue.from_sandbox.push_back(bytes.to_vec()),
            // The stack would answer for all the world.
            Transport::Echo if packet.to.ip() == GATEWAY.0 || packet.to.ip() == GATEWAY.1 => {
                self.queue.from_sandbox.push_back(bytes.to_vec());
            }
            Transport::Echo => {}
        }
    }

    /// The names for which alone a destination is open, none if it is by itself; or why it is not.
    fn opens(&self, to: SocketAddr) -> std::result::Result<Vec<String>, Closed> {
        let (address, port) = (to.ip().to_canonical(), to.port());
        let host = Host::Address(address);
        let verdict = self.gateway.rules.permits_with(&host, port, &[], Class::seen_from_here);
        if let Verdict::Refused { address, why } = verdict {
            return Err((address, why));
        }
        let narrowed = self.gateway.narrowed.borrow();
        if narrowed.reaches(address, port) {
            return Ok(Vec::new());
        }
        let names = self.learned.get(&address).into_iter().flatten();
        let names: Vec<_> = names.filter(|name| narrowed.allows(name, port)).cloned().collect();
        if names.is_empty() { Err((Some(address), Why::Denied)) } else { Ok(names) }
    }

    /// Ends what the sandbox's own rules do not open any more.
    fn cut(&mut self) {
        self.look_ups.abort_all();
        let is_open = |flow: &Flow| {
            let names = flow.names.lock();
            self.opens(flow.pair.1).is_ok_and(|open| {
                open.is_empty()
                    || (!names.is_empty() && names.iter().all(|name| open.contains(name)))
            })
        };
        let closed = self.flows.iter().filter(|(_, flow)| !is_open(flow));
        for handle in closed.map(|(handle, _)| *handle).collect::<Vec<_>>() {
            if let Some(flow) = self.flows.get_mut(&handle) {
                flow.carrier.abort_all();
            }
            self.sockets.get_mut::<tcp::Socket>(handle).abort();
        }
        let closed = self.datagrams.keys().filter(|(_, to)| self.opens(*to) != Ok(Vec::new()));
        for pair in closed.copied().collect::<Vec<_>>() {
            self.datagrams.remove(&pair);
        }
    }

    /// Tells of a denial, unless it was told just now.
    fn deny(&mut self, host: String, port: u16, (address, rule): Closed) {
        let now = Instant::now();
        if self.denied.len() >= Most::DENIED {
            self.denied.retain(|_, told| now - *told < TELL_AGAIN);
        }
        // Of a sandbox that tries everything, no more is told.
        let key = (host, port);
        if self.denied.len() >= Most::DENIED
            || self.denied.get(&key).is_some_and(|told| now - *told < TELL_AGAIN)
        {
            return;
        }
        self.denied.insert(key.clone(), now);
        (self.gateway.on_event)(Event::Denied(Denial { host: key.0, port, address, rule }));
    }

    fn deny_address(&mut self, to: SocketAddr, why: Closed) {
        self.deny(Host::Address(to.ip()).to_string(), to.port(), why);
    }

    /// Lets the sandbox's first packet into the stack, now that there is someone to talk to.
    fn made(&mut self, made: Made) {
        let Made { pair, first, stream } = made;
        self.queue.from_sandbox.push_back(first);
        let Ok(stream) = stream else {
            self.pairs.remove(&pair);
            return;
        };
        // What is open may have changed meanwhile.
        let names = match self.opens(pair.1) {
            Ok(names) => Names::new(Mutex::new(names)),
            Err(why) => {
                self.pairs.remove(&pair);
                return self.deny_address(pair.1, why);
            }
        };
        let _ = stream.set_nodelay(true);
        let buffer = || tcp::SocketBuffer::new(vec![0; Most::BUFFER]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket.set_timeout(Some(UNANSWERED.into()));
        if socket.listen(pair.1).is_err() {
            self.pairs.remove(&pair);
            return;
        }
        let handle = self.sockets.add(socket);
        self.poll();
        // Only who asked may have it.
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        if socket.remote_endpoint() != Some(pair.0.into()) {
            self.sockets.remove(handle);
            self.pairs.remove(&pair);
            return;
        }
        let (host, on_event) = (Host::Address(pair.1.ip()), self.gateway.on_event.clone());
        let outside = Counted::new(stream, &host, pair.1.port(), pair.1.ip(), on_event);
        let (to_host, from_sandbox) = mpsc::channel(Most::PIECES);
        let (to_sandbox, from_host) = mpsc::channel(Most::PIECES);
        let mut carrier = JoinSet::new();
        let begins = (!names.lock().is_empty()).then(|| Begins {
            to: pair.1,
            names: names.clone(),
            seen: BytesMut::new(),
            on_event: self.gateway.on_event.clone(),
        });
        carrier.spawn(carry(outside, from_sandbox, to_sandbox, self.wake.clone(), begins));
        let flow = Flow {
            pair,
            names,
            to_host: Some(to_host),
            from_host,
            left: Bytes::new(),
            ended: false,
            carrier,
        };
        self.flows.insert(handle, flow);
    }

    /// Moves bytes between the stack and the sockets; tells whether the stack has news.
    fn carry(&mut self) -> bool {
        let mut news = false;
        let mut over = Vec::new();
        for (&handle, flow) in &mut self.flows {
            let socket = self.sockets.get_mut::<tcp::Socket>(handle);
            while socket.can_recv() {
                let Some(place) = flow.to_host.as_ref().and_then(|to| to.try_reserve().ok()) else {
                    break;
                };
                let piece = socket.recv(|bytes| {
                    let count = bytes.len().min(Most::PIECE);
                    (count, Bytes::copy_from_slice(&bytes[..count]))
                });
                let Ok(piece) = piece else { break };
                place.send(piece);
                news = true;
            }
            // The sandbox has said all it had to.
            if !socket.may_recv() && !socket.can_recv() && socket.state() != tcp::State::SynReceived
            {
                flow.to_host = None;
            }
            while !flow.ended && socket.can_send() {
                if flow.left.is_empty() {
                    match flow.from_host.try_recv() {
                        Ok(Piece::Data(bytes)) => flow.left = bytes,
                        Ok(Piece::End) => {
                            flow.ended = true;
                            socket.close();
                            news = true;
                            break;
                        }
                        Err(mpsc::error::TryRecvError::Empty) => break,
                        Err(mpsc::error::TryRecvError::Disconnected) => {
                            flow.ended = true;
                            socket.abort();
                            news = true;
                            break;
                        }
                    }
                }
                let Ok(count) = socket.send_slice(&flow.left) else { break };
                flow.left.advance(count);
                news = true;
            }
            // Only the sandbox's side is open, and nothing came from it for long.
            if flow.ended && flow.to_host.is_some() && flow.carrier.try_join_next().is_some() {
                socket.abort();
            }
            // What is left to say is nobody's to hear.
            if !socket.is_active() || socket.state() == tcp::State::TimeWait {
                over.push(handle);
            }
        }
        if !over.is_empty() {
            // An aborted socket says so at the next poll, and then it may go.
            self.poll();
        }
        for handle in over {
            self.sockets.remove(handle);
            if let Some(flow) = self.flows.remove(&handle) {
                self.pairs.remove(&flow.pair);
            }
        }
        news
    }

    /// Sends a datagram of the sandbox's; tells whether it might.
    fn datagram(&mut self, pair: Pair, data: &[u8]) -> bool {
        if !self.datagrams.contains_key(&pair) {
            let open = match self.opens(pair.1) {
                Ok(names) if !names.is_empty() => Err((Some(pair.1.ip()), Why::Denied)),
                Ok(_) if self.datagrams.len() >= Most::FLOWS => Err((None, Why::TooMany)),
                open => open,
            };
            if let Err(why) = open {
                self.deny_address(pair.1, why);
                return false;
            }
            match self.new_datagrams(pair) {
                Ok(flow) => drop(self.datagrams.insert(pair, flow)),
                Err(error) => {
                    tracing::debug!(%error, "no socket for a sandbox's datagrams");
                    return false;
                }
            }
        }
        if let Some(flow) = self.datagrams.get_mut(&pair) {
            flow.used = Instant::now();
            // At once, not when the runtime has heard that the new socket is ready.
            let flags = rustix::net::SendFlags::DONTWAIT;
            if rustix::net::send(&*flow.socket, data, flags).is_ok() {
                flow.transfer.sent += data.len() as u64;
            }
        }
        true
    }

    fn new_datagrams(&self, (from, to): Pair) -> io::Result<Datagrams> {
        let any: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = std::net::UdpSocket::bind((any, 0))?;
        socket.set_nonblocking(true)?;
        // Only the one place can answer.
        socket.connect(to)?;
        let socket = Arc::new(UdpSocket::from_std(socket)?);
        let received = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let mut reader = JoinSet::new();
        let (theirs, count, packets) = (socket.clone(), received.clone(), self.packets.0.clone());
        reader.spawn(async move {
            let mut buffer = vec![0; MTU];
            loop {
                // An error is about one that was sent, such as nobody being there.
                let Ok(length) = theirs.recv(&mut buffer).await else { continue };
                let Some(packet) = packet::datagram(to, from, &buffer[..length]) else { continue };
                count.fetch_add(length as u64, std::sync::atomic::Ordering::Relaxed);
                if packets.send(packet).await.is_err() {
                    return;
                }
            }
        });
        let transfer = Transfer {
            host: Host::Address(to.ip()).to_string(),
            port: to.port(),
            address: to.ip(),
            sent: 0,
            received: 0,
            open: Duration::ZERO,
        };
        let now = Instant::now();
        Ok(Datagrams {
            socket,
            used: now,
            transfer,
            received,
            seen: 0,
            began: now,
            on_event: self.gateway.on_event.clone(),
            _reader: reader,
        })
    }

    /// Answers a question about a name.
    fn look_up(&mut self, (from, to): Pair, data: &[u8]) {
        let Some(question) = dns::Question::read(data) else { return };
        let packets = self.packets.0.clone();
        let answer = move |answer: dns::Answer<'_>, question: &dns::Question| {
            if let Some(packet) = packet::datagram(to, from, &question.answer(&answer)) {
                // If there is no room, the sandbox asks again.
                let _ = packets.try_send(packet);
            }
        };
        let Ok(Host::Name(name)) = Host::parse(&question.name) else {
            return answer(dns::Answer::NoSuchName, &question);
        };
        let why = match self.gateway.rules.has_name(&name) {
            true if self.gateway.narrowed.borrow().looks_up(&name) => None,
            true => Some(Why::Denied),
            false => Some(Why::NotListed),
        };
        if let Some(why) = why {
            self.deny(name, to.port(), (None, why));
            return answer(dns::Answer::Refused, &question);
        }
        if !question.wants_addresses() {
            return answer(dns::Answer::Addresses(&[]), &question);
        }
        if self.look_ups.len() >= Most::LOOK_UPS {
            return answer(dns::Answer::Failed, &question);
        }
        let resolver = self.gateway.resolver.clone();
        self.look_ups.spawn(async move {
            let found = timeout(CONNECT, resolver.look_up(&name)).await;
            let answer = match &found {
                Ok(Ok(found)) => dns::Answer::Addresses(found),
                Ok(Err(_)) => dns::Answer::NoSuchName,
                Err(_) => dns::Answer::Failed,
            };
            let packet = packet::datagram(to, from, &question.answer(&answer));
            let addresses = found.ok().and_then(io::Result::ok).unwrap_or_default();
            Found { name, addresses, packet }
        });
    }

    /// Remembers what a name leads to, and then says it.
    fn found(&mut self, Found { name, addresses, packet }: Found) {
        for address in addresses {
            if self.learned.len() >= Most::LEARNED {
                // Whoever needs one of them asks again, as an answer is good for seconds.
                self.learned.clear();
            }
            let names = self.learned.entry(address.to_canonical()).or_default();
            if !names.contains(&name) {
                if names.len() >= Most::NAMES {
                    names.remove(0);
                }
                names.push(name.clone());
            }
        }
        self.queue.to_sandbox.extend(packet);
    }
}

/// The beginning of a connection that may only be for some names.
struct Begins {
    to: SocketAddr,
    names: Names,
    seen: BytesMut,
    on_event: OnEvent,
}

impl Begins {
    /// What may go on when this piece has come; nothing where more has to come first.
    fn take(&mut self, piece: &Bytes) -> io::Result<Option<Bytes>> {
        self.seen.extend_from_slice(piece);
        match named::check(&self.seen, self.to.port(), &self.names) {
            None => Ok(None),
            Some(Ok(())) => Ok(Some(self.seen.split().freeze())),
            Some(Err(rule)) => {
                let (host, port) = (Host::Address(self.to.ip()).to_string(), self.to.port());
                let address = Some(self.to.ip());
                (self.on_event)(Event::Denied(Denial { host, port, address, rule }));
                Err(io::ErrorKind::PermissionDenied.into())
            }
        }
    }
}

/// Carries one connection's bytes between the stack and a socket. Without an [`Piece::End`]
/// the sandbox's side is aborted.
async fn carry(
    outside: Counted,
    mut from_sandbox: mpsc::Receiver<Bytes>,
    to_sandbox: mpsc::Sender<Piece>,
    wake: Arc<Notify>,
    mut begins: Option<Begins>,
) {
    let count = outside.count.clone();
    let (mut read, mut write) = tokio::io::split(outside);
    let up = async {
        while let Some(piece) = from_sandbox.recv().await {
            wake.notify_one();
            let piece = match &mut begins {
                None => piece,
                Some(begun) => {
                    let Some(whole) = begun.take(&piece)? else { continue };
                    begins = None;
                    whole
                }
            };
            write.write_all(&piece).await?;
        }
        write.shutdown().await
    };
    let down = async {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(Most::PIECE);
            let piece = match read.read_buf(&mut buffer).await? {
                0 => Piece::End,
                _ => Piece::Data(buffer.split().freeze()),
            };
            let end = matches!(piece, Piece::End);
            let sent = to_sandbox.send(piece).await.map_err(|_| io::ErrorKind::BrokenPipe.into());
            wake.notify_one();
            if end || sent.is_err() {
                return sent;
            }
        }
    };
    let carried = async { tokio::try_join!(up, down).map(|_| ()) };
    let carried: io::Result<()> = tokio::select! {
        carried = carried => carried,
        () = idle(|| count.moved(), IDLE) => Ok(()),
    };
    if let Err(error) = carried {
        tracing::debug!(%error, "a connection to the outside broke");
    }
    drop(to_sandbox);
    wake.notify_one();
}

/// Packets between the device and the stack.
#[derive(Default)]
struct Queue {
    from_sandbox: VecDeque<Vec<u8>>,
    to_sandbox: VecDeque<Vec<u8>>,
}

struct Received(Vec<u8>);
struct Sending<'a>(&'a mut VecDeque<Vec<u8>>);

impl Device for Queue {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: StackTime) -> Option<(Received, Sending<'_>)> {
        let packet = self.from_sandbox.pop_front()?;
        Some((Received(packet), Sending(&mut self.to_sandbox)))
    }

    fn transmit(&mut self, _: StackTime) -> Option<Sending<'_>> {
        // What is not flushed yet waits in the sockets instead.
        (self.to_sandbox.len() < 4 * Most::BATCH).then_some(Sending(&mut self.to_sandbox))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        capabilities
    }
}

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut packet = vec![0; length];
        let result = f(&mut packet);
        self.0.push_back(packet);
        result
    }
}
