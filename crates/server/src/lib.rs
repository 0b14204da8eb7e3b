//! The daemon: one pool of sessions, offered over HTTP on a Unix socket, and over TCP to those
//! who have a key (`access`).
//!
//! `/v1/…` is about sessions (`api`); `/healthz`, `/readyz` and `/metrics` are about the daemon; `/`
//! is the dashboard (`web`); all else is envd's protocol, for the session that the header
//! [`SESSION`] names (`lease`), with `/metrics` among it where there is that header. The daemon must
//! never decide anything about a session's life: it asks the pool, as any caller of the library
//! does.

mod access;
mod api;
mod connections;
mod files;
mod lease;
mod listener;
mod metrics;
mod rest;
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
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::access::tls::Tls;
use crate::access::{Access, guard};
pub use crate::access::{Certificate, Front, KeyInfo, Keys, KeysError, NewKey, Scope};
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

/// A daemon that has not begun to serve.
pub struct Daemon {
    pool: Arc<MicroVmManager>,
    listener: OwnListener,
    remote: Vec<TcpListener>,
    tls: Option<Arc<Tls>>,
    access: Arc<Access>,
    leases: Arc<Leases>,
    idle_exit: Option<Duration>,
}

impl Daemon {
    /// Binds the socket, mode 0600, replacing one that nobody answers on, and what else there is
    /// to listen on. `state` is the folder with the keys.
    ///
    /// # Errors
    /// [`ServeError`]; then the socket is gone again.
    pub fn bind(
        pool: Arc<MicroVmManager>,
        socket: &Path,
        state: &Path,
        front: Front,
        idle_exit: Option<Duration>,
    ) -> Result<Self, ServeError> {
        // First, so that a second daemon is told of the first one rather than of what it has.
        let listener = OwnListener::bind(socket)?;
        Self::behind(listener, pool, state, front, idle_exit).inspect_err(|_| {
            // Another daemon replaces it, if it stays.
            let _ = std::fs::remove_file(socket);
        })
    }

    fn behind(
        listener: OwnListener,
        pool: Arc<MicroVmManager>,
        state: &Path,
        front: Front,
        idle_exit: Option<Duration>,
    ) -> Result<Self, ServeError> {
        let keys = Keys::open(state)?;
        let lack = if !keys.list().iter().any(|key| keys.is_good(&key.id)) {
            Some("there is no key that is good: make one (`denizen key create NAME`)")
        } else if front.certificate.is_none() {
            Some("there is no TLS: set `tls_certificate` and `tls_key`")
        } else {
            None
        };
        let is_open = |address: &&SocketAddr| !address.ip().to_canonical().is_loopback();
        if let (Some(address), Some(lack), false) =
            (front.listen.iter().find(is_open), lack, front.insecure_listen)
        {
            return Err(ServeError::Insecure { address: *address, lack });
        }
        let tls = front.certificate.clone().map(Tls::open).transpose().map_err(ServeError::Tls)?;
        let remote = front.listen.iter().map(|address| listen(*address));
        let remote = remote.collect::<Result<_, _>>()?;
        let leases = Arc::new(Leases::new(pool.clone()));
        let access = Access::new(pool.clone(), leases.clone(), keys, front, state);
        let access = Arc::new(access.map_err(ServeError::Audit)?);
        Ok(Self { pool, listener, remote, tls, access, leases, idle_exit })
    }

    /// Where it listens on TCP: the addresses that it was given, with the ports that it got.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.remote.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// Serves until `stop` is ready, somebody asks over the API, or the daemon has been idle
    /// for long enough; then ends what runs, unless `stop` says otherwise, and closes the pool.
    ///
    /// Not cancel-safe: dropped, it leaves the socket file behind and the pool open.
    ///
    /// # Errors
    /// [`ServeError`].
    pub async fn serve(self, stop: impl Future<Output = Ending> + Send) -> Result<(), ServeError> {
        let Self { pool, listener, remote, tls, access, leases, idle_exit } = self;
        let path = listener.path().to_owned();
        let asked = Arc::new(tokio::sync::Notify::new());
        let resolver = Arc::new(lease::Resolver(leases.clone()));
        let envd = match pool.isolation()? {
            Isolation::Host => envd::router(resolver),
            // Paths mean something only within.
            _ => envd::processes(resolver.clone())
                .fallback_service(any(files::forward).with_state(resolver)),
        };
        let recent = api::Recent::of(&pool)?;
        let api = api::Api::new(pool.clone(), leases.clone(), asked.clone(), recent);
        let own = axum::middleware::from_fn_with_state(api.clone(), api::metrics_or_envd);
        let envd = envd.layer(own);
        let app = api::router(api)
            .merge(access::routes::router().with_state(access.clone()))
            .layer(DefaultBodyLimit::max(JSON))
            .merge(web::router())
            .merge(envd)
            .layer(axum::middleware::from_fn_with_state(access.clone(), guard::guard))
            .layer(axum::middleware::from_fn(rest::read_on));
        let mut servers = JoinSet::new();
        let connections = Connections::default();
        for listener in remote {
            let (tls, app, access) = (tls.clone(), app.clone(), access.clone());
            servers.spawn(connections::remote(listener, tls, app, access, connections.clone()));
        }
        servers.spawn(connections::local(listener, app, connections.clone()));
        servers.spawn(access::remember_use(access.clone()));
        let ending = tokio::select! {
            ending = stop => {
                tracing::info!(?ending, "asked to stop");
                ending
            }
            () = asked.notified() => {
                tracing::info!("asked to stop by a client");
                Ending::Stop
            }
            () = idle(&pool, &leases, idle_exit) => {
                tracing::info!("nothing to do: leaving");
                Ending::Stop
            }
        };
        // Nobody new; then nothing that requests do in sessions; then the pool. Who is still there
        // has a moment to read how that ended.
        servers.shutdown().await;
        let _ = std::fs::remove_file(&path);
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

fn listen(address: SocketAddr) -> Result<TcpListener, ServeError> {
    let failed = |source| ServeError::Address { address, source };
    // Rust's own sets SO_REUSEADDR, so that a restart finds its port free.
    let listener = std::net::TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    TcpListener::from_std(listener).map_err(failed)
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
