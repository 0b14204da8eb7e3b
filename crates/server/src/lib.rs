//! The daemon: one pool of sessions, offered over HTTP on a Unix socket.
//!
//! `/v1/…` is about sessions (`api`), with `/v1/metrics` for Prometheus (`/metrics` is a session's,
//! as envd has it); all else is envd's protocol, for the session that the header [`SESSION`] names
//! (`lease`). The daemon must never decide anything about a session's life: it asks the pool, as
//! any caller of the library does.

mod api;
mod files;
mod lease;
mod listener;
mod metrics;
mod rest;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::routing::any;
use denizen::{Isolation, MicroVmManager};
use denizen_agent::envd;

pub use crate::api::description;
use crate::lease::Leases;
use crate::listener::OwnListener;

/// Request header that names a session, by name or UUID. Clients of envd send
/// `E2b-Sandbox-Id`, which is understood too.
pub const SESSION: &str = "denizen-session";

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
    leases: Arc<Leases>,
    idle_exit: Option<Duration>,
}

impl Daemon {
    /// Binds the socket, mode 0600, replacing one that nobody answers on.
    ///
    /// # Errors
    /// [`ServeError::Socket`], [`ServeError::Taken`].
    pub fn bind(
        pool: Arc<MicroVmManager>,
        socket: &Path,
        idle_exit: Option<Duration>,
    ) -> Result<Self, ServeError> {
        let listener = OwnListener::bind(socket)?;
        let leases = Arc::new(Leases::new(pool.clone()));
        Ok(Self { pool, listener, leases, idle_exit })
    }

    /// Serves until `stop` is ready, somebody asks over the API, or the daemon has been idle
    /// for long enough; then ends what runs, unless `stop` says otherwise, and closes the pool.
    ///
    /// Not cancel-safe: dropped, it leaves the socket file behind and the pool open.
    ///
    /// # Errors
    /// [`ServeError`].
    pub async fn serve(self, stop: impl Future<Output = Ending> + Send) -> Result<(), ServeError> {
        let Self { pool, listener, leases, idle_exit } = self;
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
        let app = api::router(api).merge(envd).layer(axum::middleware::from_fn(rest::read_on));
        let server = tokio::spawn(async move { axum::serve(listener, app).await });
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
        // Nobody new; then nothing that runs in the foreground; then the pool.
        server.abort();
        let _ = std::fs::remove_file(&path);
        leases.kill_all(ending).await;
        drop(leases);
        match ending {
            Ending::Stop => pool.shutdown().await?,
            Ending::Leave => pool.leave().await?,
        }
        Ok(())
    }
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
