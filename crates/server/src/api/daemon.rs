//! The daemon itself.

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use denizen_api::Health;

use super::Api;
use super::refusal::{Answer, Refused};

/// Whether the daemon is there.
#[utoipa::path(get, path = "/v1/health", tag = "daemon",
    responses((status = 200, body = Health)))]
pub(crate) async fn health() -> axum::Json<Health> {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    axum::Json(Health { version, pid: std::process::id() })
}

/// The pool in numbers, for Prometheus.
#[utoipa::path(get, path = "/v1/metrics", tag = "daemon",
    responses((status = 200, body = String, content_type = "text/plain"), Refused))]
pub(crate) async fn metrics(State(api): State<Api>) -> Answer<Response> {
    let text = crate::metrics::text(&api.pool.figures()?, &api.pool.sessions()?);
    Ok(([(CONTENT_TYPE, crate::metrics::CONTENT_TYPE)], text).into_response())
}

/// End the daemon and what runs in its sessions.
#[utoipa::path(post, path = "/v1/shutdown", tag = "daemon",
    responses((status = 202, description = "It ends"), Refused))]
pub(crate) async fn shutdown(State(api): State<Api>) -> StatusCode {
    api.stop.notify_one();
    StatusCode::ACCEPTED
}
