//! Connections, of the Unix socket and of TCP, and what each of them may cost: a client that is
//! slow, silent or gone must never keep what others need.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{Request, Response};
use axum::{BoxError, Router};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::rt::{Read, Write};
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::{Builder, HttpServerConnExec, UpgradeableConnection};
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;

use crate::access::limits::{AtATime, network};
use crate::access::tls::Tls;
use crate::access::{Access, Peer, guard};
use crate::listener::OwnListener;

/// The most connections by TCP.
const CONNECTIONS: usize = 1024;
/// The most that one address may have.
const OF_ONE: usize = CONNECTIONS / 2;
/// The longest request line and headers, in bytes.
const HEAD: u16 = 32 * 1024;
/// How long a client may take to send these, also after the request before.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long a client that has come with a good key may have no request under way. E2B's keep a
/// connection for five minutes: whoever closes it first should be the one who would use it next.
const IDLE: Duration = Duration::from_mins(6);
/// The most requests at a time on one connection of HTTP/2.
const STREAMS: u32 = 256;
/// What is taken in of a request that nobody reads yet, and of all of a connection.
const WINDOW: u32 = 256 * 1024;
const WINDOWS: u32 = 2 * 1024 * 1024;
/// What is under way on a connection of the daemon's to itself.
const WITHIN: usize = 64 * 1024;
/// After how long a client that says nothing is asked whether it is there, how often then, and
/// for how long.
const SILENCE: [Duration; 3] =
    [Duration::from_secs(30), Duration::from_secs(10), Duration::from_mins(1)];

/// How long whoever is still there when all else has ended may take to read what is left.
const A_MOMENT: Duration = Duration::from_secs(1);

/// All connections that are open.
#[derive(Clone, Default)]
pub(crate) struct Connections {
    open: TaskTracker,
    /// Cancelled when no further request is taken.
    finishing: CancellationToken,
    /// Cancelled when they are closed, whatever is being done on them.
    ended: CancellationToken,
}

impl Connections {
    /// Takes no further request on any of them: each is closed when it has its answers.
    pub(crate) fn finish(&self) {
        self.finishing.cancel();
    }

    /// Closes all of them, after a moment at most.
    pub(crate) async fn end(&self) {
        self.open.close();
        let _ = tokio::time::timeout(A_MOMENT, self.open.wait()).await;
        self.ended.cancel();
        self.open.wait().await;
    }

    /// Has a connection served until it is closed, by either side.
    fn spawn(&self, serving: impl Future<Output = ()> + Send + 'static) {
        self.open.spawn(self.ended.clone().run_until_cancelled_owned(serving));
    }

    /// Serves what is asked on a connection.
    async fn serve<I, S, B>(&self, serving: UpgradeableConnection<'_, I, S, TokioExecutor>)
    where
        I: Read + Write + Unpin + Send + 'static,
        S: Service<Request<Incoming>, Response = Response<B>>,
        S::Future: 'static,
        S::Error: Into<BoxError>,
        B: Body + 'static,
        B::Error: Into<BoxError>,
        TokioExecutor: HttpServerConnExec<S::Future, B>,
    {
        let mut serving = std::pin::pin!(serving);
        // It ends as its client sees fit.
        tokio::select! {
            _ = &mut serving => return,
            () = self.finishing.cancelled() => serving.as_mut().graceful_shutdown(),
        }
        let _ = serving.await;
    }
}

/// Serves what comes by the Unix socket, for ever.
pub(crate) async fn local(mut listener: OwnListener, app: Router, connections: Connections) {
    let app = TowerToHyperService::new(app);
    loop {
        let (stream, uid) = listener.accept().await;
        let app = app.clone();
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(Peer::Local { uid });
            app.call(request)
        });
        let all = connections.clone();
        connections.spawn(async move {
            let builder = Builder::new(TokioExecutor::new());
            all.serve(builder.serve_connection_with_upgrades(TokioIo::new(stream), service)).await;
        });
    }
}

/// A connection of the daemon's to itself, for what it does on behalf of whoever is at `peer`.
pub(crate) fn within(peer: Peer, app: Router, connections: &Connections) -> DuplexStream {
    let (ours, theirs) = tokio::io::duplex(WITHIN);
    let app = TowerToHyperService::new(app);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        app.call(request)
    });
    let all = connections.clone();
    connections.spawn(async move {
        let builder = Builder::new(TokioExecutor::new());
        all.serve(builder.serve_connection_with_upgrades(TokioIo::new(theirs), service)).await;
    });
    ours
}

/// Serves what comes by TCP, for ever.
pub(crate) async fn remote(
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    app: Router,
    access: Arc<Access>,
    connections: Connections,
) {
    let of_one = AtATime::new(OF_ONE);
    let app = TowerToHyperService::new(app);
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // Whoever finds no place waits in the kernel's queue.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // Nobody alone takes all places. Who is on this machine may be a proxy for others.
        let one = of_one.begin(network(from.ip()));
        if one.is_none() && !from.ip().to_canonical().is_loopback() {
            continue;
        }
        let (tls, app, access) = (tls.clone(), app.clone(), access.clone());
        let all = connections.clone();
        connections.spawn(async move {
            let _place = (place, one);
            connection(stream, from, tls, app, access, &all).await;
        });
    }
}

/// Serves one connection, until either side ends it.
async fn connection(
    stream: TcpStream,
    from: SocketAddr,
    tls: Option<Arc<Tls>>,
    app: TowerToHyperService<Router>,
    access: Arc<Access>,
    all: &Connections,
) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let Ok(to) = prepare(&stream) else { return };
    let cut = CancellationToken::new();
    let known = Arc::default();
    let peer = Peer::Tcp { from, to, tls: tls.is_some(), cut: cut.clone(), known };
    let Some(tls) = tls else {
        return serve(Cuttable::new(stream, cut), peer, app, access, all).await;
    };
    let stream = tls.acceptor().await.accept(stream);
    // Who does not manage to say a word of TLS is nobody to talk to about it.
    if let Ok(Ok(stream)) = tokio::time::timeout_at(deadline, stream).await {
        serve(Cuttable::new(stream, cut), peer, app, access, all).await;
    }
}

async fn serve(
    io: Cuttable<impl AsyncRead + AsyncWrite + Unpin + Send + 'static>,
    peer: Peer,
    app: TowerToHyperService<Router>,
    access: Arc<Access>,
    all: &Connections,
) {
    let known = match &peer {
        Peer::Tcp { known, .. } => known.clone(),
        Peer::Local { .. } => Arc::default(),
    };
    let (under_way, quiet) = watch::channel(0);
    let under_way = Arc::new(under_way);
    let service = service_fn(move |mut request: Request<Incoming>| {
        let one = UnderWay::begin(under_way.clone());
        guard::by_path(&access.front(), &mut request);
        request.extensions_mut().insert(peer.clone());
        let answer = app.call(request);
        async move { answer.await.map(|answer| answer.map(|body| Answer { body, _one: one })) }
    });
    let builder = protocols();
    let serving = builder.serve_connection_with_upgrades(TokioIo::new(io), service);
    let mut serving = std::pin::pin!(all.serve(serving));
    tokio::select! {
        () = &mut serving => {}
        () = unasked(quiet, &known) => {}
    }
}

/// What is spoken on a connection.
fn protocols() -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    // How long the next request may take to come is not the protocol's to say: see [`unasked`].
    builder.http1().timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(HEAD.into());
    let [idle, _, end] = SILENCE;
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(HEAD.into())
        .max_concurrent_streams(STREAMS)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOWS)
        .keep_alive_interval(idle)
        .keep_alive_timeout(end);
    builder
}

/// Ends when no request has been under way for too long: nobody else is to wait for the place of
/// a client that does nothing.
async fn unasked(mut under_way: watch::Receiver<usize>, known: &AtomicBool) {
    loop {
        // Cannot fail: the service has the other end.
        if under_way.wait_for(|requests| *requests == 0).await.is_err() {
            return std::future::pending().await;
        }
        let limit = if known.load(Ordering::Relaxed) { IDLE } else { PATIENCE };
        if tokio::time::timeout(limit, under_way.changed()).await.is_err() {
            return;
        }
    }
}

/// A request, until its answer is out.
struct UnderWay(Arc<watch::Sender<usize>>);

impl UnderWay {
    fn begin(all: Arc<watch::Sender<usize>>) -> Self {
        all.send_modify(|requests| *requests += 1);
        Self(all)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.send_modify(|requests| *requests -= 1);
    }
}

/// An answer's body, with which its request ends.
struct Answer {
    body: axum::body::Body,
    _one: UnderWay,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Has the kernel see to it that a client that is gone is noticed.
fn prepare(stream: &TcpStream) -> std::io::Result<SocketAddr> {
    let [idle, interval, end] = SILENCE;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, idle)?;
    sockopt::set_tcp_keepintvl(stream, interval)?;
    sockopt::set_tcp_user_timeout(stream, u32::try_from(end.as_millis()).unwrap_or(u32::MAX))?;
    stream.local_addr()
}

/// A connection that can be ended from elsewhere, also when it has been upgraded and nobody
/// knows who has it.
struct Cuttable<S> {
    stream: S,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Whoever waits for its end is told, however that comes and whoever had it last.
    _end: DropGuard,
}

impl<S> Cuttable<S> {
    fn new(stream: S, cut: CancellationToken) -> Self {
        let end = cut.clone().drop_guard();
        Self { stream, cut: Box::pin(cut.cancelled_owned()), _end: end }
    }

    fn is_cut(&mut self, context: &mut Context<'_>) -> bool {
        self.cut.as_mut().poll(context).is_ready()
    }
}

fn was_cut<T>() -> Poll<std::io::Result<T>> {
    Poll::Ready(Err(std::io::ErrorKind::ConnectionAborted.into()))
}

impl<S: AsyncRead + Unpin> AsyncRead for Cuttable<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.is_cut(context) {
            return was_cut();
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Cuttable<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        if self.is_cut(context) {
            return was_cut();
        }
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::convert::Infallible;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_client_finds_its_connection_as_it_left_it() {
        let (mut client, server) = tokio::io::duplex(4096);
        let service = service_fn(|_| async {
            Ok::<_, Infallible>(Response::new(axum::body::Body::from("there")))
        });
        tokio::spawn(async move {
            protocols()
                .serve_connection_with_upgrades(TokioIo::new(server), service)
                .await
                .unwrap();
        });
        for _ in 0..2 {
            client.write_all(b"GET / HTTP/1.1\r\nhost: it\r\n\r\n").await.unwrap();
            let mut told = Vec::new();
            while !told.ends_with(b"there") {
                assert!(client.read_buf(&mut told).await.unwrap() > 0, "it was closed");
            }
            tokio::time::sleep(IDLE - Duration::from_secs(1)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_for_nothing_goes_sooner_if_nobody_knows_them() {
        let (under_way, quiet) = watch::channel(0);
        let known = Arc::new(AtomicBool::new(false));
        let begun = tokio::time::Instant::now();
        unasked(quiet.clone(), &known).await;
        assert_eq!(begun.elapsed(), PATIENCE);
        known.store(true, Ordering::Relaxed);
        let begun = tokio::time::Instant::now();
        let under_way = Arc::new(under_way);
        let one = UnderWay::begin(under_way.clone());
        let answered = async move {
            tokio::time::sleep(IDLE * 2).await;
            drop(one);
        };
        tokio::join!(unasked(quiet, &known), answered);
        assert_eq!(begun.elapsed(), IDLE * 3);
    }
}
