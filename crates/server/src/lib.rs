//! The daemon: one pool of sessions, offered over HTTP on a Unix socket, and over TCP to those
//! who have a key (`access`).
//!
//! `/v1/…` is about sessions (`api`), and `/mcp` for clients of MCP; `/healthz`, `/readyz` and
//! `/metrics` are about the daemon; `/` is the dashboard (`web`); `/sandboxes`, `/templates` and what
//! is beside them are E2B's control plane (`e2b`); all else is envd's protocol, for the session that
//! the header
//! [`SESSION`] names (`lease`), with `/metrics` among it where there is that header. The daemon must
//! never decide anything about a session's life: it asks the pool, as any caller of the library
//! does.

mod access;
mod api;
mod connections;
mod e2b;
mod files;
mod lease;
mod listener;
mod mcp;
mod metrics;
mod rest;
mod stream;
mod trace;
mod web;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::DefaultBodyLimit;
use axum::routing::any;
use denizen::{Isolation, MicroVmManager};
use denizen_agent::envd;
pub use denizen_agent::envd::KeptLogs;
use futures::{Stream, StreamExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::access::audit::Audit;
use crate::access::tls::Tls;
use crate::access::{Access, guard};
pub use crate::access::{Certificate, Front, KeyInfo, Keys, KeysError};
pub use crate::api::description;
use crate::connections::Connections;
use crate::lease::Leases;
use crate::listener::OwnListener;

/// Request header that names a session, by name or UUID. Clients of envd send
/// `E2b-Sandbox-Id`, which is understood too.
pub const SESSION: &str = "denizen-session";

/// The most that a body of JSON may have, in bytes.
const JSON: usize = 1 << 20;

/// Why a daemon cannot run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The socket cannot be made.
    #[error("cannot listen on {}: {source}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another daemon answers on the socket.
    #[error("another daemon listens on {}: stop it first, or use another socket", path.display())]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// A TCP address cannot be had.
    #[error("cannot listen on {address}: {source}")]
    Address {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// Others reach an address, and what keeps them out is not there.
    #[error(
        "{address} is reached from other machines, and {lack}; or say `insecure_listen = true` \
         (--insecure-listen), if something else sees to that"
    )]
    Insecure {
        /// The address.
        address: SocketAddr,
        /// What is not there, and what would change that.
        lack: &'static str,
    },
    /// The keys cannot be had.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The certificate cannot be had.
    #[error("the certificate for TLS: {0}")]
    Tls(String),
    /// What is remembered of sandboxes cannot be read.
    #[error(transparent)]
    Sandboxes(#[from] e2b::StoreError),
    /// The audit log cannot be written.
    #[error("cannot write the audit log: {0}")]
    Audit(std::io::Error),
    /// The pool could not be shut down in order.
    #[error(transparent)]
    Pool(#[from] denizen::Error),
}

/// What becomes of what runs in sessions when the daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It ends too.
    Stop,
    /// What runs in the background goes on, where it can, for the next daemon to find.
    Leave,
}

/// Where a daemon is reached on its machine, and what it has there.
#[derive(Debug)]
pub struct Place {
    /// Its socket, unless one is handed over.
    pub socket: PathBuf,
    /// The folder with the keys and the audit log.
    pub state: PathBuf,
    /// What a service manager has opened.
    pub handed: Handed,
}

/// Listeners that somebody has opened for the daemon. They are used in the place of its own, and
/// what holds for those holds for them.
#[derive(Debug, Default)]
pub struct Handed {
    /// In the place of the socket.
    pub socket: Option<std::os::unix::net::UnixListener>,
    /// Beside the addresses of [`Front::listen`], or in the place of those that are the same.
    pub tcp: Vec<std::net::TcpListener>,
}

/// What a daemon goes by, beside its [`Front`].
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    /// It ends after so long without anything to do, if ever.
    pub idle_exit: Option<Duration>,
    /// How long commands in the foreground may go on when it is to leave ([`Ending::Leave`]).
    pub grace: Duration,
    /// What is kept of what detached commands print.
    pub logs: KeptLogs,
    /// How many full files of the audit log are kept, of 8 MiB each.
    pub audit_files: u32,
}

/// A daemon that has not begun to serve.
pub struct Daemon {
    pool: Arc<MicroVmManager>,
    listener: OwnListener,
    remote: Vec<TcpListener>,
    tls: Option<Arc<Tls>>,
    access: Arc<Access>,
    leases: Arc<Leases>,
    habits: Habits,
}

/// A hold on a daemon that serves, for who runs it.
#[derive(Clone)]
pub struct Control {
    access: Arc<Access>,
    tls: Option<Arc<Tls>>,
}

impl Control {
    /// Changes how the daemon is reached, for connections and requests from now on: all of
    /// [`Front`] but where it listens and whether it speaks TLS.
    ///
    /// # Errors
    /// [`ServeError::Tls`]; then all is as it was.
    pub fn set_front(&self, front: Front) -> Result<(), ServeError> {
        if let (Some(tls), Some(files)) = (&self.tls, front.certificate.clone()) {
            tls.reload(files).map_err(ServeError::Tls)?;
        }
        self.access.set_front(front);
        Ok(())
    }
}

impl Daemon {
    /// Binds the socket, mode 0600, replacing one that nobody answers on, and what else there is
    /// to listen on; or takes what was handed over.
    ///
    /// # Errors
    /// [`ServeError`]; then the socket is gone again.
    pub fn bind(
        pool: Arc<MicroVmManager>,
        place: Place,
        front: Front,
        habits: Habits,
    ) -> Result<Self, ServeError> {
        let Place { socket, state, handed } = place;
        // First, so that a second daemon is told of the first one rather than of what it has.
        let listener = match handed.socket {
            Some(handed) => OwnListener::handed(handed)
                .map_err(|source| ServeError::Socket { path: socket, source })?,
            None => OwnListener::bind(&socket)?,
        };
        // Another daemon replaces it, if it stays.
        let remove = listener.remover();
        Self::behind(listener, handed.tcp, pool, &state, front, habits).inspect_err(|_| remove())
    }

    fn behind(
        listener: OwnListener,
        handed: Vec<std::net::TcpListener>,
        pool: Arc<MicroVmManager>,
        state: &Path,
        front: Front,
        habits: Habits,
    ) -> Result<Self, ServeError> {
        let keys = Keys::open(state)?;
        let lack = if !keys.list().iter().any(|key| keys.is_good(&key.id)) {
            Some("there is no key that is good: make one (`denizen key create NAME`)")
        } else if front.certificate.is_none() {
            Some("there is no TLS: set `tls_certificate` and `tls_key`")
        } else {
            None
        };
        let handed: Vec<_> = handed
            .into_iter()
            .filter_map(|listener| Some((listener.local_addr().ok()?, listener)))
            .collect();
        let all = || handed.iter().map(|(address, _)| address).chain(&front.listen);
        let is_open = |address: &&SocketAddr| !address.ip().to_canonical().is_loopback();
        if let (Some(address), Some(lack), false) =
            (all().find(is_open), lack, front.insecure_listen)
        {
            return Err(ServeError::Insecure { address: *address, lack });
        }
        let bound =
            front.listen.iter().filter(|address| handed.iter().all(|(it, _)| it != *address));
        let bound = bound.map(|address| Ok((*address, listen(*address)?)));
        let bound = bound.collect::<Result<Vec<_>, ServeError>>()?;
        let tls = front.certificate.clone().map(Tls::open).transpose().map_err(ServeError::Tls)?;
        let remote = handed.into_iter().chain(bound).map(|(address, listener)| {
            let listener =
                listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener));
            listener.map_err(|source| ServeError::Address { address, source })
        });
        let remote = remote.collect::<Result<_, _>>()?;
        let leases = Arc::new(Leases::new(pool.clone(), habits.logs));
        let audit = Audit::open(state, habits.audit_files).map_err(ServeError::Audit)?;
        let sandboxes = Arc::new(e2b::Sandboxes::open(pool.clone(), leases.clone(), state)?);
        let access = Access::new(pool.clone(), leases.clone(), keys, sandboxes, front, audit);
        let access = Arc::new(access);
        Ok(Self { pool, listener, remote, tls, access, leases, habits })
    }

    /// For changes while it serves.
    pub fn control(&self) -> Control {
        Control { access: self.access.clone(), tls: self.tls.clone() }
    }

    /// The file of its socket.
    pub fn socket(&self) -> Option<PathBuf> {
        self.listener.place()
    }

    /// Where it listens on TCP: the addresses that it was given, with the ports that it got.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.remote.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// Serves until `stop` has something, somebody asks over the API, or the daemon has been idle
    /// for long enough; then ends what runs, unless `stop` says otherwise, and closes the pool.
    /// `ending` is told when that begins. What `stop` has next ends all without more patience.
    ///
    /// Not cancel-safe: dropped, it leaves the socket file behind and the pool open.
    ///
    /// # Errors
    /// [`ServeError`].
    pub async fn serve(
        self,
        mut stop: impl Stream<Item = Ending> + Send + Unpin,
        ending: impl FnOnce(),
    ) -> Result<(), ServeError> {
        let tell = ending;
        let Self { pool, listener, remote, tls, access, leases, habits } = self;
        let remove = listener.remover();
        let asked = Arc::new(tokio::sync::Notify::new());
        let resolver = Arc::new(lease::Resolver(leases.clone()));
        let envd = match pool.isolation()? {
            Isolation::Host => envd::router(resolver),
            // Paths mean something only within.
            _ => envd::processes(resolver.clone())
                .fallback_service(any(files::forward).with_state(resolver)),
        };
        let recent = api::Recent::of(&pool)?;
        let sandboxes = access.sandboxes.clone();
        let api =
            api::Api::new(pool.clone(), leases.clone(), asked.clone(), recent, sandboxes.clone());
        let own = axum::middleware::from_fn_with_state(api.clone(), api::metrics_or_envd);
        let envd = envd.layer(own);
        let e2b = e2b::E2b::new(sandboxes.clone(), access.clone());
        let app = api::router(api, access.clone())
            .merge(e2b::router(e2b))
            .layer(DefaultBodyLimit::max(JSON))
            .merge(web::router())
            .merge(envd)
            .layer(axum::middleware::from_fn_with_state(access.clone(), guard::guard))
            .layer(axum::middleware::from_fn(e2b::worded))
            .layer(axum::middleware::from_fn(trace::traced))
            .layer(axum::middleware::from_fn(rest::read_on));
        let mut servers = JoinSet::new();
        let connections = Connections::default();
        let mcp = mcp::router(app.clone(), access.clone(), connections.clone())
            .layer(axum::middleware::from_fn_with_state(access.clone(), guard::guard))
            .layer(axum::middleware::from_fn(trace::traced))
            .layer(axum::middleware::from_fn(rest::read_on));
        let app = app.merge(mcp);
        for listener in remote {
            let (tls, app, access) = (tls.clone(), app.clone(), access.clone());
            servers.spawn(connections::remote(listener, tls, app, access, connections.clone()));
        }
        servers.spawn(connections::local(listener, app, connections.clone()));
        servers.spawn(access::remember_use(access.clone()));
        servers.spawn(sandboxes.clone().tidy());
        servers.spawn(sandboxes.clone().listen());
        servers.spawn(sandboxes.clone().measure());
        servers.spawn(sandboxes.keep_time());
        let ending = tokio::select! {
            Some(ending) = stop.next() => {
                tracing::info!(?ending, "asked to stop");
                ending
            }
            () = asked.notified() => {
                tracing::info!("asked to stop by a client");
                Ending::Stop
            }
            () = idle(&pool, &leases, habits.idle_exit) => {
                tracing::info!("nothing to do: leaving");
                Ending::Stop
            }
        };
        tell();
        // Nobody new; then nothing that requests do in sessions; then the pool. Who is still there
        // has a moment to read how that ended.
        servers.shutdown().await;
        remove();
        leases.close_to_others();
        let mut ending = ending;
        if ending == Ending::Leave {
            tokio::select! {
                () = leases.foreground_ends() => {}
                () = tokio::time::sleep(habits.grace) => tracing::info!("no more time for commands"),
                Some(sooner) = stop.next() => ending = sooner,
            }
        }
        connections.finish();
        leases.close_all();
        access.keys.remember_use();
        let ended = match ending {
            Ending::Stop => pool.shutdown().await,
            Ending::Leave => pool.leave().await,
        };
        connections.end().await;
        Ok(ended?)
    }
}

fn listen(address: SocketAddr) -> Result<std::net::TcpListener, ServeError> {
    // Rust's own sets SO_REUSEADDR, so that a restart finds its port free.
    std::net::TcpListener::bind(address).map_err(|source| ServeError::Address { address, source })
}

/// Ends when nothing has been in use for `limit` and all is saved that can be.
async fn idle(pool: &MicroVmManager, leases: &Leases, limit: Option<Duration>) {
    let Some(limit) = limit else { return std::future::pending().await };
    let mut quiet_since = tokio::time::Instant::now();
    let mut look = tokio::time::interval(limit.min(Duration::from_secs(5)) / 2);
    loop {
        look.tick().await;
        // The cheap questions first: the last one looks at every session.
        if leases.any() || leases.used_since(quiet_since) || !settled(pool) {
            quiet_since = tokio::time::Instant::now();
        } else if quiet_since.elapsed() >= limit {
            return;
        }
    }
}

/// Whether nothing runs, and nothing more can be saved.
fn settled(pool: &MicroVmManager) -> bool {
    let has_destination = pool.config().backup_destination.is_some();
    pool.sessions().unwrap_or_default().iter().all(|session| {
        let saved = !session.unsaved || !has_destination || session.failures > 0;
        let kept = matches!(session.state, "stopped" | "archived" | "missing");
        session.operation.is_none() && kept && saved
    })
}
