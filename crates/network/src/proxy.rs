//! The proxy: what a sandbox's programs talk to when they want out. For every request, also
//! the second on a connection, it weighs the host, looks it up itself, weighs every address
//! found and connects to one of those, so that nothing changes between the check and its use.
//! It must never look up a name that is not open (a look-up carries data to whoever answers
//! it), and never say yes in doubt.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue,
    TRANSFER_ENCODING,
};
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode, Uri, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::address::{Class, Host};
use crate::error::{Error, Result};
use crate::gate::Gate;
use crate::hello::{self, Hello};
use crate::narrow::{Narrowed, changed, not_narrowed};
use crate::rules::{Rules, Verdict, Why};
use crate::{Denial, Event, OnEvent, Transfer};

/// The client's TLS library shows it as “access denied”.
const ALERT: [u8; 7] = [21, 3, 1, 0, 2, 2, 49];
/// Of each direction of a tunnel.
const BUFFER: usize = 64 * 1024;
/// Addresses of one name that are tried.
const TRIED: usize = 8;

/// A look-up under way.
pub type Looking<'a> = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send + 'a>>;

/// Where names are looked up.
pub trait Resolve: Send + Sync {
    /// All addresses of a name.
    fn look_up<'a>(&'a self, name: &'a str) -> Looking<'a>;
}

/// Looks names up as the host's programs do.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostResolver;

impl Resolve for HostResolver {
    fn look_up<'a>(&'a self, name: &'a str) -> Looking<'a> {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name, 0)).await?;
            Ok(found.map(|address| address.ip()).collect())
        })
    }
}

/// How much and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections of the sandbox at once; more are turned away.
    pub connections: usize,
    /// For a request's head to arrive, and between two requests.
    pub head: Duration,
    /// For a TLS handshake to begin in a tunnel.
    pub hello: Duration,
    /// For a name to be looked up, and again for a connection to be made.
    pub connect: Duration,
    /// Without a byte in either direction; at twice this a connection is surely closed.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            head: Duration::from_secs(30),
            hello: Duration::from_secs(10),
            connect: Duration::from_secs(20),
            idle: Duration::from_mins(10),
        }
    }
}

/// One sandbox's way out.
#[derive(Clone)]
pub struct Egress(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    rules: Rules,
    narrowed: Narrowed,
    resolver: Arc<dyn Resolve>,
    on_event: OnEvent,
    limits: Limits,
    room: Arc<Semaphore>,
}

impl Egress {
    /// A way out that opens what `rules` open.
    pub fn new(
        rules: Rules,
        resolver: Arc<dyn Resolve>,
        on_event: impl Fn(Event) + Send + Sync + 'static,
    ) -> Self {
        Self::with_limits(rules, resolver, on_event, Limits::default())
    }

    /// The same with other limits than the usual.
    pub fn with_limits(
        rules: Rules,
        resolver: Arc<dyn Resolve>,
        on_event: impl Fn(Event) + Send + Sync + 'static,
        limits: Limits,
    ) -> Self {
        let room = Arc::new(Semaphore::new(limits.connections.min(Semaphore::MAX_PERMITS)));
        let on_event = Arc::new(on_event);
        let narrowed = not_narrowed();
        Self(Arc::new(Inner { rules, narrowed, resolver, on_event, limits, room }))
    }

    /// The same for a sandbox that has rules of its own. When they change, what they close from then
    /// on is cut.
    #[must_use]
    pub fn narrowed(self, by: Narrowed) -> Self {
        Self(Arc::new(Inner { narrowed: by, ..Inner::clone(&self.0) }))
    }

    /// Serves connections until `shutdown` is ready, which closes them all; so does dropping
    /// the future, at any point. Connections to the outside are made in the namespace of the
    /// calling process, whatever namespace the listener is in.
    pub async fn serve(
        &self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<()> {
        let mut clients = JoinSet::new();
        let mut shutdown = pin!(shutdown);
        loop {
            let accepted = tokio::select! {
                () = &mut shutdown => return Ok(()),
                Some(_) = clients.join_next() => continue,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let Ok(place) = self.0.room.clone().try_acquire_owned() else {
                        let busy = self.0.deny("", 0, None, Why::TooMany);
                        // It fits in an empty socket's buffer; if not, closing says enough.
                        let _ = stream.try_write(raw(&busy).as_bytes());
                        continue;
                    };
                    let inner = self.0.clone();
                    clients.spawn(async move {
                        let reached = Reached::default();
                        tokio::select! {
                            () = inner.clone().client(stream, &reached) => {}
                            () = inner.closed(&reached) => {}
                        }
                        drop(place);
                    });
                }
                Err(error) if breaks_listener(&error) => return Err(Error::Accept(error)),
                Err(error) => {
                    tracing::warn!(%error, "a sandbox's connection could not be accepted");
                    // Most likely out of files: trying at once would only burn time.
                    sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }
}

/// Other errors are about one connection, or pass (`accept(2)`).
fn breaks_listener(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidInput) || error.raw_os_error() == Some(9)
}

/// What a request is answered with if not with a server's response.
enum No {
    Denied(Denial),
    /// It was open, but did not work.
    Failed(StatusCode, String),
}

type Answer = Response<Either<Full<Bytes>, Forwarded>>;

/// What a client's connection leads to at the moment.
type Reached = Mutex<Option<(Host, u16, IpAddr)>>;

/// A tunnel that begins when its client's connection is done with HTTP.
struct Tunnel {
    client: OnUpgrade,
    outside: Counted,
    /// What the TLS handshake must be for.
    name: Option<String>,
}

impl Inner {
    /// Tells of a denial.
    fn deny(&self, host: &str, port: u16, address: Option<IpAddr>, rule: Why) -> Denial {
        let host = host.chars().take(255).collect();
        let denial = Denial { host, port, address, rule };
        (self.on_event)(Event::Denied(denial.clone()));
        denial
    }

    /// Serves one connection of the sandbox.
    async fn client(self: Arc<Self>, stream: TcpStream, reached: &Reached) {
        let _ = stream.set_nodelay(true);
        let moved = Arc::new(AtomicU64::new(0));
        let tunnel = Arc::new(Mutex::new(None));
        let answered = AtomicBool::new(false);
        let service = service_fn(|request| {
            answered.store(true, Ordering::Relaxed);
            let (inner, tunnel) = (self.clone(), tunnel.clone());
            async move { Ok::<_, Infallible>(inner.answer(request, &tunnel, reached).await) }
        });
        let (gate, refused) = Gate::new(stream, moved.clone());
        let mut connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.head)
            .serve_connection(TokioIo::new(gate), service)
            .with_upgrades();
        let served = tokio::select! {
            served = &mut connection => served,
            () = idle(|| moved.load(Ordering::Relaxed), self.limits.idle) => return,
            Ok(why) = refused => {
                let denial = self.deny("", 0, None, why);
                // Another answer may be on its way still: then closing must say enough.
                if let Some(parts) = connection.into_parts()
                    && !answered.load(Ordering::Relaxed)
                {
                    let (mut client, answer) = (parts.io.into_inner(), raw(&denial));
                    let _ = timeout(self.limits.hello, async {
                        client.write_all(answer.as_bytes()).await?;
                        client.shutdown().await
                    })
                    .await;
                }
                return;
            }
        };
        if let Err(error) = served {
            if error.is_parse() {
                // The parser has answered by itself.
                self.deny("", 0, None, Why::Malformed("its target cannot be read"));
            }
            return;
        }
        let tunnel = tunnel.lock().take();
        if let Some(tunnel) = tunnel
            && let Err(error) = self.tunnel(tunnel).await
        {
            tracing::debug!(%error, "a tunnel broke");
        }
    }

    /// Answers one request.
    async fn answer(
        &self,
        request: Request<Incoming>,
        tunnel: &Mutex<Option<Tunnel>>,
        reached: &Reached,
    ) -> Answer {
        // The gate lets everything through after these.
        let last = request.method() == Method::CONNECT
            || request.headers().contains_key(TRANSFER_ENCODING);
        let answer = if request.method() == Method::CONNECT {
            self.connect_tunnel(request, reached).await.map(|made| {
                *tunnel.lock() = Some(made);
                Response::new(Either::Left(Full::default()))
            })
        } else {
            self.forward(request, reached).await
        };
        let mut answer = match answer {
            Ok(answer) => answer,
            Err(no) => refusal(&no),
        };
        if last && tunnel.lock().is_none() {
            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        answer
    }

    async fn connect_tunnel(
        &self,
        mut request: Request<Incoming>,
        reached: &Reached,
    ) -> Result<Tunnel, No> {
        let target = request.uri().authority().map_or("", |authority| authority.as_str());
        let (host, port) = match Host::with_port(target) {
            Ok((host, Some(port))) => (host, port),
            Ok((host, None)) => {
                let why = Why::Spelling(crate::Spelling::Port);
                return Err(No::Denied(self.deny(&host.to_string(), 0, None, why)));
            }
            Err(spelling) => return Err(No::Denied(self.deny(target, 0, None, spelling.into()))),
        };
        let (outside, by_name) = self.connect(&host, port, reached).await?;
        let name = match host {
            Host::Name(name) if by_name && port == 443 => Some(name),
            _ => None,
        };
        Ok(Tunnel { client: hyper::upgrade::on(&mut request), outside, name })
    }

    /// Hands a request to the server that it is for, and the response back.
    async fn forward(&self, request: Request<Incoming>, reached: &Reached) -> Result<Answer, No> {
        let (mut parts, body) = request.into_parts();
        let target = parts.uri.authority().map_or("", |authority| authority.as_str());
        let deny = |port, why| No::Denied(self.deny(target, port, None, why));
        if parts.uri.scheme_str() != Some("http") {
            return Err(deny(0, Why::Scheme));
        }
        let (host, port) =
            Host::with_port(target).map_err(|spelling| deny(0, Why::Spelling(spelling)))?;
        let port = port.unwrap_or(80);
        let agrees = match parts.headers.get(HOST) {
            Some(header) => header
                .to_str()
                .ok()
                .and_then(|text| Host::with_port(text).ok())
                .is_some_and(|(of_header, at)| of_header == host && at.unwrap_or(80) == port),
            None => parts.version == Version::HTTP_10,
        };
        if !agrees {
            return Err(deny(port, Why::HostHeader));
        }

        let (outside, _) = self.connect(&host, port, reached).await?;
        let failed = |error: &dyn std::fmt::Display| {
            No::Failed(StatusCode::BAD_GATEWAY, format!("{host}:{port} did not answer: {error}"))
        };
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
        let slash = if path.starts_with('/') { "" } else { "/" };
        parts.uri = format!("{slash}{path}").parse::<Uri>().map_err(|error| failed(&error))?;
        parts.version = Version::HTTP_11;
        drop_hop_by_hop(&mut parts.headers);
        let authority = if port == 80 { host.to_string() } else { format!("{host}:{port}") };
        let authority = HeaderValue::try_from(authority).map_err(|error| failed(&error))?;
        parts.headers.insert(HOST, authority);
        parts.headers.insert(CONNECTION, HeaderValue::from_static("close"));

        let (mut requests, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(outside))
                .await
                .map_err(|error| failed(&error))?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to the outside broke");
            }
        });
        let response = requests.send_request(Request::from_parts(parts, body)).await;
        let (mut parts, body) = response.map_err(|error| failed(&error))?.into_parts();
        if parts.status == StatusCode::SWITCHING_PROTOCOLS {
            return Err(failed(&"it switched to another protocol unasked"));
        }
        if parts.headers.contains_key(TRANSFER_ENCODING) {
            parts.headers.remove(CONTENT_LENGTH);
        }
        drop_hop_by_hop(&mut parts.headers);
        parts.version = Version::HTTP_11;
        let body = Forwarded { body, _driver: driver };
        Ok(Response::from_parts(parts, Either::Right(body)))
    }

    /// Weighs a destination against the pool's rules and the sandbox's own.
    fn weigh(&self, host: &Host, port: u16, addresses: &[IpAddr]) -> Verdict {
        let verdict = self.rules.permits_with(host, port, addresses, Class::seen_from_here);
        self.narrowed.borrow().weigh(verdict, host, port, addresses)
    }

    /// Returns when what a client has reached is not open any more. Cancel-safe.
    async fn closed(&self, reached: &Reached) {
        let mut narrowed = self.narrowed.clone();
        loop {
            changed(&mut narrowed).await;
            if let Some((host, port, address)) = &*reached.lock()
                && let Verdict::Refused { .. } = self.weigh(host, *port, &[*address])
            {
                return;
            }
        }
    }

    /// Connects to a host, if it is open; tells also whether it is because of its name.
    async fn connect(
        &self,
        host: &Host,
        port: u16,
        reached: &Reached,
    ) -> Result<(Counted, bool), No> {
        let weigh = |addresses: &[IpAddr]| match self.weigh(host, port, addresses) {
            Verdict::Permitted { by_name } => Ok(by_name),
            Verdict::Refused { address, why } => {
                Err(No::Denied(self.deny(&host.to_string(), port, address, why)))
            }
        };
        weigh(&[])?;
        let addresses = match host {
            Host::Address(address) => vec![*address],
            Host::Name(name) => {
                let found = match timeout(self.limits.connect, self.resolver.look_up(name)).await {
                    Ok(found) => found,
                    Err(_) => Err(io::ErrorKind::TimedOut.into()),
                };
                let mut addresses = Vec::new();
                for address in found.map_err(|error| {
                    let problem = format!("{name} could not be looked up: {error}");
                    No::Failed(StatusCode::BAD_GATEWAY, problem)
                })? {
                    let address = address.to_canonical();
                    if !addresses.contains(&address) {
                        addresses.push(address);
                    }
                }
                weigh(&addresses)?;
                addresses
            }
        };
        let deadline = Instant::now() + self.limits.connect;
        let (mut status, mut problem) = (StatusCode::BAD_GATEWAY, "it has no address".to_owned());
        let addresses = &addresses[..addresses.len().min(TRIED)];
        for (tried, address) in addresses.iter().enumerate() {
            // Each gets its share of the time that is left.
            let left = u32::try_from(addresses.len() - tried).unwrap_or(1);
            let share = (deadline - Instant::now()) / left;
            match timeout(share, TcpStream::connect((*address, port))).await {
                Ok(Ok(stream)) => {
                    let _ = stream.set_nodelay(true);
                    let on_event = self.on_event.clone();
                    *reached.lock() = Some((host.clone(), port, *address));
                    // The sandbox's own rules may have changed meanwhile; from here on `closed`
                    // sees to that.
                    let by_name = weigh(&[*address])?;
                    return Ok((Counted::new(stream, host, port, *address, on_event), by_name));
                }
                Ok(Err(error)) => problem = error.to_string(),
                Err(_) => {
                    status = StatusCode::GATEWAY_TIMEOUT;
                    "it took too long".clone_into(&mut problem);
                }
            }
        }
        Err(No::Failed(status, format!("{host}:{port} could not be connected to: {problem}")))
    }

    /// Carries bytes between a client and the outside until either is done.
    async fn tunnel(&self, tunnel: Tunnel) -> io::Result<()> {
        let Tunnel { client, mut outside, name } = tunnel;
        let parts = client
            .await
            .map_err(io::Error::other)?
            .downcast::<TokioIo<Gate<TcpStream>>>()
            .map_err(|_| io::Error::other("a connection that is not ours"))?;
        let (mut client, held) = parts.io.into_inner().into_inner();
        let mut sent = Vec::from(parts.read_buf);
        sent.extend_from_slice(&held);
        if let Some(name) = name {
            let deadline = Instant::now() + self.limits.hello;
            let why = loop {
                match hello::read(&sent) {
                    Hello::Name(asked) if Host::parse(&asked) == Ok(Host::Name(name.clone())) => {
                        break None;
                    }
                    Hello::Name(asked) => break Some(Why::OtherServer(asked)),
                    Hello::Refused(problem) => break Some(Why::Handshake(problem)),
                    Hello::Partial => {}
                }
                let room = hello::LONGEST - sent.len();
                let mut more = (&mut client).take(room as u64);
                match timeout_at(deadline, more.read_buf(&mut sent)).await {
                    // It changed its mind.
                    Ok(Ok(0)) if sent.is_empty() => return Ok(()),
                    Ok(Ok(0)) => break Some(Why::Handshake("it is cut off")),
                    Ok(Ok(_)) => {}
                    Ok(Err(error)) => return Err(error),
                    Err(_) => break Some(Why::Handshake("it did not come in time")),
                }
            };
            if let Some(why) = why {
                self.deny(&name, 443, None, why);
                // HTTP is over, so TLS has to say it.
                let alert = async {
                    client.write_all(&ALERT).await?;
                    client.shutdown().await
                };
                return timeout(self.limits.hello, alert).await?;
            }
        }
        let count = outside.count.clone();
        let carry = async {
            outside.write_all(&sent).await?;
            drop(sent);
            tokio::io::copy_bidirectional_with_sizes(&mut client, &mut outside, BUFFER, BUFFER)
                .await
                .map(|_| ())
        };
        tokio::select! {
            carried = carry => carried,
            () = idle(|| count.moved(), self.limits.idle) => Ok(()),
        }
    }
}

/// Returns when `moved` has not changed for a whole period.
pub(crate) async fn idle(moved: impl Fn() -> u64, period: Duration) {
    loop {
        let before = moved();
        sleep(period).await;
        if moved() == before {
            return;
        }
    }
}

/// What is about one connection only (RFC 9110, 7.6.1), and what is between a client and its
/// proxy. The body is framed anew, and 100-continue is between the client and this proxy.
fn drop_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // It says where the body ends, and this connection's peer was told by it.
        .filter(|name| *name != CONTENT_LENGTH)
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in [
        "connection",
        "expect",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ] {
        headers.remove(name);
    }
}

fn status(why: &Why) -> StatusCode {
    match why {
        Why::Malformed(_) | Why::Scheme => StatusCode::BAD_REQUEST,
        Why::TooMany => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::FORBIDDEN,
    }
}

fn sentence(denial: &Denial) -> String {
    match denial {
        Denial { host, rule, .. } if host.is_empty() => format!("refused: {rule}\n"),
        Denial { host, port: 0, rule, .. } => format!("{host} was refused: {rule}\n"),
        Denial { host, port, address: None, rule } => {
            format!("{host}:{port} was refused: {rule}\n")
        }
        Denial { host, port, address: Some(address), rule } => {
            format!("{host}:{port} was refused: {rule} ({address})\n")
        }
    }
}

/// A denial as HTTP, where no parser is left to write it.
fn raw(denial: &Denial) -> String {
    let (status, body) = (status(&denial.rule), sentence(denial));
    format!(
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: text/plain\r\n\
         X-Denizen-Denied: {}\r\nContent-Length: {}\r\n\r\n{body}",
        denial.rule,
        body.len(),
    )
}

fn refusal(no: &No) -> Answer {
    let (status, text, why) = match no {
        No::Denied(denial) => (status(&denial.rule), sentence(denial), Some(&denial.rule)),
        No::Failed(status, problem) => (*status, format!("{problem}\n"), None),
    };
    let mut response = Response::new(Either::Left(Full::from(text)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    if let Some(why) = why.and_then(|why| HeaderValue::try_from(why.to_string()).ok()) {
        headers.insert("x-denizen-denied", why);
    }
    response
}

/// A server's response on its way to the client, with the connection that it comes by.
struct Forwarded {
    body: Incoming,
    /// Dropping it closes the connection.
    _driver: JoinSet<()>,
}

impl Body for Forwarded {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[derive(Default)]
pub(crate) struct Count {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Count {
    pub(crate) fn moved(&self) -> u64 {
        self.sent.load(Ordering::Relaxed) + self.received.load(Ordering::Relaxed)
    }
}

/// A connection to the outside, which tells at its end what went over it.
pub(crate) struct Counted {
    stream: TcpStream,
    pub(crate) count: Arc<Count>,
    host: String,
    port: u16,
    address: IpAddr,
    since: Instant,
    on_event: OnEvent,
}

impl Counted {
    pub(crate) fn new(
        stream: TcpStream,
        host: &Host,
        port: u16,
        address: IpAddr,
        on_event: OnEvent,
    ) -> Self {
        let (count, since) = (Arc::default(), Instant::now());
        Self { stream, count, host: host.to_string(), port, address, since, on_event }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        (self.on_event)(Event::Closed(Transfer {
            host: std::mem::take(&mut self.host),
            port: self.port,
            address: self.address,
            sent: self.count.sent.load(Ordering::Relaxed),
            received: self.count.received.load(Ordering::Relaxed),
            open: self.since.elapsed(),
        }));
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let counted = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut counted.stream).poll_read(cx, buf))?;
        let read = buf.filled().len() - before;
        counted.count.received.fetch_add(read as u64, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let counted = self.get_mut();
        let written = ready!(Pin::new(&mut counted.stream).poll_write(cx, buf))?;
        counted.count.sent.fetch_add(written as u64, Ordering::Relaxed);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
