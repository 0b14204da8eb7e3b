//! The daemon itself.

use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use denizen::{Error, MicroVmManager, RegistryError};
use denizen_api::{Code, Health};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::Api;
use super::refusal::{Answer, Refused};
use crate::access::guard::{self, named};

/// Whether the daemon is there.
#[utoipa::path(get, path = "/v1/health", tag = "daemon",
    responses((status = 200, body = Health), Refused))]
pub(crate) async fn health() -> axum::Json<Health> {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    axum::Json(Health { version, pid: std::process::id() })
}

/// Whether the daemon's process lives: for who would start it anew if not.
#[utoipa::path(get, path = "/healthz", tag = "daemon", security(()),
    responses((status = 200, body = String, content_type = "text/plain")))]
pub(crate) async fn lives() -> &'static str {
    "ok\n"
}

/// Whether the daemon can do its work: for who would send it some. The pool takes sessions, its
/// registry can be read, its disk written. A second line, `degraded: …`, tells of backups that cannot
/// be written: sessions go on without them.
#[utoipa::path(get, path = "/readyz", tag = "daemon", security(()),
    responses((status = 200, body = String, content_type = "text/plain"), Refused))]
pub(crate) async fn is_ready(State(api): State<Api>) -> Answer<String> {
    match api.ready.look(&api.pool).await {
        Ok(None) => Ok("ok\n".to_owned()),
        Ok(Some(degraded)) => Ok(format!("ok\ndegraded: {degraded}\n")),
        Err(why) => Err(Refused::new(Code::NotReady, why)),
    }
}

/// What was found when it was last looked whether the daemon is ready.
#[derive(Default)]
pub(crate) struct Ready(Mutex<Option<(Instant, Found)>>);

/// Why it is not, or what it has to do without.
type Found = Result<Option<&'static str>, &'static str>;

/// How long that is good. Anybody may ask, and looking costs a write.
const GOOD: Duration = Duration::from_secs(1);
/// A disk that takes longer is not one to work with.
const PATIENCE: Duration = Duration::from_secs(5);

impl Ready {
    /// Looks, unless somebody just has. Cancel-safe.
    async fn look(&self, pool: &MicroVmManager) -> Found {
        // Whoever comes while somebody looks waits for what that one finds.
        let mut last = self.0.lock().await;
        if let Some((_, found)) = last.filter(|(at, _)| at.elapsed() < GOOD) {
            return found;
        }
        let found = match tokio::time::timeout(PATIENCE, pool.check()).await {
            Ok(Ok(())) => Ok(degraded(pool).await),
            Ok(Err(error)) => {
                // Who asks need not be one to be told of paths.
                tracing::error!(%error, "not ready");
                Err(match error.kind() {
                    Error::ShuttingDown => "the daemon is shutting down",
                    Error::Registry(RegistryError::Replaced { .. }) => {
                        "the volume root is not there, or is another one: see the daemon's log"
                    }
                    Error::Registry(_) => "the registry cannot be read: see the daemon's log",
                    Error::Volume { .. } => {
                        "the volume root cannot be written: see the daemon's log"
                    }
                    _ => "the pool does not answer: see the daemon's log",
                })
            }
            Err(_) => {
                tracing::error!("not ready: the disk does not answer");
                Err("the disk does not answer in time")
            }
        };
        *last = Some((Instant::now(), found));
        found
    }
}

/// What does not work of that which sessions can do without, for a time. Cancel-safe.
async fn degraded(pool: &MicroVmManager) -> Option<&'static str> {
    match tokio::time::timeout(PATIENCE, pool.check_destination()).await {
        Ok(Ok(())) => {
            let sessions = pool.sessions().unwrap_or_default();
            let is_failing = sessions.iter().any(|session| session.backup_failure.is_some());
            is_failing
                .then_some("the last backup of some sessions has failed: `denizen ls` shows which")
        }
        Ok(Err(error)) => {
            tracing::warn!(%error, "degraded");
            Some("the backup destination cannot be written: see the daemon's log")
        }
        Err(_) => {
            tracing::warn!("degraded: the backup destination does not answer");
            Some("the backup destination does not answer in time")
        }
    }
}

/// The daemon in numbers, for Prometheus. `/metrics` is the same, where no header names a session.
#[utoipa::path(get, path = "/v1/metrics", tag = "daemon",
    responses((status = 200, body = String, content_type = "text/plain"), Refused))]
pub(crate) async fn metrics(State(api): State<Api>) -> Answer<Response> {
    let (figures, sessions) = (api.pool.figures()?, api.pool.sessions()?);
    let (acquires, starts) = (api.leases.acquires(), api.leases.starts());
    let running = sessions.iter().filter(|it| matches!(it.state, "active" | "frozen"));
    let running: Vec<_> = running.map(|session| session.id).collect();
    let usages: Vec<_> = api.pool.usage(&running).await?.into_values().collect();
    let text = crate::metrics::text(&figures, &acquires, &starts, &sessions, &usages);
    Ok(([(CONTENT_TYPE, crate::metrics::CONTENT_TYPE)], text).into_response())
}

/// Answers `GET /metrics` for the daemon, and `GET /health` for E2B's API, if they are of no session;
/// all else is envd's.
pub(crate) async fn metrics_or_envd(
    State(api): State<Api>,
    request: Request,
    next: Next,
) -> Response {
    let is_read = [Method::GET, Method::HEAD].contains(request.method());
    if is_read && request.uri().path() == "/metrics" && named(request.headers()).is_none() {
        return metrics(State(api)).await.into_response();
    }
    let (parts, body) = request.into_parts();
    if guard::is_of_api(&parts) {
        return "Health check successful".into_response();
    }
    next.run(Request::from_parts(parts, body)).await
}

/// End the daemon and what runs in its sessions.
#[utoipa::path(post, path = "/v1/shutdown", tag = "daemon",
    responses((status = 202, description = "It ends"), Refused))]
pub(crate) async fn shutdown(State(api): State<Api>) -> StatusCode {
    api.stop.notify_one();
    StatusCode::ACCEPTED
}
